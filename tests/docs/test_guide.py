"""The Chinese pages say what the English ones do, and the figures of docs/guide.md are the measured ones.

``python tests/helpers/write_pages.py`` writes the tables into both: the variances, and the curves of the reproduction.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import snapshots
from fused_gopd.cli import bench

verdicts = bench.benchmarks_module("reproduction.verdicts", needs=())

ROOT = Path(__file__).resolve().parents[2]
PAGES = {language: ROOT / "docs" / f"guide{suffix}.md" for language, suffix in (("en", ""), ("zh", ".zh"))}
HEADS = {"en": ("models", "baseline", "near", "far", "none"), "zh": ("模型", "基线", "相近", "较远", "无")}
CURVES = {
    "en": ("students of", "teacher", "one teacher: addition", "two teachers: addition", "two teachers: strings"),
    "zh": ("学生", "教师", "一个教师：加法", "两个教师：加法", "两个教师：字符串"),
}
ESTIMATORS = {"en": ("estimator", "variance", "accuracy", "batch"), "zh": ("估计器", "方差", "准确率", "批量")}
SCALES = (0.5, 1.0, 1.25, 1.5, 2.0, 4.0)
EVERY_PAGE = pytest.mark.parametrize("language", PAGES)


def variance(models: str, baseline: str, scale: float) -> float:
    """To that of the same models at lambda = 1 without a baseline."""
    found = json.loads((ROOT / "benchmarks" / "results" / "variance.json").read_text())["rows"]
    values = {row["reward_scale"]: row for row in found if row["models"] == models}
    return float(values[scale][baseline] / values[1.0]["none"])


def runs() -> Any:
    """The runs of docs/reproduction.md."""
    return verdicts.Runs(json.loads((ROOT / "benchmarks" / "results" / "reproduction.json").read_text()))


def curves(language: str) -> str:
    """Accuracies by λ, of students of one teacher and of two."""
    r, (of, teacher, *names) = runs(), CURVES[language]
    domains = (("A", "teacher A", verdicts.ADDITION), ("A+B", "teacher A", verdicts.ADDITION),
               ("A+B", "teacher B", verdicts.STRINGS))  # fmt: skip
    rows = [
        [name, str(r.score(expert, domain)), *(str(r.score(f"{prefix} λ={x:g}", domain)) for x in r.scales("A"))]
        for name, (prefix, expert, domain) in zip(names, domains, strict=True)
    ]
    return snapshots.markdown([of, teacher, *(f"λ = {x:g}" for x in r.scales("A"))], rows, numbers=True)


def estimators(language: str) -> str:
    """Variance of the gradient and accuracy after training, by batch."""
    r, (estimator, variance, accuracy, batch) = runs(), ESTIMATORS[language]
    (row,) = r.rows_of("variance")
    batches = r.found["settings"]["batches"]
    head = [*(f"{variance}, {batch} {n}" for n in row["batches"]), *(f"{accuracy}, {batch} {n}" for n in batches)]
    beyond = {("sampled", 128): "A λ=1.25"}  # which the λ curve has
    rows = [
        [name, *(f"{v:.3g}" for v in values),
         *(str(r.score(beyond.get((name, n), f"{name}, batch {n}"))) for n in batches)]
        for name, values in row["variance"].items()
    ]  # fmt: skip
    return snapshots.markdown([estimator, *head], rows, numbers=True)


def with_tables(page: str, language: str) -> str:
    models, baseline, near, far, none = HEADS[language]
    rows = [
        [name, shown, *(f"{variance(key, field, scale):.2f}" for scale in SCALES)]
        for name, key in ((near, "near"), (far, "far"))
        for shown, field in ((none, "none"), ("`expected`", "expected"))
    ]
    head = [models, baseline, *(f"λ = {scale:g}" for scale in SCALES)]
    page = snapshots.fill(page, "variance", snapshots.markdown(head, rows, numbers=True))
    page = snapshots.fill(page, "curves", curves(language))
    return snapshots.fill(page, "estimators", estimators(language))


@EVERY_PAGE
def test_the_tables_have_what_was_measured(language: str) -> None:
    page = PAGES[language].read_text()
    assert with_tables(page, language) == page, "run python tests/helpers/write_pages.py and read what changed"


def test_what_the_baseline_takes_off_is_as_the_pages_say() -> None:
    """A quarter where the models are far apart, next to nothing where they are near, at the paper's lambda."""
    saved = {
        models: 1 - variance(models, "expected", 1.25) / variance(models, "none", 1.25) for models in ("near", "far")
    }
    assert 0.2 < saved["far"] < 0.3
    assert saved["near"] < 0.05


def test_full_takes_as_much_longer_than_sampled_as_the_pages_say() -> None:
    """From the last table of whole steps in the log, which is made from the measurements."""
    log = (ROOT / "docs/performance-log.md").read_text()
    times = {
        name: [
            float(cell)
            for cell in re.findall(r"([\d.]+) ms", log.split(f"| `{name}`, three models | ")[1].split("\n")[0])
        ]
        for name in ("full", "sampled")
    }
    more = [100 * (a / b - 1) for a, b in zip(times["full"], times["sampled"], strict=True)]
    assert (round(min(more)), round(max(more))) == (6, 20)


@pytest.mark.parametrize("name", ["index", "quickstart", "guide"])
@pytest.mark.parametrize("what", [r"`[^`\n]+`", r"\d+(?:\.\d+)?", r"\]\(([^)#]+)", r"^(?:#+|- |\|)"])
def test_both_languages_have_the_same_code_numbers_links_and_parts(what: str, name: str) -> None:
    pages = ((ROOT / "docs" / f"{name}{suffix}.md").read_text().replace(".zh.md", ".md") for suffix in ("", ".zh"))
    english, chinese = (sorted(re.findall(what, page, flags=re.MULTILINE)) for page in pages)
    assert english == chinese


def test_the_chinese_pages_have_the_code_of_the_english_ones() -> None:
    for name in ("index", "quickstart"):
        english, chinese = (
            re.sub(r" *#.*", "", "".join(re.findall(r"```.*?```", page.read_text(), re.DOTALL)))
            for page in (ROOT / "docs" / f"{name}.md", ROOT / "docs" / f"{name}.zh.md")
        )
        assert english == chinese, name


def write() -> None:
    for language, page in PAGES.items():
        page.write_text(with_tables(page.read_text(), language))
