"""``reward_scale_fn``: lambda of each token from the statistics of the same pass, for every estimator."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fused_gopd as fg
import oracle
from builders import (
    OBJECTIVES,
    REDUCTIONS,
    assert_all_close,
    assert_close,
    expect,
    like,
    make_batch,
    minus_inf_batch,
    run,
    trainable,
    widened,
)
from combinations import product_on_float64

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 5)
BASELINE = {"estimator": "sampled", "baseline": "expected"}
TAIL_SAMPLED = {"estimator": "topk", "k": 3, "tail": "sampled"}
EVERY = (*OBJECTIVES, BASELINE, TAIL_SAMPLED)
LOGITS_TOGETHER = (*OBJECTIVES[1:5], BASELINE)
ids = lambda o: "-".join(map(str, o.values()))  # noqa: E731


def of_everything(stats) -> torch.Tensor:
    """Between -3 and 10, from every statistic that all estimators have."""
    x = stats.student_entropy - 0.5 * stats.teacher_entropy + 0.2 * stats.ref_entropy
    x = x + 0.1 * (stats.teacher_logprobs - stats.ref_logprobs) + 0.05 * stats.student_logprobs
    return 3.5 + 6.5 * torch.tanh(x)


def with_divergences(stats) -> torch.Tensor:
    return of_everything(stats) * torch.sigmoid(stats.kl_teacher - stats.kl_ref)


def scales(batch, function, support=None) -> torch.Tensor:
    """Lambda of the token shape by the oracle's statistics, in the dtype of the outputs."""
    stats = oracle.token_stats(*map(widened, batch.models), batch.token_ids, support)
    lam = function(SimpleNamespace(**stats)).reshape(batch.token_ids.shape)
    return lam.to(batch.student.rows.dtype)


def largest(head, k: int) -> list[list[int]]:
    z = oracle.logits_of(widened(head)).detach()
    return z.reshape(-1, z.shape[-1]).topk(k).indices.tolist()


def function_of(objective, batch):
    """The function, and the lambda that it is to give."""
    if objective == TAIL_SAMPLED or objective == {"estimator": "sampled"}:
        return of_everything, scales(batch, of_everything)
    if objective["estimator"] == "topk":
        support = largest(getattr(batch, objective.get("support", "teacher")), objective["k"])
        return with_divergences, scales(batch, with_divergences, support)
    return with_divergences, scales(batch, with_divergences)


@product_on_float64(objective=EVERY, kind=("linear", "logits"), reduction=("token-mean", "none"))
def test_lambda_is_what_the_function_makes_of_the_statistics(backend_dtype, objective, kind, reduction):
    """Value, gradient and every field: as with a tensor of what it gives for the oracle's statistics."""
    dtype = backend_dtype.dtype
    batch = make_batch(31, shape=SHAPE, kinds=(kind, "linear", "logits"), dtype=dtype, scale=1.5)
    function, lam = function_of(objective, batch)
    options = {"reduction": reduction, "backend": backend_dtype.backend, **objective}
    out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale_fn=function, **options)
    assert_close(out.reward_scale, lam * batch.mask, backend_dtype.tolerance, "lambda")
    grads = torch.autograd.grad(out.loss.sum(), batch.leaves)
    want, want_grads = expect(batch, reward_scale=out.reward_scale.double(), reduction="sum", **objective)
    divisor = batch.mask.sum() if reduction == "token-mean" else 1
    assert_close(out.token_loss, want.token_loss, backend_dtype.tolerance, "token_loss")
    assert_all_close(grads, [g / divisor for g in want_grads], backend_dtype.tolerance)
    with_tensor = fg.gopd_loss(
        *batch.models, batch.token_ids, mask=batch.mask, reward_scale=out.reward_scale, **options
    )
    assert out.metrics().keys() == with_tensor.metrics().keys()
    for name, x in with_tensor.metrics().to_dict().items():
        assert float(out.metrics()[name]) == pytest.approx(x, rel=1e-4, abs=1e-5), name


@given(
    seed=st.integers(0, 10_000),
    objective=st.sampled_from(EVERY),
    reduction=st.sampled_from(REDUCTIONS),
    chunk=st.integers(1, 20),
    labels=st.booleans(),
    packed=st.booleans(),
    weighted=st.booleans(),
)
def test_any_objective_any_reduction_any_chunk(seed, objective, reduction, chunk, labels, packed, weighted):
    batch = make_batch(seed, shape=(15,) if packed else SHAPE)
    function, lam = function_of(objective, batch)
    options = {"reduction": reduction, **objective}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 4, 4 + seed % 9, 15])
    if labels:
        options["sft_labels"] = batch.token_ids
    if weighted:
        options["token_weight"] = torch.linspace(0, 2, 15, dtype=torch.float64).reshape(batch.token_ids.shape)
    out, grads = run(batch, backend="torch", chunk_size=chunk, reward_scale_fn=function, **options)
    want, want_grads = expect(batch, reward_scale=lam, **options)
    assert_close(out.reward_scale, lam.masked_fill(~batch.mask, 0), 1e-11)
    assert_close(out.token_loss, want.token_loss, 1e-11)
    assert_all_close(grads, want_grads, 1e-11)
    dense, dense_grads = run(batch, fg.reference.gopd_loss, reward_scale_fn=function, **options)
    assert_close(dense.reward_scale, out.reward_scale, 1e-11)
    assert_close(dense.token_loss, want.token_loss, 1e-11)
    assert_all_close(dense_grads, want_grads, 1e-11)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o["estimator"] != "sampled"], ids=ids)
def test_a_function_that_looks_up_a_tensor_gives_the_same_bits(objective, backend):
    """``sampled`` makes its advantages in PyTorch then, which rounds elsewhere than the kernel."""
    batch = make_batch(32, shape=SHAPE, dtype=torch.float32)
    lam = torch.linspace(-3, 10, 15).reshape(SHAPE)
    lam[0, 0], lam[1, 1] = 0, 1
    options = {"backend": backend, "chunk_size": 4, **objective}
    got, grads = run(batch, reward_scale_fn=lambda s: lam.reshape(-1)[s.index], **options)
    want, want_grads = run(batch, reward_scale=lam, **options)
    assert torch.equal(got.token_loss, want.token_loss)
    assert torch.equal(got.reward_scale, lam * batch.mask)
    assert all(map(torch.equal, grads, want_grads))


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("objective", EVERY, ids=ids)
@pytest.mark.parametrize("student", ["linear", "logits"])
def test_it_is_called_once_per_chunk_whatever_backwards_follow(student, objective, reduction, backend):
    batch = make_batch(33, shape=(10,), kinds=(student, "linear", "linear"), dtype=torch.float32, masked=False)
    calls: list[int] = []

    def function(stats: fg.TokenStats) -> torch.Tensor:
        calls.append(stats.index.shape[0])
        return stats.student_entropy + len(calls)  # another value every time

    out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale_fn=function, chunk_size=4, reduction=reduction,
                       backend=backend, **objective)  # fmt: skip
    assert sum(calls) == 10
    assert len(calls) == 3
    every = [torch.autograd.grad(out.loss.sum(), batch.leaves, retain_graph=True) for _ in range(3)]
    assert len(calls) == 3
    for more in every[1:]:
        assert all(torch.equal(a, b) for a, b in zip(every[0], more, strict=True))
    options = {"reward_scale": out.reward_scale, "chunk_size": 4, "reduction": reduction, "backend": backend}
    want = fg.gopd_loss(*batch.models, batch.token_ids, **options, **objective)
    assert_close(out.token_loss, want.token_loss, 1e-6)
    assert_all_close(every[0], torch.autograd.grad(want.loss.sum(), batch.leaves), 1e-6)


def test_both_functions_together(backend_dtype):
    """The advantage that the second one gets has the first one's lambda; both see the same statistics."""
    batch = make_batch(34, shape=SHAPE, dtype=backend_dtype.dtype)
    old = torch.linspace(-3, -1, 15, dtype=backend_dtype.dtype).reshape(SHAPE)
    seen: list[fg.TokenStats] = []

    def advantage(stats: fg.TokenStats) -> torch.Tensor:
        seen.append(stats)
        return stats.advantages.tanh()

    options = {"backend": backend_dtype.backend, "old_logprobs": old}
    out, grads = run(batch, reward_scale_fn=of_everything, advantage_fn=advantage, **options)
    want, want_grads = run(batch, reward_scale=out.reward_scale, advantage_fn=advantage, **options)
    assert_close(out.advantages, want.advantages, 1e-6)
    assert_all_close(grads, want_grads, 1e-6)
    assert torch.equal(seen[0].reward_scale, out.reward_scale[batch.mask])
    assert seen[0].kl_teacher is None


def test_what_each_estimator_has():
    batch = make_batch(35, shape=(4,), masked=False)
    names = [f for f in fg.TokenStats.__dataclass_fields__ if f not in ("index", "advantages", "reward_scale")]

    def there(models=batch.models, **options) -> set[str]:
        found: set[str] = set()

        def function(stats: fg.TokenStats) -> torch.Tensor:
            assert stats.advantages is None
            with pytest.raises(ValueError, match="reward_scale of TokenStats is what a reward_scale_fn is to return"):
                stats.reward_scale  # noqa: B018
            found.update(name for name in names if getattr(stats, name) is not None)
            return torch.ones_like(stats.student_entropy)

        fg.gopd_loss(*models, batch.token_ids, reward_scale_fn=function, **options)
        fused, found = found, set()
        fg.reference.gopd_loss(*models, batch.token_ids, reward_scale_fn=function, **options)
        assert fused == found
        return fused

    divergences, old = {"kl_teacher", "kl_ref"}, {"old_logprobs"}
    every = set(names)
    assert there() == every - divergences - old
    assert there(estimator="full") == every - old
    assert there(**BASELINE, old_logprobs=-torch.ones(4)) == every
    assert there(estimator="topk", k=3) == every - old
    scores = fg.TokenLogProbs(-torch.rand(4, dtype=torch.float64))
    assert there((batch.student, scores, batch.ref)) == every - divergences - old - {"teacher_entropy"}
    assert there(estimator="topk", k=3, tail="sampled") == every - divergences - old
    listed = fg.TopKLogProbs(*fg.token_topk(batch.teacher, 5))
    server = every - old - {"teacher_entropy", "teacher_logprobs"}
    assert there((batch.student, listed, batch.ref), estimator="topk") == server


def test_nothing_is_computed_that_is_not_read(monkeypatch):
    """A pass over the logits for each statistic that is read, of the models concerned, and none otherwise."""
    from fused_gopd.rowops.torch import TorchRowOps

    batch, passes = make_batch(36, shape=(6,), masked=False), []
    before = TorchRowOps.statistics

    def counted(self, problem, out=None):
        passes.append(1 + (problem.teacher is not None) + (problem.ref is not None))
        return before(self, problem, out)

    monkeypatch.setattr(TorchRowOps, "statistics", counted)

    def models_read(function, **options) -> list[int]:
        passes.clear()
        fg.gopd_loss(*batch.models, batch.token_ids, reward_scale_fn=function, backend="torch", **options)
        return list(passes)

    nothing = lambda s: torch.ones(6, dtype=torch.float64)  # noqa: E731
    for options in ({"estimator": "full"}, BASELINE):
        assert models_read(nothing, **options) == [3]
        assert models_read(lambda s: s.student_entropy + s.student_logprobs, **options) == [1, 3]
        assert models_read(lambda s: s.kl_teacher, **options) == [2, 3]
        assert models_read(lambda s: s.kl_teacher + s.kl_ref + s.ref_entropy, **options) == [2, 2, 1, 3]
    assert models_read(nothing) == models_read(of_everything)
    topk = {"estimator": "topk", "k": 3}
    assert models_read(nothing, **topk) == models_read(lambda s: s.student_entropy + s.ref_entropy, **topk)


@pytest.mark.parametrize("objective", LOGITS_TOGETHER, ids=ids)
def test_each_model_is_normalised_over_its_own_support(objective, backend_dtype):
    """-inf in different places of the three models, and one row that nobody has."""
    batch = minus_inf_batch(dtype=backend_dtype.dtype)
    seen: dict[str, torch.Tensor] = {}

    def function(stats: fg.TokenStats) -> torch.Tensor:
        for name in ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "kl_teacher"):
            seen[name] = getattr(stats, name).clone()
        return torch.linspace(0, 1, 6, dtype=backend_dtype.dtype)

    out, grads = run(batch, reward_scale_fn=function, backend=backend_dtype.backend, **objective)
    stats = oracle.token_stats(*map(widened, (batch.student, batch.teacher, batch.teacher)), batch.token_ids)
    for name, x in seen.items():
        assert_close(x, stats[name], backend_dtype.tolerance, name)
    options = {"backend": backend_dtype.backend, **objective}
    want, want_grads = run(batch, reward_scale=out.reward_scale, **options)
    assert_close(out.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


@pytest.mark.parametrize("fill", [-math.inf, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("model", ["student", "teacher", "ref"])
@pytest.mark.parametrize("objective", EVERY, ids=ids)
def test_masks_in_any_one_model_and_lambda_from_minus_3_to_10(objective, model, fill, backend):
    """Finite wherever the float64 reference with the same lambda is; weights of 0 and 1e4 beside it."""
    batch = make_batch(37, shape=(14,), kinds=("logits",) * 3, dtype=torch.float32, masked=False)
    with torch.no_grad():
        getattr(batch, model).logits[::2, 3:6] = fill
    lam = torch.linspace(-3, 10, 14)
    lam[4], lam[8] = 0, 1
    weight = torch.tensor([0.0, 1e4]).repeat(7)

    def function(stats: fg.TokenStats) -> torch.Tensor:
        read = (stats.student_entropy, stats.teacher_entropy, stats.ref_entropy)
        assert not any(x.isnan().any() for x in read)
        assert not any(x.isnan().any() for x in (stats.kl_teacher, stats.kl_ref) if x is not None)
        return lam[stats.index]

    out, grads = run(batch, reward_scale_fn=function, token_weight=weight, backend=backend, chunk_size=5, **objective)
    wide = [widened(m) for m in batch.models]
    want = fg.reference.gopd_loss(*wide, batch.token_ids, reward_scale=lam.double(), token_weight=weight.double(),
                                  **objective)  # fmt: skip
    want_grads = torch.autograd.grad(want.loss, [wide[0].logits])
    assert want.loss.isfinite()
    assert not out.loss.isnan()
    assert not out.token_loss.isnan().any()
    for a, b in zip(grads, want_grads, strict=True):
        assert (a.isfinite() | ~b.isfinite()).all()


@pytest.mark.parametrize("objective", [{"estimator": "full"}, {"estimator": "topk", "k": 4}, {}], ids=ids)
def test_several_teachers(objective, backend_dtype):
    """The statistics are those of a token's own teacher and reference."""
    batch = make_batch(38, shape=SHAPE, dtype=backend_dtype.dtype)
    other = make_batch(39, shape=SHAPE, dtype=backend_dtype.dtype)
    index = torch.arange(15).reshape(SHAPE) % 2
    function = of_everything if not objective else with_divergences
    options = {"backend": backend_dtype.backend, "reduction": "sum", **objective}
    several = batch.replaced(teacher=[batch.teacher, other.teacher], ref=[batch.ref, other.ref])
    out, grads = run(several, reward_scale_fn=function, teacher_index=index, chunk_size=4, **options)
    alone = [
        run(batch.replaced(teacher=q, ref=r, mask=batch.mask & (index == i)), reward_scale_fn=function, **options)
        for i, (q, r) in enumerate(zip(several.teacher, several.ref, strict=True))
    ]
    tolerance = backend_dtype.tolerance
    assert_close(out.reward_scale, sum(each.reward_scale for each, _ in alone), tolerance)
    assert_close(out.token_loss, sum(each.token_loss for each, _ in alone), tolerance)
    assert_all_close(grads, [a + b for a, b in zip(alone[0][1], alone[1][1], strict=True)], tolerance)


def test_logprob_min_holds_for_what_the_function_sees():
    batch = make_batch(40, shape=(6,), kinds=("logits",) * 3, masked=False)
    with torch.no_grad():
        batch.teacher.logits[1, batch.token_ids[1]] = -math.inf
    for more in ({}, {"baseline": "expected"}):
        seen: list[float] = []
        function = lambda s, seen=seen: (seen.append(float(s.teacher_logprobs[1])), s.student_entropy)[1]  # noqa: E731
        out, grads = run(batch, reward_scale_fn=function, logprob_min=-20.0, **more)
        assert seen == [-20.0]
        assert out.loss.isfinite()
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("objective", [{"estimator": "full"}, {"estimator": "topk", "k": 5}, {}], ids=ids)
def test_float16_under_a_loss_scale(objective, backend):
    batch = make_batch(41, shape=(8,), dtype=torch.float16, masked=False)
    lam = torch.linspace(-3, 10, 8)
    options = {"reward_scale_fn": lambda s: lam[s.index], "backend": backend, "normalizer": 1e4, **objective}
    wide = batch.replaced(
        student=trainable(like(batch.student, **{k: v.detach().float() for k, v in batch.student.tensors.items()})),
        teacher=like(batch.teacher, **{k: v.float() for k, v in batch.teacher.tensors.items()}),
        ref=like(batch.ref, **{k: v.float() for k, v in batch.ref.tensors.items()}),
    )
    results = []
    for each in (batch, wide):
        out = fg.gopd_loss(*each.models, batch.token_ids, **options)
        results.append(torch.autograd.grad(1024 * out.loss, each.leaves))
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        assert_close(got, want, 2e-3)  # products of float16 operands


def test_without_token_ids_the_divergences_are_there(backend_dtype):
    batch = make_batch(42, shape=SHAPE, dtype=backend_dtype.dtype).replaced(token_ids=None)
    for options in ({"estimator": "full"}, {"estimator": "topk", "k": 6}):
        out, _ = run(batch, reward_scale_fn=lambda s: 1 + s.kl_teacher.sqrt(), backend=backend_dtype.backend, **options)
        assert out.reward_scale[batch.mask].gt(1).all()
        for function in (fg.gopd_loss, fg.reference.gopd_loss):
            with pytest.raises(ValueError, match="token_ids must be given for teacher_logprobs of TokenStats"):
                run(batch, function, reward_scale_fn=lambda s: s.teacher_logprobs, **options)


def test_what_was_not_read_is_gone_afterwards():
    batch, seen = make_batch(43, shape=(6,), masked=False), []
    function = lambda s: (seen.append(s), s.student_entropy)[1]  # noqa: E731
    run(batch, estimator="full", reward_scale_fn=function)
    assert seen[0].student_entropy.shape == (6,)
    assert "kl_teacher: not read yet" in repr(seen[0])
    with pytest.raises(RuntimeError, match="kl_teacher of TokenStats was not read inside the function"):
        seen[0].kl_teacher  # noqa: B018


BOTH = pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])


@BOTH
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda s: 1.25, TypeError, "reward_scale_fn must return a torch.Tensor, got float"),
        (lambda s: torch.ones(15, dtype=torch.int64), TypeError, "reward_scale_fn must return a float tensor"),
        (lambda s: torch.ones(3), ValueError, r"reward_scale_fn must return one lambda per token, shape \(15,\)"),
        (1.25, TypeError, "reward_scale_fn must be"),
    ],
)
def test_what_it_refuses(function, value, error, message):
    batch = make_batch(44, shape=SHAPE, masked=False)
    for options in ({}, {"estimator": "full"}, {"estimator": "topk", "k": 3}):
        with pytest.raises(error, match=message):
            function(*batch.models, batch.token_ids, reward_scale_fn=value, **options)


@BOTH
def test_it_needs_both_models_and_is_in_the_place_of_reward_scale(function):
    batch = make_batch(45, shape=(4,), masked=False)
    lam = lambda s: torch.ones(4)  # noqa: E731
    p, q, r = batch.models
    for estimator in ("sampled", "full"):
        options = {"reward_scale_fn": lam, "estimator": estimator}
        with pytest.raises(ValueError, match="ref must be given with a reward_scale_fn"):
            function(p, q, None, batch.token_ids, **options)
        with pytest.raises(ValueError, match="teacher must be given with a reward_scale_fn"):
            function(p, None, r, batch.token_ids, **options)
        for scale, shown in ((1.25, "1.25"), (torch.ones(4), "a tensor")):
            with pytest.raises(ValueError, match=f"in the place of reward_scale, and reward_scale={shown} would be"):
                function(p, q, r, batch.token_ids, reward_scale=scale, **options)
    with pytest.raises(ValueError, match="reward_scale_fn needs a teacher or a reference"):
        function(p, None, None, batch.token_ids, reward_scale_fn=lam, advantage_fn=lambda s: s.student_logprobs)


def test_the_module_holds_it():
    batch = make_batch(46, shape=SHAPE, masked=False)
    module = fg.GOPDLoss(estimator="full", reward_scale_fn=with_divergences)
    out = module(*batch.models, batch.token_ids)
    assert_close(out.reward_scale, scales(batch, with_divergences), 1e-11)
    other = module(*batch.models, batch.token_ids, reward_scale_fn=lambda s: torch.ones_like(s.student_entropy))
    assert (other.reward_scale == 1).all()


@pytest.mark.parametrize("objective", [{"estimator": "full"}, {"estimator": "topk", "k": 4}, {}], ids=ids)
def test_compiled_code_calls_it_between_graphs_and_a_full_graph_refuses(objective):
    batch = make_batch(47, shape=SHAPE, dtype=torch.float32)
    torch._dynamo.reset()

    def call(student):
        return fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, mask=batch.mask,
                            reward_scale_fn=of_everything, **objective).loss  # fmt: skip

    with pytest.raises(Exception, match="advantage_fn and reward_scale_fn are Python functions"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(batch.student)
    torch._dynamo.reset()
    want = torch.autograd.grad(call(batch.student), batch.leaves)
    got = torch.autograd.grad(torch.compile(call, backend="aot_eager")(batch.student), batch.leaves)
    assert all(map(torch.equal, got, want))
    torch._dynamo.reset()


@pytest.mark.parametrize("objective", EVERY, ids=ids)
def test_under_torch_func(objective):
    batch, calls = make_batch(48, shape=SHAPE), []

    def loss(hidden, function):
        student = like(batch.student, hidden=hidden, weight=batch.student.weight.detach())
        return fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, mask=batch.mask,
                            reward_scale_fn=function, **objective).loss  # fmt: skip

    function = lambda s: (calls.append(1), of_everything(s))[1]  # noqa: E731
    hidden = batch.student.hidden.detach()
    got = torch.func.grad(loss)(hidden, function)
    assert len(calls) == 1
    leaf = hidden.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf, function), leaf)
    assert_close(got, want, 1e-12)


def test_it_is_the_lambda_of_the_oracle_with_the_native_kernels():
    """A whole call in float32 against float64, lambda 0 and 1 among its values."""
    batch = make_batch(49, shape=(4, 8), dtype=torch.float32)
    lam = torch.tensor([0.0, 1.0, 0.5, 1.25]).repeat(8).reshape(4, 8)
    for objective in OBJECTIVES:
        out, grads = run(batch, reward_scale_fn=lambda s: lam.reshape(-1)[s.index], **objective)
        want, want_grads = expect(batch, reward_scale=lam.double(), **objective)
        assert_close(out.token_loss, want.token_loss, 2e-5)
        assert_all_close(grads, want_grads, 2e-5)


@pytest.mark.parametrize("which", ["torch", "native", "dense"])
@pytest.mark.parametrize(
    "bounds",
    [{"logprob_min": -3.0}, {"student_logprob_min": -2.0}, {"logprob_min": -2.5, "student_logprob_min": -2.0}],
    ids=str,
)
@pytest.mark.parametrize("hole", [False, True])
def test_divergences_of_topk_have_the_bounds_of_log_probs(which, bounds, hole):
    """They are GOPDOutput.kl of a call with that model alone, also where it rules out tokens of the support."""
    batch = make_batch(91, shape=(2, 3), kinds=("logits",) * 3, vocab=(9, 9, 9), masked=False)
    if hole:
        batch.teacher.logits[0, :, ::2] = batch.ref.logits[0, 1, 3:] = -math.inf
    dtype = torch.float32 if which == "native" else torch.float64
    models = [like(x, logits=x.logits.detach().to(dtype)) for x in batch.models]
    function = fg.reference.gopd_loss if which == "dense" else functools.partial(fg.gopd_loss, backend=which)
    ids = torch.arange(4).expand(2, 3, 4)
    options = {"estimator": "topk", "tail": "drop", "support_ids": ids, **bounds}
    seen = {}

    def lam(stats: fg.TokenStats) -> torch.Tensor:
        seen.update(kl_teacher=stats.kl_teacher, kl_ref=stats.kl_ref)
        return torch.ones_like(stats.student_entropy)

    function(*models, reward_scale_fn=lam, **options)
    for name, model in (("kl_teacher", models[1]), ("kl_ref", models[2])):
        alone = function(models[0], model, **options)
        assert alone.kl.min() > 0
        assert_close(seen[name].reshape(2, 3), alone.kl, 1e-6, name)


@pytest.mark.parametrize("which", ["torch", "native", "dense"])
@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_row_without_support_has_all_its_mass_outside(which, tail):
    """A teacher of -inf alone, whose tokens of the support a bound raises: the rest of the vocabulary has mass 1."""
    z = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 6)
    ids, bound = torch.tensor([[0, 3]]), -20.0
    log_p = z.log_softmax(1)[0]
    log_p = torch.stack((log_p[0], log_p[3], (1 - log_p[[0, 3]].exp().sum()).log()))
    log_t = torch.tensor([bound, bound, 0.0], dtype=torch.float64).log_softmax(0)
    dtype = torch.float32 if which == "native" else torch.float64
    function = fg.reference.gopd_loss if which == "dense" else functools.partial(fg.gopd_loss, backend=which)
    out = function(
        fg.Logits(z.to(dtype)), fg.Logits(torch.full((1, 6), -math.inf, dtype=dtype)), estimator="topk", tail=tail,
        support_ids=ids, logprob_min=bound,
    )  # fmt: skip
    assert_close(out.kl[0], (log_p.exp() * (log_p - log_t)).sum().to(dtype), 1e-6)
