"""Lower bounds on the time of a step: moving the bytes once, and the bare matrix products.

Both write into existing buffers, so that they pay neither for allocation nor for page faults. The providers do, since
every step returns new gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

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
CHUNK_SIZES = {"cpu": (128, 256, 512), "gpu": (1024, 2048, 4096)}


def chunk_sizes(workload: Workload, memory: int) -> list[int]:
    """Chunk sizes whose [C, V] float32 buffer has at most ``memory`` bytes."""
    sizes = CHUNK_SIZES["cpu" if torch.device(workload.device).type == "cpu" else "gpu"]
    largest = min(workload.live_tokens, max(16, memory // (4 * workload.vocab) // 16 * 16))
    return sorted({c for c in sizes if c < largest} | {largest})


def libraries(workload: Workload) -> dict[str, bool]:
    """Suffix of a floor's name -> whether it uses this package's products instead of torch.mm."""
    if torch.device(workload.device).type != "cpu":
        return {"": False}
    if gemm.prefers_onednn():
        return {"": False, ", oneDNN": True}
    # MKL's bfloat16 products are slower than widening on CPUs without AMX
    return {"": False} if workload.dtype == torch.float32 else {"": False, ", widened": True}


def count(workload: Workload) -> int:
    """Number of products per step: one for each model, dX, and dW unless the head is frozen."""
    return workload.kind.models + (0 if not workload.kind.backward else 1 if workload.frozen else 2)


def bare_gemms(workload: Workload, inputs: Inputs, chunk_size: int, dweight: Tensor | None, own: bool = False) -> Step:
    """A function that computes only the products of one step on the unmasked tokens; dW is accumulated in float32.

    One buffer holds the logits of the models in turn and then serves as their gradient, so that the same memory allows
    longer chunks than an implementation that needs the logits of all models together.

    Args:
        workload: the shapes.
        inputs: hidden states and weights.
        chunk_size: tokens per chunk.
        dweight: (V, H) buffer that all chunk sizes share, None with a frozen head. The first chunk overwrites it.
        own: whether to use this package's products (:mod:`fused_gopd.loop.gemm`), whose library may be the faster one
            on this machine, instead of ``torch.mm``, which writes logits in the dtype of the inputs.
    """
    assert inputs.weights is not None
    rows, weights = [x.detach() for x in inputs.live().rows], [x.detach() for x in inputs.weights]
    tokens, device = rows[0].shape[0], rows[0].device
    wide = torch.float32 if own else rows[0].dtype
    buffer = torch.zeros(min(chunk_size, tokens), weights[0].shape[0], dtype=wide, device=device)
    dhidden = torch.zeros(rows[0].shape, dtype=wide, device=device)
    # chunks of equal size: not 440 and 72 tokens for 512 at C = 440
    chunks = -(-tokens // chunk_size)
    bounds = [tokens * i // chunks for i in range(chunks + 1)]

    def step() -> None:
        for start, stop in itertools.pairwise(bounds):
            logits = buffer[: stop - start]
            for h, w in reversed(list(zip(rows, weights, strict=True))):
                if own:
                    gemm.logits_(logits, h[start:stop], w)
                else:
                    torch.mm(h[start:stop], w.T, out=logits)
            if not workload.kind.backward:
                continue
            if own:
                dhidden[start:stop] = gemm.dhidden(logits, weights[0])
            else:
                torch.mm(logits, weights[0], out=dhidden[start:stop])
            if dweight is not None:
                _add_dweight(dweight, logits, rows[0][start:stop], first=start == 0, own=own)

    return step


def _add_dweight(dweight: Tensor, logits: Tensor, hidden: Tensor, *, first: bool, own: bool) -> None:
    if own or gemm.accumulates_low_precision(logits):
        gemm.add_dweight_(dweight, logits, hidden, first=first)
    elif logits.dtype != dweight.dtype:  # a CPU cannot accumulate bfloat16 products in float32
        product = logits.T @ hidden
        dweight.copy_(product) if first else dweight.add_(product)
    elif first:
        torch.mm(logits.T, hidden, out=dweight)
    else:
        dweight.addmm_(logits.T, hidden)
