"""The sampled estimator from log-probs of the sampled tokens, for RL frameworks that compute these themselves.

The gradient flows to the student's log-probs, so that no head is needed. The formulas are those of
``fused_gopd.objective.policy``, which :func:`fused_gopd.gopd_loss` uses too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import require_device, require_float, require_logprobs, require_shape
from ..objective.policy import PolicyTerm, advantages_of, policy_term, rule_of, sequence_log_ratio
from ..objective.rollout import importance, in_trust_region
from ..option_checks import checked
from ..options import RULES, LossCall, LossOptions, options_of
from ..output import GOPDOutput
from ..plan import check_ratios
from ..tokens import LiveSequences, Sequences, TokenRows, check_cu_seqlens, check_mask
from ..values import refuse_unknown, require_number

__all__ = ["advantages", "metric_sums", "named_metrics", "sampled_loss"]

# All but the baseline, which needs the whole vocabulary.
OPTIONS = tuple(name for name in options_of("sampled") if name not in ("baseline", "store_exponentials"))


# Those that need the log-probs of the engine that sampled.
ROLLOUT = tuple(name for name in OPTIONS if RULES[name].needs == "rollout_logprobs")


def check_options(**options: Any) -> LossOptions:
    """Check options of :func:`sampled_loss`; raises as :func:`fused_gopd.gopd_loss`.

    What an option needs of a batch is taken to be given.
    """
    refuse_unknown(options, OPTIONS, "an option of the sampled estimator on log-probs")
    return checked(LossOptions(**options))


def require_reference(reward_scale: float, ref: object, fix: str) -> float:
    """lambda as a float. Raises where it needs a reference and ``ref`` is None; the message ends with ``fix``."""
    reward_scale = require_number("reward_scale", reward_scale)
    if ref is None and reward_scale != 1:
        raise ValueError(
            f"reward_scale={reward_scale} needs the reference's log-probs, which are not there (reward_scale=1 does "
            f"without): {fix}"
        )
    return reward_scale


def token_losses(
    options: LossOptions,
    advantages: Tensor,
    student_logprobs: Tensor,  # with its gradient
    old: Tensor | None,
    rollout: Tensor | None,
    live: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, PolicyTerm]:
    """-A rho w of live tokens, differentiable in the student's log-probs; 0 at the other tokens."""
    student = student_logprobs.masked_fill(~live, 0)
    known, over = student.detach(), LiveSequences(TokenRows(live.shape, keep=live), sequences)

    def mean(x: Tensor) -> Tensor:
        return over.reduce("mean", x)

    of_sequences = options.ratio in ("sequence", "sequence-mean")
    log_ratio = sequence_log_ratio(known, old, mean) if of_sequences else None
    weights = None
    if rollout is not None:
        weights = importance(options, known if old is None else old, rollout, over)
        weights = in_trust_region(options, weights, advantages, known, rollout, over)
    term = policy_term(rule_of(options), advantages, known, old, weights, log_ratio)
    # value term.loss and derivative term.dlogprob; where log p is -inf the difference would be NaN
    step = torch.where(torch.isneginf(known), 0, student - known)
    if options.ratio == "sequence-mean":
        step = mean(step if old is None else step.masked_fill(torch.isneginf(old), 0))
    return (term.loss + term.dlogprob * step).masked_fill(~live, 0), term


def sampled_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    ref_logprobs: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reward_scale: float = 1.0,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy: Tensor | None = None,
    mixed: bool = False,
    **options: Any,
) -> GOPDOutput:
    """``gopd_loss(estimator="sampled", reduction="none")`` of log-probs, the student's being differentiable.

    Args:
        student_logprobs: (B, T), or (N,) with ``cu_seqlens``; float. Gradients flow to it, and to nothing else.
        teacher_logprobs, ref_logprobs: of the same tokens, under the same temperature. ``ref_logprobs`` may be None for
            ``reward_scale=1``; given there, it serves the metrics alone.
        mask: bool, or 0 and 1 in any dtype; masked entries may hold anything.
        reward_scale: lambda.
        old_logprobs, rollout_logprobs, cu_seqlens: as in :func:`fused_gopd.gopd_loss`.
        entropy: the student's, for the metrics; NaN in the output if not given.
        mixed: ``teacher_logprobs`` are lambda log q + (1 - lambda) log r already, which may be above 0.
        **options: those of the sampled estimator, without ``baseline``, that act on vectors: ``clip``, ``clip_dual``,
            ``ratio``, ``advantage_policy``, ``rollout_is``, ``rollout_is_cap``, ``rollout_mask``, ``trust_region``,
            ``log_ratio_max``, ``loss_max``, ``advantage_clip``, ``logprob_min``.

    Returns:
        The output. Its ``loss`` has the token losses in the token shape, 0 where masked, for the framework to reduce.
        float32, float64 where the student's log-probs are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was found.
    """
    require_float("student_logprobs", student_logprobs)
    shape, device = student_logprobs.shape, student_logprobs.device
    dtype = torch.float64 if student_logprobs.dtype == torch.float64 else torch.float32
    sequences = check_cu_seqlens(cu_seqlens, shape, device)
    given = check_mask(mask, shape, device, "student_logprobs")
    live = torch.ones(shape, dtype=torch.bool, device=device) if given is None else given

    def vector(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        require_float(name, x)
        require_shape(name, x, shape, "student_logprobs")
        require_device(name, x, device)
        return x.detach().to(dtype).masked_fill(~live, 0)

    def logprobs(name: str, x: Tensor | None, needed: bool = True) -> Tensor | None:
        values = vector(name, x)
        if values is not None and needed:
            require_logprobs(name, values)
        return values

    if teacher_logprobs is None:
        raise ValueError("teacher_logprobs must be given")
    reward_scale = require_reference(reward_scale, ref_logprobs, "pass ref_logprobs")
    teacher = logprobs("teacher_logprobs", teacher_logprobs, reward_scale != 0 and not mixed)
    ref = logprobs("ref_logprobs", ref_logprobs, reward_scale != 1)
    old, rollout = logprobs("old_logprobs", old_logprobs), logprobs("rollout_logprobs", rollout_logprobs)
    refuse_unknown(options, OPTIONS, "an option of sampled_loss")
    no_head: Any = None
    call = LossCall(no_head, None, old_logprobs=old, rollout_logprobs=rollout, **options)
    chosen = checked(call)
    check_ratios(call, chosen, sequences)
    known = logprobs("student_logprobs", student_logprobs)
    assert known is not None
    nothing = torch.full_like(known, torch.nan)
    entropy = nothing if entropy is None else vector("entropy", entropy)
    assert entropy is not None
    advantages, _ = advantages_of(
        rule_of(chosen),
        reward_scale=reward_scale,
        student=known,
        teacher=teacher if reward_scale != 0 else None,
        ref=ref if reward_scale != 1 else None,
        old=old if chosen.advantage_policy == "old" else None,
    )
    loss, term = token_losses(chosen, advantages, student_logprobs.to(dtype), old, rollout, live, sequences)
    return GOPDOutput(
        loss=loss,
        token_loss=term.loss.masked_fill(~live, 0),
        advantages=advantages.masked_fill(~live, 0),
        student_logprobs=known,
        teacher_logprobs=teacher,
        ref_logprobs=ref,
        entropy=entropy,
        kl=None,
        clipped=term.clipped & live if chosen.clips else None,
        importance=None if term.importance is None else term.importance.masked_fill(~live, 0),
        mask=live,
        reward_scale=reward_scale,
    )


def advantages(
    student_logprobs: Tensor, teacher_logprobs: Tensor, ref_logprobs: Tensor | None = None, **arguments: Any
) -> Tensor:
    """A = lambda log q + (1 - lambda) log r - log p of the sampled tokens, detached, in the token shape.

    For frameworks with a policy loss of their own. ``student_logprobs`` are those of the policy that their ratio is
    relative to. Arguments as in :func:`sampled_loss`.
    """
    result = sampled_loss(student_logprobs.detach(), teacher_logprobs, ref_logprobs, **arguments).advantages
    assert result is not None
    return result


def named_metrics(out: GOPDOutput, prefix: str = "") -> dict[str, Tensor]:
    """The means of a call as 0-d tensors on the device, without what frameworks log by themselves."""
    return {f"{prefix}{k}": v for k, v in out.metrics().items() if k not in ("tokens", "loss", "entropy")}


def metric_sums(out: GOPDOutput) -> dict[str, Tensor]:
    """The same as sums over the live tokens, for frameworks that divide by a global count of their own."""
    return {k: v for k, v in out.metrics()._totals().items() if k not in ("tokens", "loss", "entropy")}
