"""The row kernel with several programs a row (``rowops/triton/segments.py``), which no tile of the package asks for.

As in ``test_triton.py``, on a GPU where there is one, or in Triton's interpreter, which runs the programs one after
another: the first takes all items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from fused_gopd.rowops import GradientWeights, LogitTransform, Policy, PolicyRule, Stat
from fused_gopd.rowops import triton as backend
from fused_gopd.rowops.triton import Device, Tiles, TritonRowOps
from interpreter import DEVICE, RUNNABLE, passed_when_interpreted
from test_triton import INF, NAN, assert_close, check, family_problem, make, same_bits, weights_of

pytest.importorskip("triton")

# NumPy's warnings, of inf and NaN in the interpreter
pytestmark = [pytest.mark.untried, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

ONE = Tiles(repeat=2, lanes=8, vector=2, num_warps=1, stages=1)
if DEVICE == "cuda":
    ONE = Tiles(repeat=1, lanes=256, vector=4, num_warps=8, stages=4)
TILE = dataclasses.replace(ONE, segments=4)
BLOCK = ONE.repeat * ONE.lanes * ONE.vector
V = 4 * BLOCK + 13  # a whole tile for each segment, and for the last one a tail too


@pytest.fixture
def ops() -> Iterator[TritonRowOps]:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    before = backend.launches()
    yield TritonRowOps(TILE)
    assert backend.launches() > before, "no kernel was launched"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261130)


@pytest.mark.interpreter
def test_interpreted_suite_passes() -> None:
    assert passed_when_interpreted(__file__) > 12


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [
        ("none", torch.bfloat16),
        ("reverse_kl", torch.float32),
        ("mixed", torch.bfloat16),
        ("jsd", torch.float32),
        ("alpha", torch.float32),
    ],
    ids=str,
)
def test_agrees_with_float64(ops: TritonRowOps, divergence: str, dtype: torch.dtype) -> None:
    """And the two calls in turn, of which the gradient's has one program a row, give the bits of the one."""
    check(ops, make(divergence, rows=2, V=V, dtype=dtype), separately=True)


def test_segments_may_have_no_columns(ops: TritonRowOps) -> None:
    check(TritonRowOps(dataclasses.replace(TILE, segments=8)), make("reverse_kl", rows=1, V=4 * BLOCK))
    check(ops, make("forward_kl", rows=1, V=BLOCK - 9))  # all of it is the last segment's tail


def test_any_lag_gives_the_same_bits(ops: TritonRowOps) -> None:
    """One row, two rows, and more than there are."""
    problem, weights = make("jsd", rows=3, V=V), weights_of(3)
    found, expected = (torch.empty(3, V, device=DEVICE) for _ in range(2))
    want = ops.statistics_and_gradient(problem, weights, expected)
    for lag_bytes in (1, 12 * V * 2):
        lagging = TritonRowOps(dataclasses.replace(TILE, lag_bytes=lag_bytes))
        assert same_bits(lagging.statistics_and_gradient(problem, weights, found), want)
        assert same_bits(found, expected)


def test_lambda_per_token_and_entries_outside_the_support(ops: TritonRowOps) -> None:
    _, gradient = check(ops, family_problem("mixed", {"forward_weight": 0.3}))
    assert not gradient[4].any()


def test_transforms(ops: TritonRowOps) -> None:
    transform = LogitTransform(1.7, 3.0, 1.3, torch.randn(V, device=DEVICE).bfloat16())
    check(ops, make("reverse_kl", rows=1, V=V, transform=transform))


def test_policies(ops: TritonRowOps) -> None:
    problem = make("none", rows=2, V=V)
    scores = torch.randn(2, len(Stat), 2, device=DEVICE)
    scores[:, Stat.LOGSUM_STUDENT] = 12.0
    policy = Policy(PolicyRule(clip=(0.2, 0.2)), 1.25, *scores)
    weights = GradientWeights(token=torch.rand(2, device=DEVICE), policy=policy)
    found, expected = (torch.empty(2, V, device=DEVICE) for _ in range(2))
    want = TritonRowOps(ONE).statistics_and_gradient(problem, weights, expected)
    statistics = ops.statistics_and_gradient(problem, weights, found)
    # other sums of the same numbers: an eps for each tile of a row
    for a, b in ((statistics, want), (found, expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("divergence", "in_place"), [("mixed", False), ("jsd", True)])
def test_rows_that_need_a_second_look_are_done_by_the_row_kernel(
    ops: TritonRowOps, divergence: str, in_place: bool
) -> None:
    """Masks that leave teacher and reference no entry in common, NaN, inf: in place, the logits must still be there."""
    problem, weights = make(divergence, rows=4, V=V), weights_of(4)
    assert problem.teacher is not None
    assert problem.ref is not None
    problem.teacher.raw[0, : V - 3] = -1e9
    problem.ref.raw[0, V - 3 :] = -1e9
    problem.ref.raw[2, 5] = NAN
    problem.teacher.raw[3, V - 1] = INF
    found, expected = (torch.empty(4, V, device=DEVICE) for _ in range(2))
    want = TritonRowOps(ONE).statistics_and_gradient(problem, weights, expected)
    assert want[Stat.ORIGIN_TARGET, 0] != 0
    if in_place:
        found = problem.student.raw
    statistics = ops.statistics_and_gradient(problem, weights, found)
    rows = [0, 2, 3]
    assert same_bits(statistics[:, rows], want[:, rows])
    assert same_bits(found[rows], expected[rows])
    assert_close(found[1], expected[1].double(), expected[1], "gradient", more=1e-6)


def test_gradient_on_the_logits_themselves(ops: TritonRowOps) -> None:
    problem, weights = make("reverse_kl", rows=2, V=V, dtype=torch.bfloat16), weights_of(2)
    expected = torch.empty(2, V, dtype=torch.bfloat16, device=DEVICE)
    statistics = ops.statistics_and_gradient(problem, weights, expected)
    assert same_bits(ops.statistics_and_gradient(problem, weights, problem.student.raw), statistics)
    assert torch.equal(problem.student.raw, expected)


def test_a_narrow_gradient_over_the_logits_is_refused() -> None:
    """It would lie over logits that other programs have yet to read."""
    problem = make("reverse_kl", V=V)
    out = problem.student.raw.view(torch.bfloat16)[:, :V]
    message = r"with segments=4 a gradient over the logits must have their dtype and strides, torch.float32 .*bfloat16"
    with pytest.raises(ValueError, match=message):
        TritonRowOps(TILE).statistics_and_gradient(problem, weights_of(4), out)


def test_segments_are_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="segments must be a power of two, got 6"):
        TritonRowOps(dataclasses.replace(TILE, segments=6)).statistics(make("none"))


def test_a_third_of_l2_lies_between_the_readings_of_a_row() -> None:
    problem = make("reverse_kl", rows=4, V=1000)
    assert [backend.lag_rows(problem, TILE, Device(l2_bytes=n)) for n in (1, 36_000, 108_000)] == [1, 1, 3]
    assert backend.lag_rows(problem, TILE, Device()) == 4  # there are no more rows
    assert backend.lag_rows(problem, dataclasses.replace(TILE, lag_bytes=24_000), Device()) == 2


def test_no_tile_of_the_package_shares_a_row() -> None:
    """Until hardware has run it."""
    for divergence in ("none", "reverse_kl", "jsd"):
        for capability in (0, 80, 90, 100):
            device = Device(amd=capability == 0, capability=capability)
            assert backend.tiles(make(divergence), device).segments == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after another")
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("segments", [2, 16])
@pytest.mark.parametrize("lag_bytes", [1, None])
def test_programs_that_run_at_a_time_give_the_same_bits(divergence: str, segments: int, lag_bytes: int | None) -> None:
    """More rows than programs, in place, with a lag so short that they wait for one another, and with the usual one."""
    ops = TritonRowOps(dataclasses.replace(TILE, segments=segments, lag_bytes=lag_bytes, programs=4))
    problem, weights = make(divergence, rows=700, V=32_000, dtype=torch.bfloat16), weights_of(700)
    logits, found = problem.student.raw.clone(), []
    for _ in range(5):
        problem.student.raw.copy_(logits)
        statistics = ops.statistics_and_gradient(problem, weights, problem.student.raw)
        found.append((statistics, problem.student.raw.clone()))
    assert all(same_bits(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))
    problem.student.raw.copy_(logits)
    expected = torch.empty_like(logits)
    want = TritonRowOps(ONE).statistics_and_gradient(problem, weights, expected)
    torch.testing.assert_close(found[0][0], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1], expected, rtol=2**-7, atol=1e-6)
