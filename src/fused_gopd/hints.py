"""The types that the annotations of ``options`` name, which does without PyTorch, for ``typing.get_type_hints``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import options
from .heads import Head
from .targets import Frozen

vars(options).update(torch=torch, Tensor=Tensor, Head=Head, Frozen=Frozen)
