"""The rule of one argument: what is checked of it alone, and in which it has to agree over ranks."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .values import one_of


class Agree(enum.Enum):
    """How ranks that share a vocabulary agree in an argument, or in a field of a model."""

    OPTION = "a Python value, the same on all ranks"
    NUMBERS = "a number or a tensor, the same in every entry"
    TOKENS = "a number or a tensor, the same at every live token"
    ROUNDED = "a tensor, the same at every live token but for rounding: layers below may sum in another order"
    GIVEN = "given on all ranks or on none: a function, or a rank's own rows of a weight"
    MODELS = "a model or a list of them, field by field"
    SHARD = "the same cut of the vocabulary"
    OWN = "each rank's own affair"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What holds for one argument, whatever the others are.

    Attributes:
        help: one line.
        agree: how ranks that share a vocabulary agree in it.
        of: the estimators that have the option; empty for all of them.
        needs: the argument without which the option has nothing to act on, and ``because``, the end of that sentence.
        choices: the strings that it may be.
        parameter: whether it is the parameter of some divergences; the classes that name it have its range.
        check: (name, value) -> the value in its normal form; raises TypeError or ValueError.
        held: whether :class:`fused_gopd.GOPDLoss` holds it, and whether its ``forward`` takes it: ``per_batch``.
    """

    help: str
    agree: Agree = Agree.OPTION
    of: tuple[str, ...] = ()
    needs: str | None = None
    because: str = ""
    choices: Collection[str] = ()
    parameter: bool = False
    check: Callable[[str, Any], Any] | None = None
    held: bool = True
    per_batch: bool = False

    def checked(self, name: str, value: Any) -> Any:
        """The value in its normal form."""
        if self.choices:
            one_of(name, value, self.choices)
        return value if self.check is None else self.check(name, value)

    def require_estimator(self, name: str, estimator: str) -> None:
        """Raise where ``estimator`` does not have the option."""
        if self.of and estimator not in self.of:
            own = " or ".join(map(repr, self.of))
            raise ValueError(f"{name} is an option of estimator={own}, got estimator={estimator!r}")


def option(help: str, **rule: Any) -> dict[str, Rule]:
    """The metadata of a field that holds a Python value."""
    return {"rule": Rule(help=help, **rule)}


def batch(help: str, agree: Agree, **rule: Any) -> dict[str, Rule]:
    """The metadata of a field that holds the models or tensors of a batch."""
    return {"rule": Rule(**{"help": help, "agree": agree, "held": False, "per_batch": True, **rule})}
