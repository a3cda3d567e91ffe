"""Sums and means of token losses, over all tokens and over sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import Reduction
from ..tokens import Sequences


def token_weights(
    reduction: Reduction,
    mask: Tensor | None,  # token shape, bool; None is all live
    sequences: Sequences,
    normalizer: Tensor | float | None,
    sequence_lengths: Tensor | None,  # (B,) or ()
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """w with loss = sum w * token_loss: a scalar where all live tokens weigh the same, else of the token shape.

    A sequence without a live token is left out of sequence means.
    """
    if reduction in ("sum", "none"):
        return torch.ones((), dtype=dtype, device=device)
    if reduction == "token-mean" and mask is None and normalizer is None:
        normalizer = max(1, sequences.shape.numel())
    if reduction != "seq-mean-token-mean" and isinstance(normalizer, (int, float)):
        # filled on the device, which a tensor made of a number would wait for; the quotient is rounded as a division
        # in dtype rounds it, since float64 has more than twice the digits of float32
        return torch.full((), 1.0 / normalizer, dtype=dtype, device=device)
    one = torch.ones((), dtype=dtype, device=device)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device, dtype).reshape(())
    if reduction == "token-mean":
        if normalizer is None:
            assert mask is not None
            normalizer = mask.sum().clamp_min(1)
        return one / normalizer
    live = torch.ones(sequences.shape, dtype=torch.bool, device=device) if mask is None else mask
    lengths = sequences.sum(live)
    if normalizer is None:
        normalizer = (lengths > 0).sum().clamp_min(1)
    weight = one / normalizer
    if reduction == "seq-mean-token-sum":
        return weight
    if sequence_lengths is not None:
        lengths = sequence_lengths.expand(sequences.count)
    return sequences.expand(weight / lengths.to(dtype).clamp_min(1))
