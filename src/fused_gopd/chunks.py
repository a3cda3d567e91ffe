"""The one loop over token chunks: GEMM -> row operation -> GEMMs, and its memory plan.

A chunk's logits live in buffers of C x V elements that every chunk reuses; the student's buffer becomes its own
gradient in place. Nothing here knows an objective beyond what it asks of :mod:`fused_gopd.objective` per token, and
nothing here knows a machine beyond the row operations and GEMMs that it calls.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import gemm, memory, objective
from .heads import Head, LinearHead, Logits
from .objective import PLAIN, AdvantageFn, Divergence, Estimator, Sequences, Surrogate, TokenStats
from .rowops import GradientWeights, LogitTransform, ModelRows, RowOps, RowProblem, Stat
from .rowops.torch import accumulation_dtype

# ------------------------------------------------------------------------------------------------------ memory plan

# Bytes for all the logits buffers of a chunk together.
# CPU: at V = 151936 and three models 256 MiB give chunks of 144 tokens; GEMMs of 128 to 512 rows ran at the same rate
# within 10 % on two AVX-512 cores, so a larger budget buys nothing.
# GPU: 1.75 GiB give the 1024 tokens that the accumulation of the weight gradient needs (C / 4 FLOP per byte).
CHUNK_BUDGET_BYTES = {"cpu": 256 << 20, "gpu": 1792 << 20}
# Never fewer tokens than this by default, whatever the budget.
CHUNK_FLOOR = {"cpu": 32, "gpu": 1024}
# More tokens than this make no GEMM faster.
CHUNK_CEILING = 8192
_CHUNK_MULTIPLE = 16
# Elements that the row stride of a logits buffer is a multiple of: 64 bytes of float32, 32 of bfloat16 over it.
_ROW_MULTIPLE = 16


def chunk_size_for(vocab_size: int, buffers: int, device_type: str, element_bytes: int = 4) -> int:
    """Tokens per chunk for a number of C x V logits buffers.

    Depends on shapes, dtype and the kind of device only, never on free memory or a timing: two runs give the same bits.
    """
    kind = "cpu" if device_type == "cpu" else "gpu"
    fitting = CHUNK_BUDGET_BYTES[kind] // max(1, buffers * vocab_size * element_bytes)
    fitting -= fitting % _CHUNK_MULTIPLE
    return int(min(CHUNK_CEILING, max(CHUNK_FLOOR[kind], fitting)))


def logits_buffers(joint: bool, linear_models: int) -> int:
    """C x V buffers alive at once: a joint row operation holds all models of a chunk, else they take turns."""
    return linear_models if joint else min(1, linear_models)


class TokenRow(enum.IntEnum):
    """Rows of the loop's statistics after those of :class:`Stat`: what the sampled estimator knows of a token."""

    ADVANTAGE = len(Stat)  # as the gradient uses it
    REPORTED_ADVANTAGE = len(Stat) + 1  # as the loss reports it, without the baseline
    ENTROPY_TEACHER = len(Stat) + 2
    ENTROPY_REF = len(Stat) + 3


STATISTICS = len(Stat) + len(TokenRow)
_ENTROPIES = (TokenRow.ENTROPY_TEACHER, TokenRow.ENTROPY_REF)


def _balanced(rows: int, chunk_size: int) -> int:
    """The chunk size with as many chunks but all of them nearly equal: 1040 tokens are not 1024 and 16."""
    chunks = -(-rows // chunk_size)
    even = -(-rows // max(1, chunks))
    return min(chunk_size, -(-even // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)


# -------------------------------------------------------------------------------------------------------- live rows


@dataclass(frozen=True)
class TokenRows:
    """Which tokens are computed: all of a token shape, or those at ``index``, in its order."""

    shape: torch.Size
    index: Tensor | None = None  # (n,) int64 flat positions

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
            return values.reshape(self.shape)
        return values.new_zeros(self.shape.numel()).index_copy(0, self.index, values).reshape(self.shape)


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

    @property
    def joint(self) -> bool:
        """Whether the row operation takes all models of a chunk together."""
        return objective.looks_jointly(self.estimator, self.surrogate)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: float64 if any model's hidden states or logits are, else float32."""
        routed = [head for route in self.routes for head in (route.teacher, route.ref)]
        heads = [self.student, self.teacher, self.ref, *routed]
        return accumulation_dtype(*(head.rows for head in heads if head is not None))

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

    def model_logprobs(
        self, statistics: Tensor, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """log-probs of the sampled tokens under student, teacher and reference; None for a model that is not there."""

        def of(logit: Stat, logsum: Stat) -> Tensor:
            return objective.token_logprob(statistics[logit, rows], statistics[logsum, rows])

        has_teacher, has_ref = self.has
        return (
            of(Stat.LOGIT_STUDENT, Stat.LOGSUM_STUDENT),
            of(Stat.LOGIT_TEACHER, Stat.LOGSUM_TEACHER) if has_teacher else None,
            of(Stat.LOGIT_REF, Stat.LOGSUM_REF) if has_ref else None,
        )

    def scale_of(self, rows: slice) -> float | Tensor:
        """lambda of some of the live tokens."""
        return self.reward_scale[rows] if isinstance(self.reward_scale, Tensor) else self.reward_scale

    def policy_term(self, statistics: Tensor, rows: slice = slice(None)) -> objective.PolicyTerm:
        """The sampled estimator's token losses; all rows at once where ratios are those of whole sequences."""
        old, rollout = (None if x is None else x[rows] for x in (self.old_logprobs, self.rollout_logprobs))
        student = self.model_logprobs(statistics, rows)[0]

        def term(advantages: Tensor) -> objective.PolicyTerm:
            return objective.policy_term(self.surrogate, advantages, student, old, rollout, self._mean_over_sequences)

        used = term(statistics[TokenRow.ADVANTAGE, rows])
        if self.surrogate.baseline == "none":
            return used
        return replace(used, loss=term(statistics[TokenRow.REPORTED_ADVANTAGE, rows]).loss)

    def fill_advantages(self, statistics: Tensor, start: int, stop: int) -> None:
        """The advantages of rows [start, stop), once their log-probs are in the statistics."""
        rows = slice(start, stop)
        if self.advantages is not None:
            statistics[TokenRow.ADVANTAGE : TokenRow.REPORTED_ADVANTAGE + 1, rows] = self.advantages[:, rows]
            return
        student, teacher, ref = self.model_logprobs(statistics, rows)
        if teacher is None and ref is None:
            return  # log-probs alone are asked for

        old = None if self.old_logprobs is None else self.old_logprobs[rows]
        scale = self.scale_of(rows)
        # what only a function of the user's looks at is made only for it; meanwhile the log-probs stand there
        stats = TokenStats(student, student, student, teacher, ref, old, student, None, None, scale)
        if self.advantage_fn is not None:
            index = torch.arange(start, stop, device=self.device) if self.rows.index is None else self.rows.index[rows]
            elsewhere = (self.teacher_logprobs is not None, self.ref_logprobs is not None)
            entropies = [
                None if self.joint or given or model is None else statistics[row, rows]
                for given, model, row in zip(elsewhere, (teacher, ref), _ENTROPIES, strict=True)
            ]
            stats = replace(
                stats,
                index=index,
                old_logprobs=None if old is None else old.clone(),  # not the caller's own memory
                student_entropy=objective.entropy(statistics[:, rows]),
                teacher_entropy=entropies[0],
                ref_entropy=entropies[1],
                reward_scale=scale.clone() if isinstance(scale, Tensor) else scale,
            )
        expected = None
        if self.surrogate.baseline == "expected":
            expected, _ = objective.divergence_value("reverse_kl", self.beta, scale, statistics[:, rows], self.has)
        used, reported = objective.advantages_of(self.surrogate, stats, self.advantage_fn, expected)
        statistics[TokenRow.ADVANTAGE, rows] = used
        statistics[TokenRow.REPORTED_ADVANTAGE, rows] = reported

    def _mean_over_sequences(self, values: Tensor) -> Tensor:
        """(n,) values of all live tokens, each replaced by the mean over the live tokens of its sequence."""
        sequences = Sequences(self.rows.shape, self.cu_seqlens)
        total, count = (sequences.sum(self.rows.scatter(x)) for x in (values, torch.ones_like(values)))
        return self.rows.take(sequences.expand(total / count.clamp_min(1))).to(values.dtype)


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
    return weights.ndim > 0 or gemm.gradient_dtype(student.weight) in (torch.float32, torch.float64)


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
                isinstance(student, LinearHead) or student.vocab_size == job.vocab_size
            )
            self.rows = memory.empty((job.rows.shape.numel(), source.shape[-1]), source.dtype, source.device)
            if not everywhere:
                self.rows.zero_()
        if isinstance(student, LinearHead) and needs.weight:
            # the first chunk overwrites the joint vocabulary's part; the padding past it is never written
            self.weight = memory.empty(student.weight.shape, accumulation_dtype(student.weight), job.device)
            self.weight[job.vocab_size if job.rows.count else 0 :].zero_()
        if isinstance(student, LinearHead) and needs.bias:
            self.bias = student.weight.new_zeros(student.vocab_size, dtype=accumulation_dtype(student.weight))

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
        student, V = self._job.student, self._job.vocab_size
        assert isinstance(student, LinearHead)
        if self.rows is not None:
            rows = gemm.dhidden(dlogits, student.weight[:V])
            if rows_scale is not None:
                rows.mul_(rows_scale if rows_scale.ndim == 0 else rows_scale[:, None])
            self._job.rows.put(self.rows, rows, start, stop)
        if self.weight is not None:
            if weight_scale is not None:
                # on the hidden states, not on the logit gradient, which has to stay at unit scale
                scale = weight_scale if weight_scale.ndim == 0 else weight_scale[:, None]
                hidden = (hidden.to(scale.dtype) * scale).to(dlogits.dtype)
            gemm.add_dweight_(self.weight[:V], dlogits, hidden, first=start == 0)
        if self.bias is not None:
            scale = self.bias.new_ones(()) if weight_scale is None else weight_scale
            gemm.add_dbias_(self.bias[:V], dlogits, scale)

    def logits_buffer(self, start: int, stop: int) -> Tensor:
        """Where the gradient of a chunk of ``Logits`` goes: straight into the result, unless rows are missing."""
        job = self._job
        assert self.rows is not None
        if job.rows.index is None:
            return self.rows[start:stop]
        return self.rows.new_empty(stop - start, job.vocab_size)

    def put_logits(self, buffer: Tensor, start: int, stop: int) -> None:
        assert self.rows is not None
        if self._job.rows.index is not None:
            self._job.rows.put(self.rows[:, : self._job.vocab_size], buffer, start, stop)

    def result(self) -> Gradients:
        return Gradients(self.rows, self.weight, self.bias)


class _Buffers:
    """The chunk's logits buffers, one per linear model that is alive at once, allocated on first use."""

    def __init__(self, job: Job, chunk_size: int) -> None:
        self._job, self._chunk_size = job, chunk_size
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def load(self, head: Head, slot: str, start: int, stop: int) -> ModelRows:
        """The raw logits of rows [start, stop) of a model."""
        job = self._job
        if isinstance(head, Logits):
            raw = job.rows.take(head.logits, start, stop)
            return ModelRows(raw if raw.stride(-1) == 1 else raw.contiguous(), _transform(head))
        hidden = job.rows.take(head.hidden, start, stop)
        key = (slot, accumulation_dtype(head.weight))
        if key not in self._buffers:
            # rows start on aligned addresses, so that kernels can load whole vectors
            width = -(-job.vocab_size // _ROW_MULTIPLE) * _ROW_MULTIPLE
            self._buffers[key] = memory.empty((self._chunk_size, width), key[1], hidden.device)
        out = self._buffers[key][: stop - start, : job.vocab_size]
        gemm.logits_(out, hidden, head.weight[: job.vocab_size])
        return ModelRows(out, _transform(head))


def _transform(head: Head) -> LogitTransform:
    bias = head.bias if isinstance(head, LinearHead) else None
    return LogitTransform(head.logit_scale, head.softcap, head.temperature, bias)


def _score(job: Job, head: Head, buffers: _Buffers, start: int, stop: int) -> Tensor:
    """Statistics of one model on its own for rows [start, stop), forward only."""
    assert job.token_ids is not None
    ids = job.token_ids[start:stop]
    if isinstance(head, LinearHead):
        hidden = job.rows.take(head.hidden, start, stop)
        statistics = job.ops.linear_statistics(hidden, head.weight, _transform(head), job.vocab_size, ids)
        if statistics is not None:
            return statistics
    # the models of the sampled estimator take turns in the student's buffer
    return job.ops.statistics(RowProblem(job.vocab_size, buffers.load(head, "student", start, stop), token_ids=ids))


def run(
    job: Job,
    needs: Needs = NOTHING,
    *,
    relative: Tensor | None = None,  # () or (n,) token weights; with them the gradients come with the statistics
    statistics: Tensor | None = None,  # (STATISTICS, n) of an earlier run; with them only gradients are computed ...
    weights: GradientWeights | None = None,  # ... for these complete weights per token, (n,)
) -> tuple[Tensor, Gradients]:
    """Run the loop in one of three ways.

    1. statistics only;
    2. with ``relative``: statistics, and the gradients of sum_i relative_i loss_i; each GEMM once. Where
       :class:`Scaling` leaves a shared weight to the end, the weight's gradient lacks it;
    3. with ``statistics`` and ``weights``: complete gradients, the student's logits recomputed.
    """
    n = job.rows.count
    parts = [(start, stop, part) for start, stop, part in job.parts() if stop > start]
    steps = [_balanced(stop - start, job.chunk_size) for start, stop, _ in parts]
    sink = _Sink(job, needs if relative is not None or weights is not None else NOTHING)
    out = torch.zeros(STATISTICS, n, dtype=job.dtype, device=job.device) if statistics is None else statistics
    buffers = _Buffers(job, max(steps, default=1))
    shared = None
    if weights is not None and isinstance(job.student, LinearHead) and job.student.hidden.dtype == torch.float16:
        # under a loss scale the weights may be large, and float16 hidden states times them overflow
        shared = _power_of_two(torch.stack([w for w in (weights.divergence, weights.token) if w is not None]))
    for (begin, end, part), step in zip(parts, steps, strict=True):
        for start in range(begin, end, step):
            stop = min(start + step, end)
            if statistics is None and not part.joint:
                _score_others(part, buffers, out, start, stop)
            if not sink.wanted:
                _statistics_chunk(part, buffers, out, start, stop)
            elif weights is None:
                assert relative is not None
                _fused_chunk(part, buffers, sink, out, relative, start, stop)
            else:
                _gradient_chunk(part, buffers, sink, out, weights, shared, start, stop)
    if shared is not None:
        for total in (sink.weight, sink.bias):
            if total is not None:
                total.mul_(shared)
    return out, sink.result()


def _problem(job: Job, buffers: _Buffers, start: int, stop: int) -> RowProblem:
    """The rows of a chunk, logits computed. Without a joint row operation it sees the student alone."""
    full = job.joint
    return RowProblem(
        job.vocab_size,
        buffers.load(job.student, "student", start, stop),
        buffers.load(job.teacher, "teacher", start, stop) if full and job.teacher is not None else None,
        buffers.load(job.ref, "ref", start, stop) if full and job.ref is not None else None,
        job.scale_of(slice(start, stop)) if full else 1.0,
        None if job.token_ids is None else job.token_ids[start:stop],
        # the sampled estimator's is the reverse KL, which it estimates
        job.divergence if full else "none",
        job.beta,
    )


def _score_others(job: Job, buffers: _Buffers, statistics: Tensor, start: int, stop: int) -> None:
    """Teacher and reference of the sampled estimator, before the student needs their buffer."""
    for head, given, logsum, logit, entropy in (
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
                statistics[entropy, start:stop] = objective.entropy(scored)


# What the sampled estimator takes from the row operation on the student; the other rows hold teacher and reference.
_STUDENT_STATS = [Stat.LOGSUM_STUDENT, Stat.MEAN_LOGIT, Stat.LOGIT_STUDENT, Stat.MAX_STUDENT]


def _store(job: Job, statistics: Tensor, chunk: Tensor, start: int, stop: int) -> None:
    if job.joint:
        statistics[: len(Stat), start:stop] = chunk
    else:
        for stat in _STUDENT_STATS:
            statistics[stat, start:stop] = chunk[stat]
    if job.estimator == "sampled":
        job.fill_advantages(statistics, start, stop)


def _statistics_chunk(job: Job, buffers: _Buffers, statistics: Tensor, start: int, stop: int) -> None:
    if job.joint:
        _store(job, statistics, job.ops.statistics(_problem(job, buffers, start, stop)), start, stop)
    else:
        _store(job, statistics, _score(job, job.student, buffers, start, stop), start, stop)


def _fused_chunk(
    job: Job, buffers: _Buffers, sink: _Sink, statistics: Tensor, relative: Tensor, start: int, stop: int
) -> None:
    problem = _problem(job, buffers, start, stop)
    token_weights = relative if relative.ndim == 0 else relative[start:stop]
    sampled = job.estimator == "sampled"
    if isinstance(job.student, Logits):
        buffer = sink.logits_buffer(start, stop)
        full_weights = token_weights.expand(stop - start).contiguous()
        if sampled:
            _store(job, statistics, job.ops.statistics(problem), start, stop)
            policy = job.policy_term(statistics, slice(start, stop))
            weights = GradientWeights(token=-policy.dlogprob * full_weights)
            job.ops.gradient(problem, statistics[: len(Stat), start:stop].contiguous(), weights, buffer)
        else:
            chunk = job.ops.statistics_and_gradient(problem, GradientWeights(divergence=full_weights), buffer)
            _store(job, statistics, chunk, start, stop)
        sink.put_logits(buffer, start, stop)
        return
    dlogits = _gradient_buffer(job.student, problem.student.raw)
    one = torch.ones(stop - start, dtype=job.dtype, device=job.device)
    unit = GradientWeights(token=one) if sampled else GradientWeights(divergence=one)
    _store(job, statistics, job.ops.statistics_and_gradient(problem, unit, dlogits), start, stop)
    coefficients = -job.policy_term(statistics, slice(start, stop)).dlogprob if sampled else None
    rows_scale = _product(coefficients, token_weights)
    weight_scale = rows_scale if _folds(job.student, relative) else coefficients
    sink.add(dlogits, job.rows.take(job.student.hidden, start, stop), rows_scale, weight_scale, start, stop)


def _gradient_chunk(
    job: Job,
    buffers: _Buffers,
    sink: _Sink,
    statistics: Tensor,
    weights: GradientWeights,
    shared: Tensor | None,
    start: int,
    stop: int,
) -> None:
    cut = slice(start, stop)
    problem = _problem(job, buffers, start, stop)
    chunk = statistics[: len(Stat), cut].contiguous()
    divergence, token = (None if w is None else w[cut] for w in (weights.divergence, weights.token))
    if isinstance(job.student, Logits):
        buffer = sink.logits_buffer(start, stop)
        job.ops.gradient(problem, chunk, GradientWeights(divergence, token), buffer)
        sink.put_logits(buffer, start, stop)
        return
    magnitudes = [w.abs() for w in (divergence, token) if w is not None]
    size = magnitudes[0] if len(magnitudes) == 1 else torch.maximum(*magnitudes)
    safe = torch.where(size > 0, size, torch.ones_like(size))
    unit = GradientWeights(*(None if w is None else w / safe for w in (divergence, token)))
    dlogits = _gradient_buffer(job.student, problem.student.raw)
    job.ops.gradient(problem, chunk, unit, dlogits)
    hidden = job.rows.take(job.student.hidden, start, stop)
    sink.add(dlogits, hidden, size, size if shared is None else size / shared, start, stop)


def _gradient_buffer(head: LinearHead, logits: Tensor) -> Tensor:
    """Where a chunk's logit gradient goes: over the logits, each row in the dtype that the GEMMs want."""
    dtype = gemm.gradient_dtype(head.weight)
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]
