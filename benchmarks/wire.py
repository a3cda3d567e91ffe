"""Bytes that vocabulary-parallel heads exchange, against the minimum of any exchange; and their time.

``python -m benchmarks.wire [--json FILE] [--rounds N] [PAGE.md ...]`` starts two and four ranks on this machine (gloo,
one thread each), counts every byte that a step passes to a collective, and with two ranks on two cores compares the
time of a step with that of one process with one thread. Prints the tables and fills them in between ``<!-- wire -->``
and ``<!-- /wire -->`` of a page.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import fused_gopd as fg

from .arguments import parse, publish
from .run import origin, write

TOKENS, HIDDEN, VOCAB = 2048, 576, 49152  # SmolLM2's head; several chunks on each rank
LAMBDA = 1.25
FLOAT = 4
K = 32

# name -> (options, least numbers per token that a rank needs from the others)
# sampled: the normaliser and the token's logit of each model, and the mean logit for the entropy. full: also the
# target's normaliser and the mean gap, for loss, gradient and KL, and one more mean (forward_kl) or two (jsd). topk:
# candidate ids and logits of one model, the other models' logits at the chosen ids, of each model the mass outside
# them and the token's logit, and the mean logit.
OBJECTIVES: dict[str, tuple[dict[str, Any], int]] = {
    "sampled": ({"estimator": "sampled"}, 7),
    "full": ({"estimator": "full"}, 9),
    "full, forward_kl": ({"estimator": "full", "divergence": "forward_kl"}, 10),
    "full, jsd": ({"estimator": "full", "divergence": "jsd"}, 11),
    f"topk, k={K}": ({"estimator": "topk", "k": K}, 4 * K + 3 * 2 + 1),
}


def _heads(seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, HIDDEN, generator=g) / HIDDEN**0.5
    return [(torch.randn(TOKENS, HIDDEN, generator=g) * 3, weight) for _ in range(3)]


class _Wire:
    """Replaces the collectives of a shard: counts their bytes and the time that the step waits for them."""

    def __init__(self) -> None:
        self.gathered: list[int] = []
        self.summed: list[int] = []
        self.seconds = 0.0
        self.waits = False  # whether to wait for each sum at once, without overlapping it with the weight's product
        self._gather, self._sum = fg.VocabShard.gather, fg.VocabShard.sum_

    def gather(self, shard: fg.VocabShard, mine: Tensor) -> Tensor:
        start = time.perf_counter()
        out = self._gather(shard, mine)
        self.seconds += time.perf_counter() - start
        self.gathered.append(mine.numel() * mine.element_size())
        return out

    def sum_(self, shard: fg.VocabShard, x: Tensor) -> Any:
        work = self._sum(shard, x)
        self.summed.append(x.numel() * x.element_size())
        wire = self
        if self.waits:
            work.wait()

        class Timed:
            def wait(self) -> None:
                start = time.perf_counter()
                work.wait()
                wire.seconds += time.perf_counter() - start

        return Timed()


def _worker(rounds: int, target: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    shard = fg.VocabShard.even(VOCAB)
    models = _heads(0)
    ids = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))

    def step(options: dict[str, Any], cut: fg.VocabShard | None) -> None:
        rows = slice(None) if cut is None else slice(cut.start, cut.stop)
        heads = [fg.LinearHead(h.requires_grad_(i == 0), w[rows].detach().requires_grad_(i == 0), shard=cut)
                 for i, (h, w) in enumerate(models)]  # fmt: skip
        loss = fg.gopd_loss(*heads, ids, reward_scale=LAMBDA, **options).loss
        torch.autograd.grad(loss, (heads[0].hidden, heads[0].weight))

    def timed(options: dict[str, Any], cut: fg.VocabShard | None) -> float:
        start = time.perf_counter()
        step(options, cut)
        return time.perf_counter() - start

    rows = []
    for name, (options, least) in OBJECTIVES.items():
        wire = _Wire()
        with patch.object(fg.VocabShard, "gather", lambda s, x, w=wire: w.gather(s, x)), \
             patch.object(fg.VocabShard, "sum_", lambda s, x, w=wire: w.sum_(s, x)):  # fmt: skip
            step(options, shard)
            counted = {"gathered": wire.gathered[1:], "agreement": wire.gathered[0], "summed": list(wire.summed)}
            times, shares, waiting = [], [], []
            for i in range(rounds if n == 2 else 0):
                # in alternating order, so that neither always runs first
                for wire.waits in ((False, True), (True, False))[i % 2]:
                    dist.barrier()
                    wire.seconds = 0.0
                    seconds = timed(options, shard)
                    (waiting if wire.waits else times).append(seconds)
                    if not wire.waits:
                        shares.append(wire.seconds / seconds)
        alone = []
        for _ in range(rounds if n == 2 else 0):
            dist.barrier()
            if rank == 0:  # the other rank sleeps in the barrier
                alone.append(timed(options, None))
        dist.barrier()
        chunks = len(counted["summed"])
        rows.append({
            "objective": name,
            "ranks": n,
            "chunks": chunks,
            "collectives_per_chunk": (len(counted["gathered"]) + chunks) / chunks,
            "agreement_bytes": counted["agreement"],
            "statistics_bytes_per_token": sum(counted["gathered"]) / TOKENS,
            "least_statistics_bytes_per_token": least * FLOAT,
            "hidden_gradient_bytes_per_token": sum(counted["summed"]) / TOKENS,
            "step_ms": [1000 * x for x in times],
            "one_process_ms": [1000 * x for x in alone],
            "share_in_collectives": shares,
            "step_ms_without_overlap": [1000 * x for x in waiting],
        })  # fmt: skip
    if rank == 0:
        target.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _launch(n: int, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "benchmarks.wire"]
        subprocess.run([*command, "--worker", str(target), "--rounds", str(rounds)], check=True, env=environment)
        rows: list[dict[str, Any]] = json.loads(target.read_text())
        return rows


def received(row: dict[str, Any], statistics_bytes: float) -> float:
    """Bytes that a rank receives per token: from all other ranks in an all-gather, 2 (n-1)/n in a ring's all-reduce."""
    n = row["ranks"]
    return statistics_bytes * (n - 1) + row["hidden_gradient_bytes_per_token"] * 2 * (n - 1) / n


def tables(rows: list[dict[str, Any]]) -> str:
    head = [
        "",
        "ranks",
        "collectives a chunk",
        "statistics",
        "least",
        "gradient of hidden",
        "received, all",
        "to the least",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * 7 + "|"]
    for r in rows:
        own, least = r["statistics_bytes_per_token"], r["least_statistics_bytes_per_token"]
        cells = [f"`{r['objective']}`", str(r["ranks"]), f"{r['collectives_per_chunk']:g}", f"{own:g}", str(least)]
        total = received(r, own)
        cells += [f"{r['hidden_gradient_bytes_per_token']:g}", f"{total:g}", f"{total / received(r, least):.2f}×"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| two ranks of one core | step, ms | one process of one core | ratio | in collectives | without overlap |",
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for r in rows:
        if r["step_ms"]:
            step, alone = (statistics.median(r[name]) for name in ("step_ms", "one_process_ms"))
            cells = [f"`{r['objective']}`", f"{step:.0f}", f"{alone:.0f}", f"{step / alone:.2f}×"]
            # ratios of consecutive runs; the mean over both orders cancels the effect of running second
            waited = [b / a for a, b in zip(r["step_ms"], r["step_ms_without_overlap"], strict=True)]
            both = statistics.geometric_mean(statistics.median(waited[i::2]) for i in range(2))
            cells += [f"{statistics.median(r['share_in_collectives']):.1%}", f"{both:.2f}×"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def text(result: dict[str, Any]) -> str:
    shape = f"N={result['tokens']}, H={result['hidden']}, V={result['vocab']}, three models, {result['dtype']}, gloo"
    return f"{tables(result['rows'])}\nBytes per token and rank; {shape}; {result['device']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parse(parser, "json")
    if args.worker:
        _worker(args.rounds, args.worker)
        return
    rows = [row for n in (2, 4) for row in _launch(n, args.rounds)]
    shape = {"tokens": TOKENS, "hidden": HIDDEN, "vocab": VOCAB, "dtype": "float32"}
    result = {**origin("cpu"), **shape, "rows": rows}
    if args.json:
        write(result, args.json)
    publish("wire", text(result), args.pages)


if __name__ == "__main__":
    main()
