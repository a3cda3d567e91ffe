"""Options and session state: the inputs of the current workload, and results that its providers share."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fused_gopd.loop.chunking import CHUNK_BUDGET_BYTES

from . import accuracy, floors, memory
from .providers import FUSED_PREFIX, Computation, Result, buffers, chunk_size
from .registry import PROVIDERS, cases, described, providers_of
from .workloads import SUITES, Inputs, Workload, default_suite, entropy, queued, rotation, synchronize

# Seconds in which the candidates of a floor are timed, between 3 and 9 rounds.
FLOOR_SECONDS = 1.0
# Prefixes of the lines that a case prints for run.py; DONE is the last one
MEASURED = "measured-case "
SKIPPED = "skipped-case "
DONE = "done-case "


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-gopd benchmarks")
    group.addoption("--device", default="cpu", help="where to run: cpu, cuda")
    group.addoption("--suite", default=None, choices=list(SUITES), help="which workloads; default by device")
    group.addoption("--jobs", default="", help="comma-separated jobs, default all")
    group.addoption("--providers", default="", help="comma-separated providers, default all; floor is the floors")
    group.addoption("--seconds", type=float, default=None, help="factor on the time spent per provider")
    group.addoption("--limit", type=float, default=None, help="seconds after which no further case is started")
    group.addoption("--no-memory", action="store_true", help="skip the memory runs")
    group.addoption("--no-accuracy", action="store_true", help="skip the accuracy runs")


def pytest_configure(config: pytest.Config) -> None:
    config.option.suite = config.option.suite or default_suite(config.option.device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        option = metafunc.config.getoption
        jobs, providers = (option(name).split(",") if option(name) else [] for name in ("--jobs", "--providers"))
        found = cases(option("--suite"), option("--device"), jobs, providers)
        names = [f"{workload.name}-{provider}" for workload, provider in found]
        metafunc.parametrize(("workload", "provider"), found, ids=names)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if isinstance(item, pytest.Function) and (call.when == "call" or not report.passed):
        workload, provider = (item.callspec.params[name] for name in ("workload", "provider"))
        if report.passed:
            benchmark = item.funcargs["benchmark"]
            print(MEASURED + json.dumps({"info": benchmark.extra_info, "seconds": benchmark.stats.stats.data}))
        else:
            assert call.excinfo is not None
            error = call.excinfo.exconly().splitlines()[0]
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else f"failed: {error}"
            line = {**described(workload, provider), "reason": reason, "failed": report.failed}
            print(SKIPPED + json.dumps(line))
        print(DONE + item.callspec.id, flush=True)
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Remove what identifies the machine or its owner."""
    machine_info.pop("node", None)


def milliseconds(step: Callable[[], object], device: str, steps: int | None = None) -> float:
    """Wall time of a step, of which several are queued on a GPU."""
    start, steps = time.perf_counter(), steps or queued(device)
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / steps


@dataclass
class Session:
    """State of the current workload; inputs of two workloads would not fit a small machine."""

    config: pytest.Config
    started: float = field(default_factory=time.monotonic)
    workload: Workload | None = None
    _inputs: list[Inputs] = field(default_factory=list)
    _truth: Result | None = None
    _peaks: dict[str, memory.Peak | str] = field(default_factory=dict)
    _floor: floors.Floor | None = None
    _clock: floors.Clock | None = None
    _entropy: float | None = None

    @property
    def out_of_time(self) -> bool:
        limit = self.config.getoption("--limit")
        return limit is not None and time.monotonic() - self.started > limit

    def enter(self, workload: Workload) -> None:
        """Make this workload the current one."""
        if self.workload != workload:
            self._inputs, self._truth, self._peaks, self._floor, self._entropy = [], None, {}, None, None
            gc.collect()
            torch.compiler.reset()
            if torch.device(workload.device).type == "cuda":
                torch.cuda.empty_cache()
            self.workload = workload

    @property
    def inputs(self) -> list[Inputs]:
        """Input sets that timed calls use in turn, see ``rotation``."""
        assert self.workload is not None
        if not self._inputs:
            self._inputs = [self.workload.inputs(seed) for seed in range(rotation(self.workload))]
        return self._inputs

    def peak(self, provider: str) -> memory.Peak:
        """Peak of one step of the current workload. On a CPU the first call measures all its providers."""
        assert self.workload is not None
        workload, option = self.workload, self.config.getoption
        if torch.device(workload.device).type == "cuda":
            if provider not in self._peaks:
                run = PROVIDERS[provider].prepare(workload)
                run(self.inputs[0])
                self._peaks[provider] = memory.measure_gpu(run, self.inputs[0])
        elif not self._peaks:
            selected = option("--providers").split(",") if option("--providers") else []
            names = dict.fromkeys([*providers_of(option("--suite"), workload, selected), self._fused()])
            available = [name for name in names if PROVIDERS[name].unavailable(workload) is None]
            self._peaks = memory.measure_in_processes(option("--suite"), workload, available)
        peak = self._peaks[provider]
        if isinstance(peak, str):
            raise RuntimeError(f"the memory run of {provider} failed: {peak}")
        return peak

    @property
    def entropy(self) -> float:
        """The student's mean entropy over the first unmasked tokens of the current workload, in nats."""
        if self._entropy is None:
            self._entropy = entropy(self.inputs[0].live())
        return self._entropy

    def errors(self, step: Computation) -> accuracy.Errors:
        assert self.workload is not None
        if self._truth is None:
            self._truth = accuracy.exact(self.workload, self.inputs[0])
            gc.collect()
        return accuracy.errors(step, self.inputs[0], self._truth)

    @property
    def floor(self) -> floors.Floor:
        """The floor of the current workload."""
        if self._floor is None:
            assert self.workload is not None
            device, option = self.workload.device, self.config.getoption
            memory = 0 if self.workload.level == "logits" else self._floor_memory()
            found = floors.candidates(self.workload, self.inputs, memory)
            quick = option("--seconds") == 0 or SUITES[option("--suite")].seconds == 0
            seconds = 0.0 if quick else FLOOR_SECONDS
            self._floor = floors.pick(found, lambda step: milliseconds(step, device), seconds)
        return self._floor

    @property
    def clock(self) -> floors.Clock:
        if self._clock is None:
            assert self.workload is not None
            self._clock = floors.Clock(self.workload.device)
        return self._clock

    def _fused(self) -> str:
        """This package's first available provider; the torch backend without the compiled extension."""
        assert self.workload is not None
        workload = self.workload
        names = [p for p in providers_of(self.config.getoption("--suite"), workload) if p.startswith(FUSED_PREFIX)]
        usable = [p for p in names if PROVIDERS[p].unavailable(workload) is None]
        return (usable or [FUSED_PREFIX + "torch"])[0]

    def _floor_memory(self) -> int:
        """Memory for the floor's chunk: what this package uses beyond inputs and gradients.

        At least what this package's chunk of logits may take: it may hold no logits at all, and the floor needs some.
        """
        assert self.workload is not None
        budget = CHUNK_BUDGET_BYTES["cpu" if torch.device(self.workload.device).type == "cpu" else "gpu"]
        chunk = int(4 * self.workload.vocab * chunk_size(self.workload) * buffers(self.workload))
        if self.config.getoption("--no-memory"):
            return max(budget, chunk)
        return max(budget, self.peak(self._fused()).extra)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return Session(request.config)
