"""What a file may contain shows as text: on the terminal, in metrics.jsonl, in TensorBoard and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from distill_runs import Files, invoke, metrics_of

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "markup": "[bold]markup[/bold]",
    "ansi": "\x1b[2J\x1b[31mred\x1b[0m\x07",
    "bidi": "\u202emorf\u202c",
    "arabic": "\u0645\u0631\u062d\u0628\u0627",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "nul": "a\x00b",
}
SHOWN = {
    **HOSTILE,
    "ansi": "⟨U+001B⟩[2J⟨U+001B⟩[31mred⟨U+001B⟩[0m⟨U+0007⟩",
    "bidi": "⟨U+202E⟩morf⟨U+202C⟩",
    "nul": "a⟨U+0000⟩b",
}


def scalars(run: Path) -> dict[str, list[float]]:
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", ["script", "markup", "ansi", "bidi"])
def test_a_route_and_a_prompt_are_text_everywhere(files: Files, tmp_path: Path, name: str) -> None:
    route, prompt = f"r {HOSTILE[name]}", f"why {HOSTILE[name]}"
    rows = [{"prompt": f"{prompt} {n}", "domain": route if n % 2 else "math"} for n in range(4)]
    file = files.write("hostile.jsonl", rows)
    arguments = ["--student", files.student, "--teacher", f"math={files.math}", "--teacher", f"{route}={files.code}"]
    arguments += ["--teacher-template", f"{HOSTILE[name]} {{prompt}}"]  # said at the start
    arguments += ["--route-column", "domain", "--steps", "2", "--batch-size", "4", "--max-new-tokens", "4"]
    output = invoke(*arguments, "--prompts", file, "--output", tmp_path / "run")
    assert "\x1b" not in output
    assert "\u202e" not in output
    assert SHOWN[name] in output
    key = f"kl_target/{route}"
    values = [row[key] for row in metrics_of(tmp_path / "run")]
    assert len(values) == 2
    assert scalars(tmp_path / "run")[f"train/gopd/{key}"] == pytest.approx(values, rel=1e-6)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_tensorboard_shows_texts_without_their_tags() -> None:
    """What its text tab makes of a text: HTML that is cleaned."""
    plugin: Any = pytest.importorskip("tensorboard.plugin_util")
    for text in HOSTILE.values():
        assert "<script" not in plugin.markdown_to_safe_html(text)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", ["distill", "inspect"])
def test_an_error_quotes_a_file_as_text(files: Files, tmp_path: Path, name: str, command: str) -> None:
    from distill_runs import runner
    from fused_gopd.cli import app

    file = files.write("hostile.jsonl", [{HOSTILE[name]: "x"}])
    given = ["--student", files.student, "--teacher", files.math, "--prompts", file, "--output", str(tmp_path / "x")]
    result = runner.invoke(app, [command, *given])
    assert result.exit_code == 2, result.output
    assert f"only {SHOWN[name]}" in result.output
    assert "\x1b" not in result.output
    assert "\u202e" not in result.output
