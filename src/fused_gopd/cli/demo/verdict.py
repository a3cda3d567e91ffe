"""What the demo's exit status depends on. Decided before any run, and independent of how a run was presented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .compare import Measured
from .training import Evaluation

KL_MUST_FALL_BY = 0.25
# The fused loss may be this much further from float64 than the shortest dense code, in nats (loss) or as a ratio of
# norms (gradients): room for another order of float32 sums, nothing more.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Finding:
    """One criterion with the figures that decided it."""

    passed: bool
    text: str


def judge_comparison(measured: Sequence[Measured]) -> list[Finding]:
    """The fused loss is as exact as dense code in the same dtype: one finding per estimator and way."""
    dense = {m.estimator: m for m in measured if m.way == "dense"}
    findings = []
    for m in measured:
        if not m.way.startswith("fused"):
            continue
        rival = dense[m.estimator]
        pairs = (
            ("loss", m.loss_error, rival.loss_error),
            ("dX", m.hidden_error, rival.hidden_error),
            ("dW", m.weight_error, rival.weight_error),
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
        extrapolated: with lambda = 1.25; None is a quick run, which is too short to tell the lambdas apart (Adam
            cancels the gradient's scale, so that few steps look alike for every lambda) and asks only that KL fell.
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
