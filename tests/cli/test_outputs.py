"""Where the commands may write: nothing that they did not write is deleted or overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fused_gopd.cli import app, bench, durable, outputs
from fused_gopd.cli.demo import smollm
from fused_gopd.cli.outputs import OutputError, OutputFolder, new_file, opened

runner = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return home


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def put(path: Path, text: str = "the user's") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def written(folder: OutputFolder, name: str, text: str = "ours") -> Path:
    """A finished entry: a file, or a folder of two files where the name has no ending."""
    path = folder.create(name)
    for file in (path,) if path.suffix else (path / "weights.bin", path / "inner" / "config.json"):
        put(file, text)
    folder.finish(name)
    return path


# ------------------------------------------------------------------------------------------------- which folders


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("model", "is the model"),
        ("model/run", "lies in the model"),
        ("link/run", "lies in the model"),
        (".", "contains the model"),
        ("up", "contains the model"),
        ("data", "contains the prompts"),
        ("data/p.jsonl", "is the prompts"),
        ("home/fused-gopd/run", "lies in this package's cache"),
        ("home/huggingface/hub/models--x/run", "lies in the cache of hub models"),
        ("data/run", None),
        ("run", None),
        ("model2", None),
    ],
)
def test_an_output_overlaps_with_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str | None
) -> None:
    put(tmp_path / "model" / "model.safetensors")
    put(tmp_path / "data" / "p.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = content(tmp_path)
    reads = {"the model": tmp_path / "model", "the prompts": tmp_path / "data" / "p.jsonl"}
    if said is None:
        with opened(tmp_path / output, "distill", reads=reads):
            assert (tmp_path / output).is_dir()
    else:
        with pytest.raises(OutputError, match=said), opened(tmp_path / output, "distill", reads=reads):
            pass
    assert content(tmp_path) == before  # where nothing was written nothing is left


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda run: put(run / "model" / "config.json"), "is not empty (model) and has no fused-gopd.json"),
        (lambda run: put(run / ".hidden"), "is not empty (.hidden)"),
        (lambda run: put(run / outputs.LEDGER, "{}"), "is not what fused-gopd writes"),
        (lambda run: put(run), "is no folder"),
        (lambda run: run.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
        (lambda run: run.parent.joinpath("out").symlink_to("nowhere"), "is a link to nowhere"),
        (lambda run: put(run.parent / "out"), "cannot write to"),
    ],
)
def test_a_folder_of_somebody_else_is_refused_as_it_is(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "run")
    run = tmp_path / "out" / "run" if os.path.lexists(tmp_path / "out") else tmp_path / "run"
    before = content(tmp_path)
    with pytest.raises(OutputError) as error, opened(run, "distill"):
        pass
    assert said in str(error.value)
    assert content(tmp_path) == before


def test_a_folder_belongs_to_the_command_that_made_it(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "run", "demo") as folder:
        written(folder, "demo.json")
    put(tmp_path / "a" / "run" / "notes.txt")
    with opened(tmp_path / "a" / "run", "demo") as folder:
        folder.check("demo.json")
        with pytest.raises(OutputError, match=r"notes.txt was not written by fused-gopd demo"):
            folder.check("notes.txt")
    with pytest.raises(OutputError, match="holds the output of fused-gopd demo"), opened(tmp_path / "a/run", "distill"):
        pass
    with pytest.raises(OutputError, match="of an earlier"), opened(tmp_path / "a/run", "demo", reuse=False):
        pass


# ------------------------------------------------------------------------------------------------- what is in them


@pytest.mark.parametrize("change", ["none", "added", "edited", "replaced", "link", "foreign", "unfinished"])
@pytest.mark.parametrize("way", ["create", "move", "remove"])
def test_only_what_was_written_and_is_unchanged_is_deleted(tmp_path: Path, change: str, way: str) -> None:
    with opened(tmp_path / "run", "distill") as folder:
        put(folder.extend("metrics.jsonl"))
        model = written(folder, "model") if change != "foreign" else folder.path / "model"
    mine: dict[str, str] = {}
    if change in ("added", "edited", "replaced", "foreign"):
        if change == "replaced":
            model.rename(tmp_path / "old")
        name = "inner/config.json" if change == "edited" else "notes.txt"
        mine = {name: put(model / name).read_text()}
    elif change == "link":
        model.rename(tmp_path / "elsewhere")
        model.symlink_to(tmp_path / "elsewhere")
    elif change == "unfinished":  # killed while it was written
        with opened(tmp_path / "run", "distill") as folder:
            put(folder.create("model") / "half.bin", "ours")
    with opened(tmp_path / "run", "distill") as folder:
        if way == "move":
            put(folder.create("model.partial") / "new.bin", "ours")
            folder.move("model.partial", "model")
        elif way == "create":
            folder.create("model")
        else:
            folder.remove("model")
    kept = model if way == "remove" else folder.path / "model.kept-1"
    assert {n: b.decode() for n, b in content(kept).items() if b} == mine or kept.is_symlink()
    assert kept.is_symlink() == (change == "link")
    assert os.path.lexists(kept) == (change not in ("none", "unfinished"))
    assert (model / "new.bin").is_file() == (way == "move")
    assert len(content(tmp_path / "elsewhere")) == (3 if change == "link" else 0)


def test_a_command_that_was_killed_early_may_begin_again_in_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with opened(run, "distill") as folder:
        put(folder.create("checkpoint.partial") / "weights.bin")
    with opened(run, "distill", reuse=False) as folder:
        assert content(put(folder.create("checkpoint.partial") / "new.bin").parent).keys() == {"new.bin"}
    put(run / "notes.txt")
    with pytest.raises(OutputError, match="of an earlier"), opened(run, "distill", reuse=False):
        pass


def test_what_a_copy_of_the_folder_holds_is_never_lost(tmp_path: Path) -> None:
    """Copied without its times: what cannot be told from the user's is kept."""
    with opened(tmp_path / "run", "distill") as folder:
        written(folder, "model")
    for file in ("weights.bin", "inner/config.json"):
        os.utime(tmp_path / "run" / "model" / file, (1, 1))
    with opened(tmp_path / "run", "distill") as folder:
        folder.create("model")
    assert len(content(folder.path / "model.kept-1")) == 3


# ------------------------------------------------------------------------------------------------- one at a time


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from fused_gopd.cli.outputs import opened\n"
    code += "with opened(Path(sys.argv[1]), 'distill') as f: f.extend('x'); print('open', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with (
            pytest.raises(OutputError, match=f"is being written by process {other.pid} on"),
            opened(tmp_path, "distill"),
        ):
            pass
        with opened(tmp_path, "distill", exclusive=False):  # a cache is shared
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with opened(tmp_path, "distill"):
        assert (tmp_path / outputs.LOCK).exists()
    assert not (tmp_path / outputs.LOCK).exists()


# ------------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "exists: choose another name, or replace it by --overwrite"),
        ("folder", "is no file"),
        ("/dev/null", "is no file"),
        ("link", "is a link to nowhere, which does not exist"),
        ("file/x.json", "cannot write"),
        ("home/fused-gopd/x.json", "lies in this package's cache"),
    ],
)
def test_a_file_that_exists_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    put(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with pytest.raises(OutputError, match=said):
        new_file(tmp_path / name, overwrite=False)
    if name == "file":
        new_file(tmp_path / name, overwrite=True)
    assert (tmp_path / "file").read_text() == "the user's"


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "state.json", "old")
    (tmp_path / "link").symlink_to(file)

    def full(_: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            durable.replace(file, "new")
    assert content(tmp_path).keys() == {"state.json", "link"}
    assert file.read_text() == "old"
    durable.replace(tmp_path / "link", "new")
    assert file.read_text() == "new"


# ------------------------------------------------------------------------------------------------- every command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--output", "taken"], "--output"),
        (["demo", "--out", "taken"], "--out"),
        (["reproduce", "--output", "taken"], "--output"),
        (["reproduce", "--output", "new", "--cache", "taken"], "taken is not empty"),
        (["reproduce", "--output", "new/run", "--cache", "new"], "lies in the cache of stages"),
        (["bench", "--suite", "quick", "--json", "taken/notes.txt"], "--json"),
        (["bench", "--suite", "quick", "--plot", "taken/notes.png"], "--plot"),
        (["bench", "--suite", "quick", "--plot", "picture"], "expected a file that ends in one of"),
        (["bench", "--suite", "quick", "--plot", "x.svg", "--json", "x.svg"], "is the file of --json"),
        (["-m", "benchmarks", "--suite", "quick", "--json", "taken/notes.txt"], "exists: choose another name"),
        (["-m", "benchmarks.variance", "--json", "taken/notes.txt"], "exists: choose another name"),
        (["-m", "benchmarks.report", "taken/notes.txt", "--plot", "taken/notes.png"], "exists: choose another name"),
        (["-m", "benchmarks.reproduction.report", "taken/notes.txt", "taken/notes.txt"], "exists: choose another name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_command_refuses_a_place_that_is_taken_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    put(tmp_path / "taken" / "notes.txt")
    put(tmp_path / "taken" / "notes.png")
    put(tmp_path / "m" / "config.json")
    put(tmp_path / "p.jsonl", '{"prompt": "a"}')
    before = content(tmp_path)
    monkeypatch.setattr(smollm, "require_packages", lambda: None)
    if arguments[0] == "distill":
        pytest.importorskip("trl")
        arguments = [
            *arguments,
            "--student",
            str(tmp_path / "m"),
            "--teacher",
            "m",
            "--prompts",
            str(tmp_path / "p.jsonl"),
        ]
    if arguments[0] == "-m":
        main = bench.benchmarks_module(arguments[1].partition(".")[2] or "run", needs=()).main
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["x", *arguments[2:]])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
    else:
        bench.benchmarks_module("run")  # found from the source tree
        monkeypatch.chdir(tmp_path)
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
        assert said in " ".join(result.output.replace("│", " ").split())
    assert content(tmp_path) == before


def test_a_page_is_changed_between_its_marks_alone(tmp_path: Path) -> None:
    arguments = bench.benchmarks_module("arguments", needs=())
    page = tmp_path / "page.md"
    page.write_bytes(b"one\r\n<!-- wire -->\nold\n<!-- /wire -->\ntwo\r\n")
    arguments.publish("wire", "new", [page])
    assert page.read_bytes() == b"one\r\n<!-- wire -->\n\nnew\n<!-- /wire -->\ntwo\r\n"


def test_the_cache_of_the_demo_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    source = put(tmp_path / "package" / smollm._GGUF).parent
    found = type("Spec", (), {"submodule_search_locations": [str(source)]})
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: found)
    put(smollm._cached() / "notes.txt")
    before = content(smollm.cache_dir())
    with pytest.raises(smollm.DemoError, match=r"exists and has no model.safetensors: move it away"):
        smollm.local_copy()
    assert content(smollm.cache_dir()) == before


def test_a_damaged_copy_of_the_demos_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    source = put(tmp_path / "package" / smollm._GGUF).parent
    found = type("Spec", (), {"submodule_search_locations": [str(source)]})
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(smollm, "_convert", lambda _, __, folder: put(folder / "model.safetensors", "weights"))
    folder = smollm.local_copy()
    smollm._verify.cache_clear()  # as in a later command
    assert smollm.local_copy() == folder
    put(folder / "model.safetensors", "weighty")
    smollm._verify.cache_clear()
    with pytest.raises(smollm.DemoError, match=r"model.safetensors has other bytes .* remove this folder"):
        smollm.local_copy()
    assert (folder / "model.safetensors").read_text() == "weighty"


def test_a_source_distribution_has_the_tracked_files_and_no_others() -> None:
    """Environments, runs with their models and keys may lie in the folder."""
    pathspec, tomllib = pytest.importorskip("pathspec"), pytest.importorskip("tomllib")
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files"], check=False, cwd=root, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    options = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["scikit-build"]["sdist"]
    assert options["exclude"] == ["*"]  # what is included is taken in spite of it
    taken = pathspec.GitIgnoreSpec.from_lines(options["include"])
    left_out = [path for path in listed.stdout.splitlines() if not taken.match_file(path)]
    assert {path.partition("/")[0] for path in left_out if "benchmarks/results/" not in path} <= {".ci"}
    for path in (
        ".venv/lib/a.py",
        ".venv",
        "run/model/README.md",
        "run/distill.json",
        ".env",
        "notes.md",
        "x/src/a.py",
    ):
        assert not taken.match_file(path), path
