"""Advantages of one's own (``advantage_fn``) and the baseline of the sampled estimator."""

from __future__ import annotations

import math

import pytest
import torch

import fused_gopd as fg
from builders import assert_all_close, assert_close, like, make_batch, minus_inf_batch, run, trainable
from fused_gopd.heads import Logits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_hooks_value_is_the_advantage(backend_dtype):
    """A tensor of one's own, lined up by the index; the loss is -A rho, the gradient A (p - 1[v = y])."""
    batch = make_batch(71, shape=(4, 6), dtype=backend_dtype.dtype)
    mine = torch.randn(4, 6, dtype=backend_dtype.dtype)
    hook = lambda stats: mine.reshape(-1)[stats.index]  # noqa: E731
    for chunk in (None, 3):
        out, grads = run(batch, backend=backend_dtype.backend, reward_scale=1.25, advantage_fn=hook, chunk_size=chunk)
        assert torch.equal(out.advantages, mine * batch.mask)
        assert torch.equal(out.token_loss, -mine * batch.mask)
        # as a loss of log-probs: -A log p has the same gradient
        logprobs = fg.token_logprobs(batch.student, batch.token_ids, mask=batch.mask, backend=backend_dtype.backend)
        want = torch.autograd.grad(-(mine * logprobs).sum() / batch.mask.sum(), batch.leaves)
        assert_all_close(grads, want, backend_dtype.tolerance)


def test_a_hook_that_gives_a_back_changes_nothing(backend):
    """No bit of the values. The gradient is written at unit scale, since the slope follows: factors round elsewhere."""
    batch = make_batch(72, shape=(4, 6), dtype=torch.float32)
    options = {"backend": backend, "reward_scale": 1.25, "chunk_size": 5}
    want, want_grads = run(batch, **options)
    got, grads = run(batch, advantage_fn=lambda stats: stats.advantages, **options)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.advantages, want.advantages)
    # a factor applied before a sum of V = 11 or of 24 products, or after it: one rounding of each product
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=torch.finfo(a.dtype).eps * 4 * b.abs().max().item())


@pytest.mark.parametrize("student", ["linear", "logits"])
def test_a_hook_sees_every_statistic(backend_dtype, student):
    batch = make_batch(73, shape=(3, 5), kinds=(student, "linear", "logits"), dtype=backend_dtype.dtype)
    old = torch.linspace(-3, -1, 15, dtype=backend_dtype.dtype).reshape(3, 5)
    lam = torch.linspace(0, 2, 15, dtype=backend_dtype.dtype).reshape(3, 5)
    seen: list[fg.TokenStats] = []

    def hook(stats: fg.TokenStats) -> torch.Tensor:
        seen.append(stats)
        return stats.advantages

    options = {"backend": backend_dtype.backend, "reward_scale": lam, "old_logprobs": old}
    out, _ = run(batch, advantage_fn=hook, **options)
    (stats,) = seen
    live = batch.mask.reshape(-1).nonzero()[:, 0]
    assert torch.equal(stats.index, live)
    own = {name: fg.token_logprobs(m, batch.token_ids, return_entropy=True, backend=backend_dtype.backend)
           for name, m in zip(("student", "teacher", "ref"), batch.models, strict=True)}  # fmt: skip
    for name, (logprobs, entropy) in own.items():
        assert_close(getattr(stats, f"{name}_logprobs"), logprobs.detach().reshape(-1)[live], backend_dtype.tolerance)
        assert_close(getattr(stats, f"{name}_entropy"), entropy.detach().reshape(-1)[live], backend_dtype.tolerance)
    assert torch.equal(stats.old_logprobs, old.reshape(-1)[live])
    assert torch.equal(stats.reward_scale, lam.reshape(-1)[live])
    assert torch.equal(stats.advantages, out.advantages.reshape(-1)[live])
    assert not any(x.requires_grad for x in vars(stats).values() if isinstance(x, torch.Tensor))


def test_scores_computed_elsewhere_have_no_entropy():
    batch = make_batch(74, kinds=("linear", "logprobs", "logprobs"))
    seen: list[fg.TokenStats] = []
    run(batch, reward_scale=1.25, advantage_fn=lambda s: (seen.append(s), s.advantages)[1])
    assert seen[0].teacher_entropy is None
    assert seen[0].ref_entropy is None
    assert seen[0].student_entropy is not None


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("student", ["linear", "logits"])
def test_a_hook_is_called_once_per_chunk_whatever_backwards_follow(student, reduction, backend):
    batch = make_batch(75, shape=(10,), kinds=(student, "linear", "linear"), dtype=torch.float32, masked=False)
    calls: list[int] = []

    def hook(stats: fg.TokenStats) -> torch.Tensor:
        calls.append(stats.index.shape[0])
        return stats.advantages + 10 * len(calls)  # another value every time

    out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, advantage_fn=hook, chunk_size=4,
                       reduction=reduction, backend=backend)  # fmt: skip
    assert sum(calls) == 10
    assert len(calls) == len(set(range(0, 10, 4)))
    first = torch.autograd.grad(out.loss.sum(), batch.leaves, retain_graph=True)
    second = torch.autograd.grad(out.loss.sum(), batch.leaves)
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_reference_calls_a_hook_alike():
    batch = make_batch(76, shape=(3, 5))
    hook = lambda s: torch.tanh(s.teacher_logprobs - s.ref_logprobs) * s.teacher_entropy + s.student_entropy  # noqa: E731
    options = {"reward_scale": 1.25, "advantage_fn": hook, "logprob_min": -3.0, "advantage_clip": 2.0}
    want, want_grads = run(batch, fg.reference.gopd_loss, **options)
    got, grads = run(batch, backend="torch", **options)
    assert_close(got.token_loss, want.token_loss, 1e-12)
    assert_all_close(grads, want_grads, 1e-12)


def test_a_hook_makes_an_impossible_token_count():
    """Only a token that the sampling policy itself rules out keeps advantage 0."""
    batch = make_batch(77, shape=(4,), kinds=("logits",) * 3, masked=False)
    with torch.no_grad():
        batch.teacher.logits[1, batch.token_ids[1]] = -math.inf
        batch.student.logits[2, batch.token_ids[2]] = -math.inf
    out, _ = run(batch, reward_scale=1.25, advantage_fn=lambda s: torch.ones_like(s.advantages))
    assert out.advantages.tolist() == [1, 1, 0, 1]
    assert out.loss.isfinite()


def test_a_mixed_list_of_teachers_has_no_entropy():
    """None for all tokens or for none: a function sees the same in every chunk, and in the reference."""
    batch = make_batch(84, shape=(6,), masked=False)
    scores = fg.TokenLogProbs(-torch.rand(6, dtype=torch.float64))
    seen: list[fg.TokenStats] = []
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        options = {"reward_scale": 1.25, "teacher_index": torch.arange(6) % 2}
        hook = lambda s: (seen.append(s), s.advantages)[1]  # noqa: E731
        function(batch.student, [batch.teacher, scores], batch.ref, batch.token_ids, advantage_fn=hook, **options)
        assert all(s.teacher_entropy is None and s.ref_entropy is not None for s in seen)


def test_a_hook_cannot_write_into_the_callers_tensors():
    batch = make_batch(85, shape=(6,), masked=False)
    old, lam = -torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    before = old.clone(), lam.clone()

    def hook(stats: fg.TokenStats) -> torch.Tensor:
        stats.old_logprobs.zero_()
        stats.reward_scale.zero_()
        return stats.advantages

    run(batch, reward_scale=lam, old_logprobs=old, advantage_fn=hook)
    assert torch.equal(old, before[0])
    assert torch.equal(lam, before[1])


ALONE = {
    "plain": {},
    "none": {"reduction": "none"},
    "clipped": {"old": True, "clip": (0.1, 0.2), "clip_dual": 1.5, "advantage_clip": 1.0},
    "sequences": {"old": True, "ratio": "sequence", "reduction": "seq-mean-token-mean"},
    "importance": {"rollout": True, "rollout_is_cap": 1.1, "labels": True},
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
def test_advantages_of_ones_own_need_no_models(options, backend_dtype):
    """The same bits as with a teacher whose log-probs the function does not read, and as the reference."""
    options, batch = dict(options), make_batch(87, shape=(4, 6), dtype=backend_dtype.dtype)
    near = fg.token_logprobs(batch.student, batch.token_ids).detach() - 0.1 * torch.rand(
        4, 6, dtype=backend_dtype.dtype
    )
    for name in ("old", "rollout"):
        if options.pop(name, False):
            options[f"{name}_logprobs"] = near
    if options.pop("labels", False):
        options["sft_labels"] = batch.token_ids
    mine, seen = torch.randn(4, 6, dtype=backend_dtype.dtype), []
    hook = lambda stats: (seen.append(stats), mine.reshape(-1)[stats.index])[1]  # noqa: E731

    def call(function, teacher, **more):
        batch.student = trainable(batch.student)
        out = function(batch.student, teacher, None, batch.token_ids, mask=batch.mask, **options, **more)
        return out, torch.autograd.grad(out.loss.sum(), batch.leaves, retain_graph=True), batch.leaves

    fused = {"backend": backend_dtype.backend, "chunk_size": 5, "advantage_fn": hook}
    out, grads, leaves = call(fg.gopd_loss, None, **fused)
    assert seen[0].student_entropy is not None
    names = ("advantages", "teacher_logprobs", "ref_logprobs", "teacher_entropy", "ref_entropy")
    assert all(getattr(stats, name) is None for stats in seen for name in names)
    again = torch.autograd.grad(out.loss.sum(), leaves)
    want, want_grads, _ = call(fg.gopd_loss, batch.teacher, **fused)
    assert all(torch.equal(a, b) for a, b in zip((*grads, *again), (*want_grads, *want_grads), strict=True))
    for name in ("loss", "token_loss", "advantages", "student_logprobs", "entropy"):
        assert torch.equal(getattr(out, name), getattr(want, name)), name
    assert out.teacher_logprobs is None
    assert out.ref_logprobs is None
    assert set(want.metrics()) - set(out.metrics()) == {"kl_teacher_k3", "impossible"}
    assert out.metrics()["advantage"] == want.metrics()["advantage"]
    dense, dense_grads, _ = call(fg.reference.gopd_loss, None, advantage_fn=hook)
    assert_close(out.token_loss, dense.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, dense_grads, backend_dtype.tolerance)
    given = {"mask": batch.mask, **options, **fused}
    compiled = torch.compile(
        lambda student: fg.gopd_loss(student, None, None, batch.token_ids, **given).loss, backend="aot_eager"
    )
    assert torch.equal(compiled(batch.student), out.loss)


@pytest.mark.parametrize(
    "options",
    [
        {"reward_scale": 1.25},
        {"reward_scale": torch.tensor(1.0)},
        {"logprob_min": -5.0},
        {"baseline": "expected"},
        {"score_cancelled": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_without_models_what_acts_on_them_is_refused(options):
    batch = make_batch(88)
    (name,) = options
    module = fg.GOPDLoss(advantage_fn=lambda s: s.student_logprobs, **options)
    with pytest.raises(ValueError, match=f"{name} needs a teacher or a reference"):
        module(batch.student, None, None, batch.token_ids)


def test_the_module_takes_a_hook_per_batch():
    batch = make_batch(86, shape=(6,), masked=False)
    module = fg.GOPDLoss(reward_scale=1.25, advantage_fn=lambda s: s.advantages)
    out = module(*batch.models, batch.token_ids, advantage_fn=lambda s: torch.ones_like(s.advantages))
    assert (out.advantages == 1).all()


# ----------------------------------------------------------------------------------------------------------- baseline


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 2.0])
def test_the_baseline_is_minus_the_mean_advantage(lam):
    """sum_y p_y (A_y + l) = 0 at every position: enumerated over the vocabulary."""
    head = make_batch(78, shape=(1,), vocab=(11,) * 3, masked=False)
    models = [Logits((m.hidden @ m.weight.T).detach().expand(11, 11).contiguous()) for m in head.models]
    ids = torch.arange(11)
    out = fg.gopd_loss(*models, ids, reward_scale=lam, baseline="expected", backend="torch")
    assert abs(float((out.student_logprobs.exp() * out.advantages).sum())) < 1e-14


def test_the_baseline_is_not_in_the_loss(backend):
    batch = make_batch(79, shape=(3, 5), dtype=torch.float32)
    with_it, grads = run(batch, backend=backend, reward_scale=1.5, baseline="expected")
    without, plain = run(batch, backend=backend, reward_scale=1.5)
    assert_close(with_it.token_loss, without.token_loss, 1e-5)
    value = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale=1.5, estimator="full").token_loss
    assert_close(with_it.advantages, without.advantages + value.detach(), 1e-5)
    assert not torch.allclose(grads[0], plain[0], rtol=1e-2)


@pytest.mark.parametrize("baseline", ["none", "expected"])
@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
def test_the_mean_sampled_gradient_is_the_full_gradient(lam, baseline):
    """Exactly, by enumeration: sum_y p_y gradient(y), with and without the baseline."""
    head = make_batch(80, shape=(1,), vocab=(13,) * 3, masked=False)
    z = [(m.hidden @ m.weight.T).detach() for m in head.models]
    student = trainable(Logits(z[0].expand(13, 13).contiguous()))
    others = [Logits(x.expand(13, 13).contiguous()) for x in z[1:]]
    options = {"reward_scale": lam, "backend": "torch"}
    out = fg.gopd_loss(student, *others, torch.arange(13), reduction="none", baseline=baseline, **options)
    p = z[0].softmax(-1)[0]
    (sampled,) = torch.autograd.grad((p * out.loss).sum(), student.logits)
    one = trainable(Logits(z[0]))
    full = fg.gopd_loss(one, Logits(z[1]), Logits(z[2]), estimator="full", **options)
    (want,) = torch.autograd.grad(full.loss, one.logits)
    assert_close(sampled.sum(0), want[0], 1e-12)


@pytest.mark.parametrize("lam", [1.0, 2.0])
@pytest.mark.parametrize("baseline", ["none", "expected"])
def test_the_mean_over_many_samples_is_the_full_gradient(lam, baseline, backend):
    """On-policy samples: every coordinate of the mean lies within 4.5 standard errors of the full gradient.

    With 17 coordinates a correct estimator fails with probability below 17 * 7e-6 = 1.2e-4; the seed is fixed.
    """
    n, V = 40_000, 17
    # mild logits: every token is sampled often enough for the error of the mean to be normal
    head = make_batch(81, shape=(1,), vocab=(V,) * 3, dtype=torch.float32, masked=False, scale=0.7)
    z = [(m.hidden @ m.weight.T).detach() for m in head.models]
    ids = torch.multinomial(z[0].softmax(-1)[0], n, replacement=True, generator=torch.Generator().manual_seed(3))
    student = trainable(Logits(z[0].expand(n, V).contiguous()))
    options = {"reward_scale": lam, "backend": backend}
    others = [Logits(x.expand(n, V)) for x in z[1:]]
    loss = fg.gopd_loss(student, *others, ids, reduction="sum", baseline=baseline, **options).loss
    (per_sample,) = torch.autograd.grad(loss, student.logits)
    one = trainable(Logits(z[0]))
    full = fg.gopd_loss(one, Logits(z[1]), Logits(z[2]), estimator="full", **options)
    (want,) = torch.autograd.grad(full.loss, one.logits)
    error = per_sample.double().std(0) / math.sqrt(n)
    assert ((per_sample.double().mean(0) - want[0].double()).abs() < 4.5 * error + 1e-7).all()


def test_the_baseline_follows_minus_inf_logits():
    """Advantages stay finite, and a sampled token outside the joint support pulls nowhere."""
    batch = minus_inf_batch()
    batch.token_ids[0] = 5  # -inf in the student and the teacher
    out, grads = run(batch, reward_scale=1.25, baseline="expected", backend="torch")
    assert out.advantages.isfinite().all()
    assert out.advantages[0] == 0
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0] == 0).all()


def test_the_baseline_with_one_model_left(backend_dtype):
    batch = make_batch(82, shape=(3, 4), dtype=backend_dtype.dtype)
    for lam, changes in ((1.0, {"ref": None}), (0.0, {"teacher": None})):
        out, _ = run(batch.replaced(**changes), backend=backend_dtype.backend, reward_scale=lam, baseline="expected")
        full = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale=lam, estimator="full",
                            backend=backend_dtype.backend)  # fmt: skip
        plain, _ = run(batch, backend=backend_dtype.backend, reward_scale=lam)
        assert_close(out.advantages, plain.advantages + full.token_loss, backend_dtype.tolerance)


def test_the_baseline_keeps_a_token_outside_the_joint_support_at_0():
    """As the documentation says: logprob_min cannot bring back what the joint support does not have."""
    teacher = torch.randn(1, 5)
    teacher[0, 0] = -math.inf
    models = (fg.Logits(torch.randn(1, 5)), fg.Logits(teacher), None, torch.tensor([0]))
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        assert function(*models, logprob_min=-20.0).advantages.abs() > 1
        assert function(*models, logprob_min=-20.0, baseline="expected").advantages == 0


def test_half_precision_logits_take_hook_and_baseline(backend):
    batch = make_batch(83, shape=(6,), kinds=("logits",) * 3, dtype=torch.bfloat16, masked=False)
    wide = batch.replaced(student=like(batch.student, logits=batch.student.logits.detach().float().requires_grad_()))
    options = {"reward_scale": 1.25, "baseline": "expected", "advantage_fn": lambda s: 2 * s.advantages}
    got, grads = run(batch, backend=backend, **options)
    want, want_grads = run(wide, backend=backend, **options)
    assert_close(got.advantages, want.advantages, 1e-6)
    assert_close(grads[0].float(), want_grads[0], 2**-8)
