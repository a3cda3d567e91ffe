"""Time per step of every provider on every workload, with its memory and its errors beside it.

Nothing here asserts a time. Quantiles come from the rounds that pytest-benchmark records; a warm-up round is left out,
and with it compilation. Before each round of a fused provider the floor runs once and is timed too, so that the ratio
of the two is taken between neighbours in time.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Session, milliseconds
from benchmarks.providers import FUSED_PREFIX, PROVIDERS, step_of, unavailable
from benchmarks.workloads import Workload, synchronize
from fused_gopd.chunks import chunk_size_for, logits_buffers

FLOOR = "floor"
# Seconds of measured rounds per provider, and the fewest and the most rounds; seconds of warm-up.
SECONDS = {"logits": 4.0, "hidden": 16.0}
ROUNDS = (3, 41)
WARM_UP = 1.0

CASES = [(job, p) for job, providers in PROVIDERS.items() for p in ([] if "bf16" in job else [FLOOR]) + providers]


def _row(workload: Workload, provider: str) -> dict[str, Any]:
    fused = provider.startswith(FUSED_PREFIX)
    chunk = None
    if fused and workload.hidden is not None:
        models = logits_buffers(workload.estimator == "full", len(workload.hidden))
        chunk = min(workload.tokens, chunk_size_for(workload.vocab, models, workload.device))
    return {
        "job": workload.job,
        "provider": provider,
        "tokens": workload.tokens,
        "hidden": workload.hidden,
        "vocab": workload.vocab,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "chunk_dtype": "float32" if fused and workload.hidden is not None else None,
        "chunk_size": chunk,
        "masked": workload.masked,
    }


@pytest.mark.parametrize(("job", "provider"), CASES, ids=["-".join(case) for case in CASES])
def test_step(job: str, provider: str, benchmark: BenchmarkFixture, session: Session) -> None:
    option = session.config.getoption
    for name, value in (("--jobs", job), ("--providers", provider)):
        if option(name) and value not in option(name).split(","):
            pytest.skip(f"not in {name}")
    reason = None if provider == FLOOR else unavailable(provider)
    if reason is not None:
        pytest.skip(f"{provider} is not available: {reason}")
    workload = session.enter(job)
    benchmark.group = job
    benchmark.extra_info |= _row(workload, provider)
    if provider == FLOOR:
        floor = session.floor
        step = floor.step
        benchmark.extra_info |= {
            "provider": "moving the bytes once" if workload.level == "logits" else "five bare GEMMs",
            "floor": floor.name,
            "chunk_size": floor.chunk_size,
            "candidates_ms": floor.candidates_ms,
        }
    else:
        if not option("--no-memory"):
            peak = session.peak(provider)
            benchmark.extra_info |= {"peak_extra_bytes": peak.extra, "peak_extra_bytes_allocator": peak.allocated}
        if not option("--no-accuracy"):
            loss, rows, weight = session.errors(provider)
            names = ("error_loss", "error_dlogits" if workload.hidden is None else "error_dhidden", "error_dweight")
            benchmark.extra_info |= dict(zip(names, (loss, rows, weight), strict=True))
        step = step_of(provider, workload, session.inputs)

    # Warm-up until its calls add up to WARM_UP seconds, two calls at least where the first one compiles. The first
    # steps of a process fault memory in that the host of a virtual machine has to find, at ten times the time of later
    # ones. The last call says how many rounds fit.
    estimates = [milliseconds(step, workload.device) / 1e3 for _ in range(2 if provider == "compile" else 1)]
    while sum(estimates) < WARM_UP:
        estimates.append(milliseconds(step, workload.device) / 1e3)
    estimate = estimates[-1]
    rounds = round(option("--seconds") * SECONDS[workload.level] / estimate)
    beside: list[float] = []

    def before_round() -> None:
        gc.collect()
        if provider.startswith(FUSED_PREFIX) and "bf16" not in job:
            beside.append(milliseconds(session.floor.step, workload.device))

    def timed() -> None:
        step()
        synchronize(workload.device)

    benchmark.pedantic(timed, setup=before_round, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))
    if beside:
        benchmark.extra_info["floor_ms"] = beside
