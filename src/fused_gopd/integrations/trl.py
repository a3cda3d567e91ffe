"""G-OPD in TRL 1.16: a trainer, a G-OPD advantage for ``GRPOTrainer``, and this package's loss in TRL's own trainer.

* :class:`GOPDTrainer`, a ``DistillationTrainer`` with a reference, lambda, several teachers, and every estimator.
* :class:`GRPOGOPDMixin`, which adds the G-OPD advantage of each token to that of ``GRPOTrainer``'s rewards.
* :func:`patch_distillation_loss`, which makes the loss of TRL's own ``DistillationTrainer`` with this package.

Generation, logging, checkpoints, accumulation and ranks stay TRL's: what is overridden is where a loss is computed,
where completions come back, and where metrics are logged.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.logging import get_logger
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import (
    RepeatSampler,
    create_model_from_path,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
)

from .. import Metrics, distributed, gopd_loss, token_logprobs
from ..checks import one_of, require_count, require_number
from ..heads import LinearHead, Logits, Source, TokenLogProbs, TopKLogProbs
from ..objective import BASELINES, DIVERGENCES, ESTIMATORS, SUPPORTS, TAILS, AdvantageFn
from ..output import GOPDOutput
from ..shards import is_dtensor
from .transformers import head_of, last_hidden_state

__all__ = [
    "GOPDConfig",
    "GOPDTrainer",
    "GRPOGOPDConfig",
    "GRPOGOPDMixin",
    "GRPOGOPDTrainer",
    "patch_distillation_loss",
]

logger = get_logger(__name__)

Scorer = Callable[[Tensor, Tensor, Tensor], Source]
"""A model somewhere else: ``(input_ids, attention_mask, completion_mask) -> TokenLogProbs | TopKLogProbs``.

Ids and mask are (B, P + K), prompts padded on the left and completions on the right; the completion mask is (B, K), and
so is the token shape of what is returned.
"""
Model = str | nn.Module | Scorer
"""A path or hub name, a model, or a scorer."""

# what a batch of TRL's has for multimodal models, by the names that the models' forward has
_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# metrics that TRL logs itself
_LOGGED = ("tokens", "loss", "entropy")
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------- configurations


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class _Options:
    """What the configurations of both trainers have."""

    reward_scale: float = field(default=1.0, metadata=_help("lambda; all but 1 need a reference."))
    reward_scale_end: float | None = field(
        default=None, metadata=_help("lambda goes from reward_scale to this, linearly over reward_scale_steps.")
    )
    reward_scale_steps: int | None = field(
        default=None, metadata=_help("Optimizer steps after which reward_scale_end is reached; default all steps.")
    )
    route_column: str | None = field(
        default=None, metadata=_help("Column of the dataset that names the teacher of each prompt.")
    )
    baseline: str = field(default="none", metadata=_help("'expected': advantages of mean 0; estimator='sampled'."))
    advantage_clip: float | None = field(default=None, metadata=_help("Bound on an advantage's magnitude."))
    logprob_min: float | None = field(default=None, metadata=_help("Teacher's and reference's log-probs at least."))
    chunk_size: int | None = field(default=None, metadata=_help("Tokens per chunk; default from a memory budget."))
    backend: str = field(default="auto", metadata=_help("'auto', 'torch', 'native' or 'triton'."))

    def _check(self) -> None:
        require_number("reward_scale", self.reward_scale)
        if self.reward_scale_end is not None:
            require_number("reward_scale_end", self.reward_scale_end)
        if self.reward_scale_steps is not None:
            require_count("reward_scale_steps", self.reward_scale_steps)
            if self.reward_scale_end is None:
                raise ValueError("reward_scale_steps needs reward_scale_end: the lambda that is reached after them")
        one_of("baseline", self.baseline, BASELINES)

    @property
    def _needs_reference(self) -> bool:
        return self.reward_scale != 1 or self.reward_scale_end not in (None, 1)

    def _loss_options(self) -> dict[str, Any]:
        """Those of :func:`fused_gopd.gopd_loss` that are the same for all batches."""
        names = ("baseline", "advantage_clip", "logprob_min", "chunk_size", "backend")
        return {name: getattr(self, name) for name in names}


@dataclass
class GOPDConfig(_Options, DistillationConfig):  # type: ignore[misc]
    """Configuration of :class:`GOPDTrainer`: TRL's ``DistillationConfig`` and the options of the loss.

    Options that :func:`fused_gopd.gopd_loss` has mean what they mean there.

    Args:
        reward_scale: lambda. 1 is ordinary on-policy distillation and needs no reference; with
            ``reward_scale_end`` it moves linearly to that over ``reward_scale_steps`` optimizer steps (default: all).
        estimator: ``"full"``, ``"sampled"`` or ``"topk"``.
        divergence: ``"reverse_kl"``, ``"forward_kl"`` or ``"jsd"``; None: the one that TRL's ``beta`` stands for.
        beta: TRL's: 0 is the forward KL, 1 the reverse KL, between them the JSD; None: that of ``divergence``, 0.5 for
            ``"jsd"``. Both may be given if they agree.
        k, support, tail: of ``topk``.
        reduction: ``"token-mean"``, as TRL's, or ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``, over the tokens
            or sequences of all ranks and accumulated batches.
        baseline, clip, advantage_clip, logprob_min: of ``sampled``.
        num_iterations: optimizer steps on each batch of completions. Above 1 the policy that sampled is no longer the
            one that learns, and ``sampled`` has a ratio to clip.
        route_column: with several teachers, the column of the dataset that says whose prompt it is.
        chunk_size, grad_filter, backend: how it is computed.

    Raises:
        ValueError, TypeError: naming the option, what was expected and what was found.
    """

    estimator: str = field(default="full", metadata=_help("'full', 'sampled' or 'topk'."))
    divergence: str | None = field(default=None, metadata=_help("'reverse_kl', 'forward_kl' or 'jsd'."))
    beta: float | None = field(
        default=None, metadata=_help("TRL's: 0 forward KL, 1 reverse KL, between them JSD; default by divergence.")
    )
    k: int | None = field(default=None, metadata=_help("Tokens of each position that estimator='topk' looks at."))
    support: str = field(default="teacher", metadata=_help("Whose likeliest tokens: 'teacher' or 'student'."))
    tail: str = field(default="bucket", metadata=_help("The rest in 'topk': 'bucket', 'drop' or 'renormalize'."))
    reduction: str = field(default="token-mean", metadata=_help("How token losses become one."))
    clip: list[float] | None = field(default=None, metadata=_help("PPO's epsilon_low and epsilon_high."))
    num_iterations: int = field(default=1, metadata=_help("Optimizer steps on each batch of completions."))
    grad_filter: float = field(default=0.0, metadata=_help("Leave negligible entries out of the gradient GEMMs."))

    def __post_init__(self) -> None:
        self._check()
        one_of("estimator", self.estimator, ESTIMATORS)
        one_of("support", self.support, SUPPORTS)
        one_of("tail", self.tail, TAILS)
        one_of("reduction", self.reduction, ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"))
        self._settle_divergence()
        require_count("num_iterations", self.num_iterations)
        if self.clip is not None and self.num_iterations == 1:
            raise ValueError(
                "clip needs num_iterations of at least 2: with one step on each batch of completions every ratio is 1"
            )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length must be at least 1, got {self.max_completion_length}: completions would be "
                "empty, and there would be nothing to learn from"
            )
        super().__post_init__()

    def _settle_divergence(self) -> None:
        """TRL's ``beta`` and our ``divergence`` say the same; afterwards both are there."""
        meant = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
        if self.divergence is not None:
            one_of("divergence", self.divergence, DIVERGENCES)
        if self.beta is None:
            self.beta = meant[self.divergence or "reverse_kl"]
        beta = require_number("beta", self.beta)
        by_beta = {1.0: "reverse_kl", 0.0: "forward_kl"}.get(beta, "jsd")
        if self.divergence is None:
            self.divergence = by_beta
        elif self.divergence != by_beta:
            raise ValueError(
                f"divergence={self.divergence!r} and beta={beta} disagree: beta=1 is 'reverse_kl', beta=0 "
                "'forward_kl', and anything between them 'jsd'; give one of the two"
            )

    def _loss_options(self) -> dict[str, Any]:
        names = ("estimator", "divergence", "support", "tail", "reduction", "grad_filter")
        options = {**super()._loss_options(), **{name: getattr(self, name) for name in names}}
        if self.divergence == "jsd":
            options["beta"] = self.beta
        if self.k is not None:
            options["k"] = self.k
        if self.clip is not None:
            options["clip"] = tuple(self.clip)
        return options


@dataclass
class GRPOGOPDConfig(_Options, GRPOConfig):  # type: ignore[misc]
    """Configuration of :class:`GRPOGOPDTrainer`: TRL's ``GRPOConfig`` and the options of the advantage.

    Args:
        reward_scale, reward_scale_end, reward_scale_steps, route_column, baseline, advantage_clip, logprob_min,
            chunk_size, backend: as in :class:`GOPDConfig`.
        outcome_weight: what the advantage of the rewards is multiplied by; 0 trains on G-OPD alone.
        gopd_weight: what the G-OPD advantage of each token is multiplied by.
        teacher_model_init_kwargs: for a teacher that is loaded.
    """

    outcome_weight: float = field(default=1.0, metadata=_help("Factor on the advantage of the rewards."))
    gopd_weight: float = field(default=1.0, metadata=_help("Factor on the G-OPD advantage of each token."))
    teacher_model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Keyword arguments of from_pretrained for a teacher that is loaded.")
    )

    def __post_init__(self) -> None:
        self._check()
        require_number("outcome_weight", self.outcome_weight)
        require_number("gopd_weight", self.gopd_weight)
        super().__post_init__()

    def _loss_options(self) -> dict[str, Any]:
        return {**super()._loss_options(), "estimator": "sampled"}


# ----------------------------------------------------------------------------------------------- checks before a run


def _routes_of(teacher: Model | Mapping[Any, Model], column: str | None) -> dict[Any, Model]:
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


def _check_kind(name: str, model: object) -> None:
    if not isinstance(model, (str, nn.Module)) and not callable(model):
        raise TypeError(f"{name} must be a model, its path, or a scorer, got {type(model).__name__}")


def _check_routes(routes: Mapping[Any, Model], column: str, name: str, dataset: Any) -> None:
    """Every route of a dataset has a teacher; what is streamed is checked batch by batch."""
    if isinstance(dataset, Mapping):
        for split, part in dataset.items():
            _check_routes(routes, column, f"{name}[{split!r}]", part)
    elif hasattr(dataset, "unique"):
        if column not in dataset.column_names:
            raise ValueError(f"{name} has no column {column!r} (route_column), only {', '.join(dataset.column_names)}")
        for route in dataset.unique(column):
            _require_route(routes, f"column {column!r} of {name}", route)


def _require_route(routes: Mapping[Any, object], where: str, route: object) -> None:
    if route not in routes:
        raise ValueError(
            f"no teacher for the route {route!r}, which is in {where}: teacher has {', '.join(map(repr, routes))}"
        )


def _try_options(options: dict[str, Any], routes: Mapping[Any, Model], device: torch.device) -> None:
    """One loss of one token: what is wrong with the options is said before anything is loaded or sampled."""
    options = dict(options)
    if "clip" in options:
        options["old_logprobs"] = torch.full((1, 1), -1.0, device=device)
    head = Logits(torch.zeros(1, 1, max(8, options.get("k") or 0), device=device))
    token_ids, logprobs = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.full((1, 1), -1.0, device=device)
    for model in routes.values():
        teacher: Source = head
        if not isinstance(model, (str, nn.Module)):
            topk = options["estimator"] == "topk"
            teacher = TopKLogProbs(token_ids[..., None], logprobs[..., None]) if topk else TokenLogProbs(logprobs)
        gopd_loss(head, teacher, head, token_ids, reward_scale=1.25, **options)


def _tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_tokenizers(name: str, student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
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


def _find_tokenizer(source: Model, model: nn.Module, **options: Any) -> PreTrainedTokenizerBase | None:
    """What lies beside a model: loaded by its name if the model was, else only if it is on this machine."""
    name = source if isinstance(source, str) else get_config_model_id(cast("Any", model).config)
    if not name:
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=not isinstance(source, str), **options)
    except (OSError, ValueError):  # there is none
        return None
    return cast("PreTrainedTokenizerBase", found)


# ------------------------------------------------------------------------------------------------- a batch of tokens


@dataclass(frozen=True)
class _Batch:
    """Completions as TRL pads them: prompts on the left, completions on the right."""

    input_ids: Tensor  # (B, P + K)
    attention_mask: Tensor  # (B, P + K)
    token_ids: Tensor  # (B, K)
    completion_mask: Tensor  # (B, K)
    mask: Tensor  # (B, K), without the tokens of tools
    multimodal: dict[str, Any]
    teacher_index: Tensor | None  # (B,) on the CPU
    old_logprobs: Tensor | None  # (B, K)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> _Batch:
        completion_mask = inputs["completion_mask"]
        return cls(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            inputs["completion_ids"],
            completion_mask,
            completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask,
            {name: inputs[name] for name in _MULTIMODAL if inputs.get(name) is not None},
            inputs.get("teacher_index"),
            inputs.get("old_logprobs"),
        )

    def take(self, rows: Tensor | slice) -> _Batch:
        """Some sequences; not of multimodal batches, whose images are not one a sequence."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: x[rows] for name, x in own.items() if isinstance(x, Tensor)}
        return replace(self, **taken)

    def split(self, size: int) -> Iterator[_Batch]:
        if self.multimodal:
            yield self
            return
        for start in range(0, len(self.token_ids), size):
            yield self.take(slice(start, start + size))


def _spread(source: Source, rows: Tensor, n: int) -> Source:
    """What was scored for some sequences at their places among n."""

    def put(x: Tensor, empty: int) -> Tensor:
        whole = x.new_full((n, *x.shape[1:]), empty)
        whole[rows.to(x.device)] = x[: len(rows)]
        return whole

    if isinstance(source, LinearHead):
        return replace(source, hidden=put(source.hidden, 0))
    if isinstance(source, TopKLogProbs):
        return TopKLogProbs(put(source.token_ids, -1), put(source.logprobs, 0))
    if isinstance(source, TokenLogProbs):
        return TokenLogProbs(put(source.logprobs, 0))
    return replace(source, logits=put(source.logits, 0))


# --------------------------------------------------------------------------------------- what both trainers have


class _Models:
    """Teachers, reference, lambda and metrics, beside a trainer of TRL's."""

    accelerator: Any
    args: Any
    model: Any
    state: Any
    temperature: float
    generation_config: Any
    generation_kwargs: dict[str, Any]
    is_deepspeed_enabled: bool
    _metrics: Any
    _tokenizer: PreTrainedTokenizerBase
    _is_vlm: bool

    # -------------------------------------------------------------------------------------------------- construction

    def _announce(
        self,
        args: _Options,
        teacher: Model | Mapping[Any, Model],
        ref_model: Model | None,
        reward_scale_fn: Callable[[int], float] | None,
        advantage_fn: AdvantageFn | None,
        datasets: dict[str, Any],
    ) -> None:
        """All that can be known to be wrong before the student is loaded."""
        routes = _routes_of(teacher, args.route_column)
        for route, model in routes.items():
            _check_kind("teacher" if route is None else f"teacher[{route!r}]", model)
        if getattr(args, "teacher_model_init_kwargs", None) and not any(isinstance(x, str) for x in routes.values()):
            raise ValueError("teacher_model_init_kwargs are for a teacher that is loaded: no teacher is a path")
        if ref_model is not None:
            _check_kind("ref_model", ref_model)
        elif reward_scale_fn is not None or args._needs_reference:
            scale = f"reward_scale={args.reward_scale}"
            if args.reward_scale_end is not None:
                scale += f" to reward_scale_end={args.reward_scale_end}"
            raise ValueError(
                f"ref_model must be given for {'a reward_scale_fn' if reward_scale_fn is not None else scale}: only "
                "reward_scale=1 does without a reference. It is usually the student before training: pass its path, a "
                'copy of it, or, for a student with a PEFT adapter, "base"'
            )
        if args.route_column is not None:
            for name, dataset in datasets.items():
                _check_routes(routes, args.route_column, name, dataset)
        self._options = args._loss_options()
        if advantage_fn is not None:
            self._options["advantage_fn"] = advantage_fn
        _try_options(self._options, routes, cast("Any", args).device)
        self._reward_scale_fn = reward_scale_fn
        self._seen: dict[str, list[Metrics]] = {"train": [], "eval": []}

    def _attach(
        self, teacher: Model | Mapping[Any, Model], ref_model: Model | None, teacher_processing_class: Any
    ) -> None:
        """Load, check and prepare the frozen models, once the trainer is there."""
        routes = _routes_of(teacher, self.args.route_column)
        if self._is_vlm and len(routes) > 1:
            raise ValueError("several teachers of multimodal prompts are not supported: give one teacher")
        self._routes = {route: i for i, route in enumerate(routes)}
        names = ["teacher" if route is None else f"teacher[{route!r}]" for route in routes]
        if isinstance(teacher_processing_class, Mapping):
            for route in teacher_processing_class:
                _require_route(routes, "teacher_processing_class", route)
            tokenizers = [teacher_processing_class.get(route) for route in routes]
        else:
            tokenizers = [teacher_processing_class] * len(routes)
        prepared: dict[int, Any] = {}
        sizes = [self._vocabulary(self.model)]
        init = getattr(self.args, "teacher_model_init_kwargs", None)
        self._teachers = [
            self._frozen(name, source, init, tokenizer, prepared, sizes)
            for name, source, tokenizer in zip(names, routes.values(), tokenizers, strict=True)
        ]
        self._reference: Any = None
        if isinstance(ref_model, str) and ref_model == "base":
            if not hasattr(self.model, "disable_adapter"):
                raise ValueError(
                    'ref_model="base" is the student without its PEFT adapter, and the student has none: pass '
                    "peft_config, or the path or a copy of the student before training"
                )
            self._reference = "base"
        elif ref_model is not None:
            init = self.args.model_init_kwargs
            self._reference = self._frozen("ref_model", ref_model, init, None, prepared, sizes)
        self._vocab_size = min(sizes)
        self._sample_from_joint_vocabulary(sizes[0])

    def _frozen(
        self, name: str, source: Model, init: Any, tokenizer: Any, prepared: dict[int, Any], sizes: list[int]
    ) -> Any:
        """A model that scores: loaded, compared with the student, and prepared for this run; or a scorer."""
        if not isinstance(source, (str, nn.Module)):
            return source
        if isinstance(source, nn.Module) and source is self.accelerator.unwrap_model(self.model):
            raise ValueError(f"{name} is the student itself, which changes: pass a copy (copy.deepcopy)")
        if isinstance(source, nn.Module) and id(source) in prepared:
            return prepared[id(source)]
        model = source if isinstance(source, nn.Module) else self._load(source, init)
        size = self._vocabulary(model)
        last = max(self._tokenizer.get_vocab().values())
        if size <= last:
            raise ValueError(
                f"{name} has {size} tokens, and the student's tokenizer goes up to id {last}: it cannot score all that "
                "the student says. Use models of one tokenizer"
            )
        trust = {"trust_remote_code": getattr(self.args, "trust_remote_code", False)}
        found = _tokenizer_of(tokenizer) if tokenizer is not None else _find_tokenizer(source, model, **trust)
        if found is not None:
            _check_tokenizers(name, self._tokenizer, found)
        elif name != "ref_model" and self.accelerator.is_main_process:
            logger.warning(
                f"The tokenizer of {name} is not known, so only the sizes of the vocabularies were compared. Pass "
                "teacher_processing_class to compare the tokens."
            )
        sizes.append(size)
        model.eval()
        if self.is_deepspeed_enabled:
            model = prepare_deepspeed(model, self.accelerator)
        else:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        prepared[id(source)] = model
        return model

    def _load(self, name: str, init: dict[str, Any] | None) -> nn.Module:
        options = dict(init or {})
        options.setdefault("trust_remote_code", getattr(self.args, "trust_remote_code", False))
        if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None  # what TRL does: "auto" would spread the model over the ranks' devices
        return cast("nn.Module", create_model_from_path(name, **options))

    @staticmethod
    def _vocabulary(model: Any) -> int:
        return int(model.config.get_text_config().vocab_size)

    def _sample_from_joint_vocabulary(self, student: int) -> None:
        """Rows that a model lacks are padding in the others' (151936 beside 152064): nothing is sampled from there."""
        if student > self._vocab_size:
            padding = list(range(self._vocab_size, student))
            padding += self.generation_kwargs.get("suppress_tokens") or []
            self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = padding

    # ------------------------------------------------------------------------------------------------------- scoring

    @property
    def reward_scale(self) -> float:
        """lambda of the current optimizer step; it depends on nothing else, so that a resumed run goes on with it."""
        if self._reward_scale_fn is not None:
            return require_number("reward_scale_fn(step)", self._reward_scale_fn(self.state.global_step))
        start: float = self.args.reward_scale
        end: float | None = self.args.reward_scale_end
        if end is None:
            return start
        done: float = min(self.state.global_step / max(self.args.reward_scale_steps or self.state.max_steps, 1), 1.0)
        return (1 - done) * start + done * end

    def _hidden(self, model: nn.Module, batch: _Batch) -> Tensor:
        """(B, K, H) states that predict the completions; inside the forward of the model's wrapper."""
        keep = batch.token_ids.shape[1]
        return last_hidden_state(model, batch.input_ids, batch.attention_mask, keep=keep, **batch.multimodal)

    def _head(self, model: nn.Module, hidden: Tensor) -> LinearHead:
        """A model's head, at the temperature at which completions are sampled."""
        return replace(head_of(model, hidden), temperature=self.temperature)

    def _frozen_head(self, model: Any, hidden: Tensor, gathered: ExitStack) -> LinearHead:
        """A head of which ZeRO-3 leaves the weight whole for as long as ``gathered`` is open."""
        gathered.enter_context(maybe_gather_lm_head_ctx(*model.get_output_embeddings().parameters()))
        return self._head(model, hidden)

    def _at_head(self, model: Any, hidden: Tensor, function: Callable[[LinearHead], T]) -> T:
        """A function of a model's head in the place of its forward, for which wrappers make its weight whole."""
        embeddings = model.get_output_embeddings()
        if not isinstance(embeddings, nn.Linear):  # an adapter's
            return function(self._head(model, hidden))
        return distributed.through_head(embeddings, hidden, lambda given: function(self._head(model, given.hidden)))

    def _score(self, name: str, model: Any, batch: _Batch, gathered: ExitStack) -> Source:
        """What a frozen model or a scorer says of a batch."""
        if isinstance(model, nn.Module):
            unwrapped = self.accelerator.unwrap_model(model)
            hidden = distributed.in_forward(model, partial(self._hidden, unwrapped, batch))
            return self._frozen_head(unwrapped, hidden, gathered)
        scored = model(batch.input_ids, batch.attention_mask, batch.completion_mask)
        if not isinstance(scored, (TokenLogProbs, TopKLogProbs, LinearHead, Logits)):
            raise TypeError(
                f"the scorer {name} must return fused_gopd.TokenLogProbs or TopKLogProbs, got {type(scored).__name__}"
            )
        device = batch.token_ids.device
        if isinstance(scored, TokenLogProbs):
            return TokenLogProbs(scored.logprobs.to(device))
        if isinstance(scored, TopKLogProbs):
            return TopKLogProbs(scored.token_ids.to(device), scored.logprobs.to(device))
        return scored

    def _score_teachers(self, batch: _Batch, gathered: ExitStack) -> tuple[Source | list[Source], Tensor | None]:
        """Each teacher on the sequences that are routed to it; the teachers, and which of them a sequence has."""
        index = batch.teacher_index
        if index is None:
            return self._score("teacher", self._teachers[0], batch, gathered), None
        # where ranks may share a model, all of them call it: on a sequence that is not used where none is routed to it
        shared = self.accelerator.num_processes > 1
        used, sources = [], []
        for i, (route, model) in enumerate(zip(self._routes, self._teachers, strict=True)):
            rows = (index == i).nonzero()[:, 0]
            if len(rows) or (shared and isinstance(model, nn.Module)):
                part = batch.take(rows if len(rows) else torch.zeros(1, dtype=torch.int64))
                used.append(i)
                source = self._score(f"teacher[{route!r}]", model, part, gathered)
                sources.append(_spread(source, rows, len(index)))
        return sources, torch.bucketize(index, torch.tensor(used)).to(batch.token_ids.device)

    @contextmanager
    def _base(self, student: Any) -> Iterator[None]:
        """The student without its adapter, as it is when it is not trained."""
        training = student.training
        student.eval()
        try:
            with student.disable_adapter():
                yield
        finally:
            student.train(training)

    def _loss(self, student: nn.Module, batch: _Batch, **options: Any) -> GOPDOutput:
        """The loss of a batch; inside the forward of the student's wrapper."""
        scale = self.reward_scale
        teacher: Source | list[Source] | None = None
        ref: Source | None = None
        index = None
        with ExitStack() as gathered, self.accelerator.autocast():
            with torch.no_grad():
                # a model that lambda cancels is not run
                if scale != 0:
                    teacher, index = self._score_teachers(batch, gathered)
                if scale != 1 and self._reference == "base":
                    with self._base(student):
                        ref = self._frozen_head(student, self._hidden(student, batch), gathered)
                elif scale != 1:
                    ref = self._score("ref_model", self._reference, batch, gathered)
            loss = partial(
                gopd_loss,
                teacher=teacher,
                ref=ref,
                token_ids=batch.token_ids,
                teacher_index=index,
                mask=batch.mask,
                reward_scale=scale,
                old_logprobs=batch.old_logprobs,
                vocab_size=self._vocab_size,
                **{**self._options, **options},
            )
            return self._at_head(student, self._hidden(student, batch), loss)

    def _routes_in(self, examples: list[dict[str, Any]]) -> Tensor:
        """(B,) the teachers of the prompts."""
        column = self.args.route_column
        for example in examples:
            if column not in example:
                raise ValueError(f"a prompt has no column {column!r} (route_column), only {', '.join(example)}")
            _require_route(self._routes, f"column {column!r} of the dataset", example[column])
        return torch.tensor([self._routes[example[column]] for example in examples])

    # ------------------------------------------------------------------------------------------------------- metrics

    def _note(self, out: GOPDOutput) -> None:
        mode = "train" if self.model.training else "eval"
        self._seen[mode].append(out.metrics())
        self._metrics[mode]["gopd/reward_scale"].append(out.reward_scale)

    def _put_metrics(self) -> None:
        """Means over all tokens of all ranks since the last log, among TRL's metrics; one read from the device."""
        mode = "train" if self.model.training else "eval"
        if not self._seen[mode]:
            return
        seen = _together(self._seen[mode])
        total = Metrics(tuple(seen), self.accelerator.reduce(torch.stack(list(seen.values())), reduction="sum"))
        self._seen[mode].clear()
        for name, value in total.to_dict().items():
            if name not in _LOGGED:
                self._metrics[mode][f"gopd/{name}"].append(value)


def _together(metrics: list[Metrics]) -> dict[str, Tensor]:
    """Sums and counts by name; steps whose lambda cancels a model lack what it would have told."""
    total: dict[str, Tensor] = {}
    for each in metrics:
        for name, sums in zip(each._names, each.sums, strict=True):
            total[name] = total[name] + sums if name in total else sums
    return total


# ------------------------------------------------------------------------------------------------------ distillation


class GOPDTrainer(_Models, DistillationTrainer):  # type: ignore[misc]
    """TRL's ``DistillationTrainer`` with the G-OPD loss.

    The student samples, teachers and reference score, and the loss of all of them is made from hidden states: the
    gradients are those of :func:`fused_gopd.gopd_loss` over the tokens of all ranks and accumulated batches. Everything
    that TRL's trainer does around a loss works as it does there.

    Args:
        model: the student: a model, a PEFT model, or a path.
        teacher: a model, its path, or a scorer, a function ``(input_ids, attention_mask, completion_mask)`` that
            returns :class:`fused_gopd.TokenLogProbs` or :class:`fused_gopd.TopKLogProbs` of the completions' shape
            (B, K); or a dict from route to one of these, where ``args.route_column`` names the route of each prompt. A
            teacher runs on the prompts that are routed to it alone.
        args: a :class:`GOPDConfig`.
        train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config, peft_config, tools:
            as in TRL.
        ref_model: the reference: a model, its path, a scorer, or ``"base"``, the student without its PEFT adapter.
            Needed for lambda other than 1; where lambda is 1 it is not run.
        reward_scale_fn: lambda of an optimizer step, ``step -> float``, in place of ``args.reward_scale``; called with
            the number of steps that are done.
        advantage_fn: of ``estimator="sampled"``, see :func:`fused_gopd.gopd_loss`.
        teacher_processing_class: the teacher's tokenizer, to be compared with the student's, or a dict from route to
            tokenizer. By default it is looked for beside the teacher.

    Logs TRL's metrics, and means over all tokens since the last log: ``gopd/reward`` (the implicit reward log q -
    log r), ``gopd/kl_teacher``, ``gopd/kl_ref``, ``gopd/kl_target``, ``gopd/advantage``, ``gopd/clip_fraction`` and
    the others of :class:`fused_gopd.Metrics`, and ``gopd/reward_scale``.

    Raises:
        TypeError, ValueError: before the student is loaded, or at the latest before the first step, naming the
            argument, what was expected and what was found.
    """

    _tag_names = ["trl", "gopd"]  # noqa: RUF012
    _name = "G-OPD"
    _paper = {  # noqa: RUF012
        "title": "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        "id": "2602.12125",
        "citation": textwrap.dedent("""\
            @article{yang2026learning,
                title   = {{Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation}},
                author  = {Wenkai Yang and Weijie Liu and Ruobing Xie and Kai Yang and Saiyong Yang and Yankai Lin},
                year    = 2026,
                journal = {arXiv preprint arXiv:2602.12125}
            }"""),
    }

    def __init__(
        self,
        model: str | nn.Module,
        teacher: Model | Mapping[Any, Model] | None = None,
        args: GOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ref_model: Model | None = None,
        reward_scale_fn: Callable[[int], float] | None = None,
        advantage_fn: AdvantageFn | None = None,
        teacher_processing_class: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        if "teacher_model" in trainer_arguments:
            raise TypeError("GOPDTrainer has no argument teacher_model: it is called teacher, and may be a dict")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(cast("Any", model).config)
            args = GOPDConfig(f"{name.split('/')[-1]}-GOPD")
        _require_config(args, GOPDConfig)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        self._announce(args, cast("Any", teacher), ref_model, reward_scale_fn, advantage_fn, datasets)
        self.num_iterations = args.num_iterations
        if self.num_iterations > 1 and not hasattr(train_dataset, "__len__"):
            raise ValueError(
                f"num_iterations={self.num_iterations} needs a train_dataset of known length (a datasets.Dataset), got "
                f"{type(train_dataset).__name__}"
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer_arguments,
        )
        self._attach(cast("Any", teacher), ref_model, teacher_processing_class)

    # --------------------------------------------------------------------------------------------------- completions

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = self.args.route_column
        if column is not None and column not in self._signature_columns:
            self._signature_columns.append(column)

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        completions = super()._generate_single_turn(*args, **options)
        if not self.tools and not all(len(completion) for completion in completions):
            empty = [i for i, completion in enumerate(completions) if not len(completion)]
            raise ValueError(
                f"completions {empty} of {len(completions)} are empty: an engine must return one token at least, the "
                "end of sequence if nothing else; check its limits on prompt and completion length"
            )
        return completions

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = cast("dict[str, Any]", super()._generate_and_score_completions(inputs))
        if self.args.route_column is not None:
            output["teacher_index"] = self._routes_in(inputs)
        batch = _Batch.of(output)
        # of the whole generation batch, as num_items_in_batch is
        output["num_sequences"] = self.accelerator.gather(batch.mask.any(dim=1).sum()).sum()
        if self.num_iterations > 1 and self.args.estimator == "sampled":
            output["old_logprobs"] = self._logprobs(batch)
        return output

    @torch.no_grad()
    def _logprobs(self, batch: _Batch) -> Tensor:
        """(B, K) log-probs of the completions under the student as it is now."""
        student = self.accelerator.unwrap_model(self.model_wrapped)

        def logprobs(part: _Batch) -> Tensor:
            options = {"chunk_size": self.args.chunk_size, "backend": self.args.backend}
            score = partial(token_logprobs, token_ids=part.token_ids, mask=part.mask, vocab_size=self._vocab_size)
            found = self._at_head(student, self._hidden(student, part), partial(score, **options))
            return cast("Tensor", found)

        with self.accelerator.autocast():
            parts = batch.split(self.args.per_device_train_batch_size)
            return torch.cat([distributed.in_forward(self.model_wrapped, partial(logprobs, part)) for part in parts])

    # ---------------------------------------------------------------------------- several steps on the same completions

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        own = super()._get_train_sampler(dataset)
        return _EpochSampler(
            data_source=own.data_source,
            mini_repeat_count=own.mini_repeat_count,
            batch_size=own.batch_size,
            repeat_count=own.repeat_count * self.num_iterations,
            shuffle=own.shuffle,
            seed=own.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # by the step, which a checkpoint keeps: a run that goes on from within the iterations stays in step
        if self.model.training and self._buffered_inputs is not None and self.state.global_step % self.num_iterations:
            return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        return super()._prepare_inputs(generation_batch)

    # ---------------------------------------------------------------------------------------------------------- loss

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        normalizer = num_items_in_batch
        if normalizer is not None and self.args.reduction != "token-mean":
            normalizer = inputs["num_sequences"].clamp(min=1) / self.accelerator.num_processes
        batch = _Batch.of(inputs)
        out = self._loss(unwrapped_student, batch, normalizer=normalizer)
        self._note(out)
        return out.loss, out.entropy.sum(), batch.mask.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._put_metrics()
        super().log(logs, start_time)


class _EpochSampler(RepeatSampler):  # type: ignore[misc]
    """TRL's sampler, whose order in an epoch depends on the epoch alone, so that a resumed run goes on with it.

    TRL's own draws a permutation an epoch from one generator, and begins with the first when a later epoch is resumed.
    """

    def __init__(self, *, epoch: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return cast("Iterator[int]", super().__iter__())


def _require_config(args: object, kind: type) -> None:
    if not isinstance(args, kind):
        raise TypeError(f"args must be a {kind.__name__}, which has the options of the loss, got {type(args).__name__}")


# -------------------------------------------------------------------------------------------------------------- GRPO


class GRPOGOPDMixin(_Models):
    """The G-OPD advantage of each token beside that of the rewards, for ``GRPOTrainer`` and what derives from it.

    ``class MyTrainer(GRPOGOPDMixin, MyGRPOTrainer)``; :class:`GRPOGOPDTrainer` is that of TRL's own. The advantage of a
    token becomes ``outcome_weight`` A_reward + ``gopd_weight`` A, with A = lambda (log q - log r) - (log p - log r) of
    :func:`fused_gopd.gopd_loss`, and p the student that sampled. Ratios, clipping, loss types, the KL penalty and
    everything else are ``GRPOTrainer``'s.

    Args:
        teacher, ref_model, reward_scale_fn, advantage_fn, teacher_processing_class: as in :class:`GOPDTrainer`. The
            reference of lambda has nothing to do with GRPO's own, that of ``beta``.
        reward_funcs: as in TRL; may be left out where ``args.outcome_weight`` is 0.
        args: a :class:`GRPOGOPDConfig`.
        others: as in TRL.

    Raises:
        TypeError, ValueError: as :class:`GOPDTrainer`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: GRPOGOPDConfig | None = None,
        *,
        teacher: Model | Mapping[Any, Model] | None = None,
        ref_model: Model | None = None,
        reward_scale_fn: Callable[[int], float] | None = None,
        advantage_fn: AdvantageFn | None = None,
        teacher_processing_class: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(cast("Any", model).config)
            args = GRPOGOPDConfig(f"{name.split('/')[-1]}-GRPO")
        _require_config(args, GRPOGOPDConfig)
        datasets = {name: trainer_arguments.get(name) for name in ("train_dataset", "eval_dataset")}
        self._announce(args, cast("Any", teacher), ref_model, reward_scale_fn, advantage_fn, datasets)
        if reward_funcs is None and args.outcome_weight == 0:
            reward_funcs = _no_reward
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **trainer_arguments)  # type: ignore[call-arg]
        self._attach(cast("Any", teacher), ref_model, teacher_processing_class)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = cast("Any", self)._signature_columns
        if self.args.route_column is not None and self.args.route_column not in columns:
            columns.append(self.args.route_column)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = cast("dict[str, Any]", super()._generate_and_score_completions(inputs))  # type: ignore[misc]
        index = None if self.args.route_column is None else self._routes_in(inputs)
        outcome = output["advantages"] * self.args.outcome_weight
        gopd = self._gopd_advantages(_Batch.of({**output, "teacher_index": index}))
        output["advantages"] = (outcome[:, None] if outcome.ndim == 1 else outcome) + self.args.gopd_weight * gopd
        return output

    @torch.no_grad()
    def _gopd_advantages(self, batch: _Batch) -> Tensor:
        """(B, K), a few sequences at a time."""
        wrapper = cast("Any", self).model_wrapped
        student = self.accelerator.unwrap_model(wrapper)
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        advantages = []
        for part in batch.split(size):
            out = distributed.in_forward(wrapper, partial(self._loss, student, part))
            self._note(out)
            advantages.append(cast("Tensor", out.advantages))
        return torch.cat(advantages)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._put_metrics()
        super().log(logs, start_time)  # type: ignore[misc]


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """GRPOTrainer asks for one reward at least."""
    return [0.0] * len(completions)


class GRPOGOPDTrainer(GRPOGOPDMixin, GRPOTrainer):  # type: ignore[misc]
    """:class:`GRPOGOPDMixin` on TRL's ``GRPOTrainer``."""

    _tag_names = ["trl", "grpo", "gopd"]  # noqa: RUF012


# ------------------------------------------------------------------------------------- the loss of TRL's own trainer


class DistillationPatch:
    """What :func:`patch_distillation_loss` has done; undone by :meth:`undo` or at the end of a ``with`` block."""

    def __init__(self, target: Any, own: Any) -> None:
        self._target, self._own, self._done = target, own, False

    def undo(self) -> None:
        """Put back what was there before; a second call does nothing."""
        if self._done:
            return
        self._done = True
        if self._own is None:
            del self._target._compute_loss
        else:
            self._target._compute_loss = self._own

    def __enter__(self) -> DistillationPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_distillation_loss(target: DistillationTrainer | type[DistillationTrainer]) -> DistillationPatch:
    """Make the loss of TRL's own ``DistillationTrainer`` with this package: same objective, same values.

    TRL's 1.16 projects both models in tiles and once more in the backward; here the gradients are made in the forward.
    TRL's ``_compute_loss`` runs as it is, but for the function that takes hidden states and heads to the loss. Nothing
    else is touched: other trainers keep TRL's loss.

    Args:
        target: a trainer, or the class, of which all trainers then have it.

    Returns:
        A handle with ``undo()``, which is also a context manager.

    Raises:
        TypeError: not a ``DistillationTrainer``.
        ValueError: a trainer whose loss is not TRL's own, or is patched already; DeepSpeed ZeRO-3.
    """
    kind = target if isinstance(target, type) else type(target)
    if not issubclass(kind, DistillationTrainer):
        raise TypeError(f"target must be a trl.DistillationTrainer or a class of them, got {kind.__name__}")
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call, unused-ignore]
        raise ValueError("under DeepSpeed ZeRO-3 there is no patch of TRL's loss: use GOPDTrainer with reward_scale=1")
    own = vars(target).get("_compute_loss")
    function = getattr(target._compute_loss, "__func__", target._compute_loss)
    if function.__globals__.get(_TRL_LOSS) is _fused_divergence_loss:
        raise ValueError(f"{target!r} is patched already: undo() the first patch before another")
    if _TRL_LOSS not in function.__code__.co_names:
        raise ValueError(
            f"{kind.__name__} has a loss of its own in place of TRL's {_TRL_LOSS}: there is nothing to put this "
            "package's loss in the place of. GOPDTrainer has it already"
        )
    # the same code with another global: the module's own is left alone
    patched = FunctionType(
        function.__code__, {**function.__globals__, _TRL_LOSS: _fused_divergence_loss}, function.__name__
    )
    cast("Any", target)._compute_loss = patched if isinstance(target, type) else patched.__get__(target)
    return DistillationPatch(target, own)


_TRL_LOSS = "_chunked_divergence_loss"


def _fused_divergence_loss(
    student_hidden_states: Tensor,  # (B, K, H)
    teacher_hidden_states: Tensor,  # (B, K, H of the teacher)
    student_lm_head_weight: Tensor,  # (V, H)
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,  # (B, K)
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What TRL's ``_chunked_divergence_loss`` returns: the loss, the sum of the entropies, the number of tokens."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> LinearHead:
        if is_dtensor(weight):  # as TRL does: gathered once
            weight = cast("Any", weight).full_tensor().to(hidden.dtype)
            bias = None if bias is None else cast("Any", bias).full_tensor()
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return LinearHead(hidden, weight, bias, logit_scale=scale, softcap=softcap, temperature=temperature)

    student, teacher = (student_lm_head_weight, student_lm_head_bias), (teacher_lm_head_weight, teacher_lm_head_bias)
    student_transform = student_logit_scale, student_final_logit_softcapping
    teacher_transform = teacher_logit_scale, teacher_final_logit_softcapping
    mask = completion_mask != 0
    options: dict[str, Any] = {"divergence": {1.0: "reverse_kl", 0.0: "forward_kl"}.get(beta, "jsd")}
    if options["divergence"] == "jsd":
        options["beta"] = beta
    out = gopd_loss(
        head(student_hidden_states, *student, *student_transform),
        head(teacher_hidden_states, *teacher, *teacher_transform),
        mask=mask,
        estimator="full",
        normalizer=num_items_in_batch,
        **options,
    )
    return out.loss, out.entropy.sum(), mask.sum()
