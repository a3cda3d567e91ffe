"""The causal language models that transformers can build, tiny: one config for each family of AutoModelForCausalLM.

``python tests/helpers/write_pages.py`` writes the list into docs/integrations/transformers.md.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations" / "transformers.md"
(PINNED,) = re.findall(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
VOCAB = 61

# model types of AutoModelForCausalLM that are not built here, and why
NOT_BUILT = {
    "gemma3n": "its vision tower is timm's",
    "gemma4_assistant": "a drafter, which runs on the states of another model",
    "gemma4_unified_assistant": "a drafter, which runs on the states of another model",
    "musicgen": "AutoModelForCausalLM does not build it from its own config",
    "musicgen_melody": "AutoModelForCausalLM does not build it from its own config",
}
# and those that are an error, with what it says; dory is new in transformers 5.24
_REFUSED = {
    "cpmant": "must be causal",
    "dory": r"must be an nn\.Linear, .*DoryLMHead.* computes more than",
    "prophetnet": "is given hidden states",
    "xlnet": "must be causal",
}
REFUSED = {x: message for x, message in _REFUSED.items() if x in AutoModelForCausalLM._model_mapping._model_mapping}
CAUSAL = [x for x in AutoModelForCausalLM._model_mapping._model_mapping if x not in NOT_BUILT and x not in REFUSED]
# of AutoModelForImageTextToText: decoders with a tower, with text alone. Not here: encoder-decoders, those that do not
# run without images, and some whose tiny config would be long
# fmt: off
WITH_TOWER = [
    "aria", "aya_vision", "cohere2_vision", "cohere_compass", "cosmos3_omni", "deepseek_vl", "deepseek_vl_hybrid",
    "dots3_note", "exaone4_5", "glm46v", "glm4v", "glm_ocr", "glmga", "granite_docling", "hyperclovax_vision_v2",
    "idefics2", "idefics3", "inkling2", "internvl", "janus", "kimi_k25", "kosmos-2.5", "lfm2_vl", "lfm3_vl",
    "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr",
    "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3", "mistral4", "mistral_large4", "mllama",
    "muse_glimmer", "muse_spark", "ovis2", "paddleocr_vl", "paligemma", "pp_chart2table", "qianfan_ocr",
    "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker",
    "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "shieldgemma2", "smolvlm", "unlimited_ocr", "video_llama_3",
    "video_llava", "vipllava",
]
# fmt: on
# those in which more than a norm is between the last layer and the head, or none: norms after each layer, a
# transform before the head, states in several streams
# fmt: off
NO_FINAL_NORM = {
    "bart", "bert", "bert-generation", "big_bird", "blenderbot-small", "blt", "camembert", "data2vec-text",
    "deepseek_v4", "electra", "ernie", "gemma3n_text", "git", "hy_v4", "inkling2", "inkling2_text", "inkling_text",
    "marian", "megatron-bert", "minicpm3", "modernbert-decoder", "mvp", "openai-gpt", "plbart", "qwen4_exp",
    "qwen4_exp_text", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr",
    "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}
# fmt: on

# where a config has one of these, this is its tiny value
_TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "out_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "shape_vocab_size"), VOCAB),
    "hidden_size_per_layer_input": 8,
}
# and where it has one of these, a value that shows in the logits
TRANSFORMS = {
    **{"logit_scale": 0.37, "logits_scaling": 1.7, "lm_head_multiplier": 0.6, "output_multiplier": 1.3},
    **{"final_logit_softcapping": 3.0, "logits_soft_cap": 2.5, "output_logit_soft_cap": 2.0, "unpadded_vocab_size": 55},
    "logits_mup_width_multiplier": 2.0,
}


# by model_type, of parts of a config too: what the tiny values above do not fit
_SPECIAL: dict[str, dict[str, Any]] = {
    name: values
    for names, values in (
        ("deepseek_v3 longcat_flash youtu", {"num_key_value_heads": 4, "head_dim": 4}),
        ("axk2 deepseek_v32 glm_moe_dsa dots3_note_text mistral_large4_text", {"num_key_value_heads": 4}),
        ("bamba granitemoehybrid", {"mamba_n_heads": 8, "mamba_d_head": 8}),
        ("codegen gptj", {"rotary_dim": 4}),
        ("hunyuan_v1_dense hunyuan_v1_moe ministral", {"head_dim": 8}),
        ("blt_local_encoder blt_local_decoder", {"hidden_size_global": 32, "cross_attn_k": 1}),
        (
            "qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text paddleocr_vl_text glm4v_text glm_ocr_text",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        ),
        ("axk1", {"num_key_value_heads": 4, "head_dim": 4, "n_group": 1, "topk_group": 1}),
        ("blt", {"cross_attn_k": 1, "encoder_hash_byte_group_vocab": 50}),
        (
            "cohere_compass_text",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        ),
        (
            "dbrx",
            {
                "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
                "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16},
            },
        ),
        ("deepseek_v2", {"num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 4}),
        ("dots1", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}),
        ("dots3_note_audio_encoder", {"adapter_input_size": 32, "adapter_out_dim": 32}),
        ("dots3_note_vision_encoder", {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32}),
        ("ernie4_5_moe", {"moe_k": 2}),
        ("falcon_h1", {"mamba_n_heads": 8, "mamba_d_ssm": 64, "mamba_d_head": 8}),
        ("gemma3n_text", {"num_kv_shared_layers": 0, "intermediate_size": 48}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_heads": 4}),
        ("inkling2_vision", {"text_hidden_size": 32}),
        ("janus_vqgan", {"projection_dim": 8, "num_embeddings": 8}),
        ("kimi_linear", {"num_experts_per_token": 2}),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
        ("mamba2", {"num_heads": 8, "head_dim": 8}),
        ("muse_spark_audio", {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 8, 8)}),
        ("nemotron", {"num_key_value_heads": 2}),
        ("reformer", {"axial_pos_shape": (4, 16), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "local"]}),
        ("xlm", {"causal": True}),
        ("xmod", {"default_language": "en_XX"}),
        ("zamba", {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}),
        ("zamba2", {"layers_block_type": ["linear_attention", "hybrid"]}),
        ("zaya", {"num_experts_per_tok": 1}),
    )
    for name in names.split()
}


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A tiny config of the same class."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = _shrunk(value)
        elif name in _TINY and isinstance(value, int):
            found[name] = _TINY[name]
        elif name in TRANSFORMS:
            found[name] = TRANSFORMS[name]
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id") and value is not None:
            found[name] = 0
    made = type(config)(**{**found, **copy.deepcopy(_SPECIAL.get(config.model_type, {}))})
    if hasattr(made, "is_decoder"):
        made.is_decoder = True
    return made


def tiny(name: str, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A model of a family, in eval mode."""
    return auto.from_config(_shrunk(CONFIG_MAPPING[name]())).eval()


def listed() -> str:
    """The lists of the page, as test_transformers.py verifies them."""
    causal, towers = (", ".join(f"`{name}`" for name in sorted(names)) for names in (CAUSAL, WITH_TOWER))
    refused = ", ".join(f"`{name}`" for name in sorted(REFUSED))
    left = ", ".join(f"`{name}` ({why})" for name, why in sorted(NOT_BUILT.items()))
    return (
        f"`AutoModelForCausalLM`, {len(CAUSAL)} model types: {causal}.\n\n"
        f"`AutoModelForImageTextToText`, {len(WITH_TOWER)} more, with text alone: {towers}.\n\n"
        f"An error: {refused}.\n\nNot tried: {left}.\n"
    )


def fill(page: str) -> str:
    before, rest = page.split("<!-- families -->\n")
    _, after = rest.split("<!-- /families -->")
    return f"{before}<!-- families -->\n\n{listed()}\n<!-- /families -->{after}"


def write() -> None:
    PAGE.write_text(fill(PAGE.read_text()))
