"""A real browser, and pages that are opened in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fused_gopd.html import write_report


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium; a test that needs it is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'fused-gopd[test-browser]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # Chromium has no sandbox for root
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file in a window of its own; at the end nothing may have asked for anything but these files."""
    contexts, requests, visited = [], [], set()

    def open_file(path: Path, width: int = 1200, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # a test machine may be busy
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: pytest.fail(f"a dialog: {dialog.message}"))
        visited.add(path.as_uri())
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert {url for url in requests if not url.startswith("data:")} == visited


@pytest.fixture
def show(visit: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Writes a report and opens it."""

    def open_report(report: dict[str, Any], width: int = 1200, **options: Any) -> Any:
        path = tmp_path / "report.html"
        write_report(path, **report)
        return visit(path, width, **options)

    return open_report
