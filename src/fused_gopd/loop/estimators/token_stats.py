"""The :class:`TokenStats` of a chunk: what ``advantage_fn`` and ``reward_scale_fn`` get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...objective.divergences import ReverseKL, kl_to_target
from ...objective.layout import TokenRow
from ...objective.statistics import entropy, token_logprob
from ...objective.token_functions import call_function
from ...problem import Problem
from ...rowops import ModelRows, RowProblem, Stat
from ...rowops.torch import rows_of
from ...token_stats import TokenStats
from ..vocab_parallel import statistics_of

MODELS = ("student", "teacher", "ref")
# What may be made from a chunk's logits when it is first read.
COMPUTED = ("student_logprobs", "teacher_logprobs", "ref_logprobs", "student_entropy", "teacher_entropy", "ref_entropy",
            "kl_teacher", "kl_ref", "reward_scale")  # fmt: skip


def known_of(problem: Problem, start: int, stop: int) -> dict[str, Any]:
    """What needs no statistics."""
    index, old = problem.rows.index, rows_of(problem.old_logprobs, slice(start, stop))
    return {
        "index": torch.arange(start, stop, device=problem.device) if index is None else index[start:stop],
        "old_logprobs": None if old is None else old.clone(),  # not the caller's own memory
    }


def computed_by(problem: Problem, start: int, stop: int, compute: Callable[[str], Tensor | None]) -> TokenStats:
    """Statistics that ``compute`` makes by their names; log-probs of frozen models are at least ``logprob_min``."""
    lowest = problem.options.logprob_min

    def value(name: str) -> Tensor | None:
        if name == "reward_scale":
            raise ValueError("reward_scale of TokenStats is what a reward_scale_fn is to return")
        if name.endswith("_logprobs") and problem.token_ids is None:
            raise ValueError(f"token_ids must be given for {name} of TokenStats, those of the sampled tokens")
        with torch.no_grad():
            x = compute(name)
        if x is not None and lowest is not None and name in ("teacher_logprobs", "ref_logprobs"):
            x = x.clamp_min(lowest)
        return x

    return TokenStats.computed_by(value, COMPUTED, advantages=None, **known_of(problem, start, stop))


def fill_reward_scale(
    problem: Problem, statistics: Tensor, start: int, stop: int, compute: Callable[[str], Tensor | None]
) -> None:
    """Call the ``reward_scale_fn`` with what ``compute`` makes of tokens [start, stop), and keep their lambda."""
    assert problem.reward_scale_fn is not None
    stats = computed_by(problem, start, stop, compute)
    scale = call_function("reward_scale_fn", problem.reward_scale_fn, stats, problem.dtype)
    statistics[TokenRow.REWARD_SCALE, start:stop] = scale


class OfLogits:
    """Statistics of a chunk whose logits are in memory, of all models.

    One pass over the logits of a model makes its log-probs and its entropy, one over those of two their divergence.
    """

    def __init__(
        self,
        problem: Problem,
        columns: int,
        models: dict[str, ModelRows | None],
        token_ids: Tensor | None,
        logprobs: Mapping[str, Tensor],
    ) -> None:
        self._logprobs = logprobs  # (C,) of the models made of several, which have no normaliser
        self._problem, self._columns, self._models = problem, columns, models
        self._token_ids = token_ids  # (C,) relative to the columns of this rank
        self._made: dict[str, Tensor] = {}  # (len(Stat), C) of each model alone

    def __call__(self, name: str) -> Tensor:
        if name.startswith("kl_"):
            return kl_to_target(self._statistics("student", name.removeprefix("kl_")))
        model, _, what = name.partition("_")
        if what == "logprobs" and model in self._logprobs:
            return self._logprobs[model].clone()
        if model not in self._made:
            self._made[model] = self._statistics(model)
        alone = self._made[model]
        if what == "entropy":
            return entropy(alone)
        return token_logprob(alone[Stat.LOGIT_STUDENT], alone[Stat.LOGSUM_STUDENT])

    def _statistics(self, model: str, target: str | None = None) -> Tensor:
        """(len(Stat), C) of a model alone, or of its reverse KL from another one."""
        rows, other = self._models[model], None if target is None else self._models[target]
        assert rows is not None
        pair = RowProblem(
            self._columns,
            rows,
            teacher=other,
            token_ids=self._token_ids,
            divergence=None if target is None else ReverseKL(),
        )
        return statistics_of(self._problem.ops, self._problem.student.shard, pair)[0]
