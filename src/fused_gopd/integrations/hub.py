"""Names of models, which are folders or names on the hub; others are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# arguments of from_pretrained that the functions of the hub share
_WHERE = ("revision", "cache_dir")
_FILES = ("config.json", "adapter_config.json")
# before the path of an adapter on the student's base, in the place of a model's path
ADAPTER = "adapter:"
# in the place of a model's path: the student itself, and a student without its PEFT adapter. A folder of one of these
# names is ./student
STUDENT = "student"
BASE = "base"


def adapter_path(source: object) -> str | None:
    """The folder or hub name in ``"adapter:PATH"``; None for every other model."""
    return source.removeprefix(ADAPTER) if isinstance(source, str) and source.startswith(ADAPTER) else None


def is_own(source: object) -> bool:
    """Whether a teacher or reference is made of the student: ``"student"`` or ``"base"``."""
    return isinstance(source, str) and source in (STUDENT, BASE)


def is_folder(argument: str, name: str) -> bool:
    """True for a folder, False for a name that may be on the hub.

    A name with more than one slash, or one that begins with a dot, a slash or a tilde, must be a folder.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return True
    if not name or folder.is_file() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{argument} must be a model: there is no folder {name}")
    return False


def require_model(argument: str, name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise for a model that does not exist, which ``from_pretrained`` would retry for half a minute.

    A name that is not a folder is looked up in the hub's cache, and then once on the hub.

    Args:
        argument: the name of the argument, for the message.
        name: of the model, as ``from_pretrained`` takes it.
        options: keyword arguments of ``from_pretrained``.

    Raises:
        ValueError: no such folder; no such model on the hub; a model that is not in the cache, while the hub cannot be
            reached or is switched off.
    """
    if is_folder(argument, name):
        return
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
        )
    except ModuleNotFoundError:  # loading the model will raise the error for the missing package
        return
    options = options or {}
    where = {key: options[key] for key in _WHERE if options.get(key) is not None}
    try:
        if any(isinstance(try_to_load_from_cache(name, file, **where), str) for file in _FILES):
            return
    except HFValidationError:
        raise ValueError(
            f"{argument} must be a model: there is no folder {name}, which is no name on the hub"
        ) from None
    neither = f"{argument} must be a model: there is no folder {name}, and the hub's cache has none of this name"
    if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        raise ValueError(f"{neither}, beyond which nothing is to be looked for (HF_HUB_OFFLINE, local_files_only)")
    where.pop("cache_dir", None)
    try:
        get_hf_file_metadata(hf_hub_url(name, _FILES[0], **where), token=options.get("token"), timeout=10)
    except EntryNotFoundError:  # the model exists, without this file
        return
    except GatedRepoError:  # a subclass of the next one
        raise ValueError(
            f"{argument} must be a model that can be loaded: the hub gives {name} only to those who accepted its terms "
            "(accept them on its page, then run: hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{neither}, nor has the hub (a private one needs a token: hf auth login)") from None
    except HfHubHTTPError:  # some other refusal: from_pretrained will try again
        return
    except Exception as error:  # connection errors, whose classes differ between versions of huggingface_hub
        raise ValueError(
            f"{neither}; the hub cannot be reached ({type(error).__name__}: {error}): is the folder's name right?"
        ) from None
