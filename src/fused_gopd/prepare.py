"""From a call to a problem: what takes several arguments together is checked here, before any work.

The rule of each argument alone is in :mod:`fused_gopd.options`. :func:`prepare` is shared by the fused loss and the
dense :mod:`fused_gopd.reference`, so that both accept and refuse the same input. Nothing here has a vocabulary axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .agreement import Agreement, agreement_of, shared_by
from .checks import (
    IGNORE,
    refuse,
    require_device,
    require_float,
    require_integer,
    require_logprobs,
    require_number,
    require_shape,
)
from .heads import Head, LinearHead, Logits, Source, TokenLogProbs, TopKLogProbs
from .loop.chunking import chunk_size_for, frozen_chunk_size, logits_buffers
from .models import (
    Models,
    as_tuple,
    check_shards,
    check_sources,
    dtype_of,
    frozen_heads,
    joint_vocab_size,
    named_models,
    needed_models,
    require_models,
    require_source,
    support_width,
    with_logits_dtype,
    zero_masked,
)
from .objective.divergences import make
from .objective.reductions import token_weights
from .objective.target import FROZEN
from .options import OPTIONS, PARAMETERS, LossCall, LossOptions, checked
from .problem import Problem, Route
from .rowops import RowOps, select_backend
from .server_scores import check_topk, scores_of
from .tokens import (
    Sequences,
    TokenRows,
    check_cu_seqlens,
    check_mask,
    host_sync_forbidden,
    live_rows,
    live_token_ids,
)

# ------------------------------------------------------------------------------- what follows from the arguments' kinds


def recomputes_in_backward(call: LossCall) -> bool:
    """Whether gradients are computed in the backward, from recomputed logits, and not with the loss.

    So they are where the weights of the tokens are known only then (reduction "none"), and where the ratios of whole
    sequences are known only when all chunks are through. A low-precision ``Logits`` student recomputes too: no GEMM is
    repeated by it, and the gradient, which is the size of all logits, is rounded once with all factors applied. So do
    float16 hidden states under ratios, importance weights, advantages or supervised weights of the caller's, which may
    be so large that a gradient without its token weight overflows.
    """
    if call.reduction == "none" or call.ratio == "sequence":
        return True
    dtype = call.student.rows.dtype
    if isinstance(call.student, Logits):
        return dtype in (torch.float16, torch.bfloat16)
    factors = (call.old_logprobs, call.rollout_logprobs, call.advantage_fn, call.sft_labels)
    return dtype == torch.float16 and any(x is not None for x in factors)


def reported_fields(call: LossCall) -> tuple[str, ...]:
    """The vectors of a call's output that are not None."""
    needed, sampled = needed_models(call), call.estimator == "sampled"
    known, scored = True, {}
    for name, _ in FROZEN:
        models = as_tuple(getattr(call, name))
        elsewhere = any(isinstance(model, TopKLogProbs) for model in models)
        counts = len(needed[name]) > 0
        known = known and not (elsewhere and counts)
        scored[name] = not elsewhere and (counts or (len(models) > 0 and call.score_cancelled))
    ids, labels = call.token_ids is not None, call.sft_labels is not None
    there = {
        "token_loss": True,
        "advantages": ids and (sampled or known),
        "student_logprobs": ids,
        "teacher_logprobs": ids and scored["teacher"],
        "ref_logprobs": ids and scored["ref"],
        "entropy": True,
        "kl": not sampled,
        "clipped": call.clips_ratio,
        "importance": call.rollout_logprobs is not None,
        "label_logprobs": labels,
        "labelled": labels,
        "reward_scale": isinstance(call.reward_scale, Tensor),
    }
    return tuple(name for name, is_there in there.items() if is_there)


# ------------------------------------------------------------------------------------------------------------- routes


def _check_routes(call: LossCall, sequences: Sequences, device: torch.device) -> tuple[int, Tensor | None]:
    """How many routes there are, and the route of every token in the token shape; None where all take the first."""
    index = call.teacher_index
    lengths = {name: len(x) for name, _ in FROZEN if isinstance(x := getattr(call, name), (list, tuple))}
    if "ref" in lengths and call.teacher is not None and lengths.get("teacher") != lengths["ref"]:
        raise ValueError(
            f"ref must be one model or a list of as many as teacher, got {lengths['ref']} and "
            f"{lengths.get('teacher', 'one model')}"
        )
    count = max(lengths.values(), default=1)
    if index is None:
        if count > 1:
            raise ValueError(f"teacher_index must be given for {count} teachers: which one each token has")
        return 1, None
    if not lengths:
        raise ValueError("teacher_index needs a list of teachers, got one model")
    require_integer("teacher_index", index)
    require_device("teacher_index", index, device)
    if index.shape == sequences.shape:
        return count, index
    if sequences.known and index.shape == (sequences.count,):
        return count, sequences.expand(index)
    raise ValueError(f"teacher_index must have {_shapes(sequences)}, got shape {tuple(index.shape)}")


def _in_route_order(rows: TokenRows, route: Tensor | None, count: int) -> tuple[TokenRows, list[tuple[int, int]]]:
    """The live rows sorted by route, and start and stop of every route among them."""
    if route is None:
        return rows, [(0, rows.count)]
    live = rows.take(route.to(torch.int64))
    # how many tokens each route has: one host sync, as for masked rows
    counts = (live == torch.arange(count, device=live.device)[:, None]).sum(1).tolist()
    if sum(counts) != rows.count:
        wrong = live[(live < 0) | (live >= count)]
        raise IndexError(
            f"teacher_index must be in [0, {count}), the list of teachers, where not masked, got {int(wrong[0])}"
        )
    slices = list(itertools.pairwise(itertools.accumulate(counts, initial=0)))
    if count == 1:
        return rows, slices
    index = torch.arange(rows.count, device=live.device) if rows.index is None else rows.index
    return TokenRows(rows.shape, index[torch.argsort(live, stable=True)]), slices


# ------------------------------------------------------------------------------------------------------------ vectors


def _shapes(sequences: Sequences) -> str:
    """The shapes that values per token or per sequence may have, in words."""
    per_sequence = f" or one value per sequence ({sequences.count},)" if sequences.known else ""
    return f"the token shape {tuple(sequences.shape)}{per_sequence}"


def _number_per_token(name: str, value: object, sequences: Sequences, device: torch.device) -> float | Tensor:
    """A Python float, or a tensor expanded to the token shape."""
    if not isinstance(value, Tensor):
        return require_number(name, value)
    require_float(name, value)
    require_device(name, value, device)
    value, shape = value.detach(), sequences.shape
    if value.shape == shape or value.ndim == 0:
        return value.expand(shape)
    if sequences.known and value.shape == (sequences.count,):
        return sequences.expand(value)
    raise ValueError(
        f"{name} must be a Python float, or a tensor of {_shapes(sequences)}, got shape {tuple(value.shape)}"
    )


def require_sequences(options: LossOptions, sequences: Sequences) -> None:
    """Ratios of whole sequences need to know them."""
    if options.ratio == "sequence" and not sequences.known:
        raise ValueError(
            f"ratio='sequence' needs a token shape (B, T) or cu_seqlens to tell sequences, got {tuple(sequences.shape)}"
        )


_TOKEN_TENSORS: tuple[tuple[str, Callable[[str, object], None]], ...] = (
    ("token_ids", require_integer),
    ("old_logprobs", require_float),
    ("rollout_logprobs", require_float),
    ("sft_labels", require_integer),
)


def _check_tokens(call: LossCall, options: LossOptions, sequences: Sequences, device: torch.device) -> None:
    """The tensors of the token shape, and the options that need them or sequences."""
    if options.score_cancelled and call.token_ids is None:
        raise ValueError("token_ids must be given for score_cancelled=True: it scores the sampled tokens")
    if options.estimator == "sampled" and call.token_ids is None:
        raise ValueError("token_ids must be given for estimator='sampled'")
    require_sequences(options, sequences)
    for name, require in _TOKEN_TENSORS:
        value = getattr(call, name)
        if value is not None:
            require(name, value)
            require_shape(name, value, sequences.shape, "student")
            require_device(name, value, device)


def _live_labels(labels: Tensor, vocab_size: int) -> Tensor:
    """(n,) int64 labels, -1 where there is none, from those of the live tokens."""
    live = labels.to(torch.int64).contiguous()
    wrong = ((live < 0) & (live != IGNORE)) | (live >= vocab_size)
    refuse(wrong, live, IndexError, f"sft_labels must be in [0, {vocab_size}), or {IGNORE} for none, where not masked")
    return live.masked_fill(live == IGNORE, -1)


def _check_scores(
    models: Models,
    given: Mapping[str, Mapping[str, Any]],
    rows: TokenRows,
    slices: list[tuple[int, int]],
    scale: float | Tensor,
) -> None:
    """The live log-probs of sampled tokens that teacher and reference bring, where lambda does not cancel them."""
    for name, cancelled_at in FROZEN:
        names = list(given[name]) * (len(slices) if len(given[name]) == 1 else 1)
        for label, model, (start, stop) in zip(names, models[name], slices, strict=False):
            if isinstance(model, TokenLogProbs):
                counts = scale[start:stop] != cancelled_at if isinstance(scale, Tensor) else None
                require_logprobs(f"{label}.logprobs", rows.take(model.logprobs.detach(), start, stop), counts)


def _sampled_logprobs(
    models: Sequence[Source], rows: TokenRows, slices: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """(n,) log-probs computed elsewhere, 0 in the rows of a route whose model is a head; None where all are."""
    if not any(isinstance(model, TokenLogProbs) for model in models):
        return None
    out = torch.zeros(rows.count, dtype=dtype, device=device)
    for model, (start, stop) in zip(models, slices, strict=True):
        if isinstance(model, TokenLogProbs):
            out[start:stop] = rows.take(model.logprobs.detach(), start, stop)
    return out


def _check_normalizer(
    call: LossCall, options: LossOptions, sequences: Sequences, device: torch.device
) -> Tensor | float | None:
    """The divisor of the means, and what sequences need."""
    reduction, lengths, normalizer = options.reduction, call.sequence_lengths, call.normalizer
    if reduction.startswith("seq-") and not sequences.known:
        raise ValueError(
            f"reduction={reduction!r} needs a token shape (B, T) or cu_seqlens to tell sequences, got "
            f"{tuple(sequences.shape)}"
        )
    if lengths is not None:
        if reduction != "seq-mean-token-mean":
            raise ValueError(f"sequence_lengths is an option of 'seq-mean-token-mean', got reduction={reduction!r}")
        if not isinstance(lengths, Tensor):
            raise TypeError(f"sequence_lengths must be a torch.Tensor, got {type(lengths).__name__}")
        if lengths.ndim and lengths.shape != (sequences.count,):
            raise ValueError(
                f"sequence_lengths must have shape ({sequences.count},), one per sequence, or be 0-d, got "
                f"{tuple(lengths.shape)}"
            )
        require_device("sequence_lengths", lengths, device)
    if normalizer is None:
        return None
    if reduction in ("sum", "none"):
        raise ValueError(f"normalizer is an option of the mean reductions, got reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be a number or one element, got shape {tuple(normalizer.shape)}")
        if normalizer.device.type == "cpu" and normalizer.item() < 0:
            raise ValueError(f"normalizer must not be negative, got {normalizer.item()}")
        return normalizer.detach()
    number = require_number("normalizer", normalizer)
    if number <= 0:
        raise ValueError(f"normalizer must be positive, got {number}")
    return number


def _check_lengths(lengths: Tensor, sequences: Sequences, mask: Tensor | None) -> None:
    """Global lengths of sequences are at least the number of live tokens that they have here."""
    live = torch.ones(sequences.shape, dtype=torch.bool, device=lengths.device) if mask is None else mask
    each = lengths.expand(sequences.count)
    message = "sequence_lengths must be at least the number of live tokens that each sequence has here"
    refuse(~(each >= sequences.sum(live)), each, ValueError, message)


def _check_no_host_sync(masked: bool, routed: bool, options: LossOptions, advantage_fn: object) -> None:
    """Refuse the options that cannot do without a value from the device."""
    needs = {
        "teacher_index": (routed, "how many tokens each teacher has"),
        "grad_filter": (bool(options.grad_filter), "which vocabulary entries are left"),
        "ratio='sequence' with mask": (masked and options.ratio == "sequence", "which rows are live"),
        "advantage_fn with mask": (masked and advantage_fn is not None, "which rows are live"),
    }
    for name, (given, what) in needs.items():
        if given:
            raise ValueError(
                f"{name} waits for the device to say {what}, which neither the capture of a CUDA graph nor the meta "
                "device allows; compute the loss outside the graph, or on packed tokens without a mask"
            )


# ------------------------------------------------------------------------------------------------------------ problem


def prepare(call: LossCall, ops: RowOps | None = None) -> Problem:
    """The problem of a call, after every check of its input; ``ops`` in place of those that ``backend`` chooses."""
    options, student = checked(call), call.student
    require_source("student", student, options.estimator)
    if options.grad_filter and not isinstance(student, LinearHead):
        raise ValueError("grad_filter needs a LinearHead as the student: with Logits there is no GEMM to save")
    shape, device = student.token_shape, student.rows.device
    given = {name: named_models(name, getattr(call, name)) for name, _ in FROZEN}
    frozen = given["teacher"] | given["ref"]
    check_sources(frozen, options, shape, device)
    sequences = check_cu_seqlens(call.cu_seqlens, shape, device)
    scale = _number_per_token("reward_scale", call.reward_scale, sequences, device)
    forward_weight = call.forward_weight
    if forward_weight is not None:
        forward_weight = _number_per_token("forward_weight", forward_weight, sequences, device)
    count, route = _check_routes(call, sequences, device)
    require_models(scale, given, call, options)
    _check_tokens(call, options, sequences, device)
    normalizer, mask = _check_normalizer(call, options, sequences, device), check_mask(call.mask, shape, device)
    if call.sequence_lengths is not None:
        _check_lengths(call.sequence_lengths, sequences, mask)
    vocab_size = joint_vocab_size({"student": student, **frozen}, options.vocab_size)
    cancelled = None if isinstance(scale, Tensor) else next((name for name, at in FROZEN if scale == at), None)
    # a single model is shared by all routes
    routed: Models = {name: tuple(x.values()) * (count if len(x) == 1 else 1) for name, x in given.items()}
    if options.score_cancelled and cancelled and any(isinstance(x, TopKLogProbs) for x in routed[cancelled]):
        raise TypeError(f"{cancelled} is TopKLogProbs, and score_cancelled=True needs a LinearHead or Logits")
    joint = options.joint
    if joint or options.estimator == "topk":
        together = "baseline='expected'" if options.estimator == "sampled" else f"estimator={options.estimator!r}"
        names = (name for name in frozen if name.split("[")[0] != cancelled)
        check_shards(student, {name: frozen[name] for name in names}, together, vocab_size)
    if host_sync_forbidden(device):
        _check_no_host_sync(mask is not None, route is not None, options, call.advantage_fn)
    rows, slices = _in_route_order(live_rows(mask, shape), route, count)
    keep = rows.keep
    if keep is not None:
        student = zero_masked(student, keep)
        routed = {name: tuple(zero_masked(model, keep) for model in models) for name, models in routed.items()}
    needed: Models = {name: () if name == cancelled else models for name, models in routed.items()}
    if options.estimator == "topk":
        check_topk(options, needed["teacher"], needed["ref"], vocab_size)
    dtype = dtype_of(call)

    def live(x: Tensor, masked: float = 0) -> Tensor:
        """(n, ...) of the live tokens; ``masked`` in the place of others where rows cannot be dropped."""
        return rows.take(x if keep is None else x.masked_fill(~keep, masked))

    def logprobs(name: str, x: Tensor | None, checks: bool) -> Tensor | None:
        if x is not None:
            x = live(x.detach()).to(dtype).contiguous()
            if checks:
                require_logprobs(name, x)
        return x

    ids, labels = call.token_ids, call.sft_labels
    if ids is not None:
        ids = ids if keep is None else ids.masked_fill(~keep, 0)
        ids = live_token_ids(ids, rows, vocab_size, mask is not None)
    if labels is not None:
        labels = _live_labels(live(labels, IGNORE), vocab_size)
    options = with_logits_dtype(options, dtype, {"student": student, **frozen})
    weights = token_weights(options.reduction, mask, sequences, normalizer, call.sequence_lengths, dtype, device)
    if keep is not None:
        weights = weights * keep
    scale = live(scale, 1).to(dtype).contiguous() if isinstance(scale, Tensor) else scale
    if isinstance(forward_weight, Tensor):
        forward_weight = live(forward_weight).to(dtype).contiguous()
        outside = ~((forward_weight >= 0) & (forward_weight <= 1))
        refuse(outside, forward_weight, ValueError, "forward_weight must be between 0 and 1 where not masked")
    # with an advantage_fn they are the denominator of a ratio only, which may be of the caller's own making
    old = logprobs("old_logprobs", call.old_logprobs, call.advantage_fn is None)
    rollout = logprobs("rollout_logprobs", call.rollout_logprobs, True)
    scored = routed if options.score_cancelled else needed
    _check_scores(scored, given, rows, slices, scale)
    server = scores_of(needed["teacher"], needed["ref"], rows, slices, scale, vocab_size)
    agreement: Agreement | None = None
    models = {"student": (student,) * count, **scored}
    shards = shared_by(models)
    if shards:
        values = {name: getattr(call, name) for name in OPTIONS} | {
            "student": student,
            "teacher": call.teacher,
            "ref": call.ref,
            "token_ids": ids,
            "teacher_index": None if route is None else rows.take(route),
            "mask": torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask,
            "reward_scale": scale,
            "forward_weight": forward_weight,
            "normalizer": normalizer,
            "sequence_lengths": call.sequence_lengths,
            "cu_seqlens": call.cu_seqlens,
            "old_logprobs": old,
            "rollout_logprobs": rollout,
            "advantage_fn": call.advantage_fn,
            "sft_labels": labels,
        }
        agreement = agreement_of(shards, values, models, rows, slices)

    def cut(head: Head) -> Head:
        """The columns of the joint vocabulary that this rank computes."""
        if head.shard is not None:
            return replace(head, shard=head.shard.within(vocab_size))
        if call.student.shard is not None and (joint or options.estimator == "topk"):
            return head.part(call.student.shard.within(vocab_size))
        return head

    student = cut(student)
    heads = {name: frozen_heads(x, cut) for name, x in needed.items()}
    chunk_size, frozen_size = _chunk_sizes(student, heads, options, vocab_size, options.logits_dtype(dtype).itemsize)
    parameters = {name: getattr(options, name) for name in PARAMETERS if name in OPTIONS}
    divergence = make(options.divergence, forward_weight=forward_weight, **parameters)
    routes = itertools.zip_longest(slices, heads["teacher"], heads["ref"])
    dtypes = {x.rows.dtype for x in (student, *heads["teacher"], *heads["ref"]) if x is not None}
    return Problem(
        options=options,
        divergence=divergence,
        student=student,
        routes=tuple(Route(start=start, stop=stop, teacher=q, ref=r) for (start, stop), q, r in routes),
        rows=rows,
        sequences=sequences,
        mask=mask,
        vocab_size=vocab_size,
        reward_scale=scale,
        token_ids=ids,
        old_logprobs=old,
        rollout_logprobs=rollout,
        teacher_logprobs=_sampled_logprobs(needed["teacher"], rows, slices, dtype, device),
        ref_logprobs=_sampled_logprobs(needed["ref"], rows, slices, dtype, device),
        support_ids=server.token_ids,
        teacher_topk=server.teacher,
        ref_topk=server.ref,
        labels=labels,
        weights=rows.take(weights).contiguous() if weights.ndim else weights,
        advantage_fn=call.advantage_fn,
        recomputes=recomputes_in_backward(call),
        width=support_width(call),
        reported=reported_fields(call),
        cancelled=((cancelled, routed[cancelled]),) if cancelled and options.score_cancelled else (),
        agreement=agreement,
        ops=select_backend(options.backend, device, dtypes, divergence if joint else None) if ops is None else ops,
        chunk_size=chunk_size,
        frozen_chunk_size=frozen_size,
        dtype=dtype,
        device=device,
    )


def _chunk_sizes(
    student: Head,
    frozen: Mapping[str, Sequence[Head | None]],
    options: LossOptions,
    vocab_size: int,
    element_bytes: int,
) -> tuple[int, int | None]:
    """Tokens per chunk, and those of the frozen models at a time where all models are taken together."""
    heads = [[student], *([head for head in x if head is not None] for x in frozen.values())]
    linear = sum(any(isinstance(head, LinearHead) for head in x) for x in heads)
    joint, linear_student = options.joint, isinstance(student, LinearHead)
    device_type, size = student.rows.device.type, options.chunk_size
    if size is None:
        buffers = logits_buffers(joint, linear, options.support == "student", linear_student, device_type)
        # of the rank that has the most: all of them go through the same chunks
        widest = max(vocab_size if x.shard is None else x.shard.largest for x in itertools.chain(*heads))
        size = chunk_size_for(widest, buffers, device_type, element_bytes)
    return size, frozen_chunk_size(size, device_type) if joint and linear_student and linear > 1 else None
