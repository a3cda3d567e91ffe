"""Estimates of KL(p || r) from the log-probs of a sampled token (Schulman, "Approximating KL divergence")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# d = log r - log p -> the estimate; over tokens that p has sampled k1 and k3 have the divergence as their mean
KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(d) - d,
}
# and its derivative with respect to log p
_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.ones_like,
    "k2": lambda d: -d,
    "k3": lambda d: -torch.expm1(d),
}


def kl_estimate(kind: str, student: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) the estimate and its derivative, of log-probs (C,); 0 for a token of probability 0 under one of the two."""
    outside = torch.isneginf(student) | torch.isneginf(ref)
    d = (ref - student).masked_fill(outside, 0)
    return KL_ESTIMATES[kind](d).masked_fill(outside, 0), _DERIVATIVES[kind](d).masked_fill(outside, 0)
