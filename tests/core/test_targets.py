"""A teacher or reference that is made of several models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fused_gopd as fg
from builders import (
    OBJECTIVES,
    REDUCTIONS,
    Batch,
    assert_all_close,
    assert_close,
    assert_same_as_oracle,
    expect,
    generator,
    like,
    linear_head,
    logits_head,
    make_batch,
    run,
    trainable,
    widened,
)
from combinations import pairwise
from fused_gopd import reference
from fused_gopd.loop import gemm, memory
from fused_gopd.loop.chunking import chunk_size_for
from fused_gopd.options import LossCall
from fused_gopd.plan import plan_of

pytestmark = pytest.mark.usefixtures("one_thread")

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


def ids(options: Any) -> str:
    return "-".join(map(str, options.values())) or "sampled"


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


@pairwise(
    backend_dtype=("torch-float64", "native-float32"),
    objective=(*OBJECTIVES, *TOPK, BASELINE),
    target=tuple(TARGETS),
    place=(("teacher", 1.0), ("teacher", 1.7), ("ref", 1.7)),
)
def test_value_and_gradient(backend_dtype, objective, target, place) -> None:
    place, lam = place
    batch = with_target(target, backend_dtype.dtype, place)
    assert_same_as_oracle(batch, backend_dtype, reward_scale=lam, **objective)


@pytest.mark.parametrize("objective", [*OBJECTIVES, *TOPK, BASELINE], ids=ids)
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
    ids=ids,
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


KINDS = ("linear", "logits", "logprobs")


@given(data=st.data(), seed=st.integers(0, 10_000), objective=st.sampled_from([*OBJECTIVES, *TOPK, BASELINE]))
def test_any_models_weights_and_options(data, seed, objective):
    """Any number and kind of models, in both places; against the oracle and the dense reference."""
    draw, packed = data.draw, data.draw(st.booleans(), "packed")
    shape = (10,) if packed else SHAPE
    batch = make_batch(seed, shape=shape)
    bounds = {"cu_seqlens": torch.tensor([0, 3, 10])} if packed else {}
    alone = objective["estimator"] == "sampled" and objective is not BASELINE

    def weight(name: str, signed: bool) -> Any:
        per = draw(st.sampled_from(["number", "token", "sequence"]), name)
        if per == "number":
            return draw(st.floats(-2 if signed else 0, 3), name)
        x = per_token(draw(st.integers(0, 99), name), torch.float64, shape if per == "token" else (2,))
        return x if signed else x.abs() + 0.01

    def made(place: str) -> Any:
        mixture = draw(st.booleans(), f"{place} is a mixture")
        models = []
        for i, kind in enumerate(
            draw(st.lists(st.sampled_from(KINDS if alone else KINDS[:2]), min_size=1, max_size=4))
        ):
            key = 100 * seed + 10 * len(place) + i
            if kind == "logprobs":
                models.append(fg.TokenLogProbs(-5 * torch.rand(shape, generator=generator(key), dtype=torch.float64)))
            else:
                models.append(
                    linear_head(key, shape, 37 + i, 4 + i, torch.float64)
                    if kind == "linear"
                    else logits_head(key, shape, 37, torch.float64, softcap=4.0 if i else None)
                )
        weights = [weight(f"{place} {i}", not mixture) for i in range(len(models))]
        if all(isinstance(w, float) and w == 0 for w in weights):
            weights[0] = 1.0
        return (fg.Mixture if mixture else fg.LogLinear)(models, weights)

    places = draw(st.sampled_from([("teacher",), ("ref",), ("teacher", "ref")]), "places")
    batch = batch.replaced(**{place: made(place) for place in places})
    lam: Any = draw(st.sampled_from([1.25, -0.5, "token", "sequence"]), "lambda")
    if isinstance(lam, str):
        lam = per_token(seed, torch.float64, shape if lam == "token" else (2,))
    options = {"reward_scale": lam, "reduction": draw(st.sampled_from(REDUCTIONS)), **bounds, **objective}
    if packed and options["reduction"] == "none":
        options["reduction"] = "sum"
    if draw(st.booleans(), "labels"):
        options["sft_labels"] = batch.token_ids
    out, grads = run(batch, backend="torch", chunk_size=draw(st.integers(1, 11), "chunk"), **options)
    want, want_grads = expect(batch, **options)
    dense, dense_grads = run(batch, reference.gopd_loss, **options)
    for found, found_grads in ((out, grads), (dense, dense_grads)):
        assert_close(found.token_loss, want.token_loss, 1e-11)
        assert_close(found.advantages, want.advantages, 1e-11) if found.advantages is not None else None
        assert_all_close(found_grads, want_grads, 1e-11)


@pairwise(
    kind=("LogLinear", "Mixture"),
    objective=(*OBJECTIVES, *TOPK, BASELINE),
    masked=("student", "ref", 0, 1, 2, "all"),
    fill=(-math.inf, -1e9, torch.finfo(torch.float32).min),
    backend=("torch", "native"),
)
def test_masks_in_any_one_model(kind, objective, masked, fill, backend):
    """Finite wherever float64 is, and near it where all models have the mask; weights from -3 to 1e4.

    The product of all these values, 792 cases, passes too.
    """
    models = [logits_head(60 + i, (14,), 23, torch.float32) for i in range(5)]
    every = {"student": models[:1], "ref": models[1:2], "all": models}.get(masked) or [models[2 + masked]]
    for x in every:
        x.logits[::2, 3:6] = fill
    lam = torch.linspace(-3, 10, 14)
    lam[4], lam[8] = 0, 1
    third = torch.tensor([-3.0, 0, 1, 10, 1e4, -1, 0.5]).repeat(2)
    weights = [1.5, 0.5, third if kind == "LogLinear" else third.abs()]

    def call(function: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
        student, ref, *others = [fg.Logits(x.logits.to(dtype)) for x in models]
        student.logits.requires_grad_()
        target = getattr(fg, kind)(others, [w.to(dtype) if isinstance(w, Tensor) else w for w in weights])
        out = function(student, target, ref, torch.arange(14), reward_scale=lam.to(dtype), **objective, **options)
        return out, torch.autograd.grad(out.loss, student.logits)[0]

    out, grad = call(fg.gopd_loss, torch.float32, backend=backend, chunk_size=5)
    want, want_grad = call(reference.gopd_loss, torch.float64)
    assert (out.token_loss.isfinite() | ~want.token_loss.isfinite()).all()
    assert (grad.isfinite() | ~want_grad.isfinite()).all()
    if masked == "all" or fill == -math.inf:
        # Not where weights make the mask the largest number, and not a weight of 1e4 times a log-prob: of two numbers
        # of 1e5 the difference matters, of which float32 has 1e-2.
        both = sum(weights)
        usual = (third.abs() <= 10) & (both > 0) & (lam * both + 1 - lam > 0)
        assert_close(out.token_loss[usual], want.token_loss[usual], 2e-4)
        assert_close(grad[usual], want_grad[usual], 2e-4)


def test_models_of_weight_0_are_not_touched_and_the_others_once(monkeypatch, backend):
    batch = make_batch(4, shape=(6,), dtype=torch.float32, masked=False)
    products: list[int] = []
    product = gemm.logits_into

    def counted(out: Tensor, weight: Tensor) -> gemm.Product:
        multiply = product(out, weight)
        return lambda hidden: (products.append(hidden.shape[0]), multiply(hidden))[1]

    monkeypatch.setattr(gemm, "logits_into", counted)
    bad = linear_head(1, (6,), 37, 4, torch.float32)
    bad.weight.fill_(math.nan)
    good = several(dtype=torch.float32, shape=(6,))
    made = fg.LogLinear([good[0], bad, good[2], good[3]], [1.0, 0.0, -1.0, 0.5])
    without = fg.LogLinear([good[0], good[2], good[3]], [1.0, -1.0, 0.5])
    for objective, extra in (({"estimator": "full"}, 0), ({"estimator": "topk", "k": 3, "support": "student"}, 0),
                             ({"estimator": "topk", "k": 3}, 3), ({}, 0)):  # fmt: skip
        results = []
        for teacher in (made, without):
            products.clear()
            results.append(run(batch.replaced(teacher=teacher), backend=backend, reward_scale=1.25, **objective))
            if objective or backend == "torch":
                assert len(products) == 1 + 1 + 3 + extra, objective  # student, reference, the three that count
        (out, grads), (want, want_grads) = results
        assert torch.equal(out.loss, want.loss)
        assert all(map(torch.equal, grads, want_grads))


@pytest.mark.parametrize("objective", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 3}], ids=ids)
def test_memory_does_not_grow_with_the_models(objective, monkeypatch):
    allocated: list[int] = []
    empty = memory.empty

    def counted(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        allocated.append(math.prod(shape))
        return empty(shape, dtype, device)

    monkeypatch.setattr(memory, "empty", counted)
    batch, totals = make_batch(5, shape=(8,)), []
    for n in (2, 7):
        allocated.clear()
        models = [linear_head(i, (8,), 37, 5, torch.float64) for i in range(n)]
        run(batch.replaced(teacher=fg.LogLinear(models), ref=fg.Mixture(models)), reward_scale=1.5, **objective)
        totals.append(sum(allocated))
    assert totals[0] == totals[1] > 0


def test_the_default_chunk_has_room_for_the_sum_and_one_model():
    """In ``full`` as many buffers as with a teacher and a reference; in ``topk`` a second one."""

    def size(teacher: Any, ref: Any, **options: Any) -> int:
        student = linear_head(0, (4,), 50_000, 2, torch.float32)
        call = LossCall(student, teacher, ref, torch.zeros(4, dtype=torch.int64), reward_scale=1.25, **options)
        return plan_of(call).chunk_sizes[0]

    q, r, *more = (linear_head(i, (4,), 50_000, 2, torch.float32) for i in range(1, 6))
    full = {"estimator": "full"}
    assert size(fg.LogLinear([q, *more]), fg.TokenLogProbs(-torch.ones(4))) == size(q, r)
    assert size(fg.LogLinear([q, *more]), r, **full) == chunk_size_for(50_000, 4, "cpu")
    assert size(fg.LogLinear([q, *more]), fg.Mixture([r, *more]), **full) == chunk_size_for(50_000, 4, "cpu")
    assert size(q, r, **full) == chunk_size_for(50_000, 3, "cpu")
    assert size(fg.Mixture([q, r]), r, estimator="topk", k=3) == chunk_size_for(50_000, 2, "cpu")


@pytest.mark.parametrize("objective", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 4}, BASELINE], ids=ids)
def test_routes(objective, backend_dtype):
    """Each token has the teacher and reference of its route, made of several models or not."""
    dtype = backend_dtype.dtype
    batch, parts = make_batch(6, dtype=dtype), several(dtype=dtype)
    weights = per_token(7, dtype)
    teachers = [fg.LogLinear(parts[:2], [weights, 1.0]), batch.teacher, fg.Mixture(parts[1:])]
    refs = [batch.ref, fg.Mixture(parts[:2]), fg.LogLinear(parts[:1], [torch.rand(2, dtype=dtype)])]
    index = torch.arange(10).reshape(SHAPE) % 3
    options = {"reward_scale": 1.25, "reduction": "sum", "backend": backend_dtype.backend, **objective}
    out, grads = run(batch.replaced(teacher=teachers, ref=refs), teacher_index=index, chunk_size=2, **options)
    dense, _ = run(batch.replaced(teacher=teachers, ref=refs), reference.gopd_loss, teacher_index=index, **options)
    alone = [
        run(batch.replaced(teacher=q, ref=r, mask=batch.mask & (index == i)), **options)
        for i, (q, r) in enumerate(zip(teachers, refs, strict=True))
    ]
    for field in ("token_loss", "teacher_logprobs", "ref_logprobs", "advantages"):
        want = sum(getattr(each, field) for each, _ in alone)
        assert_close(getattr(out, field), want, backend_dtype.tolerance, field)
        assert_close(getattr(dense, field), want, backend_dtype.tolerance, field)
    assert_all_close(grads, [sum(x) for x in zip(*(g for _, g in alone), strict=True)], backend_dtype.tolerance)


@pytest.mark.parametrize("objective", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 4}], ids=ids)
def test_a_model_that_lambda_cancels_is_scored(objective, backend_dtype):
    batch, parts = make_batch(8, dtype=backend_dtype.dtype), several(dtype=backend_dtype.dtype)
    batch = batch.replaced(ref=fg.LogLinear(parts[:2], [1.5, per_token(9, backend_dtype.dtype)]))
    out, _ = run(batch, backend=backend_dtype.backend, score_cancelled=True, **objective)
    scores = [fg.token_logprobs(x, batch.token_ids, mask=batch.mask, vocab_size=37) for x in parts[:2]]
    want = 1.5 * scores[0] + batch.ref.weights[1] * scores[1]
    assert_close(out.ref_logprobs, want, backend_dtype.tolerance)
    dense, _ = run(batch, reference.gopd_loss, score_cancelled=True, **objective)
    assert_close(dense.ref_logprobs, want, backend_dtype.tolerance)
    assert "reward" in out.metrics().to_dict()


@pytest.mark.parametrize("objective", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 4}, BASELINE], ids=ids)
def test_hooks_see_the_log_probs_as_they_are(objective, backend_dtype):
    """In ``full`` the divergence and the entropy are those of the target, normalised."""
    batch = with_target("not summing to 1", backend_dtype.dtype, "teacher", seed=3)
    seen: dict[str, Tensor | None] = {}

    def function(stats: fg.TokenStats) -> Tensor:
        seen.update({name: getattr(stats, name) for name in ("teacher_logprobs", "teacher_entropy", "index")})
        return 1.5 + 0 * stats.student_entropy

    options = {"reward_scale_fn": function, **objective}
    for call, backend in ((fg.gopd_loss, backend_dtype.backend), (reference.gopd_loss, "torch")):
        _, grads = run(batch, call, backend=backend, **options)
        _, want_grads = run(batch, reward_scale=1.5, **objective)
        assert_all_close(grads, want_grads, backend_dtype.tolerance)
        scores = [fg.token_logprobs(x, batch.token_ids, vocab_size=37) for x in batch.teacher.models]
        total = sum(w * x for w, x in zip(batch.teacher.weights, scores, strict=True))
        assert_close(seen["teacher_logprobs"], total.reshape(-1)[seen["index"]], backend_dtype.tolerance)
        assert (seen["teacher_entropy"] is None) == (
            objective.get("estimator", "sampled") != "full" and objective != BASELINE
        )


def without_reduction(batch: Batch, **options: Any) -> list[list[Tensor]]:
    out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reduction="none", **options)
    upstream = torch.linspace(-1, 2, 10, dtype=out.loss.dtype).reshape(SHAPE)
    return [list(torch.autograd.grad(out.loss, batch.leaves, upstream, retain_graph=True)) for _ in range(2)]


@pytest.mark.parametrize("objective", [*OBJECTIVES, *TOPK, BASELINE], ids=ids)
def test_a_backward_that_recomputes(objective, backend):
    """Twice, to the same bits."""
    batch = with_target("weights per token", torch.float32, "teacher")
    first, second = without_reduction(batch, reward_scale=1.25, backend=backend, chunk_size=3, **objective)
    assert all(map(torch.equal, first, second))
    wide = batch.replaced(**{name: widened(getattr(batch, name)) for name in ("student", "teacher", "ref")})
    assert_all_close(first, without_reduction(wide, reward_scale=1.25, backend="torch", **objective)[0], 2e-5)


def test_under_torch_func():
    batch = with_target("mixture per token", torch.float32, "teacher")
    batch = batch.replaced(student=fg.LinearHead(batch.student.hidden.detach(), batch.student.weight.detach()))

    def loss(hidden: Tensor) -> Tensor:
        student = fg.LinearHead(hidden, batch.student.weight)
        return fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, estimator="full", reward_scale=1.25
                            ).loss  # fmt: skip

    hidden = batch.student.hidden.requires_grad_()
    assert_close(torch.func.grad(loss)(hidden.detach()), torch.autograd.grad(loss(hidden), hidden)[0], 1e-6)


@pytest.mark.parametrize("objective", [{}, {"estimator": "full"}, {"estimator": "topk", "k": 5}], ids=ids)
def test_float16_under_a_loss_scale(objective, backend):
    batch = make_batch(9, shape=(8,), dtype=torch.float16, masked=False)
    parts = several(dtype=torch.float16, shape=(8,))
    made = fg.LogLinear(parts[:3], [1.0, torch.linspace(-3, 10, 8), -1.0])
    batch = batch.replaced(teacher=made)
    wide = batch.replaced(
        student=trainable(like(batch.student, **{k: v.detach().float() for k, v in batch.student.tensors.items()})),
        teacher=fg.LogLinear(
            [like(x, **{k: v.float() for k, v in x.tensors.items()}) for x in made.models], made.weights
        ),
        ref=like(batch.ref, **{k: v.float() for k, v in batch.ref.tensors.items()}),
    )
    results = []
    for each in (batch, wide):
        out = fg.gopd_loss(
            *each.models, batch.token_ids, reward_scale=1.25, normalizer=1e4, backend=backend, **objective
        )
        results.append(torch.autograd.grad(1024 * out.loss, each.leaves))
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        assert_close(got, want, 2e-3)  # products of float16 operands


def test_models_and_weights_are_detached():
    batch, parts = make_batch(10), several()
    w = torch.rand(SHAPE, dtype=torch.float64, requires_grad=True)
    made = fg.LogLinear([trainable(parts[0]), trainable(parts[1])], [w, 1.0])
    for options in ({}, {"estimator": "full"}, {"estimator": "topk", "k": 4}):
        out, _ = run(batch.replaced(teacher=made), **options)
        assert not out.teacher_logprobs.requires_grad
        with pytest.raises(RuntimeError):
            torch.autograd.grad(fg.gopd_loss(batch.student, made, None, batch.token_ids, **options).loss, w)


def test_masked_entries_have_no_effect():
    batch, (q, r, *_) = make_batch(11), several()
    w = torch.rand(SHAPE, dtype=torch.float64)
    poisoned = fg.LogLinear(
        [like(q, hidden=q.hidden.masked_fill(~batch.mask[..., None], math.nan)), r],
        [w.masked_fill(~batch.mask, math.nan), 0.5],
    )
    for options in ({}, {"estimator": "full"}, {"estimator": "topk", "k": 4}):
        out, grads = run(batch.replaced(teacher=poisoned), **options)
        want, want_grads = run(batch.replaced(teacher=fg.LogLinear([q, r], [w, 0.5])), **options)
        assert torch.equal(out.loss, want.loss)
        assert all(map(torch.equal, grads, want_grads))


def test_a_plan_is_not_that_of_other_weights():
    """Weights change from call to call; 0 is another signature."""
    batch, parts = make_batch(12), several()[:3]
    for estimator in ("sampled", "full"):
        for weights in ([1.0, 2.0, 0.0], [1.0, -2.0, 0.0], [0.0, 1.0, 1.0], [torch.ones(SHAPE).double(), 1.0, 0.0]):
            each = batch.replaced(teacher=fg.LogLinear(parts, weights))
            assert_close(run(each, estimator=estimator)[0].loss, expect(each, estimator=estimator)[0].loss, 1e-12)


def test_compiled():
    """The same bits under torch.compile, and one graph."""
    torch._dynamo.reset()
    batch, parts = make_batch(13, dtype=torch.float32), several(dtype=torch.float32)
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def loss(q: Tensor, weight: float, per_token: Tensor) -> Tensor:
        made = fg.LogLinear([fg.LinearHead(q, parts[0].weight), *parts[1:3]], [weight, per_token, -0.5])
        mixed = fg.Mixture([batch.ref, parts[3]])
        return fg.gopd_loss(batch.student, made, mixed, batch.token_ids, mask=batch.mask, estimator="full",
                            reward_scale=1.25).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend=counting, dynamic=False)
    for seed in (1, 2):
        w = per_token(seed, torch.float32)
        got, want = (f(parts[0].hidden, 1.5, w) for f in (compiled, loss))
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(x, batch.leaves) for x in (got, want)]
        assert all(map(torch.equal, *grads))
    assert len(graphs) == 1
    torch._dynamo.reset()


def heads() -> tuple[Any, Any]:
    return linear_head(1, SHAPE, 37, 4, torch.float64), logits_head(2, SHAPE, 37, torch.float64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda q, r: fg.LogLinear(q), TypeError, "models of LogLinear must be a list of models, got LinearHead"),
        (lambda q, r: fg.LogLinear([]), ValueError, "models of LogLinear must not be an empty list"),
        (lambda q, r: fg.LogLinear([q, r.logits]), TypeError, r"models\[1\] of LogLinear must be a .*fg.Logits"),
        (lambda q, r: fg.LogLinear([q, fg.Mixture([q, r])]), TypeError, r"models\[1\] of LogLinear is a Mixture"),
        (
            lambda q, r: fg.Mixture([fg.TopKLogProbs(torch.zeros(2, 5, 1, dtype=torch.int64), torch.zeros(2, 5, 1))]),
            TypeError,
            r"models\[0\] of Mixture is TopKLogProbs",
        ),
        (lambda q, r: fg.LogLinear([q, fg.Logits(r.logits[0])]), ValueError, "one token shape, got .2, 5. and .5,."),
        (lambda q, r: fg.LogLinear([q, r], [1.0]), ValueError, "weights of LogLinear must be as many as its models"),
        (lambda q, r: fg.LogLinear([q, r], 1.0), TypeError, "weights of LogLinear must be one number or tensor"),
        (lambda q, r: fg.LogLinear([q, r], [1.0, "1"]), TypeError, r"weights\[1\] of LogLinear must be a Python float"),
        (lambda q, r: fg.LogLinear([q, r], [True, 1]), TypeError, r"weights\[0\] of LogLinear must be a Python float"),
        (lambda q, r: fg.LogLinear([q, r], [math.inf, 1]), ValueError, r"weights\[0\] of LogLinear must be finite"),
        (lambda q, r: fg.LogLinear([q, r], [0, 0.0]), ValueError, "weights of LogLinear must not all be 0"),
        (lambda q, r: fg.Mixture([q, r], [1.5, -0.5]), ValueError, r"weights\[1\] of Mixture must not be negative"),
        (lambda q, r: fg.LogLinear([q], torch.ones(1, 2, 5).int()), TypeError, r"weights\[0\] of LogLinear must be"),
    ],
)
def test_what_the_types_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make(*heads())


@pytest.mark.parametrize("function", [fg.gopd_loss, reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda q, r: fg.LogLinear([q], [torch.ones(3)]), {}, ValueError, r"teacher.weights\[0\] must be a Python fl"),
        (
            lambda q, r: fg.LogLinear([q], [torch.full(SHAPE, math.nan)]), {}, ValueError,
            "weights of LogLinear must be finite where not masked, got nan",
        ),
        (
            lambda q, r: fg.Mixture([q, r], [1.0, -torch.ones(SHAPE)]), {}, ValueError,
            "weights of Mixture must be finite and not negative where not masked, got -1",
        ),
        (
            lambda q, r: fg.LogLinear([q, fg.TokenLogProbs(-torch.ones(SHAPE))]), {"estimator": "full"}, TypeError,
            r"teacher.models\[1\] is TokenLogProbs, which estimator='sampled' alone can use",
        ),
        (
            lambda q, r: fg.LogLinear([q, fg.TokenLogProbs(torch.ones(SHAPE))]), {}, ValueError,
            r"teacher.models\[1\].logprobs must be log-probabilities, at most 0",
        ),
        (
            lambda q, r: fg.LogLinear([fg.TokenLogProbs(-torch.ones(4))]), {}, ValueError,
            r"teacher.models\[0\] must have the token shape \(2, 5\) of student",
        ),
        (
            lambda q, r: fg.LogLinear([q, r]), {"vocab_size": 38}, ValueError,
            r"vocab_size must be between 1 and 37 .*teacher.models\[1\]",
        ),
        (lambda q, r: [fg.LogLinear([q]), r], {}, ValueError, "teacher_index must be given for 2 teachers"),
    ],
)  # fmt: skip
def test_what_a_call_refuses(function, make, options, error, message):
    batch = make_batch(14)
    with pytest.raises(error, match=message):
        run(batch.replaced(teacher=make(*heads()), ref=None), function, **options)


def test_as_the_student_it_is_refused():
    batch = make_batch(15)
    with pytest.raises(TypeError, match="student must be a LinearHead or Logits, got LogLinear"):
        fg.gopd_loss(fg.LogLinear([batch.student]), batch.teacher, None, batch.token_ids)
    with pytest.raises(TypeError, match="head must be a LinearHead or Logits, got Mixture"):
        fg.token_logprobs(fg.Mixture([batch.student]), batch.token_ids)


def test_it_prints_its_models_and_weights():
    q, r = heads()
    text = repr(fg.LogLinear([q, r], [1.5, torch.ones(SHAPE)]))
    assert "1.5: LinearHead, hidden (2, 5, 4) float64, weight (37, 4) float64" in text
    assert "(2, 5) float32, mean 1: Logits, logits (2, 5, 37) float64" in text


@pytest.mark.parametrize(
    "options",
    [
        {"kl_ref": "k3", "kl_ref_weight": 0.3, "entropy_weight": 0.2},
        {"kl_ref": "k1", "reward_scale": 1.0},
        {"estimator": "full", "kl_ref": "exact", "kl_ref_weight": 0.3, "entropy_weight": 0.2},
        {"estimator": "full", "kl_ref": "exact", "reward_scale": 1.0, "divergence": "jsd"},
        {"estimator": "full", "loss_max": 2.0, "token_weight": torch.rand(SHAPE, generator=generator(5)).double()},
        {"rollout_logprobs": -torch.rand(SHAPE, generator=generator(6)).double(), "rollout_is": "sequence"},
        {"estimator": "topk", "support_ids": torch.arange(30).reshape(*SHAPE, 3), "tail": "sampled"},
        {"estimator": "topk", "k": 3, "sft_labels": torch.arange(10).reshape(SHAPE), "entropy_weight": 0.2},
        {"logprob_min": -4.0, "advantage_clip": 2.0},
    ],
    ids=ids,
)
@pytest.mark.parametrize("target", ["not summing to 1", "mixture per token"])
def test_beside_other_options(target, options, backend_dtype):
    """In both places, against the dense reference."""
    dtype = backend_dtype.dtype
    parts = several(50, dtype=dtype)
    batch = make_batch(16, dtype=dtype)
    batch = batch.replaced(teacher=TARGETS[target](several(dtype=dtype), dtype), ref=TARGETS[target](parts, dtype))
    options = {"reward_scale": 1.25, **options}
    out, grads = run(batch, backend=backend_dtype.backend, chunk_size=3, **options)
    want, want_grads = run(batch, reference.gopd_loss, **options)
    assert_close(out.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


@pytest.mark.parametrize("objective", [*OBJECTIVES, *TOPK, BASELINE], ids=ids)
@pytest.mark.parametrize("kind", [fg.LogLinear, fg.Mixture])
def test_where_a_weight_is_0_the_model_does_not_matter(kind, objective, backend):
    """NaN and -inf included."""
    parts = several(70, dtype=torch.float32)
    hidden = parts[2].hidden.clone()
    hidden[:, ::2] = math.nan
    logits = parts[1].logits.clone()
    logits[:, ::2] = -math.inf
    weight = torch.ones(SHAPE).index_fill(1, torch.tensor([0, 2, 4]), 0)
    batch = make_batch(17, dtype=torch.float32)
    results = [
        run(batch.replaced(teacher=kind([parts[0], q, r], [0.7, weight, 0.5 * weight])), backend=backend,
            reward_scale=1.25, **objective)
        for q, r in ((parts[1], parts[2]), (like(parts[1], logits=logits), like(parts[2], hidden=hidden)))
    ]  # fmt: skip
    (want, want_grads), (out, grads) = results
    assert_close(out.token_loss, want.token_loss, 1e-6)
    assert_all_close(grads, want_grads, 1e-6)


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("options", [{"estimator": "full"}, {"estimator": "sampled", "baseline": "expected"}])
@pytest.mark.parametrize("place", ["teacher", "ref"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_mask_in_a_model_of_negative_weight_leaves_the_digits_of_other_tokens(mask, options, place, backend):
    """The sum's maximum is then 2.5e8 and more; log-probs of the sampled tokens are not relative to it."""
    g = generator(5)
    z, x, y = (torch.randn(3, 9, generator=g) for _ in range(3))
    y[1, 4] = mask
    ids = torch.tensor([1, 2, 3])
    total = fg.LogLinear([fg.Logits(x), fg.Logits(y)], [1.25, -0.25])
    models = {"teacher": fg.Logits(x), "ref": fg.Logits(x), place: total}
    seen = []

    def lam(stats: fg.TokenStats) -> Tensor:
        x = stats.teacher_logprobs if place == "teacher" else stats.ref_logprobs
        assert x is not None
        seen.append(x)
        return torch.full_like(x, 0.5)

    expected = 1.25 * x.double().log_softmax(1) - 0.25 * y.double().log_softmax(1)
    expected = expected.gather(1, ids[:, None])[:, 0].float()
    for scale in ({"reward_scale": 0.5}, {"reward_scale_fn": lam}):
        out = fg.gopd_loss(fg.Logits(z), **models, token_ids=ids, backend=backend, chunk_size=2, **scale, **options)
        assert_close(getattr(out, f"{place}_logprobs"), expected, 1e-6)
        p, q = (x.double().log_softmax(1).gather(1, ids[:, None])[:, 0].float() for x in (z, x))
        if options["estimator"] == "full":  # a baseline of 1e8 is added to what it is of
            assert_close(out.advantages, 0.5 * expected + 0.5 * q - p, 1e-6)
    if options["estimator"] == "full":
        assert_close(torch.cat(seen), expected, 1e-6)


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_mixture_has_a_bucket_where_one_of_its_models_has_none(tail):
    """Fused and dense, against the formula: the bucket is that of the other model."""
    g = generator(6)
    z, x, y, q = (torch.randn(4, 7, generator=g, dtype=torch.float64) for _ in range(4))
    y[:, 3:] -= 40
    ids = torch.tensor([[0, 1, 2]]).expand(4, 3)
    models = fg.Logits(z), fg.Logits(q), fg.Mixture([fg.Logits(x), fg.Logits(y)], [1.0, 0.5])
    log_p, log_q, log_x, log_y = (a.log_softmax(1) for a in (z, q, x, y))

    def outcomes(log_m: Tensor) -> Tensor:
        return torch.cat((log_m[:, :3].exp(), log_m[:, 3:].exp().sum(1, keepdim=True)), 1)

    u = 1.25 * outcomes(log_q).log() - 0.25 * (outcomes(log_x) + 0.5 * outcomes(log_y)).log()
    log_t = u.log_softmax(1)
    terms = log_t.exp() * (log_t - outcomes(log_p).log())
    expected = terms[:, : 3 if tail == "drop" else 4].sum(1)
    for function in (fg.gopd_loss, reference.gopd_loss):
        out = function(
            *models, estimator="topk", divergence="forward_kl", tail=tail, support_ids=ids, reward_scale=1.25
        )
        assert_close(out.token_loss, expected, 1e-12)
