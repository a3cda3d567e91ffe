"""Damaged files of a run of ``fused-gopd distill``: found, named, and never a reason for another result.

The tests marked ``slow`` (``make test-faults``) resume a run after each damage, and kill runs.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from distill_runs import SENTENCES, TEMPLATE, Files, assert_same_weights, invoke, make_model, small, untimed
from fused_gopd.cli import app, durable, outputs
from fused_gopd.cli.distill import options
from fused_gopd.cli.distill.checkpoints import Checkpoints, relist
from fused_gopd.cli.outputs import OutputFolder
from test_distill import served
from test_distill_tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("one_thread", "no_page")

STEPS = 4
LONG = 6


@pytest.fixture(scope="module")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts, with the checkpoints of its last two steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    invoke(*small(files, folder, "--save-every", "1", steps=STEPS))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def assert_same_result(run: Path, whole: Path) -> None:
    assert_same_weights(run / "model", whole / "model")
    assert untimed(run) == untimed(whole)


# -------------------------------------------------------------------------------- damages


def flip(content: bytes, place: float = 0.5) -> bytes:
    i = int(place * (len(content) - 1))
    return content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "one bit flipped": flip,
}


@contextmanager
def damaged(path: Path, damage: str) -> Iterator[None]:
    content = path.read_bytes()
    changed = DAMAGES[damage](content)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    yield
    path.write_bytes(content)


def cases(folder: Path) -> list[tuple[Path, str]]:
    """Every damage of every file of a folder."""
    found = [(path, damage) for path in sorted(folder.rglob("*")) if path.is_file() for damage in DAMAGES]
    assert len(found) >= 50
    return found


def search(run: Path) -> tuple[int, list[str]]:
    """The steps of the checkpoint that a resumed run goes on from, and what is said."""
    said: list[str] = []
    found = Checkpoints(OutputFolder(run, "distill"))
    found.find(said.append)
    return found.done, said


def test_each_damage_of_a_file_is_found_and_the_older_checkpoint_taken(run: Path) -> None:
    for path, damage in cases(run / "checkpoint-4"):
        with damaged(path, damage):
            done, (line,) = search(run)
        assert done == 3, (path.name, damage)
        assert line.startswith(f"checkpoint-4 is damaged ({path.name} "), (path.name, damage)
        assert line.endswith("the run goes on from checkpoint-3")
    assert search(run) == (4, [])


def _rename(run: Path) -> None:
    (run / "checkpoint-4").rename(run / "checkpoint-5")


def _add(run: Path) -> None:
    shutil.copy(run / "checkpoint-4" / "optimizer.pt", run / "checkpoint-4" / "optimizer.bin")


def _of_another_step(run: Path) -> None:
    for name in ("trainer_state.json", "rng_state.pth"):
        shutil.copy(run / "checkpoint-3" / name, run / "checkpoint-4" / name)


def _file_in_its_place(run: Path) -> None:
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-4").write_text("")


def _dangling_link(run: Path) -> None:
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    (run / "checkpoint-4" / "optimizer.pt").symlink_to(run / "nowhere")


def _folder_for_a_file(run: Path) -> None:
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    (run / "checkpoint-4" / "optimizer.pt").mkdir()


@pytest.mark.parametrize(
    "change", [_rename, _add, _of_another_step, _file_in_its_place, _dangling_link, _folder_for_a_file]
)
def test_a_checkpoint_that_was_changed_otherwise_is_not_taken(run: Path, change: Callable[[Path], None]) -> None:
    change(run)
    done, (line,) = search(run)
    assert done == 3
    assert "is damaged" in line


def test_each_flipped_bit_of_a_manifest_or_of_the_options_is_found(run: Path) -> None:
    for path in (run / "checkpoint-4" / durable.MANIFEST, run / options.FILE):
        content = path.read_bytes()
        for i in range(len(content)):
            path.write_bytes(flip(content, i / (len(content) - 1)))
            with pytest.raises(durable.Damaged):
                durable.read_sealed(path)


def test_a_hidden_file_of_the_system_is_no_damage(run: Path) -> None:
    (run / "checkpoint-4" / ".DS_Store").write_text("")
    assert search(run) == (4, [])


STRANGE = ("checkpoint-", "checkpoint-4.bak", "checkpoint-x", "checkpoint-²", "checkpoint-04", "checkpoint--1", "my-9")


def test_a_run_goes_on_from_the_intact_checkpoint_and_ends_the_same(run: Path, whole: Path) -> None:
    """With a damaged newest checkpoint, damaged figures, half a result, no list of what it wrote, strange folders."""
    for name in STRANGE:
        shutil.copytree(run / "checkpoint-4", run / name)
    (run / "model").rename(run / "model.partial")
    (run / "model.partial" / "model.safetensors").write_bytes(b"")
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    (run / outputs.LEDGER).unlink()
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 9}\nnot JSON\xff\n5\n{}\n')
    output = invoke("--resume", "--output", str(run))
    assert "checkpoint-4 is damaged (optimizer.pt is missing): the run goes on from checkpoint-3" in output
    assert "steps 4 to 4 of" in output
    assert_same_result(run, whole)
    assert {durable.verify(run / f"checkpoint-{step}") for step in (3, 4)} == {3, 4}
    for name in STRANGE:
        assert sorted(os.listdir(run / name)) == sorted(os.listdir(run / "checkpoint-4"))
    assert not list(run.glob("*.partial"))
    assert (run / "checkpoint-4.kept-1").is_dir()  # without the list nobody knows whose it was


def test_where_no_checkpoint_is_intact_the_run_is_refused_with_what_to_do_instead(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "model")
    for step, name in ((3, "scheduler.pt"), (4, "optimizer.pt")):
        (run / f"checkpoint-{step}" / name).write_bytes(b"")
    output = " ".join(invoke("--resume", "--output", str(run), code=2).replace("│", " ").split())
    assert f"no checkpoint in {run} is intact: checkpoint-4 is damaged (optimizer.pt has 0 bytes" in output
    assert "checkpoint-3 is damaged (scheduler.pt has 0 bytes" in output
    assert "Put a copy of one back, or remove these folders: --resume then begins at the first step" in output
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert search(run) == (0, [])


# -------------------------------------------------------------------------------- which ones are kept


def write(found: Checkpoints, step: int) -> None:
    """As the trainer writes a checkpoint."""
    folder = found.partial / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    found.add(step)


def test_the_newest_two_intact_checkpoints_are_kept(tmp_path: Path) -> None:
    found = Checkpoints(OutputFolder(tmp_path, "distill"))
    for step in (1, 2, 5):
        write(found, step)
    assert sorted(found._steps()) == [2, 5]
    (found.path(5) / "weights").write_text("6")
    again = Checkpoints(OutputFolder(tmp_path, "distill"))
    again.find(lambda line: None)
    write(again, 3)  # the damaged one is newer by its name, and is not one of the two
    assert sorted(again._steps()) == [2, 3, 5]  # what changed after it was written is not deleted
    assert os.listdir(again.path(5)) == ["weights"]
    write(again, 4)
    assert sorted(again._steps()) == [3, 4, 5]


@pytest.mark.parametrize("function", ["fsync", "rename", "replace"])
def test_a_checkpoint_that_is_not_written_to_the_end_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    found = Checkpoints(OutputFolder(tmp_path, "distill"))
    write(found, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="No space left"):
            write(found, 2)
    assert found.done == 1
    assert search(tmp_path) == (1, [])


# -------------------------------------------------------------------------------- the result, and the run's own files


def test_each_damage_of_the_result_is_found_and_nothing_in_it_is_replaced(run: Path) -> None:
    for path in sorted((run / "model").iterdir()):
        for damage in DAMAGES:
            with damaged(path, damage), pytest.raises(durable.Damaged, match=path.name):
                durable.verify(run / "model")
    (run / "model" / "mine.gguf").write_text("mine")
    for more in ([], ["--steps", "9"]):
        output = " ".join(invoke("--resume", "--output", str(run), *more, code=2).replace("│", " ").split())
        assert f"{run / 'model'} is not as this command wrote it (mine.gguf was added to it): move it away" in output
    (run / "model" / "mine.gguf").unlink()
    assert "has done its 4 steps" in invoke("--resume", "--output", str(run), code=2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_options_are_restored_from_a_checkpoint(run: Path, damage: str) -> None:
    content = (run / options.FILE).read_bytes()
    with damaged(run / options.FILE, damage):
        output = " ".join(invoke("--resume", "--output", str(run), code=2).replace("│", " ").split())
    command = f"cp {run / 'checkpoint-4' / options.FILE} {run / options.FILE}"
    assert f"{command} " in output
    subprocess.run(command.split(), check=True)
    assert (run / options.FILE).read_bytes() == content


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_list_of_what_the_run_wrote_is_made_again(run: Path, damage: str) -> None:
    before = OutputFolder(run, "distill")
    (run / "checkpoint-5").mkdir()
    with damaged(run / outputs.LEDGER, damage), outputs.opened(run, "distill", relist=relist) as folder:
        assert folder._files == before._files
    with damaged(run / outputs.LEDGER, damage), pytest.raises(outputs.OutputError):  # any other command
        outputs.opened(run, "demo").__enter__()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "distill.json"
    durable.replace(path, "old")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                durable.replace(path, "new")
        assert path.read_text() == "old"


# -------------------------------------------------------------------------------- the long form: make test-faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--lora", "2", "--save", "adapter"]], ids=["all weights", "lora"])
def test_a_run_resumed_after_each_damage_ends_the_same(files: Files, tmp_path: Path, kind: list[str]) -> None:
    """Of the newest checkpoint: the older one is taken. Of both: the run is refused."""
    whole = tmp_path / "whole"
    invoke(*small(files, whole, "--save-every", "1", *kind, steps=STEPS))
    result = "adapter" if kind else "model"
    for path, damage in cases(whole / "checkpoint-4"):
        run = Path(shutil.copytree(whole, tmp_path / "run"))
        shutil.rmtree(run / result)
        broken = [run / f"checkpoint-{step}" / path.name for step in (4, 3)]
        with damaged(broken[0], damage), damaged(broken[1], damage):
            assert "no checkpoint in" in invoke("--resume", "--output", str(run), code=2)
        with damaged(broken[0], damage):
            output = invoke("--resume", "--output", str(run))
        assert f"checkpoint-4 is damaged ({path.name}" in output
        (trained,) = (whole / result).glob("*.safetensors")
        assert (run / result / trained.name).read_bytes() == trained.read_bytes()
        assert untimed(run) == untimed(whole)
        shutil.rmtree(run)


# ``distill`` that is killed at the NUMBER-th event: before it changes a file of its run, or when half of a tensor file
# is written; 0: lists the events
KILLED = """
import os, signal, sys

folder, number = sys.argv[1], int(sys.argv[2])
sys.argv = ["fused-gopd", *sys.argv[3:]]
count = 0


def at(what, path):
    global count
    if str(path).startswith(folder):
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if not number:
            print("EVENT", what, os.path.relpath(path, folder), flush=True)


def hook(event, arguments):
    if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        at(event, arguments[0])
    elif event in ("os.mkdir", "os.rename"):
        at(event, arguments[0])
    elif event in ("os.remove", "os.rmdir"):  # inside a folder that is being removed the path is a name
        at(event, arguments[0] if arguments[1] == -1 else os.path.join(folder, arguments[0]))


def in_the_middle(module, name, position):
    write = getattr(module, name)

    def cut_off(*arguments, **options):
        write(*arguments, **options)
        path = arguments[position]
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            content = file.read()
        os.truncate(path, size // 2)
        at("the middle of", path)
        with open(path, "r+b") as file:
            file.write(content)

    setattr(module, name, cut_off)


import safetensors.torch, torch

in_the_middle(torch, "save", 1)
in_the_middle(safetensors.torch, "save_file", 1)
sys.addaudithook(hook)
from fused_gopd.cli import app

app()
"""


def distill(run: Path, number: int, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(run), str(number), "distill", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_after(process: subprocess.Popen[str], run: Path, steps: int, seconds: float) -> None:
    record = run / "metrics.jsonl"
    while process.poll() is None and not (record.exists() and len(record.read_text().splitlines()) >= steps):
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(files: Files, tmp_path: Path) -> None:
    """Eight kills at random moments and seven inside the writing of a checkpoint or of the result."""
    whole, run, kinds = tmp_path / "whole", tmp_path / "run", ["--save-every", "1"]
    process = distill(whole, 0, small(files, whole, *kinds, steps=STEPS))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    events = [line.split(maxsplit=2)[2] for line in output.splitlines() if line.startswith("EVENT")]
    first = next(i for i, event in enumerate(events) if "checkpoint.partial/checkpoint-" in event)
    generator = random.Random(0)
    moments = [generator.uniform(0, STEPS) for _ in range(8)]
    killed = 0
    for place in (*moments, *generator.sample(range(first + 1, len(events) + 1), 7)):
        process = distill(run, place if isinstance(place, int) else 10**9, small(files, run, *kinds, steps=STEPS))
        if isinstance(place, float):
            kill_after(process, run, int(place), 0.3 * (place % 1))
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        where = f"step {place:.2f}" if isinstance(place, float) else events[place - 1]
        found = sorted(path.name for path in run.glob("*")) if run.exists() else []
        print(f"killed at {where}: {process.returncode}, {', '.join(found)}")
        if not (run / "model").is_dir():
            invoke("--resume", "--output", str(run))
        assert_same_result(run, whole)
        assert "has done its 4 steps" in invoke("--resume", "--output", str(run), code=2)
        shutil.rmtree(run)
    assert killed >= 12  # a moment may come after the end


def adapter_of(files: Files, folder: Path) -> str:
    """An adapter of the student's that has learned something."""
    peft: Any = importlib.import_module("peft")
    base = AutoModelForCausalLM.from_pretrained(files.student)
    torch.manual_seed(8)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(folder)
    return f"adapter:{folder}"


HINT = ["--teacher-template", "who are you {prompt}"]
# teachers of a run, by what they are; those in braces are made for the test
TEACHERS: dict[str, list[str]] = {
    "a folder": ["--teacher", "{math}"],
    "sampled": ["--teacher", "{math}", "--estimator", "sampled", "--dtype", "bfloat16"],
    "an adapter": ["--teacher", "{adapter}", "--ref", "{adapter}", "--lora", "2"],
    "several": [
        "--teacher",
        "math={math}",
        "--teacher",
        "code={code}",
        "--prompts",
        "{routed}",
        "--route-column",
        "domain",
    ],
    "another tokenizer": ["--student", "{bytes}", "--teacher", "{other bytes}", "--cross-tokenizer"],
    "a cache": ["--teacher", "{math}", "--teacher-cache", "{cache}"],
    "a server": ["--teacher-server", "{url}", "--teacher-server-model", "teacher"],
    "the student as it began": ["--teacher", "student", *HINT],
    "its adapter as it began": ["--teacher", "student", *HINT, "--lora", "2"],
    "the student of three steps": ["--teacher", "student", *HINT, "--teacher-sync-steps", "3"],
    "its adapter of three steps": ["--teacher", "student", *HINT, "--teacher-sync-steps", "3", "--lora", "2"],
    "its average": ["--teacher", "student", *HINT, "--teacher-ema", "0.5"],
    "its adapter's average": ["--teacher", "student", *HINT, "--teacher-ema", "0.5", "--lora", "2"],
    "its average in bfloat16": [
        "--teacher",
        "student",
        *HINT,
        "--teacher-ema",
        "0.9",
        "--dtype",
        "bfloat16",
        "--lora",
        "2",
    ],
    "itself": ["--teacher", "student", *HINT, "--teacher-sync-steps", "1"],
    "itself among several": [
        *("--teacher", "math=student", "--teacher", "code={code}", "--prompts", "{routed}", "--route-column", "domain"),
        *(*HINT, "--teacher-ema", "0.5", "--teacher-sync-steps", "2"),
    ],
}


def _in_child(arguments: list[str], output: Connection) -> None:
    os.dup2(output.fileno(), 1)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ["COLUMNS"] = "300"
    app(["distill", *arguments])


def in_child(arguments: list[str], number: int = 0, after: int = -1, seconds: float = 0.0) -> tuple[Any, list[str]]:
    """``distill`` in a forked process, which has all imports: its exit status and its lines.

    With a signal ``number``: it is sent ``seconds`` after the first line about the run and ``after`` lines of steps.
    """
    reading, writing = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(arguments, writing))
    child.start()
    writing.close()
    begun, lines = -1, []
    with open(reading.fileno(), encoding="utf-8", closefd=False) as output:
        for line in output:
            lines.append(line)
            begun += line.startswith("step ") or " answers to " in line
            if begun == after:
                after = LONG + 1
                time.sleep(seconds)
                os.kill(child.pid or 0, number)
    child.join()
    return child.exitcode, lines


def interrupted(run: Path, arguments: list[str], number: signal.Signals, after: int, seconds: float) -> str:
    """Start or resume a run, and interrupt it. Returns what became of it."""
    if not (run / options.FILE).exists():  # it had not begun
        shutil.rmtree(run, ignore_errors=True)
    else:
        arguments = ["--resume", "--output", str(run)]
    status, lines = in_child(arguments, number, after, seconds)
    # 1 and -number: the signal came before the run listened to it
    assert status in {signal.SIGINT: (0, 1, 130), signal.SIGTERM: (0, -15, 130)}.get(number, (0, -9)), "".join(lines)
    done = sum(line.startswith("step ") for line in lines)
    return f"{number.name} {seconds:.2f} s after {after} steps: {done} steps, exit {status}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_run_with_any_teacher_survives_every_signal(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Ctrl-C, SIGTERM and a kill at random moments of one run, which then ends as one that nobody interrupts."""
    for module in ("peft", "matplotlib.pyplot", "torch.utils.tensorboard"):  # once, and not in every child
        importlib.import_module(module)
    places = {name: getattr(files, name) for name in ("math", "code", "routed")}
    for name, seed, words in (("bytes", 0, SENTENCES), ("other bytes", 1, tuple(s[::-1] for s in SENTENCES))):
        places[name] = make_model(tmp_path / name, seed, byte_level(words, 330 - 30 * seed, TEMPLATE))
    places |= {"adapter": adapter_of(files, tmp_path / "adapter"), "cache": str(tmp_path / "cache")}
    servers = iter(served(files, monkeypatch)) if kind == "a server" else iter([None])
    server = next(servers)
    places["url"] = server.url if server is not None else ""
    given = [x.format(**places) if x.startswith(("{", "math={", "code={")) else x for x in TEACHERS[kind]]
    given += ["--save-every", "1"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    status, lines = in_child(small(files, whole, *given, steps=LONG))
    assert status == 0, "".join(lines)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    generator = random.Random(kind)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    generator.shuffle(numbers)
    for number in numbers:
        if not (run / "model").is_dir():
            after, seconds = generator.randint(0, 2), generator.uniform(0, 0.5)
            print(interrupted(run, small(files, run, *given, steps=LONG), number, after, seconds))
    if not (run / "model").is_dir():
        status, lines = in_child(["--resume", "--output", str(run)])
        assert status == 0, "".join(lines)
    next(servers, None)
    assert_same_weights(run / "model", whole / "model")
    rows, one = ([{**row, "cache_hits": None} for row in untimed(folder)] for folder in (run, whole))
    assert rows == one  # the cache may have what a step that was given up has scored
    (copies,) = list((whole / "checkpoint-6").glob("student_copies.safetensors")) or [None]
    assert copies is None or (run / "checkpoint-6" / copies.name).read_bytes() == copies.read_bytes()
