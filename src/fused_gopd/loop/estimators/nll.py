"""The loss of :func:`fused_gopd.linear_nll`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...objective.divergences import ForwardKL
from ...objective.logit_gradient import LogitGradient
from ...problem import Problem
from ...rowops import GradientWeights, LogitTransform, ModelRows
from .base import EVERY, Chunk, Estimator, Loaded, TokenValues, ones


class NLL(Estimator):
    """-log p of the labels; with smoothing the row operation has a target of equal logits beside the student.

    That target is one row of zeros, which all tokens read. With a z-loss the gradient waits for the statistics.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        assert problem.nll is not None
        self._nll = problem.nll
        self._uniform: dict[int, ModelRows] = {}  # by the number of tokens

    def load(self, chunk: Chunk) -> Loaded:
        row_problem = self._row_problem(chunk, joint=False)
        if not self._nll.label_smoothing:
            return Loaded(row_problem)
        uniform = self._uniform.get(row_problem.rows)
        if uniform is None:
            zeros = row_problem.student.raw.new_zeros(1, self._columns).expand(row_problem.rows, -1)
            uniform = self._uniform[row_problem.rows] = ModelRows(zeros, LogitTransform())
        return Loaded(replace(row_problem, teacher=uniform, divergence=ForwardKL()))

    def score(self, chunk: Chunk) -> LogitGradient | None:
        if self._nll.label_smoothing:
            return super().score(chunk)
        self._score_alone(chunk, self.problem.student, chunk.own)
        return None

    def weights_now(self, chunk: Chunk, token_weights: Tensor | None) -> GradientWeights | None:
        if self._nll.z_loss:
            return None
        weights = ones(self.problem, chunk) if token_weights is None else token_weights
        e = self._nll.label_smoothing
        return GradientWeights(e * weights, (1 - e) * weights) if e else GradientWeights(token=weights)

    def logit_gradient(self, statistics: Tensor, tokens: slice = EVERY) -> LogitGradient:
        assert self.problem.token_ids is not None
        return self._nll.gradient(statistics[:, tokens], self.problem.token_ids[tokens])

    def values(self, statistics: Tensor) -> TokenValues:
        return TokenValues(self._nll.values(statistics))
