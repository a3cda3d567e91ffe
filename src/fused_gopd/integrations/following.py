"""How a teacher ``"student"`` follows the student: the two options of it, for the trainers and for ``distill``."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Following:
    """The options as they were given; without any, the teacher stays the student as it began."""

    teacher_ema: float | None
    teacher_sync_steps: int | None

    @property
    def given(self) -> dict[str, float]:
        """Those that were given, by name: the teacher follows the student if there is one."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def is_live(self) -> bool:
        """Whether the teacher is the current student at every step."""
        return self.teacher_sync_steps == 1 and self.teacher_ema is None

    @property
    def fault_of_ema(self) -> str | None:
        """What is wrong with ``teacher_ema``, or None."""
        if self.teacher_ema is None or 0 < self.teacher_ema < 1:
            return None
        return (
            f"must be between 0 and 1, got {self.teacher_ema}: it is the decay d of d * average + (1 - d) * student. "
            "Leave it out for the student as it began; for the current student, update it every step"
        )

    def teaches(self, *, other_terms: bool) -> bool:
        """Whether it teaches anything at lambda = 1 if it reads the student's own prompt.

        At its beginning it says what the student says. Where another term trains the student, one that stays behind is
        a penalty.
        """
        return other_terms and not self.is_live
