"""A teacher on another machine: vLLM, SGLang or any server that speaks OpenAI's completions protocol.

:class:`ServerTeacher` sends token ids and gets log-probs back, as :class:`fused_gopd.TokenLogProbs` for
``estimator="sampled"`` or as :class:`fused_gopd.TopKLogProbs` for ``estimator="topk"``. Nothing that a server sends is
used unseen: number and ids of the tokens, values that are log-probs, enough of them. ``docs/integrations/server.md``
has the recipe.

The formats are those of the servers' sources: vLLM's ``prompt_logprobs`` (``entrypoints/openai/completion``), SGLang's
``/generate`` with ``logprob_start_len`` (``srt/managers/io_struct.py``), and ``echo`` with ``logprobs``.
"""

from __future__ import annotations

import email.utils
import importlib
import json
import math
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..checks import one_of, require_count, require_integer, require_mask, require_number
from ..heads import TokenLogProbs, TopKLogProbs

try:
    httpx: Any = importlib.import_module("httpx")
except ImportError as error:
    raise ImportError('fused_gopd.integrations.server needs httpx: pip install "fused-gopd[train]"') from error

Api = Literal["vllm", "sglang", "openai"]

__all__ = ["ScoredSequence", "ServerTeacher", "TeacherServerError"]

# What vLLM sends for a log-prob of -inf, which JSON does not have.
_MINUS_INFINITY = -9999.0
# A float32 log-softmax of logits below 100 is rounded at 1e-5; what is further above 0 is no log-prob.
_ABOVE_ZERO = 1e-4
_LONGEST_BACKOFF = 30.0
_LONGEST_RETRY_AFTER = 600.0
_TOO_BUSY = (408, 425, 429)
_PROBE_TEXT = "The quick brown fox jumps over the lazy dog, twice: 1 and 2."
_PROBE_IDS = [1, 2, 3]


class TeacherServerError(RuntimeError):
    """The teacher's server cannot be reached, refuses, or answers something that is not what was asked for."""


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


# ---------------------------------------------------------------------------------------------------- the three formats


class _Position(NamedTuple):
    """One scored token as the answer has it; unchecked."""

    token_id: int | None  # None where the format does not say
    logprob: float | None
    top: Mapping[int, float | None]
    text: str | None


class _Ask(NamedTuple):
    """What one request asks for."""

    model: str
    sequences: list[list[int]]
    start: list[int]  # the first position of each sequence whose log-prob is wanted; at least 1
    top_k: int  # 0: the tokens' own log-probs alone
    texts: bool  # also the tokens' texts, to compare tokenizers


class _BadAnswer(ValueError):
    """An answer that does not have the form that was asked for."""


def _finite_or_minus_infinity(logprob: float | None) -> float | None:
    return -math.inf if logprob is not None and logprob <= _MINUS_INFINITY else logprob


def _choices(answer: Any, ask: _Ask) -> list[Any]:
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    _require_length("choices", choices, len(ask.sequences))
    return choices


def _vllm_body(ask: _Ask) -> dict[str, Any]:
    # one token has to be generated; the prompt's log-probs are those of the logits, whatever the temperature
    return {"model": ask.model, "prompt": ask.sequences, "max_tokens": 1, "prompt_logprobs": ask.top_k}


def _vllm_positions(answer: Any, ask: _Ask) -> Iterator[list[_Position]]:
    for choice, ids, start in zip(_choices(answer, ask), ask.sequences, ask.start, strict=True):
        listed = choice["prompt_logprobs"]
        _require_length("prompt_logprobs", listed, len(ids))
        positions = []
        for token_id, entries in zip(ids[start:], listed[start:], strict=True):
            top = {int(key): _finite_or_minus_infinity(entry["logprob"]) for key, entry in (entries or {}).items()}
            own = (entries or {}).get(str(token_id), {})
            found = token_id if own or not top else next(iter(top))
            positions.append(_Position(found, top.get(token_id), top, own.get("decoded_token")))
        yield positions


def _sglang_body(ask: _Ask) -> dict[str, Any]:
    return {
        "input_ids": ask.sequences,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # the first position in the answer has no log-prob, so it is one before what is wanted
        "logprob_start_len": [start - 1 for start in ask.start],
        "top_logprobs_num": ask.top_k,
        "return_text_in_logprobs": ask.texts,
    }


def _sglang_positions(answer: Any, ask: _Ask) -> Iterator[list[_Position]]:
    _require_length("the list of answers", answer, len(ask.sequences))
    for one, ids, start in zip(answer, ask.sequences, ask.start, strict=True):
        wanted = len(ids) - start
        # releases differ in whether the position without a log-prob is listed: what is wanted is counted from the end
        listed = one["meta_info"]["input_token_logprobs"]
        _require_length("input_token_logprobs", listed, wanted, wanted + 1)
        tops: list[Any] = [None] * wanted
        if ask.top_k:
            tops = one["meta_info"]["input_top_logprobs"]
            _require_length("input_top_logprobs", tops, wanted, wanted + 1)
        yield [
            _Position(token_id, logprob, {int(i): value for value, i, *_ in top or ()}, text)
            for (logprob, token_id, text), top in zip(listed[-wanted:], tops[-wanted:], strict=True)
        ]


def _openai_body(ask: _Ask) -> dict[str, Any]:
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
    digits = token.removeprefix("token_id:")
    return int(digits) if digits != token and digits.isdecimal() else None


def _openai_positions(answer: Any, ask: _Ask) -> Iterator[list[_Position]]:
    for choice, ids, start in zip(_choices(answer, ask), ask.sequences, ask.start, strict=True):
        listed = choice["logprobs"]
        tokens, logprobs = listed["tokens"], listed["token_logprobs"]
        # servers that do not know max_tokens=0 generate a token, which comes last
        _require_length("logprobs.tokens", tokens, len(ids), len(ids) + 1)
        _require_length("logprobs.token_logprobs", logprobs, len(tokens))
        tops: list[Any] = [None] * len(tokens)
        if ask.top_k and not ask.texts:
            tops = listed["top_logprobs"]
            _require_length("logprobs.top_logprobs", tops, len(tokens))
        positions = []
        for i in range(start, len(ids)):
            top = {_openai_id(key): _finite_or_minus_infinity(value) for key, value in (tops[i] or {}).items()}
            if None in top:
                raise _BadAnswer(
                    "top_logprobs names tokens by their text, which does not say their ids (two ids may have one "
                    "text): top_k needs a server that knows return_tokens_as_token_ids, or api='vllm' or 'sglang'"
                )
            known = cast("dict[int, float | None]", top)
            positions.append(_Position(_openai_id(tokens[i]), _finite_or_minus_infinity(logprobs[i]), known, tokens[i]))
        yield positions


@dataclass(frozen=True)
class _Format:
    """How one kind of server is asked, and read."""

    path: str
    body: Callable[[_Ask], dict[str, Any]]
    positions: Callable[[Any, _Ask], Iterator[list[_Position]]]
    more_top: str  # what to do about a limit on top_k


_FORMATS: dict[str, _Format] = {
    "vllm": _Format(
        "/v1/completions", _vllm_body, _vllm_positions, "start vLLM with --max-logprobs of at least top_k (default: 20)"
    ),
    "sglang": _Format("/generate", _sglang_body, _sglang_positions, "ask for fewer"),
    "openai": _Format(
        "/v1/completions", _openai_body, _openai_positions, "OpenAI's own limit is 5; vLLM's is --max-logprobs"
    ),
}


# ---------------------------------------------------------------------------------------------- what an answer must be


def _require_length(name: str, listed: Any, *allowed: int) -> None:
    if listed is None:
        raise _BadAnswer(f"{name} is null: the server does not return log-probs of the prompt")
    if len(listed) not in allowed:
        raise _BadAnswer(f"{name} must have {allowed[0]} entries, got {len(listed)}")


def _require_logprob(value: Any, which: int, place: int, token_id: int) -> float:
    # the message is made where there is one: this is called top_k times a token
    if isinstance(value, float | int) and value <= _ABOVE_ZERO:
        return min(float(value), 0.0)
    what = f"sequence {which}, position {place}, token {token_id}"
    if value is None:
        raise _BadAnswer(f"{what} has no log-prob (null; SGLang sends that for a log-prob of -inf too)")
    raise _BadAnswer(f"{what} has the log-prob {value!r}: expected a number of at most 0")


def _checked(ask: _Ask, which: int, positions: list[_Position]) -> ScoredSequence:
    """The positions of one sequence, where they are what was asked for."""
    logprobs, top_ids, top_logprobs = [], [], []
    ids, start = ask.sequences[which], ask.start[which]
    for place, position in enumerate(positions, start):
        if position.token_id is not None and position.token_id != ids[place]:
            raise _BadAnswer(
                f"sequence {which}, position {place} must be token {ids[place]}, got token {position.token_id}"
            )
        logprobs.append(_require_logprob(position.logprob, which, place, ids[place]))
        if not ask.top_k:
            continue
        if len(position.top) < ask.top_k:
            raise _BadAnswer(
                f"sequence {which}, position {place} must list the {ask.top_k} likeliest tokens, got "
                f"{len(position.top)}"
            )
        found = [(_require_logprob(value, which, place, i), i) for i, value in position.top.items()]
        # vLLM lists the prompt's own token too, wherever it ranks
        found.sort(key=lambda one: one[0], reverse=True)
        top_logprobs.append([value for value, _ in found[: ask.top_k]])
        top_ids.append([i for _, i in found[: ask.top_k]])
    return ScoredSequence(logprobs, top_ids, top_logprobs)


def _same_text(theirs: str, ours: str) -> bool:
    """Whether two texts of one token may be the same: marks of a leading space and halves of characters aside."""
    plain = theirs.replace("▁", " ").replace("Ġ", " ").strip()
    return "\ufffd" in theirs or "\ufffd" in ours or plain == ours.strip()


# -------------------------------------------------------------------------------------------------------------- teacher


class ServerTeacher:
    """Scores sequences with a model that an inference server has: a teacher (or reference) that fits no GPU here.

    It is asked when it is made: whether it serves the model, whether it returns log-probs of given tokens and as many
    of the likeliest ones as wanted, and with a ``tokenizer`` whether its tokens are the student's. What can be wrong is
    known before the training starts.

    The log-probs are those of temperature 1. A student that is trained at another temperature needs a local teacher.

    Args:
        base_url: of the server, such as ``http://10.0.0.7:8000``; a trailing ``/v1`` is taken off.
        model: the name under which it serves the model (``/v1/models`` lists them).
        api: ``"vllm"``, ``"sglang"``, or ``"openai"`` for others whose completions know ``echo`` with ``logprobs``.
        top_k: the number of likeliest tokens of each position, for ``estimator="topk"``; None for ``"sampled"``.
        timeout: seconds without a byte from the server after which a request is given up. Such a server sends its
            whole answer at the end, so that this is what scoring ``batch_size`` sequences may take.
        retries: how often a request is repeated after a connection error, a timeout, or status 408, 425, 429 or 5xx.
            The waits double, with jitter; a ``Retry-After`` of the server is kept to.
        backoff: seconds of the first of these waits.
        max_concurrency: requests under way at once, of this process.
        batch_size: sequences in one request.
        api_key: sent as ``Authorization: Bearer``.
        headers: more headers.
        tokenizer: the student's, to compare; anything with ``encode(text, add_special_tokens=False)`` and ``decode``.
        extra_body: fields to add to each request, or to leave out of it where the value is None.

    Raises:
        ValueError, TypeError: an argument that is wrong by itself.
        TeacherServerError: naming the server, what was asked, what came, and what to do.
    """

    temperature = 1.0  # of the log-probs, for callers whose student has another

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: Api = "vllm",
        top_k: int | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
        max_concurrency: int = 16,
        batch_size: int = 4,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        tokenizer: Any = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must be an address such as 'http://localhost:8000', got {base_url!r}")
        if not isinstance(model, str) or not model:
            raise ValueError(f"model must be the name under which the server has the model, got {model!r}")
        one_of("api", api, tuple(_FORMATS))
        self.top_k = None if top_k is None else require_count("top_k", top_k)
        for name, seconds in (("timeout", timeout), ("backoff", backoff)):
            if require_number(name, seconds) <= 0:
                raise ValueError(f"{name} must be positive seconds, got {seconds}")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be an int of at least 0, got {retries!r}")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.model, self.api, self.timeout, self.retries, self.backoff = model, api, timeout, retries, backoff
        self.max_concurrency = require_count("max_concurrency", max_concurrency)
        self.batch_size = require_count("batch_size", batch_size)
        self.extra_body = dict(extra_body or {})
        self.max_model_len: int | None = None  # where the server tells it
        self._format = _FORMATS[api]
        self._random = random.Random()  # its own, so that the training's random numbers stay what they are
        sent = dict(headers or {})
        if api_key is not None:
            sent["Authorization"] = f"Bearer {api_key}"
        limits = httpx.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
        self._client = httpx.Client(base_url=self.base_url, headers=sent, timeout=timeout, limits=limits)
        try:
            self._check_model()
            self._probe(tokenizer)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections. A closed teacher scores nothing."""
        self._client.close()

    def __enter__(self) -> ServerTeacher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------- scoring

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
    ) -> TokenLogProbs | TopKLogProbs:
        """What the loss takes for the last K tokens of each sequence.

        Args:
            input_ids: (B, T) integer, prompts and completions, padded on any side.
            attention_mask: (B, T), 0 at padding.
            completion_mask: (B, K), K <= T: which of the last K tokens are wanted. The others cost no request, and
                have log-prob 0 (and id -1).

        Returns:
            TokenLogProbs (B, K), or with ``top_k`` TopKLogProbs (B, K, top_k); float32, on input_ids' device.
        """
        _require_masks(input_ids, attention_mask, completion_mask)
        mask, attended = completion_mask.bool().cpu(), attention_mask.bool().cpu()
        ids = input_ids.cpu()
        # where each of the last K tokens is in its sequence without padding
        place = (attended.cumsum(1) - 1)[:, ids.shape[1] - mask.shape[1] :]
        rows = mask.any(1).nonzero().flatten().tolist()
        wanted = [place[row][mask[row]].tolist() for row in rows]
        for row, positions in zip(rows, wanted, strict=True):
            if positions[0] == 0:
                raise ValueError(
                    f"completion_mask wants the first token of sequence {row}, for which a server has no log-prob: "
                    "begin the sequence with a prompt, or a beginning-of-sequence token"
                )
        # what comes after the last token that is wanted has no part in its log-prob
        sequences = [ids[row][attended[row]][: w[-1] + 1].tolist() for row, w in zip(rows, wanted, strict=True)]
        scored = self.score(sequences, [w[0] for w in wanted])
        found = [(one, n - w[0]) for one, w in zip(scored, wanted, strict=True) for n in w]
        if self.top_k is None:
            own = torch.zeros(mask.shape)
            own[mask] = torch.tensor([one.logprobs[n] for one, n in found])
            return TokenLogProbs(own.to(input_ids.device))
        top_ids = torch.full((*mask.shape, self.top_k), -1)
        top = torch.zeros(top_ids.shape)
        if found:
            top_ids[mask] = torch.tensor([one.top_ids[n] for one, n in found])
            top[mask] = torch.tensor([one.top_logprobs[n] for one, n in found])
        return TopKLogProbs(top_ids.to(input_ids.device), top.to(input_ids.device))

    def score(self, sequences: Sequence[Sequence[int]], start: Sequence[int]) -> list[ScoredSequence]:
        """Log-probs of given tokens, in the order of the sequences.

        Args:
            sequences: token ids, without padding.
            start: of each sequence, the position of the first token whose log-prob is wanted, at least 1: the first
                token of all has none.
        """
        if len(sequences) != len(start):
            raise ValueError(f"start must have one entry per sequence, got {len(start)} for {len(sequences)}")
        for i, (ids, first) in enumerate(zip(sequences, start, strict=True)):
            if not 1 <= first < len(ids):
                raise ValueError(
                    f"start[{i}] must be in [1, {len(ids)}), the length of its sequence (the first token has no "
                    f"log-prob), got {first}"
                )
            if self.max_model_len is not None and len(ids) >= self.max_model_len:
                raise TeacherServerError(
                    f"sequence {i} has {len(ids)} tokens, and {self.base_url} has room for "
                    f"max_model_len={self.max_model_len} with the one that it generates: start the server with a "
                    "longer context, or make prompts and completions shorter"
                )
        asks = [
            self._ask([list(ids) for ids in sequences[i : i + self.batch_size]], list(start[i : i + self.batch_size]))
            for i in range(0, len(sequences), self.batch_size)
        ]
        return self._all(asks)

    def _ask(self, sequences: list[list[int]], start: list[int], texts: bool = False) -> _Ask:
        return _Ask(self.model, sequences, start, self.top_k or 0, texts)

    def _all(self, asks: list[_Ask]) -> list[ScoredSequence]:
        """Every request, ``max_concurrency`` at a time; the first that fails ends the others."""
        if not asks:
            return []
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.max_concurrency, len(asks)), "teacher-server")
        try:
            futures = [pool.submit(self._scored, ask, stop) for ask in asks]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [one for future in futures for one in future.result()]
        finally:
            # after an error or an interrupt nobody waits for what is under way
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _scored(self, ask: _Ask, stop: threading.Event) -> list[ScoredSequence]:
        answer = self._request("POST", self._format.path, self._body(ask), stop)
        return [_checked_or_explained(self, ask, i, p) for i, p in enumerate(self._positions(answer, ask))]

    def _body(self, ask: _Ask) -> dict[str, Any]:
        body = {**self._format.body(ask), **self.extra_body}
        return {name: value for name, value in body.items() if value is not None}

    def _positions(self, answer: Any, ask: _Ask) -> list[list[_Position]]:
        try:
            return list(self._format.positions(answer, ask))
        except _BadAnswer as error:
            raise self._unexpected(ask, str(error)) from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            shown = json.dumps(answer)
            raise self._unexpected(
                ask, f"its form is not that of api={self.api!r} ({type(error).__name__}: {error}): {shown[:300]}"
            ) from None

    def _unexpected(self, ask: _Ask, found: str) -> TeacherServerError:
        asked = f"asked for the log-probs of {len(ask.sequences)} sequences"
        if ask.top_k:
            asked += f" and the {ask.top_k} likeliest tokens of each position"
        advice = f"; for a larger top_k {self._format.more_top}" if "likeliest" in found else ""
        return TeacherServerError(
            f"{self.base_url}{self._format.path} answered not what api={self.api!r} promises; {asked}, got: "
            f"{found}{advice}"
        )

    # --------------------------------------------------------------------------------------------------- at the start

    def _check_model(self) -> None:
        answer = self._request("GET", "/v1/models", None, threading.Event())
        try:
            cards = {card["id"]: card for card in answer["data"]}
        except (KeyError, TypeError) as error:
            raise TeacherServerError(
                f"{self.base_url}/v1/models must list models as {{'data': [{{'id': ...}}]}}, got "
                f"{json.dumps(answer)[:300]}: is base_url a server of models?"
            ) from error
        if self.model not in cards:
            raise TeacherServerError(
                f"{self.base_url} does not serve model={self.model!r}; it serves {', '.join(map(repr, cards))}: pass "
                "one of these names as model, or start the server with --served-model-name"
            )
        length = cards[self.model].get("max_model_len")
        self.max_model_len = length if isinstance(length, int) else None

    def _probe(self, tokenizer: Any) -> None:
        """Score a few tokens, as the training will; and compare the texts of tokens with the student's."""
        self.score([_PROBE_IDS], [1])
        if tokenizer is None:
            return
        ids = list(tokenizer.encode(_PROBE_TEXT, add_special_tokens=False))
        ask = self._ask([ids], [1], texts=True)
        answer = self._request("POST", self._format.path, self._body(ask), threading.Event())
        (positions,) = self._positions(answer, ask)
        texts = [(i, p.text, tokenizer.decode([i])) for i, p in zip(ids[1:], positions, strict=True)]
        for token_id, theirs, ours in texts:
            if theirs is not None and not _same_text(theirs, ours):
                raise TeacherServerError(
                    f"tokenizer must be that of {self.model!r} on {self.base_url}: token {token_id} is {ours!r} here "
                    f"and {theirs!r} there. Student and teacher must share a tokenizer; serve a teacher of the "
                    "student's family"
                )
        if all(theirs is None for _, theirs, _ in texts):
            warnings.warn(
                f"{self.base_url} does not tell the texts of tokens: that its tokenizer is the student's was not "
                "checked",
                stacklevel=3,
            )

    # ----------------------------------------------------------------------------------------------------------- HTTP

    def _request(self, method: str, path: str, body: Any, stop: threading.Event) -> Any:
        """The answer to one request, which is repeated where that may help."""
        failure = ""
        for attempt in range(self.retries + 1):
            asked_to_wait = None
            try:
                response = self._client.request(method, path, json=body)
            except httpx.TimeoutException as error:
                failure = f"timeout={self.timeout:g} s was not enough ({type(error).__name__})"
            except httpx.TransportError as error:
                failure = f"no connection ({type(error).__name__}: {error})"
            else:
                if response.status_code < 400:
                    return self._json(response, path)
                failure = f"status {response.status_code}: {_message(response)}"
                if response.status_code not in _TOO_BUSY and response.status_code < 500:
                    raise TeacherServerError(
                        f"{self.base_url}{path} refused, {failure}{self._advice(response.status_code)}"
                    )
                asked_to_wait = _retry_after(response.headers.get("Retry-After"))
            if attempt == self.retries or stop.wait(self._pause(attempt, asked_to_wait)):
                break
        raise TeacherServerError(
            f"no answer from {self.base_url}{path} in {attempt + 1} attempts; the last: {failure}. Is the server up "
            "and reachable from here? Where it is slow, raise timeout or lower batch_size and max_concurrency; where "
            "it restarts now and then, raise retries"
        )

    def _pause(self, attempt: int, asked_to_wait: float | None) -> float:
        if asked_to_wait is not None:
            if asked_to_wait > _LONGEST_RETRY_AFTER:
                raise TeacherServerError(
                    f"{self.base_url} asks to be left alone for {asked_to_wait:.0f} s (Retry-After), more than the "
                    f"{_LONGEST_RETRY_AFTER:.0f} s that a training waits"
                )
            return asked_to_wait
        return min(_LONGEST_BACKOFF, self.backoff * 2.0**attempt) * self._random.uniform(0.5, 1.0)

    def _json(self, response: Any, path: str) -> Any:
        try:
            return response.json()
        except ValueError:  # what json and a wrong encoding raise
            raise TeacherServerError(
                f"{self.base_url}{path} answered with status {response.status_code} and something that is not JSON: "
                f"{response.text[:200]!r}. Is base_url that of the model's server, or of a proxy in front of it?"
            ) from None

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return ": pass api_key, or the headers that the server wants"
        if status in (404, 405):
            return f": base_url must be the server's root, and api={self.api!r} what it is"
        if self.top_k is not None:
            return f": where it is top_k={self.top_k} that it does not grant, {self._format.more_top}"
        return ""


def _checked_or_explained(teacher: ServerTeacher, ask: _Ask, which: int, positions: list[_Position]) -> ScoredSequence:
    try:
        return _checked(ask, which, positions)
    except _BadAnswer as error:
        raise teacher._unexpected(ask, str(error)) from None


def _require_masks(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> None:
    require_integer("input_ids", input_ids)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (B, T), got {tuple(input_ids.shape)}")
    rows, length = input_ids.shape
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape {tuple(input_ids.shape)} of input_ids, got "
            f"{tuple(attention_mask.shape)}"
        )
    if completion_mask.ndim != 2 or completion_mask.shape[0] != rows or completion_mask.shape[1] > length:
        raise ValueError(
            f"completion_mask must have shape ({rows}, K) with K of at most {length}, for the last K tokens of "
            f"input_ids, got {tuple(completion_mask.shape)}"
        )
    attended, wanted = require_mask("attention_mask", attention_mask), require_mask("completion_mask", completion_mask)
    if bool((wanted & ~attended[:, length - completion_mask.shape[1] :]).any()):
        raise ValueError("completion_mask must be 0 where attention_mask is 0: a token is wanted that is padding")


def _message(response: Any) -> str:
    """What a server says about an error: each wraps it in its own way."""
    try:
        answer = response.json()
    except ValueError:
        return repr(response.text[:300])
    for _ in range(2):
        if isinstance(answer, dict):
            answer = answer.get("error", answer.get("message", answer.get("detail", answer)))
    return (answer if isinstance(answer, str) else json.dumps(answer))[:500]


def _retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, which has a number or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
