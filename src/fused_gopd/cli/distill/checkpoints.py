"""The checkpoints of a run: finds the newest intact one, and deletes all but the newest two."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import typer

from ..durable import Damaged, seal, verify
from ..outputs import OutputFolder
from . import inputs, runfile
from .options import FILE

_NAME = re.compile(r"checkpoint-([1-9][0-9]*)")
_KEPT = 2


class Checkpoints:
    """The folders ``checkpoint-N`` of a run, written after N steps. Other folders are never touched."""

    def __init__(self, folder: OutputFolder) -> None:
        self._folder, self._output = folder, folder.path
        self.partial = self._output / "checkpoint.partial"  # the trainer writes its checkpoints here
        self._intact: list[int] = []  # steps of the checkpoints that this process verified or wrote

    def path(self, step: int) -> Path:
        return self._output / f"checkpoint-{step}"

    @property
    def done(self) -> int:
        """The step of the newest intact checkpoint; 0 without one."""
        return max(self._intact, default=0)

    def find(self, say: Callable[[str], None]) -> None:
        """Find the newest intact checkpoint, and name the damaged ones that are newer."""
        damaged = []
        for step in sorted(self._steps(), reverse=True):
            try:
                if (written := verify(self.path(step))) != step:
                    raise Damaged(f"it was written as checkpoint-{written}")
            except Damaged as error:
                damaged.append(f"{self.path(step).name} is damaged ({error})")
            else:
                self._intact = [step]
                break
        if damaged and not self._intact:
            raise typer.BadParameter(
                f"no checkpoint in {self._output} is intact: {'; '.join(damaged)}. Put a copy of one back, or remove "
                "these folders: --resume then begins at the first step, with the same options",
                param_hint="--output",
            )
        for line in damaged:
            say(f"{line}: the run goes on from checkpoint-{self.done}")

    def add(self, step: int) -> None:
        """Seal and rename the checkpoint that the trainer has written; delete all but the newest two intact ones."""
        written = self.partial / f"checkpoint-{step}"
        seal(written, step)
        self._folder.move(f"{self.partial.name}/{written.name}", self.path(step).name)
        self._intact = [*self._intact, step][-_KEPT:]
        for other in self._steps():
            if other not in self._intact and self._folder.wrote(self.path(other).name):
                self._folder.remove(self.path(other).name)

    def history(self) -> list[dict[str, Any]]:
        """The trainer's logs up to the newest intact checkpoint."""
        if not self.done:
            return []
        state = (self.path(self.done) / "trainer_state.json").read_text(encoding="utf-8")
        return cast("list[dict[str, Any]]", json.loads(state)["log_history"])

    def _steps(self) -> list[int]:
        names = (_NAME.fullmatch(path.name) for path in self._output.glob("checkpoint-*"))
        return [int(name[1]) for name in names if name]


def relist(folder: OutputFolder) -> None:
    """Rebuild the list of what a run wrote into its folder, after the list is lost.

    Listed are folders that agree with their manifests, and the other names that only a run writes.
    """
    for path in (*folder.path.glob("checkpoint-*"), folder.path / "model", folder.path / "adapter"):
        with suppress(Damaged):
            verify(path)
            folder.finish(path.name)
    partial = (f"{name}.partial" for name in ("checkpoint", "model", "adapter"))
    for name in (FILE, inputs.FILE, "tensorboard", *partial):
        if (folder.path / name).exists():
            folder.adopt(name)
    for name in ("report.html", "metrics.jsonl", runfile.FILE):
        if (folder.path / name).exists():
            folder.finish(name)
