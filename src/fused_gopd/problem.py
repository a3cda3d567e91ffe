"""One checked call, flat: what the loop, the report and the backward read. Data, no mathematics.

Vectors (n,) have one entry per live token, in the order of ``rows``. Made by :mod:`fused_gopd.prepare` and
:mod:`fused_gopd.scoring`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .agreement import Agreement
from .heads import Head, Source
from .objective.divergences import Divergence
from .objective.supervised import NLL
from .options import LossOptions
from .records import record
from .rowops import RowOps
from .shards import VocabShard
from .token_stats import AdvantageFn, RewardScaleFn
from .tokens import LiveSequences, Sequences, TokenRows


@record(frozen=True, eq=False, kw_only=True)
class FlatComposite:
    """A :class:`fused_gopd.LogLinear` or :class:`fused_gopd.Mixture` of live tokens, without models of weight 0.

    Every model has a head, detached and cut to this rank's columns, or log-probs of the sampled tokens.
    """

    heads: tuple[Head | None, ...]
    logprobs: tuple[Tensor | None, ...]  # (n,)
    weights: tuple[float | Tensor, ...]  # tensor: (n,)
    mixture: bool
    shard: VocabShard | None = None  # the columns of this rank where models are taken together
    vocab_map: ClassVar[None] = None  # its heads may have one; the sum has the student's tokens

    def weights_of(self, tokens: slice) -> list[float | Tensor]:
        """Those of some of the tokens, tensors as (C,)."""
        return [weight[tokens] if isinstance(weight, Tensor) else weight for weight in self.weights]


FrozenModel = Head | FlatComposite


@record(frozen=True, eq=False, kw_only=True)
class Route:
    """The live tokens [start, stop) and the frozen models that they have.

    ``teacher`` and ``ref`` are heads with a vocabulary axis, detached and cut to this rank's columns, or made of
    several models; None where lambda cancels the model or its scores were computed elsewhere.
    """

    start: int
    stop: int
    teacher: FrozenModel | None = None
    ref: FrozenModel | None = None


@record(frozen=True, eq=False, kw_only=True)
class Problem:
    """What is computed for one call."""

    options: LossOptions  # in their normal form
    divergence: Divergence
    student: Head  # cut to this rank's columns; the only model that receives gradients
    routes: tuple[Route, ...]  # one where there is one teacher
    rows: TokenRows  # in the order of the routes
    sequences: Sequences
    mask: Tensor | None = None  # token shape, bool; None is all live
    vocab_size: int  # joint
    # tensor: (n,), in ``dtype``; None: what a reward_scale_fn has returned, in the statistics (TokenRow.REWARD_SCALE)
    reward_scale: float | Tensor | None = 1.0
    reward_scale_fn: RewardScaleFn | None = None
    has_composite: bool = False  # whether a teacher or reference that is needed is made of several models
    has: tuple[bool, bool] = (False, False)  # a teacher, a reference: heads, or log-probs of the sampled tokens
    token_ids: Tensor | None = None  # (n,) int64, the sampled tokens
    old_logprobs: Tensor | None = None  # (n,)
    rollout_logprobs: Tensor | None = None  # (n,)
    importance: Tensor | None = None  # (n,) weights from both, where the row operation does not make them
    teacher_logprobs: Tensor | None = None  # (n,) of the sampled tokens, computed elsewhere; 0 where a route has a head
    ref_logprobs: Tensor | None = None  # (n,) likewise
    support_ids: Tensor | None = None  # (n, K) int64, -1 is none; of topk, where the caller or a server gives them
    teacher_topk: Tensor | None = None  # (n, K) log-probs of support_ids; undefined at an id of -1
    ref_topk: Tensor | None = None  # (n, K) likewise
    labels: Tensor | None = None  # (n,) int64, -1 is none
    nll: NLL | None = None  # of linear_nll, which has no other loss; its labels are the token_ids
    weights: Tensor  # () or (n,), loss = sum of weights times token losses; with reduction "none" each of them
    advantage_fn: AdvantageFn | None = None
    advantages: Tensor | None = None  # (2, n) as the gradient uses them and as they are reported, where already known
    has_loss_factors: bool = False  # whether there are importance weights or ``loss_max``: of full and topk factors
    has_terms: bool = False  # whether there are terms beside the loss but for labels at the student's temperature
    slope_follows: bool = False  # whether PyTorch makes a factor of the logit gradient from the chunk's statistics
    recomputes: bool  # whether gradients are computed in the backward, from recomputed logits
    width: int = 0  # tokens that a position of topk has at most: those of its support, and a label
    reported: tuple[str, ...] = ()  # the vectors of the output that are not None
    cancelled: tuple[
        tuple[str, tuple[Source | FlatComposite, ...]], ...
    ] = ()  # "teacher" or "ref" given, not needed; one a route
    agreement: Agreement | None = None  # where ranks share a vocabulary
    ops: RowOps
    chunk_size: int
    frozen_chunk_size: int | None = None  # tokens of teacher and reference at a time where models are taken together
    dtype: torch.dtype  # of accumulation and of the outputs
    device: torch.device

    @property
    def over_sequences(self) -> LiveSequences:
        """Sums, means and extrema over the live tokens of each sequence."""
        return LiveSequences(self.rows, self.sequences)

    @property
    def joint(self) -> bool:
        """Whether the row operation takes all models of a token together, normalised over their joint support."""
        return self.options.joint
