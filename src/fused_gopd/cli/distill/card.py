"""The model card of a run: README.md in the folder of its trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...integrations.trl import card
from ...run_metrics import TIMES
from . import inputs
from .options import RunOptions

_NO_METRICS = ("step", "learning_rate", *TIMES)


def text(
    options: RunOptions, read: Mapping[str, Any], prompts: int, rows: Sequence[Mapping[str, Any]], answers: int
) -> str:
    """The card.

    Args:
        read: the content of ``inputs.json``: fingerprints, and what changed during the run.
        prompts: their number.
        rows: the metrics of each step.
        answers: their number in each step.
    """
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _NO_METRICS]
    changes = [f"The inputs changed after step {c['after_step']}: {'; '.join(c['what'])}." for c in read["changes"]]
    return card.text(
        f"{card.name_of(options.student)}, distilled",
        _settings(options, read["inputs"], prompts, len(rows), answers),
        card.metrics_table(rows, names),
        base=card.hub_name(options.student),
        adapter=options.save == "adapter",
        notes=changes,
    )


def report_settings(options: RunOptions, read: Mapping[str, Any], prompts: int, steps: int, answers: int) -> card.Lines:
    """The settings of the card, what changed during the run, and the versions, for the report."""
    changes = [(f"changed after step {c['after_step']}", "; ".join(c["what"])) for c in read["changes"]]
    return [*_settings(options, read["inputs"], prompts, steps, answers), *changes, *card.versions()]


def _settings(
    options: RunOptions, fingerprints: inputs.Fingerprints, prompts: int, steps: int, answers: int
) -> card.Lines:
    def with_digest(role: str, name: str) -> str:
        return f"{name}, {inputs.digest(fingerprints[role])}" if role in fingerprints else name

    found = [("base", with_digest("the student", card.name_of(options.student)))]
    if options.teacher_server:
        revision = f" ({options.teacher_server_revision})" if options.teacher_server_revision else ""
        found.append(("teacher", f"{options.teacher_server_model}{revision}, behind a server"))
    for route, model in options.routes().items():
        role = "the teacher" if route is None else f"the teacher of {route}"
        found.append((role.removeprefix("the "), with_digest(role, card.name_of(model, options.teacher_moves))))
    reference = with_digest("the reference", card.name_of(options.ref)) if options.uses_ref else "none"
    if options.reward_scale == 1:
        reference += f"{', for evaluations' if options.uses_ref else ''}: λ = 1 has no use for it"
    held_out = with_digest(inputs.HELD_OUT, Path(options.eval_prompts).name)
    trained = f"LoRA, rank {options.lora}, alpha {options.lora_alpha:g}" if options.lora else "all weights"
    return [
        *found,
        ("reference", reference),
        *((f"{reading.owner} prompt", reading.describe()) for reading in options.readings().values()),
        ("λ (reward scale)", f"{options.reward_scale:g}"),
        ("estimator", card.describe_loss(options)),
        *([("tokenizers", "of each model its own")] if options.cross_tokenizer else []),
        ("data", with_digest(inputs.PROMPTS, f"{prompts} prompts, {Path(options.prompts).name}")),
        *([("held-out prompts", held_out)] if options.eval_prompts else []),
        ("trained", f"{trained}, learning rate {options.learning_rate:g}"),
        ("steps", f"{steps} of {answers} answers"),
        ("answers", f"at most {options.max_new_tokens} tokens, temperature {options.temperature:g}"),
        *([("batches that the student samples", f"{options.lmbda:g}")] if options.lmbda != 1 else []),
        *([("weight of the supervised term", f"{options.sft_weight:g}")] if options.sft_weight else []),
        ("seed", str(options.seed)),
    ]
