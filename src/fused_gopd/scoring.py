"""One head alone: log-probs of given tokens, entropies, and the most likely tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .agreement import Agreement, agreement_of, shared_by
from .checks import require_device, require_entries, require_integer, require_reverse_mode, require_shape
from .heads import Head, LinearHead, Source, TokenLogProbs, require_kind
from .loop.chunking import chunk_size_for
from .loop.vocab_parallel import own_ids
from .models import frozen_heads, joint_vocab_size, zero_masked
from .objective import combination
from .objective.divergences import ReverseKL
from .option_checks import checked_once
from .options import DEFAULTS, LossOptions
from .problem import FlatComposite, Problem, Route
from .rowops import select_backend
from .rowops.torch import accumulation_dtype
from .tokens import Sequences, TokenRows, check_mask, live_entries, live_rows, live_token_ids
from .values import require_count


def prepare_scoring(
    head: Head,
    token_ids: Tensor | None,
    *,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    selected: bool = False,
) -> Problem:
    """The problem of scoring ``token_ids``, or without them of a search.

    With ``selected`` there are several ids at each position, (..., K).
    """
    require_kind("head", head)
    function = "token_topk" if token_ids is None else "selected_logprobs" if selected else "token_logprobs"
    require_reverse_mode(function, head)
    chosen = checked_once(chunk_size=chunk_size, backend=backend)
    shape, device = head.token_shape, head.rows.device
    if token_ids is not None:
        require_integer("token_ids", token_ids)
        if selected:
            require_entries("token_ids", token_ids, shape, "head")
        else:
            require_shape("token_ids", token_ids, shape, "head")
        require_device("token_ids", token_ids, device)
    live = check_mask(mask, shape, device, "head")
    vocab_size = joint_vocab_size({"head": head}, vocab_size)
    rows = live_rows(live, shape)
    if rows.keep is not None:
        head = zero_masked(head, rows.keep)
        if token_ids is not None and not selected:
            token_ids = token_ids.masked_fill(~rows.keep, 0)
    ids = support_ids = None
    if token_ids is not None and selected:
        support_ids = live_entries("token_ids", token_ids, rows, vocab_size)
    elif token_ids is not None:
        ids = live_token_ids(token_ids, rows, vocab_size, mask is not None)
    agreement = None
    models: dict[str, Sequence[Source]] = {"student": (head,), "teacher": (), "ref": ()}
    shards = shared_by(models)
    if shards:
        every = torch.ones(shape, dtype=torch.bool, device=device) if live is None else live
        values = DEFAULTS | {"student": head, "teacher": None, "token_ids": ids, "mask": every}
        values |= {"support_ids": support_ids}
        values |= {"vocab_size": vocab_size, "chunk_size": chosen.chunk_size}
        agreement = agreement_of(shards, values, models, rows, [(0, rows.count)], function)
    if head.shard is not None:
        head = replace(head, shard=head.shard.within(vocab_size))
    return _problem(head, rows, ids, vocab_size, chosen.chunk_size, chosen.backend, agreement, support_ids)


def _problem(
    head: Head,
    rows: TokenRows,
    token_ids: Tensor | None,
    vocab_size: int,
    chunk_size: int | None,
    backend: str,
    agreement: Agreement | None = None,
    support_ids: Tensor | None = None,  # (n, K)
) -> Problem:
    device, dtype = head.rows.device, accumulation_dtype(head.rows)
    columns = vocab_size if head.shard is None else head.shard.largest
    return Problem(
        options=_DEFAULT,
        divergence=_NO_DIVERGENCE,
        student=head,
        routes=(Route(start=0, stop=rows.count),),
        rows=rows,
        sequences=Sequences(rows.shape),
        vocab_size=vocab_size,
        token_ids=token_ids,
        support_ids=support_ids,
        weights=torch.empty((), dtype=dtype, device=device),  # never read
        agreement=agreement,
        recomputes=True,
        ops=select_backend(backend, device, {head.rows.dtype}),
        chunk_size=chunk_size or chunk_size_for(columns, isinstance(head, LinearHead), device.type, dtype.itemsize),
        dtype=dtype,
        device=device,
    )


_DEFAULT, _NO_DIVERGENCE = LossOptions(), ReverseKL()


def topk_tokens(head: Head, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of the k most likely tokens: see :func:`fused_gopd.token_topk`."""
    problem = prepare_scoring(head, None, **options)
    if require_count("k", k) > problem.vocab_size:
        raise ValueError(f"k must be at most the vocabulary of {problem.vocab_size}, got {k}")
    ids, logprobs = autograd.token_topk(problem, k)
    if problem.rows.keep is None:
        return ids, logprobs
    masked = ~problem.rows.keep[..., None]
    return ids.masked_fill(masked, -1), logprobs.masked_fill(masked, 0)


@torch.no_grad()
def logprobs_under(models: Sequence[Source | FlatComposite], problem: Problem) -> Tensor:
    """log-probs (n,) of a loss's sampled tokens under models, one a route, that the loss itself does not need."""
    out = torch.zeros(problem.rows.count, dtype=problem.dtype, device=problem.device)
    for model, route in zip(models, problem.routes, strict=True):
        cut = slice(route.start, route.stop)
        if isinstance(model, FlatComposite):
            parts = (
                _logprobs_of_route(head, problem, route) if given is None else given[cut]
                for head, given in zip(model.heads, model.logprobs, strict=True)
            )
            out[cut] = combination.combine(list(parts), model.weights_of(cut), model.mixture)
        else:
            out[cut] = _logprobs_of_route(model, problem, route)
    return out


def _logprobs_of_route(model: Source | None, problem: Problem, route: Route) -> Tensor:
    """log-probs of a route's sampled tokens under one model."""
    rows, ids = problem.rows, problem.token_ids
    if isinstance(model, TokenLogProbs):
        return rows.take(model.logprobs.detach(), route.start, route.stop)
    (head,) = frozen_heads([] if model is None else [model], lambda head: head)
    assert ids is not None
    if len(problem.routes) > 1:
        assert rows.index is not None
        rows = TokenRows(rows.shape, rows.index[route.start : route.stop])
    if head.shard is not None:
        head = replace(head, shard=head.shard.within(problem.vocab_size))
    size, backend, vocab_size = problem.chunk_size, problem.options.backend, problem.vocab_size
    ids, outside = ids[route.start : route.stop], None
    if head.vocab_map is not None:
        ids, vocab_size = own_ids(head, ids), head.own_size
        head, outside, ids = replace(head, vocab_map=None), ids < 0, ids.clamp_min(0)
    logprobs = autograd.token_logprobs(_problem(head, rows, ids, vocab_size, size, backend))[0]
    return logprobs if outside is None else logprobs.masked_fill(outside, -math.inf)
