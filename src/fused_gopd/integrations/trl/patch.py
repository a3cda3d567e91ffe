"""This package's loss in TRL's own distillation trainer."""

from __future__ import annotations

from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DistillationTrainer

from ... import gopd_loss
from ...heads import LinearHead
from ...shards import is_dtensor
from ..modules import require_separate


class DistillationPatch:
    """The handle of :func:`patch_distillation_loss`; :meth:`undo` or the end of a ``with`` block undoes the patch."""

    def __init__(self, target: Any, own: Any) -> None:
        self._target, self._own, self._done = target, own, False

    def undo(self) -> None:
        """Restore the original method; a second call does nothing."""
        if self._done:
            return
        self._done = True
        if self._own is None:
            del self._target._compute_loss
        else:
            self._target._compute_loss = self._own

    def __enter__(self) -> DistillationPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_distillation_loss(target: DistillationTrainer | type[DistillationTrainer]) -> DistillationPatch:
    """Compute the loss of TRL's own ``DistillationTrainer`` with this package: same objective, same values.

    TRL 1.16 projects both models in tiles, and again in the backward; this package computes the gradients in the
    forward. In TRL's ``_compute_loss`` only the function from hidden states and heads to the loss is replaced. Other
    trainers keep TRL's loss.

    Args:
        target: a trainer, or a class for all its trainers.

    Returns:
        A handle with ``undo()``, which is also a context manager.

    Raises:
        TypeError: not a ``DistillationTrainer``.
        ValueError: a trainer whose loss is not TRL's own, or is patched already; whose teacher shares trainable
            parameters with the student; DeepSpeed ZeRO-3.
    """
    kind = target if isinstance(target, type) else type(target)
    if not issubclass(kind, DistillationTrainer):
        raise TypeError(f"target must be a trl.DistillationTrainer or a class of them, got {kind.__name__}")
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call, unused-ignore]
        raise ValueError("under DeepSpeed ZeRO-3 there is no patch of TRL's loss: use GOPDTrainer with reward_scale=1")
    own = vars(target).get("_compute_loss")
    function = getattr(target._compute_loss, "__func__", target._compute_loss)
    if function.__globals__.get(_TRL_LOSS) is fused_divergence_loss:
        raise ValueError(f"{target!r} is patched already: undo() the first patch before another")
    if _TRL_LOSS not in function.__code__.co_names:
        raise ValueError(
            f"{kind.__name__} has a loss of its own in place of TRL's {_TRL_LOSS}: there is nothing to put this "
            "package's loss in the place of. GOPDTrainer has it already"
        )
    if not isinstance(target, type) and isinstance(target.teacher_model, nn.Module):
        unwrap = target.accelerator.unwrap_model
        require_separate("teacher_model", unwrap(target.teacher_model), unwrap(target.model))
    # the same code with another value of one global; the module itself is not changed
    patched = FunctionType(
        function.__code__, {**function.__globals__, _TRL_LOSS: fused_divergence_loss}, function.__name__
    )
    cast("Any", target)._compute_loss = patched if isinstance(target, type) else patched.__get__(target)
    return DistillationPatch(target, own)


_TRL_LOSS = "_chunked_divergence_loss"


def fused_divergence_loss(
    student_hidden_states: Tensor,  # (B, K, H)
    teacher_hidden_states: Tensor,  # (B, K, H of the teacher)
    student_lm_head_weight: Tensor,  # (V, H)
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,  # (B, K)
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As TRL's ``_chunked_divergence_loss``: the loss, the sum of the entropies, the number of tokens."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> LinearHead:
        if is_dtensor(weight):  # gathered once, as in TRL
            weight = cast("Any", weight).full_tensor().to(hidden.dtype)
            bias = None if bias is None else cast("Any", bias).full_tensor()
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return LinearHead(hidden, weight, bias, logit_scale=scale, softcap=softcap, temperature=temperature)

    student, teacher = (student_lm_head_weight, student_lm_head_bias), (teacher_lm_head_weight, teacher_lm_head_bias)
    student_transform = student_logit_scale, student_final_logit_softcapping
    teacher_transform = teacher_logit_scale, teacher_final_logit_softcapping
    out = gopd_loss(
        head(student_hidden_states, *student, *student_transform),
        head(teacher_hidden_states, *teacher, *teacher_transform),
        mask=completion_mask,
        estimator="full",
        normalizer=num_items_in_batch,
        divergence="jsd",
        beta=beta,
    )
    return out.loss, out.entropy.sum(), (completion_mask != 0).sum()
