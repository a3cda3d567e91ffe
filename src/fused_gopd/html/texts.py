"""Texts of which every token has been scored, and how any character of them is shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A prompt and a completion, with numbers for each of the completion's tokens.

    Attributes:
        title: what the page calls it, such as ``"prompt 3"``.
        prompt: its text, as the student reads it.
        teacher_prompt, ref_prompt: what teacher and reference read in its place; None where they read the same.
        tokens: the completion's T tokens as texts. A token that is a part of a character is an empty text, and the one
            that completes the character has it whole.
        student, teacher, ref: log-probs (T,) of these tokens by each model; None for a model that is not there,
            NaN for a token that has not been scored.
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
    teacher_prompt: str | None = None
    ref_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("title", "prompt", "teacher_prompt", "ref_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name.endswith("_prompt")):
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


class _Shown(dict[int, str]):
    """What each character is shown as, by its code, for ``str.translate``.

    Controls, bidi formatting, surrogates, private use and unassigned codes have no glyph or move other characters.
    Joiners and tags stay, although they are formatting: emoji and several scripts are written with them.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)
        kept = character in "\n\t\u200c\u200d" or "\U000e0020" <= character <= "\U000e007f"
        hidden = kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and not kept
        return self.setdefault(code, _code(character) if hidden else character)


_SHOWN = _Shown()


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


def visible(text: str) -> str:
    """The text with the code of each character that has no glyph or moves others: ⟨U+0000⟩, ⟨U+202E⟩.

    Line breaks and tabs stay.
    """
    return text.translate(_SHOWN)


def token_text(token: str) -> str:
    """A token as the page shows it: its line breaks are seen, and so is one that has no width."""
    if token and all(
        unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f" for character in token
    ):
        return "".join(map(_code, token))
    return visible(token).replace("\n", "↵\n").replace("\t", "⇥\t") or "⋯"
