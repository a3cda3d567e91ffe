"""Files that a public repository has: workflows, hooks, issue forms, the citation. They name what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")  # of transformers

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}


def _jobs() -> list[tuple[str, dict[str, Any]]]:
    return [(f"{file}: {name}", job) for file, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()]


def test_workflows_call_targets_and_set_variables_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))
    called = []
    for where, job in _jobs():
        for step in job["steps"]:
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert target in targets, f"{where} calls make {target}"
                assert set(step.get("env", {})) <= variables, f"{where} sets {set(step['env']) - variables}"
                called.append(target)
    assert {"lint", "test", "test-kernels", "test-versions", "docs", "test-verl", "test-server"} <= set(called)


def test_every_triton_that_has_a_table_is_in_the_matrix() -> None:
    tables = {path.stem.rpartition("-")[2] for path in (ROOT / "tests/data").glob("triton_resources-*.json")}
    matrix = set(WORKFLOWS["ci.yml"]["jobs"]["triton"]["strategy"]["matrix"]["triton"])
    assert tables == matrix


def test_a_job_for_a_gpu_waits_for_no_runner_that_is_not_there() -> None:
    job = WORKFLOWS["ci.yml"]["jobs"]["gpu"]
    assert job["if"] == "vars.GPU_RUNNER != ''"
    assert job["runs-on"] == "${{ vars.GPU_RUNNER }}"


def test_hooks_are_the_tools_of_make_lint() -> None:
    """With their versions: those of constraints.txt, which made the environment."""
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    wanted = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint))
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert {hook["entry"].split()[0] for hook in hooks} == {f".venv/bin/{tool}" for tool in wanted}
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{tool}==" in pinned for tool in wanted)


def test_forms_for_bugs_ask_for_the_doctor() -> None:
    for name in ("bug", "slow"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        asked = {part["attributes"]["label"]: part for part in form["body"] if "label" in part["attributes"]}
        assert asked["fused-gopd doctor --json"]["validations"] == {"required": True}


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert citation["version"] == version
    assert "arXiv:2602.12125" in json.dumps(citation["references"])
