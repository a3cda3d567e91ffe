"""What the loop asks of a loss: statistics of a chunk, the logit gradient that follows from them, and values per token.

An estimator has no loop and no autograd. :class:`Sampled`, :class:`Full` and :class:`TopK` are those of ``gopd_loss``,
:class:`WithLabels` adds the supervised term to any of them, and :class:`LogProbs` scores a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import Head, LinearHead
from ..objective import policy, topk
from ..objective.divergences import divergence_value
from ..objective.policy import PolicyTerm
from ..objective.statistics import TokenRow, entropy, merge, token_logprob
from ..objective.supervised import has_label
from ..options import AdvantageFn, TokenStats
from ..problem import Problem, Route
from ..rowops import GradientWeights, LogitTransform, ModelRows, RowOps, RowProblem, Stat, sparse
from ..rowops.torch import TorchRowOps, rows_of
from ..shards import VocabShard
from .buffers import Buffers, columns, transform_of
from .logit_gradient import LogitGradient
from .vocab_parallel import local_ids, merge_over_ranks, own_statistics, statistics_of, topk_ids

_EVERY = slice(None)
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


class Loaded(NamedTuple):
    """A chunk whose logits are in the buffers, and in topk the support."""

    row_problem: RowProblem
    support: Support | None = None


class Scored(NamedTuple):
    """Statistics of a chunk, while its student logits are still in the buffer (the gradient will overwrite them)."""

    row_problem: RowProblem
    statistics: Tensor  # (len(Stat), C)
    gradient: LogitGradient | None = None  # topk: it is made with the statistics
    probabilities: Tensor | None = None  # (C, K) p of the gradient's token ids


class TokenValues(NamedTuple):
    """Results per token, (n,) each."""

    loss: Tensor
    kl: Tensor | None = None  # KL(student || target); None in ``sampled``
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
        return Scored(loaded.row_problem, scored), extra

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

    def logit_gradient(self, statistics: Tensor, tokens: slice = _EVERY) -> LogitGradient:
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
        return RowProblem(
            columns(problem, student),
            buffers.load(student, "student", start, stop, writable),
            buffers.load(route.teacher, "teacher", start, stop) if joint and route.teacher is not None else None,
            buffers.load(route.ref, "ref", start, stop) if joint and route.ref is not None else None,
            reward_scale=reward_scale_of(problem, chunk.tokens) if joint else 1.0,
            token_ids=None if ids is None else local_ids(student.shard, ids[start:stop]),
            divergence=problem.divergence if joint else "none",
            beta=problem.beta,
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
    problem: Problem, statistics: Tensor, tokens: slice = _EVERY
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log-probs of the sampled tokens under student, teacher and reference; None for a model that is not there."""

    def of(logit: Stat, logsum: Stat) -> Tensor:
        return token_logprob(statistics[logit, tokens], statistics[logsum, tokens])

    has_teacher, has_ref = problem.has
    return (
        of(Stat.LOGIT_STUDENT, Stat.LOGSUM_STUDENT),
        of(Stat.LOGIT_TEACHER, Stat.LOGSUM_TEACHER) if has_teacher else None,
        of(Stat.LOGIT_REF, Stat.LOGSUM_REF) if has_ref else None,
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
        return (model_logprobs(self.problem, statistics)[0], entropy(statistics)), None


class Sampled(Estimator):
    """The policy gradient at the sampled tokens.

    With ``baseline="expected"`` the statistics are those of the reverse KL over the joint support, whose value is the
    baseline. Otherwise models are scored one by one.
    """

    def score_frozen(self, chunk: Chunk) -> None:
        problem, (route, _, statistics, start, stop) = self.problem, chunk
        if problem.joint:
            return
        for head, given, logsum, logit, entropy_row in (
            (
                route.teacher,
                problem.teacher_logprobs,
                Stat.LOGSUM_TEACHER,
                Stat.LOGIT_TEACHER,
                TokenRow.ENTROPY_TEACHER,
            ),
            (route.ref, problem.ref_logprobs, Stat.LOGSUM_REF, Stat.LOGIT_REF, TokenRow.ENTROPY_REF),
        ):
            if head is not None:
                scored = self._score_alone(chunk, head)
                statistics[logsum, start:stop] = scored[Stat.LOGSUM_STUDENT]
                statistics[logit, start:stop] = scored[Stat.LOGIT_STUDENT]
                if problem.advantage_fn is not None:
                    statistics[entropy_row, start:stop] = entropy(scored)
            elif given is not None:
                statistics[logit, start:stop] = given[start:stop]  # with a normaliser of 0

    def load(self, chunk: Chunk) -> Loaded:
        return Loaded(self._row_problem(chunk, self.problem.joint))

    def score(self, chunk: Chunk) -> LogitGradient | None:
        if self.problem.joint:
            return super().score(chunk)
        self.store(chunk, self._score_alone(chunk, self.problem.student))
        return None

    def store(self, chunk: Chunk, scored: Tensor) -> None:
        if self.problem.joint:
            chunk.statistics[: len(Stat), chunk.tokens] = scored
        else:
            super().store(chunk, scored)
        used, reported = self._advantages(chunk)
        chunk.statistics[TokenRow.ADVANTAGE, chunk.tokens] = used
        chunk.statistics[TokenRow.REPORTED_ADVANTAGE, chunk.tokens] = reported

    def _advantages(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(C,) those of the gradient and those that the loss reports, once the log-probs are in the statistics."""
        problem, tokens, statistics = self.problem, chunk.tokens, chunk.statistics
        if problem.advantages is not None:
            used, reported = problem.advantages[:, tokens]
            return used, reported
        scale, options = reward_scale_of(problem, tokens), problem.options
        expected = None
        if options.baseline == "expected":
            expected, _ = divergence_value("reverse_kl", problem.beta, scale, statistics[:, tokens], problem.has)
        student, teacher, ref = model_logprobs(problem, statistics, tokens)
        return policy.advantages_of(
            options,
            reward_scale=scale,
            student=student,
            teacher=teacher,
            ref=ref,
            old=rows_of(problem.old_logprobs, tokens),
            hook=None if problem.advantage_fn is None else self._hook(problem.advantage_fn, chunk, student),
            expected=expected,
        )

    def _hook(self, function: AdvantageFn, chunk: Chunk, student: Tensor) -> policy.Hook:
        """The caller's ``advantage_fn`` as a function of A and of the log-probs, given all else of the chunk."""
        problem, tokens, statistics = self.problem, chunk.tokens, chunk.statistics
        index = problem.rows.index
        index = torch.arange(chunk.start, chunk.stop, device=problem.device) if index is None else index[tokens]
        scale, old = reward_scale_of(problem, tokens), rows_of(problem.old_logprobs, tokens)

        def entropy_of(row: TokenRow, there: bool, given: Tensor | None) -> Tensor | None:
            return statistics[row, tokens] if there and given is None and not problem.joint else None

        def hook(advantages: Tensor | None, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
            has_teacher, has_ref = problem.has
            stats = TokenStats(
                index=index,
                advantages=advantages,
                student_logprobs=student,
                teacher_logprobs=teacher,
                ref_logprobs=ref,
                old_logprobs=None if old is None else old.clone(),  # not the caller's own memory
                student_entropy=entropy(statistics[:, tokens]),
                teacher_entropy=entropy_of(TokenRow.ENTROPY_TEACHER, has_teacher, problem.teacher_logprobs),
                ref_entropy=entropy_of(TokenRow.ENTROPY_REF, has_ref, problem.ref_logprobs),
                reward_scale=scale.clone() if isinstance(scale, Tensor) else scale,
            )
            return policy.call_hook(function, stats)

        return hook

    def policy_term(self, statistics: Tensor, tokens: slice = _EVERY) -> PolicyTerm:
        """Token losses and their slopes; of all tokens at once where ratios are those of whole sequences."""
        problem = self.problem
        old, rollout = rows_of(problem.old_logprobs, tokens), rows_of(problem.rollout_logprobs, tokens)
        student = model_logprobs(problem, statistics, tokens)[0]

        def term(advantages: Tensor) -> PolicyTerm:
            return policy.policy_term(problem.options, advantages, student, old, rollout, self._mean_over_sequences)

        used = term(statistics[TokenRow.ADVANTAGE, tokens])
        if problem.options.baseline == "none":
            return used
        return replace(used, loss=term(statistics[TokenRow.REPORTED_ADVANTAGE, tokens]).loss)

    def _mean_over_sequences(self, values: Tensor) -> Tensor:
        """(n,) values of all live tokens, each replaced by the mean over the live tokens of its sequence."""
        rows, sequences = self.problem.rows, self.problem.sequences
        total, count = (sequences.sum(rows.scatter(x)) for x in (values, torch.ones_like(values)))
        return rows.take(sequences.expand(total / count.clamp_min(1))).to(values.dtype)

    def weights_now(self, chunk: Chunk) -> GradientWeights | None:
        if not isinstance(self.problem.student, LinearHead):
            return None  # the slope would have to be applied to logits that are written already
        return GradientWeights(token=_ones(self.problem, chunk))

    def slope(self, chunk: Chunk) -> Tensor | None:
        return -self.policy_term(chunk.statistics, chunk.tokens).dlogprob

    def logit_gradient(self, statistics: Tensor, tokens: slice = _EVERY) -> LogitGradient:
        assert self.problem.token_ids is not None
        weight = -self.policy_term(statistics, tokens).dlogprob
        return LogitGradient(weight=weight, token_ids=self.problem.token_ids[tokens, None])

    def values(self, statistics: Tensor) -> TokenValues:
        term = self.policy_term(statistics)
        return TokenValues(term.loss, policy=term)


class Full(Estimator):
    """A divergence over the whole vocabulary."""

    def load(self, chunk: Chunk) -> Loaded:
        return Loaded(self._row_problem(chunk, joint=True))

    def store(self, chunk: Chunk, scored: Tensor) -> None:
        chunk.statistics[: len(Stat), chunk.tokens] = scored

    def weights_now(self, chunk: Chunk) -> GradientWeights | None:
        return GradientWeights(divergence=_ones(self.problem, chunk))

    def logit_gradient(self, statistics: Tensor, tokens: slice = _EVERY) -> LogitGradient:
        return LogitGradient(divergence=torch.ones_like(statistics[0, tokens]))

    def values(self, statistics: Tensor) -> TokenValues:
        problem = self.problem
        loss, kl = divergence_value(problem.divergence, problem.beta, problem.reward_scale, statistics, problem.has)
        return TokenValues(loss, kl)


def _ones(problem: Problem, chunk: Chunk) -> Tensor:
    return torch.ones(chunk.stop - chunk.start, dtype=problem.dtype, device=problem.device)


class Support(NamedTuple):
    """The token ids of a topk chunk, and the frozen models there."""

    token_ids: Tensor  # (C, K) int64 over the whole vocabulary, -1 for none
    teacher: topk.OnSupport | None
    ref: topk.OnSupport | None


class TopK(Estimator):
    """A divergence over K tokens of each position and the rest of the vocabulary."""

    @property
    def gradient_with_statistics(self) -> bool:
        return True

    def load(self, chunk: Chunk) -> Loaded:
        """Top-k token ids: the student's, else the teacher's, else the reference's, or those of a server.

        Frozen models are scored first where possible, so that their buffer is reused for the student.
        """
        problem, (route, buffers, statistics, start, stop) = self.problem, chunk
        row_problem, ids, slot, k = None, None, "student", problem.options.k
        if problem.options.support == "student":
            row_problem, slot = self._row_problem(chunk, joint=False, writable=True), "other"
            assert k is not None
            ids = topk_ids(problem.student, row_problem.student, row_problem.vocab_size, k)
        models: list[topk.OnSupport | None] = []
        for head, given, logsum, logit in (
            (route.teacher, problem.teacher_topk, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER),
            (route.ref, problem.ref_topk, Stat.LOGSUM_REF, Stat.LOGIT_REF),
        ):
            if head is not None:
                rows = buffers.load(head, slot, start, stop, writable=True)
                if ids is None:
                    assert k is not None
                    ids = topk_ids(head, rows, columns(problem, head), k)
                sampled = rows_of(problem.token_ids, chunk.tokens)
                own_sampled = None if sampled is None else local_ids(head.shard, sampled)
                alone = RowProblem(columns(problem, head), rows, token_ids=own_sampled)
                scored, on_support, _ = statistics_on_support(problem.ops, alone, ids, sampled, head.shard)
                statistics[logsum, start:stop] = scored[Stat.LOGSUM_STUDENT]
                statistics[logit, start:stop] = scored[Stat.LOGIT_STUDENT]
                models.append(on_support)
            elif given is not None:
                assert problem.support_ids is not None
                ids = problem.support_ids[start:stop] if ids is None else ids
                logprobs = given[start:stop].to(problem.dtype).masked_fill(ids < 0, -math.inf)
                models.append(topk.OnSupport(logprobs, None))
            else:
                models.append(None)
        assert ids is not None
        if row_problem is None:
            row_problem = self._row_problem(chunk, joint=False, writable=True)
        return Loaded(row_problem, Support(ids, *models))

    def recompute(self, chunk: Chunk) -> RowProblem:
        return self._row_problem(chunk, joint=False)

    def statistics(self, chunk: Chunk, loaded: Loaded, *extra_rows: Tensor) -> tuple[Scored, list[Tensor]]:
        problem, tokens, (row_problem, support) = self.problem, chunk.tokens, loaded
        assert support is not None
        sampled = rows_of(problem.token_ids, tokens)
        scored, student, extra = statistics_on_support(
            problem.ops, row_problem, support.token_ids, sampled, problem.student.shard, *extra_rows
        )
        self.store(chunk, scored)
        loss, kl, gradient = topk.term(
            problem.options.tail,
            problem.divergence,
            problem.beta,
            reward_scale_of(problem, tokens),
            support.token_ids,
            student,
            support.teacher,
            support.ref,
        )
        chunk.statistics[TokenRow.TOPK_LOSS, tokens] = loss
        chunk.statistics[TokenRow.TOPK_KL, tokens] = kl
        ids, values, weight, elsewhere = gradient
        made = LogitGradient(weight=weight, token_ids=ids, values=values, max_abs_elsewhere=elsewhere)
        return Scored(row_problem, scored, made, student.logprobs.exp()), extra

    def values(self, statistics: Tensor) -> TokenValues:
        return TokenValues(statistics[TokenRow.TOPK_LOSS], statistics[TokenRow.TOPK_KL])


def statistics_on_support(
    ops: RowOps,
    alone: RowProblem,  # one model's logits, writable
    token_ids: Tensor,  # (C, K) over the whole vocabulary, like the next
    sampled: Tensor | None,  # (C,)
    shard: VocabShard | None = None,
    *extra_rows: Tensor,
) -> tuple[Tensor, topk.OnSupport, list[Tensor]]:
    """Statistics of one model, its log-probs on the support and that of the rest of the vocabulary.

    The rest is summed on its own. As 1 minus the mass on the support it would have an error of 1e-7, of which the
    logarithm makes a large one where the rest is light.
    """
    model = alone.student
    own_ids = local_ids(shard, token_ids)
    logits = sparse.logits_at(model, own_ids)
    with sparse.hidden(model, own_ids):
        rest = own_statistics(ops, alone)
    extra = list(extra_rows)
    if shard is not None:
        rest, (merged, *extra) = merge_over_ranks(shard, rest, alone.token_ids, logits.T, *extra_rows)
        logits = merged.T.contiguous()
    inside = TorchRowOps().statistics(RowProblem(logits.shape[1], ModelRows(logits, LogitTransform())))
    if sampled is not None:
        hit = logits.masked_fill(token_ids != sampled[:, None], -math.inf)
        inside[Stat.LOGIT_STUDENT] = hit.amax(1) - inside[Stat.MAX_STUDENT]
    statistics = merge(torch.stack((inside, rest)))
    logprobs = sparse.logprobs(statistics, logits)
    shift = rest[Stat.MAX_STUDENT] - statistics[Stat.MAX_STUDENT]
    log_rest = rest[Stat.LOGSUM_STUDENT] + shift - statistics[Stat.LOGSUM_STUDENT]
    empty = torch.isneginf(rest[Stat.LOGSUM_STUDENT])
    return statistics, topk.OnSupport(logprobs, log_rest.masked_fill(empty, -math.inf)), extra


class WithLabels(Estimator):
    """An estimator plus the supervised term, -sft_weight log p[label], from the same logits."""

    def __init__(self, inner: Estimator) -> None:
        super().__init__(inner.problem)
        self._inner = inner

    @property
    def gradient_with_statistics(self) -> bool:
        return self._inner.gradient_with_statistics

    def score_frozen(self, chunk: Chunk) -> None:
        self._inner.score_frozen(chunk)

    def load(self, chunk: Chunk) -> Loaded:
        return self._inner.load(chunk)

    def recompute(self, chunk: Chunk) -> RowProblem:
        return self._inner.recompute(chunk)

    def statistics(self, chunk: Chunk, loaded: Loaded, *extra_rows: Tensor) -> tuple[Scored, list[Tensor]]:
        problem, tokens, row_problem = self.problem, chunk.tokens, loaded.row_problem
        assert problem.labels is not None
        labels = local_ids(problem.student.shard, problem.labels[tokens, None])
        logits = sparse.supported(row_problem, labels, sparse.logits_at(row_problem.student, labels))
        scored, (merged, *extra) = self._inner.statistics(chunk, loaded, logits.T, *extra_rows)
        label_logprobs = sparse.logprobs(scored.statistics, merged.T)[:, 0]
        chunk.statistics[TokenRow.LOGPROB_LABEL, tokens] = label_logprobs
        if scored.gradient is not None:
            gradient = self._with_label(scored.gradient, chunk.statistics, tokens, scored.probabilities)
            scored = scored._replace(gradient=gradient)
        return scored, extra

    def logit_gradient(self, statistics: Tensor, tokens: slice = _EVERY) -> LogitGradient:
        gradient, p = self._inner.logit_gradient(statistics, tokens), None
        if gradient.token_ids is not None:  # one id, the sampled token
            p = model_logprobs(self.problem, statistics, tokens)[0].exp()[:, None]
        return self._with_label(gradient, statistics, tokens, p)

    def _with_label(
        self, gradient: LogitGradient, statistics: Tensor, tokens: slice, probabilities: Tensor | None
    ) -> LogitGradient:
        assert self.problem.labels is not None
        weight = self._weights(statistics, tokens)[0]
        logprobs = statistics[TokenRow.LOGPROB_LABEL, tokens]
        return gradient.with_label(self.problem.labels[tokens], weight, logprobs, probabilities)

    def _weights(self, statistics: Tensor, tokens: slice = _EVERY) -> tuple[Tensor, Tensor]:
        """(n,) weights of the supervised term, 0 where there is no label with p > 0, and the term itself."""
        labels, weight = self.problem.labels, self.problem.options.sft_weight
        assert labels is not None
        logprobs = statistics[TokenRow.LOGPROB_LABEL, tokens]
        counts = has_label(logprobs, labels[tokens])
        return torch.where(counts, weight, torch.zeros_like(logprobs)), torch.where(counts, -weight * logprobs, 0)

    def values(self, statistics: Tensor) -> TokenValues:
        values = self._inner.values(statistics)
        return values._replace(loss=values.loss + self._weights(statistics)[1])


_ESTIMATORS: dict[str, Callable[[Problem], Estimator]] = {"sampled": Sampled, "full": Full, "topk": TopK}


def estimator_of(problem: Problem) -> Estimator:
    estimator = _ESTIMATORS[problem.options.estimator](problem)
    return estimator if problem.labels is None else WithLabels(estimator)
