"""Every option and kind of model on a simulated GPU: no tensor on the wrong device, and no wait but those below.

tests/helpers/fake_gpu.py says what is simulated. The values are those of the CPU, to the bit: the same operations run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import assert_close
from fake_gpu import CUDA, OnGPU, fake_gpu, kernels_alone
from fused_gopd.options import RULES
from fused_gopd.output import _FIELDS as OUTPUT_FIELDS
from option_cases import arguments, batch_of, called, cases, moved

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(cases(batch_of()))
# What waits for the device, in which calls: the number of live tokens, of a route's tokens, of columns that are left.
MASK = {"nonzero in tokens.py:live_rows": 1}
ROUTES = {"tolist in prepare.py:_in_route_order": 1}
FILTER = {"nonzero in gemm.py:selected": 1}
MASKED = (
    "sampled",
    "clips",
    "packed",
    "routes",
    "labels",
    "full",
    "full, reward_scale_fn",
    "full, terms",
    "topk of a server",
)
# Refused while a graph is captured, with a mask: the first two count tokens or columns, the others need whole sequences
# or call a function of live tokens.
REFUSED = ("routes", "grad_filter", "atio of sequences", "importance of sequences", "advantage_fn", "reward_scale_fn")


def results(out: fg.GOPDOutput, grads: list[Tensor]) -> dict[str, Tensor]:
    """Every tensor of an output, the sums of its metrics, and the gradients."""
    found = {name: getattr(out, name) for name in OUTPUT_FIELDS} | {"metrics": out.metrics().sums}
    found |= {f"gradient {i}": g for i, g in enumerate(grads)}
    return {name: x.detach() for name, x in found.items() if isinstance(x, Tensor)}


def of_gpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their values."""
    assert [name for name, x in found.items() if x.device != CUDA] == []
    return {name: x.inner for name, x in found.items()}


def test_every_argument_has_a_case() -> None:
    used = {argument for case in cases(batch_of()).values() for argument in arguments(batch_of(), case)}
    assert set(RULES) - used == {"backend", "chunk_dtype", "store_exponentials"}  # given below; needs Triton


@pytest.mark.parametrize(("case", "masked"), [*((x, False) for x in NAMES), *((x, True) for x in MASKED)])
def test_a_call_stays_on_the_device(case: str, masked: bool) -> None:
    batch = batch_of(masked)
    given = arguments(batch, cases(batch)[case])
    with fake_gpu() as gpu:
        got = of_gpu(results(*called(moved(given, gpu.put), backend="torch")))
    expected = (MASK if masked else {}) | (ROUTES if "routes" in case else {}) | (FILTER if "filter" in case else {})
    assert gpu.waits == expected
    want = results(*called(given, backend="torch"))
    assert got.keys() == want.keys()
    assert [name for name, x in want.items() if not torch.equal(got[name].nan_to_num(), x.nan_to_num())] == []


@pytest.mark.parametrize("case", NAMES)
def test_a_captured_call_waits_for_nothing(case: str) -> None:
    """All rows are computed then, those that are masked on zeros. What needs a value on the host is refused."""
    batch = batch_of(masked=True)
    given = arguments(batch, cases(batch)[case])
    with fake_gpu(capturing=True) as gpu:
        on_gpu = moved(given, gpu.put)
        if any(x in case for x in REFUSED):
            with pytest.raises(ValueError, match="waits for the device"):
                called(on_gpu, backend="torch")
            return
        got = of_gpu(results(*called(on_gpu, backend="torch")))
    assert not gpu.waits
    want = results(*called(given, backend="torch"))
    assert got.keys() == want.keys()
    for name in ("token_loss", "metrics", *(x for x in want if x.startswith("gradient"))):
        assert_close(got[name].nan_to_num(), want[name].nan_to_num(), 4e-6, name)  # sums of 24 rows in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["sampled", "baseline", "softcap, temperature, bias", "full", "full, logits", "topk"])
def test_low_precision_goes_the_way_of_a_gpu(case: str, dtype: torch.dtype) -> None:
    """Products of 16-bit operands with float32 results, and chunks in 16 bits, which a CPU does not have."""
    batch = batch_of(dtype=dtype)
    given = arguments(batch, cases(batch)[case])
    want, eps = results(*called(given, backend="torch")), torch.finfo(dtype).eps
    for options in ({},) if "logits" in case else ({}, {"chunk_dtype": dtype}):
        with fake_gpu() as gpu:
            got = of_gpu(results(*called(moved(given, gpu.put), backend="torch", **options)))
        assert not gpu.waits
        # logits of up to 10 that are rounded to 16 bits; or only the gradients are
        assert_close(got["token_loss"], want["token_loss"], 10 * eps if options else 4e-6)
        for name in (x for x in want if x.startswith("gradient")):
            assert got[name].dtype == dtype
            assert_close(got[name], want[name], 10 * eps if options else 2 * eps, name)


@pytest.mark.parametrize("case", NAMES)
def test_kernels_get_what_is_on_the_device(case: str) -> None:
    """Chunks and launches are those of an H200; their values are not computed."""
    pytest.importorskip("triton")
    batch = batch_of(dtype=torch.bfloat16)
    with fake_gpu() as gpu, kernels_alone() as kernels:
        given = moved(arguments(batch, cases(batch)[case]), gpu.put)
        found = results(*called(given, backend="triton"))
        if "logits" not in case:  # twice as wide as a gradient that lies over them
            found |= {"16 bits": called(given, backend="triton", chunk_dtype=torch.bfloat16)[0].entropy}
    assert {x.device for x in found.values()} == {CUDA}
    assert kernels
    assert gpu.waits.keys() <= ROUTES.keys() | FILTER.keys()


def test_other_calls_stay_on_the_device() -> None:
    batch = batch_of(masked=True)
    labels = batch.token_ids.masked_fill(~batch.mask, -100)
    some = torch.stack((batch.token_ids, batch.token_ids.roll(1)), -1)

    def calls(given: dict[str, Any]) -> dict[str, Tensor]:
        head, ids, mask = given["head"], given["ids"], given["mask"]
        found: list[Tensor] = [*fg.token_logprobs(head, ids, mask=mask, return_entropy=True, backend="torch")]
        found += [fg.selected_logprobs(head, given["some"], mask=mask, backend="torch")]
        options = {"label_smoothing": 0.1, "z_loss": 1e-3, "backend": "torch"}
        found += [
            fg.linear_nll(head, given["labels"], mask=mask, reduction=r, **options) for r in ("token-mean", "none")
        ]
        grads = torch.autograd.grad(sum(x.sum() for x in found), [head.hidden, head.weight])
        found += [*grads, *fg.token_topk(head, 3, mask=mask, backend="torch")]
        return {str(i): x.detach() for i, x in enumerate(found)}

    given = {"head": batch.student, "ids": batch.token_ids, "mask": batch.mask, "some": some, "labels": labels}
    with fake_gpu() as gpu:
        got = of_gpu(calls(moved(given, gpu.put)))
    assert set(gpu.waits) == set(MASK)
    assert [name for name, x in calls(given).items() if not torch.equal(got[name], x)] == []


# ------------------------------------------------------------------------------------------------ the simulation itself


def test_tensors_of_two_devices_are_refused_but_for_numbers() -> None:
    cpu = torch.arange(3.0)
    with fake_gpu() as gpu:
        x = gpu.put(cpu)
        assert (x.device, x.is_cuda, torch.zeros(3, device=x.device).device, x.new_zeros(2).device) == (
            CUDA,
            True,
            CUDA,
            CUDA,
        )
        assert torch.equal((x + torch.tensor(2.0)).inner, cpu + 2)
        for wrong in (lambda: x + cpu, lambda: cpu.mul_(x), lambda: torch.cat([x, cpu]), lambda: x @ cpu[:, None],
                      lambda: torch.stack([x[0], torch.tensor(1.0)])):  # fmt: skip
            with pytest.raises(RuntimeError, match="cuda:0 and on cpu"):
                wrong()
    assert not gpu.waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: torch.arange(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.copy_(torch.arange(3.0)),
    ],
    ids=range(13),
)
def test_what_waits_is_counted(wait: Any) -> None:
    with fake_gpu() as gpu:
        x = gpu.put(torch.arange(3.0))
        assert not gpu.waits
        wait(x)
    assert sum(gpu.waits.values()) == 1


def test_gradients_flow_on_the_device() -> None:
    with fake_gpu() as gpu:
        x = gpu.put(torch.arange(3.0).requires_grad_())
        y = x.clone()
        y.mul_(2)[:1].fill_(5)
        (y.masked_fill_(y > 4, 0) * torch.ones(3, device="cuda")).sum().backward()
        assert x.grad.device == CUDA
    assert isinstance(x.grad, OnGPU)
    assert x.grad.inner.tolist() == [0, 2, 2]
    assert not gpu.waits
