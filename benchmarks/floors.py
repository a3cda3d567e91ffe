"""What no implementation can undercut: moving the bytes once, and the bare matrix products.

Both write into buffers that exist and are in memory already, so neither pays for allocation or page faults, which the
providers do pay for: every step returns fresh gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workloads import Inputs, Workload
from fused_gopd import gemm

Step = Callable[[], object]


def moving_bytes(inputs: Inputs) -> dict[str, Step]:
    """Three reads and one write of N V elements, in the ways that PyTorch has; the fastest one counts.

    All are multi-threaded and vectorised. ``addcmul`` touches each of the four tensors once in a single pass. The
    others need no arithmetic worth the name, but two or three passes.
    """
    a, b, c = (x.detach() for x in inputs.rows)
    out = torch.zeros_like(a)
    return {
        "addcmul": lambda: torch.addcmul(a, b, c, out=out),
        "add + sum": lambda: (torch.add(a, b, out=out), c.sum()),
        "copy + 2 sums": lambda: (out.copy_(a), b.sum(), c.sum()),
    }


# Sizes tried, as far as their buffer fits the memory; the largest one that fits is tried as well.
CHUNK_SIZES = (128, 256, 512)


def chunk_sizes(workload: Workload, memory: int) -> list[int]:
    """Chunk sizes whose one C x V float32 buffer takes no more than ``memory`` bytes."""
    largest = min(workload.tokens, max(16, memory // (4 * workload.vocab) // 16 * 16))
    return sorted({c for c in CHUNK_SIZES if c < largest} | {largest})


def libraries(device: str) -> dict[str, bool]:
    """The suffix of a floor's name, and whether it multiplies as the package does rather than with torch.mm."""
    other = device == "cpu" and gemm._prefers_onednn()
    return {"": False, ", oneDNN": True} if other else {"": False}


def bare_gemms(inputs: Inputs, chunk_size: int, dweight: Tensor, own: bool = False) -> Step:
    """The five products of one step and nothing else: three forwards, dX, and dW accumulated in float32.

    One buffer takes the logits of the three models in turn and then stands for the gradient of the logits, so that
    the same memory allows chunks three times as long as an implementation that must hold three models' logits.
    ``dweight`` is a (V, H) buffer that all chunk sizes share; the first chunk overwrites it: no zero fill is needed.
    ``own`` takes the package's products (:mod:`fused_gopd.gemm`) in place of ``torch.mm``: the other library, where
    that is the faster one on this machine.
    """
    assert inputs.weights is not None
    rows, weights = ([x.detach() for x in models] for models in (inputs.rows, inputs.weights))
    tokens, vocab = rows[0].shape[0], weights[0].shape[0]
    buffer = torch.zeros(min(chunk_size, tokens), vocab, device=rows[0].device)
    dhidden = torch.zeros(rows[0].shape, device=rows[0].device)
    # even chunks: 512 tokens at 440 would otherwise be 440 and 72
    chunks = -(-tokens // chunk_size)
    bounds = [tokens * i // chunks for i in range(chunks + 1)]

    def step() -> None:
        for start, stop in itertools.pairwise(bounds):
            logits = buffer[: stop - start]
            if own:
                for h, w in reversed(list(zip(rows, weights, strict=True))):
                    gemm.logits_(logits, h[start:stop], w)
                dhidden[start:stop] = gemm.dhidden(logits, weights[0])
                gemm.add_dweight_(dweight, logits, rows[0][start:stop], first=start == 0)
                continue
            for h, w in reversed(list(zip(rows, weights, strict=True))):
                torch.mm(h[start:stop], w.T, out=logits)
            torch.mm(logits, weights[0], out=dhidden[start:stop])
            if start == 0:
                torch.mm(logits.T, rows[0][start:stop], out=dweight)
            else:
                dweight.addmm_(logits.T, rows[0][start:stop])

    return step
