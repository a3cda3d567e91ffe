"""Liger-Kernel: its distillation and GRPO losses with the signatures of its modules, on this package's kernels.

In place of ``from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss``::

    from fused_gopd.integrations.liger import LigerFusedLinearJSDLoss

liger-kernel need not be installed. Arguments that choose Liger's way to the result and not the result (``compiled``,
``chunk_size``, ``accum_dtype``) are taken and do nothing: nothing is compiled, chunks have this package's size, and
gradients of a weight are summed in float32. Log-probs are those of float32 logits. What Liger computes and this package
does not is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

import fused_gopd as fg

from ..checks import IGNORE
from ..tokens import check_mask
from ..values import one_of

__all__ = ["LigerFusedLinearGRPOLoss", "LigerFusedLinearJSD", "LigerFusedLinearJSDLoss"]


def _heads(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    temperature: float,
) -> tuple[fg.LinearHead, fg.LinearHead]:
    """Student and teacher at one temperature, of one vocabulary."""
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"teacher_weight must have as many rows as student_weight, {student_weight.shape[0]}, got "
            f"{teacher_weight.shape[0]}: Liger gives the student a logit of 0 for each row that it lacks, which is not "
            "done here. fused_gopd.gopd_loss takes both heads, over their joint vocabulary"
        )
    student = fg.LinearHead(student_input, student_weight, biases[0], temperature=temperature)
    teacher = fg.LinearHead(teacher_input.detach(), teacher_weight.detach(), biases[1], temperature=temperature)
    return student, teacher


def _logprobs(head: fg.LinearHead, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Of the tokens (...), differentiable; 0 where masked."""
    logprobs = fg.token_logprobs(head, token_ids, mask=mask)
    assert isinstance(logprobs, Tensor)
    return logprobs


class LigerFusedLinearJSD(nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearJSD``: the mean of the JSD over the tokens that have a label.

    Args:
        jsd_beta: 0 ... 1; 0 is the forward KL, 1 the reverse KL.
        ignore_index: the label of tokens that are left out.
        temperature: of both models; the loss is not multiplied by its square.
        accum_dtype: does nothing: a weight's gradient is always summed in float32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """The loss of hidden states (BT, H) and (BT, H'), weights (V, H) and (V, H'), labels (BT,) or None."""
        inputs = student_input, student_weight, teacher_input, teacher_weight
        student, teacher = _heads(*inputs, (None, None), self.temperature)
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return fg.gopd_loss(student, teacher, mask=mask, estimator="full", divergence="jsd", beta=self.jsd_beta).loss


class LigerFusedLinearJSDLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``: a cross entropy and a JSD, each a mean over the labels.

    Args:
        weight_hard_loss: of the cross entropy of the labels, which is that of temperature 1.
        weight_soft_loss: of the JSD between student and teacher at ``temperature``.
        beta: 0 ... 1; 0 is the forward KL, 1 the reverse KL.
        ignore_index: the label of tokens that are left out of both.
        temperature: of both models in the JSD, which is not multiplied by its square.
        compiled, chunk_size: do nothing.
        return_soft_hard_loss: return (loss, soft loss, hard loss); the last two are detached.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of hidden states (BT, H) and (BT, H'), weights (V, H) and (V, H'), labels (BT,), biases (V,)."""
        inputs = student_input, student_weight, teacher_input, teacher_weight
        student, teacher = _heads(*inputs, (student_bias, teacher_bias), self.temperature)
        live = true_labels != self.ignore_index
        labels = true_labels.masked_fill(~live, IGNORE)
        divergence: dict[str, Any] = {"estimator": "full", "divergence": "jsd", "beta": self.beta, "mask": live}
        if self.weight_hard_loss * self.weight_soft_loss > 0:  # both from the same logits
            weight = self.weight_hard_loss / self.weight_soft_loss
            cooled = None if self.temperature == 1 else 1.0
            out = fg.gopd_loss(
                student, teacher, **divergence, sft_labels=labels, sft_weight=weight, sft_temperature=cooled
            )
            loss = self.weight_soft_loss * out.loss
            if not self.return_soft_hard_loss:
                return loss
            assert out.label_logprobs is not None
            hard = -out.label_logprobs.sum() / live.sum().clamp_min(1)
            return loss, out.loss.detach() - weight * hard, hard
        hard = soft = student_input.new_zeros((), dtype=torch.float32)
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            hard = fg.linear_nll(replace(student, temperature=1.0), labels)
        if self.weight_soft_loss != 0 or self.return_soft_hard_loss:
            soft = fg.gopd_loss(student, teacher, **divergence).loss
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
_LEAST_LOG_RATIO, _LARGEST_LOG_RATIO = math.log(1e-8), 20.0  # of VESPO's sequences


def _where(chosen: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """a where chosen, else b, in the dtype of ``like``."""
    return like.new_full(chosen.shape, b).masked_fill(chosen, a)


class _Valued(torch.autograd.Function):
    """The gradient of one loss with the value of another; a difference of the two would be NaN where they are inf."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """What is known of each token: (B, T), or (C,) of the tokens of a chunk. Masked entries are finite.

    Attributes:
        live: the mask, 0 or 1.
        advantages: that of the token's sequence.
        old: log-probs under the old policy; None where that is the student itself.
        ref: log-probs under the reference; None where that is the student itself.
        importance: vLLM's importance weights.
    """

    live: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    importance: Tensor | None

    def at(self, index: Tensor) -> _Tokens:
        """Those at flat positions (C,)."""
        picked = {name: x.reshape(-1)[index] for name, x in vars(self).items() if x is not None}
        return replace(self, **picked)


class LigerFusedLinearGRPOLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``: GRPO and its variants.

    A loss that is a sum over tokens has its gradients computed with it, in three GEMMs. Ratios of whole sequences
    (``importance_sampling_level="sequence"``, ``loss_type="vespo"``) need all log-probs first: four, as in Liger.

    ``loss_type="luspo"``, which Liger sums over masked tokens too, is there for ratios of sequences without a KL term
    and with one importance weight a sequence, where that makes no difference.

    Args: as Liger's. ``compiled`` and ``chunk_size`` do nothing.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        one_of("loss_type", loss_type, LOSS_TYPES)
        one_of("importance_sampling_level", importance_sampling_level, LEVELS)
        positive = {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        for name, value in (positive if delta is None else {**positive, "delta": delta}).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and as metrics the mean KL (where beta is not 0) and the share of clipped tokens.

        Args:
            _input: (B, T, H) hidden states, of which ``_input[:, t]`` predicts ``selected_token_ids[:, t]``.
            lin_weight, bias: (V, H) and (V,).
            selected_token_ids, attention_mask: (B, T).
            advantages: (B,).
            ref_per_token_logps, old_per_token_logps: (B, T).
            ref_input, ref_weight, ref_bias: the reference's head, where its log-probs are not given.
            vllm_is_ratio: (B, T), (B, 1) or (B,) importance weights.
            num_items_in_batch: divisor of dapo, cispo and vespo over all ranks; default this call's tokens.
        """
        head = fg.LinearHead(_input, lin_weight, bias, temperature=self.temperature)
        shape = head.token_shape
        if len(shape) != 2:
            raise ValueError(f"_input must have shape (B, T, H), got {tuple(_input.shape)}")
        mask = check_mask(attention_mask, shape, _input.device, "_input")
        assert mask is not None
        if vllm_is_ratio is not None and vllm_is_ratio.ndim == 1:
            vllm_is_ratio = vllm_is_ratio[:, None]
        self._refuse(vllm_is_ratio)
        ref = ref_per_token_logps
        if self.beta != 0 and self.use_ref_model and ref is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "ref_per_token_logps, or ref_input and ref_weight, must be given with use_ref_model=True and "
                    f"beta={self.beta}"
                )
            with torch.no_grad():
                frozen = fg.LinearHead(ref_input, ref_weight, ref_bias, temperature=self.temperature)
                ref = _logprobs(frozen, selected_token_ids, mask)
        dtype = torch.float64 if _input.dtype == torch.float64 else torch.float32

        def per_token(name: str, given: Tensor, masked: float = 0.0) -> Tensor:
            try:
                whole = given.detach().to(dtype).expand(shape)
            except RuntimeError:
                raise ValueError(f"{name} must fit tokens of shape {tuple(shape)}, got {tuple(given.shape)}") from None
            return whole.masked_fill(~mask, masked)

        tokens = _Tokens(
            live=mask.to(dtype),
            advantages=per_token("advantages", advantages[:, None]),
            old=None if old_per_token_logps is None else per_token("old_per_token_logps", old_per_token_logps),
            ref=None if ref is None else per_token("ref_per_token_logps", ref),
            importance=None if vllm_is_ratio is None else per_token("vllm_is_ratio", vllm_is_ratio, 1.0),
        )
        weights = tokens.live / self._divisor(tokens.live, num_items_in_batch)
        if self.importance_sampling_level == "sequence" or self.loss_type == "vespo":
            logprobs = _logprobs(head, selected_token_ids, mask)
            losses, kl, clipped = self._token_losses(logprobs, tokens, vllm_is_ratio)
            loss = (losses * weights).sum()
        else:

            def advantages_of(stats: fg.TokenStats) -> Tensor:
                """Minus the derivative of the loss by the log-prob of each token, which is what an advantage is."""
                chosen = tokens.at(stats.index)
                with torch.enable_grad():
                    logprobs = stats.student_logprobs.detach().requires_grad_()
                    losses = self._token_losses(logprobs, chosen)[0] * weights.reshape(-1)[stats.index]
                    (derivative,) = torch.autograd.grad(losses.sum(), logprobs)
                return -derivative

            out = fg.gopd_loss(
                head, None, None, selected_token_ids, mask=mask, advantage_fn=advantages_of, reduction="sum"
            )
            assert out.student_logprobs is not None
            losses, kl, clipped = self._token_losses(out.student_logprobs, tokens)
            loss = _Valued.apply(out.loss, (losses * weights).sum())  # type: ignore[no-untyped-call]
        count = tokens.live.sum().clamp_min(1)
        shares = [x.detach() * tokens.live for x in (kl, clipped) if x is not None]
        return loss, tuple([x.sum() / count for x in shares])

    def _refuse(self, importance: Tensor | None) -> None:
        """Raise for what Liger refuses, or does and this module does not."""
        kind, sequences = self.loss_type, self.importance_sampling_level == "sequence"
        if sequences and kind in ("cispo", "sapo", "vespo"):
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={kind!r}, as in Liger; got "
                "importance_sampling_level='sequence'"
            )
        if kind == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given with loss_type='dr_grpo', got None")
        one_a_sequence = importance is None or importance.shape[-1] == 1
        if kind == "luspo" and not (sequences and self.beta == 0 and one_a_sequence):
            raise ValueError(
                "loss_type='luspo' needs importance_sampling_level='sequence', beta=0 and one vllm_is_ratio a "
                "sequence: Liger's sum over tokens has masked ones in it, which are not computed here"
            )

    def _divisor(self, live: Tensor, num_items_in_batch: float | Tensor | None) -> float | Tensor:
        """What each token's loss is divided by: a number, or (B, 1)."""
        kind, sequences = self.loss_type, live.shape[0]
        if kind in ("grpo", "sapo"):  # sequences without a live token count too
            return live.sum(-1, keepdim=True).clamp_min(1) * sequences
        if kind == "bnpo":
            return live.sum().clamp_min(1)
        if kind == "dr_grpo":
            assert self.max_completion_length is not None
            return float(sequences * self.max_completion_length)
        if kind == "luspo":  # the length of a sequence times its mean
            return float(sequences)
        total = live.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(live)
        ranks = 1
        if distributed.is_available() and distributed.is_initialized():
            ranks = distributed.get_world_size()
            if num_items_in_batch is None:
                distributed.all_reduce(total)
        return (total / ranks).clamp_min(1)

    def _token_losses(
        self, logprobs: Tensor, tokens: _Tokens, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Token losses, their KL (None where beta is 0), and which are clipped; differentiable in the log-probs.

        Args:
            logprobs: (B, T); (C,) of a chunk where no sequence has to be summed.
            tokens: of the same shape.
            importance: vLLM's weights as given, (B, T) or (B, 1), for VESPO.
        """
        kind, advantages = self.loss_type, tokens.advantages
        old = logprobs.detach() if tokens.old is None else tokens.old
        log_ratio = logprobs - old
        if self.importance_sampling_level == "sequence":
            sums = (log_ratio * tokens.live).sum(-1, keepdim=True)
            log_ratio = (sums / tokens.live.sum(-1, keepdim=True).clamp_min(1)).expand(logprobs.shape)
        ratio = log_ratio.exp()
        low, high = (ratio < 1 - self.epsilon_low), (ratio > 1 + self.epsilon_high)
        clipped = ((low & (advantages < 0)) | (high & (advantages > 0))).to(ratio.dtype)
        if kind == "cispo":
            clipped = ((ratio > self.epsilon_high) & (advantages > 0)).to(ratio.dtype)
            losses = -advantages * ratio.detach().clamp_max(self.epsilon_high) * logprobs
        elif kind == "sapo":
            clipped = torch.zeros_like(ratio)
            steepness = _where(advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg, advantages)
            losses = -advantages * torch.sigmoid(steepness * (ratio - 1)) * 4 / steepness
        elif kind == "vespo":
            clipped = torch.zeros_like(ratio)
            losses = -advantages * self._gamma_weights(log_ratio.detach(), tokens, importance) * logprobs
        else:
            unclipped = ratio if self.delta is None else ratio.clamp_max(self.delta)
            inside = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
            losses = torch.maximum(-advantages * unclipped, -advantages * inside)
        if tokens.importance is not None and kind != "vespo":
            losses = losses * tokens.importance
        if self.beta == 0:
            return losses, None, clipped
        difference = (logprobs.detach() if tokens.ref is None else tokens.ref) - logprobs
        kl = difference.exp() - difference - 1
        if self.use_bias_correction_kl:
            kl = kl * ratio
        return losses + self.beta * kl, kl, clipped

    def _gamma_weights(self, log_ratio: Tensor, tokens: _Tokens, importance: Tensor | None) -> Tensor:
        """VESPO's detached weight of each sequence, (B, 1): w^k exp(lambda (1 - w)), w the ratio of the sequence."""
        limit = _LARGEST_LOG_RATIO
        total = (log_ratio.clamp(-limit, limit) * tokens.live).sum(-1, keepdim=True)
        if importance is not None:  # of all positions, masked or not, as in Liger and TRL
            total = total + importance.to(total).log().clamp(_LEAST_LOG_RATIO, limit).sum(-1, keepdim=True)
        total = total.clamp(_LEAST_LOG_RATIO, limit)
        positive = tokens.advantages >= 0
        k = _where(positive, self.vespo_k_pos, self.vespo_k_neg, total)
        rate = _where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg, total).clamp_min(1e-4)
        return (rate + k * total - rate * total.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
