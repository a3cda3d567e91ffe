"""Names of models: a folder, or a name on the hub. One that is neither is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# what from_pretrained is told of where a model is, and the hub's functions are told alike
_WHERE = ("revision", "cache_dir")
_FILES = ("config.json", "adapter_config.json")


def is_folder(argument: str, name: str) -> bool:
    """Whether a model's name is a folder, or else one that a hub may have.

    A name with more than one slash, or one that begins with a dot, a slash or a tilde, is a folder's.

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
    """Raises for a name under which there is nothing to load, before ``from_pretrained`` retries it for half a minute.

    One that is no folder is looked for in the hub's cache, and if it is not there asked for once at the hub.

    Args:
        argument: whose value the name is, for the message.
        name: as ``from_pretrained`` takes it.
        options: keyword arguments of ``from_pretrained``.

    Raises:
        ValueError: no such folder; no such model on the hub; a model that is not in the cache, while the hub is not
            reached or not to be asked.
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
    except ModuleNotFoundError:  # nothing can be loaded, which whoever loads it says
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
    except EntryNotFoundError:  # a model without this file, or with others
        return
    except GatedRepoError:  # a subclass of the next one
        raise ValueError(
            f"{argument} must be a model that can be loaded: the hub gives {name} only to those who accepted its terms "
            "(accept them on its page, then run: hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{neither}, nor has the hub (a private one needs a token: hf auth login)") from None
    except HfHubHTTPError:  # an answer that is no answer to the question, which from_pretrained asks again
        return
    except Exception as error:  # of a connection; its classes differ between versions of the hub's package
        raise ValueError(
            f"{neither}; the hub cannot be reached ({type(error).__name__}: {error}): is the folder's name right?"
        ) from None
