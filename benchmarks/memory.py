"""Peak memory of one step beyond inputs and gradients; on a CPU each provider in a process of its own.

``python -m benchmarks.memory SUITE WORKLOAD PROVIDER...`` prints one JSON line for each provider. It makes the inputs
once, with a single thread and without a step, and every provider is a fork of that state. On a CPU the figure is

    peak resident set during the step  -  resident set before it  -  bytes of the gradients that it returned

and everything the process keeps counts: allocator arenas, the GEMM library's packing buffers, thread stacks. What would
falsify it, and what is done about it:

- Libraries that load and threads that start on first use: a miniature of the workload runs first.
- The peak while the inputs were made: Linux resets the high-water mark (VmHWM) when 5 is written to clear_refs.
- Freed memory that the allocator keeps in the resident set would be used again for nothing: malloc_trim returns it
  before the resident set is read. The resident set is read before the provider ever ran at full size, so that caches
  which survive a step are not mistaken for input.
- The compiler: what compiles is measured in its second step. Memory that the compiler keeps counts against it; it is
  small, since the miniature has loaded the compiler.

The same step under torch.profiler gives a second figure from the allocator's own records: it sees PyTorch's tensors
exactly and nothing else. On a GPU the caching allocator's peak is the figure, taken in the process that is timed: it
counts what is handed out and not what is kept.
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

from .providers import Result, Run
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


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _nbytes(result: Result) -> int:
    return sum(g.nbytes for g in result.gradients)


def _profiled(run: Run, inputs: Inputs) -> tuple[Result, int]:
    """One step, and the peak of what PyTorch's CPU allocator had handed out in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run(inputs)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak


def measure_gpu(run: Run, inputs: Inputs) -> Peak:
    """In this process; the step has run before, so that nothing is compiled in it."""
    device = inputs.token_ids.device
    gc.collect()
    synchronize(str(device))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run(inputs)
    synchronize(str(device))
    return Peak(None, torch.cuda.max_memory_allocated(device) - before - _nbytes(result))


def measure_cpu(workload: Workload, provider: str, inputs: Inputs) -> Peak:
    """In this process, which has not run a step before."""
    prepare, small = PROVIDERS[provider].prepare, workload.small()
    _profiled(prepare(small), small.inputs())
    run = prepare(workload)
    _settle()
    before = _status("VmRSS")
    if PROVIDERS[provider].compiles:
        run(inputs)
        _settle()
    Path("/proc/self/clear_refs").write_text("5")
    result, allocated = _profiled(run, inputs)
    return Peak(_status("VmHWM") - before - _nbytes(result), allocated - _nbytes(result))


def _forked(workload: Workload, provider: str, inputs: Inputs, threads: int) -> None:
    """One line on standard output: the figure, or why there is none."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        try:
            line: dict[str, Any] = measure_cpu(workload, provider, inputs)._asdict()
        except Exception as error:  # whatever a peer raises is what is to be said of it
            line = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"provider": provider, **line}), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps({"provider": provider, "error": f"its process ended with status {status}"}), flush=True)


def measure_apart(suite: str, workload: Workload, providers: Sequence[str]) -> dict[str, Peak | str]:
    """:func:`measure_cpu` of each in a fresh process, with the allocator as it comes; a text says why there is none."""
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
    # the profiler and torch.compile import it: once here rather than in every fork
    importlib.import_module("torch._inductor.compile_fx")
    # a fork has no threads but its own: the parent must not have started any that compute
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = workload.inputs()
    for provider in args.providers:
        _forked(workload, provider, inputs, threads)


if __name__ == "__main__":
    main()
