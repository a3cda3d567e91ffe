"""The per-token mathematics on its own: advantages, ratios, clipping, token weights."""

from __future__ import annotations

import math

import pytest
import torch

import oracle
from builders import assert_close, generator
from fused_gopd.objective.policy import advantage, advantages_of, policy_term
from fused_gopd.objective.reductions import token_weights
from fused_gopd.objective.statistics import entropy, token_logprob
from fused_gopd.objective.target import mix
from fused_gopd.options import REDUCTIONS
from fused_gopd.rowops import PolicyRule, Stat
from fused_gopd.tokens import Sequences

INF, NAN = math.inf, math.nan


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 1.25, -2.0])
def test_mix_is_linear_and_exact_at_equal_models(lam):
    q, r = vector(-1.3, 2.7), vector(0.4, -5.1)
    assert_close(mix(lam, q, r), lam * q + (1 - lam) * r, 1e-15)
    assert torch.equal(mix(lam, q, q), q)


def test_mix_ignores_a_model_whose_coefficient_is_zero_per_token():
    lam = vector(0.0, 1.0)
    for poison in (NAN, INF, -INF):
        q, r = vector(poison, -1.0), vector(-2.0, poison)
        assert torch.equal(mix(lam, q, r), vector(-2.0, -1.0))


def test_mix_of_one_model_is_that_model():
    q = vector(-1.0)
    assert mix(1.0, q, None) is q
    assert mix(0.0, None, q) is q


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.25])
def test_advantage_is_its_formula(lam):
    g = generator(0)
    p, q, r = (-torch.rand(20, generator=g, dtype=torch.float64) * 9 for _ in range(3))
    value, finite = advantage(lam, p, None if lam == 0 else q, None if lam == 1 else r)
    want = [oracle.advantage(lam, *(float(x[i]) for x in (p, q, r))) for i in range(20)]
    assert finite.all()
    assert_close(value, vector(*want), 1e-15)


@pytest.mark.parametrize("where", ["behaviour", "teacher", "ref"])
def test_advantage_of_an_impossible_token_is_zero_and_not_finite(where):
    x = {"behaviour": vector(-1.0, -1.0), "teacher": vector(-2.0, -2.0), "ref": vector(-3.0, -3.0)}
    x[where][0] = -INF
    value, finite = advantage(1.25, **x)
    assert finite.tolist() == [False, True]
    assert value[0] == 0
    assert value[1] != 0


def test_advantage_of_a_diverged_model_is_nan():
    for where in range(3):
        x = [vector(-1.0), vector(-2.0), vector(-3.0)]
        x[where] = vector(NAN)
        value, finite = advantage(1.25, *x)
        assert value.isnan().all()
        assert finite.all()


def term_of(clip, reward_scale, student, teacher, ref, old, rollout=None):
    rule = PolicyRule(clip=clip)
    used, _ = advantages_of(rule, reward_scale=reward_scale, student=student, teacher=teacher, ref=ref, old=old)
    return policy_term(rule, used, student, old, rollout)


def policy(student, old, clip, teacher=vector(-1.0), ref=vector(-1.5)):  # noqa: B008 never written to
    return term_of(clip, 1.25, student, teacher, ref, old)


def test_on_policy_the_loss_is_minus_the_advantage():
    term = policy(vector(-2.0), None, None)
    assert torch.equal(term.loss, -term.advantages)
    assert torch.equal(term.dlogprob, -term.advantages)


@pytest.mark.parametrize("clip", [None, (0.2, 0.28), (0.0, 0.0), (1.0, 2.0)])
def test_policy_slope_is_the_derivative_of_the_loss(clip):
    """At ratios on both sides of the clipping range and for both signs of A."""
    student = torch.linspace(-4, -0.1, 41, dtype=torch.float64).requires_grad_()
    for old in (-0.7, -2.0, -3.3):
        olds = torch.full_like(student, old)
        adv = 1.25 * -1.0 - 0.25 * -1.5 - olds
        ratio = (student - olds).exp()
        loss = -adv * ratio
        if clip is not None:
            loss = torch.maximum(loss, -adv * ratio.clamp(1 - clip[0], 1 + clip[1]))
        (slope,) = torch.autograd.grad(loss.sum(), student)
        n = torch.full_like(student, -1.0), torch.full_like(student, -1.5)
        term = term_of(clip, 1.25, student.detach(), *n, olds)
        assert_close(term.loss, loss.detach(), 1e-14)
        corner = (ratio.detach() - 1).abs() < 1e-9  # the one-sided derivatives differ there
        assert_close(term.dlogprob[~corner], slope[~corner], 1e-14)


def test_clipping_is_pessimistic():
    """It takes away the reward for moving further, never the penalty for having moved too far."""
    good, bad = vector(-0.5), vector(-3.0)  # teacher's log-prob: above and below p_old
    old, far = vector(-2.0), vector(-1.0)  # ratio e
    for teacher, flat in ((good, True), (bad, False)):
        term = term_of((0.2, 0.2), 1.0, far, teacher, None, old)
        assert (term.dlogprob == 0).all() == flat


def test_an_overflowing_ratio_is_clipped_and_an_impossible_token_has_no_ratio():
    student, old = vector(-0.1, -0.1), vector(-2000.0, -INF)
    term = term_of((0.2, 0.2), 1.0, student, vector(-1.0, -1.0), None, old)
    assert term.loss.isfinite().all()
    assert (term.dlogprob == 0).all()
    assert term.loss[1] == 0


def test_a_log_prob_is_minus_inf_outside_the_support_and_nan_in_a_diverged_row():
    logit, logsum = vector(-1.0, -INF, -INF, NAN, -1.0, -INF), vector(0.5, 0.5, -INF, 0.5, NAN, NAN)
    got = token_logprob(logit, logsum)
    assert torch.equal(got[:3], vector(-1.5, -INF, -INF))
    assert got[3:].isnan().all()


def test_entropy_is_never_negative_and_zero_without_support():
    statistics = torch.zeros(len(Stat), 3, dtype=torch.float64)
    statistics[Stat.LOGSUM_STUDENT] = vector(2.0, 1.0, -INF)
    statistics[Stat.MEAN_LOGIT] = vector(0.5, 1.0 + 1e-16, 0.0)
    assert torch.equal(entropy(statistics), vector(1.5, 0.0, 0.0))


def weights(reduction, mask, **kw):
    options = {"normalizer": None, "sequence_lengths": None, "dtype": torch.float64, "device": mask.device}
    return token_weights(reduction, mask, Sequences(mask.shape), **{**options, **kw})


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
@pytest.mark.parametrize("normalizer", [None, 7.0])
def test_token_weights_are_the_derivative_of_the_reduction(reduction, normalizer):
    if reduction == "sum" and normalizer is not None:
        pytest.skip("sum has no normalizer")
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    x = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(oracle.reduce(x * mask, mask, reduction, normalizer), x)
    got = weights(reduction, mask, normalizer=normalizer).expand(3, 3) * mask
    assert_close(got, want, 1e-15)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_token_weights_stay_finite_with_nothing_live(reduction):
    assert weights(reduction, torch.zeros(2, 3, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("reduction", ["sum", "none", "token-mean", "seq-mean-token-sum"])
def test_a_weight_that_all_tokens_share_is_a_scalar(reduction):
    assert weights(reduction, torch.ones(2, 3, dtype=torch.bool)).ndim == 0
