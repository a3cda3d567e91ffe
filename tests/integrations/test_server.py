"""A teacher behind HTTP: real requests to a local server that answers in the formats of vLLM, SGLang and OpenAI."""

from __future__ import annotations

import email.utils
import html
import io
import json
import math
import os
import pickle
import signal
import threading
import time
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_gopd as fg

pytest.importorskip("httpx")

from fused_gopd.integrations.addresses import environment_proxy
from fused_gopd.integrations.server import ServerTeacher, TeacherServerError, http

pytestmark = pytest.mark.usefixtures("one_thread")

V, H = 19, 6
# vllm-tokens is vLLM with --enable-scale-out, vllm-ids with its V2 model runner too
APIS = ("vllm", "vllm-tokens", "vllm-ids", "sglang", "openai")


class CausalModel:
    """A model of a few tokens: what it knows of a prefix is the running mean of its embeddings."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.embeddings = torch.randn(V, H, generator=g)
        self.weight = torch.randn(V, H, generator=g)

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, H); masked tokens are not there."""
        there = torch.ones_like(ids) if mask is None else mask
        total = (self.embeddings[ids] * there[..., None]).cumsum(-2)
        return torch.tanh(2 * total / there.cumsum(-1).clamp_min(1)[..., None])

    def logprobs(self, ids: list[int]) -> list[list[float]]:
        """At each position, of every token that may come next."""
        return torch.log_softmax(self.hidden(torch.tensor([ids]))[0] @ self.weight.T, -1).tolist()


def word(token_id: int) -> str:
    return f" w{token_id}"


class Words:
    """A tokenizer whose tokens are words by number; the text of the probe is some of them."""

    def __init__(self, prefix: str = " w") -> None:
        self.prefix = prefix

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [7, 5, 3, 11]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{self.prefix}{i}" for i in ids)


# -------------------------------------------------------------------------------- the server


def likeliest(row: list[float], k: int) -> list[int]:
    return sorted(range(V), key=lambda i: -row[i])[:k]


def vllm_prompt_logprobs(model: CausalModel, ids: list[int], k: int, texts: bool) -> list[Any]:
    listed: list[Any] = [None]
    for token, row in zip(ids[1:], model.logprobs(ids), strict=False):
        shown = dict.fromkeys([token, *likeliest(row, k)])
        listed.append(
            {str(i): {"logprob": row[i], "rank": 1, "decoded_token": word(i) if texts else None} for i in shown}
        )
    return listed


def vllm_answer(model: CausalModel, body: dict[str, Any]) -> Any:
    assert body["max_tokens"] == 1
    choices = []
    for index, ids in enumerate(body["prompt"]):
        listed = vllm_prompt_logprobs(model, ids, body["prompt_logprobs"], texts=True)
        choices.append({"index": index, "text": "x", "prompt_logprobs": listed})
    return {"object": "text_completion", "choices": choices[::-1]}  # the order is in the index


def vllm_tokens_answer(model: CausalModel, body: dict[str, Any]) -> Any:
    """As vLLM 0.32.0's /inference/v1/generate."""
    ids, params = body["token_ids"], body["sampling_params"]
    assert params["max_tokens"] == 1
    listed = scores = None
    if "prompt_logprobs" in params:
        listed = vllm_prompt_logprobs(model, ids, params["prompt_logprobs"], params["detokenize"])
    if "prompt_logprob_token_ids" in params:
        asked, first = params["prompt_logprob_token_ids"], params["prompt_logprob_start"]
        assert len(asked) == len(ids) - 1 - first
        rows = np.full((len(asked), max(map(len, asked))), -math.inf, np.float32)
        for i, (wanted, row) in enumerate(zip(asked, model.logprobs(ids)[first:-1], strict=True)):
            rows[i, : len(wanted)] = [row[j] if j >= 0 else -math.inf for j in wanted]
        scores = npy(rows)
    return {
        "request_id": "generate-tokens-1",
        "prompt_token_ids": ids if body.get("return_token_ids") else None,
        "prompt_logprobs": listed,
        "prompt_token_id_logprobs": scores,
        "choices": [{"index": 0, "token_ids": [1], "logprobs": None}],
    }


def npy(array: np.ndarray, **options: Any) -> str:
    file = io.BytesIO()
    np.save(file, array, **options)
    return b64encode(file.getvalue()).decode()


def sglang_answer(model: CausalModel, body: dict[str, Any]) -> Any:
    answers = []
    for ids, first in zip(body["input_ids"], body["logprob_start_len"], strict=True):
        rows = model.logprobs(ids)
        texts = [word(i) if body["return_text_in_logprobs"] else None for i in ids]
        own: list[Any] = [[None, ids[first], texts[first]]]
        own += [[rows[t - 1][ids[t]], ids[t], texts[t]] for t in range(first + 1, len(ids))]
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": own}
        if k := body["top_logprobs_num"]:
            tops = [[[row[i], i, None] for i in likeliest(row, k)] for row in rows[first : len(ids) - 1]]
            meta["input_top_logprobs"] = [None, *tops]
        if body.get("token_ids_logprob"):
            asked = body["token_ids_logprob"][len(answers)]
            scores = [[[row[i], i, None] for i in asked] or None for row in rows[first : len(ids) - 1]]
            meta["input_token_ids_logprobs"] = [None, *scores]
        answers.append({"text": "", "meta_info": meta})
    return answers


def openai_answer(model: CausalModel, body: dict[str, Any]) -> Any:
    assert body["echo"]
    assert body["max_tokens"] == 0
    name = (lambda i: f"token_id:{i}") if body.get("return_tokens_as_token_ids") else word
    choices = []
    for index, ids in enumerate(body["prompt"]):
        rows = model.logprobs(ids)
        own = [None, *(row[i] for i, row in zip(ids[1:], rows, strict=False))]
        tops = [None, *({name(i): row[i] for i in likeliest(row, body["logprobs"])} for row in rows[:-1])]
        listed = {"tokens": [name(i) for i in ids], "token_logprobs": own, "top_logprobs": tops, "text_offset": []}
        choices.append({"index": index, "text": "", "logprobs": listed})
    return {"choices": choices}


ANSWERS = {
    "vllm": vllm_answer,
    "vllm-tokens": vllm_tokens_answer,
    "vllm-ids": vllm_tokens_answer,
    "sglang": sglang_answer,
    "openai": openai_answer,
}


def refusal(server: Server, path: str, body: dict[str, Any]) -> tuple[int, str] | None:
    """As of a server that was started without an endpoint, or does not have a field."""
    if path.endswith("/inference/v1/generate") and server.api == "vllm":
        return server.refusals["/inference/v1/generate"], "Scale-out endpoints are disabled."
    if server.api == "vllm-tokens" and "prompt_logprob_token_ids" in body["sampling_params"]:
        return 400, "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)."
    return None


class Server(ThreadingHTTPServer):
    """Serves ``model``; faults are what it does to the next requests for log-probs, one each."""

    daemon_threads = True

    def __init__(self, api: str, model: CausalModel) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.api, self.model = api, model
        self.cards: Any = {"data": [{"id": "teacher", "max_model_len": 64}]}
        self.faults: list[Callable[[Handler, Any], Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.answer = ANSWERS[api]
        self.moved = ""  # where requests for the models are sent on to
        self.refusals = {"/inference/v1/generate": 403}  # of vLLM without --enable-scale-out

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is what some tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def teacher(self, **options: Any) -> ServerTeacher:
        api = self.api.partition("-")[0]
        return ServerTeacher(self.url, "teacher", **{"api": api, "backoff": 0.01, "timeout": 5.0, **options})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        if self.server.moved:
            self.send(307, b"", {"Location": self.server.moved + self.path})
            return
        self.send(200, self.server.cards)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refused = refusal(self.server, self.path, body)
        if refused is not None:
            self.send(refused[0], {"error": {"message": refused[1]}})
            return
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            answer = self.server.answer(self.server.model, body)
            if fault is not None:
                answer = fault(self, answer)
        finally:
            with self.server.lock:
                self.server.under_way -= 1
        if answer is not None:
            self.send(200, answer)


def status(code: int, content: Any, headers: dict[str, str] | None = None) -> Callable[[Handler, Any], Any]:
    return lambda handler, answer: handler.send(code, content, headers)


def slow(seconds: float) -> Callable[[Handler, Any], Any]:
    def wait(handler: Handler, answer: Any) -> Any:
        time.sleep(seconds)
        return answer

    return wait


def hang_up(handler: Handler, answer: Any) -> None:
    handler.close_connection = True


def cut(handler: Handler, answer: Any) -> None:
    """Half of the body that was announced, and the end of the connection."""
    data = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def changed(change: Callable[[Any], Any]) -> Callable[[Handler, Any], Any]:
    """The answer after ``change`` has been at it."""

    def fault(handler: Handler, answer: Any) -> Any:
        change(answer)
        return answer

    return fault


def serve(api: str) -> Iterator[Server]:
    with Server(api, CausalModel(1)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture(params=APIS)
def any_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    yield from serve(request.param)


@pytest.fixture(params=[api for api in APIS if api != "vllm-ids"])
def listing_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Those that answer in JSON's numbers, not in an array."""
    yield from serve(request.param)


@pytest.fixture
def vllm() -> Iterator[Server]:
    yield from serve("vllm")


@pytest.fixture
def openai() -> Iterator[Server]:
    yield from serve("openai")


# -------------------------------------------------------------------------------- what the loss gets

# prompts padded on the left, completions on the right; the last one has nothing to learn from
PROMPT_MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
COMPLETION_MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])  # a tool's token in between
ATTENDED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(5))
    return ids, torch.cat((PROMPT_MASK, ATTENDED), 1), COMPLETION_MASK


def local_head(model: CausalModel) -> fg.LinearHead:
    ids, mask, _ = batch()
    return fg.LinearHead(model.hidden(ids, mask)[:, 3:-1], model.weight)


def loss_and_gradient(teacher: Any, ref: Any, **options: Any) -> tuple[Tensor, Tensor]:
    ids, _, completion_mask = batch()
    head = local_head(CausalModel(2))
    student = fg.LinearHead(head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_())
    out = fg.gopd_loss(student, teacher, ref, ids[:, 4:], mask=completion_mask, **options)
    out.loss.backward()
    return out.loss.detach(), torch.cat([student.hidden.grad.flatten(), student.weight.grad.flatten()])


# The same float32 log-probs by two ways of summing, of logits below 20: 20 * 6e-8 each; they enter once.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_sampled_loss_is_that_of_the_local_teacher(any_server: Server, scale: float) -> None:
    with any_server.teacher() as teacher:
        scored = teacher(*batch())
    ref = local_head(CausalModel(3))
    got = loss_and_gradient(scored, ref, reward_scale=scale)
    want = loss_and_gradient(local_head(any_server.model), ref, reward_scale=scale)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_topk_loss_is_that_of_the_local_teacher(any_server: Server) -> None:
    with any_server.teacher(top_k=4) as teacher:
        scored = teacher(*batch())
    ref = local_head(CausalModel(3))
    for tail in ("bucket", "sampled"):  # the log-prob of the sampled token comes with the others
        options = {"estimator": "topk", "tail": tail, "reward_scale": 1.25}
        got = loss_and_gradient(scored, ref, **options)
        want = loss_and_gradient(local_head(any_server.model), ref, k=4, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.fixture(params=["vllm-ids", "sglang"])
def naming_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Those that score tokens which are named to them."""
    yield from serve(request.param)


def students_topk(k: int) -> Tensor:
    return fg.token_topk(local_head(CausalModel(2)), k)[0]


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
def test_the_student_s_tokens_are_scored(naming_server: Server, tail: str) -> None:
    ids = students_topk(4)
    ids[0, 1, 2:] = -1  # fewer at one position
    with naming_server.teacher() as teacher:
        scored = teacher(*batch(), ids)
    assert isinstance(scored, fg.TopKLogProbs)
    live = COMPLETION_MASK.bool()
    assert torch.equal(scored.token_ids[live], ids[live])
    assert (scored.token_ids[~live] == -1).all()
    ref = local_head(CausalModel(3))
    options = {"estimator": "topk", "tail": tail, "reward_scale": 1.25}
    got = loss_and_gradient(scored, ref, **options)
    want = loss_and_gradient(local_head(naming_server.model), ref, support_ids=ids, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_only_what_is_wanted_is_named(naming_server: Server) -> None:
    with naming_server.teacher() as teacher:
        naming_server.bodies.clear()
        teacher(*batch(), students_topk(2))
    ids, _, _ = batch()
    wanted = students_topk(2)
    if naming_server.api == "sglang":
        (body,) = naming_server.bodies
        assert body["token_ids_logprob"][1] == sorted(set(wanted[1][COMPLETION_MASK[1] == 1].flatten().tolist()))
        return
    first, second = sorted(naming_server.bodies, key=lambda body: len(body["token_ids"]))
    assert first["sampling_params"]["prompt_logprob_start"] == 1
    # its own token, and those that are named; nothing else at the second position, which a tool wrote
    assert second["sampling_params"]["prompt_logprob_token_ids"] == [
        [own, *named] if n != 1 else [own]
        for n, (own, named) in enumerate(zip(ids[1, 4:].tolist(), wanted[1].tolist(), strict=True))
    ]


def test_a_server_that_cannot_be_named_tokens_says_so(vllm: Server, openai: Server) -> None:
    for server, said in ((vllm, r"start vLLM, 0.32 or newer, with --enable-scale-out"), (openai, "protocol has none")):
        with server.teacher() as teacher:
            assert teacher.capabilities.requested_ids is None
            server.bodies.clear()
            with pytest.raises(TeacherServerError, match=rf"{said}.*It gives: .*requested tokens: none"):
                teacher(*batch(), students_topk(2))
            assert not server.bodies


def test_named_tokens_of_another_shape_are_refused(naming_server: Server) -> None:
    with naming_server.teacher() as teacher:
        with pytest.raises(ValueError, match=r"token_ids must have shape \(3, 5, 'k'\).*, got \(3, 5\)"):
            teacher(*batch(), students_topk(2)[..., 0])
        with pytest.raises(TypeError, match="token_ids must be"):
            teacher(*batch(), students_topk(2).float())
        with pytest.raises(ValueError, match=r"token_ids\[0\] must have the tokens of 2 positions.*got 1"):
            teacher.score([[1, 2, 3]], [1], [[[4]]])
        with pytest.raises(ValueError, match="token_ids must have one entry per sequence, got 2 for 1"):
            teacher.score([[1, 2, 3]], [1], [[[4], [5]]] * 2)
    with (
        naming_server.teacher(top_k=2) as teacher,
        pytest.raises(ValueError, match="make the teacher without top_k"),
    ):
        teacher(*batch(), students_topk(2))


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (7, "must be a string of base64, got 7"),
        ("~", "no array in NumPy's format"),
        (b64encode(b"hello").decode(), "no array in NumPy's format"),
        (npy(np.array([[None, 1.0]] * 2), allow_pickle=True), r"must be float32 of shape \(2, 2\) by rows, got object"),
        (npy(np.zeros((2, 2))), "got float64 of shape"),
        (npy(np.zeros((3, 2), np.float32)), r"got float32 of shape \(3, 2\)"),
        (npy(np.zeros((2, 2), np.float32, order="F")), "by rows"),
        (npy(np.zeros((2, 2), np.float32))[:-4], r"\(2, 2\) in 13 bytes"),
        (npy(np.full((2, 2), np.nan, np.float32)), "has the log-prob nan"),
        (npy(np.full((2, 2), 0.5, np.float32)), "has the log-prob 0.5"),
        (None, "must be a string of base64, got None"),
    ],
    ids=lambda value: str(value)[:14],
)
def test_an_array_that_is_none_is_refused_and_nothing_is_unpickled(
    monkeypatch: pytest.MonkeyPatch, scores: Any, said: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for server in serve("vllm-ids"):
        with server.teacher() as teacher:
            server.faults = [changed(lambda answer: answer.update(prompt_token_id_logprobs=scores))]
            with pytest.raises(TeacherServerError, match=said):
                teacher.score([[4, 1, 2]], [1], [[[3], [3]]])


def test_an_array_that_claims_to_be_huge_is_not_allocated() -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**15, 2)})
    huge = b64encode(file.getvalue()).decode()
    for server in serve("vllm-ids"):
        with server.teacher() as teacher:
            server.faults = [changed(lambda answer: answer.update(prompt_token_id_logprobs=huge))]
            with pytest.raises(TeacherServerError, match=r"got float32 of shape \(1000000000000000, 2\) in 0 bytes"):
                teacher.score([[4, 1, 2]], [1])


def test_sglang_s_union_must_have_each_token() -> None:
    def change(answer: Any) -> None:
        answer[0]["meta_info"]["input_token_ids_logprobs"][-1].pop()

    for server in serve("sglang"):
        with server.teacher() as teacher:
            server.faults = [changed(change)]
            with pytest.raises(TeacherServerError, match="position 2 has no log-prob of token 7, which was asked for"):
                teacher.score([[4, 1, 2]], [1], [[[3], [7]]])


def test_of_another_sequence_is_refused() -> None:
    """vLLM's other endpoint answers with the sequence; an array alone would not tell of which it is."""
    for api in ("vllm-tokens", "vllm-ids"):
        for server in serve(api):
            with server.teacher() as teacher:
                server.faults = [changed(lambda answer: answer.update(prompt_token_ids=[4, 3, 2]))]
                with pytest.raises(TeacherServerError, match="sequence 0, position 1 must be token 1, got token 3"):
                    teacher.score([[4, 1, 2]], [1])


# -------------------------------------------------------------------------------- what the server gives


@pytest.mark.parametrize(
    ("api", "said"),
    [
        ("vllm", "/v1/completions with the texts of candidates, requested tokens: none, "),
        ("vllm-tokens", "/inference/v1/generate without the texts of candidates, requested tokens: none, "),
        ("vllm-ids", "/inference/v1/generate without the texts of candidates, requested tokens: of each position, "),
        ("sglang", "/generate without the texts of candidates, requested tokens: one list a sequence, "),
        ("openai", "/v1/completions with the texts of candidates, requested tokens: none, "),
    ],
)
def test_what_the_server_gives_is_said(api: str, said: str) -> None:
    for server in serve(api):
        with server.teacher(top_k=3) as teacher:
            assert str(teacher.capabilities) == f"{said}likeliest tokens: 3, temperature 1, at most 64 tokens"


def test_a_busy_server_is_not_taken_for_one_that_has_less() -> None:
    """A probe that is answered by 503 is repeated, and ends in an error where it stays so: nothing else is chosen."""
    for server in serve("vllm-ids"):
        server.faults = [status(503, {"message": "busy"})]
        with server.teacher() as teacher:
            assert teacher.capabilities.requested_ids == "position"
        server.faults = [status(503, {"message": "busy"})] * 9
        with pytest.raises(TeacherServerError, match="in 2 attempts") as error:
            server.teacher(retries=1)
        assert error.value.status == 503


@pytest.mark.parametrize("code", [401, 404, 405, 501])
def test_an_endpoint_that_is_refused_is_not_used(code: int) -> None:
    for server in serve("vllm"):
        server.refusals["/inference/v1/generate"] = code
        with server.teacher() as teacher:
            assert teacher.capabilities.endpoint == "/v1/completions"


# -------------------------------------------------------------------------------- temperature


def at_temperature(server: Server) -> None:
    """The server divides logits by the request's temperature, as no released one does for tokens of a prompt."""
    logprobs = server.model.logprobs

    def scaled(model: CausalModel, body: dict[str, Any]) -> Any:
        t = body.get("sampling_params", body)["temperature"]
        model.logprobs = lambda ids: torch.tensor(logprobs(ids)).div(t).log_softmax(-1).tolist()  # type: ignore[method-assign]
        return ANSWERS[server.api](model, body)

    server.answer = scaled


def test_a_temperature_that_the_server_gives_is_that_of_its_log_probs(any_server: Server) -> None:
    at_temperature(any_server)
    with any_server.teacher(temperature=0.7) as teacher:
        assert teacher.temperature == teacher.capabilities.temperature == 0.7
        scored = teacher(*batch())
    head = local_head(CausalModel(1))
    expected = fg.token_logprobs(
        fg.LinearHead(head.hidden, head.weight, temperature=0.7), batch()[0][:, 4:], mask=COMPLETION_MASK
    )
    torch.testing.assert_close(scored.logprobs, expected, **CLOSE)


def test_a_temperature_that_the_server_ignores_is_refused(any_server: Server) -> None:
    with pytest.raises(
        TeacherServerError, match=r"does not return log-probs of temperature=0\.7: .*whatever --logprobs-mode is"
    ):
        any_server.teacher(temperature=0.7)


def test_a_temperature_that_does_not_show_is_refused(vllm: Server) -> None:
    vllm.model.weight.zero_()  # uniform: the same at all temperatures
    with pytest.raises(TeacherServerError, match="whose probabilities are nearly equal"):
        vllm.teacher(temperature=2.0)


def test_a_reference_may_be_behind_a_server_too(vllm: Server) -> None:
    with vllm.teacher() as remote:
        scored = remote(*batch())
    teacher = local_head(CausalModel(3))
    got = loss_and_gradient(teacher, scored, reward_scale=1.25)
    want = loss_and_gradient(teacher, local_head(vllm.model), reward_scale=1.25)
    torch.testing.assert_close(got[1], want[1], **CLOSE)


def test_masked_tokens_are_zero_and_have_no_ids(vllm: Server) -> None:
    with vllm.teacher(top_k=2) as teacher:
        scored = teacher(*batch())
    masked = COMPLETION_MASK == 0
    assert (scored.token_ids[masked] == -1).all()
    assert (scored.logprobs[masked] == 0).all()
    assert (scored.token_ids[~masked] >= 0).all()


def test_padding_and_what_is_not_wanted_are_not_sent(vllm: Server) -> None:
    ids, attention_mask, completion_mask = batch()
    with vllm.teacher() as teacher:
        vllm.bodies.clear()
        teacher(ids, attention_mask, completion_mask)
    sent = [sequence for body in vllm.bodies for sequence in body["prompt"]]
    assert sent == [ids[0, 2:7].tolist(), ids[1].tolist()]


def test_nothing_wanted_asks_nothing(any_server: Server) -> None:
    ids, attention_mask, completion_mask = batch()
    for options in ({}, {"top_k": 3}):
        with any_server.teacher(**options) as teacher:
            any_server.bodies.clear()
            scored = teacher(ids, attention_mask, torch.zeros_like(completion_mask))
        assert scored.token_shape == completion_mask.shape
        assert not any_server.bodies


# -------------------------------------------------------------------------------- the queue


def test_order_is_kept_whatever_the_order_of_the_answers(any_server: Server) -> None:
    sequences = [[i % V, (3 * i) % V, (5 * i + 1) % V] for i in range(12)]
    with any_server.teacher(batch_size=1, max_concurrency=12) as teacher:
        any_server.faults = [slow(0.05 * (i % 3)) for i in range(12)]
        scored = teacher.score(sequences, [1] * 12)
    for ids, one in zip(sequences, scored, strict=True):
        rows = any_server.model.logprobs(ids)
        assert one.logprobs == pytest.approx([rows[0][ids[1]], rows[1][ids[2]]])


@pytest.mark.parametrize("api", ["vllm", "vllm-ids"])  # two sequences in a request, and one
def test_under_all_faults_at_once_each_sequence_has_its_own_scores(api: str) -> None:
    """200 at once, with 40 faults among the requests and as many answers out of turn."""
    generator = torch.Generator().manual_seed(3)
    sequences = torch.randint(V, (200, 12), generator=generator).tolist()
    faults = [
        status(429, {"message": "slow down"}),
        status(500, {"message": "oh"}),
        hang_up,
        cut,
        status(503, b"<html>busy</html>"),
        status(200, b"no gzip", {"Content-Encoding": "gzip"}),
    ]
    for server in serve(api):
        with server.teacher(max_concurrency=50, retries=20, batch_size=2) as teacher:
            server.faults = [each for n in range(40) for each in (faults[n % len(faults)], slow(0.002 * (n % 5)))]
            found = teacher.score(sequences, [4] * 200)
        assert not server.faults
        for ids, one in zip(sequences, found, strict=True):
            rows = server.model.logprobs(ids)
            assert one.logprobs == pytest.approx([rows[t - 1][ids[t]] for t in range(4, 12)], abs=1e-5)


def test_no_more_requests_than_allowed_are_under_way(vllm: Server) -> None:
    with vllm.teacher(batch_size=2, max_concurrency=3) as teacher:
        vllm.bodies.clear()
        vllm.faults = [slow(0.05)] * 8
        teacher.score([[1, 2]] * 15, [1] * 15)
    assert vllm.most_under_way == 3
    assert sorted(len(body["prompt"]) for body in vllm.bodies) == [1, *[2] * 7]


def test_as_many_sequences_are_under_way_where_a_request_has_one() -> None:
    for server in serve("vllm-tokens"):
        with server.teacher(batch_size=2, max_concurrency=3) as teacher:
            server.faults = [slow(0.1)] * 15
            teacher.score([[1, 2]] * 15, [1] * 15)
        assert server.most_under_way == 6


def test_the_training_s_random_numbers_are_left_alone(vllm: Server) -> None:
    import random

    random.seed(3)
    expected = random.random()
    random.seed(3)
    with vllm.teacher() as teacher:
        vllm.faults = [status(500, {"message": "oh"})]
        teacher.score([[1, 2]], [1])
    assert random.random() == expected


# -------------------------------------------------------------------------------- what is repeated


@pytest.mark.parametrize(
    "fault",
    [
        status(500, {"error": {"message": "engine restarting"}}),
        status(503, b"<html>busy</html>"),
        status(429, {"message": "slow down"}),
        hang_up,
        cut,
        slow(0.6),
        status(200, b"no gzip", {"Content-Encoding": "gzip"}),
    ],
    ids=["500", "503", "429", "hung up", "cut", "slow", "broken compression"],
)
def test_what_may_pass_is_asked_again(vllm: Server, fault: Callable[[Handler, Any], Any]) -> None:
    with vllm.teacher(timeout=0.3, retries=2) as teacher:
        vllm.faults = [fault, fault]
        (scored,) = teacher.score([[1, 2]], [1])
    assert scored.logprobs == pytest.approx([vllm.model.logprobs([1])[0][2]])


def test_retry_after_is_kept_to(vllm: Server) -> None:
    with vllm.teacher(retries=1) as teacher:
        vllm.faults = [status(429, {"message": "slow down"}, {"Retry-After": "1"})]
        started = time.monotonic()
        teacher.score([[1, 2]], [1])
    assert time.monotonic() - started >= 1.0


def test_retry_after_may_be_a_date() -> None:
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < http._retry_after(in_a_minute) <= 60
    assert http._retry_after("soon") is None


def test_waits_double_up_to_a_bound(vllm: Server) -> None:
    with vllm.teacher(backoff=1.0) as teacher:
        waits = [teacher._connection._pause(attempt, None) for attempt in range(12)]
    assert all(0.5 * min(30.0, 2.0**n) <= wait <= min(30.0, 2.0**n) for n, wait in enumerate(waits))


def test_patience_outlasts_a_restart(vllm: Server, caplog: pytest.LogCaptureFixture) -> None:
    with vllm.teacher(retries=0, patience=30.0) as teacher:
        vllm.faults = [status(503, b""), hang_up, status(500, b""), hang_up]
        (scored,) = teacher.score([[1, 2]], [1])
    assert scored.logprobs == pytest.approx([vllm.model.logprobs([1])[0][2]])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fused_gopd")]
    assert ["asked again for up to 30 s" in said[0], "answers again" in said[1], len(said)] == [True, True, 2]


def test_patience_ends(vllm: Server) -> None:
    with vllm.teacher(retries=0, patience=0.3) as teacher:
        vllm.faults = [status(503, b"")] * 1000
        started = time.monotonic()
        with pytest.raises(TeacherServerError, match=r"no answer .* in \d+ attempts.*raise retries or patience"):
            teacher.score([[1, 2]], [1])
    assert 0.3 <= time.monotonic() - started < 3
    assert len(vllm.faults) < 999


def test_patience_begins_with_the_first_failure(vllm: Server) -> None:
    """Not with the request, which may have waited in the server's queue for longer."""

    def late(handler: Handler, answer: Any) -> Any:
        time.sleep(0.5)
        return status(503, b"")(handler, answer)

    with vllm.teacher(retries=0, patience=0.4) as teacher:
        vllm.faults = [late]
        (scored,) = teacher.score([[1, 2]], [1])
    assert scored.logprobs == pytest.approx([vllm.model.logprobs([1])[0][2]])


def test_patience_is_for_a_server_that_has_answered() -> None:
    started = time.monotonic()
    with pytest.raises(TeacherServerError, match="in 2 attempts"):
        ServerTeacher("http://127.0.0.1:9", "teacher", retries=1, backoff=0.01, patience=3600.0)
    assert time.monotonic() - started < 5


def test_an_interrupt_abandons_what_is_under_way(vllm: Server) -> None:
    abandoned = threading.Semaphore(0)  # connections that the client has closed
    interrupted = threading.Lock()  # once: both may see that two are under way

    def never_answer(handler: Handler, answer: Any) -> None:
        if handler.server.under_way == 2 and interrupted.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGINT)
        handler.connection.settimeout(10)
        if handler.connection.recv(1) == b"":
            abandoned.release()

    with vllm.teacher(timeout=60.0, batch_size=1) as teacher:
        vllm.faults = [never_answer] * 2
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            teacher.score([[1, 2], [3, 4]], [1, 1])
        assert all(abandoned.acquire(timeout=5) for _ in range(2))
    assert time.monotonic() - started < 5
    # the interpreter joins those at its end
    waited_for = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    assert not waited_for


def test_a_refusal_is_not_repeated(vllm: Server) -> None:
    with vllm.teacher() as teacher:
        vllm.bodies.clear()
        vllm.faults = [status(400, {"error": {"message": "prompt is too long"}})]
        with pytest.raises(TeacherServerError, match=r"refused, status 400: prompt is too long"):
            teacher.score([[1, 2]], [1])
    assert len(vllm.bodies) == 1


# -------------------------------------------------------------------------------- errors


def test_timeout_names_server_timeout_and_remedy(vllm: Server) -> None:
    with vllm.teacher(timeout=0.1, retries=1) as teacher:
        vllm.faults = [slow(0.5)] * 2
        with pytest.raises(TeacherServerError, match=r"timeout=0.1 s was not enough.*raise timeout") as error:
            teacher.score([[1, 2]], [1])
    assert vllm.url in str(error.value)
    assert "2 attempts" in str(error.value)


def test_no_server_names_address_and_attempts() -> None:
    with pytest.raises(
        TeacherServerError, match=r"no answer from http://127.0.0.1:9/v1/models in 2 attempts.*ConnectE"
    ):
        ServerTeacher("http://127.0.0.1:9", "teacher", retries=1, backoff=0.01)


def test_a_wait_that_no_training_waits_is_an_error(vllm: Server) -> None:
    with vllm.teacher() as teacher:
        vllm.faults = [status(429, {}, {"Retry-After": "86400"})]
        with pytest.raises(TeacherServerError, match="left alone for 86400 s"):
            teacher.score([[1, 2]], [1])


def test_one_failure_ends_the_others(vllm: Server) -> None:
    with vllm.teacher(batch_size=1, max_concurrency=1) as teacher:
        vllm.bodies.clear()
        vllm.faults = [status(400, {"message": "no"})]
        with pytest.raises(TeacherServerError, match="no"):
            teacher.score([[1, 2]] * 50, [1] * 50)
        time.sleep(0.2)  # what would go on, would go on in threads
    assert len(vllm.bodies) < 5


def of_prompt(answer: Any) -> list[Any]:
    """vLLM's log-probs of the first sequence."""
    holder = answer if "prompt_logprobs" in answer else next(c for c in answer["choices"] if c["index"] == 0)
    return holder["prompt_logprobs"]


def own_entry(answer: Any, api: str) -> tuple[Any, Any]:
    """Where the last token's log-prob of the first sequence is in an answer: a container and its key."""
    if api.startswith("vllm"):
        return of_prompt(answer)[-1]["2"], "logprob"
    if api == "sglang":
        return answer[0]["meta_info"]["input_token_logprobs"][-1], 0
    return answer["choices"][0]["logprobs"]["token_logprobs"], -1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "log-prob nan"),
        (0.3, "log-prob 0.3"),
        (None, "no log-prob"),
        ("-1.0", "log-prob '-1.0'"),
        (False, "log-prob False"),  # which Python takes for 0
        ([-1.0], r"log-prob \[-1.0\]"),
        (10**400, "log-prob 1000"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_what_is_no_logprob_is_refused(listing_server: Server, value: Any, said: str) -> None:
    def change(answer: Any) -> None:
        holder, key = own_entry(answer, listing_server.api)
        holder[key] = value

    with listing_server.teacher() as teacher:
        listing_server.faults = [changed(change)]
        with pytest.raises(TeacherServerError, match=said):
            teacher.score([[4, 1, 2]], [1])


def test_rounding_above_zero_is_zero(listing_server: Server) -> None:
    def change(answer: Any) -> None:
        holder, key = own_entry(answer, listing_server.api)
        holder[key] = 2e-6

    with listing_server.teacher() as teacher:
        listing_server.faults = [changed(change)]
        (scored,) = teacher.score([[4, 1, 2]], [1])
    assert scored.logprobs[-1] == 0.0


def test_vllm_s_number_for_minus_infinity_is_minus_infinity(vllm: Server) -> None:
    def change(answer: Any) -> None:
        holder, key = own_entry(answer, "vllm")
        holder[key] = -9999.0

    with vllm.teacher() as teacher:
        vllm.faults = [changed(change)]
        (scored,) = teacher.score([[4, 1, 2]], [1])
    assert scored.logprobs[-1] == -math.inf


def drop_last(answer: Any, api: str) -> None:
    if api.startswith("vllm"):
        of_prompt(answer).pop()
    elif api == "sglang":
        del answer[0]["meta_info"]["input_token_logprobs"][:2]
    else:
        answer["choices"][0]["logprobs"]["tokens"].pop()


def test_fewer_tokens_than_asked_about_are_refused(listing_server: Server) -> None:
    with listing_server.teacher() as teacher:
        listing_server.faults = [changed(lambda answer: drop_last(answer, listing_server.api))]
        with pytest.raises(TeacherServerError, match=r"logprobs.* must have [23] entries.*, got [12]"):
            teacher.score([[4, 1, 2]], [1])


def likeliest_entry(answer: Any, api: str, token_id: Any) -> None:
    """In the place of the likeliest tokens of the last position: a token of that id, and one that is there already."""
    if api.startswith("vllm"):
        entries = of_prompt(answer)[-1]
        own = entries["2"]
        entries.clear()
        entries.update({"2": own, str(token_id): {"logprob": -2.0}})
    elif api == "sglang":
        answer[0]["meta_info"]["input_top_logprobs"][-1] = [[-1.0, 2, None], [-2.0, token_id, None]]
    else:
        answer["choices"][0]["logprobs"]["top_logprobs"][-1] = {"token_id:2": -1.0, f"token_id:{token_id}": -2.0}


@pytest.mark.parametrize(
    ("token_id", "message"),
    [
        (-1, "integer of at least 0, got '?-1'?"),  # which the loss takes for no token
        (True, "integer of at least 0, got '?True'?"),
        (1.5, "integer of at least 0, got '?1.5'?"),
        ("07", "integer of at least 0, got '07'"),  # JSON's key of another token, 7
        ("٣", "integer of at least 0, got '٣'"),
        ("", "integer of at least 0, got ''"),
        (2**40, "integer of at least 0, got "),
        (19, "lists token 19 among the likeliest, and vocab_size=19"),
    ],
    ids=str,
)
def test_a_likeliest_token_that_is_none_is_refused(listing_server: Server, token_id: Any, message: str) -> None:
    with listing_server.teacher(top_k=2, vocab_size=V) as teacher:
        listing_server.faults = [changed(lambda answer: likeliest_entry(answer, listing_server.api, token_id))]
        with pytest.raises(TeacherServerError, match=message):
            teacher.score([[4, 1, 2]], [1])


def test_a_likeliest_token_that_is_there_twice_is_refused() -> None:
    # in the other formats the tokens are the keys of an object, which are distinct
    for sglang in serve("sglang"):
        with sglang.teacher(top_k=2) as teacher:
            sglang.faults = [changed(lambda answer: likeliest_entry(answer, "sglang", 2))]
            with pytest.raises(TeacherServerError, match="sequence 0, position 2 lists token 2 twice"):
                teacher.score([[4, 1, 2]], [1])


def test_a_number_that_no_float_holds_is_refused() -> None:
    def change(answer: Any) -> None:
        answer[0]["meta_info"]["input_token_logprobs"][-1][0] = -(10**400)

    for sglang in serve("sglang"):
        with sglang.teacher() as teacher:
            sglang.faults = [changed(change)]
            with pytest.raises(TeacherServerError, match="token 2 has the log-prob -1000"):
                teacher.score([[4, 1, 2]], [1])


def test_probabilities_that_sum_to_more_than_one_are_refused(listing_server: Server) -> None:
    def change(answer: Any) -> None:
        likeliest_entry(answer, listing_server.api, 3)
        if listing_server.api.startswith("vllm"):
            for entry in of_prompt(answer)[-1].values():
                entry["logprob"] = -0.1
        elif listing_server.api == "sglang":
            answer[0]["meta_info"]["input_top_logprobs"][-1] = [[-0.1, 2, None], [-0.1, 3, None]]
        else:
            answer["choices"][0]["logprobs"]["top_logprobs"][-1] = {"token_id:2": -0.1, "token_id:3": -0.1}

    with listing_server.teacher(top_k=2) as teacher:
        listing_server.faults = [changed(change)]
        with pytest.raises(TeacherServerError, match=r"probabilities that sum to 1.81"):
            teacher.score([[4, 1, 2]], [1])


@pytest.mark.parametrize("indices", [(0, 0), (False, True), (1, 2), (0, "1"), (0.0, 1.0)], ids=str)
def test_choices_are_told_apart_by_their_index(vllm: Server, indices: tuple[Any, Any]) -> None:
    def change(answer: Any) -> None:
        for choice, index in zip(answer["choices"], indices, strict=True):
            choice["index"] = index

    with vllm.teacher() as teacher:
        vllm.faults = [changed(change)]
        with pytest.raises(TeacherServerError, match="choices must have each index from 0 to 1 once"):
            teacher.score([[4, 1, 2], [4, 1, 2]], [1, 1])


@pytest.mark.parametrize("twice", [False, True], ids=["exchanged", "one of them twice"])
@pytest.mark.parametrize("api", ["vllm", "sglang", "openai"])
def test_scores_in_another_sequence_s_place_are_refused(api: str, twice: bool) -> None:
    def change(answer: Any) -> None:
        rows = answer if api == "sglang" else answer["choices"]
        if twice:
            rows[:] = [rows[1], {**rows[1], "index": 1 - rows[1].get("index", 0)}]
        elif api == "sglang":
            rows.reverse()
        else:
            for row in rows:
                row["index"] = 1 - row["index"]

    for server in serve(api):
        with server.teacher() as teacher:
            server.faults = [changed(change)]
            with pytest.raises(
                TeacherServerError, match=r"sequence [01], position 1 must be token [13], got token [13]"
            ):
                teacher.score([[4, 1, 2], [4, 3, 2]], [1, 1])


def other_token(answer: Any, api: str) -> None:
    if api.startswith("vllm"):
        entries = of_prompt(answer)[-1]
        entries["9"] = entries.pop("2")
    elif api == "sglang":
        answer[0]["meta_info"]["input_token_logprobs"][-1][1] = 9
    else:
        answer["choices"][0]["logprobs"]["tokens"][-1] = "token_id:9"


def test_log_probs_of_other_tokens_are_refused(listing_server: Server) -> None:
    with listing_server.teacher() as teacher:
        listing_server.faults = [changed(lambda answer: other_token(answer, listing_server.api))]
        with pytest.raises(TeacherServerError, match="sequence 0, position 2 must be token 2, got token 9"):
            teacher.score([[4, 1, 2]], [1])


@pytest.mark.parametrize("api", ["vllm", "sglang", "openai"])  # vLLM's other endpoint takes one sequence
def test_fewer_sequences_than_asked_about_are_refused(api: str) -> None:
    def change(answer: Any) -> None:
        (answer if api == "sglang" else answer["choices"]).pop()

    for server in serve(api):
        with server.teacher() as teacher:
            server.faults = [changed(change)]
            with pytest.raises(TeacherServerError, match="must have 2 entries, got 1"):
                teacher.score([[4, 1, 2], [1, 2]], [1, 1])


def spoiled(answer: Any) -> Iterator[tuple[str, Any]]:
    """The answer with each of its values in turn replaced by what it cannot be, or missing."""

    def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield (*path, key)
            yield from places(inner, (*path, key))

    for path in places(answer, ()):
        for other in (None, True, False, "x", [], {}, 7.5, math.nan, "missing"):
            changed_answer = json.loads(json.dumps(answer))
            holder = changed_answer
            for key in path[:-1]:
                holder = holder[key]
            if other == "missing":
                del holder[path[-1]]
            else:
                holder[path[-1]] = other
            yield f"{path} {other}", changed_answer


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_spoiled_answer_is_refused_or_makes_no_difference(any_server: Server, top_k: int | None) -> None:
    with any_server.teacher(top_k=top_k) as teacher:
        several = not teacher._format.single
        ask = teacher._scoring_request([[4, 1, 2], [3, 5]][: 1 + several], [1, 1][: 1 + several])
        right = json.loads(json.dumps(ANSWERS[any_server.api](any_server.model, teacher._http_request(ask).body)))
        expected = teacher._scored(right, ask)
        refused = 0
        for what, answer in spoiled(right):
            try:
                found = teacher._scored(answer, ask)
            except TeacherServerError:
                refused += 1
            else:
                # vLLM lists the token itself beside the likeliest ones: that one of them is missing does not show
                listed_less = any_server.api.startswith("vllm") and top_k is not None and what.endswith("') missing")
                assert found == expected or listed_less, what
    # an array is one value of the answer, and its numbers have a test of their own
    assert refused > (10 if any_server.api == "vllm-ids" and top_k is None else 50)


@pytest.mark.parametrize("answer", [[], {"choices": 3}, {"choices": "ab"}, {"meta_info": {}}, "well", 1, True], ids=str)
def test_an_answer_of_another_form_is_shown(any_server: Server, answer: Any) -> None:
    with any_server.teacher() as teacher:
        any_server.faults = [lambda handler, right: answer]
        with pytest.raises(TeacherServerError, match=rf"answered not what api='{teacher.api}' promises"):
            teacher.score([[4, 1, 2]], [1])


def test_what_is_not_json_is_shown(vllm: Server) -> None:
    with vllm.teacher() as teacher:
        for content in (b"<html>welcome</html>", b"[" * 100_000, b'{"choices": "\xff"}'):
            vllm.faults = [status(200, content, {"Content-Type": "text/html; charset=base64"})]
            with pytest.raises(TeacherServerError, match=r"not JSON: '(<html>welcome|\[\[\[|\{\"choices)"):
                teacher.score([[4, 1, 2]], [1])


# -------------------------------------------------------------------------------- at the start


def test_a_model_that_is_not_served_is_known_at_the_start(vllm: Server) -> None:
    with pytest.raises(TeacherServerError, match=r"does not serve model='other'; it serves 'teacher'"):
        ServerTeacher(vllm.url, "other")
    assert not vllm.bodies


def test_a_server_of_something_else_is_known_at_the_start(vllm: Server) -> None:
    vllm.cards = {"hello": "world"}
    with pytest.raises(TeacherServerError, match="must list models"):
        vllm.teacher()


def test_a_limit_on_top_k_is_known_at_the_start(vllm: Server) -> None:
    vllm.faults = [status(400, {"error": {"message": "Requested prompt logprobs of 64, which is greater than 20"}})]
    with pytest.raises(TeacherServerError, match=r"greater than 20: .*--max-logprobs"):
        vllm.teacher(top_k=64)


def test_fewer_likeliest_tokens_than_asked_for_are_known_at_the_start(any_server: Server) -> None:
    with pytest.raises(
        TeacherServerError, match=rf"must list the {V + 2} likeliest tokens, got {V}; for a larger top_k"
    ):
        any_server.teacher(top_k=V + 2)


def test_texts_in_place_of_ids_are_no_top_k(openai: Server) -> None:
    with pytest.raises(TeacherServerError, match="names tokens by their text"):
        openai.teacher(top_k=2, extra_body={"return_tokens_as_token_ids": None})


def test_texts_in_place_of_ids_suffice_for_the_tokens_own_log_probs(openai: Server) -> None:
    with openai.teacher(extra_body={"return_tokens_as_token_ids": None}) as teacher:
        (scored,) = teacher.score([[1, 2]], [1])
    assert scored.logprobs == pytest.approx([openai.model.logprobs([1])[0][2]])
    assert "return_tokens_as_token_ids" not in openai.bodies[-1]


def test_the_tokenizer_is_compared(any_server: Server) -> None:
    any_server.teacher(tokenizer=Words()).close()
    with pytest.raises(TeacherServerError, match="token 5 is ' v5' here and ' w5' there"):
        any_server.teacher(tokenizer=Words(" v"))


def test_a_tokenizer_that_cannot_be_compared_warns(vllm: Server) -> None:
    def change(answer: Any) -> None:
        for entries in answer["choices"][0]["prompt_logprobs"][1:]:
            for entry in entries.values():
                entry["decoded_token"] = None

    vllm.faults = [changed(lambda answer: None), changed(change)]
    with pytest.warns(UserWarning, match="was not checked"):
        vllm.teacher(tokenizer=Words()).close()


def test_key_and_headers_are_sent(vllm: Server) -> None:
    vllm.teacher(api_key=" secret\r\n", headers={"X-Team": "a\n"}).close()  # as a file has them
    assert vllm.headers[0]["Authorization"] == "Bearer secret"
    assert vllm.headers[0]["X-Team"] == "a"


# -------------------------------------------------------------------------------- what no message shows

SECRET = 'hunter"2\\&x'  # with what JSON, HTML and URLs write otherwise


def assert_hidden(error: pytest.ExceptionInfo[BaseException]) -> None:
    shown = "".join(traceback.format_exception(error.value))
    for form in (SECRET, json.dumps(SECRET)[1:-1], "hunter"):
        assert form not in shown


@pytest.mark.parametrize(
    "key", [SECRET + " x", f"a\n{SECRET}", f"\0{SECRET}", f"{SECRET}ü", f"{SECRET}\ud800"], ids=ascii
)
def test_a_key_that_http_cannot_carry_is_refused_unseen(key: str) -> None:
    for arguments in (
        {"api_key": key},
        {"headers": {"X-Key": key.replace(" ", "\x7f")}},
        {"headers": {key + ":": "x"}},
    ):
        with pytest.raises(ValueError, match=r"api_key must be|headers") as error:
            ServerTeacher("http://127.0.0.1:9", "teacher", **arguments)
        assert_hidden(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"api_key": " \n"}, "api_key must be .* it is empty"),
        ({"api_key": b"x"}, "api_key must be a str, got bytes"),
        ({"headers": {"X": 3}}, r"headers\['X'\] must be a str, got int"),
        ({"api_key": "x", "headers": {"authorization": "y"}}, "two authorisations"),
        ({"api_key": "x", "base_url": "http://a:b@127.0.0.1:9"}, "base_url has a user name and api_key"),
        ({"base_url": "http://127.0.0.1:9/?key=x"}, r"base_url .*'http://127.0.0.1:9/\?\*\*\*': it must have no query"),
        ({"base_url": "http://127.0.0.1:99999"}, "base_url must be an address"),
        ({"base_url": "http://[::1"}, "base_url must be an address"),
        ({"base_url": "http://\ud800.org"}, "base_url must be an address"),
        ({"base_url": "http://a b"}, "base_url must be an address"),
        ({"base_url": None}, "base_url must be an address .*, got NoneType"),
        ({"proxy": "localhost:3128"}, "proxy must be an address"),
        ({"proxy": True}, "proxy must be an address, False for no proxy, or None, got bool"),
        ({"patience": -1}, "patience must not be negative, got -1"),
        ({"extra_body": {"x": math.nan}}, "extra_body must be what JSON can have"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
    ids=str,
)
def test_what_no_request_can_be_made_of_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ServerTeacher(**{"base_url": "http://127.0.0.1:9", "model": "teacher", **arguments})


@pytest.mark.parametrize(
    "url",
    [
        f"user:{SECRET}@host",
        f"http://user:{SECRET}/x@host",
        f"http://user:{SECRET}@host:port",
        f"http://user:{SECRET}#x@host",
        f"http:/user:{SECRET}@host",
        f"ftp://{SECRET}@host",
        f"http://host/?key={SECRET}",
        f"http://{SECRET}@[::1",
    ],
    ids=str,
)
def test_a_password_in_an_address_that_is_none_is_not_shown(url: str) -> None:
    for arguments in ({"base_url": url}, {"proxy": url}):
        with pytest.raises(ValueError, match=r"(base_url|proxy) must be an address") as error:
            ServerTeacher(**{"base_url": "http://127.0.0.1:9", "model": "teacher", **arguments})
        assert_hidden(error)


def redirect(handler: Handler, answer: Any) -> None:
    handler.send(307, b"", {"Location": f"http://u:{quote(SECRET)}@other/"})


def long(text: str) -> str:
    """A message that is cut within a secret."""
    return "x" * 290 + text + "x" * 190 + text


@pytest.mark.parametrize(
    "fault",
    [
        status(401, {"error": {"message": f"no such key: {SECRET}"}}),
        status(401, {"detail": {"headers": {"authorization": f"Bearer {SECRET}"}}}),
        status(403, long(SECRET)),
        status(400, html.escape(SECRET).encode()),
        status(404, f"/{quote(SECRET)}".encode()),
        status(500, {"message": repr({"key": SECRET})}),
        status(200, f"<html>{SECRET}</html>".encode()),
        status(200, long(SECRET)),
        status(200, {"choices": [{"index": SECRET}]}),
        status(200, {"choices": [{"index": 0, "prompt_logprobs": [None, {"2": {"logprob": SECRET}}]}]}),
        redirect,
    ],
    ids=range(11),
)
def test_what_a_server_repeats_is_not_shown(vllm: Server, fault: Callable[[Handler, Any], Any]) -> None:
    for arguments in (
        {"api_key": SECRET},
        {"headers": {"X-Key": f"Token {SECRET}"}},
        {"base_url": vllm.url.replace("//", f"//user:{quote(SECRET, safe='')}@")},
    ):
        with ServerTeacher(**{"base_url": vllm.url, "model": "teacher", "retries": 0, **arguments}) as teacher:
            vllm.faults = [fault]
            with pytest.raises(TeacherServerError, match=r"http://127.0.0.1:\d+/v1/completions") as error:
                teacher.score([[1, 2]], [1])
        assert_hidden(error)
        assert "user" not in str(error.value)


AUTHORISATIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "key": lambda url: {"base_url": url, "api_key": SECRET},
    "header": lambda url: {"base_url": url, "headers": {"X-Key": SECRET}},
    "password": lambda url: {"base_url": url.replace("//", f"//user:{quote(SECRET, safe='')}@")},
    "proxy": lambda url: {"base_url": url, "proxy": url.replace("//", f"//user:{quote(SECRET, safe='')}@")},
}
ENCODED = b64encode(f"user:{SECRET}".encode()).decode()


def assert_nowhere(text: str) -> None:
    for form in (SECRET, json.dumps(SECRET)[1:-1], repr(SECRET)[1:-1], quote(SECRET, safe=""), "hunter", ENCODED):
        assert form not in text


@pytest.mark.parametrize("authorisation", AUTHORISATIONS)
@pytest.mark.parametrize("fault", ["none", "refused", "away", "not JSON", "another answer"])
def test_no_log_and_no_traceback_with_its_locals_has_a_secret(
    vllm: Server, caplog: pytest.LogCaptureFixture, authorisation: str, fault: str
) -> None:
    """Neither in what loggers of the libraries say, nor in each frame's variables, which pytest and rich can show."""
    faults = {
        "none": [],
        "refused": [status(400, {"message": "no"})],
        "away": [hang_up] * 3,
        "not JSON": [status(200, b"<html>")],
        "another answer": [lambda handler, right: {"choices": 3}],
    }
    errors: list[BaseException] = []
    with caplog.at_level(0):
        for at_start in (True, False):
            vllm.faults = list(faults[fault]) if at_start else []
            try:
                options = {**AUTHORISATIONS[authorisation](vllm.url), "model": "teacher", "retries": 2, "backoff": 0.01}
                with ServerTeacher(**options) as teacher:
                    options.clear()
                    vllm.faults = list(faults[fault])
                    teacher.score([[1, 2]], [1])
                    shown = [repr(x) + str(x) for x in (teacher, teacher.capabilities, teacher._connection)]
                    shown += [repr(vars(teacher)), repr(vars(teacher._connection))]
                    assert_nowhere("".join(shown))
            except TeacherServerError as error:
                options.clear()  # this frame's own
                errors.append(error)
    assert len(errors) == (0 if fault == "none" else 2)
    for error in errors:
        assert_nowhere("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
    assert any(record.name.startswith("http") for record in caplog.records)
    assert_nowhere("".join(f"{record.getMessage()} {record.args}" for record in caplog.records))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_other_host_gets_a_request(vllm: Server, openai: Server, code: int) -> None:
    with vllm.teacher(api_key=SECRET) as teacher:
        openai.headers.clear()
        vllm.faults = [status(code, b"", {"Location": openai.url + "/v1/completions"})]
        with pytest.raises(TeacherServerError, match=rf"refused, status {code}: .*redirects to {openai.url}"):
            teacher.score([[1, 2]], [1])
    vllm.moved = openai.url
    with pytest.raises(TeacherServerError, match=r"/v1/models refused, status 307"):
        vllm.teacher(api_key=SECRET)
    assert not openai.headers
    assert not openai.bodies


def test_user_and_password_of_an_address_are_sent_and_not_kept_in_it(vllm: Server) -> None:
    userinfo = f"us%40er:{quote(SECRET, safe='')}"
    with ServerTeacher(vllm.url.replace("//", f"//{userinfo}@") + "/v1", "teacher") as teacher:
        assert teacher.base_url == vllm.url
    assert vllm.headers[0]["Authorization"] == "Basic " + b64encode(f"us@er:{SECRET}".encode()).decode()
    with pytest.raises(TeacherServerError, match=r"no answer from http://127.0.0.1:9/v1") as error:
        ServerTeacher(f"http://{userinfo}@127.0.0.1:9", "teacher", retries=0)
    assert_hidden(error)


# -------------------------------------------------------------------------------- proxies


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the environment's proxies; it has no others."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def names(host: str, *_: Any) -> list[Any]:
        known = {"teacher": "192.168.0.3", "gpu.example.org": "10.1.2.3", "llm.example.org": "93.184.216.34"}
        known |= {"127.1": "127.0.0.1", "both.example.org": "fd00::1"}
        address = known.get(host, host)
        if not address[-1].isdigit():
            raise OSError("unknown")
        return [(2, 1, 6, "", (address, 0))]

    monkeypatch.setattr("fused_gopd.integrations.addresses.socket.getaddrinfo", names)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://127.1:8000", False),
        ("http://localhost", False),
        ("http://[::1]:8000", False),
        ("https://10.0.0.7:8000", False),
        ("https://172.16.0.1", False),
        ("http://169.254.1.1", False),
        ("http://100.64.0.1", False),
        ("http://teacher:8000", False),
        ("http://vllm.svc.local", False),
        ("https://gpu.example.org", False),
        ("https://both.example.org", False),
        ("https://llm.example.org", True),
        ("http://8.8.8.8", True),
        ("https://unknown.example.org/v1", True),
        ("https://not.example.com:8443", False),
    ],
)
def test_the_environment_s_proxy_is_for_public_addresses(proxies: Callable[..., None], url: str, proxied: bool) -> None:
    proxies(HTTP_PROXY="http://p:1", https_proxy="http://p:1", no_proxy="example.com")
    found = environment_proxy(url)
    assert found == ((f"{url.split(':')[0].upper()}_PROXY", "http://p:1") if proxied else None)


def test_no_proxy_of_the_environment_sees_a_server_on_this_machine(vllm: Server, proxies: Callable[..., None]) -> None:
    proxies(HTTP_PROXY="http://127.0.0.1:9", ALL_PROXY="nonsense://", HTTPS_PROXY="http://127.0.0.1:9")
    with vllm.teacher(retries=0) as teacher:
        teacher.score([[1, 2]], [1])


def test_a_proxy_that_is_asked_for_is_used_and_its_password_not_shown(
    vllm: Server, proxies: Callable[..., None]
) -> None:
    """The server answers what is sent to a proxy, too."""
    by_address = vllm.url.replace("//", f"//user:{quote(SECRET, safe='')}@")
    with ServerTeacher("http://127.0.0.1:9", "teacher", proxy=by_address, retries=0) as teacher:
        teacher.score([[1, 2]], [1])
        assert vllm.headers[-1]["Proxy-Authorization"].startswith("Basic ")
        vllm.faults = [status(407, vllm.headers[-1]["Proxy-Authorization"].encode()), status(502, SECRET.encode())]
        for _ in range(2):
            with pytest.raises(TeacherServerError, match=r"status (407|502): '(Basic )?\*\*\*'") as error:
                teacher.score([[1, 2]], [1])
            assert_hidden(error)
    proxies(ALL_PROXY=by_address)
    with ServerTeacher("http://llm.example.org", "teacher", retries=0) as teacher:
        teacher.score([[1, 2]], [1])
    proxies(ALL_PROXY=f"http://user:{quote(SECRET, safe='')}@127.0.0.1:9")
    with pytest.raises(TeacherServerError, match=r"through the proxy http://127.0.0.1:9") as error:
        ServerTeacher("http://llm.example.org", "teacher", retries=0)
    assert_hidden(error)
    with pytest.raises(TeacherServerError, match=r"no answer from http://127.0.0.1:9/v1/models in 1"):
        ServerTeacher("http://127.0.0.1:9", "teacher", proxy=False, retries=0)


def test_v1_at_the_end_of_the_address_is_taken_off(vllm: Server) -> None:
    with ServerTeacher(vllm.url + "/v1/", "teacher") as teacher:
        assert teacher.base_url == vllm.url


# -------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be an address such as 'http://"),
        ({"model": ""}, "model must be the name"),
        ({"api": "tgi"}, "api must be one of 'vllm', 'sglang', 'openai', got 'tgi'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServerTeacher(**{"base_url": "http://127.0.0.1:9", "model": "teacher", **options})


def test_wrong_batches_are_named(vllm: Server) -> None:
    ids, attention_mask, completion_mask = batch()
    with vllm.teacher() as teacher:
        vllm.bodies.clear()
        with pytest.raises(ValueError, match=r"attention_mask must have the shape \(3, 9\) of input_ids"):
            teacher(ids, attention_mask[:, 1:], completion_mask)
        with pytest.raises(ValueError, match=r"completion_mask must have shape \(3, K\)"):
            teacher(ids, attention_mask, completion_mask[:2])
        with pytest.raises(ValueError, match=r"completion_mask must hold 0 and 1 only, got 0\.5"):
            teacher(ids, attention_mask, completion_mask / 2)
        with pytest.raises(ValueError, match="a token is wanted that is padding"):
            teacher(ids, attention_mask, torch.ones_like(completion_mask))
        with pytest.raises(ValueError, match="wants the first token of sequence 1"):
            teacher(ids, attention_mask, torch.cat((PROMPT_MASK, ATTENDED), 1) * torch.tensor([[0], [1], [0]]))
        with pytest.raises(ValueError, match=r"start\[0\] must be in \[1, 2\)"):
            teacher.score([[1, 2]], [2])
        with pytest.raises(TeacherServerError, match=r"sequence 0 has 64 tokens.*max_model_len=64"):
            teacher.score([[1] * 64], [1])
    assert not vllm.bodies


def test_the_figures_of_the_pages_are_those_of_the_results() -> None:
    root = Path(__file__).resolve().parents[2]
    benchmark = pytest.importorskip("benchmarks.served_teacher")
    found = json.loads((root / "benchmarks" / "results" / "served-teacher.json").read_text())
    page, teachers = (
        (root / "docs" / name).read_text(encoding="utf-8") for name in ("integrations/server.md", "teachers.md")
    )
    assert benchmark.table_of_bytes(found) in page
    assert benchmark.table_of_times(found) in page
    measured, vocab = found["bytes"], found["vocab"]
    states = measured["states"]
    assert 0 <= states["file"] - (2 * states["hidden"] + 8) < 1  # the file's header
    assert round(measured["topk"] / (benchmark.TOP_K + 1), -1) == 70  # "about 70", as the table of servers says
    agree = f"{states['rounding']:.2f} on average at the start's tokens, where {states['distance']:.2f} was found"
    assert agree in " ".join(page.split())
    sizes = [f"{states['file'] + states['answer']:.0f} bytes, its 64 likeliest tokens as {measured['topk']:.0f}"]
    sizes += [f"its log-prob as {measured['sampled']:.0f}; its logits would be {2 * vocab}"]
    assert all(size in " ".join(teachers.split()) for size in sizes)
