"""The supervised term, added to any estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from ...objective.layout import TokenRow
from ...objective.logit_gradient import LogitGradient
from ...objective.supervised import supervised
from ...rowops import RowProblem, sparse
from ..vocab_parallel import local_ids
from .base import (
    EVERY,
    Chunk,
    Estimator,
    Loaded,
    Scored,
    TokenValues,
    model_logprobs,
)


class WithLabels(Estimator):
    """An estimator plus the supervised term, -sft_weight log p[label], from the same logits."""

    def __init__(self, inner: Estimator) -> None:
        super().__init__(inner.problem)
        self._inner = inner

    @property
    def statistics_rows(self) -> int:
        return self._inner.statistics_rows

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
            assert scored.logprobs is not None
            gradient = self._with_label(scored.gradient, chunk.statistics, tokens, scored.logprobs)
            logprobs = torch.cat((scored.logprobs, label_logprobs[:, None]), 1)
            scored = scored._replace(gradient=gradient, logprobs=logprobs)
        return scored, extra

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        gradient, logprobs = self._inner.logit_gradient(statistics, tokens), None
        if gradient.token_ids is not None:  # one id, the sampled token
            logprobs = model_logprobs((False, False), statistics, tokens)[0][:, None]
        return self._with_label(gradient, statistics, tokens, logprobs)

    def weighted(self, statistics: Tensor, gradient: LogitGradient | None, *upstream: Tensor | None) -> LogitGradient:
        # a gradient that is given has the term already; that of GSPO has the upstream gradients of its whole sequence
        if gradient is not None or self.problem.options.ratio != "sequence-mean":
            return super().weighted(statistics, gradient, *upstream)
        (each,) = upstream
        assert each is not None
        gradient, logprobs = self._inner.weighted(statistics, None, each), None
        if gradient.token_ids is not None:  # one id, the sampled token
            logprobs = model_logprobs((False, False), statistics)[0][:, None]
        return self._with_label(gradient, statistics, EVERY, logprobs, each.to(self.problem.dtype))

    def _with_label(
        self,
        gradient: LogitGradient,
        statistics: Tensor,
        tokens: slice,
        logprobs: Tensor | None,
        factor: Tensor | None = None,  # (n,) of the label's term
    ) -> LogitGradient:
        assert self.problem.labels is not None
        labels, label_logprobs = self.problem.labels[tokens], statistics[TokenRow.LOGPROB_LABEL, tokens]
        weight = supervised(self.problem.options.sft_weight, label_logprobs, labels)[0]
        weight = weight if factor is None else weight * factor
        return gradient.with_label(labels, weight, label_logprobs, logprobs)

    def values(self, statistics: Tensor) -> TokenValues:
        values = self._inner.values(statistics)
        labels, weight = self.problem.labels, self.problem.options.sft_weight
        assert labels is not None
        return values._replace(loss=values.loss + supervised(weight, statistics[TokenRow.LOGPROB_LABEL], labels)[1])
