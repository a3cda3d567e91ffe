"""The progress of a command on a terminal: what is counted and the times on one line, what is done now on the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from ..integrations.trl.phases import Phase


class StepProgress(Progress):
    """A bar that gives way on a narrow terminal, before the count and the times do; nothing where there is none."""

    def __init__(self, console: Console, counted: str, *, transient: bool = False) -> None:
        """``counted`` is the word before the count."""
        super().__init__(
            TextColumn("{task.fields[counted]}"),
            _Count(),
            BarColumn(bar_width=None, table_column=Column(max_width=40)),
            TimeElapsedColumn(),
            _Rate(),
            console=console,
            transient=transient,
            disable=not console.is_terminal,
        )
        self._counted = counted
        self._shown: Phase | None = None
        self._phase: TaskID | None = None  # the task that shows it

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        return super().add_task(description, *args, **{"counted": self._counted, **options})

    def show_phase(self, phase: Phase) -> None:
        """Show a phase of a step in a second bar with a time of its own; it replaces that of the phase before.

        Of a phase with one part the bar moves to and fro. Tokens per second are in the place of the time that remains.
        """
        if phase is not self._shown and self._phase is not None:
            self.remove_task(self._phase)
        if phase is not self._shown:
            self._phase = self.add_task("", counted=phase.name, rate="", total=None)
            self._shown = phase
        assert self._phase is not None
        rate = phase.tokens_per_second
        self.update(
            self._phase,
            completed=phase.done,
            total=phase.total if phase.total > 1 else None,
            rate="" if rate is None else f"{rate:.3g} tokens/s",
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.description:
                yield Text(task.description, no_wrap=True, overflow="ellipsis")


class _Count(MofNCompleteColumn):
    """``117/256``; nothing where the total is not known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Rate(TimeRemainingColumn):
    """The rate of a phase, or the time that remains."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["rate"]) if "rate" in task.fields else super().render(task)
