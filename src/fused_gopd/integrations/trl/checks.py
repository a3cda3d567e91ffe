"""Checks of models, tokenizers and data before a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from ... import gopd_loss
from ...heads import LinearHead, Logits, Source, TokenLogProbs, TopKLogProbs
from ..cache import CachedTeacher, TeacherCache
from ..hub import STUDENT
from ..tokenizers import TokenizerPair
from .frozen import REF_MODEL, Model, teacher_name


def named(routes: Mapping[Any, Model]) -> dict[str, Model]:
    """The teachers by what messages call them."""
    return {teacher_name(route): model for route, model in routes.items()}


def check_kind(name: str, model: object, temperature: float) -> None:
    """Raise for what is no model, path or scorer, and for a scorer of another temperature than the completions'."""
    if isinstance(model, (str, nn.Module)):
        return
    if not callable(model):
        raise TypeError(f"{name} must be a model, its path, or a scorer, got {type(model).__name__}")
    own = getattr(model, "temperature", None)
    if own is not None and own != temperature:
        other = "use a model that runs here"
        if head_of_scorer(model) is not None:  # of hidden states any temperature can be had
            other = f"make it with temperature={temperature}"
        raise ValueError(
            f"{name} returns log-probs of temperature {own}, and completions are sampled at temperature={temperature}: "
            f"sample at {own}, or {other}"
        )


def check_reference(args: Any, ref_model: Model | None, *, has_function: bool) -> None:
    """Raise for a reference that is missing or no model, and for lambda given twice.

    Args:
        args: the trainer's configuration.
        ref_model: the reference.
        has_function: whether a ``reward_scale_fn`` gives lambda.
    """
    scale = f"reward_scale={args.reward_scale}"
    if args.reward_scale_end is not None:
        scale += f" to reward_scale_end={args.reward_scale_end}"
    if has_function and args._needs_reference:
        raise ValueError(f"reward_scale_fn is in the place of {scale}, which would be ignored: give one of the two")
    if ref_model is not None:
        check_kind(REF_MODEL, ref_model, args.temperature)
    elif has_function or args._needs_reference or args._penalty is not None:
        what = "a reward_scale_fn" if has_function else scale if args._needs_reference else args._penalty
        raise ValueError(
            f"ref_model must be given for {what}: only reward_scale=1 without a KL penalty does without a reference. "
            'It is usually the student before training: ref_model="student", or, for a new PEFT adapter, '
            'ref_model="base", which needs no copy'
        )


def open_cache(args: Any, models: Mapping[str, Model | None]) -> TeacherCache | None:
    """The cache of ``args``, the same object as a scorer's of that folder; raises for a scorer without a cache."""
    if args.teacher_cache is None:
        return None
    cache = TeacherCache(args.teacher_cache, max_bytes=args.teacher_cache_max_bytes)
    for name, model in models.items():
        if model is not None and not isinstance(model, (str, nn.Module, CachedTeacher)):
            raise TypeError(
                f"teacher_cache stores what models here compute, and {name} is a scorer: give "
                "TeacherCache(path).scorer(scorer) in its place (fused_gopd.integrations.cache)"
            )
        if isinstance(model, CachedTeacher) and model.cache.path == cache.path:
            if args.teacher_cache_max_bytes not in (None, model.cache.max_bytes):
                raise ValueError(
                    f"teacher_cache_max_bytes must be that of {name}'s cache in the same folder, "
                    f"{model.cache.max_bytes}, got {args.teacher_cache_max_bytes}"
                )
            cache = model.cache
    return cache


def takes_token_ids(model: object) -> bool:
    """Whether it is a scorer with a fourth argument, for tokens to score."""
    if isinstance(model, (str, nn.Module)) or not callable(model):
        return False
    try:
        inspect.signature(model).bind(None, None, None, None)
    except (TypeError, ValueError):  # it takes fewer, or does not say what it takes
        return False
    return True


def scores_students_tokens(options: Mapping[str, Any], teachers: Mapping[str, Model]) -> bool:
    """Whether the teachers are scorers that get the student's likeliest tokens. ``teachers`` are by their names."""
    if options["estimator"] != "topk" or options.get("support") != "student":
        return False
    taking = [name for name, model in teachers.items() if takes_token_ids(model)]
    if taking and len(taking) < len(teachers):
        other = next(name for name in teachers if name not in taking)
        raise TypeError(
            f"support='student' has {taking[0]} score the student's tokens elsewhere, and {other} here: give teachers "
            "of one kind, or support='teacher'"
        )
    if taking and not options.get("k"):
        raise ValueError("k must be given for support='student': how many of its tokens the teacher scores")
    return bool(taking)


def check_scored_tokens(teachers: Mapping[str, Model | None], k: int) -> None:
    """Raise where a server does not score k tokens that are named to it."""
    for name, model in teachers.items():
        require = getattr(model, "require_requested_ids", None)  # of a ServerTeacher
        if require is not None and takes_token_ids(model):
            try:
                require(k)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def check_student_as_teacher(args: Any, teachers: Mapping[str, Model], alike: Sequence[str], lambda_is_1: bool) -> None:
    """Check the options of a teacher that is the student.

    Args:
        args: the trainer's configuration.
        teachers: by their names.
        alike: the names of those that read the student's own prompt.
        lambda_is_1: in all steps.
    """
    own = [name for name, source in teachers.items() if isinstance(source, str) and source == STUDENT]
    moves = args._teacher_moves
    if moves is not None and not own:
        raise ValueError(f'{moves} is for teacher="student", the student itself, and {", ".join(teachers)} is not it')
    if not own:
        return
    if moves is not None and args.teacher_cache is not None:
        raise ValueError(
            f"teacher_cache has no use for {own[0]}, which changes with the student ({moves}): what it scores once it "
            "never scores again. Leave teacher_cache out"
        )
    idle = [name for name in own if name in alike]
    if idle and lambda_is_1:
        weights = [getattr(args, name, 0.0) for name in ("entropy_weight", "outcome_weight", "sft_weight")]
        if not args._following.teaches(other_terms=any(weights) or args._penalty is not None):
            raise ValueError(
                f'{idle[0]}="student" reads the prompt that the student reads, so that at reward_scale=1 both say the '
                "same and every gradient is 0: give the teacher another prompt (teacher_prompt)"
            )


def check_routes(routes: Mapping[Any, Model], column: str, name: str, dataset: Any) -> None:
    """Raise for a route of a dataset without a teacher; streamed datasets are checked batch by batch instead."""
    if isinstance(dataset, Mapping):
        for split, part in dataset.items():
            check_routes(routes, column, f"{name}[{split!r}]", part)
    elif hasattr(dataset, "unique"):
        check_column("route_column", column, name, dataset)
        for route in dataset.unique(column):
            require_route(routes, f"column {column!r} of {name}", route)


def check_column(option: str, column: str, name: str, dataset: Any) -> None:
    """Raise for a dataset without a column that an option names; streamed datasets are checked batch by batch."""
    if isinstance(dataset, Mapping):
        for split, part in dataset.items():
            check_column(option, column, f"{name}[{split!r}]", part)
    elif hasattr(dataset, "unique") and column not in dataset.column_names:
        raise ValueError(f"{name} has no column {column!r} ({option}), only {', '.join(dataset.column_names)}")


def require_route(routes: Mapping[Any, object], where: str, route: object) -> None:
    """Raise for a route that is not among ``routes``."""
    if route not in routes:
        raise ValueError(
            f"no teacher for the route {route!r}, which is in {where}: teacher has {', '.join(map(repr, routes))}"
        )


def dry_run(
    options: dict[str, Any], routes: Mapping[Any, Model], ref_model: Model | None, device: torch.device
) -> None:
    """Compute the loss of one token, to raise for wrong options before anything is loaded or sampled."""
    options = dict(options)
    for name, used in (("old_logprobs", "clip" in options), ("rollout_logprobs", "rollout_is" in options)):
        if used:
            options[name] = torch.full((1, 1), -1.0, device=device)
    dtype = options.get("chunk_dtype")
    asked = scores_students_tokens(options, named(routes))
    options |= {"support": "teacher"} if asked else {}  # what scorers are asked about is what they list
    counts = [_top_k(model, options, asked) or 0 for model in (*routes.values(), ref_model)]
    vocabulary = max(8, options.get("k") or 0, *counts)
    head: LinearHead | Logits = Logits(torch.zeros(1, 1, vocabulary, device=device))
    if dtype is not None:  # its check depends on the device of hidden states
        hidden = torch.zeros(1, 1, 8, dtype=dtype, device=device)
        head = LinearHead(hidden, torch.zeros(vocabulary, 8, dtype=dtype, device=device))
    token_ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def trial_source(model: Model) -> Source:
        """A stand-in for the model's scores of one token: a head, its log-prob, or uniform log-probs of k tokens."""
        if isinstance(model, (str, nn.Module)) or head_of_scorer(model) is not None:
            return head
        k = _top_k(model, options, asked)
        if k is None:
            return TokenLogProbs(torch.full((1, 1), -1.0, device=device))
        top_ids = torch.arange(k, device=device)[None, None]
        uniform = torch.full(top_ids.shape, -math.log(vocabulary), device=device)
        return TopKLogProbs(top_ids, uniform, uniform[..., 0])  # a scorer may leave the last one out

    # a scorer without top_k may return anything as the reference
    ref = trial_source(cast("Model", ref_model)) if hasattr(ref_model, "top_k") else head
    for model in routes.values():
        gopd_loss(head, trial_source(model), ref, token_ids, reward_scale=1.25, **options)


def head_of_scorer(scorer: object) -> Any:
    """The attribute ``head`` of a scorer that returns hidden states; None of one that returns log-probs."""
    return getattr(scorer, "head", None)


def _top_k(model: Model | None, options: Mapping[str, Any], asked: bool) -> int | None:
    """Number of tokens per position that a scorer returns; None if it returns the sampled tokens' log-probs.

    Its attribute ``top_k`` if it has one, as a server's scorer, and is not asked about tokens; otherwise the value that
    the options need.
    """
    if model is None or isinstance(model, (str, nn.Module)) or head_of_scorer(model) is not None:
        return None
    needed = (options.get("k") or 1) if options["estimator"] == "topk" else None
    return needed if asked and takes_token_ids(model) else cast("int | None", getattr(model, "top_k", needed))


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    return cast("PreTrainedTokenizerBase", tokenizer)


def check_tokenizers(
    name: str, student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, **cross: Any
) -> TokenizerPair | None:
    """Raise where an id that both tokenizers have stands for different tokens, unless other tokenizers are meant.

    Args:
        name: whose tokenizer ``other`` is.
        cross: ``cross_tokenizer=True`` says that other tokenizers are meant; what else there is are arguments of
            :class:`fused_gopd.integrations.tokenizers.TokenizerPair`.

    Returns:
        None where all ids that both have are the same tokens; with ``cross_tokenizer`` the pair of other tokenizers,
        which says what they have in common.
    """
    meant = cross.pop("cross_tokenizer", False)
    ours = {i: token for token, i in student.get_vocab().items()}
    theirs = {i: token for token, i in other.get_vocab().items()}
    different = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    if different and meant:
        return TokenizerPair(student, other, name=name, **cross)
    if different:
        shown = ", ".join(f"{i}: {ours[i]!r} and {theirs[i]!r}" for i in different[:3])
        raise ValueError(
            f"the tokenizers of the student and of {name} differ at {len(different)} ids that both have ({shown}): "
            "log-probs of one are not those of the other's tokens. Use models of one tokenizer, or have texts compared "
            "in place of ids: cross_tokenizer=True in GOPDConfig, --cross-tokenizer of `fused-gopd distill`"
        )
    return None


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model supports; None where its configuration has no limit.

    Scaled rotary embeddings extend it by their factor, whether or not ``max_position_embeddings`` was raised too
    (Qwen2.5's model cards enable YaRN by ``rope_scaling`` alone).
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    rotary = getattr(text, "rope_parameters", None) or {}
    scaled = int((rotary.get("original_max_position_embeddings") or 0) * (rotary.get("factor") or 1))
    return max(positions, scaled)


def check_weights(name: str, found: Mapping[str, Any]) -> None:
    """Raise for missing weights, which ``from_pretrained`` initialises at random. ``found`` is its loading info."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of its weights, such as {missing[0]}, and would have random ones in their "
            "place: its config.json is that of another model, or its files are not all there"
        )


def check_vocabulary(name: str, size: int, student: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where a model of ``size`` tokens cannot score every token of a student of ``student`` tokens."""
    last = min(max(tokenizer.get_vocab().values()), student - 1)
    if size <= last:
        raise ValueError(
            f"{name} has {size} tokens, and the student's tokenizer goes up to id {last}: it cannot score all that "
            "the student says. Use models of one tokenizer"
        )


def find_tokenizer(source: Model, model: nn.Module, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, or None: of a model object only if it is on this machine."""
    name = source if isinstance(source, str) else get_config_model_id(cast("Any", model).config)
    if not name:
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=not isinstance(source, str), **options)
    except Exception as error:  # damaged files make transformers raise many types of exceptions
        if next(Path(name).glob("tokenizer*"), None) is not None:
            raise ValueError(
                f"the tokenizer in {name} cannot be loaded ({type(error).__name__}: {error}), to be compared with the "
                "student's: mend it, or pass teacher_processing_class"
            ) from error
        if not isinstance(error, (OSError, ValueError)):
            raise
        return None  # the model has no tokenizer
    return cast("PreTrainedTokenizerBase", found)
