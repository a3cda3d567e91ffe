# mypy: ignore-errors
"""A gradient times a factor in the dtype of its tensor, in one pass: PyTorch takes two, or casts slowly."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = x * factor. The grid is (ceil(size / BLOCK),).

    x_ptr        (size,) fp32, read once
    factor_ptr   () fp32
    out_ptr      (size,) any floating dtype, written once
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    tl.store(out_ptr + index, (x * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty), mask=inside)
