"""Scores on disk: they are what the teacher said, of the sequence and the model that were asked for, or an error."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

import fused_gopd as fg  # noqa: E402
from fused_gopd.integrations.cache import TeacherCache, TeacherCacheError, fingerprint  # noqa: E402
from fused_gopd.integrations.transformers import head_of, last_hidden_state  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, K = 64, 5


def model(seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = transformers.Qwen3Config(
        vocab_size=VOCAB, num_key_value_heads=2, head_dim=16, initializer_range=0.2, **{**sizes, **config}
    )
    return transformers.Qwen3ForCausalLM(made).eval()


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Three sequences of 10, 7 and 8 tokens: padded nowhere, on the left, and on the right of the answer."""
    torch.manual_seed(seed)
    ids, attention, mask = torch.randint(VOCAB, (3, 10)), torch.ones(3, 10).long(), torch.ones(3, K).long()
    attention[1, :3] = 0
    attention[2, 8:] = mask[2, 3:] = 0
    return ids, attention, mask


class Scorer:
    """A scorer of log-probs, or of top-k with those of the tokens; counts the sequences that it is asked for."""

    fingerprint = "a scorer"

    def __init__(self, teacher: Any, top_k: int | None = None) -> None:
        self.teacher, self.top_k, self.asked = teacher, top_k, 0

    def __call__(self, ids: Tensor, attention: Tensor, mask: Tensor) -> Any:
        self.asked += len(ids)
        keep = mask.shape[1]
        with torch.no_grad():
            head = head_of(self.teacher, last_hidden_state(self.teacher, ids, attention, keep=keep))
            own = fg.token_logprobs(head, ids[:, -keep:]) * mask
        if self.top_k is None:
            return fg.TokenLogProbs(own)
        return fg.TopKLogProbs(*fg.token_topk(head, self.top_k), own)


def assert_same(found: Any, expected: Any, mask: Tensor) -> None:
    assert type(found) is type(expected)
    for name, x in found.tensors.items():
        y = expected.tensors[name]
        if name not in ("weight", "bias"):
            x, y = x[mask.bool()], y[mask.bool()]
        assert torch.equal(x, y), name


# ------------------------------------------------------------------------------------------------- what is given back


@pytest.mark.parametrize("kind", ["sampled", "topk", "hidden", "hidden from a scorer"])
def test_scores_from_disk_are_those_of_the_teacher(kind: str, tmp_path: Path) -> None:
    teacher = model()
    scorer: Any = Scorer(teacher, top_k=4 if kind == "topk" else None)
    given: Any = teacher if kind == "hidden" else scorer
    if kind == "hidden from a scorer":

        def given(ids: Tensor, attention: Tensor, mask: Tensor) -> fg.LinearHead:
            scorer.asked += len(ids)
            return head_of(teacher, last_hidden_state(teacher, ids, attention, keep=mask.shape[1]).detach())

        given.fingerprint = "states"  # type: ignore[attr-defined]
    expected = given(*batch()) if kind != "hidden" else head_of(teacher, _states(teacher))
    scorer.asked = 0
    cache = TeacherCache(tmp_path)
    for _ in range(2):
        assert_same(cache.scorer(given)(*batch()), expected, batch()[2])
    assert cache.stats() == {"hits": 3, "misses": 3, "damaged": 0, "removed": 0, "unwritten": 0}
    # one more of a scorer: the second time, to see that it is the same
    assert scorer.asked == (0 if kind == "hidden" else 4)
    if "hidden" not in kind:
        assert_same(TeacherCache(tmp_path).scorer()(*batch()), expected, batch()[2])


@torch.no_grad()
def _states(teacher: Any) -> Tensor:
    ids, attention, mask = batch()
    return last_hidden_state(teacher, ids, attention, keep=mask.shape[1])


def test_padding_and_neighbours_do_not_matter_and_tokens_do(tmp_path: Path) -> None:
    scorer = Scorer(model())
    cached = TeacherCache(tmp_path).scorer(scorer)
    expected = cached(*batch()).logprobs
    ids, attention, mask = batch()
    wider = [torch.nn.functional.pad(x, (2, 0)) for x in (ids, attention)]
    scorer.asked = 0
    assert torch.equal(cached(*wider, mask).logprobs, expected)
    longer = [torch.nn.functional.pad(x, (0, 2)) for x in batch()]  # the last K + 2 tokens
    assert torch.equal(cached(*longer).logprobs[:, :K], expected)
    alone = [x[2:] for x in batch()]
    assert torch.equal(cached(*alone).logprobs, expected[2:])
    assert scorer.asked == 1  # to see that it is the same
    ids[0, 2] += 1
    fewer = mask.clone()
    fewer[1, 0] = 0
    cached(ids, attention, mask)
    cached(ids, attention, fewer)  # other positions are other scores
    assert scorer.asked == 3


def test_a_sequence_that_is_there_twice_is_asked_for_once(tmp_path: Path) -> None:
    scorer = Scorer(model())
    ids, attention, mask = (torch.cat([x, x]) for x in batch())
    scores = TeacherCache(tmp_path).scorer(scorer)(ids, attention, mask).logprobs
    assert scorer.asked == 3
    assert torch.equal(scores[:3], scores[3:])


def test_lists_of_different_lengths_are_filled_up(tmp_path: Path) -> None:
    teacher = model()
    of = {3: [x[:1] for x in batch()], 4: [x[1:] for x in batch()]}
    cache = TeacherCache(tmp_path)
    for k, part in of.items():
        scorer = Scorer(teacher, top_k=k)
        del scorer.top_k  # a scorer that does not say how many
        scorer.top_k = k
        cached = cache.scorer(lambda *args, scorer=scorer: scorer(*args), name="lists", revision="1")
        cached(*part)
    scores = cache.scorer(name="lists")(*batch())
    assert scores.token_ids.shape == (3, K, 4)
    assert bool((scores.token_ids[0, :, 3] == -1).all())
    assert bool((scores.token_ids[1] >= 0).all())


# ------------------------------------------------------------------------------------------------ which model's scores


def test_what_trainers_look_at_is_the_scorers(tmp_path: Path) -> None:
    scorer = Scorer(model(), top_k=3)
    scorer.temperature, scorer.tokenizer, scorer.head = 0.7, object(), object()
    cached = TeacherCache(tmp_path).scorer(scorer)
    for name in ("temperature", "top_k", "tokenizer", "head"):
        assert getattr(cached, name) is getattr(scorer, name)
    assert not hasattr(TeacherCache(tmp_path).scorer(lambda *args: scorer(*args), revision="1"), "top_k")


def test_a_model_that_changed_is_another_one(tmp_path: Path) -> None:
    teacher, same = model(), model()
    assert fingerprint(teacher) == fingerprint(same)
    prints = {fingerprint(teacher)}
    weight = teacher.lm_head.weight.data

    def swap(x: Tensor, a: int, b: int) -> None:
        x[a], x[b] = x[b].clone(), x[a].clone()

    for change in (
        lambda: weight[3, 5].add_(1e-6),
        lambda: swap(weight, 3, 4),
        lambda: swap(weight.T, 0, 31),
        lambda: teacher.model.norm.weight.data.mul_(1.5),
        lambda: setattr(teacher.config, "rms_norm_eps", 1e-3),
        lambda: teacher.to(torch.bfloat16),
    ):
        change()
        prints.add(fingerprint(teacher))
    assert len(prints) == 7
    same.config._name_or_path = "elsewhere"
    assert fingerprint(same) in prints


def test_a_weight_that_is_a_part_of_a_buffer_is_the_same_weight() -> None:
    teacher = model().bfloat16()
    before = fingerprint(teacher)
    for x in teacher.parameters():
        buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
        x.data = buffer[1:].view_as(x).copy_(x.data)
    assert fingerprint(teacher) == before


def test_a_changed_model_misses(tmp_path: Path) -> None:
    teacher, cache = model(), TeacherCache(tmp_path)
    cache.scorer(teacher, name="t")(*batch())
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    cache.scorer(teacher, name="t")(*batch())
    assert cache.stats()["hits"] == 0
    assert len(cache) == 6
    with torch.autocast("cpu", torch.bfloat16):  # its states are bfloat16 now
        assert cache.scorer(teacher, name="t")(*batch()).hidden.dtype == torch.bfloat16
    assert len(cache) == 9
    with pytest.raises(TeacherCacheError, match="must have the scores of one model called 't'; it has"):
        cache.scorer(name="t")


@pytest.mark.parametrize("counted", [True, False], ids=["in place", "as TRL's SyncRefModelCallback"])
def test_a_model_that_is_trained_meanwhile_misses(counted: bool, tmp_path: Path) -> None:
    teacher, cache = model(), TeacherCache(tmp_path)
    cached = cache.scorer(teacher, name="average")
    before = cached(*batch()).hidden
    with torch.no_grad():  # as a moving average of the student
        for x, y in zip(teacher.parameters(), model(1).parameters(), strict=True):
            (x if counted else x.data).lerp_(y, 0.1)
    assert not torch.equal(cached(*batch()).hidden, before)
    assert cache.stats()["hits"] == 0
    assert torch.equal(cached(*batch()).hidden[0], _states(teacher)[0])
    assert cache.stats()["hits"] == 3


def test_adapters_of_one_model_are_other_models(tmp_path: Path) -> None:
    """Their weights are all in the model, whichever is active, and an adapter's factor is in none of them."""
    peft = pytest.importorskip("peft")

    def adapted(**options: Any) -> Any:
        torch.manual_seed(3)
        made = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options)
        return peft.get_peft_model(model(), made).eval()

    teacher, cache = adapted(), TeacherCache(tmp_path)
    assert fingerprint(teacher) == fingerprint(adapted())
    assert fingerprint(teacher) != fingerprint(adapted(lora_alpha=32))
    teacher.add_adapter("b", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    cached = cache.scorer(teacher, name="t")
    for active in ("default", "b"):
        teacher.set_adapter(active)
        for scorer in (cached, cache.scorer(teacher, name="t")):
            assert torch.equal(scorer(*batch()).hidden[0], _states(teacher)[0])
    with teacher.disable_adapter():
        assert torch.equal(cached(*batch()).hidden[0], _states(teacher)[0])
    assert len(cache) == 9
    assert torch.equal(cached(*batch()).hidden[0], _states(teacher)[0])


def test_all_names_of_a_model_are_known(tmp_path: Path) -> None:
    teacher = model()
    teacher.save_pretrained(tmp_path / "teacher")
    made = [TeacherCache(tmp_path / "cache").scorer(teacher, name=name) for name in ("a", "b")]
    for scorer in [*made, TeacherCache(tmp_path / "cache").scorer(teacher, name="c")]:
        scorer(*batch())
    for name in ("a", "b", "c"):
        TeacherCache(tmp_path / "cache").scorer(name=name, head=tmp_path / "teacher")(*batch())


def test_nan_is_not_kept(tmp_path: Path) -> None:
    cache, scorer = TeacherCache(tmp_path), Scorer(model())

    def broken(*args: Tensor) -> Any:
        scores = scorer(*args)
        scores.logprobs[1, 2] = torch.nan
        return scores

    with pytest.warns(UserWarning, match="have NaN: they are not kept"):
        cache.scorer(broken, revision="1")(*batch())
    assert len(cache) == 2


def test_a_scorer_is_known_by_its_fingerprint_and_the_revision(tmp_path: Path) -> None:
    cache, scorer = TeacherCache(tmp_path), Scorer(model())
    cache.scorer(scorer, revision="1")(*batch())
    cache.scorer(scorer, revision="2")(*batch())
    cache.scorer(Scorer(model(), top_k=3), revision="1")(*batch())
    assert cache.stats()["misses"] == 9
    with pytest.raises(TypeError, match="revision must be given for a scorer without an attribute fingerprint"):
        cache.scorer(lambda *args: scorer(*args))


def test_states_are_found_at_every_temperature(tmp_path: Path) -> None:
    """A scorer with a head returns hidden states, which do not depend on the temperature of its head."""
    teacher = model()

    class States(Scorer):
        def __init__(self, temperature: float) -> None:
            super().__init__(teacher)
            self.temperature, self.head = temperature, object()

        def __call__(self, ids: Tensor, attention: Tensor, mask: Tensor) -> fg.LinearHead:
            self.asked += len(ids)
            states = last_hidden_state(teacher, ids, attention, keep=mask.shape[1]).detach()
            return head_of(teacher, states, temperature=self.temperature)

    cache, asked = TeacherCache(tmp_path), []
    for temperature in (1.0, 0.5):
        scorer = States(temperature)
        cached = cache.scorer(scorer)
        assert (cached.temperature, cached.head) == (temperature, scorer.head)
        assert_same(cached(*batch()), States(temperature)(*batch()), batch()[2])
        assert cached(*batch()).temperature == temperature
        asked.append(scorer.asked)
    assert asked == [3 + 1, 1]  # all, and one to see that it is the same
    assert not hasattr(cache.scorer(), "temperature")


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_scorer_with_other_scores_than_before_is_an_error(top_k: int | None, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path)
    cache.scorer(Scorer(model(), top_k))(*batch())
    with pytest.raises(TeacherCacheError, match=r"is not the teacher whose scores .* log-probs of one sequence differ"):
        cache.scorer(Scorer(model(seed=1), top_k))(*batch())


def test_the_head_of_another_model_is_an_error(tmp_path: Path) -> None:
    teacher, cache = model(), TeacherCache(tmp_path / "cache")
    expected = cache.scorer(teacher, name="teacher")(*batch())
    places = {name: tmp_path / name for name in ("teacher", "other")}
    teacher.save_pretrained(places["teacher"])
    model(1).save_pretrained(places["other"])
    found = cache.scorer(name="teacher", head=places["teacher"], temperature=0.5)(*batch())
    assert_same(found, expected, batch()[2])
    assert found.temperature == 0.5
    with pytest.raises(TeacherCacheError, match="head must be the head of 'teacher'"):
        cache.scorer(name="teacher", head=places["other"])(*batch())
    with pytest.raises(TeacherCacheError, match="hidden states of 'teacher', which need its head: give head="):
        cache.scorer(name="teacher")(*batch())
    with pytest.raises(TypeError, match="head must be a path, or what load_head returns, got function"):
        cache.scorer(name="teacher", head=lambda hidden: hidden)
    for given in (None, Scorer(model())):
        with pytest.raises(TypeError, match=r"temperature is that of a model, or of head; .*, got 0.5"):
            cache.scorer(given, name="teacher", temperature=0.5)


def test_a_head_of_16_bits_is_that_of_a_model_that_was_loaded_in_32(tmp_path: Path) -> None:
    model().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    cache = TeacherCache(tmp_path / "cache")
    expected = cache.scorer(teacher, name="teacher")(*batch())
    assert_same(cache.scorer(head=tmp_path / "teacher")(*batch()), expected, batch()[2])


# ------------------------------------------------------------------------------------------------------ without teacher


def test_without_a_teacher_a_missing_sequence_is_named(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path)
    with pytest.raises(TeacherCacheError, match="it has none"):
        cache.scorer(name="teacher")
    cache.scorer(Scorer(model()), name="teacher")(*batch())
    ids, attention, mask = batch()
    ids[1, 9] = (ids[1, 9] + 1) % VOCAB
    first = ", ".join(map(str, ids[1, 3:].tolist()))
    with pytest.raises(TeacherCacheError, match=rf"1 of 3 sequences .* 'teacher' .*sequence 1 .*7 tokens \[{first}\]"):
        cache.scorer()(ids, attention, mask)
    with pytest.raises(TeacherCacheError, match=r"one model called 'other'; it has .*, teacher "):
        cache.scorer(name="other")


def test_a_scorer_that_is_not_opened_holds_no_file(tmp_path: Path) -> None:
    """While one is open nothing is removed, and the error's traceback keeps it alive."""
    TeacherCache(tmp_path).scorer(Scorer(model()))(*batch())
    with pytest.raises(TeacherCacheError) as kept:
        TeacherCache(tmp_path).scorer(name="other")
    full = TeacherCache(tmp_path, max_bytes=TeacherCache(tmp_path).nbytes + 10)
    full.scorer(Scorer(model()))(*batch(1))
    assert full.stats()["removed"] > 0
    del kept


@pytest.mark.parametrize("shape", [(3, K + 2), (1, K)])
def test_scores_of_another_shape_are_an_error(shape: tuple[int, int], tmp_path: Path) -> None:
    def scorer(*_: Tensor) -> fg.TokenLogProbs:
        return fg.TokenLogProbs(-torch.ones(shape))

    cache = TeacherCache(tmp_path)
    with pytest.raises(
        ValueError, match=rf"the scorer 'odd' must return TokenLogProbs .* \(3, {K}\) .* got \({shape[0]}, "
    ):
        cache.scorer(scorer, name="odd", revision="1")(*batch())
    assert len(cache) == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", '{"names": 3}', '{"names": [], "settings": {}, "fingerprint": "x"}']
)
def test_a_damaged_description_is_named(content: str, tmp_path: Path) -> None:
    TeacherCache(tmp_path).scorer(Scorer(model()))(*batch())
    (description,) = tmp_path.glob("*/model.json")
    description.write_text(content)
    for teacher in (None, Scorer(model())):
        with pytest.raises(TeacherCacheError, match=r"model\.json is damaged: remove it, and it is written again"):
            TeacherCache(tmp_path).scorer(teacher)
    description.unlink()
    assert TeacherCache(tmp_path).scorer(Scorer(model()))(*batch()).logprobs.shape == (3, K)


# ------------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, how: str, other: Path) -> None:
    content = path.read_bytes()
    if how.startswith("flipped"):
        at = {"first": 9, "middle": len(content) // 2, "last": len(content) - 1}[how.split()[1]]
        content = content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
    elif how == "truncated":
        content = content[:-7]
    elif how == "longer":
        content += b"\0"
    elif how == "of another sequence":
        content = other.read_bytes()
    else:
        content = {"empty": b"", "text": b"hello", "zeros": bytes(len(content))}[how]
    path.write_bytes(content)


HOW = ["flipped first", "flipped middle", "flipped last", "truncated", "longer", "empty", "text", "zeros"]


@pytest.mark.parametrize("how", [*HOW, "of another sequence"])
def test_damage_is_found_named_and_never_scored(how: str, tmp_path: Path) -> None:
    scorer = Scorer(model())
    expected = TeacherCache(tmp_path).scorer(scorer)(*batch()).logprobs
    path, other, _ = sorted(tmp_path.glob("*/*/*.safetensors"))
    damage(path, how, other)
    with pytest.raises(TeacherCacheError, match=rf"{path.name} is damaged \(.*there is no teacher"):
        TeacherCache(tmp_path).scorer()(*batch())
    cache = TeacherCache(tmp_path)
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged \(.*scored again, and the file replaced"):
        found = cache.scorer(scorer)(*batch()).logprobs
    assert torch.equal(found, expected)
    assert cache.stats()["misses"] == 1
    assert torch.equal(TeacherCache(tmp_path).scorer()(*batch()).logprobs, expected)


def test_every_byte_of_a_file_is_covered(tmp_path: Path) -> None:
    scorer = Scorer(model())
    one = [x[1:2] for x in batch()]
    expected = TeacherCache(tmp_path).scorer(scorer)(*one).logprobs
    (path,) = tmp_path.glob("*/*/*.safetensors")
    content = path.read_bytes()
    cached = TeacherCache(tmp_path).scorer()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x21]) + content[at + 1 :])
        try:
            assert torch.equal(cached(*one).logprobs, expected)  # a byte of the metadata that nothing reads
        except TeacherCacheError:
            continue
        assert at < 8 + int.from_bytes(content[:8], "little"), at  # none of the scores'


def test_files_are_read_by_safetensors_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    teacher = model()
    TeacherCache(tmp_path).scorer(teacher, name="teacher")(*[x[1:2] for x in batch()])
    (path,) = tmp_path.glob("*/*/*.safetensors")
    found = load_file(path)
    assert found["ids"].tolist() == batch()[0][1, 3:].tolist()
    assert found["positions"].tolist() == [2, 3, 4, 5, 6]
    torch.testing.assert_close(found["hidden"], _states(teacher)[1])
    description = json.loads((path.parent.parent / "model.json").read_text())
    assert description["names"] == ["teacher"]
    assert description["fingerprint"] == fingerprint(teacher)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"path must be a teacher's cache.*other files \(thesis.tex"):
        TeacherCache(tmp_path)
    with pytest.raises(ValueError, match="path must be a folder, got the file"):
        TeacherCache(tmp_path / "thesis.tex")
    TeacherCache(tmp_path / "new")
    for content, message in (('{"format": 99}', "has format 99"), ("x", "is damaged")):
        (tmp_path / "new" / "teacher-cache.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            TeacherCache(tmp_path / "new")


# ---------------------------------------------------------------------------------------------------------------- size


def test_the_least_recently_used_sequences_make_room(tmp_path: Path) -> None:
    scorer = Scorer(model())
    TeacherCache(tmp_path).scorer(scorer)(*batch())
    a, b, c = (path for _, path in sorted((p.stat().st_size, p) for p in tmp_path.glob("*/*/*.safetensors")))
    size = TeacherCache(tmp_path).nbytes
    for age, path in ((300, a), (100, b), (200, c)):
        os.utime(path, (time.time() - age,) * 2)
    cache = TeacherCache(tmp_path, max_bytes=size + 10)
    for seed in range(1, 20):
        cache.scorer(scorer)(*batch(seed))
        # each process looks at the size before it has written a sixteenth more
        assert cache.nbytes <= cache.max_bytes
        if seed == 1:
            assert not a.exists()
    assert cache.stats()["removed"] > 30
    assert cache.nbytes > size / 2
    assert cache.stats()["unwritten"] == 0


def test_what_was_just_read_is_not_what_is_removed(tmp_path: Path) -> None:
    scorer = Scorer(model())
    kept = TeacherCache(tmp_path).scorer(scorer)(*batch()).logprobs
    for path in tmp_path.glob("*/*/*.safetensors"):
        os.utime(path, (1, 1))
    cache = TeacherCache(tmp_path, max_bytes=int(2.5 * TeacherCache(tmp_path).nbytes))
    cached = cache.scorer(scorer)
    for seed in range(1, 10):
        cached(*batch(seed))
        time.sleep(0.01)  # clocks of file systems are coarse
        assert torch.equal(cached(*batch()).logprobs, kept)
    assert cache.stats()["misses"] == 27


def test_a_scorer_without_a_teacher_loses_nothing(tmp_path: Path) -> None:
    scorer = Scorer(model())
    expected = TeacherCache(tmp_path).scorer(scorer)(*batch()).logprobs
    offline = TeacherCache(tmp_path).scorer()
    cache = TeacherCache(tmp_path, max_bytes=TeacherCache(tmp_path).nbytes + 10)
    with pytest.warns(UserWarning, match="is full .*a scorer without a teacher is open"):
        cache.scorer(scorer)(*batch(1))
    assert cache.stats()["unwritten"] == 3
    assert torch.equal(offline(*batch()).logprobs, expected)
    del offline
    cache.scorer(scorer)(*batch(1))
    assert cache.stats()["unwritten"] == 3
    assert cache.stats()["removed"] >= 2  # of which size depends on the order of their last uses


def test_a_sequence_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, max_bytes=100)
    with pytest.warns(UserWarning, match="a sequence alone has more"):
        cache.scorer(Scorer(model()))(*batch())
    assert len(cache) == 0


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, scorer = TeacherCache(tmp_path), Scorer(model())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match=r"cannot be written to .*\(No space left on device"):
        found = cache.scorer(scorer)(*batch())
    assert torch.equal(found.logprobs, scorer(*batch()).logprobs)
    assert cache.stats()["unwritten"] == 3
    assert not list(tmp_path.glob("*/*/*"))  # no part of a file


# ----------------------------------------------------------------------------------------------------------- processes


def score_forever(path: Path, max_bytes: int | None) -> None:
    scorer = Scorer(model())
    cached = TeacherCache(path, max_bytes=max_bytes).scorer(scorer)
    for i in itertools.count():
        cached(*batch(i % 30))


@pytest.mark.parametrize("max_bytes", [None, 30_000])
def test_processes_share_a_cache_and_may_be_killed_at_any_time(max_bytes: int | None, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    torch.manual_seed(0)
    scorer = Scorer(model())
    expected = [scorer(*batch(i)).logprobs for i in range(30)]
    for _ in range(2):
        others = [context.Process(target=score_forever, args=(tmp_path, max_bytes)) for _ in range(2)]
        for process in others:
            process.start()
        cache = TeacherCache(tmp_path, max_bytes=max_bytes)
        cached = cache.scorer(scorer)
        for i in range(30):
            assert torch.equal(cached(*batch(i)).logprobs, expected[i])
        for process in others:
            assert process.is_alive()
            process.kill()
            process.join()
        assert (cache.stats()["damaged"], cache.stats()["unwritten"]) == (0, 0)
    cache = TeacherCache(tmp_path)
    if max_bytes is None:
        offline = cache.scorer()
        for i in range(30):
            assert torch.equal(offline(*batch(i)).logprobs, expected[i])
    else:
        assert cache.nbytes <= max_bytes * (1 + 3 / 16)


# ------------------------------------------------------------------------------------------------------------ trainers


@pytest.fixture
def trl() -> Any:
    pytest.importorskip("trl", minversion="1.16")
    import test_trl

    return test_trl


def silenced(made: Any) -> Any:
    """A model with its weights whose body cannot run."""

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the body ran")

    made.model.forward = run
    return made


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"estimator": "topk", "k": 8}, {"route_column": "domain"}])
def test_a_run_with_teacher_and_reference_from_the_cache_is_the_live_run(
    options: dict[str, Any], trl: Any, tmp_path: Path
) -> None:
    data = trl.prompts(domain=["a", "b"] * 4)

    def run(how: Callable[[Any], Any], **more: Any) -> Any:
        teacher, ref = how(trl.model(1, hidden=48)), how(trl.model(2))
        routed: Any = {"a": teacher, "b": how(trl.model(3))} if "route_column" in options else teacher
        made = trl.trainer(
            tmp_path,
            teacher=routed,
            ref_model=ref,
            data=data,
            reward_scale=1.25,
            max_steps=4,
            **trl.SGD,
            **options,
            **more,
        )
        made.train()
        return made

    live = run(lambda x: x)
    filling = run(lambda x: x, teacher_cache=str(tmp_path / "cache"))
    filled = run(silenced, teacher_cache=str(tmp_path / "cache"))
    for other in (filling, filled):
        trl.assert_same(trl.weights(live), trl.weights(other), 1e-5)
    assert filled._cache.stats()["misses"] == 0
    assert filling._cache.stats()["misses"] > 0
    assert filled.state.log_history[0]["gopd/cache_hits"] == 1


def test_the_base_of_an_adapter_is_cached_too(trl: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def run(**more: Any) -> Any:
        made = trl.trainer(tmp_path, ref_model="base", reward_scale=1.25, peft_config=lora, **trl.SGD, **more)
        made.train()
        return made

    live, filling, filled = run(), *(run(teacher_cache=str(tmp_path / "cache")) for _ in range(2))
    trl.assert_same(trl.weights(live), trl.weights(filled), 1e-5)
    assert filling._cache.stats()["hits"] == 0
    assert filled._cache.stats()["misses"] == 0
    assert len(filled._cache.models()) == 2


def resumable(path: str, killed: bool) -> None:
    from transformers import TrainerCallback

    import test_trl as trl

    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if killed and state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "teacher_cache": f"{path}/cache"}
    run = trl.trainer(Path(path), ref_model=trl.model(2), reward_scale=1.25, callbacks=[Killed()], **trl.SGD, **options)
    run.train(resume_from_checkpoint=None if killed else True)
    torch.save(trl.weights(run), f"{path}/weights")


def test_a_killed_run_resumes_with_what_it_had_scored(trl: Any, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=resumable, args=(str(tmp_path), True))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    before = len(TeacherCache(tmp_path / "cache"))
    assert before == 2 * 3 * 4  # of two models, three steps of four sequences
    resumable(str(tmp_path), False)
    expected = trl.trained(tmp_path / "live", ref_model=trl.model(2), reward_scale=1.25, max_steps=6, **trl.SGD)
    trl.assert_same(expected, torch.load(tmp_path / "weights"), 1e-5)
    # the third step was scored before: it is not scored again
    assert len(TeacherCache(tmp_path / "cache")) == 2 * 6 * 4


def _ranked(folder: str) -> list[tuple[dict[str, Tensor], dict[str, int] | None]]:
    """On each rank: a live run, one that fills a cache, and one from it."""
    import test_trl as trl

    found = []
    for cache in (None, f"{folder}/cache", f"{folder}/cache"):
        options = {"ref_model": trl.model(2), "reward_scale": 1.25, "per_device_train_batch_size": 1, **trl.SGD}
        run = trl.trainer(Path(folder), teacher_cache=cache, **options)
        run.train()
        found.append((trl.weights(run), run._cache and run._cache.stats()))
    return found


@pytest.mark.ranks
def test_two_ranks_share_a_cache(trl: Any, tmp_path: Path) -> None:
    for live, filling, filled in run_on_ranks("test_cache:_ranked", 2, str(tmp_path)):
        trl.assert_same(live[0], filling[0], 1e-5)
        trl.assert_same(live[0], filled[0], 1e-5)
        assert filled[1]["misses"] == 0
        assert filled[1]["hits"] > 0


def test_what_the_trainer_cannot_cache_is_refused(trl: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="teacher_cache stores what models here compute, and teacher is a scorer"):
        trl.trainer(tmp_path, teacher=lambda *_: None, estimator="sampled", teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="teacher_cache_max_bytes needs teacher_cache"):
        trl.trainer(tmp_path, teacher_cache_max_bytes=10)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="path must be a folder"):
        trl.trainer(tmp_path, teacher_cache=str(tmp_path / "file"))


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_a_cached_scorer_is_a_teacher_of_the_trainer(estimator: str, trl: Any, tmp_path: Path) -> None:
    teacher, cache = trl.model(1, hidden=48), TeacherCache(tmp_path / "cache")
    teacher.save_pretrained(tmp_path / "teacher")
    options = {"estimator": estimator, **trl.SGD}
    live = trl.trained(tmp_path, teacher=teacher, **options)
    if estimator == "full":
        trl.trained(tmp_path, teacher=teacher, teacher_cache=str(tmp_path / "cache"), **options)
        trl.assert_same(live, trl.trained(tmp_path, teacher=cache.scorer(teacher), **options), 1e-5)
        assert cache.stats()["misses"] == 0
        cached = cache.scorer(head=tmp_path / "teacher")
    else:
        scorer = Scorer(teacher)
        trl.assert_same(live, trl.trained(tmp_path, teacher=cache.scorer(scorer), **options), 1e-5)
        cached = TeacherCache(tmp_path / "cache").scorer()
    trl.assert_same(live, trl.trained(tmp_path, teacher=cached, **options), 1e-5)


def test_a_folder_has_one_cache_in_a_run(trl: Any, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", max_bytes=10**6)
    teacher = cache.scorer(Scorer(trl.model(1)))
    options = {"estimator": "sampled", "teacher_cache": str(tmp_path / "cache"), "teacher": teacher}
    run = trl.trainer(tmp_path, **options)
    assert run._cache is cache
    run.train()
    assert any("gopd/cache_hits" in row for row in run.state.log_history)
    with pytest.raises(ValueError, match="must be that of teacher's cache in the same folder, 1000000, got 10"):
        trl.trainer(tmp_path, teacher_cache_max_bytes=10, **options)
    assert trl.trainer(tmp_path, **{**options, "teacher_cache": str(tmp_path / "other")})._cache is not cache


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    root = Path(__file__).resolve().parents[2]
    benchmark = pytest.importorskip("benchmarks.teacher_cache")
    found = json.loads((root / "benchmarks" / "results" / "teacher-cache.json").read_text())
    page = (root / "docs" / "teachers.md").read_text(encoding="utf-8")
    assert benchmark.table(found["rows"], found["body"]["seconds"]) in page
