"""Training signals as sums and counts, so that means over micro-batches and ranks are exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .tokens import widest

if TYPE_CHECKING:
    from .output import GOPDOutput


class Metrics(Mapping[str, Tensor]):
    """Means over tokens that can be added: ``sum(out.metrics() for out in ...)`` is the metrics of all tokens together.

    ``metrics["reward"]`` is a 0-d tensor on the device; nothing waits for it before it is read.
    :meth:`to_dict` reads all of them at once. Across ranks, :meth:`all_reduce` first.

    ==================  ================================================================================
    tokens              number of live tokens
    loss                token loss, before any weighting
    entropy             of the student, in nats
    reward              implicit reward log q - log r of the sampled token
    kl_target           KL(student || target): exact (``full``), or over the outcomes of ``topk``
    kl_teacher, kl_ref  KL(student || teacher) and KL(student || reference), exact: where they are what ``full`` has
                        computed, at lambda = 1 and at lambda = 0, where the target is that model
    kl_teacher_k3       and ``kl_ref_k3``: the estimator k3 of the same two at the sampled token, expm1(d) - d >= 0 with
                        d = log q - log p (log r - log p); its mean is the divergence if the student sampled the token
    sft_loss            -log p[label], of the tokens that have a label inside the support
    advantage           and ``advantage_std``: of the advantages as used
    clip_fraction       share of tokens whose gradient a clip removed
    importance          and ``importance_std``: the detached weight of the rollout, as used
    impossible          share of tokens that a model which lambda does not cancel gives probability 0; a log-ratio
                        leaves out tokens that one of its two models rules out
    ==================  ================================================================================

    What a call does not have (no ``token_ids``, no reference, no clip) is absent.
    """

    _STD = ("advantage", "importance")

    def __init__(self, names: tuple[str, ...], sums: Tensor) -> None:
        self._names = names
        self.sums = sums  # (len(names), 2): sum and count; of the square too where there is a deviation

    @classmethod
    def of(cls, out: GOPDOutput) -> Metrics:
        """Of one call; see :meth:`fused_gopd.GOPDOutput.metrics`."""
        live = torch.ones_like(out.token_loss, dtype=torch.bool) if out.mask is None else out.mask
        entries: dict[str, Tensor] = {}
        dtype = widest(live.device)

        def add(name: str, values: Tensor, among: Tensor = live) -> None:
            wide = torch.where(among, values, torch.zeros_like(values)).to(dtype)
            entries[name] = torch.stack((wide.sum(), among.sum().to(dtype)))
            if name in cls._STD:
                entries[name + "_squared"] = torch.stack(((wide * wide).sum(), among.sum().to(dtype)))

        add("tokens", live.to(dtype))
        add("loss", out.token_loss)
        add("entropy", out.entropy)
        p, q, r = out.student_logprobs, out.teacher_logprobs, out.ref_logprobs
        scale = out.reward_scale
        if not isinstance(scale, torch.Tensor):
            scale = torch.full((), scale, dtype=dtype, device=live.device)  # filled there: copying would wait for it
        needs_q, needs_r = (scale != x for x in (0, 1))
        # a joint look has no log-prob of a model that the token's own lambda cancels
        skips = out.joint and isinstance(out.reward_scale, Tensor)
        has_q, has_r = (live & needs_q, live & needs_r) if skips else (live, live)

        def k3(name: str, other: Tensor | None, among: Tensor) -> None:
            if p is not None and other is not None:
                d = other.to(dtype) - p.to(dtype)
                add(name, (torch.expm1(d) - d).clamp_min(0), among & ~torch.isneginf(p) & ~torch.isneginf(other))

        if q is not None and r is not None:
            add("reward", q - r, has_q & has_r & ~torch.isneginf(q) & ~torch.isneginf(r))
        k3("kl_teacher_k3", q, has_q)
        k3("kl_ref_k3", r, has_r)
        if p is not None and (q is not None or r is not None):
            impossible = torch.isneginf(p)
            for model, needed in ((q, needs_q), (r, needs_r)):
                if model is not None:
                    impossible = impossible | (needed & torch.isneginf(model))
            add("impossible", impossible.to(dtype))
        if out.kl is not None:
            add("kl_target", out.kl)
            target = {0.0: "kl_ref", 1.0: "kl_teacher"}
            if out.joint and not isinstance(out.reward_scale, Tensor) and out.reward_scale in target:
                add(target[out.reward_scale], out.kl)  # full: the target is one of the models
        if out.label_logprobs is not None and out.labelled is not None:
            add("sft_loss", -out.label_logprobs, out.labelled)
        if out.advantages is not None:
            add("advantage", out.advantages)
        if out.clipped is not None:
            add("clip_fraction", out.clipped.to(dtype))
        if out.importance is not None:
            add("importance", out.importance)
        return cls(tuple(entries), torch.stack(list(entries.values())))

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
        if name.removesuffix("_std") in self._STD and name.endswith("_std") and name[:-4] in self._names:
            mean = self._mean(name[:-4])
            return (self._mean(name[:-4] + "_squared") - mean * mean).clamp_min(0).sqrt()
        if name not in self._names or name.endswith("_squared"):
            raise KeyError(f"no metric {name!r}; there are {', '.join(self)}")
        return self._mean(name)

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            yield name.removesuffix("_squared") + "_std" if name.endswith("_squared") else name

    def __len__(self) -> int:
        return len(self._names)

    def to_dict(self) -> dict[str, float]:
        """All of them as Python floats, in one read from the device; NaN where nothing was counted."""
        return dict(zip(self, torch.stack([self[name] for name in self]).tolist(), strict=True))

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self)})"
