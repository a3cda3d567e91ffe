"""Count the instructions that the native kernels run per vocabulary entry, under callgrind.

    python tests/helpers/native_counts.py [--write]

prints them, for the instruction sets that valgrind knows (AVX-512 is not among them). ``--write`` makes the table that
the tests compare with, and its page in the docs. Needs valgrind and g++ on x86-64.
"""

from __future__ import annotations

import argparse
import functools
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import snapshots

REPO = Path(__file__).parents[2]
TABLE = "native_instructions.json"
COMPILER = "g++"
ISAS = ("baseline", "avx2")
ENTRIES = 4096  # kLong - kShort of native/count.cpp
# One compiler's counts are exact, and the same on every machine. The share is for what is done once in a block of 1024
# entries: seven instructions there in the shortest row (2.9 an entry). One more instruction a vector shows in every
# loop: each is in a row of fewer than 400 a vector (the longest, skew KL statistics of the baseline, has 331).
SHARE = 0.0025
RULES = {"statistics": snapshots.more(SHARE), "gradient": snapshots.more(SHARE)}
ACCEPT = "If that is meant, accept it with `python tests/helpers/native_counts.py --write` (see tests/snapshots.md)."


def unavailable_reason() -> str | None:
    if platform.machine() != "x86_64":
        return "the committed counts are of x86-64"
    for tool, package in (("valgrind", "valgrind"), (COMPILER, "g++")):
        if shutil.which(tool) is None:
            return f"no {tool} here (Debian package {package})"
    if " avx2 " not in Path("/proc/cpuinfo").read_text():
        return "this machine has no AVX2"
    return None


@functools.cache
def version() -> str:
    """What has to be the same for two tables to be comparable."""
    done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def production_flags() -> dict[str, list[str]]:
    """The flags of each instruction set's kernels, from CMakeLists.txt, and those that CMake adds to a release."""
    text = (REPO / "CMakeLists.txt").read_text()
    common = re.search(r"row_kernels_\$\{isa\} PRIVATE (-.*?)\$\{ARGN\}", text, re.DOTALL)
    assert common, "no compile options of the row kernels in CMakeLists.txt"
    flags = ["-std=gnu++17", "-O3", "-DNDEBUG", "-fPIC", *common[1].split()]
    return {isa: flags + own.split() for isa, own in re.findall(r"add_row_kernels\((\w+)(.*)\)", text)}


def build(folder: Path, flags: dict[str, list[str]]) -> Path:
    """The program of native/count.cpp, with the kernels of all instruction sets."""
    compiles = []
    for isa, own in flags.items():
        kernels = [str(REPO / "csrc" / "row_kernels.cpp"), f"-DGOPD_ISA={isa}", "-c", "-o", str(folder / f"{isa}.o")]
        compiles.append(subprocess.Popen([COMPILER, *own, *kernels], stderr=subprocess.PIPE, text=True))
    for compiling in compiles:
        _, errors = compiling.communicate()
        assert compiling.returncode == 0, errors
    program = folder / "count"
    sources = [str(REPO / "tests" / "rowops" / "native" / "count.cpp"), str(REPO / "csrc" / "dispatch.cpp")]
    objects = [str(folder / f"{isa}.o") for isa in flags]
    command = [COMPILER, "-std=gnu++17", "-O1", f"-I{REPO / 'csrc'}", *sources, *objects, "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def count(program: Path, isa: str) -> dict[str, snapshots.Row]:
    """Instructions per vocabulary entry of every case of the program.

    Counts inside ``compute_row`` alone; every return from ``run`` ends a part, which callgrind writes to a file of its
    own. Four parts are a case.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part"
        options = ["--tool=callgrind", "--toggle-collect=*compute_row*", "--dump-after=fused_gopd::run(*"]
        command = ["valgrind", *options, f"--callgrind-out-file={out}", str(program), isa]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows: dict[str, snapshots.Row] = {}
        for i, case in enumerate(done.stdout.splitlines()):
            short, long, short_both, long_both = (_total(Path(f"{out}.{4 * i + part}")) for part in (1, 2, 3, 4))
            gradient = (long_both - short_both) - (long - short)
            rows[case] = {"statistics": round((long - short) / ENTRIES, 3), "gradient": round(gradient / ENTRIES, 3)}
    return rows


def _total(part: Path) -> int:
    found = re.search(r"^totals: (\d+)$", part.read_text(), re.M)
    assert found, part
    return int(found[1])


def measure(folder: Path) -> dict[str, dict[str, snapshots.Row]]:
    """The rows of the table."""
    program = build(folder, production_flags())
    rows: dict[str, dict[str, snapshots.Row]] = {}
    for isa in ISAS:
        for case, row in count(program, isa).items():
            rows.setdefault(case, {})[isa] = row
    return rows


def page(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    head = ["", *(f"{isa}, {quantity}" for isa in ISAS for quantity in RULES)]
    rows = [
        [case, *(f"{row[isa][quantity]:.1f}" for isa in ISAS for quantity in RULES)]
        for case, row in table["rows"].items()
    ]
    return snapshots.markdown(head, rows, numbers=True) + f"\n{table['compiler']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the committed table and its page in the docs")
    options = parser.parse_args()
    reason = unavailable_reason()
    if reason is not None:
        parser.exit(1, f"{reason}\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    print(page({"compiler": version(), "rows": rows}))
    if options.write:
        snapshots.save(TABLE, version(), rows)
        snapshots.PAGE.write_text(snapshots.fill(snapshots.PAGE.read_text(), TABLE, page(snapshots.load(TABLE))))


if __name__ == "__main__":
    main()
