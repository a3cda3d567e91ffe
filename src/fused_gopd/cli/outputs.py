"""Which folders and files a command may write into, and which files there it may replace or delete.

A command writes into an empty folder, or into one where it wrote before. The folder has a list of what the command
wrote, ``fused-gopd.json``: only listed files that are unchanged since are ever replaced or deleted. A folder that is
read (a model, prompts, a cache) is refused as an output folder, and so is one inside it or around it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from .. import __version__
from . import durable
from .demo.smollm import cache_dir

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEDGER = "fused-gopd.json"
LOCK = "fused-gopd.lock"


class OutputError(ValueError):
    """A place that may not be written to; the message says why."""


@contextlib.contextmanager
def option(name: str) -> Iterator[None]:
    """Turn an :class:`OutputError` into an error of the command's option ``name``."""
    try:
        yield
    except OutputError as error:
        raise typer.BadParameter(str(error), param_hint=name) from None


# ---------------------------------------------------------------------------------------------------- what is refused


def caches() -> dict[str, Path]:
    """Caches of models that other programs rely on: the hub's and this package's."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    return {"the cache of hub models": Path(hub), "this package's cache": cache_dir()}


def _identity(path: Path | int) -> tuple[int, int] | str:
    """A value equal for all paths of one folder or file, through links and mounts too. An int is a file descriptor."""
    try:
        status = os.stat(path)
    except OSError:
        return str(path)
    return status.st_dev, status.st_ino


def _with_parents(path: Path) -> list[tuple[int, int] | str]:
    real = Path(os.path.realpath(path))
    return [_identity(folder) for folder in (real, *real.parents)]


def refuse_overlap(path: Path, reads: Mapping[str, Path]) -> None:
    """Raise where an output is, contains or lies in a folder or file that is read.

    Args:
        path: the output, a folder or a file.
        reads: what is read, by a name for the message.
    """
    output = _with_parents(path)
    for name, source in reads.items():
        source_chain = _with_parents(source)
        if output[0] == source_chain[0]:
            relation = "is"
        elif output[0] in source_chain:
            relation = "contains"
        elif source_chain[0] in output:
            relation = "lies in"
        else:
            continue
        raise OutputError(f"{path} {relation} {name} ({source}), which is only read: choose another place")


def _refuse_impossible(path: Path, kind: str) -> None:
    """Raise for a dangling link, or where a file is in the place of a folder or a folder in that of a file."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise OutputError(f"{place} is a link to {os.readlink(place)}, which does not exist")
    if path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):  # a device is neither of them
        raise OutputError(f"{path} is no {kind}")


def _refuse_foreign(path: Path, command: str, reuse: bool) -> None:
    """Raise unless a folder is empty or written by ``command``; without ``reuse`` it may have no finished entry."""
    found = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if not found or found == [LEDGER]:
        return
    if LEDGER not in found:
        names = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise OutputError(
            f"{path} is not empty ({names}) and has no {LEDGER}, where fused-gopd lists what it writes: choose a new "
            "or an empty folder"
        )
    ledger = _read_ledger(path)
    wrote, files = ledger["command"], {LEDGER: None, **ledger["files"]}
    if wrote != command:
        raise OutputError(f"{path} holds the output of fused-gopd {wrote}: choose another folder")
    if not reuse and any(name not in files or files[name] is not None for name in found):
        raise OutputError(f"{path} holds the output of an earlier fused-gopd {wrote}: choose another folder")


def new_file(path: Path, overwrite: bool, reads: Mapping[str, Path] | None = None) -> Path:
    """The path of a file that may be written; creates its folder.

    Args:
        path: the file.
        overwrite: whether it may exist already.
        reads: as for :func:`refuse_overlap`.

    Raises:
        OutputError: it exists and may not be replaced, or cannot be written.
    """
    refuse_overlap(path, {**(reads or {}), **caches()})
    _refuse_impossible(path, "file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another name, or replace it by --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            with path.open("r+b"):
                pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    return path


# ------------------------------------------------------------------------------------------------------ output folders


def _read_ledger(path: Path) -> dict[str, Any]:
    try:
        return durable.read_sealed(path / LEDGER)
    except durable.Damaged as error:
        raise OutputError(f"{path / LEDGER} is not what fused-gopd writes ({error}): choose another folder") from None


def _signature(path: Path) -> list[int] | None:
    """[size, modification time] of a regular file, else None. A copy that keeps times keeps the signature."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None


class OutputFolder:
    """A folder that a command writes into, with the list of what it wrote there.

    An entry is a file or a folder directly in this folder. While it is being written, everything in it counts as the
    command's. Once it is finished, only the files that it has at that moment do.
    """

    def __init__(self, path: Path, command: str, *, new: bool = False) -> None:
        """``new`` begins an empty list and ignores an existing one."""
        self.path = path
        self._command = command
        # entry -> None while it is being written, else file -> size and time of modification
        self._files: dict[str, dict[str, list[int]] | None] = {}
        if not new and (path / LEDGER).exists():
            self._files = _read_ledger(path)["files"]

    def save(self) -> None:
        """Write the list."""
        content = {"command": self._command, "version": __version__, "files": self._files}
        durable.write_sealed(self.path / LEDGER, content)

    def wrote(self, name: str) -> bool:
        """Whether the command wrote the entry."""
        return name in self._files

    def check(self, *names: str) -> None:
        """Raise for a name under which something exists that the command did not write."""
        for name in names:
            if os.path.lexists(self.path / name) and not self.wrote(name):
                raise OutputError(
                    f"{self.path / name} was not written by fused-gopd {self._command}, which would write there: move "
                    "it away, or choose another folder"
                )

    def extend(self, name: str) -> Path:
        """The path of an entry that several calls of the command write to."""
        self.check(name)
        self._files[name] = None
        self.save()
        return self.path / name

    def adopt(self, name: str) -> None:
        """Add an existing entry to the list, with everything in it."""
        self._files[name] = None

    def create(self, name: str) -> Path:
        """The path for a new entry. An earlier one is deleted as far as the command wrote it, and renamed otherwise."""
        self._clear(name)
        self._files[name] = None
        self.save()
        return self.path / name

    def finish(self, name: str) -> None:
        """Mark an entry as complete: files added or changed from now on do not count as the command's."""
        path = self.path / name
        paths = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        signatures = {str(file.relative_to(self.path)): _signature(file) for file in paths}
        self._files[name] = {file: signature for file, signature in signatures.items() if signature is not None}
        self.save()

    def move(self, source: str, target: str) -> None:
        """Rename a complete entry; an earlier one of the new name is treated as in :meth:`create`."""
        self._clear(target)
        self._files[target] = None  # before the rename, so that the entry is listed at any time
        self.save()
        (self.path / source).rename(self.path / target)
        durable.flush_folder(self.path)
        self._files.pop(source, None)
        self.finish(target)

    def remove(self, name: str) -> None:
        """Delete those files of an entry that the command wrote, and no others."""
        self._delete_own(name)
        if os.path.lexists(self.path / name):
            typer.echo(f"{self.path / name} is kept: it holds files that this run did not write", err=True)
        self._files.pop(name, None)
        self.save()

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """The path of an entry that is removed at the end, also after an exception."""
        try:
            yield self.create(name)
        finally:
            self.remove(name)

    def _clear(self, name: str) -> None:
        self._delete_own(name)
        path = self.path / name
        if os.path.lexists(path):
            free = (self.path / f"{name}.kept-{i}" for i in itertools.count(1))
            kept = next(place for place in free if not os.path.lexists(place))
            path.rename(kept)
            typer.echo(f"{path} holds what this run did not write: it is now {kept}", err=True)

    def _delete_own(self, name: str) -> None:
        path = self.path / name
        if (
            not self.wrote(name) or path.is_symlink()
        ):  # the command writes no links: neither the link nor its target is its own
            return
        files = self._files[name]
        if files is None:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        folders = {path} if path.is_dir() else set()
        for file, signature in files.items():
            if _signature(self.path / file) == signature:
                (self.path / file).unlink()
                folders |= {folder for folder in (self.path / file).parents if path in folder.parents}
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


class FollowedFolder(OutputFolder):
    """The folder of a run as its other processes have it: the first one writes, this one changes nothing."""

    def save(self) -> None:
        pass

    def move(self, source: str, target: str) -> None:
        self._files[target] = {}

    def remove(self, name: str) -> None:
        self._files.pop(name, None)

    def _clear(self, name: str) -> None:
        pass


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends in any way."""
    place = path / LOCK
    while True:
        file = place.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise OutputError(
                f"{path} is being written by {holder}: wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            typer.echo(
                f"{path}: no lock ({error.strerror}): two runs in this folder would not notice each other", err=True
            )
        if _identity(place) == _identity(file.fileno()):
            break
        file.close()  # the previous holder deleted this file after it was opened here and before it was locked
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
    finally:
        place.unlink(missing_ok=True)
        file.close()


def _make(path: Path) -> list[Path]:
    """Create a folder with its parents. Returns those that did not exist."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


@contextlib.contextmanager
def opened(
    path: Path,
    command: str,
    *,
    reads: Mapping[str, Path] | None = None,
    reuse: bool = True,
    exclusive: bool = True,
    relist: Callable[[OutputFolder], None] | None = None,
) -> Iterator[OutputFolder]:
    """Open a folder to write into. It is created if it does not exist, and removed if nothing is written.

    Args:
        path: the folder.
        command: the command that writes; a folder belongs to one command.
        reads: folders and files that are read, by a name for messages; the output may not overlap with them.
        reuse: whether the folder may have finished entries of this command. Without it, the folder may be one where
            the command was killed before it finished an entry.
        exclusive: lock the folder, so that no other process writes there at the same time.
        relist: called where the list is missing or damaged, to add the command's entries to it. Only for a folder that
            is known to be the command's.

    Raises:
        OutputError: the folder has files of others, overlaps with what is read, is in use or cannot be written.
    """
    refuse_overlap(path, {**(reads or {}), **caches()})
    _refuse_impossible(path, "folder")
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        try:
            if path.exists() and relist is None:
                _refuse_foreign(path, command, reuse)
            made = _make(path)
            stack.callback(_remove_empty, made)
            if exclusive:
                stack.enter_context(_locked(path))
            if relist is not None:
                _repair_ledger(path, command, relist)
            _refuse_foreign(path, command, reuse)  # again: another process may have written in the meantime
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror}") from None
        folder = OutputFolder(path, command)
        if exclusive:
            stack.callback(_remove_empty_ledger, path)
        else:
            folder.save()
        yield folder


def _repair_ledger(path: Path, command: str, relist: Callable[[OutputFolder], None]) -> None:
    try:
        durable.read_sealed(path / LEDGER)
    except durable.Damaged as error:
        folder = OutputFolder(path, command, new=True)
        relist(folder)
        folder.save()
        typer.echo(f"{error}: what this run wrote is listed again, from its manifests", err=True)


def _remove_empty_ledger(path: Path) -> None:
    if {entry.name for entry in path.iterdir()} == {LEDGER, LOCK}:
        (path / LEDGER).unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        with contextlib.suppress(OSError):
            folder.rmdir()
