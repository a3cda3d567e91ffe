"""The topk estimator per token: a divergence over K tokens and the rest of the vocabulary. No vocabulary axis here.

Values, and gradients with respect to the student's logits: one number for each of the K tokens, and a factor of p for
all others. Both are formed directly, each from terms of its own size: as sums of derivatives with respect to log p they
would be differences of numbers as large as 1 over the lightest mass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..options import Tail
from ..rowops import FROZEN
from . import combination
from .divergences import Divergence, Outcomes
from .logit_gradient import LogitGradient
from .target import bounded, mix, origin_of, outside_support

# A tail with less mass than this is no outcome. Where it is 1 minus a float32 sum it has an error of 1e-7, and its
# logarithm enters.
LIGHTEST_TAIL = 1e-6
_LIGHTEST = math.log(LIGHTEST_TAIL)


@dataclass(frozen=True)
class OnSupport:
    """One model on the tokens of a support S."""

    logprobs: Tensor  # (C, K), -inf where there is no token or its probability is 0
    rest: Tensor | None  # (C,) log of the mass outside S; None: 1 minus the mass on S, to the precision of a sum
    unbounded: Tensor | None = None  # (C, K) log-probs without a lower bound, where there is one

    def log_rest(self, inside: Tensor) -> Tensor:
        """(C, 1) log of the mass outside S, the listed tokens that are not ``inside`` (C, K) included."""
        logprobs = self.logprobs if self.unbounded is None else self.unbounded
        if self.rest is None:
            mass = logprobs.masked_fill(~inside, -math.inf).logsumexp(1, keepdim=True)
            return (-torch.expm1(mass)).clamp_min(0).log()
        excluded = logprobs.masked_fill(inside, -math.inf)
        return torch.cat((self.rest[:, None], excluded), 1).logsumexp(1, keepdim=True)


@dataclass(frozen=True)
class CompositeOnSupport:
    """A model made of several on the tokens of a support S: the sum of their log-probs, or of their probabilities."""

    logprobs: Tensor  # (C, K)
    models: tuple[OnSupport, ...]
    weights: tuple[float | Tensor, ...]  # tensor: (C, 1)
    mixture: bool
    unbounded: Tensor | None = None  # (C, K) log-probs without a lower bound, where there is one

    @classmethod
    def of(cls, models: Sequence[OnSupport], weights: Sequence[float | Tensor], mixture: bool) -> CompositeOnSupport:
        """``weights`` that are tensors are (C,)."""
        columns = tuple([weight[:, None] if isinstance(weight, Tensor) else weight for weight in weights])
        logprobs = combination.combine([model.logprobs for model in models], columns, mixture)
        return cls(logprobs, tuple(models), columns, mixture)

    @property
    def rest(self) -> Tensor:
        """(C,) of the models' masses outside S."""
        rests = [model.rest[:, None] for model in self.models if model.rest is not None]
        return combination.combine(rests, self.weights, self.mixture)[:, 0]

    def log_rest(self, inside: Tensor) -> Tensor:
        """(C, 1) of the models' masses outside S, each a number as one of a token."""
        return combination.combine([model.log_rest(inside) for model in self.models], self.weights, self.mixture)

    def is_light(self, inside: Tensor) -> Tensor:
        """(C, 1) bool, whether a model that counts has too little mass outside S; of a mixture, whether all have."""
        light = [model.log_rest(inside) < _LIGHTEST for model in self.models]
        if self.mixture:
            return torch.stack([x | torch.as_tensor(w == 0) for x, w in zip(light, self.weights, strict=True)]).all(0)
        return torch.stack([x & torch.as_tensor(w != 0) for x, w in zip(light, self.weights, strict=True)]).any(0)

    def over_mass(self, inside: Tensor) -> Tensor:
        """log-probs over the mass inside S: of each model, or of all as a whole: a mixture, or with a lower bound."""
        if self.mixture or self.unbounded is not None:
            return _over_mass(self, inside)
        return combination.combine([_over_mass(model, inside) for model in self.models], self.weights, self.mixture)


Model = TypeVar("Model", bound=OnSupport | CompositeOnSupport)


def at_least(model: Model, lowest: float, token_ids: Tensor) -> Model:
    """The model with log-probs of at least ``lowest`` for the tokens (C, K) of S; its mass outside S is as it was."""
    logprobs = model.logprobs.clamp_min(lowest).masked_fill(token_ids < 0, -math.inf)
    return replace(model, logprobs=logprobs, unbounded=model.logprobs)


class Term(NamedTuple):
    """Values of the token losses and their logit gradient."""

    loss: Tensor  # (C,)
    kl: Tensor  # (C,) KL(p || target) over the existing outcomes, p divided by its mass on them
    gradient: LogitGradient


class _Outcomes(NamedTuple):
    """The outcomes of a position: the tokens of S and, but for ``renormalize``, the bucket as the last column."""

    inside: Tensor  # (C, K or K + 1) bool, the existing ones
    bucket: Tensor  # (C, 1) bool, whether the bucket exists
    log_p: Tensor  # (C, K or K + 1), 0 where there is no outcome
    mixed: Tensor  # lambda log q + (1 - lambda) log r, likewise
    unbounded: Tensor | None  # the same of log-probs without a lower bound, where ``drop`` has one; -inf for none
    log_rest: Tensor  # (C, 1) log of the student's mass outside S
    has_nan: Tensor  # (C,) bool: NaN anywhere in a model whose coefficient is not 0


def _outcomes(
    tail: Tail,
    scale: float | Tensor,
    student: OnSupport,
    teacher: OnSupport | CompositeOnSupport | None,
    ref: OnSupport | CompositeOnSupport | None,
) -> _Outcomes:
    inside = ~(
        torch.isneginf(student.logprobs)
        | outside_support(scale, *(None if x is None else x.logprobs for x in (teacher, ref)))
    )
    alone = ~inside.any(1, keepdim=True)  # the bucket is the only outcome: its log-prob is 0, not that of a rounded sum
    bucket = torch.full_like(inside[:, :1], tail != "renormalize")
    has_nan = torch.zeros_like(bucket)
    models: list[Tensor | None] = []
    rests: list[Tensor] = []  # the student's is the first
    keeps = tail == "drop" and any(x is not None and x.unbounded is not None for x in (teacher, ref))
    unbounded: list[Tensor | None] = []  # of teacher and reference
    frozen = zip((teacher, ref), (at for _, at in FROZEN), strict=True)
    for model, cancelled_at in ((student, None), *frozen):
        if model is None:
            models.append(None)
            unbounded.append(None)
            continue
        rest = model.log_rest(inside)
        bad = torch.isnan(rest)  # NaN is not light: it reaches the loss
        rest = rest.masked_fill(alone, 0)
        rests.append(rest)
        light = model.is_light(inside) if isinstance(model, CompositeOnSupport) else rest < _LIGHTEST
        if cancelled_at is not None and isinstance(scale, Tensor):
            bad, light = bad & (scale != cancelled_at), light & (scale != cancelled_at)
        has_nan, bucket = has_nan | bad, bucket & ~light
        if tail == "renormalize":
            models.append(
                model.over_mass(inside) if isinstance(model, CompositeOnSupport) else _over_mass(model, inside)
            )
        else:
            models.append(torch.cat((model.logprobs, rest), 1))
        if keeps and model is not student:
            own = model.logprobs if model.unbounded is None else model.unbounded
            unbounded.append(torch.cat((own, rest), 1))
    if tail != "renormalize":
        inside = torch.cat((inside, bucket), 1)

    def within(x: Tensor) -> Tensor:
        """0 where there is no outcome, before any arithmetic: the log-prob may be infinite there."""
        return x.masked_fill(~inside, 0)

    log_p, log_q, log_r = (None if x is None else within(x) for x in models)
    assert log_p is not None
    whole = None
    if keeps:
        gone = ~inside | outside_support(scale, *unbounded)
        whole = mix(scale, *(None if x is None else x.masked_fill(gone, 0) for x in unbounded))
        whole = whole.masked_fill(gone, -math.inf)
    return _Outcomes(
        inside=inside,
        bucket=bucket,
        log_p=log_p,
        mixed=mix(scale, log_q, log_r),
        unbounded=whole,
        log_rest=rests[0],
        has_nan=has_nan[:, 0],
    )


def _over_mass(model: OnSupport | CompositeOnSupport, inside: Tensor) -> Tensor:
    """log-probs over the mass inside S."""
    return model.logprobs - _log_mass(model.logprobs, inside)


def _log_mass(x: Tensor, inside: Tensor) -> Tensor:
    """(C, 1) log of the sum; 0 where it is only rounding, so that equal models stay equal when normalised."""
    mass = x.masked_fill(~inside, -math.inf).logsumexp(1, keepdim=True)
    return mass.masked_fill(mass.abs() <= 16 * torch.finfo(x.dtype).eps, 0)


def with_sampled(token_ids: Tensor, sampled: Tensor) -> Tensor:
    """Ids (C, 1 + K) of ``tail="sampled"``: the sampled token (C,), or -1 where it is in S, and those of S (C, K)."""
    listed = (token_ids == sampled[:, None]).any(1, keepdim=True)
    return torch.cat((sampled[:, None].masked_fill(listed, -1), token_ids), 1)


def sampled_term(
    reward_scale: float | Tensor,
    token_ids: Tensor,  # (C, 1 + K) of with_sampled
    *,
    student: OnSupport,
    teacher: OnSupport | CompositeOnSupport | None,  # None where it has cancelled
    ref: OnSupport | CompositeOnSupport | None,
) -> Term:
    """The reverse KL, exact on S, and by the score function where the sampled token y lies outside S.

    With d = log p - lambda log q - (1 - lambda) log r, log-probs of the whole vocabulary, and w_v = p_v in S, 1 at a y
    outside S, 0 elsewhere, all constants but log p:

        loss        sum_v w_v d_v
        gradient    sum_v w_v d_v dlog p_v/dz

    For y ~ p the means are those of ``full``: sum_v p_v d_v dlog p_v/dz is its gradient, as sum_v p_v dlog p_v = 0. No
    tokens of S are ``sampled``, all of them ``full``. A token of probability 0 under a model has d_v = 0 here.
    """
    scale = reward_scale[:, None] if isinstance(reward_scale, Tensor) else reward_scale
    log_q, log_r = (None if x is None else x.logprobs for x in (teacher, ref))
    outside = torch.isneginf(student.logprobs) | outside_support(scale, log_q, log_r)
    log_p, log_q, log_r = (None if x is None else x.masked_fill(outside, 0) for x in (student.logprobs, log_q, log_r))
    assert log_p is not None
    p = student.logprobs.exp()
    w = torch.cat((torch.ones_like(p[:, :1]), p[:, 1:]), 1).masked_fill(outside, 0)
    terms = w * bounded(log_p - mix(scale, log_q, log_r))
    loss = bounded(terms.sum(1))
    # NaN in a model that counts, which is in the mass outside S where it is in none of the tokens
    has_nan = torch.zeros_like(outside[:, 0])
    frozen = zip((teacher, ref), (at for _, at in FROZEN), strict=True)
    for model, cancelled_at in ((student, None), *frozen):
        if model is not None and model.rest is not None:
            bad = torch.isnan(model.rest)
            if cancelled_at is not None and isinstance(reward_scale, Tensor):
                bad = bad & (reward_scale != cancelled_at)
            has_nan = has_nan | bad
    loss = loss.masked_fill(has_nan, math.nan)
    assert student.rest is not None
    gradient = LogitGradient(
        weight=-loss,
        token_ids=token_ids,
        values=bounded(terms - p * loss[:, None]),
        max_abs_elsewhere=loss.abs() * student.rest.exp(),
    )
    return Term(loss, torch.zeros_like(loss), gradient)


def term(
    tail: Tail,
    divergence: Divergence,
    reward_scale: float | Tensor,
    token_ids: Tensor,  # (C, K) int64, -1 for none
    *,
    student: OnSupport,
    teacher: OnSupport | CompositeOnSupport | None,  # None where it has cancelled
    ref: OnSupport | CompositeOnSupport | None,
) -> Term:
    """A divergence over the tokens of S, one outcome each, and the rest of the vocabulary.

    A token of probability 0 under a model whose coefficient is not 0 is excluded from S. With masses P_S (the sum of p
    over S), Q_S and R_S:

    bucket       one more outcome of mass 1 - P_S, 1 - Q_S, 1 - R_S. It is no outcome where any of them is below 1e-6
    drop         the same target, the bucket's term left out of the sums
    renormalize  p / P_S, q / Q_S, r / R_S in place of p, q, r

    The target t is q^lambda r^(1 - lambda), normalised over the outcomes. With a lower bound of log q and log r its
    normaliser in ``drop`` is that of the log-probs without the bound: tokens above it keep their t. A log-prob of the
    student that its own bound has raised is a constant: that token is in the value, and in the gradient one of those
    outside S.

    With h~ and h0 of the divergence (see ``divergences``), P the sum of p and A that of p h~ over what is summed, the
    gradient is

        in S             p (h~ - A + h0 (1 - P))
        outside S        p (h~_b - A) with the bucket's h~_b; p (-A - h0 P) where the bucket is not summed;
                         0 for renormalize
    """
    if tail == "sampled":
        return sampled_term(reward_scale, token_ids, student=student, teacher=teacher, ref=ref)
    scale = reward_scale[:, None] if isinstance(reward_scale, Tensor) else reward_scale
    x = _outcomes(tail, scale, student, teacher, ref)
    count = token_ids.shape[1]
    if x.unbounded is None:
        log_t = x.mixed - origin_of(x.mixed.masked_fill(~x.inside, -math.inf).amax(1, keepdim=True))
        normaliser = _log_mass(log_t, x.inside)
    else:  # 0 where there is no outcome but for the bound
        none = torch.isneginf(x.unbounded).all(1, keepdim=True)
        origin = origin_of(x.unbounded.amax(1, keepdim=True).masked_fill(none, 0))
        log_t = x.mixed - origin
        normaliser = _log_mass(x.unbounded - origin, x.unbounded != -math.inf).masked_fill(none, 0)
    log_t = bounded(log_t - normaliser).masked_fill(~x.inside, 0)
    outcomes = Outcomes(x.log_p, log_t, x.mixed)
    summed = x.inside
    if tail == "drop":
        summed = torch.cat((x.inside[:, :count], torch.zeros_like(x.bucket)), 1)
    own_logprobs, active = student.logprobs, x.inside  # active: whose log-prob has a gradient
    if student.unbounded is not None:
        own_logprobs, raised = student.unbounded, student.unbounded < student.logprobs
        active = torch.cat((x.inside[:, :count] & ~raised, x.inside[:, count:]), 1)

    def total(terms: Tensor) -> Tensor:
        return torch.where(summed, terms, 0).sum(1, keepdim=True)

    p = torch.where(x.inside, x.log_p.exp(), 0)
    mass_outside = x.log_rest.exp()
    missing = mass_outside  # 1 - P
    if tail == "renormalize":
        missing = torch.zeros_like(missing)
    elif tail == "bucket":
        missing = missing.masked_fill(x.bucket, 0)
    if student.unbounded is not None:
        raised = (x.inside & ~active)[:, :count]
        missing = missing + torch.where(raised, own_logprobs.exp(), 0).sum(1, keepdim=True)
    h0 = divergence.h0
    if tail == "drop" and not isinstance(h0, Tensor) and h0 < 0:
        # from p h itself: as a difference of p h~ and p a small product would lose its digits
        weighted, h0 = divergence.uncentred(outcomes), 0.0
    else:
        weighted = divergence.weighted(outcomes)
    weighted = torch.where(active, weighted, 0)
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
    # no outcome at all: no gradient
    weight = weight.masked_fill(~x.inside.any(1, keepdim=True), 0)
    # the existing outcomes as one distribution: without the bucket they do not sum to 1
    mass = _log_mass(x.log_p, x.inside)
    if (
        x.unbounded is not None
    ):  # not from log_t: the normaliser without the bound may be so large that no digit is left
        own = x.mixed - origin_of(x.mixed.masked_fill(~x.inside, -math.inf).amax(1, keepdim=True))
        log_t = (own - _log_mass(own, x.inside)).masked_fill(~x.inside, 0)
    kl = torch.where(x.inside, (x.log_p - mass).exp() * (x.log_p - mass - log_t), 0).sum(1).clamp_min(0)
    weight = weight[:, 0].masked_fill(x.has_nan, math.nan)
    # a listed token that is excluded from S is one of the others
    others = weight[:, None] * own_logprobs.exp()
    values = torch.where(active[:, :count], values[:, :count], others).masked_fill(x.has_nan[:, None], math.nan)
    gradient = LogitGradient(
        weight=weight,
        token_ids=token_ids,
        values=values,
        max_abs_elsewhere=weight.abs() * mass_outside[:, 0],
    )
    loss, kl = (y.masked_fill(x.has_nan, math.nan) for y in (loss[:, 0], kl))
    return Term(loss, kl, gradient)
