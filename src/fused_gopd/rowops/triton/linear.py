# mypy: ignore-errors
"""Statistics of one model straight from hidden states: a GEMM whose epilogue never writes a logit.

Forward only. The vocabulary is split over programs; each keeps a running (maximum, sum, weighted sum, token logit) per
row and writes it once, a second small kernel merges the splits in their order. No locks, no atomics: the same bits on
every run.
"""

import triton
import triton.language as tl

from .rows import LEAST, LOGIT_STUDENT, LOGSUM_STUDENT, MAX_STUDENT, MEAN_LOGIT, exp, finite, kept, moved, transform


@triton.jit
def linear_kernel(
    hidden_ptr, hidden_stride, hidden_stride_h, weight_ptr, weight_stride, weight_stride_h, bias_ptr, pre, post,
    token_ptr, partial_ptr, C, V, H, splits, group,
    KIND: tl.constexpr, INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr, EVEN_H: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    FLUSH: tl.constexpr,
):  # fmt: skip
    """Partial statistics of z = transform(hidden weight^T + bias) for one tile of rows and one slice of the vocabulary.

    hidden_ptr    (C, H) floating, any strides; with DESCRIPTORS a descriptor of it in blocks of BLOCK_C x BLOCK_H
    weight_ptr    (>= V, H) the same dtype, any strides; with DESCRIPTORS a descriptor, BLOCK_V x BLOCK_H
    bias_ptr      (>= V,) any floating dtype, or None
    token_ptr     (C,) int64
    partial_ptr   (splits, 4, C) fp32, written: maximum m, sum exp(z - m), sum exp(z - m) (z - m), z[token]

    The grid is (row tiles * splits,). Consecutive programs take the ``group`` row tiles of one slice: they walk through
    the same weight tiles together, which device memory then delivers once, and all slices of a group find its group *
    BLOCK_C hidden states in L2. Device memory is read about C / (group * BLOCK_C) times for the weight and once for the
    hidden states. With DESCRIPTORS the copy engine fetches the operands, and fills what is outside with 0; without,
    every thread computes addresses. WIDEN multiplies in fp32, for the interpreter, whose dot takes raw bits for bf16.
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

    live = rows < C
    # Rows past the end read row 0 and are not stored; columns past the vocabulary read column 0 and become -inf. So
    # that no load needs a mask along those axes.
    safe_rows = tl.where(live, rows, 0).to(tl.int64)
    token = tl.load(token_ptr + rows, mask=live, other=0)
    valid = (token >= 0) & (token < V)
    token = tl.where(valid, token, -1).to(tl.int32)
    h = tl.arange(0, BLOCK_H)
    if not DESCRIPTORS:
        hidden_tile = hidden_ptr + safe_rows[:, None] * hidden_stride + h[None, :] * hidden_stride_h

    maximum = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_C], tl.float32)
    token_logit = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(begin, end):
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
        z = tl.where(inside[None, :], z, float("-inf"))
        new = tl.maximum(maximum, tl.max(z, axis=1))
        base = finite(new)
        move = moved(maximum, base)
        rescale = exp(-move, FLUSH)
        relative = z - base[:, None]
        e = exp(relative, FLUSH)
        # e is 0 where z is -inf: any finite number will do there, and a NaN that maximum drops is in the total already
        weighted = kept(weighted - move * total, rescale) * rescale + tl.sum(e * tl.maximum(relative, LEAST), axis=1)
        total = total * rescale + tl.sum(e, axis=1)
        # few tiles hold a token: one vote spares the others three instructions per logit
        here = (token >= tile * BLOCK_V) & (token < tile * BLOCK_V + BLOCK_V)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            token_logit += tl.sum(tl.where(columns[None, :] == token[:, None], z, 0.0), axis=1)
        maximum = new

    partial = partial_ptr + split * 4 * C + rows
    tl.store(partial, maximum, mask=live)
    tl.store(partial + C, total, mask=live)
    tl.store(partial + 2 * C, weighted, mask=live)
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
