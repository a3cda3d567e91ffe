"""TRL's GRPO trainer with the G-OPD advantage added to that of the rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from ... import distributed
from ...token_stats import AdvantageFn, RewardScaleFn
from ..modules import evaluation, without_dropout
from ..transformers import position_ids_of
from .batch import Batch
from .config import GRPOGOPDConfig, resolve_config
from .frozen import Given, Model, PromptFn
from .models import ScoringMixin


class GRPOGOPDMixin(ScoringMixin):
    """Adds the G-OPD advantage of each token to that of the rewards, in ``GRPOTrainer`` and its subclasses.

    ``class MyTrainer(GRPOGOPDMixin, MyGRPOTrainer)``; :class:`GRPOGOPDTrainer` is that of TRL. The advantage of a
    token becomes ``outcome_weight`` A_reward + ``gopd_weight`` A, with A = lambda (log q - log r) - (log p - log r) of
    :func:`fused_gopd.gopd_loss`, and p the student that sampled. Ratios, clipping, loss types, the KL penalty and
    all else are unchanged.

    Args:
        teacher, ref_model, reward_scale_fn, advantage_fn, teacher_prompt, ref_prompt, teacher_processing_class: as in
            :class:`GOPDTrainer`. The reference of lambda is not the reference of GRPO's KL penalty (``beta``).
        reward_funcs: as in TRL; optional if ``args.outcome_weight`` is 0.
        args: a :class:`GRPOGOPDConfig`.
        others: as in TRL.

    Raises:
        TypeError, ValueError: as :class:`GOPDTrainer`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: GRPOGOPDConfig | None = None,
        *,
        teacher: Model | Mapping[Any, Model] | None = None,
        ref_model: Model | None = None,
        reward_scale_fn: Callable[[int], float | RewardScaleFn] | None = None,
        advantage_fn: AdvantageFn | None = None,
        teacher_prompt: PromptFn | Mapping[Any, PromptFn] | None = None,
        ref_prompt: PromptFn | Mapping[Any, PromptFn] | None = None,
        teacher_processing_class: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        args = resolve_config(GRPOGOPDConfig, args, model, "GRPO")
        given = Given(
            teacher=teacher,
            ref_model=ref_model,
            reward_scale_fn=reward_scale_fn,
            advantage_fn=advantage_fn,
            teacher_prompt=teacher_prompt,
            ref_prompt=ref_prompt,
            teacher_processing_class=teacher_processing_class,
        )
        if reward_funcs is None and args.outcome_weight == 0:
            reward_funcs = _no_reward
        datasets = {name: trainer_arguments.get(name) for name in ("train_dataset", "eval_dataset")}
        with self._constructing(model, args, given, datasets, trainer_arguments.get("peft_config")):
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, **trainer_arguments)  # type: ignore[call-arg]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = cast("dict[str, Any]", super()._generate_and_score_completions(inputs))  # type: ignore[misc]
        readings = {**output, "teacher_index": None if self.args.route_column is None else self._routes_in(inputs)}
        self._add_readings(inputs, readings)
        outcome = output["advantages"] * self.args.outcome_weight
        batch = Batch.from_trl(readings)
        self._check_positions(batch)
        gopd = self._gopd_advantages(batch)
        output["advantages"] = (outcome[:, None] if outcome.ndim == 1 else outcome) + self.args.gopd_weight * gopd
        return output

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        with evaluation(self.model), self._sampling() as phase:  # without dropout, as it is scored
            completions = super()._generate_single_turn(*args, **options)  # type: ignore[misc]
            phase.tokens_at_end = sum(map(len, completions[0]))
            return completions

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **options: Any) -> Any:
        """TRL's scores, with the positions that ``generate`` uses, and without dropout under ``no_grad``."""
        student = self.accelerator.unwrap_model(model)
        with _sampled_positions(student), nullcontext() if torch.is_grad_enabled() else evaluation(student):
            return super()._get_per_token_logps_and_entropies(model, *args, **options)  # type: ignore[misc]

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        # as in GOPDTrainer: dropout would compare two random masks, not two policies
        ratio = inputs.get("old_per_token_logps") is not None
        self._count_in_step(inputs["completion_mask"])
        with without_dropout(self.accelerator.unwrap_model(model)) if ratio else nullcontext():
            return super()._compute_loss(model, inputs)  # type: ignore[misc]

    @torch.no_grad()
    def _gopd_advantages(self, batch: Batch) -> Tensor:
        """(B, K) advantages, computed for a few sequences at a time."""
        wrapper = cast("Any", self).model_wrapped
        student = self.accelerator.unwrap_model(wrapper)
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        advantages = []
        with self._phase("score"):
            for part in batch.split(size):
                out = distributed.in_forward(wrapper, partial(self._loss, student, part))
                self._record(out, part)
                advantages.append(cast("Tensor", out.advantages))
        return torch.cat(advantages)


@contextmanager
def _sampled_positions(model: Any) -> Iterator[None]:
    """Add to calls without ``position_ids`` those that ``generate`` makes from the attention mask."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def add(_: nn.Module, args: Any, inputs: dict[str, Any]) -> Any:
        if inputs.get("position_ids") is None:
            positions = position_ids_of(model, inputs.get("attention_mask"))
            if positions is not None:
                inputs = {**inputs, "position_ids": positions}
        return args, inputs

    handle = base.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """A reward of 0: GRPOTrainer needs at least one reward function."""
    return [0.0] * len(completions)


class GRPOGOPDTrainer(GRPOGOPDMixin, GRPOTrainer):  # type: ignore[misc]
    """:class:`GRPOGOPDMixin` on TRL's ``GRPOTrainer``."""

    _tag_names = ["trl", "grpo", "gopd"]  # noqa: RUF012
