"""Fingerprints of models in this process: what tells one from another whose scores differ."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...heads import LinearHead
from ...shards import is_dtensor
from .files import digest

# of a config: they change no score, or differ between two ways to load the same model
_WITHOUT = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "architectures",
    "use_cache",
    "torch_dtype",
    "dtype",
)
# of an adapter's config, likewise
_WITHOUT_PEFT = (
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "runtime_config",
    "target_modules",  # as a list, a set or a pattern; the names of the weights say it
    "exclude_modules",
    "modules_to_save",
    "task_type",
)
_SAMPLED = 32  # values of a weight


def fingerprint(model: nn.Module, *, only: Container[str] | None = None) -> str:
    """A hash of class, config, adapters, and names, shapes, dtypes and values of all weights of a model.

    Each byte is read once: the 64-bit words of a weight are added along its rows, and along its columns, modulo 2^64,
    and the sums are hashed. So a change of any one value changes the fingerprint, and it is the same on every device;
    it is no protection against somebody who wants two models to have the same. In another dtype a model is another one.

    Args:
        model: with its whole weights in this process.
        only: the names of the parameters that make the model, where these are not all: of a PEFT model its base's.

    Raises:
        ValueError: weights that are not here (sharded, offloaded, on the meta device).
    """
    weights: Iterable[tuple[str, Tensor]] = model.state_dict().items()
    if only is not None:
        weights = [(name, x) for name, x in model.named_parameters() if name in only]
    parts = [_class_of(model).encode(), _config_of(model)]
    if only is None and (adapters := adapters_of(model)):
        parts.append(adapters.encode())
    with torch.no_grad():
        for name, x in weights:
            if not isinstance(x, Tensor):  # what a module adds to its state beside tensors
                parts += [name.encode(), repr(x).encode()]
                continue
            if is_dtensor(x) or x.is_meta or (hasattr(x, "ds_id") and x.numel() == 0):
                raise ValueError(f"the weight {name} is not whole in this process: {type(x).__name__} on {x.device}")
            parts += [f"{name} {x.dtype} {tuple(x.shape)}".encode(), _sums(x.detach())]
    return digest(*parts)


def adapters_of(model: Any) -> str:
    """What tells PEFT models of the same weights apart: the active adapters and their factors; "" without any."""
    found: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "disable_adapters", None), bool):  # a layer of PEFT; a model has a method
            active = list(module.active_adapters)
            scaling = getattr(module, "scaling", {})
            factors = {key: scaling[key] for key in active if key in scaling} if isinstance(scaling, dict) else {}
            merged = sorted(getattr(module, "merged_adapters", ()))
            found.append([name, active, module.disable_adapters, merged, factors])
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict):
        names = model.active_adapters  # a method of transformers' own models
        of_active = [configs[name].to_dict() for name in (names() if callable(names) else names)]
        found.append([{key: x for key, x in config.items() if key not in _WITHOUT_PEFT} for config in of_active])
    return json.dumps(found, sort_keys=True, default=_as_json) if found else ""


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def sample_of(weights: Iterable[Tensor]) -> bytes:
    """A few values of every weight: what is written into ``weight.data`` is not counted as written in place."""
    picked = []
    with torch.no_grad():
        for x in weights:
            flat = x.detach().reshape(-1)
            picked.append(flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].double())
        by_device: dict[torch.device, list[Tensor]] = {}
        for x in picked:
            by_device.setdefault(x.device, []).append(x)
        return b"".join(torch.cat(xs).cpu().numpy().tobytes() for xs in by_device.values())


def head_fingerprint(head: LinearHead) -> str:
    """A hash of a head: weight and bias in float32, factor and softcap; the same for a copy in a wider dtype."""
    parts = [f"{tuple(head.weight.shape)} {head.logit_scale} {head.softcap}".encode()]
    with torch.no_grad():
        for x in (head.weight, head.bias):
            if x is not None:
                parts += [_sums(rows.detach().float()) for rows in torch.split(x, 8192)]
    return digest(*parts)


def _class_of(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return f"{type(base).__module__}.{type(base).__qualname__}"


def _config_of(model: Any) -> bytes:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return b""
    known = _without(config.to_dict())
    return json.dumps(known, sort_keys=True, default=str).encode()


def _without(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without(value) for name, value in values.items() if name not in _WITHOUT}
    return values


def _sums(x: Tensor) -> bytes:
    """Sums of the 64-bit words of a tensor along its last dimension and along the others."""
    x = x.contiguous()
    if x.storage_offset() * x.element_size() % 8:  # of one buffer for several weights
        x = x.clone()
    if x.ndim == 0 or x.shape[-1] * x.element_size() % 8:
        flat = x.reshape(-1).view(torch.uint8)
        words = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)[None]
    else:
        words = x.view(torch.int64).reshape(-1, x.shape[-1] * x.element_size() // 8)
    return b"".join(words.sum(dim).cpu().numpy().tobytes() for dim in (1, 0))
