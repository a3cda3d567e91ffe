"""Checks of Python values that raise with the name of the argument, what was expected and what was found.

Imported without PyTorch: the command line shows and checks options before it computes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch


def is_tensor(x: object) -> TypeGuard[torch.Tensor]:
    if isinstance(x, (int, float)):  # without asking PyTorch
        return False
    import torch

    return isinstance(x, torch.Tensor)


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def require_number(name: str, value: object) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def require_count(name: str, value: object, least: int = 1) -> int:
    """A Python int of at least 1, or of another number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def number_that(holds: Callable[[float], bool], must_be: str) -> Callable[[str, Any], float]:
    """A check of a number for which something holds; ``must_be`` says it in words."""

    def check(name: str, value: object) -> float:
        number = require_number(name, value)
        if not holds(number):
            raise ValueError(f"{name} must {must_be}, got {number}")
        return number

    return check


require_positive = number_that(lambda x: x > 0, "be positive")
require_not_negative = number_that(lambda x: x >= 0, "not be negative")


def require_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def require_function(name: str, value: object) -> object:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")
    return value


def require_dtype(name: str, value: object) -> torch.dtype:
    import torch

    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {type(value).__name__}")
    return value


def epsilons(name: str, value: object) -> tuple[float, float]:
    """(epsilon_low, epsilon_high) of a clip."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (epsilon_low, epsilon_high), got {value!r}")
    low, high = (require_number(name, x) for x in value)
    if not 0 <= low <= 1 or high < 0:
        raise ValueError(f"{name} must satisfy 0 <= epsilon_low <= 1 and epsilon_high >= 0, got {value!r}")
    return low, high


def bounds(name: str, value: object) -> tuple[float, float]:
    """(low, high) of a bound on the magnitude, or of a pair."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise TypeError(f"{name} must be a number or a pair (low, high), got {value!r}")
        low, high = (require_number(name, x) for x in value)
    else:
        high = require_number(name, value)
        low = -high
    if low >= high:
        raise ValueError(f"{name} must be a positive number or a pair with low < high, got {value!r}")
    return low, high


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Raise TypeError for the first name that is not allowed; ``what`` says what it is not, with its article."""
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise TypeError(f"{unknown[0]} is not {what}; expected one of {', '.join(sorted(allowed))}")
