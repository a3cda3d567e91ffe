"""``fused-gopd reproduce``: the tasks, the cache of stages, the training loop, and the page made from JSON."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fused_gopd import installing
from fused_gopd.cli import app, bench, reproduce
from fused_gopd.cli.durable import Damaged

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
claims, models, report, runner, stages, tasks, train, verdicts, work = (
    bench.benchmarks_module(f"reproduction.{name}", needs=())
    for name in ("claims", "models", "report", "runner", "stages", "tasks", "train", "verdicts", "work")
)

ROOT = Path(__file__).parents[2]
NO_ERRORS = tasks.Errors(0.0, 0.0, 0.0)


def ids(characters: str, length: int) -> torch.Tensor:
    return torch.tensor([[tasks.VOCABULARY.index(c) for c in characters.ljust(length, "_")]])


# ------------------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [(":930+973", "1903"), (":007+005", "0012"), (":RS:dabc", "abcd"), (":TC:jabc", "bcda"), (":CR:abcj", "adcb")],
)
def test_answers_are_right(prompt: str, answer: str) -> None:
    assert tasks.text(tasks.answers(ids(prompt, tasks.PROMPT))[0]) == answer


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_training_data_without_errors_is_correct_and_with_errors_often_not(domain: str) -> None:
    g = train.generator(0)
    prompt = tasks.prompts(domain, 256, g)
    assert tasks.correct(prompt, tasks.solutions(prompt, NO_ERRORS, g)).all()
    share = tasks.correct(prompt, tasks.solutions(prompt, tasks.Errors(), g)).float().mean()
    assert 0.4 < share < 0.85


def test_half_of_the_training_data_has_a_scratch() -> None:
    g = train.generator(0)
    response = tasks.solutions(tasks.prompts("both", 512, g), NO_ERRORS, g)
    assert 0.4 < (response[:, 0] == tasks.SCRATCH).float().mean() < 0.6


def test_a_habitual_error_is_the_next_symbol() -> None:
    g = train.generator(0)
    prompt = tasks.prompts("strings", 64, g)
    response = tasks.solutions(prompt, tasks.Errors(1.0, 0.0, 1.0, "next"), g)
    direct = response[:, 0] == tasks.EQUALS
    right = tasks.answers(prompt)[direct] - tasks.LETTER
    torch.testing.assert_close(response[direct, 1:5] - tasks.LETTER, (right + 1) % 10)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("=0579$", True),
        ("#090705=0579$", True),
        ("#000000=0579$", True),  # the answer counts, not the way
        ("=0578$", False),
        ("=0579", False),  # does not end
        ("0579$", False),
        ("$=0579$", False),  # what follows the end does not count
        ("=00579$", False),
        ("##########=579", False),
    ],
)
def test_checker(response: str, right: bool) -> None:
    assert tasks.correct(ids(":123+456", tasks.PROMPT), ids(response, tasks.RESPONSE)).item() is right


def test_live_tokens_are_those_up_to_the_end() -> None:
    assert tasks.live(ids("=0579$", tasks.RESPONSE)).sum() == 6
    assert tasks.live(ids("##############", tasks.RESPONSE)).sum() == tasks.RESPONSE


def test_an_unknown_domain_is_an_error() -> None:
    with pytest.raises(ValueError, match="domain must be one of addition, strings, both; got 'chess'"):
        tasks.prompts("chess", 1, train.generator(0))


# ----------------------------------------------------------------------------------------------------------- models


def test_sampling_with_a_cache_follows_the_models_distribution() -> None:
    """The mean log-prob of samples is minus the mean entropy of the positions that they passed through."""
    import fused_gopd as fg

    model = models.build("small", 0)
    with torch.no_grad():
        model.lm_head.weight *= 5.0  # far from uniform
        prompt = tasks.prompts("both", 512, train.generator(0))
        response = models.sample(model, prompt, train.generator(1))
        mask = tasks.live(response)
        logprobs, entropy = fg.token_logprobs(
            models.head(model, prompt, response), response, mask=mask, return_entropy=True
        )
    difference = (logprobs + entropy)[mask]
    assert difference.mean().abs() < 4 * difference.std() / math.sqrt(len(difference))
    assert (response[~mask] == tasks.PAD).all()


def test_scores_are_the_same_twice() -> None:
    model = models.build("small", 0)
    assert repr(train.evaluate(model, "strings", 64)) == repr(train.evaluate(model, "strings", 64))


# ----------------------------------------------------------------------------------------------------- distillation


@pytest.fixture(scope="module")
def trio() -> tuple[Any, Any, Any]:
    """Student, reference and teacher that know the format."""
    student = models.build("small", 0)
    train.supervise(student, train.training_data(tasks.Errors(), 32, 0), 30, 1e-2)
    teacher = copy.deepcopy(student)
    train.supervise(teacher, train.training_data(NO_ERRORS, 32, 1), 40, 1e-2)
    return student, copy.deepcopy(student), teacher


@pytest.mark.parametrize("reward_scale", [1.0, 1.5])
def test_the_dense_loss_gives_the_same_curve(trio: tuple[Any, Any, Any], reward_scale: float) -> None:
    student, reference, teacher = trio

    def curve(dense: bool) -> list[dict[str, float]]:
        how = train.Distillation("addition", reward_scale, steps=4, batch=16, dense=dense)
        return train.distill(copy.deepcopy(student), {"addition": teacher}, reference, how, seed=0)

    for fused, dense in zip(curve(False), curve(True), strict=True):
        assert fused["length"] == dense["length"]  # the same rollouts
        assert fused == pytest.approx(dense, abs=2e-4)  # of log-probs of a few nats in float32, after updates of 3e-4


def test_distillation_brings_the_student_nearer_to_the_teacher(trio: tuple[Any, Any, Any]) -> None:
    student, reference, teacher = trio
    how = train.Distillation("addition", 1.0, steps=40, lr=3e-3, batch=32, estimator="full")
    history = train.distill(copy.deepcopy(student), {"addition": teacher}, reference, how, seed=0)
    assert history[-1]["kl_target"] < 0.5 * history[0]["kl_target"]


def test_the_learning_rate_decays_to_0_and_a_stop_is_a_part_of_the_same_training(
    trio: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, reference, teacher = trio
    rates: list[float] = []
    step = train._step

    def noted(model: Any, optimizer: Any, loss: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer, loss)

    monkeypatch.setattr(train, "_step", noted)

    def curve(**options: int) -> list[dict[str, float]]:
        how = train.Distillation("addition", 1.0, lr=1e-3, batch=8, **options)
        return train.distill(copy.deepcopy(student), {"addition": teacher}, reference, how, seed=0)

    whole = curve(steps=4)
    assert rates == pytest.approx([1e-3 * x for x in (1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5)])
    assert curve(steps=4, stop=2) == whole[:2]
    assert curve(steps=3)[2] != whole[2]  # a short training is another one, once its rate has differed


def test_two_teachers_each_teach_their_domain(trio: tuple[Any, Any, Any]) -> None:
    """Teachers by domain give the loss that the two domains have alone."""
    student, reference, teacher = trio
    prompt = tasks.prompts("both", 16, train.generator(0))
    response = models.sample(student, prompt, train.generator(1))
    how = train.Distillation("both", 1.0, options={"reduction": "sum"})
    both = {"strings": reference, "addition": teacher}  # in any order
    together = train.rollout_loss(student, both, reference, prompt, response, how).loss
    alone = train.rollout_loss(student, {"addition": teacher}, reference, prompt[:8], response[:8], how).loss
    rest = train.rollout_loss(student, {"strings": reference}, reference, prompt[8:], response[8:], how).loss
    torch.testing.assert_close(together, alone + rest)


# ----------------------------------------------------------------------------------------------------------- stages


def base(steps: int, name: str = "base") -> stages.Stage:
    config = {"size": "small", "errors": {}, "steps": steps, "lr": 1e-3, "batch": 8, "seed": 0, "n": 8}
    return stages.Stage(name, "base", config)


def weights(scale: float, *parents: stages.Stage) -> stages.Stage:
    return stages.Stage("weights", "extrapolate", {"domains": ["addition"], "scale": scale, "n": 8}, parents)


def execute(cache: Path, *wanted: stages.Stage) -> list[str]:
    """Run stages; which were computed."""
    before = {p.name for p in cache.glob("*")}
    with ThreadPoolExecutor(1) as pool:
        stages.execute(wanted, cache, pool, 1, lambda _: None)
    return sorted(p.name.split("-")[0] for p in cache.glob("*") if p.name not in before)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, end = base(1), base(2)
    last = weights(1.5, start, end)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(work, "extrapolate", interrupted)
        with pytest.raises(RuntimeError, match="stage weights failed"):
            execute(tmp_path, last)
    assert stages.result(start, tmp_path) is not None
    assert stages.result(last, tmp_path) is None
    assert execute(tmp_path, last) == ["extrapolate"]
    assert execute(tmp_path, last) == []


def test_what_comes_first_is_computed_first_though_it_was_not_ready_at_once(tmp_path: Path) -> None:
    names: list[str] = []
    first = replace(weights(1.0, base(1), base(2)), name="first")
    with ThreadPoolExecutor(1) as pool:
        wanted = [first, base(3, "second"), base(4, "third")]
        stages.execute(wanted, tmp_path, pool, 1, lambda stage: names.append(stage.name))
    assert names == ["base", "base", "first", "second", "third"]


def test_a_changed_configuration_computes_what_depends_on_it_alone(tmp_path: Path) -> None:
    start = base(1)
    execute(tmp_path, weights(1.0, start, base(2)))
    assert execute(tmp_path, weights(1.5, start, base(2))) == ["extrapolate"]
    assert execute(tmp_path, weights(1.0, start, base(3))) == ["base", "extrapolate"]


def test_a_half_written_stage_does_not_count(tmp_path: Path) -> None:
    stage = base(1)
    (tmp_path / f"base-{stage.key}.123").mkdir()
    assert execute(tmp_path, stage) == ["base"]
    for name, content in (("model.safetensors", b"cut"), ("result.json", b'{"size": '), ("result.json", b"\xff")):
        (stage.folder(tmp_path) / name).write_bytes(content)
        with pytest.raises(Damaged, match=rf"{name} is damaged: remove its folder"):
            execute(tmp_path, weights(1.0, stage, base(2)))


def test_the_name_of_a_stage_is_not_part_of_its_key() -> None:
    assert base(1, "one name").key == base(1, "another").key


def test_a_stage_is_loaded_as_it_was_computed(tmp_path: Path) -> None:
    stage = base(2)
    execute(tmp_path, stage)
    model, found = work.base([], **stage.config)
    loaded = stages.load(stage, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    saved = stages.result(stage, tmp_path)
    assert saved is not None
    assert repr(saved["scores"]) == repr(found["scores"])


# ------------------------------------------------------------------------------------------------- claims and report


def test_bases_and_teachers_are_shared_by_the_quick_and_the_full_run() -> None:
    quick, full = (claims.Plan(claims.settings_of(q), [0]) for q in (True, False))
    assert quick.base.key == full.base.key
    assert {d: t.key for d, t in quick.teachers.items()} == {d: t.key for d, t in full.teachers.items()}


def test_more_seeds_add_runs_and_change_none() -> None:
    one, two = (claims.Plan(claims.settings_of(False), range(n)) for n in (1, 2))
    assert {r.stage.key for r in one.runs} < {r.stage.key for r in two.runs}


def test_an_unknown_claim_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"claim must be one of lambda, two-teachers, .*; got 'speed'$"):
        claims.Plan(claims.settings_of(True), [0], ["speed"])


def found(scores: dict[str, list[float]], names: tuple[str, ...] = ("lambda",)) -> dict[str, Any]:
    """The JSON of a run with these accuracies per seed in addition, strings half of it."""
    rest = {"length": 9.0, "scratch": 50.0, "accuracy_direct": 50.0, "accuracy_scratch": 60.0}
    runs = [
        {
            "group": group,
            "seed": seed,
            "claims": list(claims.CLAIMS),
            "scores": {"addition": {"accuracy": value, **rest}, "strings": {"accuracy": value / 2, **rest}},
            "history": {"step": [1.0, 2.0], "reward": [0.1, 0.2], "entropy": [0.3, 0.3], "length": [9.0, 9.0]},
        }
        for group, values in scores.items()
        for seed, value in enumerate(values)
    ]
    settings = json.loads(json.dumps(claims.asdict(claims.settings_of(False))))
    return {"settings": settings, "claims": list(names), "seeds": [0, 1], "versions": {"torch": "2"},
            "stages": {"timed": 5, "seconds": 60, "cpu_seconds": 50}, "missing": [], "runs": runs}  # fmt: skip


CURVE = {"base": [50.0], "teacher A": [70.0], "A λ=0.5": [60.0, 60.4], "A λ=1": [70.1, 69.8], "A λ=1.25": [74.0, 74.4]}


def holds(scores: dict[str, list[float]]) -> dict[str, bool | None]:
    return {v.claim: v.holds for v in verdicts.verdicts(found(scores))}


def test_a_curve_as_in_the_paper_holds() -> None:
    assert all(ok for claim, ok in holds({**CURVE, "A λ=4": [60.0, 61.0]}).items() if "control" not in claim)


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"A λ=0.5": [71.0, 71.2]}, "λ < 1 lands between reference and teacher"),
        ({"A λ=1": [73.0, 73.1]}, "λ = 1 (OPD) is as good as the teacher"),
        ({"A λ=1.25": [70.3, 74.5]}, "some λ > 1 passes the teacher by more than twice the spread"),
        ({"A λ=4": [80.0, 81.0]}, "too large a λ breaks: the answers get worse"),
    ],
)
def test_what_does_not_hold_is_said(change: dict[str, list[float]], claim: str) -> None:
    assert holds({**CURVE, **change})[claim] is False


def test_the_page_says_what_failed_and_what_is_missing() -> None:
    data = found({**CURVE, "A λ=1": [73.0, 73.1]})
    data["missing"] = [{"group": "A λ=2", "seed": 1}]
    page = report.page(data)
    assert "| λ = 1 (OPD) is as good as the teacher | 73.0 ± 0.1 against 70.0 | **no** |" in page
    assert "**Not finished, and left out:** A λ=2 (seed 1)." in page
    assert "Paper: Fig. 3 and 4; Qwen3-4B" in page


def test_the_command_in_miniature_from_the_stages_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    tiny = replace(
        claims.settings_of(True), n=8, shared_n=8, base_steps=1, longer_base_steps=1, base_batch=8, rl_steps=1
    )
    tiny = replace(tiny, steps=1, weak_steps=1, scales=(1.0, 1.5), controls=False, variance_repeats=2)
    monkeypatch.setattr(claims, "settings_of", lambda quick: tiny)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    every = [f"--claim={claim}" for claim in claims.CLAIMS]
    result = CliRunner().invoke(app, ["reproduce", "--quick", *every, "--workers", "1", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "reproduction.json").read_text())["missing"] == []
    page = (tmp_path / "reproduction.md").read_text()
    for claim in claims.CLAIMS:
        assert report.SECTIONS[claim].title in page
        assert (tmp_path / "images" / f"reproduction-{claim}.svg").is_file()


def test_an_interrupted_command_leaves_a_page_of_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "execute", interrupted)
    plan = claims.Plan(claims.settings_of(True), [0], ["lambda"])
    with pytest.raises(KeyboardInterrupt):
        runner.reproduce(plan, tmp_path, tmp_path / "cache", 1, lambda _: None)
    assert "**Not finished, and left out:** base, teacher A," in (tmp_path / "reproduction.md").read_text()


def test_an_unknown_claim_is_refused_by_the_command() -> None:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["reproduce", "--claim", "speed"])
    assert result.exit_code == 2
    assert "expected one of lambda, two-teachers" in result.output
    assert "got 'speed'" in result.output


def test_a_missing_extra_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "_NEEDS", ("no_such_package",))
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["reproduce"])
    assert result.exit_code == 2
    assert f"reproduce needs no_such_package. Run:\n  {installing.extra('models')}\n" in result.output


def test_the_committed_page_is_that_of_the_committed_json() -> None:
    data = json.loads((ROOT / "benchmarks/results/reproduction.json").read_text())
    assert report.page(data) == (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
