"""On-policy training with ``gopd_loss`` and held-out evaluation.

Every model is given to the loss as hidden states and a head: this file never makes logits of all tokens.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg

from .policy import Answers, Network
from .prompts import Prompt

# "Arr", "Arrr!", "Arrgh" as whole words: "arrive" does not count
_ARR = re.compile(r"\barr+g?h?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Schedule:
    """How long to train. A rollout is ``prompts_per_rollout`` answers of ``new_tokens`` tokens by the current student.

    With several updates per rollout, all but the first learn from prefixes that an older student wrote.
    """

    rollouts: int
    prompts_per_rollout: int = 8
    new_tokens: int = 32
    updates_per_rollout: int = 4
    learning_rate: float = 3e-3
    eval_answers: int = 2  # per held-out question; 1 in intermediate evaluations, which only draw the curve
    eval_tokens: int = 40
    evaluate_after: tuple[int, ...] = ()  # rollouts after which there is an intermediate evaluation


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics of one student; means per token of its own answers unless noted otherwise."""

    reward: float  # log q - log r of the sampled tokens: the implicit reward
    expected_reward: float  # the same in expectation over the student's next token: KL(p||r) - KL(p||q)
    kl_teacher: float  # KL(p||q), exact at each position
    kl_ref: float  # KL(p||r)
    reward_error: float  # standard error of `reward` over answers
    exclamations: float  # "!" per answer
    arr: float  # share of answers with the word "arr"
    tokens: int
    texts: list[str] = field(repr=False, default_factory=list)  # the first answer to each question

    def figures(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


@dataclass
class TrainingHistory:
    """The metrics of one training run."""

    reward_scale: float
    losses: list[float] = field(default_factory=list)  # the loss of each update
    rollouts: list[dict[str, float]] = field(default_factory=list)  # the student's metrics on each new rollout
    held_out: list[tuple[int, Evaluation]] = field(default_factory=list)  # (updates so far, metrics)

    @property
    def final(self) -> Evaluation:
        """The evaluation after the last update."""
        return self.held_out[-1][1]


@dataclass(frozen=True)
class _Scored:
    """Answers, and the states and heads of the three models on them."""

    answers: Answers
    student: tuple[Tensor, Tensor]  # lower_states of prompt + answer
    teacher: fg.LinearHead
    ref: fg.LinearHead


def _score(network: Network, prompts: Sequence[Prompt], answers: Answers) -> _Scored:
    length = answers.tokens.shape[1]
    plain = network.lower_states([p.plain for p in prompts], answers)
    with torch.no_grad():
        ref = network.hidden(None, plain, length)
        privileged = network.lower_states([p.privileged for p in prompts], answers)
        teacher = network.hidden(None, privileged, length)
    weight = network.head_weight
    return _Scored(answers, plain, fg.LinearHead(teacher, weight), fg.LinearHead(ref, weight))


def _measure(student: fg.LinearHead, scored: _Scored) -> tuple[Tensor, Tensor, Tensor]:
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


def evaluate(
    network: Network,
    adapter: str | None,
    prompts: Sequence[Prompt],
    schedule: Schedule,
    tokenizer: Any,
    *,
    seed: int,
    privileged: bool = False,
    answers_each: int | None = None,
) -> Evaluation:
    """Sample answers of a student (``privileged``: of the teacher) to held-out questions and measure them."""
    repeat = answers_each or schedule.eval_answers
    asked = [p for p in prompts for _ in range(repeat)]
    spoken = [p.privileged if privileged else p.plain for p in asked]
    answers = network.sample(adapter, spoken, schedule.eval_tokens, tokenizer.eos_token_id, seed)
    scored = _score(network, asked, answers)
    if privileged:
        student = scored.teacher
    else:
        with torch.no_grad():
            student = fg.LinearHead(network.hidden(adapter, scored.student, schedule.eval_tokens), network.head_weight)
    log_ratio, kl_teacher, kl_ref = _measure(student, scored)
    count = int(answers.mask.sum())
    lengths = answers.mask.sum(1)
    # standard error of a ratio of sums over answers: answers are independent, tokens of one answer are not
    reward = float(log_ratio.sum() / count)
    residual = log_ratio.sum(1) - reward * lengths
    texts = answers.texts(tokenizer)
    return Evaluation(
        reward=reward,
        expected_reward=float((kl_ref - kl_teacher).sum() / count),
        kl_teacher=float(kl_teacher.sum() / count),
        kl_ref=float(kl_ref.sum() / count),
        reward_error=float(residual.square().sum().sqrt() / count),
        exclamations=statistics.fmean(text.count("!") for text in texts),
        arr=statistics.fmean(bool(_ARR.search(text)) for text in texts),
        tokens=count,
        texts=texts[::repeat],
    )


def train(
    network: Network,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    before: Evaluation,
    reward_scale: float,
    schedule: Schedule,
    tokenizer: Any,
    *,
    seed: int,
    progress: Callable[[str], None] = lambda what: None,
) -> TrainingHistory:
    """Train with one lambda; initial weights and random numbers are the same for every lambda.

    ``progress`` is called :func:`steps` times.
    """
    adapter = f"lambda_{reward_scale:g}".replace(".", "_")
    parameters = network.add_adapter(adapter, seed)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    run = TrainingHistory(reward_scale, held_out=[(0, before)])
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for rollout in range(schedule.rollouts):
        while len(queue) < schedule.prompts_per_rollout:
            queue += torch.randperm(len(prompts), generator=order).tolist()
        asked = [prompts[queue.pop(0)] for _ in range(schedule.prompts_per_rollout)]
        answers = network.sample(
            adapter, [p.plain for p in asked], schedule.new_tokens, tokenizer.eos_token_id, seed + 1000 * rollout
        )
        scored = _score(network, asked, answers)
        progress("answers sampled and scored")
        for update in range(schedule.updates_per_rollout):
            hidden = network.hidden(adapter, scored.student, schedule.new_tokens)
            student = fg.LinearHead(hidden, network.head_weight)
            if update == 0:
                log_ratio, kl_teacher, kl_ref = _measure(fg.LinearHead(hidden.detach(), network.head_weight), scored)
                live = answers.mask.sum()
                run.rollouts.append(
                    {
                        "updates": len(run.losses),
                        "reward": float(log_ratio.sum() / live),
                        "kl_teacher": float(kl_teacher.sum() / live),
                        "kl_ref": float(kl_ref.sum() / live),
                    }
                )
            out = fg.gopd_loss(
                student,
                scored.teacher,
                scored.ref,
                answers.tokens,
                mask=answers.mask,
                reward_scale=reward_scale,
                estimator="full",
            )
            optimizer.zero_grad()
            out.loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            run.losses.append(float(out.loss.detach()))
            progress("updated")
        last = rollout + 1 == schedule.rollouts
        if last or rollout + 1 in schedule.evaluate_after:
            figures = evaluate(
                network, adapter, held_out, schedule, tokenizer, seed=seed + 7, answers_each=None if last else 1
            )
            run.held_out.append((len(run.losses), figures))
            progress("evaluated")
    return run


def steps(schedule: Schedule) -> int:
    """The number of times :func:`train` reports progress."""
    evaluations = len({n for n in schedule.evaluate_after if n < schedule.rollouts}) + 1
    return schedule.rollouts * (1 + schedule.updates_per_rollout) + evaluations
