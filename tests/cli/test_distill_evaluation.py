"""``fused-gopd distill --eval-prompts``: exact KLs and reward of held-out prompts, which change nothing of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_runs import Files, assert_same_weights, invoke, metrics_of, small
from fused_gopd.integrations.trl import GOPDTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
HELD_OUT = [{"prompt": "who is the dog"}, {"prompt": "tell me how to count"}, {"prompt": "a story of rice"}]


def split(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of steps, and those of evaluations."""
    rows = metrics_of(run)
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "second" not in name}


@pytest.fixture(scope="module")
def held_out(files: Files) -> str:
    return files.write("held_out.jsonl", HELD_OUT)


def test_evaluations_are_those_of_each_step_and_leave_the_run_as_it_is(
    files: Files, held_out: str, tmp_path: Path
) -> None:
    run, without, longer = tmp_path / "run", tmp_path / "without", tmp_path / "longer"
    arguments = ["--eval-prompts", held_out, "--eval-every", "2"]
    output = invoke(*small(files, run, *arguments, steps=3))
    steps, evaluations = split(run)
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert f"held out, after step 0:  reward {evaluations[0]['eval_reward']:.3g}  KL to teacher " in output
    for name in ("eval_reward", "eval_kl_teacher", "eval_kl_ref", "eval_kl_target", "eval_entropy", "eval_length"):
        assert all(isinstance(row[name], float) for row in evaluations), name
    assert evaluations[0]["eval_kl_ref"] == pytest.approx(0, abs=1e-6)  # the reference is the student as it begins
    assert evaluations[-1]["eval_kl_ref"] > 1e-4

    invoke(*small(files, without, steps=3))
    assert_same_weights(run / "model", without / "model")
    assert [untimed(row) for row in steps] == [untimed(row) for row in metrics_of(without)]

    invoke(*small(files, longer, *arguments, steps=2))
    invoke("--resume", "--output", longer, "--steps", "3")
    assert [untimed(row) for row in split(longer)[1]] == [untimed(row) for row in evaluations]
    assert_same_weights(run / "model", longer / "model")
    assert "the file of the evaluation prompts" in json.loads((run / "inputs.json").read_text())["inputs"]
    assert "eval_reward" not in (run / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--estimator", "sampled", "--reward-scale", "1.25"],
        ["--estimator", "full", "--reward-scale", "1"],
        ["--estimator", "topk", "--k", "3", "--reward-scale", "0", "--lora", "2"],
    ],
    ids=" ".join,
)
def test_the_kls_are_those_of_the_dense_distributions(
    files: Files, held_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Computed in float64 from the models' logits at the answers of the first evaluation."""
    batches: list[Any] = []
    real = GOPDTrainer._record_exact

    def record(self: Any, head: Any, teacher: Any, ref: Any, index: Any, batch: Any, out: Any) -> None:
        batches.append(batch)
        real(self, head, teacher, ref, index, batch, out)

    monkeypatch.setattr(GOPDTrainer, "_record_exact", record)
    given = ["--eval-prompts", held_out, "--ref", files.code, "--temperature", "0.7", *arguments]
    invoke(*small(files, tmp_path / "run", *given, steps=1))
    batches = batches[: len(batches) // 2]  # those before the step
    assert sum(len(batch.token_ids) for batch in batches) == len(HELD_OUT)

    def logprobs(path: str, batch: Any) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path).double().eval()
        with torch.no_grad():
            positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
        width = batch.token_ids.shape[1]
        return torch.log_softmax(logits[:, -width - 1 : -1] / 0.7, -1)

    sums: dict[str, list[torch.Tensor]] = {"eval_kl_teacher": [], "eval_kl_ref": [], "eval_reward": []}
    for batch in batches:
        mask = batch.mask.bool()
        p, q, r = (logprobs(path, batch) for path in (files.student, files.math, files.code))
        for name, other in (("eval_kl_teacher", q), ("eval_kl_ref", r)):
            sums[name].append((p.exp() * (p - other)).sum(-1)[mask])
        sums["eval_reward"].append((q - r).gather(-1, batch.token_ids[..., None])[..., 0][mask])
    first = split(tmp_path / "run")[1][0]
    expected = {name: torch.cat(x).mean().item() for name, x in sums.items()}
    if "0" in arguments:  # the teacher is not loaded
        del expected["eval_kl_teacher"], expected["eval_reward"]
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=1e-4), name


def test_prompts_of_evaluations_are_checked_like_those_of_the_training(files: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wrong = {
        "is an option of --eval-prompts": ["--eval-every", "2"],
        "--eval-prompts: there is no file": ["--eval-prompts", str(tmp_path / "none.jsonl")],
        "--eval-prompts: {}, row 1: 'prompt' must be a text": [files.write("empty.jsonl", [{"prompt": ""}])],
        "--eval-prompts: {} has prompts that are too long: row 1": [
            files.write("long.jsonl", [{"prompt": "why " * 70}])
        ],
    }
    for said, arguments in wrong.items():
        given = arguments if arguments[0].startswith("--") else ["--eval-prompts", *arguments]
        output = " ".join(invoke(*small(files, run, *given), code=2).replace("│", " ").replace("'--", "--").split())
        assert said.format(given[1]).replace("'", "") in output.replace("'", ""), output
        assert not run.exists()


def test_the_tokenizer_of_the_helpers_knows_the_words(files: Files) -> None:
    """Unknown words would make all prompts one."""
    tokenizer = AutoTokenizer.from_pretrained(files.student)
    assert all(tokenizer.unk_token_id not in tokenizer(row["prompt"])["input_ids"] for row in HELD_OUT)
