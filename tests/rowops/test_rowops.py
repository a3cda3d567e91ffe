"""Row operations on one chunk of logits: statistics from their definitions, gradients from autograd."""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref

import pytest
import torch

import oracle
from builders import TOLERANCE, BackendDtype, assert_close, generator, in_parts, row_divergence, why_not
from fused_gopd import rowops
from fused_gopd.rowops import GradientWeights, LogitTransform, ModelRows, RowProblem, Stat, select_backend
from fused_gopd.rowops import torch as torch_rowops

pytestmark = pytest.mark.usefixtures("one_thread")

C, V = 6, 29
CPU = torch.device("cpu")
DIVERGENCES = ("none", "reverse_kl", "forward_kl", "jsd")


def ops_for(backend_dtype: BackendDtype):
    return select_backend(backend_dtype.backend, CPU, {backend_dtype.dtype})


def problem_for(
    backend_dtype: BackendDtype, divergence: str, lam=1.25, *, gone: bool = False, pad: int = 0, **transform
):
    """C rows of three models (of one for "none"), with -inf where ``gone``; ``pad`` columns of NaN past V."""
    raws = []
    for seed in range(3):
        raw = torch.full((C, V + pad), math.nan, dtype=backend_dtype.dtype)
        raw[:, :V] = (torch.randn(C, V, generator=generator(seed), dtype=torch.float64) * 3).to(backend_dtype.dtype)
        if gone:
            raw[:-1, 3 * seed : 3 * seed + 4] = -math.inf
        raws.append(raw)
    if gone:
        raws[0][-1, :V] = -math.inf  # a row without support
    models = [ModelRows(raw, LogitTransform(**transform)) for raw in raws]
    if divergence == "none":
        models[1:] = [None, None]
    ids = torch.tensor([0, 5, V - 1, 13, 20, 4])
    student, teacher, ref = models
    return RowProblem(V, student, teacher=teacher, ref=ref, reward_scale=lam if divergence != "none" else 1.0,
                      token_ids=ids, divergence=row_divergence(divergence))  # fmt: skip


def name_and_parameter(problem: RowProblem) -> tuple[str, float]:
    if problem.divergence is None:
        return "none", 0.0
    return problem.divergence.name, next(iter(vars(problem.divergence).values()), 0.0)


def oracle_rows(problem: RowProblem) -> list[dict[str, float]]:
    lams = torch.as_tensor(problem.reward_scale, dtype=torch.float64).expand(C).tolist()
    rows = []
    for i in range(C):
        z = [
            None if m is None else _transformed(m.raw[i, :V].double(), m.transform)
            for m in (problem.student, problem.teacher, problem.ref)
        ]
        if z[0].isneginf().all():
            rows.append({})
            continue
        name, parameter = name_and_parameter(problem)
        rows.append(oracle.row_statistics(*z, lams[i], name, parameter, int(problem.token_ids[i])))
    return rows


def _transformed(x: torch.Tensor, t: LogitTransform) -> torch.Tensor:
    bias = None if t.bias is None else t.bias[:V].double()
    x = x if bias is None else x + bias
    model = type("Model", (), {"logits": x, "logit_scale": t.scale, "softcap": t.softcap, "temperature": t.temperature})
    return oracle.logits_of(model)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("lam", [0.0, 1.0, 1.25, "per token"])
@pytest.mark.parametrize("gone", [False, True])
def test_statistics_are_their_definitions(backend_dtype, divergence, lam, gone):
    if lam == "per token":
        lam = torch.tensor([0.0, 1.0, 0.5, 1.25, 2.0, 1.0], dtype=backend_dtype.dtype)
    problem = problem_for(backend_dtype, divergence, lam, gone=gone)
    got = ops_for(backend_dtype).statistics(problem)
    assert got.shape == (len(Stat), C)
    assert got.dtype == backend_dtype.dtype
    check_statistics(problem, got, backend_dtype)


def check_statistics(problem: RowProblem, got: torch.Tensor, backend_dtype: BackendDtype) -> None:
    for i, want in enumerate(oracle_rows(problem)):
        if not want:
            assert got[Stat.LOGSUM_STUDENT, i] == -math.inf
            assert got[Stat.MAX_STUDENT, i] == 0
            continue
        for stat in Stat:
            value = want.get(stat.name, 0.0)
            where = f"{stat.name} of row {i}"
            if math.isinf(value):
                assert got[stat, i] == value, where
            else:
                assert abs(float(got[stat, i]) - value) <= TOLERANCE[backend_dtype.dtype] * max(1.0, abs(value)), where


def wanted_gradient(problem: RowProblem, w_d: torch.Tensor, w_y: torch.Tensor) -> torch.Tensor:
    """Autograd of w_d * divergence - w_y * log p[token] over raw logits, with the target held still."""
    lams = torch.as_tensor(problem.reward_scale, dtype=torch.float64).expand(C).tolist()
    grads = []
    for i in range(C):
        x = problem.student.raw[i, :V].double().detach().requires_grad_()
        z = _transformed(x, problem.student.transform)
        others = [
            None if m is None else _transformed(m.raw[i, :V].double(), m.transform)
            for m in (problem.teacher, problem.ref)
        ]
        if (z == -math.inf).all():
            grads.append(torch.zeros_like(x))
            continue
        if problem.divergence is None:
            inside = z != -math.inf
            log_p = z[inside] - z[inside].logsumexp(-1)
            value = (log_p.exp() * log_p).sum()  # minus the entropy: p_v (z_v - sum p z)
        else:
            name, parameter = name_and_parameter(problem)
            parameter = float(parameter[i]) if isinstance(parameter, torch.Tensor) else parameter
            value, *_ = oracle._full_token(z, *others, lams[i], name, parameter)
            used = [z] + [o for o, off in zip(others, (lams[i] == 0, lams[i] == 1), strict=True) if not off]
            inside = torch.stack([o != -math.inf for o in used]).all(0)
        token = int(problem.token_ids[i])
        lse = z[inside].logsumexp(-1)
        picked = z[token] - lse if inside[token] else -lse  # outside the support only the normaliser is left
        (g,) = torch.autograd.grad(w_d[i].double() * value - w_y[i].double() * picked, x)
        grads.append(g)
    return torch.stack(grads)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize(
    "transform", [{}, {"scale": 0.5, "temperature": 0.7}, {"softcap": 4.0, "temperature": 1.5}], ids=str
)
def test_gradient_is_what_autograd_finds(backend_dtype, divergence, gone, transform):
    lam = torch.tensor([0.0, 1.0, 0.5, 1.25, 2.0, 1.0], dtype=backend_dtype.dtype)
    problem = problem_for(backend_dtype, divergence, lam, gone=gone, **transform)
    ops = ops_for(backend_dtype)
    w_d = torch.tensor([1.0, 0.0, -2.0, 1e-3, 30.0, 1.0], dtype=backend_dtype.dtype)
    w_y = torch.tensor([0.0, 1.0, 0.5, -1.0, 1e-3, 1.0], dtype=backend_dtype.dtype)
    out = torch.full((C, V), math.nan, dtype=backend_dtype.dtype)
    ops.gradient(problem, ops.statistics(problem), GradientWeights(w_d, w_y), out)
    assert_close(out, wanted_gradient(problem, w_d, w_y), TOLERANCE[backend_dtype.dtype])


FAMILY = ("skew_kl", "skew_kl 0.005", "skew_reverse_kl", "alpha", "alpha -0.5", "alpha 0.7", "alpha 1.5", "mixed")


@pytest.mark.parametrize("divergence", FAMILY)
@pytest.mark.parametrize("transform", [{}, {"softcap": 4.0, "temperature": 1.5}], ids=str)
def test_the_whole_family_is_its_definitions(backend_dtype, divergence, transform):
    """Statistics, gradient, both at once and in parts of the vocabulary, with -inf and lambda per token."""
    lam = torch.tensor([0.0, 1.0, 0.5, 1.25, 2.0, 1.0], dtype=backend_dtype.dtype)
    problem, ops = problem_for(backend_dtype, divergence, lam, gone=True, **transform), ops_for(backend_dtype)
    if not rowops.has_kernel(ops, problem.divergence):
        pytest.skip(f"backend='{ops.name}' has no kernel for it")
    if divergence == "mixed":
        shares = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.7, 1.0], dtype=backend_dtype.dtype)
        check_statistics(problem, ops.statistics(problem), backend_dtype)
        problem = dataclasses.replace(problem, divergence=row_divergence("mixed", forward_weight=shares))
    w_d, w_y = torch.linspace(-1, 2, 2 * C, dtype=backend_dtype.dtype).reshape(2, C)
    weights = GradientWeights(w_d, w_y)
    statistics, once, then, apart = ops.statistics(problem), *torch.zeros(3, C, V, dtype=backend_dtype.dtype)
    fused = ops.statistics_and_gradient(problem, weights, once)
    ops.gradient(problem, statistics, weights, then)
    assert torch.equal(statistics, fused)
    assert torch.equal(once, then)
    merged, apart = in_parts(ops, problem, [(0, 10), (10, 20), (20, 21), (21, V)], weights)
    if divergence != "mixed":
        check_statistics(problem, statistics, backend_dtype)
        check_statistics(problem, merged, backend_dtype)
    for gradient in (once, apart):
        assert_close(gradient, wanted_gradient(problem, w_d, w_y), TOLERANCE[backend_dtype.dtype])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("lam", [0.0, 1.0, 1.25, "per token"])
@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("transform", [{}, {"softcap": 4.0, "temperature": 1.5}], ids=str)
def test_the_parts_of_a_vocabulary_make_the_whole(backend_dtype, divergence, lam, gone, transform):
    if lam == "per token":
        lam = torch.tensor([0.0, 1.0, 0.5, 1.25, 2.0, 1.0], dtype=backend_dtype.dtype)
    problem = problem_for(backend_dtype, divergence, lam, gone=gone, **transform)
    cancelled = {1.0: "ref", 0.0: "teacher"}.get(lam) if isinstance(lam, float) else None
    if cancelled is not None:
        problem = dataclasses.replace(problem, **{cancelled: None})
    for model in (problem.student, problem.teacher, problem.ref):
        if model is not None and gone:
            model.raw[1, 10:20] = -math.inf  # a part without support in a row that has some
    ops = ops_for(backend_dtype)
    weights = GradientWeights(*torch.linspace(-1, 2, 2 * C, dtype=backend_dtype.dtype).reshape(2, C))
    want_gradient = torch.empty(C, V, dtype=backend_dtype.dtype)
    want = ops.statistics_and_gradient(problem, weights, want_gradient)
    got, gradient = in_parts(ops, problem, [(0, 10), (10, 20), (20, 21), (21, V)], weights)
    for stat in Stat:
        empty = want[Stat.LOGSUM_STUDENT].isneginf() & (stat != Stat.LOGSUM_STUDENT)  # what means nothing
        assert_close(
            got[stat].masked_fill(empty, 0), want[stat].masked_fill(empty, 0), backend_dtype.tolerance, stat.name
        )
    assert_close(gradient, want_gradient, backend_dtype.tolerance, "gradient")


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_equal_models_are_equal_in_parts_too(backend_dtype, divergence):
    problem = problem_for(backend_dtype, divergence)
    problem = dataclasses.replace(problem, teacher=problem.student, ref=problem.student)
    one = torch.ones(C, dtype=backend_dtype.dtype)
    got, gradient = in_parts(ops_for(backend_dtype), problem, [(0, 10), (10, V)], GradientWeights(divergence=one))
    assert gradient.abs().max() <= (
        backend_dtype.tolerance if divergence == "jsd" and backend_dtype.backend == "torch" else 0
    )
    assert not got[Stat.MEAN_GAP].any()
    if backend_dtype.backend != "torch":  # which forms the mixture from p and t, not from their ratio
        assert not got[[Stat.CENTRE, Stat.VALUE]].any()
    assert torch.equal(got[Stat.LOGSUM_TARGET], got[Stat.LOGSUM_STUDENT])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("model", ["student", "teacher", "ref"])
@pytest.mark.parametrize("unlikely", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_in_a_part_makes_the_whole_row_nan(backend_dtype, divergence, model, unlikely, poison):
    if divergence == "none" and model != "student":
        pytest.skip("a single model")
    problem = problem_for(backend_dtype, divergence)
    if unlikely:
        problem.student.raw[2, :10] -= 1e4  # of probability 0
    getattr(problem, model).raw[2, 7] = poison
    one = torch.ones(C, dtype=backend_dtype.dtype)
    got, gradient = in_parts(ops_for(backend_dtype), problem, [(0, 10), (10, V)], GradientWeights(divergence=one))
    assert got[Stat[f"LOGSUM_{model.upper()}"]].isnan().tolist() == [i == 2 for i in range(C)]
    assert gradient[2].isnan().all()
    assert gradient[torch.arange(C) != 2].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("which", ["divergence", "token"])
def test_a_weight_that_is_absent_is_zero(backend_dtype, divergence, which):
    problem = problem_for(backend_dtype, divergence)
    ops = ops_for(backend_dtype)
    statistics = ops.statistics(problem)
    one, zero = torch.ones(C, dtype=backend_dtype.dtype), torch.zeros(C, dtype=backend_dtype.dtype)
    alone, both = torch.empty(2, C, V, dtype=backend_dtype.dtype)
    other = "token" if which == "divergence" else "divergence"
    ops.gradient(problem, statistics, GradientWeights(**{which: one}), alone)
    ops.gradient(problem, statistics, GradientWeights(**{which: one, other: zero}), both)
    assert torch.equal(alone, both)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_zero_weight_switches_its_term_off_even_in_a_diverged_row(backend_dtype, divergence):
    problem = problem_for(backend_dtype, divergence)
    problem.student.raw[2, 3] = math.nan
    ops = ops_for(backend_dtype)
    weights = GradientWeights(torch.zeros(C, dtype=backend_dtype.dtype), torch.zeros(C, dtype=backend_dtype.dtype))
    out = torch.empty(C, V, dtype=backend_dtype.dtype)
    ops.gradient(problem, ops.statistics(problem), weights, out)
    assert (out == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["student", "teacher", "ref"])
def test_nan_stays_in_its_row(backend_dtype, divergence, poison, model):
    if divergence == "none" and model != "student":
        pytest.skip("a single model")
    clean = problem_for(backend_dtype, divergence)
    dirty = problem_for(backend_dtype, divergence)
    getattr(dirty, model).raw[2, 7] = poison
    ops = ops_for(backend_dtype)
    one = torch.ones(C, dtype=backend_dtype.dtype)
    results = []
    for problem in (clean, dirty):
        out = torch.empty(C, V, dtype=backend_dtype.dtype)
        statistics = ops.statistics_and_gradient(problem, GradientWeights(divergence=one), out)
        results.append((statistics, out))
    (want, want_grad), (got, grad) = results
    others = torch.arange(C) != 2
    assert torch.equal(got[:, others], want[:, others])
    assert torch.equal(grad[others], want_grad[others])
    assert got[Stat[f"LOGSUM_{model.upper()}"], 2].isnan()
    assert grad[2].isnan().any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_columns_past_the_vocabulary_are_neither_read_nor_written(backend_dtype, divergence):
    problem = problem_for(backend_dtype, divergence, pad=7)
    ops = ops_for(backend_dtype)
    out = torch.full((C, V + 7), -77.0, dtype=backend_dtype.dtype)
    one = torch.ones(C, dtype=backend_dtype.dtype)
    statistics = ops.statistics_and_gradient(problem, GradientWeights(one, one), out)
    assert statistics.isfinite().all()
    assert out[:, :V].isfinite().all()
    assert (out[:, V:] == -77).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_may_overwrite_the_logits(backend_dtype, divergence):
    ops = ops_for(backend_dtype)
    one = torch.ones(C, dtype=backend_dtype.dtype)
    apart, inside = problem_for(backend_dtype, divergence), problem_for(backend_dtype, divergence)
    out = torch.empty(C, V, dtype=backend_dtype.dtype)
    a = ops.statistics_and_gradient(apart, GradientWeights(one, one), out)
    b = ops.statistics_and_gradient(inside, GradientWeights(one, one), inside.student.raw)
    assert torch.equal(a, b)
    assert torch.equal(out, inside.student.raw)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrower_gradient_may_lie_over_the_logits(backend, divergence, narrow):
    """Row i of the narrow view starts at row i of the float32 logits."""
    backend_dtype = BackendDtype(backend, torch.float32)
    ops = ops_for(backend_dtype)
    one = torch.ones(C)
    apart, inside = problem_for(backend_dtype, divergence), problem_for(backend_dtype, divergence)
    out = torch.empty(C, V, dtype=narrow)
    ops.statistics_and_gradient(apart, GradientWeights(one, one), out)
    over = inside.student.raw.view(narrow)[:, :V]
    ops.statistics_and_gradient(inside, GradientWeights(one, one), over)
    assert torch.equal(out, over)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_both_at_once_are_the_same_bits_as_one_after_the_other(backend_dtype, divergence):
    ops = ops_for(backend_dtype)
    problem = problem_for(backend_dtype, divergence, gone=True, softcap=5.0)
    one = torch.ones(C, dtype=backend_dtype.dtype)
    a, b = torch.empty(2, C, V, dtype=backend_dtype.dtype)
    statistics = ops.statistics(problem)
    ops.gradient(problem, statistics, GradientWeights(one, one), a)
    fused = ops.statistics_and_gradient(problem, GradientWeights(one, one), b)
    assert torch.equal(statistics, fused)
    assert torch.equal(a, b)


@pytest.mark.parametrize("raw_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_are_read_exactly(backend, raw_dtype):
    """The same numbers in float32 give the same statistics: nothing is computed in the narrow dtype."""
    backend_dtype = BackendDtype(backend, torch.float32)
    ops = ops_for(backend_dtype)
    narrow, wide = problem_for(backend_dtype, "jsd"), problem_for(backend_dtype, "jsd")
    cast = [ModelRows(m.raw.to(raw_dtype), m.transform) for m in (narrow.student, narrow.teacher, narrow.ref)]
    back = [ModelRows(m.raw.float(), m.transform) for m in cast]
    ids, lam = wide.token_ids, wide.reward_scale
    a, b = (
        ops.statistics(RowProblem(V, models[0], teacher=models[1], ref=models[2], reward_scale=lam, token_ids=ids,
                                  divergence=wide.divergence))
        for models in (cast, back)
    )  # fmt: skip
    assert_close(a, b, 1e-6)


def test_rows_of_stride_zero_and_wide_stride_are_rows(backend_dtype):
    ops = ops_for(backend_dtype)
    problem = problem_for(backend_dtype, "reverse_kl")
    want = ops.statistics(problem)
    wide = torch.full((C, 2, V), math.nan, dtype=backend_dtype.dtype)
    wide[:, 0] = problem.student.raw
    strided = dataclasses.replace(problem, student=ModelRows(wide[:, 0], LogitTransform()))
    assert torch.equal(ops.statistics(strided), want)
    single = ModelRows(problem.student.raw[:1].expand(C, V), LogitTransform())
    repeated = ModelRows(problem.student.raw[:1].repeat(C, 1), LogitTransform())
    a, b = (ops.statistics(RowProblem(V, m, token_ids=problem.token_ids)) for m in (single, repeated))
    assert torch.equal(a, b)


@pytest.mark.parametrize("divergence", ["none", "reverse_kl", "jsd"])
def test_statistics_are_written_and_read_as_columns_of_a_larger_tensor(backend_dtype, divergence):
    ops, dtype = ops_for(backend_dtype), backend_dtype.dtype
    problem = problem_for(backend_dtype, divergence, gone=True)
    weights = GradientWeights(*torch.ones(2, C, dtype=dtype))
    want, gradients = ops.statistics(problem), torch.zeros(3, C, V, dtype=dtype)
    ops.gradient(problem, want, weights, gradients[0])
    whole = torch.full((len(Stat) + 2, C + 5), 7.0, dtype=dtype)
    part = whole[: len(Stat), 2 : 2 + C]
    for call in (
        lambda: ops.statistics(problem, out=part),
        lambda: ops.statistics_and_gradient(problem, weights, gradients[1], part),
    ):
        whole.fill_(7.0)
        assert call() is part
        assert torch.equal(part, want)
        part.fill_(7.0)
        assert (whole == 7.0).all(), "wrote beside the columns"
    ops.gradient(problem, part.copy_(want), weights, gradients[2])
    assert torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[0])
    if problem.divergence is not None and problem.divergence.second_round:
        assert torch.equal(ops.second_round(problem, part), ops.second_round(problem, want))


def test_weights_may_have_any_stride(backend_dtype):
    ops, dtype = ops_for(backend_dtype), backend_dtype.dtype
    problem = problem_for(backend_dtype, "reverse_kl")
    columns = torch.linspace(-1, 2, 3 * C, dtype=dtype).reshape(C, 3)
    for w_d, w_y in ((columns[:, 0], columns[:, 2]), (columns[0, :1].expand(C), columns[1, 1:2].expand(C))):
        a, b = torch.zeros(2, C, V, dtype=dtype)
        ops.statistics_and_gradient(problem, GradientWeights(w_d, w_y), a)
        ops.statistics_and_gradient(problem, GradientWeights(w_d.contiguous(), w_y.contiguous()), b)
        assert torch.equal(a, b)


def test_what_is_kept_with_a_models_rows_goes_with_them(backend_dtype):
    ops = ops_for(backend_dtype)
    problem = problem_for(backend_dtype, "reverse_kl", bias=torch.zeros(V))
    ops.statistics(problem)
    ops.statistics(problem)
    found = [weakref.ref(x) for m in (problem.student, problem.teacher, problem.ref) for x in (m, m.raw)]
    del problem
    assert not any(x() for x in found)


def test_a_token_id_outside_the_vocabulary_is_nan_and_reads_nothing(backend_dtype):
    ops = ops_for(backend_dtype)
    problem = problem_for(backend_dtype, "reverse_kl", pad=3)
    problem.token_ids.copy_(torch.tensor([-1, V, V + 2, -100, 2**40, 0]))
    got = ops.statistics(problem)
    for stat in (Stat.LOGIT_STUDENT, Stat.LOGIT_TEACHER, Stat.LOGIT_REF):
        assert got[stat].isnan().tolist() == [True] * 5 + [False]


def test_small_row_blocks_change_nothing(monkeypatch):
    backend_dtype = BackendDtype("torch", torch.float32)
    ops = ops_for(backend_dtype)
    lam = torch.tensor([0.0, 1.0, 0.5, 1.25, 2.0, 1.0])
    one = torch.ones(C)
    results = []
    for elements in (1 << 20, 4 * V, 1):
        monkeypatch.setattr(torch_rowops, "BLOCK_ELEMENTS", elements)
        problem = problem_for(backend_dtype, "jsd", lam, gone=True)
        out = torch.empty(C, V)
        results.append((ops.statistics_and_gradient(problem, GradientWeights(one, one), out), out))
    for other in results[1:]:
        # a reduction over a block may be split differently: the last bit
        assert_close(other[0], results[0][0], 1e-6)
        assert_close(other[1], results[0][1], 1e-6)


def test_no_rows_are_no_work(backend_dtype):
    ops = ops_for(backend_dtype)
    full = problem_for(backend_dtype, "reverse_kl")
    models = [ModelRows(m.raw[:0], m.transform) for m in (full.student, full.teacher, full.ref)]
    empty = RowProblem(V, models[0], teacher=models[1], ref=models[2], reward_scale=1.25,
                       token_ids=full.token_ids[:0], divergence=full.divergence)  # fmt: skip
    out = torch.empty(0, V, dtype=backend_dtype.dtype)
    got = ops.statistics_and_gradient(empty, GradientWeights(divergence=torch.empty(0, dtype=backend_dtype.dtype)), out)
    assert got.shape == (len(Stat), 0)


# ------------------------------------------------------------------------------------------------ choice of a backend


def test_auto_takes_torch_for_float64_on_a_cpu():
    assert select_backend("auto", CPU, {torch.float64}).name == "torch"
    assert select_backend("auto", CPU, {torch.float32, torch.float64}).name == "torch"


def test_auto_takes_the_compiled_kernels_where_they_are():
    wanted = "native" if why_not("native") is None else "torch"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert select_backend("auto", CPU, {dtype}).name == wanted


@pytest.mark.parametrize("name", ["native", "triton"])
def test_float64_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(rowops, "unavailable_reason", lambda _: None)
    with pytest.raises(ValueError, match=f"backend='{name}'.*float64"):
        select_backend(name, CPU, {torch.float64})


@pytest.mark.parametrize("name", ["native", "triton"])
def test_an_unavailable_backend_is_refused_with_its_reason_and_never_replaced(name, monkeypatch):
    monkeypatch.setattr(rowops, "unavailable_reason", lambda n: None if n == "torch" else "it was not built")
    with pytest.raises(RuntimeError, match=f"backend='{name}' is not available: it was not built"):
        select_backend(name, CPU, {torch.float32})


def test_auto_warns_once_where_it_takes_plain_pytorch_for_an_unavailable_backend(monkeypatch):
    monkeypatch.setattr(rowops, "unavailable_reason", lambda n: None if n == "torch" else "it was not built")
    rowops._available_to_auto.cache_clear()
    with pytest.warns(RuntimeWarning, match="in plain PyTorch, .* since .native. is not .*: it was not"):
        assert select_backend("auto", CPU, {torch.float32}).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto", CPU, {torch.float32}).name == "torch"
        assert select_backend("auto", CPU, {torch.float64}).name == "torch"  # no backend was passed over
    rowops._available_to_auto.cache_clear()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend.*'cuda'"):
        rowops.unavailable_reason("cuda")
