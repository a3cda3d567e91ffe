# mypy: ignore-errors
"""The policy loss of sampled tokens: the formulas of fused_gopd/objective/policy.py, with ratios of single tokens.

``policy_term`` is a part of the row kernel, of one token per program, and of ``policy_kernel``, of a block of them.
Comparisons are written so that NaN stays NaN, which a maximum instruction may drop.
"""

import triton
import triton.language as tl

# Values of Stat and PolicyStat (fused_gopd.rowops), which a kernel cannot read from an enum.
LOGSUM_STUDENT = tl.constexpr(0)
LOGIT_STUDENT = tl.constexpr(8)
LOSS = tl.constexpr(0)
DLOGPROB = tl.constexpr(1)
ADVANTAGE = tl.constexpr(2)
CLIPPED = tl.constexpr(3)
IMPORTANCE = tl.constexpr(4)

MOST = tl.constexpr(3.4028234663852886e38)  # the largest float32


@triton.jit
def within(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def token_logprob(logit, logsum):
    return tl.where(logsum == float("-inf"), logsum, logit - logsum)


@triton.jit
def scored_logprob(statistics_ptr, stride, rows, live):
    logit = tl.load(statistics_ptr + LOGIT_STUDENT * stride + rows, mask=live)
    return token_logprob(logit, tl.load(statistics_ptr + LOGSUM_STUDENT * stride + rows, mask=live))


@triton.jit
def mixed_logprob(q, r, lam, share, NEAR_TEACHER: tl.constexpr):
    """lambda q + (1 - lambda) r; ``lam`` is lambda per token, or None: then share and NEAR_TEACHER say it."""
    near = q if NEAR_TEACHER else r
    if lam is not None:
        near = tl.where(lam > 0.5, q, r)
        share = tl.where(lam > 0.5, lam - 1.0, lam)
    gap = q - r
    target = within(near + share * gap, -MOST, MOST) + 0.0 * gap
    return tl.where(share == 0.0, near, target)


@triton.jit
def policy_term(
    student, rows, live, teacher_ptr, teacher_stride, ref_ptr, ref_stride, share, scale_ptr, old_ptr, rollout_ptr,
    logprob_min, advantage_low, advantage_high, ratio_low, ratio_high, clip_dual, importance_cap,
    NEAR_TEACHER: tl.constexpr,
):  # fmt: skip
    """Loss, its derivative with respect to ``student``, advantage, clipped (bool), importance weight.

    student                      log-prob of the token, one or a block
    rows, live                   which tokens of the vectors, and which of them there are; None is all
    teacher_ptr, ref_ptr         (len(Stat), C) fp32 statistics of one model alone, or None
    share, NEAR_TEACHER          as in rows.target, for a lambda that all tokens have
    scale_ptr                    (C,) fp32 lambda, with which the two are ignored, or None
    old_ptr, rollout_ptr         (C,) fp32 log-probs, or None
    logprob_min .. importance_cap   numbers of PolicyRule; a step that is left out has infinities, which change nothing
    """
    behaviour = student
    if old_ptr is not None:
        behaviour = tl.load(old_ptr + rows, mask=live)
    lam = None
    if scale_ptr is not None:
        lam = tl.load(scale_ptr + rows, mask=live)
    # where a model gives the token probability 0 there is no finite advantage
    outside = behaviour == float("-inf")
    if teacher_ptr is not None:
        q = scored_logprob(teacher_ptr, teacher_stride, rows, live)
        q = tl.where(q < logprob_min, logprob_min, q)
        impossible = q == float("-inf")
        if scale_ptr is not None:
            impossible = impossible & (lam != 0.0)
        outside = outside | impossible
        target = q
    if ref_ptr is not None:
        r = scored_logprob(ref_ptr, ref_stride, rows, live)
        r = tl.where(r < logprob_min, logprob_min, r)
        impossible = r == float("-inf")
        if scale_ptr is not None:
            impossible = impossible & (lam != 1.0)
        outside = outside | impossible
        target = r
    if teacher_ptr is not None and ref_ptr is not None:
        target = mixed_logprob(q, r, lam, share, NEAR_TEACHER)
    advantage = within(target - behaviour, -MOST, MOST) + 0.0 * behaviour
    advantage = tl.where(outside, 0.0, within(advantage, advantage_low, advantage_high))

    ratio = tl.full(student.shape, 1.0, tl.float32)
    if old_ptr is not None:
        ratio = tl.exp(student - behaviour)
    loss = -advantage * ratio
    bound = -advantage * within(ratio, ratio_low, ratio_high)
    clipped = bound > loss
    loss = tl.where(clipped, bound, loss)
    bound = -advantage * clip_dual
    over = (advantage < 0.0) & (loss > bound)
    loss = tl.where(over, bound, loss)
    clipped = clipped | over
    importance = tl.full(student.shape, 1.0, tl.float32)
    if rollout_ptr is not None:
        log_weight = behaviour - tl.load(rollout_ptr + rows, mask=live)
        importance = tl.exp(tl.where(behaviour == float("-inf"), 0.0, log_weight))
        importance = tl.where(importance > importance_cap, importance_cap, importance)
        loss = loss * importance
    # A = 0 or a weight of 0 is no loss, whatever it is multiplied by
    loss = tl.where((advantage == 0.0) | (importance == 0.0), 0.0, loss)
    dlogprob = tl.where(clipped | (student == float("-inf")), 0.0, loss)
    return loss, dlogprob, advantage, clipped, importance


@triton.jit
def policy_kernel(
    student_ptr, student_stride, out_ptr, out_stride, C,
    policy_teacher_ptr, policy_teacher_stride, policy_ref_ptr, policy_ref_stride, policy_share, policy_scale_ptr,
    old_ptr, rollout_ptr,
    logprob_min, advantage_low, advantage_high, ratio_low, ratio_high, clip_dual, importance_cap,
    POLICY_NEAR_TEACHER: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The rows of ``PolicyStat``, (5, C), from the student's statistics (len(Stat), C), BLOCK_C tokens a program."""
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < C
    loss, dlogprob, advantage, clipped, importance = policy_term(
        scored_logprob(student_ptr, student_stride, rows, live), rows, live,
        policy_teacher_ptr, policy_teacher_stride, policy_ref_ptr, policy_ref_stride, policy_share, policy_scale_ptr,
        old_ptr, rollout_ptr, logprob_min, advantage_low, advantage_high, ratio_low, ratio_high, clip_dual,
        importance_cap, POLICY_NEAR_TEACHER,
    )  # fmt: skip
    out = out_ptr + rows
    tl.store(out + LOSS * out_stride, loss, mask=live)
    tl.store(out + DLOGPROB * out_stride, dlogprob, mask=live)
    tl.store(out + ADVANTAGE * out_stride, advantage, mask=live)
    tl.store(out + CLIPPED * out_stride, tl.where(clipped, 1.0, 0.0), mask=live)
    tl.store(out + IMPORTANCE * out_stride, importance, mask=live)
