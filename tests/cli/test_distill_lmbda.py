"""``fused-gopd distill`` with answers of the file in a share of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from distill_runs import SENTENCES, Files, assert_same_weights, invoke, metrics_of, small
from fused_gopd.integrations.trl.rollouts import samples

pytestmark = pytest.mark.usefixtures("one_thread")

ANSWERS = ("of a dog", "why is the sky blue", "count to ten", "rice", "who are you")


@pytest.fixture(scope="module")
def answered(files: Files) -> dict[str, str]:
    """The same questions and answers: in two columns, and as conversations."""
    columns = [{"prompt": s, "completion": a, "said": a[::-1]} for s, a in zip(SENTENCES, ANSWERS, strict=True)]
    turns = [
        [{"role": "user", "content": s}, {"role": "assistant", "content": a}]
        for s, a in zip(SENTENCES, ANSWERS, strict=True)
    ]
    return {
        "columns": files.write("answered.jsonl", columns),
        "messages": files.write("turns.jsonl", [{"messages": messages} for messages in turns]),
    }


def run(files: Files, output: Path, prompts: str, *arguments: str, steps: int = 2) -> Path:
    said = invoke(*small(files, output, "--prompts", prompts, *arguments, "--teacher", files.math, steps=steps))
    assert "of the steps with the file's answers, λ = 1.25" in said
    return output


def test_answers_of_a_column_are_those_of_conversations(files: Files, answered: dict[str, str], tmp_path: Path) -> None:
    given = ["--lmbda", "0", "--sft-weight", "0.5"]
    columns, turns = (run(files, tmp_path / name, file, *given) for name, file in answered.items())
    assert_same_weights(columns / "model", turns / "model")
    rows = metrics_of(columns)
    assert [row["on_policy"] for row in rows] == [0, 0]
    assert all(row["sft_loss"] > 0 for row in rows)
    card = (columns / "model" / "README.md").read_text(encoding="utf-8")
    assert "| batches that the student samples | 0 |\n| weight of the supervised term | 0.5 |\n" in card
    other = run(files, tmp_path / "other", answered["columns"], *given, "--completion-column", "said", steps=1)
    assert metrics_of(other)[0]["sft_loss"] != rows[0]["sft_loss"]


def test_a_mixed_run_resumes_to_the_same_bits(files: Files, answered: dict[str, str], tmp_path: Path) -> None:
    assert [samples(3, step, 0.5) for step in range(3)] == [False, True, False]
    given = ["--lmbda", "0.5", "--sft-weight", "0.5", "--seed", "3"]
    whole = run(files, tmp_path / "whole", answered["columns"], *given, steps=3)
    assert [row["on_policy"] for row in metrics_of(whole)] == [0, 1, 0]
    run(files, tmp_path / "parts", answered["columns"], *given, steps=1)
    invoke("--resume", "--output", tmp_path / "parts", "--steps", "3")
    assert_same_weights(whole / "model", tmp_path / "parts" / "model")


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ({}, ["--lmbda", "0.5"], "row 1, has no answer: give a column 'completion' (--completion-column), or"),
        ({"completion": 3}, ["--lmbda", "0.5"], "row 1: 'completion' must be a text or a list of messages, got 3"),
        (
            {"completion": [{"role": "assistant", "content": "x"}]},
            ["--lmbda", "0.5", "--no-chat"],
            "row 1: column 'completion' of the dataset must have a text, as the prompt is",
        ),
        ({}, ["--lmbda", "0.5", "--completion-column", "answer"], "has no column 'answer', only prompt"),
        ({}, ["--completion-column", "answer"], "is an option of --lmbda below 1"),
        ({}, ["--sft-weight", "0.5"], "sft_weight=0.5 needs lmbda below 1"),
        ({"completion": "x"}, ["--lmbda", "0.5", "--estimator", "sampled"], "lmbda=0.5 needs estimator='full' or"),
        ({"completion": "x"}, ["--lmbda", "1.5"], "Input should be less than or equal to 1"),
    ],
    ids=str,
)
def test_wrong_answers_are_named(
    files: Files, tmp_path: Path, rows: dict[str, Any], arguments: list[str], message: str
) -> None:
    file = files.write("wrong.jsonl", [{"prompt": s, **rows} for s in SENTENCES])
    said = invoke(
        *small(files, tmp_path / "run", "--prompts", file, *arguments, "--teacher", files.math, steps=1), code=2
    )
    assert message in said
    assert not (tmp_path / "run" / "distill.json").exists()


def test_answers_of_two_kinds_are_named(files: Files, tmp_path: Path) -> None:
    rows = [{"prompt": s, "completion": a} for s, a in zip(SENTENCES, ANSWERS, strict=True)]
    rows[2]["completion"] = [{"role": "assistant", "content": "x"}]  # type: ignore[assignment]
    file = files.write("kinds.jsonl", rows)
    given = ["--prompts", file, "--lmbda", "0.5", "--teacher", files.math]
    said = invoke(*small(files, tmp_path / "run", *given, steps=1), code=2)
    assert "row 3: 'completion' must be a text or a list of messages" in said
    assert "the rows before have the other kind" in said
