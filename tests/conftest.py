"""Fixtures: the backends and dtypes that a test runs in, and a stable hypothesis."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from builders import BackendDtype, why_not

settings.register_profile(
    "stable", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("stable")


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections: a trainer makes one as it starts, of a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on a CPU here."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.fixture(params=["torch-float64", "native-float32"])
def backend_dtype(request: pytest.FixtureRequest) -> BackendDtype:
    """Backend and dtype: float64 makes a formula's error visible, float32 is what runs.

    The PyTorch row operations in float32 are the same code; tests/rowops has them too.
    """
    name, dtype = request.param.split("-")
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return BackendDtype(name, getattr(torch, dtype))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of many small operations: threads that wait for each other cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
