"""A target made of several frozen models: their log-probs, or their probabilities, added with weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import printing
from .checks import require_float
from .heads import Source, TokenLogProbs, TopKLogProbs, require_kind

Weight = float | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Composite:
    """What :class:`LogLinear` and :class:`Mixture` have alike: the models, and the weight of each."""

    models: tuple[Source, ...]
    weights: tuple[Weight, ...]

    def __init__(self, models: Sequence[Source], weights: Sequence[Weight] | Tensor | None = None) -> None:
        name = type(self).__name__
        if not isinstance(models, (list, tuple)):
            raise TypeError(f"models of {name} must be a list of models, got {type(models).__name__}")
        if not models:
            raise ValueError(f"models of {name} must not be an empty list")
        for i, model in enumerate(models):
            self._require_model(f"models[{i}] of {name}", model)
            if model.token_shape != models[0].token_shape:
                raise ValueError(
                    f"models of {name} must have one token shape, got {tuple(models[0].token_shape)} and "
                    f"{tuple(model.token_shape)}"
                )
        if weights is None:
            weights = [1.0 / len(models)] * len(models)
        if not isinstance(weights, (list, tuple, Tensor)):
            raise TypeError(f"weights of {name} must be one number or tensor a model, got {type(weights).__name__}")
        if len(weights) != len(models):
            raise ValueError(f"weights of {name} must be as many as its models, {len(models)}, got {len(weights)}")
        checked = tuple([self._checked(f"weights[{i}] of {name}", weight) for i, weight in enumerate(weights)])
        if all(isinstance(weight, float) and weight == 0 for weight in checked):
            raise ValueError(f"weights of {name} must not all be 0")
        object.__setattr__(self, "models", tuple(models))
        object.__setattr__(self, "weights", checked)

    def _require_model(self, name: str, model: object) -> None:
        if isinstance(model, Composite):
            raise TypeError(f"{name} is a {type(model).__name__}: a target of targets is not supported")
        if isinstance(model, TopKLogProbs):
            raise TypeError(f"{name} is TopKLogProbs, whose tokens differ from model to model: a head is needed")
        require_kind(name, model, TokenLogProbs)

    def _checked(self, name: str, weight: object) -> Weight:
        """A weight in its normal form, a float or a detached tensor."""
        if isinstance(weight, Tensor):
            require_float(name, weight)
            return weight.detach()
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"{name} must be a Python float or a tensor, got {type(weight).__name__}")
        number = float(weight)
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
        self._check_sign(name, number)
        return number

    def _check_sign(self, name: str, weight: float) -> None:
        pass

    @property
    def token_shape(self) -> torch.Size:
        return self.models[0].token_shape

    @property
    def weighed(self) -> Iterator[tuple[Source, Weight]]:
        """The models with their weights, without those that have the number 0."""
        for model, weight in zip(self.models, self.weights, strict=True):
            if isinstance(weight, Tensor) or weight != 0:
                yield model, weight

    def __repr__(self) -> str:
        """One line a model: its weight, kind and the shape of what it brings."""
        parts = (
            f"  {printing.described(weight)}: {type(model).__name__}, "
            + ", ".join(f"{name} {printing.described(x, values=False)}" for name, x in model.tensors.items())
            for model, weight in zip(self.models, self.weights, strict=True)
        )
        return f"{type(self).__name__}(\n" + "\n".join(parts) + "\n)"


class LogLinear(Composite):
    """A target whose log-probs are sum_i w_i log q_i of several frozen models; in the place of a teacher or reference.

    It is not normalised, that is not divided by its sum over the vocabulary: with models q, r and weights lambda,
    1 - lambda it is what ``teacher=q, ref=r, reward_scale=lambda`` computes.

    Args:
        models: LinearHead, Logits or, for ``sampled``, TokenLogProbs of one token shape. Hidden sizes, vocabulary sizes
            and kinds may differ. Each is normalised on its own.
        weights: one for each model, of any sign, which need not sum to 1: a float, a tensor of the token shape, or one
            value per sequence (B,). Default 1 / N each. A model whose weight is the number 0 is not computed. A token
            to which a model with a weight other than 0 gives probability 0 is outside the support.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was found.
    """


class Mixture(Composite):
    """A target whose probabilities are sum_i w_i q_i of several frozen models; in the place of a teacher or reference.

    Args:
        models: as in :class:`LogLinear`.
        weights: as in :class:`LogLinear`, but not negative. A token is outside the support where all models whose
            weight is not 0 give it probability 0.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was found.
    """

    def _check_sign(self, name: str, weight: float) -> None:
        if weight < 0:
            raise ValueError(f"{name} must not be negative, got {weight}")


Frozen = Source | LogLinear | Mixture


def members(model: Frozen) -> tuple[Source, ...]:
    """The models that a model is made of: itself, or those of a sum."""
    return model.models if isinstance(model, Composite) else (model,)
