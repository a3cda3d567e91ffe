"""Batches of completions, and scores of parts of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from ...heads import LinearHead, TokenLogProbs, TopKLogProbs
from ...targets import Composite, Frozen
from ..tokenizers import Alignment

if TYPE_CHECKING:
    from ...heads import Source

R = TypeVar("R")

# keys of TRL's batches that are arguments of multimodal models' forward
_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass(frozen=True)
class PromptIds:
    """Token ids and mask, both (B, P), of prompts padded on the left.

    ``lengths`` (B,), on the CPU, says how many of the last columns a prompt needs: the padding of those that are read
    together is cut without a host sync.
    """

    ids: Tensor
    mask: Tensor
    lengths: Tensor | None = None

    def cut(self) -> PromptIds:
        width = self.ids.shape[1] if self.lengths is None else int(self.lengths.max())
        return replace(self, ids=self.ids[:, -width:], mask=self.mask[:, -width:])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Completions as TRL pads them: prompts on the left, completions on the right."""

    input_ids: Tensor  # (B, P + K)
    attention_mask: Tensor  # (B, P + K)
    token_ids: Tensor  # (B, K)
    completion_mask: Tensor  # (B, K)
    mask: Tensor  # (B, K), the completion mask without tokens that tools wrote or that a model cannot score
    multimodal: dict[str, Any]
    teacher_index: Tensor | None  # (B,) on the CPU
    old_logprobs: Tensor | None  # (B, K)
    rollout_logprobs: Tensor | None = None  # (B, K) of the engine that sampled
    sft_labels: Tensor | None = None  # (B, K) of completions that the student did not sample, -100 for none
    asked_ids: Tensor | None = None  # (B, K, k) tokens that scorers are asked about
    prompts: dict[str, PromptIds] = field(default_factory=dict)  # by role, where they are not the student's
    aligned: dict[str, Alignment] = field(default_factory=dict)  # by model, for those with a tokenizer of their own

    @classmethod
    def from_trl(cls, inputs: Mapping[str, Any]) -> Batch:
        """From the dict that TRL's trainers pass around."""
        mask = completion_mask = inputs["completion_mask"]
        for name in ("tool_mask", _ALIGNED_MASK):
            mask = mask * inputs[name] if name in inputs else mask
        return cls(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            token_ids=inputs["completion_ids"],
            completion_mask=completion_mask,
            mask=mask,
            multimodal={name: inputs[name] for name in _MULTIMODAL if inputs.get(name) is not None},
            teacher_index=inputs.get("teacher_index"),
            old_logprobs=inputs.get("old_logprobs"),
            prompts=_records(_PROMPT, PromptIds, inputs),
            rollout_logprobs=inputs.get("rollout_logprobs"),
            sft_labels=inputs.get("sft_labels"),
            aligned=_records(_ALIGNED, Alignment, inputs),
        )

    def read_by(self, role: str) -> Batch:
        """The batch as the teachers (``"teacher"``) or the reference (``"ref"``) read it."""
        if role not in self.prompts:
            return self
        prompt = self.prompts[role].cut()
        return replace(
            self,
            input_ids=torch.cat([prompt.ids, self.token_ids], dim=1),
            attention_mask=torch.cat([prompt.mask, self.completion_mask], dim=1),
            prompts={},
        )

    def take(self, rows: Tensor | slice) -> Batch:
        """Select sequences. Not for multimodal batches, which may have several images per sequence."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: x[rows] for name, x in own.items() if isinstance(x, Tensor)}
        prompts = {
            role: PromptIds(x.ids[rows], x.mask[rows], None if x.lengths is None else x.lengths[rows])
            for role, x in self.prompts.items()
        }
        return replace(self, **taken, prompts=prompts, aligned={name: x.take(rows) for name, x in self.aligned.items()})

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of at most ``size`` sequences; a multimodal batch stays whole."""
        if self.multimodal:
            yield self
            return
        for start in range(0, len(self.token_ids), size):
            yield self.take(slice(start, start + size))


_PROMPT, _ALIGNED, _ALIGNED_MASK = "prompt", "aligned", "aligned_mask"


def flat_prompt(role: str, prompt: PromptIds) -> dict[str, Tensor]:
    """The prompts of a role as entries of TRL's dict of tensors."""
    return _flat(_PROMPT, {role: prompt})


def flat(aligned: Mapping[str, Alignment], mask: Tensor) -> dict[str, Tensor]:
    """Alignments, and the mask of tokens that all models can score, as entries of TRL's dict of tensors."""
    return {**_flat(_ALIGNED, aligned), _ALIGNED_MASK: mask}


def _flat(kind: str, records: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of records, by "KIND/NAME/FIELD"."""
    return {f"{kind}/{name}/{f.name}": getattr(x, f.name) for name, x in records.items() for f in fields(x)}


def _records(kind: str, made: type[R], inputs: Mapping[str, Any]) -> dict[str, R]:
    """The records of a kind by name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, x in inputs.items():
        if key.startswith(f"{kind}/"):
            name, _, part = key.removeprefix(f"{kind}/").rpartition("/")
            found.setdefault(name, {})[part] = x
    return {name: made(**parts) for name, parts in found.items()}


def spread(source: Frozen, rows: Tensor, n: int) -> Frozen:
    """Scatter scores of the sequences ``rows`` into a batch of n sequences; the others get placeholders."""

    def put(x: Tensor, empty: int) -> Tensor:
        whole = x.new_full((n, *x.shape[1:]), empty)
        whole[rows.to(x.device)] = x[: len(rows)]
        return whole

    if isinstance(source, Composite):
        weights = [put(x, 0) if isinstance(x, Tensor) and x.ndim else x for x in source.weights]
        return type(source)([cast("Source", spread(x, rows, n)) for x in source.models], weights)
    if isinstance(source, LinearHead):
        return replace(source, hidden=put(source.hidden, 0))
    if isinstance(source, TopKLogProbs):
        sampled = source.sampled_logprobs
        return TopKLogProbs(
            put(source.token_ids, -1), put(source.logprobs, 0), None if sampled is None else put(sampled, 0)
        )
    if isinstance(source, TokenLogProbs):
        return TokenLogProbs(put(source.logprobs, 0))
    return replace(source, logits=put(source.logits, 0))
