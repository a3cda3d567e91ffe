"""The command that installs what is missing fits how this copy came here, and works when it is pasted."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fused_gopd import installing

ROOT = Path(__file__).resolve().parents[2]
METADATA = """Metadata-Version: 2.1
Name: fused-gopd
Version: 0.1.0
Provides-Extra: demo
Provides-Extra: train
Requires-Dist: no-such-demo>=2; extra == "demo"
Requires-Dist: pytest; extra == "demo"
Requires-Dist: fused-gopd[demo]; extra == "train"
Requires-Dist: no-such-trl <1.17,>=1.16 ; extra == 'train'
"""
BACKEND = """
import shutil
def build_wheel(folder, *_): return shutil.copy({wheel!r}, folder).rpartition("/")[2]
def get_requires_for_build_wheel(*_): return []
"""


def copy_of_the_package(folder: Path, origin: dict[str, Any] | None) -> None:
    """What pip leaves in a folder of packages."""
    package, info = folder / "fused_gopd", folder / "fused_gopd-0.1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    for name in ("__init__.py", "installing.py"):
        (package / name).write_bytes((ROOT / "src/fused_gopd" / name).read_bytes())
    (info / "METADATA").write_text(METADATA)
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))


def wheel_in(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "fused_gopd-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("fused_gopd/__init__.py", "")
        wheel.writestr("fused_gopd-0.1.0.dist-info/METADATA", METADATA)
        wheel.writestr(
            "fused_gopd-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("fused_gopd-0.1.0.dist-info/RECORD", "")
    return path


def said_by(packages: Path, *expressions: str) -> list[Any]:
    """What the functions of a copy of the package return."""
    code = f"import json; from fused_gopd.installing import *; print(json.dumps([{', '.join(expressions)}]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(packages)}
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def paste(command: str, *options: str) -> str:
    """Run a command that pip shall only plan, with this package's own files as the only index."""
    offline = ["--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation", *options]
    line = f"{command} {shlex.join(offline)}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def test_a_wheel_file(tmp_path: Path) -> None:
    wheel = wheel_in(tmp_path / "wheels of mine")
    copy_of_the_package(tmp_path / "site", {"url": wheel.as_uri(), "archive_info": {}})
    train, missing = said_by(tmp_path / "site", "extra('train')", "missing('train')")
    assert shlex.split(train)[-1] == f"fused-gopd[train] @ {wheel.as_uri()}"
    assert missing == ["no-such-demo>=2", "no-such-trl<1.17,>=1.16"]
    assert "Would install fused-gopd-0.1.0" in paste(train)
    wheel.unlink()
    (train,) = said_by(tmp_path / "site", "extra('train')")
    assert shlex.split(train)[-3:] == ["no-such-demo>=2", "pytest", "no-such-trl<1.17,>=1.16"]


def test_a_folder(tmp_path: Path) -> None:
    wheel, folder = wheel_in(tmp_path / "wheels"), tmp_path / "my clone"
    folder.mkdir()
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (folder / "pyproject.toml").write_text(build)
    (folder / "backend.py").write_text(BACKEND.format(wheel=str(wheel)))
    copy_of_the_package(tmp_path / "site", {"url": folder.as_uri(), "dir_info": {}})
    (train,) = said_by(tmp_path / "site", "extra('train')")
    assert shlex.split(train)[-1] == f"{folder}[train]"
    assert "Would install fused-gopd-0.1.0" in paste(train)


def test_a_release_from_an_index(tmp_path: Path) -> None:
    copy_of_the_package(tmp_path / "site", None)
    train, rebuild, other = said_by(tmp_path / "site", "extra('train')", "rebuild()", "packages('triton>=3.2')")
    assert shlex.split(train)[-1] == "fused-gopd[train]"
    assert shlex.split(rebuild)[-4:] == ["--force-reinstall", "--no-deps", "--no-cache-dir", "fused-gopd"]
    assert shlex.split(other)[-1] == "triton>=3.2"
    wheels = wheel_in(tmp_path / "wheels").parent
    assert "Would install fused-gopd-0.1.0" in paste(train, "--find-links", str(wheels))


def test_an_address(tmp_path: Path) -> None:
    vcs = {"vcs": "git", "commit_id": "d3fabdf"}
    copy_of_the_package(tmp_path / "git", {"url": "https://example.org/gopd.git", "vcs_info": vcs})
    copy_of_the_package(tmp_path / "file", {"url": "https://example.org/gopd.whl", "archive_info": {}})
    last = [shlex.split(said_by(tmp_path / name, "extra('demo')")[0])[-1] for name in ("git", "file")]
    assert last == [
        "fused-gopd[demo] @ git+https://example.org/gopd.git@d3fabdf",
        "fused-gopd[demo] @ https://example.org/gopd.whl",
    ]


def test_a_clone_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "_PACKAGE", ROOT / "src" / "fused_gopd")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(installing.extra("train"))[-1] == f"{ROOT}[train]"
    assert shlex.split(installing.rebuild())[-2:] == ["-e", str(ROOT)]
    monkeypatch.chdir(ROOT)
    assert shlex.split(installing.extra("train"))[-1] == ".[train]"
    assert installing._requirements("train")[-1].startswith("tensorboard")
    assert any(r.startswith("transformers") for r in installing._requirements("train")), "those of demo, too"


def test_the_pip_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "pip"
    pip.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installing.packages("triton") == f"{sys.executable} -m pip install triton"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert installing.packages("triton>=3.2", "verl") == 'pip install "triton>=3.2" verl'
    monkeypatch.setattr(installing, "_installed", lambda project: project != "pip")
    assert installing.packages("triton") == f"uv pip install --python {tmp_path}/python triton"


def test_setuptools_can_be_imported_after_a_message() -> None:
    """torch.compile does. On Python 3.11 and older its hook gives up where something looks for pip as a module."""
    pytest.importorskip("setuptools")
    code = "from fused_gopd import installing; assert installing.extra('train'); import setuptools"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_message_takes_the_command_from_here() -> None:
    """A command that is written out fits one way of installing this package, and is wrong for the others."""
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        if path.name not in ("installing.py", "host_versions.py"):  # the latter names it in a recipe for developers
            assert "pip install" not in path.read_text(encoding="utf-8"), path
