"""The configurations of the trainers: TRL's, with options of the loss, which are checked by the loss's own rules."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

import torch
from torch import nn
from trl import DistillationConfig, GRPOConfig
from trl.trainer.utils import get_config_model_id

from ...objective.divergences import divergence_of
from ...option_checks import checked_options
from ...options import DEFAULTS, OPTIONS, PARAMETERS, RULES
from ...values import one_of, require_count, require_not_negative, require_number
from ..following import Following

# losses of GRPOTrainer in which the ratio is a detached factor of A log p
_DETACHED_RATIO = ("cispo", "vespo")
_CHUNK_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# divergence -> the beta that means it in TRL, for the JSD by default
_BETAS = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
_TRL_BETA: float = DistillationConfig.beta
# options of the loss that act on the engine's log-probs
_ROLLOUT = ("rollout_is", "rollout_is_cap", "rollout_mask", "trust_region")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _option(name: str) -> Any:
    """A field for an option of the loss, with its default and help."""
    return field(default=DEFAULTS[name], metadata=_help(RULES[name].help))


@dataclass
class Options:
    """The options of both trainers' configurations."""

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
    teacher_prompt_column: str | None = field(
        default=None, metadata=_help("Column of the dataset that teachers read in place of the prompt.")
    )
    ref_prompt_column: str | None = field(
        default=None, metadata=_help("Column of the dataset that the reference reads in place of the prompt.")
    )
    teacher_sync_steps: int | None = field(
        default=None,
        metadata=_help("With teacher='student': optimizer steps between its updates; default: it stays as it began."),
    )
    teacher_ema: float | None = field(
        default=None,
        metadata=_help("With teacher='student': decay of a moving average of the student, which the teacher is."),
    )
    teacher_cache: str | None = field(
        default=None, metadata=_help("Folder for the hidden states of teachers and reference, to be read again.")
    )
    teacher_cache_max_bytes: int | None = field(
        default=None, metadata=_help("The size that teacher_cache may have; default no limit.")
    )
    baseline: str = _option("baseline")
    advantage_clip: float | None = _option("advantage_clip")
    logprob_min: float | None = _option("logprob_min")
    chunk_size: int | None = _option("chunk_size")
    backend: str = _option("backend")

    def _check_cache(self) -> None:
        if self.teacher_cache_max_bytes is not None:
            require_count("teacher_cache_max_bytes", self.teacher_cache_max_bytes)
            if self.teacher_cache is None:
                raise ValueError("teacher_cache_max_bytes needs teacher_cache, the folder whose size it bounds")

    def _check_moving_teacher(self) -> None:
        if self.teacher_sync_steps is not None:
            require_count("teacher_sync_steps", self.teacher_sync_steps)
        if self.teacher_ema is not None:
            require_number("teacher_ema", self.teacher_ema)
        if (fault := self._following.fault_of_ema) is not None:
            raise ValueError(f"teacher_ema {fault} (teacher_sync_steps=1 alone)")

    @property
    def _following(self) -> Following:
        return Following(self.teacher_ema, self.teacher_sync_steps)

    @property
    def _teacher_moves(self) -> str | None:
        """The options by which a teacher "student" follows the student; None: it does not."""
        return " and ".join(f"{name}={value}" for name, value in self._following.given.items()) or None

    def _check_reward_scale(self) -> None:
        require_number("reward_scale", self.reward_scale)
        if self.reward_scale_end is not None:
            require_number("reward_scale_end", self.reward_scale_end)
        if self.reward_scale_steps is not None:
            require_count("reward_scale_steps", self.reward_scale_steps)
            if self.reward_scale_end is None:
                raise ValueError("reward_scale_steps needs reward_scale_end: the lambda that is reached after them")

    @property
    def _needs_reference(self) -> bool:
        return self.reward_scale != 1 or self.reward_scale_end not in (None, 1)

    @property
    def _penalty(self) -> str | None:
        """The option that needs the reference whatever lambda is."""
        kind = getattr(self, "kl_ref", "none")
        return None if kind == "none" else f"kl_ref={kind!r}"

    def _loss_options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`fused_gopd.gopd_loss` that are the same for all batches.

        Only fields that classes of this module add: a field of TRL's may have the same name and another meaning, as
        GRPOConfig's beta.
        """
        added = {name for kind in type(self).__mro__ if issubclass(kind, Options) for name in _annotations(kind)}
        names = [f.name for f in fields(self) if f.name in added and f.name in (*OPTIONS, *PARAMETERS)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _annotations(kind: type) -> dict[str, Any]:
    return cast("dict[str, Any]", vars(kind).get("__annotations__", {}))


@dataclass
class GOPDConfig(Options, DistillationConfig):  # type: ignore[misc]
    """Configuration of :class:`GOPDTrainer`: TRL's ``DistillationConfig`` and the options of the loss.

    Options that :func:`fused_gopd.gopd_loss` has mean what they mean there.

    Args:
        reward_scale: lambda. 1 is ordinary on-policy distillation and needs no reference; with
            ``reward_scale_end`` it moves linearly to that over ``reward_scale_steps`` optimizer steps (default: all).
        estimator: ``"full"``, ``"sampled"`` or ``"topk"``. Default ``"full"``, because the trainer has the models;
            :func:`fused_gopd.gopd_loss` has ``"sampled"``, which needs only log-probs of the sampled tokens.
        divergence: its name; None for the one that TRL's ``beta`` means.
        beta: TRL's: 0 is the forward KL, 1 the reverse KL, between them the JSD; None for that of ``divergence``, 0.5
            for ``"jsd"``. Both may be given if they agree.
        alpha, skew, forward_weight: the parameters of ``"alpha"``, of ``"skew_kl"`` and ``"skew_reverse_kl"``, and of
            ``"mixed"``.
        k, support, tail: of ``topk``.
        reduction: ``"token-mean"``, as TRL's, or ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``, over the tokens
            or sequences of all ranks and accumulated batches.
        entropy_weight: of the student's entropy, a bonus.
        kl_ref, kl_ref_weight: a KL penalty to the reference, which is then needed whatever lambda is: ``"exact"`` of
            ``full``, ``"k1"``, ``"k2"`` or ``"k3"`` of ``sampled``.
        baseline, clip, advantage_clip: of ``sampled``. logprob_min: of ``sampled`` and ``topk``.
        num_iterations: optimizer steps on each batch of completions. Above 1 the student differs from the policy that
            sampled, and ``sampled`` has a ratio to clip.
        rollout_is, rollout_is_cap: of ``use_vllm``: the importance weights that correct for what the engine computes
            otherwise than the student, and their upper bound, None for no bound. ``rollout_is="none"`` leaves them out.
        rollout_mask, trust_region: of ``use_vllm``: statistics of the two policies outside whose bounds a token has
            weight 0, as ``{"token_ratio": [0.5, 2.0]}``; ``trust_region`` is of ``sampled``.
        lmbda: the share of batches whose completions the student samples, as in TRL's GKD. The others have those of
            the dataset's column ``completion``. Below 1 for ``full`` and ``topk``.
        sft_weight: the weight of the supervised term, -log p of the completion's tokens, in the others.
        cross_tokenizer: teachers and the reference may have tokenizers of their own: they read the texts of prompts and
            completions by their own templates and tokenizers. By default another tokenizer is an error.
        span_credit: with it and ``sampled``, which of the student's tokens get the log-ratio of a span of several:
            ``"spread"`` (the default), an equal part each, or ``"last"``, the last one all.
        route_column: with several teachers, the column of the dataset that names the teacher of each prompt.
        teacher_prompt_column, ref_prompt_column: the column of the dataset, with texts or lists of messages, that
            teachers, or the reference, read in place of ``prompt``. The completions are the student's own.
        teacher_sync_steps, teacher_ema: how ``teacher="student"`` follows the student; by default not at all. It
            becomes the current student every ``teacher_sync_steps`` optimizer steps, or, with ``teacher_ema``, a moving
            average of this decay, updated every ``teacher_sync_steps`` steps (default 1). ``teacher_sync_steps=1``
            alone is the current student, without a copy.
        teacher_cache, teacher_cache_max_bytes: a folder for the hidden states of teachers and reference, a
            :class:`fused_gopd.integrations.cache.TeacherCache`. A sequence that was scored before is read from there.
        chunk_size, chunk_dtype, grad_filter, backend: the computation. ``chunk_dtype``, ``"bfloat16"`` or
            ``"float16"``, is the dtype of a chunk's logits, on a CUDA GPU where all models compute in that dtype.

    Raises:
        ValueError, TypeError: naming the option, what was expected and what was found.
    """

    _VALID_DICT_FIELDS = [*DistillationConfig._VALID_DICT_FIELDS, "rollout_mask", "trust_region"]  # noqa: RUF012

    estimator: str = field(default="full", metadata=_help(RULES["estimator"].help))
    divergence: str | None = field(
        default=None, metadata=_help(f"{', '.join(RULES['divergence'].choices)}; default: that of beta.")
    )
    beta: float | None = field(
        default=None, metadata=_help("TRL's: 0 forward KL, 1 reverse KL, between them JSD; default by divergence.")
    )
    alpha: float | None = _option("alpha")
    skew: float | None = _option("skew")
    forward_weight: float | None = _option("forward_weight")
    k: int | None = _option("k")
    support: str = _option("support")
    tail: str = _option("tail")
    entropy_weight: float = _option("entropy_weight")
    kl_ref: str = _option("kl_ref")
    kl_ref_weight: float = _option("kl_ref_weight")
    reduction: str = _option("reduction")
    clip: list[float] | None = field(default=None, metadata=_help(RULES["clip"].help))
    num_iterations: int = field(default=1, metadata=_help("Optimizer steps on each batch of completions."))
    rollout_is: str = _option("rollout_is")
    rollout_is_cap: float | None = field(default=2.0, metadata=_help("Upper bound of the importance weights."))
    rollout_mask: dict[str, Any] | str | None = field(default=None, metadata=_help(RULES["rollout_mask"].help))
    trust_region: dict[str, Any] | str | None = field(default=None, metadata=_help(RULES["trust_region"].help))
    lmbda: float = field(
        default=1.0,
        metadata=_help("Share of batches whose completions the student samples; the others have the dataset's."),
    )
    sft_weight: float = field(
        default=0.0, metadata=_help("Weight of -log p of the dataset's completions, in the batches that have them.")
    )
    cross_tokenizer: bool = field(
        default=False,
        metadata=_help("Teachers and reference may have tokenizers of their own: texts are compared."),
    )
    span_credit: str | None = field(
        default=None,
        metadata=_help(
            "Of cross_tokenizer with 'sampled': 'spread' (default) or 'last', the tokens that a span trains."
        ),
    )
    chunk_dtype: str | None = field(
        default=None, metadata=_help("Dtype of the chunk's logits: 'bfloat16' or 'float16'; default float32.")
    )
    grad_filter: float = _option("grad_filter")

    def __post_init__(self) -> None:
        self._check_cache()
        self._check_moving_teacher()
        self._check_reward_scale()
        # a trainer needs one number
        one_of("reduction", self.reduction, ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"))
        self._resolve_divergence()
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
        self._check_chunk_dtype()
        self._check_tokenizers()
        self._check_rollouts()
        checked_options(**self._loss_options(), **self._rollout_options)

    def _check_rollouts(self) -> None:
        defaults = {f.name: f.default for f in fields(GOPDConfig)}
        given = [name for name in _ROLLOUT if getattr(self, name) != defaults[name]]
        if given and not self.use_vllm:
            raise ValueError(
                f"{given[0]} needs use_vllm=True: without it the student samples with its own weights and kernels, and "
                "there is no other engine to correct for"
            )
        share = require_number("lmbda", self.lmbda)
        if not 0 <= share <= 1:
            raise ValueError(f"lmbda must be a share, from 0 to 1, got {share}")
        if share < 1 and self.estimator == "sampled":
            raise ValueError(
                f"lmbda={share} needs estimator='full' or 'topk': 'sampled' is a policy gradient, which needs tokens "
                "that the student sampled, and the dataset's completions are not"
            )
        if require_not_negative("sft_weight", self.sft_weight) and share == 1:
            raise ValueError(
                f"sft_weight={self.sft_weight} needs lmbda below 1: the labels are the dataset's completions, and with "
                "lmbda=1 no batch has them"
            )

    @property
    def _rollout_options(self) -> dict[str, Any]:
        """Arguments of the loss beside ``rollout_logprobs``; none where these would change nothing."""
        given = {name: getattr(self, name) for name in _ROLLOUT if getattr(self, name) is not None}
        if self.rollout_is == "none":
            if self.rollout_is_cap == type(self).rollout_is_cap:  # the default
                given.pop("rollout_is_cap", None)
            if given.keys() == {"rollout_is"}:
                return {}
        return given if self.use_vllm else {}

    def _check_tokenizers(self) -> None:
        if self.span_credit is not None:
            one_of("span_credit", self.span_credit, ("spread", "last"))
            if not self.cross_tokenizer or self.estimator != "sampled":
                raise ValueError(
                    f"span_credit={self.span_credit!r} is an option of cross_tokenizer=True with estimator='sampled', "
                    f"got cross_tokenizer={self.cross_tokenizer} and estimator={self.estimator!r}"
                )
        if self.cross_tokenizer and self.estimator == "sampled" and self.baseline != "none":
            raise ValueError(
                f"baseline must be 'none' with cross_tokenizer=True, got {self.baseline!r}: it needs the teacher's "
                "distribution over the student's tokens, where there are log-probs of spans"
            )
        if self.cross_tokenizer and self.support == "student" and self.logprob_min is None:
            raise ValueError(
                "logprob_min must be given for support='student' with cross_tokenizer=True: tokens of the student that "
                "a teacher does not have would add nothing, where unlikely ones are penalised. With logprob_min=-20 "
                "they are as unlikely as that"
            )
        if self.cross_tokenizer and self.tail == "sampled":
            raise ValueError(
                "tail='sampled' needs the teacher's log-prob of each sampled token, and with cross_tokenizer=True some "
                "are no tokens of the teacher's: use another tail"
            )

    def _check_chunk_dtype(self) -> None:
        if self.chunk_dtype is None:
            return
        one_of("chunk_dtype", self.chunk_dtype, tuple(_CHUNK_DTYPES))
        autocast = "bfloat16" if self.bf16 else "float16" if self.fp16 else self.chunk_dtype  # else the models' own
        if self.chunk_dtype != autocast:
            raise ValueError(
                f"chunk_dtype={self.chunk_dtype!r} needs models that compute in that dtype, and mixed precision has "
                f"them compute in {autocast!r}: give that, or leave chunk_dtype out"
            )

    def _resolve_divergence(self) -> None:
        """Set ``divergence`` by TRL's ``beta``, or ``beta`` by ``divergence``; raise where they disagree."""
        if self.divergence is not None and self.divergence not in _BETAS:
            # TRL's beta has no value for it, nor for an unknown name
            if self.beta not in (None, _TRL_BETA):
                raise ValueError(
                    f"beta is for divergence={' or '.join(map(repr, _BETAS))}, got beta={self.beta} with "
                    f"divergence={self.divergence!r}"
                )
            self.beta = _TRL_BETA
            return
        if self.beta is None:
            self.beta = _BETAS[self.divergence or "reverse_kl"]
        beta = require_number("beta", self.beta)
        by_beta = divergence_of(beta)
        if self.divergence is None or (self.divergence == "jsd" and beta in (0.0, 1.0)):
            self.divergence = by_beta
        elif self.divergence != by_beta:
            raise ValueError(
                f"divergence={self.divergence!r} and beta={beta} disagree: beta=1 is 'reverse_kl', beta=0 "
                "'forward_kl', and anything between them 'jsd'; give one of the two"
            )

    def _loss_options(self) -> dict[str, Any]:
        options = super()._loss_options()
        for name in (*_ROLLOUT, "sft_weight"):  # of the batches that have log-probs of an engine, or labels
            options.pop(name, None)
        if self.divergence != "jsd":
            del options["beta"]
        if self.chunk_dtype is not None:
            options["chunk_dtype"] = _CHUNK_DTYPES[self.chunk_dtype]
        return options


@dataclass
class GRPOGOPDConfig(Options, GRPOConfig):  # type: ignore[misc]
    """Configuration of :class:`GRPOGOPDTrainer`: TRL's ``GRPOConfig`` and the options of the advantage.

    Args:
        reward_scale, reward_scale_end, reward_scale_steps, route_column: as in :class:`GOPDConfig`.
        teacher_prompt_column, ref_prompt_column: as in :class:`GOPDConfig`.
        teacher_sync_steps, teacher_ema, teacher_cache, teacher_cache_max_bytes: as in :class:`GOPDConfig`.
        baseline, advantage_clip, logprob_min, chunk_size, backend: as in :class:`GOPDConfig`.
        outcome_weight: factor on the advantage of the rewards; 0 trains on G-OPD alone.
        gopd_weight: factor on the G-OPD advantage of each token.
        teacher_model_init_kwargs: arguments of ``from_pretrained`` for a teacher given by path.

    Raises:
        ValueError, TypeError: as :class:`GOPDConfig`; ``importance_sampling_level="sequence"`` (GSPO), with which TRL's
            losses give each token the mean of its sequence's advantages.
    """

    outcome_weight: float = field(default=1.0, metadata=_help("Factor on the advantage of the rewards."))
    gopd_weight: float = field(default=1.0, metadata=_help("Factor on the G-OPD advantage of each token."))
    teacher_model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Keyword arguments of from_pretrained for a teacher that is loaded.")
    )

    def __post_init__(self) -> None:
        self._check_cache()
        self._check_moving_teacher()
        self._check_reward_scale()
        require_number("outcome_weight", self.outcome_weight)
        require_number("gopd_weight", self.gopd_weight)
        sequence = self.importance_sampling_level == "sequence" and self.loss_type not in _DETACHED_RATIO
        if self.gopd_weight != 0 and sequence:
            raise ValueError(
                "importance_sampling_level must be 'token' beside gopd_weight, got 'sequence': TRL differentiates the "
                "mean of the log-ratios over a sequence, so that each token would get the mean of the sequence's "
                f"advantages and not its own. loss_type={' or '.join(map(repr, _DETACHED_RATIO))} takes no gradient of "
                f"the ratio and may have it (got {self.loss_type!r})"
            )
        super().__post_init__()
        checked_options(**self._loss_options())

    def _loss_options(self) -> dict[str, Any]:
        return {**super()._loss_options(), "estimator": "sampled"}


C = TypeVar("C", bound=Options)


def resolve_config(kind: type[C], args: C | None, model: str | nn.Module, method: str) -> C:
    """The given configuration, or the default one with an output folder named after the model."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(cast("Any", model).config)
        return cast("C", cast("Any", kind)(f"{name.split('/')[-1]}-{method}"))
    if not isinstance(args, kind):
        raise TypeError(f"args must be a {kind.__name__}, which has the options of the loss, got {type(args).__name__}")
    return args
