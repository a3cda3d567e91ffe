"""The one loop over token chunks: GEMM -> row operation -> GEMMs.

A chunk's logits are computed into [C, V] buffers that every chunk reuses. The student's buffer becomes its logit
gradient in place. The loop knows no loss: an :class:`Estimator` makes statistics and logit gradients of a chunk, an
:class:`Accumulator` makes gradients of the student's tensors from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..heads import LinearHead
from ..objective.layout import TokenRow
from ..objective.logit_gradient import LogitGradient
from ..problem import Problem
from ..rowops import Stat
from . import gemm
from .accumulator import (
    NO_GRADIENTS,
    AtToken,
    Gradients,
    LinearAccumulator,
    Part,
    RequiresGrad,
    accumulator_for,
    folds_weights_into_hidden,
    product,
    write,
)
from .buffers import Buffers, transform_of, with_gemm_dtype_weights
from .chunking import balanced
from .estimators.base import Chunk, Estimator, Walk
from .logit_gradient import power_of_two
from .vocab_parallel import require_agreement

T = TypeVar("T")
_STATS = len(Stat)  # asked for once: the length of an enumeration is a call of Python
MakeEstimator = Callable[[Problem], Estimator]


class Entries(NamedTuple):
    """A logit gradient at some token ids, of all tokens, as a backward that recomputes needs it."""

    token_ids: Tensor  # (n, K) int64, -1 for none
    values: Tensor  # (n, K)


def estimator_for(problem: Problem, make: MakeEstimator) -> Estimator:
    """What the passes below are over."""
    return make(with_gemm_dtype_weights(problem))


@gemm.in_own_precision
def forward(estimator: Estimator, requires: RequiresGrad = NO_GRADIENTS) -> tuple[Tensor, Entries | None]:
    """Statistics of all tokens, and where a backward will recompute the logits the entries that it needs."""
    problem = estimator.problem
    require_agreement(problem, requires)
    statistics, entries = no_statistics(estimator), None
    if estimator.gradient_with_statistics and any(requires):
        shape = (problem.rows.count, problem.width)
        ids = torch.full(shape, -1, dtype=torch.int64, device=problem.device)
        entries = Entries(ids, torch.zeros(shape, dtype=problem.dtype, device=problem.device))
    for chunk in chunks(Buffers(problem), statistics):
        estimator.score_frozen(chunk)
        (gradient, *_), _ = _in_sub_chunks(problem, chunk, estimator.score)
        if gradient is not None:
            _store_gradient(chunk, gradient)
            if entries is not None:
                assert gradient.token_ids is not None
                assert gradient.values is not None
                width = gradient.token_ids.shape[1]  # routes may differ in how many ids they have
                entries.token_ids[chunk.tokens, :width] = gradient.token_ids
                entries.values[chunk.tokens, :width] = gradient.values
    return statistics, entries


@gemm.in_own_precision
def forward_with_gradients(
    estimator: Estimator,
    requires: RequiresGrad,
    weights: Tensor,  # () or (n,) token weights
) -> tuple[Tensor, Gradients]:
    """Statistics and the gradients of sum_i weights_i loss_i, each GEMM once.

    A weight that all tokens share is not in the weight's gradient where :class:`Scaling` defers it.
    """
    problem = estimator.problem
    require_agreement(problem, requires, fused=True)
    buffers = Buffers(problem)
    accumulator = accumulator_for(problem, requires, buffers)
    student, statistics, unit = problem.student, no_statistics(estimator), accumulator.unit_scale
    folds = unit and isinstance(student, LinearHead) and folds_weights_into_hidden(student, weights)
    spread: dict[int, Tensor] = {}  # a weight that all tokens share, (C,) by C

    def scales(part: Chunk, token_weights: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The factors of a gradient at unit scale, once its statistics are known: of the rows, of the weight."""
        slope = estimator.slope(part)
        rows_scale = product(slope, token_weights)
        return rows_scale, rows_scale if folds else slope

    def sub_chunk(part: Chunk) -> Part:
        token_weights = weights if weights.ndim == 0 else weights[part.tokens]
        if weights.ndim == 0 and not unit:
            C = part.stop - part.start
            if C not in spread:
                spread[C] = weights.expand(C)
            token_weights = spread[C]
        if problem.options.store_exponentials:
            stored, factor = _stored(problem, part)
            estimator.scored(part)
            rows_scale, weight_scale = (product(x, factor) for x in scales(part, token_weights))
            return stored._replace(rows_scale=rows_scale, weight_scale=weight_scale)
        now = None
        if student.shard is None:
            now = estimator.weights_now(part, None if unit else token_weights)
        loaded = estimator.load(part)
        if now is None:  # the gradient waits for the statistics
            scored, _ = estimator.statistics(part, loaded)
            gradient = scored.gradient
            if gradient is None:
                gradient = estimator.logit_gradient(statistics, part.tokens)
            else:
                _store_gradient(part, gradient)
            return write(
                accumulator,
                problem,
                loaded.row_problem,
                scored.statistics,
                gradient,
                token_weights,
                token_weights if folds else None,
                part.start,
                part.stop,
            )
        out = accumulator.buffer(loaded.row_problem, part.start, part.stop)
        problem.ops.statistics_and_gradient(loaded.row_problem, now, out, part.own)
        estimator.scored(part)
        if not unit:
            return accumulator.written(out, None, None, part.start, part.stop)
        return accumulator.written(out, *scales(part, token_weights), part.start, part.stop)

    for chunk in chunks(buffers, statistics):
        estimator.score_frozen(chunk)
        accumulator.add(*_in_sub_chunks(problem, chunk, sub_chunk), chunk.start, chunk.stop)
    return statistics, accumulator.result()


def _stored(problem: Problem, chunk: Chunk) -> tuple[Part, Tensor]:
    """The gradient of -log p of a chunk's tokens from the product that would make its logits; and its factor (C,)."""
    student, ids = problem.student, chunk.token_ids
    assert isinstance(student, LinearHead)
    assert ids is not None
    hidden = chunk.buffers.reader(student)((chunk.start, chunk.stop))
    out, transform = chunk.buffers.exponentials(chunk.start, chunk.stop), transform_of(student)
    found = problem.ops.linear_exponentials(hidden, student.weight, transform, problem.vocab_size, ids, out, chunk.own)
    if found is None:
        raise RuntimeError("store_exponentials needs a GPU of compute capability 8.0 or newer")
    at_token = AtToken(ids.clamp(0, problem.vocab_size - 1), found.entry)
    return Part(out.to(gemm.gradient_dtype(student.weight)), None, None, at_token), found.factor


@gemm.in_own_precision
def backward(
    estimator: Estimator,
    requires: RequiresGrad,
    statistics: Tensor,  # of the forward
    entries: Entries | None,  # of the forward
    *upstream: Tensor | None,  # (n,) gradients of the estimator's outputs
) -> Gradients:
    """The gradients of sum_i upstream_i output_i, the student's logits recomputed."""
    problem = estimator.problem
    buffers = Buffers(problem)
    accumulator = accumulator_for(problem, requires, buffers)
    gradient = estimator.weighted(statistics, _restored(statistics, entries), *upstream)
    shared = None
    if isinstance(accumulator, LinearAccumulator) and problem.student.rows.dtype == torch.float16:
        # under a loss scale the weights may be large, and float16 hidden states times them overflow
        shared = power_of_two(gradient.size)
    folded = None if shared is None else 1 / shared

    def sub_chunk(part: Chunk) -> Part:
        row_problem = estimator.recompute(part)
        own_gradient = gradient.rows(part.tokens)
        return write(accumulator, problem, row_problem, part.own, own_gradient, None, folded, part.start, part.stop)

    for chunk in chunks(buffers, statistics):
        accumulator.add(*_in_sub_chunks(problem, chunk, sub_chunk), chunk.start, chunk.stop)
    if isinstance(accumulator, LinearAccumulator) and shared is not None:
        accumulator.multiply_(shared)
    return accumulator.result()


# ------------------------------------------------------------------------------------------------------------- chunks


def no_statistics(estimator: Estimator) -> Tensor:
    problem = estimator.problem
    return torch.zeros(estimator.statistics_rows, problem.rows.count, dtype=problem.dtype, device=problem.device)


def chunks(buffers: Buffers, statistics: Tensor) -> Iterator[Chunk]:
    """All live tokens, route by route."""
    ids, first_rows = buffers.token_ids, statistics[:_STATS]
    walk = Walk(buffers, statistics, buffers.slices(first_rows, 1), None if ids is None else buffers.slices(ids))
    for route, start, stop in buffers.chunks:
        yield Chunk(walk, route, start, stop)


def _in_sub_chunks(problem: Problem, chunk: Chunk, make: Callable[[Chunk], T]) -> tuple[list[T], Tensor | None]:
    """Call ``make`` for as many tokens at a time as the frozen models' buffers have.

    Returns the results, and where there are several the memory of the chunk's student logits (C, V), now gradients.
    """
    tokens, size = chunk.stop - chunk.start, problem.frozen_chunk_size
    if size is None or size >= tokens:
        return [make(chunk)], None
    step = balanced(tokens, size, problem.device.type)
    whole = chunk.buffers.load_whole_chunk(chunk.start, chunk.stop)
    starts = range(chunk.start, chunk.stop, step)
    made = [make(chunk.part(start, min(start + step, chunk.stop))) for start in starts]
    chunk.buffers.release_whole_chunk()
    return made, whole


def _store_gradient(chunk: Chunk, gradient: LogitGradient) -> None:
    """Keep the dense part of a logit gradient among the statistics."""
    assert gradient.weight is not None
    assert gradient.max_abs_elsewhere is not None
    chunk.statistics[TokenRow.GRADIENT_WEIGHT, chunk.tokens] = gradient.weight
    chunk.statistics[TokenRow.GRADIENT_ELSEWHERE, chunk.tokens] = gradient.max_abs_elsewhere


def _restored(statistics: Tensor, entries: Entries | None) -> LogitGradient | None:
    """The logit gradient of a forward from what it has kept."""
    if entries is None:
        return None
    return LogitGradient(
        weight=statistics[TokenRow.GRADIENT_WEIGHT],
        token_ids=entries.token_ids,
        values=entries.values,
        max_abs_elsewhere=statistics[TokenRow.GRADIENT_ELSEWHERE],
    )
