"""The command line, ``fused-gopd``: doctor, plan, bench, distill, reproduce and demo.

Each command imports what it needs when it runs, so that ``--help`` needs neither PyTorch's kernels nor transformers.
"""

from __future__ import annotations

import typer

from . import bench, demo, distill, doctor, plan, reproduce

app = typer.Typer(
    name="fused-gopd",
    help="Fused losses for generalized on-policy distillation.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs of the docstrings are refilled to the terminal's width
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(doctor.doctor)
app.command()(plan.plan)
app.command()(bench.bench)
app.command()(distill.distill)
app.command()(reproduce.reproduce)
app.command()(demo.demo)
