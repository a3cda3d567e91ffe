# mypy: ignore-errors
"""The row kernel: statistics and gradient of one row of logits per program.

One source serves ``statistics``, ``gradient`` and ``statistics_and_gradient``; absent models, biases, token ids and
weights are None arguments, which Triton compiles away. It is launched without FMA contraction (see ``Launch``), every
fused multiply-add here is written out. So the same expression rounds alike wherever it stands: equal models give equal
statistics, and the one call gives the bits of the two.

Layout of a tile: [REPEAT, LANES, VECTOR]. LANES is the number of threads, VECTOR what one thread loads with one
16-byte instruction, REPEAT how many such loads it has in flight per model. Axes 0 and 2 lie within a thread, so the
running maximum and sums are kept per lane, [LANES], and rescaled once per tile: no shuffle, no barrier in the loop.
The alternatives cost more: a maximum per tile over all threads is a cross-warp reduction and two barriers for each of
four log-sum-exps in every tile, an online accumulator per element REPEAT * VECTOR times the registers and exponentials.
The lanes are merged once, at the end of the row.

Every lane keeps its sums relative to its own running maxima, z - m, q - m_q, r - m_r, and u formed from these: an
offset common to all logits of a model is gone before it can cost digits. When maxima move by d, d_q, d_r, then z' moves
by -d and u by -delta, delta = target(d_q, d_r), which shifts the weighted sums by multiples of the plain ones. Merging
lanes is the same step once more, to the maxima of the row.

The pieces, from ``scan`` to ``write_gradient``, do a part of a row's columns: ``whole_row`` puts them together for all
of them, ``segments.py`` for several programs a row. Some of their arguments are tuples:

    student, teacher, ref   (row, bias, pre, post, KIND) of a model
    mix                     (share, lam, TEACHER, REF, NEAR_TEACHER), see ``target``
    state                   what ``scan`` and ``merge`` return
    maxima                  (MAX_STUDENT, MAX_TEACHER, MAX_REF) of the whole row
    part                    (begin, full, end): whole tiles from begin to full, and what is left to end, full or V
    tile                    (columns, REPEAT, LANES, VECTOR, STAGES)
    constants               (a, one_minus_a, turn, c_t, c_p, kappa, NEAR_END)
    weights                 pointers and strides of the two weights per token, then token_ptr and forward_weight_ptr
    policy                  arguments of ``policy_term``
"""

import triton
import triton.language as tl

from .policy import policy_term, token_logprob

# Values of Stat (fused_gopd.rowops.Stat), which a kernel cannot read from an enum.
LOGSUM_STUDENT = tl.constexpr(0)
LOGSUM_TEACHER = tl.constexpr(1)
LOGSUM_REF = tl.constexpr(2)
LOGSUM_TARGET = tl.constexpr(3)
MEAN_LOGIT = tl.constexpr(4)
MEAN_GAP = tl.constexpr(5)
CENTRE = tl.constexpr(6)
VALUE = tl.constexpr(7)
LOGIT_STUDENT = tl.constexpr(8)
LOGIT_TEACHER = tl.constexpr(9)
LOGIT_REF = tl.constexpr(10)
MAX_STUDENT = tl.constexpr(11)
MAX_TEACHER = tl.constexpr(12)
MAX_REF = tl.constexpr(13)
ORIGIN_TARGET = tl.constexpr(14)
FAR = tl.constexpr(64.0)  # fused_gopd.rowops.FAR

LEAST = tl.constexpr(-3.0e38)  # in place of -inf in a product with 0
SHARE = tl.constexpr(2.0**-24)  # a sum of numbers near the largest float is taken of this share of them
MOST = tl.constexpr(3.4028234663852886e38)  # the largest float32
ROOM = tl.constexpr(1.0e35)  # the largest CENTRE and VALUE of alpha: over a thousand vocabulary shards can be added

# Kinds of divergence that DIVERGENCE may be, besides "none".
KINDS = frozenset({"reverse_kl", "forward_kl", "mixed", "mixture", "alpha"})

# Kinds of logit transform: z = x, z = pre x, z = post tanh(pre x), each of x + bias where there is a bias.
PLAIN = tl.constexpr(0)
SCALED = tl.constexpr(1)
SOFTCAPPED = tl.constexpr(2)


@triton.jit
def tanh(x):
    """tanh without libdevice, which the interpreter and some backends lack.

    Below 0.625 the odd polynomial of Cephes' tanhf (1 - 2 / (e^2x + 1) would cancel there), above it the exponential,
    whose overflow to inf gives exactly 1. NaN fails the comparison and passes through the exponential.
    """
    square = x * x
    poly = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    poly = tl.fma(square, poly, -5.37397155531e-2)
    poly = tl.fma(square, poly, 1.33314422036e-1)
    poly = tl.fma(square, poly, -3.33332819422e-1)
    small = tl.fma(poly * square, x, x)
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def exp(x, FLUSH: tl.constexpr):
    """e^x. FLUSH, for NVIDIA alone: a result below 2^-126 is 0, which spares the three instructions around each one
    that rescale it; PTX is the only way to say so."""
    if FLUSH:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.exp(x)
    return y


@triton.jit
def transform(x, bias_ptr, columns, mask, pre, post, KIND: tl.constexpr):
    """Transformed logits, fp32, of raw ones, any dtype. -inf stays -inf through the softcap."""
    z = x.to(tl.float32)
    if bias_ptr is not None:
        if mask is None:
            z += tl.load(bias_ptr + columns).to(tl.float32)
        else:
            z += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == SCALED:
        z = z * pre
    elif KIND == SOFTCAPPED:
        z = z * pre
        z = tl.where(z == float("-inf"), z, post * tanh(z))
    return z


@triton.jit
def model_logits(model, columns, V, needed, TAIL: tl.constexpr):
    """z of one model for a tile; -inf past the vocabulary.

    ``needed`` is None, or a scalar 0 or 1: where it is 0 the model's values do not matter, are not read, and are 0.
    """
    row, bias_ptr, pre, post = model[0], model[1], model[2], model[3]
    KIND: tl.constexpr = model[4]
    if needed is not None:
        # an integer comparison of a splat: the compiler sees that the mask is uniform and keeps 16-byte loads (and the
        # interpreter cannot combine a scalar bool with a block)
        used = columns * 0 + needed != 0
    if TAIL:
        inside = columns < V
        if needed is None:
            x = tl.load(row + columns, mask=inside, other=float("-inf"))
        else:
            x = tl.load(row + columns, mask=inside & used, other=float("-inf"))
        z = transform(x, bias_ptr, columns, inside, pre, post, KIND)
    else:
        if needed is None:  # noqa: SIM108, as in every kernel: a branch the compiler resolves
            x = tl.load(row + columns)
        else:
            x = tl.load(row + columns, mask=used, other=0.0)
        z = transform(x, bias_ptr, columns, None, pre, post, KIND)
    if needed is not None:
        z = tl.where(used, z, 0.0)
    if TAIL and (KIND != PLAIN or bias_ptr is not None):
        # after the transform: a negative scale would have turned the padding into +inf
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def needed(lam, without):
    """1, or 0 where a row does not need a model: the teacher with lambda = 0, the reference with lambda = 1."""
    return tl.where(lam != without, 1, 0)


@triton.jit
def problem_logits(student, teacher, ref, mix, columns, V, TAIL: tl.constexpr):
    """z, z_q, z_r for a tile (or one column), all three -inf outside the support S."""
    lam = mix[1]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    needs_teacher = None
    needs_ref = None
    if lam is not None:
        needs_teacher = needed(lam, 0.0)
        needs_ref = needed(lam, 1.0)
    z = model_logits(student, columns, V, None, TAIL)
    q = z
    r = z
    support = z != float("-inf")
    if TEACHER:
        q = model_logits(teacher, columns, V, needs_teacher, TAIL)
        support = support & (q != float("-inf"))
    if REF:
        r = model_logits(ref, columns, V, needs_ref, TAIL)
        support = support & (r != float("-inf"))
    if TEACHER or REF:
        z = tl.where(support, z, float("-inf"))
        q = tl.where(support, q, float("-inf"))
        r = tl.where(support, r, float("-inf"))
    return z, q, r


@triton.jit
def target(q, r, mix):
    """u = lambda q + (1 - lambda) r, the only place that forms it, of logits and of shifts alike.

    As fma(share, q - r, r) with share = lambda, or fma(share, q - r, q) with share = lambda - 1 for lambda > 1/2: equal
    models have q - r = 0 and u = r to the bit, so that a gap of 0 is exactly 0, and the rounding of q - r, a large one
    where one of them is a large mask, counts the less. share and NEAR_TEACHER, which of the two forms it is, are of a
    lambda that all rows have, and lam is None; or lam is that of the row, and the two are ignored. Then a model that
    the row does not need is 0, and its share is.
    """
    share, lam = mix[0], mix[1]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    NEAR_TEACHER: tl.constexpr = mix[4]
    if TEACHER and REF:
        if lam is None:
            u = tl.fma(share, q - r, q if NEAR_TEACHER else r)
        else:
            near_teacher = lam > 0.5
            u = tl.fma(tl.where(near_teacher, lam - 1.0, lam), q - r, tl.where(near_teacher, q, r))
    elif TEACHER:
        u = q
    else:
        u = r
    return u


@triton.jit
def bounded(x):
    """Within the finite range; NaN may become finite."""
    return tl.maximum(tl.minimum(x, MOST), -MOST)


@triton.jit
def in_room(x):
    """Within ROOM of 0, NaN kept."""
    return tl.where(x > ROOM, ROOM, tl.where(x < -ROOM, -ROOM, x))


@triton.jit
def from_origin(u, origin, BOTH: tl.constexpr, most):
    """u relative to its origin, which is 0 where u is one model's logits; at most ``most``, its log-sum.

    Relative to maxima of more columns a large mask rounds to another number than its log-sum over these columns had.
    """
    if BOTH:
        u = tl.maximum(tl.minimum(tl.minimum(u, MOST) - origin, most), -MOST)
    return u


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def moved(maximum, base):
    """By how much a running maximum moves up to ``base``: 0 where there was none, so -inf - -inf never happens."""
    return tl.where(maximum == float("-inf"), 0.0, base - maximum)


@triton.jit
def shifted(maximum, move):
    """A running maximum of u after u has moved by -move. Never -inf, which is a lane without support."""
    return tl.where(maximum == float("-inf"), maximum, tl.maximum(maximum - move, -MOST))


@triton.jit
def kept(weighted, rescale):
    """A weighted sum before it is rescaled, 0 where that makes it 0: moved from masks near the smallest float it may be
    infinite."""
    return tl.where(rescale == 0.0, 0.0, weighted)


@triton.jit
def finite(maximum):
    """A maximum to subtract: 0 in place of -inf, where there is no support (yet)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def online(maximum, total, x, FLUSH: tl.constexpr):
    """Take a tile into (maximum, sum of exp(x - maximum)) of each lane; x is -inf outside the support.

    Returns them with x - maximum, its exponential, how far the maximum moved, and the factor for sums from before.
    A maximum instruction may drop NaN; the sum does not.
    """
    new = tl.maximum(maximum, lane_max(x))
    base = finite(new)
    move = moved(maximum, base)
    rescale = exp(-move, FLUSH)
    x = x - base[None, :, None]
    e = exp(x, FLUSH)
    return new, tl.fma(total, rescale, lane_sum(e)), x, e, move, rescale


@triton.jit
def merged(maximum, total, FLUSH: tl.constexpr):
    """The row's maximum (0 without support), and for each lane how far its own is from it and the factor that makes.

    Last the row's sum: at least 1, 0 without support, NaN in a poisoned row.
    """
    base = finite(tl.max(maximum, axis=0))
    move = moved(maximum, base)
    scale = exp(-move, FLUSH)
    return base, move, scale, tl.sum(total * scale, axis=0)


@triton.jit
def rescaled(weighted, scale):
    """Weighted sums of the lanes, each times the factor of its move, added up."""
    return tl.sum(kept(weighted, scale) * scale, axis=0)


@triton.jit
def mean(weighted, total):
    """A weighted sum over the total weight; 0 without support."""
    return tl.where(total == 0.0, 0.0, weighted / total)


@triton.jit
def mixture_ratios(gap, logsum_difference, b, one_minus_b, turn, NEAR_END: tl.constexpr, FLUSH: tl.constexpr):
    """log(p / m), log(t / m) and t / m - 1 with m = b t + (1 - b) p.

    gap = z' - u and logsum_difference = LOGSUM_TARGET - LOGSUM_STUDENT give delta = log t - log p. From it follows
    log(p / m) = -log((1 - b) + b e^delta), rewritten for delta > 0 so that no exponential overflows; no probability is
    formed, which would be 0 in fp32 below e^-104. t / m - 1 takes the exponential that there is, and one division.
    """
    delta = -gap - logsum_difference
    if NEAR_END:
        # with the turn of the mixture in place of 0, and the logarithm as log1p
        above = delta > turn
        e = exp(tl.where(above, -delta, delta), FLUSH)
        weight = tl.where(above, one_minus_b, b)
        mixed = tl.fma(weight, e, tl.where(above, b, one_minus_b))
        mixture = tl.log(mixed) + (weight * (e - 1.0) - (mixed - 1.0))
        student, target = tl.where(above, -delta, 0.0) - mixture, tl.where(above, 0.0, delta) - mixture
    else:
        one_minus_b = 1.0 - b
        above = delta > 0.0
        e = exp(-tl.abs(delta), FLUSH)
        mixed = tl.where(above, tl.fma(one_minus_b, e, b), tl.fma(b, e, one_minus_b))
        mixture = tl.log(mixed)
        # minimum and maximum may drop NaN; the exponential inside the mixture keeps it
        student, target = -tl.maximum(delta, 0.0) - mixture, tl.minimum(delta, 0.0) - mixture
    excess = one_minus_b * tl.where(above, 1.0 - e, e - 1.0) / mixed
    return student, target, excess


@triton.jit
def excess_mass(w, log_p, log_t, x, alpha, one_minus_alpha, most, FLUSH: tl.constexpr):
    """w expm1(x), with w = p and x = alpha delta or w = t and x = (alpha - 1) delta: w e^x = p^(1 - alpha) t^alpha.

    Below |x| = 0.35 the polynomial of Cephes' expf (e^x - 1 would cancel there). Above x = 1 w e^x is one exponential,
    at most e^most, because w may be 0 in fp32 where e^x is infinite. log p and log t are clamped at -1e30 so that their
    multiples are finite. NaN in x fails the comparisons and passes through the exponential.
    """
    poly = tl.fma(x, 1.9875691500e-4, 1.3981999507e-3)
    poly = tl.fma(x, poly, 8.3334519073e-3)
    poly = tl.fma(x, poly, 4.1665795894e-2)
    poly = tl.fma(x, poly, 1.6666665459e-1)
    poly = tl.fma(x, poly, 5.0000001201e-1)
    small = tl.fma(poly * x, x, x)
    product = tl.fma(one_minus_alpha, tl.maximum(log_p, -1.0e30), alpha * tl.maximum(log_t, -1.0e30))
    large = x > 1.0
    e = exp(tl.where(large, tl.minimum(product, most), x), FLUSH)
    return tl.where(large, e - w, w * tl.where(tl.abs(x) < 0.35, small, e - 1.0))


@triton.jit
def scan(student, teacher, ref, mix, part, V, tile, DIVERGENCE: tl.constexpr, FLUSH: tl.constexpr):
    """The states of all lanes, [LANES] each, after the columns of ``part``."""
    begin, full, end = part
    columns = tile[0]
    REPEAT: tl.constexpr = tile[1]
    LANES: tl.constexpr = tile[2]
    VECTOR: tl.constexpr = tile[3]
    STAGES: tl.constexpr = tile[4]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    max_z = tl.full([LANES], float("-inf"), tl.float32)
    max_q = max_z
    max_r = max_z
    max_u = max_z
    sum_z = tl.zeros([LANES], tl.float32)
    sum_q = sum_z
    sum_r = sum_z
    sum_u = sum_z
    weighted_logit = sum_z  # sum e^z' z'
    weighted_gap = sum_z  # sum e^z' (z' - u)
    weighted_target = sum_z  # sum e^u (u - z')
    for tail in tl.static_range(2):
        for start in tl.range(
            begin if tail == 0 else full, full if tail == 0 else end, REPEAT * LANES * VECTOR, num_stages=STAGES
        ):
            z, q, r = problem_logits(student, teacher, ref, mix, start + columns, V, tail == 1)
            old_sum = sum_z
            max_z, sum_z, z, e, move_z, rescale = online(max_z, sum_z, z, FLUSH)
            weighted_logit = tl.fma(
                kept(tl.fma(-move_z, old_sum, weighted_logit), rescale), rescale, lane_sum(e * tl.maximum(z, LEAST))
            )
            if TEACHER or REF:
                move_q = move_z
                move_r = move_z
                if TEACHER:
                    old_target_sum = sum_q
                    max_q, sum_q, q, e_u, move_q, rescale_u = online(max_q, sum_q, q, FLUSH)
                if REF:
                    old_target_sum = sum_r
                    max_r, sum_r, r, e_u, move_r, rescale_u = online(max_r, sum_r, r, FLUSH)
                u = target(q, r, mix)
                move_u = target(move_q, move_r, mix)
                # outside the support u may be NaN, -inf - -inf
                inside = (r if REF else q) != float("-inf")
                gap = tl.where(inside, z - u, 0.0)
                weighted_gap = tl.fma(
                    kept(tl.fma(move_u - move_z, old_sum, weighted_gap), rescale), rescale, lane_sum(e * gap)
                )
                if TEACHER and REF:
                    # u has a maximum of its own: with lambda > 1 it is not 0 where those of q' and r' are
                    old_target_sum = sum_u
                    max_u, sum_u, u, e_u, _move, rescale_u = online(
                        shifted(max_u, move_u), sum_u, tl.where(inside, u, float("-inf")), FLUSH
                    )
                if DIVERGENCE == "forward_kl" or DIVERGENCE == "mixed":
                    weighted_target = tl.fma(
                        kept(tl.fma(move_z - move_u, old_target_sum, weighted_target), rescale_u),
                        rescale_u,
                        lane_sum(e_u * -gap),
                    )
    return max_z, sum_z, weighted_logit, max_q, sum_q, max_r, sum_r, max_u, sum_u, weighted_gap, weighted_target


@triton.jit
def merge(state, mix, DIVERGENCE: tl.constexpr, FLUSH: tl.constexpr):
    """The states of all lanes as one, whose maxima are 0 without support. Every sum is relative to these maxima."""
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    max_z, sum_z, weighted_logit, max_q, sum_q, max_r, sum_r, max_u, sum_u, weighted_gap, weighted_target = state
    max_student, move_z, scale, total = merged(max_z, sum_z, FLUSH)
    weighted_logit = rescaled(tl.fma(-move_z, sum_z, weighted_logit), scale)
    max_teacher = 0.0
    max_ref = 0.0
    max_target = 0.0
    total_q = 0.0
    total_r = 0.0
    total_u = 0.0
    if TEACHER or REF:
        move_q = move_z
        move_r = move_z
        if TEACHER:
            max_teacher, move_q, scale_u, total_q = merged(max_q, sum_q, FLUSH)
            total_u = total_q
            sum_target = sum_q
        if REF:
            max_ref, move_r, scale_u, total_r = merged(max_r, sum_r, FLUSH)
            total_u = total_r
            sum_target = sum_r
        move_u = target(move_q, move_r, mix)
        weighted_gap = rescaled(tl.fma(move_u - move_z, sum_z, weighted_gap), scale)
        if TEACHER and REF:
            max_target, _move, scale_u, total_u = merged(shifted(max_u, move_u), sum_u, FLUSH)
            sum_target = sum_u
        if DIVERGENCE == "forward_kl" or DIVERGENCE == "mixed":
            weighted_target = rescaled(tl.fma(move_z - move_u, sum_target, weighted_target), scale_u)
        else:
            weighted_target = 0.0
    else:
        weighted_gap = 0.0
        weighted_target = 0.0
    return (
        max_student, total, weighted_logit, max_teacher, total_q, max_ref, total_r, max_target, total_u,
        weighted_gap, weighted_target,
    )  # fmt: skip


@triton.jit
def finish(state, mix, DIVERGENCE: tl.constexpr):
    """Statistics from the state of a row: logsum_z, logsum_q, logsum_r, logsum_u, mean_logit, mean_gap, value.

    Last ``near``, 0 where these are not good enough (``second_look``).
    """
    lam = mix[1]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    (
        _max_student, total, weighted_logit, _max_teacher, total_q, _max_ref, total_r, max_target, total_u,
        weighted_gap, weighted_target,
    ) = state  # fmt: skip
    logsum_q = 0.0
    logsum_r = 0.0
    logsum_u = 0.0
    mean_gap = 0.0
    value = 0.0
    near = True
    if TEACHER:
        logsum_q = tl.log(total_q)
        logsum_u = logsum_q
    if REF:
        logsum_r = tl.log(total_r)
        logsum_u = logsum_r
    if TEACHER and REF:
        logsum_u = max_target + tl.log(total_u)
    if TEACHER or REF:
        mean_gap = mean(weighted_gap, total)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "mixed":
        value = mean(weighted_target, total_u)
    if TEACHER or REF:
        near = (tl.abs(max_target) <= FAR) & (tl.abs(mean_gap) < 1e30) & (tl.abs(value) < 1e30)
        if lam is not None:
            logsum_q = tl.where(needed(lam, 0.0) != 0, logsum_q, 0.0)
            logsum_r = tl.where(needed(lam, 1.0) != 0, logsum_r, 0.0)
    return tl.log(total), logsum_q, logsum_r, logsum_u, mean(weighted_logit, total), mean_gap, value, near


@triton.jit
def tile_columns(REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[REPEAT, LANES, VECTOR]: the columns of a tile, from its first."""
    repeat = tl.arange(0, REPEAT)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    columns = repeat + lane + tl.arange(0, VECTOR)[None, None, :]
    if VECTOR == 1:
        # Left to itself the compiler sees LANES contiguous columns and deals several to a thread, across warps.
        columns = tl.max_contiguous(columns, [1, 1, 1])
    return columns


@triton.jit
def second_look(
    student, teacher, ref, mix, state, logsum_z, mean_gap, value, V, tile, DIVERGENCE: tl.constexpr, FLUSH: tl.constexpr
):  # fmt: skip
    """mean_gap, value, origin and logsum_u once more, from the maxima of the row, which the gradient forms u with.

    Of other shifts u is another number, by the rounding of what is far away.
    """
    columns = tile[0]
    REPEAT: tl.constexpr = tile[1]
    LANES: tl.constexpr = tile[2]
    VECTOR: tl.constexpr = tile[3]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    max_student, total, _weighted, max_teacher, total_q, max_ref, total_r, _max_u, _total_u, _gap, _target = state
    poison = 0.0  # NaN where NaN or +inf is in teacher or reference, else 0
    if TEACHER:
        poison += 0.0 * total_q
    if REF:
        poison += 0.0 * total_r
    max_u = tl.full([LANES], float("-inf"), tl.float32)
    sum_u = tl.zeros([LANES], tl.float32)
    weighted_gap = sum_u  # sum p (z' - u)
    weighted_target = sum_u
    for start in tl.range(0, V, REPEAT * LANES * VECTOR, num_stages=1):
        z, q, r = problem_logits(student, teacher, ref, mix, start + columns, V, True)
        inside = z != float("-inf")
        z = tl.maximum(z - max_student, -MOST)
        u = bounded(target(q - max_teacher, r - max_ref, mix))
        weighted_gap += lane_sum(exp(z - logsum_z, FLUSH) * tl.where(inside, bounded(z - u), 0.0))
        old_target_sum = sum_u
        max_u, sum_u, u, e_u, move_u, rescale_u = online(max_u, sum_u, tl.where(inside, u, float("-inf")), FLUSH)
        if DIVERGENCE == "forward_kl" or DIVERGENCE == "mixed":
            weighted_target = tl.fma(
                kept(tl.fma(-move_u * SHARE, old_target_sum, weighted_target), rescale_u),
                rescale_u,
                lane_sum(e_u * (tl.maximum(u - z, LEAST) * SHARE)),
            )
    poison_any = poison + 0.0 * total  # in the student too
    mean_gap = bounded(tl.sum(weighted_gap, axis=0)) + poison_any
    max_target, move_target, scale_u, total_u = merged(max_u, sum_u, FLUSH)
    origin = tl.where((tl.abs(max_target) > FAR) & (poison == 0.0), max_target, 0.0)
    logsum_u = (max_target - origin) + tl.log(total_u) + poison
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "mixed":
        value = mean(rescaled(tl.fma(-move_target * SHARE, sum_u, weighted_target), scale_u), total_u)
        value = bounded(value / SHARE) + ((max_target - origin) + poison_any)
    return mean_gap, value, origin, logsum_u


@triton.jit
def token_logits(student, teacher, ref, mix, token_ptr, row, V):
    """z, z_q, z_r of a row's token: -inf outside S, NaN where the id is outside [0, V)."""
    token = tl.load(token_ptr + row)
    valid = (token >= 0) & (token < V)
    # an invalid id reads column 0 and is then overruled by NaN
    z, q, r = problem_logits(student, teacher, ref, mix, tl.where(valid, token, 0), V, False)
    nan = float("nan")
    return tl.where(valid, z, nan), tl.where(valid, q, nan), tl.where(valid, r, nan)


@triton.jit
def relative(logit, maximum):
    return tl.where(logit == float("-inf"), logit, logit - maximum)


@triton.jit
def store_statistics(
    stats_row, stats_stride, state, mix, logsum_z, logsum_q, logsum_r, logsum_u, mean_logit, mean_gap, value, origin,
    logit_z, logit_q, logit_r, TOKEN: tl.constexpr, SECOND_ROUND: tl.constexpr,
):  # fmt: skip
    """The statistics of a row but those of a second round; the logits of its token are not relative to maxima yet."""
    lam = mix[1]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    max_student, _total, _weighted, max_teacher, _total_q, max_ref, _total_r, _max_u, _total_u, _gap, _target = state
    if TOKEN:
        logit_z = relative(logit_z, max_student)
        if TEACHER:
            logit_q = relative(logit_q, max_teacher)
            if lam is not None:
                logit_q = tl.where(needed(lam, 0.0) != 0, logit_q, 0.0)
        else:
            logit_q = 0.0
        if REF:
            logit_r = relative(logit_r, max_ref)
            if lam is not None:
                logit_r = tl.where(needed(lam, 1.0) != 0, logit_r, 0.0)
        else:
            logit_r = 0.0
    tl.store(stats_row + LOGSUM_STUDENT * stats_stride, logsum_z)
    tl.store(stats_row + LOGSUM_TEACHER * stats_stride, logsum_q)
    tl.store(stats_row + LOGSUM_REF * stats_stride, logsum_r)
    tl.store(stats_row + LOGSUM_TARGET * stats_stride, logsum_u)
    tl.store(stats_row + MEAN_LOGIT * stats_stride, mean_logit)
    tl.store(stats_row + MEAN_GAP * stats_stride, mean_gap)
    if not SECOND_ROUND:
        tl.store(stats_row + CENTRE * stats_stride, 0.0)
        tl.store(stats_row + VALUE * stats_stride, value)
    tl.store(stats_row + LOGIT_STUDENT * stats_stride, logit_z)
    tl.store(stats_row + LOGIT_TEACHER * stats_stride, logit_q)
    tl.store(stats_row + LOGIT_REF * stats_stride, logit_r)
    tl.store(stats_row + MAX_STUDENT * stats_stride, max_student)
    tl.store(stats_row + MAX_TEACHER * stats_stride, max_teacher)
    tl.store(stats_row + MAX_REF * stats_stride, max_ref)
    tl.store(stats_row + ORIGIN_TARGET * stats_stride, origin)


@triton.jit
def second_round(
    student, teacher, ref, mix, maxima, origin, logsum_z, logsum_u, constants, part, V, tile,
    DIVERGENCE: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """The sums of a second round over the columns of ``part``, as ``second_values`` takes them."""
    begin, full, end = part
    columns = tile[0]
    REPEAT: tl.constexpr = tile[1]
    LANES: tl.constexpr = tile[2]
    VECTOR: tl.constexpr = tile[3]
    STAGES: tl.constexpr = tile[4]
    max_student, max_teacher, max_ref = maxima
    a, one_minus_a, turn = constants[0], constants[1], constants[2]
    c_t, c_p, kappa = constants[3], constants[4], constants[5]
    NEAR_END: tl.constexpr = constants[6]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    centre_sum = tl.zeros([LANES], tl.float32)
    value_sum = centre_sum
    for tail in tl.static_range(2):
        for start in tl.range(
            begin if tail == 0 else full, full if tail == 0 else end, REPEAT * LANES * VECTOR, num_stages=STAGES
        ):
            z, q, r = problem_logits(student, teacher, ref, mix, start + columns, V, tail == 1)
            support = z != float("-inf")
            z = z - max_student
            u = from_origin(target(q - max_teacher, r - max_ref, mix), origin, TEACHER and REF, logsum_u)
            if DIVERGENCE == "mixture":
                log_pm, log_tm, excess = mixture_ratios(
                    z - u, logsum_u - logsum_z, a, one_minus_a, turn, NEAR_END, FLUSH
                )
                p = exp(z - logsum_z, FLUSH)
                t = exp(u - logsum_u, FLUSH)
                if kappa is None:
                    centre_sum += lane_sum(tl.where(support, p * log_pm, 0.0))
                    value_sum += lane_sum(tl.where(support, t * log_tm, 0.0))
                else:
                    part_of_p = p * (c_p * log_pm)
                    centre_sum += lane_sum(tl.where(support, tl.fma(kappa * p, excess, part_of_p), 0.0))
                    value_sum += lane_sum(tl.where(support, tl.fma(c_t * t, log_tm, part_of_p), 0.0))
            else:
                x = (-one_minus_a if NEAR_END else a) * ((u - z) + (logsum_z - logsum_u))
                w = exp(u - logsum_u if NEAR_END else z - logsum_z, FLUSH)
                excess = excess_mass(w, z - logsum_z, u - logsum_u, x, a, one_minus_a, turn, FLUSH)
                centre_sum += lane_sum(tl.where(support, excess, 0.0))
    return tl.sum(centre_sum, axis=0), tl.sum(value_sum, axis=0)


@triton.jit
def second_values(centre, value, constants, DIVERGENCE: tl.constexpr):
    """CENTRE and VALUE from the sums of a whole row."""
    c_t, c_p, kappa = constants[3], constants[4], constants[5]
    if DIVERGENCE == "mixture":
        if kappa is None:
            centre = c_p * centre
            value = tl.fma(c_t, value, centre)
    else:
        total = centre
        centre = in_room(c_p * total)
        value = in_room(c_t * total)
    return centre, value


@triton.jit
def write_gradient(
    student, teacher, ref, mix, maxima, origin, logsum_z, logsum_u, mean_logit, mean_gap, centre, logit_z,
    constants, weights, policy, row, out_row, slope, tanh_of_z, part, V, tile,
    POLICY: tl.constexpr, DIVERGENCE: tl.constexpr, ALIASED: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """The gradient of the columns of ``part``."""
    begin, full, end = part
    tile_columns = tile[0]
    REPEAT: tl.constexpr = tile[1]
    LANES: tl.constexpr = tile[2]
    VECTOR: tl.constexpr = tile[3]
    STAGES: tl.constexpr = tile[4]
    max_student, max_teacher, max_ref = maxima
    a, one_minus_a, turn, c_p, kappa = constants[0], constants[1], constants[2], constants[4], constants[5]
    NEAR_END: tl.constexpr = constants[6]
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    STUDENT_KIND: tl.constexpr = student[4]
    divergence_weight_ptr, divergence_weight_stride = weights[0], weights[1]
    token_weight_ptr, token_weight_stride = weights[2], weights[3]
    token_ptr, forward_weight_ptr = weights[4], weights[5]
    HAS_TOKEN: tl.constexpr = token_weight_ptr is not None or POLICY
    row64 = row.to(tl.int64)
    divergence_weight = 0.0
    token_weight = 0.0
    token_column = -1
    if divergence_weight_ptr is not None:
        divergence_weight = tl.load(divergence_weight_ptr + row64 * divergence_weight_stride)
        # keeps the NaN of a teacher or reference, which a clamp drops
        poisoned_weight = divergence_weight + 0.0 * mean_gap
        if forward_weight_ptr is not None:
            a = tl.load(forward_weight_ptr + row)
    if HAS_TOKEN:
        token_weight = 1.0
        if token_weight_ptr is not None:
            token_weight = tl.load(token_weight_ptr + row64 * token_weight_stride)
        token_column = tl.load(token_ptr + row)
    if POLICY:
        _loss, dlogprob, _advantage, _clipped, _importance = policy_term(
            token_logprob(logit_z, logsum_z), row, None, *policy
        )
        token_weight = token_weight * -dlogprob
    live = tl.where((divergence_weight != 0.0) | (token_weight != 0.0), 1, 0)
    for tail in tl.static_range(2):
        for start in tl.range(
            begin if tail == 0 else full, full if tail == 0 else end, REPEAT * LANES * VECTOR, num_stages=STAGES
        ):
            columns = start + tile_columns
            z, q, r = problem_logits(student, teacher, ref, mix, columns, V, tail == 1)
            # A weight of exactly 0 switches its term off, NaN included (in z, and with a softcap in its slope). An
            # integer comparison of live, as in model_logits.
            nonzero = (z != float("-inf")) & (columns * 0 + live != 0)
            if STUDENT_KIND == SOFTCAPPED:
                tanh_x = z * tanh_of_z
            z = z - max_student
            if TEACHER or REF:
                u = target(q - max_teacher, r - max_ref, mix)
            p = exp(z - logsum_z, FLUSH)
            grad = tl.zeros([REPEAT, LANES, VECTOR], tl.float32)
            if divergence_weight_ptr is not None:
                if DIVERGENCE == "none":
                    term = p * (z - mean_logit)
                elif DIVERGENCE == "reverse_kl":
                    term = p * bounded(z - u - mean_gap)
                elif DIVERGENCE == "forward_kl":
                    term = p - exp(from_origin(u, origin, TEACHER and REF, logsum_u) - logsum_u, FLUSH)
                elif DIVERGENCE == "mixed":
                    # a (p - t) + (1 - a) p (gap - mean): the bits of one of the two where a is 1 or 0
                    factor = tl.fma(bounded(z - u - mean_gap), 1.0 - a, a)
                    t = exp(from_origin(u, origin, TEACHER and REF, logsum_u) - logsum_u, FLUSH)
                    term = tl.fma(p, factor, -a * t)
                elif DIVERGENCE == "mixture":
                    u = from_origin(u, origin, TEACHER and REF, logsum_u)
                    log_pm, _, excess = mixture_ratios(
                        z - u, logsum_u - logsum_z, a, one_minus_a, turn, NEAR_END, FLUSH
                    )
                    term = tl.fma(c_p, log_pm, -centre)
                    if kappa is not None:
                        term = tl.fma(kappa, excess, term)
                    term = p * term
                else:
                    u = from_origin(u, origin, TEACHER and REF, logsum_u)
                    x = a * ((u - z) + (logsum_z - logsum_u))
                    excess = excess_mass(p, z - logsum_z, u - logsum_u, x, a, one_minus_a, turn, FLUSH)
                    term = tl.fma(c_p, excess, -(p * centre))
                grad = poisoned_weight * term
            if HAS_TOKEN:
                token_term = token_weight * (p - tl.where(columns == token_column, 1.0, 0.0))
                if divergence_weight_ptr is not None:
                    grad = tl.where(divergence_weight == 0.0, 0.0, grad)
                    grad += tl.where(token_weight == 0.0, 0.0, token_term)
                else:
                    grad = token_term
            if STUDENT_KIND == SOFTCAPPED:
                grad = grad * (slope * (1.0 - tanh_x * tanh_x))
            elif STUDENT_KIND == SCALED:
                grad = grad * slope
            grad = tl.where(nonzero, grad, 0.0).to(out_row.dtype.element_ty)
            if ALIASED:
                # out may lie on the logits, in a narrower dtype even: row i of both starts at the same address, so
                # the store of columns [v, v + B) covers bytes [b v, b (v + B)) of the row with b no wider than a
                # logit: this tile's logits or, narrower, earlier ones, never a later tile's. Earlier tiles are
                # done with. Within the tile another thread may still have to read what this one is about to
                # overwrite, hence the barrier: all loads of the tile are in registers behind it. (It orders the
                # first tile's stores after the statistics passes too. Prefetching the next tile's logits across
                # it is harmless, by the same addresses.)
                tl.debug_barrier()
            if tail == 1:
                tl.store(out_row + columns, grad, mask=columns < V)
            else:
                tl.store(out_row + columns, grad)


@triton.jit
def whole_row(
    student, teacher, ref, mix, constants, weights, policy, row, stats_row, stats_stride, out_row, slope, tanh_of_z, V,
    tile, DIVERGENCE: tl.constexpr, STATISTICS: tl.constexpr, POLICY: tl.constexpr, ALIASED: tl.constexpr,
    FLUSH: tl.constexpr,
):  # fmt: skip
    """What ``row_kernel`` does."""
    TEACHER: tl.constexpr = mix[2]
    REF: tl.constexpr = mix[3]
    token_ptr = weights[4]
    BLOCK_V: tl.constexpr = tile[1] * tile[2] * tile[3]
    SECOND_ROUND: tl.constexpr = DIVERGENCE == "mixture" or DIVERGENCE == "alpha"
    # Full tiles go without masks, the last one alone pays for them: a mask at V would also break up the 16-byte loads
    # wherever V is not a multiple of 16.
    part = (0, V // BLOCK_V * BLOCK_V, V)
    if STATISTICS:
        # The token's own logits first: in place, the gradient below overwrites them.
        logit_z = 0.0
        logit_q = 0.0
        logit_r = 0.0
        if token_ptr is not None:
            logit_z, logit_q, logit_r = token_logits(student, teacher, ref, mix, token_ptr, row, V)
        state = merge(scan(student, teacher, ref, mix, part, V, tile, DIVERGENCE, FLUSH), mix, DIVERGENCE, FLUSH)
        logsum_z, logsum_q, logsum_r, logsum_u, mean_logit, mean_gap, value, near = finish(state, mix, DIVERGENCE)
        origin = 0.0
        if TEACHER or REF:  # noqa: SIM102, a branch the compiler resolves
            if not near:
                # Rare: a model alone has masks that put the target far from 0, or near the largest float.
                mean_gap, value, origin, logsum_u = second_look(
                    student, teacher, ref, mix, state, logsum_z, mean_gap, value, V, tile, DIVERGENCE, FLUSH
                )
        store_statistics(
            stats_row, stats_stride, state, mix, logsum_z, logsum_q, logsum_r, logsum_u, mean_logit, mean_gap, value,
            origin, logit_z, logit_q, logit_r, token_ptr is not None, SECOND_ROUND,
        )  # fmt: skip
        maxima = (state[0], state[3], state[5])
        logit_z = relative(logit_z, state[0])
        centre = 0.0
    else:
        logsum_z = tl.load(stats_row + LOGSUM_STUDENT * stats_stride)
        logsum_u = tl.load(stats_row + LOGSUM_TARGET * stats_stride)
        mean_logit = tl.load(stats_row + MEAN_LOGIT * stats_stride)
        mean_gap = tl.load(stats_row + MEAN_GAP * stats_stride)
        centre = tl.load(stats_row + CENTRE * stats_stride)
        max_student = tl.load(stats_row + MAX_STUDENT * stats_stride)
        max_teacher = tl.load(stats_row + MAX_TEACHER * stats_stride)
        max_ref = tl.load(stats_row + MAX_REF * stats_stride)
        origin = tl.load(stats_row + ORIGIN_TARGET * stats_stride)
        maxima = (max_student, max_teacher, max_ref)
        logit_z = 0.0
        if POLICY:
            logit_z = tl.load(stats_row + LOGIT_STUDENT * stats_stride)

    if SECOND_ROUND and (STATISTICS or out_row is None):
        # It needs both normalisers, those of the whole vocabulary where V is a part of it. The statistics above are
        # stored already: kept in registers through this loop, some would spill.
        centre, value = second_round(
            student, teacher, ref, mix, maxima, origin, logsum_z, logsum_u, constants, part, V, tile, DIVERGENCE, FLUSH
        )
        centre, value = second_values(centre, value, constants, DIVERGENCE)
        tl.store(stats_row + CENTRE * stats_stride, centre)
        tl.store(stats_row + VALUE * stats_stride, value)

    if out_row is not None:
        write_gradient(
            student, teacher, ref, mix, maxima, origin, logsum_z, logsum_u, mean_logit, mean_gap, centre, logit_z,
            constants, weights, policy, row, out_row, slope, tanh_of_z, part, V, tile,
            POLICY, DIVERGENCE, ALIASED, FLUSH,
        )  # fmt: skip


@triton.jit
def row_kernel(
    student_ptr, student_stride, student_bias, student_pre, student_post,
    teacher_ptr, teacher_stride, teacher_bias, teacher_pre, teacher_post,
    ref_ptr, ref_stride, ref_bias, ref_pre, ref_post,
    share, reward_scale_ptr, token_ptr, stats_ptr, stats_stride,
    divergence_weight_ptr, divergence_weight_stride, token_weight_ptr, token_weight_stride,
    out_ptr, out_stride, slope, tanh_of_z, V,
    a, one_minus_a, turn, c_t, c_p, kappa, forward_weight_ptr,
    policy_teacher_ptr, policy_teacher_stride, policy_ref_ptr, policy_ref_stride, policy_share, policy_scale_ptr,
    old_ptr, rollout_ptr,
    logprob_min, advantage_low, advantage_high, ratio_low, ratio_high, clip_dual, importance_cap, redo_ptr,
    POLICY: tl.constexpr, POLICY_NEAR_TEACHER: tl.constexpr,
    STUDENT_KIND: tl.constexpr, TEACHER_KIND: tl.constexpr, REF_KIND: tl.constexpr, DIVERGENCE: tl.constexpr,
    NEAR_TEACHER: tl.constexpr, NEAR_END: tl.constexpr, STATISTICS: tl.constexpr, ALIASED: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """One row: its statistics (``Stat``), its gradient (``RowOps.gradient``), or both. The grid is (C,).

    student_ptr, teacher_ptr, ref_ptr   (C, >= V) raw logits, any floating dtype, row strides in elements
    *_bias                              (>= V,) any floating dtype, or None
    share, NEAR_TEACHER                 of ``target``, for a lambda that all rows have
    reward_scale_ptr                    (C,) fp32 lambda, with which the two are ignored, or None
    token_ptr                           (C,) int64 or None
    stats_ptr                           (len(Stat), C) fp32: written where STATISTICS, read by the gradient otherwise;
                                        with neither CENTRE and VALUE are made from the others
    *_weight_ptr                        (C,) fp32 of any stride, 0 too, or None
    out_ptr                             (C, >= V) any floating dtype, or None: no gradient
    DIVERGENCE                          "none", or the kind of a divergence (RowDivergence); what follows is None where
                                        the kind does not have it
    a, one_minus_a, turn, c_t, c_p, kappa, forward_weight_ptr, NEAR_END, with delta = log t - log p:
        mixture   m = a t + one_minus_a p
                  VALUE = c_t sum t log(t/m) + c_p sum p log(p/m)    h~ = c_p log(p/m) + kappa (t/m - 1)
                  kappa is None for the JSD, where it is 0; turn and NEAR_END as in MixtureConstants
        alpha     VALUE = c_t E, CENTRE = c_p E                      h~ = c_p expm1(a delta)
                  E = sum p expm1(a delta), or, where a > 1/2 (NEAR_END), E = sum t expm1((a - 1) delta): the same
                  number, but each is small, and keeps its digits, near one of the ends a = 0 and 1, where c_t is large.
                  No product is larger than e^turn
        mixed     a KL(t || p) + (1 - a) KL(p || t); in place of a, forward_weight_ptr (C,) fp32 is a weight per token
    POLICY                              whether the token weights, 1 where they are None, are times -dlogprob of
                                        ``policy_term``, whose arguments policy_teacher_ptr .. importance_cap are
    redo_ptr                            (C,) int32, or None: rows where it is 0 are left alone (``segments_kernel``)
    slope, tanh_of_z                    dz/dx = slope (1 - (tanh_of_z z)^2), the second factor with a softcap only

    Bytes per row: statistics read each model's V logits once (mixture and alpha twice), the gradient reads them once
    more, from L2 where the rows in flight fit into it, and writes V gradients. Nothing else is of the order of V.
    """
    row = tl.program_id(0)
    if redo_ptr is not None:  # noqa: SIM102, as above
        if tl.load(redo_ptr + row) == 0:
            return
    row64 = row.to(tl.int64)
    # Tuples keep numbers that the compiler knows, and None, only where they are made as arguments of a call.
    whole_row(
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
            policy_scale_ptr, old_ptr, rollout_ptr, logprob_min, advantage_low, advantage_high, ratio_low, ratio_high,
            clip_dual, importance_cap, POLICY_NEAR_TEACHER,
        ),
        row, stats_ptr + row, stats_stride, out_ptr + row64 * out_stride if out_ptr is not None else None,
        slope, tanh_of_z, V, (tile_columns(REPEAT, LANES, VECTOR), REPEAT, LANES, VECTOR, STAGES),
        DIVERGENCE, STATISTICS, POLICY, ALIASED, FLUSH,
    )  # fmt: skip
