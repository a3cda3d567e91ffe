"""Teachers and reference: what a trainer is given for them, and what they are once they are set up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...targets import Frozen
from ...token_stats import AdvantageFn, RewardScaleFn
from ..cache import StoredStates
from ..tokenizers import TokenizerPair

if TYPE_CHECKING:
    from .batch import Batch

Scorer = Callable[..., Frozen]
"""A function that scores: ``(input_ids, attention_mask, completion_mask)`` to log-probs or a head of hidden states.

Ids and mask are (B, P + K), prompts padded on the left and completions on the right. The completion mask and the token
shape of the result, a TokenLogProbs, TopKLogProbs or LinearHead, are (B, K). With ``support="student"`` a scorer that
takes a fourth argument gets ``token_ids`` (B, K, k), the student's likeliest tokens, and returns TopKLogProbs of these.
"""
Model = str | nn.Module | Scorer
"""A path or hub name of a model, or "adapter:" and that of an adapter on the student's base; "student" or "base", the
student itself or without its adapter; a model; a scorer."""

Prompt = str | list[dict[str, Any]]
PromptFn = Callable[[dict[str, Any]], Prompt] | Callable[[dict[str, Any], str], Prompt]
"""A function of a row of the dataset that returns a text or a list of messages. It gets a copy of the row.

One that needs a second argument gets the answer that is scored, as a text without special tokens.
"""

TEACHER, REF = "teacher", "ref"
"""The roles of frozen models; the argument for what one reads in place of the student's prompt is ``ROLE_prompt``."""
REF_MODEL = "ref_model"
"""What messages call the reference: the trainers' argument."""


def teacher_name(route: Any) -> str:
    """What messages call the teacher of a route; the single teacher has the route None."""
    return "teacher" if route is None else f"teacher[{route!r}]"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What both trainers add to TRL's arguments, as it was given."""

    teacher: Model | Mapping[Any, Model] | None = None
    ref_model: Model | None = None
    reward_scale_fn: Callable[[int], float | RewardScaleFn] | None = None
    advantage_fn: AdvantageFn | None = None
    teacher_prompt: PromptFn | Mapping[Any, PromptFn] | None = None
    ref_prompt: PromptFn | Mapping[Any, PromptFn] | None = None
    teacher_processing_class: Any = None

    def routes(self, column: str | None) -> dict[Any, Model]:
        """The teachers by route, which the column of the dataset names; a single teacher has the route None."""
        if self.teacher is None:
            raise TypeError("teacher must be given: a model, its path, a scorer, or a dict from route to one of these")
        if not isinstance(self.teacher, Mapping):
            if column is not None:
                raise TypeError(
                    f"route_column={column!r} needs a dict of teachers, one for each route, got one teacher"
                )
            return {None: self.teacher}
        if not self.teacher:
            raise ValueError("teacher must have one route at least, got an empty dict")
        if column is None:
            routes = ", ".join(map(repr, self.teacher))
            raise ValueError(f"a dict of teachers ({routes}) needs route_column, the column that names them, in args")
        return dict(self.teacher)


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """A teacher, or the reference, that is set up.

    Attributes:
        name: what messages call it.
        index: of a teacher's route; None of the reference.
        model: a module as the accelerator has prepared it; ``"base"`` or ``"student"``, which the student's own modules
            compute; or a scorer.
        of_student: whether it is made of the student.
        vocab_size: tokens of the student that it scores; None where that is not known, or where ``pair`` says it.
        positions: the longest sequence that it supports; None where that is not limited, or not known.
        pair: the student's tokenizer and its own, where that is another one.
        stored: the cache of its hidden states.
    """

    name: str
    index: int | None
    model: Any
    of_student: bool = False
    vocab_size: int | None = None
    positions: int | None = None
    pair: TokenizerPair | None = None
    stored: StoredStates | None = None

    @property
    def role(self) -> str:
        return REF if self.index is None else TEACHER

    def rows_of(self, batch: Batch) -> Tensor:
        """The sequences (B,) bool of a batch that it scores, on the CPU."""
        if self.index is None or batch.teacher_index is None:
            return torch.ones(len(batch.token_ids), dtype=torch.bool)
        return batch.teacher_index == self.index
