"""What the loop asks of a loss, and the scoring of one model.

An estimator has no loop and no autograd: it makes statistics of a chunk, the logit gradient that follows from them, and
values per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...heads import Head, LinearHead
from ...objective import combination
from ...objective.layout import STATISTICS, TokenRow
from ...objective.logit_gradient import LogitGradient
from ...objective.rollout import importance
from ...objective.statistics import entropy, frozen_alone, token_logprob
from ...objective.topk import CompositeOnSupport, OnSupport
from ...problem import FlatComposite, FrozenModel, Problem, Route
from ...rowops import FROZEN, GradientWeights, RowProblem, Stat, composite, sparse
from ...rowops.torch import rows_of
from ...tokens import Reader
from ..buffers import Buffers, columns, transform_of
from ..vocab_parallel import local_ids, merge_over_ranks, no_logit_, own_ids, own_statistics, statistics_of
from .token_stats import OfLogits, fill_reward_scale

EVERY = slice(None)


class Walk(NamedTuple):
    """What the chunks of a walk over all live tokens share."""

    buffers: Buffers
    statistics: Tensor  # of all tokens, filled chunk by chunk
    own: Reader  # their first rows (len(Stat), C)
    token_ids: Reader | None  # (C,) int64, the sampled tokens


class Chunk:
    """Tokens [start, stop), all of one route.

    Attributes:
        statistics: those of all tokens, filled chunk by chunk.
        own: (len(Stat), C) the chunk's columns of the first rows of it, a view.
        token_ids: (C,) int64, the sampled tokens, a view.
    """

    __slots__ = ("_walk", "buffers", "own", "route", "start", "statistics", "stop", "token_ids", "tokens")

    def __init__(self, walk: Walk, route: Route, start: int, stop: int) -> None:
        self._walk = walk
        self.buffers, self.statistics, own, ids = walk
        self.route, self.start, self.stop, self.tokens = route, start, stop, slice(start, stop)
        self.own = own((start, stop))
        self.token_ids = None if ids is None else ids((start, stop))

    def of_rows(self, count: int) -> Chunk:
        """The same tokens with the first rows of the statistics."""
        walk = self._walk._replace(statistics=self.statistics[:count])
        return Chunk(walk, self.route, self.start, self.stop)

    def part(self, start: int, stop: int) -> Chunk:
        return Chunk(self._walk, self.route, start, stop)


class Support(NamedTuple):
    """The token ids of a topk chunk, and the frozen models there."""

    token_ids: Tensor  # (C, K) int64 over the whole vocabulary, -1 for none
    teacher: OnSupport | CompositeOnSupport | None
    ref: OnSupport | CompositeOnSupport | None
    teacher_alone: Tensor | None  # (len(Stat), C) statistics, None where the scores are a server's or several models'
    ref_alone: Tensor | None


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
    policy: Tensor | None = None  # (len(PolicyStat), n) of ``sampled``
    loss_factors: Tensor | None = None  # (2, n) of the others: importance weights, and 1 where ``loss_max`` is in force


class Estimator:
    """The base of all: models that are scored one by one, the student last."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._columns = columns(problem, problem.student)
        # whether row operations take a sum of several models for one
        self._joint_composite = problem.has_composite and problem.joint

    @property
    def statistics_rows(self) -> int:
        """Rows of the statistics of all tokens."""
        return STATISTICS

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
        _, extra = statistics_of(problem.ops, problem.student.shard, loaded.row_problem, *extra_rows, out=chunk.own)
        self.scored(chunk)
        return Scored(chunk.own), extra

    def recompute(self, chunk: Chunk) -> RowProblem:
        """Compute the logits that a gradient needs whose statistics are known."""
        return self.load(chunk).row_problem

    def score(self, chunk: Chunk) -> LogitGradient | None:
        """Fill in the chunk's statistics where nothing else is needed of it."""
        return self.statistics(chunk, self.load(chunk))[0].gradient

    def scored(self, chunk: Chunk) -> None:
        """The student's statistics are filled in: fill in what follows from them."""
        if self._joint_composite:
            fill_composite_statistics(self.problem, chunk)

    # ------------------------------------------------------------------------------------------------------ gradients

    def weights_now(self, chunk: Chunk, token_weights: Tensor | None) -> GradientWeights | None:
        """Weights of the chunk's logit gradient that a kernel can apply; None where it waits for the statistics.

        With ``token_weights`` (C,) all of them, without them those at unit scale, which :meth:`slope` completes.
        """
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
        # autograd lets nobody write to an output that is a view, as one row of the statistics is
        loss = values.loss.clone() if values.loss._is_view() else values.loss
        return (loss,), values

    # ---------------------------------------------------------------------------------- importance weights and loss_max

    def importance(self, statistics: Tensor, tokens: slice = EVERY) -> Tensor | None:
        """(C,) detached weights of tokens that another policy has sampled; None where there are no such log-probs.

        Without old log-probs, weights of whole sequences can be computed for all tokens at once only.
        """
        problem = self.problem
        if problem.importance is not None:
            return problem.importance[tokens]
        rollout, old = (rows_of(x, tokens) for x in (problem.rollout_logprobs, problem.old_logprobs))
        if rollout is None:
            return None
        behaviour = model_logprobs((False, False), statistics, tokens)[0] if old is None else old
        return importance(problem.options, behaviour, rollout, problem.over_sequences)

    def bounded(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Token losses (C,) clamped to ``loss_max`` in magnitude, and 1 where that changes nothing, else 0."""
        most = self.problem.options.loss_max
        if most is None:
            return loss, torch.ones_like(loss)
        return loss.clamp(-most, most), (~(loss.abs() > most)).to(loss.dtype)

    def with_loss_factors(self, loss: Tensor, statistics: Tensor) -> TokenValues:
        """The values of all tokens: losses (n,) clamped to ``loss_max``, then times their importance weights."""
        loss, inside = self.bounded(loss)
        weights = self.importance(statistics)
        if weights is None:
            weights = torch.ones_like(loss)
        return TokenValues(loss * weights, loss_factors=torch.stack((weights, 1 - inside)))

    # -------------------------------------------------------------------------------------------------------- helpers

    def _row_problem(self, chunk: Chunk, joint: bool, writable: bool = False) -> RowProblem:
        """A chunk's logits: of the student alone, or of all models where the row operation needs them together."""
        problem, route, buffers = self.problem, chunk.route, chunk.buffers
        start, stop = chunk.start, chunk.stop
        ids, student = chunk.token_ids, problem.student
        teacher, ref = (route.teacher, route.ref if problem.has[1] else None) if joint else (None, None)
        student_rows = buffers.load(student, "student", start, stop, writable)
        teacher_rows = None if teacher is None else buffers.load(teacher, "teacher", start, stop, joint=True)
        ref_rows = None if ref is None else buffers.load(ref, "ref", start, stop, joint=True)
        own_ids = ids if ids is None or student.shard is None else local_ids(student.shard, ids)
        if joint and problem.reward_scale_fn is not None:
            rows = {"student": student_rows, "teacher": teacher_rows, "ref": ref_rows}
            made = {name: x for name, x in buffers.logprobs.items() if isinstance(getattr(route, name), FlatComposite)}
            compute = OfLogits(problem, self._columns, rows, own_ids, made)
            fill_reward_scale(problem, chunk.statistics, chunk.start, chunk.stop, compute)
        scale = problem.reward_scale if joint else 1.0
        return RowProblem(
            self._columns,
            student_rows,
            teacher=teacher_rows,
            ref=ref_rows,
            reward_scale=scale
            if isinstance(scale, float)
            else reward_scale_of(problem, chunk.statistics, chunk.tokens),
            token_ids=own_ids,
            divergence=problem.divergence.rows(chunk.tokens) if joint else None,
        )

    def _score_composite(self, chunk: Chunk, model: FlatComposite, out: Tensor) -> None:
        """Statistics of a model made of several, as those of log-probs that are given: with a normaliser of 0."""
        own, scores = torch.empty_like(out), []
        for head, given in zip(model.heads, model.logprobs, strict=True):
            if head is not None:
                self._score_alone(chunk, head, own)
                scores.append(token_logprob(own[Stat.LOGIT_STUDENT], own[Stat.LOGSUM_STUDENT]))
            else:
                assert given is not None
                scores.append(given[chunk.tokens])
        out[Stat.LOGIT_STUDENT] = combination.combine(scores, model.weights_of(chunk.tokens), model.mixture)

    def _score_alone(self, chunk: Chunk, head: Head, out: Tensor) -> None:
        """Statistics (len(Stat), C) of one model, forward only; from hidden states where the backend can."""
        ops, start, stop, shard = self.problem.ops, chunk.start, chunk.stop, head.shard
        assert chunk.token_ids is not None
        ids, width = own_ids(head, chunk.token_ids), columns(self.problem, head)
        to, own = out if shard is None else None, None
        if isinstance(head, LinearHead) and width:
            hidden = chunk.buffers.reader(head)((start, stop))
            own = ops.linear_statistics(hidden, head.weight, transform_of(head), width, ids, to)
        if own is None:
            # models that are scored one by one share the student's buffer
            own = own_statistics(
                ops, RowProblem(width, chunk.buffers.load(head, "student", start, stop), token_ids=ids), to
            )
        if shard is not None:
            out.copy_(merge_over_ranks(shard, own, ids)[0])
        elif head.vocab_map is not None:
            no_logit_(own, ids)


def fill_composite_statistics(problem: Problem, chunk: Chunk) -> None:
    """Statistics of teachers and references where any is made of several models, which has no normaliser.

    Its log-prob of a sampled token is the weighted sum of its models' own, not that of its row: relative to the row's
    maximum, which a mask in a model of negative weight makes large, it would have its rounding.
    """
    scale = reward_scale_of(problem, chunk.statistics, chunk.tokens)
    for (name, cancelled_at), there, stats in zip(FROZEN, problem.has, _OF_FROZEN, strict=True):
        model: FrozenModel | None = getattr(chunk.route, name)
        if not there or model is None:
            continue
        maximum, logsum, logit, row = stats
        if isinstance(model, FlatComposite):
            composite.drop_normaliser(chunk.own, maximum, logsum)
        if problem.token_ids is None:
            continue
        logprobs = token_logprob(chunk.own[logit], chunk.own[logsum])
        if isinstance(model, FlatComposite):
            counts = logprobs.isfinite() & torch.as_tensor(scale != cancelled_at)
            logprobs = chunk.buffers.logprobs[name].where(counts, logprobs)
        chunk.statistics[row, chunk.tokens] = logprobs


_OF_FROZEN = (
    (Stat.MAX_TEACHER, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER, TokenRow.TEACHER_LOGPROB),
    (Stat.MAX_REF, Stat.LOGSUM_REF, Stat.LOGIT_REF, TokenRow.REF_LOGPROB),
)


def reward_scale_of(problem: Problem, statistics: Tensor, tokens: slice) -> float | Tensor:
    """lambda, or lambda (C,) of some of the tokens; that of a ``reward_scale_fn`` is in the statistics."""
    scale = problem.reward_scale
    if scale is None:
        return statistics[TokenRow.REWARD_SCALE, tokens]
    return scale[tokens] if isinstance(scale, Tensor) else scale


def model_logprobs(
    has: tuple[bool, bool], statistics: Tensor, tokens: slice = EVERY, joint_composite: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log-probs of the sampled tokens under student, teacher and reference; None for a model that is not there.

    ``joint_composite``: models are taken together, and any is made of several.
    """

    def of(rows: Tensor, logit: int = Stat.LOGIT_STUDENT, logsum: int = Stat.LOGSUM_STUDENT) -> Tensor:
        return token_logprob(rows[logit, tokens], rows[logsum, tokens])

    student, alone = of(statistics), frozen_alone(statistics)
    if alone is not None:
        return student, of(alone[0]) if has[0] else None, of(alone[1]) if has[1] else None
    if joint_composite:
        teacher, ref = (statistics[row, tokens] for row in (TokenRow.TEACHER_LOGPROB, TokenRow.REF_LOGPROB))
        return student, teacher if has[0] else None, ref if has[1] else None
    return (
        student,
        of(statistics, Stat.LOGIT_TEACHER, Stat.LOGSUM_TEACHER) if has[0] else None,
        of(statistics, Stat.LOGIT_REF, Stat.LOGSUM_REF) if has[1] else None,
    )


class LogProbs(Estimator):
    """log p of given tokens, of the student alone."""

    def score(self, chunk: Chunk) -> LogitGradient | None:
        self._score_alone(chunk, self.problem.student, chunk.own)
        return None

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        of_logprobs, of_entropy = (
            None if x is None else -x.to(self.problem.dtype).contiguous() for x in (*upstream, None)[:2]
        )
        # dH/dz = -p (log p + H) = -p (z - sum p z): the gradient of the row operation of one model
        if of_logprobs is None:
            return LogitGradient(divergence=of_entropy)
        assert self.problem.token_ids is not None
        return LogitGradient(divergence=of_entropy, weight=of_logprobs, token_ids=self.problem.token_ids[:, None])

    def outputs(self, statistics: Tensor) -> tuple[tuple[Tensor, ...], TokenValues | None]:
        return (model_logprobs((False, False), statistics)[0],), None


class LogProbsAndEntropy(LogProbs):
    """log p of given tokens and the entropy, of the student alone."""

    def outputs(self, statistics: Tensor) -> tuple[tuple[Tensor, ...], TokenValues | None]:
        (logprobs,), _ = super().outputs(statistics)
        return (logprobs, entropy(statistics)), None


class SelectedLogProbs(Estimator):
    """log p of several tokens of each position, of the student alone; kept as K more rows of the statistics."""

    @property
    def _token_ids(self) -> Tensor:
        assert self.problem.support_ids is not None
        return self.problem.support_ids

    @property
    def statistics_rows(self) -> int:
        return STATISTICS + self._token_ids.shape[1]

    def score(self, chunk: Chunk) -> LogitGradient | None:
        problem, shard, ids = self.problem, self.problem.student.shard, self._token_ids[chunk.tokens]
        row_problem = self.load(chunk).row_problem
        logits = sparse.logits_at(row_problem.student, local_ids(shard, ids))
        statistics, (merged,) = statistics_of(problem.ops, shard, row_problem, logits.T, out=chunk.own)
        logprobs = sparse.logprobs(statistics, merged.T).masked_fill(ids < 0, 0)
        chunk.statistics[STATISTICS:, chunk.tokens] = logprobs.T
        return None

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        """Of sum_k g_k log p[v_k]: sum_k g_k (1[v = v_k] - p_v). A token that is there twice has the sum of both g."""
        (given,) = upstream
        assert given is not None
        ids = self._token_ids
        each = given.to(self.problem.dtype).masked_fill(ids < 0, 0)
        weight = -each.sum(1)
        total, step = torch.empty_like(each), max(1, _COMPARED // ids.shape[1] ** 2)
        for start in range(0, ids.shape[0], step):  # a product, not a scatter: the same bits in every run
            rows = slice(start, start + step)
            same = ids[rows, :, None] == ids[rows, None, :]
            total[rows] = torch.where(same, each[rows, None, :], 0).sum(2)
        logprobs = statistics[STATISTICS:].T
        return LogitGradient(weight=weight, token_ids=ids, values=total + weight[:, None] * logprobs.exp())

    def outputs(self, statistics: Tensor) -> tuple[tuple[Tensor, ...], TokenValues | None]:
        # cloned: autograd lets nobody write to an output that is a view
        return (statistics[STATISTICS:].T.clone(memory_format=torch.contiguous_format),), None


# Pairs of the tokens of a position that are compared at once.
_COMPARED = 1 << 22


def ones(problem: Problem, chunk: Chunk) -> Tensor:
    """(C,) weights of 1."""
    return torch.ones((), dtype=problem.dtype, device=problem.device).expand(chunk.stop - chunk.start)
