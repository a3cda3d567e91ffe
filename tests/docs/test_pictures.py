"""The pictures of README and docs/: each is drawn from its file of results, with the same bytes each time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import report
from benchmarks.reproduction import report as reproduction

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
