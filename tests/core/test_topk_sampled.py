"""tail="sampled": the reverse KL, exact on the support, and the score function of a sampled token outside it."""

from __future__ import annotations

import contextlib
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
import oracle
from builders import (
    assert_all_close,
    assert_close,
    assert_same_as_oracle,
    expect,
    generator,
    linear_head,
    make_batch,
    minus_inf_batch,
    run,
    widened,
)
from combinations import pairwise, product_on_float64
from costs import GEMM, H, N, V, gemm_flops
from fused_gopd.tokens import fixed_shapes

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 5)
TAIL = {"estimator": "topk", "tail": "sampled"}


def listed(head, token_ids: torch.Tensor, k: int, seed: int = 0) -> fg.TopKLogProbs:
    """What a server would send: k tokens in an order of its own, and the log-prob of the sampled token."""
    log_p = oracle.logits_of(widened(head)).detach().log_softmax(-1)
    ids = log_p.topk(k).indices[..., torch.randperm(k, generator=generator(seed))]
    sampled = log_p.gather(-1, token_ids[..., None])[..., 0]
    return fg.TopKLogProbs(ids, *(x.to(head.rows.dtype) for x in (log_p.gather(-1, ids), sampled)))


def per_token(shape, dtype) -> torch.Tensor:
    """Both ends, where a model cancels, among them."""
    return torch.linspace(0, 2, math.prod(shape), dtype=dtype).reshape(shape)


@product_on_float64(
    source=["teacher", "student", "listed", "both listed"], k=[0, 1, 6, 37], lam=[0.0, 1.0, 1.25, "tensor"]
)
def test_it_is_its_formula(backend_dtype, source, k, lam):
    batch = make_batch(61, shape=SHAPE, kinds=("linear", "logits", "linear"), dtype=backend_dtype.dtype)
    options = {**TAIL, "reward_scale": per_token(SHAPE, backend_dtype.dtype) if lam == "tensor" else lam}
    if source in ("listed", "both listed") and k:
        batch = batch.replaced(teacher=listed(batch.teacher, batch.token_ids, k))
        if source == "both listed":
            batch = batch.replaced(ref=listed(batch.ref, batch.token_ids, 37, 1))
        elif lam == 0.0:
            options["k"] = k  # the reference, a head, is asked
    else:
        options |= {"k": k, "support": "student" if source == "student" else "teacher"}
    assert_same_as_oracle(batch, backend_dtype, **options)
    got, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = expect(batch, **options)
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)
    for name in ("student_logprobs", "teacher_logprobs", "ref_logprobs", "advantages"):
        x = getattr(got, name)
        if x is not None:
            assert_close(x, getattr(want, name), backend_dtype.tolerance, name)


@product_on_float64(end=["sampled", "full"], support=["teacher", "student"], lam=[0.0, 1.0, 1.25, "tensor"])
def test_its_ends_are_the_other_estimators(backend_dtype, end, support, lam):
    """No token of the support: ``sampled``. All of them: ``full``."""
    batch = make_batch(62, shape=SHAPE, dtype=backend_dtype.dtype)
    options = {"reward_scale": per_token(SHAPE, backend_dtype.dtype) if lam == "tensor" else lam}
    options["backend"] = backend_dtype.backend
    got, grads = run(batch, k=0 if end == "sampled" else 37, support=support, **TAIL, **options)
    want, want_grads = run(batch, estimator=end, **options)
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


@pytest.mark.parametrize("lam", [0.0, 1.0, 1.25])
def test_without_a_support_logprob_min_is_that_of_sampled(backend_dtype, lam):
    batch = minus_inf_batch(62, backend_dtype.dtype)
    batch.token_ids.copy_(torch.tensor([1, 5, 9, 12, 1, 1]))  # some outside the support of a model
    options = {"reward_scale": lam, "logprob_min": -4.0, "backend": backend_dtype.backend}
    got, grads = run(batch, k=0, **TAIL, **options)
    want, want_grads = run(batch, **options)
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_close(got.advantages, want.advantages, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 7),
    vocab=st.integers(3, 90),
    data=st.data(),
    lam=st.sampled_from([-3.0, 0.0, 0.5, 1.0, 1.25, 10.0, "tensor"]),
    kind=st.sampled_from(["linear", "logits"]),
    reduction=st.sampled_from(["token-mean", "sum", "none"]),
    labels=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_any_configuration_and_any_chunk(seed, n, vocab, data, lam, kind, reduction, labels, chunk):
    k = data.draw(st.integers(0, vocab))
    support = data.draw(st.sampled_from(["teacher", "student"]))
    batch = make_batch(seed, shape=(n,), vocab=(vocab, vocab + 2, vocab), kinds=(kind, "linear", "logits"), scale=1.0)
    scale = per_token((n,), torch.float64) if lam == "tensor" else lam
    options = {**TAIL, "k": k, "support": support, "reward_scale": scale, "reduction": reduction, "vocab_size": vocab}
    if labels:
        options["sft_labels"] = torch.randint(vocab, (n,), generator=generator(seed))
        options["sft_labels"][::2] = batch.token_ids[::2]
    want = oracle.gopd(*[widened(m) for m in batch.models], batch.token_ids, mask=batch.mask, **options)
    got = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, chunk_size=chunk, backend="torch", **options)
    dense = fg.reference.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options)
    assert_close(got.token_loss, want.token_loss, 1e-9)
    assert_close(dense.token_loss, want.token_loss, 1e-9)
    assert_all_close(
        torch.autograd.grad(got.loss.sum(), batch.leaves), torch.autograd.grad(dense.loss.sum(), batch.leaves), 1e-9
    )


# -------------------------------------------------------------------------------------------------------- unbiasedness

VOCAB = 24


def every_token(k: int, support: str, lam: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p (V,), and the loss and the gradient of the student's logits for each token y that may be sampled, (V, ...)."""
    z, q, r = (2 * torch.randn(VOCAB, generator=generator(i), dtype=torch.float64) for i in range(3))
    student = z.expand(VOCAB, -1).clone().requires_grad_()
    frozen = (fg.Logits(x.expand(VOCAB, -1)) for x in (q, r))
    out = fg.gopd_loss(fg.Logits(student), *frozen, torch.arange(VOCAB), k=k, support=support, reward_scale=lam,
                       reduction="sum", **TAIL)  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, student)
    return z.softmax(-1), out.token_loss, gradient


def exact(lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    z, q, r = (2 * torch.randn(1, VOCAB, generator=generator(i), dtype=torch.float64) for i in range(3))
    student = z.requires_grad_()
    out = fg.gopd_loss(fg.Logits(student), fg.Logits(q), fg.Logits(r), estimator="full", reward_scale=lam)
    return out.loss.detach(), torch.autograd.grad(out.loss, student)[0][0]


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("lam", [-3.0, 0.5, 1.25, 10.0])
@pytest.mark.parametrize("k", range(0, VOCAB + 1, 4))
def test_its_mean_over_the_sampled_token_is_full(k, lam, support):
    """By enumeration: sum over y of p(y) times the value, and the gradient, that y gives."""
    p, loss, gradient = every_token(k, support, lam)
    value, slope = exact(lam)
    assert_close(p @ loss, value, 1e-12)
    assert_close(p @ gradient, slope, 1e-12)


@pytest.mark.parametrize("k", [0, 1, 4, 12, 24])
def test_its_mean_over_many_samples_is_full(k):
    """20,000 sampled tokens in one call, and the mean of each entry of the gradient against the exact one.

    Each mean is within z standard errors of its expectation, with z such that an unbiased gradient fails in one of a
    million choices of the seed (Bonferroni over the entries; the central limit theorem, 20,000 draws of a variable of
    at most V values). A gradient that leaves out the score function fails at every k but V: checked below.
    """
    samples, lam = 20_000, 1.25
    z, q, r = (2 * torch.randn(VOCAB, generator=generator(i), dtype=torch.float64) for i in range(3))
    ids = torch.multinomial(z.softmax(-1), samples, replacement=True, generator=generator(9))
    student = z.expand(samples, -1).clone().requires_grad_()
    frozen = [fg.Logits(x.expand(samples, -1)) for x in (q, r)]
    options = {"k": k, "reward_scale": lam, "reduction": "sum"}
    out = fg.gopd_loss(fg.Logits(student), *frozen, ids, **TAIL, **options)
    (gradient,) = torch.autograd.grad(out.loss, student)
    bound = statistics.NormalDist().inv_cdf(1 - 1e-6 / (2 * VOCAB))
    _, want = exact(lam)

    def deviation(gradient: torch.Tensor) -> float:
        """The largest of the entries, in standard errors."""
        error = (gradient.mean(0) - want).abs()
        rounding = 1e-12 * want.abs().max()
        return float((error / (gradient.std(0) / samples**0.5 + rounding)).max())

    assert deviation(gradient) <= bound
    if 0 < k < VOCAB:
        student.grad = None
        biased = fg.gopd_loss(fg.Logits(student), *frozen, ids, estimator="topk", tail="drop", **options)
        (without,) = torch.autograd.grad(biased.loss, student)
        assert deviation(without) > 10 * bound


@pytest.mark.parametrize("floor", [-100.0, -12.0])
def test_a_teacher_that_is_0_outside_its_tokens(floor):
    """docs/topk.md: NeMo-RL's zero_outside_topk in its reverse KL, whose target is q / Q on S and e^-100 elsewhere.

    There: sum over S of p (log p - log q/Q), plus the sum over all others of p log p, plus 100 times their mass.
    """
    k = 6
    z, q = (2 * torch.randn(VOCAB, generator=generator(i), dtype=torch.float64) for i in range(2))
    ids, listed = fg.token_topk(fg.Logits(q.expand(VOCAB, -1)), k)
    y = torch.arange(VOCAB)
    student = z.expand(VOCAB, -1).clone().requires_grad_()
    teacher = fg.TopKLogProbs(ids, listed.log_softmax(-1), sampled_logprobs=torch.full((VOCAB,), floor).double())
    out = fg.gopd_loss(fg.Logits(student), teacher, None, y, reduction="sum", **TAIL)
    (gradient,) = torch.autograd.grad(out.loss, student)

    wide = z.clone().requires_grad_()
    log_p, inside = wide.log_softmax(-1), torch.zeros(VOCAB, dtype=torch.bool).scatter(0, ids[0], True)
    on, rest = log_p[ids[0]], log_p[~inside]
    loss = (on.exp() * (on - listed[0].log_softmax(-1))).sum() + (rest.exp() * rest).sum() - floor * rest.exp().sum()
    p = z.softmax(-1)
    assert_close(p @ out.token_loss, loss, 1e-12)
    assert_close(p @ gradient, torch.autograd.grad(loss, wide)[0], 1e-12)


def test_the_variance_falls_with_k():
    """Trace of the covariance of the gradient: most at no support, 0 at all of the vocabulary."""

    def variance(k: int) -> float:
        p, _, gradient = every_token(k, "student", 1.25)
        mean = p @ gradient
        return float(p @ gradient.square().sum(1) - mean.square().sum())

    found = [variance(k) for k in (0, 4, 12, 20, 24)]
    assert found == sorted(found, reverse=True)
    assert found[1] < 0.7 * found[0]
    assert abs(found[-1]) < 1e-12


# -------------------------------------------------------------------------------------------------- extremes and routes


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("lam", [-3.0, 0.5, 1.0, 1.25, 10.0])
def test_a_token_of_probability_0_adds_nothing(backend_dtype, k, lam):
    """In the support or sampled: as in ``sampled``, its advantage is 0."""
    batch = minus_inf_batch(63, backend_dtype.dtype)
    batch.token_ids.copy_(torch.tensor([0, 5, 9, 12, 1, 1]))  # each outside the support of a model, rows 0 to 3
    options = {**TAIL, "k": k, "reward_scale": lam, "backend": backend_dtype.backend}
    out, (grad,) = run(batch, **options)
    assert torch.isfinite(out.token_loss).all()
    assert torch.isfinite(grad).all()
    options.pop("backend")
    want, (want_grad,) = expect(batch, **options)
    assert_close(out.token_loss, want.token_loss, 10 * backend_dtype.tolerance)
    assert_close(grad, want_grad, 10 * backend_dtype.tolerance)


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("lam", [-3.0, 0.5, 1.25, 10.0])
@pytest.mark.parametrize("where", ["student", "teacher", "ref"])
def test_large_finite_masks_are_never_nan(backend, where, lam, mask):
    batch = make_batch(64, shape=(6,), kinds=("logits",) * 3, dtype=torch.float32, masked=False)
    with torch.no_grad():
        getattr(batch, where).logits[:, ::3] = mask
    batch.token_ids.copy_(torch.tensor([0, 1, 2, 3, 4, 5]))
    for k in (0, 4, 37):
        for reduction in ("token-mean", "none"):
            out = fg.gopd_loss(*batch.models, batch.token_ids, k=k, reward_scale=lam, reduction=reduction,
                               backend=backend, **TAIL)  # fmt: skip
            (grad,) = torch.autograd.grad(out.loss.sum(), batch.leaves)
            assert not torch.isnan(out.token_loss).any()
            assert not torch.isnan(grad).any()


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("k", [0, 3])
def test_nan_is_seen_and_stays_in_its_row(function, k):
    batch = make_batch(65, shape=(4,), masked=False)
    with torch.no_grad():
        batch.student.hidden[1, 0] = torch.nan
        batch.teacher.hidden[2, 0] = torch.nan
    out, (grad, _) = run(batch, function, k=k, reward_scale=1.25, **TAIL)
    assert torch.isnan(out.token_loss).tolist() == [False, True, True, False]
    assert torch.isnan(grad).any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_under_a_loss_scale(reduction):
    """Advantages of the size of a sampled token's: finite where the dense path in float32 is."""
    batch = make_batch(66, shape=(16,), vocab=(211,) * 3, dtype=torch.float16, scale=6.0, masked=False)
    wide = batch.replaced(**{name: widened(getattr(batch, name)) for name in ("student", "teacher", "ref")})
    options = {"k": 3, "reward_scale": 10.0, "reduction": reduction, **TAIL}
    grads = []
    for b, function in ((batch, fg.gopd_loss), (wide, fg.reference.gopd_loss)):
        out = function(*b.models, b.token_ids, **options)
        grads.append(torch.autograd.grad(64 * out.loss.sum() / 16, b.leaves))
    for got, want in zip(*grads, strict=True):
        assert torch.isfinite(got).all()
        assert_close(got, want, 0.01)


def test_routes_may_be_heads_and_answers_of_any_k(backend_dtype):
    shape = (12,)
    batch = make_batch(67, shape=shape, dtype=backend_dtype.dtype)
    heads = [linear_head(800 + i, shape, 37, 6 + i, backend_dtype.dtype) for i in range(3)]
    teachers = [heads[0], listed(heads[1], batch.token_ids, 4), listed(heads[2], batch.token_ids, 7)]
    route = torch.randint(3, shape, generator=generator(5))
    options = {"reward_scale": 1.25, "backend": backend_dtype.backend, **TAIL}
    for reduction in ("sum", "none"):
        out = fg.gopd_loss(batch.student, teachers, batch.ref, batch.token_ids, mask=batch.mask, teacher_index=route,
                           reduction=reduction, k=5, **options)  # fmt: skip
        grads = torch.autograd.grad(out.loss.sum(), batch.leaves)
        total = [torch.zeros_like(g) for g in grads]
        fields = ("token_loss", "teacher_logprobs", "advantages")
        want = dict.fromkeys(fields, torch.zeros(shape, dtype=backend_dtype.dtype))
        for i, teacher in enumerate(teachers):
            one = fg.gopd_loss(batch.student, teacher, batch.ref, batch.token_ids, mask=batch.mask & (route == i),
                               reduction="sum", k=None if i else 5, **options)  # fmt: skip
            want = {name: want[name] + getattr(one, name) for name in fields}
            total = [a + b for a, b in zip(total, torch.autograd.grad(one.loss, batch.leaves), strict=True)]
        for name in fields:
            assert_close(getattr(out, name), want[name], backend_dtype.tolerance, name)
        assert_all_close(grads, total, backend_dtype.tolerance)


LABELS = torch.randint(-1, 37, SHAPE, generator=generator(71))
BESIDE = (
    {"token_weight": torch.rand(SHAPE, generator=generator(71))},
    {"entropy_weight": 0.1},
    {"sft_labels": LABELS.masked_fill(LABELS < 0, -100), "sft_weight": 0.3},
    {"rollout_logprobs": -3 * torch.rand(SHAPE, generator=generator(72)), "rollout_is_cap": 2.0},
    {"loss_max": 1.0},
    {"sft_labels": LABELS.masked_fill(LABELS < 0, -100), "entropy_weight": 0.2, "logprob_min": -3.0},
)


@pairwise(
    support=["none", "teacher", "student", "ids"],
    beside=BESIDE,
    reduction=["token-mean", "none"],
    zero_filled=[False, True],
    backend=["torch", "native"],
)
def test_beside_other_options(support, beside, reduction, zero_filled, backend):
    """Weights, bounds and terms of every estimator; with masked rows dropped, and as in a CUDA graph filled with 0."""
    batch = make_batch(71, shape=SHAPE, dtype=torch.float32)
    requested = torch.randint(-1, 37, (*SHAPE, 6), generator=generator(73))
    requested[~batch.mask] = 1000
    own = {"none": {"k": 0}, "ids": {"support_ids": requested}}.get(support, {"k": 4, "support": support})
    options = {**TAIL, **own, **beside, "reward_scale": 1.25, "reduction": reduction, "mask": batch.mask}
    wide = batch.replaced(**{name: widened(getattr(batch, name)) for name in ("student", "teacher", "ref")})
    with fixed_shapes() if zero_filled else contextlib.nullcontext():
        got = fg.gopd_loss(*batch.models, batch.token_ids, backend=backend, chunk_size=4, **options)
        grads = torch.autograd.grad(got.loss.sum(), batch.leaves)
    want = fg.reference.gopd_loss(*wide.models, batch.token_ids, **options)
    assert_close(got.token_loss, want.token_loss, 2e-5)
    assert_all_close(grads, torch.autograd.grad(want.loss.sum(), wide.leaves), 2e-5)


def test_under_torch_func():
    batch = make_batch(72, shape=SHAPE)

    def loss(hidden, weight):
        student = fg.LinearHead(hidden, weight)
        models = student, batch.teacher, batch.ref
        return fg.gopd_loss(*models, batch.token_ids, mask=batch.mask, k=4, reward_scale=1.25, **TAIL).loss

    got = torch.func.grad(loss, argnums=(0, 1))(*(x.detach() for x in batch.leaves))
    assert_all_close(got, run(batch, k=4, reward_scale=1.25, **TAIL)[1], 1e-12)


@product_on_float64(support=[{"k": 0}, {"k": 6}, {"k": 6, "support": "student"}, "ids"], lam=[0.5, 1.25])
def test_a_target_made_of_two_models(backend_dtype, support, lam):
    """LogLinear([q, r], [lambda, 1 - lambda]) at lambda = 1 is teacher and reference at lambda."""
    batch = make_batch(69, shape=SHAPE, dtype=backend_dtype.dtype)
    if support == "ids":
        support = {"support_ids": torch.randint(-1, 37, (*SHAPE, 5), generator=generator(69))}
    elif support["k"] and "support" not in support:  # the largest of the sum are not those of the teacher
        support = {"support_ids": fg.token_topk(batch.teacher, support["k"])[0]}
    options = {**TAIL, **support, "backend": backend_dtype.backend}
    made = batch.replaced(teacher=fg.LogLinear([batch.teacher, batch.ref], [lam, 1 - lam]), ref=None)
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        got, grads = run(made, function, **options)
        want, want_grads = run(batch, function, reward_scale=lam, **options)
        assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
        assert_all_close(grads, want_grads, backend_dtype.tolerance)
        assert_close(got.advantages, want.advantages, backend_dtype.tolerance)


@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize"])
def test_every_tail_reports_the_sampled_token_of_a_server(backend_dtype, tail):
    batch = make_batch(70, shape=SHAPE, dtype=backend_dtype.dtype)
    sent = batch.replaced(teacher=listed(batch.teacher, batch.token_ids, 6))
    assert_same_as_oracle(sent, backend_dtype, estimator="topk", tail=tail, reward_scale=1.25)
    options = {"estimator": "topk", "tail": tail, "reward_scale": 1.25}
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        out, _ = run(sent, function, **options)
        want, _ = run(batch, function, k=6, **options)
        for name in ("teacher_logprobs", "ref_logprobs", "advantages"):
            assert_close(getattr(out, name), getattr(want, name), backend_dtype.tolerance, name)
        bare = fg.TopKLogProbs(sent.teacher.token_ids, sent.teacher.logprobs)
        assert run(sent.replaced(teacher=bare), function, **options)[0].advantages is None


def test_a_reward_scale_fn_sees_the_sampled_token_of_a_server():
    """Where every route has it; where one has not, of no route."""
    batch = make_batch(73, shape=(12,), masked=False)
    answer, route = listed(batch.teacher, batch.token_ids, 5), torch.arange(12) % 2
    bare = fg.TopKLogProbs(answer.token_ids, answer.logprobs)
    want = oracle.logits_of(batch.teacher).log_softmax(-1).gather(-1, batch.token_ids[:, None])[:, 0]

    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        for other, known in ((batch.teacher, True), (answer, True), (bare, False)):
            seen = []

            def scale(stats, seen=seen):
                seen.append((stats.index, stats.teacher_logprobs))
                return torch.full_like(stats.student_logprobs, 1.25)

            models = batch.student, [answer, other], batch.ref
            options = {"estimator": "topk", "k": 5 if other is batch.teacher else None, "teacher_index": route}
            function(*models, batch.token_ids, reward_scale_fn=scale, **options)
            assert len(seen) == (2 if function is fg.gopd_loss else 1)
            for index, found in seen:
                assert (found is not None) == known
                if known:
                    assert_close(found, want[index], 1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_it_costs_no_gemm_more(backend, k):
    batch = make_batch(68, shape=(N,), vocab=(V,) * 3, hidden=(H,) * 3, dtype=torch.float32, masked=False)

    def call():
        options = {"k": k, "reward_scale": 1.25, "chunk_size": 16, "backend": backend}
        fg.gopd_loss(*batch.models, batch.token_ids, **options, **TAIL).loss.backward()

    call()
    assert gemm_flops(call) == 5 * GEMM


# -------------------------------------------------------------------------------------------------------------- errors

BATCH = make_batch(90, shape=SHAPE, dtype=torch.float32, masked=False)
ANSWER = listed(BATCH.teacher, BATCH.token_ids, 5)
BARE = fg.TopKLogProbs(ANSWER.token_ids, ANSWER.logprobs)
ERRORS = {
    "no tokens": ({"token_ids": None, "k": 3}, ValueError, "token_ids must be given for tail='sampled'"),
    "forward": ({"divergence": "forward_kl", "k": 3}, ValueError, "tail='sampled' needs divergence='reverse_kl', got"),
    "mixed": ({"divergence": "mixed", "k": 3}, ValueError, "needs divergence='reverse_kl', got divergence='mixed'"),
    "k below 0": ({"k": -1}, ValueError, "k must be at least 0, got -1"),
    "no support": ({"k": 0, "tail": "drop"}, ValueError, "k must be at least 1, got 0: tail='sampled' alone"),
    "no k": ({}, ValueError, "k must be given"),
    "answer without it": ({"teacher": BARE}, ValueError, "teacher.sampled_logprobs must be given for tail='sampled'"),
    "positive": (
        {"teacher": fg.TopKLogProbs(ANSWER.token_ids, ANSWER.logprobs, -ANSWER.sampled_logprobs)},
        ValueError,
        "teacher.sampled_logprobs must be log-probabilities",
    ),
}


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_what_is_wrong_is_named(case, function):
    changes, error, message = ERRORS[case]
    call = {"student": BATCH.student, "teacher": BATCH.teacher, "ref": BATCH.ref, "token_ids": BATCH.token_ids}
    with pytest.raises(error, match=message):
        function(**({"reward_scale": 1.25} | call | TAIL | changes))


def test_sampled_logprobs_have_the_token_shape():
    with pytest.raises(ValueError, match=r"sampled_logprobs must have the token shape \(3, 5\), got \(5,\)"):
        fg.TopKLogProbs(ANSWER.token_ids, ANSWER.logprobs, torch.zeros(5))
    with pytest.raises(TypeError, match="sampled_logprobs"):
        fg.TopKLogProbs(ANSWER.token_ids, ANSWER.logprobs, ANSWER.token_ids[..., 0])
