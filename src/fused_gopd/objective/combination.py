"""The log-probs of several frozen models added to one: sum_i w_i log q_i, or log sum_i w_i q_i. Any shape of tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Of the largest float. Less than this is what a mask of the smallest float has become, divided by the weights.
_MASK = 1e-3


def plus(
    total: Tensor | None,  # of the models before, None for the first
    logprobs: Tensor,  # of the next one
    weight: float | Tensor,  # tensor: broadcasts against logprobs
    sizes: float | Tensor,  # the sum of the absolute weights of all models
    mixture: bool,
) -> Tensor:
    """``total`` and one more model. Where its weight is 0 its log-prob does not matter, NaN and -inf included.

    A log-prob of -inf makes the sum -inf, whatever the sign of the weight; a mixture leaves that model out. A finite
    one is clamped where a sum could overflow.
    """
    if mixture:
        if isinstance(weight, Tensor):
            added = (logprobs + weight.log()).masked_fill(weight == 0, -torch.inf)
        else:
            added = logprobs + math.log(weight)
        return added if total is None else torch.logaddexp(total, added)
    outside = torch.isneginf(logprobs)
    lowest = torch.finfo(logprobs.dtype).min / 4
    if isinstance(sizes, Tensor):
        within = torch.maximum(logprobs, lowest / sizes.clamp_min(1))
    else:
        within = logprobs.clamp_min(lowest / max(sizes, 1.0))
    added = weight * within
    added = added.masked_fill(outside, -torch.inf)
    if isinstance(weight, Tensor):
        added = added.masked_fill(weight == 0, 0)
    return added if total is None else total + added


def finished(total: Tensor) -> Tensor:
    """The sum of all models: a mask of the smallest float is one again, so that it equals that of a model alone.

    Where weights made it a large positive number, that is small beside the largest float: their difference is finite.
    """
    limits = torch.finfo(total.dtype)
    total = total.clamp_max(limits.max * limits.eps / 8)
    return total.masked_fill((total < limits.min * _MASK) & ~torch.isneginf(total), limits.min)


def combined(logprobs: Sequence[Tensor], weights: Sequence[float | Tensor], mixture: bool) -> Tensor:
    """The sum of all models at once."""
    sizes, total = absolute(weights), None
    for x, weight in zip(logprobs, weights, strict=True):
        total = plus(total, x, weight, sizes, mixture)
    assert total is not None
    return finished(total)


def absolute(weights: Sequence[float | Tensor]) -> float | Tensor:
    """The sum of the absolute weights."""
    total: float | Tensor = 0.0
    for weight in weights:
        total = total + (weight.abs() if isinstance(weight, Tensor) else abs(weight))
    return total
