"""The published prompts of two domains, with their route in a column of its own.

    python prepare.py G-OPD-Training-Data/math_and_code/train.parquet G-OPD-Training-Data/math_and_code/routed.parquet

The paper's code reads a prompt's teacher from ``extra_info.opd_teacher``; TRL and verl route by a column.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

ROUTE = "opd_teacher"


def main(source: str, target: str) -> None:
    table = pq.read_table(source)
    info = table.schema.field("extra_info").type if "extra_info" in table.column_names else None
    if info is None or info.get_field_index(ROUTE) < 0:
        raise SystemExit(f"{source} must have a column extra_info with a field {ROUTE}, got {table.schema}")
    route = pc.struct_field(table["extra_info"], ROUTE)
    if route.null_count:
        raise SystemExit(f"{source}: {route.null_count} of {len(table)} prompts have no extra_info.{ROUTE}")
    if Path(target).exists():
        raise SystemExit(f"{target} exists: choose another name")
    pq.write_table(table.append_column(ROUTE, route), target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python prepare.py SOURCE.parquet TARGET.parquet")
    main(*sys.argv[1:])
