"""The map of a frozen model whose vocabulary has other rows than the student's: which of its rows each token is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from .checks import refuse


def require_vocab_map(vocab_map: object, sharded: bool, device: torch.device) -> None:
    """Check the form of a map; :func:`check_rows` checks its numbers, which may be on a GPU."""
    if not isinstance(vocab_map, Tensor):
        raise TypeError(f"vocab_map must be a torch.Tensor or None, got {type(vocab_map).__name__}")
    if vocab_map.dtype != torch.int64:
        raise TypeError(f"vocab_map must be int64, got {vocab_map.dtype}")
    if vocab_map.ndim != 1 or not vocab_map.shape[0]:
        raise ValueError(
            f"vocab_map must have shape (V,), one entry for each token of the student, got {tuple(vocab_map.shape)}"
        )
    if vocab_map.device != device:
        raise ValueError(f"vocab_map must be on the model's device {device}, got {vocab_map.device}")
    if sharded:
        raise ValueError("vocab_map needs the whole head, and this one has a shard: some of its rows")


def refuse_vocab_map(name: str) -> NoReturn:
    """Raise ValueError of a model with a map that is not a frozen one beside a student."""
    own = "" if name == "student" else ", and give the ids of its own vocabulary, vocab_map[token_ids]"
    raise ValueError(
        f"{name} has a vocab_map, which says of a teacher or reference what the student's tokens are in it: make "
        f"{name} without it{own}"
    )


def check_rows(models: Mapping[str, Any], vocab_size: int) -> None:
    """The numbers of the models' maps: in range, no row twice, and a row for some token of the joint vocabulary."""
    checked: set[tuple[int, int]] = set()  # teacher and reference may share one
    for name, model in models.items():
        vocab_map = getattr(model, "vocab_map", None)
        if vocab_map is None or (id(vocab_map), model.own_size) in checked:
            continue
        size = model.own_size
        checked.add((id(vocab_map), size))
        outside = (vocab_map < -1) | (vocab_map >= size)
        message = f"{name}.vocab_map must be in [0, {size}), the rows of that model, or -1 for none"
        refuse(outside, vocab_map, IndexError, message)
        tokens = torch.arange(vocab_map.shape[0], device=vocab_map.device)
        again = (vocab_map >= 0) & (tokens_of_rows(vocab_map, size)[vocab_map.clamp(0, size - 1)] != tokens)
        message = f"{name}.vocab_map must have no row twice, which would count twice"
        refuse(again, vocab_map, ValueError, message)
        first = vocab_map[:vocab_size].amax(0, keepdim=True)
        message = (
            f"{name}.vocab_map must have a row for at least one of the {vocab_size} tokens of the joint vocabulary"
        )
        refuse(first < 0, first, ValueError, message, "all are")


def tokens_of_rows(vocab_map: Tensor, size: int) -> Tensor:
    """(size,) int64, the inverse of a map: the student's token that each row is, -1 for none."""
    tokens = torch.full((size + 1,), -1, dtype=torch.int64, device=vocab_map.device)
    # tokens without a row write behind the last one
    place = torch.where((vocab_map >= 0) & (vocab_map < size), vocab_map, size)
    return tokens.scatter_(0, place, torch.arange(vocab_map.shape[0], device=vocab_map.device))[:size]
