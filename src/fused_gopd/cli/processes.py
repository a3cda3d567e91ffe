"""The processes of a command that a launcher started several times: which is the first, and what they agree on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


class Processes:
    """All processes of a run, as a launcher's environment describes them; alone without one.

    The first process writes the output and speaks. The others compute.
    """

    def __init__(self) -> None:
        """Connect the processes, if there are several. They use GPUs if there are any."""
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.first_of_machine = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self.count > 1:
            import torch

            accelerate: Any = importlib.import_module("accelerate")
            accelerate.PartialState(cpu=not torch.cuda.is_available())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. All of them must call this, and all methods below."""
        if self.count == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in a process."""
        return any(self.all(flag))

    def shared(self, value: Any) -> Any:
        """The value that the first process has."""
        return self.all(value)[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """End all processes where the block fails in one of them, with its message; the first process shows it.

        All processes must reach the end of the block, so nothing in it may wait for another process.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        found = self.all(None if error is None else (_message(error), _status(error)))
        failed = [rank for rank, each in enumerate(found) if each is not None]
        if not failed:
            return
        if error is not None and (self.first or not isinstance(error, (typer.BadParameter, typer.Exit))):
            raise error
        message, status = found[failed[0]]
        if self.first:
            typer.echo(f"error: in process {failed[0]} of {self.count}: {message}", err=True)
        raise typer.Exit(status)

    def close(self) -> None:
        """Disconnect the processes at the end of the run."""
        if self.count > 1:
            importlib.import_module("accelerate").PartialState().destroy_process_group()


def _message(error: Exception) -> str:
    return error.format_message() if isinstance(error, typer.BadParameter) else f"{type(error).__name__}: {error}"


def _status(error: Exception) -> int:
    return int(getattr(error, "exit_code", 1))
