"""``fused-gopd distill --config``: YAML means what the command line means, and a run writes its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

import click
import typer
import yaml

from distill_runs import Files, assert_same_weights, invoke, metrics_of, runner, small
from fused_gopd.cli import app
from fused_gopd.cli.distill import runfile
from fused_gopd.cli.distill.options import RunOptions

pytestmark = pytest.mark.usefixtures("one_thread")


def parsed(*arguments: str) -> dict[str, object]:
    """The parameters as the command gets them."""
    command = typer.main.get_command(app).commands["distill"]  # type: ignore[attr-defined]
    context = command.make_context("distill", [str(x) for x in arguments])
    return {name: value for name, value in context.params.items() if name != "config"}


def test_a_file_gives_what_the_command_line_gives(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "student: org/student\nteacher:\n  math: org/math\n  on: org/code\nroute-column: domain\n"
        "learning-rate: 1e-5\nsteps: 7\nchat: no\ncross-tokenizer: true\nk:\nseed: 0\ntail: ~\n"
        "chat-template-kwargs:\n  enable_thinking: false\n  level: 2\noutput: here\n",
        encoding="utf-8",
    )
    flags = ["--student", "org/student", "--teacher", "math=org/math", "--teacher", "on=org/code", "--route-column"]
    flags += ["domain", "--learning-rate", "1e-5", "--steps", "7", "--no-chat", "--cross-tokenizer", "--output", "here"]
    flags += ["--chat-template-kwargs", '{"enable_thinking": false, "level": 2}']
    assert parsed("--config", str(path)) == parsed(*flags)
    assert parsed("--config", str(path), "--steps", "9")["steps"] == 9
    assert parsed("--config", str(path), "--chat")["chat"] is True
    assert parsed("--config", str(path), "--teacher", "org/other")["teacher"] == ["org/other"]


@pytest.mark.parametrize(
    ("text", "teachers"),
    [("teacher: a", ["a"]), ("teacher: [m=a, c=b]", ["m=a", "c=b"]), ("teacher: {m: a, c: b}", ["m=a", "c=b"])],
)
def test_a_teacher_is_a_text_a_list_or_a_mapping_by_route(tmp_path: Path, text: str, teachers: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert parsed("--config", str(path), "--output", "x")["teacher"] == teachers


def test_every_option_of_a_run_can_be_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name.replace('_', '-')}:\n" for name in RunOptions.names()))
    assert parsed("--config", str(path), "--output", "x") == parsed("--output", "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz: 3", "'stepz', which is no option: did you mean steps?"),
        ("batch_size: 3", "'batch_size', which is no option: did you mean batch-size?"),
        ("no-chat: true", "'no-chat', which is no option: write chat: false"),
        ("resume: true", "'resume', which is no option"),
        ("teacher-server-key: secret", "'teacher-server-key', which is no option"),
        ("steps: 2.5", "Invalid value for '--steps'"),
        ("steps: 0", "Invalid value for '--steps'"),
        ("learning-rate: true", "Invalid value for '--learning-rate'"),
        ("chat: perhaps", "Invalid value for '--chat'"),
        ("steps: [1]", "line 1: steps must have one value"),
        ("\nteacher: [{a: b}]", "line 2: teacher must have one value"),
        ("steps: 1\nsteps: 2", "line 2: 'steps' is there twice"),
        ("teacher: {a: b, a: c}", "line 1: 'a' is there twice"),
        ("[a]: 1", "line 1: a key must be a text"),
        ("- steps", "line 1: the file must have a line `option: value` for each option"),
        ("{", "is not YAML"),
        ("teacher-template: {prompt}", "line 1: teacher-template must have one value; a text that begins with { or ["),
        ("teacher-template: {prompt} {hint}", "line 1, column 28: teacher-template: {prompt} {hint} ^ (a text that"),
        ("a: 1\n--- \nb: 2", "is not YAML"),
        ("chat-template-kwargs: [1]", "must be a JSON object, got '[1]'"),
        ("chat-template-kwargs: {a: 2026-01-01}", "chat-template-kwargs must be what JSON has"),
        ("chat-template-kwargs: &a {b: *a}", "chat-template-kwargs must be what JSON has"),
        ("chat-template-kwargs: '{'", "must be a JSON object, got '{'"),
        ("chat-template-kwargs: {a: .nan}", "chat-template-kwargs must be what JSON has"),
        ("chat-template-kwargs:\n  a: [{b: 1, b: 2}]", "line 2: 'b' is there twice"),
        ("teacher: {a=b: c}", "line 1: the name of a route has no =, got 'a=b'"),
        pytest.param("x: " + "[" * 3000, "is not YAML: maximum recursion depth exceeded", id="brackets"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path, prompts = tmp_path / "run.yaml", tmp_path / "prompts.jsonl"
    path.write_text(text)
    prompts.write_text('{"prompt": "a"}\n')
    given = ["--config", path, "--output", tmp_path / "run", "--student", tmp_path, "--prompts", prompts]
    assert said in " ".join(invoke(*given, code=2).replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"prompts: caf\xe9")
    assert "cannot be read" in invoke("--config", latin, "--output", tmp_path / "run", code=2)
    assert "does not exist" in invoke("--config", tmp_path / "none.yaml", "--output", tmp_path / "run", code=2)


def test_a_run_is_repeated_by_the_file_that_it_writes(files: Files, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    invoke(*small(files, run, "--chat-template-kwargs", "{}", steps=2))
    written = yaml.safe_load((run / runfile.FILE).read_text(encoding="utf-8"))
    assert (written["teacher"], written["ref"], written["learning-rate"]) == (files.math, "student", 0.01)
    assert not {"output", "chat", "chat-template-kwargs", "k"} & set(written)  # as they are by default
    invoke("--config", run / runfile.FILE, "--output", again)
    assert_same_weights(run / "model", again / "model")
    assert (run / runfile.FILE).read_text() == (again / runfile.FILE).read_text()
    # --resume compares a file's options as those of the command line, and writes the file of the longer run
    assert "was started with 3, got 4" in invoke(
        "--resume", "--config", _file(tmp_path, "seed: 4"), "--output", run, code=2
    )
    invoke("--resume", "--config", _file(tmp_path, "steps: 3"), "--output", run)
    assert len(metrics_of(run)) == 3
    assert yaml.safe_load((run / runfile.FILE).read_text())["steps"] == 3


def _file(folder: Path, text: str) -> Path:
    path = folder / "more.yaml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------ variables of chat templates


@pytest.fixture(scope="module")
def thinking(files: Files) -> str:
    """A student whose template has a variable, which puts a word before the answer."""
    template = (Path(files.code) / "chat_template.jinja").read_bytes()
    folder = Path(files.damaged("chat_template.jinja", lambda _: template + b"{% if hint %} {{ hint }}{% endif %}"))
    return str(folder.rename(folder.with_name("thinking")))


def test_variables_of_the_chat_template_reach_the_prompts(files: Files, thinking: str, tmp_path: Path) -> None:
    """The same run as with prompts that have the word themselves."""
    words = files.write("rendered.jsonl", [{"prompt": f"<user> {s} <assistant> dog"} for s in ("who are you",)])
    plain = files.write("plain.jsonl", [{"prompt": "who are you"}])
    first = ["--student", thinking, "--prompts"]
    invoke(*small(files, tmp_path / "rendered", *first, words, "--no-chat", steps=1))
    given = ["--chat-template-kwargs", '{"hint": "dog"}']
    invoke(*small(files, tmp_path / "given", *first, plain, *given, steps=1))
    invoke(*small(files, tmp_path / "without", *first, plain, steps=1))
    rows = {name: metrics_of(tmp_path / name)[0]["loss"] for name in ("rendered", "given", "without")}
    assert rows["given"] == pytest.approx(rows["rendered"], rel=1e-6)
    assert rows["without"] != pytest.approx(rows["given"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (['{"hnt": "dog"}'], "sets 'hnt', and the student's chat template has no variable of this name"),
        (['{"hint": 1}', "--no-chat"], "the prompts are texts that are taken as they are"),
        (['{"add_generation_prompt": false}'], "cannot set 'add_generation_prompt'"),
        (["[1]"], "must be a JSON object, got '[1]'"),
    ],
)
def test_variables_that_would_be_ignored_are_refused(
    files: Files, thinking: str, tmp_path: Path, more: list[str], said: str
) -> None:
    arguments = small(files, tmp_path / "run", "--student", thinking, "--chat-template-kwargs", *more)
    result = runner.invoke(app, ["distill", *arguments])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not isinstance(result.exception, click.ClickException)
