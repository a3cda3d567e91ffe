"""The dense reference: the same oracle, and the same refusals, as the fused loss."""

from __future__ import annotations

import math

import pytest
import torch

import fused_gopd as fg
import oracle
from builders import (
    LAMBDAS,
    OBJECTIVES,
    REDUCTIONS,
    assert_all_close,
    assert_close,
    expect,
    make_batch,
    minus_inf_batch,
    run,
    widened,
)
from combinations import pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVE_IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
TOLERANCE = 1e-12


def assert_same_as_oracle(batch, **options):
    out, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = expect(batch, **options)
    assert_close(out.token_loss, want.token_loss, TOLERANCE, "token_loss")
    assert_close(out.loss, want.loss, TOLERANCE, "loss")
    assert_all_close(grads, want_grads, TOLERANCE)
    assert_close(out.entropy, want.entropy, TOLERANCE, "entropy")
    for name in ("student_logprobs", "teacher_logprobs", "ref_logprobs", "advantages"):
        got = getattr(out, name)
        if got is not None:
            assert_close(got, getattr(want, name), TOLERANCE, name)
    if out.kl is not None:
        assert_close(out.kl, want.kl, TOLERANCE, "kl")


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_every_objective_is_its_formula(objective, lam):
    transforms = [{"bias": True, "softcap": 5.0}, {"temperature": 0.7}, {"logit_scale": 1.5}]
    assert_same_as_oracle(make_batch(1, vocab=(37, 40, 38), transforms=transforms), reward_scale=lam, **objective)


@pytest.mark.parametrize("reduction", [*REDUCTIONS])
def test_every_reduction_is_its_formula(reduction):
    batch = make_batch(2, shape=(3, 4))
    batch.mask[1] = False
    assert_same_as_oracle(batch, reward_scale=1.25, reduction=reduction)


@pytest.mark.parametrize("kinds", [("logits", "logprobs", "linear"), ("linear", "logits", "logprobs")])
def test_kinds_of_models_mix(kinds):
    assert_same_as_oracle(make_batch(3, kinds=kinds), reward_scale=1.25)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
@pytest.mark.parametrize("transform", [{}, {"softcap": 4.0}], ids=["plain", "softcap"])
def test_a_token_of_probability_0_is_outside_the_support(objective, transform):
    batch = minus_inf_batch(transform=transform)
    lam = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.25, 0.0], dtype=torch.float64)
    assert_same_as_oracle(batch, reward_scale=lam, **objective)


def test_a_ratio_and_clipping_are_their_formula():
    batch = make_batch(4)
    own = oracle.gopd(*[widened(m) for m in batch.models], batch.token_ids).student_logprobs
    old = own + 0.4 * torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5)
    assert_same_as_oracle(batch, reward_scale=1.25, old_logprobs=old, clip=(0.2, 0.28))


@pairwise(objective=OBJECTIVES, model=["student", "teacher", "ref"], poison=[math.nan, math.inf])
def test_a_diverged_model_is_not_hidden(objective, model, poison):
    batch = make_batch(5, shape=(4,), kinds=("logits",) * 3, masked=False)
    with torch.no_grad():
        getattr(batch, model).logits[1, (int(batch.token_ids[1]) + 1) % 37] = poison
    out, grads = run(batch, fg.reference.gopd_loss, reward_scale=1.25, **objective)
    assert out.token_loss.isnan().tolist() == [False, True, False, False]
    assert grads[0][1].isnan().any()


def test_it_refuses_what_the_fused_loss_refuses():
    batch = make_batch(6)
    with pytest.raises(ValueError, match="ref must be given"):
        fg.reference.gopd_loss(batch.student, batch.teacher, None, batch.token_ids, reward_scale=1.25)
    with pytest.raises(IndexError, match="token_ids"):
        fg.reference.gopd_loss(*batch.models, batch.token_ids + 37)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
def test_nothing_live_is_zero(reduction):
    batch = make_batch(7)
    batch.mask[:] = False
    out = fg.reference.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reduction=reduction)
    grads = torch.autograd.grad(out.loss.sum(), batch.leaves)
    assert out.loss.sum() == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize(("cancelled", "lam"), [("ref", 1.0), ("teacher", 0.0)])
def test_score_cancelled_scores_it(cancelled, lam):
    batch = make_batch(8)
    dense, _ = run(batch, fg.reference.gopd_loss, reward_scale=lam, score_cancelled=True)
    fused, _ = run(batch, reward_scale=lam, score_cancelled=True, backend="torch")
    name = f"{cancelled}_logprobs"
    assert_close(getattr(dense, name), getattr(fused, name), TOLERANCE)


@pytest.mark.parametrize("loss", [fg.gopd_loss, fg.reference.gopd_loss])
def test_score_cancelled_has_nothing_to_score_where_the_model_is_not_given(loss):
    batch = make_batch(8)
    out = loss(batch.student, batch.teacher, None, batch.token_ids, score_cancelled=True)
    assert out.ref_logprobs is None
    assert out.teacher_logprobs is not None


def test_lambda_of_a_function_beside_log_probs_in_a_sum_of_models():
    """A sum whose models are scored one by one has no logits."""
    g = torch.Generator().manual_seed(3)
    z, x, y = (torch.randn(5, 9, generator=g, dtype=torch.float64) for _ in range(3))
    ids, given = torch.arange(5), -torch.rand(5, generator=g, dtype=torch.float64)
    log_p, log_x, log_y = (a.log_softmax(1).gather(1, ids[:, None])[:, 0] for a in (z, x, y))
    total = fg.LogLinear([fg.Logits(x), fg.TokenLogProbs(given)], [0.5, 0.25])
    for function in (fg.reference.gopd_loss, fg.gopd_loss):
        out = function(fg.Logits(z), total, fg.Logits(y), ids, reward_scale_fn=lambda s: 1 + s.teacher_logprobs)
        lam = 1 + 0.5 * log_x + 0.25 * given
        torch.testing.assert_close(out.advantages, lam * (lam - 1) + (1 - lam) * log_y - log_p)


def test_gspo_without_a_live_token_has_a_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    options = {"old_logprobs": torch.zeros(2, 3), "ratio": "sequence-mean", "mask": torch.zeros(2, 3)}
    ids = torch.zeros(2, 3, dtype=torch.int64)
    out = fg.reference.gopd_loss(fg.Logits(logits), fg.Logits(logits.detach()), None, ids, reduction="none", **options)
    assert (torch.autograd.grad(out.loss.sum(), logits)[0] == 0).all()
