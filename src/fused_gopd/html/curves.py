"""The curves of a run: which metrics are drawn together, and each panel as an SVG picture and its legend."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, picture
from .colours import plain

Point = tuple[float, float | None]  # step, value; None is a gap

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_DASHES = ("solid", "dotted", "dashed")  # those of the first five curves, of the next five, ...
# Points of a picture: with more of them, each is the mean of as many steps
_POINTS = 600
_HELD_OUT = "eval_"
# heading, unit, (metric, label) of each curve, by the names of metrics.jsonl
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward, log q − log r", "nats per token", (("reward", "reward"),)),
    (
        "KL divergence, exact",
        "nats per token",
        (("kl_target", "KL(p ‖ target)"), ("kl_teacher", "KL(p ‖ q), teacher"), ("kl_ref", "KL(p ‖ r), reference")),
    ),
    (
        "KL divergence, estimated at the sampled tokens (k3)",
        "nats per token",
        (("kl_teacher_k3", "KL(p ‖ q), teacher"), ("kl_ref_k3", "KL(p ‖ r), reference")),
    ),
    ("Loss", "", (("loss", "loss"), ("sft_loss", "of the labels, −log p"))),
    ("Advantage", "nats", (("advantage", "mean"), ("advantage_std", "standard deviation"))),
    ("Entropy of the student", "nats per token", (("entropy", "entropy"),)),
    ("Length of the answers", "tokens", (("length", "length"),)),
    ("λ", "", (("reward_scale", "λ"),)),
    (
        "Shares of the tokens and answers",
        "",
        (
            ("truncated", "answers that were cut off"),
            ("clip_fraction", "tokens whose gradient a clip removed"),
            ("masked_fraction", "tokens of weight 0"),
            ("impossible", "tokens that a model gives probability 0"),
            ("effective_sample_size", "effective sample size"),
            ("on_policy", "steps with sampled answers"),
            ("cache_hits", "sequences that the cache had"),
        ),
    ),
    (
        "Spans that both tokenizers have, as shares",
        "",
        (("aligned_tokens", "of the tokens"), ("aligned_bytes", "of the bytes")),
    ),
    (
        "Importance weights of the sampler's tokens",
        "",
        (("importance", "mean"), ("importance_std", "standard deviation"), ("importance_max", "largest")),
    ),
    ("KL divergence of sampler and student (k3)", "nats per token", (("sampler_kl", "KL(sampler ‖ p)"),)),
    ("Age of the sampler's weights", "optimizer steps", (("staleness", "age"),)),
    ("Norm of the gradient", "", (("grad_norm", "norm"),)),
    ("Learning rate", "", (("learning_rate", "learning rate"),)),
    (
        "Seconds of a step",
        "s",
        (("seconds", "all of it"), ("sample_seconds", "sampling"), ("score_seconds", "teachers and reference")),
    ),
    ("Tokens per second", "", (("tokens_per_second", "tokens per second"),)),
)


@dataclass(frozen=True)
class Curve:
    """A curve of a panel, and what its legend says."""

    label: str
    points: Sequence[Point]
    colour: str
    dashes: str

    @property
    def ends(self) -> str:
        """The first and the last value."""
        values = [y for _, y in self.points if y is not None]
        return plain(values[0]) if len(values) == 1 else f"{plain(values[0])} → {plain(values[-1])}"


@dataclass(frozen=True)
class Panel:
    """A picture, as a data URI, with a heading and a legend in HTML: texts of a run are in no SVG."""

    heading: str
    unit: str
    curves: Sequence[Curve]
    image: str
    steps_per_point: int
    by_route: bool = False


def panels(rows: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """The panels of all metrics that have a number in some row: ours, others by their names, and those of routes."""
    series = _series(rows)
    ours = {metric for _, _, curves in _PANELS for metric, _ in curves}
    routes: dict[str, dict[str, list[Point]]] = {}
    for name in list(series):
        metric, _, route = name.partition("/")
        if route and metric.removeprefix(_HELD_OUT) in ours:
            routes.setdefault(metric, {})[route] = series.pop(name)
    for heading, unit, curves in _PANELS:
        found = [
            Curve(label, series.pop(name), *_style(i, held_out=name != metric))
            for i, (metric, _) in enumerate(curves)
            for name, label in _with_held_out(curves[i : i + 1])
            if name in series
        ]
        if found:
            yield _panel(heading, unit, found)
    for name, points in series.items():
        yield _panel(name, "", [Curve(name, points, *_style(0))])
    for heading, unit, curves in _PANELS:
        for metric, label in _with_held_out(curves):
            if metric in routes:
                whole = heading if len(curves) == 1 and metric in ours else f"{heading}: {label}"
                named = enumerate(routes[metric].items())
                found = [Curve(route, points, *_style(i)) for i, (route, points) in named]
                yield _panel(whole, unit, found, by_route=True)


def _with_held_out(curves: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each metric, and behind it that of held-out prompts."""
    for metric, label in curves:
        yield metric, label
        yield _HELD_OUT + metric, f"{label}, held-out prompts"


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The points of each metric. A row without it has no point, a row in which it is no number has a gap."""
    found: dict[str, list[Point]] = {}
    for n, row in enumerate(rows, 1):
        step = row.get("step", n)
        for name, value in row.items():
            if name == "step" or isinstance(value, (bool, str)) or not isinstance(value, (int, float, type(None))):
                continue
            finite = value is not None and math.isfinite(value)
            found.setdefault(name, []).append((float(step), float(value) if finite and value is not None else None))
    return {name: points for name, points in found.items() if any(y is not None for _, y in points)}


def _style(i: int, held_out: bool = False) -> tuple[str, str]:
    """Colour and dashes of the i-th curve of a panel; that of held-out prompts has the colour of its metric."""
    return _COLOURS[i % len(_COLOURS)], "dashed" if held_out else _DASHES[i // len(_COLOURS) % len(_DASHES)]


def _panel(heading: str, unit: str, curves: Sequence[Curve], by_route: bool = False) -> Panel:
    steps = max(1, math.ceil(max(len(curve.points) for curve in curves) / _POINTS))
    return Panel(heading, unit, curves, _draw(curves, steps), steps, by_route)


def _means(points: Sequence[Point], steps: int) -> Iterator[Point]:
    """One point for so many; those without a number are left out of the mean."""
    for i in range(0, len(points), steps):
        some = points[i : i + steps]
        values = [y for _, y in some if y is not None]
        yield some[-1][0], sum(values) / len(values) if values else None


def _draw(curves: Sequence[Curve], steps: int) -> str:
    file = io.StringIO()
    with picture(file, 340, 200) as figure:
        axes = figure.add_subplot()
        for curve in curves:
            points = list(_means(curve.points, steps))
            marker = "o" if len(points) < 40 else ""
            y = [math.nan if value is None else value for _, value in points]
            axes.plot(
                [x for x, _ in points], y, color=curve.colour, linestyle=curve.dashes, marker=marker, markersize=3
            )
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True, nbins=6)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()
