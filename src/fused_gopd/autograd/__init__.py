"""The thin autograd layer around the chunk loop: when gradients are computed, and what is kept for a backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..loop.estimators import estimator_of
from ..loop.estimators.base import LogProbs, LogProbsAndEntropy, SelectedLogProbs, TokenValues
from ..loop.run import MakeEstimator
from ..loop.topk_tokens import topk_tokens
from ..problem import Problem
from . import functions, functorch


def _outputs(problem: Problem, make: MakeEstimator) -> tuple[tuple[Tensor, ...], TokenValues | None, Tensor]:
    return (functorch.transformed if functorch.active() else functions.recomputing)(problem, make)


def weighted_loss(problem: Problem) -> tuple[Tensor, TokenValues, Tensor]:
    """The loss (), values (n,) and statistics (STATISTICS, n), for token weights that are known now."""
    if not problem.recomputes and not functorch.active():
        return functions.fused_loss(problem)
    token_loss, values, statistics = token_losses(problem)
    return (token_loss * problem.weights).sum(), values, statistics


def token_losses(problem: Problem) -> tuple[Tensor, TokenValues, Tensor]:
    """Differentiable token losses (n,), values and statistics."""
    (token_loss,), values, statistics = _outputs(problem, estimator_of)
    assert values is not None
    return token_loss, values, statistics


def token_logprobs(problem: Problem, with_entropy: bool = False) -> tuple[Tensor, ...]:
    """Differentiable log-probs (n,) of ``problem.token_ids`` under the student, and with it its entropies (n,)."""
    return _outputs(problem, LogProbsAndEntropy if with_entropy else LogProbs)[0]


def selected_logprobs(problem: Problem) -> Tensor:
    """Differentiable log-probs (n, K) of ``problem.support_ids`` under the student."""
    return _outputs(problem, SelectedLogProbs)[0][0]


def token_topk(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs, token shape + (k,), of the student's k most likely tokens; not differentiable."""
    with torch.no_grad():
        return topk_tokens(problem, k)
