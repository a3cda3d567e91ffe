"""Committed tables of what the compilers make of the kernels, compared with what they make of them today.

A table is a JSON file in ``tests/data``: the compiler that made it, and rows of quantities, a line for a row. Where
the compiler is the same, a quantity that got worse comes from a change of the source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"

Row = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Row]]  # by kernel, then by what it was compiled for
Rule = Callable[[Any, Any], bool]  # (committed, today): today's is worse


def more(share: float = 0.0) -> Rule:
    """Worse is a larger number, by more than a share of the committed one."""
    return lambda old, new: new > old * (1 + share)


def more_granules(granule: int) -> Rule:
    """Worse is a number that takes more granules than before."""
    return lambda old, new: math.ceil(new / granule) > math.ceil(old / granule)


def earlier_in(order: tuple[str, ...]) -> Rule:
    """Worse is a name that stands earlier in an order."""
    return lambda old, new: order.index(new) < order.index(old)


def differs(old: Any, new: Any) -> bool:
    return bool(old != new)


def changes(where: str, old: Row, new: Row, rules: Mapping[str, Rule]) -> tuple[list[str], list[str]]:
    """The quantities of one row that are worse than committed, and those that are better, as lines to print."""
    worse, better = [], []
    for quantity, rule in rules.items():
        line = f"{where}: {quantity} {old[quantity]} -> {new[quantity]}"
        if rule(old[quantity], new[quantity]):
            worse.append(line)
        elif rule(new[quantity], old[quantity]):
            better.append(line)
    return worse, better


def unmatched(committed: Rows, today: Mapping[str, Any]) -> list[str]:
    """Rows that one of the two lacks, as lines to print. The values of the second are mappings or lists of names."""
    old = {(kernel, target) for kernel, row in committed.items() for target in row}
    new = {(kernel, target) for kernel, row in today.items() for target in row}
    return [f"{k}, {t}: not in the committed table" for k, t in sorted(new - old)] + [
        f"{k}, {t}: in the committed table alone" for k, t in sorted(old - new)
    ]


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((DATA / name).read_text()))


def save(name: str, compiler: str, rows: Rows) -> None:
    kernels = []
    for kernel, row in rows.items():
        lines = [f"      {json.dumps(target)}: {json.dumps(quantities)}" for target, quantities in row.items()]
        kernels.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n    }")
    DATA.mkdir(exist_ok=True)
    head = f'{{\n  "compiler": {json.dumps(compiler)},\n  "rows": {{\n'
    (DATA / name).write_text(head + ",\n".join(kernels) + "\n  }\n}\n")


def fill(page: str, name: str, body: str) -> str:
    """A page with what is between ``<!-- table NAME -->`` and ``<!-- /table -->`` replaced."""
    pattern = rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- /table -->)"
    filled, found = re.subn(pattern, lambda match: f"{match[1]}\n{body}\n{match[2]}", page, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"the page must have one region for {name}, it has {found}")
    return filled


def markdown(head: list[str], rows: list[list[str]], numbers: bool) -> str:
    """A Markdown table, with its columns but the first to the right where they are numbers."""
    rule = "|---" + ("|---:" if numbers else "|---") * (len(head) - 1) + "|\n"
    top, *below = ("| " + " | ".join(line) + " |\n" for line in (head, *rows))
    return top + rule + "".join(below)
