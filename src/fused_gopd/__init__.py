"""Fused losses for generalized on-policy distillation: three models, no [tokens, vocabulary] tensor."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distributed, reference
    from .graphs import graphed
    from .heads import LinearHead, Logits, TokenLogProbs, TopKLogProbs
    from .loss import GOPDLoss, gopd_loss, linear_nll, selected_logprobs, token_logprobs, token_topk
    from .metrics import Metrics
    from .output import GOPDOutput
    from .shards import VocabShard
    from .targets import LogLinear, Mixture
    from .token_stats import TokenStats
else:
    # The names above are imported at their first use, so that the command line starts without PyTorch.
    _HOMES = {
        "GOPDLoss": "loss",
        "GOPDOutput": "output",
        "LinearHead": "heads",
        "LogLinear": "targets",
        "Logits": "heads",
        "Metrics": "metrics",
        "Mixture": "targets",
        "TokenLogProbs": "heads",
        "TokenStats": "token_stats",
        "TopKLogProbs": "heads",
        "VocabShard": "shards",
        "gopd_loss": "loss",
        "graphed": "graphs",
        "linear_nll": "loss",
        "selected_logprobs": "loss",
        "token_logprobs": "loss",
        "token_topk": "loss",
    }

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package."""
        import importlib

        if name in _HOMES:
            importlib.import_module(".loss", __name__)  # the types of the other modules, and the ops of torch.compile
            value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
            globals()[name] = value
            return value
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"
__all__ = [
    "GOPDLoss",
    "GOPDOutput",
    "LinearHead",
    "LogLinear",
    "Logits",
    "Metrics",
    "Mixture",
    "TokenLogProbs",
    "TokenStats",
    "TopKLogProbs",
    "VocabShard",
    "distributed",
    "gopd_loss",
    "graphed",
    "linear_nll",
    "reference",
    "selected_logprobs",
    "token_logprobs",
    "token_topk",
]
