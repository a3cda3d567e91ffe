"""What is measured: one set-up per workload, shared by the time, memory and accuracy runs of every provider."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VOCAB_SIZE = 151936  # Qwen3
REWARD_SCALE = 1.25  # the best of the paper; both teacher and reference are needed

# Tokens of the accuracy run, the first ones of the same inputs: the float64 oracle is dense.
ACCURACY_TOKENS = 32


@dataclass(frozen=True)
class Inputs:
    """Tensors of the three models (student, teacher, reference). The student's are leaves that require a gradient."""

    rows: tuple[Tensor, Tensor, Tensor]  # logits (N, V) or hidden states (N, H)
    weights: tuple[Tensor, Tensor, Tensor] | None  # (V, H) each; None at logits level
    token_ids: Tensor  # (N,)

    @property
    def leaves(self) -> list[Tensor]:
        """What is differentiated: logits, or hidden states and weight."""
        return [self.rows[0]] if self.weights is None else [self.rows[0], self.weights[0]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.rows, *(self.weights or ()), self.token_ids))

    def first(self, tokens: int, dtype: torch.dtype | None = None) -> Inputs:
        """The first tokens only, in another dtype if one is given; fresh leaves."""

        def three(models: tuple[Tensor, Tensor, Tensor], length: int | None) -> tuple[Tensor, Tensor, Tensor]:
            s, q, r = (x.detach()[:length].to(dtype or x.dtype) for x in models)
            return s.requires_grad_(), q, r

        weights = None if self.weights is None else three(self.weights, None)
        return Inputs(three(self.rows, tokens), weights, self.token_ids[:tokens])


@dataclass(frozen=True)
class Workload:
    """Shapes and options of one measurement. Work: loss and gradients of everything in ``Inputs.leaves``."""

    job: str
    estimator: str  # "full" or "sampled"
    tokens: int
    hidden: tuple[int, int, int] | None  # of student, teacher and reference; None: logits are given
    dtype: torch.dtype = torch.float32
    vocab: int = VOCAB_SIZE
    device: str = "cpu"
    reward_scale: float = REWARD_SCALE
    masked: float = 0.0

    @property
    def level(self) -> str:
        return "logits" if self.hidden is None else "hidden"

    def inputs(self, seed: int = 0) -> Inputs:
        """Teacher and reference resemble the student, as checkpoints of one model do; logits have a deviation of 3."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def like(base: Tensor | None, shape: tuple[int, ...], scale: float) -> Tensor:
            x = torch.randn(shape, generator=generator, device=self.device).mul_(scale)
            if base is not None and base.shape == x.shape:
                x.mul_(0.3).add_(base, alpha=0.95)
            return x

        def models(shapes: list[tuple[int, ...]], scales: list[float]) -> tuple[Tensor, Tensor, Tensor]:
            student = like(None, shapes[0], scales[0])
            others = [like(student, shape, scale) for shape, scale in zip(shapes[1:], scales[1:], strict=True)]
            s, q, r = (x.to(self.dtype) for x in (student, *others))
            return s.requires_grad_(), q, r

        weights = None
        if self.hidden is None:
            rows = models([(self.tokens, self.vocab)] * 3, [3.0] * 3)
        else:
            weights = models([(self.vocab, h) for h in self.hidden], [3.0 * h**-0.5 for h in self.hidden])
            rows = models([(self.tokens, h) for h in self.hidden], [1.0] * 3)
        ids = torch.randint(self.vocab, (self.tokens,), generator=generator, device=self.device)
        gc.collect()
        return Inputs(rows, weights, ids)

    def small(self) -> Workload:
        """A miniature that loads libraries and starts threads before memory is measured."""
        return replace(self, tokens=4, hidden=None if self.hidden is None else (8, 8, 8), vocab=64)


def workloads(device: str) -> dict[str, Workload]:
    """By job name, in the order in which they run."""
    listed = [
        Workload("logits-full", "full", 256, None),
        Workload("logits-sampled", "sampled", 256, None),
        Workload("hidden-full", "full", 512, (1024, 1024, 1024)),
        Workload("hidden-sampled", "sampled", 512, (1024, 1024, 1024)),
        Workload("hidden-full-bf16", "full", 512, (1024, 1024, 1024), torch.bfloat16),
    ]
    return {w.job: replace(w, device=device) for w in listed}


def synchronize(device: str) -> None:
    """Wait for the device, so that a timed call includes its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
