"""Adapters as teachers, on the student's own base: as the separate models that they stand for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("trl", minversion="1.16")

from fused_gopd.integrations.adapters import with_adapter  # noqa: E402
from fused_gopd.integrations.trl.batch import Batch  # noqa: E402
from fused_gopd.integrations.trl.frozen import Given  # noqa: E402
from test_trl import SGD, VOCAB, assert_same, grpo, model, prompts, trainer, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ROUTES = ["math", "code"] * 4


def adapted(seed: int, base: nn.Module | None = None, **options: Any) -> Any:
    """A PEFT model with an adapter that has learned something."""
    base = model(0) if base is None else base
    torch.manual_seed(seed)  # after the base, which has a seed of its own
    made = peft.get_peft_model(base, peft.LoraConfig(**{**LORA, **options}))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return made


def saved(folder: Path, seed: int, **options: Any) -> str:
    """The name of a teacher, an adapter in a folder."""
    adapted(seed, **options).save_pretrained(folder)
    return f"adapter:{folder}"


def merged(seed: int, **options: Any) -> nn.Module:
    """The separate model that the adapter of this seed stands for."""
    return adapted(seed, **options).merge_and_unload()


def student() -> Any:
    return adapted(7, r=2, target_modules=["v_proj"])


def batch() -> Batch:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (4, 9), generator=g)
    ones = torch.ones_like(ids)
    mask = ones[:, :5].clone()
    mask[1, 3:] = 0
    return Batch(
        input_ids=ids,
        attention_mask=ones,
        token_ids=ids[:, 4:],
        completion_mask=mask,
        mask=mask,
        multimodal={},
        teacher_index=torch.tensor([0, 1, 1, 0]),
        old_logprobs=None,
    )


def loss_and_gradients(run: Any) -> tuple[Tensor, dict[str, Tensor]]:
    found = run.accelerator.unwrap_model(run.model)
    found.train()
    loss = run._loss(found, batch(), normalizer=torch.tensor(18.0)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in found.named_parameters() if p.grad is not None}
    found.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_loss_and_gradients_are_those_of_separate_models(tmp_path: Path, estimator: str, checkpointing: bool) -> None:
    options = {"estimator": estimator, "reward_scale": 1.25, "route_column": "route"}
    options["gradient_checkpointing"] = checkpointing
    data = prompts(route=ROUTES)
    teachers = {"math": saved(tmp_path / "math", 1), "code": saved(tmp_path / "code", 2, modules_to_save=["lm_head"])}
    run = trainer(tmp_path, student=student(), data=data, teacher=teachers, ref_model="base", **options)
    alone = {"math": merged(1), "code": merged(2, modules_to_save=["lm_head"])}
    other = trainer(tmp_path, student=student(), data=data, teacher=alone, ref_model=model(0), **options)
    if checkpointing:
        for x in (run, other):
            x.model.gradient_checkpointing_enable()
    (loss, gradients), (want, expected) = map(loss_and_gradients, (run, other))
    assert abs(loss - want) <= 1e-5 * abs(want)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 4
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name


def test_a_teacher_takes_the_memory_of_its_adapter(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        student=student(),
        data=prompts(route=ROUTES),
        teacher={"math": saved(tmp_path / "math", 1), "code": saved(tmp_path / "code", 2)},
        ref_model="base",
        reward_scale=1.25,
        route_column="route",
    )
    own = {x.untyped_storage().data_ptr() for x in run.model.parameters()}
    for teacher in (frozen.model for frozen in run._teachers):
        more = [name for name, x in teacher.named_parameters() if x.untyped_storage().data_ptr() not in own]
        assert len(more) == 8
        assert all("lora_" in name for name in more)
        assert not any(x.requires_grad for x in teacher.parameters())


def _run(folder: Path, teacher: Any, ref_model: Any, **options: Any) -> Any:
    return trainer(
        folder, student=student(), teacher=teacher, ref_model=ref_model, reward_scale=1.25, save_strategy="steps",
        save_steps=1, max_steps=3, **SGD, **options,
    )  # fmt: skip


def test_the_student_is_trained_saved_and_resumed_as_with_separate_models(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", 1)
    folders = {name: tmp_path / name for name in ("adapters", "separate")}
    plain, runs = student(), []
    for name, given in {"adapters": teacher, "separate": merged(1)}.items():
        run = _run(folders[name], given, "base")
        runs.append(run)
        parameters = dict(run.model.named_parameters())
        trained = [n for n, p in parameters.items() if p.requires_grad]
        assert trained == [n for n, p in plain.named_parameters() if p.requires_grad]
        run.train()
        assert not [m for m in run.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        in_optimizer = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert in_optimizer == {id(parameters[n]) for n in trained}
        assert run.model.peft_config.keys() == {"default"}
        assert run.model.state_dict().keys() == plain.state_dict().keys()
    ours, theirs = (weights(run.model) for run in runs)
    assert_same(ours, theirs, 1e-5)
    base = {n: p for n, p in ours.items() if "lora_" not in n}
    assert_same(base, {n: p for n, p in weights(plain).items() if n in base})
    for step in (1, 2, 3):
        files = [sorted(x.name for x in (f / f"checkpoint-{step}").rglob("*")) for f in folders.values()]
        assert files[0] == files[1]
        assert "adapter_model.safetensors" in files[0]
    again = _run(folders["adapters"], teacher, "base")
    again.train(resume_from_checkpoint=str(folders["adapters"] / "checkpoint-1"))
    assert_same(weights(again.model), ours)


def test_grpo_takes_adapters_and_the_reference_may_be_one(tmp_path: Path) -> None:
    names = {"teacher": saved(tmp_path / "teacher", 1), "ref_model": saved(tmp_path / "ref", 2)}
    found = []
    for models in (names, {"teacher": merged(1), "ref_model": merged(2)}):
        torch.manual_seed(7)
        run = grpo(
            tmp_path,
            peft_config=peft.LoraConfig(**LORA),
            reward_scale=1.25,
            outcome_weight=0.0,
            **SGD,
            **models,
        )
        run.train()
        found.append(weights(run.model))
    assert_same(*found, 1e-5)


def test_random_numbers_are_those_of_a_run_without(tmp_path: Path) -> None:
    name = saved(tmp_path / "teacher", 1).removeprefix("adapter:")
    made = student()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with_adapter("teacher", made, name)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2, 3]}, {"target_modules": "all-linear"}],
)
@torch.no_grad()
def test_what_the_student_adapts_is_not_in_the_teacher(options: dict[str, Any], tmp_path: Path) -> None:
    name = saved(tmp_path / "teacher", 1).removeprefix("adapter:")
    ids = torch.randint(3, VOCAB, (2, 7))
    made = adapted(7, **options)
    before = made.eval()(ids).logits
    assert torch.equal(with_adapter("teacher", made, name)(ids).logits, adapted(1).eval()(ids).logits)
    assert torch.equal(made(ids).logits, before)


def _edited(**changes: Any):
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def _without_weights(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(file)
    tensors.pop(sorted(tensors)[0])
    safetensors.save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "made", "kind", "message"),
    [
        (lambda _: None, lambda: model(0), TypeError, "the student, Qwen3ForCausalLM, has no PEFT adapter"),
        (lambda _: None, lambda: adapted(7, bias="all"), ValueError, r"the student trains .*\.bias of that base"),
        (_edited(bias="all"), student, ValueError, "has bias='all': it changes biases of the base"),
        (_edited(init_lora_weights="pissa"), student, ValueError, "has init_lora_weights='pissa': it changes weights"),
        (_edited(target_modules=["c_attn"]), student, ValueError, "does not fit the student's base.*c_attn"),
        (_edited(r=3), student, ValueError, r"does not fit the student's base(.|\n)*size mismatch"),
        (_edited(target_modules=["q_proj"]), student, ValueError, "has for no layer of the student's base 4 of"),
        (_without_weights, student, ValueError, "lacks 1 of its weights, such as .*lora_A"),
        (
            lambda x: (x / "adapter_config.json").unlink(),
            student,
            ValueError,
            "must be adapter: and a PEFT adapter, and",
        ),
        (lambda x: (x / "adapter_model.safetensors").write_bytes(b"1"), student, ValueError, "cannot be read"),
    ],
)
def test_what_would_not_be_that_teacher_is_an_error(change, made, kind, message, tmp_path: Path) -> None:
    name = saved(tmp_path / "teacher", 1)
    change(tmp_path / "teacher")
    given = made()
    if "bias of" in message:
        for module in list(given.modules()):  # Qwen3 has no biases
            if isinstance(module, nn.Linear) and "lora" not in str(type(module)):
                module.register_parameter("bias", nn.Parameter(torch.zeros(module.out_features)))
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(kind, match=message):
        with_adapter("teacher", given, name.removeprefix("adapter:"))
    assert_same(given.state_dict(), before)


def test_a_forward_that_would_run_the_student_is_an_error(tmp_path: Path) -> None:
    name = saved(tmp_path / "teacher", 1).removeprefix("adapter:")
    made = student()
    base = made.get_base_model()
    own = base.forward
    base.forward = lambda **inputs: own(**inputs)
    with pytest.raises(TypeError, match="forward was replaced by one of test_adapters, which runs the student"):
        with_adapter("teacher", made, name)


def test_an_adapter_of_another_base_is_an_error(tmp_path: Path) -> None:
    name = saved(tmp_path / "teacher", 1).removeprefix("adapter:")
    _edited(base_model_name_or_path="someone/other-7b")(tmp_path / "teacher")
    with_adapter("teacher", student(), name)  # whose base has no name
    named = model(0)
    named.config._name_or_path = "/models/base-7b"
    with pytest.raises(
        ValueError, match="is an adapter of someone/other-7b, and the student's base is /models/base-7b"
    ):
        with_adapter("teacher", adapted(7, named), name)
    _edited(base_model_name_or_path="someone/base-7b")(tmp_path / "teacher")
    with_adapter("teacher", adapted(7, named), name)


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_a_base_that_is_sharded_is_an_error(name: str, tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher", 1)
    run = trainer(tmp_path, student=student(), teacher=teacher)
    setattr(run, name, True)
    with pytest.raises(ValueError, match=r"teacher is an adapter on the student's base, whose parameters .* gathers"):
        run._set_up_models(Given(teacher=teacher))


def test_names_are_checked_before_the_student_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher must be a model: there is no folder"):
        trainer(tmp_path, student=student(), teacher=f"adapter:{tmp_path / 'none'}")
    model(0).save_pretrained(tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"teacher must be adapter: and a PEFT adapter, .* has no adapter_config\.json"
    ):
        trainer(tmp_path, student=student(), teacher=f"adapter:{tmp_path / 'whole'}")
