"""checkpoint: the head of a model, read from its folder without the body. The families are in test_transformers.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_gopd as fg

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
gguf = pytest.importorskip("gguf")

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


def test_of_a_name_on_the_hub_the_files_are_taken_from_there(tmp_path, monkeypatch):
    """From its cache here."""
    constants = pytest.importorskip("huggingface_hub").constants
    repository = tmp_path / "models--someone--teacher"
    model = llama()
    model.save_pretrained(repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_head("someone/teacher").weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="path must be a model: there is no folder someone/else"):
        load_head("someone/else")


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


@pytest.mark.parametrize("shards_left", [False, True])
def test_a_single_file_comes_before_the_index_of_an_earlier_save(shards_left, tmp_path):
    """save_pretrained leaves the index of sharded weights that were in the folder; from_pretrained does not read it."""
    llama().save_pretrained(tmp_path, max_shard_size="10KB")
    shards = {file: file.read_bytes() for file in tmp_path.glob("model-*.safetensors")}
    later = llama()
    torch.nn.init.normal_(later.lm_head.weight)
    later.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    for file, content in shards.items() if shards_left else ():
        file.write_bytes(content)
    assert torch.equal(load_head(tmp_path).weight, later.lm_head.weight)


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
        (_without("lm_head.weight"), ValueError, r"has no tensor for lm_head\.weight: is it a part of the model"),
        (
            _with("lm_head.weight", torch.zeros(60, 32)),
            ValueError,
            r"must be \(61, 32\), as the config says",
        ),
        (_with("lm_head.weight", torch.zeros(61, 32, dtype=torch.int8)), TypeError, r"is quantised \(torch\.int8\)"),
        (_with("lm_head.weight", torch.zeros(61, 32).to(torch.float8_e4m3fn)), TypeError, "is quantised"),
        (
            _with("lm_head.qweight", torch.zeros(4, 61).int()),
            TypeError,
            "has lm_head.qweight, which lm_head of the model",
        ),
        (_pickled, ValueError, r"but pytorch_model\.bin, which is pickled and not read: save it anew"),
        (_cut, ValueError, "cannot be read, it is damaged or no safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), ValueError, r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "cannot be read"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            ValueError,
            "is an adapter: give its base model",
        ),
        (
            lambda folder: (
                (folder / "model.safetensors").rename(folder / "model.safetensors.index.json").write_text("{}")
            ),
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


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_body_is_no_matter(method, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    _without("model.layers.0.mlp.up_proj.weight")(tmp_path)
    _with("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, 48).int())(tmp_path)
    _config(quantization_config={"quant_method": method, "bits": 4})(tmp_path)
    assert torch.equal(load_head(tmp_path).weight, model.lm_head.weight)


def test_a_path_that_is_no_folder_is_an_error(tmp_path):
    for name in ("none", "none.gguf"):
        with pytest.raises(ValueError, match=r"path must be a model: there is no f\w+ .*none"):
            load_head(tmp_path / name)


MINE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output
"""


def test_code_of_a_folder_runs_if_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "mine"
    llama().save_pretrained(folder)
    (folder / "mine.py").write_text(MINE)
    code = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    _config(model_type="mine", architectures=["Mine"], auto_map=code)(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_head(folder)
    assert not (tmp_path / "modules" / "transformers_modules" / "mine").exists()
    assert load_head(folder, trust_remote_code=True)(torch.zeros(1, 32)).logit_scale == 0.25


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_the_bytes_of_the_head_alone_are_in_memory(tmp_path):
    """In a process of its own: of a file of 192 MiB the 16 of the head are, and at most 8 more, for the modules."""
    model = llama(hidden_size=512, vocab_size=8192)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.other": torch.zeros(44 * 2**20)}))
    code = """if True:
        import sys, torch
        from fused_gopd.integrations.checkpoint import load_head
        from pathlib import Path
        def resident():
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return next(int(x.split()[1]) for x in lines if x.startswith("Rss")) / 1024
        load_head(sys.argv[1])  # imports the family
        before = resident()
        head = load_head(sys.argv[1])
        loaded = resident()
        head.weight.sum()
        print(loaded - before, resident() - before)
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    loaded, used = map(float, done.stdout.split())
    assert loaded < 8
    assert used < 16 + 8


# ------------------------------------------------------------------------------------------------ before the final norm


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "CohereForCausalLM"])
@torch.no_grad()
def test_states_before_the_final_norm_in_bfloat16(name, tmp_path):
    """The norm of the file in the family's own code, to the bit."""
    torch.manual_seed(3)
    kind = getattr(transformers, name)
    sizes = {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4} if "GPT2" in name else SIZES
    model = kind(kind.config_class(**sizes)).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    body = model.base_model
    before: list[torch.Tensor] = []
    final = body.ln_f if "GPT2" in name else body.norm
    final.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    hidden = last_hidden_state(model, IDS)
    head = load_head(tmp_path, norm=True)
    assert torch.equal(head(before[0]).hidden, hidden)
    assert not head(before[0].requires_grad_()).hidden.requires_grad
    plain = load_head(tmp_path)
    assert torch.equal(plain.weight, head.weight)
    assert plain.fingerprint != head.fingerprint


# ----------------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, model: nn.Module, kind: str, **metadata: float) -> None:
    """A file as llama.cpp's converter writes it, of the tensors that are read."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, value in metadata.items():
        writer.add_float32(f"{config.model_type}.{name}", value)
    name = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    weight, quantised = model.lm_head.weight.detach(), gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, weight.numpy())
    else:
        data = gguf.quantize(weight.float().numpy(), quantised)
        writer.add_tensor(name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_head_of_a_gguf_file(kind, tmp_path):
    model, path = llama(), tmp_path / "teacher.gguf"
    write_gguf(path, model, kind)
    head = load_head(path)
    want = model.lm_head.weight.detach()
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    if kind == "Q8_0":  # 32 numbers share a float16 scale, the largest of them / 127
        assert (head.weight - want).abs().max() <= 0.51 * want.abs().max() / 127
        want = head.weight
    assert head.dtype == dtype
    assert torch.equal(head.weight, want.to(dtype))
    head(torch.zeros(1, 32, dtype=dtype))


def test_the_softcap_of_a_gguf_file_is_its_own(tmp_path):
    torch.manual_seed(3)
    sizes = {**SIZES, "head_dim": 8, "num_key_value_heads": 4}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    write_gguf(tmp_path / "teacher.gguf", model, "F32", final_logit_softcapping=30.0)
    head = load_head(tmp_path / "teacher.gguf")
    assert head.softcap == 30.0
    assert torch.equal(head.weight, model.lm_head.weight)
    write_gguf(tmp_path / "other.gguf", model, "F32", final_logit_softcapping=20.0)
    found = re.escape("gemma2.final_logit_softcapping 20.0, which transformers reads as 30.0")
    with pytest.raises(ValueError, match=found):
        load_head(tmp_path / "other.gguf")


def test_a_gguf_file_that_has_no_head_is_an_error(tmp_path):
    path = tmp_path / "teacher.gguf"
    write_gguf(path, llama(), "F32")
    with pytest.raises(ValueError, match="norm must be False for a GGUF file"):
        load_head(path, norm=True)
    path.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match="cannot be read, it is damaged"):
        load_head(path)
