"""From the loop's statistics to what a call returns. Nothing here differentiates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import functorch
from .loop.estimators.base import TokenValues, model_logprobs
from .objective.divergences import ReverseKL, divergence_value, kl_to_target
from .objective.kl_estimates import KL_ESTIMATES
from .objective.layout import TokenRow, pass_rows, statistics_rows
from .objective.policy import advantage
from .objective.statistics import entropy
from .objective.supervised import label_report
from .output import GOPDOutput
from .problem import Problem
from .rowops import PolicyStat
from .scoring import logprobs_under
from .tokens import TokenRows, host_sync_forbidden


def report(problem: Problem, loss: Tensor, values: TokenValues, statistics: Tensor) -> GOPDOutput:
    """The output of a fused loss, from its token values and the statistics (STATISTICS, n)."""
    scale, rows, mask = problem.reward_scale, problem.rows, problem.mask
    if scale is None:
        scale = statistics[TokenRow.REWARD_SCALE]
    routed = "teacher_index" in problem.reported
    joint = problem.joint
    known: dict[str, Any] = {"loss": loss, "reward_scale": scale, "joint": joint, "teachers": len(problem.routes)}
    # copies of what may be the caller's own memory, which may change before a field is read; neither has a gradient
    if mask is not None:
        known["mask"] = mask = mask.clone()
        rows = rows if rows.keep is None else replace(rows, keep=mask)
    if isinstance(scale, Tensor):
        scale = scale.clone()
        known["reward_scale"] = rows.scatter(scale)
    for name, models in problem.cancelled:
        known[f"{name}_logprobs"] = rows.scatter(logprobs_under(models, problem))
    has, options, of_kl_ref = problem.has, problem.options, None
    if problem.has_terms:
        # rows of the terms beside the loss are left out; a KL estimate needs the reference whatever lambda is
        rows_of_loss = statistics_rows(options.estimator, options.joint)
        if options.kl_ref == "exact":
            of_kl_ref = statistics[pass_rows(rows_of_loss, options.passes.index("kl_ref"))]
        statistics = statistics[:rows_of_loss]
        has = has[0], has[1] or options.kl_ref in KL_ESTIMATES
    fields = _Fields(
        statistics=statistics,
        values=values,
        rows=rows,
        reward_scale=scale,
        has=has,
        joint_composite=problem.has_composite and joint,
        joint=joint,
        estimator=options.estimator,
        logprob_min=options.logprob_min,
        labels=problem.labels,
        of_kl_ref=of_kl_ref,
        bounds=_bounds(problem) if routed else [],
    )
    out = GOPDOutput.computed_by(fields.field, problem.reported, **known)
    if host_sync_forbidden(problem.device) or functorch.active():
        # a graph writes its outputs at each replay, and a transform's tensors end with it: nothing can wait
        for name in problem.reported:
            getattr(out, name)
    return out


class _Fields(NamedTuple):
    """The fields of an output, one at a time. It holds statistics of the tokens, and no model."""

    statistics: Tensor  # (STATISTICS, n)
    values: TokenValues
    rows: TokenRows
    reward_scale: float | Tensor  # tensor: (n,)
    has: tuple[bool, bool]
    joint_composite: bool  # whether models are taken together, and any is made of several
    joint: bool
    estimator: str
    logprob_min: float | None
    labels: Tensor | None  # (n,)
    of_kl_ref: Tensor | None  # (len(Stat), n) of the KL penalty
    bounds: list[tuple[int, int]]  # start and stop of each route, where there is a teacher_index

    def field(self, name: str) -> Tensor:
        # read in inference mode, a field would be an inference tensor ever after
        with torch.inference_mode(False), torch.no_grad():
            vector = self._vector(name)
            assert vector is not None
            # cloned: scatter may return a view, and no output shares memory with another
            return self.rows.scatter(vector.detach().clone())

    def _vector(self, name: str) -> Tensor | None:
        """(n,) of the live tokens."""
        statistics, policy, loss_factors = self.statistics, self.values.policy, self.values.loss_factors
        if name == "token_loss":
            return self.values.loss
        if name == "entropy":
            return entropy(statistics)
        if name == "kl":
            return statistics[TokenRow.TOPK_KL] if self.estimator == "topk" else kl_to_target(statistics)
        if name == "kl_ref":
            assert self.of_kl_ref is not None
            return divergence_value(ReverseKL(), 0.0, self.of_kl_ref, (False, True))
        if name in ("label_logprobs", "labelled"):
            return label_report(statistics[TokenRow.LOGPROB_LABEL], self.labels)[name == "labelled"]
        if name == "teacher_index":
            return _route_of_each(self.bounds, statistics.device)
        if policy is not None and name in _OF_POLICY:
            row = policy[_OF_POLICY[name]]
            return row != 0 if name == "clipped" else row
        if loss_factors is not None and name in ("importance", "clipped"):
            return loss_factors[0] if name == "importance" else loss_factors[1] != 0
        logprobs = model_logprobs(self.has, statistics, joint_composite=self.joint_composite)
        if name == "advantages":
            student, *frozen = logprobs
            if self.logprob_min is not None:
                frozen = [None if x is None else x.clamp_min(self.logprob_min) for x in frozen]
            return advantage(self.reward_scale, student, *frozen)[0]
        return dict(zip(("student_logprobs", "teacher_logprobs", "ref_logprobs"), logprobs, strict=True))[name]


def _bounds(problem: Problem) -> list[tuple[int, int]]:
    """Start and stop of each route among the live tokens."""
    return [(route.start, route.stop) for route in problem.routes]


def _route_of_each(bounds: list[tuple[int, int]], device: torch.device) -> Tensor:
    """(n,) int64, from start and stop of each route."""
    return torch.cat([torch.full((stop - start,), i, device=device) for i, (start, stop) in enumerate(bounds)])


_OF_POLICY = {
    "advantages": PolicyStat.ADVANTAGE,
    "clipped": PolicyStat.CLIPPED,
    "importance": PolicyStat.IMPORTANCE,
}


def output_of(problem: Problem, loss: Tensor, vectors: dict[str, Tensor | None]) -> GOPDOutput:
    """The output from vectors (n,) of the live tokens, of which those that are reported are taken."""
    fields: dict[str, Any] = dict.fromkeys(("advantages", "student_logprobs", "teacher_logprobs", "ref_logprobs", "kl"))
    if "teacher_index" in problem.reported:
        vectors["teacher_index"] = _route_of_each(_bounds(problem), problem.device)
    for name in problem.reported:
        x = problem.reward_scale if name == "reward_scale" else vectors[name]
        assert isinstance(x, Tensor)
        # cloned: scatter may return a view, and no output shares memory with another or with an input
        fields[name] = problem.rows.scatter(x.detach().clone())
    if not isinstance(problem.reward_scale, Tensor):
        fields["reward_scale"] = problem.reward_scale
    mask = None if problem.mask is None else problem.mask.clone()
    return GOPDOutput(loss=loss, **fields, mask=mask, teachers=len(problem.routes), joint=problem.options.joint)
