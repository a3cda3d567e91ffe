"""The examples run as they are, on their tiny models on a CPU, and what they print shows a student that learns."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS: dict[str, list[str]] = {
    "plain_loop.py": [],
    "offline.py": ["safetensors"],
    "trl_trainer.py": ["trl"],
    "lora.py": ["trl", "peft"],
    "self_distillation.py": ["trl", "peft"],
    "two_teachers.py": ["trl"],
    "served_teacher.py": ["httpx"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(after: str, text: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{after} ([+-]?\d+\.\d+)", text)]


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_teaches_its_student(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--steps", "10"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for module in ("tiny", "plain_loop"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    text = capsys.readouterr().out
    if name == "offline.py":  # its texts are fixed, and so are their rewards
        first, *_, last = numbers("KL to the target", text)
    elif "trl" in NEEDS[name]:
        first, last = numbers("targets?:", text)[0], numbers("at first,", text)[0]
    else:
        rewards = numbers("reward", text)
        assert len(rewards) == 10
        first, last = -rewards[0], -sum(rewards[-3:]) / 3
    # a hint changes what random weights say by less than other weights do
    assert last < first - (0.1 if name == "self_distillation.py" else 0.4), text


@pytest.mark.ranks
def test_two_ranks_train_what_fsdp2_shards(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [*launch, str(EXAMPLES / "fsdp2.py"), "--steps", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    kl = numbers("KL to the target", done.stdout)
    assert len(kl) == 8, done.stdout
    assert kl[-1] < kl[0] - 0.4


def test_each_example_is_short_and_in_the_index() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == NEEDS.keys() | {"fsdp2.py", "tiny.py"}
    for name, script in scripts.items():
        assert index.count(f"({name})") == 1, name
        assert len(script.splitlines()) < 80, name
