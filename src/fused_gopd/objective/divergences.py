"""The divergences of the full and topk estimators: one class each, and their table by name.

A divergence between the student's p and the target t is L = sum_v p_v g(delta_v) with delta = log t - log p. With
h = g - g', h0 = h(0) and the centred h~ = h - h0, which is exactly 0 at delta = 0, its gradient with respect to the
student's logits is

    dL/dz_v = p_v (h~_v - A + h0 (1 - P))      A = sum p h~ and P = sum p, over the entries that are summed

P is 1 in ``full``. A class gives the products p h~ and the terms of L per entry, each in a form that neither cancels
nor overflows where p or t is small.

    class          g(delta)                                 h~                                   h0
    reverse KL     -delta                                   -delta                               1
    forward KL     e^delta delta                            -expm1(delta)                        -1
    mixed          w forward + (1 - w) reverse              likewise                             1 - 2 w
    mixture        c_t t/p log(t/m) + c_p log(p/m)          c_p log(p/m) + kappa expm1(log(t/m)) kappa
    alpha <= 1/2   expm1(alpha delta) / (alpha (alpha - 1)) -expm1(alpha delta) / alpha          1 / (1 - alpha)
    alpha > 1/2    the same - expm1(delta) / (alpha (alpha - 1))    the same                     -1 / alpha

with m = b t + (1 - b) p and kappa = c_p b - c_t (1 - b). The two forms of alpha have the same sum where p and t sum to
1; topk's ``drop`` sums a part of them.

Another divergence: a frozen dataclass that follows :class:`Divergence`, with :func:`register` above it.

This module is imported without PyTorch: formulas call methods of tensors, or import it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from ..rowops import MixtureConstants, Stat
from .target import bounded, mix

if TYPE_CHECKING:
    from torch import Tensor


class Outcomes(NamedTuple):
    """Log-probs of the outcomes of C tokens, (C, V) each; anything where there is no outcome."""

    log_p: Tensor  # of the student
    log_t: Tensor  # of the target, normalised
    log_u: Tensor  # of the target, not normalised: lambda log q + (1 - lambda) log r

    @property
    def delta(self) -> Tensor:
        return self.log_t - self.log_p


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """The option of a call that is a divergence's parameter."""

    option: str
    default: float
    holds: Callable[[float], bool]
    range: str  # the end of "<option> must satisfy ..."
    per_token: bool = False  # whether it may be a tensor

    def check(self, value: float) -> None:
        if not self.holds(value):
            raise ValueError(f"{self.option} must satisfy {self.range}, got {value}")


class Divergence(ABC):
    """One divergence with the value of its parameter.

    Attributes:
        name: its name in a call.
        kind: which formula of the row kernels computes it, see :class:`fused_gopd.rowops.RowDivergence`. A kind that
            no kernel has runs on the torch backend alone, which takes the formulas of this class.
        parameter: None where it has none.
        second_round: whether a row's statistics need a second pass over it, once its normalisers are known.
        target_gap: of one round: whether it uses the statistic MEAN_TARGET_GAP.
        normalised: whether the value is that of the normalised target; if not, it can be negative.
        constants: numbers of the kernels, by kind.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    parameter: ClassVar[Parameter | None] = None
    second_round: ClassVar[bool] = True
    target_gap: ClassVar[bool] = False
    normalised: ClassVar[bool] = True

    @classmethod
    def of(cls, value: Any) -> Divergence:
        """The divergence for a value of its parameter: at an end of the range it may be another one."""
        return cls() if cls.parameter is None else cls(value)  # type: ignore[call-arg]

    @property
    def constants(self) -> tuple[float, ...]:
        return ()

    @property
    def h0(self) -> float | Tensor:
        """A number, or (C, 1)."""
        return 0.0

    @abstractmethod
    def weighted(self, x: Outcomes) -> Tensor:
        """p h~ of each outcome."""

    @abstractmethod
    def terms(self, x: Outcomes) -> Tensor:
        """What the divergence sums: p g, or another form of the same sum."""

    def uncentred(self, x: Outcomes) -> Tensor:
        """p h. Where h0 < 0 this is a product, in which no digit is lost to p."""
        return self.weighted(x) + self.h0 * x.log_p.exp()

    def value(self, statistics: Tensor, reward_scale: float | Tensor, has: tuple[bool, bool]) -> Tensor:
        """(C,) of ``full``, from the statistics of whole rows."""
        return statistics[Stat.VALUE].clamp_min(0)

    def rows(self, rows: slice) -> Divergence:
        """The same for some of the tokens."""
        return self

    @classmethod
    def needs_near_target(cls) -> bool:
        """Whether the value takes t itself, and so the origin of u: see ``ORIGIN_TARGET``."""
        return cls.second_round or cls.target_gap


DIVERGENCES: dict[str, type[Divergence]] = {}

D = TypeVar("D", bound=type[Divergence])


def register(divergence: D) -> D:
    """Add a class to the table, under its name."""
    DIVERGENCES[divergence.name] = divergence
    return divergence


def make(name: str, **parameters: Any) -> Divergence:
    """The divergence of a name; of the parameters, by their option's names, its own counts. None is its default."""
    kind = DIVERGENCES[name]
    parameter = kind.parameter
    if parameter is None:
        return kind.of(None)
    value = parameters.get(parameter.option)
    return kind.of(parameter.default if value is None else value)


# --------------------------------------------------------------------------------------------------------- one round


class OneRound(Divergence):
    """w forward KL + (1 - w) reverse KL: the value follows from means, so that one pass over a row makes it."""

    second_round = False

    @property
    @abstractmethod
    def forward_share(self) -> float | Tensor:
        """w, a number or (C,)."""

    def blend(self, forward: Callable[[], Tensor], reverse: Callable[[], Tensor]) -> Tensor:
        """w forward + (1 - w) reverse, (C,) or (C, V); what w = 0 or 1 cancels is not computed."""
        import torch

        w = self.forward_share
        if not isinstance(w, torch.Tensor):
            if w in (0, 1):
                return forward() if w else reverse()
            return w * forward() + (1.0 - w) * reverse()
        first, other = forward(), reverse()
        w = w.to(first.dtype)
        w = w[:, None] if first.ndim == 2 else w
        return w * first + (1.0 - w) * other

    @property
    def h0(self) -> float | Tensor:
        import torch

        w = self.forward_share
        return 1.0 - 2.0 * (w[:, None] if isinstance(w, torch.Tensor) else w)

    def weighted(self, x: Outcomes) -> Tensor:
        p = x.log_p.exp()
        return self.blend(lambda: p - x.log_t.exp(), lambda: p * bounded(x.log_p - x.log_u))

    def terms(self, x: Outcomes) -> Tensor:
        return self.blend(
            lambda: x.log_t.exp() * (x.log_t - x.log_p), lambda: x.log_p.exp() * bounded(x.log_p - x.log_u)
        )

    def value(self, statistics: Tensor, reward_scale: float | Tensor, has: tuple[bool, bool]) -> Tensor:
        logsum_p, logsum_u = statistics[Stat.LOGSUM_STUDENT], statistics[Stat.LOGSUM_TARGET]

        def reverse() -> Tensor:
            teacher = statistics[Stat.LOGSUM_TEACHER] if has[0] else None
            ref = statistics[Stat.LOGSUM_REF] if has[1] else None
            return statistics[Stat.MEAN_GAP] + (mix(reward_scale, teacher, ref) - logsum_p)

        def forward() -> Tensor:
            return (statistics[Stat.MEAN_TARGET_GAP] + (logsum_p - logsum_u)).clamp_min(0)

        return self.blend(forward, reverse)


@register
@dataclass(frozen=True)
class ReverseKL(OneRound):
    """sum p (log p - lambda log q - (1 - lambda) log r): KL(p || t) - log Z, the paper's -J per token."""

    name = kind = "reverse_kl"
    normalised = False
    forward_share = 0.0


@register
@dataclass(frozen=True)
class ForwardKL(OneRound):
    """KL(t || p)."""

    name = kind = "forward_kl"
    target_gap = True
    forward_share = 1.0

    def uncentred(self, x: Outcomes) -> Tensor:
        return -x.log_t.exp()


@register
@dataclass(frozen=True, eq=False)
class Mixed(OneRound):
    """w KL(t || p) + (1 - w) (the reverse KL as above): NeMo-RL's mix, or with w per token an entropy gate."""

    name = kind = "mixed"
    target_gap = True
    normalised = False
    parameter = Parameter(
        option="forward_weight",
        default=0.5,
        holds=lambda w: 0 <= w <= 1,
        range="0 <= forward_weight <= 1 (0 is the reverse KL, 1 the forward KL)",
        per_token=True,
    )

    forward_weight: float | Tensor  # a number, or (C,) in the accumulation dtype

    @classmethod
    def of(cls, value: float | Tensor) -> Divergence:
        import torch

        if isinstance(value, torch.Tensor) or value not in (0, 1):
            return cls(value)
        return ForwardKL() if value else ReverseKL()

    @property
    def forward_share(self) -> float | Tensor:
        return self.forward_weight

    def rows(self, rows: slice) -> Divergence:
        import torch

        return Mixed(self.forward_weight[rows]) if isinstance(self.forward_weight, torch.Tensor) else self


# ---------------------------------------------------------------------------------------------------------- mixtures


def to_mixture(ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(t / m) of m = beta t + (1 - beta) p, from ratio = log(t / p); both 0 where that is 0.

    For beta <= 1/2 (else with p and t exchanged), with the branch at beta t = (1 - beta) p:

        log(m / p) = log1p(beta expm1(ratio))              below it
        log(m / t) = log(beta + (1 - beta) exp(-ratio))    above it

    and the other one is that +- ratio. Below the branch the error is small relative to beta, not only to 1: near the
    ends of beta the JSD and its gradient are as small as that.
    """
    import torch

    if beta > 0.5:
        target, student = to_mixture(-ratio, 1.0 - beta)
        return student, target
    least = torch.finfo(ratio.dtype).tiny
    beta = max(beta, least)
    # the exponential stays in the range of float32
    turn = min(math.log((1.0 - beta) / beta), 80.0)
    below = ratio <= turn
    log_m_p = (beta * ratio.clamp_max(turn).expm1()).log1p()
    log_m_t = (beta + (1.0 - beta) * (-ratio.clamp_min(turn)).exp()).log()
    return -log_m_p.where(below, ratio + log_m_t), (ratio - log_m_p).where(below, -log_m_t)


class Mixture(Divergence):
    """c_t KL(t || m) + c_p KL(p || m) with m = b t + (1 - b) p.

    A class gives ``share``, which is b, and ``scales``, (c_t, c_p).
    """

    kind = "mixture"

    @property
    @abstractmethod
    def share(self) -> float:
        """b."""

    @property
    @abstractmethod
    def scales(self) -> tuple[float, float]:
        """(c_t, c_p)."""

    @property
    def h0(self) -> float:
        b, (c_t, c_p) = self.share, self.scales
        return c_p * b - c_t * (1.0 - b)

    @functools.cached_property
    def constants(self) -> MixtureConstants:
        return MixtureConstants.of(self.share, *self.scales, self.h0)

    def weighted(self, x: Outcomes) -> Tensor:
        log_pm, log_tm = to_mixture(x.delta, self.share)
        _, c_p = self.scales
        h = c_p * log_pm
        if self.h0 != 0:
            h = h + self.h0 * log_tm.expm1()
        return x.log_p.exp() * h

    def uncentred(self, x: Outcomes) -> Tensor:
        log_pm, log_tm = to_mixture(x.delta, self.share)
        _, c_p = self.scales
        return x.log_p.exp() * (c_p * log_pm + self.h0 * log_tm.exp())

    def terms(self, x: Outcomes) -> Tensor:
        log_pm, log_tm = to_mixture(x.delta, self.share)
        c_t, c_p = self.scales
        return c_t * x.log_t.exp() * log_tm + c_p * x.log_p.exp() * log_pm


@register
@dataclass(frozen=True)
class JSD(Mixture):
    """beta KL(t || m) + (1 - beta) KL(p || m) with m = beta t + (1 - beta) p."""

    name = "jsd"
    parameter = Parameter(
        option="beta",
        default=0.5,
        holds=lambda beta: 0 <= beta <= 1,
        range="0 <= beta <= 1 (0 is the forward KL, 1 the reverse KL, between them the JSD with "
        "m = beta target + (1 - beta) p)",
    )

    beta: float

    @classmethod
    def of(cls, value: float) -> Divergence:
        return make(divergence_of(value)) if value in (0, 1) else cls(value)

    @property
    def share(self) -> float:
        return self.beta

    @property
    def scales(self) -> tuple[float, float]:
        return self.beta, 1.0 - self.beta

    @property
    def h0(self) -> float:
        return 0.0


def divergence_of(beta: float) -> str:
    """What the beta of Liger, TRL and ms-swift stands for: the JSD, and at its ends the two KL divergences.

    The JSD goes to 0 at both ends. JSD / beta goes to KL(target || p) at 0 and JSD / (1 - beta) to KL(p || target) at
    1; those are meant, not divided by anything.
    """
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")


_SKEW = "0 <= skew < 1 (0 is the {end} KL; at 1 the mixture is the model itself and the loss 0)"


@register
@dataclass(frozen=True)
class SkewKL(Mixture):
    """KL(t || a t + (1 - a) p): DistiLLM's skew KL."""

    name = "skew_kl"
    parameter = Parameter(option="skew", default=0.1, holds=lambda a: 0 <= a < 1, range=_SKEW.format(end="forward"))

    skew: float

    @classmethod
    def of(cls, value: float) -> Divergence:
        return cls(value) if value else ForwardKL()

    @property
    def share(self) -> float:
        return self.skew

    @property
    def scales(self) -> tuple[float, float]:
        return 1.0, 0.0


@register
@dataclass(frozen=True)
class SkewReverseKL(Mixture):
    """KL(p || (1 - a) t + a p): DistiLLM's skew reverse KL."""

    name = "skew_reverse_kl"
    parameter = Parameter(option="skew", default=0.1, holds=lambda a: 0 <= a < 1, range=_SKEW.format(end="reverse"))

    skew: float

    @classmethod
    def of(cls, value: float) -> Divergence:
        return cls(value) if value else ReverseKL()

    @property
    def share(self) -> float:
        return 1.0 - self.skew

    @property
    def scales(self) -> tuple[float, float]:
        return 0.0, 1.0


# ------------------------------------------------------------------------------------------------------------- alpha


@register
@dataclass(frozen=True)
class Alpha(Divergence):
    """(sum t^alpha p^(1 - alpha) - 1) / (alpha (alpha - 1)); its limits at 0 and 1 are the two KL divergences."""

    name = kind = "alpha"
    parameter = Parameter(
        option="alpha",
        default=0.5,
        holds=lambda alpha: alpha == 0 or abs(alpha) >= 1e-30,  # alpha delta is a float32
        range="alpha = 0 or |alpha| >= 1e-30 (0 is the reverse KL, 1 the forward KL)",
    )

    alpha: float

    @classmethod
    def of(cls, value: float) -> Divergence:
        return cls(value) if value not in (0, 1) else ForwardKL() if value else ReverseKL()

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.alpha,)

    @property
    def h0(self) -> float:
        return 1.0 / (1.0 - self.alpha) if self.alpha <= 0.5 else -1.0 / self.alpha

    def weighted(self, x: Outcomes) -> Tensor:
        return scaled_expm1(x.log_p, self.alpha * x.delta) / -self.alpha

    def uncentred(self, x: Outcomes) -> Tensor:
        if self.alpha <= 0.5:
            return super().uncentred(x)
        return finite_exp(x.log_p + self.alpha * x.delta) / -self.alpha

    def terms(self, x: Outcomes) -> Tensor:
        if self.alpha <= 0.5:
            return self.weighted(x) / (1.0 - self.alpha)
        return scaled_expm1(x.log_t, (self.alpha - 1.0) * x.delta) / (self.alpha * (self.alpha - 1.0))


def finite_exp(x: Tensor) -> Tensor:
    """exp, at most so large that a sum over any vocabulary, and its product with a weight, is a number of the dtype."""
    import torch

    return x.clamp_max(math.log(torch.finfo(x.dtype).max) - 24.0).exp()


def scaled_expm1(log_w: Tensor, x: Tensor) -> Tensor:
    """w expm1(x): as one exponential where x is large, so that a tiny w meets no overflow."""
    return (log_w.exp() * x.clamp_max(1).expm1()).where(x <= 1, finite_exp(log_w + x) - log_w.exp())


# ------------------------------------------------------------------------------------------------------------ values


def divergence_value(
    divergence: Divergence, reward_scale: float | Tensor, statistics: Tensor, has: tuple[bool, bool]
) -> Tensor:
    """(C,) token loss of the ``full`` estimator; 0 for a row without support.

    ``has`` says whether teacher and reference are in the statistics.
    """
    value = divergence.value(statistics, reward_scale, has)
    return value.masked_fill(statistics[Stat.LOGSUM_STUDENT].isneginf(), 0)


def kl_to_target(statistics: Tensor) -> Tensor:
    """(C,) KL(p || target) of whole rows; 0 for a row without support."""
    logsum_p, logsum_u, gap = (statistics[s] for s in (Stat.LOGSUM_STUDENT, Stat.LOGSUM_TARGET, Stat.MEAN_GAP))
    kl = bounded((gap + statistics[Stat.ORIGIN_TARGET]) + (logsum_u - logsum_p)).clamp_min(0)
    return kl.masked_fill(logsum_p.isneginf(), 0)
