"""A teacher or reference whose vocabulary has other rows than the student's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
import oracle
from builders import (
    OBJECTIVES,
    Batch,
    assert_all_close,
    assert_close,
    expect,
    generator,
    like,
    linear_head,
    logits_head,
    make_batch,
    run,
    widened,
)
from combinations import pairwise
from fused_gopd import reference

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, V = (2, 5), 37
TOPK = tuple({"estimator": "topk", "k": 5, "tail": tail} for tail in ("bucket", "drop", "renormalize", "sampled"))
STUDENTS = tuple({**o, "support": "student"} for o in TOPK)
JOINT = (
    {"estimator": "sampled", "baseline": "expected", "advantage_clip": 0.5},
    {"estimator": "full", "kl_ref": "exact", "kl_ref_weight": 0.3},
)


def vocab_map(seed: int, size: int, tokens: int = V, gaps: int = 9) -> Tensor:
    """A map in which some tokens have no row, in no order."""
    g = generator(seed)
    rows = torch.full((tokens,), -1)
    there = torch.randperm(tokens, generator=g)[: min(tokens - gaps, size)]
    rows[there] = torch.randperm(size, generator=g)[: len(there)]
    return rows


def larger(seed: int, dtype: torch.dtype, **transform: Any) -> fg.LinearHead:
    return linear_head(seed, SHAPE, 61, 9, dtype, vocab_map=vocab_map(seed, 61), **transform)


def smaller(seed: int, dtype: torch.dtype, **transform: Any) -> fg.LinearHead:
    return linear_head(seed, SHAPE, 29, 20, dtype, vocab_map=vocab_map(seed, 29), **transform)


TRANSFORM = {"softcap": 3.0, "temperature": 0.7, "logit_scale": 0.5}
MODELS = {
    "larger": lambda dtype: (larger(1, dtype), linear_head(2, SHAPE, V, 6, dtype)),
    "smaller": lambda dtype: (smaller(3, dtype, bias=True, **TRANSFORM), linear_head(4, SHAPE, 39, 6, dtype)),
    "logits": lambda dtype: (
        logits_head(5, SHAPE, 50, dtype, vocab_map=vocab_map(5, 50), **TRANSFORM),
        larger(6, dtype, bias=True),
    ),
    "both": lambda dtype: (larger(7, dtype), smaller(8, dtype)),
    "reference": lambda dtype: (linear_head(9, SHAPE, V, 6, dtype), smaller(10, dtype, temperature=2.0)),
}  # fmt: skip
SUMS = {
    "log-linear": lambda dtype: (
        fg.LogLinear([larger(1, dtype), linear_head(2, SHAPE, V, 6, dtype), smaller(3, dtype)], [1.5, 0.7, -0.4]),
        smaller(4, dtype),
    ),
    "mixture": lambda dtype: (
        fg.Mixture([logits_head(5, SHAPE, 50, dtype, vocab_map=vocab_map(5, 50)), larger(6, dtype, bias=True)]),
        linear_head(7, SHAPE, V, 6, dtype),
    ),
}


def with_models(made: Any, dtype: torch.dtype, seed: int = 0) -> Batch:
    teacher, ref = made(dtype)
    transforms = ({"bias": True, "softcap": 20.0}, {}, {})
    return make_batch(seed, dtype=dtype, transforms=transforms).replaced(teacher=teacher, ref=ref)


def members(model: Any) -> list[Any]:
    return list(model.models) if hasattr(model, "models") else [model]


def spread(batch: Batch) -> Batch:
    """The same models over one vocabulary: the student's tokens, and behind them the rows of each map that are none.

    What a model does not have is -inf there.
    """
    student, frozen = batch.student, [x for model in (batch.teacher, batch.ref) for x in members(model)]
    tokens = student.vocab_size
    total = tokens + sum(x.own_size for x in frozen if x.vocab_map is not None)
    end = tokens

    def wide(model: Any) -> fg.Logits:
        nonlocal end
        z = oracle.logits_of(widened(model))
        out = torch.full((*SHAPE, total), -math.inf, dtype=torch.float64)
        rows = model.vocab_map
        if rows is None:
            out[..., :tokens] = z[..., :tokens]
            return fg.Logits(out)
        out[..., end : end + model.own_size] = z
        for token, row in enumerate(rows.tolist()):
            if row >= 0:
                out[..., token], out[..., end + row] = z[..., row], -math.inf
        end += model.own_size
        return fg.Logits(out)

    def made(model: Any) -> Any:
        wider = [wide(x) for x in members(model)]
        return type(model)(wider, model.weights) if hasattr(model, "models") else wider[0]

    H = student.hidden.shape[-1]
    weight = torch.cat((student.weight.detach(), student.weight.new_zeros(total - tokens, H)))
    bias = torch.cat((student.bias.detach(), student.bias.new_full((total - tokens,), -math.inf)))
    leaves = {"hidden": student.hidden.detach().clone(), "weight": weight, "bias": bias}
    wider = like(student, **{name: x.requires_grad_() for name, x in leaves.items()})
    return batch.replaced(student=wider, teacher=made(batch.teacher), ref=made(batch.ref))


def assert_same(batch: Batch, backend_dtype: Any, **options: Any) -> None:
    tol, tokens, wider = backend_dtype.tolerance, batch.student.vocab_size, spread(batch)
    out, grads = run(batch, backend=backend_dtype.backend, **options)
    if "k" in options and "support" not in options:  # the likeliest of the student's tokens
        first = wider.ref if options["reward_scale"] == 0 else wider.teacher
        options["support_ids"] = first.logits[..., :tokens].topk(options.pop("k")).indices
    want, (hidden, weight, bias) = expect(wider, **options)
    assert_close(out.token_loss, want.token_loss, tol, "token_loss")
    assert_all_close(grads, (hidden, weight[:tokens], bias[:tokens]), tol)
    for name in ("student_logprobs", "teacher_logprobs", "ref_logprobs", "advantages", "entropy", "kl"):
        got = getattr(out, name)
        if got is not None:
            assert_close(got, getattr(want, name), tol, name)


@pairwise(
    backend_dtype=("torch-float64", "native-float32"),
    objective=(*OBJECTIVES, *TOPK, *STUDENTS),
    models=tuple(MODELS),
    lam=(1.0, 1.25, 0.0),
)
def test_value_and_gradient(backend_dtype, objective, models, lam) -> None:
    assert_same(with_models(MODELS[models], backend_dtype.dtype), backend_dtype, reward_scale=lam, **objective)


@pairwise(
    backend_dtype=("torch-float64", "native-float32"),
    objective=[o for o in (*OBJECTIVES, *STUDENTS) if "k" not in o or "support" in o],
    models=tuple(SUMS),
)
def test_sums_of_models(backend_dtype, objective, models) -> None:
    assert_same(with_models(SUMS[models], backend_dtype.dtype), backend_dtype, reward_scale=1.25, **objective)


@pytest.mark.parametrize(
    "objective", [*OBJECTIVES, *TOPK, *STUDENTS, *JOINT], ids=lambda x: "-".join(map(str, x.values()))
)
@pytest.mark.parametrize("models", [*MODELS, *SUMS])
def test_the_dense_reference_agrees(objective, models) -> None:
    batch = with_models((MODELS | SUMS)[models], torch.float64, seed=1)
    lam = torch.tensor([0.0, 1.3], dtype=torch.float64)
    (out, grads), (want, want_grads) = (
        run(batch, f, reward_scale=lam, **objective) for f in (None, reference.gopd_loss)
    )
    assert_all_close(grads, want_grads, 1e-12)
    for name in ("loss", "token_loss", "advantages", "teacher_logprobs", "ref_logprobs", "kl", "entropy"):
        if getattr(want, name) is not None:
            assert_close(getattr(out, name), getattr(want, name), 1e-12, name)


@pairwise(
    backend_dtype=("torch-float64", "native-float32"),
    objective=[*(o for o in OBJECTIVES if o["estimator"] == "full"), *JOINT],
    models=tuple(MODELS),
    lam=(1.0, 1.7, 0.0, "tokens"),
)
def test_models_taken_together_are_those_of_permuted_rows(backend_dtype, objective, models, lam) -> None:
    """What a copy of the rows in the student's order gives, with a bias of -inf where there is none."""
    dtype = backend_dtype.dtype
    batch = with_models(MODELS[models], dtype)

    def permuted(head: Any) -> Any:
        rows = head.vocab_map
        if rows is None:
            return head
        if isinstance(head, fg.Logits):
            z = head.logits[..., rows.clamp_min(0)].masked_fill(rows < 0, -math.inf)
            return like(head, logits=z, vocab_map=None)
        bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
        bias = bias[rows].masked_fill(rows < 0, -math.inf)
        return like(head, weight=head.weight[rows.clamp_min(0)], bias=bias, vocab_map=None)

    number: Any = torch.linspace(-1, 3, 10, dtype=dtype).reshape(SHAPE) if lam == "tokens" else lam
    options = {**objective, "reward_scale": number, "backend": backend_dtype.backend}
    out, grads = run(batch, **options)
    made = batch.replaced(teacher=permuted(batch.teacher), ref=permuted(batch.ref))
    want, want_grads = run(made, **options)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)
    for name in ("token_loss", "advantages", "teacher_logprobs", "ref_logprobs", "student_logprobs", "entropy", "kl"):
        if getattr(want, name) is not None:
            assert_close(getattr(out, name), getattr(want, name), backend_dtype.tolerance, name)
