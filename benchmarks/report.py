"""Tables from the rows of a run: ``python benchmarks/report.py RESULTS.json [PAGE.md ...] [--check]``.

Without pages it prints. In a page it fills what is between

    <!-- benchmark RESULTS.json JOB[,JOB...] -->   and   <!-- /benchmark -->

with the table of these jobs, for every such pair whose file name is that of the results. ``--check`` writes nothing
and fails where a page is not what it would write.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TITLES = {
    "logits-full": "`full`, three models, logits given",
    "logits-sampled": "`sampled`, three models, logits given",
    "hidden-full": "`full`, three models, from hidden states",
    "hidden-sampled": "`sampled`, three models, from hidden states",
    "hidden-full-bf16": "`full`, three models, from hidden states, bfloat16 heads",
}
NAMES = {
    "eager": "dense eager, all outputs",
    "eager-lean": "dense eager, loss alone",
    "compile": "dense `torch.compile`, loss alone",
    "fused-native": "**this package**, `native`",
    "fused-torch": "this package, `torch`",
    "fused-triton": "**this package**, `triton`",
}
_REGION = re.compile(r"(<!-- benchmark (\S+) (\S+) -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)


def _bytes(n: int | None) -> str:
    if n is None:
        return "–"
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def _error(x: float | None) -> str:
    return "–" if x is None else f"{x:.0e}"


def _ratio(x: float | None, of: float | None) -> str:
    return "–" if x is None or not of else f"{x / of:.2f}×"


def _shape(row: Row) -> str:
    hidden = row["hidden"]
    parts = [f"N={row['tokens']}", f"V={row['vocab']}", row["dtype"]]
    if hidden:
        parts.insert(1, f"H={hidden[0]}" if len(set(hidden)) == 1 else f"H={'/'.join(map(str, hidden))}")
    return ", ".join(parts)


def _fp32_twin(row: Row, rows: list[Row]) -> float | None:
    """The median of the same provider and job in float32."""
    job = row["job"].removesuffix("-bf16")
    if job == row["job"]:
        return None
    return next((r["ms_p50"] for r in rows if (r["job"], r["provider"]) == (job, row["provider"])), None)


def _other_library(row: Row) -> tuple[str, float] | None:
    """The best of ``torch.mm``'s chunk sizes, beside a floor that another library won."""
    if "," not in row.get("floor", ""):
        return None
    plain = {name: ms for name, ms in row["candidates_ms"].items() if "," not in name}
    best = min(plain, key=lambda name: plain[name])
    return best, plain[best]


def table(rows: list[Row], job: str) -> str:
    """One job as Markdown. The floor, which returns nothing, has no memory and no errors."""
    listed = [r for r in rows if r["job"] == job]
    hidden, bf16 = listed[0]["hidden"] is not None, job.endswith("-bf16")
    floor = "to float32" if bf16 else "to bare GEMMs" if hidden else "to moving bytes"
    errors = ["loss", "dhidden", "dweight"] if hidden else ["loss", "dlogits"]
    head = ["", "ms, median", "p20–p80", floor, "beyond inputs and gradients", *(f"error {e}" for e in errors)]
    lines = [f"{TITLES.get(job, job)}: {_shape(listed[0])}", "", "| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * (len(head) - 1))
    for row in listed:
        name = NAMES.get(row["provider"], row["provider"])
        if "floor" in row:
            name += f" ({row['floor']})"
        base = _fp32_twin(row, rows) if bf16 else row.get("gemm_ms_p50" if hidden else "bytes_ms_p50")
        slower = _other_library(row)
        cells = [name, f"{row['ms_p50']:.0f}", f"{row['ms_p20']:.0f}–{row['ms_p80']:.0f}", _ratio(row["ms_p50"], base)]
        cells += [_bytes(row.get("peak_extra_bytes")), *(_error(row.get(f"error_{e}")) for e in errors)]
        lines.append("| " + " | ".join(cells) + " |")
        if slower is not None:
            chunk, ms = slower
            cells = [f"the same with `torch.mm` ({chunk})", f"{ms:.0f}", "–", _ratio(ms, base)]
            lines.append("| " + " | ".join(cells + ["–"] * (1 + len(errors))) + " |")
    return "\n".join(lines) + "\n"


def markdown(result: dict[str, Any], jobs: list[str] | None = None) -> str:
    """The tables of some jobs, all by default, and what they were measured on."""
    rows = result["rows"]
    found = list(dict.fromkeys(r["job"] for r in rows))
    missing = sorted(set(jobs or []) - set(found))
    if missing:
        raise SystemExit(f"no rows for {', '.join(missing)}; there are {', '.join(found)}")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    kept = "; freed memory kept by the allocator" if result.get("allocator") else ""
    commit, _, dirty = (result["commit"] or "unknown").partition("-")
    commit = commit[:12] + (", with changes" if dirty else "")
    where = f"{result['device']}{kept}; {versions}; commit {commit}, {result['date'][:10]}."
    return "\n".join([table(rows, job) for job in jobs or found]) + "\n" + where + "\n"


def fill(page: str, name: str, result: dict[str, Any]) -> str:
    """A page with the regions of this results file filled."""

    def region(match: re.Match[str]) -> str:
        opening, source, jobs, _, closing = match.groups()
        if source != name:
            return match.group()
        return f"{opening}\n{markdown(result, jobs.split(','))}\n{closing}"

    return _REGION.sub(region, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    result = json.loads(args.results.read_text())
    if not args.pages:
        print(markdown(result))
    stale = False
    for path in args.pages:
        page = path.read_text()
        filled = fill(page, args.results.name, result)
        if filled != page:
            stale = True
            if args.check:
                print(f"{path} is not what {args.results.name} says: run benchmarks/report.py on it")
            else:
                path.write_text(filled)
    return int(args.check and stale)


if __name__ == "__main__":
    raise SystemExit(main())
