"""One plot per claim, from the runs of a JSON file. Makes Matplotlib figures without global state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .verdicts import STRINGS, Runs, Score


def _errorbar(axis: Any, xs: list[float], scores: list[Score], **style: Any) -> None:
    axis.errorbar(xs, [s.mean for s in scores], [max(s.spread, s.error) for s in scores], capsize=3, **style)


def _draw_lambda(r: Runs, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    xs = r.scales("A")
    _errorbar(left, xs, [r.score(f"A λ={x:g}") for x in xs], marker="o", color="C0", label="student")
    for name, color in (("base", "0.6"), ("teacher A", "C3")):
        left.axhline(r.score(name).mean, color=color, linestyle="--", label=name)
    left.set(xlabel="λ", ylabel="accuracy, addition", xscale="log", xticks=xs, xticklabels=[f"{x:g}" for x in xs])
    left.minorticks_off()
    left.legend()
    right.plot(xs, [r.last(f"A λ={x:g}", "reward") for x in xs], marker="o", color="C1")
    right.set(
        xlabel="λ",
        ylabel="implicit reward per token at the end",
        xscale="log",
        xticks=xs,
        xticklabels=[f"{x:g}" for x in xs],
    )
    right.minorticks_off()


def _draw_two(r: Runs, figure: Any) -> None:
    axis = figure.subplots()
    groups = [row["group"] for row in r.rows if "two-teachers" in row["claims"]]
    for group in dict.fromkeys(groups):
        a, b = r.score(group), r.score(group, STRINGS)
        color = "C3" if "teacher" in group else "C0" if "λ" in group else "0.5"
        axis.errorbar(
            a.mean, b.mean, max(b.spread, b.error), max(a.spread, a.error), marker="o", color=color, capsize=2
        )
        axis.annotate(
            group.removeprefix("A+B "), (a.mean, b.mean), xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    axis.margins(x=0.12)  # room for the names
    axis.set(xlabel="accuracy, addition", ylabel="accuracy, strings")
    axis.axvline(r.score("teacher A").mean, color="C3", linestyle=":")
    axis.axhline(r.score("teacher B", STRINGS).mean, color="C3", linestyle=":")


def _draw_weak(r: Runs, figure: Any) -> None:
    groups = list(dict.fromkeys(row["group"] for row in r.rows if "strong-to-weak" in row["claims"]))
    axis = figure.subplots()
    for i, group in enumerate(reversed(groups)):
        s = r.score(group)
        color = "C3" if group == "teacher A" else "C2" if "teacher's base" in group else "C0" if "λ" in group else "0.6"
        axis.barh(i, s.mean, xerr=max(s.spread, s.error), color=color, capsize=3)
    axis.set(yticks=range(len(groups)), yticklabels=groups[::-1], xlabel="accuracy, addition")


def _draw_dynamics(r: Runs, figure: Any) -> None:
    names = {"reward": "implicit reward", "length": "length", "entropy": "entropy", "log_ratio_teacher": "log p/q"}
    names |= {"log_ratio_ref": "log p/r", "accuracy": "accuracy of rollouts"}
    scales = r.scales("A")
    for axis, (key, name) in zip(figure.subplots(2, 3).flat, names.items(), strict=True):
        for i, x in enumerate(scales):
            axis.plot(*r.history(f"A λ={x:g}", key), color=_viridis(i / max(1, len(scales) - 1)), label=f"λ={x:g}")
        axis.set(xlabel="step", title=name)
    if scales:
        figure.axes[0].legend(fontsize=7)


def _viridis(x: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * x)


def _draw_length(r: Runs, figure: Any) -> None:
    axis = figure.subplots()
    for group in ["base", "teacher A", *(f"A λ={x:g}" for x in r.scales("A"))]:
        x, y = r.score(group, field="length"), r.score(group)
        color = "C3" if "teacher" in group else "C0" if "λ" in group else "0.5"
        axis.errorbar(x.mean, y.mean, max(y.spread, y.error), x.spread, marker="o", color=color, capsize=2)
        axis.annotate(group.removeprefix("A "), (x.mean, y.mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axis.margins(x=0.12)  # room for the names
    axis.set(xlabel="tokens of an answer", ylabel="accuracy, addition")


def _draw_estimators(r: Runs, figure: Any) -> None:
    axis = figure.subplots()
    for row in r.rows_of("variance"):
        curves = {name: values for name, values in row["variance"].items() if min(values) > 0}
        for name, values in curves.items():
            axis.loglog(row["batches"], values, marker="o", label=name)
        if curves:  # some runs have no curve of this signal
            axis.set(xticks=row["batches"], xticklabels=row["batches"])
            axis.legend()
    axis.set(xlabel="sequences in a batch", ylabel="tr Cov(g) / |E g|²")
    axis.minorticks_off()


PICTURES: dict[str, tuple[Callable[[Runs, Any], None], tuple[float, float]]] = {
    "lambda": (_draw_lambda, (9, 3.6)),
    "two-teachers": (_draw_two, (6, 4.4)),
    "strong-to-weak": (_draw_weak, (7.5, 4.4)),
    "dynamics": (_draw_dynamics, (10, 5.6)),
    "length": (_draw_length, (6, 4)),
    "estimators": (_draw_estimators, (6, 4)),
}
