"""Writes the generated parts of the documentation anew: read what changed, and the sentences around it.

python tests/helpers/write_pages.py [--only planning]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

WRITERS = {
    "planning": "test_planning",
    "paper-settings": "test_scale_configs",
    "guide": "test_guide",
    "models": "model_families",
    "pictures": "test_pictures",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=WRITERS)
    only = parser.parse_args().only
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(folder) for folder in [root, *(root / "tests").iterdir()] if folder.is_dir()]
    for name in [only] if only else WRITERS:
        importlib.import_module(WRITERS[name]).write()


if __name__ == "__main__":
    main()
