"""Ctrl-C (or SIGTERM) in a run: the step under way is completed or abandoned, and all complete steps are saved."""

from __future__ import annotations

import inspect
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
    """Raised in a step that waits for a teacher's server, to abandon it."""


class Interrupt(TrainerCallback):
    """A first signal stops the run after the step under way, which is abandoned if it waits for a server.

    A second signal raises KeyboardInterrupt at once. An abandoned step is repeated when the run is resumed. To repeat
    it with the same random numbers, the states of the generators are recorded at the end of each step.

    Of several processes all stop after the same step, whichever of them got the signal. None abandons a step: the
    others would wait for it.
    """

    def __init__(self, say: Callable[[str], None], processes: Processes) -> None:
        self.asked = False
        self._say, self._processes = say, processes
        self._waiting = False  # whether the main thread waits for a scorer
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

    def scorer(self, teacher: Any) -> Any:
        """Wrap a teacher that is a scorer, so that an interrupt need not wait for its answer."""
        return _Scorer(teacher, self)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._waiting = self._processes.count == 1
        try:
            if self.asked and self._waiting:
                raise Abandoned
            yield
        finally:
            self._waiting = False

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


class _Scorer:
    def __init__(self, teacher: Any, interrupt: Interrupt) -> None:
        self._teacher, self._interrupt = teacher, interrupt
        self.__signature__ = inspect.signature(teacher)  # what it takes, not what this class does

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)  # its attributes temperature and top_k

    def __call__(self, *arguments: Any) -> Any:
        with self._interrupt.waiting():
            return self._teacher(*arguments)
