"""Parameters of the command line as several commands have them: their panels, checks and errors."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, TypeVar, get_type_hints

import typer

from ..option_checks import checked_options
from ..options import RULES

F = TypeVar("F", bound=Callable[..., Any])


def with_options(kind: type) -> Callable[[F], F]:
    """Give a command that takes ``**options`` the fields of a dataclass as parameters, for Typer.

    They are between its positional and its keyword-only parameters, in which order --help shows them. The types of the
    fields are ``Annotated[..., typer.Option(...)]``.
    """

    def decorate(command: F) -> F:
        types = get_type_hints(kind, include_extras=True)
        added = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if field.default is MISSING else field.default,  # of a list
                annotation=types[field.name],
            )
            for field in fields(kind)
        ]
        own = [
            parameter.replace(annotation=hint)
            for parameter, hint in zip(
                inspect.signature(command).parameters.values(),
                get_type_hints(command, include_extras=True).values(),
                strict=False,  # the last hint is that of what it returns
            )
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        last = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        signature = inspect.Signature([*own[: len(own) - len(last)], *added, *last])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {name: x.annotation for name, x in signature.parameters.items()}
        return command

    return decorate


def panel(title: str) -> Callable[..., Any]:
    """``typer.Option`` in a panel of --help: a table of its own, so that a long name narrows its own panel alone."""
    return partial(typer.Option, rich_help_panel=title)


def flag(name: str) -> str:
    """The flag of a parameter: ``--batch-size`` of ``batch_size``."""
    return f"--{name.replace('_', '-')}"


def wrong(option: str, message: str) -> typer.BadParameter:
    """The error of a flag's value."""
    return typer.BadParameter(message, param_hint=option)


def require_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ``typer.BadParameter``, which names the flag, for a value that is not among the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise typer.BadParameter(f"expected one of {', '.join(allowed)}, got {value!r}", param_hint=flag(name))


def require_finite(name: str, value: float) -> None:
    """Raise ``typer.BadParameter``, which names the flag, for infinity and NaN."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}", param_hint=flag(name))


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Raise a ValueError of the block as ``typer.BadParameter``, which names the flag; its text may begin with it."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix(f"{option} "), param_hint=option) from None


def json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object that is given as text, empty for no text. Raises ``typer.BadParameter``, which names the flag."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"must be a JSON object, got {text!r}: {error}", param_hint=flag(name)) from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"must be a JSON object, got {text!r}", param_hint=flag(name))
    return found


def require_packages(what: str, modules: Iterable[str], *commands: str) -> None:
    """Exit with status 2 where modules are missing, with the commands that install them.

    Each is on a line of its own: a box around an error would break it, so that it could not be pasted.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        run = "".join(f"\n  {command}" for command in commands)
        typer.echo(f"error: {what} needs {', '.join(missing)}. Run:{run}", err=True)
        raise typer.Exit(2)


def help_of(name: str) -> str:
    """The help of an option of the loss, with the values that it may have."""
    rule = RULES[name]
    missing = any(choice not in rule.help for choice in rule.choices)
    return f"{rule.help.rstrip('.')}: {', '.join(rule.choices)}." if missing else rule.help


# NAME=VALUE in a message of the loss
_ARGUMENT = re.compile(rf"\b({'|'.join(RULES)})=('[^']*'|[\w.+-]+)")


def check_loss_options(**options: Any) -> None:
    """Apply the rules of the loss to some of its options.

    Raises:
        typer.BadParameter: naming the flag.
    """
    try:
        checked_options(**options)
    except (TypeError, ValueError) as error:
        name: str = error.option  # type: ignore[union-attr]
        message = _ARGUMENT.sub(lambda match: f"{flag(match[1])} {match[2].strip(chr(39))}", str(error))
        raise typer.BadParameter(message.removeprefix(f"{name} "), param_hint=flag(name)) from None
    # of models that score with the teacher's whole vocabulary; a TopKLogProbs brings its own K
    if options["estimator"] == "topk" and options.get("k") is None:
        raise typer.BadParameter("must be given for --estimator topk", param_hint="--k")
