"""One module for each framework, imported only on demand: ``from fused_gopd.integrations import transformers``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata


@contextmanager
def needs(integration: str, *packages: str, install: str) -> Iterator[None]:
    """Around the imports of an integration: where a package is missing or does not fit, the error says what to do.

    Args:
        integration: its ``__name__``.
        packages: names of those that it imports.
        install: the command that installs them.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            message = f"{integration} needs {package}, which is not installed: {install}"
            raise ModuleNotFoundError(message, name=package) from None
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        raise ImportError(
            f"{integration} does not fit the {package} that is installed, {version} ({error}): {install}",
            name=error.name,
            path=error.path,
        ) from error
