"""``python -m benchmarks``: run the suite, write one JSON of rows, print the tables."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import report

_ROOT = Path(__file__).resolve().parent.parent

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
    """The commit that was measured; ``-dirty`` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, check=False, cwd=_ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("fused-gopd", "pytest-benchmark", "triton"):
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


def rows_of(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows from pytest-benchmark's JSON. Every row of a job gets the floor's time: its neighbour's, else the job's."""
    rows = []
    for bench in measured["benchmarks"]:
        times = [1e3 * t for t in bench["stats"]["data"]]
        quantiles = {f"ms_p{round(100 * q)}": _quantile(times, q) for q in (0.2, 0.5, 0.8)}
        rows.append({**bench["extra_info"], **quantiles, "rounds": len(times)})
    floors = {row["job"]: row["ms_p50"] for row in rows if "floor" in row}
    for row in rows:
        beside = row.pop("floor_ms", None)
        key = "bytes_ms_p50" if row["hidden"] is None else "gemm_ms_p50"
        if beside:
            row[key] = median(beside)
        elif row["job"] in floors:
            row[key] = floors[row["job"]]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", default="", help="comma-separated, default all")
    parser.add_argument("--providers", default="", help="comma-separated, default all; the floors are called floor")
    parser.add_argument("--seconds", type=float, default=1.0, help="factor on the time spent per provider")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory while timing")
    args = parser.parse_args()
    allocator = ALLOCATOR if args.keep_memory else {}
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "pytest-benchmark.json"
        command = [sys.executable, "-m", "pytest", "benchmarks/test_speed.py", "-q", "-rs", "-p", "no:cacheprovider"]
        command += ["--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={raw}"]
        command += [f"--device={args.device}", f"--jobs={args.jobs}", f"--providers={args.providers}"]
        command += [f"--seconds={args.seconds}"]
        command += [flag for flag in ("--no-memory", "--no-accuracy") if getattr(args, flag[2:].replace("-", "_"))]
        status = subprocess.run(command, check=False, cwd=_ROOT, env={**os.environ, **allocator}).returncode
        if not raw.exists() or not raw.stat().st_size:
            return status or 1
        measured = json.loads(raw.read_text())
    result = {
        "device": device_name(args.device),
        "driver": _driver(args.device),
        "versions": _versions(),
        "allocator": allocator,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rows": rows_of(measured),
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(report.markdown(result))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
