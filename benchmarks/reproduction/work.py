"""The computations of the stages: functions of the parents' models and a configuration to a model and its results."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM

from . import models, tasks, train

Done = tuple[LlamaForCausalLM | None, dict[str, Any]]
# Number of points of a training history to keep, each the mean of equally many steps.
POINTS = 12


def _scored(model: LlamaForCausalLM, domains: list[str], n: int) -> Done:
    return model, {"scores": {domain: train.evaluate(model, domain, n) for domain in domains}}


def _thinned(history: list[dict[str, float]]) -> dict[str, list[float]]:
    """Columns of means over equal parts of the training."""
    size = max(1, len(history) // POINTS)
    parts = [history[i : i + size] for i in range(0, len(history) - size + 1, size)]
    columns = {name: [round(sum(h[name] for h in part) / size, 5) for part in parts] for name in history[0]}
    return columns | {"step": [(i + 0.5) * size for i in range(len(parts))]}


def base(
    _: list[LlamaForCausalLM],
    *,
    size: str,
    errors: dict[str, Any],
    steps: int,
    lr: float,
    batch: int,
    seed: int,
    n: int,
) -> Done:
    """A model trained on data with errors."""
    model = models.build(size, seed)
    train.supervise(model, train.training_data(tasks.Errors(**errors), batch, seed), steps, lr)
    return _scored(model, list(tasks.DOMAINS), n)


def teacher(
    parents: list[LlamaForCausalLM],
    *,
    domain: str,
    steps: int,
    lr: float,
    seed: int,
    n: int,
    target: float | None = None,
) -> Done:
    """GRPO on one domain, until an accuracy is reached or the steps are done."""
    (model,) = parents
    rewards: list[float] = []
    g, optimizer = train.generator(seed), train.adam(model, lr)
    while len(rewards) < steps:
        rewards.append(train.grpo_step(model, optimizer, domain, g))
        if target is not None and len(rewards) % 2 == 0 and train.evaluate(model, domain, 2048)["accuracy"] >= target:
            break
    model, found = _scored(model, list(tasks.DOMAINS), n)
    return model, found | {"rewards": rewards}


def sft(
    parents: list[LlamaForCausalLM], *, domains: list[str], steps: int, lr: float, batch: int, seed: int, n: int
) -> Done:
    """Off-policy: maximum likelihood of the teachers' samples. Parents: student, teachers."""
    student, *teachers = parents
    data = train.answers_of(dict(zip(domains, teachers, strict=True)), batch, seed)
    train.supervise(student, data, steps, lr)
    return _scored(student, domains, n)


def extrapolate(parents: list[LlamaForCausalLM], *, domains: list[str], scale: float, n: int) -> Done:
    """Weight extrapolation (ExPO): base + scale * sum of (teacher - base), without training."""
    origin, *teachers = parents
    start = {name: p.clone() for name, p in origin.state_dict().items()}
    moved = {name: p + scale * sum(t.state_dict()[name] - p for t in teachers) for name, p in start.items()}
    origin.load_state_dict(moved)
    return _scored(origin, domains, n)


def distill(parents: list[LlamaForCausalLM], *, domains: list[str], how: dict[str, Any], seed: int, n: int) -> Done:
    """On-policy distillation. Parents: student, reference, teachers."""
    student, reference, *teachers = parents
    domain = domains[0] if len(domains) == 1 else "both"
    history = train.distill(
        student, dict(zip(domains, teachers, strict=True)), reference, train.Distillation(domain, **how), seed
    )
    model, found = _scored(student, domains, n)
    return model, found | {"history": _thinned(history)}


def variance(
    parents: list[LlamaForCausalLM],
    *,
    domain: str,
    estimators: dict[str, Any],
    batches: list[int],
    repeats: int,
    seed: int,
) -> Done:
    """Variance of the gradient over rollouts, relative to the squared norm of its mean.

    Parents: student, reference, teacher. All estimators look at the same rollouts. ``result["variance"][name]`` has for
    each batch size tr Cov(g) / |E g|^2, E g by the mean of the ``full`` gradients of all rollouts.
    """
    student, reference, expert = parents
    g = train.generator(seed)
    spread: dict[str, list[torch.Tensor]] = {}
    truth: list[torch.Tensor] = []
    for batch in batches:
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name in estimators}
        for _ in range(repeats):
            prompt = tasks.prompts(domain, batch, g)
            response = models.sample(student, prompt, g)
            for name, how in estimators.items():
                student.zero_grad()
                d = train.Distillation(domain, **how)
                train.rollout_loss(student, {domain: expert}, reference, prompt, response, d).loss.backward()
                gradients[name].append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        for name, values in gradients.items():
            spread.setdefault(name, []).append(torch.stack(values).var(0).sum())
        truth.append(torch.stack(gradients["full"]).mean(0))
    scale = (torch.stack(truth).mean(0) ** 2).sum()
    relative = {name: [float(v / scale) for v in values] for name, values in spread.items()}
    return None, {"batches": batches, "variance": relative}
