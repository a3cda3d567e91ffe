"""Texts of which every token has been scored, and how any character of them is shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A prompt and a completion, with numbers for each of the completion's tokens.

    Attributes:
        title: what the page calls it, such as ``"prompt 3"``.
        prompt: its text.
        tokens: the completion's T tokens as texts. A token that is a part of a character is an empty text, and the one
            that completes the character has it whole.
        student, teacher, ref: log-probs (T,) of these tokens by each model; None for a model that is not there.
        entropy: of the student at each token's position (T,), in nats.
        advantage: as the loss used it (T,).

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was found.
    """

    title: str
    prompt: str
    tokens: Sequence[str]
    student: Sequence[float] | None = None
    teacher: Sequence[float] | None = None
    ref: Sequence[float] | None = None
    entropy: Sequence[float] | None = None
    advantage: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("title", "prompt"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a str, got {type(value).__name__}")
        if isinstance(self.tokens, str):
            raise TypeError("tokens must be a sequence of str, one for each token, got a str")
        for i, token in enumerate(self.tokens):
            if not isinstance(token, str):
                raise TypeError(f"tokens must be str, got {type(token).__name__} at {i}")
        for name in ("student", "teacher", "ref", "entropy", "advantage"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != len(self.tokens):
                raise ValueError(f"{name} must have a number for each of {len(self.tokens)} tokens, got {len(values)}")
            try:
                object.__setattr__(self, name, tuple(map(float, values)))
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} must have numbers: {error}") from None


# Characters that are left out, move others, or have no glyph: controls, bidi formatting, surrogates, private use.
# Joiners (U+200C, U+200D), variation selectors and tags stay: emoji and several scripts are written with them.
_KEPT = frozenset("\n\t\u200c\u200d")
_SPECIAL = re.compile(r"[^\n\t -~\u00a1-\u0377\u3041-\u9fff\uac00-\ud7a3]")  # all others are looked up


def _shown(match: re.Match[str]) -> str:
    character = match.group()
    if character in _KEPT:
        return character
    kind = unicodedata.category(character)
    emoji_tag = "\U000e0020" <= character <= "\U000e007f"
    if kind in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") or (kind == "Cf" and not emoji_tag):
        return _code(character)
    return character


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


def visible(text: str) -> str:
    """The text with the code of each character that has no glyph or moves others: ⟨U+0000⟩, ⟨U+202E⟩.

    Line breaks and tabs stay.
    """
    return _SPECIAL.sub(_shown, text)


def token_text(token: str) -> str:
    """A token as the page shows it: its line breaks are seen, and so is one that has no width."""
    if token and all(
        unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f" for character in token
    ):
        return "".join(map(_code, token))
    return visible(token).replace("\n", "↵\n").replace("\t", "⇥\t") or "⋯"
