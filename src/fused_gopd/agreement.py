"""What the ranks that share a vocabulary have to agree on in a call, argument by argument, and the check that they do.

Ranks that call the loss differently would wait for each other for ever, or mix up tokens, or sum gradients of different
losses. The rule of an argument (:mod:`fused_gopd.options`) says how ranks must agree in it, and :data:`FIELDS` says so
of every field of a model. One collective of a few hundred bytes a call.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import refuse
from .heads import LinearHead, Logits, TopKLogProbs
from .options import ARGUMENTS as ARGUMENT_NAMES
from .options import RULES
from .rules import Agree
from .shards import VocabShard
from .targets import Composite, Frozen, members
from .tokens import TokenRows

# models first: of several arguments in which ranks differ the first is named
ARGUMENTS: dict[str, Agree] = {name: RULES[name].agree for name in ARGUMENT_NAMES}

FIELDS: dict[str, Agree] = {
    "hidden": Agree.ROUNDED,
    "weight": Agree.GIVEN,
    "bias": Agree.GIVEN,
    "logits": Agree.ROUNDED,  # those of a shard are a rank's own
    "token_ids": Agree.TOKENS,
    "logprobs": Agree.ROUNDED,
    "sampled_logprobs": Agree.ROUNDED,
    "logit_scale": Agree.OPTION,
    "softcap": Agree.OPTION,
    "temperature": Agree.OPTION,
    "shard": Agree.SHARD,
    "vocab_map": Agree.OPTION,
}

_MODELS = tuple(name for name, rule in ARGUMENTS.items() if rule is Agree.MODELS)
_FROZEN = _MODELS[1:]  # but the student
# What may be a tensor has a place of its own in what is exchanged, whether or not it is one: all ranks send as much.
# Those that decide which vectors the others are come first: the mask, and which teacher each token has.
EXACT = (
    *(name for name, rule in ARGUMENTS.items() if rule is Agree.NUMBERS),
    *(name for name, rule in ARGUMENTS.items() if rule is Agree.TOKENS and name != "token_ids"),
    "token_ids",
    *(f"{name}.{field}" for field in ("token_ids", "weights") for name in _FROZEN),
)
ROUNDED = (*_MODELS, *(name for name, rule in ARGUMENTS.items() if rule is Agree.ROUNDED))

# Rows of hidden states or logits of which a fingerprint is taken.
_SAMPLED_ROWS = 4
# A fingerprint has so many numbers of the order of 1, which differ by less than this where only rounding does.
_NUMBERS = 5
_ALIKE = 0.1
_UNITS = 1000


class Agreement(NamedTuple):
    """What a rank brings to the comparison. Tensors are in tuples, which the autograd layer flattens."""

    shards: tuple[VocabShard, ...]
    options: tuple[tuple[str, str], ...]  # Python values, and what tensors are, in words
    cuts: tuple[tuple[str, tuple[VocabShard | None, ...]], ...]  # of each model, by name
    exact: tuple[Tensor | None, ...]  # what EXACT names
    rounded: tuple[Tensor | None, ...]  # what ROUNDED names, (n,) each


# ------------------------------------------------------------------------------------------------- what a rank brings


def shared_by(models: Mapping[str, Sequence[Frozen]]) -> tuple[VocabShard, ...]:
    """The shards of the models, one for each process group; none where no vocabulary is shared."""
    shards = {
        id(model.shard.group): model.shard
        for routed in models.values()
        for made in routed
        for model in (made.models if isinstance(made, Composite) else (made,))
        if isinstance(model, (LinearHead, Logits)) and model.shard is not None
    }
    return tuple(shards.values())


def agreement_of(
    shards: tuple[VocabShard, ...],
    call: Mapping[str, Any],
    models: Mapping[str, Sequence[Frozen]],
    rows: TokenRows,
    slices: Sequence[tuple[int, int]],
    function: str = "gopd_loss",
) -> Agreement:
    """Of a checked call.

    Args:
        shards: of ``models``.
        call: every argument of a loss; tensors of the token shape as vectors (n,) of the live tokens. And
            ``teacher.weights`` and ``ref.weights``, the tensors among those of a LogLinear or Mixture as one.
        models: those that are computed or read, one a route; none where lambda cancels them.
        rows, slices: the live tokens, and start and stop of every route among them.
        function: what is called; every function compares as many values.
    """
    options: list[tuple[str, str]] = [("function", function), ("token shape", str(tuple(rows.shape)))]
    cuts: list[tuple[str, tuple[VocabShard | None, ...]]] = []
    exact: dict[str, Tensor | None] = dict.fromkeys(EXACT)
    rounded: dict[str, Tensor | None] = dict.fromkeys(ROUNDED)
    for name, rule in ARGUMENTS.items():
        value = call[name]
        if rule is Agree.MODELS:
            models_given = value if isinstance(value, (list, tuple)) else [value]
            options.append((name, _words([_kind(model) for model in models_given])))
            given = [part for model in models_given for part in members(model)]
            options += [
                (f"{name}.{field}", _words([_field(model, field) for model in given]))
                for field, how in FIELDS.items()
                if how is not Agree.SHARD
            ]
            cuts.append((f"{name}.shard", tuple(getattr(model, "shard", None) for model in given)))
            lam, cancelled = call["reward_scale"], None
            if isinstance(lam, Tensor) and name != "student":
                cancelled = lam == (0 if name == "teacher" else 1)
            ids, rounded[name] = _scores(models[name], rows, slices, cancelled)
            if name in _FROZEN:
                exact[f"{name}.token_ids"], exact[f"{name}.weights"] = ids, call.get(f"{name}.weights")
        elif rule is Agree.GIVEN:
            options.append((name, "given" if value is not None else "None"))
        elif rule is not Agree.OWN:
            options.append((name, _words(value)))
        if rule in (Agree.NUMBERS, Agree.TOKENS) and isinstance(value, Tensor):
            exact[name] = value.detach()
        if rule is Agree.ROUNDED and value is not None:
            rounded[name] = value.detach()
    return Agreement(
        shards=shards,
        options=tuple(options),
        cuts=tuple(cuts),
        exact=tuple(exact.values()),
        rounded=tuple(rounded.values()),
    )


def _kind(model: object) -> str:
    """The type of a model; of one made of several, also their types and weights."""
    kind = type(model).__name__
    if not isinstance(model, Composite):
        return kind
    return f"{kind} of {_words([_kind(x) for x in model.models])} with weights {_words(model.weights)}"


def _field(model: object, field: str) -> object:
    """A field of a model in words, or None."""
    value = getattr(model, field, None)
    if not isinstance(value, Tensor):
        return value
    size = "" if FIELDS[field] is Agree.GIVEN or field == "logits" else f" with {value.shape[-1:]}"
    return f"{value.dtype}{size}"  # of its own rows and columns each rank has its own number


def _words(value: object) -> str:
    """A value as text that is the same for equal values."""
    if isinstance(value, Tensor):
        return f"a tensor of {'floats' if value.is_floating_point() else 'integers'}"
    if isinstance(value, (list, tuple)):
        return _words(value[0]) if len(value) == 1 else f"({', '.join(map(_words, value))})"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(float(value))
    return value if isinstance(value, str) else repr(value)


def _scores(
    models: Sequence[Frozen], rows: TokenRows, slices: Sequence[tuple[int, int]], cancelled: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Token ids, and numbers, of the live tokens of a model's routes, each as one vector.

    Of hidden states and of whole logits these are some rows; ``cancelled`` says where lambda makes a log-prob count
    nothing.
    """
    ids, numbers = [], []
    places = [(2 * i + 1) * rows.count // (2 * _SAMPLED_ROWS) for i in range(_SAMPLED_ROWS if rows.count else 0)]
    parts = ((part, cut) for model, cut in zip(models, slices, strict=False) for part in members(model))
    for model, (start, stop) in parts:
        if isinstance(model, (LinearHead, Logits)):
            if isinstance(model, LinearHead) or model.shard is None:
                sampled = [rows.take(model.rows.detach(), i, i + 1).double() for i in places if start <= i < stop]
                numbers += [x / x.square().mean().sqrt().clamp_min(1e-30) for x in sampled]
            continue
        scores = rows.take(model.logprobs.detach(), start, stop)
        if isinstance(model, TopKLogProbs):
            listed = rows.take(model.token_ids, start, stop)
            ids.append(listed.reshape(-1).to(torch.int64))
            scores = scores.masked_fill(listed < 0, 0)
        elif cancelled is not None:
            scores = scores.masked_fill(cancelled[start:stop], 0)
        numbers.append(scores.double())
        if isinstance(model, TopKLogProbs) and model.sampled_logprobs is not None:
            numbers.append(rows.take(model.sampled_logprobs.detach(), start, stop).double())
    whole = torch.cat([x.reshape(-1) for x in numbers]) if numbers else None
    return torch.cat(ids) if ids else None, whole


# -------------------------------------------------------------------------------------------------------- comparison


def require_agreement(agreement: Agreement, device: torch.device, more: Mapping[str, object]) -> None:
    """Raise on all ranks, naming the argument and its values, where they do not agree in a call.

    On a GPU a device-side assert, which waits for nothing. ``more`` are Python values that the call leads to.
    """
    for shard in agreement.shards:
        cuts = tuple((name, _words([_cut(shard, own) for own in owns])) for name, owns in agreement.cuts)
        options = (*agreement.options, *cuts, *((name, _words(value)) for name, value in more.items()))
        _compare(shard, options, agreement, device)


def _cut(shard: VocabShard, own: VocabShard | None) -> object:
    """How the ranks of a shard's group cut a model."""
    if own is None:
        return None
    if own.group is not shard.group:
        return "by other ranks"
    return f"{own.bounds}, reduce_hidden={own.reduce_hidden}"


def _may_wait(device: torch.device) -> bool:
    """Whether the host may wait for what the ranks have sent, and say what differs."""
    return device.type == "cpu"


def _compare(
    shard: VocabShard, options: tuple[tuple[str, str], ...], agreement: Agreement, device: torch.device
) -> None:
    waits = _may_wait(device)
    hashes = [zlib.crc32(text.encode()) for _, text in options]
    if not waits:  # one number, filled in on the device: a copy from the host would wait for it
        hashes = [zlib.crc32(repr(options).encode())]
    numbers = [torch.full((), number, dtype=torch.int64, device=device) for number in hashes]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    numbers += [zero if x is None else _hash(x) for x in agreement.exact]
    fingerprints = [zero.expand(_NUMBERS) if x is None else _fingerprint(x) for x in agreement.rounded]
    gathered = shard.gather(torch.cat((torch.stack(numbers), *fingerprints)))
    exact, rounded = gathered[:, : len(numbers)], gathered[:, len(numbers) :]
    differ = torch.cat(((exact != exact[0]).any(0), ((rounded - rounded[0]).abs() > _ALIKE * _UNITS).any(0)))
    if not waits:
        message = "the ranks that share a vocabulary must call the loss with the same"
        for part, what in zip(
            differ.tensor_split((len(hashes), len(numbers))),
            ("options and models", f"tensors, one of {', '.join(EXACT)}", f"tokens, in one of {', '.join(ROUNDED)}"),
            strict=True,
        ):
            refuse(part, part, ValueError, f"{message} {what}")
    elif bool(differ.any()):
        compared = [*options, *zip(EXACT, agreement.exact, strict=True)]
        compared += [x for x in zip(ROUNDED, agreement.rounded, strict=True) for _ in range(_NUMBERS)]
        raise ValueError(_disagreement(shard, *compared[int(differ.nonzero()[0])]))


def _disagreement(shard: VocabShard, name: str, mine: object) -> str:
    """The message on every rank: all of them know that they do not agree, and exchange what they have."""
    values: list[Any] = [None] * len(shard.bounds)
    dist.all_gather_object(values, mine, group=shard.group)
    if all(isinstance(x, Tensor) for x in values):
        first = values[0]
        if any(x.shape != first.shape for x in values):
            values = [f"shape {tuple(x.shape)}" for x in values]
        else:
            apart = torch.stack([(x.double() - first.double()).abs().reshape(-1) for x in values]).amax(0)
            entry = int(apart.nan_to_num(nan=torch.inf).argmax())
            values = [x.reshape(-1)[entry].item() for x in values]
            name += f" (entry {entry} of {first.numel()})"
    return (
        f"all ranks that share a vocabulary must call the loss with the same {name}, got "
        f"{' and '.join(f'{value} on rank {rank}' for rank, value in enumerate(values))} of its group. Ranks with "
        "tokens of their own (data or context parallel, FSDP) need the whole weight: docs/parallelism.md"
    )


# Blocks of a tensor that is hashed, whose temporaries are several times as large.
_BLOCK = 1 << 20


def _hash(x: Tensor) -> Tensor:
    """A number () int64 that says with near certainty whether two tensors have the same entries in the same places."""
    flat = x.reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, flat.shape[0], _BLOCK):
        part = flat[start : start + _BLOCK]
        # + 0.0: -0 is 0
        bits = (part.double() + 0.0).view(torch.int64) if part.is_floating_point() else part.to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.shape[0], device=x.device)
        # products wrap around, alike everywhere; the shifts mix high bits into low ones (Steele et al. 2014)
        mixed = bits * 0x9E3779B97F4A7C1 + place * 0x3C79AC492BA7B65
        mixed = (mixed ^ (mixed >> 30)) * 0x3F58476D1CE4E5B
        total = total + (mixed ^ (mixed >> 27)).sum()
    return total


def _fingerprint(x: Tensor) -> Tensor:
    """(5,) int64, thousandths of numbers of the order of 1: they tell a vector from others, not from its rounding."""
    x = x.double().nan_to_num(0, 0, 0)
    if not x.numel():
        return torch.zeros(_NUMBERS, dtype=torch.int64, device=x.device)
    place = torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device)
    patterns = torch.stack([(place * (1 + 0.61 * i)).cos() for i in range(_NUMBERS - 1)])
    size = x.square().sum().sqrt()
    scale = (size * patterns.square().sum(1).sqrt()).clamp_min(1e-30)
    numbers = torch.cat((patterns @ x / scale * x.numel() ** 0.5, torch.log1p(size / x.numel() ** 0.5)[None]))
    return (numbers * _UNITS).round().to(torch.int64)
