"""checkpoint: the head of a model, read from its folder without the body. The families are in test_transformers.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_gopd as fg

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from fused_gopd.integrations.checkpoint import load_head  # noqa: E402
from fused_gopd.integrations.transformers import head_of, last_hidden_state  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def llama(**config: object) -> nn.Module:
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **config})).eval()


def rewrite(folder: Path, change: object) -> None:
    """Change the tensors of model.safetensors."""
    file = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(file)
    change(tensors)
    safetensors_torch.save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def test_a_loss_from_states_and_a_head_alone_is_that_of_the_model(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    hidden = last_hidden_state(model, IDS)
    head = load_head(tmp_path)
    assert (head.vocab_size, head.hidden_size, head.dtype) == (61, 32, torch.float32)
    student = fg.Logits(torch.randn(2, 8, 61))
    losses = [
        fg.gopd_loss(student, x, None, IDS, estimator="full").loss for x in (head(hidden), head_of(model, hidden))
    ]
    assert torch.equal(*losses)
    assert torch.equal(losses[0], fg.gopd_loss(student, fg.Logits(model(IDS).logits), None, IDS, estimator="full").loss)
    assert head(hidden, temperature=0.7).temperature == 0.7
    assert not head.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_of_several_files_those_of_the_head_alone_are_read(tied, tmp_path):
    model = llama(tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = index["model.embed_tokens.weight" if tied else "lm_head.weight"]
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        if shard.name != needed:
            shard.unlink()
    head = load_head(tmp_path)
    assert head.dtype == torch.bfloat16
    assert torch.equal(head.weight, model.lm_head.weight)
    (tmp_path / needed).unlink()
    with pytest.raises(ValueError, match=rf"has no {needed}, which holds .* according to model.safetensors.index.json"):
        load_head(tmp_path)


def test_two_embeddings_that_a_config_ties_and_a_file_does_not_are_not_tied(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    own = torch.randn(61, 32)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": own}))
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, own)
    assert torch.equal(load_head(tmp_path).weight, own)


def test_the_fingerprint_is_that_of_the_head_and_its_config(tmp_path):
    found = {}
    for name, model in (("one", llama()), ("same", llama()), ("scaled", llama(vocab_size=60)), ("other", llama())):
        if name == "other":
            with torch.no_grad():
                model.lm_head.weight[5, 7] += 1e-3
        model.save_pretrained(tmp_path / name)
        found[name] = load_head(tmp_path / name).fingerprint
    assert found["one"] == found["same"]
    assert len(set(found.values())) == 3


def _without(name: str):
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def _with(name: str, tensor: torch.Tensor):
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _config(**changes: object):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_without("lm_head.weight"), ValueError, r"has no tensor for lm_head\.weight: is it the folder of a part"),
        (
            _with("lm_head.weight", torch.zeros(60, 32)),
            ValueError,
            r"must be \(61, 32\), as the config says",
        ),
        (_with("lm_head.weight", torch.zeros(61, 32, dtype=torch.int8)), TypeError, r"is quantised \(torch\.int8\)"),
        (_with("lm_head.weight", torch.zeros(61, 32).to(torch.float8_e4m3fn)), TypeError, "is quantised"),
        (_pickled, ValueError, r"but pytorch_model\.bin, which is pickled and not read: save it anew"),
        (_cut, ValueError, "cannot be read, it is damaged or no safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), ValueError, r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "cannot be read"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            ValueError,
            "folder of an adapter",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            ValueError,
            r"index\.json is damaged: KeyError",
        ),
        (_config(model_type="unheard"), ValueError, "config of .* cannot be read: .*unheard"),
        (_config(architectures=["LlamaForSequenceClassification"]), TypeError, "must be a causal language model"),
        (_config(architectures=["LlamaModel"]), TypeError, "must be a causal language model"),
        (_config(model_type="bert", architectures=["BertModel"]), TypeError, "must be a causal language model"),
    ],
)
def test_a_folder_that_has_no_head_is_an_error(change, kind, message, tmp_path):
    llama().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(kind, match=message):
        load_head(tmp_path)


def test_a_path_that_is_no_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"there is no {tmp_path / 'none'}")):
        load_head(tmp_path / "none")
