"""What autograd keeps of a call: a Problem flattened into tensors, and a backward that refuses a second derivative."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..agreement import Agreement
from ..heads import LinearHead, Logits
from ..objective.divergences import Divergence
from ..problem import FlatComposite, Problem, Route
from ..tokens import Sequences, TokenRows

_RECORDS = (Problem, Route, FlatComposite, TokenRows, Sequences, LinearHead, Logits)
_FLATTENED = (*_RECORDS, Agreement, Divergence)
_FORWARD_ONLY: dict[str, Any] = {
    "agreement": None,
    "mask": None,
    "cancelled": (),
    "advantage_fn": None,
    "reward_scale_fn": None,
    "advantages": None,
    "reported": (),
}


class TensorSlot(int):
    """The place of a tensor in the list of flattened tensors."""


@dataclasses.dataclass(slots=True)
class Spec:
    """A flattened object: its type, and its fields with slots in place of tensors."""

    kind: Any
    fields: dict[str, Any]


@functools.cache
def _tensor_fields(kind: Any) -> tuple[str, ...]:
    """The fields of a flattened type that may hold tensors, by their annotations; none of other types."""
    if not issubclass(kind, _FLATTENED):
        return ()
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):
        # of a divergence from outside: names imported for type checkers alone; KW_ONLY, no type to Python 3.10
        return tuple(_field_names(kind))
    return tuple(name for name in _field_names(kind) if _names_tensors(hints[name]))


@functools.cache
def _field_names(kind: Any) -> dict[str, None]:
    return dict.fromkeys(Agreement._fields if kind is Agreement else [f.name for f in dataclasses.fields(kind)])


def _names_tensors(hint: Any) -> bool:
    return hint is Tensor or hint in _FLATTENED or any(map(_names_tensors, typing.get_args(hint)))


def flatten(x: Any, tensors: list[Tensor], instead: dict[str, Any] | None = None) -> Any:
    """Replace the tensors of a Problem, or of a part of one, by slots and append them to the list.

    save_for_backward takes tensors only. A part without tensors stays what it is. ``instead``: other values of fields.
    """
    if isinstance(x, Tensor):
        tensors.append(x)
        return TensorSlot(len(tensors) - 1)
    kind: Any = type(x)
    if kind is tuple:
        return tuple([flatten(y, tensors) for y in x])
    names = _tensor_fields(kind)
    if not names:
        return x
    if kind in _RECORDS:
        fields = vars(x) if instead is None else vars(x) | instead
    else:  # a divergence may have cached properties, or slots
        fields = {name: getattr(x, name) for name in _field_names(kind)}
    flat: dict[str, Any] = {}
    for name in names:
        part = fields[name]
        if part is None:
            continue
        if isinstance(part, Tensor):
            tensors.append(part)
            flat[name] = TensorSlot(len(tensors) - 1)
        elif (made := flatten(part, tensors)) is not part:
            flat[name] = made
    return Spec(kind, fields | flat) if flat else x


def flatten_for_backward(problem: Problem, tensors: list[Tensor], known: dict[str, Tensor]) -> Spec:
    """:func:`flatten` of a problem without what only a forward needs. Ranks have agreed on the call.

    Args:
        known: fields that the forward has computed: what functions of the caller's have returned, so that a second
            backward does not call them again.
    """
    return cast("Spec", flatten(problem, tensors, _FORWARD_ONLY | known))


def without_forward(spec: Spec) -> Spec:
    """The spec of a whole problem without what only a forward needs."""
    return Spec(spec.kind, spec.fields | _FORWARD_ONLY)


def unflatten(x: Any, tensors: Sequence[Tensor | None]) -> Any:
    """The object that :func:`flatten` was given."""
    if isinstance(x, TensorSlot):
        return tensors[x]
    if isinstance(x, Spec):
        flat = (Spec, TensorSlot, tuple)
        return x.kind(**{k: unflatten(y, tensors) if type(y) in flat else y for k, y in x.fields.items()})
    return tuple(unflatten(y, tensors) for y in x) if type(x) is tuple else x


def save(ctx: Any, problem: Problem, *more: Tensor | None, **known: Tensor) -> None:
    """Keep a problem and other tensors for the backward, if there will be one; see :func:`flatten_for_backward`.

    Tensors made in inference mode (a teacher's) cannot be saved and are kept as attributes.
    """
    if not any(ctx.needs_input_grad):
        return
    own: list[Tensor] = []
    ctx.spec, ctx.more = flatten_for_backward(problem, own, known), len(more)
    tensors = [*own, *more]
    ctx.untracked = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    for i in ctx.untracked:
        tensors[i] = None
    ctx.save_for_backward(*tensors)


def _unpacked(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, read once per backward: checkpointing recomputes for them and refuses a second time."""
    if ctx.unpacked is None:
        ctx.unpacked = ctx.saved_tensors
    return cast("tuple[Any, ...]", ctx.unpacked)


def saved(ctx: Any) -> tuple[Problem, list[Tensor | None]]:
    """The problem and the other tensors of :func:`save`."""
    tensors = list(_unpacked(ctx))
    for i, t in ctx.untracked.items():
        tensors[i] = t
    own = len(tensors) - ctx.more
    return unflatten(ctx.spec, tensors[:own]), tensors[own:]


class RaiseOnDoubleBackward(torch.autograd.Function):
    """Identity whose backward raises, so that a double backward is an error instead of a silent zero."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradients of gopd_loss and token_logprobs cannot be differentiated twice: they are computed with the "
            "loss and have no graph. Second derivatives: fused_gopd.reference.gopd_loss, which is plain PyTorch"
        )


Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """A backward without a graph of its own.

    PyTorch's decorator of that name raises only where the upstream gradient requires a gradient. A second derivative
    with respect to the inputs would be taken for zero.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.unpacked = None
        try:
            if not torch.is_grad_enabled():  # as it is but for create_graph=True
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            sources = [t for t in (*upstream, *_unpacked(ctx)) if t is not None and t.requires_grad]
        finally:
            ctx.unpacked = None
        with_graph: Any = RaiseOnDoubleBackward.apply
        return tuple(None if g is None else with_graph(g, *sources) for g in gradients)

    return wrapped
