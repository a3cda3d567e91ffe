"""Packed sequences: cu_seqlens says what a (B, T) token shape would."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
from builders import (
    OBJECTIVES,
    BackendDtype,
    assert_all_close,
    assert_close,
    assert_same_as_oracle,
    like,
    make_batch,
    run,
)
from combinations import product_on_float64
from fused_gopd.tokens import Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none")
BOUNDS = torch.tensor([0, 3, 3, 10, 12], dtype=torch.int32)  # one of the four sequences is empty


@product_on_float64(objective=OBJECTIVES[:2], reduction=REDUCTIONS[:-1])
def test_every_reduction_is_its_formula(backend_dtype, objective, reduction):
    batch = make_batch(51, shape=(12,), dtype=backend_dtype.dtype)
    batch.mask[10:] = False  # a sequence without a live token
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, reduction=reduction, cu_seqlens=BOUNDS, **objective)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=["sampled", "full"])
def test_packing_a_padded_batch_changes_nothing(backend, objective, reduction):
    """Rows of a padded batch, their live tokens one after the other, are the same loss and gradients."""
    padded = make_batch(52, shape=(3, 5), dtype=torch.float32)
    padded.mask.copy_(torch.arange(5) < torch.tensor([[5], [2], [4]]))
    live = padded.mask
    lam = torch.tensor([0.5, 1.25, 2.0])
    models = [like(m, hidden=m.hidden.detach()[live]) for m in padded.models]
    models[0] = like(models[0], hidden=models[0].hidden.requires_grad_())
    packed = padded.replaced(
        student=models[0], teacher=models[1], ref=models[2], token_ids=padded.token_ids[live], mask=None
    )
    options = {"reward_scale": lam, "reduction": reduction, "backend": backend, **objective}
    upstream = (lambda x: x.sum()) if reduction == "none" else (lambda x: x)
    want = fg.gopd_loss(*padded.models, padded.token_ids, mask=live, **options)
    got = fg.gopd_loss(*packed.models, packed.token_ids, cu_seqlens=torch.tensor([0, 5, 7, 11]), **options)
    assert_close(upstream(got.loss), upstream(want.loss), 1e-6)
    assert_close(got.token_loss, want.token_loss[live], 1e-6)
    rows, weight = torch.autograd.grad(upstream(want.loss), padded.leaves)
    assert_all_close(torch.autograd.grad(upstream(got.loss), packed.leaves), [rows[live], weight], 1e-5)


@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    reduction=st.sampled_from(REDUCTIONS[:-1]),
    estimator=st.sampled_from(["sampled", "full"]),
    per_sequence=st.booleans(),
)
def test_any_packing(seed, lengths, reduction, estimator, per_sequence):
    n, count = sum(lengths), len(lengths)
    batch = make_batch(seed, shape=(n,), vocab=(19, 19, 19))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    options = {"reduction": reduction, "estimator": estimator, "cu_seqlens": bounds}
    # a tensor of as many values as tokens is one per token
    scale = torch.linspace(0, 2, count, dtype=torch.float64) if per_sequence and count != n else 1.25
    assert_same_as_oracle(batch, BackendDtype("torch", torch.float64), reward_scale=scale, **options)


def test_normalizer_and_sequence_lengths_are_per_packed_sequence(backend_dtype):
    batch = make_batch(53, shape=(12,), dtype=backend_dtype.dtype)
    options = {"reduction": "seq-mean-token-mean", "cu_seqlens": BOUNDS, "reward_scale": 1.25}
    lengths = torch.tensor([7.0, 1.0, 9.0, 2.0])
    assert_same_as_oracle(batch, backend_dtype, normalizer=5.0, sequence_lengths=lengths, **options)


def test_the_reference_packs_alike():
    batch = make_batch(54, shape=(12,))
    options = {"reduction": "seq-mean-token-mean", "cu_seqlens": BOUNDS, "reward_scale": torch.rand(4).double()}
    dense, dense_grads = run(batch, fg.reference.gopd_loss, **options)
    fused, grads = run(batch, backend="torch", **options)
    assert_close(fused.loss, dense.loss, 1e-12)
    assert_all_close(grads, dense_grads, 1e-12)


def test_sequence_ratios_of_packed_tokens(backend_dtype):
    batch = make_batch(55, shape=(12,), dtype=backend_dtype.dtype)
    old = torch.linspace(-4, -1, 12, dtype=backend_dtype.dtype)
    options = {"ratio": "sequence", "clip": (0.1, 0.1), "cu_seqlens": BOUNDS, "old_logprobs": old}
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, **options)


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 3, 3, 3, 7], [0, 7]])
def test_sums_and_expansions_of_sequences(bounds):
    n = bounds[-1]
    sequences = Sequences(torch.Size((n,)), torch.tensor(bounds))
    x = torch.randn(n)
    parts = [x[a:b] for a, b in itertools.pairwise(bounds)]
    assert sequences.count == len(parts)
    assert_close(sequences.sum(x), torch.tensor([float(p.double().sum()) for p in parts]).double(), 1e-6)
    values = torch.arange(float(len(parts)))
    want = torch.cat([values[i].expand(len(p)) for i, p in enumerate(parts)]) if parts else x
    assert torch.equal(sequences.expand(values) if parts else x, want)
