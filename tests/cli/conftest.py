"""Fixtures of the tests that run ``fused-gopd distill``."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models and prompts in a folder, a ``distill_runs.Files``."""
    from distill_runs import Files

    return Files(tmp_path_factory.mktemp("files"))
