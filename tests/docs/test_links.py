"""Links and images of the Markdown pages, offline: the file is there, the heading too, and an address is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pages import ROOT, read_pages

PAGES = read_pages("*.md", ".github/**/*.md", "benchmarks/*.md", "docs/**/*.md", "examples/**/*.md", "tests/*.md")
_PARSER = MarkdownIt("commonmark").enable("table")  # a dependency of rich


def tokens(page: str) -> Iterator[Token]:
    for token in _PARSER.parse(page):
        yield token
        yield from token.children or []


def targets(page: str) -> list[str]:
    """Where the links and images of a page lead, also those in HTML."""
    found = []
    for token in tokens(page):
        if token.type in ("link_open", "image"):
            found.append(str(token.attrs.get("href") or token.attrs.get("src")))
        elif token.type in ("html_block", "html_inline"):
            found += re.findall(r'\b(?:href|src|srcset)="([^" ]+)', token.content)
    return found


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page, and those of HTML."""
    found: dict[str, int] = {}
    inside = False
    for token in _PARSER.parse(page):
        if token.type == "inline" and inside:
            text = "".join(t.content for t in token.children or [] if t.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
        inside = token.type == "heading_open"
    numbered = {f"{slug}-{i}" if i else slug for slug, times in found.items() for i in range(times + 1)}
    return numbered | set(re.findall(r'<a (?:id|name)="([^"]+)"', page))


def mistake(folder: Path, page: str, target: str) -> str | None:
    """What is wrong with a link of a page that lies in a folder; None for nothing."""
    parts = urlsplit(target)
    if parts.scheme:
        return None if parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc) else "no address"
    path = (folder / unquote(parts.path)).resolve() if parts.path else None
    if path is not None and not (path.exists() and path.is_relative_to(ROOT)):
        return "no such file"
    if parts.fragment and (path is None or path.suffix == ".md"):
        text = page if path is None else path.read_text(encoding="utf-8")
        return None if unquote(parts.fragment) in anchors(text) else "no such heading"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    found = {target: mistake((ROOT / page).parent, PAGES[page], target) for target in targets(PAGES[page])}
    assert not {target: wrong for target, wrong in found.items() if wrong}


def test_a_wrong_link_is_seen() -> None:
    page = "# Some `code`, and more\n\n## 选择 λ\n\n## Twice\n\n## Twice\n"
    for target in (
        "#some-code-and-more",
        "#选择-λ",
        "#twice-1",
        "docs/",
        "CONTRIBUTING.md#rules",
        "https://arxiv.org/a#b",
    ):
        assert mistake(ROOT, page, target) is None, target
    for target, wrong in (
        ("#some", "no such heading"),
        ("#twice-2", "no such heading"),
        ("docs/nothing.md", "no such file"),
        ("README.md#nothing", "no such heading"),
        ("../x.md", "no such file"),
        ("http://arxiv.org", "no address"),
        ("https://localhost", "no address"),
    ):
        assert mistake(ROOT, page, target) == wrong, target
    html = '[a](b.md) ![c](d.svg)\n\n<picture><source srcset="e.svg"><img src="f.svg"></picture>\n\n`[g](h)`\n'
    assert targets(html) == ["b.md", "d.svg", "e.svg", "f.svg"]
