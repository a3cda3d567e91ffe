"""``fused-gopd distill`` where teachers or the reference read other prompts than the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import BadParameter

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from distill_runs import SENTENCES, Files, assert_same_weights, invoke, metrics_of, small
from fused_gopd.cli.distill.prompts import read
from fused_gopd.cli.distill.readings import Reading

pytestmark = pytest.mark.usefixtures("one_thread")

TOLD = "tell me a story of a dog {solution}: {prompt}"


def rows() -> list[dict[str, Any]]:
    """Questions with what a teacher may know of them; the columns are what the options below make of the others."""
    found = []
    for n, sentence in enumerate(SENTENCES):
        told = TOLD.format(solution=n, prompt=sentence)
        system = [{"role": "system", "content": "how do I cook rice"}, {"role": "user", "content": sentence}]
        found.append({"prompt": sentence, "solution": n, "told": told, "messages": system})
    return found


@pytest.fixture(scope="module")
def hinted(files: Files) -> str:
    return files.write("hinted.jsonl", rows())


def run(files: Files, output: Path, *arguments: str, steps: int = 2) -> Path:
    invoke(*small(files, output, *arguments, "--teacher", files.math, steps=steps))
    return output


def test_a_template_and_a_system_message_are_the_columns_that_spell_them_out(
    files: Files, hinted: str, tmp_path: Path
) -> None:
    """The weights at the end are those of a column that has the whole prompt, and others than without one."""
    given = ["--prompts", hinted]
    plain = metrics_of(run(files, tmp_path / "plain", *given, steps=1))[0]
    for name, column, option in (
        ("template", "told", ["--teacher-template", TOLD]),
        ("system", "messages", ["--teacher-system", "how do I cook rice"]),
    ):
        made = run(files, tmp_path / name, *given, *option)
        spelled = run(files, tmp_path / f"{name}-column", *given, "--teacher-prompt-column", column)
        assert_same_weights(made / "model", spelled / "model")
        first = metrics_of(made)[0]
        assert first["reward"] != pytest.approx(plain["reward"], rel=1e-3)
        assert first["kl_ref_k3"] == pytest.approx(plain["kl_ref_k3"], abs=1e-6)  # the reference reads the prompt
    text = (tmp_path / "template" / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| the teacher's prompt | template {TOLD!r} |\n" in text


def test_the_reference_may_have_a_column(files: Files, hinted: str, tmp_path: Path) -> None:
    found = metrics_of(run(files, tmp_path / "run", "--prompts", hinted, "--ref-prompt-column", "told", steps=1))
    assert found[0]["kl_ref_k3"] > 1e-3  # the student itself, with another prompt
    alone = run(files, tmp_path / "one", "--prompts", hinted, "--ref-prompt-column", "told", "--reward-scale", "1")
    assert "reward" not in metrics_of(alone)[0]  # lambda = 1 has no use for the reference, nor for its prompt


def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(files: Files, hinted: str, tmp_path: Path) -> None:
    given = ["--prompts", hinted, "--teacher-template", TOLD, "--teacher-system", "who are you"]
    whole = run(files, tmp_path / "whole", *given, steps=2)
    run(files, tmp_path / "parts", *given, steps=1)
    invoke("--resume", "--output", tmp_path / "parts", "--steps", "2")
    assert_same_weights(whole / "model", tmp_path / "parts" / "model")
    said = invoke("--resume", "--output", tmp_path / "parts", "--teacher-system", "you", "--steps", "3", code=2)
    assert "was started with 'who are you', got 'you'" in said


def reading(path: str, chat: bool = True, **options: str) -> list[Any]:
    found = Reading(role="teacher", **options)
    found.check()
    data = read(Path(path), "", "", [])
    prompts: Any = data.prompts
    return found.of(data, [[{"role": "user", "content": x}] for x in prompts] if chat else prompts, chat)


def test_what_is_made_of_a_row(files: Files) -> None:
    path = files.write("one.jsonl", [{"prompt": "why {x}", "a b": "so {prompt}", "n": 1.5, "yes": True}])
    made = reading(path, template=r"{prompt}\n\n{{{a b}}} \\n {n} {yes}\boxed")
    assert made == [[{"role": "user", "content": "why {x}\n\n{so {prompt}} \\n 1.5 True\\boxed"}]]
    assert reading(path, chat=False, template="{a b}") == ["so {prompt}"]
    assert reading(path, chat=False, template="[{prompt}]") == ["[why {x}]"]
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
    path = files.write("two.jsonl", [{"prompt": [system, user, user]}])
    data = read(Path(path), "", "", [])
    made = Reading(role="teacher", system=r"c\nd", template="<{prompt}>").of(data, data.prompts, True)
    assert made == [[{"role": "system", "content": "c\nd"}, user, {"role": "user", "content": "<a>"}]]
    assert data.prompts == [[system, user, user]]


@pytest.mark.parametrize(
    ("options", "said", "flag"),
    [
        ({"template": "{prompt.__class__}"}, "must be a text with names of columns .*'prompt.__class__'", "template"),
        ({"template": "{prompt[0]}"}, r"names of columns .*'prompt\[0\]'", "template"),
        ({"template": "{prompt!r}"}, "names of columns", "template"),
        ({"template": "{prompt:>10}"}, "names of columns", "template"),
        ({"template": "{} {prompt}"}, "names of columns", "template"),
        ({"template": "{prompt} }"}, "names of columns .*Single '}'", "template"),
        ({"template": "{prompt} {"}, "names of columns", "template"),
        ({"template": "the solution is 5"}, "must have {prompt} in it", "template"),
        ({"template": "{prompt} {hint}"}, "row 1, has no 'hint', only prompt, n", "template"),
        ({"template": "{prompt} {none}"}, "row 1, must have a text or a number in 'none', got null", "template"),
        ({"template": "{prompt} {half}"}, "row 1, 'half': its character 1 is half of a surrogate pair", "prompts"),
        ({"column": "n", "system": "x"}, "has the whole prompt: it goes without --teacher-system", "prompt-column"),
        ({"column": "hint"}, "has no column 'hint', only prompt, n", "prompt-column"),
        ({"column": "n"}, "row 1: 'n' must be a text or a list of messages", "prompts"),
    ],
    ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else "",
)
def test_what_is_no_reading_is_named(files: Files, options: dict[str, str], said: str, flag: str) -> None:
    path = files.write("wrong.jsonl", ['{"prompt": "a", "n": 1, "none": null, "half": "\\ud800"}'])
    with pytest.raises(BadParameter, match=said) as error:
        reading(path, **options)
    assert error.value.param_hint == ("--prompts" if flag == "prompts" else f"--teacher-{flag}")


def test_a_system_message_needs_messages(files: Files) -> None:
    path = files.write("text.jsonl", [{"prompt": "a"}])
    with pytest.raises(BadParameter, match=r"needs prompts of messages: .*--teacher-template puts a text"):
        reading(path, chat=False, system="x")


def test_options_of_readings_are_checked_before_anything_is_loaded(
    files: Files, hinted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a model was loaded"))
    given = ["--prompts", hinted, "--teacher", files.math]
    for options, said in {
        ("--ref", "", "--reward-scale", "1", "--ref-prompt-column", "told"): "is what the reference reads: it needs",
        ("--teacher-template", "{prompt"): "must be a text with names of columns",
        ("--teacher-prompt-column", "told", "--teacher-template", TOLD): "has the whole prompt",
    }.items():
        assert said in invoke(*small(files, tmp_path / "run", *given, *options), code=2)


def test_a_prompt_that_is_too_long_for_the_teacher_is_named(files: Files, tmp_path: Path) -> None:
    long = [{"prompt": "who are you", "hint": "sky " * 59}]
    path = files.write("long.jsonl", [json.dumps(x) for x in long])
    for teacher in (files.math, files.changed(max_position_embeddings=256)):
        arguments = ["--prompts", path, "--teacher", teacher, "--teacher-template", "{hint} {prompt}"]
        code = 2 if teacher == files.math else 0
        said = invoke(*small(files, tmp_path / Path(teacher).name, *arguments, steps=1), code=code)
        if code:
            assert "long.jsonl (the teacher's prompts) has prompts that are too long: row 1 of 64 tokens" in said
            assert "(--teacher) has 64 positions" in said
