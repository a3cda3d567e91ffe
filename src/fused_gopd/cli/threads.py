"""How the OpenMP threads of a command wait for each other."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def restart_with_patient_threads() -> None:
    """Start the command over with OpenMP threads that sleep while they wait, unless the user chose a policy.

    By default they spin. With as many threads as cores and one other busy process, spinning threads take the CPU from
    the thread that they wait for: sampling ten tokens took 18 to 30 s instead of 1.7 s (two cores, libgomp). OpenMP
    reads the policy when PyTorch loads it, before this line runs, so the process is replaced by a new one.
    """
    started_as_script = Path(sys.argv[0]).stem == "fused-gopd"  # not in a test or a notebook
    if sys.platform == "linux" and started_as_script and "OMP_WAIT_POLICY" not in os.environ:
        sys.stdout.flush()
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
