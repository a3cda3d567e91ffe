"""The statistics by which tokens that another policy has sampled are masked, as options name them.

They are those of d = log p_old - log p_rollout of the sampled tokens; some are sums, means or extrema over the live
tokens of a sequence. Imported without PyTorch, as the options are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from ..values import require_number

Level = Literal["token", "sum", "mean", "max", "min"]
Bounds = tuple[tuple[str, tuple[float, float]], ...]  # statistic, (low, high)

# Name of the statistic -> (how it is reduced over the sequence, of which number of a token). Sum and mean of a ratio
# are taken of its logarithm: the product of the ratios, and their geometric mean.
STATISTICS: dict[str, tuple[Level, str]] = {
    "token_ratio": ("token", "ratio"),
    "sequence_ratio": ("sum", "ratio"),
    "geometric_ratio": ("mean", "ratio"),
    "seq_max_ratio": ("max", "ratio"),
    "seq_min_ratio": ("min", "ratio"),
    "token_k2": ("token", "k2"),
    "seq_sum_k2": ("sum", "k2"),
    "seq_mean_k2": ("mean", "k2"),
    "seq_max_k2": ("max", "k2"),
    "token_k3": ("token", "k3"),
    "seq_sum_k3": ("sum", "k3"),
    "seq_mean_k3": ("mean", "k3"),
    "seq_max_k3": ("max", "k3"),
    "token_difference": ("token", "difference"),
}


def statistic_bounds(name: str, value: Any) -> Bounds:
    """A mapping from statistics to (low, high), None for no bound, as pairs in the order of :data:`STATISTICS`."""
    try:
        given = dict(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a mapping from a statistic to bounds (low, high), got {value!r}") from None
    if not given:
        raise ValueError(f"{name} must name at least one statistic of {', '.join(STATISTICS)}")
    for key in given:
        if key not in STATISTICS:
            raise ValueError(f"{name} must be of the statistics {', '.join(STATISTICS)}, got {key!r}")
    return tuple((key, _bounds(f"{name}[{key!r}]", key, given[key])) for key in STATISTICS if key in given)


def _bounds(name: str, statistic: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (low, high), None for no bound, got {value!r}")
    low, high = (
        default if x is None or x == default else require_number(name, x)
        for x, default in zip(value, (-math.inf, math.inf), strict=True)
    )
    if STATISTICS[statistic][1] == "ratio" and (high <= 0 or -math.inf < low < 0):
        raise ValueError(f"{name} bounds a ratio, which is positive, got {value!r}")
    if not low < high or (low, high) == (-math.inf, math.inf):
        raise ValueError(f"{name} must have low < high, at least one of them given, got {value!r}")
    return low, high


def cap(name: str, value: Any) -> float | tuple[float, float]:
    """The upper bound of a weight, or (low, high)."""
    pair = value if isinstance(value, (tuple, list)) else (0, value)
    if len(pair) != 2:
        raise TypeError(f"{name} must be a number or a pair (low, high), got {value!r}")
    low, high = (require_number(name, x) for x in pair)
    if high <= 0:
        raise ValueError(f"{name} must be positive, got {high}")
    if not 0 <= low <= high:
        raise ValueError(f"{name} must satisfy 0 <= low <= high, got {value!r}")
    return (low, high) if pair is value or isinstance(value, list) else high


def of_sequences(statistics: Mapping[str, Any] | Bounds) -> bool:
    """Whether any of these statistics is one of a whole sequence."""
    return any(STATISTICS[name][0] != "token" for name in dict(statistics) if name in STATISTICS)
