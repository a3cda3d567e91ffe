"""Parametrizations of few cases where a full product would be hundreds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor


def covering(axes: Sequence[Sequence[Any]], strength: int = 2) -> list[tuple[Any, ...]]:
    """Cases in which every value of an axis meets every value of every other axis; always the same ones.

    With ``strength`` 1 every value occurs. Greedy: each case is the one of the full product that has the most pairs
    not seen yet.
    """

    def parts(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), strength))

    product = {case: parts(case) for case in itertools.product(*(range(len(axis)) for axis in axes))}
    missing = set().union(*product.values())
    cases = []
    while missing:
        best = max(product, key=lambda case: len(product[case] & missing))
        missing -= product.pop(best)
        cases.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, case, strict=True)) for case in sorted(cases)]


def _word(value: Any) -> str:
    if callable(value):  # whose address differs from process to process
        return "function"
    return "tensor" if isinstance(value, Tensor) else str(value)


def name(value: Any) -> str | None:
    """For the id of a test, the same in every process."""
    if isinstance(value, dict):
        return " ".join(map(_word, value.values())) or "default"
    if isinstance(value, tuple):
        return "-".join(map(_word, value))
    return None  # pytest's own


def pairwise(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize with every pair of values of two axes; an axis "backend" is the fixture."""
    indirect = [axis for axis in axes if axis in ("backend", "backend_dtype")]
    return pytest.mark.parametrize(tuple(axes), covering(list(axes.values())), indirect=indirect, ids=name)


def product_on_float64(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize ``backend_dtype`` and the axes: their product in float64, few cases on the native backend.

    In float64 an error of a formula is far above the rounding. What the native row operations compute is compared with
    that in tests/rowops; here they show that the loss calls them rightly: every pair of values of two axes, of two axes
    every value.
    """
    full = [("torch-float64", *case) for case in itertools.product(*axes.values())]
    some = [("native-float32", *case) for case in covering(list(axes.values()), min(2, len(axes) - 1))]
    return pytest.mark.parametrize(("backend_dtype", *axes), full + some, indirect=["backend_dtype"], ids=name)
