"""The workloads: shapes, options and inputs, shared by the time, memory and accuracy runs of every provider."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_gopd.cli.plan.presets import PRESETS

VOCAB_SIZE = 151936  # Qwen3
REWARD_SCALE = 1.25  # the best of the paper; both teacher and reference are needed
JSD_BETA = 0.5
CLIP = 0.2

# Tokens of the accuracy run, the first ones of the same inputs: the float64 oracle is dense.
ACCURACY_TOKENS = 32


class Job(NamedTuple):
    """A computation that providers are compared on."""

    objective: str  # a name in providers.OBJECTIVES
    models: int
    backward: bool = True
    level: str = "hidden"  # "hidden": from hidden states and head, "logits": logits are given


# The jobs with one and two models are for peers that lack a model or the lambda target: they are compared with the
# same part of this package.
JOBS = {
    "logprobs": Job("logprobs", 1, backward=False),
    "nll": Job("nll", 1),
    "policy": Job("policy", 1),
    "reverse-kl": Job("reverse_kl", 2),
    "forward-kl": Job("forward_kl", 2),
    "jsd": Job("jsd", 2),
    "kl-ce": Job("kl_ce", 2),
    "hidden-sampled": Job("sampled", 3),
    "hidden-full": Job("full", 3),
    "hidden-full-bf16": Job("full", 3),
    "logits-sampled": Job("sampled", 3, level="logits"),
    "logits-full": Job("full", 3, level="logits"),
}


@dataclass(frozen=True)
class Inputs:
    """Tensors of the models, student first. The student's trainable tensors are leaves that require a gradient."""

    rows: tuple[Tensor, ...]  # logits (N, V) or hidden states (N, H)
    weights: tuple[Tensor, ...] | None  # (V, H) each; None at logits level
    token_ids: Tensor  # (N,)
    mask: Tensor | None = None  # (N,) bool
    scores: tuple[Tensor, ...] = ()  # (N,) log-probs of old policy, teacher and reference, for the job "policy"

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors to differentiate: logits, or hidden states and weight, or hidden states alone with a frozen head."""
        student = [self.rows[0]] if self.weights is None else [self.rows[0], self.weights[0]]
        return [x for x in student if x.requires_grad]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.rows, *(self.weights or ()), self.token_ids))

    def first(self, tokens: int, dtype: torch.dtype | None = None) -> Inputs:
        """The first tokens, optionally in another dtype, as new leaves."""

        def cut(models: tuple[Tensor, ...], length: int | None) -> tuple[Tensor, ...]:
            return tuple(x.detach()[:length].to(dtype or x.dtype).requires_grad_(x.requires_grad) for x in models)

        weights = None if self.weights is None else cut(self.weights, None)
        mask = None if self.mask is None else self.mask[:tokens]
        return Inputs(
            rows=cut(self.rows, tokens),
            weights=weights,
            token_ids=self.token_ids[:tokens],
            mask=mask,
            scores=cut(self.scores, tokens),
        )

    def live(self) -> Inputs:
        """Select the unmasked tokens, differentiably, as dense code and peers do to save the work on masked ones."""
        if self.mask is None:
            return self
        index = self.mask.nonzero()[:, 0]
        rows, scores = (tuple(x.index_select(0, index) for x in models) for models in (self.rows, self.scores))
        return Inputs(rows=rows, weights=self.weights, token_ids=self.token_ids[index], mask=None, scores=scores)


@dataclass(frozen=True)
class Workload:
    """Shapes and options of one measurement. Work: the loss and the gradients of everything in ``Inputs.leaves``."""

    job: str
    tokens: int
    hidden: tuple[int, ...] | None  # hidden size of each model; None if logits are given
    dtype: torch.dtype = torch.float32
    vocab: int = VOCAB_SIZE
    device: str = "cpu"
    masked: float = 0.0
    frozen: bool = False  # the student's head takes no gradient
    peaked: bool = False  # logits as peaked as a trained model's, see `inputs`

    @property
    def kind(self) -> Job:
        return JOBS[self.job]

    @property
    def level(self) -> str:
        return self.kind.level

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """Unique within a suite."""
        sizes = [f"N{self.tokens}", *([] if self.hidden is None else [f"H{'x'.join(map(str, self.hidden))}"])]
        options = [f"masked{round(100 * self.masked)}"] * (self.masked > 0) + ["frozen"] * self.frozen
        options += ["peaked"] * self.peaked
        return "-".join([self.job, *sizes, f"V{self.vocab}", self.dtype_name, *options])

    @property
    def live_tokens(self) -> int:
        return sum(self._live(i) for i in range(self.tokens))

    def _live(self, token: int) -> bool:
        """Whether a token is live. Live tokens are evenly spaced: every tenth one where nine tenths are masked."""
        percent = 100 - round(100 * self.masked)
        return (token + 1) * percent // 100 > token * percent // 100

    def inputs(self, seed: int = 0) -> Inputs:
        """Make inputs. All models are similar, as checkpoints of one model are.

        Logits are Gaussian with deviation 3, tokens uniform. With ``peaked`` they are like a trained model's: hidden
        states and weights are Gaussian, but a token's hidden state is as long as gives its logits a deviation between 2
        and 14 (mean 8), one of its units is constant, and the head's column of this unit holds -log(rank), Zipf's
        frequencies in a random order of the vocabulary. Tokens are drawn from the student. Its entropy at V = 151936 is
        then 2.3 nats on average over tokens, with 0.2, 1.8 and 5.2 at the tenth, fiftieth and ninetieth percent (of the
        Gaussian logits 7.6 on average); `entropy` measures it, and each row of a hidden-level job has it.
        """
        generator = torch.Generator(self.device).manual_seed(seed)

        def like(base: Tensor | None, shape: tuple[int, ...], scale: float) -> Tensor:
            x = torch.randn(shape, generator=generator, device=self.device).mul_(scale)
            if base is not None and base.shape == x.shape:
                x.mul_(0.3).add_(base, alpha=0.95)
            return x

        def models(shapes: list[tuple[int, ...]], scales: list[float]) -> tuple[Tensor, ...]:
            student = like(None, shapes[0], scales[0])
            made = [student.to(self.dtype)]
            for shape, scale in zip(shapes[1:], scales[1:], strict=True):
                made.append(like(student, shape, scale).to(self.dtype))
            return tuple(made)

        weights = None
        if self.hidden is None:
            rows = models([(self.tokens, self.vocab)] * 3, [3.0] * 3)
        else:
            weights = models([(self.vocab, h) for h in self.hidden], [3.0 * h**-0.5 for h in self.hidden])
            rows = models([(self.tokens, h) for h in self.hidden], [1.0] * len(self.hidden))
        ids = torch.randint(self.vocab, (self.tokens,), generator=generator, device=self.device)
        if self.peaked:
            assert weights is not None, "peaked logits are made from hidden states"
            self._peak(rows, weights, generator)
            ids = torch.cat([z.softmax(-1).multinomial(1, generator=generator)[:, 0] for z in _logits(rows, weights)])
        mask = None
        if self.masked:
            mask = torch.tensor([self._live(i) for i in range(self.tokens)], device=self.device)
        scores = self._scores(rows[0], weights[0], ids, generator) if weights and self.job == "policy" else ()
        if self.kind.backward:
            rows[0].requires_grad_()
            if weights is not None and not self.frozen:
                weights[0].requires_grad_()
        return Inputs(rows=rows, weights=weights, token_ids=ids, mask=mask, scores=scores)

    def _peak(self, rows: tuple[Tensor, ...], weights: tuple[Tensor, ...], generator: torch.Generator) -> None:
        """Make the logits of Gaussian hidden states and heads peaked, in place."""
        order = torch.randperm(self.vocab, generator=generator, device=self.device)
        frequency = -torch.log1p(order.float())  # of rank 0, 1, ...
        deviation = torch.linspace(2, 14, self.tokens, device=self.device)
        deviation = deviation[torch.randperm(self.tokens, generator=generator, device=self.device)]
        for h, w in zip(rows, weights, strict=True):
            h.copy_(h.float() * (deviation / 3)[:, None])
            h[:, 0], w[:, 0] = 4.0, (frequency / 4).to(w.dtype)

    def _scores(self, hidden: Tensor, weight: Tensor, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Log-probs of old policy, teacher and reference; the old ones are so close that few ratios are clipped."""
        pairs = zip(_logits((hidden,), (weight,)), ids.split(_LOGITS_ROWS), strict=True)
        base = torch.cat([z.gather(-1, i[:, None])[:, 0] - z.logsumexp(-1) for z, i in pairs])
        noise = (torch.randn(base.shape, generator=generator, device=self.device) for _ in range(3))
        return tuple((base + scale * x).clamp(max=0) for scale, x in zip((0.1, 0.5, 0.5), noise, strict=True))

    def small(self) -> Workload:
        """A small workload that loads libraries and starts threads before memory is measured."""
        hidden = None if self.hidden is None else (8,) * len(self.hidden)
        return replace(self, tokens=10, hidden=hidden, vocab=64)


_LOGITS_ROWS = 64


def _logits(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """The student's logits, a few rows at a time."""
    for h in rows[0].detach().split(_LOGITS_ROWS):
        yield (h @ weights[0].detach().T).float()


def entropy(inputs: Inputs, tokens: int = 256) -> float:
    """The student's mean entropy over the first tokens, in nats."""
    rows = inputs.rows[0].detach()[:tokens]
    blocks = rows.float().split(_LOGITS_ROWS) if inputs.weights is None else _logits([rows], inputs.weights)
    total = sum(float(-(x.exp() * x).sum()) for x in (z.log_softmax(-1) for z in blocks))
    return total / rows.shape[0]


def synchronize(device: str) -> None:
    """Wait for the device, so that a timed call includes the work on it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def queued(device: str) -> int:
    """Steps per timed call: several on a GPU, where the host runs ahead of the device as in training."""
    return 3 if torch.device(device).type == "cuda" else 1


def _last_level_cache(device: str) -> int:
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        size = max(os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE") for level in (2, 3))
    except (ValueError, OSError):  # not a glibc system
        size = 0
    return size or 64 << 20


def rotation(workload: Workload) -> int:
    """Number of input sets that timed calls use in turn, so that no call finds its inputs in the last-level cache.

    Together they have four times the size of the cache. For real models a single set is larger than that.
    """
    sizes = [workload.tokens * workload.vocab] * 3
    if workload.hidden is not None:
        sizes = [(workload.tokens + workload.vocab) * h for h in workload.hidden]
    nbytes = sum(sizes) * workload.dtype.itemsize
    return max(1, min(8, -(-4 * _last_level_cache(workload.device) // nbytes)))


# ------------------------------------------------------------------------------------------------------------- suites


class Suite(NamedTuple):
    what: str
    workloads: Callable[[str], list[Workload]]  # of a device
    seconds: float = 1.0  # factor on the time spent per provider


def _on(device: str, jobs: Iterable[str], shape: Workload) -> list[Workload]:
    """Workloads of several jobs in one shape, whose ``hidden`` is (H,) or has one size per model."""
    made = []
    for job in jobs:
        hidden = None
        if JOBS[job].level == "hidden":
            assert shape.hidden is not None
            models = JOBS[job].models
            hidden = shape.hidden[:models] if len(shape.hidden) > 1 else shape.hidden * models
        made.append(replace(shape, job=job, hidden=hidden, device=device))
    return made


def _gpu(device: str) -> bool:
    return torch.device(device).type != "cpu"


def _head(model: str, tokens: int, dtype: torch.dtype = torch.float32) -> Workload:
    """The head of a published model for each of the job's models."""
    return Workload(job="", tokens=tokens, hidden=(PRESETS[model].hidden,), dtype=dtype, vocab=PRESETS[model].vocab)


THREE = ("hidden-sampled", "hidden-full")
ONE_EACH = ("logprobs", "nll", "reverse-kl", *THREE)
SMALL, LARGE = "smollm2-135m", "qwen3-1.7b"
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "llama-3-8b", "gemma-3-4b", "smollm2-1.7b")


def _record(device: str) -> list[Workload]:
    three = Workload(job="hidden-full", tokens=512, hidden=(1024, 1024, 1024), device=device)
    return [
        Workload(job="logits-full", tokens=256, hidden=None, device=device),
        Workload(job="logits-sampled", tokens=256, hidden=None, device=device),
        three,
        replace(three, job="hidden-sampled"),
        replace(three, job="hidden-full-bf16", dtype=torch.bfloat16),
    ]


def _cpu(device: str) -> list[Workload]:
    jobs = [job for job in JOBS if job not in ("forward-kl", "kl-ce", "logits-sampled", "hidden-full-bf16")]
    return _on(device, jobs, _head(SMALL, 512))


def _target(device: str) -> list[Workload]:
    jobs = [job for job in JOBS if not job.endswith("bf16")]
    return _on(device, jobs, Workload(job="", tokens=8192, hidden=(2048,), dtype=torch.bfloat16))


def _target_sizes(device: str) -> list[Workload]:
    shapes = [Workload(job="", tokens=8192, hidden=(hidden,), dtype=torch.bfloat16) for hidden in (1024, 4096)]
    return [w for shape in shapes for w in _on(device, ONE_EACH, shape)]


def _models(device: str) -> list[Workload]:
    tokens, dtype = (8192, torch.bfloat16) if _gpu(device) else (256, torch.float32)
    return [w for model in MODELS for w in _on(device, ("logprobs", "hidden-full"), _head(model, tokens, dtype))]


def _default_head(device: str, tokens: int | None = None) -> Workload:
    if _gpu(device):
        return _head(LARGE, tokens or 8192, torch.bfloat16)
    return _head(SMALL, tokens or 1024)


def _scaling(device: str) -> list[Workload]:
    sizes = (64, 256, 1024, 4096, 16384, 65536)
    return [w for tokens in sizes for w in _on(device, ("logprobs", "nll", *THREE), _default_head(device, tokens))]


def _masked(device: str) -> list[Workload]:
    shape = _default_head(device)
    return [w for m in (0.0, 0.5, 0.9) for w in _on(device, ("nll", *THREE), replace(shape, masked=m))]


def _frozen(device: str) -> list[Workload]:
    shape = _default_head(device)
    return [w for frozen in (False, True) for w in _on(device, ("nll", *THREE), replace(shape, frozen=frozen))]


def _peaked(device: str) -> list[Workload]:
    shape = _default_head(device, 8192 if _gpu(device) else 512)
    return [w for peaked in (False, True) for w in _on(device, ONE_EACH, replace(shape, peaked=peaked))]


def _logits_given(device: str) -> list[Workload]:
    shape = Workload(job="", tokens=4096 if _gpu(device) else 256, hidden=None)
    narrow = replace(shape, dtype=torch.bfloat16)
    return [w for x in (shape, narrow) for w in _on(device, ("logits-full", "logits-sampled"), x)]


def _peers(device: str) -> list[Workload]:
    """Jobs of one and two models at the head that these packages publish times for, and at Qwen3-1.7B's."""
    if not _gpu(device):
        return _on(device, ("nll", "reverse-kl", "kl-ce"), _head(SMALL, 512))
    qwen, llama = _default_head(device), _head("llama-3-8b", 4096, torch.bfloat16)
    one = [w for head in (qwen, llama) for w in _on(device, ("nll", "logprobs"), head)]
    return one + _on(device, ("kl-ce", "jsd"), qwen)


def _run(device: str) -> list[Workload]:
    """What benchmarks/on_gpu.sh times, in order of value."""
    main, bf16 = _default_head(device), torch.bfloat16 if _gpu(device) else torch.float32
    tokens = main.tokens
    narrow, wide = (Workload(job="", tokens=tokens, hidden=(h,), dtype=bf16) for h in (1024, 4096))
    steps = ("hidden-full", "hidden-sampled", "logprobs")
    found = _on(device, (*steps, "nll", "policy"), main)
    found += [w for shape in (narrow, wide) for w in _on(device, steps, shape)]
    for parts in (8, 32, 128):
        found += _on(device, steps, replace(main, tokens=tokens // parts))
    for changed in ({"frozen": True}, {"peaked": True}, {"masked": 0.9}):
        found += _on(device, steps[:2], replace(main, **changed))
    return found + _on(device, steps[:1], replace(main, tokens=8 * tokens))


def _unequal(device: str) -> list[Workload]:
    """Strong to weak: the teacher and its base model are twice as wide as the student."""
    tokens, dtype = (8192, torch.bfloat16) if _gpu(device) else (128, torch.float32)
    return _on(device, ("reverse-kl", *THREE), Workload(job="", tokens=tokens, hidden=(2048, 4096, 4096), dtype=dtype))


def _quick(device: str) -> list[Workload]:
    jobs = [job for job in JOBS if not job.endswith("bf16")]
    masked = Workload(job="nll", tokens=64, hidden=(32,), vocab=512, device=device, masked=0.5, frozen=True)
    return [*_on(device, jobs, Workload(job="", tokens=64, hidden=(32,), vocab=512)), masked]


SUITES = {
    "cpu": Suite("jobs of one, two and three models at the head of SmolLM2-135M, 512 tokens, float32", _cpu, 0.1),
    "gpu": Suite("every job at Qwen3's vocabulary, 8192 tokens, bfloat16, H = 2048", _target, 0.05),
    "gpu-sizes": Suite("jobs of one, two and three models at H = 1024 and 4096", _target_sizes, 0.05),
    "models": Suite("the heads of seven published models", _models, 0.2),
    "scaling": Suite("64 to 64k tokens", _scaling, 0.2),
    "masked": Suite("nothing, half and nine tenths of the tokens masked", _masked, 0.2),
    "frozen": Suite("a trainable and a frozen head", _frozen, 0.2),
    "peaked": Suite("Gaussian logits, and such as a trained model has", _peaked, 0.2),
    "logits": Suite("logits given, in float32 and bfloat16", _logits_given, 0.2),
    "peers": Suite("the jobs of one and two models where other packages have kernels of their own", _peers, 0.1),
    "run": Suite("the steps that benchmarks/on_gpu.sh times, in order of value", _run, 0.03),
    "unequal": Suite("strong to weak: student 2048, teacher and reference 4096 wide", _unequal, 0.2),
    "record": Suite("the jobs of the performance log: Qwen3's vocabulary on a CPU", _record),
    "quick": Suite("seconds, for the tests: nothing that it times means anything", _quick, 0.0),
}


def default_suite(device: str) -> str:
    return "gpu" if _gpu(device) else "cpu"
