"""NeMo-RL: the sampled estimator as one of its loss functions.

``GOPDLossFn(reward_scale=1.25)`` replaces a recipe's ``ClippedPGLossFn``; the recipe adds the teacher's scores to the
training data, as it does the reference's::

    train_data["teacher_logprobs"] = teacher_policy.get_logprobs(logprob_data)["logprobs"]

Hook: ``nemo_rl/algorithms/loss/interfaces.py``, ``LossFunction``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import require_mask
from . import needs
from .logprobs import ROLLOUT, check_options, metric_sums, require_reference, sampled_loss

with needs(__name__, "nemo_rl", install=lambda: "install NeMo-RL, https://github.com/NVIDIA-NeMo/RL"):
    from nemo_rl.algorithms.loss.interfaces import (  # type: ignore[import-not-found]
        LossInputType,
        LossType,
        MetricNormalizer,
    )

__all__ = ["GOPDLossFn"]


class GOPDLossFn:
    """A LossFunction of NeMo-RL: G-OPD at the sampled tokens, divided by the global number of tokens.

    Args:
        reward_scale: lambda; any but 1 needs ``reference_policy_logprobs`` in the data.
        **options: ``clip``, ``clip_dual``, ``ratio``, ``advantage_clip``, ``logprob_min`` and others of
            :func:`fused_gopd.integrations.logprobs.sampled_loss`, as in :func:`fused_gopd.gopd_loss`. ``rollout_is``,
            ``rollout_is_cap``, ``rollout_mask`` and ``trust_region`` enable weights from ``generation_logprobs``: its
            ``icepop`` is ``rollout_mask={"token_ratio": (low, high)}``.
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(self, reward_scale: float = 1.0, **options: Any) -> None:
        self.reward_scale = require_reference(reward_scale, True, "")
        check_options(**options)
        self.options = options
        ratios = ("reward", "kl_teacher_k3", "kl_ref_k3", "impossible")
        names = (*ratios, "advantage", "clip_fraction", "importance", "masked_fraction", "loss")
        self.metric_normalizations = dict.fromkeys(names, MetricNormalizer.TOKENS)

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of a micro-batch: sums over its tokens, divided by ``global_valid_toks``.

        Args:
            next_token_logprobs: (B, S - 1) log-probs of all tokens but the first.
            data: NeMo-RL's BatchedDataDict: (B, S) ``token_mask``, ``prev_logprobs``, ``teacher_logprobs``,
                ``reference_policy_logprobs`` for lambda != 1, ``generation_logprobs`` for the options of importance
                weights; ``sample_mask`` (B,).
        """

        def after_the_first(name: str) -> Tensor | None:
            return data[name][:, 1:] if name in data else None

        teacher = after_the_first("teacher_logprobs")
        if teacher is None:
            raise ValueError(
                "data['teacher_logprobs'] must hold the teacher's log-probs (B, S), and is not there: put "
                "teacher_policy.get_logprobs(...)['logprobs'] into the training data"
            )
        ref = after_the_first("reference_policy_logprobs")
        require_reference(self.reward_scale, ref, "put data['reference_policy_logprobs'] into the training data")
        tokens, samples = (require_mask(f"data[{name!r}]", data[name]) for name in ("token_mask", "sample_mask"))
        weighted = any(self.options.get(name) is not None for name in ROLLOUT)
        out = sampled_loss(
            next_token_logprobs,
            teacher,
            ref,
            mask=tokens[:, 1:] & samples[:, None],
            reward_scale=self.reward_scale,
            old_logprobs=after_the_first("prev_logprobs"),
            rollout_logprobs=after_the_first("generation_logprobs") if weighted else None,
            **self.options,
        )
        loss = out.loss.sum() / global_valid_toks
        metrics = {name: (value / global_valid_toks).item() for name, value in metric_sums(out).items()}
        return loss, {"loss": loss.item(), "num_valid_samples": data["sample_mask"].sum().item(), **metrics}
