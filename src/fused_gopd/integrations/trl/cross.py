"""Teachers and references with tokenizers of their own: what they read of a batch, and their scores of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ... import token_logprobs
from ...heads import LinearHead, Logits, TokenLogProbs, TopKLogProbs
from ...targets import Frozen
from ...vocab_maps import tokens_of_rows
from ..tokenizers import Alignment, TokenizerPair
from .batch import Batch


def as_batch(aligned: Alignment) -> Batch:
    """What the other model scores: its own prompts and completions."""
    return Batch(
        input_ids=aligned.input_ids,
        attention_mask=aligned.attention_mask,
        token_ids=aligned.token_ids,
        completion_mask=aligned.completion_mask,
        mask=aligned.completion_mask,
        multimodal={},
        teacher_index=None,
        old_logprobs=None,
    )


class CrossTokenizer:
    """The frozen models of a trainer whose tokenizers are not the student's, by the names that messages use.

    Args:
        pairs: the student's tokenizer and that of a model, by the model's name.
        size: the student's vocabulary.
        options: of the loss.
        credit: of :meth:`Alignment.sampled`.
    """

    def __init__(self, pairs: Mapping[str, TokenizerPair], size: int, options: Mapping[str, Any], credit: Any) -> None:
        self.pairs = pairs
        self._size, self._options, self._credit = size, options, credit
        self._maps: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def sampled(self) -> bool:
        return bool(self._options["estimator"] == "sampled")

    def align(
        self, prompts: Mapping[str, Sequence[Any]], token_ids: Tensor, mask: Tensor, scored: Mapping[str, Tensor]
    ) -> tuple[dict[str, Alignment], Tensor]:
        """Align a batch.

        Args:
            prompts: for each name B texts or lists of messages.
            token_ids, mask: (B, K) the student's completions.
            scored: for each name the sequences (B,) bool that the model scores.

        Returns:
            The alignments by name, and (B, K) the mask without tokens that a model cannot score.
        """
        completions = live = mask.bool()
        found = {}
        for name, pair in self.pairs.items():
            rows = scored[name].to(live.device)[:, None]
            # whole completions: what another model cannot score is still part of the text
            found[name] = aligned = pair.align(prompts[name], token_ids, completions & rows)
            live = live & (~rows | self._usable(name, aligned, token_ids))
        return found, live.to(mask.dtype)

    def _usable(self, name: str, aligned: Alignment, token_ids: Tensor) -> Tensor:
        """(B, K) bool, the tokens at which the model's scores are compared with the student's.

        ``full`` compares p/p(C) over the common vocabulary C, whatever p(C) is. In the divergence over all tokens that
        part has the weight p(C) (chain rule). A token sampled from p is in C with that probability, so that the others
        are left out.
        """
        if self.sampled:
            return aligned.mask
        return aligned.state_mask & (self._map(name, token_ids.device) >= 0)[token_ids]

    def carry(self, name: str, scored: Frozen, aligned: Alignment, old_logprobs: Tensor | None) -> Frozen:
        """The scores of a model's own tokens, at the student's."""
        if self.sampled:
            if isinstance(scored, (LinearHead, Logits)):
                options = {key: self._options[key] for key in ("chunk_size", "backend") if key in self._options}
                own = token_logprobs(scored, aligned.token_ids, mask=aligned.completion_mask, **options)
                scored = TokenLogProbs(cast("Tensor", own))
            if isinstance(scored, TokenLogProbs):
                return aligned.sampled(scored.logprobs, old_logprobs, credit=self._credit)
        elif isinstance(scored, LinearHead):
            return replace(
                scored, hidden=aligned.gather(scored.hidden), vocab_map=self._map(name, scored.weight.device)
            )
        elif isinstance(scored, TopKLogProbs):
            return self._translated(name, scored, aligned)
        raise TypeError(
            f"{name} has a tokenizer of its own and returned {type(scored).__name__}, which has no place among the "
            f"student's tokens with estimator={self._options['estimator']!r}: sampled takes TokenLogProbs, topk "
            "TopKLogProbs, and all of them LinearHead"
        )

    def _map(self, name: str, device: torch.device) -> Tensor:
        """(V,) int64 the model's id of each of the student's tokens."""
        if (name, device) not in self._maps:
            self._maps[name, device] = self.pairs[name].vocab_map(self._size).to(device)
        return self._maps[name, device]

    def _translated(self, name: str, scored: TopKLogProbs, aligned: Alignment) -> TopKLogProbs:
        """Lists of tokens with the student's ids; those that the student does not have are in the rest."""
        vocab_map = self._map(name, scored.token_ids.device)
        ours = tokens_of_rows(vocab_map, int(max(vocab_map.max(), scored.token_ids.max())) + 1)
        theirs = aligned.gather(scored.token_ids)
        ids = torch.where(theirs >= 0, ours[theirs.clamp(min=0)], -1)
        return TopKLogProbs(ids, aligned.gather(scored.logprobs))
