"""The topk estimator: a divergence over a few tokens of each position and a tail."""

from __future__ import annotations

import itertools
import math

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
    generator,
    linear_head,
    make_batch,
    relative_error,
    run,
    widened,
)
from combinations import pairwise, product_on_float64
from costs import GEMM, H, N, V, gemm_flops
from fused_gopd.loop.estimators.topk import statistics_on_support
from fused_gopd.rowops import LogitTransform, ModelRows, RowProblem, Stat, select_backend
from fused_gopd.server_scores import _Answer, _matched

pytestmark = pytest.mark.usefixtures("one_thread")

DIVERGENCES = ({}, {"divergence": "forward_kl"}, {"divergence": "jsd", "beta": 0.3})
TAILS = ("bucket", "drop", "renormalize")
SHAPE = (3, 5)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=["reverse", "forward", "jsd"])
every_tail = pytest.mark.parametrize("tail", TAILS)


def listed(head, k: int, seed: int = 0, extra: int = 0, like: fg.TopKLogProbs | None = None) -> fg.TopKLogProbs:
    """What a server would send for a head: k tokens, or those of another and a few more, in an order of its own."""
    log_p = oracle.logits_of(widened(head)).detach().log_softmax(-1)
    ids = log_p.topk(k).indices
    if like is not None:
        rest = log_p.scatter(-1, like.token_ids.clamp_min(0), -math.inf).topk(extra).indices
        ids = torch.cat((like.token_ids.clamp_min(0), rest), -1)
    order = torch.randperm(ids.shape[-1], generator=generator(seed))
    ids = ids[..., order]
    return fg.TopKLogProbs(ids, log_p.gather(-1, ids).to(head.rows.dtype))


def with_scores(batch, which: str, k: int = 5):
    """The batch with teacher, or both, as a server's answers."""
    teacher = listed(batch.teacher, k)
    ref = batch.ref if which == "teacher" else listed(batch.ref, k, 1, 3, teacher)
    return batch.replaced(teacher=teacher, ref=ref)


def per_token(shape, dtype) -> torch.Tensor:
    """Both ends, where a model cancels, among them."""
    return torch.linspace(0, 2, math.prod(shape), dtype=dtype).reshape(shape)


@product_on_float64(
    source=["heads", "student", "teacher", "both"], lam=[0.0, 1.0, 1.25, "tensor"], tail=TAILS, divergence=DIVERGENCES
)
def test_it_is_its_formula(backend_dtype, source, lam, tail, divergence):
    """Teacher and reference as heads (the tokens of one or of the student), or one or both as a server's answers."""
    batch = make_batch(61, shape=SHAPE, kinds=("linear", "logits", "linear"), dtype=backend_dtype.dtype)
    options = {"estimator": "topk", "tail": tail, **divergence}
    if source in ("teacher", "both"):
        batch = with_scores(batch, source)
        if source == "teacher" and lam == 0.0:
            options["k"] = 5  # the reference, a head, is asked
    else:
        options |= {"k": 5, "support": "student" if source == "student" else "teacher"}
    options["reward_scale"] = per_token(SHAPE, backend_dtype.dtype) if lam == "tensor" else lam
    assert_same_as_oracle(batch, backend_dtype, **options)


@every_divergence
@every_tail
@pytest.mark.parametrize("source", ["heads", "student", "teacher", "both"])
def test_the_dense_reference_is_the_same_formula(source, tail, divergence):
    batch = make_batch(62, shape=SHAPE)
    options = {"estimator": "topk", "tail": tail, "reward_scale": 1.25, **divergence}
    if source in ("teacher", "both"):
        batch = with_scores(batch, source)
    else:
        options |= {"k": 5, "support": "student" if source == "student" else "teacher"}
    got, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = run(batch, backend="torch", **options)
    assert_close(got.token_loss, want.token_loss, 1e-12)
    assert_close(got.kl, want.kl, 1e-11)
    assert_all_close(grads, want_grads, 1e-11)
    for name in ("advantages", "student_logprobs", "teacher_logprobs", "ref_logprobs", "entropy"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a, b, 1e-12, name)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 7),
    vocab=st.integers(3, 90),
    data=st.data(),
    divergence=st.sampled_from(DIVERGENCES),
    tail=st.sampled_from(TAILS),
    lam=st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, "tensor"]),
    kind=st.sampled_from(["linear", "logits"]),
    reduction=st.sampled_from(["token-mean", "sum", "none"]),
    chunk=st.integers(1, 9),
)
def test_any_configuration_and_any_chunk(seed, n, vocab, data, divergence, tail, lam, kind, reduction, chunk):
    k = data.draw(st.integers(1, vocab))
    support = data.draw(st.sampled_from(["teacher", "student"]))
    batch = make_batch(seed, shape=(n,), vocab=(vocab, vocab + 2, vocab), kinds=(kind, "linear", "logits"), scale=1.0)
    scale = per_token((n,), torch.float64) if lam == "tensor" else lam
    options = {"estimator": "topk", "k": k, "support": support, "tail": tail, "reward_scale": scale, **divergence}
    options |= {"reduction": reduction, "vocab_size": vocab}
    want = oracle.gopd(*[widened(m) for m in batch.models], batch.token_ids, mask=batch.mask, **options)
    got = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, chunk_size=chunk, backend="torch", **options)
    dense = fg.reference.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options)
    assert_close(got.token_loss, want.token_loss, 1e-9)
    assert_close(dense.token_loss, want.token_loss, 1e-9)
    assert_all_close(
        torch.autograd.grad(got.loss.sum(), batch.leaves), torch.autograd.grad(dense.loss.sum(), batch.leaves), 1e-9
    )


@product_on_float64(support=["teacher", "student"], tail=TAILS, divergence=DIVERGENCES)
def test_all_tokens_are_the_full_estimator(backend_dtype, support, tail, divergence):
    batch = make_batch(63, shape=SHAPE, dtype=backend_dtype.dtype)
    options = {"reward_scale": 1.25, "backend": backend_dtype.backend, **divergence}
    got, grads = run(batch, estimator="topk", k=37, support=support, tail=tail, **options)
    want, want_grads = run(batch, estimator="full", **options)
    tolerance = backend_dtype.tolerance
    assert_close(got.token_loss, want.token_loss, tolerance)
    assert_close(got.kl, want.kl, tolerance)
    assert_all_close(grads, want_grads, tolerance)


@product_on_float64(k=[1, 5, 37], lam=[0.0, 0.5, 1.0, 1.25], tail=["bucket", "renormalize"], divergence=DIVERGENCES)
def test_equal_models_give_exactly_nothing(backend_dtype, k, lam, tail, divergence):
    batch = make_batch(64, shape=SHAPE, dtype=backend_dtype.dtype)
    same = fg.LinearHead(batch.student.hidden.detach(), batch.student.weight.detach())
    out, grads = run(
        batch.replaced(teacher=same, ref=same),
        backend=backend_dtype.backend,
        estimator="topk",
        k=k,
        tail=tail,
        reward_scale=lam,
        reduction="sum",
        **divergence,
    )
    assert not out.token_loss.any()
    assert not out.kl.any()
    assert not any(g.any() for g in grads)


def test_dropping_the_tail_has_the_gradient_of_the_formula():
    """d/dz_v = 1[v in S] p_v (d_v + 1) - p_v sum_S p (d + 1)"""
    batch = make_batch(65, shape=(4,), kinds=("logits",) * 3, masked=False)
    options = {"estimator": "topk", "k": 6, "tail": "drop", "reward_scale": 1.25, "reduction": "sum"}
    _, (grad,) = run(batch, backend="torch", **options)
    log_p, log_q, log_r = (m.logits.detach().log_softmax(-1) for m in batch.models)
    inside = torch.zeros_like(log_p).scatter(-1, log_q.topk(6).indices, 1.0)
    slope = inside * log_p.exp() * (log_p - 1.25 * log_q + 0.25 * log_r + 1)
    assert_close(grad, slope - log_p.exp() * slope.sum(-1, keepdim=True), 1e-12)


def test_a_renormalised_loss_does_not_pull_outside_the_support(backend):
    batch = make_batch(66, shape=(4,), kinds=("logits",) * 3, dtype=torch.float32, masked=False)
    _, (grad,) = run(batch, backend=backend, estimator="topk", k=6, tail="renormalize", reward_scale=1.25)
    outside = torch.ones_like(grad, dtype=torch.bool).scatter(-1, batch.teacher.logits.topk(6).indices, False)
    assert grad[outside].abs().max() <= 1e-7 * grad.abs().max()


def test_fewer_tokens_than_k(backend_dtype):
    """Slots with id -1 are as if they were not there, whatever stands beside them; a position may have none at all."""
    batch = with_scores(make_batch(67, shape=(4,), dtype=backend_dtype.dtype, masked=False), "both")
    short = batch.teacher.token_ids.clone()
    short[0, 3:], short[1, 0], short[2] = -1, -1, -1
    scores = batch.teacher.logprobs.clone()
    scores[short < 0] = torch.nan
    batch = batch.replaced(teacher=fg.TopKLogProbs(short, scores))
    for tail in TAILS:
        assert_same_as_oracle(batch, backend_dtype, estimator="topk", tail=tail, reward_scale=1.25)
        out, (grad, *_) = run(batch, backend=backend_dtype.backend, estimator="topk", tail=tail, reward_scale=1.25)
        assert out.token_loss[2] == 0
        assert not grad[2].any()


@product_on_float64(reduction=["sum", "none"], divergence=DIVERGENCES, tail=TAILS)
def test_a_student_that_is_all_but_certain_has_a_finite_gradient(reduction, divergence, tail, backend_dtype):
    """Probabilities next to the smallest that float32 has: at log p of -88 to -104 it loses them bit by bit."""
    gaps = torch.arange(80.0, 112.0)
    logits = torch.stack((0 * gaps, -gaps, -2 * gaps, -3 * gaps), 1).to(backend_dtype.dtype)
    ids = torch.tensor([0, 1]).expand(len(gaps), 2)
    teacher = fg.TopKLogProbs(ids, torch.tensor([-0.7, -1.5], dtype=backend_dtype.dtype).expand(len(gaps), 2))
    grads = []
    for function, dtype in ((fg.gopd_loss, backend_dtype.dtype), (fg.reference.gopd_loss, torch.float64)):
        hidden = logits.detach().to(dtype).requires_grad_()
        student = fg.LinearHead(hidden, torch.eye(4, dtype=dtype).requires_grad_())
        options = {"estimator": "topk", "tail": tail, "reduction": reduction, **divergence}
        function(student, teacher, backend=backend_dtype.backend, **options).loss.sum().backward()
        grads.append((hidden.grad, student.weight.grad))
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, 10 * backend_dtype.tolerance)


def test_a_token_of_probability_0_is_excluded_from_the_support(backend_dtype):
    batch = make_batch(68, shape=(6,), kinds=("logits",) * 3, dtype=backend_dtype.dtype, masked=False)
    with torch.no_grad():
        largest = batch.teacher.logits.topk(6).indices
        batch.student.logits[0, largest[0, :2]] = -math.inf
        batch.ref.logits[1, largest[1, 1]] = -math.inf
        batch.teacher.logits[2, 7:] = -math.inf
        batch.student.logits[3] = -math.inf
        batch.ref.logits[4] = -math.inf
    # row 3 has no student: an empty support, loss 0
    batch.token_ids.fill_(1)
    for tail in TAILS:
        options = {"estimator": "topk", "k": 6, "tail": tail, "reward_scale": 1.25, "backend": backend_dtype.backend}
        out, (grad,) = run(batch, **options)
        assert torch.isfinite(out.token_loss).all()
        assert torch.isfinite(grad).all()
        wide = batch.replaced(**{n: widened(getattr(batch, n)) for n in ("student", "teacher", "ref")})
        keep = [0, 1, 2, 4, 5]
        for row in keep:
            cut = wide.replaced(
                student=fg.Logits(wide.student.logits[row : row + 1].detach().requires_grad_()),
                teacher=fg.Logits(wide.teacher.logits[row : row + 1]),
                ref=fg.Logits(wide.ref.logits[row : row + 1]),
            )
            want = oracle.gopd(*cut.models, None, reward_scale=1.25, estimator="topk", k=6, tail=tail)
            assert_close(out.token_loss[row], want.token_loss[0], 10 * backend_dtype.tolerance, f"{tail} row {row}")
            if want.loss.requires_grad:
                (slope,) = torch.autograd.grad(want.loss, cut.student.logits)
                assert_close(6 * grad[row : row + 1], slope, 10 * backend_dtype.tolerance, f"{tail} row {row}")


@product_on_float64(ruled_out_by=["teacher", "ref"], divergence=DIVERGENCES, tail=TAILS)
def test_a_position_without_an_outcome_has_no_gradient(ruled_out_by, divergence, tail, backend_dtype):
    """A frozen model that rules everything out leaves no token: at most the bucket, with all the mass of each model."""
    batch = make_batch(87, shape=(3,), kinds=("logits",) * 3, dtype=backend_dtype.dtype, masked=False)
    with torch.no_grad():
        getattr(batch, ruled_out_by).logits[1] = -math.inf
    options = {"estimator": "topk", "k": 4, "tail": tail, "reward_scale": 0.5, **divergence}
    out, (grad,) = run(batch, backend=backend_dtype.backend, **options)
    assert out.token_loss[1] == 0
    assert not grad[1].any()
    assert grad[0].any()
    assert grad[2].any()


@every_tail
@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
def test_nan_reaches_the_loss_where_the_support_is_empty(function, tail):
    """A position without a token, or with none that a model allows: NaN in its logits is still not a silent 0."""
    batch = with_scores(make_batch(83, shape=(4,), kinds=("logits", "linear", "linear"), masked=False), "teacher")
    ids = batch.teacher.token_ids.clone()
    ids[1:] = -1
    with torch.no_grad():
        batch.student.logits[1, 3] = torch.nan
        batch.ref.hidden[2, 0] = torch.nan
    batch = batch.replaced(teacher=fg.TopKLogProbs(ids, batch.teacher.logprobs))
    out, (grad,) = run(batch, function, estimator="topk", tail=tail, reward_scale=1.25, reduction="sum")
    assert torch.isnan(out.token_loss).tolist() == [False, True, True, False]
    assert torch.isnan(grad).any(1).tolist() == [False, True, True, False]
    assert not grad[3].any()


@every_divergence
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_confident_student_costs_no_digits(divergence, reduction):
    """A light bucket makes derivatives by log p as large as 1 over its mass; the gradient by logits has none of it."""
    errors = []
    for seed in range(8):
        batch = make_batch(200 + seed, shape=(5,), kinds=("logits",) * 3, dtype=torch.float32, masked=False, scale=1.0)
        with torch.no_grad():
            batch.student.logits[:, :2] += 14
            batch.teacher.logits[:, :2] += 3
        wide = batch.replaced(**{n: widened(getattr(batch, n)) for n in ("student", "teacher", "ref")})
        options = {"estimator": "topk", "k": 2, "reward_scale": 1.0, "reduction": reduction, **divergence}
        grads = []
        for b, function in ((batch, fg.gopd_loss), (wide, fg.reference.gopd_loss)):
            out = function(*b.models, b.token_ids, **options)
            grads.append(torch.autograd.grad(out.loss.sum(), b.leaves)[0])
        errors.append(relative_error(*grads))
    assert max(errors) <= 5e-6


def test_what_leaves_the_sum_is_not_a_divergence_of_nothing():
    """The teacher's bucket is light and the student's is not: kl is that of the student on what is left."""
    answer = fg.TopKLogProbs(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log())
    logits = torch.zeros(1, 30)
    logits[0, 0] = 2.0
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        out = function(fg.Logits(logits), answer, estimator="topk")
        p = logits[0, :2].softmax(0)
        assert_close(out.kl[0], (p * (p / 0.5).log()).sum(), 1e-6)


def test_nan_is_seen_and_stays_in_its_row(backend):
    batch = make_batch(69, shape=(4,), dtype=torch.float32, masked=False)
    clean, _ = run(batch, backend=backend, estimator="topk", k=5, reward_scale=1.25)
    with torch.no_grad():
        batch.student.hidden[1, 0] = torch.nan
        batch.teacher.hidden[2, 0] = torch.nan
    out, (grad, _) = run(batch, backend=backend, estimator="topk", k=5, reward_scale=1.25)
    assert torch.isnan(out.token_loss).tolist() == [False, True, True, False]
    assert torch.isnan(grad).any(-1).tolist() == [False, True, True, False]
    assert torch.equal(out.token_loss[[0, 3]], clean.token_loss[[0, 3]])


def test_the_tail_of_a_head_is_summed_and_not_1_minus_the_support(backend_dtype):
    """Where the tail is light, 1 minus the mass on the support would have an error of eps / tail in its logarithm."""
    batch = make_batch(70, shape=(6,), kinds=("logits",) * 3, dtype=backend_dtype.dtype, masked=False)
    raw = batch.teacher.logits.clone()
    raw[:, :5] += 11
    ids = torch.arange(5).expand(6, -1)
    model = ModelRows(raw.clone(), LogitTransform())
    problem = RowProblem(37, model, token_ids=batch.token_ids)
    ops = select_backend(backend_dtype.backend, raw.device, {backend_dtype.dtype})
    statistics, on_support, _ = statistics_on_support(ops, problem, ids, batch.token_ids, batch.teacher)
    assert torch.equal(model.raw, raw)  # hidden for a while, and back
    log_p = raw.double().log_softmax(-1)
    rest = log_p[:, 5:].logsumexp(-1)
    assert rest.max() < math.log(2e-3)
    eps = torch.finfo(backend_dtype.dtype).eps
    # a logarithm of a sum of positive terms: eps times the magnitude of the logits, whatever its value
    assert (on_support.rest - rest).abs().max() <= 60 * eps
    left = (1 - log_p[:, :5].exp().to(backend_dtype.dtype).sum(-1)).log()
    if backend_dtype.dtype == torch.float32:
        assert (left - rest).abs().max() > 600 * eps
    # and the two parts together are the whole
    want = ops.statistics(problem)
    for stat in (Stat.LOGSUM_STUDENT, Stat.MEAN_LOGIT, Stat.LOGIT_STUDENT, Stat.MAX_STUDENT):
        assert (statistics[stat] - want[stat]).abs().max() <= 60 * eps, stat


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("source", ["heads", "student", "both"])
def test_runs_chunks_and_second_backwards_agree(backend, source, reduction):
    batch = make_batch(71, shape=(11,), dtype=torch.float32)
    options = {"estimator": "topk", "reward_scale": 1.25, "backend": backend, "reduction": reduction}
    if source == "both":
        batch = with_scores(batch, "both")
    else:
        options |= {"k": 5, "support": "student" if source == "student" else "teacher"}

    def gradients(**more):
        out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options, **more)
        return [torch.autograd.grad(out.loss.sum(), batch.leaves, retain_graph=True) for _ in range(2)]

    first, again = gradients()
    other, _ = gradients()
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, other))
    for chunk in (1, 3, 4):
        assert_all_close(gradients(chunk_size=chunk)[0], first, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_low_precision_is_no_worse_than_the_naive_path(backend, kind, dtype):
    options = {"estimator": "topk", "k": 8, "reward_scale": 1.25}
    errors = []
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        total = 0.0
        for seed in range(4):
            batch = make_batch(72 + seed, shape=(9,), vocab=(211,) * 3, kinds=(kind,) * 3, dtype=dtype, scale=4.0)
            wide = batch.replaced(**{n: widened(getattr(batch, n)) for n in ("student", "teacher", "ref")})
            _, want = run(wide, fg.reference.gopd_loss, **options)
            more = {"backend": backend} if function is fg.gopd_loss else {}
            _, got = run(batch, function, **options, **more)
            total += sum(relative_error(a, b) ** 2 for a, b in zip(got, want, strict=True))
        errors.append(math.sqrt(total))
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("source", ["heads", "student", "teacher", "both"])
def test_it_costs_the_gemms_of_the_models_it_has(backend, source, frozen):
    batch = make_batch(76, shape=(N,), vocab=(V,) * 3, hidden=(H,) * 3, dtype=torch.float32, masked=False)
    options = {"estimator": "topk", "reward_scale": 1.25, "chunk_size": 16, "backend": backend}
    models = {"heads": 2, "student": 2, "teacher": 1, "both": 0}[source]
    if source in ("heads", "student"):
        options |= {"k": 5, "support": "student" if source == "student" else "teacher"}
    else:
        batch = with_scores(batch, source)
    batch.student.weight.requires_grad_(not frozen)

    def call():
        fg.gopd_loss(*batch.models, batch.token_ids, **options).loss.backward()

    call()
    assert gemm_flops(call) == (2 + (not frozen) + models) * GEMM


def test_the_callers_logits_are_left_alone(backend):
    """While the tail is summed the support is hidden, in a copy."""
    batch = make_batch(77, shape=SHAPE, kinds=("logits",) * 3, dtype=torch.float32)
    before = [m.logits.detach().clone() for m in batch.models]
    for support in ("teacher", "student"):
        run(batch, backend=backend, estimator="topk", k=5, support=support, reward_scale=1.25)
    assert all(torch.equal(m.logits, x) for m, x in zip(batch.models, before, strict=True))


def test_routes_may_be_heads_and_answers_of_any_k(backend_dtype):
    shape = (12,)
    batch = make_batch(78, shape=shape, dtype=backend_dtype.dtype)
    heads = [linear_head(800 + i, shape, 37, 6 + i, backend_dtype.dtype) for i in range(3)]
    teachers = [heads[0], listed(heads[1], 4), listed(heads[2], 7)]
    route = torch.randint(3, shape, generator=generator(5))
    options = {"estimator": "topk", "k": 5, "reward_scale": 1.25, "backend": backend_dtype.backend}
    for reduction in ("sum", "none"):
        out = fg.gopd_loss(batch.student, teachers, batch.ref, batch.token_ids, mask=batch.mask, teacher_index=route,
                           reduction=reduction, **options)  # fmt: skip
        grads = torch.autograd.grad(out.loss.sum(), batch.leaves)
        want = torch.zeros(shape, dtype=backend_dtype.dtype)
        total = [torch.zeros_like(g) for g in grads]
        for i, teacher in enumerate(teachers):
            more = options | ({} if i == 0 else {"k": None})
            one = fg.gopd_loss(batch.student, teacher, batch.ref, batch.token_ids, mask=batch.mask & (route == i),
                               reduction="sum", **more)  # fmt: skip
            want = want + one.token_loss
            total = [a + b for a, b in zip(total, torch.autograd.grad(one.loss, batch.leaves), strict=True)]
        assert_close(out.token_loss, want, backend_dtype.tolerance)
        assert_all_close(grads, total, backend_dtype.tolerance)
        assert out.teacher_logprobs is None
        assert out.advantages is None


def test_what_a_server_sends_is_what_the_head_gives(backend_dtype):
    """A teacher's own top k through TopKLogProbs is the teacher as a head."""
    batch = make_batch(79, shape=SHAPE, dtype=backend_dtype.dtype)
    teacher = fg.TopKLogProbs(*fg.token_topk(batch.teacher, 5, mask=batch.mask, backend=backend_dtype.backend))
    options = {"estimator": "topk", "reward_scale": 1.25, "backend": backend_dtype.backend}
    got, grads = run(batch.replaced(teacher=teacher), **options)
    want, want_grads = run(batch, k=5, **options)
    assert_close(
        got.token_loss, want.token_loss, 3 * backend_dtype.tolerance
    )  # the tail is 1 minus a sum in one of them
    assert_all_close(grads, want_grads, 3 * backend_dtype.tolerance)


def test_a_model_that_has_cancelled_is_not_asked(backend):
    """lambda = 1: the reference need not even contain the teacher's tokens; lambda = 0: its tokens are taken."""
    batch = with_scores(make_batch(80, shape=SHAPE, dtype=torch.float32), "both")
    foreign = fg.TopKLogProbs((batch.teacher.token_ids + 1) % 37, batch.teacher.logprobs)
    options = {"estimator": "topk", "backend": backend}
    a, _ = run(batch.replaced(ref=foreign), reward_scale=1.0, **options)
    b, _ = run(batch.replaced(ref=None), reward_scale=1.0, **options)
    assert torch.equal(a.loss, b.loss)
    a, _ = run(batch, reward_scale=0.0, **options)
    b, _ = run(batch.replaced(teacher=None), reward_scale=0.0, **options)
    assert torch.equal(a.loss, b.loss)
    lam = torch.ones(SHAPE)
    a, _ = run(batch.replaced(ref=foreign), reward_scale=lam, **options)
    c, _ = run(batch, reward_scale=1.0, **options)
    assert_close(a.loss, c.loss, 1e-6)


# --------------------------------------------------------------------------------------------------------- logprob_min


@pairwise(
    backend_dtype=["torch-float64", "native-float32"],
    source=["heads", "student", "ids", "teacher", "both", "sum"],
    objective=[*itertools.product(TAILS, DIVERGENCES), ("sampled", {})],
    lam=[0.0, 1.0, 1.25, "tensor"],
)
def test_a_lower_bound_of_the_frozen_models_logprobs(backend_dtype, source, objective, lam):
    """Of the tokens of S, those with probability 0 among them; the masses outside S are those of the models."""
    tail, divergence = objective
    batch = make_batch(88, shape=SHAPE, kinds=("linear", "logits", "logits"), dtype=backend_dtype.dtype)
    with torch.no_grad():
        batch.teacher.logits[:, 1, ::3] = -math.inf
        batch.ref.logits[:, 2, 1::3] = -math.inf
    options = {"estimator": "topk", "tail": tail, "logprob_min": -3.0, **divergence}
    options["reward_scale"] = per_token(SHAPE, backend_dtype.dtype) if lam == "tensor" else lam
    if source in ("teacher", "both"):
        heads, batch = batch, with_scores(batch, source)
        for name in ("teacher", "ref") if source == "both" else ("teacher",):
            own = fg.token_logprobs(getattr(heads, name), batch.token_ids, backend="torch")
            sent = getattr(batch, name)
            batch = batch.replaced(**{name: fg.TopKLogProbs(sent.token_ids, sent.logprobs, own)})
        if source == "teacher" and lam == 0.0:
            options["k"] = 5  # the reference, a head, is asked
    elif source == "ids":
        options["support_ids"] = requested(SHAPE, 9)
    else:
        options |= {"k": 5, "support": "student" if source == "student" else "teacher"}
    if source == "sum":
        batch = batch.replaced(teacher=fg.LogLinear([batch.teacher, batch.ref], [1.5, -0.5]))
    assert_same_as_oracle(batch, backend_dtype, **options)
    got, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = run(batch, backend=backend_dtype.backend, **options)
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


MORE_DIVERGENCES = (
    *DIVERGENCES,
    {"divergence": "mixed", "forward_weight": 0.7},
    {"divergence": "mixed", "forward_weight": torch.linspace(0.1, 0.9, 15).reshape(SHAPE)},
    {"divergence": "alpha", "alpha": 0.3},
    {"divergence": "alpha", "alpha": 0.8},
    {"divergence": "skew_reverse_kl", "skew": 0.2},
)


@pairwise(
    backend_dtype=["torch-float64", "native-float32"],
    source=["heads", "student", "ids", "both", "sum", "mixture"],
    divergence=MORE_DIVERGENCES,
    frozen=[None, -3.0],
    lam=[0.0, 1.0, 1.25, "tensor"],
)
def test_a_lower_bound_of_the_students_logprobs(backend_dtype, source, divergence, frozen, lam):
    """Of ``drop``: a token that is below it, one with probability 0 among them, is a constant."""
    batch = make_batch(89, shape=SHAPE, kinds=("logits", "logits", "logits"), dtype=backend_dtype.dtype)
    with torch.no_grad():
        for model, start in ((batch.student, 0), (batch.teacher, 1), (batch.ref, 2)):
            model.logits[:, start + 1, start::4] = -math.inf
    options = {"estimator": "topk", "tail": "drop", "logprob_min": frozen, "student_logprob_min": -2.5, **divergence}
    if isinstance(options.get("forward_weight"), torch.Tensor):
        options["forward_weight"] = options["forward_weight"].to(backend_dtype.dtype)
    options["reward_scale"] = per_token(SHAPE, backend_dtype.dtype) if lam == "tensor" else lam
    if source == "both":
        batch = with_scores(batch, source)
    elif source == "ids":
        options["support_ids"] = requested(SHAPE, 9)
    else:
        options |= {"k": 5, "support": "student" if source == "student" else "teacher"}
    if source in ("sum", "mixture"):
        made = fg.LogLinear if source == "sum" else fg.Mixture
        batch = batch.replaced(teacher=made([batch.teacher, batch.ref], [1.5, 0.5]))
    assert_same_as_oracle(batch, backend_dtype, **options)
    got, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = run(batch, backend=backend_dtype.backend, chunk_size=4, **options)
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)
    out = fg.gopd_loss(  # recomputed in the backward
        *batch.models, batch.token_ids, mask=batch.mask, backend=backend_dtype.backend, reduction="none", **options
    )
    again = torch.autograd.grad(out.loss.sum() / batch.mask.sum(), batch.leaves)
    assert_all_close(again, want_grads, backend_dtype.tolerance)


def test_a_bound_of_the_student_that_is_in_force_nowhere_changes_no_bit(backend):
    batch = make_batch(90, shape=SHAPE, dtype=torch.float32)
    options = {"estimator": "topk", "k": 5, "tail": "drop", "reward_scale": 1.25, "backend": backend}
    for divergence in MORE_DIVERGENCES:
        (a, grads), (b, bounded) = (
            run(batch, **options, **divergence, **x) for x in ({}, {"student_logprob_min": -1e3})
        )
        assert torch.equal(a.token_loss, b.token_loss)
        assert all(map(torch.equal, grads, bounded))


# --------------------------------------------------------------------------------------------------------- support_ids


def requested(shape, width: int, seed: int = 5) -> torch.Tensor:
    """Ids with repetitions and gaps, and a position without any."""
    ids = torch.randint(-1, 12, (*shape, width), generator=generator(seed))
    ids.view(-1, width)[0] = -1
    return ids


@product_on_float64(lam=[0.0, 1.0, 1.25, "tensor"], objective=[*itertools.product(TAILS, DIVERGENCES), ("sampled", {})])
def test_a_support_of_the_callers(backend_dtype, lam, objective):
    """An id that is there twice counts once, -1 is none; value, gradient and reference are those of the oracle."""
    tail, divergence = objective
    batch = make_batch(84, shape=SHAPE, kinds=("linear", "logits", "linear"), dtype=backend_dtype.dtype)
    options = {"estimator": "topk", "tail": tail, "support_ids": requested(SHAPE, 9), **divergence}
    options["reward_scale"] = per_token(SHAPE, backend_dtype.dtype) if lam == "tensor" else lam
    assert_same_as_oracle(batch, backend_dtype, **options)
    got, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = run(batch, backend=backend_dtype.backend, chunk_size=2, **options)
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_a_support_that_is_the_teachers(backend, reduction, dtype):
    """The ids that k would find, each twice and in another order; what is masked may be anything."""
    batch = make_batch(85, shape=SHAPE, dtype=torch.float32)
    options = {"estimator": "topk", "reward_scale": 1.25, "backend": backend, "reduction": reduction}
    ids, _ = fg.token_topk(batch.teacher, 5)
    ids[~batch.mask] = 1000
    twice = torch.cat((ids.flip(-1), ids), -1).to(dtype)
    results = []
    for more in ({"k": 5}, {"support_ids": twice}):
        out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options, **more)
        results.append((out.token_loss, *torch.autograd.grad(out.loss.sum(), batch.leaves)))
    assert_all_close(*results, 1e-5)


def test_a_support_of_many_samples_costs_no_gemm_more(backend):
    batch = make_batch(86, shape=(N,), vocab=(V,) * 3, hidden=(H,) * 3, dtype=torch.float32, masked=False)
    ids = torch.randint(V, (N, 4), generator=generator(3))

    def call():
        options = {"estimator": "topk", "support_ids": ids, "reward_scale": 1.25, "chunk_size": 16}
        fg.gopd_loss(*batch.models, batch.token_ids, backend=backend, **options).loss.backward()

    call()
    assert gemm_flops(call) == 5 * GEMM


# ---------------------------------------------------------------------------------------------------------- token_topk


@pytest.mark.parametrize(("vocab", "k"), [(3, 3), (64, 1), (1000, 3), (5003, 7), (20_000, 40), (300, 300)])
@pytest.mark.parametrize("transform", [{}, {"bias": True}, {"softcap": 5.0, "temperature": 0.7, "logit_scale": 0.5}])
def test_token_topk_is_topk(backend_dtype, vocab, k, transform):
    head = linear_head(81, (2, 3), vocab, 6, backend_dtype.dtype, **transform)
    ids, logprobs = fg.token_topk(head, k, backend=backend_dtype.backend, chunk_size=4)
    log_p = oracle.logits_of(widened(head)).log_softmax(-1)
    want = log_p.topk(k)
    assert ids.shape == logprobs.shape == (2, 3, k)
    assert_close(logprobs, want.values, backend_dtype.tolerance)
    assert_close(log_p.gather(-1, ids), want.values, backend_dtype.tolerance)  # ids of ties may differ
    assert all(len(set(row)) == k for row in ids.reshape(-1, k).tolist())


def test_token_topk_of_masked_tokens_and_of_padding(backend):
    head = linear_head(82, (5,), 40, 6, torch.float32)
    mask = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        head.hidden[~mask] = torch.nan
    ids, logprobs = fg.token_topk(head, 4, mask=mask, vocab_size=33, backend=backend)
    assert (ids[~mask] == -1).all()
    assert (logprobs[~mask] == 0).all()
    assert ids[mask].max() < 33
    want = (head.hidden @ head.weight[:33].T)[mask].log_softmax(-1).topk(4).values
    assert_close(logprobs[mask], want, 1e-5)


def test_token_topk_of_nothing():
    head = linear_head(83, (6,), 40, 6, torch.float32)
    ids, logprobs = fg.token_topk(head, 3, mask=torch.zeros(6, dtype=torch.bool))
    assert (ids == -1).all()
    assert not logprobs.any()
    ids, logprobs = fg.token_topk(linear_head(83, (0, 2), 40, 6, torch.float32), 3)
    assert ids.shape == logprobs.shape == (0, 2, 3)


def test_token_topk_of_a_row_with_fewer_tokens(backend):
    logits = torch.full((1, 300), -math.inf)
    logits[0, [5, 200]] = torch.tensor([1.0, 2.0])
    ids, logprobs = fg.token_topk(fg.Logits(logits), 4, backend=backend)
    assert ids[0, :2].tolist() == [200, 5]
    assert logprobs[0, 2:].tolist() == [-math.inf] * 2
    # as a teacher's answer: the others are ruled out
    out = fg.gopd_loss(fg.Logits(torch.zeros(1, 300)), fg.TopKLogProbs(ids, logprobs), estimator="topk")
    assert torch.isfinite(out.loss)


# -------------------------------------------------------------------------------------------------------------- errors

STUDENT = make_batch(90, shape=SHAPE, dtype=torch.float32, masked=False).student
TEACHER, REF = make_batch(90, shape=SHAPE, dtype=torch.float32, masked=False).models[1:]
ANSWER = listed(TEACHER, 5)
REF_ANSWER = listed(REF, 5, 1, 3, ANSWER)


def answer(ids=None, logprobs=None) -> fg.TopKLogProbs:
    return fg.TopKLogProbs(ANSWER.token_ids if ids is None else ids, ANSWER.logprobs if logprobs is None else logprobs)


def ids_with(value: int, at: int = 0) -> torch.Tensor:
    ids = ANSWER.token_ids.clone()
    ids[1, 2, at] = value
    return ids


IDS = torch.zeros(SHAPE, dtype=torch.int64)
ERRORS = {
    "k missing": ({}, ValueError, "k must be given"),
    "k too large": ({"k": 38}, ValueError, "k must be at most the vocabulary of 37, got 38"),
    "k zero": ({"k": 0}, ValueError, "k must be at least 1"),
    "k a float": ({"k": 2.0}, TypeError, "k must be an int, got float"),
    "k a float beside an answer": ({"teacher": ANSWER, "k": 5.0}, TypeError, "k must be an int, got float"),
    "second answer": (
        {"teacher": [ANSWER, answer(ids_with(99))], "teacher_index": torch.ones(SHAPE, dtype=torch.int64)},
        IndexError,
        r"teacher\[1\].token_ids must be in",
    ),
    "k of an answer": ({"teacher": ANSWER, "k": 4}, ValueError, r"k is for heads.*K=\[5\], got k=4"),
    "support unknown": ({"k": 5, "support": "ref"}, ValueError, "support must be one of 'teacher', 'student'"),
    "tail unknown": ({"k": 5, "tail": "keep"}, ValueError, "tail must be one of 'bucket', 'drop', 'renormalize'"),
    "k in full": ({"k": 5, "estimator": "full"}, ValueError, "k is an option of estimator='topk', got.*'full'"),
    "tail in sampled": (
        {"tail": "drop", "estimator": "sampled", "token_ids": IDS},
        ValueError,
        "tail is an option of estimator='topk'",
    ),
    "support in full": ({"support": "student", "estimator": "full"}, ValueError, "support is an option of.*topk"),
    "student's support": (
        {"teacher": ANSWER, "k": 5, "support": "student"},
        TypeError,
        "teacher is TopKLogProbs, and support='student' needs",
    ),
    "scores of one token": (
        {"teacher": fg.TokenLogProbs(-torch.ones(SHAPE)), "k": 5},
        TypeError,
        "teacher is TokenLogProbs, which estimator='sampled'.*or TopKLogProbs",
    ),
    "answer in full": ({"teacher": ANSWER, "estimator": "full"}, TypeError, "teacher is TopKLogProbs.*'topk'"),
    "student an answer": ({"student": ANSWER, "k": 5}, TypeError, "student must be a LinearHead or Logits"),
    "answered reference": ({"ref": REF_ANSWER, "k": 5}, TypeError, "ref is TopKLogProbs, which goes with a teacher"),
    "shape": (
        {"teacher": fg.TopKLogProbs(ANSWER.token_ids[:1], ANSWER.logprobs[:1])},
        ValueError,
        r"teacher must have the token shape \(3, 5\).*\(1, 5\)",
    ),
    "id too large": ({"teacher": answer(ids_with(37))}, IndexError, r"teacher.token_ids must be in \[0, 37\).*got 37"),
    "id -2": ({"teacher": answer(ids_with(-2))}, IndexError, r"teacher.token_ids must be.*or -1 for none.*got -2"),
    "id twice": (
        {"teacher": answer(ids_with(int(ANSWER.token_ids[1, 2, 1])))},
        ValueError,
        "teacher.token_ids must be distinct at each position, twice there is",
    ),
    "logits": ({"teacher": answer(logprobs=ANSWER.logprobs + 9)}, ValueError, "teacher.logprobs must be log-prob"),
    "reference lacks": (
        {"teacher": ANSWER, "ref": listed(REF, 5)},
        ValueError,
        "ref.token_ids must contain those of the teacher.*missing is",
    ),
    "cancelled answer": (
        {"ref": REF_ANSWER, "teacher": ANSWER, "reward_scale": 1.0, "score_cancelled": True, "token_ids": IDS},
        TypeError,
        "ref is TopKLogProbs, and score_cancelled",
    ),
    "ids and k": ({"support_ids": ANSWER.token_ids, "k": 5}, ValueError, "support_ids give: got k=5 too"),
    "ids and a support": (
        {"support_ids": ANSWER.token_ids, "support": "student"},
        ValueError,
        "support_ids give: got support='student' too",
    ),
    "ids and an answer": (
        {"support_ids": ANSWER.token_ids, "teacher": ANSWER},
        TypeError,
        "teacher is TopKLogProbs, which bring ids of their own; support_ids need",
    ),
    "ids without K": ({"support_ids": IDS}, ValueError, r"support_ids must have shape \(..., K\).*got \(3, 5\)"),
    "no ids": ({"support_ids": ANSWER.token_ids[..., :0]}, ValueError, r"K >= 1.*got \(3, 5, 0\)"),
    "float ids": ({"support_ids": ANSWER.logprobs}, TypeError, "support_ids must be an integer tensor"),
    "large ids": ({"support_ids": ids_with(37)}, IndexError, r"support_ids must be in \[0, 37\), or -1.*got 37"),
    "negative ids": ({"support_ids": ids_with(-2)}, IndexError, "support_ids must be in.*got -2"),
    "ids in full": (
        {"support_ids": ANSWER.token_ids, "estimator": "full"},
        ValueError,
        "support_ids is an option of estimator='topk', got estimator='full'",
    ),
    "ratios": ({"k": 5, "old_logprobs": -torch.ones(SHAPE)}, ValueError, "old_logprobs is an option of.*'sampled'"),
}


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_what_is_wrong_is_named(case, function):
    changes, error, message = ERRORS[case]
    call = {"student": STUDENT, "teacher": TEACHER, "ref": REF, "token_ids": None, "estimator": "topk"}
    with pytest.raises(error, match=message):
        function(**({"reward_scale": 1.25} | call | changes))


def test_masked_answers_have_no_effect(backend):
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 2] = False
    wild = ANSWER.token_ids.clone()
    wild[1, 2] = torch.tensor([99, 99, -7, 0, 0])
    scores = ANSWER.logprobs.clone()
    scores[1, 2] = torch.tensor([math.nan, math.inf, 50.0, 0.0, 0.0])
    options = {"mask": mask, "estimator": "topk", "reward_scale": 1.25, "backend": backend}
    got = fg.gopd_loss(STUDENT, fg.TopKLogProbs(wild, scores), REF_ANSWER, **options)
    want = fg.gopd_loss(STUDENT, ANSWER, REF_ANSWER, **options)
    assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((STUDENT, 0), ValueError, "k must be at least 1"),
    ((STUDENT, 38), ValueError, "k must be at most the vocabulary of 37"),
    ((STUDENT, 1.5), TypeError, "k must be an int"),
    ((ANSWER, 3), TypeError, "head must be a LinearHead or Logits"),
])  # fmt: skip
def test_token_topk_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        fg.token_topk(*arguments)


def test_every_pair_of_ids_is_matched():
    """Whatever the order in which teacher and reference list them."""
    ids = torch.tensor([[4, 1, 3, -1]])
    for order in itertools.permutations(range(4)):
        other = torch.tensor([[1, 9, 3, 4]])[:, list(order)]
        found = _matched(ids, _Answer("ref", other, -other.double(), None))
        assert found.tolist() == [[-4.0, -1.0, -3.0, -math.inf]]


def test_a_mask_below_the_bound_leaves_the_kl_its_digits(backend_dtype) -> None:
    """With lambda > 1 a mask of the reference, -1e9, makes the normaliser without the bound 1e8."""
    torch.manual_seed(0)
    z, q, r = torch.randn(3, 2, 4, 12, dtype=torch.float64).to(backend_dtype.dtype)
    r[..., 5] = -1e9 if backend_dtype.dtype != torch.float16 else -6e4
    ids = torch.tensor([5, 1, 7, 2]).expand(2, 4, 4)
    options = {"estimator": "topk", "tail": "drop", "support_ids": ids, "logprob_min": -4.0, "reward_scale": 1.25}
    out = fg.gopd_loss(fg.Logits(z), fg.Logits(q), fg.Logits(r), backend=backend_dtype.backend, **options)
    log_p, log_q, log_r = (x.double().log_softmax(-1).gather(-1, ids) for x in (z, q, r))
    rests = [(1 - x.exp().sum(-1, keepdim=True)).log() for x in (log_p, log_q, log_r)]
    log_p, log_q, log_r = (
        torch.cat((x, rest), -1)
        for x, rest in zip((log_p, log_q.clamp_min(-4), log_r.clamp_min(-4)), rests, strict=True)
    )
    log_t = (1.25 * log_q - 0.25 * log_r).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_t)).sum(-1)
    assert_close(out.kl, expected, backend_dtype.tolerance)
