"""Weights of tokens that another policy has sampled: importance weights, masks, a trust region.

One number per token, (n,), detached.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ..options import LossOptions
from ..rowops import LARGEST_WEIGHT
from .kl_estimates import KL_ESTIMATES
from .rollout_statistics import STATISTICS, Bounds, Level


class OverSequences(Protocol):
    """Of values (n,) of the live tokens: each replaced by one number of its sequence."""

    def reduce(self, how: Level, values: Tensor) -> Tensor: ...


def weight_bounds(options: LossOptions) -> tuple[float, float]:
    """The least and the largest importance weight."""
    cap = options.rollout_is_cap
    low, high = cap if isinstance(cap, tuple) else (0.0, math.inf if cap is None else cap)
    return min(low, LARGEST_WEIGHT), min(high, LARGEST_WEIGHT)


def importance(options: LossOptions, behaviour: Tensor, rollout: Tensor, over: OverSequences) -> Tensor:
    """The weight of each token (n,): exp of d, or of its sum or mean over the sequence, bounded; 0 where it is masked.

    ``behaviour`` are log p_old of the sampled tokens, or those of the student where there are none. A token of
    probability 0 under it has d = 0.
    """
    d = _log_ratio(behaviour, rollout)
    levels: dict[str, Level] = {"token": "token", "sequence": "sum", "geometric": "mean"}
    log_weight = torch.zeros_like(d) if options.rollout_is == "none" else over.reduce(levels[options.rollout_is], d)
    if options.log_ratio_max is not None:
        log_weight = log_weight.clamp(-options.log_ratio_max, options.log_ratio_max)
    weight = log_weight.exp().clamp(*weight_bounds(options))
    for name, (low, high) in _pairs(options.rollout_mask):
        x = _statistic(name, behaviour, rollout, d, over)
        weight = weight.masked_fill((x < low) | (x > high), 0)
    return weight


def in_trust_region(
    options: LossOptions, weights: Tensor, advantages: Tensor, student: Tensor, rollout: Tensor, over: OverSequences
) -> Tensor:
    """The weights (n,), 0 where a statistic of the current p and the policy that sampled is outside the trust region.

    It is bounded above where A > 0 and below where A < 0, the directions in which the gradient would move it further.
    """
    if options.trust_region is None:
        return weights
    d = _log_ratio(student, rollout)
    for name, (low, high) in _pairs(options.trust_region):
        x = _statistic(name, student, rollout, d, over)
        outside = ((advantages > 0) & (x > high)) | ((advantages < 0) & (x < low))
        weights = weights.masked_fill(outside, 0)
    return weights


def _log_ratio(behaviour: Tensor, rollout: Tensor) -> Tensor:
    return (behaviour - rollout).masked_fill(behaviour == -math.inf, 0)


def _pairs(bounds: Any) -> Bounds:
    pairs: Bounds = bounds or ()  # in their normal form
    return pairs


def _statistic(name: str, behaviour: Tensor, rollout: Tensor, d: Tensor, over: OverSequences) -> Tensor:
    level, kind = STATISTICS[name]
    if kind == "ratio":
        return over.reduce(level, d).exp()
    if kind == "difference":
        return behaviour.exp() - rollout.exp()
    return over.reduce(level, KL_ESTIMATES[kind](d))
