"""The report of a run of ``fused-gopd distill``, whose prompts are hostile, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from distill_runs import SENTENCES, invoke, make_model, make_tokenizer
from fused_gopd.html.colours import plain

SCRIPT = "<script>document.title='run'</script>"
WORDS = (SCRIPT, "[bold]markup[/]", "\x1b[31mred", "مرحبا", "😀", "<b>", "&amp;")


@pytest.fixture(scope="module")
def run(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer((*SENTENCES, *WORDS))
    student, math, code = (make_model(folder / f"model{i}", i, tokenizer) for i in range(3))
    prompts = [
        {"prompt": f"{sentence} {' '.join(WORDS)}", "domain": "<i>code" if i % 2 else "math"}
        for i, sentence in enumerate(SENTENCES)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    said = ["--student", student, "--teacher", f"math={math}", "--teacher", f"<i>code={code}", "--ref", "student"]
    said += ["--route-column", "domain", "--reward-scale", "1.25", "--estimator", "sampled", "--steps", "4"]
    said += ["--batch-size", "4", "--max-new-tokens", "12", "--learning-rate", "0.05", "--seed", "1"]
    invoke(*said, "--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "run"))
    return folder / "run"


@pytest.mark.parametrize("width", [360, 1200])
def test_the_report_of_a_run_shows_what_happened_and_runs_nothing(
    run: Path, visit: Callable[..., Any], width: int
) -> None:
    page = visit(run / "report.html", width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.title() != "run"
    assert page.evaluate("document.scripts.length") == 0
    assert page.locator("i").count() == 0
    # the curves are those of metrics.jsonl
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    legends = [text.strip() for text in page.locator(".legend-lines li").all_inner_texts()]
    first, last = rows[0], rows[-1]
    assert f"reward: {plain(first['reward'])} → {plain(last['reward'])}" in legends
    assert f"entropy: {plain(first['entropy'])} → {plain(last['entropy'])}" in legends
    by_route = page.locator("h2:has-text('Curves by route') + .panels figure").first
    assert by_route.locator("strong").inner_text() == "Reward, log q − log r"
    assert {text.partition(": ")[0] for text in by_route.locator("li").all_inner_texts()} == {"math", "<i>code"}
    # answers before and after, with the prompts as they are
    names = [text.partition(":")[0] for text in page.locator("h4").all_inner_texts()]
    assert "before" in names
    assert any(name.startswith("after") for name in names)
    assert page.locator(".prompt").count()
    for prompt in page.locator(".prompt").all():
        assert f"{SCRIPT} [bold]markup[/] ⟨U+001B⟩[31mred مرحبا 😀 <b> &amp;" in prompt.text_content()
    page.locator(".t").first.hover()
    shown = page.evaluate("getComputedStyle(document.querySelector('.t'), '::after').content").replace("\u00a0", " ")
    assert all(f"{sign} " in shown for sign in ("log p", "log q", "log r", "A", "log q − log r"))
    assert "sha256" in page.locator("dl").inner_text()
