"""The text of each token of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # how decoders write bytes that are no whole character
_LONGEST = 4  # bytes of a character, and so the most tokens that it may have


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """T texts, of special tokens too, that spell the whole when they are joined.

    A token that is a part of a character has an empty text, and the one that completes it has the whole character.
    """
    texts = []
    begin, end = 0, 0  # the tokens of the last text, which the decoder may need to see, are ids[begin:end]
    for i in range(len(ids)):
        before, now = (_decoded(tokenizer, ids[begin:stop]) for stop in (end, i + 1))
        if now.endswith(_UNFINISHED) and i + 1 - end < _LONGEST and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        begin, end = end, i + 1
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
