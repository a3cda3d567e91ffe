"""How to install what is missing: the command that every message of this package names.

It is the one that fits how this copy came here (a clone, a folder, a wheel or an address that pip has installed, or a
release from an index), for the Python that runs. It can be pasted into a shell.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

NAME = "fused-gopd"
_PACKAGE = Path(__file__).resolve().parent


def extra(name: str) -> str:
    """The command that installs an extra of this package, such as ``train``."""
    return _pip(*_this_package(f"[{name}]") or _requirements(name))


def packages(*requirements: str, options: str = "") -> str:
    """The command that installs packages from an index; ``options`` are pip's."""
    return _pip(*options.split(), *requirements)


def rebuild() -> str:
    """The command that builds this package once more from the same place, with its native extension.

    A clone is installed as editable, so that the extension is found also where the clone is on ``PYTHONPATH``.
    """
    clone = _clone()
    if clone is not None:
        return _pip("--no-deps", "-e", _folder(clone))
    return _pip("--force-reinstall", "--no-deps", "--no-cache-dir", *_this_package("") or [NAME])


def missing(name: str) -> list[str]:
    """The packages of an extra that are not installed, as the extra requires them."""
    return [requirement for requirement in _requirements(name) if not _installed(_project(requirement))]


# ---------------------------------------------------------------------------------------------- where this copy is from


def _clone() -> Path | None:
    """The folder of the source tree that this copy is part of."""
    root = _PACKAGE.parent.parent
    return root if _PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file() else None


def _distribution() -> metadata.Distribution | None:
    try:
        return metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return None


def _origin() -> dict[str, Any]:
    """direct_url.json (PEP 610): from which address pip has installed this copy; empty for one from an index."""
    found = _distribution()
    return json.loads((found and found.read_text("direct_url.json")) or "{}")  # type: ignore[no-any-return]


def _this_package(extras: str) -> list[str]:
    """What pip takes for this package with extras; empty where the file that it was installed from is gone."""
    origin = _origin()
    url: str = origin.get("url", "")
    path = _path(url)
    clone = _clone()
    if clone is not None:
        editable = path is not None and clone == path.resolve() and origin.get("dir_info", {}).get("editable")
        return [*(["-e"] if editable else []), _folder(clone) + extras]
    if not origin:
        return [NAME + extras]
    if "vcs_info" in origin:
        return [f"{NAME}{extras} @ {origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"]
    if path is None:
        return [f"{NAME}{extras} @ {url}"]
    if not path.exists():
        return []
    return [_folder(path) + extras if path.is_dir() else f"{NAME}{extras} @ {url}"]


def _path(url: str) -> Path | None:
    """The file or folder of a URL."""
    if not url.startswith("file:"):
        return None
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return Path(url2pathname(urlsplit(url).path))


def _folder(path: Path) -> str:
    """A folder as pip takes it with extras: with a separator in it, for else it would be the name of a package."""
    return "." if path == Path.cwd() else str(path)


# ----------------------------------------------------------------------------------------------------- what extras have


def _requirements(name: str) -> list[str]:
    """The packages of an extra, those of the extras that it includes among them."""
    found: dict[str, None] = {}
    for requirement in _of_extra(name):
        if _project(requirement) == NAME:
            inner = re.findall(r"[\w-]+", requirement.partition("[")[2].partition("]")[0])
            found |= dict.fromkeys(r for one in inner for r in _requirements(one))
        else:
            found[requirement] = None
    return list(found)


def _of_extra(name: str) -> Iterator[str]:
    clone, toml = _clone(), "tomllib" if sys.version_info >= (3, 11) else "tomli"
    if clone is not None and importlib.util.find_spec(toml) is not None:
        text = (clone / "pyproject.toml").read_text(encoding="utf-8")
        yield from importlib.import_module(toml).loads(text)["project"]["optional-dependencies"].get(name, [])
        return
    distribution = _distribution()
    for requirement in (distribution and distribution.requires) or []:
        what, _, marker = requirement.partition(";")
        if re.search(rf"""extra == ["']{re.escape(name)}["']""", marker):
            yield what.strip().replace(" ", "")


def _project(requirement: str) -> str:
    """The name of a requirement's package, as indexes write it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def _installed(project: str) -> bool:
    try:
        metadata.version(project)
    except metadata.PackageNotFoundError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------ the shell


def _pip(*arguments: str) -> str:
    python = Path(sys.executable)
    # Not find_spec: setuptools' hook takes it for an import of pip, after which torch.compile cannot import setuptools.
    if not _installed("pip"):  # an environment of uv
        installer = f"uv pip install --python {_quoted(sys.executable)}"
    elif Path(shutil.which("pip") or os.devnull).parent == python.parent:
        installer = "pip install"
    else:  # another Python's pip is the one that the shell finds
        installer = f"{_quoted(sys.executable)} -m pip install"
    return " ".join([installer, *map(_quoted, arguments)])


def _quoted(word: str) -> str:
    """In double quotes where that is needed and enough: shells of Windows know no others."""
    if re.fullmatch(r"[\w./:=+@%-]+", word):
        return word
    return shlex.quote(word) if set(word) & set('"$`\\!') and os.name != "nt" else f'"{word}"'
