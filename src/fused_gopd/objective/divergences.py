"""The divergences of the full and topk estimators, per token."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..rowops import Stat
from .target import bounded, mix

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)


def divergence_of(beta: float) -> Divergence:
    """What the beta of Liger, TRL and ms-swift stands for: the JSD, and at its ends the two KL divergences.

    The JSD goes to 0 at both ends. JSD / beta goes to KL(target || p) at 0 and JSD / (1 - beta) to KL(p || target) at
    1; those are meant, not divided by anything.
    """
    ends: dict[float, Divergence] = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return ends.get(beta, "jsd")


def divergence_value(
    divergence: Divergence, beta: float, reward_scale: float | Tensor, statistics: Tensor, has: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Token loss of the ``full`` estimator and KL(p || target), both (C,); 0 for a row without support.

    ``has`` says whether teacher and reference are in the statistics.
    """
    logsum_p, logsum_u, gap = (statistics[s] for s in (Stat.LOGSUM_STUDENT, Stat.LOGSUM_TARGET, Stat.MEAN_GAP))
    kl = bounded((gap + statistics[Stat.ORIGIN_TARGET]) + (logsum_u - logsum_p)).clamp_min(0)
    if divergence == "reverse_kl":
        teacher = statistics[Stat.LOGSUM_TEACHER] if has[0] else None
        ref = statistics[Stat.LOGSUM_REF] if has[1] else None
        value = gap + (mix(reward_scale, teacher, ref) - logsum_p)
    elif divergence == "forward_kl":
        value = (statistics[Stat.TARGET_PART] + (logsum_p - logsum_u)).clamp_min(0)
    else:
        value = (beta * statistics[Stat.TARGET_PART] + (1.0 - beta) * statistics[Stat.STUDENT_PART]).clamp_min(0)
    empty = torch.isneginf(logsum_p)
    zero = torch.zeros_like(value)
    return torch.where(empty, zero, value), torch.where(empty, zero, kl)


def to_mixture(ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(t / m) of m = beta t + (1 - beta) p, from ratio = log(t / p); both 0 where that is 0.

    For beta <= 1/2 (else with p and t exchanged), with the branch at beta t = (1 - beta) p:

        log(m / p) = log1p(beta expm1(ratio))              below it
        log(m / t) = log(beta + (1 - beta) exp(-ratio))    above it

    and the other one is that +- ratio. Below the branch the error is small beside beta, not only beside 1: near the
    ends of beta the JSD and its gradient are as small as that.
    """
    if beta > 0.5:
        target, student = to_mixture(-ratio, 1.0 - beta)
        return student, target
    least = torch.finfo(ratio.dtype).tiny
    beta = max(beta, least)
    # the exponential stays in the range of float32
    turn = min(math.log((1.0 - beta) / beta), 80.0)
    below = ratio <= turn
    log_m_p = torch.log1p(beta * torch.expm1(ratio.clamp_max(turn)))
    log_m_t = torch.log(beta + (1.0 - beta) * torch.exp(-ratio.clamp_min(turn)))
    return -torch.where(below, log_m_p, ratio + log_m_t), torch.where(below, ratio - log_m_p, -log_m_t)
