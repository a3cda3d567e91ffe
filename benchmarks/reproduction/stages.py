"""Stages that are cached: a folder per stage, named by a hash of its configuration and of its parents'.

A folder is renamed into its place when it is complete. So an interrupted run goes on where it stopped, a changed
configuration computes what depends on it and nothing else, and two runs may share a cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import LlamaForCausalLM

from fused_gopd.cli.durable import Damaged

from . import models, work

# Part of every key: raise it when a change of `work` changes results.
VERSION = 2


@dataclass(frozen=True)
class Stage:
    """One cached computation.

    Attributes:
        name: for people and for the report; not part of the key.
        kind: the function of :mod:`work` that does it.
        config: its arguments, as JSON has them.
        parents: stages whose models it is given, in this order.
    """

    name: str
    kind: str
    config: dict[str, Any]
    parents: tuple[Stage, ...] = field(default=())

    @cached_property
    def key(self) -> str:
        content = [VERSION, self.kind, self.config, [p.key for p in self.parents]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, cache: Path) -> Path:
        return cache / f"{self.kind}-{self.key}"


def with_parents(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all their ancestors, each once, parents first."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in found:
            for parent in stage.parents:
                visit(parent)
            found[stage.key] = stage

    for stage in stages:
        visit(stage)
    return list(found.values())


def result(stage: Stage, cache: Path) -> dict[str, Any] | None:
    """The result of a finished stage, or None."""
    path = stage.folder(cache) / "result.json"
    with _reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def load(stage: Stage, cache: Path) -> LlamaForCausalLM:
    """The model of a finished stage."""
    found, path = result(stage, cache), stage.folder(cache) / "model.safetensors"
    with _reading(path):
        model = models.build((found or {})["size"], seed=0)
        load_model(model, path)
    return model


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise Damaged(
            f"{path} is damaged: remove its folder, and the stage is computed again ({type(error).__name__}: {error})"
        ) from None


def compute(stage: Stage, cache: Path) -> None:
    """Compute a stage, whose parents are finished, and cache it."""
    start, cpu = time.perf_counter(), time.process_time()
    model, found = getattr(work, stage.kind)([load(p, cache) for p in stage.parents], **stage.config)
    folder = stage.folder(cache)
    draft = cache / f"{folder.name}.{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    if model is not None:
        save_model(model, str(draft / "model.safetensors"))
        found["size"] = models.size_of(model)
    found["seconds"] = round(time.perf_counter() - start, 2)
    found["cpu_seconds"] = round(time.process_time() - cpu, 2)  # the time without other load
    (draft / "stage.json").write_text(json.dumps({"name": stage.name, "kind": stage.kind, "config": stage.config}))
    (draft / "result.json").write_text(json.dumps(found))
    try:
        draft.rename(folder)
    except OSError:  # another process has computed the same in the meantime
        if not (folder / "result.json").is_file():
            raise
        shutil.rmtree(draft)


def execute(
    stages: Iterable[Stage], cache: Path, executor: Executor, workers: int, done: Callable[[Stage], None]
) -> None:
    """Compute the stages that are not cached, in the given order as their parents are finished.

    Args:
        executor: where; a pool of processes, since a stage keeps the interpreter busy.
        workers: how many at once. What is handed to a pool early would go before what comes first but was not ready.
        done: called in this process for each stage, cached ones included.

    Raises:
        RuntimeError: a stage failed; those that were being computed are waited for and kept.
    """
    waiting = with_parents(stages)
    ready: set[str] = set()
    for stage in waiting:
        if result(stage, cache) is not None:
            ready.add(stage.key)
            done(stage)
    waiting = [stage for stage in waiting if stage.key not in ready]
    running: dict[Future[None], Stage] = {}
    while waiting or running:
        able = [s for s in waiting if all(p.key in ready for p in s.parents)]
        for stage in able[: workers - len(running)]:
            waiting.remove(stage)
            running[executor.submit(compute, stage, cache)] = stage
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            stage = running.pop(future)
            try:
                future.result()
            except Damaged:
                wait(running)
                raise
            except Exception as error:
                wait(running)
                raise RuntimeError(f"stage {stage.name} failed: {error}") from error
            ready.add(stage.key)
            done(stage)
