"""The logits buffers of a chunk, [C, V] per model that is alive at once, reused by every chunk."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..heads import Head, LinearHead, Logits
from ..problem import Problem
from ..rowops import LogitTransform, ModelRows
from ..rowops.torch import accumulation_dtype
from . import gemm, memory
from .chunking import row_stride


def columns(problem: Problem, head: Head) -> int:
    """Number of vocabulary entries whose logits this rank computes for a model."""
    return problem.vocab_size if head.shard is None else head.shard.count


def transform_of(head: Head) -> LogitTransform:
    bias = head.bias if isinstance(head, LinearHead) else None
    return LogitTransform(head.logit_scale, head.softcap, head.temperature, bias)


def with_gemm_dtype_weights(problem: Problem) -> Problem:
    """The problem with float32 master weights rounded to the dtype of their hidden states, once for all chunks."""
    rounded: dict[tuple[object, ...], Tensor] = {}  # models and routes may share a weight

    def of(head: Head | None) -> Head | None:
        if not isinstance(head, LinearHead) or head.weight.dtype == head.hidden.dtype:
            return head
        weight = head.weight.detach()
        key = (weight.data_ptr(), weight.shape, weight.stride(), head.hidden.dtype)
        if key not in rounded:
            rounded[key] = weight.to(head.hidden.dtype)
        return replace(head, weight=rounded[key])

    student = of(problem.student)
    routes = tuple(replace(route, teacher=of(route.teacher), ref=of(route.ref)) for route in problem.routes)
    if not rounded:
        return problem
    assert student is not None
    return replace(problem, student=student, routes=routes)


class Buffers:
    """Logits buffers by slot ("student", "teacher", "ref", "other") and dtype, allocated on first use."""

    def __init__(self, problem: Problem, chunk_size: int) -> None:
        self._problem, self._chunk_size = problem, chunk_size
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._whole_chunk: tuple[int, ModelRows] | None = None  # first token and student logits of a whole chunk
        heads = [head for route in problem.routes for head in (route.teacher, route.ref) if head is not None]
        self._stride = row_stride(max(columns(problem, head) for head in (problem.student, *heads)))

    def load_whole_chunk(self, start: int, stop: int) -> Tensor:
        """Compute the student's logits of tokens [start, stop) once; ``load`` then returns views of them.

        Returns the raw logits (C, V). :meth:`release_whole_chunk` ends it.
        """
        rows = self.load(self._problem.student, "student", start, stop)
        self._whole_chunk = start, rows
        return rows.raw

    def release_whole_chunk(self) -> None:
        self._whole_chunk = None

    def load(self, head: Head, slot: str, start: int, stop: int, writable: bool = False) -> ModelRows:
        """The raw logits of tokens [start, stop) of a model, computed into the buffer of a slot.

        ``Logits`` are returned as a view of the caller's tensor, or as a copy where they are to be ``writable``.
        """
        problem = self._problem
        if self._whole_chunk is not None and slot == "student":
            first, rows = self._whole_chunk
            return replace(rows, raw=rows.raw[start - first : stop - first])
        width = columns(problem, head)
        if isinstance(head, Logits):
            raw = problem.rows.take(head.logits, start, stop)
            if writable:
                raw = self._buffer(slot, raw.dtype, stop - start, width).copy_(raw[:, :width])
            return ModelRows(raw if raw.stride(-1) == 1 else raw.contiguous(), transform_of(head))
        dtype = problem.options.chunk_dtype or accumulation_dtype(head.weight)
        out = self._buffer(slot, dtype, stop - start, width)
        if width:
            gemm.logits_(out, problem.rows.take(head.hidden, start, stop), head.weight[:width])
        return ModelRows(out, transform_of(head))

    def _buffer(self, slot: str, dtype: torch.dtype, tokens: int, width: int) -> Tensor:
        if (slot, dtype) not in self._buffers:
            frozen = self._problem.frozen_chunk_size
            size = self._chunk_size if frozen is None or slot == "student" else min(frozen, self._chunk_size)
            self._buffers[slot, dtype] = memory.empty((size, self._stride), dtype, self._problem.device)
        return self._buffers[slot, dtype][:tokens, :width]
