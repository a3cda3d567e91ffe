"""``fused-gopd bench``: compares this package with others on identical inputs, and with bare GEMMs of the same run."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from .. import installing
from . import outputs
from .parameters import require_packages

# The benchmarks are fused_gopd.benchmarks in an installed package, and a folder next to src/ in a source tree. One-off
# measurements are in the source tree alone.
_PLACES = ("fused_gopd.benchmarks", "benchmarks")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # no such package
        return False


def benchmarks_module(name: str, needs: tuple[str, ...] = ("pytest", "pytest_benchmark")) -> ModuleType:
    """Import a module of the benchmarks; the error for a missing package says what to install."""
    require_packages("bench", needs, installing.extra("bench"))
    for place in _PLACES:
        if _exists(f"{place}.{name}"):
            return importlib.import_module(f"{place}.{name}")
    raise typer.BadParameter(f"found {name} neither in {_PLACES[0]} nor, in the current folder, in {_PLACES[1]}/")


def _run(bench: ModuleType, options: Any, json_file: Path | None) -> dict[str, Any]:
    """Measure, with a progress bar on a terminal or else a line per case."""
    from rich.console import Console

    from .progress import StepProgress

    console = Console(stderr=True)
    with StepProgress(console, "case", transient=True) as progress:
        task = progress.add_task("starting", total=len(options.cases))

        def done(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if not console.is_terminal:
                elapsed = progress.tasks[0].elapsed or 0.0
                typer.echo(f"{elapsed:5.0f} s  {name}", err=True)

        result: dict[str, Any] = bench.measure(options, done, json_file)
    return result


def _print(report: ModuleType, result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))

    def plain(cell: str) -> str:
        return escape(cell.replace("**", "").replace("`", ""))

    for title, head, rows in report.tables(result):
        table = Table(title=plain(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", min_width=24, overflow="fold")
        for i, column in enumerate(head[1:], 1):
            # headings may wrap, numbers may not
            table.add_column(plain(column), justify="right", min_width=max(len(cells[i]) for cells in rows))
        for cells in rows:
            ours = cells[0].startswith("**")
            table.add_row(*map(plain, cells), style="bold" if ours and "not run" not in cells[0] else None)
        console.print(table)
    console.print(plain(report.provenance(result)), style="dim")


def _check_files(json_file: Path | None, plot: Path | None, overwrite: bool) -> None:
    """Raise before the measurement for files that cannot be written or may not be replaced."""
    for name, path in (("--json", json_file), ("--plot", plot)):
        if path is not None:
            with outputs.option(name):
                outputs.new_file(path, overwrite)
    if plot is not None:
        formats = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
        if plot.suffix[1:].lower() not in formats:
            raise typer.BadParameter(
                f"expected a file that ends in one of .{', .'.join(sorted(formats))}, got {plot.name}",
                param_hint="--plot",
            )
        if json_file is not None and json_file.resolve() == plot.resolve():
            raise typer.BadParameter(f"is the file of --json, {json_file}", param_hint="--plot")


def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    suite: Annotated[str | None, typer.Option(help="Which workloads. Default: cpu or gpu, by the device.")] = None,
    jobs: Annotated[str, typer.Option(help="Comma-separated jobs of the suite. Default: all.")] = "",
    providers: Annotated[str, typer.Option(help="Comma-separated providers. Default: all that do the job.")] = "",
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Factor on the time spent per provider. Default: the suite's.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds after which no further case is started. Default: none.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    accuracy: Annotated[bool, typer.Option(help="Measure errors against float64.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows here, each as soon as it is measured.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time against memory into this image file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace these files if they exist.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="Show suites, jobs and providers and exit.")] = False,
) -> None:
    """Measure time, peak memory and errors against float64, next to dense PyTorch and the installed peers.

    Every provider of a job gets identical inputs and does identical work; times are quantiles without the warm-up, and
    ratios are to the bare matrix products of the same run. Cases that cannot run here are listed with the reason.
    """
    run, report = benchmarks_module("run"), benchmarks_module("report")
    if list_all:
        typer.echo(run.listing())
        return
    rest = {"seconds": seconds, "limit": limit, "memory": memory, "accuracy": accuracy}
    try:
        options = run.Options(device, suite or "", run.names(jobs), run.names(providers), **rest).checked()
    except run.BadOptionError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None
    if plot is not None and not memory:
        raise typer.BadParameter("needs the memory figures: leave --no-memory out", param_hint="--plot")
    if plot is not None:
        require_packages("--plot", ["matplotlib"], installing.extra("bench"))
    _check_files(json_file, plot, overwrite)
    result = _run(run, options, json_file)
    _print(report, result)
    if plot is not None:
        report.plot(result, plot)
    if any(row["failed"] for row in result["skipped"]):
        raise typer.Exit(1)
