"""Estimates of KL(p || r) from the log-probs of a sampled token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# d = log r - log p -> the estimate and its derivative with respect to log p (Schulman, "Approximating KL divergence")
KL_ESTIMATES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "k1": lambda d: (-d, torch.ones_like(d)),
    "k2": lambda d: (d.square() / 2, -d),
    "k3": lambda d: (torch.expm1(d) - d, -torch.expm1(d)),
}


def kl_estimate(
    estimate: Callable[[Tensor], tuple[Tensor, Tensor]], student: Tensor, ref: Tensor
) -> tuple[Tensor, Tensor]:
    """(C,) each, of log-probs (C,); 0 where the token has probability 0 under one of the two."""
    outside = torch.isneginf(student) | torch.isneginf(ref)
    value, slope = estimate((ref - student).masked_fill(outside, 0))
    return value.masked_fill(outside, 0), slope.masked_fill(outside, 0)
