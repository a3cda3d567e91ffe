"""The loss call that is planned: its sizes, how it is spread over ranks, and the chunks that the loss will choose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fused_gopd.options import Estimator, Support

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class PlannedCall:
    """One loss call with gradients for the student's hidden states and head, of all ranks together."""

    tokens: int  # N
    vocab: int  # V, joint
    hidden: int  # student
    teacher_hidden: int
    ref_hidden: int
    teacher_models: int = 1  # of which the teacher is made (LogLinear, Mixture), of one hidden size
    ref_models: int = 1
    dtype: str = "bfloat16"
    estimator: Estimator = "full"
    reward_scale: float = 1.25
    device: str = "gpu"
    divergence: str = "reverse_kl"
    k: int | None = None  # of topk
    support: Support = "teacher"
    low_chunks: bool = False  # logits of a chunk in the model's dtype
    tp: int = 1  # ranks that share the vocabulary
    dp: int = 1  # ranks that share the sequences
    cp: int = 1  # ranks that share each sequence

    @property
    def element(self) -> int:
        """Bytes of one number in the model's dtype."""
        return BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of one number in the accumulation dtype."""
        return max(4, self.element)

    @property
    def logit(self) -> int:
        """Bytes of one logit of a chunk."""
        return self.element if self.low_chunks else self.wide

    @property
    def needed(self) -> dict[str, int]:
        """Hidden size of each model that the objective needs: lambda cancels the reference at 1, the teacher at 0."""
        models = {"student": self.hidden}
        if self.reward_scale != 0:
            models["teacher"] = self.teacher_hidden
        if self.reward_scale != 1:
            models["ref"] = self.ref_hidden
        return models

    @property
    def parts(self) -> dict[str, int]:
        """Number of models that each needed one is made of."""
        made = {"student": 1, "teacher": self.teacher_models, "ref": self.ref_models}
        return {name: made[name] for name in self.needed}

    @property
    def has_composite(self) -> bool:
        return max(self.parts.values()) > 1

    @property
    def widths(self) -> int:
        """Sum of the hidden sizes of all models."""
        return sum(width * self.parts[name] for name, width in self.needed.items())

    @property
    def share(self) -> PlannedCall:
        """The call of the busiest rank: ceil(tokens / ranks) tokens, with its rows of the heads."""
        tokens, vocab = -(-self.tokens // (self.dp * self.cp)), -(-self.vocab // self.tp)
        return replace(self, tokens=tokens, vocab=vocab, tp=1, dp=1, cp=1)

    @property
    def device_type(self) -> str:
        """PyTorch's name of the device."""
        return "cuda" if self.device == "gpu" else "cpu"

    # The sizes below come from the functions that the loss itself calls.

    @property
    def buffers(self) -> float:
        """Number of [C, V] logits buffers alive at once."""
        from fused_gopd.loop.chunking import logits_buffers

        joint = self.estimator == "full"
        two = self.support == "student" or (self.has_composite and self.estimator == "topk")
        return logits_buffers(joint, self._joint_buffers, two, device_type=self.device_type)

    @property
    def _joint_buffers(self) -> int:
        """Logits buffers of ``full``: of each model, and one of the models of which a teacher or reference is made."""
        return len(self.needed) + self.has_composite

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk, C."""
        from fused_gopd.loop.chunking import chunk_size_for

        return chunk_size_for(self.vocab, self.buffers, self.device_type, self.logit)

    @property
    def largest_chunk(self) -> int:
        """Tokens of the largest chunk: chunks have nearly equal sizes of at most C."""
        from fused_gopd.loop.chunking import balanced

        return balanced(self.tokens, self.chunk_size, self.device_type)

    @property
    def largest_subchunk(self) -> int:
        """Tokens for which the logits of all models exist at once, in the largest chunk."""
        from fused_gopd.loop.chunking import frozen_chunk_size

        rows = self.largest_chunk
        return min(rows, frozen_chunk_size(self.chunk_size, self.device_type)) if self.estimator == "full" else rows

    @property
    def buffer_rows(self) -> int:
        """Rows of all logits buffers together."""
        if self.estimator == "full":
            return self.largest_chunk + (self._joint_buffers - 1) * self.largest_subchunk
        # of models whose sum does not choose the tokens of topk one buffer holds each in turn
        sum_chooses = self.parts.get("teacher", self.parts.get("ref", 1)) > 1
        return (int(self.buffers) if self.support == "student" or sum_chooses else 1) * self.largest_chunk
