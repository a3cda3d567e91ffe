"""The pictures of README and docs/: each is drawn from its file of results, with the same bytes each time."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks import demo, report
from benchmarks.reproduction import report as reproduction

from fused_gopd import pictures

ROOT = Path(__file__).resolve().parents[2]
SAVING = ["eager-lean", "compile", "compile-chunked", "liger-chunked-jsd", "trl-divergence", "fused-triton"]
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {  # results, jobs and providers
    "saving.svg": ("gpu.json", {"jobs": ["hidden-full", "reverse-kl"], "providers": SAVING}),
    "bench.svg": ("cpu.json", {}),
    "bench-gpu.svg": ("gpu.json", {}),
}


def results(file: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results" / file).read_text(encoding="utf-8"))


def write(folder: Path = ROOT / "docs/images") -> None:
    folder.mkdir(exist_ok=True)
    for name, (file, chosen) in PICTURES.items():
        report.plot(results(file), folder / name, **chosen)
    reproduction.write(results("reproduction.json"), folder.parent / "reproduction.md", folder)


def test_pictures_are_what_their_results_say(tmp_path: Path) -> None:
    version = pytest.importorskip("matplotlib").__version__
    if f"matplotlib=={version}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip(f"Matplotlib {version} may draw the same with other bytes")
    write(tmp_path / "images")
    drawn = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(drawn) == len(PICTURES) + 6 + 1
    for path in drawn:
        assert (tmp_path / path).read_bytes() == (ROOT / "docs" / path).read_bytes(), f"run write_pages.py for {path}"


def test_the_saving_names_each_figure_and_follows_dark_mode() -> None:
    picture = (ROOT / "docs/images/saving.svg").read_text(encoding="utf-8")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert "prefers-color-scheme: dark" in picture
    rows = {(row["job"], row["provider"]): row for row in results("gpu.json")["rows"]}
    drawn = [row for (job, name), row in rows.items() if job in ("hidden-full", "reverse-kl") and name in SAVING]
    assert len(drawn) == 4 + 6
    for row in drawn:
        assert {report._bytes(row["peak_extra_bytes"]), f"{report._milliseconds(row['ms_p50'])} ms"} <= set(words)
        assert report.picture_name(row["provider"]) in words


def texts_that_overlap(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts of a figure whose boxes overlap; a text with itself where the picture ends within it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ticks = {label for axis in figure.axes for one in (axis.xaxis, axis.yaxis) for label in one.get_majorticklabels()}
    found = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in ticks]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found]
    pairs = [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]
    return pairs + [(a, a) for a, x in boxes if x.x0 < 0 or x.y0 < 0 or x.x1 > figure.bbox.x1 or x.y1 > figure.bbox.y1]


def test_no_text_overlaps_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the committed pictures, and in one of every provider with long figures."""
    figures: dict[str, Any] = {}
    draw = pictures.picture

    @contextmanager
    def kept(path: Path, width: float, height: float) -> Iterator[Any]:
        with draw(path, width, height) as figure:
            yield figure
        figures[path.name] = figure

    monkeypatch.setattr(pictures, "picture", kept)
    write(tmp_path / "images")
    row = next(row for row in results("gpu.json")["rows"] if row["provider"] == "eager-lean")
    rows = [{**row, "provider": name, "peak_extra_bytes": 888 << 30, "ms_p50": 88888.0} for name in report.NAMES]
    report.plot({**results("gpu.json"), "rows": rows, "skipped": []}, tmp_path / "all.png")
    assert len(figures) == len(PICTURES) + 6 + 1
    assert {name: texts_that_overlap(figure) for name, figure in figures.items()} == {name: [] for name in figures}


def test_the_page_of_the_demo_has_the_figures_of_its_results() -> None:
    page = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    files = re.findall(r"\(\.\./(benchmarks/results/demo[^)]*\.json)\)", page)
    results = [json.loads((ROOT / file).read_text(encoding="utf-8")) for file in files]
    assert page.split("<!-- demo -->\n")[1].split("<!-- /demo -->")[0].strip() == demo.text(results)
