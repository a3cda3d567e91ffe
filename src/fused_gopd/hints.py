"""The types that annotations of modules without PyTorch name, for ``typing.get_type_hints``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import options, token_stats
from .heads import Head
from .targets import Frozen

vars(options).update(torch=torch, Tensor=Tensor, Head=Head, Frozen=Frozen)
vars(token_stats).update(Tensor=Tensor)
