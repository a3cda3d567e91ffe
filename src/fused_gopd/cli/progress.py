"""The progress of a command on a terminal: what is counted and the times on one line, what is done now on the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        self._phase: TaskID | None = None

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        return super().add_task(description, *args, **{"counted": self._counted, **options})

    def begin_phase(self, name: str) -> None:
        """Show a second bar, with a time of its own, for a part of what is counted; it replaces the last one."""
        if self._phase is not None:
            self.remove_task(self._phase)
        self._phase = self.add_task("", counted=name, rate="", total=None)

    def update_phase(self, done: int, total: int, rate: str) -> None:
        """A total of 1 is shown as a bar that moves to and fro. ``rate`` is in the place of the time that remains."""
        if self._phase is not None:
            self.update(self._phase, completed=done, total=total if total > 1 else None, rate=rate)

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
