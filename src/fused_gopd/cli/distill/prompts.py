"""Prompts from a file: rows of JSON lines or Parquet, checked one by one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

_COLUMNS = ("prompt", "messages")


@dataclass(frozen=True)
class Prompts:
    """What a file says. A prompt is a text, or a list of messages that ends with what is to be answered."""

    prompts: list[str] | list[list[dict[str, Any]]]
    routes: list[str] | None
    answered: int  # conversations whose last message, an assistant's, was left out

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompts[0], str)


def read(path: Path, column: str, route_column: str, routes: Sequence[str]) -> Prompts:
    """The prompts of a file.

    Args:
        path: ``.jsonl`` or ``.parquet``.
        column: of the prompts; empty: ``prompt``, or ``messages``.
        route_column: which teacher each prompt has; empty: there is one teacher.
        routes: the teachers that there are.

    Raises:
        typer.BadParameter: naming the option, the row and what is wrong.
    """
    rows = list(_rows(path))
    if not rows:
        raise typer.BadParameter(f"{path} has no rows", param_hint="--prompts")
    column = column or next((name for name in _COLUMNS if name in rows[0][1]), "")
    if column not in rows[0][1]:
        wanted = f"column {column!r}" if column else f"column {' or '.join(_COLUMNS)}"
        raise typer.BadParameter(f"{path} has no {wanted}, only {', '.join(rows[0][1])}", param_hint="--prompt-column")
    found = [_prompt(path, number, row, column) for number, row in rows]
    kinds = {type(prompt) for prompt, _ in found}
    if len(kinds) > 1:
        raise typer.BadParameter(f"{path} has both texts and lists of messages in {column!r}", param_hint="--prompts")
    named = None
    if route_column:
        named = [_route(path, number, row, route_column, routes) for number, row in rows]
    return Prompts([prompt for prompt, _ in found], named, sum(answered for _, answered in found))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers, from 1."""
    if path.suffix == ".parquet":
        table = importlib.import_module("pyarrow.parquet").read_table(path)
        yield from enumerate(table.to_pylist(), 1)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise typer.BadParameter(f"expected a .jsonl or .parquet file, got {path.name}", param_hint="--prompts")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise typer.BadParameter(
                    f"{path}, line {number}, is not JSON: {error}", param_hint="--prompts"
                ) from None
            if not isinstance(row, dict):
                raise typer.BadParameter(
                    f'{path}, line {number}, must be an object such as {{"prompt": "..."}}, got {line.strip()[:60]}',
                    param_hint="--prompts",
                )
            yield number, row


def _prompt(path: Path, number: int, row: dict[str, Any], column: str) -> tuple[Any, bool]:
    """The prompt of a row, and whether an answer was cut off it."""
    prompt = row.get(column)
    if isinstance(prompt, str) and prompt:
        return prompt, False
    messages = prompt if isinstance(prompt, list) else []
    right = all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    answered = bool(messages) and right and messages[-1]["role"] == "assistant"
    if answered:
        messages = messages[:-1]
    if not messages or not right:
        raise typer.BadParameter(
            f"{path}, row {number}: {column!r} must be a text or a list of messages with role and content, one of them "
            f"to be answered, got {json.dumps(prompt, default=str)[:100]}",
            param_hint="--prompts",
        )
    return messages, answered


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
