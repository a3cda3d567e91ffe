"""The Function under the transforms of :mod:`torch.func`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import private
from ..loop import run
from ..loop.accumulator import RequiresGrad
from ..loop.estimators.base import TokenValues
from ..loop.run import Entries, MakeEstimator
from ..problem import Problem
from . import core
from .saved import RaiseOnDoubleBackward, Spec, flatten, unflatten, without_forward


def active() -> bool:
    """Whether torch.func.grad or vjp is at work: :func:`fused_gopd.checks.require_reverse_mode` refuses the others."""
    return bool(private.transforms_active())


class _Transformed(torch.autograd.Function):
    """The outputs of an estimator per token; the backward recomputes the logits.

    Transforms see the arguments of a Function only, so every tensor of the problem is one; and what a backward reads
    has to be an output. Eager code does not use it: it would keep more tensors alive.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(spec: Spec, requires: RequiresGrad, make: MakeEstimator, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, values, statistics, entries = core.forward(unflatten(spec, tensors), make, requires)
        empty = statistics.new_empty(0)
        policy, loss_factors = (None, None) if values is None else values[1:]
        reported = (empty if x is None else x for x in (policy, loss_factors))
        return (*reported, statistics, *(entries or (empty, empty)), *outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.requires, ctx.make, *tensors = inputs
        ctx.mark_non_differentiable(*output[:5])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[2:5])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        tensors, of_outputs = ctx.saved_tensors, upstream[5:]
        out: list[Tensor | None] = [None] * len(tensors)  # 3 arguments come before the tensors
        if all(x is None for x in of_outputs):
            return tuple(out)
        for x in of_outputs:
            if x is not None and private.is_batched(x):
                raise NotImplementedError(
                    "gopd_loss and token_logprobs take one upstream gradient at a time, not a batch of them "
                    "(torch.func.vmap over a vjp): torch.func.jacrev(..., chunk_size=1) goes through them one by one"
                )
        apply: Any = _TransformedBackward.apply
        gradients = iter(apply(ctx.spec, ctx.requires, ctx.make, len(of_outputs), *of_outputs, *tensors))
        student = ctx.spec.fields["student"].fields
        slots = [student[name] for name in (("logits",) if "logits" in student else ("hidden", "weight", "bias"))]
        for slot, required in zip(slots, ctx.requires, strict=False):
            if required:
                out[3 + slot] = next(gradients)
        return tuple(out)


class _TransformedBackward(torch.autograd.Function):
    """The gradients of :class:`_Transformed`, in a Function of their own because functorch unwraps tensors there."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        spec: Spec, requires: RequiresGrad, make: MakeEstimator, outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        upstream, own, (statistics, ids, values) = tensors[:outputs], tensors[outputs:-3], tensors[-3:]
        # advantages, and lambda of a function, are in the statistics
        problem: Problem = unflatten(without_forward(spec), own)
        entries = Entries(ids, values) if ids.ndim == 2 else None
        gradients = run.backward(run.estimator_for(problem, make), requires, statistics, entries, *upstream)
        meta = core.meta_of(core.student_tensors(problem.student))
        return tuple(g for g in core.in_shape_of(gradients, meta) if g is not None)

    setup_context = RaiseOnDoubleBackward.setup_context
    backward = RaiseOnDoubleBackward.backward


def transformed(problem: Problem, make: MakeEstimator) -> tuple[tuple[Tensor, ...], TokenValues | None, Tensor]:
    """Differentiable outputs (n,) of an estimator, values and statistics."""
    tensors: list[Tensor] = []
    spec = flatten(dataclasses.replace(problem, mask=None, cancelled=()), tensors)
    requires = RequiresGrad(*(t is not None and t.requires_grad for t in core.student_tensors(problem.student)))
    apply: Any = _Transformed.apply
    policy, loss_factors, statistics, _, _, *outputs = apply(spec, requires, make, *tensors)
    values = TokenValues(outputs[0].detach(), *(x if x.ndim == 2 else None for x in (policy, loss_factors)))
    return tuple(outputs), values, statistics
