"""``fused-gopd inspect``: its page has the numbers of dense models, and its errors name what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
peft = pytest.importorskip("peft")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from distill_runs import SENTENCES, Files, runner  # noqa: E402
from fused_gopd.cli import app  # noqa: E402
from fused_gopd.cli.inspect import scoring  # noqa: E402
from fused_gopd.html import ScoredText  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    {"prompt": "why is the sky blue", "completion": "count to ten", "hint": "rice"},
    {"prompt": "who are you", "completion": "a dog <eos> a story", "hint": "a story"},
    {"prompt": "count", "completion": "ten", "hint": "dog"},
]


def inspect(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page would show, in its place."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(scoring, "write_report", lambda path, **page: found.update(page, path=path))
    return found


def texts_of(page: dict[str, Any]) -> list[ScoredText]:
    (texts,) = page["samples"].values()
    return list(texts)


def dense(model: Any, prompt: str, tokens: list[str], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(T,) log-probs of the tokens behind the prompt, and entropies, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(Path(model)) if isinstance(model, str) else None
    loaded = AutoModelForCausalLM.from_pretrained(model) if tokenizer else model[0]
    tokenizer = tokenizer or model[1]
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer.convert_tokens_to_ids([token.strip() for token in tokens])
    logits = loaded.double()(torch.tensor([before + after])).logits[0, len(before) - 1 : -1] / temperature
    logprobs = logits.log_softmax(-1).detach()
    return logprobs.gather(-1, torch.tensor(after)[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def assert_numbers(text: ScoredText, **want: Tensor) -> None:
    for name, values in want.items():
        found = torch.tensor(getattr(text, name), dtype=torch.float64)
        torch.testing.assert_close(found, values, rtol=1e-5, atol=2e-5)  # float32 models of two layers


def chat(text: str) -> str:
    """A user's message by the template of the tiny models."""
    return f"<user> {text} <assistant>"


# --------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_texts_have_the_numbers_of_dense_models(
    files: Files, tmp_path: Path, page: dict[str, Any], temperature: float
) -> None:
    file = files.write("texts.jsonl", TEXTS)
    models = ["--student", files.student, "--teacher", files.math, "--ref", files.code]
    options = ["--reward-scale", 1.5, "--temperature", temperature, "--batch-size", 2]
    output = inspect(*models, "--texts", file, *options, "--output", tmp_path / "page.html")
    texts = texts_of(page)
    assert [text.title for text in texts] == ["row 1", "row 2", "row 3"]
    # as the template of the tiny models ends a conversation
    ends = ["count to ten <assistant> <eos>", "a dog <eos>", "ten <assistant> <eos>"]
    assert ["".join(text.tokens) for text in texts] == ends
    advantages = []
    for row, text in zip(TEXTS, texts, strict=True):
        assert text.prompt.replace(" ", "") == chat(row["prompt"]).replace(" ", "")
        (p, entropy), (q, _), (r, _) = (
            dense(model, chat(row["prompt"]), list(text.tokens), temperature)
            for model in (files.student, files.math, files.code)
        )
        advantage = 1.5 * q - 0.5 * r - p
        assert_numbers(text, student=p, teacher=q, ref=r, entropy=entropy, advantage=advantage)
        advantages.append(advantage)
    assert "3 answers of 11 tokens" in output
    assert f"advantage {torch.cat(advantages).mean():.3g}" in output
    assert f"the page: {tmp_path / 'page.html'}" in output
    settings = dict(page["settings"])
    assert settings["λ (reward scale)"] == "1.5"
    assert settings["answers"] == "of the file"
    assert "sha256" in settings["the teacher"]
    assert settings["torch"] == torch.__version__
    assert str(files.folder) not in str(page["settings"])


def test_the_student_answers_prompts_and_no_reference_is_needed(
    files: Files, tmp_path: Path, page: dict[str, Any]
) -> None:
    arguments = ["--student", files.student, "--teacher", files.math, "--prompts", files.prompts, "--rows", 3]
    arguments += ["--max-new-tokens", 5, "--output", tmp_path / "page.html"]
    inspect(*arguments, "--seed", 1)
    first = texts_of(page)
    assert len(first) == 3
    assert all(1 <= len(text.tokens) <= 5 for text in first)
    for sentence, text in zip(SENTENCES, first, strict=False):
        p, entropy = dense(files.student, chat(sentence), list(text.tokens))
        q, _ = dense(files.math, chat(sentence), list(text.tokens))
        assert text.ref is None
        assert_numbers(text, student=p, teacher=q, entropy=entropy, advantage=q - p)
    inspect(*arguments, "--seed", 1)
    assert texts_of(page) == first
    inspect(*arguments, "--seed", 2)
    assert texts_of(page) != first


def test_the_student_with_a_hint_is_a_teacher(files: Files, tmp_path: Path, page: dict[str, Any]) -> None:
    file = files.write("texts.jsonl", TEXTS)
    template = "tell me {hint} {prompt}"
    arguments = ["--teacher", "student", "--teacher-template", template, "--ref", "student"]
    inspect("--student", files.student, *arguments, "--texts", file, "--output", tmp_path / "page.html")
    for row, text in zip(TEXTS, texts_of(page), strict=True):
        p, _ = dense(files.student, chat(row["prompt"]), list(text.tokens))
        q, _ = dense(files.student, chat(f"tell me {row['hint']} {row['prompt']}"), list(text.tokens))
        assert_numbers(text, student=p, teacher=q, ref=p, advantage=q - p)
        assert f"tell me {row['hint']} {row['prompt']}" in (text.teacher_prompt or "")
        assert text.ref_prompt is None
    assert dict(page["settings"])["the teacher reads"] == f"template {template!r}"


def test_adapters_are_put_on_their_bases(files: Files, tmp_path: Path, page: dict[str, Any]) -> None:
    file = files.write("texts.jsonl", TEXTS[:1])
    tokenizer = AutoTokenizer.from_pretrained(files.student)
    merged = {}
    for n, base in enumerate((files.student, files.math)):
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(n)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(tmp_path / f"adapter{n}")
        tokenizer.save_pretrained(tmp_path / f"adapter{n}")
        merged[n] = model.merge_and_unload(), tokenizer
    models = [
        "--student",
        files.student,
        "--teacher",
        f"adapter:{tmp_path / 'adapter0'}",
        "--ref",
        tmp_path / "adapter1",
    ]
    inspect(*models, "--texts", file, "--output", tmp_path / "page.html")
    (text,) = texts_of(page)
    for name, model in {"student": files.student, "teacher": merged[0], "ref": merged[1]}.items():
        logprobs, _ = dense(model, chat(TEXTS[0]["prompt"]), list(text.tokens))
        assert_numbers(text, **{name: logprobs})
    inspect(
        "--student", tmp_path / "adapter1", "--teacher", files.math, "--texts", file, "--output", tmp_path / "page.html"
    )
    (text,) = texts_of(page)
    assert_numbers(text, student=dense(merged[1], chat(TEXTS[0]["prompt"]), list(text.tokens))[0])


def test_messages_and_texts_as_they_are(files: Files, tmp_path: Path, page: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "who are you"}, {"role": "assistant", "content": "a dog"}]
    file = files.write("messages.jsonl", [{"messages": messages}])
    models = ["--student", files.student, "--teacher", files.math, "--output", tmp_path / "page.html"]
    inspect(*models, "--texts", file)
    (text,) = texts_of(page)
    assert "".join(text.tokens) == "a dog <assistant> <eos>"
    output = inspect(*models, "--prompts", file, "--max-new-tokens", 2)
    assert "1 conversations end with an assistant's message: it is left out" in output
    plain = files.write("plain.jsonl", [{"question": "who are", "answer": "you"}])
    inspect(*models, "--texts", plain, "--no-chat", "--prompt-column", "question", "--completion-column", "answer")
    (text,) = texts_of(page)
    assert_numbers(text, student=dense(files.student, "who are", list(text.tokens))[0])


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_is_a_file_that_is_not_replaced_unasked(files: Files, tmp_path: Path) -> None:
    file = files.write("texts.jsonl", [{"prompt": "why", "completion": "<script>alert(1)</script>"}])
    arguments = ["--student", files.student, "--teacher", files.math, "--texts", file, "--output", tmp_path / "x.html"]
    inspect(*arguments)
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "texts of texts.jsonl" in page
    assert "<script" not in page
    assert "exists: choose another name, or replace it by --overwrite" in inspect(*arguments, code=2)
    inspect(*arguments, "--overwrite")


def test_what_is_said_moves_no_cursor(files: Files, tmp_path: Path) -> None:
    shutil.copy(files.write("texts.jsonl", TEXTS), tmp_path / "t.jsonl")
    place = tmp_path / "[bold]\x1b[2J\u202e.html"
    output = inspect(
        "--student", files.student, "--teacher", files.math, "--texts", tmp_path / "t.jsonl", "--output", place
    )
    assert "[bold]⟨U+001B⟩[2J⟨U+202E⟩.html" in output
    assert "\x1b" not in output


# ---------------------------------------------------------------------------------------------------------- the errors

Case = Callable[[Files], list[str]]
WRONG: dict[str, tuple[Case, str]] = {
    "no student": (lambda f: ["--student", ""], "--student: must be given"),
    "no teacher": (lambda f: ["--teacher", ""], "--teacher: must be given"),
    "itself": (lambda f: ["--teacher", "student"], "--teacher: student reads the prompt that the student reads"),
    "both": (lambda f: ["--prompts", f.prompts], "--prompts: give either --prompts, to be answered, or --texts"),
    "neither": (lambda f: ["--texts", ""], "--prompts: give either --prompts"),
    "no file": (lambda f: ["--texts", "nowhere.jsonl"], "--texts: there is no file nowhere.jsonl"),
    "no answers": (lambda f: ["--texts", f.prompts], "--texts: "),
    "no column": (lambda f: ["--completion-column", "x"], "--completion-column: "),
    "no prompts": (lambda f: ["--prompt-column", "x"], "--prompt-column: "),
    "column of answers": (
        lambda f: ["--texts", "", "--prompts", f.prompts, "--completion-column", "x"],
        "--completion-column: is an option of --texts",
    ),
    "lambda": (lambda f: ["--reward-scale", "2"], "--ref: must be given for --reward-scale 2"),
    "infinite": (lambda f: ["--reward-scale", "inf"], "--reward-scale: expected a finite number"),
    "cold": (lambda f: ["--temperature", "0"], "--temperature: must be positive"),
    "dtype": (lambda f: ["--dtype", "float16"], "--dtype: expected one of float32, bfloat16"),
    "another tokenizer": (lambda f: ["--teacher", f.foreign], "--teacher: the tokenizers of the student and of"),
    "not there": (lambda f: ["--ref", "./nowhere"], "--ref: must be a model: there is no folder ./nowhere"),
    "adapter of nothing": (lambda f: ["--student", "adapter:x"], "--student: must be a model"),
    "adapter that is none": (lambda f: ["--teacher", f"adapter:{f.math}"], "--teacher: must be adapter: and a PEFT"),
    "two prompts": (
        lambda f: ["--teacher-system", "x", "--teacher-prompt-column", "hint"],
        "--teacher-prompt-column: has the whole prompt",
    ),
    "prompt of no reference": (lambda f: ["--ref-prompt-column", "hint"], "--ref-prompt-column: is an option of --ref"),
    "template": (lambda f: ["--chat-template-kwargs", "[1]"], "--chat-template-kwargs: must be a JSON object"),
    "long": (
        lambda f: ["--texts", f.write("long.jsonl", [{"prompt": "why", "completion": "dog " * 70}])],
        "--texts: ",
    ),
    "long answers": (
        lambda f: ["--texts", "", "--prompts", f.prompts, "--max-new-tokens", "60"],
        "row 1, has 67 tokens with --max-new-tokens 60, and",
    ),
    "smaller": (lambda f: ["--teacher", f.changed(vocab_size=8)], "--teacher: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(files: Files, tmp_path: Path, name: str) -> None:
    arguments, message = WRONG[name]
    file = files.write("texts.jsonl", TEXTS)
    given = ["--student", files.student, "--teacher", files.math, "--texts", file, "--output", str(tmp_path / "x.html")]
    output = inspect(*given, *arguments(files), code=2)
    assert message in " ".join(output.split()).replace("Invalid value for ", "").replace(" │ │ ", " "), output
    assert not (tmp_path / "x.html").exists()
