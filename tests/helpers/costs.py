"""What a call costs: its matrix products counted, its allocations seen.

Counted with torch.profiler, which records every ATen call and every allocation also inside a custom op (a dispatch mode
does not: the op is one call to it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

# Tokens, hidden size and vocabulary of the calls that are counted, and one product of these
N, H, V = 96, 16, 512
GEMM = 2 * N * H * V


def profiled(call: Callable[[], Any], shapes: bool = False, memory: bool = False) -> list[Any]:
    """The events of a call, as Kineto has them: the profiler's own tree of them takes ten times as long."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=shapes, profile_memory=memory) as prof:
        call()
    events: list[Any] = prof.profiler.kineto_results.events()
    return events


def gemm_flops(call: Callable[[], Any]) -> int:
    """2 m n k of every matrix product that ran, from the shapes of its two matrices."""
    total = 0
    for event in profiled(call, shapes=True):
        name = event.name()
        if name in ("aten::mm", "aten::bmm"):
            left, right = event.shapes()[:2]
        elif name in ("aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_"):
            left, right = event.shapes()[1:3]
        elif name == "mkldnn::_linear_pointwise":
            left, right = event.shapes()[0], event.shapes()[1][::-1]
        else:
            continue
        total += 2 * math.prod(left) * right[-1]
    return total


class Memory:
    """What a call allocates through PyTorch's allocators."""

    def __init__(self, call: Callable[[], Any]) -> None:
        sizes = [(e.start_ns(), e.nbytes()) for e in profiled(call, memory=True) if e.name() == "[memory]"]
        assert sizes, "the profiler saw no allocation at all"
        self.largest = max(size for _, size in sizes)
        now = self.peak = 0
        for _, size in sorted(sizes, key=lambda x: x[0]):
            now += size
            self.peak = max(self.peak, now)
        self.left = now
