"""Adapters of RL frameworks: on a framework's own types where it can be imported, on their recorded shapes elsewhere.

What is recorded, and from which version, is in ``docs/integrations/README.md``.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import assert_close
from fused_gopd.integrations import logprobs, needs, prime_rl, skyrl, slime
from fused_gopd.integrations.hub import require_model


def framework(name: str) -> ModuleType:
    """A module of a framework; skips where it cannot be imported, whatever the reason."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}")


@dataclass
class Scores:
    """Log-probs (B, T) of sampled tokens under student (with a gradient), teacher, reference and old policy."""

    student: Tensor
    teacher: Tensor
    ref: Tensor
    old: Tensor
    mask: Tensor

    def advantages(self, scale: float, behaviour: Tensor) -> Tensor:
        return (scale * self.teacher + (1 - scale) * self.ref - behaviour.detach()) * self.mask

    def surrogate(self, scale: float) -> Tensor:
        """(B, T) of -A rho, against the old policy."""
        ratio = (self.student - self.old).exp()
        return -self.advantages(scale, self.old) * ratio * self.mask


@pytest.fixture
def scores() -> Scores:
    generator = torch.Generator().manual_seed(0)
    student, teacher, ref, old = (-3 * torch.rand(3, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = mask[1, 1] = False
    return Scores(student.requires_grad_(), teacher, ref, student.detach() + 0.1 * old, mask)


def assert_same_gradient(scores: Scores, loss: Tensor, want: Tensor) -> None:
    assert_close(loss.detach(), want.detach(), 1e-12, "loss")
    (got,) = torch.autograd.grad(loss, scores.student)
    (expected,) = torch.autograd.grad(want, scores.student)
    assert_close(got, expected, 1e-12, "gradient")


# ------------------------------------------------------------------------------------ what all share: from log-probs


def as_logits(scores: Scores) -> fg.Logits:
    """Logits of two tokens, of which token 0 has the student's log-prob."""
    return fg.Logits(torch.stack((scores.student, torch.log1p(-scores.student.exp())), -1))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": (0.05, 0.1), "clip_dual": 1.5},
        {"ratio": "sequence", "clip": (0.05, 0.1)},
        {"advantage_clip": 0.7, "logprob_min": -1.5},
        {"rollout_is_cap": 1.05},
        {"ratio": "sequence-mean", "clip": (0.05, 0.1), "rollout_is": "sequence", "rollout_is_cap": (0.9, 1.1)},
        {"ratio": "detached", "clip": (0.05, 0.1), "advantage_policy": "current", "loss_max": 1.0},
        {"ratio": "none", "rollout_mask": {"token_k3": (None, 0.003), "seq_max_ratio": (None, 1.2)}},
        {"trust_region": {"token_difference": (-0.01, 0.01), "geometric_ratio": (0.9, None)}, "log_ratio_max": 0.05},
    ],
)
def test_loss_from_logprobs_is_the_loss_from_logits(scores, scale, options):
    rollout = {}
    if not set(logprobs.ROLLOUT).isdisjoint(options):
        rollout = {"rollout_logprobs": scores.old - torch.linspace(-0.1, 0.1, 18, dtype=torch.float64).reshape(3, 6)}
    given = {"mask": scores.mask, "reward_scale": scale, "old_logprobs": scores.old, **options, **rollout}
    got = logprobs.sampled_loss(scores.student, scores.teacher, scores.ref, **given)
    teacher, ref = fg.TokenLogProbs(scores.teacher), fg.TokenLogProbs(scores.ref)
    ids = torch.zeros(3, 6, dtype=torch.int64)
    want = fg.reference.gopd_loss(as_logits(scores), teacher, ref, ids, reduction="none", **given)
    weights = torch.linspace(-1, 2, 18, dtype=torch.float64).reshape(3, 6)
    assert_same_gradient(scores, (got.loss * weights).sum(), (want.loss * weights).sum())
    for name in ("token_loss", "advantages", "student_logprobs", "clipped", "importance"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a.double(), b.double(), 1e-12, name)


def test_packed_sequences_have_the_ratios_of_padded_ones(scores):
    options = {"reward_scale": 1.25, "ratio": "sequence"}
    padded = logprobs.sampled_loss(
        scores.student, scores.teacher, scores.ref, mask=scores.mask, old_logprobs=scores.old, **options
    )
    names = ("student", "teacher", "ref", "old")
    student, teacher, ref, old = (getattr(scores, name)[scores.mask] for name in names)
    bounds = torch.tensor([0, 4, 9, 15], dtype=torch.int32)
    packed = logprobs.sampled_loss(student, teacher, ref, old_logprobs=old, cu_seqlens=bounds, **options)
    assert_close(packed.loss.detach(), padded.loss[scores.mask].detach(), 1e-12)


def test_masked_tokens_may_hold_anything(scores):
    broken = {
        name: getattr(scores, name).detach().masked_fill(~scores.mask, torch.nan) for name in ("teacher", "ref", "old")
    }
    student = scores.student.detach().masked_fill(~scores.mask, torch.nan).requires_grad_()
    out = logprobs.sampled_loss(
        student, broken["teacher"], broken["ref"], mask=scores.mask, reward_scale=1.25, old_logprobs=broken["old"]
    )
    out.loss.sum().backward()
    assert torch.isfinite(out.loss).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", ["student", "teacher", "ref", "old", "rollout"])
def test_probabilities_are_no_log_probs(scores, name):
    given = {x: getattr(scores, x).detach() for x in ("student", "teacher", "ref", "old")} | {"rollout": scores.old}
    given[name] = given[name].masked_fill(scores.mask, 0.9)
    arguments = {f"{x}_logprobs": given[x] for x in given}
    with pytest.raises(ValueError, match=f"{name}_logprobs must be log-probabilities.*got 0.9"):
        logprobs.sampled_loss(**arguments, mask=scores.mask, reward_scale=1.25)
    given[name] = given[name].masked_fill(scores.mask, -0.9).masked_fill(~scores.mask, 0.9)
    logprobs.sampled_loss(**{f"{x}_logprobs": given[x] for x in given}, mask=scores.mask, reward_scale=1.25)


def test_a_token_that_a_model_rules_out_has_no_loss(scores):
    teacher = scores.teacher.clone()
    teacher[2, 3] = -torch.inf
    out = logprobs.sampled_loss(scores.student, teacher, scores.ref, reward_scale=1.25)
    out.loss.sum().backward()
    assert out.loss[2, 3] == 0
    assert scores.student.grad[2, 3] == 0
    assert torch.isfinite(scores.student.grad).all()


def test_a_reference_that_lambda_cancels_does_not_matter(scores):
    ref = torch.full_like(scores.ref, -torch.inf)
    got = logprobs.sampled_loss(scores.student, scores.teacher, ref)
    want = logprobs.sampled_loss(scores.student, scores.teacher)
    assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reward_scale": 1.25, "ref_logprobs": None}, ValueError, "reward_scale=1.25 needs the reference's log-probs"),
        ({"teacher_logprobs": None}, ValueError, "teacher_logprobs must be given"),
        ({"teacher_logprobs": torch.zeros(3, 5)}, ValueError, r"teacher_logprobs must have the token shape \(3, 6\)"),
        ({"clip": (0.2, 0.2)}, ValueError, "clip needs old_logprobs"),
        ({"clap": 1}, TypeError, "clap"),
    ],
)
def test_bad_input_is_named(scores, change, error, message):
    given = {"teacher_logprobs": scores.teacher, "ref_logprobs": scores.ref, **change}
    with pytest.raises(error, match=message):
        logprobs.sampled_loss(scores.student, **given)


# -------------------------------------------------------------------------------------------------------------- slime


def slime_args(**changes: Any) -> Namespace:
    given = {"gopd_reward_scale": 1.25, "use_opd": True, "opd_kl_coef": 0.0, "opd_type": "sglang", "kl_coef": 0.0}
    more = {"use_rollout_logprobs": False, "normalize_advantages": False, "advantage_estimator": "grpo"}
    path = "fused_gopd.integrations.slime.gopd_advantages"
    return Namespace(**{**given, **more, "custom_advantage_function_path": path, **changes})


def slime_data(scores: Scores) -> dict[str, Any]:
    """Per sample a (R_i,) tensor, of different lengths, and one sample of which this rank has no token."""

    def samples(x: Tensor) -> list[Tensor]:
        return [x[0, :4], x[1], x[2, :0]]

    entries = {"log_probs": scores.student, "teacher_log_probs": scores.teacher, "ref_log_probs": scores.ref}
    data: dict[str, Any] = {name: samples(x.detach()) for name, x in entries.items()}
    return {**data, "rewards": [0.0] * 3, "response_lengths": [4, 6, 0], "loss_masks": samples(scores.mask.int())}


def assert_slime_advantages(scores: Scores, data: dict[str, Any]) -> None:
    scores.mask[:] = True  # slime masks later
    want = scores.advantages(1.25, scores.student)
    for got, expected in zip(data["advantages"], (want[0, :4], want[1], want[2, :0]), strict=True):
        assert_close(got, expected, 1e-6)
    assert data["returns"] is data["advantages"]


def test_slime_gets_the_advantages_of_each_sample(scores):
    data = slime_data(scores)
    slime.gopd_advantages(slime_args(), data)
    assert_slime_advantages(scores, data)


def test_slimes_own_function_calls_it(scores, monkeypatch):
    loss = framework("slime.backends.megatron_utils.loss")
    monkeypatch.setattr(loss.mpu, "is_pipeline_last_stage", lambda: True, raising=False)
    data = slime_data(scores)
    loss.compute_advantages_and_returns(slime_args(), data)
    assert_slime_advantages(scores, data)


@pytest.mark.parametrize(
    ("change", "without", "message"),
    [
        ({"opd_kl_coef": 1.0}, None, "--opd-kl-coef must be 0"),
        ({"normalize_advantages": True}, None, "--normalize-advantages must not be set"),
        ({"advantage_estimator": "gspo"}, None, "--advantage-estimator must not be gspo"),
        ({}, "teacher_log_probs", "slime scores a teacher with --use-opd"),
        ({}, "ref_log_probs", "reward_scale=1.25 needs .* --use-kl-loss"),
        ({}, "log_probs", "slime keeps them with --use-opd"),
    ],
)
def test_slime_is_told_what_to_set(scores, change, without, message):
    data = slime_data(scores)
    data.pop(without, None)
    with pytest.raises(ValueError, match=message):
        slime.gopd_advantages(slime_args(**change), data)


def test_slime_needs_a_lambda(scores):
    args = slime_args()
    del args.gopd_reward_scale
    with pytest.raises(ValueError, match=r"gopd_reward_scale .* --custom-config-path"):
        slime.gopd_advantages(args, slime_data(scores))


# ----------------------------------------------------------------------------------------------------------- prime-rl


@dataclass
class LossInputs:
    """As recorded."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = field(default=None)


@dataclass
class LossOutputs:
    """As recorded."""

    loss: Tensor
    metrics: dict[str, Tensor]


def recorded(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """A module of a framework with nothing but what an adapter imports from it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(params=["recorded", "prime_rl"])
def prime(request, monkeypatch) -> ModuleType:
    if request.param == "recorded":
        return recorded(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)
    return framework("prime_rl.trainer.rl.loss")


def prime_inputs(module: ModuleType, scores: Scores, target: Tensor, inference: Tensor, row: int = 0) -> Any:
    zeros = torch.zeros_like(target[row])
    return module.LossInputs(scores.student[row], inference[row], target[row], zeros, scores.mask[row])


def target_of(scores: Scores, scale: float) -> Tensor:
    rows = zip(scores.teacher.tolist(), scores.ref.tolist(), strict=True)
    return torch.tensor([prime_rl.target_logprobs(scale, q, r) for q, r in rows], dtype=torch.float64)


def test_prime_rls_custom_loss_is_the_surrogate(scores, prime):
    target = target_of(scores, 4.0)
    assert (target > 1).any()  # it is no log-prob
    result = prime_rl.gopd_loss(prime_inputs(prime, scores, target, scores.old))
    assert isinstance(result, prime.LossOutputs)
    assert_same_gradient(scores, result.loss, scores.surrogate(4.0)[0].sum())
    want = scores.advantages(4.0, scores.old)[0].sum() / scores.mask[0].sum()
    assert_close(result.metrics["gopd/advantage"], want, 1e-12)


def test_prime_rls_mask_is_a_rollout_mask(scores, prime):
    """Its ref_kl: the ratio has a gradient, tokens whose probability fell by more than a bound have no loss."""
    target, inference = target_of(scores, 4.0), scores.old - torch.linspace(-0.2, 0.2, 6, dtype=torch.float64)
    p, q = scores.student[0], inference[0]
    low = (p.exp() - q.exp())[scores.mask[0]].mean().item()
    bound = {"token_difference": [low, float("inf")]}  # as TOML has it
    result = prime_rl.gopd_loss(prime_inputs(prime, scores, target, inference), rollout_mask=bound)
    kept = (p.exp() - q.exp() >= low) & scores.mask[0]
    assert 0 < kept.sum() < scores.mask[0].sum()
    want = -((target[0] - p.detach()) * (p - q).exp() * kept).sum()
    assert_same_gradient(scores, result.loss, want)


def test_prime_rls_own_distillation_of_the_target_is_gopd(scores):
    loss = framework("prime_rl.trainer.rl.loss")
    on_policy = scores.student.detach()  # where its trust region and its regulariser do nothing
    result = loss.ref_kl_loss_fn(prime_inputs(loss, scores, target_of(scores, 1.25), on_policy))
    (got,) = torch.autograd.grad(result.loss, scores.student)
    assert_close(got[0], -scores.advantages(1.25, scores.student)[0], 1e-12)


def test_prime_rls_configuration_finds_the_loss():
    config, loss = framework("prime_rl.configs.trainer"), framework("prime_rl.trainer.rl.loss")
    path = "fused_gopd.integrations.prime_rl.gopd_loss"
    assert callable(loss.setup_rl_loss_fn(config.CustomLossConfig(import_path=path, kwargs={"clip": [0.2, 0.2]})))


def test_prime_rl_is_told_where_lambda_belongs(scores, prime):
    inputs = prime_inputs(prime, scores, scores.teacher, scores.old)
    with pytest.raises(ValueError, match=r"reward_scale must be 1 .* target_logprobs"):
        prime_rl.gopd_loss(inputs, reward_scale=1.25)
    with pytest.raises(ValueError, match="token 1 must have finite log-probs"):
        prime_rl.target_logprobs(1.25, [-1.0, -2.0], [-1.0, -torch.inf])
    assert prime_rl.target_logprobs(1.0, [-1.0, -2.0], [-1.0, -torch.inf]) == [-1.0, -2.0]


# -------------------------------------------------------------------------------------------------------------- SkyRL


def skyrl_data(scores: Scores) -> dict[str, Any]:
    names = {"action_log_probs": scores.student, "base_action_log_probs": scores.teacher}
    more = {"ref_action_log_probs": scores.ref, "loss_mask": scores.mask.double()}
    return {name: x.detach() for name, x in {**names, **more}.items()}


@pytest.fixture(params=["recorded", "skyrl"])
def skyrl_batch(request) -> Callable[[dict[str, Any]], Any]:
    if request.param == "recorded":
        return dict
    return framework("skyrl.backends.skyrl_train.training_batch").TrainingInputBatch


def test_skyrls_loss_mask_is_no_weight(scores):
    data = skyrl_data(scores)
    with pytest.raises(ValueError, match=r"data\['loss_mask'\] must hold 0 and 1 only, got 0.5"):
        skyrl.gopd_rewards({**data, "loss_mask": data["loss_mask"] / 2}, reward_scale=1.25)


def test_skyrls_rewards_are_the_advantages(scores, skyrl_batch):
    data = skyrl.gopd_rewards(skyrl_batch(skyrl_data(scores)), reward_scale=1.25)
    assert_close(data["rewards"], scores.advantages(1.25, scores.student), 1e-12)


def test_skyrls_advantages_are_not_whitened(monkeypatch):
    found = {}
    module = "skyrl_train.utils.ppo_utils"
    monkeypatch.setattr(skyrl.importlib.util, "find_spec", lambda _: None)
    recorded(monkeypatch, module, register_advantage_estimator=lambda name: lambda f: found.update({name: f}))
    skyrl.register_estimator()
    config = Namespace(advantage_batch_normalize=False)
    assert found["gopd"](torch.ones(2, 3), response_mask=None, config=config)[0].equal(torch.ones(2, 3))
    config.advantage_batch_normalize = True
    with pytest.raises(ValueError, match="advantage_batch_normalize must be false"):
        found["gopd"](torch.ones(2, 3), config=config)


def test_skyrls_estimator_hands_them_on(scores):
    utils = framework("skyrl.backends.skyrl_train.utils.ppo_utils")
    skyrl.register_estimator()
    rewards = torch.randn(3, 6)
    advantages, _ = utils.compute_advantages_and_returns(rewards, torch.ones(3, 6), None, "gopd", None)
    assert torch.equal(advantages, rewards)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("base_action_log_probs", "trainer.ref.model.path is the teacher"),
        ("ref_action_log_probs", "reward_scale=1.25 needs .* SkyRL scores no third model"),
    ],
)
def test_skyrl_is_told_what_is_missing(scores, without, message):
    data = skyrl_data(scores)
    del data[without]
    with pytest.raises(ValueError, match=message):
        skyrl.gopd_rewards(data, reward_scale=1.25)


# ------------------------------------------------------------------------------------------------------------ NeMo-RL

NEMO = "nemo_rl.algorithms.loss.interfaces"


@pytest.fixture(params=["recorded", "nemo_rl"])
def nemo(request, monkeypatch) -> Iterator[Any]:
    """The adapter, and what makes NeMo-RL's data."""
    batch: Callable[[dict[str, Any]], Any] = dict
    if request.param == "recorded":
        enums = {
            "LossInputType": Enum("LossInputType", {"LOGPROB": "logprob", "LOGIT": "logit"}),
            "LossType": Enum("LossType", {"TOKEN_LEVEL": "token_level"}),
            "MetricNormalizer": Enum("MetricNormalizer", {"TOKENS": "tokens"}),
        }
        recorded(monkeypatch, NEMO, **enums)
    else:
        framework(NEMO)
        batch = framework("nemo_rl.distributed.batched_data_dict").BatchedDataDict
    adapter = "fused_gopd.integrations.nemo_rl"
    monkeypatch.delitem(sys.modules, adapter, raising=False)
    yield SimpleNamespace(adapter=importlib.import_module(adapter), batch=batch)
    sys.modules.pop(adapter, None)


def nemo_data(scores: Scores) -> dict[str, Any]:
    """(B, S), one token longer: the first is not predicted."""

    def with_first(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x.detach(), (1, 0))

    names = {"teacher_logprobs": scores.teacher, "reference_policy_logprobs": scores.ref, "prev_logprobs": scores.old}
    data = {name: with_first(x) for name, x in {**names, "generation_logprobs": scores.old}.items()}
    return {**data, "token_mask": with_first(scores.mask.double()), "sample_mask": torch.tensor([1.0, 1.0, 0.0])}


def test_nemo_rls_loss_is_the_surrogate_over_the_global_number_of_tokens(scores, nemo):
    loss_fn = nemo.adapter.GOPDLossFn(reward_scale=1.25)
    loss, metrics = loss_fn(scores.student, nemo.batch(nemo_data(scores)), torch.tensor(9), torch.tensor(40))
    scores.mask[2] = False
    assert_same_gradient(scores, loss, scores.surrogate(1.25).sum() / 40)
    assert metrics["advantage"] == pytest.approx((scores.advantages(1.25, scores.old).sum() / 40).item())
    assert metrics.keys() - {"num_valid_samples"} <= loss_fn.metric_normalizations.keys()


def test_nemo_rls_masks_are_no_weights(scores, nemo):
    for name in ("token_mask", "sample_mask"):
        data = nemo_data(scores)
        data[name] = data[name] * 0.5
        with pytest.raises(ValueError, match=rf"data\['{name}'\] must hold 0 and 1 only, got 0.5"):
            nemo.adapter.GOPDLossFn()(scores.student, nemo.batch(data), torch.tensor(9), torch.tensor(40))


def test_nemo_rl_makes_its_input_from_logits(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # which it calls wherever it runs
    utils = framework("nemo_rl.algorithms.loss.utils")
    batch = framework("nemo_rl.distributed.batched_data_dict").BatchedDataDict
    adapter = framework("fused_gopd.integrations.nemo_rl")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 11, generator=generator).requires_grad_()
    ids = torch.randint(11, (2, 7), generator=generator)
    teacher, ref, old = (-3 * torch.rand(2, 7, generator=generator) for _ in range(3))
    mask = torch.arange(7).expand(2, 7) >= 3
    data = batch(input_ids=ids, token_mask=mask.float(), sample_mask=torch.ones(2), prev_logprobs=old,
                 teacher_logprobs=teacher, reference_policy_logprobs=ref)  # fmt: skip
    loss_fn = adapter.GOPDLossFn(reward_scale=1.25, clip=(0.2, 0.2))
    given, data = utils.prepare_loss_input(logits, data, loss_fn)
    loss, _ = loss_fn(data=data, global_valid_seqs=torch.tensor(2), global_valid_toks=mask.sum(), **given)
    options = {"mask": mask[:, 1:], "reward_scale": 1.25, "old_logprobs": old[:, 1:], "clip": (0.2, 0.2)}
    scores = fg.TokenLogProbs(teacher[:, 1:]), fg.TokenLogProbs(ref[:, 1:])
    want = fg.reference.gopd_loss(fg.Logits(logits[:, :-1]), *scores, ids[:, 1:], **options).loss
    assert_close(loss.detach(), want.detach(), 1e-6)
    assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(want, logits)[0], 1e-6)


def head(generator: torch.Generator, width: int, vocabulary: int = 11) -> Any:
    checkpoint = pytest.importorskip("fused_gopd.integrations.checkpoint")
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    return checkpoint.CheckpointHead(weight, None, 1.0, None, None, "teachers/math", "{}")


def nemo_states() -> tuple[dict[str, Any], Tensor, Any, Any]:
    """Data with hidden states, the student's logits (B, S, V) and two heads; float64."""
    generator = torch.Generator().manual_seed(0)
    heads = head(generator, 5), head(generator, 3)
    ids = torch.randint(11, (3, 7), generator=generator)
    hidden = [torch.randn(3, 7, h.hidden_size, generator=generator, dtype=torch.float64) for h in heads]
    hidden[0][:, 0] = torch.nan  # the first token is not predicted
    data = {
        "input_ids": ids,
        "token_mask": (torch.arange(7).expand(3, 7) >= 3).double(),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
        "teacher_hidden": hidden[0],
        "ref_hidden": hidden[1],
    }
    logits = torch.randn(3, 7, 13, generator=generator, dtype=torch.float64).requires_grad_()  # two rows of padding
    return data, logits, *heads


def test_nemo_rls_full_loss_is_the_exact_divergence_to_hidden_states(nemo):
    data, logits, teacher, ref = nemo_states()
    loss_fn = nemo.adapter.GOPDFullLossFn(teacher, ref, reward_scale=1.25, temperature=0.8)
    assert loss_fn.input_type.value == "logit"
    loss, metrics = loss_fn(
        logits=logits,
        data=nemo.batch(data),
        global_valid_seqs=torch.tensor(9),
        global_valid_toks=torch.tensor(40),
    )
    p, q, r = (
        x.log_softmax(-1)
        for x in (
            logits[:, :-1, :11],
            data["teacher_hidden"][:, 1:] @ teacher.weight.T / 0.8,
            data["ref_hidden"][:, 1:] @ ref.weight.T / 0.8,
        )
    )
    mask = (data["token_mask"] * data["sample_mask"][:, None])[:, 1:]
    want = ((p.exp() * (p - 1.25 * q + 0.25 * r)).sum(-1) * mask).sum() / 40
    assert_close(loss.detach(), want.detach(), 1e-12, "loss")
    (got,), (expected,) = (torch.autograd.grad(x, logits) for x in (loss, want))
    assert_close(got, expected, 1e-12, "gradient")
    assert metrics.keys() - {"num_valid_samples"} == loss_fn.metric_normalizations.keys()


def test_nemo_rls_full_loss_is_told_what_is_missing(nemo):
    data, logits, teacher, ref = nemo_states()
    counts = torch.tensor(9), torch.tensor(40)
    with pytest.raises(ValueError, match=r"reward_scale=1.25 needs .* pass ref_head"):
        nemo.adapter.GOPDFullLossFn(teacher, reward_scale=1.25)
    loss_fn = nemo.adapter.GOPDFullLossFn(teacher, ref, reward_scale=1.25)
    with pytest.raises(
        ValueError, match=r"logits must be whole, with the 11 columns .* got 6 .* without tensor parallelism"
    ):
        loss_fn(logits[..., :6], nemo.batch(data), *counts)
    del data["ref_hidden"]
    with pytest.raises(ValueError, match=r"data\['ref_hidden'\] must hold hidden states \(B, S, 3\)"):
        loss_fn(logits, nemo.batch(data), *counts)


def test_nemo_rls_wrong_options_are_refused_before_training(nemo):
    with pytest.raises(ValueError, match="clip_dual must be above 1"):
        nemo.adapter.GOPDLossFn(clip_dual=0.5)
    with pytest.raises(TypeError, match="reward_scale must be a Python number"):
        nemo.adapter.GOPDLossFn(reward_scale="big")


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("teacher_logprobs", r"teacher_policy.get_logprobs"),
        ("reference_policy_logprobs", r"reward_scale=1.25 needs .* data\['reference_policy_logprobs'\]"),
    ],
)
def test_nemo_rl_is_told_what_is_missing(scores, nemo, without, message):
    data = nemo_data(scores)
    del data[without]
    with pytest.raises(ValueError, match=message):
        nemo.adapter.GOPDLossFn(reward_scale=1.25)(scores.student, nemo.batch(data), torch.tensor(9), torch.tensor(40))


# ----------------------------------------------------------------------------------------------------------- ms-swift


@pytest.fixture
def swift() -> ModuleType:
    framework("swift.rlhf_trainers.gkd_trainer")
    framework("peft")
    return framework("fused_gopd.integrations.ms_swift")


def tiny_model(seed: int, adapters: bool, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": dropout}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    if adapters:
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
        return get_peft_model(model, lora)
    return model


def swift_trainer(module: ModuleType, adapters: bool = True, **changes: Any) -> Any:
    """swift's trainer with the attributes that its constructor has set by the time of the loss."""
    from accelerate import Accelerator

    trainer = module.GOPDTrainer.__new__(module.GOPDTrainer)
    args = {"offload_teacher_model": False, "gradient_checkpointing_kwargs": None, "sft_alpha": 0.0}
    given = {
        "accelerator": Accelerator(cpu=True),
        "args": Namespace(**args),
        "model": tiny_model(0, adapters),
        "teacher_model": tiny_model(1, False),
        "is_teacher_ds3": False,
        "gkd_logits_topk": None,
        "lmbda": 1.0,
        "temperature": 0.7,
        "_metrics": {"train": defaultdict(list)},
    }
    for name, value in {**given, **changes}.items():
        setattr(trainer, name, value)
    return trainer


def test_ms_swifts_loss_is_the_dense_one(swift):
    swift.register(reward_scale=1.25, estimator="full")
    trainer, ids = swift_trainer(swift), torch.randint(40, (2, 9))
    trainer._prepare_liger_loss()
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss = trainer._compute_liger_loss(trainer.model, {**inputs, "labels": labels}, inputs)

    def logits(model: Any) -> fg.Logits:
        return fg.Logits(model(**inputs).logits[:, :-1], temperature=0.7)

    with trainer.model.disable_adapter(), torch.no_grad():
        ref = logits(trainer.model)
    teacher, mask = logits(trainer.teacher_model), labels[:, 1:] != -100
    options = {"mask": mask, "reward_scale": 1.25, "estimator": "full"}
    want = fg.reference.gopd_loss(logits(trainer.model), teacher, ref, ids[:, 1:], **options).loss
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    assert_close(loss.detach(), want.detach(), 1e-5)
    for got, expected in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(want, weights), strict=True):
        assert_close(got, expected, 1e-4)
    assert trainer._metrics["train"]["gopd/tokens"] == [12.0]


def test_ms_swift_evaluates_what_it_scores(swift):
    """Teacher and reference with dropout, in training mode: the metrics of both are those of an evaluation."""
    swift.register(reward_scale=1.25, estimator="full")
    trainer, ids = swift_trainer(swift, model=tiny_model(0, True, 0.3)), torch.randint(40, (2, 9))
    trainer.teacher_model = tiny_model(1, False, 0.3).train()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = {**inputs, "labels": ids}
    losses = [trainer._compute_liger_loss(trainer.model.train(), batch, inputs).item() for _ in range(3)]
    assert len(set(losses)) == 3  # the student learns with its dropout
    assert len(set(trainer._metrics["train"]["gopd/reward"])) == 1
    assert all(m.training for model in (trainer.model, trainer.teacher_model) for m in model.modules())


def test_ms_swift_runs_no_teacher_that_lambda_cancels(swift):
    swift.register(reward_scale=0.0, estimator="full")
    trainer, ids = swift_trainer(swift), torch.randint(40, (2, 9))
    trainer.teacher_model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    trainer.teacher_model.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    trainer._compute_liger_loss(trainer.model, {**inputs, "labels": ids}, inputs)


@pytest.mark.parametrize(
    ("options", "adapters", "change", "message"),
    [
        ({"reward_scale": 1.25}, False, {}, "reward_scale=1.25, which is the student without adapters"),
        ({}, True, {"lmbda": 0.5}, "set --lmbda 1"),
        ({}, True, {"teacher_model": None}, "set --teacher_model"),
        ({}, True, {"gkd_logits_topk": 8}, "leave out --gkd_logits_topk"),
    ],
)
def test_ms_swift_is_told_what_to_set_before_training(swift, options, adapters, change, message):
    swift.register(**options)
    with pytest.raises(ValueError, match=message):
        swift_trainer(swift, adapters, **change)._prepare_liger_loss()


def test_ms_swifts_teacher_is_not_the_student(swift):
    swift.register(estimator="full")
    student = tiny_model(0, True)
    with pytest.raises(ValueError, match="teacher_model is the student itself, which changes"):
        swift_trainer(swift, model=student, teacher_model=student.get_base_model())._prepare_liger_loss()


def test_ms_swifts_gkd_is_the_trainer_that_was_registered(swift):
    from swift.trainers.trainer_factory import TrainerFactory

    swift.register(estimator="full")
    assert TrainerFactory.get_trainer_cls(Namespace(rlhf_type="gkd")) is swift.GOPDTrainer
    with pytest.raises(TypeError, match="lambda is not an option of GOPDLoss"):
        swift.register(**{"lambda": 1.25})


# ------------------------------------------------------------------------------------------------ what is not installed

MISSING = [
    ("transformers", "transformers", '"transformers>=5.0"'),
    ("trl", "trl", '[train]"'),
    ("trl", "transformers", '[train]"'),
    ("server", "httpx", '[train]"'),
    ("verl", "verl", '"verl>=0.9"'),
    ("ms_swift", "swift", '"ms-swift>=4"'),
    ("nemo_rl", "nemo_rl", "install NeMo-RL"),
    ("skyrl", "skyrl_train", "install SkyRL"),
    ("prime_rl", "prime_rl", "install prime-rl"),
]
# what an integration imports besides is a mock
IMPORT_EACH = """
import importlib, importlib.util, sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import fused_gopd

MOCKS = ["transformers", "transformers.utils.logging", "accelerate", "accelerate.utils"]
OURS = ["fused_gopd.integrations.transformers", "fused_gopd.integrations.transformers.transform"]
importlib.util.find_spec = lambda name, package=None: None


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=package)


sys.meta_path.insert(0, Missing())
for integration, package in {cases}:
    for name in [name for name in sys.modules if name.startswith("fused_gopd.integrations") or name in MOCKS]:
        del sys.modules[name]
    mocks = [name for name in MOCKS if name.partition(".")[0] != package]
    mocks += OURS if integration in ("verl", "ms_swift") else []
    sys.modules.update({{name: MagicMock(__path__=[]) for name in mocks}})
    try:
        module = importlib.import_module(f"fused_gopd.integrations.{{integration}}")
        if integration == "skyrl":
            module.register_estimator()
        if integration == "prime_rl":
            module.gopd_loss(SimpleNamespace(ref_logprobs=0))
        print("imported")
    except ImportError as error:
        print(error)
"""


def test_an_integration_without_its_framework_says_what_to_install():
    code = IMPORT_EACH.format(cases=[case[:2] for case in MISSING])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for (name, package, install), line in zip(MISSING, done.stdout.splitlines(), strict=True):
        start = f"fused_gopd.integrations.{name} needs {package}, which is not installed: "
        assert line.startswith(start)
        assert install in line.removeprefix(start)


def test_an_integration_whose_framework_has_another_version_says_so():
    with pytest.raises(ImportError, match=r"mine does not fit the torch .* 2\..*'no_such'.*: do so"):  # noqa: SIM117
        with needs("mine", "torch", install=lambda: "do so"):
            from torch import no_such  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="No module named 'torch_no_such'"):  # noqa: SIM117
        with needs("mine", "torch", install=lambda: "do so"):
            import torch_no_such  # noqa: F401


# ------------------------------------------------------------------------------------------------------ names of models


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Any:
    """The hub's package, with what the hub answers in ``answer`` and how often it was asked in ``asked``."""
    package = pytest.importorskip("huggingface_hub")
    state = SimpleNamespace(asked=0, answer=None, package=package, cache=tmp_path / "cache")

    def ask(*_: Any, **__: Any) -> None:
        state.asked += 1
        if state.answer is not None:
            raise state.answer

    monkeypatch.setattr(package, "get_hf_file_metadata", ask)
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return state


@pytest.mark.parametrize("name", ["./no", "/no/where", "~/no", "a/deep/folder", "file.txt", "two words/x", ""])
def test_a_name_that_no_hub_has_is_never_asked_for(hub, tmp_path, name):
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match=f"teacher must be a model: there is no folder {re.escape(name)}"):
        require_model("teacher", name)
    assert not hub.asked


def test_a_name_of_the_hub_is_asked_for_once(hub, tmp_path):
    def answer(kind: str) -> Exception:
        error = getattr(hub.package.errors, kind)
        return error.__new__(error)

    folder = tmp_path / "owner" / "here"
    folder.mkdir(parents=True)
    require_model("teacher", "owner/here")
    assert not hub.asked
    for found in (None, answer("EntryNotFoundError"), answer("HfHubHTTPError")):  # there, with other files, no answer
        hub.asked, hub.answer = 0, found
        require_model("teacher", "owner/model", {"cache_dir": hub.cache, "revision": "v1"})
        assert hub.asked == 1
    for reason, message in (
        (answer("RepositoryNotFoundError"), "nor has the hub"),
        (ConnectionError("no route"), r"cannot be reached \(ConnectionError: no route\)"),
    ):
        hub.asked, hub.answer = 0, reason
        with pytest.raises(ValueError, match=f"ref_model must be a model: there is no folder owner/model, .*{message}"):
            require_model("ref_model", "owner/model", {"cache_dir": hub.cache})
        assert hub.asked == 1
    hub.answer = answer("GatedRepoError")
    with pytest.raises(ValueError, match="gives owner/model only to those who accepted its terms"):
        require_model("ref_model", "owner/model", {"cache_dir": hub.cache})
    hub.asked = 0
    with pytest.raises(ValueError, match="local_files_only"):
        require_model("ref_model", "owner/model", {"cache_dir": hub.cache, "local_files_only": True})
    snapshot = hub.cache / "models--owner--model" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (hub.cache / "models--owner--model" / "refs").mkdir()
    (hub.cache / "models--owner--model" / "refs" / "main").write_text("0")
    require_model("ref_model", "owner/model", {"cache_dir": hub.cache})
    assert not hub.asked
