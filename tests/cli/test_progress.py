"""The progress of a command keeps count, bar and times on a narrow terminal, and lines of a log stay whole."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, Group

pytest.importorskip("trl")

from fused_gopd.cli.distill.figures import Display
from fused_gopd.cli.progress import StepProgress
from fused_gopd.integrations.trl.phases import Phase

ROW = {
    "step": 137,
    "reward": -0.1234,
    "kl_target": 0.567,
    "entropy": 1.234,
    "length": 199.5,
    "seconds": 12.3,
    "tokens_per_second": 140.2,
}
SAMPLED = {"kl_teacher_k3" if name == "kl_target" else name: value for name, value in ROW.items()}


def frame(width: int, row: dict[str, float]) -> list[str]:
    """The lines of the last frame of a training's display."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    display = Display(console, 2000)
    with display.running(136):
        display.step(row)
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-2:]


@pytest.mark.parametrize(("row", "kl"), [(ROW, "KL to target 0.567"), (SAMPLED, "KL to q (k3) 0.567")])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_step_bar_and_times_are_on_one_line(width: int, row: dict[str, float], kl: str) -> None:
    first, second = frame(width, row)
    assert re.fullmatch(r"step +137/2000 [━╸╺ ]{6,40} 0:00:0\d (-:--:--|\d:\d\d:\d\d) *", first), first
    assert len(first) <= width
    assert second.rstrip() == f"reward -0.123  {kl}  entropy 1.23  length 200"
    assert len(second) <= width


@pytest.mark.parametrize("width", [60, 80])
def test_a_phase_has_a_bar_of_its_own_with_tokens_per_second(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    display = Display(console, 2000)
    display.step(ROW)
    phases = Phase("sample", "", 117, 256, 140.4), Phase("score", "", 0, 1, 2204.0), Phase("step", "", 1, 4, None)
    shown = []
    for phase in phases:
        display.phase(phase)
        lines = console.render_lines(Group(*display._progress.get_renderables()))
        shown.append(["".join(segment.text for segment in line) for line in lines])
    assert all(len(lines) == 3 and all(len(line) <= width for line in lines) for lines in shown)
    assert all(re.match(r"step +137/2000 [━╸╺ ]{6,40} ", lines[0]) for lines in shown)
    assert re.fullmatch(r"sample +117/256 +[━╸╺ ]{6,40} 0:00:00 140 tokens/s *", shown[0][1])
    assert re.fullmatch(r"score +[━╸╺ ]{6,40} 0:00:00 2.2e\+03 tokens/s *", shown[1][1])
    assert re.fullmatch(r"step +1/4 +[━╸╺ ]{6,40} 0:00:00 *", shown[2][1])


def test_a_line_of_a_log_is_not_broken() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=60)
    display = Display(console, 2000)
    with display.loading("the student"), display.running(136):
        display.phase(Phase("load", "teacher", 0, 0, None))
        display.phase(Phase("sample", "", 3, 256, None))
        display.step(ROW)
    assert isinstance(console.file, io.StringIO)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("step 137/2000  reward -0.123")
    assert line.endswith("12.3 s, 140 tokens/s")


def test_a_long_name_of_a_case_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    with StepProgress(console, "case") as progress:
        task = progress.add_task("starting", total=12)
        progress.update(task, advance=1, description="hidden-full-bf16-" + "x" * 90)
        shown = console.render_lines(progress.get_renderable())
    lines = ["".join(segment.text for segment in line) for line in shown]
    assert len(lines) == 2
    assert re.match(r"case +1/12 [━╸╺ ]{6,} ", lines[0])
    assert lines[1].rstrip().endswith("…")
