"""Statistics and top-k over a vocabulary that ranks share: the columns of this rank, and the collectives."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import agreement
from ..checks import refuse
from ..heads import Head
from ..objective.divergences import Divergence
from ..objective.layout import merged_statistics
from ..objective.statistics import merge
from ..problem import FrozenModel, Problem
from ..rowops import ModelRows, RowOps, RowProblem, Stat, sparse
from ..rowops.torch import accumulation_dtype
from ..shards import VocabShard
from ..vocab_maps import tokens_of_rows

# Slices and loops, not lists: an index that is a list would be copied to the device, a host sync.
_LOGSUMS = slice(Stat.LOGSUM_STUDENT, Stat.LOGSUM_TARGET + 1)
_LOGITS = slice(Stat.LOGIT_STUDENT, Stat.LOGIT_REF + 1)
# An id as the bits of a float of its size: logits and ids in one collective.
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def local_ids(shard: VocabShard | None, token_ids: Tensor) -> Tensor:
    """Token ids relative to the columns that this rank computes, -1 for those of other ranks."""
    return token_ids if shard is None else shard.local(token_ids)


def own_ids(head: Head, token_ids: Tensor) -> Tensor:
    """Token ids as columns of a model's own logits, -1 for those that it has no logit of, or another rank has."""
    vocab_map, shard = head.vocab_map, head.shard
    if vocab_map is None:
        return token_ids if shard is None else shard.local(token_ids)
    return vocab_map[token_ids.clamp_min(0)].masked_fill(token_ids < 0, -1)


def no_logit_(statistics: Tensor, token_ids: Tensor) -> Tensor:
    """A model's statistics (len(Stat), C) with the log-prob -inf for sampled tokens (C,) of :func:`own_ids` at -1."""
    statistics[_LOGITS].masked_fill_(token_ids < 0, -math.inf)
    return statistics


def own_statistics(ops: RowOps, row_problem: RowProblem, out: Tensor | None = None) -> Tensor:
    """(len(Stat), C) of the columns that this rank computes, of which there may be none."""
    if row_problem.vocab_size:
        return ops.statistics(row_problem, out)
    models = [m.raw for m in (row_problem.student, row_problem.teacher, row_problem.ref) if m is not None]
    own = torch.zeros(len(Stat), row_problem.rows, dtype=accumulation_dtype(*models), device=models[0].device)
    own[_LOGSUMS] = -math.inf
    return own


def merge_over_ranks(
    shard: VocabShard,
    own: Tensor,  # (len(Stat), C) of this rank's columns
    token_ids: Tensor | None,  # (C,) local ids, -1 for those of other ranks
    *extra_rows: Tensor,  # (k, C) gathered in the same collective
    reward_scale: float | Tensor = 1.0,
    has: tuple[bool, bool] = (False, False),
    divergence: Divergence | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Statistics of all ranks' columns, and of each extra row the largest value of any rank. One collective."""
    if token_ids is not None:
        no_logit_(own, token_ids)
    sent = merged_statistics(has, divergence, token_ids is not None)
    gathered = shard.gather(torch.cat((torch.stack([own[stat] for stat in sent]), *extra_rows)))
    parts = own.new_zeros((gathered.shape[0], *own.shape))
    for i, stat in enumerate(sent):
        parts[:, stat] = gathered[:, i]
    sizes = [x.shape[0] for x in extra_rows]
    extra = torch.split(gathered[:, len(sent) :].amax(0), sizes) if extra_rows else ()
    return merge(parts, reward_scale, has, divergence), list(extra)


def _refuse_far_target(origin: Tensor, divergence: Divergence) -> None:
    """Raise where the target's largest logit (C,) is so far from 0 that its rounding shows in the target.

    Each rank rounds u relative to the maxima of its own columns, the gradient relative to those of the whole row. Where
    the two are an eighth apart a target's probability is off by as much.
    """
    limit = 0.125 / torch.finfo(origin.dtype).eps
    message = (
        f"divergence={divergence.name!r} over a shared vocabulary needs a target lambda log q + (1 - lambda) log r of "
        f"at most {limit:.3g}: a model alone has a larger mask (give teacher and reference the same one)"
    )
    refuse(origin.abs() > limit, origin, ValueError, message)


def statistics_of(
    ops: RowOps, shard: VocabShard | None, row_problem: RowProblem, *extra_rows: Tensor, out: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Statistics (len(Stat), C) over the whole vocabulary, and the extra rows as in :func:`merge_over_ranks`."""
    if shard is None:
        return own_statistics(ops, row_problem, out), list(extra_rows)
    own = own_statistics(ops, row_problem)
    has = row_problem.teacher is not None, row_problem.ref is not None
    divergence = row_problem.divergence
    assert divergence is None or isinstance(divergence, Divergence)
    merged, extra = merge_over_ranks(
        shard,
        own,
        row_problem.token_ids,
        *extra_rows,
        reward_scale=row_problem.reward_scale,
        has=has,
        divergence=divergence,
    )
    if divergence is not None and divergence.needs_near_target():
        _refuse_far_target(merged[Stat.ORIGIN_TARGET], divergence)
    if divergence is not None and divergence.second_round:
        # it needs the normalisers of the whole vocabulary: a second collective
        parts = ops.second_round(row_problem, merged) if row_problem.vocab_size else own.new_zeros(2, row_problem.rows)
        merged[Stat.CENTRE : Stat.VALUE + 1] = shard.gather(parts).sum(0)
    return merged if out is None else out.copy_(merged), extra


def topk_ids(head: FrozenModel, rows: ModelRows, columns: int, k: int) -> Tensor:
    """Ids (C, k) of the k largest logits over the whole vocabulary, the largest first; one collective if shared."""
    if not k:
        return rows.raw.new_empty(rows.raw.shape[0], 0, dtype=torch.int64)
    if head.vocab_map is not None:
        return _mapped_topk(head.vocab_map, rows, columns, k)
    ids = sparse.top(rows, columns, k)
    if head.shard is None:
        return ids
    logits = sparse.logits_at(rows, ids)
    # -inf would tie with padding ids (-1): the lowest finite value lets real tokens sort first
    logits = torch.where(ids < 0, logits, logits.clamp_min(torch.finfo(logits.dtype).min))
    ids = torch.where(ids < 0, ids, ids + head.shard.start)
    bits = _INTEGERS[logits.dtype]
    gathered = head.shard.gather(torch.stack((logits, ids.to(bits).view(logits.dtype))))  # (ranks, 2, C, k)
    logits, numbers = gathered.permute(1, 2, 0, 3).flatten(2).unbind(0)
    return numbers.contiguous().view(bits).gather(1, logits.topk(k).indices).to(torch.int64)


def _mapped_topk(vocab_map: Tensor, rows: ModelRows, columns: int, k: int) -> Tensor:
    """The student's tokens (C, k) that are the largest logits of a model with a map, -1 where there are fewer."""
    tokens = tokens_of_rows(vocab_map, columns)
    bias = rows.transform.bias
    if bias is None:
        bias = torch.zeros(columns, dtype=accumulation_dtype(rows.raw), device=tokens.device)
    bias = bias[:columns].masked_fill(tokens < 0, -math.inf)
    ids = sparse.top(replace(rows, transform=replace(rows.transform, bias=bias)), columns, k)
    return tokens[ids.clamp_min(0)].masked_fill(ids < 0, -1)


def require_agreement(
    problem: Problem, requires: tuple[bool, ...] = (False,) * 3, fused: bool = False, k: int | None = None
) -> None:
    """Raise on all ranks unless those that share a vocabulary make the same call and walk through the same chunks.

    Args:
        requires: which of the student's tensors require a gradient.
        fused: whether gradients are computed in the forward.
        k: of ``token_topk``. Every call compares as many values, so that different calls are compared, too.
    """
    if problem.agreement is not None:
        more = {"requires_grad": tuple(requires), "gradients in the forward": fused, "k": k}
        agreement.require_agreement(problem.agreement, problem.device, {"tokens per chunk": problem.chunk_size, **more})
