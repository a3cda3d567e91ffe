"""Weights of tokens that another policy has sampled, of every estimator: importance, masks, trust region, bounds."""

from __future__ import annotations

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
from combinations import pairwise
from fused_gopd.rowops import LARGEST_WEIGHT

pytestmark = pytest.mark.usefixtures("one_thread")

ESTIMATORS = (
    {"estimator": "sampled"},
    {"estimator": "full"},
    {"estimator": "full", "divergence": "jsd", "beta": 0.3},
    {"estimator": "full", "divergence": "mixed", "forward_weight": 0.3},
    {"estimator": "topk", "k": 5},
)
# Log-ratios have a standard deviation of 0.7: each of these is in force at some tokens.
WEIGHTS = (
    {},
    {"rollout_is_cap": 1.2},
    {"rollout_is_cap": (0.8, 1.2)},
    {"rollout_mask": {"token_ratio": (0.5, 1.5)}},
    {"rollout_mask": {"token_ratio": (None, 1.2)}, "rollout_is": "none"},
    {"rollout_is": "sequence", "rollout_is_cap": 2.0},
    {"rollout_is": "geometric", "rollout_is_cap": (0.9, 1.1)},
    {"rollout_is": "sequence", "rollout_mask": {"sequence_ratio": (None, 1.5)}},
    {"rollout_mask": {"geometric_ratio": (0.9, 1.4)}},
    {"rollout_mask": {"token_k2": (None, 0.1), "seq_mean_k3": (None, 0.4)}},
    {"rollout_mask": {"token_k3": (None, 0.1), "seq_sum_k2": (None, 2.0)}},
    {"rollout_mask": {"seq_max_k2": (None, 0.8)}},
    {"rollout_mask": {"seq_max_k3": (None, 0.8), "seq_mean_k2": (None, 0.5), "seq_sum_k3": (None, 2.0)}},
    {"rollout_mask": {"seq_max_ratio": (None, 2.5), "seq_min_ratio": (0.4, None)}},
    {"rollout_mask": {"token_difference": (-0.03, 0.03)}, "rollout_is_cap": 5.0},
    {"log_ratio_max": 0.3},
    {"rollout_is": "sequence", "log_ratio_max": 0.5, "loss_max": 1.0},
    {"loss_max": 0.5},
)
# Of the sampled estimator alone; with old log-probs.
POLICIES = (
    {"trust_region": {"token_difference": (-0.02, 0.02)}},
    {"trust_region": {"geometric_ratio": (0.9, None)}, "rollout_is": "none"},
    {"trust_region": {"token_ratio": (0.8, 1.2)}, "rollout_is_cap": 2.0, "baseline": "expected"},
    {"advantage_policy": "current"},
    {"advantage_policy": "current", "clip": (0.2, 0.2), "ratio": "sequence"},
    {"ratio": "none", "rollout_mask": {"token_ratio": (0.5, 5.0)}},
    {"ratio": "detached"},
    {"ratio": "detached", "clip": (0.2, 0.28), "baseline": "expected", "loss_max": 3.0},
    {"ratio": "detached", "clip": (1.0, 1.0), "rollout_is": "sequence", "rollout_is_cap": 2.0},
    {"ratio": "sequence-mean"},
    {"ratio": "sequence-mean", "clip": (0.05, 0.1), "clip_dual": 1.1, "rollout_is_cap": 1.2},
    {"ratio": "sequence-mean", "baseline": "expected", "log_ratio_max": 0.2},
    {"log_ratio_max": 0.3, "clip": (0.5, 0.5)},
    {"ratio": "sequence", "log_ratio_max": 0.05},
    {"loss_max": 0.5, "clip": (0.2, 0.2), "clip_dual": 1.5},
)


def scores(batch, old: bool, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probs of the batch's tokens under policies near the student's."""
    own = oracle.gopd(*[widened(m) for m in batch.models], batch.token_ids).student_logprobs

    def near(key: int) -> torch.Tensor:
        noise = torch.randn(own.shape, generator=generator(2 * seed + key), dtype=torch.float64)
        return (own + 0.5 * noise).clamp_max(-1e-3).to(dtype)

    return {"rollout_logprobs": near(0)} | ({"old_logprobs": near(1)} if old else {})


@pairwise(
    backend_dtype=["torch-float64", "native-float32"],
    estimator=ESTIMATORS,
    weights=WEIGHTS,
    old=[False, True],
    kind=["linear", "logits"],
)
def test_every_weight_is_its_formula(backend_dtype, estimator, weights, old, kind):
    batch = make_batch(73, shape=(3, 5), kinds=(kind, "linear", "logits"), dtype=backend_dtype.dtype)
    options = {"reward_scale": 1.25, **estimator, **weights, **scores(batch, old, backend_dtype.dtype)}
    assert_same_as_oracle(batch, backend_dtype, **options)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "none"])
def test_every_policy_is_its_formula(policy, reduction):
    batch = make_batch(72, shape=(4, 6), kinds=("linear", "linear", "logits"))
    options = {"reward_scale": 1.25, **policy, **scores(batch, True, torch.float64)}
    if reduction == "none":
        upstream = torch.randn(4, 6, generator=generator(5), dtype=torch.float64)
        out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reduction="none", **options)
        grads = torch.autograd.grad((out.loss * upstream).sum(), batch.leaves)
        wide = [widened(x) for x in batch.models]
        want = oracle.gopd(*wide, batch.token_ids, mask=batch.mask, reduction="none", **options)
        leaves = [x for x in wide[0].tensors.values() if x.requires_grad]
        assert_all_close(grads, torch.autograd.grad((want.loss * upstream).sum(), leaves), 1e-12)
    else:
        assert_same_as_oracle(batch, BackendDtype("torch", torch.float64), reduction=reduction, **options)


@given(
    seed=st.integers(0, 10_000),
    estimator=st.sampled_from(ESTIMATORS),
    weights=st.sampled_from(WEIGHTS),
    policy=st.sampled_from(({}, *POLICIES)),
    old=st.booleans(),
    lam=st.sampled_from([-3.0, 0.0, 0.5, 1.0, 1.25, 10.0]),
    reduction=st.sampled_from(["token-mean", "seq-mean-token-mean", "sum", "none"]),
    labels=st.booleans(),
    packed=st.booleans(),
    chunk=st.integers(1, 20),
)
def test_any_configuration(seed, estimator, weights, policy, old, lam, reduction, labels, packed, chunk):
    """Fused against the oracle and against the dense reference, in chunks of any size."""
    batch = make_batch(seed, shape=(15,) if packed else (3, 5))
    options = {"reward_scale": lam, "reduction": reduction, **estimator}
    if estimator["estimator"] == "sampled" and policy:
        options |= policy | scores(batch, True, torch.float64, seed)
    else:
        options |= weights | scores(batch, old, torch.float64, seed)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 4, 4, 9, 15])
    whole = any("seq" in str(x) or "geo" in str(x) for x in (options.get("rollout_is"), options.get("rollout_mask")))
    if labels and not (estimator["estimator"] == "topk" and whole and not old):
        options |= {"sft_labels": batch.token_ids.roll(1), "sft_weight": 0.3}
    arguments = {"mask": batch.mask, **options}
    upstream = torch.ones(()) if reduction != "none" else torch.randn(batch.token_ids.shape, generator=generator(seed))

    def result(function, models):
        out = function(*models, batch.token_ids, **arguments)
        leaves = [x for x in models[0].tensors.values() if x.requires_grad]
        return out, torch.autograd.grad((out.loss * upstream).sum(), leaves)

    want, want_grads = result(oracle.gopd, [widened(x) for x in batch.models])
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        got, grads = result(function, batch.models)
        assert_close(got.token_loss, want.token_loss, 1e-11, "token_loss")
        assert_all_close(grads, want_grads, 1e-11)
    dense = got
    arguments |= {"chunk_size": chunk}
    got, grads = result(fg.gopd_loss, batch.models)
    assert_all_close(grads, want_grads, 1e-11)
    for name in ("importance", "clipped"):
        a, b = getattr(got, name), getattr(dense, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a.double(), b.double(), 1e-11, name)


# ------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("far", [-1e4, -200.0, -100.0, 200.0])
@pytest.mark.parametrize("old", [False, True], ids=["current", "old"])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, {"estimator": "sampled", "baseline": "expected"}], ids=str)
def test_a_weight_beyond_the_range_of_float32_is_the_largest_number(estimator, old, far):
    """exp of the log-ratio is 0 or infinite there; equal models still have loss and gradient 0."""
    batch = make_batch(74, shape=(2, 3), dtype=torch.float32, masked=False)
    near = fg.token_logprobs(batch.student, batch.token_ids).detach()
    given = {"rollout_logprobs": (near + far).clamp_max(0.0), **({"old_logprobs": near} if old else {})}
    for weights in ({}, {"rollout_is": "sequence"}, {"rollout_is_cap": 2.0}, {"log_ratio_max": 20.0}):
        for teacher in (batch.teacher, batch.student):
            for function in (fg.gopd_loss, fg.reference.gopd_loss):
                models = (batch.student, teacher, None)
                out = function(*models, batch.token_ids, reduction="sum", **estimator, **given, **weights)
                assert out.token_loss.isfinite().all()
                grads = torch.autograd.grad(out.loss, batch.leaves)
                assert all(x.isfinite().all() for x in grads)
                bounded = {"rollout_is_cap", "log_ratio_max"} & weights.keys()
                if far < -90 and not bounded:
                    assert (out.importance == torch.tensor(LARGEST_WEIGHT)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_half_precision_under_a_loss_scale(estimator, loss_scale):
    """Weights of 1e4 and of 0, in float16 and bfloat16, against float32."""
    batch = make_batch(75, shape=(2, 4), dtype=torch.float32)
    rollout = fg.token_logprobs(batch.student, batch.token_ids).detach()
    rollout[0] -= math.log(1e4)
    rollout[1, :2] += 0.2
    options = {"rollout_logprobs": rollout, "rollout_mask": {"token_ratio": (0.9, 1e5)}, "reward_scale": 1.25}
    options |= {**estimator, "normalizer": 1e6}

    def gradient(dtype):
        cast = [like(x, **{k: v.detach().to(dtype) for k, v in x.tensors.items()}) for x in batch.models]
        student = trainable(cast[0])
        out = fg.gopd_loss(student, *cast[1:], batch.token_ids, mask=batch.mask, **options)
        (out.loss * loss_scale).backward()
        assert 0 < out.metrics()["masked_fraction"] < 1
        return [x.grad.float() / loss_scale for x in student.tensors.values()]

    want = gradient(torch.float32)
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        for got, expected in zip(gradient(dtype), want, strict=True):
            assert got.isfinite().all()
            assert_close(got, expected, tolerance, str(dtype))


@pytest.mark.parametrize("floor", [-math.inf, -1e9, float(torch.finfo(torch.float32).min)])
@pytest.mark.parametrize("policy", [{}, *POLICIES], ids=str)
def test_masked_logits(floor, policy):
    """A token that teacher or student rules out, with every ratio and weight: what float64 makes, without a NaN."""
    batch = make_batch(76, shape=(2, 5), kinds=("logits",) * 3, dtype=torch.float32, masked=False)
    scored = scores(batch, True, torch.float32)
    with torch.no_grad():
        batch.teacher.logits[0, 1, batch.token_ids[0, 1]] = floor
        batch.student.logits[1, 2, batch.token_ids[1, 2]] = floor
    options = {"reward_scale": 1.25, "logprob_min": -20.0, **policy, **scored}
    out, grads = run(batch, **options)
    assert all(x.isfinite().all() for x in grads)
    dense, dense_grads = run(batch, fg.reference.gopd_loss, **options)
    assert_close(out.token_loss, dense.token_loss, 1e-4)
    assert_all_close(grads, dense_grads, 1e-4)


@pytest.mark.parametrize("sequences", [False, True])
def test_routes_and_masks_leave_the_statistics_of_sequences_as_they_are(sequences):
    """Live tokens are sorted by teacher, and masked ones hold anything: a sequence is still that of its live tokens."""
    batch = make_batch(77, shape=(4, 6))
    given = scores(batch, False, torch.float64)
    options = (
        {"rollout_is": "sequence", "rollout_is_cap": 3.0}
        if sequences
        else {"rollout_mask": {"seq_max_k2": (None, 0.8)}}
    )
    want, want_grads = run(batch, **given, **options)
    route = torch.arange(24).reshape(4, 6) % 2
    poisoned = given["rollout_logprobs"].masked_fill(~batch.mask, math.nan)
    two = batch.replaced(teacher=[batch.teacher, batch.teacher])
    got, grads = run(two, teacher_index=route, rollout_logprobs=poisoned, **options)
    assert_close(got.importance, want.importance, 1e-12)
    assert_all_close(grads, want_grads, 1e-12)
    assert (got.importance[~batch.mask] == 0).all()


def test_metrics_add_up():
    batch = make_batch(78, shape=(4, 6))
    options = {"rollout_mask": {"token_ratio": (0.6, 1.6)}, **scores(batch, True, torch.float64)}
    whole = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        models = [like(x, hidden=x.hidden[rows]) for x in batch.models]
        tensors = {k: v[rows] for k, v in options.items() if isinstance(v, torch.Tensor)}
        out = fg.gopd_loss(*models, batch.token_ids[rows], mask=batch.mask[rows], **(options | tensors))
        parts.append(out.metrics())
    w = whole.importance[batch.mask]
    assert 0 < (w == 0).sum() < len(w)
    for total in (sum(parts), whole.metrics()):
        values = total.to_dict()
        assert values["masked_fraction"] == pytest.approx((w == 0).double().mean().item())
        assert values["effective_sample_size"] == pytest.approx((w.sum() ** 2 / len(w) / (w * w).sum()).item())


def test_under_torch_func():
    batch = make_batch(79, shape=(2, 4))
    ids, models, hidden = batch.token_ids, batch.models[1:], batch.student.hidden.detach()
    for estimator in ({}, {"estimator": "full"}, {"estimator": "topk", "k": 4}):
        options = {"loss_max": 2.0, "rollout_is": "geometric", **scores(batch, False, torch.float64), **estimator}
        seen = {}

        def loss(h, weight, options=options, seen=seen):
            out = fg.gopd_loss(fg.LinearHead(h, weight), *models, ids, mask=batch.mask, reward_scale=1.25, **options)
            seen["importance"] = out.importance
            return out.loss

        grads = torch.func.grad(loss, argnums=(0, 1))(hidden, batch.student.weight.detach())
        out, want = run(batch, reward_scale=1.25, **options)
        assert_all_close(grads, want, 1e-12)
        assert seen["importance"].shape == out.importance.shape


@pytest.mark.parametrize(
    "options", [{"estimator": "full"}, {"baseline": "expected"}, {"estimator": "topk", "k": 2}, {}]
)
def test_without_old_log_probs_p_is_that_of_the_joint_support_where_models_are_taken_together(options, backend):
    """docs/off-policy.md: where the teacher has -inf, old log-probs make the weight."""
    z, q = torch.tensor([[1.0, 0.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, -math.inf, 0.5]])
    ids, own = torch.tensor([1]), z.log_softmax(1)[:, 1]
    taken_together = "baseline" in options or options.get("estimator") == "full"
    joint = z.masked_fill(q == -math.inf, -math.inf).log_softmax(1)[:, 1] if taken_together else own
    for old, want in ((None, (joint - own).exp()), (own, torch.ones(1))):
        models = fg.Logits(z), fg.Logits(q), None
        out = fg.gopd_loss(*models, ids, rollout_logprobs=own, old_logprobs=old, backend=backend, **options)
        torch.testing.assert_close(out.importance, want)
