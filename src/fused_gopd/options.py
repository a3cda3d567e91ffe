"""Every argument of :func:`fused_gopd.gopd_loss`, once: name, type, default, rule and one line of help.

:class:`LossOptions` are the Python values that stay the same from batch to batch, :class:`LossCall` is one call: these
options, the models and the tensors of a batch. :func:`checked` applies the rules of the fields. What follows from
several arguments together (shapes, devices, which models are needed) is checked in :mod:`fused_gopd.prepare`.

This module and those that it imports do without PyTorch: the command line shows and checks options before it computes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import printing
from .objective.divergences import DIVERGENCES, make
from .objective.rollout_statistics import cap, of_sequences, statistic_bounds
from .records import ComputedWhenRead, none, record
from .rowops import BACKENDS
from .values import (
    bounds,
    epsilons,
    is_tensor,
    number_that,
    one_of,
    require_count,
    require_dtype,
    require_flag,
    require_function,
    require_number,
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


@dataclass(frozen=True, repr=False, kw_only=True)
class TokenStats(ComputedWhenRead):
    """What an ``advantage_fn`` or a ``reward_scale_fn`` gets of C tokens.

    Vectors (C,), detached, float32 (float64 for float64 inputs). For a ``reward_scale_fn`` of ``full``, and of a
    ``baseline``, they are made from the chunk's logits when they are first read: one pass over the logits of a model
    for its log-probs and its entropy, one over those of two models for a divergence. They can then be read inside the
    function only. Ranks that share a vocabulary have to read the same ones in the same order.

    Attributes:
        index: int64 flat positions in the token shape, to line up tensors of one's own: ``mine.reshape(-1)[index]``.
        advantages: A = lambda log q + (1 - lambda) log r - log p, of the old log p if given; 0 where it is not finite;
            None without a teacher and a reference, and for a ``reward_scale_fn``.
        student_logprobs, teacher_logprobs, ref_logprobs: of the sampled token, at least ``logprob_min`` where that is
            given (teacher and reference); None for a model that has cancelled, and for one that is TopKLogProbs (but
            with ``tail="sampled"``). Without ``token_ids`` they raise. Each model is normalised over its own support;
            for an ``advantage_fn`` with ``baseline="expected"`` all are over the joint one.
        old_logprobs: as given, or None.
        student_entropy: in nats.
        teacher_entropy, ref_entropy: None where log-probs are computed elsewhere (for any of several teachers), and
            for an ``advantage_fn`` with ``baseline="expected"``.
        reward_scale: lambda, a float or (C,). What a ``reward_scale_fn`` is to return: there it raises.
        kl_teacher, kl_ref: KL(p || q) and KL(p || r), for a ``reward_scale_fn``: exact over the joint support of the
            two models in ``full`` and with a baseline; in ``topk`` over the tokens of the support and the tail, as
            ``GOPDOutput.kl`` is; None with ``tail="sampled"`` and in ``sampled``, which never has two models' logits
            together.

    A log-prob may be -inf: it is for the function to say what such a token's advantage, or lambda, is.
    """

    index: Tensor
    advantages: Tensor | None
    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    ref_entropy: Tensor | None
    reward_scale: float | Tensor
    kl_teacher: Tensor | None = field(default_factory=none)
    kl_ref: Tensor | None = field(default_factory=none)

    def __repr__(self) -> str:
        return printing.lines(self, unread="not read yet")


TokenFn = Callable[[TokenStats], "Tensor"]
AdvantageFn = TokenFn
RewardScaleFn = TokenFn


# ------------------------------------------------------------------------------------------------------------- rules


class Agree(enum.Enum):
    """How ranks that share a vocabulary agree in an argument, or in a field of a model."""

    OPTION = "a Python value, the same on all ranks"
    NUMBERS = "a number or a tensor, the same in every entry"
    TOKENS = "a number or a tensor, the same at every live token"
    ROUNDED = "a tensor, the same at every live token but for rounding: layers below may sum in another order"
    GIVEN = "given on all ranks or on none: a function, or a rank's own rows of a weight"
    MODELS = "a model or a list of them, field by field"
    SHARD = "the same cut of the vocabulary"
    OWN = "each rank's own affair"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What holds for one argument, whatever the others are.

    Attributes:
        help: one line.
        agree: how ranks that share a vocabulary agree in it.
        of: the estimators that have the option; empty for all of them.
        needs: the argument without which the option has nothing to act on, and ``because``, the end of that sentence.
        choices: the strings that it may be.
        parameter: whether it is the parameter of some divergences; the classes that name it have its range.
        check: (name, value) -> the value in its normal form; raises TypeError or ValueError.
        held: whether :class:`fused_gopd.GOPDLoss` holds it, and whether its ``forward`` takes it: ``per_batch``.
    """

    help: str
    agree: Agree = Agree.OPTION
    of: tuple[Estimator, ...] = ()
    needs: str | None = None
    because: str = ""
    choices: Collection[str] = ()
    parameter: bool = False
    check: Callable[[str, Any], Any] | None = None
    held: bool = True
    per_batch: bool = False


def _option(help: str, **rule: Any) -> dict[str, Rule]:
    """The metadata of a field that holds a Python value."""
    return {"rule": Rule(help=help, **rule)}


def _batch(help: str, agree: Agree, **rule: Any) -> dict[str, Rule]:
    """The metadata of a field that holds the models or tensors of a batch."""
    return {"rule": Rule(**{"help": help, "agree": agree, "held": False, "per_batch": True, **rule})}


_NOT_NEGATIVE = number_that(lambda x: x >= 0, "not be negative")
_RATIOS = {"of": ("sampled",), "needs": "old_logprobs"}
_RATIOS |= {"because": "without them every ratio is 1 and there is nothing to do"}
_ROLLOUT = {"of": ESTIMATORS, "needs": "rollout_logprobs"}
_ROLLOUT |= {"because": "without them there is no importance weight"}
_StatisticBounds = Mapping[str, tuple[float | None, float | None]] | tuple[tuple[str, tuple[float, float]], ...]


# ----------------------------------------------------------------------------------------------------------- options


@record(frozen=True, kw_only=True)
class LossOptions:
    """The options of :func:`fused_gopd.gopd_loss` that are Python values, the same for all batches."""

    estimator: Estimator = field(
        default="sampled",
        metadata=_option(
            "'sampled' (policy gradient), 'full' (exact divergence) or 'topk' (K tokens a position).",
            choices=ESTIMATORS,
        ),
    )
    divergence: str = field(
        default="reverse_kl",
        metadata=_option("Divergence of 'full' and 'topk' between student and target.", choices=DIVERGENCES),
    )
    beta: float = field(
        default=0.5,
        metadata=_option(
            "Share of the target in the mixture of divergence='jsd'; 0 is the forward KL, 1 the reverse KL.",
            parameter=True,
            check=require_number,
        ),
    )
    alpha: float | None = field(
        default=None,
        metadata=_option(
            "Of divergence='alpha', default 0.5; 0 is the reverse KL, 1 the forward KL.",
            parameter=True,
            check=require_number,
        ),
    )
    skew: float | None = field(
        default=None,
        metadata=_option(
            "Of 'skew_kl' and 'skew_reverse_kl', default 0.1: the share of the distribution itself in the mixture.",
            parameter=True,
            check=require_number,
        ),
    )
    k: int | None = field(
        default=None,
        metadata=_option(
            "Tokens of each position for 'topk'.",
            of=("topk",),
            check=lambda name, value: require_count(name, value, least=0),
        ),
    )
    support: Support = field(
        default="teacher",
        metadata=_option("Whose largest tokens 'topk' takes.", of=("topk",), choices=SUPPORTS),
    )
    tail: Tail = field(
        default="bucket",
        metadata=_option("What 'topk' does with the mass outside its tokens.", of=("topk",), choices=TAILS),
    )
    reduction: Reduction = field(
        default="token-mean", metadata=_option("How token losses become the loss.", choices=REDUCTIONS)
    )
    clip: tuple[float, float] | None = field(
        default=None,
        metadata=_option("(epsilon_low, epsilon_high) of PPO's clipped ratio.", **_RATIOS, check=epsilons),
    )
    clip_dual: float | None = field(
        default=None,
        metadata=_option(
            "Token losses of negative advantages are at most -A times this, above 1.",
            **_RATIOS,
            check=number_that(lambda x: x > 1, "be above 1"),
        ),
    )
    ratio: Ratio = field(
        default="token",
        metadata=_option(
            "Ratio of a 'token', mean of a 'sequence' (GSPO-token; 'sequence-mean': GSPO), 'detached' (CISPO), 'none'.",
            **_RATIOS,
            choices=RATIOS,
        ),
    )
    log_ratio_max: float | None = field(
        default=None,
        metadata=_option(
            "Bound on the magnitude of log p - log p_old and of the log of importance weights.",
            of=ESTIMATORS,
            check=number_that(lambda x: x > 0, "be positive"),
        ),
    )
    loss_max: float | None = field(
        default=None,
        metadata=_option(
            "Bound on the magnitude of token losses before weights; no gradient where it is in force.",
            of=ESTIMATORS,
            check=number_that(lambda x: x > 0, "be positive"),
        ),
    )
    advantage_policy: AdvantagePolicy = field(
        default="old",
        metadata=_option(
            "Whether A is relative to the 'old' policy or to the 'current' one.",
            of=("sampled",),
            needs="old_logprobs",
            because="without them A is relative to the current policy",
            choices=ADVANTAGE_POLICIES,
        ),
    )
    rollout_is: RolloutIS = field(
        default="token",
        metadata=_option(
            "Importance weights p_old / p_rollout of a token, a 'sequence' (product), its 'geometric' mean, or 'none'.",
            **_ROLLOUT,
            choices=ROLLOUT_IS,
        ),
    )
    rollout_is_cap: float | tuple[float, float] | None = field(
        default=None,
        metadata=_option("Upper bound of the importance weights, or (low, high).", **_ROLLOUT, check=cap),
    )
    rollout_mask: _StatisticBounds | None = field(
        default=None,
        metadata=_option(
            "Tokens have weight 0 where a statistic of p_old and p_rollout is outside (low, high).",
            **_ROLLOUT,
            check=statistic_bounds,
        ),
    )
    trust_region: _StatisticBounds | None = field(
        default=None,
        metadata=_option(
            "Tokens have weight 0 where a statistic of p and p_rollout is above high and A > 0, below low and A < 0.",
            **{**_ROLLOUT, "of": ("sampled",)},
            check=statistic_bounds,
        ),
    )
    advantage_clip: float | tuple[float, float] | None = field(
        default=None, metadata=_option("Bound on an advantage's magnitude.", of=("sampled",), check=bounds)
    )
    logprob_min: float | None = field(
        default=None,
        metadata=_option(
            "Teacher's and reference's log-probs are at least this.",
            of=("sampled", "topk"),
            check=number_that(lambda x: x < 0, "be negative, as log-probs are"),
        ),
    )
    baseline: Baseline = field(
        default="none",
        metadata=_option("'expected' makes the mean of 'sampled' advantages 0.", of=("sampled",), choices=BASELINES),
    )
    sft_weight: float = field(
        default=1.0,
        metadata=_option(
            "Weight of the supervised term.",
            needs="sft_labels",
            because="without them there is no supervised term to weigh",
            check=_NOT_NEGATIVE,
        ),
    )
    sft_temperature: float | None = field(
        default=None,
        metadata=_option(
            "Temperature of the supervised term; default the student's.",
            needs="sft_labels",
            because="without them there is no supervised term that could have a temperature",
            check=number_that(lambda x: x > 0, "be positive"),
        ),
    )
    entropy_weight: float = field(
        default=0.0, metadata=_option("Weight of the student's entropy, a bonus.", check=require_number)
    )
    kl_ref: KLRef = field(
        default="none",
        metadata=_option(
            "A KL penalty to the reference: 'k1', 'k2' or 'k3' of the sampled token ('sampled'), 'exact' ('full').",
            of=("sampled", "full"),
            choices=KL_REFS,
        ),
    )
    kl_ref_weight: float = field(
        default=1.0,
        metadata=_option(
            "Weight of the KL penalty to the reference.",
            of=("sampled", "full"),
            check=_NOT_NEGATIVE,
        ),
    )
    score_cancelled: bool = field(
        default=False,
        metadata=_option("Also score the model that lambda cancels, for its log-probs.", check=require_flag),
    )
    vocab_size: int | None = field(
        default=None, metadata=_option("Joint vocabulary; default the smallest of the models.")
    )
    chunk_size: int | None = field(
        default=None, metadata=_option("Tokens per chunk; default from a memory budget.", check=require_count)
    )
    chunk_dtype: torch.dtype | None = field(
        default=None, metadata=_option("Dtype of a chunk's logits; default float32.", check=require_dtype)
    )
    grad_filter: float = field(
        default=0.0,
        metadata=_option(
            "Vocabulary entries with smaller logit gradients are left out of the products.", check=_NOT_NEGATIVE
        ),
    )
    store_exponentials: bool = field(
        default=False,
        metadata=_option(
            "The student's product writes the logit gradient itself; Triton, not yet run on a GPU.",
            of=("sampled",),
            check=require_flag,
        ),
    )
    backend: str = field(
        default="auto",
        metadata=_option("'auto', 'torch', 'native' or 'triton'.", agree=Agree.OWN, choices=_BackendNames()),
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
        """The option that makes importance weights depend on whole sequences, as a call has it."""
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

    student: Head = field(metadata=_batch("Model whose tensors receive gradients.", Agree.MODELS))
    teacher: Frozen | Sequence[Frozen] | None = field(metadata=_batch("Teacher, or a list of them.", Agree.MODELS))
    ref: Frozen | Sequence[Frozen] | None = field(
        default=None, metadata=_batch("Reference, or one for each teacher.", Agree.MODELS)
    )
    token_ids: Tensor | None = field(default=None, metadata=_batch("(...) sampled tokens.", Agree.TOKENS))
    _: KW_ONLY
    teacher_index: Tensor | None = field(
        default=None, metadata=_batch("(...) or (B,) which teacher of the list.", Agree.TOKENS)
    )
    mask: Tensor | None = field(default=None, metadata=_batch("(...) the live tokens.", Agree.NUMBERS))
    cu_seqlens: Tensor | None = field(
        default=None, metadata=_batch("(B + 1,) bounds of packed sequences.", Agree.NUMBERS)
    )
    reward_scale: float | Tensor = field(
        default=1.0, metadata=_batch("lambda; all but 1 need a reference.", Agree.TOKENS, held=True)
    )
    reward_scale_fn: RewardScaleFn | None = field(
        default=None,
        metadata=_batch(
            "lambda of each token, from TokenStats, in place of reward_scale.",
            Agree.GIVEN,
            check=require_function,
            held=True,
        ),
    )
    forward_weight: float | Tensor | None = field(
        default=None,
        metadata=_batch(
            "Of divergence='mixed', default 0.5: the forward KL's weight, a number or one per token or sequence.",
            Agree.TOKENS,
            parameter=True,
            check=lambda name, value: value if is_tensor(value) else require_number(name, value),
            held=True,
        ),
    )
    token_weight: Tensor | None = field(
        default=None,
        metadata=_batch("Factor of each token's loss, not negative, one per token or sequence.", Agree.TOKENS),
    )
    normalizer: float | Tensor | None = field(
        default=None, metadata=_batch("Divisor of the means, over all ranks.", Agree.NUMBERS)
    )
    sequence_lengths: Tensor | None = field(
        default=None, metadata=_batch("(B,) live tokens of each sequence, over all ranks.", Agree.NUMBERS)
    )
    old_logprobs: Tensor | None = field(
        default=None,
        metadata=_batch("(...) under the policy of the previous update.", Agree.ROUNDED),
    )
    rollout_logprobs: Tensor | None = field(
        default=None, metadata=_batch("(...) under the engine that sampled.", Agree.ROUNDED)
    )
    support_ids: Tensor | None = field(
        default=None,
        metadata=_batch("(..., K) token ids of the support, -1 for none.", Agree.TOKENS, of=("topk",)),
    )
    advantage_fn: AdvantageFn | None = field(
        default=None,
        metadata=_batch(
            "Advantages of one's own, from TokenStats.", Agree.GIVEN, of=("sampled",), check=require_function, held=True
        ),
    )
    sft_labels: Tensor | None = field(
        default=None, metadata=_batch("(...) labels of the supervised term, -100 for none.", Agree.TOKENS)
    )

    __repr__ = printing.lines


# A wrong call is an error of the function whose signature this is, and named after it.
LossCall.__init__.__qualname__ = "gopd_loss"

RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in dataclasses.fields(LossCall)}
OPTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(LossOptions))
ARGUMENTS: tuple[str, ...] = (*(name for name in RULES if name not in OPTIONS), *OPTIONS)
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(LossCall)}


def options_of(estimator: Estimator) -> tuple[str, ...]:
    """The names of the options that this estimator has and others may not have."""
    return tuple(name for name in OPTIONS if estimator in RULES[name].of)


# ------------------------------------------------------------------------------------------------- applying the rules

_DEFAULTS = tuple((name, DEFAULTS[name]) for name in OPTIONS)
_BATCH_RULES = tuple((name, rule) for name, rule in RULES.items() if name not in OPTIONS and (rule.of or rule.check))
PARAMETERS = tuple(name for name, rule in RULES.items() if rule.parameter)
_UNKNOWN = object()


def checked(options: LossOptions) -> LossOptions:
    """The options in their normal form, each checked by its rule.

    Of a :class:`LossCall` also what an option needs; where there is no batch yet, that is taken to be given. An error
    carries the argument's name as ``option``.
    """
    given = vars(options)
    values = {name: given[name] for name in OPTIONS}
    estimator, name = options.estimator, "estimator"
    try:
        one_of(name, estimator, ESTIMATORS)
        for name, default in _DEFAULTS:
            if values[name] is not default:
                values[name] = _checked(name, values[name], default, options)
        if isinstance(options, LossCall):
            for name, rule in _BATCH_RULES:
                if given[name] is not None:
                    if rule.check is not None:
                        rule.check(name, given[name])
                    _require_estimator(name, rule, estimator)
            name = "old_logprobs"
            if given[name] is not None and estimator != "sampled" and given["rollout_logprobs"] is None:
                raise ValueError(
                    f"old_logprobs is an option of estimator='sampled', or needs rollout_logprobs, got "
                    f"estimator={estimator!r}"
                )
        name = "divergence"
        if estimator == "sampled" and values[name] != "reverse_kl":
            raise ValueError(
                f"divergence={values[name]!r} needs estimator='full' or 'topk'; "
                "'sampled' estimates the reverse KL alone"
            )
        for name in PARAMETERS:
            _check_parameter(name, given.get(name), values["divergence"])
        _normalise_divergence(values, given)
        if values["kl_ref"] == "none":
            if values["kl_ref_weight"] != DEFAULTS["kl_ref_weight"]:
                name = "kl_ref_weight"
                raise ValueError("kl_ref_weight needs kl_ref: there is no KL penalty to weigh")
        else:
            name = "kl_ref"
            if (values["kl_ref"] == "exact") != (estimator == "full"):
                wanted = "'exact'" if estimator == "full" else "'k1', 'k2' or 'k3'"
                raise ValueError(f"kl_ref must be {wanted} with estimator={estimator!r}, got {values['kl_ref']!r}")
            if values["baseline"] != "none":
                raise ValueError("kl_ref needs the reference scored alone, and baseline='expected' scores it jointly")
        if values["tail"] == "sampled":
            name = "tail"
            if values["divergence"] != "reverse_kl":
                raise ValueError(
                    f"tail='sampled' needs divergence='reverse_kl', got divergence={values['divergence']!r}: all "
                    "others need the target's normaliser over the whole vocabulary"
                )
        elif values["k"] == 0:
            name = "k"
            raise ValueError("k must be at least 1, got 0: tail='sampled' alone can do without a support")
        name = "rollout_is"
        if values[name] == "none":
            if values["rollout_is_cap"] is not None:
                raise ValueError("rollout_is_cap bounds importance weights, and rollout_is='none' makes all of them 1")
            if values["rollout_mask"] is None and values["trust_region"] is None:
                raise ValueError("rollout_is='none' needs rollout_mask or trust_region: alone it makes all weights 1")
        name = "ratio"
        for clip, ratios in (("clip", ("none",)), ("clip_dual", ("none", "detached"))):
            if values[name] in ratios and values[clip] is not None:
                raise ValueError(f"{clip} has nothing to act on with ratio={values[name]!r}")
    except (TypeError, ValueError) as error:
        error.option = name  # type: ignore[union-attr]
        raise
    return LossOptions(**values)


def checked_options(**options: Any) -> LossOptions:
    """Keyword arguments in their normal form, before there is a batch.

    What an option needs of the batch is taken to be given. An error carries the argument's name as ``option``.
    """
    refuse_unknown(options, (*OPTIONS, *PARAMETERS), "an option of the loss")
    needed = {RULES[name].needs for name, value in options.items() if value not in (None, DEFAULTS[name])} - {None}
    no_model: Any = None
    batch: dict[str, Any] = {name: _UNKNOWN for name in needed if name is not None}
    return checked(LossCall(no_model, None, **batch, **options))


def _checked(name: str, value: Any, default: Any, options: LossOptions) -> Any:
    """The normal form of a value that is not the default itself."""
    rule = RULES[name]
    if rule.choices:
        one_of(name, value, rule.choices)
    if rule.check is not None:
        value = rule.check(name, value)
    if value == default:
        return value
    _require_estimator(name, rule, options.estimator)
    if rule.needs is not None and getattr(options, rule.needs, _UNKNOWN) is None:
        raise ValueError(f"{name} needs {rule.needs}: {rule.because}")
    return value


def _require_estimator(name: str, rule: Rule, estimator: Estimator) -> None:
    if rule.of and estimator not in rule.of:
        own = " or ".join(map(repr, rule.of))
        raise ValueError(f"{name} is an option of estimator={own}, got estimator={estimator!r}")


def _check_parameter(name: str, value: Any, divergence: str) -> None:
    """Raise where a parameter belongs to another divergence, or is a number outside the range of this one."""
    if value is None or value is DEFAULTS[name] or (not is_tensor(value) and value == DEFAULTS[name]):
        return
    own = DIVERGENCES[divergence].parameter
    if own is None or own.option != name:
        owners = [d.name for d in DIVERGENCES.values() if d.parameter is not None and d.parameter.option == name]
        shown = "a tensor" if is_tensor(value) else value
        raise ValueError(
            f"{name} is an option of divergence={' or '.join(map(repr, owners))}, got {name}={shown} with "
            f"divergence={divergence!r}"
        )
    if not is_tensor(value):
        own.check(float(value))


def _normalise_divergence(values: dict[str, Any], given: dict[str, Any]) -> None:
    """At an end of its parameter's range a divergence is another one."""
    name = values["divergence"]
    if DIVERGENCES[name].parameter is None:
        return
    made = make(name, **{option: given.get(option) for option in PARAMETERS})
    if made.name != name:
        values["divergence"] = made.name
        values |= {option: DEFAULTS[option] for option in PARAMETERS if option in values}


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Raise TypeError for the first name that is not allowed; ``what`` says what it is not, with its article."""
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise TypeError(f"{unknown[0]} is not {what}; expected one of {', '.join(sorted(allowed))}")
