"""Checks of tensors that raise with the name of the argument, what was expected and what was found."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import private

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The label of no token, everywhere in this field.
IGNORE = -100

# A log-prob is at most 0 but for rounding. It is a logit less a log-sum, of a magnitude below 128 in language models.
# One of them may have been rounded to bfloat16, whose numbers there are 1/2 apart: off by half of that.
MOST_LOGPROB = 0.25


def require_float(name: str, value: object) -> None:
    """Raise TypeError unless value is a tensor of a supported floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be a float tensor (float32, bfloat16, float16 or float64), got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor (pack the tokens, and say where sequences end in cu_seqlens)"
        raise TypeError(f"{name} must be dense, got {kind if value.is_nested else value.layout}")


def require_integer(name: str, value: object) -> None:
    """Raise TypeError unless value is an integer tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")


def require_shape(name: str, x: Tensor, shape: torch.Size, owner: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have the token shape {tuple(shape)} of {owner}, got {tuple(x.shape)}")


def require_entries(name: str, x: Tensor, shape: torch.Size, owner: str) -> None:
    """Raise ValueError unless x has several entries at each position."""
    if x.ndim != len(shape) + 1 or x.shape[:-1] != shape or not x.shape[-1]:
        raise ValueError(
            f"{name} must have shape (..., K), K >= 1, with the token shape {tuple(shape)} of {owner}, got "
            f"{tuple(x.shape)}"
        )


def require_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on the student's device {device}, got {x.device}")


def refuse(wrong: Tensor, values: Tensor, error: type[Exception], message: str, found: str = "got") -> None:
    """Raise with the first wrong value; on a GPU a device-side assert, which waits for nothing."""
    if wrong.device.type == "cuda":
        private.assert_async(~wrong.any(), message)
    elif wrong.device.type != "meta" and bool(wrong.any()):
        value = values[wrong][0].item()
        raise error(f"{message}, {found} {value:g}" if isinstance(value, float) else f"{message}, {found} {value}")


def require_mask(name: str, mask: object) -> Tensor:
    """A mask as bool: it may be bool, or hold 0 and 1 in any integer or floating dtype.

    Any other value raises ValueError; on a GPU it is a device-side assert, which waits for nothing.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.is_complex() or mask.is_quantized:
        raise TypeError(f"{name} must be bool, or 0 and 1 in an integer or floating dtype, got {mask.dtype}")
    if mask.dtype == torch.bool:
        return mask
    live = mask != 0
    refuse(live & (mask != 1), mask, ValueError, f"{name} must hold 0 and 1 only")
    return live


def require_logprobs(name: str, values: Tensor, counts: Tensor | None = None) -> None:
    """Raise where log-probs of live tokens are above what rounding explains; only ``counts`` (bool) is checked."""
    wrong = values > MOST_LOGPROB
    message = f"{name} must be log-probabilities, at most 0 (up to {MOST_LOGPROB} of rounding), where not masked"
    refuse(wrong if counts is None else wrong & counts, values, ValueError, message)


def require_reverse_mode(name: str, student: object) -> None:
    """Raise NotImplementedError under what the fused calls have no rule for: batching and forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return
    if private.transforms_active():
        for transform in private.transforms():
            if transform == "Vmap":
                raise NotImplementedError(
                    f"{name} does not run under torch.func.vmap (nor jacfwd and hessian, which use it): it takes any "
                    "token shape, so call it once on the stacked batch"
                )
            if transform != "Grad":
                raise NotImplementedError(
                    f"{name} runs under torch.func.grad, vjp and functional_call, not under {transform}: it has no "
                    "forward-mode derivative; fused_gopd.reference.gopd_loss is plain PyTorch and has"
                )
        return
    if getattr(forward_ad, "_current_level", 0) < 0:  # no tensor has a tangent outside of dual_level
        return
    tensors = getattr(student, "tensors", {}).values()
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):  # type: ignore[no-untyped-call]
        raise NotImplementedError(
            f"{name} has no forward-mode derivative, and the student carries a tangent; "
            "fused_gopd.reference.gopd_loss is plain PyTorch and has one"
        )
