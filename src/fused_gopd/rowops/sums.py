"""Rows of several models added to one, in plain PyTorch for every backend: what a LogLinear or Mixture needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..objective import combination
from . import ModelRows, Stat
from .torch import BLOCK_ELEMENTS, transformed


def add(
    out: Tensor,  # (C, >= V) the sum of the log-probs of the models before, in the accumulation dtype
    model: ModelRows,  # the next one
    vocab_size: int,  # V
    statistics: Tensor,  # (len(Stat), C) of that model alone
    weight: float | Tensor,  # tensor: (C,)
    sizes: float | Tensor,  # likewise, see combination.plus
    mixture: bool,
    *,
    first: bool,  # nothing is in out
    last: bool,  # no other model follows
) -> None:
    """out := out and the log-probs of one more model, each relative to its own maximum and normaliser."""
    transform = model.transform
    bias = None if transform.bias is None else transform.bias[:vocab_size]
    count, step = model.raw.shape[0], max(1, BLOCK_ELEMENTS // max(1, vocab_size))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        z = transformed(model.raw[rows, :vocab_size], transform, bias, out.dtype)
        maximum, logsum = (statistics[stat, rows, None] for stat in (Stat.MAX_STUDENT, Stat.LOGSUM_STUDENT))
        # a row without support has no normaliser either: -inf - -inf
        logprobs = (z - maximum - logsum).masked_fill(z == -math.inf, -math.inf)
        w, size = (x[rows, None] if isinstance(x, Tensor) else x for x in (weight, sizes))
        before = None if first else out[rows, :vocab_size]
        total = combination.plus(before, logprobs, w, size, mixture)
        out[rows, :vocab_size] = combination.finished(total) if last else total


def as_it_is(statistics: Tensor, maximum: int, logsum: int) -> None:
    """A model's normaliser made that of numbers which are log-probs as they are: log q = q' + its maximum.

    A row without support or with NaN keeps its own.
    """
    own = statistics[logsum]
    statistics[logsum] = torch.where(own.isfinite(), -statistics[maximum], own)
