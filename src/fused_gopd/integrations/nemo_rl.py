"""NeMo-RL: the sampled and the full estimator as its loss functions.

``GOPDLossFn(reward_scale=1.25)`` replaces a recipe's ``ClippedPGLossFn``; the recipe adds the teacher's scores to the
training data, as it does the reference's::

    train_data["teacher_logprobs"] = teacher_policy.get_logprobs(logprob_data)["logprobs"]

``GOPDFullLossFn(load_head("teachers/math"))`` is the exact divergence to a teacher whose hidden states are in the data.

Hook: ``nemo_rl/algorithms/loss/interfaces.py``, ``LossFunction``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checks import require_mask
from ..heads import Logits
from ..loss import gopd_loss
from ..shards import is_dtensor
from . import needs
from .logprobs import ROLLOUT, check_options, metric_sums, require_reference, sampled_loss

with needs(__name__, "nemo_rl", install=lambda: "install NeMo-RL, https://github.com/NVIDIA-NeMo/RL"):
    from nemo_rl.algorithms.loss.interfaces import (  # type: ignore[import-not-found]
        LossInputType,
        LossType,
        MetricNormalizer,
    )

if TYPE_CHECKING:
    from .checkpoint import CheckpointHead

__all__ = ["GOPDFullLossFn", "GOPDLossFn"]


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


class GOPDFullLossFn:
    """A LossFunction of NeMo-RL: the exact divergence, from logits of the student and hidden states of the others.

    The recipe puts the states into the training data, such as those that a server sends::

        teacher = HiddenStateTeacher("http://h:8000", "teacher", head="/models/teacher", states_dir="/mnt/states")
        attended = torch.arange(ids.shape[1]) < train_data["input_lengths"][:, None]
        train_data["teacher_hidden"] = teacher(ids, attended, train_data["token_mask"]).hidden

    The student's logits are NeMo-RL's, whole: not sharded by tensor parallelism.

    Args:
        teacher_head: what :func:`fused_gopd.integrations.checkpoint.load_head` read.
        ref_head: likewise of the reference, for lambda != 1.
        reward_scale: lambda; any but 1 needs ``ref_hidden`` in the data.
        temperature: at which the student samples.
        **options: of :func:`fused_gopd.gopd_loss`, such as ``divergence``.
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(
        self,
        teacher_head: CheckpointHead,
        ref_head: CheckpointHead | None = None,
        reward_scale: float = 1.0,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        self.reward_scale = require_reference(reward_scale, ref_head, "pass ref_head")
        self.heads = {"teacher_hidden": teacher_head} | ({} if ref_head is None else {"ref_hidden": ref_head})
        self.temperature, self.options = temperature, options
        self.metric_normalizations = dict.fromkeys(("kl_target", "entropy", "loss"), MetricNormalizer.TOKENS)

    def __call__(
        self, logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of a micro-batch: sums over its tokens, divided by ``global_valid_toks``.

        Args:
            logits: (B, S, V), divided by the temperature, as NeMo-RL does; position t predicts token t + 1.
            data: NeMo-RL's BatchedDataDict: (B, S) ``input_ids`` and ``token_mask``, ``sample_mask`` (B,);
                ``teacher_hidden`` (B, S, H), whose position t predicts token t (the first is not read), and for
                lambda != 1 ``ref_hidden``.
        """
        teacher = self._frozen("teacher_hidden", logits, data)
        ref = self._frozen("ref_hidden", logits, data) if "ref_hidden" in self.heads else None
        tokens, samples = (require_mask(f"data[{name!r}]", data[name]) for name in ("token_mask", "sample_mask"))
        mask = tokens[:, 1:] & samples[:, None]
        out = gopd_loss(
            Logits(logits[:, :-1]),
            teacher,
            ref,
            data["input_ids"][:, 1:],
            mask=mask,
            reward_scale=self.reward_scale,
            estimator="full",
            reduction="sum",
            **self.options,
        )
        loss = out.loss / global_valid_toks
        sums = {"kl_target": out.kl, "entropy": out.entropy}
        metrics = {name: (x.sum() / global_valid_toks).item() for name, x in sums.items() if x is not None}
        return loss, {"loss": loss.item(), "num_valid_samples": data["sample_mask"].sum().item(), **metrics}

    def _frozen(self, name: str, logits: Tensor, data: Any) -> Any:
        head = self.heads[name]
        if is_dtensor(logits) or logits.shape[-1] < head.vocab_size:
            raise ValueError(
                f"logits must be whole, with the {head.vocab_size} columns of the head of {name} at least, got "
                f"{logits.shape[-1]} columns in a {type(logits).__name__}: run without tensor parallelism"
            )
        if name not in data:
            raise ValueError(
                f"data[{name!r}] must hold hidden states (B, S, {head.hidden_size}), and is not there: put what a "
                "fused_gopd.integrations.server.HiddenStateTeacher returns into the training data"
            )
        return head.to(logits.device)(data[name][:, 1:].to(logits.device), temperature=self.temperature)
