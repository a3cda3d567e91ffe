"""Times of the parts of a step on a GPU: matrix products, row kernel, linear kernel, and whole steps.

    python -m benchmarks.kernels --json RESULTS.json [PAGE.md ...]      measure, add the run to the file, fill the pages
    python -m benchmarks.kernels --report RESULTS.json [PAGE.md ...]    from the file alone

The tile and chunk sizes in ``rowops/triton`` and ``loop/chunking.py`` are chosen from these, as ``docs/performance-
log.md`` explains. A run is a flat table of medians in milliseconds between device events, with minimum and ninetieth
percent (``spread``), and the clock of each round: calls of a group are timed in turn, in random order. With
``--device cpu`` it runs tiny shapes in Triton's interpreter (TRITON_INTERPRET=1), to see that it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_gopd as fg
from fused_gopd.loop import gemm
from fused_gopd.objective.divergences import make
from fused_gopd.rowops import GradientWeights, LogitTransform, ModelRows, Policy, PolicyRule, RowProblem, Stat
from fused_gopd.rowops.triton import Device, LinearTiles, Tiles, TritonRowOps
from fused_gopd.rowops.triton import tiles as choose_tiles

from . import run
from .arguments import publish
from .floors import Clock, add_dweight, clock_name, quantile
from .workloads import VOCAB_SIZE, synchronize

HIDDEN = (1024, 2048, 4096)
TOKENS = 8192
ROWS = 1024


class Shapes(NamedTuple):
    """The sizes that are timed."""

    hidden: tuple[int, ...] = HIDDEN
    vocab: int = VOCAB_SIZE
    tokens: tuple[int, ...] = (TOKENS, 2736, ROWS, 256)  # of the linear kernel; whole steps take the first
    rows: int = ROWS  # of the row kernel
    chunks: tuple[int, ...] = (512, 1024, 2048, 4096)
    rounds: int = 9
    device: str = "cuda"


# Seconds on a CPU, with Triton's interpreter: its times mean nothing
TINY = Shapes(hidden=(64,), vocab=320, tokens=(96, 20), rows=4, chunks=(32, 48), rounds=1, device="cpu")

# With --tiles: threads, columns of a thread, stages
TILES = ((256, 4, 4), (128, 4, 4), (128, 4, 3), (256, 8, 3), (512, 4, 4), (512, 8, 3))
# Programs that share a row, on a multiprocessor, registers of a thread, share of L2 between the readings of a row
SEGMENTS = ((16, 4, 64, 3), (8, 4, 64, 3), (32, 4, 64, 3), (16, 4, 64, 2), (16, 4, 64, 6), (16, 2, None, 3))
# rows, vocabulary, hidden, group, warps, stages; descriptors
LINEAR_TILES = (
    ((128, 256, 64, 24, 8, 3), True),
    ((128, 256, 64, 16, 8, 3), True),
    ((128, 256, 64, 33, 8, 3), True),
    ((128, 256, 64, 16, 8, 3), False),
    ((256, 128, 64, 16, 8, 3), True),
    ((128, 256, 32, 16, 8, 4), True),
)
# Choices that no default makes, for Hopper
SPECIALISED = LinearTiles(128, 256, 64, 24, num_warps=4, num_stages=4, descriptors=True, warp_specialize=True)
FLAT = LinearTiles(128, 256, 64, 24, num_warps=8, num_stages=3, descriptors=True, flatten=True)
DIVERGENCES: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "forward_kl": {},
    "jsd": {},
    "skew_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
    "alpha": {"alpha": 0.5},
    "mixed": {"forward_weight": 0.5},
}
CLIPPED = PolicyRule(clip=(0.2, 0.2))
STEPS: dict[str, dict[str, Any]] = {
    "full": {"estimator": "full"},
    "full, bfloat16 chunks": {"estimator": "full", "chunk_dtype": torch.bfloat16},
    "full, jsd": {"estimator": "full", "divergence": "jsd"},
    "sampled": {},
    "sampled, bfloat16 chunks": {"chunk_dtype": torch.bfloat16},
    "sampled, stored exponentials": {"store_exponentials": True},
}

Call = Callable[[], object]
Group = dict[str, Call]  # calls that are timed in turn, with their tensors


def _normal(device: str, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).mul_(scale).to(dtype)


def timed(calls: list[Call], clock: Call, device: str, rounds: int) -> Iterator[tuple[list[float], float]]:
    """Milliseconds of each call and of the clock, round by round, in a new random order each time.

    Two calls of each are a warm-up. On a GPU a round is queued before it is waited for, behind the clock's products:
    the host runs ahead of the device, as in training.
    """
    order, gpu = random.Random(0), torch.device(device).type == "cuda"
    for call in [*calls, *calls]:
        call()
    synchronize(device)
    for _ in range(rounds):
        sequence = [len(calls), *order.sample(range(len(calls)), len(calls))]
        found = [0.0] * (1 + len(calls))
        marks: dict[int, tuple[Any, Any]] = {}
        for i in sequence:
            call = clock if i == len(calls) else calls[i]
            if gpu:
                marks[i] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                marks[i][0].record()
                call()
                marks[i][1].record()
            else:
                start = time.perf_counter()
                call()
                found[i] = 1e3 * (time.perf_counter() - start)
        synchronize(device)
        for i, (start, stop) in marks.items():
            found[i] = start.elapsed_time(stop)
        yield found[:-1], found[-1]


def _with_library(name: str, call: Call) -> Call:
    """The call with cuBLASLt's products, where PyTorch takes cuBLAS's."""

    def run() -> object:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(name)
        try:
            return call()
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return run


def products(shapes: Shapes, _: bool) -> Iterator[Group]:
    """The GEMMs of a chunk, with logits in float32, as by default, and in bfloat16."""
    V, device = shapes.vocab, shapes.device
    for H in shapes.hidden:
        group: Group = {}
        weight, total = _normal(device, V, H, scale=H**-0.5), torch.zeros(V, H, device=device)
        longest = max(shapes.chunks)
        narrow, wide = _normal(device, longest, V, scale=0.01), torch.empty(longest, V, device=device)
        for C in shapes.chunks:
            hidden, z, g = _normal(device, C, H), wide[:C], narrow[:C]
            out = torch.empty(C, V, dtype=torch.bfloat16, device=device)
            name = f"gemm H={H} C={C}"
            group[f"{name} logits bf16"] = functools.partial(torch.mm, hidden, weight.T, out=out)
            group[f"{name} logits fp32"] = functools.partial(gemm.logits_into(z, weight), hidden)
            dhidden = functools.partial(torch.mm, g, weight)
            first, add = (functools.partial(add_dweight, total, g, hidden, first=x) for x in (True, False))
            group |= {f"{name} dhidden": dhidden, f"{name} dweight add": add, f"{name} dweight first": first}
            if torch.device(device).type == "cuda":
                for what, call in (("dhidden", dhidden), ("dweight add", add)):
                    group[f"{name} {what} cublaslt"] = _with_library("cublaslt", call)
        yield group


def row_problem(shapes: Shapes, models: int, divergence: str, dtype: torch.dtype) -> tuple[RowProblem, GradientWeights]:
    V, R, device = shapes.vocab, shapes.rows, shapes.device
    one = torch.ones(R, device=device)
    raws = [_normal(device, R, V, scale=3, dtype=dtype) for _ in range(models)]
    student, *others = [ModelRows(x, LogitTransform()) for x in raws] + [None] * (3 - models)
    assert student is not None
    ids = torch.randint(V, (R,), device=device)
    kind = make(divergence, **DIVERGENCES[divergence]) if models == 3 else None
    problem = RowProblem(
        V, student, teacher=others[0], ref=others[1], reward_scale=1.25, token_ids=ids, divergence=kind
    )
    weights = GradientWeights(token=one) if models == 1 else GradientWeights(divergence=one)
    if divergence == "policy":
        scored = torch.randn(2, len(Stat), R, device=device) - 12.0
        weights = GradientWeights(token=one, policy=Policy(CLIPPED, 1.25, *scored, one - 13.0))
    return problem, weights


def row_calls(kind: str, problem: RowProblem, weights: GradientWeights, found: dict[str, TritonRowOps]) -> Group:
    """Statistics alone and with the gradient, of each of ``found``; the gradient has memory of its own."""
    out = torch.empty_like(problem.student.raw).view(torch.bfloat16)[:, : problem.vocab_size]
    group: Group = {}
    for name, ops in found.items():
        group[f"{kind} {name} statistics"] = lambda o=ops: o.statistics(problem)
        group[f"{kind} {name} both"] = lambda o=ops: o.statistics_and_gradient(problem, weights, out)
    return group


def segments(shapes: Shapes, _: bool) -> Iterator[Group]:
    """Several programs a row, which read a logit from memory once, beside the tile that the package chooses.

    All of SEGMENTS for three models and the reverse KL, its first for others. With each compile two kernels.
    """
    device = Device.of(torch.device(shapes.device))
    for models, divergence, dtype in (
        (3, "reverse_kl", torch.float32),
        (3, "reverse_kl", torch.bfloat16),
        (1, "none", torch.float32),
        (3, "jsd", torch.float32),
        (1, "none", torch.bfloat16),
        (3, "jsd", torch.bfloat16),
    ):
        problem, weights = row_problem(shapes, models, divergence, dtype)
        base, found = choose_tiles(problem, device), {"segments=1": TritonRowOps()}
        variants = SEGMENTS if divergence == "reverse_kl" else SEGMENTS[:1]
        for count, programs, registers, share in variants if shapes.device == "cuda" else [(2, 1, None, 3)]:
            tile = replace(
                base,
                segments=count,
                programs=programs,
                max_registers=registers,
                lag_bytes=device.l2_bytes // share,
            )
            found[f"segments={count} programs={programs} lag=L2/{share}"] = TritonRowOps(tile)
        yield row_calls(f"row {divergence} {str(dtype)[6:]} models={models}", problem, weights, found)


def row_kernel(shapes: Shapes, tiles: bool) -> Iterator[Group]:
    """Statistics alone, and with the bfloat16 gradient, for one and three models.

    The gradient's rows are as far apart as the logits', over which the loss writes them; here they have memory of their
    own, or the next call would find gradients in place of logits. (Until run 6 they had not.)

    By default with the tile that the package chooses; with ``tiles`` some others too, which take long to compile.
    """
    for models, divergence in [(3, name) for name in DIVERGENCES] + [(1, "none"), (1, "policy")]:
        for dtype in (torch.float32, torch.bfloat16):
            vector = 16 // dtype.itemsize
            problem, weights = row_problem(shapes, models, divergence, dtype)
            found: dict[str, TritonRowOps] = {"default": TritonRowOps()}
            for threads, columns, stages in TILES if tiles else ():
                if columns >= vector:
                    tile = Tiles(
                        repeat=columns // vector, lanes=threads, vector=vector, num_warps=threads // 32, stages=stages
                    )
                    found[f"threads={threads} cols={columns} stages={stages}"] = TritonRowOps(tile)
            yield row_calls(f"row {divergence} {str(dtype)[6:]} models={models}", problem, weights, found)


def linear_kernel(shapes: Shapes, tiles: bool) -> Iterator[Group]:
    """Log-probs from hidden states without logits in memory, with exponentials stored on the way; the bare product."""
    V, device = shapes.vocab, shapes.device
    for H in shapes.hidden:
        group: Group = {}
        weight = _normal(device, V, H, scale=3 * H**-0.5)
        # 16-byte rows, as the loop's own buffers have them
        logits = torch.empty(shapes.tokens[0], -(-V // 16) * 16, device=device, dtype=torch.bfloat16)[:, :V]
        for N in shapes.tokens:
            hidden, ids = _normal(device, N, H), torch.randint(V, (N,), device=device)
            operands = (hidden, weight, LogitTransform(), V, ids)
            group[f"linear N={N} H={H} bare"] = lambda h=hidden, w=weight, z=logits[:N]: torch.mm(h, w.T, out=z)
            found = {"default": TritonRowOps()}
            if torch.device(device).type == "cuda":
                for shape, descriptors in LINEAR_TILES if tiles or N > ROWS else LINEAR_TILES[:1] + LINEAR_TILES[-2:]:
                    tile = LinearTiles(*shape, descriptors=descriptors)
                    found[f"{'x'.join(map(str, shape))} tma={descriptors}"] = TritonRowOps(linear_tile=tile)
            for name, ops in found.items():
                group[f"linear N={N} H={H} {name}"] = lambda o=ops, x=operands: o.linear_statistics(*x)
            store = functools.partial(TritonRowOps().linear_exponentials, *operands, logits[:N])
            group[f"linear N={N} H={H} exponentials"] = store
        yield group


def explicit_tiles(shapes: Shapes, _: bool) -> Iterator[Group]:
    """The linear kernel with SPECIALISED and FLAT beside the default; a result that is another is an error.

    A part of its own, since a kernel whose groups of warps wait for one another may hang.
    """
    V, device = shapes.vocab, shapes.device
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        return
    for H in shapes.hidden:
        weight = _normal(device, V, H, scale=3 * H**-0.5)
        logits = torch.empty(shapes.tokens[0], -(-V // 16) * 16, device=device, dtype=torch.bfloat16)[:, :V]
        for N in shapes.tokens:
            group: Group = {}
            hidden, ids = _normal(device, N, H), torch.randint(V, (N,), device=device)
            operands = (hidden, weight, LogitTransform(), V, ids)
            tiles = {"default": None, "warp_specialize": SPECIALISED, "flatten": FLAT}
            calls = {
                name: functools.partial(TritonRowOps(linear_tile=tile).linear_statistics, *operands)
                for name, tile in tiles.items()
            }
            group |= {f"linear N={N} H={H} {name}": _compared(call, calls["default"]) for name, call in calls.items()}
            # three stages: what is written takes as much shared memory as the fourth
            tiles = {"default": None, "warp_specialize": replace(SPECIALISED, num_stages=3)}
            calls = {
                name: functools.partial(TritonRowOps(linear_tile=tile).linear_exponentials, *operands, logits[:N])
                for name, tile in tiles.items()
            }
            group |= {
                f"linear N={N} H={H} exponentials {name}": _compared(call, calls["default"], logits[:N, :: V // 99])
                for name, call in calls.items()
            }
            yield group


def _compared(call: Call, default: Call, written: Tensor | None = None) -> Call:
    """The call; its first result, with what it has ``written``, is compared with the default's."""
    compared = False

    def results(made: Any) -> list[Tensor]:
        found = [made] if isinstance(made, Tensor) else list(made)
        return [x.clone() for x in (found if written is None else [*found, written])]

    def run() -> object:
        nonlocal compared
        made = call()
        if not compared:
            for x, y in zip(results(made), results(default()), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
            compared = True
        return made

    return run


def steps(shapes: Shapes, _: bool) -> Iterator[Group]:
    """Loss and gradients of hidden states and weight, with the bare products beside them."""
    V, N, device = shapes.vocab, shapes.tokens[0], shapes.device
    C = min(2048, N)
    for H in shapes.hidden:
        heads = [fg.LinearHead(_normal(device, N, H), _normal(device, V, H, scale=3 * H**-0.5)) for _ in range(3)]
        frozen = [(m.hidden.detach(), m.weight.detach()) for m in heads]
        leaves = [x.requires_grad_() for x in (heads[0].hidden, heads[0].weight)]
        ids = torch.randint(V, (N,), device=device)
        total, logits = torch.zeros(V, H, device=device), _normal(device, C, V)

        def floor(frozen: Any = frozen, total: Tensor = total, logits: Tensor = logits) -> None:
            for start in range(0, N, C):
                rows = slice(start, start + C)
                for h, w in reversed(frozen):
                    torch.mm(h[rows], w.T, out=logits[: h[rows].shape[0]])
                z = logits[: h[rows].shape[0]]
                torch.mm(z, frozen[0][1])
                add_dweight(total, z, frozen[0][0][rows], first=start == 0)

        def step(options: dict[str, Any], heads: Any = heads, leaves: Any = leaves, ids: Tensor = ids) -> None:
            loss = fg.gopd_loss(*heads, ids, reward_scale=1.25, **options).loss
            torch.autograd.grad(loss, leaves)

        group: Group = {f"five gemms H={H}": floor}
        for name, options in STEPS.items():
            if torch.device(device).type == "cuda" or not {"chunk_dtype", "store_exponentials"} & options.keys():
                group[f"step {name} H={H}"] = functools.partial(step, options)
        alone = fg.LinearHead(*frozen[0])
        group[f"logprobs H={H}"] = lambda m=alone, i=ids: fg.token_logprobs(m, i)
        yield group


PARTS = {
    "products": products,
    "linear": linear_kernel,
    "explicit": explicit_tiles,
    "steps": steps,
    "segments": segments,
    "rows": row_kernel,
}


def _has_runs(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text())["runs"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def measure(path: Path, parts: list[str], shapes: Shapes, tiles: bool, limit: float | None) -> dict[str, Any]:
    """Add a run to the file, which is written after each group. No group is started after ``limit`` seconds."""
    file = json.loads(path.read_text()) if path.exists() else {"runs": []}
    device, started = shapes.device, time.monotonic()
    ms: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    clock_ms: list[list[float]] = []
    failed: dict[str, str] = {}
    one = {**run.origin(device), "driver": run.driver_version(device), "versions": run.package_versions(), "ms": ms}
    one |= {"spread": spread, "clock": clock_name(device), "clock_ms": clock_ms, "failed": failed}
    file["runs"].append(one)
    clock = Clock(device)

    def note(group: Group) -> None:
        calls = {}
        for name, call in group.items():
            try:  # a tile that does not compile here leaves the others
                call()
                calls[name] = call
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        times = []
        for found, reference in timed(list(calls.values()), clock.step, device, shapes.rounds):
            times.append(found)
            clock_ms.append([round(time.monotonic() - started, 2), round(reference, 4)])
        for name, values in zip(calls, map(list, zip(*times, strict=True)), strict=True):
            ms[name] = round(median(values), 4)
            spread[name] = [round(min(values), 4), round(quantile(values, 0.9), 4)]
            print(f"{ms[name]:9.3f}  {name}", flush=True)
        run.write(file, path)

    x = torch.empty(1 << (30 if torch.device(device).type == "cuda" else 20), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    note({"copy 1GiB": lambda: y.copy_(x)})
    for part in parts:
        for group in PARTS[part](shapes, tiles):
            if limit is not None and time.monotonic() - started > limit:
                failed[part] = f"the limit of {limit:.0f} s was over"
                run.write(file, path)
                break
            note(group)
            group.clear()
            if torch.device(device).type == "cuda":
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
    yield _line(["one bare GEMM", *(_times(ms, math.nan) for ms in bare)])
    yield _line(["`token_logprobs`", *map(_times, alone, bare)])


def _chunk_lengths(ms: dict[str, float]) -> Iterator[str]:
    """Milliseconds per 2048 tokens in chunks of each length."""
    names = [name.split(" ", 3) for name in ms if name.startswith("gemm ")]
    if not names:
        return
    sizes = sorted({int(c[2:]) for _, _, c, _ in names})
    yield from _columns(f"products, ms for 2048 tokens in chunks of {' / '.join(map(str, sizes))}", _heads(ms, "gemm "))
    for what in dict.fromkeys(what for *_, what in names):
        cells = []
        for H in _hidden(ms, "gemm "):
            found = [ms.get(f"gemm H={H} C={c} {what}", math.nan) * 2048 / c for c in sizes]
            cells.append(" / ".join("–" if math.isnan(x) else f"{x:.2f}" for x in found))
        yield _line([what, *cells])


def _hidden(ms: dict[str, float], start: str) -> list[int]:
    return sorted({int(m[1]) for name in ms if name.startswith(start) and (m := re.search(r"H=(\d+)", name))})


def _heads(ms: dict[str, float], start: str) -> list[str]:
    return [f"H={H}" for H in _hidden(ms, start)]


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
    lengths = (TOKENS, 2736) if not any(" default" in name for name in ms) else Shapes().tokens
    sizes = [(N, H) for H in HIDDEN for N in lengths if f"linear N={N} H={H} bare" in ms]
    if not sizes:
        sizes = [(N, H) for H in HIDDEN for N in (TOKENS, 2736)]
    yield from _columns("linear kernel", [f"N={N}, H={H}" for N, H in sizes])
    for name in names:
        cells = [
            _times(_mean(ms, f"linear N={N} H={H} {name}"), _mean(ms, f"linear N={N} H={H} bare")) for N, H in sizes
        ]
        yield _line([name, *cells])


def _rows(ms: dict[str, float]) -> Iterator[str]:
    names = [n.removeprefix("row ").split(" ", 3) for n in ms if n.startswith("row ") and "models=" in n]
    kinds = dict.fromkeys("row " + " ".join(name[:3]) for name in names)
    tiles = dict.fromkeys(name[3].rpartition(" ")[0] for name in names)
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
        for part in (_steps, _chunk_lengths if "spread" in one else _products, _linear, _rows):
            lines += part(one["ms"])
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to add this run")
    parser.add_argument("--report", type=Path, help="measure nothing: the runs of this file")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, default all, in this order")
    parser.add_argument("--tiles", action="store_true", help="other tiles of the row kernel too")
    parser.add_argument("--limit", type=float, help="seconds after which no further group is started")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny shapes, interpreted")
    parser.add_argument("pages", type=Path, nargs="*")
    args = parser.parse_args()
    if (args.json is None) == (args.report is None):
        parser.error("give one of --json and --report")
    if args.report is not None:
        file = json.loads(args.report.read_text())
    elif args.json.exists() and not _has_runs(args.json):
        parser.error(f"--json {args.json} is not a file of this script: choose another name")
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here")
    else:
        shapes = Shapes() if args.device == "cuda" else TINY
        file = measure(args.json, args.parts.split(","), shapes, args.tiles, args.limit)
    publish("gpu-kernels", markdown(file), args.pages)
    for one in file["runs"]:
        if any(name.startswith("five gemms") for name in one["ms"]):
            publish("gpu-steps", "\n".join(_steps(one["ms"])).strip(), args.pages)


if __name__ == "__main__":
    main()
