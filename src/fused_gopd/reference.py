"""Dense G-OPD in plain PyTorch: what the fused loss computes, written out, and the naive baseline.

Holds all [tokens, vocabulary] tensors and lets autograd differentiate. In float64 it is an oracle; in a model's own
dtype it is what a trainer does without this package: logits in that dtype, upcast, log-softmax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import Head, LinearHead, Logits, Source, TokenLogProbs, TopKLogProbs
from .loop.gemm import without_autocast
from .objective.policy import advantage, call_hook
from .objective.supervised import label_report
from .objective.target import bounded, mix
from .options import AdvantageFn, Baseline, Estimator, Ratio, Reduction, Support, Tail, TokenStats
from .output import GOPDOutput
from .prepare import Prepared, prepare


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
        gone = z == -math.inf
        # masked before and after tanh: its own gradient at -inf is fine, a later where's is not
        z = (head.softcap * torch.tanh(z.masked_fill(gone, 0) / head.softcap)).masked_fill(gone, -math.inf)
    return z / head.temperature if head.temperature != 1.0 else z


def _all_finite(*logits: Tensor | None) -> bool:
    """Whether no masking is needed. By sums: a baseline without -inf pays for no [tokens, V] mask."""
    return all(bool(torch.isfinite(z.detach().sum())) for z in logits if z is not None)


def _log_softmax(z: Tensor, support: Tensor | None) -> Tensor:
    """Over the support (None is everything); -inf outside it, and 0 gradients (not NaN) for a row without any."""
    if support is None:
        return z.log_softmax(-1)
    empty = ~support.any(-1, keepdim=True)
    # log_softmax would give -inf, a token of probability 0, beside a +inf: that row is NaN
    infinite = (support & (z == math.inf)).any(-1, keepdim=True)
    # added, not filled in: so that the gradient is NaN too
    poison = torch.zeros_like(z[:, :1]).masked_fill(infinite, math.nan).detach()
    inside = z.masked_fill(~support, -math.inf).masked_fill(empty, 0) + poison
    return inside.log_softmax(-1).masked_fill(empty, -math.inf)


def _own_log_softmax(z: Tensor) -> Tensor:
    """Of one model on its own, over its own support."""
    return _log_softmax(z, None if _all_finite(z) else z != -math.inf)


def _gather(logp: Tensor, ids: Tensor) -> Tensor:
    return logp.gather(-1, ids[:, None])[:, 0]


def _live_logits(p: Prepared, models: tuple[Source, ...], columns: list[tuple[int, int]]) -> Tensor | None:
    """(n, V) logits of the live tokens, each under the model of its route; None without a vocabulary axis."""
    if not models or any(isinstance(model, (TokenLogProbs, TopKLogProbs)) for model in models):
        return None
    parts = []
    for model, (start, stop) in zip(models, columns, strict=True):
        assert isinstance(model, (LinearHead, Logits))
        flat = logits_of(model, p.vocab_size, p.dtype).reshape(-1, p.vocab_size)
        parts.append(flat if p.rows.index is None else flat.index_select(0, p.rows.index[start:stop]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _scores(p: Prepared, models: tuple[Source, ...], ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """log-probs (n,) of the live tokens and entropies, each under the model of its route alone; None where unknown."""
    if not models or ids is None or any(isinstance(model, TopKLogProbs) for model in models):
        return None, None
    scores, entropies = [], []
    for model, (start, stop) in zip(models, p.slices, strict=True):
        if isinstance(model, TokenLogProbs):
            scores.append(p.rows.take(model.logprobs, start, stop).to(p.dtype).detach())
            continue
        z = _live_logits(p, (model,), [(start, stop)])
        assert z is not None
        log_p = _own_log_softmax(z)
        scores.append(_gather(log_p, ids[start:stop]))
        entropies.append(_entropy(log_p))
    return torch.cat(scores), torch.cat(entropies) if len(entropies) == len(scores) else None


def _full(
    p: Prepared, z: Tensor, z_q: Tensor | None, z_r: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Token loss, KL(p || target) and the three log-distributions, over the joint support."""
    lam, divergence, beta = p.reward_scale, p.divergence, p.beta
    column = lam[:, None] if isinstance(lam, Tensor) else lam
    support: Tensor | None = None
    if not _all_finite(z, z_q, z_r):
        support = z != -math.inf
        for other, cancelled_at in ((z_q, 0.0), (z_r, 1.0)):
            if other is not None:
                gone = other == -math.inf
                support = support & ~(gone & (column != cancelled_at) if isinstance(column, Tensor) else gone)

    def other_logp(other: Tensor | None, cancelled_at: float) -> Tensor | None:
        if other is None:
            return None
        if isinstance(column, Tensor) and support is not None:
            other = other.masked_fill(column == cancelled_at, 0)
        return _log_softmax(other, support)

    def inside(x: Tensor) -> Tensor:
        """0 outside the support, before any arithmetic that would make a NaN there."""
        return x if support is None else x.masked_fill(~support, 0)

    log_p, log_q, log_r = _log_softmax(z, support), other_logp(z_q, 0.0), other_logp(z_r, 1.0)
    mixed = mix(column, *(None if x is None else inside(x) for x in (log_q, log_r)))
    lowest, highest = torch.finfo(mixed.dtype).min, torch.finfo(mixed.dtype).max
    # log_softmax takes it relative to its maximum, and may leave the finite range
    log_p_in, log_t = inside(log_p), inside(_log_softmax(mixed, support).clamp_(min=lowest))
    prob = inside(log_p_in.exp())
    with torch.no_grad():  # reported only: autograd would keep its [tokens, V] terms
        kl = (prob * (log_p_in - log_t)).sum(-1)
    if divergence == "reverse_kl":
        gap = log_p_in - mixed
        # where the student has a mask as well it may be infinite, times a probability of 0; by a sum, as in _all_finite
        value = (prob * (gap if bool(torch.isfinite(gap.detach().sum())) else gap.clamp(lowest, highest))).sum(-1)
    elif divergence == "forward_kl":
        value = (inside(log_t.exp()) * (log_t - log_p_in)).sum(-1)
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_p_in + math.log1p(-beta))
        value = beta * (inside(log_t.exp()) * (log_t - log_m)).sum(-1)
        value = value + (1 - beta) * (prob * (log_p_in - log_m)).sum(-1)
    return value, kl, log_p, log_q, log_r


def _at(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of some tokens, -inf where the id is -1."""
    return log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -math.inf)


class _Seen(NamedTuple):
    """What topk sees of a position."""

    token_ids: Tensor  # (n, K), -1 where there are fewer
    teacher: Tensor | None  # (n, K) log-probs there
    ref: Tensor | None
    poisoned: Tensor  # (n,) bool, NaN anywhere in a model that counts


def _on_support(p: Prepared, log_p: Tensor) -> _Seen:
    k = p.truncation.k or 0
    parts: list[tuple[Tensor, list[Tensor | None]]] = []
    poisoned = torch.isnan(log_p).any(1)
    for i, (start, stop) in enumerate(p.slices):
        ids = log_p[start:stop].topk(k).indices if p.truncation.support == "student" else None
        scores: list[Tensor | None] = []
        for models, given, cancelled_at in ((p.teacher, p.scores.teacher, 0.0), (p.ref, p.scores.ref, 1.0)):
            if not models:
                scores.append(None)
            elif isinstance(models[i], TopKLogProbs):
                assert p.scores.token_ids is not None
                assert given is not None
                ids = p.scores.token_ids[start:stop] if ids is None else ids
                scores.append(given[start:stop].to(p.dtype).masked_fill(ids < 0, -math.inf))
            else:
                z = _live_logits(p, (models[i],), [(start, stop)])
                assert z is not None
                log_m = _own_log_softmax(z)
                ids = log_m.topk(k).indices if ids is None else ids
                scores.append(_at(log_m, ids))
                counts = p.reward_scale[start:stop] != cancelled_at if isinstance(p.reward_scale, Tensor) else True
                poisoned[start:stop] |= torch.isnan(log_m).any(1) & counts
        assert ids is not None
        parts.append((ids, scores))
    width = max(ids.shape[1] for ids, _ in parts)

    def together(tensors: list[Tensor | None], missing: float) -> Tensor | None:
        wide = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=missing) for x in tensors if x is not None]
        return torch.cat(wide) if wide else None

    ids = together([ids for ids, _ in parts], -1)
    assert ids is not None
    teacher, ref = (together([scores[j] for _, scores in parts], -math.inf) for j in range(2))
    return _Seen(ids, teacher, ref, poisoned)


def _topk(p: Prepared, lp: Tensor, lq: Tensor | None, lr: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token loss and KL(p || target) over the tokens of the support, log-probs (n, K) each, and the bucket."""
    lam = p.reward_scale[:, None] if isinstance(p.reward_scale, Tensor) else p.reward_scale
    every = torch.ones_like(lp[:, :1], dtype=torch.bool)
    used = [(x, every & (lam != cancelled)) for x, cancelled in ((lq, 0.0), (lr, 1.0)) if x is not None]
    inside = lp.detach() != -math.inf
    for x, needed in used:
        inside = inside & ~((x == -math.inf) & needed)

    def with_bucket(x: Tensor) -> Tensor:
        """log-probs of the tokens and of the bucket, or of the tokens over their mass; 0 where it is outside."""
        listed, empty = x.masked_fill(~inside, 0), ~inside.any(1, keepdim=True)
        x = x.masked_fill(~inside, -math.inf)
        if p.truncation.tail == "renormalize":
            return (listed - x.masked_fill(empty, 0).logsumexp(1, keepdim=True)).masked_fill(~inside, 0)
        rest = 1 - x.exp().sum(1, keepdim=True)
        return torch.cat((listed, rest.where(~(rest.detach() < 1e-6), 1).log()), 1)

    log_p, log_q, log_r = (None if x is None else with_bucket(x) for x in (lp, lq, lr))
    assert log_p is not None
    if p.truncation.tail != "renormalize":
        bucket = every
        for x, needed in [(lp.detach(), every), *used]:
            rest = 1 - x.masked_fill(~inside, -math.inf).exp().sum(1, keepdim=True)
            bucket = bucket & ~((rest < 1e-6) & needed)
        inside = torch.cat((inside, bucket), 1)
    log_p, mixed = log_p.masked_fill(~inside, 0), mix(lam, log_q, log_r).masked_fill(~inside, 0)
    empty = ~inside.any(1, keepdim=True)

    def normalised(x: Tensor) -> Tensor:
        within = x.masked_fill(~inside, -math.inf).masked_fill(empty, 0)
        top = within.detach().amax(1, keepdim=True)
        return (x - top) - (within - top).logsumexp(1, keepdim=True)

    log_t = bounded(normalised(mixed))
    prob, target = (torch.where(inside, x.exp(), 0) for x in (log_p, log_t))
    with torch.no_grad():  # over the outcomes that there are, as one distribution
        whole = normalised(log_p)
        kl = torch.where(inside, whole.exp() * (whole - log_t), 0).sum(1)
    counted = inside.clone()
    if p.truncation.tail == "drop":
        counted[:, -1] = False
    if p.divergence == "reverse_kl":
        terms = prob * bounded(log_p - mixed)
    elif p.divergence == "forward_kl":
        terms = target * (log_t - log_p)
    else:
        log_m = torch.logaddexp(log_t + math.log(p.beta), log_p + math.log1p(-p.beta))
        terms = p.beta * target * (log_t - log_m) + (1 - p.beta) * prob * (log_p - log_m)
    return torch.where(counted, terms, 0).sum(1), kl


def _advantages(
    p: Prepared,
    lp: Tensor,
    lq: Tensor | None,
    lr: Tensor | None,
    entropy: Tensor,
    teacher_entropy: Tensor | None,
    ref_entropy: Tensor | None,
    expected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The advantages that the gradient uses and those that the loss reports, without the baseline."""
    s = p.surrogate
    if s.logprob_min is not None:
        lq, lr = (None if x is None else x.clamp_min(s.logprob_min) for x in (lq, lr))
    behaviour = lp if p.old_logprobs is None else p.old_logprobs
    advantages: Tensor | None = None
    if lq is not None or lr is not None:
        advantages, finite = advantage(p.reward_scale, behaviour, lq, lr)
    if p.advantage_fn is not None:
        index = torch.arange(p.rows.shape.numel(), device=lp.device) if p.rows.index is None else p.rows.index
        stats = TokenStats(
            index=index,
            advantages=advantages,
            student_logprobs=lp,
            teacher_logprobs=lq,
            ref_logprobs=lr,
            old_logprobs=p.old_logprobs,
            student_entropy=entropy,
            teacher_entropy=teacher_entropy,
            ref_entropy=ref_entropy,
            reward_scale=p.reward_scale,
        )
        advantages, finite = call_hook(p.advantage_fn, stats), ~torch.isneginf(behaviour)
    assert advantages is not None
    used = advantages if expected is None else advantages + expected
    low, high = s.advantage_clip or (-math.inf, math.inf)
    return torch.where(finite, used.clamp(low, high), 0), torch.where(finite, advantages.clamp(low, high), 0)


def _surrogate(p: Prepared, lp: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token loss, for autograd to differentiate, where a clip is in force, and importance weight."""
    s = p.surrogate
    behaviour = lp.detach() if p.old_logprobs is None else p.old_logprobs
    nothing = advantages == 0  # no loss, whatever it is multiplied by
    if s.ratio == "token":
        # masked before any arithmetic: a NaN behind a where has a NaN gradient
        log_ratio = torch.where(nothing, 0, lp) - torch.where(nothing, 0, behaviour)
    else:
        known = ~(torch.isneginf(lp) | torch.isneginf(behaviour)).detach()
        own = torch.where(known, lp, 0) - torch.where(known, behaviour, 0)
        # sequence by sequence, written out: the fused loss has its own way of summing
        bounds, T = p.sequences.cu_seqlens, p.sequences.shape[1:].numel()
        starts = [i * T for i in range(p.sequences.count + 1)] if bounds is None else bounds.tolist()
        live = torch.arange(p.rows.shape.numel(), device=lp.device) if p.rows.index is None else p.rows.index
        mean = torch.zeros_like(own)
        for start, stop in itertools.pairwise(starts):
            inside = (live >= start) & (live < stop)
            if inside.any():
                mean = torch.where(inside, own[inside].mean(), mean)
        log_ratio = torch.where(nothing, 0, mean.detach() + own - own.detach())
    ratio = log_ratio.exp()
    unclipped = loss = -advantages * ratio
    if s.clip is not None:
        low, high = s.clip
        loss = torch.maximum(loss, -advantages * ratio.clamp(1 - low, 1 + high))
    if s.clip_dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * s.clip_dual), loss)
    clipped, importance = (loss.detach() - unclipped.detach()).abs() > 0, None  # NaN is not a clip
    if p.rollout_logprobs is not None:
        importance = torch.where(torch.isneginf(behaviour), 0, behaviour - p.rollout_logprobs).exp()
        importance = importance.clamp_max(math.inf if s.rollout_is_cap is None else s.rollout_is_cap)
        loss = loss * torch.where(nothing, 0, importance)
    return loss, clipped, importance


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * torch.where(log_p == -math.inf, 0, log_p)).sum(-1)


def gopd_loss(
    student: Head,
    teacher: Source | Sequence[Source] | None,
    ref: Source | Sequence[Source] | None = None,
    token_ids: Tensor | None = None,
    *,
    teacher_index: Tensor | None = None,
    mask: Tensor | None = None,
    reward_scale: float | Tensor = 1.0,
    estimator: Estimator = "sampled",
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    k: int | None = None,
    support: Support = "teacher",
    tail: Tail = "bucket",
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    sequence_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    rollout_is_cap: float | None = None,
    clip: tuple[float, float] | None = None,
    clip_dual: float | None = None,
    ratio: Ratio = "token",
    advantage_clip: float | tuple[float, float] | None = None,
    logprob_min: float | None = None,
    baseline: Baseline = "none",
    advantage_fn: AdvantageFn | None = None,
    sft_labels: Tensor | None = None,
    sft_weight: float = 1.0,
    score_cancelled: bool = False,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    chunk_dtype: torch.dtype | None = None,
    grad_filter: float = 0.0,
    backend: str = "auto",
) -> GOPDOutput:
    """:func:`fused_gopd.gopd_loss` in dense PyTorch: same arguments, same result, [tokens, V] memory.

    ``chunk_size``, ``chunk_dtype``, ``grad_filter`` and ``backend`` choose how the fused loss computes and have nothing
    to choose here.
    """
    p = prepare(**locals())
    for model in (p.student, *p.teacher, *p.ref, *itertools.chain(*p.cancelled.values())):
        if isinstance(model, (LinearHead, Logits)) and model.shard is not None:
            raise ValueError("the dense reference takes whole heads: gather the weights, got one with a shard")
    z = _live_logits(p, (p.student,), [(0, p.rows.count)])
    assert z is not None
    kl = lp = lq = lr = None
    entropies: tuple[Tensor | None, Tensor | None] = (None, None)
    if p.joint:
        with torch.no_grad():
            z_q, z_r = (_live_logits(p, models, p.slices) for models in (p.teacher, p.ref))
        token_loss, kl, log_p, log_q, log_r = _full(p, z, z_q, z_r)
        if p.token_ids is not None:
            ids = p.token_ids
            lq, lr = (None if x is None else _gather(x, ids) for x in (log_q, log_r))
            if isinstance(p.reward_scale, Tensor):
                # per token too a model that lambda cancels is not looked at: no log-prob, which is 0
                assert lq is not None
                assert lr is not None
                lq, lr = lq.masked_fill(p.reward_scale == 0, 0), lr.masked_fill(p.reward_scale == 1, 0)
    else:
        log_p = _own_log_softmax(z)
        with torch.no_grad():
            (lq, first), (lr, second) = (_scores(p, models, p.token_ids) for models in (p.teacher, p.ref))
        entropies = first, second
        if estimator == "topk":
            with torch.no_grad():
                seen = _on_support(p, log_p)
            token_loss, kl = _topk(p, _at(log_p, seen.token_ids), seen.teacher, seen.ref)
            # NaN is seen wherever it stands, also in a row of which nothing is looked at
            bad = seen.poisoned
            token_loss = torch.where(bad, z.masked_fill(~bad[:, None], 0).sum(1) * math.nan, token_loss)
            kl = kl.masked_fill(bad, math.nan)
    entropy = _entropy(log_p.detach())
    advantages = clipped = importance = None
    if p.token_ids is not None:
        lp = _gather(log_p, p.token_ids)
        if estimator == "sampled":
            with torch.no_grad():
                expected = token_loss.detach() if p.joint else None
                advantages, reported = _advantages(p, lp.detach(), lq, lr, entropy, *entropies, expected)
                value, _, _ = _surrogate(p, lp, reported)
            token_loss, clipped, importance = _surrogate(p, lp, advantages)
            if baseline == "expected":  # the gradient with it, the value without
                token_loss = value + (token_loss - token_loss.detach())
            kl = None
        elif not any(isinstance(model, TopKLogProbs) for model in (*p.teacher, *p.ref)):
            advantages, _ = advantage(p.reward_scale, lp.detach(), lq, lr)
    labelled: tuple[Tensor | None, Tensor | None] = (None, None)
    if p.labels is not None:
        label_logprobs = log_p.gather(1, p.labels.clamp_min(0)[:, None])[:, 0]
        labelled = label_report(label_logprobs.detach(), p.labels)
        assert labelled[1] is not None
        token_loss = token_loss - p.sft_weight * torch.where(labelled[1], label_logprobs, 0)
    loss = p.rows.scatter(token_loss) if reduction == "none" else (token_loss * p.weights).sum()
    with torch.no_grad():
        if score_cancelled:
            for name, models in p.cancelled.items():
                scored, _ = _scores(p, models, p.token_ids)
                lq, lr = (scored, lr) if name == "teacher" else (lq, scored)
    return p.output(loss, token_loss, advantages, lp, lq, lr, entropy, kl, clipped, importance, *labelled)
