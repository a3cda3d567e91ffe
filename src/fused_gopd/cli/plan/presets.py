"""The output heads of published models, for ``fused-gopd plan``, and those of models on this machine.

Sizes are those of the models' own configuration files: the rows of the head in the checkpoint, padding included.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import typer


@dataclass(frozen=True)
class Preset:
    """The head of a published model."""

    hidden: int
    vocab: int
    tied: bool  # the head is the embedding matrix
    hub: tuple[str, ...] = ()  # the models on the hub that have it


def _hub(owner: str, *models: str) -> tuple[str, ...]:
    return tuple(f"{owner}/{model}" for model in models)


def _qwen(model: str, *suffixes: str) -> tuple[str, ...]:
    return _hub("Qwen", model, *(model + suffix for suffix in suffixes))


def _llama(model: str) -> tuple[str, ...]:
    return _hub("meta-llama", model, f"{model}-Instruct")


def _gemma(model: str, *suffixes: str) -> tuple[str, ...]:
    return _hub("google", *(model + suffix for suffix in suffixes))


def _smollm(model: str, *suffixes: str) -> tuple[str, ...]:
    return _hub("HuggingFaceTB", model, *(model + suffix for suffix in suffixes))


_2507 = ("-Instruct-2507", "-Thinking-2507")

PRESETS: dict[str, Preset] = {
    "qwen2.5-0.5b": Preset(896, 151936, True, _qwen("Qwen2.5-0.5B", "-Instruct")),
    "qwen2.5-1.5b": Preset(1536, 151936, True, _qwen("Qwen2.5-1.5B", "-Instruct")),
    "qwen2.5-3b": Preset(2048, 151936, True, _qwen("Qwen2.5-3B", "-Instruct")),
    "qwen2.5-7b": Preset(3584, 152064, False, _qwen("Qwen2.5-7B", "-Instruct")),
    "qwen2.5-14b": Preset(5120, 152064, False, _qwen("Qwen2.5-14B", "-Instruct")),
    "qwen2.5-32b": Preset(5120, 152064, False, _qwen("Qwen2.5-32B", "-Instruct")),
    "qwen2.5-72b": Preset(8192, 152064, False, _qwen("Qwen2.5-72B", "-Instruct")),
    "qwen3-0.6b": Preset(1024, 151936, True, _qwen("Qwen3-0.6B", "-Base")),
    "qwen3-1.7b": Preset(2048, 151936, True, _qwen("Qwen3-1.7B", "-Base")),
    "qwen3-4b": Preset(2560, 151936, True, _qwen("Qwen3-4B", "-Base", *_2507)),
    "qwen3-8b": Preset(4096, 151936, False, _qwen("Qwen3-8B", "-Base")),
    "qwen3-14b": Preset(5120, 151936, False, _qwen("Qwen3-14B", "-Base")),
    "qwen3-32b": Preset(5120, 151936, False, _qwen("Qwen3-32B")),
    "qwen3-30b-a3b": Preset(2048, 151936, False, _qwen("Qwen3-30B-A3B", "-Base", *_2507)),
    "qwen3-235b-a22b": Preset(4096, 151936, False, _qwen("Qwen3-235B-A22B", *_2507)),
    "qwen3-next-80b-a3b": Preset(
        2048, 151936, False, _hub("Qwen", "Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next-80B-A3B-Thinking")
    ),
    "qwen3.5-0.8b": Preset(1024, 248320, True, _qwen("Qwen3.5-0.8B")),
    "qwen3.5-4b": Preset(2560, 248320, True, _qwen("Qwen3.5-4B")),
    "qwen3.5-9b": Preset(4096, 248320, False, _qwen("Qwen3.5-9B")),
    "qwen3.5-27b": Preset(5120, 248320, False, _qwen("Qwen3.5-27B")),
    "qwen3.5-35b-a3b": Preset(2048, 248320, False, _qwen("Qwen3.5-35B-A3B")),
    "llama-3-8b": Preset(4096, 128256, False, _llama("Meta-Llama-3-8B")),
    "llama-3-70b": Preset(8192, 128256, False, _llama("Meta-Llama-3-70B")),
    "llama-3.1-8b": Preset(4096, 128256, False, _llama("Llama-3.1-8B") + _llama("Meta-Llama-3.1-8B")),
    "llama-3.1-70b": Preset(8192, 128256, False, _llama("Llama-3.1-70B") + _llama("Meta-Llama-3.1-70B")),
    "llama-3.1-405b": Preset(16384, 128256, False, _llama("Llama-3.1-405B") + _llama("Meta-Llama-3.1-405B")),
    "llama-3.2-1b": Preset(2048, 128256, True, _llama("Llama-3.2-1B")),
    "llama-3.2-3b": Preset(3072, 128256, True, _llama("Llama-3.2-3B")),
    "llama-3.3-70b": Preset(8192, 128256, False, _hub("meta-llama", "Llama-3.3-70B-Instruct")),
    "mistral-7b-v0.1": Preset(
        4096, 32000, False, _hub("mistralai", "Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.1", "Mistral-7B-Instruct-v0.2")
    ),
    "mistral-7b-v0.3": Preset(4096, 32768, False, _hub("mistralai", "Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.3")),
    "mistral-nemo-12b": Preset(
        5120, 131072, False, _hub("mistralai", "Mistral-Nemo-Base-2407", "Mistral-Nemo-Instruct-2407")
    ),
    "mixtral-8x7b": Preset(4096, 32000, False, _hub("mistralai", "Mixtral-8x7B-v0.1", "Mixtral-8x7B-Instruct-v0.1")),
    "gemma-2-2b": Preset(2304, 256000, True, _gemma("gemma-2-2b", "", "-it")),
    "gemma-2-9b": Preset(3584, 256000, True, _gemma("gemma-2-9b", "", "-it")),
    "gemma-2-27b": Preset(4608, 256000, True, _gemma("gemma-2-27b", "", "-it")),
    # those that see images have 64 rows more
    "gemma-3-270m": Preset(640, 262144, True, _gemma("gemma-3-270m", "", "-it")),
    "gemma-3-1b": Preset(1152, 262144, True, _gemma("gemma-3-1b", "-pt", "-it")),
    "gemma-3-4b": Preset(2560, 262208, True, _gemma("gemma-3-4b", "-pt", "-it")),
    "gemma-3-12b": Preset(3840, 262208, True, _gemma("gemma-3-12b", "-pt", "-it")),
    "gemma-3-27b": Preset(5376, 262208, True, _gemma("gemma-3-27b", "-pt", "-it")),
    "phi-2": Preset(2560, 51200, False, _hub("microsoft", "phi-2")),
    "phi-3-mini": Preset(3072, 32064, False, _hub("microsoft", "Phi-3-mini-4k-instruct", "Phi-3-mini-128k-instruct")),
    "phi-3.5-mini": Preset(3072, 32064, False, _hub("microsoft", "Phi-3.5-mini-instruct")),
    "phi-4": Preset(5120, 100352, False, _hub("microsoft", "phi-4", "Phi-4-reasoning", "Phi-4-reasoning-plus")),
    "phi-4-mini": Preset(3072, 200064, True, _hub("microsoft", "Phi-4-mini-instruct", "Phi-4-mini-reasoning")),
    "gpt-oss-20b": Preset(2880, 201088, False, _hub("openai", "gpt-oss-20b")),
    "gpt-oss-120b": Preset(2880, 201088, False, _hub("openai", "gpt-oss-120b")),
    "deepseek-v2-lite": Preset(2048, 102400, False, _hub("deepseek-ai", "DeepSeek-V2-Lite", "DeepSeek-V2-Lite-Chat")),
    "deepseek-v2": Preset(5120, 102400, False, _hub("deepseek-ai", "DeepSeek-V2", "DeepSeek-V2-Chat")),
    "deepseek-v3": Preset(7168, 129280, False, _hub("deepseek-ai", "DeepSeek-V3", "DeepSeek-V3-Base")),
    "deepseek-v3.2": Preset(7168, 129280, False, _hub("deepseek-ai", "DeepSeek-V3.2")),
    "deepseek-r1": Preset(7168, 129280, False, _hub("deepseek-ai", "DeepSeek-R1")),
    "deepseek-r1-distill-qwen-1.5b": Preset(1536, 151936, False, _hub("deepseek-ai", "DeepSeek-R1-Distill-Qwen-1.5B")),
    "deepseek-r1-distill-qwen-7b": Preset(3584, 152064, False, _hub("deepseek-ai", "DeepSeek-R1-Distill-Qwen-7B")),
    "deepseek-r1-distill-llama-8b": Preset(4096, 128256, False, _hub("deepseek-ai", "DeepSeek-R1-Distill-Llama-8B")),
    "deepseek-r1-distill-llama-70b": Preset(8192, 128256, False, _hub("deepseek-ai", "DeepSeek-R1-Distill-Llama-70B")),
    "smollm2-135m": Preset(576, 49152, True, _smollm("SmolLM2-135M", "-Instruct")),
    "smollm2-360m": Preset(960, 49152, True, _smollm("SmolLM2-360M", "-Instruct")),
    "smollm2-1.7b": Preset(2048, 49152, True, _smollm("SmolLM2-1.7B", "-Instruct")),
    "smollm3-3b": Preset(2048, 128256, True, _smollm("SmolLM3-3B", "-Base")),
}


class HeadSize(NamedTuple):
    """The size of a head; None where a configuration file leaves it to the defaults of its family."""

    hidden: int | None
    vocab: int | None


def _by_name() -> dict[str, Preset]:
    """The presets by all their names, in small letters: their own, and the hub's with and without the owner."""
    found = {**PRESETS, "smollm2": PRESETS["smollm2-135m"]}  # which distill has it by
    for preset in PRESETS.values():
        for name in preset.hub:
            for known in (name.lower(), name.lower().partition("/")[2]):
                found.setdefault(known, preset)
    return found


def head_size(model: str, option: str) -> HeadSize:
    """The head of a model's folder, of a ``config.json``, or of a preset.

    Raises:
        typer.BadParameter: naming the option.
    """
    path = Path(model).expanduser()
    if path.exists():
        return _configured(path / "config.json" if path.is_dir() else path, option)
    known = _by_name()
    preset = known.get(model.lower())
    if preset is not None:
        return HeadSize(preset.hidden, preset.vocab)
    if model.startswith((".", "/", "~")) or model.endswith(".json") or model.count("/") > 1:
        raise typer.BadParameter(f"there is no folder and no file {model}", param_hint=option)
    close = difflib.get_close_matches(model.lower(), known, n=3)
    raise typer.BadParameter(
        f"unknown model {model!r}: expected a preset or its name on the hub (--list-models shows them"
        f"{'; close: ' + ', '.join(close) if close else ''}), a model's folder, or a config.json; or give --hidden and "
        "--vocab in its place",
        param_hint=option,
    )


def _configured(path: Path, option: str) -> HeadSize:
    """The head that a configuration file describes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON ({error})"
        raise typer.BadParameter(f"{path} cannot be read: {reason}", param_hint=option) from None
    if not isinstance(config, dict):
        raise typer.BadParameter(f"{path} is no model's configuration: it must be an object", param_hint=option)
    inner = config.get("text_config")  # of a model that also takes images
    parts = [config, *([inner] if isinstance(inner, dict) else [])]
    return HeadSize(
        _size(parts, ("hidden_size", "n_embd", "d_model"), path, option), _size(parts, ("vocab_size",), path, option)
    )


def _size(parts: Sequence[Mapping[str, Any]], names: tuple[str, ...], path: Path, option: str) -> int | None:
    for part in parts:
        for name in names:
            value = part.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise typer.BadParameter(
                    f"{name} in {path} must be a positive integer, got {value!r}", param_hint=option
                )
            return value
    return None
