"""Which tokens of a batch are computed, in which order, and which sequence each belongs to."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import private
from .checks import IGNORE, refuse, require_device, require_mask, require_shape
from .records import record


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums over tokens: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@record(frozen=True, eq=False)
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

    def extreme(self, how: Literal["max", "min"], values: Tensor) -> Tensor:
        """(B,) the largest or smallest of ``values`` in the token shape, an infinity for a sequence without tokens."""
        none = -math.inf if how == "max" else math.inf
        if self.cu_seqlens is not None:
            return torch.segment_reduce(values, how, offsets=self.cu_seqlens, unsafe=True, initial=none)
        if not values.numel():
            return values.new_full((self.count,), none)
        flat = values.reshape(self.count, -1)
        return flat.amax(1) if how == "max" else flat.amin(1)

    def expand(self, values: Tensor) -> Tensor:
        """One value per sequence (B,) in the token shape."""
        if self.cu_seqlens is None:
            return values.reshape(-1, *([1] * (len(self.shape) - 1))).expand(self.shape)
        positions = torch.arange(self.shape[0], device=self.cu_seqlens.device)
        return values[torch.searchsorted(self.cu_seqlens, positions, right=True) - 1]


Bounds = tuple[int, int]  # start and stop
Reader = Callable[[Bounds], Tensor]


class Cuts(NamedTuple):
    """Where tokens are cut into chunks: the bounds of all of them, in order, and their sizes."""

    bounds: list[Bounds]
    sizes: list[int]


def parts_of(x: Tensor, cuts: Cuts, dim: int = 0) -> Reader:
    """A function that gives entries [start, stop) of a tensor along a dimension of tokens.

    The views of all chunks are made at once, which takes a third of the time that slices do.
    """
    if len(cuts.bounds) < 2:
        return lambda bounds: x if bounds in cuts.bounds else x.narrow(dim, bounds[0], bounds[1] - bounds[0])
    parts = _Parts(zip(cuts.bounds, x.split_with_sizes(cuts.sizes, dim), strict=True))
    parts.x, parts.dim = x, dim
    return parts.__getitem__


class _Parts(dict[Bounds, Tensor]):
    __slots__ = ("dim", "x")
    x: Tensor
    dim: int

    def __missing__(self, bounds: Bounds) -> Tensor:
        start, stop = bounds
        return self.x.narrow(self.dim, start, stop - start)


def _keeping(read: Reader) -> Reader:
    """A reader that keeps what it has read last."""
    last: tuple[Bounds, Tensor] | None = None

    def kept(bounds: Bounds) -> Tensor:
        nonlocal last
        if last is None or last[0] != bounds:
            last = bounds, read(bounds)
        return last[1]

    return kept


@record(frozen=True, eq=False)
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

    def reader(self, x: Tensor, cuts: Cuts, twice: bool = False) -> Reader:
        """A function that gives rows of ``x`` as :meth:`take` does; ``twice`` in a row: a copy is kept until then."""
        flat: Tensor | None = x
        if len(self.shape) != 1:
            try:
                flat = x.view(self.shape.numel(), *x.shape[len(self.shape) :])
            except RuntimeError:
                flat = None
        if self.index is None and flat is not None:
            return parts_of(flat, cuts)
        gathered = functools.partial(self._gathered, x, flat)
        return _keeping(gathered) if twice else gathered

    def _gathered(self, x: Tensor, flat: Tensor | None, bounds: Bounds) -> Tensor:
        start, stop = bounds
        index = torch.arange(start, stop, device=x.device) if self.index is None else self.index[start:stop]
        if flat is not None:
            return flat.index_select(0, index)
        # by hand: torch.unravel_index copies the shape to the device, which waits for it
        coordinates: list[Tensor] = []
        for size in reversed(self.shape):
            coordinates.insert(0, index % size)
            index = index // size
        return x[tuple(coordinates)]

    def take(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the live tokens of ``x`` (token shape + trailing dims), as (n, ...).

        A view where every token is live and the layout allows it. Otherwise only these rows are copied: flattening a
        sliced tensor such as ``hidden[:, :-1]`` first would copy all of it.
        """
        count = self.count
        return self.reader(x, Cuts([(0, count)], [count]))((start, count if stop is None else stop))

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

    def scatter_entries(self, values: Tensor) -> Tensor:
        """(n, K) values of the live tokens as token shape + (K,), 0 elsewhere; differentiable."""
        K = values.shape[1]
        if self.index is None:
            values = values.reshape(*self.shape, K)
            return values if self.keep is None else values.masked_fill(~self.keep[..., None], 0)
        return values.new_zeros(self.shape.numel(), K).index_copy(0, self.index, values).reshape(*self.shape, K)


class LiveSequences(NamedTuple):
    """Of values (n,) of the live tokens, or of the token shape: each replaced by one number of its sequence."""

    rows: TokenRows
    sequences: Sequences

    def reduce(self, how: Literal["token", "sum", "mean", "max", "min"], values: Tensor) -> Tensor:
        """The sum, mean or extremum over the live tokens of each sequence; or the values themselves."""
        rows, sequences = self.rows, self.sequences
        if how == "token":
            return values
        if how in ("max", "min"):
            none = -math.inf if how == "max" else math.inf
            whole = rows.scatter(values)
            live = rows.scatter(torch.ones_like(values)) > 0
            result = sequences.extreme("max" if how == "max" else "min", whole.masked_fill(~live, none))
        else:
            result = sequences.sum(rows.scatter(values))
            if how == "mean":
                result = result / sequences.sum(rows.scatter(torch.ones_like(values))).clamp_min(1)
        return rows.take(sequences.expand(result)).to(values.dtype).reshape(values.shape)


# ------------------------------------------------------------------------------------------------------------- checks


_fixed_shapes = contextvars.ContextVar("_fixed_shapes", default=False)


@contextlib.contextmanager
def fixed_shapes() -> Iterator[None]:
    """Calls take the path of a CUDA-graph capture, so that what warms up is what is captured."""
    token = _fixed_shapes.set(True)
    try:
        yield
    finally:
        _fixed_shapes.reset(token)


def host_sync_forbidden(device: torch.device) -> bool:
    """Whether no value may be read from the device: during CUDA-graph capture, and on meta, which has no values."""
    kind = device.type
    return kind == "meta" or _fixed_shapes.get() or (kind == "cuda" and torch.cuda.is_current_stream_capturing())


def check_mask(mask: object, shape: torch.Size, device: torch.device, owner: str = "student") -> Tensor | None:
    """A mask of the token shape of ``owner``, as bool; None is all live."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        require_shape("mask", mask, shape, owner)
        require_device("mask", mask, device)
    return require_mask("mask", mask)


def live_rows(mask: Tensor | None, shape: torch.Size) -> TokenRows:
    """The live tokens in the order of the batch."""
    if mask is None:
        return TokenRows(shape)
    if host_sync_forbidden(mask.device):
        return TokenRows(shape, keep=mask)
    # the one host sync that dropping masked rows costs: how many are live
    index = mask.reshape(-1).nonzero()[:, 0]
    return TokenRows(shape, None if index.shape[0] == shape.numel() else index)


def live_token_ids(ids: Tensor, rows: TokenRows, vocab_size: int, masked: bool) -> Tensor:
    """(n,) int64 ids of the live tokens. Out of range: IndexError on a CPU, a device-side assert on a GPU."""
    live = rows.take(ids if ids.dtype is torch.int64 else ids.to(torch.int64)).contiguous()
    if live.is_cpu and live.shape[0]:
        low, high = live.aminmax()
        if low.item() >= 0 and high.item() < vocab_size:
            return live
        if not masked and bool((live == IGNORE).any()):
            raise ValueError(
                f"token_ids contains {IGNORE} but no mask is given: pass mask=(token_ids != {IGNORE}), since ids alone "
                "never mask a token here"
            )
    message = f"token_ids must be in [0, {vocab_size}) where not masked ({IGNORE} needs a mask)"
    refuse(live != live.clamp(0, vocab_size - 1), live, IndexError, message)
    return live


def live_entries(name: str, ids: Tensor, rows: TokenRows, vocab_size: int) -> Tensor:
    """(n, K) int64 ids of the live tokens, several at a position, -1 for none; errors as of :func:`live_token_ids`."""
    live = rows.take(ids if rows.keep is None else ids.masked_fill(~rows.keep[..., None], -1)).to(torch.int64)
    wrong = (live < -1) | (live >= vocab_size)
    refuse(wrong, live, IndexError, f"{name} must be in [0, {vocab_size}), or -1 for none, where not masked")
    return live.contiguous()


def check_cu_seqlens(cu_seqlens: object, shape: torch.Size, device: torch.device) -> Sequences:
    """The slices of packed tokens. Values: ValueError on a CPU, a device-side assert (no host sync) on a GPU."""
    if cu_seqlens is None:
        return Sequences(shape)
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if len(shape) != 1:
        raise ValueError(f"cu_seqlens needs packed tokens of shape (N,), got the token shape {tuple(shape)}")
    require_device("cu_seqlens", cu_seqlens, device)
    bounds = cu_seqlens.to(torch.int64).contiguous()
    sorted_ = (bounds[1:] >= bounds[:-1]).all()
    if device.type == "cuda":
        right = sorted_ & (bounds[0] == 0) & (bounds[-1] == shape[0])
        private.assert_async(right, f"cu_seqlens must start at 0, be sorted and end at N={shape[0]}")
    elif device.type == "meta":
        pass
    elif bounds[0] != 0 or bounds[-1] != shape[0]:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at N={shape[0]}, the number of tokens, got {int(bounds[0])} and "
            f"{int(bounds[-1])}"
        )
    elif not sorted_:
        raise ValueError(f"cu_seqlens must be sorted, got {bounds.tolist() if bounds.numel() < 20 else 'a decrease'}")
    return Sequences(shape, bounds)
