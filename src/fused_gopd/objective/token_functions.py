"""Functions of the caller's that give one number per token: ``advantage_fn`` and ``reward_scale_fn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..token_stats import TokenFn, TokenStats

# What each of them gives, in words.
_GIVES = {"advantage_fn": "advantage", "reward_scale_fn": "lambda"}


def call_function(name: str, function: TokenFn, stats: TokenStats, dtype: torch.dtype) -> Tensor:
    """The numbers (C,) of the function ``name`` in the dtype of accumulation, checked.

    Statistics that it has not read can not be read later: they are made from logits, which will be overwritten.
    """
    with torch.no_grad():
        value = function(stats)
    if "_compute" in vars(stats):
        vars(stats)["_compute"] = _too_late
    expected = stats.index
    if not isinstance(value, Tensor):
        why = ": a field of TokenStats is None where there is no such model or number" if value is None else ""
        raise TypeError(f"{name} must return a torch.Tensor, got {type(value).__name__}{why}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must return a float tensor, got {value.dtype}")
    if value.shape != expected.shape or value.device != expected.device:
        raise ValueError(
            f"{name} must return one {_GIVES[name]} per token, shape {tuple(expected.shape)} on {expected.device}, "
            f"got {tuple(value.shape)} on {value.device}: these are the chunk's live tokens, for which numbers of your "
            "own are mine.reshape(-1)[stats.index]"
        )
    return value.detach().to(dtype)


def _too_late(name: str) -> Any:
    raise RuntimeError(
        f"{name} of TokenStats was not read inside the function, and is no longer there: the chunk's logits are gone"
    )
