"""Weight and bias of a head as its forward uses them, with adapters of PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import isinstance_if_imported, require_linear
from ...shards import is_dtensor


def effective_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) or None; gradients flow to the trained parameters.

    Raises:
        TypeError: a head, or a part of it, that is not a plain weight: quantised, wrapped, with an unknown adapter.
        ValueError: weights that are sharded or offloaded; an adapter that is not a change of the weight.
    """
    if isinstance_if_imported(head, "peft.utils.other", "ModulesToSaveWrapper"):
        wrapper: Any = head
        return effective_weight(
            wrapper.original_module
            if wrapper.disable_adapters or wrapper.active_adapters[0] not in wrapper.modules_to_save
            else wrapper.modules_to_save[wrapper.active_adapters[0]]
        )
    if isinstance_if_imported(head, "peft.utils.other", "TrainableTokensWrapper"):
        return effective_weight(head.token_adapter)  # type: ignore[arg-type]
    if isinstance_if_imported(head, "peft.tuners.trainable_tokens", "TrainableTokensLayer"):
        return _with_trained_tokens(head)
    if isinstance_if_imported(head, "peft.tuners.lora", "Linear"):
        return _with_lora(head)
    if isinstance_if_imported(head, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        raise TypeError(
            f"the head has an adapter, {type(head).__module__}.{type(head).__name__}, whose weight is not known here: "
            "LoRA (without DoRA or other variants), modules_to_save and trainable_token_indices are; leave lm_head out "
            "of target_modules, or merge the adapter, model.merge_and_unload()"
        )
    return _of_linear(head)


def _of_linear(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    require_linear("the head", head)
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor)
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            "the head's weight is a ZeRO-3 parameter that is not gathered here: call head_of in fused_gopd.distributed."
            "through_head, inside of in_forward (docs/integrations/transformers.md)"
        )
    if weight.device.type == "meta":
        raise ValueError("the head's weight is on the meta device, offloaded or not loaded: keep lm_head on a device")
    plain = type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight)
    if not plain or not weight.is_floating_point() or weight.itemsize == 1:
        raise TypeError(
            f"the head's weight must be a floating point tensor, got {type(weight).__name__} of {weight.dtype}: leave "
            "the head out of the quantisation (modules_to_not_convert=['lm_head'])"
        )
    return weight, bias  # type: ignore[return-value]


def _with_lora(head: Any) -> tuple[Tensor, Tensor | None]:
    """W + sum of scaling B A, a new (V, H) tensor; gradients flow to A, B, and to W if it is trained."""
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its forward does
    weight, bias = _of_linear(head.base_layer)
    for name in () if head.disable_adapters or head.merged else head.active_adapters:
        if name not in head.lora_A:
            continue
        dropout = getattr(head.lora_dropout[name], "p", 0.0)
        for what, found in (
            ("a variant of LoRA (DoRA and others)", name in head.lora_variant),
            (f"lora_dropout={dropout}", dropout > 0 and head.training and torch.is_grad_enabled()),
            ("lora_bias=True", head.lora_B[name].bias is not None),
        ):
            if found:
                raise ValueError(
                    f"the LoRA adapter {name!r} on the head has {what}, which is no change of its weight: configure it "
                    "without, leave lm_head out of target_modules, or take modules_to_save=['lm_head']"
                )
        weight = weight + head.get_delta_weight(name).to(weight.dtype)
    return weight, bias


def _with_trained_tokens(layer: Any) -> tuple[Tensor, Tensor | None]:
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    weight, bias = _of_linear(layer.base_layer)
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return weight, bias
    return layer.get_merged_weights(layer.active_adapters), None  # PEFT's forward ignores the bias too
