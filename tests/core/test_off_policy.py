"""Corrections of the sampled estimator for stale policies: ratios, clips, importance weights, clamps."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
import oracle
from builders import (
    BackendDtype,
    assert_all_close,
    assert_close,
    assert_same_as_oracle,
    generator,
    like,
    make_batch,
    run,
    trainable,
    widened,
)
from combinations import product_on_float64
from fused_gopd import reference
from fused_gopd.objective.policy import advantages_of, policy_term, rule_of, sequence_log_ratio
from fused_gopd.options import LossOptions

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = (
    {},
    {"clip": (0.2, 0.28)},
    {"clip_dual": 1.5},
    {"clip": (0.2, 0.2), "clip_dual": 3.0},
    {"ratio": "sequence"},
    {"ratio": "sequence", "clip": (0.05, 0.05)},
    {"ratio": "sequence", "clip": (0.05, 0.05), "clip_dual": 1.1},
    {"advantage_clip": 0.5},
    {"advantage_clip": (-0.3, 1.0), "clip": (0.2, 0.2)},
    {"logprob_min": -3.0},
    {"rollout_is_cap": 1.2},
    {"baseline": "expected"},
    {"baseline": "expected", "clip": (0.2, 0.2), "advantage_clip": 0.4},
    {"rollout_is_cap": 5.0, "clip": (0.2, 0.2), "clip_dual": 2.0, "ratio": "sequence", "logprob_min": -4.0},
)
IDS = [" ".join(p) or "none" for p in POLICIES]


def stale(batch, spread: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Log-probs of the batch's tokens under a policy near the student's."""
    own = oracle.gopd(*[widened(m) for m in batch.models], batch.token_ids).student_logprobs
    noise = torch.randn(own.shape, generator=generator(seed), dtype=torch.float64)
    return (own + spread * noise).clamp_max(-1e-3).to(dtype)


def scores(batch, policy: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    given = {"old_logprobs": stale(batch, 0.5, dtype)}
    return given | ({"rollout_logprobs": stale(batch, 0.7, dtype, seed=1)} if "rollout_is_cap" in policy else {})


@product_on_float64(policy=POLICIES, kind=["linear", "logits"])
def test_every_correction_is_its_formula(backend_dtype, kind, policy):
    batch = make_batch(41, shape=(4, 6), kinds=(kind, "linear", "logits"), dtype=backend_dtype.dtype)
    assert_same_as_oracle(
        batch, backend_dtype, reward_scale=1.25, **policy, **scores(batch, policy, backend_dtype.dtype)
    )


@pytest.mark.parametrize("policy", POLICIES, ids=IDS)
def test_the_reference_is_the_same_formula(policy):
    batch = make_batch(42, shape=(4, 6))
    options = {"reward_scale": 1.25, **policy, **scores(batch, policy, torch.float64)}
    dense, dense_grads = run(batch, fg.reference.gopd_loss, **options)
    fused, grads = run(batch, backend="torch", **options)
    assert_close(fused.token_loss, dense.token_loss, 1e-12)
    assert_all_close(grads, dense_grads, 1e-12)
    for name in ("advantages", "importance", "clipped"):
        a, b = getattr(fused, name), getattr(dense, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a.double(), b.double(), 1e-12, name)


@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(POLICIES),
    lam=st.sampled_from([0.0, 0.5, 1.0, 1.25, "per token"]),
    reduction=st.sampled_from(["token-mean", "seq-mean-token-mean", "sum", "seq-mean-token-sum"]),
    chunk=st.integers(1, 20),
)
def test_any_correction_any_reduction_any_chunk(seed, policy, lam, reduction, chunk):
    batch = make_batch(seed, shape=(3, 5))
    scale = torch.linspace(0, 2, 15, dtype=torch.float64).reshape(3, 5) if lam == "per token" else lam
    options = {"reward_scale": scale, "reduction": reduction, **policy, **scores(batch, policy, torch.float64)}
    assert_same_as_oracle(batch, BackendDtype("torch", torch.float64), **options)
    whole, grads = run(batch, backend="torch", **options)
    cut, cut_grads = run(batch, backend="torch", chunk_size=chunk, **options)
    assert_close(cut.token_loss, whole.token_loss, 1e-12)
    assert_all_close(cut_grads, grads, 1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=IDS)
def test_the_slope_is_the_derivative_of_the_loss(policy):
    """With every branch of every clip in the data; corners aside, where one-sided derivatives differ."""
    policy = {k: v if k != "advantage_clip" or isinstance(v, tuple) else (-v, v) for k, v in policy.items()}
    student = torch.linspace(-5, -0.1, 113, dtype=torch.float64).requires_grad_()
    teacher, ref = (torch.full_like(student.detach(), x) for x in (-1.0, -2.0))
    old = torch.full_like(teacher, -1.7)
    rollout = torch.full_like(teacher, -2.0) if "rollout_is_cap" in policy else None
    # a sequence is one token here: its mean is differentiable as the token's own ratio
    rule = rule_of(LossOptions(**policy))
    known = {"student": student.detach(), "teacher": teacher, "ref": ref, "old": old}
    used, _ = advantages_of(rule, reward_scale=1.25, **known)
    log_ratio = sequence_log_ratio(student, old, lambda x: x) if policy.get("ratio") == "sequence" else None
    term = policy_term(rule, used, student, old, rollout, log_ratio)
    (slope,) = torch.autograd.grad(term.loss.sum(), student)
    assert_close(term.dlogprob, slope, 1e-12)


def test_on_policy_the_rollout_weight_is_that_of_the_student(backend):
    batch = make_batch(43, shape=(3, 4), dtype=torch.float32)
    rollout = stale(batch, 0.5, torch.float32)
    out, _ = run(batch, backend=backend, reward_scale=1.25, rollout_logprobs=rollout, rollout_is_cap=1.5)
    plain, _ = run(batch, backend=backend, reward_scale=1.25)
    weight = (plain.student_logprobs - rollout).exp().clamp_max(1.5) * batch.mask
    assert_close(out.importance, weight, 1e-5)
    assert_close(out.token_loss, plain.token_loss * weight, 1e-5)


def test_without_a_cap_the_weight_is_not_truncated():
    batch = make_batch(44, shape=(3, 4))
    out, _ = run(batch, reward_scale=1.25, rollout_logprobs=stale(batch, 2.0, torch.float64))
    assert out.importance.max() > 2


def test_logprob_min_makes_an_impossible_token_count(backend_dtype):
    """A token to which the teacher gives probability 0 pulls nowhere, unless its log-prob is clamped."""
    batch = make_batch(45, shape=(5,), kinds=("linear", "logits", "logits"), dtype=backend_dtype.dtype, masked=False)
    with torch.no_grad():
        batch.teacher.logits[2, batch.token_ids[2]] = -math.inf
    out, grads = run(batch, backend=backend_dtype.backend, reward_scale=1.25, logprob_min=-20.0)
    assert out.teacher_logprobs[2] == -math.inf  # reported as it is
    want = 1.25 * -20 - 0.25 * out.ref_logprobs[2] - out.student_logprobs[2]
    assert_close(out.advantages[2], want, 1e-6)
    assert grads[0][2].abs().sum() > 0
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, logprob_min=-20.0)


def test_a_sequence_ratio_is_one_number_for_its_live_tokens():
    """With A = 1 everywhere the token loss is minus the ratio."""
    batch = make_batch(46, shape=(3, 5))
    old = stale(batch, 0.5, torch.float64)
    out, _ = run(batch, reward_scale=1.0, old_logprobs=old, ratio="sequence")
    ratio = torch.where(batch.mask, -out.token_loss / out.advantages, torch.nan)
    for row, live in zip(ratio, batch.mask, strict=True):
        assert_close(row[live], row[live][:1].expand(int(live.sum())), 1e-12)


def test_a_token_of_probability_0_under_the_old_policy_is_no_part_of_its_sequences_ratio():
    """Its log-ratio counts as 0, and its advantage is 0: the other tokens of the sequence keep theirs."""
    batch = make_batch(46, shape=(3, 5), masked=False)
    old = stale(batch, 0.5, torch.float64)
    old[1, 2] = -math.inf
    options = {"reward_scale": 1.0, "ratio": "sequence"}
    out, grads = run(batch, old_logprobs=old, **options)
    assert out.token_loss[1, 2] == 0
    assert (out.token_loss[1, [0, 1, 3, 4]] != 0).all()
    log_ratio = (out.student_logprobs - old)[1].masked_fill(torch.isneginf(old[1]), 0)
    assert_close(-(out.token_loss / out.advantages)[1, 0], log_ratio.mean().exp(), 1e-12)
    want, want_grads = run(batch, fg.reference.gopd_loss, old_logprobs=old, **options)
    assert_close(out.token_loss, want.token_loss, 1e-12)
    assert_all_close(grads, want_grads, 1e-12)


def test_scores_of_masked_tokens_have_no_effect(backend):
    batch = make_batch(47, shape=(3, 5), dtype=torch.float32)
    old, rollout = stale(batch, 0.5, torch.float32), stale(batch, 0.5, torch.float32, seed=1)
    options = {"reward_scale": 1.25, "backend": backend, "ratio": "sequence", "rollout_is_cap": 2.0}
    want, grads = run(batch, old_logprobs=old, rollout_logprobs=rollout, **options)
    poisoned = [x.masked_fill(~batch.mask, math.nan) for x in (old, rollout)]
    got, got_grads = run(batch, old_logprobs=poisoned[0], rollout_logprobs=poisoned[1], **options)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(a, b) for a, b in zip(got_grads, grads, strict=True))


BOTH = pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])


@BOTH
@pytest.mark.parametrize("policy", [
    {"old_logprobs": torch.tensor([-100.0, -1.7])},
    {"old_logprobs": torch.tensor([-100.0, -1.7]), "clip": (0.2, 0.2)},
    {"rollout_logprobs": torch.tensor([-100.0, -1.7])},
    {"rollout_logprobs": torch.tensor([-math.inf, -1.7])},
    {"old_logprobs": torch.tensor([-100.0, -1.7]), "rollout_logprobs": torch.tensor([-200.0, -1.7]),
     "rollout_is_cap": 5.0},
], ids=lambda p: " ".join(p))  # fmt: skip
def test_no_advantage_is_no_loss_whatever_the_ratio(function, policy):
    """A token that the teacher rules out: 0 times a ratio or a weight that overflows is 0, not NaN."""
    student = torch.zeros(2, 5, requires_grad=True)
    teacher = fg.TokenLogProbs(torch.tensor([-math.inf, -2.0]))
    out = function(fg.Logits(student), teacher, None, torch.tensor([0, 1]), **policy)
    (grad,) = torch.autograd.grad(out.loss, student)
    assert out.token_loss[0] == 0
    assert (grad[0] == 0).all()
    assert out.loss.isfinite()
    assert grad[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("policy", "advantage", "token_loss"),
    [
        ({"clip": (0.2, 0.2)}, 1.0, -1.2),
        ({"clip": (0.2, 0.2), "ratio": "sequence"}, 1.0, -1.2),
        ({"clip": (0.2, 0.2), "ratio": "sequence-mean"}, 1.0, -1.2),
        ({"clip_dual": 3.0}, -1.0, 3.0),
        ({"loss_max": 5.0}, 1.0, -5.0),
        ({"loss_max": 5.0, "ratio": "detached"}, 1.0, 5.0),
        ({"log_ratio_max": 2.0}, 1.0, -math.exp(2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["torch", "native", "dense"])
def test_a_ratio_that_overflows_and_is_bounded_has_no_gradient(policy, advantage, token_loss, which):
    """The bound is flat there: 0, where 0 times the derivative of exp would be NaN."""
    logits = torch.zeros(1, 1, 5, requires_grad=True)
    function = reference.gopd_loss if which == "dense" else functools.partial(fg.gopd_loss, backend=which)
    out = function(
        fg.Logits(logits),
        fg.TokenLogProbs(torch.full((1, 1), advantage - math.log(5))),
        None,
        torch.ones(1, 1, dtype=torch.int64),
        old_logprobs=torch.full((1, 1), -2000.0),
        advantage_policy="current",
        **policy,
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert_close(out.token_loss, torch.full((1, 1), token_loss), 1e-6)
    assert out.clipped.all()
    assert (grad == 0).all()


@pytest.mark.parametrize("bound", [{"clip": (0.2, 0.2)}, {"log_ratio_max": 0.1}, {"loss_max": 0.1}], ids=str)
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence-mean", "detached"])
@pytest.mark.parametrize("which", ["torch", "native", "dense"])
def test_a_token_without_an_advantage_is_not_clipped(bound, ratio, which):
    """The teacher rules the first token out: there is no gradient that a bound could remove."""
    function = reference.gopd_loss if which == "dense" else functools.partial(fg.gopd_loss, backend=which)
    out = function(
        fg.Logits(torch.zeros(1, 2, 5)),
        fg.TokenLogProbs(torch.tensor([[-math.inf, -0.5]])),
        None,
        torch.ones(1, 2, dtype=torch.int64),
        old_logprobs=torch.full((1, 2), -4.0),
        ratio=ratio,
        **bound,
    )
    assert out.clipped.tolist() == [[False, True]]


@BOTH
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_token_of_probability_0_under_the_student_has_no_gradient(function, ratio):
    student = torch.zeros(1, 2, 5)
    student[0, 0, 0] = -math.inf
    student.requires_grad_()
    old = torch.full((1, 2), -2.0)
    scores = fg.TokenLogProbs(torch.full((1, 2), -1.0))
    out = function(
        fg.Logits(student), scores, None, torch.zeros(1, 2, dtype=torch.int64), old_logprobs=old, ratio=ratio
    )
    (grad,) = torch.autograd.grad(out.loss, student)
    assert (grad[0, 0] == 0).all()
    assert grad[0, 1].abs().sum() > 0


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_half_precision_gradients_survive_a_large_importance_weight(backend, reduction):
    """Weights of 1e5 under a normaliser of 1e6: the float16 gradient of the hidden states is small, and right."""
    batch = make_batch(48, shape=(4,), dtype=torch.float16, masked=False)
    old = stale(batch, 0.0, torch.float32)
    given = {"reward_scale": 1.25, "old_logprobs": old, "rollout_logprobs": old - math.log(1e5), "backend": backend}

    def gradient(batch):
        options = {"reduction": reduction} | ({"normalizer": 1e6} if reduction == "token-mean" else {})
        loss = fg.gopd_loss(*batch.models, batch.token_ids, **given, **options).loss
        return torch.autograd.grad(loss if reduction == "token-mean" else loss.sum() / 1e6, batch.leaves)

    wide = batch.replaced(
        student=trainable(like(batch.student, **{k: v.detach().float() for k, v in batch.student.tensors.items()})),
        teacher=like(batch.teacher, **{k: v.float() for k, v in batch.teacher.tensors.items()}),
        ref=like(batch.ref, **{k: v.float() for k, v in batch.ref.tensors.items()}),
    )
    for got, want in zip(gradient(batch), gradient(wide), strict=True):
        assert got.isfinite().all()
        assert_close(got, want, 2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"rollout_mask": {"token_ratio": (0.5, 2.0)}},
        {"rollout_mask": {"token_ratio": (0.5, 2.0)}, "advantage_fn": lambda stats: stats.advantages},
        {"trust_region": {"token_ratio": (None, 2.0)}, "rollout_is": "none", "rollout_mask": {"token_k3": (None, 1e5)}},
    ],
)
@pytest.mark.parametrize("ratio", ["token", "detached"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("which", ["torch", "native", "dense"])
def test_a_token_of_weight_0_adds_nothing_though_its_ratio_overflows(options, ratio, reduction, which):
    """An engine's -9999 for a log-prob that it does not know: what a mask is for."""
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    function = reference.gopd_loss if which == "dense" else functools.partial(fg.gopd_loss, backend=which)
    out = function(
        fg.Logits(logits),
        fg.TokenLogProbs(torch.tensor([-1.0, -3.0, -2.0])),
        None,
        torch.tensor([1, 2, 3]),
        old_logprobs=torch.tensor([-9999.0, -2.0, -1.0]),
        rollout_logprobs=torch.tensor([-9.0, -2.0, -1.2]),
        ratio=ratio,
        reduction=reduction,
        **options,
    )
    out.loss.sum().backward()
    assert out.token_loss[0] == 0
    assert (logits.grad[0] == 0).all()
    assert (out.token_loss[1:] != 0).all()
    assert (logits.grad[1:] != 0).all()
