"""Teachers that cannot be the ones that were meant: uniform, shifted, of another model; and those that may be."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_gopd as fg
from fused_gopd.integrations.misfit import misfit_of, shifts_of

B, K, V, H = 4, 24, 400, 32
MASK = torch.ones(B, K)
MASK[1, 15:] = 0


def chain(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(V, H) of heads that say what follows a token, and tokens sampled by them, (B, K + 1)."""
    g = torch.Generator().manual_seed(seed)
    states, weight = torch.randn(V, H, generator=g), torch.randn(V, H, generator=g)
    ids = torch.randint(V, (B, 1), generator=g)
    for _ in range(K):
        logits = states[ids[:, -1]] @ weight.T
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=g)], 1)
    return torch.stack([states, weight]), ids


TABLES, IDS = chain()
TOKENS = IDS[:, 1:]


def head(noise: float = 0.0, seed: int = 1) -> fg.LinearHead:
    g = torch.Generator().manual_seed(seed)
    states, weight = TABLES
    hidden = states[IDS[:, :-1]]
    return fg.LinearHead(hidden + noise * torch.randn(hidden.shape, generator=g), weight)


def found(teacher: fg.LinearHead | fg.Logits | Tensor, student: fg.LinearHead | None = None) -> str | None:
    scores = teacher if isinstance(teacher, Tensor) else fg.token_logprobs(teacher, TOKENS)
    own = fg.token_logprobs(head() if student is None else student, TOKENS)
    return misfit_of(scores, own, MASK, V, shifts_of(teacher, TOKENS, V))


def shifted_states(step: int) -> fg.LinearHead:
    right = head(0.2)
    return fg.LinearHead(right.hidden.roll(step, 1), right.weight)


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_a_teacher_that_differs_is_none(noise):
    assert found(head(noise)) is None
    assert found(fg.token_logprobs(head(noise), TOKENS)) is None


def test_a_teacher_that_is_sharper_or_flatter_is_none():
    right = head(0.2)
    for scale in (0.5, 2.0):
        assert found(fg.LinearHead(right.hidden, right.weight, logit_scale=scale)) is None


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_uniform_teacher_is_named(noise):
    right = head()
    assert "it is uniform" in found(fg.LinearHead(noise * right.hidden, right.weight))
    assert "it is uniform" in found(torch.full(TOKENS.shape, -math.log(V)))


@pytest.mark.parametrize(("step", "where"), [(1, "last"), (-1, "next")])
def test_scores_that_are_shifted_are_named(step, where):
    scores = fg.token_logprobs(head(0.2), TOKENS).roll(step, 1)
    assert f"shifted by one: they go with the student's of the {where} position" in found(scores)


@pytest.mark.parametrize(("step", "where"), [(1, "last"), (-1, "next")])
def test_states_that_are_shifted_are_named(step, where):
    teacher = shifted_states(step)
    assert f"hidden states that are shifted by one: they say the {where} token" in found(teacher)
    assert "hidden states that are shifted by one" in found(fg.Logits(teacher.hidden @ teacher.weight.T))


def test_states_of_another_model_are_named():
    g = torch.Generator().manual_seed(9)
    other = fg.LinearHead(torch.randn(B, K, H, generator=g) * 2, TABLES[1])
    assert "no likelier than chance" in found(other)
    assert "no likelier than chance" in found(fg.token_logprobs(other, TOKENS))


def test_a_damaged_teacher_is_named():
    right = head()
    assert "nearer to a uniform guess" in found(fg.LinearHead(0.1 * right.hidden, right.weight))


def test_what_the_student_does_not_know_itself_is_no_evidence():
    g = torch.Generator().manual_seed(9)
    other, student = (fg.LinearHead(torch.randn(B, K, H, generator=g), TABLES[1]) for _ in range(2))
    assert found(other, student) is None


# ------------------------------------------------------------------------------------------------------ in the trainer


def warned(folder: Path, teacher: Any, **options: Any) -> list[str]:
    """What a run of one step says; its completions of 24 tokens end where they must."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trl", minversion="1.16")
    from test_trl import model, trainer

    student = model(0)
    student.generation_config.eos_token_id = 0
    more = {"max_completion_length": 24, "per_device_train_batch_size": 4, "max_steps": 1, **options}
    run = trainer(folder, student=student, teacher=teacher(model), **more)
    said: list[str] = []
    run.warn = said.append
    run.train()
    return said


def uniform(model: Any) -> Any:
    made = model(1)
    torch.nn.init.zeros_(made.lm_head.weight)
    return made


def near(model: Any) -> Any:
    made = copy.deepcopy(model(0))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return made


def scorer(model: Any) -> Any:
    """Of a model, one position late."""
    from fused_gopd.integrations.transformers import head_of, last_hidden_state

    made = near(model)

    @torch.no_grad()
    def scores(ids: Tensor, attention: Tensor, completion: Tensor) -> fg.TokenLogProbs:
        keep = completion.shape[1]
        states = last_hidden_state(made, ids, attention, keep=keep)
        return fg.TokenLogProbs(fg.token_logprobs(head_of(made, states), ids[:, -keep:]).roll(1, 1))

    return scores


def test_a_right_teacher_and_reference_are_not_warned_of(tmp_path):
    from test_trl import model

    assert warned(tmp_path, near, ref_model=near(model), reward_scale=1.25) == []


def test_a_model_and_a_scorer_are_warned_of_once(tmp_path):
    (said,) = warned(tmp_path / "a", uniform, max_steps=2)
    assert said.startswith("teacher gives every token the probability 1/320: it is uniform")
    (said,) = warned(tmp_path / "b", scorer, estimator="sampled")
    assert said.startswith("teacher has scores that are shifted by one")


def test_a_wrong_reference_and_a_wrong_teacher_of_a_route_are_named(tmp_path):
    from test_trl import model, prompts

    data = prompts(route=["math", "code"] * 4)
    options = {"route_column": "route", "data": data, "reward_scale": 1.25, "gradient_accumulation_steps": 1}
    options["per_device_train_batch_size"] = 8
    teachers = {"math": near, "code": uniform}
    said = warned(
        tmp_path, lambda m: {route: make(m) for route, make in teachers.items()}, ref_model=uniform(model), **options
    )
    assert sorted(x.split(" gives")[0] for x in said) == ["ref_model", "teacher['code']"]


def test_teachers_that_have_been_compared_cost_no_host_sync(tmp_path):
    """A reference that lambda cancels is never compared: the teachers of the routes are, once."""
    from test_trl import model, prompts, trainer

    options = {"route_column": "route", "data": prompts(route=["math", "code"] * 4), "gradient_accumulation_steps": 1}
    options |= {"per_device_train_batch_size": 8, "max_completion_length": 40, "max_steps": 4}
    student = model(0)
    student.generation_config.eos_token_id = [0]
    teachers = {"math": near(model), "code": near(model)}
    options["eval_dataset"] = options["data"]  # for which the reference is loaded; none is evaluated
    run = trainer(tmp_path, student=student, teacher=teachers, ref_model=model(2), **options)
    read = []
    compare = run._name_misfits

    def compared(out, teacher, ref, index, batch):
        class Read(list):
            def __getitem__(self, i):
                read.append(i)
                return super().__getitem__(i)

        compare(out, Read(teacher), ref, index, batch)

    run._name_misfits = compared
    run.train()
    assert run._unchecked == {"ref_model"}
    assert sorted(read) == [0, 1]
