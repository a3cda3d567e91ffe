"""The configurations: TRL's, and the options of the loss; what is wrong with one is said when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn
from trl import DistillationConfig, GRPOConfig
from trl.trainer.utils import get_config_model_id

from ...checks import one_of, require_count, require_number
from ...objective.divergences import DIVERGENCES, divergence_of
from ...options import BASELINES, ESTIMATORS, SUPPORTS, TAILS

# losses of GRPOTrainer whose ratio is a detached weight of A log p
_DETACHED_RATIO = ("cispo", "vespo")
_CHUNK_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class Options:
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
class GOPDConfig(Options, DistillationConfig):  # type: ignore[misc]
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
        chunk_size, chunk_dtype, grad_filter, backend: how it is computed. ``chunk_dtype``, ``"bfloat16"`` or
            ``"float16"``, is the dtype of the chunk's logits, on a CUDA GPU where all models compute in that dtype.

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
    chunk_dtype: str | None = field(
        default=None, metadata=_help("Dtype of the chunk's logits: 'bfloat16' or 'float16'; default float32.")
    )
    grad_filter: float = field(default=0.0, metadata=_help("Leave negligible entries out of the gradient GEMMs."))

    def __post_init__(self) -> None:
        self._check()
        one_of("estimator", self.estimator, ESTIMATORS)
        one_of("support", self.support, SUPPORTS)
        one_of("tail", self.tail, TAILS)
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
        """TRL's ``beta`` and our ``divergence`` say the same; afterwards both are there."""
        meant = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
        if self.divergence is not None:
            one_of("divergence", self.divergence, DIVERGENCES)
        if self.beta is None:
            self.beta = meant[self.divergence or "reverse_kl"]
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
        names = ("estimator", "divergence", "support", "tail", "reduction", "grad_filter")
        options = {**super()._loss_options(), **{name: getattr(self, name) for name in names}}
        if self.divergence == "jsd":
            options["beta"] = self.beta
        if self.chunk_dtype is not None:
            options["chunk_dtype"] = _CHUNK_DTYPES[self.chunk_dtype]
        if self.k is not None:
            options["k"] = self.k
        if self.clip is not None:
            options["clip"] = self.clip
        return options


@dataclass
class GRPOGOPDConfig(Options, GRPOConfig):  # type: ignore[misc]
    """Configuration of :class:`GRPOGOPDTrainer`: TRL's ``GRPOConfig`` and the options of the advantage.

    Args:
        reward_scale, reward_scale_end, reward_scale_steps, route_column, baseline, advantage_clip, logprob_min,
            chunk_size, backend: as in :class:`GOPDConfig`.
        outcome_weight: what the advantage of the rewards is multiplied by; 0 trains on G-OPD alone.
        gopd_weight: what the G-OPD advantage of each token is multiplied by.
        teacher_model_init_kwargs: for a teacher that is loaded.

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
        self._check()
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
