"""Checks of command-line parameters that several commands share, and those that are options of the loss."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable
from typing import Any

import typer

from ..option_checks import checked_options
from ..options import RULES


def flag(name: str) -> str:
    """The flag of a parameter: ``--batch-size`` of ``batch_size``."""
    return f"--{name.replace('_', '-')}"


def require_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ``typer.BadParameter``, which names the flag, for a value that is not among the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise typer.BadParameter(f"expected one of {', '.join(allowed)}, got {value!r}", param_hint=flag(name))


def require_finite(name: str, value: float) -> None:
    """Raise ``typer.BadParameter``, which names the flag, for infinity and NaN."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}", param_hint=flag(name))


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
