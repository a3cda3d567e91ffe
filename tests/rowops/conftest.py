"""Row operations are tested in every dtype that a backend has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from builders import BackendDtype, why_not
from fused_gopd.rowops import select_backend
from interpreter import INTERPRETED, RUNNABLE, SMALL


@pytest.fixture(params=["torch-float64", "torch-float32", "native-float32"])
def backend_dtype(request: pytest.FixtureRequest) -> BackendDtype:
    name, dtype = request.param.split("-")
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return BackendDtype(name, getattr(torch, dtype))


@pytest.fixture(params=["torch", "native", "triton"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The row operations of every backend; in the interpreter's process those of ``triton`` alone."""
    name = request.param
    if INTERPRETED and name != "triton":
        pytest.skip("tested in the other process")
    if name == "triton":
        if not RUNNABLE:
            pytest.skip("no GPU and TRITON_INTERPRET is not set")
        from fused_gopd.rowops.triton import TritonRowOps

        return TritonRowOps(SMALL) if INTERPRETED else TritonRowOps()
    if (reason := why_not(name)) is not None:
        pytest.skip(reason)
    return select_backend(name, torch.device("cpu"), {torch.float32})
