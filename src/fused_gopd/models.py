"""The models of a call: which kinds an estimator takes, which lambda needs, and how they share a vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .checks import require_device
from .heads import Head, LinearHead, Logits, TokenLogProbs, TopKLogProbs, require_kind
from .loop import gemm
from .options import Estimator, LossCall, LossOptions
from .problem import FlatComposite
from .rowops import FROZEN
from .rowops.torch import accumulation_dtype
from .targets import Composite, Frozen
from .vocab_maps import refuse_vocab_map

Models = dict[str, tuple[Frozen, ...]]  # "teacher" and "ref", one model for each route; none where none is needed


def as_tuple(models: Any) -> tuple[Frozen, ...]:
    return () if models is None else tuple(models) if isinstance(models, (list, tuple)) else (models,)


def heads_of(models: Sequence[Frozen | FlatComposite | None]) -> list[Head]:
    """Those with a vocabulary axis, each of a model that is made of several but those with the weight 0."""
    heads: list[Head] = []
    for model in models:
        if isinstance(model, FlatComposite):
            heads += [head for head in model.heads if head is not None]
        elif isinstance(model, Composite):
            heads += heads_of([x for x, _ in model.weighed])
        elif isinstance(model, (LinearHead, Logits)):
            heads.append(model)
    return heads


def cancelled_model(call: LossCall) -> str | None:
    """ "teacher" or "ref", where lambda is a number that makes its coefficient 0."""
    scale = call.reward_scale
    if call.reward_scale_fn is not None or isinstance(scale, Tensor):
        return None
    return next((name for name, cancelled_at in FROZEN if scale == cancelled_at), None)


def needed_models(call: LossCall) -> Models:
    """Teachers and references that lambda does not cancel or a KL penalty needs, as they are given."""
    unneeded = cancelled_model(call)
    if unneeded == "ref" and call.kl_ref != "none":
        unneeded = None
    return {name: () if name == unneeded else as_tuple(getattr(call, name)) for name, _ in FROZEN}


def dtype_of(call: LossCall) -> torch.dtype:
    """Of accumulation and of the outputs: float64 where a model that is needed has it, else float32."""
    models = (call.student, *itertools.chain(*needed_models(call).values()))
    return accumulation_dtype(*(head.rows for head in heads_of(models)))


def support_width(call: LossCall) -> int:
    """The most tokens that a position of topk has: those of its support, a sampled token outside it, and a label."""
    needed = needed_models(call)
    listed = (model.k for model in needed["teacher"] or needed["ref"] if isinstance(model, TopKLogProbs))
    given = 0 if call.support_ids is None else call.support_ids.shape[-1]
    return max((call.k or 0, given, *listed)) + (call.tail == "sampled") + (call.sft_labels is not None)


# What is computed elsewhere, and the estimator that can use it.
_USERS: dict[type, Estimator] = {TokenLogProbs: "sampled", TopKLogProbs: "topk"}


def require_source(name: str, value: object, estimator: Estimator) -> None:
    if isinstance(value, (LinearHead, Logits)):
        if name == "student" and value.vocab_map is not None:
            refuse_vocab_map(name)
        return
    kind, user = type(value).__name__, _USERS.get(type(value))
    if name == "student" and user is not None:
        raise TypeError(f"student must be a LinearHead or Logits: {kind} carry no gradient")
    require_kind(name, value, *(() if name == "student" else _USERS))
    if estimator != user:
        raise TypeError(
            f"{name} is {kind}, which estimator={user!r} alone can use; estimator={estimator!r} needs a LinearHead or "
            "Logits" + {"sampled": " or TokenLogProbs", "topk": " or TopKLogProbs"}.get(estimator, "")
        )


def named_models(name: str, models: object) -> dict[str, Any]:
    """The models of an argument by the names that messages give them: none, one, or those of a list."""
    if models is None:
        return {}
    if not isinstance(models, (list, tuple)):
        return {name: models}
    if not models:
        raise ValueError(f"{name} must not be an empty list")
    return {f"{name}[{i}]": model for i, model in enumerate(models)}


def named_members(models: Mapping[str, Any]) -> dict[str, Any]:
    """Models by name, each that is made of several models as these: ``teacher.models[0]``."""
    named: dict[str, Any] = {}
    for name, model in models.items():
        made_of = isinstance(model, Composite)
        named |= {f"{name}.models[{i}]": x for i, x in enumerate(model.models)} if made_of else {name: model}
    return named


def check_sources(models: Mapping[str, Any], options: LossOptions, shape: torch.Size, device: torch.device) -> None:
    for name, model in models.items():
        require_source(name, model, options.estimator)
        if model.token_shape != shape:
            raise ValueError(
                f"{name} must have the token shape {tuple(shape)} of student, got {tuple(model.token_shape)}"
            )
        for field, tensor in model.tensors.items():
            require_device(f"{name}.{field}", tensor, device)
        if isinstance(model, TopKLogProbs):
            _check_sampled(name, model, options)
        if options.baseline == "expected" and isinstance(model, TokenLogProbs):
            raise TypeError(
                f"{name} is TokenLogProbs, and baseline='expected' needs a LinearHead or Logits: all the vocabulary"
            )


def _check_sampled(name: str, model: TopKLogProbs, options: LossOptions) -> None:
    """log-probs of the sampled tokens beside those of the listed ones, where the loss needs them."""
    if options.tail == "sampled" and model.sampled_logprobs is None:
        raise ValueError(
            f"{name}.sampled_logprobs must be given for tail='sampled': the log-prob of the sampled token, which need "
            "not be among the listed ones"
        )


def require_models(
    scale: float | Tensor, given: Mapping[str, Mapping[str, Any]], call: LossCall, options: LossOptions
) -> None:
    """The models that lambda needs are given.

    A ``reward_scale_fn`` is in the place of lambda. An ``advantage_fn`` needs no model, and with a KL
    penalty the reference for that alone: options that then have no teacher or reference to act on are refused.
    """
    follows = call.reward_scale_fn is not None
    if follows and (isinstance(scale, Tensor) or scale != 1):
        shown = "a tensor" if isinstance(scale, Tensor) else f"{scale:g}"
        raise ValueError(
            f"reward_scale_fn is in the place of reward_scale, and reward_scale={shown} would be ignored: give one of "
            "the two"
        )
    if options.kl_ref != "none" and not given["ref"]:
        raise ValueError("ref must be given for kl_ref: the KL penalty is to it")
    if call.advantage_fn is not None and not given["teacher"] and (not given["ref"] or options.kl_ref != "none"):
        acting = {
            "reward_scale_fn": follows,
            "reward_scale": isinstance(scale, Tensor) or scale != 1,
            "logprob_min": options.logprob_min is not None,
            "baseline": options.baseline != "none",
            "score_cancelled": options.score_cancelled,
        }
        for name, chosen in acting.items():
            if chosen:
                raise ValueError(
                    f"{name} needs a teacher or a reference: with an advantage_fn and neither of them it has nothing "
                    "to act on"
                )
        return
    if follows or isinstance(scale, Tensor):
        for name, models in given.items():
            if not models:
                what = "with a reward_scale_fn" if follows else "when reward_scale is a tensor"
                raise ValueError(f"{name} must be given {what}: any of its values may need it")
    elif scale != 0 and not given["teacher"]:
        raise ValueError(
            f"teacher must be given for reward_scale={scale}: only reward_scale=0, or an advantage_fn, does without it"
        )
    elif scale != 1 and not given["ref"]:
        raise ValueError(f"ref must be given for reward_scale={scale}: only reward_scale=1 does without a reference")


def joint_vocab_size(models: Mapping[str, Any], vocab_size: int | None) -> int:
    """The vocabulary that all models have; of which ``vocab_size`` may take a part."""
    sizes = {name: m.vocab_size for name, m in models.items() if isinstance(m, (LinearHead, Logits))}
    smallest = min(sizes.values())
    if vocab_size is None:
        return smallest
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= smallest:
        raise ValueError(f"vocab_size must be between 1 and {smallest} (the smallest of {sizes}), got {vocab_size}")
    return vocab_size


def check_shards(student: Head, frozen: Mapping[str, Any], together: str, vocab_size: int) -> None:
    """Models that are normalised together have the same columns on each rank, or all of them on every rank."""
    for name, model in frozen.items():
        shard = model.shard if isinstance(model, (LinearHead, Logits)) else None
        if shard is None:
            continue
        if student.shard is None:
            raise ValueError(
                f"{name} has a shard and student has none, but {together} looks at the same columns of all models: "
                f"shard the student alike, or give {name} the whole weight"
            )
        if not shard.matches(student.shard, vocab_size):
            raise ValueError(
                f"{name} must have the shard of student, or no shard at all, for {together}, which looks at the same "
                f"columns of all models: student's ranks have {list(student.shard.bounds)}, {name}'s have "
                f"{list(shard.bounds)}"
            )


def with_logits_dtype(options: LossOptions, default: torch.dtype, models: Mapping[str, Any]) -> LossOptions:
    """The options with None for the dtype of logits that is the default, that of accumulation.

    A library's product has the dtype of its operands or float32: nothing else can be asked for.
    """
    chunk_dtype = options.chunk_dtype
    if chunk_dtype is None:
        return options
    if chunk_dtype == default:
        return replace(options, chunk_dtype=None)
    for name, model in models.items():
        if not isinstance(model, LinearHead):
            continue
        if model.hidden.dtype != chunk_dtype:
            raise ValueError(
                f"chunk_dtype={chunk_dtype} needs all hidden states in that dtype, and {name}.hidden is "
                f"{model.hidden.dtype}: leave chunk_dtype out"
            )
        if not gemm.accumulates_low_precision(model.hidden):
            raise ValueError(
                f"chunk_dtype={chunk_dtype} is for bfloat16 and float16 heads on a CUDA GPU, and {name}.hidden is "
                f"{model.hidden.dtype} on {model.hidden.device}: leave chunk_dtype out"
            )
    return options


def zero_masked(model: Any, mask: Tensor) -> Any:
    """The model with zeros at masked tokens, so that a NaN there reaches no result; where rows cannot be dropped."""
    if isinstance(model, Composite):
        return type(model)([zero_masked(x, mask) for x in model.models], model.weights)
    masked = ~mask
    if isinstance(model, LinearHead):
        return replace(model, hidden=model.hidden.masked_fill(masked[..., None], 0))
    if isinstance(model, Logits):
        return replace(model, logits=model.logits.masked_fill(masked[..., None], 0))
    if isinstance(model, TokenLogProbs):
        return TokenLogProbs(model.logprobs.masked_fill(masked, 0))
    sampled = model.sampled_logprobs
    return TopKLogProbs(
        model.token_ids.masked_fill(masked[..., None], -1),
        model.logprobs,
        None if sampled is None else sampled.masked_fill(masked, 0),
    )


def frozen_heads(
    models: Sequence[Frozen],
    cut: Callable[[Head], Head] | None = None,
    flatten: Callable[[Composite], FlatComposite] | None = None,
) -> list[Any]:
    """The models with a vocabulary axis, one a route; detached, since only the student receives gradients.

    A head each, a :class:`FlatComposite` of ``flatten``, or None.
    """
    heads: list[Any] = []
    for model in models:
        if isinstance(model, (LinearHead, Logits)):
            tensors: dict[str, Any] = model.tensors
            for x in tensors.values():
                if x.requires_grad:
                    model = replace(model, **{name: x.detach() for name, x in tensors.items()})
                    break
            heads.append(model if cut is None else cut(model))
        elif flatten is not None and isinstance(model, Composite):
            heads.append(flatten(model))
        else:
            heads.append(None)
    return heads
