"""The student as teacher and reference: as the copies that it stands for, how they follow it, and after a resume."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

peft = pytest.importorskip("peft")
pytest.importorskip("trl", minversion="1.16")

from fused_gopd.integrations.adapters import frozen_copy  # noqa: E402
from fused_gopd.integrations.trl.student import FILE, StudentCopy  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from test_trl import SGD, assert_same, difference, grpo, model, prompts, trainer, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(seed: int = 7, **options: Any) -> Any:
    """A student with an adapter that is not zero."""
    base = model(0)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(**{**LORA, **options}, init_lora_weights=False))


def student(lora: bool) -> Any:
    return adapted() if lora else model(0)


def copied(of: nn.Module) -> nn.Module:
    return copy.deepcopy(of).requires_grad_(False).eval()


def run(folder: Path, lora: bool, **arguments: Any) -> Any:
    """A finished run with another lambda than 1, at which a teacher that is the student has a gradient."""
    arguments = {"ref_model": model(2), "reward_scale": 1.5, **SGD, **arguments}
    made = trainer(folder, student=arguments.pop("student", student(lora)), **arguments)
    made.train()
    return made


class Recorded(TrainerCallback):
    """The student's weights and those of the teacher after each step; begins before the first one."""

    def __init__(self) -> None:
        self.students: list[dict[str, Tensor]] = []
        self.teachers: list[dict[str, Tensor]] = []
        self.run: Any = None

    def _record(self) -> None:
        self.students.append({n: x.detach().clone() for n, x in self.run.model.named_parameters() if x.requires_grad})
        teacher = dict(self.run._teachers[0].model.named_parameters())
        self.teachers.append({n: teacher[n].detach().clone() for n in self.students[-1]})

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._record()

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step:
            self._record()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._record()


def recorded(folder: Path, lora: bool, **arguments: Any) -> Recorded:
    record = Recorded()
    arguments = {"ref_model": model(2), "reward_scale": 1.5, "learning_rate": 1e-2, "max_steps": 4, **arguments}
    own = arguments.pop("student", None)
    record.run = trainer(
        folder, student=student(lora) if own is None else own, teacher="student", callbacks=[record], **arguments
    )
    record.run.train()
    assert difference(record.students[0], record.students[4]) > 1e-3
    return record


# ------------------------------------------------------------------------------------------------------ same numbers


@pytest.mark.parametrize(("lora", "estimator"), [(False, "full"), (True, "sampled")])
def test_the_student_before_training_is_the_teacher_that_a_copy_is(tmp_path: Path, lora: bool, estimator: str) -> None:
    own = run(tmp_path, lora, teacher="student", estimator=estimator)
    whole = run(tmp_path, lora, teacher=copied(student(lora)), estimator=estimator)
    assert_same(weights(own), weights(whole))
    assert difference(weights(own), student(lora).state_dict()) > 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_the_student_before_training_is_the_reference_that_a_copy_is(tmp_path: Path, lora: bool) -> None:
    """Also where the student recomputes activations, for which PEFT and transformers put hooks on its modules."""
    options = {"gradient_checkpointing": True}
    own = run(tmp_path, lora, ref_model="student", **options)
    assert_same(weights(own), weights(run(tmp_path, lora, ref_model=copied(student(lora)), **options)))
    live = run(tmp_path, lora, teacher="student", teacher_sync_steps=1, **options)
    assert_same(weights(live), weights(run(tmp_path, lora, teacher="student", teacher_sync_steps=1)))


def test_the_base_may_be_the_teacher(tmp_path: Path) -> None:
    own = run(tmp_path, True, teacher="base", reward_scale=1.0, ref_model=None)
    assert_same(weights(own), weights(run(tmp_path, True, teacher=model(0), reward_scale=1.0, ref_model=None)))
    assert difference(weights(own), adapted().state_dict()) > 1e-4


def test_teacher_and_reference_share_one_copy_and_routes_one_teacher(tmp_path: Path) -> None:
    teachers = {"a": "student", "b": model(1), "c": "student"}
    data = prompts(domain=["a", "b", "c", "a"] * 2)
    made = trainer(
        tmp_path, teacher=teachers, ref_model="student", reward_scale=2.0, route_column="domain", data=data, **SGD
    )
    a, _, c = (teacher.model for teacher in made._teachers)
    assert a is c is made._reference.model
    made.train()
    again = trainer(
        tmp_path,
        teacher={"a": copied(model(0)), "b": model(1), "c": copied(model(0))},
        ref_model=copied(model(0)),
        reward_scale=2.0,
        route_column="domain",
        data=data,
        **SGD,
    )
    again.train()
    assert_same(weights(made), weights(again))


@pytest.mark.parametrize("lora", [False, True])
def test_a_copy_follows_every_few_steps(tmp_path: Path, lora: bool) -> None:
    record = recorded(tmp_path, lora, teacher_sync_steps=2)
    for step, of in enumerate([0, 0, 2, 2, 4]):
        assert_same(record.teachers[step], record.students[of])


@pytest.mark.parametrize(("lora", "every"), [(False, 2), (True, None)])
def test_an_average_is_that_of_the_students(tmp_path: Path, lora: bool, every: int | None) -> None:
    record = recorded(tmp_path, lora, teacher_ema=0.7, teacher_sync_steps=every)
    average = {name: x.double() for name, x in record.students[0].items()}
    for step, now in enumerate(record.students[1:], 1):
        if step % (every or 1) == 0:
            average = {name: 0.7 * x + 0.3 * now[name].double() for name, x in average.items()}
        # two roundings of a float32 of size 1 a step
        assert_same({n: x.double() for n, x in record.teachers[step].items()}, average, step * 2**-23)


def test_an_average_of_bfloat16_weights_is_kept_in_float32(tmp_path: Path) -> None:
    """With a decay of 0.999 no step would change a bfloat16, which has 8 bits."""
    record = recorded(tmp_path, False, student=model(0).to(torch.bfloat16), teacher_ema=0.999)
    (kept,) = record.run._copies.values()
    average = {name: x.double() for name, x in record.students[0].items()}
    for now in record.students[1:]:
        average = {name: 0.999 * x + 0.001 * now[name].double() for name, x in average.items()}
    assert {x.dtype for x in kept.state().values()} == {torch.float32}
    assert_same({n: kept.state()[n].double() for n in average}, average, 4 * 2**-23)
    assert difference(average, {n: x.double() for n, x in record.students[0].items()}) > 1e-6
    assert_same(record.teachers[4], {n: kept.state()[n].bfloat16() for n in average})


class Followed(TrainerCallback):
    """Has a model be the student after each step."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.teacher.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("lora", "options"), [(True, {}), (False, {"estimator": "sampled", "num_iterations": 2, "clip": [0.2, 0.2]})]
)
def test_a_live_teacher_is_a_copy_that_follows_each_step(tmp_path: Path, lora: bool, options: dict[str, Any]) -> None:
    options = {"max_steps": 4, **options}
    live = run(tmp_path, lora, teacher="student", teacher_sync_steps=1, **options)
    assert not live._copies
    following = copied(student(lora))
    assert_same(
        weights(live), weights(run(tmp_path, lora, teacher=following, callbacks=[Followed(following)], **options))
    )
    assert difference(weights(live), weights(run(tmp_path, lora, teacher="student", **options))) > 1e-5


def test_a_live_teacher_has_no_dropout_and_the_student_its_own(tmp_path: Path) -> None:
    """The first run's student has dropout, and its teacher none, as a copy."""
    runs = [
        run(tmp_path, True, student=adapted(lora_dropout=dropout), teacher="student", teacher_sync_steps=1)
        for dropout in (0.5, 0.0)
    ]
    following = copied(adapted(lora_dropout=0.5))
    other = run(tmp_path, True, student=adapted(lora_dropout=0.5), teacher=following, callbacks=[Followed(following)])
    assert_same(weights(runs[0]), weights(other))
    assert difference(weights(runs[0]), weights(runs[1])) > 1e-5


def test_grpo_has_the_student_for_a_teacher(tmp_path: Path) -> None:
    """At lambda 1 the frozen student is a penalty beside rewards; the average is one that gives way."""
    plain = {"ref_model": None, "reward_scale": 1.0, **SGD}
    own = grpo(tmp_path, teacher="student", teacher_ema=0.9, **plain)
    own.train()
    initial = grpo(tmp_path, teacher="student", **plain)
    initial.train()
    whole = grpo(tmp_path, teacher=copied(model(0)), **plain)
    whole.train()
    assert_same(weights(initial), weights(whole))
    assert difference(weights(own), weights(whole)) > 1e-6


def test_a_copy_has_a_head_of_its_own_where_trl_replaced_its_forward(tmp_path: Path) -> None:
    made = grpo(tmp_path, teacher="student", ref_model=None, reward_scale=1.0, cast_lm_head_to_fp32=True)
    (teacher,) = (frozen.model for frozen in made._teachers)
    assert "forward" in vars(teacher.lm_head)
    ids = torch.arange(5)[None]
    before = teacher(ids).logits
    with torch.no_grad():
        made.model.lm_head.weight.mul_(2)
    assert torch.equal(teacher(ids).logits, before)


# ------------------------------------------------------------------------------------------------------------- copies


def test_a_copy_shares_what_is_frozen() -> None:
    whole = adapted()
    made = frozen_copy(whole)
    theirs = dict(whole.named_parameters())
    for name, x in made.named_parameters():
        assert (x is theirs[name]) == ("lora" not in name), name
        assert not x.requires_grad
    assert not made.training
    assert {n for n, x in whole.named_parameters() if x.requires_grad} == {n for n in theirs if "lora" in n}
    assert not set(made.modules()) & set(whole.modules())


def test_a_copy_of_tied_weights_is_tied() -> None:
    tied = model(0)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    made: Any = frozen_copy(tied)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made.lm_head.weight is not tied.lm_head.weight


def test_buffers_follow_where_training_writes_to_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net.register_buffer("mask", torch.ones(3, dtype=torch.int64))
    made = StudentCopy(net, every=1)
    own = dict(made.model.named_buffers())
    assert own["mask"] is net.mask
    net(torch.randn(8, 3))
    assert not torch.equal(own["1.running_mean"], net[1].running_mean)
    made.follow(net, 1)
    assert torch.equal(own["1.running_mean"], net[1].running_mean)
    assert "1.running_var" in made.state()


# ------------------------------------------------------------------------------------------------------------- resume

KINDS: dict[str, dict[str, Any]] = {
    "student": {"teacher": "student"},
    "copy": {"teacher": "student", "teacher_sync_steps": 3},
    "average": {"teacher": "student", "teacher_ema": 0.6},
    "lagging average": {"teacher": "student", "teacher_ema": 0.6, "teacher_sync_steps": 3},
    "live": {"teacher": "student", "teacher_sync_steps": 1},
    "reference": {"teacher": "student", "teacher_ema": 0.6, "ref_model": "student"},
}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [*((kind, True) for kind in KINDS), ("lagging average", False), ("live", False)],
)
def test_a_resumed_run_has_the_teacher_of_an_uninterrupted_one(tmp_path: Path, lora: bool, kind: str) -> None:
    """The resumed run's student is another one at first: what the copies are comes from the checkpoint alone."""
    options: dict[str, Any] = {"ref_model": model(2), "reward_scale": 1.5, "learning_rate": 1e-2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": 2, **KINDS[kind]}
    whole = trainer(tmp_path, student=student(lora), **options)
    whole.train()
    other = adapted(11) if lora else model(5)
    resumed = trainer(tmp_path, student=other, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(whole), weights(resumed))
    assert whole._copies.keys() == resumed._copies.keys()
    for name, kept in whole._copies.items():
        assert_same(dict(kept.state()), dict(resumed._copies[name].state()))
        assert_same(kept.model.state_dict(), resumed._copies[name].model.state_dict())


def test_a_resumed_average_of_bfloat16_weights_is_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ref_model": model(2), "reward_scale": 1.5, "learning_rate": 1e-2, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "teacher": "student", "teacher_ema": 0.99}
    whole = trainer(tmp_path, student=model(0).to(torch.bfloat16), **options)
    whole.train()
    resumed = trainer(tmp_path, student=model(0).to(torch.bfloat16), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(whole), weights(resumed))
    assert_same(dict(whole._copies["moving"].state()), dict(resumed._copies["moving"].state()))


def test_a_checkpoint_of_another_run_is_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ref_model": model(2), "reward_scale": 1.5, "max_steps": 1}
    trainer(tmp_path / "a", **options, save_strategy="steps", save_steps=1).train()
    options |= {"teacher": "student", "max_steps": 2}
    with pytest.raises(ValueError, match=f"checkpoint-1 has no {FILE}: its run had another teacher"):
        trainer(tmp_path / "a", **options).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    run(tmp_path / "b", False, teacher="student", max_steps=1, save_strategy="steps", save_steps=1)
    options |= {"teacher_ema": 0.9}
    with pytest.raises(ValueError, match=rf"{FILE} is not of this run: it has other weights than the student, such as"):
        trainer(tmp_path / "b", **options).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))


# -------------------------------------------------------------------------------------------------------------- ranks


def _on_rank(folder: Path, rank: int, batch: int) -> dict[str, dict[str, Tensor]]:
    """Greedy, so that what is sampled does not depend on the rank; the adapter of each rank is another one."""
    found = {}
    for kind in ("average", "student", "live"):
        made = run(
            folder,
            True,
            student=adapted(7 + rank),
            **KINDS[kind],
            generation_kwargs={"do_sample": False},
            max_completion_length=12,
            per_device_train_batch_size=batch,
        )
        found[kind] = weights(made)
        found |= {f"{kind} {name}": dict(kept.model.state_dict()) for name, kept in made._copies.items()}
    return found


def _ranks(folder: str) -> dict[str, dict[str, Tensor]]:
    rank = int(os.environ["RANK"])
    return _on_rank(Path(folder) / str(rank), rank, 2)


@pytest.mark.ranks
def test_all_ranks_have_the_teacher_of_one_process(tmp_path: Path) -> None:
    first, second = run_on_ranks("test_student_teacher:_ranks", 2, str(tmp_path / "ranks"), timeout=120)
    one = _on_rank(tmp_path, 0, 4)
    assert (
        first.keys()
        == second.keys()
        == one.keys()
        == {"average", "average moving", "student", "student initial", "live"}
    )
    for name in one:
        assert_same(first[name], second[name])
        assert_same(first[name], one[name], 1e-5)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_ema": 0.9}, r'teacher_ema=0.9 is for teacher="student", the student itself, and teacher is not it'),
        ({"teacher_sync_steps": 2, "teacher": "base"}, 'teacher_sync_steps=2 is for teacher="student"'),
        ({"teacher": "student", "teacher_ema": 1.0}, "teacher_ema must be between 0 and 1, got 1.0"),
        ({"teacher": "student", "teacher_ema": 0}, "teacher_ema must be between 0 and 1, got 0"),
        ({"teacher": "student", "teacher_sync_steps": 0}, "teacher_sync_steps must be"),
        (
            {"teacher": "student", "teacher_ema": 0.9, "teacher_cache": "x", "reward_scale": 2.0},
            "teacher_cache has no use",
        ),
        ({"teacher": "student", "reward_scale": 1.0}, 'teacher="student" reads the prompt that the student reads'),
        (
            {"teacher": "student", "reward_scale": 1.0, "teacher_sync_steps": 1, "entropy_weight": 0.1},
            "every gradient is 0",
        ),
        ({"teacher": "base", "reward_scale": 2.0}, 'teacher="base" is the student without its PEFT adapter'),
        ({"ref_model": "base", "reward_scale": 2.0}, 'ref_model="base" is the student without its PEFT adapter'),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_errors(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, **{"ref_model": model(2), "reward_scale": 1.5, **options})


def test_grpo_has_no_use_for_a_live_teacher_at_lambda_1(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every gradient is 0"):
        grpo(tmp_path, teacher="student", teacher_sync_steps=1, ref_model=None, reward_scale=1.0)


@pytest.mark.parametrize("attribute", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_sharded_student_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str) -> None:
    made = trainer(tmp_path, ref_model=model(2), reward_scale=1.5)
    monkeypatch.setattr(made, attribute, True)
    with pytest.raises(ValueError, match=r'teacher="student" is a copy of the student, which (FSDP|DeepSpeed) shards'):
        made._made_of_student("teacher", 0, "student", {})


@pytest.mark.parametrize(("kind", "lora"), [("student", False), ("average", True), ("live", False)])
def test_with_a_prompt_of_its_own_the_student_is_a_teacher_at_lambda_1(tmp_path: Path, lora: bool, kind: str) -> None:
    hinted = {"teacher_prompt": lambda row: "one two " + row["prompt"], "reward_scale": 1.0, "ref_model": None}
    made = run(tmp_path, lora, **KINDS[kind], **hinted)
    assert difference(weights(made), student(lora).state_dict()) > 1e-4


def test_a_route_without_a_prompt_of_its_own_has_no_gradient(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'teacher\[.b.\]="student" reads the prompt that the student reads'):
        trainer(
            tmp_path,
            teacher={"a": "student", "b": "student"},
            teacher_prompt={"a": lambda row: "one " + row["prompt"]},
            data=prompts(domain=["a", "b"] * 4),
            route_column="domain",
        )
