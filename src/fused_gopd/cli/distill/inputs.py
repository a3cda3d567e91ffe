"""Fingerprints of the prompts and models of a run; a resumed run must find the same ones."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer

from .. import durable
from ..outputs import OutputFolder

FILE = "inputs.json"
ACCEPT = "--accept-changed-inputs"
# suffixes of the files in a model's folder that define the model or its tokenizer
_OF_MODELS = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf", ".tiktoken")

# name of an input -> file name -> SHA-256; of a hub model {"commit": its hash}
Fingerprints = dict[str, dict[str, str]]
PROMPTS = "the file of the prompts"
HELD_OUT = "the file of the evaluation prompts"


def fingerprints(prompts: Mapping[str, Path], models: Mapping[str, str]) -> Fingerprints:
    """Checksums of the files of prompts and of model folders, and the commits of hub models.

    Args:
        prompts: the files, by the names of the inputs.
        models: folders and hub names, by the names of the inputs.
    """
    files = {name: [file] for name, file in prompts.items()}
    files |= {name: _model_files(Path(place)) for name, place in models.items() if Path(place).is_dir()}
    every = sorted({file for paths in files.values() for file in paths})
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(every, pool.map(durable.sha256, every), strict=True))
    places = {name: file.parent for name, file in prompts.items()}
    places |= {name: Path(place) for name, place in models.items()}
    found = {
        name: {file.relative_to(places[name]).as_posix(): sums[file] for file in paths} for name, paths in files.items()
    }
    return found | {name: {"commit": _commit(place)} for name, place in models.items() if name not in found}


def _model_files(folder: Path) -> list[Path]:
    templates = folder.glob("additional_chat_templates/*")
    files = [*folder.iterdir(), *templates]
    return [path for path in files if path.is_file() and path.suffix in _OF_MODELS]


def _commit(name: str) -> str:
    """The commit of a hub model in the local cache."""
    hub: Any = importlib.import_module("transformers.utils.hub")
    path = hub.cached_file(name, "config.json")
    return str(hub.extract_commit_hash(path, None))


def digest(files: Mapping[str, str]) -> str:
    """One line for an input: its commit, the checksum of its only file, or a checksum over all its files' checksums."""
    if "commit" in files:
        return f"commit {files['commit']}"
    return f"sha256 {next(iter(files.values())) if len(files) == 1 else durable.checksum(dict(files))}"


def check(folder: OutputFolder, now: Fingerprints, done: int, accept: bool) -> dict[str, Any]:
    """Compare the inputs of a resumed run with those that it was started with.

    Args:
        folder: of the run.
        now: the fingerprints of the inputs as they are.
        done: steps that are done.
        accept: whether to continue with other inputs.

    Returns:
        The new content of ``inputs.json``: the fingerprints, and which inputs changed after which step.

    Raises:
        typer.BadParameter: naming the inputs that changed, and their files.
    """
    changes: list[dict[str, Any]] = []
    changed = []
    try:
        saved = durable.read_sealed(folder.path / FILE)
    except durable.Damaged as error:
        changed = [f"what they were is not known ({error})"]
    else:
        before, changes = saved["inputs"], saved["changes"]
        changed = [line for name in {**before, **now} if (line := _difference(name, before.get(name), now.get(name)))]
    if changed and not accept:
        raise typer.BadParameter(
            f"the run in {folder.path} began with other inputs: {'; '.join(changed)}. Put them back, or go on with "
            f"what is there by {ACCEPT}",
            param_hint="--resume",
        )
    return {"inputs": now, "changes": [*changes, {"after_step": done, "what": changed}] if changed else changes}


def _difference(name: str, before: dict[str, str] | None, now: dict[str, str] | None) -> str | None:
    if before == now:
        return None
    if before is None or now is None:
        return f"{name} is {'new' if before is None else 'no longer read'}"
    files = [file for file in sorted({**before, **now}) if before.get(file) != now.get(file)]
    shown = ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
    return f"{name} has changed ({shown})"
