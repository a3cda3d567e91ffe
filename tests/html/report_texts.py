"""Texts and rows for tests of the HTML report, hostile ones among them."""

from __future__ import annotations

import math
from typing import Any

from fused_gopd.html import ScoredText

# Each is one token. Nothing of them may be code, markup or an order to a terminal.
HOSTILE = [
    "<script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "</div></pre></details></section><h1>out</h1>",
    "\"' onmouseover='document.title=1' x='",
    "</style><style>body{display:none}</style>",
    "<!-- ", " --> ", "]]>", "&lt;&amp;&#60;",
    "{{ 7 * 7 }}{% raw %}",
    " [bold red]markup[/bold red][/]",
    "\x1b[31mred\x1b]8;;http://127.0.0.1:9/\x1b\\link",
    "\x00", "\x07\x08\x7f\x9b",
    "\u202eright to left by force\u2066",
    " مرحبا", " بالعالم", " שלום",
    "", "😀", "👩", "\u200d", "💻", "e", "\u0301",
    "\n", "\n\n", "\r\n", "\t", "   ", "\u2028", "\ufeff", "\ufffd", "\ud83d",
    " $x$ \\alpha %s {0}",
    "w" * 300,
]  # fmt: skip


def scored(tokens: list[str], title: str = "prompt 1", prompt: str = "Why?", shift: float = 0.0) -> ScoredText:
    """Numbers that follow from the position: log p = -i/10, log q = log p + i - 3 + shift, log r = -1/2, ..."""
    n = range(len(tokens))
    return ScoredText(
        title=title,
        prompt=prompt,
        tokens=tokens,
        student=[-i / 10 for i in n],
        teacher=[-i / 10 + i - 3 + shift for i in n],
        ref=[-0.5 for _ in n],
        entropy=[i / 4 for i in n],
        advantage=[(i - 3) / 2 for i in n],
    )


def rows(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": 1 / i, "reward": math.log(i), "reward/math": i, "reward/<script>": -i, "odd": 2.0 * i}
        for i in range(1, steps + 1)
    ]


def hostile_report() -> dict[str, Any]:
    """Arguments of ``write_report`` with hostile text in every place that takes text."""
    all_of_it = "".join(HOSTILE)
    return {
        "title": all_of_it,
        "settings": [(text, text) for text in HOSTILE],
        "rows": [{"step": 1, "reward": 0.5, **{f"reward/{text}": 1.0 for text in HOSTILE if text}, all_of_it: 2.0}],
        "samples": {
            all_of_it: [scored(HOSTILE, all_of_it, all_of_it)],
            "after": [scored(HOSTILE, "other", all_of_it + "other")],
        },
        "warnings": HOSTILE,
    }
