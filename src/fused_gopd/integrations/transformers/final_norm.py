"""The final norm of a model: what is between its last layer and its head, if a norm is all that there is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .causal import HeadLocation, find_head, lock, unpatched
from .transform import SkippedModule, accepts

# what a layer returns, by family: hidden states, or a tuple that begins with them
_RETURNED: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x,
    lambda x: (x,),
    lambda x: (x, None),
    lambda x: (x, None, None),
)


@dataclass(frozen=True)
class _Candidate:
    """A norm beside a list of layers."""

    path: tuple[nn.Module, ...]  # from the model to the module that has both
    name: str  # of the norm there
    norm: nn.Module
    layers: nn.ModuleList


def _candidates(model: nn.Module, head: nn.Module) -> Iterator[_Candidate]:
    for prefix, parent in model.named_modules():
        path: list[nn.Module] = [model]
        for part in prefix.split(".") if prefix else ():
            path.append(path[-1]._modules[part])  # type: ignore[arg-type]
        for layers in parent.children():
            if isinstance(layers, nn.ModuleList) and len(layers):
                for name, norm in reversed(list(parent.named_children())):
                    if "norm" in type(norm).__name__.lower() and norm is not head:
                        yield _Candidate(tuple(path), name, norm, layers)


class _HeadReached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Head(nn.Module):
    """Replaces the head: ends the forward."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["head"] = head

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)

    def forward(self, hidden: Tensor) -> Any:
        raise _HeadReached(hidden)


@dataclass
class _Calls:
    """What the skipped modules returned, and the norm was given and returned."""

    hidden_size: int
    layers: nn.ModuleList
    returned: Callable[[Tensor], Any]
    of_modules: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    of_norm: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Numbered(SkippedModule):
    """A module that does not run: each call returns numbers of its own. It has no meta tensors, and no parameters."""

    def __init__(self, module: nn.Module, recorder: Any, hidden: Any = None) -> None:
        super().__init__(module, recorder, hidden)

    def _skipped(self, x: Any) -> Any:
        return torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) and x.is_meta else super()._skipped(x)

    def named_modules(self, *_: Any, **__: Any) -> Any:  # model.device is that of the first parameter
        return iter(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, calls = self.__dict__["module"], self.__dict__["recorder"]
        size = getattr(module, "embedding_dim", getattr(module, "out_features", None))
        given = (x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        made = torch.randn(next(given, (1, 1, calls.hidden_size)) if size is None else (1, 1, size))
        calls.of_modules.append((module, made))
        return calls.returned(made) if any(module is x for x in calls.layers) else made


def _is_final(location: HeadLocation, candidate: _Candidate, returned: Callable[[Tensor], Any]) -> bool:
    """Whether the input of the head is the norm of what the last layer returns: the model's code runs, without any
    module but those on the way to the norm and the head, and random numbers are their outputs."""
    norm = copy.deepcopy(candidate.norm).to_empty(device="cpu").float()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    size = next((p.shape[-1] for p in norm.parameters()), location.model.config.get_text_config().hidden_size)
    calls = _Calls(size, candidate.layers, returned)
    norm.register_forward_hook(lambda _, given, made: calls.of_norm.append((given[0], made)))
    model = location.model
    kept = (*location.path, *candidate.path)
    replaced: list[tuple[dict[str, Any], str, Any]] = []

    def replace(members: dict[str, Any], name: str, value: Any) -> None:
        replaced.append((members, name, members[name]))
        members[name] = value

    try:
        for module in dict.fromkeys(kept):
            for name, child in list(module._modules.items()):
                if child is location.head:
                    replace(module._modules, name, _Head(child))
                elif child is candidate.norm:
                    replace(module._modules, name, norm)
                elif child is not None and all(child is not x for x in kept):
                    replace(module._modules, name, _Numbered(child, calls))
            for tensors in (module._parameters, module._buffers):
                for name, tensor in list(tensors.items()):  # a factor on the states is seen, as no factor is 1
                    if tensor is not None and tensor.is_meta:
                        found = torch.zeros_like(tensor, device="cpu")
                        replace(tensors, name, found.uniform_() if tensor.is_floating_point() else found)
        inputs = {"use_cache": False} if accepts(type(model).forward, "use_cache") else {}
        with torch.no_grad(), unpatched(), torch.random.fork_rng(devices=[]):
            model.forward(input_ids=torch.zeros(1, 1, dtype=torch.int64), **inputs)
        return False
    except _HeadReached as reached:
        hidden = reached.hidden
    finally:
        for members, name, value in replaced:
            members[name] = value
    if not calls.of_norm:
        return False
    given, made = calls.of_norm[-1]
    of_layer = [x for module, x in calls.of_modules if module is candidate.layers[-1]]
    return torch.equal(hidden.reshape(-1), made.reshape(-1)) and any(
        torch.equal(given.reshape(-1), x.reshape(-1)) for x in of_layer
    )


def find_final_norm(model: Any) -> nn.Module:
    """The module that makes the head's input of the last layer's output; the model may be without weights.

    Raises:
        TypeError: there is no such module: more, or other things, are done in between.
    """
    location = find_head(model)
    with lock(location.model):
        for candidate in _candidates(location.model, location.head):
            for returned in _RETURNED:
                try:
                    if _is_final(location, candidate, returned):
                        return candidate.norm
                except Exception:  # another tuple, or code that does not run without the modules that were left out
                    continue
    raise TypeError(
        f"hidden states from before the final norm are not known here for {type(location.model).__name__} (model_type "
        f"{location.model.config.model_type!r}): between its last layer and its head is no norm, or more than one. "
        "Take the hidden states that its head is given, without norm=True"
    )
