"""A call of :func:`fused_gopd.linear_nll`, checked and flattened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, replace

import torch
from torch import Tensor

from .agreement import agreement_of, shared_by
from .checks import IGNORE, require_device, require_integer, require_reverse_mode, require_shape
from .heads import Head, LinearHead, Source, require_kind
from .models import joint_vocab_size, with_logits_dtype, zero_masked
from .objective.divergences import ForwardKL
from .objective.reductions import token_weights
from .objective.supervised import NLL
from .option_checks import checked_once
from .options import DEFAULTS, Reduction
from .plan import chunk_sizes, gradient_waits
from .prepare import check_lengths, check_no_host_sync, check_normalizer, live_labels, live_token_weight
from .problem import Problem, Route
from .records import record
from .rowops import RowOps, select_backend
from .rowops.torch import accumulation_dtype
from .tokens import check_cu_seqlens, check_mask, host_sync_forbidden, live_rows
from .values import number_that, require_not_negative

_SMOOTHING = number_that(lambda x: 0 <= x <= 1, "be between 0 and 1")


@record(frozen=True, eq=False, repr=False)
class NLLCall:
    """The arguments of :func:`fused_gopd.linear_nll`."""

    head: Head
    labels: Tensor
    _: KW_ONLY
    mask: Tensor | None = None
    token_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: Reduction = "token-mean"
    normalizer: float | Tensor | None = None
    sequence_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    vocab_size: int | None = None
    chunk_size: int | None = None
    chunk_dtype: torch.dtype | None = None
    grad_filter: float = 0.0
    backend: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        """Of accumulation and of the loss."""
        return accumulation_dtype(self.head.rows)

    @property
    def recomputes(self) -> bool:
        """Whether gradients are computed in the backward: see :func:`fused_gopd.plan.recomputes_in_backward`."""
        return self.reduction == "none" or gradient_waits(self.head, self.z_loss != 0 or self.token_weight is not None)


# A wrong call is an error of the function whose signature this is, and named after it.
NLLCall.__init__.__qualname__ = "linear_nll"


def prepare_nll(call: NLLCall, ops: RowOps | None = None, weight_gradient: bool | None = None) -> Problem:
    """The problem of a call; ``ops`` and ``weight_gradient`` as in :func:`fused_gopd.prepare.prepare`."""
    require_kind("head", call.head)
    head, labels, dtype = call.head, call.labels, call.dtype
    require_reverse_mode("linear_nll", head)
    nll = NLL(
        label_smoothing=_SMOOTHING("label_smoothing", call.label_smoothing),
        z_loss=require_not_negative("z_loss", call.z_loss),
    )
    options = checked_once(**{name: getattr(call, name) for name in _OPTIONS})
    if options.grad_filter and not isinstance(head, LinearHead):
        raise ValueError("grad_filter needs a LinearHead: with Logits there is no GEMM to save")
    options = with_logits_dtype(options, dtype, {"head": head})
    shape, device = head.token_shape, head.rows.device
    require_integer("labels", labels)
    require_shape("labels", labels, shape, "head")
    require_device("labels", labels, device)
    vocab_size = joint_vocab_size({"head": head}, options.vocab_size)
    sequences = check_cu_seqlens(call.cu_seqlens, shape, device)
    normalizer = check_normalizer(call.normalizer, call.sequence_lengths, options.reduction, sequences, device)
    given = check_mask(call.mask, shape, device, "head")
    live = labels != IGNORE if given is None else given & (labels != IGNORE)
    if call.sequence_lengths is not None:
        check_lengths(call.sequence_lengths, sequences, live)
    if host_sync_forbidden(device):
        check_no_host_sync(True, False, options, None)
    rows = live_rows(live, shape)
    weights = token_weights(options.reduction, live, sequences, normalizer, call.sequence_lengths, dtype, device)
    if rows.keep is not None:
        head, labels, weights = zero_masked(head, live), labels.masked_fill(~live, 0), weights * live
    weights = rows.take(weights).contiguous() if weights.ndim else weights
    token_weight = call.token_weight
    if token_weight is not None:
        token_weight = live_token_weight(token_weight, sequences, rows, dtype, device)
        weights = weights * token_weight
    ids = live_labels(rows.take(labels), vocab_size, "labels")
    models: dict[str, Sequence[Source]] = {"student": (head,), "teacher": (), "ref": ()}
    agreement, shards = None, shared_by(models)
    if shards:
        values = DEFAULTS | {name: getattr(options, name) for name in _OPTIONS} | {"student": head, "teacher": None}
        values |= {"token_ids": ids, "mask": live, "normalizer": normalizer, "cu_seqlens": call.cu_seqlens}
        values |= {"sequence_lengths": call.sequence_lengths, "token_weight": token_weight}
        named = f"linear_nll with label_smoothing={nll.label_smoothing} and z_loss={nll.z_loss}"
        agreement = agreement_of(shards, values, models, rows, [(0, rows.count)], named)
    if head.shard is not None:
        head = replace(head, shard=head.shard.within(vocab_size))
    return Problem(
        options=options,
        divergence=_UNIFORM,
        student=head,
        routes=(Route(start=0, stop=rows.count),),
        rows=rows,
        sequences=sequences,
        mask=live,
        vocab_size=vocab_size,
        token_ids=ids,
        nll=nll,
        weights=weights,
        recomputes=call.recomputes,
        agreement=agreement,
        ops=select_backend(options.backend, device, {head.rows.dtype}) if ops is None else ops,
        chunk_size=chunk_sizes(head, {}, options, vocab_size, dtype, weight_gradient)[0],
        dtype=dtype,
        device=device,
    )


_UNIFORM = ForwardKL()
_OPTIONS = ("reduction", "vocab_size", "chunk_size", "chunk_dtype", "grad_filter", "backend")
