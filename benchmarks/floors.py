"""Lower bounds on the time of a step: moving the bytes once, and the bare matrix products.

Both write into existing buffers, so that they pay neither for allocation nor for page faults. The providers do, since
every step returns new gradients. The best chunk length is picked for each kind of product by itself.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_gopd.loop import gemm

from .workloads import Inputs, Workload

Step = Callable[[], object]


def moving_bytes(inputs: Inputs) -> dict[str, Step]:
    """Three reads and one write of N V elements, in several ways of which the fastest counts.

    All are multi-threaded and vectorised. ``addcmul`` reads or writes each of the four tensors once, in a single pass.
    The others do less arithmetic in two or three passes.
    """
    a, b, c = (x.detach() for x in inputs.rows)
    out = torch.zeros_like(a)
    return {
        "addcmul": lambda: torch.addcmul(a, b, c, out=out),
        "add + sum": lambda: (torch.add(a, b, out=out), c.sum()),
        "copy + 2 sums": lambda: (out.copy_(a), b.sum(), c.sum()),
    }


# Chunk sizes to try if their buffer fits in memory, besides the largest that fits.
CHUNK_SIZES = {"cpu": (128, 256, 512), "gpu": (512, 1024, 2048, 4096)}


def chunk_sizes(workload: Workload, memory: int) -> list[int]:
    """Chunk sizes whose [C, V] float32 buffer has at most ``memory`` bytes."""
    sizes = CHUNK_SIZES["cpu" if torch.device(workload.device).type == "cpu" else "gpu"]
    largest = min(workload.live_tokens, max(16, memory // (4 * workload.vocab) // 16 * 16))
    return sorted({c for c in sizes if c < largest} | {largest})


def libraries(workload: Workload) -> dict[str, bool]:
    """Name of a library ("" for ``torch.mm``) -> whether the products are this package's, ``fused_gopd.loop.gemm``."""
    if torch.device(workload.device).type != "cpu":
        return {"": False}
    if gemm.prefers_onednn():
        return {"": False, "oneDNN": True}
    # MKL's bfloat16 products are slower than widening on CPUs without AMX
    return {"": False} if workload.dtype == torch.float32 else {"": False, "widened": True}


def count(workload: Workload) -> int:
    """Number of products per step: one for each model, dX, and dW unless the head is frozen."""
    return workload.kind.models + (0 if not workload.kind.backward else 1 if workload.frozen else 2)


class Candidate(NamedTuple):
    """One way to compute the products of one kind for all unmasked tokens, in chunks of one length."""

    kind: str  # "logits" of the models with this hidden size, "dhidden", "dweight"; "bytes" where logits are given
    hidden: int | None
    way: int | str  # tokens per chunk; the name of an operation for "bytes"
    library: str
    step: Step

    @property
    def group(self) -> tuple[str, int | None]:
        return self.kind, self.hidden

    @property
    def name(self) -> str:
        where = "" if isinstance(self.way, str) else "C="
        return f"{where}{self.way}" + (f", {self.library}" if self.library else "")


class _Products:
    """The bare products of a step, on one set of inputs, into buffers that all chunk lengths share.

    A buffer holds the logits of one chunk of one model, and stands for their gradient in dX and dW, so that the same
    memory allows longer chunks than an implementation that needs the logits of all models together. It starts with
    random numbers: a GPU multiplies zeros at a higher clock. dW is accumulated in float32.
    """

    def __init__(self, workload: Workload, inputs: Inputs, buffers: dict[tuple[object, ...], Tensor]) -> None:
        assert inputs.weights is not None
        self.workload, self.buffers = workload, buffers
        self.rows = [x.detach() for x in inputs.live().rows]
        self.weights = [x.detach() for x in inputs.weights]
        self.tokens = self.rows[0].shape[0]

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        key = (name, columns, dtype)
        if key not in self.buffers or self.buffers[key].shape[0] < rows:
            self.buffers.pop(key, None)
            self.buffers[key] = torch.randn(rows, columns, device=self.rows[0].device).to(dtype)
        return self.buffers[key][:rows]

    def _chunks(self, chunk_size: int) -> list[slice]:
        """Chunks of equal size: not 440 and 72 tokens for 512 at C = 440."""
        count = -(-self.tokens // chunk_size)
        bounds = [self.tokens * i // count for i in range(count + 1)]
        return [slice(*pair) for pair in itertools.pairwise(bounds)]

    def step(self, kind: str, hidden: int, chunk_size: int, own: bool) -> Step:
        """All products of one kind. For "logits" those of every model with this hidden size."""
        w = self.weights[0]
        wide = torch.float32 if own else w.dtype
        chunks, logits = self._chunks(chunk_size), self._buffer("logits", chunk_size, w.shape[0], wide)
        models = [(h, w) for h, w in zip(self.rows, self.weights, strict=True) if h.shape[1] == hidden]
        out = self._buffer("dhidden", self.tokens, hidden, wide) if kind == "dhidden" else None
        total = self._buffer("dweight", w.shape[0], hidden, torch.float32) if kind == "dweight" else None

        def forward() -> None:
            for rows in chunks:
                z = logits[: rows.stop - rows.start]
                for h, weight in models:
                    gemm.logits_into(z, weight)(h[rows]) if own else torch.mm(h[rows], weight.T, out=z)

        def dhidden() -> None:
            assert out is not None
            for rows in chunks:
                z = logits[: rows.stop - rows.start]
                if own:
                    out[rows] = gemm.dhidden(z, w)
                else:
                    torch.mm(z, w, out=out[rows])

        def dweight() -> None:
            assert total is not None
            for rows in chunks:
                z = logits[: rows.stop - rows.start]
                add_dweight(total, z, self.rows[0][rows], first=rows.start == 0, own=own)

        return {"logits": forward, "dhidden": dhidden, "dweight": dweight}[kind]


def candidates(workload: Workload, sets: list[Inputs], memory: int) -> list[Candidate]:
    """Every way of every kind of product whose chunk fits in ``memory``; a step uses the input sets in turn."""
    if workload.level == "logits":
        each = [moving_bytes(inputs) for inputs in sets]
        return [Candidate("bytes", None, name, "", in_turn([steps[name] for steps in each])) for name in each[0]]
    assert workload.hidden is not None
    kinds = [("logits", h) for h in dict.fromkeys(workload.hidden)]
    if workload.kind.backward:
        kinds += [(kind, workload.hidden[0]) for kind in ("dhidden", "dweight")[: 1 if workload.frozen else 2]]
    buffers: dict[tuple[object, ...], Tensor] = {}
    products = [_Products(workload, inputs, buffers) for inputs in sets]
    sizes = chunk_sizes(workload, memory)
    return [
        Candidate(kind, hidden, c, library, in_turn([p.step(kind, hidden, c, own) for p in products]))
        for kind, hidden in kinds
        for library, own in libraries(workload).items()
        for c in reversed(sizes)  # the longest first: the buffers that it needs serve the others
    ]


def in_turn(steps: list[Step]) -> Step:
    cycle = itertools.cycle(steps)
    return lambda: next(cycle)()


class Floor(NamedTuple):
    """The fastest way of each kind of product, one after the other."""

    step: Step
    name: str
    chunk_size: int | None  # None where kinds differ
    ms: float  # sum of the medians
    tried: list[dict[str, Any]]  # every candidate with its spread


def pick(found: list[Candidate], timed: Callable[[Step], float], seconds: float) -> Floor:
    """Time all candidates in turn, in a new random order each round, and take the best of each kind by its median.

    The first round is a warm-up, which says how many fit in ``seconds``; between 3 and 9 rounds count.
    """
    order = random.Random(0)
    warm_up = sum(timed(candidate.step) for candidate in found)
    rounds = min(9, max(3, round(1e3 * seconds / warm_up)))
    times: list[list[float]] = [[] for _ in found]
    for _ in range(rounds):
        for i in order.sample(range(len(found)), len(found)):
            times[i].append(timed(found[i].step))
    best: dict[tuple[str, int | None], int] = {}
    for i, candidate in enumerate(found):
        if candidate.group not in best or median(times[i]) < median(times[best[candidate.group]]):
            best[candidate.group] = i
    tried = [
        {
            "kind": candidate.kind,
            "hidden": candidate.hidden,
            "way": candidate.way,
            "library": candidate.library,
            "ms_min": min(ms),
            "ms_p50": median(ms),
            "ms_p90": quantile(ms, 0.9),
            "rounds": rounds,
            "best": best[candidate.group] == i,
        }
        for i, (candidate, ms) in enumerate(zip(found, times, strict=True))
    ]
    chosen = [found[i] for i in best.values()]
    names = list(dict.fromkeys(candidate.name for candidate in chosen))
    name = names[0] if len(names) == 1 else "; ".join(f"{c.kind} {c.name}" for c in chosen)
    sizes = {candidate.way for candidate in chosen}
    chunk_size = sizes.pop() if len(sizes) == 1 else None

    def step() -> None:
        for candidate in chosen:
            candidate.step()

    total = sum(median(times[i]) for i in best.values())
    return Floor(step, name, chunk_size if isinstance(chunk_size, int) else None, total, tried)


def quantile(values: list[float], q: float) -> float:
    """Quantile with linear interpolation."""
    values = sorted(values)
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


# Side and dtype of the clock's square matrices, and products in a row
CLOCKS = {"cpu": (1024, torch.float32, 1), "gpu": (4096, torch.bfloat16, 8)}


def clock_name(device: str) -> str:
    size, dtype, repeats = CLOCKS["cpu" if torch.device(device).type == "cpu" else "gpu"]
    return f"torch.mm, {size} x {size} x {size}, {str(dtype).removeprefix('torch.')}, {repeats} in a row"


class Clock:
    """A product of fixed shape, timed between measurements: how fast the machine was when they were made."""

    def __init__(self, device: str) -> None:
        size, dtype, self.repeats = CLOCKS["cpu" if torch.device(device).type == "cpu" else "gpu"]
        self.a, self.b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self.out = torch.empty_like(self.a)

    def step(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self.a, self.b, out=self.out)


def add_dweight(dweight: Tensor, logits: Tensor, hidden: Tensor, *, first: bool, own: bool = False) -> None:
    """Add logits.T @ hidden to a float32 matrix, or write it there."""
    if own or gemm.accumulates_low_precision(logits):
        gemm.add_dweight_(dweight, logits.T, hidden, first=first)
    elif logits.dtype != dweight.dtype:  # a CPU cannot accumulate bfloat16 products in float32
        product = logits.T @ hidden
        dweight.copy_(product) if first else dweight.add_(product)
    elif first:
        torch.mm(logits.T, hidden, out=dweight)
    else:
        dweight.addmm_(logits.T, hidden)
