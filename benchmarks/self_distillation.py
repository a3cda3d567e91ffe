"""SmolLM2-135M learns a hint from itself: KL to the hinted teacher on held-out questions, before and after.

``python -m benchmarks.self_distillation [--json FILE] [PAGE.md ...]`` trains twice with ``GOPDTrainer`` on the demo's
questions, with the hint in the teacher's prompt alone, and fills in the table between ``<!-- self-distillation -->``
and ``<!-- /self-distillation -->`` of a page. The teacher is the student as it is before training, or an exponential
moving average of its states. Held out is the KL to the same model for both: the untrained one with the hint.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_gopd.cli.demo import smollm
from fused_gopd.cli.demo.prompts import HELD_OUT_QUESTIONS, TRAIN_QUESTIONS, Schedule

from .arguments import parse, publish
from .run import device_name, origin, write

SCHEDULE = Schedule(rollouts=12, updates_per_rollout=1)
TEACHERS: dict[str, float | None] = {"the student before training": None, "its moving average": 0.95}


class _Clock:
    """Seconds, and CPU seconds of this process, since it was made."""

    def __init__(self) -> None:
        self._before = time.perf_counter(), sum(os.times()[:2])

    def read(self) -> dict[str, float]:
        seconds, cpu = time.perf_counter(), sum(os.times()[:2])
        return {"seconds": seconds - self._before[0], "cpu_seconds": cpu - self._before[1]}


def measure(teacher_ema: float | None, schedule: Schedule, seed: int) -> dict[str, Any]:
    """Load, answer held-out questions, train, answer them again."""
    from fused_gopd.cli.demo.held_out import ask, evaluate
    from fused_gopd.cli.demo.training import train

    clock = _Clock()
    model, tokenizer = smollm.load()
    questions = [question for question in HELD_OUT_QUESTIONS for _ in range(schedule.eval_answers)]

    def answered(model: Any) -> dict[str, Any]:
        scored = ask(model, tokenizer, questions, schedule.eval_tokens, seed + 7)
        return asdict(evaluate(scored, tokenizer, schedule.eval_answers))

    before = answered(model)
    training = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        student, history = train(
            model,
            tokenizer,
            TRAIN_QUESTIONS,
            1.0,
            schedule,
            Path(folder),
            seed=seed,
            teacher="student",
            teacher_ema=teacher_ema,
            progress=lambda what, phase=None: None if phase else print(what, flush=True),
        )
    trained = training.read()
    after = answered(student)
    return {
        "teacher_ema": teacher_ema,
        "losses": history.losses,
        "warnings": history.warnings,
        "before": before,
        "after": after,
        "training": trained,
        "whole": clock.read(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ['| teacher | KL(p‖q), held out | "!" per answer | seconds (of CPU) |', "|---|---:|---:|---:|"]
    for name, row in zip(TEACHERS, rows, strict=True):
        ema = "" if row["teacher_ema"] is None else f", `teacher_ema={row['teacher_ema']:g}`"
        before, after = row["before"], row["after"]
        fall = 1 - after["kl_teacher"] / before["kl_teacher"]
        lines.append(
            f"| {name}{ema} | {before['kl_teacher']:.2f} → {after['kl_teacher']:.2f}, {fall:.0%} less "
            f"| {before['exclamations']:.1f} → {after['exclamations']:.1f} "
            f"| {row['whole']['seconds']:.0f} ({row['whole']['cpu_seconds']:.0f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parse(parser, "json")
    smollm.require_packages()
    rows = [measure(ema, SCHEDULE, args.seed) for ema in TEACHERS.values()]
    if args.json:
        write({**origin("cpu"), "seed": args.seed, "schedule": asdict(SCHEDULE), "rows": rows}, args.json)
    where = f"{SCHEDULE.updates} steps of {SCHEDULE.prompts_per_rollout} answers of {SCHEDULE.new_tokens} tokens, "
    where += f"loading and both evaluations in the seconds; {device_name('cpu')}."
    publish("self-distillation", f"{table(rows)}\n\n{where}\n", args.pages)


if __name__ == "__main__":
    main()
