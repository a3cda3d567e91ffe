"""The policy in the kernels against its formulas on tensors, and in the gradient of the logits.

Tolerances, with eps = 2^-24 (half an ulp) and L the largest magnitude among a token's log-probs and lambda times them:

* the advantage is at most five float32 operations on numbers of size 2 L: off by 10 eps L;
* a ratio or an importance weight is exp(x), x the difference of two log-probs: off by eps L + 4 eps (1 + |x|) of its
  value, since Triton's exponential rounds x log2 e first (PyTorch's and the C library's are good to an ulp);
* the loss is the advantage times at most two factors, each such a weight or an exact bound: relative errors add up.
  Where a clip begins loss and bound meet, so it does not matter on which side rounding puts a token. Its derivative and
  ``clipped`` jump there: for these two, tokens that are that close to a corner are left out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import row_divergence, why_not
from fused_gopd.rowops import (
    LARGEST_WEIGHT,
    GradientWeights,
    LogitTransform,
    ModelRows,
    Policy,
    PolicyRule,
    PolicyStat,
    RowProblem,
    Stat,
    select_backend,
)
from fused_gopd.rowops.torch import TorchRowOps
from interpreter import DEVICE, INTERPRETED, passed_when_interpreted

INF, NAN = math.inf, math.nan
TRUTH = TorchRowOps()
EPS = 2.0**-24

# NumPy's warnings, of inf and NaN in the interpreter
pytestmark = [pytest.mark.untried, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.interpreter
def test_interpreted_suite_passes() -> None:
    """This file in Triton's interpreter, which is chosen when the kernels are first imported."""
    assert passed_when_interpreted(__file__) >= 15


def test_kernels_number_the_rows_as_the_interface_does() -> None:
    pytest.importorskip("triton")
    from fused_gopd.rowops.triton import policy

    found = {x.name: getattr(policy, x.name).value for x in (*PolicyStat, Stat.LOGSUM_STUDENT, Stat.LOGIT_STUDENT)}
    assert found == {x.name: int(x) for x in (*PolicyStat, Stat.LOGSUM_STUDENT, Stat.LOGIT_STUDENT)}


# ---------------------------------------------------------------------------------------------------------- the numbers


def statistics_of(logprobs: list[float], seed: int = 0) -> Tensor:
    """Statistics of one model with these log-probs, as some columns of a larger tensor. Odd ones that are -inf have an
    empty row."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((len(Stat) + 1, len(logprobs) + 3), NAN)
    found = whole[:-1, 2 : 2 + len(logprobs)]
    logsum = torch.rand(len(logprobs), generator=generator) * 12
    logit = torch.tensor(logprobs, dtype=torch.float32) + logsum
    for i, x in enumerate(logprobs):
        if x == -INF and i % 2:
            logsum[i] = logit[i] = -INF
        if math.isnan(x) and i % 2:
            logsum[i], logit[i] = NAN, 0.0
    found[Stat.LOGSUM_STUDENT], found[Stat.LOGIT_STUDENT] = logsum, logit
    return found.to(DEVICE) if DEVICE != "cpu" else found


def map_policy(policy: Policy, function: Any) -> Policy:
    tensors = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    return dataclasses.replace(policy, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})


def logprob_of(statistics: Tensor) -> Tensor:
    logsum = statistics[Stat.LOGSUM_STUDENT]
    return torch.where(torch.isneginf(logsum), logsum, statistics[Stat.LOGIT_STUDENT] - logsum)


def check(ops: Any, policy: Policy, student: Tensor) -> Tensor:
    """A policy's numbers are those of the formulas in float64; NaN and infinities are where float32 has them."""
    got = ops.policy(policy, student)
    assert got.shape == (len(PolicyStat), student.shape[1])
    assert got.dtype == torch.float32
    want32 = TRUTH.policy(policy, student)
    for stat in PolicyStat:
        for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
            assert torch.equal(test(got[stat]), test(want32[stat])), f"{stat.name}: {name} in other places"
    want = TRUTH.policy(map_policy(policy, Tensor.double), student.double())

    p = logprob_of(student).double()
    models = [logprob_of(x).double() for x in (policy.teacher, policy.ref) if x is not None]
    rule = policy.rule
    if rule.logprob_min is not None:
        models = [x.clamp_min(rule.logprob_min) for x in models]
    old, rollout = (None if x is None else x.double() for x in (policy.old_logprobs, policy.rollout_logprobs))
    behaviour = p if old is None else old
    lam = policy.reward_scale.double() if isinstance(policy.reward_scale, Tensor) else abs(policy.reward_scale)
    factor = 1 + 2 * (lam.abs() if isinstance(lam, Tensor) else lam)
    sizes = [p, behaviour, *(x * factor for x in models), *([rollout] if rollout is not None else [])]
    L = torch.stack([x.nan_to_num(0.0, 0.0, 0.0).abs() for x in sizes]).amax(0)

    def weight(x: Tensor) -> tuple[Tensor, Tensor]:
        """exp(x) or more than float32 has, and its relative error."""
        x = x.nan_to_num(0.0).clamp(-300.0, 300.0)
        return x.exp(), EPS * L + 4 * EPS * (1 + x.abs())

    ratio, ratio_error = weight(p - behaviour)
    importance, importance_error = weight(torch.zeros_like(p) if rollout is None else behaviour - rollout)
    importance = importance.clamp_max(rule.rollout_is_cap)
    loss, A_error = want[PolicyStat.LOSS].nan_to_num(0.0, 0.0, 0.0).abs(), 10 * EPS * L
    A = want[PolicyStat.ADVANTAGE].nan_to_num(0.0).abs()
    bounds = [
        *((1 - rule.clip[0], 1 + rule.clip[1]) if rule.clip else ()),
        *([rule.clip_dual] if rule.clip_dual else ()),
    ]
    small = (A - 4 * A_error) <= 0  # rounding decides on its sign, and so on which clip there is
    reached = torch.where(
        small, torch.stack([ratio, *(torch.full_like(A, x) for x in bounds)]).amax(0) * importance, loss / A
    )
    loss_error = (
        loss * (ratio_error + importance_error + 8 * EPS) + A_error * reached + 1e-37 * (1 + A) * (1 + importance)
    )
    loss_error = loss_error + torch.where(small, A * reached, 0)
    corner = small & bool(bounds)
    for bound in bounds:
        corner = corner | ((ratio - bound).abs() <= 4 * ratio_error * ratio + 1e-37)
    nothing = got[PolicyStat.ADVANTAGE] == 0
    assert not got[PolicyStat.LOSS : PolicyStat.DLOGPROB + 1, nothing].any()

    def close(stat: PolicyStat, error: Tensor, among: Tensor | None = None) -> None:
        there = want32[stat].isfinite() & want[stat].isfinite() & (want[stat].abs() < 3e38)
        if among is not None:
            there = there & among
        excess = ((got[stat].double() - want[stat]).abs() - error)[there]
        assert excess.numel() == 0 or excess.max() <= 0, f"{stat.name}: {excess.max():.3g} beyond the tolerance"

    close(PolicyStat.ADVANTAGE, A_error)
    close(PolicyStat.LOSS, loss_error)
    close(PolicyStat.DLOGPROB, loss_error, ~corner)
    close(PolicyStat.CLIPPED, torch.zeros_like(A), ~corner)
    close(PolicyStat.IMPORTANCE, importance * importance_error + 1e-37)
    return got


RULES = (
    PolicyRule(),
    PolicyRule(clip=(0.2, 0.28)),
    PolicyRule(clip=(0.0, 0.0), clip_dual=1.0),
    PolicyRule(clip_dual=1.5),
    PolicyRule(clip=(0.2, 0.2), clip_dual=3.0),
    PolicyRule(advantage_clip=(-0.5, 0.5)),
    PolicyRule(advantage_clip=(-0.3, 1.0), clip=(1.0, 2.0)),
    PolicyRule(logprob_min=-3.0),
    PolicyRule(rollout_is_cap=1.2),
    PolicyRule(logprob_min=-20.0, advantage_clip=(-2.0, 5.0), clip=(0.2, 0.2), clip_dual=2.0, rollout_is_cap=5.0),
)
ORDINARY = st.floats(-30.0, 0.0, width=32)
EXTREME = st.sampled_from([0.0, -INF, NAN, -1e-30, -100.0, -200.0, -2000.0, -1e30])
SCALES = (0.0, 1.0, 0.5, 0.3, 1.25, 2.0, -1.5)


@st.composite
def policies(draw: st.DrawFn) -> tuple[Policy, Tensor]:
    C = draw(st.integers(1, 7))
    value = st.one_of(ORDINARY, EXTREME) if draw(st.booleans()) else ORDINARY
    vector = st.lists(value, min_size=C, max_size=C)
    seed = draw(st.integers(0, 99))
    lam: float | Tensor = draw(st.sampled_from(SCALES))
    given_models = draw(st.sampled_from(["both", "both", "teacher", "ref"]))
    if given_models == "both" and draw(st.booleans()):
        lam = torch.tensor(draw(st.lists(st.sampled_from(SCALES), min_size=C, max_size=C)), device=DEVICE)
    student, teacher, ref = (statistics_of(draw(vector), seed + i) for i in range(3))

    def maybe() -> Tensor | None:
        x = torch.tensor(draw(vector), device=DEVICE)
        near = draw(st.booleans())  # ratios on both sides of the clips, rather than 0 and inf
        return torch.where(x.isfinite() & near, logprob_of(student) + x.clamp(-2, 2) / 2 + 0.5, x)

    policy = Policy(
        rule=draw(st.sampled_from(RULES)),
        reward_scale=lam,
        teacher=None if given_models == "ref" else teacher,
        ref=None if given_models == "teacher" else ref,
        old_logprobs=maybe() if draw(st.booleans()) else None,
        rollout_logprobs=maybe() if draw(st.booleans()) else None,
    )
    return policy, student


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=policies())
def test_any_policy_is_its_formulas(ops: Any, case: tuple[Policy, Tensor]) -> None:
    check(ops, *case)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def test_a_token_that_a_model_rules_out_has_no_advantage_unless_clamped(ops: Any) -> None:
    student, teacher, ref = statistics_of([-1.0] * 4), statistics_of([-INF, -2.0] * 2), statistics_of([-2.0, -INF] * 2)
    lam = vector(1.25, 1.25, 0.0, 1.0)  # the last two do not need the model that rules the token out
    got = check(ops, Policy(PolicyRule(), lam, teacher, ref), student)
    assert got[PolicyStat.ADVANTAGE, :2].tolist() == [0, 0]
    assert got[PolicyStat.DLOGPROB, :2].tolist() == [0, 0]
    assert torch.allclose(got[PolicyStat.ADVANTAGE, 2:], vector(-1.0, -1.0), atol=1e-5)
    got = check(ops, Policy(PolicyRule(logprob_min=-20.0), 1.25, teacher, ref), student)
    assert torch.allclose(got[PolicyStat.ADVANTAGE, :2], vector(1.25 * -20 + 0.5 + 1, 1.25 * -2 + 5 + 1), atol=1e-4)


def test_a_diverged_model_is_nan_in_its_token_alone(ops: Any) -> None:
    fine = [-1.0, -2.0, -3.0, -4.0]
    for i in range(3):
        # of different log-probs: no advantage is no loss, NaN ratio or not
        stats = [statistics_of([NAN if (i, j) == (k, k) else x - k for j, x in enumerate(fine)]) for k in range(3)]
        got = check(ops, Policy(PolicyRule(clip=(0.2, 0.2)), 1.25, stats[1], stats[2], vector(*fine)), stats[0])
        assert got[PolicyStat.LOSS].isnan().tolist() == [i == j for j in range(4)]


def test_no_advantage_is_no_loss_whatever_the_ratio(ops: Any) -> None:
    """0 times a ratio or a weight that overflows is 0, not NaN; and an overflowing ratio that is clipped is finite."""
    student, teacher = statistics_of([-0.1, -0.1, -0.1, -INF]), statistics_of([-INF, -INF, -1.0, -1.0])
    for rule in (PolicyRule(), PolicyRule(clip=(0.2, 0.2)), PolicyRule(rollout_is_cap=5.0)):
        old, rollout = vector(-2000.0, -INF, -2000.0, -2.0), vector(-INF, -1.0, -0.1, -1.0)
        got = check(ops, Policy(rule, 1.0, teacher, None, old, rollout), student)
        assert got[PolicyStat.LOSS, :2].tolist() == [0, 0]
        assert got[PolicyStat.DLOGPROB, [0, 1, 3]].tolist() == [0, 0, 0]
    got = check(ops, Policy(PolicyRule(clip=(0.2, 0.2)), 1.0, teacher, None, old), student)
    assert got[PolicyStat.LOSS].isfinite().all()
    assert got[PolicyStat.CLIPPED].tolist() == [0, 0, 1, got[PolicyStat.CLIPPED, 3]]


def test_an_impossible_token_has_no_derivative_where_its_loss_is_none(ops: Any) -> None:
    """A ratio of 0 times a weight beyond the largest one."""
    student, teacher = statistics_of([-INF, -1.0]), statistics_of([-2.0, -2.0])
    policy = Policy(PolicyRule(), 1.0, teacher, None, vector(-1.0, -1.0), vector(-2000.0, -1.0))
    got = check(ops, policy, student)
    assert got[PolicyStat.LOSS, 0] == got[PolicyStat.DLOGPROB, 0] == 0
    assert got[PolicyStat.IMPORTANCE].tolist() == [torch.tensor(LARGEST_WEIGHT).item(), 1]


def test_what_is_no_log_prob_is_seen(ops: Any) -> None:
    """+inf is NaN in its token."""
    for name in ("student", "teacher", "ref", "old"):
        values = {x: [-i, INF if x == name else -i] for i, x in enumerate(("student", "teacher", "ref", "old"), 1)}
        student, teacher, ref = (statistics_of(values[x]) for x in ("student", "teacher", "ref"))
        for lam in (1.25, vector(0.3, 0.7)):
            got = check(ops, Policy(PolicyRule(), lam, teacher, ref, vector(*values["old"])), student)
            column = got[PolicyStat.LOSS if name == "student" else PolicyStat.ADVANTAGE]
            assert column.isfinite().tolist() == [True, False]


def test_equal_models_have_exactly_no_advantage(ops: Any) -> None:
    """q = r gives q whatever lambda is: the student among them has A = 0 to the bit."""
    stats = statistics_of([-1.3, -0.7, -20.1, -1e-3])
    for lam in (0.3, 1.25, -2.0, vector(0.0, 1.0, 0.7, 3.3)):
        got = check(ops, Policy(PolicyRule(), lam, stats, stats), stats)
        assert not got[[PolicyStat.LOSS, PolicyStat.DLOGPROB, PolicyStat.ADVANTAGE]].any()


def test_log_probs_near_the_largest_float_stay_finite(ops: Any) -> None:
    stats = [statistics_of([x] * 2) for x in (-1.0, -3e38, -1.0)]
    for lam in (1.25, 2.0, vector(1.25, -2.0)):
        got = ops.policy(Policy(PolicyRule(), lam, stats[1], stats[2]), stats[0])
        assert got[PolicyStat.ADVANTAGE].isfinite().all()
        assert got[PolicyStat.LOSS].isfinite().all()


def test_many_tokens_and_none(ops: Any) -> None:
    """More than a block of the kernel."""
    values = torch.linspace(-9.0, 0.0, 301).tolist()
    policy = Policy(
        RULES[-1], 1.25, statistics_of(values[::-1], 1), statistics_of(values, 2), vector(*values) * 1.02 - 0.1
    )
    check(ops, policy, statistics_of(values))
    none = map_policy(policy, lambda x: x[..., :0])
    assert ops.policy(none, statistics_of(values)[:, :0]).shape == (len(PolicyStat), 0)


def test_statistics_and_vectors_may_lie_anywhere(ops: Any) -> None:
    values = [-1.0, -2.0, -3.0, -0.5, -0.25]
    student, teacher, ref = (statistics_of(values[i:] + values[:i], i) for i in range(3))
    old, lam = vector(*values) - 0.2, vector(0.5, 1.25, 0.0, 1.0, 2.0)
    policy = Policy(RULES[4], lam, teacher, ref, old, old - 0.1)
    want = ops.policy(policy, student)

    def strided(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    assert torch.equal(ops.policy(map_policy(policy, strided), strided(student)), want)


def test_a_policy_without_a_model_is_refused() -> None:
    for name in ("native", "triton"):
        if why_not(name) is None and (name == "native" or INTERPRETED):
            ops = select_backend(name, torch.device("cpu"), {torch.float32})
            with pytest.raises(ValueError, match="teacher or a reference"):
                ops.policy(Policy(PolicyRule(), 1.0), statistics_of([-1.0]))


# --------------------------------------------------------------------------------------------------------- the gradient


def gradient_case(divergence: str, dtype: torch.dtype, scale: Any = 1.25) -> tuple[RowProblem, Policy]:
    C, V = 6, 150
    generator = torch.Generator().manual_seed(4)
    raws = [(3 * torch.randn(C, V, generator=generator)).to(dtype).to(DEVICE) for _ in range(3)]
    raws[0][4, ::3] = -INF  # the token of row 4 is outside the support
    raws[0][5] = -INF
    ids = torch.tensor([1, 40, 149, 77, 3, 2], device=DEVICE)
    models = [ModelRows(raw, LogitTransform(softcap=20.0)) for raw in raws]
    others = {"teacher": models[1], "ref": models[2]} if divergence != "none" else {}
    problem = RowProblem(V, models[0], reward_scale=1.25 if others else 1.0, token_ids=ids,
                         divergence=row_divergence(divergence), **others)  # fmt: skip
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32

    def alone(x: list[float]) -> Tensor:
        return statistics_of(x).to(accumulated)

    old = torch.tensor([-3.0, -5.0, -4.0, -6.0, -2.0, -1.0], dtype=accumulated, device=DEVICE)
    policy = Policy(RULES[-1], scale, alone([-1.0, -9.0, -3.0, -2.0, -1.0, -1.0]), alone([-2.0] * 6), old, old + 0.1)
    return problem, policy


@pytest.mark.parametrize(
    ("divergence", "token", "dtype"),
    [
        ("none", "none", torch.float32),
        ("none", "vector", torch.bfloat16),
        ("reverse_kl", "vector", torch.float32),
        ("jsd", "one number", torch.float32),
        ("none", "vector", torch.float64),
        ("reverse_kl", "none", torch.float64),
    ],
    ids=str,
)
def test_the_gradient_with_a_policy_is_that_with_its_weights(ops: Any, divergence: str, token: str, dtype: Any) -> None:
    """The bits of token weights made beforehand, in one call and in two."""
    if dtype == torch.float64 and ops.name != "torch":
        pytest.skip("float32 and less")
    problem, policy = gradient_case(divergence, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w_y = {"none": None, "vector": torch.linspace(-1, 2, 6, dtype=wide, device=DEVICE),
           "one number": torch.tensor(0.25, dtype=wide, device=DEVICE).expand(6)}[token]  # fmt: skip
    w_d = torch.linspace(1, 2, 6, dtype=wide, device=DEVICE) if divergence != "none" else None
    weights = GradientWeights(w_d, w_y, policy)
    want, once, twice = torch.full((3, 6, 150), 7.0, dtype=wide, device=DEVICE)
    statistics = ops.statistics(problem)
    slope = -ops.policy(policy, statistics)[PolicyStat.DLOGPROB]
    assert (slope != 0).any()
    ops.gradient(problem, statistics, GradientWeights(w_d, slope if w_y is None else w_y * slope), want)
    ops.gradient(problem, statistics, weights, twice)
    assert torch.equal(ops.statistics_and_gradient(problem, weights, once), statistics)
    assert torch.equal(twice, want)
    assert torch.equal(once, want)
    assert want[0].any()
    two = torch.tensor(2.0, dtype=wide, device=DEVICE)
    doubled = GradientWeights(None if w_d is None else two * w_d, two.expand(6) if w_y is None else two * w_y, policy)
    ops.statistics_and_gradient(problem, doubled, once)
    assert torch.equal(once, 2 * want)


def test_the_gradient_with_a_policy_is_the_derivative_of_its_loss(ops: Any) -> None:
    """By autograd, of the dense loss in float64."""
    problem, policy = gradient_case("none", torch.float32)
    out = torch.empty(6, 150, device=DEVICE)
    ops.statistics_and_gradient(problem, GradientWeights(policy=policy), out)
    raw = problem.student.raw.double().requires_grad_()
    z = 20.0 * torch.tanh(raw / 20.0)
    z = torch.where(problem.student.raw == -INF, -INF, z)[:4]
    assert problem.token_ids is not None
    logprob = z.log_softmax(-1).gather(1, problem.token_ids[:4, None])[:, 0]
    own = torch.zeros(len(Stat), 4, dtype=torch.float64, device=DEVICE)
    own[Stat.LOGIT_STUDENT] = logprob.detach()
    term = TRUTH.policy(map_policy(policy, lambda x: x[..., :4].double()), own)
    (want,) = torch.autograd.grad((term[PolicyStat.DLOGPROB] * logprob).sum(), raw)
    assert (out[:4] - want[:4]).abs().max() <= 1e-5 * want.abs().max()
    assert not out[4:].any()


def test_a_policy_needs_token_ids() -> None:
    if why_not("native") is not None:
        pytest.skip("no native backend")
    problem, policy = gradient_case("none", torch.float32)
    ops = select_backend("native", torch.device("cpu"), {torch.float32})
    problem = dataclasses.replace(problem, token_ids=None)
    with pytest.raises(ValueError, match="needs token_ids"):
        ops.statistics_and_gradient(problem, GradientWeights(policy=policy), torch.empty(6, 150))
