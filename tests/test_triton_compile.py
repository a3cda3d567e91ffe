"""What the compiler makes of the Triton kernels for GPUs that are not there: no spills, shared memory within limits.

Compiles the launches production makes (``triton_resources.launches``) for NVIDIA and AMD targets. Every configuration
is compiled for Hopper, a choice of them for the others, to keep the time bearable.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton_resources import TARGETS, Resources, launches, resources

# Resources depend on the target, not on the machine that compiles; a process that interprets compiles nothing.
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

EVERYWHERE = (
    "full fp32, bf16 gradient on the logits",
    "full bf16, in place",
    "jsd fp32",
    "jsd bf16, softcap and bias",
    "sampled bf16, in place",
    "linear bf16",
    "linear fp32",
    "linear bf16, softcap and bias",
    "linear merge",
)
PAIRS = [(k, t) for t in TARGETS for k in launches(TARGETS[t]) if t == "sm_90" or k in EVERYWHERE]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Resources]:
    return {(r.kernel, r.target): r for r in resources(PAIRS)}


@pytest.mark.parametrize(("kernel", "target"), PAIRS)
def test_nothing_spills(compiled: dict[tuple[str, str], Resources], kernel: str, target: str) -> None:
    """Not a register goes to memory. (AMD's scalar registers may be parked in vector registers.)"""
    r = compiled[kernel, target]
    assert r.spills == 0, r
    assert 0 < r.registers <= (255 if target.startswith("sm") else 512), r


@pytest.mark.parametrize(("kernel", "target"), PAIRS)
def test_shared_memory_fits(compiled: dict[tuple[str, str], Resources], kernel: str, target: str) -> None:
    r = compiled[kernel, target]
    assert r.shared <= TARGETS[target].shared_limit, r


@pytest.mark.parametrize("target", list(TARGETS))
def test_matrix_units_are_used(compiled: dict[tuple[str, str], Resources], target: str) -> None:
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[target]
    for kernel in ("linear bf16", "linear bf16, softcap and bias"):
        assert instruction in compiled[kernel, target].assembly


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
def test_float32_products_do_not_use_tf32(compiled: dict[tuple[str, str], Resources], target: str) -> None:
    assert "tf32" not in compiled["linear fp32", target].assembly


def test_tf32_is_used_where_it_is_allowed(compiled: dict[tuple[str, str], Resources]) -> None:
    assert "tf32" in compiled["linear tf32", "sm_90"].assembly


@pytest.mark.parametrize("target", list(TARGETS))
def test_gradient_on_the_logits_waits_for_the_loads_of_its_tile(
    compiled: dict[tuple[str, str], Resources], target: str
) -> None:
    """In the store loops a barrier stands between the last load of logits and the first store of gradients."""
    barrier, store, load = ("bar.sync", "st.global.", "ld.global.v4")
    if target == "gfx942":
        barrier, store, load = ("s_barrier", "global_store_dwordx2", "global_load_dwordx4")
    lines = compiled["full fp32, bf16 gradient on the logits", target].assembly.splitlines()
    if target != "gfx942":  # statistics are single words, gradients of the full tiles vectors
        store = "st.global.v2"
    stores = [i for i, line in enumerate(lines) if store in line and "//" not in line.split(store)[0]]
    assert stores
    before = lines[: stores[0]]
    last_barrier = max(i for i, line in enumerate(before) if barrier in line)
    last_load = max(i for i, line in enumerate(before) if load in line)
    assert last_load < last_barrier


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
def test_rows_are_loaded_16_bytes_at_a_time(compiled: dict[tuple[str, str], Resources], target: str) -> None:
    for kernel in ("full fp32, bf16 gradient on the logits", "full bf16, in place", "sampled bf16, in place"):
        assembly = compiled[kernel, target].assembly
        assert "ld.global.v4.b32" in assembly
        assert "0x10, 0x10" in assembly or "cp.async.cg.shared.global" in assembly  # the prefetch


def test_no_layout_conversion_in_the_row_kernel(compiled: dict[tuple[str, str], Resources]) -> None:
    """Accumulators stay in the lane that owns them: a conversion would be shared memory and barriers in every tile."""
    for (kernel, target), r in compiled.items():
        if not kernel.startswith("linear"):
            assert "ttg.convert_layout" not in r.ttgir, (kernel, target)


def test_products_are_not_contracted_in_the_row_kernel(compiled: dict[tuple[str, str], Resources]) -> None:
    """Only the fused multiply-adds written in the source: see the first paragraph of rows.py."""
    for (kernel, target), r in compiled.items():
        if target.startswith("sm") and not kernel.startswith("linear"):
            plain = [line for line in r.assembly.splitlines() if "\tmul.f32" in line or "\tadd.f32" in line]
            assert not plain, (kernel, target, plain[:3])


def test_the_table_prints() -> None:
    script = Path(__file__).with_name("triton_resources.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(script), "--target", "sm_90", "--kernel", "linear merge"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "linear merge" in run.stdout
