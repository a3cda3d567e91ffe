"""verl 0.9: the G-OPD distillation loss, a policy loss and the fused head, as a plugin that verl loads by name.

``VERL_USE_EXTERNAL_MODULES=fused_gopd.integrations.verl`` in the environment of every process. Then

- ``distillation.distillation_loss.loss_mode=gopd``: the sampled estimator with any lambda, with or without verl's
  policy gradient; ``gopd_topk``: a divergence over the teacher's K likeliest tokens with lambda = 1. Their options are
  in :class:`GOPDLossConfig`, selected by ``distillation.distillation_loss._target_``.
- ``actor_rollout_ref.actor.policy_loss.loss_mode=gopd``: the surrogate for advantages that verl computes.
- ``actor_rollout_ref.model.fused_kernel_options.impl_backend=gopd``: log-probs and entropy from hidden states.

verl has no hook to check a whole config before training, and selects its top-k loss and fused head by name in its own
code. For these three, functions of verl are wrapped; calls that are not for this package go to the original.

Recipe and tested set-ups: ``docs/integrations/verl.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

import fused_gopd as fg

from ..checks import require_mask
from ..installing import packages
from ..option_checks import checked_options
from ..options import DEFAULTS, PARAMETERS
from ..tokens import Sequences
from ..values import one_of
from . import needs
from .logprobs import check_options, named_metrics, require_reference, sampled_loss, token_losses
from .transformers import head_of
from .transformers.transform import remember_transform

with needs(__name__, "verl", install=partial(packages, "verl>=0.9")):
    import verl.models.transformers.monkey_patch as verl_models
    import verl.trainer.distillation.losses as verl_losses
    import verl.utils.config as verl_config
    import verl.utils.experimental.torch_functional as verl_functional
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import AggregationType, Metric
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
    from verl.workers.config import DistillationLossConfig
    from verl.workers.utils.padding import no_padding_2_padding

__all__ = ["GOPDLossConfig", "gopd_loss", "gopd_policy_loss", "gopd_topk_loss"]

GOPD = "gopd"
TOPK = "gopd_topk"
SECTION = "distillation.distillation_loss"
TARGET = f"{__name__}.GOPDLossConfig"

NEEDS_REFERENCE = (
    "verl scores a reference only with actor_rollout_ref.actor.use_kl_loss=true "
    "(and actor_rollout_ref.actor.kl_loss_coef=0 if no other KL term is wanted)"
)


# --------------------------------------------------------------------------------------------------------- options


@dataclass
class GOPDLossConfig(DistillationLossConfig):  # type: ignore[misc]
    """verl's ``distillation.distillation_loss`` with the options of ``gopd`` and ``gopd_topk``.

    Of verl's own fields, ``gopd`` uses ``clip_ratio_low`` and ``clip_ratio_high`` (null for no clip, with
    ``use_policy_gradient=false``) and ``log_prob_min_clamp`` (as ``logprob_min``). ``gopd_topk`` uses ``topk``, and
    with ``tail=drop`` ``log_prob_min_clamp`` (as ``logprob_min`` and ``student_logprob_min``).
    """

    loss_mode: str = GOPD
    use_task_rewards: bool = False
    use_policy_gradient: bool = False
    loss_max_clamp: float | None = None
    log_prob_min_clamp: float | None = None
    reward_scale: float = 1.0  # lambda
    # gopd
    advantage_clip: float | None = None
    clip_dual: float | None = 3.0  # verl's clip_ratio_c, which its policy gradient has at 3
    ratio: str = "token"  # or "sequence" (GSPO-token)
    # gopd_topk
    divergence: str = "reverse_kl"
    beta: float = 0.5
    alpha: float | None = None
    skew: float | None = None
    forward_weight: float | None = None
    tail: str = "bucket"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(f"{SECTION}.loss_mode", self.loss_mode, (GOPD, TOPK))
        require_reference(self.reward_scale, True, "")
        check_options(**self.sampled)
        (self._check_topk if self.loss_mode == TOPK else self._check_sampled)()

    @property
    def sampled(self) -> dict[str, Any]:
        """The options of the sampled estimator. With verl's policy gradient, verl does the clipping."""
        options = {"advantage_clip": self.advantage_clip, "logprob_min": self.log_prob_min_clamp}
        if self.use_policy_gradient:
            return options
        clip = (self.clip_ratio_low, self.clip_ratio_high)
        return {
            **options,
            "clip": None if None in clip else clip,
            "clip_dual": self.clip_dual,
            "ratio": self.ratio,
        }

    @property
    def of_topk(self) -> dict[str, Any]:
        """The options of the topk estimator."""
        parameters = {name: getattr(self, name) for name in PARAMETERS if getattr(self, name) is not None}
        lowest = self.log_prob_min_clamp
        bounds = {} if lowest is None else {"logprob_min": lowest, "student_logprob_min": lowest}
        return {"estimator": "topk", "divergence": self.divergence, "tail": self.tail, **bounds, **parameters}

    def _refuse(self, name: str, default: object, fix: str) -> None:
        value = getattr(self, name)
        if value != default:
            raise ValueError(f"{SECTION}.{name} must be {default} for loss_mode={self.loss_mode!r}: {fix}, got {value}")

    def _check_sampled(self) -> None:
        unset = ((name, DEFAULTS[name]) for name in PARAMETERS)
        for name, default in (("divergence", "reverse_kl"), *unset, ("tail", "bucket")):
            self._refuse(name, default, f"only {TOPK!r} has it")
        if self.use_policy_gradient:
            self._refuse(
                "ratio", "token", "verl's policy gradient has the ratio of the token; use_policy_gradient=false"
            )
            self._refuse("clip_dual", 3.0, "verl's policy gradient has it fixed; use_policy_gradient=false")
        else:
            self._refuse("loss_max_clamp", None, "a clamped loss has no gradient; advantage_clip bounds the advantage")

    def _check_topk(self) -> None:
        if self.tail != "drop":
            self._refuse("log_prob_min_clamp", None, "with tail=drop alone log-probs are not those of a distribution")
        checked_options(**self.of_topk)
        if self.tail == "sampled":
            raise ValueError(
                f"{SECTION}.tail must be one of 'bucket', 'drop', 'renormalize': the teacher's log-prob of the sampled "
                "token is not sent beside those of its likeliest, got 'sampled'"
            )
        self._refuse("reward_scale", 1, f"the reference's log-probs of the teacher's tokens are not sent; use {GOPD!r}")
        self._refuse("use_policy_gradient", False, "a detached divergence is no advantage, its expected gradient is 0")
        self._refuse("use_task_rewards", False, "verl's policy loss may overwrite the logits that the backward needs")
        for name, default in (("advantage_clip", None), ("ratio", "token"), ("clip_dual", 3.0)):
            self._refuse(name, default, f"only {GOPD!r} has it")


def _options(distillation_config: Any) -> GOPDLossConfig:
    options = distillation_config.distillation_loss
    if not isinstance(options, GOPDLossConfig):
        raise TypeError(
            f"{SECTION} must be a GOPDLossConfig for loss_mode={options.loss_mode!r}, got {type(options).__name__}: "
            f"set {SECTION}._target_={TARGET}"
        )
    return options


def check_config(config: Any) -> None:
    """Check verl's whole config for errors that would appear in the first training step. Called by verl's own check.

    Raises:
        TypeError, ValueError: naming the config entry, what was expected, what was found and what to set.
    """
    model, strategy = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.strategy
    if (model.get("fused_kernel_options") or {}).get("impl_backend") == GOPD:
        name = f"actor_rollout_ref.model.fused_kernel_options.impl_backend={GOPD}"
        if not model.get("use_fused_kernels"):
            raise ValueError(f"{name} is without effect: set actor_rollout_ref.model.use_fused_kernels=true")
        if strategy not in ("fsdp", "fsdp2"):
            raise NotImplementedError(
                f"{name} needs actor_rollout_ref.actor.strategy=fsdp or fsdp2, got {strategy!r}, which has its own head"
            )
    distillation = config.get("distillation")
    if not distillation or not distillation.enabled or distillation.distillation_loss.loss_mode not in (GOPD, TOPK):
        return
    loss = distillation.distillation_loss
    if loss.get("_target_") != TARGET:
        raise ValueError(f"{SECTION}._target_ must be {TARGET} for loss_mode={loss.loss_mode!r}, got {loss._target_}")
    scale = verl_config.omega_conf_to_dataclass(loss).reward_scale
    scores_reference = config.algorithm.get("use_kl_in_reward", False) or config.actor_rollout_ref.actor.use_kl_loss
    require_reference(scale, scores_reference or None, NEEDS_REFERENCE)
    _check_temperature(config.actor_rollout_ref.rollout.temperature)
    if loss.loss_mode == TOPK:
        if model.get("use_fused_kernels"):
            raise ValueError(f"{TOPK!r} needs logits: set actor_rollout_ref.model.use_fused_kernels=false")
        _check_strategy(strategy)


def _check_temperature(temperature: Any) -> None:
    values = temperature.reshape(-1).tolist() if isinstance(temperature, Tensor) else [temperature]
    other = [value for value in values if value != 1]
    if other:
        raise ValueError(
            f"actor_rollout_ref.rollout.temperature must be 1 for distillation, got {other[0]}: verl's teachers return "
            "log-probs at temperature 1, and the student's would be those of another one"
        )


def _check_strategy(strategy: str) -> None:
    if strategy not in ("fsdp", "fsdp2", "veomni"):
        raise NotImplementedError(
            f"actor_rollout_ref.actor.strategy must be fsdp, fsdp2 or veomni for {TOPK!r}, got {strategy!r}"
        )


# ------------------------------------------------------------------------------------------------- distillation loss


def _padded(x: Tensor) -> Tensor:
    """(B, R) from a jagged or padded tensor."""
    return x.to_padded_tensor(0) if x.is_nested else x


def _response_mask(data: Any) -> Tensor:
    """(B, R) bool, padded: the live tokens of the response."""
    return require_mask("data['response_mask']", _padded(data["response_mask"]))


def _mean_metrics(metrics: dict[str, Tensor]) -> dict[str, Any]:
    return {name: Metric(AggregationType.MEAN, value) for name, value in metrics.items()}


def gopd_loss(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """The distillation loss ``gopd``, with the signature for verl's ``register_distillation_loss``.

    With ``use_policy_gradient=true`` the losses are -A, from which verl makes advantages for its PPO loss. Otherwise
    they are the token losses -A rho, clipped by the options and multiplied by verl's rollout weights.

    Args:
        config: verl's ActorConfig.
        distillation_config: verl's DistillationConfig, its ``distillation_loss`` a :class:`GOPDLossConfig`.
        model_output: ``log_probs``, jagged (B, prompt + response).
        data: a micro-batch: ``teacher_logprobs`` jagged (B, prompt + response, 1); ``old_log_probs``, ``response_mask``
            and, for lambda != 1, ``ref_log_prob`` (B, R), jagged or padded.

    Returns:
        (B, R) losses, padded, and metrics.
    """
    options = _options(distillation_config)
    _check_temperature(tu.get(data, "temperature", default=1.0))
    ref = data.get("ref_log_prob", None)
    require_reference(options.reward_scale, ref, NEEDS_REFERENCE)
    out = sampled_loss(
        no_padding_2_padding(model_output["log_probs"], data),
        no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1),
        None if ref is None else _padded(ref),
        mask=_response_mask(data),
        reward_scale=options.reward_scale,
        old_logprobs=_padded(data["old_log_probs"]),
        **options.sampled,
    )
    metrics = _mean_metrics(named_metrics(out, "distillation/"))
    if options.use_policy_gradient:
        assert out.advantages is not None
        return -out.advantages, metrics
    weights = data.get("rollout_is_weights", None)
    return out.loss if weights is None else out.loss * _padded(weights), metrics


def _response_rows(data: Any) -> Tensor:
    """(nnz,) bool: the positions of the packed micro-batch whose next token is a live token of the response."""
    offsets = data["input_ids"].offsets()
    # verl's own slicing, applied to the positions
    index = no_padding_2_padding(torch.arange(int(offsets[-1]), device=offsets.device), data)
    rows = torch.zeros(int(offsets[-1]), dtype=torch.bool, device=offsets.device)
    rows[index[_response_mask(data)]] = True
    return rows


def _topk_from_logits(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """The divergence over the teacher's K tokens, (1, nnz / sp), of logits (1, nnz / sp, V); 0 for prompt tokens."""
    _check_strategy(config.strategy)
    _check_temperature(tu.get(data, "temperature", default=1.0))
    options = _options(distillation_config)
    ids, logprobs = data["teacher_ids"].values()[None], data["teacher_logprobs"].values()[None]  # (1, nnz, K)
    mask = _response_rows(data)[None]
    if get_ulysses_sequence_parallel_world_size() > 1:
        ids, logprobs, mask = (slice_input_tensor(x, dim=1) for x in (ids, logprobs, mask))
    out = fg.gopd_loss(
        fg.Logits(student_logits),
        fg.TopKLogProbs(ids.masked_fill(~mask[..., None], -1), logprobs),
        mask=mask,
        reduction="none",
        **options.of_topk,
    )
    return {"distillation_losses": out.loss, "kl_target": out.kl, "teacher_mass": logprobs.exp().sum(-1)}


def gopd_topk_loss(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The distillation loss ``gopd_topk``: (B, R) losses, which were computed from the logits before, and metrics.

    Args as for :func:`gopd_loss`; ``model_output`` has ``distillation_losses``, ``kl_target`` and ``teacher_mass``,
    jagged (B, prompt + response).
    """
    names, mask = ("distillation_losses", "kl_target", "teacher_mass"), _response_mask(data)
    losses, *signals = (no_padding_2_padding(model_output[name], data) for name in names)
    means = {f"distillation/{name}": x[mask].mean() for name, x in zip(names[1:], signals, strict=True)}
    return losses, _mean_metrics(means)


# ------------------------------------------------------------------------------------------------------- policy loss


def gopd_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The policy loss ``gopd``: -A rho with PPO's clip and the dual clip of the actor's config, as in ``gopd_loss``.

    For other advantages (``algorithm.adv_estimator``); distillation does not use it. Unlike verl's ``vanilla`` it does
    not clamp log rho to 20, and the loss of a token with A = 0 is 0 for any ratio.

    Args:
        old_log_prob, log_prob, advantages, response_mask: (B, R).
        config: ActorConfig; clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c and global_batch_info are used.
        rollout_is_weights: (B, R) or None, multiply the token losses.
    """
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    surrogate = check_options(clip=(low, high), clip_dual=config.get("clip_ratio_c", 3.0))
    live = require_mask("response_mask", response_mask)
    old, adv = (x.detach().masked_fill(~live, 0) for x in (old_log_prob, advantages))
    losses, term = token_losses(surrogate, adv, log_prob, old, None, live, Sequences(live.shape))
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    count = live.sum().clamp_min(1)
    kl = (old - log_prob.detach()).masked_fill(~live, 0).sum() / count
    clipped = (term.clipped & live).sum() / count
    return loss, {"actor/pg_clipfrac": clipped.item(), "actor/ppo_kl": kl.item()}


# -------------------------------------------------------------------------------------------------------- fused head


class _Backend(str):
    """The name of the backend with the model as an attribute: verl only passes the name to its fused head."""

    model: Any


class _FusedLinear(verl_functional.FusedLinearForPPO):  # type: ignore[misc]
    """verl's head of log-probs and entropy, by :func:`fused_gopd.token_logprobs` where the backend is ``gopd``."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__(chunk_size, "torch" if impl_backend == GOPD else impl_backend)
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        backend = self.impl_backend
        if not isinstance(backend, _Backend):
            result: tuple[Tensor, Tensor] = super().forward(hidden_states, vocab_weights, input_ids, temperature)
            return result

        def score(head: fg.LinearHead) -> tuple[Tensor, Tensor]:
            # with the family's bias, scale and softcap, which verl's fused heads ignore
            own = head_of(backend.model, head.hidden, temperature=temperature)
            logprobs, entropy = fg.token_logprobs(own, input_ids, return_entropy=True)
            return logprobs, entropy

        # through the module instead of the weight that verl passes, which FSDP2 may have sharded as a separate unit
        return fg.distributed.through_head(backend.model.get_output_embeddings(), hidden_states, score)


# ------------------------------------------------------------------------------------------------------------ loading


def _replace(module: Any, name: str, make: Any) -> None:
    original = getattr(module, name)
    setattr(module, name, wraps(original)(make(original)))


def _checked(original: Any) -> Any:
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(config)
        original(config, *args, **kwargs)

    return validate_config


def _with_topk(original: Any) -> Any:
    def compute_topk_loss(config: Any, distillation_config: Any, *args: Any, **kwargs: Any) -> Any:
        ours = distillation_config.distillation_loss.loss_mode == TOPK
        return (_topk_from_logits if ours else original)(config, distillation_config, *args, **kwargs)

    return compute_topk_loss


# class of model -> its forward before verl replaced it
_FORWARDS: dict[type, Any] = {}


def _with_head(original: Any) -> Any:
    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        ours = use_fused_kernels and fused_kernels_backend == GOPD
        forward = _FORWARDS.setdefault(type(model), type(model).forward)
        original(model, use_fused_kernels, "torch" if ours else fused_kernels_backend)
        if ours:
            remember_transform(model, forward.__get__(model))
            model._verl_fused_kernels_backend = backend = _Backend(GOPD)
            backend.model = model

    return patch_forward_with_backends


def _load() -> None:
    settings = verl_losses.DistillationLossSettings
    verl_losses.register_distillation_loss(settings(names=[GOPD], use_estimator=True))(gopd_loss)
    verl_losses.register_distillation_loss(settings(names=[TOPK], use_topk=True))(gopd_topk_loss)
    register_policy_loss(GOPD)(gopd_policy_loss)
    _replace(verl_config, "validate_config", _checked)
    _replace(verl_losses, "compute_topk_loss", _with_topk)
    _replace(verl_models, "patch_forward_with_backends", _with_head)
    verl_functional.FusedLinearForPPO = _FusedLinear


_load()
