"""Every check of the input of the loss, before any work, and what is left when it has passed.

One function, :func:`prepare`, which the fused loss and the dense :mod:`fused_gopd.reference` share, so that both accept
and refuse the same input. Nothing here has a vocabulary axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .agreement import Agreement, agreement_of, shared_by
from .checks import (
    IGNORE,
    one_of,
    refuse,
    require_count,
    require_device,
    require_float,
    require_integer,
    require_logprobs,
    require_mask,
    require_number,
    require_shape,
)
from .heads import Head, LinearHead, Logits, Source, TokenLogProbs, TopKLogProbs, require_kind
from .loop import gemm
from .objective.divergences import DIVERGENCES, divergence_of
from .objective.policy import Surrogate, looks_jointly
from .objective.reductions import token_weights
from .objective.topk import Truncation
from .options import (
    BASELINES,
    ESTIMATORS,
    RATIOS,
    REDUCTIONS,
    AdvantageFn,
    Baseline,
    Estimator,
    Ratio,
    Reduction,
    Support,
    Tail,
)
from .output import GOPDOutput
from .rowops.torch import accumulation_dtype
from .support import Scores, check_truncation, scores_of
from .tokens import Sequences, TokenRows

BACKENDS = ("auto", "torch", "native", "triton")

# What is computed elsewhere, and the estimator that can do with it.
_USERS: dict[type, Estimator] = {TokenLogProbs: "sampled", TopKLogProbs: "topk"}


def _require_source(name: str, value: object, estimator: Estimator) -> None:
    if isinstance(value, (LinearHead, Logits)):
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


def check_mask(mask: object, shape: torch.Size, device: torch.device) -> Tensor:
    """A mask of the token shape, as bool."""
    if isinstance(mask, Tensor):
        require_shape("mask", mask, shape, "student")
        require_device("mask", mask, device)
    return require_mask("mask", mask)


def _must_not_wait(device: torch.device) -> bool:
    """Whether no value may decide anything: while a CUDA graph is captured, and on meta, which has no values."""
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _check_chunk_dtype(
    chunk_dtype: torch.dtype | None, default: torch.dtype, models: dict[str, Source]
) -> torch.dtype | None:
    """None for the default, which is that of accumulation.

    A library's product has the dtype of its operands or float32: nothing else can be asked for.
    """
    if chunk_dtype is not None and not isinstance(chunk_dtype, torch.dtype):
        raise TypeError(f"chunk_dtype must be a torch.dtype, got {type(chunk_dtype).__name__}")
    if chunk_dtype in (None, default):
        return None
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
    return chunk_dtype


def _check_without_waiting(masked: bool, routed: bool, grad_filter: float, ratio: Ratio, advantage_fn: object) -> None:
    """The options that have no way of doing without a value from the device."""
    needs = {
        "teacher_index": (routed, "how many tokens each teacher has"),
        "grad_filter": (bool(grad_filter), "which vocabulary entries are left"),
        "ratio='sequence' with mask": (masked and ratio == "sequence", "which rows are live"),
        "advantage_fn with mask": (masked and advantage_fn is not None, "which rows are live"),
    }
    for name, (given, what) in needs.items():
        if given:
            raise ValueError(
                f"{name} waits for the device to say {what}, which neither the capture of a CUDA graph nor the meta "
                "device allows; compute the loss outside the graph, or on packed tokens without a mask"
            )


def _emptied(model: Any, mask: Tensor) -> Any:
    """The model with nothing but finite numbers at masked tokens: what is computed there is thrown away."""
    gone = ~mask
    if isinstance(model, LinearHead):
        return replace(model, hidden=model.hidden.masked_fill(gone[..., None], 0))
    if isinstance(model, Logits):
        return replace(model, logits=model.logits.masked_fill(gone[..., None], 0))
    if isinstance(model, TokenLogProbs):
        return TokenLogProbs(model.logprobs.masked_fill(gone, 0))
    return TopKLogProbs(model.token_ids.masked_fill(gone[..., None], -1), model.logprobs)


def _live_rows(mask: Tensor | None, shape: torch.Size) -> TokenRows:
    if mask is None:
        return TokenRows(shape)
    if _must_not_wait(mask.device):
        return TokenRows(shape, keep=mask)
    # the one host sync that dropping masked rows costs: how many are live
    index = mask.reshape(-1).nonzero()[:, 0]
    return TokenRows(shape, None if index.shape[0] == shape.numel() else index)


def _check_token_ids(ids: Tensor, rows: TokenRows, vocab_size: int, masked: bool) -> Tensor:
    """The live token ids, int64. Out of range: IndexError on a CPU, a device-side assert (no host sync) on a GPU."""
    live = rows.take(ids.to(torch.int64)).contiguous()
    wrong = (live < 0) | (live >= vocab_size)
    if live.device.type == "cpu" and not masked and bool((live == IGNORE).any()):
        raise ValueError(
            f"token_ids contains {IGNORE} but no mask is given: pass mask=(token_ids != {IGNORE}), since ids alone "
            "never mask a token here"
        )
    refuse(wrong, live, IndexError, f"token_ids must be in [0, {vocab_size}) where not masked ({IGNORE} needs a mask)")
    return live


def _check_labels(
    labels: object, weight: object, rows: TokenRows, shape: torch.Size, device: torch.device, vocab_size: int
) -> tuple[Tensor | None, float]:
    """The live labels, int64, -1 where there is none, and the weight of the supervised term."""
    weight = require_number("sft_weight", weight)
    if weight < 0:
        raise ValueError(f"sft_weight must not be negative, got {weight}")
    if labels is None:
        if weight != 1:
            raise ValueError("sft_weight needs sft_labels: without them there is no supervised term to weigh")
        return None, weight
    require_integer("sft_labels", labels)
    assert isinstance(labels, Tensor)
    require_shape("sft_labels", labels, shape, "student")
    require_device("sft_labels", labels, device)
    live = rows.take(labels.to(torch.int64)).contiguous()
    wrong = ((live < 0) & (live != IGNORE)) | (live >= vocab_size)
    refuse(wrong, live, IndexError, f"sft_labels must be in [0, {vocab_size}), or {IGNORE} for none, where not masked")
    return live.masked_fill(live == IGNORE, -1), weight


def _check_vector(name: str, x: object, shape: torch.Size, device: torch.device) -> Tensor:
    require_float(name, x)
    assert isinstance(x, Tensor)
    require_shape(name, x, shape, "student")
    require_device(name, x, device)
    return x.detach()


def _live_logprobs(
    name: str, x: Tensor | None, rows: TokenRows, dtype: torch.dtype, checked: bool = True
) -> Tensor | None:
    """(n,) of the live tokens."""
    if x is None:
        return None
    live = rows.take(x).to(dtype).contiguous()
    if checked:
        require_logprobs(name, live)
    return live


def _check_scores(
    models: dict[str, tuple[Source, ...]],
    given: dict[str, dict[str, Any]],
    rows: TokenRows,
    slices: list[tuple[int, int]],
    lam: float | Tensor,
) -> None:
    """The live log-probs of sampled tokens that teacher and reference bring, where lambda does not cancel them."""
    for name, cancelled_at in (("teacher", 0.0), ("ref", 1.0)):
        names = list(given[name]) * (len(slices) if len(given[name]) == 1 else 1)
        for label, model, (start, stop) in zip(names, models[name], slices, strict=False):
            if isinstance(model, TokenLogProbs):
                counts = lam[start:stop] != cancelled_at if isinstance(lam, Tensor) else None
                require_logprobs(f"{label}.logprobs", rows.take(model.logprobs.detach(), start, stop), counts)


def _check_lengths(lengths: Tensor, sequences: Sequences, mask: Tensor | None) -> None:
    """Global lengths of sequences cover the live tokens that they have here."""
    live = torch.ones(sequences.shape, dtype=torch.bool, device=lengths.device) if mask is None else mask
    each = lengths.expand(sequences.count)
    message = "sequence_lengths must be at least the number of live tokens that each sequence has here"
    refuse(~(each >= sequences.sum(live)), each, ValueError, message)


def _check_reward_scale(value: object, sequences: Sequences, device: torch.device) -> float | Tensor:
    """lambda as a Python float, or expanded to the token shape."""
    if not isinstance(value, Tensor):
        return require_number("reward_scale", value)
    require_float("reward_scale", value)
    require_device("reward_scale", value, device)
    value, shape = value.detach(), sequences.shape
    if value.shape == shape or value.ndim == 0:
        return value.expand(shape)
    if _tells_sequences(sequences) and value.shape == (sequences.count,):
        return sequences.expand(value)
    raise ValueError(
        f"reward_scale must be a Python float, or a tensor of {_shapes(sequences)}, got shape {tuple(value.shape)}"
    )


def _shapes(sequences: Sequences) -> str:
    """The shapes that values per token or per sequence may have, in words."""
    per_sequence = f" or one value per sequence ({sequences.count},)" if _tells_sequences(sequences) else ""
    return f"the token shape {tuple(sequences.shape)}{per_sequence}"


def _tells_sequences(sequences: Sequences) -> bool:
    """Whether tokens are known to belong to sequences: (N,) ones without cu_seqlens are not."""
    return len(sequences.shape) > 1 or sequences.cu_seqlens is not None


def check_cu_seqlens(cu_seqlens: object, shape: torch.Size, device: torch.device) -> Sequences:
    """The slices of packed tokens. Values: ValueError on a CPU, a device-side assert (no host sync) on a GPU."""
    if cu_seqlens is None:
        return Sequences(shape)
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if len(shape) != 1:
        raise ValueError(f"cu_seqlens needs packed tokens of shape (N,), got the token shape {tuple(shape)}")
    require_device("cu_seqlens", cu_seqlens, device)
    bounds = cu_seqlens.to(torch.int64).contiguous()
    sorted_ = (bounds[1:] >= bounds[:-1]).all()
    if device.type == "cuda":
        right = sorted_ & (bounds[0] == 0) & (bounds[-1] == shape[0])
        torch._assert_async(right, f"cu_seqlens must start at 0, be sorted and end at N={shape[0]}")
    elif device.type == "meta":
        pass
    elif bounds[0] != 0 or bounds[-1] != shape[0]:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at N={shape[0]}, the number of tokens, got {int(bounds[0])} and "
            f"{int(bounds[-1])}"
        )
    elif not sorted_:
        raise ValueError(f"cu_seqlens must be sorted, got {bounds.tolist() if bounds.numel() < 20 else 'a decrease'}")
    return Sequences(shape, bounds)


def _check_clip(clip: object) -> tuple[float, float]:
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (epsilon_low, epsilon_high), got {clip!r}")
    low, high = (require_number("clip", x) for x in clip)
    if not 0 <= low <= 1 or high < 0:
        raise ValueError(f"clip must satisfy 0 <= epsilon_low <= 1 and epsilon_high >= 0, got {clip!r}")
    return low, high


def _check_advantage_clip(bound: object) -> tuple[float, float]:
    if isinstance(bound, (tuple, list)):
        if len(bound) != 2:
            raise TypeError(f"advantage_clip must be a number or a pair (low, high), got {bound!r}")
        low, high = (require_number("advantage_clip", x) for x in bound)
    else:
        high = require_number("advantage_clip", bound)
        low = -high
    if low >= high:
        raise ValueError(f"advantage_clip must be a positive number or a pair with low < high, got {bound!r}")
    return low, high


def check_surrogate(
    estimator: Estimator,
    sequences: Sequences,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    clip: object,
    clip_dual: object,
    ratio: object,
    rollout_is_cap: object,
    advantage_clip: object,
    logprob_min: object,
    baseline: object,
    advantage_fn: object,
) -> Surrogate:
    """The options of the sampled estimator; one that has nothing to act on raises."""
    one_of("ratio", ratio, RATIOS)
    one_of("baseline", baseline, BASELINES)
    given = {
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "clip": clip,
        "clip_dual": clip_dual,
        "ratio": None if ratio == "token" else ratio,
        "rollout_is_cap": rollout_is_cap,
        "advantage_clip": advantage_clip,
        "logprob_min": logprob_min,
        "baseline": None if baseline == "none" else baseline,
        "advantage_fn": advantage_fn,
    }
    for name, value in given.items():
        if value is not None and estimator != "sampled":
            raise ValueError(f"{name} is an option of estimator='sampled', got estimator={estimator!r}")
    for name in ("clip", "clip_dual", "ratio"):
        if given[name] is not None and old_logprobs is None:
            raise ValueError(f"{name} needs old_logprobs: without them every ratio is 1 and there is nothing to do")
    if rollout_is_cap is not None and rollout_logprobs is None:
        raise ValueError("rollout_is_cap needs rollout_logprobs: without them there is no importance weight to cap")
    if ratio == "sequence" and not _tells_sequences(sequences):
        raise ValueError(
            f"ratio='sequence' needs a token shape (B, T) or cu_seqlens to tell sequences, got {tuple(sequences.shape)}"
        )
    if clip_dual is not None:
        clip_dual = require_number("clip_dual", clip_dual)
        if clip_dual <= 1:
            raise ValueError(f"clip_dual must be above 1, got {clip_dual}")
    if rollout_is_cap is not None:
        rollout_is_cap = require_number("rollout_is_cap", rollout_is_cap)
        if rollout_is_cap <= 0:
            raise ValueError(f"rollout_is_cap must be positive, got {rollout_is_cap}")
    if logprob_min is not None:
        logprob_min = require_number("logprob_min", logprob_min)
        if logprob_min >= 0:
            raise ValueError(f"logprob_min must be negative, as log-probs are, got {logprob_min}")
    if advantage_fn is not None and not callable(advantage_fn):
        raise TypeError(f"advantage_fn must be callable, got {type(advantage_fn).__name__}")
    return Surrogate(
        None if clip is None else _check_clip(clip),
        clip_dual,
        ratio,  # type: ignore[arg-type]
        rollout_is_cap,
        None if advantage_clip is None else _check_advantage_clip(advantage_clip),
        logprob_min,
        baseline,  # type: ignore[arg-type]
    )


def _check_normalizer(
    normalizer: object,
    sequence_lengths: Tensor | None,
    reduction: Reduction,
    sequences: Sequences,
    device: torch.device,
) -> tuple[Tensor | float | None, Tensor | None]:
    if reduction.startswith("seq-") and not _tells_sequences(sequences):
        raise ValueError(
            f"reduction={reduction!r} needs a token shape (B, T) or cu_seqlens to tell sequences, got "
            f"{tuple(sequences.shape)}"
        )
    if sequence_lengths is not None:
        if reduction != "seq-mean-token-mean":
            raise ValueError(f"sequence_lengths is an option of 'seq-mean-token-mean', got reduction={reduction!r}")
        if not isinstance(sequence_lengths, Tensor):
            raise TypeError(f"sequence_lengths must be a torch.Tensor, got {type(sequence_lengths).__name__}")
        if sequence_lengths.ndim and sequence_lengths.shape != (sequences.count,):
            raise ValueError(
                f"sequence_lengths must have shape ({sequences.count},), one per sequence, or be 0-d, got "
                f"{tuple(sequence_lengths.shape)}"
            )
        require_device("sequence_lengths", sequence_lengths, device)
    if normalizer is None:
        return None, sequence_lengths
    if reduction in ("sum", "none"):
        raise ValueError(f"normalizer is an option of the mean reductions, got reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be a number or one element, got shape {tuple(normalizer.shape)}")
        if normalizer.device.type == "cpu" and normalizer.item() < 0:
            raise ValueError(f"normalizer must not be negative, got {normalizer.item()}")
        return normalizer.detach(), sequence_lengths
    number = require_number("normalizer", normalizer)
    if number <= 0:
        raise ValueError(f"normalizer must be positive, got {number}")
    return number, sequence_lengths


def _models(name: str, value: object) -> dict[str, Any]:
    """The models of an argument by the names that messages give them: none, one, or those of a list."""
    if value is None:
        return {}
    if not isinstance(value, (list, tuple)):
        return {name: value}
    if not value:
        raise ValueError(f"{name} must not be an empty list")
    return {f"{name}[{i}]": model for i, model in enumerate(value)}


def _check_routes(
    teacher: object, ref: object, teacher_index: Tensor | None, sequences: Sequences, device: torch.device
) -> tuple[int, Tensor | None]:
    """How many routes there are, and the route of every token in the token shape; None where all take the first."""
    lengths = {n: len(x) for n, x in (("teacher", teacher), ("ref", ref)) if isinstance(x, (list, tuple))}
    if "ref" in lengths and teacher is not None and lengths.get("teacher") != lengths["ref"]:
        raise ValueError(
            f"ref must be one model or a list of as many as teacher, got {lengths['ref']} and "
            f"{lengths.get('teacher', 'one model')}"
        )
    count = max(lengths.values(), default=1)
    if teacher_index is None:
        if count > 1:
            raise ValueError(f"teacher_index must be given for {count} teachers: which one each token has")
        return 1, None
    if not lengths:
        raise ValueError("teacher_index needs a list of teachers, got one model")
    require_integer("teacher_index", teacher_index)
    require_device("teacher_index", teacher_index, device)
    if teacher_index.shape == sequences.shape:
        return count, teacher_index
    if _tells_sequences(sequences) and teacher_index.shape == (sequences.count,):
        return count, sequences.expand(teacher_index)
    raise ValueError(f"teacher_index must have {_shapes(sequences)}, got shape {tuple(teacher_index.shape)}")


def _in_route_order(rows: TokenRows, route: Tensor | None, count: int) -> tuple[TokenRows, tuple[int, ...]]:
    """The live rows sorted by route, and where each route ends."""
    if route is None:
        return rows, (rows.count,)
    live = rows.take(route.to(torch.int64))
    # how many tokens each route has: one host sync, as for masked rows
    counts = (live == torch.arange(count, device=live.device)[:, None]).sum(1).tolist()
    if sum(counts) != rows.count:
        wrong = live[(live < 0) | (live >= count)]
        raise IndexError(
            f"teacher_index must be in [0, {count}), the list of teachers, where not masked, got {int(wrong[0])}"
        )
    stops = tuple(itertools.accumulate(counts))
    if count == 1:
        return rows, stops
    index = torch.arange(rows.count, device=live.device) if rows.index is None else rows.index
    return TokenRows(rows.shape, index[torch.argsort(live, stable=True)]), stops


def _joint_vocab_size(models: dict[str, Any], vocab_size: int | None) -> int:
    sizes = {name: m.vocab_size for name, m in models.items() if isinstance(m, (LinearHead, Logits))}
    smallest = min(sizes.values())
    if vocab_size is None:
        return smallest
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= smallest:
        raise ValueError(f"vocab_size must be between 1 and {smallest} (the smallest of {sizes}), got {vocab_size}")
    return vocab_size


def _check_shards(student: Head, others: dict[str, Any], together: str, vocab_size: int) -> None:
    """Models that are looked at together have the same columns on each rank, or all of them on every rank."""
    for name, model in others.items():
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


def _slices(stops: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(itertools.pairwise((0, *stops)))


def _check_divergence(estimator: Estimator, divergence: str, beta: object) -> tuple[str, float]:
    """The divergence that is computed and its beta, which only the JSD has."""
    one_of("divergence", divergence, DIVERGENCES)
    if estimator == "sampled" and divergence != "reverse_kl":
        raise ValueError(
            f"divergence={divergence!r} needs estimator='full' or 'topk'; 'sampled' estimates the reverse KL alone"
        )
    beta = require_number("beta", beta)
    if divergence != "jsd":
        if beta != 0.5:
            raise ValueError(f"beta is an option of divergence='jsd', got beta={beta} with divergence={divergence!r}")
        return divergence, beta
    if not 0 <= beta <= 1:
        raise ValueError(
            f"beta must satisfy 0 <= beta <= 1 (0 is the forward KL, 1 the reverse KL, between them the JSD with "
            f"m = beta target + (1 - beta) p), got {beta}"
        )
    divergence = divergence_of(beta)
    return divergence, beta if divergence == "jsd" else 0.5


def _require_models(
    lam: float | Tensor, given: dict[str, dict[str, Any]], advantage_fn: object, options: dict[str, bool]
) -> None:
    """The models that lambda needs are given.

    An ``advantage_fn`` needs none, and without any model ``options``, which act on teacher or reference, are refused.
    """
    if advantage_fn is not None and not any(given.values()):
        for name, chosen in {"reward_scale": isinstance(lam, Tensor) or lam != 1, **options}.items():
            if chosen:
                raise ValueError(
                    f"{name} needs a teacher or a reference: with an advantage_fn and neither of them it has nothing "
                    "to act on"
                )
        return
    if isinstance(lam, Tensor):
        for name, models in given.items():
            if not models:
                raise ValueError(f"{name} must be given when reward_scale is a tensor: any of its values may need it")
    elif lam != 0 and not given["teacher"]:
        raise ValueError(f"teacher must be given for reward_scale={lam}: only reward_scale=0 does without it")
    elif lam != 1 and not given["ref"]:
        raise ValueError(f"ref must be given for reward_scale={lam}: only reward_scale=1 does without a reference")


@dataclass(frozen=True)
class Prepared:
    """Checked input of one call; vectors (n,) have one entry per live token, in the order of ``rows``."""

    estimator: Estimator
    student: Head
    teacher: tuple[Source, ...]  # one a route; none also where it has cancelled
    ref: tuple[Source, ...]
    cancelled: dict[str, tuple[Source, ...]]  # "teacher" or "ref", given but not needed
    rows: TokenRows  # in the order of the routes
    stops: tuple[int, ...]  # where each route ends among the live rows
    mask: Tensor | None
    vocab_size: int
    reward_scale: float | Tensor  # tensor: (n,) of the live tokens, in the accumulation dtype
    token_ids: Tensor | None  # (n,)
    old_logprobs: Tensor | None  # (n,)
    rollout_logprobs: Tensor | None  # (n,)
    surrogate: Surrogate
    advantage_fn: AdvantageFn | None
    truncation: Truncation
    scores: Scores
    labels: Tensor | None  # (n,), -1 is none
    sft_weight: float
    divergence: str
    beta: float
    sequences: Sequences
    weights: Tensor  # () or (n,)
    chunk_size: int | None
    chunk_dtype: torch.dtype | None
    grad_filter: float
    backend: str
    dtype: torch.dtype  # of accumulation and of the outputs
    device: torch.device
    agreement: Agreement | None  # where ranks share a vocabulary

    @property
    def slices(self) -> list[tuple[int, int]]:
        """Start and stop of every route among the live rows."""
        return _slices(self.stops)

    def logprobs(self, models: tuple[Source, ...]) -> Tensor | None:
        """(n,) log-probs computed elsewhere, 0 in the rows of a route whose model is a head; None where all are."""
        if not any(isinstance(model, TokenLogProbs) for model in models):
            return None
        out = torch.zeros(self.rows.count, dtype=self.dtype, device=self.device)
        for model, (start, stop) in zip(models, self.slices, strict=True):
            if isinstance(model, TokenLogProbs):
                out[start:stop] = self.rows.take(model.logprobs.detach(), start, stop)
        return out

    @property
    def joint(self) -> bool:
        """Whether the models are looked at together."""
        return looks_jointly(self.estimator, self.surrogate)

    def output(self, loss: Tensor, *values: Tensor | None) -> GOPDOutput:
        """The output from (n,) values of the live tokens, in the order of its fields."""

        def full_shape(x: Tensor | None) -> Tensor | None:
            # cloned: scatter may return a view, and no output shares memory with another or with an input
            return None if x is None else self.rows.scatter(x.detach().clone())

        *vectors, clipped, importance, label_logprobs, labelled = (full_shape(x) for x in values)
        if self.surrogate.clip is None and self.surrogate.clip_dual is None:
            clipped = None
        scale = self.reward_scale
        scale = self.rows.scatter(scale.clone()) if isinstance(scale, Tensor) else scale
        mask = None if self.mask is None else self.mask.clone()
        fields: list[Any] = [loss, *vectors, clipped, importance, label_logprobs, labelled, mask, scale, self.joint]
        return GOPDOutput(*fields)


def prepare(
    student: Head,
    teacher: Source | Sequence[Source] | None,
    ref: Source | Sequence[Source] | None,
    token_ids: Tensor | None,
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
) -> Prepared:
    """Every check of the input of :func:`fused_gopd.gopd_loss`, before any work."""
    one_of("estimator", estimator, ESTIMATORS)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("backend", backend, BACKENDS)
    if chunk_size is not None:
        require_count("chunk_size", chunk_size)
    divergence, beta = _check_divergence(estimator, divergence, beta)
    if not isinstance(score_cancelled, bool):
        raise TypeError(f"score_cancelled must be a bool, got {type(score_cancelled).__name__}")
    if score_cancelled and token_ids is None:
        raise ValueError("token_ids must be given for score_cancelled=True: it scores the sampled tokens")
    _require_source("student", student, estimator)
    grad_filter = require_number("grad_filter", grad_filter)
    if grad_filter < 0:
        raise ValueError(f"grad_filter must not be negative, got {grad_filter}")
    if grad_filter and not isinstance(student, LinearHead):
        raise ValueError("grad_filter needs a LinearHead as the student: with Logits there is no GEMM to save")
    shape = student.token_shape
    device = student.rows.device
    given = {"teacher": _models("teacher", teacher), "ref": _models("ref", ref)}
    others = given["teacher"] | given["ref"]
    for name, model in others.items():
        _require_source(name, model, estimator)
        if model.token_shape != shape:
            raise ValueError(
                f"{name} must have the token shape {tuple(shape)} of student, got {tuple(model.token_shape)}"
            )
        for field, tensor in model.tensors.items():
            require_device(f"{name}.{field}", tensor, device)
    sequences = check_cu_seqlens(cu_seqlens, shape, device)
    lam = _check_reward_scale(reward_scale, sequences, device)
    count, route = _check_routes(teacher, ref, teacher_index, sequences, device)
    of_models = {"logprob_min": logprob_min is not None, "baseline": baseline != "none"}
    _require_models(
        lam, given, advantage_fn if estimator == "sampled" else None, {**of_models, "score_cancelled": score_cancelled}
    )
    if token_ids is None:
        if estimator == "sampled":
            raise ValueError("token_ids must be given for estimator='sampled'")
    else:
        require_integer("token_ids", token_ids)
        require_shape("token_ids", token_ids, shape, "student")
        require_device("token_ids", token_ids, device)
    surrogate = check_surrogate(
        estimator,
        sequences,
        old_logprobs,
        rollout_logprobs,
        clip,
        clip_dual,
        ratio,
        rollout_is_cap,
        advantage_clip,
        logprob_min,
        baseline,
        advantage_fn,
    )
    old = None if old_logprobs is None else _check_vector("old_logprobs", old_logprobs, shape, device)
    rollout = None if rollout_logprobs is None else _check_vector("rollout_logprobs", rollout_logprobs, shape, device)
    normalizer, sequence_lengths = _check_normalizer(normalizer, sequence_lengths, reduction, sequences, device)
    live_mask = None if mask is None else check_mask(mask, shape, device)
    if sequence_lengths is not None:
        _check_lengths(sequence_lengths, sequences, live_mask)
    joint = _joint_vocab_size({"student": student, **others}, vocab_size)
    if baseline == "expected":
        for name, model in others.items():
            if isinstance(model, TokenLogProbs):
                raise TypeError(
                    f"{name} is TokenLogProbs, and baseline='expected' needs a LinearHead or Logits: all the vocabulary"
                )
    # one model for all routes stands in every one of them
    routed = {name: tuple(x.values()) * (count if len(x) == 1 else 1) for name, x in given.items()}
    cancelled = None if isinstance(lam, Tensor) else {0.0: "teacher", 1.0: "ref"}.get(lam)
    if score_cancelled and cancelled is not None and any(isinstance(m, TopKLogProbs) for m in routed[cancelled]):
        raise TypeError(f"{cancelled} is TopKLogProbs, and score_cancelled=True needs a LinearHead or Logits")
    needed = {name: () if name == cancelled else models for name, models in routed.items()}
    if estimator != "sampled" or baseline == "expected":
        together = "baseline='expected'" if estimator == "sampled" else f"estimator={estimator!r}"
        _check_shards(student, {n: m for n, m in others.items() if n.split("[")[0] != cancelled}, together, joint)
    truncation = check_truncation(estimator, k, support, tail, needed["teacher"], needed["ref"], joint)
    if _must_not_wait(device):
        _check_without_waiting(live_mask is not None, route is not None, grad_filter, ratio, advantage_fn)
    rows = _live_rows(live_mask, shape)
    if rows.keep is not None:
        student = _emptied(student, rows.keep)
        routed, needed = (
            {name: tuple(_emptied(model, rows.keep) for model in models) for name, models in x.items()}
            for x in (routed, needed)
        )
        token_ids, old, rollout = (
            None if x is None else x.masked_fill(~rows.keep, 0) for x in (token_ids, old, rollout)
        )
        lam = lam.masked_fill(~rows.keep, 1) if isinstance(lam, Tensor) else lam
        sft_labels = None if sft_labels is None else sft_labels.masked_fill(~rows.keep, IGNORE)
    rows, stops = _in_route_order(rows, route, count)
    ids = None if token_ids is None else _check_token_ids(token_ids, rows, joint, mask is not None)
    labels, sft_weight = _check_labels(sft_labels, sft_weight, rows, shape, device, joint)
    heads = [m for m in (student, *others.values()) if isinstance(m, (LinearHead, Logits))]
    dtype = accumulation_dtype(*(head.rows for head in heads))
    logits_dtype = _check_chunk_dtype(chunk_dtype, dtype, {"student": student, **others})
    weights = token_weights(reduction, live_mask, sequences, normalizer, sequence_lengths, dtype, device)
    if rows.keep is not None:
        weights = weights * rows.keep
    lam = rows.take(lam).to(dtype).contiguous() if isinstance(lam, Tensor) else lam
    # beside an advantage_fn they are a ratio's denominator and no more, which may be of the caller's own making
    old = _live_logprobs("old_logprobs", old, rows, dtype, checked=advantage_fn is None)
    rollout = _live_logprobs("rollout_logprobs", rollout, rows, dtype)
    scored = routed if score_cancelled else needed
    _check_scores(scored, given, rows, _slices(stops), lam)
    agreement: Agreement | None = None
    models = {"student": (student,) * len(stops), **scored}
    shards = shared_by(models)
    if shards:
        call = locals() | {  # the arguments, checked
            "mask": torch.ones(shape, dtype=torch.bool, device=device) if live_mask is None else live_mask,
            "token_ids": ids,
            "teacher_index": None if route is None else rows.take(route),
            "reward_scale": lam,
            "old_logprobs": old,
            "rollout_logprobs": rollout,
            "sft_labels": labels,
        }
        agreement = agreement_of(shards, call, models, rows, _slices(stops))
    return Prepared(
        estimator,
        student,
        needed["teacher"],
        needed["ref"],
        {cancelled: routed[cancelled]} if cancelled is not None and routed[cancelled] else {},
        rows,
        stops,
        live_mask,
        joint,
        lam,
        ids,
        old,
        rollout,
        surrogate,
        advantage_fn,
        truncation,
        scores_of(needed["teacher"], needed["ref"], rows, _slices(stops), lam, joint),
        labels,
        sft_weight,
        divergence,
        beta,
        sequences,
        rows.take(weights).contiguous() if weights.ndim else weights,
        chunk_size,
        logits_dtype,
        grad_filter,
        backend,
        dtype,
        device,
        agreement,
    )
