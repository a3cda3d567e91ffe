"""The matrix products of a head, with float32 accumulation whatever the dtype of the weight.

Three products: logits of a chunk, gradient of its hidden states, and the chunk's share of the weight gradient. All run
on the library's GEMM. Where it cannot take low-precision operands and give float32 (a CPU), the weight is widened block
by block into a small buffer, never whole: on CPUs without AMX that is also faster than a native bfloat16 GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the buffer that a low-precision weight is widened into. 2^20 float32 are 4 MiB; on two AVX-512 cores
# blocks of 2^18 to 2^23 elements differed by less than 10 %, at 1.13 to 1.19 times the time of a float32 weight.
_WIDEN_ELEMENTS = 1 << 20


def accumulates_low_precision(x: Tensor) -> bool:
    """Whether the library multiplies this tensor's dtype as it is and returns float32: CUDA does, ROCm does not yet."""
    return x.is_cuda and torch.version.hip is None and x.dtype in (torch.bfloat16, torch.float16)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """dtype in which the products below want the gradient of the logits."""
    if accumulates_low_precision(weight) or weight.dtype == torch.float64:
        return weight.dtype
    return torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _wide_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary and the weight's rows there in float32; the buffer is reused."""
    V, H = weight.shape
    step = max(1, _WIDEN_ELEMENTS // max(1, H))
    buffer = torch.empty(min(step, V), H, dtype=torch.float32, device=weight.device)
    for start in range(0, V, step):
        stop = min(start + step, V)
        yield slice(start, stop), buffer[: stop - start].copy_(weight[start:stop])


def logits_(
    out: Tensor,  # (C, V) float32, float64 for a float64 weight; rows may be strided
    hidden: Tensor,  # (C, H)
    weight: Tensor,  # (V, H)
) -> Tensor:
    """out = hidden @ weight.T"""
    if accumulates_low_precision(weight):
        return torch.ops.aten.mm.dtype_out(hidden, weight.T, torch.float32, out=out)  # type: ignore[no-any-return]
    if weight.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    wide_hidden = _wide(hidden)
    for columns, block in _wide_blocks(weight):
        torch.mm(wide_hidden, block.T, out=out[:, columns])
    return out


def dhidden(
    dlogits: Tensor,  # (C, V) of gradient_dtype(weight)
    weight: Tensor,  # (V, H)
) -> Tensor:  # (C, H) float32, float64 for a float64 weight
    """dlogits @ weight"""
    if accumulates_low_precision(weight):
        return torch.ops.aten.mm.dtype(dlogits, weight, torch.float32)  # type: ignore[no-any-return]
    if weight.dtype == dlogits.dtype:
        return torch.mm(dlogits, weight)
    out = torch.zeros(dlogits.shape[0], weight.shape[1], dtype=torch.float32, device=dlogits.device)
    for columns, block in _wide_blocks(weight):
        out.addmm_(dlogits[:, columns], block)
    return out


def add_dweight_(
    accumulator: Tensor,  # (V, H) float32, float64 for float64 operands
    dlogits: Tensor,  # (C, V) of gradient_dtype(weight)
    hidden: Tensor,  # (C, H)
    *,
    first: bool = False,  # overwrite whatever is in the accumulator: saves a pass of V x H to zero it
) -> Tensor:
    """accumulator += dlogits.T @ hidden"""
    beta = 0 if first else 1
    if accumulates_low_precision(dlogits):
        return torch.ops.aten.addmm.dtype_out(  # type: ignore[no-any-return]
            accumulator, dlogits.T, hidden, torch.float32, beta=beta, out=accumulator
        )
    return accumulator.addmm_(dlogits.T, _wide(hidden), beta=beta)


def add_dbias_(
    accumulator: Tensor,  # (V,) float32, float64 for float64 operands
    dlogits: Tensor,  # (C, V) of gradient_dtype(weight)
    scale: Tensor,  # () or (C,)
) -> Tensor:
    """accumulator += scale @ dlogits"""
    C, V = dlogits.shape
    rows = scale.to(accumulator.dtype).expand(C)
    if dlogits.dtype == accumulator.dtype:
        return accumulator.add_(rows @ dlogits)
    step = max(1, _WIDEN_ELEMENTS // max(1, C))
    for start in range(0, V, step):
        columns = slice(start, min(start + step, V))
        accumulator[columns] += rows @ dlogits[:, columns].to(accumulator.dtype)
    return accumulator
