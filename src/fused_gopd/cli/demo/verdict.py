"""The criteria of the demo's exit status, which were fixed before any run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .compare import Measured
from .training import Evaluation

KL_MUST_FALL_BY = 0.25
# The error of the fused loss may exceed that of the shortest dense code by this much, in nats (loss) or as a ratio of
# norms (gradients): the effect of summing float32 numbers in another order.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Finding:
    """One criterion, whether it is met, and the numbers."""

    passed: bool
    text: str


def judge_comparison(measured: Sequence[Measured]) -> list[Finding]:
    """Is the fused loss as exact as dense code in the same dtype? One finding per estimator and way."""
    dense = {m.estimator: m for m in measured if m.way == "dense"}
    findings = []
    for m in measured:
        if not m.way.startswith("fused"):
            continue
        baseline = dense[m.estimator]
        pairs = (
            ("loss", m.loss_error, baseline.loss_error),
            ("dX", m.hidden_error, baseline.hidden_error),
            ("dW", m.weight_error, baseline.weight_error),
        )
        passed = all(ours <= theirs + ROUNDING for _, ours, theirs in pairs)  # NaN fails
        figures = ", ".join(f"{name} {ours:.1e} (dense {theirs:.1e})" for name, ours, theirs in pairs)
        findings.append(Finding(passed, f"{m.estimator}, {m.way.replace('_', ' ')}: error against float64 {figures}"))
    return findings


def judge_training(before: Evaluation, ordinary: Evaluation, extrapolated: Evaluation | None) -> list[Finding]:
    """The held-out criteria.

    Args:
        before: the untrained student.
        ordinary: after training with lambda = 1.
        extrapolated: after training with lambda = 1.25. None for a quick run, which only requires that KL fell: it is
            too short to tell the lambdas apart, since Adam cancels the scale of the gradient.
    """
    fall = 1 - ordinary.kl_teacher / before.kl_teacher
    needed = KL_MUST_FALL_BY if extrapolated is not None else 0.0
    passed = fall >= needed if needed > 0 else fall > 0
    text = (
        f"held-out KL(student||teacher) at lambda = 1: {before.kl_teacher:.3f} -> {ordinary.kl_teacher:.3f}, "
        f"{'fell' if fall >= 0 else 'rose'} by {abs(fall):.0%}; asked: {f'{needed:.0%}' if needed else 'that it fell'}"
    )
    findings = [Finding(passed, text)]
    if extrapolated is not None:
        findings.append(
            Finding(
                extrapolated.reward > ordinary.reward,
                f"held-out implicit reward: {extrapolated.reward:.3f} at lambda = 1.25, {ordinary.reward:.3f} at "
                f"lambda = 1 (standard errors {extrapolated.reward_error:.3f}, {ordinary.reward_error:.3f}); asked: "
                "the first above the second",
            )
        )
    return findings
