"""A teacher on another machine: vLLM, SGLang or any server with OpenAI's completions protocol.

:class:`ServerTeacher` sends token ids and gets log-probs back, as :class:`fused_gopd.TokenLogProbs` for
``estimator="sampled"`` or as :class:`fused_gopd.TopKLogProbs` for ``estimator="topk"``. ``formats`` reads the servers'
answers, ``http`` sends the requests. ``docs/integrations/server.md`` has the recipe.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...checks import require_integer
from ...heads import TokenLogProbs, TopKLogProbs
from ...values import one_of, require_count, require_not_negative, require_positive
from ..batches import sequences_to_score
from .formats import (
    FORMATS,
    Format,
    Ids,
    Position,
    ScoredSequence,
    ScoringRequest,
    TooFewListed,
    UnexpectedAnswer,
    scored,
)
from .http import Connection, Request, TeacherServerError, is_refusal

Api = Literal["vllm", "sglang", "openai"]

__all__ = ["Capabilities", "HiddenStateTeacher", "ScoredSequence", "ServerTeacher", "TeacherServerError"]

PROBE_TEXT = "The quick brown fox jumps over the lazy dog, twice: 1 and 2."
_PROBE_IDS = [1, 2, 3]
# of positions whose likeliest token is another, the odds of the two show the temperature
_TEMPERATURE_IDS = [1, 2, 3, 4, 5, 6, 7, 8]
# Odds as rounded to bfloat16 at logits below 32: two roundings of 0.06. Those that differ by less show no temperature.
_ROUNDED_ODDS = 0.13


def _same_text(theirs: str, ours: str) -> bool:
    """Whether two texts may be the same token's, ignoring marks of a leading space and incomplete characters."""
    plain = theirs.replace("▁", " ").replace("Ġ", " ").strip()
    return "\ufffd" in theirs or "\ufffd" in ours or plain == ours.strip()


@dataclass(frozen=True)
class Capabilities:
    """What a server gives, as was found when the teacher was made.

    Attributes:
        endpoint: the path of the requests.
        texts: whether it makes the text of each candidate, which takes its time and is not read.
        requested_ids: whether it scores tokens that the caller names: ``"position"``, of each position its own;
            ``"sequence"``, all at all positions, so that an answer grows with the square of the length; or None.
        top_k: the number of likeliest tokens that it was asked for, and listed.
        temperature: of the log-probs.
        max_model_len: the longest sequence, with one token that it generates; None where it does not tell.
        states: of :class:`HiddenStateTeacher`, the hidden states that it sends, in words; else None.
    """

    endpoint: str
    texts: bool
    requested_ids: Ids | None
    top_k: int | None
    temperature: float
    max_model_len: int | None
    states: str | None = None

    def __str__(self) -> str:
        requested = {"position": "of each position", "sequence": "one list a sequence", None: "none"}
        parts = [
            f"{self.endpoint} {'with' if self.texts else 'without'} the texts of candidates",
            f"requested tokens: {requested[self.requested_ids]}",
            f"likeliest tokens: {'not asked for' if self.top_k is None else self.top_k}",
            f"temperature {self.temperature:g}",
        ]
        if self.states is not None:
            parts = [f"{self.endpoint} with {self.states}", f"temperature {self.temperature:g}"]
        return ", ".join(parts + ([] if self.max_model_len is None else [f"at most {self.max_model_len} tokens"]))


class ServerTeacher:
    """Scores sequences with a model on an inference server: a teacher (or reference) that fits no GPU here.

    The constructor sends requests that check whether the server has the model, whether it returns log-probs of given
    tokens and of enough likeliest ones, and with a ``tokenizer`` whether its tokens are the student's. So errors are
    found before the training starts.

    What the server gives is then in the attribute ``capabilities``.

    Args:
        base_url: of the server, such as ``http://10.0.0.7:8000``; a trailing ``/v1`` is removed. A user name and
            password in it are sent as basic authorisation, and are neither shown nor in the attribute ``base_url``.
        model: the name under which it serves the model (``/v1/models`` lists them).
        api: ``"vllm"``, ``"sglang"``, or ``"openai"`` for others that support ``echo`` with ``logprobs``.
        top_k: the number of likeliest tokens of each position, for ``estimator="topk"``; None for ``"sampled"``.
        timeout: seconds without a byte from the server after which a request fails. These servers send their whole
            answer at the end, so it must be longer than scoring ``batch_size`` sequences takes.
        retries: how often a request is repeated after a connection error, a timeout, or status 408, 425, 429 or 5xx.
            The waits double, with jitter; a ``Retry-After`` header of the server takes precedence.
        patience: seconds after its first failure for which a request is repeated beyond ``retries``, so that a server
            may restart. Not in the constructor: the address of a server that never answered is probably wrong.
        backoff: seconds of the first of these waits.
        max_concurrency: simultaneous requests of this process, of ``batch_size`` sequences each.
        batch_size: sequences in one request; in the place of each are so many requests at vLLM's
            ``/inference/v1/generate``, which takes one sequence.
        api_key: sent as ``Authorization: Bearer``, without surrounding whitespace. No message contains it.
        headers: more headers, whose values no message contains either.
        proxy: the address of a proxy for all requests, or False for none. By default the environment's
            (``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``), but none for a server on this machine or in
            a private network.
        tokenizer: to compare with the server's: the student's, or, with ``cross_tokenizer`` of the trainer, the
            teacher's own; any object with ``encode(text, add_special_tokens=False)`` and ``decode``.
        extra_body: fields to add to each request; a field whose value is None is removed.
        vocab_size: of the student; a likeliest token beyond it is an error here, and otherwise in the loss.
        temperature: of the log-probs. Whether the server returns those is checked; vLLM 0.32 and SGLang 0.5.23 return
            those of temperature 1 whatever is asked, and are refused with another. The attribute of this name is what
            callers compare with the student's.

    Raises:
        ValueError, TypeError: an invalid argument.
        TeacherServerError: naming the server, the request, the answer, and what to do.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: Api = "vllm",
        top_k: int | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        patience: float = 0.0,
        backoff: float = 0.5,
        max_concurrency: int = 16,
        batch_size: int = 4,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        proxy: str | Literal[False] | None = None,
        tokenizer: Any = None,
        extra_body: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise ValueError(f"model must be the name under which the server has the model, got {model!r}")
        one_of("api", api, tuple(FORMATS))
        self.top_k = None if top_k is None else require_count("top_k", top_k)
        self.vocab_size = None if vocab_size is None else require_count("vocab_size", vocab_size)
        require_not_negative("patience", patience)
        self.temperature = require_positive("temperature", temperature)
        self.model, self.api = model, api
        self.batch_size = require_count("batch_size", batch_size)
        self.extra_body = dict(extra_body or {})
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra_body must be what JSON can have: {error}") from None
        self.max_model_len: int | None = None  # where the server tells it
        self._format = FORMATS[api][-1]
        self._connection = Connection(
            base_url,
            api_key=api_key,
            headers=headers,
            proxy=proxy,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_concurrency=max_concurrency,
            advice=self._advice,
        )
        del api_key, headers, proxy, base_url  # so that no traceback that shows this frame's variables has them
        self.base_url = self._connection.base_url
        self._check_model()
        self._format = self._find_format()
        if self._format.single:
            self._connection.max_concurrency *= self.batch_size
        self._probe(tokenizer)
        self.tokenizer = tokenizer  # trainers compare it with the student's
        if self.temperature != 1:
            self._check_temperature()
        self.capabilities = Capabilities(
            endpoint=self._format.path,
            texts=self._format.texts,
            requested_ids=self._format.requested_ids,
            top_k=self.top_k,
            temperature=self.temperature,
            max_model_len=self.max_model_len,
        )
        self._connection.patience = patience

    @property
    def fingerprint(self) -> str:
        """What a cache of scores knows this teacher by: a hash of the kind, ``api``, ``model`` and ``extra_body``.

        It does not tell weights apart that the server had under one name: ``TeacherCache.scorer(revision=...)`` does.
        """
        known = [type(self).__name__, self.api, self.model, self.extra_body]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def close(self) -> None:
        """Refuse further requests."""
        self._connection.close()

    def __enter__(self) -> ServerTeacher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------- scoring

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        token_ids: Tensor | None = None,
    ) -> TokenLogProbs | TopKLogProbs:
        """Score the last K tokens of each sequence, and with ``token_ids`` those at each position.

        Args:
            input_ids: (B, T) integer, prompts and completions, padded on any side.
            attention_mask: (B, T), 0 at padding.
            completion_mask: (B, K), K <= T: which of the last K tokens to score. The others have log-prob 0 (and id
                -1), and sequences without one to score are not sent.
            token_ids: (B, K, k) integer, -1 for none: tokens to score at each of the last K positions, such as the
                student's likeliest; for a teacher without ``top_k``.

        Returns:
            TokenLogProbs (B, K), or TopKLogProbs (B, K, top_k), or of ``token_ids`` (B, K, k), with the log-probs of
            the tokens themselves; float32, on input_ids' device.
        """
        mask, sequences, wanted = sequences_to_score(input_ids, attention_mask, completion_mask)
        if token_ids is not None:
            require_integer("token_ids", token_ids)
            if token_ids.ndim != 3 or token_ids.shape[:2] != mask.shape:
                raise ValueError(
                    f"token_ids must have shape {(*mask.shape, 'k')}, k tokens for each position of completion_mask, "
                    f"got {tuple(token_ids.shape)}"
                )
        asked = None if token_ids is None else _by_position(token_ids, mask)
        answers = self.score(sequences, [w[0] for w in wanted], asked)
        found = [(one, n - w[0]) for one, w in zip(answers, wanted, strict=True) for n in w]
        own = torch.zeros(mask.shape)
        own[mask] = torch.tensor([one.logprobs[n] for one, n in found])
        width = self.top_k if token_ids is None else token_ids.shape[2]
        if width is None:
            return TokenLogProbs(own.to(input_ids.device))
        top_ids = torch.full((*mask.shape, width), -1)
        top = torch.zeros(top_ids.shape)
        if found:
            top_ids[mask] = torch.tensor([one.top_ids[n] for one, n in found])
            top[mask] = torch.tensor([one.top_logprobs[n] for one, n in found])
        return TopKLogProbs(*(x.to(input_ids.device) for x in (top_ids, top, own)))

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        start: Sequence[int],
        token_ids: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[ScoredSequence]:
        """Log-probs of the tokens of each sequence from a position on.

        Args:
            sequences: token ids, without padding.
            start: for each sequence the position of the first token to score; at least 1, since the first token has
                no log-prob.
            token_ids: for each sequence and each position from ``start`` on, the tokens to score there; -1 for none.
        """
        tokens, first = self._checked_sequences(sequences, start)
        requested = None if token_ids is None else self._checked_requested(token_ids, tokens, first)
        size = 1 if self._format.single else self.batch_size
        parts = [slice(i, i + size) for i in range(0, len(tokens), size)]
        return self._ask(
            [
                self._scoring_request(tokens[part], first[part], None if requested is None else requested[part])
                for part in parts
            ]
        )

    def _ask(self, requests: Sequence[ScoringRequest]) -> list[ScoredSequence]:
        answers = self._connection.request_all(
            [self._http_request(request) for request in requests],
            lambda which, answer: self._scored(answer, requests[which]),
        )
        return [one for answer in answers for one in answer]

    def _checked_sequences(
        self, sequences: Sequence[Sequence[int]], start: Sequence[int]
    ) -> tuple[list[list[int]], list[int]]:
        """Sequences and positions as lists of ints; raises for what no server scores, or this one has no room for."""
        if len(sequences) != len(start):
            raise ValueError(f"start must have one entry per sequence, got {len(start)} for {len(sequences)}")
        token_ids = [[_index(f"sequences[{i}]", x) for x in ids] for i, ids in enumerate(sequences)]
        first = [_index(f"start[{i}]", x) for i, x in enumerate(start)]
        for i, ids in enumerate(token_ids):
            if not 1 <= first[i] < len(ids):
                raise ValueError(
                    f"start[{i}] must be in [1, {len(ids)}), the length of its sequence (the first token has no "
                    f"log-prob), got {first[i]}"
                )
            if self.max_model_len is not None and len(ids) >= self.max_model_len:
                raise TeacherServerError(
                    f"sequence {i} has {len(ids)} tokens, and {self.base_url} has room for "
                    f"max_model_len={self.max_model_len} with the one that it generates: start the server with a "
                    "longer context, or make prompts and completions shorter"
                )
        return token_ids, first

    def _checked_requested(
        self, token_ids: Sequence[Sequence[Sequence[int]]], sequences: list[list[int]], start: list[int]
    ) -> list[list[list[int]]]:
        self.require_requested_ids()
        if len(token_ids) != len(sequences):
            raise ValueError(f"token_ids must have one entry per sequence, got {len(token_ids)} for {len(sequences)}")
        for i, (asked, ids, first) in enumerate(zip(token_ids, sequences, start, strict=True)):
            if len(asked) != len(ids) - first:
                raise ValueError(
                    f"token_ids[{i}] must have the tokens of {len(ids) - first} positions, those of its sequence from "
                    f"start[{i}]={first} on, got {len(asked)}"
                )
        return [[list(map(operator.index, x)) for x in one] for one in token_ids]

    def require_requested_ids(self, k: int | None = None) -> None:
        """Raise unless the server scores tokens that the caller names, ``k`` of them at each position if given."""
        if self.top_k is not None:
            raise ValueError(
                f"top_k={self.top_k} has the server list tokens of its own, and token_ids (support='student') are "
                "others: make the teacher without top_k"
            )
        if self._format.requested_ids is None:
            raise TeacherServerError(
                f"{self.base_url} does not score tokens that are named to it (support='student', token_ids), only its "
                f"likeliest (support='teacher', top_k): {_MORE_IDS[self.api]}. It gives: {self.capabilities}"
            )
        if k is not None:
            ids = [list(range(k))] * (len(_PROBE_IDS) - 1)
            self.score([_PROBE_IDS], [1], [ids])

    def _scoring_request(
        self, sequences: list[list[int]], start: list[int], requested: list[list[list[int]]] | None = None
    ) -> ScoringRequest:
        return ScoringRequest(
            self.model, sequences, start, self.top_k or 0, requested=requested, temperature=self.temperature
        )

    def _http_request(self, request: ScoringRequest, **more: Any) -> Request:
        """``more``: fields beside those of the format; None removes one."""
        body = {**self._format.body(request), **more, **self.extra_body}
        return Request("POST", self._format.path, {name: value for name, value in body.items() if value is not None})

    def _scored(self, answer: Any, request: ScoringRequest) -> list[ScoredSequence]:
        positions = self._positions(answer, request)
        with self._reading(request):
            return [scored(request, which, found, self.vocab_size) for which, found in enumerate(positions)]

    def _positions(self, answer: Any, request: ScoringRequest) -> list[list[Position]]:
        with self._reading(request, answer):
            return list(self._format.positions(answer, request))

    @contextmanager
    def _reading(self, request: ScoringRequest, answer: Any = None) -> Iterator[None]:
        """An answer of another form than the request's is a :class:`TeacherServerError`, which shows ``answer``."""
        advice = ""
        try:
            yield
            return
        except UnexpectedAnswer as error:
            found = str(error)
            if isinstance(error, TooFewListed):
                advice = f"; for a larger top_k {self._format.more_top}"
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            shown = "" if answer is None else f": {_dumped(answer)}"
            found = f"its form is not that of api={self.api!r} ({type(error).__name__}: {error}){shown}"
        raise TeacherServerError(
            f"{self.base_url}{self._format.path} answered not what api={self.api!r} promises; asked for "
            f"{self._asked(request)}, got: {self._connection.secrets.shown(found)}{advice}",
            status=200,
        ) from None

    def _asked(self, request: ScoringRequest) -> str:
        likeliest = f" and the {request.top_k} likeliest tokens of each position" if request.top_k else ""
        return f"the log-probs of {len(request.sequences)} sequences{likeliest}"

    def _advice(self, status: int) -> str:
        """Advice for a refused request, by its status."""
        if status in (404, 405):
            return f": base_url must be the server's root, and api={self.api!r} what it is"
        if status not in (401, 403, 407) and self.top_k is not None:
            return f": where it is top_k={self.top_k} that it does not grant, {self._format.more_top}"
        return ""

    # --------------------------------------------------------------------------------------------------- at the start

    def _check_model(self) -> None:
        def cards_by_name(_: int, answer: Any) -> dict[str, Any]:
            try:
                return {str(card["id"]): dict(card) for card in answer["data"]}
            except (KeyError, TypeError, ValueError):
                raise TeacherServerError(
                    f"{self.base_url}/v1/models must list models as {{'data': [{{'id': ...}}]}}, got "
                    f"{shown(_dumped(answer))}: is base_url a server of models?"
                ) from None

        shown = self._connection.secrets.shown
        (cards,) = self._connection.request_all([Request("GET", "/v1/models", None)], cards_by_name)
        if self.model not in cards:
            raise TeacherServerError(
                f"{self.base_url} does not serve model={self.model!r}; it serves "
                f"{shown(', '.join(map(repr, cards)) or 'none')}: pass one of these names as model, or start the "
                "server with --served-model-name"
            )
        length = cards[self.model].get("max_model_len")
        self.max_model_len = length if type(length) is int and length > 0 else None

    def _find_format(self) -> Format:
        """The best of the forms of requests that the server answers; a wrong last one is found by the next probe."""
        *better, last = FORMATS[self.api]
        for form in better:
            named = [[2, 4], [3, 5]] if form.requested_ids else None
            request = ScoringRequest(self.model, [_PROBE_IDS], [1], 0, requested=None if named is None else [named])
            self._format = form
            try:
                self._ask([request])
            except TeacherServerError as error:
                if error.status is None or not is_refusal(error.status):
                    raise
            else:
                return form
        return last

    def _check_temperature(self) -> None:
        """Raise unless the odds of two tokens are those of the temperature: log q_T(a)/q_T(b) = log q(a)/q(b) / T."""
        at_one = odds = 0.0
        positions = len(_TEMPERATURE_IDS) - 1
        # in the form in which scores are asked for later
        named = self.top_k is None and self._format.requested_ids is not None
        asked = ScoringRequest(
            self.model,
            [_TEMPERATURE_IDS],
            [1],
            0 if named else self.top_k or 1,
            requested=[[_TEMPERATURE_IDS] * positions] if named else None,
        )
        (one,), (other,) = (self._ask([asked._replace(temperature=t)]) for t in (1.0, self.temperature))
        for n in range(positions):
            # of the likeliest token to the given one
            pair = [max(scores.top_logprobs[n]) - scores.logprobs[n] for scores in (one, other)]
            if math.inf > pair[0] > at_one:
                at_one, odds = pair
        wanted = at_one / self.temperature
        if abs(wanted - at_one) <= 2 * _ROUNDED_ODDS:
            raise TeacherServerError(
                f"{self.base_url} cannot be asked for temperature={self.temperature:g}: whether it returns those "
                "log-probs does not show in the ones of a few tokens, whose probabilities are nearly equal. Sample the "
                "student at temperature 1, or use a teacher that runs here"
            )
        if not abs(odds - wanted) <= _ROUNDED_ODDS * max(1.0, 1 / self.temperature):
            raise TeacherServerError(
                f"{self.base_url} does not return log-probs of temperature={self.temperature:g}: the log-odds of two "
                f"tokens should go from {at_one:.3f} to {wanted:.3f}, and went to {odds:.3f}. vLLM and SGLang score "
                "given tokens at temperature 1, whatever --logprobs-mode is: sample the student at temperature 1, or "
                "use a teacher whose head is here"
            )

    def _probe(self, tokenizer: Any) -> None:
        """Score a few tokens as in training, and compare the server's texts of tokens with the student's."""
        self.score([_PROBE_IDS], [1])
        if tokenizer is None:
            return
        ids = list(tokenizer.encode(PROBE_TEXT, add_special_tokens=False))
        request = self._scoring_request([ids], [1])._replace(texts=True)
        ((positions,),) = self._connection.request_all(
            [self._http_request(request)], lambda _, a: self._positions(a, request)
        )
        self._compare_texts(tokenizer, ids, positions)

    def _compare_texts(self, tokenizer: Any, ids: list[int], positions: Sequence[Position]) -> None:
        """Raise where the server's text of a token is not the student's; ``positions`` are of ``ids[1:]``."""
        texts = [(i, p.text, tokenizer.decode([i])) for i, p in zip(ids[1:], positions, strict=True)]
        for token_id, theirs, ours in texts:
            if theirs is not None and not _same_text(theirs, ours):
                raise TeacherServerError(
                    f"tokenizer must be that of {self.model!r} on {self.base_url}: token {token_id} is {ours!r} here "
                    f"and {self._connection.secrets.shown(theirs)!r} there. Serve a teacher with the student's "
                    "tokenizer, or have texts compared in place of ids: its own tokenizer here and "
                    "cross_tokenizer=True in GOPDConfig, --cross-tokenizer and --teacher-tokenizer of `fused-gopd "
                    "distill`"
                )
        if all(theirs is None for _, theirs, _ in texts):
            warnings.warn(
                f"{self.base_url} does not tell the texts of tokens: that its tokenizer is the student's was not "
                "checked",
                stacklevel=4,
            )


_MORE_IDS = {
    "vllm": "start vLLM, 0.32 or newer, with --enable-scale-out and its V2 model runner",
    "sglang": "SGLang must know token_ids_logprob",
    "openai": "the protocol has none; api='vllm' and 'sglang' may",
}


def _by_position(token_ids: Tensor, wanted: Tensor) -> list[list[list[int]]]:
    """The tokens (B, K, k) to score in each sequence with a wanted token, from the first of these to the last."""
    found = []
    for row, keep in zip(token_ids.cpu(), wanted, strict=True):
        there = keep.nonzero().flatten().tolist()
        if there:
            span = slice(there[0], there[-1] + 1)
            found.append([ids if k else [] for ids, k in zip(row[span].tolist(), keep[span].tolist(), strict=True)])
    return found


def _index(name: str, value: Any) -> int:
    """A token id or position as an int, also from NumPy's integers."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be of integers of at least 0, got {value!r}")
    return number


def _dumped(answer: Any) -> str:
    """An answer as JSON. Not shortened, since a part of a secret could not be found and masked."""
    try:
        return json.dumps(answer)
    except RecursionError:
        return "thousands of lists within each other"


def __getattr__(name: str) -> Any:
    if name == "HiddenStateTeacher":  # needs transformers, for the head; its module imports this one
        return getattr(importlib.import_module(".states", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
