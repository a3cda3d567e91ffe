"""What changes the outputs of a module from outside of its forward: hooks, a replaced forward, a subclass.

The loss multiplies hidden states by the weight of a head and never calls the head itself, so that whatever runs around
the head's forward has no effect on it. Such heads are refused here, for every caller that takes one from a module.
Hooks of libraries that shard, move or observe modules are excepted, by the module that defines them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as _module

# these gather and move parameters, convert layouts, or observe: they change no value of the logits
_HARMLESS = (
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils",
    "deepspeed",
    "accelerate",
    "transformers",
    "trl",
    "wandb",
    "fused_gopd",
)
# how a module stores its hooks, the same for all modules, and what register_... calls them
_KINDS = (
    ("_forward_pre_hooks", "_global_forward_pre_hooks", "forward pre-hook"),
    ("_forward_hooks", "_global_forward_hooks", "forward hook"),
    ("_backward_pre_hooks", "_global_backward_pre_hooks", "backward pre-hook"),
    ("_backward_hooks", "_global_backward_hooks", "backward hook"),
)


HEAD_FIX = (
    "register it on a module before the head (the last norm), whose hooks run, or do its work on the hidden states or "
    "by the fused_gopd.LinearHead (a factor is its logit_scale)"
)


def isinstance_if_imported(x: Any, library: str, name: str) -> bool:
    """isinstance of a class of a library that may be missing; who has not imported the library has no instance."""
    return isinstance(x, getattr(sys.modules.get(library), name, ()))


def qualified_name(x: Any) -> str:
    """``module.name`` of a function or a bound method, or of the class of any other object."""
    while isinstance(x, functools.partial):
        x = x.func
    x = getattr(x, "__func__", x)
    named = x if hasattr(x, "__qualname__") else type(x)
    return f"{named.__module__}.{named.__qualname__}"


def _hooks(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Kind and function of every hook that a call of a module runs and that is no library's."""
    for own, shared, kind in _KINDS:
        for hooks, scope in ((getattr(module, own), ""), (getattr(_module, shared), " of all modules")):
            for hook in hooks.values():
                name = qualified_name(hook)
                if not name.startswith(tuple(f"{library}." for library in _HARMLESS)):
                    yield kind + scope, hook


def require_no_hooks(argument: str, modules: Iterable[nn.Module], fix: str, *, but: tuple[str, ...] = ()) -> None:
    """Raises for a hook of the user's on a module, naming it.

    Args:
        argument: what the modules are to the caller, for the message.
        modules: those whose call is left out.
        fix: what to do, for the message.
        but: kinds of hooks that the caller carries out.
    """
    for module in modules:
        for kind, hook in _hooks(module):
            if kind not in but:
                raise TypeError(
                    f"{argument} has a {kind}, {qualified_name(hook)} on {type(module).__name__}, which would have no "
                    f"effect on the loss: remove it (the handle that register_... returned has remove()), and {fix}"
                )


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def _moves_tensors(hook: Any) -> bool:
    """Whether a hook of Accelerate's, which replaces the forward, only moves parameters and tensors between devices."""
    if isinstance_if_imported(hook, "accelerate.hooks", "SequentialHook"):
        return all(_moves_tensors(each) for each in hook.hooks)
    return any(isinstance_if_imported(hook, "accelerate.hooks", name) for name in ("AlignDevicesHook", "CpuOffload"))


def require_linear(argument: str, head: nn.Module, *, but: tuple[str, ...] = ()) -> nn.Linear:
    """The head; raises unless its outputs are ``hidden @ weight.T + bias`` and nothing else is done to them.

    Args:
        argument: what the head is to the caller, for the message.
        head: a module.
        but: kinds of hooks that the caller carries out.
    """
    code = type(head).forward, type(head).__call__
    if not isinstance(head, nn.Linear) or code != (nn.Linear.forward, nn.Linear.__call__):
        raise TypeError(
            f"{argument} must be an nn.Linear, whose weight makes the logits, got {qualified_name(head)}. If that is a "
            "quantised layer, leave the head as it is when the model is loaded (modules_to_not_convert=['lm_head'], or "
            "llm_int8_skip_modules of bitsandbytes), or dequantise it (model.dequantize()). If it wraps a layer or "
            "computes more than hidden @ weight.T + bias, make the head yourself, fused_gopd.LinearHead(hidden, weight)"
        )
    own = vars(head).get("forward")
    if own is not None and hasattr(head, "_hf_hook"):
        if not _moves_tensors(head._hf_hook):
            raise TypeError(
                f"{argument} has a hook of Accelerate's, {qualified_name(head._hf_hook)}, which may change the logits: "
                "remove it, accelerate.hooks.remove_hook_from_module(head)"
            )
        own = getattr(head, "_old_forward", None)
    if own is not None and not _is_own_forward(head, own):
        raise TypeError(
            f"{argument}'s forward was replaced on this instance by {qualified_name(own)}, which would have no "
            f"effect on the loss: put it back (del head.forward), and {HEAD_FIX}"
        )
    require_no_hooks(argument, [head], HEAD_FIX, but=but)
    return head
