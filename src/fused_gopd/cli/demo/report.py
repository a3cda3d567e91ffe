"""Tables and picture of a demo run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...pictures import BLUE, GREY, MUTED, ORANGE, picture
from .compare import WAYS, Measured
from .prompts import EXTRAPOLATION
from .verdict import Finding

if TYPE_CHECKING:
    from .held_out import Evaluation


def _table(title: str, *columns: str, bars: tuple[int, ...] = (0,)) -> Table:
    """Columns are numbers, but those of ``bars`` are left-justified."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in bars else "right", no_wrap=True)
    return table


def print_comparison(console: Console, measured: Sequence[Measured]) -> None:
    """Bars of memory and time of the dense and the fused loss on the same hidden states."""
    first = measured[0]
    title = "1. The saving: one loss and its gradients, dense and fused"
    table = _table(title, "", "memory", "", "time", "", "loss", bars=(0, 1, 3))

    def bar(value: float, largest: float, width: int) -> Text:
        return Text(("█" * max(1, round(width * value / largest))).ljust(width), "red" if m is first else "green")

    memory, seconds = max(m.peak_bytes or 0 for m in measured), max(m.seconds for m in measured)
    for m in measured:
        table.add_row(
            WAYS[m.way],
            bar(m.peak_bytes or 0, memory or 1, 16),
            "?" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:,.0f} MiB",
            bar(m.seconds, seconds, 12),
            f"{m.seconds:.2f} s",
            f"{m.loss:.3f}",
        )
    console.print()
    console.print(table)
    same = len({f"{m.loss:.3f}" for m in measured}) == 1
    console.print(
        f"{'The same loss to the last printed digit: ' if same else ''}{first.tokens:,} tokens of the model's own "
        f"answers, float32, λ = {EXTRAPOLATION:g}, backend {measured[-1].backend}. Memory: peak beyond the inputs, "
        f"{first.gradient_bytes / 2**20:.0f} MiB of it gradients.\n"
    )


def print_training(console: Console, rows: dict[str, Evaluation]) -> None:
    """The table of held-out metrics before and after training."""
    table = _table(
        "2. The training: answers to held-out questions",
        *("", "reward per token", "KL(p‖q)", "KL(p‖r)", 'with "!"', '"!" each'),
    )
    for name, e in rows.items():
        reward = f"{e.reward:+.2f} ± {e.reward_error:.2f}"
        table.add_row(
            name, reward, f"{e.kl_teacher:.2f}", f"{e.kl_ref:.2f}", f"{e.excited:.0%}", f"{e.exclamations:.2f}"
        )
    console.print()
    console.print(table)
    console.print("p: the row's model, q: the teacher, r: the student before training. Reward: log q − log r.")


def print_samples(console: Console, questions: Sequence[str], rows: dict[str, Evaluation], count: int = 2) -> None:
    """Print the first answers to a few held-out questions, a line each."""
    console.print("\nA change of style: at temperature 1 a 135M model's answers are near gibberish before and after.")
    for index, question in enumerate(questions[:count]):
        console.print(f"[bold]{escape(question)}[/bold]")
        for name, e in rows.items():
            text = Text(f"{name:<8} ", "dim").append(" ".join(e.texts[index].split()), "none")
            console.print(text, no_wrap=True, overflow="ellipsis")


def print_warnings(console: Console, warnings: Sequence[str]) -> None:
    """What the trainers warned of."""
    for text in warnings:
        console.print(Text(f"warning: {text}", "yellow"))


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print each criterion, and whether it is met."""
    console.print("\n[bold]What was asked of this run[/bold]")
    for finding in findings:
        console.print(f"{'[green]met   ' if finding.passed else '[red]FAILED'}[/] {escape(finding.text)}")


def print_closing(console: Console, measured: Sequence[Measured], rows: dict[str, Evaluation]) -> None:
    """One sentence of what a run that met its criteria showed, and what to do next."""
    dense, fused = measured[0], measured[1]
    saving = f"{dense.seconds / fused.seconds:.1f} times faster"
    if dense.peak_bytes and fused.peak_bytes:
        saving += f" in {dense.peak_bytes / fused.peak_bytes:.1f} times less memory"
    before, ordinary, *others = rows.values()
    learnt = f"came closer to its teacher: KL {before.kl_teacher:.2f} before, {ordinary.kl_teacher:.2f} after"
    if others:
        extrapolated, teacher = others
        learnt = (
            f'learned from itself to sound excited: "!" per answer {before.exclamations:.1f} before, '
            f"{ordinary.exclamations:.1f} at λ = 1, {extrapolated.exclamations:.1f} at λ = {EXTRAPOLATION:g}, "
            f"beyond the {teacher.exclamations:.1f} of its teacher"
        )
    console.print(
        f"\n[bold]You saw[/bold] the same loss computed {saving} than by dense code, and a student that {learnt}.\n"
        "[bold]Next[/bold]: docs/quickstart.md has a first loss of your own, and fused-gopd plan --model qwen3-4b says "
        "what a model needs."
    )


def draw(path: Path, rows: dict[str, Evaluation]) -> None:
    """Bars of the exclamation marks in held-out answers, and a line at the teacher's."""
    with picture(path, 680, 80 + 42 * len(rows)) as figure:
        axis = figure.subplots()
        values = [e.exclamations for e in rows.values()]
        bars = axis.barh(range(len(rows)), values, height=0.6, color=[GREY, BLUE, ORANGE, GREY][: len(rows)])
        axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=4)
        axis.set_yticks(range(len(rows)), [f"{name}\nreward {e.reward:+.2f}" for name, e in rows.items()])
        if "teacher" in rows:
            axis.axvline(rows["teacher"].exclamations, color=MUTED, linestyle="--", linewidth=1)
        axis.set_xlabel('"!" per answer to held-out questions')
        axis.invert_yaxis()
        axis.tick_params(axis="y", length=0)
        axis.set_title("SmolLM2-135M learns from itself to sound excited", loc="left")
