"""A teacher or reference that is made of several models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import (
    OBJECTIVES,
    Batch,
    assert_all_close,
    assert_close,
    assert_same_as_oracle,
    generator,
    linear_head,
    logits_head,
    make_batch,
    run,
)
from combinations import product_on_float64
from fused_gopd import reference

SHAPE = (2, 5)


def several(seed: int = 0, *, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> list[Any]:
    """Four models of two kinds, hidden sizes and vocabularies, one with a softcap and a temperature."""
    return [
        linear_head(seed + 11, shape, 37, 9, dtype),
        logits_head(seed + 12, shape, 40, dtype, softcap=3.0, temperature=0.7),
        linear_head(seed + 13, shape, 37, 14, dtype, bias=True, logit_scale=0.5),
        linear_head(seed + 14, shape, 39, 5, dtype),
    ]


def per_token(seed: int, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Weights of both signs, some of them 0."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)
    return x.masked_fill(x.abs() < 0.3, 0)


TARGETS = {
    "weak-to-strong": lambda m, dtype: fg.LogLinear(m[:3], [1.0, 1.0, -1.0]),
    "not summing to 1": lambda m, dtype: fg.LogLinear(m, [0.5, 2.0, 0.0, -0.25]),
    "weights per token": lambda m, dtype: fg.LogLinear(m[:3], [per_token(1, dtype), 0.5, per_token(2, dtype)]),
    "one model": lambda m, dtype: fg.LogLinear(m[:1], [0.8]),
    "mixture": lambda m, dtype: fg.Mixture(m[:3]),
    "mixture per token": lambda m, dtype: fg.Mixture(m[:2], [per_token(3, dtype).abs(), 0.7]),
}
TOPK = tuple({"estimator": "topk", "k": 5, "tail": tail} for tail in ("drop", "renormalize", "sampled"))
BASELINE = {"estimator": "sampled", "baseline": "expected", "advantage_clip": 0.5}


def with_target(name: str, dtype: torch.dtype, place: str, seed: int = 0) -> Batch:
    batch = make_batch(seed, dtype=dtype)
    return batch.replaced(**{place: TARGETS[name](several(seed, dtype=dtype), dtype)})


@product_on_float64(
    objective=(*OBJECTIVES, *TOPK, BASELINE),
    target=tuple(TARGETS),
    place=(("teacher", 1.0), ("teacher", 1.7), ("ref", 1.7)),
)
def test_value_and_gradient(backend_dtype, objective, target, place) -> None:
    place, lam = place
    batch = with_target(target, backend_dtype.dtype, place)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=lam, **objective)


@pytest.mark.parametrize("objective", [*OBJECTIVES, *TOPK, BASELINE], ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.parametrize("target", TARGETS)
def test_the_dense_reference_agrees(objective, target) -> None:
    batch = with_target(target, torch.float64, "teacher", seed=1)
    lam = torch.tensor([0.0, 1.3], dtype=torch.float64)
    (out, grads), (want, want_grads) = (
        run(batch, f, reward_scale=lam, **objective) for f in (None, reference.gopd_loss)
    )
    assert_all_close(grads, want_grads, 1e-12)
    for name in ("loss", "token_loss", "advantages", "teacher_logprobs", "ref_logprobs", "kl", "entropy"):
        if getattr(want, name) is not None:
            assert_close(getattr(out, name), getattr(want, name), 1e-12, name)


@pytest.mark.parametrize(
    "objective",
    [
        *(o for o in OBJECTIVES if o.get("estimator") != "topk"),
        *({**o, "support": "student"} for o in (*TOPK, {"estimator": "topk", "k": 4})),
        BASELINE,
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
@pytest.mark.parametrize("lam", [-0.5, 0.0, 1.0, 2.5, "per token"])
def test_teacher_and_reference_are_the_case_of_two(objective, lam) -> None:
    batch = make_batch(2)
    number: Any = torch.linspace(-1, 3, 10, dtype=torch.float64).reshape(SHAPE) if lam == "per token" else lam
    out, grads = run(batch, reward_scale=number, **objective)
    made = batch.replaced(teacher=fg.LogLinear([batch.teacher, batch.ref], [number, 1 - number]), ref=None)
    again, again_grads = run(made, **objective)
    assert_all_close(again_grads, grads, 1e-12)
    for name in ("loss", "token_loss", "advantages", "kl"):
        if getattr(out, name) is not None:
            assert_close(getattr(again, name), getattr(out, name), 1e-12, name)
