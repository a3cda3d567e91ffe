"""Student, teacher and reference in one network: frozen lower layers, upper layers with switchable LoRA adapters.

The reference is the network without an adapter, the student the network with one; both share one run of the lower
layers. The teacher is the network without an adapter, given another system prompt.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Answers:
    """Sampled answers.

    tokens: (B, T) int64; mask: (B, T) bool, True up to and including the end-of-answer token.
    """

    tokens: Tensor
    mask: Tensor

    def texts(self, tokenizer: Any) -> list[str]:
        """The answers as text, without special tokens."""
        rows = zip(self.tokens, self.mask, strict=True)
        return [tokenizer.decode(row[live], skip_special_tokens=True) for row, live in rows]


class Network:
    """A causal language model of the Llama kind with LoRA adapters on its last layers.

    Args:
        model: a transformers causal LM with a base model of ``embed_tokens, layers, norm`` (``LlamaForCausalLM``).
        trained_layers: how many layers at the top get adapters.
        rank: of the adapters.
    """

    def __init__(self, model: Any, *, trained_layers: int = 10, rank: int = 8) -> None:
        base = model.base_model
        total = len(base.layers)
        split = total - trained_layers
        if not 0 < split < total:
            raise ValueError(f"trained_layers must be between 1 and {total - 1}, got {trained_layers}")
        self._config = importlib.import_module("peft").LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(split, total)),
        )
        self._model = model
        self._peft: Any = None
        self._base = base
        self._lower = self._part(0, split, nn.Identity())
        self._upper = self._part(split, total, base.norm)
        model.requires_grad_(False)

    def _part(self, start: int, stop: int, norm: nn.Module) -> Any:
        """A model of layers start to stop of the base model, which shares their modules.

        Its forward is transformers' own, which makes masks and rotary embeddings.
        """
        config = copy.deepcopy(self._base.config)
        config.num_hidden_layers = stop - start
        with torch.device("meta"):  # on meta, as its new weights are replaced below
            part = type(self._base)(config)
        part.embed_tokens = self._base.embed_tokens
        part.layers = self._base.layers[start:stop]
        part.norm = norm
        part.rotary_emb = self._base.rotary_emb
        return part.eval()

    @property
    def head_weight(self) -> Tensor:
        """(V, H), frozen; tied to the embedding."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    def add_adapter(self, name: str, seed: int) -> list[nn.Parameter]:
        """Add an adapter, which is the identity at first. Returns its parameters."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
            torch.manual_seed(seed)
            if self._peft is None:
                self._peft = importlib.import_module("peft").get_peft_model(
                    self._model, self._config, adapter_name=name
                )
            else:
                self._peft.add_adapter(name, self._config)
        with self.using(name):
            return [p for key, p in self._peft.named_parameters() if f".{name}." in key]

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the network with this adapter, or with none."""
        if self._peft is None:
            if adapter is not None:
                raise KeyError(f"no adapter {adapter!r}")
            yield
        elif adapter is None:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(adapter)
            yield

    # --------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self, adapter: str | None, prompts: Sequence[list[int]], new_tokens: int, end_id: int, seed: int
    ) -> Answers:
        """Sample an answer to each prompt at temperature 1 from the whole distribution.

        transformers' generate cannot take a random generator. With one, students sampled with the same seed get the
        same random numbers, so that their answers differ by their policies alone.
        """
        generator = torch.Generator().manual_seed(seed)
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), end_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # left padding: all answers start in the same column
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        running = torch.ones(len(prompts), dtype=torch.bool)
        tokens, live = [], []
        cache = None
        head = self.head_weight
        with self.using(adapter):
            for _ in range(new_tokens):
                out = self._base(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                logits = out.last_hidden_state[:, -1] @ head.T
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens.append(torch.where(running, drawn[:, 0], end_id))
                live.append(running)
                running = running & (drawn[:, 0] != end_id)
                ids = tokens[-1][:, None]
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                positions = positions[:, -1:] + 1
        return Answers(torch.stack(tokens, 1), torch.stack(live, 1))

    # ---------------------------------------------------------------------------------------------------- scoring

    def lower_states(self, prompts: Sequence[list[int]], answers: Answers) -> tuple[Tensor, Tensor]:
        """Run the frozen layers on prompt + answer. Returns states (B, L, H) and the start of each answer, (B,).

        Right padding: under causal attention it has no effect on earlier positions, so no mask is needed.
        """
        ids, starts = _joined(prompts, answers)
        with torch.no_grad(), self.using(None):
            return self._lower(input_ids=ids, use_cache=False).last_hidden_state, starts

    def hidden(self, adapter: str | None, lower: tuple[Tensor, Tensor], length: int) -> Tensor:
        """The hidden states (B, T, H) that score the answers' tokens; differentiable in the adapter's parameters."""
        states, starts = lower
        with self.using(adapter):
            return _at_answers(self._upper(inputs_embeds=states, use_cache=False).last_hidden_state, starts, length)

    @torch.no_grad()
    def teacher_hidden(self, prompts: Sequence[list[int]], answers: Answers) -> Tensor:
        """The same of the network without an adapter, given other prompts: what they begin with in common runs once."""
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        ids, starts = _joined([prompt[common:] for prompt in prompts], answers)
        with self.using(None):
            cache = self._base(input_ids=torch.tensor([prompts[0][:common]]), use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(prompts))
            states = self._base(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        return _at_answers(states, starts, answers.tokens.shape[1])


def _joined(prompts: Sequence[list[int]], answers: Answers) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) of prompt + answer, padded on the right, and the start of each answer, (B,)."""
    rows = [torch.cat([torch.tensor(prompt), answer]) for prompt, answer in zip(prompts, answers.tokens, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=int(answers.tokens[0, -1]))
    # the state at a position scores the next token: the prompt's last state scores the first answer token
    return ids, torch.tensor([len(prompt) - 1 for prompt in prompts])


def _at_answers(states: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, T, H) from states (B, L, H): an answer is at another position after each prompt."""
    index = starts[:, None] + torch.arange(length)
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[-1]))
