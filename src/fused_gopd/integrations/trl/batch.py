"""A batch of completions, and parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...heads import LinearHead, Source, TokenLogProbs, TopKLogProbs

# what a batch of TRL's has for multimodal models, by the names that the models' forward has
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
class Batch:
    """Completions as TRL pads them: prompts on the left, completions on the right."""

    input_ids: Tensor  # (B, P + K)
    attention_mask: Tensor  # (B, P + K)
    token_ids: Tensor  # (B, K)
    completion_mask: Tensor  # (B, K)
    mask: Tensor  # (B, K), without the tokens of tools
    multimodal: dict[str, Any]
    teacher_index: Tensor | None  # (B,) on the CPU
    old_logprobs: Tensor | None  # (B, K)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Batch:
        completion_mask = inputs["completion_mask"]
        return cls(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            inputs["completion_ids"],
            completion_mask,
            completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask,
            {name: inputs[name] for name in _MULTIMODAL if inputs.get(name) is not None},
            inputs.get("teacher_index"),
            inputs.get("old_logprobs"),
        )

    def take(self, rows: Tensor | slice) -> Batch:
        """Some sequences; not of multimodal batches, whose images are not one a sequence."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: x[rows] for name, x in own.items() if isinstance(x, Tensor)}
        return replace(self, **taken)

    def split(self, size: int) -> Iterator[Batch]:
        if self.multimodal:
            yield self
            return
        for start in range(0, len(self.token_ids), size):
            yield self.take(slice(start, start + size))


def spread(source: Source, rows: Tensor, n: int) -> Source:
    """What was scored for some sequences at their places among n."""

    def put(x: Tensor, empty: int) -> Tensor:
        whole = x.new_full((n, *x.shape[1:]), empty)
        whole[rows.to(x.device)] = x[: len(rows)]
        return whole

    if isinstance(source, LinearHead):
        return replace(source, hidden=put(source.hidden, 0))
    if isinstance(source, TopKLogProbs):
        return TopKLogProbs(put(source.token_ids, -1), put(source.logprobs, 0))
    if isinstance(source, TokenLogProbs):
        return TokenLogProbs(put(source.logprobs, 0))
    return replace(source, logits=put(source.logits, 0))
