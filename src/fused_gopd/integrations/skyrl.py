"""SkyRL: G-OPD advantages in place of rewards, and an advantage estimator that returns them unchanged.

::

    from fused_gopd.integrations.skyrl import gopd_rewards, register_estimator

    register_estimator()

    class GOPDTrainer(RayPPOTrainer):
        def apply_reward_kl_penalty(self, data):
            return gopd_rewards(data, reward_scale=1.25)

with ``trainer.algorithm.advantage_estimator=gopd``, ``trainer.algorithm.use_kl_in_reward=true``, the teacher as
``trainer.ref.model.path``, and one of SkyRL's own policy losses. SkyRL's example ``on_policy_distillation`` uses
the same two hooks. SkyRL scores one frozen model, here the teacher: for lambda != 1 the trainer must score the
reference too.

Hooks: ``skyrl/train/trainer.py``, ``apply_reward_kl_penalty``; ``skyrl/backends/skyrl_train/utils/ppo_utils.py``,
``register_advantage_estimator``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from ..checks import require_mask
from . import needs
from .logprobs import advantages, require_reference

__all__ = ["gopd_rewards", "register_estimator"]


def gopd_rewards(
    data: Any, reward_scale: float = 1.0, *, teacher: str = "base_action_log_probs", ref: str = "ref_action_log_probs",
    **options: Any,
) -> Any:  # fmt: skip
    """Set ``data["rewards"]`` to the advantage A of each token, and return the data.

    Args:
        data: SkyRL's TrainingInputBatch: ``action_log_probs`` and ``loss_mask`` (B, R), and the scores below.
        reward_scale: lambda.
        teacher, ref: names of the entries (B, R) with their log-probs; the reference's is needed for lambda != 1.
        **options: ``advantage_clip``, ``logprob_min``.

    Raises:
        TypeError, ValueError: naming the entry, what was expected and what to set.
    """
    if data.get(teacher) is None:
        raise ValueError(
            f"data[{teacher!r}] must hold the teacher's log-probs, and is not there: SkyRL scores its ref model with "
            "trainer.algorithm.use_kl_in_reward=true, and trainer.ref.model.path is the teacher"
        )
    fix = f"put its log-probs into data[{ref!r}] before, as SkyRL scores no third model"
    require_reference(reward_scale, data.get(ref), fix)
    data["rewards"] = advantages(
        data["action_log_probs"],
        data[teacher],
        data.get(ref),
        mask=require_mask("data['loss_mask']", data["loss_mask"]),
        reward_scale=reward_scale,
        **options,
    )
    return data


def _unchanged(token_level_rewards: Tensor, *, config: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
    """The rewards, which are advantages already, as advantages and returns."""
    if getattr(config, "advantage_batch_normalize", False):
        raise ValueError(
            "trainer.algorithm.advantage_batch_normalize must be false with the estimator gopd: whitened, A is no "
            "longer A"
        )
    return token_level_rewards, token_level_rewards


def register_estimator() -> None:
    """Register the advantage estimator ``gopd``, which uses the rewards as advantages."""
    # the package was called skyrl_train up to 0.4
    package = "skyrl.backends.skyrl_train" if importlib.util.find_spec("skyrl") else "skyrl_train"
    with needs(__name__, "skyrl", "skyrl_train", install=lambda: "install SkyRL, https://github.com/NovaSky-AI/SkyRL"):
        utils = importlib.import_module(f"{package}.utils.ppo_utils")
    utils.register_advantage_estimator("gopd")(_unchanged)
