"""The policy gradient at the sampled tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...heads import LinearHead
from ...objective import policy
from ...objective.divergences import ReverseKL, divergence_value
from ...objective.logit_gradient import LogitGradient
from ...objective.policy import PolicyTerm
from ...objective.statistics import TokenRow, entropy
from ...options import AdvantageFn, TokenStats
from ...rowops import GradientWeights, Stat
from ...rowops.torch import rows_of
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
            expected = divergence_value(ReverseKL(), scale, statistics[:, tokens], problem.has)
        student, teacher, ref = model_logprobs(problem.has, statistics, tokens)
        return policy.advantages_of(
            policy.rule_of(options),
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

    def policy_term(self, statistics: Tensor, tokens: slice = EVERY) -> PolicyTerm:
        """Token losses and their slopes; of all tokens at once where ratios are those of whole sequences."""
        problem = self.problem
        old, rollout = rows_of(problem.old_logprobs, tokens), rows_of(problem.rollout_logprobs, tokens)
        student = model_logprobs(problem.has, statistics, tokens)[0]
        rule, log_ratio = policy.rule_of(problem.options), None
        if problem.options.ratio == "sequence":
            log_ratio = policy.sequence_log_ratio(student, old, self._mean_over_sequences)

        def term(advantages: Tensor) -> PolicyTerm:
            return policy.policy_term(rule, advantages, student, old, rollout, log_ratio)

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
        return GradientWeights(token=ones(self.problem, chunk))

    def slope(self, chunk: Chunk) -> Tensor | None:
        return -self.policy_term(chunk.statistics, chunk.tokens).dlogprob

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        assert self.problem.token_ids is not None
        weight = -self.policy_term(statistics, tokens).dlogprob
        return LogitGradient(weight=weight, token_ids=self.problem.token_ids[tokens, None])

    def values(self, statistics: Tensor) -> TokenValues:
        term = self.policy_term(statistics)
        return TokenValues(term.loss, policy=term)
