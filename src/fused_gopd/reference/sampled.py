"""The policy gradient at the sampled tokens, its importance weights, and the KL estimates there."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..objective.policy import advantages_of, rule_of
from ..objective.rollout import importance
from ..objective.token_functions import call_function
from ..problem import Problem
from ..token_stats import TokenStats
from .models import reward_scale_of


def sampled_advantages(
    p: Problem,
    lp: Tensor,
    lq: Tensor | None,
    lr: Tensor | None,
    entropies: tuple[Tensor, Tensor | None, Tensor | None],  # of student, teacher and reference
    expected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The advantages that the gradient uses and those that the loss reports, without the baseline."""

    def hook(advantages: Tensor | None, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
        index = torch.arange(p.rows.shape.numel(), device=lp.device) if p.rows.index is None else p.rows.index
        stats = TokenStats(
            index=index,
            advantages=advantages,
            student_logprobs=lp,
            teacher_logprobs=teacher,
            ref_logprobs=ref,
            old_logprobs=p.old_logprobs,
            student_entropy=entropies[0],
            teacher_entropy=entropies[1],
            ref_entropy=entropies[2],
            reward_scale=reward_scale_of(p),
        )
        assert p.advantage_fn is not None
        return call_function("advantage_fn", p.advantage_fn, stats, p.dtype)

    return advantages_of(
        rule_of(p.options),
        reward_scale=reward_scale_of(p),
        student=lp,
        teacher=lq,
        ref=lr,
        old=p.old_logprobs if p.options.advantage_policy == "old" else None,
        hook=None if p.advantage_fn is None else hook,
        expected=expected,
    )


def policy_loss(p: Problem, lp: Tensor, advantages: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token loss, for autograd to differentiate, and where a bound is in force."""
    s = p.options
    behaviour = lp.detach() if p.old_logprobs is None else p.old_logprobs
    nothing = advantages == 0  # no loss, whatever it is multiplied by
    unknown = (torch.isneginf(lp) | torch.isneginf(behaviour)).detach()
    if s.ratio in ("token", "detached"):
        # masked before any arithmetic: a NaN behind a where has a NaN gradient
        log_ratio = torch.where(nothing, 0, lp) - torch.where(nothing, 0, behaviour)
    else:
        own = torch.where(unknown, 0, lp) - torch.where(unknown, 0, behaviour)
        # sequence by sequence, written out: the fused loss has its own way of summing
        bounds, T = p.sequences.cu_seqlens, p.sequences.shape[1:].numel()
        starts = [i * T for i in range(p.sequences.count + 1)] if bounds is None else bounds.tolist()
        live = torch.arange(p.rows.shape.numel(), device=lp.device) if p.rows.index is None else p.rows.index
        mean = 0 * own  # of own also where no token is live: so that the loss has a gradient
        for start, stop in itertools.pairwise(starts if s.ratio != "none" else []):
            inside = (live >= start) & (live < stop)
            if inside.any():
                mean = torch.where(inside, own[inside].mean(), mean)
        if s.ratio != "sequence-mean":
            mean = mean.detach() + own - own.detach()
        log_ratio = torch.where(nothing, 0, mean)
    gone = torch.zeros_like(nothing) if weights is None else weights == 0

    def value(lp: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, where a bound is in force, and where that leaves no gradient."""
        clipped = torch.zeros_like(nothing)
        if s.log_ratio_max is not None:
            clipped = log_ratio.detach().abs() > s.log_ratio_max
            log_ratio = log_ratio.clamp(-s.log_ratio_max, s.log_ratio_max)
        ratio = log_ratio.exp()
        low, high = s.clip or (math.inf, math.inf)
        inside_clip = ratio.clamp(1 - low, 1 + high)
        if s.ratio == "detached":
            # no gradient where p = 0, as for the other ratios; nor is there an infinite loss
            at_most = torch.where(torch.isneginf(lp), torch.finfo(lp.dtype).min, lp)
            loss, clipped = -advantages * inside_clip.detach() * at_most, clipped | (inside_clip != ratio)
            flat = torch.zeros_like(nothing)
        else:
            unclipped = -advantages * ratio
            loss = torch.maximum(unclipped, -advantages * inside_clip)
            if s.clip_dual is not None:
                loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * s.clip_dual), loss)
            flat = clipped = clipped | ((loss.detach() - unclipped.detach()).abs() > 0)  # NaN is not a clip
        if s.loss_max is not None:
            over = loss.detach().abs() > s.loss_max
            flat, clipped = flat | over, clipped | over
            loss = loss.clamp(-s.loss_max, s.loss_max)
        return loss, clipped, flat

    # no gradient into what may be infinite: times 0 it is NaN
    flat = gone | value(lp.detach(), log_ratio.detach())[2]
    lp, log_ratio = (torch.where(flat, x.detach(), x) for x in (lp, log_ratio))
    loss, clipped, _ = value(lp, log_ratio)
    loss = torch.where(nothing | gone, 0, loss)
    return loss if weights is None else loss * torch.where(nothing, 0, weights), clipped


def importance_weights(p: Problem, lp: Tensor | None) -> Tensor | None:
    """(n,) detached weights of the rollout, None without one."""
    if p.rollout_logprobs is None or p.importance is not None:
        return p.importance
    assert lp is not None
    behaviour = lp.detach() if p.old_logprobs is None else p.old_logprobs
    return importance(p.options, behaviour, p.rollout_logprobs, p.over_sequences)


def kl_estimate(kind: str, lp: Tensor, lr: Tensor) -> Tensor:
    """k1, k2 or k3, for autograd to differentiate."""
    outside = (lp == -math.inf) | (lr == -math.inf)
    d = lr.masked_fill(outside, 0) - lp.masked_fill(outside, 0)
    return -d if kind == "k1" else d.square() / 2 if kind == "k2" else d.expm1() - d
