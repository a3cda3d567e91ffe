"""What this machine is, as far as it decides how fast a loss is or whether the package can be built."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path


def cpu_model() -> str:
    """The model of the CPU, as its system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _brand_on_macos() or platform.processor() or platform.machine()
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in known:  # ARM
        return platform.processor() or platform.machine()
    return f"{known['model name']} (family {known.get('cpu family', '?')}, model {known.get('model', '?')})"


def _brand_on_macos() -> str:
    if platform.system() != "Darwin":
        return ""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def compiler() -> str | None:
    """The C++ compiler that a build of the native extension would find first; None where there is none."""
    asked = os.environ.get("CXX", "").split()[:1]
    return next(filter(None, map(shutil.which, (*asked, "c++", "g++", "clang++", "cl"))), None)
