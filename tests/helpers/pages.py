"""The Markdown pages of the repository: their text, their fences, and which Python of them is run."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: ([^>]+) -->\s*\Z")


@dataclass(frozen=True)
class Snippet:
    """Python of a page; ``line`` is the page's line of its first line, ``not_run`` the reason of a marker above it."""

    source: str
    line: int
    not_run: str | None


def read_pages(*patterns: str) -> dict[str, str]:
    """Text by the path from the root, of files that patterns name."""
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def fences(page: str, *languages: str) -> list[str]:
    """The contents of the fences of a page's text."""
    return [textwrap.dedent(body) for language, body in FENCE.findall(page) if language in languages]


def python_snippets(page: str) -> list[Snippet]:
    """The Python fences of a page's text, in order."""
    snippets = []
    for match in FENCE.finditer(page):
        if match[1] == "python":
            marker = _NOT_RUN.search(page, 0, match.start())
            line = page.count("\n", 0, match.start(2)) + 1
            snippets.append(Snippet(textwrap.dedent(match[2]), line, marker[1] if marker else None))
    return snippets
