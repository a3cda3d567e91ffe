"""The command line, ``fused-gopd``: doctor, plan, bench, distill, reproduce and demo.

Commands import transformers and the benchmarks when they run, so that ``--help`` does not need them.
"""

from __future__ import annotations

import typer

from . import bench, demo, distill, doctor, plan, reproduce

app = typer.Typer(
    name="fused-gopd",
    help="Fused losses for generalized on-policy distillation.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # docstring paragraphs are wrapped to the terminal's width
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(doctor.doctor)
app.command()(plan.plan)
app.command()(bench.bench)
app.command()(distill.distill)
app.command()(reproduce.reproduce)
app.command()(demo.demo)
