"""Tokenizers by the bytes that their tokens stand for, and the vocabulary that two of them have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# a sequence for a tokenizer that puts a space before a text: encoded in front of the text, and cut off again
_SENTINELS = ("\n", "0", "~")
_PROBE = "The quick brown fox (twice): naïve 北京 \U0001f642\n x = 12345"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: the character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _kinds(part: Any) -> set[str]:
    """The types of a decoder or pre-tokenizer of the library ``tokenizers``, and of all that it consists of."""
    if part is None:
        return set()
    found: set[str] = set()
    queue = [json.loads(part.__getstate__())]
    while queue:
        entry = queue.pop()
        if isinstance(entry, dict):
            found |= {entry["type"]} if isinstance(entry.get("type"), str) else set()
            found |= {"▁"} if entry.get("pattern") == {"String": "▁"} else set()
            queue.extend(entry.values())
        elif isinstance(entry, list):
            queue.extend(entry)
    return found


def _scheme(tokenizer: Any, name: str) -> str:
    """How the tokenizer's vocabulary writes bytes: "byte-level" (GPT-2's alphabet), "sentencepiece" or "bytes"."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if isinstance(tokenizer.convert_ids_to_tokens(0), bytes):
            return "bytes"
        if hasattr(tokenizer, "byte_decoder"):
            return "byte-level"
    else:
        decoder = _kinds(backend.decoder)
        if "ByteLevel" in decoder or (not decoder and "ByteLevel" in _kinds(backend.pre_tokenizer)):
            return "byte-level"
        if decoder & {"Metaspace", "ByteFallback", "▁"}:
            return "sentencepiece"
    raise ValueError(
        f"the tokenizer of {name}, {type(tokenizer).__name__}, does not say which bytes its tokens stand for: aligned "
        "are byte-level BPE (GPT-2's alphabet), SentencePiece (▁, byte fallback) and vocabularies of bytes (tiktoken)"
    )


def _bytes_of(token: Any, scheme: str) -> bytes:
    if isinstance(token, bytes):
        return token
    if scheme == "sentencepiece":
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("▁", " ").encode()
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return str(token).encode()  # text that was added to the vocabulary as it is


def token_bytes(tokenizer: Any, name: str = "the model") -> list[bytes | None]:
    """The bytes of each token, by its id; None for special tokens, which stand for no text, and for unused ids.

    Args:
        tokenizer: of transformers.
        name: whose it is, for messages.

    Raises:
        ValueError: a tokenizer whose tokens do not spell the texts that it encodes.
    """
    scheme = _scheme(tokenizer, name)
    vocabulary = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        table[i] = _bytes_of(token, scheme)
    for i, added in tokenizer.added_tokens_decoder.items():
        if i < len(table):  # an added token is written as its text
            table[i] = None if added.special else added.content.encode()
    for i in tokenizer.all_special_ids:
        if 0 <= i < len(table):
            table[i] = None
    ids = encode(tokenizer, [_PROBE])[0]
    spelled = b"".join(table[i] or b"" for i in ids)
    if spelled.removeprefix(b" ") != _PROBE.encode():
        raise ValueError(
            f"the tokens of the tokenizer of {name} do not spell what it encodes: {_PROBE!r} becomes "
            f"{spelled.decode(errors='replace')!r}, so that its tokens cannot be compared with another tokenizer's"
        )
    return table


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that contain no special token, even where they spell one."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]


class Vocabulary:
    """A tokenizer with the bytes of its tokens, its special tokens by their texts, and its terminators."""

    def __init__(self, tokenizer: Any, name: str, terminators: Sequence[int] | None) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.bytes = token_bytes(tokenizer, name)
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = {i: tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids}
        self.special_texts = {i: str(text) for i, text in {**named, **added}.items()}
        self.special = {text: i for i, text in self.special_texts.items()}
        # the token of each byte, of those that have one
        self.single_bytes = {piece[0]: i for piece, i in _canonical(self).items() if len(piece) == 1}
        self.turn_end = _turn_end(tokenizer)
        ends = [self.turn_end, tokenizer.eos_token_id, *(terminators or ())]
        self.terminators = [i for i in dict.fromkeys(ends) if i is not None]
        first = self.spelled(encode(tokenizer, ["x"])[0])
        self._puts_space = first == b" x"

    def spelled(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes[i] or b"" for i in ids)

    def terminator(self, conversational: bool) -> int | None:
        """The token that ends an answer."""
        return self.turn_end if conversational and self.turn_end is not None else self.tokenizer.eos_token_id

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that go on with a text before them: without the space that SentencePiece puts in front."""
        found = encode(self.tokenizer, texts)
        if not self._puts_space:
            return found
        open_ = [n for n, ids in enumerate(found) if self.spelled(ids) != texts[n].encode()]
        for sentinel in _SENTINELS:
            front = b" " + sentinel.encode()
            tried = encode(self.tokenizer, [sentinel + texts[n] for n in open_])
            left = []
            for n, ids in zip(open_, tried, strict=True):
                cut = next((j for j in range(len(ids)) if self.spelled(ids[:j]) == front), None)
                if cut is not None and self.spelled(ids[cut:]) == texts[n].encode():
                    found[n] = ids[cut:]
                else:
                    left.append(n)
            open_ = left
        return found


def _turn_end(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant's answer; None without a template, or such a token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "kwijibo"}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # templates may raise any exception
        return None
    after = text.rpartition("kwijibo")[2].lstrip()
    found = [i for i, token in tokenizer.added_tokens_decoder.items() if after.startswith(token.content)]
    return max(found, key=lambda i: len(tokenizer.added_tokens_decoder[i].content), default=None)


def vocab_map_of(
    student: Any, teacher: Any, *, size: int | None = None, student_name: str = "the student", name: str = "the teacher"
) -> Tensor:
    """(V,) int64, the teacher's id of each of the student's tokens; -1 where the teacher has no such token.

    It is the ``vocab_map`` of the teacher's :class:`fused_gopd.LinearHead`.

    Two tokens are the same if they stand for the same bytes. Special tokens are the same if they have one role (the end
    of a turn in the chat template, the end of a text, its beginning, padding), or else one text. No id of the teacher
    is given twice.

    Args:
        student, teacher: tokenizers of transformers.
        size: V, the student's logits; by default the ids of its tokenizer. Rows beyond those have -1.
    """
    ours, theirs = Vocabulary(student, student_name, None), Vocabulary(teacher, name, None)
    return rows_of(ours, theirs, size)


def rows_of(ours: Vocabulary, theirs: Vocabulary, size: int | None) -> Tensor:
    rows = [-1] * (len(ours.bytes) if size is None else size)
    used: set[int] = set()

    def pair(i: int | None, j: int | None) -> None:
        if i is not None and j is not None and i < len(rows) and rows[i] < 0 and j not in used:
            rows[i] = j
            used.add(j)

    pair(ours.turn_end, theirs.turn_end)
    for role in ("eos_token_id", "bos_token_id", "pad_token_id"):
        pair(getattr(ours.tokenizer, role), getattr(theirs.tokenizer, role))
    for text, i in ours.special.items():
        pair(i, theirs.special.get(text))
    named = _canonical(theirs)
    for piece, i in _canonical(ours).items():
        pair(i, named.get(piece))
    return torch.tensor(rows, dtype=torch.int64)


def _canonical(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The token of each byte string. Of several it is the one that is no byte fallback, else the first."""
    found: dict[bytes, int] = {}
    fallbacks: dict[bytes, int] = {}
    tokens = vocabulary.tokenizer.convert_ids_to_tokens(list(range(len(vocabulary.bytes))))
    for i, (piece, token) in enumerate(zip(vocabulary.bytes, tokens, strict=True)):
        if piece:
            fallback = isinstance(token, str) and token.startswith("<0x") and len(piece) == 1
            (fallbacks if fallback else found).setdefault(piece, i)
    return {**fallbacks, **found}
