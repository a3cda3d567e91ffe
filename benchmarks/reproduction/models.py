"""Tiny transformers: construction, sampling, and their hidden states and heads for the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fused_gopd as fg

from . import tasks

# Layers, width, heads, width of the MLP: 113 and 42 thousand parameters
SIZES = {"large": (3, 56, 4, 144), "small": (2, 40, 4, 112)}


def build(size: str, seed: int) -> LlamaForCausalLM:
    """A model with random weights."""
    layers, width, heads, mlp = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tasks.VOCABULARY),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tasks.PROMPT + tasks.RESPONSE,
        initializer_range=0.05,
        pad_token_id=tasks.PAD,
        bos_token_id=tasks.COLON,
        eos_token_id=tasks.END,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def size_of(model: LlamaForCausalLM) -> str:
    """The name of a model's size."""
    width = model.config.hidden_size
    return next(name for name, shape in SIZES.items() if shape[1] == width)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompt: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 14) responses sampled at temperature 1, with PAD after the end."""
    cache, x = DynamicCache(config=model.config), prompt
    response = torch.full((len(prompt), tasks.RESPONSE), tasks.PAD)
    going = torch.ones(len(prompt), dtype=torch.bool)
    for t in range(tasks.RESPONSE):
        hidden = model.model(x, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        logits = model.lm_head(hidden)
        x = (logits - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax(1, keepdim=True)
        response[going, t] = x[going, 0]
        going &= x[:, 0] != tasks.END
        if not going.any():
            break
    return response


def head(model: LlamaForCausalLM, prompt: Tensor, response: Tensor) -> fg.LinearHead:
    """The hidden states (n, 14, H) that score a response, with the model's head."""
    ids = torch.cat([prompt, response[:, :-1]], 1)  # right padding under causal attention needs no mask
    hidden: Any = model.model(ids, use_cache=False).last_hidden_state
    return fg.LinearHead(hidden[:, tasks.PROMPT - 1 :], model.lm_head.weight)
