"""The logits buffers of a chunk, [C, V] per model that is alive at once, reused by every chunk."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..heads import Head, LinearHead, Logits
from ..objective import combination
from ..objective.statistics import token_logprob
from ..problem import FlatComposite, FrozenModel, Problem, Route
from ..rowops import LogitTransform, ModelRows, RowProblem, Stat, SumTerm, composite
from ..rowops.torch import accumulation_dtype
from ..tokens import Cuts, Reader, parts_of
from . import gemm, memory
from .chunking import balanced, row_stride
from .vocab_parallel import local_ids, no_logit_, own_ids, statistics_of


def columns(problem: Problem, head: FrozenModel) -> int:
    """Number of vocabulary entries whose logits this rank computes for a model; with a map all that it has itself."""
    if head.vocab_map is not None:
        return head.own_size
    return problem.vocab_size if head.shard is None else head.shard.count


def transform_of(head: Head) -> LogitTransform:
    bias = head.bias if isinstance(head, LinearHead) else None
    return LogitTransform(head.logit_scale, head.softcap, head.temperature, bias)


def with_gemm_dtype_weights(problem: Problem) -> Problem:
    """The problem with float32 master weights rounded to the dtype of their hidden states, once for all chunks."""
    rounded: dict[tuple[object, ...], Tensor] = {}  # models and routes may share a weight
    student: Head = _in_gemm_dtype(problem.student, rounded)
    frozen = [(_in_gemm_dtype(r.teacher, rounded), _in_gemm_dtype(r.ref, rounded)) for r in problem.routes]
    if not rounded:
        return problem
    routes = tuple(replace(r, teacher=q, ref=ref) for r, (q, ref) in zip(problem.routes, frozen, strict=True))
    return replace(problem, student=student, routes=routes)


def _in_gemm_dtype(head: Any, rounded: dict[tuple[object, ...], Tensor]) -> Any:
    if isinstance(head, FlatComposite):
        return replace(head, heads=tuple([_in_gemm_dtype(x, rounded) for x in head.heads]))
    if not isinstance(head, LinearHead) or head.weight.dtype == head.hidden.dtype:
        return head
    weight = head.weight.detach()
    key = (weight.data_ptr(), weight.shape, weight.stride(), head.hidden.dtype)
    if key not in rounded:
        rounded[key] = weight.to(head.hidden.dtype)
    return replace(head, weight=rounded[key])


Loading = tuple[ModelRows, gemm.Product, Reader]  # a buffer, the product that fills it, how hidden states are read


class MappedRows(NamedTuple):
    """The rows of a head that are the student's tokens."""

    rows: Tensor  # (V,) int64, that of some other token where there is none
    bias: Tensor  # (V,) of these rows, -inf where there is none


class Buffers:
    """Logits buffers by slot ("student", "teacher", "ref", "other", "part") and dtype, allocated on first use.

    The :class:`ModelRows` of a buffer is one object for all chunks of one length: a backend checks it once.

    Attributes:
        token_ids: (n,) int64, the sampled tokens of the problem, or None.
        chunks: the route of each chunk, its first token and the one after its last.
        logprobs: (C,) of the sampled tokens under the models made of several, by slot, of the tokens loaded last.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, device_type = problem, problem.device.type
        self.token_ids = problem.token_ids
        routes = [route for route in problem.routes if route.stop > route.start]
        self.chunks: list[tuple[Route, int, int]] = []
        self._chunk_size = 1
        for route in routes:
            step = balanced(route.stop - route.start, problem.chunk_size, device_type)
            self._chunk_size = max(self._chunk_size, step)
            starts = range(route.start, route.stop, step)
            self.chunks += [(route, start, min(start + step, route.stop)) for start in starts]
        self._cuts = Cuts([x[1:] for x in self.chunks], [stop - start for _, start, stop in self.chunks])
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._loaded: dict[tuple[str, int, int], Loading] = {}  # by slot, head and number of tokens
        self._composites: dict[tuple[str, int], ModelRows] = {}  # by slot and number of tokens: those of several models
        self.logprobs: dict[str, Tensor] = {}
        self._parts: dict[tuple[int, int, int], ModelRows] = {}  # of a whole chunk, by its tokens, start and stop
        self._whole_chunk: tuple[int, ModelRows] | None = None  # first token and student logits of a whole chunk
        self._readers: dict[int, Reader] = {}  # by head
        self._maps: dict[int, MappedRows] = {}  # by head
        widths = [columns(problem, problem.student)]
        for route in problem.routes:
            for model in (route.teacher, route.ref):
                if isinstance(model, FlatComposite):
                    widths += [columns(problem, head) for head in model.heads if head is not None]
                elif model is not None and (model.vocab_map is None or not problem.joint):
                    widths.append(columns(problem, model))
        self._stride = row_stride(max(widths))

    def load_whole_chunk(self, start: int, stop: int) -> Tensor:
        """Compute the student's logits of tokens [start, stop) once; ``load`` then returns views of them.

        Returns the raw logits (C, V). :meth:`release_whole_chunk` ends it.
        """
        rows = self.load(self._problem.student, "student", start, stop)
        self._whole_chunk = start, rows
        return rows.raw

    def release_whole_chunk(self) -> None:
        self._whole_chunk = None

    def reader(self, head: Head) -> Reader:
        """How rows of a head's hidden states or logits are read.

        The products that make the student's logits and their gradients read the same hidden states. Logits are read
        once, and a chunk's masked ones are a copy as large as a buffer.
        """
        reader = self._readers.get(id(head))
        if reader is None:
            twice = head is self._problem.student and isinstance(head, LinearHead)
            reader = self._readers[id(head)] = self._problem.rows.reader(head.rows, self._cuts, twice)
        return reader

    def slices(self, x: Tensor, dim: int = 0) -> Reader:
        """How a tensor is read that has an entry for each live token along a dimension."""
        return parts_of(x, self._cuts, dim)

    def load(
        self, head: FrozenModel, slot: str, start: int, stop: int, writable: bool = False, joint: bool = False
    ) -> ModelRows:
        """The raw logits of tokens [start, stop) of a model, computed into the buffer of a slot.

        ``Logits`` are returned as a view of the caller's tensor, or as a copy where they are to be ``writable``. A head
        with a vocab_map has its own logits, or those of the student's tokens where they are taken ``joint``.
        """
        if self._whole_chunk is not None and slot == "student":
            return self._part(start, stop)
        key = (slot, id(head), stop - start)
        loaded = self._loaded.get(key)
        if loaded is None:
            if isinstance(head, FlatComposite):
                return self._composite(head, slot, start, stop)
            if joint and head.vocab_map is not None:
                loaded = self._mapped(head, slot, stop - start)
            elif isinstance(head, LinearHead):
                loaded = self._linear(head, slot, stop - start)
            else:
                raw, width = self.reader(head)((start, stop)), columns(self._problem, head)
                if writable:
                    raw = self._buffer(slot, raw.dtype, stop - start, width).copy_(raw[:, :width])
                return ModelRows(raw if raw.stride(-1) == 1 else raw.contiguous(), transform_of(head))
            self._loaded[key] = loaded
        rows, product, read = loaded
        product(read((start, stop)))
        return rows

    def _linear(self, head: LinearHead, slot: str, tokens: int) -> Loading:
        width, dtype = columns(self._problem, head), self._problem.options.chunk_dtype
        out = self._buffer(slot, dtype or accumulation_dtype(head.weight), tokens, width)
        weight = head.weight if width == head.weight.shape[0] else head.weight[:width]
        return ModelRows(out, transform_of(head)), gemm.logits_into(out, weight), self.reader(head)

    def map_of(self, head: Head) -> MappedRows:
        """The rows of a head with a vocab_map, made once for all chunks."""
        if id(head) not in self._maps:
            assert head.vocab_map is not None
            shard, whole = self._problem.student.shard, head.vocab_map
            own = whole if shard is None else whole[shard.start : shard.stop]
            missing = own < 0
            # a row that is some token: a NaN in one that is none must not show
            index = torch.where(missing, whole.amax(), own)
            bias = None if isinstance(head, Logits) or head.bias is None else head.bias[index]
            if bias is None:
                bias = torch.zeros(index.shape, dtype=self._problem.dtype, device=index.device)
            self._maps[id(head)] = MappedRows(index, bias.masked_fill(missing, -math.inf))
        return self._maps[id(head)]

    def _mapped(self, head: Head, slot: str, tokens: int) -> Loading:
        """The raw logits of the student's tokens under a head that has other rows for them, -inf where it has none."""
        index, bias = self.map_of(head)
        dtype = self._problem.options.chunk_dtype or accumulation_dtype(head.rows)
        dtype = head.rows.dtype if isinstance(head, Logits) else dtype
        out = self._buffer(slot, dtype, tokens, index.shape[0])
        rows, read = ModelRows(out, replace(transform_of(head), bias=bias)), self.reader(head)
        if isinstance(head, LinearHead):
            return rows, gemm.logits_of_rows_into(out, head.weight, index), read
        return rows, lambda logits: torch.index_select(logits, 1, index, out=out), read

    def _composite(self, model: FlatComposite, slot: str, start: int, stop: int) -> ModelRows:
        """The log-probs of a model made of several: each is computed into one buffer, then added to the slot."""
        problem, tokens, width = self._problem, stop - start, columns(self._problem, model)
        key = (slot, tokens)
        if key not in self._composites:
            self._composites[key] = ModelRows(self._buffer(slot, problem.dtype, tokens, width), LogitTransform())
        out, weights = self._composites[key].raw, model.weights_of(slice(start, stop))
        total_weight, last = combination.absolute_sum(weights), len(model.heads) - 1
        part = "part" if problem.joint else "student"  # whose buffer is free until its logits are needed
        ids = None if problem.token_ids is None else local_ids(model.shard, problem.token_ids[start:stop])
        logprobs: list[Tensor] = []
        for i, (head, weight) in enumerate(zip(model.heads, weights, strict=True)):
            assert head is not None
            rows, index, own_width, own = self.load(head, part, start, stop), None, width, ids
            if head.vocab_map is not None:
                own = None if problem.token_ids is None else own_ids(head, problem.token_ids[start:stop])
                own_width = head.own_size
            scored, _ = statistics_of(problem.ops, head.shard, RowProblem(own_width, rows, token_ids=own))
            if head.vocab_map is not None:
                index, bias = self.map_of(head)
                rows = replace(rows, transform=replace(rows.transform, bias=bias))
                if own is not None:
                    no_logit_(scored, own)
            logprobs.append(token_logprob(scored[Stat.LOGIT_STUDENT], scored[Stat.LOGSUM_STUDENT]))
            term = SumTerm(weight, total_weight, model.mixture, first=i == 0, last=i == last)
            composite.add(problem.ops, out, rows, width, scored, term, index)
        if ids is not None:
            self.logprobs[slot] = combination.combine(logprobs, weights, model.mixture)
        return self._composites[key]

    def exponentials(self, start: int, stop: int) -> Tensor:
        """(C, V) bfloat16 for the student's exponentials, in the place of its logits."""
        width = columns(self._problem, self._problem.student)
        return self._buffer("student", torch.bfloat16, stop - start, width)

    def scratch(self, i: int, tokens: int, width: int) -> Tensor:
        """(tokens, width) in the accumulation dtype, for the gradients of terms beside the loss."""
        return self._buffer(f"scratch {i}", self._problem.dtype, tokens, width)

    def _part(self, start: int, stop: int) -> ModelRows:
        """Some tokens of the whole chunk."""
        assert self._whole_chunk is not None
        first, whole = self._whole_chunk
        key = (whole.raw.shape[0], start - first, stop - first)
        if key not in self._parts:
            self._parts[key] = replace(whole, raw=whole.raw[start - first : stop - first])
        return self._parts[key]

    def _buffer(self, slot: str, dtype: torch.dtype, tokens: int, width: int) -> Tensor:
        buffer = self._buffers.get((slot, dtype))
        if buffer is None:
            frozen = self._problem.frozen_chunk_size
            size = self._chunk_size if frozen is None or slot == "student" else min(frozen, self._chunk_size)
            buffer = memory.empty((size, self._stride), dtype, self._problem.device)
            self._buffers[slot, dtype] = buffer
        return buffer if buffer.shape == (tokens, width) else buffer[:tokens, :width]
