"""The cost of each option of the loss relative to the plain call of its estimator, measured in one run.

``python -m benchmarks.features [--json FILE] [--device DEVICE] [--rounds N] [--only WORD,WORD] [--tokens N]
[--vocab N] [--hidden N] [--cpu-time] [PAGE.md ...]`` prints the table and fills it in between ``<!-- features -->`` and
``<!-- /features -->`` of a page. Loss and gradients of hidden states and head, three models, the same chunk size
everywhere. Each round times the plain call and the option one after the other; the result is the median of their
ratios. ``--cpu-time`` takes the time that the process computes, on one thread: for a machine that others use.
"""

from __future__ import annotations

import argparse
import statistics
import time
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

TOKENS = {"cpu": 512, "gpu": 8192}
CHUNK = {"cpu": 256, "gpu": None}  # None: the default, which is the same for the options that hold no other buffers
SEQUENCES = 8
K = 64  # tokens a position of topk
PLAIN: dict[str, dict[str, Any]] = {"sampled": {}, "full": {"estimator": "full"}, "topk": {"estimator": "topk", "k": K}}
SECTIONS = {"vectors": "Vectors alone", "more": "Further passes over a chunk's logits, or GEMMs more or fewer"}


def options(inputs: Inputs, plain: fg.GOPDOutput) -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    """By section: estimator, name in the table and arguments; :func:`step_of` adds the second teacher."""
    n, device = inputs.token_ids.shape[0], inputs.token_ids.device
    assert plain.student_logprobs is not None
    old = plain.student_logprobs - 0.1
    bounds = torch.arange(0, n + 1, n // SEQUENCES, device=device, dtype=torch.int32)
    _, teacher, ref = heads(inputs)
    labels = inputs.token_ids.roll(1)
    # log-probs of the reference at the teacher's tokens
    ids, scores = fg.token_topk(teacher, K)
    both = {"teacher": fg.TopKLogProbs(ids, scores), "ref": fg.TopKLogProbs(ids, scores - 0.1)}
    two = {"teacher": fg.LogLinear([teacher, ref], [1.25, -0.25]), "ref": None, "reward_scale": 1.0}  # the plain target
    four = {**two, "teacher": fg.LogLinear([teacher, ref] * 2, [1.0, -0.125, 0.25, -0.125])}
    sequences = {"cu_seqlens": bounds, "reduction": "seq-mean-token-mean"}
    per_token = {"reward_scale": torch.full((n,), 1.25, device=device)}
    weights = {"token_weight": torch.linspace(0, 2, n, device=device)}
    of_entropy = {"reward_scale": 1.0, "reward_scale_fn": lambda stats: 1 + 0.25 * (stats.teacher_entropy < 1)}
    of_divergence = {"reward_scale": 1.0, "reward_scale_fn": lambda stats: 1 + (-stats.kl_teacher).exp()}
    looked_up = {"reward_scale": 1.0, "reward_scale_fn": lambda stats: per_token["reward_scale"][stats.index]}
    vectors = [
        ("sampled", "`cu_seqlens`, `seq-mean-token-mean`", sequences),
        ("sampled", "λ per token", per_token),
        ("full", "λ per token", per_token),
        ("topk", "λ per token", per_token),
        ("sampled", "`reward_scale_fn` of the teacher's entropy", of_entropy),
        ("full", "`reward_scale_fn` that reads no statistic", looked_up),
        ("topk", "`reward_scale_fn` of the teacher's entropy", of_entropy),
        ("sampled", "`token_weight`", weights),
        ("full", "`token_weight`", weights),
        ("topk", "`token_weight`", weights),
        (
            "sampled",
            "`old_logprobs`, `clip`, `clip_dual`",
            {"old_logprobs": old, "clip": (0.2, 0.28), "clip_dual": 3.0},
        ),
        ("sampled", "`rollout_logprobs`, `rollout_is_cap`", {"rollout_logprobs": old, "rollout_is_cap": 2.0}),
        ("full", "`rollout_logprobs`, `rollout_is_cap`", {"rollout_logprobs": old, "rollout_is_cap": 2.0}),
        ("topk", "`rollout_logprobs`, `rollout_is_cap`", {"rollout_logprobs": old, "rollout_is_cap": 2.0}),
        (
            "sampled",
            "`old_logprobs`, `rollout_mask` of sequences",
            {
                "old_logprobs": old,
                "rollout_logprobs": old - 0.1,
                "rollout_mask": {"geometric_ratio": (0.5, 2.0)},
                "cu_seqlens": bounds,
            },
        ),
        (
            "sampled",
            "`trust_region`",
            {"rollout_logprobs": old, "trust_region": {"token_difference": (-0.2, 0.2)}},
        ),
        ("sampled", '`ratio="detached"`', {"old_logprobs": old, "ratio": "detached", "clip": (1.0, 1.0)}),
        ("full", "`loss_max`", {"loss_max": 10.0}),
        ("sampled", "`advantage_clip`, `logprob_min`", {"advantage_clip": 5.0, "logprob_min": -20.0}),
        ("sampled", "`entropy_weight`", {"entropy_weight": 0.01}),
        ("topk", "`entropy_weight`", {"entropy_weight": 0.01}),
        ("topk", '`tail="sampled"`', {"tail": "sampled"}),
        ("topk", "`logprob_min`", {"logprob_min": -20.0}),
        ("topk", "`student_logprob_min`", {"tail": "drop", "logprob_min": -20.0, "student_logprob_min": -20.0}),
        ("topk", f"`support_ids`, K = {K}", {"k": None, "support_ids": ids}),
        ("sampled", '`kl_ref="k3"`', {"kl_ref": "k3", "kl_ref_weight": 0.05}),
        ("sampled", "`advantage_fn`", {"advantage_fn": lambda stats: stats.advantages.tanh()}),
        ("sampled", "`LogLinear` of teacher and reference", two),
        ("sampled", "two teachers", {"teacher_index": torch.arange(n, device=device) % 2}),
    ]
    more = [
        ("full", "`reward_scale_fn` of the teacher's entropy (one pass)", of_entropy),
        ("full", "`reward_scale_fn` of KL(p‖q) (one pass over two models' logits)", of_divergence),
        ("sampled", "`baseline` (all logits of a chunk together)", {"baseline": "expected"}),
        ("sampled", "`sft_labels`", {"sft_labels": labels, "sft_weight": 0.1}),
        ("full", "`entropy_weight` (a row pass)", {"entropy_weight": 0.01}),
        ("full", '`kl_ref="exact"` (a row pass)', {"kl_ref": "exact", "kl_ref_weight": 0.05}),
        ("full", "`sft_temperature` (a row pass)", {"sft_labels": labels, "sft_temperature": 2.0}),
        ("full", "`LogLinear` of teacher and reference (a buffer)", two),
        ("full", "`LogLinear` of four models (two GEMMs more)", four),
        ("full", "`Mixture` of teacher and reference", {**two, "teacher": fg.Mixture([teacher, ref], [0.5, 0.5])}),
        ("topk", f"the student's K = {K}", {"support": "student"}),
        ("topk", f"K = {K} from a server (two GEMMs fewer)", {"k": None, **both}),
        (
            "sampled",
            '`ratio="sequence"` (one GEMM more)',
            {"ratio": "sequence", "old_logprobs": old, "cu_seqlens": bounds},
        ),
        (
            "sampled",
            '`rollout_is="sequence"` without `old_logprobs` (one GEMM more)',
            {"rollout_is": "sequence", "rollout_logprobs": old, "rollout_is_cap": 2.0, "cu_seqlens": bounds},
        ),
    ]
    return {"vectors": vectors, "more": more}


def heads(inputs: Inputs) -> tuple[fg.LinearHead, ...]:
    """Student, teacher and reference."""
    assert inputs.weights is not None
    return tuple(fg.LinearHead(h, w) for h, w in zip(inputs.rows, inputs.weights, strict=True))


def step_of(inputs: Inputs, **options: Any) -> Callable[[], fg.GOPDOutput]:
    """A step with these options, which may replace ``teacher`` and ``ref``."""
    student, teacher, ref = heads(inputs)
    models = {"teacher": [teacher, ref] if "teacher_index" in options else teacher, "ref": ref}
    leaves, chunk = inputs.leaves, CHUNK["cpu" if inputs.token_ids.device.type == "cpu" else "gpu"]

    def step() -> fg.GOPDOutput:
        given = {"token_ids": inputs.token_ids, "reward_scale": 1.25, "chunk_size": chunk, **models, **options}
        out = fg.gopd_loss(student, **given)
        torch.autograd.grad(out.loss, leaves)
        return out

    return step


def cpu_milliseconds(step: Callable[[], object], device: str) -> float:
    start = time.process_time()
    step()
    return (time.process_time() - start) * 1e3


def measure(
    workload: Workload, rounds: int, only: list[str], timed: Callable[[Callable[[], object], str], float]
) -> list[dict[str, Any]]:
    inputs = workload.inputs()
    plain = {estimator: step_of(inputs, **given) for estimator, given in PLAIN.items()}
    outputs = {estimator: step() for estimator, step in plain.items()}
    rows = []
    for section, listed in options(inputs, outputs["sampled"]).items():
        for estimator, name, given in listed:
            if only and not any(word in name for word in only):
                continue
            base, step = plain[estimator], step_of(inputs, **{**PLAIN[estimator], **given})
            step()
            pairs = [(timed(base, workload.device), timed(step, workload.device)) for _ in range(rounds)]
            ratios = sorted(b / a for a, b in pairs)
            row = {"section": section, "estimator": estimator, "option": name}
            rows.append({**row, "ratio_p50": statistics.median(ratios), "ratios": ratios, "pairs_ms": pairs})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for section, title in SECTIONS.items():
        lines += [f"| {title} | estimator | median | all rounds |", "|---|---|---:|---:|"]
        for row in rows:
            if row["section"] == section:
                ends = f"{row['ratios'][0]:.2f}–{row['ratios'][-1]:.2f}"
                lines.append(f"| {row['option']} | `{row['estimator']}` | {row['ratio_p50']:.2f}× | {ends} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="options whose name has one of these words")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    args = parse(parser, "json")
    tokens = args.tokens or TOKENS["cpu" if args.device == "cpu" else "gpu"]
    if args.cpu_time:
        torch.set_num_threads(1)
    (plain,) = [w for w in SUITES["record"].workloads(args.device) if w.job == "hidden-sampled"]
    hidden = (args.hidden,) * 3 if args.hidden else plain.hidden
    workload = replace(plain, tokens=tokens, vocab=args.vocab or plain.vocab, hidden=hidden)
    timed = cpu_milliseconds if args.cpu_time else milliseconds
    rows = measure(workload, args.rounds, [word for word in args.only.split(",") if word], timed)
    where = f"N={tokens}, H={workload.hidden[0] if workload.hidden else 0}, V={workload.vocab}, float32; "
    where += device_name(args.device) + (", CPU time of one thread" if args.cpu_time else "")
    if args.json:
        write({**origin(args.device), "tokens": tokens, "cpu_time": args.cpu_time, "rows": rows}, args.json)
    publish("features", f"{table(rows)}\n{where}.\n", args.pages)


if __name__ == "__main__":
    main()
