"""A divergence over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ...objective.layout import TokenRow
from ...objective.logit_gradient import LogitGradient
from ...rowops import GradientWeights, Stat
from .base import (
    EVERY,
    Chunk,
    Estimator,
    Loaded,
    TokenValues,
    ones,
    reward_scale_of,
)


class Full(Estimator):
    """A divergence over the whole vocabulary."""

    _weights: GradientWeights | None = None  # of the last chunk

    def load(self, chunk: Chunk) -> Loaded:
        return Loaded(self._row_problem(chunk, joint=True))

    def weights_now(self, chunk: Chunk, token_weights: Tensor | None) -> GradientWeights | None:
        if token_weights is None:
            return GradientWeights(divergence=ones(self.problem, chunk))
        if self.problem.slope_follows:
            return None
        if self.problem.importance is not None:
            token_weights = token_weights * self.problem.importance[chunk.tokens]
        if self._weights is None or self._weights.divergence is not token_weights:
            self._weights = GradientWeights(divergence=token_weights)
        return self._weights

    def slope(self, chunk: Chunk) -> Tensor | None:
        return self._factor(chunk.statistics, chunk.tokens) if self.problem.has_loss_factors else None

    def _factor(self, statistics: Tensor, tokens: slice) -> Tensor:
        """(C,) the importance weight, 0 where the loss is bounded."""
        _, inside = self.bounded(self._losses(statistics, tokens))
        weights = self.importance(statistics, tokens)
        return inside if weights is None else inside * weights

    def _losses(self, statistics: Tensor, tokens: slice) -> Tensor:
        problem = self.problem
        scale, own = reward_scale_of(problem, statistics, tokens), statistics[: len(Stat), tokens]
        return problem.ops.losses(problem.divergence.rows(tokens), scale, problem.has, own)

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        if self.problem.has_loss_factors:
            return LogitGradient(divergence=self._factor(statistics, tokens))
        return LogitGradient(divergence=torch.ones_like(statistics[0, tokens]))

    def values(self, statistics: Tensor) -> TokenValues:
        problem, scale = self.problem, self.problem.reward_scale
        own = statistics[: len(Stat)]
        if scale is None:
            scale = statistics[TokenRow.REWARD_SCALE]
        loss = problem.ops.losses(problem.divergence, scale, problem.has, own)
        return self.with_loss_factors(loss, statistics) if problem.has_loss_factors else TokenValues(loss)
