"""What the topk estimator looks at: its options checked, and scores from elsewhere lined up by token id."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import one_of, refuse, require_count
from .chunks import TokenRows
from .heads import Source, TopKLogProbs
from .objective import SUPPORTS, TAILS, WHOLE, Estimator, Truncation

# More than the whole vocabulary's mass by as much as log-probs rounded to bfloat16 may make it: 2^-8 of a log-prob of
# -10 is 4 %. Logits in the place of log-probs are far above.
_MOST_MASS = 1.1

Models = tuple[Source, ...]  # one a route, none for a model that is not needed


def check_truncation(
    estimator: Estimator, k: object, support: object, tail: object, teacher: Models, ref: Models, vocab_size: int
) -> Truncation:
    """The options of topk against the models that the loss needs; one that has nothing to act on raises."""
    one_of("support", support, SUPPORTS)
    one_of("tail", tail, TAILS)
    if estimator != "topk":
        for name, value, default in (("k", k, None), ("support", support, "teacher"), ("tail", tail, "bucket")):
            if value != default:
                raise ValueError(f"{name} is an option of estimator='topk', got estimator={estimator!r}")
        return WHOLE
    given = {n: m for n, models in (("teacher", teacher), ("ref", ref)) for m in models if isinstance(m, TopKLogProbs)}
    for name, model in given.items():
        if support == "student":
            raise TypeError(
                f"{name} is TopKLogProbs, and support='student' needs a LinearHead or Logits: the student's tokens "
                "need not be among those that another model listed"
            )
        if model.k > vocab_size:
            raise ValueError(f"{name} must not list more tokens than the vocabulary of {vocab_size}, got K={model.k}")
    first, second = (teacher, ref) if teacher else (ref, ())
    for own, other in zip(first, second, strict=False):
        if isinstance(other, TopKLogProbs) and not isinstance(own, TopKLogProbs):
            raise TypeError(
                "ref is TopKLogProbs, which goes with a teacher that is TopKLogProbs too, since it must contain the "
                "teacher's tokens; a teacher with the whole vocabulary needs such a reference"
            )
    if support == "teacher" and all(isinstance(model, TopKLogProbs) for model in first):
        listed = {model.k for model in first if isinstance(model, TopKLogProbs)}
        if k is not None and {k} != listed:
            raise ValueError(f"k is for heads; TopKLogProbs have their own K={sorted(listed)}, got k={k!r}")
        return Truncation(0, "teacher", tail)  # type: ignore[arg-type]
    if k is None:
        raise ValueError(
            "k must be given for estimator='topk' with a LinearHead or Logits: how many tokens it looks at"
        )
    count = require_count("k", k)
    if count > vocab_size:
        raise ValueError(f"k must be at most the vocabulary of {vocab_size}, got {k}")
    return Truncation(count, support, tail)  # type: ignore[arg-type]


class Scores(NamedTuple):
    """Scores of the live tokens from elsewhere, (n, K); None for a model that has none."""

    token_ids: Tensor | None  # int64, -1 is none
    teacher: Tensor | None  # log-probs, -inf beside -1
    ref: Tensor | None  # of the same ids


def scores_of(
    teacher: Models,
    ref: Models,
    rows: TokenRows,
    slices: list[tuple[int, int]],
    reward_scale: float | Tensor,  # tensor: (n,)
    vocab_size: int,
    dtype: torch.dtype,
) -> Scores:
    """The scores of all routes; ids are the teacher's, the reference's where there is no teacher."""
    listed = [model for model in (*teacher, *ref) if isinstance(model, TopKLogProbs)]
    if not listed:
        return Scores(None, None, None)
    shape, device = (rows.count, max(model.k for model in listed)), listed[0].logprobs.device
    ids = torch.full(shape, -1, dtype=torch.int64, device=device)
    out: dict[str, Tensor] = {}
    for name, models in (("teacher", teacher), ("ref", ref)):
        for model, (start, stop) in zip(models, slices, strict=False):
            if not isinstance(model, TopKLogProbs):
                continue
            own, logprobs = _checked(name, model, rows, start, stop, vocab_size, dtype)
            values = out.setdefault(name, torch.full(shape, -math.inf, dtype=dtype, device=device))
            if name == "ref" and teacher:
                needed = reward_scale[start:stop, None] != 1 if isinstance(reward_scale, Tensor) else True
                values[start:stop] = _matched(ids[start:stop], own, logprobs, needed)
            else:
                ids[start:stop, : model.k] = own
                values[start:stop, : model.k] = logprobs
    return Scores(ids, out.get("teacher"), out.get("ref"))


def _checked(
    name: str, model: TopKLogProbs, rows: TokenRows, start: int, stop: int, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of some live tokens, -inf beside -1."""
    ids = rows.take(model.token_ids.to(torch.int64), start, stop)
    refuse(
        (ids < -1) | (ids >= vocab_size),
        ids,
        IndexError,
        f"{name}.token_ids must be in [0, {vocab_size}), or -1 for none, where not masked",
    )
    ordered = ids.sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    refuse(
        repeated, ordered[:, 1:], ValueError, f"{name}.token_ids must be distinct at each position", "twice there is"
    )
    logprobs = rows.take(model.logprobs.detach(), start, stop).to(dtype).masked_fill(ids < 0, -math.inf)
    mass = logprobs.exp().sum(1)
    refuse(
        mass > _MOST_MASS,
        mass,
        ValueError,
        f"{name}.logprobs must be log-probabilities, whose exponentials sum to at most 1 at each position",
    )
    return ids, logprobs


def _matched(ids: Tensor, other_ids: Tensor, logprobs: Tensor, needed: Tensor | bool) -> Tensor:
    """The reference's log-probs of the teacher's ids, (m, K)."""
    ordered, order = other_ids.sort(1)
    place = torch.searchsorted(ordered, ids.contiguous()).clamp_max(ordered.shape[1] - 1)
    found = ordered.gather(1, place) == ids
    refuse(
        ~found & (ids >= 0) & needed,
        ids,
        ValueError,
        "ref.token_ids must contain those of the teacher at the same position, where not masked",
        "missing is",
    )
    return logprobs.gather(1, order).gather(1, place).masked_fill(~found | (ids < 0), -math.inf)
