"""docs/planning.md says what the planner says: its commands are run, its table is made from the same figures.

``python tests/helpers/write_pages.py`` writes them into the page.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import snapshots
from fused_gopd.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})

# a fence whose command is a plan, perhaps over several lines that end in a backslash, and whatever stands below it
_FENCE = re.compile(r"(```console\n\$ (fused-gopd plan(?:[^\n]*\\\n)*[^\n]*)\n).*?(```\n)", re.DOTALL)

STUDENT = ["--model", "llama-3-70b", "--teacher-model", "llama-3.1-405b", "--tokens", "262144", "--gpu", "h100"]
WAYS: dict[str, list[str]] = {
    "`full`, n_v = 8": ["--tp", "8", "--dp", "4", "--cp", "2"],
    "`full`, n_v = 16": ["--tp", "16", "--dp", "2", "--cp", "2"],
    "`full`, n_v = 1": ["--dp", "32", "--cp", "2"],
    "`full`, λ = 1 (no reference), n_v = 8": ["--tp", "8", "--dp", "4", "--cp", "2", "--reward-scale", "1"],
    "`jsd`, n_v = 8": ["--tp", "8", "--dp", "4", "--cp", "2", "--divergence", "jsd"],
    "`sampled`, n_v = 8": ["--tp", "8", "--dp", "4", "--cp", "2", "--estimator", "sampled"],
    "`topk`, 64 tokens, n_v = 8": ["--tp", "8", "--dp", "4", "--cp", "2", "--estimator", "topk", "--k", "64"],
}


def planned(arguments: list[str]) -> str:
    result = runner.invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def with_outputs(page: str) -> str:
    """The page with the output of each of its plans below the command."""

    def one(match: re.Match[str]) -> str:
        _, _, *arguments = shlex.split(match[2].replace("\\\n", " "))
        lines = (line.rstrip() for line in planned(arguments).splitlines())
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return _FENCE.sub(one, page)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def row(name: str, arguments: list[str]) -> list[str]:
    data: dict[str, Any] = json.loads(planned([*STUDENT, *arguments, "--json"]))
    heads = sum(c["received"] for c in data["wire"] if "head" in c["what"] or c["what"] == "number of tokens")
    together = sum(c["received"] for c in data["wire"])
    return [
        name,
        gib(data["fused"]["peak"]),
        f"{data['fused']['chunk_size']:,}",
        f"{data['gemm_ms']:.1f}",
        gib(together - heads),
        gib(heads),
        f"{together / data['gemm_ms'] / 1e6:.0f}",
    ]


def with_table(page: str) -> str:
    head = ["", "fused peak", "C", "GEMMs, ms", "wire over n_v", "wire of the heads", "to hide it, GB/s"]
    body = snapshots.markdown(head, [row(name, arguments) for name, arguments in WAYS.items()], numbers=True)
    return snapshots.fill(page, "planning", body)


def test_the_page_has_the_output_of_its_commands() -> None:
    page = PAGE.read_text()
    assert len(_FENCE.findall(page)) == 2
    assert with_outputs(page) == page, "run python tests/helpers/write_pages.py and read what changed"


def test_the_page_has_the_figures_of_the_planner() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page, "run python tests/helpers/write_pages.py and read what changed"


def test_a_command_over_several_lines_is_one_command() -> None:
    page = "```console\n$ fused-gopd plan --vocab 50 \\\n    --hidden 8 --json\nold\n```\n"
    assert json.loads(with_outputs(page).split("--json\n")[1].removesuffix("```\n"))["job"]["vocab"] == 50


def test_what_the_page_concludes_is_so() -> None:
    """The sentences below the second command, as inequalities."""
    data = json.loads(planned([*STUDENT, *WAYS["`full`, n_v = 8"], "--json"]))
    wire = {c["what"]: c["received"] for c in data["wire"]}
    assert wire["gradient of hidden"] > 0.55 * sum(wire.values())
    assert wire["gradient of hidden"] > 100 * wire["statistics"]
    alone = json.loads(planned([*STUDENT, "--json"]))
    assert alone["fused"]["peak"] + sum(alone["inputs"].values()) < 80 << 30 < alone["dense"]["peak"]
    assert alone["gemm_ms"] > 1000
    heads = {
        c["what"]: c["received"] for c in json.loads(planned([*STUDENT, *WAYS["`full`, n_v = 1"], "--json"]))["wire"]
    }
    assert heads["head of the student"] > 8 * wire["head of the student"]


def write() -> None:
    PAGE.write_text(with_table(with_outputs(PAGE.read_text())))
