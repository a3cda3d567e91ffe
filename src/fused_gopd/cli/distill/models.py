"""A run's models before their weights are loaded: damaged files, sizes, tokenizers, and prompts as they encode them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import create_model_from_path

from ...integrations.adapters import require_adapter
from ...integrations.hub import require_model
from ...integrations.trl.checks import check_vocabulary, check_weights, positions_of
from ...integrations.trl.rollouts import COMPLETION, token_ids_of
from ..demo import smollm
from ..parameters import naming


@dataclass(frozen=True)
class Model:
    """The sizes of a model of a run, and the flag that names it."""

    option: str
    name: str
    vocab: int
    positions: int | None  # None: not limited
    own_tokenizer: Any = None  # where it is not the student's

    @property
    def role(self) -> str:
        """``"student"``, ``"teacher"`` or ``"ref"``."""
        return self.option.removeprefix("--").split("-")[0]


def read(option: str, name: str, path: str, *, peft: bool = False) -> Model:
    """Read the sizes of a model; ``path`` is its folder or its name on the hub.

    The model is loaded on the meta device, without the values of its weights. That finds every error of the real
    loading: missing or damaged files, weights of another architecture or shape. Of a quantized model, whose kernels
    need a device, only the configuration is read. With ``peft`` it may be an adapter, which is put on its base.

    Raises:
        typer.BadParameter: naming the option and what is wrong.
    """
    with naming(option):
        require_model(option, path)
    try:
        config = _load(option, path, peft or option == "--ref")
        return Model(option, name, config.get_text_config().vocab_size, positions_of(config))
    except Exception as error:  # damaged files make transformers raise many types of exceptions
        raise typer.BadParameter(_unloadable(name, path, error), param_hint=option) from None


def read_adapter(option: str, path: str, base: str) -> None:
    """Raise for what is no adapter on the base; both are folders or hub names."""
    with naming(option):
        require_model(option, path)
        require_adapter(option, path, base)


def _load(option: str, path: str, peft: bool) -> Any:
    """The configuration; raises where the files cannot be loaded."""
    folder = Path(path)
    for link in sorted(folder.iterdir()) if folder.is_dir() else ():
        if link.is_symlink() and not link.exists():
            raise ValueError(f"{link} is a link to {link.readlink()}, which is not there")
    adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    if adapter and not peft:
        without = "; or with --lora, where it is one of the student's base, write adapter:FOLDER"
        raise ValueError(
            "it is a PEFT adapter: merge it into its base (merge_and_unload) and save that"
            + (without if option == "--teacher" else "")
        )
    if not adapter:
        config: Any = AutoConfig.from_pretrained(path)
        if not config.architectures:
            raise ValueError('its config.json has no "architectures"')
        if getattr(config, "quantization_config", None) is not None:
            return config
    # as in the run: TRL loads what may be no adapter
    load: Any = AutoModelForCausalLM.from_pretrained if peft else create_model_from_path
    model, found = load(path, device_map="meta", output_loading_info=True)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no causal language model")
    check_weights("it", found)
    return model.config


def read_tokenizer(option: str, name: str, path: str) -> Any:
    """Load a model's tokenizer; raises as :func:`read`."""
    try:
        return AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
    except Exception as error:
        message = f"{name!r} has no tokenizer that can be loaded: {first_line(error)}"
        raise typer.BadParameter(message, param_hint=option) from None


def _unloadable(name: str, path: str, error: Exception) -> str:
    if isinstance(error, OSError) and not Path(path).is_dir():
        return f"{name!r} is neither a model's folder nor a model on the hub that can be reached: {first_line(error)}"
    return f"{name!r} cannot be loaded: {first_line(error)}"


def first_line(error: Exception) -> str:
    """First line of another library's error, with its type where the message alone does not explain it."""
    lines = str(error).strip().splitlines()
    if "ignore_mismatched_sizes" in str(error):
        return "its weights are of another shape than its config.json says"
    if isinstance(error, (OSError, ValueError)) and lines:
        return lines[0]
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"


def check_sizes(models: Sequence[Model], tokenizer: Any, k: int | None) -> None:
    """Raise for vocabularies that do not match each other, the padding token or ``k``. ``models[0]`` is the student."""
    student = models[0]
    padding = tokenizer.pad_token_id
    if padding is not None and padding >= student.vocab:
        raise typer.BadParameter(
            f"the padding token {tokenizer.pad_token!r} of {student.name} has the id {padding}, and the model has "
            f"{student.vocab} tokens: resize its embeddings (resize_token_embeddings), or use another padding token",
            param_hint=student.option,
        )
    for model in models[1:]:
        with naming(model.option):
            check_vocabulary(model.name, model.vocab, student.vocab, tokenizer)
    smallest = min(models, key=lambda model: model.vocab)
    if k is not None and k > smallest.vocab:
        raise typer.BadParameter(
            f"must be at most {smallest.vocab}, the vocabulary of {smallest.name}, got {k}", param_hint="--k"
        )


def check_prompts(
    prompts: Sequence[Any],
    rows: Sequence[int],
    path: str,
    models: Sequence[Model],
    tokenizer: Any,
    new_tokens: int,
    variables: Mapping[str, Any],
) -> None:
    """Raise for prompts that a tokenizer or chat template refuses, or that are too long for a model.

    ``tokenizer`` is that of ``models[0]``, as a rule the student, and of all others that have none of their own.
    ``rows`` are the row numbers of the prompts in the file, ``variables`` those of the chat templates.
    """
    student, *foreign = models[0], *(model for model in models if model.own_tokenizer is not None)
    limited = [(x.positions, x) for x in models if x.positions is not None and x not in foreign]
    positions, shortest = min(limited, key=lambda pair: pair[0], default=(None, student))
    if positions is not None and positions <= new_tokens:
        raise typer.BadParameter(
            f"must be less than the {positions} positions of {shortest.name} ({shortest.option}), got {new_tokens}",
            param_hint="--max-new-tokens",
        )
    long: list[str] = []
    for row, prompt in zip(rows, prompts, strict=True):
        for model in foreign:
            read = len(encoded(prompt, model.own_tokenizer, variables, f"{path}, row {row}", model.name))
            if model.positions is not None and read + new_tokens > model.positions:
                raise typer.BadParameter(
                    f"{path} has prompts that are too long: row {row} of {read} tokens of {model.name} "
                    f"({model.option}), which has {model.positions} positions, with --max-new-tokens {new_tokens}",
                    param_hint="--prompts",
                )
        whose = "the student" if student.role == "student" else student.name
        ids = encoded(prompt, tokenizer, variables, f"{path}, row {row}", whose)
        if max(ids) >= student.vocab:
            raise typer.BadParameter(
                f"{path}, row {row}, has the token {tokenizer.convert_ids_to_tokens(max(ids))!r} of id {max(ids)}, and "
                f"{student.name} has {student.vocab} tokens: resize its embeddings (resize_token_embeddings)",
                param_hint=student.option,
            )
        if positions is not None and len(ids) + new_tokens > positions:
            long.append(f"row {row} of {len(ids)} tokens")
    if positions is not None and long:
        more = f" and {len(long) - 5} more" if len(long) > 5 else ""
        raise typer.BadParameter(
            f"{path} has prompts that are too long: {', '.join(long[:5])}{more}. With --max-new-tokens {new_tokens} a "
            f"prompt may have {positions - new_tokens}, because {shortest.name} ({shortest.option}) has {positions} "
            "positions: leave them out of the file, or lower --max-new-tokens",
            param_hint="--prompts",
        )


def check_completions(
    dataset: Any, rows: Sequence[int], path: str, tokenizer: Any, new_tokens: int, variables: Mapping[str, Any]
) -> None:
    """Raise for answers of the file that the trainer cannot tokenize. ``rows`` are the row numbers in the file."""
    given = zip(rows, dataset["prompt"], dataset[COMPLETION], strict=True)
    for row, prompt, completion in given:
        completion_ids(
            prompt,
            completion,
            [],
            tokenizer,
            variables,
            f"{path}, row {row}",
            "--completion-column",
            longest=new_tokens,
        )


def completion_ids(
    prompt: Any,
    completion: Any,
    prompt_ids: Sequence[int],
    tokenizer: Any,
    variables: Mapping[str, Any],
    where: str,
    option: str,
    *,
    longest: int = sys.maxsize,
) -> list[int]:
    """The token ids of an answer of the file, made as the trainer makes them.

    Raises:
        typer.BadParameter: naming ``option``, ``where`` and what is wrong.
    """
    try:
        return token_ids_of(
            prompt,
            completion,
            prompt_ids,
            tokenizer=tokenizer,
            render=partial(tokenizer.apply_chat_template, tokenize=False, **variables),
            end_ids=[tokenizer.eos_token_id],
            longest=longest,
        )
    except Exception as error:  # a template may raise anything
        wrong = str(error) if type(error) in (ValueError, TypeError) else first_line(error)
        raise typer.BadParameter(f"{where}: {wrong}", param_hint=option) from None


def check_template_variables(tokenizer: Any, prompts: Sequence[Any], variables: Mapping[str, Any]) -> None:
    """Raise for variables that the student's chat template does not have, or that are no variables of templates."""
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in variables:
        if isinstance(prompts[0], str):
            wrong = "is for chat templates, and the prompts are texts that are taken as they are"
        elif name in own:
            wrong = f"cannot set {name!r}: an argument of apply_chat_template, which the training sets itself"
        elif not re.search(rf"\b{re.escape(name)}\b", _template(tokenizer)):
            wrong = f"sets {name!r}, and the student's chat template has no variable of this name"
        else:
            continue
        raise typer.BadParameter(wrong, param_hint="--chat-template-kwargs")


def _template(tokenizer: Any) -> str:
    found = tokenizer.chat_template
    return " ".join(found.values()) if isinstance(found, dict) else str(found)


def rendered(prompt: Any, tokenizer: Any, variables: Mapping[str, Any]) -> str:
    """A prompt as a model reads it: a text, or what the chat template makes of messages."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **variables))


def encoded(prompt: Any, tokenizer: Any, variables: Mapping[str, Any], where: str, whose: str) -> list[int]:
    """The token ids of a prompt, made as the trainer makes them."""
    try:
        if isinstance(prompt, str):
            ids = tokenizer(text=prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **variables
            )["input_ids"]
    except Exception as error:  # templates may raise any exception
        what = "tokenizer" if isinstance(prompt, str) else "chat template"
        raise typer.BadParameter(
            f"{where}, is not taken by {whose}'s {what}: {first_line(error)}", param_hint="--prompts"
        ) from None
    if not ids:
        raise typer.BadParameter(f"{where}, has no tokens for {whose}'s tokenizer", param_hint="--prompts")
    return list(ids)


def dtype_of(name: str) -> str:
    """The dtype of an option ``--dtype``, or where that is empty the default."""
    return name or ("bfloat16" if torch.cuda.is_available() else "float32")


def local(name: str) -> str:
    """The folder or hub name of a model; the folder of smollm2 is made from its package when it is first needed."""
    if name != "smollm2" or Path(name).is_dir():
        return name
    try:
        return str(smollm.local_copy())
    except smollm.DemoError as error:
        typer.echo(f"error: smollm2: {error}", err=True)
        raise typer.Exit(2) from None
