"""What the caller's functions of tokens get, ``advantage_fn`` and ``reward_scale_fn``. Imported without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import printing
from .records import ComputedWhenRead, none

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, repr=False, kw_only=True)
class TokenStats(ComputedWhenRead):
    """What an ``advantage_fn`` or a ``reward_scale_fn`` gets of C tokens.

    Vectors (C,), detached, float32 (float64 for float64 inputs). For a ``reward_scale_fn`` of ``full``, and of a
    ``baseline``, they are made from the chunk's logits when they are first read: one pass over the logits of a model
    for its log-probs and its entropy, one over those of two models for a divergence. They can then be read inside the
    function only. Ranks that share a vocabulary have to read the same ones in the same order.

    Attributes:
        index: int64 flat positions in the token shape, to line up tensors of one's own: ``mine.reshape(-1)[index]``.
        advantages: A = lambda log q + (1 - lambda) log r - log p, of the old log p if given; 0 where it is not finite;
            None without a teacher and a reference, and for a ``reward_scale_fn``.
        student_logprobs, teacher_logprobs, ref_logprobs: of the sampled token, at least ``logprob_min`` where that is
            given (teacher and reference); None for a model that has cancelled, and for one that is TopKLogProbs (but
            with ``tail="sampled"``). Without ``token_ids`` they raise. Each model is normalised over its own support;
            for an ``advantage_fn`` with ``baseline="expected"`` all are over the joint one.
        old_logprobs: as given, or None.
        student_entropy: in nats.
        teacher_entropy, ref_entropy: None where log-probs are computed elsewhere (for any of several teachers), and
            for an ``advantage_fn`` with ``baseline="expected"``.
        reward_scale: lambda, a float or (C,). What a ``reward_scale_fn`` is to return: there it raises.
        kl_teacher, kl_ref: KL(p || q) and KL(p || r), for a ``reward_scale_fn``: exact over the joint support of the
            two models in ``full`` and with a baseline; in ``topk`` over the tokens of the support and the tail, as
            ``GOPDOutput.kl`` is; None with ``tail="sampled"`` and in ``sampled``, which never has two models' logits
            together.

    A log-prob may be -inf: it is for the function to say what such a token's advantage, or lambda, is.
    """

    index: Tensor
    advantages: Tensor | None
    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    ref_entropy: Tensor | None
    reward_scale: float | Tensor
    kl_teacher: Tensor | None = field(default_factory=none)
    kl_ref: Tensor | None = field(default_factory=none)

    def __repr__(self) -> str:
        return printing.lines(self, unread="not read yet")


TokenFn = Callable[[TokenStats], "Tensor"]
AdvantageFn = TokenFn
RewardScaleFn = TokenFn
