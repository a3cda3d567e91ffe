"""Terms beside the loss: an entropy bonus, a KL penalty to the reference, labels at a temperature of their own.

Each is compared with the oracle's loss plus the term, computed here from dense float64 logits.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fused_gopd as fg
import oracle
from builders import (
    OBJECTIVES,
    Batch,
    assert_all_close,
    assert_close,
    generator,
    make_batch,
    minus_inf_batch,
    relative_error,
    run,
    widened,
)
from combinations import product_on_float64
from costs import GEMM, H, N, V, gemm_flops
from fused_gopd.objective.layout import STATISTICS

pytestmark = pytest.mark.usefixtures("one_thread")

BASELINE = {"estimator": "sampled", "baseline": "expected"}
SAMPLED_TAIL = {"estimator": "topk", "k": 3, "tail": "sampled"}
ALL = (*OBJECTIVES, BASELINE)
TERMS = ("entropy_weight", "kl_ref", "kl_ref_weight", "sft_temperature", "sft_weight", "sft_labels")


def labels_for(batch: Batch, seed: int = 0, vocab: int = 37) -> Tensor:
    shape = batch.token_ids.shape
    labels = torch.randint(vocab, shape, generator=generator(seed))
    return labels.masked_fill(torch.rand(shape, generator=generator(seed + 1)) < 0.3, -100)


def term(batch: Batch, options: dict[str, Any]) -> Tensor:
    """What the terms add to each token's loss, in the token shape, of models in float64."""
    z = oracle.logits_of(batch.student)
    log_p = z.log_softmax(-1)
    p, total = log_p.exp(), torch.zeros(z.shape[:-1], dtype=torch.float64)
    finite = log_p.masked_fill(log_p == -math.inf, 0)
    total = total + options.get("entropy_weight", 0) * (p * finite).sum(-1)
    kind = options.get("kl_ref")
    if kind is not None:
        with torch.no_grad():
            log_r = (
                batch.ref.logprobs.double()
                if isinstance(batch.ref, fg.TokenLogProbs)
                else oracle.logits_of(batch.ref).log_softmax(-1)
            )
        if kind == "exact":
            each = (p * (log_p - log_r)).sum(-1)
        else:
            ids = batch.token_ids[..., None]
            d = (log_r if log_r.ndim < z.ndim else log_r.gather(-1, ids)[..., 0]) - log_p.gather(-1, ids)[..., 0]
            each = {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - 1 - d}[kind]
        total = total + options.get("kl_ref_weight", 1.0) * each
    if options.get("sft_temperature") is not None:
        labels = options["sft_labels"]
        at = (z * (batch.student.temperature / options["sft_temperature"])).log_softmax(-1)
        own = at.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        total = total - options.get("sft_weight", 1.0) * torch.where(labels >= 0, own, 0)
    return total


def expected(batch: Batch, **options: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """Token losses and gradients of their mean over the live tokens, by the oracle and :func:`term`."""
    wide = Batch(*(widened(m) for m in batch.models), batch.token_ids, batch.mask)
    own = {k: x for k, x in options.items() if k not in TERMS}
    if "sft_temperature" not in options and "sft_labels" in options:
        own |= {k: options[k] for k in ("sft_labels", "sft_weight") if k in options}
    if own.get("reward_scale") == 1.0 and "kl_ref" in options:
        wide_ref, wide = wide.ref, wide.replaced(ref=None)
        out = oracle.gopd(*wide.models, batch.token_ids, mask=batch.mask, **own)
        wide = wide.replaced(ref=wide_ref)
    else:
        out = oracle.gopd(*wide.models, batch.token_ids, mask=batch.mask, **own)
    live = torch.ones(batch.token_ids.shape, dtype=torch.bool) if batch.mask is None else batch.mask
    added = term(wide, options).masked_fill(~live, 0)
    loss = out.loss + added.sum() / live.sum()
    return loss, list(torch.autograd.grad(loss, wide.leaves)), out.token_loss + added


def check(batch: Batch, backend_dtype: Any, **options: Any) -> None:
    out, grads = run(batch, backend=backend_dtype.backend, chunk_size=4, **options)
    loss, want, token_loss = expected(batch, **options)
    tolerance = backend_dtype.tolerance
    assert_close(out.token_loss, token_loss, tolerance)
    assert (out.loss - loss).abs() <= tolerance * token_loss.abs().max().clamp_min(1)
    assert_all_close(grads, want, tolerance)


@product_on_float64(objective=[*ALL, SAMPLED_TAIL], kind=["linear", "logits"], weight=[0.3, -0.2])
def test_an_entropy_bonus(backend_dtype, kind, objective, weight):
    batch = make_batch(1, shape=(3, 5), kinds=(kind, "linear", "logits"), dtype=backend_dtype.dtype)
    if "tail" in objective:  # the reference is the package's own
        batch = batch.replaced(**{m: widened(getattr(batch, m)) for m in ("student", "teacher", "ref")})
        out, grads = run(batch, backend="torch", entropy_weight=weight, **objective)
        want, want_grads = run(batch, fg.reference.gopd_loss, entropy_weight=weight, **objective)
        assert_close(out.token_loss, want.token_loss, 1e-11)
        assert_all_close(grads, want_grads, 1e-11)
        return
    check(batch, backend_dtype, reward_scale=1.25, entropy_weight=weight, **objective)


@product_on_float64(kl_ref=["k1", "k2", "k3"], reward_scale=[1.0, 1.25, 0.0], kind=["linear", "logits", "logprobs"])
def test_an_estimated_kl_to_the_reference(backend_dtype, kl_ref, reward_scale, kind):
    """Also where lambda cancels the reference, and of log-probs that a server computed."""
    batch = make_batch(2, shape=(3, 5), kinds=("linear", "linear", kind), dtype=backend_dtype.dtype)
    check(batch, backend_dtype, kl_ref=kl_ref, kl_ref_weight=0.4, reward_scale=reward_scale)


@product_on_float64(
    divergence=[{}, {"divergence": "forward_kl"}, {"divergence": "jsd", "beta": 0.3}], reward_scale=[1.0, 1.25, 0.0]
)
def test_the_exact_kl_to_the_reference(backend_dtype, divergence, reward_scale):
    batch = make_batch(3, shape=(3, 5), dtype=backend_dtype.dtype, transforms=({"softcap": 9.0}, {}, {"bias": True}))
    check(batch, backend_dtype, estimator="full", kl_ref="exact", reward_scale=reward_scale, **divergence)


@product_on_float64(objective=list(ALL), temperature=[1.0, 0.5], head=[{}, {"temperature": 2.0, "softcap": 9.0}])
def test_labels_at_a_temperature_of_their_own(backend_dtype, objective, temperature, head):
    batch = make_batch(4, shape=(3, 5), dtype=backend_dtype.dtype, transforms=(head, {}, {}))
    options = {"sft_labels": labels_for(batch), "sft_weight": 0.7, "sft_temperature": temperature}
    check(batch, backend_dtype, reward_scale=1.25, **options, **objective)


@given(
    seed=st.integers(0, 10_000),
    objective=st.sampled_from([*ALL, SAMPLED_TAIL]),
    entropy=st.sampled_from([0.0, 0.01, 3.0, -0.5]),
    labels=st.sampled_from([{}, {"sft_weight": 0.5}, {"sft_weight": 0.5, "sft_temperature": 1.7}]),
    kl=st.sampled_from(["k1", "k2", "k3", "exact", None]),
    reward_scale=st.sampled_from([0.0, 1.0, 1.25, -3.0, 10.0, "tensor"]),
    reduction=st.sampled_from(["token-mean", "seq-mean-token-mean", "none"]),
    chunk=st.integers(1, 16),
    weighted=st.booleans(),
    corrected=st.sampled_from([{}, {"rollout_is_cap": 2.0}, {"rollout_is": "geometric", "rollout_is_cap": 2.0}, None]),
    sums=st.booleans(),
)
def test_all_together_are_the_dense_reference(
    seed, objective, entropy, labels, kl, reward_scale, reduction, chunk, weighted, corrected, sums
):
    """With importance weights and models made of several, too: neither is applied to what stands beside the loss."""
    batch = make_batch(seed, shape=(2, 6), scale=1.0)
    if sums:
        batch = batch.replaced(ref=fg.LogLinear([batch.ref, batch.teacher], [0.7, 0.5]))
    options: dict[str, Any] = {"entropy_weight": entropy, "reduction": reduction, **objective, **labels}
    options["reward_scale"] = reward_scale
    if reward_scale == "tensor":
        options["reward_scale"] = torch.tensor([0.0, 1.0, 1.25, -3.0, 10.0, 0.5]).expand(2, 6)
    if labels:
        options["sft_labels"] = labels_for(batch, seed)
    if (kl == "exact") == (objective["estimator"] == "full") and objective["estimator"] != "topk":
        options |= {} if kl is None or "baseline" in objective else {"kl_ref": kl, "kl_ref_weight": 0.3}
    if weighted:
        options["token_weight"] = torch.tensor([0.0, 1e4, 1.0, 0.5, 2.0, 3.0]).expand(2, 6)
    if corrected is not None:
        noise = torch.randn((2, 6), generator=generator(seed), dtype=torch.float64) * 0.3
        own = fg.token_logprobs(batch.student, batch.token_ids).detach()
        options |= {"rollout_logprobs": (own + noise).clamp_max(0), **corrected}
        if objective["estimator"] == "topk":  # of the current policy they are known too late
            options["old_logprobs"] = (own + noise / 2).clamp_max(0)
    got = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, backend="torch", chunk_size=chunk, **options)
    want = fg.reference.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, **options)
    assert_close(got.token_loss, want.token_loss, 1e-11)
    grads = [torch.autograd.grad(out.loss.sum(), batch.leaves) for out in (got, want)]
    assert_all_close(*grads, 1e-10)
    for name in (
        "kl_ref",
        "student_logprobs",
        "teacher_logprobs",
        "ref_logprobs",
        "label_logprobs",
        "entropy",
        "advantages",
    ):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a, b, 1e-11, name)


def test_the_exact_kl_is_reported(backend):
    batch = make_batch(10, dtype=torch.float32)
    out, _ = run(batch, backend=backend, estimator="full", divergence="jsd", kl_ref="exact", kl_ref_weight=0.0)
    log_p, log_r = (oracle.logits_of(widened(m)).log_softmax(-1) for m in (batch.student, batch.ref))
    want = (log_p.exp() * (log_p - log_r)).sum(-1).masked_fill(~batch.mask, 0).detach()
    assert_close(out.kl_ref, want, 1e-5)
    assert_close(out.metrics()["kl_ref"], want.sum() / batch.mask.sum(), 1e-5)
    assert "kl_ref" not in run(batch, backend=backend, estimator="full")[0].metrics()


# ----------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_under_the_reverse_kl_a_penalty_is_another_lambda(backend, weight):
    """l + b KL(p || r) = (1 + b) (KL to q^(lambda/(1+b)) ...): docs/terms.md has the rule."""
    batch = make_batch(5, dtype=torch.float32)
    got, grads = run(batch, backend=backend, estimator="full", reward_scale=1.25, kl_ref="exact", kl_ref_weight=weight)
    shape = batch.token_ids.shape
    want, want_grads = run(batch, backend=backend, estimator="full", reward_scale=1.25 / (1 + weight),
                           token_weight=torch.full(shape, 1 + weight))  # fmt: skip
    assert_close(got.loss, want.loss, 1e-5)
    assert_all_close(grads, want_grads, 2e-5)


def test_k3_and_k2_have_the_expected_kl(backend):
    """Summed over all tokens with their probabilities, as if each was sampled: the KL, and of k2 its gradient."""
    vocab = 9
    batch = make_batch(6, shape=(vocab,), vocab=(vocab,) * 3, kinds=("logits",) * 3, masked=False, dtype=torch.float32)
    logits = [x.logits.detach()[:1].expand(vocab, vocab).clone() for x in batch.models]
    batch = batch.replaced(
        student=fg.Logits(logits[0].requires_grad_()),
        ref=fg.Logits(logits[2]),
        teacher=fg.TokenLogProbs(torch.zeros(vocab)),
        token_ids=torch.arange(vocab),
    )
    log_p, log_r = (x.detach().double()[0].log_softmax(-1) for x in (logits[0], logits[2]))
    kl = (log_p.exp() * (log_p - log_r)).sum()
    options = {"advantage_fn": lambda s: torch.zeros_like(s.student_logprobs), "reduction": "none", "backend": backend}
    for kind in ("k1", "k3"):
        out = fg.gopd_loss(batch.student, None, batch.ref, batch.token_ids, kl_ref=kind, **options)
        assert_close((out.loss.double() * log_p.exp()).sum(), kl, 1e-5)
    out = fg.gopd_loss(batch.student, None, batch.ref, batch.token_ids, kl_ref="k2", **options)
    (gradient,) = torch.autograd.grad((out.loss * log_p.exp().float()).sum(), batch.student.logits)
    exact = log_p.exp() * (log_p - log_r - kl)
    assert_close(gradient.double().sum(0), exact, 1e-5)


def test_an_advantage_of_ones_own_and_a_penalty_need_no_teacher(backend):
    """GRPO: advantages of a group, and k3 to the reference."""
    batch = make_batch(7, dtype=torch.float32)
    mine = torch.randn(batch.token_ids.shape, generator=generator(1))
    options = {"advantage_fn": lambda s: mine.reshape(-1)[s.index], "mask": batch.mask, "backend": backend}
    got = fg.gopd_loss(batch.student, None, batch.ref, batch.token_ids, kl_ref="k3", kl_ref_weight=0.1, **options)
    log_p = fg.reference.models.logits_of(batch.student, 37, torch.float32).log_softmax(-1)
    lp = log_p.gather(-1, batch.token_ids[..., None])[..., 0]
    d = fg.token_logprobs(batch.ref, batch.token_ids).detach() - lp
    want = -mine * torch.exp(lp - lp.detach()) + 0.1 * (torch.exp(d) - 1 - d)
    want = (want * batch.mask).sum() / batch.mask.sum()
    assert_close(got.loss, want, 1e-5)
    grads = [torch.autograd.grad(x, batch.leaves, retain_graph=True) for x in (got.loss, want)]
    assert_all_close(*grads, 2e-5)
    assert got.ref_logprobs is not None


# ------------------------------------------------------------------------------------------------------------ extremes


@pytest.mark.parametrize("options", [
    {"estimator": "full", "entropy_weight": 0.3, "kl_ref": "exact"},
    {"estimator": "full", "divergence": "jsd", "entropy_weight": 0.3, "sft_temperature": 0.5},
    {"estimator": "topk", "k": 4, "entropy_weight": 0.3, "sft_temperature": 0.5},
    {"estimator": "sampled", "entropy_weight": 0.3, "kl_ref": "k3", "sft_temperature": 0.5},
], ids=str)  # fmt: skip
def test_logits_of_minus_infinity(backend_dtype, options):
    batch = minus_inf_batch(8, backend_dtype.dtype)
    if "sft_temperature" in options:
        options = options | {"sft_labels": torch.tensor([0, 2, 5, 6, -100, 9])}
    got, grads = run(batch, backend=backend_dtype.backend, reward_scale=1.25, **options)
    wide = batch.replaced(**{m: widened(getattr(batch, m)) for m in ("student", "teacher", "ref")})
    want, want_grads = run(wide, fg.reference.gopd_loss, reward_scale=1.25, **options)
    assert torch.isfinite(got.token_loss).all()
    assert_close(got.token_loss, want.token_loss, backend_dtype.tolerance)
    assert_all_close(grads, want_grads, backend_dtype.tolerance)


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("model", ["student", "teacher", "ref"])
def test_finite_masks(backend, model, mask):
    batch = make_batch(9, shape=(5,), kinds=("logits",) * 3, dtype=torch.float32, masked=False)
    batch.token_ids.clamp_(min=4)
    with torch.no_grad():
        getattr(batch, model).logits[:, :4] = mask
    labels = batch.token_ids.clone()
    for options in (
        {"estimator": "full", "entropy_weight": 0.3, "sft_labels": labels, "sft_temperature": 0.5},
        {"estimator": "sampled", "entropy_weight": 0.3, "kl_ref": "k3"},
        {"estimator": "full", "kl_ref": "exact"},
    ):
        if model == "ref" and options.get("kl_ref") == "exact":
            continue  # p times the mask: as large in float64
        got, grads = run(batch, backend=backend, reward_scale=1.0, **options)
        wide = batch.replaced(**{m: widened(getattr(batch, m)) for m in ("student", "teacher", "ref")})
        want, want_grads = run(wide, fg.reference.gopd_loss, reward_scale=1.0, **options)
        same = model != "teacher" or options["estimator"] != "full"  # the reverse KL is as large as the mask
        assert torch.isfinite(got.loss)
        assert all(torch.isfinite(g).all() for g in grads)
        if same:
            assert_close(got.token_loss, want.token_loss, 3e-5)
            assert_all_close(grads, want_grads, 3e-5)


@pytest.mark.parametrize("objective", [{"estimator": "sampled"}, {"estimator": "full"}, {"estimator": "topk", "k": 3}],
                         ids=lambda x: x["estimator"])  # fmt: skip
def test_a_weight_above_1_and_a_mask_of_the_smallest_float(backend, objective):
    """Their product is infinite, times a probability of 0: also in the gradient of token_logprobs' entropy."""
    batch = make_batch(11, shape=(5,), kinds=("logits", "linear", "linear"), dtype=torch.float32, masked=False)
    with torch.no_grad():
        batch.student.logits[:, 10:] = torch.finfo(torch.float32).min
    batch.token_ids.remainder_(10)
    _, (gradient,) = run(batch, backend=backend, entropy_weight=30.0, **objective)
    assert torch.isfinite(gradient).all()
    _, entropy = fg.token_logprobs(batch.student, batch.token_ids, return_entropy=True, backend=backend)
    assert torch.isfinite(torch.autograd.grad(30 * entropy.sum(), batch.leaves)[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "logits"])
@pytest.mark.parametrize("options", [
    {"estimator": "full", "kl_ref": "exact", "kl_ref_weight": 0.3},
    {"estimator": "full", "entropy_weight": 0.2, "sft_temperature": 0.5},
    {"estimator": "sampled", "entropy_weight": 0.2, "kl_ref": "k3"},
    {"estimator": "topk", "k": 5, "entropy_weight": 0.2},
], ids=str)  # fmt: skip
def test_low_precision_is_no_worse_than_the_naive_path(backend, options, kind, dtype):
    """Under a loss scale, as float16 is trained with."""
    errors = []
    for function in (fg.gopd_loss, fg.reference.gopd_loss):
        total = 0.0
        for seed in range(3):
            batch = make_batch(20 + seed, shape=(9,), vocab=(61,) * 3, kinds=(kind, "linear", "linear"), dtype=dtype)
            more = {"sft_labels": labels_for(batch, 1, 61)} if "sft_temperature" in options else {}
            more |= {"backend": backend} if function is fg.gopd_loss else {}

            def gradients(which, batch=batch, more=more):
                out = which(*batch.models, batch.token_ids, mask=batch.mask, **options, **more)
                return torch.autograd.grad(1024 * out.loss, batch.leaves)

            got = gradients(function)
            more.pop("backend", None)
            wide = batch.replaced(**{m: widened(getattr(batch, m)) for m in ("student", "teacher", "ref")})
            want = gradients(fg.reference.gopd_loss, wide, more)
            total += sum(relative_error(a, b) ** 2 for a, b in zip(got, want, strict=True))
        errors.append(math.sqrt(total))
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 2


# ---------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(("options", "gemms"), [
    ({"entropy_weight": 0.1}, 5), ({"estimator": "full", "entropy_weight": 0.1}, 5),
    ({"estimator": "topk", "k": 5, "entropy_weight": 0.1}, 5), ({"kl_ref": "k3"}, 5),
    ({"kl_ref": "k3", "reward_scale": 1.0}, 5), ({"estimator": "full", "kl_ref": "exact"}, 5),
    ({"estimator": "full", "kl_ref": "exact", "reward_scale": 1.0}, 5),
    ({"estimator": "full", "sft_temperature": 2.0}, 5),
], ids=str)  # fmt: skip
def test_no_term_costs_a_product_but_the_reference_that_it_needs(backend, options, gemms):
    batch = make_batch(30, shape=(N,), vocab=(V,) * 3, hidden=(H,) * 3, dtype=torch.float32, masked=False)
    options = {"reward_scale": 1.25, **options}
    if "sft_temperature" in options:
        options["sft_labels"] = batch.token_ids

    def call():
        fg.gopd_loss(*batch.models, batch.token_ids, chunk_size=48, backend=backend, **options).loss.backward()

    call()
    assert gemm_flops(call) == gemms * GEMM


@pytest.mark.parametrize("options", [
    {"entropy_weight": 0.1, "kl_ref": "k3"}, {"estimator": "full", "entropy_weight": 0.1, "kl_ref": "exact"},
    {"estimator": "full", "entropy_weight": 0.1, "reduction": "none", "sft_temperature": 2.0},
    {"estimator": "topk", "k": 4, "entropy_weight": 0.1, "reduction": "none"},
], ids=str)  # fmt: skip
def test_compiled_gives_the_same_bits(options):
    torch._dynamo.reset()
    batch = make_batch(31, dtype=torch.float32)
    if "sft_temperature" in options:
        options = options | {"sft_labels": labels_for(batch)}

    def call(student, teacher, ref, token_ids, mask):
        return fg.gopd_loss(student, teacher, ref, token_ids, mask=mask, **options)

    want = call(*batch.models, batch.token_ids, batch.mask)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*batch.models, batch.token_ids, batch.mask)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.token_loss, want.token_loss)
    grads = [torch.autograd.grad(x.loss.sum(), batch.leaves) for x in (got, want)]
    assert all(map(torch.equal, *grads))
    torch._dynamo.reset()


def test_torch_func_and_a_second_backward(backend):
    batch = make_batch(32, dtype=torch.float32)
    options = {"estimator": "full", "entropy_weight": 0.2, "kl_ref": "exact", "backend": backend, "mask": batch.mask}

    def loss(hidden, weight):
        return fg.gopd_loss(fg.LinearHead(hidden, weight), batch.teacher, batch.ref, **options).loss

    out = loss(batch.student.hidden, batch.student.weight)
    first = torch.autograd.grad(out, batch.leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, batch.leaves)))
    got = torch.func.grad(loss, argnums=(0, 1))(*(x.detach() for x in batch.leaves))
    assert_all_close(got, first, 1e-6)


def test_a_plain_call_has_no_more_statistics(backend):
    batch = make_batch(33, dtype=torch.float32)
    seen = []
    from fused_gopd.loop import run as loop

    kept = loop.no_statistics
    loop.no_statistics = lambda estimator: seen.append(estimator.statistics_rows) or kept(estimator)
    try:
        run(batch, backend=backend, estimator="full")
    finally:
        loop.no_statistics = kept
    assert seen == [STATISTICS]


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k of full": ({"estimator": "full", "kl_ref": "k3"}, ValueError, "kl_ref must be 'exact' with estimator='full'"),
    "exact": ({"kl_ref": "exact"}, ValueError, "kl_ref must be 'k1', 'k2' or 'k3' with estimator='sampled'"),
    "topk": ({"estimator": "topk", "k": 3, "kl_ref": "k3"}, ValueError, "kl_ref is an option of estimator="),
    "kind": ({"kl_ref": "k4"}, ValueError, "kl_ref must be one of 'none', 'k1', 'k2', 'k3', 'exact'"),
    "weight alone": ({"kl_ref_weight": 0.1}, ValueError, "kl_ref_weight needs kl_ref"),
    "negative": ({"kl_ref": "k3", "kl_ref_weight": -0.1}, ValueError, "kl_ref_weight must not be negative"),
    "no reference": ({"kl_ref": "k3", "ref": None}, ValueError, "ref must be given for kl_ref"),
    "baseline": ({"kl_ref": "k3", "baseline": "expected"}, ValueError, "kl_ref needs the reference scored alone"),
    "temperature alone": ({"sft_temperature": 2.0}, ValueError, "sft_temperature needs sft_labels"),
    "temperature": ({"sft_temperature": 0.0, "sft_labels": True}, ValueError, "sft_temperature must be positive"),
    "entropy": ({"entropy_weight": math.nan}, ValueError, "entropy_weight must be finite"),
    "a tensor": ({"entropy_weight": torch.ones(())}, TypeError, "entropy_weight must be a Python number"),
}


@pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_named(case, function):
    options, error, message = ERRORS[case]
    batch = make_batch(34, masked=False)
    if options.get("sft_labels"):
        options = options | {"sft_labels": batch.token_ids}
    arguments: dict[str, Any] = {"ref": batch.ref, **options}
    with pytest.raises(error, match=message):
        function(batch.student, batch.teacher, token_ids=batch.token_ids, **arguments)
