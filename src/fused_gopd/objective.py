"""The objective per token: everything that has no vocabulary axis.

Takes the statistics that the row operations leave per token and returns losses, advantages, gradient coefficients,
weights and reductions. Plain PyTorch on vectors; nothing here synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from . import printing
from .rowops import FAR, Stat

Estimator = Literal["sampled", "full", "topk"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"]
Ratio = Literal["token", "sequence"]
Baseline = Literal["none", "expected"]
Support = Literal["teacher", "student"]
Tail = Literal["bucket", "drop", "renormalize"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
RATIOS: tuple[str, ...] = get_args(Ratio)
BASELINES: tuple[str, ...] = get_args(Baseline)
SUPPORTS: tuple[str, ...] = get_args(Support)
TAILS: tuple[str, ...] = get_args(Tail)


def divergence_of(beta: float) -> Divergence:
    """What the beta of Liger, TRL and ms-swift stands for: the JSD, and at its ends the two KL divergences.

    The JSD goes to 0 at both ends. JSD / beta goes to KL(target || p) at 0 and JSD / (1 - beta) to KL(p || target) at
    1; those are meant, not divided by anything.
    """
    ends: dict[float, Divergence] = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return ends.get(beta, "jsd")


# ------------------------------------------------------------------------------------------------------- sequences


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums over tokens: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Sequences:
    """Which sequence a token belongs to: dim 0 of a token shape (B, ...), or the slices of packed tokens (N,).

    Both ways sums are taken in a fixed order, so that two runs give the same bits, and nothing waits for a device.
    """

    shape: torch.Size  # the token shape
    cu_seqlens: Tensor | None = None  # (B + 1,) int64: sequence i is tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1

    @property
    def count(self) -> int:
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def sum(self, values: Tensor) -> Tensor:
        """(B,) sums, in :func:`widest` precision, of ``values`` in the token shape."""
        values = values.to(widest(values.device))
        if self.cu_seqlens is None:
            return values.reshape(self.count, -1).sum(1) if values.numel() else values.new_zeros(self.count)
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, unsafe=True, initial=0)

    def expand(self, values: Tensor) -> Tensor:
        """One value per sequence (B,) in the token shape."""
        if self.cu_seqlens is None:
            return values.reshape(-1, *([1] * (len(self.shape) - 1))).expand(self.shape)
        positions = torch.arange(self.shape[0], device=self.cu_seqlens.device)
        return values[torch.searchsorted(self.cu_seqlens, positions, right=True) - 1]


# ---------------------------------------------------------------------------------------------------- mixing models


def mix(reward_scale: float | Tensor, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
    """lambda q + (1 - lambda) r, where a model with coefficient exactly 0 does not matter, whatever its value.

    Written as r + lambda (q - r), or q + (lambda - 1) (q - r) for lambda > 1/2: so that q = r gives exactly q, and the
    rounding of q - r, a large one where one of them is a large mask, counts no more than that of the result. Finite q
    and r give a finite result, clamped to the range of the dtype; an infinite one gives NaN. ``None`` is a model that
    has cancelled.
    """
    if ref is None:
        assert teacher is not None
        return teacher
    if teacher is None:
        return ref
    gap = teacher - ref
    if isinstance(reward_scale, Tensor):
        near_teacher = reward_scale > 0.5
        share = torch.where(near_teacher, reward_scale - 1, reward_scale)
        mixed = torch.where(near_teacher, teacher, ref) + share * gap
        mixed = bounded(mixed) + 0 * gap
        return torch.where(reward_scale == 1, teacher, torch.where(reward_scale == 0, ref, mixed))
    if reward_scale in (0, 1):
        return teacher if reward_scale else ref
    mixed = teacher + (reward_scale - 1) * gap if reward_scale > 0.5 else ref + reward_scale * gap
    return bounded(mixed) + 0 * gap


def bounded(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Within the finite range of its dtype, or of another one; NaN stays."""
    limits = torch.finfo(dtype or x.dtype)
    return x.clamp(limits.min, limits.max)


def origin_of(maximum: Tensor) -> Tensor:
    """What to take u relative to before its log-sum: its maximum where that is far from 0, else 0.

    A log-sum relative to something far away has the rounding of that. Near 0 nothing is subtracted: one operation less
    for every entry.
    """
    return torch.where(maximum.abs() > FAR, bounded(maximum), 0)


def any_impossible(reward_scale: float | Tensor, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
    """Where a model that counts gives the token probability 0."""
    dead: Tensor | None = None
    for model, cancelled_at in ((teacher, 0.0), (ref, 1.0)):
        if model is None:
            continue
        gone = torch.isneginf(model)
        if isinstance(reward_scale, Tensor):
            gone = gone & (reward_scale != cancelled_at)
        dead = gone if dead is None else dead | gone
    assert dead is not None
    return dead


def advantage(
    reward_scale: float | Tensor, behaviour: Tensor, teacher: Tensor | None, ref: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A = lambda log q + (1 - lambda) log r - log p of the sampled token, and where it is finite.

    Where a model gives the token probability 0 there is no finite advantage: A is 0 there and ``finite`` False.
    NaN stays NaN and counts as finite, so that a diverged model is seen.

    Args:
        reward_scale: lambda, a float or (C,).
        behaviour: (C,) log-prob under the policy that sampled the token: old log-probs, or the student's own.
        teacher, ref: (C,) log-probs, None where cancelled.
    """
    dead = any_impossible(reward_scale, teacher, ref) | torch.isneginf(behaviour)
    value = bounded(mix(reward_scale, teacher, ref) - behaviour) + 0 * behaviour
    return torch.where(dead, torch.zeros_like(value), value), ~dead


@dataclass(frozen=True)
class Surrogate:
    """How the sampled estimator makes advantages and turns them into token losses; None switches a part off."""

    clip: tuple[float, float] | None = None  # (epsilon_low, epsilon_high)
    clip_dual: float | None = None
    ratio: Ratio = "token"
    rollout_is_cap: float | None = None
    advantage_clip: tuple[float, float] | None = None
    logprob_min: float | None = None
    baseline: Baseline = "none"


PLAIN = Surrogate()


def looks_jointly(estimator: Estimator, surrogate: Surrogate) -> bool:
    """Whether all models of a token are looked at together, over their joint support."""
    return estimator == "full" or surrogate.baseline == "expected"


@dataclass(frozen=True, repr=False)
class TokenStats:
    """What an ``advantage_fn`` sees of C tokens: vectors (C,), detached, float32 (float64 for float64 inputs).

    Attributes:
        index: int64 flat positions in the token shape, to line up tensors of one's own: ``mine.reshape(-1)[index]``.
        advantages: A = lambda log q + (1 - lambda) log r - log p, of the old log p if given; 0 where it is not finite;
            None without a teacher and a reference.
        student_logprobs, teacher_logprobs, ref_logprobs: of the sampled token, at least ``logprob_min`` where that is
            given (teacher and reference); None for a model that has cancelled.
        old_logprobs: as given, or None.
        student_entropy: in nats.
        teacher_entropy, ref_entropy: None where log-probs are computed elsewhere (for any of several teachers), and
            with ``baseline="expected"``.
        reward_scale: lambda, a float or (C,).

    A log-prob may be -inf: it is for the function to say what such a token's advantage is.
    """

    index: Tensor
    advantages: Tensor | None
    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    ref_entropy: Tensor | None
    reward_scale: float | Tensor

    def __repr__(self) -> str:
        return printing.lines(self)


AdvantageFn = Callable[[TokenStats], Tensor]


def call_hook(hook: AdvantageFn, stats: TokenStats) -> Tensor:
    """The hook's advantages (C,), checked."""
    with torch.no_grad():
        value = hook(stats)
    expected = stats.student_logprobs
    if not isinstance(value, Tensor):
        raise TypeError(f"advantage_fn must return a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"advantage_fn must return a float tensor, got {value.dtype}")
    if value.shape != expected.shape or value.device != expected.device:
        raise ValueError(
            f"advantage_fn must return one advantage per token, shape {tuple(expected.shape)} on {expected.device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )
    return value.detach().to(expected.dtype)


def advantages_of(
    surrogate: Surrogate, stats: TokenStats, hook: AdvantageFn | None, expected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The advantages that the gradient uses, and those that the loss reports, which leave the baseline out; (C,) each.

    ``logprob_min`` on teacher and reference -> A or the hook's value -> the baseline -> ``advantage_clip``.

    ``expected`` is the value l of the ``full`` reverse KL per token: E_p[A] = -l, so that A + l has mean 0 (vOPD,
    2605.07865). The hook's advantage has another mean, but any number per position leaves the gradient unbiased.
    """
    teacher, ref = stats.teacher_logprobs, stats.ref_logprobs
    if surrogate.logprob_min is not None:
        teacher, ref = (None if x is None else x.clamp_min(surrogate.logprob_min) for x in (teacher, ref))
    behaviour = stats.student_logprobs if stats.old_logprobs is None else stats.old_logprobs
    adv: Tensor | None = None
    finite = ~torch.isneginf(behaviour)
    if teacher is not None or ref is not None:
        adv, finite = advantage(stats.reward_scale, behaviour, teacher, ref)
    if hook is not None:
        adv = call_hook(hook, replace(stats, advantages=adv, teacher_logprobs=teacher, ref_logprobs=ref))
        finite = ~torch.isneginf(behaviour)
    assert adv is not None

    def bounded(x: Tensor) -> Tensor:
        if surrogate.advantage_clip is not None:
            x = x.clamp(*surrogate.advantage_clip)
        return x.masked_fill(~finite, 0)

    return bounded(adv if expected is None else adv + expected), bounded(adv)


@dataclass(frozen=True)
class PolicyTerm:
    """The sampled estimator's token loss and its derivative with respect to the student's log-prob; (C,) each."""

    loss: Tensor
    dlogprob: Tensor
    advantages: Tensor
    clipped: Tensor  # bool: where the derivative is 0 because a clip is in force
    importance: Tensor | None  # the detached importance weight of the rollout, where there is one


def policy_term(
    surrogate: Surrogate,
    adv: Tensor,  # (C,) advantages
    student: Tensor,  # (C,) log p of the sampled token
    old: Tensor | None,
    rollout: Tensor | None,
    sequence_mean: Callable[[Tensor], Tensor],  # (C,) -> (C,), for ratio="sequence"
) -> PolicyTerm:
    """-A rho w with rho = p / p_old and w the importance weight of the rollout, clipped as the surrogate says.

    clip         max(-A rho, -A clamp(rho, 1 - low, 1 + high))
    clip_dual    at most -A clip_dual where A < 0 (Ye et al. 2020)
    sequence     rho_t = s exp(log p_t - sg log p_t) with s = exp(mean over the sequence of log p - log p_old)
                 detached (GSPO-token, Zheng et al. 2025); the clips see s
    w            min(exp(log p_old - log p_rollout), rollout_is_cap), detached
    """
    behaviour = student if old is None else old
    log_ratio = torch.zeros_like(student) if old is None else student - old
    ruled_out = torch.isneginf(student)
    if surrogate.ratio == "sequence":
        # a token that a policy rules out would make its whole sequence's ratio 0, inf or NaN
        log_ratio = sequence_mean(log_ratio.masked_fill(ruled_out | torch.isneginf(behaviour), 0))
    ratio = log_ratio.exp()
    loss = -adv * ratio
    clipped = torch.zeros_like(ruled_out)
    if surrogate.clip is not None:
        low, high = surrogate.clip
        bounded = -adv * ratio.clamp(1.0 - low, 1.0 + high)
        # the clipped branch is flat where it is the larger one; on a tie (inside the range) the branches coincide
        clipped = bounded > loss
        loss = torch.maximum(loss, bounded)
    if surrogate.clip_dual is not None:
        bound = -adv * surrogate.clip_dual
        over = (adv < 0) & (loss > bound)
        clipped = clipped | over
        loss = torch.where(over, bound, loss)
    importance = None
    if rollout is not None:
        importance = (behaviour - rollout).masked_fill(torch.isneginf(behaviour), 0).exp()
        if surrogate.rollout_is_cap is not None:
            importance = importance.clamp_max(surrogate.rollout_is_cap)
        loss = loss * importance
    # A = 0 is no loss, whatever it is multiplied by: a ratio that overflows would make it NaN
    nothing = adv == 0
    loss = loss.masked_fill(nothing, 0)
    # d(-A rho w)/d log p = -A rho w, whichever ratio it is; log p = -inf has no derivative to follow
    return PolicyTerm(loss, loss.masked_fill(clipped | ruled_out, 0), adv, clipped & ~nothing, importance)


# ------------------------------------------------------------------------------------------------- supervised term


def supervised(label_logprobs: Tensor, labels: Tensor) -> Tensor:
    """(C,) bool, where there is a label inside the support: elsewhere the supervised term is 0."""
    return (labels >= 0) & ~torch.isneginf(label_logprobs)


def label_report(label_logprobs: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Log-probs of the labels, 0 where there is none, and where the supervised term is in force; None without any."""
    if labels is None:
        return None, None
    return label_logprobs.masked_fill(labels < 0, 0), supervised(label_logprobs, labels)


# -------------------------------------------------------------------------------------------- from row statistics


def token_logprob(logit: Tensor, logsum: Tensor) -> Tensor:
    """log-prob of the sampled token from its logit and the normaliser, both relative to the row's maximum.

    Never positive; -inf outside the support, NaN in a poisoned row.
    """
    return torch.where(torch.isneginf(logsum), logsum, logit - logsum)


def entropy(statistics: Tensor) -> Tensor:
    """Entropy in nats; 0 for a row without support. Rounding cannot make it negative."""
    logsum = statistics[Stat.LOGSUM_STUDENT]
    value = (logsum - statistics[Stat.MEAN_LOGIT]).clamp_min(0)
    return torch.where(torch.isneginf(logsum), torch.zeros_like(value), value)


def merge(
    parts: Tensor,
    reward_scale: float | Tensor = 1.0,
    has: tuple[bool, bool] = (False, False),
    divergence: Divergence | None = None,
) -> Tensor:
    """Statistics (len(Stat), C) of a vocabulary from those of its parts, (parts, len(Stat), C).

    Maxima by max, log-sums at the common maximum, means by their weights and moved by how far the part's maxima were
    from the common ones; a token's logit is -inf in the parts that do not have it. ``has`` says whether teacher and
    reference were looked at with the student, over one support.

    The two parts of ``jsd`` need log-sums of the whole first: they are left 0.
    """
    # wider than what is merged: the parts have been rounded once, and the whole is not to be rounded twice more
    dtype, parts = parts.dtype, parts.to(widest(parts.device))
    reward_scale = reward_scale.to(parts.dtype) if isinstance(reward_scale, Tensor) else reward_scale
    out = torch.zeros_like(parts[0])
    empty = torch.isneginf(parts[:, Stat.LOGSUM_STUDENT])  # the maximum of an empty part is 0 and does not count

    def model(maximum: Stat, logsum: Stat, logit: Stat, cancelled_at: float | None = None) -> Tensor:
        top = parts[:, maximum].masked_fill(empty, -math.inf).amax(0)
        top = top.masked_fill(torch.isneginf(top), 0)
        shift = (parts[:, maximum] - top).masked_fill(empty, 0)
        values = (
            top,
            _logsum(parts[:, logsum].masked_fill(empty, -math.inf) + shift),
            (parts[:, logit] + shift).amax(0),
        )
        for stat, value in zip((maximum, logsum, logit), values, strict=True):
            if cancelled_at is not None and isinstance(reward_scale, Tensor):
                value = value.masked_fill(reward_scale == cancelled_at, 0)
            out[stat] = value
        return shift

    def mean(values: Tensor, weights: Tensor) -> Tensor:
        return torch.where(weights == 0, 0, weights * values).sum(0)

    shift = model(Stat.MAX_STUDENT, Stat.LOGSUM_STUDENT, Stat.LOGIT_STUDENT)
    p = (parts[:, Stat.LOGSUM_STUDENT] + shift - out[Stat.LOGSUM_STUDENT]).exp().masked_fill(empty, 0)
    out[Stat.MEAN_LOGIT] = mean(parts[:, Stat.MEAN_LOGIT] + shift, p)
    if any(has):
        shift_q, shift_r = (
            model(*stats) if there else None
            for there, stats in (
                (has[0], (Stat.MAX_TEACHER, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER, 0.0)),
                (has[1], (Stat.MAX_REF, Stat.LOGSUM_REF, Stat.LOGIT_REF, 1.0)),
            )
        )
        shift_u = mix(reward_scale, shift_q, shift_r)
        origin = bounded(parts[:, Stat.ORIGIN_TARGET] + shift_u, dtype)
        logsum_u = parts[:, _target(has)].masked_fill(empty, -math.inf) + origin
        whole = _logsum(logsum_u)
        out[Stat.ORIGIN_TARGET] = origin_of(whole.to(dtype))
        out[Stat.LOGSUM_TARGET] = whole - out[Stat.ORIGIN_TARGET]
        out[Stat.MEAN_GAP] = mean(parts[:, Stat.MEAN_GAP] + (shift - shift_u), p)
        if divergence == "forward_kl":
            t = (logsum_u - whole).exp().masked_fill(empty, 0)
            moved = (origin - out[Stat.ORIGIN_TARGET]) - shift
            out[Stat.TARGET_PART] = mean(parts[:, Stat.TARGET_PART] + moved, t)
        for stat in (Stat.MEAN_GAP, Stat.TARGET_PART):
            out[stat] = bounded(out[stat], dtype)
    return out.to(dtype)


def merged_statistics(has: tuple[bool, bool], divergence: Divergence | None, tokens: bool) -> list[Stat]:
    """What :func:`merge` reads of a part; ``tokens`` says whether there are sampled tokens."""
    models = [(Stat.MAX_STUDENT, Stat.LOGSUM_STUDENT, Stat.LOGIT_STUDENT)]
    models += [(Stat.MAX_TEACHER, Stat.LOGSUM_TEACHER, Stat.LOGIT_TEACHER)] if has[0] else []
    models += [(Stat.MAX_REF, Stat.LOGSUM_REF, Stat.LOGIT_REF)] if has[1] else []
    stats = [stat for model in models for stat in (model if tokens else model[:2])] + [Stat.MEAN_LOGIT]
    stats += [Stat.MEAN_GAP] if any(has) else []
    stats += [Stat.LOGSUM_TARGET, Stat.ORIGIN_TARGET] if all(has) else []
    return stats + ([Stat.TARGET_PART] if divergence == "forward_kl" else [])


def _target(has: tuple[bool, bool]) -> Stat:
    """Where the log-sum of u stands: with one frozen model u is its logits."""
    return Stat.LOGSUM_TARGET if all(has) else Stat.LOGSUM_TEACHER if has[0] else Stat.LOGSUM_REF


def _logsum(x: Tensor) -> Tensor:
    """log sum exp over dim 0, to the last digit also where the largest outweighs all others; -inf where there is none.

    Always in the same order, NaN where any is NaN.
    """
    largest, where = x.max(0, keepdim=True)
    rest = (x - largest).exp().scatter(0, where, 0).sum(0)
    nothing = torch.isneginf(largest[0])
    return torch.where(nothing, largest[0], largest[0] + torch.log1p(rest))


def divergence_value(
    divergence: Divergence, beta: float, reward_scale: float | Tensor, statistics: Tensor, has: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Token loss of the ``full`` estimator and KL(p || target), both (C,); 0 for a row without support.

    ``has`` says whether teacher and reference are in the statistics.
    """
    logsum_p, logsum_u, gap = (statistics[s] for s in (Stat.LOGSUM_STUDENT, Stat.LOGSUM_TARGET, Stat.MEAN_GAP))
    kl = bounded((gap + statistics[Stat.ORIGIN_TARGET]) + (logsum_u - logsum_p)).clamp_min(0)
    if divergence == "reverse_kl":
        teacher = statistics[Stat.LOGSUM_TEACHER] if has[0] else None
        ref = statistics[Stat.LOGSUM_REF] if has[1] else None
        value = gap + (mix(reward_scale, teacher, ref) - logsum_p)
    elif divergence == "forward_kl":
        value = (statistics[Stat.TARGET_PART] + (logsum_p - logsum_u)).clamp_min(0)
    else:
        value = (beta * statistics[Stat.TARGET_PART] + (1.0 - beta) * statistics[Stat.STUDENT_PART]).clamp_min(0)
    empty = torch.isneginf(logsum_p)
    zero = torch.zeros_like(value)
    return torch.where(empty, zero, value), torch.where(empty, zero, kl)


def to_mixture(ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(t / m) of m = beta t + (1 - beta) p, from ratio = log(t / p); both 0 where that is 0.

    For beta <= 1/2 (else with p and t exchanged), with the branch at beta t = (1 - beta) p:

        log(m / p) = log1p(beta expm1(ratio))              below it
        log(m / t) = log(beta + (1 - beta) exp(-ratio))    above it

    and the other one is that +- ratio. Below the branch the error is small beside beta, not only beside 1: near the
    ends of beta the JSD and its gradient are as small as that.
    """
    if beta > 0.5:
        target, student = to_mixture(-ratio, 1.0 - beta)
        return student, target
    least = torch.finfo(ratio.dtype).tiny
    beta = max(beta, least)
    # the exponential stays in the range of float32
    turn = min(math.log((1.0 - beta) / beta), 80.0)
    below = ratio <= turn
    log_m_p = torch.log1p(beta * torch.expm1(ratio.clamp_max(turn)))
    log_m_t = torch.log(beta + (1.0 - beta) * torch.exp(-ratio.clamp_min(turn)))
    return -torch.where(below, log_m_p, ratio + log_m_t), torch.where(below, ratio - log_m_p, -log_m_t)


# ------------------------------------------------------------------------------------------------------- reductions


def token_weights(
    reduction: Reduction,
    mask: Tensor | None,  # token shape, bool; None is all live
    sequences: Sequences,
    normalizer: Tensor | float | None,
    sequence_lengths: Tensor | None,  # (B,) or ()
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """w with loss = sum w * token_loss: a scalar where all live tokens weigh the same, else of the token shape.

    A sequence without a live token is left out of sequence means.
    """
    one = torch.ones((), dtype=dtype, device=device)
    if reduction in ("sum", "none"):
        return one
    # Python numbers divide as they are: a tensor made of one would be copied to the device, which waits for it
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device, dtype).reshape(())
    if reduction == "token-mean":
        if normalizer is None:
            normalizer = max(1, sequences.shape.numel()) if mask is None else mask.sum().clamp_min(1)
        return one / normalizer
    live = torch.ones(sequences.shape, dtype=torch.bool, device=device) if mask is None else mask
    lengths = sequences.sum(live)
    if normalizer is None:
        normalizer = (lengths > 0).sum().clamp_min(1)
    weight = one / normalizer
    if reduction == "seq-mean-token-sum":
        return weight
    if sequence_lengths is not None:
        lengths = sequence_lengths.expand(sequences.count)
    return sequences.expand(weight / lengths.to(dtype).clamp_min(1))
