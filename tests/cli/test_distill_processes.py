"""``fused-gopd distill`` in several processes: the weights of one, and ranks that agree on interrupts and errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import typer

pytest.importorskip("trl")

from transformers import AutoModelForCausalLM

from distill_runs import Files, assert_same_weights, invoke, make_tokenizer, metrics_of, small, weights
from fused_gopd.cli.distill import options, training
from fused_gopd.cli.distill.interrupt import Abandoned, Interrupt
from fused_gopd.cli.processes import Processes
from fused_gopd.integrations.cache import TeacherCacheError
from fused_gopd.integrations.trl import GOPDConfig
from ranks import run_on_ranks

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(os.name == "nt", reason="gloo and signals")]


def launched(*arguments: Any) -> subprocess.Popen[str]:
    """The command in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [*command, "-m", "fused_gopd.cli", "distill", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(run: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output, _ = run.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        run.terminate()  # the launcher ends the processes
        raise AssertionError(run.communicate()[0]) from None
    assert run.returncode == code, output
    return output


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "second" not in name}


def process_of_rank(run: subprocess.Popen[str], rank: int) -> int:
    """The id of a process that the launcher started."""
    children = map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())
    return next(x for x in children if f"\0RANK={rank}\0" in Path(f"/proc/{x}/environ").read_text())


@pytest.fixture(scope="module")
def sharp(files: Files) -> list[str]:
    """The options of a run whose sampling does not depend on random numbers, and so not on the number of processes.

    The student's logits are so far from each other that each token has the probability 0 or 1. The gradient of the
    forward KL, p - q at the states of the student, is not small there.
    """
    folder = files.folder / "sharp"
    student = AutoModelForCausalLM.from_pretrained(files.student)
    student.lm_head.weight.data *= 3e4
    student.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    said = ["--student", str(folder), "--teacher", files.math, "--prompts", files.prompts, "--steps", "4"]
    said += ["--max-new-tokens", "5", "--learning-rate", "1e-3", "--accumulation", "2", "--divergence", "forward_kl"]
    # as many as fill the batches of both processes
    held_out = files.write("held_out.jsonl", [{"prompt": x} for x in ("who is a dog", "count", "why rice", "the sky")])
    return [*said, "--save-every", "2", "--seed", "3", "--eval-prompts", held_out]


def test_two_processes_end_in_the_weights_of_one(files: Files, sharp: list[str], tmp_path: Path) -> None:
    """With half the batch each, uninterrupted, and interrupted in one step and resumed."""
    one, two, parts = tmp_path / "one", tmp_path / "two", tmp_path / "parts"
    invoke(*sharp, "--batch-size", "4", "--output", one)
    halves = [*sharp, "--batch-size", "2", "--output"]
    output = finished(launched(*halves, two))
    assert "4 steps of 8 answers to 5 prompts, 2 processes" in output
    assert len(re.findall("step 1/4", output)) == 1  # one of them speaks
    before, after, found = (weights(x) for x in (files.folder / "sharp", one / "model", two / "model"))
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3
    for name, value in after.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    for a, b in zip(*([untimed(row) for row in metrics_of(run)] for run in (one, two)), strict=True):
        assert (
            a.get("entropy", a.get("eval_entropy")) < 1e-6
        )  # in nats per token: with another seed a near tie may come up
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)

    run = launched(*halves, parts)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step 1/4"):
            os.kill(run.pid, signal.SIGTERM)  # the launcher sends it on to both
            break
    output = finished(run, code=1)
    (step,) = re.findall(r"saved after step (\d); go on by: torchrun --nproc_per_node 2 -m fused_gopd.cli", output)
    if step != "4":  # a loaded machine may hear of the signal late
        refused = invoke("--resume", "--output", parts, code=2)
        assert "was started with 2 processes, got 1" in " ".join(refused.replace("│", " ").split())
        run = launched("--resume", "--output", parts)
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("step 3/4"):  # the first process dies, and the launcher ends the other
                os.kill(process_of_rank(run, 0), signal.SIGKILL)
                break
        assert "exitcode  : -9" in finished(run, code=1)
        finished(launched("--resume", "--output", parts))
    assert_same_weights(two / "model", parts / "model")


class Late(Interrupt):
    """Gets its signal when the scores are there, before it is known that nothing waits any more."""

    rings = False

    @property
    def _waiting(self) -> bool:
        return self._waits

    @_waiting.setter
    def _waiting(self, value: bool) -> None:
        if self.rings and not value and not self.asked:
            self._hear(signal.SIGINT, None)
        self._waits = value


@pytest.mark.parametrize(("other", "message"), [(None, ""), ("no such thing", "in process 1 of 2: no such thing")])
def test_a_signal_as_the_scores_arrive_is_told_to_the_other_process(other: str | None, message: str) -> None:
    """And that it was interrupted is no error of this process, whatever the other one had."""
    told: list[Any] = []
    processes = SimpleNamespace(all=lambda value: (told.append(value), [value, other])[1])
    interrupt, trainer = Late(lambda _: None, processes), SimpleNamespace(_score_teachers=lambda batch: batch)
    interrupt.guard(trainer)
    if other is None:
        assert trainer._score_teachers("scores") == "scores"
    interrupt.rings = True
    with pytest.raises(Abandoned) as raised:
        trainer._score_teachers("scores")
    assert told[-1] == ""
    assert (str(raised.value), raised.value.__cause__) == (message, None)


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (TeacherCacheError("damaged"), "error: damaged\n"),
        (Abandoned("in process 0 of 2: no such thing"), ""),  # the first process shows it
        (KeyError("a fault of this package"), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_an_error_of_the_second_process_alone_is_shown(
    raised: BaseException, shown: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(**_: Any) -> None:
        raise raised

    def nothing(*_: Any) -> None:
        pass

    processes = SimpleNamespace(count=2, first=False)
    run = SimpleNamespace(checkpoints=SimpleNamespace(done=0), processes=processes, say=nothing)
    run._expected_errors, run._save_last_step, run._resume_command = (TeacherCacheError,), nothing, str
    with pytest.raises(KeyError if shown is None else typer.Exit):
        training.DistillationRun._train(cast("Any", run), SimpleNamespace(train=train), cast("Any", None))
    assert capsys.readouterr().err == (shown or "")


def test_a_step_in_which_a_server_fails_one_process_is_given_up_in_both(
    files: Files, sharp: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before it is saved, and the resumed run ends as if nothing had happened."""
    from test_distill import served
    from test_server import status

    one, two = tmp_path / "one", tmp_path / "two"
    failing = status(400, {"message": "no such thing"})
    failed: list[bool] = []

    def fault(handler: Any, answer: Any) -> Any:
        """Refuses one request of the third step: there are a row of an evaluation and two of steps."""
        path = two / "metrics.jsonl"
        if failed or not path.exists() or len(metrics_of(two)) < 3:
            return answer
        failed.append(True)
        return failing(handler, answer)

    for server in served(files, monkeypatch):
        remote = [x for x in sharp if x not in ("--teacher", files.math)]
        remote += ["--teacher-server", server.url, "--teacher-server-model", "teacher", "--save-every", "50"]
        remote += ["--estimator", "topk", "--k", "4"]
        invoke(*remote, "--batch-size", "4", "--output", one)
        server.faults = [fault] * 1000
        output = finished(launched(*remote, "--batch-size", "2", "--output", two), code=1)
        assert re.search(r"error: in process [01] of 2: .*no such thing", output), output
        assert "it goes on after step 2 by: torchrun --nproc_per_node 2" in output
        finished(launched("--resume", "--output", two))
    assert [row["step"] for row in metrics_of(two) if "loss" in row] == [1, 2, 3, 4]
    for name, value in weights(one / "model").items():
        torch.testing.assert_close(weights(two / "model")[name], value, rtol=0, atol=1e-5)


def _agreement(output: str) -> list[Any]:
    """What each rank meets: nothing, a wrong option in all, in the second alone, and a failure in the first alone."""
    processes = Processes()
    found: list[Any] = [processes.count, processes.first, processes.any(processes.rank == 1), processes.any(False)]
    errors = {
        "none": (None, None),
        "both": (typer.BadParameter("wrong"), typer.BadParameter("wrong")),
        "second": (None, typer.BadParameter("only there")),
        "first": (OSError("disk"), None),
    }
    for name, raised in errors.items():
        try:
            with processes.agreeing():
                if (error := raised[processes.rank]) is not None:
                    raise error
            found.append((name, "", 0))
        except Exception as error:
            found.append((name, type(error).__name__, getattr(error, "exit_code", 1)))
    return found


def test_processes_agree_on_errors_and_flags() -> None:
    first, second = run_on_ranks("test_distill_processes:_agreement", 2, "")
    assert first[:4] == [2, True, True, False]
    assert second[:4] == [2, False, True, False]
    assert first[4:] == [("none", "", 0), ("both", "BadParameter", 2), ("second", "Exit", 2), ("first", "OSError", 1)]
    # the second is silent: an Exit shows nothing
    assert second[4:] == [("none", "", 0), ("both", "Exit", 2), ("second", "Exit", 2), ("first", "Exit", 1)]


def test_a_process_alone_needs_no_group() -> None:
    processes = Processes()
    assert (processes.count, processes.first, processes.any(True), processes.any(False)) == (1, True, True, False)
    with pytest.raises(OSError, match="disk"), processes.agreeing():
        raise OSError("disk")


class OnTwoGPUs(GOPDConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 2


def test_one_process_uses_one_gpu_and_says_so(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "GOPDConfig", OnTwoGPUs)
    output = invoke(*small(files, tmp_path / "run", steps=1))
    assert "2 GPUs are here, and one process uses one of them. For all: accelerate launch --num_processes 2" in output
    assert len(metrics_of(tmp_path / "run")) == 1


def test_the_number_of_processes_is_kept(files: Files, tmp_path: Path) -> None:
    made = options.RunOptions(student=files.student, teacher=[files.math], prompts=files.prompts)
    made = options.RunOptions.from_command(vars(made))
    options.write(tmp_path, made, 2)
    assert options.for_resumed_run(tmp_path, vars(made), [], 2) == made
    with pytest.raises(typer.BadParameter, match="was started with 2 processes, got 3"):
        options.for_resumed_run(tmp_path, vars(made), [], 3)
