"""The student as a teacher or reference: a frozen copy of it, and one that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..adapters import frozen_copy

# in a checkpoint's folder: the tensors of the copies, by "KIND/NAME"
FILE = "student_copies.safetensors"


class StudentCopy:
    """A frozen copy of the student, with tensors of its own for what is trained: all weights, or those of an adapter.

    Args:
        student: the model, not wrapped.
        every: optimizer steps between two updates; None: it stays what it is.
        ema: decay d of an exponential moving average, which an update makes d * average + (1 - d) * student; None: an
            update makes the copy the current student. The average is float32 where weights are of another dtype.
    """

    def __init__(self, student: nn.Module, *, every: int | None = None, ema: float | None = None) -> None:
        self.model = frozen_copy(student)
        self._every = every if ema is None else every or 1
        self._ema = ema
        theirs = dict(student.named_parameters())
        parameters: dict[str, Tensor] = {n: x for n, x in self.model.named_parameters() if x is not theirs[n]}
        state = self.model.state_dict(keep_vars=True)
        buffers = dict(self.model.named_buffers())  # those that forwards in training mode may write to
        self._buffers = {name: x for name, x in buffers.items() if name in state and x.is_floating_point()}
        self._parameters = parameters
        self._averages: dict[str, Tensor] = {}
        if ema is not None:
            self._averages = {n: x if x.dtype == torch.float32 else x.float() for n, x in self._parameters.items()}

    @property
    def moves(self) -> bool:
        """Whether it follows the student."""
        return self._every is not None

    @torch.no_grad()
    def follow(self, student: nn.Module, step: int) -> None:
        """Update the copy after the optimizer step of this number, counted from 1."""
        if self._every is None or step % self._every:
            return
        theirs = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        for name, own in self._parameters.items():
            if self._ema is None:
                own.copy_(theirs[name])
            else:
                average = self._averages[name]
                average.lerp_(theirs[name].to(torch.float32), 1 - self._ema)
                if average is not own:
                    own.copy_(average)
        for name, own in self._buffers.items():
            own.copy_(theirs[name])

    def state(self) -> dict[str, Tensor]:
        """What makes the copy: its parameters, or their averages, and its buffers."""
        return {**self._parameters, **self._averages, **self._buffers}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ValueError: it is of another model.
        """
        own = self.state()
        different = sorted(own.keys() ^ state.keys())
        different += sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        if different:
            raise ValueError(f"it has other weights than the student, such as {different[0]}")
        for name, x in own.items():
            x.copy_(state[name])
        for name, average in self._averages.items():
            if average is not self._parameters[name]:
                self._parameters[name].copy_(average)


def save_copies(folder: Path, copies: Mapping[str, StudentCopy]) -> None:
    """Write the copies, by their kinds, into a checkpoint's folder."""
    tensors = {f"{kind}/{name}": x for kind, copied in copies.items() for name, x in copied.state().items()}
    on_cpu = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(on_cpu, str(folder / FILE))


def load_copies(folder: Path, copies: Mapping[str, StudentCopy]) -> None:
    """Restore the copies from a checkpoint's folder.

    Raises:
        ValueError: the checkpoint has none, or those of another model.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FILE}: its run had another teacher and reference than this one, of which one is "
            '"student", the student as that run began or an average of it, or it saved without what a resume needs '
            "(save_only_model)"
        )
    tensors = safetensors.torch.load_file(str(path))
    for kind, copied in copies.items():
        own = {n.removeprefix(f"{kind}/"): x for n, x in tensors.items() if n.startswith(f"{kind}/")}
        try:
            copied.load(own)
        except ValueError as error:
            raise ValueError(f"{path} is not of this run: {error}") from None
