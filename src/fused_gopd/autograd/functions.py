"""The eager autograd Functions: gradients with the loss, or recomputed in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..loop import run
from ..loop.accumulator import NO_GRADIENTS, RequiresGrad
from ..loop.estimators import estimator_of
from ..loop.estimators.base import TokenValues
from ..loop.run import Entries, MakeEstimator
from ..objective.layout import TokenRow
from ..problem import Problem
from . import core
from .saved import once_differentiable, save, saved


def _is_one(x: Tensor) -> bool:
    """Whether multiplying by x changes nothing, where that is known without a host sync."""
    return x.device.type == "cpu" and x.item() == 1.0


class _FusedLoss(torch.autograd.Function):
    """sum_i w_i loss_i with the gradients computed in the forward, each GEMM once.

    The backward returns the forward's buffers, multiplied in place by the upstream gradient: no second copy of them
    ever exists. A second backward (``retain_graph``) computes them anew, to the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor, tuple[TokenValues, Tensor]]:
        requires = RequiresGrad(*(ctx.needs_input_grad[:3]))
        loss, values, statistics, gradients, scaling = core.fused_forward(problem, requires)
        ctx.scaling, ctx.requires, ctx.gradients = scaling, requires, gradients
        ctx.meta, ctx.ops = core.meta_of((rows, weight, bias)), problem.ops
        known = {}  # the caller's functions are called once: a second backward uses these
        if problem.advantage_fn is not None:
            known["advantages"] = statistics[TokenRow.ADVANTAGE : TokenRow.REPORTED_ADVANTAGE + 1].clone()
        if problem.reward_scale_fn is not None:
            known["reward_scale"] = statistics[TokenRow.REWARD_SCALE].clone()
        save(ctx, problem, **known)
        ctx.set_materialize_grads(False)
        return loss, (values, statistics)  # autograd takes no part in what a tuple holds

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 4
        scaling = ctx.scaling
        gradients: Sequence[Tensor | None] | None = ctx.gradients
        ctx.gradients = None
        if gradients is None:
            estimator = run.estimator_for(saved(ctx)[0], estimator_of)
            gradients = run.forward_with_gradients(estimator, ctx.requires, scaling.in_loop)[1]
        assert gradients is not None
        plain, scaled = _is_one(upstream), []
        deferred = (scaling.deferred_rows, scaling.deferred_weight, scaling.deferred_weight)
        for gradient, factor, source in zip(gradients, deferred, ctx.meta, strict=True):
            total = upstream if factor is None else upstream * factor
            if gradient is not None and not (plain if factor is None else _is_one(total)):
                # in place, unless a copy is needed for the dtype: another [V, H] would be as large as all else
                gradient = ctx.ops.scale_(gradient, total, source[1])
            scaled.append(gradient)
        return (*core.in_shape_of(scaled, ctx.meta), None)


class _Recomputing(torch.autograd.Function):
    """The outputs of an estimator per token, for any upstream gradients; the backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, problem: Problem, make: MakeEstimator
    ) -> tuple[Any, ...]:
        ctx.requires = RequiresGrad(*(ctx.needs_input_grad[:3]))
        ctx.meta, ctx.make = core.meta_of((rows, weight, bias)), make
        outputs, values, statistics, entries = core.forward(problem, make, ctx.requires)
        # advantages, and lambda of a function, are in the statistics
        save(ctx, problem, statistics, *(entries or (None, None)))
        ctx.set_materialize_grads(False)
        if values is not None:
            values = values._replace(loss=values.loss.detach())  # autograd gives the output itself a graph
        return ((values, statistics), *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        of_outputs = upstream[1:]
        if all(x is None for x in of_outputs):
            return (None,) * 5
        problem, (statistics, ids, values) = saved(ctx)
        assert statistics is not None
        entries = None if ids is None or values is None else Entries(ids, values)
        estimator = run.estimator_for(problem, ctx.make)
        gradients = run.backward(estimator, ctx.requires, statistics, entries, *of_outputs)
        return (*core.in_shape_of(gradients, ctx.meta), None, None)


def _any_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether anything is to be differentiated: a Function would take its time in vain."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fused_loss(problem: Problem) -> tuple[Tensor, TokenValues, Tensor]:
    """The loss (), values and statistics."""
    tensors = core.student_tensors(problem.student)
    if not _any_gradient(tensors):
        with torch.no_grad():
            made = core.fused_forward(problem, NO_GRADIENTS)
            return made.loss, made.values, made.statistics
    apply: Any = _FusedLoss.apply
    loss, (values, statistics) = apply(*tensors, problem)
    return loss, values, statistics


def recomputing(problem: Problem, make: MakeEstimator) -> tuple[tuple[Tensor, ...], TokenValues | None, Tensor]:
    """Differentiable outputs (n,) of an estimator, values and statistics."""
    tensors = core.student_tensors(problem.student)
    if not _any_gradient(tensors):
        with torch.no_grad():
            outputs, values, statistics, _ = core.forward(problem, make, NO_GRADIENTS)
            return outputs, values, statistics
    apply: Any = _Recomputing.apply
    (values, statistics), *outputs = apply(*tensors, problem, make)
    return tuple(outputs), values, statistics
