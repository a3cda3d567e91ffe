"""Forward and backward as pure functions, without autograd.

The eager Functions, the one under :mod:`torch.func` and the custom ops of :mod:`fused_gopd.compiled` bind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import LinearHead, Logits
from ..loop import run
from ..loop.accumulator import Gradients, RequiresGrad, Scaling
from ..loop.estimators import estimator_of
from ..loop.estimators.base import TokenValues
from ..loop.run import Entries, MakeEstimator
from ..problem import Problem

Meta = tuple[torch.Size, torch.dtype]


def student_tensors(student: LinearHead | Logits) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tensors that gradients flow to: hidden states, weight and bias, or logits."""
    if isinstance(student, LinearHead):
        return student.hidden, student.weight, student.bias
    return student.logits, None, None


def meta_of(tensors: Sequence[Tensor | None]) -> list[Meta | None]:
    """Shapes and dtypes."""
    return [None if t is None else (t.shape, t.dtype) for t in tensors]


def in_shape_of(gradients: Sequence[Tensor | None], sources: Sequence[Meta | None]) -> tuple[Tensor | None, ...]:
    """The loop's gradients in the shapes and dtypes of the student's tensors."""
    out: list[Tensor | None] = []
    for gradient, source in zip(gradients, sources, strict=True):
        if gradient is not None:
            assert source is not None
            shape, dtype = source
            gradient = gradient if gradient.shape == shape else gradient.reshape(shape)
            gradient = gradient if gradient.dtype == dtype else gradient.to(dtype)
        out.append(gradient)
    return tuple(out)


class Forward(NamedTuple):
    """Vectors (n,) of the live tokens, and what a backward that recomputes the logits needs."""

    outputs: tuple[Tensor, ...]  # the differentiable ones: token losses, or log-probs and entropies
    values: TokenValues | None  # of a loss
    statistics: Tensor  # (STATISTICS, n)
    entries: Entries | None


def forward(problem: Problem, make: MakeEstimator, requires: RequiresGrad) -> Forward:
    """The outputs of an estimator. :func:`fused_gopd.loop.run.backward` recomputes the logits."""
    estimator = run.estimator_for(problem, make)
    statistics, entries = run.forward(estimator, requires)
    return Forward(*estimator.outputs(statistics), statistics, entries)


class FusedForward(NamedTuple):
    """A loss whose gradients are computed with it."""

    loss: Tensor  # ()
    values: TokenValues
    statistics: Tensor
    gradients: Gradients | None  # None where nothing requires one
    scaling: Scaling  # what of the token weights the backward has to multiply by


def fused_forward(problem: Problem, requires: RequiresGrad) -> FusedForward:
    """sum_i weights_i loss_i and its gradients, each GEMM once."""
    scaling, gradients, estimator = Scaling.of(problem), None, run.estimator_for(problem, estimator_of)
    if any(requires):
        statistics, gradients = run.forward_with_gradients(estimator, requires, scaling.in_loop)
    else:
        statistics, _ = run.forward(estimator)
    values = estimator.values(statistics)
    loss = (values.loss * problem.weights).sum()
    return FusedForward(loss=loss, values=values, statistics=statistics, gradients=gradients, scaling=scaling)
