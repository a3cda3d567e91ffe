"""What another tokenizer's model reads of a batch, and its scores at the student's tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from ...heads import TokenLogProbs
from ...targets import LogLinear
from ...values import one_of

Credit = Literal["spread", "last"]
"""Which tokens of a span get the span's log-ratio: each an equal part of it, or the last one all."""


@dataclass(frozen=True)
class Alignment:
    """What another tokenizer's model reads of a batch, and where its tokens are in the student's; made by `align`.

    K is the student's number of completion tokens, M that of the other model. A span is a stretch of bytes that begins
    and ends with a token of both, and that no boundary of both divides.
    """

    input_ids: Tensor  # (B, P + M) the other model's: its prompts padded on the left, its completions on the right
    attention_mask: Tensor  # (B, P + M)
    completion_mask: Tensor  # (B, M) 1 at its tokens that are in a span, or whose states are a student token's
    spans: Tensor  # (B, K) the span of each of the student's tokens, counted from 0 in each sequence; -1: in none
    other_spans: Tensor  # (B, M) likewise of its tokens
    states: Tensor  # (B, K) which of its M tokens begins at the byte at which the student's begins; -1: none does
    nbytes: Tensor  # (B, K) the length of each of the student's tokens

    @property
    def token_ids(self) -> Tensor:
        """(B, M) the other model's completions."""
        return self.input_ids[:, self.input_ids.shape[1] - self.other_spans.shape[1] :]

    @property
    def mask(self) -> Tensor:
        """(B, K) bool, the student's tokens in spans: those that ``sampled`` can use."""
        return self.spans >= 0

    @property
    def state_mask(self) -> Tensor:
        """(B, K) bool, the student's tokens whose prefix ends with a token of both: those for ``full`` and ``topk``."""
        return self.states >= 0

    def take(self, rows: Tensor | slice) -> Alignment:
        """Some of the sequences."""
        return Alignment(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device) -> Alignment:
        return Alignment(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def sampled(
        self, logprobs: Tensor, own_logprobs: Tensor | None = None, *, credit: Credit = "spread"
    ) -> TokenLogProbs | LogLinear:
        """The other model's scores at the student's tokens, for ``estimator="sampled"``.

        With P and Q the log-probs of a span under the student and the other model, and n the student's tokens in it, a
        token of the student has log p_t + (Q - P) w_t in the place of log q_t: w_t is 1 / n with ``credit="spread"``,
        and with ``"last"`` it is 1 at the span's last token and 0 before it. So the advantages of a span add up to
        Q - P, and all are 0 where the two models agree on it.

        Args:
            logprobs: (B, M) log-probs of its tokens (:attr:`token_ids`); read where :attr:`completion_mask` is 1.
            own_logprobs: (B, K) the student's own log-probs of its tokens, those that the loss gets as
                ``old_logprobs``. May be left out if no span has more than one of the student's tokens.
            credit: ``"spread"`` or ``"last"``.

        Returns:
            A teacher or reference of the student's token shape (B, K), for tokens where :attr:`mask` is True.
        """
        one_of("credit", credit, ("spread", "last"))
        if logprobs.shape != self.other_spans.shape:
            raise ValueError(f"logprobs must have shape {tuple(self.other_spans.shape)}, got {tuple(logprobs.shape)}")
        total = self._totals(logprobs, self.other_spans)
        if own_logprobs is None:
            if bool((self._counts() > 1).any()):
                raise ValueError(
                    "own_logprobs must be given: a span has several tokens of the student, among which its log-ratio "
                    "is divided. fg.token_logprobs(student, token_ids) without gradients, given to the loss as "
                    "old_logprobs, too"
                )
            return TokenLogProbs(total)
        if own_logprobs.shape != self.spans.shape:
            raise ValueError(f"own_logprobs must have shape {tuple(self.spans.shape)}, got {tuple(own_logprobs.shape)}")
        own = own_logprobs.detach().to(total.dtype)
        weight = self._credit(credit).to(total.dtype)
        zero = torch.zeros((), dtype=total.dtype, device=total.device)
        # a model that rules a span out (-inf) does so at the tokens that get a part of its log-ratio
        scores = [torch.where(self.mask, own, zero), torch.where(weight > 0, total, zero)]
        scores.append(torch.where(weight > 0, self._totals(own, self.spans), zero))
        return LogLinear([TokenLogProbs(x) for x in scores], [1.0, weight, -weight])

    def gather(self, hidden: Tensor) -> Tensor:
        """(B, K, H) states of the student's tokens from the other model's (B, M, H), which predict its completions.

        They are those of the same prefix in bytes; where there is none (:attr:`state_mask`), another.
        """
        if hidden.shape[:2] != self.other_spans.shape:
            raise ValueError(
                f"hidden must have shape {(*self.other_spans.shape, 'H')}: the states that predict the completions "
                f"that it reads, got {tuple(hidden.shape)}"
            )
        index = self.states.clamp(min=0)
        return hidden[torch.arange(len(index), device=hidden.device)[:, None], index]

    def counts(self, mask: Tensor, *, states: bool = False) -> dict[str, float]:
        """Of the student's tokens in ``mask`` (B, K), and of their bytes: how many there are, and how many are used.

        Args:
            states: used by ``full`` and ``topk``, in place of ``sampled``.
        """
        live = mask.bool()
        used = live & (self.state_mask if states else self.mask)
        alone = used & (self._counts() == 1)
        nbytes = self.nbytes.double()
        found = {"tokens": live.sum(), "aligned_tokens": used.sum(), "single_tokens": alone.sum()}
        found |= {"bytes": (nbytes * live).sum(), "aligned_bytes": (nbytes * used).sum()}
        return {name: float(x) for name, x in found.items()}

    def _totals(self, values: Tensor, spans: Tensor) -> Tensor:
        """(B, K) the sum of values over the span of each of the student's tokens; 0 outside of spans."""
        size = int(max(self.spans.shape[1], self.other_spans.shape[1])) + 1  # the last one collects what is in no span
        index = torch.where(spans >= 0, spans, size - 1)
        values = values.detach()
        values = torch.where(spans >= 0, values if values.dtype == torch.float64 else values.float(), 0.0)
        sums = values.new_zeros(len(values), size).scatter_add_(1, index, values)
        return torch.where(self.mask, sums.gather(1, self.spans.clamp(min=0)), 0.0)

    def _counts(self) -> Tensor:
        """(B, K) how many of the student's tokens the span of each has; 0 outside of spans."""
        return self._totals(torch.ones_like(self.spans), self.spans).long()

    def _credit(self, credit: Credit) -> Tensor:
        """(B, K) the part of its span's log-ratio that each token gets."""
        if credit == "spread":
            return torch.where(self.mask, 1.0 / self._counts().clamp(min=1), 0.0)
        after = torch.nn.functional.pad(self.spans[:, 1:], (0, 1), value=-1)
        return ((after != self.spans) & self.mask).float()
