"""One module for each framework, imported only on demand: ``from fused_gopd.integrations import transformers``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata


@contextmanager
def needs(integration: str, *packages: str, install: Callable[[], str]) -> Iterator[None]:
    """Context of an integration's imports: the error for a missing or incompatible package says how to install it.

    Args:
        integration: the module's ``__name__``.
        packages: the packages that it imports.
        install: makes the command that installs them, which takes a look at how this package was installed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            message = f"{integration} needs {package}, which is not installed: {install()}"
            raise ModuleNotFoundError(message, name=package) from None
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        raise ImportError(
            f"{integration} does not fit the {package} that is installed, {version} ({error}): {install()}",
            name=error.name,
            path=error.path,
        ) from error
