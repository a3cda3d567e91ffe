"""What the tests build their input from, and how they compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg
from fused_gopd.objective.divergences import DIVERGENCES, Divergence, make
from fused_gopd.objective.statistics import merge
from fused_gopd.rowops import GradientWeights, ModelRows, RowOps, RowProblem, Stat, unavailable_reason

LAMBDAS = (0.0, 0.5, 1.0, 1.25, 2.0)
OBJECTIVES: tuple[dict[str, Any], ...] = (
    {"estimator": "sampled"},
    {"estimator": "full"},
    {"estimator": "full", "divergence": "forward_kl"},
    {"estimator": "full", "divergence": "jsd", "beta": 0.5},
    {"estimator": "full", "divergence": "jsd", "beta": 0.1},
    {"estimator": "topk", "k": 5},
    {"estimator": "topk", "k": 4, "divergence": "jsd", "support": "student"},
)
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum")

# Norm-relative tolerance against the float64 oracle. Logits here are below 10 and rounded at 10 * 6e-8; a divergence
# sums differences of logits that are up to ten times as large as itself: 6e-6, times three for the GEMM's own sums.
# float64 has the same analysis at 1.1e-16, with two digits to spare.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@dataclasses.dataclass(frozen=True)
class BackendDtype:
    """A backend and the dtype that a test runs it in."""

    backend: str
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def why_not(backend: str) -> str | None:
    """Why a backend cannot run here; a source tree without the compiled extension is a reason, not a failure."""
    try:
        return unavailable_reason(backend)
    except ImportError as error:
        return str(error)


@dataclasses.dataclass
class Batch:
    """Three models on the same tokens. The student's tensors require gradients."""

    student: Any
    teacher: Any
    ref: Any
    token_ids: Tensor
    mask: Tensor | None

    @property
    def models(self) -> tuple[Any, Any, Any]:
        return self.student, self.teacher, self.ref

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.student.tensors.values() if x.requires_grad]

    def replaced(self, **changes: Any) -> Batch:
        return dataclasses.replace(self, **changes)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_head(
    seed: int, shape: Sequence[int], vocab: int, hidden: int, dtype: torch.dtype, scale: float = 2.0, **transform: Any
) -> fg.LinearHead:
    """A head whose logits have about the standard deviation ``scale``."""
    g = generator(seed)
    h = (torch.randn(*shape, hidden, generator=g, dtype=torch.float64) * scale / hidden**0.5).to(dtype)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype) if transform.pop("bias", False) else None
    return fg.LinearHead(h, w, bias, **transform)


def logits_head(
    seed: int, shape: Sequence[int], vocab: int, dtype: torch.dtype, scale: float = 2.0, **transform: Any
) -> fg.Logits:
    x = torch.randn(*shape, vocab, generator=generator(seed), dtype=torch.float64) * scale
    return fg.Logits(x.to(dtype), **transform)


def make_batch(
    seed: int = 0,
    *,
    shape: Sequence[int] = (2, 5),
    vocab: Sequence[int] = (37, 37, 37),
    hidden: Sequence[int] = (12, 20, 8),
    kinds: Sequence[str] = ("linear", "linear", "linear"),
    dtype: torch.dtype = torch.float64,
    scale: float = 2.0,
    transforms: Sequence[dict[str, Any]] = ({}, {}, {}),
    masked: bool = True,
) -> Batch:
    """Random models of the given kinds ("linear", "logits", "logprobs"); about 70 % of the tokens are live."""
    models: list[Any] = []
    for i, (kind, transform) in enumerate(zip(kinds, transforms, strict=True)):
        key = 1000 * seed + i
        if kind == "linear":
            models.append(linear_head(key, shape, vocab[i], hidden[i], dtype, scale, **transform))
        elif kind == "logits":
            models.append(logits_head(key, shape, vocab[i], dtype, scale, **transform))
        else:
            x = torch.rand(tuple(shape), generator=generator(key), dtype=torch.float64) * -5
            models.append(fg.TokenLogProbs(x.to(dtype)))
    g = generator(1000 * seed + 7)
    smallest = min(v for v, kind in zip(vocab, kinds, strict=True) if kind != "logprobs")
    ids = torch.randint(0, smallest, tuple(shape), generator=g)
    mask = None
    if masked:
        mask = torch.rand(tuple(shape), generator=g) < 0.7
        flat = mask.view(-1)
        if flat.numel() > 1:
            flat[0], flat[1] = True, False
    models[0] = trainable(models[0])
    return Batch(*models, ids, mask)


def like(head: Any, **tensors: Tensor) -> Any:
    """The same head with other tensors."""
    return dataclasses.replace(head, **tensors)


def trainable(head: Any) -> Any:
    """The head on fresh leaves that require gradients."""
    return like(head, **{k: x.detach().clone().requires_grad_() for k, x in head.tensors.items()})


def widened(head: Any) -> Any:
    """The head in float64, on fresh leaves where it was trainable."""
    if head is None:
        return None
    if hasattr(head, "models"):
        weights = [w.double() if isinstance(w, Tensor) else w for w in head.weights]
        return type(head)([widened(x) for x in head.models], weights)
    wide = {
        k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for k, x in head.tensors.items()
    }
    return like(head, **wide)


def run(batch: Batch, function: Any = None, **options: Any) -> tuple[Any, list[Tensor]]:
    """Call the loss and return its output and the gradients of the student's tensors."""
    function = fg.gopd_loss if function is None else function
    out = function(*batch.models, batch.token_ids, mask=batch.mask, **options)
    return out, list(torch.autograd.grad(out.loss, batch.leaves))


def expect(batch: Batch, **options: Any) -> tuple[Any, list[Tensor]]:
    """The oracle's output and gradients for the same call."""
    import oracle

    wide = [widened(m) for m in batch.models]
    out = oracle.gopd(*wide, batch.token_ids, mask=batch.mask, **options)
    leaves = [x for x in wide[0].tensors.values() if x.requires_grad]
    if not out.loss.requires_grad:  # nothing live
        return out, [torch.zeros_like(x) for x in leaves]
    return out, list(torch.autograd.grad(out.loss, leaves))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what was wanted (over 1e-6 where that is nearly 0)."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-6))


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str = "value") -> None:
    """Norm-relative closeness; an infinity has to be the same infinity, a NaN is close to nothing."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    infinite = want.isinf()
    assert torch.equal(got[infinite].double(), want[infinite].double()), f"{what}: {got[infinite]} for an infinity"
    got, want = got.masked_fill(infinite, 0), want.masked_fill(infinite, 0)
    error = relative_error(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_all_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float, what: str = "gradient") -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, tolerance, f"{what} {i}")


def assert_same_as_oracle(batch, backend_dtype: BackendDtype, **options) -> None:
    """Loss, token losses, gradients and every reported field."""
    out, grads = run(batch, backend=backend_dtype.backend, **options)
    want, want_grads = expect(batch, **options)
    tol = backend_dtype.tolerance
    # the mean may cancel: its error is that of the token losses
    largest = torch.cat([want.token_loss.abs().reshape(-1), torch.ones(1)]).max()
    assert (out.loss - want.loss).abs().max() <= tol * largest
    assert_close(out.token_loss, want.token_loss, tol, "token_loss")
    assert_all_close(grads, want_grads, tol)
    assert_close(out.entropy, want.entropy, tol, "entropy")
    if batch.token_ids is not None:
        for name in ("student_logprobs", "teacher_logprobs", "ref_logprobs", "advantages"):
            got = getattr(out, name)
            if got is not None:
                assert_close(got, getattr(want, name), tol, name)
    if options.get("tail") == "sampled":
        assert out.kl is None
    elif options.get("estimator") in ("full", "topk"):
        assert_close(out.kl, want.kl, tol, "kl")
    assert out.loss.dtype == out.entropy.dtype == backend_dtype.dtype


def minus_inf_batch(
    seed: int = 0, dtype: torch.dtype = torch.float64, transform: dict[str, Any] | None = None
) -> Batch:
    """Logits with -inf in different places of the three models; row 4 has no support left once all three count."""
    batch = make_batch(
        seed,
        shape=(6,),
        vocab=(23, 23, 23),
        kinds=("logits",) * 3,
        dtype=dtype,
        masked=False,
        transforms=[transform or {}] * 3,
    )
    gone = ((0, 2, 5), (5, 7, 9), (9, 12, 14))
    for model, columns in zip(batch.models, gone, strict=True):
        with torch.no_grad():
            model.logits[:4, list(columns)] = -math.inf
    with torch.no_grad():
        batch.ref.logits[4] = -math.inf
    batch.token_ids.copy_(torch.tensor([1, 3, 4, 6, 8, 10]))  # all inside the support of the first four rows
    return batch


def row_divergence(name: str, **parameters: Any) -> Divergence | None:
    """The divergence of a row problem by its name, or its name and parameter; "none" is a single model."""
    name, _, number = name.partition(" ")
    if name == "none":
        return None
    parameter = DIVERGENCES[name].parameter
    if parameter is not None and parameter.option not in parameters:
        parameters[parameter.option] = float(number or 0.3)
    return make(name, **parameters)


def in_parts(
    ops: RowOps, problem: RowProblem, bounds: Sequence[tuple[int, int]], weights: GradientWeights
) -> tuple[Tensor, Tensor]:
    """Statistics and gradient of a row problem from parts of its columns, as ranks that share it make."""

    def part(model: ModelRows | None, start: int, stop: int) -> Any:
        if model is None:
            return None
        bias = model.transform.bias
        cut = dataclasses.replace(model.transform, bias=None if bias is None else bias[start:stop])
        return ModelRows(model.raw[:, start:stop], cut)

    parts = []
    for start, stop in bounds:
        models = [part(m, start, stop) for m in (problem.student, problem.teacher, problem.ref)]
        here = (problem.token_ids >= start) & (problem.token_ids < stop)
        ids = torch.where(here, problem.token_ids - start, -1)
        parts.append(dataclasses.replace(problem, vocab_size=stop - start, student=models[0], teacher=models[1],
                                         ref=models[2], token_ids=ids))  # fmt: skip
    own = torch.stack([ops.statistics(p) for p in parts])
    logits = [Stat.LOGIT_STUDENT, Stat.LOGIT_TEACHER, Stat.LOGIT_REF]
    for statistics, p in zip(own, parts, strict=True):
        statistics[logits] = statistics[logits].masked_fill(p.token_ids < 0, -math.inf)
    has = problem.teacher is not None, problem.ref is not None
    merged = merge(own, problem.reward_scale, has, problem.divergence)
    if problem.divergence is not None and problem.divergence.second_round:
        merged[Stat.CENTRE : Stat.VALUE + 1] = sum(ops.second_round(p, merged) for p in parts)
    gradient = torch.empty(problem.rows, problem.vocab_size, dtype=own.dtype, device=own.device)
    for (start, stop), p in zip(bounds, parts, strict=True):
        ops.gradient(p, merged, weights, gradient[:, start:stop])
    return merged, gradient
