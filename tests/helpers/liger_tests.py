"""Liger's own tests, unchanged, on fused_gopd.integrations.liger.

The wheel of liger-kernel has no tests: clone its repository at the version that is installed. Run from there::

    PYTHONPATH=tests/helpers:<site-packages with liger-kernel> pytest -p liger_tests --rootdir <clone> <clone>/test/...

The plugin replaces Liger's classes before the tests import them. docs/coming-from.md says which tests pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import liger_kernel.chunked_loss as chunked
import liger_kernel.chunked_loss.functional as chunked_functional
import liger_kernel.chunked_loss.grpo_loss as grpo_loss
import liger_kernel.chunked_loss.jsd_loss as jsd_loss
import liger_kernel.ops as ops
import liger_kernel.transformers.functional as functional
import liger_kernel.transformers.fused_linear_jsd as fused_linear_jsd
from torch import nn

from fused_gopd.integrations import liger


def function(replaced: type, module: type[nn.Module], renamed: dict[str, str]) -> type:
    """A class with the ``apply`` of Liger's autograd Function: its arguments in order, given to a module of ours."""
    names = [renamed.get(x, x) for x in list(inspect.signature(replaced.forward).parameters)]
    held = inspect.signature(module.__init__).parameters
    names = names[1:] if names[0] == "ctx" else names

    def apply(*arguments: Any, **more: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **more}
        # test_functional_correctness has its arguments shifted: it gives two numbers the values False and True
        shifted = [name for name, x in given.items() if isinstance(x, bool) and held[name].annotation == "float"]
        made = module(**{name: value for name, value in given.items() if name in held and name not in shifted})
        accepted = inspect.signature(module.forward).parameters
        return made(**{name: value for name, value in given.items() if name in accepted})

    return type(replaced.__name__, (), {"apply": staticmethod(apply)})


chunked.LigerFusedLinearJSDLoss = jsd_loss.LigerFusedLinearJSDLoss = liger.LigerFusedLinearJSDLoss
jsd_loss.LigerFusedLinearJSDFunction = function(jsd_loss.LigerFusedLinearJSDFunction, liger.LigerFusedLinearJSDLoss, {})
chunked_functional.liger_fused_linear_jsd = jsd_loss.LigerFusedLinearJSDFunction.apply

fused_linear_jsd.LigerFusedLinearJSD = liger.LigerFusedLinearJSD
ops.LigerFusedLinearJSDFunction = functional.LigerFusedLinearJSDFunction = function(
    ops.LigerFusedLinearJSDFunction, liger.LigerFusedLinearJSD, {}
)

chunked.LigerFusedLinearGRPOLoss = grpo_loss.LigerFusedLinearGRPOLoss = liger.LigerFusedLinearGRPOLoss
grpo_loss.LigerFusedLinearGRPOFunction = function(
    grpo_loss.LigerFusedLinearGRPOFunction, liger.LigerFusedLinearGRPOLoss, {"weight": "lin_weight"}
)
chunked_functional.liger_fused_linear_grpo = grpo_loss.LigerFusedLinearGRPOFunction.apply
