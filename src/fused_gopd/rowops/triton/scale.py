# mypy: ignore-errors
"""A gradient times a factor in the dtype of its tensor, in one pass: PyTorch takes two, or casts slowly."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, factor_ptr, out_ptr, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """out = x * factor. The grid is (ceil(size / (BLOCK * BLOCKS)),).

    x_ptr        (size,) any floating dtype, read once
    factor_ptr   () fp32
    out_ptr      (size,) any floating dtype, written once; x itself where IN_PLACE, which a factor of 1 leaves untouched
    """
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    stop = tl.minimum(start + BLOCK * BLOCKS, size)
    factor = tl.load(factor_ptr)
    if IN_PLACE:
        # a loss that is differentiated by itself has 1: the device sees it, the host would have to wait
        stop = tl.where(factor == 1.0, start, stop)
    for first in range(start, stop, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < stop
        x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + index, (x * factor).to(out_ptr.dtype.element_ty), mask=inside)
