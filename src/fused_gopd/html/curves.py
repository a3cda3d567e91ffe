"""The curves of a run: each panel as an SVG picture and its legend."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, picture
from ..run_metrics import GROUPS, HELD_OUT, Metric, is_number
from .colours import plain

Point = tuple[float, float | None]  # step, value; None is a gap

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_DASHES = ("solid", "dotted", "dashed")  # those of the first five curves, of the next five, ...


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
    by_route: bool = False


def panels(rows: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """The panels of all metrics that have a number in some row: ours, others by their names, and those of routes."""
    series = _series(rows)
    ours = {metric.name for group in GROUPS for metric in group.metrics}
    routes: dict[str, dict[str, list[Point]]] = {}
    for name in list(series):
        metric, _, route = name.partition("/")
        if route and metric.removeprefix(HELD_OUT) in ours:
            routes.setdefault(metric, {})[route] = series.pop(name)
    for group in GROUPS:
        found = [
            Curve(label, series.pop(name), *_style(i, held_out=name != metric.name))
            for i, metric in enumerate(group.metrics)
            for name, label in _with_held_out(metric)
            if name in series
        ]
        if found:
            yield _panel(group.heading, group.unit, found)
    for name, points in series.items():
        yield _panel(name, "", [Curve(name, points, *_style(0))])
    for group in GROUPS:
        for name, label in chain.from_iterable(map(_with_held_out, group.metrics)):
            if name in routes:
                whole = group.heading if len(group.metrics) == 1 and name in ours else f"{group.heading}: {label}"
                named = enumerate(routes[name].items())
                found = [Curve(route, points, *_style(i)) for i, (route, points) in named]
                yield _panel(whole, group.unit, found, by_route=True)


def _with_held_out(metric: Metric) -> Iterator[tuple[str, str]]:
    """The name and label of a metric, and those of held-out prompts."""
    yield metric.name, metric.label
    yield HELD_OUT + metric.name, f"{metric.label}, held-out prompts"


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The points of each metric. A row without it has no point, a row in which it is no number has a gap."""
    found: dict[str, list[Point]] = {}
    for n, row in enumerate(rows, 1):
        step = float(row.get("step", n))
        for name, value in row.items():
            if name not in ("step", "first_step") and not isinstance(value, (bool, str)):
                found.setdefault(name, []).append((step, float(value) if is_number(value) else None))
    return {name: points for name, points in found.items() if any(y is not None for _, y in points)}


def _style(i: int, held_out: bool = False) -> tuple[str, str]:
    """Colour and dashes of the i-th curve of a panel; that of held-out prompts has the colour of its metric."""
    return _COLOURS[i % len(_COLOURS)], "dashed" if held_out else _DASHES[i // len(_COLOURS) % len(_DASHES)]


def _panel(heading: str, unit: str, curves: Sequence[Curve], by_route: bool = False) -> Panel:
    return Panel(heading, unit, curves, _draw(curves), by_route)


def _draw(curves: Sequence[Curve]) -> str:
    file = io.StringIO()
    with picture(file, 340, 200) as figure:
        axes = figure.add_subplot()
        for curve in curves:
            marker = "o" if len(curve.points) < 40 else ""
            x, y = ([math.nan if v is None else v for v in part] for part in zip(*curve.points, strict=True))
            axes.plot(x, y, color=curve.colour, linestyle=curve.dashes, marker=marker, markersize=3)
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True, nbins=6)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()
