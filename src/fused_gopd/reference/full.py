"""A divergence over the whole vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..objective.divergences import OneRound, Outcomes
from ..objective.target import mix
from ..problem import Problem
from ..rowops import FROZEN
from .models import all_finite, is_composite, log_softmax, reward_scale_of


def full_loss(
    p: Problem, z: Tensor, z_q: Tensor | None, z_r: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Token loss, KL(p || target) and the three log-distributions, over the joint support."""
    lam, divergence = reward_scale_of(p), p.divergence
    column = lam[:, None] if isinstance(lam, Tensor) else lam
    support: Tensor | None = None
    if not all_finite(z, z_q, z_r):
        support = z != -math.inf
        for other, (_, cancelled_at) in zip((z_q, z_r), FROZEN, strict=True):
            if other is not None:
                outside = other == -math.inf
                support = support & ~(outside & (column != cancelled_at) if isinstance(column, Tensor) else outside)

    def other_logp(other: Tensor | None, name: str, cancelled_at: float) -> Tensor | None:
        if other is None:
            return None
        if isinstance(column, Tensor) and support is not None:
            other = other.masked_fill(column == cancelled_at, 0)
        logp, composite = log_softmax(other, support), is_composite(p, name, other)
        if composite is None:
            return logp
        return logp.where(~composite, other if support is None else other.masked_fill(~support, -math.inf))

    def inside(x: Tensor) -> Tensor:
        """0 outside the support, before any arithmetic that would make a NaN there."""
        return x if support is None else x.masked_fill(~support, 0)

    log_p = log_softmax(z, support)
    log_q, log_r = (other_logp(x, name, at) for x, (name, at) in zip((z_q, z_r), FROZEN, strict=True))
    mixed = mix(column, *(None if x is None else inside(x) for x in (log_q, log_r)))
    lowest, highest = torch.finfo(mixed.dtype).min, torch.finfo(mixed.dtype).max
    # log_softmax takes it relative to its maximum, and may leave the finite range
    log_p_in, log_t = inside(log_p), inside(log_softmax(mixed, support).clamp_(min=lowest))
    prob = inside(log_p_in.exp())
    with torch.no_grad():  # reported only: autograd would keep its [tokens, V] terms
        kl = (prob * (log_p_in - log_t)).sum(-1)

    def reverse_kl() -> Tensor:
        gap = log_p_in - mixed
        # where the student has a mask as well it may be infinite, times a probability of 0; by a sum, as in all_finite
        return (prob * (gap if bool(torch.isfinite(gap.detach().sum())) else gap.clamp(lowest, highest))).sum(-1)

    def forward_kl() -> Tensor:
        return (inside(log_t.exp()) * (log_t - log_p_in)).sum(-1)

    if isinstance(divergence, OneRound):
        value = divergence.blend(forward_kl, reverse_kl)
    else:
        value = inside(divergence.terms(Outcomes(log_p_in, log_t, mixed))).sum(-1)
    return value, kl, log_p, log_q, log_r


def exact_kl(z: Tensor, z_r: Tensor, composite: Tensor | None) -> Tensor:
    """KL(p || r) over the joint support; a sum of several models is not normalised."""
    support = (z != -math.inf) & (z_r != -math.inf)
    log_p, log_r = (log_softmax(x, support).masked_fill(~support, 0) for x in (z, z_r))
    if composite is not None:
        log_r = log_r.where(~composite, z_r.masked_fill(~support, 0))
    return (log_p.exp().masked_fill(~support, 0) * (log_p - log_r)).sum(1)
