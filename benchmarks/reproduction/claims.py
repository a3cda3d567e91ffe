"""The paper's claims as runs: the stages that each needs, and the JSON of their results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import stages, tasks
from .stages import Stage

CLAIMS = ("lambda", "two-teachers", "strong-to-weak", "dynamics", "length", "estimators")
# Default of a quick run: strong-to-weak needs another base model, which would take a third of the time.
QUICK_CLAIMS = tuple(claim for claim in CLAIMS if claim != "strong-to-weak")
ADDITION, STRINGS = tasks.DOMAINS
ESTIMATORS: dict[str, dict[str, Any]] = {
    "sampled": {"estimator": "sampled"},
    "sampled + baseline": {"estimator": "sampled", "options": {"baseline": "expected"}},
    "topk, 4 of 30": {"estimator": "topk", "options": {"k": 4}},
    "full": {"estimator": "full"},
}


@dataclass(frozen=True)
class Settings:
    """How much is computed. The defaults are the full run."""

    n: int = 8192  # prompts to score a student on
    shared_n: int = 8192  # to score a base or teacher; the same in the quick run, so that both runs share them
    base_steps: int = 1400
    longer_base_steps: int = 2000  # of small bases: takes as long as the large one
    base_batch: int = 128
    rl_steps: int = 32  # of a teacher at most
    steps: int = 80  # of a distillation to a student of the teacher's size
    weak_steps: int = 133  # to a smaller student
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
    joint_scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    weak_scales: tuple[float, ...] = (1.25, 1.5, 2.0)
    batches: tuple[int, ...] = (16, 128)  # of the estimators' accuracy
    variance_batches: tuple[int, ...] = (8, 32, 128)
    variance_repeats: int = 24
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    controls: bool = True
    students: tuple[str, ...] = ("matched", "mismatched", "mismatched, trained longer")  # the small ones


QUICK = Settings(
    n=4096,
    steps=40,
    weak_steps=60,
    scales=(0.5, 1.0, 1.5, 2.0, 4.0),
    joint_scales=(1.0, 2.0),
    weak_scales=(1.5,),
    batches=(16,),
    variance_batches=(8, 32),
    variance_repeats=8,
    estimators=("sampled", "full"),
    students=("mismatched",),
)


@dataclass(frozen=True)
class TrainedModel:
    """A trained and scored model. Seeds share a ``group``; the seed of bases and teachers is None."""

    claims: tuple[str, ...]
    group: str
    stage: Stage
    seed: int | None = None


def scaled(prefix: str, scale: float) -> str:
    """The name of the group of a λ."""
    return f"{prefix} λ={scale:g}"


class Plan:
    """All runs of the chosen claims. The seed only affects students: bases and teachers are shared."""

    def __init__(self, settings: Settings, seeds: Iterable[int], claims: Iterable[str] = CLAIMS) -> None:
        self.settings, self.seeds = settings, list(seeds)
        self.claims = tuple(claims)
        for claim in self.claims:
            if claim not in CLAIMS:
                raise ValueError(f"claim must be one of {', '.join(CLAIMS)}; got {claim!r}")
        self.runs: list[TrainedModel] = []
        s = settings
        data = {"batch": s.base_batch, "lr": 4e-3, "seed": 1, "n": s.shared_n}
        usual, habit = asdict(tasks.Errors()), asdict(tasks.Errors(0.25, 0.12, 0.16, "next"))
        self.base = Stage("base", "base", {"size": "large", "errors": usual, "steps": s.base_steps, **data})
        small = {"size": "small", **data}
        self.weak = {
            "matched": Stage("small base", "base", {"errors": usual, "steps": s.longer_base_steps, **small}),
            "mismatched": Stage("small base, habits", "base", {"errors": habit, "steps": s.base_steps, **small}),
            "mismatched, trained longer": Stage(
                "small base, habits, longer", "base", {"errors": habit, "steps": s.longer_base_steps, **small}
            ),
        }
        rl = {"lr": 1e-4, "seed": 2, "n": s.shared_n}
        self.teachers = {
            ADDITION: Stage(
                "teacher A", "teacher", {"domain": ADDITION, "steps": s.rl_steps, "target": 70.0, **rl}, (self.base,)
            ),
            STRINGS: Stage(
                "teacher B", "teacher", {"domain": STRINGS, "steps": s.rl_steps, "target": 74.0, **rl}, (self.base,)
            ),
        }
        self._shared()
        for seed in self.seeds:
            self._curve(seed)
            self._two_teachers(seed)
            self._strong_to_weak(seed)
            self._estimators(seed)

    def _add(self, claims: tuple[str, ...], group: str, stage: Stage, seed: int | None = None) -> None:
        wanted = tuple(c for c in claims if c in self.claims)
        if wanted:
            self.runs.append(TrainedModel(wanted, group, stage, seed))

    def distillation(
        self, group: str, students: tuple[Stage, Stage], domains: list[str], seed: int, **how: Any
    ) -> Stage:
        """The training of a student; ``students`` are its initial model and the reference."""
        config = {"domains": domains, "how": {"steps": self.settings.steps, **how}, "seed": 100 + seed}
        parents = (*students, *(self.teachers[d] for d in domains))
        return Stage(group, "distill", {**config, "n": self.settings.n}, parents)

    def _shared(self) -> None:
        of_curve = ("lambda", "dynamics", "length", "estimators", "strong-to-weak")
        self._add((*of_curve, "two-teachers"), "base", self.base)
        self._add((*of_curve, "two-teachers"), "teacher A", self.teachers[ADDITION])
        self._add(("two-teachers",), "teacher B", self.teachers[STRINGS])
        if self.settings.controls:
            for more in (5, 15):
                config = {"domain": ADDITION, "steps": more, "lr": 1e-4, "seed": 3, "n": self.settings.n}
                self._add(("lambda",), f"teacher A, {more} more steps",
                          Stage(f"teacher A + {more}", "teacher", config, (self.teachers[ADDITION],)))  # fmt: skip

    def _curve(self, seed: int) -> None:
        pair, s = (self.base, self.base), self.settings
        for scale in s.scales:
            claims = ("lambda", "dynamics", "length") + (("estimators",) if scale == 1.25 else ())
            group = scaled("A", scale)
            self._add(claims, group, self.distillation(group, pair, [ADDITION], seed, reward_scale=scale), seed)
        if not s.controls:
            return
        beyond = scaled("A", s.scales[s.scales.index(1.0) + 1])
        controls: dict[str, dict[str, Any]] = {
            "A λ=1, twice the learning rate": {"reward_scale": 1.0, "lr": 6e-4},
            "A λ=1, stopped after 15 steps": {"reward_scale": 1.0, "stop": 15},
            "A λ=1, decayed over 15 steps": {"reward_scale": 1.0, "steps": 15},
            f"{beyond}, dense loss": {"reward_scale": s.scales[s.scales.index(1.0) + 1], "dense": True},
        }
        for group, how in controls.items():
            self._add(("lambda",), group, self.distillation(group, pair, [ADDITION], seed, **how), seed)

    def _two_teachers(self, seed: int) -> None:
        s, both = self.settings, list(tasks.DOMAINS)
        for scale in s.joint_scales:
            group = scaled("A+B", scale)
            stage = self.distillation(group, (self.base, self.base), both, seed, reward_scale=scale)
            self._add(("two-teachers",), group, stage, seed)
        teachers = tuple(self.teachers[d] for d in both)
        config = {"domains": both, "steps": s.steps, "lr": 3e-4, "batch": 128, "seed": 100 + seed, "n": s.n}
        self._add(("two-teachers",), "A+B SFT", Stage("A+B SFT", "sft", config, (self.base, *teachers)), seed)
        if seed == self.seeds[0]:
            for scale in (1.0, 1.25, 1.5):
                config = {"domains": both, "scale": scale, "n": s.n}
                group = f"A+B ExPO α={scale:g}"
                self._add(("two-teachers",), group, Stage(group, "extrapolate", config, (self.base, *teachers)))

    def _strong_to_weak(self, seed: int) -> None:
        for name in self.settings.students:
            self._to_weak(name, self.weak[name], seed)

    def _to_weak(self, name: str, student: Stage, seed: int) -> None:
        s, claim = self.settings, ("strong-to-weak",)
        how: dict[str, Any] = {"steps": s.weak_steps, "lr": 1e-3}

        def distilled(group: str, reference: Stage, scale: float) -> None:
            stage = self.distillation(group, (student, reference), [ADDITION], seed, reward_scale=scale, **how)
            self._add(claim, group, stage, seed)

        if seed == self.seeds[0]:
            self._add(claim, f"{name} student", student)
        distilled(scaled(name, 1.0), self.base, 1.0)
        for scale in s.weak_scales:
            distilled(scaled(f"{name}, student's reference,", scale), student, scale)
            distilled(scaled(f"{name}, teacher's base,", scale), self.base, scale)
        config = {"domains": [ADDITION], "batch": 128, "seed": 100 + seed, "n": s.n, **how}
        self._add(claim, f"{name} SFT", Stage(f"{name} SFT", "sft", config, (student, self.teachers[ADDITION])), seed)

    def _estimators(self, seed: int) -> None:
        s, pair, claim = self.settings, (self.base, self.base), ("estimators",)
        for batch in s.batches:
            for name in s.estimators:
                group = f"{name}, batch {batch}"
                how = {"reward_scale": 1.25, **ESTIMATORS[name]}
                if batch != 128:
                    how["batch"] = batch
                elif name == "sampled":
                    continue  # part of the λ curve
                self._add(claim, group, self.distillation(group, pair, [ADDITION], seed, **how), seed)
        if seed == self.seeds[0]:
            rest: dict[str, Any] = {"batches": list(s.variance_batches), "repeats": s.variance_repeats, "seed": 4}
            rest["estimators"] = {name: {"reward_scale": 1.25, **how} for name, how in ESTIMATORS.items()}
            parents = (*pair, self.teachers[ADDITION])
            self._add(claim, "variance", Stage("variance", "variance", {"domain": ADDITION, **rest}, parents))

    def results(self, cache: Path) -> list[dict[str, Any]]:
        """The results of the finished runs, one entry each."""
        rows = []
        for run in self.runs:
            found = stages.result(run.stage, cache)
            if found is not None:
                row = {"group": run.group, "seed": run.seed, "claims": list(run.claims), "key": run.stage.key}
                rows.append({**row, **{k: v for k, v in found.items() if k != "size"}})
        return rows


def settings_of(quick: bool, **changes: Any) -> Settings:
    """The quick or the full settings, with changes."""
    return replace(QUICK if quick else Settings(), **changes)
