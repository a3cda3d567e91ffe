"""``python -m benchmarks`` and ``fused-gopd bench``: run a suite, write one JSON of rows, print the tables."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
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
from fused_gopd.cli.machine import cpu_model

from . import conftest, registry, report
from .arguments import parse
from .floors import clock_name, quantile
from .workloads import JOBS, SUITES, default_suite

_HERE = Path(__file__).resolve().parent

# Environment with --keep-memory. By default glibc returns every large tensor to the system when it is freed. A virtual
# machine may return such pages to its host, and faulting them in again takes longer than the arithmetic. With these the
# timed process keeps freed memory, for all providers alike. Not in the memory runs, where it would hide a peak.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}


def _instruction_set() -> str:
    """PyTorch's instruction set, and that of the native kernels if they are installed."""
    torch_set = f"PyTorch {torch.backends.cpu.get_cpu_capability()}"
    try:
        from fused_gopd import _native
    except ImportError:
        return torch_set
    return f"{torch_set}, native {_native.isa()}"


def device_name(device: str) -> str:
    """Model of the GPU or CPU, without anything that identifies the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads, {_instruction_set()}"


def driver_version(device: str) -> str | None:
    if torch.device(device).type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _commit() -> str | None:
    """The commit that is measured, ``-dirty`` if tracked files differ; None outside this repository or without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], check=False, cwd=_HERE, capture_output=True, text=True)
        return done.stdout.strip()

    if shutil.which("git") is None:
        return None
    # an installed package may be inside another repository
    root = git("rev-parse", "--show-toplevel")
    if not root or not (Path(root) / "src" / "fused_gopd").is_dir():
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def origin(device: str) -> dict[str, Any]:
    """Device, commit and date, for the beginning of every result file."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"device": device_name(device), "commit": _commit(), "date": date}


_PACKAGES = ("fused-gopd", "pytest-benchmark", "triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers")
_PACKAGES += ("quack-kernels", "nvidia-cutlass-dsl", "orda-kernel", "unsloth-zoo")


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def row_of(info: dict[str, Any], seconds: Sequence[float]) -> dict[str, Any]:
    """A row of a case's description and its rounds, with the times of floor and clock in the same rounds."""
    row = dict(info)
    times = [1e3 * t / row.get("queued", 1) for t in seconds]
    floor = row.pop("floor_ms", times if "floor" in row else None)
    clock = row.pop("clock_ms", [])
    row |= {"ms_min": min(times)} | {f"ms_p{round(100 * q)}": quantile(times, q) for q in (0.2, 0.5, 0.8, 0.9)}
    row["rounds"] = len(times)
    for name, values in (("bytes" if row["hidden"] is None else "gemm", floor), ("clock", clock)):
        if values:
            row |= {f"{name}_ms_min": min(values), f"{name}_ms_p50": median(values)}
            row[f"{name}_ms_p90"] = quantile(values, 0.9)
    return row


class BadOptionError(ValueError):
    """An option with an unknown name."""

    def __init__(self, option: str, expected: Sequence[str], got: str) -> None:
        super().__init__(f"expected {', '.join(expected)}, got {got!r}")
        self.option = option


@dataclass(frozen=True)
class Options:
    """What to run. Empty jobs or providers stand for all of the suite."""

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
        """These options with the suite filled in; raises for options that name nothing."""
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
            supporting = {name for w in there for name, p in registry.PROVIDERS.items() if w.job in p.jobs}
            raise BadOptionError("--providers", tuple(sorted(supporting)), ", ".join(self.providers))
        return checked

    @property
    def cases(self) -> list[str]:
        found = registry.cases(self.suite, self.device, self.jobs, self.providers)
        return [f"{workload.name}-{provider}" for workload, provider in found]

    @property
    def command(self) -> list[str]:
        """The pytest command for this folder, independent of the current project's configuration."""
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

    The file at ``path`` is written after each case, so that an interrupted run leaves the finished ones.
    """
    allocator = ALLOCATOR if options.keep_memory else {}
    start, output = time.monotonic(), []
    result: dict[str, Any] = {
        "suite": options.suite,
        **origin(options.device),
        "driver": driver_version(options.device),
        "versions": package_versions(),
        "allocator": allocator,
        "clock": clock_name(options.device),
        "seconds": 0.0,
        "rows": [],
        "skipped": [],
    }
    # without the variables of an outer pytest: in a worker of pytest-xdist, pytest-benchmark does not measure
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outer, **allocator, "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(options.command, env=environment, **pipes) as process:
        for line in process.stdout or ():
            # pytest may print dots before the prefixes
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
    """The names that the options accept."""
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
