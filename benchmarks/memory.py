"""Peak memory of one step beyond inputs and gradients; on a CPU in a separate process for each provider.

``python -m benchmarks.memory SUITE WORKLOAD PROVIDER...`` prints one JSON line for each provider. It makes the inputs
once, with a single thread and without running a step, and forks that state for every provider. On a CPU the result is

    peak resident set during the step  -  resident set before it  -  bytes of the gradients that it returned

It includes allocator arenas, the GEMM library's packing buffers and thread stacks. Possible errors and their remedies:

- Libraries are loaded and threads started on first use: a small workload runs first.
- Making the inputs has a peak of its own: writing 5 to clear_refs resets the high-water mark (VmHWM).
- Freed memory in the resident set would be reused without being counted: malloc_trim returns it to the system first.
  The resident set is read before the provider runs at full size, so that caches which survive a step do not count as
  input.
- Compilation needs memory: providers that compile are measured in their second step. Memory that the compiler keeps
  counts; it is small, since the small workload has loaded the compiler.

torch.profiler gives a second result for the same step from the allocator's records: exactly PyTorch's tensors and
nothing else. On a GPU the result is the peak of allocated (not cached) memory of the caching allocator, in the process
that is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .providers import Computation, Result
from .registry import PROVIDERS
from .workloads import SUITES, Inputs, Workload, synchronize

# this module's name for ``python -m``, and the folder from which it is found
_MODULE = f"{__package__}.memory"
_ROOT = Path(__file__).resolve().parents[_MODULE.count(".")]


class Peak(NamedTuple):
    """Bytes beyond inputs and gradients."""

    resident: int | None  # the operating system's count, None on a GPU
    allocated: int  # PyTorch's count

    @property
    def extra(self) -> int:
        return self.allocated if self.resident is None else self.resident


def process_status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def release_free_memory() -> None:
    """Return freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _nbytes(result: Result) -> int:
    return sum(g.nbytes for g in result.gradients)


def _profiled(step: Computation, inputs: Inputs) -> tuple[Result, int]:
    """Run one step, and the peak of the memory that PyTorch's CPU allocator handed out in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step(inputs)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak


def measure_gpu(step: Computation, inputs: Inputs) -> Peak:
    """Measure a step that has run before (so that it does not compile) in this process."""
    device = inputs.token_ids.device
    gc.collect()
    synchronize(str(device))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step(inputs)
    synchronize(str(device))
    return Peak(None, torch.cuda.max_memory_allocated(device) - before - _nbytes(result))


def measure_cpu(workload: Workload, provider: str, inputs: Inputs) -> Peak:
    """Measure a provider in this process, which must not have run a step before."""
    prepare, small = PROVIDERS[provider].prepare, workload.small()
    _profiled(prepare(small), small.inputs())
    step = prepare(workload)
    release_free_memory()
    before = process_status("VmRSS")
    if PROVIDERS[provider].compiles:
        step(inputs)
        release_free_memory()
    Path("/proc/self/clear_refs").write_text("5")
    result, allocated = _profiled(step, inputs)
    return Peak(process_status("VmHWM") - before - _nbytes(result), allocated - _nbytes(result))


def _forked(workload: Workload, provider: str, inputs: Inputs, threads: int) -> None:
    """Measure in a fork, which prints a line of JSON with the peak or an error."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        try:
            line: dict[str, Any] = measure_cpu(workload, provider, inputs)._asdict()
        except Exception as error:  # peers may raise any exception, which the row reports
            line = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"provider": provider, **line}), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps({"provider": provider, "error": f"its process ended with status {status}"}), flush=True)


def measure_in_processes(suite: str, workload: Workload, providers: Sequence[str]) -> dict[str, Peak | str]:
    """:func:`measure_cpu` of each provider in a new process with the default allocator; a str is an error message."""
    command = [sys.executable, "-m", _MODULE, suite, workload.name, *providers]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, check=False, cwd=_ROOT, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the memory run of {workload.name} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Peak | str] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            name, error = row.pop("provider"), row.get("error")
            found[name] = error or Peak(**row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suite")
    parser.add_argument("workload")
    parser.add_argument("providers", nargs="+")
    args = parser.parse_args()
    (workload,) = [w for w in SUITES[args.suite].workloads("cpu") if w.name == args.workload]
    # imported once here, since the profiler and torch.compile would import it in every fork
    importlib.import_module("torch._inductor.compile_fx")
    # a fork has none of its parent's threads, so the parent must not start OpenMP's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = workload.inputs()
    for provider in args.providers:
        _forked(workload, provider, inputs, threads)


if __name__ == "__main__":
    main()
