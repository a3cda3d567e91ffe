"""Training modes of models that score, and parameters that two models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..hooks import isinstance_if_imported
from ..shards import is_dtensor

# ---------------------------------------------------------------------------------------------------- training modes


@contextmanager
def evaluation(module: nn.Module, *, keep: tuple[nn.Module, ...] = ()) -> Iterator[None]:
    """Evaluation mode (no dropout) for a module and all its submodules except those in ``keep``.

    The attribute ``training`` of each module is set and restored by itself, also after an exception: modules that were
    in evaluation mode before (frozen ones) stay in it. ``train()`` and ``eval()`` are not called, since classes
    override them.
    """
    training = [m for m in module.modules() if m.training and not any(m is kept for kept in keep)]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout off in a forward with gradients, for losses that compare it with log-probs of an evaluation.

    The model itself stays in training mode, which trainers read, and so do modules that checkpoint activations, which
    transformers does in training mode only. The functions that they checkpoint run in evaluation mode, in the forward
    and when they are recomputed in the backward.
    """
    checkpointing: dict[Any, Callable[..., Any]] = {
        m: function
        for m in model.modules()
        if m.training
        and getattr(m, "gradient_checkpointing", False)
        and (function := getattr(m, "_gradient_checkpointing_func", None)) is not None
    }

    def run(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with evaluation(module):
            return forward(*args, **kwargs)

    def checkpoint(module: nn.Module, function: Callable[..., Any], forward: Any, *args: Any, **kwargs: Any) -> Any:
        return function(partial(run, module, forward), *args, **kwargs)

    for module, function in checkpointing.items():
        module._gradient_checkpointing_func = partial(checkpoint, module, function)
    try:
        with evaluation(model, keep=(model, *checkpointing)):
            yield
    finally:
        for module, function in checkpointing.items():
            module._gradient_checkpointing_func = function


# -------------------------------------------------------------------------------------------------- shared parameters

# modules that PEFT puts in place of layers
_ADAPTERS = (("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.utils.other", "AuxiliaryTrainingWrapper"))


def _is_adapter(module: nn.Module) -> bool:
    return any(isinstance_if_imported(module, library, name) for library, name in _ADAPTERS)


def _bytes(parameter: Tensor) -> tuple[int, int, int] | None:
    """(storage, first byte, end) of a parameter's memory; None for parameters without memory (meta, ZeRO-3)."""
    local: Any = parameter._local_tensor if is_dtensor(parameter) else parameter  # type: ignore[attr-defined]
    try:
        storage, start = local.untyped_storage().data_ptr(), local.data_ptr()
    except (RuntimeError, NotImplementedError):  # tensor subclasses without a storage
        return None
    if storage == 0 or local.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return storage, start, start + (last + 1) * local.element_size()


def shared_with(student: nn.Module, source: nn.Module) -> str | None:
    """Name of a trainable parameter or adapter layer of the student that another module shares; None if there is none.

    Parameters are compared by identity and by memory, modules by identity. Frozen parameters may be shared.
    """
    modules, parameters = set(source.modules()), list(source.parameters())
    for name, module in student.named_modules():
        if module in modules and _is_adapter(module):
            return f"the adapter layer {name}"
    identities = {id(p) for p in parameters}
    occupied: dict[int, list[tuple[int, int]]] = {}
    for place in map(_bytes, parameters):
        if place is not None:
            occupied.setdefault(place[0], []).append(place[1:])
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in identities:
            return f"the parameter {name}"
        place = _bytes(parameter)
        if place is not None and any(a < place[2] and place[1] < b for a, b in occupied.get(place[0], ())):
            return f"the memory of the parameter {name}"
    return None


def require_separate(name: str, source: nn.Module, student: nn.Module, instead: str = "") -> None:
    """Raise for a teacher or reference that would be trained with the student, because it shares parameters."""
    shared = "all of it" if source is student else shared_with(student, source)
    if shared is not None:
        raise ValueError(
            f"{name} is the student itself, which changes: pass a copy (copy.deepcopy), made before the student is "
            f"adapted or trained, or its path{instead}. What it shares with the student: {shared}"
        )
