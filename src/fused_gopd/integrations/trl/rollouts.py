"""Where the completions of a batch come from: log-probs of the engine that sampled them, completions of the dataset."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

COMPLETION = "completion"
"""The dataset's column of completions, as in TRL's prompt-completion datasets."""


Turns = dict[tuple[int, ...], list[tuple[list[int], list[float]]]]
"""What an engine has sampled, by the ids of the prompt: pairs of token ids and of their log-probs.

A log-prob is NaN where vLLM returns None.
"""


class RecordedEngine:
    """TRL's ``VLLMGeneration``, whose ``generate`` also keeps the log-probs of the tokens that it sampled.

    Args:
        engine: the engine.
        turns: gets what was sampled.
        required: whether an answer without log-probs raises.
    """

    def __init__(self, engine: Any, turns: Turns, *, required: bool = True) -> None:
        self._engine = engine
        self._turns = turns
        self._required = required

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: list[list[int]], **options: Any) -> Any:
        answer = self._engine.generate(prompts=prompts, **options)
        _, completions, logprobs, candidates = answer
        if logprobs is None and not self._required:
            return answer
        if logprobs is None:
            raise ValueError(
                "the engine returned no log-probs of the tokens that it sampled, which importance weights need: "
                "generation_kwargs must not turn them off, or rollout_is='none' does without"
            )
        for i, (prompt, tokens) in enumerate(zip(prompts, completions, strict=True)):
            found = _of_sampled(tokens, logprobs[i], None if candidates is None else candidates[i])
            self._turns.setdefault(tuple(prompt), []).append((list(tokens), found))
        return answer


def _of_sampled(tokens: Sequence[int], logprobs: Sequence[Any], candidates: Sequence[Any] | None) -> list[float]:
    """The log-prob of each sampled token, from lists (K, n) of log-probs and of the ids that they belong to."""
    if len(logprobs) != len(tokens):
        raise ValueError(f"the engine returned {len(logprobs)} log-probs for a completion of {len(tokens)} tokens")
    found = []
    for t, token in enumerate(tokens):
        ids = [token] if candidates is None and len(logprobs[t]) == 1 else None if candidates is None else candidates[t]
        if ids is None or token not in ids:
            raise ValueError(f"the engine's log-probs of position {t} are not those of token {token}, which it sampled")
        value = logprobs[t][list(ids).index(token)]
        found.append(float("nan") if value is None else float(value))
    return found


def sampler_logprobs(turns: Turns, batch: Mapping[str, Any]) -> Tensor:
    """(B, K) log-probs of the engine for a batch of TRL's; NaN where it gave none, 0 at padding and tools' tokens.

    A completion has several turns where tools were called. Each turn has its prompt, the ids before it, by which its
    log-probs are found; TRL may have cut its end off.
    """
    tokens, mask = batch["completion_ids"], batch["completion_mask"].bool()
    sampled = mask if "tool_mask" not in batch else mask & batch["tool_mask"].bool()
    found = torch.zeros(tokens.shape, dtype=torch.float32)
    columns = (batch["prompt_ids"], batch["prompt_mask"], tokens, sampled)
    for i, (prompt, kept, completion, own) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        before = [token for token, keep in zip(prompt, kept, strict=True) if keep]
        for start, end in _runs(own):
            turn = completion[start:end]
            known = turns[(*before, *completion[:start])]
            logprobs = next(values for ids, values in known if ids[: len(turn)] == turn)
            found[i, start:end] = torch.tensor(logprobs[: len(turn)])
    return found.to(tokens.device)


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, end) of each run of True."""
    edges = [t for t in range(len(flags) + 1) if (t < len(flags) and flags[t]) != (t > 0 and flags[t - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


# ------------------------------------------------------------------------------------------- completions of the dataset


def samples(seed: int, batch: int, share: float) -> bool:
    """Whether the student samples the completions of the batch of this number, as it does for ``share`` of batches.

    Drawn from seed and number alone: all ranks agree, and so does a resumed run.
    """
    return random.Random(f"{seed} {batch}").random() < share


def token_ids_of(
    prompt: Any,
    completion: Any,
    prompt_ids: Sequence[int],
    *,
    tokenizer: Any,
    render: Callable[..., str],
    end_ids: Sequence[int],
    longest: int,
) -> list[int]:
    """Token ids of a completion of the dataset, as the student would have sampled them after ``prompt_ids``.

    Prompt and completion are tokenized together; where the ids do not begin with those of the prompt the completion is
    tokenized by itself. It ends after its first end-of-sequence token, or with the tokenizer's, and is cut to
    ``longest`` tokens.

    Args:
        prompt, completion: texts, or lists of messages; the completion of messages may be a text, the answer.
        prompt_ids: token ids of the prompt.
        tokenizer: the student's.
        render: a conversation to text, by the chat template; takes ``add_generation_prompt``.
        end_ids: the tokens that end a sequence.
        longest: the most tokens that a completion may have.
    """
    expected = (str,) if isinstance(prompt, str) else (str, list)
    if not isinstance(completion, expected):
        kinds = "a text, as the prompt is" if isinstance(prompt, str) else "a text or a list of messages"
        raise TypeError(f"column {COMPLETION!r} of the dataset must have {kinds}, got {completion!r}")
    if isinstance(prompt, str):
        before, after, special = prompt, cast("str", completion), True
    else:
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        before, whole = render(prompt, add_generation_prompt=True), render([*prompt, *answer])
        if not whole.startswith(before):
            raise ValueError(
                "the chat template writes a prompt otherwise when its answer follows, so that the answer's tokens "
                f"are not known: {before[-80:]!r} is not in {whole[-200:]!r}. Give prompts and completions as texts"
            )
        after, special = whole.removeprefix(before), False
    ids = list(tokenizer(before + after, add_special_tokens=special)["input_ids"])
    if ids[: len(prompt_ids)] == list(prompt_ids):
        ids = ids[len(prompt_ids) :]
    else:
        ids = list(tokenizer(after, add_special_tokens=False)["input_ids"])
    end = next((t for t, token in enumerate(ids) if token in end_ids), None)
    ids = [*ids, tokenizer.eos_token_id] if end is None else ids[: end + 1]
    return ids[:longest]
