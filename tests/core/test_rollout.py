"""Weights of tokens that another policy has sampled, of every estimator: importance, masks, trust region, bounds."""

from __future__ import annotations

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
    make_batch,
    widened,
)
from combinations import pairwise

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


def given_scores(batch, options: dict, old: bool, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Old log-probs are an option of ``sampled``; the others take them for the weights, and have no ratio."""
    return scores(batch, old, dtype, seed)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("old", [False, True], ids=["current", "old"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda x: " ".join(map(str, x.values())))
def test_every_weight_is_its_formula(estimator, old, weights):
    batch = make_batch(71, shape=(4, 6))
    options = {"reward_scale": 1.25, **estimator, **weights, **scores(batch, old, torch.float64)}
    assert_same_as_oracle(batch, BackendDtype("torch", torch.float64), **options)


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


@pairwise(
    backend_dtype=["native-float32", "torch-float32"],
    estimator=ESTIMATORS,
    weights=WEIGHTS,
    old=[False, True],
    kind=["linear", "logits"],
)
def test_every_backend_and_kind(backend_dtype, estimator, weights, old, kind):
    batch = make_batch(73, shape=(3, 5), kinds=(kind, "linear", "logits"), dtype=torch.float32)
    options = {"reward_scale": 1.25, **estimator, **weights, **scores(batch, old, torch.float32)}
    assert_same_as_oracle(batch, backend_dtype, **options)


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
