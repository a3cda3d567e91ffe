"""The whole reproduction: plan, compute what the cache lacks, write the JSON, the page and its pictures."""

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

from . import report, stages
from .claims import Plan


def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for more: two stages at once are faster


def as_json(plan: Plan, cache: Path) -> dict[str, Any]:
    """What is known so far. Runs that are not finished are named in ``missing``."""
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


def reproduce(plan: Plan, output: Path, cache: Path, workers: int, done: Callable[[str], None]) -> dict[str, Any]:
    """Compute, and write ``reproduction.json``, ``reproduction.md`` and ``images/`` into a folder.

    Args:
        workers: processes of one thread each.
        done: called with the name of each finished stage.
    """
    cache.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
            stages.execute([run.stage for run in plan.runs], cache, pool, workers, lambda stage: done(stage.name))
    finally:  # interrupted: a page of what is finished, which names what is not
        found = as_json(plan, cache)
        write(found, output)
    return found


def write(found: dict[str, Any], output: Path) -> None:
    """The JSON, and the page that is made from it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "reproduction.json"
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    report.write(json.loads(path.read_text()), output / "reproduction.md", output / "images")
