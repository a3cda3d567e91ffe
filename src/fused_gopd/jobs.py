"""From checked input to a job of the loop, and from the job's statistics to the output. Nothing here differentiates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .autograd.core import recomputes_in_backward
from .checks import require_count, require_reverse_mode
from .heads import Head, LinearHead, Logits, Source, TopKLogProbs, require_kind
from .loop.chunking import chunk_size_for, frozen_chunk_size, logits_buffers
from .loop.estimators.base import TokenValues, model_logprobs
from .objective.divergences import ReverseKL, make
from .objective.policy import advantage
from .objective.statistics import TokenRow, entropy
from .objective.supervised import label_report
from .options import Estimator, LossOptions
from .output import GOPDOutput
from .prepare import Prepared, prepare
from .problem import Problem, Route
from .rowops import select_backend
from .tokens import TokenRows


def _heads(models: tuple[Source, ...], p: Prepared) -> list[Head | None]:
    """What has a vocabulary axis among the models, one a route; detached: only the student receives gradients.

    Where the student's vocabulary is shared among ranks and models are looked at together, each rank takes the same
    columns of all.
    """
    heads: list[Head | None] = [None] * len(p.stops)
    for i, model in enumerate(models):
        if isinstance(model, (LinearHead, Logits)):
            detached: dict[str, Any] = {name: t.detach() for name, t in model.tensors.items()}
            heads[i] = _cut(replace(model, **detached), p)
    return heads


def _cut(head: Head, p: Prepared) -> Head:
    """A head with a shard that ends where the joint vocabulary does."""
    if head.shard is not None:
        return replace(head, shard=head.shard.within(p.vocab_size))
    if p.student.shard is not None and (p.joint or p.estimator == "topk"):
        return head.part(p.student.shard.within(p.vocab_size))
    return head


def make_problem(p: Prepared) -> Problem:
    student = _cut(p.student, p)
    teachers, refs = (_heads(models, p) for models in (p.teacher, p.ref))
    kinds = ([student], teachers, refs)
    dtypes = {head.rows.dtype for heads in kinds for head in heads if head is not None}
    linear = sum(any(isinstance(head, LinearHead) for head in heads) for heads in kinds)
    device_type, linear_student = p.device.type, isinstance(student, LinearHead)
    buffers = logits_buffers(p.joint, linear, p.truncation.support == "student", linear_student, device_type)
    # of the rank that has the most: all of them go through the same chunks
    widest = max(
        p.vocab_size if head.shard is None else head.shard.largest
        for heads in kinds
        for head in heads
        if head is not None
    )
    divergence = make(p.divergence, beta=p.beta)
    chunk_size = p.chunk_size or chunk_size_for(widest, buffers, device_type, (p.chunk_dtype or p.dtype).itemsize)
    listed = 0 if p.scores.token_ids is None else p.scores.token_ids.shape[1]
    s = p.surrogate
    unbounded = any(x is not None for x in (p.old_logprobs, p.rollout_logprobs, p.advantage_fn, p.labels))
    recomputes = recomputes_in_backward(student, s.ratio, unbounded)
    return Problem(
        options=LossOptions(
            estimator=p.estimator,
            clip=s.clip,
            clip_dual=s.clip_dual,
            ratio=s.ratio,
            rollout_is_cap=s.rollout_is_cap,
            advantage_clip=s.advantage_clip,
            logprob_min=s.logprob_min,
            baseline=s.baseline,
            k=p.truncation.k,
            support=p.truncation.support,
            tail=p.truncation.tail,
            sft_weight=p.sft_weight,
            chunk_dtype=p.chunk_dtype,
            grad_filter=p.grad_filter,
        ),
        divergence=divergence,
        student=student,
        routes=tuple(
            Route(start=start, stop=stop, teacher=teacher, ref=ref)
            for (start, stop), teacher, ref in zip(p.slices, teachers, refs, strict=True)
        ),
        rows=p.rows,
        sequences=p.sequences,
        vocab_size=p.vocab_size,
        reward_scale=p.reward_scale,
        token_ids=p.token_ids,
        teacher_logprobs=p.logprobs(p.teacher),
        ref_logprobs=p.logprobs(p.ref),
        old_logprobs=p.old_logprobs,
        rollout_logprobs=p.rollout_logprobs,
        advantage_fn=p.advantage_fn,
        support_ids=p.scores.token_ids,
        teacher_topk=p.scores.teacher,
        ref_topk=p.scores.ref,
        labels=p.labels,
        weights=p.weights,
        recomputes=recomputes,
        width=max(p.truncation.k or 0, listed) + (p.labels is not None),
        agreement=p.agreement,
        ops=select_backend(p.backend, p.device, dtypes, divergence if p.joint else None),
        chunk_size=chunk_size,
        frozen_chunk_size=frozen_chunk_size(chunk_size, device_type)
        if p.joint and linear_student and linear > 1
        else None,
        dtype=p.dtype,
        device=p.device,
    )


def _score_alone(models: tuple[Source, ...], problem: Problem, p: Prepared) -> Tensor:
    """log-probs (n,) of the sampled tokens under models that the loss does not need, forward only."""
    given = p.logprobs(models)
    out = torch.zeros(p.rows.count, dtype=p.dtype, device=p.device) if given is None else given
    assert p.token_ids is not None
    for head, (start, stop) in zip(_heads(models, p), p.slices, strict=True):
        if head is not None:
            rows = p.rows
            if len(p.stops) > 1:
                assert rows.index is not None
                rows = TokenRows(rows.shape, rows.index[start:stop])
            ops = select_backend(p.backend, p.device, {head.rows.dtype})
            alone = Problem(
                options=LossOptions(),
                divergence=ReverseKL(),
                student=head,
                routes=(Route(start=0, stop=rows.count),),
                rows=rows,
                sequences=p.sequences,
                vocab_size=p.vocab_size,
                token_ids=p.token_ids[start:stop],
                weights=p.weights,
                recomputes=True,
                ops=ops,
                chunk_size=problem.chunk_size,
                dtype=p.dtype,
                device=p.device,
            )
            out[start:stop] = autograd.token_logprobs(alone)[0]
    return out


def make_output(
    p: Prepared, problem: Problem, loss: Tensor, values: TokenValues, statistics: Tensor, score_cancelled: bool
) -> GOPDOutput:
    """Everything that a call reports, from the loop's statistics."""
    with torch.no_grad():
        term = values.policy
        advantages: Tensor | None = None
        student_logprobs: Tensor | None = None
        others: dict[str, Tensor | None] = {"teacher": None, "ref": None}
        if problem.token_ids is not None:
            student_logprobs, others["teacher"], others["ref"] = model_logprobs(problem, statistics)
            unknown = False
            for name, models in (("teacher", p.teacher), ("ref", p.ref)):
                if any(isinstance(model, TopKLogProbs) for model in models):
                    others[name], unknown = None, True
            if term is not None:
                advantages = term.advantages
            elif not unknown:
                advantages, _ = advantage(problem.reward_scale, student_logprobs, *others.values())
            if score_cancelled:
                for name, models in p.cancelled.items():
                    others[name] = _score_alone(models, problem, p)
        return p.output(
            loss,
            values.loss,
            advantages,
            student_logprobs,
            others["teacher"],
            others["ref"],
            entropy(statistics),
            values.kl,
            None if term is None else term.clipped,
            None if term is None else term.importance,
            *label_report(statistics[TokenRow.LOGPROB_LABEL], problem.labels),
        )


def prepare_alone(head: Head, token_ids: Tensor | None, **options: Any) -> Prepared:
    """Checked input of a call with one model."""
    require_kind("head", head)
    require_reverse_mode("token_logprobs" if token_ids is not None else "token_topk", head)
    # the reference is not looked at beyond its shape: lambda = 0 with the model itself makes a loss's call complete
    estimator: Estimator = "full" if token_ids is None else "sampled"
    p = prepare(head, None, head, token_ids, reward_scale=0.0, estimator=estimator, reduction="none", **options)
    return replace(p, estimator="sampled", ref=())


def most_likely(head: Head, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of the k most likely tokens: see :func:`fused_gopd.token_topk`."""
    p = prepare_alone(head, None, **options)
    if require_count("k", k) > p.vocab_size:
        raise ValueError(f"k must be at most the vocabulary of {p.vocab_size}, got {k}")
    ids, logprobs = autograd.token_topk(make_problem(p), k)
    if p.rows.keep is None:
        return ids, logprobs
    gone = ~p.rows.keep[..., None]
    return ids.masked_fill(gone, -1), logprobs.masked_fill(gone, 0)
