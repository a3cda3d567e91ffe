"""A teacher that cannot be the one that was meant, found out on the first tokens that it scores.

The log-probs of the same tokens under teacher and student tell it, wherever the teacher is: in this process, behind a
server, in a cache. Nothing is computed for it but on suspicion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from .. import token_logprobs
from ..heads import LinearHead, Logits

# With fewer tokens a difference of two correlations has a standard error above 0.18, and nothing is said.
LEAST_TOKENS = 64
# Of log-probs, in nats. Zeros in place of weights or states give -ln V to every token, up to rounding. Those of
# language models differ by more than a nat from token to token.
_UNIFORM = 0.1
# In nats a token. The true next token must be likelier than its neighbour by less than this in a teacher that is right:
# it is then the other way round, by several nats.
_SHIFTED = 1.0
# Standard errors: chance exceeds 4 of them once in 30 000 times.
_SURE = 4.0


def misfit_of(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor,
    vocab_size: int,
    shifted: Callable[[int], Tensor | None] | None = None,
) -> str | None:
    """What is wrong with a teacher, as the end of a sentence about it; None if nothing is found.

    Args:
        teacher, student: (B, K) log-probs of the sampled tokens under both.
        mask: (B, K), the tokens that count, at least :data:`LEAST_TOKENS` of them.
        vocab_size: V. A teacher that knows nothing has a mean of ln V nats a token.
        shifted: gives the teacher's log-probs (B, K - 1) of each token's successor (1) or predecessor (-1) in the place
            of the token, or None; for a teacher whose distribution is here.

    Found, in this order:

    - *uniform*: every log-prob is -ln V, within 0.1 on average.
    - *shifted by one*, of scores: they go with the student's at the next or the last position, by a correlation above
      0.5 that exceeds the one in place by 4 standard errors. Of states (``shifted``): the neighbours of the tokens are
      likelier than the tokens themselves, by a nat and 4 standard errors.
    - *another model*: its mean is no better than ln V by 4 standard errors, where the student's is by a nat. States
      that do not fit the head give more than ln V, and so do tokens of another tokenizer.
    - *damaged*: its mean is nearer to ln V than to the student's, by 4 standard errors. Another system prompt, or none,
      costs a model below a nat; weights with noise of a fifth of their size, or a temperature of 5, this much.
    """
    live = mask.bool().cpu()
    a, s = (x.detach().double().cpu().clamp(min=-1e3) for x in (teacher, student))
    n, worst = int(live.sum()), math.log(vocab_size)
    found, own = -a[live].mean().item(), -s[live].mean().item()
    if (a[live] + worst).abs().mean() < _UNIFORM:
        return f"gives every token the probability 1/{vocab_size}: it is uniform, as with a head or states of zeros"
    here = _correlation(a[live], s[live])
    for step, where in ((1, "next"), (-1, "last")):
        x, y, both = _neighbours(a, s, live, step)
        there = _correlation(x[both], y[both])
        if there > 0.5 and there - here > _SURE * math.sqrt(2 / max(int(both.sum()), 1)):
            return (
                f"has scores that are shifted by one: they go with the student's of the {where} position (correlation "
                f"{there:.2f}), not with those in place ({here:.2f})"
            )
    error = a[live].std().item() / math.sqrt(n)
    for step, where in ((1, "next"), (-1, "last")) if shifted is not None and found > own + _SHIFTED else ():
        scores = shifted(step)  # type: ignore[misc]
        if scores is None:
            break
        both = live[:, 1:] & live[:, :-1]
        other = -scores.double().cpu().clamp(min=-1e3)[both].mean().item()
        if found - other > max(_SHIFTED, _SURE * error):
            return (
                f"has hidden states that are shifted by one: they say the {where} token ({other:.2f} nats a token), "
                f"not the one in place ({found:.2f})"
            )
    if found > worst - _SURE * error and own < worst - 1:
        return (
            f"finds what the student says no likelier than chance: {found:.2f} nats a token, where a uniform guess has "
            f"ln {vocab_size} = {worst:.2f} and the student {own:.2f}. Its head is another model's than its states, or "
            "it has another tokenizer, or is not trained"
        )
    if found - _SURE * error > (own + worst) / 2 and own < worst - 1:
        return (
            f"is nearer to a uniform guess (ln {vocab_size} = {worst:.2f} nats a token) than to the student "
            f"({own:.2f}) on what the student says: {found:.2f}. Look at its answers to the same prompts: its weights "
            "may be damaged (dtype, quantization, an adapter of another base), its temperature or its prompt another"
        )
    return None


def _neighbours(a: Tensor, s: Tensor, live: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """a, and s of the next (1) or last (-1) position, (B, K - 1), and where both are live."""
    first, second = (slice(None, -1), slice(1, None))[::step]
    return a[:, first], s[:, second], live[:, first] & live[:, second]


def _correlation(x: Tensor, y: Tensor) -> float:
    if x.numel() < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def shifts_of(teacher: object, token_ids: Tensor, vocab_size: int) -> Callable[[int], Tensor | None]:
    """The ``shifted`` of :func:`misfit_of` for a head on the student's vocabulary; None from it for other teachers."""

    @torch.no_grad()
    def shifted(step: int) -> Tensor | None:
        first, second = (slice(None, -1), slice(1, None))[::step]
        if not isinstance(teacher, (LinearHead, Logits)) or teacher.shard is not None:
            return None
        if getattr(teacher, "vocab_map", None) is not None:
            return None
        head = (
            teacher[:, first] if isinstance(teacher, LinearHead) else replace(teacher, logits=teacher.logits[:, first])
        )
        return cast("Tensor", token_logprobs(head, token_ids[:, second], vocab_size=vocab_size))

    return shifted
