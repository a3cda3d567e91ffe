"""How the OpenMP threads of a command wait for each other."""

from __future__ import annotations

import os
import sys


def use_patient_threads() -> None:
    """Have OpenMP threads sleep while they wait, unless the user chose a policy. Without effect once PyTorch is loaded.

    By default they spin. With as many threads as cores and one other busy process, spinning threads take the CPU from
    the thread that they wait for: sampling ten tokens took 18 to 30 s instead of 1.7 s (two cores, libgomp). OpenMP
    reads the policy when PyTorch loads it.
    """
    if "torch" not in sys.modules:  # not in a test or a notebook, whose threads are not ours
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
