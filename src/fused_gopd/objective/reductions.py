"""Sums and means of token losses, over all tokens and over sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums over tokens: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Sequences:
    """Which sequence a token belongs to: dim 0 of a token shape (B, ...), or the slices of packed tokens (N,).

    Both ways sums are taken in a fixed order, so that two runs give the same bits, and nothing waits for a device.
    """

    shape: torch.Size  # the token shape
    cu_seqlens: Tensor | None = None  # (B + 1,) int64: sequence i is tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1

    @property
    def count(self) -> int:
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def sum(self, values: Tensor) -> Tensor:
        """(B,) sums, in :func:`widest` precision, of ``values`` in the token shape."""
        values = values.to(widest(values.device))
        if self.cu_seqlens is None:
            return values.reshape(self.count, -1).sum(1) if values.numel() else values.new_zeros(self.count)
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, unsafe=True, initial=0)

    def expand(self, values: Tensor) -> Tensor:
        """One value per sequence (B,) in the token shape."""
        if self.cu_seqlens is None:
            return values.reshape(-1, *([1] * (len(self.shape) - 1))).expand(self.shape)
        positions = torch.arange(self.shape[0], device=self.cu_seqlens.device)
        return values[torch.searchsorted(self.cu_seqlens, positions, right=True) - 1]


def token_weights(
    reduction: Reduction,
    mask: Tensor | None,  # token shape, bool; None is all live
    sequences: Sequences,
    normalizer: Tensor | float | None,
    sequence_lengths: Tensor | None,  # (B,) or ()
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """w with loss = sum w * token_loss: a scalar where all live tokens weigh the same, else of the token shape.

    A sequence without a live token is left out of sequence means.
    """
    one = torch.ones((), dtype=dtype, device=device)
    if reduction in ("sum", "none"):
        return one
    # Python numbers divide as they are: a tensor made of one would be copied to the device, which waits for it
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device, dtype).reshape(())
    if reduction == "token-mean":
        if normalizer is None:
            normalizer = max(1, sequences.shape.numel()) if mask is None else mask.sum().clamp_min(1)
        return one / normalizer
    live = torch.ones(sequences.shape, dtype=torch.bool, device=device) if mask is None else mask
    lengths = sequences.sum(live)
    if normalizer is None:
        normalizer = (lengths > 0).sum().clamp_min(1)
    weight = one / normalizer
    if reduction == "seq-mean-token-sum":
        return weight
    if sequence_lengths is not None:
        lengths = sequence_lengths.expand(sequences.count)
    return sequences.expand(weight / lengths.to(dtype).clamp_min(1))
