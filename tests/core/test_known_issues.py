"""What has broken for users of such kernels elsewhere: each trap is a test."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import subprocess
import sys

import pytest
import torch

import fused_gopd as fg
import oracle
from builders import (
    OBJECTIVES,
    TOLERANCE,
    assert_all_close,
    assert_close,
    expect,
    generator,
    like,
    linear_head,
    make_batch,
    minus_inf_batch,
    relative_error,
    run,
    trainable,
    widened,
)
from combinations import pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

F32 = torch.float32
OBJECTIVE_IDS = [" ".join(map(str, o.values())) for o in OBJECTIVES]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=OBJECTIVE_IDS)
sampled_and_full = pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=OBJECTIVE_IDS[:2])


# ------------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@sampled_and_full
def test_the_weight_gradient_does_not_drift_over_many_chunks(backend, dtype, objective):
    """128 chunks of one token against one chunk: the accumulator is float32, rounded once at the end."""
    batch = make_batch(1, shape=(128,), vocab=(23,) * 3, dtype=dtype, masked=False)
    options = dict(reward_scale=1.25, reduction="sum", backend=backend, **objective)
    _, (_, one) = run(batch, chunk_size=128, **options)
    _, (_, many) = run(batch, chunk_size=1, **options)
    _, (_, want) = expect(batch, reward_scale=1.25, reduction="sum", **objective)
    # one rounding to dtype (eps / 2 at most) for both; a low-precision accumulator would add sqrt(128) of them
    eps = torch.finfo(dtype).eps
    assert relative_error(one, want) <= eps / 2
    assert relative_error(many, want) <= eps / 2
    assert abs(relative_error(many, want) - relative_error(one, want)) <= 0.02 * eps


@pairwise(backend=["torch", "native"], objective=OBJECTIVES, dtype=[torch.bfloat16, torch.float16, torch.float32])
def test_no_dtype_is_worse_than_the_naive_path_in_it(backend, dtype, objective):
    """Naive: logits in that dtype, upcast, log-softmax, autograd (fused_gopd.reference in the model's own dtype).

    Over a few batches together: in one of them rounding may be kind to either.
    """
    options = dict(reward_scale=1.25, **objective)
    values: dict[str, list] = {}
    for seed in range(2, 6):
        batch = make_batch(seed, shape=(3, 7), vocab=(211,) * 3, hidden=(24, 40, 16), dtype=dtype, scale=6.0)
        calls = [run(batch, backend=backend, **options), run(batch, fg.reference.gopd_loss, **options)]
        for out, grads in [*calls, expect(batch, **options)]:
            named = {"token_loss": out.token_loss} | {f"gradient {i}": g for i, g in enumerate(grads)}
            for name, x in named.items():
                values.setdefault(name, []).append(x.reshape(-1))
    eps = torch.finfo(dtype).eps
    for name, vectors in values.items():
        got, base, wanted = (torch.cat(vectors[i::3]) for i in range(3))
        # a gradient is rounded once to dtype whatever the path: eps / 2; float32 sums in another order: some eps
        slack = eps / 2 if dtype != F32 else 8 * eps
        assert relative_error(got, wanted) <= 1.1 * relative_error(base, wanted) + slack, name


@pairwise(backend=["torch", "native"], objective=OBJECTIVES, offset=[-100.0, -1e4, 1e4])
def test_a_large_common_offset_costs_no_more_than_in_the_naive_path(backend, offset, objective):
    """All logits very negative: a maximum seeded with 0, or a normaliser rounded at the offset's size, shows here."""
    batch = make_batch(3, kinds=("logits",) * 3, dtype=F32)
    moved = [like(m, logits=m.logits.detach() + offset) for m in batch.models]
    batch = batch.replaced(student=trainable(moved[0]), teacher=moved[1], ref=moved[2])
    want, want_grads = expect(batch, reward_scale=1.25, **objective)
    out, grads = run(batch, reward_scale=1.25, backend=backend, **objective)
    assert_close(out.token_loss, want.token_loss, TOLERANCE[F32])
    assert_all_close(grads, want_grads, TOLERANCE[F32])
    assert_close(out.student_logprobs, want.student_logprobs, TOLERANCE[F32])
    assert (out.student_logprobs <= 0).all()


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@sampled_and_full
def test_float16_gradients_survive_a_large_normaliser_and_a_loss_scale(backend, objective, reduction):
    """1e5 tokens elsewhere, loss scale 2^16: their product is of size 1, each alone leaves float16's range."""
    batch = make_batch(4, dtype=torch.float16)
    out = fg.gopd_loss(
        *batch.models,
        batch.token_ids,
        mask=batch.mask,
        reward_scale=1.25,
        reduction=reduction,
        normalizer=None if reduction == "none" else 1e5,
        backend=backend,
        **objective,
    )
    loss = out.loss if reduction != "none" else (out.loss / 1e5).sum()
    grads = torch.autograd.grad(loss * 2.0**16, batch.leaves)
    _, want = expect(batch, reward_scale=1.25, reduction="sum", **objective)
    want = [g * 2.0**16 / 1e5 for g in want]
    assert_all_close(grads, want, 2 * torch.finfo(torch.float16).eps)


@sampled_and_full
def test_float16_weight_gradients_of_rare_tokens_survive_the_normaliser(backend, objective):
    """At 1 / 8192 a logit gradient of 1e-4 is under float16's smallest number; it has to be applied after the sum."""
    batch = make_batch(5, shape=(64,), vocab=(501,) * 3, dtype=torch.float16, masked=False)
    _, (hidden, weight) = run(batch, reward_scale=1.25, normalizer=8192 * 64, backend=backend, **objective)
    _, (want_hidden, want_weight) = expect(batch, reward_scale=1.25, normalizer=8192 * 64, **objective)
    # below 6e-5 float16 is fixed point with steps of 6e-8: the result may be off by half a step, no more
    for got, want in ((hidden, want_hidden), (weight, want_weight)):
        assert ((got.double() - want).abs() <= 2.0**-25 + 1e-3 * want.abs()).all()


def test_log_probs_are_never_positive(backend):
    """Sharp models: the sampled token holds all the mass, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        head = linear_head(6, (50,), 300, 16, dtype, scale=60.0)
        ids = (head.hidden.float() @ head.weight.float().T).argmax(-1)
        lp, entropy = fg.token_logprobs(head, ids, return_entropy=True, backend=backend)
        assert (lp <= 0).all()
        assert (lp > -0.7).any()
        assert (entropy >= 0).all()


# ------------------------------------------------------------------------------------------------------- vocabularies


@pairwise(backend=["torch", "native"], objective=OBJECTIVES[:2], vocab=[1, 2, 3, 31, 127, 128, 129, 1023, 1025, 4097])
def test_no_vocabulary_size_is_special(backend, vocab, objective):
    batch = make_batch(7, shape=(3,), vocab=(vocab,) * 3, dtype=F32, masked=False, transforms=[{"bias": True}, {}, {}])
    out, grads = run(batch, reward_scale=1.25, backend=backend, **objective)
    want, want_grads = expect(batch, reward_scale=1.25, **objective)
    assert_close(out.token_loss, want.token_loss, TOLERANCE[F32])
    if vocab == 1:  # one token is certain whatever the models say
        assert all(g.abs().max() < 1e-6 for g in grads)
    else:
        assert_all_close(grads, want_grads, TOLERANCE[F32])


@pytest.mark.parametrize("backend_name", ["torch", "auto"])
def test_vocabulary_padding_carries_no_probability_and_gets_no_gradient(backend_name):
    """152064 against 151936 rows for one tokenizer; here 160 and 152, with padding that would win every softmax."""
    if backend_name == "auto":
        pytest.importorskip("fused_gopd.rowops.native")
    batch = make_batch(8, vocab=(160, 152, 160), dtype=F32)
    with torch.no_grad():
        batch.student.weight[152:] *= 1e3
        batch.ref.weight[152:] = math.nan
    cut = batch.replaced(
        student=trainable(like(batch.student, weight=batch.student.weight.detach()[:152].clone())),
        ref=like(batch.ref, weight=batch.ref.weight[:152].clone()),
    )
    for objective in OBJECTIVES[:2]:
        a, (hidden, weight) = run(batch, reward_scale=1.25, backend=backend_name, **objective)
        b, (want_hidden, want_weight) = run(cut, reward_scale=1.25, backend=backend_name, **objective)
        assert torch.equal(a.token_loss, b.token_loss)
        assert torch.equal(a.entropy, b.entropy)
        assert torch.equal(hidden, want_hidden)
        assert torch.equal(weight[:152], want_weight)
        assert (weight[152:] == 0).all()


def test_rows_beyond_2_31_elements_are_addressed(backend):
    """Stride-0 logits with N * V > 2^31; the last rows alone are live."""
    V = 151_936
    N = 2**31 // V + 8
    g = generator(9)
    row = torch.randn(1, V, generator=g)
    mask = torch.zeros(N, dtype=torch.bool)
    mask[-3:] = True
    ids = torch.full((N,), -100)
    ids[-3:] = torch.tensor([0, V // 2, V - 1])
    lp = fg.token_logprobs(fg.Logits(row.expand(N, V)), ids, mask=mask, backend=backend)
    assert_close(lp[-3:], row[0].double().log_softmax(-1)[ids[-3:]], 1e-6)
    assert (lp[:-3] == 0).all()


# ----------------------------------------------------------------------------------------------------- -inf, NaN, inf


@every_objective
@pytest.mark.parametrize("lam", [0.5, 1.25])
def test_minus_inf_makes_no_nan_gradient(backend, objective, lam):
    """-inf - -inf is NaN, and masking it after the arithmetic leaves it in the backward."""
    batch = minus_inf_batch(dtype=F32)
    for reduction in ("token-mean", "none"):
        out = fg.gopd_loss(
            *batch.models, batch.token_ids, reward_scale=lam, reduction=reduction, backend=backend, **objective
        )
        (grad,) = torch.autograd.grad(out.loss.sum(), batch.leaves)
        assert out.loss.isfinite().all()
        assert grad.isfinite().all()
        assert (grad[batch.student.logits == -math.inf] == 0).all()
    if objective["estimator"] == "full":
        assert out.token_loss[4] == 0
        assert (grad[4] == 0).all()
        assert out.entropy[4] == 0
        assert out.kl[4] == 0


def test_a_position_without_support_still_counts_in_the_mean(backend):
    batch = minus_inf_batch(dtype=F32)
    out, _ = run(batch, estimator="full", reward_scale=1.25, backend=backend)
    assert_close(out.loss, out.token_loss.sum() / 6, 1e-6)


def test_minus_inf_in_a_bias_forbids_a_token(backend):
    """How a head masks its padding: the bias, not the logits, is -inf."""
    batch = make_batch(10, dtype=F32, masked=False, transforms=[{"bias": True, "softcap": 6.0}, {"bias": True}, {}])
    with torch.no_grad():
        batch.student.bias[30:] = -math.inf
        batch.teacher.bias[28:31] = -math.inf
    batch.token_ids.clamp_(max=27)
    for objective in OBJECTIVES:
        out, grads = run(batch, reward_scale=1.25, backend=backend, **objective)
        want, want_grads = expect(batch, reward_scale=1.25, **objective)
        assert_close(out.token_loss, want.token_loss, TOLERANCE[F32])
        assert_all_close(grads, [g.nan_to_num() for g in want_grads], TOLERANCE[F32])


@pairwise(
    backend=["torch", "native"],
    objective=OBJECTIVES,
    reduction=["sum", "none"],
    model=["student", "teacher", "ref"],
    poison=[math.nan, math.inf],
)
def test_a_diverged_row_is_nan_in_loss_and_gradient_and_no_other_row_is(backend, objective, reduction, model, poison):
    batch = make_batch(11, shape=(4,), kinds=("logits",) * 3, dtype=F32, masked=False)
    clean = fg.gopd_loss(*batch.models, batch.token_ids, reward_scale=1.25, backend=backend, **objective)
    with torch.no_grad():
        getattr(batch, model).logits[1, (int(batch.token_ids[1]) + 1) % 37] = poison
    out = fg.gopd_loss(
        *batch.models, batch.token_ids, reward_scale=1.25, reduction=reduction, backend=backend, **objective
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), batch.leaves)
    others = torch.tensor([0, 2, 3])
    assert out.token_loss[1].isnan()
    assert grad[1].isnan().any()
    assert torch.equal(out.token_loss[others], clean.token_loss[others])
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@sampled_and_full
def test_a_diverged_hidden_state_is_nan_in_loss_and_gradient(backend, objective, poison):
    batch = make_batch(12, shape=(4,), dtype=F32, masked=False)
    with torch.no_grad():
        batch.student.hidden[1, 3] = poison
    out, (hidden, weight) = run(batch, reward_scale=1.25, backend=backend, **objective)
    assert out.token_loss.isnan().tolist() == [False, True, False, False]
    assert out.loss.isnan()
    assert hidden[1].isnan().any()
    assert hidden[[0, 2, 3]].isfinite().all()
    assert weight.isnan().any()


@pytest.mark.parametrize("where", ["model that cancels", "per-token lambda"])
@every_objective
def test_nothing_in_a_cancelled_model_matters(backend, objective, where):
    batch = make_batch(13, shape=(4,), kinds=("logits",) * 3, dtype=F32, masked=False)
    lam = 1.0 if where == "model that cancels" else torch.tensor([1.0, 0.5, 1.0, 2.0])
    clean, clean_grads = run(batch, reward_scale=lam, backend=backend, **objective)
    for poison in (math.nan, math.inf, -math.inf):
        dirty = batch.ref.logits.clone()
        dirty[[0, 2]] = poison
        out, grads = run(batch.replaced(ref=fg.Logits(dirty)), reward_scale=lam, backend=backend, **objective)
        assert torch.equal(out.token_loss, clean.token_loss)
        assert all(map(torch.equal, grads, clean_grads))


@pairwise(
    backend=["torch", "native"],
    objective=OBJECTIVES,
    reduction=["token-mean", "seq-mean-token-mean", "none"],
    kind=["linear", "logits"],
)
def test_masked_positions_touch_nothing(backend, objective, reduction, kind):
    """NaN in every input of a masked position, ids that no vocabulary has: the same bits."""
    batch = make_batch(14, shape=(3, 5), kinds=(kind,) * 3, dtype=F32)
    gone = ~batch.mask
    lam = torch.full((3, 5), 1.25)
    old = -torch.rand(3, 5, generator=generator(0)) if objective["estimator"] == "sampled" else None

    def dirty(head):
        name = "hidden" if kind == "linear" else "logits"
        return like(head, **{name: head.tensors[name].detach().masked_fill(gone[..., None], math.nan)})

    poisoned = batch.replaced(
        student=trainable(dirty(batch.student)),
        teacher=dirty(batch.teacher),
        ref=dirty(batch.ref),
        token_ids=batch.token_ids.masked_fill(gone, -(2**62)),
    )
    if kind == "linear":  # one weight: only the hidden states are poisoned
        assert poisoned.student.weight.isfinite().all()
    up = torch.rand(3, 5, generator=generator(1))
    results = []
    for b, scale, behaviour in (
        (batch, lam, old),
        (poisoned, lam.masked_fill(gone, math.nan), None if old is None else old.masked_fill(gone, math.nan)),
    ):
        out = fg.gopd_loss(
            *b.models,
            b.token_ids,
            mask=b.mask,
            reward_scale=scale,
            old_logprobs=behaviour,
            reduction=reduction,
            backend=backend,
            **objective,
        )
        results.append((out, torch.autograd.grad((out.loss * up).sum() if reduction == "none" else out.loss, b.leaves)))
    (a, grads_a), (b, grads_b) = results
    for name in (f.name for f in dataclasses.fields(a)):
        value = getattr(a, name)
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert all(map(torch.equal, grads_a, grads_b))
    assert (grads_b[0][gone] == 0).all()


def test_masked_scores_are_ignored(backend):
    batch = make_batch(15, kinds=("linear", "logprobs", "logprobs"), dtype=F32)
    gone = ~batch.mask
    poisoned = batch.replaced(
        **{
            name: fg.TokenLogProbs(getattr(batch, name).logprobs.masked_fill(gone, math.nan))
            for name in ("teacher", "ref")
        }
    )
    a, grads_a = run(batch, reward_scale=1.25, backend=backend)
    b, grads_b = run(poisoned, reward_scale=1.25, backend=backend)
    assert torch.equal(a.token_loss, b.token_loss)
    assert all(map(torch.equal, grads_a, grads_b))


# ------------------------------------------------------------------------------------------------ extreme distributions


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("gap", [110.0, 1000.0])
def test_jsd_of_models_whose_probabilities_underflow(backend, gap, beta):
    """Below log p = -104 a float32 probability is 0, and 0 * log 0 is NaN."""
    z = torch.zeros(2, 5)
    z[0, 0], z[1, 1] = gap, gap
    q = z.flip(0)
    batch = make_batch(16, shape=(2,), vocab=(5,) * 3, kinds=("logits",) * 3, dtype=F32, masked=False)
    batch = batch.replaced(student=trainable(fg.Logits(z)), teacher=fg.Logits(q))
    for objective in OBJECTIVES[:3]:
        out, grads = run(batch, backend=backend, **objective)
        assert out.token_loss.isfinite().all()
        assert all(g.isfinite().all() for g in grads)
    options = {"estimator": "full", "divergence": "jsd", "beta": beta}
    out, grads = run(batch, backend=backend, **options)
    want, want_grads = expect(batch, **options)
    assert_close(out.token_loss, want.token_loss, TOLERANCE[F32])
    # two certain and opposite models: both sides of the gradient are below float32's last bit of log m
    assert all((g - w).abs().max() <= 1e-6 for g, w in zip(grads, want_grads, strict=True))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_jsd_gradient_is_one_minus_beta_times_its_student_half(backend, beta):
    """(1 - beta) p (log(p / m) - KL(p || m)); published examples have lost the factor or the mean."""
    batch = make_batch(17, shape=(3,), kinds=("logits",) * 3, dtype=F32, masked=False)
    _, (got,) = run(batch, estimator="full", divergence="jsd", beta=beta, reduction="sum", backend=backend)
    p, t = (m.logits.detach().double().softmax(-1) for m in (batch.student, batch.teacher))
    ratio = (p / (beta * t + (1 - beta) * p)).log()
    assert_close(got, (1 - beta) * p * (ratio - (p * ratio).sum(-1, keepdim=True)), TOLERANCE[F32])


@pytest.mark.parametrize(("beta", "name"), [(0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_the_jsd_are_the_two_kls(backend, beta, name):
    batch = make_batch(20, kinds=("logits",) * 3, dtype=F32)
    for options in ({"estimator": "full"}, {"estimator": "topk", "k": 3, "tail": "drop"}):
        options = options | {"reward_scale": 1.25}
        for loss in (fg.gopd_loss, fg.reference.gopd_loss):
            out, (grad,) = run(batch, loss, divergence="jsd", beta=beta, backend=backend, **options)
            named, (named_grad,) = run(batch, loss, divergence=name, backend=backend, **options)
            assert torch.equal(out.token_loss, named.token_loss)
            assert torch.equal(grad, named_grad)


@pytest.mark.parametrize("beta", [1e-8, 1e-3, 1 - 1e-8])
def test_the_jsd_near_its_ends_keeps_its_digits(backend, beta):
    """It is as small as beta or 1 - beta there; the error of a sum of numbers as large as 1 would be all of it."""
    batch = make_batch(21, shape=(3,), vocab=(33,) * 3, kinds=("logits",) * 3, dtype=F32, masked=False)
    for scale in (1.0, 8.0):
        logits = [scale * m.logits.detach() for m in (batch.student, batch.teacher)]
        sharp = batch.replaced(student=trainable(fg.Logits(logits[0])), teacher=fg.Logits(logits[1]))
        for options in ({"estimator": "full"}, {"estimator": "topk", "k": 33}):
            options = options | {"divergence": "jsd", "beta": beta, "reduction": "sum"}
            out, (grad,) = run(sharp, backend=backend, **options)
            want, (want_grad,) = expect(sharp, **options)
            # the oracle has 1e-16 / 1e-8; a log-ratio of logits up to 30 is off by 2e-6, and everything is linear in it
            assert relative_error(out.token_loss, want.token_loss) <= 1e-5
            assert relative_error(grad, want_grad) <= 1e-5
    same, (grad,) = run(batch.replaced(teacher=fg.Logits(batch.student.logits.detach())), backend=backend, **options)
    assert not same.token_loss.any()
    assert not grad.any()


@pytest.mark.parametrize("beta", [5e-324, 1e-30, 1e-12, 1 - 1e-16])
def test_the_jsd_of_opposite_models_is_finite_at_its_ends(backend, beta):
    """log(1 + (1 - beta) (exp(-gap) - 1)) is log 0 where 1 - beta rounds to 1."""
    for gap in (30.0, 100.0):
        z = torch.tensor([[0.0, gap], [gap, 0.0]])
        for options in ({"estimator": "full"}, {"estimator": "topk", "k": 2}):
            x = z.clone().requires_grad_()
            out = fg.gopd_loss(
                fg.Logits(x),
                fg.Logits(z.flip(0)),
                divergence="jsd",
                beta=beta,
                reduction="sum",
                backend=backend,
                **options,
            )
            out.loss.backward()
            small = min(beta, 1 - beta)
            assert 0 <= out.loss <= 2 * small * (1 - math.log(small)) + 1e-6  # of a sum over two tokens
            assert x.grad.abs().max() <= 2 * small * (1 - math.log(small)) + 1e-6


def test_terms_are_not_clipped_before_the_sum(backend):
    """Per-entry terms p log(p / q) are negative where p < q: flooring them would move the sum."""
    batch = make_batch(18, kinds=("logits",) * 3, dtype=F32, scale=8.0)
    out, _ = run(batch, estimator="full", backend=backend)
    log_p, log_q = (m.logits.detach().double().log_softmax(-1) for m in (batch.student, batch.teacher))
    terms = log_p.exp() * (log_p - log_q)
    assert (terms < 0).any()
    assert_close(out.token_loss, terms.sum(-1) * batch.mask, TOLERANCE[F32])


def test_a_saturated_softcap_has_no_gradient_left_but_no_wrong_one(backend):
    """1 - tanh^2 cancels near the cap: not further from the truth than PyTorch's own tanh backward."""
    batch = make_batch(19, kinds=("logits",) * 3, dtype=F32, scale=40.0, transforms=[{"softcap": 5.0}, {}, {}])
    options = {"estimator": "full", "reduction": "sum"}
    _, (got,) = run(batch, backend=backend, **options)
    _, (naive,) = run(batch, fg.reference.gopd_loss, **options)
    _, (want,) = expect(batch, **options)
    assert relative_error(got, want) <= 1.1 * relative_error(naive, want) + 1e-6


# --------------------------------------------------------------------------------------- options that must not be lost


@pytest.mark.parametrize(
    "option", [{"softcap": 3.0}, {"logit_scale": 0.3}, {"temperature": 2.0}, {"bias": True}], ids=str
)
@pytest.mark.parametrize("model", ["student", "teacher", "ref"])
@sampled_and_full
def test_no_transform_of_any_model_is_ignored(backend, objective, model, option):
    plain = make_batch(20, dtype=F32)
    index = ("student", "teacher", "ref").index(model)
    transforms = [{}, {}, {}]
    transforms[index] = option
    batch = make_batch(20, dtype=F32, transforms=transforms)
    out, _ = run(batch, reward_scale=1.25, backend=backend, **objective)
    without, _ = run(plain, reward_scale=1.25, backend=backend, **objective)
    want, _ = expect(batch, reward_scale=1.25, **objective)
    assert relative_error(without.token_loss, want.token_loss) > 1e-2
    assert_close(out.token_loss, want.token_loss, TOLERANCE[F32])


def test_the_teacher_keeps_its_own_hidden_size(backend):
    """Sizes of which one divides the other: a reshape with the student's size would go unnoticed."""
    batch = make_batch(21, shape=(4, 6), hidden=(8, 16, 4), dtype=F32)
    out, grads = run(batch, reward_scale=1.25, backend=backend)
    want, want_grads = expect(batch, reward_scale=1.25)
    assert_close(out.token_loss, want.token_loss, TOLERANCE[F32])
    assert_all_close(grads, want_grads, TOLERANCE[F32])


def test_lambda_other_than_1_needs_its_reference_and_never_becomes_plain_distillation():
    batch = make_batch(22, dtype=F32)
    for lam in (0.999, 1.25, 0.0):
        with pytest.raises(ValueError, match="ref must be given"):
            fg.gopd_loss(batch.student, batch.teacher, None, batch.token_ids, reward_scale=lam)


def test_a_detached_divergence_as_advantage_would_have_no_gradient():
    """Why `full` is a loss of its own: sum_v p_v c grad log p_v = 0 for a constant c."""
    z = torch.randn(9, generator=generator(23), dtype=torch.float64).requires_grad_()
    log_p = z.log_softmax(-1)
    (g,) = torch.autograd.grad((log_p.exp().detach() * 3.7 * log_p).sum(), z)
    assert g.abs().max() < 1e-15
    _, (full,) = run(make_batch(23, shape=(1,), kinds=("logits",) * 3, masked=False), estimator="full", backend="torch")
    assert full.abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------- no side effects


def fingerprint(tensors: list[torch.Tensor]) -> list[str]:
    return [hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for t in tensors]


@pairwise(
    backend=["torch", "native"],
    objective=OBJECTIVES,
    reduction=["token-mean", "none"],
    dtype=[F32, torch.bfloat16, torch.float16],
    kind=["linear", "logits"],
)
def test_inputs_are_never_written_to(backend, objective, reduction, dtype, kind):
    batch = make_batch(24, kinds=(kind,) * 3, dtype=dtype)
    lam, old = torch.linspace(0, 2, 10).reshape(2, 5), -torch.rand(2, 5)
    extra = {"old_logprobs": old} if objective["estimator"] == "sampled" else {}
    tensors = [x for m in batch.models for x in m.tensors.values()] + [batch.token_ids, batch.mask, lam, old]
    before, versions = fingerprint(tensors), [t._version for t in tensors]
    out = fg.gopd_loss(
        *batch.models,
        batch.token_ids,
        mask=batch.mask,
        reward_scale=lam,
        reduction=reduction,
        backend=backend,
        **objective,
        **extra,
    )
    loss = out.loss.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert fingerprint(tensors) == before
    assert [t._version for t in tensors] == versions


GLOBAL_STATE = """
import torch, os, random
def state():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
        torch.backends.mkldnn.enabled, torch.get_rng_state().sum().item(), random.getstate(), dict(os.environ),
        torch._dynamo.config.cache_size_limit, torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction, torch.is_autocast_enabled("cpu"),
    )
import torch._dynamo
before = state()
import fused_gopd as fg
assert state() == before, "import"
h, w, t = torch.ones(4, 3), torch.ones(5, 3, requires_grad=True), torch.ones(5, 3)
for backend in BACKENDS:
    for estimator in ("sampled", "full"):
        fg.gopd_loss(fg.LinearHead(h, w), fg.LinearHead(h, t), None, torch.zeros(4).long(), estimator=estimator,
                     backend=backend).loss.backward()
assert state() == before, "call"
"""


def test_neither_the_import_nor_a_call_changes_global_state():
    from builders import why_not

    backends = [b for b in ("torch", "native") if why_not(b) is None]
    code = GLOBAL_STATE.replace("BACKENDS", repr(backends))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_needs_neither_triton_nor_the_compiled_extension():
    """A source tree without them still imports and works on plain PyTorch."""
    code = (
        "import sys\n"
        "for name in ('triton', 'fused_gopd._native', 'fused_gopd.rowops._native'): sys.modules[name] = None\n"
        "import torch, fused_gopd as fg\n"
        "z = torch.randn(3, 5, requires_grad=True)\n"
        "out = fg.gopd_loss(fg.Logits(z), fg.Logits(torch.randn(3, 5)), None, torch.zeros(3).long())\n"
        "out.loss.backward(); assert z.grad.isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_call_under_any_seed_is_the_same_call(backend):
    """Nothing is sampled inside."""
    batch = make_batch(25, dtype=F32)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(run(batch, estimator="full", reward_scale=1.25, backend=backend))
        assert torch.initial_seed() == seed
    (a, grads_a), (b, grads_b) = results
    assert torch.equal(a.loss, b.loss)
    assert all(map(torch.equal, grads_a, grads_b))


def test_micro_batch_means_differ_from_the_mean_of_the_batch_unless_normalised():
    """The trap itself: without the global count the mean of means is another number (see test_loss for the cure)."""
    batch = make_batch(26, shape=(2, 5), masked=False)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    whole = fg.gopd_loss(*batch.models, batch.token_ids, mask=mask, backend="torch").loss
    parts = [
        fg.gopd_loss(
            *[like(m, hidden=m.hidden[i]) for m in batch.models], batch.token_ids[i], mask=mask[i], backend="torch"
        ).loss
        for i in range(2)
    ]
    assert (sum(parts) / 2 - whole).abs().item() > 1e-3


def test_the_sign_is_the_one_that_maximises(backend):
    """A = (log q - log p) + (lambda - 1)(log q - log r); the paper's printed sign is the other one."""
    batch = make_batch(27, dtype=F32)
    out, _ = run(batch, reward_scale=1.25, backend=backend)
    p, q, r = (
        oracle.logits_of(widened(m)).log_softmax(-1).gather(-1, batch.token_ids[..., None])[..., 0].detach()
        for m in batch.models
    )
    assert_close(out.advantages, ((q - p) + 0.25 * (q - r)) * batch.mask, TOLERANCE[F32])
