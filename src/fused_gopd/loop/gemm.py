"""The matrix products of a head, with float32 accumulation whatever the dtype of the weight.

Three products: logits of a chunk, gradient of its hidden states, and the chunk's share of the weight gradient. All run
on a GEMM of PyTorch's. Where that cannot take low-precision operands and give float32 (a CPU), the weight is widened
block by block into a small buffer, never whole: exact, and faster than MKL's bfloat16 GEMM on CPUs without AMX.

On a CPU PyTorch multiplies float32 matrices with MKL, which on AMD's processors runs kernels of 256 bits that leave out
part of what they can do. There the products go to oneDNN, the other library in PyTorch, block by block too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .chunking import BLOCK_ELEMENTS

_LOW_PRECISION = (torch.bfloat16, torch.float16)

# oneDNN adds nothing to what is there: its product over a block of the vocabulary is added in a pass of its own. A
# block for the gradient of the hidden states therefore has this many entries, where no buffer is widened: on Zen 4 up
# to 10 % faster than 2^20 elements at H = 4096, and at H = 256 a third faster than 16384 entries.
_DHIDDEN_ENTRIES = 4096

# Multiply-adds from which on a product goes to oneDNN, where it does: it generates code for every new shape, which
# takes milliseconds.
_ONEDNN_WORK = 1 << 24
# Rows from which on the weight's gradient goes to oneDNN, where it does. With fewer its time is that of reading and
# writing V x H, for which MKL needs one pass.
_ONEDNN_DWEIGHT_ROWS = 64


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """What every product runs in: its operands' dtype decides, and float32 does not become bfloat16 on the way."""
    on = _has_autocast(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


_has_autocast = functools.cache(torch.amp.is_autocast_available)


Loop = TypeVar("Loop", bound=Callable[..., Any])


def in_own_precision(loop: Loop) -> Loop:
    """A loop over an estimator's problem, or over a problem, that runs :func:`without_autocast` on its device."""

    @functools.wraps(loop)
    def wrapped(walked: Any, *args: Any, **kwargs: Any) -> Any:
        with without_autocast(getattr(walked, "problem", walked).device):
            return loop(walked, *args, **kwargs)

    return cast("Loop", wrapped)


def accumulates_low_precision(x: Tensor) -> bool:
    """Whether the library multiplies this tensor's dtype as it is and returns float32: CUDA does, ROCm does not yet."""
    return x.is_cuda and torch.version.hip is None and x.dtype in _LOW_PRECISION


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """dtype in which the products below want the gradient of the logits."""
    if accumulates_low_precision(weight) or weight.dtype == torch.float64:
        return weight.dtype
    return torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _LOW_PRECISION else x


# Elements of selected rows of a weight that are copied at once: a GPU would rather have few launches.
_SELECTED = {"cpu": BLOCK_ELEMENTS, "gpu": 1 << 26}


class Libraries(NamedTuple):
    """Whether float32 matrices on a CPU are better multiplied by oneDNN than by MKL."""

    products: bool = False  # logits and the gradient of the hidden states
    dweight: bool = False  # the gradient of the weight


@functools.cache
def _libraries() -> Libraries:
    """By what the CPU reports alone: two runs give the same bits."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return Libraries()
    if not hasattr(torch.cpu, "get_capabilities") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return Libraries()  # neither is part of PyTorch's stable interface
    return libraries_for(torch.cpu.get_capabilities())


def libraries_for(capabilities: Mapping[str, Any]) -> Libraries:
    """The choice for a CPU, by what PyTorch says of it.

    MKL chooses its code by the vendor and takes the one for AVX2 on every AMD processor. oneDNN chooses by the
    instruction set: with 512-bit multipliers (Zen 5) it is twice as fast in everything. With 512 bits in two halves
    (Zen 4) their best is the same: oneDNN is ahead but in the weight's gradient, where it is a tenth behind at 256 rows
    and level at 512. With AVX2 alone (Zen 3) MKL is ahead there, since it adds in place. The measurements:
    docs/performance-log.md.
    """
    amd = "AMD" in str(capabilities.get("cpu_name"))
    return Libraries(amd and bool(capabilities.get("avx2")), amd and bool(capabilities.get("avx512_f")))


def prefers_onednn() -> bool:
    return _libraries().products


def _uses_onednn(rows: int, weight: Tensor, dweight: bool = False) -> bool:
    """Whether the products of so many rows with a weight, or that which is its gradient, go to oneDNN."""
    if rows * weight.numel() < _ONEDNN_WORK or not weight.is_cpu or weight.dtype == torch.float64:
        return False
    chosen = _libraries().dweight and rows >= _ONEDNN_DWEIGHT_ROWS if dweight else _libraries().products
    return chosen and bool(torch.backends.mkldnn.enabled)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for float32 matrices."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")  # type: ignore[no-any-return]


def _blocks(V: int, width: int) -> Iterator[slice]:
    """Slices of the vocabulary that make blocks of ``width`` elements an entry."""
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, V, step):
        yield slice(start, min(start + step, V))


def _wide_blocks(weight: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary and the weight's rows there in float32; the buffer of a low-precision one is reused."""
    buffer: Tensor | None = None
    for rows in _blocks(weight.shape[0], width):
        if weight.dtype == torch.float32:
            yield rows, weight[rows]
            continue
        if buffer is None:
            buffer = torch.empty(weight[rows].shape, dtype=torch.float32, device=weight.device)
        yield rows, buffer[: rows.stop - rows.start].copy_(weight[rows])


Product = Callable[[Tensor], object]  # of hidden states (C, H)


def logits_into(
    out: Tensor,  # (C, V) float32, float64 for a float64 weight, or the dtype of the weight; rows may be strided
    weight: Tensor,  # (V, H)
) -> Product:
    """out = hidden @ weight.T, the same for all chunks of C tokens: how it is computed is decided once."""
    if not weight.shape[0]:
        return lambda hidden: None
    same = out.dtype == weight.dtype
    if not same and accumulates_low_precision(weight):
        return functools.partial(torch.ops.aten.mm.dtype_out, mat2=weight.T, out_dtype=torch.float32, out=out)
    onednn = _uses_onednn(out.shape[0], weight)
    if same and not onednn:
        return functools.partial(torch.mm, mat2=weight.T, out=out)
    return functools.partial(_logits_by_blocks, weight=weight, out=out, onednn=onednn)


def logits_of_rows_into(out: Tensor, weight: Tensor, rows: Tensor) -> Product:  # (C, V), (rows, H), (V,) int64
    """out = hidden @ weight[rows].T, of whose weight a block at a time is copied."""
    kind = "cpu" if weight.is_cpu else "gpu"
    step = max(1, _SELECTED[kind] // max(out.shape[0], weight.shape[1]))
    buffer = weight.new_empty(min(step, rows.shape[0]), weight.shape[1])
    if not rows.shape[0]:
        return lambda hidden: None
    blocks = [
        (part, buffer[: part.shape[0]], columns)
        for part, columns in zip(torch.split(rows, step), torch.split(out, step, 1), strict=True)
    ]
    products = [logits_into(columns, block) for _, block, columns in blocks]

    def product(hidden: Tensor) -> None:
        for (part, block, _), multiply in zip(blocks, products, strict=True):
            torch.index_select(weight, 0, part, out=block)
            multiply(hidden)

    return product


def _logits_by_blocks(hidden: Tensor, weight: Tensor, out: Tensor, onednn: bool) -> None:
    wide_hidden = _wide(hidden)
    for columns, block in _wide_blocks(weight, max(hidden.shape)):
        if onednn:
            out[:, columns] = _onednn(wide_hidden, block.T)
        else:
            torch.mm(wide_hidden, block.T, out=out[:, columns])


def dhidden(
    dlogits: Tensor,  # (C, V) of gradient_dtype(weight)
    weight: Tensor,  # (V, H)
    out: Tensor | None = None,  # (C, H) of any dtype; None is new memory, float32 or float64 for a float64 weight
) -> Tensor:
    """dlogits @ weight, summed in float32 (float64 for a float64 weight) and rounded to the dtype of ``out``.

    On a GPU a sum for an ``out`` of the weight's dtype is PyTorch's own, which may round parts of it on the way:
    ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``.
    """
    return dhidden_of(dlogits, weight, None if out is None else out.dtype)(out=out)


def dhidden_of(dlogits: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """:func:`dhidden` as a function of ``out``, of that dtype: how it is computed is decided once for all chunks."""
    if dlogits.dtype in _LOW_PRECISION:
        if dtype is None:
            return lambda out: torch.ops.aten.mm.dtype(dlogits, weight, torch.float32)
        if dtype == weight.dtype:
            return functools.partial(torch.mm, dlogits, weight)
        return functools.partial(torch.ops.aten.mm.dtype_out, dlogits, weight, torch.float32)
    if dtype is not None and dtype != dlogits.dtype:
        wide = dhidden_of(dlogits, weight, None)
        return lambda out: out.copy_(wide(out=None))
    onednn = _uses_onednn(dlogits.shape[0], weight)
    if weight.dtype == dlogits.dtype and not onednn:
        return functools.partial(torch.mm, dlogits, weight)
    return functools.partial(_dhidden_by_blocks, dlogits, weight, onednn)


def _dhidden_by_blocks(dlogits: Tensor, weight: Tensor, onednn: bool, out: Tensor | None) -> Tensor:
    if out is None:
        out = dlogits.new_empty(dlogits.shape[0], weight.shape[1])
    if not weight.shape[0]:
        return out.zero_()
    width = weight.shape[1]
    if weight.dtype == dlogits.dtype:  # oneDNN copies C x the entries of a block
        width = max(BLOCK_ELEMENTS // _DHIDDEN_ENTRIES, dlogits.shape[0] // 4)
    for columns, block in _wide_blocks(weight, width):
        if onednn:
            product = _onednn(dlogits[:, columns], block)
            out = out.add_(product) if columns.start else out.copy_(product)
        else:
            out.addmm_(dlogits[:, columns], block, beta=1 if columns.start else 0)
    return out


def add_dweight_(
    accumulator: Tensor,  # (V, H) float32, float64 for float64 operands
    dlogits: Tensor,  # (V, C) of gradient_dtype(weight): a transposed view
    hidden: Tensor,  # (C, H)
    *,
    first: bool = False,  # overwrite whatever is in the accumulator: saves a pass of V x H to zero it
) -> Tensor:
    """accumulator += dlogits @ hidden"""
    return dweight_into(accumulator, dlogits)(hidden, first)


def dweight_into(accumulator: Tensor, dlogits: Tensor) -> Callable[[Tensor, bool], Tensor]:  # (V, H), (V, C)
    """:func:`add_dweight_` as a function of ``hidden`` and ``first``: how it is computed is decided once."""
    if dlogits.dtype in _LOW_PRECISION:
        return lambda hidden, first: torch.ops.aten.addmm.dtype_out(
            accumulator, dlogits, hidden, torch.float32, beta=0 if first else 1, out=accumulator
        )
    if _uses_onednn(dlogits.shape[1], accumulator, dweight=True):
        return functools.partial(_add_dweight_by_blocks, accumulator, dlogits)

    def product(hidden: Tensor, first: bool) -> Tensor:
        if hidden.dtype is not dlogits.dtype:
            hidden = _wide(hidden)
        return torch.mm(dlogits, hidden, out=accumulator) if first else accumulator.addmm_(dlogits, hidden)

    return product


def _add_dweight_by_blocks(accumulator: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> Tensor:
    hidden, C = _wide(hidden), hidden.shape[0]
    buffer: Tensor | None = None
    for rows in _blocks(accumulator.shape[0], max(hidden.shape)):
        width = rows.stop - rows.start
        if buffer is None:
            buffer = torch.empty(2, C * width, dtype=torch.float32, device=dlogits.device)
        # PyTorch transposes a contiguous matrix several times as fast as a slice of columns
        columns = buffer[0, : C * width].view(C, width).copy_(dlogits[rows].T)
        product = _onednn(buffer[1, : C * width].view(width, C).copy_(columns.T), hidden)
        if first:
            accumulator[rows] = product
        else:
            accumulator[rows] += product
    return accumulator


# Above this share of the vocabulary the products over all of it are the faster ones: selecting copies its operands.
_MOST_SELECTED = 0.5


def selected(dlogits: Tensor, smallest: float) -> Tensor | None:
    """Columns in which any entry is at least ``smallest``, ascending; None where they are most of the vocabulary.

    NaN counts. Waits for the device: how many there are is a shape.
    """
    if not dlogits.numel():
        return None
    largest = torch.maximum(dlogits.amax(0), -dlogits.amin(0))
    columns = (~(largest < smallest)).nonzero()[:, 0]
    return None if columns.shape[0] > _MOST_SELECTED * dlogits.shape[1] else columns


def selected_products(
    dlogits: Tensor,  # (C, V) of gradient_dtype(weight)
    weight: Tensor,  # (V, H)
    columns: Tensor,  # (K,) int64
    hidden: Tensor | None,  # (C, H), as add_dweight_ takes it
    accumulator: Tensor | None,  # (V, H) float32, to which the selected rows of dlogits.T @ hidden are added
    rows: bool,  # whether dlogits @ weight is wanted
) -> Tensor | None:  # (C, H) float32
    """:func:`dhidden` and :func:`add_dweight_` over some columns alone."""
    kind = "cpu" if dlogits.device.type == "cpu" else "gpu"
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out = torch.zeros(dlogits.shape[0], weight.shape[1], dtype=wide, device=weight.device) if rows else None
    for some in torch.split(columns, max(1, _SELECTED[kind] // weight.shape[1])):
        part = dlogits.index_select(1, some)
        if out is not None:
            out += dhidden(part, weight.index_select(0, some))
        if accumulator is not None:
            assert hidden is not None
            product = torch.empty(some.shape[0], weight.shape[1], dtype=wide, device=weight.device)
            # not index_add: its sums have no fixed order on a GPU
            accumulator[some] += add_dweight_(product, part.T, hidden, first=True)
    return out


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
    for columns in _blocks(V, C):
        accumulator[columns] += rows @ dlogits[:, columns].to(accumulator.dtype)
    return accumulator


def add_at_(accumulator: Tensor, index: Tensor, values: Tensor) -> Tensor:  # (V, ...), (C,) int64, (C, ...)
    """accumulator[index[i]] += values[i] for every i."""
    # not index_add_: its sums have no fixed order on a GPU, where this sorts
    return accumulator.index_put_((index,), values, accumulate=True)
