"""The benchmarks: every provider of a job does the same work, and a run becomes rows, tables and a picture."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import peer_stubs
from fused_gopd import installing, rowops
from fused_gopd.cli import app, bench

pytest.importorskip("pytest_benchmark")
floors, providers, registry, report, run, workloads = (
    bench.benchmarks_module(name) for name in ("floors", "providers", "registry", "report", "run", "workloads")
)
runner = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"})

QUICK = {w.job: w for w in workloads.SUITES["quick"].workloads("cpu") if not w.masked}
# Each job as it is; half and nine tenths of the tokens masked; a frozen head; unequal hidden sizes.
VARIANTS = [
    *QUICK.values(),
    *(replace(QUICK[job], masked=0.5) for job in ("logprobs", "policy", "jsd", "hidden-full", "logits-full")),
    replace(QUICK["nll"], masked=0.9, frozen=True),
    replace(QUICK["reverse-kl"], frozen=True),
    replace(QUICK["hidden-full"], hidden=(32, 48, 16), frozen=True),
    replace(QUICK["hidden-sampled"], hidden=(32, 48, 16), masked=0.5),
    replace(QUICK["hidden-full"], peaked=True),
]


def tolerance(workload: Any, inputs: Any) -> float:
    """Relative error that float32 may have, from the first-order error of the logits.

    A logit is a sum of H products and off by at most H 2^-24 |h| |w| (given logits: by nothing, log-softmax adds about
    log2(V) 2^-24 of the largest one's size). The bracket of a divergence has three such log-probs with coefficients of
    at most 1, 1.25 and 0.25, each the difference of two, and p is off by as much again: 7 of them in all. An advantage,
    a mask, a coefficient or a mean that is not the job's is off by a hundredth and more.
    """
    if inputs.weights is None:
        size = max(float(x.detach().abs().max()) for x in inputs.rows) * 9
    else:
        norms = zip(inputs.rows, inputs.weights, strict=True)
        size = max(h.shape[1] * float((h.norm(dim=1).max() * w.norm(dim=1).max()).detach()) for h, w in norms)
    bound = 7 * size * 2**-24
    assert bound < 2e-3
    return bound


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def masked_part(workload: Any, inputs: Any, loss: Tensor) -> Tensor:
    """Log-probs of the live tokens: dense code returns those, this package all with 0 for the rest."""
    if workload.job == "logprobs" and inputs.mask is not None and loss.shape == inputs.mask.shape:
        return loss[inputs.mask]
    return loss


def assert_same_work(provider: str, workload: Any) -> None:
    inputs = workload.inputs()
    truth = providers.oracle(workload, inputs.first(workload.tokens, torch.float64))
    result = registry.PROVIDERS[provider].prepare(workload)(inputs)
    bound = tolerance(workload, inputs)
    assert len(result.gradients) == len(truth.gradients) == len(inputs.leaves)
    assert relative(masked_part(workload, inputs, result.loss), truth.loss) < bound
    for gradient, exact in zip(result.gradients, truth.gradients, strict=True):
        assert gradient.shape == exact.shape
        assert relative(gradient, exact) < bound


def pairs(names: list[str]) -> list[Any]:
    found = [(n, w) for w in VARIANTS for n in names if w.job in registry.PROVIDERS[n].jobs]
    return [pytest.param(n, w, id=f"{n}-{w.name}") for n, w in found]


@pytest.mark.parametrize(
    ("provider", "workload"),
    pairs([name for name in providers.OWN if not registry.PROVIDERS[name].compiles]),
)
def test_every_provider_does_the_work_of_the_float64_oracle(provider: str, workload: Any) -> None:
    reason = registry.PROVIDERS[provider].unavailable(workload)
    if reason is not None:
        pytest.skip(reason)
    assert_same_work(provider, workload)


@pytest.mark.parametrize(("provider", "workload"), pairs(["compile", "compile-chunked"]))
def test_what_is_compiled_does_the_work_too(provider: str, workload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions themselves, in chunks of 16 tokens: the compiler would take most of the tests' time."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(providers, "chunk_size", lambda workload: 16)
    assert_same_work(provider, workload)


@pytest.mark.parametrize(
    ("provider", "workload"), pairs([name for name in registry.PROVIDERS if name not in providers.OWN])
)
def test_peers_do_the_work_of_the_float64_oracle(provider: str, workload: Any) -> None:
    reason = registry.PROVIDERS[provider].unavailable(workload)
    if reason is not None:
        pytest.skip(reason)
    assert_same_work(provider, workload)


STUBBED = ("quack", "quack-lse", "liger-flce-sm90", "liger-flce-long", "liger-scaled-ce", "orda", "unsloth-jsd")


@pytest.mark.parametrize(("provider", "workload"), pairs(list(STUBBED)))
def test_adapters_call_their_package_by_its_signature(
    provider: str, workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if provider.startswith("quack") and workload.live_tokens % 8:
        pytest.skip("refused: quack takes multiples of 8 tokens")
    peer_stubs.install(monkeypatch)
    assert_same_work(provider, workload)


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in peer_stubs.STUBS.items() for n in names])
def test_the_stubs_have_the_signatures_of_the_packages(module: str, name: str) -> None:
    try:
        real, stub = getattr(importlib.import_module(module), name), peer_stubs.STUBS[module][name]
    except ImportError as error:
        pytest.skip(f"{module}: {error}")

    def parameters(of: Any) -> list[tuple[str, Any]]:
        if isinstance(of, type) and hasattr(of, "forward"):
            of = of.forward
        elif isinstance(of, type) and hasattr(of, "apply"):
            of = of.apply
        # a default that is an enumeration of the package is not compared
        found = inspect.signature(of).parameters.values()
        return [(x.name, x.kind, x.default if x.name != "rounding_mode" else None) for x in found]

    assert parameters(stub) == parameters(real)


def test_a_peer_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = bench.benchmarks_module("peers")
    monkeypatch.setattr(peers, "_installed", lambda module: module != "cutlass.cute")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = replace(QUICK["nll"], device="cuda", dtype=torch.bfloat16)

    def reason(provider: str, **changed: Any) -> str | None:
        return registry.PROVIDERS[provider].unavailable(replace(gpu, **changed))

    assert reason("liger-flce-sm90") == f"cutlass.cute is not installed: {installing.extra('bench-peers-gpu')}"
    monkeypatch.setattr(peers, "_installed", lambda module: True)
    assert reason("liger-flce-sm90") == "its kernels are for compute capability 9.0, this GPU has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert reason("liger-flce-sm90", vocab=151936, tokens=128) == "it takes a multiple of 256 entries, here are 151936"
    assert reason("liger-flce-sm90", vocab=128256, tokens=192) == "it takes a multiple of 128 tokens, here are 192"
    assert reason("liger-flce-sm90", vocab=128256, tokens=128) is None
    assert reason("liger-scaled-ce", dtype=torch.float16) == "it takes bfloat16 alone"
    assert reason("quack", dtype=torch.float32) == "it takes float16 and bfloat16 alone"
    assert reason("quack", device="cpu") == "its kernels are for a GPU"
    assert reason("quack", masked=0.5, tokens=60) == "it takes a multiple of 8 tokens, here are 30"
    assert reason("orda", device="cpu") is None


def test_peaked_logits_have_the_entropy_that_the_docstring_says() -> None:
    shape = replace(QUICK["nll"], tokens=64, hidden=(64,), vocab=4096)
    flat, peaked = (replace(shape, peaked=peaked).inputs() for peaked in (False, True))
    # log V - 9/2 of the Gaussian ones, but for the spread of the hidden states' lengths
    assert workloads.entropy(flat) == pytest.approx(8.32 - 4.5, abs=0.6)
    assert 1.0 < workloads.entropy(peaked) < 2.3
    z = (peaked.rows[0] @ peaked.weights[0].T).detach()
    assert float(-providers.logprob(z, peaked.token_ids).mean()) < 2.6  # drawn from the student


@pytest.mark.parametrize("workload", [pytest.param(w, id=w.name) for w in VARIANTS])
def test_the_oracle_is_the_package_reference_in_float64(workload: Any) -> None:
    """Written anew in the benchmarks for every job, so that peers and oracle share no code with the package."""
    inputs = workload.inputs().first(workload.tokens, torch.float64)
    truth = providers.oracle(workload, inputs)
    if workload.kind.models > 1 or workload.job == "policy":
        gopd_loss = providers.reference.gopd_loss
        result = providers.differentiated(lambda x: providers.gopd(gopd_loss, workload, x, "auto"))(inputs)
    else:
        result = registry.PROVIDERS["fused-torch"].prepare(workload)(inputs)
    # sums of a few thousand terms of like size in float64
    assert relative(masked_part(workload, inputs, result.loss), truth.loss) < 1e-11
    for gradient, exact in zip(result.gradients, truth.gradients, strict=True):
        assert relative(gradient, exact) < 1e-11


def test_the_floor_takes_the_best_of_each_kind_from_rounds_in_random_order() -> None:
    calls: list[str] = []
    cost = {"logits 512": 3.0, "logits 1024": 2.0, "dhidden 512": 1.0, "dhidden 1024": 5.0}

    def candidate(kind: str, chunk_size: int) -> Any:
        return floors.Candidate(kind, 64, chunk_size, "", lambda: calls.append(f"{kind} {chunk_size}"))

    def timed(step: Any) -> float:
        step()
        # the third round is disturbed: a median does not notice, the faster of two calls would
        return cost[calls[-1]] * (0.1 if len(calls) in (9, 11) else 1.0)

    found = [candidate(kind, c) for kind in ("logits", "dhidden") for c in (512, 1024)]
    floor = floors.pick(found, timed, seconds=0.06)
    assert len(calls) == 4 * (1 + 5)  # 60 ms hold five rounds of 11 ms after the first
    orders = [tuple(calls[i : i + 4]) for i in range(4, len(calls), 4)]
    assert all(sorted(order) == sorted(cost) for order in orders)
    assert len(set(orders)) > 1
    assert floor.name == "logits C=1024; dhidden C=512"
    assert floor.chunk_size is None
    assert floor.ms == 3.0
    assert [one["best"] for one in floor.tried] == [False, True, True, False]
    calls.clear()
    floor.step()
    assert calls == ["logits 1024", "dhidden 512"]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_floor_computes_the_products_of_a_step(frozen: bool) -> None:
    workload = replace(QUICK["hidden-full"], hidden=(32, 48, 32), tokens=40, masked=0.5, frozen=frozen)
    inputs = workload.inputs()
    found = floors.candidates(workload, [inputs], memory=8 * 4 * workload.vocab)
    kinds = [("logits", 32), ("logits", 48), ("dhidden", 32), ("dweight", 32)][: 3 if frozen else 4]
    assert list(dict.fromkeys(c.group for c in found)) == kinds
    assert {c.way for c in found} == {16}  # at least, however little memory there is

    class Count(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                a, b = args[-2:]
                self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            return function(*args, **(kwargs or {}))

    with Count() as count:
        for kind in kinds:
            next(c for c in found if c.group == kind and not c.library).step()
    products = [32, 48, 32] + [32] * (1 if frozen else 2)
    assert count.flops == sum(2 * 20 * workload.vocab * h for h in products)


def test_every_suite_tells_its_workloads_apart() -> None:
    for name, suite in workloads.SUITES.items():
        for device in ("cpu", "cuda"):
            names = [w.name for w in suite.workloads(device)]
            assert len(set(names)) == len(names) > 0, name


def test_masked_tokens_are_as_many_as_the_workload_says() -> None:
    for masked, live in ((0.0, 100), (0.5, 50), (0.9, 10)):
        workload = replace(QUICK["nll"], tokens=100, masked=masked)
        mask = workload.inputs().mask
        assert workload.live_tokens == live
        assert mask is None or int(mask.sum()) == live


def test_inputs_rotate_past_the_cache_unless_one_set_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = 10 << 20
    monkeypatch.setattr(workloads, "_last_level_cache", lambda device: cache)
    large = replace(QUICK["nll"], hidden=(1024,), vocab=151936)
    assert workloads.rotation(large) == 1
    middle = replace(QUICK["nll"], hidden=(256,), vocab=16384)
    assert workloads.rotation(middle) * middle.inputs().nbytes >= 4 * cache
    assert workloads.rotation(QUICK["nll"]) == 8  # at most: its time means nothing


# ------------------------------------------------------------------------------------------------------- end to end

PROVIDERS = "floor,fused-native,fused-torch,eager-lean,liger-jsd"
ROW = {"job", "provider", "tokens", "hidden", "vocab", "dtype", "chunk_dtype", "masked", "frozen"}
ERRORS = {"error_loss", "error_dhidden", "error_dweight"}
MEASURED = {"ms_p20", "ms_p50", "ms_p80", "gemm_ms_p50", "peak_extra_bytes"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One run through the command line: what it wrote, what it printed, and the picture."""
    folder = tmp_path_factory.mktemp("bench")
    file, picture = folder / "out" / "quick.json", folder / "quick.png"
    arguments = ["--suite", "quick", "--jobs", "reverse-kl", "--providers", PROVIDERS]
    result = runner.invoke(app, ["bench", *arguments, "--json", str(file), "--plot", str(picture)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return json.loads(file.read_text()), result.stdout, picture


def test_a_run_has_every_field_and_every_provider(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, _, _ = measured
    assert result.keys() >= {"device", "driver", "versions", "commit", "date", "rows", "skipped"}
    assert result["versions"].keys() >= {"python", "torch", "fused-gopd"}
    usable = {name for name in ("fused-native", "fused-torch") if not rowops.unavailable_reason(name[6:])}
    rows = {row["provider"]: row for row in result["rows"]}
    assert rows.keys() == usable | {"eager-lean", "four bare GEMMs"}
    for name in rows.keys() - {"four bare GEMMs"}:
        assert rows[name].keys() >= ROW | MEASURED | ERRORS
        assert rows[name]["hidden"] == [32, 32, None]
        assert rows[name]["ms_p20"] <= rows[name]["ms_p50"] <= rows[name]["ms_p80"]
        assert 0 < rows[name]["clock_ms_min"] <= rows[name]["clock_ms_p50"] <= rows[name]["clock_ms_p90"]
        assert rows[name]["gemm_ms_min"] <= rows[name]["gemm_ms_p50"] <= rows[name]["gemm_ms_p90"]
        assert 0 < rows[name]["entropy"] < math.log(512)
    tried = rows["four bare GEMMs"]["candidates"]
    assert {one["kind"] for one in tried} == {"logits", "dhidden", "dweight"}
    assert all(0 < one["ms_min"] <= one["ms_p50"] <= one["ms_p90"] for one in tried)
    assert sum(one["best"] for one in tried) == 3


def test_what_cannot_run_is_listed_with_its_reason(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, _ = measured
    (skipped,) = [row for row in result["skipped"] if row["provider"] == "liger-jsd"]
    installed = importlib.util.find_spec("liger_kernel") is not None
    assert skipped["reason"].startswith("its kernels are" if installed else "liger_kernel is not")
    assert "Liger fused linear JSD: not run" in printed


def test_tables_are_generated_from_the_file(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, _ = measured
    assert "four bare GEMMs" in printed
    page = "before\n<!-- benchmark quick.json reverse-kl -->\nstale\n<!-- /benchmark -->\nafter\n"
    filled = report.fill(page, "quick.json", result)
    assert "stale" not in filled
    assert filled.count("| four bare GEMMs") == 1
    assert report.fill(filled, "quick.json", result) == filled
    assert report.fill(page, "other.json", result) == page
    row = next(r for r in result["rows"] if r["provider"] == "eager-lean")
    assert report._ratio(row["ms_p50"], row["gemm_ms_p50"]) in filled


def test_the_plot_is_an_image(measured: tuple[dict[str, Any], str, Path]) -> None:
    assert measured[2].read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_nothing_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot({"rows": []}, tmp_path / "x.png")


def test_a_run_out_of_time_says_what_it_left_out(tmp_path: Path) -> None:
    file = tmp_path / "none.json"
    arguments = ["--suite", "quick", "--jobs", "nll", "--providers", "floor,eager-lean", "--limit", "0"]
    result = runner.invoke(app, ["bench", *arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["rows"] == []
    assert {row["reason"] for row in written["skipped"]} == {"the limit of 0 s was over"}


def test_the_page_of_gpu_kernels_is_what_its_file_says() -> None:
    kernels, root = bench.benchmarks_module("kernels"), Path(__file__).parents[2]
    file = json.loads((root / "benchmarks" / "results" / "gpu-kernels.json").read_text())
    assert kernels.markdown(file) in (root / "docs" / "gpu-kernels.md").read_text()
    last = [one for one in file["runs"] if any(name.startswith("five gemms") for name in one["ms"])][-1]
    steps = "\n".join(kernels._steps(last["ms"])).strip()
    assert steps in (root / "docs" / "performance-log.md").read_text()


def test_every_generated_table_of_a_page_is_what_its_file_says() -> None:
    root = Path(__file__).parents[2]
    found = 0
    for page in (root / "README.md", *(root / "docs").glob("**/*.md")):
        text = page.read_text()
        for name in sorted(set(re.findall(r"<!-- (?:benchmark|compact) (\S+) ", text))):
            for part in name.split(","):
                file, found = root / "benchmarks" / "results" / part, found + 1
                filled = report.fill(text, part, json.loads(file.read_text()))
                assert report.fill_compact(filled, file) == text, f"{page}: python -m benchmarks.report {file} {page}"
    assert found > 10


def test_the_page_of_today_is_short() -> None:
    assert len((Path(__file__).parents[2] / "docs" / "performance.md").read_text().splitlines()) <= 200


def test_calls_of_a_group_are_timed_in_turn() -> None:
    kernels = bench.benchmarks_module("kernels")
    calls: list[str] = []
    group = [lambda name=name: calls.append(name) for name in "abc"]
    rounds = list(kernels.timed(group, lambda: calls.append("clock"), "cpu", 4))
    assert len(rounds) == 4
    assert all(len(ms) == 3 and min(ms) >= 0 for ms, _ in rounds)
    assert calls[:6] == list("abcabc")
    orders = [tuple(calls[i : i + 4]) for i in range(6, len(calls), 4)]
    assert all(order[0] == "clock" and sorted(order[1:]) == list("abc") for order in orders)
    assert len(set(orders)) > 1


def test_on_a_gpu_a_round_is_queued_behind_the_clock_and_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, events = bench.benchmarks_module("kernels"), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append(self)

        def elapsed_time(self, stop: Any) -> float:
            return float(events.index(stop) - events.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(kernels, "synchronize", lambda device: events.append("wait"))
    rounds = list(kernels.timed([lambda: None, lambda: None], lambda: None, "cuda", 2))
    assert rounds == [([1.0, 1.0], 1.0)] * 2
    assert [e == "wait" for e in events] == ([True] + [False] * 6) * 2 + [True]


def test_a_product_with_the_other_library_puts_the_first_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, chosen = bench.benchmarks_module("kernels"), ["cublas"]

    def preferred(name: str | None = None) -> str:
        chosen.extend([name] if name else [])
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    assert kernels._with_library("cublaslt", lambda: chosen[-1])() == "cublaslt"
    with pytest.raises(ZeroDivisionError):
        kernels._with_library("cublaslt", lambda: 1 / 0)()
    assert chosen == ["cublas", "cublaslt", "cublas", "cublaslt", "cublas"]


def test_products_of_all_chunk_lengths_and_whole_steps_run_on_a_cpu() -> None:
    """The parts without Triton; the rehearsal of on_gpu.sh has the others, interpreted."""
    kernels = bench.benchmarks_module("kernels")
    shapes = kernels.TINY
    ms = {}
    for part in (kernels.products, kernels.steps):
        for group in part(shapes, False):
            for name, call in group.items():
                call()
                ms[name] = 1.0
    table = list(kernels._chunk_lengths(ms))
    assert [line.split("|")[1].strip() for line in table[3:]] == [
        "logits bf16", "logits fp32", "dhidden", "dweight add", "dweight first"
    ]  # fmt: skip
    assert "64.00 / 42.67" in table[3]
    assert "five gemms H=64" in ms


def test_host_time_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    host = bench.benchmarks_module("host")
    monkeypatch.setattr(host, "CALLS", 4)
    found = host.row(host.Case("full", "torch", 4, 8, 64, "cpu"), "cpu", profile=True)
    assert found["cpu_us"] <= found["cpu_us_p50"]
    assert found["first_us"] > 0
    assert found["python_calls"] > 100
    assert len(found["profile"]) > 10
    with pytest.raises(RuntimeError, match="no product"):
        host.microseconds_to_first(lambda: torch.ones(3) + 1)


def test_what_compiles_can_run_before_the_timed_run() -> None:
    warm = bench.benchmarks_module("warm")
    done = warm.warm(("quick",), "cpu", ("fused-torch", "liger-flce-sm90", "no such provider"))
    jobs = {w.name for w in workloads.SUITES["quick"].workloads("cpu")}
    assert sorted(done) == sorted(f"{name}-fused-torch" for name in jobs)


def test_the_gpu_session_is_within_eight_minutes_and_calls_what_exists() -> None:
    root = Path(__file__).parents[2]
    script = (root / "benchmarks" / "on_gpu.sh").read_text()
    seconds = [int(x) for x in re.findall(r"^phase \w+ (\d+) ", script, re.MULTILINE)]
    (limit,) = map(int, re.findall(r"LIMIT:-(\d+)", script))
    assert sum(seconds) <= limit <= 480
    assert len(seconds) == 10
    stated = [int(x) for x in re.findall(r"^# +(\d+)  \w", script, re.MULTILINE)]
    assert stated == seconds
    for path in re.findall(r"tests/\S+\.py", script):
        assert (root / path).is_file()
    for module in re.findall(r"-m benchmarks\.(\w+)", script):
        bench.benchmarks_module(module)
    names = re.findall(r"^(?:ours|theirs)=(\S+)$", script, re.MULTILINE)
    assert set(",".join(names).split(",")) <= {*registry.PROVIDERS, registry.FLOOR}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "cpux"], ["--suite", "expected cpu, gpu", "'cpux'"]),
        (["--providers", "eager,lige"], ["--providers", "liger-flce", "'lige'"]),
        (["--jobs", "full"], ["--jobs", "hidden-full", "'full'"]),
        (["--jobs", "hidden-full-bf16", "--suite", "quick"], ["--jobs", "'hidden-full-bf16'"]),
        (["--jobs", "jsd", "--providers", "cce", "--suite", "quick"], ["--providers", "liger-jsd", "'cce'"]),
        (["--device", "tpu"], ["--device", "cpu, cuda", "'tpu'"]),
        (["--plot", "x.png", "--no-memory"], ["--plot", "memory"]),
    ],
)
def test_bad_options_name_the_option_what_was_expected_and_what_came(arguments: list[str], said: list[str]) -> None:
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    for text in said:
        assert text in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    result = runner.invoke(app, ["bench", "--device", "cuda"])
    assert result.exit_code == 2
    assert "no GPU" in result.output


def test_a_missing_extra_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pytest_benchmark" else real(n))
    result = runner.invoke(app, ["bench"])
    assert result.exit_code == 2
    assert installing.extra("bench") in result.output


def test_a_peer_that_raises_fails_the_run_and_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory run is the first to notice; here it has no memory run, so the step itself raises."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.nn.functional as F\ndef broken(*a, **k):\n    raise RuntimeError('out of order')\n"
        "F.linear_cross_entropy = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    options = {"suite": "quick", "jobs": ("nll",), "providers": ("torch-lce",), "memory": False, "accuracy": False}
    result = run.measure(run.Options(**options).checked(), lambda name: None)
    assert not result["rows"]
    assert [row["failed"] for row in result["skipped"]] == [True, True]
    assert result["skipped"][0]["reason"] == "failed: RuntimeError: out of order"


def test_the_pages_have_the_tables_of_the_products_on_a_cpu() -> None:
    gemm, root = bench.benchmarks_module("gemm"), Path(__file__).parents[2]
    result = json.loads((root / "benchmarks" / "results" / "cpu-gemm.json").read_text(encoding="utf-8"))
    for name, text, page in (
        ("products", gemm.products_text(result), "performance-log.md"),
        ("chunks", gemm.steps_text(result), "performance.md"),
    ):
        assert f"<!-- {name} -->\n\n{text}\n<!-- /{name} -->" in (root / "docs" / page).read_text(encoding="utf-8")
