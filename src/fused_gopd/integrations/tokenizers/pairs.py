"""Encodes the student's completions for another tokenizer's model, and aligns the tokens of both by bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...checks import require_integer, require_mask
from .alignment import Alignment
from .vocabulary import Vocabulary, encode, rows_of


def texts_of(prompts: Sequence[Any]) -> list[str]:
    """The texts of prompts: they themselves, or the contents of their messages."""
    found = []
    for prompt in prompts:
        contents = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
        found += [content for content in contents if isinstance(content, str)]
    return found


class TokenizerPair:
    """The student's tokenizer and that of a teacher or reference, with what their tokens have in common.

    Args:
        student, teacher: tokenizers of transformers: byte-level BPE, SentencePiece, or with bytes for tokens.
        name: whose tokenizer the second one is, for messages.
        terminators: the ids that end the student's generation beside its tokenizer's, such as
            ``generation_config.eos_token_id``. The last token of a completion that is one of them is the other model's
            own end: that of its chat template for prompts of messages, else its ``eos_token``.
        chat_template_kwargs: for the other tokenizer's chat template.

    Raises:
        ValueError: a tokenizer that does not say which bytes its tokens stand for.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        name: str = "the teacher",
        terminators: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._ours = Vocabulary(student, "the student", terminators)
        self._theirs = Vocabulary(teacher, name, None)
        self._template = dict(chat_template_kwargs or {})

    def vocab_map(self, size: int | None = None) -> Tensor:
        """(V,) int64, as :func:`vocab_map_of`."""
        return rows_of(self._ours, self._theirs, size)

    def common(self, texts: Sequence[str]) -> dict[str, float]:
        """What the two have in common, as fractions.

        Args:
            texts: of what the student will write, such as answers or prompts; without texts only ``vocabulary``.

        Returns:
            ``vocabulary``: of the student's tokens, those that the other one has. Of the student's tokens in the texts:
            ``tokens`` those in spans, ``single`` those that are a span alone, ``states`` those before which both have a
            boundary, ``common`` those of them that the other one has, too; ``bytes`` in spans.
        """
        mapped = self.vocab_map() >= 0
        found = {"vocabulary": float(mapped.float().mean())}
        ids = encode(self._ours.tokenizer, [text for text in texts if text])
        if not ids:
            return found
        width = max(len(x) for x in ids)
        token_ids = torch.tensor([x + [0] * (width - len(x)) for x in ids])
        mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in ids])
        aligned = self.align(["x"] * len(ids), token_ids, mask)
        spans, states = aligned.counts(mask), aligned.counts(mask, states=True)
        common = aligned.counts(mask * mapped[token_ids], states=True)
        found["tokens"] = spans["aligned_tokens"] / spans["tokens"]
        found["single"] = spans["single_tokens"] / spans["tokens"]
        found["states"] = states["aligned_tokens"] / spans["tokens"]
        found["common"] = common["aligned_tokens"] / spans["tokens"]
        return found | {"bytes": spans["aligned_bytes"] / max(spans["bytes"], 1)}

    def describe(self, texts: Sequence[str]) -> str:
        """What :meth:`common` found, as a sentence."""
        found = {name: f"{100 * x:.1f} %" for name, x in self.common(texts).items()}
        told = f"The tokenizer of {self.name} has {found['vocabulary']} of the student's tokens"
        if "tokens" not in found:
            return told + "."
        return (
            f"{told}. Of those in {len(texts)} prompts {found['tokens']} are in spans of the same bytes (for "
            f"'sampled'), {found['single']} in a span of their own; {found['common']} are tokens of both that begin "
            "where a token of both begins (for 'full' and 'topk')."
        )

    def align(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> Alignment:
        """Encode prompts and completions for the other model, and align its tokens with the student's.

        Args:
            prompts: B texts, which its tokenizer encodes, or lists of messages, which its chat template renders. They
                may differ from what the student read: only completions are compared.
            completion_ids: (B, K) the student's completions.
            completion_mask: (B, K), 0 at padding. Of a sequence without a 1 the prompt is not encoded either.

        Returns:
            An alignment on ``completion_ids``' device.

        Raises:
            ValueError: prompts of messages and no chat template, or one that refuses them; a prompt without tokens.
        """
        require_integer("completion_ids", completion_ids)
        live = require_mask("completion_mask", completion_mask)
        if completion_ids.ndim != 2 or live.shape != completion_ids.shape or len(prompts) != len(completion_ids):
            raise ValueError(
                "completion_ids and completion_mask must have one shape (B, K), with B prompts, got "
                f"{tuple(completion_ids.shape)}, {tuple(live.shape)} and {len(prompts)} prompts"
            )
        ids, kept = completion_ids.tolist(), live.tolist()
        places = [[k for k, keep in enumerate(row) if keep] for row in kept]
        wanted = [row for row, at in enumerate(places) if at]
        chats = {row: not isinstance(prompts[row], str) for row in wanted}
        fronts = {row: self._prompt_ids(prompts[row], row) for row in wanted}
        pieces = {row: self._pieces([ids[row][k] for k in places[row]], chats[row]) for row in wanted}
        texts = [part for row in wanted for piece in pieces[row] for _, part in piece.parts() if isinstance(part, str)]
        encoded = iter(self._theirs.continuations(texts))
        found = {row: _joined(pieces[row], encoded, self._theirs) for row in wanted}
        return self._padded(completion_ids, places, fronts, found)

    def _prompt_ids(self, prompt: str | Sequence[Mapping[str, Any]], row: int) -> list[int]:
        tokenizer = self._theirs.tokenizer
        if isinstance(prompt, str):
            ids = list(tokenizer(prompt, verbose=False)["input_ids"])
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError(
                    f"prompts are lists of messages, and the tokenizer of {self.name} has no chat template: give "
                    "prompts as texts, or a tokenizer with a template"
                )
            try:
                options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **self._template}
                ids = list(tokenizer.apply_chat_template(list(prompt), **options)["input_ids"])
            except Exception as error:  # templates may raise any exception
                raise ValueError(
                    f"prompt {row} is not taken by the chat template of {self.name}: {type(error).__name__}: {error}"
                ) from error
        if not ids:
            raise ValueError(
                f"prompt {row} has no tokens for {self.name}: nothing predicts the first token of its completion"
            )
        return ids

    def _pieces(self, ids: list[int], chat: bool) -> list[_Piece]:
        """A completion as stretches of text, and special tokens."""
        ours, theirs = self._ours, self._theirs
        pieces: list[_Piece] = []
        for k, i in enumerate(ids):
            text = ours.special_texts.get(i, "")
            piece = ours.bytes[i] if 0 <= i < len(ours.bytes) else None
            last = k == len(ids) - 1 and i in ours.terminators
            if piece is None and text and text not in theirs.special and not last:
                piece = text.encode()  # the other model reads it as text: to mask it would make it free
            if piece is None or last:
                pieces.append(_Piece([k], [b""], theirs.terminator(chat) if last else theirs.special.get(text)))
            elif pieces and not pieces[-1].is_special:
                pieces[-1].places.append(k)
                pieces[-1].spelled.append(piece)
            else:
                pieces.append(_Piece([k], [piece]))
        return pieces

    def _padded(
        self,
        completion_ids: Tensor,
        places: list[list[int]],
        fronts: dict[int, list[int]],
        found: dict[int, _Found],
    ) -> Alignment:
        rows, width = completion_ids.shape
        front = max((len(x) for x in fronts.values()), default=1)
        back = max((len(x.ids) for x in found.values()), default=1) or 1
        pad = self._theirs.tokenizer.pad_token_id
        out = Alignment(
            input_ids=torch.full((rows, front + back), 0 if pad is None else pad),
            attention_mask=torch.zeros(rows, front + back, dtype=torch.int64),
            completion_mask=torch.zeros(rows, back, dtype=torch.int64),
            spans=torch.full((rows, width), -1),
            other_spans=torch.full((rows, back), -1),
            states=torch.full((rows, width), -1),
            nbytes=torch.zeros(rows, width, dtype=torch.int64),
        )
        for row, one in found.items():
            begin, end = front - len(fronts[row]), front + len(one.ids)
            out.input_ids[row, begin:end] = torch.tensor(fronts[row] + one.ids)
            out.attention_mask[row, begin:end] = 1
            out.other_spans[row, : len(one.ids)] = torch.tensor(one.other_spans)
            at = torch.tensor(places[row])
            out.spans[row, at] = torch.tensor(one.spans)
            out.states[row, at] = torch.tensor(one.states)
            out.nbytes[row, at] = torch.tensor(one.nbytes)
        out.completion_mask.copy_(out.other_spans >= 0)
        at_row, at_place = (out.states >= 0).nonzero(as_tuple=True)
        # a token in no span, too: the first one that a normaliser changed
        out.completion_mask[at_row, out.states[at_row, at_place]] = 1
        return out.to(completion_ids.device)


@dataclass
class _Piece:
    """A stretch of a completion: tokens of text, or one special token."""

    places: list[int]  # in the completion
    spelled: list[bytes]  # of each token
    other: int | None = None  # the other model's id of a special token; None: it has none

    @property
    def is_special(self) -> bool:
        return self.spelled == [b""] and len(self.places) == 1

    def parts(self) -> Iterator[tuple[int, str | bytes]]:
        """(first byte, text) of what is UTF-8, and (first byte, bytes) of what is not."""
        data, begin = b"".join(self.spelled), 0
        while begin < len(data):
            try:
                yield begin, data[begin:].decode()
                return
            except UnicodeDecodeError as error:
                if error.start:
                    yield begin, data[begin : begin + error.start].decode()
                yield begin + error.start, data[begin + error.start : begin + error.end]
                begin += error.end

    def is_cut(self, begin: int) -> bool:
        """Whether the piece ends with a character that begins at a byte and of which more may have followed."""
        try:
            b"".join(self.spelled)[begin:].decode()
        except UnicodeDecodeError as error:
            return error.reason == "unexpected end of data"
        return False


@dataclass
class _Found:
    """The aligned tokens of one completion: fields as in :class:`Alignment`."""

    ids: list[int]
    spans: list[int]
    other_spans: list[int]
    states: list[int]
    nbytes: list[int]


def _joined(pieces: Sequence[_Piece], encoded: Iterator[list[int]], theirs: Vocabulary) -> _Found:
    """Align a completion piece by piece. ``encoded`` has the other model's ids of each text, in order."""
    size = sum(len(piece.places) for piece in pieces)
    found = _Found([], [-1] * size, [], [-1] * size, [0] * size)
    count = 0
    for piece in pieces:
        for k, spelled in zip(piece.places, piece.spelled, strict=True):
            found.nbytes[k] = len(spelled)
        if piece.is_special:
            if piece.other is not None:
                found.spans[piece.places[0]] = count
                found.states[piece.places[0]] = len(found.ids)
                found.ids.append(piece.other)
                found.other_spans.append(count)
                count += 1
            continue
        ids: list[int] = []
        for begin, part in piece.parts():
            if isinstance(part, str):
                ids += next(encoded)
            elif piece is not pieces[-1] or not piece.is_cut(begin):
                # byte for byte: masked, what is no text would cost nothing
                ids += [theirs.single_bytes[byte] for byte in part if byte in theirs.single_bytes]
        count = _align_text(piece, ids, theirs, found, count)
    return found


def _boundaries(spelled: Sequence[bytes]) -> dict[int, int]:
    """The token that begins at each byte, and behind the last byte their number; of tokens without bytes the first."""
    found: dict[int, int] = {}
    begin = 0
    for n, piece in enumerate(spelled):
        found.setdefault(begin, n)
        begin += len(piece)
    found.setdefault(begin, len(spelled))
    return found


def _align_text(piece: _Piece, ids: list[int], theirs: Vocabulary, found: _Found, count: int) -> int:
    """Align the other model's tokens of a text; returns the number of spans so far.

    Where its tokens spell something else than the text (a normaliser, a space put in front), what is equal at both ends
    is aligned, and what is between them is not.
    """
    offset = len(found.ids)
    found.ids += ids
    found.other_spans += [-1] * len(ids)
    spelled = [theirs.bytes[i] or b"" for i in ids]
    data, text = b"".join(spelled), b"".join(piece.spelled)
    ours = _boundaries(piece.spelled)
    left = _common_prefix(data, text)
    right = min(_common_prefix(data[::-1], text[::-1]), min(len(data), len(text)) - left)
    shift = len(text) - len(data)  # from the other model's bytes to the student's, at the right end
    common: list[tuple[int, int, int, int]] = []  # byte and token of the student's, byte and token of the other's
    for at, j in _boundaries(spelled).items():
        if at <= left and at in ours:
            common.append((at, ours[at], at, j))
        elif at >= len(data) - right and shift + at in ours:
            common.append((shift + at, ours[shift + at], at, j))
    for _, i, _, j in common:
        if i < len(piece.places) and j < len(ids) and piece.spelled[i]:
            found.states[piece.places[i]] = offset + j
    for (a, i, b, j), (c, k, d, m) in pairwise(common):
        if c > a and text[a:c] == data[b:d]:
            for place in piece.places[i:k]:
                found.spans[place] = count
            found.other_spans[offset + j : offset + m] = [count] * (m - j)
            count += 1
    return count


def _common_prefix(a: bytes, b: bytes) -> int:
    if a == b:
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
