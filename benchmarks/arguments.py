"""Shared by the scripts' command lines: output files, and pages whose tables they fill in."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from fused_gopd.cli.durable import replace
from fused_gopd.cli.outputs import OutputError, new_file


def parse(parser: argparse.ArgumentParser, *outputs: str) -> argparse.Namespace:
    """Parse the arguments. Exits if a file that one of ``outputs`` names cannot be written.

    Adds ``--overwrite``, without which existing files are refused.
    """
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    args = parser.parse_args()
    for name in outputs:
        path = getattr(args, name)
        if path is not None:
            try:
                new_file(path, args.overwrite)
            except OutputError as error:
                parser.error(str(error))
    return args


def edit(page: Path, change: Callable[[str], str]) -> bool:
    """Replace the text of a page by ``change(text)``. Returns whether it changed."""
    with page.open(encoding="utf-8", newline="") as file:  # newline="" keeps the line ends
        text = file.read()
    changed = change(text)
    if changed != text:
        replace(page, changed)
    return changed != text


def publish(name: str, text: str, pages: list[Path]) -> None:
    """Print a text and write it between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of the pages."""
    print(text)
    region = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)

    def filled(page: str) -> str:
        return region.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", page)

    for page in pages:
        edit(page, filled)
