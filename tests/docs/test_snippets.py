"""The Python of README.md and docs/ is run: the fences of a page in order, in one namespace, as a reader types them.

A page makes the names that it uses. ``<!-- not run: reason -->`` above a fence leaves it out; test_docs reads that too.
Where a line ends in ``print(...)  # text with numbers``, that is what it prints.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pages import ROOT, Snippet, fences, python_snippets, read_pages

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PAGES = read_pages("README.md", "docs/**/*.md")
SNIPPETS = {page: python_snippets(text) for page, text in PAGES.items()}
NOT_RUN = [(page, snippet) for page, found in SNIPPETS.items() for snippet in found if snippet.not_run]
# What a reason may begin with: what no test can have, and a framework or a machine that this one lacks.
REASONS = ("a CUDA GPU", "an inference server", "downloads", "needs models", "several processes", "your ")
REASONS += ("ms-swift", "NeMo-RL", "prime-rl", "SkyRL", "slime", "verl")

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.(\d+))?(?:e[+-]?\d+)?")


def run(page: Path, snippets: list[Snippet], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Run what a page has; what it printed, by the line of the print."""
    printed: dict[int, list[str]] = defaultdict(list)

    def record(*values: object, sep: str = " ", **_: object) -> None:
        printed[sys._getframe(1).f_lineno].append(sep.join(map(str, values)))

    module = ModuleType("page")
    module.print = record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "page", module)
    for snippet in snippets:
        # as many lines before it as the page has: tracebacks show the page's
        exec(compile("\n" * (snippet.line - 1) + snippet.source, str(page), "exec"), vars(module))
    return printed


def same(said: str, printed: str) -> bool:
    """Whether two texts differ in nothing but numbers, and in these by no more than 5 % or a unit of the last digit."""
    if _NUMBER.sub("#", said) != _NUMBER.sub("#", printed):
        return False
    pairs = zip(_NUMBER.finditer(said), _NUMBER.finditer(printed), strict=True)
    return all(
        abs(float(a[0]) - float(b[0])) <= max(0.05 * abs(float(a[0])), 1.01 * 10 ** -len(a[1] or "")) for a, b in pairs
    )


@pytest.mark.parametrize("page", [page for page, found in SNIPPETS.items() if any(not s.not_run for s in found)])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    printed = run(ROOT / page, [s for s in SNIPPETS[page] if not s.not_run], monkeypatch)
    lines = PAGES[page].split("\n")
    for line, texts in printed.items():
        _, found, comment = lines[line - 1].partition(")  # ")
        if found and _NUMBER.search(comment):
            assert any(same(comment, text) for text in texts), f"{page}:{line} printed {texts}"


def test_what_is_not_run_is_little_and_has_a_reason() -> None:
    for page, snippet in NOT_RUN:
        assert snippet.not_run is not None
        assert snippet.not_run.startswith(REASONS), f"{page}:{snippet.line}: {snippet.not_run}"
        for test in re.findall(r"tests/[\w/]+\.py", snippet.not_run):
            assert Path(page).name in (ROOT / test).read_text(encoding="utf-8"), f"{test} runs nothing of {page}"
    assert len(NOT_RUN) <= sum(map(len, SNIPPETS.values())) / 4


def test_every_marker_is_above_a_fence_that_is_read() -> None:
    for page, text in PAGES.items():
        marked = [snippet for where, snippet in NOT_RUN if where == page]
        assert text.count("<!-- not run") == len(marked), page
        assert {snippet.source for snippet in marked} <= set(fences(text, "python"))


PAGE = """
```python
x = 1
print("mean", 0.5)  # mean 0.49
```

<!-- not run: a CUDA GPU -->
```python
print(y)
```

```python
print(x)  # as above
```

<!-- not run: your trainer -->

```python
z()
```

<!-- another comment -->

```python
x += 1
```
"""


def test_a_page_is_run_in_order_and_without_what_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = python_snippets(PAGE)
    assert [snippet.not_run for snippet in snippets] == [None, "a CUDA GPU", None, "your trainer", None]
    assert run(Path("page.md"), [s for s in snippets if not s.not_run], monkeypatch) == {4: ["mean 0.5"], 13: ["1"]}


def test_a_mistake_is_seen() -> None:
    assert same("mean 0.49", "mean 0.5")
    assert same("loss 1.250, 3 tokens", "loss 1.249, 3 tokens")
    assert not same("mean 0.49", "mean 0.6")
    assert not same("mean 0.5", "sum 0.5")
    assert not same("mean 0.5", "mean nan")
