"""A divergence over the tokens of a support and the rest of the vocabulary."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..objective.combination import combine
from ..objective.divergences import Outcomes
from ..objective.target import bounded, mix
from ..problem import FlatComposite, Problem
from ..rowops import FROZEN
from .models import (
    composite_logprobs,
    logits,
    logprobs_at,
    of_tokens,
    own_log_softmax,
    reward_scale_of,
    route_logprobs,
)


class _Parts(NamedTuple):
    """The models that teachers or references are made of; one alone is a sum of one."""

    logprobs: list[Tensor]  # (n, K) each
    weights: list[Tensor]  # (n, 1) each, 0 where a token has fewer models
    mixture: Tensor  # (n, 1) bool

    def total(self, logprobs: list[Tensor]) -> Tensor:
        """(n, ...) from values of each model."""
        logs, probabilities = (combine(logprobs, self.weights, mixture) for mixture in (False, True))
        return probabilities.where(self.mixture, logs)

    def all_of(self, each: list[Tensor]) -> Tensor:
        """(n, 1) bool: whether one model of a sum of log-probs is so, all models of a mixture are."""
        counted = [(x, weight != 0) for x, weight in zip(each, self.weights, strict=True)]
        one = torch.stack([x & counts for x, counts in counted]).any(0)
        return torch.stack([x | ~counts for x, counts in counted]).all(0).where(self.mixture, one)


class _OnSupport(NamedTuple):
    """Teacher and reference on the tokens of topk."""

    token_ids: Tensor  # (n, K), -1 where there are fewer
    teacher: Tensor | None  # (n, K) log-probs there
    ref: Tensor | None
    has_nan: Tensor  # (n,) bool, NaN anywhere in a model that counts
    parts: tuple[_Parts | None, _Parts | None]  # of teacher and ref, where any is made of several models

    def bounded(self, lowest: float | None) -> list[Tensor | None]:
        """log-probs of teacher and reference, at least ``lowest`` where there is a token."""
        models = [self.teacher, self.ref]
        if lowest is None:
            return models
        none = self.token_ids < 0
        return [None if x is None else x.clamp_min(lowest).masked_fill(none, -math.inf) for x in models]


def _parts(p: Problem, name: str, ids: Tensor, given: Tensor | None) -> _Parts | None:
    """The models that a route's teacher or reference is made of, on the tokens of topk; ``given`` is that of others."""
    if given is None or not p.has_composite:
        return None
    routes = [(getattr(route, name), slice(route.start, route.stop)) for route in p.routes]
    count = max([len(model.heads) if isinstance(model, FlatComposite) else 1 for model, _ in routes])
    logprobs, weights = (torch.full_like(given, -math.inf).repeat(count, 1, 1) for _ in range(2))
    weights, mixture = torch.zeros_like(weights[:, :, :1]), torch.zeros_like(given[:, :1], dtype=torch.bool)
    for model, tokens in routes:
        if not isinstance(model, FlatComposite):
            logprobs[0, tokens], weights[0, tokens] = given[tokens], 1
            continue
        mixture[tokens] = model.mixture
        for i, (head, weight) in enumerate(zip(model.heads, model.weights_of(tokens), strict=True)):
            assert head is not None
            own = own_log_softmax(logits(p, head, tokens.start, tokens.stop))
            logprobs[i, tokens] = logprobs_at(of_tokens(head, own), ids[tokens])
            weights[i, tokens] = weight[:, None] if isinstance(weight, Tensor) else weight
    return _Parts(list(logprobs), list(weights), mixture)


def on_support(p: Problem, log_p: Tensor) -> _OnSupport:
    k, tail = p.options.k or 0, p.options.tail

    def largest(log_m: Tensor, tokens: slice, vocab_map: Tensor | None = None) -> Tensor:
        """(n, k) ids; -1 where a model has fewer tokens, by its vocab_map."""
        none = None if vocab_map is None else vocab_map[: log_m.shape[1]] < 0
        if none is not None:  # a token with a row comes first, whatever its log-prob
            log_m = log_m.clamp_min(torch.finfo(log_m.dtype).min).masked_fill(none, -math.inf)
        ids = log_m.topk(k).indices
        ids = ids if none is None else ids.masked_fill(none[ids], -1)
        if tail != "sampled":
            return ids
        assert p.token_ids is not None
        y = p.token_ids[tokens, None]
        return torch.cat((torch.where((ids == y).any(1, keepdim=True), -1, y), ids), 1)

    parts: list[tuple[Tensor, list[Tensor | None]]] = []
    has_nan = torch.isnan(log_p).any(1)
    for route in p.routes:
        tokens = slice(route.start, route.stop)
        ids = p.support_ids[tokens] if p.options.k is None and p.support_ids is not None else None
        if p.options.support == "student":
            ids = largest(log_p[tokens], tokens)
        scores: list[Tensor | None] = []
        for (name, cancelled_at), given in zip(FROZEN, (p.teacher_topk, p.ref_topk), strict=True):
            head = getattr(route, name)
            if head is not None:
                composite = isinstance(head, FlatComposite)
                log_m = (composite_logprobs if composite else route_logprobs)(p, head, route)
                ids = largest(log_m, tokens, None if composite else head.vocab_map) if ids is None else ids
                scores.append(logprobs_at(log_m, ids))
                counts = p.reward_scale[tokens] != cancelled_at if isinstance(p.reward_scale, Tensor) else True
                has_nan[tokens] |= torch.isnan(log_m).any(1) & counts
            elif given is not None:
                assert p.support_ids is not None
                ids = p.support_ids[tokens] if ids is None else ids
                scores.append(given[tokens].to(p.dtype).masked_fill(ids < 0, -math.inf))
            else:
                scores.append(None)
        assert ids is not None
        parts.append((ids, scores))
    width = max(ids.shape[1] for ids, _ in parts)

    def together(tensors: list[Tensor | None], missing: float) -> Tensor | None:
        wide = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=missing) for x in tensors if x is not None]
        return torch.cat(wide) if wide else None

    ids = together([ids for ids, _ in parts], -1)
    assert ids is not None
    teacher, ref = (together([scores[j] for _, scores in parts], -math.inf) for j in range(2))
    made_of = _parts(p, "teacher", ids, teacher), _parts(p, "ref", ids, ref)
    return _OnSupport(token_ids=ids, teacher=teacher, ref=ref, has_nan=has_nan, parts=made_of)


def sampled_tail_loss(p: Problem, lp: Tensor, support: _OnSupport) -> tuple[Tensor, Tensor]:
    """Token loss of ``tail="sampled"``: log-probs (n, 1 + K) are of the sampled token outside S and of the tokens of S.

    The value is sum w d with w = p in S and 1 outside, the gradient that of sum w d log p with w d constant.
    """
    lam, (lq, lr) = reward_scale_of(p), support.bounded(p.options.logprob_min)
    lam = lam[:, None] if isinstance(lam, Tensor) else lam
    outside = lp.detach() == -math.inf
    for x, (_, cancelled_at) in zip((lq, lr), FROZEN, strict=True):
        if x is not None:
            gone = x == -math.inf
            outside = outside | (gone & (lam != cancelled_at) if isinstance(lam, Tensor) else gone)
    inside = lp.masked_fill(outside, 0)
    with torch.no_grad():
        d = bounded(inside - mix(lam, *(None if x is None else x.masked_fill(outside, 0) for x in (lq, lr))))
        w = inside.exp()
        w[:, 0] = 1
        terms = (w * d).masked_fill(outside, 0)
        value = bounded(terms.sum(1))
    slope = (terms * inside).sum(1)
    return value + (slope - slope.detach()), torch.zeros_like(value)


def topk_loss(p: Problem, lp: Tensor, support: _OnSupport) -> tuple[Tensor, Tensor]:
    """Token loss and KL(p || target) over the tokens of the support, log-probs (n, K) each, and the bucket."""
    lam, (lq, lr) = reward_scale_of(p), support.bounded(p.options.logprob_min)
    lam = lam[:, None] if isinstance(lam, Tensor) else lam
    raw_lp = lp
    if p.options.student_logprob_min is not None:
        lp = lp.clamp_min(p.options.student_logprob_min).masked_fill(support.token_ids < 0, -math.inf)
    every = torch.ones_like(lp[:, :1], dtype=torch.bool)
    used = [(x, every & (lam != at)) for x, (_, at) in zip((lq, lr), FROZEN, strict=True) if x is not None]
    inside = lp.detach() != -math.inf
    for x, needed in used:
        inside = inside & ~((x == -math.inf) & needed)

    def with_bucket(x: Tensor, unbounded: Tensor | None = None, mixture: Tensor | None = None) -> Tensor:
        """log-probs of the tokens and of the bucket, or of the tokens over their mass; 0 where it is outside.

        A light bucket is outside, but for one model of a ``mixture`` (n, 1): the others may have a bucket.
        """
        listed, empty = x.masked_fill(~inside, 0), ~inside.any(1, keepdim=True)
        x = x.masked_fill(~inside, -math.inf)
        if p.options.tail == "renormalize":
            return (listed - x.masked_fill(empty, 0).logsumexp(1, keepdim=True)).masked_fill(~inside, 0)
        x = x if unbounded is None else unbounded.masked_fill(~inside, -math.inf)
        rest = 1 - x.exp().sum(1, keepdim=True)
        light = 1 if mixture is None else rest.clamp_min(0).where(mixture, 1)
        return torch.cat((listed, rest.where(~(rest.detach() < 1e-6), light).log()), 1)

    def of_model(x: Tensor | None, parts: _Parts | None, unbounded: Tensor | None) -> Tensor | None:
        if x is None or parts is None:
            return None if x is None else with_bucket(x, unbounded)
        own = parts.total([with_bucket(part, mixture=parts.mixture) for part in parts.logprobs])
        if p.options.tail == "renormalize":  # a mixture is a model as a whole, as is what has a lower bound
            return with_bucket(x).where(parts.mixture | (p.options.logprob_min is not None), own)
        return torch.cat((x.masked_fill(~inside, 0), own[:, -1:]), 1)

    def is_light(x: Tensor) -> Tensor:
        return 1 - x.masked_fill(~inside, -math.inf).exp().sum(1, keepdim=True) < 1e-6

    raw = support.teacher, support.ref
    log_p, log_q, log_r = (of_model(*x) for x in ((lp, None, raw_lp), *zip((lq, lr), support.parts, raw, strict=True)))
    assert log_p is not None
    as_they_are = [of_model(x, parts, None) for x, parts in zip(raw, support.parts, strict=True)]
    if p.options.tail != "renormalize":
        bucket = every & ~is_light(raw_lp.detach())
        for whole, parts, (_, at) in zip(raw, support.parts, FROZEN, strict=True):
            if whole is not None:
                light = is_light(whole) if parts is None else parts.all_of([is_light(part) for part in parts.logprobs])
                bucket = bucket & ~(light & (lam != at))
        inside = torch.cat((inside, bucket), 1)
    log_p, mixed = log_p.masked_fill(~inside, 0), mix(lam, log_q, log_r).masked_fill(~inside, 0)
    empty = ~inside.any(1, keepdim=True)

    def normalised(x: Tensor) -> Tensor:
        within = x.masked_fill(~inside, -math.inf).masked_fill(empty, 0)
        top = within.detach().amax(1, keepdim=True)
        return (x - top) - (within - top).logsumexp(1, keepdim=True)

    log_t = bounded(normalised(mixed))
    with torch.no_grad():  # the existing outcomes as one distribution
        whole = normalised(log_p)
        kl = torch.where(inside, whole.exp() * (whole - log_t), 0).sum(1)
    if p.options.tail == "drop" and p.options.logprob_min is not None:  # normalised as without the bound
        there = inside
        for own_logprobs, (_, at) in zip(as_they_are, FROZEN, strict=True):
            if own_logprobs is not None:
                there = there & ~((own_logprobs == -math.inf) & (every & (lam != at)))
        own = mix(lam, *(None if x is None else x.masked_fill(~there, 0) for x in as_they_are))
        mass = own.masked_fill(~there, -math.inf).logsumexp(1, keepdim=True)
        log_t = bounded(mixed - mass.masked_fill(mass == -math.inf, 0))
    counted = inside.clone()
    if p.options.tail == "drop":
        counted[:, -1] = False
    terms = p.divergence.terms(Outcomes(log_p, log_t, mixed))
    return torch.where(counted, terms, 0).sum(1), kl
