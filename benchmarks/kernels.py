"""Times of the parts of a step on a GPU: matrix products, row kernel, linear kernel, and whole steps.

    python -m benchmarks.kernels --json RESULTS.json [PAGE.md ...]      measure, add the run to the file, fill the pages
    python -m benchmarks.kernels --report RESULTS.json [PAGE.md ...]    from the file alone

The tile and chunk sizes in ``rowops/triton`` and ``loop/chunking.py`` are chosen from these; ``docs/performance.md``
explains the choices. A run is a flat table of medians in milliseconds between device events, written as it is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg
from fused_gopd.loop import gemm
from fused_gopd.objective.divergences import make
from fused_gopd.rowops import GradientWeights, LogitTransform, ModelRows, RowProblem
from fused_gopd.rowops.triton import Device, LinearTiles, Tiles, TritonRowOps, linear_launches, splits

from . import run
from .arguments import publish
from .workloads import VOCAB_SIZE as V

HIDDEN = (1024, 2048, 4096)
TOKENS = 8192
ROWS = 1024
# threads, columns of a thread, stages
TILES = ((256, 4, 4), (128, 4, 4), (128, 4, 3), (256, 8, 3), (512, 4, 4), (512, 8, 3))
# rows, vocabulary, hidden, group, warps, stages; descriptors
LINEAR_TILES = (
    ((128, 256, 64, 24, 8, 3), True),
    ((128, 256, 64, 16, 8, 3), True),
    ((128, 256, 64, 33, 8, 3), True),
    ((128, 256, 64, 16, 8, 3), False),
    ((256, 128, 64, 16, 8, 3), True),
    ((128, 256, 32, 16, 8, 4), True),
)
STEPS: dict[str, dict[str, Any]] = {
    "full": {"estimator": "full"},
    "full, bfloat16 chunks": {"estimator": "full", "chunk_dtype": torch.bfloat16},
    "full, jsd": {"estimator": "full", "divergence": "jsd"},
    "sampled": {},
    "sampled, bfloat16 chunks": {"chunk_dtype": torch.bfloat16},
}

Note = Callable[[str, Callable[[], object]], None]


def _normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").mul_(scale).to(dtype)


def _milliseconds(call: Callable[[], object], rounds: int = 9) -> float:
    """Median device time of a call, after two warm-up calls.

    All calls are queued before the synchronisation: the host runs ahead of the device, as in training.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2 + rounds)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return round(median(start.elapsed_time(stop) for start, stop in events[2:]), 4)


def products(note: Note) -> None:
    """The GEMMs of a chunk, with logits in float32, as by default, and in bfloat16."""
    for H in HIDDEN:
        weight, total = _normal(V, H, scale=H**-0.5), torch.zeros(V, H, device="cuda")
        for C in (ROWS, 2 * ROWS):
            hidden, dlogits = _normal(C, H), _normal(C, V, scale=0.01)
            narrow, wide = torch.empty_like(dlogits), torch.empty(C, V, device="cuda")
            note(f"gemm H={H} C={C} logits bf16", lambda w=weight, h=hidden, z=narrow: torch.mm(h, w.T, out=z))
            note(f"gemm H={H} C={C} logits fp32", lambda w=weight, h=hidden, z=wide: gemm.logits_(z, h, w))
            note(f"gemm H={H} C={C} dhidden", lambda w=weight, g=dlogits: gemm.dhidden(g, w))
            note(f"gemm H={H} C={C} dweight add", lambda t=total, h=hidden, g=dlogits: gemm.add_dweight_(t, g, h))


def row_kernel(note: Note) -> None:
    """Statistics alone, and with the bfloat16 gradient written over the logits, for one and three models."""
    one = torch.ones(ROWS, device="cuda")
    for models, divergence in ((3, "reverse_kl"), (3, "jsd"), (1, "none")):
        for dtype in (torch.float32, torch.bfloat16):
            vector = 16 // dtype.itemsize
            raws = [_normal(ROWS, V, scale=3, dtype=dtype) for _ in range(models)]
            student, *others = [ModelRows(x, LogitTransform()) for x in raws] + [None] * (3 - models)
            assert student is not None
            ids = torch.randint(V, (ROWS,), device="cuda")
            problem = RowProblem(V, student, teacher=others[0], ref=others[1], reward_scale=1.25, token_ids=ids,
                                 divergence=None if divergence == "none" else make(divergence))  # fmt: skip
            weights = GradientWeights(token=one) if models == 1 else GradientWeights(divergence=one)
            out = raws[0].view(torch.bfloat16)[:, :V]
            for threads, columns, stages in TILES:
                if columns < vector:
                    continue
                ops = TritonRowOps(
                    Tiles(
                        repeat=columns // vector, lanes=threads, vector=vector, num_warps=threads // 32, stages=stages
                    )
                )
                kind = f"row {divergence} {str(dtype)[6:]} models={models}"
                name = f"{kind} threads={threads} cols={columns} stages={stages}"
                note(f"{name} statistics", lambda o=ops, p=problem: o.statistics(p))
                note(f"{name} both", lambda o=ops, p=problem, w=weights, x=out: o.statistics_and_gradient(p, w, x))


def linear_kernel(note: Note) -> None:
    """Log-probs from hidden states without logits in memory, and the bare product."""
    for H in HIDDEN:
        weight = _normal(V, H, scale=3 * H**-0.5)
        logits = torch.empty(TOKENS, V, device="cuda", dtype=torch.bfloat16)
        for N in (TOKENS, 2736, ROWS):
            hidden, ids = _normal(N, H), torch.randint(V, (N,), device="cuda")
            note(f"linear N={N} H={H} bare", lambda h=hidden, w=weight, z=logits[:N]: torch.mm(h, w.T, out=z))
            for shape, descriptors in LINEAR_TILES:
                tile = LinearTiles(*shape, descriptors=descriptors)
                device = Device.of(hidden.device)
                parts = splits(N, V, tile, device)
                partial, found = (torch.empty(*s, N, device="cuda") for s in ((parts, 4), (14,)))
                launches = linear_launches(
                    hidden, weight, LogitTransform(), V, ids, partial, found, tile, "ieee", False, device.flush
                )
                name = f"linear N={N} H={H} {'x'.join(map(str, shape))} tma={descriptors}"
                note(name, lambda ls=launches, d=hidden.device: [launch.run(d) for launch in ls])


def steps(note: Note) -> None:
    """Loss and gradients of hidden states and weight, with the bare products before and after."""
    for H in HIDDEN:
        _steps_of(note, H)


def _steps_of(note: Note, H: int) -> None:
    heads = [fg.LinearHead(_normal(TOKENS, H), _normal(V, H, scale=3 * H**-0.5)) for _ in range(3)]
    frozen = [(m.hidden.detach(), m.weight.detach()) for m in heads]
    leaves = [x.requires_grad_() for x in (heads[0].hidden, heads[0].weight)]
    ids = torch.randint(V, (TOKENS,), device="cuda")
    total, logits = torch.zeros(V, H, device="cuda"), _normal(2048, V)

    def floor() -> None:
        for start in range(0, TOKENS, 2048):
            rows = slice(start, start + 2048)
            for h, w in reversed(frozen):
                torch.mm(h[rows], w.T, out=logits)
            torch.mm(logits, frozen[0][1])
            gemm.add_dweight_(total, logits, frozen[0][0][rows], first=start == 0)

    def step(options: dict[str, Any]) -> None:
        loss = fg.gopd_loss(*heads, ids, reward_scale=1.25, **options).loss
        torch.autograd.grad(loss, leaves)

    note(f"five gemms H={H}", floor)
    for name, options in STEPS.items():
        note(f"step {name} H={H}", functools.partial(step, options))
    alone = fg.LinearHead(*frozen[0])
    note(f"logprobs H={H}", lambda: fg.token_logprobs(alone, ids))
    note(f"five gemms again H={H}", floor)


PARTS = {"steps": steps, "linear": linear_kernel, "rows": row_kernel, "products": products}


def _has_runs(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text())["runs"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def measure(path: Path, parts: list[str]) -> dict[str, Any]:
    file = json.loads(path.read_text()) if path.exists() else {"runs": []}
    ms: dict[str, float] = {}
    file["runs"].append(
        {**run.origin("cuda"), "driver": run.driver_version("cuda"), "versions": run.package_versions(), "ms": ms}
    )

    def note(name: str, call: Callable[[], object]) -> None:
        ms[name] = _milliseconds(call)
        print(f"{ms[name]:9.3f}  {name}", flush=True)
        run.write(file, path)

    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    note("copy 1GiB", lambda: y.copy_(x))
    for part in parts:
        PARTS[part](note)
        torch.cuda.empty_cache()
    return file  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------------------- report


def _mean(ms: dict[str, float], *names: str) -> float:
    there = [ms[name] for name in names if name in ms]
    return sum(there) / len(there) if there else math.nan


def _line(cells: list[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _columns(title: str, heads: list[str]) -> list[str]:
    return ["", _line([title, *heads]), "|---|" + "---:|" * len(heads)]


def _times(x: float, of: float) -> str:
    return "–" if math.isnan(x) else f"{x:.1f} ms" + ("" if math.isnan(of) else f", {x / of:.2f}×")


def _steps(ms: dict[str, float]) -> Iterator[str]:
    if not any(name.startswith("step ") for name in ms):
        return
    yield from _columns("8192 tokens, V=151936, bfloat16", [f"H={H}" for H in HIDDEN])
    floors = {H: _mean(ms, f"five gemms H={H}", f"five gemms again H={H}") for H in HIDDEN}
    yield _line(["five bare GEMMs, chunks of 2048", *(_times(floors[H], math.nan) for H in HIDDEN)])
    for name in STEPS:
        found = [_mean(ms, f"step {name} H={H}") for H in HIDDEN]
        if not all(map(math.isnan, found)):
            yield _line([f"`{name}`, three models", *map(_times, found, floors.values())])
    alone = [_mean(ms, f"logprobs H={H}") for H in HIDDEN]
    bare = [_mean(ms, f"linear N={TOKENS} H={H} bare") for H in HIDDEN]
    yield _line(["`token_logprobs`, to one bare GEMM", *map(_times, alone, bare)])


def _products(ms: dict[str, float]) -> Iterator[str]:
    if not any(name.startswith("gemm ") for name in ms):
        return
    yield from _columns("one product, 2048 tokens (1024 twice)", [f"H={H}" for H in HIDDEN])
    for what in ("logits bf16", "logits fp32", "dhidden", "dweight add"):
        cells = []
        for H in HIDDEN:
            one, two = (ms.get(f"gemm H={H} C={C} {what}", math.nan) for C in (2 * ROWS, ROWS))
            cells.append("–" if math.isnan(one) else f"{one:.2f} ({2 * two:.2f}) ms")
        yield _line([what, *cells])


def _linear(ms: dict[str, float]) -> Iterator[str]:
    names = dict.fromkeys(" ".join(n.split()[3:]) for n in ms if n.startswith("linear ") and not n.endswith("bare"))
    if not names:
        return
    sizes = [(N, H) for H in HIDDEN for N in (TOKENS, 2736) if f"linear N={N} H={H} bare" in ms]
    if not sizes:
        sizes = [(N, H) for H in HIDDEN for N in (TOKENS, 2736)]
    yield from _columns("linear kernel", [f"N={N}, H={H}" for N, H in sizes])
    for name in names:
        cells = [
            _times(_mean(ms, f"linear N={N} H={H} {name}"), _mean(ms, f"linear N={N} H={H} bare")) for N, H in sizes
        ]
        yield _line([name, *cells])


def _rows(ms: dict[str, float]) -> Iterator[str]:
    kinds = dict.fromkeys(n.partition(" threads=")[0] for n in ms if n.startswith("row "))
    tiles = dict.fromkeys(
        "threads=" + n.partition(" threads=")[2].rpartition(" ")[0] for n in ms if n.startswith("row ")
    )
    if not kinds:
        return
    yield from _columns("row kernel, 1024 rows: statistics, and both", [k.removeprefix("row ") for k in kinds])
    for tile in tiles:
        cells = []
        for kind in kinds:
            found = [ms.get(f"{kind} {tile} {what}") for what in ("statistics", "both")]
            cells.append(" · ".join("–" if x is None else f"{x:.2f}" for x in found))
        yield _line([tile, *cells])


def markdown(file: dict[str, Any]) -> str:
    lines: list[str] = []
    for i, one in enumerate(file["runs"]):
        bandwidth = 2 * 2**30 / one["ms"]["copy 1GiB"] / 1e9 if "copy 1GiB" in one["ms"] else math.nan
        copy = "" if math.isnan(bandwidth) else f" A copy of 1 GiB moves {bandwidth:.2f} TB/s."
        commit = (one["commit"] or "unknown")[:12]
        note = f" {one['note']}" if "note" in one else ""
        lines += ["", f"Run {i + 1}: {one['device']}, {one['date'][:10]}, commit {commit}.{copy}{note}"]
        for part in (_steps, _products, _linear, _rows):
            lines += part(one["ms"])
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to add this run")
    parser.add_argument("--report", type=Path, help="measure nothing: the runs of this file")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, default all")
    parser.add_argument("pages", type=Path, nargs="*")
    args = parser.parse_args()
    if (args.json is None) == (args.report is None):
        parser.error("give one of --json and --report")
    if args.report is not None:
        file = json.loads(args.report.read_text())
    elif args.json.exists() and not _has_runs(args.json):
        parser.error(f"--json {args.json} is not a file of this script: choose another name")
    elif not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here")
    else:
        file = measure(args.json, args.parts.split(","))
    publish("gpu-kernels", markdown(file), args.pages)
    for one in file["runs"]:
        if any(name.startswith("five gemms") for name in one["ms"]):
            publish("gpu-steps", "\n".join(_steps(one["ms"])).strip(), args.pages)


if __name__ == "__main__":
    main()
