"""Peak memory of one step beyond inputs and gradients, each provider in a process of its own.

``python -m benchmarks.memory JOB PROVIDER`` prints one JSON line. On a CPU the figure is

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
exactly and nothing else. On a GPU the caching allocator's peak is the figure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.providers import Result, Step, step_of
from benchmarks.workloads import synchronize, workloads

_ROOT = Path(__file__).resolve().parent.parent


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


def _profiled(step: Step) -> tuple[Result, int]:
    """One step, and the peak of what PyTorch's CPU allocator had handed out in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak


def measure(job: str, provider: str, device: str) -> Peak:
    workload = workloads(device)[job]
    small = workload.small()
    _profiled(step_of(provider, small, small.inputs()))
    inputs = workload.inputs()
    step = step_of(provider, workload, inputs)
    if torch.device(device).type == "cuda":
        step()
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        synchronize(device)
        return Peak(None, torch.cuda.max_memory_allocated(device) - before - _nbytes(result))
    _settle()
    before = _status("VmRSS")
    if provider == "compile":
        step()
        _settle()
    Path("/proc/self/clear_refs").write_text("5")
    result, allocated = _profiled(step)
    return Peak(_status("VmHWM") - before - _nbytes(result), allocated - _nbytes(result))


def measure_apart(job: str, provider: str, device: str) -> Peak:
    """:func:`measure` in a fresh process, with the allocator as it comes."""
    command = [sys.executable, "-m", "benchmarks.memory", job, provider, "--device", device]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, check=False, cwd=_ROOT, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the memory run of {provider} on {job} failed:\n{done.stderr[-4000:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("provider")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(json.dumps(measure(args.job, args.provider, args.device)._asdict()))
