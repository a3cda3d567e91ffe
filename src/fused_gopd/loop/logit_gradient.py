"""Writing a logit gradient, a few numbers per token, over a chunk of logits [C, V]."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..heads import LinearHead
from ..objective.logit_gradient import LogitGradient
from ..problem import Problem
from ..rowops import GradientWeights, RowProblem, sparse
from . import gemm
from .vocab_parallel import local_ids


def gradient_buffer(head: LinearHead, logits: Tensor) -> Tensor:
    """The memory of a chunk's logits (C, V) as the buffer of their gradient, in the dtype of the gradient GEMMs."""
    dtype = gemm.gradient_dtype(head.weight)
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


def write_logit_gradient(
    problem: Problem,
    row_problem: RowProblem,
    statistics: Tensor,  # (len(Stat), C) of the row problem
    gradient: LogitGradient,  # of the C tokens
    out: Tensor,  # (C, V)
    unit: bool = False,
) -> Tensor | None:
    """Write a chunk's logit gradient into ``out``. With ``unit`` each row is divided by its size, which is returned.

    One token id per row is a term of the row operation itself. For more ids it writes the dense part, and the entries
    at the ids are overwritten.
    """
    size = None
    if unit:
        size = gradient.size
        if gradient.weight is not None and gradient.max_abs_elsewhere is not None:
            # a student whose p at these ids is nearly 1: values underflow, weight / size is inf, times p = 0 is NaN
            size = size.masked_fill(size < 4 * torch.finfo(size.dtype).tiny * gradient.weight.abs(), 0)
        gradient = gradient.divided(torch.where(size > 0, size, torch.ones_like(size)))
    if not row_problem.vocab_size:
        return size
    if gradient.terms:
        _write_with_terms(problem, row_problem, statistics, gradient, out)
        return size
    ids, values, logits = gradient.token_ids, gradient.values, None
    if ids is not None:
        ids = local_ids(problem.student.shard, ids)
        logits = None if values is None else sparse.logits_at(row_problem.student, ids)
        row_problem = replace(row_problem, token_ids=ids[:, 0].contiguous())
    problem.ops.gradient(row_problem, statistics, GradientWeights(gradient.divergence, gradient.weight), out)
    if ids is not None and values is not None and logits is not None:
        sparse.overwrite(out, row_problem.student.transform, ids, values, logits)
    return size


def _write_with_terms(
    problem: Problem, row_problem: RowProblem, statistics: Tensor, gradient: LogitGradient, out: Tensor
) -> None:
    """The sum of a row problem's gradient and those of the terms beside it, rounded to the dtype of ``out`` once."""
    assert row_problem.beside is not None
    problems, scratch = row_problem.beside
    total = scratch(0)
    for i, (own, term) in enumerate(zip(problems, gradient.terms, strict=True)):
        target = scratch(1) if i else total
        write_logit_gradient(problem, own, term.statistics, term.gradient, target)
        if i:
            total += target
    # the gradient proper is written last: it may take the place of the logits
    raw = row_problem.student.raw
    if out.dtype == total.dtype:
        target = out
    else:
        target = raw if isinstance(problem.student, LinearHead) and raw.dtype == total.dtype else scratch(1)
    write_logit_gradient(problem, row_problem, statistics, replace(gradient, terms=()), target)
    width = row_problem.vocab_size
    total += target[:, :width]
    out[:, :width].copy_(total)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two just above the largest magnitude in x, 1 where all is 0: exact to divide and multiply by."""
    largest = x.abs().amax() if x.numel() else x.new_ones(())
    exponent = torch.frexp(largest).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where((largest > 0) & torch.isfinite(largest), scale, torch.ones_like(scale))
