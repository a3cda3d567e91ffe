"""``fused-gopd plan``: its formulas against closed forms and measurements, and what the command refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fused_gopd as fg
from builders import linear_head, trainable, why_not
from costs import Memory
from fused_gopd.cli import app
from fused_gopd.cli.plan import cost, parse_memory
from fused_gopd.cli.plan.call import PlannedCall
from fused_gopd.cli.plan.communication import collectives
from fused_gopd.cli.plan.presets import PRESETS
from fused_gopd.loop import chunking

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
GIB = 1 << 30


def invoke(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


CALL = PlannedCall(tokens=1000, vocab=50_000, hidden=100, teacher_hidden=200, ref_hidden=300)


def planned(*arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(invoke("plan", "--json", *arguments))
    return data


def test_plan_low_chunks_have_logits_of_two_bytes() -> None:
    low, wide = (planned("--model", "qwen3-1.7b", *more)["fused"] for more in (("--low-chunks",), ()))
    for side, element in ((low, 2), (wide, 4)):
        rows = side["chunk_size"] + 2 * chunking.frozen_chunk_size(side["chunk_size"], "cuda")
        # chunks of nearly equal size may be a little smaller than the largest that there could be
        assert 0.9 * rows < side["items"]["chunk buffers"] / 151936 / element <= rows
    assert low["chunk_size"] > wide["chunk_size"]


def test_plan_dense_peak_is_k_tensors() -> None:
    entries = 1000 * 50_000 * 4
    for estimator, alive in (("full", 5), ("sampled", 3), ("topk", 3)):
        for scale in (1.25, 1.0, 0.0):
            call = dataclasses.replace(CALL, estimator=estimator, reward_scale=scale)
            assert sum(cost.dense_peak(call).values()) == alive * entries


def test_plan_dense_peak_of_few_tokens_is_the_gradients() -> None:
    few = dataclasses.replace(CALL, tokens=1)
    assert sum(cost.dense_peak(few).values()) == 50_000 * 2 + 100 * 2 + 50_000 * 100 * 2


def test_plan_fused_items_in_closed_form() -> None:
    chunk = chunking.chunk_size_for(50_000, 1.5, "cuda", 4)
    items = cost.fused_peak(dataclasses.replace(CALL, tokens=chunk * 500))
    rows = chunk + 2 * chunking.frozen_chunk_size(chunk, "cuda")  # the student's, and a fourth of them twice
    assert items["chunk buffers"] == rows * 50_000 * 4
    assert items["gradient of hidden"] == chunk * 500 * 100 * 2
    assert items["float32 accumulator of the weight gradient"] == 50_000 * 100 * 4
    assert "gradient of weight" not in items  # it is rounded when the chunk buffers are gone


def test_plan_fused_peak_of_a_large_head_is_the_rounding_of_its_gradient() -> None:
    items = cost.fused_peak(dataclasses.replace(CALL, tokens=8, hidden=8192))
    assert "chunk buffers" not in items
    assert items["float32 accumulator of the weight gradient"] == 2 * items["gradient of weight"]


def test_plan_float32_needs_no_second_accumulator() -> None:
    wide = dataclasses.replace(CALL, dtype="float32")
    assert "float32 accumulator of the weight gradient" not in cost.fused_peak(wide)


def test_plan_knows_how_many_models_wait() -> None:
    """full: the student's chunk and a fourth of the others'; topk: one model, two where the student has to wait."""
    topk = dataclasses.replace(CALL, estimator="topk", k=32)
    waiting = dataclasses.replace(topk, support="student")
    assert [call.buffers for call in (CALL, dataclasses.replace(CALL, reward_scale=1.0), topk, waiting)] == [
        1.5,
        1.25,
        1,
        2,
    ]
    assert waiting.chunk_size == chunking.chunk_size_for(50_000, 2, "cuda", 4)


def test_plan_fused_logits_do_not_grow_with_tokens() -> None:
    chunk = CALL.chunk_size
    most = (chunk + 2 * chunking.frozen_chunk_size(chunk, "cuda")) * 50_000 * 4
    for n in (10**5, 10**6, 10**7):
        # chunks of nearly equal size may be a little smaller than the largest that there could be
        assert 0.95 * most < cost.fused_peak(dataclasses.replace(CALL, tokens=n))["chunk buffers"] <= most


def test_plan_gemm_work_is_five_or_four() -> None:
    same = dataclasses.replace(CALL, teacher_hidden=100, ref_hidden=100)
    one = 2 * 1000 * 50_000 * 100
    assert cost.gemm_flop(same) == 5 * one
    assert cost.gemm_flop(dataclasses.replace(same, estimator="sampled")) == 5 * one
    assert cost.gemm_flop(dataclasses.replace(same, reward_scale=1.0)) == 4 * one
    assert cost.gemm_flop(dataclasses.replace(same, reward_scale=0.0)) == 4 * one
    assert cost.gemm_flop(CALL) == (3 + 2 + 3) * one


def test_plan_knows_targets_of_several_models() -> None:
    made = dataclasses.replace(CALL, teacher_models=2, ref_models=3)
    one = 2 * 1000 * 50_000 * 100
    assert cost.gemm_flop(made) == (3 + 2 * 2 + 3 * 3) * one
    assert cost.gemm_flop(dataclasses.replace(made, reward_scale=1.0)) == (3 + 2 * 2) * one
    assert cost.inputs(made)["head weights"] == 50_000 * (100 + 2 * 200 + 3 * 300) * 2
    # a chunk of the student, and a fourth of it of each sum and of the model that is added
    assert made.buffers == 1 + 3 / 4
    assert dataclasses.replace(made, estimator="sampled").buffers == 1
    assert dataclasses.replace(made, estimator="topk", k=8).buffers == 2
    # lambda cancels it, so nothing is made of several
    assert dataclasses.replace(CALL, ref_models=3, reward_scale=1.0).buffers == 1 + 1 / 4
    wire = {c.what: c.received for c in collectives(dataclasses.replace(made, tokens=4096, dp=4))}
    head = 50_000 * 100 * 2 * 3 // 4
    assert (wire["heads of the teacher"], wire["heads of the reference"]) == (2 * 2 * head, 3 * 3 * head)
    output = invoke("plan", "--model", "qwen3-1.7b", "--teacher-hidden", "4096", "--teacher-models", "2")
    assert "2048 / 2 x 4096 / 2048" in output


@pytest.mark.parametrize("fused", [False, True])
def test_plan_tokens_that_fit_is_the_largest_number(fused: bool) -> None:
    def need(tokens: int) -> int:
        at = dataclasses.replace(CALL, tokens=tokens)
        peak = cost.fused_peak(at) if fused else cost.dense_peak(at)
        return sum(cost.inputs(at).values()) + sum(peak.values())

    tokens = cost.tokens_that_fit(CALL, GIB, fused=fused)
    assert need(tokens) <= GIB < need(tokens + 1)


def test_plan_no_token_fits_in_nothing() -> None:
    assert cost.tokens_that_fit(CALL, 1000, fused=True) == 0


def test_plan_command_with_presets() -> None:
    data = planned("--model", "Qwen3-1.7B", "--teacher-model", "qwen3-8b", "--tokens", "4096", "--memory", "80GiB")
    assert data["job"]["vocab"] == 151_936
    assert (data["job"]["hidden"], data["job"]["teacher_hidden"], data["job"]["ref_hidden"]) == (2048, 4096, 2048)
    assert data["dense"]["peak"] == 5 * 4096 * 151_936 * 4
    assert data["fused"]["chunk_size"] == chunking.chunk_size_for(151_936, 1.5, "cuda", 4)
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
        call = planned(*arguments)["job"]
        return call["hidden"], call["teacher_hidden"], call["vocab"]

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
    assert parse_memory(text) == size


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
        (["--model", "qwen3-8b", "--estimator", "exact"], "must be one of 'sampled', 'full', 'topk', got 'exact'"),
        (["--model", "qwen3-8b", "--estimator", "topk"], "must be given for --estimator topk"),
        (["--model", "qwen3-8b", "--k", "32"], "is an option of --estimator topk"),
        (["--model", "qwen3-8b", "--estimator", "topk", "--k", "200000"], "at most the vocabulary of 151936"),
        (["--model", "qwen3-8b", "--support", "student"], "--support"),
        (["--model", "qwen3-8b", "--support", "ref"], "must be one of 'teacher', 'student'"),
        (["--model", "qwen3-8b", "--divergence", "kl"], "must be one of 'reverse_kl', 'forward_kl', "),
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

BIG = PlannedCall(tokens=8192, vocab=128_256, hidden=512, teacher_hidden=1024, ref_hidden=256)


def test_plan_a_ranks_share_is_its_tokens_on_its_rows() -> None:
    share = dataclasses.replace(BIG, tp=8, dp=3, cp=2).share
    assert (share.tokens, share.vocab) == (1366, 16_032)  # both rounded up: the rank with the most to do
    assert (share.tp, share.dp, share.cp) == (1, 1, 1)
    assert share.chunk_size == chunking.chunk_size_for(16_032, 1.5, "cuda", 4)
    assert cost.gemm_flop(dataclasses.replace(BIG, tp=8, dp=2, cp=2).share) == cost.gemm_flop(BIG) / 32


def test_plan_one_rank_has_no_wire() -> None:
    assert collectives(BIG) == []


def received(call: PlannedCall) -> dict[str, int]:
    return {c.what: c.received for c in collectives(call)}


@pytest.mark.parametrize("tp", [2, 8])
def test_plan_vocabulary_parallel_wire_in_closed_form(tp: int) -> None:
    """All-gather of S in all: S (n - 1) / n; all-reduce of S: twice that. (test_shards.py counts them.)"""
    n, others = 8192, tp - 1
    gradient = {"gradient of hidden": 2 * n * 512 * 4 * others // tp}
    call = dataclasses.replace(BIG, tp=tp)
    assert received(call) == {"statistics": n * 13 * 4 * others, **gradient}
    jsd = dataclasses.replace(call, divergence="jsd")
    assert received(jsd) == {**received(call), "statistics of the mixture": n * 2 * 4 * others}
    # those with a second pass over a row exchange two statistics more, those with both KLs one
    assert received(dataclasses.replace(call, divergence="alpha")) == received(jsd)
    assert received(dataclasses.replace(call, divergence="mixed"))["statistics"] == n * 14 * 4 * others
    for scale, models in ((1.25, 3), (1.0, 2), (0.0, 2)):
        sampled = dataclasses.replace(call, estimator="sampled", reward_scale=scale)
        assert received(sampled) == {"statistics, model by model": models * n * 4 * 4 * others, **gradient}
    topk = dataclasses.replace(call, estimator="topk", k=32)
    assert received(topk) == {
        "candidates of the support": n * 2 * 32 * 4 * others,
        "statistics, model by model": 3 * n * (4 + 32) * 4 * others,
        **gradient,
    }


def test_plan_collectives_are_called_once_a_chunk_or_a_part_of_it() -> None:
    call = dataclasses.replace(BIG, tp=8, tokens=100_000)
    per_chunk = -(-100_000 // call.share.chunk_size)
    assert per_chunk > 1
    assert {c.what: c.calls for c in collectives(call)} == {
        "statistics": 4 * per_chunk,  # teacher and reference come a fourth of a chunk at a time
        "gradient of hidden": per_chunk,
    }
    sampled = {c.what: c.calls for c in collectives(dataclasses.replace(call, estimator="sampled"))}
    assert sampled["statistics, model by model"] == 3 * sampled["gradient of hidden"]


@pytest.mark.parametrize(("dp", "cp"), [(4, 1), (1, 4), (2, 2)])
def test_plan_sharded_heads_travel_once_a_step(dp: int, cp: int) -> None:
    one = 128_256 * 512 * 2 * 3 // 4  # (n - 1) / n of the student's head in bfloat16
    want = {"head of the student": one, "head of the teacher": 2 * one, "head of the reference": one // 2}
    call = dataclasses.replace(BIG, dp=dp, cp=cp)
    assert received(call) == {**want, "gradient of the student's head": one, "number of tokens": 12}
    fewer = received(dataclasses.replace(call, reward_scale=1.0))
    assert "head of the reference" not in fewer  # lambda has cancelled it
    within = received(dataclasses.replace(call, tp=8))
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
    ({"teacher_models": 2, "ref_models": 3}, 1),
    ({"teacher_models": 2, "reward_scale": 1.0}, 4),
    ({"estimator": "sampled", "teacher_models": 2}, 1),
    ({"estimator": "topk", "k": 16, "teacher_models": 2}, 1),
    ({"estimator": "topk", "k": 16, "ref_models": 2}, 1),
]


@pytest.mark.skipif(why_not("native") is not None, reason="the torch backend's temporaries are not planned for")
@pytest.mark.parametrize(("changes", "tp"), MEASURED, ids=str)
def test_plan_memory_is_what_a_rank_is_measured_to_hold(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], tp: int
) -> None:
    """One rank's work, the loss on its rows of the heads, within 10 % of the plan of all; chunk buffers of 8 MiB."""
    monkeypatch.setitem(chunking.CHUNK_BUDGET_BYTES, "cpu", 8 << 20)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its products come in blocks of their own
    plain = {"tokens": 512, "hidden": 128, "teacher_hidden": 64, "ref_hidden": 96, "dtype": "float32"}
    call = PlannedCall(vocab=32_768, device="cpu", tp=tp, **(plain | changes))
    share, dtype = call.share, getattr(torch, call.dtype)
    shape = (share.tokens,)
    student, *heads = (
        [linear_head(10 * i + j, shape, share.vocab, width, dtype) for j in range(models)]
        for i, (width, models) in enumerate(
            ((call.hidden, 1), (call.teacher_hidden, call.teacher_models), (call.ref_hidden, call.ref_models))
        )
    )
    student = trainable(student[0])
    frozen = [
        fg.LogLinear(parts, [1.25, *[-0.1] * (len(parts) - 1)]) if len(parts) > 1 else parts[0] for parts in heads
    ]
    ids = torch.zeros(shape, dtype=torch.int64)
    options = {"k": call.k, "support": call.support} if call.estimator == "topk" else {}

    def step() -> None:
        out = fg.gopd_loss(
            student,
            *frozen,
            ids,
            estimator=call.estimator,
            divergence=call.divergence,
            reward_scale=call.reward_scale,
            **options,
        )
        torch.autograd.grad(out.loss, [student.hidden, student.weight])

    step()
    want = sum(cost.fused_peak(share, tp).values())
    assert Memory(step).peak == pytest.approx(want, rel=0.1)
