"""What is imported when: the package without what the loss does not need, the command line without PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

import fused_gopd as fg

# Each takes a tenth of a second or more to import, and none of them is needed by a loss on a CPU.
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "triton",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "matplotlib",
    "httpx",
    "typer",
    "rich",
)


def in_a_fresh_process(code: str) -> Any:
    """What a piece of code leaves in ``found``."""
    code = f"import json, sys\n{code}\nprint(); print(json.dumps(found))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSTARTUP"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_and_a_loss_import_nothing_heavy() -> None:
    found = in_a_fresh_process(f"""
import torch
before = set(sys.modules)
import pytest

import fused_gopd as fg
for name in fg.__all__:
    getattr(fg, name)
heavy = [name for name in {HEAVY} if name in sys.modules and name not in before]
head = fg.LinearHead(torch.randn(3, 4, requires_grad=True), torch.randn(11, 4))
for estimator in ("sampled", "full"):
    fg.gopd_loss(head, fg.LinearHead(torch.randn(3, 4), torch.randn(11, 4)), None, torch.tensor([1, 2, 3]),
                 estimator=estimator).loss.backward()
found = heavy, [name for name in {HEAVY} if name in sys.modules and name not in before]
""")
    assert found == [[], []]


def test_the_public_names_are_imported_at_their_first_use() -> None:
    found = in_a_fresh_process("""
import fused_gopd
found = {"eager": "torch" in sys.modules, "dir": dir(fused_gopd)}
found["eager after dir"] = "torch" in sys.modules
found["module"] = fused_gopd.options.__name__, "torch" in sys.modules
try:
    fused_gopd.gopd_los
except AttributeError as error:
    found["unknown"] = str(error)
names = {}
exec("from fused_gopd import *", names)
found["star"] = sorted(name for name in names if not name.startswith("__"))
import typing
found["hints"] = str(typing.get_type_hints(fused_gopd.TokenStats)["index"])
import torch
found["op"] = hasattr(torch.ops.fused_gopd, "loss")
""")
    assert found["eager"] is found["eager after dir"] is False
    assert set(fg.__all__) <= set(found["dir"])
    assert found["module"] == ["fused_gopd.options", False]
    assert found["unknown"] == "module 'fused_gopd' has no attribute 'gopd_los'"
    assert found["star"] == sorted(fg.__all__)
    assert found["hints"] == "<class 'torch.Tensor'>"
    assert found["op"]


def test_every_public_name_is_the_one_of_its_module() -> None:
    for name in fg.__all__:
        value = getattr(fg, name)
        assert value is vars(fg)[name], "the second look finds it without __getattr__"
        assert value.__name__.rpartition(".")[2] == name
    assert fg.gopd_loss.__module__ == "fused_gopd.loss"


# arguments -> exit status, and what the output has
QUICK = {
    "--help": (0, "distill"),
    "--version": (0, fg.__version__),
    "--show-completion": (None, ""),  # an error in a process that is no shell's
    "plan": (2, "--hidden"),
    "plan --help": (0, "--reward-scale"),
    "plan --list-models": (0, "qwen3-4b"),
    "plan --model qwen3-4b --gpu h100 --memory 80GiB": (0, "tokens that fit"),
    "plan --model qwen3-4b --estimator topk --k 32 --support student --tp 2 --dp 2 --json": (0, "chunk_size"),
    "plan --model qwen3-4b --device cpu --estimator sampled --reward-scale 1": (0, "peak memory"),
    "plan --model qwen3-4b --estimator most": (2, "--estimator"),
    "plan --model qwen3-4b --divergence jsd --estimator sampled": (2, "--divergence"),
    "plan --colour blue": (2, "--colour"),
    "bench --help": (0, "--suite"),
    "distill --help": (0, "--divergence"),
    "distill": (2, "--output"),
    "distill --output {folder} --student a/b --prompts no-file --teacher c/d": (2, "no-file"),
    "distill --output {folder} --student a/b --prompts no-file --teacher c/d --beta 2 --divergence jsd": (2, "--beta"),
    "demo --help": (0, "--quick"),
    "reproduce --help": (0, "--seeds"),
    "doctor --help": (0, "--json"),
    "doctor --colour blue": (2, "--colour"),
    "train": (2, "No such command"),
}


def test_help_and_plan_and_wrong_options_do_not_import_torch(tmp_path: Any) -> None:
    arguments = {line: line.format(folder=tmp_path / "run").split() for line in QUICK}
    found = in_a_fresh_process(f"""
import contextlib, io, os
os.environ.update(COLUMNS="200", NO_COLOR="1", TERM="dumb")
from fused_gopd.cli import app
found = {{}}
for line, arguments in {arguments}.items():
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            app(arguments, prog_name="fused-gopd")
        except SystemExit as stop:
            status = stop.code
    heavy = [name for name in ("torch", "numpy", *{HEAVY[:-2]}) if name in sys.modules]
    found[line] = status, output.getvalue(), heavy
""")
    for line, (status, text) in QUICK.items():
        assert status in (None, found[line][0]), (line, found[line])
        assert text in found[line][1], (line, found[line])
        assert found[line][2] == [], line


def test_no_file_of_the_package_is_imported_under_two_names() -> None:
    found = in_a_fresh_process("""
import fused_gopd.cli
from fused_gopd.cli.bench import benchmarks_module
import fused_gopd.cli.distill.options, fused_gopd.cli.demo.compare, fused_gopd.reference
files = {}
for name, module in list(sys.modules.items()):
    if "fused_gopd" in name and getattr(module, "__file__", None):
        files.setdefault(module.__file__, []).append(name)
found = [names for names in files.values() if len(names) > 1]
""")
    assert found == []


def test_threads_that_wait_patiently_are_asked_for_before_torch_is_loaded() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = "from fused_gopd.cli.threads import use_patient_threads; use_patient_threads(); import torch"
    spins = {}
    for first in ("pass", "import torch"):
        done = subprocess.run(
            [sys.executable, "-c", f"{first}\n{code}"],
            capture_output=True,
            text=True,
            env={**environment, "OMP_DISPLAY_ENV": "verbose"},
        )
        assert done.returncode == 0, done.stderr
        spins[first] = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)  # libgomp says so when it is loaded
    if not spins["pass"]:
        pytest.skip("this PyTorch has another OpenMP")
    assert spins["pass"] == ["0"]
    assert spins["import torch"] != ["0"], "loaded before, so that the question comes too late"


@pytest.mark.parametrize(
    ("words", "completed"), [("fused-gopd pl", "plan"), ("fused-gopd distill --rew", "--reward-scale")]
)
def test_a_shell_completes_commands_and_options_without_torch(words: str, completed: str) -> None:
    code = """
import sys
from fused_gopd.cli import app
try:
    app(prog_name="fused-gopd")
finally:
    assert "torch" not in sys.modules
"""
    asked = {"_FUSED_GOPD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked})
    assert done.stdout.split() == [completed], done.stderr
