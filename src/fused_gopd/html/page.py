"""The page: what the template gets, and the file."""

from __future__ import annotations

import importlib
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .. import installing
from ..pictures import DARK, FAINT, INK, MUTED, PAGE
from ..run_metrics import thinned
from .colours import QUANTITIES, Scale, palette, plain, scale_of, signed
from .curves import panels
from .texts import ScoredText, token_text, visible


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
            names of numbers. ``NAME/ROUTE`` is the curve of a route, ``eval_NAME`` that of held-out prompts. None, NaN
            and infinity are gaps. Of more than 600 steps the curves show means over equally many steps; rows that are
            such means have ``first_step``, too.
        samples: scored texts by what they are of, such as ``"before"`` and ``"after, step 100"``. Samples that
            have the same prompts stand side by side, and so do those whose prompts no others have: the first texts of
            them, then the second ones, and so on.
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
    drawn = thinned(rows)
    everything = [text for texts in samples.values() for text in texts]
    scales = [scale for quantity in QUANTITIES if (scale := scale_of(quantity, everything)) is not None]
    return str(
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title,
            settings=settings,
            panels=list(panels(drawn)),
            steps_per_point=max([row["step"] - row["first_step"] + 1 for row in drawn if "first_step" in row] or [1]),
            articles=[*_articles(samples, scales)],
            scales=scales,
            warnings=warnings,
            palettes={(mode, sign): palette(mode, sign) for mode in ("light", "dark") for sign in (True, False)},
            light={"ink": INK, "muted": MUTED, "page": PAGE, "faint": FAINT},
            dark={"ink": DARK[INK], "muted": DARK[MUTED], "page": DARK[PAGE], "faint": DARK[FAINT]},
        )
    )


@cache
def _environment() -> Any:
    try:
        jinja2 = importlib.import_module("jinja2")
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            f"an HTML report needs Jinja2 and Matplotlib ({error}): {installing.extra('train')}"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


# ---------------------------------------------------------------------------------------------------------- the texts


# Of tokens. A browser's time for one line is quadratic in it: 50,000 tokens took Chromium 17 s, in lines of 200 3 s.
_LONGEST_LINE = 1000


@dataclass(frozen=True)
class Token:
    """A token of the page: its text, its classes (a letter and a level each), and what is read of it."""

    text: str
    classes: str
    numbers: str


@dataclass(frozen=True)
class Card:
    """One scored text."""

    name: str  # that of its samples
    title: str
    prompts: Sequence[tuple[str, str]]  # whose, and the text
    means: str
    lines: Sequence[Sequence[Token]]
    tokens: int


@dataclass(frozen=True)
class Article:
    """Texts that stand side by side; ``title`` and ``prompts`` are those that all of them have, or None."""

    title: str | None
    prompts: Sequence[tuple[str, str]] | None
    cards: Sequence[Card]


def _articles(samples: Mapping[str, Sequence[ScoredText]], scales: Sequence[Scale]) -> Iterator[Article]:
    """Samples of the same prompts stand side by side, and so do all those whose prompts no others have."""
    by_prompts: dict[tuple[Any, ...], list[list[Card]]] = {}
    for name, texts in samples.items():
        cards = [_card(name, text, scales) for text in texts]
        by_prompts.setdefault(tuple(card.prompts for card in cards), []).append(cards)
    alone = [group[0] for group in by_prompts.values() if len(group) == 1]
    for group in [*(group for group in by_prompts.values() if len(group) > 1), alone]:
        for i in range(max(map(len, group), default=0)):
            cards = [cards[i] for cards in group if i < len(cards)]
            titles, prompts = ({getattr(card, of) for card in cards} for of in ("title", "prompts"))
            yield Article(
                titles.pop() if len(titles) == 1 else None, prompts.pop() if len(prompts) == 1 else None, cards
            )


def _card(name: str, text: ScoredText, scales: Sequence[Scale]) -> Card:
    known = [(scale, values) for scale in scales if (values := scale.quantity.of(text)) is not None]
    models = (("log p", text.student), ("log q", text.teacher), ("log r", text.ref))
    others = [
        (scale.quantity.sign, values, signed if scale.quantity.signed else plain)
        for scale, values in known
        if scale.quantity.key != "s"  # log p says it
    ]
    columns = [*((sign, values, plain) for sign, values in models if values is not None), *others]
    lines: list[list[Token]] = [[]]
    for i, token in enumerate(text.tokens):
        levels = ((scale.quantity.key, scale.level(values[i])) for scale, values in known)
        classes = " ".join(f"{key}{level}" for key, level in levels if level is not None)
        numbers = "   ".join(_pair(sign, write(values[i])) for sign, values, write in columns)
        shown = token_text(token)
        said = f"“{shown}”" if token else "a part of the next character"
        lines[-1].append(Token(shown.removesuffix("\n"), classes, f"{i + 1}: {said}\n{numbers}"))
        if shown.endswith("\n") or len(lines[-1]) == _LONGEST_LINE:
            lines.append([])
    means = [_pair(sign, write(mean)) for sign, values, write in columns if (mean := _mean(values)) is not None]
    count = f"{len(text.tokens)} token{'' if len(text.tokens) == 1 else 's'}"
    said = f"{count}. Means: {', '.join(means)}" if means else count
    named = (
        ("Prompt", text.prompt),
        ("Prompt of the teacher", text.teacher_prompt),
        ("Prompt of the reference", text.ref_prompt),
    )
    prompts = tuple((whose, prompt) for whose, prompt in named if prompt is not None)
    return Card(name, text.title, prompts, said, [line for line in lines if line], len(text.tokens))


def _pair(sign: str, number: str) -> str:
    """On one line: with no-break spaces."""
    return f"{sign} {number}".replace(" ", "\u00a0")


def _mean(values: Sequence[float]) -> float | None:
    """Of the tokens that have been scored, whose number is not NaN; None if there is none."""
    scored = [x for x in values if not math.isnan(x)]
    return sum(scored) / len(scored) if scored else None
