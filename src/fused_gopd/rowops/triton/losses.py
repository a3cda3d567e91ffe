# mypy: ignore-errors
"""The token loss of a divergence over the whole vocabulary: the values of fused_gopd/objective/divergences.py."""

import triton
import triton.language as tl

from .policy import LOGSUM_STUDENT, mixed_logprob

# Values of Stat (fused_gopd.rowops), which a kernel cannot read from an enum.
LOGSUM_TEACHER = tl.constexpr(1)
LOGSUM_REF = tl.constexpr(2)
LOGSUM_TARGET = tl.constexpr(3)
MEAN_GAP = tl.constexpr(5)
VALUE = tl.constexpr(7)
MEAN_TARGET_GAP = tl.constexpr(7)


@triton.jit
def losses_kernel(
    stats_ptr, stats_stride, out_ptr, C, share, reward_scale_ptr, weight, weight_ptr,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_REF: tl.constexpr, NEAR_TEACHER: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out`` (C,) from statistics (len(Stat), C), BLOCK_C tokens a program.

    share, NEAR_TEACHER   as in rows.target, for a lambda that all tokens have
    reward_scale_ptr      (C,) fp32 lambda, with which the two are ignored, or None
    weight, weight_ptr    of the forward KL in ``mixed``: a number, or (C,) fp32; the other one is None
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < C
    stats = stats_ptr + rows
    logsum = tl.load(stats + LOGSUM_STUDENT * stats_stride, mask=live)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "mixed":
        gap = tl.load(stats + MEAN_TARGET_GAP * stats_stride, mask=live)
        forward = gap + (logsum - tl.load(stats + LOGSUM_TARGET * stats_stride, mask=live))
        loss = tl.where(forward < 0.0, 0.0, forward)  # NaN stays
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "mixed":
        if HAS_TEACHER:
            target = tl.load(stats + LOGSUM_TEACHER * stats_stride, mask=live)
        if HAS_REF:
            ref = tl.load(stats + LOGSUM_REF * stats_stride, mask=live)
            if HAS_TEACHER:
                lam = None
                if reward_scale_ptr is not None:
                    lam = tl.load(reward_scale_ptr + rows, mask=live)
                target = mixed_logprob(target, ref, lam, share, NEAR_TEACHER)
            else:
                target = ref
        reverse = tl.load(stats + MEAN_GAP * stats_stride, mask=live) + (target - logsum)
        if DIVERGENCE == "mixed":
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + rows, mask=live)
            loss = weight * loss + (1.0 - weight) * reverse
        else:
            loss = reverse
    if DIVERGENCE == "second round":
        value = tl.load(stats + VALUE * stats_stride, mask=live)
        loss = tl.where(value < 0.0, 0.0, value)
    tl.store(out_ptr + rows, tl.where(logsum == float("-inf"), 0.0, loss), mask=live)
