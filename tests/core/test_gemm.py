"""The three products of a head: float32 accumulation whatever the dtype, and no weight widened whole."""

from __future__ import annotations

import pytest
import torch

from builders import assert_close, generator
from fused_gopd.loop import gemm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A sum of n float32 products is off by at most n * 6e-8 of its terms' size, in practice by its square root.
TOLERANCE = {torch.float64: 1e-14}


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def wide_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(params=[1, 40, 1 << 20], ids=["block of 1 row", "blocks of 5 rows", "one block"])
def block_elements(request, monkeypatch):
    """The blocks that a weight is taken in; H is 8 here."""
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", request.param)


@pytest.fixture(params=[False, True], ids=["mm", "oneDNN"], autouse=True)
def library(request, monkeypatch):
    """Both libraries, whichever this machine would take."""
    if request.param and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(gemm, "_libraries", lambda: gemm.Libraries(request.param, request.param))
    monkeypatch.setattr(gemm, "_ONEDNN_WORK", 0)
    monkeypatch.setattr(gemm, "_ONEDNN_DWEIGHT_ROWS", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_the_product_in_wide_precision(dtype, block_elements):
    hidden, weight = normal(6, 8, dtype=dtype), normal(13, 8, dtype=dtype, seed=1)
    out = torch.full((6, 20), torch.nan, dtype=wide_dtype(dtype))
    gemm.logits_into(out[:, :13], weight)(hidden)
    assert_close(out[:, :13], hidden.double() @ weight.double().T, TOLERANCE.get(dtype, 1e-6))
    assert out[:, 13:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_hidden_is_the_product_in_wide_precision(dtype, block_elements):
    weight = normal(13, 8, dtype=dtype, seed=1)
    dlogits = normal(6, 13, dtype=gemm.gradient_dtype(weight), seed=2)
    got = gemm.dhidden(dlogits, weight)
    assert got.dtype == wide_dtype(dtype)
    assert_close(got, dlogits.double() @ weight.double(), TOLERANCE.get(dtype, 1e-6))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_hidden_is_written_where_it_is_wanted_and_rounded_once(dtype, out_dtype, block_elements):
    weight = normal(13, 8, dtype=dtype, seed=1)
    dlogits = normal(6, 13, dtype=gemm.gradient_dtype(weight), seed=2)
    rows = torch.full((9, 8), torch.nan, dtype=out_dtype)
    assert gemm.dhidden(dlogits, weight, rows[2:8]).data_ptr() == rows[2].data_ptr()
    assert torch.equal(rows[2:8], gemm.dhidden(dlogits, weight).to(out_dtype))
    assert rows[[0, 1, 8]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_hidden_over_no_columns_is_zero(dtype):
    """A rank of a shared vocabulary may have none of it."""
    weight = torch.empty(0, 8, dtype=dtype)
    dlogits = torch.empty(6, 0, dtype=gemm.gradient_dtype(weight))
    assert torch.equal(gemm.dhidden(dlogits, weight), torch.zeros(6, 8, dtype=wide_dtype(dtype)))
    assert torch.equal(gemm.dhidden(dlogits, weight, torch.full((6, 8), torch.nan)), torch.zeros(6, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_weight_is_added_in_wide_precision(dtype, block_elements):
    hidden = normal(6, 8, dtype=dtype)
    dlogits = normal(6, 13, dtype=wide_dtype(dtype), seed=2)
    start = normal(13, 8, dtype=wide_dtype(dtype), seed=3)
    got = gemm.add_dweight_(start.clone(), dlogits.T, hidden)
    assert got.dtype == start.dtype
    product = dlogits.double().T @ hidden.double()
    assert_close(got, start.double() + product, TOLERANCE.get(dtype, 1e-6))
    got = gemm.add_dweight_(torch.full_like(start, torch.nan), dlogits.T, hidden, first=True)
    assert_close(got, product, TOLERANCE.get(dtype, 1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_never_rounds_the_logit_gradient(dtype):
    assert gemm.gradient_dtype(torch.zeros(1, 1, dtype=dtype)) == torch.float32
    assert not gemm.accumulates_low_precision(torch.zeros(1, 1, dtype=dtype))


def test_a_transposed_weight_is_multiplied_as_it_lies():
    hidden, weight = normal(4, 8, dtype=torch.float32), normal(8, 13, dtype=torch.float32, seed=1).T
    logits = torch.empty(4, 13)
    gemm.logits_into(logits, weight)(hidden)
    assert_close(logits, hidden.double() @ weight.double().T, 1e-6)


def test_strided_operands_are_multiplied_as_they_lie():
    """A chunk's buffer is wider than the vocabulary, and hidden states may be a slice."""
    weight = normal(13, 8, dtype=torch.float32, seed=1)
    dlogits = normal(6, 16, dtype=torch.float32, seed=2)[:, :13]
    hidden = normal(6, 2, 8, dtype=torch.float32)[:, 0]
    assert_close(gemm.dhidden(dlogits, weight), dlogits.double() @ weight.double(), 1e-6)
    got = gemm.add_dweight_(torch.zeros(13, 8), dlogits.T, hidden)
    assert_close(got, dlogits.double().T @ hidden.double(), 1e-6)


def test_the_choice_of_a_library_depends_on_shapes_and_the_device_model(monkeypatch):
    monkeypatch.setattr(gemm, "_libraries", lambda: gemm.Libraries(True, True))
    monkeypatch.setattr(gemm, "_ONEDNN_WORK", 6 * 13 * 8)
    weight = torch.zeros(13, 8)
    assert gemm._uses_onednn(6, weight)
    assert not gemm._uses_onednn(5, weight)
    assert not gemm._uses_onednn(6, weight.double())
    assert gemm._uses_onednn(6, weight.bfloat16())


def test_switching_onednn_off_is_respected(monkeypatch):
    monkeypatch.setattr(gemm, "_libraries", lambda: gemm.Libraries(True, True))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not gemm._uses_onednn(1 << 20, torch.zeros(13, 8))


@pytest.mark.parametrize(
    ("reported", "onednn"),
    [
        ({"cpu_name": "AMD EPYC 9754", "avx2": True, "avx512_f": True}, (True, True)),
        ({"cpu_name": "AMD Ryzen 9 5950X", "avx2": True, "avx512_f": False}, (True, False)),
        ({"cpu_name": "AMD FX-8350", "avx2": False}, (False, False)),
        ({"cpu_name": "Intel Xeon Platinum 8481C", "avx2": True, "avx512_f": True}, (False, False)),
        ({"cpu_name": "Unknown", "avx2": True}, (False, False)),
        ({}, (False, False)),
    ],
    ids=str,
)
def test_the_library_is_chosen_by_what_the_cpu_reports(reported, onednn):
    assert gemm.libraries_for(reported) == onednn


def test_the_gradient_of_the_weight_has_a_choice_of_its_own(monkeypatch):
    weight = torch.zeros(13, 8)
    monkeypatch.setattr(gemm, "_libraries", lambda: gemm.Libraries(True, False))
    assert gemm._uses_onednn(6, weight)
    assert not gemm._uses_onednn(6, weight, dweight=True)
    monkeypatch.setattr(gemm, "_libraries", lambda: gemm.Libraries(True, True))
    assert gemm._uses_onednn(6, weight, dweight=True)
    monkeypatch.setattr(gemm, "_ONEDNN_DWEIGHT_ROWS", 7)
    assert not gemm._uses_onednn(6, weight, dweight=True)


def test_blocks_of_many_tokens_are_not_larger_than_those_of_a_wide_weight(monkeypatch):
    """What a block takes beside the weight has tokens x its entries."""
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 40)
    taken = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: taken.append(shape) or empty(*shape, **more))
    monkeypatch.setattr(gemm, "_libraries", lambda: gemm.Libraries(True, True))
    gemm.add_dweight_(torch.zeros(13, 2), torch.zeros(20, 13).T, torch.zeros(20, 2))
    assert taken == [(2, 40)]


def test_a_default_device_is_not_that_of_the_operands():
    f32 = torch.float32
    dlogits, hidden, total = normal(6, 13, dtype=f32), normal(6, 8, dtype=f32, seed=1), torch.empty(13, 8)
    with torch.device("meta"):
        gemm.add_dweight_(total, dlogits.T, hidden, first=True)
    assert_close(total, dlogits.T @ hidden, 1e-6)
