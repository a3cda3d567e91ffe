"""The C++ row kernels against the plain PyTorch ones in float64, and against themselves.

Tolerances. With eps = 2^-23 and M the largest finite magnitude of z, z_q, z_r, u and their gaps in the row:

* a log-sum-exp is rounded to float32 (eps M / 2) after sums whose terms are off by x - shift (|x - shift| <= 8 for
  the terms that matter, so eps / 2 * 8 at the very most) and by exp (eps);
* u and the transforms are a few float32 operations: 2 eps M;
* a mean is a weighted mean of values of size M with weights of relative error eps (M + 4) / 2, from the rounding of the
  exponents: eps M (M + 4) / 2 if the errors all conspired; they do not, the tests allow eps (4 + 4 M);
* an entry of the gradient is p (d - D) w: relative error of p, error of d and D: eps (4 + 4 M) (1 + p M) |w|, and
  half an ulp of the output's dtype;
* the sums of the alpha divergence are of s = p^(1 - alpha) t^alpha, whose exponent is at most 1 + |alpha| times M, and
  s can be far above 1: the errors are (1 + |alpha|) sum s / |alpha| times as large, and 1 / |1 - alpha| in VALUE.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_gopd.objective import combination
from fused_gopd.objective.divergences import make as make_divergence
from fused_gopd.rowops import GradientWeights, LogitTransform, ModelRows, RowProblem, Stat, SumTerm, composite
from fused_gopd.rowops import native as native_backend
from fused_gopd.rowops.torch import TorchRowOps

if (_reason := native_backend.unavailable_reason()) is not None:
    pytest.skip(_reason, allow_module_level=True)

_native = native_backend._load()
NATIVE, TRUTH = native_backend.NativeRowOps(), TorchRowOps()
EPS = 2.0**-23
REPO = Path(__file__).resolve().parents[2]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [1, 7, 16, 211, 1000, 4099]
PLAIN = LogitTransform()
JOINT = {
    "reverse_kl": make_divergence("reverse_kl"),
    "forward_kl": make_divergence("forward_kl"),
    "mixed": make_divergence("mixed", forward_weight=0.3),
    "jsd": make_divergence("jsd", beta=0.3),
    "jsd near an end": make_divergence("jsd", beta=0.9999),
    "skew_kl": make_divergence("skew_kl", skew=0.1),
    "skew_kl near an end": make_divergence("skew_kl", skew=1e-4),
    "skew_reverse_kl": make_divergence("skew_reverse_kl", skew=0.4),
    "alpha below 0": make_divergence("alpha", alpha=-0.5),
    "alpha near 0": make_divergence("alpha", alpha=1e-6),
    "alpha": make_divergence("alpha", alpha=0.3),
    "alpha above 1": make_divergence("alpha", alpha=2.0),
}
DIVERGENCES = {"none": None} | JOINT
TWO_ROUNDS = {name: x for name, x in JOINT.items() if x.second_round}


# ---------------------------------------------------------------------------------------------------------- builders


def make_rows(rows: int, vocab: int, seed: int, *, dtype=torch.float32, scale=3.0, transform=PLAIN, pad=3, offset=1):
    """Logits in a wider buffer whose first column is not aligned to a vector."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(rows, offset + vocab + pad, generator=generator).mul_(scale).to(dtype)
    return ModelRows(raw[:, offset:], transform)


def make_problem(rows=5, vocab=211, *, models="qr", divergence="reverse_kl", reward_scale=1.25, seed=0, **kwargs):
    student = make_rows(rows, vocab, seed, **kwargs)
    teacher = make_rows(rows, vocab, seed + 1, **kwargs) if "q" in models else None
    ref = make_rows(rows, vocab, seed + 2, **kwargs) if "r" in models else None
    token_ids = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    return RowProblem(
        vocab,
        student,
        teacher=teacher,
        ref=ref,
        reward_scale=reward_scale,
        token_ids=token_ids,
        divergence=DIVERGENCES[divergence],
    )


def make_weights(rows: int, *, divergence=True, token=True) -> GradientWeights:
    ramp = torch.linspace(0.5, 1.5, rows)
    return GradientWeights(ramp if divergence else None, -0.7 * ramp if token else None)


def models_of(problem: RowProblem) -> list[ModelRows]:
    return [m for m in (problem.student, problem.teacher, problem.ref) if m is not None]


def map_models(problem: RowProblem, function) -> RowProblem:
    def mapped(m):
        return None if m is None else function(m)

    student, teacher, ref = (mapped(m) for m in (problem.student, problem.teacher, problem.ref))
    return dataclasses.replace(problem, student=student, teacher=teacher, ref=ref)


def unused(problem: RowProblem) -> RowProblem:
    """The same with models that no call has seen."""
    return map_models(problem, lambda m: ModelRows(m.raw, m.transform))


def in_double(problem: RowProblem) -> RowProblem:
    wide = map_models(problem, lambda m: ModelRows(m.raw.double(), m.transform))
    lam = problem.reward_scale
    # a float lambda is a float32 to the kernels, and so are the values of a tensor
    lam = lam.double() if isinstance(lam, Tensor) else float(np.float32(lam))
    return dataclasses.replace(wide, reward_scale=lam)


def truth_of(problem: RowProblem, weights: GradientWeights) -> tuple[Tensor, Tensor]:
    wide = in_double(problem)
    statistics = TRUTH.statistics(wide)
    gradient = torch.full((problem.rows, problem.vocab_size), math.nan, dtype=torch.float64)
    double_weights = GradientWeights(*(None if w is None else w.double() for w in (weights.divergence, weights.token)))
    TRUTH.gradient(wide, statistics, double_weights, gradient)
    return statistics, gradient


def magnitude(problem: RowProblem) -> float:
    """M of the module's docstring, over the whole problem."""
    lam = problem.reward_scale
    lam = float(lam.abs().max()) if isinstance(lam, Tensor) else abs(float(lam))
    largest = 0.0
    for model in models_of(problem):
        t = model.transform
        x = model.raw[:, : problem.vocab_size].double()
        x = x + (0 if t.bias is None else t.bias[: problem.vocab_size].double())
        x = x[x.isfinite()] * t.scale
        z = x if t.softcap is None else t.softcap * torch.tanh(x / t.softcap)
        largest = max(largest, float((z / t.temperature).abs().max()) if z.numel() else 0.0)
    return 2.0 * largest * (1.0 + (2.0 * lam if problem.teacher or problem.ref else 0.0))


def growth(problem: RowProblem, expected: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Of the error in CENTRE and the gradient, and in VALUE: of the module's docstring, per row."""
    if problem.divergence is None or problem.divergence.kind != "alpha":
        return 1.0, 1.0
    alpha = problem.divergence.alpha
    total = 1 + alpha * (alpha - 1) * expected[Stat.VALUE].nan_to_num(0.0)  # sum s
    grown = (1 + abs(alpha)) * total / abs(alpha)
    return grown, grown / abs(1 - alpha)


def assert_close(actual: Tensor, expected: Tensor, tolerance, what: str) -> None:
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: finite in different places"
    odd = (actual[~finite], expected[~finite])
    assert torch.equal(odd[0].nan_to_num(7.0, 8.0, 9.0), odd[1].nan_to_num(7.0, 8.0, 9.0)), f"{what}: {odd}"
    excess = ((actual - expected).abs() - tolerance)[finite]
    assert excess.numel() == 0 or excess.max() <= 0, f"{what}: {excess.max():.3g} beyond the tolerance"


def check(problem: RowProblem, weights: GradientWeights, out: Tensor | None = None) -> None:
    """Statistics and gradient agree with the truth, and the fused call gives the bits of the two."""
    expected_statistics, expected_gradient = truth_of(problem, weights)
    M, V = magnitude(problem), problem.vocab_size
    statistics = NATIVE.statistics(problem)
    grown, of_value = growth(problem, expected_statistics)
    for stat in Stat:
        tolerance = EPS * (4 + 4 * M) * {Stat.CENTRE: grown, Stat.VALUE: of_value}.get(stat, 1.0)
        assert_close(statistics[stat], expected_statistics[stat], tolerance, stat.name)
    wide = torch.full((problem.rows, V + 2), 55.0, dtype=torch.float32 if out is None else out.dtype)
    two_calls = wide[:, :V]
    NATIVE.gradient(problem, statistics, weights, two_calls)
    assert (wide[:, V:] == 55.0).all(), "wrote past the vocabulary"

    size = sum(w.abs()[:, None].double() for w in (weights.divergence, weights.token) if w is not None)
    t = problem.student.transform
    slope = abs(t.scale) / t.temperature
    narrow = torch.finfo(two_calls.dtype)
    rounding = expected_gradient.abs() * narrow.eps / 2 + narrow.tiny * narrow.eps
    grown = grown[:, None] if isinstance(grown, Tensor) else grown
    tolerance = EPS * (4 + 4 * M) * (1 + M) * grown * size * slope + 1.01 * rounding  # p <= 1
    assert_close(two_calls, expected_gradient, tolerance, "gradient")

    fused = torch.full_like(two_calls, 55.0) if out is None else out
    fused_statistics = NATIVE.statistics_and_gradient(problem, weights, fused)
    assert bits(fused_statistics) == bits(statistics)
    assert bits(fused[:, :V]) == bits(two_calls)


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


# --------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_agrees_with_float64(vocab, divergence):
    models = "" if divergence == "none" else "qr"
    check(make_problem(vocab=vocab, models=models, divergence=divergence), make_weights(5))


@pytest.mark.parametrize("divergence", JOINT)
def test_a_cancelled_model_does_not_matter(divergence):
    for models, lam in (("q", 1.0), ("r", 0.0), ("qr", 1.0), ("qr", 0.0), ("qr", 0.4), ("q", 1.5)):
        problem = make_problem(models=models, divergence=divergence, reward_scale=lam)
        if models == "qr" and lam in (0.0, 1.0):
            (problem.ref if lam == 1.0 else problem.teacher).raw.fill_(math.nan)
        check(problem, make_weights(5))


def test_the_weight_of_the_forward_kl_may_be_one_per_row():
    weights = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.3])
    problem = make_problem(divergence="mixed")
    check(dataclasses.replace(problem, divergence=make_divergence("mixed", forward_weight=weights)), make_weights(5))


@pytest.mark.parametrize("divergence", TWO_ROUNDS)
def test_the_second_round_of_parts_of_a_vocabulary_adds_up(divergence):
    """Also where the statistics of the whole are not those of a row without holes."""
    problem = make_problem(vocab=2099, divergence=divergence)
    problem.teacher.raw[1, ::3] = -math.inf
    expected, M = truth_of(problem, make_weights(5))[0], magnitude(problem)
    statistics = NATIVE.statistics(problem)
    ends = (0, 1, 700, 1724, 2099)
    total = torch.zeros(2, 5)
    for start, stop in itertools.pairwise(ends):
        part = map_models(problem, lambda m, at=slice(start, stop): ModelRows(m.raw[:, at], m.transform))
        total += NATIVE.second_round(dataclasses.replace(part, vocab_size=stop - start), statistics)
    for value, stat, grown in zip(total, (Stat.CENTRE, Stat.VALUE), growth(problem, expected), strict=True):
        assert_close(value, expected[stat], EPS * (4 + 4 * M) * grown, stat.name)


def test_a_model_is_cancelled_row_by_row():
    problem = make_problem(rows=6, reward_scale=torch.tensor([0.0, 1.0, 0.5, 1.25, 1.0, 0.0]))
    problem.teacher.raw[0] = math.nan
    problem.ref.raw[1, ::2] = -math.inf
    problem.ref.raw[4] = math.inf
    check(problem, make_weights(6))


@pytest.mark.parametrize("student", FLOATS)
@pytest.mark.parametrize("others", FLOATS)
@pytest.mark.parametrize("out", FLOATS)
def test_dtypes_mix(student, others, out):
    problem = dataclasses.replace(make_problem(vocab=1061, dtype=others), student=make_rows(5, 1061, 7, dtype=student))
    check(problem, make_weights(5), torch.empty(5, 1061, dtype=out))


# After the first block of 1024, which finds the maxima, whole blocks of 16-bit logits are read and written where they
# lie, two vectors at a time. Here these are the second block and, of 96 entries, the third one.
BLOCKS = 2144


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_whole_blocks_of_16_bits(dtype, divergence):
    """The sampled tokens are an even and an odd entry, and one of each block."""
    problem = make_problem(
        vocab=BLOCKS, models="" if divergence == "none" else "qr", divergence=divergence, dtype=dtype
    )
    problem.token_ids.copy_(torch.tensor([1024, 1025, 2047, 2048, 5]))
    weights = make_weights(5)
    check(problem, weights, torch.empty(5, BLOCKS, dtype=dtype))
    without_token = dataclasses.replace(weights, token=None)
    check(problem, without_token, torch.empty(5, BLOCKS, dtype=dtype))
    expected = torch.empty(5, BLOCKS, dtype=dtype)
    NATIVE.statistics_and_gradient(problem, without_token, expected)
    in_place = problem.student.raw[:, :BLOCKS]
    NATIVE.statistics_and_gradient(problem, without_token, in_place)
    assert bits(in_place) == bits(expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_whole_blocks_of_16_bits_with_what_no_logit_is(dtype, divergence):
    """A hole, +inf, NaN and a logit far above the maximum so far; the gradient is that in float32, rounded."""
    problem = make_problem(
        rows=8, vocab=BLOCKS, models="" if divergence == "none" else "qr", divergence=divergence, dtype=dtype
    )
    for row, odd in enumerate((-math.inf, math.inf, math.nan, 30.0)):
        models_of(problem)[0].raw[2 * row, 1024 + row] = odd
        models_of(problem)[-1].raw[2 * row + 1, 2048 + row] = odd
    weights = make_weights(8)
    check_like_float32(problem, weights)
    wide, narrow, fused = (torch.empty(8, BLOCKS, dtype=x) for x in (torch.float32, dtype, dtype))
    NATIVE.gradient(problem, NATIVE.statistics(problem), weights, wide)
    NATIVE.gradient(problem, NATIVE.statistics(problem), weights, narrow)
    NATIVE.statistics_and_gradient(problem, weights, fused)
    torch.testing.assert_close(narrow, wide.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fused, narrow, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", ["divergence", "token", "reward_scale"])
def test_a_nan_of_all_ones_stays_nan_when_it_is_rounded(where):
    ones = torch.full((5,), -1, dtype=torch.int32).view(torch.float32)
    problem, weights = make_problem(vocab=BLOCKS, dtype=torch.bfloat16), make_weights(5)
    if where == "reward_scale":
        problem = dataclasses.replace(problem, reward_scale=ones)
    else:
        weights = dataclasses.replace(weights, **{where: ones})
    out = torch.empty(5, BLOCKS, dtype=torch.bfloat16)
    NATIVE.statistics_and_gradient(problem, weights, out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    "transform",
    [
        LogitTransform(scale=0.3),
        LogitTransform(temperature=0.7),
        LogitTransform(softcap=5.0),
        LogitTransform(scale=2.0, softcap=30.0, temperature=1.3),
        LogitTransform(scale=-1.5, softcap=4.0, bias=torch.linspace(-2, 2, 1100)),
        LogitTransform(bias=torch.linspace(-2, 2, 1063, dtype=torch.float64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_transforms(transform, dtype):
    problem = make_problem(vocab=1063, dtype=dtype, transform=transform)
    raw = problem.student.raw
    raw[0, 3] = -math.inf if transform.scale > 0 else math.inf  # stays -inf through the softcap
    check(problem, make_weights(5))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_is_outside_the_support(divergence):
    problem = make_problem(rows=8, vocab=2100, divergence=divergence, models="" if divergence == "none" else "qr")
    everyone = models_of(problem)
    everyone[0].raw[0, 5] = -math.inf
    everyone[-1].raw[1, 1500:] = -math.inf
    everyone[len(everyone) // 2].raw[2, :1100] = -math.inf  # the first block has no support at all
    for model in everyone:
        model.raw[3, ::2] = -math.inf
    everyone[0].raw[4] = -math.inf  # an empty row
    everyone[-1].raw[5] = -math.inf
    for row, token in ((0, 5), (1, 1600), (2, 3), (3, 1), (4, 0)):
        problem.token_ids[row] = token
    check(problem, make_weights(8))
    weights, statistics = make_weights(8), NATIVE.statistics(problem)
    gradient = torch.full((8, 2100), math.nan)
    NATIVE.gradient(problem, statistics, weights, gradient)
    assert (gradient[4:6] == 0).all()
    assert (statistics[Stat.LOGSUM_STUDENT, 4:6] == -math.inf).all()
    assert gradient[0, 5] == 0
    assert statistics[Stat.LOGIT_STUDENT, 0] == -math.inf


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["student", "teacher", "ref"])
@pytest.mark.parametrize("divergence", JOINT)
def test_nan_and_infinity_reach_the_statistics(poison, model, divergence):
    problem = make_problem(rows=6, vocab=2051, divergence=divergence)
    for row, column in enumerate((0, 999, 1030, 2050), start=1):
        getattr(problem, model).raw[row, column] = poison
    check_like_float32(problem, make_weights(6))


@pytest.mark.parametrize("divergence", JOINT)
def test_masks_near_the_largest_float_and_weights_above_one_stay_finite(divergence):
    """Products of a weight and a logit difference, and powers of t / p, are beyond float32; in the last row logits are
    that far apart. The fused call, which knows of rows that have no -inf, gives the same.
    """
    problem = make_problem(rows=10, vocab=1100, divergence=divergence)
    for row, (model, mask) in enumerate(itertools.product(models_of(problem), (-1e9, -3.3e38))):
        model.raw[row, row::7] = mask
    problem.student.raw[6, ::5] = problem.teacher.raw[6, 2::5] = problem.ref.raw[6, 1::5] = -3.3e38
    problem.student.raw[7] *= 1e3
    problem.student.raw[8:, 5] = 3.3e38
    problem.student.raw[9, 7::2] = -3.3e38
    statistics, out = NATIVE.statistics(problem), torch.empty(10, 1100)
    for weights in (GradientWeights(torch.full((10,), w), torch.ones(10)) for w in (-40.0, 0.5)):
        NATIVE.gradient(problem, statistics, weights, out)
        assert statistics[:, :9].isfinite().all()
        assert out[:9].isfinite().all()
        fused = torch.empty(10, 1100)
        NATIVE.statistics_and_gradient(problem, weights, fused)
        torch.testing.assert_close(fused, out, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "mixed", "jsd", "alpha"])
def test_a_target_that_is_sure_has_the_same_bits_in_the_fused_call(divergence):
    """Its log-prob rounds to a number above 0 in some rows, as u and its log-sum are rounded each on its own."""
    problem = make_problem(rows=256, vocab=64, divergence=divergence, reward_scale=torch.linspace(0.1, 1.5, 256))
    for i, model in enumerate(models_of(problem)):
        model.raw[:, 7 + i // 2] += torch.linspace(20, 25, 256)
    weights, (two_calls, fused) = GradientWeights(torch.full((256,), 0.5)), torch.empty(2, 256, 64)
    NATIVE.gradient(problem, NATIVE.statistics(problem), weights, two_calls)
    NATIVE.statistics_and_gradient(problem, weights, fused)
    assert bits(fused) == bits(two_calls)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinity_of_a_single_model_reach_the_statistics(poison):
    problem = make_problem(rows=3, vocab=2051, divergence="none", models="")
    problem.student.raw[1, 1030] = poison
    problem.student.raw[2, 1031:] = -math.inf
    problem.student.raw[2, 7] = poison
    check_like_float32(problem, make_weights(3))


def check_like_float32(problem: RowProblem, weights: GradientWeights) -> None:
    """Like the plain PyTorch path in float32, where the same probabilities underflow."""
    expected = TRUTH.statistics(problem)
    statistics = NATIVE.statistics(problem)
    assert_close(statistics, expected, 3e-4 * expected.nan_to_num(0.0).abs().clamp_min(1), "statistics")
    out, expected_out = (torch.empty(problem.rows, problem.vocab_size) for _ in range(2))
    NATIVE.gradient(problem, statistics, weights, out)
    TRUTH.gradient(problem, expected, weights, expected_out)
    largest = expected_out.nan_to_num(0.0).abs().amax(-1, keepdim=True).clamp_min(1)
    assert_close(out, expected_out, 3e-4 * largest, "gradient")


def test_a_weight_of_zero_switches_its_term_off():
    problem = make_problem(rows=4)
    problem.student.raw[:, 9] = math.nan
    weights = GradientWeights(torch.tensor([0.0, 1.0, 0.0, -0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    out = torch.full((4, 211), 7.0)
    NATIVE.statistics_and_gradient(problem, weights, out)
    assert (out[0] == 0).all()
    assert (out[3] == 0).all()
    assert out[1].isnan().all()
    assert out[2].isnan().all()
    problem = make_problem(rows=3)
    check(problem, GradientWeights(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])))
    check(problem, GradientWeights(None, torch.ones(3)))
    check(problem, GradientWeights(torch.ones(3), None))


def test_equal_models_have_exactly_no_gap():
    raw = torch.randn(4, 5000) * 9
    model = ModelRows(raw, LogitTransform(softcap=20.0))
    for lam in (0.3, 1.25, torch.tensor([0.0, 1.0, 0.7, 3.3])):
        for divergence in JOINT.values():
            problem = RowProblem(5000, model, teacher=model, ref=model, reward_scale=lam, divergence=divergence)
            out = torch.full((4, 5000), 7.0)
            statistics = NATIVE.statistics_and_gradient(problem, GradientWeights(torch.ones(4)), out)
            assert (statistics[[Stat.MEAN_GAP, Stat.VALUE, Stat.CENTRE]] == 0).all()
            assert torch.equal(statistics[Stat.LOGSUM_TARGET], statistics[Stat.LOGSUM_STUDENT])
            assert (out == 0).all()
    three = NATIVE.statistics(RowProblem(5000, model, teacher=model, ref=model, reward_scale=1.25))
    assert torch.equal(three[Stat.LOGSUM_TEACHER], three[Stat.LOGSUM_REF])
    assert torch.equal(three[Stat.LOGSUM_TEACHER], three[Stat.LOGSUM_STUDENT])


def test_token_ids_out_of_range():
    problem = dataclasses.replace(make_problem(rows=4), token_ids=torch.tensor([-1, 211, -(2**62), 2**62]))
    statistics = NATIVE.statistics(problem)
    for stat in (Stat.LOGIT_STUDENT, Stat.LOGIT_TEACHER, Stat.LOGIT_REF):
        assert statistics[stat].isnan().all()
    check(problem, make_weights(4))


def test_log_probabilities_are_never_positive():
    raw = torch.randn(64, 3000, generator=torch.Generator().manual_seed(3)) * 2
    raw[torch.arange(64), torch.arange(64) * 45] += torch.linspace(0, 60, 64)  # from flat to one-hot, top anywhere
    problem = RowProblem(3000, ModelRows(raw, PLAIN), token_ids=raw.argmax(-1))
    statistics = NATIVE.statistics(problem)
    assert (statistics[Stat.LOGIT_STUDENT] <= statistics[Stat.LOGSUM_STUDENT]).all()


@pytest.mark.parametrize("step", [0.0, 0.005, -0.005, 0.1])
def test_rising_and_falling_rows(step):
    """The running shift is raised often, never, or in big steps; all-negative logits far from 0."""
    ramp = torch.arange(6000) * step - 3000.0
    problem = make_problem(rows=1, vocab=6000, divergence="forward_kl")
    noise = iter(torch.randn(3, 6000))
    check(map_models(problem, lambda m: ModelRows((ramp + next(noise))[None], PLAIN)), make_weights(1))


def test_sums_over_a_large_vocabulary():
    """152k equal terms: a naive float32 sum would be off by 1e-3, the kernels' blocks are not."""
    raw = torch.full((1, 151936), 0.125)
    statistics = NATIVE.statistics(RowProblem(151936, ModelRows(raw, PLAIN)))
    assert abs(float(statistics[Stat.LOGSUM_STUDENT, 0]) - math.log(151936)) <= 1e-6
    noise = torch.randn(2, 151936, generator=torch.Generator().manual_seed(1)) * 2
    check(dataclasses.replace(make_problem(2, 151936), student=ModelRows(noise, PLAIN)), make_weights(2))


# ------------------------------------------------------------------------------------------------------------ memory


def test_inputs_may_repeat_one_row_and_are_never_written():
    one = make_problem(rows=1, vocab=300)
    problem = map_models(one, lambda m: ModelRows(m.raw.expand(4, -1), m.transform))
    problem = dataclasses.replace(problem, token_ids=torch.tensor([1, 2, 3, 4]))
    before = [bits(m.raw) for m in models_of(problem)]
    check(problem, make_weights(4))
    assert [bits(m.raw) for m in models_of(problem)] == before


@pytest.mark.parametrize("vocab", [1, 211, 4099])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("divergence", ["none", "reverse_kl", "mixed", "jsd", "skew_kl", "alpha"])
def test_out_may_be_the_students_logits(vocab, dtype, divergence):
    problem = make_problem(vocab=vocab, dtype=dtype, divergence=divergence, models="" if divergence == "none" else "qr")
    weights = make_weights(5)
    expected = torch.empty(5, vocab, dtype=dtype)
    statistics = NATIVE.statistics_and_gradient(problem, weights, expected)
    in_place = NATIVE.statistics_and_gradient(problem, weights, problem.student.raw)
    assert bits(in_place) == bits(statistics)
    assert bits(problem.student.raw[:, :vocab]) == bits(expected)


@pytest.mark.parametrize("vocab", [1, 211, 4098])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_out_may_start_where_the_students_rows_do(vocab, dtype):
    problem = make_problem(vocab=vocab)
    raw = torch.empty(5, vocab + 1).copy_(problem.student.raw[:, : vocab + 1])
    problem = dataclasses.replace(problem, student=ModelRows(raw, PLAIN))
    weights = make_weights(5)
    expected = torch.empty(5, vocab, dtype=dtype)
    NATIVE.statistics_and_gradient(problem, weights, expected)
    aliased = raw.view(dtype)[:, :vocab]
    assert aliased.data_ptr() == raw.data_ptr()
    NATIVE.statistics_and_gradient(problem, weights, aliased)
    assert bits(aliased) == bits(expected)


def test_large_outputs_are_streamed_to_the_same_bits(monkeypatch):
    problem, weights = make_problem(vocab=4099), make_weights(5)
    for offset in (0, 1):  # aligned to a vector or not
        outs = [torch.full((5, 4099 + 8), 55.0)[:, offset : offset + 4099] for _ in range(2)]
        for out, threshold in zip(outs, (1 << 60, 0), strict=True):
            monkeypatch.setattr(native_backend, "_STREAM_BYTES", threshold)
            NATIVE.statistics_and_gradient(unused(problem), weights, out)
        assert bits(outs[0]) == bits(outs[1])
        assert (torch.as_strided(outs[1], (5, 4099 + 8), (4107, 1), 0)[:, offset + 4099 :] == 55.0).all()


def test_rows_beyond_two_billion_elements():
    """One expanded student: row 3 * 2^30 in elements is reached through the stride of out alone."""
    stride = 3 * 2**30
    storage = torch.empty(stride + 8, dtype=torch.bfloat16) if _free_memory() > 8 << 30 else None
    if storage is None:
        pytest.skip("needs 8 GiB of free memory")
    raw = torch.as_strided(storage, (2, 8), (stride, 1))  # untouched pages cost nothing
    raw.copy_(torch.arange(16).view(2, 8))
    problem = RowProblem(8, ModelRows(raw, PLAIN), token_ids=torch.tensor([1, 7]))
    check(problem, GradientWeights(None, torch.ones(2)), raw.clone())


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def test_no_rows():
    problem = make_problem(rows=0)
    out = torch.empty(0, 211)
    assert NATIVE.statistics_and_gradient(problem, make_weights(0), out).shape == (len(Stat), 0)


def test_the_kernels_say_that_they_ran_and_autograd_sees_the_write():
    problem, out = make_problem(), torch.empty(5, 211)
    before, version = _native.launches(), out._version
    NATIVE.statistics(problem)
    NATIVE.statistics_and_gradient(problem, make_weights(5), out)
    assert _native.launches() == before + 2
    assert out._version == version + 1


def test_inputs_that_require_grad_are_read():
    problem = map_models(make_problem(), lambda m: ModelRows(m.raw.requires_grad_(), m.transform))
    assert not NATIVE.statistics(problem).requires_grad


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: {"student": ModelRows(p.student.raw.double(), PLAIN)}, "student must be float32"),
        (lambda p: {"teacher": ModelRows(p.teacher.raw[:, :100], PLAIN)}, "teacher must be"),
        (lambda p: {"ref": ModelRows(p.ref.raw.repeat_interleave(2, 1)[:, ::2], PLAIN)}, "unit stride"),
        (lambda p: {"ref": None, "teacher": None}, "needs a teacher"),
        (lambda p: {"ref": None, "reward_scale": 0.0}, "cancels"),
        (lambda p: {"teacher": None, "reward_scale": 1.0 + 1e-9}, "cancels"),
        (lambda p: {"ref": None, "reward_scale": torch.ones(5)}, "needs both"),
        (lambda p: {"reward_scale": torch.ones(4)}, "reward_scale must be"),
        (lambda p: {"token_ids": torch.zeros(4, dtype=torch.int64)}, "token_ids must be"),
        (lambda p: {"divergence": SimpleNamespace(kind="total_variation")}, "kind of a divergence must be one of"),
        (lambda p: {"divergence": make_divergence("mixed", forward_weight=torch.ones(4))}, "forward_weight must be"),
        (lambda p: {"divergence": SimpleNamespace(kind="alpha", constants=(1, 2))}, "the divergence has 1 constants"),
        (lambda p: {"student": ModelRows(p.student.raw, LogitTransform(bias=torch.ones(3)))}, "bias of student"),
    ],
)
def test_refuses_what_it_cannot_compute(change, match):
    problem = make_problem()
    with pytest.raises((TypeError, ValueError), match=match):
        NATIVE.statistics(dataclasses.replace(problem, **change(problem)))


def test_refuses_a_wrong_out():
    problem, weights = make_problem(), make_weights(5)
    statistics = NATIVE.statistics(problem)
    for out in (
        torch.empty(5, 210),
        torch.empty(4, 211),
        torch.empty(5, 211).double(),
        torch.empty(1, 211).expand(5, -1),
    ):
        with pytest.raises((TypeError, ValueError), match="out"):
            NATIVE.gradient(problem, statistics, weights, out)


def test_refuses_wrong_statistics():
    """Too few of them were read, and those of a second round written, past their end."""
    problem, weights, out = make_problem(divergence="jsd"), make_weights(5), torch.empty(5, 211)
    statistics = NATIVE.statistics(problem)
    for wrong in (statistics[:, :4], statistics[:2], statistics[0], statistics.double(), statistics.to("meta")):
        with pytest.raises((TypeError, ValueError), match="statistics must be"):
            NATIVE.gradient(problem, wrong, weights, out)
        with pytest.raises((TypeError, ValueError), match="statistics must be"):
            NATIVE.second_round(problem, wrong)
    for divergence in (None, JOINT["reverse_kl"], JOINT["mixed"]):
        with pytest.raises(ValueError, match="second_round needs a divergence that has one, got"):
            NATIVE.second_round(dataclasses.replace(problem, divergence=divergence), statistics)


def test_refuses_statistics_that_cannot_be_written_where_they_lie():
    problem = make_problem()
    memory = torch.empty(len(Stat) * 20 + 1)
    for wrong, match in (
        (memory[: len(Stat) * 10].view(len(Stat), 10)[:, ::2], "unit stride"),
        (torch.as_strided(memory, (len(Stat), 5), (4, 1)), "overlap"),
        (torch.empty(1, 5).expand(len(Stat), 5), "overlap"),
    ):
        with pytest.raises(ValueError, match=match):
            NATIVE.statistics(problem, wrong)
    expected = NATIVE.statistics(problem)
    strided = memory[: len(Stat) * 10].view(len(Stat), 10)[:, ::2].copy_(expected)
    a, b = torch.empty(2, 5, 211)
    NATIVE.gradient(problem, expected, make_weights(5), a)
    NATIVE.gradient(problem, strided, make_weights(5), b)  # read they may be as they like
    assert bits(a) == bits(b)


@pytest.mark.parametrize("used_before", [False, True])
def test_memory_that_was_freed_is_refused(used_before):
    """As FSDP frees a gathered parameter, whose shape stays."""
    problem = make_problem()
    if used_before:
        NATIVE.statistics(problem)
    problem.teacher.raw.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="teacher must have its memory"):
        NATIVE.statistics(problem)


def test_the_same_models_are_checked_again_for_other_rows_or_columns():
    problem = make_problem()
    NATIVE.statistics(problem)
    with pytest.raises(ValueError, match="student must be"):
        NATIVE.statistics(dataclasses.replace(problem, vocab_size=300))
    with pytest.raises(ValueError, match="teacher must be"):
        NATIVE.statistics(dataclasses.replace(problem, student=make_rows(6, 211, 0)))
    narrower = NATIVE.statistics(dataclasses.replace(problem, vocab_size=100))
    anew = map_models(problem, lambda m: ModelRows(m.raw, m.transform))
    assert bits(narrower) == bits(NATIVE.statistics(dataclasses.replace(anew, vocab_size=100)))


def test_a_bias_that_was_copied_lives_as_long_as_what_was_made_of_it():
    problem = make_problem()
    teacher = ModelRows(problem.teacher.raw, LogitTransform(bias=torch.linspace(-3, 3, 211).bfloat16()))
    problem = dataclasses.replace(problem, teacher=teacher)
    want = NATIVE.statistics(problem)
    # the same teacher beside another student, and narrower: its bias is copied once more
    NATIVE.statistics(dataclasses.replace(problem, student=make_rows(5, 211, 9), vocab_size=100))
    taken = [torch.full((211,), 1e3) for _ in range(64)]  # what was freed is given to others
    assert bits(NATIVE.statistics(problem)) == bits(want)
    assert len(taken) == 64


def test_what_changes_between_two_calls_on_the_same_models_is_noticed():
    problem, weights = make_problem(divergence="jsd"), make_weights(5)
    others = [
        {"divergence": make_divergence("jsd", beta=0.7)},
        {"divergence": make_divergence("reverse_kl")},
        {"divergence": make_divergence("mixed", forward_weight=torch.linspace(0, 1, 5))},
        {"reward_scale": 0.5},
        {"reward_scale": torch.linspace(0, 1.5, 5)},
        {"vocab_size": 100},
        {"teacher": make_rows(5, 211, 9)},
        {"ref": make_rows(5, 211, 9)},
        {"ref": None},
        {"teacher": None},
        {"token_ids": problem.token_ids.flip(0)},
        {"token_ids": problem.token_ids.repeat_interleave(2)[::2]},
        {"teacher": None, "ref": None, "divergence": None},
    ]
    for change in others:
        other = dataclasses.replace(problem, **change)
        for each in (problem, other, other, problem):
            for dtype in FLOATS:
                outs = [torch.full((5, 214), 55.0, dtype=dtype)[:, :211] for _ in range(2)]
                statistics = [
                    NATIVE.statistics_and_gradient(x, weights, out)
                    for x, out in zip((each, unused(each)), outs, strict=True)
                ]
                assert bits(statistics[0]) == bits(statistics[1]), change
                assert bits(outs[0]) == bits(outs[1]), change

    def error_of(problem, out):
        with pytest.raises((TypeError, ValueError)) as caught:
            NATIVE.statistics_and_gradient(problem, weights, out)
        return str(caught.value)

    out = torch.empty(5, 211)
    wrong = [
        ({"vocab_size": -1}, out),
        ({"vocab_size": 300}, out),
        ({"reward_scale": 1.0, "teacher": None}, out),
        ({"teacher": None, "ref": None}, out),
        ({"divergence": SimpleNamespace(name="x", kind="x")}, out),
        ({"teacher": make_rows(6, 211, 1)}, out),
        ({"token_ids": torch.zeros(4, dtype=torch.int64)}, out),
        ({"token_ids": None}, out),
        ({}, out[:4]),
        ({}, out[:, :210]),
        ({}, out.double()),
        ({}, out[:1].expand(5, 211)),
    ]
    for change, written in wrong:
        NATIVE.statistics_and_gradient(problem, weights, out)
        other = dataclasses.replace(problem, **change)
        assert error_of(other, written) == error_of(unused(other), written)

    # the same objects with their numbers elsewhere
    for name in ("student", "teacher", "ref"):
        raw = getattr(problem, name).raw
        raw.set_(make_rows(5, 211, 17).raw)
        assert bits(NATIVE.statistics(problem)) == bits(NATIVE.statistics(unused(problem))), name


def test_lazily_negated_logits_are_refused():
    problem = make_problem()
    raw = torch._neg_view(problem.student.raw)
    with pytest.raises(ValueError, match="student must be dense, got a lazily negated view"):
        NATIVE.statistics(dataclasses.replace(problem, student=ModelRows(raw, PLAIN)))


@pytest.mark.parametrize("write", ["statistics", "statistics_and_gradient"])
def test_autograd_sees_statistics_that_are_written_in_place(write):
    problem, out = make_problem(), torch.empty(len(Stat), 9)[:, 2:7]
    version = out._version
    if write == "statistics":
        NATIVE.statistics(problem, out)
    else:
        NATIVE.statistics_and_gradient(problem, make_weights(5), torch.empty(5, 211), out)
    assert out._version == version + 1
    NATIVE.gradient(problem, out, make_weights(5), torch.empty(5, 211))
    assert out._version == version + 1


# ------------------------------------------------------------------------------------------------------ random search


@st.composite
def problems(draw):
    rows, vocab = draw(st.integers(1, 4)), draw(st.one_of(st.integers(1, 80), st.integers(1000, 2200)))
    divergence = DIVERGENCES[draw(st.sampled_from(list(DIVERGENCES)))]
    # a gradient of alpha = 2 is beyond float16 for logits of size 3
    scale = 1.0 if divergence is not None and divergence.kind == "alpha" else 3.0
    seed = draw(st.integers(0, 2**20))

    def model(number):
        transform = LogitTransform(
            draw(st.sampled_from([1.0, 0.5])),
            draw(st.sampled_from([None, None, 8.0])),
            draw(st.sampled_from([1.0, 0.8])),
            draw(st.sampled_from([None, None, torch.linspace(-1, 1, vocab)])),
        )
        rows_of = make_rows(
            rows,
            vocab,
            seed + number,
            dtype=draw(st.sampled_from(FLOATS)),
            scale=scale,
            transform=transform,
            offset=draw(st.integers(0, 3)),
        )
        holes = draw(st.sampled_from([None, None, 0.01, 0.5, 1.0]))
        if holes is not None:
            hit = torch.rand(rows_of.raw.shape, generator=torch.Generator().manual_seed(seed)) < holes
            rows_of.raw[draw(st.integers(0, rows - 1))].masked_fill_(hit[0], -math.inf)
        return rows_of

    lam: float | Tensor = draw(st.sampled_from([0.0, 0.5, 1.0, 1.25]))
    if draw(st.booleans()):
        lam = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, 1.25]), min_size=rows, max_size=rows)))
    three = divergence is not None
    ids = torch.tensor(draw(st.lists(st.integers(-1, vocab), min_size=rows, max_size=rows)))
    problem = RowProblem(
        vocab_size=vocab,
        student=model(0),
        teacher=model(1) if three else None,
        ref=model(2) if three else None,
        reward_scale=lam if three else 1.0,
        token_ids=ids,
        divergence=divergence,
    )
    values = st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=rows, max_size=rows)
    weights = GradientWeights(torch.tensor(draw(values)), torch.tensor(draw(values)))
    return problem, weights, torch.empty(rows, vocab, dtype=draw(st.sampled_from(FLOATS)))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_any_problem_agrees_with_float64(case):
    check(*case)


# ---------------------------------------------------------------------------------------------- elementary functions


def ulps(function: str, x: Tensor, expected: Tensor) -> float:
    y = torch.cat([x, torch.zeros(-len(x) % 16)])
    _native.map(function, y.data_ptr(), len(y))
    y = y[: len(x)].double()
    ulp = torch.ldexp(torch.ones_like(expected), torch.frexp(expected)[1] - 24)
    return float(((y - expected).abs() / ulp).max())


def test_elementary_functions_are_accurate():
    x = torch.linspace(-87.3, 88.0, 2_000_003)
    assert ulps("exp", x, x.double().exp()) <= 6.5  # csrc/vec.h: 2.9, and 0.032 for each factor of 2
    x = torch.cat([-torch.logspace(-30, 0, 200_000), torch.linspace(-20, 8, 2_000_000)])
    assert ulps("exp", x, x.double().exp()) <= 2.9 + 0.032 * 29
    x = torch.cat([torch.logspace(-37, 37, 1_000_000), torch.linspace(0.5, 2.0, 1_000_000)])
    assert ulps("log", x[x != 1], x[x != 1].double().log()) <= 1.5
    x = torch.cat([torch.logspace(-30, 1.5, 500_000), -torch.linspace(1e-3, 12, 1_000_000)])
    assert ulps("tanh", x, x.double().tanh()) <= 2.0


def test_elementary_functions_refuse_what_they_do_not_have():
    address = torch.zeros(16).data_ptr()
    for arguments in (("sinh", address, 16), ("exp", address, 15), ("exp", address, -16), ("exp", 0, 16)):
        with pytest.raises(ValueError, match="must be"):
            _native.map(*arguments)


def test_elementary_functions_at_special_values():
    for function, inputs in (("exp", [0.0, -0.0, -math.inf, math.inf, math.nan, -1e30, -3.4e38, 1e30]),
                             ("log", [1.0, math.nan]),
                             ("tanh", [0.0, -math.inf, math.inf, math.nan, -1e30, 1e30])):  # fmt: skip
        y = torch.tensor(inputs + [1.0] * (16 - len(inputs)))
        expected = getattr(torch, function)(y)
        _native.map(function, y.data_ptr(), len(y))
        assert torch.equal(y[: len(inputs)].nan_to_num(7.0), expected[: len(inputs)].nan_to_num(7.0)), function


def test_narrowing_rounds_to_nearest_even_and_keeps_nan():
    """Through token weights: with p = 1/2 everywhere else, w / 2 is what is narrowed."""
    w = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 1e-7, 2**-25, 6e-5,
                      3.0e38, 1e6, math.nan, math.inf]) * 2  # fmt: skip
    problem = RowProblem(2, ModelRows(torch.zeros(len(w), 2), PLAIN), token_ids=torch.ones(len(w), dtype=torch.int64))
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(len(w), 2, dtype=dtype)
        NATIVE.statistics_and_gradient(problem, GradientWeights(None, w), out)
        exact = torch.empty(len(w), 2)
        NATIVE.statistics_and_gradient(problem, GradientWeights(None, w), exact)
        assert torch.equal(out.nan_to_num(7.0, 8.0, 9.0), exact.to(dtype).nan_to_num(7.0, 8.0, 9.0))
        assert out[-2].isnan().all()


def test_widening_every_sixteen_bit_float():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        raw = every.view(dtype)[:, None]
        statistics = NATIVE.statistics(RowProblem(1, ModelRows(raw, PLAIN)))
        expected = raw[:, 0].float()
        expected[expected == -math.inf] = 0.0  # a row without support
        assert torch.equal(statistics[Stat.MAX_STUDENT].nan_to_num(7.0), expected.nan_to_num(7.0))


# ------------------------------------------------------------------------------------------------- sums of models


def added(ops, models: list[ModelRows], weights: list, mixture: bool, vocab: int) -> Tensor:
    """(C, V) the sum of the models, in a buffer with columns that nobody may touch."""
    dtype = models[0].raw.dtype if models[0].raw.dtype == torch.float64 else torch.float32
    wide = torch.full((models[0].raw.shape[0], vocab + 3), 55.0, dtype=dtype)
    out, total_weight, last = wide[:, 1 : vocab + 1], combination.absolute_sum(weights), len(models) - 1
    for i, (model, weight) in enumerate(zip(models, weights, strict=True)):
        term = SumTerm(weight, total_weight, mixture, first=i == 0, last=i == last)
        composite.add(ops, out, model, vocab, ops.statistics(RowProblem(vocab, model)), term)
    assert (wide[:, 0] == 55.0).all(), "wrote before the vocabulary"
    assert (wide[:, vocab + 1 :] == 55.0).all(), "wrote past the vocabulary"
    return out


WEIGHTS = ([0.5, 0.25, 1.5], [torch.tensor([0.5, 0.0, 2.0, 1e-3, 1e4]), 1.0, torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0])])


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=["numbers", "per row"])
@pytest.mark.parametrize("mixture", [False, True], ids=["log-linear", "mixture"])
def test_a_sum_of_models_agrees_with_float64(vocab, dtype, weights, mixture):
    """A log-prob is off by a few roundings of the logit's distance to the maximum and of its own, times the weight."""
    bias = torch.linspace(-1, 1, vocab + 2)
    transforms = (PLAIN, LogitTransform(0.5, 4.0, 0.7), LogitTransform(bias=bias))
    models = [make_rows(5, vocab, 90 + i, dtype=dtype, transform=t) for i, t in enumerate(transforms)]
    if not mixture:
        weights = [-weights[0], *weights[1:]]
    wide = [ModelRows(m.raw.double(), m.transform) for m in models]
    want = added(TRUTH, wide, [w.double() if isinstance(w, Tensor) else w for w in weights], mixture, vocab)
    got = added(NATIVE, models, weights, mixture, vocab)
    size = max(combination.absolute_sum(weights).max().item() if isinstance(weights[0], Tensor) else 1.0, 4.0)
    assert_close(got, want, EPS * 4 * (4 + 40) * (1.0 if mixture else size), "sum")


@pytest.mark.parametrize("weights", WEIGHTS, ids=["numbers", "per row"])
@pytest.mark.parametrize("mixture", [False, True], ids=["log-linear", "mixture"])
@pytest.mark.parametrize("vocab", [7, 1031])
def test_a_sum_of_models_of_odd_logits_is_that_of_pytorch(vocab, mixture, weights):
    """Masks of any size in one model or all, rows of NaN, of +inf and without support; weights of 0 and of 1e4."""
    smallest = torch.finfo(torch.float32).min
    for every in (False, True):
        for fill in (-math.inf, -1e9, smallest, smallest / 3, -200.0, math.inf, math.nan):
            models = [make_rows(5, vocab, 95 + i) for i in range(3)]
            for model in models if every else models[1:2]:
                model.raw[:, ::3] = fill
                model.raw[3] = fill
            own = weights if mixture else [weights[0], -weights[1], weights[2]]
            got, want = (added(ops, models, own, mixture, vocab) for ops in (NATIVE, TRUTH))
            assert_close(got, want, 2e-6 * want.double().abs().nan_to_num(0, 0, 0).clamp_min(10), f"{fill}, {every}")


# --------------------------------------------------------------------------------- threads, machines, and sanitizers


def test_threads_do_not_change_bits():
    problem, weights = make_problem(rows=13, vocab=3001, divergence="jsd"), make_weights(13)
    results, before = set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 32):
            torch.set_num_threads(threads)
            out = torch.empty(13, 3001)
            statistics = NATIVE.statistics_and_gradient(problem, weights, out)
            results.add((bits(statistics), bits(out)))
            assert torch.get_num_threads() == threads
            assert torch.equal(torch.ones(300, 300) @ torch.ones(300, 300), torch.full((300, 300), 300.0))
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


THREADS = """
import os, torch
from fused_gopd.rowops import LogitTransform, ModelRows, RowProblem, native

def tasks():
    return len(os.listdir("/proc/self/task"))

rows, ops = RowProblem(4099, ModelRows(torch.zeros(9, 4099), LogitTransform())), native.NativeRowOps()
torch.set_num_threads(1)
before = tasks()
ops.statistics(rows)
alone = tasks() - before
torch.set_num_threads(4)
ops.statistics(rows)
of_rows = tasks() - before
torch.zeros(4 * 2**16).exp()
print(alone, of_rows, tasks() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads of a process in /proc")
def test_rows_are_shared_out_to_the_threads_of_pytorch():
    """None with one thread; with four, three more, which PyTorch's own operators then use too: one pool."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "3", "3"]


def test_a_pytorch_without_parallel_for_is_a_reason(monkeypatch):
    monkeypatch.setattr(native_backend.ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(native_backend, "_load", native_backend._load.__wrapped__)
    assert "no torch_parallel_for" in native_backend.unavailable_reason()


def test_a_missing_extension_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_gopd._native", None)
    monkeypatch.setattr(native_backend, "_load", native_backend._load.__wrapped__)
    assert "C++17 compiler" in native_backend.unavailable_reason()


@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_instruction_set_passes_these_tests(isa):
    if isa == _native.isa():
        return
    if os.environ.get("FUSED_GOPD_ISA"):
        pytest.skip("FUSED_GOPD_ISA is set: the other instruction sets are tested where it is not")
    deselect = "not instruction_set and not sanitizer and not aarch64 and not interpreted and not torch and not triton"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        deselect,
        __file__,
        str(Path(__file__).with_name("test_policy.py")),
    ]
    environment = os.environ | {"FUSED_GOPD_ISA": isa}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_an_unknown_instruction_set_is_an_error():
    code = "from fused_gopd.rowops import native; native._load().isa()"
    environment = os.environ | {"FUSED_GOPD_ISA": "sse9", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "FUSED_GOPD_ISA" in done.stderr
    assert "sse9" in done.stderr


def compile_kernels(compiler: str, build: Path, flags: list[str], isas: dict[str, list[str]]) -> list[str]:
    source, objects = REPO / "csrc" / "row_kernels.cpp", []
    running = []
    for isa, isa_flags in isas.items():
        objects.append(str(build / f"{isa}.o"))
        command = [
            compiler,
            "-std=c++17",
            *flags,
            *isa_flags,
            f"-DGOPD_ISA={isa}",
            "-c",
            str(source),
            "-o",
            objects[-1],
        ]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
    return objects


X86 = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


SANITIZED = ["-O1", "-g1", "-fPIC", "-ffp-contract=fast", "-Wno-psabi", "-fsanitize=address,undefined"]
SANITIZED += ["-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> tuple[str, list[str]]:
    """The compiler, and objects of the kernels of every instruction set with AddressSanitizer and UBSan."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    isas = X86 if "avx2" in _native.available_isas() or os.uname().machine == "x86_64" else {"baseline": []}
    return compiler, compile_kernels(compiler, tmp_path_factory.mktemp("sanitized"), SANITIZED, isas)


def link_sanitized(sanitized: tuple[str, list[str]], source: str, out: Path, *flags: str) -> None:
    compiler, objects = sanitized
    sources = [str(REPO / "tests" / "rowops" / "native" / source), str(REPO / "csrc" / "dispatch.cpp")]
    command = [compiler, "-std=c++17", *SANITIZED, *flags, f"-I{REPO / 'csrc'}", *sources, *objects, "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert built.returncode == 0, built.stderr[-4000:]


def run_sanitized(command: list[str], **environment: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | environment
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "ERROR" not in done.stderr
    assert "runtime error" not in done.stderr
    for isa in _native.available_isas():
        assert f"{isa}: " in done.stdout


def test_sanitizers_find_nothing(sanitized, tmp_path):
    """AddressSanitizer and UBSan over exactly-sized heap buffers, for every instruction set of this machine."""
    link_sanitized(sanitized, "driver.cpp", tmp_path / "driver")
    run_sanitized([str(tmp_path / "driver")])


def test_sanitizers_find_nothing_in_wrong_and_odd_buffers(sanitized, tmp_path):
    """Every entry of the row operations refuses a buffer of a wrong shape, dtype, device or size by name.

    Strided and unaligned ones, as NumPy may hand over, give the bits of plain ones.
    """
    if not Path(sanitized[0]).name.startswith("g++"):
        pytest.skip("only GCC's AddressSanitizer is a library that an interpreter can be started with")
    link_sanitized(sanitized, "shim.cpp", tmp_path / "shim.so", "-shared")
    found = subprocess.run([sanitized[0], "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = found.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("the compiler has no sanitizer libraries")
    path = os.pathsep.join(p for p in sys.path if p)
    program = [sys.executable, str(REPO / "tests" / "rowops" / "native" / "fuzz.py"), str(tmp_path / "shim.so"), "400"]
    run_sanitized([*program, *_native.available_isas()], LD_PRELOAD=library, PYTHONPATH=path, OMP_NUM_THREADS="1")


def test_the_kernels_compile_with_clang(tmp_path):
    """Which macOS has. Without vector instructions beyond the baseline, whose conversions are written out."""
    compiler = shutil.which("clang++")
    if compiler is None:
        pytest.skip("no clang++ here")
    flags = ["-O1", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    compile_kernels(compiler, tmp_path, flags, {"baseline": []})


def test_the_kernels_compile_for_aarch64(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ here (Debian package g++-aarch64-linux-gnu)")
    flags = ["-O2", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    compile_kernels(compiler, tmp_path, flags, {"baseline": []})
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is not None:  # and run, where that is possible
        program = tmp_path / "driver"
        sources = [str(REPO / "tests" / "rowops" / "native" / "driver.cpp"), str(REPO / "csrc" / "dispatch.cpp")]
        command = [
            compiler,
            "-std=c++17",
            "-O2",
            "-static",
            f"-I{REPO / 'csrc'}",
            *sources,
            str(tmp_path / "baseline.o"),
        ]
        subprocess.run([*command, "-o", str(program)], check=True)
        assert subprocess.run([emulator, str(program)], check=False).returncode == 0
