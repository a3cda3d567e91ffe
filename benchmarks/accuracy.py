"""Errors against float64, on the first tokens of a workload and its whole vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .providers import Computation, Result, oracle
from .workloads import ACCURACY_TOKENS, Inputs, Workload


class Errors(NamedTuple):
    """Relative errors; of a tensor the norm of the difference over the norm."""

    loss: float  # of the job "logprobs" the error of the log-probs
    rows: float | None  # of dhidden, or of dlogits at logits level
    weight: float | None


def exact(workload: Workload, inputs: Inputs) -> Result:
    """Loss and gradients of the first tokens, computed in float64 from the same values."""
    return oracle(workload, inputs.first(ACCURACY_TOKENS, torch.float64))


def relative(x: Tensor, truth: Tensor) -> float:
    # in float64: the rounding of float32 sums of V H squares would show
    return float(torch.linalg.vector_norm(truth - x) / torch.linalg.vector_norm(truth))


def errors(step: Computation, inputs: Inputs, truth: Result) -> Errors:
    result = step(inputs.first(ACCURACY_TOKENS))
    gradients = [relative(g, t) for g, t in zip(result.gradients, truth.gradients, strict=True)]
    return Errors(relative(result.loss, truth.loss), *[*gradients, None, None][:2])
