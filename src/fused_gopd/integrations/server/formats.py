"""Requests for log-probs in the format of each kind of server, and strict parsers of the answers.

A field that is missing, of another type (JSON's true and false are not numbers), out of range or repeated is an
:class:`UnexpectedAnswer`. The formats are those in the servers' sources: vLLM's ``prompt_logprobs``
(``entrypoints/openai/completion``), SGLang's ``/generate`` with ``logprob_start_len`` (``srt/managers/io_struct.py``),
and ``echo`` with ``logprobs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# vLLM sends this for a log-prob of -inf, which JSON cannot represent.
_MINUS_INFINITY = -9999.0
# Rounding of a float32 log-softmax of logits below 100 is about 1e-5: a number further above 0 is no log-prob.
_ABOVE_ZERO = 1e-4
# Bound on the sum of the probabilities of distinct tokens, as in gopd_loss: log-probs may be rounded to bfloat16.
_MOST_MASS = 1.1
_MOST_ID = 2**31 - 1


class UnexpectedAnswer(ValueError):
    """An answer that does not have the requested form."""


@dataclass(frozen=True)
class ScoredSequence:
    """A server's scores of the tokens of one sequence from ``start`` on.

    Attributes:
        logprobs: of each token; -inf for probability 0.
        top_ids, top_logprobs: the ``top_k`` likeliest tokens at each position, the likeliest first; empty lists without
            ``top_k``.
    """

    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class ScoringRequest(NamedTuple):
    """Sequences to score in one request."""

    model: str
    sequences: list[list[int]]
    start: list[int]  # the first position to score in each sequence; at least 1
    top_k: int  # likeliest tokens per position; 0 for none
    texts: bool  # whether to return the tokens' texts, to compare tokenizers


class Position(NamedTuple):
    """One scored token, whose id was compared with the request and whose log-probs are not checked yet."""

    logprob: Any
    top: Mapping[int, Any]
    text: str | None


# ------------------------------------------------------------------------------------------------------ types and ids


def _require_list(name: str, value: Any, *lengths: int) -> list[Any]:
    if value is None:
        raise UnexpectedAnswer(f"{name} is null: the server does not return log-probs of the prompt")
    if not isinstance(value, list):
        raise UnexpectedAnswer(f"{name} must be a list, got {value!r}")
    if lengths and len(value) not in lengths:
        raise UnexpectedAnswer(f"{name} must have {lengths[0]} entries, got {len(value)}")
    return value


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
    """The id in an object's key, which must have decimal digits only."""
    if not (text.isascii() and text.isdecimal()) or (text[0] == "0" and text != "0"):
        raise UnexpectedAnswer(f"a token's id must be an integer of at least 0, got {text!r}")
    return _require_id(int(text[:11]))


def _require_token(where: str, token_id: int | None, asked: int) -> None:
    """Raise where the answer is about another token; ``token_id`` is None if the format has no ids."""
    if token_id is not None and token_id != asked:
        raise UnexpectedAnswer(f"{where} must be token {asked}, got token {token_id}")


def _place(which: int, position: int) -> str:
    return f"sequence {which}, position {position}"


# ---------------------------------------------------------------------------------------------------- the three formats


def _choices(answer: Any, request: ScoringRequest) -> list[Any]:
    """The choices in the order of the sequences."""
    choices = _require_list("choices", answer["choices"], len(request.sequences))
    ordered: list[Any] = [None] * len(choices)
    for choice in choices:
        index = choice["index"]
        if type(index) is not int or not 0 <= index < len(choices) or ordered[index] is not None:
            raise UnexpectedAnswer(f"choices must have each index from 0 to {len(choices) - 1} once, got {index!r}")
        ordered[index] = choice
    return ordered


def _vllm_body(request: ScoringRequest) -> dict[str, Any]:
    # vLLM must generate at least one token; log-probs of the prompt do not depend on the temperature
    return {"model": request.model, "prompt": request.sequences, "max_tokens": 1, "prompt_logprobs": request.top_k}


def _vllm_positions(answer: Any, request: ScoringRequest) -> Iterator[list[Position]]:
    for which, (choice, ids, start) in enumerate(
        zip(_choices(answer, request), request.sequences, request.start, strict=True)
    ):
        of_prompt = _require_list("prompt_logprobs", choice["prompt_logprobs"], len(ids))
        positions = []
        for place in range(start, len(ids)):
            where, token_id = _place(which, place), ids[place]
            entries = of_prompt[place]
            if entries is None:
                raise UnexpectedAnswer(f"{where} has no log-prob (null)")
            entries = _require_object(f"{where} of prompt_logprobs", entries)
            top = {_written_id(key): _finite_or_minus_infinity(entry["logprob"]) for key, entry in entries.items()}
            if token_id not in top:
                raise UnexpectedAnswer(f"{where} must be token {token_id}, got token {next(iter(top), 'none')}")
            text = _require_text(entries[str(token_id)].get("decoded_token"))
            positions.append(Position(top[token_id], top, text))
        yield positions


def _sglang_body(request: ScoringRequest) -> dict[str, Any]:
    return {
        "input_ids": request.sequences,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # the first position of the answer has no log-prob, so it is the one before the first to score
        "logprob_start_len": [start - 1 for start in request.start],
        "top_logprobs_num": request.top_k,
        "return_text_in_logprobs": request.texts,
    }


def _sglang_positions(answer: Any, request: ScoringRequest) -> Iterator[list[Position]]:
    answers = _require_list("the list of answers", answer, len(request.sequences))
    for which, (one, ids, start) in enumerate(zip(answers, request.sequences, request.start, strict=True)):
        wanted = len(ids) - start
        # whether the position without a log-prob is in the list depends on the release, so index from the end
        of_input = _require_list("input_token_logprobs", one["meta_info"]["input_token_logprobs"], wanted, wanted + 1)
        tops: list[Any] = [None] * wanted
        if request.top_k:
            tops = _require_list("input_top_logprobs", one["meta_info"]["input_top_logprobs"], wanted, wanted + 1)
        positions = []
        for place, entry, top in zip(range(start, len(ids)), of_input[-wanted:], tops[-wanted:], strict=True):
            logprob, token_id, text = _require_list("an entry of input_token_logprobs", entry, 3)
            _require_token(_place(which, place), _require_id(token_id), ids[place])
            pairs = [] if top is None else _require_list("an entry of input_top_logprobs", top)
            positions.append(Position(logprob, _by_id(_place(which, place), pairs), _require_text(text)))
        yield positions


def _by_id(where: str, pairs: Iterable[list[Any]]) -> dict[int, Any]:
    """Log-probs by id, from SGLang's ``[log-prob, id, text]`` of the likeliest tokens."""
    found: dict[int, Any] = {}
    for pair in pairs:
        logprob, token_id = _require_list("a likeliest token", pair, 3, 2)[:2]
        if _require_id(token_id) in found:
            raise UnexpectedAnswer(f"{where} lists token {token_id} twice among the likeliest")
        found[token_id] = logprob
    return found


def _openai_body(request: ScoringRequest) -> dict[str, Any]:
    return {
        "model": request.model,
        "prompt": request.sequences,
        "max_tokens": 0,
        "echo": True,
        "logprobs": max(1, request.top_k),  # some servers return no log-probs for 0
        "temperature": 1.0,
        "return_tokens_as_token_ids": not request.texts,  # extension of vLLM; without it there are no ids
    }


def _openai_id(token: str) -> int | None:
    """The id in ``token_id:7``; None for the text of a token."""
    return _written_id(token.removeprefix("token_id:")) if token.startswith("token_id:") else None


def _openai_positions(answer: Any, request: ScoringRequest) -> Iterator[list[Position]]:
    for which, (choice, ids, start) in enumerate(
        zip(_choices(answer, request), request.sequences, request.start, strict=True)
    ):
        of_prompt = choice["logprobs"]
        if of_prompt is None:
            raise UnexpectedAnswer("logprobs is null: the server does not return log-probs of the prompt")
        # servers without support for max_tokens=0 generate one token, which is the last
        tokens = _require_list("logprobs.tokens", of_prompt["tokens"], len(ids), len(ids) + 1)
        logprobs = _require_list("logprobs.token_logprobs", of_prompt["token_logprobs"], len(tokens))
        tops: list[Any] = [None] * len(tokens)
        if request.top_k and not request.texts:
            tops = _require_list("logprobs.top_logprobs", of_prompt["top_logprobs"], len(tokens))
        positions = []
        for place in range(start, len(ids)):
            token = _require_text(tokens[place])
            if token is None:
                raise UnexpectedAnswer(f"{_place(which, place)} has no token (null)")
            # with texts, "token_id:7" may be the text of a token
            _require_token(_place(which, place), None if request.texts else _openai_id(token), ids[place])
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
    """The requests and answers of one kind of server."""

    path: str
    body: Callable[[ScoringRequest], dict[str, Any]]
    positions: Callable[[Any, ScoringRequest], Iterator[list[Position]]]
    more_top: str  # advice for a server that limits top_k


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
    # compared by type, since bool is a subclass of int; JSON's integers may exceed the largest float
    if (type(value) is float and value <= _ABOVE_ZERO) or (type(value) is int and -1e308 < value <= 0):
        return min(float(value), 0.0)
    what = f"{_place(which, place)}, token {token_id}"
    if value is None:
        raise UnexpectedAnswer(f"{what} has no log-prob (null; SGLang sends that for a log-prob of -inf too)")
    raise UnexpectedAnswer(f"{what} has the log-prob {value!r}: expected a number of at most 0")


def scored(request: ScoringRequest, which: int, positions: list[Position], vocab_size: int | None) -> ScoredSequence:
    """Check the positions of one sequence and collect their log-probs."""
    logprobs, top_ids, top_logprobs = [], [], []
    ids, start = request.sequences[which], request.start[which]
    for place, position in enumerate(positions, start):
        logprobs.append(_require_logprob(position.logprob, which, place, ids[place]))
        if not request.top_k:
            continue
        if len(position.top) < request.top_k:
            raise UnexpectedAnswer(
                f"{_place(which, place)} must list the {request.top_k} likeliest tokens, got {len(position.top)}"
            )
        found = [(_require_logprob(value, which, place, i), i) for i, value in position.top.items()]
        # vLLM also lists the prompt's token, whatever its rank
        found.sort(key=lambda pair: pair[0], reverse=True)
        likeliest = found[: request.top_k]
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
