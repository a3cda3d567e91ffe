"""Dense G-OPD in plain PyTorch: what the fused loss computes, written out, and the naive baseline.

Holds all [tokens, vocabulary] tensors and lets autograd differentiate. In float64 it is an oracle; in a model's own
dtype it is what a trainer does without this package: logits in that dtype, upcast, log-softmax.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import hints  # noqa: F401
from .heads import Head, LinearHead, TokenLogProbs
from .loop.estimators.token_stats import COMPUTED, computed_by
from .loop.gemm import without_autocast
from .models import named_models
from .nll import NLLCall, prepare_nll
from .objective.combination import combine
from .objective.divergences import OneRound, Outcomes, ReverseKL
from .objective.policy import advantage, advantages_of, rule_of
from .objective.rollout import importance, inside_trust_region
from .objective.supervised import label_report
from .objective.target import bounded, mix
from .objective.token_functions import call_function
from .options import LossCall
from .output import GOPDOutput
from .prepare import prepare
from .problem import FlatComposite, Problem, Route
from .report import output_of
from .rowops import FROZEN
from .rowops.torch import TorchRowOps
from .signatures import called_as
from .token_stats import TokenStats

__all__ = ["gopd_loss", "linear_nll"]


def logits_of(head: Head, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Transformed logits over the joint vocabulary, (..., V), in ``dtype``."""
    if isinstance(head, LinearHead):
        with without_autocast(head.hidden.device):
            z = (head.hidden @ head.weight[:vocab_size].to(head.hidden.dtype).T).to(dtype)
        if head.bias is not None:
            z = z + head.bias[:vocab_size].to(dtype)
    else:
        z = head.logits[..., :vocab_size].to(dtype)
    if head.logit_scale != 1.0:
        z = z * head.logit_scale
    if head.softcap is not None:
        outside = z == -math.inf
        # masked before and after tanh: its own gradient at -inf is fine, a later where's is not
        z = (head.softcap * torch.tanh(z.masked_fill(outside, 0) / head.softcap)).masked_fill(outside, -math.inf)
    return z / head.temperature if head.temperature != 1.0 else z


def _all_finite(*logits: Tensor | None) -> bool:
    """Whether no masking is needed. By sums: a baseline without -inf pays for no [tokens, V] mask."""
    return all(bool(torch.isfinite(z.detach().sum())) for z in logits if z is not None)


def _log_softmax(z: Tensor, support: Tensor | None) -> Tensor:
    """Over the support (None is everything); -inf outside it, and 0 gradients (not NaN) for a row without any."""
    if support is None:
        return z.log_softmax(-1)
    empty = ~support.any(-1, keepdim=True)
    # log_softmax would give the other tokens of a row with +inf the log-prob -inf: that row is NaN
    infinite = (support & (z == math.inf)).any(-1, keepdim=True)
    # added, not filled in: so that the gradient is NaN too
    nan_rows = torch.zeros_like(z[:, :1]).masked_fill(infinite, math.nan).detach()
    inside = z.masked_fill(~support, -math.inf).masked_fill(empty, 0) + nan_rows
    return inside.log_softmax(-1).masked_fill(empty, -math.inf)


def _own_log_softmax(z: Tensor) -> Tensor:
    """Of one model on its own, over its own support."""
    return _log_softmax(z, None if _all_finite(z) else z != -math.inf)


def _gather(logp: Tensor, ids: Tensor) -> Tensor:
    return logp.gather(-1, ids[:, None])[:, 0]


def _logits(p: Problem, head: Head, start: int, stop: int) -> Tensor:
    """(stop - start, V) logits of live tokens."""
    flat = logits_of(head, p.vocab_size, p.dtype).reshape(-1, p.vocab_size)
    return flat[start:stop] if p.rows.index is None else flat.index_select(0, p.rows.index[start:stop])


def _route_logits(p: Problem, head: Head, route: Route) -> Tensor:
    """(n, V) logits of a route's tokens under one of its models."""
    return _logits(p, head, route.start, route.stop)


def _route_logprobs(p: Problem, head: Head, route: Route) -> Tensor:
    """Likewise log-probs, each model normalised over its own support."""
    return _own_log_softmax(_route_logits(p, head, route))


def _frozen_logits(p: Problem, name: str) -> Tensor | None:
    """(n, V) logits of the teachers or references, each token under that of its route; None where there is none."""
    heads = [(getattr(route, name), route) for route in p.routes]
    if any(head is None for head, _ in heads):
        return None
    parts = []
    for head, route in heads:
        composite = isinstance(head, FlatComposite)
        parts.append((_composite_logprobs if composite else _route_logits)(p, head, route))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _composite_logprobs(p: Problem, model: FlatComposite, route: Route) -> Tensor:
    """(stop - start, V) log-probs of a route's model that is made of several, not normalised."""
    logprobs = [_route_logprobs(p, x, route) for x in model.heads if x is not None]
    weights = [w[:, None] if isinstance(w, Tensor) else w for w in model.weights_of(slice(route.start, route.stop))]
    return combine(logprobs, weights, model.mixture)


def _composite_scores(p: Problem, model: FlatComposite, route: Route) -> Tensor:
    """log-probs of a route's sampled tokens under its model that is made of several."""
    tokens, own = slice(route.start, route.stop), []
    assert p.token_ids is not None
    for head, given in zip(model.heads, model.logprobs, strict=True):
        if head is not None:
            log_p = _route_logprobs(p, head, route)
            own.append(_gather(log_p, p.token_ids[tokens]))
        elif given is not None:
            own.append(given[tokens])
    return combine(own, model.weights_of(tokens), model.mixture)


def _is_composite(p: Problem, name: str, like: Tensor) -> Tensor | None:
    """(n, 1) bool, the tokens whose model is made of several; None where there is none."""
    if not p.has_composite:
        return None
    out = torch.zeros_like(like[:, :1], dtype=torch.bool)
    for route in p.routes:
        out[route.start : route.stop] = isinstance(getattr(route, name), FlatComposite)
    return out


def _frozen_scores(p: Problem, name: str) -> tuple[Tensor | None, Tensor | None]:
    """log-probs (n,) of the sampled tokens and entropies, under the model of each route alone; None where unknown."""
    if p.token_ids is None:
        return None, None
    given = p.teacher_logprobs if name == "teacher" else p.ref_logprobs
    scores, entropies = [], []
    for route in p.routes:
        head, tokens = getattr(route, name), slice(route.start, route.stop)
        if isinstance(head, FlatComposite):
            scores.append(_composite_scores(p, head, route))
        elif head is not None:
            log_p = _route_logprobs(p, head, route)
            scores.append(_gather(log_p, p.token_ids[tokens]))
            entropies.append(_entropy(log_p))
        elif given is not None:
            scores.append(given[route.start : route.stop])
        else:
            return None, None
    return torch.cat(scores), torch.cat(entropies) if len(entropies) == len(scores) else None


def _cancelled_scores(p: Problem, model: object, route: Route) -> Tensor:
    """log-probs of a route's sampled tokens under a model that lambda cancels."""
    if isinstance(model, FlatComposite):
        return _composite_scores(p, model, route)
    if isinstance(model, TokenLogProbs):
        return p.rows.take(model.logprobs, route.start, route.stop).to(p.dtype)
    assert p.token_ids is not None
    log_p = _route_logprobs(p, model, route)  # type: ignore[arg-type]
    return _gather(log_p, p.token_ids[route.start : route.stop])


def _full(
    p: Problem, z: Tensor, z_q: Tensor | None, z_r: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Token loss, KL(p || target) and the three log-distributions, over the joint support."""
    lam, divergence = _scale(p), p.divergence
    column = lam[:, None] if isinstance(lam, Tensor) else lam
    support: Tensor | None = None
    if not _all_finite(z, z_q, z_r):
        support = z != -math.inf
        for other, (_, cancelled_at) in zip((z_q, z_r), FROZEN, strict=True):
            if other is not None:
                outside = other == -math.inf
                support = support & ~(outside & (column != cancelled_at) if isinstance(column, Tensor) else outside)

    def other_logp(other: Tensor | None, name: str, cancelled_at: float) -> Tensor | None:
        if other is None:
            return None
        if isinstance(column, Tensor) and support is not None:
            other = other.masked_fill(column == cancelled_at, 0)
        logp, composite = _log_softmax(other, support), _is_composite(p, name, other)
        if composite is None:
            return logp
        return logp.where(~composite, other if support is None else other.masked_fill(~support, -math.inf))

    def inside(x: Tensor) -> Tensor:
        """0 outside the support, before any arithmetic that would make a NaN there."""
        return x if support is None else x.masked_fill(~support, 0)

    log_p = _log_softmax(z, support)
    log_q, log_r = (other_logp(x, name, at) for x, (name, at) in zip((z_q, z_r), FROZEN, strict=True))
    mixed = mix(column, *(None if x is None else inside(x) for x in (log_q, log_r)))
    lowest, highest = torch.finfo(mixed.dtype).min, torch.finfo(mixed.dtype).max
    # log_softmax takes it relative to its maximum, and may leave the finite range
    log_p_in, log_t = inside(log_p), inside(_log_softmax(mixed, support).clamp_(min=lowest))
    prob = inside(log_p_in.exp())
    with torch.no_grad():  # reported only: autograd would keep its [tokens, V] terms
        kl = (prob * (log_p_in - log_t)).sum(-1)

    def reverse_kl() -> Tensor:
        gap = log_p_in - mixed
        # where the student has a mask as well it may be infinite, times a probability of 0; by a sum, as in _all_finite
        return (prob * (gap if bool(torch.isfinite(gap.detach().sum())) else gap.clamp(lowest, highest))).sum(-1)

    def forward_kl() -> Tensor:
        return (inside(log_t.exp()) * (log_t - log_p_in)).sum(-1)

    if isinstance(divergence, OneRound):
        value = divergence.blend(forward_kl, reverse_kl)
    else:
        value = inside(divergence.terms(Outcomes(log_p_in, log_t, mixed))).sum(-1)
    return value, kl, log_p, log_q, log_r


def _at(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of some tokens, -inf where the id is -1."""
    return log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -math.inf)


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
            own = _own_log_softmax(_logits(p, head, tokens.start, tokens.stop))
            logprobs[i, tokens] = _at(own, ids[tokens])
            weights[i, tokens] = weight[:, None] if isinstance(weight, Tensor) else weight
    return _Parts(list(logprobs), list(weights), mixture)


def _on_support(p: Problem, log_p: Tensor) -> _OnSupport:
    k, tail = p.options.k or 0, p.options.tail

    def largest(log_m: Tensor, tokens: slice) -> Tensor:
        ids = log_m.topk(k).indices
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
                log_m = (_composite_logprobs if composite else _route_logprobs)(p, head, route)
                ids = largest(log_m, tokens) if ids is None else ids
                scores.append(_at(log_m, ids))
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


def _with_score_function(p: Problem, lp: Tensor, support: _OnSupport) -> tuple[Tensor, Tensor]:
    """Token loss of ``tail="sampled"``: log-probs (n, 1 + K) are of the sampled token outside S and of the tokens of S.

    The value is sum w d with w = p in S and 1 outside, the gradient that of sum w d log p with w d constant.
    """
    lam, (lq, lr) = _scale(p), support.bounded(p.options.logprob_min)
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


def _topk(p: Problem, lp: Tensor, support: _OnSupport) -> tuple[Tensor, Tensor]:
    """Token loss and KL(p || target) over the tokens of the support, log-probs (n, K) each, and the bucket."""
    lam, (lq, lr) = _scale(p), support.bounded(p.options.logprob_min)
    lam = lam[:, None] if isinstance(lam, Tensor) else lam
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
    log_p, log_q, log_r = (of_model(*x) for x in ((lp, None, None), *zip((lq, lr), support.parts, raw, strict=True)))
    assert log_p is not None
    if p.options.tail != "renormalize":
        bucket = every & ~is_light(lp.detach())
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
    counted = inside.clone()
    if p.options.tail == "drop":
        counted[:, -1] = False
    terms = p.divergence.terms(Outcomes(log_p, log_t, mixed))
    return torch.where(counted, terms, 0).sum(1), kl


def _advantages(
    p: Problem,
    lp: Tensor,
    lq: Tensor | None,
    lr: Tensor | None,
    entropies: tuple[Tensor, Tensor | None, Tensor | None],  # of student, teacher and reference
    expected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The advantages that the gradient uses and those that the loss reports, without the baseline."""

    def hook(advantages: Tensor | None, teacher: Tensor | None, ref: Tensor | None) -> Tensor:
        index = torch.arange(p.rows.shape.numel(), device=lp.device) if p.rows.index is None else p.rows.index
        stats = TokenStats(
            index=index,
            advantages=advantages,
            student_logprobs=lp,
            teacher_logprobs=teacher,
            ref_logprobs=ref,
            old_logprobs=p.old_logprobs,
            student_entropy=entropies[0],
            teacher_entropy=entropies[1],
            ref_entropy=entropies[2],
            reward_scale=_scale(p),
        )
        assert p.advantage_fn is not None
        return call_function("advantage_fn", p.advantage_fn, stats, p.dtype)

    return advantages_of(
        rule_of(p.options),
        reward_scale=_scale(p),
        student=lp,
        teacher=lq,
        ref=lr,
        old=p.old_logprobs if p.options.advantage_policy == "old" else None,
        hook=None if p.advantage_fn is None else hook,
        expected=expected,
    )


@torch.no_grad()
def _with_reward_scale(p: Problem, z: Tensor) -> Problem:
    """The problem with lambda (n,) of its ``reward_scale_fn``, called once for all tokens."""
    assert p.reward_scale_fn is not None
    values: dict[str, Tensor | None] = dict.fromkeys(COMPUTED)
    log_p = _own_log_softmax(z)
    values["student_entropy"] = _entropy(log_p)
    values["student_logprobs"] = None if p.token_ids is None else _gather(log_p, p.token_ids)
    pair = replace(p, reward_scale=1.0, divergence=ReverseKL())  # the student and a model in the teacher's place
    support = _on_support(p, log_p) if p.options.estimator == "topk" else None
    for name, _ in FROZEN:
        values[f"{name}_logprobs"] = _frozen_scores(p, name)[0]
        one_by_one = not p.options.joint and any(isinstance(getattr(route, name), FlatComposite) for route in p.routes)
        z_m = None if one_by_one else _frozen_logits(p, name)  # models scored one by one may be given as log-probs
        if z_m is not None:
            values[f"{name}_entropy"] = _entropy(_own_log_softmax(z_m))
        if support is not None and p.options.tail != "sampled":
            parts = support.parts[name == "ref"]
            alone = support._replace(teacher=getattr(support, name), ref=None, parts=(parts, None))
            values[f"kl_{name}"] = _topk(pair, _at(log_p, support.token_ids), alone)[1]
        elif p.options.joint:
            values[f"kl_{name}"] = _full(pair, z, z_m, None)[1]
    stats = computed_by(p, 0, p.rows.count, values.__getitem__)
    return replace(p, reward_scale=call_function("reward_scale_fn", p.reward_scale_fn, stats, p.dtype))


def _scale(p: Problem) -> float | Tensor:
    assert p.reward_scale is not None
    return p.reward_scale


def _policy_loss(p: Problem, lp: Tensor, advantages: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token loss, for autograd to differentiate, and where a bound is in force."""
    s = p.options
    behaviour = lp.detach() if p.old_logprobs is None else p.old_logprobs
    nothing = advantages == 0  # no loss, whatever it is multiplied by
    unknown = (torch.isneginf(lp) | torch.isneginf(behaviour)).detach()
    if s.ratio in ("token", "detached"):
        # masked before any arithmetic: a NaN behind a where has a NaN gradient
        log_ratio = torch.where(nothing, 0, lp) - torch.where(nothing, 0, behaviour)
    else:
        own = torch.where(unknown, 0, lp) - torch.where(unknown, 0, behaviour)
        # sequence by sequence, written out: the fused loss has its own way of summing
        bounds, T = p.sequences.cu_seqlens, p.sequences.shape[1:].numel()
        starts = [i * T for i in range(p.sequences.count + 1)] if bounds is None else bounds.tolist()
        live = torch.arange(p.rows.shape.numel(), device=lp.device) if p.rows.index is None else p.rows.index
        mean = 0 * own  # of own also where no token is live: so that the loss has a gradient
        for start, stop in itertools.pairwise(starts if s.ratio != "none" else []):
            inside = (live >= start) & (live < stop)
            if inside.any():
                mean = torch.where(inside, own[inside].mean(), mean)
        if s.ratio != "sequence-mean":
            mean = mean.detach() + own - own.detach()
        log_ratio = torch.where(nothing, 0, mean)
    gone = torch.zeros_like(nothing) if weights is None else weights == 0
    # no gradient into what may be infinite: times 0 it is NaN
    log_ratio = torch.where(gone, log_ratio.detach(), log_ratio)
    clipped = torch.zeros_like(nothing)
    if s.log_ratio_max is not None:
        clipped = log_ratio.detach().abs() > s.log_ratio_max
        log_ratio = log_ratio.clamp(-s.log_ratio_max, s.log_ratio_max)
    ratio = log_ratio.exp()
    low, high = s.clip or (math.inf, math.inf)
    inside_clip = ratio.clamp(1 - low, 1 + high)
    if s.ratio == "detached":
        # no gradient where p = 0, as for the other ratios; nor is there an infinite loss
        at_most = torch.where(torch.isneginf(lp), torch.finfo(lp.dtype).min, torch.where(gone, lp.detach(), lp))
        loss, clipped = -advantages * inside_clip.detach() * at_most, clipped | (inside_clip != ratio)
    else:
        unclipped = -advantages * ratio
        loss = torch.maximum(unclipped, -advantages * inside_clip)
        if s.clip_dual is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * s.clip_dual), loss)
        clipped = clipped | ((loss.detach() - unclipped.detach()).abs() > 0)  # NaN is not a clip
    if s.loss_max is not None:
        clipped = clipped | (loss.detach().abs() > s.loss_max)
        loss = loss.clamp(-s.loss_max, s.loss_max)
    loss = torch.where(nothing | gone, 0, loss)
    return loss if weights is None else loss * torch.where(nothing, 0, weights), clipped


def _importance(p: Problem, lp: Tensor | None) -> Tensor | None:
    """(n,) detached weights of the rollout, None without one."""
    if p.rollout_logprobs is None or p.importance is not None:
        return p.importance
    assert lp is not None
    behaviour = lp.detach() if p.old_logprobs is None else p.old_logprobs
    return importance(p.options, behaviour, p.rollout_logprobs, p.over_sequences)


def _entropy(log_p: Tensor) -> Tensor:
    # masked before exp, too: its product with 0 has the gradient NaN behind an infinity
    outside = log_p == -math.inf
    inside = log_p.masked_fill(outside, 0)
    return -(inside.exp().masked_fill(outside, 0) * inside).sum(-1)


def _exact_kl(z: Tensor, z_r: Tensor, composite: Tensor | None) -> Tensor:
    """KL(p || r) over the joint support; a sum of several models is not normalised."""
    support = (z != -math.inf) & (z_r != -math.inf)
    log_p, log_r = (_log_softmax(x, support).masked_fill(~support, 0) for x in (z, z_r))
    if composite is not None:
        log_r = log_r.where(~composite, z_r.masked_fill(~support, 0))
    return (log_p.exp().masked_fill(~support, 0) * (log_p - log_r)).sum(1)


def _kl_estimate(kind: str, lp: Tensor, lr: Tensor) -> Tensor:
    """k1, k2 or k3, for autograd to differentiate."""
    outside = (lp == -math.inf) | (lr == -math.inf)
    d = lr.masked_fill(outside, 0) - lp.masked_fill(outside, 0)
    return -d if kind == "k1" else d.square() / 2 if kind == "k2" else d.expm1() - d


@called_as(LossCall)
def gopd_loss(call: LossCall) -> GOPDOutput:
    """:func:`fused_gopd.gopd_loss` in dense PyTorch: same arguments, same result, [tokens, V] memory.

    The options that choose how the fused loss computes (its chunks, ``grad_filter``, ``backend``) have no effect.
    """
    p = prepare(call, TorchRowOps())
    frozen = named_models("teacher", call.teacher) | named_models("ref", call.ref)
    for model in (call.student, *frozen.values()):
        if getattr(model, "shard", None) is not None:
            raise ValueError("the dense reference takes whole heads: gather the weights, got one with a shard")
    options, ids = p.options, p.token_ids
    z = _logits(p, p.student, 0, p.rows.count)
    if p.reward_scale_fn is not None:
        p = _with_reward_scale(p, z)
    kl = lp = lq = lr = None
    entropies: tuple[Tensor | None, Tensor | None] = (None, None)
    if options.joint:
        with torch.no_grad():
            z_q, z_r = (_frozen_logits(p, name) for name, _ in FROZEN)
        token_loss, kl, log_p, log_q, log_r = _full(p, z, z_q, z_r if p.has[1] else None)
        if ids is not None:
            lq, lr = (None if x is None else _gather(x, ids) for x in (log_q, log_r))
            if isinstance(p.reward_scale, Tensor):
                # a model that a token's own lambda cancels is outside its joint support: its log-prob is 0
                assert lq is not None
                assert lr is not None
                lq, lr = lq.masked_fill(p.reward_scale == 0, 0), lr.masked_fill(p.reward_scale == 1, 0)
    else:
        log_p = _own_log_softmax(z)
        with torch.no_grad():
            (lq, first), (lr, second) = (_frozen_scores(p, name) for name, _ in FROZEN)
        entropies = first, second
        if options.estimator == "topk":
            with torch.no_grad():
                support = _on_support(p, log_p)
            term = _with_score_function if options.tail == "sampled" else _topk
            token_loss, kl = term(p, _at(log_p, support.token_ids), support)
            # a NaN anywhere in the row shows, also where no token of the row is in the support
            bad = support.has_nan
            token_loss = torch.where(bad, z.masked_fill(~bad[:, None], 0).sum(1) * math.nan, token_loss)
            kl = kl.masked_fill(bad, math.nan)
    entropy = _entropy(log_p.detach())
    vectors: dict[str, Tensor | None] = {"entropy": entropy, "kl": kl}
    if ids is not None:
        lp = _gather(log_p, ids)
        weights = _importance(p, lp)
        if options.estimator == "sampled":
            with torch.no_grad():
                expected = token_loss.detach() if options.joint else None
                known = lr if p.has[1] else None  # lambda may cancel the reference of a KL penalty
                advantages, reported = _advantages(p, lp.detach(), lq, known, (entropy, *entropies), expected)
                if weights is not None and options.trust_region is not None:
                    assert p.rollout_logprobs is not None
                    region = inside_trust_region(options, advantages, lp, p.rollout_logprobs, p.over_sequences)
                    weights = weights.masked_fill(~region, 0)
                value, _ = _policy_loss(p, lp, reported, weights)
            token_loss, vectors["clipped"] = _policy_loss(p, lp, advantages, weights)
            vectors["advantages"] = advantages
            if options.baseline == "expected":  # the gradient with it, the value without
                token_loss = value + (token_loss - token_loss.detach())
        vectors["importance"] = weights
        if options.estimator != "sampled" and "advantages" in p.reported:
            lowest = -math.inf if options.logprob_min is None else options.logprob_min
            others = (None if x is None else x.clamp_min(lowest) for x in (lq, lr))
            vectors["advantages"], _ = advantage(_scale(p), lp.detach(), *others)
    if options.estimator != "sampled" and p.has_loss_factors:
        if options.loss_max is not None:
            vectors["clipped"] = token_loss.detach().abs() > options.loss_max
            token_loss = token_loss.clamp(-options.loss_max, options.loss_max)
        weights = vectors.get("importance")
        if weights is not None:
            token_loss = token_loss * weights
    if p.labels is not None:
        label_logprobs = _gather(log_p, p.labels.clamp_min(0))
        if options.sft_temperature is not None:
            own = replace(p.student, temperature=options.sft_temperature)
            label_logprobs = _gather(_own_log_softmax(_logits(p, own, 0, p.rows.count)), p.labels.clamp_min(0))
        vectors["label_logprobs"], labelled = label_report(label_logprobs.detach(), p.labels)
        assert labelled is not None
        vectors["labelled"] = labelled
        token_loss = token_loss - options.sft_weight * torch.where(labelled, label_logprobs, 0)
    if options.entropy_weight:
        token_loss = token_loss - options.entropy_weight * _entropy(_own_log_softmax(z))
    if options.kl_ref == "exact":
        with torch.no_grad():
            z_r = _frozen_logits(p, "ref")
            assert z_r is not None
        penalty = _exact_kl(z, z_r, _is_composite(p, "ref", z_r))
        vectors["kl_ref"] = penalty.detach()
        token_loss = token_loss + options.kl_ref_weight * penalty
    elif options.kl_ref != "none":
        assert lp is not None
        assert lr is not None
        token_loss = token_loss + options.kl_ref_weight * _kl_estimate(options.kl_ref, lp, lr)
    weighted = token_loss * p.weights
    loss = p.rows.scatter(weighted) if options.reduction == "none" else weighted.sum()
    vectors |= {"token_loss": token_loss, "student_logprobs": lp, "teacher_logprobs": lq, "ref_logprobs": lr}
    with torch.no_grad():
        for name, models in p.cancelled:
            scores = [_cancelled_scores(p, model, route) for model, route in zip(models, p.routes, strict=True)]
            vectors[f"{name}_logprobs"] = torch.cat(scores)
    return output_of(p, loss, vectors)


@called_as(NLLCall)
def linear_nll(call: NLLCall) -> Tensor:
    """:func:`fused_gopd.linear_nll` in dense PyTorch: same arguments, same result, [tokens, V] memory."""
    p = prepare_nll(call, TorchRowOps())
    assert p.nll is not None
    assert p.token_ids is not None
    z = _logits(p, p.student, 0, p.rows.count)
    log_p, e = _own_log_softmax(z), p.nll.label_smoothing
    loss = -_gather(log_p, p.token_ids)
    if e:
        inside = log_p != -math.inf
        loss = (1 - e) * loss if e < 1 else torch.zeros_like(loss)
        loss = loss - e * torch.where(inside, log_p, 0).sum(1) / inside.sum(1)
    if p.nll.z_loss:
        loss = loss + p.nll.z_loss * z.logsumexp(1).square()
    loss = loss * p.weights
    return p.rows.scatter(loss) if p.options.reduction == "none" else loss.sum()
