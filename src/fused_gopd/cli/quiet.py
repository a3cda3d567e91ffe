"""How commands keep transformers and TRL quiet, and off the network where all models are local."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def before_import(models: Iterable[str] = ()) -> None:
    """Called before transformers is imported, with the folders and hub names of the models that will be loaded."""
    models = list(models)
    if models and all(name == "smollm2" or Path(name).exists() for name in models):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # each warns of the other's deprecated names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")


def after_import() -> None:
    """Show no log and no progress bar of transformers: a command shows its own."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
