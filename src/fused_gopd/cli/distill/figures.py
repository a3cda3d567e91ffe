"""The metrics of a run: a line of JSON per step, a progress bar on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ...html.texts import visible
from ...run_metrics import HELD_OUT, line, row_of
from ..durable import replace
from ..progress import StepProgress

if TYPE_CHECKING:
    from ...integrations.trl.phases import Phase


class Record:
    """``metrics.jsonl``: a line per step, and one per evaluation. A resumed run rewrites it: each is there once."""

    def __init__(self, path: Path, history: Iterable[Mapping[str, Any]]) -> None:
        """``history``: the trainer's logs up to the step after which the run continues."""
        self.path = path
        self.rows = [row_of(logs["step"], logs) for logs in history if "loss" in logs or "eval_loss" in logs]
        replace(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
        row = row_of(step, logs)
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def summary(row: Mapping[str, Any]) -> str:
    """The metrics that a line shows, of four those that the run has (at λ = 1 no reward).

    The KL to the target is what training lowers; that to the teacher, an estimate of ``sampled``, may rise at λ > 1.
    """
    kl = "kl_teacher_k3" if row.get("kl_target") is None else "kl_target"
    return line(row, ("reward", kl, "entropy", "length"))


def held_out(row: Mapping[str, Any]) -> str:
    """The metrics of an evaluation that a line shows."""
    kl = "kl_teacher_k3" if row.get(f"{HELD_OUT}kl_teacher") is None else "kl_teacher"
    return line(row, ("reward", kl, "kl_ref"), HELD_OUT)


class Display:
    """A progress bar on a terminal, else a line per step."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self._progress = StepProgress(console, "step")
        self._steps = steps
        self._task = self._progress.add_task("", total=steps)
        self._load: Callable[[str], None] = lambda what: None

    @contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """A bar that moves while models are loaded, and is gone afterwards."""
        with StepProgress(self.console, "load", transient=True) as bar:
            task = bar.add_task(what, total=None)
            self._load = lambda what: bar.update(task, description=what)
            yield

    @contextmanager
    def running(self, done: int) -> Iterator[None]:
        self._progress.reset(self._task, total=self._steps, completed=done, counted="step")  # the time begins now
        with self._progress:
            yield

    def phase(self, phase: Phase) -> None:
        """A second bar, on a terminal alone: how far the phase is, and its tokens per second."""
        if phase.name == "load":
            self._load(phase.detail)
        else:
            self._progress.show_phase(phase)

    def step(self, row: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=row["step"], description=summary(row))
        if not self.console.is_terminal:
            speed = "" if row.get("seconds") is None else f"  {row['seconds']:.1f} s"
            if row.get("tokens_per_second") is not None:
                speed += f", {row['tokens_per_second']:.3g} tokens/s"
            self.console.print(
                f"step {row['step']}/{self._steps}  {summary(row)}{speed}", highlight=False, soft_wrap=True
            )

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self.say(f"held out, after step {row['step']}:  {held_out(row)}")

    def say(self, text: str) -> None:
        """Print a line of plain text above the bar, whatever is in it."""
        self._progress.console.print(visible(text), highlight=False, markup=False, soft_wrap=True)
