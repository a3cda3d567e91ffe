"""ms-swift 4: GKD with the G-OPD loss from hidden states and heads, whole vocabulary or sampled tokens.

A plugin file, ``--external_plugins plugin.py``::

    from fused_gopd.integrations.ms_swift import register

    register(reward_scale=1.25, estimator="full")

and ``swift rlhf --rlhf_type gkd --teacher_model ...`` as usual. All but the loss is swift's. For lambda != 1 the
reference is the student without its adapters, since swift loads no reference for GKD.

Hooks: ``swift/rlhf_trainers/gkd_trainer.py``, ``GKDTrainer._compute_liger_loss``, which this loss replaces (Liger is
not needed); ``swift/trainers/trainer_factory.py``, ``TrainerFactory.TRAINER_MAPPING``.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg

from ..installing import packages
from . import needs
from .logprobs import require_reference
from .modules import require_separate
from .transformers import head_of, last_hidden_state

with needs(__name__, "swift", "accelerate", install=partial(packages, "ms-swift>=4")):
    from accelerate.utils import is_peft_model  # type: ignore[import-untyped]
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer  # type: ignore[import-not-found]
    from swift.rlhf_trainers.utils import (  # type: ignore[import-not-found]
        _ForwardRedirection,
        get_gather_if_zero3_context,
    )
    from swift.trainers import disable_gradient_checkpointing  # type: ignore[import-not-found]
    from swift.trainers.trainer_factory import TrainerFactory  # type: ignore[import-not-found]

__all__ = ["GOPDTrainer", "register"]


class GOPDTrainer(GKDTrainer):  # type: ignore[misc]
    """swift's GKDTrainer with the loss ``objective`` instead of its JSD."""

    objective: fg.GOPDLoss

    @property
    def reward_scale(self) -> float:
        return float(self.objective.options.get("reward_scale", 1.0))

    def _prepare_liger_loss(self) -> None:
        """swift's hook before training, for a loss from hidden states: checks the requirements of this one."""
        scale, sampled = self.reward_scale, self.objective.options.get("estimator", "sampled") == "sampled"
        adapters = is_peft_model(self.accelerator.unwrap_model(self.model))
        for wrong, what, fix in (
            (self.teacher_model is None, "a local teacher", "set --teacher_model"),
            (self.args.sft_alpha > 0, "no supervised term", "leave out --sft_alpha"),
            (self.gkd_logits_topk is not None, "whole heads", "leave out --gkd_logits_topk (estimator='topk' has k)"),
            (sampled and self.lmbda < 1, "the student's own samples for estimator='sampled'", "set --lmbda 1"),
            (
                scale != 1 and not adapters,
                f"a reference for reward_scale={scale}, which is the student without adapters",
                "train adapters (--tuner_type lora), or register(reward_scale=1)",
            ),
        ):
            if wrong:
                raise ValueError(f"the G-OPD loss in ms-swift needs {what}: {fix}")
        student, teacher = (self.accelerator.unwrap_model(m) for m in (self.model, self.teacher_model))
        require_separate("teacher_model", teacher, student)
        self._forward_redirection = _ForwardRedirection()
        self.use_liger_gkd_loss = True

    def _frozen_head(self, model: Any, inputs: dict[str, Any]) -> fg.LinearHead:
        """The head of a frozen model; its weight must be gathered already."""
        with torch.no_grad(), disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs):
            return self._head(model, inputs)

    def _head(self, model: Any, inputs: dict[str, Any]) -> fg.LinearHead:
        return head_of(model, last_hidden_state(model, **inputs)[:, :-1], temperature=self.temperature)

    def _compute_liger_loss(self, unwrapped_student: Any, model_inputs: Any, forward_inputs: Any) -> Tensor:
        student_head = self._head(unwrapped_student, forward_inputs)
        ref_head = teacher_head = None
        if self.reward_scale != 1:
            with unwrapped_student.disable_adapter():
                ref_head = self._frozen_head(unwrapped_student, forward_inputs)
        labels, ids = model_inputs["labels"][:, 1:], model_inputs["input_ids"][:, 1:]
        with ExitStack() as held:  # keeps the teacher's weight loaded and gathered
            if self.reward_scale != 0:
                teacher = self.accelerator.unwrap_model(self.teacher_model)
                if self.args.offload_teacher_model:
                    held.enter_context(self.load_teacher_model_context())
                gathered = get_gather_if_zero3_context(self, is_zero3=self.is_teacher_ds3)
                held.enter_context(gathered(teacher.get_output_embeddings().weight))
                teacher_head = self._frozen_head(teacher, forward_inputs)
            out = self.objective(student_head, teacher_head, ref_head, ids, mask=labels != -100)
        mode = "train" if self.model.training else "eval"
        for name, value in out.metrics().items():
            self._metrics[mode][f"gopd/{name}"].append(value.item())
        loss: Tensor = out.loss
        return loss


def register(**options: Any) -> None:
    """Make ``--rlhf_type gkd`` use the G-OPD loss.

    Args:
        **options: those of :class:`fused_gopd.GOPDLoss`: ``reward_scale``, ``estimator``, ``divergence``, ``k``, ...

    Raises:
        TypeError, ValueError: an unknown option, or an invalid value.
    """
    require_reference(options.get("reward_scale", 1.0), True, "")
    GOPDTrainer.objective = fg.GOPDLoss(**options)
    TrainerFactory.TRAINER_MAPPING["gkd"] = f"{__name__}.GOPDTrainer"
