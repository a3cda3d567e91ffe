"""A divergence over K tokens of each position and the rest of the vocabulary."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...heads import Head
from ...objective import combination
from ...objective.divergences import ReverseKL
from ...objective.layout import TokenRow
from ...objective.logit_gradient import LogitGradient
from ...objective.statistics import entropy, merge, token_logprob
from ...objective.topk import CompositeOnSupport, OnSupport, at_least, term, with_sampled
from ...problem import FlatComposite, FrozenModel
from ...rowops import LogitTransform, ModelRows, RowOps, RowProblem, Stat, sparse
from ...rowops.torch import TorchRowOps, rows_of
from ..buffers import columns
from ..vocab_parallel import merge_over_ranks, no_logit_, own_ids, own_statistics, topk_ids
from .base import (
    Chunk,
    Estimator,
    Loaded,
    Scored,
    Support,
    TokenValues,
    model_logprobs,
    reward_scale_of,
)
from .token_stats import MODELS, fill_reward_scale

_STUDENT_STATS = (Stat.LOGSUM_STUDENT, Stat.MEAN_LOGIT, Stat.LOGIT_STUDENT, Stat.MAX_STUDENT)


class TopK(Estimator):
    """A divergence over K tokens of each position and the rest of the vocabulary."""

    @property
    def gradient_with_statistics(self) -> bool:
        return True

    def load(self, chunk: Chunk) -> Loaded:
        """Top-k token ids: the student's, else the teacher's, else the reference's, or those of a server.

        Frozen models are scored first where possible, so that their buffer is reused for the student.
        """
        problem, route, buffers, statistics = self.problem, chunk.route, chunk.buffers, chunk.statistics
        start, stop = chunk.start, chunk.stop
        row_problem, ids, slot = None, None, "student"
        sampled = None if problem.token_ids is None else problem.token_ids[start:stop]
        if problem.options.k is None:
            assert problem.support_ids is not None
            ids = problem.support_ids[start:stop]
        if problem.options.support == "student":
            row_problem, slot = self._row_problem(chunk, joint=False, writable=True), "other"
            ids = self._largest(problem.student, row_problem.student, sampled)
        models: list[OnSupport | CompositeOnSupport | None] = []
        alone: list[Tensor | None] = []
        for head, given, logsum, logit in (
            (route.teacher, problem.teacher_topk, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER),
            (route.ref, problem.ref_topk, Stat.LOGSUM_REF, Stat.LOGIT_REF),
        ):
            if isinstance(head, FlatComposite):
                if ids is None:
                    ids = self._largest(head, buffers.load(head, "other", start, stop), sampled)
                on_composite, logprobs = self._composite_on_support(chunk, head, ids, slot)
                statistics[logit, start:stop] = logprobs  # with a normaliser of 0
                models.append(on_composite)
                alone.append(None)
            elif head is not None:
                rows = buffers.load(head, slot, start, stop, writable=True)
                if ids is None:
                    ids = self._largest(head, rows, sampled)
                own_sampled = None if sampled is None else own_ids(head, sampled)
                whole = RowProblem(columns(problem, head), rows, token_ids=own_sampled)
                scored, on_support, _ = statistics_on_support(problem.ops, whole, ids, sampled, head)
                statistics[logsum, start:stop] = scored[Stat.LOGSUM_STUDENT]
                statistics[logit, start:stop] = scored[Stat.LOGIT_STUDENT]
                models.append(on_support)
                alone.append(scored)
            elif given is not None:
                assert problem.support_ids is not None
                ids = problem.support_ids[start:stop] if ids is None else ids
                logprobs = given[start:stop].to(problem.dtype).masked_fill(ids < 0, -math.inf)
                models.append(OnSupport(logprobs, None))
                alone.append(None)
                own = problem.teacher_logprobs if logit == Stat.LOGIT_TEACHER else problem.ref_logprobs
                if own is not None:
                    statistics[logit, start:stop] = own[start:stop]  # with a normaliser of 0
            else:
                models.append(None)
                alone.append(None)
        assert ids is not None
        if row_problem is None:
            row_problem = self._row_problem(chunk, joint=False, writable=True)
        return Loaded(row_problem, Support(ids, models[0], models[1], alone[0], alone[1]))

    def _largest(self, head: FrozenModel, rows: ModelRows, sampled: Tensor | None) -> Tensor:
        """(C, k) ids of a model's k largest logits; with ``tail="sampled"`` as ``with_sampled`` gives them."""
        problem, k = self.problem, self.problem.options.k
        assert k is not None
        ids = topk_ids(head, rows, columns(problem, head), k)
        if problem.options.tail != "sampled":
            return ids
        assert sampled is not None
        return with_sampled(ids, sampled)

    def _composite_on_support(
        self, chunk: Chunk, model: FlatComposite, ids: Tensor, slot: str
    ) -> tuple[CompositeOnSupport, Tensor]:
        """A model made of several on the support, and its log-probs (C,) of the sampled tokens, one GEMM for each."""
        problem, sampled = self.problem, rows_of(self.problem.token_ids, chunk.tokens)
        models, logprobs, weights = [], [], model.weights_of(chunk.tokens)
        for head in model.heads:
            assert head is not None
            rows = chunk.buffers.load(head, slot, chunk.start, chunk.stop, writable=True)
            own_sampled = None if sampled is None else own_ids(head, sampled)
            whole = RowProblem(columns(problem, head), rows, token_ids=own_sampled)
            scored, on_support, _ = statistics_on_support(problem.ops, whole, ids, sampled, head)
            models.append(on_support)
            logprobs.append(token_logprob(scored[Stat.LOGIT_STUDENT], scored[Stat.LOGSUM_STUDENT]))
        on_composite = CompositeOnSupport.of(models, weights, model.mixture)
        return on_composite, combination.combine(logprobs, weights, model.mixture)

    def recompute(self, chunk: Chunk) -> RowProblem:
        return self._row_problem(chunk, joint=False)

    def statistics(self, chunk: Chunk, loaded: Loaded, *extra_rows: Tensor) -> tuple[Scored, list[Tensor]]:
        problem, tokens, (row_problem, support) = self.problem, chunk.tokens, loaded
        assert support is not None
        sampled = rows_of(problem.token_ids, tokens)
        scored, student, extra = statistics_on_support(
            problem.ops, row_problem, support.token_ids, sampled, problem.student, *extra_rows
        )
        for stat in _STUDENT_STATS:  # those of teacher and reference are there already
            chunk.own[stat] = scored[stat]
        ids, teacher, ref, bounded = support.token_ids, support.teacher, support.ref, student
        lowest, own_lowest = problem.options.logprob_min, problem.options.student_logprob_min
        if lowest is not None:
            teacher, ref = (None if x is None else at_least(x, lowest, ids) for x in (teacher, ref))
        if own_lowest is not None:
            bounded = at_least(student, own_lowest, ids)
        if problem.reward_scale_fn is not None:
            within = support._replace(teacher=teacher, ref=ref)
            compute = functools.partial(self._statistic, chunk, within, bounded, scored)
            fill_reward_scale(problem, chunk.statistics, chunk.start, chunk.stop, compute)
        loss, kl, gradient = term(
            problem.options.tail,
            problem.divergence.rows(tokens),
            reward_scale_of(problem, chunk.statistics, tokens),
            ids,
            student=bounded,
            teacher=teacher,
            ref=ref,
        )
        chunk.statistics[TokenRow.TOPK_LOSS, tokens] = loss
        chunk.statistics[TokenRow.TOPK_KL, tokens] = kl
        if problem.has_loss_factors:
            _, factor = self.bounded(loss)
            weights = None if self._sequences_follow else self.importance(chunk.statistics, tokens)
            gradient = gradient.scaled(factor if weights is None else factor * weights)
        return Scored(scored, gradient, student.logprobs), extra

    def _statistic(
        self, chunk: Chunk, support: Support, student: OnSupport, scored: Tensor, name: str
    ) -> Tensor | None:
        """(C,) one of the :class:`TokenStats`; None for all tokens where a model's scores are a server's for some."""
        problem, tail = self.problem, self.problem.options.tail
        model, _, what = name.partition("_")
        given = (None, problem.teacher_topk, problem.ref_topk)[MODELS.index(model)] if model in MODELS else None
        if what == "logprobs":
            own = (None, problem.teacher_logprobs, problem.ref_logprobs)[MODELS.index(model)]
            if given is not None and own is None:
                return None
            return model_logprobs(problem.has, chunk.statistics, chunk.tokens)[MODELS.index(model)]
        if what == "entropy":
            alone = (scored, support.teacher_alone, support.ref_alone)[MODELS.index(model)]
            return None if alone is None or given is not None else entropy(alone)
        if tail == "sampled":  # its support has a token more, where that lies outside
            return None
        other = support.teacher if what == "teacher" else support.ref
        return term(tail, ReverseKL(), 1.0, support.token_ids, student=student, teacher=other, ref=None).kl

    @property
    def _sequences_follow(self) -> bool:
        """Whether importance weights are those of whole sequences under the current policy, known after all chunks."""
        problem = self.problem
        known = problem.rollout_logprobs is None or problem.importance is not None
        return not known and problem.options.sequence_importance is not None

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        weights = self.importance(statistics) if self.problem.has_loss_factors and self._sequences_follow else None
        if weights is not None:  # the gradient was made before they were known
            upstream = tuple([None if x is None else x * weights for x in upstream])
        return super().weighted(statistics, gradient, *upstream)

    def values(self, statistics: Tensor) -> TokenValues:
        loss = statistics[TokenRow.TOPK_LOSS]
        return self.with_loss_factors(loss, statistics) if self.problem.has_loss_factors else TokenValues(loss)


def statistics_on_support(
    ops: RowOps,
    alone: RowProblem,  # one model's logits, writable
    token_ids: Tensor,  # (C, K) over the whole vocabulary, like the next
    sampled: Tensor | None,  # (C,)
    head: Head,  # that model
    *extra_rows: Tensor,
) -> tuple[Tensor, OnSupport, list[Tensor]]:
    """Statistics of one model, its log-probs on the support and that of the rest of the vocabulary.

    The rest is summed on its own. As 1 minus the mass on the support it would have an error of 1e-7, of which the
    logarithm makes a large one where the rest is light.
    """
    model = alone.student
    here, shard = own_ids(head, token_ids), head.shard
    logits = sparse.logits_at(model, here)
    with sparse.hidden(model, here):
        rest = own_statistics(ops, alone)
    extra = list(extra_rows)
    if head.vocab_map is not None and alone.token_ids is not None:
        no_logit_(rest, alone.token_ids)
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
    # a row without support has no mass on the tokens: 1 minus that is 1
    empty = torch.isneginf(statistics[Stat.LOGSUM_STUDENT])
    return statistics, OnSupport(logprobs, log_rest.masked_fill(empty, 0)), extra
