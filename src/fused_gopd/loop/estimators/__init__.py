"""The estimators of ``gopd_loss``: :class:`Sampled`, :class:`Full` and :class:`TopK`, with or without labels;
and :class:`NLL` of ``linear_nll``.
"""

from __future__ import annotations

from collections.abc import Callable

from ...problem import Problem
from .base import Estimator
from .full import Full
from .labels import WithLabels
from .nll import NLL
from .sampled import Sampled
from .topk import TopK

_ESTIMATORS: dict[str, Callable[[Problem], Estimator]] = {"sampled": Sampled, "full": Full, "topk": TopK}


def estimator_of(problem: Problem) -> Estimator:
    if problem.nll is not None:
        return NLL(problem)
    estimator = _ESTIMATORS[problem.options.estimator](problem)
    return estimator if problem.labels is None else WithLabels(estimator)
