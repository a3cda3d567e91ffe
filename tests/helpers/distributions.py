"""Check what `make wheel` has built: the one wheel and the one source distribution of a folder.

The wheel: the package and no more, the extension within it, no library beside it, links that work on a package index.
The source distribution: what a build needs, and nothing that a build or a run has made.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

LAB = ("results/", "reproduction/scale/", "kernels.py", "host.py", "wire.py", "gemm.py")  # of benchmarks/
LIBRARY = {
    "cli/bench.py",
    "benchmarks/run.py",
    "benchmarks/reproduction/runner.py",
    "py.typed",
    "html/report.html.jinja",
    "html/report.css",
}
NEEDED = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc/bind.cpp", "csrc/rowops.h")


def check_wheel(file: Path) -> list[str]:
    found = []
    with zipfile.ZipFile(file) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    package = [name.partition("/")[2] for name in names if name.startswith("fused_gopd/")]
    inside = re.compile(r"fused_gopd(-[^/]*\.dist-info)?/")
    found += [f"{name} is beside the package" for name in names if not inside.match(name)]
    found += [
        f"{name} is not of a library"
        for name in package
        if not name.endswith((".py", ".so", "py.typed", ".jinja", ".css"))
    ]
    found += [f"{name} is of the lab" for name in package if name.startswith(tuple(f"benchmarks/{x}" for x in LAB))]
    extensions = [name for name in package if name.endswith(".so")]
    stable = "-abi3-" in file.name
    if len(extensions) != 1 or not extensions[0].startswith("_native.") or stable is not (".abi3." in extensions[0]):
        found.append(f"expected one _native, of the stable ABI: {stable}; found {extensions}")
    if not set(package) >= LIBRARY:
        found.append("modules of the package are missing")
    relative = re.findall(r"""(?:\]\(|(?:src|srcset|href)=["'])((?!https?:|mailto:|#)[^)"'\s]+)""", metadata)
    found += [f"the README's link to {link} is relative" for link in relative]
    return [f"{file.name}: {problem}" for problem in found]


def check_source(file: Path) -> list[str]:
    with tarfile.open(file) as source:
        names = [name.partition("/")[2] for name in source.getnames()]
    found = [f"{name} is missing" for name in NEEDED if name not in names]
    found += [f"{name} is a product" for name in names if re.search(r"\.(so|o|pyc|whl)$|^(build|dist|\.venv)", name)]
    return [f"{file.name}: {problem}" for problem in found]


def main(folder: Path) -> None:
    (wheel,), (source,) = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    problems = check_wheel(wheel) + check_source(source)
    for file in (wheel, source):
        print(f"{file.stat().st_size / 1024:6.0f} KiB  {file.name}")
    sys.exit("\n".join(problems) if problems else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
