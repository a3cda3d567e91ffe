"""``fused-gopd distill --teacher student``: the student as its own teacher, which reads another prompt."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from distill_runs import Files, Whole, assert_same_weights, invoke, metrics_of, small, untimed
from fused_gopd.cli.distill.options import RunOptions, check
from fused_gopd.integrations.trl.student import FILE
from test_distill import interrupt_at

pytestmark = pytest.mark.usefixtures("one_thread", "no_page")

# at lambda 1 there is no reference
HINTED = ["--teacher", "student", "--teacher-template", "who are you {prompt}", "--reward-scale", "1", "--ref", ""]
KINDS = {
    "as it began": [],
    "synchronised": ["--teacher-sync-steps", "2"],
    "average": ["--teacher-ema", "0.5", "--teacher-sync-steps", "2"],
    "live": ["--teacher-sync-steps", "1"],
}
LORA = ["--lora", "2", "--save", "adapter"]


@pytest.fixture(scope="module")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(files, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("lora", [[], ["--lora", "2"]], ids=["all weights", "lora"])
def test_the_student_as_it_began_is_the_model_of_its_folder(
    files: Files, tmp_path: Path, lora: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a folder is called student, and as one of several teachers, beside a reference."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    given = ["--prompts", files.routed, "--route-column", "domain", "--teacher-template", "who are you {prompt}", *lora]
    for run, teacher in (("own", "student"), ("folder", files.student)):
        teachers = ["--teacher", f"math={teacher}", "--teacher", f"code={files.code}"]
        invoke(*small(files, tmp_path / run, *teachers, *given, steps=2))
    assert_same_weights(tmp_path / "own" / "model", tmp_path / "folder" / "model")


def test_each_kind_is_another_teacher_and_is_said(whole: Whole) -> None:
    runs = [metrics_of(whole(*HINTED, *options)) for options in KINDS.values()]
    # the first steps are before any update
    assert len({rows[0]["kl_target"] for rows in runs}) == 1
    assert len({rows[-1]["kl_target"] for rows in runs}) == len(KINDS)
    card = (whole(*HINTED, *KINDS["average"]) / "model" / "README.md").read_text(encoding="utf-8")
    assert "| teacher | the student itself, --teacher-ema 0.5 --teacher-sync-steps 2 |" in card
    assert "| teacher | the student before training |" in (whole(*HINTED) / "model" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("kind", "lora"), [("average", []), ("live", []), ("synchronised", LORA), ("average", LORA)])
def test_a_resumed_run_has_the_teacher_of_an_uninterrupted_one(
    files: Files, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lora: list[str]
) -> None:
    parts, given = tmp_path / "parts", [*HINTED, *KINDS[kind], *lora]
    with monkeypatch.context() as patch:
        interrupt_at(2, patch, signal.SIGTERM if lora else signal.SIGINT)
        invoke(*small(files, parts, *given), code=130)
    invoke("--resume", "--output", str(parts))
    one = whole(*given)
    (trained,) = one.glob("[am]*/*.safetensors")  # model/ or adapter/
    assert (parts / trained.relative_to(one)).read_bytes() == trained.read_bytes()
    assert untimed(parts) == untimed(one)
    moves = kind not in ("as it began", "live")
    assert (one / "checkpoint-4" / FILE).exists() == moves
    if moves:
        copies, again = (load_file(run / "checkpoint-4" / FILE) for run in (one, parts))
        assert copies.keys() == again.keys()
        assert all(torch.equal(x, again[name]) for name, x in copies.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--teacher", "student", "--reward-scale", "1"], "--teacher: student reads the prompt that the student reads"),
        (["--teacher-ema", "0.9"], "--teacher-ema: is an option of --teacher student"),
        (["--teacher-sync-steps", "3"], "--teacher-sync-steps: is an option of --teacher student"),
        (["--teacher", "student", "--teacher-ema", "1"], "--teacher-ema: must be between 0 and 1, got 1"),
        (
            ["--teacher", "student", "--teacher-ema", "0.9", "--teacher-cache", "cache"],
            "--teacher-cache: has no use for a teacher that changes (--teacher-ema 0.9)",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_use_is_said_before_a_model_is_loaded(
    files: Files, tmp_path: Path, options: list[str], said: str
) -> None:
    teacher = [] if "--teacher" in options else ["--teacher", files.math]
    output = " ".join(invoke(*small(files, tmp_path / "run", *teacher, *options), code=2).replace("│", " ").split())
    assert said in output
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_stays_behind_is_a_penalty_beside_the_answers_of_the_file(files: Files) -> None:
    """An average that is updated at each step stays behind; the current student does not."""
    given: dict[str, Any] = {"student": files.student, "teacher": ["student"], "prompts": files.prompts}
    given |= {"estimator": "full", "lmbda": 0.5, "sft_weight": 0.1, "teacher_sync_steps": 1}
    check(RunOptions(**given, teacher_ema=0.9))
    with pytest.raises(typer.BadParameter, match="every gradient is 0"):
        check(RunOptions(**given))
