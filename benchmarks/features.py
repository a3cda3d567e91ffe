"""The cost of each option of the loss relative to the plain call, measured in one run.

``python -m benchmarks.features [--json FILE] [--device DEVICE] [--rounds N] [PAGE.md ...]`` prints the table and fills
it in between ``<!-- features -->`` and ``<!-- /features -->`` of a page. Loss and gradients of hidden states and head,
``sampled``, three models. Each round times the plain call and the option one after the other; the result is the median
of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fused_gopd as fg

from .arguments import parse, publish
from .conftest import milliseconds
from .run import device_name, origin, write
from .workloads import SUITES, Inputs, Workload

TOKENS = {"cpu": 1024, "gpu": 8192}
SEQUENCES = 8
K = 64  # tokens a position of topk


def options(inputs: Inputs, plain: fg.GOPDOutput) -> dict[str, dict[str, Any]]:
    """Keyword arguments by their name in the table; :func:`step_of` adds the second teacher."""
    n, device = inputs.token_ids.shape[0], inputs.token_ids.device
    old = plain.student_logprobs - 0.1
    bounds = torch.arange(0, n + 1, n // SEQUENCES, device=device, dtype=torch.int32)
    teacher = heads(inputs)[1]
    labels = inputs.token_ids.roll(1)
    # log-probs of the reference at the teacher's tokens
    ids, scores = fg.token_topk(teacher, K)
    both = {"teacher": fg.TopKLogProbs(ids, scores), "ref": fg.TopKLogProbs(ids, scores - 0.1)}
    top = {"estimator": "topk"}
    return {
        "`cu_seqlens`, `seq-mean-token-mean`": {"cu_seqlens": bounds, "reduction": "seq-mean-token-mean"},
        "λ per token": {"reward_scale": torch.full((n,), 1.25, device=device)},
        "`old_logprobs`, `clip`, `clip_dual`": {"old_logprobs": old, "clip": (0.2, 0.28), "clip_dual": 3.0},
        "`rollout_logprobs`, `rollout_is_cap`": {"rollout_logprobs": old, "rollout_is_cap": 2.0},
        "`advantage_clip`, `logprob_min`": {"advantage_clip": 5.0, "logprob_min": -20.0},
        "`advantage_fn`": {"advantage_fn": lambda stats: stats.advantages.tanh()},
        "`baseline` (all logits of a chunk together)": {"baseline": "expected"},
        "`sft_labels`": {"sft_labels": labels, "sft_weight": 0.1},
        f"`topk` of heads, K = {K}": {**top, "k": K},
        f"`topk`, the student's K = {K}": {**top, "k": K, "support": "student"},
        f"`topk`, K = {K} from a server (two GEMMs fewer)": {**top, **both},
        "two teachers": {"teacher_index": torch.arange(n, device=device) % 2},
        '`ratio="sequence"` (one GEMM more)': {"ratio": "sequence", "old_logprobs": old, "cu_seqlens": bounds},
    }


def heads(inputs: Inputs) -> tuple[fg.LinearHead, ...]:
    """Student, teacher and reference."""
    assert inputs.weights is not None
    return tuple(fg.LinearHead(h, w) for h, w in zip(inputs.rows, inputs.weights, strict=True))


def step_of(inputs: Inputs, **options: Any) -> Callable[[], fg.GOPDOutput]:
    """A step with these options, which may replace ``teacher`` and ``ref``."""
    student, teacher, ref = heads(inputs)
    models = {"teacher": [teacher, ref] if "teacher_index" in options else teacher, "ref": ref}
    leaves = inputs.leaves

    def step() -> fg.GOPDOutput:
        given = {"token_ids": inputs.token_ids, "reward_scale": 1.25, **models, **options}
        out = fg.gopd_loss(student, **given)
        torch.autograd.grad(out.loss, leaves)
        return out

    return step


def measure(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    inputs = workload.inputs()
    plain = step_of(inputs)
    rows = []
    for name, given in options(inputs, plain()).items():
        step = step_of(inputs, **given)
        step()
        pairs = [(milliseconds(plain, workload.device), milliseconds(step, workload.device)) for _ in range(rounds)]
        ratios = sorted(b / a for a, b in pairs)
        rows.append({"option": name, "ratio_p50": statistics.median(ratios), "ratios": ratios, "pairs_ms": pairs})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| option | time to the plain call's, median | all rounds |", "|---|---:|---:|"]
    lines += [f"| {r['option']} | {r['ratio_p50']:.2f}× | {r['ratios'][0]:.2f}–{r['ratios'][-1]:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parse(parser, "json")
    tokens = TOKENS["cpu" if args.device == "cpu" else "gpu"]
    (plain,) = [w for w in SUITES["record"].workloads(args.device) if w.job == "hidden-sampled"]
    workload = replace(plain, tokens=tokens)
    rows = measure(workload, args.rounds)
    where = f"N={tokens}, H={workload.hidden[0] if workload.hidden else 0}, V={workload.vocab}, float32; "
    where += device_name(args.device)
    if args.json:
        write({**origin(args.device), "tokens": tokens, "rows": rows}, args.json)
    publish("features", f"{table(rows)}\n{where}.\n", args.pages)


if __name__ == "__main__":
    main()
