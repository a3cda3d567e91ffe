"""gopd_loss, token_logprobs and GOPDLoss against the float64 oracle, and what the mathematics promises of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
import oracle
from builders import (
    LAMBDAS,
    OBJECTIVES,
    REDUCTIONS,
    TOLERANCE,
    assert_all_close,
    assert_close,
    assert_same_as_oracle,
    expect,
    generator,
    like,
    make_batch,
    minus_inf_batch,
    run,
    trainable,
    widened,
)
from combinations import pairwise, product_on_float64

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVE_IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
TRANSFORMS = (
    {"softcap": 5.0, "temperature": 0.8, "bias": True},
    {"logit_scale": 0.5, "bias": True},
    {"softcap": 7.0, "logit_scale": 1.5, "temperature": 1.3},
)


@product_on_float64(objective=OBJECTIVES, lam=LAMBDAS)
def test_every_objective_is_its_formula(backend_dtype, objective, lam):
    assert_same_as_oracle(make_batch(1, dtype=backend_dtype.dtype), backend_dtype, reward_scale=lam, **objective)


@product_on_float64(objective=OBJECTIVES[:2], reduction=REDUCTIONS)
def test_every_reduction_is_its_formula(backend_dtype, objective, reduction):
    batch = make_batch(2, shape=(4, 5), dtype=backend_dtype.dtype)
    batch.mask[2] = False  # a sequence without a live token counts in no sequence mean
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, reduction=reduction, **objective)


@product_on_float64(
    objective=OBJECTIVES, kinds=[("logits", "linear", "logits"), ("linear", "logits", "linear"), ("logits",) * 3]
)
def test_kinds_of_models_mix(backend_dtype, objective, kinds):
    assert_same_as_oracle(
        make_batch(3, kinds=kinds, dtype=backend_dtype.dtype), backend_dtype, reward_scale=1.25, **objective
    )


@pytest.mark.parametrize("student", ["linear", "logits"])
@pytest.mark.parametrize("others", [("logprobs", "logprobs"), ("logprobs", "linear"), ("logits", "logprobs")])
def test_logprobs_computed_elsewhere_replace_a_model(backend_dtype, student, others):
    batch = make_batch(4, kinds=(student, *others), dtype=backend_dtype.dtype)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25)


@product_on_float64(objective=OBJECTIVES, kinds=[("linear",) * 3, ("logits", "linear", "logits")])
def test_softcap_scale_bias_and_temperature_are_applied(backend_dtype, objective, kinds):
    transforms = [
        {k: v for k, v in t.items() if k != "bias" or kind == "linear"}
        for t, kind in zip(TRANSFORMS, kinds, strict=True)
    ]
    batch = make_batch(5, kinds=kinds, transforms=transforms, dtype=backend_dtype.dtype, scale=4.0)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, **objective)


@product_on_float64(objective=OBJECTIVES[:3], vocab=[(37, 50, 41), (50, 37, 37), (38, 41, 37), (37, 37, 64)])
def test_rows_past_the_smallest_vocabulary_are_padding(backend_dtype, objective, vocab):
    batch = make_batch(6, vocab=vocab, dtype=backend_dtype.dtype, transforms=[{"bias": True}] * 3)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, **objective)
    _, (_, weight, bias) = run(batch, backend=backend_dtype.backend, reward_scale=1.25, **objective)
    assert (weight[37:] == 0).all()
    assert (bias[37:] == 0).all()


@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_vocab_size_cuts_all_models(backend_dtype, kind):
    batch = make_batch(7, kinds=(kind,) * 3, dtype=backend_dtype.dtype)
    batch.token_ids.clamp_(max=28)
    for objective in OBJECTIVES[:2]:
        assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, vocab_size=29, **objective)


@pytest.mark.parametrize(("cancelled", "lam"), [("ref", 1.0), ("teacher", 0.0)])
@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=OBJECTIVE_IDS[:2])
def test_a_cancelled_model_still_narrows_the_vocabulary(backend_dtype, objective, cancelled, lam):
    vocab = {"ref": (37, 37, 30), "teacher": (37, 30, 37)}[cancelled]
    batch = make_batch(8, vocab=vocab, dtype=backend_dtype.dtype)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=lam, **objective)


@product_on_float64(objective=OBJECTIVES, per=["token", "sequence"])
def test_reward_scale_may_differ_per_token_and_per_sequence(backend_dtype, objective, per):
    batch = make_batch(9, shape=(3, 5), dtype=backend_dtype.dtype)
    lam = torch.linspace(0, 2, 15, dtype=backend_dtype.dtype).reshape(3, 5)
    lam[1, 2], lam[2, 4] = 1.0, 0.0
    batch.mask[1, 2] = batch.mask[2, 4] = True
    assert_same_as_oracle(batch, backend_dtype, reward_scale=lam if per == "token" else lam[:, 2], **objective)


def test_a_0d_reward_scale_is_the_float(backend):
    batch = make_batch(10, dtype=torch.float32)
    a, grads_a = run(batch, backend=backend, reward_scale=1.25)
    b, grads_b = run(batch, backend=backend, reward_scale=torch.tensor(1.25))
    assert_close(b.token_loss, a.token_loss, 1e-6)
    assert_all_close(grads_b, grads_a, 1e-6)


@pytest.mark.parametrize("clip", [None, (0.2, 0.28), (0.0, 0.0), (1.0, 3.0)])
@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_old_logprobs_and_clip_are_their_formula(backend_dtype, kind, clip):
    batch = make_batch(11, shape=(4, 6), kinds=(kind, "linear", "linear"), dtype=backend_dtype.dtype)
    own = oracle.gopd(*[widened(m) for m in batch.models], batch.token_ids).student_logprobs
    old = (own + 0.5 * torch.randn(4, 6, generator=generator(0), dtype=torch.float64)).to(backend_dtype.dtype)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, old_logprobs=old, clip=clip)


@product_on_float64(
    objective=OBJECTIVES, lam=[0.0, 0.5, 1.0, 1.25], transform=[{}, {"softcap": 4.0, "temperature": 0.7}]
)
def test_a_token_of_probability_0_in_a_needed_model_is_outside_the_support(backend_dtype, objective, lam, transform):
    batch = minus_inf_batch(dtype=backend_dtype.dtype, transform=transform)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=lam, **objective)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_the_support_follows_a_per_token_reward_scale(backend_dtype, objective):
    batch = minus_inf_batch(dtype=backend_dtype.dtype)
    lam = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0], dtype=backend_dtype.dtype)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=lam, **objective)


@pytest.mark.parametrize("dead", ["student", "teacher", "ref"])
@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_a_sampled_token_of_probability_0_counts_and_has_no_gradient(backend_dtype, dead, kind):
    batch = make_batch(
        12,
        shape=(5,),
        kinds=(kind, "logits", "logits"),
        dtype=backend_dtype.dtype,
        masked=False,
        transforms=[{"bias": True} if kind == "linear" else {}, {}, {}],
    )
    token = int(batch.token_ids[2])
    with torch.no_grad():
        if dead != "student":
            getattr(batch, dead).logits[2, token] = -math.inf
        elif kind == "logits":
            batch.student.logits[2, token] = -math.inf
        else:
            batch.student.bias[token] = -math.inf  # dead for every token that sampled it
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25)
    out, grads = run(batch, backend=backend_dtype.backend, reward_scale=1.25)
    assert out.token_loss[2] == 0
    assert out.advantages[2] == 0
    assert (grads[0][2] == 0).all()
    live = (batch.token_ids != token) if dead == "student" and kind == "linear" else torch.arange(5) != 2
    assert_close(out.loss, out.token_loss[live].sum() / 5, 1e-6, "the mean over all five")


@product_on_float64(objective=OBJECTIVES, lam=LAMBDAS)
def test_equal_models_give_exactly_zero_loss_and_gradient(backend_dtype, objective, lam):
    head = make_batch(13, dtype=backend_dtype.dtype, transforms=[{"bias": True, "softcap": 9.0}, {}, {}])
    batch = head.replaced(teacher=head.student, ref=head.student)
    out, grads = run(batch, backend=backend_dtype.backend, reward_scale=lam, **objective)
    if objective.get("divergence") == "jsd":
        # log m is a logaddexp of two equal numbers, rounded once: a few units in the last place of log p < 20
        assert out.loss.abs() <= 64 * torch.finfo(backend_dtype.dtype).eps
        assert all(g.abs().max() <= 256 * torch.finfo(backend_dtype.dtype).eps for g in grads)
    else:
        assert out.loss == 0
        assert all((g == 0).all() for g in grads)


@product_on_float64(objective=OBJECTIVES, which=["student", "teacher", "ref"])
def test_adding_a_constant_to_a_models_logits_changes_nothing(backend_dtype, objective, which):
    batch = make_batch(14, kinds=("logits",) * 3, dtype=backend_dtype.dtype)
    head = getattr(batch, which)
    shifted = trainable(like(head, logits=head.logits.detach() + 3.0))
    a, grads_a = run(batch, backend=backend_dtype.backend, reward_scale=1.25, **objective)
    b, grads_b = run(batch.replaced(**{which: shifted}), backend=backend_dtype.backend, reward_scale=1.25, **objective)
    assert_close(b.token_loss, a.token_loss, backend_dtype.tolerance)
    assert_all_close(grads_b, grads_a, backend_dtype.tolerance)


@pytest.mark.parametrize("lam", [0.5, 1.0, 1.25])
def test_the_expected_sampled_gradient_is_the_full_gradient(backend, lam):
    """sum_v p_v * gradient of the sampled loss at y = v, by enumeration of the vocabulary."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    V = 13
    batch = make_batch(15, shape=(1,), vocab=(V,) * 3, kinds=("logits",) * 3, dtype=dtype, masked=False)
    options = {"reward_scale": lam, "reduction": "sum", "backend": backend}
    out, (full,) = run(batch, estimator="full", **options)
    every = [like(m, logits=m.logits.detach().expand(V, V)) for m in batch.models]
    every[0] = trainable(every[0])
    sampled_out, (rows,) = run(
        batch.replaced(student=every[0], teacher=every[1], ref=every[2], token_ids=torch.arange(V)), **options
    )
    p = batch.student.logits.detach().softmax(-1)[0]
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert_close(p @ rows, full[0], tolerance, "gradient")
    assert_close(p @ sampled_out.token_loss, out.token_loss[0], tolerance, "value")


@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_a_step_raises_the_probability_of_a_token_with_positive_advantage(backend, kind):
    batch = make_batch(16, shape=(1,), kinds=(kind, "linear", "linear"), dtype=torch.float32, masked=False)
    signs = set()
    for token in range(37):
        trial = batch.replaced(token_ids=torch.tensor([token]))
        out, grads = run(trial, reward_scale=1.25, backend=backend)
        stepped = like(
            batch.student,
            **{k: x.detach() - 1e-3 * g for (k, x), g in zip(batch.student.tensors.items(), grads, strict=True)},
        )
        before = out.student_logprobs
        after = fg.token_logprobs(stepped, trial.token_ids, backend=backend)
        if out.advantages.abs() > 0.1:  # further than rounding and the step's curvature
            assert (after > before) == (out.advantages > 0), token
            signs.add(bool(out.advantages > 0))
    assert signs == {True, False}


@pytest.mark.parametrize("lam", [0.5, 1.0, 1.25])
def test_descending_the_full_loss_reaches_the_geometric_mixture(lam):
    batch = make_batch(17, shape=(1,), vocab=(7,) * 3, kinds=("logits",) * 3, scale=1.0, masked=False)
    target = (lam * batch.teacher.logits + (1 - lam) * batch.ref.logits).detach().softmax(-1)
    z = torch.zeros(1, 7, dtype=torch.float64)
    for _ in range(400):
        _, (g,) = run(
            batch.replaced(student=trainable(fg.Logits(z))), estimator="full", reward_scale=lam, backend="torch"
        )
        z = z - 2.0 * g
    assert_close(z.softmax(-1), target, 1e-6)


def test_full_loss_and_kl_differ_by_the_log_normaliser_of_the_target(backend_dtype):
    batch = make_batch(18, dtype=backend_dtype.dtype, kinds=("logits",) * 3)
    out, _ = run(batch, estimator="full", reward_scale=1.25, backend=backend_dtype.backend)
    log_q, log_r = (m.logits.double().log_softmax(-1) for m in (batch.teacher, batch.ref))
    log_z = torch.logsumexp(1.25 * log_q - 0.25 * log_r, -1)
    live = batch.mask
    assert_close((out.kl - out.token_loss)[live], log_z[live], backend_dtype.tolerance)


@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(1,), (4,), (3, 2), (2, 1, 3)]),
    vocab=st.tuples(*[st.integers(2, 40)] * 3),
    hidden=st.tuples(*[st.integers(1, 9)] * 3),
    kinds=st.tuples(*[st.sampled_from(["linear", "logits"])] * 3),
    objective=st.sampled_from(OBJECTIVES),
    lam=st.sampled_from([*LAMBDAS, 0.3, -0.5]),
    reduction=st.sampled_from(REDUCTIONS),
    chunk=st.sampled_from([None, 1, 2, 5]),
    scale=st.sampled_from([0.1, 2.0, 10.0]),
    transform=st.sampled_from([{}, {"temperature": 0.5}, {"softcap": 3.0}, {"logit_scale": 0.2}]),
)
def test_fused_is_the_oracle_for_any_shape_and_option(
    seed, shape, vocab, hidden, kinds, objective, lam, reduction, chunk, scale, transform
):
    if len(shape) == 1 and reduction.startswith("seq-"):
        reduction = "sum"
    if "k" in objective:
        objective = {**objective, "k": min(objective["k"], *vocab)}
    batch = make_batch(
        seed, shape=shape, vocab=vocab, hidden=hidden, kinds=kinds, scale=scale, transforms=[transform] * 3
    )
    options = dict(reward_scale=lam, reduction=reduction, **objective)
    out, grads = run(batch, backend="torch", chunk_size=chunk, **options)
    want, want_grads = expect(batch, **options)
    # sharp models (scale 10) sum terms of size 100 that cancel: two more digits than in the other tests
    size = max(1.0, float(want.token_loss.abs().max()))
    assert (out.token_loss - want.token_loss).abs().max() <= 1e-11 * size
    for got, wanted in zip(grads, want_grads, strict=True):
        assert (got - wanted).abs().max() <= 1e-11 * max(1.0, float(wanted.abs().max()))
    assert (out.student_logprobs <= 0).all()
    assert (out.entropy >= 0).all()
    if out.kl is not None:
        assert (out.kl >= 0).all()


@given(
    seed=st.integers(0, 10_000),
    objective=st.sampled_from(OBJECTIVES),
    chunk=st.integers(1, 50),
    kind=st.sampled_from(["linear", "logits"]),
)
def test_chunk_size_changes_nothing_but_rounding(seed, objective, chunk, kind):
    batch = make_batch(seed, shape=(19,), kinds=(kind, "linear", "logits"))
    a, grads_a = run(batch, backend="torch", reward_scale=1.25, **objective)
    b, grads_b = run(batch, backend="torch", reward_scale=1.25, chunk_size=chunk, **objective)
    assert_close(b.token_loss, a.token_loss, 1e-13)
    assert_all_close(grads_b, grads_a, 1e-13)


@pairwise(backend=["torch", "native"], objective=OBJECTIVES, kind=["linear", "logits"])
def test_chunks_of_three_tokens_are_one_chunk_on_every_backend(backend, objective, kind):
    batch = make_batch(34, shape=(11,), kinds=(kind, "linear", "logits"), dtype=torch.float32, masked=False)
    a, grads_a = run(batch, backend=backend, reward_scale=1.25, **objective)
    b, grads_b = run(batch, backend=backend, reward_scale=1.25, chunk_size=3, **objective)
    assert_close(b.token_loss, a.token_loss, TOLERANCE[torch.float32])
    assert_all_close(grads_b, grads_a, TOLERANCE[torch.float32])


@given(seed=st.integers(0, 10_000), objective=st.sampled_from(OBJECTIVES), kind=st.sampled_from(["linear", "logits"]))
def test_masking_tokens_is_removing_them(seed, objective, kind):
    batch = make_batch(seed, shape=(4, 5), kinds=(kind, "linear", "logits"))
    keep = batch.mask

    def cut(head):
        name = "hidden" if isinstance(head, fg.LinearHead) else "logits"
        return trainable(like(head, **{name: head.tensors[name].detach()[keep]}))

    packed = batch.replaced(
        student=cut(batch.student),
        teacher=cut(batch.teacher),
        ref=cut(batch.ref),
        token_ids=batch.token_ids[keep],
        mask=None,
    )
    a, grads_a = run(batch, backend="torch", reward_scale=1.25, **objective)
    b, grads_b = run(packed, backend="torch", reward_scale=1.25, **objective)
    assert torch.equal(a.token_loss[keep], b.token_loss)
    assert (a.token_loss[~keep] == 0).all()
    assert torch.equal(grads_a[0][keep], grads_b[0])
    assert (grads_a[0][~keep] == 0).all()
    assert_all_close(grads_a[1:], grads_b[1:], 1e-13)


@given(seed=st.integers(0, 10_000), objective=st.sampled_from(OBJECTIVES))
def test_the_order_of_tokens_does_not_matter(seed, objective):
    batch = make_batch(seed, shape=(9,), masked=False)
    order = torch.randperm(9, generator=generator(seed))

    def permuted(head):
        return trainable(like(head, hidden=head.hidden.detach()[order]))

    other = batch.replaced(
        student=permuted(batch.student),
        teacher=permuted(batch.teacher),
        ref=permuted(batch.ref),
        token_ids=batch.token_ids[order],
    )
    a, grads_a = run(batch, backend="torch", reward_scale=1.25, **objective)
    b, grads_b = run(other, backend="torch", reward_scale=1.25, **objective)
    assert_close(b.token_loss, a.token_loss[order], 1e-13)
    assert_close(grads_b[0], grads_a[0][order], 1e-13)
    assert_close(grads_b[1], grads_a[1], 1e-13)


# --------------------------------------------------------------------------------------------- means over micro-batches


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("as_tensor", [float, lambda n: torch.tensor(n), lambda n: torch.tensor([float(n)])])
def test_micro_batches_with_a_global_normalizer_are_one_big_batch(backend_dtype, reduction, as_tensor):
    batch = make_batch(20, shape=(4, 6), dtype=backend_dtype.dtype)
    batch.mask[3] = False
    count = int(batch.mask.sum()) if reduction == "token-mean" else int(batch.mask.any(1).sum())
    want, want_grads = run(batch, reduction=reduction, reward_scale=1.25, backend=backend_dtype.backend)
    total, grads = 0.0, [torch.zeros_like(g) for g in want_grads]
    for rows in (slice(0, 1), slice(1, 4)):  # unequal parts: a mean of means is another number
        part = batch.replaced(
            student=trainable(like(batch.student, hidden=batch.student.hidden.detach()[rows])),
            teacher=like(batch.teacher, hidden=batch.teacher.hidden[rows]),
            ref=like(batch.ref, hidden=batch.ref.hidden[rows]),
            token_ids=batch.token_ids[rows],
            mask=batch.mask[rows],
        )
        out, (g_hidden, g_weight) = run(
            part, reduction=reduction, reward_scale=1.25, backend=backend_dtype.backend, normalizer=as_tensor(count)
        )
        total = total + out.loss
        grads[0][rows] += g_hidden
        grads[1] += g_weight
    assert_close(total, want.loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


def test_sequence_lengths_make_split_sequences_one(backend_dtype):
    """Each sequence cut into two halves on two ranks: seq-mean-token-mean with global lengths and counts is exact."""
    batch = make_batch(21, shape=(3, 8), dtype=backend_dtype.dtype)
    lengths = batch.mask.sum(1)
    want, _ = run(batch, reduction="seq-mean-token-mean", reward_scale=1.25, backend=backend_dtype.backend)
    total = 0.0
    for columns in (slice(0, 3), slice(3, 8)):
        part = batch.replaced(
            student=trainable(like(batch.student, hidden=batch.student.hidden.detach()[:, columns])),
            teacher=like(batch.teacher, hidden=batch.teacher.hidden[:, columns]),
            ref=like(batch.ref, hidden=batch.ref.hidden[:, columns]),
            token_ids=batch.token_ids[:, columns],
            mask=batch.mask[:, columns],
        )
        out, _ = run(
            part,
            reduction="seq-mean-token-mean",
            reward_scale=1.25,
            backend=backend_dtype.backend,
            normalizer=3,
            sequence_lengths=lengths,
        )
        total = total + out.loss
    assert_close(total, want.loss, backend_dtype.tolerance)


def test_a_0d_sequence_length_is_that_of_every_sequence(backend_dtype):
    batch = make_batch(21, shape=(3, 4), dtype=backend_dtype.dtype)
    options = {"reduction": "seq-mean-token-mean", "backend": backend_dtype.backend}
    a, grads_a = run(batch, sequence_lengths=torch.tensor(9), **options)
    b, grads_b = run(batch, sequence_lengths=torch.full((3,), 9), **options)
    assert torch.equal(a.loss, b.loss)
    assert all(map(torch.equal, grads_a, grads_b))


def test_reduction_none_times_the_mean_weights_is_the_mean(backend_dtype):
    batch = make_batch(22, dtype=backend_dtype.dtype)
    want, want_grads = run(batch, reward_scale=1.25, estimator="full", backend=backend_dtype.backend)
    out = fg.gopd_loss(
        *batch.models,
        batch.token_ids,
        mask=batch.mask,
        reward_scale=1.25,
        estimator="full",
        reduction="none",
        backend=backend_dtype.backend,
    )
    assert out.loss.shape == batch.mask.shape
    assert (out.loss[~batch.mask] == 0).all()
    loss = out.loss.sum() / batch.mask.sum()
    grads = torch.autograd.grad(loss, batch.leaves)
    assert_close(loss, want.loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


@product_on_float64(objective=OBJECTIVES, kind=["linear", "logits"])
def test_reduction_none_takes_any_upstream_gradient(backend_dtype, objective, kind):
    batch = make_batch(23, kinds=(kind, "linear", "linear"), dtype=backend_dtype.dtype)
    up = torch.randn(2, 5, generator=generator(1), dtype=torch.float64) * torch.tensor([1e-6, 1, 0, 1e4, -1])
    out = fg.gopd_loss(
        *batch.models,
        batch.token_ids,
        mask=batch.mask,
        reward_scale=1.25,
        reduction="none",
        backend=backend_dtype.backend,
        **objective,
    )
    grads = torch.autograd.grad((out.loss * up.to(backend_dtype.dtype)).sum(), batch.leaves)
    wide = [widened(m) for m in batch.models]
    want = oracle.gopd(*wide, batch.token_ids, mask=batch.mask, reward_scale=1.25, reduction="none", **objective)
    want_grads = torch.autograd.grad((want.loss * up).sum(), list(wide[0].tensors.values()))
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


# ------------------------------------------------------------------------------------------------- shapes and layouts


@product_on_float64(
    objective=OBJECTIVES[:2], shape=[(), (1,), (1, 1), (7,), (2, 3, 2), (1, 2, 1, 3)], masked=[False, True]
)
def test_any_token_shape(backend_dtype, objective, shape, masked):
    batch = make_batch(24, shape=shape, dtype=backend_dtype.dtype, masked=masked)
    if masked:
        batch.mask.view(-1)[0] = True
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, **objective)


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_sequences_are_dim_0_of_any_token_shape(backend_dtype, reduction):
    batch = make_batch(25, shape=(3, 2, 4), dtype=backend_dtype.dtype)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=1.25, reduction=reduction)


@pairwise(
    backend=["torch", "native"],
    objective=OBJECTIVES[:2],
    nothing=["no tokens", "all masked"],
    reduction=[*REDUCTIONS, "none"],
    kind=["linear", "logits"],
)
def test_nothing_live_is_zero_loss_and_zero_gradient(backend, objective, nothing, reduction, kind):
    shape = (0, 3) if nothing == "no tokens" else (2, 3)
    batch = make_batch(26, shape=shape, kinds=(kind, "linear", "linear"), dtype=torch.float32, masked=False)
    if nothing == "all masked":
        batch.mask = torch.zeros(shape, dtype=torch.bool)
    out = fg.gopd_loss(
        *batch.models,
        batch.token_ids,
        mask=batch.mask,
        reward_scale=1.25,
        reduction=reduction,
        backend=backend,
        **objective,
    )
    grads = torch.autograd.grad(out.loss.sum(), batch.leaves)
    assert out.token_loss.shape == shape
    assert out.loss.sum() == 0
    assert all((g == 0).all() and g.shape == x.shape for g, x in zip(grads, batch.leaves, strict=True))


def test_nothing_live_with_a_normalizer_of_zero_is_zero(backend):
    batch = make_batch(27, dtype=torch.float32)
    batch.mask[:] = False
    out, grads = run(batch, normalizer=torch.tensor(0), backend=backend)
    assert out.loss == 0
    assert all((g == 0).all() for g in grads)


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    longer = torch.zeros(x.shape[0], x.shape[1] + 2, *x.shape[2:], dtype=x.dtype)
    longer[:, 1:-1] = x
    return {
        "transposed tokens": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced tokens": longer[:, 1:-1],
        "strided last dim": wide[..., ::2],
        "column major": x.transpose(-1, 0).contiguous().transpose(-1, 0),
    }


@pairwise(
    backend=["torch", "native"],
    objective=OBJECTIVES[:2],
    kind=["linear", "logits"],
    layout=["transposed tokens", "sliced tokens", "strided last dim", "column major"],
    masked=[False, True],
)
def test_strides_do_not_matter(backend, objective, kind, layout, masked):
    batch = make_batch(28, shape=(3, 4), kinds=(kind,) * 3, dtype=torch.float32, masked=masked)
    name = "hidden" if kind == "linear" else "logits"

    def strided(head):
        return like(head, **{name: _layouts(head.tensors[name].detach())[layout]})

    other = batch.replaced(student=strided(batch.student), teacher=strided(batch.teacher), ref=strided(batch.ref))
    for tensor in other.student.tensors.values():
        tensor.requires_grad_()
    a, grads_a = run(batch, reward_scale=1.25, backend=backend, **objective)
    b, grads_b = run(other, reward_scale=1.25, backend=backend, **objective)
    assert_close(b.token_loss, a.token_loss, 1e-6)
    assert_all_close(grads_b, grads_a, 1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=OBJECTIVE_IDS[:2])
def test_weight_bias_ids_mask_scale_and_scores_of_any_stride(backend, objective):
    batch = make_batch(29, shape=(3, 4), dtype=torch.float32, transforms=[{"bias": True}] * 3)
    lam = torch.linspace(0, 2, 12).reshape(3, 4)
    old = -torch.rand(3, 4, generator=generator(2))
    extra = {"old_logprobs": old} if objective["estimator"] == "sampled" else {}

    def strided(x):
        wide = torch.stack([x, torch.full_like(x, -1 if x.dtype == torch.int64 else 1)], -1)
        return wide[..., 0]

    def strided_head(head):
        return like(head, weight=head.weight.detach().T.contiguous().T, bias=strided(head.bias.detach()))

    other = batch.replaced(
        student=strided_head(batch.student),
        teacher=strided_head(batch.teacher),
        ref=strided_head(batch.ref),
        token_ids=strided(batch.token_ids),
        mask=strided(batch.mask),
    )
    for tensor in other.student.tensors.values():
        tensor.requires_grad_()
    a, grads_a = run(batch, reward_scale=lam, backend=backend, **objective, **extra)
    strided_extra = {k: strided(v) for k, v in extra.items()}
    b, grads_b = run(other, reward_scale=strided(lam), backend=backend, **objective, **strided_extra)
    assert_close(b.token_loss, a.token_loss, 1e-6)
    assert_all_close(grads_b, grads_a, 1e-6)


@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_expanded_inputs_collect_their_gradient(backend, kind):
    """One row of stride 0 for four tokens: its gradient is the sum of theirs."""
    batch = make_batch(30, shape=(1,), kinds=(kind,) * 3, dtype=torch.float32, masked=False)
    name = "hidden" if kind == "linear" else "logits"

    def grown(head, how):
        return like(head, **{name: how(head.tensors[name])})

    ids = torch.tensor([3, 9, 9, 20])
    results = []
    for how in (lambda x: x.expand(4, -1), lambda x: x.repeat(4, 1)):
        heads = [grown(m, how) for m in batch.models]
        out = fg.gopd_loss(*heads, ids, reward_scale=1.25, backend=backend)
        results.append((out.token_loss, *torch.autograd.grad(out.loss, batch.leaves)))
    assert_all_close(results[0], results[1], 1e-6)


@pairwise(
    backend=["torch", "native"],
    dtype=[torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32],
    masked=[False, True],
)
def test_token_ids_of_any_integer_dtype(backend, dtype, masked):
    batch = make_batch(31, dtype=torch.float32, masked=masked)
    a, grads_a = run(batch, backend=backend)
    b, grads_b = run(batch.replaced(token_ids=batch.token_ids.to(dtype)), backend=backend)
    assert torch.equal(a.token_loss, b.token_loss)
    assert all(map(torch.equal, grads_a, grads_b))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_a_0_1_integer_mask_is_the_bool_mask(backend, dtype):
    batch = make_batch(32, dtype=torch.float32)
    a, grads_a = run(batch, backend=backend)
    b, grads_b = run(batch.replaced(mask=batch.mask.to(dtype)), backend=backend)
    assert torch.equal(a.loss, b.loss)
    assert all(map(torch.equal, grads_a, grads_b))


MIXED = [
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.float32, torch.float64),
    (torch.float32, torch.float64, torch.float32),
    (torch.float64, torch.float32, torch.bfloat16),
]


@pairwise(dtypes=MIXED, kinds=[("linear",) * 3, ("logits",) * 3], objective=OBJECTIVES[:2])
def test_models_of_different_dtypes_mix(dtypes, kinds, objective):
    batch = make_batch(33, kinds=kinds)
    cast = [
        like(m, **{k: x.detach().to(d) for k, x in m.tensors.items()})
        for m, d in zip(batch.models, dtypes, strict=True)
    ]
    batch = batch.replaced(student=trainable(cast[0]), teacher=cast[1], ref=cast[2])
    out, grads = run(batch, reward_scale=1.25, backend="torch", **objective)
    want, want_grads = expect(batch, reward_scale=1.25, **objective)
    assert out.loss.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert_close(out.token_loss, want.token_loss, 2e-5)
    # gradients are rounded once to the student's dtype
    assert_all_close(grads, want_grads, max(2e-5, torch.finfo(dtypes[0]).eps))
    assert all(g.dtype == dtypes[0] for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=OBJECTIVE_IDS[:2])
def test_a_bias_of_another_dtype(dtype, objective):
    batch = make_batch(34, dtype=torch.float32, transforms=[{"bias": True}] * 3)
    heads = [like(m, bias=m.bias.detach().to(dtype)) for m in batch.models]
    batch = batch.replaced(student=trainable(heads[0]), teacher=heads[1], ref=heads[2])
    out, grads = run(batch, reward_scale=1.25, backend="torch", **objective)
    want, want_grads = expect(batch, reward_scale=1.25, **objective)
    assert_close(out.token_loss, want.token_loss, 2e-5)
    assert_all_close(grads, want_grads, max(2e-5, torch.finfo(dtype).eps))
    assert grads[2].dtype == dtype


@pytest.mark.parametrize("kind", ["linear", "logits"])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_scores_of_another_dtype_than_the_student(kind, name):
    if name == "auto":
        pytest.importorskip("fused_gopd.rowops.native")
    batch = make_batch(
        35,
        kinds=(kind, "logprobs", "logprobs"),
        dtype=torch.float32,
        transforms=[{"bias": True} if kind == "linear" else {}, {}, {}],
    )
    wide = batch.replaced(
        teacher=fg.TokenLogProbs(batch.teacher.logprobs.double()), ref=fg.TokenLogProbs(batch.ref.logprobs.double())
    )
    out, grads = run(wide, reward_scale=1.25, backend=name)
    want, want_grads = expect(batch, reward_scale=1.25)
    assert_close(out.token_loss, want.token_loss, 2e-5)
    assert_all_close(grads, want_grads, 2e-5)


# -------------------------------------------------------------------------------------------------- what is reported


def fields_of(out: fg.GOPDOutput) -> dict[str, object]:
    return {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}


def test_only_the_loss_is_differentiable(backend):
    for reduction in ("token-mean", "none"):
        batch = make_batch(36, dtype=torch.float32)
        out = fg.gopd_loss(
            *batch.models,
            batch.token_ids,
            mask=batch.mask,
            reward_scale=1.25,
            estimator="full",
            reduction=reduction,
            backend=backend,
        )
        assert out.loss.requires_grad
        rest = {k: v for k, v in fields_of(out).items() if k != "loss" and isinstance(v, torch.Tensor)}
        assert not any(v.requires_grad for v in rest.values())
        assert all(v.shape == batch.mask.shape and (v[~batch.mask] == 0).all() for v in rest.values())


def test_teacher_and_reference_never_receive_gradients(backend):
    batch = make_batch(37, dtype=torch.float32)
    batch = batch.replaced(teacher=trainable(batch.teacher), ref=trainable(batch.ref))
    for reduction in ("token-mean", "none"):
        out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, reduction=reduction, backend=backend)
        out.loss.sum().backward()
    assert all(x.grad is None for m in (batch.teacher, batch.ref) for x in m.tensors.values())


def test_a_teacher_that_shares_the_students_weight_stays_a_teacher(backend):
    """Self-distillation with a tied head: the gradient is the one for a frozen copy."""
    batch = make_batch(38, hidden=(12, 12, 12), dtype=torch.float32)
    tied = batch.replaced(teacher=like(batch.teacher, weight=batch.student.weight))
    copied = batch.replaced(teacher=like(batch.teacher, weight=batch.student.weight.detach().clone()))
    a, grads_a = run(tied, estimator="full", backend=backend)
    b, grads_b = run(copied, estimator="full", backend=backend)
    assert torch.equal(a.loss, b.loss)
    assert all(map(torch.equal, grads_a, grads_b))


@pytest.mark.parametrize("kind", ["linear", "logits", "logprobs"])
@pytest.mark.parametrize(("cancelled", "lam"), [("ref", 1.0), ("teacher", 0.0)])
def test_score_cancelled_scores_forward_only(backend_dtype, cancelled, lam, kind):
    kinds = ("linear", kind, "linear") if cancelled == "teacher" else ("linear", "linear", kind)
    batch = make_batch(39, kinds=kinds, dtype=backend_dtype.dtype)
    options = {"reward_scale": lam, "backend": backend_dtype.backend}
    without, grads = run(batch, **options)
    scored, scored_grads = run(batch, score_cancelled=True, **options)
    assert getattr(without, f"{cancelled}_logprobs") is None
    head = getattr(batch, cancelled)
    want = oracle.gopd(widened(batch.student), *(head,) * 2, batch.token_ids, mask=batch.mask, reward_scale=0.5)
    assert_close(getattr(scored, f"{cancelled}_logprobs"), want.teacher_logprobs, backend_dtype.tolerance)
    assert torch.equal(without.loss, scored.loss)
    assert all(map(torch.equal, grads, scored_grads))
    assert torch.equal(without.advantages, scored.advantages)


@product_on_float64(objective=OBJECTIVES, cancelled_at=[("ref", 1.0), ("teacher", 0.0)])
def test_a_cancelled_model_may_be_missing(backend_dtype, objective, cancelled_at):
    cancelled, lam = cancelled_at
    batch = make_batch(40, dtype=backend_dtype.dtype)
    a, grads_a = run(batch, reward_scale=lam, backend=backend_dtype.backend, **objective)
    b, grads_b = run(batch.replaced(**{cancelled: None}), reward_scale=lam, backend=backend_dtype.backend, **objective)
    assert torch.equal(a.loss, b.loss)
    assert all(map(torch.equal, grads_a, grads_b))


def test_without_token_ids_full_reports_what_needs_none(backend_dtype):
    batch = make_batch(41, dtype=backend_dtype.dtype)
    a, grads_a = run(batch, estimator="full", reward_scale=1.25, backend=backend_dtype.backend)
    b, grads_b = run(batch.replaced(token_ids=None), estimator="full", reward_scale=1.25, backend=backend_dtype.backend)
    assert b.advantages is b.student_logprobs is b.teacher_logprobs is b.ref_logprobs is None
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.kl, b.kl)
    assert torch.equal(a.entropy, b.entropy)
    assert all(map(torch.equal, grads_a, grads_b))


def test_two_runs_give_the_same_bits(backend):
    batch = make_batch(42, shape=(3, 40), vocab=(301,) * 3, dtype=torch.float32)
    for objective in OBJECTIVES:
        a, grads_a = run(batch, reward_scale=1.25, backend=backend, chunk_size=16, **objective)
        b, grads_b = run(batch, reward_scale=1.25, backend=backend, chunk_size=16, **objective)
        assert torch.equal(a.loss, b.loss)
        assert all(map(torch.equal, grads_a, grads_b))


def test_outputs_share_no_memory_with_inputs(backend):
    batch = make_batch(43, kinds=("logits", "logprobs", "logprobs"), dtype=torch.float32, masked=False)
    old = -torch.rand(2, 5)
    out = fg.gopd_loss(
        *batch.models, batch.token_ids, reward_scale=1.25, old_logprobs=old, reduction="none", backend=backend
    )
    given_ = {x.untyped_storage().data_ptr() for m in batch.models for x in m.tensors.values()} | {old.data_ptr()}
    assert not given_ & {v.untyped_storage().data_ptr() for v in fields_of(out).values() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=["sampled", "full"])
def test_fields_that_are_read_late_are_those_of_the_call(objective):
    """What the caller does to its tensors after the call, and which field is read first, change nothing."""
    batch = make_batch(45, kinds=("linear", "logits", "logits"), dtype=torch.float32)
    lam = torch.tensor([[1.25], [0.5]]).expand(2, 5).clone()
    arguments = {"reward_scale": lam, "mask": batch.mask, "sft_labels": batch.token_ids.clone(), **objective}
    if objective["estimator"] == "sampled":
        old = -torch.rand(2, 5)
        arguments |= {"old_logprobs": old, "rollout_logprobs": old - 0.1, "clip": (0.1, 0.1)}
    out = fg.gopd_loss(*batch.models, batch.token_ids, **arguments)
    expected = fields_of(fg.gopd_loss(*batch.models, batch.token_ids, **arguments))
    expected = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in expected.items()}
    out.loss.backward()
    with torch.no_grad():
        for x in (*arguments.values(), *(x for m in batch.models for x in m.tensors.values())):
            if isinstance(x, torch.Tensor):
                x.zero_()
    for name in reversed(expected):
        value = getattr(out, name)
        assert value is getattr(out, name), f"{name} is computed once"
        assert torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name], name


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=["sampled", "full"])
def test_writing_to_the_loss_changes_no_field(objective):
    batch = make_batch(47, dtype=torch.float32)
    with torch.no_grad():
        out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, reduction="none", **objective)
        expected = out.loss.clone()
        out.loss.zero_()
    assert torch.equal(out.token_loss, expected)


def test_an_output_is_copied_with_its_fields():
    batch = make_batch(46, dtype=torch.float32)
    with torch.no_grad():
        out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, estimator="full")
    for copied in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        for name, value in fields_of(out).items():
            other = getattr(copied, name)
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    with pytest.raises(AttributeError, match="no attribute 'advantage'"):
        _ = out.advantage


# ----------------------------------------------------------------------------------------------------- token_logprobs


@pytest.mark.parametrize(
    ("kind", "transform"), [("linear", {"bias": True, "softcap": 6.0}), ("logits", {"temperature": 0.7})]
)
def test_token_logprobs_and_entropy_are_their_formula(backend_dtype, kind, transform):
    batch = make_batch(44, kinds=(kind, "logits", "logits"), dtype=backend_dtype.dtype, transforms=(transform, {}, {}))
    g = generator(3)
    up, up_entropy = (torch.randn(2, 5, generator=g, dtype=torch.float64) for _ in range(2))
    for use in ((True, False), (False, True), (True, True)):
        lp, entropy = fg.token_logprobs(
            batch.student, batch.token_ids, mask=batch.mask, return_entropy=True, backend=backend_dtype.backend
        )
        total = use[0] * (lp * up.to(lp.dtype)).sum() + use[1] * (entropy * up_entropy.to(lp.dtype)).sum()
        grads = torch.autograd.grad(total, batch.leaves)
        wide = widened(batch.student)
        log_p = oracle.logits_of(wide).log_softmax(-1)
        want = log_p.gather(-1, batch.token_ids[..., None])[..., 0] * batch.mask
        want_entropy = -(log_p.exp() * log_p).sum(-1) * batch.mask
        want_total = use[0] * (want * up).sum() + use[1] * (want_entropy * up_entropy).sum()
        want_grads = torch.autograd.grad(want_total, list(wide.tensors.values()))
        assert_close(lp, want, backend_dtype.tolerance)
        assert_close(entropy, want_entropy, backend_dtype.tolerance)
        assert_all_close(grads, want_grads, backend_dtype.tolerance)


def test_token_logprobs_respects_vocab_size_chunks_and_no_grad(backend_dtype):
    batch = make_batch(45, shape=(11,), dtype=backend_dtype.dtype, masked=False)
    ids = batch.token_ids.clamp(max=20)
    want = oracle.logits_of(widened(batch.student))[..., :21].log_softmax(-1).gather(-1, ids[:, None])[:, 0].detach()
    for chunk in (None, 1, 4):
        with torch.no_grad():
            got = fg.token_logprobs(batch.student, ids, vocab_size=21, chunk_size=chunk, backend=backend_dtype.backend)
        assert isinstance(got, torch.Tensor)
        assert not got.requires_grad
        assert_close(got, want, backend_dtype.tolerance)


def test_scores_by_token_logprobs_give_the_same_loss_as_the_models(backend_dtype):
    batch = make_batch(46, dtype=backend_dtype.dtype)
    with torch.no_grad():
        scores = [
            fg.TokenLogProbs(fg.token_logprobs(m, batch.token_ids, mask=batch.mask, backend=backend_dtype.backend))
            for m in (batch.teacher, batch.ref)
        ]
    a, grads_a = run(batch, reward_scale=1.25, backend=backend_dtype.backend)
    b, grads_b = run(batch.replaced(teacher=scores[0], ref=scores[1]), reward_scale=1.25, backend=backend_dtype.backend)
    assert_close(b.token_loss, a.token_loss, backend_dtype.tolerance)
    assert_all_close(grads_b, grads_a, backend_dtype.tolerance)


# ----------------------------------------------------------------------------------------------------------- GOPDLoss


def test_the_module_is_the_function_with_its_options(backend):
    batch = make_batch(47, dtype=torch.float32)
    options = {
        "reward_scale": 1.25,
        "estimator": "full",
        "divergence": "jsd",
        "beta": 0.3,
        "reduction": "seq-mean-token-sum",
        "vocab_size": 37,
        "chunk_size": 4,
        "backend": backend,
        "score_cancelled": True,
    }
    module = fg.GOPDLoss(**options)
    a = module(*batch.models, batch.token_ids, mask=batch.mask)
    b, _ = run(batch, **options)
    assert torch.equal(a.loss, b.loss)
    assert not list(module.parameters())
    assert "jsd" in repr(module)


def test_the_modules_reward_scale_can_be_overridden_per_batch():
    batch = make_batch(48, dtype=torch.float32)
    module = fg.GOPDLoss(reward_scale=1.25, backend="torch")
    a = module(*batch.models, batch.token_ids, reward_scale=0.5)
    b = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=0.5, backend="torch")
    assert torch.equal(a.loss, b.loss)


def test_a_cancelled_model_of_another_dtype_is_scored():
    batch = make_batch(47, dtype=torch.float32)
    wide = fg.LinearHead(batch.ref.hidden.double(), batch.ref.weight.double())
    got, _ = run(batch.replaced(ref=wide), reward_scale=1.0, score_cancelled=True)
    want, _ = run(batch, reward_scale=1.0, score_cancelled=True)
    assert_close(got.ref_logprobs, want.ref_logprobs, 1e-5)
