"""Fused losses for generalized on-policy distillation: three models, no [tokens, vocabulary] tensor."""

from . import reference
from .heads import LinearHead, Logits, TokenLogProbs, TopKLogProbs
from .loss import GOPDLoss, GOPDOutput, gopd_loss, token_logprobs

__version__ = "0.1.0"
__all__ = [
    "GOPDLoss",
    "GOPDOutput",
    "LinearHead",
    "Logits",
    "TokenLogProbs",
    "TopKLogProbs",
    "gopd_loss",
    "reference",
    "token_logprobs",
]
