"""Who is measured. A provider turns a workload and its inputs into a step: one call is loss and gradients.

eager         fused_gopd.reference: dense PyTorch that also reports entropy and KL and copes with -inf logits
eager-lean    the shortest dense PyTorch that is right for finite logits: the loss alone
compile       torch.compile of eager-lean's function, one graph without breaks
fused-NAME    this package on its backend NAME
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fused_gopd as fg
from benchmarks.workloads import Inputs, Workload
from fused_gopd import reference
from fused_gopd.rowops import unavailable_reason


class Result(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]  # of Inputs.leaves


Step = Callable[[], Result]


# ------------------------------------------------------------------------------------------------------ dense, lean


def dense_full(z: Tensor, z_q: Tensor, z_r: Tensor, reward_scale: float) -> Tensor:
    """mean over tokens of sum_v p [log p - lambda log q - (1 - lambda) log r]"""
    log_p, log_q, log_r = (x.float().log_softmax(-1) for x in (z, z_q, z_r))
    return (log_p.exp() * (log_p - reward_scale * log_q - (1 - reward_scale) * log_r)).sum(-1).mean()


def dense_sampled(z: Tensor, z_q: Tensor, z_r: Tensor, token_ids: Tensor, reward_scale: float) -> Tensor:
    """mean over tokens of -A rho with A = lambda log q + (1 - lambda) log r - log p detached and rho = 1"""

    def logprob(x: Tensor) -> Tensor:
        x = x.float()
        return x.gather(-1, token_ids[:, None])[:, 0] - x.logsumexp(-1)

    log_p = logprob(z)
    advantage = (reward_scale * logprob(z_q) + (1 - reward_scale) * logprob(z_r) - log_p).detach()
    return -(advantage * (log_p - log_p.detach()).exp()).mean()


def _dense_function(workload: Workload) -> Callable[[Inputs], Tensor]:
    scale, sampled, linear = workload.reward_scale, workload.estimator == "sampled", workload.hidden is not None

    def loss(inputs: Inputs) -> Tensor:
        z, z_q, z_r = inputs.rows
        if linear:
            assert inputs.weights is not None
            z, z_q, z_r = (h @ w.T for h, w in zip(inputs.rows, inputs.weights, strict=True))
        if sampled:
            return dense_sampled(z, z_q, z_r, inputs.token_ids, scale)
        return dense_full(z, z_q, z_r, scale)

    return loss


def _differentiated(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Step:
    leaves = inputs.leaves

    def step() -> Result:
        value = loss(inputs)
        return Result(value.detach(), torch.autograd.grad(value, leaves))

    return step


def _eager_lean(workload: Workload, inputs: Inputs) -> Step:
    return _differentiated(_dense_function(workload), inputs)


def _compile(workload: Workload, inputs: Inputs) -> Step:
    return _differentiated(torch.compile(_dense_function(workload), fullgraph=True, dynamic=False), inputs)


# ---------------------------------------------------------------------------------------- this package and its oracle


def _heads(inputs: Inputs) -> tuple[fg.LinearHead | fg.Logits, ...]:
    if inputs.weights is None:
        return tuple(fg.Logits(x) for x in inputs.rows)
    return tuple(fg.LinearHead(h, w) for h, w in zip(inputs.rows, inputs.weights, strict=True))


def _package(gopd_loss: Callable[..., fg.GOPDOutput], workload: Workload, inputs: Inputs, backend: str) -> Step:
    ids = inputs.token_ids if workload.estimator == "sampled" else None

    def loss(inputs: Inputs) -> Tensor:
        options = {"reward_scale": workload.reward_scale, "estimator": workload.estimator, "backend": backend}
        return gopd_loss(*_heads(inputs), ids, **options).loss

    return _differentiated(loss, inputs)


def oracle(workload: Workload, inputs: Inputs) -> Result:
    """The dense reference on these inputs, as they are: hand it float64."""
    return _package(reference.gopd_loss, workload, inputs, "auto")()


# ----------------------------------------------------------------------------------------------------------- registry

_DENSE: dict[str, Callable[[Workload, Inputs], Step]] = {
    "eager": lambda workload, inputs: _package(reference.gopd_loss, workload, inputs, "auto"),
    "eager-lean": _eager_lean,
    "compile": _compile,
}
FUSED_PREFIX = "fused-"

# Providers by job, to be had in ten minutes on two cores. In bfloat16 the dense path stands for the naive accuracy that
# the fused one must not fall behind.
PROVIDERS = {
    "logits-full": ["fused-native", "fused-torch", "compile", "eager-lean", "eager"],
    "logits-sampled": ["fused-native", "compile", "eager"],
    "hidden-full": ["fused-native", "compile", "eager"],
    "hidden-sampled": ["fused-native", "compile"],
    "hidden-full-bf16": ["fused-native", "eager-lean"],
}


def unavailable(provider: str) -> str | None:
    """Why a provider cannot run here; None if it can."""
    return unavailable_reason(provider.removeprefix(FUSED_PREFIX)) if provider.startswith(FUSED_PREFIX) else None


def step_of(provider: str, workload: Workload, inputs: Inputs) -> Step:
    if provider.startswith(FUSED_PREFIX):
        return _package(fg.gopd_loss, workload, inputs, provider.removeprefix(FUSED_PREFIX))
    return _DENSE[provider](workload, inputs)
