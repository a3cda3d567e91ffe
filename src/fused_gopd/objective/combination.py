"""The log-probs of several frozen models added to one: sum_i w_i log q_i, or log sum_i w_i q_i. Any shape of tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Entries below this fraction of the smallest float are masks: models have the smallest float there, times a weight.
_MASK = 1e-3


def plus_(
    total: Tensor | None,  # of the models before, written in place; None for the first
    logprobs: Tensor,  # of the next one; overwritten
    weight: float | Tensor,  # tensor: broadcasts against logprobs
    total_weight: float | Tensor,  # the sum of the absolute weights of all models
    mixture: bool,
    logsums: Tensor | float = 0.0,  # the log-probs' normalisers, not subtracted yet; tensor: broadcasts against them
) -> Tensor:
    """``total`` and one more model. Where its weight is 0 its log-prob does not matter, NaN and -inf included.

    A log-prob of -inf makes the sum -inf, whatever the sign of the weight; a mixture leaves that model out. A finite
    one is clamped where a sum could overflow.
    """
    if mixture:
        if isinstance(weight, Tensor):
            logprobs.add_(weight.log() - logsums).masked_fill_(weight == 0, -torch.inf)
        else:
            logprobs.add_(math.log(weight) - logsums)
        return logprobs if total is None else torch.logaddexp(total, logprobs, out=total)
    if isinstance(logsums, Tensor):
        logprobs.sub_(logsums)
    lowest = torch.finfo(logprobs.dtype).min / 4
    if _all_above(logprobs, lowest, total_weight):
        if total is not None and not isinstance(weight, Tensor):
            return total.add_(logprobs, alpha=weight)
        logprobs.mul_(weight)
    else:
        outside = logprobs == -torch.inf
        if isinstance(total_weight, Tensor):
            torch.maximum(logprobs, lowest / total_weight.clamp_min(1), out=logprobs)
        else:
            logprobs.clamp_min_(lowest / max(total_weight, 1.0))
        logprobs.mul_(weight).masked_fill_(outside, -torch.inf)
    if isinstance(weight, Tensor):
        logprobs.masked_fill_(weight == 0, 0)
    return logprobs if total is None else total.add_(logprobs)


def _all_above(x: Tensor, bound: float, total_weight: float | Tensor) -> bool:
    """Whether no entry has to be masked or clamped; asked on a CPU alone, where it is a tenth of the work."""
    if not x.is_cpu or not x.numel():
        return False
    largest = float(total_weight.max()) if isinstance(total_weight, Tensor) else total_weight
    return bool(x.amin() > bound / max(largest, 1.0))  # False of NaN


def finished_(total: Tensor, mixture: bool) -> Tensor:
    """The sum of all models, in place: entries that are masks are set to the smallest float, as in one model alone.

    Large positive entries, which are masks times a negative weight, are clamped, so that differences of two models are
    finite. A mixture has none.
    """
    limits = torch.finfo(total.dtype)
    if not mixture:
        total.clamp_max_(limits.max * limits.eps / 8)
    if _all_above(total, limits.min * _MASK, 1.0):
        return total
    return total.masked_fill_((total < limits.min * _MASK).logical_and_(total != -torch.inf), limits.min)


def combine(logprobs: Sequence[Tensor], weights: Sequence[float | Tensor], mixture: bool) -> Tensor:
    """The sum of all models at once."""
    total_weight, total = absolute_sum(weights), None
    for x, weight in zip(logprobs, weights, strict=True):
        total = plus_(total, x.clone(), weight, total_weight, mixture)
    assert total is not None
    return finished_(total, mixture)


def absolute_sum(weights: Sequence[float | Tensor]) -> float | Tensor:
    """The sum of the absolute weights."""
    total: float | Tensor = 0.0
    for weight in weights:
        total = total + (weight.abs() if isinstance(weight, Tensor) else abs(weight))
    return total
