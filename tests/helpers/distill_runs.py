"""Tiny models and prompts on disk, and runs of ``fused-gopd distill`` on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from fused_gopd.cli import app

runner = CliRunner(env={"COLUMNS": "2000", "NO_COLOR": "1", "TERM": "dumb"})  # no message is wrapped
SENTENCES = ("why is the sky blue", "tell me a story of a dog", "how do I cook rice", "who are you", "count to ten")
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"


def make_tokenizer(words: tuple[str, ...] = SENTENCES) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<pad>", "<eos>", "<user>", "<assistant>"]
    inner.train_from_iterator(words, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


def make_model(folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast, **configuration: Any) -> str:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = Qwen3Config(**{**shape, **configuration})
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Files:
    """Tiny models and prompts in a folder."""

    def __init__(self, folder: Path) -> None:
        tokenizer = make_tokenizer()
        self.folder = folder
        self.student, self.math, self.code = (make_model(folder / f"model{i}", i, tokenizer) for i in range(3))
        self.foreign = make_model(folder / "foreign", 4, make_tokenizer(tuple(s[::-1] for s in SENTENCES)))
        self.prompts = self.write("prompts.jsonl", [{"prompt": s} for s in SENTENCES])
        routed = [{"messages": [{"role": "user", "content": s}], "domain": "math"} for s in SENTENCES]
        routed[1]["domain"] = "code"
        self.routed = self.write("routed.jsonl", routed)

    def adapter(self, base: str = "") -> str:
        """The configuration of an adapter."""
        folder = self.folder / "adapter"
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": base or self.student}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return str(folder)

    def changed(self, **configuration: Any) -> str:
        """A model of another shape, with the others' tokenizer."""
        return make_model(self.folder / "changed", 5, make_tokenizer(), **configuration)

    def damaged(self, name: str, change: Callable[[bytes], bytes] | str | None, also: str = "") -> str:
        """A model with one file changed, removed (None) or a link, and perhaps an empty object in another."""
        folder = self.folder / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.code, folder)
        path = folder / name
        before = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if isinstance(change, str):
            path.symlink_to(change)
        elif change is not None:
            path.write_bytes(change(before))
        if also:
            (folder / also).write_text("{}")
        return str(folder)

    def write(self, name: str, rows: list[Any]) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(self.folder / name)


def invoke(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, ["distill", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def small(files: Files, output: Path, *arguments: str, steps: int = 4) -> list[str]:
    """A run of a second, λ = 1.25, whose prompts are gone through more than once."""
    said = ["--student", files.student, "--ref", "student", "--reward-scale", "1.25", "--output", str(output)]
    said += ["--steps", str(steps), "--batch-size", "2", "--accumulation", "2", "--max-new-tokens", "5"]
    said += ["--learning-rate", "0.01", "--seed", "3", *arguments]
    if not any(a.startswith("--teacher") for a in arguments):
        said += ["--teacher", files.math]
    return said if "--prompts" in arguments else [*said, "--prompts", files.prompts]


class Whole:
    """Runs that nobody interrupts, for others to be compared with."""

    def __init__(self, files: Files, folder: Path) -> None:
        self._files, self._folder = files, folder

    def __call__(self, *arguments: str) -> Path:
        """The folder of the run with these arguments."""
        folder = self._folder / ("run" + "".join(arguments))
        if not folder.exists():
            invoke(*small(self._files, folder, *arguments))
        return folder


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run that do not depend on the machine."""
    from fused_gopd.run_metrics import TIMES

    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics_of(run)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def assert_same_weights(a: Path, b: Path) -> None:
    for (name, x), y in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(x, y), name
