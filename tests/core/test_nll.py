"""linear_nll: the cross entropy of labels, with label smoothing and z-loss, against PyTorch's own in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fused_gopd as fg
from builders import (
    assert_all_close,
    assert_close,
    generator,
    linear_head,
    logits_head,
    relative_error,
    trainable,
    widened,
)
from combinations import product_on_float64
from costs import GEMM, H, Memory, N, V, gemm_flops
from fused_gopd.objective.layout import STATISTICS

pytestmark = pytest.mark.usefixtures("one_thread")

TRANSFORM = {"softcap": 8.0, "temperature": 0.8, "logit_scale": 1.3}


def head_of(seed: int, kind: str = "linear", shape: tuple[int, ...] = (3, 5), **options: Any) -> Any:
    options = {"vocab": 37, "dtype": torch.float64, **options}
    if kind == "linear":
        return trainable(linear_head(seed, shape, hidden=12, **options))
    return trainable(logits_head(seed, shape, **options))


def labels_of(seed: int, shape: tuple[int, ...] = (3, 5), vocab: int = 37) -> Tensor:
    """About a third of the tokens have none."""
    g = generator(seed)
    labels = torch.randint(vocab, shape, generator=g)
    return labels.masked_fill(torch.rand(shape, generator=g) < 0.3, -100)


def cross_entropy(head: Any, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Token losses, 0 where there is no label, by PyTorch's cross entropy."""
    if isinstance(head, fg.Logits):
        x = head.logits
    else:
        x = head.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    x = x * head.logit_scale
    z = (x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)) / head.temperature
    loss = torch.nn.functional.cross_entropy(
        z.reshape(-1, z.shape[-1]), labels.reshape(-1), label_smoothing=label_smoothing, reduction="none"
    )
    return loss.reshape(labels.shape) + z_loss * torch.where(labels == -100, 0, z.logsumexp(-1).square())


def gradients(loss: Tensor, head: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in head.tensors.values() if x.requires_grad]))


@product_on_float64(kind=["linear", "logits"], label_smoothing=[0.0, 0.1, 1.0], z_loss=[0.0, 1e-4, 0.3])
def test_it_is_the_cross_entropy_of_pytorch(backend_dtype, kind, label_smoothing, z_loss):
    transform = TRANSFORM | ({"bias": True} if kind == "linear" else {})
    head, labels = head_of(1, kind, dtype=backend_dtype.dtype, **transform), labels_of(1)
    terms = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    got = fg.linear_nll(head, labels, backend=backend_dtype.backend, chunk_size=4, **terms)
    wide = widened(head)
    want = cross_entropy(wide, labels, **terms).sum() / (labels != -100).sum()
    assert got.dtype == backend_dtype.dtype
    assert_close(got, want, backend_dtype.tolerance)
    assert_all_close(gradients(got, head), gradients(want, wide), backend_dtype.tolerance)


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["linear", "logits"]),
    label_smoothing=st.sampled_from([0.0, 0.05, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3, 2.0]),
    reduction=st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"]),
    chunk=st.integers(1, 16),
    masked=st.booleans(),
    vocab_size=st.sampled_from([None, 30]),
)
def test_random_calls_are_the_dense_reference(
    seed, kind, label_smoothing, z_loss, reduction, chunk, masked, vocab_size
):
    head, labels = head_of(seed, kind), labels_of(seed, vocab=vocab_size or 37)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction, "vocab_size": vocab_size}
    mask = torch.rand(labels.shape, generator=generator(seed + 1)) < 0.6 if masked else None
    got = fg.linear_nll(head, labels, mask=mask, backend="torch", chunk_size=chunk, **options)
    want = fg.reference.linear_nll(head, labels, mask=mask, **options)
    assert_close(got, want, 1e-12)
    upstream = torch.randn(got.shape, generator=generator(seed + 2), dtype=torch.float64)
    assert_all_close(gradients((got * upstream).sum(), head), gradients((want * upstream).sum(), head), 1e-11)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"])
def test_reductions_count_the_tokens_with_a_label(backend, reduction):
    head, labels = head_of(2, dtype=torch.float32), labels_of(2)
    labels[1] = -100  # a sequence without any
    each = cross_entropy(widened(head), labels)
    lengths = (labels != -100).sum(1)
    want = {
        "token-mean": each.sum() / lengths.sum(),
        "seq-mean-token-mean": (each.sum(1) / lengths.clamp_min(1)).sum() / 2,
        "seq-mean-token-sum": each.sum(1).sum() / 2,
        "sum": each.sum(),
        "none": each,
    }[reduction]
    assert_close(fg.linear_nll(head, labels, backend=backend, reduction=reduction), want, 1e-5)


def test_packed_sequences_normalizer_and_lengths(backend):
    head, labels = head_of(3, shape=(9,), dtype=torch.float32), torch.arange(9)
    each = cross_entropy(widened(head), labels)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    options = {"backend": backend, "cu_seqlens": bounds, "reduction": "seq-mean-token-mean"}
    got = fg.linear_nll(head, labels, normalizer=4, sequence_lengths=torch.tensor([8, 10]), **options)
    assert_close(got, (each[:4].sum() / 8 + each[4:].sum() / 10) / 4, 1e-5)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_token_weights(backend, reduction, dtype):
    head, labels = head_of(32, dtype=dtype), labels_of(32)
    weight = torch.rand(labels.shape, generator=generator(1)) * 3
    weight[0, 0], weight[1, 1], weight[2] = 0, 1e4, 0.5
    got = fg.linear_nll(head, labels, token_weight=weight, backend=backend, reduction=reduction, z_loss=1e-3)
    wide = widened(head)
    each = weight * fg.reference.linear_nll(wide, labels, reduction="none", z_loss=1e-3)
    lengths = (labels != -100).sum(1)
    want = {
        "token-mean": each.sum() / lengths.sum(),
        "seq-mean-token-mean": (each.sum(1) / lengths).sum() / 3,
        "none": each,
    }[reduction]
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3  # float16 rounds the gradient of the hidden states, eps 1e-3
    assert_close(got, want, 2e-5)
    assert_all_close(gradients(got.sum(), head), gradients(want.sum(), wide), tolerance)


def test_what_has_no_label_is_not_read(backend):
    """Its hidden states may be NaN, a masked label any number, and a batch without any label has the loss 0."""
    head, labels = head_of(4, dtype=torch.float32), labels_of(4)
    mask = torch.rand(labels.shape, generator=generator(5)) < 0.7
    want = fg.linear_nll(head, labels.masked_fill(~mask, -100), backend=backend)
    with torch.no_grad():
        head.hidden[(labels == -100) | ~mask] = math.nan
    got = fg.linear_nll(head, labels.masked_fill(~mask, 10**6), mask=mask, backend=backend)
    assert torch.equal(got, want)
    assert all(torch.isfinite(g).all() for g in gradients(got, head))
    for reduction in ("token-mean", "seq-mean-token-mean", "none"):
        nothing = fg.linear_nll(head, torch.full_like(labels, -100), backend=backend, reduction=reduction).sum()
        assert nothing == 0
        assert all((g == 0).all() for g in gradients(nothing, head))


@pytest.mark.parametrize("mask", [-math.inf, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=str)
def test_masks_in_the_logits(backend, terms, mask):
    """As float64 has it; a logit of -inf is no entry of the vocabulary, so smoothing means over the others."""
    head, labels = head_of(6, "logits", (6,), dtype=torch.float32), torch.arange(6) + 3
    gone = torch.zeros(37, dtype=torch.bool)
    gone[[0, 1, 20, 36]] = True
    with torch.no_grad():
        head.logits[:, gone] = mask
    got = fg.linear_nll(head, labels, backend=backend, **terms)
    (gradient,) = gradients(got, head)
    wide = widened(head)
    if mask == -math.inf:
        cut = trainable(fg.Logits(wide.logits[:, ~gone]))
        want = cross_entropy(cut, labels - 2, **terms).mean()
        (inside,) = gradients(want, cut)
        expected = torch.zeros(6, 37, dtype=torch.float64)
        expected[:, ~gone] = inside
    else:
        want = cross_entropy(wide, labels, **terms).mean()
        (expected,) = gradients(want, wide)
    assert_close(got, want, 2e-5)
    assert_close(gradient, expected, 2e-5)


def test_a_label_that_cannot_be_given_has_the_loss_inf(backend):
    head = head_of(7, "logits", (2,), dtype=torch.float32)
    with torch.no_grad():
        head.logits[1, 5] = -math.inf
    loss = fg.linear_nll(head, torch.tensor([5, 5]), backend=backend, reduction="none")
    assert torch.isfinite(loss[0])
    assert loss[1] == math.inf
    assert torch.equal(-loss, fg.token_logprobs(head, torch.tensor([5, 5]), backend=backend))
    (gradient,) = gradients(loss[0], head)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=["plain", "terms"])
@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_low_precision_is_no_worse_than_the_naive_path(backend, kind, terms, dtype):
    """Under a loss scale of 2^10, as float16 is trained with."""
    errors = []
    for function in (fg.linear_nll, fg.reference.linear_nll):
        more = {"backend": backend} if function is fg.linear_nll else {}
        total = 0.0
        for seed in range(3):
            head, labels = head_of(10 + seed, kind, dtype=dtype), labels_of(seed)
            wide = widened(head)
            want = gradients(1024 * fg.reference.linear_nll(wide, labels, **terms), wide)
            got = gradients(1024 * function(head, labels, **terms, **more), head)
            total += sum(relative_error(a, b) ** 2 for a, b in zip(got, want, strict=True))
        errors.append(math.sqrt(total))
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("terms", "reduction", "gemms"), [
    ({}, "token-mean", 3), ({"label_smoothing": 0.1}, "token-mean", 3), ({"z_loss": 0.1}, "token-mean", 3),
    ({}, "none", 4),
], ids=str)  # fmt: skip
def test_its_cost_in_matrix_products_and_memory(backend, terms, reduction, gemms):
    head = head_of(20, shape=(N,), vocab=V, dtype=torch.float32)
    head = trainable(linear_head(20, (N,), V, H, torch.float32))
    labels = labels_of(20, (N,), V)
    labels[::2] = -100
    labels[1::2].clamp_(min=0)

    def call():
        fg.linear_nll(head, labels, chunk_size=16, backend=backend, reduction=reduction, **terms).sum().backward()

    call()
    assert gemm_flops(call) == gemms * GEMM // 2  # half of the tokens have a label
    assert Memory(call).largest <= 4 * max(V * H, 16 * V, N * (STATISTICS + 40))


def test_a_frozen_weight_costs_one_product_less(backend):
    head = linear_head(21, (N,), V, H, torch.float32)
    head = fg.LinearHead(head.hidden.requires_grad_(), head.weight)
    labels = torch.randint(V, (N,), generator=generator(1))
    assert gemm_flops(lambda: fg.linear_nll(head, labels, backend=backend).backward()) == 2 * GEMM
    with torch.no_grad():
        assert gemm_flops(lambda: fg.linear_nll(head, labels, backend=backend)) == GEMM


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"reduction": "none"},
                                     {"mask": True}], ids=str)  # fmt: skip
def test_compiled_gives_the_same_bits(options):
    torch._dynamo.reset()
    head, labels = head_of(22, dtype=torch.float32), labels_of(22)
    if "mask" in options:
        options = {"mask": torch.rand(labels.shape, generator=generator(5)) < 0.7}

    def call(head, labels):
        return fg.linear_nll(head, labels, **options)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(head, labels)
    want = call(head, labels)
    assert torch.equal(got, want)
    assert all(map(torch.equal, gradients(got.sum(), head), gradients(want.sum(), head)))
    torch._dynamo.reset()


def test_torch_func_and_a_second_backward(backend):
    head, labels = head_of(23, dtype=torch.float32), labels_of(23)

    def loss(hidden, weight):
        return fg.linear_nll(fg.LinearHead(hidden, weight), labels, backend=backend, label_smoothing=0.1)

    want = gradients(loss(head.hidden, head.weight), head)
    got = torch.func.grad(loss, argnums=(0, 1))(head.hidden.detach(), head.weight.detach())
    assert_all_close(got, want, 1e-6)
    out = loss(head.hidden, head.weight)
    first = torch.autograd.grad(out, (head.hidden, head.weight), retain_graph=True)
    second = torch.autograd.grad(out, (head.hidden, head.weight))
    assert all(map(torch.equal, first, second))


def test_it_is_the_supervised_term_of_the_loss(backend):
    """gopd_loss with labels on the same tokens adds sft_weight times this."""
    head, labels = head_of(24, shape=(8,), dtype=torch.float32), torch.arange(8)
    same = fg.LinearHead(head.hidden.detach(), head.weight.detach())
    out = fg.gopd_loss(head, same, estimator="full", sft_labels=labels, sft_weight=0.5, backend=backend)
    assert_close(out.loss, 0.5 * fg.linear_nll(head, labels, backend=backend), 1e-6)


def test_chunks_make_no_difference(backend):
    head, labels = head_of(25, shape=(33,), dtype=torch.float32), labels_of(25, (33,))
    for terms in ({}, {"label_smoothing": 0.2, "z_loss": 0.1}):
        calls = [fg.linear_nll(head, labels, backend=backend, chunk_size=c, **terms) for c in (1, 7, 64)]
        for call in calls[1:]:
            assert_close(call, calls[0], 1e-6)
            assert_all_close(gradients(call, head), gradients(calls[0], head), 1e-5)
            calls[0] = fg.linear_nll(head, labels, backend=backend, chunk_size=1, **terms)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "head": ({"head": torch.zeros(3, 5)}, TypeError, "head must be a LinearHead or Logits"),
    "labels of floats": ({"labels": torch.zeros(3, 5)}, TypeError, "labels must be an integer tensor"),
    "shape": ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "labels must have the token shape.*of head"),
    "range": ({"labels": torch.full((3, 5), 37)}, IndexError, r"labels must be in \[0, 37\), or -100.*got 37"),
    "minus one": ({"labels": torch.full((3, 5), -1)}, IndexError, "labels must be in.*got -1"),
    "vocabulary": ({"vocab_size": 40}, ValueError, "vocab_size must be between 1 and 37"),
    "mask": ({"mask": torch.ones(5)}, ValueError, "mask must have the token shape.*of head"),
    "weight": ({"token_weight": torch.full((3, 5), -1.0)}, ValueError, "token_weight must be finite and not negative"),
    "weights": ({"token_weight": torch.ones(4)}, ValueError, "token_weight must be a tensor of the token shape"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
    "smoothing of a tensor": ({"label_smoothing": torch.ones(())}, TypeError, "label_smoothing must be a Python num"),
    "z": ({"z_loss": -1e-4}, ValueError, "z_loss must not be negative"),
    "reduction": ({"reduction": "mean"}, ValueError, "reduction must be one of"),
    "normalizer": ({"normalizer": 0}, ValueError, "normalizer must be positive"),
    "sum": ({"normalizer": 2, "reduction": "sum"}, ValueError, "normalizer is an option of the mean reductions"),
    "lengths": ({"sequence_lengths": torch.ones(3)}, ValueError, "sequence_lengths is an option of"),
    "filter": ({"head": "logits", "grad_filter": 0.1}, ValueError, "grad_filter needs a LinearHead"),
    "chunk_dtype": ({"chunk_dtype": torch.bfloat16}, ValueError, "chunk_dtype=.*head.hidden is"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "unknown": ({"smoothing": 0.1}, TypeError, r"linear_nll\(\) got an unexpected keyword argument 'smoothing'"),
}


@pytest.mark.parametrize("function", [fg.linear_nll, fg.reference.linear_nll], ids=["fused", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_named(case, function):
    given, error, message = ERRORS[case]
    arguments: dict[str, Any] = {"head": head_of(30), "labels": labels_of(30), **given}
    if arguments["head"] == "logits":
        arguments["head"] = head_of(30, "logits")
    with pytest.raises(error, match=message):
        function(**arguments)


def test_filtered_products(backend):
    head, labels = head_of(31, shape=(40,), vocab=300, dtype=torch.float32, scale=6.0), labels_of(31, (40,), 300)
    exact = gradients(fg.linear_nll(head, labels, backend=backend), head)
    near = gradients(fg.linear_nll(head, labels, backend=backend, grad_filter=1e-5), head)
    assert_all_close(near, exact, 1e-3)


def test_types_are_those_of_the_call():
    import inspect

    signature = inspect.signature(fg.linear_nll)
    assert [*signature.parameters][:2] == ["head", "labels"]
    assert signature.parameters["reduction"].default == "token-mean"
