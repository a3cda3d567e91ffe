"""Launches through compiled kernels that are kept take the kernel that Triton would take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HELPER = Path(__file__).parents[1] / "helpers" / "held_launches.py"


def test_the_kernel_and_its_arguments_are_those_of_tritons_own_launch(tmp_path: Path) -> None:
    """For pointers' alignment and dtypes, numbers that are 1 or that 16 divides, 64 bits, constants and descriptors."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(HELPER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *different, last = done.stdout.splitlines()
    assert not different
    agreed, _, launches, *_, kernels, _ = last.split()
    assert agreed == launches
    assert int(kernels) > 12  # launches differ in what is compiled in
