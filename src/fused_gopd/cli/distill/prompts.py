"""Prompts from a file: rows of JSON lines or Parquet, checked one by one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ...installing import packages
from ..parameters import require_packages

_COLUMNS = ("prompt", "messages")
_COMPLETION = "completion"


@dataclass(frozen=True)
class Prompts:
    """The content of a file. A prompt is a text, or a list of messages the last of which is to be answered."""

    prompts: list[str] | list[list[dict[str, Any]]]
    rows: list[int]  # row numbers in the file, from 1
    routes: list[str] | None
    answers: list[dict[str, Any] | None]  # of each conversation the assistant's message at its end, which is left out
    path: Path
    table: list[tuple[int, dict[str, Any]]]  # (row number, row) with all columns

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompts[0], str)


def read(path: Path, column: str, route_column: str, routes: Sequence[str]) -> Prompts:
    """Read and check the prompts of a file.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        column: the column of the prompts; empty for ``prompt``, or else ``messages``.
        route_column: the column that names each prompt's teacher; empty with one teacher.
        routes: the names of the teachers.

    Raises:
        typer.BadParameter: naming the option, the row and what is wrong.
    """
    rows = list(_rows(path))
    if not rows:
        raise typer.BadParameter(f"{path} has no rows", param_hint="--prompts")
    column = column or next((name for name in _COLUMNS if name in rows[0][1]), "")
    if not column:
        raise typer.BadParameter(
            f"{path} has no column {' or '.join(_COLUMNS)}, only {', '.join(rows[0][1])}", param_hint="--prompt-column"
        )
    found, answers = of_column(path, rows, column, "--prompt-column")
    named = None
    if route_column:
        named = [_route(path, number, row, route_column, routes) for number, row in rows]
    numbers = [number for number, _ in rows]
    return Prompts(found, numbers, named, answers, path, rows)


def of_column(
    path: Path, rows: Sequence[tuple[int, dict[str, Any]]], column: str, option: str
) -> tuple[list[Any], list[dict[str, Any] | None]]:
    """The prompts in a column of a file's (row number, row), and the answers that were removed from their ends.

    ``option`` is the flag that names the column.
    """
    if column not in rows[0][1]:
        raise typer.BadParameter(f"{path} has no column {column!r}, only {', '.join(rows[0][1])}", param_hint=option)
    found = [_prompt(path, number, row, column) for number, row in rows]
    if len({type(prompt) for prompt, _ in found}) > 1:
        raise typer.BadParameter(f"{path} has both texts and lists of messages in {column!r}", param_hint="--prompts")
    return [prompt for prompt, _ in found], [answer for _, answer in found]


def completions(data: Prompts, column: str) -> list[Any]:
    """The answers that the file has: texts or lists of messages.

    Args:
        data: the file.
        column: their column; empty for ``completion``, or else the assistant's message at the end of each prompt.

    Raises:
        typer.BadParameter: naming the option, the row and what is wrong.
    """
    first = data.table[0][1]
    column = column or (_COMPLETION if _COMPLETION in first else "")
    if not column:
        for number, answer in zip(data.rows, data.answers, strict=True):
            if answer is None:
                raise typer.BadParameter(
                    f"{data.path}, row {number}, has no answer: give a column {_COMPLETION!r} (--completion-column), "
                    "or conversations that end with an assistant's message",
                    param_hint="--lmbda",
                )
        return [[answer] for answer in data.answers]
    if column not in first:
        raise typer.BadParameter(
            f"{data.path} has no column {column!r}, only {', '.join(first)}", param_hint="--completion-column"
        )
    for number, row in data.table:
        found = row.get(column)
        wrong: str | None = "it is neither"
        if isinstance(found, list) and found:
            wrong = next(filter(None, map(_fault, found)), None)
        elif isinstance(found, str):
            wrong = fault_of_text(found)
        if wrong is None and isinstance(found, str) != isinstance(first[column], str):
            wrong = "the rows before have the other kind"
        if wrong is not None:
            raise typer.BadParameter(
                f"{data.path}, row {number}: {column!r} must be a text or a list of messages, got {shown(found)}: "
                f"{wrong}",
                param_hint="--completion-column",
            )
    return [row[column] for _, row in data.table]


def as_read(data: Prompts, tokenizer: Any, student: str, chat: bool) -> tuple[list[Any], bool]:
    """The prompts as the student's tokenizer gets them, and whether texts are taken for a user's messages.

    Args:
        data: the file.
        tokenizer: the student's.
        student: its name, for messages.
        chat: whether texts are taken for a user's messages, where there is a chat template.

    Raises:
        typer.BadParameter: there are conversations and no chat template.
    """
    template = tokenizer.chat_template is not None
    if data.conversational and not template:
        raise typer.BadParameter(
            f"{data.path} has conversations, and the tokenizer of {student} has no chat template: give texts, or a "
            "student that was trained on conversations",
            param_hint="--prompts",
        )
    chat = chat and template
    rows: list[Any] = [*data.prompts]
    return (as_messages(rows) if chat and not data.conversational else rows), chat


def as_messages(texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Each text as a user's message."""
    return [[{"role": "user", "content": text}] for text in texts]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of each row."""
    readers = {".parquet": _of_table, ".jsonl": _of_lines, ".json": _of_lines}
    if path.suffix not in readers:
        raise typer.BadParameter(f"expected a .jsonl or .parquet file, got {path.name}", param_hint="--prompts")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror or error}", param_hint="--prompts") from None


def _of_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    require_packages("a .parquet file", ["pyarrow"], packages("pyarrow"))
    try:
        rows = importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    except ValueError as error:  # pyarrow's exceptions are subclasses of ValueError or OSError
        raise typer.BadParameter(f"{path} is no whole Parquet table: {error}", param_hint="--prompts") from None
    yield from enumerate(rows, 1)


def _of_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number},"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise typer.BadParameter(
                    f"{where} is not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}. Save the "
                    "file as UTF-8",
                    param_hint="--prompts",
                ) from None
            except (ValueError, RecursionError) as error:
                raise typer.BadParameter(f"{where} is not JSON: {error}", param_hint="--prompts") from None
            if not isinstance(row, dict):
                raise typer.BadParameter(
                    f'{where} must be an object such as {{"prompt": "..."}}, got {shown(row)}', param_hint="--prompts"
                )
            yield number, row


def shown(value: Any) -> str:
    """The first 100 characters of a value, for error messages."""
    try:
        return json.dumps(value, default=str)[:100]
    except (ValueError, RecursionError):  # nested too deeply
        return f"a {type(value).__name__}"


def _prompt(path: Path, number: int, row: dict[str, Any], column: str) -> tuple[Any, dict[str, Any] | None]:
    """The prompt of a row, and the answer that was removed from its end, or None."""
    prompt = row.get(column)
    answer = None
    if isinstance(prompt, list):
        wrong = next(filter(None, (_fault(message) for message in prompt)), None)
        if prompt and wrong is None and prompt[-1]["role"] == "assistant":
            *prompt, answer = prompt
        if wrong is None and not prompt:
            wrong = "there is no message to be answered"
    else:
        wrong = fault_of_text(prompt) if isinstance(prompt, str) and prompt else "it is neither"
    if wrong is not None:
        raise typer.BadParameter(
            f"{path}, row {number}: {column!r} must be a text or a list of messages with role and content, one of them "
            f"to be answered, got {shown(row.get(column))}: {wrong}",
            param_hint="--prompts",
        )
    return prompt, answer


def _fault(message: Any) -> str | None:
    """What is wrong with a message, or None. An assistant's message with tool calls may have no content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return f"{shown(message)} is no message with a role"
    content = message.get("content")
    if isinstance(content, str):
        return fault_of_text(content)
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return None
    if isinstance(content, list):
        return "the content of a message must be a text, got a list: join its parts of text"
    return f"the content of a message must be a text, got {shown(content)}"


def fault_of_text(text: str) -> str | None:
    """What is wrong with a text, or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"its character {error.start + 1} is half of a surrogate pair, which UTF-8 has no form for"
    return None


def _route(path: Path, number: int, row: dict[str, Any], column: str, routes: Sequence[str]) -> str:
    if row.get(column) is None:
        raise typer.BadParameter(
            f"{path}, row {number}, has no {column!r}, only {', '.join(row)}", param_hint="--route-column"
        )
    route = str(row[column])
    if route not in routes:
        raise typer.BadParameter(
            f"{path}, row {number}: there is no teacher for {column} {route!r}, only for "
            f"{', '.join(map(repr, routes))}: add --teacher {route}=MODEL",
            param_hint="--teacher",
        )
    return route
