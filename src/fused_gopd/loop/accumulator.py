"""Logit gradients of chunks in, gradients of the student's tensors out, and where token weights are applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..heads import LinearHead
from ..objective.logit_gradient import LogitGradient
from ..problem import Problem
from ..rowops import RowProblem
from ..rowops.torch import accumulation_dtype
from . import gemm, memory
from .buffers import Buffers, columns
from .logit_gradient import gradient_buffer, power_of_two, write_logit_gradient

RowsProduct = Callable[..., Tensor]  # of gemm.dhidden_of
WeightProduct = Callable[[Tensor, bool], Tensor]  # of gemm.dweight_into


class RequiresGrad(NamedTuple):
    """Which of the student's tensors require a gradient."""

    rows: bool = False  # hidden states, or logits
    weight: bool = False
    bias: bool = False


NO_GRADIENTS = RequiresGrad()


class Gradients(NamedTuple):
    """Gradients of the student's tensors; None for what does not require one."""

    rows: Tensor | None  # of hidden or logits, (tokens, H or V), in their dtype
    weight: Tensor | None  # (V, H), in the accumulation dtype
    bias: Tensor | None  # (V,), likewise


def at_unit_scale(problem: Problem) -> bool:
    """Whether logit gradients are written without their factors, which then go into the products.

    float16 holds nothing below 6e-8, and a token weight of 1e-5 would push gradients of the size of p under it. The
    bound of ``grad_filter`` is one at unit scale. A slope that PyTorch makes, and one of stored exponentials, is known
    after the gradient is written.
    """
    student = problem.student
    if not isinstance(student, LinearHead):
        return False
    options = problem.options
    filters = options.grad_filter > 0
    return student.hidden.dtype == torch.float16 or filters or options.store_exponentials or problem.slope_follows


class Scaling(NamedTuple):
    """How token weights are split between the loop and the backward, so that nothing underflows or rounds twice.

    A logit gradient that is written with its factors has all of them. Of one :func:`at_unit_scale` the weight's
    gradient is a float32 sum over tokens: a factor that all tokens share is applied at its end, unless folding it into
    float32 operands is free. A float16 gradient of the rows is stored relative to a power of two, by which the backward
    multiplies exactly; other dtypes have float32's range and are stored with their weights applied.
    """

    in_loop: Tensor  # () or (n,) token weights that the loop applies
    deferred_rows: Tensor | None  # () factor of the rows' gradient in the backward; None is 1
    deferred_weight: Tensor | None  # () likewise of the weight's and the bias's gradient

    @classmethod
    def of(cls, problem: Problem) -> Scaling:
        student, weights = problem.student, problem.weights
        if not at_unit_scale(problem):
            return cls(weights, None, None)
        assert isinstance(student, LinearHead)
        scale = power_of_two(weights) if student.hidden.dtype == torch.float16 else None
        in_loop = weights if scale is None else weights / scale
        return cls(in_loop, scale, scale if folds_weights_into_hidden(student, weights) else weights)


def folds_weights_into_hidden(student: LinearHead, weights: Tensor) -> bool:
    """Whether token weights are multiplied into the hidden states of the product that is the weight's gradient."""
    # the hidden states' dtype is that of the products: a master weight is rounded to it
    return weights.ndim > 0 or gemm.gradient_dtype(student.hidden) in (torch.float32, torch.float64)


class AtToken(NamedTuple):
    """One entry of a token's logit gradient that ``Part.dlogits`` leaves out, where it is 0; of the same scale."""

    token_ids: Tensor  # (c,) int64
    entry: Tensor  # (c,) float32, 0 where there is none


class Part(NamedTuple):
    """The logit gradient of a sub-chunk, and the factors of the products with it: None where it has them itself."""

    dlogits: Tensor  # (c, V)
    rows_scale: Tensor | None  # () or (c,) factor of the rows' gradient, applied in float32 before it is rounded
    weight_scale: Tensor | None  # () or (c,) factor inside the sums that are the weight's and the bias's gradient
    at_token: AtToken | None = None  # of a chunk that is not in sub-chunks


def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """None is 1."""
    return b if a is None else a if b is None else a * b


def _concatenated(scales: list[Tensor | None]) -> Tensor | None:
    """The factors of a chunk's sub-chunks: one () for all of them, or one per token."""
    given = [x for x in scales if x is not None]
    if not given or given[0].ndim == 0:
        return scales[0]
    return given[0] if len(given) == 1 else torch.cat(given)


class Accumulator(Protocol):
    """What the loop asks of the student's kind, sub-chunk by sub-chunk; tokens are [start, stop)."""

    unit_scale: bool  # logit gradients are written at unit scale; their factors go into the products

    def buffer(self, row_problem: RowProblem, start: int, stop: int) -> Tensor:
        """Where the logit gradient (c, V) of a sub-chunk is written."""

    def written(
        self, out: Tensor, rows_scale: Tensor | None, weight_scale: Tensor | None, start: int, stop: int
    ) -> Part:
        """``buffer`` has been filled."""

    def add(self, parts: list[Part], whole: Tensor | None, start: int, stop: int) -> None:
        """The products with a chunk's logit gradient; ``whole`` are its logits where it has several sub-chunks."""

    def result(self) -> Gradients: ...


class LogitsAccumulator:
    """A student that is ``Logits``: the logit gradient is the result."""

    unit_scale = False

    def __init__(self, problem: Problem, requires: RequiresGrad, buffers: Buffers) -> None:
        self._problem = problem
        logits = problem.student.rows
        self._rows = _fresh_rows(problem, zero=logits.shape[-1] != columns(problem, problem.student))

    def buffer(self, row_problem: RowProblem, start: int, stop: int) -> Tensor:
        if self._problem.rows.index is None:
            return self._rows[start:stop]
        return self._rows.new_empty(stop - start, columns(self._problem, self._problem.student))

    def written(
        self, out: Tensor, rows_scale: Tensor | None, weight_scale: Tensor | None, start: int, stop: int
    ) -> Part:
        if self._problem.rows.index is not None:
            self._problem.rows.put(self._rows[:, : out.shape[1]], out, start, stop)
        return Part(out, rows_scale, weight_scale)

    def add(self, parts: list[Part], whole: Tensor | None, start: int, stop: int) -> None:
        """Logits have no products."""

    def result(self) -> Gradients:
        return Gradients(self._rows, None, None)


class LinearAccumulator:
    """A student that is a ``LinearHead``: dhidden = dlogits @ weight per chunk, dweight += dlogits.T @ hidden."""

    def __init__(self, problem: Problem, requires: RequiresGrad, buffers: Buffers) -> None:
        student = problem.student
        assert isinstance(student, LinearHead)
        self.unit_scale, self._dtype = at_unit_scale(problem), gemm.gradient_dtype(student.weight)
        self._problem, self._student, self._hidden = problem, student, buffers.reader(student)
        self._rows = self._weight = self._joint = self._bias = None  # joint: the weight's rows of the joint vocabulary
        if requires.rows:
            self._rows = _fresh_rows(problem)
        smallest, width = problem.options.grad_filter, columns(problem, student)
        self._columns = student.weight if width == student.weight.shape[0] else student.weight[:width]  # (width, H)
        # the rows' gradient is where its product can write: sums of float32, not rounded twice
        wide = accumulation_dtype(student.hidden) == student.hidden.dtype
        self._in_place = wide and problem.rows.index is None
        self._rows_of = None if self._rows is None or not self._in_place else buffers.slices(self._rows)
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}  # by id: logits, and their memory as that of a gradient
        self._made: tuple[Tensor, RowsProduct, WeightProduct | None] | None = None
        if requires.weight:
            # the first chunk overwrites the joint vocabulary's rows; the padding rows past it are only zeroed
            self._weight = memory.empty(student.weight.shape, accumulation_dtype(student.weight), problem.device)
            first_zero = width if problem.rows.count and not smallest else 0
            if first_zero < student.weight.shape[0]:
                self._weight[first_zero:].zero_()
            self._joint = self._weight if width == student.weight.shape[0] else self._weight[:width]
        if requires.bias:
            self._bias = student.weight.new_zeros(student.weight.shape[0], dtype=accumulation_dtype(student.weight))

    def buffer(self, row_problem: RowProblem, start: int, stop: int) -> Tensor:
        raw = row_problem.student.raw
        return raw if raw.dtype == self._dtype else self._gradient_in(raw)

    def _gradient_in(self, logits: Tensor) -> Tensor:
        """The memory of logits as that of their gradient; one object for each buffer."""
        if logits.dtype == self._dtype:
            return logits
        held = self._gradients.get(id(logits))
        if held is None:
            held = self._gradients[id(logits)] = logits, gradient_buffer(self._student, logits)
        return held[1]

    def _products(self, dlogits: Tensor) -> tuple[RowsProduct, WeightProduct | None]:
        """The two products with a chunk's logit gradient; those of the last chunk where it is the same memory."""
        made = self._made
        if made is None or made[0] is not dlogits:
            dtype = None if self._rows is None or not self._in_place else self._rows.dtype
            of_weight = None if self._joint is None else gemm.dweight_into(self._joint, dlogits.T)
            made = self._made = dlogits, gemm.dhidden_of(dlogits, self._columns, dtype), of_weight
        return made[1], made[2]

    def written(
        self, out: Tensor, rows_scale: Tensor | None, weight_scale: Tensor | None, start: int, stop: int
    ) -> Part:
        return Part(out, rows_scale, weight_scale)

    def add(self, parts: list[Part], whole: Tensor | None, start: int, stop: int) -> None:
        student, problem, weight = self._student, self._problem, self._columns
        dlogits = parts[0].dlogits if whole is None else self._gradient_in(whole)  # (C, V)
        rows_scale, weight_scale = parts[0].rows_scale, parts[0].weight_scale
        if len(parts) > 1:
            rows_scale = _concatenated([part.rows_scale for part in parts])
            weight_scale = _concatenated([part.weight_scale for part in parts])
        at_token, smallest, total, hidden = parts[0].at_token, problem.options.grad_filter, self._joint, None
        if total is not None:
            hidden = self._hidden((start, stop))  # (C, H)
            if weight_scale is not None:
                # on the hidden states, not on the logit gradient, which has to stay at unit scale
                scale = weight_scale if weight_scale.ndim == 0 else weight_scale[:, None]
                hidden = (hidden.to(scale.dtype) * scale).to(dlogits.dtype)
        selected = gemm.selected(dlogits, smallest) if smallest else None
        of_rows, of_weight = self._products(dlogits)
        rows: Tensor | None = None
        if selected is not None:
            rows = gemm.selected_products(dlogits, weight, selected, hidden, total, self._rows is not None)
        elif self._rows is not None:
            rows = of_rows(out=None if self._rows_of is None else self._rows_of((start, stop)))
        reduced = None
        if rows is not None and student.shard is not None and student.shard.reduce_hidden:
            reduced = student.shard.sum_(rows)  # all-reduce over the ranks, concurrent with the next product
        if selected is None and total is not None:
            assert hidden is not None
            assert of_weight is not None
            of_weight(hidden, start == 0 and not smallest)
            if at_token is not None:
                entry = at_token.entry if weight_scale is None else at_token.entry * weight_scale
                rows_at = entry[:, None] * self._hidden((start, stop))
                gemm.add_at_(total, at_token.token_ids, rows_at)
        if reduced is not None:
            reduced.wait()
        if self._rows is not None and rows is not None:
            if rows_scale is not None:
                rows.mul_(rows_scale if rows_scale.ndim == 0 else rows_scale[:, None])
            if at_token is not None:
                entry = at_token.entry if rows_scale is None else at_token.entry * rows_scale
                rows += entry[:, None] * weight[at_token.token_ids]
            if selected is not None or not self._in_place:
                problem.rows.put(self._rows, rows, start, stop)
        if self._bias is not None:
            scale = self._bias.new_ones(()) if weight_scale is None else weight_scale
            gemm.add_dbias_(self._bias[: len(weight)], dlogits, scale)
            if at_token is not None:
                gemm.add_at_(self._bias, at_token.token_ids, at_token.entry * scale)

    def result(self) -> Gradients:
        return Gradients(self._rows, self._weight, self._bias)

    def multiply_(self, factor: Tensor) -> None:
        """Multiply the weight's and the bias's gradient in place."""
        for total in (self._weight, self._bias):
            if total is not None:
                total.mul_(factor)


def write(
    accumulator: Accumulator,
    problem: Problem,
    row_problem: RowProblem,
    statistics: Tensor,  # (len(Stat), c)
    gradient: LogitGradient,  # of the c tokens
    rows_factor: Tensor | None,  # () or (c,) further factor of the rows' gradient
    weight_factor: Tensor | None,  # likewise of the weight's and the bias's
    start: int,
    stop: int,
) -> Part:
    """Write the logit gradient of a sub-chunk whose statistics are known."""
    out = accumulator.buffer(row_problem, start, stop)
    if not accumulator.unit_scale:
        gradient = gradient if rows_factor is None else gradient.scaled(rows_factor)
        write_logit_gradient(problem, row_problem, statistics, gradient, out)
        return accumulator.written(out, None, None, start, stop)
    size = write_logit_gradient(problem, row_problem, statistics, gradient, out, unit=True)
    return accumulator.written(out, product(size, rows_factor), product(size, weight_factor), start, stop)


def _fresh_rows(problem: Problem, zero: bool = False) -> Tensor:
    """Memory for the rows' gradient, zero-filled where the loop does not write: masked tokens, padding columns."""
    source = problem.student.rows
    out = memory.empty((problem.rows.shape.numel(), source.shape[-1]), source.dtype, source.device)
    return out.zero_() if zero or problem.rows.index is not None else out


def accumulator_for(problem: Problem, requires: RequiresGrad, buffers: Buffers) -> Accumulator:
    kind = LinearAccumulator if isinstance(problem.student, LinearHead) else LogitsAccumulator
    return kind(problem, requires, buffers)
