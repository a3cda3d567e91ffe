"""Every argument of :func:`fused_gopd.gopd_loss`, once: name, type, default, rule and one line of help.

:class:`LossOptions` are the Python values that stay the same from batch to batch, :class:`LossCall` is one call: these
options, the models and the tensors of a batch. Their rules, and those of several options together, are applied in
:mod:`fused_gopd.option_checks`; shapes, devices and which models are needed in :mod:`fused_gopd.prepare`.

This module and those that it imports do without PyTorch: the command line shows and checks options before it computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import printing
from .objective.divergences import DIVERGENCES
from .objective.rollout_statistics import cap, of_sequences, statistic_bounds
from .records import record
from .rowops import BACKENDS
from .rules import Agree, Rule, batch, option
from .token_stats import AdvantageFn, RewardScaleFn
from .values import (
    bounds,
    epsilons,
    is_tensor,
    number_that,
    require_count,
    require_dtype,
    require_flag,
    require_function,
    require_not_negative,
    require_number,
    require_positive,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .heads import Head
    from .targets import Frozen

Estimator = Literal["sampled", "full", "topk"]
Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"]
Ratio = Literal["token", "sequence", "sequence-mean", "detached", "none"]
AdvantagePolicy = Literal["old", "current"]
RolloutIS = Literal["token", "sequence", "geometric", "none"]
Baseline = Literal["none", "expected"]
Support = Literal["teacher", "student"]
KLRef = Literal["none", "k1", "k2", "k3", "exact"]
Tail = Literal["bucket", "drop", "renormalize", "sampled"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
RATIOS: tuple[str, ...] = get_args(Ratio)
ADVANTAGE_POLICIES: tuple[str, ...] = get_args(AdvantagePolicy)
ROLLOUT_IS: tuple[str, ...] = get_args(RolloutIS)
BASELINES: tuple[str, ...] = get_args(Baseline)
SUPPORTS: tuple[str, ...] = get_args(Support)
KL_REFS: tuple[str, ...] = get_args(KLRef)
TAILS: tuple[str, ...] = get_args(Tail)


class _BackendNames(Collection[str]):
    """The name auto and those of the table of backends, to which code outside the package can add."""

    def __contains__(self, name: object) -> bool:
        return name == "auto" or name in BACKENDS

    def __iter__(self) -> Iterator[str]:
        return iter(("auto", *BACKENDS))

    def __len__(self) -> int:
        return 1 + len(BACKENDS)


_RATIOS = {"of": ("sampled",), "needs": "old_logprobs"}
_RATIOS |= {"because": "without them every ratio is 1 and there is nothing to do"}
_ROLLOUT = {"of": ESTIMATORS, "needs": "rollout_logprobs"}
_ROLLOUT |= {"because": "the log-probs under the engine that sampled, to which the policy is compared"}
_StatisticBounds = Mapping[str, tuple[float | None, float | None]] | tuple[tuple[str, tuple[float, float]], ...]


# ----------------------------------------------------------------------------------------------------------- options


@record(frozen=True, kw_only=True)
class LossOptions:
    """The options of :func:`fused_gopd.gopd_loss` that are Python values, the same for all batches."""

    estimator: Estimator = field(
        default="sampled",
        metadata=option(
            "'sampled' (policy gradient), 'full' (exact divergence) or 'topk' (K tokens a position).",
            choices=ESTIMATORS,
        ),
    )
    divergence: str = field(
        default="reverse_kl",
        metadata=option("Divergence of 'full' and 'topk' between student and target.", choices=DIVERGENCES),
    )
    beta: float = field(
        default=0.5,
        metadata=option(
            "Share of the target in the mixture of divergence='jsd'; 0 is the forward KL, 1 the reverse KL.",
            parameter=True,
            check=require_number,
        ),
    )
    alpha: float | None = field(
        default=None,
        metadata=option(
            "Of divergence='alpha', default 0.5; 0 is the reverse KL, 1 the forward KL.",
            parameter=True,
            check=require_number,
        ),
    )
    skew: float | None = field(
        default=None,
        metadata=option(
            "Of 'skew_kl' and 'skew_reverse_kl', default 0.1: the share of the distribution itself in the mixture.",
            parameter=True,
            check=require_number,
        ),
    )
    k: int | None = field(
        default=None,
        metadata=option(
            "Tokens of each position for 'topk'.",
            of=("topk",),
            check=lambda name, value: require_count(name, value, least=0),
        ),
    )
    support: Support = field(
        default="teacher",
        metadata=option("Whose largest tokens 'topk' takes.", of=("topk",), choices=SUPPORTS),
    )
    tail: Tail = field(
        default="bucket",
        metadata=option("What 'topk' does with the mass outside its tokens.", of=("topk",), choices=TAILS),
    )
    reduction: Reduction = field(
        default="token-mean", metadata=option("How token losses become the loss.", choices=REDUCTIONS)
    )
    clip: tuple[float, float] | None = field(
        default=None,
        metadata=option("(epsilon_low, epsilon_high) of PPO's clipped ratio.", **_RATIOS, check=epsilons),
    )
    clip_dual: float | None = field(
        default=None,
        metadata=option(
            "Token losses of negative advantages are at most -A times this, above 1.",
            **_RATIOS,
            check=number_that(lambda x: x > 1, "be above 1"),
        ),
    )
    ratio: Ratio = field(
        default="token",
        metadata=option(
            "Ratio of a 'token', mean of a 'sequence' (GSPO-token; 'sequence-mean': GSPO), 'detached' (CISPO), 'none'.",
            **_RATIOS,
            choices=RATIOS,
        ),
    )
    log_ratio_max: float | None = field(
        default=None,
        metadata=option(
            "Bound on the magnitude of log p - log p_old and of the log of importance weights.",
            of=ESTIMATORS,
            check=require_positive,
        ),
    )
    loss_max: float | None = field(
        default=None,
        metadata=option(
            "Bound on the magnitude of token losses before weights; no gradient where it is in force.",
            of=ESTIMATORS,
            check=require_positive,
        ),
    )
    advantage_policy: AdvantagePolicy = field(
        default="old",
        metadata=option(
            "Whether A is relative to the 'old' policy or to the 'current' one.",
            of=("sampled",),
            needs="old_logprobs",
            because="without them A is relative to the current policy",
            choices=ADVANTAGE_POLICIES,
        ),
    )
    rollout_is: RolloutIS = field(
        default="token",
        metadata=option(
            "Importance weights p_old / p_rollout of a token, a 'sequence' (product), its 'geometric' mean, or 'none'.",
            **_ROLLOUT,
            choices=ROLLOUT_IS,
        ),
    )
    rollout_is_cap: float | tuple[float, float] | None = field(
        default=None,
        metadata=option("Upper bound of the importance weights, or (low, high).", **_ROLLOUT, check=cap),
    )
    rollout_mask: _StatisticBounds | None = field(
        default=None,
        metadata=option(
            "Tokens have weight 0 where a statistic of p_old and p_rollout is outside (low, high).",
            **_ROLLOUT,
            check=statistic_bounds,
        ),
    )
    trust_region: _StatisticBounds | None = field(
        default=None,
        metadata=option(
            "Tokens have weight 0 where a statistic of p and p_rollout is above high and A > 0, below low and A < 0.",
            **{**_ROLLOUT, "of": ("sampled",)},
            check=statistic_bounds,
        ),
    )
    advantage_clip: float | tuple[float, float] | None = field(
        default=None, metadata=option("Bound on an advantage's magnitude.", of=("sampled",), check=bounds)
    )
    logprob_min: float | None = field(
        default=None,
        metadata=option(
            "Teacher's and reference's log-probs are at least this.",
            of=("sampled", "topk"),
            check=number_that(lambda x: x < 0, "be negative, as log-probs are"),
        ),
    )
    student_logprob_min: float | None = field(
        default=None,
        metadata=option(
            "The student's log-probs of the tokens of tail='drop' are at least this; no gradient where it is in force.",
            of=("topk",),
            check=number_that(lambda x: x < 0, "be negative, as log-probs are"),
        ),
    )
    baseline: Baseline = field(
        default="none",
        metadata=option("'expected' makes the mean of 'sampled' advantages 0.", of=("sampled",), choices=BASELINES),
    )
    sft_weight: float = field(
        default=1.0,
        metadata=option(
            "Weight of the supervised term.",
            needs="sft_labels",
            because="without them there is no supervised term to weigh",
            check=require_not_negative,
        ),
    )
    sft_temperature: float | None = field(
        default=None,
        metadata=option(
            "Temperature of the supervised term; default the student's.",
            needs="sft_labels",
            because="without them there is no supervised term that could have a temperature",
            check=require_positive,
        ),
    )
    entropy_weight: float = field(
        default=0.0, metadata=option("Weight of the student's entropy, a bonus.", check=require_number)
    )
    kl_ref: KLRef = field(
        default="none",
        metadata=option(
            "A KL penalty to the reference: 'k1', 'k2' or 'k3' of the sampled token ('sampled'), 'exact' ('full').",
            of=("sampled", "full"),
            choices=KL_REFS,
        ),
    )
    kl_ref_weight: float = field(
        default=1.0,
        metadata=option(
            "Weight of the KL penalty to the reference.",
            of=("sampled", "full"),
            check=require_not_negative,
        ),
    )
    score_cancelled: bool = field(
        default=False,
        metadata=option("Also score the model that lambda cancels, for its log-probs.", check=require_flag),
    )
    vocab_size: int | None = field(
        default=None, metadata=option("Joint vocabulary; default the smallest of the models.")
    )
    chunk_size: int | None = field(
        default=None, metadata=option("Tokens per chunk; default from a memory budget.", check=require_count)
    )
    chunk_dtype: torch.dtype | None = field(
        default=None, metadata=option("Dtype of a chunk's logits; default float32.", check=require_dtype)
    )
    grad_filter: float = field(
        default=0.0,
        metadata=option(
            "Vocabulary entries with smaller logit gradients are left out of the products.", check=require_not_negative
        ),
    )
    store_exponentials: bool = field(
        default=False,
        metadata=option(
            "The student's product writes the logit gradient itself; Triton, not yet run on a GPU.",
            of=("sampled",),
            check=require_flag,
        ),
    )
    backend: str = field(
        default="auto",
        metadata=option("'auto', 'torch', 'native' or 'triton'.", agree=Agree.OWN, choices=_BackendNames()),
    )

    @property
    def joint(self) -> bool:
        """Whether the models of a token are normalised together, over their joint support."""
        return self.estimator == "full" or self.baseline == "expected"

    @property
    def passes(self) -> tuple[str, ...]:
        """The terms beside the loss that take a row pass of their own, and a buffer for their gradient."""
        made = {
            "entropy": self.joint and self.entropy_weight != 0,
            "kl_ref": self.kl_ref == "exact",
            "labels": self.sft_temperature is not None,
        }
        return tuple([name for name, there in made.items() if there])

    @property
    def clips(self) -> bool:
        """Whether a bound of the ratio or of the loss may remove the gradient of a token."""
        return any(x is not None for x in (self.clip, self.clip_dual, self.loss_max)) or (
            self.log_ratio_max is not None and self.estimator == "sampled"
        )

    @property
    def plain_importance(self) -> bool:
        """Whether importance weights are those of tokens with at most an upper bound, which kernels know."""
        return (
            self.rollout_is == "token"
            and self.rollout_mask is None
            and self.log_ratio_max is None
            and not isinstance(self.rollout_is_cap, (tuple, list))
        )

    @property
    def sequence_importance(self) -> str | None:
        """The option that makes importance weights depend on whole sequences, as in a call; None without one."""
        if self.rollout_is in ("sequence", "geometric"):
            return f"rollout_is={self.rollout_is!r}"
        if self.rollout_mask is not None and of_sequences(self.rollout_mask):
            return "rollout_mask of whole sequences"
        return None

    def logits_dtype(self, default: torch.dtype) -> torch.dtype:
        """Of a chunk's logits."""
        return default if self.chunk_dtype is None else self.chunk_dtype


@record(frozen=True, eq=False, repr=False)
class LossCall(LossOptions):
    """One call of :func:`fused_gopd.gopd_loss`: the models, the tensors of a batch and the options."""

    student: Head = field(metadata=batch("Model whose tensors receive gradients.", Agree.MODELS))
    teacher: Frozen | Sequence[Frozen] | None = field(metadata=batch("Teacher, or a list of them.", Agree.MODELS))
    ref: Frozen | Sequence[Frozen] | None = field(
        default=None, metadata=batch("Reference, or one for each teacher.", Agree.MODELS)
    )
    token_ids: Tensor | None = field(default=None, metadata=batch("(...) sampled tokens.", Agree.TOKENS))
    _: KW_ONLY
    teacher_index: Tensor | None = field(
        default=None, metadata=batch("(...) or (B,) which teacher of the list.", Agree.TOKENS)
    )
    mask: Tensor | None = field(default=None, metadata=batch("(...) the live tokens.", Agree.NUMBERS))
    cu_seqlens: Tensor | None = field(
        default=None, metadata=batch("(B + 1,) bounds of packed sequences.", Agree.NUMBERS)
    )
    reward_scale: float | Tensor = field(
        default=1.0, metadata=batch("lambda; all but 1 need a reference.", Agree.TOKENS, held=True)
    )
    reward_scale_fn: RewardScaleFn | None = field(
        default=None,
        metadata=batch(
            "lambda of each token, from TokenStats, in place of reward_scale.",
            Agree.GIVEN,
            check=require_function,
            held=True,
        ),
    )
    forward_weight: float | Tensor | None = field(
        default=None,
        metadata=batch(
            "Of divergence='mixed', default 0.5: the forward KL's weight, a number or one per token or sequence.",
            Agree.TOKENS,
            parameter=True,
            check=lambda name, value: value if is_tensor(value) else require_number(name, value),
            held=True,
        ),
    )
    token_weight: Tensor | None = field(
        default=None,
        metadata=batch("Factor of each token's loss, not negative, one per token or sequence.", Agree.TOKENS),
    )
    normalizer: float | Tensor | None = field(
        default=None, metadata=batch("Divisor of the means, over all ranks.", Agree.NUMBERS)
    )
    sequence_lengths: Tensor | None = field(
        default=None, metadata=batch("(B,) live tokens of each sequence, over all ranks.", Agree.NUMBERS)
    )
    old_logprobs: Tensor | None = field(
        default=None,
        metadata=batch("(...) under the policy of the previous update.", Agree.ROUNDED),
    )
    rollout_logprobs: Tensor | None = field(
        default=None, metadata=batch("(...) under the engine that sampled.", Agree.ROUNDED)
    )
    support_ids: Tensor | None = field(
        default=None,
        metadata=batch("(..., K) token ids of the support, -1 for none.", Agree.TOKENS, of=("topk",)),
    )
    advantage_fn: AdvantageFn | None = field(
        default=None,
        metadata=batch(
            "Advantages of one's own, from TokenStats.", Agree.GIVEN, of=("sampled",), check=require_function, held=True
        ),
    )
    sft_labels: Tensor | None = field(
        default=None, metadata=batch("(...) labels of the supervised term, -100 for none.", Agree.TOKENS)
    )

    __repr__ = printing.lines


# A wrong call is an error of the function whose signature this is, and named after it.
LossCall.__init__.__qualname__ = "gopd_loss"

RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in dataclasses.fields(LossCall)}
OPTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(LossOptions))
ARGUMENTS: tuple[str, ...] = (*(name for name in RULES if name not in OPTIONS), *OPTIONS)
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(LossCall)}
PARAMETERS: tuple[str, ...] = tuple(name for name, rule in RULES.items() if rule.parameter)  # of divergences


def options_of(estimator: Estimator) -> tuple[str, ...]:
    """The names of the options that this estimator has and others may not have."""
    return tuple(name for name in OPTIONS if estimator in RULES[name].of)
