"""The gradient of per-token losses with respect to the student's logits, [n, V], as a few numbers per token."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..records import record


class Term(NamedTuple):
    """A further term of the gradient, of a row problem of its own on the same logits."""

    statistics: Tensor  # (len(Stat), n) of that row problem
    gradient: LogitGradient

    def rows(self, tokens: slice) -> Term:
        return Term(self.statistics[:, tokens], self.gradient.rows(tokens))


@record(frozen=True, kw_only=True, eq=False)
class LogitGradient:
    """dL/dz of n tokens: ``divergence`` x (gradient of the row operation's divergence) + ``weight`` x p, except at
    ``token_ids``, where it is ``values``.

    Without ``values`` there is one id per token, at which the second term is ``weight`` (p - 1).
    """

    divergence: Tensor | None = None  # (n,)
    weight: Tensor | None = None  # (n,)
    token_ids: Tensor | None = None  # (n, K) int64, -1 for none; only the last id of a row may repeat another one
    values: Tensor | None = None  # (n, K)
    max_abs_elsewhere: Tensor | None = None  # (n,) upper bound of |weight| p outside token_ids; None is |weight|
    terms: tuple[Term, ...] = ()  # to be added to it

    def rows(self, tokens: slice) -> LogitGradient:
        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[tokens]

        return LogitGradient(
            divergence=of(self.divergence),
            weight=of(self.weight),
            token_ids=of(self.token_ids),
            values=of(self.values),
            max_abs_elsewhere=of(self.max_abs_elsewhere),
            terms=() if not self.terms else tuple([term.rows(tokens) for term in self.terms]),
        )

    def scaled(self, factor: Tensor) -> LogitGradient:
        """Every term multiplied by a factor () or (n,)."""

        def of(x: Tensor | None, by: Tensor = factor) -> Tensor | None:
            return None if x is None else x * by

        return replace(
            self,
            divergence=of(self.divergence),
            weight=of(self.weight),
            values=of(self.values, factor if factor.ndim == 0 else factor[:, None]),
            max_abs_elsewhere=None if self.max_abs_elsewhere is None else of(self.max_abs_elsewhere, factor.abs()),
            terms=tuple([term._replace(gradient=term.gradient.scaled(factor)) for term in self.terms])
            if self.terms
            else (),
        )

    def divided(self, size: Tensor) -> LogitGradient:
        """Every term divided by a size (n,). Division, not multiplication by 1 / size, so that results are exact."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x / size

        return replace(
            self,
            divergence=of(self.divergence),
            weight=of(self.weight),
            values=None if self.values is None else self.values / size[:, None],
            max_abs_elsewhere=of(self.max_abs_elsewhere),
            terms=tuple([term._replace(gradient=term.gradient.divided(size)) for term in self.terms])
            if self.terms
            else (),
        )

    @property
    def size(self) -> Tensor:
        """(n,) upper bound of |dL/dz| per token, up to the size of the divergence's gradient."""
        elsewhere = self.weight if self.max_abs_elsewhere is None else self.max_abs_elsewhere
        parts = [x.abs() for x in (self.divergence, elsewhere) if x is not None]
        if self.values is not None and self.token_ids is not None:
            parts.append(self.values.masked_fill(self.token_ids < 0, 0).abs().amax(1))
        if self.terms:
            parts += [term.gradient.size for term in self.terms]
        return torch.stack(parts).amax(0)

    def with_logprob(self, weight: Tensor, logprobs: Tensor | None) -> LogitGradient:
        """This gradient plus weight (p - 1[v = y]) with y the first of the token ids; ``logprobs`` as below."""
        assert self.weight is not None
        values, elsewhere = self.values, self.max_abs_elsewhere
        if values is not None:
            assert self.token_ids is not None
            assert logprobs is not None
            hit = self.token_ids == self.token_ids[:, :1]
            values = values + weight[:, None] * (logprobs.exp() - hit.to(logprobs.dtype))
        elsewhere = None if elsewhere is None else elsewhere + weight.abs()
        return replace(self, weight=self.weight + weight, values=values, max_abs_elsewhere=elsewhere)

    def with_entropy(self, weight: Tensor, entropies: Tensor, logprobs: Tensor | None) -> LogitGradient:
        """This gradient plus weight p (log p + H): the row operation's divergence of a single model, which is -H.

        Args:
            weight: (n,) of -H; takes the place of the divergence's weight.
            entropies: (n,) H.
            logprobs: (n, K) log p of token_ids, where there are values.
        """
        values = self.values
        if values is not None:
            assert logprobs is not None
            around = logprobs.exp() * (logprobs.masked_fill(torch.isneginf(logprobs), 0) + entropies[:, None])
            values = values + weight[:, None] * around
        return replace(self, divergence=weight, values=values)

    def with_label(
        self,
        labels: Tensor,  # (n,) int64, -1 for none
        label_weight: Tensor,  # (n,) w, 0 where there is no label
        label_logprobs: Tensor,  # (n,) log p[label]
        logprobs: Tensor | None,  # (n, K) log p of token_ids
    ) -> LogitGradient:
        """This gradient plus that of -w log p[label], which is w (p - 1[v = label])."""
        if self.token_ids is None:
            return replace(self, weight=label_weight, token_ids=labels[:, None])
        assert self.weight is not None
        assert logprobs is not None
        probabilities = logprobs.exp()
        values, elsewhere = self.values, self.max_abs_elsewhere
        if values is None:
            values = self.weight[:, None] * (probabilities - 1)
        if elsewhere is None:
            elsewhere = self.weight.abs()
        w, label_probability = label_weight[:, None], label_logprobs.exp()
        hit = (self.token_ids == labels[:, None]) & (labels >= 0)[:, None]
        values = values + w * probabilities - torch.where(hit, w, 0)
        own = torch.where(hit, values, 0).sum(1)
        own = torch.where(hit.any(1), own, self.weight * label_probability + label_weight * (label_probability - 1))
        return LogitGradient(
            divergence=self.divergence,
            weight=self.weight + label_weight,
            token_ids=torch.cat((self.token_ids, labels[:, None]), 1),
            values=torch.cat((values, own[:, None]), 1),
            max_abs_elsewhere=elsewhere + label_weight,
        )
