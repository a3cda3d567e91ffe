"""The command line, ``fused-gopd``: doctor, plan, bench, distill, inspect, reproduce and demo.

Commands import PyTorch, transformers and the benchmarks when they need them: help, ``plan`` and wrong options do not.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
import typer.core

from .. import __version__
from . import bench, demo, distill, doctor, inspect, plan, reproduce


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:  # its message may quote a file, with codes that move a terminal's cursor
            from ..html.texts import visible

            error.message = visible(error.message)
            raise


app = typer.Typer(
    name="fused-gopd",
    cls=_Commands,
    help="Fused losses for generalized on-policy distillation.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # docstring paragraphs are wrapped to the terminal's width
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fused-gopd {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(doctor.doctor)
app.command()(plan.plan)
app.command()(bench.bench)
app.command()(distill.distill)
app.command()(inspect.inspect)
app.command()(reproduce.reproduce)
app.command()(demo.demo)
