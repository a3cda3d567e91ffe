"""The row operations in plain PyTorch: any device, any floating dtype. The slow reference of the other backends.

Rows are taken a few at a time, so that the temporaries are small compared with the chunk's buffers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..objective.divergences import Divergence, OneRound, Outcomes, divergence_value
from ..objective.policy import PolicyTerm, evaluate
from ..objective.statistics import token_logprob
from ..objective.target import bounded, mix, origin_of
from . import (
    GradientWeights,
    LinearExponentials,
    LogitTransform,
    ModelRows,
    Policy,
    RowDivergence,
    RowProblem,
    Stat,
    SumTerm,
)

# Elements of one temporary. At 2^20 float32 a temporary is 4 MiB: about a dozen of them live at once, still far
# below one chunk buffer of a 150k vocabulary, and small enough to stay in a CPU's last-level cache.
BLOCK_ELEMENTS = 1 << 20


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def unavailable_reason() -> str | None:
    return None


def wrong_device(device: torch.device) -> str | None:
    return None


def row_ops() -> TorchRowOps:
    return TorchRowOps()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Transformed logits relative to their maxima, for a few rows; entries outside the support are -inf."""

    z: Tensor  # (c, V)
    u: Tensor | None
    origin: Tensor | None  # (c,) what u is relative to before its log-sum
    teacher: Tensor | None  # 0 in rows with lambda = 0
    ref: Tensor | None  # 0 in rows with lambda = 1
    support: Tensor  # bool
    use_teacher: Tensor | None  # (c, 1) bool, None where there is no teacher
    use_ref: Tensor | None
    maxima: dict[Stat, Tensor]  # (c,) each
    slope: Tensor | float  # dz/dx of the student, (c, V) or a number


class TorchRowOps:
    """See :class:`fused_gopd.rowops.RowOps` for the formulas."""

    name = "torch"
    kinds: frozenset[str] | None = None

    def statistics(self, problem: RowProblem, out: Tensor | None = None) -> Tensor:
        dtype = _dtype(problem)
        if out is None:
            out = torch.empty(len(Stat), problem.rows, dtype=dtype, device=problem.student.raw.device)
        out.zero_()
        for rows, part in _blocks(problem):
            _statistics(part, _load(part, dtype), out[:, rows])
        return out

    def gradient(self, problem: RowProblem, statistics: Tensor, weights: GradientWeights, out: Tensor) -> None:
        dtype = _dtype(problem)
        if weights.policy is not None:
            slope = -_policy(weights.policy, statistics).dlogprob
            weights = GradientWeights(weights.divergence, slope if weights.token is None else weights.token * slope)
        for rows, part in _blocks(problem):
            part_weights = GradientWeights(rows_of(weights.divergence, rows), rows_of(weights.token, rows))
            own = statistics[:, rows]
            out[rows, : problem.vocab_size].copy_(_gradient(part, _load(part, dtype, own), own, part_weights))

    def second_round(self, problem: RowProblem, statistics: Tensor) -> Tensor:
        dtype = _dtype(problem)
        out = torch.empty(2, problem.rows, dtype=dtype, device=problem.student.raw.device)
        for rows, part in _blocks(problem):
            own = statistics[:, rows]
            logsums = own[Stat.LOGSUM_STUDENT], own[Stat.LOGSUM_TARGET]
            out[:, rows] = torch.stack(_second_round(part, _load(part, dtype, own), *logsums))
        return out

    def statistics_and_gradient(
        self, problem: RowProblem, weights: GradientWeights, out: Tensor, statistics: Tensor | None = None
    ) -> Tensor:
        statistics = self.statistics(problem, statistics)
        self.gradient(problem, statistics, weights, out)
        return statistics

    def policy(self, policy: Policy, statistics: Tensor) -> Tensor:
        return _policy(policy, statistics).stacked()

    def losses(
        self, divergence: RowDivergence, reward_scale: float | Tensor, has: tuple[bool, bool], statistics: Tensor
    ) -> Tensor:
        assert isinstance(divergence, Divergence)
        return divergence_value(divergence, reward_scale, statistics, has)

    def linear_statistics(
        self,
        hidden: Tensor,
        weight: Tensor,
        transform: LogitTransform,
        vocab_size: int,
        token_ids: Tensor,
        out: Tensor | None = None,
    ) -> Tensor | None:
        return None

    def linear_exponentials(
        self,
        hidden: Tensor,
        weight: Tensor,
        transform: LogitTransform,
        vocab_size: int,
        token_ids: Tensor,
        exponentials: Tensor,
        out: Tensor | None = None,
    ) -> LinearExponentials | None:
        return None

    def add_logprobs(self, out: Tensor, model: ModelRows, vocab_size: int, statistics: Tensor, term: SumTerm) -> bool:
        return False

    def scale_(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return scale_(gradient, factor)


def _policy(policy: Policy, statistics: Tensor) -> PolicyTerm:
    return evaluate(policy, token_logprob(statistics[Stat.LOGIT_STUDENT], statistics[Stat.LOGSUM_STUDENT]))


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place. A 0-d factor would be rounded to a low-precision gradient's dtype before it multiplies."""
    return gradient.mul_(factor.reshape(1))


def _dtype(problem: RowProblem) -> torch.dtype:
    models = (problem.student, problem.teacher, problem.ref)
    return accumulation_dtype(*(m.raw for m in models if m is not None))


def rows_of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _blocks(problem: RowProblem) -> Iterator[tuple[slice, RowProblem]]:
    step = max(1, BLOCK_ELEMENTS // max(1, problem.vocab_size))
    for start in range(0, problem.rows, step):
        rows = slice(start, min(start + step, problem.rows))

        def part(model: ModelRows | None, rows: slice = rows) -> ModelRows | None:
            return None if model is None else ModelRows(model.raw[rows], model.transform)

        student = part(problem.student)
        assert student is not None
        lam = problem.reward_scale
        yield (
            rows,
            dataclasses.replace(
                problem,
                student=student,
                teacher=part(problem.teacher),
                ref=part(problem.ref),
                reward_scale=lam[rows] if isinstance(lam, Tensor) else lam,
                token_ids=rows_of(problem.token_ids, rows),
                divergence=None if problem.divergence is None else _formulas(problem).rows(rows),
            ),
        )


def transformed(x: Tensor, t: LogitTransform, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z of raw logits ``x`` and the bias of their tokens, which broadcasts against them."""
    x = x.to(dtype)
    if bias is not None:
        x = x + bias.to(dtype)
    if t.scale != 1.0:
        x = x * t.scale
    if t.softcap is not None:
        # tanh would turn -inf into -softcap, a token that exists
        x = torch.where(x == -math.inf, x, t.softcap * torch.tanh(x / t.softcap))
    return x / t.temperature if t.temperature != 1.0 else x


def slope(t: LogitTransform, z: Tensor) -> Tensor | float:
    """dz/dx from the value: cap'(x) = 1 - tanh(x)^2 and tanh(x) = z temperature / softcap."""
    value = t.scale / t.temperature
    if t.softcap is None:
        return value
    tanh = z * (t.temperature / t.softcap)
    return value * (1.0 - tanh * tanh)


def _transform(model: ModelRows, vocab_size: int, dtype: torch.dtype) -> Tensor:
    bias = model.transform.bias
    return transformed(model.raw[:, :vocab_size], model.transform, None if bias is None else bias[:vocab_size], dtype)


def _load(problem: RowProblem, dtype: torch.dtype, statistics: Tensor | None = None) -> _Rows:
    """``statistics`` are those that exist already, of these columns or more: logits are relative to their maxima."""
    V = problem.vocab_size
    z = _transform(problem.student, V, dtype)
    support = z != -math.inf
    lam = problem.reward_scale
    lam_column = lam.to(dtype)[:, None] if isinstance(lam, Tensor) else torch.full_like(z[:, :1], float(lam))

    def needed(model: ModelRows | None, use: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if model is None:
            return None, None
        x = _transform(model, V, dtype)
        return torch.where(use, x, torch.zeros_like(x)), use

    teacher, use_teacher = needed(problem.teacher, lam_column != 0)
    ref, use_ref = needed(problem.ref, lam_column != 1)
    for x in (teacher, ref):
        if x is not None:
            support = support & (x != -math.inf)
    empty = ~support.any(-1)
    maxima: dict[Stat, Tensor] = {}

    def relative(x: Tensor, stat: Stat) -> Tensor:
        """x - max over the support, -inf outside it."""
        inside = x.masked_fill(~support, -math.inf)
        maxima[stat] = inside.amax(-1).masked_fill(empty, 0) if statistics is None else statistics[stat]
        return inside - maxima[stat][:, None]

    dz_dx = slope(problem.student.transform, torch.where(support, z, torch.zeros_like(z)))
    z = relative(z, Stat.MAX_STUDENT)
    if teacher is not None:
        teacher = relative(teacher, Stat.MAX_TEACHER)
    if ref is not None:
        ref = relative(ref, Stat.MAX_REF)
    u = origin = None
    if teacher is not None or ref is not None:
        u = mix(lam_column if isinstance(lam, Tensor) else lam, teacher, ref).masked_fill(~support, -math.inf)
        if statistics is not None:
            origin = statistics[Stat.ORIGIN_TARGET]
        else:
            origin = origin_of(u.amax(-1).masked_fill(empty, 0))
    return _Rows(
        z=z,
        u=u,
        origin=origin,
        teacher=teacher,
        ref=ref,
        support=support,
        use_teacher=use_teacher,
        use_ref=use_ref,
        maxima=maxima,
        slope=dz_dx,
    )


def _weighted(weights: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """sum over the support of weights * values, where values may be anything outside it."""
    return (weights * torch.where(support, values, torch.zeros_like(values))).sum(-1)


def _logsum(logits: Tensor) -> Tensor:
    """log sum exp of logits whose maximum is 0; NaN where any is NaN (a row with +inf, relative to itself, has one)."""
    return logits.exp().sum(-1).log()


def _probabilities(logits: Tensor, logsum: Tensor, support: Tensor) -> Tensor:
    """At most 1: relative to maxima of more columns a large mask rounds to another number than its log-sum had."""
    return torch.where(support, (logits - logsum[:, None]).clamp_max(0).exp(), torch.zeros_like(logits))


def _gap(x: _Rows) -> Tensor:
    """z' - u."""
    assert x.u is not None
    return bounded(x.z - x.u)


def _target(x: _Rows) -> Tensor:
    """u relative to its origin."""
    assert x.u is not None
    assert x.origin is not None
    return bounded(x.u - x.origin[:, None]).masked_fill(~x.support, -math.inf)


def _formulas(problem: RowProblem) -> Divergence:
    assert isinstance(problem.divergence, Divergence)
    return problem.divergence


def _outcomes(x: _Rows, logsum_p: Tensor, logsum_u: Tensor) -> Outcomes:
    """At most 0, as in :func:`_probabilities`."""
    log_t = (_target(x) - logsum_u[:, None]).clamp_max(0)
    return Outcomes(bounded(x.z - logsum_p[:, None]).clamp_max(0), log_t, log_t)


def _second_round(problem: RowProblem, x: _Rows, logsum_p: Tensor, logsum_u: Tensor) -> tuple[Tensor, Tensor]:
    """CENTRE and VALUE."""
    outcomes = _outcomes(x, logsum_p, logsum_u)
    divergence = _formulas(problem)
    found = divergence.weighted(outcomes), divergence.terms(outcomes)
    centre, value = (torch.where(x.support, y, torch.zeros_like(y)).sum(-1) for y in found)
    return centre, value


def _statistics(problem: RowProblem, x: _Rows, out: Tensor) -> None:
    logsum_p = _logsum(x.z)
    p = _probabilities(x.z, logsum_p, x.support)
    out[Stat.LOGSUM_STUDENT] = logsum_p
    out[Stat.MEAN_LOGIT] = _weighted(p, x.z, x.support)
    for stat, maximum in x.maxima.items():
        out[stat] = maximum
    for model, use, logsum in ((x.teacher, x.use_teacher, Stat.LOGSUM_TEACHER), (x.ref, x.use_ref, Stat.LOGSUM_REF)):
        if model is not None and use is not None:
            out[logsum] = torch.where(use[:, 0], _logsum(model), torch.zeros_like(logsum_p))
    if x.u is not None:
        assert x.origin is not None
        u = _target(x)
        # not relative to its own maximum where that is near 0
        logsum_u = torch.logsumexp(u, -1)
        out[Stat.ORIGIN_TARGET] = x.origin
        out[Stat.LOGSUM_TARGET] = logsum_u
        out[Stat.MEAN_GAP] = bounded(_weighted(p, _gap(x), x.support))
        divergence = _formulas(problem)
        if divergence.target_gap:
            out[Stat.MEAN_TARGET_GAP] = _weighted(_probabilities(u, logsum_u, x.support), u - x.z, x.support)
        elif divergence.second_round:
            out[Stat.CENTRE], out[Stat.VALUE] = _second_round(problem, x, logsum_p, logsum_u)
    if problem.token_ids is not None:
        inside = (problem.token_ids >= 0) & (problem.token_ids < problem.vocab_size)
        ids = torch.where(inside, problem.token_ids, torch.zeros_like(problem.token_ids))[:, None]
        for model, use, stat in (
            (x.z, None, Stat.LOGIT_STUDENT),
            (x.teacher, x.use_teacher, Stat.LOGIT_TEACHER),
            (x.ref, x.use_ref, Stat.LOGIT_REF),
        ):
            if model is not None:
                value = torch.where(inside, model.gather(1, ids)[:, 0], torch.full_like(logsum_p, math.nan))
                out[stat] = value if use is None else torch.where(use[:, 0], value, torch.zeros_like(value))


def _term(problem: RowProblem, x: _Rows, p: Tensor, statistics: Tensor) -> Tensor:
    """The gradient of the divergence, or of a single model's -entropy, with respect to z; anything outside S."""

    def around(values: Tensor, mean: Stat) -> Tensor:
        inside = bounded(values - statistics[mean][:, None])
        return p * torch.where(x.support, inside, torch.zeros((), dtype=p.dtype, device=p.device))

    if problem.divergence is None:
        return around(x.z, Stat.MEAN_LOGIT)
    divergence, logsum_u = _formulas(problem), statistics[Stat.LOGSUM_TARGET]
    if isinstance(divergence, OneRound):
        return divergence.blend(
            lambda: p - _probabilities(_target(x), logsum_u, x.support), lambda: around(_gap(x), Stat.MEAN_GAP)
        )
    weighted = divergence.weighted(_outcomes(x, statistics[Stat.LOGSUM_STUDENT], logsum_u))
    return torch.where(x.support, bounded(weighted - p * statistics[Stat.CENTRE][:, None]), torch.zeros_like(p))


def _gradient(problem: RowProblem, x: _Rows, statistics: Tensor, weights: GradientWeights) -> Tensor:
    logsum_p = statistics[Stat.LOGSUM_STUDENT]
    p = _probabilities(x.z, logsum_p, x.support)
    grad = torch.zeros_like(p)
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    live = torch.zeros_like(p[:, :1], dtype=torch.bool)
    if weights.divergence is not None:
        w = weights.divergence[:, None]
        live = live | (w != 0)
        grad = grad + torch.where(w == 0, zero, w * _term(problem, x, p, statistics))
    if weights.token is not None:
        assert problem.token_ids is not None
        w = weights.token[:, None]
        live = live | (w != 0)
        vocabulary = torch.arange(problem.vocab_size, device=p.device)
        hit = (vocabulary == problem.token_ids[:, None]) & x.support
        grad = grad + torch.where(w == 0, zero, w * (p - hit.to(p.dtype)))
    # with both weights 0 a row is 0 even where the slope is NaN
    return torch.where(x.support & live, grad * x.slope, zero)
