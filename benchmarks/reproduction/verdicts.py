"""The paper's claims against the runs: means, spreads, and whether each claim holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

ADDITION, STRINGS = "addition", "strings"
Found = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A mean over seeds; ``spread`` is their standard deviation, ``error`` the standard error of n sampled answers."""

    mean: float
    spread: float
    error: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.1f} ± {self.spread:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"

    def noise(self, other: Score) -> float:
        """Twice this is what a difference has to exceed: the spread over seeds, at least the sampling error."""
        return math.hypot(max(self.spread, self.error), max(other.spread, other.error))

    def above(self, other: Score) -> bool:
        return self.mean - other.mean > 2 * self.noise(other)

    def like(self, other: Score) -> bool:
        return abs(self.mean - other.mean) <= 2 * self.noise(other)


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper, and whether it holds here; None if the runs that it needs are missing."""

    claim: str
    here: str
    holds: bool | None


# signal -> its former name, which committed results have
_FORMERLY = {"log_ratio_teacher": "kl_teacher", "log_ratio_ref": "kl_ref"}


class Runs:
    """The runs of the JSON by group."""

    def __init__(self, found: Found) -> None:
        self.found, self.rows = found, found["runs"]
        self.n = found["settings"]["n"]

    def rows_of(self, group: str) -> list[Found]:
        return [row for row in self.rows if row["group"] == group]

    def score(self, group: str, domain: str = ADDITION, field: str = "accuracy") -> Score:
        values = [row["scores"][domain][field] for row in self.rows_of(group) if domain in row.get("scores", {})]
        values = [v for v in values if not math.isnan(v)]
        if not values:
            return Score(math.nan, math.nan, math.nan, 0)
        mean = statistics.fmean(values)
        share = min(max(mean / 100, 0.0), 1.0)
        error = 100 * math.sqrt(share * (1 - share) / self.n) if field.startswith("accuracy") else 0.0
        return Score(mean, statistics.stdev(values) if len(values) > 1 else 0.0, error, len(values))

    def scales(self, prefix: str) -> list[float]:
        """The λ of the groups ``<prefix> λ=<λ>``, in order."""
        start = f"{prefix} λ="
        tails = {row["group"].removeprefix(start) for row in self.rows if row["group"].startswith(start)}
        return sorted(float(t) for t in tails if t.replace(".", "").isdigit())

    def best(self, prefix: str, domain: str = ADDITION) -> tuple[float, Score] | None:
        """The λ > 1 of the highest mean."""
        over = [(x, self.score(f"{prefix} λ={x:g}", domain)) for x in self.scales(prefix) if x > 1]
        return max(over, key=lambda pair: pair[1].mean, default=None)

    def history(self, group: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and the mean over seeds of a signal of the training; empty if there is none."""
        if not any(name in row.get("history", {}) for row in self.rows_of(group)):
            name = _FORMERLY.get(name, name)
        columns = [row["history"] for row in self.rows_of(group) if name in row.get("history", {})]
        if not columns:
            return [], []
        steps: list[float] = columns[0]["step"]
        return steps, [statistics.fmean(column[name][i] for column in columns) for i in range(len(steps))]

    def last(self, group: str, name: str) -> float:
        """Mean of a signal over the last sixth of the training and over seeds; NaN if there is none."""
        values = self.history(group, name)[1]
        return statistics.fmean(values[-2:]) if values else math.nan


def _has(*scores: Score) -> bool:
    return all(s.seeds for s in scores)


def _rises(values: list[float]) -> bool | None:
    """Whether the last value exceeds the first, and most steps rise."""
    if len(values) < 2 or any(map(math.isnan, values)):
        return None
    ups = sum(b > a for a, b in pairwise(values))
    return values[-1] > values[0] and ups >= (len(values) - 1) * 0.75


def _lambda_verdicts(r: Runs) -> Iterable[Verdict]:
    base, teacher, one = r.score("base"), r.score("teacher A"), r.score("A λ=1")
    if not _has(base, teacher, one):
        return
    under = [(x, r.score(f"A λ={x:g}")) for x in r.scales("A") if x < 1]
    if under:
        listed = ", ".join(f"{x:g}: {s}" for x, s in under)
        between = all(base.mean < s.mean < teacher.mean for _, s in under)
        yield Verdict("λ < 1 lands between reference and teacher", f"{base} < {listed} < {teacher}", between)
    yield Verdict("λ = 1 (OPD) is as good as the teacher", f"{one} against {teacher}", one.like(teacher))
    best = r.best("A")
    if best is not None:
        x, s = best
        over = {at: r.score(f"A λ={at:g}") for at in r.scales("A") if at > 1}
        passing = [f"{at:g}: {score}" for at, score in over.items() if score.above(teacher)]
        here = f"λ = {', '.join(passing)}" if passing else f"the best, λ = {x:g}: {s}"
        claim = "some λ > 1 passes the teacher by more than twice the spread"
        yield Verdict(claim, f"{here} against {teacher}", bool(passing))
        largest = r.scales("A")[-1]
        broken = r.score(f"A λ={largest:g}")
        rewards = [r.last(f"A λ={at:g}", "reward") for at in (largest, x)]
        yield Verdict(
            "too large a λ breaks: the answers get worse",
            f"λ = {largest:g}: {broken}, at an implicit reward of {rewards[0]:.3f} against {rewards[1]:.3f} at {x:g}",
            s.above(broken),
        )
    if best is not None:
        yield from _controls(r, best[1])
    yield from _dense(r)


def _controls(r: Runs, best: Score) -> Iterable[Verdict]:
    """Controls for simpler explanations of the effect of λ > 1."""
    for group, claim in (
        ("A λ=1, twice the learning rate", "control: a larger step at λ = 1 does less than the best λ"),
        (
            "A λ=1, stopped after 15 steps",
            "control: stopping λ = 1 early, where it may be above its end, does less than the best λ",
        ),
        ("A λ=1, decayed over 15 steps", "control: a short training at λ = 1 does less than the best λ"),
        ("teacher A, 5 more steps", "control: 5 more steps of the teacher's own RL do less than the best λ"),
        ("teacher A, 15 more steps", "control: 15 more steps of the teacher's own RL do less than the best λ"),
    ):
        other = r.score(group)
        if _has(other):
            yield Verdict(claim, f"{other} against {best}", best.above(other))


def _dense(r: Runs) -> Iterable[Verdict]:
    """The same trainings with the dense reference loss."""
    for group in sorted({row["group"] for row in r.rows if row["group"].endswith(", dense loss")}):
        plain = group.removesuffix(", dense loss")
        fused, dense = r.score(plain), r.score(group)
        if not _has(fused):
            continue
        apart = []
        for name in ("accuracy", "entropy"):
            points = zip(r.history(plain, name)[1], r.history(group, name)[1], strict=True)
            apart.append(max((abs(a - b) for a, b in points), default=math.nan))
        scores = f"{plain}: {fused} fused, {dense} dense"
        yield Verdict(
            "the dense reference loss gives the same curve (same seeds, float32)",
            f"{scores}; along the training at most {apart[0]:.1g} (accuracy) and {apart[1]:.1g} (entropy) apart",
            fused.like(dense),
        )


def _two_teachers(r: Runs) -> Iterable[Verdict]:
    teachers = {ADDITION: r.score("teacher A"), STRINGS: r.score("teacher B", STRINGS)}
    scales = r.scales("A+B")
    if not scales or not _has(*teachers.values()):
        return

    def both(group: str, test: Callable[[Score, Score], bool]) -> bool:
        return all(test(r.score(group, d), t) for d, t in teachers.items())

    def pair(group: str) -> str:
        return f"{r.score(group, ADDITION)} / {r.score(group, STRINGS)}"

    to = f"against {teachers[ADDITION]} / {teachers[STRINGS]}"
    yield Verdict(
        "λ = 1: one student is as good as both teachers", f"{pair('A+B λ=1')} {to}", both("A+B λ=1", Score.like)
    )
    over = [f"A+B λ={x:g}" for x in scales if x > 1]
    passing = [g for g in over if both(g, Score.above)]
    if over:
        shown = max(over, key=lambda g: sum(r.score(g, d).mean for d in teachers))
        yield Verdict(
            "λ > 1: one student passes both", f"{shown.removeprefix('A+B ')}: {pair(shown)} {to}", bool(passing)
        )
        expo = {row["group"] for row in r.rows if row["group"].startswith("A+B ExPO")}
        best = max(expo, key=lambda g: sum(r.score(g, d).mean for d in teachers), default="A+B ExPO")
        for other in ("A+B SFT", best):
            if _has(r.score(other)):
                worse = all(r.score(shown, d).above(r.score(other, d)) for d in teachers)
                yield Verdict(f"it beats {other.removeprefix('A+B ')} in both", pair(other), worse)


def _strong_to_weak(r: Runs) -> Iterable[Verdict]:
    for name in ("matched", "mismatched", "mismatched, trained longer"):
        sft, opd = r.score(f"{name} SFT"), r.score(f"{name} λ=1")
        if not _has(sft, opd):
            continue
        yield Verdict(f"{name} student: OPD beats SFT", f"{opd} against {sft}", opd.above(sft))
        for reference in ("student's reference", "teacher's base"):
            best = r.best(f"{name}, {reference},")
            if best is not None:
                text = f"λ = {best[0]:g}: {best[1]} against {opd}"
                yield Verdict(f"{name} student, {reference}: λ > 1 beats OPD", text, best[1].above(opd))
        for x in r.scales(f"{name}, teacher's base,"):
            plain = r.score(f"{name}, student's reference, λ={x:g}")
            corrected = r.score(f"{name}, teacher's base, λ={x:g}")
            yield Verdict(
                f"{name} student, λ = {x:g}: the teacher's base is the better reference (reward correction)",
                f"{corrected} against {plain}",
                corrected.above(plain),
            )


def _dynamics(r: Runs) -> Iterable[Verdict]:
    scales = r.scales("A")
    names = {"reward": "the implicit reward", "length": "the length of responses", "entropy": "the entropy"}
    for key, name in names.items():
        values = [r.last(f"A λ={x:g}", key) for x in scales]
        if len(values) > 1 and not all(map(math.isnan, values)):
            listed = ", ".join(f"{x:g}: {v:.3g}" for x, v in zip(scales, values, strict=True))
            yield Verdict(f"{name} at the end of training rises with λ", listed, _rises(values))


def _length(r: Runs) -> Iterable[Verdict]:
    teacher, best = r.score("teacher A"), r.best("A")
    if best is None or not _has(teacher):
        return
    x, group = best[0], f"A λ={best[0]:g}"
    longer = r.score(group, field="length").mean, r.score("teacher A", field="length").mean
    yield Verdict(
        "the best λ answers at greater length than the teacher",
        f"{longer[0]:.2f} against {longer[1]:.2f} tokens",
        longer[0] > longer[1],
    )
    for kind, name in (("accuracy_direct", "direct"), ("accuracy_scratch", "scratched")):
        a, b = r.score(group, field=kind), r.score("teacher A", field=kind)
        if _has(a, b):
            yield Verdict(
                f"length is not all of it: {name} answers alone are better than the teacher's at λ = {x:g}",
                f"{a} against {b}", a.mean - b.mean > 4 * a.noise(b),
            )  # fmt: skip


def _estimators(r: Runs) -> Iterable[Verdict]:
    for row in r.rows_of("variance"):
        values, batches = row["variance"], row["batches"]
        for i, batch in ((0, batches[0]), (-1, batches[-1])):
            listed = ", ".join(f"{name} {v[i]:.3g}" for name, v in values.items())
            yield Verdict(
                f"batch {batch}: `full` has less gradient variance than `sampled`, the baseline is between",
                listed, values["full"][i] < values["sampled + baseline"][i] < values["sampled"][i],
            )  # fmt: skip
    small = min((b for b in (16, 128) if r.rows_of(f"full, batch {b}")), default=None)
    if small is not None and r.rows_of(f"sampled, batch {small}"):
        full, sampled = r.score(f"full, batch {small}"), r.score(f"sampled, batch {small}")
        yield Verdict(
            f"at batch {small} `full` learns more than `sampled`", f"{full} against {sampled}", full.above(sampled)
        )


VERDICTS: dict[str, Callable[[Runs], Iterable[Verdict]]] = {
    "lambda": _lambda_verdicts,
    "two-teachers": _two_teachers,
    "strong-to-weak": _strong_to_weak,
    "dynamics": _dynamics,
    "length": _length,
    "estimators": _estimators,
}


def verdicts(found: Found) -> list[Verdict]:
    """The verdicts that the runs of a JSON allow."""
    runs = Runs(found)
    return [v for claim in found["claims"] for v in VERDICTS[claim](runs)]
