"""``python -m benchmarks`` and ``fused-gopd bench``: run a suite, write one JSON of rows, print the tables."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fused_gopd.cli import durable

from . import conftest, registry, report
from .arguments import parse
from .workloads import JOBS, SUITES, default_suite

_HERE = Path(__file__).resolve().parent

# With --keep-memory. glibc gives every large tensor back to the system when it is freed and asks anew for the next. A
# virtual machine may hand such pages back to its host, and getting them again then takes longer than the arithmetic.
# With these the timed process keeps what it has freed, for all providers alike. The memory runs always do without:
# there it would hide a peak.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _instruction_set() -> str:
    """PyTorch's, and that of the native kernels if they are there."""
    torch_set = f"PyTorch {torch.backends.cpu.get_cpu_capability()}"
    try:
        from fused_gopd import _native
    except ImportError:
        return torch_set
    return f"{torch_set}, native {_native.isa()}"


def device_name(device: str) -> str:
    """The machine in words: nothing that tells whose it is."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = f"{_cpuinfo('model name')} (family {_cpuinfo('cpu family')}, model {_cpuinfo('model')})"
    return f"{model}, {torch.get_num_threads()} threads, {_instruction_set()}"


def _driver(device: str) -> str | None:
    if torch.device(device).type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _commit() -> str | None:
    """The commit that was measured; ``-dirty`` where tracked files differ from it. None outside a checkout of ours."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], check=False, cwd=_HERE, capture_output=True, text=True)
        return done.stdout.strip()

    # an installed package may lie in somebody else's checkout
    root = git("rev-parse", "--show-toplevel")
    if not root or not (Path(root) / "src" / "fused_gopd").is_dir():
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def origin(device: str) -> dict[str, Any]:
    """What was measured, where and when: the top of every raw result."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"device": device_name(device), "commit": _commit(), "date": date}


_PACKAGES = ("fused-gopd", "pytest-benchmark", "triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _quantile(values: list[float], q: float) -> float:
    """Linear between neighbours."""
    values = sorted(values)
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def row_of(info: dict[str, Any], seconds: Sequence[float]) -> dict[str, Any]:
    """A row from what a case says of itself and its rounds, with the time of the floor that ran beside it."""
    row = dict(info)
    times = [1e3 * t / row.get("queued", 1) for t in seconds]
    beside = row.pop("floor_ms", times if "floor" in row else None)
    row |= {f"ms_p{round(100 * q)}": _quantile(times, q) for q in (0.2, 0.5, 0.8)}
    row["rounds"] = len(times)
    if beside:
        row["bytes_ms_p50" if row["hidden"] is None else "gemm_ms_p50"] = median(beside)
    return row


class BadOptionError(ValueError):
    """An option that names what there is not."""

    def __init__(self, option: str, expected: Sequence[str], got: str) -> None:
        super().__init__(f"expected {', '.join(expected)}, got {got!r}")
        self.option = option


@dataclass(frozen=True)
class Options:
    """What to run. Empty jobs and providers are all of the suite's."""

    device: str = "cpu"
    suite: str = ""  # default by device
    jobs: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    seconds: float | None = None  # factor on the time spent per provider; default the suite's
    memory: bool = True
    accuracy: bool = True
    keep_memory: bool = False
    limit: float | None = None  # seconds after which no further case is started

    def checked(self) -> Options:
        """Itself with the suite filled in, or an error that says which option, what was expected and what came."""
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise BadOptionError("--device", ("cpu", "cuda"), self.device)
        if kind == "cuda" and not torch.cuda.is_available():
            raise BadOptionError("--device", ("cpu: PyTorch finds no GPU here",), self.device)
        suite = self.suite or default_suite(self.device)
        if suite not in SUITES:
            raise BadOptionError("--suite", tuple(SUITES), suite)
        known = (*registry.PROVIDERS, registry.FLOOR)
        for option, names, allowed in (("--jobs", self.jobs, tuple(JOBS)), ("--providers", self.providers, known)):
            for name in names:
                if name not in allowed:
                    raise BadOptionError(option, allowed, name)
        checked = replace(self, suite=suite)
        if not checked.cases:
            there = [w for w in SUITES[suite].workloads(self.device) if not self.jobs or w.job in self.jobs]
            if not there:
                jobs = dict.fromkeys(w.job for w in SUITES[suite].workloads(self.device))
                raise BadOptionError("--jobs", tuple(jobs), ", ".join(self.jobs))
            able = {name for w in there for name, p in registry.PROVIDERS.items() if w.job in p.jobs}
            raise BadOptionError("--providers", tuple(sorted(able)), ", ".join(self.providers))
        return checked

    @property
    def cases(self) -> list[str]:
        found = registry.cases(self.suite, self.device, self.jobs, self.providers)
        return [f"{workload.name}-{provider}" for workload, provider in found]

    @property
    def command(self) -> list[str]:
        """pytest on this folder's suite, whatever project the caller stands in."""
        command = [sys.executable, "-m", "pytest", str(_HERE / "test_speed.py"), "-c", os.devnull]
        command += [f"--rootdir={_HERE}", "-q", "-s", "-p", "no:cacheprovider"]
        command += ["--benchmark-disable-gc", "--benchmark-quiet"]
        command += [f"--device={self.device}", f"--suite={self.suite}"]
        command += [f"--jobs={','.join(self.jobs)}", f"--providers={','.join(self.providers)}"]
        command += [] if self.seconds is None else [f"--seconds={self.seconds}"]
        command += [] if self.limit is None else [f"--limit={self.limit}"]
        return command + ["--no-memory"] * (not self.memory) + ["--no-accuracy"] * (not self.accuracy)


def measure(options: Options, done: Callable[[str], None], path: Path | None = None) -> dict[str, Any]:
    """Run the cases and call ``done`` with the name of each. Failed cases are in ``skipped`` with ``failed`` set.

    Each case is in the file at ``path`` as soon as it is measured: a run that is cut off leaves what it has.
    """
    allocator = ALLOCATOR if options.keep_memory else {}
    start, output = time.monotonic(), []
    result: dict[str, Any] = {
        "suite": options.suite,
        **origin(options.device),
        "driver": _driver(options.device),
        "versions": _versions(),
        "allocator": allocator,
        "seconds": 0.0,
        "rows": [],
        "skipped": [],
    }
    # a pytest of its own, also inside another one: in a worker of pytest-xdist pytest-benchmark measures nothing
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outer, **allocator, "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(options.command, env=environment, **pipes) as process:
        for line in process.stdout or ():
            # pytest's dots stand before the marks
            for mark, add in ((conftest.SKIPPED, result["skipped"].append), (conftest.MEASURED, result["rows"].append)):
                _, found, rest = line.partition(mark)
                if found:
                    case = json.loads(rest)
                    add(case if mark == conftest.SKIPPED else row_of(**case))
            _, found, name = line.partition(conftest.DONE)
            if found:
                result["seconds"] = round(time.monotonic() - start, 1)
                if path is not None:
                    write(result, path)
                done(name.strip())
            output.append(line)
    if process.returncode not in (0, 1) or not (result["rows"] or result["skipped"]):
        raise RuntimeError(f"pytest ended with {process.returncode}:\n{''.join(output[-100:])}")
    return result


def write(result: dict[str, Any], path: Path) -> None:
    durable.replace(path, json.dumps(result, indent=1) + "\n")


def names(text: str) -> tuple[str, ...]:
    """A comma-separated option."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def listing() -> str:
    """What the options may name."""
    parts = ["suites", *(f"  {name:18} {suite.what}" for name, suite in SUITES.items()), "jobs"]
    parts += [f"  {name:18} {report.TITLES[name]}" for name in JOBS]
    parts += ["providers", *(f"  {name:18} {report.NAMES[name]}" for name in registry.PROVIDERS)]
    parts += [f"  {registry.FLOOR:18} the bare GEMMs, or moving the bytes once where logits are given"]
    return "\n".join(part.replace("**", "").replace("`", "") for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--suite", default="", help=f"{', '.join(SUITES)}; default by device")
    parser.add_argument("--jobs", default="", help="comma-separated, default all")
    parser.add_argument("--providers", default="", help="comma-separated, default all; the floors are called floor")
    parser.add_argument("--seconds", type=float, help="factor on the time spent per provider")
    parser.add_argument("--limit", type=float, help="seconds after which no further case is started")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory while timing")
    args = parse(parser, "json")
    selection = {"jobs": names(args.jobs), "providers": names(args.providers), "seconds": args.seconds}
    rest = {"memory": not args.no_memory, "accuracy": not args.no_accuracy, "keep_memory": args.keep_memory}
    rest["limit"] = args.limit
    try:
        options = Options(args.device, args.suite, **selection, **rest).checked()
    except BadOptionError as error:
        parser.error(f"{error.option}: {error}")
    result = measure(options, lambda name: print(name, file=sys.stderr, flush=True), args.json)
    print(report.markdown(result))
    return int(any(row["failed"] for row in result["skipped"]))


if __name__ == "__main__":
    raise SystemExit(main())
