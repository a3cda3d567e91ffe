"""Requests for log-probs in the format of each kind of server, and strict parsers of the answers.

A field that is missing, of another type (JSON's true and false are not numbers), out of range or repeated is an
:class:`UnexpectedAnswer`. The formats are those in the servers' sources: vLLM's ``prompt_logprobs``
(``entrypoints/openai/completion``) and its ``/inference/v1/generate`` (``entrypoints/scale_out/token_in_token_out``),
SGLang's ``/generate`` with ``logprob_start_len`` (``srt/managers/io_struct.py``), and ``echo`` with ``logprobs``.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

# vLLM sends this for a log-prob of -inf, which JSON cannot represent.
_MINUS_INFINITY = -9999.0
# Rounding of a float32 log-softmax of logits below 100 is about 1e-5: a number further above 0 is no log-prob.
_ABOVE_ZERO = 1e-4
# Bound on the sum of the probabilities of distinct tokens, as in gopd_loss: log-probs may be rounded to bfloat16.
_MOST_MASS = 1.1
_MOST_ID = 2**31 - 1


class UnexpectedAnswer(ValueError):
    """An answer that does not have the requested form."""


class TooFewListed(UnexpectedAnswer):
    """Fewer of the likeliest tokens than were asked for: servers limit them."""


@dataclass(frozen=True)
class ScoredSequence:
    """A server's scores of the tokens of one sequence from ``start`` on.

    Attributes:
        logprobs: of each token; -inf for probability 0.
        top_ids, top_logprobs: the ``top_k`` likeliest tokens at each position, the likeliest first; or the requested
            tokens in the order of the request. Empty lists without either.
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
    texts: bool = False  # whether to return the tokens' texts, to compare tokenizers
    requested: list[list[list[int]]] | None = None  # tokens to score at each position of each sequence, from its start
    temperature: float = 1.0


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
    return {
        "model": request.model,
        "prompt": request.sequences,
        "max_tokens": 1,  # vLLM must generate one token at least
        "temperature": request.temperature,
        "prompt_logprobs": request.top_k,
    }


def _vllm_positions(answer: Any, request: ScoringRequest) -> Iterator[list[Position]]:
    for which, choice in enumerate(_choices(answer, request)):
        yield _positions_of_prompt(choice, request, which)


def _positions_of_prompt(answer: Mapping[str, Any], request: ScoringRequest, which: int) -> list[Position]:
    """From vLLM's ``prompt_logprobs``: for each token of the prompt an object from id to log-prob."""
    ids = request.sequences[which]
    of_prompt = _require_list("prompt_logprobs", answer["prompt_logprobs"], len(ids))
    positions = []
    for place in range(request.start[which], len(ids)):
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
    return positions


def _generate_body(request: ScoringRequest) -> dict[str, Any]:
    (ids,) = request.sequences
    params = {"max_tokens": 1, "temperature": request.temperature, "detokenize": request.texts}
    return {
        "model": request.model,
        "token_ids": ids,
        "return_token_ids": True,
        "sampling_params": {**params, "prompt_logprobs": request.top_k},
    }


def _generate_positions(answer: Any, request: ScoringRequest) -> Iterator[list[Position]]:
    _require_same_ids(answer, request)
    yield _positions_of_prompt(answer, request, 0)


def _require_same_ids(answer: Any, request: ScoringRequest) -> None:
    (ids,) = request.sequences
    answered = _require_list("prompt_token_ids", _require_object("the answer", answer)["prompt_token_ids"], len(ids))
    for place, (theirs, ours) in enumerate(zip(answered, ids, strict=True)):
        _require_token(_place(0, place), _require_id(theirs), ours)


def _by_id(request: ScoringRequest) -> bool:
    """Whether all that is asked for are log-probs of given ids, which come as an array without the prompt's."""
    return not request.texts and (request.requested is not None or not request.top_k)


def _generate_ids_body(request: ScoringRequest) -> dict[str, Any]:
    body = _generate_body(request)
    if not _by_id(request):
        return body
    (ids,), (start,) = request.sequences, request.start
    requested = request.requested[0] if request.requested is not None else [[]] * (len(ids) - start)
    del body["sampling_params"]["prompt_logprobs"]
    body["sampling_params"] |= {
        # row i is scored as the token at prompt_logprob_start + i + 1
        "prompt_logprob_start": start - 1,
        "prompt_logprob_token_ids": [[own, *more] for own, more in zip(ids[start:], requested, strict=True)],
    }
    return body


def _generate_ids_positions(answer: Any, request: ScoringRequest) -> Iterator[list[Position]]:
    if not _by_id(request):
        yield from _generate_positions(answer, request)
        return
    _require_same_ids(answer, request)
    (ids,), (start,) = request.sequences, request.start
    requested = request.requested[0] if request.requested is not None else [[]] * (len(ids) - start)
    shape = (len(ids) - start, 1 + max(map(len, requested)))
    rows = float32_array("prompt_token_id_logprobs", answer["prompt_token_id_logprobs"], shape).tolist()
    yield [
        Position(row[0], dict(zip(more, row[1:], strict=False)), None)
        for row, more in zip(rows, requested, strict=True)
    ]


def float32_array(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a given shape from base64 of NumPy's ``.npy``; nothing is unpickled, and nothing allocated before."""
    if not isinstance(value, str):
        raise UnexpectedAnswer(f"{name} must be a string of base64, got {value!r}")
    try:
        data = base64.b64decode(value, validate=True)
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise UnexpectedAnswer(f"{name} must be an array in version 1.0 of NumPy's format, got {version}")
        found, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    except (binascii.Error, ValueError, EOFError) as error:
        if isinstance(error, UnexpectedAnswer):
            raise
        raise UnexpectedAnswer(f"{name} is no array in NumPy's format ({type(error).__name__}: {error})") from None
    size = len(data) - file.tell()
    if found != shape or by_columns or dtype.str != "<f4" or size != 4 * math.prod(shape):
        raise UnexpectedAnswer(
            f"{name} must be float32 of shape {shape} by rows, got {dtype} of shape {found} in {size} bytes"
        )
    return np.frombuffer(data, "<f4", offset=file.tell()).reshape(shape)


def _sglang_body(request: ScoringRequest) -> dict[str, Any]:
    return {
        "input_ids": request.sequences,
        "sampling_params": {"max_new_tokens": 0, "temperature": request.temperature},
        "return_logprob": True,
        # the first position of the answer has no log-prob, so it is the one before the first to score
        "logprob_start_len": [start - 1 for start in request.start],
        "top_logprobs_num": request.top_k,
        "return_text_in_logprobs": request.texts,
        # one list for all positions of a sequence: all that are requested at any of them
        "token_ids_logprob": None if request.requested is None else [_union(x) for x in request.requested],
    }


def _union(requested: Iterable[Iterable[int]]) -> list[int]:
    return sorted({i for ids in requested for i in ids if i >= 0})


def _sglang_positions(answer: Any, request: ScoringRequest) -> Iterator[list[Position]]:
    answers = _require_list("the list of answers", answer, len(request.sequences))
    for which, (one, ids, start) in enumerate(zip(answers, request.sequences, request.start, strict=True)):
        wanted = len(ids) - start
        # whether the position without a log-prob is in the list depends on the release, so index from the end
        of_input = _require_list("input_token_logprobs", one["meta_info"]["input_token_logprobs"], wanted, wanted + 1)
        tops: list[Any] = [None] * wanted
        name = "input_token_ids_logprobs" if request.requested is not None else "input_top_logprobs"
        if request.top_k or request.requested is not None:
            tops = _require_list(name, one["meta_info"][name], wanted, wanted + 1)
        positions = []
        for place, entry, top in zip(range(start, len(ids)), of_input[-wanted:], tops[-wanted:], strict=True):
            logprob, token_id, text = _require_list("an entry of input_token_logprobs", entry, 3)
            _require_token(_place(which, place), _require_id(token_id), ids[place])
            pairs = [] if top is None else _require_list(f"an entry of {name}", top)
            positions.append(Position(logprob, _from_pairs(_place(which, place), pairs), _require_text(text)))
        yield positions


def _from_pairs(where: str, pairs: Iterable[list[Any]]) -> dict[int, Any]:
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
        "temperature": request.temperature,
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


Ids = Literal["position", "sequence"]


@dataclass(frozen=True)
class Format:
    """The requests and answers of one kind of server."""

    path: str
    body: Callable[[ScoringRequest], dict[str, Any]]
    positions: Callable[[Any, ScoringRequest], Iterator[list[Position]]]
    more_top: str  # advice for a server that limits top_k
    requested_ids: Ids | None = None  # whether tokens to score can be named, for each position or once for a sequence
    single: bool = False  # one sequence in a request
    texts: bool = True  # whether the texts of all candidates are made


_MORE_OF_VLLM = "start vLLM with --max-logprobs of at least top_k (default: 20)"
_GENERATE = Format(
    "/inference/v1/generate", _generate_body, _generate_positions, _MORE_OF_VLLM, single=True, texts=False
)
# The forms of each kind of server, best first; a server has the last one, or it is of another kind.
FORMATS: dict[str, tuple[Format, ...]] = {
    "vllm": (
        replace(_GENERATE, body=_generate_ids_body, positions=_generate_ids_positions, requested_ids="position"),
        _GENERATE,
        Format("/v1/completions", _vllm_body, _vllm_positions, _MORE_OF_VLLM),
    ),
    "sglang": (
        Format("/generate", _sglang_body, _sglang_positions, "ask for fewer", requested_ids="sequence", texts=False),
        Format("/generate", _sglang_body, _sglang_positions, "ask for fewer", texts=False),
    ),
    "openai": (
        Format(
            "/v1/completions",
            _openai_body,
            _openai_positions,
            "OpenAI's own limit is 5; vLLM's is --max-logprobs",
        ),
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
    for n, position in enumerate(positions):
        place = start + n
        logprobs.append(_require_logprob(position.logprob, which, place, ids[place]))
        if request.requested is not None:
            chosen = _requested(request.requested[which][n], position.top, which, place)
        elif request.top_k:
            chosen = _likeliest(request.top_k, position.top, which, place, vocab_size)
        else:
            continue
        mass = sum(math.exp(value) for i, value in dict(chosen).items() if i >= 0)
        if mass > _MOST_MASS:
            raise UnexpectedAnswer(
                f"{_place(which, place)} lists probabilities that sum to {mass:.4g}: expected log-probs, whose "
                "exponentials sum to at most 1"
            )
        top_ids.append([i for i, _ in chosen])
        top_logprobs.append([value for _, value in chosen])
    return ScoredSequence(logprobs, top_ids, top_logprobs)


def _requested(requested: list[int], found: Mapping[int, Any], which: int, place: int) -> list[tuple[int, float]]:
    """(id, log-prob) of requested tokens; that of no token, -1, is 0."""
    missing = next((i for i in requested if i >= 0 and i not in found), None)
    if missing is not None:
        raise UnexpectedAnswer(f"{_place(which, place)} has no log-prob of token {missing}, which was asked for")
    return [(i, _require_logprob(found[i], which, place, i) if i >= 0 else 0.0) for i in requested]


def _likeliest(
    top_k: int, found: Mapping[int, Any], which: int, place: int, vocab_size: int | None
) -> list[tuple[int, float]]:
    """(id, log-prob) of the likeliest tokens."""
    if len(found) < top_k:
        raise TooFewListed(f"{_place(which, place)} must list the {top_k} likeliest tokens, got {len(found)}")
    pairs = [(i, _require_logprob(value, which, place, i)) for i, value in found.items()]
    # vLLM also lists the prompt's token, whatever its rank
    pairs.sort(key=lambda pair: pair[1], reverse=True)
    likeliest = pairs[:top_k]
    largest = max(i for i, _ in likeliest)
    if vocab_size is not None and largest >= vocab_size:
        raise UnexpectedAnswer(
            f"{_place(which, place)} lists token {largest} among the likeliest, and vocab_size={vocab_size}"
        )
    return likeliest
