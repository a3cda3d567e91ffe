"""The sampled estimator: advantages, ratios, clipping and the policy gradient term per token.

:func:`evaluate` is what kernels compute (:meth:`fused_gopd.rowops.RowOps.policy`), on tensors. An ``advantage_fn``, a
baseline and ratios of whole sequences are made of its pieces, in PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..options import LossOptions
from ..rowops import Policy, PolicyRule, Stat
from .rollout import weight_bounds
from .statistics import token_logprob
from .target import bounded, mix, outside_support


def rule_of(options: LossOptions) -> PolicyRule:
    """The numbers that a call's options give."""
    return PolicyRule(
        logprob_min=options.logprob_min,
        advantage_clip=cast("tuple[float, float] | None", options.advantage_clip),
        clip=options.clip,
        clip_dual=options.clip_dual,
        rollout_is_cap=weight_bounds(options)[1],
        ratio=options.ratio,
        log_ratio_max=options.log_ratio_max,
        loss_max=options.loss_max,
    )


def evaluate(policy: Policy, student: Tensor) -> PolicyTerm:
    """A policy at the student's log-probs (C,)."""
    teacher, ref = (
        None if x is None else token_logprob(x[Stat.LOGIT_STUDENT], x[Stat.LOGSUM_STUDENT])
        for x in (policy.teacher, policy.ref)
    )
    used, _ = advantages_of(
        policy.rule,
        reward_scale=policy.reward_scale,
        student=student,
        teacher=teacher,
        ref=ref,
        old=policy.old_logprobs,
    )
    behaviour, importance = student if policy.old_logprobs is None else policy.old_logprobs, None
    if policy.rollout_logprobs is not None:
        importance = (behaviour - policy.rollout_logprobs).masked_fill(torch.isneginf(behaviour), 0).exp()
        importance = importance.clamp_max(policy.rule.rollout_is_cap)
    return policy_term(policy.rule, used, student, policy.old_logprobs, importance)


def advantage(
    reward_scale: float | Tensor, behaviour: Tensor, teacher: Tensor | None, ref: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A = lambda log q + (1 - lambda) log r - log p of the sampled token, and where it is finite.

    Where a model gives the token probability 0 there is no finite advantage: A is 0 there and ``finite`` False.
    NaN stays NaN and counts as finite, so that a diverged model is seen.

    Args:
        reward_scale: lambda, a float or (C,).
        behaviour: (C,) log-prob under the policy that sampled the token: old log-probs, or the student's own.
        teacher, ref: (C,) log-probs, None where cancelled.
    """
    outside = outside_support(reward_scale, teacher, ref) | torch.isneginf(behaviour)
    value = bounded(mix(reward_scale, teacher, ref) - behaviour) + 0 * behaviour
    return torch.where(outside, torch.zeros_like(value), value), ~outside


# (A or None, clamped log-probs of teacher and reference) -> advantages (C,)
Hook = Callable[[Tensor | None, Tensor | None, Tensor | None], Tensor]


def advantages_of(
    rule: PolicyRule,
    *,
    reward_scale: float | Tensor,
    student: Tensor,  # (C,) log p of the sampled token, like the next three
    teacher: Tensor | None,
    ref: Tensor | None,
    old: Tensor | None,
    hook: Hook | None = None,
    expected: Tensor | None = None,  # (C,)
) -> tuple[Tensor, Tensor]:
    """The advantages that the gradient uses, and those that the loss reports, which leave the baseline out; (C,) each.

    ``logprob_min`` on teacher and reference -> A or the hook's value -> the baseline -> ``advantage_clip``.

    ``expected`` is the value l of the ``full`` reverse KL per token: E_p[A] = -l, so that A + l has mean 0 (vOPD,
    2605.07865). The hook's advantage has another mean, but any number per position leaves the gradient unbiased.
    """
    if rule.logprob_min is not None:
        teacher, ref = (None if x is None else x.clamp_min(rule.logprob_min) for x in (teacher, ref))
    behaviour = student if old is None else old
    adv: Tensor | None = None
    finite = ~torch.isneginf(behaviour)
    if teacher is not None or ref is not None:
        adv, finite = advantage(reward_scale, behaviour, teacher, ref)
    if hook is not None:
        adv, finite = hook(adv, teacher, ref), ~torch.isneginf(behaviour)
    assert adv is not None

    def clipped(x: Tensor) -> Tensor:
        if rule.advantage_clip is not None:
            x = x.clamp(*rule.advantage_clip)
        return x.masked_fill(~finite, 0)

    return clipped(adv if expected is None else adv + expected), clipped(adv)


@dataclass(frozen=True, kw_only=True)
class PolicyTerm:
    """The sampled estimator's token loss and its derivative with respect to the student's log-prob; (C,) each."""

    loss: Tensor
    dlogprob: Tensor  # of ratio="sequence-mean" that with respect to the mean of the sequence
    advantages: Tensor
    clipped: Tensor  # bool: where a bound is in force: the derivative is 0, or that of the bound for ratio="detached"
    importance: Tensor | None  # the detached importance weight of the rollout, where there is one

    def stacked(self) -> Tensor:
        """(len(PolicyStat), C), as a row operation gives them."""
        importance = torch.ones_like(self.loss) if self.importance is None else self.importance
        # in the order of PolicyStat
        return torch.stack((self.loss, self.dlogprob, self.advantages, self.clipped.to(self.loss.dtype), importance))


def sequence_log_ratio(
    student: Tensor,  # (C,) log p of the sampled token
    old: Tensor | None,
    mean: Callable[[Tensor], Tensor],  # (C,) -> (C,): each number replaced by the mean over its sequence
) -> Tensor:
    """The mean of log p - log p_old over the sequence of each token, (C,)."""
    if old is None:
        return torch.zeros_like(student)
    # a token of probability 0 under a policy would make its whole sequence's ratio 0, inf or NaN
    return mean((student - old).masked_fill(torch.isneginf(student) | torch.isneginf(old), 0))


def policy_term(
    rule: PolicyRule,
    adv: Tensor,  # (C,) advantages
    student: Tensor,  # (C,) log p of the sampled token
    old: Tensor | None,
    importance: Tensor | None,  # (C,) the detached weight w
    log_ratio: Tensor | None = None,  # (C,) sequence_log_ratio, in place of the token's own
) -> PolicyTerm:
    """-A rho w with rho = p / p_old and w the importance weight of the rollout, clipped as the rule says.

    log_ratio_max  log rho is bounded in magnitude
    clip           max(-A rho, -A clamp(rho, 1 - low, 1 + high))
    clip_dual      at most -A clip_dual where A < 0 (Ye et al. 2020)
    loss_max       bounded in magnitude, before w
    sequence       rho_t = s exp(log p_t - sg log p_t) with s = exp(mean over the sequence of log p - log p_old)
                   detached (GSPO-token, Zheng et al. 2025); the bounds see s
    sequence-mean  rho_t = s, not detached (GSPO)
    detached       -A sg(clamp(rho, 1 - low, 1 + high)) log p (CISPO, 2506.13585)
    none           rho_t = exp(log p_t - sg log p_t)
    """
    if rule.ratio == "none":
        log_ratio = torch.zeros_like(student)
    elif log_ratio is None:
        log_ratio = torch.zeros_like(student) if old is None else student - old
    zero_probability = torch.isneginf(student)
    clipped = torch.zeros_like(zero_probability)
    nothing = adv == 0  # no loss and no gradient that a bound could remove
    if rule.log_ratio_max is not None:
        clipped = (log_ratio.abs() > rule.log_ratio_max) & ~nothing
        log_ratio = log_ratio.clamp(-rule.log_ratio_max, rule.log_ratio_max)
    ratio = log_ratio.exp()
    loss = -adv * ratio
    slope: Tensor | None = None  # d(-A rho w)/d log p = -A rho w, whichever ratio it is; None is the loss
    flat = clipped  # where there is no derivative
    if rule.ratio == "detached":
        flat = torch.zeros_like(zero_probability)
        if rule.clip is not None:
            low, high = rule.clip
            within = ratio.clamp(1.0 - low, 1.0 + high)
            clipped, ratio = clipped | ((within != ratio) & ~nothing), within
        slope = -adv * ratio
        loss = slope * bounded(student)
    elif rule.clip is not None:
        low, high = rule.clip
        within = -adv * ratio.clamp(1.0 - low, 1.0 + high)
        # the clipped branch is flat where it is the larger one; on a tie (inside the range) the branches coincide
        flat = clipped = clipped | (within > loss)
        loss = torch.maximum(loss, within)
    if rule.clip_dual is not None:
        bound = -adv * rule.clip_dual
        over = (adv < 0) & (loss > bound)
        flat = clipped = clipped | over
        loss = torch.where(over, bound, loss)
    if rule.loss_max is not None:
        over = loss.abs() > rule.loss_max
        flat, clipped = flat | over, clipped | over
        loss = loss.clamp(-rule.loss_max, rule.loss_max)
    if importance is not None:
        loss = loss * importance
        slope = None if slope is None else slope * importance
    # A = 0 or w = 0 is no loss, whatever it is multiplied by: a ratio that overflows would make it NaN
    if importance is not None:
        nothing = nothing | (importance == 0)
    loss = loss.masked_fill(nothing, 0)
    slope = loss if slope is None else slope.masked_fill(nothing, 0)
    if rule.ratio != "sequence-mean":  # log p = -inf has no derivative to follow
        flat = flat | zero_probability
    return PolicyTerm(
        loss=loss,
        dlogprob=slope.masked_fill(flat, 0),
        advantages=adv,
        clipped=clipped,
        importance=importance,
    )
