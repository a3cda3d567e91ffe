"""Dense float64 G-OPD, one token at a time, written from the formulas and independent of the package it checks.

Every token's vocabulary is cut to its support before any arithmetic, so that no infinity is ever computed with and no
``where`` is needed; autograd differentiates what is left. A model is any object with ``hidden`` and ``weight`` (and
``bias``, ``logit_scale``, ``softcap``, ``temperature``), or with ``logits``, or with ``logprobs``, alone or beside
``token_ids``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Scores = dict[int, Tensor]  # log-probs by token id


@dataclass
class Result:
    """Values of the token shape, 0 where masked; ``loss`` is the reduced scalar (or the token losses for "none")."""

    loss: Tensor
    token_loss: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    kl: Tensor


def logits_of(model: Any) -> Tensor:
    """z = cap(scale (h W^T + b)) / temperature, cap(x) = softcap tanh(x / softcap), -inf kept."""
    if hasattr(model, "logits"):
        x = model.logits.double()
    else:
        x = model.hidden.double() @ model.weight.double().T
        if model.bias is not None:
            x = x + model.bias.double()
    x = x * model.logit_scale
    if model.softcap is not None:
        gone = x == -math.inf
        x = (model.softcap * torch.tanh(x.masked_fill(gone, 0.0) / model.softcap)).masked_fill(gone, -math.inf)
    return x / model.temperature


def _log_normalise(x: Tensor) -> Tensor:
    """Relative to its own maximum first: a log-sum beside a large number has the rounding of that."""
    x = x - x.detach().max()
    return x - torch.logsumexp(x, -1)


def _in_range(x: Tensor) -> Tensor:
    """Clamped to the finite numbers: lambda times a mask of the smallest float is beyond them."""
    limits = torch.finfo(x.dtype)
    return x.clamp(limits.min, limits.max)


def _row(x: Tensor | None, t: int) -> Tensor | None:
    return None if x is None else x[t]


def divergence_terms(divergence: str, x: float, log_p: Tensor, log_t: Tensor, mixed: Tensor) -> Tensor:
    """What a divergence of parameter x sums; ``mixed`` is the target's log, not normalised."""
    p, t = log_p.exp(), log_t.exp()
    reverse, forward = p * (log_p - mixed), t * (log_t - log_p)

    def from_mixture(of: Tensor, share: float) -> Tensor:
        """The terms of KL(of || share t + (1 - share) p)."""
        return of.exp() * (of - torch.logaddexp(math.log(share) + log_t, math.log(1 - share) + log_p))

    if divergence == "jsd":
        return x * from_mixture(log_t, x) + (1 - x) * from_mixture(log_p, x)
    if divergence == "skew_kl":
        return from_mixture(log_t, x) if x else forward
    if divergence == "skew_reverse_kl":
        return from_mixture(log_p, 1 - x) if x else reverse
    if divergence == "mixed":
        return x * forward + (1 - x) * reverse
    if divergence == "alpha" and x not in (0, 1):
        return ((x * log_t + (1 - x) * log_p).exp() - (p if x <= 0.5 else t)) / (x * (x - 1))
    return forward if divergence == "forward_kl" or (divergence == "alpha" and x) else reverse


@dataclass
class Made:
    """A model made of several: of each its logits (n, V), or its log-probs (n,) of the sampled tokens, and weights."""

    models: list[Tensor]
    weights: list[list[float]]
    mixture: bool

    def total(self, logprobs: list[Tensor], t: int) -> Tensor:
        """sum w log q, or log sum w q; -inf where a model that counts (of a mixture: all) has -inf."""
        pairs = [(x, each[t]) for x, each in zip(logprobs, self.weights, strict=True) if each[t] != 0]
        if self.mixture:
            return torch.stack([w * x.exp() for x, w in pairs]).sum(0).log() if pairs else logprobs[0] - math.inf
        if not pairs:
            return torch.zeros_like(logprobs[0])
        gone = torch.stack([x == -math.inf for x, _ in pairs]).any(0)
        return torch.stack([w * x.masked_fill(gone, 0) for x, w in pairs]).sum(0).masked_fill(gone, -math.inf)

    def row(self, t: int) -> Tensor:
        """(V,) log of one token's distribution, not normalised."""
        return self.total([_in_full(_all_scores(x[t]), x[t]) for x in self.models], t)

    def scores(self, t: int) -> list[tuple[Scores, float]]:
        return [(_all_scores(x[t]), each[t]) for x, each in zip(self.models, self.weights, strict=True)]

    def token(self, t: int, token: int) -> Tensor:
        return self.total([x[t] if x.ndim == 1 else _token_logprob(x[t], token) for x in self.models], t)


def _in_full(scores: Scores, like: Tensor) -> Tensor:
    out = torch.full_like(like, -math.inf)
    for token, x in scores.items():
        out[token] = x
    return out


def _full_token(
    z: Tensor,
    z_q: Tensor | None,
    z_r: Tensor | None,
    lam: float,
    divergence: str,
    parameter: float,
    made: Sequence[Made | None] = (None, None),  # rows of teacher and reference that are made of several models
) -> tuple[Tensor, Tensor, Tensor, Tensor, Scores]:
    """Value, KL(p || target), entropy of p, (3, V) log-probs over the joint support, and p's by id, for one token."""
    used = [x for x, wanted in ((z, True), (z_q, lam != 0), (z_r, lam != 1)) if wanted]
    assert all(x is not None for x in used)
    inside = torch.stack([x != -math.inf for x in used]).all(0)
    logp = torch.full((3, z.shape[0]), -math.inf, dtype=torch.float64)
    zero = z.new_zeros(())
    if not inside.any():
        return zero, zero, zero, logp, {}
    log_p = _log_normalise(z[inside])
    log_q, log_r = torch.zeros_like(log_p), torch.zeros_like(log_p)
    if lam != 0:
        log_q = z_q[inside] if made[0] else _log_normalise(z_q[inside])
    if lam != 1:
        log_r = z_r[inside] if made[1] else _log_normalise(z_r[inside])
    mixed = _in_range(lam * log_q + (1 - lam) * log_r)
    log_t = _in_range(_log_normalise(mixed))
    p = log_p.exp()
    kl = (p * (log_p - log_t)).sum()
    value = divergence_terms(divergence, parameter, log_p, log_t, mixed).sum()
    for row, x in zip(logp, (log_p, log_q, log_r), strict=True):
        row[inside] = x.detach()
    by_id = dict(zip(inside.nonzero()[:, 0].tolist(), log_p, strict=True))
    return value, kl, -(p * log_p).sum(), logp, by_id


def _all_scores(z: Tensor) -> Scores:
    inside = (z != -math.inf).nonzero()[:, 0].tolist()
    return dict(zip(inside, _log_normalise(z[inside]), strict=True)) if inside else {}


def _largest(scores: Scores, k: int) -> list[int]:
    return sorted(scores, key=lambda token: -scores[token].item())[:k]


def _topk_token(
    z: Tensor,
    frozen: list[Scores | None],
    listed: list[list[int] | None],
    lam: float,
    divergence: str,
    parameter: float,
    top: dict[str, Any],
    token: int | None = None,
    parts: Sequence[tuple[list[tuple[Scores, float]], bool] | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Value and KL(p || target) of one token; ``listed`` has the ids of a teacher and a reference that came as ids.

    ``parts`` are the models with their weights of which teacher and reference are made, and whether as a mixture.
    """
    tail, k, lowest = top.get("tail", "bucket"), top.get("k"), top.get("logprob_min")
    own_lowest = top.get("student_logprob_min")
    student = _all_scores(z)
    used = [(i, scores) for i, scores in enumerate(frozen) if scores is not None and lam != (0, 1)[i]]
    chooser = next(i for i in range(2) if frozen[i] is not None and (i or not top["teacher_gone"]))
    scores = frozen[chooser]
    assert scores is not None
    if "ids" in top:
        S = top["ids"]
    elif top.get("support") == "student":
        S = _largest(student, k)
    else:
        own = listed[chooser]
        S = _largest(scores, k) if own is None else own
    if tail == "sampled":
        bounded = [(i, {v: _at_least(scores, v, lowest) for v in {*S, token}}) for i, scores in used]
        return _exact_and_sampled(student, bounded, lam, S, token), z.new_zeros(())
    counts = [t for t in S if all(lowest is not None or t in scores for _, scores in used)]
    S = [token for token in counts if own_lowest is not None or token in student]
    zero = z.new_zeros(())
    if not S and tail != "bucket":
        return zero, zero

    def of(scores: Scores) -> Tensor:
        """log-probs of the tokens of S, and log of the mass outside, -inf where there is next to none."""
        logs = torch.stack([scores.get(t, -z.new_tensor(math.inf)) for t in S]) if S else z.new_zeros(0)
        rest = 1 - logs.exp().sum()
        return torch.cat((logs, (rest.log() if rest >= 1e-6 else z.new_tensor(-math.inf))[None]))

    def bounded(log: Tensor) -> Tensor:
        """Those of the tokens of S at least the bound."""
        return log if lowest is None else torch.cat((log[:-1].clamp_min(lowest), log[-1:]))

    def light(log: Tensor) -> bool:
        return bool(log[-1] == -math.inf)

    logs, lights = [of(student)], [light(of(student))]
    if own_lowest is not None:
        logs = [torch.cat((logs[0][:-1].clamp_min(own_lowest), logs[0][-1:]))]
    unbounded = [*logs]
    for i, scores in used:
        if parts[i] is None:
            unbounded.append(of(scores))
            logs.append(bounded(of(scores)))
            lights.append(light(logs[-1]))
            continue
        own, mixture = parts[i]
        pairs = [(of(x), w) for x, w in own if w]
        if tail == "renormalize" and not mixture and lowest is None:
            pairs = [(torch.cat((_log_normalise(x[:-1]), x[-1:])), w) for x, w in pairs]
        total = Made([x for x, _ in pairs], [[w] for _, w in pairs], mixture)
        unbounded.append(total.total([x for x, _ in pairs], 0))
        logs.append(bounded(unbounded[-1]))
        lights.append((all if mixture else any)(light(x) for x, _ in pairs))
    bucket = tail != "renormalize" and not any(lights)
    if not bucket:
        logs, unbounded = [x[:-1] for x in logs], [x[:-1] for x in unbounded]
    if tail == "renormalize":
        as_they_are = [False, *(parts[i] is not None and not parts[i][1] and lowest is None for i, _ in used)]
        logs = [x if as_is else _log_normalise(x) for x, as_is in zip(logs, as_they_are, strict=True)]
    log_p, *frozen_logs = logs
    if not len(log_p):
        return zero, zero
    weights = [(lam, 1 - lam)[i] for i, _ in used]
    mixed = _in_range(sum(w * x for w, x in zip(weights, frozen_logs, strict=True)))
    log_t = _in_range(_log_normalise(mixed))
    whole = _log_normalise(log_p)
    kl = (whole.exp() * (whole - log_t)).sum()
    if tail == "drop" and lowest is not None:
        there = torch.stack(unbounded[1:]).isfinite().all(0)
        whole = _in_range(sum(w * x[there] for w, x in zip(weights, unbounded[1:], strict=True)))
        log_t = _in_range(mixed - whole.logsumexp(0) if len(whole) else mixed)
    terms = divergence_terms(divergence, parameter, log_p, log_t, mixed)
    return (terms[:-1] if tail == "drop" and bucket else terms).sum(), kl


def _at_least(scores: Scores, token: int, lowest: float | None) -> Tensor:
    found = scores.get(token, torch.tensor(-math.inf, dtype=torch.float64))
    return found if lowest is None else found.clamp_min(lowest)


def _exact_and_sampled(
    student: Scores, used: list[tuple[int, Scores]], lam: float, S: list[int], token: int | None
) -> Tensor:
    """sum over S of p (log p - log target), and of the sampled token alone where it is not in S, as REINFORCE does."""
    loss = torch.zeros((), dtype=torch.float64)
    for v in {*S, token}:
        if v in student and all(scores[v] != -math.inf for _, scores in used):
            log_p = student[v]
            target = _in_range(sum((lam, 1 - lam)[i] * scores[v] for i, scores in used))
            d = _in_range(log_p.detach() - target)
            w = log_p.detach().exp() if v in S else torch.ones(())
            loss = loss + w * d * (1 + log_p - log_p.detach())
    return loss


def _token_logprob(z: Tensor, token: int) -> Tensor:
    inside = z != -math.inf
    if not inside[token]:
        return z.new_tensor(-math.inf)
    return z[token] - torch.logsumexp(z[inside], -1)


def _entropy(z: Tensor) -> Tensor:
    log_p = _log_normalise(z[z != -math.inf])
    return -(log_p.exp() * log_p).sum()


def advantage(lam: float, behaviour: float, log_q: float, log_r: float) -> float | None:
    """A = lambda log q + (1 - lambda) log r - log p, None where it is not finite."""
    terms = [behaviour] + [x for x, wanted in ((log_q, lam != 0), (log_r, lam != 1)) if wanted]
    if -math.inf in terms:
        return None
    return (lam * log_q if lam != 0 else 0.0) + ((1 - lam) * log_r if lam != 1 else 0.0) - behaviour


def _sampled_token(
    log_p: Tensor,
    adv: float | None,
    old: float | None,
    log_s: Tensor | None,
    weight: float | None,
    policy: dict[str, Any],
) -> Tensor:
    """-A rho w of one token, clipped; ``log_s`` is the sequence's mean log-ratio, None for the token's own."""
    if adv is None:
        return log_p.new_zeros(())
    behaviour, kind = log_p.item() if old is None else old, policy.get("ratio", "token")
    log_ratio = log_p - (log_p.item() if kind == "none" else behaviour)
    if log_s is not None:
        log_ratio = log_s if kind == "sequence-mean" else log_s.item() + log_p - log_p.item()
    if policy.get("log_ratio_max") is not None:
        log_ratio = log_ratio.clamp(-policy["log_ratio_max"], policy["log_ratio_max"])
    ratio = log_ratio.exp()
    loss = -adv * ratio
    if kind == "detached":
        low, high = policy.get("clip") or (math.inf, math.inf)
        loss = -adv * min(max(ratio.item(), 1 - low), 1 + high) * log_p
    elif policy.get("clip") is not None:
        low, high = policy["clip"]
        loss = torch.maximum(loss, -adv * ratio.clamp(1 - low, 1 + high))
    if policy.get("clip_dual") is not None and adv < 0:
        loss = torch.minimum(loss, torch.as_tensor(-adv * policy["clip_dual"], dtype=torch.float64))
    loss = _at_most(loss, policy)
    return loss if weight is None else loss * weight


def _at_most(loss: Tensor, policy: dict[str, Any]) -> Tensor:
    most = policy.get("loss_max")
    return loss if most is None else loss.clamp(-most, most)


def _statistic(name: str, t: int, group: list[int], p: list[float], rollout: list[float]) -> float:
    """A statistic of the log-probs p and rollout of the sampled tokens, at token t of the sequence ``group``."""

    def log_ratio(i: int) -> float:
        return 0.0 if p[i] == -math.inf else p[i] - rollout[i]

    if name == "token_difference":
        return math.exp(p[t]) - math.exp(rollout[t])
    level, _, kind = name.rpartition("_")
    terms = {
        "ratio": math.exp,
        "k2": lambda x: x * x / 2,
        "k3": lambda x: math.exp(x) - 1 - x,
    }
    f, d = terms[kind], [log_ratio(i) for i in group]
    if level == "sequence":
        return math.exp(sum(d))
    if level == "geometric":
        return math.exp(sum(d) / len(d))
    if level == "token":
        return f(log_ratio(t))
    values = [f(x) for x in d]
    return {"seq_sum": sum, "seq_mean": lambda x: sum(x) / len(x), "seq_max": max, "seq_min": min}[level](values)


def rollout_weight(t: int, group: list[int], p: list[float], rollout: list[float], policy: dict[str, Any]) -> float:
    """The importance weight of token t, whose sequence has the live tokens ``group``."""
    level, most = policy.get("rollout_is", "token"), policy.get("log_ratio_max", math.inf)
    log_weight = {
        "none": lambda: 0.0,
        "token": lambda: math.log(_statistic("token_ratio", t, group, p, rollout)),
        "sequence": lambda: math.log(_statistic("sequence_ratio", t, group, p, rollout)),
        "geometric": lambda: math.log(_statistic("geometric_ratio", t, group, p, rollout)),
    }[level]()
    weight, bound = math.exp(min(max(log_weight, -most), most)), policy.get("rollout_is_cap")
    low, high = bound if isinstance(bound, tuple) else (0.0, math.inf if bound is None else bound)
    weight = min(max(weight, low), high)
    for name, pair in (policy.get("rollout_mask") or {}).items():
        low, high = (default if x is None else x for x, default in zip(pair, (-math.inf, math.inf), strict=True))
        if not low <= _statistic(name, t, group, p, rollout) <= high:
            weight = 0.0
    return weight


def in_trust_region(
    t: int, group: list[int], p: list[float], rollout: list[float], adv: float | None, policy: dict[str, Any]
) -> bool:
    for name, (low, high) in (policy.get("trust_region") or {}).items():
        x = _statistic(name, t, group, p, rollout)
        if adv is not None and (
            (adv > 0 and high is not None and x > high) or (adv < 0 and low is not None and x < low)
        ):
            return False
    return True


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[Tensor]:
    if cu_seqlens is None:
        yield from x
    else:
        bounds = cu_seqlens.tolist()
        for start, stop in itertools.pairwise(bounds):
            yield x[start:stop]


def reduce(
    token_loss: Tensor,
    mask: Tensor,
    reduction: str,
    normalizer: float | None = None,
    sequence_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """token_loss is 0 where masked; sequences are dim 0, or the slices that cu_seqlens bounds."""
    if reduction == "none":
        return token_loss
    if reduction == "sum":
        return token_loss.sum()
    if reduction == "token-mean":
        return token_loss.sum() / (max(1, int(mask.sum())) if normalizer is None else normalizer)
    total, sequences = token_loss.new_zeros(()), 0
    for b, tokens in enumerate(_sequences(token_loss, cu_seqlens)):
        live = int(list(_sequences(mask, cu_seqlens))[b].sum())
        if not live:
            continue
        sequences += 1
        length = live if sequence_lengths is None else float(sequence_lengths[b])
        total = total + tokens.sum() / (length if reduction == "seq-mean-token-mean" else 1)
    return total / (max(1, sequences) if normalizer is None else normalizer)


def gopd(
    student: Any,
    teacher: Any,
    ref: Any,
    token_ids: Tensor | None,
    *,
    mask: Tensor | None = None,
    reward_scale: float | Tensor = 1.0,
    estimator: str = "sampled",
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.5,
    skew: float = 0.1,
    forward_weight: float | Tensor = 0.5,
    reduction: str = "token-mean",
    normalizer: float | None = None,
    token_weight: Tensor | None = None,
    sequence_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    support_ids: Tensor | None = None,
    sft_labels: Tensor | None = None,
    sft_weight: float = 1.0,
    vocab_size: int | None = None,
    **policy: Any,
) -> Result:
    """The whole loss. Differentiable in whatever the student's tensors are.

    ``policy``: clip, clip_dual, ratio, advantage_policy, trust_region, advantage_clip, logprob_min of the sampled
    estimator; rollout_is, rollout_is_cap, rollout_mask, log_ratio_max, loss_max of all; k, support and tail of topk.
    """
    models = (student, teacher, ref)
    given: list[Tensor | None] = [None, None, None]
    listed: list[Any] = [None, None]
    z: list[Tensor | None] = [None, None, None]
    parts: list[list[Tensor]] = [[], []]
    for i, model in enumerate(models):
        if hasattr(model, "token_ids"):
            flat = [x.reshape(-1, x.shape[-1]) for x in (model.token_ids, model.logprobs.double())]
            sampled = getattr(model, "sampled_logprobs", None)
            listed[i - 1] = (*flat, *([] if sampled is None else [sampled.double().reshape(-1)]))
        elif hasattr(model, "logprobs"):
            given[i] = model.logprobs.double()
        elif hasattr(model, "models"):
            parts[i - 1] = [x.logprobs.double() if hasattr(x, "logprobs") else logits_of(x) for x in model.models]
        elif model is not None:
            z[i] = logits_of(model)
    every = [*(x for x in z if x is not None), *(x for own in parts for x in own if x.ndim == z[0].ndim)]
    vocab = vocab_size or min(x.shape[-1] for x in every)
    assert z[0] is not None
    shape = z[0].shape[:-1]
    z = [None if x is None else x[..., :vocab].reshape(-1, vocab) for x in z]
    z[1:] = [None if x is None else x.detach() for x in z[1:]]
    given = [None if x is None else x.detach().reshape(-1) for x in given]
    live = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()

    def per_token(number: float | Tensor) -> list[float]:
        """Of one number, one per sequence or one per token."""
        every = torch.as_tensor(number, dtype=torch.float64)
        if every.ndim == 1 and len(shape) > 1:
            every = every.reshape(-1, *([1] * (len(shape) - 1)))
        if cu_seqlens is not None and every.shape == (len(cu_seqlens) - 1,) != shape:
            every = torch.cat([x.expand(n) for x, n in zip(every, cu_seqlens.diff().tolist(), strict=True)])
        values: list[float] = every.expand(shape).reshape(-1).tolist()
        return values

    made: list[Made | None] = [None, None]
    for i, (model, own) in enumerate(zip(models[1:], parts, strict=True)):
        if own:
            flat = [x.detach()[..., :vocab].reshape(-1, vocab) if x.ndim > len(shape) else x.detach() for x in own]
            flat = [x if x.ndim == 2 and x.shape[-1] == vocab else x.reshape(-1) for x in flat]
            made[i] = Made(flat, [per_token(w) for w in model.weights], type(model).__name__ == "Mixture")
            tokens = range(live.numel())
            if token_ids is not None:
                places = zip(tokens, token_ids.reshape(-1).tolist(), live.reshape(-1).tolist(), strict=True)
                given[i + 1] = torch.stack([made[i].token(t, y if alive else 0) for t, y, alive in places])
            if all(x.ndim == 2 for x in flat):
                z[i + 1] = torch.stack([made[i].row(t) for t in tokens])
    policy = policy | {"made": made}
    lams = per_token(reward_scale)
    named = {"jsd": beta, "alpha": alpha, "skew_kl": skew, "skew_reverse_kl": skew, "mixed": forward_weight}
    parameters = per_token(named.get(divergence, 0.0))
    olds, rollouts = (None if x is None else x.double().reshape(-1).tolist() for x in (old_logprobs, rollout_logprobs))
    ids = None if token_ids is None else token_ids.reshape(-1).tolist()
    lived = live.reshape(-1).tolist()
    own: list[Tensor] = []  # the student's log-probs, where ratios or weights need those of other tokens
    if policy.get("ratio") in ("sequence", "sequence-mean") or rollouts is not None:
        assert ids is not None
        for t, alive in enumerate(lived):
            if estimator == "full" or policy.get("baseline") == "expected":
                by_id = _full_token(z[0][t], *(_row(x, t) for x in z[1:]), lams[t], "reverse_kl", 0.5, made)[4]
                own.append(by_id.get(ids[t], torch.tensor(-math.inf, dtype=torch.float64)))
            else:
                own.append(_token_logprob(z[0][t], ids[t]) if alive else torch.zeros((), dtype=torch.float64))
    groups: dict[int, list[int]] = {t: [t] for t in range(len(lived))}
    if len(shape) > 1 or cu_seqlens is not None:
        for part in _sequences(torch.arange(len(lived)).reshape(shape), cu_seqlens):
            tokens = [t for t in part.reshape(-1).tolist() if lived[t]]
            groups |= dict.fromkeys(tokens, tokens)
    currents = [x.item() for x in own]
    log_s: list[Tensor] | None = None
    if policy.get("ratio") in ("sequence", "sequence-mean"):
        assert olds is not None
        ratios = [torch.zeros_like(x) if -math.inf in (x.item(), olds[t]) else x - olds[t] for t, x in enumerate(own)]
        log_s = [sum(ratios[i] for i in groups[t]) / len(groups[t]) for t in range(len(lived))]
    corrected = policy | {"currents": currents, "groups": groups, "rollouts": rollouts}
    names = ("token_loss", "student", "teacher", "ref", "advantages", "entropy", "kl")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    for t, alive in enumerate(lived):
        values = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))
        if alive:
            own_s, weight = None if log_s is None else log_s[t], None
            if rollouts is not None:
                weight = rollout_weight(t, groups[t], currents if olds is None else olds, rollouts, policy)
            if estimator == "topk":
                # a Python float cancels a model everywhere, also the one that would have chosen the tokens
                gone = {"teacher_gone": teacher is None or (not isinstance(reward_scale, Tensor) and reward_scale == 0)}
                if support_ids is not None:
                    gone["ids"] = sorted(set(support_ids.reshape(-1, support_ids.shape[-1])[t].tolist()) - {-1})
                values.update(_topk(t, z, listed, lams[t], ids, divergence, parameters[t], policy | gone))
            else:
                values.update(
                    _token(
                        t, z, given, lams[t], ids, olds, own_s, weight, estimator, divergence, parameters[t], corrected
                    )
                )
            if estimator != "sampled":
                values["token_loss"] = _at_most(values["token_loss"], policy) * (1.0 if weight is None else weight)
            if sft_labels is not None and sft_labels.reshape(-1)[t] != -100:
                row = [z[0][t], *(_row(x, t) for x in z[1:])]
                joint = estimator == "full" or policy.get("baseline") == "expected"
                scores = _full_token(*row, lams[t], "reverse_kl", 0.5, made)[4] if joint else _all_scores(row[0])
                label = int(sft_labels.reshape(-1)[t])
                if label in scores:
                    values["token_loss"] = values["token_loss"] - sft_weight * scores[label]
        for name in names:
            columns[name].append(values[name])
    out = {
        name: torch.stack(column).reshape(shape) if column else torch.zeros(shape, dtype=torch.float64)
        for name, column in columns.items()
    }
    token_loss = out.pop("token_loss")
    weighted = token_loss
    if token_weight is not None:
        weighted = token_loss * torch.tensor(per_token(token_weight), dtype=torch.float64).reshape(shape)
        weighted = torch.where(live, weighted, 0)
    loss = reduce(weighted, live, reduction, normalizer, sequence_lengths, cu_seqlens)
    return Result(
        loss,
        token_loss.detach(),
        out["student"].detach(),
        out["teacher"],
        out["ref"],
        out["advantages"],
        out["entropy"].detach(),
        out["kl"].detach(),
    )


def _topk(
    t: int,
    z: list[Tensor | None],
    listed: list[tuple[Tensor, Tensor] | None],
    lam: float,
    ids: list[int] | None,
    divergence: str,
    parameter: float,
    top: dict[str, Any],
) -> dict[str, Tensor]:
    """All values of one live token under the topk estimator."""
    rows = [_row(x, t) for x in z]
    assert rows[0] is not None
    frozen: list[Scores | None] = []
    for row, pair, made in zip(rows[1:], listed, top["made"], strict=True):
        if made is not None:
            frozen.append({token: x for token, x in enumerate(row) if x != -math.inf})
        elif pair is None:
            frozen.append(None if row is None else _all_scores(row))
        else:
            pairs = zip(pair[0][t].tolist(), pair[1][t], strict=True)
            frozen.append({token: x for token, x in pairs if token >= 0 and x != -math.inf})
    token = None if ids is None else ids[t]
    came = [
        None if pair is None or scores is None else [token for token in pair[0][t].tolist() if token >= 0]
        for pair, scores in zip(listed, frozen, strict=True)
    ]
    for scores, pair in zip(frozen, listed, strict=True):
        if pair is not None and len(pair) > 2 and token is not None and scores is not None:
            scores.setdefault(token, pair[2][t])
    parts = [None if made is None else (made.scores(t), made.mixture) for made in top["made"]]
    value, kl = _topk_token(rows[0], frozen, came, lam, divergence, parameter, top, token, parts)
    values = {"token_loss": value, "kl": kl, "entropy": _entropy(rows[0])}
    if ids is not None:
        scored = [None if row is None else _token_logprob(row, ids[t]) for row in rows]
        for i, made in enumerate(top["made"]):
            scored[i + 1] = scored[i + 1] if made is None else made.token(t, ids[t])
        for i, (scores, pair) in enumerate(zip(frozen, listed, strict=True)):
            if pair is not None and len(pair) > 2 and scores is not None:
                scored[i + 1] = scores[ids[t]]
        values |= {n: x for n, x in zip(("student", "teacher", "ref"), scored, strict=True) if x is not None}
        lowest = top.get("logprob_min") or -math.inf
        own, *others = (0.0 if x is None else x.item() for x in scored)
        adv = advantage(lam, own, *(max(x, lowest) for x in others))
        values["advantages"] = torch.tensor(0.0 if adv is None else adv, dtype=torch.float64)
    return values


def _token(
    t: int,
    z: list[Tensor | None],
    given: list[Tensor | None],
    lam: float,
    ids: list[int] | None,
    olds: list[float] | None,
    log_s: Tensor | None,
    weight: float | None,
    estimator: str,
    divergence: str,
    parameter: float,
    policy: dict[str, Any],
) -> dict[str, Tensor]:
    """All values of one live token."""
    values: dict[str, Tensor] = {}
    rows = [_row(x, t) for x in z]
    assert rows[0] is not None
    if estimator == "full":
        value, values["kl"], values["entropy"], logp, _ = _full_token(*rows, lam, divergence, parameter, policy["made"])
        values["token_loss"] = value
        if ids is None:
            return values
        scored = [row[ids[t]] for row in logp]
    else:
        assert ids is not None
        values["entropy"] = _entropy(rows[0])
        scored = [
            given[i][t] if given[i] is not None else None if row is None else _token_logprob(row, ids[t])
            for i, row in enumerate(rows)
        ]
    for name, x in zip(("student", "teacher", "ref"), scored, strict=True):
        if x is not None:
            values[name] = x
    old = None if olds is None else olds[t]
    of_current = old is None or estimator != "sampled" or policy.get("advantage_policy") == "current"
    behaviour = scored[0].item() if of_current else old
    others = [0.0 if x is None else x.item() for x in scored[1:]]
    if policy.get("logprob_min") is not None:
        others = [max(x, policy["logprob_min"]) for x in others]
    adv = advantage(lam, behaviour, *others)
    bound, unbounded = policy.get("advantage_clip", math.inf), adv
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    if adv is not None:
        adv = min(max(adv, low), high)
    values["advantages"] = torch.tensor(0.0 if adv is None else adv, dtype=torch.float64)
    if estimator == "sampled":
        used = adv
        if policy.get("baseline") == "expected" and adv is not None:
            expected = _full_token(*rows, lam, "reverse_kl", 0.5, policy["made"])[0].item()
            used = min(max(unbounded + expected, low), high)
        if weight is not None and not in_trust_region(
            t, policy["groups"][t], policy["currents"], policy["rollouts"], used, policy
        ):
            weight = 0.0
        values["token_loss"] = _sampled_token(scored[0], adv, old, log_s, weight, policy)
        if policy.get("baseline") == "expected":
            # a model that the token's own lambda cancels is not looked at
            for name, cancelled_at in (("teacher", 0), ("ref", 1)):
                if lam == cancelled_at:
                    values[name] = torch.zeros((), dtype=torch.float64)
        if policy.get("baseline") == "expected" and adv is not None:
            # the gradient with the baseline, the value without
            term = _sampled_token(scored[0], used, old, log_s, weight, policy)
            values["token_loss"] = values["token_loss"].detach() + (term - term.detach())
            values["advantages"] = torch.tensor(used, dtype=torch.float64)
    return values


def row_statistics(
    z: Tensor, z_q: Tensor | None, z_r: Tensor | None, lam: float, divergence: str, parameter: float, token: int
) -> dict[str, float]:
    """The statistics that a row operation leaves for one row, straight from their definitions.

    z' is z less its maximum over the support; likewise q' and r'. u = lambda q' + (1 - lambda) r'. With p g the terms
    of a divergence, h = g - g' is their derivative with respect to log p, over p, and h~ is h less its value at p = t.
    """
    rows = {"STUDENT": z, "TEACHER": None if lam == 0 else z_q, "REF": None if lam == 1 else z_r}
    rows = {name: x for name, x in rows.items() if x is not None}
    inside = torch.stack([x != -math.inf for x in rows.values()]).all(0)
    out: dict[str, Any] = {}
    shifted = {}
    for name, x in rows.items():
        top = x[inside].max() if inside.any() else torch.tensor(0.0)
        shifted[name] = x[inside] - top
        out[f"MAX_{name}"] = top
        out[f"LOGSUM_{name}"] = shifted[name].logsumexp(-1)
        out[f"LOGIT_{name}"] = x[token] - top if inside[token] else -math.inf
    zs = shifted["STUDENT"]
    p = zs.softmax(-1)
    out["MEAN_LOGIT"] = (p * zs).sum()
    if len(rows) > 1 or z_q is not None or z_r is not None:
        u = lam * shifted.get("TEACHER", torch.zeros_like(zs)) + (1 - lam) * shifted.get("REF", torch.zeros_like(zs))
        t = u.softmax(-1)
        u = _in_range(u)
        top = u.max() if len(u) else torch.tensor(0.0)
        out["ORIGIN_TARGET"] = top if abs(top) > 64 else torch.tensor(0.0)
        out["LOGSUM_TARGET"], out["MEAN_GAP"] = (u - out["ORIGIN_TARGET"]).logsumexp(-1), (p * (zs - u)).sum()
        if divergence in ("forward_kl", "mixed"):
            out["VALUE"] = (t * (u - out["ORIGIN_TARGET"] - zs)).sum()
        elif divergence != "reverse_kl" and len(zs):

            def weighted(log_p: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
                """The sum of the terms, and p h."""
                log_p = log_p.detach().requires_grad_()
                value = divergence_terms(divergence, parameter, log_p, log_t, log_t).sum()
                return value.detach(), torch.autograd.grad(value, log_p)[0]

            log_p, log_t = _log_normalise(zs), _log_normalise(u)
            out["VALUE"], products = weighted(log_p, log_t)
            at_equal = weighted(log_p, log_p)[1] / log_p.exp()
            out["CENTRE"] = (products - log_p.exp() * at_equal).sum()
    return {k: float(v) for k, v in out.items()}


def token_stats(
    student: Any, teacher: Any, ref: Any, token_ids: Tensor | None = None, support: list[list[int]] | None = None
) -> dict[str, Tensor]:
    """Log-probs and entropies of each model alone, and KL(p || q), KL(p || r), (n,) float64 by their names.

    The divergences are over the joint support of the two models, or with ``support`` over the tokens that it lists for
    each position, and the rest of the vocabulary as one more outcome.
    """
    z = [logits_of(x).detach().reshape(-1, logits_of(x).shape[-1]) for x in (student, teacher, ref)]
    vocab = min(x.shape[-1] for x in z)
    p, q, r = (x[:, :vocab] for x in z)
    out = {}
    for name, x in (("student", p), ("teacher", q), ("ref", r)):
        out[f"{name}_entropy"] = torch.stack([_entropy(row) for row in x])
        if token_ids is not None:
            ids = token_ids.reshape(-1).tolist()
            out[f"{name}_logprobs"] = torch.stack([_token_logprob(row, i) for row, i in zip(x, ids, strict=True)])
    for name, other in (("kl_teacher", q), ("kl_ref", r)):
        values = []
        for t, (a, b) in enumerate(zip(p, other, strict=True)):
            if support is None:
                inside = (a != -math.inf) & (b != -math.inf)
                log_a, log_b = _log_normalise(a[inside]), _log_normalise(b[inside])
            else:
                log_a, log_b = (_with_rest(_log_normalise(x), support[t]) for x in (a, b))
            values.append((log_a.exp() * (log_a - log_b)).sum())
        out[name] = torch.stack(values)
    return out


def _with_rest(log_p: Tensor, tokens: list[int]) -> Tensor:
    listed = log_p[tokens]
    return torch.cat((listed, (1 - listed.exp().sum()).log()[None]))
