"""Prompts that the teachers or the reference read in place of the student's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .checks import require_route


class OtherPrompt:
    """What the models of a role, ``"teacher"`` or ``"ref"``, read in place of the student's prompt.

    Args:
        role: the role; ``ROLE_prompt`` is the trainers' argument, ``ROLE_prompt_column`` the configuration's.
        given: the trainer's argument: a function of a row, a dict from route to function, or None.
        column: the column of the configuration, or None.
        route_column: the column of the configuration that names the route of a row.
        routes: the routes of the teachers.
    """

    def __init__(
        self, role: str, given: Any, column: str | None, route_column: str | None, routes: Mapping[Any, object]
    ) -> None:
        self.argument = name = f"{role}_prompt"
        self.name = name if column is None else f"{name}_column"
        self.column, self._route_column = column, route_column if isinstance(given, Mapping) else None
        self._functions: dict[Any, Any] = dict(given) if isinstance(given, Mapping) else {None: given}
        if given is None:
            return
        if column is not None:
            raise ValueError(f"{name} and {name}_column={column!r} both name a prompt: give one of the two")
        if isinstance(given, Mapping):
            if not given:
                raise ValueError(f"{name} must have one route at least, got an empty dict")
            if route_column is None:
                raise ValueError(f"a dict of {name} needs route_column, the column that names the routes, in args")
            for route in given:
                require_route(routes, name, route)
        for function in self._functions.values():
            if not callable(function):
                raise TypeError(
                    f"{name} must be a function of a row of the dataset, or a dict from route to function, got "
                    f"{type(function).__name__}"
                )

    def __bool__(self) -> bool:
        """Whether any prompt is another one than the student's."""
        return self.column is not None or self._functions != {None: None}

    def describe(self) -> str:
        """One line for a model card."""
        if self.column is not None:
            return f"column {self.column!r}"
        named = {route: getattr(x, "__name__", type(x).__name__) for route, x in self._functions.items()}
        return "the function " + ", ".join(x if route is None else f"{x} of {route!r}" for route, x in named.items())

    def differs(self, route: Any) -> bool:
        """Whether the model of a route reads another prompt than the student's."""
        return self.column is not None or self._functions.get(None, self._functions.get(route)) is not None

    def of(self, row: dict[str, Any], answer: Callable[[], str]) -> Any:
        """The prompt of a row: a text or a list of messages. ``answer`` decodes the answer to it.

        Raises:
            ValueError, TypeError: a row without the column; a function that raises; what is neither a text nor a list
                of messages, or has images.
        """
        columns = ", ".join(row)
        if self.column is not None:
            if self.column not in row:
                raise ValueError(f"a prompt has no column {self.column!r} ({self.name}), only {columns}")
            return _checked(f"column {self.column!r} ({self.name})", row[self.column])
        function = self._functions.get(None if self._route_column is None else row[self._route_column])
        if function is None:  # a route without one
            return row["prompt"]
        try:
            given = copy.deepcopy(row)
            prompt = function(given, answer()) if _needs_answer(function) else function(given)
        except Exception as error:
            raise ValueError(
                f"{self.name} raised {type(error).__name__}: {error}, for a row with the columns {columns}"
            ) from error
        return _checked(self.name, prompt)


def _needs_answer(function: Callable[..., Any]) -> bool:
    """Whether a function has two parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # it does not say what it takes
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(x.kind in positional and x.default is x.empty for x in parameters) > 1


def _checked(where: str, prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(_is_message(x) for x in prompt):
        shown = repr(prompt)
        raise TypeError(
            f"{where} must be a text, or a list of messages with role and content, got "
            f"{shown if len(shown) < 100 else shown[:100] + '...'}"
        )
    for message in prompt:
        parts = message["content"] if isinstance(message["content"], list) else []
        kinds = {part.get("type") for part in parts} - {"text"}
        if kinds:
            raise ValueError(f"{where} must have texts alone, got a message with {', '.join(map(repr, kinds))}")
    return prompt


def _is_message(x: Any) -> bool:
    return isinstance(x, Mapping) and "role" in x and "content" in x
