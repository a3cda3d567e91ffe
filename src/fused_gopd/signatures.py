"""Functions of one object that are called with the arguments that make it."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
C = TypeVar("C")
R = TypeVar("R")


def called_as(kind: Callable[P, C]) -> Callable[[Callable[[C], R]], Callable[P, R]]:
    """A function of one object, called with the arguments that make the object.

    ``inspect.signature``, ``typing.get_type_hints``, ``help()``, type checkers and compilers see the arguments of
    ``kind``, a class.
    """

    def decorate(function: Callable[[C], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(kind(*args, **kwargs))

        signature, own = inspect.signature(kind), inspect.signature(function)
        call.__signature__ = signature.replace(return_annotation=own.return_annotation)  # type: ignore[attr-defined]
        # of __init__, not of the class: Python 3.10 takes the line "_: KW_ONLY" of a dataclass for no type
        types = typing.get_type_hints(kind.__init__)
        call.__annotations__ = {name: types[name] for name in signature.parameters}
        call.__annotations__["return"] = typing.get_type_hints(function)["return"]
        return call

    return decorate
