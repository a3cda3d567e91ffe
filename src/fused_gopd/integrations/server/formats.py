"""How each kind of server is asked for log-probs, and its answers: read strictly, since nothing is filled in.

A field that is missing, of another type (JSON's true and false are no numbers), out of range or there twice is an
:class:`UnexpectedAnswer`. The formats are those of the servers' sources: vLLM's ``prompt_logprobs``
(``entrypoints/openai/completion``), SGLang's ``/generate`` with ``logprob_start_len`` (``srt/managers/io_struct.py``),
and ``echo`` with ``logprobs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# What vLLM sends for a log-prob of -inf, which JSON does not have.
_MINUS_INFINITY = -9999.0
# A float32 log-softmax of logits below 100 is rounded at 1e-5; what is further above 0 is no log-prob.
_ABOVE_ZERO = 1e-4
# The sum of the probabilities of distinct tokens, as gopd_loss allows it: log-probs may be rounded to bfloat16.
_MOST_MASS = 1.1
_MOST_ID = 2**31 - 1


class UnexpectedAnswer(ValueError):
    """An answer that does not have the form that was asked for."""


@dataclass(frozen=True)
class ScoredSequence:
    """What a server says about the tokens of one sequence from ``start`` on.

    Attributes:
        logprobs: of each of these tokens; -inf where the server rules it out.
        top_ids, top_logprobs: the ``top_k`` likeliest tokens at each of these positions, the likeliest first; empty
            lists without ``top_k``.
    """

    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class Ask(NamedTuple):
    """What one request asks for."""

    model: str
    sequences: list[list[int]]
    start: list[int]  # the first position of each sequence whose log-prob is wanted; at least 1
    top_k: int  # 0: the tokens' own log-probs alone
    texts: bool  # also the tokens' texts, to compare tokenizers


class Position(NamedTuple):
    """One scored token: its id is what was asked for, its log-probs are not checked yet."""

    logprob: Any
    top: Mapping[int, Any]
    text: str | None


# ------------------------------------------------------------------------------------------------------ types and ids


def _require_list(name: str, listed: Any, *lengths: int) -> list[Any]:
    if listed is None:
        raise UnexpectedAnswer(f"{name} is null: the server does not return log-probs of the prompt")
    if not isinstance(listed, list):
        raise UnexpectedAnswer(f"{name} must be a list, got {listed!r}")
    if lengths and len(listed) not in lengths:
        raise UnexpectedAnswer(f"{name} must have {lengths[0]} entries, got {len(listed)}")
    return listed


def _require_object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnexpectedAnswer(f"{name} must be an object, got {value!r}")
    return value


def _require_text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UnexpectedAnswer(f"the text of a token must be a string, got {value!r}")
    return value


def _require_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_ID:
        raise UnexpectedAnswer(f"a token's id must be an integer of at least 0, got {value!r}")
    return value


def _written_id(text: str) -> int:
    """The id that a key of an object has: decimal digits, as a server writes them."""
    if not (text.isascii() and text.isdecimal()) or (text[0] == "0" and text != "0"):
        raise UnexpectedAnswer(f"a token's id must be an integer of at least 0, got {text!r}")
    return _require_id(int(text[:11]))


def _require_token(where: str, token_id: int | None, asked: int) -> None:
    """None where the format does not say which token it is."""
    if token_id is not None and token_id != asked:
        raise UnexpectedAnswer(f"{where} must be token {asked}, got token {token_id}")


def _place(which: int, position: int) -> str:
    return f"sequence {which}, position {position}"


# ---------------------------------------------------------------------------------------------------- the three formats


def _choices(answer: Any, ask: Ask) -> list[Any]:
    """In the order of the sequences."""
    choices = _require_list("choices", answer["choices"], len(ask.sequences))
    ordered: list[Any] = [None] * len(choices)
    for choice in choices:
        index = choice["index"]
        if type(index) is not int or not 0 <= index < len(choices) or ordered[index] is not None:
            raise UnexpectedAnswer(f"choices must have each index from 0 to {len(choices) - 1} once, got {index!r}")
        ordered[index] = choice
    return ordered


def _vllm_body(ask: Ask) -> dict[str, Any]:
    # one token has to be generated; the prompt's log-probs are those of the logits, whatever the temperature
    return {"model": ask.model, "prompt": ask.sequences, "max_tokens": 1, "prompt_logprobs": ask.top_k}


def _vllm_positions(answer: Any, ask: Ask) -> Iterator[list[Position]]:
    for which, (choice, ids, start) in enumerate(zip(_choices(answer, ask), ask.sequences, ask.start, strict=True)):
        listed = _require_list("prompt_logprobs", choice["prompt_logprobs"], len(ids))
        positions = []
        for place in range(start, len(ids)):
            where, token_id = _place(which, place), ids[place]
            entries = listed[place]
            if entries is None:
                raise UnexpectedAnswer(f"{where} has no log-prob (null)")
            entries = _require_object(f"{where} of prompt_logprobs", entries)
            top = {_written_id(key): _finite_or_minus_infinity(entry["logprob"]) for key, entry in entries.items()}
            if token_id not in top:
                raise UnexpectedAnswer(f"{where} must be token {token_id}, got token {next(iter(top), 'none')}")
            text = _require_text(entries[str(token_id)].get("decoded_token"))
            positions.append(Position(top[token_id], top, text))
        yield positions


def _sglang_body(ask: Ask) -> dict[str, Any]:
    return {
        "input_ids": ask.sequences,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # the first position in the answer has no log-prob, so it is one before what is wanted
        "logprob_start_len": [start - 1 for start in ask.start],
        "top_logprobs_num": ask.top_k,
        "return_text_in_logprobs": ask.texts,
    }


def _sglang_positions(answer: Any, ask: Ask) -> Iterator[list[Position]]:
    answers = _require_list("the list of answers", answer, len(ask.sequences))
    for which, (one, ids, start) in enumerate(zip(answers, ask.sequences, ask.start, strict=True)):
        wanted = len(ids) - start
        # releases differ in whether the position without a log-prob is listed: what is wanted is counted from the end
        listed = _require_list("input_token_logprobs", one["meta_info"]["input_token_logprobs"], wanted, wanted + 1)
        tops: list[Any] = [None] * wanted
        if ask.top_k:
            tops = _require_list("input_top_logprobs", one["meta_info"]["input_top_logprobs"], wanted, wanted + 1)
        positions = []
        for place, entry, top in zip(range(start, len(ids)), listed[-wanted:], tops[-wanted:], strict=True):
            logprob, token_id, text = _require_list("an entry of input_token_logprobs", entry, 3)
            _require_token(_place(which, place), _require_id(token_id), ids[place])
            pairs = [] if top is None else _require_list("an entry of input_top_logprobs", top)
            positions.append(Position(logprob, _by_id(_place(which, place), pairs), _require_text(text)))
        yield positions


def _by_id(where: str, pairs: Iterable[list[Any]]) -> dict[int, Any]:
    """SGLang's ``[log-prob, id, text]`` of the likeliest tokens by id."""
    found: dict[int, Any] = {}
    for pair in pairs:
        logprob, token_id = _require_list("a likeliest token", pair, 3, 2)[:2]
        if _require_id(token_id) in found:
            raise UnexpectedAnswer(f"{where} lists token {token_id} twice among the likeliest")
        found[token_id] = logprob
    return found


def _openai_body(ask: Ask) -> dict[str, Any]:
    return {
        "model": ask.model,
        "prompt": ask.sequences,
        "max_tokens": 0,
        "echo": True,
        "logprobs": max(1, ask.top_k),  # some servers take 0 for "none"
        "temperature": 1.0,
        "return_tokens_as_token_ids": not ask.texts,  # vLLM's extension, without which there are no ids
    }


def _openai_id(token: str) -> int | None:
    """The id in ``token_id:7``; None for the text of a token."""
    return _written_id(token.removeprefix("token_id:")) if token.startswith("token_id:") else None


def _openai_positions(answer: Any, ask: Ask) -> Iterator[list[Position]]:
    for which, (choice, ids, start) in enumerate(zip(_choices(answer, ask), ask.sequences, ask.start, strict=True)):
        listed = choice["logprobs"]
        if listed is None:
            raise UnexpectedAnswer("logprobs is null: the server does not return log-probs of the prompt")
        # servers that do not know max_tokens=0 generate a token, which comes last
        tokens = _require_list("logprobs.tokens", listed["tokens"], len(ids), len(ids) + 1)
        logprobs = _require_list("logprobs.token_logprobs", listed["token_logprobs"], len(tokens))
        tops: list[Any] = [None] * len(tokens)
        if ask.top_k and not ask.texts:
            tops = _require_list("logprobs.top_logprobs", listed["top_logprobs"], len(tokens))
        positions = []
        for place in range(start, len(ids)):
            token = _require_text(tokens[place])
            if token is None:
                raise UnexpectedAnswer(f"{_place(which, place)} has no token (null)")
            # a token may have the text "token_id:7"
            _require_token(_place(which, place), None if ask.texts else _openai_id(token), ids[place])
            top: dict[int, Any] = {}
            entries = {} if tops[place] is None else _require_object("an entry of top_logprobs", tops[place])
            for key, value in entries.items():
                listed_id = _openai_id(key)
                if listed_id is None:
                    raise UnexpectedAnswer(
                        "top_logprobs names tokens by their text, which does not say their ids (two ids may have one "
                        "text): top_k needs a server that knows return_tokens_as_token_ids, or api='vllm' or 'sglang'"
                    )
                top[listed_id] = _finite_or_minus_infinity(value)
            positions.append(Position(_finite_or_minus_infinity(logprobs[place]), top, token))
        yield positions


@dataclass(frozen=True)
class Format:
    """How one kind of server is asked, and read."""

    path: str
    body: Callable[[Ask], dict[str, Any]]
    positions: Callable[[Any, Ask], Iterator[list[Position]]]
    more_top: str  # what to do about a limit on top_k


FORMATS: dict[str, Format] = {
    "vllm": Format(
        "/v1/completions", _vllm_body, _vllm_positions, "start vLLM with --max-logprobs of at least top_k (default: 20)"
    ),
    "sglang": Format("/generate", _sglang_body, _sglang_positions, "ask for fewer"),
    "openai": Format(
        "/v1/completions", _openai_body, _openai_positions, "OpenAI's own limit is 5; vLLM's is --max-logprobs"
    ),
}


# ---------------------------------------------------------------------------------------------------------- log-probs


def _finite_or_minus_infinity(logprob: Any) -> Any:
    return -math.inf if type(logprob) in (float, int) and logprob <= _MINUS_INFINITY else logprob


def _require_logprob(value: Any, which: int, place: int, token_id: int) -> float:
    # by type, since bool is an int; JSON's integers have no bound, a float's is 1.8e308
    if (type(value) is float and value <= _ABOVE_ZERO) or (type(value) is int and -1e308 < value <= 0):
        return min(float(value), 0.0)
    what = f"{_place(which, place)}, token {token_id}"
    if value is None:
        raise UnexpectedAnswer(f"{what} has no log-prob (null; SGLang sends that for a log-prob of -inf too)")
    raise UnexpectedAnswer(f"{what} has the log-prob {value!r}: expected a number of at most 0")


def scored(ask: Ask, which: int, positions: list[Position], vocab_size: int | None) -> ScoredSequence:
    """The positions of one sequence, where they are what was asked for."""
    logprobs, top_ids, top_logprobs = [], [], []
    ids, start = ask.sequences[which], ask.start[which]
    for place, position in enumerate(positions, start):
        logprobs.append(_require_logprob(position.logprob, which, place, ids[place]))
        if not ask.top_k:
            continue
        if len(position.top) < ask.top_k:
            raise UnexpectedAnswer(
                f"{_place(which, place)} must list the {ask.top_k} likeliest tokens, got {len(position.top)}"
            )
        found = [(_require_logprob(value, which, place, i), i) for i, value in position.top.items()]
        # vLLM lists the prompt's own token too, wherever it ranks
        found.sort(key=lambda one: one[0], reverse=True)
        likeliest = found[: ask.top_k]
        largest = max(i for _, i in likeliest)
        if vocab_size is not None and largest >= vocab_size:
            raise UnexpectedAnswer(
                f"{_place(which, place)} lists token {largest} among the likeliest, and vocab_size={vocab_size}"
            )
        mass = sum(math.exp(value) for value, _ in likeliest)
        if mass > _MOST_MASS:
            raise UnexpectedAnswer(
                f"{_place(which, place)} lists probabilities that sum to {mass:.4g}: expected log-probs, whose "
                "exponentials sum to at most 1"
            )
        top_logprobs.append([value for value, _ in likeliest])
        top_ids.append([i for _, i in likeliest])
    return ScoredSequence(logprobs, top_ids, top_logprobs)
