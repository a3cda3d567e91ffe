"""Products of a head on a CPU by library, and ``full`` from hidden states by chunk size to its five bare products.

    python -m benchmarks.gemm --json RESULTS.json [PAGE.md ...]      measure what is not in the file, fill the pages
    python -m benchmarks.gemm --report RESULTS.json [PAGE.md ...]    from the file alone

The pages' regions are ``<!-- products -->`` and ``<!-- chunks -->``.

The choice of a library in ``loop/gemm.py`` and the CPU's budget in ``loop/chunking.py`` rest on it. One thread and CPU
time: what else runs on the machine takes no time from a measurement, but shares caches and memory with it. What is
compared runs in turn in one process; each instruction set has a process of its own. A figure is of the fastest round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fused_gopd as fg
from fused_gopd.loop import gemm

from . import run
from .arguments import publish
from .report import provenance
from .workloads import VOCAB_SIZE

ROWS = (16, 32, 64, 128, 256, 512)
HIDDEN = (256, 1024, 4096)
WEIGHT_ELEMENTS = 1 << 24  # of every weight, 64 MiB of float32: more than a last-level cache
# MKL has no such switch on AMD's processors: MKL_ENABLE_INSTRUCTIONS changes nothing there.
INSTRUCTION_SETS = {"all": {}, "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
LIBRARIES = {"mkl": False, "onednn": True}
TOKENS, STEP_HIDDEN = 512, 1024
CHUNK_SIZES = (144, 256, 512)

Step = Callable[[], object]


def _in_turn(calls: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of every call in every round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(1 + rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if i:
                seconds[name].append(time.process_time() - start)
    return seconds


def _with_library(onednn: bool, product: Step) -> Step:
    def call() -> None:
        # below 64 rows the weight's gradient would go to MKL whatever is asked
        with (
            unittest.mock.patch.object(gemm, "_libraries", return_value=gemm.Libraries(onednn, onednn)),
            unittest.mock.patch.object(gemm, "_ONEDNN_DWEIGHT_ROWS", 0),
        ):
            product()

    return call


def products(rounds: int) -> list[dict[str, Any]]:
    """Every product with each of the libraries, in float32 and with a bfloat16 weight."""
    rows = []
    for H, dtype in itertools.product(HIDDEN, (torch.float32, torch.bfloat16)):
        V = WEIGHT_ELEMENTS // H
        weight, total = torch.randn(V, H).mul_(H**-0.5).to(dtype), torch.zeros(V, H)
        for C in ROWS:
            hidden, logits, dlogits = torch.randn(C, H).to(dtype), torch.empty(C, V), torch.randn(C, V)
            calls: dict[str, Step] = {
                "logits": lambda z=logits, h=hidden, w=weight: gemm.logits_into(z, w)(h),
                "dhidden": lambda g=dlogits, w=weight: gemm.dhidden(g, w),
            }
            if dtype == torch.float32:  # with bfloat16 the same, but for hidden states that are widened
                calls["dweight"] = lambda t=total, g=dlogits, h=hidden: gemm.add_dweight_(t, g.T, h)
            for name, call in calls.items():
                found = _in_turn({key: _with_library(x, call) for key, x in LIBRARIES.items()}, rounds)
                work = 2 * C * V * H / 1e9
                rates = {key: [round(work / f(x), 1) for f in (min, median)] for key, x in found.items()}
                row = {"dtype": str(dtype).removeprefix("torch."), "hidden": H, "rows": C, "product": name}
                rows.append(row | {f"{key}_gflops": rate for key, rate in rates.items()})
    return rows


def steps(rounds: int) -> list[dict[str, Any]]:
    """``full`` with chunks of several sizes, and its five products in one chunk of all tokens."""
    shape = (VOCAB_SIZE, STEP_HIDDEN)
    hidden = [torch.randn(TOKENS, STEP_HIDDEN) for _ in range(3)]
    weights = [torch.randn(shape).mul_(3 * STEP_HIDDEN**-0.5) for _ in range(3)]
    logits, total, out = torch.zeros(TOKENS, VOCAB_SIZE), torch.zeros(shape), torch.zeros(TOKENS, STEP_HIDDEN)
    student = [hidden[0].clone().requires_grad_(), weights[0].detach().requires_grad_()]
    ids = torch.randint(VOCAB_SIZE, (TOKENS,))

    def bare() -> None:
        with torch.no_grad():
            for h, w in reversed(list(zip(hidden, weights, strict=True))):
                gemm.logits_into(logits, w)(h)
            gemm.dhidden(logits, weights[0], out)
            gemm.add_dweight_(total, logits.T, hidden[0], first=True)

    def step(chunk_size: int | None) -> None:
        heads = [fg.LinearHead(*pair) for pair in zip(hidden[1:], weights[1:], strict=True)]
        call: dict[str, Any] = {"estimator": "full", "reward_scale": 1.25, "chunk_size": chunk_size}
        torch.autograd.grad(fg.gopd_loss(fg.LinearHead(*student), *heads, ids, **call).loss, student)

    calls: dict[str, Step] = {"five products, one chunk": bare, "full, default": lambda: step(None)}
    calls |= {f"full, chunk_size={C}": (lambda C=C: step(C)) for C in CHUNK_SIZES}
    found = _in_turn(calls, rounds)
    return [{"step": name, "seconds": [round(x, 4) for x in seconds]} for name, seconds in found.items()]


def _worker(what: str, rounds: int, target: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = {"products": products, "steps": steps}[what](rounds)
    target.write_text(json.dumps(made), encoding="utf-8")


def _launch(what: str, rounds: int, target: Path, variables: dict[str, str]) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gemm",
        "--worker",
        what,
        "--rounds",
        str(rounds),
        "--json",
        str(target),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **variables})
    return json.loads(target.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def measure(rounds: int, path: Path) -> dict[str, Any]:
    """What the file does not have yet, with where it comes from."""
    torch.set_num_threads(1)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    part = path.with_suffix(".part")
    jobs = {f"products, {name}": ("products", variables) for name, variables in INSTRUCTION_SETS.items()}
    for name, (what, variables) in {**jobs, "steps": ("steps", run.ALLOCATOR)}.items():
        if name not in result:
            found = _launch(what, rounds, part, variables)
            result[name] = {**run.origin("cpu"), "versions": run.package_versions(), "rows": found}
            run.write(result, path)
            part.unlink()
    return result


def _rate(rows: list[dict[str, Any]], dtype: str, H: int, C: int, product: str) -> str:
    (row,) = [x for x in rows if (x["dtype"], x["hidden"], x["rows"], x["product"]) == (dtype, H, C, product)]
    return f"{row['onednn_gflops'][0]:.0f} / {row['mkl_gflops'][0]:.0f}"


def products_text(result: dict[str, Any]) -> str:
    lines = []
    for name in INSTRUCTION_SETS:
        part = result[f"products, {name}"]
        limit = "" if name == "all" else f", oneDNN limited to {name}"
        lines += [f"GFLOP/s on one core, oneDNN / MKL{limit}:", ""]
        lines += ["|  | " + " | ".join(f"C={C}" for C in ROWS) + " |", "|---|" + "---:|" * len(ROWS)]
        wanted = [("float32", "logits"), ("float32", "dhidden"), ("float32", "dweight")]
        wanted += [("bfloat16", "logits"), ("bfloat16", "dhidden")]
        for (dtype, product), H in itertools.product(wanted, HIDDEN):
            shown = f"`{product}`, H={H}" + (", bfloat16 weight" if dtype == "bfloat16" else "")
            lines.append(f"| {shown} | " + " | ".join(_rate(part["rows"], dtype, H, C, product) for C in ROWS) + " |")
        lines += ["", provenance(part), ""]
    return "\n".join(lines)


def steps_text(result: dict[str, Any]) -> str:
    part = result["steps"]
    floor = part["rows"][0]["seconds"]
    lines = [
        f"N={TOKENS}, H={STEP_HIDDEN}, V={VOCAB_SIZE}, float32, one core, freed memory kept by the allocator:",
        "",
        "|  | s of CPU time, fastest | median | ratio of the fastest | median ratio of a round |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in part["rows"]:
        seconds = row["seconds"]
        ratio = median(x / y for x, y in zip(seconds, floor, strict=True))
        figures = f"{min(seconds):.2f} | {median(seconds):.2f} | {min(seconds) / min(floor):.3f} | {ratio:.3f}"
        lines.append(f"| {row['step']} | {figures} |")
    return "\n".join([*lines, "", provenance(part), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=("products", "steps"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _worker(args.worker, args.rounds, args.json)
        return
    result = json.loads(args.report.read_text(encoding="utf-8")) if args.report else measure(args.rounds, args.json)
    publish("products", products_text(result), args.pages)
    publish("chunks", steps_text(result), args.pages)


if __name__ == "__main__":
    main()
