"""Heads in place of logits, for trainers that only read ``model(...).logits``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name
from transformers import PreTrainedModel

from ...heads import LinearHead
from ...hooks import isinstance_if_imported
from ...shards import is_dtensor
from .causal import UNPATCHED, find_head, is_compiled, require_prefix, unpatched
from .states import head_of, require_head
from .transform import without_head


class HeadInPlaceOfLogits(LinearHead):
    """``outputs.logits`` of a patched model: a LinearHead whose use as a tensor is an error that says what it is."""

    def _error(self, use: str, kind: type[Exception] = TypeError) -> Exception:
        return kind(
            f"{use}: the logits of a model under patch_lm_head are no tensor but a fused_gopd.LinearHead of hidden "
            f"states {tuple(self.hidden.shape)} and weight {tuple(self.weight.shape)}, of which the loss makes logits "
            "in chunks. Pass it to fused_gopd.gopd_loss, or to fused_gopd.token_logprobs for log_softmax at given "
            "tokens; index its tokens (logits[:, :-1]); token_shape and vocab_size are its sizes; a temperature is "
            "dataclasses.replace(logits, temperature=...); the dtype is that of the model, and sums are float32. Real "
            "logits come from calls in eval mode or with labels, and after undo()"
        )

    def __getattr__(self, name: str) -> Any:  # only called for attributes that a LinearHead lacks
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise self._error(f"logits.{name} is not there", AttributeError)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        flat = [x for y in given for x in (y if isinstance(y, (list, tuple)) else [y])]  # cat takes a list of tensors
        head = next(x for x in flat if isinstance(x, cls))
        raise head._error(f"{resolve_name(function) or function} cannot take logits")


def _refusing(name: str) -> Callable[..., Any]:
    def operator(self: HeadInPlaceOfLogits, *_: Any) -> Any:
        raise self._error(f"{name} cannot take logits")

    return operator


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _side in ("", "r", "i"):
        setattr(HeadInPlaceOfLogits, f"__{_side}{_name}__", _refusing(_name))
for _name in ("neg", "abs", "lt", "le", "gt", "ge", "len", "setitem", "array", "float", "int"):
    setattr(HeadInPlaceOfLogits, f"__{_name}__", _refusing(_name))


class _Method:
    """A function that replaces a method of one instance; the instance cannot be copied or pickled meanwhile."""

    def __init__(self, function: Callable[..., Any], original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # so that inspect.signature returns the original's
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a model under patch_lm_head cannot be copied or pickled: undo the patch first")


class PatchedLMHead:
    """The handle of :func:`patch_lm_head`; as a context manager it undoes the patch at its end."""

    def __init__(self, model: PreTrainedModel, training_only: bool) -> None:
        self._model, self._training_only, self._active = model, training_only, True
        self._originals: dict[str, Callable[..., Any]] = {
            name: getattr(model, name) for name in ("forward", "generate")
        }
        self._own = {name: vars(model)[name] for name in self._originals if name in vars(model)}
        self._methods = {
            name: _Method(function, self._originals[name])
            for name, function in (("forward", self._forward), ("generate", self._generate))
        }
        vars(model).update(self._methods)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        original = self._originals["forward"]
        given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        given = {**kwargs, **given}  # bind_partial nests those that the forward takes as **kwargs
        wanted = self._active and (self._model.training or not self._training_only)
        if not wanted or given.get("labels") is not None or UNPATCHED.get():
            return original(*args, **kwargs)
        require_prefix(self._model, given.get("token_type_ids"))
        output, hidden = without_head(self._model, lambda: original(*args, **kwargs))
        plain = head_of(self._model, hidden)
        head = HeadInPlaceOfLogits(**{field.name: getattr(plain, field.name) for field in fields(plain)})
        if not hasattr(output, "logits"):
            return (head, *output[1:])
        output.logits = head
        return output

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with unpatched():
            return self._originals["generate"](*args, **kwargs)

    def undo(self) -> None:
        """Restore the model's own methods; a second call does nothing."""
        self._active = False  # for code that has wrapped the patched forward in the meantime
        for name, method in self._methods.items():
            if vars(self._model).get(name) is method:
                del vars(self._model)[name]
                if name in self._own:
                    vars(self._model)[name] = self._own[name]

    remove = undo

    def __enter__(self) -> PatchedLMHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_lm_head(model: Any, *, training_only: bool = True) -> PatchedLMHead:
    """Replace ``model(**inputs).logits`` by a head on its hidden states, for trainers that only read the logits.

    Until it is undone, a call without ``labels`` in training mode returns a :class:`fused_gopd.LinearHead` there. The
    loss takes it directly, after ``[:, :-1]`` for the shift. ``generate``, calls with labels and calls in eval mode
    still return logits. Without gradients the forward is an evaluation, as in :func:`last_hidden_state`. Only this
    instance is changed, not its class::

        with patch_lm_head(model):
            student = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            fg.gopd_loss(student, teacher, ref, ids[:, 1:]).loss.backward()

    Args:
        model: as in :func:`head_of`; a ``DistributedDataParallel`` of it too, whose forward reduces its gradients.
        training_only: False also patches calls in eval mode, for a teacher.

    Returns:
        A handle with ``undo()`` (also called ``remove()``), which is a context manager too.

    Raises:
        TypeError: a model that shards its parameters (FSDP, ZeRO-3), which frees the head's weight before a loss could
            use it; one that is compiled as a whole; the errors of :func:`head_of`.
        RuntimeError: the model is patched already.
    """
    while isinstance_if_imported(model, "torch.nn.parallel", "DistributedDataParallel"):
        model = model.module
    if is_compiled(model):
        raise TypeError("model is compiled as a whole, its head included: compile the body, model.model.compile()")
    location = find_head(model)
    sharded = any(is_dtensor(p) or hasattr(p, "ds_id") for p in location.head.parameters())
    if sharded and not location.model.tp_size:
        raise TypeError(
            "model shards its parameters, and frees the head's weight before a loss outside of its forward can use it: "
            "call last_hidden_state and head_of in fused_gopd.distributed.in_forward in place of patch_lm_head"
        )
    if isinstance(vars(location.model).get("forward"), _Method):
        raise RuntimeError("model is patched already: undo the first patch_lm_head before another")
    require_head(model)  # raises now for heads that the loss cannot use, not in the first step
    return PatchedLMHead(location.model, training_only)
