"""Host time of a call and of each further chunk, of two versions of the package in one run, timed in turn.

    pip install --no-deps --target OLD git+...@COMMIT
    python -m benchmarks.host_versions OLD src docs/performance-log.md --json RESULTS.json

Forward and backward (log-probs: forward alone) of 8 tokens, H = 8 and V = 64 on the ``native`` backend, one thread:
nothing but what the host does. Each version has a process of its own. They are asked for one case after the other, in
rounds, and the smallest thread time of all rounds counts. A further chunk is a third of what four chunks take longer
than one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, H, V = 8, 8, 64
ROUNDS, CALLS, WARMUP = 40, 60, 20
CHUNKS = (1, 4)
ESTIMATORS = ("sampled", "sampled, clipped", "full")
CASES = [*(f"{name}/{chunks}" for name in ESTIMATORS for chunks in CHUNKS), "token_logprobs/1"]


def _cases() -> dict[str, Callable[[], Any]]:
    """What is timed, by name, with the package that is first on the path."""
    import torch

    import fused_gopd as fg

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    heads = [
        fg.LinearHead(torch.randn(TOKENS, H, generator=g), torch.randn(V, H, generator=g).requires_grad_(not i))
        for i in range(3)
    ]
    leaves = [heads[0].hidden.requires_grad_(), heads[0].weight]
    ids = torch.randint(V, (TOKENS,), generator=g)
    old = fg.token_logprobs(heads[0], ids).detach()
    options: dict[str, dict[str, Any]] = {
        "sampled": {},
        "sampled, clipped": {"old_logprobs": old, "clip": (0.2, 0.2)},
        "full": {"estimator": "full"},
    }

    def step(name: str, chunks: int) -> None:
        size = TOKENS // chunks
        out = fg.gopd_loss(*heads, ids, reward_scale=1.25, backend="native", chunk_size=size, **options[name])
        torch.autograd.grad(out.loss, leaves)

    def logprobs() -> None:
        with torch.no_grad():
            fg.token_logprobs(heads[0], ids, backend="native")

    calls: dict[str, Callable[[], Any]] = {"token_logprobs/1": logprobs}
    for name in ESTIMATORS:
        for chunks in CHUNKS:
            calls[f"{name}/{chunks}"] = lambda name=name, chunks=chunks: step(name, chunks)
    return calls


def answer() -> None:
    """Time the cases whose names come in, one a line: thread time in us, the smallest of some calls."""
    cases = _cases()
    for call in cases.values():
        for _ in range(WARMUP):
            call()
    print("ready", flush=True)
    for line in sys.stdin:
        call, best = cases[line.strip()], float("inf")
        for _ in range(CALLS):
            start = time.thread_time()
            call()
            best = min(best, time.thread_time() - start)
        print(1e6 * best, flush=True)


class Version:
    """A process with one version of the package."""

    def __init__(self, folder: str) -> None:
        path = str(Path(folder).resolve())
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--answer"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.best = dict.fromkeys(CASES, float("inf"))
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a version could not be timed; its error is above")
        return line

    def time(self, case: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        self.best[case] = min(self.best[case], float(self._line()))

    def row(self) -> dict[str, float]:
        row = {"token_logprobs, call": self.best["token_logprobs/1"]}
        for name in ESTIMATORS:
            one, four = (self.best[f"{name}/{chunks}"] for chunks in CHUNKS)
            row |= {f"{name}, call": one, f"{name}, further chunk": (four - one) / 3}
        return {name: round(value, 1) for name, value in row.items()}


def main() -> None:
    from .arguments import parse, publish
    from .run import write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs=2, metavar="FOLDER", help="where fused_gopd is: the old one, the new one")
    parser.add_argument("pages", nargs="*", type=Path, help="pages whose region <!-- host --> takes the table")
    parser.add_argument("--json", type=Path)
    args = parse(parser, "json")
    old, new = versions = [Version(folder) for folder in args.versions]
    for _ in range(ROUNDS):
        for case in CASES:
            for version in versions:
                version.time(case)
    rows = {
        name: {"old_us": before, "new_us": after, "ratio": round(after / before, 3)}
        for (name, before), after in zip(old.row().items(), new.row().values(), strict=True)
    }
    lines = ["| us | before | now | ratio |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {r['old_us']:.0f} | {r['new_us']:.0f} | {r['ratio']:.2f} |" for name, r in rows.items()]
    publish("host", "\n".join(["", *lines, ""]), args.pages)
    if args.json is not None:
        write(rows, args.json)


if __name__ == "__main__":
    answer() if sys.argv[1:] == ["--answer"] else main()
