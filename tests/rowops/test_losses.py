"""The token losses of a divergence from the kernels, against objective/divergences.py.

Tolerance, with eps = 2^-24 (half an ulp) and S = |MEAN_GAP| + |MEAN_TARGET_GAP| + |LOGSUM_STUDENT| + |LOGSUM_TARGET|
+ (1 + 2 |lambda|) (|LOGSUM_TEACHER| + |LOGSUM_REF|): a loss is at most twelve float32 operations, lambda - 1 and the
rounding of w included, on numbers of at most S. It is off by 12 eps S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import row_divergence
from fused_gopd.objective.divergences import Divergence, Mixed
from fused_gopd.rowops import LogitTransform, ModelRows, RowProblem, Stat
from fused_gopd.rowops.torch import TorchRowOps
from interpreter import DEVICE, passed_when_interpreted

INF, NAN = math.inf, math.nan
TRUTH = TorchRowOps()
EPS = 2.0**-24
READ = (Stat.LOGSUM_STUDENT, Stat.LOGSUM_TEACHER, Stat.LOGSUM_REF, Stat.LOGSUM_TARGET, Stat.MEAN_GAP, Stat.VALUE)
NAMES = ("reverse_kl", "forward_kl", "mixed", "jsd", "skew_kl", "skew_reverse_kl", "alpha")
BOTH = (True, True)

# NumPy's warnings, of inf and NaN in the interpreter
pytestmark = [pytest.mark.untried, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.interpreter
def test_interpreted_suite_passes() -> None:
    """This file in Triton's interpreter, which is chosen when the kernels are first imported."""
    assert passed_when_interpreted(__file__) >= 15


def test_kernels_number_the_rows_as_the_interface_does() -> None:
    pytest.importorskip("triton")
    from fused_gopd.rowops.triton import losses

    names = ("LOGSUM_STUDENT", "LOGSUM_TEACHER", "LOGSUM_REF", "LOGSUM_TARGET", "MEAN_GAP", "VALUE", "MEAN_TARGET_GAP")
    assert {name: getattr(losses, name).value for name in names} == {name: int(Stat[name]) for name in names}


def statistics_of(rows: list[list[float]]) -> Tensor:
    """Those of READ, (6, C), as some columns of a larger tensor; what nobody should read is NaN."""
    given = torch.tensor(rows)
    whole = torch.full((len(Stat) + 1, given.shape[1] + 3), NAN)
    found = whole[:-1, 2 : 2 + given.shape[1]]
    found[list(READ)] = given
    return found.to(DEVICE) if DEVICE != "cpu" else found


def random_statistics(C: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = 12 * torch.rand(len(READ), C, generator=generator)
    rows[4:] -= 6
    return statistics_of(rows.tolist())


@dataclass(frozen=True)
class Case:
    divergence: Divergence
    reward_scale: float | Tensor
    has: tuple[bool, bool]
    statistics: Tensor


def check(ops: Any, case: Case) -> Tensor:
    """The losses are those of the formulas in float64; NaN and infinities are where float32 has them."""
    divergence, scale, statistics = case.divergence, case.reward_scale, case.statistics
    got = ops.losses(divergence, scale, case.has, statistics)
    assert got.shape == statistics.shape[1:]
    assert got.dtype == torch.float32
    want32 = TRUTH.losses(divergence, scale, case.has, statistics)
    for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(test(got), test(want32)), f"{name} in other places: {got}, {want32}"
    wide = scale.double() if isinstance(scale, Tensor) else scale
    want = TRUTH.losses(divergence, wide, case.has, statistics.double())
    size = statistics[list(READ)].double().abs().nan_to_num(0.0, 0.0, 0.0)
    size[1:3] *= 1 + 2 * abs(wide)
    there = want32.isfinite() & want.isfinite()
    excess = ((got - want).abs() - 12 * EPS * size.sum(0))[there]
    assert excess.numel() == 0 or excess.max() <= 0, f"{excess.max():.3g} beyond the tolerance"
    empty = torch.isneginf(statistics[Stat.LOGSUM_STUDENT])
    assert not got[empty].any()
    if not isinstance(divergence, Mixed) and divergence.name != "reverse_kl":
        assert not (got < 0).any()
    return got


SCALES = (0.0, 1.0, 0.5, 0.3, 1.25, 2.0, -1.5, 1 + 1e-9)
ORDINARY = st.floats(-30.0, 30.0, width=32)
EXTREME = st.sampled_from([0.0, -INF, INF, NAN, -1e-30, 1e30, -1e30])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    C = draw(st.integers(1, 7))
    value = st.one_of(ORDINARY, EXTREME) if draw(st.booleans()) else ORDINARY
    vector = st.lists(value, min_size=C, max_size=C)

    def per_token(of: st.SearchStrategy[float]) -> Tensor:
        return torch.tensor(draw(st.lists(of, min_size=C, max_size=C)), dtype=torch.float32, device=DEVICE)

    name = draw(st.sampled_from(NAMES))
    divergence = row_divergence(name)
    assert divergence is not None
    if name == "mixed" and draw(st.booleans()):
        divergence = Mixed(per_token(st.sampled_from([0.0, 1.0, 0.3, 0.75])))
    has = draw(st.sampled_from([BOTH, BOTH, (True, False), (False, True)]))
    scale: float | Tensor = draw(st.sampled_from(SCALES))
    if has == BOTH and draw(st.booleans()):
        scale = per_token(st.sampled_from(SCALES))
    return Case(divergence, scale, has, statistics_of([draw(vector) for _ in READ]))


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_losses_are_their_formulas(ops: Any, case: Case) -> None:
    check(ops, case)


@pytest.mark.parametrize("per_token", [False, True], ids=["one lambda", "lambda per token"])
@pytest.mark.parametrize("name", NAMES)
def test_many_tokens_and_none(ops: Any, name: str, per_token: bool) -> None:
    """More than a block of the kernel. The bits of a token do not depend on where it and the statistics lie."""
    C = 301
    divergence: Any = row_divergence(name)
    scale: Any = torch.linspace(-1.0, 2.0, C, device=DEVICE) if per_token else 1.25
    if name == "mixed":
        divergence = Mixed(torch.linspace(0.0, 1.0, C, device=DEVICE))
    statistics = random_statistics(C)
    got = check(ops, Case(divergence, scale, BOTH, statistics))
    assert got.unique().numel() > 100
    part = slice(3, 130)
    own = scale[part] if per_token else scale
    assert torch.equal(ops.losses(divergence.rows(part), own, BOTH, statistics[:, part]), got[part])
    strided = statistics.repeat_interleave(2, -1)[..., ::2]
    scales = scale.repeat_interleave(2)[::2] if per_token else scale
    assert torch.equal(ops.losses(divergence, scales, BOTH, strided), got)
    assert torch.equal(ops.losses(divergence, scale, BOTH, statistics.contiguous()), got)
    none = slice(0, 0)
    own = scale[none] if per_token else scale
    assert ops.losses(divergence.rows(none), own, BOTH, statistics[:, none]).shape == (0,)


def test_one_launch(ops: Any) -> None:
    if ops.name == "torch":
        pytest.skip("the reference")
    if ops.name == "native":
        from fused_gopd import _native

        launches = _native.launches
    else:
        from fused_gopd.rowops.triton import launches
    before = launches()
    ops.losses(row_divergence("mixed"), 1.25, BOTH, random_statistics(5))
    assert launches() == before + 1


def test_rows_without_support_and_diverged_ones(ops: Any) -> None:
    """0 and NaN, of statistics that the backend itself has made; the others are finite."""
    C, V = 5, 40
    generator = torch.Generator().manual_seed(1)
    raws = [3 * torch.randn(C, V, generator=generator).to(DEVICE) for _ in range(3)]
    raws[0][0] = raws[1][1] = raws[2][1] = -INF
    for i, raw in enumerate(raws):
        raw[2 + i, 7] = NAN
    for name in NAMES:
        divergence = row_divergence(name)
        for scale in (1.25, torch.full((C,), 1.25, device=DEVICE)):
            models = [ModelRows(raw, LogitTransform()) for raw in raws]
            statistics = ops.statistics(
                RowProblem(V, models[0], teacher=models[1], ref=models[2], reward_scale=scale, divergence=divergence)
            )
            got = check(ops, Case(divergence, scale, BOTH, statistics))  # type: ignore[arg-type]
            assert got[:2].tolist() == [0, 0]
            assert got[2:].isnan().all()


def test_a_model_that_cancels_does_not_matter(ops: Any) -> None:
    """lambda = 0 does without the teacher, lambda = 1 without the reference, whatever their log-sums are."""
    logsum_p, ok = [2.0] * 4, [1.0, 3.0]
    statistics = statistics_of([logsum_p, [NAN, INF, *ok], [*ok, NAN, -INF], [1.0] * 4, [0.5] * 4, [0.25] * 4])
    lam = torch.tensor([0.0, 0.0, 1.0, 1.0], device=DEVICE)
    got = check(ops, Case(row_divergence("reverse_kl"), lam, BOTH, statistics))  # type: ignore[arg-type]
    assert got.tolist() == [-0.5, 1.5, -0.5, 1.5]
    for scale, part in ((0.0, slice(0, 2)), (1.0, slice(2, 4))):
        got = check(ops, Case(row_divergence("reverse_kl"), scale, BOTH, statistics[:, part]))  # type: ignore[arg-type]
        assert got.tolist() == [-0.5, 1.5]


def test_log_sums_near_the_largest_float_stay_finite(ops: Any) -> None:
    statistics = statistics_of([[1.0] * 2, [-3e38] * 2, [1.0] * 2, [1.0] * 2, [0.5] * 2, [0.25] * 2])
    for scale in (1.25, 2.0, torch.tensor([1.25, -2.0], device=DEVICE)):
        assert ops.losses(row_divergence("reverse_kl"), scale, BOTH, statistics).isfinite().all()


def test_what_no_kernel_has_is_refused(ops: Any) -> None:
    if ops.name == "torch":
        pytest.skip("computes any")

    class Other(type(row_divergence("jsd"))):  # type: ignore[misc]
        kind = "other"

    statistics = random_statistics(3)
    with pytest.raises(ValueError, match=r"other|jsd"):
        ops.losses(Other(0.5), 1.25, BOTH, statistics)
    for name in NAMES:
        with pytest.raises(ValueError, match="teacher or a reference"):
            ops.losses(row_divergence(name), 1.25, (False, False), statistics)
