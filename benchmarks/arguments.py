"""What the scripts here have in common on their command lines: files that they write, and pages that they fill."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from fused_gopd.cli.durable import replace
from fused_gopd.cli.outputs import OutputError, new_file


def parse(parser: argparse.ArgumentParser, *outputs: str) -> argparse.Namespace:
    """The arguments; the files that the ``outputs`` among them name may be written, or it is an error now.

    Adds ``--overwrite``, without which no file is replaced.
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
    """Change the text of a page and not a byte of the rest; whether there was something to change."""
    with page.open(encoding="utf-8", newline="") as file:  # line ends as they are
        text = file.read()
    changed = change(text)
    if changed != text:
        replace(page, changed)
    return changed != text


def publish(name: str, text: str, pages: list[Path]) -> None:
    """Print a text and put it between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of the pages."""
    print(text)
    region = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)

    def filled(page: str) -> str:
        return region.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", page)

    for page in pages:
        edit(page, filled)
