"""Files that survive a crash, and folders with a checksum of every file.

A folder is first written under a temporary name. Then its manifest is written, with the size and the SHA-256 of each
file, everything is flushed to the disk, and the folder is renamed
(:meth:`fused_gopd.cli.outputs.OutputFolder.move`). So a folder under its final name is complete, and later damage is
detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A file or folder is not as it was written; the message says in what."""


# ------------------------------------------------------------------------------------------------------- single files


def replace(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it has either its old or its new text.

    Of a symbolic link, the target is replaced.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush_folder(path.parent)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, with a checksum over them."""
    replace(path, json.dumps({**values, "sha256": checksum(values)}, indent=2))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read the values that :func:`write_sealed` wrote.

    Raises:
        Damaged: the file is missing, cannot be read, or has other values.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.pop("sha256", None) != checksum(values):
        raise Damaged(f"{path.name} has other values than were written, or no checksum")
    return values


def checksum(values: dict[str, Any]) -> str:
    """SHA-256 of the values as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot flush a folder
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# ------------------------------------------------------------------------------------------------------------ folders


def seal(folder: Path, step: int) -> None:
    """Write the manifest of a complete folder, and flush the folder to the disk."""
    files = {}
    for name in _files(folder):
        _flush(folder / name)
        files[name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    write_sealed(folder / MANIFEST, {"step": step, "files": files})
    for inner in folder.rglob("*"):
        if inner.is_dir():
            flush_folder(inner)


def verify(folder: Path) -> int:
    """Compare a folder with its manifest. Returns the step at which it was sealed.

    Raises:
        Damaged: a file has changed, is missing, or was added.
    """
    manifest = read_sealed(folder / MANIFEST)
    files = cast("dict[str, dict[str, Any]]", manifest["files"])
    for name in _files(folder):
        if name not in files:
            raise Damaged(f"{name} was added to it")
    for name, entry in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                raise Damaged(f"{name} has {size} bytes instead of {entry['size']}")
            if sha256(path) != entry["sha256"]:
                raise Damaged(f"{name} has other bytes than were written")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
    return int(manifest["step"])


def _files(folder: Path) -> Iterator[str]:
    """Relative paths of all files, without the manifest and hidden files, which file managers and systems add."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and not path.name.startswith(".") and path != folder / MANIFEST:
            yield path.relative_to(folder).as_posix()
