"""Cross entropy of labels from hidden states: ``linear_nll`` beside what else computes it, measured in one run.

``python -m benchmarks.sft [--json FILE] [--rounds N] [--tokens N] [PAGE.md ...]`` prints the table and fills it in
between ``<!-- sft -->`` and ``<!-- /sft -->`` of a page. On a CPU: loss and gradients of hidden states and weight at
the head of SmolLM2-135M, float32. Each round takes all of them in turn; the times are those that the process computes,
on one thread, so that others may use the machine. tests/cli/test_benchmarks.py compares what each returns with float64.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fused_gopd as fg

from .arguments import parse, publish
from .registry import PROVIDERS
from .report import NAMES
from .run import device_name, origin, write
from .workloads import SUITES, Inputs, Workload

OWN = "`fg.linear_nll`"
NAMED = NAMES | {
    "fused-native-one-pass": OWN,
    "fused-torch-one-pass": f'{OWN}, `backend="torch"`',
    "fused-native": "`-fg.token_logprobs(...)`, whose backward computes the logits again",
    "fused-torch": '`-fg.token_logprobs(...)`, `backend="torch"`',
}
OPTIONS: dict[str, dict[str, Any]] = {
    f"{OWN}, `label_smoothing=0.1`": {"label_smoothing": 0.1},
    f"{OWN}, `z_loss=1e-4`": {"z_loss": 1e-4},
    f"{OWN}, both": {"label_smoothing": 0.1, "z_loss": 1e-4},
}


def with_options(options: dict[str, Any]) -> Callable[[Inputs], object]:
    def run(inputs: Inputs) -> object:
        assert inputs.weights is not None
        head = fg.LinearHead(inputs.rows[0], inputs.weights[0])
        return torch.autograd.grad(fg.linear_nll(head, inputs.token_ids, **options), inputs.leaves)

    return run


def candidates(workload: Workload) -> tuple[dict[str, Callable[[Inputs], object]], dict[str, str]]:
    """What can run, and why the others cannot."""
    found, missing = {}, {}
    for name, provider in PROVIDERS.items():
        if "nll" not in provider.jobs:
            continue
        reason = provider.unavailable(workload)
        if reason is None:
            found[NAMED.get(name, name)] = provider.prepare(workload)
        else:
            missing[NAMED.get(name, name)] = reason
    return found | {name: with_options(options) for name, options in OPTIONS.items()}, missing


def measure(workload: Workload, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    inputs = workload.inputs()
    steps, missing = candidates(workload)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in list(steps.items()):
        try:
            step(inputs)
            step(inputs)
        except Exception as error:  # a peer that does not run here
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del steps[name], times[name]
    for _, (name, step) in itertools.product(range(rounds), steps.items()):
        start = time.process_time()
        step(inputs)
        times[name].append((time.process_time() - start) * 1e3)
    return [{"name": name, "ms": ms, "ms_min": min(ms)} for name, ms in times.items()], missing


def table(rows: list[dict[str, Any]]) -> str:
    least = {row["name"]: row["ms_min"] for row in rows}
    own = least[OWN]
    lines = ["| | CPU time, ms | to `linear_nll` |", "|---|---:|---:|"]
    lines += [f"| {name} | {ms:.0f} | {ms / own:.2f}× |" for name, ms in sorted(least.items(), key=lambda x: x[1])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    args = parse(parser, "json")
    torch.set_num_threads(1)
    (workload,) = [w for w in SUITES["cpu"].workloads("cpu") if w.job == "nll"]
    workload = replace(workload, tokens=args.tokens)
    rows, missing = measure(workload, args.rounds)
    where = f"N={workload.tokens}, H={workload.hidden[0] if workload.hidden else 0}, V={workload.vocab}, float32; "
    if args.json:
        write({**origin("cpu"), "tokens": workload.tokens, "rows": rows, "missing": sorted(missing)}, args.json)
    publish("sft", f"{table(rows)}\n{where}{device_name('cpu')}, one thread, the least of {args.rounds}.\n", args.pages)
    for name, reason in missing.items():
        print(f"{name}: {reason}")


if __name__ == "__main__":
    main()
