"""What a model's code does to the outputs of its head, measured with known numbers in place of logits."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modules import evaluation
from .causal import HeadLocation, find_head, lock, unpatched


@dataclass(frozen=True)
class HeadTransform:
    """The first ``rows`` outputs z of a head become softcap tanh(logit_scale z / softcap)."""

    rows: int
    logit_scale: float
    softcap: float | None

    def apply(self, z: Tensor) -> Tensor:
        """Transform outputs (..., rows) of the head."""
        z = z * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


# ----------------------------------------------------------------------------------------------------------- measuring

# The first three numbers. Without a softcap the image of 1 is the factor. With one, the image of a number so small that
# tanh is linear within float64 rounding gives the factor, and that of a number so large that tanh is 1 the softcap.
_ONE, _LARGE, _SMALL = 1.0, 2.0**30, 2.0**-30
# dtype of the returned numbers -> relative tolerance of the comparison, and the decimal digits to which a factor is
# rounded: those that survive the rounding of a product and a quotient in that dtype
_PRECISION = {torch.float64: (1e-9, 14), torch.float32: (1e-5, 7)}


@functools.lru_cache(maxsize=4)
def _numbers(rows: int) -> Tensor:
    """(rows,) distinct nonzero numbers of both signs; float64 on the CPU, so that reading them needs no host sync."""
    z = torch.linspace(0.1, 100.0, rows, dtype=torch.float64, device="cpu")
    z[1::2].neg_()
    z[:3] = torch.tensor((_ONE, _LARGE, _SMALL), dtype=torch.float64, device="cpu")[:rows]
    return z


def _fit(z: Tensor, found: Tensor, known: HeadTransform | None) -> HeadTransform | None:
    """The transform that maps z (rows,) to ``found``; None if there is none.

    Every entry is compared. With ``known``, for which that was done before, about 4096 entries suffice.
    """
    rows = found.shape[-1]
    if found.numel() != rows or not 3 <= rows <= len(z) or found.dtype not in _PRECISION:
        return None
    tolerance, digits = _PRECISION[found.dtype]
    exact = found.dtype == torch.float64
    found, z = found.detach().reshape(-1).cpu(), z[:rows]
    some = slice(None, None, 1 + rows // 4096)
    if known is not None and known.rows == rows:
        expected = known.apply(z[some].double())
        if torch.allclose(expected, found[some].double(), rtol=tolerance, atol=0.0):
            return known
    found, z = found.double(), z.double()
    one, large, small = found[:3].tolist()

    def rounded(value: float) -> float:
        return float(f"{value:.{digits}g}")

    factor = HeadTransform(rows, one if exact else rounded(one), None)
    capped = HeadTransform(rows, rounded(small / _SMALL), large if exact else rounded(large))
    for transform in (factor, capped):
        positive = transform.logit_scale > 0 and (transform.softcap is None or transform.softcap > 0)
        if positive and torch.allclose(transform.apply(z), found, rtol=tolerance, atol=0.0):
            return transform
    return None


class UnknownTransformError(RuntimeError):
    """A model's code changes the outputs of its head in a way that a LinearHead cannot."""


def logits_of(output: Any) -> Tensor:
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


class HiddenStateRecorder(nn.Module):
    """Replaces a head: records the hidden states that it is called with, and returns ``numbers`` as logits."""

    def __init__(self, head: nn.Module, numbers: Tensor) -> None:
        super().__init__()
        self.__dict__.update(head=head, thread=threading.get_ident(), numbers=numbers, hidden=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)  # some families read the dtype of its weight

    def forward(self, hidden: Tensor) -> Any:
        if threading.get_ident() != self.thread:
            return self.head(hidden)
        if hidden.ndim != 3 or self.hidden is not None:
            what = "is called twice" if self.hidden is not None else f"is given hidden states {tuple(hidden.shape)}"
            raise TypeError(f"model's head must be called once, with hidden states (B, T, H), but it {what}")
        if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))  # as the head's own product would cast it
        self.__dict__["hidden"] = hidden
        return self.numbers[None, None]


# model -> (the code and numbers that determine the transform, the transform as last measured)
_MEASURED: WeakKeyDictionary[nn.Module, tuple[Any, HeadTransform]] = WeakKeyDictionary()


# model -> transform of a forward that another library has replaced since; wrappers (FSDP2's hooks) do not change it
_REMEMBERED: WeakKeyDictionary[nn.Module, HeadTransform] = WeakKeyDictionary()


def _state(location: HeadLocation) -> Any:
    """What determines the transform: code and hooks of the modules on the path to the head, and numbers in their
    attributes and in the config."""
    objects = (location.model.config.get_text_config(), *location.path)
    numbers = tuple((name, value) for x in objects for name, value in vars(x).items() if type(value) in (int, float))
    code = tuple((type(m).forward, vars(m).get("forward"), tuple(m._forward_hooks)) for m in location.path)
    return code, numbers


def _known(location: HeadLocation) -> HeadTransform | None:
    state, transform = _MEASURED.get(location.model, (None, None))
    return transform if state == _state(location) else None


def _record(location: HeadLocation, forward: Callable[[], Any], body: bool) -> tuple[Any, Tensor, HeadTransform]:
    """Run a forward with numbers in place of logits.

    Args:
        location: the place of the head; the caller holds the model's lock.
        forward: calls the forward of the model, or of a wrapper.
        body: whether the modules before the head run; False replaces them, and gives the head zeros.

    Returns:
        The output, the input of the head, and the transform of the numbers.
    """
    known = _known(location)
    numbers = _numbers(location.vocab_size)
    if known is not None:  # float32 is enough to confirm a known transform, and faster
        numbers = numbers.float()
    recorder = HiddenStateRecorder(location.head, numbers.clone())  # the code may change them in place
    replaced = [(location.caller, location.name, location.head)]
    location.caller._modules[location.name] = recorder
    try:
        if not body:
            hidden = _zeros(location)
            for module in location.path:
                for name, child in list(module._modules.items()):
                    if child is not None and child is not recorder and all(child is not x for x in location.path):
                        replaced.append((module, name, child))
                        module._modules[name] = SkippedModule(child, recorder, hidden)  # type: ignore[assignment]
        with unpatched():
            output = forward()
    finally:
        for module, name, child in replaced:
            module._modules[name] = child
    name = type(location.caller).__name__
    if recorder.hidden is None:
        raise TypeError(f"the forward of {name} does not call its head: no hidden states can be taken from there")
    logits = logits_of(output)
    # a gradient here is that of a trained factor, and a LinearHead's factor is a constant
    transform = None if logits.requires_grad else _fit(numbers, logits, known)
    if transform is None:
        raise UnknownTransformError(
            f"{name} makes other logits of the outputs of its head than a fused_gopd.LinearHead can (factor and "
            "softcap, neither of them trained, last rows left out): compute the logits, fused_gopd.Logits(logits), or "
            "make the head yourself, fused_gopd.LinearHead(hidden, weight, logit_scale=..., softcap=...)"
        )
    _MEASURED[location.model] = _state(location), transform
    return output, recorder.hidden, transform


def without_head(base: PreTrainedModel, forward: Callable[[], Any]) -> tuple[Any, Tensor]:
    """Run a forward with numbers in place of logits. Returns its output and the input of the head.

    Without gradients the model is in evaluation mode: old log-probs, teachers and references have no dropout.
    """
    with lock(base), nullcontext() if torch.is_grad_enabled() else evaluation(base):
        output, hidden, _ = _record(find_head(base), forward, body=True)
    return output, hidden


# ------------------------------------------------------------------------------------------------- without the body


class _BodyOutput:
    """The output of a skipped body: hidden states; every other attribute is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return (self.last_hidden_state,)[index]
        return self.last_hidden_state if index in (0, "last_hidden_state") else None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.last_hidden_state,))

    def __len__(self) -> int:
        return 1


class SkippedModule:
    """Replaces a module that is not on the path to the head: it does not run before the head, and runs after it.

    Attributes are those of the module: parameters, dtype, config, methods. A skipped body returns hidden states, a
    skipped layer its first floating point argument.
    """

    def __init__(self, module: nn.Module, recorder: HiddenStateRecorder, hidden: Tensor) -> None:
        self.__dict__.update(module=module, recorder=recorder, hidden=hidden)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that isinstance is true
        return type(self.__dict__["module"])

    def _skipped(self, x: Any) -> Any:
        if isinstance(x, nn.Module):
            return type(self)(x, self.__dict__["recorder"], self.__dict__["hidden"])
        return x

    def __getattr__(self, name: str) -> Any:
        return self._skipped(getattr(self.__dict__["module"], name))

    def __iter__(self) -> Iterator[Any]:
        return map(self._skipped, self.__dict__["module"])

    def __getitem__(self, index: Any) -> Any:
        return self._skipped(self.__dict__["module"][index])

    def __len__(self) -> int:
        return len(self.__dict__["module"])

    def __bool__(self) -> bool:
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, recorder, hidden = (self.__dict__[name] for name in ("module", "recorder", "hidden"))
        if recorder.hidden is not None or threading.get_ident() != recorder.thread:
            return module(*args, **kwargs)
        if isinstance(module, PreTrainedModel):
            return _BodyOutput(hidden)
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        return next(given, hidden)


def _zeros(location: HeadLocation) -> Tensor:
    """(1, 1, H) zeros with the dtype and device of the head's weight."""
    head = location.head
    weight = next((p for p in head.parameters() if p.is_floating_point()), torch.zeros(()))
    size = getattr(head, "in_features", None)
    if size is None:
        size = location.model.config.get_text_config().hidden_size
    return torch.zeros(1, 1, size, dtype=weight.dtype, device=weight.device)


def accepts(function: Any, name: str) -> bool:
    """Whether a function takes a keyword argument of this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def measure(location: HeadLocation, forward: Callable[..., Any] | None = None) -> HeadTransform:
    """Measure what the model's code does to the outputs of its head, on one token and without the body.

    Args:
        location: the place of the head; the caller holds the model's lock.
        forward: the code to measure; default the model's forward.

    Raises:
        RuntimeError: a LinearHead cannot do the same, or the code does not run without the body.
    """
    model = location.model
    forward = model.forward if forward is None else forward
    inputs = {"use_cache": False} if accepts(type(model).forward, "use_cache") else {}
    token = torch.zeros(1, 1, dtype=torch.int64, device=_zeros(location).device)
    try:
        return _record(location, lambda: forward(input_ids=token, **inputs), body=False)[2]
    except UnknownTransformError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"what {type(model).__name__} does to the outputs of its head (a factor, a softcap) could not be measured: "
            f"its forward does not run without the body ({type(error).__name__}: {error}). Call last_hidden_state("
            "model, input_ids) once before, which measures it with the body, or make the head yourself, "
            "fused_gopd.LinearHead(hidden, weight, logit_scale=..., softcap=...)"
        ) from error


def transform_of(location: HeadLocation) -> HeadTransform:
    """The transform as measured before with the same code and numbers, or else measured now."""
    found = _REMEMBERED.get(location.model) or _known(location)
    return measure(location) if found is None else found


def remember_transform(model: Any, forward: Callable[..., Any]) -> None:
    """Measure ``forward``, the model's own, before another library replaces it."""
    with lock(model), torch.no_grad():
        location = find_head(model)
        _REMEMBERED[location.model] = measure(location, forward)
