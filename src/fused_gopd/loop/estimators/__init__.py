"""The estimators of ``gopd_loss``: :class:`Sampled`, :class:`Full`, :class:`TopK`, and what is added to any of them.

And :class:`NLL` of ``linear_nll``.
"""

from __future__ import annotations

from collections.abc import Callable

from ...problem import Problem
from .base import Estimator
from .full import Full
from .labels import WithLabels
from .nll import NLL
from .sampled import Sampled
from .terms import WithTerms
from .topk import TopK

_ESTIMATORS: dict[str, Callable[[Problem], Estimator]] = {"sampled": Sampled, "full": Full, "topk": TopK}


def estimator_of(problem: Problem) -> Estimator:
    if problem.nll is not None:
        return NLL(problem)
    options = problem.options
    estimator = _ESTIMATORS[options.estimator](problem)
    if problem.labels is not None and options.sft_temperature is None:
        estimator = WithLabels(estimator)
    if problem.has_terms:
        estimator = WithTerms(estimator)
    return estimator
