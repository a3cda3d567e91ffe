"""Compile the Triton kernels for GPUs that are not there and read what they cost.

    python tests/helpers/triton_resources.py [--target sm_90 ...] [--kernel linear ...] [--triton FOLDER ...] [--write]

prints a table of registers, spills and shared memory per kernel and target. The launches are the ones production makes
(``row_launch``, ``linear_launches`` on tensors of the meta device), so a change of tiles or arguments shows here, and
some with tiles that it never chooses.
``--triton`` compiles with the Triton in each FOLDER (``pip install --no-deps --target FOLDER triton==3.8.0``) in place
of the installed one. ``--write`` makes the tables that the tests compare with, one for each version, and their pages
in the docs. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import snapshots
from builders import row_divergence
from fused_gopd.loop.chunking import row_stride
from fused_gopd.objective.divergences import make
from fused_gopd.rowops import (
    GradientWeights,
    LogitTransform,
    ModelRows,
    Policy,
    PolicyRule,
    PolicyStat,
    RowProblem,
    Stat,
)
from fused_gopd.rowops import triton as backend
from fused_gopd.rowops.triton import Device, Launch

# V of the Qwen family and a chunk of 1024 tokens, the shapes the tiles are meant for.
V, C, H = 151936, 1024, 4096

TABLE = "triton_resources-{}.json"  # one for each version of Triton
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
SHOWN = re.findall(r"^triton==(.*)$", CONSTRAINTS.read_text(), re.MULTILINE)[0]  # the version whose rows the docs show
# Units that multiply matrices, the strongest last; AMD has the last one alone.
MATRIX = ("none", "mma.sync", "wgmma", "tcgen05.mma", "v_mfma")
COPIES = ("none", "cp.async")  # into shared memory while the program computes: NVIDIA's prefetch
# When a quantity of a row is worse than in the committed table. All are exact for one version of Triton, but
# - registers are handed out to a warp in eights per thread on all four targets (CUDA's occupancy calculator, CDNA3's
#   instruction set manual), so fewer than that change nothing on the machine;
# - instructions are counted and not run: a few more before or after a loop cost nothing. 2 % is one in a loop of fifty;
# - with another number of warps the other numbers mean something else.
RULES = {
    "warps": snapshots.differs,
    "registers": snapshots.more_granules(8),
    "spills": snapshots.more(),
    "scalar_spills": snapshots.more(),
    "shared": snapshots.more(),
    "instructions": snapshots.more(0.02),
    "matrix": snapshots.earlier_in(MATRIX),
    "copies": snapshots.earlier_in(COPIES),  # without them there is less shared memory, which would pass for better
}
ACCEPT = "If that is meant, accept it with `python tests/helpers/triton_resources.py --write` (see tests/snapshots.md)."
COMPILERS_PAGE = snapshots.PAGE.with_name("gpu-kernels.md")
# The rows that the docs show.
MAIN = (
    "full fp32, bf16 gradient on the logits",
    "full bf16, in place",
    "full fp32, unaligned rows",
    "full fp32, softcap and bias",
    "forward_kl fp32",
    "jsd fp32",
    "jsd bf16, everything",
    "skew_kl fp32",
    "alpha fp32",
    "mixed fp32",
    "sampled fp32",
    "sampled bf16, in place",
    "linear bf16",
    "linear bf16, softcap and bias",
    "linear bf16, H = 1000",
    "linear bf16, 1 row",
    "linear fp32",
)
# Explicit tiles with `warp_specialize`, on Hopper: a group of 4 warps copies, two multiply.
SPECIALISED = ("linear bf16, specialised warps", "linear exponentials, specialised warps")


DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


@dataclasses.dataclass(frozen=True)
class Target:
    device: Device
    shared_limit: int  # bytes one program may use: CUDA programming guide, table of compute capabilities; LDS of CDNA3
    backend: str
    arch: int | str


TARGETS = {
    "sm_80": Target(Device(32, 108, False, 80), 163 * 1024, "cuda", 80),
    "sm_90": Target(Device(32, 132, False, 90), 227 * 1024, "cuda", 90),
    "sm_100": Target(Device(32, 148, False, 100), 227 * 1024, "cuda", 100),
    "gfx942": Target(Device(64, 304, True, 0), 64 * 1024, "hip", "gfx942"),
}


@dataclasses.dataclass(frozen=True)
class Resources:
    kernel: str
    target: str
    warps: int  # that are launched: with specialised warps more than the option num_warps says
    registers: int  # per thread; on AMD vector registers, accumulation registers included
    spills: int  # into memory. NVIDIA: stack and local bytes and local-memory instructions; AMD: registers and bytes
    scalar_spills: int  # AMD only: scalar registers kept in lanes of vector registers; they touch no memory
    shared: int  # bytes
    instructions: int  # of the machine code, to compare two versions of a kernel
    assembly: str = dataclasses.field(repr=False)  # PTX on NVIDIA, AMD's own otherwise
    ttgir: str = dataclasses.field(repr=False)

    @property
    def matrix(self) -> str:
        """The strongest unit for matrix products that the machine code uses."""
        return next((name for name in reversed(MATRIX) if name in self.assembly), "none")

    @property
    def copies(self) -> str:
        return COPIES[1] if COPIES[1] in self.assembly else "none"

    def row(self) -> snapshots.Row:
        return {quantity: getattr(self, quantity) for quantity in RULES}


def _logits(dtype: torch.dtype, stride: int = V) -> torch.Tensor:
    return torch.empty(C, stride, dtype=dtype, device="meta")


def _row(
    device: Device,
    dtypes: tuple[torch.dtype, ...],
    *,
    transform: LogitTransform | None = None,
    divergence: str = "none",
    parameters: dict[str, Any] | None = None,
    per_token_scale: bool = False,
    out: torch.dtype | None = None,
    in_place: bool = False,
    weights: str = "divergence token",
    write: bool = True,
    stride: int = V,
    policy: Policy | None = None,
    segments: int = 1,
) -> Launch:
    transform = transform or LogitTransform()
    models = [ModelRows(_logits(d, stride), transform) for d in dtypes] + [None, None]
    vector = torch.empty(C, device="meta")
    problem = RowProblem(
        V if stride == V else stride,
        models[0],  # type: ignore[arg-type]
        teacher=models[1],
        ref=models[2],
        reward_scale=vector if per_token_scale else 1.25,
        token_ids=torch.empty(C, dtype=torch.int64, device="meta"),
        divergence=row_divergence(divergence, **{"beta": 0.5, **(parameters or {})}),
    )
    grad = None
    if out is not None:
        grad = problem.student.raw if in_place else torch.empty(C, 2 * stride, dtype=out, device="meta")
    statistics = torch.empty(len(Stat), C, device="meta")
    given = GradientWeights(vector if "divergence" in weights else None, vector if "token" in weights else None, policy)
    tile = backend.tiles(problem, device)
    if segments > 1:
        limit = None if device.amd else 128  # two programs on a multiprocessor; left alone 3.9 spills, as in `tiles`
        tile = dataclasses.replace(tile, segments=segments, max_registers=limit)
        return backend.segment_launches(problem, statistics, given, grad, tile, device)[0]
    launch = backend.row_launch(problem, statistics, write, given, grad, tile, device.flush)
    if out is not None:
        launch.constants["ALIASED"] = True  # production's case: the gradient lies on the logits
    return launch


def _policy(per_token: bool) -> Policy:
    """All that a policy can have."""
    scores, vector = torch.empty(len(Stat), C, device="meta"), torch.empty(C, device="meta")
    return Policy(PolicyRule(), vector if per_token else 1.25, scores, scores, vector, vector)


def _linear(
    device: Device,
    dtype: torch.dtype,
    *,
    transform: LogitTransform | None = None,
    precision: str = "ieee",
    rows: int = C,
    hidden: int = H,
    transposed: bool = False,
    tile: dict[str, Any] | None = None,
) -> tuple[Launch, Launch]:
    transform = transform or LogitTransform()
    x = torch.empty(rows, hidden, dtype=dtype, device="meta")
    weight = torch.empty(V, hidden, dtype=dtype, device="meta")
    if transposed:
        weight = torch.empty(hidden, V, dtype=dtype, device="meta").T
    chosen = dataclasses.replace(backend.linear_tiles(x, weight, transform, precision, device), **(tile or {}))
    parts = backend.splits(rows, V, chosen, device)
    return backend.linear_launches(
        x,
        weight,
        transform,
        V,
        torch.empty(rows, dtype=torch.int64, device="meta"),
        torch.empty(parts, 4, rows, device="meta"),
        torch.empty(len(Stat), rows, device="meta"),
        chosen,
        precision,
        False,
        device.flush,
    )


def _exponentials(
    device: Device,
    *,
    transform: LogitTransform | None = None,
    rows: int = C,
    hidden: int = H,
    vocabulary: int = V,
    stride: int | None = None,
    tile: dict[str, Any] | None = None,
) -> tuple[Launch, Launch, Launch, Launch]:
    transform = transform or LogitTransform()
    x = torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device="meta")
    out = torch.empty(rows, stride or row_stride(vocabulary), dtype=torch.bfloat16, device="meta")
    chosen = dataclasses.replace(backend.linear_tiles(x, weight, transform, "ieee", device, out), **(tile or {}))
    parts = backend.splits(rows, vocabulary, chosen, device)
    return backend.exponential_launches(
        x,
        weight,
        transform,
        vocabulary,
        torch.empty(rows, dtype=torch.int64, device="meta"),
        torch.empty(3, rows, device="meta"),
        torch.empty(2, parts, 4, rows, device="meta"),
        out,
        torch.empty(len(Stat), rows, device="meta"),
        chosen,
        "ieee",
        False,
        device.flush,
    )


def launches(target: Target) -> dict[str, Launch]:
    """The configurations production uses, by name, and those that no default chooses: 16 segments, SPECIALISED."""
    d = target.device
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    vector = torch.empty(C, device="meta")
    capped = LogitTransform(0.5, 30.0, 0.7, torch.empty(V, dtype=bf16, device="meta"))
    everything: dict[str, Any] = {"divergence": "jsd", "transform": capped, "per_token_scale": True}
    found = {
        "full fp32, bf16 gradient on the logits": _row(d, (f32,) * 3, divergence="reverse_kl", out=bf16),
        "full fp32, lambda per token": _row(
            d, (f32,) * 3, divergence="reverse_kl", out=bf16, per_token_scale=True, weights="divergence"
        ),
        "full fp32, statistics": _row(d, (f32,) * 3, divergence="reverse_kl"),
        "full fp32, gradient": _row(d, (f32,) * 3, divergence="reverse_kl", out=bf16, write=False),
        "full bf16, in place": _row(d, (bf16,) * 3, divergence="reverse_kl", out=bf16, in_place=True),
        "full fp32 student, bf16 others": _row(d, (f32, bf16, bf16), divergence="reverse_kl", out=bf16),
        "forward_kl fp32": _row(d, (f32,) * 3, divergence="forward_kl", out=bf16),
        "jsd fp32": _row(d, (f32,) * 3, divergence="jsd", out=bf16),
        "jsd bf16, softcap and bias": _row(d, (bf16,) * 3, divergence="jsd", out=bf16, in_place=True, transform=capped),
        "full fp32, softcap and bias": _row(d, (f32,) * 3, divergence="reverse_kl", out=bf16, transform=capped),
        "forward_kl fp32, softcap and bias, lambda per token": _row(
            d, (f32,) * 3, divergence="forward_kl", out=bf16, transform=capped, per_token_scale=True
        ),
        "full fp32, softcap and bias, unaligned rows": _row(
            d, (f32,) * 3, divergence="reverse_kl", out=bf16, transform=capped, stride=50257
        ),
        "full fp32, unaligned rows": _row(d, (f32,) * 3, divergence="reverse_kl", out=bf16, stride=50257),
        "jsd fp32, lambda per token": _row(d, (f32,) * 3, divergence="jsd", out=bf16, per_token_scale=True),
        "jsd fp32, everything": _row(d, (f32,) * 3, out=bf16, **everything),
        "jsd bf16, everything": _row(d, (bf16,) * 3, out=bf16, in_place=True, **everything),
        "jsd fp32, everything, unaligned": _row(d, (f32,) * 3, out=bf16, stride=50257, **everything),
        "jsd bf16, everything, unaligned": _row(d, (bf16,) * 3, out=bf16, in_place=True, stride=50257, **everything),
        "opd (no reference) fp32": _row(d, (f32,) * 2, divergence="reverse_kl", out=bf16),
        "skew_kl fp32": _row(d, (f32,) * 3, divergence="skew_kl", out=bf16),
        "skew_kl fp32, unaligned rows": _row(d, (f32,) * 3, divergence="skew_kl", out=bf16, stride=50257),
        "skew_kl bf16, everything": _row(
            d, (bf16,) * 3, out=bf16, in_place=True, **{**everything, "divergence": "skew_kl"}
        ),
        "skew_reverse_kl fp32, near an end": _row(
            d, (f32,) * 3, divergence="skew_reverse_kl", parameters={"skew": 0.001}, out=bf16
        ),
        "alpha fp32": _row(d, (f32,) * 3, divergence="alpha", out=bf16),
        "alpha fp32, unaligned rows": _row(d, (f32,) * 3, divergence="alpha", out=bf16, stride=50257),
        "alpha bf16, everything": _row(
            d, (bf16,) * 3, out=bf16, in_place=True, **{**everything, "divergence": "alpha"}
        ),
        "mixed fp32": _row(d, (f32,) * 3, divergence="mixed", out=bf16),
        "mixed bf16, in place, weight per token": _row(
            d, (bf16,) * 3, divergence="mixed", parameters={"forward_weight": vector}, out=bf16, in_place=True
        ),
        "sampled fp32": _row(d, (f32,), out=bf16, weights="token"),
        "sampled bf16, in place": _row(d, (bf16,), out=bf16, in_place=True, weights="token"),
        "sampled fp16, statistics": _row(d, (f16,)),
        "sampled fp32, policy": _row(d, (f32,), out=bf16, weights="token", policy=_policy(per_token=False)),
        "sampled bf16, in place, policy, lambda per token": _row(
            d, (bf16,), out=bf16, in_place=True, weights="token", policy=_policy(per_token=True)
        ),
        "full fp32, 16 segments": _row(d, (f32,) * 3, divergence="reverse_kl", out=bf16, segments=16),
        "full bf16, 16 segments": _row(d, (bf16,) * 3, divergence="reverse_kl", out=bf16, segments=16),
        "jsd fp32, 16 segments": _row(d, (f32,) * 3, divergence="jsd", out=bf16, segments=16),
        "sampled fp32, policy, 16 segments": _row(
            d, (f32,), out=bf16, weights="token", policy=_policy(per_token=False), segments=16
        ),
        "policy": backend.policy_launch(
            _policy(per_token=True),
            torch.empty(len(Stat), C, device="meta"),
            torch.empty(len(PolicyStat), C, device="meta"),
        ),
        "losses": backend.losses_launch(
            make("mixed", forward_weight=vector),
            vector,
            (True, True),
            torch.empty(len(Stat), C, device="meta"),
            vector,
        ),
    }
    for name, dtype in (("bf16", bf16), ("fp16", f16), ("fp32", f32)):
        found[f"linear {name}"], found["linear merge"] = _linear(d, dtype)
    found["linear bf16, softcap and bias"] = _linear(d, bf16, transform=capped)[0]
    found["linear bf16, scaled"] = _linear(d, bf16, transform=LogitTransform(temperature=0.7))[0]
    found["linear bf16, H = 1040"] = _linear(d, bf16, hidden=1040)[0]
    found["linear bf16, H = 1000"] = _linear(d, bf16, hidden=1000)[0]
    found["linear bf16, transposed weight"] = _linear(d, bf16, transposed=True)[0]
    found["linear fp32, softcap and bias"] = _linear(d, f32, transform=capped)[0]
    found["linear fp32, softcap, bias, H = 1000"] = _linear(d, f32, transform=capped, hidden=1000)[0]
    found["linear bf16, 2048 rows"] = _linear(d, bf16, rows=2048)[0]
    found["linear bf16, softcap, bias, H = 1000"] = _linear(d, bf16, transform=capped, hidden=1000)[0]
    found["linear bf16, softcap, bias, 64 rows"] = _linear(d, bf16, transform=capped, rows=64)[0]
    found["linear bf16, softcap, bias, 1 row"] = _linear(d, bf16, transform=capped, rows=1)[0]
    found["linear bf16, 64 rows"] = _linear(d, bf16, rows=64)[0]
    found["linear bf16, 1 row"] = _linear(d, bf16, rows=1)[0]
    names = ("token logit", "exponentials", "exponentials, second round", "exponentials merge")
    found |= {f"linear {name}": launch for name, launch in zip(names, _exponentials(d, rows=2048), strict=True)}
    found["linear exponentials, 1024 rows"] = _exponentials(d)[1]
    biased = LogitTransform(temperature=0.7, bias=capped.bias)
    found["linear exponentials, scaled"] = _exponentials(d, transform=LogitTransform(temperature=0.7))[1]
    found["linear exponentials, bias"] = _exponentials(d, transform=biased)[1]
    found["linear exponentials, bias, H = 1004"] = _exponentials(d, transform=biased, hidden=1004)[1]
    found["linear exponentials, V = 50257"] = _exponentials(d, vocabulary=50257)[1]
    found["linear exponentials, bias, V = 50257"] = _exponentials(d, transform=biased, vocabulary=50257)[1]
    found["linear exponentials, unaligned rows"] = _exponentials(d, vocabulary=50257, stride=50257)[1]
    found["linear exponentials, 64 rows"] = _exponentials(d, rows=64)[1]
    found["linear exponentials, 1 row"] = _exponentials(d, rows=1)[1]
    gradient = torch.empty(V, H, device="meta")
    factor, low = torch.empty((), device="meta"), gradient.to(bf16)
    found["scaled gradient"] = backend.scale_launch(gradient, factor, low)
    found["scaled gradient, in place"] = backend.scale_launch(low, factor, low)
    if d.capability == 90:
        deep, wide = ({"warp_specialize": True, "num_warps": 4, "num_stages": n} for n in (4, 3))
        found[SPECIALISED[0]] = _linear(d, bf16, rows=2048, tile=deep)[0]
        found[SPECIALISED[1]] = _exponentials(d, rows=2048, tile=wide)[1]
    if not d.amd:
        found["linear tf32"] = _linear(d, f32, precision="tf32")[0]
    return found


def compile_launch(kernel: str, target_name: str) -> Resources:
    """Compile one launch as Triton's launcher would specialise it on that GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[target_name]
    launch = launches(target)[kernel]
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, name in enumerate(launch.kernel.arg_names):
        divisible = False
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            divisible = True
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            signature[name] = f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            divisible = value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    gpu = GPUTarget(target.backend, target.arch, target.device.warp_size)
    compiled = triton.compile(source, target=gpu, options=launch.options)
    read = _nvidia if target.backend == "cuda" else _amd
    registers, spills, scalar_spills, instructions, assembly = read(compiled.asm)
    threads = re.search(r"^\.reqntid (\d+)", assembly, re.MULTILINE)  # PTX's
    return Resources(
        kernel,
        target_name,
        launch.options["num_warps"] if threads is None else int(threads[1]) // 32,
        registers,
        spills,
        scalar_spills,
        compiled.metadata.shared,
        instructions,
        assembly,
        compiled.asm["ttgir"],
    )


def _nvidia(asm: dict) -> tuple[int, int, int, int, str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    # a spill shows as a stack frame and as local-memory instructions in the machine code
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    spills = int(found[2]) + int(found[3]) + local
    # the code ends in NOPs, which fill it up to a multiple of 128 bytes
    instructions = len(re.findall(r"/\*[0-9a-f]{4,5}\*/(?!\s*NOP\b)", sass))
    return int(found[1]), spills, 0, instructions, asm["ptx"]


def _amd(asm: dict) -> tuple[int, int, int, int, str]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    spills = field("vgpr_spill_count") + field("private_segment_fixed_size")
    return (
        field("vgpr_count"),
        spills,
        field("sgpr_spill_count"),
        len(re.findall(r"^\t[svdgb]\w*_\w+", text, re.M)),
        text,
    )


def resources(pairs: list[tuple[str, str]], processes: int | None = None) -> Iterator[Resources]:
    """Compile (kernel, target) pairs in parallel processes, in order."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "the interpreter compiles nothing"
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        yield from pool.map(compile_launch, *zip(*pairs, strict=True))


_CONVERSION = re.compile(r"ttg\.convert_layout .* : tensor<.*(#\w+)> -> tensor<.*(#\w+)>")


def moving_conversions(ttgir: str) -> list[str]:
    """Changes of layout that move values between threads; not those between two names of one layout.

    Triton 3.8 gives what it loads an order of dimensions of its own. Where a thread, a warp and a program have more
    than one value along one dimension alone, the order of the dimensions says nothing.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*), order = .*\}>$", ttgir, re.MULTILINE))

    def one_dimension(layout: str) -> bool:
        sizes = [[int(n) for n in numbers.split(",")] for numbers in re.findall(r"\[([\d, ]+)\]", layout)]
        return sum(any(n > 1 for n in along) for along in zip(*sizes, strict=True)) <= 1

    def same(old: str, new: str) -> bool:
        return old in layouts and layouts[old] == layouts.get(new) and one_dimension(layouts[old])

    lines = [line for line in ttgir.splitlines() if "ttg.convert_layout" in line]
    found = [(line, _CONVERSION.search(line)) for line in lines]
    return [line for line, match in found if match is None or not same(match[1], match[2])]


def version() -> str:
    """What has to be the same for two tables to be comparable: Triton brings its compilers and assemblers along."""
    import triton

    return str(triton.__version__)


def page(table: dict[str, Any]) -> str:
    """The main rows as Markdown."""

    def cell(row: snapshots.Row) -> str:
        matrix = "" if row["matrix"] == "none" else f", {row['matrix']}"
        return f"{row['warps']} × {row['registers']}, {row['shared'] / 1024:.0f} KiB{matrix}"

    rows = [[kernel, *(cell(table["rows"][kernel][target]) for target in TARGETS)] for kernel in MAIN]
    return snapshots.markdown(["", *TARGETS], rows, numbers=False) + f"\n{table['compiler']}.\n"


def compilers(committed: list[dict[str, Any]]) -> str:
    """What each version of Triton was compiled for, as Markdown."""

    def cell(table: dict[str, Any], target: str) -> str:
        rows = [row[target] for row in table["rows"].values() if target in row]
        spilling = sum(row["spills"] > 0 for row in rows)
        return f"{len(rows)}, {spilling or 'none'} of them, {max(row['registers'] for row in rows)}"

    def specialised(row: snapshots.Row) -> str:
        return f"{row['warps']} × {row['registers']}, {row['shared'] / 1024:.0f} KiB, {row['instructions']}"

    rows = [[table["compiler"], *(cell(table, target) for target in TARGETS)] for table in committed]
    shown = snapshots.markdown(["launches, that spill, most registers", *TARGETS], rows, numbers=False)
    rows = [[t["compiler"], *(specialised(t["rows"][name]["sm_90"]) for name in SPECIALISED)] for t in committed]
    head = ["warps × registers, shared memory, instructions", *(name.removeprefix("linear ") for name in SPECIALISED)]
    return shown + "\n" + snapshots.markdown(head, rows, numbers=False)


def tables() -> dict[str, dict[str, Any]]:
    """The committed tables, by version of Triton."""
    paths = sorted(snapshots.DATA.glob(TABLE.format("*")))
    return {path.stem.split("-")[1]: snapshots.load(path.name) for path in paths}


def pages() -> dict[Path, str]:
    """The pages of the docs that show the committed tables, as they should be."""
    committed = tables()
    regions = {snapshots.PAGE: page(committed[SHOWN]), COMPILERS_PAGE: compilers(list(committed.values()))}
    return {path: snapshots.fill(path.read_text(), "triton_resources", body) for path, body in regions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--kernel", action="append", help="part of a kernel's name")
    parser.add_argument("--dump", type=Path, help="folder for assembly and TTGIR")
    parser.add_argument("--triton", action="append", help="folder of another Triton", metavar="FOLDER")
    parser.add_argument("--processes", type=int, help="how many compile at a time; default as many as there are cores")
    parser.add_argument("--write", action="store_true", help="make the committed tables and their pages in the docs")
    options = parser.parse_args()
    if options.write and (options.target or options.kernel):
        parser.error("--write is for all kernels and targets")
    for folder in options.triton or ():
        rest = [x for i, x in enumerate(sys.argv) if "--triton" not in sys.argv[max(0, i - 1) : i + 1]]
        path = os.pathsep.join([folder, *(p for p in sys.path if p)])
        subprocess.run([sys.executable, *rest], env=os.environ | {"PYTHONPATH": path}, check=True)
    if options.triton:
        return
    pairs = [
        (kernel, target)
        for target in options.target or TARGETS
        for kernel in launches(TARGETS[target])
        if not options.kernel or any(part in kernel for part in options.kernel)
    ]
    print(
        f"{'kernel':54}{'target':8}{'warps':>6}{'registers':>10}{'spills':>8}{'scalar':>8}{'shared':>9}{'instr.':>8}"
        "  matrix",
        flush=True,
    )
    rows: dict[str, dict[str, snapshots.Row]] = {}
    for r in resources(pairs, options.processes):
        rows.setdefault(r.kernel, {})[r.target] = r.row()
        print(
            f"{r.kernel:54}{r.target:8}{r.warps:6}{r.registers:10}{r.spills:8}{r.scalar_spills:8}{r.shared:9}"
            f"{r.instructions:8}  {r.matrix}",
            flush=True,
        )
        if options.dump:
            options.dump.mkdir(parents=True, exist_ok=True)
            stem = re.sub(r"\W+", "_", f"{r.kernel}_{r.target}")
            (options.dump / f"{stem}.asm").write_text(r.assembly)
            (options.dump / f"{stem}.ttgir").write_text(r.ttgir)
    if options.write:
        snapshots.save(TABLE.format(version()), f"Triton {version()}", rows)
        for path, text in pages().items():
            path.write_text(text)


if __name__ == "__main__":
    main()
