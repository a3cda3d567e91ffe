"""Dense logits and log-probs of the models of a problem, [tokens, vocabulary] each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..heads import Head, LinearHead, TokenLogProbs
from ..loop.gemm import without_autocast
from ..objective.combination import combine
from ..problem import FlatComposite, Problem, Route


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


def all_finite(*logits: Tensor | None) -> bool:
    """Whether no masking is needed. By sums: a baseline without -inf pays for no [tokens, V] mask."""
    return all(bool(torch.isfinite(z.detach().sum())) for z in logits if z is not None)


def log_softmax(z: Tensor, support: Tensor | None) -> Tensor:
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


def own_log_softmax(z: Tensor) -> Tensor:
    """Of one model on its own, over its own support."""
    return log_softmax(z, None if all_finite(z) else z != -math.inf)


def gathered(logp: Tensor, ids: Tensor) -> Tensor:
    return logp.gather(-1, ids[:, None])[:, 0]


def logits(p: Problem, head: Head, start: int, stop: int) -> Tensor:
    """(stop - start, V) logits of live tokens; of a head with a vocab_map all its own."""
    width = p.vocab_size if head.vocab_map is None else head.own_size
    flat = logits_of(head, width, p.dtype).reshape(-1, width)
    return flat[start:stop] if p.rows.index is None else flat.index_select(0, p.rows.index[start:stop])


def of_tokens(head: Head, own: Tensor) -> Tensor:
    """A head's logits or log-probs (n, rows) as those of the student's tokens (n, V), -inf where it has no row."""
    rows = head.vocab_map
    return own if rows is None else own[:, rows.clamp_min(0)].masked_fill(rows < 0, -math.inf)


def _route_logits(p: Problem, head: Head, route: Route) -> Tensor:
    """(n, V) logits of a route's tokens under one of its models."""
    return of_tokens(head, logits(p, head, route.start, route.stop))


def route_logprobs(p: Problem, head: Head, route: Route) -> Tensor:
    """Likewise log-probs, each model normalised over its own support, in its own vocabulary."""
    return of_tokens(head, own_log_softmax(logits(p, head, route.start, route.stop)))


def route_entropies(p: Problem, name: str) -> Tensor | None:
    """(n,) of the teachers or references, each alone; None where one is made of several models, or given as scores."""
    heads = [(getattr(route, name), route) for route in p.routes]
    if any(head is None or isinstance(head, FlatComposite) for head, _ in heads):
        return None
    return torch.cat([entropy_of(own_log_softmax(logits(p, head, x.start, x.stop))) for head, x in heads])


def frozen_logits(p: Problem, name: str) -> Tensor | None:
    """(n, V) logits of the teachers or references, each token under that of its route; None where there is none."""
    heads = [(getattr(route, name), route) for route in p.routes]
    if any(head is None for head, _ in heads):
        return None
    parts = []
    for head, route in heads:
        composite = isinstance(head, FlatComposite)
        parts.append((composite_logprobs if composite else _route_logits)(p, head, route))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def composite_logprobs(p: Problem, model: FlatComposite, route: Route) -> Tensor:
    """(stop - start, V) log-probs of a route's model that is made of several, not normalised."""
    logprobs = [route_logprobs(p, x, route) for x in model.heads if x is not None]
    weights = [w[:, None] if isinstance(w, Tensor) else w for w in model.weights_of(slice(route.start, route.stop))]
    return combine(logprobs, weights, model.mixture)


def _composite_scores(p: Problem, model: FlatComposite, route: Route) -> Tensor:
    """log-probs of a route's sampled tokens under its model that is made of several."""
    tokens, own = slice(route.start, route.stop), []
    assert p.token_ids is not None
    for head, given in zip(model.heads, model.logprobs, strict=True):
        if head is not None:
            log_p = route_logprobs(p, head, route)
            own.append(gathered(log_p, p.token_ids[tokens]))
        elif given is not None:
            own.append(given[tokens])
    return combine(own, model.weights_of(tokens), model.mixture)


def is_composite(p: Problem, name: str, like: Tensor) -> Tensor | None:
    """(n, 1) bool, the tokens whose model is made of several; None where there is none."""
    if not p.has_composite:
        return None
    out = torch.zeros_like(like[:, :1], dtype=torch.bool)
    for route in p.routes:
        out[route.start : route.stop] = isinstance(getattr(route, name), FlatComposite)
    return out


def frozen_scores(p: Problem, name: str) -> tuple[Tensor | None, Tensor | None]:
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
            own = logits(p, head, route.start, route.stop)
            log_p = own_log_softmax(of_tokens(head, own) if p.options.joint else own)
            scores.append(gathered(log_p if p.options.joint else of_tokens(head, log_p), p.token_ids[tokens]))
            entropies.append(entropy_of(log_p))
        elif given is not None:
            scores.append(given[route.start : route.stop])
        else:
            return None, None
    return torch.cat(scores), torch.cat(entropies) if len(entropies) == len(scores) else None


def cancelled_scores(p: Problem, model: object, route: Route) -> Tensor:
    """log-probs of a route's sampled tokens under a model that lambda cancels."""
    if isinstance(model, FlatComposite):
        return _composite_scores(p, model, route)
    if isinstance(model, TokenLogProbs):
        return p.rows.take(model.logprobs, route.start, route.stop).to(p.dtype)
    assert p.token_ids is not None
    log_p = route_logprobs(p, model, route)  # type: ignore[arg-type]
    return gathered(log_p, p.token_ids[route.start : route.stop])


def logprobs_at(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of some tokens, -inf where the id is -1."""
    return log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -math.inf)


def reward_scale_of(p: Problem) -> float | Tensor:
    assert p.reward_scale is not None
    return p.reward_scale


def entropy_of(log_p: Tensor) -> Tensor:
    # masked before exp, too: its product with 0 has the gradient NaN behind an infinity
    outside = log_p == -math.inf
    inside = log_p.masked_fill(outside, 0)
    return -(inside.exp().masked_fill(outside, 0) * inside).sum(-1)
