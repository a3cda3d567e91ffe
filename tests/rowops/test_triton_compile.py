"""What the compiler makes of the Triton kernels for GPUs that are not there: no spills, shared memory within limits.

Compiles all launches of ``triton_resources.launches`` for all NVIDIA and AMD targets, and compares what
they cost with the committed table of the installed Triton, ``data/triton_resources-VERSION.json``.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
import snapshots
import triton_resources
from triton_resources import ACCEPT, RULES, TARGETS, Resources, compile_launch, launches

# Resources depend on the target, not on the machine that compiles; a process that interprets compiles nothing.
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

TABLES = triton_resources.tables()
ROWS = TABLES.get(triton_resources.version(), {}).get("rows", {})  # none of a version that has no table
PAIRS = [(k, t) for t in TARGETS for k in launches(TARGETS[t])]
IN_EVERY_RUN = ("sm_90", "gfx942")  # one of each maker; the others with `make test-kernels`
Compiled = Callable[[str, str], Resources]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Compiles a pair, once per run.

    A worker of pytest-xdist compiles what its own tests ask for, so that the workers share the work; a process alone
    starts as many as there are cores and hands them all pairs of the selected tests in advance. What two workers both
    ask for comes from Triton's cache on disk.
    """
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    with ProcessPoolExecutor(None if alone else 1) as pool:

        @functools.cache
        def submit(kernel: str, target: str) -> Future[Resources]:
            return pool.submit(compile_launch, kernel, target)

        if alone:
            for item in request.session.items:
                if item.name.startswith("test_resources[") and item.path == Path(__file__):
                    submit(*PAIRS[int(item.callspec.params["pair"])])  # type: ignore[attr-defined]
        yield lambda kernel, target: submit(kernel, target).result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(i, id=f"{kernel} on {target}", marks=() if target in IN_EVERY_RUN else pytest.mark.slow)
        for i, (kernel, target) in enumerate(PAIRS)
    ],
)
def test_resources(compiled: Compiled, pair: int) -> None:
    """Nothing in memory that belongs in registers, shared memory within the limit; the row kernel as it is meant; and
    nothing worse than in the committed table.

    AMD's scalar registers may be parked in lanes of vector registers (``scalar_spills``), which is allowed: that is one
    instruction each way and touches no memory (scratch is in ``spills``), and the vector registers it takes are in the
    count. It happens where the constants and addresses of three models exceed the 102 scalar registers.
    """
    kernel, target = PAIRS[pair]
    r = compiled(kernel, target)
    assert r.spills == 0, r
    assert 0 < r.registers <= (255 if target.startswith("sm") else 512), r
    assert r.shared <= TARGETS[target].shared_limit, r
    if not kernel.startswith("linear"):
        # accumulators stay in the lane that owns them: a conversion would be shared memory and barriers in every tile.
        # Known exception: beside unaligned rows the compiler loads the bias, which is aligned, in a layout of its own.
        if not ("unaligned" in kernel and ("bias" in kernel or "everything" in kernel)):
            assert not triton_resources.moving_conversions(r.ttgir), r
        # only the fused multiply-adds written in the source: see the first paragraph of rows.py
        plain = [line for line in r.assembly.splitlines() if "\tmul.f32" in line or "\tadd.f32" in line]
        assert not (target.startswith("sm") and plain), plain[:3]
    if target in ROWS.get(kernel, {}):
        worse, better = snapshots.changes(f"{kernel}, {target}", ROWS[kernel][target], r.row(), RULES)
        assert not worse, "\n".join([*worse, ACCEPT])
        for line in better:
            warnings.warn(f"better than the committed table: {line}", stacklevel=1)


def test_this_triton_has_a_committed_table() -> None:
    if triton_resources.version() not in TABLES:
        pytest.skip(
            f"Triton {triton_resources.version()} has no committed table, only {', '.join(TABLES)} have: its numbers "
            "are held to the absolute limits alone (tests/snapshots.md)"
        )


def test_the_pinned_and_the_newest_triton_have_tables() -> None:
    assert triton_resources.SHOWN in TABLES
    assert {version.rpartition(".")[0] for version in TABLES} >= {"3.6", "3.7", "3.8", "3.9"}


@pytest.mark.parametrize("version", TABLES)
def test_a_committed_table_lists_what_is_launched_and_nothing_spills(version: str) -> None:
    rows = TABLES[version]["rows"]
    listed = {kernel: [t for t in TARGETS if kernel in launches(TARGETS[t])] for kernel, _ in PAIRS}
    assert set(rows) >= set(triton_resources.MAIN)
    missing = snapshots.unmatched(rows, listed)
    assert not missing, "\n".join([*missing, ACCEPT])
    assert not [(kernel, target) for kernel, row in rows.items() for target in row if row[target]["spills"]]


def test_the_pages_show_the_committed_tables() -> None:
    for path, text in triton_resources.pages().items():
        assert path.read_text() == text, ACCEPT


@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_says_whether_multiplies_and_adds_are_fused(target: str) -> None:
    """Triton's own default changes from yes to no in 3.10, and with it the bits."""
    for kernel, launch in launches(TARGETS[target]).items():
        assert "enable_fp_fusion" in launch.options, kernel


def test_conversions_between_names_of_one_layout_move_nothing() -> None:
    def ttgir(old: str, new: str) -> str:
        layouts = f"#blocked = #ttg.blocked<{{{old}}}>\n#blocked1 = #ttg.blocked<{{{new}}}>\n"
        return layouts + "  %1 = ttg.convert_layout %0 : tensor<8x256x1xi1, #blocked> -> tensor<8x256x1xi1, #blocked1>"

    one = "sizePerThread = [1, 1, 1], threadsPerWarp = [1, 32, 1], warpsPerCTA = [1, 8, 1], order = [2, 1, 0]"
    wide = one.replace("[1, 1, 1]", "[1, 1, 4]")
    assert not triton_resources.moving_conversions(ttgir(one, one.replace("2, 1, 0", "1, 2, 0")))
    assert triton_resources.moving_conversions(ttgir(wide, wide.replace("2, 1, 0", "1, 2, 0")))
    assert triton_resources.moving_conversions(ttgir(one, wide))
    assert triton_resources.moving_conversions("ttg.convert_layout %0 : something new")


@pytest.mark.parametrize(
    ("quantity", "better_by"),
    [
        ("warps", 1),
        ("registers", 8),
        ("spills", 4),
        ("scalar_spills", 1),
        ("shared", 1),
        ("instructions", 100),
    ],
)
def test_a_worse_kernel_is_reported(compiled: Compiled, quantity: str, better_by: int) -> None:
    """Against a row that is better in one quantity; against itself there is nothing to report."""
    today = compiled("full fp32, bf16 gradient on the logits", "sm_80").row()
    assert snapshots.changes("here", today, today, RULES) == ([], [])
    committed = {**today, quantity: today[quantity] - better_by}
    line = f"here: {quantity} {committed[quantity]} -> {today[quantity]}"
    assert snapshots.changes("here", committed, today, RULES) == ([line], [])


@pytest.mark.parametrize(("target", "unit"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma")])
def test_a_weaker_matrix_unit_is_reported(compiled: Compiled, target: str, unit: str) -> None:
    today = compiled("linear bf16", target).row()
    assert today["matrix"] == unit
    weaker = {**today, "matrix": triton_resources.MATRIX[triton_resources.MATRIX.index(unit) - 1]}
    worse, _ = snapshots.changes("here", today, weaker, RULES)
    assert worse == [f"here: matrix {unit} -> {weaker['matrix']}"]
    assert snapshots.changes("here", weaker, today, RULES) == ([], [f"here: matrix {weaker['matrix']} -> {unit}"])


def test_lost_prefetching_is_reported_though_it_frees_shared_memory(compiled: Compiled) -> None:
    today = compiled("linear bf16", "sm_90").row()
    lost = {**today, "copies": "none", "shared": 0}
    worse, better = snapshots.changes("here", today, lost, RULES)
    assert worse == ["here: copies cp.async -> none"]
    assert better == [f"here: shared {today['shared']} -> 0"]


@pytest.mark.parametrize("target", list(TARGETS))
def test_matrix_units_are_used(compiled: Compiled, target: str) -> None:
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[target]
    for kernel in ("linear bf16", "linear bf16, softcap and bias"):
        assert instruction in compiled(kernel, target).assembly


@pytest.mark.parametrize("kernel", triton_resources.SPECIALISED)
def test_warps_are_specialised(compiled: Compiled, kernel: str) -> None:
    """One group of 4 warps copies with few registers, two multiply with many; each copy is as large as its buffer.

    Where the compiler does not do it, 4 warps are launched and spill. Other versions' tables have the 12 warps.
    """
    r = compiled(kernel, "sm_90")
    assert r.warps == 12
    assert re.findall(r"setmaxnreg\.dec\S*\s+40;", r.assembly)
    assert len(re.findall(r"setmaxnreg\.inc\S*\s+232;", r.assembly)) == 2
    copies = re.findall(r"async_tma_copy_global_to_local .*tensordesc<(?:tensor<)?(\w+).*memdesc<(\w+)", r.ttgir)
    assert {block for block, _ in copies} == {"64x64xbf16", "256x64xbf16"}
    assert all(block == buffer for block, buffer in copies)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
def test_float32_products_use_tf32_only_where_it_is_allowed(compiled: Compiled, target: str) -> None:
    assert "tf32" not in compiled("linear fp32", target).assembly
    assert "tf32" in compiled("linear tf32", target).assembly


@pytest.mark.parametrize("target", list(TARGETS))
def test_gradient_on_the_logits_waits_for_the_loads_of_its_tile(compiled: Compiled, target: str) -> None:
    """In the store loops a barrier stands between the last load of logits and the first store of gradients."""
    barrier, store, load = ("bar.sync", "st.global.", "ld.global.v4")
    if target == "gfx942":
        barrier, store, load = ("s_barrier", "global_store_dwordx2", "global_load_dwordx4")
    lines = compiled("full fp32, bf16 gradient on the logits", target).assembly.splitlines()
    if target != "gfx942":  # statistics are single words, gradients of the full tiles vectors
        store = "st.global.v2"
    stores = [i for i, line in enumerate(lines) if store in line and "//" not in line.split(store)[0]]
    assert stores
    before = lines[: stores[0]]
    last_barrier = max(i for i, line in enumerate(before) if barrier in line)
    last_load = max(i for i, line in enumerate(before) if load in line)
    assert last_load < last_barrier


@pytest.mark.parametrize("target", list(TARGETS))
def test_segments_are_published_and_awaited_by_the_memory_model(compiled: Compiled, target: str) -> None:
    """One thread raises a row's counter: a barrier before it orders all threads' stores and loads. One thread reads it:
    a barrier after it orders all threads' loads. Triton before 3.9 has no barrier of its own before the former.
    """
    stored, barrier, release, acquire, load = (
        ("st.global", "bar.sync", "atom.global.gpu.release|red.global.gpu.release", "global.gpu.acquire", "ld.volatile")
        if target.startswith("sm")
        # AMD's release writes back the caches before the atomic, its acquire invalidates them after the load
        else ("global_store", "s_barrier", "buffer_wbl2", "buffer_inv", "buffer_load")
    )
    for kernel, phases in (("full fp32, 16 segments", 1), ("jsd fp32, 16 segments", 2)):
        lines = compiled(kernel, target).assembly.splitlines()
        code = [line for line in lines if not line.lstrip().startswith(("//", ";"))]

        def places(words: str, code: list[str] = code) -> list[int]:
            return [i for i, line in enumerate(code) if any(word in line for word in words.split("|"))]

        releases, acquires = places(release), places(acquire)
        assert len(releases) == phases
        assert len(acquires) >= phases
        for i in releases:
            last = max(x for x in places(barrier) if x < i)
            assert last > max(x for x in places(f"{stored}|{load}") if x < i)
        for i in acquires if target.startswith("sm") else []:  # AMD's blocks are not in the order of the program
            assert min(x for x in places(barrier) if x > i) < min(x for x in places(load) if x > i)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
def test_rows_are_loaded_16_bytes_at_a_time(compiled: Compiled, target: str) -> None:
    for kernel in ("full fp32, bf16 gradient on the logits", "full bf16, in place", "sampled bf16, in place"):
        assembly = compiled(kernel, target).assembly
        assert "ld.global.v4.b32" in assembly
        assert "0x10, 0x10" in assembly or "cp.async.cg.shared.global" in assembly  # the prefetch


def test_the_table_prints() -> None:
    script = triton_resources.__file__
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, script, "--target", "sm_90", "--kernel", "linear merge"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "linear merge" in run.stdout
