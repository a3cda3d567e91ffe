"""Hidden states and heads of transformers models, as the loss takes them.

    hidden = last_hidden_state(model, input_ids, attention_mask, keep=completion.shape[1])
    out = fg.gopd_loss(head_of(model, hidden), teacher, ref, completion)

A model's own forward is run, with its head replaced for the time of the call by a module that keeps what it is given.
So whatever a family does between its body and its head (a division, a projection, the images of a wrapper, the
adapters of PEFT) is in the hidden states. What it does after the head, a factor or a softcap, is read from the config
by :func:`head_of`, and :func:`last_hidden_state` checks that the model's code does just that: in place of logits the
code is handed numbers, and what it makes of them is compared. A family that does something else is an error, never a
guess.

Hooks on the head itself do not run: :func:`fused_gopd.distributed.through_head` is for wrappers that need them.
``docs/integrations/transformers.md`` has the families and the recipes.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from ..checks import require_count
from ..heads import LinearHead
from ..shards import is_dtensor
from .modules import evaluation

__all__ = ["PatchedLMHead", "head_of", "last_hidden_state", "patch_lm_head"]


# ------------------------------------------------------------------------------------------- what follows the head

# By the class whose forward calls the head, as of transformers 5.23: the attribute of its text config that its code
# reads. Classes of transformers that are not here do nothing to their logits, whatever their config holds.
_TIMES = {
    "logit_scale": (
        *("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM", "CohereCompassForCausalLM"),
        "CohereCompassForConditionalGeneration",
    ),
    "logits_scaling": ("HyperCLOVAXForCausalLM", "HyperCLOVAXVisionV2ForConditionalGeneration"),
    "lm_head_multiplier": ("FalconH1ForCausalLM",),
    "output_multiplier": ("MuseGlimmerForConditionalGeneration", "MuseSparkForConditionalGeneration"),
}
_DIVIDED_BY = {
    "logits_scaling": (
        *("GraniteForCausalLM", "GraniteSWAForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSWAForCausalLM"),
        *("GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM", "Granite4VisionForConditionalGeneration"),
        "GraniteDoclingForConditionalGeneration",
    ),
}
_CAPPED_AT = {
    "final_logit_softcapping": (
        *("BeamForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3nForCausalLM", "Gemma4ForCausalLM"),
        *("Gemma3nForConditionalGeneration", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForCausalLM"),
        *("Gemma4UnifiedForConditionalGeneration", "Inkling2ForCausalLM", "Inkling2ForConditionalGeneration"),
        *("MistralLarge4ForConditionalGeneration", "MuseGlimmerForConditionalGeneration"),
        *("MuseSparkForConditionalGeneration", "NanoChatForCausalLM", "PaliGemmaForConditionalGeneration"),
        "VaultGemmaForCausalLM",
    ),
    "logits_soft_cap": ("RecurrentGemmaForCausalLM",),
    "output_logit_soft_cap": ("xLSTMForCausalLM",),
}
_ROWS = {
    "unpadded_vocab_size": (
        *("InklingForCausalLM", "InklingForConditionalGeneration", "Inkling2ForCausalLM"),
        "Inkling2ForConditionalGeneration",
    ),
}


@dataclass(frozen=True)
class _Transform:
    """What a model does to the outputs of its head: rows past a vocabulary left out, a factor, a softcap."""

    rows: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def of(self, z: Tensor) -> Tensor:
        """Of columns that are not left out."""
        z = z * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def _transform_of(caller: nn.Module, model: PreTrainedModel) -> _Transform:
    config = getattr(caller, "config", model.config).get_text_config()
    coded = next(c for c in type(caller).__mro__ if "forward" in vars(c))

    def read(table: Mapping[str, tuple[str, ...]]) -> Any:
        """The value that the code of this class takes from its config."""
        values = [getattr(config, name, None) for name, classes in table.items() if coded.__name__ in classes]
        return values[0] if values else None

    if not coded.__module__.startswith(("transformers.", "torch.")):
        for name in {**_TIMES, **_DIVIDED_BY, **_CAPPED_AT, **_ROWS}:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"model has {name}={getattr(config, name)} in its config, and {coded.__name__}.forward is not code "
                    "of transformers: whether it applies that to its logits is not known here; make the head "
                    "yourself, fused_gopd.LinearHead(hidden, weight, logit_scale=..., softcap=...)"
                )
    times, divided = read(_TIMES), read(_DIVIDED_BY)
    scale = (1.0 if times is None else times) / (1.0 if divided is None else divided)
    return _Transform(read(_ROWS), scale, read(_CAPPED_AT))


# ------------------------------------------------------------------------------------------------- finding the head


@dataclass(frozen=True)
class _Place:
    """A head, and where it is called from."""

    model: PreTrainedModel
    caller: nn.Module  # whose forward calls it
    name: str
    head: nn.Module

    @property
    def transform(self) -> _Transform:
        return _transform_of(self.caller, self.model)


def _is(x: Any, library: str, name: str) -> bool:
    """isinstance of a class of a library that may not be there; who has not imported it has no instance."""
    return isinstance(x, getattr(sys.modules.get(library), name, ()))


# these take gradients, or gather parameters, in hooks around their own forward
_WRAPPERS = (
    *(("torch.nn.parallel", "DistributedDataParallel"), ("torch.nn", "DataParallel")),
    *(("torch.distributed.fsdp", "FullyShardedDataParallel"), ("deepspeed", "DeepSpeedEngine")),
)


def _looks_ahead(config: Any) -> str | None:
    """Why a model's states see later tokens, whose likelihood given earlier ones they then do not give; None if not."""
    if config.model_type in ("xlnet", "cpmant"):
        return f"{config.model_type} does so whatever its config"
    # GPT-NeoX has the attribute, too, and does not read it
    if not getattr(config, "is_decoder", True) and not config.model_type.startswith("gpt_neox"):
        return "load it with is_decoder=True"
    if config.model_type == "xlm" and not config.causal:
        return "load it with causal=True"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its config has use_bidirectional_attention"
    return None


def _is_compiled(model: Any) -> bool:
    """Compiled as a whole, by torch.compile(model) or model.compile()."""
    whole = _is(model, "torch._dynamo.eval_frame", "OptimizedModule")
    return whole or getattr(model, "_compiled_call_impl", None) is not None


def _uncompiled(model: Any) -> Any:
    return model._orig_mod if _is(model, "torch._dynamo.eval_frame", "OptimizedModule") else model


def _causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside of what a user has; raises for what is none, or does not sample from a head."""
    for library, name in _WRAPPERS:
        if _is(model, library, name):
            raise TypeError(
                f"model must be the model inside the wrapper, got {name}: pass model.module, inside of "
                "fused_gopd.distributed.in_forward(wrapper, ...), so that the wrapper's hooks run (docs/scaling.md)"
            )
    base = model
    if _is(model, "peft", "PeftModel"):
        base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel or a PEFT model of one, got {type(base)}")
    name, config = type(base).__name__, base.config
    if not base.can_generate():
        raise TypeError(f"model must be a causal language model, which {name} is not: load it by AutoModelForCausalLM")
    if config.is_encoder_decoder:
        raise TypeError(
            f"model must be a causal language model; {name} is an encoder-decoder: take the decoder's hidden states "
            "from its output and make fused_gopd.LinearHead(hidden, model.lm_head.weight)"
        )
    ahead = _looks_ahead(config)
    if ahead is not None:
        raise ValueError(f"model must be causal; {name} predicts a token from those after it, too: {ahead}")
    return base


def _find(model: Any) -> _Place:
    base = _causal_lm(_uncompiled(model))
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or isinstance(head, (nn.ModuleList, nn.ModuleDict)):
        what = "no output embedding" if head is None else f"{len(head)} of them"
        raise TypeError(
            f"model must have one output embedding (get_output_embeddings); {type(base).__name__} has {what}"
        )
    for caller in base.modules():
        for name, child in caller._modules.items():
            if child is not None and child is head:
                return _Place(base, caller, name, head)
    raise TypeError(
        f"model's output embedding is no module of {type(base).__name__}: it cannot be found in its forward"
    )


# ------------------------------------------------------------------------------------------------- the head's weight


def _effective(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the forward of a head multiplies by, adapters included; gradients reach what is trained."""
    if _is(head, "peft.utils.other", "ModulesToSaveWrapper"):
        wrapper: Any = head
        return _effective(
            wrapper.original_module
            if wrapper.disable_adapters or wrapper.active_adapters[0] not in wrapper.modules_to_save
            else wrapper.modules_to_save[wrapper.active_adapters[0]]
        )
    if _is(head, "peft.utils.other", "TrainableTokensWrapper"):
        return _effective(head.token_adapter)  # type: ignore[arg-type]
    if _is(head, "peft.tuners.trainable_tokens", "TrainableTokensLayer"):
        return _with_trained_tokens(head)
    if _is(head, "peft.tuners.lora", "Linear"):
        return _with_lora(head)
    if _is(head, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        raise TypeError(
            f"the head has an adapter, {type(head).__module__}.{type(head).__name__}, whose weight is not known here: "
            "LoRA (without DoRA or other variants), modules_to_save and trainable_token_indices are; leave lm_head out "
            "of target_modules, or merge the adapter, model.merge_and_unload()"
        )
    return _plain(head)


def _plain(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    name = f"{type(head).__module__}.{type(head).__name__}"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"the head must be an nn.Linear, whose weight makes the logits, got {name}. If that is a quantised layer, "
            "leave the head as it is when the model is loaded (modules_to_not_convert=['lm_head'], or "
            "llm_int8_skip_modules of bitsandbytes), or dequantise it (model.dequantize())"
        )
    if "forward" in vars(head) and not hasattr(head, "_hf_hook"):  # Accelerate's moves tensors between devices
        raise TypeError(f"the head's forward was replaced on this instance, {head.forward}: its weight may not be all")
    weight, bias = head.weight, head.bias
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
    return weight, bias


def _with_lora(head: Any) -> tuple[Tensor, Tensor | None]:
    """W + sum of scaling B A; gradients flow to A, B, and to W if it is trained. Memory: one more (V, H)."""
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its forward does
    weight, bias = _plain(head.base_layer)
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
    weight, bias = _plain(layer.base_layer)
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return weight, bias
    return layer.get_merged_weights(layer.active_adapters), None  # PEFT's forward leaves the bias out, too


def head_of(model: Any, hidden: Tensor, *, temperature: float = 1.0) -> LinearHead:
    """The head of a model on hidden states of it, with the family's own factor, softcap and bias.

    Args:
        model: a causal language model of transformers, or a PEFT model of one. A LoRA adapter on the head is added to
            its weight, a copy in ``modules_to_save`` and ``trainable_token_indices`` are taken in its place.
        hidden: (..., H), what the head is given: from :func:`last_hidden_state`, or slices of it. Families that change
            their hidden states between body and head (MiniCPM3, Inkling, BERT) have another ``last_hidden_state``.
        temperature: the sampling temperature, as in :class:`fused_gopd.LinearHead`.

    Returns:
        A head that shares the model's weight, without a copy but for adapters on the head. ``head_of(model, hidden)``
        stands for ``model(...).logits``, where the model leaves out rows of its head included.

    Raises:
        TypeError: a model that is not causal, or wrapped; a head that is not linear, quantised, or adapted in a way
            that is not known here.
        ValueError: weights that are sharded or not there; an adapter that is no change of the weight.
    """
    model = _uncompiled(model)
    with _lock(_causal_lm(model)):
        place = _find(model)
    weight, bias = _effective(place.head)
    transform = place.transform
    if is_dtensor(weight):
        fsdp = any(_is(x, "torch.distributed.fsdp", "FSDPModule") for x in (model, place.model, place.head))
        if fsdp and not place.model.tp_size:
            raise ValueError(
                "the head's weight is sharded by FSDP2: call head_of in fused_gopd.distributed.in_forward, and where "
                "the head is a unit of its own in through_head (docs/integrations/transformers.md)"
            )
        if transform.rows is not None:
            raise ValueError(
                f"the head's weight is a DTensor, of which {type(place.caller).__name__} uses the first "
                f"{transform.rows} rows alone: make the head yourself, and give that number to the loss as vocab_size"
            )
    weight = weight[: transform.rows]
    bias = None if bias is None else bias[: transform.rows]
    return LinearHead(
        hidden,
        weight,
        bias,
        logit_scale=transform.logit_scale,
        softcap=transform.softcap,
        temperature=temperature,
    )


# -------------------------------------------------------------------------------------------------- what the head sees

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _lock(model: nn.Module) -> threading.RLock:
    """One forward of a model at a time while its head is replaced; other threads' own calls get the real head."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


class _Tap(nn.Module):
    """In the place of a head: keeps the hidden states that it is given, and returns ``numbers`` in place of logits."""

    def __init__(self, head: nn.Module, numbers: Tensor) -> None:
        super().__init__()
        self.__dict__.update(head=head, thread=threading.get_ident(), numbers=numbers, hidden=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)  # families read the dtype of its weight

    def forward(self, hidden: Tensor) -> Any:
        if threading.get_ident() != self.thread:
            return self.head(hidden)
        if hidden.ndim != 3 or self.hidden is not None:
            what = "is called twice" if self.hidden is not None else f"is given hidden states {tuple(hidden.shape)}"
            raise TypeError(f"model's head must be called once, with hidden states (B, T, H), but it {what}")
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))  # as the head's own product would
        self.__dict__["hidden"] = hidden
        return self.numbers


# a patched model is asked for its own logits: it generates, or its head is left out already
_UNPATCHED: ContextVar[bool] = ContextVar("unpatched", default=False)


@contextmanager
def _unpatched() -> Iterator[None]:
    token = _UNPATCHED.set(True)
    try:
        yield
    finally:
        _UNPATCHED.reset(token)


def _tapped(base: PreTrainedModel, forward: Callable[[], Any]) -> tuple[Any, Tensor]:
    """What a forward returns with numbers in place of logits, and what its head was given."""
    with _lock(base):
        place = _find(base)
        transform = place.transform
        rows = getattr(place.head, "out_features", base.config.get_text_config().vocab_size)
        # on the CPU, so that nothing waits for a device
        numbers = torch.linspace(-100.0, 100.0, rows, dtype=torch.float32, device="cpu")[None, None]
        some = slice(None, None, -(-rows // 16))
        kept = numbers[..., : transform.rows].shape
        expected = transform.of(numbers[..., : transform.rows][..., some])
        tap = _Tap(place.head, numbers)
        place.caller._modules[place.name] = tap
        try:
            with _unpatched():
                output = forward()
        finally:
            place.caller._modules[place.name] = place.head
    name = type(place.caller).__name__
    if tap.hidden is None:
        raise TypeError(f"the forward of {name} does not call its head: no hidden states can be taken from there")
    found = _logits(output)
    if found.shape != kept or not torch.allclose(found[..., some].float().cpu(), expected, rtol=1e-2):
        raise RuntimeError(
            f"{name} of transformers makes other logits of the outputs of its head than is known here, {transform}: "
            "make the head yourself, fused_gopd.LinearHead(hidden, weight, logit_scale=..., softcap=...), and report "
            "the version of transformers"
        )
    return output, tap.hidden


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _is_prompt_learning(model: Any) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def position_ids_of(model: Any, attention_mask: Tensor | None) -> Tensor | None:
    """(B, T) positions counted from the first token that the mask (B, T) has, as ``generate`` gives them to a model.

    None where ``generate`` gives none, or others: the forward takes no ``position_ids``, the family makes its own (the
    three axes of an image's positions), or PEFT puts virtual tokens before the sequence.
    """
    if attention_mask is None or attention_mask.ndim != 2 or _is_prompt_learning(model):
        return None
    kind, name = type(_causal_lm(model)), "_prepare_position_ids_for_generation"
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
    """What the head of a causal language model is given: ``head_of(model, hidden)`` stands for its logits.

    The model's own forward runs, with adapters, images and whatever else it takes, up to its head; there is no
    [tokens, vocabulary] tensor. Without gradients (``torch.no_grad``) it is an evaluation: dropout is off, in whatever
    mode the model is, and every module's mode is put back.

    Args:
        model: a causal language model of transformers, multimodal or not, or a PEFT model of one. The model inside of
            DDP, FSDP and DeepSpeed wrappers, called in :func:`fused_gopd.distributed.in_forward`.
        input_ids: (B, T); None with ``inputs_embeds``.
        attention_mask: (B, T), padding on either side. ``position_ids`` are made from it where ``generate`` makes them,
            so that a sequence has the positions at which it was sampled (families that learn positions, as GPT-2).
        keep: only the states that predict the last ``keep`` tokens, positions T - keep - 1 to T - 2: what the loss
            takes for a completion of so many tokens.
        **inputs: whatever else the forward takes: ``position_ids``, ``pixel_values``, ... ``use_cache`` is False unless
            given. Not ``labels`` or ``logits_to_keep``.

    Returns:
        (B, T, H), (B, keep, H) with ``keep``, in the dtype that the head computes in (autocast's, under autocast).

    Raises:
        TypeError, ValueError: as :func:`head_of`; an argument that must not be given; ``keep`` that is not below T.
        RuntimeError: what the model does to its head's outputs is not what :func:`head_of` knows of its family.
    """
    for name, instead in (("labels", "sft_labels of gopd_loss"), ("logits_to_keep", "keep")):
        if inputs.get(name) is not None:
            raise TypeError(f"{name} is no input here, where no logits are made: use {instead}")
    if _is_compiled(model):
        warnings.warn(
            "model is compiled as a whole, and runs without that here, where its head is left out: compile the body or "
            "its layers in place, model.model.compile()",
            stacklevel=2,
        )
    model = _uncompiled(model)
    base = _causal_lm(model)
    prefix = getattr(base.config.get_text_config(), "use_bidirectional_attention", None) in (True, "all")
    if prefix and inputs.get("token_type_ids") is None:
        raise ValueError(
            f"token_type_ids must be given: without them {type(base).__name__} takes all tokens for its prefix, and "
            "predicts each from those after it"
        )
    accepted = inspect.signature(type(base).forward).parameters
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs.setdefault("use_cache", False)
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if inputs.get("position_ids") is None and inputs.get("past_key_values") is None:
        positions = position_ids_of(model, attention_mask)
        if positions is not None:
            inputs["position_ids"] = positions
    try:
        with _lock(base), nullcontext() if torch.is_grad_enabled() else evaluation(model):
            _, hidden = _tapped(base, lambda: model.forward(input_ids=input_ids, **inputs))
    except RuntimeError as error:
        if "DTensor" in str(error) and any(_is(x, "torch.distributed.fsdp", "FSDPModule") for x in (model, base)):
            raise RuntimeError(
                "model is sharded by FSDP2, whose parameters are gathered in its forward alone: call last_hidden_state "
                "in fused_gopd.distributed.in_forward(model, ...)"
            ) from error
        raise
    if _is_prompt_learning(model) and input_ids is not None:
        hidden = hidden[:, -input_ids.shape[1] :]  # without the virtual tokens before them
    if keep is None:
        return hidden
    tokens = hidden.shape[1]
    if require_count("keep", keep) >= tokens:
        raise ValueError(
            f"keep must be below the number of tokens {tokens}: nothing predicts the first one, got {keep}"
        )
    return hidden[:, tokens - keep - 1 : tokens - 1]


# --------------------------------------------------------------------------------- heads in the place of logits


class _Method:
    """A function in the place of a method of one instance, which a copy of the instance must not have."""

    def __init__(self, function: Callable[..., Any], original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # signatures are read from it
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a model under patch_lm_head cannot be copied or pickled: undo the patch first")


class PatchedLMHead:
    """What :func:`patch_lm_head` returns; a context manager that undoes the patch at its end."""

    def __init__(self, model: PreTrainedModel, training_only: bool) -> None:
        self._model, self._training_only, self._active = model, training_only, True
        self._originals: dict[str, Callable[..., Any]] = {
            name: getattr(model, name) for name in ("forward", "generate")
        }
        self._own = {name: vars(model)[name] for name in self._originals if name in vars(model)}
        self._methods = {
            name: _Method(function, self._originals[name])
            for name, function in (("forward", self._forward), ("generate", self._generate))
        }
        vars(model).update(self._methods)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        original = self._originals["forward"]
        labels = inspect.signature(original).bind_partial(*args, **kwargs).arguments.get("labels")
        wanted = self._active and (self._model.training or not self._training_only)
        if not wanted or labels is not None or _UNPATCHED.get():
            return original(*args, **kwargs)
        output, hidden = _tapped(self._model, lambda: original(*args, **kwargs))
        head = head_of(self._model, hidden)
        if not hasattr(output, "logits"):
            return (head, *output[1:])
        output.logits = head
        return output

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with _unpatched():
            return self._originals["generate"](*args, **kwargs)

    def undo(self) -> None:
        """Give the model its own methods back; a second call does nothing."""
        self._active = False  # for whoever has wrapped the patched forward in the meantime
        for name, method in self._methods.items():
            if vars(self._model).get(name) is method:
                del vars(self._model)[name]
                if name in self._own:
                    vars(self._model)[name] = self._own[name]

    remove = undo

    def __enter__(self) -> PatchedLMHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_lm_head(model: Any, *, training_only: bool = True) -> PatchedLMHead:
    """Have ``model(**inputs).logits`` be the head on its hidden states, for trainers that see nothing else.

    Until it is undone, a call without ``labels`` in training mode returns a :class:`fused_gopd.LinearHead` there, which
    the loss takes as it is, after ``[:, :-1]`` for the shift. ``generate``, calls with labels and calls in eval mode
    give logits as ever. Only this instance is changed, its class is not.

        with patch_lm_head(model):
            student = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            fg.gopd_loss(student, teacher, ref, ids[:, 1:]).loss.backward()

    Args:
        model: as in :func:`head_of`; a ``DistributedDataParallel`` of it too, whose forward reduces its gradients.
        training_only: False patches eval mode too, as for a teacher.

    Returns:
        A handle with ``undo()`` (also ``remove()``), to be used as a context manager or not.

    Raises:
        TypeError: a model that shards its parameters (FSDP, ZeRO-3), which frees the head's weight before a loss could
            use it; one that is compiled as a whole; what :func:`head_of` raises.
        RuntimeError: the model is patched already.
    """
    while _is(model, "torch.nn.parallel", "DistributedDataParallel"):
        model = model.module
    if _is_compiled(model):
        raise TypeError("model is compiled as a whole, its head included: compile the body, model.model.compile()")
    place = _find(model)
    sharded = any(is_dtensor(p) or hasattr(p, "ds_id") for p in place.head.parameters())
    if sharded and not place.model.tp_size:
        raise TypeError(
            "model shards its parameters, and frees the head's weight before a loss outside of its forward can use it: "
            "call last_hidden_state and head_of in fused_gopd.distributed.in_forward in place of patch_lm_head"
        )
    _effective(place.head)  # what the loss could not take is an error here, not in the first step
    place.transform  # noqa: B018
    if isinstance(vars(place.model).get("forward"), _Method):
        raise RuntimeError("model is patched already: undo the first patch_lm_head before another")
    return PatchedLMHead(place.model, training_only)
