"""``fused-gopd reproduce``: tests the paper's claims on tiny models with checkable answers, on two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import installing
from . import outputs
from .bench import benchmarks_module
from .durable import Damaged
from .parameters import require_packages
from .threads import use_patient_threads

_NEEDS = ("transformers", "safetensors", "matplotlib")


def _run(runner: Any, plan: Any, output: Path, cache: Path | None, workers: int) -> dict[str, Any]:
    """Run the stages, with a progress bar on a terminal or else a line per stage."""
    from rich.console import Console

    from .progress import StepProgress

    total = len(runner.stages.with_parents(run.stage for run in plan.runs))
    console = Console(stderr=True)
    with StepProgress(console, "stage", transient=True) as progress:
        task = progress.add_task("base models", total=total)

        def done(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if not console.is_terminal:
                at = progress.tasks[0]
                typer.echo(f"{at.elapsed or 0.0:5.0f} s  {at.completed:.0f}/{total}  {name}", err=True)

        try:
            found: dict[str, Any] = runner.reproduce(plan, output, cache, workers, done)
        except Damaged as error:
            raise typer.BadParameter(str(error), param_hint="--cache") from None
    return found


def _print(module: Any, found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "claim", "here"):
        table.add_column(column, overflow="fold")
    for verdict in module.verdicts(found):
        table.add_row({True: "yes", False: "no", None: "–"}[verdict.holds], verdict.claim, verdict.here)
    console.print(table)


def reproduce(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer values of λ and prompts, shorter trainings; strong-to-weak on request."),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each student.")] = 1,
    claim: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one, may be repeated: lambda, two-teachers, strong-to-weak, dynamics, length, estimators."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where JSON, page and pictures go: a new folder or its own.")] = Path(
        "gopd-reproduction"
    ),
    cache: Annotated[Path | None, typer.Option(help="Where finished stages are kept. Default: OUTPUT/cache.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
) -> None:
    """Test the paper's claims on tiny transformers and two domains with checkable answers.

    Trains a base model, makes two teachers from it by GRPO, and distils students from them; all losses are this
    package's. Finished stages are kept: an interrupted run continues after the last one, and a run with more seeds only
    computes the new ones. The page compares each claim with the paper's figure, also where it does not reproduce.
    """
    require_packages("reproduce", _NEEDS, installing.extra("models"))
    use_patient_threads()
    claims = benchmarks_module("reproduction.claims", needs=())
    unknown = [name for name in claim or () if name not in claims.CLAIMS]
    if unknown:
        raise typer.BadParameter(
            f"expected one of {', '.join(claims.CLAIMS)}; got {unknown[0]!r}", param_hint="--claim"
        )
    runner = benchmarks_module("reproduction.runner", needs=())
    plan = claims.Plan(
        claims.settings_of(quick), range(seeds), claim or (claims.QUICK_CLAIMS if quick else claims.CLAIMS)
    )
    with outputs.option("--output"):
        found = _run(runner, plan, output, cache, workers)
    _print(benchmarks_module("reproduction.verdicts", needs=()), found)
    typer.echo(f"{output / 'reproduction.md'}")
