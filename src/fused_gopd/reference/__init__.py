"""Dense G-OPD in plain PyTorch: what the fused loss computes, written out, and the naive baseline.

Holds all [tokens, vocabulary] tensors and lets autograd differentiate. In float64 it is an oracle; in a model's own
dtype it is what a trainer does without this package: logits in that dtype, upcast, log-softmax.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import hints  # noqa: F401
from ..loop.estimators.token_stats import COMPUTED, computed_by
from ..models import named_models
from ..nll import NLLCall, prepare_nll
from ..objective.divergences import ReverseKL
from ..objective.policy import advantage
from ..objective.rollout import in_trust_region
from ..objective.supervised import label_report
from ..objective.token_functions import call_function
from ..options import LossCall
from ..output import GOPDOutput
from ..prepare import prepare
from ..problem import Problem
from ..report import output_of
from ..rowops import FROZEN
from ..rowops.torch import TorchRowOps
from ..signatures import called_as
from .full import exact_kl, full_loss
from .models import (
    cancelled_scores,
    entropy_of,
    frozen_logits,
    frozen_scores,
    gathered,
    is_composite,
    logits,
    logprobs_at,
    own_log_softmax,
    reward_scale_of,
    route_entropies,
)
from .sampled import importance_weights, kl_estimate, policy_loss, sampled_advantages
from .topk import on_support, sampled_tail_loss, topk_loss

__all__ = ["gopd_loss", "linear_nll"]


@torch.no_grad()
def _with_reward_scale(p: Problem, z: Tensor) -> Problem:
    """The problem with lambda (n,) of its ``reward_scale_fn``, called once for all tokens."""
    assert p.reward_scale_fn is not None
    values: dict[str, Tensor | None] = dict.fromkeys(COMPUTED)
    log_p = own_log_softmax(z)
    values["student_entropy"] = entropy_of(log_p)
    values["student_logprobs"] = None if p.token_ids is None else gathered(log_p, p.token_ids)
    pair = replace(p, reward_scale=1.0, divergence=ReverseKL())  # the student and a model in the teacher's place
    support = on_support(p, log_p) if p.options.estimator == "topk" else None
    for name, _ in FROZEN:
        values[f"{name}_logprobs"] = frozen_scores(p, name)[0]
        z_m = frozen_logits(p, name) if p.options.joint else None
        own = route_entropies(p, name) if z_m is None else entropy_of(own_log_softmax(z_m))
        values[f"{name}_entropy"] = own
        if support is not None and p.options.tail != "sampled":
            parts = support.parts[name == "ref"]
            alone = support._replace(teacher=getattr(support, name), ref=None, parts=(parts, None))
            values[f"kl_{name}"] = topk_loss(pair, logprobs_at(log_p, support.token_ids), alone)[1]
        elif p.options.joint:
            values[f"kl_{name}"] = full_loss(pair, z, z_m, None)[1]
    stats = computed_by(p, 0, p.rows.count, values.__getitem__)
    return replace(p, reward_scale=call_function("reward_scale_fn", p.reward_scale_fn, stats, p.dtype))


@called_as(LossCall)
def gopd_loss(call: LossCall) -> GOPDOutput:
    """:func:`fused_gopd.gopd_loss` in dense PyTorch: same arguments, same result, [tokens, V] memory.

    The options that choose how the fused loss computes (its chunks, ``grad_filter``, ``backend``) have no effect.
    """
    p = prepare(call, TorchRowOps())
    frozen = named_models("teacher", call.teacher) | named_models("ref", call.ref)
    for model in (call.student, *frozen.values()):
        if getattr(model, "shard", None) is not None:
            raise ValueError("the dense reference takes whole heads: gather the weights, got one with a shard")
    options, ids = p.options, p.token_ids
    z = logits(p, p.student, 0, p.rows.count)
    if p.reward_scale_fn is not None:
        p = _with_reward_scale(p, z)
    kl = lp = lq = lr = None
    entropies: tuple[Tensor | None, Tensor | None] = (None, None)
    if options.joint:
        with torch.no_grad():
            z_q, z_r = (frozen_logits(p, name) for name, _ in FROZEN)
        token_loss, kl, log_p, log_q, log_r = full_loss(p, z, z_q, z_r if p.has[1] else None)
        if ids is not None:
            lq, lr = (None if x is None else gathered(x, ids) for x in (log_q, log_r))
            if isinstance(p.reward_scale, Tensor):
                # a model that a token's own lambda cancels is outside its joint support: its log-prob is 0
                assert lq is not None
                assert lr is not None
                lq, lr = lq.masked_fill(p.reward_scale == 0, 0), lr.masked_fill(p.reward_scale == 1, 0)
    else:
        log_p = own_log_softmax(z)
        with torch.no_grad():
            (lq, first), (lr, second) = (frozen_scores(p, name) for name, _ in FROZEN)
        entropies = first, second
        if options.estimator == "topk":
            with torch.no_grad():
                support = on_support(p, log_p)
            term = sampled_tail_loss if options.tail == "sampled" else topk_loss
            token_loss, kl = term(p, logprobs_at(log_p, support.token_ids), support)
            # a NaN anywhere in the row shows, also where no token of the row is in the support
            bad = support.has_nan
            token_loss = torch.where(bad, z.masked_fill(~bad[:, None], 0).sum(1) * math.nan, token_loss)
            kl = kl.masked_fill(bad, math.nan)
    entropy = entropy_of(log_p.detach())
    vectors: dict[str, Tensor | None] = {"entropy": entropy, "kl": kl}
    if ids is not None:
        lp = gathered(log_p, ids)
        weights = importance_weights(p, lp)
        if options.estimator == "sampled":
            with torch.no_grad():
                expected = token_loss.detach() if options.joint else None
                known = lr if p.has[1] else None  # lambda may cancel the reference of a KL penalty
                advantages, reported = sampled_advantages(p, lp.detach(), lq, known, (entropy, *entropies), expected)
                if weights is not None and p.rollout_logprobs is not None:
                    weights = in_trust_region(options, weights, advantages, lp, p.rollout_logprobs, p.over_sequences)
                value, _ = policy_loss(p, lp, reported, weights)
            token_loss, vectors["clipped"] = policy_loss(p, lp, advantages, weights)
            vectors["advantages"] = advantages
            if options.baseline == "expected":  # the gradient with it, the value without
                token_loss = value + (token_loss - token_loss.detach())
        vectors["importance"] = weights
        if options.estimator != "sampled" and "advantages" in p.reported:
            lowest = -math.inf if options.logprob_min is None else options.logprob_min
            others = (None if x is None else x.clamp_min(lowest) for x in (lq, lr))
            vectors["advantages"], _ = advantage(reward_scale_of(p), lp.detach(), *others)
    if options.estimator != "sampled" and p.has_loss_factors:
        if options.loss_max is not None:
            vectors["clipped"] = token_loss.detach().abs() > options.loss_max
            token_loss = token_loss.clamp(-options.loss_max, options.loss_max)
        weights = vectors.get("importance")
        if weights is not None:
            token_loss = token_loss * weights
    if p.labels is not None:
        label_logprobs = gathered(log_p, p.labels.clamp_min(0))
        if options.sft_temperature is not None:
            own = replace(p.student, temperature=options.sft_temperature)
            label_logprobs = gathered(own_log_softmax(logits(p, own, 0, p.rows.count)), p.labels.clamp_min(0))
        vectors["label_logprobs"], labelled = label_report(label_logprobs.detach(), p.labels)
        assert labelled is not None
        vectors["labelled"] = labelled
        token_loss = token_loss - options.sft_weight * torch.where(labelled, label_logprobs, 0)
    if options.entropy_weight:
        token_loss = token_loss - options.entropy_weight * entropy_of(own_log_softmax(z))
    if options.kl_ref == "exact":
        with torch.no_grad():
            z_r = frozen_logits(p, "ref")
            assert z_r is not None
        penalty = exact_kl(z, z_r, is_composite(p, "ref", z_r))
        vectors["kl_ref"] = penalty.detach()
        token_loss = token_loss + options.kl_ref_weight * penalty
    elif options.kl_ref != "none":
        assert lp is not None
        assert lr is not None
        token_loss = token_loss + options.kl_ref_weight * kl_estimate(options.kl_ref, lp, lr)
    weighted = token_loss * p.weights
    loss = p.rows.scatter(weighted) if options.reduction == "none" else weighted.sum()
    vectors |= {"token_loss": token_loss, "student_logprobs": lp, "teacher_logprobs": lq, "ref_logprobs": lr}
    with torch.no_grad():
        for name, models in p.cancelled:
            scores = [cancelled_scores(p, model, route) for model, route in zip(models, p.routes, strict=True)]
            vectors[f"{name}_logprobs"] = torch.cat(scores)
    return output_of(p, loss, vectors)


@called_as(NLLCall)
def linear_nll(call: NLLCall) -> Tensor:
    """:func:`fused_gopd.linear_nll` in dense PyTorch: same arguments, same result, [tokens, V] memory."""
    p = prepare_nll(call, TorchRowOps())
    assert p.nll is not None
    assert p.token_ids is not None
    z = logits(p, p.student, 0, p.rows.count)
    log_p, e = own_log_softmax(z), p.nll.label_smoothing
    loss = -gathered(log_p, p.token_ids)
    if e:
        inside = log_p != -math.inf
        loss = (1 - e) * loss if e < 1 else torch.zeros_like(loss)
        loss = loss - e * torch.where(inside, log_p, 0).sum(1) / inside.sum(1)
    if p.nll.z_loss:
        loss = loss + p.nll.z_loss * z.logsumexp(1).square()
    loss = loss * p.weights
    return p.rows.scatter(loss) if p.options.reduction == "none" else loss.sum()
