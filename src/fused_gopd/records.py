"""Data classes that every call or every chunk makes, and some whose fields are computed when they are first read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(**options):
        """``dataclass``, where ``frozen=True`` is for type checkers alone; hashable as a frozen one.

        At run time a frozen dataclass calls ``object.__setattr__`` for each field: 20 us of a call of the loss.
        """
        return dataclasses.dataclass(**options | {"frozen": False, "unsafe_hash": options.get("eq", True)})


C = TypeVar("C", bound="ComputedWhenRead")


class ComputedWhenRead:
    """The base of a dataclass whose fields may be computed when they are first read. A default is a factory."""

    @classmethod
    def computed_by(cls: type[C], compute: Callable[[str], Any], names: Collection[str], **known: Any) -> C:
        """One whose fields ``names`` are computed when they are read; those neither there nor known are None."""
        out = object.__new__(cls)
        out.__dict__.update(known, _compute=compute, _computed=names)
        return out

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in self.__dataclass_fields__ or "_compute" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            value = self.__dict__[name] = self._compute(name) if name in self._computed else None
            return value


def none() -> None:
    """A default that is no attribute of the class: one of those would be found before ``__getattr__``."""


__all__ = ["ComputedWhenRead", "none", "record"]
