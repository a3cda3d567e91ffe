"""Data classes that every call or every chunk makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    import dataclasses

    def record(**options):
        """``dataclass``, where ``frozen=True`` is for type checkers alone; hashable as a frozen one.

        At run time a frozen dataclass calls ``object.__setattr__`` for each field: 20 us of a call of the loss.
        """
        return dataclasses.dataclass(**options | {"frozen": False, "unsafe_hash": options.get("eq", True)})


__all__ = ["record"]
