"""A teacher or reference with a tokenizer of its own: its scores of a text, at the tokens of the student.

The student's tokens and the teacher's are compared by their bytes. :class:`TokenizerPair` encodes the student's
completions for the teacher and finds the spans, minimal stretches of bytes that begin and end with a token of both.
:class:`Alignment` has what the teacher reads, and carries its scores to the student's tokens. :func:`vocab_map_of` is
the vocabulary that both have. ``docs/tokenizers.md`` has the method.
"""

from __future__ import annotations

from .alignment import Alignment
from .pairs import TokenizerPair
from .vocabulary import token_bytes, vocab_map_of

__all__ = ["Alignment", "TokenizerPair", "token_bytes", "vocab_map_of"]
