"""``fused-gopd distill --cross-tokenizer``: tiny models of two tokenizers on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill_runs import SENTENCES, TEMPLATE, app, make_model, runner

pytestmark = pytest.mark.usefixtures("one_thread")


def byte_level(words: tuple[str, ...], size: int, template: str | None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": ["<eos>", "<pad>"], "initial_alphabet": alphabet}
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=size, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", chat_template=template)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    reversed_ = tuple(s[::-1] for s in SENTENCES)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": s}) + "\n" for s in SENTENCES))
    return {
        "student": make_model(folder / "s", 0, byte_level(SENTENCES, 330, TEMPLATE)),
        "teacher": make_model(folder / "t", 1, byte_level(reversed_, 300, "T:" + TEMPLATE)),
        "plain": make_model(folder / "p", 2, byte_level(reversed_, 300, None)),
        "short": make_model(folder / "short", 3, byte_level(reversed_, 300, TEMPLATE), max_position_embeddings=30),
        "prompts": str(prompts),
    }


def invoke(files: dict[str, str], output: Path, *arguments: str, teacher: bool = True, code: int = 0) -> str:
    given = ["--student", files["student"], "--prompts", files["prompts"], "--steps", "2", "--batch-size", "4"]
    given += ["--max-new-tokens", "8", "--learning-rate", "0.01", *(["--teacher", files["teacher"]] if teacher else [])]
    result = runner.invoke(app, ["distill", *given, "--output", str(output), *arguments])
    assert result.exit_code == code, result.output
    return result.output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_a_run_with_two_tokenizers(files: dict[str, str], tmp_path: Path, estimator: str) -> None:
    options = ["--cross-tokenizer", "--estimator", estimator, "--reward-scale", "1.25", "--ref", "student"]
    invoke(files, tmp_path / "run", *options, "--eval-prompts", files["prompts"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "eval_loss" in row]
    rows = [row for row in rows if "loss" in row]
    # of a teacher with another vocabulary, the KL is over the tokens that both have
    assert [("eval_kl_teacher" in row, "eval_kl_ref" in row) for row in held_out] == [(estimator == "full", True)] * 2
    assert len(rows) == 2
    assert all(0 < row["aligned_tokens"] <= 1 and 0 < row["aligned_bytes"] <= 1 for row in rows)
    assert "| tokenizers | of each model its own |" in (tmp_path / "run" / "model" / "README.md").read_text()
    result = runner.invoke(app, ["distill", "--resume", "--output", str(tmp_path / "run"), "--steps", "3"])
    assert result.exit_code == 0, result.output


def test_a_teacher_reads_messages_that_the_student_has_no_template_for(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "told.jsonl"
    told = [{"role": "system", "content": "cook"}, {"role": "user", "content": "rice"}]
    path.write_text(json.dumps({"prompt": "how do I", "told": told}) + "\n")
    student = make_model(tmp_path / "student", 0, byte_level(SENTENCES, 330, None))
    options = ["--student", student, "--cross-tokenizer", "--prompts", str(path), "--steps", "1"]
    options += ["--teacher-prompt-column", "told", "--teacher"]
    said = invoke(files, tmp_path / "run", *options, files["teacher"], teacher=False)
    assert "row 1, as the teacher reads it: 'T:<system> cook <user> rice <assistant>'" in said
    said = invoke(files, tmp_path / "long", *options, files["short"], teacher=False, code=2)
    assert "(the teacher's prompts) has prompts that are too long: row 1 of " in said


@pytest.fixture
def server(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The teacher behind a server of vLLM's format."""
    pytest.importorskip("httpx")
    import test_server

    teacher = AutoModelForCausalLM.from_pretrained(files["teacher"]).eval()
    own = AutoTokenizer.from_pretrained(files["teacher"])
    monkeypatch.setattr(test_server, "word", lambda token_id: own.decode([token_id]))
    monkeypatch.setattr(test_server, "V", len(own))

    class Served:
        @torch.no_grad()
        def logprobs(self, ids: list[int]) -> list[list[float]]:
            return torch.log_softmax(teacher(torch.tensor([ids])).logits[0], -1).tolist()

    for made in test_server.serve("vllm"):
        made.model = Served()
        yield made


def test_a_server_gets_ids_of_its_own_tokenizer(files: dict[str, str], tmp_path: Path, server: Any) -> None:
    remote = ["--teacher-server", server.url, "--teacher-server-model", "teacher", "--cross-tokenizer"]
    remote += ["--teacher-tokenizer", files["teacher"]]
    invoke(files, tmp_path / "remote", *remote, teacher=False)
    invoke(files, tmp_path / "local", "--cross-tokenizer", "--estimator", "sampled")
    local = weights(tmp_path / "local" / "model")
    for name, value in weights(tmp_path / "remote" / "model").items():
        # Adam's first steps are the gradient's sign times the rate: rounding may flip only what is next to 0
        assert (value - local[name]).abs().mean() < 1e-4, name


def test_mistakes_are_named(files: dict[str, str], tmp_path: Path) -> None:
    cases = {
        (): "--cross-tokenizer of `fused-gopd distill`",
        (
            "--teacher-tokenizer",
            files["teacher"],
        ): "--teacher-tokenizer: is an option of --teacher-server",
        ("--cross-tokenizer", "--estimator", "topk", "--k", "3", "--support", "student"): "and the teacher has others",
        ("--teacher", files["short"], "--cross-tokenizer"): "(--teacher), which has 30 positions",
        ("--teacher", files["plain"], "--cross-tokenizer"): "is not taken by {plain}'s chat template",
    }
    for n, (options, message) in enumerate(cases.items()):
        output = invoke(files, tmp_path / str(n), *options, teacher="--teacher" not in options, code=2)
        assert message.format(**files) in " ".join(output.split()), (options, output)
    remote = ["--teacher-server", "http://h", "--teacher-server-model", "t"]
    served = {
        ("--cross-tokenizer",): "--teacher-tokenizer: must be given with --cross-tokenizer",
        (
            "--teacher-tokenizer",
            files["teacher"],
        ): "--teacher-tokenizer: is an option of --cross-tokenizer",
    }
    for n, (options, message) in enumerate(served.items()):
        output = invoke(files, tmp_path / f"s{n}", *remote, *options, teacher=False, code=2)
        assert message.format(**files) in " ".join(output.split()), (options, output)
