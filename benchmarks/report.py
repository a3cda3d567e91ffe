"""Tables from the rows of a run: ``python -m benchmarks.report RESULTS.json [PAGE.md ...] [--check]
[--plot FILE]``.

Without pages it prints the tables. In a page it replaces the text between

    <!-- benchmark RESULTS.json JOB[,JOB...] -->   and   <!-- /benchmark -->

by the tables of these jobs, for every such pair with the file name of the results, and the text between

    <!-- compact RESULTS.json,OTHER.json JOB[,JOB...] -->   and   <!-- /compact -->

by one table of milliseconds and ratios, a column for each hidden size, of files in one folder. ``--check`` writes
nothing, and fails if a page would change. ``--plot`` plots time against memory.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from fused_gopd import pictures

from .arguments import edit, parse

Row = dict[str, Any]

TITLES = {
    "logprobs": "log-probs of given tokens, one model, forward alone",
    "nll": "mean negative log-likelihood, one model",
    "policy": "clipped policy gradient, one model: scores of teacher and reference given",
    "reverse-kl": "KL(student ‖ teacher), two models: λ = 1, no reference",
    "forward-kl": "KL(teacher ‖ student), two models: λ = 1, no reference",
    "jsd": "Jensen–Shannon divergence, two models: λ = 1, no reference",
    "kl-ce": "KL(teacher ‖ student) and cross entropy of the tokens, two models",
    "logits-full": "`full`, three models, logits given",
    "logits-sampled": "`sampled`, three models, logits given",
    "hidden-full": "`full`, three models, from hidden states",
    "hidden-sampled": "`sampled`, three models, from hidden states",
    "hidden-full-bf16": "`full`, three models, from hidden states, bfloat16 heads",
}
NAMES = {
    "eager": "dense eager, all outputs",
    "eager-lean": "dense eager, minimal loss",
    "compile": "dense `torch.compile`, minimal loss",
    "compile-chunked": "chunked `torch.compile`, minimal loss",
    "fused-native": "**this package**, `native`",
    "fused-torch": "this package, `torch`",
    "fused-triton": "**this package**, `triton`",
    "fused-triton-low-chunks": "**this package**, `triton`, `chunk_dtype` of the heads",
    "fused-native-one-pass": "**this package**, `native`, `gopd_loss` with advantage 1",
    "fused-torch-one-pass": "this package, `torch`, `gopd_loss` with advantage 1",
    "fused-triton-one-pass": "**this package**, `triton`, `gopd_loss` with advantage 1",
    "fused-triton-one-pass-low-chunks": "**this package**, `triton`, `gopd_loss` with advantage 1, `chunk_dtype`",
    "fused-triton-stored": "**this package**, `triton`, `store_exponentials`",
    "fused-triton-one-pass-stored": "**this package**, `triton`, `gopd_loss` with advantage 1, `store_exponentials`",
    "torch-lce": "PyTorch `F.linear_cross_entropy`, chunks as long as this package's",
    "torch-lce-auto": "PyTorch `F.linear_cross_entropy`, chunks of its own choice",
    "cce": "cut-cross-entropy, skipping small gradients",
    "cce-exact": "cut-cross-entropy, skipping nothing",
    "cce-compile": "cut-cross-entropy, `torch_compile`",
    "liger-flce": "Liger fused linear cross entropy",
    "liger-flce-long": "Liger fused linear cross entropy, 16 times its default chunk",
    "liger-flce-sm90": "Liger fused linear cross entropy, CuTe DSL for SM90",
    "liger-scaled-ce": "Liger fused scaled cross entropy, CuTe DSL for SM90",
    "quack": "quack `chunked_linear_cross_entropy`",
    "quack-lse": "quack `lse_target_epi`",
    "orda": "orda `distillation_loss`",
    "unsloth-jsd": "unsloth `distillation_chunked_jsd`",
    "liger-grpo": "Liger chunked GRPO",
    "liger-jsd": "Liger fused linear JSD",
    "liger-chunked-jsd": "Liger chunked JSD",
    "trl-logprobs": "TRL `ChunkedLogProbFunction`",
    "trl-divergence": "TRL `ChunkedDivergenceFunction`",
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
    hidden = [h for h in row["hidden"] or [] if h is not None]
    parts = [f"N={row['tokens']}", f"V={row['vocab']}", row["dtype"]]
    if hidden:
        parts.insert(1, f"H={hidden[0]}" if len(set(hidden)) == 1 else f"H={'/'.join(map(str, hidden))}")
    if row.get("masked"):
        parts.append(f"{100 * row['masked']:.0f} % masked")
    if row.get("frozen"):
        parts.append("frozen head")
    if row.get("peaked"):
        parts.append("peaked logits")
    return ", ".join(parts)


def _fp32_twin(row: Row, rows: list[Row]) -> float | None:
    """Median time of the same provider and job in float32."""
    job = row["job"].removesuffix("-bf16")
    if job == row["job"]:
        return None
    return next((r["ms_p50"] for r in rows if (r["job"], r["provider"]) == (job, row["provider"])), None)


def _best(tried: list[dict[str, Any]], library: str | None = None) -> dict[tuple[str, int | None], dict[str, Any]]:
    """The fastest candidate of each kind of product, of all libraries or of one."""
    best: dict[tuple[str, int | None], dict[str, Any]] = {}
    for one in tried:
        group = one["kind"], one["hidden"]
        if library in (None, one["library"]) and (group not in best or one["ms_p50"] < best[group]["ms_p50"]):
            best[group] = one
    return best


def _other_library(row: Row) -> tuple[str, float] | None:
    """Chunk size and time of ``torch.mm`` at its fastest, if another library is the floor."""
    if "candidates" in row:  # one time for each kind of product
        if not any(one["library"] for one in _best(row["candidates"]).values()):
            return None
        plain = _best(row["candidates"], "").values()
        sizes = list(dict.fromkeys(str(one["way"]) for one in plain))
        return f"C={'/'.join(sizes)}", sum(one["ms_p50"] for one in plain)
    if "," not in row.get("floor", ""):
        return None
    times = {name: ms for name, ms in row["candidates_ms"].items() if "," not in name}
    best = min(times, key=lambda name: times[name])
    return best, times[best]


class Table(NamedTuple):
    """The table of one workload: title, column headings, and rows of cells in Markdown."""

    title: str
    head: list[str]
    rows: list[list[str]]


def groups(result: dict[str, Any], jobs: list[str] | None = None) -> list[list[Row]]:
    """Groups of rows of one job and shape; skipped cases are last in their group."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in [*result["rows"], *result.get("skipped", [])]:
        if jobs is None or row["job"] in jobs:
            found.setdefault((row["job"], _shape(row)), []).append(row)
    order = jobs or list(dict.fromkeys(job for job, _ in found))
    return [rows for job in order for (name, _), rows in found.items() if name == job]


def base_of(row: Row, rows: list[Row]) -> float | None:
    """The reference time of a row: its floor, or for the bfloat16 job of the log the time in float32."""
    if row["job"].endswith("-bf16"):
        return _fp32_twin(row, rows)
    return row.get("gemm_ms_p50" if row["hidden"] is not None else "bytes_ms_p50")


def _milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:#.3g}"


def table(listed: list[Row], rows: list[Row]) -> Table:
    """Cells of memory and errors; empty for the floor, which returns nothing."""
    hidden, bf16 = listed[0]["hidden"] is not None, listed[0]["job"].endswith("-bf16")
    errors = ["loss", "dhidden", "dweight"] if hidden else ["loss", "dlogits"]
    base_name = "float32" if bf16 else "bare GEMMs" if hidden else "moving bytes"
    head = ["", "ms, median", "p20–p80", f"{base_name}, ms", "ratio", "extra memory", *(f"error {e}" for e in errors)]
    cells = []
    for row in listed:
        name = NAMES.get(row["provider"], row["provider"])
        if "reason" in row:
            cells.append([f"{name}: not run, {row['reason']}", *["–"] * (len(head) - 1)])
            continue
        if "floor" in row:
            name += f" ({row['floor']})"
        base, slower = base_of(row, rows), _other_library(row)
        times = [_milliseconds(row["ms_p50"]), f"{_milliseconds(row['ms_p20'])}–{_milliseconds(row['ms_p80'])}"]
        beside = "–" if base is None else _milliseconds(base)
        cells.append([name, *times, beside, _ratio(row["ms_p50"], base), _bytes(row.get("peak_extra_bytes"))])
        cells[-1] += [_error(row.get(f"error_{e}")) for e in errors]
        if slower is not None:
            chunk, ms = slower
            cells.append([f"the same with `torch.mm` ({chunk})", _milliseconds(ms), "–", beside, _ratio(ms, base), "–"])
            cells[-1] += ["–"] * len(errors)
    return Table(f"{TITLES.get(listed[0]['job'], listed[0]['job'])}: {_shape(listed[0])}", head, cells)


def tables(result: dict[str, Any], jobs: list[str] | None = None) -> list[Table]:
    """Tables of some jobs, by default of all."""
    found = {row["job"] for row in [*result["rows"], *result.get("skipped", [])]}
    missing = sorted(set(jobs or []) - found)
    if missing:
        raise SystemExit(f"no rows for {', '.join(missing)}; there are {', '.join(sorted(found))}")
    return [table(listed, result["rows"]) for listed in groups(result, jobs)]


def provenance(result: dict[str, Any]) -> str:
    """Machine, versions, commit and date of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    kept = "; freed memory kept by the allocator" if result.get("allocator") else ""
    driver = f", driver {result['driver']}" if result.get("driver") else ""
    commit, _, dirty = (result["commit"] or "unknown").partition("-")
    commit = commit[:12] + (", with changes" if dirty else "")
    return f"{result['device']}{driver}{kept}; {versions}; commit {commit}, {result['date'][:10]}."


def markdown(result: dict[str, Any], jobs: list[str] | None = None) -> str:
    """Tables of some jobs, by default of all, and their machine, versions, commit and date."""
    parts = []
    for title, head, rows in tables(result, jobs):
        lines = [title, "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        parts.append("\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows]) + "\n")
    return "\n".join(parts) + "\n" + provenance(result) + "\n"


def fill(page: str, name: str, result: dict[str, Any]) -> str:
    """The page with the regions of this results file replaced."""

    def region(match: re.Match[str]) -> str:
        opening, source, jobs, _, closing = match.groups()
        if source != name:
            return match.group()
        return f"{opening}\n{markdown(result, jobs.split(','))}\n{closing}"

    return _REGION.sub(region, page)


# Not in compact tables: slower than compiled dense code in every job
_LEFT_OUT = ("eager", "eager-lean", "compile-chunked")
_SHORT = {
    "logprobs": "`token_logprobs`",
    "nll": "negative log-likelihood",
    "policy": "clipped policy gradient",
    "hidden-sampled": "`sampled`",
    "hidden-full": "`full`",
}


def compact(results: list[dict[str, Any]], jobs: list[str]) -> str:
    """Median milliseconds and ratios to the floor of the same rounds, a column for each hidden size."""
    rows = [row for result in results for row in result["rows"] if row["job"] in jobs]
    plain = [r for r in rows if not (r["masked"] or r["frozen"] or r.get("peaked")) and r["hidden"]]
    sizes = sorted({row["hidden"][0] for row in plain})
    found: dict[tuple[str, str], dict[int, str]] = {}
    for job in jobs:
        for row in plain:
            if row["job"] == job and row["provider"] not in _LEFT_OUT:
                name = f"floor: {row['provider']}" if "floor" in row else NAMES.get(row["provider"], row["provider"])
                base = base_of(row, rows)
                cell = _milliseconds(row["ms_p50"])
                if "floor" not in row and base is not None:
                    cell += f", {_ratio(row['ms_p50'], base)} of {_milliseconds(base)}"
                found.setdefault((job, name), {})[row["hidden"][0]] = cell
    shape = _shape(plain[0])
    same = ", ".join(part for part in shape.split(", ") if not part.startswith("H="))
    lines = [f"{same}; ms, and the ratio to the floor's ms in the same rounds", ""]
    lines += ["| job | | " + " | ".join(f"H={h}" for h in sizes) + " |"]
    lines.append("|---|---|" + "---:|" * len(sizes))
    for (job, name), cells in found.items():
        lines.append(f"| {_SHORT.get(job, job)} | {name} | " + " | ".join(cells.get(h, "–") for h in sizes) + " |")
    commits = dict.fromkeys((result["commit"] or "unknown")[:12] for result in results)
    dates = dict.fromkeys(result["date"][:10] for result in results)
    return "\n".join([*lines, "", f"{results[0]['device']}, commit {', '.join(commits)}, {', '.join(dates)}.", ""])


_COMPACT = re.compile(r"(<!-- compact (\S+) (\S+) -->\n)(.*?)(<!-- /compact -->)", re.DOTALL)


def fill_compact(page: str, results: Path) -> str:
    """The page with the compact tables replaced that this file is part of; the others are in its folder."""

    def region(match: re.Match[str]) -> str:
        opening, sources, jobs, _, closing = match.groups()
        names = sources.split(",")
        if results.name not in names:
            return match.group()
        files = [json.loads((results.parent / name).read_text()) for name in names]
        return f"{opening}\n{compact(files, jobs.split(','))}\n{closing}"

    return _COMPACT.sub(region, page)


_PICTURE_TITLES = {
    "hidden-full": "G-OPD over the whole vocabulary: three models",
    "hidden-sampled": "G-OPD at the sampled tokens: three models",
    "logits-full": "G-OPD over the whole vocabulary: three models, logits given",
    "logits-sampled": "G-OPD at the sampled tokens: three models, logits given",
}
# Names that people know, of each provider's plain form and of its variants.
_PICTURE_NAMES = {
    "eager": "PyTorch eager, all outputs",
    "eager-lean": "PyTorch eager",
    "compile": "torch.compile",
    "compile-chunked": "torch.compile, chunked",
    "torch-lce": "PyTorch linear CE",
    "torch-lce-auto": "PyTorch linear CE, auto",
    "cce": "cut-cross-entropy",
    "cce-exact": "cut-cross-entropy, exact",
    "cce-compile": "cut-cross-entropy, compiled",
    "liger-flce-long": "Liger, long chunks",
    "liger-jsd": "Liger fused linear JSD",
    "liger-chunked-jsd": "Liger chunked JSD",
    "liger-flce-sm90": "Liger, SM90",
    "liger-scaled-ce": "Liger scaled CE, SM90",
    "quack-lse": "quack, lse",
}


def picture_name(provider: str) -> str:
    if provider.startswith("fused-"):
        variants = {"low-chunks": "bf16", "stored": "stored", "one-pass": "one pass", "torch": "torch"}
        return ", ".join(["this package", *(said for part, said in variants.items() if part in provider)])
    packages = {"liger": "Liger", "trl": "TRL"}
    package = provider.partition("-")[0]
    return _PICTURE_NAMES.get(provider, packages.get(package, package))


def plot(result: dict[str, Any], path: Path, jobs: list[str] | None = None, providers: list[str] | None = None) -> None:
    """Draw bars of memory beyond inputs and gradients and of time, a group of bars per job and shape."""

    def wanted(row: Row) -> bool:
        both = "ms_p50" in row and row.get("peak_extra_bytes") is not None
        return both and (providers is None or row["provider"] in providers)

    found = [[row for row in rows if wanted(row)] for rows in groups(result, jobs)]
    panels = [sorted(rows, key=lambda row: -row["peak_extra_bytes"]) for rows in found if rows]
    if not panels:
        raise ValueError("no row has both a time and a memory figure: nothing to plot")
    shapes = [_shape(rows[0]) for rows in panels]
    shape = max(shapes, key=len)
    same = all(set(other.split(", ")) <= set(shape.split(", ")) for other in shapes)  # logits have no H
    notes = textwrap.wrap(
        "Memory: peak beyond inputs and gradients. Time: median of loss and gradients. "
        f"{shape + '; ' if same else ''}{result['device']}, "
        f"commit {(result['commit'] or 'unknown')[:7]}, {result['date'][:10]}.",
        72,
    )
    longest = max(len(picture_name(row["provider"])) for rows in panels for row in rows)
    line, length = 22, 70  # pixels: the height of a row, the longest bar
    first = max(180, 8 * longest + 16)  # pixels from the left where bars of memory start
    columns, width = (first, first + 160), first + 312
    height = line * sum(len(rows) + 2.4 + (not same) for rows in panels) + 16 * len(notes) + 14
    with pictures.picture(path, width, height) as figure:
        figure.set_layout_engine("none")
        axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axis.axis("off")
        y = line * 0.8
        for rows in panels:
            title = _PICTURE_TITLES.get(rows[0]["job"], TITLES.get(rows[0]["job"], rows[0]["job"]).partition(": ")[0])
            axis.text(8, y, title, weight="bold", va="center")
            if not same:
                y += line
                axis.text(8, y, _shape(rows[0]), color=pictures.MUTED, va="center")
            y += line
            for x, heading in zip(columns, ("extra memory", "time"), strict=True):
                axis.text(x, y, heading, color=pictures.MUTED, va="center")
            for row in rows:
                y += line
                ours = row["provider"].startswith("fused-")
                look = {"weight": "bold" if ours else "normal", "va": "center"}
                axis.text(8, y, picture_name(row["provider"]), **look)
                for x, key, said in zip(
                    columns,
                    ("peak_extra_bytes", "ms_p50"),
                    (_bytes(row["peak_extra_bytes"]), f"{_milliseconds(row['ms_p50'])} ms"),
                    strict=True,
                ):
                    share = max(0, row[key]) / max(1e-9, *(r[key] for r in rows))
                    axis.barh(y, length * share, 14, left=x, color=pictures.BLUE if ours else pictures.GREY)
                    axis.text(x + length * share + 5, y, said, **look)
            y += line * 1.4
        for note in notes:
            axis.text(8, y, note, color=pictures.MUTED, fontsize=8, va="center")
            y += 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plot", type=Path, help="an image file, its format by its ending")
    args = parse(parser, "plot")
    result = json.loads(args.results.read_text())
    if args.plot:
        plot(result, args.plot)
    elif not args.pages:
        print(markdown(result))

    def change(page: str) -> str:
        return fill_compact(fill(page, args.results.name, result), args.results)

    if not args.check:
        for path in args.pages:
            edit(path, change)
        return 0
    stale = [path for path in args.pages if change(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path} is not what {args.results.name} says: run python -m benchmarks.report on it")
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
