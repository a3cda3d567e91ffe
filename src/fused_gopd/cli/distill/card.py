"""The model card of a trained model: README.md in its folder, made from what the run knows."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ... import __version__
from . import inputs
from .options import Options

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "tokenizers")
_NO_FIGURES = ("step", "seconds", "learning_rate")
_MEANS_OF = 10  # steps


def text(options: Options, read: Mapping[str, Any], prompts: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """The card.

    Args:
        read: ``inputs.json``: fingerprints, and what changed during the run.
        prompts: how many there are.
        rows: the figures of each step.
    """
    settings = _settings(options, read["inputs"], prompts, len(rows))
    return "\n".join(
        [
            "---",
            *_metadata(options),
            "---",
            "",
            f"# {_name(options.student)}, distilled",
            "",
            "Trained on its own answers by generalized on-policy distillation (G-OPD, arXiv:2602.12125) with "
            f"fused-gopd {__version__}.",
            "",
            *_table(("", ""), settings),
            *(f"\nThe inputs changed after step {c['after_step']}: {'; '.join(c['what'])}." for c in read["changes"]),
            "",
            "## Metrics",
            "",
            *_metrics(rows),
            "",
            "## Versions",
            "",
            *_table(("", ""), _versions()),
            "",
        ]
    )


def _is_local(model: str) -> bool:
    return model == "smollm2" or Path(model).is_dir()


def _name(model: str) -> str:
    """A hub name as it is; of a folder its name alone, since cards are published and paths name people."""
    return Path(model).name if _is_local(model) else model


def _metadata(options: Options) -> list[str]:
    lines = [
        f"library_name: {'peft' if options.save == 'adapter' else 'transformers'}",
        "pipeline_tag: text-generation",
    ]
    if not _is_local(options.student):
        lines.append(f"base_model: {json.dumps(options.student)}")
    return [*lines, "tags:", "- fused-gopd", "- on-policy-distillation"]


def _settings(options: Options, fingerprints: inputs.Fingerprints, prompts: int, steps: int) -> list[tuple[str, str]]:
    def with_digest(role: str, name: str) -> str:
        return f"{name}, {inputs.digest(fingerprints[role])}" if role in fingerprints else name

    found = [("base", with_digest("the student", _name(options.student)))]
    if options.teacher_server:
        found.append(("teacher", f"{options.teacher_server_model}, behind a server"))
    for route, model in options.routes().items():
        role = "the teacher" if route is None else f"the teacher of {route}"
        found.append((role.removeprefix("the "), with_digest(role, _name(model))))
    if options.reward_scale == 1:
        reference = "none: λ = 1 has no use for it"
    elif options.ref == "student":
        reference = "the base"
    else:
        reference = with_digest("the reference", _name(options.ref))
    loss = options.estimator if options.k is None else f"{options.estimator}, k = {options.k}"
    trained = f"LoRA, rank {options.lora}, alpha {options.lora_alpha:g}" if options.lora else "all weights"
    return [
        *found,
        ("reference", reference),
        ("λ (reward scale)", f"{options.reward_scale:g}"),
        ("estimator", loss if options.estimator == "sampled" else f"{loss}, {options.divergence}"),
        ("data", with_digest(inputs.PROMPTS, f"{prompts} prompts, {Path(options.prompts).name}")),
        ("trained", f"{trained}, learning rate {options.learning_rate:g}"),
        ("steps", f"{steps} of {options.batch_size * options.accumulation} answers"),
        ("answers", f"at most {options.max_new_tokens} tokens, temperature {options.temperature:g}"),
        ("seed", str(options.seed)),
    ]


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    count = min(_MEANS_OF, max(1, len(rows) // 2))
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _NO_FIGURES]
    what = "step" if count == 1 else f"{count} steps, mean"
    table = [(name, _mean(rows[:count], name), _mean(rows[-count:], name)) for name in names]
    return _table(("", f"first {what}", f"last {what}"), table)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{fmean(values):.4g}" if values else "–"


def _versions() -> list[tuple[str, str]]:
    found = [("fused-gopd", __version__), ("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
