"""What the loss returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import printing
from .metrics import Metrics


@dataclass(frozen=True, repr=False)
class GOPDOutput:
    """What :func:`gopd_loss` returns. ``(...)`` is the token shape; entries of masked tokens are 0.

    Attributes:
        loss: scalar, or (...) with ``reduction="none"``. The only differentiable field.
        token_loss: (...) per-token losses before any weighting, detached.
        advantages: (...) A = lambda log q + (1 - lambda) log r - log p of the sampled token (with old log-probs in
            place of log p where they are given), as the gradient uses it: the value of ``advantage_fn`` if there is
            one, with the baseline, clipped. Positive makes the token likelier. None without ``token_ids``, and
            where a model is TopKLogProbs.
        student_logprobs, teacher_logprobs, ref_logprobs: (...) of the sampled token; None where not computed. Where
            ``joint`` all three are normalised over the joint support, and 0 for a token whose own lambda cancels the
            model.
        entropy: (...) of the student, in nats.
        kl: (...) KL(student || target) >= 0; in ``topk`` over the outcomes that there are, the student's mass on them
            being 1. None in ``sampled``.
        clipped: (...) bool, where ``clip`` or ``clip_dual`` removed the gradient. None without them.
        importance: (...) the detached importance weight of the rollout. None without ``rollout_logprobs``.
        label_logprobs: (...) log p of ``sft_labels``, 0 where there is none. None without them.
        labelled: (...) bool, where the supervised term is in force: there is a label inside the support.
        mask: (...) bool, the live tokens; None where all are.
        reward_scale: lambda as given, expanded to the token shape where it is a tensor.
        joint: whether the models were looked at together: in ``full``, and with a baseline.
    """

    loss: Tensor
    token_loss: Tensor
    advantages: Tensor | None
    student_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor
    kl: Tensor | None
    clipped: Tensor | None = None
    importance: Tensor | None = None
    label_logprobs: Tensor | None = None
    labelled: Tensor | None = None
    mask: Tensor | None = None
    reward_scale: float | Tensor = 1.0
    joint: bool = False

    def __repr__(self) -> str:
        """One short line a field: shape, dtype and the mean over the live tokens, which waits for the device."""
        return printing.lines(self, self.mask)

    def metrics(self) -> Metrics:
        """Training signals (implicit reward, divergences, entropy, ...) that add up over batches and ranks.

        Computed when asked for, without waiting for the device.
        """
        return Metrics.of(self)
