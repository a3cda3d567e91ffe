"""G-OPD in TRL 1.16: a trainer, a G-OPD advantage for ``GRPOTrainer``, and this package's loss in TRL's own trainer.

* :class:`GOPDTrainer`, a ``DistillationTrainer`` with a reference, lambda, several teachers, and every estimator.
* :class:`GRPOGOPDMixin`, which adds the G-OPD advantage of each token to that of ``GRPOTrainer``'s rewards.
* :func:`patch_distillation_loss`, which computes the loss of TRL's own ``DistillationTrainer`` with this package.

Generation, logging, checkpoints, accumulation and ranks are TRL's. Overridden are the methods that compute the loss,
that return completions, and that log metrics.
"""

from __future__ import annotations

from functools import partial

from ...installing import extra
from .. import needs

with needs(__name__, "trl", "transformers", "datasets", "accelerate", install=partial(extra, "train")):
    from .checks import check_tokenizers
    from .config import GOPDConfig, GRPOGOPDConfig
    from .grpo import GRPOGOPDMixin, GRPOGOPDTrainer
    from .patch import patch_distillation_loss
    from .trainer import GOPDTrainer

__all__ = [
    "GOPDConfig",
    "GOPDTrainer",
    "GRPOGOPDConfig",
    "GRPOGOPDMixin",
    "GRPOGOPDTrainer",
    "check_tokenizers",
    "patch_distillation_loss",
]
