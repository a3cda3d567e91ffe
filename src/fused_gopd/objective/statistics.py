"""Row statistics: what follows from each token's vector, and merging over slices of the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rowops import Stat
from ..tokens import widest
from .divergences import Divergence
from .layout import STATISTICS
from .target import bounded, mix, origin_of


def frozen_alone(statistics: Tensor, tokens: slice = slice(None)) -> tuple[Tensor, Tensor] | None:
    """(len(Stat), C) statistics of the teacher and of the reference, each scored alone; None without such rows."""
    if statistics.shape[0] == STATISTICS:
        return None
    middle = STATISTICS + len(Stat)
    return statistics[STATISTICS:middle, tokens], statistics[middle:, tokens]


def token_logprob(logit: Tensor, logsum: Tensor) -> Tensor:
    """log-prob of the sampled token from its logit and the normaliser, both relative to the row's maximum.

    Never positive; -inf outside the support, NaN in a row with NaN.
    """
    return torch.where(torch.isneginf(logsum), logsum, logit - logsum)


def entropy(statistics: Tensor) -> Tensor:
    """Entropy in nats; 0 for a row without support. Rounding cannot make it negative."""
    logsum = statistics[Stat.LOGSUM_STUDENT]
    value = (logsum - statistics[Stat.MEAN_LOGIT]).clamp_min(0)
    return torch.where(torch.isneginf(logsum), torch.zeros_like(value), value)


def merge(
    parts: Tensor,
    reward_scale: float | Tensor = 1.0,
    has: tuple[bool, bool] = (False, False),
    divergence: Divergence | None = None,
) -> Tensor:
    """Statistics (len(Stat), C) of a vocabulary from those of its parts, (parts, len(Stat), C).

    Maxima by max, log-sums at the common maximum, means by their weights and moved by how far the part's maxima were
    from the common ones; a token's logit is -inf in the parts that do not have it. ``has`` says whether teacher and
    reference are in the statistics, over the joint support with the student.

    CENTRE and VALUE of a second round need log-sums of the whole first: they are left 0.
    """
    # wider than what is merged: the parts have been rounded once, and the whole is not to be rounded twice more
    dtype, parts = parts.dtype, parts.to(widest(parts.device))
    reward_scale = reward_scale.to(parts.dtype) if isinstance(reward_scale, Tensor) else reward_scale
    out = torch.zeros_like(parts[0])
    empty = torch.isneginf(parts[:, Stat.LOGSUM_STUDENT])  # the maximum of an empty part is 0 and does not count

    def model(maximum: Stat, logsum: Stat, logit: Stat, cancelled_at: float | None = None) -> Tensor:
        top = parts[:, maximum].masked_fill(empty, -math.inf).amax(0)
        top = top.masked_fill(torch.isneginf(top), 0)
        shift = (parts[:, maximum] - top).masked_fill(empty, 0)
        values = (
            top,
            _logsum(parts[:, logsum].masked_fill(empty, -math.inf) + shift),
            (parts[:, logit] + shift).amax(0),
        )
        for stat, value in zip((maximum, logsum, logit), values, strict=True):
            if cancelled_at is not None and isinstance(reward_scale, Tensor):
                value = value.masked_fill(reward_scale == cancelled_at, 0)
            out[stat] = value
        return shift

    def mean(values: Tensor, weights: Tensor) -> Tensor:
        return torch.where(weights == 0, 0, weights * values).sum(0)

    shift = model(Stat.MAX_STUDENT, Stat.LOGSUM_STUDENT, Stat.LOGIT_STUDENT)
    p = (parts[:, Stat.LOGSUM_STUDENT] + shift - out[Stat.LOGSUM_STUDENT]).exp().masked_fill(empty, 0)
    out[Stat.MEAN_LOGIT] = mean(parts[:, Stat.MEAN_LOGIT] + shift, p)
    if any(has):
        shift_q, shift_r = (
            model(*stats) if there else None
            for there, stats in (
                (has[0], (Stat.MAX_TEACHER, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER, 0.0)),
                (has[1], (Stat.MAX_REF, Stat.LOGSUM_REF, Stat.LOGIT_REF, 1.0)),
            )
        )
        shift_u = mix(reward_scale, shift_q, shift_r)
        origin = bounded(parts[:, Stat.ORIGIN_TARGET] + shift_u, dtype)
        logsum_u = parts[:, _target(has)].masked_fill(empty, -math.inf) + origin
        whole = _logsum(logsum_u)
        out[Stat.ORIGIN_TARGET] = origin_of(whole.to(dtype))
        out[Stat.LOGSUM_TARGET] = whole - out[Stat.ORIGIN_TARGET]
        out[Stat.MEAN_GAP] = mean(parts[:, Stat.MEAN_GAP] + (shift - shift_u), p)
        if divergence is not None and divergence.target_gap:
            t = (logsum_u - whole).exp().masked_fill(empty, 0)
            moved = (origin - out[Stat.ORIGIN_TARGET]) - shift
            out[Stat.MEAN_TARGET_GAP] = mean(parts[:, Stat.MEAN_TARGET_GAP] + moved, t)
        for stat in (Stat.MEAN_GAP, Stat.MEAN_TARGET_GAP):
            out[stat] = bounded(out[stat], dtype)
    return out.to(dtype)


def _target(has: tuple[bool, bool]) -> Stat:
    """The row of the log-sum of u: with one frozen model u is its logits."""
    return Stat.LOGSUM_TARGET if all(has) else Stat.LOGSUM_TEACHER if has[0] else Stat.LOGSUM_REF


def _logsum(x: Tensor) -> Tensor:
    """log sum exp over dim 0, to the last digit also where the largest outweighs all others; -inf where there is none.

    Always in the same order, NaN where any is NaN.
    """
    largest, where = x.max(0, keepdim=True)
    rest = (x - largest).exp().scatter(0, where, 0).sum(0)
    nothing = torch.isneginf(largest[0])
    return torch.where(nothing, largest[0], largest[0] + torch.log1p(rest))
