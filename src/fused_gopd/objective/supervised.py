"""The supervised term, -weight log p[label], and the loss of :func:`fused_gopd.linear_nll`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import record
from ..rowops import Stat
from .logit_gradient import LogitGradient
from .statistics import token_logprob


@record(frozen=True, kw_only=True)
class NLL:
    """(1 - e) (-log p[y]) + e mean_v(-log p_v) + w (log Z)^2 with the label y and Z = sum_v exp z_v.

    The mean over the vocabulary is sum_v t_v (-log p_v) with t uniform over the support, whose logits are all 0: the
    forward KL to such a target, but for its entropy.
    """

    label_smoothing: float = 0.0  # e
    z_loss: float = 0.0  # w

    def values(self, statistics: Tensor) -> Tensor:
        """(C,) token losses."""
        logsum = statistics[Stat.LOGSUM_STUDENT]
        loss = -token_logprob(statistics[Stat.LOGIT_STUDENT], logsum)
        if self.label_smoothing:
            # the target's logits and their origin are 0: MEAN_TARGET_GAP is minus the mean of z'
            smooth = statistics[Stat.MEAN_TARGET_GAP] + logsum
            loss = smooth if self.label_smoothing == 1 else loss + self.label_smoothing * (smooth - loss)
        if self.z_loss:
            loss = loss + self.z_loss * (logsum + statistics[Stat.MAX_STUDENT]).square()
        return loss

    def gradient(self, statistics: Tensor, labels: Tensor) -> LogitGradient:
        """e (p - t) + (1 - e) (p - 1[v = y]) + 2 w log Z p, for labels (C,)."""
        e, logsum = self.label_smoothing, statistics[Stat.LOGSUM_STUDENT]
        weight = torch.full_like(logsum, 1 - e)
        divergence = torch.full_like(logsum, e) if e else None
        if not self.z_loss:
            return LogitGradient(divergence=divergence, weight=weight, token_ids=labels[:, None])
        weight = weight + 2 * self.z_loss * (logsum + statistics[Stat.MAX_STUDENT])
        p = token_logprob(statistics[Stat.LOGIT_STUDENT], logsum).exp()
        at_label = weight * p - (1 - e)
        if e:
            at_label = at_label + e * (p - (-statistics[Stat.LOGSUM_TARGET]).exp())
        # a label outside the support has no entry
        outside = torch.isneginf(statistics[Stat.LOGIT_STUDENT])
        return LogitGradient(
            divergence=divergence,
            weight=weight,
            token_ids=labels[:, None],
            values=at_label.masked_fill(outside, 0)[:, None],
        )


def has_label(label_logprobs: Tensor, labels: Tensor) -> Tensor:
    """(C,) bool, where there is a label with p > 0: elsewhere the supervised term is 0."""
    return (labels >= 0) & ~torch.isneginf(label_logprobs)


def supervised(weight: float, label_logprobs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) weights of the supervised term, 0 where there is no label with p > 0, and the term itself."""
    counts = has_label(label_logprobs, labels)
    return torch.where(counts, weight, torch.zeros_like(label_logprobs)), torch.where(
        counts, -weight * label_logprobs, 0
    )


def label_report(label_logprobs: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Log-probs of the labels, 0 where there is none, and where the supervised term is in force; None without any."""
    if labels is None:
        return None, None
    return label_logprobs.masked_fill(labels < 0, 0), has_label(label_logprobs, labels)
