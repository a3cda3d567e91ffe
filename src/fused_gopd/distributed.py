"""The loss on several ranks: heads that a wrapper has sharded, and means that are exact over ranks and micro-batches.

DDP, FSDP2 and ZeRO-3 gather parameters and reduce gradients in hooks around a module's forward, which a loss that reads
``lm_head.weight`` goes past. Two ways to have them run, and one to weigh the tokens:

* :func:`in_forward` and :func:`through_head` call a function as the forward of the wrapper and of the head: everything
  is then the wrapper's business, as for any layer.
* :func:`gathered` gathers one weight for as long as a block lasts and reduces its gradient once, at the end.
* :func:`normalization` counts tokens and sequences over ranks and micro-batches.

``docs/parallelism.md`` has the patterns. Nothing here has a vocabulary axis but the weights that are passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .checks import require_mask
from .heads import LinearHead
from .hooks import HEAD_FIX, isinstance_if_imported, require_linear, require_no_hooks
from .options import REDUCTIONS
from .output import GOPDOutput
from .shards import is_dtensor
from .tokens import Sequences, widest
from .values import one_of, require_number

T = TypeVar("T")

__all__ = ["gathered", "in_forward", "normalization", "through_head"]


# ------------------------------------------------------------------------------------------------ inside the wrapper


_WRAPPERS = (
    *(("torch.nn.parallel", "DistributedDataParallel"), ("deepspeed", "DeepSpeedEngine")),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module whose forward a wrapper calls: FSDP2 hooks a module in place, the others hold one."""
    return _wrapped(module)[-1]


def _wrapped(module: nn.Module) -> list[nn.Module]:
    """A module, and if it is a wrapper what it wraps, outermost first."""
    modules = [module]
    while any(isinstance_if_imported(modules[-1], library, name) for library, name in _WRAPPERS):
        modules.append(cast("nn.Module", modules[-1].module))
    return modules


def _as_forward(module: nn.Module, function: Callable[..., T], *args: Tensor) -> T:
    """``function(*args)`` in the place of the forward of a module, so that all hooks around that run.

    The hooks see tensors alone, whatever the function returns: they look for those that need a gradient in nested
    tuples and lists, and would not find the loss in a result of a type that they do not know.
    """
    inner = _unwrapped(module)
    own = vars(inner).get("forward")  # there where a library has patched the instance
    result: list[Any] = []

    def restore() -> None:
        if own is None:
            vars(inner).pop("forward", None)
        else:
            vars(inner)["forward"] = own

    def forward(*args: Tensor) -> Any:
        restore()  # the function may call the module
        result.append(function(*args))
        if not isinstance(result[0], GOPDOutput):
            return result[0]
        loss = result[0].loss
        return loss if loss._base is None else loss.clone()  # FSDP2 warns of views

    vars(inner)["forward"] = forward
    try:
        returned = module(*args)
    finally:
        restore()
    # hooks may have put other tensors in the place of those that they were shown
    return cast("T", replace(result[0], loss=returned) if isinstance(result[0], GOPDOutput) else returned)


def in_forward(wrapper: nn.Module, function: Callable[[], T]) -> T:
    """Call a function as the forward of a wrapped model: parameters are gathered and gradients will be reduced.

    The function does what the model's forward would, with the loss in it: the body's forward, :func:`through_head`, and
    the loss. It takes what it needs from where it was defined, and not as arguments, which mixed precision would round.
    It must call the model's parts (``model.model(...)``), never the wrapper.

    With FSDP2 the parameters that the root holds (those of no layer that is wrapped on its own) are plain tensors in
    it. DDP reduces no gradient of a forward past it, and says nothing. (The idea of calling a function as the forward
    of a wrapper is Lightning's.)

    Args:
        wrapper: a model under ``fully_shard``, ``DistributedDataParallel``, a DeepSpeed engine or
            ``FullyShardedDataParallel`` with ``use_orig_params=True``; a plain module is called alike.
        function: returns a :class:`fused_gopd.GOPDOutput`, or tensors in tuples, lists or dicts.

    Returns:
        What the function returns; call ``backward`` on its loss.

    Raises:
        TypeError: hooks on the wrapper or the model inside of it that are no wrapper's: they are made for the model's
            inputs and outputs, and would be handed the loss.
    """
    require_no_hooks("wrapper", _wrapped(wrapper), "do its work in the function")
    return _as_forward(wrapper, function)


def through_head(
    head: nn.Module,
    hidden: Tensor,
    function: Callable[[LinearHead], T],
    **transform: Any,
) -> T:
    """Call a function of hidden states and a model's head as the forward of that head.

    Where the head is a unit of its own (``fully_shard(model.lm_head)``, ZeRO-3), its weight is gathered for the
    function, and once more for its backward if it was freed; the wrapper reduces the gradient into its shards.
    Elsewhere the function is called as it is. Call it in :func:`in_forward`, and once for several losses of the same
    hidden states.

    Args:
        head: the language-model head, ``nn.Linear`` with weight (V, H), wrapped or not; tied to the embeddings or not.
        hidden: (..., H). Forward pre-hooks may change it, as the wrappers' cast it to the dtype that the head computes
            in.
        function: called with the :class:`fused_gopd.LinearHead`; returns a :class:`fused_gopd.GOPDOutput`, or tensors
            in tuples, lists or dicts. It is the only place where the head may be used.
        **transform: ``logit_scale``, ``softcap``, ``temperature`` of the LinearHead.

    Raises:
        TypeError: a head that is not an ``nn.Linear``, as one with an adapter, of which the weight is only a part; one
            whose forward was replaced; one with forward or backward hooks that are no wrapper's, which are made for
            logits and would be handed what the function returns.
    """
    *wrappers, module = _wrapped(head)
    carried_out = ("forward pre-hook",)
    require_no_hooks("head", wrappers, HEAD_FIX, but=carried_out)
    inner = require_linear("head", module, but=carried_out)
    return _as_forward(head, lambda h: function(LinearHead(h, inner.weight, inner.bias, **transform)), hidden)


# ------------------------------------------------------------------------------------------------- one gather a step


@contextmanager
def gathered(
    weight: Tensor, *, dtype: torch.dtype | None = None, gradient_divide_factor: float | None = None
) -> Iterator[Tensor]:
    """The whole of a sharded weight as a plain tensor for as long as the block lasts: gathered once, freed at its end.

    For a step of several losses or micro-batches, forward and backward of all of them inside the block::

        with fg.distributed.gathered(model.lm_head.weight) as weight:
            for batch in batches:
                fg.gopd_loss(fg.LinearHead(hidden(batch), weight), ...).loss.backward()

    Gradients accumulate in the whole weight, in the precision of the shards, and are reduced into ``weight.grad`` once,
    when the block ends: every rank must come there, with tokens or without, and none may run a backward after it. An
    exception in the block skips the reduction.

    Args:
        weight: a DTensor, as FSDP2's parameters are, on ranks that are all data-parallel (or context-parallel); or a
            plain tensor, which is yielded as it is. As the student's, take it before the forward of the model whose
            root holds it, after which FSDP2 leaves it gathered.
        dtype: that of the hidden states, where the shards are kept in another; DTensors only.
        gradient_divide_factor: what the sum of the gradients over the ranks is divided by, as
            ``FSDPModule.set_gradient_divide_factor`` has it; default the number of ranks. DTensors only.

    Memory: the whole weight, and if it is trained its gradient (another one in the shards' dtype where ``dtype``
    differs). Communication: one all-gather in ``dtype`` and one reduce-scatter in the shards' dtype.

    Raises:
        ValueError: an option that the kind of weight does not have; a ZeRO-3 parameter.
        RuntimeError: a backward through the weight after the block.
    """
    if is_dtensor(weight):
        with _gathered_dtensor(weight, weight.dtype if dtype is None else dtype, gradient_divide_factor) as whole:
            yield whole
        return
    for name, option in (("dtype", dtype), ("gradient_divide_factor", gradient_divide_factor)):
        if option is not None:
            raise ValueError(f"{name} is an option of DTensor weights, got a {type(weight).__name__}")
    if hasattr(weight, "ds_id"):
        raise ValueError("weight is a ZeRO-3 parameter, which DeepSpeed alone gathers: use through_head in in_forward")
    yield weight


@contextmanager
def _gathered_dtensor(weight: Any, dtype: torch.dtype, divide_factor: float | None) -> Iterator[Tensor]:
    from torch.distributed.tensor import DTensor, Partial

    if divide_factor is None:
        divide_factor = weight.device_mesh.size()
    elif require_number("gradient_divide_factor", divide_factor) <= 0:
        raise ValueError(f"gradient_divide_factor must be positive, got {divide_factor}")
    trained = weight.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        whole = weight.detach().to(dtype).full_tensor()
    whole = whole.detach().requires_grad_(trained)
    total: Tensor | None = None
    open_ = True

    def check(_: Tensor) -> None:
        if not open_:
            raise RuntimeError("a backward through a gathered weight must run inside its block: gradients were reduced")

    def accumulate(leaf: Tensor) -> None:
        # in the shards' dtype: a sum over micro-batches in a lower precision drifts
        nonlocal total
        assert leaf.grad is not None
        total = leaf.grad.to(weight.dtype) if total is None else total.add_(leaf.grad)
        leaf.grad = None

    if trained:
        whole.register_hook(check)
        whole.register_post_accumulate_grad_hook(accumulate)
    try:
        yield whole
    finally:
        open_ = False
        # whoever still holds the tensor holds no memory with it
        whole.data = whole.new_empty(0)
    if not trained:
        return
    with torch.no_grad():
        # a rank without a backward takes part all the same
        total = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device) if total is None else total
        partial = [Partial()] * weight.device_mesh.ndim
        sum_ = DTensor.from_local(total.div_(divide_factor), weight.device_mesh, partial, run_check=False)
        total = None  # which the hook, and so whoever holds the tensor, would keep
        gradient = sum_.redistribute(placements=weight.placements)
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


# ------------------------------------------------------------------------------------------------------ exact means


def _world(group: torch.distributed.ProcessGroup | None) -> int:
    """Ranks of a group, of the default one if None; 1 in a program that is not distributed."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size(group)


def _sum_over(values: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    if _world(group) > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


def _per_rank(count: Tensor, ranks: int) -> Tensor:
    """A count, of 1 at least so that nothing divides by 0, over the ranks that an average divides by."""
    return count.clamp_min(1).to(widest(count.device)) / ranks


def normalization(
    reduction: str,
    masks: Sequence[Tensor],
    *,
    cu_seqlens: Sequence[Tensor] | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    context_group: torch.distributed.ProcessGroup | None = None,
    averaged: bool = True,
) -> list[dict[str, Any]]:
    """Options that make the losses of all ranks and micro-batches of a step one loss: that of the one big batch.

    ``fg.gopd_loss(..., mask=masks[i], **normalization(reduction, masks)[i])`` for each micro-batch ``i``. The gradients
    of a step are then those of one process with the whole batch, and the mean over the ranks of the sum of a rank's
    losses is its loss. Nothing is read back from the device.

    Args:
        reduction: ``"token-mean"``, ``"seq-mean-token-mean"``, ``"seq-mean-token-sum"`` or ``"sum"``.
        masks: this rank's masks of the step's micro-batches, (B, T) or (N,), bool or 0 and 1 in any dtype; with
            ``context_group`` those of its own part of the sequences. Numbers and shapes may differ between ranks.
        cu_seqlens: the bounds (B + 1,) of each micro-batch, where tokens are packed. A part of a packed batch keeps all
            sequences, those without a token here with two equal bounds.
        group: the ranks whose tokens are the batch, those over which gradients are averaged; the default group if None.
        context_group: those among them that hold parts of the same sequences (context or sequence parallelism), in
            micro-batches of one number of sequences in one order. None: sequences are whole.
        averaged: gradients are averaged over ``group``, as DDP, FSDP2 and ZeRO do, which the normalizer makes up for.
            False where they are summed.

    Returns:
        One dict of ``reduction``, ``normalizer`` and, for ``seq-mean-token-mean``, ``sequence_lengths`` a micro-batch.
        ``"sum"`` becomes a ``token-mean`` whose normalizer makes up for the average alone.

    Communication: one all-reduce of one number over ``group``; for sequence means with ``context_group`` one before it,
    of a number for each sequence.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was found.
    """
    one_of("reduction", reduction, tuple(x for x in REDUCTIONS if x != "none"))
    if isinstance(masks, Tensor) or not masks:
        raise TypeError("masks must be a list of the masks of a step's micro-batches, one at least")
    masks = [require_mask(f"masks[{i}]", mask) for i, mask in enumerate(masks)]
    if cu_seqlens is not None and len(cu_seqlens) != len(masks):
        raise ValueError(f"cu_seqlens must have one entry for each of the {len(masks)} masks, got {len(cu_seqlens)}")
    if reduction.startswith("seq-") and cu_seqlens is None and any(mask.ndim < 2 for mask in masks):
        raise ValueError(f"reduction={reduction!r} needs masks of shape (B, T), or cu_seqlens to tell sequences")
    ranks = _world(group) if averaged else 1
    if reduction == "sum":
        return [{"reduction": "token-mean", "normalizer": 1.0 / ranks}] * len(masks)
    if reduction == "token-mean":
        tokens = torch.stack([mask.count_nonzero() for mask in masks]).sum()
        total = _sum_over(tokens, group)
        return [{"reduction": reduction, "normalizer": _per_rank(total, ranks)}] * len(masks)
    bounds = [None] * len(masks) if cu_seqlens is None else [x.to(torch.int64) for x in cu_seqlens]
    lengths = [Sequences(mask.shape, x).sum(mask).to(torch.int64) for mask, x in zip(masks, bounds, strict=True)]
    every = torch.cat(lengths)
    parts = 1
    if context_group is not None:
        every, parts = _sum_over(every, context_group), _world(context_group)
    # each rank of a context group counts the same sequences
    live = _sum_over(every.count_nonzero(), group) // parts
    options: dict[str, Any] = {"reduction": reduction, "normalizer": _per_rank(live, ranks)}
    if reduction == "seq-mean-token-sum":
        return [options] * len(masks)
    split = torch.split(every, [len(x) for x in lengths])
    return [{**options, "sequence_lengths": x} for x in split]
