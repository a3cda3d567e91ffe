"""Tables, plot and raw data of a demo run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .compare import WAYS, Measured
from .training import Evaluation, TrainingHistory
from .verdict import Finding


def print_comparison(console: Console, measured: Sequence[Measured]) -> None:
    """The table of dense and fused losses on the same hidden states."""
    first = measured[0]
    backend = next((m.backend for m in measured if m.way.startswith("fused")), "?")
    table = Table(
        title=f"One loss with gradients on {first.tokens} tokens of the model's own answers, lambda = 1.25, float32",
        caption=f"Errors against float64: loss in nats, gradients as a ratio of norms. Peak: beyond the inputs, with "
        f"{first.gradient_bytes / 2**20:.0f} MiB of gradients. Fused backend: {backend}.",
    )
    for column in ("estimator", "", "loss", "loss error", "dX error", "dW error", "peak MiB", "seconds"):
        table.add_column(column, justify="left" if column in ("estimator", "") else "right")
    for estimator in dict.fromkeys(m.estimator for m in measured):
        for m in measured:
            if m.estimator == estimator:
                table.add_row(
                    m.estimator,
                    WAYS[m.way],
                    f"{m.loss:.6f}",
                    f"{m.loss_error:.1e}",
                    f"{m.hidden_error:.1e}",
                    f"{m.weight_error:.1e}",
                    "?" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:,.0f}",
                    f"{m.seconds:.2f}",
                )
        table.add_section()
    console.print(table)


def print_training(console: Console, rows: dict[str, Evaluation]) -> None:
    """The table of held-out metrics before and after training."""
    any_row = next(iter(rows.values()))
    table = Table(
        title=f"Held-out questions, {any_row.tokens} tokens of the student's own answers at temperature 1",
        caption="reward = mean log q - log r per token; +- one standard error over answers",
    )
    for column in ("", "reward", "expected reward", "KL(p||teacher)", "KL(p||ref)", '"!" per answer', 'with "arr"'):
        table.add_column(column, justify="right" if column else "left")
    for name, e in rows.items():
        table.add_row(
            name,
            f"{e.reward:+.3f} +- {e.reward_error:.3f}",
            f"{e.expected_reward:+.3f}",
            f"{e.kl_teacher:.3f}",
            f"{e.kl_ref:.3f}",
            f"{e.exclamations:.2f}",
            f"{e.arr:.0%}",
        )
    console.print(table)


def print_samples(console: Console, questions: Sequence[str], rows: dict[str, Evaluation], count: int = 3) -> None:
    """Print the first answers to a few held-out questions, before and after training."""
    console.print(
        "[bold]Samples[/bold] (a style shift: at temperature 1 a 135M model's answers are near gibberish before and "
        "after)"
    )
    for index, question in enumerate(questions[:count]):
        console.print(f"[bold]{escape(question)}[/bold]")
        for name, e in rows.items():
            text = " ".join(e.texts[index].split())
            console.print(f"  [dim]{escape(name)}:[/dim] {escape(text)}")


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print each criterion, and whether it is met."""
    for finding in findings:
        console.print(f"{'[green]met   ' if finding.passed else '[red]FAILED'}[/] {escape(finding.text)}")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write the raw data."""
    path.write_text(json.dumps(data, indent=2) + "\n")


def run_data(run: TrainingHistory) -> dict[str, Any]:
    """A training run as plain data."""
    return {
        "reward_scale": run.reward_scale,
        "losses": run.losses,
        "rollouts": run.rollouts,
        "held_out": [{"updates": updates, **e.figures()} for updates, e in run.held_out],
    }


def comparison_data(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The comparison as plain data."""
    return [asdict(m) for m in measured]


def draw(path: Path, before: Evaluation, teacher: Evaluation | None, runs: Sequence[TrainingHistory]) -> None:
    """Plot held-out KL and reward over updates, the same on each training rollout, and bars before and after."""
    importlib.import_module("matplotlib").use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    colors = ("tab:blue", "tab:orange")
    panels = (("kl_teacher", "KL(student || teacher)", 0.0), ("reward", "implicit reward, log q - log r", None))
    for axis, (key, title, level) in zip(axes[:2], panels, strict=True):
        for run, color in zip(runs, colors, strict=False):
            label = f"lambda = {run.reward_scale:g}"
            held = [(updates, getattr(e, key)) for updates, e in run.held_out]
            axis.plot(*zip(*held, strict=True), "o-", color=color, label=f"{label}, held out")
            rollouts = [(r["updates"], r[key]) for r in run.rollouts]
            axis.plot(*zip(*rollouts, strict=True), "x:", color=color, alpha=0.6, label=f"{label}, fresh rollout")
        if level is None and teacher is not None:
            axis.axhline(teacher.reward, color="gray", linestyle="--", linewidth=1, label="the teacher itself")
        axis.set(title=title, xlabel="updates", ylabel="nats per token")
        if level is not None:
            axis.set_ylim(bottom=level)
        axis.legend(fontsize=7)
    names = ["before", *(f"lambda = {run.reward_scale:g}" for run in runs)]
    students = [before, *(run.final for run in runs)]
    if teacher is not None:
        names.append("teacher")
        students.append(teacher)
    shades = ["lightgray", *colors[: len(runs)], "gray"][: len(names)]
    for axis, title, values in (
        (axes[2], '"!" per held-out answer', [e.exclamations for e in students]),
        (axes[3], 'share of held-out answers with "arr"', [e.arr for e in students]),
    ):
        axis.bar(names, values, color=shades)
        axis.set(title=title, ylim=(0, 1.1 * max(*values, 0.1)))  # keeps the axis from 0 up where all values are 0
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle("SmolLM2-135M distils its own pirate prompt")
    figure.savefig(path, dpi=120)
    plt.close(figure)
