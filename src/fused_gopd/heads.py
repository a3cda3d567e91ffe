"""What a model brings to the loss: hidden states with a head, logits, or log-probs computed elsewhere.

Each type checks its own fields when it is made, so that a mistake is reported where it was written. Checks that need
several models (shapes, devices, vocabularies) are in :mod:`fused_gopd.prepare`.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import printing, shards
from .checks import require_float, require_integer
from .shards import VocabShard
from .vocab_maps import refuse_vocab_map, require_vocab_map


def _require_transform(logit_scale: float, softcap: float | None, temperature: float) -> None:
    for name, number in (("logit_scale", logit_scale), ("temperature", temperature), ("softcap", softcap)):
        if number is None and name == "softcap":
            continue
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"{name} must be a Python float, got {type(number).__name__}")
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if logit_scale <= 0:
        raise ValueError(f"logit_scale must be positive, got {logit_scale}")


def _require_shard(name: str, shard: object, rows: int) -> None:
    if shard is None:
        return
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a fused_gopd.VocabShard or None, got {type(shard).__name__}")
    if rows < shard.count:
        raise ValueError(
            f"{name} must hold the {shard.count} rows [{shard.start}, {shard.stop}) of its shard (more are padding), "
            f"got {rows}"
        )


def _require_token_index(index: Any, ndim: int) -> None:
    """An index of (..., V) logits of ``ndim`` dimensions that keeps all of the last one, and keeps it the last one."""
    parts = index if isinstance(index, tuple) else (index,)

    def dimensions(part: Any) -> int:
        if part is None or part is Ellipsis or isinstance(part, bool):
            return 0
        return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1

    ellipsis = [i for i, part in enumerate(parts) if part is Ellipsis]
    to_the_last = ellipsis[-1] < len(parts) - 1 if ellipsis else sum(map(dimensions, parts)) >= ndim
    if to_the_last and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        raise IndexError(
            f"LinearHead is indexed by tokens, as logits (..., V) of which all V are kept: head[:, :-1]; got {index}. "
            "It has no logits: log-probs of tokens are fused_gopd.token_logprobs(head, token_ids)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class LinearHead:
    """Hidden states and the language-model head that turns them into logits.

    ``z = cap(logit_scale * (hidden @ weight.T + bias)) / temperature`` with ``cap(x) = softcap * tanh(x / softcap)``.

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64. As the student, gradients flow to it.
        weight: (V, H), dtype and device of hidden. As the student, gradients flow to it if it requires them. Beside
            bfloat16 or float16 hidden states it may be float32, as autocast leaves master weights: the products take
            it rounded to the dtype of hidden (a copy for as long as they last), as autocast's do, and its gradient
            stays float32, never rounded.
        bias: (V,) or None, any floating dtype; trainable as the student's.
        logit_scale: factor on the logits before the softcap (Cohere, Granite and others have one).
        softcap: Gemma-style final logit softcapping, or None.
        temperature: the sampling temperature; all log-probs are those of the tempered distribution.
        shard: the part of a vocabulary-parallel head that ``weight`` and ``bias`` are; see
            :class:`fused_gopd.VocabShard`. A DTensor weight with placement ``Shard(0)`` brings its own.
        vocab_map: (V_student,) int64, for a teacher or reference with another vocabulary than the student's: the row of
            ``weight`` that is each token of the student, -1 where there is none; no row twice. See the page on targets.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was found.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    shard: VocabShard | None = None
    vocab_map: Tensor | None = None

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        shard: VocabShard | None = None,
        vocab_map: Tensor | None = None,
    ) -> None:
        hidden, weight, bias, shard = shards.from_dtensors(hidden, weight, bias, shard)
        require_float("hidden", hidden)
        require_float("weight", weight)
        if hidden.ndim < 1:
            raise ValueError(f"hidden must have shape (..., H), got a scalar of shape {tuple(hidden.shape)}")
        if weight.ndim != 2:
            raise ValueError(f"weight must have shape (V, H), got {tuple(weight.shape)}")
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"hidden and weight must agree in H: hidden is {tuple(hidden.shape)}, weight is {tuple(weight.shape)}"
            )
        _require_shard("weight", shard, weight.shape[0])
        if weight.shape[0] == 0 and shard is None:
            raise ValueError(f"weight must have at least one row (V >= 1), got {tuple(weight.shape)}")
        master = weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16)
        if hidden.dtype != weight.dtype and not master:
            raise TypeError(
                "hidden and weight must have one dtype (or float32 weight beside bfloat16 or float16 hidden), got "
                f"{hidden.dtype} and {weight.dtype}; hidden.to(weight.dtype) is what autocast would do"
            )
        if hidden.device != weight.device:
            raise ValueError(f"hidden and weight must be on one device, got {hidden.device} and {weight.device}")
        if bias is not None:
            require_float("bias", bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"bias must have shape ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")
            if bias.device != weight.device:
                raise ValueError(f"bias must be on weight's device {weight.device}, got {bias.device}")
        if vocab_map is not None:
            require_vocab_map(vocab_map, shard is not None, weight.device)
        _require_transform(logit_scale, softcap, temperature)
        for name, value in (
            ("hidden", hidden),
            ("weight", weight),
            ("bias", bias),
            ("logit_scale", float(logit_scale)),
            ("softcap", None if softcap is None else float(softcap)),
            ("temperature", float(temperature)),
            ("shard", shard),
            ("vocab_map", vocab_map),
        ):
            object.__setattr__(self, name, value)

    def __getitem__(self, index: Any) -> LinearHead:
        """The head on some of the tokens, indexed as (..., V) logits would be: ``head[:, :-1]``."""
        _require_token_index(index, self.hidden.ndim)
        return replace(self, hidden=self.hidden[index])

    @property
    def rows(self) -> Tensor:
        """What has one row per token."""
        return self.hidden

    @property
    def token_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def vocab_size(self) -> int:
        """Of all ranks that share it; with a ``vocab_map`` the student's."""
        if self.vocab_map is not None:
            return self.vocab_map.shape[0]
        return self.weight.shape[0] if self.shard is None else self.shard.vocab_size

    @property
    def own_size(self) -> int:
        """How many logits a token has here, whatever they are mapped to."""
        return self.weight.shape[0]

    def part(self, shard: VocabShard) -> LinearHead:
        """The columns of a whole head that a shard holds; no copy."""
        columns = slice(shard.start, shard.stop)
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, weight=self.weight[columns], bias=bias, shard=shard)

    def __repr__(self) -> str:
        return printing.lines(self, values=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight}
        named = named if self.bias is None else {**named, "bias": self.bias}
        return named if self.vocab_map is None else {**named, "vocab_map": self.vocab_map}


@dataclass(frozen=True, eq=False, repr=False)
class Logits:
    """Logits that exist already: ``z = cap(logit_scale * logits) / temperature``.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64. As the student, gradients flow to it.
        logit_scale, softcap, temperature: as in :class:`LinearHead`.
        shard: the columns of a vocabulary-parallel head's logits that these are, or None.
        vocab_map: as in :class:`LinearHead`, the column of ``logits`` that is each token of the student.
    """

    logits: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    shard: VocabShard | None = None
    vocab_map: Tensor | None = None

    def __init__(
        self,
        logits: Tensor,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        shard: VocabShard | None = None,
        vocab_map: Tensor | None = None,
    ) -> None:
        if shards.is_dtensor(logits):
            raise TypeError("logits is a DTensor: pass logits.to_local() and the VocabShard of its columns as shard")
        require_float("logits", logits)
        if logits.ndim < 1 or (logits.shape[-1] == 0 and shard is None):
            raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
        _require_shard("logits", shard, logits.shape[-1])
        if vocab_map is not None:
            require_vocab_map(vocab_map, shard is not None, logits.device)
        _require_transform(logit_scale, softcap, temperature)
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "shard", shard)
        object.__setattr__(self, "vocab_map", vocab_map)
        object.__setattr__(self, "logit_scale", float(logit_scale))
        object.__setattr__(self, "softcap", None if softcap is None else float(softcap))
        object.__setattr__(self, "temperature", float(temperature))

    @property
    def rows(self) -> Tensor:
        """What has one row per token."""
        return self.logits

    @property
    def token_shape(self) -> torch.Size:
        return self.logits.shape[:-1]

    @property
    def vocab_size(self) -> int:
        """Of all ranks that share it; with a ``vocab_map`` the student's."""
        if self.vocab_map is not None:
            return self.vocab_map.shape[0]
        return self.logits.shape[-1] if self.shard is None else self.shard.vocab_size

    @property
    def own_size(self) -> int:
        """How many logits a token has here, whatever they are mapped to."""
        return self.logits.shape[-1]

    def part(self, shard: VocabShard) -> Logits:
        """The columns of whole logits that a shard holds; no copy."""
        return replace(self, logits=self.logits[..., shard.start : shard.stop], shard=shard)

    def __repr__(self) -> str:
        return printing.lines(self, values=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return (
            {"logits": self.logits} if self.vocab_map is None else {"logits": self.logits, "vocab_map": self.vocab_map}
        )


@dataclass(frozen=True, eq=False, repr=False)
class TokenLogProbs:
    """Log-probs of the sampled tokens, computed elsewhere; for a teacher or reference of ``estimator="sampled"``.

    Args:
        logprobs: (...) of the token shape, floating, <= 0; entries at masked positions are ignored. One that is above 0
            by more than rounding makes it (0.25) is refused by the call.
    """

    logprobs: Tensor

    def __post_init__(self) -> None:
        require_float("logprobs", self.logprobs)

    @property
    def token_shape(self) -> torch.Size:
        return self.logprobs.shape

    def __repr__(self) -> str:
        return printing.lines(self, values=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"logprobs": self.logprobs}


@dataclass(frozen=True, eq=False, repr=False)
class TopKLogProbs:
    """Some tokens of each position and their log-probs, as an inference server returns them; for ``estimator="topk"``.

    Args:
        token_ids: (..., K) integer, K >= 1, distinct at each position; -1 where there are fewer than K.
        logprobs: (..., K) floating, normalised over the whole vocabulary; the value at an id of -1 is ignored.
        sampled_logprobs: (...) floating, the log-prob of the sampled token. With ``tail="sampled"`` it is read where
            that token is not among ``token_ids``; the others report it.
    """

    token_ids: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        require_float("logprobs", self.logprobs)
        require_integer("token_ids", self.token_ids)
        if self.token_ids.shape != self.logprobs.shape:
            raise ValueError(
                f"token_ids and logprobs must have one shape (..., K), got {tuple(self.token_ids.shape)} and "
                f"{tuple(self.logprobs.shape)}"
            )
        if self.token_ids.ndim < 1 or self.token_ids.shape[-1] == 0:
            raise ValueError(f"token_ids must have shape (..., K) with K >= 1, got {tuple(self.token_ids.shape)}")
        if self.sampled_logprobs is not None:
            require_float("sampled_logprobs", self.sampled_logprobs)
            if self.sampled_logprobs.shape != self.token_shape:
                raise ValueError(
                    f"sampled_logprobs must have the token shape {tuple(self.token_shape)}, got "
                    f"{tuple(self.sampled_logprobs.shape)}"
                )

    @property
    def token_shape(self) -> torch.Size:
        return self.token_ids.shape[:-1]

    @property
    def k(self) -> int:
        return self.token_ids.shape[-1]

    def __repr__(self) -> str:
        return printing.lines(self, values=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"token_ids": self.token_ids, "logprobs": self.logprobs}
        return named if self.sampled_logprobs is None else {**named, "sampled_logprobs": self.sampled_logprobs}


def require_kind(name: str, value: object, *more: type) -> None:
    """Raise TypeError unless value is a LinearHead, Logits or one of ``more``; of a tensor it says how to wrap it."""
    kinds = (LinearHead, Logits, *more)
    if isinstance(value, kinds):
        if not more and getattr(value, "vocab_map", None) is not None:
            refuse_vocab_map(name)
        return
    *first, last = (kind.__name__ for kind in kinds)
    message = f"{name} must be a {', '.join(first)} or {last}, got {type(value).__name__}"
    if isinstance(value, Tensor):
        scores = "; log-probs of the sampled tokens: fg.TokenLogProbs(x)" if TokenLogProbs in more else ""
        message += f"; wrap it: fg.Logits(x), or from hidden states fg.LinearHead(hidden, weight){scores}"
    elif isinstance(getattr(value, "logits", None), Tensor):  # what models of transformers return
        message += "; wrap its logits: fg.Logits(x.logits)"
    elif TopKLogProbs in more:  # a teacher or reference
        message += "; several: a list of them with teacher_index, or fg.LogLinear, fg.Mixture"
    raise TypeError(message)


Head = LinearHead | Logits
Source = LinearHead | Logits | TokenLogProbs | TopKLogProbs
