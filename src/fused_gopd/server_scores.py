"""TopKLogProbs of an inference server: checked, and lined up by token id. And the models that topk takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import refuse
from .heads import TopKLogProbs
from .objective.topk import with_sampled
from .options import LossOptions
from .rowops import FROZEN
from .targets import Frozen
from .tokens import TokenRows

# More than the whole vocabulary's mass by as much as log-probs rounded to bfloat16 may make it: 2^-8 of a log-prob of
# -10 is 4 %. Logits in the place of log-probs are far above.
_MOST_MASS = 1.1

# Entries that are checked at once: checking all of a long batch would take several times its own memory.
_CHECKED = 1 << 20

Models = tuple[Frozen, ...]  # one a route, none where no model is needed


def check_topk(options: LossOptions, teacher: Models, ref: Models, vocab_size: int, ids_given: bool) -> None:
    """Check the options of topk against the models that the loss needs; ``ids_given`` as support_ids."""
    k = options.k
    if ids_given:
        for name, given in (("teacher", teacher), ("ref", ref)):
            for i, model in enumerate(given):
                if isinstance(model, TopKLogProbs):
                    raise TypeError(
                        f"{_name(name, i, teacher, ref)} is TopKLogProbs, which bring ids of their own; support_ids "
                        "need a LinearHead or Logits, which are scored there"
                    )
        for option, default in (("k", None), ("support", "teacher")):
            value = getattr(options, option)
            if value != default:
                raise ValueError(f"{option} chooses the support, which support_ids give: got {option}={value!r} too")
        return
    asked: list[bool] = []  # whether a head is asked for its largest, route by route
    listed: set[int] = set()
    for i in range(max(len(teacher), len(ref))):
        models = {name: x[i] for name, x in (("teacher", teacher), ("ref", ref)) if x}
        answers = {name: model.k for name, model in models.items() if isinstance(model, TopKLogProbs)}
        if answers and options.support == "student":
            name = _name(next(iter(answers)), i, teacher, ref)
            raise TypeError(
                f"{name} is TopKLogProbs, and support='student' needs a LinearHead or Logits: the student's tokens "
                "need not be among those that another model listed"
            )
        first = next(iter(models))
        if answers and first not in answers:
            raise TypeError(
                f"{_name('ref', i, teacher, ref)} is TopKLogProbs, which goes with a teacher that is TopKLogProbs too, "
                "since it must contain the teacher's tokens; a teacher with the whole vocabulary needs such a reference"
            )
        asked.append(first not in answers)
        listed |= {answers[first]} if first in answers else set()
    if not any(asked):
        if k is not None and {k} != listed:
            raise ValueError(f"k is for heads; TopKLogProbs have their own K={sorted(listed)}, got k={k!r}")
    elif k is None:
        raise ValueError(
            "k must be given for estimator='topk' with a LinearHead or Logits: how many tokens it looks at"
        )
    elif k > vocab_size:
        raise ValueError(f"k must be at most the vocabulary of {vocab_size}, got {k}")


def _name(name: str, i: int, teacher: Models, ref: Models) -> str:
    """What messages call a model: by its place in the list where there is one."""
    models = teacher if name == "teacher" else ref
    return f"{name}[{i}]" if any(model is not models[0] for model in models) else name


class Scores(NamedTuple):
    """Scores of the live tokens from elsewhere, (n, K); None for a model that has none."""

    token_ids: Tensor | None  # int64, -1 is none
    teacher: Tensor | None  # log-probs; undefined at an id of -1
    ref: Tensor | None  # of the same ids


NO_SCORES = Scores(None, None, None)


class _Answer(NamedTuple):
    """What a server sent for the live tokens of a route."""

    name: str
    token_ids: Tensor  # (m, K) int64
    logprobs: Tensor  # (m, K)
    counts: Tensor | None  # (m,) bool, False where lambda cancels it; None is everywhere

    def blocks(self) -> Iterator[slice]:
        step = max(1, _CHECKED // self.token_ids.shape[1])
        for start in range(0, self.token_ids.shape[0], step):
            yield slice(start, start + step)


def scores_of(
    teacher: Models,
    ref: Models,
    rows: TokenRows,
    slices: list[tuple[int, int]],
    reward_scale: float | Tensor,  # tensor: (n,)
    vocab_size: int,
    sampled: Tensor | None = None,  # (n,)
) -> Scores:
    """The scores of all routes; ids are the teacher's, the reference's where there is no teacher.

    With ``sampled`` ids of tokens they are as :func:`fused_gopd.objective.topk.with_sampled` gives them.
    """
    ids: list[Tensor | None] = []
    scores: dict[str, list[Tensor | None]] = {"teacher": [], "ref": []}
    for i, (start, stop) in enumerate(slices):
        own: Tensor | None = None
        for (name, cancelled_at), models in zip(FROZEN, (teacher, ref), strict=True):
            model = models[i] if models else None
            if not isinstance(model, TopKLogProbs):
                scores[name].append(None)
                continue
            listed = rows.take(model.token_ids.to(torch.int64), start, stop)
            counts = reward_scale[start:stop] != cancelled_at if isinstance(reward_scale, Tensor) else None
            logprobs = rows.take(model.logprobs.detach(), start, stop)
            if sampled is not None:
                assert model.sampled_logprobs is not None
                of_sampled = rows.take(model.sampled_logprobs.detach(), start, stop).to(logprobs.dtype)
                listed = with_sampled(listed, sampled[start:stop])
                logprobs = torch.cat((of_sampled[:, None], logprobs), 1)
            answer = _Answer(_name(name, i, teacher, ref), listed, logprobs, counts)
            _check(answer, vocab_size)
            scores[name].append(answer.logprobs if own is None else _matched(own, answer))
            own = answer.token_ids if own is None else own
        ids.append(own)
    return Scores(_joined(ids, slices, -1), *(_joined(parts, slices, 0) for parts in scores.values()))


def _joined(parts: list[Tensor | None], slices: list[tuple[int, int]], missing: int) -> Tensor | None:
    """The routes' tensors as one, as wide as the widest; where a route has none it is never read."""
    there = [x for x in parts if x is not None]
    if not there:
        return None
    if len(parts) == 1:
        return there[0]
    width, wide = max(x.shape[1] for x in there), [x.dtype for x in there]
    out = there[0].new_full(
        (slices[-1][1], width), missing, dtype=max(wide, key=lambda dtype: torch.empty(0, dtype=dtype).element_size())
    )
    for x, (start, stop) in zip(parts, slices, strict=True):
        if x is not None:
            out[start:stop, : x.shape[1]] = x
    return out


def _check(answer: _Answer, vocab_size: int) -> None:
    for block in answer.blocks():
        ids, logprobs = answer.token_ids[block], answer.logprobs[block]
        refuse(
            (ids < -1) | (ids >= vocab_size),
            ids,
            IndexError,
            f"{answer.name}.token_ids must be in [0, {vocab_size}), or -1 for none, where not masked",
        )
        ordered = ids.sort(1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        message = f"{answer.name}.token_ids must be distinct at each position"
        refuse(repeated, ordered[:, 1:], ValueError, message, "twice there is")
        mass = logprobs.float().masked_fill(ids < 0, -math.inf).exp().sum(1)
        if answer.counts is not None:
            mass = mass.masked_fill(~answer.counts[block], 0)
        message = f"{answer.name}.logprobs must be log-probabilities, whose exponentials sum to at most 1 at a position"
        refuse(mass > _MOST_MASS, mass, ValueError, message)


def _matched(ids: Tensor, answer: _Answer) -> Tensor:
    """The reference's log-probs of the teacher's ids, (m, K); -inf where it need not have them."""
    out = torch.full(ids.shape, -math.inf, dtype=answer.logprobs.dtype, device=ids.device)
    for block in answer.blocks():
        wanted, logprobs = ids[block].contiguous(), answer.logprobs[block]
        ordered, order = answer.token_ids[block].contiguous().sort(1)
        place = torch.searchsorted(ordered, wanted).clamp_max(ordered.shape[1] - 1)
        found = (ordered.gather(1, place) == wanted) & (wanted >= 0)
        missing = ~found & (wanted >= 0)
        if answer.counts is not None:
            missing = missing & answer.counts[block, None]
        message = f"{answer.name}.token_ids must contain those of the teacher at the same position, where not masked"
        refuse(missing, wanted, ValueError, message, "missing is")
        out[block] = logprobs.gather(1, order).gather(1, place).masked_fill(~found, -math.inf)
    return out
