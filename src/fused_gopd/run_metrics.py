"""The metrics of a run: their names in TRL's logs, in rows of ``metrics.jsonl``, in lines of text and in curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

HELD_OUT = "eval_"
"""Before the name of a metric of held-out prompts."""
POINTS = 600
"""The most points of a curve."""
_OF_LOSS = "gopd/"  # before the names of the loss's own metrics in TRL's logs


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: in a row.
        label: of its curve, below the heading of the group.
        title: in a line of text; empty for the name.
        logged: in TRL's logs; empty for ``gopd/NAME``.
    """

    name: str
    label: str
    title: str = ""
    logged: str = ""


@dataclass(frozen=True)
class Group:
    """Metrics that are drawn together."""

    heading: str
    unit: str
    metrics: tuple[Metric, ...]
    of_machine: bool = False  # they depend on the machine alone


GROUPS = (
    Group("Reward, log q − log r", "nats per token", (Metric("reward", "reward"),)),
    Group(
        "KL divergence, exact",
        "nats per token",
        (
            Metric("kl_target", "KL(p ‖ target)", "KL to target"),
            Metric("kl_teacher", "KL(p ‖ q), teacher", "KL to teacher"),
            Metric("kl_ref", "KL(p ‖ r), reference", "KL to reference"),
        ),
    ),
    Group(
        "KL divergence, estimated at the sampled tokens (k3)",
        "nats per token",
        (
            Metric("kl_teacher_k3", "KL(p ‖ q), teacher", "KL to q (k3)"),
            Metric("kl_ref_k3", "KL(p ‖ r), reference", "KL to r (k3)"),
        ),
    ),
    Group("Loss", "", (Metric("loss", "loss", logged="loss"), Metric("sft_loss", "of the labels, −log p"))),
    Group("Advantage", "nats", (Metric("advantage", "mean"), Metric("advantage_std", "standard deviation"))),
    Group("Entropy of the student", "nats per token", (Metric("entropy", "entropy", logged="entropy"),)),
    Group("Length of the answers", "tokens", (Metric("length", "length", logged="completions/mean_length"),)),
    Group("λ", "", (Metric("reward_scale", "λ"),)),
    Group(
        "Shares of the tokens and answers",
        "",
        (
            Metric("truncated", "answers that were cut off", logged="completions/clipped_ratio"),
            Metric("clip_fraction", "tokens whose gradient a clip removed"),
            Metric("masked_fraction", "tokens of weight 0"),
            Metric("impossible", "tokens that a model gives probability 0"),
            Metric("effective_sample_size", "effective sample size"),
            Metric("on_policy", "steps with sampled answers"),
            Metric("cache_hits", "sequences that the cache had"),
        ),
    ),
    Group(
        "Spans that both tokenizers have, as shares",
        "",
        (Metric("aligned_tokens", "of the tokens"), Metric("aligned_bytes", "of the bytes")),
    ),
    Group(
        "Importance weights of the sampler's tokens",
        "",
        (
            Metric("importance", "mean"),
            Metric("importance_std", "standard deviation"),
            Metric("importance_max", "largest"),
        ),
    ),
    Group("KL divergence of sampler and student (k3)", "nats per token", (Metric("sampler_kl", "KL(sampler ‖ p)"),)),
    Group("Age of the sampler's weights", "optimizer steps", (Metric("staleness", "age"),)),
    Group("Norm of the gradient", "", (Metric("grad_norm", "norm", logged="grad_norm"),)),
    Group("Learning rate", "", (Metric("learning_rate", "learning rate", logged="learning_rate"),)),
    Group(
        "Seconds of a step",
        "s",
        (
            Metric("seconds", "all of it", logged="step_time"),
            Metric("sample_seconds", "sampling"),
            Metric("score_seconds", "teachers and reference"),
        ),
        of_machine=True,
    ),
    Group("Tokens per second", "", (Metric("tokens_per_second", "tokens per second"),), of_machine=True),
)
_METRICS = {metric.name: metric for group in GROUPS for metric in group.metrics}
_LOGGED = {metric.logged: metric.name for metric in _METRICS.values() if metric.logged}
TIMES = tuple(metric.name for group in GROUPS if group.of_machine for metric in group.metrics)
"""Names in a row of what depends on the machine alone."""


def row_name(logged: str) -> str | None:
    """What a name in TRL's logs is called in a row; None of what has no place there."""
    part = logged.removeprefix(HELD_OUT)
    known = part.removeprefix(_OF_LOSS) if part.startswith(_OF_LOSS) else _LOGGED.get(part)
    return known if known is None or part == logged else HELD_OUT + known


def row_of(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one step, or of an evaluation after it (``eval_reward``); NaN and infinity become None."""
    row: dict[str, Any] = {"step": step}
    for name, value in logs.items():
        known = row_name(name)
        if known is not None:
            row[known] = float(value) if value is not None and math.isfinite(value) else None
    return row


def rows_of(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each logged step of ``trainer.state.log_history``, with the evaluation after it, by step."""
    rows: dict[int, dict[str, Any]] = {}
    for logs in history:
        row = row_of(logs["step"], logs)
        if len(row) > 1:
            row |= {name: logs[name] for name in ("first_step",) if name in logs}
            rows[logs["step"]] = {**rows.get(logs["step"], {}), **row}
    return [rows[step] for step in sorted(rows)]


def thinned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows; of more steps than a curve may have points, their means over equally many steps, one row each.

    Such a row has ``first_step`` and, the last one, ``step``. NaN, infinity and None are left out of the means.
    """
    steps = [row.get("step", n) for n, row in enumerate(rows, 1)]
    if len(set(steps)) <= POINTS:
        return list(rows)
    first, last = min(steps), max(steps)
    width = math.ceil((last - first + 1) / POINTS)
    groups: dict[float, list[Mapping[str, Any]]] = {}
    for step, row in zip(steps, rows, strict=True):
        groups.setdefault((step - first) // width * width + first, []).append(row)
    return [
        {**_means(some), "first_step": start, "step": min(start + width - 1, last)}
        for start, some in sorted(groups.items())
    ]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(chain.from_iterable(rows)):
        values = [value for row in rows if name in row and is_number(value := row[name])]
        found[name] = sum(values) / len(values) if values else None
    return found


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def line(row: Mapping[str, Any], names: Iterable[str], prefix: str = "", between: str = "  ") -> str:
    """Those of the metrics that a row has, as a line of text: ``reward 0.12  entropy 1.5``; – is NaN or infinity.

    Args:
        row: the metrics.
        names: without the prefix.
        prefix: before the names in the row, such as that of held-out prompts.
        between: two of them.
    """
    shown = []
    for name in names:
        if prefix + name in row:
            value = row[prefix + name]
            shown.append(f"{_METRICS[name].title or name} {'–' if value is None else format(value, '.3g')}")
    return between.join(shown)
