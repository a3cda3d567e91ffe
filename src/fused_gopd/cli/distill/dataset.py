"""The dataset that the trainer gets: checked rows of a file, with what teachers and the reference read of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import typer

from ...integrations.hub import STUDENT, adapter_path
from ...integrations.trl.rollouts import COMPLETION
from . import models, prompts
from .options import RunOptions
from .readings import Reading

# the column of routes, whatever its name in the file
_ROUTE = "route"
# of a prompt that is shown
_SHOWN_CHARACTERS = 600


def columns_of(options: RunOptions) -> dict[str, Any]:
    """The arguments of ``GOPDConfig`` that name columns of the dataset."""
    readings = {f"{role}_prompt_column": f"{role}_prompt" for role in options.readings()}
    return {"route_column": _ROUTE if options.route_column else None, **readings}


def order_of(count: int, needed: int, seed: int) -> list[int]:
    """Which of ``count`` prompts each of the run's answers is to: permutations of all prompts, one after the other.

    The whole run is one epoch: a resumed run need not repeat the shuffles of earlier epochs, and a longer run begins
    with the prompts of the shorter one.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < needed:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:needed]


def dataset_of(
    data: prompts.Prompts,
    options: RunOptions,
    known: Sequence[models.Model],
    tokenizer: Any,
    order: Sequence[int],
    say: Callable[[str], None] | None,
) -> Any:
    """The rows of a file in an order, which may have a row several times or not at all.

    Args:
        data: the file.
        options: of the run.
        known: the models' sizes, the student's first.
        tokenizer: the student's.
        order: indices of rows.
        say: tells what is done with the rows; None for held-out prompts, which have no answers either.

    Raises:
        typer.BadParameter: naming the option, the row and what is wrong.
    """
    with_answers = say is not None and options.lmbda < 1
    rows, chat = prompts.as_read(data, tokenizer, options.student, options.chat)
    answered = sum(answer is not None for answer in data.answers)
    if say is not None and answered and not with_answers:
        say(f"{answered} conversations end with an assistant's message: it is left out")
    if say is not None and chat and not data.conversational:
        say("texts are taken for a user's messages, by the student's chat template (--no-chat: as they are)")
    models.check_template_variables(tokenizer, rows, options.template_variables)
    readings = options.readings()
    columns = {"prompt": rows} if data.routes is None else {"prompt": rows, _ROUTE: data.routes}
    columns |= {f"{role}_prompt": reading.of(data, rows, chat) for role, reading in readings.items()}
    if with_answers:
        columns[COMPLETION] = prompts.completions(data, options.completion_column)
    try:
        dataset: Any = importlib.import_module("datasets").Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise typer.BadParameter(
            f"{data.path} has fields of messages that are of one type in some rows and of another in others: "
            f"{models.first_line(error)}",
            param_hint="--prompts",
        ) from None
    used = sorted(set(order))
    numbers, parts = [data.rows[i] for i in used], dataset.select(used)
    fixed: dict[str, Any] = {"new_tokens": options.max_new_tokens, "variables": options.template_variables}
    own = [model for model in known if model.role not in readings]
    models.check_prompts(parts["prompt"], numbers, str(data.path), own, tokenizer, **fixed)
    if with_answers:
        models.check_completions(parts, numbers, str(data.path), tokenizer, **fixed)
    for role, reading in readings.items():
        read, where = parts[f"{role}_prompt"], f"{data.path} ({reading.owner} prompts)"
        readers = _readers(reading, options, known)
        words = readers[0].own_tokenizer or tokenizer
        models.check_prompts(read, numbers, where, readers, words, **fixed)
        if say is not None:
            text = models.rendered(read[0], words, options.template_variables)
            shown = repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")
            say(f"row {numbers[0]}, as {reading.reader} reads it: {shown}")
    return dataset.select(order)


def _readers(reading: Reading, options: RunOptions, known: Sequence[models.Model]) -> list[models.Model]:
    """The models that read the prompts of a role; first the student, where a prompt is encoded as the student's are.

    The student limits their length only if it is itself, or with an adapter, a model of the role.
    """
    names = options.routes().values() if reading.role == "teacher" else [options.ref]
    as_student = any(adapter_path(name) is not None or name == STUDENT for name in names)
    readers = [model for model in known if model.role == reading.role]
    if as_student or not readers or any(model.own_tokenizer is None for model in readers):
        readers.insert(0, known[0] if as_student else replace(known[0], positions=None))
    return readers
