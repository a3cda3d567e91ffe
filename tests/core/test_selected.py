"""selected_logprobs: log-probs of several tokens of each position under one model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
import oracle
from builders import assert_all_close, assert_close, generator, linear_head, logits_head, trainable, widened
from combinations import product_on_float64
from costs import GEMM, H, N, V, gemm_flops

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 5)


def requested(shape, width: int, vocab: int, seed: int = 5) -> torch.Tensor:
    """Ids with repetitions and gaps."""
    return torch.randint(-1, vocab, (*shape, width), generator=generator(seed))


def expected(head, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    log_p = oracle.logits_of(head).log_softmax(-1).gather(-1, ids.clamp_min(0))
    gone = ids < 0 if mask is None else (ids < 0) | ~mask[..., None]
    return torch.where(gone, 0, log_p)


@product_on_float64(kind=["linear", "logits"], width=[1, 9], masked=[False, True])
def test_values_and_gradients(backend_dtype, kind, width, masked):
    make = linear_head if kind == "linear" else logits_head
    size = (37, 12) if kind == "linear" else (37,)
    head = trainable(make(1, SHAPE, *size, backend_dtype.dtype, softcap=5.0, temperature=0.7))
    mask = torch.rand(SHAPE, generator=generator(2)) < 0.7 if masked else None
    ids, wide = requested(SHAPE, width, 37), widened(head)
    upstream = torch.randn(*SHAPE, width, generator=generator(3), dtype=torch.float64)
    got = fg.selected_logprobs(head, ids, mask=mask, backend=backend_dtype.backend, chunk_size=4)
    want = expected(wide, ids, mask)
    assert got.shape == (*SHAPE, width)
    assert got.dtype == backend_dtype.dtype
    assert_close(got, want, backend_dtype.tolerance)
    got_leaves, want_leaves = (list(x.tensors.values()) for x in (head, wide))
    got_grads = torch.autograd.grad(got, got_leaves, upstream.to(got.dtype))
    assert_all_close(got_grads, torch.autograd.grad(want, want_leaves, upstream), backend_dtype.tolerance)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 7),
    vocab=st.integers(1, 60),
    width=st.integers(1, 70),
    chunk=st.integers(1, 9),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_configuration(seed, n, vocab, width, chunk, dtype):
    head = trainable(linear_head(seed, (n,), vocab, 5, torch.float64, bias=True))
    ids, wide = requested((n,), width, vocab, seed), widened(head)
    got = fg.selected_logprobs(head, ids.to(dtype), chunk_size=chunk, backend="torch")
    want = expected(wide, ids, None)
    assert_close(got, want, 1e-11)
    leaves = [list(x.tensors.values()) for x in (head, wide)]
    grads = [torch.autograd.grad(x.square().sum(), own) for x, own in zip((got, want), leaves, strict=True)]
    assert_all_close(*grads, 1e-10)


def test_one_token_is_token_logprobs(backend):
    head = trainable(linear_head(2, SHAPE, 37, 12, torch.float32))
    ids = torch.randint(37, SHAPE, generator=generator(4))
    one = fg.token_logprobs(head, ids, backend=backend)
    many = fg.selected_logprobs(head, ids[..., None], backend=backend)[..., 0]
    assert_close(many, one, 1e-6)
    grads = [torch.autograd.grad(x.sum(), list(head.tensors.values())) for x in (many, one)]
    assert_all_close(*grads, 1e-5)


def test_the_largest_are_those_of_token_topk(backend):
    head = linear_head(3, SHAPE, 37, 12, torch.float32)
    ids, logprobs = fg.token_topk(head, 6, backend=backend)
    assert_close(fg.selected_logprobs(head, ids, backend=backend), logprobs, 1e-6)


def test_a_logit_of_minus_infinity(backend):
    logits = torch.randn(4, 9, generator=generator(5))
    logits[:, 2], logits[3] = -math.inf, -math.inf
    ids = torch.tensor([[2, 3, -1]]).expand(4, 3)
    got = fg.selected_logprobs(fg.Logits(logits), ids, backend=backend)
    assert torch.equal(got[:, 0], torch.full((4,), -math.inf))
    assert_close(got[:3, 1], logits[:3].log_softmax(-1)[:, 3], 1e-6)
    assert not got[:, 2].any()


def test_the_same_bits_twice_and_under_torch_func():
    head = trainable(linear_head(6, SHAPE, 37, 12, torch.float32))
    ids = requested(SHAPE, 9, 37)
    out = fg.selected_logprobs(head, ids)
    leaves = list(head.tensors.values())
    first, again = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))

    def summed(hidden, weight):
        return fg.selected_logprobs(fg.LinearHead(hidden, weight), ids).sum()

    transformed = torch.func.grad(summed, argnums=(0, 1))(*(x.detach() for x in leaves))
    assert_all_close(transformed, first, 1e-6)


def test_it_costs_one_gemm_and_two_in_the_backward(backend):
    head = trainable(linear_head(7, (N,), V, H, torch.float32))
    ids = requested((N,), 5, V)

    def call():
        fg.selected_logprobs(head, ids, chunk_size=16, backend=backend).sum().backward()

    call()
    assert gemm_flops(call) == 4 * GEMM
    with torch.no_grad():
        assert gemm_flops(lambda: fg.selected_logprobs(head, ids, chunk_size=16, backend=backend)) == GEMM


HEAD = linear_head(8, SHAPE, 37, 12, torch.float32)
IDS = torch.zeros(*SHAPE, 4, dtype=torch.int64)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((HEAD, None), ValueError, "token_ids must be given"),
    ((HEAD, IDS[..., 0]), ValueError, r"token_ids must have shape \(..., K\).*of head, got \(3, 5\)"),
    ((HEAD, IDS[..., :0]), ValueError, r"K >= 1.*got \(3, 5, 0\)"),
    ((HEAD, IDS + 37), IndexError, r"token_ids must be in \[0, 37\), or -1 for none, where not masked, got 37"),
    ((HEAD, IDS - 2), IndexError, "token_ids must be in.*got -2"),
    ((HEAD, IDS.float()), TypeError, "token_ids must be an integer tensor"),
    ((HEAD.hidden, IDS), TypeError, "head must be a LinearHead or Logits"),
])  # fmt: skip
def test_what_is_wrong_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fg.selected_logprobs(*arguments)
