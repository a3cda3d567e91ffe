"""Vocabularies that the ranks of a process group share: who holds which rows, and the collectives of the loss.

What moves is a few numbers per token: the statistics of each rank's columns are gathered and merged on every rank in
the order of the ranks, so that all of them go on with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .values import require_count

# PyTorch 2.13 renamed it
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

Bounds = tuple[tuple[int, int], ...]


def _check_bounds(bounds: Bounds) -> None:
    """Raise unless the shards are [0, V) without gap or overlap; ranks without rows may be anywhere."""
    end = 0
    for start, stop in sorted((b for b in bounds if b[0] != b[1]), key=lambda b: b[0]):
        if start != end:
            what = "overlap at" if start < end else "leave out rows from"
            raise ValueError(
                f"the shards of a vocabulary must be [0, V) together, but they {what} {min(start, end)}: "
                f"[start, stop) of the ranks are {list(bounds)}"
            )
        end = stop
    if end == 0:
        raise ValueError(f"the shards of a vocabulary must hold at least one row, got {list(bounds)}")


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, stop) of a vocabulary, of which each rank of a process group holds some.

    Make it once and keep it: the constructor is a collective of the group, in which the ranks learn each other's bounds
    and check that they make up the whole vocabulary. :meth:`even` and DTensor weights need none.

    Every rank of the group calls the loss with the same tokens (hidden states, ids, masks, options), each with its own
    rows of the weight, and gets the same loss and outputs, to the bit.

    Args:
        group: the process group; None is the default one.
        start, stop: global rows of this rank's part. A weight may have more than ``stop - start`` rows (padding), which
            are never read and have gradient 0. ``start == stop`` is a rank without rows.
        reduce_hidden: sum the gradient of the hidden states over the group, in float32, so that every rank has the
            whole of it. False leaves each rank its own part, for whoever reduces it later (reduce-scatter under
            sequence parallelism).
        bounds: (start, stop) of every rank in the order of the group, where they are known (they must be alike on all
            ranks): the constructor is no collective then.

    Raises:
        ValueError: bounds that are not a slice, or do not make up [0, V) together (on all ranks).
        RuntimeError: torch.distributed is not initialised.
    """

    group: dist.ProcessGroup
    start: int
    stop: int
    reduce_hidden: bool = True
    bounds: Bounds = ()  # of every rank

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        start: int,
        stop: int,
        *,
        reduce_hidden: bool = True,
        bounds: Bounds | None = None,
    ) -> None:
        for name, value in (("start", start), ("stop", stop)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not isinstance(reduce_hidden, bool):
            raise TypeError(f"reduce_hidden must be a bool, got {type(reduce_hidden).__name__}")
        group = _group(group)
        if bounds is None:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, (start, stop), group=group)
            bounds = tuple(gathered)
        elif len(bounds) != dist.get_world_size(group) or bounds[dist.get_rank(group)] != (start, stop):
            raise ValueError(
                f"bounds must have one pair for each of the {dist.get_world_size(group)} ranks, this rank's "
                f"({start}, {stop}) at its place, got {list(bounds)}"
            )
        if any(not 0 <= a <= b for a, b in bounds):
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop on every rank, got {list(bounds)}")
        _check_bounds(bounds)
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "reduce_hidden", reduce_hidden)
        object.__setattr__(self, "bounds", bounds)

    @classmethod
    def even(cls, vocab_size: int, group: dist.ProcessGroup | None = None, *, reduce_hidden: bool = True) -> VocabShard:
        """Parts of ceil(V / ranks) rows in the order of the ranks, the last ones shorter or empty, as DTensor cuts.

        No collective.
        """
        require_count("vocab_size", vocab_size)
        group = _group(group)
        ranks = dist.get_world_size(group)
        size = -(-vocab_size // ranks)
        bounds = tuple((min(i * size, vocab_size), min((i + 1) * size, vocab_size)) for i in range(ranks))
        return cls(group, *bounds[dist.get_rank(group)], reduce_hidden=reduce_hidden, bounds=bounds)

    @property
    def described(self) -> dict[str, Any]:
        """As JSON can hold it; :meth:`of` is the way back."""
        fields = {name: getattr(self, name) for name in ("start", "stop", "reduce_hidden", "bounds")}
        return {"group": self.group.group_name, **fields}

    @classmethod
    def of(cls, described: dict[str, Any]) -> VocabShard:
        # not at import: PyTorch may have been built without torch.distributed
        from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

        group = _resolve_process_group(described["group"])
        bounds = tuple((start, stop) for start, stop in described["bounds"])
        return cls(
            group, described["start"], described["stop"], reduce_hidden=described["reduce_hidden"], bounds=bounds
        )

    @property
    def vocab_size(self) -> int:
        """Rows of all ranks together."""
        return max(stop for _, stop in self.bounds)

    @property
    def count(self) -> int:
        """Rows of this rank."""
        return self.stop - self.start

    @property
    def largest(self) -> int:
        """Rows of the rank that has the most."""
        return max(stop - start for start, stop in self.bounds)

    def within(self, vocab_size: int) -> VocabShard:
        """The same without rows past a smaller vocabulary."""
        bounds = tuple((min(start, vocab_size), min(stop, vocab_size)) for start, stop in self.bounds)
        mine = (min(self.start, vocab_size), min(self.stop, vocab_size))
        return VocabShard(self.group, *mine, reduce_hidden=self.reduce_hidden, bounds=bounds)

    def matches(self, other: VocabShard, vocab_size: int) -> bool:
        """Whether both cut a vocabulary alike among the same ranks."""
        ranks, others = (dist.get_process_group_ranks(x.group) for x in (self, other))
        return ranks == others and self.within(vocab_size).bounds == other.within(vocab_size).bounds

    def local(self, token_ids: Tensor) -> Tensor:
        """Ids among this rank's rows; -1 for those of other ranks and for -1."""
        here = (token_ids >= self.start) & (token_ids < self.stop)
        return torch.where(here, token_ids - self.start, -1)

    def gather(self, mine: Tensor) -> Tensor:
        """``(ranks, *shape)`` of every rank's tensor, in the order of the ranks."""
        out = mine.new_empty((len(self.bounds), *mine.shape))
        _all_gather(out.flatten(0, 1), mine.contiguous(), group=self.group)
        return out

    def sum_(self, x: Tensor) -> dist.Work | None:
        """Start to sum a tensor over the ranks, in place; the same bits on all of them."""
        return dist.all_reduce(x, group=self.group, async_op=True)  # type: ignore[no-any-return]


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("a VocabShard needs torch.distributed: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup that this rank is in, or None, got {type(group).__name__}")
    return group


def is_dtensor(x: object) -> bool:
    # named by hand: importing torch.distributed.tensor takes a second, and who has a DTensor has imported it
    return type(x).__name__ == "DTensor" and isinstance(x, Tensor) and hasattr(x, "placements")


def _of_dtensor(weight: Any) -> VocabShard | None:
    """The shard that a DTensor's own placement describes; None where every rank has all of it."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = weight.device_mesh, weight.placements
    cut = [i for i, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if not cut:
        return None
    if len(cut) > 1 or type(placements[cut[0]]) is not Shard or placements[cut[0]].dim != 0:
        raise ValueError(
            f"a DTensor weight must have placement Shard(0) over one dimension of its mesh and Replicate over the "
            f"others, got {tuple(placements)}. Rows sharded over the tensor-parallel dimension alone do: gather what "
            "FSDP shards first (docs/parallelism.md), redistribute what is sharded otherwise, or pass "
            "weight.full_tensor()"
        )
    return VocabShard.even(weight.shape[0], mesh.get_group(cut[0]))


def from_dtensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Local tensors of a head, and its shard; gradients flow back to the DTensors."""
    if is_dtensor(weight):
        if shard is not None:
            raise ValueError("shard must be None for a DTensor weight, whose placement tells its shard")
        shard = _of_dtensor(weight)
    elif is_dtensor(bias):
        raise TypeError("bias is a DTensor and weight is not: make both DTensors, or both local with a shard")
    if is_dtensor(hidden):
        from torch.distributed.tensor import Replicate

        placements: Any = hidden.placements  # type: ignore[attr-defined]
        if any(not isinstance(placement, Replicate) for placement in placements):
            raise ValueError(
                f"hidden is a DTensor of placement {tuple(placements)}, and every rank needs all tokens: pass "
                "hidden.redistribute(placements=[Replicate()])"
            )
        hidden = hidden.to_local()  # type: ignore[attr-defined]
    if is_dtensor(weight):
        if bias is not None and (not is_dtensor(bias) or bias.placements != weight.placements):  # type: ignore[attr-defined]
            found = bias.placements if is_dtensor(bias) else "a plain tensor"  # type: ignore[attr-defined]
            raise ValueError(f"bias must be a DTensor placed as weight is, {weight.placements}, got {found}")  # type: ignore[attr-defined]
        weight = weight.to_local()  # type: ignore[attr-defined]
        bias = None if bias is None else bias.to_local()  # type: ignore[attr-defined]
    return hidden, weight, bias, shard
