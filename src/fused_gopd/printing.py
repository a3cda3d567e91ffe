"""How objects that hold tensors print: one short line a field, with the shape and the mean in place of the numbers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def described(x: object, live: Tensor | None = None, *, values: bool = True) -> str:
    """A field in a few words; the mean of a tensor is that of its ``live`` entries (bool, of its shape)."""
    import torch

    if not isinstance(x, torch.Tensor):
        return repr(x)
    dtype = str(x.dtype).removeprefix("torch.")
    text = dtype if x.ndim == 0 else f"{tuple(x.shape)} {dtype}"
    text += "" if x.device.type == "cpu" else f" on {x.device}"
    if not values:
        return text
    try:
        return _with_values(text, x.detach(), live)
    except RuntimeError:  # on meta, and while a compiler traces, there are none
        return text


def _with_values(text: str, x: Tensor, live: Tensor | None) -> str:
    import torch

    if x.ndim == 0:
        return f"{x.item():.6g} {text}"
    there = x if live is None or live.shape != x.shape else x[live]
    if there.numel() == 0 or not (x.dtype == torch.bool or x.is_floating_point()):
        return text
    if x.dtype == torch.bool:
        return f"{text}, {int(there.sum())} of {there.numel()} True"
    return f"{text}, mean {there.to(torch.float64 if x.device.type == 'cpu' else torch.float32).mean().item():.6g}"


def lines(x: Any, live: Tensor | None = None, *, values: bool = True, unread: str | None = None) -> str:
    """A dataclass, one line a field; ``unread`` in the place of those that would have to be computed."""

    def text(name: str) -> str:
        if unread is not None and name not in vars(x):
            return unread
        return described(getattr(x, name), None if name == "mask" else live, values=values)

    fields = (f"  {f.name}: {text(f.name)}\n" for f in dataclasses.fields(x))
    return f"{type(x).__name__}(\n{''.join(fields)})"
