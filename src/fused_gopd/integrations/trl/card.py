"""Model cards: base model, settings, metrics and versions of a training."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from ... import __version__
from ...objective.divergences import DIVERGENCES
from ...run_metrics import TIMES, row_name
from ..hub import BASE, adapter_path, is_own

Lines = list[tuple[str, str]]

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "tokenizers")
_OF_RUN = "fused-gopd.json"  # in the folder of a run, the list of what it wrote
_MEANS_OF = 10  # rows to average at either end
_END = re.compile(r"\n<!-- fused-gopd, (\w{64}) -->\n\Z")


def name_of(model: Any, moves: str | None = None) -> str:
    """Name of a model for a card: on the hub, of its folder without the path (which may name people), or its class.

    What a run of ``fused-gopd distill`` left is ``RUN/model``: all runs have a ``model``.

    ``moves``: how a teacher "student" follows the student.
    """
    if isinstance(model, nn.Module):
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        return name_of(name) if name else type(model).__name__
    adapter = adapter_path(model)
    if adapter is not None:
        return f"the student's base with the adapter {name_of(adapter)}"
    if is_own(model):
        if model == BASE:
            return "the student without its adapter"
        return f"the student itself, {moves}" if moves else "the student before training"
    if isinstance(model, str):
        if not Path(model).expanduser().is_dir():
            return model
        folder = Path(os.path.abspath(Path(model).expanduser()))
        run = folder.parent
        return f"{run.name}/{folder.name}" if (run / _OF_RUN).is_file() else folder.name
    return f"a scorer, {getattr(model, '__name__', type(model).__name__)}"


def hub_name(model: str) -> str | None:
    """The name of a model on the hub, for a link; None for a folder."""
    return model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists() else None


def text(
    title: str, settings: Lines, metrics: Sequence[str], *, base: str | None, adapter: bool, notes: Sequence[str] = ()
) -> str:
    """The text of a card. Its last line is a checksum of the rest, see :func:`is_unchanged`.

    Args:
        title: the heading.
        settings: (name, value) rows of the table of settings.
        metrics: the lines of :func:`metrics_table`.
        base: hub name of the base model.
        adapter: whether the saved model is a PEFT adapter.
        notes: sentences below the settings.
    """
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += ["tags:", "- gopd", "- on-policy-distillation", "---", "", f"# {title}", ""]
    lines += [
        "Trained on its own answers by generalized on-policy distillation (G-OPD, arXiv:2602.12125) with fused-gopd.",
        "",
        *table(("", ""), settings),
    ]
    for note in notes:
        lines += ["", note]
    lines += ["", "## Metrics", "", *metrics, "", "## Versions", "", *table(("", ""), versions())]
    body = "\n".join(lines)
    return f"{body}\n<!-- fused-gopd, {_checksum(body)} -->\n"


def is_unchanged(card: str) -> bool:
    """Whether a card was made by :func:`text` and not edited since."""
    end = _END.search(card)
    return end is not None and end[1] == _checksum(card[: end.start()])


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def metrics_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Table of the means of metrics over the first rows and over the last rows."""
    count = min(_MEANS_OF, max(1, len(rows) // 2))
    what = "" if count == 1 else f" {count}, mean"
    lines = [(name, _mean(rows[:count], name), _mean(rows[-count:], name)) for name in names]
    return table(("", f"first{what}", f"last{what}"), lines)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{fmean(values):.4g}" if values else "–"


@functools.cache
def versions() -> Lines:
    """Of this package, Python and what it trains with."""
    found = [("fused-gopd", __version__), ("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def describe_loss(options: Any) -> str:
    """Estimator and divergence with their parameters, from attributes named as the loss's options."""
    estimator: str = getattr(options, "estimator", "sampled")
    if estimator == "sampled":
        return estimator
    parts = [estimator] if options.k is None else [estimator, f"k = {options.k}"]
    parts.append(options.divergence)
    parameter = DIVERGENCES[options.divergence].parameter
    if parameter is not None:
        value = getattr(options, parameter.option)
        parts.append(f"{parameter.option} = {parameter.default if value is None else value:g}")
    return ", ".join(parts)


def of_trainer(trainer: Any, title: str, dataset_name: str | None) -> str:
    """The card of a model that one of the trainers, with :class:`.models.ScoringMixin`, is training.

    Args:
        trainer: the trainer.
        title: the heading.
        dataset_name: as TRL passes it.
    """
    history = [row for row in trainer.state.log_history if "loss" in row]
    skipped = ("step", "epoch", "learning_rate", "num_tokens")
    logged = dict.fromkeys(name for row in history for name in row)
    names = [name for name in logged if name not in skipped and row_name(name) not in TIMES]
    adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    base = _base_path(trainer)
    settings = settings_of(trainer, dataset_name)
    return text(title, settings, metrics_table(history, names), base=hub_name(base), adapter=adapter)


def settings_of(trainer: Any, dataset_name: str | None = None) -> Lines:
    """The settings of a trainer's run for its card."""
    args, dataset = trainer.args, trainer.train_dataset
    scale = "a function of the step" if trainer._reward_scale_fn is not None else f"{args.reward_scale:g}"
    if args.reward_scale_end is not None:
        scale += f" to {args.reward_scale_end:g}"
    data = [dataset_name] if dataset_name else []
    data += [f"{len(dataset)} prompts"] if hasattr(dataset, "__len__") else []
    data += [f"fingerprint {dataset._fingerprint}"] if getattr(dataset, "_fingerprint", None) else []
    return [
        ("base", base_of(trainer)),
        *trainer._card_sources,
        *((prompt.argument, prompt.describe()) for prompt in trainer._prompts.values()),
        ("λ (reward scale)", scale),
        ("loss", describe_loss(args)),
        *([("tokenizers", "of each model its own")] if getattr(args, "cross_tokenizer", False) else []),
        ("data", ", ".join(data) or "a stream"),
        ("optimizer steps", str(trainer.state.global_step)),
        ("seed", str(args.seed)),
    ]


def report_settings(trainer: Any) -> Lines:
    """The same, with what a report has besides: sizes of a step, how it samples and learns, versions."""
    args, schedule = trainer.args, trainer.args.lr_scheduler_type
    processes = trainer.accelerator.num_processes
    batch = f"{args.per_device_train_batch_size} × {args.gradient_accumulation_steps} accumulated"
    commit = getattr(trainer.model.config, "_commit_hash", None)
    return [
        *settings_of(trainer),
        *([("commit of the base", commit)] if commit else []),
        ("answers of a step", batch + (f" × {processes} processes" if processes > 1 else "")),
        ("sampled", f"at most {args.max_completion_length} tokens, temperature {args.temperature:g}"),
        ("learning rate", f"{args.learning_rate:g}, {getattr(schedule, 'value', schedule)}"),
        *versions(),
    ]


def base_of(trainer: Any) -> str:
    """The name of the model that is trained."""
    base = _base_path(trainer)
    return name_of(base) if base else type(trainer.accelerator.unwrap_model(trainer.model)).__name__


def _base_path(trainer: Any) -> str:
    return str(getattr(trainer.model.config, "_name_or_path", ""))
