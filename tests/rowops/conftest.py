"""Row operations are tested in every dtype that a backend has."""

from __future__ import annotations

import pytest
import torch

from builders import BackendDtype, why_not


@pytest.fixture(params=["torch-float64", "torch-float32", "native-float32"])
def backend_dtype(request: pytest.FixtureRequest) -> BackendDtype:
    name, dtype = request.param.split("-")
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return BackendDtype(name, getattr(torch, dtype))
