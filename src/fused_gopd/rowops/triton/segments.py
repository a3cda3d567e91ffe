# mypy: ignore-errors
"""The row kernel with several programs a row: a logit is read from memory once, and once more from L2.

``row_kernel`` reads a row twice, for the statistics and for the gradient. A row of three float32 models has 1.8 MB, so
the rows of all programs that run at a time are far more than L2 holds, and both readings are of memory. Here a row is
a number of segments, programs share it, and a row's second reading comes a few rows, ``lag``, after its first. An
item of work is one of

    scan          the state of one segment (``rows.scan``, ``rows.merge``), stored as one lane of its row
    second round  the sums of one segment, for the divergences that have such a round
    gradient      the gradient of one segment; that of segment 0 stores the row's statistics, too

The latter two merge the partial states of the row as its lanes were merged, in one order: all calls give the same bits.

Order. Programs take items by a ticket: the scan of row i, then the second round of row i - lag and the gradient of
the row before it by lag, then the same of row i + 1. What an item needs, the last phase of all segments of its row,
has a lower ticket, a ticket is taken by a program that runs, and a scan waits for nothing: so no item waits forever,
however many programs run at a time (one in Triton's interpreter). The programs need not be resident together.

Memory. A program stores a partial state, then raises the row's counter of the phase with release semantics at the scope
of the device. Triton has one thread do that, so a barrier before it orders the stores, and the loads of logits, of all
threads of the program. Another program reads the counter with acquire semantics, by one thread too; the value goes to
the other threads through a barrier. Partial states are read past the first-level cache, which is not coherent. Logits
need none of that: in place, a gradient is stored only after all segments of its row have been scanned, over logits
that no other item reads.
"""

import triton
import triton.language as tl

from .rows import (
    CENTRE,
    VALUE,
    finish,
    merge,
    relative,
    scan,
    second_round,
    second_values,
    store_statistics,
    tile_columns,
    token_logits,
    write_gradient,
)

STATE = tl.constexpr(11)  # numbers of a state of rows.merge
TOKEN = tl.constexpr(11)  # first of three: the token's logits, of segment 0
SECOND = tl.constexpr(14)  # first of two: the sums of a second round
FIELDS = tl.constexpr(16)


@triton.jit
def publish(counter_ptr):
    """After all that the program has stored and loaded so far: one segment more has been through a phase."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, SEGMENTS: tl.constexpr):
    """Until all segments of a row have been through a phase; what they stored can be read then."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < SEGMENTS:
        pass


@triton.jit
def field(partial_row, FIELD: tl.constexpr, SEGMENTS: tl.constexpr):
    """[SEGMENTS], of all segments."""
    return tl.load(partial_row + FIELD * SEGMENTS + tl.arange(0, SEGMENTS), volatile=True)


@triton.jit
def maxima_and_sums(partial_row, FIELD: tl.constexpr, SEGMENTS: tl.constexpr):
    """A maximum of each segment with its sum of exponentials; -inf and 0, as of a lane, without support."""
    total = field(partial_row, FIELD + 1, SEGMENTS)
    return tl.where(total == 0.0, float("-inf"), field(partial_row, FIELD, SEGMENTS)), total


@triton.jit
def merged_row(partial_row, mix, DIVERGENCE: tl.constexpr, SEGMENTS: tl.constexpr, FLUSH: tl.constexpr):
    """The state of a row from those of its segments."""
    max_z, sum_z = maxima_and_sums(partial_row, 0, SEGMENTS)
    max_q, sum_q = maxima_and_sums(partial_row, 3, SEGMENTS)
    max_r, sum_r = maxima_and_sums(partial_row, 5, SEGMENTS)
    max_u, sum_u = maxima_and_sums(partial_row, 7, SEGMENTS)
    weighted_logit = field(partial_row, 2, SEGMENTS)
    weighted_gap = field(partial_row, 9, SEGMENTS)
    weighted_target = field(partial_row, 10, SEGMENTS)
    state = (max_z, sum_z, weighted_logit, max_q, sum_q, max_r, sum_r, max_u, sum_u, weighted_gap, weighted_target)
    return merge(state, mix, DIVERGENCE, FLUSH)


@triton.jit
def segment_item(
    student, teacher, ref, mix, constants, weights, policy, row, stats_row, stats_stride, out_row, slope, tanh_of_z, V,
    tile, phase, segment, partial_row, scanned_ptr, second_ptr, redo_ptr,
    DIVERGENCE: tl.constexpr, POLICY: tl.constexpr, ALIASED: tl.constexpr, SEGMENTS: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """One item; the arguments up to ``tile`` are those of ``rows.whole_row``."""
    BLOCK_V: tl.constexpr = tile[1] * tile[2] * tile[3]
    token_ptr = weights[4]
    SECOND_ROUND: tl.constexpr = DIVERGENCE == "mixture" or DIVERGENCE == "alpha"
    # in tiles, so that the compiler sees on what multiples columns start; the last segment has the rest of the row, too
    tiles = V // BLOCK_V
    first = tl.minimum(segment * tl.cdiv(tiles, SEGMENTS), tiles)
    last = tl.minimum(first + tl.cdiv(tiles, SEGMENTS), tiles)
    part = (first * BLOCK_V, last * BLOCK_V, tl.where(segment == SEGMENTS - 1, V, last * BLOCK_V))
    if phase == 0:
        state = merge(scan(student, teacher, ref, mix, part, V, tile, DIVERGENCE, FLUSH), mix, DIVERGENCE, FLUSH)
        for i in tl.static_range(STATE):
            tl.store(partial_row + i * SEGMENTS + segment, state[i])
        if token_ptr is not None:  # noqa: SIM102, a branch the compiler resolves
            if segment == 0:  # before any segment's gradient is stored over it
                logit_z, logit_q, logit_r = token_logits(student, teacher, ref, mix, token_ptr, row, V)
                tl.store(partial_row + TOKEN * SEGMENTS, logit_z)
                tl.store(partial_row + (TOKEN + 1) * SEGMENTS, logit_q)
                tl.store(partial_row + (TOKEN + 2) * SEGMENTS, logit_r)
        publish(scanned_ptr)
    else:
        wait(scanned_ptr, SEGMENTS)
        state = merged_row(partial_row, mix, DIVERGENCE, SEGMENTS, FLUSH)
        logsum_z, logsum_q, logsum_r, logsum_u, mean_logit, mean_gap, value, near = finish(state, mix, DIVERGENCE)
        maxima = (state[0], state[3], state[5])
        if SECOND_ROUND and phase == 1:
            centre = 0.0
            total = 0.0
            if near:
                centre, total = second_round(
                    student, teacher, ref, mix, maxima, 0.0, logsum_z, logsum_u, constants, part, V, tile,
                    DIVERGENCE, FLUSH,
                )  # fmt: skip
            tl.store(partial_row + SECOND * SEGMENTS + segment, centre)
            tl.store(partial_row + (SECOND + 1) * SEGMENTS + segment, total)
            publish(second_ptr)
        elif near:
            logit_z = 0.0
            logit_q = 0.0
            logit_r = 0.0
            centre = 0.0
            if token_ptr is not None:
                logit_z = tl.load(partial_row + TOKEN * SEGMENTS, volatile=True)
                logit_q = tl.load(partial_row + (TOKEN + 1) * SEGMENTS, volatile=True)
                logit_r = tl.load(partial_row + (TOKEN + 2) * SEGMENTS, volatile=True)
            if SECOND_ROUND:
                wait(second_ptr, SEGMENTS)
                centre, value = second_values(
                    tl.sum(field(partial_row, SECOND, SEGMENTS), axis=0),
                    tl.sum(field(partial_row, SECOND + 1, SEGMENTS), axis=0),
                    constants, DIVERGENCE,
                )  # fmt: skip
            if segment == 0:
                store_statistics(
                    stats_row, stats_stride, state, mix, logsum_z, logsum_q, logsum_r, logsum_u, mean_logit, mean_gap,
                    value, 0.0, logit_z, logit_q, logit_r, token_ptr is not None, SECOND_ROUND,
                )  # fmt: skip
                if SECOND_ROUND:
                    tl.store(stats_row + CENTRE * stats_stride, centre)
                    tl.store(stats_row + VALUE * stats_stride, value)
            if out_row is not None:
                write_gradient(
                    student, teacher, ref, mix, maxima, 0.0, logsum_z, logsum_u, mean_logit, mean_gap, centre,
                    relative(logit_z, state[0]), constants, weights, policy, row, out_row, slope, tanh_of_z, part, V,
                    tile, POLICY, DIVERGENCE, ALIASED, FLUSH,
                )  # fmt: skip
        elif segment == 0:
            # Rare, see rows.second_look, and decided alike by all segments: row_kernel does the row after this launch.
            tl.store(redo_ptr, 1)


@triton.jit
def segments_kernel(
    student_ptr, student_stride, student_bias, student_pre, student_post,
    teacher_ptr, teacher_stride, teacher_bias, teacher_pre, teacher_post,
    ref_ptr, ref_stride, ref_bias, ref_pre, ref_post,
    share, reward_scale_ptr, token_ptr, stats_ptr, stats_stride,
    divergence_weight_ptr, divergence_weight_stride, token_weight_ptr, token_weight_stride,
    out_ptr, out_stride, slope, tanh_of_z, V,
    a, one_minus_a, turn, c_t, c_p, kappa, forward_weight_ptr,
    policy_teacher_ptr, policy_teacher_stride, policy_ref_ptr, policy_ref_stride, policy_share, policy_scale_ptr,
    old_ptr, rollout_ptr,
    logprob_min, advantage_low, advantage_high, ratio_low, ratio_high, clip_dual, importance_cap,
    partial_ptr, ticket_ptr, scanned_ptr, second_ptr, redo_ptr, C, lag,
    POLICY: tl.constexpr, POLICY_NEAR_TEACHER: tl.constexpr,
    STUDENT_KIND: tl.constexpr, TEACHER_KIND: tl.constexpr, REF_KIND: tl.constexpr, DIVERGENCE: tl.constexpr,
    NEAR_TEACHER: tl.constexpr, NEAR_END: tl.constexpr, ALIASED: tl.constexpr, SEGMENTS: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """Statistics, and with an ``out_ptr`` the gradient, of C rows. The grid is any number of programs.

    The arguments of ``rows.row_kernel``, and
    partial_ptr               (C, FIELDS, SEGMENTS) fp32, not initialised
    ticket_ptr                () int32, 0 before the launch: items that have been taken
    scanned_ptr, second_ptr   (C,) int32, 0 before: segments that have been through a phase
    redo_ptr                  (C,) int32, 0 before: 1 of a row of which nothing was stored, for row_kernel
    lag                       rows between the phases of a row

    Bytes per row: each model's V logits from memory once, from L2 once or twice more, and V gradients.
    """
    PHASES: tl.constexpr = 3 if DIVERGENCE == "mixture" or DIVERGENCE == "alpha" else 2
    # of statistics alone, the last phase is one item of a row
    ITEMS: tl.constexpr = SEGMENTS * (PHASES - 1) + (SEGMENTS if out_ptr is not None else 1)
    columns = tile_columns(REPEAT, LANES, VECTOR)
    items = (C + (PHASES - 1) * lag) * ITEMS
    item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while item < items:
        phase = item % ITEMS // SEGMENTS
        segment = item % ITEMS % SEGMENTS
        row = item // ITEMS - phase * lag
        if (row >= 0) & (row < C):
            row64 = row.to(tl.int64)
            segment_item(
                (student_ptr + row64 * student_stride, student_bias, student_pre, student_post, STUDENT_KIND),
                (
                    teacher_ptr + row64 * teacher_stride if teacher_ptr is not None else None,
                    teacher_bias, teacher_pre, teacher_post, TEACHER_KIND,
                ),
                (
                    ref_ptr + row64 * ref_stride if ref_ptr is not None else None,
                    ref_bias, ref_pre, ref_post, REF_KIND,
                ),
                (
                    share, tl.load(reward_scale_ptr + row) if reward_scale_ptr is not None else None,
                    teacher_ptr is not None, ref_ptr is not None, NEAR_TEACHER,
                ),
                (a, one_minus_a, turn, c_t, c_p, kappa, NEAR_END),
                (
                    divergence_weight_ptr, divergence_weight_stride, token_weight_ptr, token_weight_stride, token_ptr,
                    forward_weight_ptr,
                ),
                (
                    policy_teacher_ptr, policy_teacher_stride, policy_ref_ptr, policy_ref_stride, policy_share,
                    policy_scale_ptr, old_ptr, rollout_ptr, logprob_min, advantage_low, advantage_high, ratio_low,
                    ratio_high, clip_dual, importance_cap, POLICY_NEAR_TEACHER,
                ),
                row, stats_ptr + row, stats_stride, out_ptr + row64 * out_stride if out_ptr is not None else None,
                slope, tanh_of_z, V, (columns, REPEAT, LANES, VECTOR, STAGES),
                phase, segment, partial_ptr + row64 * (FIELDS * SEGMENTS), scanned_ptr + row, second_ptr + row,
                redo_ptr + row, DIVERGENCE, POLICY, ALIASED, SEGMENTS, FLUSH,
            )  # fmt: skip
        item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
