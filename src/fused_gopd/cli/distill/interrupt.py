"""Ctrl-C (or SIGTERM) in a run: the step under way is completed or abandoned, and all complete steps are saved."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..processes import Processes


class Abandoned(BaseException):
    """A step is given up, in all processes at the same place: none is left in a collective operation of the step.

    The message is that of the error in the first process that had one, empty where the user has interrupted the step;
    the cause is the error of this process, if it had one.
    """


class Interrupt(TrainerCallback):
    """A first signal stops the run after the step under way, which is abandoned if it waits for a server.

    A second signal raises KeyboardInterrupt at once. An abandoned step is repeated when the run is resumed. To repeat
    it with the same random numbers, the states of the generators are recorded at the end of each step.

    Of several processes all stop after the same step, whichever of them got the signal.
    """

    def __init__(self, say: Callable[[str], None], processes: Processes) -> None:
        self.asked = False
        self._say, self._processes = say, processes
        self._waiting = False  # whether the main thread waits for a server
        self._random_numbers: tuple[Any, ...] = ()

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        what = "this step waits for the teacher's server: it is given up" if self._waiting else "this step is ended"
        self._say(f"interrupted: {what}, then all is saved; again: stop now, from the last checkpoint")
        if self._waiting:
            raise Abandoned

    def guard(self, trainer: Any) -> None:
        """Have the trainer give up a step in which a server gives a process no scores, or that a signal interrupts."""
        score = trainer._score_teachers

        def scored(*arguments: Any) -> Any:
            error: BaseException | None = None
            try:
                try:
                    self._waiting = True
                    if self.asked:
                        raise Abandoned
                    found = score(*arguments)
                finally:
                    self._waiting = False  # a signal that comes first raises in this try, too
            except (Exception, Abandoned) as raised:
                error = raised
            failures = self._processes.all(None if error is None else _message(error))
            if failures.count(None) == len(failures):
                return found
            rank = next((rank for rank, failure in enumerate(failures) if failure), None)
            where = "" if rank is None or len(failures) == 1 else f"in process {rank} of {len(failures)}: "
            cause = error if isinstance(error, Exception) else None  # not this process's own interrupt
            raise Abandoned("" if rank is None else f"{where}{failures[rank]}") from cause

        trainer._score_teachers = scored

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        # the trainer's checkpoints save NumPy's global state
        numpy = np.random.get_state()  # noqa: NPY002
        self._random_numbers = (random.getstate(), numpy, torch.get_rng_state(), cuda)
        if self._processes.any(self.asked):
            control.should_training_stop = control.should_save = True

    def restore_random_numbers(self) -> None:
        """Set the generators to their states after the last complete step."""
        python, numpy, cpu, cuda = self._random_numbers
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _message(error: BaseException) -> str:
    return str(error) or ("" if isinstance(error, Abandoned) else type(error).__name__)
