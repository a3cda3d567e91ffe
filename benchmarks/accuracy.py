"""Errors against float64, beside the speed: same workload, its first tokens, the same vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.providers import Result, oracle, step_of
from benchmarks.workloads import ACCURACY_TOKENS, Inputs, Workload


class Errors(NamedTuple):
    """Relative errors; a tensor's is the norm of the difference over the norm."""

    loss: float
    rows: float  # of dhidden, or of dlogits at logits level
    weight: float | None


def exact(workload: Workload, inputs: Inputs) -> Result:
    """Loss and gradients of the first tokens in float64, from the inputs' own values."""
    return oracle(workload, inputs.first(ACCURACY_TOKENS, torch.float64))


def _relative(x: Tensor, truth: Tensor) -> float:
    # float64 throughout: (V, H) sums of float32 squares would have errors of their own
    return float(torch.linalg.vector_norm(truth - x) / torch.linalg.vector_norm(truth))


def errors(provider: str, workload: Workload, inputs: Inputs, truth: Result) -> Errors:
    result = step_of(provider, workload, inputs.first(ACCURACY_TOKENS))()
    gradients = [_relative(g, t) for g, t in zip(result.gradients, truth.gradients, strict=True)]
    return Errors(_relative(result.loss, truth.loss), gradients[0], gradients[1] if len(gradients) > 1 else None)
