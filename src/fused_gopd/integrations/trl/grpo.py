"""The G-OPD advantage beside that of rewards, in TRL's GRPO trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from ... import distributed
from ...objective import AdvantageFn
from .batch import Batch
from .checks import Model
from .config import GRPOGOPDConfig, settled
from .models import Models


class GRPOGOPDMixin(Models):
    """The G-OPD advantage of each token beside that of the rewards, for ``GRPOTrainer`` and what derives from it.

    ``class MyTrainer(GRPOGOPDMixin, MyGRPOTrainer)``; :class:`GRPOGOPDTrainer` is that of TRL's own. The advantage of a
    token becomes ``outcome_weight`` A_reward + ``gopd_weight`` A, with A = lambda (log q - log r) - (log p - log r) of
    :func:`fused_gopd.gopd_loss`, and p the student that sampled. Ratios, clipping, loss types, the KL penalty and
    everything else are ``GRPOTrainer``'s.

    Args:
        teacher, ref_model, reward_scale_fn, advantage_fn, teacher_processing_class: as in :class:`GOPDTrainer`. The
            reference of lambda has nothing to do with GRPO's own, that of ``beta``.
        reward_funcs: as in TRL; may be left out where ``args.outcome_weight`` is 0.
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
        reward_scale_fn: Callable[[int], float] | None = None,
        advantage_fn: AdvantageFn | None = None,
        teacher_processing_class: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        args = settled(GRPOGOPDConfig, args, model, "GRPO")
        datasets = {name: trainer_arguments.get(name) for name in ("train_dataset", "eval_dataset")}
        self._announce(args, cast("Any", teacher), ref_model, reward_scale_fn, advantage_fn, datasets)
        if reward_funcs is None and args.outcome_weight == 0:
            reward_funcs = _no_reward
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **trainer_arguments)  # type: ignore[call-arg]
        self._attach(cast("Any", teacher), ref_model, teacher_processing_class)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = cast("dict[str, Any]", super()._generate_and_score_completions(inputs))  # type: ignore[misc]
        index = None if self.args.route_column is None else self._routes_in(inputs)
        outcome = output["advantages"] * self.args.outcome_weight
        gopd = self._gopd_advantages(Batch.of({**output, "teacher_index": index}))
        output["advantages"] = (outcome[:, None] if outcome.ndim == 1 else outcome) + self.args.gopd_weight * gopd
        return output

    @torch.no_grad()
    def _gopd_advantages(self, batch: Batch) -> Tensor:
        """(B, K), a few sequences at a time."""
        wrapper = cast("Any", self).model_wrapped
        student = self.accelerator.unwrap_model(wrapper)
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        advantages = []
        for part in batch.split(size):
            out = distributed.in_forward(wrapper, partial(self._loss, student, part))
            self._note(out)
            advantages.append(cast("Tensor", out.advantages))
        return torch.cat(advantages)


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """GRPOTrainer asks for one reward at least."""
    return [0.0] * len(completions)


class GRPOGOPDTrainer(GRPOGOPDMixin, GRPOTrainer):  # type: ignore[misc]
    """:class:`GRPOGOPDMixin` on TRL's ``GRPOTrainer``."""

    _tag_names = ["trl", "grpo", "gopd"]  # noqa: RUF012
