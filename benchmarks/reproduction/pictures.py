"""One plot per claim, from the runs of a JSON file, drawn into a figure of ``fused_gopd.pictures``."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

from fused_gopd.pictures import BLUE, FAINT, GREEN, GREY, ORANGE, PAGE, PURPLE

from .verdicts import STRINGS, Runs, Score


def _bar(score: Score) -> float:
    """Half the length of an error bar: the spread over seeds, at least the sampling error."""
    return max(score.spread, score.error)


def _errorbar(axis: Any, xs: Any, scores: list[Score], **style: Any) -> None:
    axis.errorbar(xs, [s.mean for s in scores], [_bar(s) for s in scores], capsize=3, marker="o", **style)


def _level(axis: Any, score: Score, name: str, color: str) -> None:
    axis.axhline(score.mean, color=color, linestyle="--")
    axis.annotate(name, (0, score.mean), xycoords=("axes fraction", "data"), xytext=(4, 4), textcoords="offset points")


def _draw_lambda(r: Runs, figure: Any) -> None:
    axis, xs = figure.subplots(), r.scales("A")
    _errorbar(axis, range(len(xs)), [r.score(f"A λ={x:g}") for x in xs], color=BLUE)
    _level(axis, r.score("teacher A"), "teacher", ORANGE)
    _level(axis, r.score("base"), "student before training", GREY)
    axis.set(xlabel="λ", ylabel="accuracy, %", title="Accuracy of the student by λ")
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])


def _draw_two(r: Runs, figure: Any) -> None:
    axis, over_lines = figure.subplots(), {"facecolor": PAGE, "edgecolor": "none", "pad": 0.5}
    groups = [row["group"] for row in r.rows if "two-teachers" in row["claims"]]
    kinds = {"λ=": ("G-OPD", BLUE), "ExPO": ("ExPO, in the weights", GREEN), "SFT": ("SFT", PURPLE)}
    kinds |= {"teacher": ("teachers", ORANGE), "base": ("student before training", GREY)}
    for part, (kind, color) in kinds.items():
        of_kind = [group for group in dict.fromkeys(groups) if part in group]
        scores = [(r.score(group), r.score(group, STRINGS)) for group in of_kind]
        xs, ys = [[s[i].mean for s in scores] for i in (0, 1)]
        errors = {"xerr": [_bar(s) for s, _ in scores], "yerr": [_bar(s) for _, s in scores]}
        axis.errorbar(xs, ys, **errors, fmt="o", color=color, capsize=2, label=kind)
        for group, x, y in zip(of_kind, xs, ys, strict=True):
            if "=" in group:  # the names of one kind are to the left of its points, those of the other to the right
                side = (-9, 5, "right") if part == "λ=" else (9, -11, "left")
                text = group.removeprefix("A+B ").removeprefix("ExPO ")
                axis.annotate(
                    text,
                    (x, y),
                    side[:2],
                    textcoords="offset points",
                    ha=side[2],
                    color=color,
                    fontsize=8,
                    bbox=over_lines,
                )
    axis.axvline(r.score("teacher A").mean, color=ORANGE, linestyle=":")
    axis.axhline(r.score("teacher B", STRINGS).mean, color=ORANGE, linestyle=":")
    axis.margins(x=0.1, y=0.1)
    axis.set(xlabel="accuracy, addition, %", ylabel="accuracy, strings, %", title="One student of two teachers")
    axis.legend(loc="upper left", fontsize=8)


def _draw_weak(r: Runs, figure: Any) -> None:
    students = ["matched", "mismatched", "mismatched, trained longer"]
    for axis, student in zip(figure.subplots(3, 1, sharey=True, sharex=True), students, strict=True):
        scales = sorted({1.0, *r.scales(f"{student}, student's reference,")})
        references = {"student's reference": "student before training", "teacher's base": "teacher before RL"}
        for (reference, name), color in zip(references.items(), (BLUE, GREEN), strict=True):
            scores = [r.score(f"{student} λ=1" if x == 1 else f"{student}, {reference}, λ={x:g}") for x in scales]
            _errorbar(axis, range(len(scales)), scores, color=color, label=f"reference: {name}")
        lines = (("teacher A", "teacher", ORANGE), (f"{student} SFT", "SFT", PURPLE))
        for group, name, color in (*lines, (f"{student} student", "student before training", GREY)):
            axis.axhline(r.score(group).mean, color=color, linestyle="--", label=name)
        axis.set(ylabel="accuracy, %", title=f"{student} student", ylim=(0, None))
        axis.set_xticks(range(len(scales)), [f"{x:g}" for x in scales])
    axis.set(xlabel="λ")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)


def _draw_dynamics(r: Runs, figure: Any) -> None:
    names = {"reward": "implicit reward", "length": "length", "entropy": "entropy", "log_ratio_teacher": "log p/q"}
    names |= {"log_ratio_ref": "log p/r", "accuracy": "accuracy of rollouts"}
    scales = r.scales("A")
    for axis, (key, name) in zip(figure.subplots(3, 2, sharex=True).flat, names.items(), strict=True):
        for i, x in enumerate(scales):
            axis.plot(*r.history(f"A λ={x:g}", key), color=_shade(i / max(1, len(scales) - 1)), label=f"λ={x:g}")
        axis.set(title=name)
        axis.grid(axis="y", color=FAINT)
    for axis in figure.axes[-2:]:
        axis.set(xlabel="step")
    if scales:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8)


def _shade(x: float) -> Any:
    """From blue through purple to orange, equally light: seen on a light page and on a dark one."""
    return colorsys.hls_to_rgb((0.6 + 0.48 * x) % 1, 0.58, 0.75)


def _draw_length(r: Runs, figure: Any) -> None:
    axis = figure.subplots()
    points = {"before training": ("base", GREY), "teacher": ("teacher A", ORANGE)}
    points |= {f"λ={x:g}": (f"A λ={x:g}", BLUE) for x in r.scales("A")}
    for name, (group, color) in points.items():
        x, y = r.score(group, field="length"), r.score(group)
        axis.errorbar(x.mean, y.mean, _bar(y), x.spread, marker="o", color=color, capsize=2)
        side = (9, -12, "left") if name == "teacher" else (-9, 4, "right")
        if group == "base":
            side = (9, -4, "left")
        axis.annotate(name, (x.mean, y.mean), side[:2], textcoords="offset points", ha=side[2], fontsize=8)
    axis.margins(x=0.12)
    axis.set(xlabel="tokens of an answer", ylabel="accuracy, %", title="Accuracy against length")


def _draw_estimators(r: Runs, figure: Any) -> None:
    axis = figure.subplots()
    for row in r.rows_of("variance"):
        curves = {name: values for name, values in row["variance"].items() if min(values) > 0}
        for name, values in curves.items():
            axis.loglog(row["batches"], values, marker="o", label=name)
        if curves:  # some runs have no curve of this signal
            axis.set(xticks=row["batches"], xticklabels=row["batches"])
            axis.legend()
    axis.set(xlabel="sequences in a batch", ylabel="tr Cov(g) / |E g|²", title="Noise of the gradient")
    axis.minorticks_off()


PICTURES: dict[str, tuple[Callable[[Runs, Any], None], tuple[float, float]]] = {  # and width and height in pixels
    "lambda": (_draw_lambda, (484, 320)),
    "two-teachers": (_draw_two, (484, 420)),
    "strong-to-weak": (_draw_weak, (484, 680)),
    "dynamics": (_draw_dynamics, (484, 640)),
    "length": (_draw_length, (484, 340)),
    "estimators": (_draw_estimators, (484, 340)),
}
