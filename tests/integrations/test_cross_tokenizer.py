"""`GOPDTrainer` with teachers and references whose tokenizers are not the student's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.16")

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import fused_gopd as fg
from fused_gopd.integrations.tokenizers import TokenizerPair, token_bytes, vocab_map_of
from fused_gopd.integrations.trl import GOPDTrainer, check_tokenizers
from fused_gopd.integrations.trl import models as trl_models
from fused_gopd.integrations.trl.batch import Batch
from fused_gopd.integrations.trl.cross import CrossTokenizer
from test_trl import SGD, assert_same, config, model, prompts, tokenizer, weights

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = "{% for m in messages %}{{ m.content }}|{% endfor %}"


def permuted(source: PreTrainedTokenizerFast) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """The same tokens with other ids, and the old id of each."""
    state = json.loads(source.backend_tokenizer.to_str())
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(5))
    new = order.argsort()
    state["model"]["vocab"] = {token: int(new[i]) for token, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] = int(new[added["id"]])
    made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>"), order


def own(seed: int, size: int, **options: Any) -> Any:
    """A model that ends with the tokenizer's own token alone."""
    made = model(seed, vocab=size, **options)
    made.generation_config.eos_token_id = 0
    return made


def with_other_ids(seed: int, size: int, order: Tensor) -> Any:
    """The model of a seed, with its rows at the ids of another tokenizer."""
    made = own(seed, size)
    for layer in (made.get_input_embeddings(), made.get_output_embeddings()):
        layer.weight.data = layer.weight.data[order]
    return made


def trainer(folder: Path, data: Any = None, own_tokenizer: Any = None, **arguments: Any) -> GOPDTrainer:
    """A trainer of the student of seed 1; what its constructor does not know is an option of its configuration."""
    names = ("teacher", "ref_model", "teacher_processing_class")
    given = {name: arguments.pop(name) for name in names if name in arguments}
    # the student would write half characters, which no teacher reads
    odd = [i for i, piece in enumerate(token_bytes(tokenizer())) if piece is not None and not piece.isascii()]
    arguments.setdefault("generation_kwargs", {"suppress_tokens": [*odd, 1]})
    return GOPDTrainer(
        own(1, len(tokenizer())),
        args=config(folder, **arguments),
        train_dataset=prompts() if data is None else data,
        processing_class=own_tokenizer or tokenizer(),
        **given,
    )


def run(folder: Path, teacher: Any, ref: Any, other: Any, **options: Any) -> dict[str, Tensor]:
    made = trainer(folder, teacher=teacher, ref_model=ref, teacher_processing_class=other, **{**SGD, **options})
    made.train()
    return weights(made)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "sampled"},
        {"estimator": "full"},
        {"estimator": "topk", "k": 8},
        {"estimator": "topk", "k": 8, "support": "student", "logprob_min": -20.0},
        {"estimator": "full", "beta": 0.5},
    ],
    ids=str,
)
def test_a_teacher_with_other_ids_teaches_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    """The same tokens under other ids: every token is a span, and the run ends in the weights of the ordinary one."""
    same = tokenizer()
    other, order = permuted(same)
    size = len(same)
    expected = run(tmp_path / "a", own(2, size), own(3, size), same, reward_scale=1.25, **options)
    teacher = with_other_ids(2, size, order)
    teacher.tokenizer = other  # of a model it is nothing; its folder or teacher_processing_class has it
    found = run(tmp_path / "b", teacher, own(3, size), other, reward_scale=1.25, cross_tokenizer=True, **options)
    assert_same(found, expected, 1e-5)


class Scorer:
    """Scores by a model in this process, with ids of its own tokenizer."""

    temperature = 1.0

    def __init__(self, scored: Any, own_tokenizer: Any, top_k: int | None = None) -> None:
        self.model, self.tokenizer, self.top_k = scored, own_tokenizer, top_k
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Any:
        self.seen.append(input_ids)
        K = completion_mask.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(input_ids, attention_mask=attention_mask, position_ids=positions).logits[:, -K - 1 : -1]
        if self.top_k is not None:
            top = logits.log_softmax(-1).topk(self.top_k)
            return fg.TopKLogProbs(top.indices, top.values)
        found = logits.log_softmax(-1).gather(-1, input_ids[:, -K:, None])[..., 0]
        return fg.TokenLogProbs(found * completion_mask)


@pytest.mark.parametrize("options", [{"estimator": "sampled"}, {"estimator": "topk", "k": 8}], ids=str)
def test_a_scorer_with_other_ids_teaches_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    same = tokenizer()
    other, order = permuted(same)
    size = len(same)
    expected = run(tmp_path / "a", own(2, size), None, same, **options)
    options.pop("k", None)
    scorer = Scorer(with_other_ids(2, size, order), other, 8 if options["estimator"] == "topk" else None)
    assert_same(run(tmp_path / "b", scorer, None, None, cross_tokenizer=True, **options), expected, 1e-5)


def recording(made: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the loss: their arguments, and what came out."""
    calls: list[dict[str, Any]] = []

    def loss(student: Any, **options: Any) -> Any:
        out = fg.gopd_loss(student, **options)
        calls.append({**options, "out": out})
        return out

    monkeypatch.setattr(trl_models, "gopd_loss", loss)
    return calls


def test_advantages_add_up_to_the_teachers_scores_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two routes, one with a tokenizer of its own; a reference with a third: sums over sequences, by dense forwards."""
    same, other, third = tokenizer(), tokenizer("zzz yyy the number"), tokenizer("one one two")
    teacher, second, ref = own(2, len(other)), own(5, len(same)), own(3, len(third))
    routes = ["a", "b"] * 4
    ref_folder = tmp_path / "ref"
    ref.save_pretrained(ref_folder)
    third.save_pretrained(ref_folder)
    options = {"estimator": "sampled", "reward_scale": 1.25, "cross_tokenizer": True, "max_steps": 1}
    made = trainer(
        tmp_path,
        prompts(route=routes),
        teacher={"a": teacher, "b": second},
        ref_model=str(ref_folder),
        teacher_processing_class={"a": other, "b": same},
        route_column="route",
        **options,
    )
    assert set(made._cross.pairs) == {"teacher['a']", "ref_model"}
    calls = recording(made, monkeypatch)
    batches: list[Batch] = []
    original = made._loss
    monkeypatch.setattr(
        made, "_loss", lambda student, batch, **o: (batches.append(batch), original(student, batch, **o))[1]
    )
    made.train()
    checked = 0
    for batch, call in zip(batches, calls, strict=True):
        for row in range(len(batch.token_ids)):
            live = batch.mask[row].bool()
            ids = batch.token_ids[row][batch.completion_mask[row].bool()].tolist()
            text = same.decode([i for i in ids if i != 0])
            prompt = same.decode(
                batch.input_ids[row][: -len(batch.token_ids[row])][
                    batch.attention_mask[row][: -len(batch.token_ids[row])].bool()
                ]
            )
            if int(live.sum()) < len(ids) or "\ufffd" in text:
                continue
            ends = ids[-1:] == [0]
            scores = {}
            for name, one, spelled in (("q", teacher, other), ("s", second, same), ("r", ref, third)):
                front = spelled(prompt)["input_ids"]
                back = spelled(text)["input_ids"] + [0] * ends
                with torch.no_grad():
                    logprobs = one(torch.tensor([front + back])).logits.log_softmax(-1)[0]
                at = range(len(front) - 1, len(front) + len(back) - 1)
                scores[name] = sum(float(logprobs[t, i]) for t, i in zip(at, back, strict=True))
            q = scores["q" if batch.teacher_index[row] == 0 else "s"]
            expected = 1.25 * q - 0.25 * scores["r"] - float(batch.old_logprobs[row][live].sum())
            assert float(call["out"].advantages[row].sum()) == pytest.approx(expected, abs=2e-4)
            checked += 1
    assert checked >= 2
    logged = [row for row in made.state.log_history if "gopd/aligned_tokens" in row]
    assert 0.3 < logged[0]["gopd/aligned_tokens"] <= 1
    assert 0.3 < logged[0]["gopd/aligned_bytes"] <= 1


def test_unaligned_tokens_are_not_counted_in_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tokenizer("zzz yyy the number")
    halves = {"suppress_tokens": [1]}  # of characters, which are masked
    options = {"estimator": "full", "cross_tokenizer": True, "max_steps": 1, "generation_kwargs": halves}
    made = trainer(tmp_path, teacher=own(2, len(other)), teacher_processing_class=other, **options)
    calls = recording(made, monkeypatch)
    made.train()
    assert sum(int(call["mask"].sum()) for call in calls) == int(calls[0]["normalizer"])
    logged = made.state.log_history[0]
    assert logged["gopd/aligned_tokens"] < 1
    size = len(tokenizer())
    mapped = vocab_map_of(tokenizer(), other, size=size) >= 0
    used = torch.cat([call["token_ids"][call["mask"].bool()] for call in calls])
    assert bool(mapped[used].all())  # p(C) is the weight of a divergence over the common tokens C
    assert not bool(mapped.all())


def test_each_model_reads_the_whole_completion() -> None:
    """What the teacher cannot score is masked, and still in the text that the reference reads."""
    same, other = tokenizer(), tokenizer("zzz yyy the number")
    ids = torch.tensor([same("the cat sat on the mat")["input_ids"]])
    mask, everywhere = torch.ones_like(ids), torch.ones(1, dtype=torch.bool)
    pairs = {"teacher": TokenizerPair(same, other), "ref_model": TokenizerPair(same, other)}
    cross = CrossTokenizer(pairs, len(same), {"estimator": "full"}, "spread")
    read = {"teacher": ["x"], "ref_model": ["x"]}
    found, left = cross.align(read, ids, mask, {"teacher": everywhere, "ref_model": everywhere})
    alone = cross.pairs["ref_model"].align(["x"], ids, mask)
    assert 0 < int(left.sum()) < int(mask.sum())
    for one in found.values():
        assert torch.equal(one.input_ids, alone.input_ids)
        assert torch.equal(one.states, alone.states)


def test_messages_are_rendered_by_each_models_template(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    same, other = tokenizer(), tokenizer("zzz yyy the number")
    same.chat_template, other.chat_template = CHAT, "<T>" + CHAT
    scorer = Scorer(own(2, len(other)), other)
    data = datasets.Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": text}] for text in ("the cat", "mat")] * 4}
    )
    options = {"estimator": "sampled", "cross_tokenizer": True, "max_steps": 1}
    made = trainer(tmp_path, data, same, teacher=scorer, **options)
    made.train()
    texts = [other.decode(row) for ids in scorer.seen for row in ids]
    assert all("<T>the cat|" in text or "<T>mat|" in text for text in texts)


# -------------------------------------------------------------------------------------------------------------- errors


def test_another_tokenizer_is_an_error_that_names_the_option() -> None:
    same, other = tokenizer(), tokenizer("zzz yyy the number")
    with pytest.raises(
        ValueError, match=r"tokenizers of the student and of X differ .* cross_tokenizer=True in GOPDConfig"
    ):
        check_tokenizers("X", same, other)
    assert check_tokenizers("X", same, tokenizer()) is None
    assert check_tokenizers("X", same, tokenizer(), cross_tokenizer=True) is None
    pair = check_tokenizers("X", same, other, cross_tokenizer=True)
    assert pair is not None
    common = pair.common(["the cat", "numbers"])
    assert 0.9 < common["vocabulary"] < 1
    assert common["tokens"] == common["bytes"] == 1
    assert common["single"] < 1
    ids = same("the cat")["input_ids"] + same("numbers")["input_ids"]  # at most those that the other one has
    had = [i for i in ids if same.convert_ids_to_tokens(i) in other.get_vocab()]
    assert 0 < common["common"] <= len(had) / len(ids) < 1
    assert common["common"] < common["states"]
    assert "The tokenizer of X has 9" in pair.describe(["the cat"])


def refused(folder: Path, message: str, *, teacher: Any = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(folder, teacher=own(2, len(tokenizer())) if teacher is None else teacher, **options)


def test_what_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    def plain(*_: Any) -> None:
        raise AssertionError

    cross: dict[str, Any] = {"cross_tokenizer": True}
    refused(
        tmp_path,
        "cross_tokenizer=True needs the tokenizer of teacher, a scorer",
        teacher=plain,
        estimator="sampled",
        **cross,
    )
    refused(tmp_path, "cross_tokenizer=True needs the tokenizer of teacher, which is not saved with it", **cross)
    refused(
        tmp_path,
        "tokenizers of the student and of teacher differ",
        teacher=Scorer(None, tokenizer("zzz yyy")),
        estimator="sampled",
    )
    refused(
        tmp_path, "span_credit='last' is an option of cross_tokenizer=True with estimator='sampled'", span_credit="last"
    )
    refused(tmp_path, "span_credit must be one of", span_credit="first")
    refused(
        tmp_path, "baseline must be 'none' with cross_tokenizer=True", estimator="sampled", baseline="expected", **cross
    )
    refused(tmp_path, "tail='sampled' needs", estimator="topk", k=3, tail="sampled", **cross)
    needed = "logprob_min must be given for support='student' with cross_tokenizer=True"
    refused(tmp_path, needed, estimator="topk", k=3, support="student", **cross)


def test_tools_and_named_tokens_are_refused(tmp_path: Path) -> None:
    def scorer(input_ids: Any, attention_mask: Any, completion_mask: Any, token_ids: Any) -> None:
        raise AssertionError

    options = {"estimator": "topk", "k": 3, "support": "student", "cross_tokenizer": True, "logprob_min": -20.0}
    refused(tmp_path, "support='student' names the student's tokens to a scorer", teacher=scorer, **options)
    with pytest.raises(ValueError, match="cross_tokenizer=True has no place for tools"):
        GOPDTrainer(
            own(1, 300), own(2, 300), config(tmp_path, cross_tokenizer=True), train_dataset=prompts(), tools=[print]
        )


def test_scores_without_a_place_are_refused(tmp_path: Path) -> None:
    other = tokenizer("zzz yyy the number")
    scorer = Scorer(own(2, len(other)), other)

    def alone(*arguments: Any) -> Any:
        return scorer(*arguments)

    options = {"estimator": "topk", "cross_tokenizer": True, "teacher_processing_class": other}
    made = trainer(tmp_path, teacher=alone, **options)
    with pytest.raises(TypeError, match="teacher has a tokenizer of its own and returned TokenLogProbs"):
        made.train()
