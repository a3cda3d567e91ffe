"""slime: G-OPD advantages by a custom advantage function, for slime's own policy loss.

::

    --custom-advantage-function-path fused_gopd.integrations.slime.gopd_advantages
    --custom-config-path gopd.yaml          # gopd_reward_scale: 1.25
    --use-opd --opd-kl-coef 0 --opd-type ...  # who scores the teacher; slime's own term switched off
    --use-kl-loss --kl-loss-coef 0          # scores the reference, for gopd_reward_scale other than 1

Hook: ``slime/backends/megatron_utils/loss.py``, ``compute_advantages_and_returns``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .logprobs import advantages, require_reference

__all__ = ["gopd_advantages"]


def _scores(rollout_data: dict[str, Any], name: str, fix: str) -> list[Tensor]:
    scores: list[Tensor] | None = rollout_data.get(name)
    if scores is None:
        raise ValueError(f"rollout_data[{name!r}] must be there for the G-OPD advantages, and is not: {fix}")
    return scores


def gopd_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Set ``rollout_data["advantages"]`` and ``["returns"]`` to the advantage A of each token.

    Args:
        args: slime's, with ``gopd_reward_scale`` (lambda) and optionally ``gopd_advantage_clip`` and
            ``gopd_logprob_min`` from ``--custom-config-path``.
        rollout_data: lists of (R_i,) float tensors: ``log_probs`` (``rollout_log_probs`` under
            ``--use-rollout-logprobs``), ``teacher_log_probs`` and, for lambda != 1, ``ref_log_probs``.

    Raises:
        TypeError, ValueError: naming the option or entry, what was expected, and what to set.
    """
    if not hasattr(args, "gopd_reward_scale"):
        raise ValueError("gopd_reward_scale (lambda) must be set, in the YAML file of --custom-config-path")
    if args.use_opd and args.opd_kl_coef != 0:
        raise ValueError(
            f"--opd-kl-coef must be 0 with gopd_advantages, got {args.opd_kl_coef}: slime would add its own "
            "distillation term to these advantages"
        )
    if args.normalize_advantages:
        raise ValueError("--normalize-advantages must not be set with gopd_advantages: whitened, A is no longer A")
    if getattr(args, "advantage_estimator", None) == "gspo":
        raise ValueError(
            "--advantage-estimator must not be gspo with gopd_advantages: slime's policy loss differentiates the mean "
            "of the log-ratios over a sample, so that each token would get the mean of the sample's advantages; use "
            "grpo or cispo"
        )
    own = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    student = _scores(rollout_data, own, "slime keeps them with --use-opd")
    teacher = _scores(rollout_data, "teacher_log_probs", "slime scores a teacher with --use-opd and --opd-type")
    ref = rollout_data.get("ref_log_probs")
    fix = "slime scores a reference with --use-kl-loss (and --kl-loss-coef 0)"
    scale = require_reference(args.gopd_reward_scale, ref, fix)
    options = {name: getattr(args, f"gopd_{name}", None) for name in ("advantage_clip", "logprob_min")}
    rollout_data["advantages"] = [
        advantages(p, q.to(p.device), None if r is None else r.to(p.device), reward_scale=scale, **options)
        for p, q, r in zip(student, teacher, [None] * len(student) if ref is None else ref, strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]
