# mypy: ignore-errors
"""Statistics of one model straight from hidden states: a GEMM whose epilogue never writes a logit.

The vocabulary is split over programs; each keeps a running (maximum, sum, weighted sum, token logit) per row and writes
it once, a second small kernel merges the splits in their order. No locks, no atomics: the same bits on every run.

The same kernel can store exp(z - z[token]) in 16 bits on its way, which is the logit gradient p - 1[v = token] up to
one factor per row, except at the token. See :meth:`fused_gopd.rowops.RowOps.linear_exponentials`.
"""

import triton
import triton.language as tl

from .rows import (
    LEAST,
    LOGIT_STUDENT,
    LOGSUM_STUDENT,
    MAX_STUDENT,
    MEAN_LOGIT,
    MOST,
    exp,
    finite,
    kept,
    moved,
    transform,
)

# The largest sum of exp(z - z[token]) that a row may have: a token of probability 5e-20. Products of the stored
# exponentials with a weight, and 1 / sum times a hidden state, keep half of float32's range.
LARGEST_SUM = tl.constexpr(2.0**64)


@triton.jit
def token_logit_kernel(
    hidden_ptr, hidden_stride, hidden_stride_h, weight_ptr, weight_stride, weight_stride_h, bias_ptr, pre, post,
    token_ptr, logit_ptr, C, V, H, KIND: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """z[token] of every row, a dot product in fp32; -inf where the id is outside [0, V). The grid is (C / BLOCK_C,).

    hidden_ptr    (C, H) floating, any strides
    weight_ptr    (>= V, H) floating, any strides
    bias_ptr      (>= V,) any floating dtype, or None
    token_ptr     (C,) int64
    logit_ptr     (C,) fp32, written
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < C
    token = tl.load(token_ptr + rows, mask=live, other=-1)
    valid = (token >= 0) & (token < V)
    h = tl.arange(0, BLOCK_H)[None, :]
    hidden_row = hidden_ptr + tl.where(live, rows, 0).to(tl.int64)[:, None] * hidden_stride
    weight_row = weight_ptr + tl.where(valid, token, 0)[:, None] * weight_stride
    total = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        inside = h < H - start
        a = tl.load(hidden_row + (start + h) * hidden_stride_h, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(weight_row + (start + h) * weight_stride_h, mask=inside, other=0.0).to(tl.float32)
        total += a * b
    z = transform(tl.sum(total, axis=1), bias_ptr, token, valid, pre, post, KIND)
    tl.store(logit_ptr + rows, tl.where(valid, z, float("-inf")), mask=live)


@triton.jit
def bfloat16(x, WIDEN: tl.constexpr):
    """x rounded to the nearest; the interpreter by itself cuts the digits off."""
    if WIDEN:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def first_round(partial_ptr, rows, live, offset, C, splits):
    """Sums of linear_kernel relative to the token's logit, merged: total, weighted, maximum, and what follows of them.

    ``redo`` says for which rows they cannot be used: the sum is too large or NaN, or there is no such logit (the token
    has probability 0, or its id is outside the vocabulary). Their second round is relative to ``offset``, the maximum.
    """
    total = tl.zeros_like(offset)
    weighted = tl.zeros_like(offset)
    maximum = tl.zeros_like(offset) + float("-inf")
    for split in range(splits):
        partial = partial_ptr + split * 4 * C + rows
        maximum = tl.maximum(maximum, tl.load(partial, mask=live, other=float("-inf")))
        total += tl.load(partial + C, mask=live, other=0.0)
        weighted += tl.load(partial + 2 * C, mask=live, other=0.0)
    redo = live & ~((total <= LARGEST_SUM) & (tl.abs(offset) <= MOST))
    offset = tl.where(redo, finite(tl.maximum(maximum, offset)), offset)
    return total, weighted, maximum, offset, redo


@triton.jit
def linear_kernel(
    hidden_ptr, hidden_stride, hidden_stride_h, weight_ptr, weight_stride, weight_stride_h, bias_ptr, pre, post,
    token_ptr, partial_ptr, offset_ptr, first_ptr, out_ptr, out_stride, C, V, H, splits, group,
    KIND: tl.constexpr, INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr, EVEN_H: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    FLUSH: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Partial statistics of z = transform(hidden weight^T + bias) for one tile of rows and one slice of the vocabulary.

    hidden_ptr    (C, H) floating, any strides; with DESCRIPTORS a descriptor of it in blocks of BLOCK_C x BLOCK_H,
                  with WARP_SPECIALIZE rows of unit stride on 16 bytes, of which the kernel makes one: weight, out, too
    weight_ptr    (>= V, H) the same dtype, any strides; with DESCRIPTORS a descriptor, BLOCK_V x BLOCK_H
    bias_ptr      (>= V,) any floating dtype, or None
    token_ptr     (C,) int64
    partial_ptr   (splits, 4, C) fp32, written: maximum m, sum exp(z - m), sum exp(z - m) (z - m), z[token]

    With offset_ptr (else None, like the next two) it writes the exponentials, too, and sums all but the token's:

    offset_ptr    (C,) fp32, o = z[token] or -inf, from token_logit_kernel
    out_ptr       (C, >= V) bf16, unit stride along the vocabulary, written: exp(z - o), 0 at the token;
                  with DESCRIPTORS a descriptor, BLOCK_C x BLOCK_V / 2
    partial_ptr   (splits, 4, C) fp32, written: max z, sum exp(z - o), sum exp(z - o) (z - o), nothing
    first_ptr     None, or partial_ptr of a first round: tiles of rows that have one to redo are computed once more, the
                  rows to redo relative to their maxima, and all other programs end at once. See first_round

    The grid is (row tiles * splits,). Consecutive programs take the ``group`` row tiles of one slice: they walk through
    the same weight tiles together, which device memory then delivers once, and all slices of a group find its group *
    BLOCK_C hidden states in L2. Device memory is read about C / (group * BLOCK_C) times for the weight and once for the
    hidden states. With DESCRIPTORS the copy engine fetches the operands, and fills what is outside with 0; without,
    every thread computes addresses. With WARP_SPECIALIZE one group of 4 warps copies, two others multiply, each half of
    the rows: the epilogue of one runs beside the products of the other. With FLATTEN the loops over tiles and hidden
    units are one, so that operands of the next tile come in under an epilogue. WIDEN is for bf16 in the interpreter,
    whose dot takes raw bits and whose rounding truncates.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(C, BLOCK_C)
    first = pid // (group * splits) * group
    group = tl.minimum(row_tiles - first, group)
    local = pid - first * splits
    first_row = (first + local % group) * BLOCK_C
    rows = first_row + tl.arange(0, BLOCK_C)
    split = local // group
    vocabulary_tiles = tl.cdiv(V, BLOCK_V)
    begin = split * vocabulary_tiles // splits
    end = (split + 1) * vocabulary_tiles // splits

    if WARP_SPECIALIZE:
        # The compiler gives each of two consumers half of the rows. Here it halves the blocks of the descriptors, too;
        # those of the host it cannot: under Triton 3.6 they would copy twice the bytes that a buffer has.
        hidden_ptr = tl.make_tensor_descriptor(hidden_ptr, [C, H], [hidden_stride, 1], [BLOCK_C, BLOCK_H])
        weight_ptr = tl.make_tensor_descriptor(weight_ptr, [V, H], [weight_stride, 1], [BLOCK_V, BLOCK_H])
        if offset_ptr is not None:
            out_ptr = tl.make_tensor_descriptor(out_ptr, [C, V], [out_stride, 1], [BLOCK_C, BLOCK_V])

    live = rows < C
    # Rows past the end read row 0 and are not stored; columns past the vocabulary read column 0 and become -inf. So
    # that no load needs a mask along those axes.
    safe_rows = tl.where(live, rows, 0).to(tl.int64)
    token = tl.load(token_ptr + rows, mask=live, other=-1)
    valid = (token >= 0) & (token < V)
    token = tl.where(valid, token, -1).to(tl.int32)
    h = tl.arange(0, BLOCK_H)
    if not DESCRIPTORS:
        hidden_tile = hidden_ptr + safe_rows[:, None] * hidden_stride + h[None, :] * hidden_stride_h
    if offset_ptr is not None:
        base = tl.load(offset_ptr + rows, mask=live, other=0.0)
        if first_ptr is not None:
            _, _, _, base, redo = first_round(first_ptr, rows, live, base, C, splits)
            end = tl.where(tl.max(redo.to(tl.int32), axis=0) > 0, end, begin)

    maximum = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_C], tl.float32)
    token_logit = tl.zeros([BLOCK_C], tl.float32)
    for tile in tl.range(begin, end, warp_specialize=WARP_SPECIALIZE, flatten=FLATTEN):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = columns < V
        safe_columns = tl.where(inside, columns, 0).to(tl.int64)
        if not DESCRIPTORS:
            weight_tile = weight_ptr + safe_columns[None, :] * weight_stride + h[:, None] * weight_stride_h
        logits = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
        for start in range(0, H, BLOCK_H):
            if DESCRIPTORS:
                a = hidden_ptr.load([first_row, start])
                b = weight_ptr.load([tile * BLOCK_V, start]).T
            elif EVEN_H:
                a = tl.load(hidden_tile + start * hidden_stride_h)
                b = tl.load(weight_tile + start * weight_stride_h)
            else:
                a = tl.load(hidden_tile + start * hidden_stride_h, mask=h[None, :] < H - start, other=0.0)
                b = tl.load(weight_tile + start * weight_stride_h, mask=h[:, None] < H - start, other=0.0)
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            logits = tl.dot(a, b, logits, input_precision=INPUT_PRECISION)

        z = transform(logits, bias_ptr, columns[None, :], inside[None, :], pre, post, KIND)
        # Few tiles hold a token or the end of the vocabulary: a vote spares the others the comparisons per logit.
        here = (token >= tile * BLOCK_V) & (token < tile * BLOCK_V + BLOCK_V)
        found = tl.max(here.to(tl.int32), axis=0) > 0
        if WARP_SPECIALIZE:
            # Triton 3.6 specialises no loop with a branch that values leave.
            if offset_ptr is not None:
                z = tl.where(inside[None, :] & (columns[None, :] != token[:, None]), z, float("-inf"))
            else:
                if found:
                    own = tl.where(columns[None, :] == token[:, None], z, 0.0)
                    tl.store(partial_ptr + (4 * split + 3) * C + rows, tl.sum(own, axis=1), mask=live & here)
                z = tl.where(inside[None, :], z, float("-inf"))
        elif found | (tile * BLOCK_V + BLOCK_V > V):
            if offset_ptr is None:
                token_logit += tl.sum(tl.where(columns[None, :] == token[:, None], z, 0.0), axis=1)
                z = tl.where(inside[None, :], z, float("-inf"))
            else:
                z = tl.where(inside[None, :] & (columns[None, :] != token[:, None]), z, float("-inf"))
        new = tl.maximum(maximum, tl.max(z, axis=1))
        if offset_ptr is None:
            base = finite(new)
            move = moved(maximum, base)
            rescale = exp(-move, FLUSH)
            weighted = kept(weighted - move * total, rescale) * rescale
            total = total * rescale
        maximum = new
        relative = z - base[:, None]
        e = exp(relative, FLUSH)
        # e is 0 where z is -inf: any finite number will do there, and a NaN that maximum drops is in the total already
        weighted += tl.sum(e * tl.maximum(relative, LEAST), axis=1)
        total += tl.sum(e, axis=1)
        if offset_ptr is not None:
            if WARP_SPECIALIZE:
                out_ptr.store([first_row, tile * BLOCK_V], bfloat16(e, WIDEN))
            elif DESCRIPTORS:
                # two halves, one after the other, through half of the shared memory
                low, high = tl.split(tl.permute(tl.reshape(e, [BLOCK_C, 2, BLOCK_V // 2]), [0, 2, 1]))
                out_ptr.store([first_row, tile * BLOCK_V], bfloat16(low, WIDEN))
                out_ptr.store([first_row, tile * BLOCK_V + BLOCK_V // 2], bfloat16(high, WIDEN))
            else:
                written = out_ptr + safe_rows[:, None] * out_stride + columns[None, :]
                tl.store(written, bfloat16(e, WIDEN), mask=live[:, None] & inside[None, :])

    partial = partial_ptr + split * 4 * C + rows
    tl.store(partial, maximum, mask=live)
    tl.store(partial + C, total, mask=live)
    tl.store(partial + 2 * C, weighted, mask=live)
    if offset_ptr is None:
        if WARP_SPECIALIZE:
            live &= (token < begin * BLOCK_V) | (token >= end * BLOCK_V)  # the others have theirs
        tl.store(partial + 3 * C, tl.where(valid, token_logit, float("nan")), mask=live)


@triton.jit
def merge_kernel(partial_ptr, stats_ptr, stats_stride, C, splits, STATS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Statistics (``Stat``) of one model from the partial ones of linear_kernel. The grid is (ceil(C / BLOCK_C),).

    partial_ptr   (splits, 4, C) fp32, read once
    stats_ptr     (STATS, C) fp32 of any row stride, written once; what a single model does not have is 0
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < C
    maximum = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_C], tl.float32)
    token_logit = tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        partial = partial_ptr + split * 4 * C + rows
        part_maximum = tl.load(partial, mask=live, other=float("-inf"))
        new = tl.maximum(maximum, part_maximum)
        base = finite(new)
        move = moved(maximum, base)
        part_move = moved(part_maximum, base)
        old = tl.exp(-move)
        part = tl.exp(-part_move)
        part_total = tl.load(partial + C, mask=live, other=0.0)
        part_weighted = tl.load(partial + 2 * C, mask=live, other=0.0)
        weighted = kept(weighted - move * total, old) * old + kept(part_weighted - part_move * part_total, part) * part
        total = total * old + part_total * part
        token_logit += tl.load(partial + 3 * C, mask=live, other=0.0)
        maximum = new
    # log 0 = -inf is a row without support; its mean and maximum are 0.
    base = finite(maximum)
    mean = tl.where(total == 0.0, 0.0, weighted / total)
    zero = tl.zeros([BLOCK_C], tl.float32)
    for stat in tl.static_range(STATS):
        value = zero
        if stat == LOGSUM_STUDENT:
            value = tl.log(total)
        elif stat == MEAN_LOGIT:
            value = mean
        elif stat == LOGIT_STUDENT:
            value = token_logit - base
        elif stat == MAX_STUDENT:
            value = base
        tl.store(stats_ptr + stat * stats_stride + rows, value, mask=live)


@triton.jit
def merge_exponentials_kernel(
    partial_ptr, offset_ptr, token_ptr, stats_ptr, stats_stride, factor_ptr, entry_ptr, slope, C, V, splits,
    STATS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics, factor and entry at the token of every row of stored exponentials.

    partial_ptr    (2, splits, 4, C) fp32 of linear_kernel's two rounds; the second is read in rows that were redone
    offset_ptr     (C,) fp32 of token_logit_kernel
    token_ptr      (C,) int64
    stats_ptr      (STATS, C) fp32 of any row stride, written: what a single model does not have is 0
    factor_ptr     (C,) fp32, written: slope / sum exp(z - o); slope in a row without support
    entry_ptr      (C,) fp32, written: minus the sum of the exponentials, which is exp(z[token] - o) minus the sum of
                   all without the cancellation; 0 where the token has no logit or one of -inf
    slope          dz/dx

    The grid is (ceil(C / BLOCK_C),).
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < C
    token = tl.load(token_ptr + rows, mask=live, other=-1)
    valid = (token >= 0) & (token < V)
    logit = tl.load(offset_ptr + rows, mask=live, other=0.0)
    total, weighted, maximum, base, redo = first_round(partial_ptr, rows, live, logit, C, splits)
    total = tl.where(redo, 0.0, total)
    weighted = tl.where(redo, 0.0, weighted)
    for split in range(splits):
        partial = partial_ptr + (splits + split) * 4 * C + rows
        total += tl.load(partial + C, mask=redo, other=0.0)
        weighted += tl.load(partial + 2 * C, mask=redo, other=0.0)

    others = total
    own = tl.exp(logit - base)  # 1 in a row that was not redone
    total += own
    weighted += tl.where(own == 0.0, 0.0, own * (logit - base))
    nothing = total == 0.0  # a row without support: its mean and maximum are 0
    top = finite(tl.maximum(maximum, logit))
    logsum = tl.log(total) - (top - base)
    logsum = tl.where((logsum < 0.0) & ~nothing, 0.0, logsum)
    mean = tl.where(nothing, 0.0, weighted / total - (top - base))
    token_logit = tl.where(valid, logit - top, float("nan"))
    zero = tl.zeros([BLOCK_C], tl.float32)
    for stat in tl.static_range(STATS):
        value = zero
        if stat == LOGSUM_STUDENT:
            value = logsum
        elif stat == MEAN_LOGIT:
            value = mean
        elif stat == LOGIT_STUDENT:
            value = token_logit
        elif stat == MAX_STUDENT:
            value = top
        tl.store(stats_ptr + stat * stats_stride + rows, value, mask=live)

    tl.store(factor_ptr + rows, slope / tl.where(nothing, 1.0, total), mask=live)
    present = valid & (logit != float("-inf"))
    tl.store(entry_ptr + rows, tl.where(present, -others, 0.0), mask=live)
