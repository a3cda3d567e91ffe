"""The divergence family beyond the KLs and the JSD: alpha, the two skew KLs, and the mix of the KLs."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fused_gopd as fg
from builders import assert_all_close, assert_close, assert_same_as_oracle, expect, generator, make_batch, run
from combinations import product_on_float64
from fused_gopd.objective.divergences import DIVERGENCES, Mixture, Outcomes, Parameter, make

if TYPE_CHECKING:
    from decimal import Decimal

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 5)
FAMILY = (
    {"divergence": "alpha", "alpha": -0.5},
    {"divergence": "alpha", "alpha": 0.3},
    {"divergence": "alpha"},
    {"divergence": "alpha", "alpha": 0.7},
    {"divergence": "alpha", "alpha": 2.0},
    {"divergence": "skew_kl"},
    {"divergence": "skew_kl", "skew": 0.9},
    {"divergence": "skew_reverse_kl"},
    {"divergence": "skew_reverse_kl", "skew": 0.5},
    {"divergence": "mixed", "forward_weight": 0.25},
    {"divergence": "mixed", "forward_weight": "per token"},
)
ESTIMATORS = (
    {"estimator": "full"},
    {"estimator": "topk", "k": 6, "tail": "bucket"},
    {"estimator": "topk", "k": 6, "tail": "drop"},
    {"estimator": "topk", "k": 6, "tail": "renormalize"},
    {"estimator": "topk", "k": 37, "tail": "bucket"},
)
every = pytest.mark.parametrize("options", FAMILY, ids=lambda o: "-".join(map(str, o.values())))


def filled(options: dict, shape=SHAPE, dtype=torch.float64) -> dict:
    """The options, with one forward weight per token where that is wanted."""
    if options.get("forward_weight") == "per token":
        return options | {"forward_weight": torch.rand(shape, generator=generator(3), dtype=torch.float64).to(dtype)}
    return options


# ---------------------------------------------------------------------------------------------------------- formulas


@product_on_float64(options=FAMILY, estimator=ESTIMATORS, lam=(1.0, 1.25, "per token"))
def test_it_is_its_formula(backend_dtype, options, estimator, lam):
    """Values and gradients against the oracle, with masked tokens and -inf in the models."""
    batch = make_batch(2, shape=SHAPE, kinds=("linear", "logits", "logits"), dtype=backend_dtype.dtype)
    with torch.no_grad():
        for model, columns in ((batch.teacher, [3, 5]), (batch.ref, [5, 11])):
            model.logits[0, :, columns] = -math.inf
        batch.token_ids[0] = 7
    if lam == "per token":
        lam = torch.linspace(0.1, 1.5, 15, dtype=backend_dtype.dtype).reshape(SHAPE)
    assert_same_as_oracle(
        batch, backend_dtype, reward_scale=lam, **estimator, **filled(options, dtype=backend_dtype.dtype)
    )


@every
@pytest.mark.parametrize("estimator", ESTIMATORS[:3], ids=lambda o: "-".join(map(str, o.values())))
def test_the_dense_reference_is_the_same_formula(options, estimator):
    batch = make_batch(4, shape=SHAPE)
    options = {**estimator, **filled(options), "reward_scale": 1.25}
    out, grads = run(batch, fg.reference.gopd_loss, **options)
    want, want_grads = expect(batch, **options)
    assert_close(out.loss, want.loss, 1e-12)
    assert_all_close(grads, want_grads, 1e-12)


@pytest.mark.parametrize("reduction", ["none", "seq-mean-token-mean"])
def test_the_forward_weight_may_be_one_per_sequence(backend_dtype, reduction):
    batch = make_batch(5, shape=SHAPE, dtype=backend_dtype.dtype)
    weight = torch.tensor([0.0, 1.0, 0.3], dtype=backend_dtype.dtype)
    options = {"estimator": "full", "divergence": "mixed", "reward_scale": 1.25, "reduction": reduction}
    got, want = (
        fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, forward_weight=w, **options,
                     backend=backend_dtype.backend).loss
        for w in (weight, weight[:, None].expand(SHAPE))
    )  # fmt: skip
    assert torch.equal(got, want)
    packed = make_batch(5, shape=(15,), dtype=backend_dtype.dtype)
    bounds = torch.tensor([0, 5, 10, 15])
    assert_same_as_oracle(packed, backend_dtype, cu_seqlens=bounds, forward_weight=weight, estimator="full",
                          divergence="mixed", reward_scale=1.25)  # fmt: skip


@pytest.mark.parametrize("estimator", [{"estimator": "full"}, {"estimator": "topk", "k": 6, "tail": "drop"}], ids=str)
@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"divergence": "alpha", "alpha": 0}, "reverse_kl"),
        ({"divergence": "alpha", "alpha": 1}, "forward_kl"),
        ({"divergence": "skew_kl", "skew": 0}, "forward_kl"),
        ({"divergence": "skew_reverse_kl", "skew": 0}, "reverse_kl"),
        ({"divergence": "mixed", "forward_weight": 0}, "reverse_kl"),
        ({"divergence": "mixed", "forward_weight": 1}, "forward_kl"),
    ],
    ids=str,
)
def test_at_the_ends_of_their_ranges_they_are_the_two_kls(backend, estimator, options, end):
    batch = make_batch(6, dtype=torch.float32)
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        (out, grads), (want, want_grads) = (
            run(batch, function, reward_scale=1.25, backend=backend, **estimator, **x)
            for x in (options, {"divergence": end})
        )
        assert torch.equal(out.token_loss, want.token_loss)
        assert all(map(torch.equal, grads, want_grads))


@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize"])
@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"divergence": "alpha", "alpha": 1e-7}, "reverse_kl"),
        ({"divergence": "alpha", "alpha": 1 - 1e-7}, "forward_kl"),
        ({"divergence": "skew_kl", "skew": 1e-9}, "forward_kl"),
        ({"divergence": "skew_reverse_kl", "skew": 1e-9}, "reverse_kl"),
    ],
    ids=str,
)
def test_near_the_ends_their_gradients_go_there(tail, options, end):
    """Under every tail: the part of alpha that ``drop`` sums is chosen so. They differ by the parameter's size."""
    batch = make_batch(6)
    # the reverse KL's target is not normalised, which is in its gradient where an outcome is not summed
    scale = 1.0 if (tail, end) == ("drop", "reverse_kl") else 1.25
    topk = {"estimator": "topk", "k": 6, "tail": tail, "reward_scale": scale}
    (_, grads), (_, want) = (run(batch, **topk, **x) for x in (options, {"divergence": end}))
    assert_all_close(grads, want, 1e-5)


# ------------------------------------------------------------------------------------------------------------ numbers


@every
@pytest.mark.parametrize("estimator", [{"estimator": "full"}, {"estimator": "topk", "k": 6}], ids=str)
def test_equal_models_have_loss_and_gradient_of_rounding(backend_dtype, options, estimator):
    batch = make_batch(7, shape=SHAPE, dtype=backend_dtype.dtype)
    same = fg.LinearHead(batch.student.hidden.detach().clone(), batch.student.weight.detach().clone())
    batch = batch.replaced(teacher=same, ref=same)
    options = filled(options, dtype=backend_dtype.dtype)
    out, grads = run(batch, reward_scale=1.25, reduction="sum", backend=backend_dtype.backend, **estimator, **options)
    # log-sums that are rounded apart from each other, in products that are sums over 15 tokens and 37 entries
    for x in (out.token_loss, *grads):
        assert x.abs().max() <= 100 * torch.finfo(backend_dtype.dtype).eps


@every
@pytest.mark.parametrize("gap", [10.0, 200.0, 3e4])
def test_probabilities_that_underflow_leave_everything_finite(backend, options, gap):
    """Models that exclude each other's tokens, by far more than float32 has: t / p beyond its range either way."""
    logits = torch.tensor([[0.0, 1.0, gap, -gap, 2.0], [gap, 0.0, -1.0, 0.0, -gap]])
    batch = make_batch(8, shape=(2,), vocab=(5, 5, 5), kinds=("logits",) * 3, dtype=torch.float32, masked=False)
    with torch.no_grad():
        batch.student.logits.copy_(logits)
        batch.teacher.logits.copy_(-logits)
        batch.ref.logits.copy_(logits.flip(1))
    for lam in (1.0, 1.25):
        for estimator in ({"estimator": "full"}, {"estimator": "topk", "k": 2}):
            call = {"reward_scale": lam, "reduction": "sum", **estimator, **filled(options, (2,), torch.float32)}
            out, grads = run(batch, backend=backend, **call)
            assert out.token_loss.isfinite().all()
            assert grads[0].isfinite().all()
            want, want_grads = expect(batch, **call)
            # p (h - A) of a likely token has the rounding of A, which is of the size of the value; topk's bucket is 1
            # less a sum, which float32 cannot say here
            if want.loss.abs() < 1e6 and estimator["estimator"] == "full":
                assert (grads[0] - want_grads[0]).abs().max() <= 1e-6 * (1 + want.loss.abs())
                assert (out.loss - want.loss).abs() <= 1e-6 * (1 + want.loss.abs())


def test_a_small_target_keeps_its_digits_under_drop():
    """A confident student, and a target with 1e-6 of its mass on the student's tokens: h0 < 0 forms p h itself."""
    student = torch.zeros(1, 40)
    student[0, :3] = torch.tensor([12.0, 11.0, 11.5])
    teacher = torch.randn(1, 40, generator=generator(9))
    teacher[0, :3] -= 12
    for options in ({"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.9}, {"divergence": "skew_kl"}):
        grads = []
        for dtype in (torch.float32, torch.float64):
            z = student.to(dtype, copy=True).requires_grad_()
            out = fg.gopd_loss(fg.Logits(z), fg.Logits(teacher.to(dtype)), estimator="topk", k=3, support="student",
                               tail="drop", backend="torch", **options)  # fmt: skip
            grads.append(torch.autograd.grad(out.loss, z)[0])
        assert_close(grads[0], grads[1], 2e-5)


# ------------------------------------------------------------------------------------------------------------ options

STUDENT, TEACHER = (fg.Logits(x) for x in torch.randn(2, 3, 5, generator=generator(0)))
WRONG = {
    "skew of alpha": ({"divergence": "alpha", "skew": 0.1}, "skew is an option of divergence='skew_kl' or 'skew_rev"),
    "alpha of jsd": (
        {"divergence": "jsd", "alpha": 0.5},
        "alpha is an option of divergence='alpha', got alpha=0.5 with",
    ),
    "forward_weight of a KL": ({"forward_weight": 0.5}, "forward_weight is an option of divergence='mixed'"),
    "a tensor of a KL": (
        {"forward_weight": torch.rand(3)},
        "forward_weight is an option of .*got forward_weight=a tensor",
    ),
    "beta of mixed": ({"divergence": "mixed", "beta": 0.25}, "beta is an option of divergence='jsd', got beta=0.25"),
    "skew above": ({"divergence": "skew_kl", "skew": 1.5}, "skew must satisfy 0 <= skew < 1 .*got 1.5"),
    "skew of 1": ({"divergence": "skew_reverse_kl", "skew": 1}, "skew must satisfy 0 <= skew < 1 .*got 1.0"),
    "alpha inf": ({"divergence": "alpha", "alpha": math.inf}, "alpha must be finite, got inf"),
    "forward_weight below": ({"divergence": "mixed", "forward_weight": -0.1}, "0 <= forward_weight <= 1 .*got -0.1"),
    "forward_weight in a tensor": (
        {"divergence": "mixed", "forward_weight": torch.tensor([0.0, 1.0, 1.5])},
        "forward_weight must be between 0 and 1 where not masked, got 1.5",
    ),
    "shape": (
        {"divergence": "mixed", "forward_weight": torch.rand(2)},
        r"forward_weight must be a Python float, or a tensor of the token shape \(3,\), got shape \(2,\)",
    ),
    "sampled": (
        {"divergence": "alpha", "estimator": "sampled", "token_ids": torch.zeros(3, dtype=torch.int64)},
        "divergence='alpha' needs estimator='full' or 'topk'",
    ),
}


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_an_option_of_another_divergence_or_out_of_range_is_named(function, case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        function(STUDENT, TEACHER, **{"estimator": "full", **options})


def test_types_of_the_parameters():
    for name, divergence in (("alpha", "alpha"), ("skew", "skew_kl"), ("forward_weight", "mixed")):
        with pytest.raises(TypeError, match=f"{name} must be a Python number, got str"):
            fg.gopd_loss(STUDENT, TEACHER, estimator="full", divergence=divergence, **{name: "0.5"})


def test_masked_forward_weights_may_be_anything():
    weight = torch.tensor([0.5, math.nan, 0.25])
    out = fg.gopd_loss(STUDENT, TEACHER, estimator="full", divergence="mixed", forward_weight=weight,
                       mask=torch.tensor([True, False, True]))  # fmt: skip
    assert out.loss.isfinite()


def test_the_module_holds_a_forward_weight_and_takes_one_per_batch():
    module = fg.GOPDLoss(estimator="full", divergence="mixed", forward_weight=0.25)
    weight = torch.tensor([0.0, 1.0, 0.5])
    for given, want in (({}, 0.25), ({"forward_weight": weight}, weight)):
        held = module(STUDENT, TEACHER, **given).loss
        called = fg.gopd_loss(STUDENT, TEACHER, estimator="full", divergence="mixed", forward_weight=want).loss
        assert torch.equal(held, called)


# -------------------------------------------------------------------------------------------------------------- table


@pytest.mark.parametrize("name", DIVERGENCES)
def test_h_is_g_less_its_derivative(name):
    """p h~, p h and h0 of every class against autograd of its own terms: p h = d terms / d log p at fixed t."""
    divergence = make(name, beta=0.3, alpha=0.7, skew=0.2, forward_weight=0.4)
    g = generator(11)
    log_t = torch.randn(4, 9, generator=g, dtype=torch.float64).log_softmax(-1)
    log_p = torch.randn(4, 9, generator=g, dtype=torch.float64).log_softmax(-1).requires_grad_()

    def products(log_p: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(divergence.terms(Outcomes(log_p, log_t, log_t)).sum(), log_p)[0]

    outcomes = Outcomes(log_p.detach(), log_t, log_t)
    assert_close(divergence.uncentred(outcomes), products(log_p, log_t), 1e-12)
    at_equal = products(log_p, log_p.detach()) / log_p.detach().exp()
    torch.testing.assert_close(at_equal, torch.full_like(at_equal, float(divergence.h0)))
    centred = products(log_p, log_t) - log_p.detach().exp() * float(divergence.h0)
    assert_close(divergence.weighted(outcomes), centred, 1e-12)
    equal = Outcomes(log_t, log_t, log_t)
    assert (divergence.weighted(equal) == 0).all()
    assert (divergence.terms(equal) == 0).all()


@dataclasses.dataclass(frozen=True)
class Outside(Mixture):
    """The JSD as a divergence from outside: an annotation that type checkers alone know, and a tensor."""

    beta: float
    note: Decimal | None = None
    more: Any = dataclasses.field(default_factory=lambda: torch.zeros(1))
    name = "outside"
    parameter = Parameter(option="beta", default=0.5, holds=lambda b: 0 < b < 1, range="0 < beta < 1")

    @property
    def share(self) -> float:
        return self.beta

    @property
    def scales(self) -> tuple[float, float]:
        return self.beta, 1.0 - self.beta


def test_a_backward_recomputes_with_a_divergence_from_outside(backend, monkeypatch):
    """Its kernel constants, a cached property, are no field of it."""
    monkeypatch.setitem(DIVERGENCES, "outside", Outside)
    found = []
    for name in ("jsd", "outside"):
        batch = make_batch(3, shape=SHAPE, dtype=torch.float32, masked=False)
        out = fg.gopd_loss(
            *batch.models, estimator="full", divergence=name, beta=0.3, reduction="none", reward_scale=1.25,
            backend=backend,
        )  # fmt: skip
        out.loss.sum().backward()
        found.append((out.loss.detach(), batch.student.hidden.grad, batch.student.weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
