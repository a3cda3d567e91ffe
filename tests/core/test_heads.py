"""What the head types say about themselves, and that they are immutable."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fused_gopd as fg
from builders import make_batch


def test_a_linear_head_knows_its_shapes():
    hidden, weight, bias = torch.zeros(2, 3, 4), torch.zeros(7, 4), torch.zeros(7)
    head = fg.LinearHead(hidden, weight, bias, logit_scale=2, softcap=30, temperature=1)
    assert head.token_shape == (2, 3)
    assert head.vocab_size == 7
    assert head.tensors == {"hidden": hidden, "weight": weight, "bias": bias}
    assert (head.logit_scale, head.softcap, head.temperature) == (2.0, 30.0, 1.0)
    assert set(fg.LinearHead(hidden, weight).tensors) == {"hidden", "weight"}


def test_a_linear_head_is_indexed_by_tokens_as_logits_are():
    hidden, weight = torch.arange(24.0).view(2, 3, 4), torch.arange(28.0).view(7, 4)  # exact, however it is summed
    head = fg.LinearHead(hidden, weight, torch.zeros(7), logit_scale=2, temperature=0.5)
    logits = head.hidden @ head.weight.T
    for index in (slice(1, None), (slice(None), slice(None, -1)), (..., slice(2), slice(None)), torch.tensor([1, 0])):
        part = head[index]
        assert torch.equal(part.hidden @ part.weight.T, logits[index])
        assert part.weight is weight
        assert part.bias is head.bias
        assert (part.logit_scale, part.temperature) == (2, 0.5)
    for index in ((..., slice(3)), (..., 0), (slice(None), slice(None), 2), (..., None), torch.ones(2, 3, 4).bool()):
        with pytest.raises(IndexError, match=r"indexed by tokens, .* of which all V are kept: head\[:, :-1\]"):
            head[index]


def test_logits_know_their_shapes():
    logits = torch.zeros(2, 3, 7)
    head = fg.Logits(logits)
    assert head.token_shape == (2, 3)
    assert head.vocab_size == 7
    assert head.tensors == {"logits": logits}


def test_scores_have_the_token_shape():
    assert fg.TokenLogProbs(torch.zeros(2, 3)).token_shape == (2, 3)


@pytest.mark.parametrize(
    ("head", "field"),
    [
        (fg.LinearHead(torch.zeros(1, 2), torch.zeros(3, 2)), "temperature"),
        (fg.Logits(torch.zeros(1, 3)), "logits"),
        (fg.TokenLogProbs(torch.zeros(1)), "logprobs"),
        (fg.TopKLogProbs(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2)), "token_ids"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_heads_are_immutable(head, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(head, field, None)


def test_the_transform_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        fg.Logits(torch.zeros(1, 3), 2.0)
    with pytest.raises(TypeError, match="positional"):
        fg.LinearHead(torch.zeros(1, 2), torch.zeros(3, 2), None, 2.0)


def test_replacing_a_field_checks_it_again():
    head = fg.LinearHead(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(head, temperature=0.0)


def test_a_head_equals_itself_alone() -> None:
    """Not by its tensors, whose comparison has no truth value."""
    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    first, second = fg.LinearHead(hidden, weight), fg.LinearHead(hidden, weight)
    assert first == first
    assert first != second
    assert len({first, second}) == 2


def test_objects_with_tensors_print_one_short_line_a_field():
    batch, seen = make_batch(0, dtype=torch.float32), []
    out = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask, reward_scale=1.25,
                       advantage_fn=lambda stats: (seen.append(stats), stats.advantages)[1])  # fmt: skip
    text = repr(out)
    assert f"  loss: {out.loss.item():.6g} float32\n" in text
    assert f"  entropy: (2, 5) float32, mean {out.entropy[batch.mask].double().mean().item():.6g}\n" in text
    assert f"  mask: (2, 5) bool, {int(batch.mask.sum())} of 10 True\n" in text
    assert "  kl: None\n" in text
    empty = fg.gopd_loss(*batch.models, batch.token_ids, mask=batch.mask & False)
    logits = fg.Logits(torch.zeros(3, 7, device="meta"))
    no_values = fg.gopd_loss(logits, None, logits, reward_scale=0.0, estimator="full")
    assert "  entropy: (3,) float32 on meta\n" in repr(no_values)
    scores = fg.TopKLogProbs(batch.token_ids[..., None], -torch.ones(2, 5, 1))
    for x in (out, empty, no_values, batch.student, fg.Logits(torch.zeros(2, 7).requires_grad_()), scores, *seen):
        first, *fields, last = repr(x).splitlines()
        assert (first, last) == (f"{type(x).__name__}(", ")")
        assert [line.split(":")[0].strip() for line in fields] == [f.name for f in dataclasses.fields(x)]
        assert all(len(line) < 80 and "tensor(" not in line and "grad" not in line for line in fields), fields
