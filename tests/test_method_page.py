"""docs/method.md and its Chinese twin say the same, and their figures are the measured ones.

``python tests/test_method_page.py`` writes the table of variances into both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = {language: ROOT / "docs" / f"method{suffix}.md" for language, suffix in (("en", ""), ("zh", ".zh"))}
HEADS = {"en": ("models", "baseline", "near", "far", "none"), "zh": ("模型", "基线", "相近", "较远", "无")}
SCALES = (0.5, 1.0, 1.25, 1.5, 2.0, 4.0)
EVERY_PAGE = pytest.mark.parametrize("language", PAGES)


def variance(models: str, baseline: str, scale: float) -> float:
    """To that of the same models at lambda = 1 without a baseline."""
    found = json.loads((ROOT / "benchmarks" / "results" / "variance.json").read_text())["rows"]
    values = {row["reward_scale"]: row for row in found if row["models"] == models}
    return float(values[scale][baseline] / values[1.0]["none"])


def with_table(page: str, language: str) -> str:
    models, baseline, near, far, none = HEADS[language]
    rows = [
        [name, shown, *(f"{variance(key, field, scale):.2f}" for scale in SCALES)]
        for name, key in ((near, "near"), (far, "far"))
        for shown, field in ((none, "none"), ("`expected`", "expected"))
    ]
    head = [models, baseline, *(f"λ = {scale:g}" for scale in SCALES)]
    return tables.fill(page, "variance", tables.markdown(head, rows, numbers=True))


@EVERY_PAGE
def test_the_table_has_the_measured_variances(language: str) -> None:
    page = PAGES[language].read_text()
    assert with_table(page, language) == page, "run python tests/test_method_page.py and read what changed"


def test_what_the_baseline_takes_off_is_as_the_pages_say() -> None:
    """A quarter where the models are far apart, next to nothing where they are near, at the paper's lambda."""
    saved = {
        models: 1 - variance(models, "expected", 1.25) / variance(models, "none", 1.25) for models in ("near", "far")
    }
    assert 0.2 < saved["far"] < 0.3
    assert saved["near"] < 0.05


def test_full_takes_as_much_longer_than_sampled_as_the_pages_say() -> None:
    """From the table of the README, which is made from the measurements."""
    readme = (ROOT / "README.md").read_text()
    times = {
        name: [
            float(cell)
            for cell in re.findall(r"([\d.]+) ms", readme.split(f"| `{name}`, three models | ")[1].split("\n")[0])
        ]
        for name in ("full", "sampled")
    }
    more = [100 * (a / b - 1) for a, b in zip(times["full"], times["sampled"], strict=True)]
    assert (round(min(more)), round(max(more))) == (6, 20)


@pytest.mark.parametrize("what", [r"`[^`\n]+`", r"\d+(?:\.\d+)?", r"\]\(([^)#]+)", r"^(?:#+|- |\|)"])
def test_both_languages_have_the_same_code_numbers_links_and_parts(what: str) -> None:
    pages = (re.sub(r"^\[.*?\]\(method.*\n", "", page.read_text(), flags=re.MULTILINE) for page in PAGES.values())
    english, chinese = (sorted(re.findall(what, page, flags=re.MULTILINE)) for page in pages)
    assert english == chinese


if __name__ == "__main__":
    for language, page in PAGES.items():
        page.write_text(with_table(page.read_text(), language))
