"""The progress of a command on a terminal: what is counted and the times on one line, what is done now on the next."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class StepProgress(Progress):
    """A bar that gives way on a narrow terminal, before the count and the times do; nothing where there is none."""

    def __init__(self, console: Console, counted: str, *, transient: bool = False) -> None:
        """``counted`` is the word before the count."""
        super().__init__(
            TextColumn(counted),
            MofNCompleteColumn(),
            BarColumn(bar_width=None, table_column=Column(max_width=40)),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
            disable=not console.is_terminal,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.description, no_wrap=True, overflow="ellipsis")
