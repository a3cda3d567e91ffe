"""What PyTorch's compiler is told of by decorators that import it, ``torch._dynamo``, which takes a second.

The calls import this module while they are compiled, when the compiler is there already.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

A = TypeVar("A")
R = TypeVar("R")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def dumps(static: dict[str, Any]) -> str:
    """JSON, made once, when a call is traced."""
    return json.dumps(static)


@torch.compiler.disable(  # type: ignore[untyped-decorator,no-untyped-call]
    reason="advantage_fn and reward_scale_fn are Python functions, which a compiled graph cannot hold: leave out "
    "fullgraph=True, or the loss of what is compiled"
)
def outside_of_graphs(function: Callable[[A], R], argument: A) -> R:
    """Call a function between two compiled graphs."""
    return function(argument)
