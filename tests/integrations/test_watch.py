"""What goes wrong in a run is said: each rule on rows that show it, on healthy ones, and in a trainer."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

from fused_gopd.integrations.trl import watch
from fused_gopd.integrations.trl.watch import Setting, Watch, ends_of, other_ends
from test_trl import PROMPTS, model, prompts, tokenizer, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def said(**columns: list[float]) -> list[str]:
    """What is found in rows of these columns, one row after the other as in a run."""
    steps = len(next(iter(columns.values())))
    watching = Watch(Setting(max_completion_length=64, completions_per_step=8))
    history: list[dict[str, Any]] = []
    found = []
    for i in range(steps):
        history.append({"loss": 1.0, "step": i + 1, **{name: values[i] for name, values in columns.items()}})
        found += watching.read(history)
    return found


# ------------------------------------------------------------------------------------------------------ ends of answers


def ends(student: list[int], teacher: list[int], own: int = 0, teachers: int | None = 0) -> str | None:
    student_tokenizer, other = tokenizer(), tokenizer()
    student_tokenizer.eos_token = student_tokenizer.convert_ids_to_tokens(own)
    if teachers is not None:
        other.eos_token = other.convert_ids_to_tokens(teachers)
    return other_ends("teacher", student, student_tokenizer, teacher, None if teachers is None else other)


def test_a_teachers_end_that_does_not_end_the_students_is_named() -> None:
    # the base and the instruct model of a family: <|endoftext|>, and <|im_end|> beside it
    found = ends([0], [5, 0], teachers=5)
    assert found is not None
    assert "teacher ends its answers with" in found
    assert "Add 5 to eos_token_id" in found
    assert ends([0], [5, 0], teachers=None) == found  # by the generation config alone


def test_a_students_end_that_is_none_of_the_teachers_is_named() -> None:
    found = ends([5, 0], [0], own=5)
    assert found is not None
    assert "unlearns to end" in found


def test_ends_that_agree_are_not_named() -> None:
    assert ends([0], [0]) is None
    assert ends([5, 0], [0, 5], own=5, teachers=5) is None
    assert ends([5, 0], [5], own=5, teachers=5) is None
    assert ends([0], [], teachers=None) is None  # nothing is known of the teacher


def test_ends_are_those_of_the_generation_config() -> None:
    made = model(0)
    assert ends_of(made) == made.generation_config.eos_token_id
    made.generation_config.eos_token_id = None
    assert ends_of(made) == [0]


def test_a_trainer_names_other_ends_before_the_first_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = model(1)
    teacher.generation_config.eos_token_id = [7]
    student = model(0)
    student.generation_config.eos_token_id = [0]
    with caplog.at_level("WARNING"):
        run = trainer(tmp_path, student=student, teacher=teacher, teacher_processing_class=None)
    (first,) = [text for text in run.warnings if "ends its answers" in text]
    assert first in caplog.text
    assert "(7)" in first
    assert not [text for text in trainer(tmp_path).warnings if "ends" in text]


def speaker(end: int, seed: int) -> Any:
    """A tiny model that says 2 to 5 tokens from 100 to 109, and then ``end``, which is its end of a sequence."""
    made = model(seed)
    made.generation_config.eos_token_id = [end]
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    prompt = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    at = torch.arange(12)[None]
    for _ in range(60):
        words = torch.randint(100, 110, (len(PROMPTS), 12), generator=g)
        length = torch.randint(2, 6, (len(PROMPTS), 1), generator=g)
        words, live = torch.where(at == length, end, words), at <= length
        optimizer.zero_grad()
        labels = [torch.full_like(prompt["input_ids"], -100), words.masked_fill(~live, -100)]
        made(
            input_ids=torch.cat([prompt["input_ids"], words], 1),
            attention_mask=torch.cat([prompt["attention_mask"], live], 1),
            labels=torch.cat(labels, 1),
        ).loss.backward()
        optimizer.step()
    return made


@pytest.mark.parametrize("end", [0, 7])
def test_a_student_that_learns_an_end_at_which_it_does_not_stop_is_named_twice(tmp_path: Path, end: int) -> None:
    """First for the ends of the models, then for what comes of it: answers that no longer end."""
    run = trainer(
        tmp_path,
        student=speaker(0, 0),
        teacher=speaker(end, 1),
        max_steps=20,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_completion_length=16,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
    )
    run.train()
    found = [text for text in run.warnings if "ends its answers" in text or "cut off" in text]
    assert len(found) == (0 if end == 0 else 2)
    if found:
        assert "does not end the student's" in found[0]
        assert "has risen from" in found[1]


# ------------------------------------------------------------------------------------------------------------- cut off


def test_completions_that_stop_ending_are_named_once() -> None:
    (found,) = said(**{"completions/clipped_ratio": [0.1] * 6 + [0.9] * 14})
    assert "from 10% to" in found
    assert "max_completion_length=64" in found


def test_completions_none_of_which_ends_are_named() -> None:
    (found,) = said(**{"completions/clipped_ratio": [1.0] * 40})
    assert "100% of 256 completions" in found


@pytest.mark.parametrize(
    "shares", [[0.1] * 40, [0.9, 0.8] * 20, [0.97] * 31, [0.0] * 20 + [0.2] * 20], ids=["few", "many", "short", "rise"]
)
def test_completions_that_may_be_so_are_not_named(shares: list[float]) -> None:
    assert said(**{"completions/clipped_ratio": shares}) == []


def test_a_resumed_run_finds_what_it_had_found() -> None:
    rows = [{"loss": 1.0, "step": i + 1, "completions/clipped_ratio": 1.0} for i in range(40)]
    rows.insert(20, {"eval_loss": 1.0, "step": 20, "completions/clipped_ratio": 0.0})
    watching = Watch(Setting(max_completion_length=64, completions_per_step=8))
    assert len(watching.read(rows)) == 1
    assert watching.read([*rows, rows[-1]]) == []


def test_another_training_of_the_same_trainer_is_read_from_its_start() -> None:
    watching = Watch(Setting(max_completion_length=64, completions_per_step=8))
    assert watching.read([{"eval_loss": 1.0, "step": 0}]) == []  # an evaluation before the training, which forgets it
    rows = [{"loss": 1.0, "step": i + 1, "completions/clipped_ratio": 1.0} for i in range(32)]
    assert watching.read(rows[:31]) == []
    assert len(watching.read(rows)) == 1


@pytest.mark.parametrize("steps", [101, 999, 10_000])
def test_long_runs_are_read_in_a_time_that_grows_as_they_do(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(watch, "_RULES", (lambda rows, _: read.append(len(rows)),))
    rows = [{"loss": 1.0, "step": i + 1} for i in range(steps)]
    Watch(Setting(max_completion_length=64, completions_per_step=8)).read(rows)
    assert read[:100] == list(range(1, 101))
    assert all(b - a <= max(1, b // 100) for a, b in pairwise(read))
    assert sum(read) <= 110 * steps  # n^2 / 2 if it were at each row


def test_a_long_run_that_runs_away_is_named_among_windows_of_its_length() -> None:
    n = 1000
    rising = [0.3 + max(0, i - 500) * 1e-3 for i in range(n)]
    columns = {"gopd/kl_teacher_k3": rising, "gopd/kl_ref_k3": [0.1 + i * 1e-3 for i in range(n)]}
    (found,) = said(**columns, **{"gopd/reward": [i * 1e-3 for i in range(n)], "gopd/reward_scale": [1.0] * n})
    assert "and from the teacher (KL 0.3 to 0.4" in found


@pytest.mark.parametrize("hole", [float("nan"), float("inf"), None])
def test_a_row_without_a_number_is_no_alarm_and_hides_none(hole: float | None) -> None:
    flat = {f"gopd/{name}": [0.5] * 40 for name in ("kl_teacher_k3", "kl_ref_k3", "reward", "sampler_kl")}
    flat["gopd/sampler_kl"] = [0.01] * 40
    rows = {**flat, "gopd/reward_scale": [1.0] * 40, "completions/clipped_ratio": [0.1] * 20 + [0.9] * 20}
    for column in rows.values():
        column[18] = column[37] = hole  # type: ignore[assignment]
    (found,) = said(**rows)  # type: ignore[arg-type]
    assert "cut off" in found


def test_means_of_one_lambda_over_other_numbers_of_steps_are_the_same_lambda() -> None:
    """The first row of a resumed run is of fewer steps than logging_steps: its mean of 1.1 has another last bit."""
    tenth, third = sum([1.1] * 10) / 10, sum([1.1] * 3) / 3
    assert tenth != third
    columns = {f"gopd/{name}_k3": [0.1 + i * 0.02 for i in range(20)] for name in ("kl_teacher", "kl_ref")}
    scale = [tenth] * 12 + [third] + [tenth] * 7
    (found,) = said(**columns, **{"gopd/reward": [i * 0.02 for i in range(20)], "gopd/reward_scale": scale})
    assert "runs away" in found


def test_a_trainer_says_what_it_finds_in_its_log(tmp_path: Path) -> None:
    student = model(0)
    student.generation_config.eos_token_id = [0]
    run = trainer(
        tmp_path,
        student=student,
        teacher=model(0),
        max_steps=32,
        per_device_train_batch_size=4,
        max_completion_length=2,
    )
    heard: list[str] = []
    run.warn = heard.append
    run.train()
    assert heard == run.warnings[-len(heard) :]
    assert [text for text in heard if "cut off at max_completion_length=2" in text]


# ------------------------------------------------------------------------------------------ lambda, reward, sampler

REPRODUCTION = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduction.json"


def test_distillations_that_end_worse_than_with_a_smaller_lambda_are_told_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The 132 of the reproduction: docs/warnings.md has the ten that end worse, of which these are eight."""
    monkeypatch.setattr(watch, "_WINDOW", 2)  # of points that are means of 6 to 11 steps
    warned: dict[str, set[str]] = {}
    runs = [run for run in json.loads(REPRODUCTION.read_text())["runs"] if "history" in run]
    assert len(runs) == 132
    for run in runs:
        group, history = run["group"], run["history"]
        scale = float(group.split("λ=")[1].split(",")[0]) if "λ=" in group else 1.25
        columns = {"gopd/reward_scale": [scale] * len(history["loss"])}
        columns |= {f"gopd/{name}": history[name] for name in ("advantage_std", "reward")}
        columns |= {f"gopd/{name}_k3": history[name] for name in ("kl_teacher", "kl_ref")}
        for text in said(**columns):
            rule = "scale" if "more than this run supports" in text else "away"
            warned.setdefault(f"{group}, seed {run['seed']}", set()).add(rule)
    away, scale = {"away"}, {"scale"}
    assert warned == {
        "A λ=4, seed 0": away | scale,
        "A λ=4, seed 1": away | scale,
        "A λ=4, seed 2": away,
        "mismatched, student's reference, λ=1.5, seed 0": scale,
        "mismatched, student's reference, λ=1.5, seed 1": scale,
        "mismatched, student's reference, λ=2, seed 0": away | scale,
        "mismatched, student's reference, λ=2, seed 1": scale,
        "mismatched, trained longer, student's reference, λ=2, seed 0": away | scale,
    }


def test_a_lambda_that_moves_has_no_first_distance() -> None:
    rising = {"gopd/reward": [-1.0 + 0.1 * i for i in range(20)], "gopd/kl_ref_k3": [0.1 * i for i in range(20)]}
    flat = {"gopd/advantage_std": [1.0] * 20, "gopd/kl_teacher_k3": [0.5] * 20}
    (found,) = said(**rising, **flat, **{"gopd/reward_scale": [2.0] * 20})
    assert "lambda = 2" in found
    assert said(**rising, **flat, **{"gopd/reward_scale": [1.0 + 0.1 * i for i in range(20)]}) == []
    assert said(**rising, **flat) == []  # of each token
    scale = {"gopd/reward_scale": [2.0] * 20}
    falling = {"gopd/kl_target": [1 / (1 + 0.3 * i) for i in range(20)]}  # exact, which says more than the deviation
    assert said(**rising, **flat, **scale, **falling) == []
    # completions of an older student, and of the dataset, by which no estimate of a KL holds
    assert said(**rising, **flat, **scale, **{"gopd/staleness": [0.0, 1.0, 2.0, 3.0] * 5}) == []
    assert said(**rising, **flat, **scale, **{"gopd/on_policy": [1.0, 0.0, 0.0, 0.0] * 5}) == []


@pytest.mark.parametrize(
    ("name", "good", "bad", "text"),
    [
        ("sampler_kl", 0.035, 0.055, "KL to the student 0.051 nats a token"),
        ("effective_sample_size", 0.85, 0.4, "effective sample size 49%"),
        ("masked_fraction", 0.1, 0.6, "50% of the tokens masked"),
    ],
)
def test_a_sampler_that_is_not_the_student_is_named(name: str, good: float, bad: float, text: str) -> None:
    assert said(**{f"gopd/{name}": [good] * 20}) == []
    (found,) = said(**{f"gopd/{name}": [good] * 10 + [bad] * 10})
    assert text in found


# ------------------------------------------------------------------------------------------------------- by route


def test_metrics_by_route_are_those_of_the_route_alone(tmp_path: Path) -> None:
    """Those of a route are the metrics of a run with its teacher and its prompts alone."""
    options: dict[str, Any] = {
        "ref_model": model(2),
        "reward_scale": 1.25,
        "generation_kwargs": {"do_sample": False},
        "max_completion_length": 12,
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "shuffle_dataset": False,
    }
    teachers = {"a": model(1), "b": model(3, hidden=48)}
    data = prompts(domain=["a", "b", "b", "a"] * 2)
    both = trainer(
        tmp_path, teacher=teachers, data=data, route_column="domain", per_device_train_batch_size=8, **options
    )
    both.train()
    log = both.state.log_history[0]
    for route, teacher in teachers.items():
        own = data.filter(lambda row, route=route: row["domain"] == route)
        alone = trainer(tmp_path, teacher=teacher, data=own, per_device_train_batch_size=4, **options)
        alone.train()
        expected = alone.state.log_history[0]
        for name in ("reward", "kl_target", "kl_teacher_k3", "kl_ref_k3", "advantage", "advantage_std"):
            assert log[f"gopd/{name}/{route}"] == pytest.approx(expected[f"gopd/{name}"], rel=1e-4), name
        assert log[f"gopd/entropy/{route}"] == pytest.approx(expected["entropy"], rel=1e-4)
        assert log[f"gopd/loss/{route}"] == pytest.approx(expected["loss"], rel=1e-4)
        assert log[f"gopd/length/{route}"] == pytest.approx(expected["completions/mean_length"])
    assert "gopd/tokens/a" not in log


def test_one_teacher_has_no_metrics_by_route(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert not [name for name in run.state.log_history[0] if name.count("/") > 1]


def test_a_route_without_a_prompt_since_the_last_log_is_absent(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        teacher={"a": model(1), "b": model(3)},
        data=prompts(domain=["a"] * 8),
        route_column="domain",
        max_steps=1,
    )
    run.train()
    log = run.state.log_history[0]
    assert log["gopd/kl_target/b"] is None
    assert log["gopd/kl_target/a"] == pytest.approx(log["gopd/kl_target"])
    assert torch.isfinite(torch.tensor(log["gopd/length/a"]))
