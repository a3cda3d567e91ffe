"""fused_gopd.integrations.liger: Liger's losses against formulas of their own, and its modules' signatures."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

import fused_gopd as fg
from costs import GEMM, gemm_flops
from costs import H as WIDTH
from costs import N as TOKENS
from costs import V as VOCAB
from fused_gopd.integrations import liger

pytestmark = pytest.mark.usefixtures("one_thread")

V = 37
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5}


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def leaves(given: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in given]


def compare(got: Tensor, want: Tensor, inputs: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    got.backward()
    want.backward()
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=50 * tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- distillation


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The generalized JSD of log-probs (N, V), per token."""
    if beta == 0:
        return (q.exp() * (q - p)).sum(-1)
    if beta == 1:
        return (p.exp() * (p - q)).sum(-1)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignored", [-100, 5])
def test_jsd(dtype: torch.dtype, beta: float, ignored: int) -> None:
    given = tensors(dtype, (11, 8), (V, 8), (11, 6), (V, 6))
    labels = torch.arange(11) % 7
    labels[::3] = ignored
    inputs, dense = leaves(given[:2]), leaves([x.double() for x in given[:2]])
    got = liger.LigerFusedLinearJSD(beta, ignored, temperature=1.7)(*inputs, *given[2:], labels)
    p = ((dense[0] @ dense[1].T) / 1.7).log_softmax(-1)
    q = ((given[2].double() @ given[3].double().T) / 1.7).log_softmax(-1)
    live = labels != ignored
    compare(got, jsd(p, q, beta)[live].mean(), inputs, dense, DTYPES[dtype])


@pytest.mark.parametrize("labels", [None, torch.full((3,), -100)])
def test_jsd_of_all_tokens_and_of_none(labels: Tensor | None) -> None:
    given = tensors(torch.float64, (3, 8), (V, 8), (3, 6), (V, 6))
    inputs = leaves(given[:2])
    loss = liger.LigerFusedLinearJSD()(*inputs, *given[2:], labels)
    loss.backward()
    assert (loss > 0) == (labels is None)
    assert (inputs[0].grad.abs().sum() > 0) == (labels is None)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hard_and_soft_cost_four_gemms(temperature: float) -> None:
    given = tensors(torch.float32, (TOKENS, WIDTH), (VOCAB, WIDTH), (TOKENS, WIDTH), (VOCAB, WIDTH))
    inputs, labels = leaves(given[:2]), torch.ones(TOKENS, dtype=torch.long)
    module = liger.LigerFusedLinearJSDLoss(temperature=temperature)
    assert gemm_flops(lambda: module(*inputs, *given[2:], labels).backward()) == 4 * GEMM


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hard", "soft"), [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hard_and_soft(dtype: torch.dtype, hard: float, soft: float, temperature: float) -> None:
    given = tensors(dtype, (11, 8), (V, 8), (V,), (11, 6), (V, 6), (V,))
    labels = torch.arange(11) % 7
    labels[::3] = -100
    inputs, dense = leaves(given[:3]), leaves([x.double() for x in given[:3]])
    module = liger.LigerFusedLinearJSDLoss(hard, soft, 0.3, temperature=temperature, return_soft_hard_loss=True)
    loss, soft_loss, hard_loss = module(*inputs[:2], *given[3:5], labels, inputs[2], given[5])
    z, y = dense[0] @ dense[1].T + dense[2], given[3].double() @ given[4].double().T + given[5].double()
    live = labels != -100
    p, q = (x.div(temperature).log_softmax(-1) for x in (z, y))
    divergence = jsd(p, q, 0.3)[live].mean()
    nll = torch.nn.functional.cross_entropy(z, labels)  # at temperature 1
    torch.testing.assert_close(soft_loss.double(), divergence.detach(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(hard_loss.double(), nll.detach(), rtol=2e-5, atol=2e-5)
    assert not soft_loss.requires_grad
    assert not hard_loss.requires_grad
    compare(loss, hard * nll + soft * divergence, inputs, dense, DTYPES[dtype])


def test_a_student_with_fewer_tokens_is_refused() -> None:
    given = tensors(torch.float32, (3, 8), (V, 8), (3, 6), (V + 3, 6))
    for module in (liger.LigerFusedLinearJSD(), liger.LigerFusedLinearJSDLoss()):
        with pytest.raises(ValueError, match="teacher_weight must have as many rows as student_weight, 37, got 40"):
            module(*given, torch.zeros(3, dtype=torch.long))


# --------------------------------------------------------------------------------------------------------------- GRPO

B, T = 3, 5


def batch(dtype: torch.dtype, seed: int = 4, **given: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Hidden states, weight and bias; and the other arguments. Masked entries are NaN, and the last sequence empty."""
    hidden, weight, bias, *rest = tensors(dtype, (B, T, 8), (V, 8), (V,), (B, T), (B, T), (B,), seed=seed)
    ids = torch.arange(B * T).view(B, T) % V
    mask = torch.ones(B, T)
    mask[0, 3:] = mask[1, 0] = mask[2] = 0
    logprobs = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (torch.where(mask > 0, logprobs + 0.3 * x, torch.nan) for x in rest[:2])
    arguments = {"selected_token_ids": ids, "attention_mask": mask, "advantages": rest[2]}
    more = {"old_per_token_logps": old, "ref_per_token_logps": ref, "vllm_is_ratio": (old - ref).exp()}
    return [hidden, weight, bias], arguments | {name: more[name] for name, wanted in given.items() if wanted}


def grpo(logprobs: Tensor, arguments: dict[str, Tensor], *, items: float | None = None, **options: object) -> Tensor:
    """The loss of log-probs (B, T), token by token."""
    beta, kind = options["beta"], options["loss_type"]
    low, high = options["epsilon_low"], options["epsilon_high"]
    live = arguments["attention_mask"].bool()
    sequences = []
    for b in range(B):
        where = live[b]
        logp, advantage = logprobs[b][where], arguments["advantages"][b].double()
        old, ref, importance = (
            arguments[name][b][where].double() if name in arguments else default
            for name, default in (
                ("old_per_token_logps", logp.detach()),
                ("ref_per_token_logps", logp.detach()),
                ("vllm_is_ratio", torch.ones_like(logp).detach()),
            )
        )
        log_ratio = logp - old
        total = log_ratio.sum()
        if options.get("importance_sampling_level") == "sequence":
            log_ratio = (log_ratio.mean() if len(logp) else log_ratio.sum()).expand(len(logp))
        ratio = log_ratio.exp()
        if kind == "cispo":
            losses = -ratio.clamp(max=high).detach() * advantage * logp * importance
        elif kind == "sapo":
            tau = 1.0 if advantage > 0 else 1.05
            losses = -advantage * 4 / tau / (1 + (-tau * (ratio - 1)).exp()) * importance
        elif kind == "vespo":
            k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
            w = total.detach().exp()
            losses = -advantage * w**k * (rate * (1 - w)).exp() * logp
        else:
            delta = options.get("delta") or float("inf")
            losses = -torch.minimum(ratio.clamp(max=delta) * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            losses = losses * importance
        if beta:
            kl = (ref - logp).exp() - (ref - logp) - 1
            losses = losses + beta * (kl * ratio if options.get("use_bias_correction_kl") else kl)
        sequences.append(losses)
    tokens = torch.cat(sequences)
    if kind in ("grpo", "sapo"):
        return sum(x.sum() / max(len(x), 1) for x in sequences) / B
    if kind == "dr_grpo":
        return tokens.sum() / (B * options["max_completion_length"])
    if kind == "luspo":
        return sum(x.mean() * len(x) for x in sequences if len(x)) / B
    return tokens.sum() / (items or len(tokens))


GIVEN = ("old_per_token_logps", "ref_per_token_logps", "vllm_is_ratio")
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
CASES = [
    *[{"loss_type": kind, "beta": beta} for kind in TYPES for beta in (0.0, 0.2)],
    *[{"loss_type": kind, "importance_sampling_level": "sequence"} for kind in ("grpo", "bnpo", "dr_grpo", "dapo")],
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0},
    {"loss_type": "dapo", "delta": 1.2},
    {"loss_type": "dapo", "delta": 3.0},
    {"loss_type": "dapo", "use_bias_correction_kl": True},
    {"loss_type": "grpo", "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("off_policy", [False, True])
def test_grpo(dtype: torch.dtype, options: dict, off_policy: bool) -> None:
    options = {"beta": 0.1, "epsilon_low": 0.1, "epsilon_high": 0.15, "max_completion_length": 9, **options}
    whole = options["loss_type"] not in ("vespo", "luspo")
    given, arguments = batch(
        dtype, old_per_token_logps=off_policy, ref_per_token_logps=True, vllm_is_ratio=off_policy and whole
    )
    inputs, dense = leaves(given), leaves([x.double() for x in given])
    loss, metrics = liger.LigerFusedLinearGRPOLoss(temperature=1.0, **options)(*inputs[:2], bias=inputs[2], **arguments)
    z = dense[0] @ dense[1].T + dense[2]
    logprobs = z.log_softmax(-1).gather(-1, arguments["selected_token_ids"][..., None])[..., 0]
    compare(loss, grpo(logprobs, arguments, **options), inputs, dense, 4 * DTYPES[dtype])
    assert len(metrics) == 1 + (options["beta"] != 0)
    assert all(torch.isfinite(x) and not x.requires_grad for x in metrics)


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_grpo_without_a_live_token_is_0(options: dict) -> None:
    given, arguments = batch(torch.float32, old_per_token_logps=True, ref_per_token_logps=True)
    arguments["attention_mask"] = torch.zeros(B, T)
    inputs = leaves(given)
    module = liger.LigerFusedLinearGRPOLoss(**{"max_completion_length": 9, **options})
    loss, metrics = module(*inputs[:2], bias=inputs[2], **arguments)
    loss.backward()
    assert loss == 0
    assert not any(x.any() for x in metrics)
    assert not any(x.grad.any() for x in inputs)


@settings(max_examples=60, deadline=None)
@given(
    kind=strategies.sampled_from(TYPES),
    sequences=strategies.booleans(),
    beta=strategies.sampled_from((0.0, 0.04, 1.0)),
    low=strategies.floats(0, 1),
    high=strategies.floats(0, 3),
    delta=strategies.none() | strategies.floats(0.5, 4),
    corrected=strategies.booleans(),
    given_names=strategies.sets(
        strategies.sampled_from(("old_per_token_logps", "ref_per_token_logps", "vllm_is_ratio"))
    ),
    seed=strategies.integers(0, 2**16),
)
def test_grpo_of_random_options(kind, sequences, beta, low, high, delta, corrected, given_names, seed) -> None:
    options = {"loss_type": kind, "beta": beta, "epsilon_low": low, "epsilon_high": high, "delta": delta}
    options |= {"use_bias_correction_kl": corrected, "max_completion_length": 9}
    if sequences and kind in ("grpo", "bnpo", "dr_grpo", "dapo"):
        options["importance_sampling_level"] = "sequence"
    if kind == "vespo":
        given_names -= {"vllm_is_ratio"}
    given, arguments = batch(torch.float64, seed=seed, **dict.fromkeys(given_names, True))
    inputs, dense = leaves(given), leaves(given)
    module = liger.LigerFusedLinearGRPOLoss(**options, use_ref_model="ref_per_token_logps" in given_names)
    loss, _ = module(*inputs[:2], bias=inputs[2], **arguments)
    logprobs = (dense[0] @ dense[1].T + dense[2]).log_softmax(-1)
    want = grpo(logprobs.gather(-1, arguments["selected_token_ids"][..., None])[..., 0], arguments, **options)
    compare(loss, want, inputs, dense, 1e-10)


def test_a_kl_beyond_the_range_of_float32_is_inf_and_not_nan() -> None:
    given, arguments = batch(torch.float32, ref_per_token_logps=True)
    live = arguments["attention_mask"].bool()
    module = liger.LigerFusedLinearGRPOLoss(0.1)
    low = torch.where(torch.arange(V) == arguments["selected_token_ids"][0, 0], -200.0, 0.0)
    arguments["ref_per_token_logps"] = torch.zeros(B, T).masked_fill(~live, torch.nan)
    loss, (kl, _) = module(*leaves(given[:2]), bias=low, **arguments)
    assert loss == kl == torch.inf


def test_grpo_metrics() -> None:
    given, arguments = batch(torch.float64, old_per_token_logps=True, ref_per_token_logps=True)
    _, (kl, clipped) = liger.LigerFusedLinearGRPOLoss(0.1)(*given[:2], bias=given[2], **arguments)
    live = arguments["attention_mask"].bool()
    ids = arguments["selected_token_ids"]
    logprobs = (given[0] @ given[1].T + given[2]).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    difference = (arguments["ref_per_token_logps"] - logprobs)[live]
    torch.testing.assert_close(kl, (difference.exp() - difference - 1).mean())
    ratio = (logprobs - arguments["old_per_token_logps"]).exp()[live]
    up = arguments["advantages"][:, None].expand(B, T)[live] > 0
    want = ((up & (ratio > 1.2)) | (~up & (ratio < 0.8))).double().mean()
    assert 0 < want < 1
    torch.testing.assert_close(clipped, want)


def test_grpo_scores_the_reference_at_its_temperature() -> None:
    given, arguments = batch(torch.float64, old_per_token_logps=True)
    hidden, weight, bias = tensors(torch.float64, (B, T, 6), (V, 6), (V,), seed=9)
    frozen = {"ref_input": hidden, "ref_weight": weight, "ref_bias": bias}
    module = liger.LigerFusedLinearGRPOLoss(0.1, temperature=1.5)
    loss, _ = module(*given[:2], bias=given[2], **arguments, **frozen)
    z = (hidden @ weight.T + bias) / 1.5
    arguments["ref_per_token_logps"] = z.log_softmax(-1).gather(-1, arguments["selected_token_ids"][..., None])[..., 0]
    torch.testing.assert_close(loss, module(*given[:2], bias=given[2], **arguments)[0])


def test_grpo_divides_by_the_items_of_the_whole_batch() -> None:
    given, arguments = batch(torch.float64)
    module = liger.LigerFusedLinearGRPOLoss(0.0, loss_type="dapo")
    count = arguments["attention_mask"].sum()
    loss = module(*given[:2], **arguments)[0]
    for items in (40, torch.tensor(40)):
        torch.testing.assert_close(module(*given[:2], **arguments, num_items_in_batch=items)[0], loss * count / 40)


def test_grpo_of_a_frozen_head_and_without_gradients() -> None:
    given, arguments = batch(torch.float64, old_per_token_logps=True)
    for options in ({}, {"importance_sampling_level": "sequence"}):
        module = liger.LigerFusedLinearGRPOLoss(0.0, **options)
        with torch.no_grad():
            evaluated = module(*given[:2], **arguments)[0]
        hidden = given[0].clone().requires_grad_()
        loss = module(hidden, given[1], **arguments)[0]
        loss.backward()
        torch.testing.assert_close(loss.detach(), evaluated)
        assert hidden.grad is not None
        assert given[1].grad is None


def test_dapo_divides_by_the_tokens_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    given, arguments = batch(torch.float64)
    module = liger.LigerFusedLinearGRPOLoss(0.0, loss_type="dapo")
    alone = module(*given[:2], **arguments)[0]
    elsewhere = 11
    monkeypatch.setattr(liger.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(liger.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(liger.distributed, "all_reduce", lambda count: count.add_(elsewhere))
    count = arguments["attention_mask"].sum()
    want = alone * count * 2 / (count + elsewhere)  # the mean of the ranks' gradients is that of all tokens
    torch.testing.assert_close(module(*given[:2], **arguments)[0], want)
    torch.testing.assert_close(module(*given[:2], **arguments, num_items_in_batch=40)[0], alone * count * 2 / 40)


class _OverwritesItsGradient(torch.autograd.Function):
    """As Liger's RMSNorm, whose backward writes into the gradient that it is given."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.mul_(3)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_a_body_may_overwrite_the_gradient_of_the_hidden_states(estimator: str) -> None:
    hidden, weight, frozen, states = tensors(torch.float32, (B, T, 8), (V, 8), (V, 6), (B, T, 6))
    hidden, weight = leaves([hidden, weight])
    ids = torch.zeros(B, T, dtype=torch.long)
    student = fg.LinearHead(_OverwritesItsGradient.apply(hidden), weight)
    loss = fg.gopd_loss(student, fg.LinearHead(states, frozen), token_ids=ids, estimator=estimator).loss
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(("level", "gemms"), [("token", 3), ("sequence", 4)])
def test_grpo_costs_three_gemms_and_four_where_sequences_are_summed_first(level: str, gemms: int) -> None:
    hidden, weight, advantages = tensors(torch.float32, (2, TOKENS // 2, WIDTH), (VOCAB, WIDTH), (2,))
    inputs = leaves([hidden, weight])
    tokens = torch.ones(2, TOKENS // 2, dtype=torch.long)
    module = liger.LigerFusedLinearGRPOLoss(0.0, importance_sampling_level=level)
    assert gemm_flops(lambda: module(*inputs, tokens, tokens, advantages)[0].backward()) == gemms * GEMM


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_of_float16_under_a_loss_scale(level: str, scale: float) -> None:
    given, arguments = batch(torch.float16, old_per_token_logps=True)
    inputs, dense = leaves(given), leaves([x.double() for x in given])
    module = liger.LigerFusedLinearGRPOLoss(0.0, loss_type="bnpo", importance_sampling_level=level)
    (module(*inputs[:2], bias=inputs[2], **arguments)[0] * scale).backward()
    module(*dense[:2], bias=dense[2], **arguments)[0].backward()
    for x, y in zip(inputs, dense, strict=True):  # 2^-10 is float16's rounding
        torch.testing.assert_close(x.grad.double() / scale, y.grad, rtol=2e-2, atol=2e-3 * y.grad.abs().max().item())


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"loss_type": "ppo"}, {}, "loss_type"),
        ({"importance_sampling_level": "word"}, {}, "importance_sampling_level"),
        ({"sapo_temperature_pos": 0.0}, {}, "sapo_temperature_pos must be positive, got 0.0"),
        ({"delta": -1.0}, {}, "delta must be positive, got -1.0"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, {}, "Sequence-level importance sampling"),
        ({"loss_type": "dr_grpo"}, {}, "max_completion_length must be given"),
        ({"loss_type": "luspo"}, {}, "loss_type='luspo' needs importance_sampling_level='sequence'"),
        ({"beta": 0.1}, {}, "ref_per_token_logps, or ref_input and ref_weight, must be given"),
        ({"beta": 0.0}, {"vllm_is_ratio": torch.ones(B, 2)}, "vllm_is_ratio must fit tokens of shape"),
    ],
)
def test_what_is_refused(options: dict, more: dict, message: str) -> None:
    given, arguments = batch(torch.float32)
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearGRPOLoss(**options)(*given[:2], **arguments, **more)


# --------------------------------------------------------------------------------------------------------- signatures


def test_signatures_are_those_of_liger() -> None:
    """Names, order and defaults. The recorded ones are those of liger-kernel 0.8.5."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    plain = pytest.importorskip("liger_kernel.transformers.fused_linear_jsd")
    for theirs in (chunked.LigerFusedLinearJSDLoss, chunked.LigerFusedLinearGRPOLoss, plain.LigerFusedLinearJSD):
        ours = getattr(liger, theirs.__name__)
        for name in ("__init__", "forward"):
            mine, other = (inspect.signature(getattr(x, name)).parameters.values() for x in (ours, theirs))
            assert [(x.name, x.default) for x in mine] == [(x.name, x.default) for x in other]
