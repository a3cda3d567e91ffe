"""grad_filter: vocabulary entries without a gradient worth the name stay out of the GEMMs, within a stated bound."""

from __future__ import annotations

import pytest
import torch

import fused_gopd as fg
from builders import OBJECTIVES, assert_all_close, assert_close, make_batch, relative_error, run
from combinations import product_on_float64
from costs import GEMM, H, N, V, gemm_flops
from fused_gopd.loop import gemm

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
SHAPE = {"shape": (12,), "vocab": (501,) * 3, "hidden": (24, 20, 16), "scale": 4.0}


@every_objective
def test_off_is_exactly_off(backend, objective):
    batch = make_batch(110, dtype=torch.float32, **SHAPE)
    options = {"backend": backend, "reward_scale": 1.25, **objective}
    got, grads = run(batch, grad_filter=0.0, **options)
    want, want_grads = run(batch, **options)
    assert torch.equal(got.loss, want.loss)
    assert all(map(torch.equal, grads, want_grads))


@product_on_float64(objective=OBJECTIVES, reduction=["sum", "none"], chunk=[5, 12])
def test_the_error_is_within_the_bound(backend_dtype, objective, reduction, chunk):
    """|w| = 1 in full; |A| in sampled; the largest slope of the token, at most that of its gradient, in topk."""
    batch = make_batch(111, dtype=backend_dtype.dtype, masked=False, **SHAPE)
    options = {"backend": backend_dtype.backend, "reward_scale": 1.25, "chunk_size": chunk, "reduction": reduction}
    options |= objective

    def gradients(**more):
        out = fg.gopd_loss(*batch.models, batch.token_ids, **options, **more)
        return out, torch.autograd.grad(out.loss.sum(), batch.leaves)

    plain, (dhidden, dweight) = gradients()
    factor = torch.ones(12, dtype=backend_dtype.dtype)
    if objective["estimator"] == "sampled":
        factor = plain.advantages.abs()
    elif objective["estimator"] == "topk":
        # a token's slopes sum to its dense weight: all are at most twice the largest entry of its gradient, over 1 - p
        z = batch.student.hidden.detach() @ batch.student.weight.detach().T
        logits = fg.Logits(z.requires_grad_())
        out = fg.gopd_loss(logits, *batch.models[1:], batch.token_ids, **options)
        (slope,) = torch.autograd.grad(out.loss.sum(), z)
        factor = slope.abs().sum(-1) / (1 - z.detach().softmax(-1).amax(-1))
    norms = batch.student.weight.detach().norm(dim=1)
    reach = (factor * batch.student.hidden.detach().norm(dim=1)).sum()
    dropped_before = 0
    for eps in (1e-7, 1e-4, 1e-2, 1e-1):
        out, (rows, weight) = gradients(grad_filter=eps)
        assert torch.equal(out.loss, plain.loss)  # the loss is not touched
        rounding = 20 * torch.finfo(backend_dtype.dtype).eps
        assert ((rows - dhidden).norm(dim=1) <= factor * eps * norms.sum() + rounding * dhidden.norm()).all()
        assert ((weight - dweight).norm(dim=1) <= eps * reach + rounding * dweight.norm()).all()
        dropped = int((weight == 0).all(1).sum())
        assert dropped >= dropped_before
        dropped_before = dropped
    assert dropped_before > 100  # it does leave something out


def test_columns_below_the_filter_cost_no_work(backend):
    batch = make_batch(112, shape=(N,), vocab=(V,) * 3, hidden=(H,) * 3, dtype=torch.float32, masked=False, scale=12.0)
    counts = []

    def call(eps):
        fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, estimator="full", chunk_size=16,
                     backend=backend, grad_filter=eps).loss.backward()  # fmt: skip

    for eps in (0.0, 1e-3, 1e9):
        call(eps)
        counts.append(gemm_flops(lambda eps=eps: call(eps)))
    assert counts[0] == 5 * GEMM
    assert 3 * GEMM < counts[1] < 4.5 * GEMM
    assert counts[2] == 3 * GEMM


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_tensors_skip_their_half(backend, frozen):
    batch = make_batch(113, dtype=torch.float32, **SHAPE)
    leaf = batch.student.hidden if frozen == "weight" else batch.student.weight
    (batch.student.weight if frozen == "weight" else batch.student.hidden).requires_grad_(False)
    options = {"mask": batch.mask, "reward_scale": 1.25, "estimator": "full", "backend": backend}
    (got,) = torch.autograd.grad(fg.gopd_loss(*batch.models, grad_filter=1e-6, **options).loss, leaf)
    (want,) = torch.autograd.grad(fg.gopd_loss(*batch.models, **options).loss, leaf)
    assert_close(got, want, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_padding(backend, dtype):
    batch = make_batch(114, **SHAPE | {"vocab": (510, 501, 501)}, dtype=dtype)
    got, grads = run(batch, backend=backend, grad_filter=1e-6, estimator="full", reward_scale=1.25)
    want, want_grads = run(batch, backend=backend, estimator="full", reward_scale=1.25)
    assert torch.equal(got.loss, want.loss)
    assert max(relative_error(a, b) for a, b in zip(grads, want_grads, strict=True)) <= torch.finfo(dtype).eps
    assert not grads[1][501:].any()


def test_columns_with_nan_are_kept(backend):
    batch = make_batch(115, dtype=torch.float32, masked=False, **SHAPE)
    with torch.no_grad():
        batch.student.hidden[3] = torch.nan
    _, (grad, _) = run(batch, backend=backend, estimator="full", grad_filter=0.5)
    assert torch.isnan(grad).any(1).nonzero()[:, 0].tolist() == [3]


def test_two_runs_and_a_second_backward_give_the_same_bits(backend):
    batch = make_batch(116, dtype=torch.float32, **SHAPE)
    results = []
    for _ in range(2):
        out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, grad_filter=1e-4, backend=backend)
        results += [torch.autograd.grad(out.loss, batch.leaves, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_selected_products_are_the_products_over_these_columns():
    generator = torch.Generator().manual_seed(0)
    dlogits, weight, hidden = (torch.randn(*s, generator=generator) for s in ((7, 90), (90, 11), (7, 11)))
    columns = torch.tensor([0, 3, 4, 40, 89])
    total = torch.ones(90, 11)
    rows = gemm.selected_products(dlogits, weight, columns, hidden, total, True)
    want = torch.zeros_like(dlogits)
    want[:, columns] = dlogits[:, columns]
    assert_all_close([rows, total], [want @ weight, 1 + want.T @ hidden], 1e-6)
    assert gemm.selected(want, 1e-9).tolist() == columns.tolist()
    assert gemm.selected(dlogits, 1e-9) is None  # most of them
    assert gemm.selected(dlogits, 1e9).numel() == 0
    assert gemm.selected_products(dlogits, weight, columns[:0], hidden, None, True).abs().sum() == 0


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize(("value", "error", "message"), [
    (-1e-3, ValueError, "grad_filter must not be negative"),
    ("a", TypeError, "grad_filter must be a Python number"),
    (float("nan"), ValueError, "grad_filter must be finite"),
])  # fmt: skip
def test_what_is_wrong_is_named(function, value, error, message):
    batch = make_batch(117)
    with pytest.raises(error, match=message):
        function(*batch.models, batch.token_ids, grad_filter=value)
    logits = make_batch(117, kinds=("logits",) * 3)
    with pytest.raises(ValueError, match="grad_filter needs a LinearHead as the student"):
        function(*logits.models, logits.token_ids, grad_filter=1e-3)
