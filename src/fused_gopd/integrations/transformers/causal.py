"""Which models are supported, and where their head is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from ...hooks import HEAD_FIX, isinstance_if_imported, require_no_hooks

# wrappers that reduce gradients or gather parameters in hooks around their own forward
_WRAPPERS = (
    *(("torch.nn.parallel", "DistributedDataParallel"), ("torch.nn", "DataParallel")),
    *(("torch.distributed.fsdp", "FullyShardedDataParallel"), ("deepspeed", "DeepSpeedEngine")),
)


def _why_not_causal(config: Any) -> str | None:
    """Why a model's states depend on later tokens, so that it is no causal model; None if they do not."""
    if config.model_type in ("xlnet", "cpmant"):
        return f"{config.model_type} does so whatever its config"
    # GPT-NeoX has the attribute too, but does not read it
    if not getattr(config, "is_decoder", True) and not config.model_type.startswith("gpt_neox"):
        return "load it with is_decoder=True"
    if config.model_type == "xlm" and not config.causal:
        return "load it with causal=True"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its config has use_bidirectional_attention"
    return None


def require_prefix(base: PreTrainedModel, token_type_ids: Any) -> None:
    """Raise for a prefix language model without ``token_type_ids``: it would treat all tokens as the prefix."""
    prefix = getattr(base.config.get_text_config(), "use_bidirectional_attention", None) in (True, "all")
    if prefix and token_type_ids is None:
        raise ValueError(
            f"token_type_ids must be given (the processor makes them): without them {type(base).__name__} "
            "takes all tokens for its prefix, and predicts each from those after it"
        )


def is_compiled(model: Any) -> bool:
    """Whether the whole model is compiled, by torch.compile(model) or model.compile()."""
    return uncompiled(model) is not model or getattr(model, "_compiled_call_impl", None) is not None


def uncompiled(model: Any) -> Any:
    """The module inside torch.compile(model); other models as they are."""
    whole = isinstance_if_imported(model, "torch._dynamo.eval_frame", "OptimizedModule")
    return model._orig_mod if whole else model


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model; raises for other models, and for those that are not causal."""
    for library, name in _WRAPPERS:
        if isinstance_if_imported(model, library, name):
            raise TypeError(
                f"model must be the model inside the wrapper, got {name}: pass model.module, inside of "
                "fused_gopd.distributed.in_forward(wrapper, ...), so that the wrapper's hooks run (docs/parallelism.md)"
            )
    base = model
    if isinstance_if_imported(model, "peft", "PeftModel"):
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
    reason = _why_not_causal(config)
    if reason is not None:
        raise ValueError(f"model must be causal; {name} predicts a token from those after it, too: {reason}")
    # last_hidden_state calls model.forward, which runs no hooks, so that those of a wrapper do not run twice
    require_no_hooks("model", [model] if model is base else [model, base], HEAD_FIX)
    return base


@dataclass(frozen=True)
class HeadLocation:
    """A head, and the chain of modules from the model to the one whose forward calls it."""

    model: PreTrainedModel
    path: tuple[nn.Module, ...]  # from the model itself to the caller of the head
    name: str  # of the head in its caller
    head: nn.Module

    @property
    def caller(self) -> nn.Module:
        """The module whose forward calls the head."""
        return self.path[-1]

    @property
    def vocab_size(self) -> int:
        """Outputs of the head."""
        size: int = getattr(self.head, "out_features", self.model.config.get_text_config().vocab_size)
        return size


def find_head(model: Any) -> HeadLocation:
    """Locate the output embedding of a causal language model; raises if it has none, or hooks."""
    base = causal_lm(uncompiled(model))
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or isinstance(head, (nn.ModuleList, nn.ModuleDict)):
        what = "no output embedding" if head is None else f"{len(head)} of them"
        raise TypeError(
            f"model must have one output embedding (get_output_embeddings); {type(base).__name__} has {what}"
        )
    require_no_hooks("the head", head.modules(), HEAD_FIX)
    for prefix, caller in base.named_modules():
        for name, child in caller._modules.items():
            if child is not None and child is head:
                path: list[nn.Module] = [base]
                for part in prefix.split(".") if prefix else ():
                    path.append(path[-1]._modules[part])  # type: ignore[arg-type]
                return HeadLocation(base, tuple(path), name, head)
    raise TypeError(
        f"model's output embedding is no module of {type(base).__name__}: it cannot be found in its forward"
    )


# ------------------------------------------------------------------------------------------------------------- threads

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock(model: nn.Module) -> threading.RLock:
    """The lock of a model. A thread that replaces its head holds it; calls of other threads still use the real head."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


# True while a patched model must return logits: it generates, or its head is replaced already
UNPATCHED: ContextVar[bool] = ContextVar("unpatched", default=False)


@contextmanager
def unpatched() -> Iterator[None]:
    """Have patched models return logits."""
    token = UNPATCHED.set(True)
    try:
        yield
    finally:
        UNPATCHED.reset(token)
