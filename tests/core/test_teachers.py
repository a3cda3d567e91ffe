"""Several teachers in one batch: each token is scored by its own, and nobody pays for the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
import oracle
from builders import (
    OBJECTIVES,
    BackendDtype,
    assert_all_close,
    assert_close,
    generator,
    linear_head,
    logits_head,
    make_batch,
    run,
    widened,
)
from combinations import product_on_float64
from costs import GEMM, H, N, V, gemm_flops

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVE_IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
SHAPE = (4, 6)


def heads(seed: int, shape, dtype, kinds=("linear", "logits", "linear"), vocab=(37, 41, 37), hidden=(20, 0, 7)):
    """Models of different kinds, hidden sizes and vocabularies."""
    made = []
    for i, (kind, v, h) in enumerate(zip(kinds, vocab, hidden, strict=True)):
        if kind == "linear":
            made.append(linear_head(seed + i, shape, v, h, dtype, temperature=1.0 + 0.1 * i))
        elif kind == "logits":
            made.append(logits_head(seed + i, shape, v, dtype))
        else:
            made.append(
                fg.TokenLogProbs(-torch.rand(shape, generator=generator(seed + i), dtype=torch.float64).to(dtype))
            )
    return made


def routes(seed: int, shape, count: int) -> torch.Tensor:
    return torch.randint(count, tuple(shape), generator=generator(seed))


def composite(models, route: torch.Tensor, vocab: int) -> fg.Logits:
    """One model whose logits at each token are those of the token's own model."""
    z = torch.stack([oracle.logits_of(widened(m)).detach()[..., :vocab] for m in models])
    return fg.Logits(z.gather(0, route[None, ..., None].expand(1, *route.shape, vocab))[0])


def assert_routed(batch, teachers, refs, route, backend_dtype: BackendDtype, **options) -> None:
    """The same as one call on composite models, in every field."""
    many = batch.replaced(teacher=teachers, ref=refs)
    got, grads = run(many, backend=backend_dtype.backend, teacher_index=route, **options)
    ref = batch.ref if refs is batch.ref else composite(refs, route, 37)
    one = batch.replaced(student=widened(batch.student), teacher=composite(teachers, route, 37), ref=widened(ref))
    want, want_grads = run(one, fg.reference.gopd_loss, **options)
    tol = backend_dtype.tolerance
    for name in ("token_loss", "advantages", "student_logprobs", "teacher_logprobs", "ref_logprobs", "entropy", "kl"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a, b, tol, name)
    assert (got.loss - want.loss).abs() <= tol * want.token_loss.abs().max().clamp_min(1)
    assert_all_close(grads, want_grads, tol)


@product_on_float64(objective=OBJECTIVES, lam=[0.0, 0.5, 1.0, 1.25])
def test_each_token_has_its_own_teacher(backend_dtype, objective, lam):
    batch = make_batch(31, shape=SHAPE, dtype=backend_dtype.dtype)
    teachers = heads(500, SHAPE, backend_dtype.dtype)
    assert_routed(batch, teachers, batch.ref, routes(1, SHAPE, 3), backend_dtype, reward_scale=lam, **objective)


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=OBJECTIVE_IDS[:2])
def test_references_are_routed_alike(backend_dtype, objective):
    """Reward correction: each teacher with its own base."""
    batch = make_batch(32, shape=SHAPE, dtype=backend_dtype.dtype)
    teachers, refs = (
        heads(500, SHAPE, backend_dtype.dtype),
        heads(600, SHAPE, backend_dtype.dtype, ("logits", "linear", "linear")),
    )
    route = routes(2, SHAPE, 3)
    lam = torch.linspace(0, 2, 24, dtype=backend_dtype.dtype).reshape(SHAPE)
    for scale in (1.25, lam):
        assert_routed(batch, teachers, refs, route, backend_dtype, reward_scale=scale, **objective)


def test_a_route_per_sequence_and_per_packed_sequence(backend_dtype):
    batch = make_batch(33, shape=(12,), dtype=backend_dtype.dtype)
    teachers = heads(500, (12,), backend_dtype.dtype)
    bounds, route = torch.tensor([0, 3, 3, 10, 12]), torch.tensor([2, 0, 1, 2])
    per_token = torch.tensor([2] * 3 + [1] * 7 + [2] * 2)
    options = {
        "reward_scale": 1.25,
        "cu_seqlens": bounds,
        "reduction": "seq-mean-token-mean",
        "backend": backend_dtype.backend,
    }
    a, grads_a = run(batch.replaced(teacher=teachers), teacher_index=route, **options)
    b, grads_b = run(batch.replaced(teacher=teachers), teacher_index=per_token, **options)
    assert torch.equal(a.loss, b.loss)
    assert all(map(torch.equal, grads_a, grads_b))
    padded = make_batch(33, shape=SHAPE, dtype=backend_dtype.dtype)
    teachers = heads(500, SHAPE, backend_dtype.dtype)
    route = torch.tensor([1, 0, 2, 1])
    options = {"reward_scale": 1.25, "backend": backend_dtype.backend}
    a, _ = run(padded.replaced(teacher=teachers), teacher_index=route, **options)
    b, _ = run(padded.replaced(teacher=teachers), teacher_index=route[:, None].expand(SHAPE), **options)
    assert torch.equal(a.loss, b.loss)


@pytest.mark.parametrize(
    "kinds", [("linear", "logprobs", "logits"), ("logprobs", "logprobs", "linear"), ("logprobs",) * 3]
)
def test_scores_computed_elsewhere_may_be_a_route(backend_dtype, kinds):
    batch = make_batch(34, shape=SHAPE, dtype=backend_dtype.dtype)
    teachers = heads(500, SHAPE, backend_dtype.dtype, kinds)
    route = routes(3, SHAPE, 3)
    many = batch.replaced(teacher=teachers)
    got, grads = run(many, backend=backend_dtype.backend, teacher_index=route, reward_scale=1.25)
    options = {"vocab_size": 37, "backend": "torch"}
    scores = torch.stack([
        m.logprobs if isinstance(m, fg.TokenLogProbs) else fg.token_logprobs(m, batch.token_ids, **options)
        for m in teachers
    ])  # fmt: skip
    one = batch.replaced(teacher=fg.TokenLogProbs(scores.gather(0, route[None])[0].detach()))
    want, want_grads = run(one, backend=backend_dtype.backend, reward_scale=1.25)
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)
    dense, _ = run(many, fg.reference.gopd_loss, teacher_index=route, reward_scale=1.25)
    assert_close(got.teacher_logprobs, dense.teacher_logprobs, backend_dtype.tolerance)


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 4),
    n=st.integers(1, 12),
    objective=st.sampled_from(OBJECTIVES),
    chunk=st.integers(1, 9),
    options=st.sampled_from([{}, {"reduction": "none"}, {"reduction": "sum"}]),
)
def test_any_routing(seed, count, n, objective, chunk, options):
    batch = make_batch(seed, shape=(n,), vocab=(19,) * 3)
    teachers = [linear_head(seed + i, (n,), 19, 5 + i, torch.float64) for i in range(count)]
    route = routes(seed, (n,), count)
    many = batch.replaced(teacher=teachers)
    reduce = {"reduction": "sum"} | options
    got = fg.gopd_loss(*many.models, many.token_ids, mask=many.mask, teacher_index=route, reward_scale=1.25,
                       chunk_size=chunk, backend="torch", **objective, **reduce)  # fmt: skip
    one = batch.replaced(teacher=composite(teachers, route, 19))
    want = fg.reference.gopd_loss(*one.models, one.token_ids, mask=one.mask, reward_scale=1.25, **objective, **reduce)
    assert_close(got.token_loss, want.token_loss, 1e-12)
    assert_all_close(
        torch.autograd.grad(got.loss.sum(), many.leaves), torch.autograd.grad(want.loss.sum(), one.leaves), 1e-11
    )


@pytest.mark.parametrize("options", [
    {"advantage_fn": lambda s: s.advantages * s.student_entropy + s.teacher_entropy},
    {"baseline": "expected"},
    {"advantage_clip": 0.5},
], ids=["hook", "baseline", "clip"])  # fmt: skip
def test_the_other_options_follow_the_routes(backend_dtype, options):
    batch = make_batch(35, shape=SHAPE, dtype=backend_dtype.dtype)
    assert_routed(
        batch,
        heads(500, SHAPE, backend_dtype.dtype),
        batch.ref,
        routes(4, SHAPE, 3),
        backend_dtype,
        reward_scale=1.25,
        **options,
    )


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_cancelled_lists_are_scored_on_request(backend_dtype, lam):
    batch = make_batch(36, shape=SHAPE, dtype=backend_dtype.dtype)
    teachers, refs = (
        heads(500, SHAPE, backend_dtype.dtype),
        heads(600, SHAPE, backend_dtype.dtype, ("logits", "linear", "linear")),
    )
    assert_routed(batch, teachers, refs, routes(5, SHAPE, 3), backend_dtype, reward_scale=lam, score_cancelled=True)


def test_one_teacher_in_a_list_is_that_teacher(backend):
    batch = make_batch(37, shape=SHAPE, dtype=torch.float32)
    want, want_grads = run(batch, backend=backend, reward_scale=1.25)
    for index in (None, torch.zeros(SHAPE, dtype=torch.int32)):
        got, grads = run(
            batch.replaced(teacher=[batch.teacher]), backend=backend, reward_scale=1.25, teacher_index=index
        )
        assert torch.equal(got.loss, want.loss)
        assert all(map(torch.equal, grads, want_grads))


def test_a_teacher_without_tokens_is_not_touched(backend):
    """NaN everywhere in it reaches nothing, and it costs no GEMM."""
    batch = make_batch(38, shape=SHAPE, dtype=torch.float32)
    idle = fg.LinearHead(torch.full((*SHAPE, 5), torch.nan), torch.full((37, 5), torch.nan))
    route = torch.zeros(SHAPE, dtype=torch.int64)
    route[~batch.mask] = 99  # nor are masked tokens' routes looked at
    want, _ = run(batch, backend=backend, reward_scale=1.25)
    got, _ = run(batch.replaced(teacher=[batch.teacher, idle]), backend=backend, reward_scale=1.25, teacher_index=route)
    assert_close(got.loss, want.loss, 1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=OBJECTIVE_IDS[:2])
def test_two_teachers_cost_what_one_does(backend, objective):
    batch = make_batch(39, shape=(N,), vocab=(V,) * 3, hidden=(H,) * 3, dtype=torch.float32, masked=False)
    other = linear_head(99, (N,), V, H, torch.float32)
    route = torch.arange(N) % 2

    def call():
        out = fg.gopd_loss(batch.student, [batch.teacher, other], batch.ref, batch.token_ids, teacher_index=route,
                           reward_scale=1.25, chunk_size=16, backend=backend, **objective)  # fmt: skip
        out.loss.backward()

    call()
    assert gemm_flops(call) == 5 * GEMM


def test_second_backward_and_two_runs_give_the_same_bits(backend):
    batch = make_batch(40, shape=SHAPE, dtype=torch.float32)
    models = (batch.student, heads(500, SHAPE, torch.float32), batch.ref)
    runs = []
    for _ in range(2):
        out = fg.gopd_loss(*models, batch.token_ids, mask=batch.mask, teacher_index=routes(6, SHAPE, 3),
                           reward_scale=1.25, backend=backend, chunk_size=4)  # fmt: skip
        runs += [torch.autograd.grad(out.loss, batch.leaves, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
