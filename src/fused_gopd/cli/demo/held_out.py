"""Answers to held-out questions, sampled by transformers, and how far student, teacher and reference are apart on them.

Every model is given to the loss as hidden states and a head: this file never makes logits of all tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

import fused_gopd as fg

from ...integrations.modules import evaluation
from ...integrations.transformers import head_of
from .prompts import hinted, messages


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics of one model; means per token of its own answers unless noted otherwise."""

    reward: float  # log q - log r of the sampled tokens: the implicit reward
    expected_reward: float  # the same in expectation over the model's next token: KL(p||r) - KL(p||q)
    kl_teacher: float  # KL(p||q), exact at each position
    kl_ref: float  # KL(p||r)
    reward_error: float  # standard error of `reward` over answers
    excited: float  # share of answers with a "!"
    exclamations: float  # "!" per answer
    tokens: int
    texts: list[str] = field(repr=False, default_factory=list)  # the first answer to each question


@dataclass(frozen=True)
class Scored:
    """Sampled answers, and the heads of the model that wrote them, of the teacher and of the reference on them."""

    token_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, True up to and including the end of an answer
    writer: fg.LinearHead
    teacher: fg.LinearHead
    ref: fg.LinearHead

    def texts(self, tokenizer: Any) -> list[str]:
        rows = zip(self.token_ids, self.mask, strict=True)
        return [tokenizer.decode(row[live], skip_special_tokens=True) for row, live in rows]


@torch.no_grad()
def ask(
    model: Any, tokenizer: Any, questions: Sequence[str], new_tokens: int, seed: int, *, teacher: bool = False
) -> Scored:
    """Sample an answer to each question at temperature 1, and score it.

    The same seed gives all models the same random numbers, so that their answers differ by their policies alone.

    Args:
        model: the student, with or without a PEFT adapter; without it, it is reference and teacher.
        teacher: whether the teacher answers, in the place of the student.
    """
    plain = [messages(question) for question in questions]
    told = [hinted({"prompt": prompt}) for prompt in plain]
    adapted = hasattr(model, "disable_adapter")
    base = model.disable_adapter if adapted else contextlib.nullcontext

    def encoded(prompts: list[Any], **options: Any) -> Any:
        return tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )

    def head(prompts: list[Any]) -> fg.LinearHead:
        ids = encoded(prompts)["input_ids"]
        return head_of(model, _states(model.get_base_model() if adapted else model, ids, token_ids))

    left = {"padding": True, "return_tensors": "pt", "tokenizer_kwargs": {"padding_side": "left"}}
    read, end = encoded(told if teacher else plain, **left), tokenizer.eos_token_id
    with evaluation(model):
        with torch.random.fork_rng(devices=[]), base() if teacher else contextlib.nullcontext():
            torch.manual_seed(seed)
            sampled = model.generate(
                **read,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                eos_token_id=end,
                pad_token_id=end,
            )[:, read["input_ids"].shape[1] :]
        token_ids = torch.nn.functional.pad(sampled, (0, new_tokens - sampled.shape[1]), value=end)
        ended = token_ids == end
        mask = ended.cumsum(1) - ended.long() == 0
        with base():
            q, r = head(told), head(plain)
        writer = q if teacher else head(plain) if adapted else r
    return Scored(token_ids, mask, writer, q, r)


def _states(model: Any, prompts: list[list[int]], token_ids: Tensor) -> Tensor:
    """(B, T, H) states that predict the answers (B, T): what the prompts begin with in common runs once.

    The rest is padded on the right, which under causal attention has no effect on earlier positions.
    """
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    cache = None
    if common:
        cache = model.base_model(input_ids=torch.tensor([prompts[0][:common]]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    rows = [torch.cat([torch.tensor(p[common:]), answer]) for p, answer in zip(prompts, token_ids, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    states = model.base_model(input_ids=padded, past_key_values=cache, use_cache=True).last_hidden_state
    # the state at a position predicts the next token: the prompt's last state the first one of the answer
    starts = torch.tensor([len(prompt) - common - 1 for prompt in prompts])
    index = starts[:, None] + torch.arange(token_ids.shape[1])
    return cast("Tensor", states.gather(1, index[:, :, None].expand(-1, -1, states.shape[-1])))


@torch.no_grad()
def evaluate(scored: Scored, tokenizer: Any, repeat: int) -> Evaluation:
    """Measure a model on its own answers, ``repeat`` to each question."""

    def towards(reward_scale: float, score_cancelled: bool = False) -> fg.GOPDOutput:
        return fg.gopd_loss(
            scored.writer,
            scored.teacher,
            scored.ref,
            scored.token_ids,
            mask=scored.mask,
            reward_scale=reward_scale,
            estimator="full",
            score_cancelled=score_cancelled,
        )

    # the target is the teacher at lambda = 1 and the reference at lambda = 0
    teacher, ref = towards(1.0, score_cancelled=True), towards(0.0)
    assert teacher.teacher_logprobs is not None
    assert teacher.ref_logprobs is not None
    assert teacher.kl is not None
    assert ref.kl is not None
    log_ratio = teacher.teacher_logprobs - teacher.ref_logprobs  # (B, T), 0 after the end of an answer
    count = int(scored.mask.sum())
    # standard error of a ratio of sums over answers: answers are independent, tokens of one answer are not
    reward = float(log_ratio.sum() / count)
    residual = log_ratio.sum(1) - reward * scored.mask.sum(1)
    texts = scored.texts(tokenizer)
    exclamations = [text.count("!") for text in texts]
    return Evaluation(
        reward=reward,
        expected_reward=float((ref.kl - teacher.kl).sum() / count),
        kl_teacher=float(teacher.kl.sum() / count),
        kl_ref=float(ref.kl.sum() / count),
        reward_error=float(residual.square().sum().sqrt() / count),
        excited=statistics.fmean(map(bool, exclamations)),
        exclamations=statistics.fmean(exclamations),
        tokens=count,
        texts=texts[::repeat],
    )
