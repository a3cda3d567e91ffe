"""A trainer's logs as rows of metrics: ``metrics.jsonl`` of ``distill``, and the curves of the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# names in TRL's logs -> names in a row; the loss's own metrics lose their prefix alone
_NAMES = {
    "loss": "loss",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "truncated",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "step_time": "seconds",
}
TIMES = ("seconds", "sample_seconds", "score_seconds", "tokens_per_second")
"""Names in a row of what depends on the machine alone."""
_PREFIX, _EVAL = "gopd/", "eval_"


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
            rows[logs["step"]] = {**rows.get(logs["step"], {}), **row}
    return [rows[step] for step in sorted(rows)]


def row_name(name: str) -> str | None:
    """What a name in TRL's logs is called in a row; None of what has no place there."""
    part = name.removeprefix(_EVAL)
    known = part.removeprefix(_PREFIX) if part.startswith(_PREFIX) else _NAMES.get(part)
    return known if known is None or part == name else _EVAL + known
