"""What ``grad_filter`` saves and costs on a real model's logits, in one run.

``python -m benchmarks.sparsity [--json FILE] [--rounds N] [PAGE.md ...]`` prints the table and fills it in between
``<!-- sparsity -->`` and ``<!-- /sparsity -->`` of a page. The demo's set-up: SmolLM2-135M answers questions, the
teacher is the same model with a system prompt of its own, the reference the student before training. Needs the demo's
packages and its model (see the README). Random logits would say nothing: theirs are spread over the whole vocabulary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg

from .conftest import milliseconds
from .run import _commit, device_name

FILTERS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
ANSWER_TOKENS = 48
ESTIMATORS = ("sampled", "full")
SEED = 0


def problem() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Hidden states (N, H) of the three models on the student's own tokens, the head they share, the tokens."""
    from fused_gopd.cli.demo import _hidden_states, smollm
    from fused_gopd.cli.demo.policy import Network
    from fused_gopd.cli.demo.prompts import TRAIN_QUESTIONS, encode

    smollm.require_packages()
    model, tokenizer = smollm.load()
    network = Network(model)
    prompts = encode(tokenizer, TRAIN_QUESTIONS)
    states, ids = _hidden_states(network, prompts, ANSWER_TOKENS, tokenizer.eos_token_id, SEED)
    return states, network.head_weight.detach(), ids


def _relative(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def measure(rounds: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    states, weight, ids = problem()
    hidden, weight = states["student"].clone().requires_grad_(), weight.clone().requires_grad_()
    student, teacher, ref = (
        fg.LinearHead(h, w)
        for h, w in zip(
            (hidden, states["teacher"], states["ref"]), (weight, weight.detach(), weight.detach()), strict=True
        )
    )
    rows = []
    for estimator in ESTIMATORS:

        def step(smallest: float, estimator: Any = estimator) -> tuple[Tensor, ...]:
            out = fg.gopd_loss(student, teacher, ref, ids, reward_scale=1.25, estimator=estimator, grad_filter=smallest)
            return torch.autograd.grad(out.loss, (hidden, weight))

        dhidden, dweight = step(0.0)
        for smallest in FILTERS:
            rows_gradient, weight_gradient = step(smallest)
            pairs = [
                (milliseconds(lambda: step(0.0), "cpu"), milliseconds(lambda s=smallest: step(s), "cpu"))
                for _ in range(rounds)
            ]
            ratios = sorted(b / a for a, b in pairs)
            row = {
                "estimator": estimator,
                "grad_filter": smallest,
                "ratio_p50": statistics.median(ratios),
                "ratios": ratios,
                "pairs_ms": pairs,
                "kept": float((weight_gradient != 0).any(1).float().mean()),
                "error_dhidden": _relative(rows_gradient, dhidden),
                "error_dweight": _relative(weight_gradient, dweight),
            }
            rows.append(row)
    return rows, {"tokens": hidden.shape[0], "hidden": hidden.shape[1], "vocab": weight.shape[0]}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | `grad_filter` | entries kept in any chunk | time to 0, median | all | error dhidden | error dweight |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for r in rows:
        errors = (f"{r[name]:.0e}" for name in ("error_dhidden", "error_dweight"))
        rounds = f"{r['ratios'][0]:.2f}–{r['ratios'][-1]:.2f}"
        cells = (
            f"`{r['estimator']}`",
            f"{r['grad_filter']:g}",
            f"{r['kept']:.1%}",
            f"{r['ratio_p50']:.2f}×",
            rounds,
            *errors,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows, shape = measure(args.rounds)
    where = f"SmolLM2-135M, N={shape['tokens']}, H={shape['hidden']}, V={shape['vocab']}, float32; {device_name('cpu')}"
    if args.json:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        result = {"device": device_name("cpu"), "commit": _commit(), "date": date, **shape, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    text = f"{table(rows)}\n{where}.\n"
    print(text)
    region = re.compile(r"(<!-- sparsity -->\n).*?(<!-- /sparsity -->)", re.DOTALL)
    for page in args.pages:
        page.write_text(region.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
