"""prime-rl: a custom loss, and target log-probs to send in place of the teacher's in its on-policy distillation.

prime-rl sends one stream of reference log-probs to the trainer. That is enough for A = lambda log q + (1 - lambda)
log r - log p: send :func:`target_logprobs`, computed where the teacher is scored. Then prime-rl's ``ref_kl`` component
is G-OPD without a change; :func:`gopd_loss` is this package's surrogate for tokens of the ``rl`` component::

    [trainer.loss]
    type = "custom"
    import_path = "fused_gopd.integrations.prime_rl.gopd_loss"

Hooks: ``src/prime_rl/trainer/rl/loss.py``, ``setup_rl_loss_fn``; ``src/prime_rl/orchestrator/algo/opd.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..objective.target import mix
from ..values import require_number
from . import needs
from .logprobs import ROLLOUT, metric_sums, sampled_loss

__all__ = ["gopd_loss", "target_logprobs"]


def target_logprobs(reward_scale: float, teacher: Sequence[float], ref: Sequence[float]) -> list[float]:
    """lambda log q + (1 - lambda) log r of each token, to send in place of the teacher's log-probs.

    The result is not normalised, and may be positive. ``teacher`` and ``ref`` have the same length.

    Raises:
        ValueError: different lengths; a token without a finite target.
    """
    scale = require_number("reward_scale", reward_scale)
    if len(teacher) != len(ref):
        raise ValueError(f"teacher and ref must have one length, got {len(teacher)} and {len(ref)}")
    q, r = (torch.tensor(list(x), dtype=torch.float64) for x in (teacher, ref))
    target = mix(scale, None if scale == 0 else q, None if scale == 1 else r)
    values: list[float] = target.tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"token {i} must have finite log-probs under the models that reward_scale={scale} needs, got "
                f"{teacher[i]} (teacher) and {ref[i]} (ref)"
            )
    return values


def gopd_loss(inputs: Any, reward_scale: float = 1.0, **options: Any) -> Any:
    """prime-rl's custom loss of one sequence: the sum of -A rho, with rho relative to the policy that sampled.

    Its own mask of tokens whose probability fell by more than 0.2: ``rollout_mask={"token_difference": (-0.2, None)}``.

    Args:
        inputs: prime-rl's LossInputs: ``trainer_logprobs``, ``inference_logprobs``, ``loss_mask`` (N,), and
            ``ref_logprobs`` (N,), the teacher's or :func:`target_logprobs`. Advantages are not read.
        reward_scale: 1; another lambda must be in ``ref_logprobs`` already.
        **options: ``clip``, ``clip_dual``, ``advantage_clip``, ``logprob_min``, from ``[trainer.loss.kwargs]``; or
            those of importance weights (``rollout_is``, ``rollout_is_cap``, ``rollout_mask``, ``trust_region``): the
            ratio is then a detached weight, which has the same value and gradient, and A is relative to the current
            policy.

    Returns:
        prime-rl's LossOutputs.
    """
    with needs(__name__, "prime_rl", install=lambda: "install prime-rl, https://github.com/PrimeIntellect-ai/prime-rl"):
        from prime_rl.trainer.rl.loss import LossOutputs  # type: ignore[import-not-found]

    if reward_scale != 1:
        raise ValueError(
            f"reward_scale must be 1 in prime-rl's loss, got {reward_scale}: one stream of reference log-probs reaches "
            "it; make that stream target_logprobs(reward_scale, teacher, ref) where the teacher is scored"
        )
    if inputs.ref_logprobs is None:
        raise ValueError("ref_logprobs must be there for gopd_loss: an algorithm has to score a teacher and ship them")
    if options.get("clip") is not None:
        options["clip"] = tuple(options["clip"])
    weighted = any(options.get(name) is not None for name in ROLLOUT)
    out = sampled_loss(
        inputs.trainer_logprobs,
        inputs.ref_logprobs,
        mask=inputs.loss_mask,
        **{"rollout_logprobs" if weighted else "old_logprobs": inputs.inference_logprobs},
        mixed=True,
        **options,
    )
    loss = out.loss if inputs.loss_weights is None else out.loss * inputs.loss_weights
    count = inputs.loss_mask.sum().clamp_min(1)
    return LossOutputs(loss=loss.sum(), metrics={f"gopd/{k}": v / count for k, v in metric_sums(out).items()})
