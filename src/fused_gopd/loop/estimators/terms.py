"""Terms of the student's logits beside the loss: an entropy bonus, a KL to the reference, labels at a temperature.

A term is a part of the estimator's own row pass where that pass has all it needs: the entropy where the row operation
has the student alone (its divergence, of a single model, is minus the entropy), a KL estimate from the log-prob of the
sampled token. Otherwise it is a row problem of its own on the same logits, a :class:`_Pass`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...objective.divergences import ReverseKL
from ...objective.kl_estimates import KL_ESTIMATES, kl_estimate
from ...objective.layout import STATISTICS, TokenRow, pass_rows, statistics_rows
from ...objective.logit_gradient import LogitGradient, Term
from ...objective.statistics import entropy, frozen_alone, token_logprob
from ...objective.supervised import supervised
from ...problem import FlatComposite, Problem
from ...rowops import Beside, GradientWeights, RowProblem, Stat, composite
from ..vocab_parallel import local_ids, statistics_of
from .base import EVERY, Chunk, Estimator, Loaded, Scored, TokenValues, model_logprobs


class _Pass:
    """A term whose row problem is its own."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.options = problem, problem.options

    def row_problem(self, chunk: Chunk, loaded: RowProblem) -> RowProblem:
        """Of the student's logits, those of ``loaded``."""
        raise NotImplementedError

    def gradient(self, statistics: Tensor, tokens: slice) -> LogitGradient:
        raise NotImplementedError

    def values(self, statistics: Tensor, tokens: slice = EVERY) -> Tensor:
        """(n,) what it adds to the token losses; statistics are the pass's own, (len(Stat), n)."""
        raise NotImplementedError


class _Entropy(_Pass):
    """-entropy_weight H(p), of the student over its own support."""

    def row_problem(self, chunk: Chunk, loaded: RowProblem) -> RowProblem:
        return RowProblem(loaded.vocab_size, loaded.student)

    def gradient(self, statistics: Tensor, tokens: slice) -> LogitGradient:
        return LogitGradient(divergence=torch.full_like(statistics[0], self.options.entropy_weight))

    def values(self, statistics: Tensor, tokens: slice = EVERY) -> Tensor:
        return -self.options.entropy_weight * entropy(statistics)


class _ExactKL(_Pass):
    """kl_ref_weight KL(p || r), over the joint support of student and reference."""

    def row_problem(self, chunk: Chunk, loaded: RowProblem) -> RowProblem:
        ref, head = loaded.ref, chunk.route.ref
        if ref is None:
            assert head is not None
            ref = chunk.buffers.load(head, "ref", chunk.start, chunk.stop, joint=True)
        return RowProblem(loaded.vocab_size, loaded.student, ref=ref, reward_scale=0.0, divergence=ReverseKL())

    def gradient(self, statistics: Tensor, tokens: slice) -> LogitGradient:
        return LogitGradient(divergence=torch.full_like(statistics[0], self.options.kl_ref_weight))

    def values(self, statistics: Tensor, tokens: slice = EVERY) -> Tensor:
        value = self.problem.ops.losses(ReverseKL(), 0.0, (False, True), statistics)
        return self.options.kl_ref_weight * value


class _Labels(_Pass):
    """-sft_weight log p[label] at ``sft_temperature``."""

    def row_problem(self, chunk: Chunk, loaded: RowProblem) -> RowProblem:
        labels, temperature = self.problem.labels, self.options.sft_temperature
        assert labels is not None
        assert temperature is not None
        student = replace(loaded.student, transform=replace(loaded.student.transform, temperature=temperature))
        # a token without a label reads the first entry, and has the weight 0
        ids = local_ids(self.problem.student.shard, labels[chunk.tokens].clamp_min(0))
        return RowProblem(loaded.vocab_size, student, token_ids=ids)

    def logprobs(self, statistics: Tensor) -> Tensor:
        return token_logprob(statistics[Stat.LOGIT_STUDENT], statistics[Stat.LOGSUM_STUDENT])

    def gradient(self, statistics: Tensor, tokens: slice) -> LogitGradient:
        labels = self.problem.labels
        assert labels is not None
        weight = supervised(self.options.sft_weight, self.logprobs(statistics), labels[tokens])[0]
        return LogitGradient(weight=weight, token_ids=labels[tokens].clamp_min(0)[:, None])

    def values(self, statistics: Tensor, tokens: slice = EVERY) -> Tensor:
        labels = self.problem.labels
        assert labels is not None
        return supervised(self.options.sft_weight, self.logprobs(statistics), labels[tokens])[1]


_PASSES: dict[str, Callable[[Problem], _Pass]] = {"entropy": _Entropy, "kl_ref": _ExactKL, "labels": _Labels}


class WithTerms(Estimator):
    """An estimator plus terms. Statistics of the passes are rows after those of the estimator."""

    def __init__(self, inner: Estimator) -> None:
        super().__init__(inner.problem)
        self._inner, self._rows = inner, inner.statistics_rows
        options = inner.problem.options
        self._passes = [_PASSES[name](inner.problem) for name in options.passes]
        self._entropy = 0.0 if options.joint else options.entropy_weight
        self._kl = options.kl_ref if options.kl_ref in KL_ESTIMATES else None

    @property
    def statistics_rows(self) -> int:
        options = self.problem.options
        return statistics_rows(options.estimator, options.joint, len(self._passes))

    @property
    def gradient_with_statistics(self) -> bool:
        return self._inner.gradient_with_statistics

    def _own(self, chunk: Chunk) -> Chunk:
        """The chunk with the statistics of the estimator alone."""
        return chunk.of_rows(self._rows)

    def _of(self, i: int, statistics: Tensor, tokens: slice = EVERY) -> Tensor:
        """(len(Stat), C) statistics of a pass."""
        return statistics[pass_rows(self._rows, i), tokens]

    def score_frozen(self, chunk: Chunk) -> None:
        self._inner.score_frozen(self._own(chunk))

    def load(self, chunk: Chunk) -> Loaded:
        loaded = self._inner.load(self._own(chunk))
        return loaded._replace(row_problem=self._with_passes(chunk, loaded.row_problem))

    def recompute(self, chunk: Chunk) -> RowProblem:
        return self._with_passes(chunk, self._inner.recompute(self._own(chunk)))

    def _with_passes(self, chunk: Chunk, row_problem: RowProblem) -> RowProblem:
        if not self._passes:
            return row_problem
        tokens, width, buffers = chunk.stop - chunk.start, row_problem.vocab_size, chunk.buffers
        made = tuple([x.row_problem(chunk, row_problem) for x in self._passes])
        return replace(row_problem, beside=Beside(made, lambda i: buffers.scratch(i, tokens, width)))

    def statistics(self, chunk: Chunk, loaded: Loaded, *extra_rows: Tensor) -> tuple[Scored, list[Tensor]]:
        problem, tokens = self.problem, chunk.tokens
        if self._passes:
            assert loaded.row_problem.beside is not None
            for i, (term, own) in enumerate(zip(self._passes, loaded.row_problem.beside.problems, strict=True)):
                out = self._of(i, chunk.statistics, tokens)
                statistics_of(problem.ops, problem.student.shard, own, out=out)
                if isinstance(term, _ExactKL) and isinstance(chunk.route.ref, FlatComposite):
                    composite.drop_normaliser(out, Stat.MAX_REF, Stat.LOGSUM_REF)
                if isinstance(term, _Labels):
                    chunk.statistics[TokenRow.LOGPROB_LABEL, tokens] = term.logprobs(out)
        scored, extra = self._inner.statistics(self._own(chunk), loaded, *extra_rows)
        if scored.gradient is not None:
            gradient = scored.gradient
            if self._entropy:
                gradient = self._with_entropy(gradient, scored.statistics, scored.logprobs)
            scored = scored._replace(gradient=self._with_passes_of(gradient, chunk.statistics, tokens))
        return scored, extra

    def scored(self, chunk: Chunk) -> None:
        self._inner.scored(self._own(chunk))

    def score(self, chunk: Chunk) -> LogitGradient | None:
        if self._passes or self.gradient_with_statistics:
            return super().score(chunk)
        return self._inner.score(self._own(chunk))

    # ------------------------------------------------------------------------------------------------------ gradients

    def weights_now(self, chunk: Chunk, token_weights: Tensor | None) -> GradientWeights | None:
        if self._passes:
            return None
        now = self._inner.weights_now(self._own(chunk), token_weights)
        if now is None or not self._entropy:
            return now
        if token_weights is None:
            return None  # what completes a gradient at unit scale is the policy's alone
        return replace(now, divergence=self._entropy * token_weights)

    def slope(self, chunk: Chunk) -> Tensor | None:
        slope = self._inner.slope(self._own(chunk))
        if self._kl is None:
            return slope
        kl = -self._kl_ref(chunk.statistics, chunk.tokens)[1]
        return kl if slope is None else slope + kl

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        gradient = self._inner.logit_gradient(statistics[: self._rows], tokens)
        return self._completed(gradient, statistics, tokens)

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        (each,) = upstream
        assert each is not None
        kept, factor = gradient, each.to(self.problem.dtype).contiguous()
        gradient = self._inner.weighted(statistics[: self._rows], gradient, each)
        if kept is None:
            return self._completed(gradient, statistics, EVERY, factor)
        # as topk has kept it, with its part of the entropy at the token ids
        divergence = self._entropy * factor if self._entropy else None
        return self._with_passes_of(replace(gradient, divergence=divergence), statistics, EVERY, factor)

    def _completed(
        self,
        gradient: LogitGradient,  # of the estimator
        statistics: Tensor,
        tokens: slice,
        factor: Tensor | None = None,  # (n,) of what is added
    ) -> LogitGradient:
        own, logprobs = statistics[:STATISTICS, tokens], None
        if gradient.values is not None:  # of a sampled token and a label
            columns = (model_logprobs((False, False), own)[0], own[TokenRow.LOGPROB_LABEL])
            logprobs = torch.stack(columns, 1)
        if self._kl is not None:
            weight = -self._kl_ref(statistics, tokens)[1]
            gradient = gradient.with_logprob(weight if factor is None else weight * factor, logprobs)
        if self._entropy:
            gradient = self._with_entropy(gradient, own, logprobs, factor)
        return self._with_passes_of(gradient, statistics, tokens, factor)

    def _with_entropy(
        self, gradient: LogitGradient, own: Tensor, logprobs: Tensor | None, factor: Tensor | None = None
    ) -> LogitGradient:
        weight = torch.full_like(own[0], self._entropy) if factor is None else self._entropy * factor
        return gradient.with_entropy(weight, entropy(own), logprobs)

    def _with_passes_of(
        self, gradient: LogitGradient, statistics: Tensor, tokens: slice, factor: Tensor | None = None
    ) -> LogitGradient:
        found = []
        for i, term in enumerate(self._passes):
            own = self._of(i, statistics, tokens)
            added = term.gradient(own, tokens)
            found.append(Term(own, added if factor is None else added.scaled(factor)))
        return replace(gradient, terms=tuple(found)) if found else gradient

    # --------------------------------------------------------------------------------------------------------- values

    def _kl_ref(self, statistics: Tensor, tokens: slice = EVERY) -> tuple[Tensor, Tensor]:
        """(C,) the weighted estimate of the KL to the reference, and its derivative with respect to log p."""
        alone = frozen_alone(statistics[: self._rows], tokens)
        assert alone is not None
        assert self._kl is not None
        student = model_logprobs((False, False), statistics[:STATISTICS, tokens])[0]
        ref = token_logprob(alone[1][Stat.LOGIT_STUDENT], alone[1][Stat.LOGSUM_STUDENT])
        value, slope = kl_estimate(self._kl, student, ref)
        weight = self.problem.options.kl_ref_weight
        return weight * value, weight * slope

    def values(self, statistics: Tensor) -> TokenValues:
        values = self._inner.values(statistics[: self._rows])
        loss = values.loss
        if self._entropy:
            loss = loss - self._entropy * entropy(statistics)
        if self._kl is not None:
            loss = loss + self._kl_ref(statistics)[0]
        for i, term in enumerate(self._passes):
            loss = loss + term.values(self._of(i, statistics))
        return values._replace(loss=loss)
