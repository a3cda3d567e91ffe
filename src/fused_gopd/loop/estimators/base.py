"""What the loop asks of a loss, and the scoring of one model.

An estimator has no loop and no autograd: it makes statistics of a chunk, the logit gradient that follows from them, and
values per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...heads import Head, LinearHead
from ...objective.logit_gradient import LogitGradient
from ...objective.policy import PolicyTerm
from ...objective.statistics import entropy, token_logprob
from ...objective.topk import OnSupport
from ...problem import Problem, Route
from ...rowops import GradientWeights, RowProblem, Stat
from ..buffers import Buffers, columns, transform_of
from ..vocab_parallel import local_ids, merge_over_ranks, own_statistics, statistics_of

EVERY = slice(None)
# What the row operation on the student alone fills; the other rows hold teacher and reference, scored before.
_STUDENT_STATS = (Stat.LOGSUM_STUDENT, Stat.MEAN_LOGIT, Stat.LOGIT_STUDENT, Stat.MAX_STUDENT)


class Chunk(NamedTuple):
    """Tokens [start, stop), all of one route."""

    route: Route
    buffers: Buffers
    statistics: Tensor  # (STATISTICS, n) of all tokens, filled chunk by chunk
    start: int
    stop: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)


class Support(NamedTuple):
    """The token ids of a topk chunk, and the frozen models there."""

    token_ids: Tensor  # (C, K) int64 over the whole vocabulary, -1 for none
    teacher: OnSupport | None
    ref: OnSupport | None


class Loaded(NamedTuple):
    """A chunk whose logits are in the buffers, and in topk the support."""

    row_problem: RowProblem
    support: Support | None = None


class Scored(NamedTuple):
    """Statistics of a chunk, while its student logits are still in the buffer (the gradient will overwrite them)."""

    statistics: Tensor  # (len(Stat), C)
    gradient: LogitGradient | None = None  # topk: it is made with the statistics
    logprobs: Tensor | None = None  # (C, K) log p of the gradient's token ids


class TokenValues(NamedTuple):
    """Results per token, (n,) each."""

    loss: Tensor
    policy: PolicyTerm | None = None  # of ``sampled``


class Estimator:
    """The base of all: models that are scored one by one, the student last."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @property
    def gradient_with_statistics(self) -> bool:
        """Whether :meth:`statistics` returns the logit gradient, too."""
        return False

    # ------------------------------------------------------------------------------------------------- chunk by chunk

    def score_frozen(self, chunk: Chunk) -> None:
        """Fill in statistics of teacher and reference, before the student needs their buffer."""

    def load(self, chunk: Chunk) -> Loaded:
        """Compute the logits that :meth:`statistics` or a recomputed gradient needs."""
        return Loaded(self._row_problem(chunk, joint=False))

    def statistics(self, chunk: Chunk, loaded: Loaded, *extra_rows: Tensor) -> tuple[Scored, list[Tensor]]:
        """Fill in the chunk's statistics. Of each extra row (k, C) the largest value of any rank is returned."""
        problem = self.problem
        scored, extra = statistics_of(problem.ops, problem.student.shard, loaded.row_problem, *extra_rows)
        self.store(chunk, scored)
        return Scored(scored), extra

    def recompute(self, chunk: Chunk) -> RowProblem:
        """Compute the logits that a gradient needs whose statistics are known."""
        return self.load(chunk).row_problem

    def score(self, chunk: Chunk) -> LogitGradient | None:
        """Fill in the chunk's statistics where nothing else is needed of it."""
        return self.statistics(chunk, self.load(chunk))[0].gradient

    def store(self, chunk: Chunk, scored: Tensor) -> None:
        """Put a chunk's statistics (len(Stat), C) where they belong."""
        for stat in _STUDENT_STATS:
            chunk.statistics[stat, chunk.tokens] = scored[stat]

    # ------------------------------------------------------------------------------------------------------ gradients

    def weights_now(self, chunk: Chunk) -> GradientWeights | None:
        """Weights at unit scale that do not depend on the statistics; None where the gradient waits for them."""
        return None

    def slope(self, chunk: Chunk) -> Tensor | None:
        """(C,) the factor of a gradient at unit scale, once the statistics are known; None is 1."""
        return None

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        """Of the token losses before any weighting, from their statistics."""
        raise NotImplementedError

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        """Of sum_i upstream_i x_i for the :meth:`outputs` x; ``gradient`` is what :meth:`statistics` returned."""
        (each,) = upstream
        assert each is not None
        gradient = self.logit_gradient(statistics) if gradient is None else gradient
        return gradient.scaled(each.to(self.problem.dtype).contiguous())

    # --------------------------------------------------------------------------------------------------------- values

    def values(self, statistics: Tensor) -> TokenValues:
        """The results of all tokens, from their statistics."""
        raise NotImplementedError

    def outputs(self, statistics: Tensor) -> tuple[tuple[Tensor, ...], TokenValues | None]:
        """The differentiable vectors (n,), and the values that they are part of."""
        values = self.values(statistics)
        return (values.loss,), values

    # -------------------------------------------------------------------------------------------------------- helpers

    def _row_problem(self, chunk: Chunk, joint: bool, writable: bool = False) -> RowProblem:
        """A chunk's logits: of the student alone, or of all models where the row operation needs them together."""
        problem, (route, buffers, _, start, stop) = self.problem, chunk
        ids, student = problem.token_ids, problem.student
        teacher, ref = (route.teacher, route.ref) if joint else (None, None)
        return RowProblem(
            columns(problem, student),
            buffers.load(student, "student", start, stop, writable),
            teacher=None if teacher is None else buffers.load(teacher, "teacher", start, stop),
            ref=None if ref is None else buffers.load(ref, "ref", start, stop),
            reward_scale=reward_scale_of(problem, chunk.tokens) if joint else 1.0,
            token_ids=None if ids is None else local_ids(student.shard, ids[start:stop]),
            divergence=problem.divergence.rows(chunk.tokens) if joint else None,
        )

    def _score_alone(self, chunk: Chunk, head: Head) -> Tensor:
        """Statistics (len(Stat), C) of one model, forward only; from hidden states where the backend can."""
        problem, (_, buffers, _, start, stop) = self.problem, chunk
        assert problem.token_ids is not None
        ids, width = local_ids(head.shard, problem.token_ids[start:stop]), columns(problem, head)
        own: Tensor | None = None
        if isinstance(head, LinearHead) and width:
            hidden = problem.rows.take(head.hidden, start, stop)
            own = problem.ops.linear_statistics(hidden, head.weight, transform_of(head), width, ids)
        if own is None:
            # models that are scored one by one share the student's buffer
            alone = RowProblem(width, buffers.load(head, "student", start, stop), token_ids=ids)
            own = own_statistics(problem.ops, alone)
        return own if head.shard is None else merge_over_ranks(head.shard, own, ids)[0]


def reward_scale_of(problem: Problem, tokens: slice) -> float | Tensor:
    """lambda, or lambda (C,) of some of the tokens."""
    return problem.reward_scale[tokens] if isinstance(problem.reward_scale, Tensor) else problem.reward_scale


def model_logprobs(
    has: tuple[bool, bool], statistics: Tensor, tokens: slice = EVERY
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log-probs of the sampled tokens under student, teacher and reference; None for a model that is not there."""

    def of(logit: Stat, logsum: Stat) -> Tensor:
        return token_logprob(statistics[logit, tokens], statistics[logsum, tokens])

    return (
        of(Stat.LOGIT_STUDENT, Stat.LOGSUM_STUDENT),
        of(Stat.LOGIT_TEACHER, Stat.LOGSUM_TEACHER) if has[0] else None,
        of(Stat.LOGIT_REF, Stat.LOGSUM_REF) if has[1] else None,
    )


class LogProbs(Estimator):
    """log p of given tokens and the entropy, of the student alone."""

    def score(self, chunk: Chunk) -> LogitGradient | None:
        self.store(chunk, self._score_alone(chunk, self.problem.student))
        return None

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        of_logprobs, of_entropy = (None if x is None else -x.to(self.problem.dtype).contiguous() for x in upstream)
        # dH/dz = -p (log p + H) = -p (z - sum p z): the gradient of the row operation of one model
        if of_logprobs is None:
            return LogitGradient(divergence=of_entropy)
        assert self.problem.token_ids is not None
        return LogitGradient(divergence=of_entropy, weight=of_logprobs, token_ids=self.problem.token_ids[:, None])

    def outputs(self, statistics: Tensor) -> tuple[tuple[Tensor, ...], TokenValues | None]:
        return (model_logprobs((False, False), statistics)[0], entropy(statistics)), None


def ones(problem: Problem, chunk: Chunk) -> Tensor:
    """(C,) weights of 1."""
    return torch.ones(chunk.stop - chunk.start, dtype=problem.dtype, device=problem.device)
