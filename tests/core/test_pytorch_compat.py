"""The regimes that PyTorch programs run in: autocast, checkpointing, torch.func, CUDA graphs, inference mode, threads.

Each either gives the numbers of a plain call or raises and says so.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_gopd as fg
from builders import (
    OBJECTIVES,
    assert_all_close,
    assert_close,
    generator,
    like,
    linear_head,
    make_batch,
    run,
    trainable,
)
from combinations import pairwise
from costs import Memory
from fused_gopd import prepare, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
one_of_each = pytest.mark.parametrize("objective", [OBJECTIVES[i] for i in (0, 1, 5)], ids=[IDS[i] for i in (0, 1, 5)])


# ----------------------------------------------------------------------------------------------------------- autocast


def mixed(head, dtype):
    """The head as autocast leaves a model: low-precision hidden states, float32 master weights."""
    return like(head, hidden=head.hidden.detach().to(dtype))


def test_autocast_does_not_change_the_precision(backend):
    batch = make_batch(16, dtype=torch.float32)
    want, want_grads = run(batch, estimator="full", reward_scale=1.25, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, grads = run(batch, estimator="full", reward_scale=1.25, backend=backend)
    assert torch.equal(got.loss, want.loss)
    assert all(map(torch.equal, grads, want_grads))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@one_of_each
def test_master_weights_are_rounded_as_autocast_rounds_them_and_their_gradient_is_not(backend, objective, dtype):
    """Against the same call on weights that are rounded by hand, in the loss to the last bit."""
    batch = make_batch(1, dtype=F32, transforms=[{"bias": True}, {}, {}])
    heads = [mixed(m, dtype) for m in batch.models]
    heads[0].hidden.requires_grad_()
    masters = batch.replaced(student=heads[0], teacher=heads[1], ref=heads[2])
    by_hand = [trainable(like(m, weight=m.weight.detach().to(dtype))) for m in heads]
    rounded = batch.replaced(student=by_hand[0], teacher=by_hand[1], ref=by_hand[2])
    options = {"reward_scale": 1.25, "backend": backend, "chunk_size": 4, **objective}
    (got, grads), (want, want_grads) = run(masters, **options), run(rounded, **options)
    assert torch.equal(got.loss, want.loss)
    assert [g.dtype for g in grads] == [dtype, F32, F32]
    assert torch.equal(grads[0], want_grads[0])
    # by hand it was rounded once; the float32 one is what was rounded
    assert torch.equal(grads[1].to(dtype), want_grads[1])
    assert not torch.equal(grads[1].to(dtype).float(), grads[1])


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_model_under_autocast_trains_its_master_weights(backend, reduction, inside):
    """Body and head in float32, the body under autocast, the loss inside the region or after it."""
    batch = make_batch(2, dtype=F32)
    body = torch.nn.Linear(12, 12).requires_grad_()
    with torch.no_grad():
        body.weight.copy_(torch.randn(12, 12, generator=generator(3)) / 12**0.5)

    def loss(hidden):
        student = fg.LinearHead(hidden, batch.student.weight)
        out = fg.gopd_loss(
            student,
            batch.teacher,
            batch.ref,
            batch.token_ids,
            mask=batch.mask,
            reward_scale=1.25,
            estimator="full",
            reduction=reduction,
            backend=backend,
        )
        return out.loss.sum()

    leaves = [body.weight, body.bias, batch.student.weight]
    x = batch.student.hidden.detach()
    with torch.autocast("cpu", dtype=BF16):
        hidden = body(x)
        assert hidden.dtype == BF16
        value = loss(hidden) if inside else None
    value = loss(hidden) if value is None else value
    grads = torch.autograd.grad(value, leaves)
    want = torch.autograd.grad(loss(body(x)), leaves)
    assert [g.dtype for g in grads] == [F32] * 3
    assert_all_close(grads, want, 3e-2)


def test_a_shared_master_weight_is_rounded_once():
    """A teacher with the student's own head, as in self-distillation, and a reference with another."""
    hidden = [torch.randn(8, 256, generator=generator(i)).to(BF16) for i in range(3)]
    shared, other = (torch.randn(4096, 256, generator=generator(i)) for i in (3, 4))
    heads = [fg.LinearHead(h, w) for h, w in zip(hidden, (shared, shared, other), strict=True)]
    ids = torch.zeros(8, dtype=torch.int64)

    def step():
        fg.gopd_loss(*heads, ids, reward_scale=1.25, estimator="full", chunk_size=1)

    step()
    one = 4096 * 256 * 2
    # two of them, and on a CPU one in float32 to multiply with
    assert 4 * one <= Memory(step).peak < 4.5 * one


def test_scores_of_master_weights_are_those_of_rounded_ones(backend):
    head = mixed(linear_head(4, (2, 5), 37, 12, F32), BF16)
    ids = torch.randint(37, (2, 5), generator=generator(4))
    by_hand = like(head, weight=head.weight.to(BF16))
    for got, want in zip(
        (fg.token_logprobs(head, ids, backend=backend), *fg.token_topk(head, 3, backend=backend)),
        (fg.token_logprobs(by_hand, ids, backend=backend), *fg.token_topk(by_hand, 3, backend=backend)),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_the_reference_takes_master_weights_and_ignores_autocast():
    batch = make_batch(5, dtype=F32)
    want, want_grads = run(batch, fg.reference.gopd_loss, estimator="full")
    with torch.autocast("cpu", dtype=BF16):
        got = fg.reference.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, estimator="full")
    assert torch.equal(got.loss, want.loss)
    # its backward is PyTorch's, which autocast would reach inside the region
    assert all(map(torch.equal, torch.autograd.grad(got.loss, batch.leaves), want_grads))
    assert fg.reference.gopd_loss(mixed(batch.student, BF16), batch.teacher, None, batch.token_ids).loss.isfinite()


def test_float32_hidden_states_with_a_low_precision_weight_are_refused_with_advice():
    with pytest.raises(TypeError, match=r"hidden\.to\(weight\.dtype\) is what autocast would do"):
        fg.LinearHead(torch.zeros(2, 4), torch.zeros(7, 4, dtype=BF16))


# ------------------------------------------------------------------------------------------- activation checkpointing


@pairwise(
    backend=["torch", "native"],
    objective=[*OBJECTIVES[:2], {"advantage_fn": True}],
    reduction=["token-mean", "none"],
    use_reentrant=[False, True],
)
def test_checkpointing_body_and_loss_changes_no_bit(backend, objective, reduction, use_reentrant):
    batch = make_batch(6, dtype=F32)
    body = torch.randn(12, 12, generator=generator(6)).requires_grad_()
    x = batch.student.hidden.detach().requires_grad_()
    seen = []

    def hook(stats):
        seen.append(stats.student_logprobs.clone())
        return stats.teacher_logprobs - stats.student_logprobs

    options = {"advantage_fn": hook} if "advantage_fn" in objective else objective

    def step(x):
        head = fg.LinearHead(torch.tanh(x @ body), batch.student.weight)
        out = fg.gopd_loss(
            head,
            batch.teacher,
            batch.ref,
            batch.token_ids,
            mask=batch.mask,
            reward_scale=1.25,
            reduction=reduction,
            backend=backend,
            **options,
        )
        return out.loss.sum()

    leaves = [x, body, batch.student.weight]

    def gradients(value):
        value.backward()  # a reentrant checkpoint knows no other way
        grads = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return value.detach(), *grads

    want = gradients(step(x))
    calls = len(seen)
    got = gradients(checkpoint(step, x, use_reentrant=use_reentrant))
    assert all(map(torch.equal, got, want))
    # a forward that is run again asks the hook again, about the same log-probs
    again = seen[calls:]
    assert len(again) % max(1, calls) == 0
    assert all(torch.equal(a, b) for a, b in zip(again, itertools.cycle(seen[:calls])))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_leaves_no_buffer_behind(use_reentrant):
    batch = make_batch(7, shape=(8,), vocab=(1009,) * 3, hidden=(64,) * 3, dtype=F32, masked=False)

    def loss(hidden):
        head = fg.LinearHead(hidden, batch.student.weight)
        return fg.gopd_loss(head, batch.teacher, batch.ref, batch.token_ids, reward_scale=1.25).loss

    def step():
        checkpoint(loss, batch.student.hidden, use_reentrant=use_reentrant).backward()

    step()  # .grad exists: what comes is added to it
    assert Memory(step).left < 1009 * 64 * 4 / 10


# --------------------------------------------------------------------------------------------------------- torch.func


def pure(batch, backend="torch", kind="loss", **options):
    """A function of the student's hidden states and weight, as torch.func wants one."""

    def function(hidden, weight):
        head = like(batch.student, hidden=hidden, weight=weight)
        if kind == "scores":
            logprobs, entropy = fg.token_logprobs(
                head, batch.token_ids, mask=batch.mask, return_entropy=True, backend=backend
            )
            return (logprobs * entropy + logprobs).sum()
        models = (head, batch.teacher, batch.ref, batch.token_ids)
        loss = fg.gopd_loss(*models, mask=batch.mask, reward_scale=1.25, backend=backend, **options).loss
        return (loss * loss).sum() if kind == "squares" else loss.sum()

    return function


CASES = [({"kind": "loss", **o}, i) for o, i in zip(OBJECTIVES, IDS, strict=True)] + [
    ({"kind": "squares", "reduction": "none", "estimator": "full"}, "none"),
    ({"advantage_fn": lambda stats: stats.teacher_logprobs - stats.student_logprobs}, "hook"),
    ({"ratio": "sequence", "old_logprobs": torch.full((2, 5), -3.0), "clip": (0.2, 0.28)}, "sequence ratio"),
    ({"kind": "scores"}, "scores"),
]


@pytest.mark.parametrize("options", [c for c, _ in CASES], ids=[i for _, i in CASES])
def test_func_grad_is_the_gradient(backend, options):
    batch = make_batch(8, dtype=F32)
    function = pure(batch, backend, **options)
    h, w = (x.detach() for x in batch.leaves)
    want = torch.autograd.grad(function(*batch.leaves), batch.leaves)
    assert_all_close(torch.func.grad(function, argnums=(0, 1))(h, w), want, 1e-6)
    value, pull = torch.func.vjp(function, h, w)
    assert_close(value, function(h, w), 0.0)
    assert_all_close(pull(torch.tensor(-2.0)), [-2 * g for g in want], 1e-6)
    grads, value = torch.func.grad_and_value(function)(h, w)
    assert_close(grads, want[0], 1e-6)
    assert_close(value, function(h, w), 0.0)


def test_func_grad_sees_what_a_function_closes_over():
    """A weight that requires a gradient outside of the transform receives it through the transformed value."""
    batch = make_batch(9, dtype=F32)
    function = pure(batch, estimator="full")
    h, w = batch.leaves
    value, _ = torch.func.vjp(lambda x: function(x, w), h.detach())
    (got,) = torch.autograd.grad(value, w)
    assert_close(got, torch.autograd.grad(function(h, w), w)[0], 1e-6)


class Model(torch.nn.Module):
    """A module that ends in the loss."""

    def __init__(self, batch):
        super().__init__()
        self.body = torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 37)
        self.loss = fg.GOPDLoss(reward_scale=1.25, estimator="full", backend="torch")
        self.batch = batch

    def forward(self, x):
        head = fg.LinearHead(self.body(x), self.head.weight, self.head.bias)
        batch = self.batch
        return self.loss(head, batch.teacher, batch.ref, batch.token_ids, mask=batch.mask).loss


def test_functional_call_of_a_module_that_ends_in_the_loss():
    batch = make_batch(10, dtype=F32)
    model, x = Model(batch), batch.student.hidden.detach()
    parameters = {k: p.detach().clone() for k, p in model.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    model(x).backward()
    for name, p in model.named_parameters():
        assert_close(got[name], p.grad, 1e-6, name)
    # without a transform it is the plain call on other tensors
    fresh = {k: p.clone().requires_grad_() for k, p in parameters.items()}
    torch.func.functional_call(model, fresh, (x,)).backward()
    assert all(torch.equal(fresh[k].grad, p.grad) for k, p in model.named_parameters())


def test_jacrev_goes_row_by_row():
    batch = make_batch(11, dtype=F32, masked=False)
    h, w = (x.detach() for x in batch.leaves)

    def losses(hidden):
        head = fg.LinearHead(hidden, w)
        return fg.gopd_loss(head, batch.teacher, batch.ref, batch.token_ids, reward_scale=1.25, reduction="none").loss

    with pytest.raises(NotImplementedError, match=r"one upstream gradient at a time.*chunk_size=1"):
        torch.func.jacrev(losses)(h)
    jacobian = torch.func.jacrev(losses, chunk_size=1)(h)
    want = torch.autograd.functional.jacobian(losses, h)
    assert_close(jacobian, want, 1e-6)


H, W = (x.detach() for x in make_batch(12, dtype=F32).leaves)
TRANSFORMS = {
    "vmap": (lambda f: torch.func.vmap(f, in_dims=(0, None))(torch.stack([H, H]), W), "does not run under.*vmap"),
    "vmap of grad": (lambda f: torch.func.vmap(torch.func.grad(f), (0, None))(torch.stack([H, H]), W), "vmap"),
    "jvp": (lambda f: torch.func.jvp(f, (H, W), (H, W)), "no forward-mode derivative"),
    "jvp of grad": (lambda f: torch.func.jvp(torch.func.grad(f), (H, W), (H, W)), "no forward-mode derivative"),
    "jacfwd": (lambda f: torch.func.jacfwd(f)(H, W), "forward-mode|vmap"),
    "hessian": (lambda f: torch.func.hessian(f)(H, W), "forward-mode|vmap"),
    "linearize": (lambda f: torch.func.linearize(f, H, W), "no forward-mode derivative"),
    "functionalize": (lambda f: torch.func.functionalize(f)(H, W), "not under Functionalize"),
    "grad of grad": (
        lambda f: torch.func.grad(lambda h: torch.func.grad(f)(h, W).square().sum())(H),
        "cannot be differentiated twice",
    ),
}


@pytest.mark.parametrize("kind", ["loss", "scores"])
@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_transforms_without_a_rule_say_so(transform, kind):
    apply, message = TRANSFORMS[transform]
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        apply(pure(make_batch(12, dtype=F32), kind=kind))


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_a_tangent_on_the_student_is_refused(reduction):
    batch = make_batch(13, dtype=F32)
    with forward_ad.dual_level():
        dual = like(batch.student, hidden=forward_ad.make_dual(batch.student.hidden, batch.student.hidden))
        with pytest.raises(NotImplementedError, match="the student carries a tangent"):
            fg.gopd_loss(dual, *batch.models[1:], batch.token_ids, reward_scale=1.25, reduction=reduction)
        with pytest.raises(NotImplementedError, match="token_logprobs has no forward-mode derivative"):
            fg.token_logprobs(dual, batch.token_ids)
        # teachers have no derivative in either mode
        teacher = like(batch.teacher, hidden=forward_ad.make_dual(batch.teacher.hidden, batch.teacher.hidden))
        out = fg.gopd_loss(batch.student, teacher, None, batch.token_ids)
        assert forward_ad.unpack_dual(out.loss).tangent is None


def test_the_reference_has_the_derivatives_that_the_messages_promise():
    batch = make_batch(14, shape=(3,), masked=False)

    def dense(hidden):
        head = fg.LinearHead(hidden, batch.student.weight.detach())
        return fg.reference.gopd_loss(head, batch.teacher, batch.ref, batch.token_ids, reward_scale=1.25).loss

    h = batch.student.hidden.detach()
    _, slope = torch.func.jvp(dense, (h,), (h,))
    assert_close(slope, (torch.func.grad(dense)(h) * h).sum(), 1e-10)
    assert torch.func.hessian(dense)(h).shape == (*h.shape, *h.shape)


# ---------------------------------------------------------------------------------------------------- double backward


@pytest.mark.parametrize("kind", ["loss", "squares", "scores"])
def test_a_second_derivative_is_an_error_and_never_a_silent_zero(backend, kind):
    """A gradient penalty: PyTorch's once_differentiable would drop it where the upstream gradient is a constant."""
    batch = make_batch(15, dtype=F32)
    options = {"reduction": "none"} if kind == "squares" else {}
    value = pure(batch, backend, kind, **({} if kind == "scores" else options))(*batch.leaves)
    grads = torch.autograd.grad(value, batch.leaves, create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    for wrt in (batch.leaves, batch.leaves[:1]):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(value + penalty, wrt, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.functional.hessian(lambda h: pure(batch, backend, kind, **options)(h, W), H)


def test_create_graph_alone_gives_the_same_gradients(backend):
    batch = make_batch(16, dtype=F32)
    function = pure(batch, backend, estimator="full")
    want = torch.autograd.grad(function(*batch.leaves), batch.leaves)
    got = torch.autograd.grad(function(*batch.leaves), batch.leaves, create_graph=True)
    assert all(map(torch.equal, got, want))


def test_what_scales_the_loss_has_no_second_derivative_either(backend):
    batch = make_batch(17, dtype=F32)
    factor = torch.tensor(2.0, requires_grad=True)
    grads = torch.autograd.grad(factor * pure(batch, backend)(*batch.leaves), batch.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(grads[0].sum(), factor)


# --------------------------------------------------------------------- static shapes: CUDA graphs and the meta device


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta").requires_grad_(value.requires_grad)
    return like(value, **{k: on_meta(x) for k, x in value.tensors.items()})


OFF_POLICY = {"old_logprobs": -torch.rand(2, 5, generator=generator(0)), "clip": (0.2, 0.28), "logprob_min": -9.0}


@pairwise(
    objective=[*OBJECTIVES, OFF_POLICY], reduction=["token-mean", "seq-mean-token-mean", "none"], masked=[False, True]
)
def test_no_value_is_read_back_and_no_shape_depends_on_one(objective, reduction, masked):
    """The meta device has shapes alone: what waits for a value raises there, as it does while a graph is captured."""
    batch = make_batch(18, dtype=BF16, transforms=[{"bias": True}, {"softcap": 8.0}, {}], masked=masked)
    models = [on_meta(m) for m in batch.models]
    options = {k: on_meta(x) if isinstance(x, torch.Tensor) else x for k, x in objective.items()}
    if masked:
        options["mask"] = on_meta(batch.mask.to(BF16))
    if reduction == "seq-mean-token-mean":
        options["sequence_lengths"] = torch.full((2,), 9, device="meta")
    if objective is OFF_POLICY:
        models[1] = fg.TokenLogProbs(on_meta(objective["old_logprobs"]))
    out = fg.gopd_loss(*models, on_meta(batch.token_ids), reward_scale=1.25, reduction=reduction, **options)
    out.loss.sum().backward()
    assert out.token_loss.shape == (2, 5)
    assert all(x.grad.shape == x.shape and x.grad.device.type == "meta" for x in models[0].tensors.values())
    out.metrics()


@pytest.fixture
def capturing(monkeypatch):
    """As while a CUDA graph is captured."""
    for module in (prepare, tokens):
        monkeypatch.setattr(module, "host_sync_forbidden", lambda device: True)


@pairwise(
    backend=["torch", "native"],
    objective=[*OBJECTIVES, OFF_POLICY],
    kind=["linear", "logits"],
    reduction=["token-mean", "seq-mean-token-mean", "none"],
)
def test_masked_rows_are_zero_filled_where_they_cannot_be_dropped(backend, objective, kind, reduction, monkeypatch):
    """Same outputs and gradients to rounding, whatever is in the masked rows."""
    batch = make_batch(19, kinds=(kind, "linear", "logits"), dtype=F32)
    labels = torch.where(batch.mask, batch.token_ids, 99)
    ids = torch.where(batch.mask, batch.token_ids, -100)
    poisoned = [
        like(m, **{k: x.detach().masked_fill(~batch.mask[..., None], float("nan"))})
        for m in batch.models
        for k, x in list(m.tensors.items())[:1]
    ]
    leaves = [x.requires_grad_() for x in poisoned[0].tensors.values()]
    upstream = torch.randn(2, 5, generator=generator(19))

    def call():
        options = {**objective, "sft_labels": labels}
        lam = torch.where(batch.mask, 1.25, float("nan"))
        out = fg.gopd_loss(
            *poisoned, ids, mask=batch.mask, reward_scale=lam, reduction=reduction, backend=backend, **options
        )
        value = (out.loss * upstream).sum() if reduction == "none" else out.loss
        return out, torch.autograd.grad(value, leaves)

    want, want_grads = call()
    for module in (prepare, tokens):
        monkeypatch.setattr(module, "host_sync_forbidden", lambda device: True)
    got, grads = call()
    assert_all_close(grads, want_grads, 2e-6)
    assert (grads[0][~batch.mask] == 0).all()
    for name in (
        "loss",
        "token_loss",
        "advantages",
        "student_logprobs",
        "teacher_logprobs",
        "entropy",
        "kl",
        "clipped",
    ):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a.double(), b.double(), 2e-6, name)
    for a, b in zip(got.metrics().to_dict().items(), want.metrics().to_dict().items(), strict=True):
        assert a == (b[0], pytest.approx(b[1], rel=1e-4, abs=1e-6, nan_ok=True))


@pytest.mark.usefixtures("capturing")
def test_scores_from_elsewhere_and_topk_of_zero_filled_rows(backend):
    batch = make_batch(20, kinds=("linear", "logprobs", "logprobs"), dtype=F32)
    bad = [like(m, logprobs=m.logprobs.masked_fill(~batch.mask, float("nan"))) for m in batch.models[1:]]
    out = fg.gopd_loss(batch.student, *bad, batch.token_ids, mask=batch.mask, reward_scale=1.25, backend=backend)
    assert torch.isfinite(out.loss)
    assert (out.teacher_logprobs[~batch.mask] == 0).all()
    ids, logprobs = fg.token_topk(batch.student, 3, mask=batch.mask, backend=backend)
    assert (ids[~batch.mask] == -1).all()
    assert (logprobs[~batch.mask] == 0).all()
    sent = fg.TopKLogProbs(ids, logprobs)
    out = fg.gopd_loss(batch.student, sent, None, batch.token_ids, mask=batch.mask, estimator="topk", backend=backend)
    assert out.kl.abs().max() < 1e-6


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher_index": torch.zeros(2, dtype=torch.int64)}, "teacher_index"),
        ({"grad_filter": 1e-6}, "grad_filter"),
        ({"ratio": "sequence", "old_logprobs": OFF_POLICY["old_logprobs"]}, "ratio='sequence' with mask"),
        ({"advantage_fn": lambda stats: stats.student_logprobs}, "advantage_fn with mask"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_an_option_that_needs_a_host_sync_is_refused(options, named):
    batch = make_batch(21, dtype=F32)
    teacher = [batch.teacher] if named == "teacher_index" else batch.teacher
    with pytest.raises(ValueError, match=rf"{named} waits for the device.*CUDA graph"):
        fg.gopd_loss(batch.student, teacher, None, batch.token_ids, mask=batch.mask, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("masked", [False, True])
@one_of_each
def test_a_captured_step_replays_on_new_values(objective, masked):
    def batch_of(seed):
        batch = make_batch(seed, shape=(64,), vocab=(1000,) * 3, hidden=(64,) * 3, dtype=BF16, masked=masked)
        heads = [like(m, **{k: x.detach().cuda() for k, x in m.tensors.items()}) for m in batch.models]
        mask = None if batch.mask is None else batch.mask.cuda()
        return batch.replaced(
            student=trainable(heads[0]), teacher=heads[1], ref=heads[2], token_ids=batch.token_ids.cuda(), mask=mask
        )

    static, options = batch_of(0), {"reward_scale": 1.25, **objective}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = run(static, **options)
    fresh = batch_of(1)
    with torch.no_grad():
        for old, new in zip(static.models, fresh.models, strict=True):
            for name, x in old.tensors.items():
                x.copy_(new.tensors[name])
        static.token_ids.copy_(fresh.token_ids)
        if masked:
            static.mask.copy_(fresh.mask)
    graph.replay()
    want, want_grads = run(fresh, **options)
    assert_close(out.loss, want.loss, 1e-5)
    assert_all_close(grads, want_grads, 1e-2)


# ----------------------------------------------------------------------------------------------------- inference mode


@pytest.mark.parametrize("estimator", ["sampled", "full"])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_teacher_and_tokens_may_come_from_inference_mode(estimator, reduction):
    batch = make_batch(9, dtype=torch.float32)
    with torch.inference_mode():
        teacher, ref = (type(m)(**{k: x.clone() for k, x in m.tensors.items()}) for m in (batch.teacher, batch.ref))
        inferred = batch.replaced(teacher=teacher, ref=ref, token_ids=batch.token_ids.clone(), mask=batch.mask.clone())
    options = {"estimator": estimator, "reduction": reduction, "reward_scale": 1.25}

    def gradients(b):
        out = fg.gopd_loss(*b.models, b.token_ids, mask=b.mask, **options)
        return torch.autograd.grad(out.loss.sum(), b.leaves)

    for got, want in zip(gradients(inferred), gradients(batch), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_hidden_states_of_inference_mode_train_the_head_alone(backend, reduction):
    """A frozen body run in inference mode under a trainable head; also in a second backward, which reads them again."""
    batch = make_batch(22, dtype=F32)
    with torch.inference_mode():
        frozen = like(batch.student, hidden=batch.student.hidden.detach().clone())
    weight = batch.student.weight

    def loss(student):
        models = (student, batch.teacher, batch.ref, batch.token_ids)
        return fg.gopd_loss(*models, mask=batch.mask, reward_scale=1.25, reduction=reduction, backend=backend).loss

    value = loss(frozen).sum()
    first = torch.autograd.grad(value, weight, retain_graph=True)[0].clone()
    second = torch.autograd.grad(value, weight)[0]
    (want,) = torch.autograd.grad(loss(batch.student).sum(), weight)
    assert torch.equal(first, want)
    assert torch.equal(second, want)


def test_outputs_of_inference_mode_are_read_outside(backend):
    batch = make_batch(23, dtype=F32)
    with torch.inference_mode():
        out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale=1.25, backend=backend)
    want = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale=1.25, backend=backend)
    assert out.metrics().to_dict() == want.metrics().to_dict()


def test_a_field_that_is_first_read_in_inference_mode_can_be_trained_with(backend):
    batch, factor = make_batch(23, dtype=F32), torch.ones(2, 3, requires_grad=True)
    out = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, backend=backend)
    with torch.inference_mode():
        out.advantages.sum()
    (out.advantages * factor.sum()).sum().backward()
    assert_close(factor.grad, out.advantages.sum().expand(2, 3), 1e-6)


# ------------------------------------------------------------------------------------------- strides and requires_grad


@one_of_each
def test_expanded_weights_masks_ids_and_scales(backend, objective):
    """Stride 0 everywhere; the gradient of an expanded weight is the sum over its rows."""
    batch = make_batch(24, shape=(3, 4), dtype=F32, masked=False)
    row = torch.randn(1, 12, generator=generator(24)).requires_grad_()
    bias = torch.randn(1, generator=generator(25)).requires_grad_()
    per_token = {
        "token_ids": torch.tensor([[5]]),
        "mask": torch.tensor([[True], [False], [True]]),
        "reward_scale": torch.tensor([[1.25], [1.0], [0.5]]),
    }
    results = []
    for how in (torch.Tensor.expand, lambda x, *shape: x.expand(*shape).contiguous()):
        head = fg.LinearHead(batch.student.hidden, how(row, 37, 12), how(bias, 37))
        values = {k: how(x, 3, 4) for k, x in per_token.items()}
        out = fg.gopd_loss(head, batch.teacher, batch.ref, **values, backend=backend, **objective)
        leaves = [batch.student.hidden, row, bias]
        results.append((out.token_loss, *torch.autograd.grad(out.loss, leaves)))
    assert_close(results[0][0], results[1][0], 1e-6)
    for got, want in zip(results[0][1:], results[1][1:], strict=True):
        assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["transposed", "sliced rows", "sliced columns", "reversed"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_weight_of_any_strides_has_its_own_gradient(backend, layout, dtype):
    batch = make_batch(25, dtype=dtype)
    w = batch.student.weight.detach()
    base, view = {
        "transposed": (w.T.contiguous(), lambda x: x.T),
        "sliced rows": (torch.cat([w, w])[torch.arange(74)], lambda x: x[:37]),
        "sliced columns": (torch.cat([w, w], 1), lambda x: x[:, 12:]),
        "reversed": (w.flip(0), lambda x: x.flip(0)),
    }[layout]
    base.requires_grad_()
    other = batch.replaced(student=like(batch.student, weight=view(base)))
    options = {"reward_scale": 1.25, "estimator": "full", "backend": backend}
    want, (dhidden, dweight) = run(batch, **options)
    out = fg.gopd_loss(*other.models, batch.token_ids, mask=batch.mask, **options)
    got = torch.autograd.grad(out.loss, [batch.student.hidden, base])
    tolerance = 1e-6 if dtype == F32 else 1e-2
    assert_close(out.loss, want.loss, tolerance)
    assert_close(got[0], dhidden, tolerance)
    assert_close(view(got[1]), dweight, tolerance)


@pairwise(trained=list(itertools.product([False, True], repeat=3)), reduction=["token-mean", "none"])
def test_any_of_hidden_weight_and_bias_may_require_a_gradient(trained, reduction):
    batch = make_batch(26, transforms=[{"bias": True}, {}, {}])
    leaves = [x.requires_grad_(t) for x, t in zip(batch.student.tensors.values(), trained, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    options = {"mask": batch.mask, "reward_scale": 1.25, "estimator": "full", "reduction": reduction}
    losses = [f(*batch.models, batch.token_ids, **options).loss.sum() for f in (fg.gopd_loss, fg.reference.gopd_loss)]
    assert [x.requires_grad for x in losses] == [any(trained)] * 2
    if wanted:
        got, want = (torch.autograd.grad(x, wanted) for x in losses)
        assert_all_close(got, want, 1e-12)


# ------------------------------------------------------------------------------------------- hooks, modes and defaults


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_hooks_see_each_gradient_once_and_may_change_it(backend, reduction):
    batch = make_batch(27, dtype=F32)
    value = pure(batch, backend, reduction=reduction)(*batch.leaves)
    want = [g.clone() for g in torch.autograd.grad(value, batch.leaves, retain_graph=True)]
    seen: list[str] = []
    for name, leaf in zip(("hidden", "weight"), batch.leaves, strict=True):
        leaf.register_hook(lambda g, name=name: (seen.append(name), g.mul_(-1))[1])
        leaf.register_post_accumulate_grad_hook(lambda x, name=name: seen.append(f"{name} accumulated"))
    value.backward(retain_graph=True)
    assert sorted(seen) == ["hidden", "hidden accumulated", "weight", "weight accumulated"]
    value.backward()
    for leaf, g in zip(batch.leaves, want, strict=True):
        assert torch.equal(leaf.grad, -g - g)  # what a hook wrote to is not handed out again


@every_objective
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_losses_of_tokens_may_be_written_to(backend, objective, shape):
    """As by a trainer that weighs them in place."""
    batch = make_batch(31, shape=shape, dtype=F32)
    options = {"reward_scale": 1.25, "backend": backend, "reduction": "none", **objective}
    weights = torch.arange(6.0).reshape(shape)
    want = fg.gopd_loss(*batch.models, batch.token_ids, **options)
    out = fg.gopd_loss(*batch.models, batch.token_ids, **options)
    wanted = torch.autograd.grad((want.loss * weights).sum(), batch.leaves)
    out.loss.mul_(weights)
    assert all(map(torch.equal, torch.autograd.grad(out.loss.sum(), batch.leaves), wanted))
    assert torch.equal(out.token_loss, want.token_loss)


@pytest.fixture(params=["deterministic", "anomaly", "float64 default", "meta default", "grad disabled"])
def mode(request):
    """A global mode, switched on for the length of a test."""
    name = request.param
    if name == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif name == "anomaly":
        torch.autograd.set_detect_anomaly(True)
    elif name == "float64 default":
        torch.set_default_dtype(torch.float64)
    elif name == "meta default":
        torch.set_default_device("meta")
    yield name
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


PLAIN_BATCH = make_batch(28, dtype=F32, transforms=[{"bias": True}, {"softcap": 8.0}, {"temperature": 0.7}])


@every_objective
def test_global_modes_and_defaults_change_no_bit(backend, objective, mode, request):
    options = {"reward_scale": 1.25, "backend": backend, "chunk_size": 4, **objective}
    got, grads = run(PLAIN_BATCH, **options)
    metrics = got.metrics().to_dict()
    assert got.loss.dtype == F32
    assert got.loss.device.type == "cpu"
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    want, want_grads = run(PLAIN_BATCH, **options)
    assert torch.equal(got.loss, want.loss)
    assert all(map(torch.equal, grads, want_grads))
    assert metrics == want.metrics().to_dict()


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_anomaly_mode_points_at_a_gradient_that_is_nan():
    batch = make_batch(29, dtype=F32, masked=False)
    with torch.no_grad():
        batch.student.hidden[0, 0, 0] = float("nan")
    with torch.autograd.set_detect_anomaly(True):
        loss = fg.gopd_loss(batch.student, batch.teacher, None, batch.token_ids).loss
        with pytest.raises(RuntimeError, match="_FusedLossBackward' returned nan values"):
            loss.backward()


# ------------------------------------------------------------------------------------------- other kinds of tensors


class Named(torch.Tensor):
    """A subclass without behaviour."""


class Refusing(torch.Tensor):
    """A wrapper subclass that implements no operator."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"Refusing has no {func}")


def test_subclasses_and_parameters_are_tensors(backend):
    batch = make_batch(30, dtype=F32)
    want, want_grads = run(batch, backend=backend)
    as_parameter = like(batch.student, weight=torch.nn.Parameter(batch.student.weight.detach()))
    as_subclass = like(batch.student, hidden=batch.student.hidden.detach().as_subclass(Named).requires_grad_())
    for student in (as_parameter, as_subclass):
        got, grads = run(batch.replaced(student=student), backend=backend)
        assert torch.equal(got.loss, want.loss)
        assert all(map(torch.equal, grads, want_grads))


def test_a_subclass_that_cannot_do_it_is_the_one_to_say_so():
    batch = make_batch(31, dtype=F32, masked=False)
    head = like(batch.student, weight=Refusing(batch.student.weight.detach()))
    with pytest.raises(NotImplementedError, match="Refusing has no"):
        fg.gopd_loss(head, batch.teacher, None, batch.token_ids)


@pytest.mark.filterwarnings("ignore:.*(prototype|beta):UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fg.LinearHead(H, W.to_sparse()), "weight must be dense, got torch.sparse_coo"),
        (lambda: fg.LinearHead(H, W.to_sparse_csr()), "weight must be dense, got torch.sparse_csr"),
        (lambda: fg.LinearHead(H, W.to_mkldnn()), "weight must be dense, got torch._mkldnn"),
        (
            lambda: fg.Logits(torch.nested.nested_tensor([torch.zeros(2, 5), torch.zeros(3, 5)], layout=torch.jagged)),
            "logits must be dense, got a nested tensor.*cu_seqlens",
        ),
        (lambda: fg.LinearHead(H, W.to(torch.complex64)), "weight must be a float tensor.*complex64"),
        (lambda: fg.LinearHead(H.int(), W), "hidden must be a float tensor.*int32"),
        (lambda: fg.Logits(W.to(torch.float8_e4m3fn)), "logits must be a float tensor.*float8"),
    ],
)
def test_tensors_that_no_kernel_reads_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# ------------------------------------------------------------------------------------------- copies, pickles, threads


def test_modules_and_heads_are_pickled_and_copied(backend):
    batch = make_batch(32, dtype=F32)
    loss = fg.GOPDLoss(reward_scale=1.25, estimator="full", backend=backend)
    want = loss(*batch.models, batch.token_ids, mask=batch.mask).loss
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert again.options == loss.options
        for models in (batch.models, copy.deepcopy(batch.models), pickle.loads(pickle.dumps(batch.models))):
            assert torch.equal(again(*models, batch.token_ids, mask=batch.mask).loss, want)


def test_outputs_are_pickled_without_their_graph():
    batch = make_batch(33, dtype=F32)
    out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale=1.25)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(out)  # as of any tensor with a graph
    back = pickle.loads(pickle.dumps(out))
    assert back.loss.grad_fn is None
    assert back.metrics().to_dict() == out.metrics().to_dict()
    with torch.no_grad():
        detached = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale=1.25)
    assert torch.equal(copy.deepcopy(detached).loss, out.loss)


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_threads_do_not_disturb_each_other(backend, reduction):
    """Forward and backward in several threads at once, on one shared head: what DataParallel and servers do."""
    batches = [make_batch(34 + i, dtype=F32) for i in range(4)]
    shared = batches[0].student.weight

    def gradients(batch):
        def hook(stats):
            return stats.teacher_logprobs - stats.student_logprobs

        student = like(batch.student, weight=shared)
        out = fg.gopd_loss(
            student,
            *batch.models[1:],
            batch.token_ids,
            mask=batch.mask,
            reduction=reduction,
            backend=backend,
            chunk_size=4,
            advantage_fn=hook,
        )
        return torch.autograd.grad(out.loss.sum(), [batch.student.hidden, shared])

    want = [gradients(b) for b in batches]
    got: list[list] = [[] for _ in batches]
    threads = [
        threading.Thread(target=lambda i=i: got[i].extend(gradients(batches[i]) for _ in range(8)))
        for i in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs, expected in zip(got, want, strict=True):
        assert len(runs) == 8
        assert all(torch.equal(a, b) for grads in runs for a, b in zip(grads, expected, strict=True))


def test_threads_accumulate_into_one_weight():
    batches = [make_batch(40 + i, dtype=F32) for i in range(3)]
    shared = batches[0].student.weight
    losses = [fg.gopd_loss(like(b.student, weight=shared), b.teacher, None, b.token_ids, mask=b.mask) for b in batches]
    want = sum(torch.autograd.grad(out.loss, shared, retain_graph=True)[0] for out in losses)
    threads = [threading.Thread(target=out.loss.backward) for out in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(shared.grad, want, 1e-6)
