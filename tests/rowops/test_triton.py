"""The Triton kernels against the plain PyTorch row operations in float64.

They run on a GPU where there is one, or in Triton's interpreter. The interpreter is chosen when the kernels are first
imported, so the default suite runs this file once more in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import in_parts, row_divergence
from combinations import pairwise
from fused_gopd.loop.chunking import row_stride
from fused_gopd.rowops import GradientWeights, LinearExponentials, LogitTransform, ModelRows, RowProblem, Stat
from fused_gopd.rowops import triton as backend
from fused_gopd.rowops.torch import TorchRowOps
from fused_gopd.rowops.triton import LinearTiles, Tiles, TritonRowOps
from interpreter import DEVICE, INTERPRETED, RUNNABLE, SMALL, passed_when_interpreted
from test_masks import check_rows, problem_of

pytest.importorskip("triton")

INF, NAN = math.inf, math.nan

SMALL_LINEAR = LinearTiles(rows=16, vocabulary=32, hidden=16, group=2, num_warps=4, num_stages=2)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf and NaN in the interpreter


@pytest.fixture
def ops() -> Iterator[TritonRowOps]:
    """The backend; a test that asks for it must have launched a kernel."""
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    before = backend.launches()
    yield TritonRowOps(SMALL, SMALL_LINEAR) if INTERPRETED else TritonRowOps()
    assert backend.launches() > before, "no kernel was launched"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260602)


@pytest.mark.parametrize("part", ["jsd or linear", "not (jsd or linear)"])
@pytest.mark.interpreter
def test_interpreted_suite_passes(part: str) -> None:
    """This file, interpreted, in its own process; in two parts that may run side by side."""
    assert passed_when_interpreted(__file__, "-k", part) > 40


def test_kernels_number_the_statistics_as_the_interface_does() -> None:
    from fused_gopd.rowops.triton import rows

    assert {stat.name: int(stat) for stat in Stat} == {stat.name: getattr(rows, stat.name).value for stat in Stat}


# --- builders and comparison -----------------------------------------------------------------------------------------


def make(
    divergence: str = "reverse_kl",
    *,
    rows: int = 4,
    V: int = 211,
    lam: float | Tensor = 1.25,
    dtype: torch.dtype = torch.float32,
    models: str = "student teacher ref",
    transform: LogitTransform | None = None,
    **parameters: Any,
) -> RowProblem:
    """A problem with logits of a language model's spread; one token id per row, one of them the last column."""
    transform = transform or LogitTransform()
    shared = torch.randn(rows, V, device=DEVICE) * 3
    names = "student" if divergence == "none" else models

    def model(name: str) -> ModelRows | None:
        if name not in names:
            return None
        return ModelRows((shared + torch.randn(rows, V, device=DEVICE)).to(dtype), transform)

    student = model("student")
    assert student is not None
    ids = torch.randint(V, (rows,), device=DEVICE)
    ids[-1] = V - 1
    return RowProblem(V, student, teacher=model("teacher"), ref=model("ref"), reward_scale=lam, token_ids=ids,
                      divergence=row_divergence(divergence, **parameters))  # fmt: skip


def weights_of(rows: int) -> GradientWeights:
    return GradientWeights(torch.rand(rows, device=DEVICE) + 0.5, torch.randn(rows, device=DEVICE))


def in_float64(problem: RowProblem) -> RowProblem:
    def model(m: ModelRows | None) -> ModelRows | None:
        return None if m is None else dataclasses.replace(m, raw=m.raw.double())

    lam = problem.reward_scale
    student = model(problem.student)
    assert student is not None
    return dataclasses.replace(
        problem,
        student=student,
        teacher=model(problem.teacher),
        ref=model(problem.ref),
        reward_scale=lam.double() if isinstance(lam, Tensor) else lam,
    )


def in_float32(problem: RowProblem) -> RowProblem:
    problem64 = in_float64(problem)

    def model(m: ModelRows | None) -> ModelRows | None:
        return None if m is None else dataclasses.replace(m, raw=m.raw.float())

    student = model(problem64.student)
    assert student is not None
    return dataclasses.replace(problem, student=student, teacher=model(problem64.teacher), ref=model(problem64.ref))


def assert_close(actual: Tensor, truth: Tensor, naive: Tensor, what: str, more: float = 0.0) -> None:
    """No further from the float64 truth than four times the plain float32 path, plus 16 units of float32 rounding.

    Both add about log2(V) roundings of the largest magnitude in a row, in different orders: the worst entries of two
    such sums differ by small factors. NaN and infinities must sit where the float32 path has them.
    """
    actual, truth, naive = actual.double(), truth.double(), naive.double()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(test(actual), test(naive)), f"{what}: {kind} in other places"
    finite = torch.isfinite(naive) & torch.isfinite(truth)
    if not finite.any():
        return
    error = (actual - truth)[finite].abs().max().item()
    allowed = 4 * (naive - truth)[finite].abs().max().item()
    allowed += 16 * torch.finfo(torch.float32).eps * max(truth[finite].abs().max().item(), 1e-2) + more
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_statistics_close(actual: Tensor, truth: Tensor, naive: Tensor, more: float = 0.0) -> None:
    """Of a model whose row is poisoned only LOGSUM is defined (NaN): its maximum and token logit are left out."""
    for stat in Stat:
        model = stat.name.partition("_")[2]
        defined = torch.ones_like(naive[stat], dtype=torch.bool)
        if stat.name.startswith(("LOGIT", "MAX")):
            defined = ~naive[Stat[f"LOGSUM_{model}"]].isnan()
        assert_close(actual[stat][defined], truth[stat][defined], naive[stat][defined], stat.name, more)


def check(
    ops: TritonRowOps, problem: RowProblem, weights: GradientWeights | None = None, separately: bool = False
) -> tuple[Tensor, Tensor]:
    """Statistics and gradient agree with float64; if asked, two calls in turn give the bits of the one."""
    weights = weights or weights_of(problem.rows)
    weights64 = GradientWeights(*(None if w is None else w.double() for w in (weights.divergence, weights.token)))
    slow = TorchRowOps()
    out = torch.full((problem.rows, problem.vocab_size), 7.0, device=DEVICE)
    out32, out64 = torch.empty_like(out), torch.empty_like(out, dtype=torch.float64)
    statistics = ops.statistics_and_gradient(problem, weights, out)
    naive = slow.statistics_and_gradient(in_float32(problem), weights, out32)
    truth = slow.statistics_and_gradient(in_float64(problem), weights64, out64)
    assert_statistics_close(statistics, truth, naive)
    assert_close(out, out64, out32, "gradient")
    if separately:
        assert same_bits(ops.statistics(problem), statistics)
        again = torch.full_like(out, 7.0)
        ops.gradient(problem, statistics, weights, again)
        assert same_bits(again, out)
    return statistics, out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included (whose payload no one promises)."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0, INF, -INF), b.nan_to_num(0.0, INF, -INF))


DIVERGENCES = ("none", "reverse_kl", "forward_kl", "jsd")
# One of each branch of the kernel that those do not take: 1e-3 is a mixture near an end, alpha has a form for either
# side of 1/2.
FAMILY: list[tuple[str, dict[str, Any]]] = [
    ("skew_kl", {"skew": 0.1}),
    ("skew_reverse_kl", {"skew": 1e-3}),
    ("alpha", {"alpha": -0.5}),
    ("alpha", {"alpha": 0.999}),
    ("alpha", {"alpha": 2.0}),
    ("mixed", {"forward_weight": 0.3}),
    ("mixed", {"forward_weight": torch.tensor([0.0, 1.0, 0.3, 0.5, 0.7])}),
]


def family_problem(divergence: str, parameters: dict[str, Any]) -> RowProblem:
    """lambda per token, with -inf in every model; the last row is without support."""
    parameters = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in parameters.items()}
    lam = torch.tensor([0.0, 1.0, 1.25, 0.3, 1.5], device=DEVICE)
    problem = make(divergence, rows=5, V=150, lam=lam, **parameters)
    for i, model in enumerate((problem.student, problem.teacher, problem.ref)):
        assert model is not None
        model.raw[:, 3 * i : 150 : 11] = -INF
        model.raw[4] = -INF
    return problem


# --- statistics and gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [*((x, torch.float32) for x in DIVERGENCES), ("reverse_kl", torch.bfloat16), ("jsd", torch.float16)],
    ids=str,
)
def test_agrees_with_float64(ops: TritonRowOps, divergence: str, dtype: torch.dtype) -> None:
    check(ops, make(divergence, dtype=dtype), separately=True)


@pytest.mark.untried
@pytest.mark.parametrize(("divergence", "parameters"), FAMILY)
def test_the_family_agrees_with_float64(ops: TritonRowOps, divergence: str, parameters: dict[str, Any]) -> None:
    """Whole rows, and rows of which each rank has some columns."""
    problem, weights = family_problem(divergence, parameters), weights_of(5)
    statistics, gradient = check(ops, problem, weights, separately=True)
    assert gradient.isfinite().all()
    assert not gradient[4].any()
    assert not statistics[Stat.CENTRE : Stat.VALUE + 1, 4].any()
    weights64 = GradientWeights(*(w.double() for w in (weights.divergence, weights.token)))
    bounds = [(0, 40), (40, 150)]
    truth = in_parts(TorchRowOps(), in_float64(problem), bounds, weights64)
    naive = in_parts(TorchRowOps(), problem, bounds, weights)
    merged, gradient = in_parts(ops, problem, bounds, weights)
    assert_close(merged[Stat.VALUE], truth[0][Stat.VALUE], naive[0][Stat.VALUE], "value")
    assert_close(gradient, truth[1], naive[1], "gradient")


@pytest.mark.untried
@pytest.mark.parametrize(("divergence", "parameters"), FAMILY)
def test_the_family_keeps_nan_to_its_row(ops: TritonRowOps, divergence: str, parameters: dict[str, Any]) -> None:
    problem = family_problem(divergence, parameters)
    for row, model, poison in ((1, problem.student, NAN), (2, problem.teacher, INF), (3, problem.ref, NAN)):
        assert model is not None
        model.raw[row, 148] = poison  # in the support of all models
    weights = GradientWeights(torch.ones(5, device=DEVICE), None)
    _, gradient = check(ops, problem, weights)
    assert gradient[1:4].isnan().any(1).all()
    assert gradient[[0, 4]].isfinite().all()


@pytest.mark.untried
@pytest.mark.parametrize("alpha", [-3.0, -1e-9, 0.5, 0.75, 1.0 + 1e-9, 4.0])
def test_alpha_is_finite_where_its_products_are_not(ops: TritonRowOps, alpha: float) -> None:
    """t^alpha p^(1 - alpha) overflows where one of them is about 0; masks of three sizes in either model and both."""
    problem = make("alpha", rows=3, V=40, models="student teacher", lam=1.0, alpha=alpha)
    assert problem.teacher is not None
    for row, mask in enumerate((-1e3, -1e9, torch.finfo(torch.float32).min)):
        problem.student.raw[row, :30] = mask
        problem.teacher.raw[row, 20:35] = mask
    gradient = torch.empty(3, 40, device=DEVICE)
    statistics = ops.statistics_and_gradient(problem, GradientWeights(torch.ones(3, device=DEVICE), None), gradient)
    assert statistics[Stat.CENTRE : Stat.VALUE + 1].isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("lam", [1.25, "per token"])
def test_the_parts_of_a_vocabulary_make_the_whole(ops: TritonRowOps, divergence: str, lam: Any) -> None:
    if lam == "per token":
        lam = torch.tensor([0.0, 1.0, 1.25, 0.3], device=DEVICE)
    problem = make(divergence, lam=lam)
    for model in (problem.student, problem.teacher, problem.ref):
        if model is not None:
            model.raw[1, 40:60] = -INF
    weights = weights_of(problem.rows)
    weights64 = GradientWeights(*(w.double() for w in (weights.divergence, weights.token)))
    bounds = [(0, 40), (40, 60), (60, 211)]
    truth = in_parts(TorchRowOps(), in_float64(problem), bounds, weights64)
    naive = in_parts(TorchRowOps(), problem, bounds, weights)
    statistics, gradient = in_parts(ops, problem, bounds, weights)
    assert_statistics_close(statistics, truth[0], naive[0])
    assert_close(gradient, truth[1], naive[1], "gradient")


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
@pytest.mark.parametrize("lam", [0.5, 1.5])
def test_reward_scale_as_a_float(ops: TritonRowOps, divergence: str, lam: float) -> None:
    check(ops, make(divergence, lam=lam))


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_reward_scale_per_token_cancels_models_exactly(ops: TritonRowOps, divergence: str) -> None:
    """lambda = 0 must not read the teacher and lambda = 1 not the reference: both hold NaN and -inf there."""
    lam = torch.tensor([0.0, 1.0, 1.25, 0.3, -0.5], device=DEVICE)
    problem = make(divergence, rows=5, lam=lam)
    assert problem.teacher is not None
    assert problem.ref is not None
    problem.teacher.raw[0, ::2], problem.teacher.raw[0, 1::2] = NAN, -INF
    problem.ref.raw[1, ::2], problem.ref.raw[1, 1::2] = -INF, NAN
    statistics, grad = check(ops, problem, separately=True)
    assert grad.isfinite().all()
    assert statistics.isfinite().all()
    assert statistics[Stat.LOGSUM_TEACHER, 0] == 0
    assert statistics[Stat.LOGIT_TEACHER, 0] == 0
    assert statistics[Stat.LOGSUM_REF, 1] == 0
    assert statistics[Stat.LOGIT_REF, 1] == 0


@pytest.mark.parametrize(("models", "lam"), [("student teacher", 1.0), ("student ref", 0.0)])
def test_cancelled_model_may_be_absent(ops: TritonRowOps, models: str, lam: float) -> None:
    problem = make("reverse_kl", models=models, lam=lam)
    statistics, _ = check(ops, problem)
    assert torch.equal(
        statistics[Stat.LOGSUM_REF if lam == 1.0 else Stat.LOGSUM_TEACHER], torch.zeros(4, device=DEVICE)
    )


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_cancelled_model_may_be_given_and_hold_anything(ops: TritonRowOps, lam: float) -> None:
    problem = make("reverse_kl", lam=lam)
    cancelled = problem.teacher if lam == 0.0 else problem.ref
    assert cancelled is not None
    cancelled.raw.fill_(NAN)
    check(ops, problem)


def transforms() -> dict[str, LogitTransform]:
    bias = torch.randn(300)
    return {
        "temperature": LogitTransform(temperature=0.7),
        "scale": LogitTransform(scale=0.25),
        "softcap": LogitTransform(softcap=5.0),
        "bias": LogitTransform(bias=bias),
        "all": LogitTransform(1.7, 3.0, 1.3, bias.bfloat16()),
    }


@pytest.mark.parametrize("divergence", ["none", "reverse_kl", "jsd"])
@pytest.mark.parametrize("name", list(transforms()))
def test_transforms(ops: TritonRowOps, divergence: str, name: str) -> None:
    transform = transforms()[name]
    if transform.bias is not None:
        transform = dataclasses.replace(transform, bias=transform.bias.to(DEVICE))
    problem = make(divergence, transform=transform)
    problem.student.raw[1, 5] = -INF  # stays outside the support through the softcap
    problem.student.raw[2, 7] = 300.0 if transform.softcap else 30.0  # where tanh is 1
    check(ops, problem)


def test_softcap_is_accurate_near_zero(ops: TritonRowOps) -> None:
    """1 - 2 / (e^2x + 1) would lose all digits of logits far below the softcap."""
    problem = make("none", transform=LogitTransform(softcap=1000.0))
    check(ops, dataclasses.replace(problem, student=dataclasses.replace(problem.student, raw=problem.student.raw / 64)))


def test_models_may_differ_in_dtype_and_transform(ops: TritonRowOps) -> None:
    problem = make("reverse_kl")
    assert problem.teacher is not None
    assert problem.ref is not None
    teacher = ModelRows(problem.teacher.raw.bfloat16(), LogitTransform(softcap=20.0))
    ref = ModelRows(problem.ref.raw.half(), LogitTransform(temperature=2.0))
    check(ops, dataclasses.replace(problem, teacher=teacher, ref=ref))


@pytest.mark.parametrize("lam", [0.3, 1.25, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_models_give_exactly_zero(ops: TritonRowOps, lam: float, dtype: torch.dtype) -> None:
    """u = fma(lambda, 0, z_r) = z: the gap and the gradient are 0, not small, and all log-sum-exps are equal."""
    transform = LogitTransform(scale=0.9, temperature=0.7)
    problem = make("reverse_kl", lam=lam, dtype=dtype, transform=transform)
    copies = [dataclasses.replace(problem.student, raw=problem.student.raw.clone()) for _ in range(2)]
    problem = dataclasses.replace(problem, teacher=copies[0], ref=copies[1])
    out = torch.full((problem.rows, problem.vocab_size), 7.0, device=DEVICE)
    weights = GradientWeights(divergence=torch.ones(problem.rows, device=DEVICE))
    statistics = ops.statistics_and_gradient(problem, weights, out)
    assert not statistics[Stat.MEAN_GAP].any()
    assert not out.any()
    for stat in (Stat.LOGSUM_TEACHER, Stat.LOGSUM_REF, Stat.LOGSUM_TARGET):
        assert torch.equal(statistics[stat], statistics[Stat.LOGSUM_STUDENT])
    for divergence in ("forward_kl", "jsd"):
        other = dataclasses.replace(problem, divergence=row_divergence(divergence, beta=0.5))
        statistics = ops.statistics_and_gradient(other, weights, out)
        assert out.abs().max() <= 4e-7
        assert statistics[Stat.VALUE].abs().max() <= 4e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_is_outside_the_support_of_all_models(ops: TritonRowOps, divergence: str) -> None:
    problem = make(divergence, rows=6)
    models = [m for m in (problem.student, problem.teacher, problem.ref) if m is not None]
    for i, model in enumerate(models):
        model.raw[i, i::3] = -INF
        model.raw[3, : 128 + i] = -INF  # a whole tile
        model.raw[4, 1:] = -INF  # one entry left
        model.raw[5] = -INF  # none left
    assert problem.token_ids is not None
    problem.token_ids[4] = 3  # outside the support
    statistics, grad = check(ops, problem)
    assert grad.isfinite().all()
    assert not grad[5].any()
    assert statistics[Stat.LOGSUM_STUDENT, 5] == -INF
    assert statistics[Stat.LOGIT_STUDENT, 4] == -INF


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_bias_of_minus_infinity_is_no_entry(ops: TritonRowOps, divergence: str) -> None:
    """Of a frozen model whose rows have no such token, through a softcap too."""
    problem, biases = make(divergence), {}
    for name, softcap in (("teacher", 4.0), ("ref", None)):
        rows = getattr(problem, name)
        bias = torch.randn(problem.vocab_size, device=DEVICE)
        bias[torch.randperm(problem.vocab_size, device=DEVICE)[:70]] = -INF
        biases[name] = dataclasses.replace(rows, transform=LogitTransform(0.5, softcap, 0.7, bias))
    assert problem.token_ids is not None
    problem = dataclasses.replace(problem, **biases)
    statistics, gradient = check(ops, problem, separately=True)
    outside = torch.stack([x.transform.bias.isneginf() for x in biases.values()]).any(0)
    assert not gradient[:, outside].any()
    assert torch.equal(statistics[Stat.LOGIT_STUDENT].isneginf(), outside[problem.token_ids])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_only_very_negative_logits(ops: TritonRowOps, divergence: str) -> None:
    """A running maximum that starts at 0 would underflow every exponential."""
    problem = make(divergence)
    for model in (problem.student, problem.teacher, problem.ref):
        if model is not None:
            model.raw.sub_(torch.tensor([1e4, 300.0, 0.0, 200.0], device=DEVICE)[:, None])
    statistics, grad = check(ops, problem)
    assert statistics.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_common_offset_costs_no_digits(ops: TritonRowOps, divergence: str) -> None:
    """Logits near 1e4 are 1e-3 apart, and what is formed from their differences is exact all the same."""
    problem = make(divergence)
    offsets = [1e4, -2e4, 3e4]
    models = [m for m in (problem.student, problem.teacher, problem.ref) if m is not None]
    for model, offset in zip(models, offsets, strict=False):
        model.raw.add_(offset)
    check(ops, problem)
    shifted = dataclasses.replace(problem, student=dataclasses.replace(problem.student, raw=models[0].raw - 1e4))
    before, after = ops.statistics(problem), ops.statistics(shifted)
    assert torch.equal(before[Stat.LOGSUM_STUDENT], after[Stat.LOGSUM_STUDENT])


@pytest.mark.parametrize(
    ("divergence", "softcap"), [(d, None) for d in DIVERGENCES] + [("reverse_kl", 5.0), ("jsd", 5.0)]
)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_nan_and_infinity_stay_in_their_row(
    ops: TritonRowOps, divergence: str, softcap: float | None, poison: float
) -> None:
    problem = make(divergence, transform=LogitTransform(softcap=softcap))
    models = [m for m in (problem.student, problem.teacher, problem.ref) if m is not None]
    for i, model in enumerate(models):
        model.raw[i, 150] = poison
    _, grad = check(ops, problem)
    if not (softcap and poison == INF):  # a softcap makes +inf an ordinary logit
        assert grad[: len(models)].isnan().any(1).all()
    assert grad[len(models) :].isfinite().all()


def test_a_row_of_nothing_but_nan(ops: TritonRowOps) -> None:
    """A maximum that drops NaN must not make the row look empty."""
    problem = make("reverse_kl")
    problem.student.raw[1] = NAN
    statistics, grad = check(ops, problem)
    assert statistics[Stat.LOGSUM_STUDENT, 1].isnan()
    assert grad[1].isnan().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weight_of_zero_switches_its_term_off(ops: TritonRowOps, divergence: str) -> None:
    problem = make(divergence)
    problem.student.raw[:3, 7] = NAN
    zero_one = torch.tensor([0.0, 1.0, 0.0, 0.0], device=DEVICE)
    one_zero = torch.tensor([0.0, 0.0, 1.0, 1.0], device=DEVICE)
    _, grad = check(ops, problem, GradientWeights(zero_one, one_zero))
    assert not grad[0].any()
    assert grad[1:3].isnan().any(1).all()
    assert grad[3].isfinite().all()
    problem.student.raw[:3, 7] = 0.0
    check(ops, problem, GradientWeights(None, zero_one))
    check(ops, problem, GradientWeights(zero_one, None))
    _, grad = check(ops, problem, GradientWeights(None, None))
    assert not grad.any()


@pytest.mark.parametrize("V", [1, 7, 128, 1000, 4099])
def test_any_vocabulary_size(ops: TritonRowOps, V: int) -> None:
    if INTERPRETED and V > 1000:
        ops = TritonRowOps(Tiles(4, 64, 4, 1, 1))
    check(ops, make("reverse_kl", V=V, rows=2))
    check(ops, make("jsd", V=V, rows=2))


def test_single_loads_where_rows_are_not_aligned(ops: TritonRowOps) -> None:
    if INTERPRETED:
        ops = TritonRowOps(Tiles(8, 16, 1, 1, 1))
    check(ops, make("reverse_kl", V=211))


def test_rows_with_strides(ops: TritonRowOps) -> None:
    """Row strides beyond V, the same row for all tokens (stride 0), and columns past V that do not exist."""
    problem = make("reverse_kl", V=240)
    assert problem.teacher is not None
    assert problem.ref is not None
    assert problem.token_ids is not None
    wide = torch.full((8, 400), NAN, device=DEVICE)
    wide[::2, :240] = problem.student.raw
    student = ModelRows(wide[::2], problem.student.transform)
    teacher = ModelRows(problem.teacher.raw[:1].expand(4, -1), problem.teacher.transform)
    ids = problem.token_ids.clamp(max=200).repeat_interleave(3)[::3]
    problem = dataclasses.replace(problem, vocab_size=211, student=student, teacher=teacher, token_ids=ids)
    weights = GradientWeights(torch.rand(8, device=DEVICE)[::2], torch.ones(1, device=DEVICE).expand(4))
    check(ops, problem, weights)
    out = torch.full((4, 240), 7.0, device=DEVICE)
    ops.statistics_and_gradient(problem, weights, out)
    assert (out[:, 211:] == 7).all()
    assert not (out[:, :211] == 7).any()


def test_statistics_may_be_a_slice(ops: TritonRowOps) -> None:
    problem, weights = make("reverse_kl"), weights_of(4)
    statistics = ops.statistics(problem)
    wide = torch.full((len(Stat), 9), NAN, device=DEVICE)
    wide[:, 3:7] = statistics
    out, expected = (torch.empty(4, 211, device=DEVICE) for _ in range(2))
    ops.gradient(problem, statistics, weights, expected)
    ops.gradient(problem, wide[:, 3:7], weights, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("divergence", ["none", "reverse_kl", "jsd"])
def test_statistics_are_written_where_the_caller_says(ops: TritonRowOps, divergence: str) -> None:
    problem, weights = make(divergence, V=150), weights_of(4)
    gradient, expected = (torch.empty(4, 150, device=DEVICE) for _ in range(2))
    want = ops.statistics_and_gradient(problem, weights, expected)
    whole = torch.full((len(Stat) + 1, 9), 7.0, device=DEVICE)
    part = whole[:-1, 3:7]
    for call in (
        lambda: ops.statistics(problem, out=part),
        lambda: ops.statistics_and_gradient(problem, weights, gradient, part),
    ):
        whole.fill_(7.0)
        assert call() is part
        assert torch.equal(part, want)
        part.fill_(7.0)
        assert (whole == 7.0).all(), "wrote beside the columns"
    assert torch.equal(gradient, expected)
    for wrong in (whole[:, 3:7], whole[:-1, 3:8], part.double(), whole.T.contiguous().T[:-1, 3:7]):
        with pytest.raises(ValueError, match="statistics must be"):
            ops.statistics(problem, out=wrong)


def test_linear_statistics_are_written_where_the_caller_says(ops: TritonRowOps) -> None:
    hidden, weight, ids = linear_inputs(20, 16, 70)
    want = ops.linear_statistics(hidden, weight, LogitTransform(), 70, ids)
    whole = torch.full((len(Stat) + 1, 25), 7.0, device=DEVICE)
    part = whole[:-1, 3:23]
    assert ops.linear_statistics(hidden, weight, LogitTransform(), 70, ids, part) is part
    assert want is not None
    assert torch.equal(part, want)
    part.fill_(7.0)
    assert (whole == 7.0).all()


def test_weights_may_have_any_stride(ops: TritonRowOps) -> None:
    problem = make("reverse_kl", V=150)
    columns = torch.rand(4, 3, device=DEVICE) + 0.5
    for w_d, w_y in ((columns[:, 0], columns[:, 2]), (columns[0, :1].expand(4), columns[1, 1:2].expand(4))):
        a, b = (torch.empty(4, 150, device=DEVICE) for _ in range(2))
        ops.statistics_and_gradient(problem, GradientWeights(w_d, w_y), a)
        ops.statistics_and_gradient(problem, GradientWeights(w_d.contiguous(), w_y.contiguous()), b)
        assert torch.equal(a, b)


def test_what_is_kept_with_a_models_rows_goes_with_them(ops: TritonRowOps) -> None:
    problem = make("jsd", V=150, transform=LogitTransform(bias=torch.zeros(150, device=DEVICE)))
    ops.statistics(problem)
    found = [weakref.ref(x) for m in (problem.student, problem.teacher, problem.ref) if m for x in (m, m.raw)]
    assert len(found) == 6
    del problem
    assert not any(x() for x in found)


def test_token_ids_out_of_range(ops: TritonRowOps) -> None:
    """NaN in their row's token logits, no probability mass moved, and never a read outside the row."""
    problem = make("reverse_kl", rows=5)
    ids = torch.tensor([-1, 211, 2**40 + 3, -100, 3], device=DEVICE)
    statistics, grad = check(ops, dataclasses.replace(problem, token_ids=ids))
    for stat in (Stat.LOGIT_STUDENT, Stat.LOGIT_TEACHER, Stat.LOGIT_REF):
        assert statistics[stat, :4].isnan().all()
        assert statistics[stat, 4].isfinite()
    assert grad.isfinite().all()


def test_no_token_ids(ops: TritonRowOps) -> None:
    problem = dataclasses.replace(make("reverse_kl"), token_ids=None)
    statistics, _ = check(ops, problem, GradientWeights(torch.ones(4, device=DEVICE), None))
    assert not statistics[Stat.LOGIT_STUDENT : Stat.LOGIT_REF + 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["none", "jsd"])
def test_gradient_on_the_logits_themselves(ops: TritonRowOps, dtype: torch.dtype, divergence: str) -> None:
    problem, weights = make(divergence, dtype=dtype), weights_of(4)
    expected = torch.empty(4, 211, dtype=dtype, device=DEVICE)
    statistics = ops.statistics_and_gradient(problem, weights, expected)
    before = problem.student.raw.clone()
    assert same_bits(ops.statistics_and_gradient(problem, weights, problem.student.raw), statistics)
    assert torch.equal(problem.student.raw, expected)
    problem.student.raw.copy_(before)
    ops.gradient(problem, statistics, weights, problem.student.raw)
    assert torch.equal(problem.student.raw, expected)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_narrow_gradient_over_float32_logits(ops: TritonRowOps, narrow: torch.dtype, divergence: str) -> None:
    problem, weights = make(divergence, V=300), weights_of(4)
    expected = torch.empty(4, 300, dtype=narrow, device=DEVICE)
    statistics = ops.statistics_and_gradient(problem, weights, expected)
    out = problem.student.raw.view(narrow)[:, :300]
    assert out.data_ptr() == problem.student.raw.data_ptr()
    assert same_bits(ops.statistics_and_gradient(problem, weights, out), statistics)
    assert torch.equal(out, expected)


def test_teacher_in_the_student_buffer(ops: TritonRowOps) -> None:
    """Self-distillation may pass one buffer twice; writing the gradient there must not disturb the teacher's reads."""
    problem, weights = make("reverse_kl", models="student teacher", lam=1.0), weights_of(4)
    problem = dataclasses.replace(problem, teacher=problem.student)
    expected = torch.empty(4, 211, device=DEVICE)
    ops.statistics_and_gradient(problem, weights, expected)
    ops.statistics_and_gradient(problem, weights, problem.student.raw)
    assert torch.equal(problem.student.raw, expected)


def test_two_runs_give_the_same_bits(ops: TritonRowOps) -> None:
    problem, weights = make("jsd", rows=3), weights_of(3)
    runs = []
    for _ in range(2):
        out = torch.empty(3, 211, device=DEVICE)
        runs.append((ops.statistics_and_gradient(problem, weights, out), out))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("factor", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scaled_in_place(dtype: torch.dtype, factor: float) -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    x = torch.randn(3, 33333, device=DEVICE).to(dtype)
    want = x * factor
    found = backend.scaled(x, torch.tensor(factor, device=DEVICE), dtype)
    assert found is x
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 4099)])
def test_scaled_is_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    x, factor = torch.randn(shape, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    found, want = backend.scaled(x, factor, dtype), (x * factor).to(dtype)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts off the bits
        torch.testing.assert_close(found, want, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, want)


def test_float64_and_strided_vocabulary_are_refused() -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    problem = make("none")
    with pytest.raises(ValueError, match="float64"):
        TritonRowOps().statistics(in_float64(problem))
    raw = problem.student.raw.t().contiguous().t()
    with pytest.raises(ValueError, match="unit stride"):
        TritonRowOps().statistics(dataclasses.replace(problem, student=ModelRows(raw, LogitTransform())))


def test_no_rows() -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    problem = make("reverse_kl", rows=1)
    none = dataclasses.replace(
        problem,
        student=dataclasses.replace(problem.student, raw=problem.student.raw[:0]),
        teacher=None,
        ref=dataclasses.replace(problem.student, raw=problem.student.raw[:0]),
        reward_scale=0.0,
        token_ids=torch.empty(0, dtype=torch.int64, device=DEVICE),
    )
    out = torch.empty(0, 211, device=DEVICE)
    weights = weights_of(0)
    assert TritonRowOps().statistics_and_gradient(none, weights, out).shape == (len(Stat), 0)


# --- statistics from hidden states -----------------------------------------------------------------------------------


def check_linear(
    ops: TritonRowOps,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    transform: LogitTransform | None = None,
    V: int | None = None,
) -> Tensor:
    transform, V = transform or LogitTransform(), V or weight.shape[0]
    actual = ops.linear_statistics(hidden, weight, transform, V, ids)
    assert actual is not None
    logits64 = hidden.double() @ weight.double().T
    naive_logits = hidden.float() @ weight.float().T
    slow = TorchRowOps()
    truth = slow.statistics(RowProblem(V, ModelRows(logits64, transform), token_ids=ids))
    naive = slow.statistics(RowProblem(V, ModelRows(naive_logits, transform), token_ids=ids))
    assert_statistics_close(actual, truth, naive)
    return actual


def linear_inputs(rows: int, H: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, H, device=DEVICE)
    weight = torch.randn(V, H, device=DEVICE) * (4 / math.sqrt(H))
    ids = torch.randint(V, (rows,), device=DEVICE)
    return hidden.to(dtype), weight.to(dtype), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "H", "V"), [(1, 16, 32), (37, 48, 211), (50, 33, 100), (3, 7, 1)])
def test_linear_statistics_agree_with_float64(ops: TritonRowOps, dtype: torch.dtype, rows: int, H: int, V: int) -> None:
    check_linear(ops, *linear_inputs(rows, H, V, dtype))


@pytest.mark.parametrize("name", list(transforms()))
def test_linear_transforms(ops: TritonRowOps, name: str) -> None:
    transform = transforms()[name]
    if transform.bias is not None:
        bias = transform.bias.to(DEVICE)
        bias[5] = -INF
        transform = dataclasses.replace(transform, bias=bias)
    check_linear(ops, *linear_inputs(18, 32, 99), transform)


def test_linear_strides_and_padding_rows(ops: TritonRowOps) -> None:
    hidden, weight, ids = linear_inputs(20, 32, 120)
    wide_hidden = torch.full((40, 50), NAN, device=DEVICE)
    wide_weight = torch.full((120, 41), NAN, device=DEVICE)
    wide_hidden[::2, 3:35] = hidden
    wide_weight[:, 2:34] = weight
    weight = wide_weight[:, 2:34]
    weight[100:] = NAN  # rows past the joint vocabulary
    ids = ids.clamp(max=99)
    actual = check_linear(ops, wide_hidden[::2, 3:35], weight, ids, V=100)
    column_major = wide_weight[:, 2:34].t().contiguous().t()
    assert torch.equal(check_linear(ops, hidden, column_major, ids, V=100), actual)


def test_linear_token_ids_out_of_range(ops: TritonRowOps) -> None:
    hidden, weight, ids = linear_inputs(20, 16, 70)
    ids[:4] = torch.tensor([-1, 70, 2**40 + 3, -100], device=DEVICE)
    assert check_linear(ops, hidden, weight, ids)[Stat.LOGIT_STUDENT, :4].isnan().all()


def test_linear_nan_and_empty_rows(ops: TritonRowOps) -> None:
    hidden, weight, ids = linear_inputs(20, 16, 70)
    hidden[2] = NAN
    hidden[3, 0] = INF
    actual = check_linear(ops, hidden, weight, ids)
    assert actual[:, 2].isnan().any()
    assert actual[Stat.LOGSUM_STUDENT, 3].isnan()
    nothing = LogitTransform(bias=torch.full((70,), -INF, device=DEVICE))
    hidden[2:4] = 0.0
    empty = check_linear(ops, hidden, weight, ids, nothing)
    assert (empty[Stat.LOGSUM_STUDENT] == -INF).all()
    assert not empty[Stat.MEAN_LOGIT].any()


def test_linear_splits_do_not_change_the_result_beyond_rounding(ops: TritonRowOps) -> None:
    hidden, weight, ids = linear_inputs(33, 32, 300)
    narrow = LinearTiles(32, 32, 32, 1, 4, 2)
    wide = LinearTiles(16, 128, 16, 4, 4, 2)
    results = [
        check_linear(TritonRowOps(linear_tile=tile), hidden, weight, ids) for tile in (narrow, wide, SMALL_LINEAR)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-6, atol=2e-5)
    check_linear(ops, hidden, weight, ids)


# Tiles that nobody gets by default. On a GPU benchmarks/kernels.py checks them, in a process of its own.
SPECIALIZED = LinearTiles(128, 32, 16, 2, num_warps=4, num_stages=2, descriptors=True, warp_specialize=True)
FLAT = dataclasses.replace(SMALL_LINEAR, flatten=True)
EXPLICIT = pytest.mark.parametrize("tile", [SPECIALIZED, FLAT], ids=["warp_specialize", "flatten"])


def plain_tile(tile: LinearTiles) -> LinearTiles:
    return dataclasses.replace(tile, warp_specialize=False, flatten=False)


@EXPLICIT
@pytest.mark.parametrize("splits", [1, 3])
def test_linear_explicit_tiles(ops: TritonRowOps, tile: LinearTiles, splits: int, monkeypatch: Any) -> None:
    """The bits of the same tile without the choice; two tiles of rows, a weight longer than the vocabulary."""
    if not INTERPRETED:
        pytest.skip("a GPU runs them in benchmarks/kernels.py")
    monkeypatch.setattr(backend, "splits", lambda *_: splits)
    hidden, weight, ids = linear_inputs(141, 48, 131, torch.bfloat16)
    ids[:] = torch.randint(0, 77, (141,))
    ids[:4] = torch.tensor([-1, 77, 2**40 + 3, 76], device=DEVICE)
    hidden[5] = NAN
    hidden[140, 3] = INF
    for transform in (LogitTransform(), LogitTransform(temperature=0.7)):
        found, same = (
            check_linear(TritonRowOps(linear_tile=t), hidden, weight, ids, transform, V=77)
            for t in (tile, plain_tile(tile))
        )
        assert torch.equal(found.view(torch.int32), same.view(torch.int32))
    with pytest.raises(ValueError, match="hidden") if tile.warp_specialize else contextlib.nullcontext():
        TritonRowOps(linear_tile=tile).linear_statistics(hidden[:, 1:], weight[:, 1:], transform, 77, ids)
    check_linear(ops, hidden, weight, ids, V=77)


def test_warp_specialisation_is_refused_where_compilers_would_not_do_it() -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    hidden, weight, ids = linear_inputs(3, 16, 20)
    for change in ({"num_warps": 8}, {"rows": 64}, {"descriptors": False}):
        tile = dataclasses.replace(SPECIALIZED, **change)
        with pytest.raises(ValueError, match=re.escape(f"got {tile}")):
            TritonRowOps(linear_tile=tile).linear_statistics(hidden, weight, LogitTransform(), 20, ids)
    for transform in (LogitTransform(softcap=30.0), LogitTransform(bias=torch.zeros(20, device=DEVICE))):
        with pytest.raises(ValueError, match="softcap and bias"):
            TritonRowOps(linear_tile=SPECIALIZED).linear_statistics(hidden, weight, transform, 20, ids)


def test_linear_statistics_decline_what_they_cannot_take() -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    hidden, weight, ids = linear_inputs(3, 16, 20)
    decline = TritonRowOps().linear_statistics
    assert decline(hidden.double(), weight.double(), LogitTransform(), 20, ids) is None
    assert decline(hidden, weight.bfloat16(), LogitTransform(), 20, ids) is None
    none = decline(hidden[:0], weight, LogitTransform(), 20, ids[:0])
    assert none is not None
    assert none.shape == (len(Stat), 0)


# --- exponentials from hidden states ---------------------------------------------------------------------------------

HALF_A_UNIT = 2.0**-8  # largest relative error of rounding to bfloat16


def check_exponentials(
    ops: TritonRowOps,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    transform: LogitTransform | None = None,
    V: int | None = None,
    out: Tensor | None = None,
) -> tuple[LinearExponentials, Tensor]:
    """The statistics are those of the logits, and factor times exponentials is the gradient of -log p[token].

    What a logit relative to the token's own costs: exp(z - o) has the rounding of z - o, half a unit of its magnitude
    d, from the subtraction and from each multiplication by log2 e. Sums of all have it in common with the gradient's
    factor, the log-sum and the mean, which are moved back by d, do not.
    """
    transform, V = transform or LogitTransform(), V or weight.shape[0]
    C = hidden.shape[0]
    out = torch.full((C, weight.shape[0] + 3), 7.0, dtype=torch.bfloat16, device=DEVICE) if out is None else out
    found = ops.linear_exponentials(hidden, weight, transform, V, ids, out)
    assert found is not None
    logits64, logits32 = hidden.double() @ weight.double().T, hidden.float() @ weight.float().T
    slow, token_weight = TorchRowOps(), GradientWeights(token=torch.ones(C, device=DEVICE))
    gradients = [torch.empty(C, V, dtype=x.dtype, device=DEVICE) for x in (logits64, logits32)]
    truth, naive = (
        slow.statistics_and_gradient(
            RowProblem(V, ModelRows(x, transform), token_ids=ids),
            GradientWeights(token=token_weight.token.to(x.dtype)),
            g,
        )
        for x, g in zip((logits64, logits32), gradients, strict=True)
    )
    distance = -truth[Stat.LOGIT_STUDENT].nan_to_num(0.0, 0.0, 0.0)
    distance = torch.where(distance < 64, distance, 0.0).max().item()
    assert_statistics_close(found.statistics, truth, naive, 4 * torch.finfo(torch.float32).eps * distance)
    valid = (ids >= 0) & (ids < V)
    at_token = valid.nonzero()[:, 0], ids[valid]
    assert not out[at_token].nan_to_num().any(), "not 0 at the token"
    actual = found.factor[:, None].double() * out[:, :V].double()
    actual[at_token] = (found.factor.double() * found.entry.double())[valid]
    expected = gradients[0]
    poisoned = gradients[1].isnan().any(1)
    assert torch.equal(actual.isnan(), poisoned[:, None].expand_as(actual)), "a row is NaN as a whole, or not at all"
    usable = ~poisoned
    smallest = 2.0**-100 * expected.abs().nan_to_num(0.0).amax(1, keepdim=True)  # exponentials below 2^-126 are 0
    error, bound = (actual - expected).abs(), 1.01 * HALF_A_UNIT * expected.abs() + smallest
    assert (error <= bound)[usable].all(), (error - bound)[usable].max()
    valid &= usable
    at_token = valid.nonzero()[:, 0], ids[valid]
    assert_close(actual[at_token], gradients[0][at_token], gradients[1][at_token], "entry at the token")
    assert (out[:, V:] == 7.0).all(), "columns past the vocabulary were written"
    return found, out


def bfloat16_inputs(rows: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    return linear_inputs(rows, H, V, torch.bfloat16)


@pytest.mark.untried
@pytest.mark.parametrize(("rows", "H", "V"), [(1, 16, 32), (37, 48, 211), (50, 33, 100), (3, 7, 1), (16, 16, 33)])
def test_linear_exponentials_agree_with_float64(ops: TritonRowOps, rows: int, H: int, V: int) -> None:
    check_exponentials(ops, *bfloat16_inputs(rows, H, V))


@pytest.mark.untried
@pytest.mark.parametrize("name", [name for name in transforms() if transforms()[name].softcap is None])
def test_linear_exponentials_transforms_and_masks(ops: TritonRowOps, name: str) -> None:
    """Masks in the bias, of -inf and finite: exactly 0 there."""
    transform = transforms()[name]
    bias = torch.zeros(99, device=DEVICE) if transform.bias is None else transform.bias.to(DEVICE).float()
    bias[5], bias[6], bias[98] = -INF, -1e9, -1e4
    hidden, weight, ids = bfloat16_inputs(18, 32, 99)
    ids.clamp_(max=97)
    ids[(ids == 5) | (ids == 6)] = 7
    _, out = check_exponentials(ops, hidden, weight, ids, dataclasses.replace(transform, bias=bias))
    assert not out[:, [5, 6, 98]].any()


@pytest.mark.untried
def test_linear_exponentials_decline_what_they_cannot_take() -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    hidden, weight, ids = bfloat16_inputs(3, 16, 20)
    out = torch.empty(3, 20, dtype=torch.bfloat16, device=DEVICE)
    decline = TritonRowOps().linear_exponentials
    plain = LogitTransform()
    assert decline(hidden, weight, LogitTransform(softcap=30.0), 20, ids, out) is None
    assert decline(hidden.float(), weight.float(), plain, 20, ids, out) is None
    assert decline(hidden.half(), weight.half(), plain, 20, ids, out) is None
    assert decline(hidden, weight, plain, 20, ids, out.half()) is None
    none = decline(hidden[:0], weight, plain, 20, ids[:0], out[:0])
    assert none is not None
    assert [x.shape for x in none] == [(len(Stat), 0), (0,), (0,)]


@pytest.mark.untried
def test_linear_exponentials_strides_and_padding_rows(ops: TritonRowOps) -> None:
    hidden, weight, ids = bfloat16_inputs(20, 32, 120)
    wide_hidden = torch.full((40, 50), NAN, dtype=torch.bfloat16, device=DEVICE)
    wide_weight = torch.full((120, 41), NAN, dtype=torch.bfloat16, device=DEVICE)
    wide_hidden[::2, 3:35], wide_weight[:, 2:34] = hidden, weight
    weight = wide_weight[:, 2:34]
    weight[100:] = NAN  # rows past the joint vocabulary
    ids = ids.clamp(max=99)
    found, out = check_exponentials(ops, wide_hidden[::2, 3:35], weight, ids, V=100)
    wide = torch.full((40, 131), 7.0, dtype=torch.bfloat16, device=DEVICE)
    again, _ = check_exponentials(ops, hidden, wide_weight[:, 2:34].t().contiguous().t(), ids, V=100, out=wide[1::2])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(out[:, :100], wide[1::2, :100])
    assert (wide[::2] == 7.0).all()
    statistics = torch.full((len(Stat), 23), 7.0, device=DEVICE)
    into = ops.linear_exponentials(hidden, weight, LogitTransform(), 100, ids, out, statistics[:, 1:21])
    assert into is not None
    assert into.statistics.data_ptr() == statistics[:, 1:].data_ptr()
    assert torch.equal(statistics[:, 1:21], found.statistics)
    assert (statistics[:, [0, 21, 22]] == 7.0).all()


@pytest.mark.untried
def test_linear_exponentials_of_a_peaked_row_keep_their_digits(ops: TritonRowOps) -> None:
    """p of the token is 1 - 1e-5 and nearer to 1: p - 1 is minus the sum of the others, not a difference."""
    hidden, weight, ids = bfloat16_inputs(20, 32, 70)
    bias = torch.zeros(70, device=DEVICE)
    ids[:] = 11
    bias[11] = 30.0
    found, out = check_exponentials(ops, hidden, weight * 0.5, ids, LogitTransform(bias=bias))
    others = torch.cat((out[:, :11], out[:, 12:70]), 1).double().sum(1)
    assert (others < 1e-5).any()
    torch.testing.assert_close(found.entry.double(), -others, rtol=2 * HALF_A_UNIT, atol=0.0)
    assert (found.statistics[Stat.LOGIT_STUDENT] <= found.statistics[Stat.LOGSUM_STUDENT]).all()


@pytest.mark.untried
def test_linear_exponentials_of_an_improbable_token_are_relative_to_the_maximum(ops: TritonRowOps) -> None:
    """Beside rows of the same tile that are not redone, which keep their bits."""
    hidden, weight, ids = bfloat16_inputs(20, 32, 70)
    bias = torch.zeros(70, device=DEVICE)
    bias[[3, 4, 5, 6]] = torch.tensor([-28.0, -70.0, -1e9, -INF], device=DEVICE)
    transform = LogitTransform(bias=bias)
    ids[ids < 7] = 7
    alone, before = check_exponentials(ops, hidden, weight, ids, transform)
    redone = torch.tensor([2, 3, 5, 7, 19], device=DEVICE)
    ids[redone] = torch.tensor([4, 5, 6, 6, 4], device=DEVICE)
    ids[4] = 3
    found, out = check_exponentials(ops, hidden, weight, ids, transform)
    rest = torch.tensor([i for i in range(20) if i not in (2, 3, 4, 5, 7, 19)], device=DEVICE)
    assert torch.equal(out[rest], before[rest])
    assert torch.equal(found.factor[rest], alone.factor[rest])
    assert torch.equal(found.statistics[:, rest], alone.statistics[:, rest])
    assert ((found.factor[redone] <= 1) & (found.factor[redone] >= 1 / 70)).all()
    assert found.factor[4] < 1e-7
    assert (found.statistics[Stat.LOGIT_STUDENT, [5, 7]] == -INF).all()


@pytest.mark.untried
def test_linear_exponentials_token_ids_out_of_range(ops: TritonRowOps) -> None:
    hidden, weight, ids = bfloat16_inputs(20, 16, 70)
    ids[:4] = torch.tensor([-1, 70, 2**40 + 3, -100], device=DEVICE)
    found, out = check_exponentials(ops, hidden, weight, ids)
    assert found.statistics[Stat.LOGIT_STUDENT, :4].isnan().all()
    assert (out[:4, :70] >= 0).all()
    assert not found.entry[:4].any()


@pytest.mark.untried
def test_linear_exponentials_nan_and_empty_rows(ops: TritonRowOps) -> None:
    hidden, weight, ids = bfloat16_inputs(20, 16, 70)
    healthy, clean = check_exponentials(ops, hidden, weight, ids)
    hidden[2] = NAN
    hidden[3, 0] = INF
    found, out = check_exponentials(ops, hidden, weight, ids)
    assert found.statistics[Stat.LOGSUM_STUDENT, 2:4].isnan().all()
    assert found.factor[2:4].isnan().all()
    assert torch.equal(out[4:, :70], clean[4:, :70])
    assert torch.equal(found.factor[4:], healthy.factor[4:])
    infinite = weight.clone()
    infinite[9] = 0.0
    infinite[9, 0] = INF  # logits of +inf and -inf
    check_exponentials(ops, hidden, infinite, ids)
    hidden[2:4] = 0.0
    nothing = LogitTransform(bias=torch.full((70,), -INF, device=DEVICE))
    empty, out = check_exponentials(ops, hidden, weight, ids, nothing)
    assert (empty.statistics[Stat.LOGSUM_STUDENT] == -INF).all()
    assert not out[:, :70].any()
    assert (empty.factor == 1.0).all()


@pytest.mark.untried
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_linear_exponentials_splits_and_tiles(ops: TritonRowOps, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, ids = bfloat16_inputs(33, 32, 300)
    bias = torch.zeros(300, device=DEVICE)
    bias[4] = -70.0
    ids[[3, 32]] = 4
    monkeypatch.setattr(backend, "splits", lambda *_: splits)
    tiles = (LinearTiles(32, 32, 32, 1, 4, 2), LinearTiles(16, 128, 16, 4, 4, 2), SMALL_LINEAR)
    transform = LogitTransform(bias=bias)
    results = [check_exponentials(TritonRowOps(linear_tile=tile), hidden, weight, ids, transform) for tile in tiles]
    for found, out in results[1:]:
        torch.testing.assert_close(found.statistics, results[0][0].statistics, rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(out[:, :300].float(), results[0][1][:, :300].float(), rtol=2.1 * HALF_A_UNIT, atol=0)
    again = check_exponentials(TritonRowOps(linear_tile=tiles[0]), hidden, weight, ids, transform)
    assert torch.equal(again[1], results[0][1])
    check_exponentials(ops, hidden, weight, ids, transform)


@pytest.mark.untried
def test_linear_exponentials_by_the_copy_engine(ops: TritonRowOps) -> None:
    """Its tiles store two halves; rows and columns past the end stay as they are."""
    if not INTERPRETED:
        pytest.skip("a GPU takes such tiles by itself")
    hidden, weight, ids = bfloat16_inputs(20, 32, 77)
    wide = torch.full((23, 80), 7.0, dtype=torch.bfloat16)
    tile = dataclasses.replace(SMALL_LINEAR, descriptors=True)
    found, _ = check_exponentials(TritonRowOps(linear_tile=tile), hidden, weight, ids, out=wide[:20])
    assert (wide[20:] == 7.0).all()
    again, out = check_exponentials(ops, hidden, weight, ids)
    assert torch.equal(wide[:20, :77], out[:, :77])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@EXPLICIT
def test_linear_exponentials_explicit_tiles(ops: TritonRowOps, tile: LinearTiles) -> None:
    """With rows that are redone. Columns past the end stay as they are."""
    if not INTERPRETED:
        pytest.skip("a GPU runs them in benchmarks/kernels.py")
    hidden, weight, ids = bfloat16_inputs(141, 48, 77)
    ids[7:9] = torch.tensor([-1, 77], device=DEVICE)
    weight[:, 0] = -60.0 * (torch.arange(77, device=DEVICE) == 4)
    hidden[:, 0] = 1.0
    ids[[3, 140]] = 4
    results = []
    for t in (tile, plain_tile(tile)):
        wide = torch.full((144, 80), 7.0, dtype=torch.bfloat16, device=DEVICE)
        found, _ = check_exponentials(TritonRowOps(linear_tile=t), hidden, weight, ids, out=wide[:141])
        assert (wide[141:] == 7.0).all()
        results.append((*found, wide))
    assert (results[0][1][[3, 140]] <= 1.0).all()  # relative to their maxima
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*results, strict=True))


# --- only where there is a GPU ---------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("V", [151936, 50257])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_full_vocabulary(ops: TritonRowOps, V: int, divergence: str) -> None:
    check(ops, make(divergence, rows=64, V=V))
    problem, weights = make(divergence, rows=300, V=V), weights_of(300)
    expected = torch.empty(300, V, dtype=torch.bfloat16, device=DEVICE)
    ops.statistics_and_gradient(problem, weights, expected)
    out = problem.student.raw.view(torch.bfloat16)[:, :V]
    ops.statistics_and_gradient(problem, weights, out)
    assert torch.equal(out, expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_than_two_to_the_31_logits(ops: TritonRowOps) -> None:
    V, rows = 151936, 14400  # 2.19e9 elements
    raw = torch.randn(1, V, device=DEVICE, dtype=torch.bfloat16).repeat(rows, 1)
    ids = torch.full((rows,), V - 1, device=DEVICE)
    problem = RowProblem(V, ModelRows(raw, LogitTransform()), token_ids=ids)
    statistics = ops.statistics_and_gradient(problem, GradientWeights(None, torch.ones(rows, device=DEVICE)), raw)
    assert torch.equal(statistics[:, 0], statistics[:, -1])
    assert torch.equal(raw[0], raw[-1])


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_full_size(ops: TritonRowOps, dtype: torch.dtype) -> None:
    check_linear(ops, *linear_inputs(300, 2048, 32003, dtype))


@pytest.mark.untried
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize(
    ("rows", "H", "V"), [(300, 2048, 32003), (1100, 1024, 151936), (64, 1000, 50257), (5, 64, 999)]
)
def test_linear_exponentials_full_size(ops: TritonRowOps, rows: int, H: int, V: int) -> None:
    hidden, weight, ids = linear_inputs(rows, H, V, torch.bfloat16)
    bias = torch.zeros(V, device=DEVICE)
    bias[3] = -70.0
    ids[rows // 2] = 3
    out = torch.empty(rows, row_stride(V), dtype=torch.bfloat16, device=DEVICE)
    out[:, V:] = 7.0
    for transform in (LogitTransform(), LogitTransform(bias=bias), LogitTransform(temperature=0.7)):
        check_exponentials(ops, hidden, weight, ids, transform, out=out)


# --- the whole loss on these kernels ----------------------------------------------------------------------------------

N = 5
PER_TOKEN = {"reward_scale": torch.tensor([0.0, 1.0, 1.25, 0.5, 2.0])}
FUNCTION = {"reward_scale": 1.0, "reward_scale_fn": lambda stats: 1 + stats.teacher_entropy - stats.student_entropy}
DIVERGENCES = {"reward_scale": 1.0, "reward_scale_fn": lambda stats: 2 * (stats.kl_teacher - stats.kl_ref).sigmoid()}
HOOK = {"advantage_fn": lambda stats: stats.advantages * stats.student_entropy + stats.teacher_entropy}
SAMPLED_OPTIONS = [
    {"baseline": "expected"},
    {"old_logprobs": torch.full((N,), -3.0), "clip": (0.2, 0.2), "clip_dual": 3.0},
    {
        "old_logprobs": torch.full((N,), -3.0),
        "ratio": "sequence",
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "reduction": "seq-mean-token-mean",
    },
    {"rollout_logprobs": torch.full((N,), -3.0), "rollout_is_cap": 2.0},
    {
        "rollout_logprobs": torch.full((N,), -3.0),
        "old_logprobs": torch.linspace(-4.0, -2.0, N),
        "rollout_mask": {"token_ratio": (0.5, 2.0)},
    },
    {"rollout_logprobs": torch.full((N,), -3.0), "trust_region": {"token_ratio": (0.5, 2.0)}, "loss_max": 1.0},
    HOOK,
    {"advantage_clip": 0.5, "logprob_min": -4.0},
    {"sft_labels": torch.tensor([1, -100, 3, 4, 0])},
    FUNCTION,
    {"baseline": "expected", **DIVERGENCES},
    {"token_weight": torch.tensor([0.0, 1.0, 1e4, 0.5, 2.0])},
    {"entropy_weight": 0.3, "old_logprobs": torch.full((N,), -3.0), "clip": (0.2, 0.2)},
    {"entropy_weight": 0.3, "kl_ref": "k3", "sft_labels": torch.tensor([1, -100, 3, 4, 0])},
]
OTHER_OPTIONS = [
    {"estimator": "full", "sft_labels": torch.tensor([1, -100, 3, 4, 0]), "sft_weight": 0.5},
    {"estimator": "full", "divergence": "jsd", **PER_TOKEN},
    {"estimator": "full", "divergence": "alpha", "alpha": 1.5},
    {"estimator": "full", "divergence": "mixed", "forward_weight": torch.linspace(0, 1, N)},
    {"estimator": "topk", "k": 7},
    {"estimator": "topk", "k": 7, "support": "student", "tail": "drop", "divergence": "forward_kl"},
    {"estimator": "topk", "k": 7, "tail": "renormalize", "divergence": "jsd", **PER_TOKEN},
    {"estimator": "topk", "k": 7, "sft_labels": torch.tensor([1, -100, 3, 4, 0])},
    {"estimator": "full", "rollout_logprobs": torch.full((N,), -3.0), "rollout_is_cap": (0.5, 2.0)},
    {"estimator": "topk", "k": 7, "rollout_logprobs": torch.full((N,), -3.0), "loss_max": 1.0},
    {"estimator": "topk", "k": 7, "reduction": "none"},
    {"estimator": "topk", "k": 7, "tail": "sampled", **PER_TOKEN},
    {"estimator": "topk", "k": 0, "tail": "sampled"},
    {"estimator": "full", "token_weight": torch.tensor([0.0, 1.0, 1e4, 0.5, 2.0])},
    {"estimator": "full", **DIVERGENCES},
    {"estimator": "full", "divergence": "jsd", "reduction": "none", **FUNCTION},
    {"estimator": "topk", "k": 7, **DIVERGENCES},
    {"estimator": "topk", "k": 7, "entropy_weight": 0.3},
    {
        "estimator": "full",
        "entropy_weight": 0.3,
        "kl_ref": "exact",
        "sft_labels": torch.tensor([1, -100, 3, 4, 0]),
        "sft_temperature": 2.0,
    },
]


@pairwise(options=SAMPLED_OPTIONS + OTHER_OPTIONS, kind=["linear", "logits"], routed=[False, True])
def test_every_option_is_what_plain_pytorch_makes_of_it(kind: str, routed: bool, options: dict[str, Any]) -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    before = backend.launches()
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(N, 24, generator=generator).to(DEVICE) for _ in range(4)]
    weights = [torch.randn(150, 24, generator=generator).to(DEVICE) / 5 for _ in range(4)]
    heads: list[Any] = [fg.LinearHead(h, w) for h, w in zip(hidden, weights, strict=True)]
    if kind == "logits":
        heads[0] = fg.Logits(hidden[0] @ weights[0].T)
    leaves = [t.requires_grad_() for t in heads[0].tensors.values()]
    ids = torch.tensor([3, 9, 4, 140, 77], device=DEVICE)
    given = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    given = {"reward_scale": 1.25, "chunk_size": 3, **given}
    teacher: Any = heads[1]
    if routed:
        teacher, given["teacher_index"] = heads[1:3], torch.tensor([1, 0, 1, 1, 0], device=DEVICE)
    results = []
    for name in ("torch", "triton"):
        out = fg.gopd_loss(heads[0], teacher, heads[3], ids, backend=name, **given)
        results.append((out.token_loss, out.entropy, *torch.autograd.grad(out.loss.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-5 * a.norm().clamp_min(1e-6)
    assert backend.launches() > before


@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
def test_the_cross_entropy_is_what_plain_pytorch_makes_of_it(terms: dict[str, float]) -> None:
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(n, 24, generator=generator).to(DEVICE).requires_grad_() for n in (N, 150)]
    labels = torch.tensor([3, -100, 4, 140, 77], device=DEVICE)
    results = []
    for name in ("torch", "triton"):
        loss = fg.linear_nll(fg.LinearHead(*leaves), labels, backend=name, chunk_size=3, **terms)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-5 * a.norm()


EXPONENTIALS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped ratios": {"old_logprobs": torch.full((N,), -3.0), "clip": (0.2, 0.2), "clip_dual": 3.0},
    "importance": {"old_logprobs": torch.full((N,), -3.0), "rollout_logprobs": torch.full((N,), -2.5)},
    "a hook": HOOK,
    "bounds": {"advantage_clip": 0.5, "logprob_min": -4.0},
    "lambda per token": PER_TOKEN,
    "mask": {"mask": torch.tensor([1, 0, 1, 1, 1])},
    "weights per token": {"cu_seqlens": torch.tensor([0, 2, 5]), "reduction": "seq-mean-token-mean"},
    "vocabulary": {"vocab_size": 145},
}


@pytest.mark.untried
@pytest.mark.parametrize(
    ("name", "trained"),
    [(name, "hidden weight bias") for name in EXPONENTIALS]
    + [(name, trained) for name in ("plain", "mask") for trained in ("hidden", "weight")],
)
def test_store_exponentials_is_what_float64_makes_of_it(name: str, trained: str) -> None:
    """Rounded once where it is stored and once in the result, by half a unit of bfloat16 each; tokens repeat.

    The first product of a chunk overwrites, so there are two chunks, and a second backward gives the same bits.
    """
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(N, 24, generator=generator).bfloat16().to(DEVICE) for _ in range(3)]
    weights = [(torch.randn(150, 24, generator=generator) / 3).bfloat16().to(DEVICE) for _ in range(3)]
    bias = torch.randn(150, generator=generator).bfloat16().to(DEVICE)
    bias[7] = -INF
    ids = torch.tensor([3, 140, 3, 140, 77], device=DEVICE)
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in EXPONENTIALS[name].items()}
    options = {"reward_scale": 1.25, "chunk_size": 3, **options}
    results = {}
    for kind in ("stored", "float64"):
        dtype = torch.float64 if kind == "float64" else torch.bfloat16
        tensors = {"hidden": hidden[0], "weight": weights[0], "bias": bias}
        tensors = {k: v.to(dtype).clone().requires_grad_(k in trained) for k, v in tensors.items()}
        others = [fg.LinearHead(h.to(dtype), w.to(dtype)) for h, w in zip(hidden[1:], weights[1:], strict=True)]
        student = fg.LinearHead(**tensors, temperature=0.7)
        how: dict[str, Any] = {"backend": "torch"} if kind == "float64" else {"backend": "triton"}
        before = backend.launches()
        out = fg.gopd_loss(student, *others, ids, **options, **how, store_exponentials=kind == "stored")
        leaves = [t for t in tensors.values() if t.requires_grad]
        grads = torch.autograd.grad(out.loss, leaves, retain_graph=True)
        if kind == "stored":
            assert backend.launches() >= before + 2 * (2 * 2 + 4)
            again = torch.autograd.grad(out.loss, leaves)
            assert all(same_bits(a, b) for a, b in zip(grads, again, strict=True))
        results[kind] = out, grads
    (out, grads), (truth, exact) = results["stored"], results["float64"]
    for field in ("token_loss", "entropy", "student_logprobs", "advantages"):
        torch.testing.assert_close(getattr(out, field).double(), getattr(truth, field), rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, exact, strict=True):
        assert (a - b).norm() <= HALF_A_UNIT * b.norm()


@pytest.mark.untried
def test_store_exponentials_of_a_token_without_probability() -> None:
    """One whose row is relative to its maximum, and one at -inf, which has no gradient."""
    if not RUNNABLE:
        pytest.skip("no GPU and TRITON_INTERPRET is not set")
    hidden, weight, ids = bfloat16_inputs(4, 24, 70)
    bias = torch.zeros(70, dtype=torch.bfloat16, device=DEVICE)
    ids[:] = torch.tensor([1, 2, 3, 4], device=DEVICE)
    bias[2], bias[3] = -60.0, -INF
    results = []
    for kwargs in ({"store_exponentials": True, "backend": "triton"}, {"backend": "torch"}):
        dtype = torch.float64 if kwargs["backend"] == "torch" else torch.bfloat16
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight)]
        head = fg.LinearHead(*leaves, bias.to(dtype))
        teacher = fg.TokenLogProbs(torch.tensor([-1.0, -2.0, -3.0, -4.0], device=DEVICE, dtype=torch.float64).to(
            torch.float64 if dtype == torch.float64 else torch.float32))  # fmt: skip
        out = fg.gopd_loss(head, teacher, token_ids=ids, reduction="sum", **kwargs)
        results.append((out.student_logprobs, *torch.autograd.grad(out.loss, leaves)))
    torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-5, atol=1e-5)
    assert not results[0][1][2].any()
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert (a - b).norm() <= HALF_A_UNIT * b.norm()


@pytest.mark.untried
def test_store_exponentials_refuses_what_it_has_no_gradient_for() -> None:
    hidden, weight, ids = bfloat16_inputs(4, 24, 70)
    head, teacher = fg.LinearHead(hidden.requires_grad_(), weight), fg.LinearHead(hidden.detach(), weight)

    def refused(match: str, student: Any = head, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            fg.gopd_loss(student, teacher, token_ids=ids, store_exponentials=True, **options)

    refused("store_exponentials needs backend='triton', got 'torch'", backend="torch")
    refused("estimator='sampled', got estimator='full'", estimator="full")
    refused("estimator='sampled', got estimator='topk'", estimator="topk", k=3)
    refused("LinearHead with bfloat16 hidden states as the student, got Logits", fg.Logits(hidden @ weight.T))
    refused("got hidden states of torch.float32", fg.LinearHead(hidden.float(), weight.float()))
    refused("softcap", fg.LinearHead(hidden, weight, softcap=30.0))
    # the first call above was the same but for the softcap, and what it may have is kept
    refused("softcap", fg.LinearHead(hidden, weight, softcap=30.0), backend="torch")
    refused("baseline='expected'", baseline="expected")
    refused("grad_filter", grad_filter=1e-4)
    refused("chunk_dtype", chunk_dtype=torch.bfloat16)
    refused("sft_labels", sft_labels=ids)
    refused("reduction='none'", reduction="none")
    old = torch.full((4,), -3.0, device=DEVICE)
    refused("ratio='sequence'", ratio="sequence", old_logprobs=old, cu_seqlens=torch.tensor([0, 4], device=DEVICE))
    with pytest.raises(TypeError, match="store_exponentials"):
        fg.gopd_loss(head, teacher, token_ids=ids, store_exponentials=1)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_rows_with_large_finite_masks_are_as_good_as_the_naive_path(ops: TritonRowOps, divergence: str) -> None:
    """Some of a lane's first tile have nothing else, or are wider than a tile."""
    for seed in (*range(3, 84, 11), 39):
        check_rows(ops, problem_of(seed, divergence, device=DEVICE))
    problem = problem_of(7, divergence, V=300, device=DEVICE)
    for model in (problem.student, problem.teacher, problem.ref):
        assert model is not None
        model.raw[:, :150] = torch.finfo(torch.float32).min
    check_rows(ops, problem)
