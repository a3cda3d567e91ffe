"""The policy gradient at the sampled tokens."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from ...objective import policy
from ...objective.divergences import ReverseKL, divergence_value
from ...objective.layout import TokenRow, statistics_rows
from ...objective.logit_gradient import LogitGradient
from ...objective.policy import PolicyTerm
from ...objective.rollout import in_trust_region
from ...objective.statistics import entropy, frozen_alone
from ...objective.token_functions import call_function
from ...problem import FlatComposite, Problem
from ...rowops import GradientWeights, Policy, PolicyStat, Stat
from ...rowops.torch import rows_of
from ...token_stats import AdvantageFn, TokenStats
from .base import (
    EVERY,
    Chunk,
    Estimator,
    Loaded,
    TokenValues,
    model_logprobs,
    ones,
    reward_scale_of,
)
from .token_stats import MODELS, fill_reward_scale, known_of


class Sampled(Estimator):
    """The policy gradient at the sampled tokens.

    With ``baseline="expected"`` the statistics are those of the reverse KL over the joint support, whose value is the
    baseline. Otherwise models are scored one by one.

    A row operation makes the policy loss and its slope where it can. An ``advantage_fn``, a baseline and ratios of
    whole sequences are made here, from advantages that are kept among the statistics.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._rule = policy.rule_of(problem.options)
        self._by_rows = not problem.slope_follows and problem.options.ratio == "token"

    @property
    def statistics_rows(self) -> int:
        return statistics_rows("sampled", self.problem.joint)

    def score_frozen(self, chunk: Chunk) -> None:
        problem, route = self.problem, chunk.route
        alone = frozen_alone(chunk.statistics, chunk.tokens)
        if alone is None:
            return
        models = ((route.teacher, problem.teacher_logprobs), (route.ref, problem.ref_logprobs))
        for (head, given), out in zip(models, alone, strict=True):
            if isinstance(head, FlatComposite):
                self._score_composite(chunk, head, out)
            elif head is not None:
                self._score_alone(chunk, head, out)
            elif given is not None:
                out[Stat.LOGIT_STUDENT] = given[chunk.tokens]  # with a normaliser of 0

    def load(self, chunk: Chunk) -> Loaded:
        return Loaded(self._row_problem(chunk, self.problem.joint))

    def score(self, chunk: Chunk) -> LogitGradient | None:
        if self.problem.joint:
            return super().score(chunk)
        self._score_alone(chunk, self.problem.student, chunk.own)
        self.scored(chunk)
        return None

    def scored(self, chunk: Chunk) -> None:
        if self._by_rows:
            return
        if self._joint_composite:
            super().scored(chunk)
        problem, tokens = self.problem, chunk.tokens
        if problem.reward_scale_fn is not None and not problem.joint:  # where it is, lambda is known with the logits
            fill_reward_scale(
                problem, chunk.statistics, chunk.start, chunk.stop, functools.partial(self._statistic, chunk)
            )
        used, reported = self._advantages(chunk)
        chunk.statistics[TokenRow.ADVANTAGE, tokens] = used
        chunk.statistics[TokenRow.REPORTED_ADVANTAGE, tokens] = reported

    def _statistic(self, chunk: Chunk, name: str) -> Tensor | None:
        """(C,) one of the :class:`TokenStats` of models that are scored one by one."""
        problem, statistics, tokens = self.problem, chunk.statistics, chunk.tokens
        model, _, what = name.partition("_")
        if what == "logprobs":
            return model_logprobs(problem.has, statistics, tokens)[MODELS.index(model)]
        if model == "student":
            return entropy(statistics[:, tokens])
        alone = frozen_alone(statistics, tokens)
        if what != "entropy" or alone is None:
            return None
        i = MODELS.index(model) - 1
        given = (problem.teacher_logprobs, problem.ref_logprobs)[i]
        if isinstance((chunk.route.teacher, chunk.route.ref)[i], FlatComposite):
            return None  # of its models there is one log-prob each
        return entropy(alone[i]) if problem.has[i] and given is None else None

    def _advantages(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(C,) those of the gradient and those that the loss reports, once the log-probs are in the statistics."""
        problem, tokens, statistics = self.problem, chunk.tokens, chunk.statistics
        if problem.advantages is not None:
            used, reported = problem.advantages[:, tokens]
            return used, reported
        scale, expected = reward_scale_of(problem, statistics, tokens), None
        if problem.options.baseline == "expected":
            expected = divergence_value(ReverseKL(), scale, statistics[:, tokens], problem.has)
        student, teacher, ref = model_logprobs(problem.has, statistics, tokens, self._joint_composite)
        return policy.advantages_of(
            self._rule,
            reward_scale=scale,
            student=student,
            teacher=teacher,
            ref=ref,
            old=rows_of(problem.old_logprobs, tokens) if problem.options.advantage_policy == "old" else None,
            hook=None if problem.advantage_fn is None else self._hook(problem.advantage_fn, chunk, student),
            expected=expected,
        )

    def _hook(self, function: AdvantageFn, chunk: Chunk, student: Tensor) -> policy.Hook:
        """The caller's ``advantage_fn`` as a function of A and of the log-probs, given all else of the chunk."""
        problem, scale = self.problem, reward_scale_of(self.problem, chunk.statistics, chunk.tokens)

        def hook(advantages: Tensor | None, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
            stats = TokenStats(
                **known_of(problem, chunk.start, chunk.stop),
                advantages=advantages,
                student_logprobs=student,
                teacher_logprobs=teacher,
                ref_logprobs=ref,
                student_entropy=entropy(chunk.statistics[:, chunk.tokens]),
                teacher_entropy=self._statistic(chunk, "teacher_entropy"),
                ref_entropy=self._statistic(chunk, "ref_entropy"),
                reward_scale=scale.clone() if isinstance(scale, Tensor) else scale,
            )
            return call_function("advantage_fn", function, stats, problem.dtype)

        return hook

    def _policy(self, statistics: Tensor, tokens: slice) -> Policy:
        problem, alone = self.problem, frozen_alone(statistics, tokens)
        assert alone is not None
        teacher, ref = (x if there else None for x, there in zip(alone, problem.has, strict=True))
        old, rollout = rows_of(problem.old_logprobs, tokens), None
        if problem.importance is None:
            rollout = rows_of(problem.rollout_logprobs, tokens)
        return Policy(self._rule, reward_scale_of(problem, statistics, tokens), teacher, ref, old, rollout)

    def _terms(self, statistics: Tensor, tokens: slice = EVERY) -> Tensor:
        """(len(PolicyStat), C) losses and slopes; of all tokens at once where ratios are those of whole sequences."""
        problem = self.problem
        if self._by_rows:
            terms = problem.ops.policy(self._policy(statistics, tokens), statistics[: len(Stat), tokens])
            if problem.importance is not None:
                weights = problem.importance[tokens]
                terms[: PolicyStat.ADVANTAGE].mul_(weights).masked_fill_(weights == 0, 0)  # loss and slope
                terms[PolicyStat.IMPORTANCE] = weights
            return terms
        options, old = problem.options, rows_of(problem.old_logprobs, tokens)
        student, log_ratio = model_logprobs(problem.has, statistics, tokens)[0], None
        if options.ratio in ("sequence", "sequence-mean"):
            log_ratio = policy.sequence_log_ratio(student, old, self._mean_over_sequences)
        importance = None if problem.rollout_logprobs is None else self.importance(statistics, tokens)
        if importance is not None and problem.rollout_logprobs is not None:
            rollout, advantages = problem.rollout_logprobs[tokens], statistics[TokenRow.ADVANTAGE, tokens]
            importance = in_trust_region(options, importance, advantages, student, rollout, problem.over_sequences)

        def term(row: TokenRow) -> PolicyTerm:
            return policy.policy_term(self._rule, statistics[row, tokens], student, old, importance, log_ratio)

        used = term(TokenRow.ADVANTAGE)
        if problem.options.baseline != "none":
            used = replace(used, loss=term(TokenRow.REPORTED_ADVANTAGE).loss)
        return used.stacked()

    def _mean_over_sequences(self, values: Tensor) -> Tensor:
        """(n,) values of all live tokens, each replaced by the mean over the live tokens of its sequence."""
        return self.problem.over_sequences.reduce("mean", values)

    def weights_now(self, chunk: Chunk, token_weights: Tensor | None) -> GradientWeights | None:
        if token_weights is None:
            return GradientWeights(token=ones(self.problem, chunk))
        if not self._by_rows:
            return None  # the slope would have to be applied to logits that are written already
        rule = self._policy(chunk.statistics, chunk.tokens)
        if self.problem.importance is not None:
            weights = self.problem.importance[chunk.tokens]
            assert rule.old_logprobs is not None
            # a ratio that overflows times a weight of 0 would be NaN
            rule = replace(rule, old_logprobs=rule.old_logprobs.masked_fill(weights == 0, 0))
            token_weights = token_weights * weights
        return GradientWeights(token=token_weights, policy=rule)

    def slope(self, chunk: Chunk) -> Tensor | None:
        return -self._terms(chunk.statistics, chunk.tokens)[PolicyStat.DLOGPROB]

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        assert self.problem.token_ids is not None
        weight = -self._terms(statistics, tokens)[PolicyStat.DLOGPROB]
        return LogitGradient(weight=weight, token_ids=self.problem.token_ids[tokens, None])

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        if self.problem.options.ratio != "sequence-mean":
            return super().weighted(statistics, gradient, *upstream)
        # every loss of a sequence depends on the log-probs of all its tokens, through their mean
        (each,), old = upstream, self.problem.old_logprobs
        assert each is not None
        assert old is not None
        assert self.problem.token_ids is not None
        student = model_logprobs(self.problem.has, statistics)[0]
        slope = self._mean_over_sequences(self._terms(statistics)[PolicyStat.DLOGPROB] * each.to(self.problem.dtype))
        slope = slope.masked_fill(torch.isneginf(student) | torch.isneginf(old), 0)
        return LogitGradient(weight=-slope, token_ids=self.problem.token_ids[:, None])

    def values(self, statistics: Tensor) -> TokenValues:
        terms = self._terms(statistics)
        return TokenValues(terms[PolicyStat.LOSS], policy=terms)
