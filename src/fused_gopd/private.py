"""What of PyTorch is private and used here, each with what is done where a release lacks it.

docs/versions.md lists these, and those that are used in one place only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_functorch = getattr(torch._C, "_functorch", None)

# () -> bool: whether a transform of torch.func is at work. Without it PyTorch's own error refuses them: the Functions
# of eager code have no setup_context.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", bool)


def transforms() -> list[str]:
    """Names of the transforms of torch.func at work, the outermost first: "Grad", "Vmap", "Jvp", "Functionalize"."""
    stack = getattr(_functorch, "get_interpreter_stack", tuple)
    return [interpreter.key().name for interpreter in stack()]


def is_batched(x: Tensor) -> bool:
    """Whether x is a batch of tensors under torch.func.vmap."""
    known = getattr(_functorch, "is_batchedtensor", None)
    return known is not None and bool(known(x))


def assert_async(ok: Tensor, message: str) -> None:
    """Stop the device where ok (), bool, is false; the host does not wait. Without it the host waits, and raises."""
    stop = getattr(torch, "_assert_async", None)
    if stop is not None:
        stop(ok, message)
    elif not bool(ok):
        raise RuntimeError(message)
