"""The folder of a cache: files of one sequence each, written atomically, checked when they are read, and their size.

The package's docstring has the format.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
Scores = dict[str, Tensor]

_MARK, _MODEL = "teacher-cache.json", "model.json"
_HELD, _REMOVING = "teacher-cache.held", "teacher-cache.removing"  # locks
_FOLDER, _FILE = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{62}\.safetensors")
_ABANDONED = 3600  # seconds after which a temporary file is that of a process that was killed


class Damaged(Exception):
    """A file is not as it was written; the message says in what."""


def digest(*parts: bytes) -> str:
    """SHA-256 of byte strings with their lengths, so that no two lists of them have one text."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()


def key_of(ids: Tensor, positions: Tensor) -> str:
    """The name of a sequence: a hash of its token ids (T,) and of the positions (N,) that are scored."""
    return digest(*(x.to(torch.int64).contiguous().numpy().tobytes() for x in (ids, positions)))


def _checksum(tensors: Scores) -> str:
    value = 0
    for name, x in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), value)
        data: Any = x.contiguous().view(-1).view(torch.uint8).numpy()
        value = zlib.crc32(data, value)
    return f"{value:08x}"


def encoded(tensors: Scores) -> bytes:
    """The content of a file."""
    return save(tensors, {"format": str(FORMAT), "crc32": _checksum(tensors)})


class Folder:
    """The folder of a cache.

    Files are only added, replaced as a whole (``os.replace``) and removed, so that a reader has a complete file or
    none, whatever other processes do. Symbolic links are followed; nothing but the files of the format is ever removed.
    """

    def __init__(self, path: Path) -> None:
        """Create the folder, or open it; raises for a folder with other files."""
        self.path = path
        if path.exists() and not path.is_dir():
            raise ValueError(f"path must be a folder, got the file {path}")
        mark = path / _MARK
        foreign = sorted(x.name for x in path.iterdir()) if path.exists() else []
        if not mark.exists():  # looked for after the others: another process that creates the cache writes it first
            foreign = [name for name in foreign if not name.startswith(f".{_MARK}.")]
            if foreign:
                raise ValueError(
                    f"path must be a teacher's cache, or a new or empty folder; {path} has other files "
                    f"({foreign[0]}, ...)"
                )
            path.mkdir(parents=True, exist_ok=True)
            _replace(mark, json.dumps({"format": FORMAT}).encode())
            return
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))["format"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"path must be a teacher's cache, and {mark} is damaged: choose another one") from None
        if found != FORMAT:
            raise ValueError(
                f"path must be a cache of format {FORMAT}, and {path} has format {found}, of another version of this "
                "package: choose another one"
            )

    # ------------------------------------------------------------------------------------------------------ sequences

    def file(self, model: str, key: str) -> Path:
        return self.path / model / key[:2] / f"{key[2:]}.safetensors"

    def read(self, path: Path) -> Scores | None:
        """The tensors of a file; None if there is none. Marks it as used.

        Raises:
            Damaged: the file is not as it was written.
        """
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise Damaged(str(error)) from None
        if metadata.get("crc32") != _checksum(tensors):
            raise Damaged("it has other bytes than were written: their checksum differs")
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return tensors

    def write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)

    # --------------------------------------------------------------------------------------------------------- models

    def models(self) -> dict[str, dict[str, Any]]:
        """The content of every ``model.json``, by the name of its folder."""
        found = {}
        for file in sorted(self.path.glob(f"*/{_MODEL}")):
            if _FOLDER.fullmatch(file.parent.name):
                try:
                    found[file.parent.name] = _description(json.loads(file.read_text(encoding="utf-8")))
                except (ValueError, TypeError, KeyError, OSError):
                    raise Damaged(f"{file} is damaged: remove it, and it is written again") from None
        return found

    def describe(self, model: str, description: dict[str, Any]) -> None:
        """Write ``model.json`` unless it says the same."""
        path, content = self.path / model / _MODEL, json.dumps(description, indent=2, sort_keys=True).encode()
        with suppress(OSError):
            if path.read_bytes() == content:
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)

    # ----------------------------------------------------------------------------------------------------------- size

    def usage(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of each file; removes temporary files of processes that were killed."""
        found = []
        now = time.time()
        for folder in _subfolders(self.path):
            for shard in _subfolders(folder) if _FOLDER.fullmatch(folder.name) else ():
                with os.scandir(shard) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):  # removed by another process
                            status = entry.stat()
                            if _FILE.fullmatch(entry.name):
                                found.append((status.st_mtime, status.st_size, Path(entry.path)))
                            elif entry.name.startswith(".") and now - status.st_mtime > _ABANDONED:
                                os.unlink(entry.path)
        return found

    def make_room(self, size: int, max_bytes: int) -> tuple[int, int]:
        """Where ``size`` more bytes would be above ``max_bytes``, remove the least recently used files, down to 0.9.

        Returns how many were removed, and the bytes that are left: more than wanted where a process holds the files.
        """
        files = sorted(self.usage())
        total = sum(used for _, used, _ in files)
        count = 0
        if total + size > max_bytes:
            with self._unheld() as removable:
                for _, used, path in files if removable else ():
                    if total + size <= max_bytes * 9 // 10:
                        break
                    path.unlink(missing_ok=True)
                    total, count = total - used, count + 1
        return count, total

    # ----------------------------------------------------------------------------------------------------------- lock

    def hold(self) -> IO[bytes] | None:
        """Keep all files for as long as the returned file is open; None where nothing can be locked."""
        return self._locked(_HELD, "LOCK_SH")

    @contextmanager
    def _unheld(self) -> Iterator[bool]:
        """Whether no process holds the files; none begins to in the meantime, and one process at a time removes."""
        removing = self._locked(_REMOVING, "LOCK_EX")
        try:
            held = self._locked(_HELD, "LOCK_EX", "LOCK_NB")
        except BlockingIOError:
            held, free = None, False
        else:
            free = True
        try:
            yield free
        finally:
            for file in (held, removing):
                if file is not None:
                    file.close()

    def _locked(self, name: str, *flags: str) -> IO[bytes] | None:
        """A file with a lock, which ends when it is closed; None on Windows, and where nothing can be locked."""
        if fcntl is None:
            return None
        try:
            file = (self.path / name).open("ab")
        except OSError:  # a folder that may only be read
            return None
        try:
            fcntl.flock(file, functools.reduce(operator.or_, (getattr(fcntl, flag) for flag in flags)))
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks
            pass
        return file


def _description(found: Any) -> dict[str, Any]:
    """The content of a ``model.json``; raises for another one."""
    names, settings = found["names"], found["settings"]
    if not isinstance(found["fingerprint"], str) or not isinstance(settings, dict):
        raise TypeError
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError
    return dict(found)


def _subfolders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir()]


def _replace(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
