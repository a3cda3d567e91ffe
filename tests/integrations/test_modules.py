"""Modules that score: modes put back one by one, ratios without dropout, parameters that are shared."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fused_gopd.integrations.modules import evaluation, require_separate, shared_with, without_dropout


def partly_frozen() -> nn.Module:
    """In training mode, but for a frozen part that was put into evaluation mode."""
    made = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)), nn.Dropout(0.5))
    made[1].eval()
    return made


def test_an_evaluation_puts_the_modes_back_one_by_one() -> None:
    module = partly_frozen()
    before = [m.training for m in module.modules()]
    with evaluation(module):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == before
    for context in (evaluation, without_dropout):
        with pytest.raises(KeyError), context(module):
            raise KeyError
        assert [m.training for m in module.modules()] == before


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # dropout modules, and functional dropout in a checkpointed layer
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_without_dropout_has_the_gradients_of_evaluation_mode(family: str, checkpointing: dict | None) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "opt": {"hidden_size": 16, "num_hidden_layers": 2}}
    more = {"opt": {"ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16, "activation_dropout": 0.1}}
    config = transformers.AutoConfig.for_model(family, vocab_size=31, **sizes[family], **more.get(family, {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(31, (2, 5))

    def loss() -> torch.Tensor:
        return model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits.square().mean()

    def gradients(of: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        of.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients((model.eval(), loss())[1])
    model.train()
    runs = []
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        for layer in layers:
            function = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *args, f=function, **kw: (runs.append(1), f(*args, **kw))[1]
    with without_dropout(model):
        assert model.training
        value = loss()
    assert all(m.training for m in model.modules())
    assert len(runs) == (0 if checkpointing is None else 2)  # the layers were checkpointed
    for a, b in zip(gradients(value), want, strict=True):  # after the context: checkpointed layers run again
        assert torch.equal(a, b)
    assert not torch.equal(gradients(loss())[-1], want[-1])  # in training mode its dropout is on


def _tied(trainable: bool, memory: bool = False) -> tuple[nn.Module, nn.Module]:
    """Two models with one embedding: the same parameter, or two of one memory."""
    a, b = (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)) for _ in range(2))
    b[0].weight = nn.Parameter(a[0].weight.data[1:]) if memory else a[0].weight
    a[0].weight.requires_grad_(trainable)
    return a, b


def _disjoint() -> tuple[nn.Module, nn.Module]:
    """Parameters of one storage that do not overlap, as of a flat buffer."""
    a, b = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
    flat = torch.zeros(12)
    a.weight, b.weight = nn.Parameter(flat[:6].view(3, 2)), nn.Parameter(flat[6:].view(3, 2))
    return a, b


def _meta() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(2, 3, device="meta"), nn.Linear(2, 3, device="meta")


@pytest.mark.parametrize(
    ("models", "shared"),
    [
        (lambda: (m := partly_frozen(), copy.copy(m)), "the parameter 0.weight"),
        (lambda: (m := partly_frozen(), nn.Sequential(m)), "the parameter 0.weight"),
        (lambda: _tied(True), "the parameter 0.weight"),
        (lambda: _tied(True, memory=True), "the memory of the parameter 0.weight"),
        (lambda: _tied(False), None),
        (lambda: _tied(False, memory=True), None),
        (lambda: (m := partly_frozen(), copy.deepcopy(m)), None),
        (_disjoint, None),
        (_meta, None),
    ],
)
def test_what_is_shared_is_found_by_identity_and_by_memory(models: Callable, shared: str | None) -> None:
    student, source = models()
    assert shared_with(student, source) == shared
    if shared is not None:
        with pytest.raises(ValueError, match="teacher is the student itself, which changes: pass a copy"):
            require_separate("teacher", source, student)
