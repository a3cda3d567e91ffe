"""The one loop over token chunks: GEMM -> row operation -> GEMMs, and its memory plan.

A chunk's logits live in buffers of C x V elements that every chunk reuses; the student's buffer becomes its own
gradient in place. Nothing here knows an objective beyond what it asks of :mod:`fused_gopd.objective` per token, and
nothing here knows a machine beyond the row operations and GEMMs that it calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .agreement import Agreement, require_agreement
from .checks import refuse
from .heads import Head, LinearHead, Logits
from .loop import gemm, memory
from .objective import topk
from .objective.divergences import Divergence, divergence_value
from .objective.policy import PLAIN, PolicyTerm, Surrogate, advantages_of, looks_jointly, policy_term
from .objective.statistics import ENTROPY_ROWS, STATISTICS, TokenRow, entropy, merge, merged_statistics, token_logprob
from .objective.supervised import supervised
from .objective.topk import Entries, OnSupport, Truncation
from .options import AdvantageFn, Estimator, TokenStats
from .rowops import GradientWeights, LogitTransform, ModelRows, RowOps, RowProblem, Stat, sparse
from .rowops.torch import TorchRowOps, accumulation_dtype, rows_of
from .shards import VocabShard
from .tokens import Sequences, TokenRows

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------ memory plan

# Bytes for all the logits buffers of a chunk together.
# CPU: at V = 151936 and three models 256 MiB give chunks of 144 tokens; GEMMs of 128 to 512 rows ran at the same rate
# within 10 % on two AVX-512 cores, so a larger budget buys nothing.
# GPU: 1.75 GiB give 2048 tokens at V = 151936 and three models, where adding to the weight's gradient takes no longer
# than its product (C / 4 FLOP per byte).
CHUNK_BUDGET_BYTES = {"cpu": 256 << 20, "gpu": 1792 << 20}
# The same for logits in 16 bits, which need less for chunks of more tokens.
LOW_PRECISION_BUDGET_BYTES = 1440 << 20
# Never fewer tokens than this by default, whatever the budget.
CHUNK_FLOOR = {"cpu": 32, "gpu": 1024}
# More tokens than this make no GEMM faster.
CHUNK_CEILING = 8192
# A joint row operation takes teacher and reference this much fewer tokens at a time than the student's chunk has: their
# buffers are left to the chunk, whose length decides how often the weight's gradient is read and written. On an H200
# that is 2 % faster at H = 2048 and 4096, on two AVX-512 cores 6 to 12 % slower.
OTHERS_SHARE = {"cpu": 1, "gpu": 4}
# Chunks are whole tiles of the products where they can be.
_CHUNK_MULTIPLE = {"cpu": 16, "gpu": 256}
# Elements that the row stride of a logits buffer is a multiple of: 64 bytes of float32, 32 of bfloat16 over it.
_ROW_MULTIPLE = 16


def _kind(device_type: str) -> str:
    return "cpu" if device_type == "cpu" else "gpu"


def _multiple(rows: float, device_type: str) -> int:
    multiple = _CHUNK_MULTIPLE[_kind(device_type)]
    return math.ceil(rows / multiple) * multiple


def chunk_size_for(vocab_size: int, buffers: float, device_type: str, element_bytes: int = 4) -> int:
    """Tokens per chunk for a number of C x V logits buffers.

    Depends on shapes, dtype and the kind of device only, never on free memory or a timing: two runs give the same bits.
    """
    kind = _kind(device_type)
    budget = LOW_PRECISION_BUDGET_BYTES if element_bytes < 4 else CHUNK_BUDGET_BYTES[kind]
    fitting = int(budget / max(1.0, buffers * vocab_size * element_bytes))
    fitting -= fitting % _CHUNK_MULTIPLE[kind]
    return min(CHUNK_CEILING, max(CHUNK_FLOOR[kind], fitting))


def others_size(chunk_size: int, device_type: str) -> int:
    """Tokens of teacher and reference at a time beside a chunk of the student's, in a joint row operation."""
    return min(chunk_size, _multiple(chunk_size / OTHERS_SHARE[_kind(device_type)], device_type))


def logits_buffers(
    joint: bool, linear_models: int, student_waits: bool = False, linear_student: bool = True, device_type: str = "cpu"
) -> float:
    """C x V buffers alive at once: a joint row operation holds all models of a chunk, else they take turns.

    Of a joint one the student's alone has all of a chunk's tokens, see ``OTHERS_SHARE``. With ``student_waits`` the
    student's logits stay while the other models take turns beside them.
    """
    if not joint:
        return min(2 if student_waits else 1, linear_models)
    if not linear_student:
        return linear_models
    return 1 + (linear_models - 1) / OTHERS_SHARE[_kind(device_type)]


def _balanced(rows: int, chunk_size: int, device_type: str) -> int:
    """The chunk size with as many chunks but all of them nearly equal: 1040 tokens are not 1024 and 16."""
    chunks = -(-rows // chunk_size)
    return max(1, min(rows, chunk_size, _multiple(rows / max(1, chunks), device_type)))


# -------------------------------------------------------------------------------------------------------------- job


class Route(NamedTuple):
    """The models of a run of live tokens, those before ``stop`` that no earlier route has."""

    stop: int
    teacher: Head | None
    ref: Head | None


@dataclass(frozen=True)
class Job:
    """What the loop computes, checked and flattened: vectors have one entry per live token."""

    rows: TokenRows
    vocab_size: int
    chunk_size: int
    ops: RowOps
    student: Head
    teacher: Head | None = None  # only where it is needed and has a vocabulary axis; with routes those of the first
    ref: Head | None = None
    routes: tuple[Route, ...] = ()  # several teachers: the live tokens lie in the order of their routes
    estimator: Estimator = "sampled"
    divergence: Divergence = "reverse_kl"
    beta: float = 0.5
    reward_scale: float | Tensor = 1.0  # tensor: (n,)
    token_ids: Tensor | None = None  # (n,) int64
    teacher_logprobs: Tensor | None = None  # (n,) in place of a teacher
    ref_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    surrogate: Surrogate = PLAIN
    cu_seqlens: Tensor | None = None  # (B + 1,) int64 of packed tokens
    advantage_fn: AdvantageFn | None = None
    advantages: Tensor | None = None  # (2, n) the first two of TokenRow, where they are known already
    truncation: Truncation = topk.DEFAULT  # of the topk estimator
    support_ids: Tensor | None = None  # (n, K) int64, -1 is none; of the routes whose support comes from elsewhere
    teacher_topk: Tensor | None = None  # (n, K) log-probs of support_ids in place of a teacher, -inf beside -1
    ref_topk: Tensor | None = None
    labels: Tensor | None = None  # (n,) int64, -1 is none
    sft_weight: float = 1.0
    grad_filter: float = 0.0  # columns of a chunk's logit gradient that are below it everywhere are left out of GEMMs
    chunk_dtype: torch.dtype | None = None  # of linear models' logits; None is that of accumulation
    agreement: Agreement | None = None  # where ranks share a vocabulary
    others_size: int | None = None  # tokens of teacher and reference at a time in a joint row operation; None is all

    @property
    def truncated(self) -> bool:
        return self.estimator == "topk"

    @property
    def width(self) -> int:
        """The most tokens that a position of topk has: those of its support, and a label."""
        listed = 0 if self.support_ids is None else self.support_ids.shape[1]
        return max(self.truncation.k or 0, listed) + (self.labels is not None)

    @property
    def joint(self) -> bool:
        """Whether the row operation takes all models of a chunk together."""
        return looks_jointly(self.estimator, self.surrogate)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: float64 if any model's hidden states or logits are, else float32."""
        return accumulation_dtype(*(head.rows for head in self.heads))

    @property
    def heads(self) -> list[Head]:
        """Everything with a vocabulary axis, the student first."""
        routed = [head for route in self.routes for head in (route.teacher, route.ref)]
        return [head for head in (self.student, self.teacher, self.ref, *routed) if head is not None]

    @property
    def has(self) -> tuple[bool, bool]:
        """Whether there are a teacher and a reference."""
        return (
            self.teacher is not None or self.teacher_logprobs is not None,
            self.ref is not None or self.ref_logprobs is not None,
        )

    def parts(self) -> Iterator[tuple[int, int, Job]]:
        """Runs of live tokens that have one teacher and one reference, each as a job with these two."""
        if not self.routes:
            yield 0, self.rows.count, self
        start = 0
        for stop, teacher, ref in self.routes:
            yield start, stop, replace(self, teacher=teacher, ref=ref, routes=())
            start = stop

    @property
    def device(self) -> torch.device:
        return self.student.rows.device

    def columns(self, head: Head) -> int:
        """How much of the vocabulary this rank computes of a model."""
        return self.vocab_size if head.shard is None else head.shard.count

    @property
    def widest(self) -> int:
        """The most that this rank computes of any model: what a logits buffer has to hold."""
        return max(self.columns(head) for head in self.heads)

    def supervised(self, statistics: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Weights of the supervised term (0 where there is no label that counts), and the term itself, (n,) each."""
        assert self.labels is not None
        logprobs = statistics[TokenRow.LOGPROB_LABEL, rows]
        counts = supervised(logprobs, self.labels[rows])
        weights = torch.where(counts, self.sft_weight, torch.zeros_like(logprobs))
        return weights, torch.where(counts, -self.sft_weight * logprobs, 0)

    def model_logprobs(
        self, statistics: Tensor, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """log-probs of the sampled tokens under student, teacher and reference; None for a model that is not there."""

        def of(logit: Stat, logsum: Stat) -> Tensor:
            return token_logprob(statistics[logit, rows], statistics[logsum, rows])

        has_teacher, has_ref = self.has
        return (
            of(Stat.LOGIT_STUDENT, Stat.LOGSUM_STUDENT),
            of(Stat.LOGIT_TEACHER, Stat.LOGSUM_TEACHER) if has_teacher else None,
            of(Stat.LOGIT_REF, Stat.LOGSUM_REF) if has_ref else None,
        )

    def scale_of(self, rows: slice) -> float | Tensor:
        """lambda of some of the live tokens."""
        return self.reward_scale[rows] if isinstance(self.reward_scale, Tensor) else self.reward_scale

    def policy_term(self, statistics: Tensor, rows: slice = slice(None)) -> PolicyTerm:
        """The sampled estimator's token losses; all rows at once where ratios are those of whole sequences."""
        old, rollout = (None if x is None else x[rows] for x in (self.old_logprobs, self.rollout_logprobs))
        student = self.model_logprobs(statistics, rows)[0]

        def term(advantages: Tensor) -> PolicyTerm:
            return policy_term(self.surrogate, advantages, student, old, rollout, self._mean_over_sequences)

        used = term(statistics[TokenRow.ADVANTAGE, rows])
        if self.surrogate.baseline == "none":
            return used
        return replace(used, loss=term(statistics[TokenRow.REPORTED_ADVANTAGE, rows]).loss)

    def coefficients(self, statistics: Tensor, rows: slice = slice(None), chosen: Chosen | None = None) -> Coefficients:
        """Of the token losses before any weighting; ``chosen`` is what the topk estimator looked at."""
        if chosen is not None:
            weight, reach = (statistics[row, rows] for row in (TokenRow.TRUNCATED_WEIGHT, TokenRow.TRUNCATED_REACH))
            return Coefficients(None, weight, *chosen, reach)
        if self.estimator == "sampled":
            assert self.token_ids is not None
            ids, weight = self.token_ids[rows, None], -self.policy_term(statistics, rows).dlogprob
            if self.labels is None:
                return Coefficients(None, weight, ids)
            p = self.model_logprobs(statistics, rows)[0].exp()
            token = Entries(ids, (weight * (p - 1))[:, None], weight, weight.abs())
            ids, values, weight, reach = self.with_label(token, statistics, rows, p[:, None])
            return Coefficients(None, weight, ids, values, reach)
        one = torch.ones_like(statistics[0, rows])
        if self.labels is None:
            return Coefficients(one)
        return Coefficients(one, self.supervised(statistics, rows)[0], self.labels[rows, None])

    def with_label(self, entries: Entries, statistics: Tensor, rows: slice, probabilities: Tensor) -> Entries:
        """The gradient of these entries, and that of the supervised term; with p of their tokens."""
        assert self.labels is not None
        weights, _ = self.supervised(statistics, rows)
        label_probability = statistics[TokenRow.LOGPROB_LABEL, rows].exp()
        return entries.with_label(probabilities, self.labels[rows], weights, label_probability)

    def fill_advantages(self, statistics: Tensor, start: int, stop: int) -> None:
        """The advantages of rows [start, stop), once their log-probs are in the statistics."""
        rows = slice(start, stop)
        if self.advantages is not None:
            statistics[TokenRow.ADVANTAGE : TokenRow.REPORTED_ADVANTAGE + 1, rows] = self.advantages[:, rows]
            return
        student, teacher, ref = self.model_logprobs(statistics, rows)
        if teacher is None and ref is None and self.advantage_fn is None:
            return  # log-probs alone are asked for

        old = None if self.old_logprobs is None else self.old_logprobs[rows]
        scale = self.scale_of(rows)
        # what only a function of the user's looks at is made only for it; meanwhile the log-probs stand there
        stats = TokenStats(
            index=student,
            advantages=None,
            student_logprobs=student,
            teacher_logprobs=teacher,
            ref_logprobs=ref,
            old_logprobs=old,
            student_entropy=student,
            teacher_entropy=None,
            ref_entropy=None,
            reward_scale=scale,
        )
        if self.advantage_fn is not None:
            index = torch.arange(start, stop, device=self.device) if self.rows.index is None else self.rows.index[rows]
            elsewhere = (self.teacher_logprobs is not None, self.ref_logprobs is not None)
            entropies = [
                None if self.joint or given or model is None else statistics[row, rows]
                for given, model, row in zip(elsewhere, (teacher, ref), ENTROPY_ROWS, strict=True)
            ]
            stats = replace(
                stats,
                index=index,
                old_logprobs=None if old is None else old.clone(),  # not the caller's own memory
                student_entropy=entropy(statistics[:, rows]),
                teacher_entropy=entropies[0],
                ref_entropy=entropies[1],
                reward_scale=scale.clone() if isinstance(scale, Tensor) else scale,
            )
        expected = None
        if self.surrogate.baseline == "expected":
            expected, _ = divergence_value("reverse_kl", self.beta, scale, statistics[:, rows], self.has)
        used, reported = advantages_of(self.surrogate, stats, self.advantage_fn, expected)
        statistics[TokenRow.ADVANTAGE, rows] = used
        statistics[TokenRow.REPORTED_ADVANTAGE, rows] = reported

    def _mean_over_sequences(self, values: Tensor) -> Tensor:
        """(n,) values of all live tokens, each replaced by the mean over the live tokens of its sequence."""
        sequences = Sequences(self.rows.shape, self.cu_seqlens)
        total, count = (sequences.sum(self.rows.scatter(x)) for x in (values, torch.ones_like(values)))
        return self.rows.take(sequences.expand(total / count.clamp_min(1))).to(values.dtype)


class Chosen(NamedTuple):
    """The tokens that the topk estimator looked at (and a label), and the gradient at their logits."""

    token_ids: Tensor  # (n, K) int64, -1 is none
    values: Tensor  # (n, K)


class Coefficients(NamedTuple):
    """The gradients of losses with respect to the student's logits, one entry per live token or token of a chunk.

    divergence times the row operation's own, plus weight times p everywhere but at some tokens. Without ``values`` that
    is one token, at which it is weight (p - 1).
    """

    divergence: Tensor | None = None  # (n,)
    weight: Tensor | None = None  # (n,)
    token_ids: Tensor | None = None  # (n, K) int64, -1 is none
    values: Tensor | None = None  # (n, K) at these tokens
    reach: Tensor | None = None  # (n,) at least |weight| p at all others; None is |weight|

    def cut(self, rows: slice) -> Coefficients:
        return Coefficients(*(None if x is None else x[rows] for x in self))

    def times(self, factor: Tensor) -> Coefficients:
        """All multiplied by a factor () or (n,)."""
        column = factor if factor.ndim == 0 else factor[:, None]
        factors = (factor, factor, None, column, factor.abs())
        return Coefficients(*(x if x is None or f is None else x * f for x, f in zip(self, factors, strict=True)))

    def over(self, size: Tensor) -> Coefficients:
        """All divided by a size (n,), to the last bit."""
        sizes = (size, size, None, size[:, None], size)
        return Coefficients(*(x if x is None or s is None else x / s for x, s in zip(self, sizes, strict=True)))

    @property
    def size(self) -> Tensor:
        """(n,) the largest magnitude of a token's gradient, to a factor of its divergence's."""
        parts = [x.abs() for x in (self.divergence, self.weight if self.reach is None else self.reach) if x is not None]
        if self.values is not None and self.token_ids is not None:
            parts.append(self.values.masked_fill(self.token_ids < 0, 0).abs().amax(1))
        return torch.stack(parts).amax(0)


class Gradients(NamedTuple):
    """Gradients of the student's tensors; None for what does not require one."""

    rows: Tensor | None  # of hidden or logits, (tokens, H or V), in their dtype
    weight: Tensor | None  # (V, H), in the accumulation dtype
    bias: Tensor | None  # (V,), likewise


class Needs(NamedTuple):
    """Which of the student's tensors require a gradient."""

    rows: bool = False
    weight: bool = False
    bias: bool = False


NOTHING = Needs()


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two just above the largest magnitude in x, 1 where all is 0: exact to divide and multiply by."""
    largest = x.abs().amax() if x.numel() else x.new_ones(())
    exponent = torch.frexp(largest).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where((largest > 0) & torch.isfinite(largest), scale, torch.ones_like(scale))


class Scaling(NamedTuple):
    """How token weights are split between the loop and the backward, so that nothing underflows or rounds twice.

    float16 holds nothing below 6e-8, and a token weight of 1e-5 would push gradients of the size of p under it. So a
    float16 gradient is stored relative to a power of two, by which the backward multiplies exactly. Every other
    dtype has float32's range and is stored with its weights applied. The sum over tokens of the weight's gradient is
    float32 and takes a factor that all tokens share at the end, unless folding it into float32 operands is free.
    """

    relative: Tensor  # () or (n,) what the loop applies
    rows: Tensor | None  # () what remains for the rows' gradient; None is 1
    weight: Tensor | None  # () what remains for the weight's and the bias's gradient

    @classmethod
    def of(cls, job: Job, weights: Tensor) -> Scaling:
        student = job.student
        if isinstance(student, Logits):
            return cls(weights, None, None)
        scale = _power_of_two(weights) if student.hidden.dtype == torch.float16 else None
        relative = weights if scale is None else weights / scale
        return cls(relative, scale, scale if _folds(student, weights) else weights)


def _folds(student: LinearHead, weights: Tensor) -> bool:
    """Whether the token weights are multiplied into the hidden states that the weight's gradient sums over."""
    # the hidden states' dtype is that of the products: a master weight is rounded to it
    return weights.ndim > 0 or gemm.gradient_dtype(student.hidden) in (torch.float32, torch.float64)


def _as_multiplied(job: Job) -> Job:
    """The job with float32 master weights rounded to the dtype of their hidden states, once for all chunks."""
    rounded: dict[tuple[Any, ...], Tensor] = {}  # models and routes may share a weight

    def of(head: Head | None) -> Any:
        if not isinstance(head, LinearHead) or head.weight.dtype == head.hidden.dtype:
            return head
        weight = head.weight.detach()
        key = (weight.data_ptr(), weight.shape, weight.stride(), head.hidden.dtype)
        if key not in rounded:
            rounded[key] = weight.to(head.hidden.dtype)
        return replace(head, weight=rounded[key])

    routes = tuple(Route(route.stop, of(route.teacher), of(route.ref)) for route in job.routes)
    return replace(job, student=of(job.student), teacher=of(job.teacher), ref=of(job.ref), routes=routes)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


class _Sink:
    """Takes the logit gradients of chunks in, gives the gradients of the student's tensors out."""

    def __init__(self, job: Job, needs: Needs) -> None:
        self._job, student = job, job.student
        self.rows = self.weight = self.bias = None
        if needs.rows:
            source = student.rows
            # zeroed only where the loop does not write: masked tokens, and logits past the joint vocabulary
            everywhere = job.rows.index is None and (
                isinstance(student, LinearHead) or source.shape[-1] == job.columns(student)
            )
            self.rows = memory.empty((job.rows.shape.numel(), source.shape[-1]), source.dtype, source.device)
            if not everywhere:
                self.rows.zero_()
        if isinstance(student, LinearHead) and needs.weight:
            # the first chunk overwrites the joint vocabulary's part; the padding past it is never written
            self.weight = memory.empty(student.weight.shape, accumulation_dtype(student.weight), job.device)
            self.weight[job.columns(student) if job.rows.count and not job.grad_filter else 0 :].zero_()
        if isinstance(student, LinearHead) and needs.bias:
            self.bias = student.weight.new_zeros(student.weight.shape[0], dtype=accumulation_dtype(student.weight))

    @property
    def wanted(self) -> bool:
        return not (self.rows is None and self.weight is None and self.bias is None)

    def add(
        self,
        dlogits: Tensor,  # (C, V) at unit scale
        hidden: Tensor,  # (C, H) of the student
        rows_scale: Tensor | None,  # () or (C,) factor on the rows' gradient, applied in float32 before it is rounded
        weight_scale: Tensor | None,  # () or (C,) factor on what the weight's and the bias's gradient sum over
        start: int,
        stop: int,
    ) -> None:
        student, smallest = self._job.student, self._job.grad_filter
        assert isinstance(student, LinearHead)
        V = self._job.columns(student)
        if weight_scale is not None and self.weight is not None:
            # on the hidden states, not on the logit gradient, which has to stay at unit scale
            scale = weight_scale if weight_scale.ndim == 0 else weight_scale[:, None]
            hidden = (hidden.to(scale.dtype) * scale).to(dlogits.dtype)
        weight, total = student.weight[:V], None if self.weight is None else self.weight[:V]
        columns = gemm.selected(dlogits, smallest) if smallest else None
        rows: Tensor | None = None
        if columns is not None:
            rows = gemm.selected_products(dlogits, weight, columns, hidden, total, self.rows is not None)
        elif self.rows is not None:
            rows = gemm.dhidden(dlogits, weight)
        summed = None
        if rows is not None and student.shard is not None and student.shard.reduce_hidden:
            summed = student.shard.sum_(rows)  # over the ranks, beside the next product
        if columns is None and total is not None:
            gemm.add_dweight_(total, dlogits, hidden, first=start == 0 and not smallest)
        if summed is not None:
            summed.wait()
        if self.rows is not None and rows is not None:
            if rows_scale is not None:
                rows.mul_(rows_scale if rows_scale.ndim == 0 else rows_scale[:, None])
            self._job.rows.put(self.rows, rows, start, stop)
        if self.bias is not None:
            scale = self.bias.new_ones(()) if weight_scale is None else weight_scale
            gemm.add_dbias_(self.bias[:V], dlogits, scale)

    def logits_buffer(self, start: int, stop: int) -> Tensor:
        """Where the gradient of a chunk of ``Logits`` goes: straight into the result, unless rows are missing."""
        job = self._job
        assert self.rows is not None
        if job.rows.index is None:
            return self.rows[start:stop]
        return self.rows.new_empty(stop - start, job.columns(job.student))

    def put_logits(self, buffer: Tensor, start: int, stop: int) -> None:
        assert self.rows is not None
        if self._job.rows.index is not None:
            self._job.rows.put(self.rows[:, : buffer.shape[1]], buffer, start, stop)

    def result(self) -> Gradients:
        return Gradients(self.rows, self.weight, self.bias)


class _Buffers:
    """The chunk's logits buffers, one per linear model that is alive at once, allocated on first use."""

    def __init__(self, job: Job, chunk_size: int) -> None:
        self._job, self._chunk_size = job, chunk_size
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._held: tuple[int, ModelRows] | None = None  # the student's rows of a whole chunk, and where they start

    def hold(self, start: int, stop: int) -> Tensor:
        """Load the student's rows of a chunk, of which ``load`` gives parts until they are released; returns them."""
        rows = self.load(self._job.student, "student", start, stop)
        self._held = start, rows
        return rows.raw

    def release(self) -> None:
        self._held = None

    def load(self, head: Head, slot: str, start: int, stop: int, writable: bool = False) -> ModelRows:
        """The raw logits of rows [start, stop) of a model; the caller's own memory only where it is not written to."""
        job = self._job
        if self._held is not None and slot == "student":
            first, rows = self._held
            return replace(rows, raw=rows.raw[start - first : stop - first])
        columns = job.columns(head)
        if isinstance(head, Logits):
            raw = job.rows.take(head.logits, start, stop)
            if writable:
                raw = self._buffer(slot, raw.dtype, stop - start, columns).copy_(raw[:, :columns])
            return ModelRows(raw if raw.stride(-1) == 1 else raw.contiguous(), _transform(head))
        dtype = accumulation_dtype(head.weight) if job.chunk_dtype is None else job.chunk_dtype
        out = self._buffer(slot, dtype, stop - start, columns)
        if columns:
            gemm.logits_(out, job.rows.take(head.hidden, start, stop), head.weight[:columns])
        return ModelRows(out, _transform(head))

    def _buffer(self, slot: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        if (slot, dtype) not in self._buffers:
            others = self._job.others_size
            size = self._chunk_size if others is None or slot == "student" else min(others, self._chunk_size)
            # rows start on aligned addresses, so that kernels can load whole vectors
            width = -(-self._job.widest // _ROW_MULTIPLE) * _ROW_MULTIPLE
            self._buffers[slot, dtype] = memory.empty((size, width), dtype, self._job.device)
        return self._buffers[slot, dtype][:rows, :columns]


def _transform(head: Head) -> LogitTransform:
    bias = head.bias if isinstance(head, LinearHead) else None
    return LogitTransform(head.logit_scale, head.softcap, head.temperature, bias)


def _local(shard: VocabShard | None, token_ids: Tensor) -> Tensor:
    """Ids among the columns that this rank computes; -1 elsewhere."""
    return token_ids if shard is None else shard.local(token_ids)


# Slices and loops: an index that is a list would be copied to the device, which waits for it.
_LOGSUMS = slice(Stat.LOGSUM_STUDENT, Stat.LOGSUM_TARGET + 1)
_LOGITS = slice(Stat.LOGIT_STUDENT, Stat.LOGIT_REF + 1)


def _own_statistics(ops: RowOps, problem: RowProblem) -> Tensor:
    """Those of the columns that this rank computes, of which it may have none."""
    if problem.vocab_size:
        return ops.statistics(problem)
    models = [m.raw for m in (problem.student, problem.teacher, problem.ref) if m is not None]
    own = torch.zeros(len(Stat), problem.rows, dtype=accumulation_dtype(*models), device=models[0].device)
    own[_LOGSUMS] = -math.inf
    return own


def _merge(
    shard: VocabShard,
    own: Tensor,  # (len(Stat), C) of this rank's columns
    token_ids: Tensor | None,  # (C,) of these columns, -1 is another rank's
    *along: Tensor,  # (k, C) of which the largest of any rank is wanted
    reward_scale: float | Tensor = 1.0,
    has: tuple[bool, bool] = (False, False),
    divergence: Divergence | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Statistics of all ranks' columns; one collective."""
    if token_ids is not None:
        own[_LOGITS].masked_fill_(token_ids < 0, -math.inf)
    sent = merged_statistics(has, divergence, token_ids is not None)
    gathered = shard.gather(torch.cat((torch.stack([own[stat] for stat in sent]), *along)))
    parts = own.new_zeros((gathered.shape[0], *own.shape))
    for i, stat in enumerate(sent):
        parts[:, stat] = gathered[:, i]
    rest = torch.split(gathered[:, len(sent) :].amax(0), [x.shape[0] for x in along]) if along else ()
    return merge(parts, reward_scale, has, divergence), list(rest)


def _refuse_far_target(origin: Tensor, divergence: Divergence) -> None:
    """Raise where the target's largest logit (C,) is so far from 0 that its rounding shows in the target.

    Each rank rounds u relative to the maxima of its own columns, the gradient relative to those of the whole row. Where
    the two are an eighth apart a target's probability is off by as much.
    """
    limit = 0.125 / torch.finfo(origin.dtype).eps
    message = (
        f"divergence={divergence!r} over a shared vocabulary needs a target lambda log q + (1 - lambda) log r of at "
        f"most {limit:.3g}: a model alone has a larger mask (give teacher and reference the same one)"
    )
    refuse(origin.abs() > limit, origin, ValueError, message)


def _statistics(job: Job, problem: RowProblem, *along: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Statistics of the rows of a chunk over the whole vocabulary, and what goes along as in :func:`_merge`."""
    shard = job.student.shard
    own = _own_statistics(job.ops, problem)
    if shard is None:
        return own, list(along)
    has = problem.teacher is not None, problem.ref is not None
    divergence = None if problem.divergence == "none" else problem.divergence
    merged, rest = _merge(
        shard, own, problem.token_ids, *along, reward_scale=problem.reward_scale, has=has, divergence=divergence
    )
    if divergence in ("forward_kl", "jsd"):
        _refuse_far_target(merged[Stat.ORIGIN_TARGET], divergence)
    if divergence == "jsd":
        # the mixture needs the normalisers of the whole vocabulary: a second collective
        mixture = job.ops.jsd_parts(problem, merged) if problem.vocab_size else own.new_zeros(2, problem.rows)
        merged[Stat.STUDENT_PART : Stat.TARGET_PART + 1] = shard.gather(mixture).sum(0)
    return merged, rest


def _score(job: Job, head: Head, buffers: _Buffers, start: int, stop: int) -> Tensor:
    """Statistics of one model on its own for rows [start, stop), forward only."""
    assert job.token_ids is not None
    ids, columns = _local(head.shard, job.token_ids[start:stop]), job.columns(head)
    own: Tensor | None = None
    if isinstance(head, LinearHead) and columns:
        hidden = job.rows.take(head.hidden, start, stop)
        own = job.ops.linear_statistics(hidden, head.weight, _transform(head), columns, ids)
    if own is None:
        # the models of the sampled estimator take turns in the student's buffer
        problem = RowProblem(columns, buffers.load(head, "student", start, stop), token_ids=ids)
        own = _own_statistics(job.ops, problem)
    return own if head.shard is None else _merge(head.shard, own, ids)[0]


def _largest(head: Head, rows: ModelRows, columns: int, k: int) -> Tensor:
    """Ids (C, k) of a model's k largest logits, the largest first, whoever has their columns; one collective if so."""
    ids = sparse.top(rows, columns, k)
    if head.shard is None:
        return ids
    logits = sparse.logits_at(rows, ids)
    # a token that the model rules out still comes before none
    logits = torch.where(ids < 0, logits, logits.clamp_min(torch.finfo(logits.dtype).min))
    ids = torch.where(ids < 0, ids, ids + head.shard.start)
    # the bits of an id as a float of its size: one collective for both
    bits = _INTEGERS[logits.dtype]
    gathered = head.shard.gather(torch.stack((logits, ids.to(bits).view(logits.dtype))))  # (ranks, 2, C, k)
    logits, numbers = gathered.permute(1, 2, 0, 3).flatten(2).unbind(0)
    return numbers.contiguous().view(bits).gather(1, logits.topk(k).indices).to(torch.int64)


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _in_own_precision(loop: Callable[..., T]) -> Callable[..., T]:
    """The loop chooses its own precision: autocast would turn its float32 GEMMs on a CPU into bfloat16 ones."""

    @functools.wraps(loop)
    def wrapped(job: Job, *arguments: Any, **options: Any) -> T:
        with gemm.without_autocast(job.device):
            return loop(job, *arguments, **options)

    return wrapped


class Run(NamedTuple):
    """What the loop leaves."""

    statistics: Tensor  # (STATISTICS, n)
    gradients: Gradients
    chosen: Chosen | None  # of topk, for a backward after statistics alone


@_in_own_precision
def run(
    job: Job,
    needs: Needs = NOTHING,
    *,
    relative: Tensor | None = None,  # () or (n,) token weights; with them the gradients come with the statistics
    statistics: Tensor | None = None,  # (STATISTICS, n) of an earlier run; with them only gradients are computed ...
    coefficients: Coefficients | None = None,  # ... for these complete coefficients per token
) -> Run:
    """Run the loop in one of three ways.

    1. statistics only; ``needs`` says what a backward will ask for;
    2. with ``relative``: statistics, and the gradients of sum_i relative_i loss_i; each GEMM once. Where
       :class:`Scaling` leaves a shared weight to the end, the weight's gradient lacks it;
    3. with ``statistics`` and ``coefficients``: complete gradients, the student's logits recomputed.
    """
    n = job.rows.count
    job = _as_multiplied(job)
    if coefficients is None:
        _require_agreement(job, needs, relative is not None)
    parts = [(start, stop, part) for start, stop, part in job.parts() if stop > start]
    steps = [_balanced(stop - start, job.chunk_size, job.device.type) for start, stop, _ in parts]
    sink = _Sink(job, needs if relative is not None or coefficients is not None else NOTHING)
    out = torch.zeros(STATISTICS, n, dtype=job.dtype, device=job.device) if statistics is None else statistics
    buffers = _Buffers(job, max(steps, default=1))
    # kept for a backward alone: it is as large as what a server sends
    keeps = job.truncated and relative is None and coefficients is None and any(needs)
    chosen = _no_tokens(job) if keeps else None
    shared = None
    if coefficients is not None and isinstance(job.student, LinearHead) and job.student.hidden.dtype == torch.float16:
        # under a loss scale the weights may be large, and float16 hidden states times them overflow
        shared = _power_of_two(coefficients.size)
    for (begin, end, part), step in zip(parts, steps, strict=True):
        for start in range(begin, end, step):
            stop = min(start + step, end)
            if statistics is None and not part.joint and not part.truncated:
                _score_others(part, buffers, out, start, stop)
            if coefficients is not None:
                make = functools.partial(_gradient_part, part, buffers, sink, out, coefficients, shared)
                _gradients(part, buffers, sink, make, start, stop)
            elif sink.wanted:
                assert relative is not None
                make = functools.partial(_fused_part, part, buffers, sink, out, relative)
                _gradients(part, buffers, sink, make, start, stop)
            else:
                look = functools.partial(_statistics_part, part, buffers, out)
                (looked_at, *_), _ = _in_parts(part, buffers, look, start, stop)
                if chosen is not None and looked_at is not None:
                    for kept, values in zip(chosen, looked_at, strict=True):
                        kept[start:stop, : values.shape[1]] = values  # routes may differ in how many tokens they have
    if shared is not None:
        for total in (sink.weight, sink.bias):
            if total is not None:
                total.mul_(shared)
    return Run(out, sink.result(), chosen)


def _require_agreement(job: Job, needs: Needs = NOTHING, fused: bool = False, k: int | None = None) -> None:
    """Raise on all ranks unless those that share a vocabulary make the same call and go through the same chunks.

    Args:
        fused: whether the gradients come with the statistics.
        k: of ``token_topk``; every call compares as many values, so that different calls are compared, too.
    """
    if job.agreement is not None:
        more = {"requires_grad": tuple(needs), "gradients in the forward": fused, "k": k}
        require_agreement(job.agreement, job.device, {"tokens per chunk": job.chunk_size, **more})


@_in_own_precision
def most_likely(job: Job, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs, token shape + (k,), of the student's k most likely tokens; -1 and 0 where masked."""
    job = _as_multiplied(job)
    shape = (job.rows.shape.numel(), k)
    ids = torch.full(shape, -1, dtype=torch.int64, device=job.device)
    logprobs = torch.zeros(shape, dtype=job.dtype, device=job.device)
    _require_agreement(job, k=k)
    step = _balanced(job.rows.count, job.chunk_size, job.device.type)
    buffers = _Buffers(job, step)
    for start in range(0, job.rows.count, step):
        stop = min(start + step, job.rows.count)
        problem = _problem(job, buffers, start, stop)
        largest = _largest(job.student, problem.student, problem.vocab_size, k)
        logits = sparse.logits_at(problem.student, _local(job.student.shard, largest))
        statistics, along = _statistics(job, problem, logits.T)
        values = sparse.logprobs(statistics, along[0].T)
        job.rows.put(ids, largest, start, stop)
        job.rows.put(logprobs, values, start, stop)
    return ids.reshape(*job.rows.shape, k), logprobs.reshape(*job.rows.shape, k)


def _no_tokens(job: Job) -> Chosen:
    shape = (job.rows.count, job.width)
    ids = torch.full(shape, -1, dtype=torch.int64, device=job.device)
    return Chosen(ids, torch.zeros(shape, dtype=job.dtype, device=job.device))


def _problem(job: Job, buffers: _Buffers, start: int, stop: int, writable: bool = False) -> RowProblem:
    """The rows of a chunk, logits computed. Without a joint row operation it sees the student alone."""
    full = job.joint
    return RowProblem(
        job.columns(job.student),
        buffers.load(job.student, "student", start, stop, writable),
        buffers.load(job.teacher, "teacher", start, stop) if full and job.teacher is not None else None,
        buffers.load(job.ref, "ref", start, stop) if full and job.ref is not None else None,
        job.scale_of(slice(start, stop)) if full else 1.0,
        None if job.token_ids is None else _local(job.student.shard, job.token_ids[start:stop]),
        # the sampled estimator's is the reverse KL, which it estimates
        job.divergence if full else "none",
        job.beta,
    )


def _score_others(job: Job, buffers: _Buffers, statistics: Tensor, start: int, stop: int) -> None:
    """Teacher and reference of the sampled estimator, before the student needs their buffer."""
    for head, given, logsum, logit, entropy_row in (
        (job.teacher, job.teacher_logprobs, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER, TokenRow.ENTROPY_TEACHER),
        (job.ref, job.ref_logprobs, Stat.LOGSUM_REF, Stat.LOGIT_REF, TokenRow.ENTROPY_REF),
    ):
        if head is None and given is not None:
            statistics[logit, start:stop] = given[start:stop]  # less a normaliser of 0
        elif head is not None:
            scored = _score(job, head, buffers, start, stop)
            statistics[logsum, start:stop] = scored[Stat.LOGSUM_STUDENT]
            statistics[logit, start:stop] = scored[Stat.LOGIT_STUDENT]
            if job.advantage_fn is not None:
                statistics[entropy_row, start:stop] = entropy(scored)


# What an estimator that looks at one model at a time takes from the row operation on the student; the other rows hold
# teacher and reference.
_STUDENT_STATS = [Stat.LOGSUM_STUDENT, Stat.MEAN_LOGIT, Stat.LOGIT_STUDENT, Stat.MAX_STUDENT]


def _store(job: Job, statistics: Tensor, chunk: Tensor, start: int, stop: int) -> None:
    if job.joint:
        statistics[: len(Stat), start:stop] = chunk
    else:
        for stat in _STUDENT_STATS:
            statistics[stat, start:stop] = chunk[stat]
    if job.estimator == "sampled":
        job.fill_advantages(statistics, start, stop)


class _Look(NamedTuple):
    """A chunk whose statistics are known and whose student's logits are still there."""

    problem: RowProblem
    statistics: Tensor  # (len(Stat), C)
    chosen: Chosen | None


def _look(job: Job, buffers: _Buffers, statistics: Tensor, start: int, stop: int) -> _Look:
    """Statistics of a chunk, with what single tokens of the vocabulary are read for."""
    cut = slice(start, stop)
    support = None
    if job.truncated:
        support = _support(job, buffers, statistics, start, stop)
        problem = support.problem or _problem(job, buffers, start, stop, writable=True)
    else:
        problem = _problem(job, buffers, start, stop)
    along: list[Tensor] = []
    if job.labels is not None:
        labels = _local(job.student.shard, job.labels[cut, None])
        along = [sparse.supported(problem, labels, sparse.logits_at(problem.student, labels)).T]
    if support is None:
        chunk, along = _statistics(job, problem, *along)
    else:
        chunk, student, along = _statistics_around(
            job.ops, problem, support.token_ids, rows_of(job.token_ids, cut), job.student.shard, *along
        )
    _store(job, statistics, chunk, start, stop)
    if along:
        statistics[TokenRow.LOGPROB_LABEL, cut] = sparse.logprobs(chunk, along[0].T)[:, 0]
    if support is None:
        return _Look(problem, chunk, None)
    loss, kl, gradient = topk.term(
        job.truncation.tail,
        job.divergence,
        job.beta,
        job.scale_of(cut),
        support.token_ids,
        student,
        support.teacher,
        support.ref,
    )
    if job.labels is not None:
        gradient = job.with_label(gradient, statistics, cut, student.logprobs.exp())
    ids, values, weight, reach = gradient
    for row, vector in (
        (TokenRow.TRUNCATED_LOSS, loss),
        (TokenRow.TRUNCATED_KL, kl),
        (TokenRow.TRUNCATED_WEIGHT, weight),
        (TokenRow.TRUNCATED_REACH, reach),
    ):
        statistics[row, cut] = vector
    return _Look(problem, chunk, Chosen(ids, values))


class _Support(NamedTuple):
    """The tokens that topk looks at, and the frozen models on them."""

    token_ids: Tensor  # (C, K) int64, -1 is none
    teacher: OnSupport | None
    ref: OnSupport | None
    problem: RowProblem | None  # the student's rows, where they had to be there first


def _support(job: Job, buffers: _Buffers, statistics: Tensor, start: int, stop: int) -> _Support:
    """What the student ranks highest, or the first frozen model that there is; those before the student where possible.

    They need the buffer that the student's logits and their gradient then take.
    """
    cut, k = slice(start, stop), job.truncation.k
    problem, ids, slot = None, None, "student"
    if job.truncation.support == "student":
        assert k is not None
        problem, slot = _problem(job, buffers, start, stop, writable=True), "other"
        ids = _largest(job.student, problem.student, problem.vocab_size, k)
    models: list[OnSupport | None] = []
    for head, given, logsum, logit in (
        (job.teacher, job.teacher_topk, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER),
        (job.ref, job.ref_topk, Stat.LOGSUM_REF, Stat.LOGIT_REF),
    ):
        if head is not None:
            rows = buffers.load(head, slot, start, stop, writable=True)
            if ids is None:
                assert k is not None
                ids = _largest(head, rows, job.columns(head), k)
            sampled = rows_of(job.token_ids, cut)
            own_sampled = None if sampled is None else _local(head.shard, sampled)
            alone = RowProblem(job.columns(head), rows, token_ids=own_sampled)
            scored, on_support, _ = _statistics_around(job.ops, alone, ids, sampled, head.shard)
            statistics[logsum, cut] = scored[Stat.LOGSUM_STUDENT]
            statistics[logit, cut] = scored[Stat.LOGIT_STUDENT]
            models.append(on_support)
        elif given is not None:
            assert job.support_ids is not None
            ids = job.support_ids[cut] if ids is None else ids
            models.append(OnSupport(given[cut].to(job.dtype).masked_fill(ids < 0, -math.inf), None))
        else:
            models.append(None)
    assert ids is not None
    teacher, ref = models
    return _Support(ids, teacher, ref, problem)


def _statistics_around(
    ops: RowOps,
    problem: RowProblem,
    token_ids: Tensor,  # (C, K) of the whole vocabulary, like the next
    sampled: Tensor | None,  # (C,)
    shard: VocabShard | None = None,  # whose columns the problem has
    *along: Tensor,  # as in _merge
) -> tuple[Tensor, OnSupport, list[Tensor]]:
    """Statistics of a model alone, and its log-probs on some tokens and on the rest of the vocabulary.

    The rest is a sum of its own: as 1 less the others it would have an error of 1e-7, of which log makes a large one
    where the rest is light.
    """
    model = problem.student
    own_ids = _local(shard, token_ids)
    logits = sparse.logits_at(model, own_ids)
    with sparse.hidden(model, own_ids):
        rest = _own_statistics(ops, problem)
    more = list(along)
    if shard is not None:
        rest, (columns, *more) = _merge(shard, rest, problem.token_ids, logits.T, *along)
        logits = columns.T.contiguous()
    inside = TorchRowOps().statistics(RowProblem(logits.shape[1], ModelRows(logits, LogitTransform())))
    if sampled is not None:
        hit = logits.masked_fill(token_ids != sampled[:, None], -math.inf)
        inside[Stat.LOGIT_STUDENT] = hit.amax(1) - inside[Stat.MAX_STUDENT]
    statistics = merge(torch.stack((inside, rest)))
    logprobs = sparse.logprobs(statistics, logits)
    shift = rest[Stat.MAX_STUDENT] - statistics[Stat.MAX_STUDENT]
    log_rest = rest[Stat.LOGSUM_STUDENT] + shift - statistics[Stat.LOGSUM_STUDENT]
    empty = torch.isneginf(rest[Stat.LOGSUM_STUDENT])
    return statistics, OnSupport(logprobs, log_rest.masked_fill(empty, -math.inf)), more


def _statistics_part(job: Job, buffers: _Buffers, statistics: Tensor, start: int, stop: int) -> Chosen | None:
    if job.joint or job.truncated or job.labels is not None:
        return _look(job, buffers, statistics, start, stop).chosen
    _store(job, statistics, _score(job, job.student, buffers, start, stop), start, stop)
    return None


class _Part(NamedTuple):
    """The logit gradient of some rows of a chunk, and how the products with it are scaled (see ``_Sink.add``)."""

    dlogits: Tensor
    rows_scale: Tensor | None  # () or (n,)
    weight_scale: Tensor | None


def _in_parts(
    job: Job, buffers: _Buffers, make: Callable[[int, int], T], start: int, stop: int
) -> tuple[list[T], Tensor | None]:
    """Call ``make`` for as many rows of a chunk at a time as teacher and reference have.

    Returns what it made, and where there are several parts the student's logits of the chunk, as it left them.
    """
    step = stop - start if job.others_size is None else _balanced(stop - start, job.others_size, job.device.type)
    held = buffers.hold(start, stop) if step < stop - start else None
    made = [make(first, min(first + step, stop)) for first in range(start, stop, step)]
    buffers.release()
    return made, held


def _gradients(
    job: Job,
    buffers: _Buffers,
    sink: _Sink,
    make: Callable[[int, int], _Part | None],  # None of a student's logits, which need no product
    start: int,
    stop: int,
) -> None:
    """Gradients of a chunk: the logit gradient in parts, then one product of each kind."""
    made, held = _in_parts(job, buffers, make, start, stop)
    parts = [part for part in made if part is not None]
    if not parts:
        return
    assert isinstance(job.student, LinearHead)
    sink.add(
        parts[0].dlogits if held is None else _gradient_buffer(job.student, held),
        job.rows.take(job.student.hidden, start, stop),
        _joined([part.rows_scale for part in parts]),
        _joined([part.weight_scale for part in parts]),
        start,
        stop,
    )


def _joined(scales: list[Tensor | None]) -> Tensor | None:
    """The scales of a chunk's parts: one for all of them, or one for each row."""
    given = [x for x in scales if x is not None]
    if not given or given[0].ndim == 0:
        return scales[0]
    return given[0] if len(given) == 1 else torch.cat(given)


def _fused_part(
    job: Job, buffers: _Buffers, sink: _Sink, statistics: Tensor, relative: Tensor, start: int, stop: int
) -> _Part | None:
    cut = slice(start, stop)
    token_weights = relative if relative.ndim == 0 else relative[cut]
    sampled, linear = job.estimator == "sampled", isinstance(job.student, LinearHead)
    if job.truncated or job.labels is not None or job.student.shard is not None or (sampled and not linear):
        # the gradient waits for the statistics
        look = _look(job, buffers, statistics, start, stop)
        coefficients = job.coefficients(statistics, cut, look.chosen)
        folded = token_weights if isinstance(job.student, LinearHead) and _folds(job.student, relative) else None
        return _emit(job, look.problem, sink, look.statistics, coefficients, token_weights, folded, start, stop)
    problem = _problem(job, buffers, start, stop)
    if isinstance(job.student, Logits):
        buffer = sink.logits_buffer(start, stop)
        weights = GradientWeights(divergence=token_weights.expand(stop - start).contiguous())
        _store(job, statistics, job.ops.statistics_and_gradient(problem, weights, buffer), start, stop)
        sink.put_logits(buffer, start, stop)
        return None
    dlogits = _gradient_buffer(job.student, problem.student.raw)
    one = torch.ones(stop - start, dtype=job.dtype, device=job.device)
    unit = GradientWeights(token=one) if sampled else GradientWeights(divergence=one)
    _store(job, statistics, job.ops.statistics_and_gradient(problem, unit, dlogits), start, stop)
    slopes = -job.policy_term(statistics, cut).dlogprob if sampled else None
    rows_scale = _product(slopes, token_weights)
    return _Part(dlogits, rows_scale, rows_scale if _folds(job.student, relative) else slopes)


def _gradient_part(
    job: Job,
    buffers: _Buffers,
    sink: _Sink,
    statistics: Tensor,
    coefficients: Coefficients,
    shared: Tensor | None,
    start: int,
    stop: int,
) -> _Part | None:
    cut = slice(start, stop)
    problem = _problem(job, buffers, start, stop)
    chunk = statistics[: len(Stat), cut].contiguous()
    folded = None if shared is None else 1 / shared
    return _emit(job, problem, sink, chunk, coefficients.cut(cut), None, folded, start, stop)


def _emit(
    job: Job,
    problem: RowProblem,
    sink: _Sink,
    statistics: Tensor,  # (len(Stat), C) of the problem
    coefficients: Coefficients,  # (C,)
    rows_factor: Tensor | None,  # () or (C,) what else multiplies the rows' gradient
    weight_factor: Tensor | None,  # () or (C,) what else multiplies that of the weight and the bias
    start: int,
    stop: int,
) -> _Part | None:
    """Turn logits whose statistics are known into their gradient."""
    if isinstance(job.student, Logits):
        buffer = sink.logits_buffer(start, stop)
        complete = coefficients if rows_factor is None else coefficients.times(rows_factor)
        _write_gradient(job, problem, statistics, complete, buffer)
        sink.put_logits(buffer, start, stop)
        return None
    dlogits = _gradient_buffer(job.student, problem.student.raw)
    size = _write_gradient(job, problem, statistics, coefficients, dlogits, unit=True)
    return _Part(dlogits, _product(size, rows_factor), _product(size, weight_factor))


def _write_gradient(
    job: Job, problem: RowProblem, statistics: Tensor, coefficients: Coefficients, out: Tensor, unit: bool = False
) -> Tensor:
    """Write a chunk's logit gradient; with ``unit`` each row over its size, which is returned.

    One token is the row operation's own term. Where there are more it makes the dense part, and their entries are
    overwritten.
    """
    size = coefficients.size
    if unit:
        if coefficients.weight is not None and coefficients.reach is not None:
            # a student that is certain: what is left underflows, and weight over that is inf, times p = 0 NaN
            size = size.masked_fill(size < 4 * torch.finfo(size.dtype).tiny * coefficients.weight.abs(), 0)
        coefficients = coefficients.over(torch.where(size > 0, size, torch.ones_like(size)))
    divergence, weight, ids, values, _ = coefficients
    if not problem.vocab_size:
        return size
    ids = None if ids is None else _local(job.student.shard, ids)
    logits = None if ids is None or values is None else sparse.logits_at(problem.student, ids)
    if ids is not None:
        problem = replace(problem, token_ids=ids[:, 0].contiguous())
    job.ops.gradient(problem, statistics, GradientWeights(divergence, weight), out)
    if ids is not None and values is not None and logits is not None:
        sparse.overwrite(out, problem.student.transform, ids, values, logits)
    return size


def _gradient_buffer(head: LinearHead, logits: Tensor) -> Tensor:
    """Where a chunk's logit gradient goes: over the logits, each row in the dtype that the GEMMs want."""
    dtype = gemm.gradient_dtype(head.weight)
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]
