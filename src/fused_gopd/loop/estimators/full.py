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
)


class Full(Estimator):
    """A divergence over the whole vocabulary."""

    def load(self, chunk: Chunk) -> Loaded:
        return Loaded(self._row_problem(chunk, joint=True))

    def weights_now(self, chunk: Chunk, token_weights: Tensor | None) -> GradientWeights | None:
        return GradientWeights(divergence=ones(self.problem, chunk) if token_weights is None else token_weights)

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        return LogitGradient(divergence=torch.ones_like(statistics[0, tokens]))

    def values(self, statistics: Tensor) -> TokenValues:
        problem, scale = self.problem, self.problem.reward_scale
        own = statistics[: len(Stat)]
        if scale is None:
            scale = statistics[TokenRow.REWARD_SCALE]
        return TokenValues(problem.ops.losses(problem.divergence, scale, problem.has, own))
