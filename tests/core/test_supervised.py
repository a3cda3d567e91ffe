"""The supervised term: -log p[label] from the logits that the estimator has anyway."""

from __future__ import annotations

import math

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
    generator,
    make_batch,
    relative_error,
    run,
    widened,
)
from combinations import pairwise, product_on_float64
from costs import GEMM, H, N, V, gemm_flops

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
BASELINE = {"estimator": "sampled", "baseline": "expected"}
every_objective = pytest.mark.parametrize("objective", [*OBJECTIVES, BASELINE], ids=[*IDS, "baseline"])


def labels_for(batch, vocab: int = 37, seed: int = 0) -> torch.Tensor:
    """Some tokens without a label, some with the sampled token itself."""
    shape = batch.token_ids.shape
    ids = torch.randint(vocab, shape, generator=generator(seed))
    kind = torch.randint(3, shape, generator=generator(seed + 1))
    return torch.where(kind == 0, -100, torch.where(kind == 1, batch.token_ids, ids))


@product_on_float64(objective=[*OBJECTIVES, BASELINE], kind=["linear", "logits"])
def test_it_adds_the_cross_entropy(backend_dtype, kind, objective):
    batch = make_batch(95, shape=(3, 5), kinds=(kind, "linear", "logits"), dtype=backend_dtype.dtype)
    options = {"reward_scale": 1.25, "sft_labels": labels_for(batch), "sft_weight": 0.3, **objective}
    assert_same_as_oracle(batch, backend_dtype, **options)


@every_objective
def test_any_token_may_be_the_label(objective):
    """The first and the last among them, in and outside the support of topk."""
    batch = make_batch(95, shape=(37,), dtype=torch.float64, masked=False)
    options = {"reward_scale": 1.25, "sft_labels": torch.arange(37), "sft_weight": 0.3, **objective}
    assert_same_as_oracle(batch, BackendDtype("torch", torch.float64), **options)


@every_objective
def test_the_dense_reference_is_the_same_formula(objective):
    batch = make_batch(96, shape=(3, 5))
    options = {"reward_scale": 1.25, "sft_labels": labels_for(batch), "sft_weight": 2.0, **objective}
    got, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = run(batch, backend="torch", **options)
    assert_close(got.token_loss, want.token_loss, 1e-12)
    assert_all_close(grads, want_grads, 1e-11)
    assert_close(got.label_logprobs, want.label_logprobs, 1e-12)
    assert torch.equal(got.labelled, want.labelled)


@given(
    seed=st.integers(0, 10_000),
    objective=st.sampled_from([*OBJECTIVES, BASELINE]),
    weight=st.sampled_from([0.0, 0.1, 1.0, 7.0]),
    reduction=st.sampled_from(["token-mean", "seq-mean-token-mean", "none"]),
    chunk=st.integers(1, 16),
    kind=st.sampled_from(["linear", "logits"]),
)
def test_any_weight_any_reduction_any_chunk(seed, objective, weight, reduction, chunk, kind):
    batch = make_batch(seed, shape=(2, 6), kinds=(kind, "linear", "logits"), scale=1.0)
    options = {"reward_scale": 1.25, "sft_labels": labels_for(batch, seed=seed), "sft_weight": weight, **objective}
    options |= {"mask": batch.mask, "reduction": reduction}
    got = fg.gopd_loss(*batch.models, batch.token_ids, backend="torch", chunk_size=chunk, **options)
    want = fg.reference.gopd_loss(*batch.models, batch.token_ids, **options)
    assert_close(got.token_loss, want.token_loss, 1e-11)
    assert_all_close(
        torch.autograd.grad(got.loss.sum(), batch.leaves), torch.autograd.grad(want.loss.sum(), batch.leaves), 1e-10
    )


def test_with_nothing_to_distil_it_is_plain_fine_tuning(backend_dtype):
    """Equal models have no distillation loss: what is left is PyTorch's cross entropy."""
    batch = make_batch(97, shape=(12,), dtype=backend_dtype.dtype, masked=False)
    same = fg.LinearHead(batch.student.hidden.detach(), batch.student.weight.detach())
    labels = labels_for(batch)
    out, grads = run(batch.replaced(teacher=same), backend=backend_dtype.backend, estimator="full", sft_labels=labels)
    logits = batch.student.hidden @ batch.student.weight.T
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 12
    assert_close(out.loss, want, backend_dtype.tolerance)
    assert_all_close(grads, torch.autograd.grad(want, batch.leaves), backend_dtype.tolerance)


def test_without_labels_nothing_changes(backend):
    batch = make_batch(98, dtype=torch.float32)
    for objective in OBJECTIVES:
        got, grads = run(batch, backend=backend, sft_labels=torch.full_like(batch.token_ids, -100), reward_scale=1.25,
                         **objective)  # fmt: skip
        want, want_grads = run(batch, backend=backend, reward_scale=1.25, **objective)
        assert_close(got.loss, want.loss, 1e-6)
        assert_all_close(grads, want_grads, 1e-6)
        assert not got.labelled.any()


def test_masked_labels_have_no_effect(backend):
    batch = make_batch(99, dtype=torch.float32)
    labels = labels_for(batch)
    wild = torch.where(batch.mask, labels, 10**9)
    a, _ = run(batch, backend=backend, estimator="full", sft_labels=labels)
    b, _ = run(batch, backend=backend, estimator="full", sft_labels=wild)
    assert torch.equal(a.loss, b.loss)
    assert (b.label_logprobs[~batch.mask] == 0).all()
    assert not b.labelled[~batch.mask].any()


@every_objective
def test_a_label_that_cannot_be_given_adds_nothing(backend_dtype, objective):
    batch = make_batch(100, shape=(6,), kinds=("logits", "logits", "linear"), dtype=backend_dtype.dtype, masked=False)
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    batch.token_ids.fill_(0)
    with torch.no_grad():
        batch.student.logits[2, 3] = -math.inf
        batch.student.logits[:, 0] = 9.0  # the sampled token is possible, and among the largest
        batch.teacher.logits[:, 0] = 9.0
    options = {"backend": backend_dtype.backend, "reward_scale": 1.25, **objective}
    got, grads = run(batch, sft_labels=labels, **options)
    without, _ = run(batch, sft_labels=torch.where(labels == 3, -100, labels), **options)
    assert torch.isfinite(got.loss)
    assert_close(got.loss, without.loss, backend_dtype.tolerance)
    assert all(torch.isfinite(g).all() for g in grads)
    assert got.labelled.tolist() == [True, True, False, True, True, True]
    assert got.label_logprobs[2] == -math.inf


@every_objective
def test_it_costs_no_gemm(backend, objective):
    batch = make_batch(101, shape=(N,), vocab=(V,) * 3, hidden=(H,) * 3, dtype=torch.float32, masked=False)
    labels = labels_for(batch, V)

    def call():
        fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, chunk_size=16, backend=backend,
                     sft_labels=labels, **objective).loss.backward()  # fmt: skip

    call()
    assert gemm_flops(call) == 5 * GEMM


@pairwise(backend=["torch", "native"], objective=[*OBJECTIVES, BASELINE], dtype=[torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_naive_path(backend, dtype, objective):
    errors = []
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        total = 0.0
        for seed in range(3):
            batch = make_batch(102 + seed, shape=(9,), vocab=(61,) * 3, dtype=dtype)
            options = {"reward_scale": 1.25, "sft_labels": labels_for(batch, 61), "sft_weight": 0.5, **objective}
            wide = batch.replaced(**{n: widened(getattr(batch, n)) for n in ("student", "teacher", "ref")})
            _, want = run(wide, fg.reference.gopd_loss, **options)
            more = {"backend": backend} if function is fg.gopd_loss else {}
            _, got = run(batch, function, **options, **more)
            total += sum(relative_error(a, b) ** 2 for a, b in zip(got, want, strict=True))
        errors.append(math.sqrt(total))
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 2


def test_a_large_weight_does_not_overflow_float16(backend):
    batch = make_batch(105, shape=(9,), dtype=torch.float16, masked=False)
    options = {"reward_scale": 1.25, "sft_labels": labels_for(batch), "sft_weight": 1e5, "normalizer": 1e5}
    _, grads = run(batch, backend=backend, **options)
    wide = batch.replaced(**{n: widened(getattr(batch, n)) for n in ("student", "teacher", "ref")})
    _, want = run(wide, fg.reference.gopd_loss, **options)
    assert_all_close(grads, want, 2e-3)  # two roundings to float16, of hidden states and of the gradient: eps each


def test_metrics_count_the_labels(backend):
    batch = make_batch(106, shape=(4, 6), dtype=torch.float32)
    labels = labels_for(batch)
    out, _ = run(batch, backend=backend, estimator="full", sft_labels=labels)
    counts = batch.mask & (labels >= 0)
    want = -out.label_logprobs[counts].double().mean()
    assert_close(out.metrics()["sft_loss"], want, 1e-7)
    assert torch.equal(out.labelled, counts)
    assert "sft_loss" not in run(batch, backend=backend)[0].metrics()


ERRORS = {
    "weight alone": ({"sft_weight": 0.5}, ValueError, "sft_weight needs sft_labels"),
    "negative": ({"sft_labels": "ids", "sft_weight": -1.0}, ValueError, "sft_weight must not be negative"),
    "a tensor": ({"sft_labels": "ids", "sft_weight": torch.ones(())}, TypeError, "sft_weight must be a Python number"),
    "floats": ({"sft_labels": torch.zeros(2, 5)}, TypeError, "sft_labels must be an integer tensor"),
    "shape": ({"sft_labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"sft_labels must have the token shape"),
    "a list": ({"sft_labels": [1, 2]}, TypeError, "sft_labels must be a torch.Tensor"),
    "too large": ({"sft_labels": 37}, IndexError, r"sft_labels must be in \[0, 37\), or -100 for none.*got 37"),
    "minus one": ({"sft_labels": -1}, IndexError, "sft_labels must be.*got -1"),
}


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_named(case, function):
    options, error, message = ERRORS[case]
    batch = make_batch(107, masked=False)
    labels = options.get("sft_labels")
    if labels == "ids":
        options = options | {"sft_labels": batch.token_ids}
    elif isinstance(labels, int):
        wrong = batch.token_ids.clone()
        wrong[1, 2] = labels
        options = options | {"sft_labels": wrong}
    with pytest.raises(error, match=message):
        function(*batch.models, batch.token_ids, **options)


def test_one_token_by_hand():
    batch = make_batch(108, shape=(1,), masked=False)
    log_p = (batch.student.hidden @ batch.student.weight.T).log_softmax(-1)
    out, _ = run(batch, backend="torch", sft_labels=torch.tensor([3]), sft_weight=2.0)
    plain, _ = run(batch, backend="torch")
    assert_close(out.loss, plain.loss - 2 * log_p[0, 3], 1e-12)
