"""Fresh memory for chunk buffers and gradients."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Linux's madvise, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on a Linux CPU large tensors ask for huge pages before they are touched.

    A gradient of [256, 151936] float32 is 38 thousand small pages, and faulting them in took as long as computing it.
    It is advice: where the kernel does not take it, nothing changes.
    """
    out = torch.empty(*shape, dtype=dtype, device=device)
    if out.nbytes < 2 * _HUGE_PAGE or not out.is_cpu:
        return out
    madvise = _madvise()
    if madvise is not None:
        start = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        stop = (out.data_ptr() + out.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        madvise(start, stop - start, _MADV_HUGEPAGE)
    return out
