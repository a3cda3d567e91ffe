"""Progress of a demo run, on a terminal and without one. Imports no PyTorch, so that it is there from the start."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from ..progress import StepProgress

if TYPE_CHECKING:
    from ...integrations.trl.phases import Phase

_SILENCE = 5.0  # seconds


@contextlib.contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields a function that is told of each finished step, and with ``begins`` of what comes next.

    With ``phase`` it is told what a training does at the moment, in the place of both. A terminal shows bars. Elsewhere
    each step prints a line, and so does every 5 seconds without one.
    """
    if console.is_terminal:
        with StepProgress(console, "step", transient=True) as bar:
            task = bar.add_task(what, total=total)

            def show(what: str, begins: bool = False, phase: Phase | None = None) -> None:
                if phase is None:
                    bar.update(task, description=what, advance=0 if begins else 1)
                else:
                    bar.show_phase(phase)

            yield show
        return
    started, steps, over = time.monotonic(), 0, threading.Event()
    told = threading.Event()

    def line(what: str) -> None:
        console.print(f"{time.monotonic() - started:4.0f} s  {steps:2}/{total}  {what}", markup=False, soft_wrap=True)

    def step(what_now: str, begins: bool = False, phase: Phase | None = None) -> None:
        nonlocal what, steps
        if phase is not None:
            what = phase.describe()
            return
        what, steps = what_now, steps + (not begins)
        told.set()
        line(what)

    def still() -> None:
        while not over.is_set():
            if not told.wait(_SILENCE) and not over.is_set():
                line(f"... {what}")
            told.clear()

    line(what)
    thread = threading.Thread(target=still, daemon=True)
    thread.start()
    try:
        yield step
    finally:
        over.set()
        told.set()
        thread.join()
