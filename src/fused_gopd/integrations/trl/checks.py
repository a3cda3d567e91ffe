"""What can be known to be wrong with the models and the data before a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from ... import gopd_loss
from ...checks import require_count
from ...heads import LinearHead, Logits, Source, TokenLogProbs, TopKLogProbs

Scorer = Callable[[Tensor, Tensor, Tensor], Source]
"""A model somewhere else: ``(input_ids, attention_mask, completion_mask) -> TokenLogProbs | TopKLogProbs``.

Ids and mask are (B, P + K), prompts padded on the left and completions on the right; the completion mask is (B, K), and
so is the token shape of what is returned.
"""
Model = str | nn.Module | Scorer
"""A path or hub name, a model, or a scorer."""


def routes_of(teacher: Model | Mapping[Any, Model], column: str | None) -> dict[Any, Model]:
    """The teachers by route; one teacher has the route None."""
    if teacher is None:
        raise TypeError("teacher must be given: a model, its path, a scorer, or a dict from route to one of these")
    if not isinstance(teacher, Mapping):
        if column is not None:
            raise TypeError(f"route_column={column!r} needs a dict of teachers, one for each route, got one teacher")
        return {None: teacher}
    if not teacher:
        raise ValueError("teacher must have one route at least, got an empty dict")
    if column is None:
        routes = ", ".join(map(repr, teacher))
        raise ValueError(f"a dict of teachers ({routes}) needs route_column, the column that names them, in args")
    return dict(teacher)


def check_kind(name: str, model: object, temperature: float) -> None:
    """A model, its path, or a scorer; one that says its temperature, as a server's, has that of the completions."""
    if isinstance(model, (str, nn.Module)):
        return
    if not callable(model):
        raise TypeError(f"{name} must be a model, its path, or a scorer, got {type(model).__name__}")
    own = getattr(model, "temperature", None)
    if own is not None and own != temperature:
        raise ValueError(
            f"{name} returns log-probs of temperature {own}, and completions are sampled at temperature={temperature}: "
            f"sample at {own}, or use a model that runs here"
        )


def check_routes(routes: Mapping[Any, Model], column: str, name: str, dataset: Any) -> None:
    """Every route of a dataset has a teacher; what is streamed is checked batch by batch."""
    if isinstance(dataset, Mapping):
        for split, part in dataset.items():
            check_routes(routes, column, f"{name}[{split!r}]", part)
    elif hasattr(dataset, "unique"):
        if column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r} (route_column), only {', '.join(dataset.column_names)}")
        for route in dataset.unique(column):
            require_route(routes, f"column {column!r} of {name}", route)


def require_route(routes: Mapping[Any, object], where: str, route: object) -> None:
    if route not in routes:
        raise ValueError(
            f"no teacher for the route {route!r}, which is in {where}: teacher has {', '.join(map(repr, routes))}"
        )


def try_options(
    options: dict[str, Any], routes: Mapping[Any, Model], ref_model: Model | None, device: torch.device
) -> None:
    """One loss of one token: what is wrong with the options is said before anything is loaded or sampled."""
    options = dict(options)
    if options.get("k") is not None:
        require_count("k", options["k"])
    if "clip" in options:
        options["old_logprobs"] = torch.full((1, 1), -1.0, device=device)
    dtype = options.get("chunk_dtype")
    counts = [_listed_tokens(model, options) or 0 for model in (*routes.values(), ref_model)]
    vocabulary = max(8, options.get("k") or 0, *counts)
    head: LinearHead | Logits = Logits(torch.zeros(1, 1, vocabulary, device=device))
    if dtype is not None:  # which depends on the device of hidden states
        hidden = torch.zeros(1, 1, 8, dtype=dtype, device=device)
        head = LinearHead(hidden, torch.zeros(vocabulary, 8, dtype=dtype, device=device))
    token_ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def trial_source(model: Model) -> Source:
        """What the model returns for one token: a head, the token's log-prob, or log-probs of a uniform top k."""
        if isinstance(model, (str, nn.Module)):
            return head
        k = _listed_tokens(model, options)
        if k is None:
            return TokenLogProbs(torch.full((1, 1), -1.0, device=device))
        listed = torch.arange(k, device=device)[None, None]
        return TopKLogProbs(listed, torch.full(listed.shape, -math.log(vocabulary), device=device))

    # a scorer without top_k may return anything as the reference
    ref = trial_source(cast("Model", ref_model)) if hasattr(ref_model, "top_k") else head
    for model in routes.values():
        gopd_loss(head, trial_source(model), ref, token_ids, reward_scale=1.25, **options)


def _listed_tokens(model: Model | None, options: Mapping[str, Any]) -> int | None:
    """The number of tokens that a scorer lists at each position; None if it returns the tokens' own log-probs.

    A scorer may say it in ``top_k``, as a server's does; otherwise it is what the options ask for.
    """
    if model is None or isinstance(model, (str, nn.Module)):
        return None
    asked = (options.get("k") or 1) if options["estimator"] == "topk" else None
    return cast("int | None", getattr(model, "top_k", asked))


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    return cast("PreTrainedTokenizerBase", tokenizer)


def check_tokenizers(name: str, student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Ids that both have are the same tokens."""
    ours = {i: token for token, i in student.get_vocab().items()}
    theirs = {i: token for token, i in other.get_vocab().items()}
    different = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    if different:
        shown = ", ".join(f"{i}: {ours[i]!r} and {theirs[i]!r}" for i in different[:3])
        raise ValueError(
            f"the tokenizers of the student and of {name} differ at {len(different)} ids that both have ({shown}): "
            "log-probs of one are not those of the other's tokens. Use models of one tokenizer"
        )


def positions_of(config: Any) -> int | None:
    """How many positions a model was made for; None where its configuration has no limit.

    Rotary embeddings that are scaled for longer sequences reach as far as their factor says, whether or not
    ``max_position_embeddings`` was raised with it (Qwen2.5's model cards add YaRN by ``rope_scaling`` alone).
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    rotary = getattr(text, "rope_parameters", None) or {}
    scaled = int((rotary.get("original_max_position_embeddings") or 0) * (rotary.get("factor") or 1))
    return max(positions, scaled)


def check_weights(name: str, found: Mapping[str, Any]) -> None:
    """``found`` is the loading info of ``from_pretrained``, which makes up the weights that it does not find."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of its weights, such as {missing[0]}, and would have random ones in their "
            "place: its config.json is that of another model, or its files are not all there"
        )


def check_vocabulary(name: str, size: int, student: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model of ``size`` tokens scores all that a student of ``student`` tokens can say."""
    last = min(max(tokenizer.get_vocab().values()), student - 1)
    if size <= last:
        raise ValueError(
            f"{name} has {size} tokens, and the student's tokenizer goes up to id {last}: it cannot score all that "
            "the student says. Use models of one tokenizer"
        )


def find_tokenizer(source: Model, model: nn.Module, **options: Any) -> PreTrainedTokenizerBase | None:
    """What lies beside a model: loaded by its name if the model was, else only if it is on this machine."""
    name = source if isinstance(source, str) else get_config_model_id(cast("Any", model).config)
    if not name:
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=not isinstance(source, str), **options)
    except Exception as error:  # a damaged file makes transformers raise all kinds
        if next(Path(name).glob("tokenizer*"), None) is not None:
            raise ValueError(
                f"the tokenizer in {name} cannot be loaded ({type(error).__name__}: {error}), to be compared with the "
                "student's: mend it, or pass teacher_processing_class"
            ) from error
        if not isinstance(error, (OSError, ValueError)):
            raise
        return None  # there is none
    return cast("PreTrainedTokenizerBase", found)
