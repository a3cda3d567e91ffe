"""The target of the full and topk estimators: lambda log q + (1 - lambda) log r, and its origin.

Imported without PyTorch, as the divergences are; functions that need it import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..rowops import FAR, FROZEN

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def mix(reward_scale: float | Tensor, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
    """lambda q + (1 - lambda) r, where a model with coefficient exactly 0 does not matter, whatever its value.

    Written as r + lambda (q - r), or q + (lambda - 1) (q - r) for lambda > 1/2: so that q = r gives exactly q, and the
    rounding of q - r, a large one where one of them is a large mask, counts no more than that of the result. Finite q
    and r give a finite result, clamped to the range of the dtype; an infinite one gives NaN. ``None`` is a model that
    has cancelled.
    """
    import torch

    if ref is None:
        assert teacher is not None
        return teacher
    if teacher is None:
        return ref
    gap = teacher - ref
    if isinstance(reward_scale, torch.Tensor):
        near_teacher = reward_scale > 0.5
        share = (reward_scale - 1).where(near_teacher, reward_scale)
        mixed = teacher.where(near_teacher, ref) + share * gap
        mixed = bounded(mixed) + 0 * gap
        return teacher.where(reward_scale == 1, ref.where(reward_scale == 0, mixed))
    if reward_scale in (0, 1):
        return teacher if reward_scale else ref
    mixed = teacher + (reward_scale - 1) * gap if reward_scale > 0.5 else ref + reward_scale * gap
    return bounded(mixed) + 0 * gap


def bounded(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Within the finite range of its dtype, or of another one; NaN stays."""
    import torch

    limits = torch.finfo(dtype or x.dtype)
    return x.clamp(limits.min, limits.max)


def origin_of(maximum: Tensor) -> Tensor:
    """What is subtracted from u before its log-sum: its maximum where that is far from 0, else 0.

    A log-sum of entries far from 0 has their rounding. Near 0 nothing is subtracted, one operation less per entry.
    """
    return bounded(maximum).where(maximum.abs() > FAR, 0)


def outside_support(reward_scale: float | Tensor, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
    """Where a frozen model whose coefficient is not 0 gives the token probability 0."""
    import torch

    outside: Tensor | None = None
    for model, (_, cancelled_at) in zip((teacher, ref), FROZEN, strict=True):
        if model is not None:
            own = model.isneginf()
            if isinstance(reward_scale, torch.Tensor):
                own = own & (reward_scale != cancelled_at)
            outside = own if outside is None else outside | own
    assert outside is not None
    return outside
