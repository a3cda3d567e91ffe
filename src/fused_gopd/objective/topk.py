"""The topk estimator per token: a divergence over K tokens and the rest of the vocabulary. No vocabulary axis here.

Values, and gradients with respect to the student's logits: one number for each of the K tokens, and a factor of p for
all others. Both are formed directly, each from terms of its own size: as sums of derivatives with respect to log p they
would be differences of numbers as large as 1 over the lightest mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Support, Tail
from .divergences import Divergence, Outcomes
from .target import any_impossible, bounded, mix, origin_of


@dataclass(frozen=True)
class Truncation:
    """Which tokens of a position the estimator looks at, and what it makes of the others' mass."""

    k: int | None = None  # how many, where a head is asked for its largest
    support: Support = "teacher"
    tail: Tail = "bucket"


DEFAULT = Truncation()

# A tail lighter than this is left out: where it is 1 minus a sum, in float32, it has an error of 1e-7, and it enters as
# a logarithm.
LIGHTEST_TAIL = 1e-6


@dataclass(frozen=True)
class OnSupport:
    """One model on the tokens of S."""

    logprobs: Tensor  # (C, K), -inf where there is no token or the model rules it out
    rest: Tensor | None  # (C,) log of the mass outside S; None is 1 less the mass on S, to the precision of a sum

    def log_rest(self, inside: Tensor) -> Tensor:
        """(C, 1) log of the mass outside S, and of what is listed in S but has left it."""
        if self.rest is None:
            mass = self.logprobs.masked_fill(~inside, -math.inf).logsumexp(1, keepdim=True)
            return (-torch.expm1(mass)).clamp_min(0).log()
        gone = self.logprobs.masked_fill(inside, -math.inf)
        return torch.cat((self.rest[:, None], gone), 1).logsumexp(1, keepdim=True)


class Entries(NamedTuple):
    """A gradient with respect to logits: a factor of p, and the tokens at which it is something else."""

    token_ids: Tensor  # (C, K) int64, -1 is none; only the last may repeat another, and has the same value then
    values: Tensor  # (C, K) gradient at these tokens
    weight: Tensor  # (C,) factor of p everywhere else
    reach: Tensor  # (C,) at least |weight| p there

    def with_label(self, probabilities: Tensor, label: Tensor, weight: Tensor, label_probability: Tensor) -> Entries:
        """And that of -weight log p[label]; ``probabilities`` (C, K) are p of the tokens, label is -1 where none is."""
        w = weight[:, None]
        hit = (self.token_ids == label[:, None]) & (label >= 0)[:, None]
        values = self.values + w * probabilities - torch.where(hit, w, 0)
        total = self.weight + weight
        own = torch.where(hit, values, 0).sum(1)
        own = torch.where(hit.any(1), own, self.weight * label_probability + weight * (label_probability - 1))
        return Entries(
            torch.cat((self.token_ids, label[:, None]), 1),
            torch.cat((values, own[:, None]), 1),
            total,
            self.reach + weight,
        )


class Term(NamedTuple):
    """Of the token losses."""

    loss: Tensor  # (C,)
    kl: Tensor  # (C,) KL(p || target) over the outcomes that there are, p over its mass on them
    entries: Entries


class _Outcomes(NamedTuple):
    """The outcomes of a position: the tokens of S and, but for ``renormalize``, the bucket as the last column."""

    inside: Tensor  # (C, K or K + 1) bool, those that there are
    bucket: Tensor  # (C, 1) bool, whether the bucket is there
    log_p: Tensor  # (C, K or K + 1), 0 where there is no outcome
    mixed: Tensor  # lambda log q + (1 - lambda) log r, likewise
    log_rest: Tensor  # (C, 1) log of the student's mass outside S
    poisoned: Tensor  # (C,) bool: NaN in a model that counts, wherever it is


def _outcomes(
    tail: Tail, scale: float | Tensor, student: OnSupport, teacher: OnSupport | None, ref: OnSupport | None
) -> _Outcomes:
    inside = ~(
        torch.isneginf(student.logprobs)
        | any_impossible(scale, *(None if x is None else x.logprobs for x in (teacher, ref)))
    )
    bucket = torch.full_like(inside[:, :1], tail != "renormalize")
    poisoned = torch.zeros_like(bucket)
    models: list[Tensor | None] = []
    for model, cancelled_at in ((student, None), (teacher, 0.0), (ref, 1.0)):
        if model is None:
            models.append(None)
            continue
        rest = model.log_rest(inside)
        bad, light = torch.isnan(rest), rest < math.log(LIGHTEST_TAIL)  # NaN is not light: it shall be seen
        if cancelled_at is not None and isinstance(scale, Tensor):
            bad, light = bad & (scale != cancelled_at), light & (scale != cancelled_at)
        poisoned, bucket = poisoned | bad, bucket & ~light
        models.append(model.logprobs if tail == "renormalize" else torch.cat((model.logprobs, rest), 1))
    if tail != "renormalize":
        inside = torch.cat((inside, bucket), 1)

    def within(x: Tensor) -> Tensor:
        """0 where there is no outcome, before any arithmetic: there may be an infinity there."""
        if tail == "renormalize":
            x = x - _log_mass(x, inside)
        return x.masked_fill(~inside, 0)

    log_p, log_q, log_r = (None if x is None else within(x) for x in models)
    assert log_p is not None
    log_rest = student.log_rest(inside[:, : student.logprobs.shape[1]])
    return _Outcomes(inside, bucket, log_p, mix(scale, log_q, log_r), log_rest, poisoned[:, 0])


def _log_mass(x: Tensor, inside: Tensor) -> Tensor:
    """(C, 1) log of the sum; 0 where that is rounding alone, so that normalising leaves equal models equal."""
    mass = x.masked_fill(~inside, -math.inf).logsumexp(1, keepdim=True)
    return mass.masked_fill(mass.abs() <= 16 * torch.finfo(x.dtype).eps, 0)


def term(
    tail: Tail,
    divergence: Divergence,
    reward_scale: float | Tensor,
    token_ids: Tensor,  # (C, K) int64, -1 is none
    student: OnSupport,
    teacher: OnSupport | None,  # None where it has cancelled
    ref: OnSupport | None,
) -> Term:
    """A divergence over the tokens of S, one outcome each, and the rest of the vocabulary.

    A token that a model which counts gives probability 0 leaves S. With masses P_S = sum over S of p, and so on:

    bucket       one more outcome of mass 1 - P_S, 1 - Q_S, 1 - R_S. It leaves where any of them is below 1e-6
    drop         the same target, the bucket's term left out of the sums
    renormalize  p / P_S, q / Q_S, r / R_S in place of p, q, r

    The target t is q^lambda r^(1 - lambda), normalised over the outcomes. With h~ and h0 of the divergence (see
    ``divergences``), P the sum of p and A that of p h~ over what is summed, the gradient is

        in S             p (h~ - A + h0 (1 - P))
        outside S        p (h~_b - A) with the bucket's h~_b; p (-A - h0 P) where the bucket is not summed;
                         0 for renormalize
    """
    scale = reward_scale[:, None] if isinstance(reward_scale, Tensor) else reward_scale
    x = _outcomes(tail, scale, student, teacher, ref)
    count = token_ids.shape[1]
    log_t = x.mixed - origin_of(x.mixed.masked_fill(~x.inside, -math.inf).amax(1, keepdim=True))
    log_t = bounded(log_t - _log_mass(log_t, x.inside)).masked_fill(~x.inside, 0)
    outcomes = Outcomes(x.log_p, log_t, x.mixed)
    summed = x.inside
    if tail == "drop":
        summed = torch.cat((x.inside[:, :count], torch.zeros_like(x.bucket)), 1)

    def total(terms: Tensor) -> Tensor:
        return torch.where(summed, terms, 0).sum(1, keepdim=True)

    p = torch.where(x.inside, x.log_p.exp(), 0)
    mass_outside = x.log_rest.exp()
    missing = mass_outside  # 1 - P
    if tail == "renormalize":
        missing = torch.zeros_like(missing)
    elif tail == "bucket":
        missing = missing.masked_fill(x.bucket, 0)
    h0 = divergence.h0
    if tail == "drop" and not isinstance(h0, Tensor) and h0 < 0:
        # from p h itself: beside p h~ and p a small product would lose its digits
        weighted, h0 = divergence.uncentred(outcomes), 0.0
    else:
        weighted = divergence.weighted(outcomes)
    weighted = torch.where(x.inside, weighted, 0)
    loss, A = total(divergence.terms(outcomes)), total(weighted)
    values = bounded(weighted - p * (A - h0 * missing))
    weight = -A - h0 * (1 - missing)
    if tail == "bucket":
        weight = torch.where(x.bucket, bounded(weighted[:, count:] / p[:, count:] - A), weight)
    elif tail == "renormalize":
        weight = torch.zeros_like(loss)
    if divergence.normalised and tail != "drop":
        # with h0 <= 0 the value is not negative where a part of p is missing either
        loss = torch.where((missing == 0) | (h0 <= 0), loss.clamp_min(0), loss)
    # a model that rules everything out leaves no outcome at all, and so no gradient
    weight = weight.masked_fill(~x.inside.any(1, keepdim=True), 0)
    # outcomes that there are, as one distribution: where the bucket has left they are not
    mass = _log_mass(x.log_p, x.inside)
    kl = torch.where(x.inside, (x.log_p - mass).exp() * (x.log_p - mass - log_t), 0).sum(1).clamp_min(0)
    weight = weight[:, 0].masked_fill(x.poisoned, math.nan)
    # a listed token that has left S is one of the others
    others = weight[:, None] * student.logprobs.exp()
    values = torch.where(x.inside[:, :count], values[:, :count], others).masked_fill(x.poisoned[:, None], math.nan)
    entries = Entries(token_ids, values, weight, weight.abs() * mass_outside[:, 0])
    loss, kl = (y.masked_fill(x.poisoned, math.nan) for y in (loss[:, 0], kl))
    return Term(loss, kl, entries)
