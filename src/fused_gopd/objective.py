"""The objective per token: everything that has no vocabulary axis.

Takes the statistics that the row operations leave per token and returns losses, advantages, gradient coefficients,
weights and reductions. Plain PyTorch on vectors; nothing here synchronises with the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .rowops import Stat

Estimator = Literal["sampled", "full"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


# ---------------------------------------------------------------------------------------------------- mixing models


def mix(reward_scale: float | Tensor, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
    """lambda q + (1 - lambda) r, where a model with coefficient exactly 0 does not matter, whatever its value.

    Written as r + lambda (q - r), so that q = r gives exactly q. ``None`` is a model that has cancelled.
    """
    if ref is None:
        assert teacher is not None
        return teacher
    if teacher is None:
        return ref
    if not isinstance(reward_scale, Tensor):
        reward_scale = torch.full_like(ref, reward_scale)
    mixed = ref + reward_scale * (teacher - ref)
    return torch.where(reward_scale == 1, teacher, torch.where(reward_scale == 0, ref, mixed))


def _any_impossible(reward_scale: float | Tensor, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
    """Where a model that counts gives the token probability 0."""
    dead: Tensor | None = None
    for model, cancelled_at in ((teacher, 0.0), (ref, 1.0)):
        if model is None:
            continue
        gone = torch.isneginf(model)
        if isinstance(reward_scale, Tensor):
            gone = gone & (reward_scale != cancelled_at)
        dead = gone if dead is None else dead | gone
    assert dead is not None
    return dead


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
    dead = _any_impossible(reward_scale, teacher, ref) | torch.isneginf(behaviour)
    value = mix(reward_scale, teacher, ref) - behaviour
    return torch.where(dead, torch.zeros_like(value), value), ~dead


@dataclass(frozen=True)
class PolicyTerm:
    """The sampled estimator's token loss and its derivative with respect to the student's log-prob."""

    loss: Tensor  # (C,)
    dlogprob: Tensor  # (C,)
    advantages: Tensor  # (C,)


def policy_term(
    reward_scale: float | Tensor,
    student: Tensor,  # (C,) log p of the sampled token
    teacher: Tensor | None,
    ref: Tensor | None,
    old: Tensor | None,
    clip: tuple[float, float] | None,
) -> PolicyTerm:
    """-A rho with rho = p / p_old; with ``clip`` max(-A rho, -A clamp(rho, 1 - low, 1 + high))."""
    adv, finite = advantage(reward_scale, student if old is None else old, teacher, ref)
    # where A is not finite neither is the ratio: 0 times inf would be NaN
    log_ratio = torch.zeros_like(student) if old is None else student - old
    ratio = torch.where(finite, log_ratio, torch.zeros_like(log_ratio)).exp()
    loss = -adv * ratio
    slope = loss  # d(-A rho)/d log p = -A rho
    if clip is not None:
        low, high = clip
        clipped = -adv * ratio.clamp(1.0 - low, 1.0 + high)
        # the clipped branch is flat where it is the larger one; on a tie (inside the range) the branches coincide
        slope = torch.where(clipped > loss, torch.zeros_like(loss), loss)
        loss = torch.maximum(loss, clipped)
    return PolicyTerm(loss, slope, adv)


# -------------------------------------------------------------------------------------------- from row statistics


def token_logprob(logit: Tensor, logsum: Tensor) -> Tensor:
    """log-prob of the sampled token from its logit and the normaliser, both relative to the row's maximum.

    Never positive; -inf outside the support, NaN in a poisoned row.
    """
    return torch.where(torch.isneginf(logsum), logsum, logit - logsum)


def entropy(statistics: Tensor) -> Tensor:
    """Entropy in nats; 0 for a row without support. Rounding cannot make it negative."""
    logsum = statistics[Stat.LOGSUM_STUDENT]
    value = (logsum - statistics[Stat.MEAN_LOGIT]).clamp_min(0)
    return torch.where(torch.isneginf(logsum), torch.zeros_like(value), value)


def divergence_value(
    divergence: Divergence, beta: float, reward_scale: float | Tensor, statistics: Tensor, has: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Token loss of the ``full`` estimator and KL(p || target), both (C,); 0 for a row without support.

    ``has`` says whether teacher and reference are in the statistics.
    """
    logsum_p, logsum_u, gap = (statistics[s] for s in (Stat.LOGSUM_STUDENT, Stat.LOGSUM_TARGET, Stat.MEAN_GAP))
    kl = (gap + (logsum_u - logsum_p)).clamp_min(0)
    if divergence == "reverse_kl":
        teacher = statistics[Stat.LOGSUM_TEACHER] if has[0] else None
        ref = statistics[Stat.LOGSUM_REF] if has[1] else None
        value = gap + (mix(reward_scale, teacher, ref) - logsum_p)
    elif divergence == "forward_kl":
        value = (statistics[Stat.TARGET_PART] + (logsum_p - logsum_u)).clamp_min(0)
    else:
        value = (beta * statistics[Stat.TARGET_PART] + (1.0 - beta) * statistics[Stat.STUDENT_PART]).clamp_min(0)
    empty = torch.isneginf(logsum_p)
    zero = torch.zeros_like(value)
    return torch.where(empty, zero, value), torch.where(empty, zero, kl)


# ------------------------------------------------------------------------------------------------------- reductions


def token_weights(
    reduction: Reduction,
    mask: Tensor | None,  # token shape, bool; None is all live
    token_shape: torch.Size,
    normalizer: Tensor | float | None,
    sequence_lengths: Tensor | None,  # (B,) or ()
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """w with loss = sum w * token_loss: a scalar where all live tokens weigh the same, else of the token shape.

    Sequences are dim 0; one without a live token is left out of sequence means.
    """
    one = torch.ones((), dtype=dtype, device=device)
    if reduction in ("sum", "none"):
        return one
    # Python numbers divide as they are: a tensor made of one would be copied to the device, which waits for it
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device, dtype).reshape(())
    if reduction == "token-mean":
        if normalizer is None:
            normalizer = max(1, token_shape.numel()) if mask is None else mask.sum().clamp_min(1)
        return one / normalizer
    counts = torch.ones(token_shape, dtype=torch.bool, device=device) if mask is None else mask
    lengths = counts.reshape(token_shape[0], -1).sum(1) if token_shape.numel() else counts.new_zeros(token_shape[0])
    if normalizer is None:
        normalizer = (lengths > 0).sum().clamp_min(1)
    weight = one / normalizer
    if reduction == "seq-mean-token-sum":
        return weight
    if sequence_lengths is not None:
        lengths = sequence_lengths.expand(token_shape[0])
    weights = weight / lengths.to(dtype).clamp_min(1)
    return weights.reshape(-1, *([1] * (len(token_shape) - 1))).expand(token_shape)
