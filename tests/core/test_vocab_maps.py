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
from costs import Memory, gemm_flops
from fused_gopd import reference
from fused_gopd.loop import gemm
from fused_gopd.loop.chunking import chunk_size_for
from fused_gopd.options import LossCall
from fused_gopd.plan import plan_of
from fused_gopd.vocab_maps import tokens_of_rows

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, V = (2, 5), 37


def floored(objective: dict[str, Any]) -> dict[str, Any]:
    """With a ``logprob_min`` where the student chooses the tokens, which the teacher need not have."""
    chosen = objective.get("support") == "student" or objective.get("tail") == "sampled"
    return {**objective, "logprob_min": -9.0} if chosen or objective["estimator"] == "sampled" else objective


EVERYWHERE = tuple(map(floored, OBJECTIVES))
SAMPLED = floored({"estimator": "sampled"})
TOPK = tuple(
    floored({"estimator": "topk", "k": 5, "tail": tail}) for tail in ("bucket", "drop", "renormalize", "sampled")
)
STUDENTS = tuple(floored({**o, "support": "student"}) for o in TOPK)
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
    objective=(*EVERYWHERE, *TOPK, *STUDENTS),
    models=tuple(MODELS),
    lam=(1.0, 1.25, 0.0),
)
def test_value_and_gradient(backend_dtype, objective, models, lam) -> None:
    assert_same(with_models(MODELS[models], backend_dtype.dtype), backend_dtype, reward_scale=lam, **objective)


@pairwise(
    backend_dtype=("torch-float64", "native-float32"),
    objective=[o for o in (*EVERYWHERE, *STUDENTS) if "k" not in o or "support" in o],
    models=tuple(SUMS),
)
def test_sums_of_models(backend_dtype, objective, models) -> None:
    assert_same(with_models(SUMS[models], backend_dtype.dtype), backend_dtype, reward_scale=1.25, **objective)


@pytest.mark.parametrize(
    "objective", [*EVERYWHERE, *TOPK, *STUDENTS, *JOINT], ids=lambda x: "-".join(map(str, x.values()))
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
    objective=[*(o for o in EVERYWHERE if o["estimator"] == "full"), *JOINT],
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


# ----------------------------------------------------------------------------------------------- what it does not touch


def plain(batch: Batch, **options: Any) -> tuple[Any, list[Tensor]]:
    return run(batch, reward_scale=1.25, **options)


EVERY = ({"estimator": "full"}, *TOPK, SAMPLED, *JOINT)
every = pytest.mark.parametrize("objective", EVERY, ids=lambda x: " ".join(map(str, x.values())))


@every
def test_a_map_of_every_token_to_itself_changes_nothing(objective) -> None:
    """But for rows behind the student's, which count where a model is normalised over its own vocabulary."""
    batch = make_batch(3)

    def with_map(head: fg.LinearHead) -> fg.LinearHead:
        return like(head, vocab_map=torch.arange(V))

    mapped = batch.replaced(teacher=with_map(batch.teacher), ref=with_map(batch.ref))
    (out, grads), (want, want_grads) = plain(mapped, **objective), plain(batch, **objective)
    assert_close(out.token_loss, want.token_loss, 1e-12)
    assert_all_close(grads, want_grads, 1e-12)


@pytest.mark.parametrize("backend_dtype", ["torch-float64", "native-float32"], indirect=True)
@every
@pytest.mark.parametrize("models", ["both", "log-linear"])
def test_any_size_of_chunks(backend_dtype, objective, models, monkeypatch) -> None:
    batch = with_models((MODELS | SUMS)[models], backend_dtype.dtype)
    want, want_grads = plain(batch, backend=backend_dtype.backend, **objective)
    monkeypatch.setattr(gemm, "_SELECTED", {"cpu": 40})  # blocks of a few rows of the weight
    for size in (1, 3):
        out, grads = plain(batch, backend=backend_dtype.backend, chunk_size=size, **objective)
        assert_close(out.token_loss, want.token_loss, backend_dtype.tolerance)
        assert_all_close(grads, want_grads, backend_dtype.tolerance)


@every
def test_masked_tokens_and_rows_that_are_no_token_reach_nothing(objective) -> None:
    batch = with_models(MODELS["both"], torch.float64)
    want, want_grads = plain(batch, **objective)
    teacher, masked = batch.teacher, ~batch.mask
    joint = objective["estimator"] == "full" or "baseline" in objective
    weight = teacher.weight
    if joint:  # a row that counts in no model's normaliser is not read
        weight = weight.clone()
        weight[~torch.isin(torch.arange(len(weight)), teacher.vocab_map)] = math.nan
    broken = like(teacher, weight=weight, hidden=teacher.hidden.masked_fill(masked[..., None], math.nan))
    out, grads = plain(batch.replaced(teacher=broken), **objective)
    assert torch.equal(out.token_loss, want.token_loss)
    assert all(map(torch.equal, grads, want_grads))


@pytest.mark.parametrize("objective", [{"estimator": "full"}, *TOPK[:2], SAMPLED], ids=str)
def test_each_token_under_the_teacher_of_its_route(objective) -> None:
    batch = with_models(MODELS["both"], torch.float64)
    teachers = [batch.teacher, linear_head(21, SHAPE, V, 4, torch.float64), smaller(22, torch.float64)]
    index = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 0, 1, 1]])
    out, grads = plain(batch.replaced(teacher=teachers), teacher_index=index, **objective)
    total = [torch.zeros_like(x) for x in grads]
    live = batch.mask.sum()
    for i, teacher in enumerate(teachers):
        own = batch.replaced(teacher=teacher, mask=batch.mask & (index == i))
        want, want_grads = plain(own, **objective, normalizer=live)
        assert_close(out.token_loss[own.mask], want.token_loss[own.mask], 1e-12)
        total = [a + b for a, b in zip(total, want_grads, strict=True)]
    assert_all_close(grads, total, 1e-12)


@pytest.mark.parametrize("objective", [{"estimator": "full"}, TOPK[0], SAMPLED], ids=str)
def test_recomputed_gradients_and_functional_ones(objective) -> None:
    batch = with_models(MODELS["both"], torch.float64)
    upstream = torch.linspace(-1, 2, 10, dtype=torch.float64).reshape(SHAPE)
    found = []
    for function in (fg.gopd_loss, reference.gopd_loss):
        call = {"mask": batch.mask, "reward_scale": 1.25, "reduction": "none", **objective}
        out = function(*batch.models, batch.token_ids, **call)
        found.append(torch.autograd.grad(out.loss, batch.leaves, upstream))
    assert_all_close(*found, 1e-12)

    def loss(hidden: Tensor) -> Tensor:
        student = like(batch.student, hidden=hidden)
        call = {"mask": batch.mask, "reward_scale": 1.25, **objective}
        return fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, **call).loss

    _, (want, *_) = plain(batch, **objective)
    assert_close(torch.func.grad(loss)(batch.student.hidden.detach()), want, 1e-12)


@pytest.mark.parametrize("objective", [*EVERYWHERE, *TOPK], ids=lambda x: " ".join(map(str, x.values())))
def test_a_student_may_have_a_bias_of_minus_infinity(objective, backend_dtype) -> None:
    """Tokens that it never says, which is what a model that has no row for them is."""
    dtype, wide = backend_dtype.dtype, spread(with_models(MODELS["both"], torch.float64))
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in wide.student.tensors.items()}
    frozen = {name: fg.Logits(getattr(wide, name).logits.to(dtype)) for name in ("teacher", "ref")}
    batch = wide.replaced(student=like(wide.student, **leaves), **frozen)
    out, (hidden, weight, bias) = plain(batch, backend=backend_dtype.backend, **objective)
    want, want_grads = expect(batch, reward_scale=1.25, **objective)
    assert_close(out.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close((hidden, weight, bias), want_grads, backend_dtype.tolerance)
    assert not weight[V:].any()
    assert not bias[V:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objective", [{"estimator": "full"}, TOPK[0], SAMPLED], ids=str)
def test_low_precision(dtype, objective, backend) -> None:
    """The same bits of hidden states and weights in float64: products of the two are exact in float32, sums are not."""
    batch = with_models(MODELS["both"], dtype)
    out, _ = plain(batch, backend=backend, **objective)
    wide = batch.replaced(**{name: widened(getattr(batch, name)) for name in ("student", "teacher", "ref")})
    want, _ = plain(wide, **objective)
    assert_close(out.token_loss, want.token_loss, 2e-5)


def test_float32_master_weights_of_a_mapped_teacher() -> None:
    batch = with_models(MODELS["both"], torch.bfloat16)
    master = like(batch.teacher, weight=batch.teacher.weight.float())
    for objective in ({"estimator": "full"}, TOPK[0]):
        out, want = (plain(x, **objective)[0] for x in (batch.replaced(teacher=master), batch))
        assert torch.equal(out.token_loss, want.token_loss)


@pytest.mark.parametrize("objective", [{"estimator": "full"}, TOPK[0], SAMPLED], ids=str)
def test_compiled_and_eager_give_the_same_bits(objective) -> None:
    torch._dynamo.reset()
    batch = with_models(SUMS["log-linear"], torch.float32)

    def call(student: Any, teacher: Any, ref: Any, ids: Tensor, mask: Tensor) -> Any:
        return fg.gopd_loss(student, teacher, ref, ids, mask=mask, reward_scale=1.25, **objective)

    want, want_grads = run(batch, lambda *x, mask: call(*x, mask))
    got, grads = run(batch, lambda *x, mask: torch.compile(call, fullgraph=True, backend="aot_eager")(*x, mask))
    assert torch.equal(got.token_loss, want.token_loss)
    assert all(map(torch.equal, grads, want_grads))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ what the page says


def test_the_students_logits_outside_have_no_gradient_of_full() -> None:
    batch = with_models(MODELS["both"], torch.float64)
    outside = (batch.teacher.vocab_map < 0) | (batch.ref.vocab_map < 0)
    assert 0 < outside.sum() < V
    logits = batch.student.hidden.detach() @ batch.student.weight.detach().T
    for objective in ({"estimator": "full"}, {"estimator": "full", "divergence": "jsd"}):
        student = fg.Logits(logits.clone().requires_grad_())
        _, (gradient,) = plain(batch.replaced(student=student), **objective)
        assert torch.equal(gradient[..., outside], torch.zeros_like(gradient[..., outside]))
        assert gradient.sum(-1).abs().max() < 1e-15  # nor has the mass inside
    student = fg.Logits(logits.clone().requires_grad_())
    _, (gradient,) = plain(batch.replaced(student=student), estimator="topk", k=5)
    assert (gradient[..., outside].abs().sum(-1) > 0)[batch.mask].all()


def test_the_mass_in_common_follows_from_the_outputs() -> None:
    batch = with_models(MODELS["larger"], torch.float64)
    rows, student, teacher = batch.teacher.vocab_map, batch.student, batch.teacher
    ids = (rows >= 0).nonzero()[:, 0][:10].reshape(SHAPE)
    out = fg.gopd_loss(student, teacher, token_ids=ids, estimator="full")
    p = oracle.logits_of(widened(student)).softmax(-1)
    q = oracle.logits_of(widened(teacher)).softmax(-1)
    ours = (fg.token_logprobs(student, ids) - out.student_logprobs).exp()
    assert_close(ours, p[..., rows >= 0].sum(-1), 1e-12)
    own = like(teacher, vocab_map=None)
    theirs = (fg.token_logprobs(own, rows[ids]) - out.teacher_logprobs).exp()
    assert_close(theirs, q[..., rows[rows >= 0]].sum(-1), 1e-12)


def test_a_student_does_not_leave_what_the_teacher_knows() -> None:
    """A sampled token without a row that adds nothing is better than one that the teacher finds unlikely."""
    call = {"token_ids": torch.zeros(SHAPE, dtype=torch.int64)}
    student, teacher = make_batch(0).student, larger(1, torch.float64)
    for what, options in (
        ("estimator='sampled'", {}),
        ("tail='sampled'", {"estimator": "topk", "k": 3, "tail": "sampled"}),
        ("support='student'", {"estimator": "topk", "k": 3, "support": "student"}),
        ("support_ids", {"estimator": "topk", "support_ids": torch.zeros(*SHAPE, 1, dtype=torch.int64)}),
    ):
        message = f"logprob_min must be given for {what}, since teacher.* has a vocab_map"
        for model in (teacher, fg.LogLinear([teacher])):
            with pytest.raises(ValueError, match=message):
                fg.gopd_loss(student, model, **call, **options)
        fg.gopd_loss(student, teacher, **call, **options, logprob_min=-20.0)
    fg.gopd_loss(student, student, teacher, **call)  # lambda cancels the reference


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "topk", "k": 20},
        {"estimator": "sampled", "logprob_min": -20.0},
        {"estimator": "topk", "k": 8, "tail": "sampled", "logprob_min": -20.0},
    ],
    ids=str,
)
def test_training_moves_mass_to_what_the_teacher_knows(options) -> None:
    g = generator(0)
    rows = torch.full((50,), -1)
    rows[:30] = torch.randperm(70, generator=g)[:30]
    logits, theirs = torch.randn(16, 50, generator=g), 3 * torch.randn(16, 70, generator=g)
    logits[:, 30:] += 2
    teacher, before = fg.Logits(theirs, vocab_map=rows), logits.softmax(-1)[:, :30].sum(-1).mean()

    def trained(teacher: fg.Logits, logits: Tensor = logits, **options: Any) -> Tensor:
        """The student's mass on the teacher's tokens."""
        z = logits.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=0.1)
        for _ in range(60):
            ids = torch.multinomial(z.detach().softmax(-1), 1, generator=g)[:, 0]
            fg.gopd_loss(fg.Logits(z), teacher, token_ids=ids, **options).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return z.detach().softmax(-1)[:, :30].sum(-1).mean()

    assert trained(teacher, **options) > before + 0.2
    if options["estimator"] == "sampled":  # why there has to be a bound
        likely = logits + 3 * (rows >= 0)
        unbounded = fg.Logits(5 * theirs[:, rows.clamp_min(0)].masked_fill(rows < 0, -math.inf))
        start = likely.softmax(-1)[:, :30].sum(-1).mean()  # 0.79
        assert trained(unbounded, likely, estimator="sampled") < start - 0.25  # 0.47


def test_scores_of_a_server_by_its_own_ids() -> None:
    """The inverse of a map for the ids of :class:`fused_gopd.TopKLogProbs`."""
    batch = with_models(MODELS["larger"], torch.float64).replaced(ref=None)
    rows, own = batch.teacher.vocab_map, like(batch.teacher, vocab_map=None)
    ids, logprobs = fg.token_topk(own, 12)
    ours = tokens_of_rows(rows, own.own_size)[ids]
    assert (ours < 0).any()
    listed = fg.TopKLogProbs(ours, logprobs)
    out, grads = run(batch.replaced(teacher=listed), estimator="topk")
    want, want_grads = run(batch, estimator="topk", support_ids=ours, logprob_min=-1e4)
    assert_close(out.token_loss, want.token_loss, 1e-10)  # the rest as 1 minus a sum
    assert_all_close(grads, want_grads, 1e-10)


@pytest.mark.parametrize("objective", [{"estimator": "full"}, TOPK[0], SAMPLED], ids=str)
@pytest.mark.parametrize("models", ["both", "log-linear"])
def test_functions_of_the_caller_and_cancelled_models(objective, models) -> None:
    batch = with_models((MODELS | SUMS)[models], torch.float64)
    seen: list[dict[str, Any]] = []

    def scale(stats: Any) -> Tensor:
        names = ["teacher_logprobs", "ref_logprobs", "ref_entropy", "student_entropy"]
        names += [] if objective["estimator"] == "sampled" else ["kl_teacher", "kl_ref"]
        seen.append({name: getattr(stats, name) for name in names})
        return torch.linspace(-1, 2, len(stats.index), dtype=torch.float64)

    for f in (None, reference.gopd_loss):
        run(batch, f, reward_scale_fn=scale, **objective)
    for name in seen[0]:
        got, want = (x[name].masked_fill(x[name].isinf(), 0) for x in seen)
        assert_close(got, want, 1e-12, name)
    for lam, name in ((1.0, "ref_logprobs"), (0.0, "teacher_logprobs")):
        out, want = (
            run(batch, f, reward_scale=lam, score_cancelled=True, **objective)[0] for f in (None, reference.gopd_loss)
        )
        assert_close(getattr(out, name), getattr(want, name), 1e-12, name)


# ------------------------------------------------------------------------------------------------------ memory and work


def large(dtype: torch.dtype) -> Batch:
    shape, size, width = (64,), 4096, 512
    rows = torch.randperm(size, generator=generator(1))[:3000]
    batch = make_batch(5, shape=shape, vocab=(3000, size, 3000), hidden=(16, width, 16), dtype=dtype, masked=False)
    return batch.replaced(teacher=like(batch.teacher, vocab_map=rows.masked_fill(rows < 500, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [{"estimator": "full"}, TOPK[0], SAMPLED], ids=str)
def test_no_copy_of_the_weight(objective, dtype, monkeypatch) -> None:
    """Blocks of it, of 2^20 elements and no more: here of 64 rows."""
    monkeypatch.setattr(gemm, "_SELECTED", {"cpu": 64 * 512})
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 64 * 512)
    batch = large(dtype)
    call = lambda: run(batch, reward_scale=1.25, chunk_size=16, **objective)  # noqa: E731
    call()
    weight, logits = batch.teacher.weight, 16 * 4096 * 4
    unmapped = Memory(lambda: run(batch.replaced(teacher=batch.ref), chunk_size=16, **objective)).peak
    assert Memory(call).peak - unmapped < 2 * logits < weight.nbytes // 4


def test_products_over_the_common_rows_alone() -> None:
    """``full`` multiplies with as many rows as the student has; ``topk`` and ``sampled`` with all of the teacher's."""
    batch = large(torch.float32)
    N, (rows, width) = 64, batch.teacher.weight.shape
    student = 2 * N * 3000 * 16
    for objective, count in (({"estimator": "full"}, 3000), (TOPK[0], rows), (SAMPLED, rows)):
        work = gemm_flops(lambda o=objective: run(batch.replaced(ref=None), **o))
        assert work == 3 * student + 2 * N * count * width


def test_chunks_have_room_for_the_rows_of_a_model_alone() -> None:
    teacher = fg.LinearHead(torch.zeros(1, 4), torch.zeros(8 * 32_000, 4), vocab_map=torch.arange(32_000))
    student = fg.LinearHead(torch.zeros(1, 4), torch.zeros(32_000, 4, requires_grad=True))

    def size(teacher: Any, **options: Any) -> int:
        call = LossCall(student, teacher, token_ids=torch.zeros(1, dtype=torch.int64), **options)
        chunks = plan_of(call).chunk_sizes
        assert chunks is not None
        return chunks[0]

    plain_teacher = fg.LinearHead(torch.zeros(1, 4), torch.zeros(32_000, 4))
    assert size(teacher, estimator="full") == size(plain_teacher, estimator="full")
    wide = fg.LinearHead(torch.zeros(1, 4), torch.zeros(8 * 32_000, 4))
    for options in ({"estimator": "topk", "k": 4}, SAMPLED):
        assert size(teacher, **options) == chunk_size_for(8 * 32_000, 1, "cpu")
    both = fg.LogLinear([teacher, plain_teacher])
    assert size(both, estimator="full") == chunk_size_for(8 * 32_000, 3, "cpu")
    assert wide.own_size == teacher.own_size


# --------------------------------------------------------------------------------------------------------------- errors


def of(rows: Any, size: int = 50, **options: Any) -> Any:
    teacher = fg.LinearHead(torch.zeros(*SHAPE, 3), torch.zeros(size, 3), vocab_map=rows)
    student = fg.LinearHead(torch.zeros(*SHAPE, 3), torch.zeros(V, 3))
    return fg.gopd_loss(student, teacher, token_ids=torch.zeros(SHAPE, dtype=torch.int64), estimator="full", **options)


def test_wrong_maps() -> None:
    right = torch.arange(V)
    of(right)
    for rows, error, message in (
        ([1], TypeError, "vocab_map must be a torch.Tensor or None, got list"),
        (right.int(), TypeError, "vocab_map must be int64, got torch.int32"),
        (right.double(), TypeError, "vocab_map must be int64, got torch.float64"),
        (right[None], ValueError, r"vocab_map must have shape \(V,\), one entry .*, got \(1, 37\)"),
        (right[:0], ValueError, r"vocab_map must have shape \(V,\), .*, got \(0,\)"),
        (right.to("meta"), ValueError, "vocab_map must be on the model's device cpu, got meta"),
        (right + 14, IndexError, r"teacher.vocab_map must be in \[0, 50\), the rows of that model, .*, got 50"),
        (right - 2, IndexError, r"teacher.vocab_map must be in \[0, 50\), .* or -1 for none, got -2"),
        (right.clamp_min(1), ValueError, "teacher.vocab_map must have no row twice, which would count twice, got 1"),
        (right * 0 - 1, ValueError, "teacher.vocab_map must have a row for at least one of the 37 tokens of the joint"),
    ):
        with pytest.raises(error, match=message):
            of(rows)
    with pytest.raises(ValueError, match=r"at least one of the 5 tokens of the joint vocabulary, all are -1"):
        of(right.masked_fill(right < 5, -1), vocab_size=5)


def test_names_of_models_in_a_list_or_a_sum() -> None:
    batch = with_models(MODELS["both"], torch.float64)
    wrong = like(batch.teacher, vocab_map=batch.teacher.vocab_map.clamp_min(0))
    call = lambda teacher, **options: run(batch.replaced(teacher=teacher), estimator="full", **options)  # noqa: E731
    index = torch.zeros(SHAPE, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"teacher\[1\].models\[0\].vocab_map must have no row twice"):
        call([batch.teacher, fg.LogLinear([wrong])], teacher_index=index)
    with pytest.raises(ValueError, match=r"ref.vocab_map must have no row twice"):
        run(batch.replaced(ref=wrong), estimator="full", reward_scale=2.0)


def test_a_map_is_of_a_frozen_model() -> None:
    batch = with_models(MODELS["larger"], torch.float64)
    head = batch.teacher
    for name, call in (
        ("student", lambda: fg.gopd_loss(head, head, token_ids=batch.token_ids)),
        ("student", lambda: reference.gopd_loss(head, head, token_ids=batch.token_ids)),
        ("head", lambda: fg.token_logprobs(head, batch.token_ids)),
        ("head", lambda: fg.token_topk(head, 3)),
        ("head", lambda: fg.selected_logprobs(head, batch.token_ids[..., None])),
        ("head", lambda: fg.linear_nll(head, batch.token_ids)),
        ("student", lambda: torch.compile(fg.gopd_loss, backend="eager")(head, head, token_ids=batch.token_ids)),
    ):
        with pytest.raises(ValueError, match=f"{name} has a vocab_map, which says of a teacher or reference"):
            call()


def test_a_map_shows_and_follows_the_tokens() -> None:
    head = larger(1, torch.float64)
    assert "vocab_map: (37,) int64" in repr(head)
    assert head[:, 1:].vocab_map is head.vocab_map
    assert (head.vocab_size, head.own_size) == (V, 61)
    logits = logits_head(1, SHAPE, 50, torch.float64, vocab_map=vocab_map(1, 50))
    assert (logits.vocab_size, logits.own_size) == (V, 50)
    assert set(logits.tensors) == {"logits", "vocab_map"}


@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize", "sampled"])
def test_a_lower_bound_lists_no_token_that_the_teacher_does_not_have(tail: str) -> None:
    """Of three tokens with a row the five likeliest are three, whatever log-prob the bound would give to others."""
    batch = with_models(MODELS["larger"], torch.float64)
    rows = torch.full((V,), -1)
    rows[[3, 8, 30]] = torch.tensor([9, 1, 60])
    teacher = like(batch.teacher, vocab_map=rows)
    options = {"estimator": "topk", "tail": tail, "reward_scale": 1.25, "logprob_min": -2.0}
    given = options | {"support_ids": rows.new_tensor([3, 8, 30]).expand(*SHAPE, 3)}
    out, grads = run(batch.replaced(teacher=teacher), backend="torch", k=5, **options)
    expected, wanted = run(batch.replaced(teacher=teacher), backend="torch", **given)
    assert_close(out.token_loss, expected.token_loss, 1e-12)
    assert_all_close(grads, wanted, 1e-12)
    dense, _ = run(batch.replaced(teacher=teacher), reference.gopd_loss, k=5, **options)
    assert_close(dense.token_loss, expected.token_loss, 1e-9)


def test_labels_beside_full_are_of_the_whole_vocabulary_or_refused(backend_dtype: Any) -> None:
    """Over C a label without a row would add nothing, silently."""
    batch = with_models(MODELS["larger"], backend_dtype.dtype)
    labels = torch.arange(batch.token_ids.numel()).view(SHAPE) * 3
    labels[0, 0] = int((batch.teacher.vocab_map < 0).nonzero()[0])
    options = {"reward_scale": 1.25, "backend": backend_dtype.backend, "sft_labels": labels, "sft_weight": 0.5}
    with pytest.raises(
        ValueError, match=r"sft_temperature must be given .* teacher has a vocab_map.*sft_temperature=1 "
    ):
        run(batch, estimator="full", **options)
    with pytest.raises(ValueError, match="sft_temperature must be given for sft_labels and baseline='expected'"):
        run(batch, estimator="sampled", baseline="expected", **options)
    out, grads = run(batch, estimator="full", sft_temperature=1.0, **options)
    alone, without = run(batch, estimator="full", reward_scale=1.25, backend=backend_dtype.backend)
    wide = batch.replaced(student=widened(batch.student))
    live = batch.mask.double() / batch.mask.sum()
    logprobs = oracle.logits_of(wide.student).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    loss = -0.5 * (logprobs * live).sum()
    assert_close(out.loss, alone.loss.double() + loss.detach(), backend_dtype.tolerance)
    expected = [x.double() + y for x, y in zip(without, torch.autograd.grad(loss, wide.leaves), strict=True)]
    assert_all_close(grads, expected, backend_dtype.tolerance)
