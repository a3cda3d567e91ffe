"""Variance of the sampled gradient, with and without the baseline, and with K tokens taken exactly, by enumeration.

``python -m benchmarks.variance [--json FILE] [PAGE.md ...]`` prints the tables and fills them in between
``<!-- variance -->`` and ``<!-- /variance -->``, ``<!-- variance-topk -->`` and ``<!-- /variance-topk -->``. At every
position of random models the package computes the gradient for each token of the vocabulary; the result is the trace of
its covariance under the student.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg

from .arguments import parse, publish
from .run import write

VOCAB, POSITIONS = 256, 64
SCALES = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 4.0)
# Standard deviation of teacher's and reference's logits from the student's, whose own deviation is 3.
DISTANCES = {"near": 0.3, "far": 1.5}
# Of topk with tail="sampled".
KS, SUPPORTS, TOPK_SCALE = (0, 1, 4, 16, 64, 256), ("student", "teacher"), 1.25


def models(distance: float) -> list[Tensor]:
    """(POSITIONS, VOCAB) float64 logits of student, teacher and reference."""
    generator = torch.Generator().manual_seed(0)
    z, *noise = (torch.randn(POSITIONS, VOCAB, generator=generator, dtype=torch.float64) for _ in range(3))
    return [3 * z, *(3 * z + distance * n for n in noise)]


def variance(logits: list[Tensor], **options: Any) -> float:
    """Trace of the covariance of the gradient of the student's logits, averaged over the positions."""
    # one row for every token of the vocabulary at every position
    z, q, r = (x.repeat_interleave(VOCAB, 0) for x in logits)
    ids = torch.arange(VOCAB).repeat(POSITIONS)
    student = z.requires_grad_()
    out = fg.gopd_loss(
        fg.Logits(student),
        fg.Logits(q),
        fg.Logits(r),
        ids,
        reduction="sum",
        **options,
    )
    (gradient,) = torch.autograd.grad(out.loss, student)
    p = logits[0].softmax(-1)
    g = gradient.reshape(POSITIONS, VOCAB, VOCAB)
    mean = torch.einsum("ny,nyv->nv", p, g)
    second = (p * (g * g).sum(-1)).sum(-1)
    return float((second - (mean * mean).sum(-1)).mean())


def measure() -> list[dict[str, Any]]:
    rows = []
    for name, distance in DISTANCES.items():
        for scale in SCALES:
            plain, with_it = (
                variance(models(distance), reward_scale=scale, baseline=baseline) for baseline in ("none", "expected")
            )
            rows.append({"models": name, "reward_scale": scale, "none": plain, "expected": with_it})
    return rows


def measure_topk() -> list[dict[str, Any]]:
    """For each K the variance, and the share of the student's probability that lies in the support."""
    rows = []
    for name, distance in DISTANCES.items():
        logits = models(distance)
        p = logits[0].softmax(-1)
        for support in SUPPORTS:
            ranked = logits[SUPPORTS.index(support)].argsort(-1, descending=True)
            for k in KS:
                found = variance(
                    logits, estimator="topk", tail="sampled", k=k, support=support, reward_scale=TOPK_SCALE
                )
                mass = float(p.gather(1, ranked[:, :k]).sum(1).mean())
                rows.append({"models": name, "support": support, "k": k, "mass": mass, "variance": found})
    return rows


def table_topk(rows: list[dict[str, Any]]) -> str:
    """The variance relative to that of no support, which is ``sampled``."""
    lines = ["| K | " + " | ".join(map(str, KS)) + " |", "|---|" + "---:|" * len(KS)]
    for name, distance in DISTANCES.items():
        for support in SUPPORTS:
            own = [r for r in rows if (r["models"], r["support"]) == (name, support)]
            shown = [f"{max(0, r['variance'] / own[0]['variance']):.2f} ({r['mass']:.2f})" for r in own]
            lines.append(f"| the {support}'s K, logits {distance:g} from the student's | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    head = "| λ | " + " | ".join(f"{s:g}" for s in SCALES) + " |\n|---|" + "---:|" * len(SCALES)
    lines = [head]
    for name, distance in DISTANCES.items():
        ratios = [f"{r['expected'] / r['none']:.2f}" for r in rows if r["models"] == name]
        lines.append(f"| {name}: logits {distance:g} from the student's | " + " | ".join(ratios) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    args = parse(parser, "json")
    rows, topk = measure(), measure_topk()
    if args.json:
        result = {"vocab": VOCAB, "positions": POSITIONS, "torch": torch.__version__, "rows": rows, "topk": topk}
        write(result, args.json)
    publish("variance", table(rows), args.pages)
    publish("variance-topk", table_topk(topk), args.pages)


if __name__ == "__main__":
    main()
