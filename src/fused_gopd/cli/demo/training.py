"""On-policy training with ``gopd_loss`` and held-out evaluation.

Every model is given to the loss as hidden states and a head: this file never makes logits of all tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg

from .policy import Answers, Network
from .prompts import Prompt, Schedule


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


@dataclass
class TrainingHistory:
    """One training run."""

    reward_scale: float
    losses: list[float]  # the loss of each update
    rollout_rewards: list[float]  # the student's implicit reward per token on each new rollout
    final: Evaluation  # after the last update


@dataclass(frozen=True)
class Scored:
    """Answers, and the states and heads of the three models on them."""

    answers: Answers
    student: tuple[Tensor, Tensor]  # lower_states of prompt + answer
    teacher: fg.LinearHead
    ref: fg.LinearHead


def ask(
    network: Network,
    adapter: str | None,
    prompts: Sequence[Prompt],
    new_tokens: int,
    end_id: int,
    seed: int,
    *,
    privileged: bool = False,
) -> Scored:
    """Sample a student's answers (``privileged``: the teacher's) and score them by teacher and reference."""
    plain, told = [p.plain for p in prompts], [p.privileged for p in prompts]
    answers = network.sample(adapter, told if privileged else plain, new_tokens, end_id, seed)
    lower = network.lower_states(plain, answers)
    with torch.no_grad():
        ref = network.hidden(None, lower, new_tokens)
    teacher, weight = network.teacher_hidden(told, answers), network.head_weight
    return Scored(answers, lower, fg.LinearHead(teacher, weight), fg.LinearHead(ref, weight))


def _measure(student: fg.LinearHead, scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) each, 0 after the end of an answer: log q - log r of the token, KL(p||q), KL(p||r)."""
    tokens, mask = scored.answers.tokens, scored.answers.mask

    def towards(reward_scale: float, score_cancelled: bool = False) -> fg.GOPDOutput:
        return fg.gopd_loss(
            student,
            scored.teacher,
            scored.ref,
            tokens,
            mask=mask,
            reward_scale=reward_scale,
            estimator="full",
            score_cancelled=score_cancelled,
        )

    with torch.no_grad():
        # the target is the teacher at lambda = 1 and the reference at lambda = 0
        teacher, ref = towards(1.0, score_cancelled=True), towards(0.0)
    assert teacher.teacher_logprobs is not None
    assert teacher.ref_logprobs is not None
    assert teacher.kl is not None
    assert ref.kl is not None
    return teacher.teacher_logprobs - teacher.ref_logprobs, teacher.kl, ref.kl


def evaluate(student: fg.LinearHead, scored: Scored, tokenizer: Any, repeat: int) -> Evaluation:
    """Measure a model on its own answers, ``repeat`` to each question."""
    answers = scored.answers
    log_ratio, kl_teacher, kl_ref = _measure(student, scored)
    count = int(answers.mask.sum())
    # standard error of a ratio of sums over answers: answers are independent, tokens of one answer are not
    reward = float(log_ratio.sum() / count)
    residual = log_ratio.sum(1) - reward * answers.mask.sum(1)
    texts = answers.texts(tokenizer)
    exclamations = [text.count("!") for text in texts]
    return Evaluation(
        reward=reward,
        expected_reward=float((kl_ref - kl_teacher).sum() / count),
        kl_teacher=float(kl_teacher.sum() / count),
        kl_ref=float(kl_ref.sum() / count),
        reward_error=float(residual.square().sum().sqrt() / count),
        excited=statistics.fmean(map(bool, exclamations)),
        exclamations=statistics.fmean(exclamations),
        tokens=count,
        texts=texts[::repeat],
    )


def batch(prompts: Sequence[Prompt], schedule: Schedule, rollout: int, seed: int) -> list[Prompt]:
    """The questions of a rollout: the next ones of a random order, over and over."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    start = rollout * schedule.prompts_per_rollout
    return [prompts[order[i % len(prompts)]] for i in range(start, start + schedule.prompts_per_rollout)]


def train(
    network: Network,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    first: Scored,
    reward_scale: float,
    schedule: Schedule,
    tokenizer: Any,
    *,
    seed: int,
    progress: Callable[[str], None] = lambda what: None,
) -> TrainingHistory:
    """Train with one lambda; initial weights and random numbers are the same for every lambda.

    Args:
        first: the rollout of the untrained student, which is the same for every lambda.
        progress: called ``schedule.steps`` times.
    """
    adapter = f"lambda_{reward_scale:g}".replace(".", "_")
    parameters = network.add_adapter(adapter, seed)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses, rewards = [], []
    for rollout in range(schedule.rollouts):
        scored = first
        if rollout:
            asked = batch(prompts, schedule, rollout, seed)
            scored = ask(network, adapter, asked, schedule.new_tokens, tokenizer.eos_token_id, seed + 1000 * rollout)
        progress(f"rollout {rollout + 1} of {schedule.rollouts} sampled and scored")
        for update in range(schedule.updates_per_rollout):
            hidden = network.hidden(adapter, scored.student, schedule.new_tokens)
            out = fg.gopd_loss(
                fg.LinearHead(hidden, network.head_weight),
                scored.teacher,
                scored.ref,
                scored.answers.tokens,
                mask=scored.answers.mask,
                reward_scale=reward_scale,
                estimator="full",
                score_cancelled=update == 0,  # at lambda = 1 the reference cancels, but the reward needs it
            )
            optimizer.zero_grad()
            out.loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(out.loss.detach()))
            if update == 0:
                assert out.teacher_logprobs is not None
                assert out.ref_logprobs is not None
                rewards.append(float((out.teacher_logprobs - out.ref_logprobs).sum() / scored.answers.mask.sum()))
            progress(f"update {len(losses)}, loss {losses[-1]:.3f}, reward of the rollout {rewards[-1]:+.2f}")
    scored = ask(network, adapter, held_out, schedule.eval_tokens, tokenizer.eos_token_id, seed + 7)
    with torch.no_grad():
        student = fg.LinearHead(network.hidden(adapter, scored.student, schedule.eval_tokens), network.head_weight)
    final = evaluate(student, scored, tokenizer, schedule.eval_answers)
    progress("evaluated on held-out questions")
    return TrainingHistory(reward_scale, losses, rewards, final)
