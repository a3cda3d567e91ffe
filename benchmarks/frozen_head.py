"""The forward KL of a frozen student head with the target's expected row, to the same with the frozen models each step.

``python -m benchmarks.frozen_head [--json FILE] [--rounds N] [PAGE.md ...]`` prints the table and fills it in between
``<!-- frozen-head -->`` and ``<!-- /frozen-head -->``. The functions are those of ``docs/targets.md``. Times are of
the process on one thread, the least of the rounds: for a machine that others use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fused_gopd as fg

from .arguments import parse, publish
from .run import origin, write

TOKENS, VOCAB, HIDDEN = 512, 50257, 512
STEPS = (1, 2, 3, 4, 8)
PAGE = Path(__file__).parent.parent / "docs" / "targets.md"


def functions() -> dict[str, Any]:
    """``expected`` and ``forward_kl``, as the page has them."""
    text = PAGE.read_text(encoding="utf-8")
    (snippet,) = [x for x in text.split("```python\n")[1:] if "def expected(" in x]
    names: dict[str, Any] = {"torch": torch, "fg": fg}
    exec(snippet.split("\n\n\nfrozen =")[0], names)
    return names


def models(frozen_hidden: int) -> tuple[fg.LinearHead, ...]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for width in (HIDDEN, frozen_hidden, frozen_hidden):
        hidden = torch.randn(TOKENS, width, generator=generator)
        made.append(fg.LinearHead(hidden, 3 * torch.randn(VOCAB, width, generator=generator) / width**0.5))
    return tuple(made)


def measure(frozen_hidden: int, with_ref: bool, rounds: int) -> dict[str, Any]:
    names = functions()
    student, teacher, ref = models(frozen_hidden)
    student.hidden.requires_grad_()
    scale: dict[str, Any] = {"reward_scale": 1.25 if with_ref else 1.0}
    frozen = (teacher, ref) if with_ref else (teacher,)
    ids, mask = torch.arange(TOKENS) % VOCAB, torch.ones(TOKENS, dtype=torch.bool)

    def live() -> torch.Tensor:
        out = fg.gopd_loss(student, *frozen, estimator="full", divergence="forward_kl", **scale)
        return torch.autograd.grad(out.loss, student.hidden)[0]

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        made: tuple[torch.Tensor, torch.Tensor] = names["expected"](student, *frozen, **scale)
        return made

    kept = once()

    def step() -> torch.Tensor:
        return torch.autograd.grad(names["forward_kl"](student, *kept, ids, mask), student.hidden)[0]

    error = float((live() - step()).norm() / live().norm())
    calls: dict[str, Callable[[], object]] = {"live": live, "once": once, "step": step}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append((time.process_time() - start) * 1e3)
    least = {name: min(x) for name, x in times.items()}
    ratios = {n: (least["once"] + n * least["step"]) / (n * least["live"]) for n in STEPS}
    row = {"hidden": HIDDEN, "frozen_hidden": frozen_hidden, "ref": with_ref, "gradient_error": error}
    return {**row, "milliseconds": times, "ratios": ratios}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| student, frozen models | " + " | ".join(f"n = {n}" for n in STEPS) + " |"]
    lines.append("|---|" + "---:|" * len(STEPS))
    for row in rows:
        what = f"H = {row['hidden']}, " + ("teacher and reference" if row["ref"] else "teacher")
        cells = " | ".join(f"{row['ratios'][n]:.2f}×" for n in STEPS)
        lines.append(f"| {what} of H = {row['frozen_hidden']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parse(parser, "json")
    torch.set_num_threads(1)
    rows = [measure(width, ref, args.rounds) for width in (512, 2048) for ref in (False, True)]
    if args.json:
        write({**origin("cpu"), "tokens": TOKENS, "vocab": VOCAB, "rows": rows}, args.json)
    publish("frozen-head", table(rows), args.pages)


if __name__ == "__main__":
    main()
