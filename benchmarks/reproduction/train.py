"""Training and scoring of the tiny models: supervised, GRPO, distillation. All losses are computed by fused_gopd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import fused_gopd as fg

from . import models, tasks

Batch = tuple[Tensor, Tensor]  # prompts (n, 8), responses (n, 14)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adam(model: LlamaForCausalLM, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95), foreach=True)


def cosine(step: int, steps: int) -> float:
    """Factor on the learning rate, which falls from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# ------------------------------------------------------------------------------------------------------- supervised


def supervise(model: LlamaForCausalLM, batches: Iterator[Batch], steps: int, lr: float) -> None:
    """Maximise the likelihood of responses, with a short warm-up and a cosine decay to 0."""
    warmup = max(1, min(50, steps // 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / warmup) * cosine(i, steps))
    for _, (prompt, response) in zip(range(steps), batches, strict=False):
        mask = tasks.live(response)
        logprobs = fg.token_logprobs(models.head(model, prompt, response), response, mask=mask)
        _step(model, optimizer, -logprobs.sum() / mask.sum())
        schedule.step()


def training_data(errors: tasks.Errors, batch: int, seed: int) -> Iterator[Batch]:
    """An endless stream of solutions with errors, half from each domain."""
    g = generator(seed)
    while True:
        prompt = tasks.prompts("both", batch, g)
        yield prompt, tasks.solutions(prompt, errors, g)


def answers_of(teachers: dict[str, LlamaForCausalLM], batch: int, seed: int) -> Iterator[Batch]:
    """Samples of the teachers, each in its domain: the data of off-policy distillation."""
    g = generator(seed)
    while True:
        pairs = []
        for domain, teacher in teachers.items():
            prompt = tasks.prompts(domain, batch // len(teachers), g)
            pairs.append((prompt, models.sample(teacher, prompt, g)))
        yield torch.cat([p for p, _ in pairs]), torch.cat([r for _, r in pairs])


# ------------------------------------------------------------------------------------------- reinforcement learning


def grpo_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    domain: str,
    g: torch.Generator,
    groups: int = 16,
    size: int = 8,
) -> float:
    """One on-policy update with group-relative advantages and no KL term. Returns the mean reward."""
    prompt = tasks.prompts(domain, groups, g).repeat_interleave(size, 0)
    response = models.sample(model, prompt, g)
    reward = tasks.correct(prompt, response).float().view(groups, size)
    advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
    mask = tasks.live(response)
    logprobs = fg.token_logprobs(models.head(model, prompt, response), response, mask=mask)
    _step(model, optimizer, -(advantage.view(-1, 1) * logprobs).sum() / mask.sum())
    return float(reward.mean())


# ----------------------------------------------------------------------------------------------------- distillation


@dataclass(frozen=True)
class Distillation:
    """How a student is trained; ``dense`` uses the dense reference loss instead of the fused one.

    The learning rate decays to 0 over the steps: at a constant one, what is scored is the end of a walk around the
    optimum, which differs from seed to seed by more than what one λ does from the next.
    """

    domain: str
    reward_scale: float
    steps: int = 60
    lr: float = 3e-4
    batch: int = 128
    estimator: str = "sampled"
    options: dict[str, Any] = field(default_factory=dict)
    dense: bool = False
    stop: int | None = None  # stop after so many steps, before the learning rate has decayed

    def loss(self, *heads: Any, **rest: Any) -> fg.GOPDOutput:
        function: Callable[..., fg.GOPDOutput] = fg.reference.gopd_loss if self.dense else fg.gopd_loss
        options: dict[str, Any] = {
            "reward_scale": self.reward_scale,
            "estimator": self.estimator,
            "score_cancelled": True,
            **self.options,
        }
        return function(*heads, **options, **rest)


@torch.no_grad()
def _routed(teachers: dict[str, LlamaForCausalLM], prompt: Tensor, response: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Heads of the teachers for the loss; each of several teachers only scores the prompts of its domain."""
    if len(teachers) == 1:
        (teacher,) = teachers.values()
        return models.head(teacher, prompt, response), {}
    of_addition, heads = tasks.is_addition(prompt), []
    for domain, teacher in teachers.items():
        rows = of_addition if domain == "addition" else ~of_addition
        part = models.head(teacher, prompt[rows], response[rows])
        hidden = part.hidden.new_zeros(len(prompt), *part.hidden.shape[1:])
        hidden[rows] = part.hidden
        heads.append(fg.LinearHead(hidden, part.weight))
    return heads, {"teacher_index": torch.where(of_addition, *(list(teachers).index(d) for d in tasks.DOMAINS))}


def rollout_loss(
    student: LlamaForCausalLM,
    teachers: dict[str, LlamaForCausalLM],
    reference: LlamaForCausalLM,
    prompt: Tensor,
    response: Tensor,
    how: Distillation,
) -> fg.GOPDOutput:
    """The loss of a rollout."""
    teacher, route = _routed(teachers, prompt, response)
    with torch.no_grad():
        ref = models.head(reference, prompt, response)
    return how.loss(models.head(student, prompt, response), teacher, ref, response, mask=tasks.live(response), **route)


def _log_ratios(out: fg.GOPDOutput) -> dict[str, float]:
    """Means of log p - log q and log p - log r over the live tokens."""
    p, others = out.student_logprobs, {"teacher": out.teacher_logprobs, "ref": out.ref_logprobs}
    assert p is not None
    live = torch.ones_like(p, dtype=torch.bool) if out.mask is None else out.mask
    return {f"log_ratio_{k}": float((p - x)[live].mean()) for k, x in others.items() if x is not None}


def distill(
    student: LlamaForCausalLM,
    teachers: dict[str, LlamaForCausalLM],
    reference: LlamaForCausalLM,
    how: Distillation,
    seed: int,
) -> list[dict[str, float]]:
    """On-policy distillation with one update per rollout. Returns metrics, length and accuracy of each."""
    g, optimizer, history = generator(seed), adam(student, how.lr), []
    for i in range(how.steps if how.stop is None else how.stop):
        optimizer.param_groups[0]["lr"] = how.lr * cosine(i, how.steps)
        prompt = tasks.prompts(how.domain, how.batch, g)
        response = models.sample(student, prompt, g)
        out = rollout_loss(student, teachers, reference, prompt, response, how)
        _step(student, optimizer, out.loss)
        signals = out.metrics().to_dict() | _log_ratios(out)
        signals["length"] = signals.pop("tokens") / how.batch
        history.append(signals | {"accuracy": float(tasks.correct(prompt, response).float().mean())})
    return history


# ---------------------------------------------------------------------------------------------------------- scoring


def evaluate(model: LlamaForCausalLM, domain: str, n: int) -> dict[str, float]:
    """Accuracy at temperature 1 on the first n of a fixed list of prompts, and statistics of the answers."""
    g = generator(20_000)
    prompt = tasks.prompts(domain, n, g)
    response = torch.cat([models.sample(model, part, g) for part in prompt.split(1024)])
    right, scratch = tasks.correct(prompt, response), response[:, 0] == tasks.SCRATCH
    length = tasks.live(response).sum(1).float()

    def share(values: Tensor, among: Tensor) -> float:
        return float(values[among].float().mean()) if among.any() else float("nan")

    return {
        "accuracy": 100 * float(right.float().mean()),
        "length": float(length.mean()),
        "scratch": 100 * float(scratch.float().mean()),
        "accuracy_direct": 100 * share(right, ~scratch),
        "accuracy_scratch": 100 * share(right, scratch),
        "length_right": share(length, right),
        "length_wrong": share(length, ~right),
    }
