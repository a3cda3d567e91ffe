"""``report_to="gopd-html"``: what the page of a run shows is what its batches were."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

datasets = pytest.importorskip("datasets")

from fused_gopd.html import ScoredText  # noqa: E402
from fused_gopd.integrations.tokenizers.texts import token_texts  # noqa: E402
from fused_gopd.integrations.trl import GOPDTrainer, report  # noqa: E402
from fused_gopd.integrations.trl.report import HtmlReport  # noqa: E402
from fused_gopd.run_metrics import row_of, rows_of  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from test_trl import PROMPTS, config, grpo, model, prompts, tokenizer, trained, trainer, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SAVED = {"report_to": "gopd-html", "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What pages would show, in place of pages."""
    found: list[dict[str, Any]] = []

    def write(path: Path, **page: Any) -> None:
        found.append({"path": path, **page})
        path.touch()

    monkeypatch.setattr(report, "write_report", write)
    return found


def kept(folder: Path, step: int) -> dict[str, Any]:
    """What the report has kept until a checkpoint."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    found: dict[str, Any] = state["stateful_callbacks"]["gopd-html"]
    return found


# ------------------------------------------------------------------------------------------------- the texts of tokens


class Bytes:
    """A tokenizer whose ids are bytes; 256 is special."""

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        parts, run = [], bytearray()
        for i in [*ids, 256]:
            if i < 256:
                run.append(i)
                continue
            parts += [run.decode(errors="replace"), "<end>"]
            run.clear()
        return "".join(parts[:-1])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (b"ab", ["a", "b"]),
        ("é🙂x".encode(), ["", "é", "", "", "", "🙂", "x"]),
        (b"\xff\xffa", ["", "", "��a"]),  # no whole character will come
        (b"a\xf0\x9f", ["a", "", "�"]),  # cut off within a character
    ],
)
def test_a_token_that_is_a_part_of_a_character_is_empty_and_the_last_has_it(text: bytes, want: list[str]) -> None:
    assert token_texts(Bytes, list(text)) == want
    assert "".join(want) == text.decode(errors="replace")


def test_the_texts_of_tokens_spell_the_whole() -> None:
    own = tokenizer()
    ids = [*own("the 🙂 cat\n  naïve 北京")["input_ids"], own.eos_token_id]
    texts = token_texts(own, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == own.decode(ids)
    assert texts[-1] == "<eos>"
    assert token_texts(own, []) == []


def test_what_is_no_character_does_not_grow_without_end() -> None:
    seen = []

    class Counted(Bytes):
        @staticmethod
        def decode(ids: list[int], **options: bool) -> str:
            seen.append(len(ids))
            return Bytes.decode(ids, **options)

    texts = token_texts(Counted, [255] * 100)
    assert "".join(texts) == "�" * 100
    assert max(seen) <= 8


# --------------------------------------------------------------------------------------------------- what is kept


class Recording(GOPDTrainer):
    """Keeps the batches, and the student's weights at each of them."""

    def _compute_loss(self, student: Any, inputs: dict[str, Any], items: Any) -> Any:
        self.__dict__.setdefault("seen", []).append((inputs, weights(self)))
        return super()._compute_loss(student, inputs, items)


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_the_numbers_of_each_token_are_those_of_dense_models(tmp_path: Path, estimator: str) -> None:
    run = trainer(tmp_path, Recording, ref_model=model(2), reward_scale=1.5, estimator=estimator, **SAVED)
    run.train()
    found = kept(tmp_path, 2)
    assert {name: x["step"] for name, x in found.items()} == {"train first": 0, "train last": 1}
    teacher, ref = model(1, hidden=48), model(2)
    for name, (inputs, state) in {"train first": run.seen[0], "train last": run.seen[-1]}.items():
        student = model(0)
        student.load_state_dict(state)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        p, q, r = (
            m.double()(input_ids=ids, attention_mask=mask, position_ids=positions)
            .logits[:, -width - 1 : -1]
            .log_softmax(-1)
            .detach()
            for m in (student, teacher, ref)
        )
        entropy = -(p.exp() * p).sum(-1)
        chosen = inputs["completion_ids"][..., None]
        log_p, log_q, log_r = (x.gather(-1, chosen)[..., 0] for x in (p, q, r))
        want = {
            "student": log_p,
            "teacher": log_q,
            "ref": log_r,
            "entropy": entropy,
            "advantage": 1.5 * log_q - 0.5 * log_r - log_p,
        }
        texts = found[name]["texts"]
        assert [text["title"] for text in texts] == ["answer 1", "answer 2"]
        for i, text in enumerate(texts):
            length = int(inputs["completion_mask"][i].sum())
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
            assert text["prompt"] == tokenizer().decode(prompt) in PROMPTS
            assert "".join(text["tokens"]) == tokenizer().decode(inputs["completion_ids"][i][:length])
            for key, values in want.items():
                # five digits are kept of what was computed in float32
                torch.testing.assert_close(
                    torch.tensor(text[key], dtype=torch.float64), values[i][:length], rtol=1e-4, atol=1e-4
                )


@pytest.mark.usefixtures("pages")
def test_a_model_that_lambda_cancels_has_no_numbers(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    text = kept(tmp_path, 2)["train last"]["texts"][0]
    assert text["ref"] is None
    assert text["teacher"] is not None


@pytest.mark.usefixtures("pages")
def test_tokens_that_were_not_scored_are_gaps(tmp_path: Path) -> None:
    class Tools(GOPDTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            output["tool_mask"] = torch.ones_like(output["completion_mask"])
            output["tool_mask"][:, 0] = 0  # as if a tool had written the first token
            return output

    trainer(tmp_path, Tools, **SAVED).train()
    for text in kept(tmp_path, 2)["train last"]["texts"]:
        first, *others = text["student"]
        assert math.isnan(first)
        assert all(map(math.isfinite, others))


@pytest.mark.usefixtures("pages")
def test_the_prompts_that_others_read_are_shown(tmp_path: Path) -> None:
    trainer(tmp_path, teacher_prompt=lambda row: f"{row['prompt']} {row['prompt']}", **SAVED).train()
    for text in kept(tmp_path, 2)["train last"]["texts"]:
        assert text["teacher_prompt"] == f"{text['prompt']} {text['prompt']}"
        assert text["ref_prompt"] is None


def test_each_route_is_shown(tmp_path: Path) -> None:
    routes = ["x"] * 7 + ["<b>y"]
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "route_column": "route"}
    teachers = {"x": model(1), "<b>y": model(2)}
    trainer(tmp_path, data=prompts(route=routes), teacher=teachers, **options, **SAVED).train()
    titles = [text["title"] for text in kept(tmp_path, 1)["train first"]["texts"]]
    assert len(titles) == 4
    assert sum(title.endswith(", <b>y") for title in titles) == 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;y" in page
    assert "<b>y" not in page


# ------------------------------------------------------------------------------------------------------------ the page


def test_a_page_is_written_at_every_save_and_at_the_end(tmp_path: Path, pages: list[dict[str, Any]]) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 2}
    run = GOPDTrainer(
        model(0),
        model(1, hidden=48),
        config(tmp_path, max_steps=3, **options, **SAVED),
        prompts(),
        prompts().select(range(4)),
        tokenizer(),
    )
    run.train()
    assert len(pages) == 3  # that of the end is that of the last save
    assert {page["path"] for page in pages} == {tmp_path / "report.html"}
    last = pages[-1]
    assert set(last["samples"]) == {"held-out prompts, before", "held-out prompts, after 3 steps"}
    assert set(kept(tmp_path, 3)) == {"train first", "train last", "eval first", "eval last"}
    assert all(isinstance(text, ScoredText) for texts in last["samples"].values() for text in texts)
    first, after = (last["samples"][f"held-out prompts, {when}"] for when in ("before", "after 3 steps"))
    assert [text.prompt for text in first] == [text.prompt for text in after]
    assert [row["step"] for row in last["rows"]] == [0, 1, 2, 3]
    assert {"loss", "kl_target", "length", "eval_kl_target"} <= set(last["rows"][-1])
    settings = dict(last["settings"])
    assert settings["λ (reward scale)"] == "1"
    assert settings["torch"] == torch.__version__
    assert settings["answers of a step"] == "2 × 2 accumulated"
    assert str(tmp_path) not in str(last["settings"])


def test_what_a_model_or_a_prompt_has_written_is_text(tmp_path: Path) -> None:
    hostile = [
        "<script>alert(1)</script>",
        "[bold]x[/bold] {{ 1 }}",
        "\x1b[31mred\x1b[0m",
        "\u202eright to left",
        "🙂",
        "</td>",
    ]
    data = datasets.Dataset.from_dict({"prompt": hostile})
    trainer(tmp_path, data=data, per_device_train_batch_size=6, gradient_accumulation_steps=1, **SAVED).train()
    shown = [text["prompt"] for text in kept(tmp_path, 2)["train last"]["texts"]]
    assert set(shown) <= set(hostile)  # as they are: in a checkpoint, and so for the page
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page.lower()
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_a_resumed_run_has_the_page_of_an_uninterrupted_one(tmp_path: Path, pages: list[dict[str, Any]]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {**SAVED, "lr_scheduler_type": "constant"}
    trainer(whole, max_steps=3, **options).train()
    trainer(parts, max_steps=1, **options).train()
    pages.clear()
    trainer(parts, max_steps=3, **options).train(resume_from_checkpoint=str(parts / "checkpoint-1"))
    assert kept(parts, 3) == kept(whole, 3)
    assert [len(page["rows"]) for page in pages] == [1, 2, 3]  # where it begins, too
    assert set(pages[0]["samples"]) == {"before"}
    assert set(pages[-1]["samples"]) == {"before", "after 2 steps"}


@pytest.mark.usefixtures("pages")
def test_a_run_that_begins_to_report_when_it_is_resumed_does_so(tmp_path: Path) -> None:
    trainer(tmp_path, **{**SAVED, "report_to": "none"}).train()
    trainer(tmp_path, max_steps=3, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {name: x["step"] for name, x in kept(tmp_path, 3).items()} == {"train first": 2, "train last": 2}


@pytest.mark.usefixtures("pages")
def test_a_second_training_has_its_own_beginning(tmp_path: Path) -> None:
    run = trainer(tmp_path, **SAVED)
    run.train()
    first = kept(tmp_path, 2)["train first"]
    run.train()
    assert kept(tmp_path, 2)["train first"] != first


def test_it_costs_nothing_where_it_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HtmlReport, "take", lambda *_: pytest.fail("taken"))
    trainer(tmp_path, **{**SAVED, "report_to": "none"}).train()
    assert not (tmp_path / "report.html").exists()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert "gopd-html" not in state["stateful_callbacks"]


@pytest.mark.usefixtures("pages")
def test_it_changes_no_weight(tmp_path: Path) -> None:
    with_it, without = (trained(tmp_path / name, report_to=name) for name in ("gopd-html", "none"))
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_other_places_are_reported_to_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(tmp_path, report_to=["tensorboard", "gopd-html"])
    assert run.args.report_to == ["tensorboard", "gopd-html"]
    run.train()
    assert (tmp_path / "report.html").is_file()
    assert list((tmp_path / "board").iterdir())
    with pytest.raises(ValueError, match="nowhere is not supported"):
        trainer(tmp_path, report_to=["nowhere", "gopd-html"])


def test_grpo_reports_too(tmp_path: Path) -> None:
    run = grpo(tmp_path, reward_scale=1.25, **SAVED)
    run.train()
    text = kept(tmp_path, 1)["train first"]["texts"][0]
    assert text["ref"] is not None
    assert "answer 1" in (tmp_path / "report.html").read_text(encoding="utf-8")


def _rank(folder: str) -> list[str]:
    run = trainer(Path(folder), **SAVED)
    run.train()
    return [*run._report.state()]


@pytest.mark.ranks
def test_of_several_processes_the_main_one_reports(tmp_path: Path) -> None:
    main, other = run_on_ranks("test_report:_rank", 2, str(tmp_path))
    assert main == ["train first", "train last"]
    assert other == []
    assert "answer 2" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_package_that_is_missing_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{package}.*pip install"):
        trainer(tmp_path, **SAVED)


# ------------------------------------------------------------------------------------------------------------ the rows


def test_a_row_has_the_metrics_of_a_step_by_short_names() -> None:
    logs = {"loss": 1.0, "gopd/reward": 2.0, "gopd/reward/math": 3.0, "gopd/x": math.nan, "entropy": None, "epoch": 1.0}
    want = {"step": 4, "loss": 1.0, "reward": 2.0, "reward/math": 3.0, "x": None, "entropy": None}
    assert row_of(4, logs) == want
    history = [
        {"step": 4, **logs},
        {"step": 4, "eval_gopd/reward": 5.0, "eval_runtime": 1.0},
        {"step": 4, "epoch": 1.0},
    ]
    assert rows_of(history) == [{**want, "eval_reward": 5.0}]
    assert rows_of([{"step": 4, "train_runtime": 1.0}]) == []
