"""The rules of options applied: of each alone (:mod:`fused_gopd.options`), and of several together.

Imported without PyTorch, as the options are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .objective.divergences import DIVERGENCES, make
from .options import DEFAULTS, ESTIMATORS, OPTIONS, PARAMETERS, RULES, LossCall, LossOptions
from .values import is_tensor, one_of, refuse_unknown

_BATCH_RULES = tuple((name, rule) for name, rule in RULES.items() if name not in OPTIONS and (rule.of or rule.check))
_UNKNOWN = object()


def checked(options: LossOptions) -> LossOptions:
    """The options in their normal form, each checked by its rule, then against each other.

    Of a :class:`LossCall` also what an option needs; where there is no batch yet, that is taken to be given. An error
    carries the argument's name as ``option``.
    """
    given = vars(options)
    values = {name: given[name] for name in OPTIONS}
    estimator, name = options.estimator, "estimator"
    try:
        one_of(name, estimator, ESTIMATORS)
        for name in OPTIONS:
            if values[name] is not DEFAULTS[name]:
                values[name] = _checked(name, values[name], options)
        if isinstance(options, LossCall):
            for name, rule in _BATCH_RULES:
                if given[name] is not None:
                    rule.checked(name, given[name])
                    rule.require_estimator(name, estimator)
            name = "old_logprobs"
            if given[name] is not None and estimator != "sampled" and given["rollout_logprobs"] is None:
                raise ValueError(
                    f"old_logprobs is an option of estimator='sampled', or needs rollout_logprobs, got "
                    f"estimator={estimator!r}"
                )
        name = "divergence"
        if estimator == "sampled" and values[name] != "reverse_kl":
            raise ValueError(
                f"divergence={values[name]!r} needs estimator='full' or 'topk'; "
                "'sampled' estimates the reverse KL alone"
            )
        for name in PARAMETERS:
            _check_parameter(name, given.get(name), values["divergence"])
        _normalise_divergence(values, given)
        normal = LossOptions(**values)
        for name in _TOGETHER:
            message = _TOGETHER[name](normal)
            if message is not None:
                raise ValueError(message)
    except (TypeError, ValueError) as error:
        error.option = name  # type: ignore[union-attr]
        raise
    return normal


def checked_once(**options: Any) -> LossOptions:
    """:func:`checked` of keyword arguments, kept for each set of values that has been seen."""
    try:
        return _kept(**options)
    except TypeError:  # not hashable, or wrong: the check says which
        return checked(LossOptions(**options))


@functools.lru_cache(typed=True)
def _kept(**options: Any) -> LossOptions:
    return checked(LossOptions(**options))


def checked_options(**options: Any) -> LossOptions:
    """Keyword arguments in their normal form, before there is a batch.

    What an option needs of the batch is taken to be given. An error carries the argument's name as ``option``.
    """
    refuse_unknown(options, (*OPTIONS, *PARAMETERS), "an option of the loss")
    needed = {RULES[name].needs for name, value in options.items() if value not in (None, DEFAULTS[name])} - {None}
    no_model: Any = None
    batch: dict[str, Any] = {name: _UNKNOWN for name in needed if name is not None}
    return checked(LossCall(no_model, None, **batch, **options))


def _checked(name: str, value: Any, options: LossOptions) -> Any:
    """The normal form of a value that is not the default itself."""
    rule = RULES[name]
    value = rule.checked(name, value)
    if value == DEFAULTS[name]:
        return value
    rule.require_estimator(name, options.estimator)
    if rule.needs is not None and getattr(options, rule.needs, _UNKNOWN) is None:
        raise ValueError(f"{name} needs {rule.needs}: {rule.because}")
    return value


# ------------------------------------------------------------------------------------- the divergence and its parameter


def _check_parameter(name: str, value: Any, divergence: str) -> None:
    """Raise where a parameter belongs to another divergence, or is a number outside the range of this one."""
    if value is None or value is DEFAULTS[name] or (not is_tensor(value) and value == DEFAULTS[name]):
        return
    own = DIVERGENCES[divergence].parameter
    if own is None or own.option != name:
        owners = [d.name for d in DIVERGENCES.values() if d.parameter is not None and d.parameter.option == name]
        shown = "a tensor" if is_tensor(value) else value
        raise ValueError(
            f"{name} is an option of divergence={' or '.join(map(repr, owners))}, got {name}={shown} with "
            f"divergence={divergence!r}"
        )
    if not is_tensor(value):
        own.check(float(value))


def _normalise_divergence(values: dict[str, Any], given: dict[str, Any]) -> None:
    """At an end of its parameter's range a divergence is another one."""
    name = values["divergence"]
    if DIVERGENCES[name].parameter is None:
        return
    made = make(name, **{option: given.get(option) for option in PARAMETERS})
    if made.name != name:
        values["divergence"] = made.name
        values |= {option: DEFAULTS[option] for option in PARAMETERS if option in values}


# ------------------------------------------------------------------------------------------- rules of several together
# Each says what is wrong with options in their normal form, or None.


def _kl_ref_weight(options: LossOptions) -> str | None:
    if options.kl_ref == "none" and options.kl_ref_weight != DEFAULTS["kl_ref_weight"]:
        return "kl_ref_weight needs kl_ref: there is no KL penalty to weigh"
    return None


def _kl_ref(options: LossOptions) -> str | None:
    kind, estimator = options.kl_ref, options.estimator
    if kind == "none":
        return None
    if (kind == "exact") != (estimator == "full"):
        wanted = "'exact'" if estimator == "full" else "'k1', 'k2' or 'k3'"
        return f"kl_ref must be {wanted} with estimator={estimator!r}, got {kind!r}"
    if options.baseline != "none":
        return "kl_ref needs the reference scored alone, and baseline='expected' scores it jointly"
    return None


def _tail(options: LossOptions) -> str | None:
    if options.tail == "sampled" and options.divergence != "reverse_kl":
        return (
            f"tail='sampled' needs divergence='reverse_kl', got divergence={options.divergence!r}: all others need the "
            "target's normaliser over the whole vocabulary"
        )
    return None


def _student_logprob_min(options: LossOptions) -> str | None:
    if options.student_logprob_min is not None and options.tail != "drop":
        return (
            f"student_logprob_min needs tail='drop', got tail={options.tail!r}: with any other tail the student's "
            "log-probs are those of a distribution"
        )
    return None


def _k(options: LossOptions) -> str | None:
    if options.k == 0 and options.tail != "sampled":
        return "k must be at least 1, got 0: tail='sampled' alone can do without a support"
    return None


def _rollout_is(options: LossOptions) -> str | None:
    if options.rollout_is != "none":
        return None
    if options.rollout_is_cap is not None:
        return "rollout_is_cap bounds importance weights, and rollout_is='none' makes all of them 1"
    if options.rollout_mask is None and options.trust_region is None:
        return "rollout_is='none' needs rollout_mask or trust_region: alone it makes all weights 1"
    return None


def _ratio(options: LossOptions) -> str | None:
    for clip, ratios in (("clip", ("none",)), ("clip_dual", ("none", "detached"))):
        if options.ratio in ratios and getattr(options, clip) is not None:
            return f"{clip} has nothing to act on with ratio={options.ratio!r}"
    return None


_TOGETHER: dict[str, Callable[[LossOptions], str | None]] = {
    "kl_ref_weight": _kl_ref_weight,
    "kl_ref": _kl_ref,
    "tail": _tail,
    "student_logprob_min": _student_logprob_min,
    "k": _k,
    "rollout_is": _rollout_is,
    "ratio": _ratio,
}
