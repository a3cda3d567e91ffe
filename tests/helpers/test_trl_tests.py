"""The comparison of two runs of TRL's own tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("trl_tests.py")
FAILED = '<failure message="ValueError: vocab_size&#10;  is 320"/>'


def compared(folder: Path, own: dict[str, str], fused: dict[str, str]) -> tuple[int, dict[str, dict[str, str]]]:
    for name, cases in (("own", own), ("fused", fused)):
        written = "".join(f'<testcase classname="tests.t.T" name="{x}">{kind}</testcase>' for x, kind in cases.items())
        (folder / f"{name}.xml").write_text(f"<testsuites><testsuite>{written}</testsuite></testsuites>")
    files = [str(folder / name) for name in ("own.xml", "fused.xml", "tests.json")]
    status = subprocess.run([sys.executable, str(SCRIPT), *files], check=False, capture_output=True).returncode
    return status, json.loads((folder / "tests.json").read_text())


@pytest.mark.parametrize(
    ("own", "fused", "status"),
    [
        ({"a": "", "b": FAILED}, {"a": "", "b": FAILED}, 0),
        ({"a": "", "b": ""}, {"a": "", "b": FAILED}, 1),
        ({"a": "", "b": FAILED}, {"a": "", "b": ""}, 1),
        ({"a": "", "b": ""}, {"a": ""}, 1),
        ({"a": ""}, {"a": "", "b": ""}, 1),
        ({"a": ""}, {"a": "<skipped/>"}, 1),
        ({}, {}, 1),
        ({"a": FAILED}, {"a": FAILED}, 1),
    ],
)
def test_only_two_runs_with_the_same_outcomes_are_equal(
    tmp_path: Path, own: dict[str, str], fused: dict[str, str], status: int
) -> None:
    assert compared(tmp_path, own, fused)[0] == status


def test_each_test_has_both_outcomes_and_the_reason_in_a_line(tmp_path: Path) -> None:
    _, tests = compared(tmp_path, {"a": "", "b": FAILED}, {"a": FAILED})
    assert tests == {
        "T::a": {"own": "passed", "fused": "failure", "fused reason": "ValueError: vocab_size is 320"},
        "T::b": {"own": "failure", "own reason": "ValueError: vocab_size is 320", "fused": "absent"},
    }


def test_the_table_has_what_the_runs_gave() -> None:
    root = SCRIPT.parents[2]
    page = (root / "docs/integrations/trl.md").read_text(encoding="utf-8")
    for run in json.loads((root / "benchmarks/results/trl-tests.json").read_text(encoding="utf-8"))["runs"]:
        outcomes = [(test["own"], test["fused"]) for test in run["tests"].values()]
        passed = [sum(x == "passed" for x in side) for side in zip(*outcomes, strict=True)]
        figures = " | ".join(map(str, [len(outcomes), *passed, sum(a != b for a, b in outcomes)]))
        commit = run["commit"][:7]
        assert re.search(rf"^\| .*\b{commit}\b.* \| {re.escape(figures)} \|", page, re.MULTILINE), commit
