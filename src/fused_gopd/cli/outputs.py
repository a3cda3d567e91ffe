"""Which folders and files a command may write into, and which files there it may replace or delete.

A command writes into an empty folder, or into one where it wrote before. What it wrote is listed in the folder itself,
in ``fused-gopd.json``: only listed files that are still as they were written are ever replaced or deleted. A folder
that is read (a model, prompts, a cache) is no output folder, and neither is one inside it or around it.
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
    """Nothing may be written there; the message says why."""


@contextlib.contextmanager
def option(name: str) -> Iterator[None]:
    """An :class:`OutputError` becomes the error of a command's option."""
    try:
        yield
    except OutputError as error:
        raise typer.BadParameter(str(error), param_hint=name) from None


# ---------------------------------------------------------------------------------------------------- what is refused


def caches() -> dict[str, Path]:
    """Folders of models that other programs rely on: the hub's cache and this package's."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    return {"the cache of hub models": Path(hub), "this package's cache": cache_dir()}


def _identity(path: Path | int) -> tuple[int, int] | str:
    """Equal for two names of one folder or file, whatever links or mounts lead to it; an int is an open file."""
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
    """A link to nowhere, or something in the way."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise OutputError(f"{place} is a link to {os.readlink(place)}, which does not exist")
    if path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):  # a device is neither
        raise OutputError(f"{path} is no {kind}")


def _refuse_foreign(path: Path, command: str, again: bool) -> None:
    """Raise unless a folder is empty or one that ``command`` wrote into, without ``again`` only what is unfinished."""
    found = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if not found or found == [LEDGER]:
        return
    if LEDGER not in found:
        listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise OutputError(
            f"{path} is not empty ({listed}) and has no {LEDGER}, where fused-gopd lists what it writes: choose a new "
            "or an empty folder"
        )
    ledger = _read_ledger(path)
    wrote, files = ledger["command"], {LEDGER: None, **ledger["files"]}
    if wrote != command:
        raise OutputError(f"{path} holds the output of fused-gopd {wrote}: choose another folder")
    if not again and any(name not in files or files[name] is not None for name in found):
        raise OutputError(f"{path} holds the output of an earlier fused-gopd {wrote}: choose another folder")


def new_file(path: Path, overwrite: bool, reads: Mapping[str, Path] | None = None) -> Path:
    """A file that may be written; its folder is made.

    Args:
        overwrite: it may exist already.
        reads: as for :func:`refuse_overlap`.

    Raises:
        OutputError: it exists, or cannot be written.
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
    """Size and time of modification of a plain file; they survive a copy that keeps times."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None


class OutputFolder:
    """A folder that a command writes into, with the list of what it wrote there.

    An entry is a file or a folder by its name in this folder. While it is being written all of it is the command's;
    once it is finished, the files that it has then.
    """

    def __init__(self, path: Path, command: str, *, new: bool = False) -> None:
        """With ``new`` the list that is there is not read."""
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
        """Whether an entry is the command's."""
        return name in self._files

    def check(self, *names: str) -> None:
        """Raise where an entry that is going to be written exists and is not the command's."""
        for name in names:
            if os.path.lexists(self.path / name) and not self.wrote(name):
                raise OutputError(
                    f"{self.path / name} was not written by fused-gopd {self._command}, which would write there: move "
                    "it away, or choose another folder"
                )

    def extend(self, name: str) -> Path:
        """The place of an entry that is written piece by piece, over several calls of the command."""
        self.check(name)
        self._files[name] = None
        self.save()
        return self.path / name

    def adopt(self, name: str) -> None:
        """Count an entry that exists as the command's, all of it."""
        self._files[name] = None

    def create(self, name: str) -> Path:
        """The free place of a new entry; an earlier one of this name is deleted, as far as it is the command's."""
        self._clear(name)
        self._files[name] = None
        self.save()
        return self.path / name

    def finish(self, name: str) -> None:
        """An entry is complete: what is added to it or changed from now on is somebody else's."""
        path = self.path / name
        paths = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        signatures = {str(file.relative_to(self.path)): _signature(file) for file in paths}
        self._files[name] = {file: signature for file, signature in signatures.items() if signature is not None}
        self.save()

    def move(self, source: str, target: str) -> None:
        """A complete entry gets its name; an earlier one of that name is treated as by :meth:`create`."""
        self._clear(target)
        self._files[target] = None  # before it is there: an entry that exists is always listed
        self.save()
        (self.path / source).rename(self.path / target)
        durable.flush_folder(self.path)
        self._files.pop(source, None)
        self.finish(target)

    def remove(self, name: str) -> None:
        """Delete what the command wrote of an entry, and nothing else."""
        self._delete_own(name)
        if os.path.lexists(self.path / name):
            typer.echo(f"{self.path / name} is kept: it holds files that this run did not write", err=True)
        self._files.pop(name, None)
        self.save()

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An entry that is removed at the end, whatever the end is."""
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
        if not self.wrote(name) or path.is_symlink():  # a link is not ours, nor is what it leads to
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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time writes into a folder; the lock ends with its process, however that ends."""
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
        file.close()  # the former holder deleted the file between our opening and our locking it
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
    finally:
        place.unlink(missing_ok=True)
        file.close()


def _make(path: Path) -> list[Path]:
    """Make a folder with its parents; those that were not there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


@contextlib.contextmanager
def opened(
    path: Path,
    command: str,
    *,
    reads: Mapping[str, Path] | None = None,
    again: bool = True,
    alone: bool = True,
    relist: Callable[[OutputFolder], None] | None = None,
) -> Iterator[OutputFolder]:
    """A folder to write into, made if it is not there; removed again where nothing was written.

    Args:
        command: who writes; a folder belongs to one command.
        reads: folders and files that are read, by a name for messages: the output may not overlap with them.
        again: whether the command may write where it wrote before; else only where it was killed before it had
            finished anything.
        alone: no other process may write there at the same time.
        relist: for a folder that is known to be the command's: called where the list is missing or damaged, it lists
            the entries anew.

    Raises:
        OutputError: the folder is somebody else's, overlaps with what is read, is in use or cannot be written.
    """
    refuse_overlap(path, {**(reads or {}), **caches()})
    _refuse_impossible(path, "folder")
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        try:
            if path.exists() and relist is None:
                _refuse_foreign(path, command, again)
            made = _make(path)
            stack.callback(_remove_empty, made)
            if alone:
                stack.enter_context(_locked(path))
            if relist is not None:
                _mend(path, command, relist)
            _refuse_foreign(path, command, again)  # another process may have begun meanwhile
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror}") from None
        folder = OutputFolder(path, command)
        if alone:
            stack.callback(_remove_empty_ledger, path)
        else:
            folder.save()
        yield folder


def _mend(path: Path, command: str, relist: Callable[[OutputFolder], None]) -> None:
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
