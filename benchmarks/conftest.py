"""Options and the session's state: the inputs of one workload at a time, and what later providers need of earlier."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import accuracy, floors, memory
from benchmarks.providers import FUSED_PREFIX, PROVIDERS, Result, unavailable
from benchmarks.workloads import Inputs, Workload, synchronize, workloads
from fused_gopd.chunks import CHUNK_BUDGET_BYTES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-gopd benchmarks")
    group.addoption("--device", default="cpu", help="where to run: cpu")
    group.addoption("--jobs", default="", help="comma-separated jobs, default all")
    group.addoption("--providers", default="", help="comma-separated providers, default all")
    group.addoption("--seconds", type=float, default=1.0, help="factor on the time spent per provider")
    group.addoption("--no-memory", action="store_true", help="skip the memory runs")
    group.addoption("--no-accuracy", action="store_true", help="skip the accuracy runs")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Nothing that names a machine or its owner."""
    machine_info.pop("node", None)


def milliseconds(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


class Floor(NamedTuple):
    step: Callable[[], object]
    name: str
    chunk_size: int | None
    candidates_ms: dict[str, float]  # the better of two calls, by name


@dataclass
class Session:
    """One workload's inputs at a time: two would not fit a small machine."""

    config: pytest.Config
    workload: Workload | None = None
    _inputs: Inputs | None = None
    _truth: Result | None = None
    _peaks: dict[tuple[str, str], memory.Peak] = field(default_factory=dict)
    _floor: Floor | None = None

    def enter(self, job: str) -> Workload:
        """Make this job's workload the current one."""
        if self.workload is None or self.workload.job != job:
            self._inputs = self._truth = self._floor = None
            gc.collect()
            torch.compiler.reset()
            self.workload = workloads(self.config.getoption("--device"))[job]
        return self.workload

    @property
    def inputs(self) -> Inputs:
        assert self.workload is not None
        if self._inputs is None:
            self._inputs = self.workload.inputs()
        return self._inputs

    def peak(self, provider: str) -> memory.Peak:
        assert self.workload is not None
        key = (self.workload.job, provider)
        if key not in self._peaks:
            self._peaks[key] = memory.measure_apart(*key, self.workload.device)
        return self._peaks[key]

    def errors(self, provider: str) -> accuracy.Errors:
        assert self.workload is not None
        if self._truth is None:
            self._truth = accuracy.exact(self.workload, self.inputs)
            gc.collect()
        return accuracy.errors(provider, self.workload, self.inputs, self._truth)

    @property
    def floor(self) -> Floor:
        """The floor of the current job: the fastest of the candidates, each tried twice."""
        if self._floor is None:
            self._floor = self._pick_floor()
        return self._floor

    def _pick_floor(self) -> Floor:
        assert self.workload is not None
        device = self.workload.device
        sizes: dict[str, int] = {}
        candidates: dict[str, Callable[[], object]] = {}
        if self.workload.level == "logits":
            candidates = floors.moving_bytes(self.inputs)
        else:
            assert self.inputs.weights is not None
            dweight = torch.zeros(self.inputs.weights[0].shape, device=device)
            for c in floors.chunk_sizes(self.workload, self._fused_memory()):
                for suffix, own in floors.libraries(device).items():
                    sizes[f"C={c}{suffix}"] = c
                    candidates[f"C={c}{suffix}"] = floors.bare_gemms(self.inputs, c, dweight, own)
        times = {}
        for name, step in candidates.items():
            times[name] = min(milliseconds(step, device) for _ in range(2))  # the first one is the warm-up
        best = min(times, key=lambda name: times[name])
        return Floor(candidates[best], best, sizes.get(best), times)

    def _fused_memory(self) -> int:
        assert self.workload is not None
        if self.config.getoption("--no-memory"):
            return CHUNK_BUDGET_BYTES["cpu" if self.workload.device == "cpu" else "gpu"]
        names = [p for p in PROVIDERS[self.workload.job] if p.startswith(FUSED_PREFIX)]
        # without the compiled extension there is still a fused path with the same chunks
        usable = [p for p in names if not unavailable(p)] or [FUSED_PREFIX + "torch"]
        return self.peak(usable[0]).extra


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return Session(request.config)
