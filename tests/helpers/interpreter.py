"""Triton's interpreter in tests: whether this process has it, and a test file run once more in one that does.

It is chosen when the kernels are first imported, so one process has it or has it not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from fused_gopd.rowops.triton import Tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNNABLE = INTERPRETED or DEVICE == "cuda"
# 128 columns: a V of 211 is one full tile and a tail. The interpreter's time goes by tiles, not by columns.
SMALL = Tiles(repeat=2, lanes=16, vector=4, num_warps=1, stages=1)


def _patch_once_a_launch() -> None:
    """Have the interpreter patch ``triton.language`` once a launch for each module of device functions.

    It does so anew in every call of such a function, which finds nothing left to patch in half of the whole time.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[int] = set()  # the globals of modules, in a launch; empty between two

    def patch_lang(fn: Any) -> Any:
        of_launch, known = not patched, id(fn.__globals__) in patched
        patched.add(id(fn.__globals__))
        scope = None if known else patch(fn)
        if of_launch:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope  # which a call of a device function does not look at

    interpreter._patch_lang = patch_lang


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    _patch_once_a_launch()


def passed_when_interpreted(file: str, *options: str) -> int:
    """How many tests of a file pass in a process with the interpreter; none may fail."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("this is that process")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}  # tensors are small; no workers of its own
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout[-2000:]
    return int(passed[1])
