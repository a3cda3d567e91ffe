"""The page: what the template gets, and the file."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .. import installing
from .texts import ScoredText, visible


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    settings: Sequence[tuple[str, str]] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    samples: Mapping[str, Sequence[ScoredText]] | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the page of :func:`render_report` to a file: whole or, after a crash, not at all."""
    path = Path(path)
    page = render_report(title=title, settings=settings, rows=rows, samples=samples, warnings=warnings)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_text(page, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def render_report(
    *,
    title: str,
    settings: Sequence[tuple[str, str]] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    samples: Mapping[str, Sequence[ScoredText]] | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """An HTML page about a run, one text with all that it shows.

    All texts are shown as they are, whatever they contain.

    Args:
        title: the heading.
        settings: names and values, such as options, versions and checksums, in their order.
        rows: metrics, one mapping a step, as ``metrics.jsonl`` of ``fused-gopd distill`` has them: ``step`` and any
            names of numbers. ``NAME/ROUTE`` is the curve of a route. None, NaN and infinity are gaps.
        samples: scored texts by what they are of, such as ``"before"`` and ``"after, step 100"``.
        warnings: texts, shown first.

    Raises:
        TypeError: naming the argument, what was expected and what was found.
        ImportError: Jinja2 or Matplotlib is not installed.
    """
    samples = samples or {}
    for name, texts in samples.items():
        for text in texts:
            if not isinstance(text, ScoredText):
                raise TypeError(f"samples[{name!r}] must have ScoredText, got {type(text).__name__}")
    page = _environment().get_template("report.html.jinja")
    return str(page.render(title=title, settings=settings, rows=rows, samples=samples, warnings=warnings))


@cache
def _environment() -> Any:
    try:
        jinja2 = importlib.import_module("jinja2")
    except ImportError:
        raise ImportError(f"an HTML report needs Jinja2: {installing.extra('train')}") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment
