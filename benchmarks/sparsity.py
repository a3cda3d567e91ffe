"""Time and error of ``grad_filter`` on a real model's logits.

``python -m benchmarks.sparsity [--json FILE] [--rounds N] [PAGE.md ...]`` prints the table and fills it in between
``<!-- sparsity -->`` and ``<!-- /sparsity -->`` of a page. The set-up is the demo's: SmolLM2-135M answers questions,
the teacher is the same model with another system prompt, the reference the student before training. Needs the demo's
packages and its model (see the README). Random logits are no substitute: their mass is spread over the vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg
from fused_gopd.loop import gemm

from .arguments import parse, publish
from .conftest import milliseconds
from .run import device_name, origin, write

FILTERS = (1e-6, 1e-5, 1e-4, 1e-3)
CHUNKS = (None, 128)  # the default, and shorter chunks, in which more entries are negligible
ANSWER_TOKENS = 48
ESTIMATORS = ("sampled", "full")
SEED = 0


def problem() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Hidden states (N, H) of the three models on the student's own tokens, the head they share, the tokens."""
    from fused_gopd.cli.demo import smollm
    from fused_gopd.cli.demo.held_out import ask
    from fused_gopd.cli.demo.prompts import TRAIN_QUESTIONS

    smollm.require_packages()
    model, tokenizer = smollm.load()
    scored = ask(model, tokenizer, TRAIN_QUESTIONS, ANSWER_TOKENS, SEED)
    # before training the student is the reference
    models = {"student": scored.ref, "teacher": scored.teacher, "ref": scored.ref}
    states = {name: head.hidden[scored.mask] for name, head in models.items()}
    return states, scored.ref.weight.detach(), scored.token_ids[scored.mask]


def _relative(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _kept(step: Callable[[], object]) -> float:
    """Mean share of the vocabulary in the gradient GEMMs of the chunks of one step."""
    shares = []
    selected = gemm.selected

    def recording(dlogits: Tensor, smallest: float) -> Tensor | None:
        columns = selected(dlogits, smallest)
        shares.append(1.0 if columns is None else columns.shape[0] / dlogits.shape[1])
        return columns

    with unittest.mock.patch.object(gemm, "selected", recording):
        step()
    return statistics.mean(shares)


def _above(hidden: Tensor, weight: Tensor, smallest: float) -> float:
    """Mean share of the vocabulary with a probability of at least ``smallest`` at a token."""
    counts = [((h @ weight.T).softmax(-1) >= smallest).float().mean() for h in hidden.split(64)]
    return float(torch.stack(counts).mean())


def measure(rounds: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    states, weight, ids = problem()
    hidden, weight = states["student"].clone().requires_grad_(), weight.clone().requires_grad_()
    teacher, ref = (fg.LinearHead(states[name], weight.detach()) for name in ("teacher", "ref"))
    student = fg.LinearHead(hidden, weight)
    rows = []
    for estimator in ESTIMATORS:

        def step(smallest: float, chunk: int | None, estimator: Any = estimator) -> tuple[Tensor, ...]:
            options: dict[str, Any] = {"grad_filter": smallest, "chunk_size": chunk, "estimator": estimator}
            out = fg.gopd_loss(student, teacher, ref, ids, reward_scale=1.25, **options)
            return torch.autograd.grad(out.loss, (hidden, weight))

        plain = functools.partial(step, 0.0, None)
        exact = plain()
        for chunk, smallest in itertools.product(CHUNKS, FILTERS):
            filtered = functools.partial(step, smallest, chunk)
            found = filtered()
            pairs = [(milliseconds(plain, "cpu"), milliseconds(filtered, "cpu")) for _ in range(rounds)]
            ratios = sorted(b / a for a, b in pairs)
            row = {
                "estimator": estimator,
                "chunk_size": chunk,
                "grad_filter": smallest,
                "above_at_one_token": _above(hidden.detach(), weight.detach(), smallest),
                "kept": _kept(filtered),
                "ratio_p50": statistics.median(ratios),
                "ratios": ratios,
                "pairs_ms": pairs,
                "error_dhidden": _relative(found[0], exact[0]),
                "error_dweight": _relative(found[1], exact[1]),
            }
            rows.append(row)
    return rows, {"tokens": hidden.shape[0], "hidden": hidden.shape[1], "vocab": weight.shape[0]}


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "",
        "`chunk_size`",
        "`grad_filter`",
        "of the vocabulary: p above it at one token",
        "kept",
        "time",
        "all rounds",
    ]
    lines = ["| " + " | ".join([*head, "error dhidden", "error dweight"]) + " |", "|---" + "|---:" * 8 + "|"]
    for r in rows:
        cells = [f"`{r['estimator']}`", str(r["chunk_size"] or "default"), f"{r['grad_filter']:g}"]
        cells += [f"{r['above_at_one_token']:.1%}", f"{r['kept']:.0%}", f"{r['ratio_p50']:.2f}×"]
        cells += [f"{r['ratios'][0]:.2f}–{r['ratios'][-1]:.2f}"]
        cells += [f"{r[name]:.0e}" for name in ("error_dhidden", "error_dweight")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parse(parser, "json")
    rows, shape = measure(args.rounds)
    where = f"SmolLM2-135M, N={shape['tokens']}, H={shape['hidden']}, V={shape['vocab']}, float32; {device_name('cpu')}"
    if args.json:
        write({**origin("cpu"), **shape, "rows": rows}, args.json)
    publish("sparsity", f"{table(rows)}\n{where}.\n", args.pages)


if __name__ == "__main__":
    main()
