"""verl's own objects, from its configuration to its actor worker, with the losses of this package in them."""
# ruff: noqa: E402

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from builders import assert_close

verl = pytest.importorskip("verl")
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from verl import DataProto
from verl.trainer.distillation import losses as verl_losses
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import config as verl_config
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

import verl_cpu  # noqa: F401  (before the engines of verl ask for their device)
from fused_gopd.integrations import verl as plugin
from ranks import run_on_ranks

MODULE = "fused_gopd.integrations.verl"
CONFIGS = str(Path(verl.__file__).parent / "trainer/config")
VOCAB = 29


# ------------------------------------------------------------------------------------------------------ configuration

SECTION = "distillation.distillation_loss"
GOPD = (f"{SECTION}._target_={MODULE}.GOPDLossConfig", f"{SECTION}.loss_mode=gopd")
REFERENCE = ("actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0")
FUSED = (
    "actor_rollout_ref.model.use_fused_kernels=true",
    "actor_rollout_ref.model.fused_kernel_options.impl_backend=gopd",
)
BASE = (
    "actor_rollout_ref.model.path=student",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
    "data.train_batch_size=4",
    "trainer.n_gpus_per_node=1",
    "algorithm.adv_estimator=grpo",
    "distillation.enabled=true",
    "distillation.n_gpus_per_node=2",
    "distillation.nnodes=1",
    "distillation.teacher_models.teacher_model.model_path=teacher",
    f"{SECTION}.use_task_rewards=false",
)


@functools.cache
def composed(*overrides: str) -> Any:
    with initialize_config_dir(CONFIGS, version_base=None):
        return compose("ppo_trainer", [*BASE, *overrides])


def config_of(*overrides: str) -> Any:
    """verl's own configuration with overrides, as its command line takes them."""
    return copy.deepcopy(composed(*overrides))


def validated(*overrides: str) -> Any:
    """The configuration after the check that verl makes before it starts anything."""
    config = config_of(*overrides)
    verl_config.validate_config(config, use_reference_policy=False, use_critic=False)
    return config


def test_verl_loads_the_plugin_by_name():
    code = (
        "import verl; from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY as d;"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as p; print('gopd' in d, 'gopd' in p)"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": MODULE, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "True True"


def test_the_command_line_selects_the_loss_and_its_options():
    config = validated(*GOPD, *REFERENCE, f"+{SECTION}.reward_scale=1.25")
    loss = omega_conf_to_dataclass(config.distillation).distillation_loss
    assert verl_losses.get_distillation_loss_fn(loss.loss_mode) is plugin.gopd_loss
    assert loss.reward_scale == 1.25


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ([f"+{SECTION}.reward_scale=1.25"], ValueError, "reward_scale=1.25 needs.*use_kl_loss=true"),
        ([f"{SECTION}._target_=verl.workers.config.DistillationLossConfig"], ValueError, f"_target_ must be {MODULE}"),
        ([f"+{SECTION}.reward_scal=1.25"], InstantiationException, "reward_scal'"),
        ([f"+{SECTION}.reward_scale=big"], InstantiationException, "reward_scale must be a Python number, got str"),
        ([f"+{SECTION}.ratio=gspo"], InstantiationException, r"ratio must be one of 'token', 'sequence'.*got 'gspo'"),
        ([f"+{SECTION}.tail=drop"], InstantiationException, "tail must be bucket for loss_mode='gopd'"),
        ([f"{SECTION}.loss_max_clamp=5"], InstantiationException, "advantage_clip bounds the advantage, got 5"),
        ([f"{SECTION}.use_policy_gradient=true", f"+{SECTION}.ratio=sequence"], InstantiationException, "ratio must"),
        (["actor_rollout_ref.rollout.temperature=0.7"], ValueError, "temperature must be 1 .* got 0.7"),
        (["actor_rollout_ref.model.fused_kernel_options.impl_backend=gopd"], ValueError, "use_fused_kernels=true"),
        (
            [*FUSED, "actor_rollout_ref.actor.strategy=veomni"],
            NotImplementedError,
            "strategy=fsdp or fsdp2, got 'veomni'",
        ),
        ([f"{SECTION}.loss_mode=gopd_topk", f"+{SECTION}.reward_scale=1.25"], InstantiationException, "must be 1"),
        (
            [f"{SECTION}.loss_mode=gopd_topk", f"+{SECTION}.tail=sampled"],
            InstantiationException,
            "tail must be one of 'bucket', 'drop', 'renormalize': the teacher's log-prob",
        ),
        (
            [f"{SECTION}.loss_mode=gopd_topk", f"{SECTION}.log_prob_min_clamp=-5"],
            InstantiationException,
            "log_prob_min_clamp must be None .* with tail=drop alone",
        ),
        (
            [f"{SECTION}.loss_mode=gopd_topk", f"+{SECTION}.tail=drop", f"{SECTION}.log_prob_min_clamp=5"],
            InstantiationException,
            "logprob_min must be negative",
        ),
        ([f"{SECTION}.loss_mode=gopd_topk", f"{SECTION}.use_task_rewards=true"], InstantiationException, "overwrite"),
        (
            [f"{SECTION}.loss_mode=gopd_topk", f"{SECTION}.use_policy_gradient=true"],
            InstantiationException,
            "a detached divergence is no advantage",
        ),
        (
            [f"{SECTION}.loss_mode=gopd_topk", "actor_rollout_ref.model.use_fused_kernels=true"],
            ValueError,
            "'gopd_topk' needs logits",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_before_training(overrides, error, message):
    with pytest.raises(error, match=message):
        validated(*GOPD, *overrides)


def test_the_recipe_of_the_docs_passes_verls_check():
    text = (Path(__file__).parents[2] / "docs/integrations/verl.md").read_text()
    command = text.split("verl.trainer.main_ppo", 1)[1].split("```", 1)[0]
    overrides = command.replace("\\\n", " ").replace("...", "x").split()
    with initialize_config_dir(CONFIGS, version_base=None):
        config = compose("ppo_trainer", overrides)
    verl_config.validate_config(config, use_reference_policy=True, use_critic=False)
    assert omega_conf_to_dataclass(config.distillation).distillation_loss.reward_scale == 1.25


def test_configurations_without_the_plugin_are_left_alone():
    validated("distillation.enabled=false")
    validated(f"{SECTION}.loss_mode=k3", "actor_rollout_ref.rollout.temperature=0.7")


# --------------------------------------------------------------------------------------------------------- micro-batch


@dataclass
class Micro:
    """A micro-batch as the engine hands it to the loss: packed model outputs, and a TensorDict."""

    data: Any
    logits: Tensor  # (nnz, V), the leaf
    output: dict[str, Tensor]
    response_ids: Tensor  # (B, R) padded
    mask: Tensor  # (B, R)
    columns: dict[str, Tensor]  # (B, R) padded

    def response(self, packed: Tensor) -> Tensor:
        """(B, R, ...) of packed rows, by verl's own slicing."""
        return no_padding_2_padding(packed, self.data)


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(layout: str = "jagged", ref: bool = True, topk: int = 1, seed: int = 0) -> Micro:
    """Three sequences of different length; one token inside a response is masked, as a tool's answer is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompts, responses = [2, 4, 3], [5, 2, 4]
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    ids = [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]
    packed = torch.cat(ids)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    logits = normal(sum(lengths), VOCAB).requires_grad_()
    logprobs = logits.log_softmax(-1).gather(1, packed.roll(-1)[:, None])[:, 0]
    teacher = normal(sum(lengths), VOCAB).log_softmax(-1)
    if topk > 1:
        teacher, teacher_ids = teacher.topk(topk)
    else:
        teacher, teacher_ids = teacher.gather(1, packed.roll(-1)[:, None]), packed.roll(-1)[:, None]
    mask = [torch.ones(r, dtype=torch.int64) for r in responses]
    mask[0][1] = 0
    columns = {"old_log_probs": [-normal(r).abs() - 2 for r in responses]}
    if ref:
        columns["ref_log_prob"] = [-normal(r).abs() - 2 for r in responses]
    nested = {
        "prompts": jagged([x[:p] for x, p in zip(ids, prompts, strict=True)]),
        "responses": jagged([x[p:] for x, p in zip(ids, prompts, strict=True)]),
        "response_mask": jagged(mask),
        **{name: jagged(rows) for name, rows in columns.items()},
    }
    padded = {name: x.to_padded_tensor(0) for name, x in nested.items()}
    tensors = dict(nested)
    if layout == "padded":  # left-padded prompts, right-padded responses, as the older trainer has them
        real = torch.zeros(3, 9, dtype=torch.int64)
        for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            real[row, 4 - p : 4 + r] = 1
        tensors = {**padded, "prompts": torch.zeros(3, 4, dtype=torch.int64), "attention_mask": real}
    tensors["input_ids"] = torch.nested.nested_tensor_from_jagged(packed, offsets)
    tensors["teacher_logprobs"] = torch.nested.nested_tensor_from_jagged(teacher, offsets)
    tensors["teacher_ids"] = torch.nested.nested_tensor_from_jagged(teacher_ids.to(torch.int32), offsets)
    tensors["advantages"] = torch.zeros_like(tensors["old_log_probs"])
    numbers = {"dp_size": 1, "batch_num_tokens": int(padded["response_mask"].sum()), "global_batch_size": 3}
    data = tu.get_tensordict(tensors, {**numbers, "temperature": 1.0})
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(logprobs, offsets)}
    return Micro(data, logits, output, padded["responses"], padded["response_mask"].bool(), padded)


def actor_config(**fields: Any) -> Any:
    return FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **fields)


def distillation_config(*overrides: str) -> Any:
    return omega_conf_to_dataclass(config_of(*GOPD, *overrides).distillation)


def run_loss(micro: Micro, *overrides: str, **actor: Any) -> tuple[Tensor, dict[str, Any]]:
    """verl's own loss function of the actor, with the loss that the configuration names."""
    return verl_losses.distillation_ppo_loss(
        actor_config(**actor), distillation_config(*overrides), micro.output, micro.data
    )


def dense_loss(micro: Micro, scale: float, **options: Any) -> Tensor:
    """The dense formula, token-mean, over the micro-batch's response."""
    ref = micro.columns.get("ref_log_prob")
    return fg.reference.gopd_loss(
        fg.Logits(micro.response(micro.logits)),
        fg.TokenLogProbs(micro.response(micro.data["teacher_logprobs"])[..., 0]),
        None if ref is None else fg.TokenLogProbs(ref),
        micro.response_ids,
        mask=micro.mask,
        reward_scale=scale,
        old_logprobs=micro.columns["old_log_probs"],
        **options,
    ).loss


def assert_same_loss_and_gradient(micro: Micro, loss: Tensor, want: Tensor) -> None:
    assert_close(loss.detach(), want.detach(), 1e-12, "loss")
    (got,) = torch.autograd.grad(loss, micro.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(want, micro.logits)
    assert_close(got, expected, 1e-12, "gradient")


PPO = {"clip": (0.2, 0.2), "clip_dual": 3.0}  # verl's defaults


@pytest.mark.parametrize("layout", ["jagged", "padded"])
@pytest.mark.parametrize("policy_gradient", [False, True])
def test_gradients_are_those_of_the_dense_formula(layout, policy_gradient):
    micro = micro_batch(layout)
    loss, _ = run_loss(micro, f"+{SECTION}.reward_scale=1.25", f"{SECTION}.use_policy_gradient={policy_gradient}")
    assert_same_loss_and_gradient(micro, loss, dense_loss(micro, 1.25, **PPO))


def test_options_of_the_configuration_reach_the_loss():
    micro = micro_batch()
    options = (
        f"+{SECTION}.reward_scale=0.5",
        f"+{SECTION}.ratio=sequence",
        f"+{SECTION}.advantage_clip=1.5",
        f"+{SECTION}.clip_dual=null",
        f"{SECTION}.clip_ratio_low=null",
        f"{SECTION}.log_prob_min_clamp=-2.5",
    )
    loss, _ = run_loss(micro, *options)
    want = dense_loss(micro, 0.5, ratio="sequence", advantage_clip=1.5, logprob_min=-2.5)
    assert_same_loss_and_gradient(micro, loss, want)


def test_lambda_one_needs_no_reference():
    micro = micro_batch(ref=False)
    loss, metrics = run_loss(micro)
    assert_same_loss_and_gradient(micro, loss, dense_loss(micro, 1.0, **PPO))
    assert "distillation/reward" not in metrics


def test_a_reference_that_is_not_there_is_named_with_the_setting_that_brings_it():
    with pytest.raises(ValueError, match=r"reward_scale=1.25 needs .* actor_rollout_ref.actor.use_kl_loss=true"):
        run_loss(micro_batch(ref=False), f"+{SECTION}.reward_scale=1.25")


def test_a_student_at_another_temperature_than_the_teacher_is_refused():
    micro = micro_batch()
    tu.assign_non_tensor(micro.data, temperature=0.7)
    with pytest.raises(ValueError, match=r"temperature must be 1 for distillation, got 0.7"):
        run_loss(micro)


def test_rollout_weights_of_verl_multiply_the_token_losses():
    micro = micro_batch()
    plain, _ = run_loss(micro)
    micro.data["rollout_is_weights"] = jagged([torch.full((r,), 2.0, dtype=torch.float64) for r in (5, 2, 4)])
    weighted, _ = run_loss(micro)
    assert_close(weighted.detach(), 2 * plain.detach(), 1e-12)


def test_what_masked_tokens_hold_does_not_matter():
    micro = micro_batch("padded")
    loss, _ = run_loss(micro, f"+{SECTION}.reward_scale=1.25")
    for name in ("old_log_probs", "ref_log_prob"):
        micro.data[name] = micro.data[name].masked_fill(~micro.mask, torch.nan)
    again, _ = run_loss(micro, f"+{SECTION}.reward_scale=1.25")
    assert torch.equal(loss, again)


def test_metrics_are_those_of_the_package():
    micro = micro_batch()
    _, metrics = run_loss(micro, f"+{SECTION}.reward_scale=1.25")
    teacher = micro.response(micro.data["teacher_logprobs"])[..., 0]
    reward = (teacher - micro.columns["ref_log_prob"])[micro.mask].mean()
    assert_close(torch.tensor(metrics["distillation/reward"].aggregate()), reward, 1e-12)


# --------------------------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize("layout", ["jagged", "padded"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_topk_gradients_are_those_of_the_dense_formula(layout, divergence):
    micro = micro_batch(layout, topk=5)
    config = distillation_config(f"{SECTION}.loss_mode=gopd_topk", f"+{SECTION}.divergence={divergence}")
    beside_logits = verl_losses.distillation_ppo_loss(
        actor_config(), config, data=micro.data, student_logits=micro.logits[None]
    )
    offsets = micro.data["input_ids"].offsets()
    output = {k: torch.nested.nested_tensor_from_jagged(v[0], offsets) for k, v in beside_logits.items()}
    loss, metrics = verl_losses.distillation_ppo_loss(actor_config(), config, output, micro.data)
    teacher = fg.TopKLogProbs(micro.response(micro.data["teacher_ids"]), micro.response(micro.data["teacher_logprobs"]))
    student = fg.Logits(micro.response(micro.logits))
    want = fg.reference.gopd_loss(student, teacher, estimator="topk", divergence=divergence, mask=micro.mask)
    assert_same_loss_and_gradient(micro, loss, want.loss)
    kl = torch.tensor(metrics["distillation/kl_target"].aggregate())  # whatever the divergence that is trained
    assert_close(kl, want.kl[micro.mask].mean(), 1e-12)


def verls_own_topk(micro: Micro, *overrides: str) -> dict[str, Tensor]:
    own = [f"{SECTION}.loss_mode=forward_kl_topk", *overrides]
    config = omega_conf_to_dataclass(config_of(*own).distillation)
    return verl_losses.compute_topk_loss(actor_config(), config, micro.data, micro.logits[None], "thd")


def test_verls_own_topk_loss_is_still_there():
    assert "overlap_count" in verls_own_topk(micro_batch(topk=5))


@pytest.mark.parametrize("clamp", ["null", -10, -3.5, -2.5])
def test_the_forward_kl_of_drop_is_verls_own_with_its_clamp(clamp):
    """Value and gradient, where the sum over the tokens is not negative or the gradient does not ask."""
    micro, bound = micro_batch(topk=5), f"{SECTION}.log_prob_min_clamp={clamp}"
    config = distillation_config(
        f"{SECTION}.loss_mode=gopd_topk", f"+{SECTION}.divergence=forward_kl", f"+{SECTION}.tail=drop", bound
    )
    got = verl_losses.compute_topk_loss(actor_config(), config, micro.data, micro.logits[None], "thd")
    want = verls_own_topk(micro, bound)["distillation_losses"]
    live = plugin._response_rows(micro.data)[None]
    losses = [torch.where(live, x, 0) for x in (got["distillation_losses"], want)]
    assert_close(losses[0], losses[1].to(losses[0].dtype), 1e-6)
    mine, theirs = (torch.autograd.grad(x.sum(), micro.logits)[0] for x in losses)
    assert_close(mine, theirs.to(mine.dtype), 1e-6)


# --------------------------------------------------------------------------------------------------------- policy loss


def test_the_policy_loss_is_verls_own_where_no_ratio_is_extreme():
    generator = torch.Generator().manual_seed(0)
    old, advantages = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    new = (old + 0.5 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    results = []
    for name in ("gopd", "vanilla"):
        loss, metrics = get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=new,
            advantages=advantages,
            response_mask=mask,
            config=actor_config(),
            rollout_is_weights=torch.full_like(old, 0.5),
        )
        results.append((loss, torch.autograd.grad(loss, new)[0], metrics["actor/ppo_kl"]))
    (loss, gradient, kl), (want, want_gradient, want_kl) = results
    assert_close(loss.detach(), want.detach(), 1e-12)
    assert_close(gradient, want_gradient, 1e-12)
    assert kl == pytest.approx(want_kl, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- fused head


def tiny(kind: str = "qwen3", **fields: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, **sizes, **more, tie_word_embeddings=False, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.fixture
def forwards() -> Iterator[None]:
    """verl patches the class of a model: put back what was there."""
    from transformers import Gemma2ForCausalLM, Qwen3ForCausalLM

    kept = {cls: cls.forward for cls in (Qwen3ForCausalLM, Gemma2ForCausalLM)}
    yield
    for cls, forward in kept.items():
        cls.forward = forward


def fused_outputs(model: Any, backend: str, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from verl.models.transformers import monkey_patch

    monkey_patch.apply_monkey_patch(
        model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
    )
    out = model(input_ids=ids, temperature=0.8, return_dict=True, use_cache=False)
    (out.log_probs.sum() + out.entropy.square().sum()).backward()
    gradient, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    return out.log_probs.detach(), out.entropy.detach(), gradient


def test_the_fused_head_gives_what_verls_own_gives(forwards):
    torch.manual_seed(0)
    model, ids = tiny(), torch.randint(64, (2, 7))
    got, want = fused_outputs(model, "gopd", ids), fused_outputs(model, "torch", ids)
    for what, a, b in zip(("log-probs", "entropy", "gradient"), got, want, strict=True):
        assert_close(a, b, 1e-5, what)


def test_the_fused_head_keeps_what_a_family_does_to_its_logits(forwards):
    torch.manual_seed(0)
    model, ids = tiny("gemma2", final_logit_softcapping=2.0), torch.randint(64, (2, 7))
    logits = model(input_ids=ids, use_cache=False).logits / 0.8
    want = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    assert_close(fused_outputs(model, "gopd", ids)[0], want.detach(), 1e-5)


# -------------------------------------------------------------------------------------------------------- actor worker


def save_student(path: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    tiny().save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(path)


def actor_worker(path: str, *overrides: str) -> Any:
    from verl.workers.engine_workers import ActorRolloutRefWorker

    config = validated(
        *GOPD,
        *REFERENCE,
        f"actor_rollout_ref.model.path={path}",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        *overrides,
        "actor_rollout_ref.actor.use_torch_compile=false",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    )
    worker = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor", distillation_config=config.distillation)
    worker.init_model()
    return worker


RESPONSE = slice(2, 7)  # the positions that predict the response of rollout()


def rollout() -> DataProto:
    """Four sequences as the trainer has them after sampling: left-padded prompts, right-padded responses."""
    torch.manual_seed(1)
    prompt, response = 3, 5
    ids = torch.randint(2, 64, (4, prompt + response))
    real = torch.ones_like(ids)
    real[1, 0] = real[2, prompt + 3 :] = 0
    tensors = {
        "input_ids": ids,
        "attention_mask": real,
        "position_ids": (real.cumsum(1) - 1).clamp_min(0),
        "prompts": ids[:, :prompt],
        "responses": ids[:, prompt:],
        "response_mask": real[:, prompt:],
    }
    return DataProto.from_dict(tensors=tensors)


def logits_of(model: Any, batch: DataProto) -> Tensor:
    return model(**{k: batch.batch[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits


def scored(model: Any, batch: DataProto) -> Tensor:
    """(B, T) of a plain model, at [t] the log-prob of token t + 1: where verl has them; 0 at the end."""
    following = batch.batch["input_ids"][:, 1:, None]
    logprobs = logits_of(model, batch)[:, :-1].log_softmax(-1).gather(-1, following)[..., 0]
    return torch.nn.functional.pad(logprobs, (0, 1))


@dataclass
class Teachers:
    """What verl's teacher servers and its reference worker send of a rollout."""

    sampled: Tensor  # (B, T)
    topk: Tensor  # (B, T, 5)
    topk_ids: Tensor
    ref: Tensor  # (B, T)

    def part(self, rank: int) -> Teachers:
        return Teachers(*(x.chunk(2)[rank] for x in (self.sampled, self.topk, self.topk_ids, self.ref)))


def teachers_of(batch: DataProto) -> Teachers:
    torch.manual_seed(2)
    teacher, ref = (tiny().requires_grad_(False) for _ in range(2))
    topk = logits_of(teacher, batch).log_softmax(-1).topk(5)
    return Teachers(scored(teacher, batch), topk.values, topk.indices, scored(ref, batch))


def dense_step(path: str, batch: DataProto, teachers: Teachers, topk: bool) -> tuple[float, float]:
    """Loss and norm of the gradient of the whole batch in one process."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    logits, mask = fg.Logits(logits_of(student, batch)[:, RESPONSE]), batch.batch["response_mask"]
    if topk:
        teacher = fg.TopKLogProbs(teachers.topk_ids[:, RESPONSE], teachers.topk[:, RESPONSE])
        loss = fg.reference.gopd_loss(logits, teacher, estimator="topk", mask=mask).loss
    else:
        teacher, ref = (fg.TokenLogProbs(x[:, RESPONSE]) for x in (teachers.sampled, teachers.ref))
        ids = batch.batch["responses"]
        loss = fg.reference.gopd_loss(logits, teacher, ref, ids, mask=mask, reward_scale=1.25).loss
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in student.parameters()]).item()


def verl_step(worker: Any, batch: DataProto, teachers: Teachers, topk: bool) -> tuple[float, float]:
    """Loss and norm of the gradient of a rank's part of the batch, as verl's trainer asks for them."""
    to_score = left_right_2_no_padding(batch.to_tensordict())
    tu.assign_non_tensor(to_score, calculate_entropy=False, compute_loss=False, temperature=1.0)
    old = no_padding_2_padding(tu.get(worker.compute_log_prob(to_score), "log_probs"), to_score).float()
    sampled_ids = torch.zeros_like(teachers.topk_ids[..., :1])
    tensors = {"old_log_probs": old, "ref_log_prob": teachers.ref[:, RESPONSE], "advantages": torch.zeros_like(old)}
    tensors["teacher_logprobs"] = teachers.topk if topk else teachers.sampled[..., None]
    tensors["teacher_ids"] = (teachers.topk_ids if topk else sampled_ids).to(torch.int32)
    train = DataProto.from_dict(tensors={**batch.batch, **tensors}, meta_info={"temperature": 1.0})
    to_train = left_right_2_no_padding(train.to_tensordict())
    sizes = {"global_batch_size": 4, "mini_batch_size": 4, "epochs": 1, "seed": 1, "compute_loss": True}
    flags = {"calculate_entropy": False, "distillation_use_topk": topk, "distillation_only": topk}
    tu.assign_non_tensor(to_train, dataloader_kwargs={"shuffle": False}, **sizes, **flags)
    metrics = tu.get(worker.update_actor(to_train), "metrics")
    return metrics["loss"][0], metrics["grad_norm"][0]


WORKERS = {
    "gopd": (f"+{SECTION}.reward_scale=1.25",),
    "gopd, fused head": (f"+{SECTION}.reward_scale=1.25", *FUSED),
    "gopd_topk": (f"{SECTION}.loss_mode=gopd_topk",),
}


def steps(path: str) -> dict[str, list[tuple[float, float]]]:
    """On a rank: loss and norm of the gradient of verl's actor worker with each loss, and of the dense formula."""
    rank, batch, forward = torch.distributed.get_rank(), rollout(), type(tiny()).forward
    teachers, results = teachers_of(batch), {}
    for name, overrides in WORKERS.items():
        topk = name == "gopd_topk"
        dense = dense_step(path, batch, teachers, topk)
        got = verl_step(actor_worker(path, *overrides), batch.chunk(2)[rank], teachers.part(rank), topk)
        results[name] = [got, dense]
        type(tiny()).forward = forward  # verl patches the class for the fused head
    return results


@pytest.fixture(scope="module")
def steps_of_two_ranks(tmp_path_factory) -> list[dict[str, list[tuple[float, float]]]]:
    path = str(tmp_path_factory.mktemp("student"))
    save_student(path)
    return run_on_ranks("test_verl:steps", 2, path)


@pytest.mark.parametrize("name", list(WORKERS))
@pytest.mark.ranks
def test_a_step_of_verls_actor_worker_on_two_ranks_has_the_dense_gradient(steps_of_two_ranks, name):
    for rank in steps_of_two_ranks:
        got, dense = rank[name]
        assert got == pytest.approx(dense, rel=1e-4)
