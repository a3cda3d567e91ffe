"""A few entries of each row of a chunk: find the largest, read some, hide some, overwrite some.

Plain PyTorch on (C, K) tensors, for every backend: what touches whole rows is the backend's own. Token ids are (C, K)
int64, -1 for no token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import FROZEN, LogitTransform, ModelRows, RowProblem, Stat
from .search import BLOCK, rows_at_once
from .torch import accumulation_dtype, slope, transformed


def top(model: ModelRows, vocab_size: int, k: int) -> Tensor:
    """Ids (C, k) of the k largest logits of each row, the largest first. Reads each logit once.

    Where the vocabulary has fewer than k entries the last ids are -1.
    """
    if k > vocab_size:
        ids = top(model, vocab_size, vocab_size) if vocab_size else model.raw.new_empty((model.raw.shape[0], 0))
        return torch.nn.functional.pad(ids.to(torch.int64), (0, k - vocab_size), value=-1)
    raw = model.raw
    step = rows_at_once(vocab_size, raw.device.type)
    out = torch.empty(raw.shape[0], k, dtype=torch.int64, device=raw.device)
    bias = None if model.transform.bias is None else model.transform.bias[:vocab_size]
    for start in range(0, raw.shape[0], step):
        # the transform is increasing but for a bias; through a softcap distinct logits may become equal ones
        x = raw[start : start + step, :vocab_size]
        out[start : start + step] = _largest(x if bias is None else x.to(accumulation_dtype(x)) + bias, k)
    return out


def _largest(x: Tensor, k: int) -> Tensor:
    """The k largest entries lie in the k blocks with the largest maxima, or in what is left over of the row."""
    blocks = x.shape[1] // BLOCK
    if blocks <= 2 * k:
        return x.topk(k).indices
    whole = blocks * BLOCK
    chosen = x[:, :whole].view(x.shape[0], blocks, BLOCK).amax(-1).topk(k, sorted=False).indices
    inside = chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=x.device)
    rest = torch.arange(whole, x.shape[1], device=x.device).expand(x.shape[0], -1)
    candidates = torch.cat((inside.flatten(1), rest), 1)
    return candidates.gather(1, x.gather(1, candidates).topk(k).indices)


def logits_at(model: ModelRows, token_ids: Tensor) -> Tensor:
    """Transformed logits (C, K) of some tokens, in the accumulation dtype; -inf where there is no token."""
    ids = token_ids.clamp_min(0)
    bias = model.transform.bias
    if not model.raw.shape[1]:  # a rank without columns
        return torch.full(ids.shape, -math.inf, dtype=accumulation_dtype(model.raw), device=ids.device)
    x = model.raw.gather(1, ids)
    z = transformed(x, model.transform, None if bias is None else bias[ids], accumulation_dtype(x))
    return z.masked_fill(token_ids < 0, -math.inf)


def _source(token_ids: Tensor) -> Tensor:
    """(C, K) columns: its own for a token that is there, the row's first such column for one that is not."""
    present = token_ids >= 0
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    return torch.where(present, columns, present.to(torch.int8).argmax(1, keepdim=True))


@contextmanager
def hidden(model: ModelRows, token_ids: Tensor) -> Iterator[None]:
    """The raw logits with some tokens out of the support, for as long as the context lasts. Writes to them."""
    if not model.raw.shape[1]:
        yield
        return
    ids = token_ids.gather(1, _source(token_ids)).clamp_min(0)
    before = model.raw.gather(1, ids)
    model.raw.scatter_(1, ids, torch.where((token_ids >= 0).any(1, keepdim=True), -math.inf, before))
    try:
        yield
    finally:
        model.raw.scatter_(1, ids, before)


def supported(problem: RowProblem, token_ids: Tensor, logits: Tensor) -> Tensor:
    """The student's logits (C, K) of some tokens, -inf where they are outside the support of the problem's rows."""
    z, scale = logits, problem.reward_scale
    for model, (_, cancelled_at) in zip((problem.teacher, problem.ref), FROZEN, strict=True):
        if model is not None:
            outside = torch.isneginf(logits_at(model, token_ids))
            if isinstance(scale, Tensor):
                outside = outside & (scale != cancelled_at)[:, None]
            z = z.masked_fill(outside, -math.inf)
    return z


def logprobs(statistics: Tensor, logits: Tensor) -> Tensor:
    """The student's log-probs (C, K) of :func:`supported` logits, from the rows' statistics (len(Stat), C)."""
    maximum, logsum = (statistics[stat][:, None] for stat in (Stat.MAX_STUDENT, Stat.LOGSUM_STUDENT))
    # a row without support has no normaliser either: -inf - -inf
    return torch.where(torch.isneginf(logits), logits, logits - maximum - logsum)


def overwrite(
    out: Tensor,  # (C, >= V) gradient with respect to raw logits
    transform: LogitTransform,
    token_ids: Tensor,  # a token that is there twice has the same value twice
    values: Tensor,  # (C, K) gradient with respect to the transformed logits of these tokens
    logits: Tensor,  # (C, K) :func:`logits_at` of these tokens, before out took their place
) -> None:
    """Replace some entries of a gradient."""
    z = logits.masked_fill(torch.isneginf(logits), 0)
    # with a value of 0 an entry is 0 even where the slope is NaN
    gradient = torch.where(values == 0, 0, values * slope(transform, z))
    source = _source(token_ids)
    ids = token_ids.gather(1, source).clamp_min(0)
    present = (token_ids >= 0).any(1, keepdim=True)
    out.scatter_(1, ids, torch.where(present, gradient.gather(1, source).to(out.dtype), out.gather(1, ids)))
