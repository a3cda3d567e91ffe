"""Fused losses for generalized on-policy distillation: three models, no [tokens, vocabulary] tensor."""

from . import distributed, reference
from .graphs import graphed
from .heads import LinearHead, Logits, TokenLogProbs, TopKLogProbs
from .loss import GOPDLoss, gopd_loss, token_logprobs, token_topk
from .metrics import Metrics
from .options import TokenStats
from .output import GOPDOutput
from .shards import VocabShard

__version__ = "0.1.0"
__all__ = [
    "GOPDLoss",
    "GOPDOutput",
    "LinearHead",
    "Logits",
    "Metrics",
    "TokenLogProbs",
    "TokenStats",
    "TopKLogProbs",
    "VocabShard",
    "distributed",
    "gopd_loss",
    "graphed",
    "reference",
    "token_logprobs",
    "token_topk",
]
