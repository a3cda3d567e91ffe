"""The whole reproduction: plan, compute the stages that are not cached, write the JSON, the page and its plots."""

from __future__ import annotations

import json
import multiprocessing
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fused_gopd
from fused_gopd.cli.outputs import OutputFolder, opened

from . import report, stages
from .claims import Plan


def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for several threads: two stages at a time are faster


def as_json(plan: Plan, cache: Path) -> dict[str, Any]:
    """The results so far; ``missing`` names the unfinished runs."""
    import transformers

    rows = plan.results(cache)
    have = {row["key"] for row in rows}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"fused-gopd": fused_gopd.__version__, "python": platform.python_version()}
    finished = [s for run in plan.runs for s in stages.with_parents([run.stage])]
    results = {s.key: stages.result(s, cache) or {} for s in finished}
    times = {what: round(sum(r.get(what, 0.0) for r in results.values())) for what in ("seconds", "cpu_seconds")}
    return {
        "settings": asdict(plan.settings),
        "claims": list(plan.claims),
        "seeds": plan.seeds,
        "versions": versions,
        "stages": {"timed": sum("cpu_seconds" in r for r in results.values()), **times},
        "missing": [{"group": r.group, "seed": r.seed} for r in plan.runs if r.stage.key not in have],
        "runs": rows,
    }


def reproduce(
    plan: Plan, output: Path, cache: Path | None, workers: int, done: Callable[[str], None]
) -> dict[str, Any]:
    """Compute, and write ``reproduction.json``, ``reproduction.md`` and ``images/`` into a folder.

    Args:
        cache: of finished stages; several runs may share it. None: a folder in the output folder.
        workers: processes of one thread each.
        done: called with the name of each finished stage.

    Raises:
        OutputError: one of the folders is somebody else's, or cannot be written.
    """
    place = cache or output / "cache"
    inside = place == output / "cache"
    reads = {} if inside else {"the cache of stages": place}
    context = multiprocessing.get_context("spawn")  # a fork would not have PyTorch's threads
    with opened(output, "reproduce", reads=reads) as folder:
        folder.check("reproduction.json", "reproduction.md", "images", "cache")
        if inside:
            folder.extend("cache")
        with opened(place, "reproduce --cache", exclusive=False):
            try:
                with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
                    runs = [run.stage for run in plan.runs]
                    stages.execute(runs, place, pool, workers, lambda stage: done(stage.name))
            finally:  # also after an interrupt: the page shows the finished runs and names the missing ones
                found = as_json(plan, place)
                write(found, folder)
    return found


def write(found: dict[str, Any], folder: OutputFolder) -> None:
    """Write the JSON, and the page that is made from it."""
    text = json.dumps(found, separators=(",", ":")) + "\n"
    folder.create("reproduction.json").write_text(text, encoding="utf-8")
    report.write(json.loads(text), folder.create("reproduction.md"), folder.create("images"))
    for name in ("reproduction.json", "reproduction.md", "images"):
        folder.finish(name)
