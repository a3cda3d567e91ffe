"""``fused-gopd distill --dry-run``: what a run checks and needs, without a trace of it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("trl")

from distill_runs import Files, invoke, make_tokenizer, small
from fused_gopd.cli.plan import cost
from fused_gopd.cli.plan.call import PlannedCall
from fused_gopd.cli.plan.tables import bytes_text

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_says_what_the_run_needs_and_writes_nothing(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = contents(files.folder)
    cache = ["--teacher-cache", str(tmp_path / "cache"), "--teacher", files.math, "--eval-prompts"]
    output = invoke(*small(files, tmp_path / "run", "--dry-run", *cache, files.prompts, "--ref", files.code, steps=1))
    assert contents(files.folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"scratch"}
    assert not list(scratch.glob("fused-gopd-*"))

    # of three models of float32: two layers, 27 tokens, embeddings of 16 that are not tied
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32 + 2 * 16 + 2 * 8
    parameters = 2 * layer + 2 * 27 * 16 + 16
    rest = 8 / 2 * 4  # bytes of the frequencies of the positions, a buffer
    trained, weights, frozen = re.search(
        r"student ([\d.]+) KiB, teachers and reference ([\d.]+) KiB; of ([\d,]+) trained", output
    ).group(3, 1, 2)  # type: ignore[union-attr]
    assert int(trained.replace(",", "")) == parameters
    assert float(weights) * 1024 == pytest.approx(4 * parameters + rest, rel=5e-3)
    assert float(frozen) == pytest.approx(2 * float(weights), rel=5e-3)
    assert f"gradients {bytes_text(4 * parameters)} and the optimizer's state {bytes_text(8 * parameters)}" in output
    sizes = {"hidden": 16, "teacher_hidden": 16, "ref_hidden": 16, "vocab": len(make_tokenizer())}
    call = PlannedCall(tokens=2 * 5, dtype="float32", device="cpu", **sizes)
    peak = bytes_text(cost.figures(call, None)["fused"]["peak"])
    assert f"the loss, of 10 tokens in the longest batch: at most {peak} beyond its inputs" in output
    assert re.search(r"a step: [\d.e-]+ s \(sampling [\d.e-]+ s, scoring [\d.e-]+ s\)", output)
    assert "; 1 such steps: " in output
    assert "nothing was written" in output


def test_a_dry_run_refuses_what_the_run_refuses(files: Files, tmp_path: Path) -> None:
    wrong = {
        "is for a new run: leave out --resume": ["--resume"],
        "there is no file": ["--prompts", str(tmp_path / "none.jsonl")],
    }
    for said, arguments in wrong.items():
        output = invoke(*small(files, tmp_path / "run", "--dry-run", *arguments), code=2)
        assert said in " ".join(output.replace("│", " ").split())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    output = invoke(*small(files, tmp_path / "full", "--dry-run"), code=2)
    assert "is not empty (mine.txt)" in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
