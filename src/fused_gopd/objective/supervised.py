"""The supervised term: -weight log p[label]."""

from __future__ import annotations

import torch
from torch import Tensor


def has_label(label_logprobs: Tensor, labels: Tensor) -> Tensor:
    """(C,) bool, where there is a label with p > 0: elsewhere the supervised term is 0."""
    return (labels >= 0) & ~torch.isneginf(label_logprobs)


def label_report(label_logprobs: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Log-probs of the labels, 0 where there is none, and where the supervised term is in force; None without any."""
    if labels is None:
        return None, None
    return label_logprobs.masked_fill(labels < 0, 0), has_label(label_logprobs, labels)
