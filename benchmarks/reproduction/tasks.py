"""Two domains with checkable answers, as batches of token ids.

A, addition: ``:123+456`` to ``=0579$``, or with a scratch of carry and digit from the units up, ``#090705=0579$``.
B, strings: ``:RS:dabc`` (reverse, then sort) to ``=abcd$``, or with the intermediate string, ``#cbad=abcd$``.

A prompt has 8 tokens, a response at most 14; ``$`` ends it. Both domains share one vocabulary of 30 tokens, so that one
student can learn from two teachers. The reward is 1 for the exact final answer, however it was reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY = "0123456789abcdefghijRSTC_$:+=#"
PROMPT, RESPONSE, ANSWER = 8, 14, 4  # tokens
LETTER = 10  # the first letter; digits are their own ids
OPERATIONS = VOCABULARY.index("R")  # reverse, sort, rotate by one, shift each letter by one
PAD, END, COLON, PLUS, EQUALS, SCRATCH = (VOCABULARY.index(c) for c in "_$:+=#")
DOMAINS = ("addition", "strings")


@dataclass(frozen=True)
class Errors:
    """Rates of wrong content tokens in the training data, by kind of error.

    Attributes:
        direct: in an answer without a scratch.
        scratch: in the scratch.
        answer: in the answer after a scratch.
        kind: ``uniform`` replaces by a symbol drawn from all ten, ``next`` by the symbol's successor: a habit.
    """

    direct: float = 0.15
    scratch: float = 0.04
    answer: float = 0.08
    kind: str = "uniform"


def text(ids: Tensor) -> str:
    """The tokens of one sequence as characters, for printing."""
    return "".join(VOCABULARY[i] for i in ids.tolist())


def prompts(domain: str, n: int, generator: torch.Generator) -> Tensor:
    """(n, 8) random prompts of a domain; for ``both`` the first half is of one, the second half of the other."""
    if domain == "both":
        return torch.cat([prompts(d, m, generator) for d, m in zip(DOMAINS, (n - n // 2, n // 2), strict=True)])
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, both; got {domain!r}")
    x = torch.randint(10, (n, PROMPT), generator=generator)
    x[:, 0] = COLON
    if domain == "addition":
        x[:, 4] = PLUS
    else:
        x[:, 1:3] = OPERATIONS + torch.randint(4, (n, 2), generator=generator)
        x[:, 3] = COLON
        x[:, 4:] += LETTER
    return x


def is_addition(prompt: Tensor) -> Tensor:
    """(n,) bool: whether prompts (n, 8) are of domain A."""
    return prompt[:, 4] == PLUS


def _add(prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Scratch (n, 6) and answer (n, 4) of additions."""
    carry = torch.zeros_like(prompt[:, 0])
    work = []
    for place in (3, 2, 1):  # units, tens, hundreds
        total = prompt[:, place] + prompt[:, place + 4] + carry
        carry, digit = total // 10, total % 10
        work += [carry, digit]
    return torch.stack(work, 1), torch.stack([work[4], work[5], work[3], work[1]], 1)


def _apply(operation: Tensor, x: Tensor) -> Tensor:
    """Each row's operation on its four letters (n, 4)."""
    results = torch.stack([x.flip(1), x.sort(1).values, x.roll(-1, 1), (x - LETTER + 1) % 10 + LETTER])
    return results[operation - OPERATIONS, torch.arange(len(x))]


def answers(prompt: Tensor) -> Tensor:
    """(n, 4) the right answers to prompts (n, 8) of either domain."""
    result = torch.empty_like(prompt[:, :ANSWER])
    a = is_addition(prompt)
    result[a] = _add(prompt[a])[1]
    b = prompt[~a]
    result[~a] = _apply(b[:, 2], _apply(b[:, 1], b[:, 4:]))
    return result


def correct(prompt: Tensor, response: Tensor) -> Tensor:
    """(n,) bool: whether the response (n, 14) ends with ``=`` and the right answer."""
    ends = response == END
    at = ends.int().argmax(1)  # the first end
    long_enough = ends.any(1) & (at >= ANSWER + 1)
    places = (at[:, None] + torch.arange(-ANSWER - 1, 0)).clamp_min(0)
    tail = response.gather(1, places)
    return long_enough & (tail[:, 0] == EQUALS) & (tail[:, 1:] == answers(prompt)).all(1)


def live(response: Tensor) -> Tensor:
    """(n, 14) bool: the tokens up to and including the end."""
    ends = (response == END).int()
    return ends.cumsum(1) - ends == 0


def _spoil(x: Tensor, rate: float, kind: str, generator: torch.Generator) -> Tensor:
    """Replace each content token by a wrong one with a probability."""
    base = x // LETTER * LETTER  # 0 for digits, 10 for letters
    other = torch.randint(10, x.shape, generator=generator) if kind == "uniform" else (x - base + 1) % 10
    return torch.where(torch.rand(x.shape, generator=generator) < rate, base + other, x)


def solutions(prompt: Tensor, errors: Errors, generator: torch.Generator) -> Tensor:
    """(n, 14) responses of the training data: half direct, half with a scratch, with errors."""
    n = len(prompt)
    response = torch.full((n, RESPONSE), PAD)
    a, scratched = is_addition(prompt), torch.rand(n, generator=generator) < 0.5
    for domain in (True, False):
        for scratch in (True, False):
            rows = ((a == domain) & (scratched == scratch)).nonzero().squeeze(1)
            x, right = prompt[rows], answers(prompt[rows])
            column = torch.full((len(rows), 1), EQUALS)
            parts = [column, _spoil(right, errors.answer if scratch else errors.direct, errors.kind, generator)]
            if scratch:
                work = _add(x)[0] if domain else _apply(x[:, 1], x[:, 4:])
                parts = [column * 0 + SCRATCH, _spoil(work, errors.scratch, errors.kind, generator), *parts]
            line = torch.cat([*parts, column * 0 + END], 1)
            response[rows, : line.shape[1]] = line
    return response
