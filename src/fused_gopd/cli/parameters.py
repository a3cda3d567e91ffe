"""Checks of command-line parameters that several commands share."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def flag(name: str) -> str:
    """The flag of a parameter: ``--batch-size`` of ``batch_size``."""
    return f"--{name.replace('_', '-')}"


def require_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ``typer.BadParameter``, which names the flag, for a value that is not among the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise typer.BadParameter(f"expected one of {', '.join(allowed)}, got {value!r}", param_hint=flag(name))
