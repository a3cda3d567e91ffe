"""Gradients: gradcheck in float64, what is skipped, second backwards, and the registered ops."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

import fused_gopd as fg
from builders import OBJECTIVES, assert_all_close, generator, like, make_batch, trainable
from combinations import pairwise
from fused_gopd.autograd.saved import flatten, unflatten
from fused_gopd.options import LossCall
from fused_gopd.prepare import prepare
from fused_gopd.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVE_IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
SMALL = {"shape": (2, 2), "vocab": (5, 6, 7), "hidden": (3, 2, 4), "scale": 1.0}


def held_still(batch, options):
    """The sampled surrogate's ratio against a fixed old policy: finite differences move p but must not move p_old."""
    if options["estimator"] != "sampled":
        return options
    old = fg.token_logprobs(batch.student, batch.token_ids, backend="torch").detach()
    return {**options, "old_logprobs": old}


@pairwise(objective=OBJECTIVES, kind=["linear", "logits"], reduction=["token-mean", "seq-mean-token-mean", "none"])
def test_gradcheck(objective, kind, reduction):
    transforms = [
        {"bias": True, "softcap": 6.0, "temperature": 0.8} if kind == "linear" else {"logit_scale": 0.7},
        {},
        {},
    ]
    batch = make_batch(1, kinds=(kind, "linear", "logits"), transforms=transforms, **SMALL)
    batch.token_ids.clamp_(max=4)
    options = held_still(batch, {"reward_scale": 1.25, "reduction": reduction, "backend": "torch", **objective})
    names = list(batch.student.tensors)

    def loss(*tensors):
        student = like(batch.student, **dict(zip(names, tensors, strict=True)))
        return fg.gopd_loss(student, batch.teacher, batch.ref, batch.token_ids, mask=batch.mask, **options).loss

    assert torch.autograd.gradcheck(loss, tuple(batch.leaves), nondet_tol=0.0)


@pytest.mark.parametrize("clip", [(0.2, 0.28), (1e-3, 1e-3)])
def test_gradcheck_with_a_ratio_and_clipping(clip):
    batch = make_batch(2, **SMALL)
    own = fg.token_logprobs(batch.student, batch.token_ids, backend="torch").detach()
    old = own + 0.3 * torch.randn(2, 2, generator=generator(0), dtype=torch.float64)

    def loss(hidden, weight):
        return fg.gopd_loss(
            fg.LinearHead(hidden, weight),
            batch.teacher,
            batch.ref,
            batch.token_ids,
            reward_scale=1.25,
            old_logprobs=old,
            clip=clip,
            backend="torch",
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(batch.leaves))


@pytest.mark.parametrize("kind", ["linear", "logits"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_token_logprobs_and_entropy(kind, masked):
    transforms = [{"bias": True} if kind == "linear" else {"softcap": 4.0}, {}, {}]
    batch = make_batch(3, kinds=(kind, "linear", "linear"), transforms=transforms, masked=masked, **SMALL)
    names = list(batch.student.tensors)

    def score(*tensors):
        head = like(batch.student, **dict(zip(names, tensors, strict=True)))
        return fg.token_logprobs(head, batch.token_ids, mask=batch.mask, return_entropy=True, backend="torch")

    assert torch.autograd.gradcheck(score, tuple(batch.leaves))


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_double_backward_raises(backend, reduction):
    batch = make_batch(4, dtype=torch.float32)
    out = fg.gopd_loss(*batch.models, batch.token_ids, reduction=reduction, backend=backend)
    grads = torch.autograd.grad(out.loss.sum(), batch.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad|twice"):
        grads[0].sum().backward()


CASES = [
    ("linear", torch.float32, "token-mean"),
    ("linear", torch.float32, "none"),
    ("linear", torch.bfloat16, "token-mean"),
    ("linear", torch.float16, "seq-mean-token-mean"),
    ("linear", torch.float16, "none"),
    ("logits", torch.float32, "token-mean"),
    ("logits", torch.float32, "none"),
    ("logits", torch.bfloat16, "token-mean"),
    ("logits", torch.float16, "sum"),
]


def call(batch, backend, reduction, objective):
    out = fg.gopd_loss(
        *batch.models,
        batch.token_ids,
        mask=batch.mask,
        reward_scale=1.25,
        reduction=reduction,
        backend=backend,
        chunk_size=4,
        **objective,
    )
    return out.loss.sum()


@pytest.mark.parametrize(("kind", "dtype", "reduction"), CASES)
@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=OBJECTIVE_IDS[:2])
def test_a_retained_graph_gives_the_same_bits_again(backend, kind, dtype, reduction, objective):
    batch = make_batch(5, kinds=(kind, "linear", "linear"), dtype=dtype)
    loss = call(batch, backend, reduction, objective)
    first = torch.autograd.grad(loss, batch.leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, batch.leaves, retain_graph=True)
    third = torch.autograd.grad(loss, batch.leaves)
    for again in (second, third):
        assert all(map(torch.equal, again, kept))
    assert all(map(torch.equal, first, kept))  # and no later backward writes to what was handed out


@pytest.mark.parametrize(("kind", "dtype", "reduction"), CASES)
def test_a_second_backward_accumulates_into_grad(backend, kind, dtype, reduction):
    batch = make_batch(6, kinds=(kind, "linear", "linear"), dtype=dtype)
    want = torch.autograd.grad(call(batch, backend, reduction, OBJECTIVES[1]), batch.leaves)
    loss = call(batch, backend, reduction, OBJECTIVES[1])
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, g in zip(batch.leaves, want, strict=True):
        assert torch.equal(leaf.grad, g + g)


@pytest.mark.parametrize("factors", [(1.0, 3.0), (2.0**-4, 2.0**8), (-1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_upstream_gradient_is_a_factor(backend, factors, dtype):
    """Also in a second backward with another one."""
    batch = make_batch(7, dtype=dtype, scale=0.5)
    loss = call(batch, backend, "sum", OBJECTIVES[1])
    base = [g.double() for g in torch.autograd.grad(loss, batch.leaves, retain_graph=True)]
    for factor in factors:
        got = torch.autograd.grad(loss * factor, batch.leaves, retain_graph=True)
        # one rounding of each side to the student's dtype
        tolerance = 2 * torch.finfo(dtype).eps
        if factor:
            assert_all_close([g.double() / factor for g in got], base, tolerance)
        else:
            assert all((g == 0).all() for g in got)


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_a_second_backward_without_retain_graph_raises(backend, reduction):
    batch = make_batch(8, dtype=torch.float32)
    loss = call(batch, backend, reduction, OBJECTIVES[0])
    loss.backward()
    with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
        loss.backward()


def changed(batch, which):
    target = {
        "hidden": lambda: batch.student.hidden,
        "weight": lambda: batch.student.weight,
        "teacher": lambda: batch.teacher.weight,
        "ref": lambda: batch.ref.hidden,
        "token_ids": lambda: batch.token_ids,
    }[which]()
    with torch.no_grad():
        target.zero_()


@pytest.mark.parametrize("which", ["hidden", "weight", "teacher", "ref", "token_ids"])
@pytest.mark.parametrize("again", ["second backward", "reduction none"])
def test_an_input_changed_in_place_before_a_recomputation_is_noticed(backend, again, which):
    batch = make_batch(9, dtype=torch.float32, masked=False)
    loss = call(batch, backend, "none" if again == "reduction none" else "token-mean", OBJECTIVES[0])
    if again == "second backward":
        loss.backward(retain_graph=True)
    changed(batch, which)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_changed_after_a_gradient_in_the_forward_does_not_matter(backend):
    batch = make_batch(10, dtype=torch.float32, masked=False)
    want = torch.autograd.grad(call(batch, backend, "token-mean", OBJECTIVES[0]), batch.leaves)
    loss = call(batch, backend, "token-mean", OBJECTIVES[0])
    changed(batch, "teacher")
    changed(batch, "token_ids")
    assert all(map(torch.equal, torch.autograd.grad(loss, batch.leaves), want))


@pytest.mark.parametrize(
    "trainable_fields",
    [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias"), ("weight", "bias")],
)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_frozen_tensor_changes_no_other_gradient(backend, trainable_fields, reduction, dtype):
    batch = make_batch(11, dtype=dtype, transforms=[{"bias": True}, {}, {}])
    want = dict(
        zip(
            ("hidden", "weight", "bias"),
            torch.autograd.grad(call(batch, backend, reduction, OBJECTIVES[1]), batch.leaves),
            strict=True,
        )
    )
    for name, tensor in batch.student.tensors.items():
        tensor.requires_grad_(name in trainable_fields)
    call(batch, backend, reduction, OBJECTIVES[1]).backward()
    for name, tensor in batch.student.tensors.items():
        if name in trainable_fields:
            assert torch.equal(tensor.grad, want[name])
        else:
            assert tensor.grad is None


def test_a_wholly_frozen_student_has_no_graph(backend):
    batch = make_batch(12, dtype=torch.float32)
    frozen = like(batch.student, **{k: x.detach() for k, x in batch.student.tensors.items()})
    for reduction in ("token-mean", "none"):
        assert not call(batch.replaced(student=frozen), backend, reduction, OBJECTIVES[1]).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
def test_without_gradients_the_loss_is_the_same(backend, mode, objective):
    batch = make_batch(13, dtype=torch.float32)
    want = call(batch, backend, "token-mean", objective)
    with mode():
        got = call(batch, backend, "token-mean", objective)
    assert torch.equal(got, want.detach())
    assert not got.requires_grad


def test_gradients_reach_what_made_the_hidden_states(backend):
    """The student's hidden states are not leaves in a real model, and autograd may own their views."""
    batch = make_batch(14, shape=(2, 6), dtype=torch.float32, masked=False)
    body = torch.randn(12, 12, generator=generator(1)).requires_grad_()

    def loss(student_hidden):
        heads = [like(m, hidden=m.hidden[:, :-1]) for m in (batch.teacher, batch.ref)]
        head = fg.LinearHead((student_hidden @ body)[:, :-1], batch.student.weight)
        return fg.gopd_loss(head, *heads, batch.token_ids[:, 1:], reward_scale=1.25, estimator="full", backend=backend)

    (got,) = torch.autograd.grad(loss(batch.student.hidden.detach()).loss, body)
    reference = fg.reference.gopd_loss(
        fg.LinearHead((batch.student.hidden.detach() @ body)[:, :-1], batch.student.weight),
        *[like(m, hidden=m.hidden[:, :-1]) for m in (batch.teacher, batch.ref)],
        batch.token_ids[:, 1:],
        reward_scale=1.25,
        estimator="full",
    )
    (want,) = torch.autograd.grad(reference.loss, body)
    assert_all_close([got], [want], 2e-5)


def test_hidden_and_weight_may_be_one_leaf(backend):
    """Autograd adds the two gradients."""
    x = torch.randn(6, 6, generator=generator(2)).requires_grad_()
    batch = make_batch(15, shape=(6,), vocab=(6, 6, 6), dtype=torch.float32, masked=False)
    parts = trainable(fg.LinearHead(x, x))
    loss = lambda head: fg.gopd_loss(head, *batch.models[1:], batch.token_ids, backend=backend).loss  # noqa: E731
    (got,) = torch.autograd.grad(loss(fg.LinearHead(x, x)), x)
    want = torch.autograd.grad(loss(parts), [parts.hidden, parts.weight])
    assert torch.equal(got, want[0] + want[1])


def test_a_problem_is_what_it_was_when_its_tensors_come_back():
    batch = make_batch(17, dtype=torch.float32)
    teachers = [batch.teacher, make_batch(18, dtype=torch.float32).teacher]
    index = torch.arange(batch.token_ids.shape[0]) % 2
    options = {"teacher_index": index, "mask": batch.mask, "reward_scale": 1.25, **OBJECTIVES[3]}
    problem = prepare(LossCall(batch.student, teachers, batch.ref, batch.token_ids, **options))
    tensors = []
    spec = flatten(problem, tensors)
    assert "tensor(" not in repr(spec)
    back = unflatten(spec, tensors)
    assert isinstance(back, Problem)
    again = []
    assert flatten(back, again) == spec
    assert len(again) == len(tensors) > 10
    assert all(a is b for a, b in zip(again, tensors, strict=True))


def test_a_float64_bias_runs_on_every_backend():
    batch = make_batch(10, dtype=torch.float32)
    bias = torch.randn(batch.student.vocab_size, dtype=torch.float64, requires_grad=True)
    head = fg.LinearHead(batch.student.hidden, batch.student.weight, bias)
    out = fg.gopd_loss(head, batch.teacher, None, batch.token_ids, mask=batch.mask)
    (grad,) = torch.autograd.grad(out.loss, bias)
    assert grad.dtype == torch.float64
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_the_loss_may_be_checkpointed(reentrant, reduction):
    batch = make_batch(3)

    def loss(hidden):
        student = like(batch.student, hidden=hidden)
        out = fg.gopd_loss(student, batch.teacher, None, batch.token_ids, mask=batch.mask, reduction=reduction)
        return out.loss.sum() + fg.token_logprobs(student, batch.token_ids, mask=batch.mask).sum()

    want = torch.autograd.grad(loss(batch.student.hidden), batch.student.hidden)
    hidden = batch.student.hidden.detach().clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    assert_all_close([hidden.grad], want, 0.0)
