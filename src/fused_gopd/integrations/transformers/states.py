"""The input of a model's head, and the head on it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from ...heads import LinearHead
from ...hooks import isinstance_if_imported
from ...shards import is_dtensor
from ...values import require_count
from .causal import causal_lm, find_head, is_compiled, lock, require_prefix, uncompiled
from .transform import UnknownTransformError, accepts, transform_of, without_head
from .weights import effective_weight


def _is_fsdp(x: Any) -> bool:
    return isinstance_if_imported(x, "torch.distributed.fsdp", "FSDPModule")


def head_of(model: Any, hidden: Tensor, *, temperature: float = 1.0) -> LinearHead:
    """The head of a model on its hidden states, with the family's factor, softcap and bias.

    Args:
        model: a causal language model of transformers, or a PEFT model of one. A LoRA adapter on the head is added to
            its weight; a copy in ``modules_to_save`` and ``trainable_token_indices`` replace it.
        hidden: (..., H), the input of the head: from :func:`last_hidden_state`, or slices of it. It differs
            from the body's ``last_hidden_state`` in families that change that before the head (MiniCPM3, Inkling).
        temperature: the sampling temperature, as in :class:`fused_gopd.LinearHead`.

    Returns:
        A head that shares the model's weight; only adapters on the head need a copy. Its logits are those of
        ``model(...).logits``, also where the model removes rows. Factor, softcap and rows were measured in the model's
        last :func:`last_hidden_state`. If there was none, or code or config changed since, they are measured in a
        forward of one token, which only runs the model's own code around its head.

    Raises:
        TypeError: a model that is not causal, or wrapped; a head that is not linear, quantised, or adapted in a way
            that is not known here; hooks on the model or the head, which would have no effect (those of FSDP,
            DeepSpeed, Accelerate and others that change no value are allowed); a replaced forward of the head.
        ValueError: weights that are sharded or offloaded; an adapter that is not a change of the weight.
        RuntimeError: the model changes its logits in a way that no LinearHead does, or in one that cannot be measured.
    """
    model = uncompiled(model)
    with lock(causal_lm(model)):
        location = find_head(model)
        weight, bias = effective_weight(location.head)
        transform = transform_of(location)
    cut = transform.rows < location.vocab_size
    if is_dtensor(weight):
        if any(_is_fsdp(x) for x in (model, location.model, location.head)) and not location.model.tp_size:
            raise ValueError(
                "the head's weight is sharded by FSDP2: call head_of in fused_gopd.distributed.in_forward, and where "
                "the head is a unit of its own in through_head (docs/integrations/transformers.md)"
            )
        if cut:
            raise ValueError(
                f"the head's weight is a DTensor, of which {type(location.caller).__name__} uses the first "
                f"{transform.rows} rows alone: make the head yourself, and give that number to the loss as vocab_size"
            )
    if cut:
        weight, bias = weight[: transform.rows], None if bias is None else bias[: transform.rows]
    return LinearHead(
        hidden,
        weight,
        bias,
        logit_scale=transform.logit_scale,
        softcap=transform.softcap,
        temperature=temperature,
    )


def require_head(model: Any) -> None:
    """Raise the errors of :func:`head_of` that can be found before the model is wrapped or run."""
    model = uncompiled(model)
    with lock(causal_lm(model)):
        location = find_head(model)
        if not any(is_dtensor(p) or hasattr(p, "ds_id") for p in location.head.parameters()):
            effective_weight(location.head)
        try:
            with (
                torch.no_grad()
            ):  # not to be taken for a trained factor: whether the model is trained is not known here
                transform_of(location)
        except UnknownTransformError:
            raise
        except RuntimeError:  # it does not run without the body; last_hidden_state measures it with the body
            pass


def _is_prompt_learning(model: Any) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def position_ids_of(model: Any, attention_mask: Tensor | None) -> Tensor | None:
    """(B, T) positions counted from the first attended token of the mask (B, T), as ``generate`` passes them.

    None where ``generate`` passes none, or others: the forward has no ``position_ids``, the family makes its own (the
    three axes of an image's positions), or PEFT puts virtual tokens before the sequence.
    """
    if attention_mask is None or attention_mask.ndim != 2 or _is_prompt_learning(model):
        return None
    base = causal_lm(model)
    kind, name = type(base), "_prepare_position_ids_for_generation"
    if base.config.model_type in ("kosmos-2", "kosmos-2.5"):  # their generate drops position_ids
        return None
    if "position_ids" not in inspect.signature(kind.forward).parameters:
        return None
    if getattr(kind, name, None) is not getattr(GenerationMixin, name, None):
        return None
    return (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 0)


def last_hidden_state(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    *,
    keep: int | None = None,
    **inputs: Any,
) -> Tensor:
    """The input of the head of a causal language model, for ``head_of(model, hidden)``.

    The model's own forward runs up to its head, with adapters, images and all other inputs; no [tokens, vocabulary]
    tensor is made. Without gradients (``torch.no_grad``) it is an evaluation: dropout is off, whatever the mode of the
    model, and the mode of every module is restored.

    Args:
        model: a causal language model of transformers, multimodal or not, or a PEFT model of one. Of DDP, FSDP and
            DeepSpeed wrappers the inner model, in :func:`fused_gopd.distributed.in_forward`.
        input_ids: (B, T); None with ``inputs_embeds``.
        attention_mask: (B, T), padding on either side. ``position_ids`` are made from it where ``generate`` makes them,
            so that tokens have the positions at which they were sampled (this matters for learned positions, GPT-2).
        keep: return only the states that predict the last ``keep`` tokens, at positions T - keep - 1 to T - 2, as the
            loss needs them for a completion of ``keep`` tokens.
        **inputs: other arguments of the forward: ``position_ids``, ``pixel_values``, ... ``use_cache`` is False unless
            given. ``labels`` and ``logits_to_keep`` are refused.

    Returns:
        (B, T, H), (B, keep, H) with ``keep``, in the dtype that the head computes in (autocast's, under autocast).

    Raises:
        TypeError, ValueError: as :func:`head_of`; an argument that must not be given; ``keep`` that is not below T.
        RuntimeError: the model changes the outputs of its head in a way that no :class:`fused_gopd.LinearHead` does.
    """
    for name, instead in (("labels", "sft_labels of gopd_loss"), ("logits_to_keep", "keep")):
        if inputs.get(name) is not None:
            raise TypeError(f"{name} is no input here, where no logits are made: use {instead}")
    if is_compiled(model):
        warnings.warn(
            "model is compiled as a whole, and runs without that here, where its head is left out: compile the body or "
            "its layers in place, model.model.compile()",
            stacklevel=2,
        )
    model = uncompiled(model)
    base = causal_lm(model)
    require_prefix(base, inputs.get("token_type_ids"))
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    adapted = isinstance_if_imported(head, "peft.tuners.tuners_utils", "BaseTunerLayer")
    if adapted and inputs.get("adapter_names") is not None:
        raise ValueError("adapter_names is no input here for a model with an adapter on its head: head_of takes one")
    if accepts(type(base).forward, "use_cache"):
        inputs.setdefault("use_cache", False)
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if inputs.get("position_ids") is None and inputs.get("past_key_values") is None:
        positions = position_ids_of(model, attention_mask)
        if positions is not None:
            inputs["position_ids"] = positions
    try:
        _, hidden = without_head(base, lambda: model.forward(input_ids=input_ids, **inputs))
    except RuntimeError as error:
        if "DTensor" in str(error) and any(_is_fsdp(x) for x in (model, base)):
            raise RuntimeError(
                "model is sharded by FSDP2, whose parameters are gathered in its forward alone: call last_hidden_state "
                "in fused_gopd.distributed.in_forward(model, ...)"
            ) from error
        raise
    if _is_prompt_learning(model) and input_ids is not None:
        hidden = hidden[:, -input_ids.shape[1] :]  # remove the virtual tokens in front
    if keep is None:
        return hidden
    tokens = hidden.shape[1]
    if require_count("keep", keep) >= tokens:
        raise ValueError(
            f"keep must be below the number of tokens {tokens}: nothing predicts the first one, got {keep}"
        )
    return hidden[:, tokens - keep - 1 : tokens - 1]
