"""Training with ``GOPDTrainer``: the student is an adapter, the teacher its base with a hint in the prompt."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ...integrations.trl import GOPDConfig, GOPDTrainer
from ...integrations.trl.phases import Phase
from .prompts import Schedule, hinted, messages


@dataclass
class TrainingHistory:
    """One training run."""

    reward_scale: float
    losses: list[float]  # the loss of each update
    warnings: list[str]  # the trainer's


class Progress(Protocol):
    """Is told of each update that is done, and with ``phase`` of what goes on until then."""

    def __call__(self, what: str, *, phase: Phase | None = None) -> None: ...


class _Told(TrainerCallback):
    """Passes on what happens."""

    def __init__(self, progress: Progress, losses: list[float]) -> None:
        self._progress, self._losses = progress, losses

    def on_phase(self, args: Any, state: Any, control: Any, *, phase: Phase) -> None:
        self._progress("", phase=phase)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:  # the summary after the last step
            return
        self._losses.append(float(logs["loss"]))
        reward = "" if "gopd/reward" not in logs else f", reward {float(logs['gopd/reward']):+.2f}"
        self._progress(f"update {state.global_step} of {state.max_steps}, loss {self._losses[-1]:.3f}{reward}")


def train(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    reward_scale: float,
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
    teacher: str = "base",
    teacher_ema: float | None = None,
    progress: Progress = lambda what, *, phase=None: None,
) -> tuple[Any, TrainingHistory]:
    """Train an adapter on the last layers; initial weights and random numbers are the same for every lambda.

    Args:
        model: a causal LM without an adapter. It is changed: ``unload()`` of the result gives it back.
        folder: for the trainer's files and the scores of the teacher and the reference, which several updates share.
        teacher, teacher_ema: ``GOPDTrainer``'s: the model without the adapter, or the student as it is before training,
            or an average of its states. In all cases it reads the hint.
        progress: called for each of ``schedule.updates`` updates.

    Returns:
        The student, a PEFT model, and what happened.
    """
    layers = model.config.num_hidden_layers
    adapter = importlib.import_module("peft").LoraConfig(
        r=schedule.rank,
        lora_alpha=2 * schedule.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(max(0, layers - schedule.trained_layers), layers)),
        task_type="CAUSAL_LM",
    )
    rows = [{"prompt": messages(questions[i])} for i in schedule.order(len(questions), seed)]
    args = GOPDConfig(
        output_dir=str(folder),
        reward_scale=reward_scale,
        max_completion_length=schedule.new_tokens,
        per_device_train_batch_size=schedule.prompts_per_rollout,
        gradient_accumulation_steps=1,
        num_iterations=schedule.updates_per_rollout,
        teacher_ema=teacher_ema,
        # each update but the first finds the scores there
        teacher_cache=str(folder / f"scores-{reward_scale:g}") if schedule.updates_per_rollout > 1 else None,
        max_steps=schedule.updates,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        seed=seed,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    losses: list[float] = []
    trainer = GOPDTrainer(
        model,
        teacher=teacher,
        ref_model=None if reward_scale == 1 else "base",
        args=args,
        train_dataset=importlib.import_module("datasets").Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
        teacher_prompt=hinted,
        callbacks=[_Told(progress, losses)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert all(map(math.isfinite, losses)), losses
    return trainer.model, TrainingHistory(reward_scale, losses, list(trainer.warnings))
