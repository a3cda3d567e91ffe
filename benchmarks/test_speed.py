"""Time per step, memory and errors of every provider on every workload.

No time is asserted. Quantiles are over the rounds that pytest-benchmark records, without the warm-up and compilation.
A product of fixed shape (the clock) and the floor are timed before each round of a provider, so that their ratio
compares measurements that are close in time.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import Session, milliseconds
from .floors import count
from .registry import FLOOR, PROVIDERS, described, has_floor
from .workloads import SUITES, Workload, queued

# Seconds of measured rounds per provider, and the fewest and the most rounds; seconds of warm-up.
SECONDS = {"logits": 4.0, "hidden": 16.0}
ROUNDS = (3, 41)
WARM_UP = {"cpu": 1.0, "cuda": 0.3}
NUMBERS = ("no", "one", "two", "three", "four", "five")


def _floor(session: Session, workload: Workload, extra: dict[str, Any]) -> Callable[[], object]:
    floor = session.floor
    gemms = count(workload)
    name = f"{NUMBERS[gemms]} bare GEMM{'s' * (gemms > 1)}"
    extra |= {
        "provider": "moving the bytes once" if workload.level == "logits" else name,
        "floor": floor.name,
        "chunk_size": floor.chunk_size,
        "candidates": floor.tried,
    }
    return floor.step


def _measured(session: Session, workload: Workload, provider: str, extra: dict[str, Any]) -> Callable[[], object]:
    """The provider's step, which uses the input sets in turn; adds memory and errors to ``extra``."""
    reason = PROVIDERS[provider].unavailable(workload)
    if reason is not None:
        pytest.skip(reason)
    run = PROVIDERS[provider].prepare(workload)
    option = session.config.getoption
    if not option("--no-accuracy"):
        names = ("error_loss", "error_dlogits" if workload.hidden is None else "error_dhidden", "error_dweight")
        extra |= dict(zip(names, session.errors(run), strict=True))
    if not option("--no-memory"):
        peak = session.peak(provider)
        extra |= {"peak_extra_bytes": peak.extra, "peak_extra_bytes_allocator": peak.allocated}
    sets = itertools.cycle(session.inputs)
    return lambda: run(next(sets))


def _rounds(timed: Callable[[], float], floor_ms: float, workload: Workload, seconds: float, *, compiles: bool) -> int:
    """Warm up for WARM_UP seconds, at least two calls if the first one compiles. Returns the number of rounds that fit.

    The first steps of a process may take ten times as long as later ones, because the host of a virtual machine has to
    provide the pages. A round takes the time of the last call and ``floor_ms``.
    """
    estimates = [timed() for _ in range(2 if compiles else 1)]
    while seconds and sum(estimates) < 1e3 * WARM_UP[torch.device(workload.device).type]:
        estimates.append(timed())
    each = queued(workload.device) * (estimates[-1] + floor_ms)
    fitting = round(seconds * 1e3 * SECONDS[workload.level] / each)
    return min(max(fitting, ROUNDS[0]), ROUNDS[1])


def test_step(workload: Workload, provider: str, benchmark: BenchmarkFixture, session: Session) -> None:
    option = session.config.getoption
    if session.out_of_time:
        pytest.skip(f"the limit of {option('--limit'):.0f} s was over")
    session.enter(workload)
    benchmark.group = workload.name
    benchmark.extra_info |= described(workload, provider)
    if workload.level == "hidden":
        benchmark.extra_info["entropy"] = session.entropy
    seconds = option("--seconds")
    if seconds is None:
        seconds = SUITES[option("--suite")].seconds
    floor_times: list[float] = []
    clock_times: list[float] = []
    try:
        if provider == FLOOR:
            step, compiles = _floor(session, workload, benchmark.extra_info), False
        else:
            step = _measured(session, workload, provider, benchmark.extra_info)
            compiles = PROVIDERS[provider].compiles
        floor = session.floor if provider != FLOOR and has_floor(workload) else None

        gc.collect()
        gc.freeze()  # existing objects are not scanned again before every round

        def before_round() -> None:
            gc.collect()
            clock_times.append(milliseconds(session.clock.step, workload.device, steps=1))
            if floor is not None:
                floor_times.append(milliseconds(floor.step, workload.device))

        timed = functools.partial(milliseconds, step, workload.device)
        floor_ms = 0.0 if floor is None else floor.ms
        rounds = _rounds(timed, floor_ms, workload, seconds, compiles=compiles)
        benchmark.extra_info["queued"] = queued(workload.device)
        benchmark.pedantic(timed, setup=before_round, rounds=rounds)
    except torch.OutOfMemoryError:
        gc.collect()
        pytest.skip("out of memory on the GPU")
    finally:
        gc.unfreeze()
    benchmark.extra_info["clock_ms"] = clock_times
    if floor_times:
        benchmark.extra_info["floor_ms"] = floor_times
