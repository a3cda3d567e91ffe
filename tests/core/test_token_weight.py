"""``token_weight``: a factor of each token's loss, of every estimator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
from builders import (
    OBJECTIVES,
    REDUCTIONS,
    assert_all_close,
    assert_close,
    assert_same_as_oracle,
    expect,
    generator,
    like,
    make_batch,
    run,
    trainable,
)
from combinations import product_on_float64

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 5)


def weights(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """From 0 to 1e4, an eighth of them 0."""
    g = generator(1)
    each = 10 ** (torch.rand(shape, generator=g, dtype=torch.float64) * 6 - 2)
    return torch.where(torch.rand(shape, generator=g) < 0.125, 0, each).to(dtype)


@product_on_float64(objective=OBJECTIVES, reduction=REDUCTIONS, kind=("linear", "logits"))
def test_it_is_a_factor_of_the_token_loss(backend_dtype, objective, reduction, kind):
    batch = make_batch(21, shape=SHAPE, kinds=(kind, "linear", "logits"), dtype=backend_dtype.dtype)
    w = weights(backend_dtype.dtype).clamp_max(10)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, reduction=reduction, token_weight=w, **objective)


@given(
    seed=st.integers(0, 10_000),
    objective=st.sampled_from(OBJECTIVES),
    reduction=st.sampled_from(REDUCTIONS),
    per=st.sampled_from(["token", "sequence", "packed sequence"]),
    chunk=st.integers(1, 20),
    labels=st.booleans(),
)
def test_any_objective_any_reduction_any_chunk(seed, objective, reduction, per, chunk, labels):
    packed = per == "packed sequence"
    batch = make_batch(seed, shape=(15,) if packed else SHAPE)
    options = {"reward_scale": 1.25, "reduction": reduction, **objective}
    options["token_weight"] = weights(shape=SHAPE if per == "token" else (3,))
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 4, 4 + seed % 9, 15])
    if labels:
        options["sft_labels"] = batch.token_ids
    out, grads = run(batch, backend="torch", chunk_size=chunk, **options)
    want, want_grads = expect(batch, **options)
    assert_close(out.token_loss, want.token_loss, 1e-12)
    assert_close(out.loss, want.loss, 1e-12)
    assert_all_close(grads, want_grads, 1e-12)
    dense, dense_grads = run(batch, fg.reference.gopd_loss, **options)
    assert_close(dense.loss, want.loss, 1e-12)
    assert_all_close(dense_grads, want_grads, 1e-12)


@pytest.mark.parametrize("student", ["linear", "logits"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_without_a_reduction_the_loss_has_it(objective, student, backend_dtype):
    batch = make_batch(22, shape=SHAPE, kinds=(student, "linear", "linear"), dtype=backend_dtype.dtype)
    w, upstream = weights(backend_dtype.dtype).clamp_max(10), torch.linspace(-1, 2, 15).reshape(SHAPE)
    upstream = upstream.to(backend_dtype.dtype)
    options = {"reward_scale": 1.25, "reduction": "none", "backend": backend_dtype.backend, **objective}
    plain = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options)
    want = torch.autograd.grad(plain.loss, batch.leaves, upstream * w)
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        out = function(*batch.models, batch.token_ids, mask=batch.mask, token_weight=w, **options)
        assert_close(out.loss, plain.token_loss * w, backend_dtype.tolerance)
        assert_close(out.token_loss, plain.token_loss, backend_dtype.tolerance)
        assert_all_close(torch.autograd.grad(out.loss, batch.leaves, upstream), want, backend_dtype.tolerance)


def test_a_weight_of_1_changes_no_bit(backend):
    batch = make_batch(23, shape=SHAPE, dtype=torch.float32)
    for reduction in (*REDUCTIONS, "none"):
        options = {"reward_scale": 1.25, "estimator": "full", "reduction": reduction, "backend": backend}
        outs = [fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options, **more)
                for more in ({}, {"token_weight": torch.ones(SHAPE)})]  # fmt: skip
        plain, weighted = ((out.loss, *torch.autograd.grad(out.loss.sum(), batch.leaves)) for out in outs)
        assert all(map(torch.equal, plain, weighted))
        assert outs[0].metrics().to_dict() == outs[1].metrics().to_dict()


def test_a_weight_of_0_has_no_gradient_and_stays_in_the_divisor(backend):
    batch = make_batch(24, shape=(6,), dtype=torch.float32, masked=False)
    w = torch.tensor([1.0, 0, 1, 1, 0, 1])
    out, grads = run(batch, reward_scale=1.25, estimator="full", token_weight=w, backend=backend)
    masked, masked_grads = run(batch.replaced(mask=w), reward_scale=1.25, estimator="full", normalizer=6,
                               backend=backend)  # fmt: skip
    assert_close(out.loss, masked.loss, 1e-6)
    assert_all_close(grads, masked_grads, 1e-6)
    assert (grads[0][w == 0] == 0).all()


def test_one_weight_for_each_teacher(backend):
    """w[teacher_index] is the weighted sum of one loss a teacher."""
    batch = make_batch(25, shape=SHAPE, dtype=torch.float32)
    teachers, index = [batch.teacher, batch.ref], torch.arange(15).reshape(SHAPE) % 2
    w = torch.tensor([0.25, 3.0])
    options = {"reduction": "sum", "backend": backend}
    several = batch.replaced(teacher=teachers, ref=None)
    out, grads = run(several, teacher_index=index, token_weight=w[index], **options)
    alone = [
        run(batch.replaced(teacher=q, ref=None, mask=batch.mask & (index == i)), **options)
        for i, q in enumerate(teachers)
    ]
    assert_close(out.loss, sum(w[i] * each.loss for i, (each, _) in enumerate(alone)), 1e-5)
    want = [w[0] * a + w[1] * b for a, b in zip(alone[0][1], alone[1][1], strict=True)]
    assert_all_close(grads, want, 1e-5)


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("objective", [{"estimator": "sampled"}, {"estimator": "full"}, {"estimator": "topk", "k": 5}])
def test_float16_under_a_loss_scale(objective, reduction, backend):
    """Weights of 0 and of 1e-2 ... 1e4, a loss scale of 2^10 and a divisor of 1e6: as float32 hidden states."""
    batch = make_batch(26, shape=(8,), dtype=torch.float16, masked=False)
    w = torch.tensor([0, 1e-2, 0.1, 1, 10, 1e2, 1e3, 1e4])

    def gradient(batch, divisor=1e6):
        options = {"reduction": reduction} | ({"normalizer": divisor} if reduction == "token-mean" else {})
        loss = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, token_weight=w, backend=backend,
                            **objective, **options).loss  # fmt: skip
        loss = loss if reduction == "token-mean" else loss.sum() / divisor
        return torch.autograd.grad(1024 * loss, batch.leaves)

    wide = batch.replaced(
        student=trainable(like(batch.student, **{k: v.detach().float() for k, v in batch.student.tensors.items()})),
        teacher=like(batch.teacher, **{k: v.float() for k, v in batch.teacher.tensors.items()}),
        ref=like(batch.ref, **{k: v.float() for k, v in batch.ref.tensors.items()}),
    )
    for got, want in zip(gradient(batch), gradient(wide), strict=True):
        assert got.isfinite().all()
        assert_close(got, want, 2e-3)  # products of float16 operands


def test_float16_beside_a_weight_of_1e4_the_others_keep_their_digits(backend):
    """Each row of the hidden states' gradient on its own: relative to the largest one 1e-4 would underflow."""
    batch = make_batch(28, shape=(8,), dtype=torch.float16, masked=False)
    w = torch.ones(8)
    w[0] = 1e4

    def rows(weight):
        loss = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, estimator="full", token_weight=weight,
                            normalizer=1e5, backend=backend).loss  # fmt: skip
        return torch.autograd.grad(2**16 * loss, batch.leaves)[0]

    assert torch.equal(rows(w)[1:], rows(torch.ones(8))[1:])


def test_it_is_detached_and_masked_entries_have_no_effect():
    batch = make_batch(27, shape=SHAPE)
    w = weights()
    poisoned = w.masked_fill(~batch.mask, math.nan).requires_grad_()
    out, grads = run(batch, token_weight=poisoned, reward_scale=1.25)
    want, want_grads = run(batch, token_weight=w, reward_scale=1.25)
    assert torch.equal(out.loss, want.loss)
    assert all(map(torch.equal, grads, want_grads))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2.0, TypeError, "token_weight must be a torch.Tensor, got float"),
        (torch.ones(SHAPE, dtype=torch.int64), TypeError, "token_weight must be a float tensor"),
        (torch.ones(4), ValueError, r"token_weight must be a tensor of the token shape \(3, 5\) or one value per"),
        (torch.ones(SHAPE).index_fill(1, torch.tensor(2), -1.0), ValueError, "not negative where not masked, got -1"),
        (torch.full(SHAPE, math.inf), ValueError, "token_weight must be finite and not negative .* got inf"),
        (torch.full(SHAPE, math.nan), ValueError, "token_weight must be finite and not negative .* got nan"),
        (torch.ones(SHAPE, device="meta"), ValueError, "token_weight must be on the student's device cpu"),
    ],
)
def test_what_it_refuses(value, error, message):
    batch = make_batch(28, shape=SHAPE, masked=False)
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        with pytest.raises(error, match=message):
            function(*batch.models, batch.token_ids, reward_scale=1.25, token_weight=value)


def test_the_module_takes_it_per_batch():
    batch = make_batch(29, shape=SHAPE, masked=False)
    module, w = fg.GOPDLoss(reward_scale=1.25, estimator="full"), weights()
    out = module(*batch.models, batch.token_ids, token_weight=w)
    assert_close(out.loss.detach(), (out.token_loss * w).mean(), 1e-12)
    with pytest.raises(TypeError, match="token_weight"):
        fg.GOPDLoss(token_weight=w)
