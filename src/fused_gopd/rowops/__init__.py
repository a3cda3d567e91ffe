"""Operations on one chunk of logits: the seam between the mathematics and the machine.

Everything that touches a ``[C, V]`` buffer of logits is a *row operation* and lives in this package, once per
backend and under the same names. A backend is a module with a class that follows :class:`RowOps`.

Notation of the formulas here and in every backend, for one row (one token):

    z, z_q, z_r   transformed logits of student, teacher and reference over the joint vocabulary of V entries
    S             the support: entries where no model that the row needs has -inf. A row needs the teacher unless
                  lambda = 0 and the reference unless lambda = 1; NaN and +inf stay inside S and make the row NaN
    z', q', r'    the same relative to their maxima over S, z' = z - max_S z: float32 would lose a common offset of the
                  logits from every log-prob otherwise (at an offset of 1e4 a log-prob would be off by 5e-4)
    u             lambda q' + (1 - lambda) r', the logits of the target; computed as r' + lambda (q' - r') for
                  lambda <= 1/2 and as q' + (lambda - 1) (q' - r') above, so that three equal models give exactly u = z'
                  (see objective.target.mix). Clamped to the finite range: a mask times lambda may be beyond it
    p, t          softmax of z and of u over S
    m             b t + (1 - b) p, of a mixture divergence
    h~, delta     see objective/divergences.py
"""

from __future__ import annotations

import enum
import functools
import importlib
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..records import record

if TYPE_CHECKING:
    # By name, not `import torch`: loading the submodule .torch rebinds the name `torch` in this package.
    from torch import Tensor, device, dtype


@record(frozen=True, eq=False)
class LogitTransform:
    """``z = cap(scale * (x + bias)) / temperature`` with ``cap(x) = softcap * tanh(x / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    bias: Tensor | None = None  # (>= V,), any floating dtype, contiguous


@record(frozen=True, eq=False)
class ModelRows:
    """The raw logits of one model for the rows of a chunk."""

    raw: Tensor  # (C, >= V), floating; unit stride along the vocabulary, any stride (0 too) along the rows
    transform: LogitTransform
    # What a backend makes of the two at the first use (checked addresses, a kernel's arguments, a copy of the bias). It
    # lives as long as this object; for as long the tensors stay where they are, and the bias is not written to.
    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


class MixtureConstants(NamedTuple):
    """A divergence c_t KL(t || m) + c_p KL(p || m) with m = b t + (1 - b) p, for float32 kernels.

    At delta = log(t / p) the two log-ratios follow from one logarithm, log(m / p) for delta <= turn and log(m / t)
    above it. Near an end of b all of a JSD is as small as b or 1 - b, and the logarithm has to be exact to that: as
    log1p, with the turn where b t = (1 - b) p. Elsewhere the turn is at 0 and log is exact enough.
    """

    share: float  # b
    one_minus_share: float
    turn: float
    near_end: bool
    target_scale: float  # c_t
    student_scale: float  # c_p
    kappa: float  # c_p b - c_t (1 - b); 0 for the JSD

    @staticmethod
    @functools.lru_cache
    def of(share: float, target_scale: float, student_scale: float, kappa: float) -> MixtureConstants:
        least = 1.2e-38  # the smallest normal float32
        b, rest = max(share, least), max(1.0 - share, least)
        near_end = min(b, rest) < 1 / 128
        # exp(turn) is a float32
        turn = min(max(math.log(rest / b), -80.0), 80.0) if near_end else 0.0
        return MixtureConstants(
            share=b,
            one_minus_share=rest,
            turn=turn,
            near_end=near_end,
            target_scale=target_scale,
            student_scale=student_scale,
            kappa=kappa,
        )


class RowDivergence(Protocol):
    """What kernels know of a :class:`fused_gopd.objective.divergences.Divergence`, which has the formulas.

    The kinds that have kernels, with delta = log t - log p:

        reverse_kl  one round
        forward_kl  one round
        mixed       one round: w forward + (1 - w) reverse, ``forward_weight`` = w, a number or (C,)
        mixture     c_t KL(t || m) + c_p KL(p || m), ``constants`` a MixtureConstants
                    h~ = c_p log(p / m) + kappa expm1(log(t / m))      terms: c_t t log(t / m) + c_p p log(p / m)
        alpha       ``constants`` (alpha,), neither 0 nor 1
                    h~ = -expm1(alpha delta) / alpha                   terms: p h~ / (1 - alpha) for alpha <= 1/2, above
                                                                       t expm1((alpha - 1) delta) / (alpha (alpha - 1))
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def second_round(self) -> bool:
        """Whether statistics need a second pass over the row, which fills CENTRE and VALUE."""

    @property
    def target_gap(self) -> bool:
        """Whether statistics include MEAN_TARGET_GAP."""

    @property
    def constants(self) -> tuple[float, ...]:
        """Numbers of the kernels, made once per call."""


class Beside(NamedTuple):
    """Further row problems on the student's logits of one, whose gradients are added to its own."""

    problems: tuple[RowProblem, ...]
    scratch: Callable[[int], Tensor]  # 0 or 1 -> (C, V) in the accumulation dtype, memory of its own


@record(frozen=True, eq=False)
class RowProblem:
    """What a row operation computes on: up to three models on the same C tokens.

    Without a divergence it is a single model: teacher and ref are None, u is absent and d = z'. Otherwise at least one
    of teacher and ref is given; where one is None it has cancelled (lambda = 1 without ref, lambda = 0 without
    teacher).
    """

    vocab_size: int  # V, the joint vocabulary: columns past it do not exist
    student: ModelRows
    _: KW_ONLY
    teacher: ModelRows | None = None
    ref: ModelRows | None = None
    reward_scale: float | Tensor = 1.0  # lambda; a tensor is (C,) in the accumulation dtype and needs both models
    token_ids: Tensor | None = None  # (C,) int64
    divergence: RowDivergence | None = None
    beside: Beside | None = None  # not for a backend: fused_gopd.loop.logit_gradient adds them

    @property
    def rows(self) -> int:
        return self.student.raw.shape[0]


# The frozen models, each with the lambda at which its coefficient is 0.
FROZEN = (("teacher", 0.0), ("ref", 1.0))

# The target's maximum is far from 0 where one model alone has a large mask; a float32 log-sum that is 64 from it has
# 4e-6 of rounding.
FAR = 64.0


class Stat(enum.IntEnum):
    """Rows of the (len(Stat), C) statistics tensor. What a problem does not have (a model, token ids) is 0.

    All can be merged over slices of the vocabulary: maxima by max, log-sums by ``logaddexp`` after moving them to the
    common maximum, means by their softmax weights, token logits by picking the slice that holds the token.

    A row with NaN or +inf in a model's support has that model's LOGSUM NaN, and its other statistics mean nothing. A
    row without support has LOGSUM -inf and MAX 0.
    """

    LOGSUM_STUDENT = 0  # log sum_S exp z', >= 0
    LOGSUM_TEACHER = 1  # log sum_S exp q' (0 where lambda = 0: its values do not matter)
    LOGSUM_REF = 2  # log sum_S exp r' (0 where lambda = 1)
    LOGSUM_TARGET = 3  # log sum_S exp(u - ORIGIN_TARGET)
    MEAN_LOGIT = 4  # sum_S p z', so that the entropy is LOGSUM_STUDENT - MEAN_LOGIT
    MEAN_GAP = 5  # sum_S p (z' - u)
    CENTRE = 6  # of a second round: A = sum_S p h~
    VALUE = 7  # of a second round: the sum of its terms, the divergence itself
    MEAN_TARGET_GAP = 7  # forward_kl, mixed: sum_S t (u - ORIGIN_TARGET - z')
    LOGIT_STUDENT = 8  # z'[token]; -inf where the token is outside S, NaN where the id is outside [0, V)
    LOGIT_TEACHER = 9  # q'[token], likewise (0 where lambda = 0)
    LOGIT_REF = 10  # r'[token], likewise (0 where lambda = 1)
    MAX_STUDENT = 11  # max_S z
    MAX_TEACHER = 12  # max_S z_q (0 where lambda = 0)
    MAX_REF = 13  # max_S z_r (0 where lambda = 1)
    ORIGIN_TARGET = 14  # 0, or where that is above FAR or below -FAR a number near max_S u (max_S u, of one part)


# Of an importance weight, the square root of the largest float32: a loss of 0 stays 0, and hidden states times the
# weight are finite.
LARGEST_WEIGHT = 3.4028234663852886e38**0.5


class PolicyRule(NamedTuple):
    """The numbers of a policy loss; None leaves a step out. Formulas: :mod:`fused_gopd.objective.policy`.

    Kernels have the first five. Where the others are given, PyTorch makes the loss.
    """

    logprob_min: float | None = None
    advantage_clip: tuple[float, float] | None = None
    clip: tuple[float, float] | None = None
    clip_dual: float | None = None
    rollout_is_cap: float = LARGEST_WEIGHT
    ratio: str = "token"
    log_ratio_max: float | None = None
    loss_max: float | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """What kernels take: a step that is left out has infinities, which change nothing."""
        advantage_low, advantage_high = self.advantage_clip or (-math.inf, math.inf)
        low, high = self.clip or (math.inf, math.inf)
        return {
            "logprob_min": -math.inf if self.logprob_min is None else float(self.logprob_min),
            "advantage_low": float(advantage_low),
            "advantage_high": float(advantage_high),
            "ratio_low": 1.0 - low,
            "ratio_high": 1.0 + high,
            "clip_dual": math.inf if self.clip_dual is None else float(self.clip_dual),
            "importance_cap": float(self.rollout_is_cap),
        }


@record(frozen=True, eq=False)
class Policy:
    """What a policy loss takes of C sampled tokens besides the student's log-probs. One of the two models is given."""

    rule: PolicyRule
    reward_scale: float | Tensor  # lambda; a tensor is (C,)
    # (len(Stat), C) statistics of one model alone, any row stride: its LOGIT_STUDENT and LOGSUM_STUDENT are read
    teacher: Tensor | None = None
    ref: Tensor | None = None
    old_logprobs: Tensor | None = None  # (C,)
    rollout_logprobs: Tensor | None = None  # (C,)


class PolicyStat(enum.IntEnum):
    """Rows of the (len(PolicyStat), C) tensor that :meth:`RowOps.policy` returns."""

    LOSS = 0
    DLOGPROB = 1  # the derivative of the loss with respect to the student's log-prob
    ADVANTAGE = 2
    CLIPPED = 3  # 1 where the derivative is 0 because a clip is in force, else 0
    IMPORTANCE = 4  # the weight of the rollout, 1 without one


@record(frozen=True, eq=False)
class GradientWeights:
    """The coefficients per token of the gradient with respect to z (see :meth:`RowOps.gradient`); None is 0."""

    divergence: Tensor | None = None  # (C,) in the accumulation dtype, any stride: of the divergence's gradient
    token: Tensor | None = None  # (C,) likewise, of p - 1[v = token]
    # With a policy the weight of p - 1[v = token] is ``token``, 1 where that is None, times -DLOGPROB of the student's
    # log-prob in the statistics.
    policy: Policy | None = None


class SumTerm(NamedTuple):
    """One model of a LogLinear or Mixture whose log-probs are added up."""

    weight: float | Tensor  # tensor: (C,), like the next
    total_weight: float | Tensor  # the sum of the absolute weights of all models
    mixture: bool
    first: bool  # nothing is in the sum yet
    last: bool  # no other model follows


class LinearExponentials(NamedTuple):
    """What :meth:`RowOps.linear_exponentials` returns beside the exponentials E, with y = token.

    The gradient of -log p[y] with respect to the raw logits, slope (p - 1[v = y]) with z = slope x, is factor E and,
    at y, factor entry: the largest number of a row, which 16 bits would round the most.
    """

    statistics: Tensor  # (len(Stat), C) of a single model
    factor: Tensor  # (C,) slope / sum_v exp(z - o)
    entry: Tensor  # (C,) float32, minus the sum of the others; 0 where y has no logit or one of -inf


class RowOps(Protocol):
    """One backend's row operations.

    Statistics and arithmetic are float32, or float64 where a model's raw logits are float64. No operation reads or
    writes outside the first ``vocab_size`` columns of its buffers, none synchronises with the device, and two calls
    give the same bits.

    Statistics are (len(Stat), C) in the accumulation dtype, with unit stride along the tokens and any stride along the
    rows: a view of some columns of a larger tensor is read, and written, where it lies. A call that makes statistics
    writes them into the tensor that it is given and returns that one, or makes a new one.
    """

    name: str

    @property
    def kinds(self) -> frozenset[str] | None:
        """Of divergences; None is all that there are, those from outside the package too."""

    def statistics(self, problem: RowProblem, out: Tensor | None = None) -> Tensor:
        """All of :class:`Stat` for every row: ``(len(Stat), C)``. Reads each model's logits, writes none."""

    def gradient(self, problem: RowProblem, statistics: Tensor, weights: GradientWeights, out: Tensor) -> None:
        """Write the gradient with respect to the student's raw logits into ``out`` (C, >= V), any floating dtype.

        With w_d and w_y the weights of the two terms, for v in S:

            g_v = w_d p_v (d_v - D) + w_y (p_v - 1[v = token])          dx_v = g_v dz_v/dx_v

            no divergence:      d = z'          D = MEAN_LOGIT
            reverse_kl:         d = z' - u      D = MEAN_GAP
            of a second round:  d = h~          D = CENTRE
            forward_kl:         w_d (p_v - t_v) in place of the first term
            mixed:              w times that and 1 - w times the term of reverse_kl

            p = exp(z' - LOGSUM_STUDENT), t = exp(u - ORIGIN_TARGET - LOGSUM_TARGET), z' and u formed with the MAX
            statistics

        and 0 outside S and in a row without support. The statistics may be those of a larger vocabulary, of which the
        problem has some columns; a token id outside them is -1. A weight that is exactly 0 switches its term off,
        whatever the other factors are, NaN included. ``out`` may be ``problem.student.raw`` itself, or a tensor of a
        narrower dtype whose row i starts at the same address as row i of ``student.raw``.
        """

    def second_round(self, problem: RowProblem, statistics: Tensor) -> Tensor:
        """CENTRE and VALUE, (2, C), summed over these columns for ``statistics`` of a whole vocabulary.

        For a divergence of a second round of which the problem has a part of the columns: its terms need the
        normalisers of all of them.
        """

    def statistics_and_gradient(
        self, problem: RowProblem, weights: GradientWeights, out: Tensor, statistics: Tensor | None = None
    ) -> Tensor:
        """Both, for weights that do not depend on the statistics; the same bits as the two calls in turn.

        Returns the statistics, which are written into ``statistics`` where it is given.
        """

    def policy(self, policy: Policy, statistics: Tensor) -> Tensor:
        """All of :class:`PolicyStat` for every row, (len(PolicyStat), C), in one launch.

        ``statistics`` (len(Stat), C) are those of the student, of which LOGIT_STUDENT and LOGSUM_STUDENT are read.
        """

    def losses(
        self, divergence: RowDivergence, reward_scale: float | Tensor, has: tuple[bool, bool], statistics: Tensor
    ) -> Tensor:
        """(C,) token losses of a divergence, in one launch: 0 for a row without support.

            reverse_kl:         MEAN_GAP + (log-sums of teacher and ref, mixed by lambda - LOGSUM_STUDENT)
            forward_kl:         max(MEAN_TARGET_GAP + (LOGSUM_STUDENT - LOGSUM_TARGET), 0)
            mixed:              w forward_kl + (1 - w) reverse_kl
            of a second round:  max(VALUE, 0)

        ``statistics`` (len(Stat), C) are those of whole rows, ``reward_scale`` and ``has`` what they were made with:
        lambda, a tensor is (C,), and whether there is a teacher and a ref.
        """

    def linear_statistics(
        self,
        hidden: Tensor,  # (C, H)
        weight: Tensor,  # (>= V, H), same dtype
        transform: LogitTransform,
        vocab_size: int,
        token_ids: Tensor,  # (C,) int64
        out: Tensor | None = None,  # (len(Stat), C)
    ) -> Tensor | None:
        """``statistics`` of a single model (without a divergence) straight from hidden states.

        The logits stay on chip. Returns None where the backend has no such kernel for this input; the caller then
        computes the logits of the chunk and calls ``statistics``.
        """

    def linear_exponentials(
        self,
        hidden: Tensor,  # (C, H)
        weight: Tensor,  # (>= V, H), same dtype
        transform: LogitTransform,
        vocab_size: int,
        token_ids: Tensor,  # (C,) int64
        exponentials: Tensor,  # (C, >= V) bfloat16, written
        out: Tensor | None = None,  # as in linear_statistics
    ) -> LinearExponentials | None:
        """``linear_statistics``, and exp(z - o) on the way, from which a logit gradient follows by factors per row.

        The offset o of a row is z[token]: the sum over the row is 1 / p[token], and bfloat16 has float32's range. Where
        that sum is above 2^64, or the token has no finite logit (probability 0, an id outside [0, V)), o is the maximum
        of the row, found on the device in a second round. ``exponentials`` are exp(z - o), rounded once, and 0 at the
        token. A row without support is 0. A row with NaN or +inf has a factor of NaN.

        Returns None where the backend has no such kernel for this input; the caller then takes the logits.
        """

    def add_logprobs(self, out: Tensor, model: ModelRows, vocab_size: int, statistics: Tensor, term: SumTerm) -> bool:
        """out (C, >= V) := out and the log-probs of one more model of a LogLinear or Mixture.

        ``statistics`` (len(Stat), C) are those of that model alone. Formulas: :mod:`fused_gopd.objective.combination`.
        Returns False where the backend has no kernel; the caller then takes PyTorch.
        """

    def scale_(self, gradient: Tensor, factor: Tensor, dtype: dtype) -> Tensor:
        """``gradient`` times ``factor`` (), a tensor of the accumulation dtype.

        In place, or where one pass can also convert to ``dtype``, the dtype that the gradient is wanted in, as a new
        tensor. Each product is rounded once.
        """


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An entry of the table of backends.

    ``module`` is imported at the first use and has ``unavailable_reason()`` (why it cannot be used here, or None),
    ``wrong_device(device)`` (why not on a device, or None) and ``row_ops()``, a :class:`RowOps`.
    """

    name: str
    module: str
    default_on: str | None = None  # the type of device on which backend="auto" takes it
    dtypes: tuple[dtype | str, ...] | None = None  # of logits, or their names, as "float32"; None is all

    @functools.cached_property
    def takes(self) -> frozenset[dtype] | None:
        """The dtypes of logits; None is all."""
        import torch

        if self.dtypes is None:
            return None
        return frozenset(getattr(torch, d) if isinstance(d, str) else d for d in self.dtypes)

    def load(self) -> Any:
        return sys.modules.get(self.module) or importlib.import_module(self.module)


_KERNEL_DTYPES = ("float32", "bfloat16", "float16")

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(name="torch", module="fused_gopd.rowops.torch"),
        Backend(name="native", module="fused_gopd.rowops.native", default_on="cpu", dtypes=_KERNEL_DTYPES),
        Backend(name="triton", module="fused_gopd.rowops.triton", default_on="cuda", dtypes=_KERNEL_DTYPES),
    )
}


def unavailable_reason(name: str) -> str | None:
    """Why the backend of this name cannot be used here at all; None if it can."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {name!r}")
    reason: str | None = BACKENDS[name].load().unavailable_reason()
    return reason


def select_backend(name: str, device: device, dtypes: set[dtype], divergence: RowDivergence | None = None) -> RowOps:
    """The row operations for a backend name, a device, the dtypes of the inputs and a divergence over the vocabulary.

    ``"auto"`` takes Triton on a GPU and the C++ kernels on a CPU, and plain PyTorch where those are not available or
    cannot take the dtypes (float64) or the divergence. It warns once where one is not available. A backend asked for by
    name is used or refused with its reason, never replaced.
    """
    if name == "auto":
        fitting = [b for b in BACKENDS.values() if b.default_on == device.type]
        for backend in fitting:
            if _takes(backend, dtypes) and _available_to_auto(backend.name):
                ops: RowOps = backend.load().row_ops()
                if has_kernel(ops, divergence):
                    return ops
        name = "torch"
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} is not available: {reason}")
    backend = BACKENDS[name]
    module = backend.load()
    if backend.takes is not None and not backend.takes.issuperset(dtypes):
        taken = [str(d).removeprefix("torch.") for d in backend.dtypes or ()]
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes.difference(backend.takes)))
        raise ValueError(
            f"backend={name!r} takes {_listed(taken)}, got {found}; backend='torch' takes any floating dtype"
        )
    reason = module.wrong_device(device)
    if reason is not None:
        raise ValueError(reason)
    ops = module.row_ops()
    if not has_kernel(ops, divergence):
        assert divergence is not None
        raise ValueError(
            f"backend={name!r} has no kernel for divergence={divergence.name!r}; backend='torch' computes any"
        )
    return ops


@functools.cache
def _available_to_auto(name: str) -> bool:
    """Whether a backend can be used; warns where not. Asked once a process: the reason takes most of a millisecond."""
    reason = unavailable_reason(name)
    if reason is not None:
        message = (
            f"backend='auto' computes in plain PyTorch, which is slower, since {name!r} is not available: {reason}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return reason is None


def _takes(backend: Backend, dtypes: set[dtype]) -> bool:
    return backend.takes is None or dtypes.issubset(backend.takes)


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def has_kernel(ops: RowOps, divergence: RowDivergence | None) -> bool:
    """Whether the row operations compute a divergence; a single model always."""
    return divergence is None or (kinds := ops.kinds) is None or divergence.kind in kinds
