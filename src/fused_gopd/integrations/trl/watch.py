"""What goes wrong in a run, said early and once: rules over the rows that a trainer logs, and over ends of sequences.

A rule returns a sentence with the figure and the remedy, or None. docs/warnings.md has the thresholds and the runs that
they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

# Rows in a window at either end of the run; a tenth of the run where that is more.
_WINDOW = 5
# Up to so many rows the rules are applied at each, then whenever there is a hundredth more: they read all rows.
_EACH_ROW = 100
# Share of cut-off completions: its least rise, and the least share in the last rows.
_CUT_RISE, _CUT_LAST = 0.25, 0.5
# The same without a rise: the least share, and of how many completions.
_CUT_ALWAYS, _CUT_COUNT = 0.95, 256
# Distance to the target (KL, or standard deviation of log u - log p), last over first, once the student has moved as
# far from the reference as it was from the teacher: 0.03 to 0.61 where it learns, 0.8 to 1.3 where it fails.
_DISTANCE_LEFT = 0.75
# KL to the reference, nats a token, below which there is no warning of lambda, nor of a reward that runs away.
_LEAST_KL_REF = 0.1
# Rise of the reward, over the first KL to the teacher.
_REWARD_RISE = 0.25
# KL to the teacher, over its least value; KL to the reference, over its value at that time.
_KL_TEACHER_RISE, _KL_REF_RISE = 1.4, 2.0
# KL of the engine to the student (k3), nats a token; effective sample size; share of tokens that weights mask.
_MISMATCH, _EFFECTIVE, _MASKED = 0.05, 0.5, 0.5


def ends_of(model: Any) -> list[int]:
    """Ids that end a completion by a model's generation config, or else by its config; empty where neither has one."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def other_ends(
    name: str,
    student: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    teacher: Sequence[int],
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> str | None:
    """The warning of a teacher that ends its answers with another token than the student, or None.

    Args:
        name: what messages call the teacher.
        student: ids that end the student's completions.
        tokenizer: the student's.
        teacher: ids that end the teacher's completions, empty where they are not known.
        teacher_tokenizer: the teacher's, None where it is not known.
    """
    own = getattr(teacher_tokenizer, "eos_token_id", None)
    end = own if own is not None else teacher[0] if teacher else None  # with several, the one that its chat ends with
    if end is None:
        return None

    def shown(i: int) -> str:
        return f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})"

    if end not in student:
        return (
            f"{name} ends its answers with {shown(end)}, which does not end the student's: those of the student "
            f"end with {', '.join(map(shown, student))}. It learns to say the teacher's end and goes on after it, so "
            f"that completions get longer and longer. Add {end} to eos_token_id of the student's generation_config"
        )
    first = tokenizer.eos_token_id
    if first is not None and first not in teacher and first != end:
        return (
            f"the student's completions end with {shown(first)}, with which {name} does not end its own (it ends them "
            f"with {', '.join(map(shown, teacher or [end]))}): it finds the student's end unlikely, and the student "
            "unlearns to end. Use a teacher that was trained on the student's chat template, or a student that has the "
            "teacher's"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What rules have to know of a run."""

    max_completion_length: int
    completions_per_step: float  # new ones, of all ranks


def _values(rows: Iterable[Row], name: str) -> list[float]:
    """The numbers of a column: without those that are None, NaN or infinite."""
    return [float(row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """The means of the first and of the last rows; None while there are too few."""
    window = max(_WINDOW, len(values) // 10)
    return None if len(values) < 2 * window else (fmean(values[:window]), fmean(values[-window:]))


def _cut_off(rows: Sequence[Row], setting: Setting) -> str | None:
    shares = _values(rows, "completions/clipped_ratio")
    cap, found = setting.max_completion_length, _ends(shares)
    if found is not None and found[1] >= _CUT_LAST and found[1] - found[0] >= _CUT_RISE:
        return (
            f"the share of completions that are cut off at max_completion_length={cap} has risen from {found[0]:.0%} "
            f"to {found[1]:.0%}: the student no longer ends its answers. Compare the tokens with which student and "
            "teacher end them, or train for fewer steps or with a lower learning rate"
        )
    count = setting.completions_per_step * rows[-1].get("step", 0)
    if shares and count >= _CUT_COUNT and fmean(shares) >= _CUT_ALWAYS:
        return (
            f"{fmean(shares):.0%} of {count:.0f} completions were cut off at max_completion_length={cap}: the student "
            "is not trained on how answers go on and end. Raise max_completion_length, or leave out prompts with long "
            "answers"
        )
    return None


def _same(scale: float | None, other: float | None) -> bool:
    """Whether two means over the steps of a row, not all rows of as many, are of one lambda."""
    return scale is not None and other is not None and math.isclose(scale, other, rel_tol=1e-9)


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows since lambda is what it is, that have one target; of those the ones of completions of the student.

    None where lambda is of each token. Estimates of a KL hold for tokens that the student itself has sampled: not for
    completions of an older student (``num_iterations``), nor of the dataset (``lmbda``).
    """
    scale = rows[-1].get("gopd/reward_scale")
    first = len(rows)
    while first and _same(rows[first - 1].get("gopd/reward_scale"), scale):
        first -= 1
    return [row for row in rows[first:] if not row.get("gopd/staleness") and row.get("gopd/on_policy", 1) == 1]


def _beyond(rows: Sequence[Row], setting: Setting) -> str | None:
    same = _comparable(rows)
    exact = bool(same) and same[-1].get("gopd/kl_target") is not None
    distance = "gopd/kl_target" if exact else "gopd/advantage_std"
    names = (distance, "gopd/kl_teacher_k3", "gopd/kl_ref_k3", "gopd/reward")
    found = [_ends(_values(same, name)) for name in names]
    if any(x is None for x in found):
        return None
    (first, last), (teacher, _), (_, ref), (before, reward) = cast("list[tuple[float, float]]", found)
    scale = same[-1]["gopd/reward_scale"]
    moved = ref >= max(_LEAST_KL_REF, teacher) and reward - before >= _REWARD_RISE * teacher
    if scale <= 1 or not moved or last < _DISTANCE_LEFT * first:
        return None
    what = "KL" if exact else "standard deviation of log u - log p"
    return (
        f"lambda = {scale:g} is more than this run supports: the student has moved {ref:.2g} nats a token from the "
        f"reference, and is hardly nearer to its target ({what} {last:.2g}, at first {first:.2g}), though its reward "
        f"has risen from {before:.2g} to {reward:.2g}. Lower reward_scale (1.25 is the paper's), or take the teacher's "
        "own base for the reference"
    )


def _runs_away(rows: Sequence[Row], setting: Setting) -> str | None:
    same = _comparable(rows)
    teacher, ref, reward = (_values(same, f"gopd/{name}") for name in ("kl_teacher_k3", "kl_ref_k3", "reward"))
    window = max(_WINDOW, len(teacher) // 10)
    if len(teacher) < 2 * window or not len(teacher) == len(ref) == len(reward):
        return None
    last = len(teacher) - window
    least = min(range(0, last, window // _WINDOW), key=lambda i: fmean(teacher[i : i + window]))
    then, now = ([fmean(x[i : i + window]) for x in (teacher, ref, reward)] for i in (least, last))
    if now[0] < _KL_TEACHER_RISE * then[0] or now[1] < max(_LEAST_KL_REF, _KL_REF_RISE * then[1]):
        return None
    if now[2] - then[2] < _REWARD_RISE * then[0]:
        return None
    return (
        f"the reward rises (from {then[2]:.2g} to {now[2]:.2g} nats a token) while the student runs away from the "
        f"reference (KL {then[1]:.2g} to {now[1]:.2g}) and from the teacher (KL {then[0]:.2g} to {now[0]:.2g}): it is "
        "no longer what the reward was made from. Stop at the checkpoint before, lower reward_scale or the learning "
        "rate, or add a KL penalty (kl_ref)"
    )


def _mismatch(rows: Sequence[Row], setting: Setting) -> str | None:
    def last(name: str) -> float | None:
        values = _values(rows[-_WINDOW:], f"gopd/{name}")
        return fmean(values) if len(values) == _WINDOW else None

    kl, effective, masked = (last(name) for name in ("sampler_kl", "effective_sample_size", "masked_fraction"))
    found = [
        f"KL to the student {kl:.2g} nats a token" if kl is not None and kl >= _MISMATCH else "",
        f"effective sample size {effective:.0%}" if effective is not None and effective <= _EFFECTIVE else "",
        f"{masked:.0%} of the tokens masked" if masked is not None and masked >= _MASKED else "",
    ]
    if not any(found):
        return None
    return (
        f"the policy that samples is not the student ({', '.join(filter(None, found))}): compare dtype, temperature "
        "and weights of the engine with the student's, and let it sample more often (num_iterations, staleness)"
    )


_RULES: tuple[Callable[[Sequence[Row], Setting], str | None], ...] = (_cut_off, _beyond, _runs_away, _mismatch)


class Watch:
    """Applies each rule to the rows that have been logged, until it has found something."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._rules = list(_RULES)
        self._history: list[Row] = []  # what was read of the trainer's
        self._rows: list[Row] = []
        self._next = 1  # at so many rows the rules are applied

    def read(self, history: Sequence[Row]) -> list[str]:
        """Warnings that the new rows of a trainer's ``log_history`` give rise to. A resumed one is read from its start.

        Rows without a loss, those of evaluations and the summary at the end, are left out.
        """
        done = len(self._history)
        if done and (len(history) < done or history[done - 1] is not self._history[-1]):  # another training
            self._history, self._rows, self._next, done = [], [], 1, 0
        found = []
        for row in history[done:]:
            self._history.append(row)
            if "loss" not in row:
                continue
            self._rows.append(row)
            if len(self._rows) < self._next:
                continue
            self._next += max(1, self._next // _EACH_ROW)
            for rule in list(self._rules):
                said = rule(self._rows, self._setting)
                if said is not None:
                    found.append(said)
                    self._rules.remove(rule)
        return found
