"""From a call to a problem: what takes several arguments together is checked here, before any work.

The rule of each argument alone is in :mod:`fused_gopd.options`. :func:`prepare` is shared by the fused loss and the
dense :mod:`fused_gopd.reference`, so that both accept and refuse the same input. Nothing here has a vocabulary axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .agreement import Agreement, agreement_of, shared_by
from .checks import IGNORE, refuse, require_device, require_logprobs
from .heads import Head, Source, TokenLogProbs, TopKLogProbs
from .models import Models, as_tuple, frozen_heads, named_members, named_models, zero_masked
from .objective.reductions import token_weights
from .objective.rollout import importance
from .objective.topk import with_sampled
from .options import ARGUMENTS, LossCall, LossOptions, Reduction
from .plan import (
    check_routes,
    chunk_sizes,
    divergence_of,
    number_per_token,
    plan_of,
    tensor_per_token,
    whole_sequences,
)
from .problem import FlatComposite, Problem, Route
from .rowops import FROZEN, RowOps, select_backend
from .server_scores import NO_SCORES, scores_of
from .targets import Composite, Frozen, Mixture
from .tokens import (
    LiveSequences,
    Sequences,
    TokenRows,
    check_cu_seqlens,
    check_mask,
    host_sync_forbidden,
    live_entries,
    live_rows,
    live_token_ids,
)
from .values import require_number
from .vocab_maps import check_rows

# ------------------------------------------------------------------------------------------------------------- routes


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


def live_labels(labels: Tensor, vocab_size: int, name: str = "sft_labels") -> Tensor:
    """(n,) int64 labels, -1 where there is none, from those of the live tokens."""
    live = labels.to(torch.int64).contiguous()
    wrong = ((live < 0) & (live != IGNORE)) | (live >= vocab_size)
    refuse(wrong, live, IndexError, f"{name} must be in [0, {vocab_size}), or {IGNORE} for none, where not masked")
    return live.masked_fill(live == IGNORE, -1)


def live_token_weight(
    given: Tensor, sequences: Sequences, rows: TokenRows, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(n,) token_weight of the live tokens, from one per token or sequence."""
    each = tensor_per_token("token_weight", given, sequences, device)
    weight = rows.take(each if rows.keep is None else each.masked_fill(~rows.keep, 0)).to(dtype).contiguous()
    wrong = ~((weight >= 0) & weight.isfinite())
    refuse(wrong, weight, ValueError, "token_weight must be finite and not negative where not masked")
    return weight


def _live_support(support: Tensor, rows: TokenRows, vocab_size: int) -> Tensor:
    """(n, K) int64 ids of the live tokens, each once at a position, -1 in the place of what is there again."""
    ordered = live_entries("support_ids", support, rows, vocab_size).sort(1).values
    again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return ordered.masked_fill(again, -1)


def _check_scores(
    models: Models,
    call: LossCall,
    rows: TokenRows,
    slices: list[tuple[int, int]],
    scale: float | Tensor,
) -> None:
    """The live log-probs of sampled tokens that teacher and reference bring, where lambda does not cancel them."""
    for name, cancelled_at in FROZEN:
        names = list(named_models(name, getattr(call, name)))
        names *= len(slices) if len(names) == 1 else 1
        for label, model, (start, stop) in zip(names, models[name], slices, strict=False):
            counts = scale[start:stop] != cancelled_at if isinstance(scale, Tensor) else None
            for part, scores in named_members({label: model}).items():
                own = _sampled_of(scores)
                if own is not None:
                    field = "logprobs" if isinstance(scores, TokenLogProbs) else "sampled_logprobs"
                    require_logprobs(f"{part}.{field}", rows.take(own.detach(), start, stop), counts)


def _sampled_logprobs(
    models: Sequence[Frozen], rows: TokenRows, slices: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """(n,) log-probs computed elsewhere, 0 in the rows of a route whose model is a head; None where all are.

    And where one is TopKLogProbs without them.
    """
    scores = [_sampled_of(model) for model in models]
    if all(x is None for x in scores) or any(
        x is None and isinstance(model, TopKLogProbs) for x, model in zip(scores, models, strict=True)
    ):
        return None
    out = torch.zeros(rows.count, dtype=dtype, device=device)
    for x, (start, stop) in zip(scores, slices, strict=True):
        if x is not None:
            out[start:stop] = rows.take(x.detach(), start, stop)
    return out


def _sampled_of(model: Frozen) -> Tensor | None:
    """(...) log-probs of the sampled tokens that a model brings."""
    if isinstance(model, TopKLogProbs):
        return model.sampled_logprobs
    return model.logprobs if isinstance(model, TokenLogProbs) else None


def _check_weight(model: Composite, weight: Tensor) -> None:
    """A weight (n,) of the live tokens."""
    wrong, least = ~weight.isfinite(), "finite"
    if isinstance(model, Mixture):
        wrong, least = wrong | (weight < 0), "finite and not negative"
    refuse(wrong, weight, ValueError, f"weights of {type(model).__name__} must be {least} where not masked")


def _scorable(
    models: Sequence[Frozen], flatten: Callable[[Composite], FlatComposite]
) -> tuple[Source | FlatComposite, ...]:
    """Models that lambda cancels, as :func:`fused_gopd.scoring.logprobs_under` takes them."""
    return tuple([flatten(model) if isinstance(model, Composite) else model for model in models])


def _weights_of(models: Sequence[object]) -> Tensor | None:
    """The weights of routes' models that are tensors, as one vector."""
    made = [weight for model in models if isinstance(model, FlatComposite) for weight in model.weights]
    tensors = [weight for weight in made if isinstance(weight, Tensor)]
    return torch.cat(tensors) if tensors else None


def check_normalizer(
    normalizer: object, lengths: object, reduction: Reduction, sequences: Sequences, device: torch.device
) -> Tensor | float | None:
    """The divisor of the means, and what sequences need; ``lengths`` are sequence_lengths."""
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


def check_lengths(lengths: Tensor, sequences: Sequences, mask: Tensor | None) -> None:
    """Global lengths of sequences are at least the number of live tokens that they have here."""
    live = torch.ones(sequences.shape, dtype=torch.bool, device=lengths.device) if mask is None else mask
    each = lengths.expand(sequences.count)
    message = "sequence_lengths must be at least the number of live tokens that each sequence has here"
    refuse(~(each >= sequences.sum(live)), each, ValueError, message)


def check_no_host_sync(
    masked: bool,
    routed: bool,
    options: LossOptions,
    advantage_fn: object,
    reward_scale_fn: object = None,
    sequences: str | None = None,
) -> None:
    """Refuse the options that cannot do without a value from the device."""
    needs = {
        "teacher_index": (routed, "how many tokens each teacher has"),
        "grad_filter": (bool(options.grad_filter), "which vocabulary entries are left"),
        f"{sequences} with mask": (masked and sequences is not None, "which rows are live"),
        "advantage_fn with mask": (masked and advantage_fn is not None, "which rows are live"),
        "reward_scale_fn with mask": (masked and reward_scale_fn is not None, "which rows are live"),
    }
    for name, (given, what) in needs.items():
        if given:
            raise ValueError(
                f"{name} waits for the device to say {what}, which neither the capture of a CUDA graph nor the meta "
                "device allows; compute the loss outside the graph, or on packed tokens without a mask"
            )


# ------------------------------------------------------------------------------------------------------------ problem


def prepare(call: LossCall, ops: RowOps | None = None, weight_gradient: bool | None = None) -> Problem:
    """The problem of a call, after every check of its input; ``ops`` in place of those that ``backend`` chooses.

    ``weight_gradient`` is whether the student's weight has one, where its tensor does not say so: inside an op.
    """
    plan, student = plan_of(call), call.student
    options, vocab_size, cancelled, dtype = plan.options, plan.vocab_size, plan.cancelled, plan.dtype
    shape, device = student.token_shape, student.rows.device
    sequences = plan.sequences if call.cu_seqlens is None else check_cu_seqlens(call.cu_seqlens, shape, device)
    scale = number_per_token("reward_scale", call.reward_scale, sequences, device)
    forward_weight = call.forward_weight
    if isinstance(forward_weight, Tensor):
        forward_weight = number_per_token("forward_weight", forward_weight, sequences, device)
    route = None if call.teacher_index is None else check_routes(call, sequences, device)[1]
    normalizer = check_normalizer(call.normalizer, call.sequence_lengths, options.reduction, sequences, device)
    mask = check_mask(call.mask, shape, device)
    if call.sequence_lengths is not None:
        check_lengths(call.sequence_lengths, sequences, mask)
    if host_sync_forbidden(device):
        functions = call.advantage_fn, call.reward_scale_fn
        check_no_host_sync(mask is not None, route is not None, options, *functions, whole_sequences(call))
    if plan.has_map:
        given = named_models("teacher", call.teacher) | named_models("ref", call.ref)
        check_rows(named_members(given), vocab_size)
    rows, slices = _in_route_order(plan.rows if mask is None else live_rows(mask, shape), route, plan.routes)
    # a single model is shared by all routes
    routed: Models = {
        name: models * (plan.routes if len(models) == 1 else 1)
        for name, models in (("teacher", as_tuple(call.teacher)), ("ref", as_tuple(call.ref)))
    }
    keep = rows.keep
    if keep is not None:
        student = zero_masked(student, keep)
        routed = {name: tuple(zero_masked(model, keep) for model in models) for name, models in routed.items()}
    needed: Models = {name: models if name in plan.needed else () for name, models in routed.items()}

    def live(x: Tensor, masked: float = 0) -> Tensor:
        """(n, ...) of the live tokens; ``masked`` in the place of others where rows cannot be dropped."""
        return rows.take(x if keep is None else x.masked_fill(~keep, masked))

    def logprobs(name: str, x: Tensor, checks: bool) -> Tensor:
        x = live(x.detach()).to(dtype).contiguous()
        if checks:
            require_logprobs(name, x)
        return x

    ids, labels = call.token_ids, call.sft_labels
    if ids is not None:
        ids = ids if keep is None else ids.masked_fill(~keep, 0)
        ids = live_token_ids(ids, rows, vocab_size, mask is not None)
    if labels is not None:
        labels = live_labels(live(labels, IGNORE), vocab_size)
    support_ids = None if call.support_ids is None else _live_support(call.support_ids, rows, vocab_size)
    weights = token_weights(options.reduction, mask, sequences, normalizer, call.sequence_lengths, dtype, device)
    if keep is not None:
        weights = weights * keep
    weights = rows.take(weights).contiguous() if weights.ndim else weights
    token_weight = call.token_weight
    if token_weight is not None:
        token_weight = live_token_weight(token_weight, sequences, rows, dtype, device)
        weights = weights * token_weight
    scale = live(scale, 1).to(dtype).contiguous() if isinstance(scale, Tensor) else scale
    if isinstance(forward_weight, Tensor):
        forward_weight = live(forward_weight).to(dtype).contiguous()
        outside = ~((forward_weight >= 0) & (forward_weight <= 1))
        refuse(outside, forward_weight, ValueError, "forward_weight must be between 0 and 1 where not masked")
    # with an advantage_fn they are the denominator of a ratio only, which may be of the caller's own making
    old, rollout = call.old_logprobs, call.rollout_logprobs
    old = None if old is None else logprobs("old_logprobs", old, call.advantage_fn is None)
    rollout = None if rollout is None else logprobs("rollout_logprobs", rollout, True)
    weighs = None
    if rollout is not None and old is not None and not plan.kernel_importance:
        weighs = importance(options, old, rollout, LiveSequences(rows, sequences))
    scored = routed if options.score_cancelled else needed
    server = NO_SCORES
    teacher_logprobs = ref_logprobs = None
    if plan.scores_elsewhere:
        _check_scores(scored, call, rows, slices, scale)
        sampled = ids if options.tail == "sampled" else None
        server = scores_of(needed["teacher"], needed["ref"], rows, slices, scale, vocab_size, sampled)
        teacher_logprobs, ref_logprobs = (
            _sampled_logprobs(needed[name], rows, slices, dtype, device) for name in ("teacher", "ref")
        )

    cuts = plan.sharded or plan.has_map
    together = None  # the columns of this rank of all models that are taken together
    if call.student.shard is not None and (options.joint or options.estimator == "topk"):
        together = call.student.shard.within(vocab_size)

    def cut(head: Head) -> Head:
        """The columns of the joint vocabulary that this rank computes."""
        if head.vocab_map is not None:
            return replace(head, vocab_map=head.vocab_map[:vocab_size])
        if head.shard is not None:
            return replace(head, shard=head.shard.within(vocab_size))
        return head if together is None else head.part(together)

    def flatten(model: Composite) -> FlatComposite:
        """A model made of several on the live tokens, without those that have the weight 0."""
        heads, scores, weights = [], [], []
        for part, weight in model.weighed:
            heads += frozen_heads([part], cut if cuts else None)
            scores.append(logprobs("", part.logprobs, False) if isinstance(part, TokenLogProbs) else None)
            if isinstance(weight, Tensor):
                each = number_per_token("weights", weight, sequences, device)
                assert isinstance(each, Tensor)
                weight = live(each, 1).to(dtype).contiguous()
                _check_weight(model, weight)
            weights.append(weight)
        return FlatComposite(
            heads=tuple(heads),
            logprobs=tuple(scores),
            weights=tuple(weights),
            mixture=isinstance(model, Mixture),
            shard=together,
        )

    heads = {name: frozen_heads(x, cut if cuts else None, flatten) for name, x in needed.items()}
    agreed_ids = support_ids  # those of a server are compared with its scores
    if support_ids is None:
        support_ids = server.token_ids
    elif options.tail == "sampled":
        assert ids is not None
        support_ids = with_sampled(support_ids, ids)
    agreement: Agreement | None = None
    if plan.sharded:
        models = {"student": (student,) * plan.routes, **scored}
        shards = shared_by(models)
        if shards:
            values = {name: getattr(call, name) for name in ARGUMENTS} | {
                "student": student,
                "token_ids": ids,
                "teacher_index": None if route is None else rows.take(route),
                "mask": torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask,
                "reward_scale": scale,
                "forward_weight": forward_weight,
                "token_weight": token_weight,
                "normalizer": normalizer,
                "old_logprobs": old,
                "rollout_logprobs": rollout,
                "sft_labels": labels,
                "support_ids": agreed_ids,
            }
            values |= {f"{name}.weights": _weights_of(x) for name, x in heads.items()}
            agreement = agreement_of(shards, values, models, rows, slices)
    if plan.sharded:
        student = cut(student)
    sizes = plan.chunk_sizes
    if sizes is None or weight_gradient is not None:
        sizes = chunk_sizes(student, heads, options, vocab_size, dtype, weight_gradient)
    divergence = plan.divergence
    if divergence is None:
        divergence = divergence_of(options, forward_weight)
    routes = itertools.zip_longest(slices, heads["teacher"], heads["ref"])
    if ops is None:
        ops = select_backend(options.backend, device, plan.dtypes, divergence if options.joint else None)
    if options.store_exponentials and ops.name != "triton":
        raise ValueError(f"store_exponentials needs backend='triton', got {ops.name!r}")
    return Problem(
        options=options,
        divergence=divergence,
        student=student,
        routes=tuple([Route(start=start, stop=stop, teacher=q, ref=r) for (start, stop), q, r in routes]),
        rows=rows,
        sequences=sequences,
        mask=mask,
        vocab_size=vocab_size,
        reward_scale=scale if call.reward_scale_fn is None else None,
        reward_scale_fn=call.reward_scale_fn,
        has_composite=plan.has_composite,
        has_terms=plan.has_terms,
        has=plan.has,
        token_ids=ids,
        old_logprobs=old,
        rollout_logprobs=rollout,
        importance=weighs,
        teacher_logprobs=teacher_logprobs,
        ref_logprobs=ref_logprobs,
        support_ids=support_ids,
        teacher_topk=server.teacher,
        ref_topk=server.ref,
        labels=labels,
        weights=weights,
        advantage_fn=call.advantage_fn,
        has_loss_factors=rollout is not None or options.loss_max is not None,
        slope_follows=plan.slope_follows,
        recomputes=plan.recomputes,
        width=plan.width,
        reported=plan.reported,
        cancelled=((cancelled, _scorable(routed[cancelled], flatten)),)
        if cancelled and options.score_cancelled and scored[cancelled]
        else (),
        agreement=agreement,
        ops=ops,
        chunk_size=sizes[0],
        frozen_chunk_size=sizes[1],
        dtype=dtype,
        device=device,
    )
