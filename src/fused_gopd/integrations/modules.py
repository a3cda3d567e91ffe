"""torch modules that score: their training mode, and the parameters that two of them share."""

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
    """Evaluation mode (no dropout) for a module and all modules inside it, but for those in ``keep``.

    ``training`` is set on each module by itself and put back by itself, after an exception too: modules that were in
    evaluation mode before (frozen ones) stay in it. ``train()`` and ``eval()``, which classes override, are not called.
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
    """A forward with gradients whose dropout is off, for losses that compare it with log-probs of an evaluation.

    The model itself stays in training mode, which trainers read, and so do the modules that checkpoint activations
    (transformers: only in training mode). What these run, and run again in the backward, is in evaluation mode.
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

# what PEFT puts into a model in the place of a layer
_ADAPTERS = (("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.utils.other", "AuxiliaryTrainingWrapper"))


def _is_adapter(module: nn.Module) -> bool:
    return any(isinstance_if_imported(module, library, name) for library, name in _ADAPTERS)


def _bytes(parameter: Tensor) -> tuple[int, int, int] | None:
    """The storage of a parameter, and where in memory it begins and ends; None where it has none (meta, ZeRO-3)."""
    local: Any = parameter._local_tensor if is_dtensor(parameter) else parameter  # type: ignore[attr-defined]
    try:
        storage, start = local.untyped_storage().data_ptr(), local.data_ptr()
    except (RuntimeError, NotImplementedError):  # tensor subclasses without a storage of their own
        return None
    if storage == 0 or local.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return storage, start, start + (last + 1) * local.element_size()


def shared_with(student: nn.Module, source: nn.Module) -> str | None:
    """The first of the student's trainable parameters or adapter layers that another module has too; None if none.

    Parameters are compared by identity and by the memory that they occupy, modules by identity. Frozen parameters
    may be shared.
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
    """Raise for a model that scores and changes with the student, whatever object it is."""
    shared = "all of it" if source is student else shared_with(student, source)
    if shared is not None:
        raise ValueError(
            f"{name} is the student itself, which changes: pass a copy (copy.deepcopy), made before the student is "
            f"adapted or trained, or its path{instead}. What it shares with the student: {shared}"
        )
