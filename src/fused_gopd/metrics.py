"""Training signals as sums and counts, so that means over micro-batches and ranks are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


def _deviation(mean: Tensor, squares: Tensor) -> Tensor:
    return (squares - mean * mean).clamp_min(0).sqrt()


def _effective_share(mean: Tensor, squares: Tensor) -> Tensor:
    return mean.square() / squares


# Metrics that are made of the mean of another one and of the mean of its squares, which is summed as that + "_squared".
_DERIVED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "advantage_std": ("advantage", _deviation),
    "importance_std": ("importance", _deviation),
    "effective_sample_size": ("importance", _effective_share),
}
WITH_SQUARES = frozenset(of for of, _ in _DERIVED.values())


class Metrics(Mapping[str, Tensor]):
    """Means over tokens that can be added: ``sum(out.metrics() for out in ...)`` is the metrics of all tokens together.

    ``metrics["reward"]`` is a 0-d tensor on the device; nothing waits for it before it is read.
    :meth:`to_dict` reads all of them at once. Across ranks, :meth:`all_reduce` first.

    =====================  =============================================================================
    tokens                 number of live tokens
    loss                   token loss, before any weighting
    entropy                of the student, in nats
    reward_scale           lambda, where it is one per token or sequence
    reward                 implicit reward log q - log r of the sampled token
    kl_target              KL(student || target): exact (``full``), or over the outcomes of ``topk``
    kl_teacher, kl_ref     KL(student || teacher) and KL(student || reference), exact: where they are what ``full`` has
                           computed, at lambda = 1 and at lambda = 0, where the target is that model; and of
                           ``kl_ref="exact"``
    kl_teacher_k3          and ``kl_ref_k3``: the estimator k3 of the same two at the sampled token, expm1(d) - d >= 0
                           with d = log q - log p (log r - log p); its mean is the divergence if the student sampled the
                           token
    sft_loss               -log p[label], of the tokens that have a label inside the support
    advantage              and ``advantage_std``: of the advantages as used
    clip_fraction          share of tokens whose gradient a clip removed
    importance             and ``importance_std``: the detached weight of the rollout, as used
    effective_sample_size  (sum w)^2 / (n sum w^2) of these weights, 0 ... 1: the share of n tokens of weight 1 that
                           would have the same variance
    masked_fraction        share of tokens whose weight is 0
    impossible             share of tokens that a model which lambda does not cancel gives probability 0; a log-ratio
                           excludes tokens of probability 0 under one of its two models
    =====================  =============================================================================

    What a call does not have (no ``token_ids``, no reference, no clip) is absent.
    """

    def __init__(self, names: tuple[str, ...], sums: Tensor) -> None:
        self._names = names
        self.sums = sums  # (len(names), 2): sum and count

    def __add__(self, other: Metrics | int) -> Metrics:
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        if not isinstance(other, Metrics):
            return NotImplemented
        if other._names != self._names:
            raise ValueError(f"metrics to add must have the same entries, got {self._names} and {other._names}")
        return Metrics(self._names, self.sums + other.sums.to(self.sums.device))

    __radd__ = __add__

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Metrics:
        """The sum over the ranks of a process group, the default one if none is given; one small collective."""
        sums = self.sums.clone()
        torch.distributed.all_reduce(sums, group=group)
        return Metrics(self._names, sums)

    def _mean(self, name: str) -> Tensor:
        total, count = self.sums[self._names.index(name)].unbind()
        return total / count

    def __getitem__(self, name: str) -> Tensor:
        if not isinstance(name, str):  # get() and `in` take any key
            raise KeyError(f"no metric {name!r}; there are {', '.join(self)}")
        if name == "tokens":
            return self.sums[self._names.index(name), 0]
        of, function = _DERIVED.get(name, (name, None))
        if function is not None and of in self._names:
            return function(self._mean(of), self._mean(of + "_squared"))
        if name not in self._names or name.endswith("_squared"):
            raise KeyError(f"no metric {name!r}; there are {', '.join(self)}")
        return self._mean(name)

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            if name.endswith("_squared"):
                yield from (made for made, (of, _) in _DERIVED.items() if name == of + "_squared")
            else:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _totals(self) -> dict[str, Tensor]:
        """Sums over tokens, 0-d tensors on the device, of those that are means over tokens."""
        return {k: x for k, x in zip(self._names, self.sums[:, 0], strict=True) if not k.endswith("_squared")}

    def to_dict(self) -> dict[str, float]:
        """All of them as Python floats, in one read from the device; NaN where nothing was counted."""
        return dict(zip(self, torch.stack([self[name] for name in self]).tolist(), strict=True))

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self)})"
