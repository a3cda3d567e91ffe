"""What a trainer does at the moment, load, sample, score or step, with its tokens per second."""

from __future__ import annotations

import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

_REDRAWN_EVERY = 0.1  # seconds
_CPU = torch.device("cpu")


def _marks_on(device: torch.device) -> list[torch.Event]:
    """This point in the device's queue of kernels; nothing on the CPU, where the host's clock says what time it is."""
    if device.type == "cpu":
        return []
    mark = torch.Event(device.type, enable_timing=True)
    mark.record()
    return [mark]


class Phase:
    """A phase of a step: what callbacks with a method ``on_phase(args, state, control, phase=phase)`` get.

    Attributes:
        name: ``"load"`` (a frozen model), ``"sample"`` (completions), ``"score"`` (by teachers and reference), or
            ``"step"`` (the student's loss and gradients; the optimizer's own step is not in it).
        detail: the model that is loaded, else "".
        done, total: tokens of a completion while sampling, else batches of an optimizer step.
        tokens: of the completions of this process: those sampled so far, those that are scored or trained on.
        seconds: spent in this phase alone, without the phases inside it.
        tokens_per_second: so far; until that is known, of the last phase of this name, or None.
    """

    def __init__(
        self, name: str, detail: str, done: int, total: int, last: float | None, device: torch.device = _CPU
    ) -> None:
        self.name, self.detail = name, detail
        self.done, self.total = done, total
        self.tokens = 0
        self.tokens_at_end: int | Tensor = 0  # where they are not counted one by one
        self._last = last
        self._before = 0.0
        self._device = device
        self._marks: list[torch.Event] = []  # where it begins, or goes on, and where it ends, in turn
        self._resume()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / max(self.seconds, 1e-9) if self.tokens else self._last

    def describe(self) -> str:
        """A few words: ``sample 117/256, 140 tokens/s``."""
        count = f" {self.done}/{self.total}" if self.total > 1 else ""
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.3g} tokens/s"
        return f"{self.name}{f' {self.detail}' if self.detail else ''}{count}{rate}"

    def _pause(self) -> None:
        self._before = self.seconds
        self._marks += _marks_on(self._device)

    def _resume(self) -> None:
        self._started = time.perf_counter()
        self._marks += _marks_on(self._device)


class PhasesMixin:
    """Tells callbacks of each phase, and measures how long the phases of a step take.

    Kernels are asynchronous. What is logged is the time between marks in the device's own queue, which nobody waits
    for; only what a callback is shown is of phases whose kernels are done.
    """

    accelerator: Any
    args: Any
    callback_handler: Any
    state: Any
    control: Any
    current_gradient_accumulation_steps: int
    _metrics: Any
    _step: int
    _phase_now: Phase | None = None

    def _show_phases(self) -> None:
        """Add the phase to the progress bar of transformers, if the trainer has one. Called once."""
        self._rates: dict[str, float] = {}
        self._phase_seconds: dict[str, float] = defaultdict(float)  # by name, since the last log
        self._unread: deque[tuple[str, torch.Event, torch.Event]] = deque()  # times that are not in it yet
        if not (sys.stderr.isatty() and self.accelerator.is_main_process):  # no bar, or one that a file gets
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                self.callback_handler.add_callback(_PhaseInBar(callback))
                break

    @contextmanager
    def _phase(self, name: str, detail: str = "", done: int = 0, total: int = 0) -> Iterator[Phase]:
        """A phase, perhaps inside another one, which it interrupts."""
        outer = self._phase_now
        if outer is not None:
            outer._pause()
        phase = Phase(name, detail, done, total, self._rates.get(name), self.accelerator.device)
        self._phase_now = phase
        self._tell()
        try:
            yield phase
            if self._phases_are_shown and self.accelerator.device.type != "cpu":
                torch.accelerator.synchronize()
            phase._pause()
            if self._phases_are_shown:
                phase.tokens = int(phase.tokens_at_end) or phase.tokens
                if phase.tokens:
                    self._rates[name] = phase.tokens / max(phase._before, 1e-9)
            if outer is not None:  # in a step: what an evaluation samples and scores is not of one
                self._keep_time(phase)
        finally:
            self._phase_now = outer
            if outer is not None:
                outer._resume()
                self._tell()

    def _keep_time(self, phase: Phase) -> None:
        if not phase._marks:
            self._phase_seconds[phase.name] += phase._before
        self._unread.extend((phase.name, *ends) for ends in zip(phase._marks[::2], phase._marks[1::2], strict=True))
        while self._unread and self._unread[0][2].query():  # the device has come that far
            self._read_time()

    def _read_time(self) -> None:
        name, begin, end = self._unread.popleft()
        end.synchronize()
        self._phase_seconds[name] += begin.elapsed_time(end) / 1000

    def _tell(self) -> None:
        handler = self.callback_handler
        for callback in handler.callbacks:
            on_phase = getattr(callback, "on_phase", None)
            if on_phase is not None:
                on_phase(self.args, self.state, self.control, phase=self._phase_now)

    @property
    def _phases_are_shown(self) -> bool:
        return any(hasattr(callback, "on_phase") for callback in self.callback_handler.callbacks)

    @contextmanager
    def _sampling(self) -> Iterator[Phase]:
        """The phase in which the student samples: counts the tokens while transformers' ``generate`` runs.

        The input embedding gets (B, P) ids of the prompts, then (B, 1) ids of the tokens that were sampled last, of a
        completion that has ended the end of sequence or padding; the head computes the logits of the next tokens.
        """
        own: Any = self
        ends = {*own.eos_token_ids, own._tokenizer.pad_token_id}
        running = 0

        def look(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal running
            ids = arguments[0]
            running = len(ids) if ids.shape[1] > 1 else sum(token not in ends for token in ids[:, 0].tolist())

        def count(*_: Any) -> None:
            phase.tokens += running
            phase.done += 1
            self._tell()

        with self._phase("sample", total=own.max_completion_length) as phase, ExitStack() as hooks:
            if self._phases_are_shown:  # reading ids waits for the device
                hooks.callback(own.model.get_input_embeddings().register_forward_pre_hook(look).remove)
                hooks.callback(own.model.get_output_embeddings().register_forward_hook(count).remove)
            yield phase

    def training_step(self, *args: Any, **options: Any) -> Any:
        batches = self.current_gradient_accumulation_steps
        with self._phase("step", done=self._step % batches, total=batches) as phase:
            output = super().training_step(*args, **options)  # type: ignore[misc]
            phase.done += 1
        return output

    def _count_in_step(self, mask: Tensor) -> None:
        if self._phase_now is not None:  # else an evaluation
            self._phase_now.tokens_at_end = mask.sum()

    def _log_phases(self, tokens: float) -> None:
        """Add to TRL's metrics the seconds of a phase per optimizer step, and all ranks' trained tokens per second."""
        steps = self._metrics["train"]["step_time"]
        while self._unread:  # the metrics have been read: the device is done with what came before them
            self._read_time()
        if steps:
            for name in ("sample", "score"):
                self._metrics["train"][f"gopd/{name}_seconds"] = [self._phase_seconds[name] / len(steps)]
            self._metrics["train"]["gopd/tokens_per_second"] = [tokens / sum(steps)]
            self._phase_seconds.clear()


class _PhaseInBar(TrainerCallback):
    """Shows the phase behind the progress bar of transformers."""

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress, self._drawn = progress, 0.0

    def on_phase(self, args: Any, state: Any, control: Any, *, phase: Phase) -> None:
        bar = self._progress.training_bar
        now = time.monotonic()
        if bar is None or now - self._drawn < _REDRAWN_EVERY:
            return
        self._drawn = now
        bar.set_postfix_str(phase.describe())
