"""Fill in the figures of the demo in its page, from what runs of it wrote.

``python -m benchmarks.demo RESULT.json [OTHER.json ...] PAGE.md`` writes the tables of the first run, and a line for
each of the others, between ``<!-- demo -->`` and ``<!-- /demo -->``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fused_gopd.cli.demo.compare import WAYS

from .arguments import publish


def _memory(result: dict[str, Any]) -> str:
    lines = ["| | memory | loss | seconds |", "|---|---:|---:|---:|"]
    for m in result["comparison"]:
        lines.append(f"| {WAYS[m['way']]} | {m['peak_bytes'] / 2**20:.0f} MiB | {m['loss']:.3f} | {m['seconds']:.1f} |")
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    runs = {f"λ = {run['reward_scale']:g}": run["final"] for run in result["runs"]}
    return {"before": result["before"], **runs, "the teacher itself": result["teacher"]}


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _training(result: dict[str, Any]) -> str:
    lines = ['| | reward per token | KL(p‖q) | KL(p‖r) | answers with "!" | "!" per answer |']
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, row in _rows(result).items():
        reward = f"{_signed(row['reward'])} ± {row['reward_error']:.2f}"
        lines.append(
            f"| {name} | {reward} | {row['kl_teacher']:.2f} | {row['kl_ref']:.2f} | {row['excited']:.0%} "
            f"| {row['exclamations']:.1f} |"
        )
    return "\n".join(lines)


def _seeds(results: list[dict[str, Any]]) -> str:
    lines = ['| seed | | reward per token | KL(p‖q) | "!" per answer | what the demo asks of itself |']
    lines.append("|---:|---|---:|---:|---:|---|")
    for result in results:
        for number, (name, row) in enumerate(_rows(result).items()):
            seed, met = (str(result["seed"]), "met" if result["passed"] else "FAILED") if not number else ("", "")
            values = f"{_signed(row['reward'])} | {row['kl_teacher']:.2f} | {row['exclamations']:.1f}"
            lines.append(f"| {seed} | {name} | {values} | {met} |")
    return "\n".join(lines)


def text(results: list[dict[str, Any]]) -> str:
    first = results[0]
    tokens, gradients = first["comparison"][0]["tokens"], first["comparison"][0]["gradient_bytes"] / 2**20
    steps = len(first["runs"][0]["losses"])
    parts = [
        f"One loss and its gradients, dense and fused, on {tokens:,} tokens of the model's own answers (`full`, "
        f"float32; memory beyond the inputs, {gradients:.0f} MiB of it gradients):",
        _memory(first),
        f"Then {steps} updates at each λ, and answers to questions that were not trained on:",
        _training(first),
        f"Seed {first['seed']}: {first['cpu_seconds']:.0f} s of CPU time in {first['seconds']:.0f} s, at most "
        f"{first['max_resident_gib']:.1f} GiB, {first['environment']['threads']} threads.",
    ]
    if len(results) > 1:
        parts += ["Other seeds:", _seeds(results[1:])]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    publish("demo", text([json.loads(path.read_text()) for path in args.results]) + "\n", [args.page])


if __name__ == "__main__":
    main()
