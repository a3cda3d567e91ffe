"""Errors against float64, beside the speed: same workload, its first tokens, the same vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .providers import Result, Run, oracle
from .workloads import ACCURACY_TOKENS, Inputs, Workload


class Errors(NamedTuple):
    """Relative errors; a tensor's is the norm of the difference over the norm."""

    loss: float  # of the log-probs where they are what the job computes
    rows: float | None  # of dhidden, or of dlogits at logits level
    weight: float | None


def exact(workload: Workload, inputs: Inputs) -> Result:
    """Loss and gradients of the first tokens in float64, from the inputs' own values."""
    return oracle(workload, inputs.first(ACCURACY_TOKENS, torch.float64))


def relative(x: Tensor, truth: Tensor) -> float:
    # float64 throughout: (V, H) sums of float32 squares would have errors of their own
    return float(torch.linalg.vector_norm(truth - x) / torch.linalg.vector_norm(truth))


def errors(run: Run, inputs: Inputs, truth: Result) -> Errors:
    result = run(inputs.first(ACCURACY_TOKENS))
    gradients = [relative(g, t) for g, t in zip(result.gradients, truth.gradients, strict=True)]
    return Errors(relative(result.loss, truth.loss), *[*gradients, None, None][:2])
