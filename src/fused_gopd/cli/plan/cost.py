"""Memory and work of a planned call, dense and fused, as formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ...loop.chunking import BLOCK_ELEMENTS
from ...objective.layout import STATISTICS
from ...rowops import Stat
from ...rowops.search import candidates_per_row, rows_at_once
from .call import PlannedCall
from .communication import collectives, exchanges


def total(items: Mapping[str, int]) -> int:
    """Bytes of all items."""
    return sum(items.values())


def inputs(call: PlannedCall) -> dict[str, int]:
    """Bytes that both paths are given: hidden states and heads of the models that are needed."""
    return {
        "hidden states": call.tokens * call.widths * call.element,
        "head weights": call.vocab * call.widths * call.element,
    }


def dense_peak(call: PlannedCall) -> dict[str, int]:
    """Bytes beyond the inputs at the peak of dense eager PyTorch, itemised.

    The code counted is the shortest that a trainer would write: logits in the model's dtype, upcast, log-softmax,
    teacher and reference under ``no_grad``, no checkpointing. With a = bytes of the accumulation dtype (4 for float32
    and below) and k tensors of [N, V] alive at the peak:

        peak = max(k N V a,  N V e + gradients)

        full:           k = 5, at the end of the forward: log p, the target, p, the bracket and their product
        sampled, topk:  k = 3, in the backward: log p, the gradient of the gather and that of the log-softmax

    Measured on a CPU (N = 256, V = 49152, float32 and bfloat16): 20 and 12 bytes per N V. The second term (e =
    bytes of the model's dtype) is the end of the backward, when the gradient of the logits becomes that of hidden and
    weight.
    Code that keeps more alive, such as an upcast of the logits, needs more.
    """
    entries = call.tokens * call.vocab
    alive = 5 if call.estimator == "full" else 3
    forward = {"[tokens, vocabulary] tensors": alive * entries * call.wide}
    end_of_backward = {
        "gradient of logits": entries * call.element,
        "gradient of hidden": call.tokens * call.hidden * call.element,
        "gradient of weight": call.vocab * call.hidden * call.element,
    }
    return max(forward, end_of_backward, key=total)


def fused_peak(call: PlannedCall, ranks: int = 1) -> dict[str, int]:
    """Bytes beyond the inputs at the peak of :func:`fused_gopd.gopd_loss` on one rank, itemised.

    The larger of two moments. In the forward: the gradients as they are summed, the weight's in float32, and chunk
    buffers, whose size does not depend on N: C V a for the student and, with ``full``, for each other model (a fourth
    of C on a GPU), and one more where a model is made of several; the others have one buffer, which the models use in
    turn. In the backward the buffers are freed, and the gradient of a low-precision weight is rounded into a new
    tensor while its float32 sum is alive.

    Args:
        call: the share of one rank.
        ranks: how many ranks gather their statistics.
    """
    rows, weight = call.largest_chunk, call.vocab * call.hidden
    kept = {
        "statistics per token": STATISTICS * call.tokens * call.wide,
        "gradient of hidden": call.tokens * call.hidden * call.element,
    }
    low = call.wide != call.element
    summed = "float32 accumulator of the weight gradient" if low else "gradient of weight"
    forward = {
        "chunk buffers": call.buffer_rows * call.vocab * call.logit,
        "chunk of the hidden gradient": rows * call.hidden * call.wide,
        **kept,
        summed: weight * call.wide,
    }
    if low and call.device == "cpu":
        widest = max(call.needed.values())
        forward["widened block of a weight"] = min(BLOCK_ELEMENTS, call.vocab * widest) * call.wide
    if call.k is not None:
        searched = min(rows, rows_at_once(call.vocab, call.device_type))
        # for the entries of the blocks that may hold the largest logits: two int64 ids and one logit each
        candidates = candidates_per_row(call.vocab, call.k)
        forward["search for the support"] = searched * candidates * (8 + 8 + call.wide)
    if ranks > 1:
        # as received, and in the merge's layout, widened to float64
        gathered = max(exchange.numbers for exchange in exchanges(call)) * call.wide + len(Stat) * (call.wide + 8)
        forward["gathered statistics of a chunk"] = ranks * gathered * call.largest_subchunk
    backward = {**kept, summed: weight * call.wide}
    if low:
        backward["gradient of weight"] = weight * call.element
    return max(forward, backward, key=total)


def gemm_flop(call: PlannedCall) -> float:
    """Floating-point operations of the GEMMs: three of 2 N V H for the student, one for each other model needed.

    At one hidden size that is 5F (F = 2 N V H), 4F with lambda = 0 or 1. Dense code does the same GEMMs.
    """
    return 2.0 * call.tokens * call.vocab * (2 * call.hidden + call.widths)


def tokens_that_fit(call: PlannedCall, memory: int, *, fused: bool) -> int:
    """The most tokens whose inputs and peak fit in ``memory`` bytes on every rank; 0 if not even one does."""

    def fits(tokens: int) -> bool:
        at = replace(call, tokens=tokens).share
        return total(inputs(at)) + total(fused_peak(at, call.tp) if fused else dense_peak(at)) <= memory

    low, high = 0, 1
    while high < 1 << 60 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def figures(call: PlannedCall, memory: int | None, tflops: float | None = None) -> dict[str, Any]:
    """What the command prints, as plain data. Sizes are in bytes and of one rank, unless their name says otherwise."""
    share = call.share
    dense, fused = dense_peak(share), fused_peak(share, call.tp)
    result: dict[str, Any] = {
        "job": asdict(call),
        "share": {"ranks": call.tp * call.dp * call.cp, "tokens": share.tokens, "vocab": share.vocab},
        "inputs": inputs(share),
        "dense": {"items": dense, "peak": total(dense)},
        "fused": {"items": fused, "peak": total(fused), "chunk_size": share.chunk_size},
        "gemm_tflop": gemm_flop(share) / 1e12,
        "wire": [{**asdict(c), "received": c.received} for c in collectives(call)],
    }
    if tflops is not None:
        result["tflops"] = tflops
        result["gemm_ms"] = result["gemm_tflop"] / tflops * 1e3
    if memory is not None:
        result["memory"] = memory
        for name in ("dense", "fused"):
            result[name]["tokens_that_fit"] = tokens_that_fit(call, memory, fused=name == "fused")
    return result
