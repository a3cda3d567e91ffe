"""What the loss returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import printing
from .metrics import WITH_SQUARES, Metrics
from .objective.kl_estimates import KL_ESTIMATES
from .records import ComputedWhenRead, none
from .tokens import widest
from .values import one_of


@dataclass(frozen=True, repr=False, kw_only=True)
class GOPDOutput(ComputedWhenRead):
    """What :func:`gopd_loss` returns. ``(...)`` is the token shape; entries of masked tokens are 0.

    The loss is there. A tensor besides it is computed when it is first read, from the statistics of the tokens (about
    200 bytes each, no model): what is not read costs nothing. During the capture of a CUDA graph all are.

    Attributes:
        loss: scalar, or (...) with ``reduction="none"``. The only differentiable field.
        token_loss: (...) per-token losses before any weighting, detached.
        advantages: (...) A = lambda log q + (1 - lambda) log r - log p of the sampled token (in ``sampled`` with old
            log-probs in place of log p where they are given), as the gradient uses it: the value of ``advantage_fn`` if
            there is one, with the baseline, clipped. Positive makes the token likelier. None without ``token_ids``, and
            where a model is TopKLogProbs without ``sampled_logprobs``.
        student_logprobs, teacher_logprobs, ref_logprobs: (...) of the sampled token; None where not computed. Where
            ``joint`` all three are normalised over the joint support, and 0 for a token whose own lambda cancels the
            model.
        entropy: (...) of the student, in nats.
        kl: (...) KL(student || target) >= 0; in ``topk`` over the existing outcomes, the student's mass on them
            being 1. None in ``sampled`` and with ``tail="sampled"``.
        kl_ref: (...) KL(student || reference) over the vocabulary, of ``kl_ref="exact"``; None without it.
        clipped: (...) bool, where a bound of the ratio or ``loss_max`` is in force, and removed the gradient (with
            ``ratio="detached"``: bounded its weight). None without one.
        importance: (...) the detached importance weight of the rollout, 0 where it is masked. None without
            ``rollout_logprobs``.
        label_logprobs: (...) log p of ``sft_labels``, 0 where there is none. None without them.
        labelled: (...) bool, where the supervised term is in force: there is a label inside the support.
        mask: (...) bool, the live tokens; None where all are.
        reward_scale: lambda as given, expanded to the token shape where it is a tensor; (...) what a
            ``reward_scale_fn`` has returned.
        teacher_index: (...) which teacher of the list each token had; None without a ``teacher_index``.
        teachers: how many teachers (or references) the list had, 1 without one.
        joint: whether log-probs are normalised over the joint support of all models: in ``full``, and with a baseline.
    """

    loss: Tensor
    token_loss: Tensor
    advantages: Tensor | None
    student_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor
    kl: Tensor | None
    kl_ref: Tensor | None = field(default_factory=none)
    clipped: Tensor | None = field(default_factory=none)
    importance: Tensor | None = field(default_factory=none)
    label_logprobs: Tensor | None = field(default_factory=none)
    labelled: Tensor | None = field(default_factory=none)
    mask: Tensor | None = None
    reward_scale: float | Tensor = 1.0
    teacher_index: Tensor | None = field(default_factory=none)
    teachers: int = 1
    joint: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: every field, no function."""
        return {name: getattr(self, name) for name in _FIELDS}

    def __repr__(self) -> str:
        """One short line a field: shape, dtype and the mean over the live tokens, which waits for the device."""
        return printing.lines(self, self.mask)

    @overload
    def metrics(self) -> Metrics: ...

    @overload
    def metrics(self, by: Literal["teacher"]) -> list[Metrics]: ...

    def metrics(self, by: Literal["teacher"] | None = None) -> Metrics | list[Metrics]:
        """Training signals (implicit reward, divergences, entropy, ...) that add up over batches and ranks.

        Computed when asked for, without waiting for the device. With ``by="teacher"`` one :class:`Metrics` for each
        teacher of the list, of the tokens that it had: means are NaN where it had none.
        """
        live = torch.ones_like(self.token_loss, dtype=torch.bool) if self.mask is None else self.mask
        if by is None:
            return metrics_of(self, live)
        one_of("by", by, ("teacher",))
        index = self.teacher_index
        if index is None:
            raise ValueError("metrics(by='teacher') needs a teacher_index in the call: it had one teacher")
        return [metrics_of(self, live & (index == i)) for i in range(self.teachers)]


_FIELDS = tuple(f.name for f in dataclasses.fields(GOPDOutput))


def metrics_of(out: GOPDOutput, live: Tensor) -> Metrics:
    """The metrics of the tokens where ``live``, (...) bool; a part of the output's own live tokens."""
    entries: dict[str, Tensor] = {}
    dtype = widest(live.device)

    def add(name: str, values: Tensor, among: Tensor = live) -> None:
        wide = torch.where(among, values, torch.zeros_like(values)).to(dtype)
        entries[name] = torch.stack((wide.sum(), among.sum().to(dtype)))
        if name in WITH_SQUARES:
            entries[name + "_squared"] = torch.stack(((wide * wide).sum(), among.sum().to(dtype)))

    add("tokens", live.to(dtype))
    add("loss", out.token_loss)
    add("entropy", out.entropy)
    p, q, r = out.student_logprobs, out.teacher_logprobs, out.ref_logprobs
    scale = out.reward_scale
    if isinstance(scale, Tensor):
        add("reward_scale", scale)
    else:  # filled on the device: a copy would be a host sync
        scale = torch.full((), scale, dtype=dtype, device=live.device)
    needs_q, needs_r = (scale != x for x in (0, 1))
    # over the joint support a model that the token's own lambda cancels has no log-prob
    skips = out.joint and isinstance(out.reward_scale, Tensor)
    has_q, has_r = (live & needs_q, live & needs_r) if skips else (live, live)

    def k3(name: str, other: Tensor | None, among: Tensor) -> None:
        if p is not None and other is not None:
            d = other.to(dtype) - p.to(dtype)
            add(name, KL_ESTIMATES["k3"](d).clamp_min(0), among & ~torch.isneginf(p) & ~torch.isneginf(other))

    if q is not None and r is not None:
        add("reward", q - r, has_q & has_r & ~torch.isneginf(q) & ~torch.isneginf(r))
    k3("kl_teacher_k3", q, has_q)
    k3("kl_ref_k3", r, has_r)
    if p is not None and (q is not None or r is not None):
        impossible = torch.isneginf(p)
        for model, needed in ((q, needs_q), (r, needs_r)):
            if model is not None:
                impossible = impossible | (needed & torch.isneginf(model))
        add("impossible", impossible.to(dtype))
    if out.kl is not None:
        add("kl_target", out.kl)
        target = {0.0: "kl_ref", 1.0: "kl_teacher"}
        if out.joint and not isinstance(out.reward_scale, Tensor) and out.reward_scale in target:
            add(target[out.reward_scale], out.kl)  # full: the target is one of the models
    if out.kl_ref is not None:
        add("kl_ref", out.kl_ref)
    if out.label_logprobs is not None and out.labelled is not None:
        add("sft_loss", -out.label_logprobs, out.labelled)
    if out.advantages is not None:
        add("advantage", out.advantages)
    if out.clipped is not None:
        add("clip_fraction", out.clipped.to(dtype))
    if out.importance is not None:
        add("importance", out.importance)
        add("masked_fraction", (out.importance == 0).to(dtype))
    return Metrics(tuple(entries), torch.stack(list(entries.values())))
