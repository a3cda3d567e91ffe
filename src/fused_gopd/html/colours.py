"""Which numbers of a token can colour it, and in which of nine colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..pictures import DARK, PAGE
from .texts import ScoredText

Values = Sequence[float]
LEVELS = 9


def _difference(a: Values | None, b: Values | None) -> Values | None:
    return None if a is None or b is None else [x - y for x, y in zip(a, b, strict=True)]


def _negative(values: Values | None) -> Values | None:
    return None if values is None else [-x for x in values]


@dataclass(frozen=True)
class Quantity:
    """A number of each token. ``key`` is a letter of the page's class names."""

    key: str
    title: str
    sign: str  # what one of the readout is called
    signed: bool  # diverging colours around 0, or sequential ones from 0
    of: Callable[[ScoredText], Values | None]


QUANTITIES = (
    Quantity("a", "advantage A", "A", True, lambda text: text.advantage),
    Quantity("r", "reward log q − log r", "log q − log r", True, lambda text: _difference(text.teacher, text.ref)),
    Quantity("d", "teacher against student, log q − log p", "log q − log p", True,
             lambda text: _difference(text.teacher, text.student)),
    Quantity("e", "entropy H of the student", "H", False, lambda text: text.entropy),
    Quantity("s", "surprise of the student, −log p", "−log p", False, lambda text: _negative(text.student)),
)  # fmt: skip

# Positive numbers are blue, negative ones orange: colour-blind readers tell them apart. Sequential colours differ in
# lightness. The strongest of each, by mode: the text has a contrast of 4.5 at least on all of them.
_ENDS = {
    "light": {"positive": "#4a98dc", "negative": "#e08214", "sequential": "#a57fe3"},
    "dark": {"positive": "#1f66b5", "negative": "#9c5a0a", "sequential": "#6b46b8"},
}


def _blend(page: str, end: str, share: float) -> str:
    a, b = (bytes.fromhex(colour[1:]) for colour in (page, end))
    return "#" + bytes(round(x + share * (y - x)) for x, y in zip(a, b, strict=True)).hex()


def palette(mode: str, signed: bool) -> list[str]:
    """The colours of the levels, for ``"light"`` or ``"dark"`` mode."""
    page, ends = DARK[PAGE] if mode == "dark" else PAGE, _ENDS[mode]
    if not signed:
        return [_blend(page, ends["sequential"], i / (LEVELS - 1)) for i in range(LEVELS)]
    half = LEVELS // 2
    return [_blend(page, ends["negative" if i < half else "positive"], abs(i - half) / half) for i in range(LEVELS)]


@dataclass(frozen=True)
class Scale:
    """Levels of a quantity: the nearest of nine numbers that are ``unit`` apart."""

    quantity: Quantity
    unit: float

    @property
    def lowest(self) -> int:
        return -(LEVELS // 2) if self.quantity.signed else 0

    def level(self, value: float) -> int | None:
        """0 to 8; None for NaN. Beyond the ends, the end."""
        if math.isnan(value):
            return None
        steps = max(-LEVELS, min(LEVELS, value / self.unit))  # before round: infinity
        return max(0, min(LEVELS - 1, round(steps) - self.lowest))

    def labels(self) -> list[str]:
        """The numbers of the levels, the ends with ≤ and ≥."""
        texts = [signed(i * self.unit) if self.quantity.signed else plain(i * self.unit) for i in self._steps()]
        return [("≤ " if i == 0 and self.quantity.signed else "≥ " if i == LEVELS - 1 else "") + text
                for i, text in enumerate(texts)]  # fmt: skip

    def _steps(self) -> range:
        return range(self.lowest, self.lowest + LEVELS)


def scale_of(quantity: Quantity, texts: Iterable[ScoredText]) -> Scale | None:
    """A scale that 95 % of the tokens of all texts are within; None where no text has the quantity."""
    there = [values for values in map(quantity.of, texts) if values is not None]
    sizes = sorted(abs(x) for values in there for x in values if math.isfinite(x))
    if not there:
        return None
    largest = sizes[math.ceil(0.95 * len(sizes)) - 1] if sizes else 0.0
    return Scale(quantity, _round_up(largest / (LEVELS // 2 if quantity.signed else LEVELS - 1)) or 0.25)


def _round_up(x: float) -> float:
    """The next of ..., 0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, ...; 0 for 0."""
    if x == 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(x))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= x * (1 - 1e-9))


# ------------------------------------------------------------------------------------------------- numbers as texts


def plain(x: float) -> str:
    """Up to four significant digits; – for NaN."""
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    text = f"{x:.3f}".rstrip("0").rstrip(".") if 1e-2 <= abs(x) < 1000 else f"{x:.4g}"
    return text.replace("-", "−")


def signed(x: float) -> str:
    """The same with a plus before positive numbers."""
    return ("+" if x > 0 else "") + plain(x)
