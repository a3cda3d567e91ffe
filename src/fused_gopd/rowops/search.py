"""Sizes of the search for the largest entries of a row, see :func:`fused_gopd.rowops.sparse.top`."""

from __future__ import annotations

# Entries of a block in the first round of the search for the largest, which compares maxima of blocks: near the square
# root of V / k, where both rounds compare as many numbers, for V = 151936 and k = 32.
BLOCK = 64
# Elements that are searched at once. On a CPU they stay in the cache; a GPU would rather have few launches.
_SEARCHED = {"cpu": 1 << 20, "gpu": 1 << 24}


def rows_at_once(vocab_size: int, device_type: str) -> int:
    """Rows whose largest entries are searched together."""
    return max(1, _SEARCHED["cpu" if device_type == "cpu" else "gpu"] // vocab_size)


def candidates_per_row(vocab_size: int, k: int) -> int:
    """Upper bound on the entries of a row that are compared one by one in the search for the k largest."""
    return min(vocab_size, k * BLOCK)
