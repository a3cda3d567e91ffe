"""The criteria of the demo's exit status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .compare import WAYS, Measured
from .prompts import EXTRAPOLATION

if TYPE_CHECKING:
    from .held_out import Evaluation

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
    """Is the fused loss as exact as dense code in the same dtype? One finding per way."""
    dense = next(m for m in measured if m.way == "dense")
    findings = []
    for m in measured:
        if m is dense:
            continue
        pairs = (
            ("loss", m.loss_error, dense.loss_error),
            ("dhidden", m.hidden_error, dense.hidden_error),
            ("dweight", m.weight_error, dense.weight_error),
        )
        passed = all(ours <= theirs + ROUNDING for _, ours, theirs in pairs)  # NaN fails
        figures = ", ".join(f"{name} {ours:.0e} (dense {theirs:.0e})" for name, ours, theirs in pairs)
        findings.append(Finding(passed, f"{WAYS[m.way]}: errors against float64: {figures}"))
    return findings


def judge_training(
    before: Evaluation, teacher: Evaluation | None, ordinary: Evaluation, extrapolated: Evaluation | None
) -> list[Finding]:
    """The held-out criteria.

    Args:
        before: the untrained student.
        teacher: the teacher itself. None for a quick run, as is ``extrapolated``: such a run only requires that KL
            fell. It is too short to tell the lambdas apart, since Adam cancels the scale of the gradient.
        ordinary: after training with lambda = 1.
        extrapolated: after training with lambda = 2.
    """
    fall = 1 - ordinary.kl_teacher / before.kl_teacher
    needed = KL_MUST_FALL_BY if extrapolated is not None else 0.0
    passed = fall >= needed if needed > 0 else fall > 0
    text = (
        f"KL to the teacher at λ = 1: {before.kl_teacher:.3f} -> {ordinary.kl_teacher:.3f}, "
        f"{'fell' if fall >= 0 else 'rose'} by {abs(fall):.0%} (asked: {f'{needed:.0%}' if needed else 'that it fell'})"
    )
    findings = [Finding(passed, text)]
    if teacher is not None and extrapolated is not None:
        at = f"at λ = {EXTRAPOLATION:g}"
        text = f"reward {at}: {extrapolated.reward:.3f} (asked: above {ordinary.reward:.3f}, λ = 1)"
        findings.append(Finding(extrapolated.reward > ordinary.reward, text))
        text = f'"!" in {teacher.excited:.0%} of the teacher\'s answers (asked: in most)'
        findings.append(Finding(teacher.excited > 0.5, text))
        more, own = extrapolated.exclamations, teacher.exclamations
        text = f'"!" per answer {at}: {more:.1f} (asked: above {own:.1f}, the teacher itself)'
        findings.append(Finding(more > own, text))
    return findings
