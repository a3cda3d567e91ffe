"""What the ranks of a planned call send each other in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...objective.divergences import DIVERGENCES
from ...objective.layout import merged_statistics
from .call import PlannedCall

_MODEL_NAMES = {"student": "student", "teacher": "teacher", "ref": "reference"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind and purpose in one step, for one rank."""

    what: str
    kind: str  # all-gather, all-reduce or reduce-scatter
    ranks: int
    size: int  # bytes of the gathered result, or of the tensor that is reduced, over all calls
    calls: int

    @property
    def received(self) -> int:
        """Bytes that a rank receives, and sends, over a ring: S (n - 1) / n, twice for an all-reduce."""
        return (2 if self.kind == "all-reduce" else 1) * self.size * (self.ranks - 1) // self.ranks


class Exchange(NamedTuple):
    """An all-gather over the ranks that share a vocabulary."""

    what: str
    numbers: int  # per token, in the accumulation dtype
    times: int  # collectives per chunk


def exchanges(call: PlannedCall) -> list[Exchange]:
    """The all-gathers of vocabulary-parallel heads, for a call with token ids."""
    models = sum(call.parts.values())
    of_one_model = len(merged_statistics((False, False), None, tokens=True))
    if call.estimator == "full":
        has = "teacher" in call.needed, "ref" in call.needed
        divergence = DIVERGENCES[call.divergence]
        found = [Exchange("statistics", len(merged_statistics(has, divergence, tokens=True)), 1)]
        parts = sum(n for n in call.parts.values() if n > 1)
        if parts:
            found.append(Exchange("statistics of the models of a sum", parts * of_one_model, parts))
        return found + ([Exchange("statistics of the mixture", 2, 1)] if divergence.second_round else [])
    if call.estimator == "sampled":
        return [Exchange("statistics, model by model", models * of_one_model, models)]
    assert call.k is not None
    # ids are sent as numbers of the accumulation dtype, in the same collective as the logits
    candidates = Exchange("candidates of the support", 2 * call.k, 1)
    return [candidates, Exchange("statistics, model by model", models * (of_one_model + call.k), models)]


def collectives(call: PlannedCall) -> list[Collective]:
    """The collectives of one step; empty on one rank.

    Vocabulary-parallel heads exchange per-token statistics, which are sums over the vocabulary, and all-reduce the
    gradient of the hidden states, which is one too. The gradient of the weight's rows stays on their rank. Data and
    context parallelism shard the heads over their ranks together, as FSDP does: each needed head is gathered once, and
    the gradient of the student's is reduced and scattered in the dtype of the weight.
    """
    share, found = call.share, []
    chunk = max(1, share.largest_chunk)
    chunks, subchunks = -(-share.tokens // chunk), -(-chunk // max(1, share.largest_subchunk))

    def add_over_vocabulary(what: str, kind: str, numbers: int, times: int = 1) -> None:
        size = numbers * call.wide * share.tokens * (call.tp if kind == "all-gather" else 1)
        found.append(Collective(what=what, kind=kind, ranks=call.tp, size=size, calls=times * chunks))

    if call.tp > 1:
        for exchange in exchanges(call):
            add_over_vocabulary(exchange.what, "all-gather", exchange.numbers, exchange.times * subchunks)
        add_over_vocabulary("gradient of hidden", "all-reduce", call.hidden)

    sharded = call.dp * call.cp

    def add_over_tokens(what: str, kind: str, size: int) -> None:
        found.append(Collective(what=what, kind=kind, ranks=sharded, size=size, calls=1))

    if sharded > 1:
        for name, width in call.needed.items():
            several, of = call.parts[name] > 1, _MODEL_NAMES[name]
            size = share.vocab * width * call.parts[name] * call.element
            add_over_tokens(f"{'heads' if several else 'head'} of the {of}", "all-gather", size)
        gradient = share.vocab * call.hidden * call.element
        add_over_tokens("gradient of the student's head", "reduce-scatter", gradient)
        add_over_tokens("number of tokens", "all-reduce", 8)
    return found
