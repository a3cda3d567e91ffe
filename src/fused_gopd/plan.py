"""What the kinds, shapes, dtypes and options of a call decide, whatever numbers its tensors hold.

Checked once and kept: a training step makes the same call as the one before. What depends on the numbers (ids in range,
masks, log-probs) is checked in :mod:`fused_gopd.prepare`, every time.
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import require_device, require_entries, require_float, require_integer, require_shape
from .heads import Head, LinearHead, Logits, TokenLogProbs, TopKLogProbs
from .loop.chunking import chunk_size_for, frozen_chunk_size, logits_buffers
from .loop.gemm import accumulates_low_precision
from .models import (
    as_tuple,
    cancelled_model,
    check_shards,
    check_sources,
    dtype_of,
    heads_of,
    joint_vocab_size,
    named_members,
    named_models,
    needed_models,
    require_models,
    require_source,
    support_width,
    with_logits_dtype,
)
from .objective.divergences import Divergence, make
from .objective.rollout_statistics import of_sequences
from .option_checks import checked
from .options import DEFAULTS, LossCall, LossOptions
from .problem import FlatComposite
from .rowops import FROZEN
from .server_scores import check_topk
from .targets import Composite, Frozen, LogLinear, Mixture
from .tokens import Sequences, TokenRows, check_cu_seqlens
from .values import require_number


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """The part of a :class:`fused_gopd.problem.Problem` that calls of one signature share."""

    options: LossOptions  # in their normal form
    routes: int  # how many lists of one model each there are; 1 without a list of teachers
    vocab_size: int  # joint
    needed: tuple[str, ...]  # "teacher", "ref": given, and needed by the loss or a term
    cancelled: str | None  # "teacher" or "ref", where lambda is a number that cancels it and nothing else scores it
    recomputes: bool
    slope_follows: bool
    kernel_importance: bool  # whether the row operation of a policy makes the importance weights
    width: int
    reported: tuple[str, ...]
    scores_elsewhere: bool  # whether a model is TokenLogProbs or TopKLogProbs
    sharded: bool  # whether a model has a part of the vocabulary
    chunk_sizes: tuple[int, int | None] | None  # see :func:`chunk_sizes`; None where a rank's columns decide
    dtype: torch.dtype  # of accumulation
    dtypes: set[torch.dtype]  # of the hidden states and logits of student and needed models
    has_terms: bool  # beside the loss, see :func:`has_terms`
    has_map: bool  # whether a frozen model has a vocab_map
    has_composite: bool  # whether a teacher or reference that is needed is made of several models
    has: tuple[bool, bool]  # a teacher, a reference: heads, or log-probs of the sampled tokens
    sequences: Sequences  # without cu_seqlens
    rows: TokenRows  # without a mask
    divergence: Divergence | None  # None where its parameter is a tensor


def _planned(call: LossCall) -> Plan:
    options, student = checked(call), call.student
    require_source("student", student, options.estimator)
    if options.grad_filter and not isinstance(student, LinearHead):
        raise ValueError("grad_filter needs a LinearHead as the student: with Logits there is no GEMM to save")
    if options.store_exponentials:
        _check_exponentials(call)
    shape, device = student.token_shape, student.rows.device
    given = {name: named_models(name, getattr(call, name)) for name, _ in FROZEN}
    frozen = named_members(given["teacher"] | given["ref"])
    check_sources(frozen, options, shape, device)
    sequences = check_cu_seqlens(call.cu_seqlens, shape, device)
    scale = number_per_token("reward_scale", call.reward_scale, sequences, device)
    forward_weight = call.forward_weight
    if forward_weight is not None:
        forward_weight = number_per_token("forward_weight", forward_weight, sequences, device)
    if call.token_weight is not None:
        tensor_per_token("token_weight", call.token_weight, sequences, device)
    for name, model in (given["teacher"] | given["ref"]).items():
        if isinstance(model, Composite):
            for i, weight in enumerate(model.weights):
                number_per_token(f"{name}.weights[{i}]", weight, sequences, device)
    count, _ = check_routes(call, sequences, device)
    require_models(scale, given, call, options)
    _check_tokens(call, options, sequences, device)
    vocab_size = joint_vocab_size({"student": student, **frozen}, options.vocab_size)
    cancelled, needed = cancelled_model(call), needed_models(call)
    if options.score_cancelled and cancelled and any(isinstance(x, TopKLogProbs) for x in given[cancelled].values()):
        raise TypeError(f"{cancelled} is TopKLogProbs, and score_cancelled=True needs a LinearHead or Logits")
    unread = tuple([name for name, models in needed.items() if not models])
    counting = {name: x for name, x in frozen.items() if not name.startswith(unread)}
    if options.joint or options.estimator == "topk":
        together = "baseline='expected'" if options.estimator == "sampled" else f"estimator={options.estimator!r}"
        check_shards(student, counting, together, vocab_size)
    _check_vocab_map(counting, options, call)
    if options.estimator == "topk":
        # a single model is shared by all routes
        routed = {name: x * (count if len(x) == 1 else 1) for name, x in needed.items()}
        check_topk(options, routed["teacher"], routed["ref"], vocab_size, call.support_ids is not None)
    dtype = dtype_of(call)
    options = with_logits_dtype(options, dtype, {"student": student, **frozen})
    models = (student, *frozen.values())
    sharded = any(isinstance(model, (LinearHead, Logits)) and model.shard is not None for model in models)
    return Plan(
        options=options,
        routes=count,
        vocab_size=vocab_size,
        needed=tuple([name for name, models in needed.items() if models]),
        # a reference that a KL penalty of ``sampled`` needs is scored with the others
        cancelled=None if options.estimator == "sampled" and cancelled and needed[cancelled] else cancelled,
        recomputes=recomputes_in_backward(call),
        slope_follows=slope_follows(call),
        kernel_importance=options.estimator == "sampled" and options.plain_importance,
        width=support_width(call),
        reported=reported_fields(call),
        scores_elsewhere=any(not isinstance(model, (LinearHead, Logits)) for model in models),
        sharded=sharded,
        chunk_sizes=None if sharded else chunk_sizes(student, needed, options, vocab_size, dtype),
        dtype=dtype,
        dtypes={x.rows.dtype for x in heads_of([student, *needed["teacher"], *needed["ref"]])},
        has_terms=has_terms(call),
        has_map=any(getattr(model, "vocab_map", None) is not None for model in frozen.values()),
        has_composite=any(isinstance(model, Composite) for models in needed.values() for model in models),
        has=(_scores_tokens(needed["teacher"]), _scores_tokens(needed["ref"]) and cancelled != "ref"),
        sequences=Sequences(shape),
        rows=TokenRows(shape),
        divergence=None if isinstance(forward_weight, Tensor) else divergence_of(options, forward_weight),
    )


def divergence_of(options: LossOptions, forward_weight: float | Tensor | None) -> Divergence:
    return make(
        options.divergence, forward_weight=forward_weight, beta=options.beta, alpha=options.alpha, skew=options.skew
    )


def _scores_tokens(models: Sequence[Frozen]) -> bool:
    """Whether these models give the sampled tokens log-probs."""
    return any(not _without_sampled(model) for model in models)


def _without_sampled(model: Frozen) -> bool:
    """Whether a model has no log-prob of the sampled token."""
    return isinstance(model, TopKLogProbs) and model.sampled_logprobs is None


# ------------------------------------------------------------------------------------------------------------- checks


def _check_vocab_map(needed: Mapping[str, Any], options: LossOptions, call: LossCall) -> None:
    """Raise where a token without a row would be worth more than one that a model finds unlikely, or be no label."""
    mapped = next((name for name, model in needed.items() if getattr(model, "vocab_map", None) is not None), None)
    if mapped is None:
        return
    if options.joint and call.sft_labels is not None and options.sft_temperature is None:
        together = "baseline='expected'" if options.estimator == "sampled" else f"estimator={options.estimator!r}"
        raise ValueError(
            f"sft_temperature must be given for sft_labels and {together}, since {mapped} has a vocab_map: the models "
            "are compared over the tokens that all of them have, and a label without a row would add nothing. With "
            f"sft_temperature={call.student.temperature:g} labels are scored over all of the student's vocabulary"
        )
    if options.joint or options.logprob_min is not None:
        return
    chosen = {
        "estimator='sampled'": options.estimator == "sampled",
        "tail='sampled'": options.tail == "sampled",
        "support='student'": options.support == "student",
        "support_ids": call.support_ids is not None,
    }
    what = next((name for name, is_chosen in chosen.items() if is_chosen), None)
    if what is not None:
        raise ValueError(
            f"logprob_min must be given for {what}, since {mapped} has a vocab_map: a token without a row would add "
            "nothing, where unlikely ones are penalised, and the student would learn to say such tokens. With "
            "logprob_min=-20 it is as unlikely as that"
        )


def _check_exponentials(call: LossCall) -> None:
    """Raise where the gradient of ``store_exponentials`` is not the one that is asked for."""
    student = call.student
    if not isinstance(student, LinearHead) or student.hidden.dtype != torch.bfloat16:
        found = type(student).__name__ if isinstance(student, Logits) else f"hidden states of {student.rows.dtype}"
        raise ValueError(
            f"store_exponentials needs a LinearHead with bfloat16 hidden states as the student, got {found}"
        )
    refused = {
        "a softcap": student.softcap is not None,
        "a shard of the vocabulary": student.shard is not None,
        "baseline='expected'": call.baseline == "expected",
        "grad_filter": bool(call.grad_filter),
        "chunk_dtype": call.chunk_dtype is not None,
        "sft_labels": call.sft_labels is not None,
        "entropy_weight": call.entropy_weight != 0,
        "kl_ref": call.kl_ref != "none",
        "reduction='none'": call.reduction == "none",
        f"{whole_sequences(call)}": whole_sequences(call) is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"store_exponentials has no gradient for {name}: leave one of them out")


def recomputes_in_backward(call: LossCall) -> bool:
    """Whether gradients are computed in the backward, from recomputed logits, and not with the loss.

    So they are where the weights of the tokens are known only then (reduction "none"), and where the ratios of whole
    sequences are known only when all chunks are through. A low-precision ``Logits`` student recomputes too: no GEMM is
    repeated by it, and the gradient, which is the size of all logits, is rounded once with all factors applied. So do
    float16 hidden states under ratios, importance weights, advantages, token or supervised weights of the caller's,
    which may be so large that a gradient without its weight overflows, or that beside one of them others underflow.
    """
    if call.reduction == "none" or whole_sequences(call) is not None:
        return True
    factors = (call.old_logprobs, call.rollout_logprobs, call.advantage_fn, call.sft_labels, call.token_weight)
    return gradient_waits(call.student, has_terms(call) or any(x is not None for x in factors))


def has_terms(call: LossCall) -> bool:
    """Whether there are terms beside the loss, but for labels at the student's temperature."""
    return call.entropy_weight != 0 or call.kl_ref != "none" or call.sft_temperature is not None


def gradient_waits(student: Head, factors: bool) -> bool:
    """Whether the dtype of the student needs the upstream gradient first; ``factors``: token weights may be large."""
    dtype = student.rows.dtype
    if isinstance(student, Logits):
        return dtype in (torch.float16, torch.bfloat16)
    return dtype == torch.float16 and factors


def whole_sequences(call: LossCall) -> str | None:
    """The option that needs the current policy's log-probs of whole sequences, written as in a call; None without one.

    These log-probs are known after the last chunk. With old log-probs importance weights do not need them.
    """
    if call.ratio in ("sequence", "sequence-mean"):
        return f"ratio={call.ratio!r}"
    if call.trust_region is not None and of_sequences(call.trust_region):
        return "trust_region of whole sequences"
    known = call.rollout_logprobs is None or call.old_logprobs is not None
    return None if known else call.sequence_importance


def slope_follows(call: LossCall) -> bool:
    """Whether the factor of a token's logit gradient is made by PyTorch, from the statistics of its chunk."""
    current = call.rollout_logprobs is not None and call.old_logprobs is None
    if call.estimator == "full":
        return current or call.loss_max is not None
    if call.estimator == "topk":
        return False
    unknown_to_kernels = (
        call.baseline != "none"
        or call.advantage_fn is not None
        or call.reward_scale_fn is not None
        or call.advantage_policy != "old"
        or call.trust_region is not None
        or call.log_ratio_max is not None
        or call.loss_max is not None
        or call.kl_ref != "none"
        or call.ratio in ("detached", "none")
    )
    return unknown_to_kernels or (current and not call.plain_importance)


def reported_fields(call: LossCall) -> tuple[str, ...]:
    """The vectors of a call's output that are not None."""
    needed, sampled = needed_models(call), call.estimator == "sampled"
    known, scored = True, {}
    for name, _ in FROZEN:
        models = as_tuple(getattr(call, name))
        elsewhere = any(map(_without_sampled, models))
        counts = len(needed[name]) > 0
        if name == "ref" == cancelled_model(call) and call.kl_ref == "exact":
            counts = False  # its row pass scores no sampled token
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
        "kl": not sampled and call.tail != "sampled",
        "kl_ref": call.kl_ref == "exact",
        "clipped": call.clips,
        "importance": call.rollout_logprobs is not None,
        "label_logprobs": labels,
        "labelled": labels,
        "teacher_index": call.teacher_index is not None,
        "reward_scale": isinstance(call.reward_scale, Tensor) or call.reward_scale_fn is not None,
    }
    return tuple(name for name, is_there in there.items() if is_there)


def check_routes(call: LossCall, sequences: Sequences, device: torch.device) -> tuple[int, Tensor | None]:
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


def _shapes(sequences: Sequences) -> str:
    """The shapes that values per token or per sequence may have, in words."""
    per_sequence = f" or one value per sequence ({sequences.count},)" if sequences.known else ""
    return f"the token shape {tuple(sequences.shape)}{per_sequence}"


def number_per_token(name: str, value: object, sequences: Sequences, device: torch.device) -> float | Tensor:
    """A Python float, or a tensor expanded to the token shape."""
    if not isinstance(value, Tensor):
        return require_number(name, value)
    return tensor_per_token(name, value, sequences, device, "a Python float, or ")


def tensor_per_token(
    name: str, value: Tensor, sequences: Sequences, device: torch.device, alternative: str = ""
) -> Tensor:
    """A tensor expanded to the token shape; ``alternative`` is what else the message says the argument may be."""
    require_float(name, value)
    require_device(name, value, device)
    value, shape = value.detach(), sequences.shape
    if value.shape == shape or value.ndim == 0:
        return value.expand(shape)
    if sequences.known and value.shape == (sequences.count,):
        return sequences.expand(value)
    raise ValueError(f"{name} must be {alternative}a tensor of {_shapes(sequences)}, got shape {tuple(value.shape)}")


def check_ratios(call: LossCall, options: LossOptions, sequences: Sequences) -> None:
    """What options of ratios and importance weights need of the batch."""
    name = whole_sequences(call) or (None if call.rollout_logprobs is None else options.sequence_importance)
    if name is not None and not sequences.known:
        raise ValueError(
            f"{name} needs a token shape (B, T) or cu_seqlens to tell sequences, got {tuple(sequences.shape)}"
        )
    if options.log_ratio_max is not None and call.old_logprobs is None and call.rollout_logprobs is None:
        raise ValueError(
            "log_ratio_max needs old_logprobs or rollout_logprobs: without them there is no ratio to bound"
        )
    beside = "sft_labels" if call.sft_labels is not None else "entropy_weight" if call.entropy_weight else None
    if name is not None and options.estimator == "topk" and call.old_logprobs is None and beside is not None:
        raise ValueError(
            f"{name} with {beside} and estimator='topk' needs old_logprobs: the gradient of the "
            "tokens is made before the weights of the current policy are known"
        )


_TOKEN_TENSORS: tuple[tuple[str, Callable[[str, object], None]], ...] = (
    ("token_ids", require_integer),
    ("old_logprobs", require_float),
    ("rollout_logprobs", require_float),
    ("sft_labels", require_integer),
)


def _check_tokens(call: LossCall, options: LossOptions, sequences: Sequences, device: torch.device) -> None:
    """The tensors of the token shape, and the options that need them or sequences."""
    need_ids = {
        "score_cancelled=True: it scores the sampled tokens": options.score_cancelled,
        "estimator='sampled'": options.estimator == "sampled",
        "tail='sampled'": options.tail == "sampled",
        "rollout_logprobs, which are those of the sampled tokens": call.rollout_logprobs is not None,
    }
    for what, needs in need_ids.items():
        if needs and call.token_ids is None:
            raise ValueError(f"token_ids must be given for {what}")
    check_ratios(call, options, sequences)
    support = call.support_ids
    if support is not None:
        require_integer("support_ids", support)
        require_device("support_ids", support, device)
        require_entries("support_ids", support, sequences.shape, "student")
    for name, require in _TOKEN_TENSORS:
        value = getattr(call, name)
        if value is not None:
            require(name, value)
            require_shape(name, value, sequences.shape, "student")
            require_device(name, value, device)


# -------------------------------------------------------------------------------------------------------- chunk sizes


_COMPOSITES = (Composite, FlatComposite)


def chunk_sizes(
    student: Head,
    frozen: Mapping[str, Sequence[Frozen | FlatComposite | None]],  # those without a vocabulary axis have no buffer
    options: LossOptions,
    vocab_size: int,
    dtype: torch.dtype,  # of accumulation
    weight_gradient: bool | None = None,  # None: as the weight says
) -> tuple[int, int | None]:
    """Tokens per chunk, and those of the frozen models at a time where they are taken in sub-chunks."""
    heads = [[student], *map(heads_of, frozen.values())]
    joint = options.joint
    # a model that is made of several has a buffer for their sum; all such share one for the logits of one of them
    made = [any(isinstance(x, _COMPOSITES) and heads_of([x]) for x in models) for models in frozen.values()]
    own = [any(isinstance(head, LinearHead) or head.vocab_map is not None for head in x) for x in heads]
    linear = sum(map(max, own, [False, *made])) + (joint and any(made))
    two = options.support == "student" or (any(made) and options.estimator == "topk")
    if weight_gradient is None:
        weight_gradient = isinstance(student, LinearHead) and student.weight.requires_grad
    device_type, size = student.rows.device.type, options.chunk_size
    if size is None:
        buffers = logits_buffers(joint, linear, two, weight_gradient, device_type)
        buffers += min(2, len(options.passes))  # a sum of gradients, and one more to be added
        # of the rank that has the most: all of them go through the same chunks
        widest = max([vocab_size if x.shard is None else x.shard.largest for x in itertools.chain(*heads)])
        # a model that is not taken together with the student has all its own logits in a buffer
        alone = [x for models in frozen.values() for x in models if not joint or isinstance(x, _COMPOSITES)]
        widest = max([widest, *[x.own_size for x in heads_of(alone) if x.vocab_map is not None]])
        # stored exponentials are widened where products with them want float32
        stored = options.store_exponentials and accumulates_low_precision(student.rows)
        element_bytes = 2 if stored else options.logits_dtype(dtype).itemsize
        size = chunk_size_for(widest, buffers, device_type, element_bytes)
    return size, frozen_chunk_size(size, device_type) if joint and weight_gradient and linear > 1 else None


# --------------------------------------------------------------------------------------------------------- signatures

_plans: collections.OrderedDict[Hashable, Plan] = collections.OrderedDict()
_KEPT = 256

# Numbers that change from step to step, of which a plan reads no more than whether lambda cancels a model.
_CHANGING = ("reward_scale", "normalizer")
_NUMBERS = frozenset({bool, int, float, str, type(None), torch.dtype})


def plan_of(call: LossCall) -> Plan:
    """The plan of a call, made anew only for a signature that has not been seen among the last ones."""
    key = _signature(call)
    plan = None if key is None else _plans.get(key)
    if plan is None:
        plan = _planned(call)
        if key is not None:
            _plans[key] = plan
            if len(_plans) > _KEPT:
                _plans.popitem(last=False)
    return plan


def _signature(call: LossCall) -> Hashable | None:
    """All that :func:`_planned` reads of a call; None where it is of a kind that is not kept (a shared vocabulary)."""
    key: list[Any] = []
    given = vars(call)  # in the order of DEFAULTS: that of the fields
    for name, value in itertools.compress(given.items(), map(operator.is_not, given.values(), DEFAULTS.values())):
        key.append(name)
        kind = type(value)
        if kind is float and name in _CHANGING:
            key.append(value if name == "reward_scale" and value in (0.0, 1.0) else kind)
        elif kind in _NUMBERS:
            key += (kind, value)  # 1, 1.0 and True are one key
        elif isinstance(value, Tensor):
            key += _meta(value)
        elif kind in (list, tuple):
            for x in value:
                if not _append(key, x):
                    return None
            key.append(len(value))
        elif not _append(key, value):
            return None
    return tuple(key)


def _meta(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.layout, x.is_nested


def _append(key: list[Any], value: Any) -> bool:
    """Add a model, a function or an item of a list to a signature; False for what signatures do not describe.

    Of a head only what its own checks leave open: all its tensors are dense, and on one device.
    """
    kind = type(value)
    if kind in _NUMBERS:
        key += (kind, value)
        return True
    if kind is LinearHead:
        hidden, weight, bias, vocab_map = value.hidden, value.weight, value.bias, value.vocab_map
        key += (kind, hidden.shape, hidden.dtype, hidden.device, weight.shape, weight.dtype, weight.requires_grad)
        key += (None if bias is None else bias.dtype, None if vocab_map is None else _meta(vocab_map))
        key.append(value.softcap is None)  # store_exponentials has none
        return value.shard is None
    if kind is Logits:
        logits, vocab_map = value.logits, value.vocab_map
        key += (kind, logits.shape, logits.dtype, logits.device, None if vocab_map is None else _meta(vocab_map))
        return value.shard is None
    if kind is TokenLogProbs:
        key += (kind, *_meta(value.logprobs))
        return True
    if kind is TopKLogProbs:
        sampled = value.sampled_logprobs
        key += (kind, *_meta(value.token_ids), *_meta(value.logprobs), None if sampled is None else _meta(sampled))
        return True
    if kind is LogLinear or kind is Mixture:
        key += (kind, len(value.models))
        for weight in value.weights:
            key += _meta(weight) if isinstance(weight, Tensor) else (weight == 0,)
        return all(_append(key, model) for model in value.models)
    if callable(value):
        key.append(callable)
        return True
    if kind in (dict, tuple, list):  # statistics and their bounds
        key += (kind, len(value))
        return all(_append(key, x) for x in (value.items() if kind is dict else value))
    return False
