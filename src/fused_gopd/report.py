"""From the loop's statistics to what a call returns. Nothing here differentiates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loop.estimators.base import TokenValues, model_logprobs
from .objective.policy import advantage
from .objective.statistics import TokenRow, entropy
from .objective.supervised import label_report
from .output import GOPDOutput
from .problem import Problem
from .scoring import logprobs_under


def report(problem: Problem, loss: Tensor, values: TokenValues, statistics: Tensor) -> GOPDOutput:
    """The output of a fused loss, from its token values and the statistics (STATISTICS, n)."""
    reported = problem.reported
    with torch.no_grad():
        vectors: dict[str, Tensor | None] = {"token_loss": values.loss, "entropy": entropy(statistics), "kl": values.kl}
        if problem.token_ids is not None:
            student, teacher, ref = model_logprobs(problem, statistics)
            vectors |= {"student_logprobs": student, "teacher_logprobs": teacher, "ref_logprobs": ref}
            if values.policy is None and "advantages" in reported:
                vectors["advantages"], _ = advantage(problem.reward_scale, student, teacher, ref)
        if values.policy is not None:
            term = values.policy
            vectors |= {"advantages": term.advantages, "clipped": term.clipped, "importance": term.importance}
        if problem.labels is not None:
            label_logprobs, labelled = label_report(statistics[TokenRow.LOGPROB_LABEL], problem.labels)
            vectors |= {"label_logprobs": label_logprobs, "labelled": labelled}
        for name, models in problem.cancelled:
            vectors[f"{name}_logprobs"] = logprobs_under(models, problem)
        return output_of(problem, loss, vectors)


def output_of(problem: Problem, loss: Tensor, vectors: dict[str, Tensor | None]) -> GOPDOutput:
    """The output from vectors (n,) of the live tokens, of which those that are reported are taken."""
    fields: dict[str, Any] = dict.fromkeys(("advantages", "student_logprobs", "teacher_logprobs", "ref_logprobs", "kl"))
    for name in problem.reported:
        x = problem.reward_scale if name == "reward_scale" else vectors[name]
        assert isinstance(x, Tensor)
        # cloned: scatter may return a view, and no output shares memory with another or with an input
        fields[name] = problem.rows.scatter(x.detach().clone())
    if not isinstance(problem.reward_scale, Tensor):
        fields["reward_scale"] = problem.reward_scale
    mask = None if problem.mask is None else problem.mask.clone()
    return GOPDOutput(loss=loss, **fields, mask=mask, joint=problem.options.joint)
