"""The driver's handling of low-precision GEMM operands, which only a GPU's library has, emulated on the CPU.

A GPU multiplies float16 and bfloat16 as they are and gives float32. Then the logit gradient is rounded to the weight's
dtype over the logits' own memory, and a weight that tokens share is applied to the weight's gradient at the end. Here
the products are those of the rounded operands in float32, so every decision of the driver is the GPU's.
"""

from __future__ import annotations

import pytest
import torch

import fused_gopd as fg
from builders import OBJECTIVES, make_batch, relative_error, why_not, widened
from combinations import pairwise
from fused_gopd.loop import gemm

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["torch", "native"])
def backend(request):
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def low_precision_products(monkeypatch):
    def operands(*tensors):
        assert {t.dtype for t in tensors} <= set(LOW), "a GPU's GEMM has both operands in the weight's dtype"
        return [t.float() for t in tensors]

    def logits_into(out, weight):
        def product(hidden):
            h, w = operands(hidden, weight)
            out.copy_(h @ w.T)

        assert out.dtype in (torch.float32, weight.dtype)
        return product

    def dhidden_of(dlogits, weight, dtype):
        def product(out):
            g, w = operands(dlogits, weight)
            return g @ w

        assert dtype is None, "a GPU's GEMM that rounds its result may round parts of the sum, too"
        return product

    def dweight_into(accumulator, dlogits):
        def product(hidden, first):
            g, h = operands(dlogits, hidden)
            return accumulator.addmm_(g, h, beta=0 if first else 1)

        assert accumulator.dtype == torch.float32
        return product

    monkeypatch.setattr(gemm, "accumulates_low_precision", lambda x: x.dtype in LOW)
    for function in (logits_into, dhidden_of, dweight_into):
        monkeypatch.setattr(gemm, function.__name__, function)


def gradients(batch, function=fg.gopd_loss, *, factor=1.0, upstream=None, **options):
    """Gradients of factor * loss, or of sum upstream * loss for ``reduction="none"``."""
    loss = function(*batch.models, batch.token_ids, mask=batch.mask, **options).loss
    value = loss * factor if upstream is None else (loss * upstream).sum()
    return torch.autograd.grad(value, batch.leaves)


def bound(dtype):
    """Rounded at three places at most: the logits' gradient, hidden states with their factor, the result.

    Half a unit in the last place each, 1.5 eps in all; in the norm roundings average and stay below it.
    """
    return 1.5 * torch.finfo(dtype).eps


@pairwise(
    backend=["torch", "native"],
    dtype=LOW,
    objective=OBJECTIVES,
    reduction=["token-mean", "seq-mean-token-mean", "sum", "none"],
)
def test_gradients_are_rounded_at_three_places_at_most(dtype, objective, reduction, backend):
    batch = make_batch(3, dtype=dtype)
    upstream = torch.linspace(-1, 2, 10).reshape(2, 5) if reduction == "none" else None
    options = dict(reward_scale=1.25, reduction=reduction, upstream=upstream, **objective)
    got = gradients(batch, backend=backend, chunk_size=3, **options)
    wide = batch.replaced(student=widened(batch.student), teacher=widened(batch.teacher), ref=widened(batch.ref))
    want = gradients(wide, fg.reference.gopd_loss, **options)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= bound(dtype)


@pairwise(backend=["torch", "native"], dtype=LOW, objective=OBJECTIVES)
def test_chunks_in_low_precision_give_what_logits_in_that_dtype_give(dtype, objective, backend):
    """As if each model had returned its logits in that dtype: no rounding but of these and of the gradients."""
    batch = make_batch(6, dtype=dtype)
    options = dict(reward_scale=1.25, backend=backend, **objective)
    out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, chunk_size=3, chunk_dtype=dtype, **options)
    got = torch.autograd.grad(out.loss, batch.leaves)
    student = widened(batch.student)
    logits = [(student.hidden @ student.weight.T)]
    logits += [widened(m).hidden @ widened(m).weight.T for m in (batch.teacher, batch.ref)]
    # rounded in the forward, and passed through in the backward
    heads = [fg.Logits(z + (z.to(dtype).double() - z).detach()) for z in logits]
    want = fg.reference.gopd_loss(*heads, batch.token_ids, mask=batch.mask, reward_scale=1.25, **objective)
    assert relative_error(out.token_loss, want.token_loss) < 2e-5
    for g, w in zip(got, torch.autograd.grad(want.loss, (student.hidden, student.weight)), strict=True):
        assert relative_error(g, w) <= bound(dtype)


def test_chunks_in_low_precision_need_a_gpu(monkeypatch):
    monkeypatch.undo()
    batch = make_batch(6, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"chunk_dtype=.* is for .* a CUDA GPU, .*student.hidden .* on cpu"):
        gradients(batch, estimator="full", chunk_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_equal_models_give_zero_in_low_precision_chunks(dtype):
    batch = make_batch(7, dtype=dtype)
    same = batch.replaced(teacher=batch.student, ref=batch.student)
    options = {"estimator": "full", "chunk_dtype": dtype, "reward_scale": 1.25}
    assert all((g == 0).all() for g in gradients(same, **options))


@pairwise(
    backend=["torch", "native"],
    objective=OBJECTIVES[:2],
    normalizer=[1e5, 1e7],
    reduction=["token-mean", "seq-mean-token-mean"],
)
def test_float16_gradients_survive_tiny_token_weights(objective, reduction, normalizer, backend):
    """float16 holds nothing below 6e-8; a loss scaler undoes the normaliser after the forward."""
    batch = make_batch(4, dtype=torch.float16)
    options = dict(reward_scale=1.25, reduction=reduction, backend=backend, **objective)
    plain = gradients(batch, normalizer=1, **options)
    scaled = gradients(batch, normalizer=normalizer, factor=normalizer, **options)
    for a, b in zip(plain, scaled, strict=True):
        assert relative_error(b, a) <= bound(torch.float16)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_float16_weight_gradient_survives_a_loss_scale(divergence, backend):
    """Hidden states times an upstream gradient of 2^15 overflow float16; what they are summed to does not."""
    batch = make_batch(5, dtype=torch.float16, scale=0.5)
    hidden = batch.student.hidden.detach() * 8  # some above 2, which is all that float16 has room for at that scale
    student = fg.LinearHead(hidden.requires_grad_(), (batch.student.weight.detach() / 16).requires_grad_())
    batch = batch.replaced(student=student)
    assert (hidden.abs().max() * 2**15).isinf()
    options = {"estimator": "full", "divergence": divergence, "reduction": "none", "backend": backend}
    plain, scaled = (
        gradients(batch, upstream=torch.full(batch.token_ids.shape, u), **options)[1] for u in (2.0**-3, 2.0**15)
    )
    fits = plain.double().abs() * 2**18 < 6e4
    assert fits.float().mean() > 0.9
    assert relative_error(scaled.double()[fits], plain.double()[fits] * 2**18) <= bound(torch.float16)
