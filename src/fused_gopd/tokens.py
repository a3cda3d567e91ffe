"""Which tokens of a batch are computed, in which order, and which sequence each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums over tokens: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Sequences:
    """Which sequence a token belongs to: dim 0 of a token shape (B, ...), or the slices of packed tokens (N,).

    Sums are taken in a fixed order in both layouts, so that two runs give the same bits, without a host sync.
    """

    shape: torch.Size  # the token shape
    cu_seqlens: Tensor | None = None  # (B + 1,) int64: sequence i is tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1

    @property
    def count(self) -> int:
        """The number of sequences, B."""
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def known(self) -> bool:
        """Whether tokens belong to sequences at all: those of shape (N,) without cu_seqlens do not."""
        return len(self.shape) > 1 or self.cu_seqlens is not None

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


@dataclass(frozen=True)
class TokenRows:
    """Which tokens are computed: all of a token shape, or those at ``index``, in its order.

    Where a host sync for the number of live tokens is not allowed, all are computed and ``keep`` is the mask of those
    whose results are used.
    """

    shape: torch.Size
    index: Tensor | None = None  # (n,) int64 flat positions
    keep: Tensor | None = None  # token shape, bool; only without an index

    @property
    def count(self) -> int:
        return self.shape.numel() if self.index is None else self.index.shape[0]

    def take(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the live tokens of ``x`` (token shape + trailing dims), as (n, ...).

        A view where every token is live and the layout allows it. Otherwise only these rows are copied: flattening a
        sliced tensor such as ``hidden[:, :-1]`` first would copy all of it.
        """
        stop = self.count if stop is None else stop
        trailing = x.shape[len(self.shape) :]
        try:
            flat = x.view(self.shape.numel(), *trailing)
        except RuntimeError:
            flat = None
        if self.index is None:
            if flat is not None:
                return flat[start:stop]
            index = torch.arange(start, stop, device=x.device)
        else:
            index = self.index[start:stop]
            if flat is not None:
                return flat.index_select(0, index)
        # by hand: torch.unravel_index copies the shape to the device, which waits for it
        coordinates: list[Tensor] = []
        for size in reversed(self.shape):
            coordinates.insert(0, index % size)
            index = index // size
        return x[tuple(coordinates)]

    def put(self, out: Tensor, values: Tensor, start: int, stop: int) -> None:
        """Write rows [start, stop) into ``out`` (tokens, ...), which is flat and contiguous."""
        if self.index is None:
            out[start:stop].copy_(values)
        else:
            out.index_copy_(0, self.index[start:stop], values.to(out.dtype))

    def scatter(self, values: Tensor) -> Tensor:
        """(n,) values of the live tokens in the token shape, 0 elsewhere; differentiable."""
        if self.index is None:
            values = values.reshape(self.shape)
            return values if self.keep is None else values.masked_fill(~self.keep, 0)
        return values.new_zeros(self.shape.numel()).index_copy(0, self.index, values).reshape(self.shape)
