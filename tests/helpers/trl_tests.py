"""TRL's own tests, unchanged, on the trainers of fused_gopd.integrations.trl; and without them, to compare.

The wheel of trl has no tests: ``make test-trl TRL=<clone of its repository>`` copies them from there, runs them twice
with this file as a plugin of pytest, with ``TRL_TRAINERS`` ``own`` and ``fused``, and compares the two runs by
``python trl_tests.py <junit of own> <junit of fused> <json>``. Models, tokenizers and texts of the hub are replaced by
tiny ones that are made here, of the same classes, in a hub cache of their own; what is not there (images, other
families) fails either way. docs/integrations/trl.md has the results.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_CLONE = Path.cwd()
_TEXTS = (
    "Beautiful is better than ugly. Explicit is better than implicit. What is better than complex? Readability counts."
)
_FAMILIES = {  # hub name -> (class, chat template)
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "qwen3"),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", "qwen3"),
    "tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", "llama3_2"),
    "tiny-MistralForCausalLM-0.2": ("MistralForCausalLM", "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", "qwen2_5"),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", "qwen3"),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "llama3_2"),
    "small-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "qwen3"),
}


def _tokenizer(template: str) -> Any:
    import tokenizers
    import trl
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    size = 340 if template.startswith("llama") else 320  # two vocabularies
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([_TEXTS] * 3 if size == 320 else [_TEXTS[::-1]] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def _save(kind: str, template: str, folder: Path, hidden: int) -> None:
    import torch
    import transformers

    tokenizer = _tokenizer(template)
    model: Any = getattr(transformers, kind)
    options: dict[str, Any] = {"num_labels": 1} if "Sequence" in kind else {}
    if "Moe" in kind:
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    torch.manual_seed(hidden)
    config = model.config_class(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    made = model(config).to(torch.bfloat16)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hub(home: Path) -> None:
    """Write the models into a hub cache, as if they had been downloaded."""
    for name, (kind, template) in _FAMILIES.items():
        repository = home / "hub" / f"models--trl-internal-testing--{name}"
        commit = "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        _save(kind, template, repository / "snapshots" / commit, 16 if name.startswith("tiny") else 32)


def _zen() -> dict[str, Any]:
    """The texts of trl-internal-testing/zen, from the script of the clone that makes them."""
    import datasets

    path = _CLONE / "scripts" / "generate_zen_dataset.py"
    spec = importlib.util.spec_from_file_location("generate_zen_dataset", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found: dict[str, Any] = {}
    datasets.DatasetDict.push_to_hub = lambda self, _, config_name: found.update({config_name: self})
    script.main(0.1, True, "zen")
    return found


def _replace_datasets() -> None:
    import datasets

    own = datasets.load_dataset
    zen: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        if path != "trl-internal-testing/zen":
            return own(path, name, split=split, **options)
        if not zen:
            zen.update(_zen())
        whole = zen[str(name)]
        if options.get("streaming"):
            stream = {key: part.to_iterable_dataset() for key, part in whole.items()}
            return datasets.IterableDatasetDict(stream) if split is None else stream[split]
        return whole if split is None else whole[split]

    datasets.load_dataset = load_dataset


def _add_helpers() -> None:
    """What the tests of an older clone import from trl.import_utils, and what is no longer there: is_NAME_available."""

    def missing(name: str) -> Any:
        if not (name.startswith("is_") and name.endswith("_available")):
            raise AttributeError(name)
        return lambda: importlib.util.find_spec(name[3 : -len("_available")]) is not None

    vars(importlib.import_module("trl.import_utils"))["__getattr__"] = missing


def _replace_trainers() -> None:
    import torch
    import trl
    import trl.trainer.distillation_trainer as distillation
    import trl.trainer.grpo_trainer as grpo

    import fused_gopd as fg
    from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer, GRPOGOPDConfig, GRPOGOPDTrainer

    class DistillationTrainer(GOPDTrainer):  # type: ignore[misc]
        def __init__(self, model: Any, teacher_model: Any = None, args: Any = None, *more: Any, **named: Any) -> None:
            super().__init__(model, teacher_model, args, *more, **named)
            self.teacher_model = self._teachers[0].model  # a test computes the loss from its logits

    def silent(input_ids: Any, attention_mask: Any, completion_mask: Any) -> fg.TokenLogProbs:
        return fg.TokenLogProbs(torch.zeros_like(completion_mask, dtype=torch.float32))

    @dataclass
    class GRPOConfig(GRPOGOPDConfig):  # type: ignore[misc]
        gopd_weight: float = 0.0  # all is computed, and added with the weight 0

    class GRPOTrainer(GRPOGOPDTrainer):  # type: ignore[misc]
        def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **named: Any) -> None:
            names = ("train_dataset", "eval_dataset", "processing_class")
            if args is None:
                args = GRPOConfig(f"{model if isinstance(model, str) else 'model'}-GRPO".split("/")[-1])
            given = dict(zip(names, more, strict=False))
            super().__init__(model, reward_funcs, args, teacher=silent, **given, **named)

    GRPOConfig.__qualname__ = "GRPOConfig"  # checkpoints pickle it
    globals()["GRPOConfig"] = GRPOConfig
    trl.DistillationTrainer = distillation.DistillationTrainer = DistillationTrainer
    trl.DistillationConfig = distillation.DistillationConfig = GOPDConfig
    trl.GRPOTrainer = grpo.GRPOTrainer = GRPOTrainer
    trl.GRPOConfig = grpo.GRPOConfig = GRPOConfig


def _results(path: str) -> dict[str, tuple[str, str]]:
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag: child.get("message") or "" for child in case}
        kind = next((x for x in ("error", "failure", "skipped") if x in kinds), "passed")
        name = f"{(case.get('classname') or '').split('.')[-1]}::{case.get('name')}"
        found[name] = kind, " ".join(kinds.get(kind, "").split())[:300]
    return found


def _compare(own: str, fused: str, output: str) -> int:
    """Write each test's outcome on both trainers into `output`; print how many there are, and those that differ."""
    sides = {"TRL's": _results(own), "this package's": _results(fused)}
    for trainers, results in sides.items():
        print(f"{trainers} trainers: {dict(Counter(kind for kind, _ in results.values()))}")
    before, after = sides.values()
    tests: dict[str, dict[str, str]] = {}
    different = 0
    for name in before | after:
        outcomes = [results.get(name, ("absent", "")) for results in sides.values()]
        tests[name] = {"own": outcomes[0][0], "fused": outcomes[1][0]}
        for side, (_, reason) in zip(("own", "fused"), outcomes, strict=True):
            if reason:
                tests[name][f"{side} reason"] = reason
        if outcomes[0][0] != outcomes[1][0]:
            different += 1
            print(f"  {name}: {outcomes[0][0]} -> {outcomes[1][0]}  {outcomes[1][1]}")
    Path(output).write_text(json.dumps(tests, indent=2) + "\n", encoding="utf-8")
    if not any(kind == "passed" for kind, _ in before.values()):
        print("No test passes on TRL's own trainers: there is nothing to compare.")
        return 1
    return different


if __name__ == "__main__":
    sys.exit(_compare(*sys.argv[1:]) > 0)
else:
    _home = tempfile.TemporaryDirectory(prefix="trl-tests-")
    os.environ.update(HF_HOME=_home.name, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    _hub(Path(_home.name))
    _replace_datasets()
    _add_helpers()
    if os.environ.get("TRL_TRAINERS", "fused") == "fused":
        _replace_trainers()
