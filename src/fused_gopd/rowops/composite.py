"""Logits of a LogLinear or Mixture: those of several models added to one, in PyTorch where a backend has no kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..objective import combination
from . import ModelRows, RowOps, Stat, SumTerm
from .torch import BLOCK_ELEMENTS, transformed

# Elements of a temporary: on a CPU as many as its caches hold, on a GPU so many that a launch is worth it.
_BLOCK = {True: BLOCK_ELEMENTS, False: 1 << 25}


def add(
    ops: RowOps,
    out: Tensor,  # (C, >= V) the sum of the log-probs of the models before, in the accumulation dtype
    model: ModelRows,  # the next one
    vocab_size: int,  # V
    statistics: Tensor,  # (len(Stat), C) of that model alone
    term: SumTerm,
    index: Tensor | None = None,  # (V,) int64, the columns of a model that has others; the bias is that of these
) -> None:
    """out := out and the log-probs of one more model, each relative to its own maximum and normaliser."""
    if index is None and ops.add_logprobs(out, model, vocab_size, statistics, term):
        return
    transform, count = model.transform, model.raw.shape[0]
    bias = None if transform.bias is None else transform.bias[:vocab_size]
    step = max(1, _BLOCK[out.device.type == "cpu"] // max(1, vocab_size))
    scratch = None if term.first else torch.empty(min(step, count), vocab_size, dtype=out.dtype, device=out.device)
    maxima, logsums = statistics[Stat.MAX_STUDENT, :, None], statistics[Stat.LOGSUM_STUDENT, :, None]
    # a row without support has no normaliser: its entries are -inf, from which -inf is not to be subtracted
    logsums = logsums.masked_fill(logsums == -math.inf, 0)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        raw = model.raw[rows, :vocab_size] if index is None else model.raw[rows].index_select(1, index)
        z = transformed(raw, transform, bias, out.dtype)
        total = out[rows, :vocab_size]
        logprobs = torch.sub(z, maxima[rows], out=total if scratch is None else scratch[: rows.stop - start])
        w, total_w = (x[rows, None] if isinstance(x, Tensor) else x for x in (term.weight, term.total_weight))
        combination.plus_(None if term.first else total, logprobs, w, total_w, term.mixture, logsums[rows])
        if term.last:
            combination.finished_(total, term.mixture)


def drop_normaliser(statistics: Tensor, maximum: int, logsum: int) -> None:
    """Set a model's log-normaliser to minus its maximum, so that its logits are the log-probs. In place.

    A row without support or with NaN keeps its own.
    """
    own = statistics[logsum]
    statistics[logsum] = torch.where(own.isfinite(), -statistics[maximum], own)
