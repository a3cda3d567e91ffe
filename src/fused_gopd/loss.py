"""The public calls: check the input, drop masked tokens, run the loop, reduce.

The checks are one function, :func:`prepare`, which the dense :mod:`fused_gopd.reference` shares, so that both accept
and refuse the same input. Nothing here has a vocabulary axis.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import autograd, objective
from .chunks import Job, Route, TokenRows, chunk_size_for, logits_buffers
from .heads import Head, LinearHead, Logits, Source, TokenLogProbs, TopKLogProbs, require_float
from .metrics import Metrics
from .objective import (
    BASELINES,
    DIVERGENCES,
    ESTIMATORS,
    RATIOS,
    REDUCTIONS,
    AdvantageFn,
    Baseline,
    Divergence,
    Estimator,
    Ratio,
    Reduction,
    Sequences,
    Surrogate,
)
from .rowops import select_backend
from .rowops.torch import accumulation_dtype


@dataclass(frozen=True)
class GOPDOutput:
    """What :func:`gopd_loss` returns. ``(...)`` is the token shape; entries of masked tokens are 0.

    Attributes:
        loss: scalar, or (...) with ``reduction="none"``. The only differentiable field.
        token_loss: (...) per-token losses before any weighting, detached.
        advantages: (...) A = lambda log q + (1 - lambda) log r - log p of the sampled token (with old log-probs in
            place of log p where they are given), as the loss uses it, after ``logprob_min`` and ``advantage_clip``;
            positive makes the token likelier. None without ``token_ids``.
        student_logprobs, teacher_logprobs, ref_logprobs: (...) of the sampled token; None where not computed. Where
            ``joint`` all three are normalised over the joint support, and 0 for a token whose own lambda cancels the
            model.
        entropy: (...) of the student, in nats.
        kl: (...) KL(student || target) >= 0, ``full`` only.
        clipped: (...) bool, where ``clip`` or ``clip_dual`` removed the gradient. None without them.
        importance: (...) the detached importance weight of the rollout. None without ``rollout_logprobs``.
        mask: (...) bool, the live tokens; None where all are.
        reward_scale: lambda as given, expanded to the token shape where it is a tensor.
        joint: whether the models were looked at together: in ``full``, and with a baseline.
    """

    loss: Tensor
    token_loss: Tensor
    advantages: Tensor | None
    student_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor
    kl: Tensor | None
    clipped: Tensor | None = None
    importance: Tensor | None = None
    mask: Tensor | None = None
    reward_scale: float | Tensor = 1.0
    joint: bool = False

    def metrics(self) -> Metrics:
        """Training signals (implicit reward, divergences, entropy, ...) that add up over batches and ranks.

        Computed when asked for, without waiting for the device.
        """
        return Metrics.of(self)


# ----------------------------------------------------------------------------------------------------------- checking


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _require_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _require_source(name: str, value: object, estimator: Estimator) -> None:
    if isinstance(value, (LinearHead, Logits)):
        return
    if isinstance(value, TopKLogProbs):
        raise TypeError(f"{name} is TopKLogProbs, which no estimator of this version takes (estimator={estimator!r})")
    if isinstance(value, TokenLogProbs):
        if name == "student":
            raise TypeError("student must be a LinearHead or Logits: TokenLogProbs carry no gradient")
        if estimator != "sampled":
            raise TypeError(
                f"{name} is TokenLogProbs, which estimator='sampled' alone can use; estimator={estimator!r} needs a "
                "LinearHead or Logits"
            )
        return
    raise TypeError(f"{name} must be a LinearHead, Logits or TokenLogProbs, got {type(value).__name__}")


def _require_shape(name: str, x: Tensor, shape: torch.Size, owner: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have the token shape {tuple(shape)} of {owner}, got {tuple(x.shape)}")


def _require_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on the student's device {device}, got {x.device}")


def _check_mask(mask: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    _require_shape("mask", mask, shape, "student")
    _require_device("mask", mask, device)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or 0/1 integer, got {mask.dtype}")
    if mask.dtype == torch.bool:
        return mask
    if device.type == "cpu":
        wrong = mask[(mask != 0) & (mask != 1)]
        if wrong.numel():
            raise ValueError(f"mask must hold 0 and 1 only, got {wrong[0].item()}")
    return mask != 0


def _live_rows(mask: Tensor | None, shape: torch.Size) -> TokenRows:
    if mask is None:
        return TokenRows(shape)
    # the one host sync that dropping masked rows costs: how many are live
    index = mask.reshape(-1).nonzero()[:, 0]
    return TokenRows(shape, None if index.shape[0] == shape.numel() else index)


def _check_token_ids(ids: Tensor, rows: TokenRows, vocab_size: int, masked: bool) -> Tensor:
    """The live token ids, int64. Out of range: IndexError on a CPU, a device-side assert (no host sync) on a GPU."""
    live = rows.take(ids.to(torch.int64)).contiguous()
    wrong = (live < 0) | (live >= vocab_size)
    if live.device.type == "cuda":
        torch._assert_async(
            ~wrong.any(), f"token_ids must be in [0, {vocab_size}) where not masked (-100 needs a mask)"
        )
    elif bool(wrong.any()):
        value = int(live[wrong][0])
        if value == -100 and not masked:
            raise ValueError(
                "token_ids contains -100 but no mask is given: pass mask=(token_ids != -100), since ids alone never "
                "mask a token here"
            )
        raise IndexError(f"token_ids must be in [0, {vocab_size}) where not masked, got {value}")
    return live


def _check_vector(name: str, x: object, shape: torch.Size, device: torch.device) -> Tensor:
    require_float(name, x)
    assert isinstance(x, Tensor)
    _require_shape(name, x, shape, "student")
    _require_device(name, x, device)
    return x.detach()


def _check_reward_scale(value: object, sequences: Sequences, device: torch.device) -> float | Tensor:
    """lambda as a Python float, or expanded to the token shape."""
    if not isinstance(value, Tensor):
        return _require_number("reward_scale", value)
    require_float("reward_scale", value)
    _require_device("reward_scale", value, device)
    value, shape = value.detach(), sequences.shape
    if value.shape == shape or value.ndim == 0:
        return value.expand(shape)
    if _tells_sequences(sequences) and value.shape == (sequences.count,):
        return sequences.expand(value)
    raise ValueError(
        f"reward_scale must be a Python float, a tensor of the token shape {tuple(shape)}, or one value per sequence "
        f"({sequences.count},), got shape {tuple(value.shape)}"
    )


def _tells_sequences(sequences: Sequences) -> bool:
    """Whether tokens are known to belong to sequences: (N,) ones without cu_seqlens are not."""
    return len(sequences.shape) > 1 or sequences.cu_seqlens is not None


def _check_cu_seqlens(cu_seqlens: object, shape: torch.Size, device: torch.device) -> Sequences:
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
    _require_device("cu_seqlens", cu_seqlens, device)
    bounds = cu_seqlens.to(torch.int64).contiguous()
    sorted_ = (bounds[1:] >= bounds[:-1]).all()
    if device.type == "cuda":
        right = sorted_ & (bounds[0] == 0) & (bounds[-1] == shape[0])
        torch._assert_async(right, f"cu_seqlens must start at 0, be sorted and end at N={shape[0]}")
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
    low, high = (_require_number("clip", x) for x in clip)
    if not 0 <= low <= 1 or high < 0:
        raise ValueError(f"clip must satisfy 0 <= epsilon_low <= 1 and epsilon_high >= 0, got {clip!r}")
    return low, high


def _check_advantage_clip(bound: object) -> tuple[float, float]:
    if isinstance(bound, (tuple, list)):
        if len(bound) != 2:
            raise TypeError(f"advantage_clip must be a number or a pair (low, high), got {bound!r}")
        low, high = (_require_number("advantage_clip", x) for x in bound)
    else:
        high = _require_number("advantage_clip", bound)
        low = -high
    if low >= high:
        raise ValueError(f"advantage_clip must be a positive number or a pair with low < high, got {bound!r}")
    return low, high


def _check_surrogate(
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
    _one_of("ratio", ratio, RATIOS)
    _one_of("baseline", baseline, BASELINES)
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
        clip_dual = _require_number("clip_dual", clip_dual)
        if clip_dual <= 1:
            raise ValueError(f"clip_dual must be above 1, got {clip_dual}")
    if rollout_is_cap is not None:
        rollout_is_cap = _require_number("rollout_is_cap", rollout_is_cap)
        if rollout_is_cap <= 0:
            raise ValueError(f"rollout_is_cap must be positive, got {rollout_is_cap}")
    if logprob_min is not None:
        logprob_min = _require_number("logprob_min", logprob_min)
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
        _require_device("sequence_lengths", sequence_lengths, device)
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
    number = _require_number("normalizer", normalizer)
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
    if not isinstance(teacher_index, Tensor):
        raise TypeError(f"teacher_index must be a torch.Tensor, got {type(teacher_index).__name__}")
    if teacher_index.is_floating_point() or teacher_index.is_complex() or teacher_index.dtype == torch.bool:
        raise TypeError(f"teacher_index must be an integer tensor, got {teacher_index.dtype}")
    _require_device("teacher_index", teacher_index, device)
    if teacher_index.shape == sequences.shape:
        return count, teacher_index
    if _tells_sequences(sequences) and teacher_index.shape == (sequences.count,):
        return count, sequences.expand(teacher_index)
    raise ValueError(
        f"teacher_index must have the token shape {tuple(sequences.shape)} or one value per sequence "
        f"({sequences.count},), got shape {tuple(teacher_index.shape)}"
    )


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


def _check_chunk_size(chunk_size: int | None) -> int | None:
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an int or None, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return chunk_size


@dataclass(frozen=True)
class Prepared:
    """Checked input of one call, in token shape; models that cancel are out of ``needed``."""

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
    sequences: Sequences
    weights: Tensor  # () or (n,)
    dtype: torch.dtype  # of accumulation and of the outputs
    device: torch.device

    @property
    def slices(self) -> list[tuple[int, int]]:
        """Start and stop of every route among the live rows."""
        return list(itertools.pairwise((0, *self.stops)))

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
        return self.estimator == "full" or self.surrogate.baseline == "expected"

    def output(self, loss: Tensor, *values: Tensor | None) -> GOPDOutput:
        """The output from (n,) values of the live tokens, in the order of its fields."""

        def full_shape(x: Tensor | None) -> Tensor | None:
            # cloned: scatter may return a view, and no output shares memory with another or with an input
            return None if x is None else self.rows.scatter(x.detach().clone())

        *vectors, clipped, importance = (full_shape(x) for x in values)
        if self.surrogate.clip is None and self.surrogate.clip_dual is None:
            clipped = None
        scale = self.reward_scale
        scale = self.rows.scatter(scale.clone()) if isinstance(scale, Tensor) else scale
        mask = None if self.mask is None else self.mask.clone()
        fields: list[Any] = [loss, *vectors, clipped, importance, mask, scale, self.joint]
        return GOPDOutput(*fields)


def prepare(
    student: Head,
    teacher: Source | Sequence[Source] | None,
    ref: Source | Sequence[Source] | None,
    token_ids: Tensor | None,
    *,
    teacher_index: Tensor | None = None,
    mask: Tensor | None,
    reward_scale: float | Tensor,
    estimator: Estimator,
    divergence: Divergence,
    beta: float,
    reduction: Reduction,
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
    score_cancelled: bool = False,
    vocab_size: int | None,
) -> Prepared:
    """Every check of the input, before any work."""
    _one_of("estimator", estimator, ESTIMATORS)
    _one_of("divergence", divergence, DIVERGENCES)
    _one_of("reduction", reduction, REDUCTIONS)
    if estimator == "sampled" and divergence != "reverse_kl":
        raise ValueError(f"divergence={divergence!r} needs estimator='full'; 'sampled' estimates the reverse KL alone")
    beta = _require_number("beta", beta)
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must satisfy 0 < beta < 1, got {beta}")
    if divergence != "jsd" and beta != 0.5:
        raise ValueError(f"beta is an option of divergence='jsd', got beta={beta} with divergence={divergence!r}")
    if not isinstance(score_cancelled, bool):
        raise TypeError(f"score_cancelled must be a bool, got {type(score_cancelled).__name__}")
    if score_cancelled and token_ids is None:
        raise ValueError("token_ids must be given for score_cancelled=True: it scores the sampled tokens")
    _require_source("student", student, estimator)
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
            _require_device(f"{name}.{field}", tensor, device)
    sequences = _check_cu_seqlens(cu_seqlens, shape, device)
    lam = _check_reward_scale(reward_scale, sequences, device)
    count, route = _check_routes(teacher, ref, teacher_index, sequences, device)
    if isinstance(lam, Tensor):
        for name, models in given.items():
            if not models:
                raise ValueError(f"{name} must be given when reward_scale is a tensor: any of its values may need it")
    elif lam != 0 and teacher is None:
        raise ValueError(f"teacher must be given for reward_scale={lam}: only reward_scale=0 does without it")
    elif lam != 1 and ref is None:
        raise ValueError(f"ref must be given for reward_scale={lam}: only reward_scale=1 does without a reference")
    if token_ids is None:
        if estimator == "sampled":
            raise ValueError("token_ids must be given for estimator='sampled'")
    else:
        if not isinstance(token_ids, Tensor):
            raise TypeError(f"token_ids must be a torch.Tensor, got {type(token_ids).__name__}")
        if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
            raise TypeError(f"token_ids must be an integer tensor, got {token_ids.dtype}")
        _require_shape("token_ids", token_ids, shape, "student")
        _require_device("token_ids", token_ids, device)
    surrogate = _check_surrogate(
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
    live_mask = None if mask is None else _check_mask(mask, shape, device)
    joint = _joint_vocab_size({"student": student, **others}, vocab_size)
    rows, stops = _in_route_order(_live_rows(live_mask, shape), route, count)
    ids = None if token_ids is None else _check_token_ids(token_ids, rows, joint, mask is not None)
    heads = [m for m in (student, *others.values()) if isinstance(m, (LinearHead, Logits))]
    dtype = accumulation_dtype(*(head.rows for head in heads))
    weights = objective.token_weights(reduction, live_mask, sequences, normalizer, sequence_lengths, dtype, device)
    if baseline == "expected":
        for name, model in others.items():
            if isinstance(model, TokenLogProbs):
                raise TypeError(
                    f"{name} is TokenLogProbs, and baseline='expected' needs a LinearHead or Logits: all the vocabulary"
                )
    # one model for all routes stands in every one of them
    routed = {name: tuple(x.values()) * (count if len(x) == 1 else 1) for name, x in given.items()}
    cancelled = None if isinstance(lam, Tensor) else {0.0: "teacher", 1.0: "ref"}.get(lam)
    return Prepared(
        estimator,
        student,
        () if cancelled == "teacher" else routed["teacher"],
        () if cancelled == "ref" else routed["ref"],
        {cancelled: routed[cancelled]} if cancelled is not None and routed[cancelled] else {},
        rows,
        stops,
        live_mask,
        joint,
        rows.take(lam).to(dtype).contiguous() if isinstance(lam, Tensor) else lam,
        ids,
        None if old is None else rows.take(old).to(dtype).contiguous(),
        None if rollout is None else rows.take(rollout).to(dtype).contiguous(),
        surrogate,
        advantage_fn,
        sequences,
        rows.take(weights).contiguous() if weights.ndim else weights,
        dtype,
        device,
    )


# -------------------------------------------------------------------------------------------------------------- calls


def _heads(models: tuple[Source, ...], count: int) -> list[Head | None]:
    """What has a vocabulary axis among the models, one a route; detached: only the student receives gradients."""
    heads: list[Head | None] = [None] * count
    for i, model in enumerate(models):
        if isinstance(model, (LinearHead, Logits)):
            detached: dict[str, Any] = {name: t.detach() for name, t in model.tensors.items()}
            heads[i] = replace(model, **detached)
    return heads


def _job(p: Prepared, divergence: Divergence, beta: float, chunk: int | None, backend: str) -> Job:
    teachers, refs = (_heads(models, len(p.stops)) for models in (p.teacher, p.ref))
    kinds = ([p.student], teachers, refs)
    dtypes = {head.rows.dtype for heads in kinds for head in heads if head is not None}
    linear = sum(any(isinstance(head, LinearHead) for head in heads) for heads in kinds)
    auto = chunk_size_for(p.vocab_size, max(1, logits_buffers(p.joint, linear)), p.device.type, p.dtype.itemsize)
    routes = tuple(map(Route, p.stops, teachers, refs)) if len(p.stops) > 1 else ()
    return Job(
        p.rows,
        p.vocab_size,
        chunk or auto,
        select_backend(backend, p.device, dtypes),
        p.student,
        teachers[0],
        refs[0],
        routes,
        p.estimator,
        divergence,
        beta,
        p.reward_scale,
        p.token_ids,
        p.logprobs(p.teacher),
        p.logprobs(p.ref),
        p.old_logprobs,
        p.rollout_logprobs,
        p.surrogate,
        p.sequences.cu_seqlens,
        p.advantage_fn,
    )


def _score_alone(models: tuple[Source, ...], job: Job, p: Prepared) -> Tensor:
    """log-probs (n,) of the sampled tokens under models that the loss does not need, forward only."""
    given = p.logprobs(models)
    out = torch.zeros(p.rows.count, dtype=p.dtype, device=p.device) if given is None else given
    assert p.token_ids is not None
    for head, (start, stop) in zip(_heads(models, len(models)), p.slices, strict=True):
        if head is not None:
            rows = p.rows
            if len(p.stops) > 1:
                assert rows.index is not None
                rows = TokenRows(rows.shape, rows.index[start:stop])
            alone = Job(rows, p.vocab_size, job.chunk_size, job.ops, head, token_ids=p.token_ids[start:stop])
            out[start:stop] = autograd.token_logprobs(alone)[0]
    return out


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
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
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
    score_cancelled: bool = False,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> GOPDOutput:
    """The G-OPD loss of three models, without a [tokens, vocabulary] tensor ever existing.

    Maximises E sum_t [lambda (log q - log r) - (log p - log r)] for a student p, teacher q and reference r: the
    optimum is log p = lambda log q + (1 - lambda) log r + const. lambda = 1 is ordinary on-policy distillation and
    never touches the reference; lambda > 1 extrapolates beyond the teacher.

    Shapes: ``(...)`` is the token shape, usually (B, T) or (N,). ``hidden[t]`` or ``logits[t]`` scores
    ``token_ids[t]``: the caller shifts. Outputs are float32, float64 where any input is float64.

    Args:
        student: LinearHead or Logits; gradients flow to its hidden states, weight and bias, or to its logits.
        teacher, ref: LinearHead, Logits or (``sampled``) TokenLogProbs of the same token shape; hidden sizes,
            vocabulary sizes and kinds may differ. Never receive gradients. A list of teachers is routed by
            ``teacher_index``; ref is then one model for all, or a list routed alike.
        token_ids: (...) integer, the sampled tokens. Required by ``sampled``; in ``full`` only for reporting.
        teacher_index: (...) or (B,) integer, which teacher of the list each token or sequence has. Only the tokens
            routed to a model pass through its GEMM.
        mask: (...) bool or 0/1 integer; tokens with 0 cost no work and touch nothing, whatever is in them.
        reward_scale: lambda: a float, a tensor (...), or one value per sequence (B,). A tensor needs both models.
        estimator: ``"sampled"``, the policy gradient at the sampled tokens (paper, Eq. 14 with the right sign);
            ``"full"``, the exact divergence over the vocabulary.
        divergence: of ``full``: ``"reverse_kl"`` (the paper's -J per token), ``"forward_kl"`` KL(target || p), or
            ``"jsd"`` with ``beta``: beta KL(target || m) + (1 - beta) KL(p || m), m = beta target + (1 - beta) p.
        reduction: ``"token-mean"``, ``"seq-mean-token-mean"``, ``"seq-mean-token-sum"`` (sequences are dim 0),
            ``"sum"`` or ``"none"``. ``"none"`` recomputes the logits in the backward, all others do not.
        normalizer: the divisor of the means: the global count of tokens (``token-mean``) or live sequences; a number
            or one-element tensor. Default: this call's own count.
        sequence_lengths: (B,) the global number of live tokens of each sequence, for ``seq-mean-token-mean``.
        cu_seqlens: (B + 1,) int32 bounds of packed sequences in tokens of shape (N,), from 0 to N; for reductions and
            options that know sequences.

    Options of ``sampled``, applied in the order in which they stand here:
        logprob_min: teacher's and reference's log-probs are at least this, before any arithmetic: a token that they
            rule out then has a finite advantage.
        advantage_fn: an advantage of one's own in place of A: called with the :class:`fused_gopd.TokenStats` of each
            chunk, once, returns (C,), detached. Costs no GEMM. ``docs/objectives.md`` has published ones.
        baseline: ``"expected"`` adds the ``full`` value to the advantage, whose mean over the vocabulary is then 0:
            an unbiased control variate. The reported loss leaves it out. Needs whole-vocabulary heads, whose logits it
            holds together (chunk buffers as in ``full``), and no further GEMM.
        advantage_clip: a bound on the advantage's magnitude, or a pair (low, high).
        old_logprobs: (...) log-probs under the policy of the previous update, for the ratio rho = p / p_old.
        ratio: ``"token"``, or ``"sequence"``: exp of the mean over a sequence of log p - log p_old, with the gradient
            of the token (GSPO-token; Zheng et al. 2025). Recomputes the logits in the backward.
        clip: (epsilon_low, epsilon_high) of PPO's clipped surrogate.
        clip_dual: above 1: where A < 0 the token loss is at most -A clip_dual (Ye et al. 2020).
        rollout_logprobs: (...) log-probs under the engine that sampled. Token losses are multiplied by the detached
            weight p_old / p_rollout (truncated importance sampling; Yao et al. 2025); without old_logprobs the
            student's own p stands for p_old.
        rollout_is_cap: upper bound of that weight; None does not truncate.

    More options:
        score_cancelled: score the model that lambda cancels too, forward only, for its log-probs.
        vocab_size: joint vocabulary; default the smallest of the models given. Rows past it are padding.
        chunk_size: tokens per chunk; default from a memory budget (:func:`fused_gopd.chunks.chunk_size_for`).
        backend: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``.

    Memory: beyond inputs and gradients, chunk buffers of chunk_size x V per model, independent of the number of
    tokens, and one float32 V x H accumulator where a low-precision weight is trainable.

    Work: 3 student GEMMs and one for each other model that is needed; 2 fewer GEMMs without gradients, one fewer for
    a frozen weight or frozen hidden states.

    Raises:
        ValueError, TypeError, IndexError: naming the argument, what was expected and what was found.
        RuntimeError: a backend that was asked for by name is not available.
    """
    _one_of("backend", backend, ("auto", "torch", "native", "triton"))
    chunk_size = _check_chunk_size(chunk_size)
    p = prepare(
        student,
        teacher,
        ref,
        token_ids,
        teacher_index=teacher_index,
        mask=mask,
        reward_scale=reward_scale,
        estimator=estimator,
        divergence=divergence,
        beta=beta,
        reduction=reduction,
        normalizer=normalizer,
        sequence_lengths=sequence_lengths,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        rollout_is_cap=rollout_is_cap,
        clip=clip,
        clip_dual=clip_dual,
        ratio=ratio,
        advantage_clip=advantage_clip,
        logprob_min=logprob_min,
        baseline=baseline,
        advantage_fn=advantage_fn,
        score_cancelled=score_cancelled,
        vocab_size=vocab_size,
    )
    job = _job(p, divergence, beta, chunk_size, backend)
    if reduction == "none":
        token_loss, statistics = autograd.token_losses(job)
        loss = p.rows.scatter(token_loss)
    else:
        loss, token_loss, statistics = autograd.weighted_loss(job, p.weights)
    with torch.no_grad():
        term = job.policy_term(statistics) if estimator == "sampled" else None
        kl = None if estimator == "sampled" else autograd.token_values(job, statistics)[1]
        advantages: Tensor | None = None
        student_logprobs: Tensor | None = None
        others: dict[str, Tensor | None] = {"teacher": None, "ref": None}
        if job.token_ids is not None:
            student_logprobs, others["teacher"], others["ref"] = job.model_logprobs(statistics)
            if term is None:
                advantages, _ = objective.advantage(job.reward_scale, student_logprobs, *others.values())
            else:
                advantages = term.advantages
            if score_cancelled:
                for name, model in p.cancelled.items():
                    others[name] = _score_alone(model, job, p)
        return p.output(
            loss,
            token_loss,
            advantages,
            student_logprobs,
            others["teacher"],
            others["ref"],
            objective.entropy(statistics),
            kl,
            None if term is None else term.clipped,
            None if term is None else term.importance,
        )


def token_logprobs(
    head: Head,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log-probs of given tokens under one model, and its entropy, at the memory bound of :func:`gopd_loss`.

    What a trainer scores teacher, reference and old policy with. Both results are differentiable in the head's
    tensors; the backward recomputes the logits. Under ``torch.no_grad()`` it is one GEMM and nothing is kept.

    Args:
        head: LinearHead or Logits with token shape (...).
        token_ids: (...) integer; ``hidden[t]`` scores ``token_ids[t]``.
        mask: (...) bool or 0/1 integer; masked tokens give 0 and cost nothing.
        return_entropy: also return the entropy in nats.
        vocab_size: entries past it are padding; default all.
        chunk_size, backend: as in :func:`gopd_loss`.

    Returns:
        (...) log-probs <= 0, or the pair (log-probs, entropies); float32, float64 for float64 inputs.
    """
    _one_of("backend", backend, ("auto", "torch", "native", "triton"))
    chunk_size = _check_chunk_size(chunk_size)
    if not isinstance(head, (LinearHead, Logits)):
        raise TypeError(f"head must be a LinearHead or Logits, got {type(head).__name__}")
    if token_ids is None:
        raise ValueError("token_ids must be given")
    p = prepare(
        head,
        None,
        # the reference is not looked at beyond its shape: lambda = 0 with the model itself makes the call complete
        head,
        token_ids,
        mask=mask,
        reward_scale=0.0,
        estimator="sampled",
        divergence="reverse_kl",
        beta=0.5,
        reduction="none",
        vocab_size=vocab_size,
    )
    job = _job(replace(p, ref=()), "reverse_kl", 0.5, chunk_size, backend)
    logprobs, entropy = autograd.token_logprobs(job)
    result = p.rows.scatter(logprobs)
    return (result, p.rows.scatter(entropy)) if return_entropy else result


class GOPDLoss(nn.Module):
    """:func:`gopd_loss` with its options held in a module.

    Args:
        **options: any keyword option of :func:`gopd_loss` that is not a per-batch tensor: ``reward_scale``,
            ``estimator``, ``divergence``, ``beta``, ``reduction``, ``clip``, ``clip_dual``, ``ratio``,
            ``rollout_is_cap``, ``advantage_clip``, ``logprob_min``, ``baseline``, ``advantage_fn``,
            ``score_cancelled``, ``vocab_size``, ``chunk_size``, ``backend``.

    ``forward(student, teacher, ref=None, token_ids=None, **batch)`` takes the batch: ``teacher_index``,
    ``mask``, ``cu_seqlens``, ``old_logprobs``, ``rollout_logprobs``, ``normalizer``, ``sequence_lengths``, and
    ``reward_scale`` to override the module's.
    """

    _BATCH = frozenset(
        {
            "teacher_index",
            "mask",
            "cu_seqlens",
            "old_logprobs",
            "rollout_logprobs",
            "normalizer",
            "sequence_lengths",
            "reward_scale",
        }
    )
    _OPTIONS = frozenset(
        {"reward_scale", "estimator", "divergence", "beta", "reduction", "clip", "clip_dual", "ratio"}
        | {"rollout_is_cap", "advantage_clip", "logprob_min", "baseline", "advantage_fn"}
        | {"score_cancelled", "vocab_size", "chunk_size", "backend"}
    )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._refuse(options, self._OPTIONS, "option of GOPDLoss")
        for name, allowed in (("estimator", ESTIMATORS), ("divergence", DIVERGENCES), ("reduction", REDUCTIONS)):
            if name in options:
                _one_of(name, options[name], allowed)
        self.options = options

    @staticmethod
    def _refuse(given: dict[str, Any], allowed: frozenset[str], what: str) -> None:
        unknown = sorted(set(given) - allowed)
        if unknown:
            raise TypeError(f"{unknown[0]} is not an {what}; expected one of {', '.join(sorted(allowed))}")

    def forward(
        self,
        student: Head,
        teacher: Source | Sequence[Source] | None,
        ref: Source | Sequence[Source] | None = None,
        token_ids: Tensor | None = None,
        **batch: Any,
    ) -> GOPDOutput:
        self._refuse(batch, self._BATCH, "argument of GOPDLoss.forward")
        return gopd_loss(student, teacher, ref, token_ids, **{**self.options, **batch})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
