"""Fixtures of the tests that run ``fused-gopd distill``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models and prompts in a folder, a ``distill_runs.Files``."""
    from distill_runs import Files

    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def no_page() -> Iterator[None]:
    """Runs write one line in place of their HTML page, which takes half a second."""
    from fused_gopd.integrations.trl import report

    def write(path: Path, *, title: str, **_: Any) -> None:
        path.write_text(f"<html>{title}", encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", write)
        yield
