"""``--dry-run``: what a run needs in memory, as planned and as measured, and how long its steps take."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ...run_metrics import rows_of
from ..plan import cost
from ..plan.call import PlannedCall
from ..plan.tables import bytes_text
from .models import dtype_of
from .options import RunOptions

if TYPE_CHECKING:
    from fused_gopd.options import Estimator, Support

STEPS = 2
"""Of a dry run: the first one warms up, the second is timed."""


def describe(trainer: Any, options: RunOptions) -> list[str]:
    """Lines about the memory and the time of a run whose trainer has done :data:`STEPS` steps."""
    unwrap = trainer.accelerator.unwrap_model
    student = unwrap(trainer.model)
    frozen = [unwrap(x.model) for x in trainer._frozen if isinstance(x.model, nn.Module)]
    trained = [p for p in student.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    dense, fused = (bytes_text(x) for x in _loss_peaks(student, frozen, trainer._vocab_size, options))
    own = _storage(student)
    others = {key: size for model in frozen for key, size in _storage(model).items() if key not in own}
    tokens = options.batch_size * options.max_new_tokens
    lines = [
        f"weights: student {bytes_text(sum(own.values()))}, teachers and reference {bytes_text(sum(others.values()))}; "
        f"of {sum(p.numel() for p in trained):,} trained parameters, gradients {bytes_text(gradients)} and the "
        f"optimizer's state {bytes_text(2 * gradients)}",
        f"the loss, of {tokens:,} tokens in the longest batch: at most {fused} beyond its inputs, where dense PyTorch "
        f"needs {dense}",
    ]
    peak = _measured_peak()
    if peak is not None:
        lines.append(f"measured in these steps: at most {bytes_text(peak)}")
    return [*lines, _times(rows_of(trainer.state.log_history), options.steps)]


def _storage(model: nn.Module) -> dict[int, int]:
    """Bytes of the parameters' and buffers' memory by its address: models may share some."""
    tensors: Iterable[torch.Tensor] = (*model.parameters(), *model.buffers())
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def _loss_peaks(student: Any, frozen: list[Any], vocab: int, options: RunOptions) -> tuple[int, int]:
    """Bytes beyond the inputs at the peak of the loss of a batch of the longest answers: dense, and fused."""
    widths = [int(model.config.get_text_config().hidden_size) for model in (student, *frozen)]
    call = PlannedCall(
        tokens=options.batch_size * options.max_new_tokens,
        vocab=vocab,
        hidden=widths[0],
        teacher_hidden=max(widths),
        ref_hidden=max(widths),
        dtype=dtype_of(options.dtype),
        estimator=cast("Estimator", options.estimator),
        reward_scale=options.reward_scale,
        device="gpu" if torch.cuda.is_available() else "cpu",
        divergence=options.divergence,
        k=options.k,
        support=cast("Support", options.support or "teacher"),
    )
    found = cost.figures(call, None)
    return int(found["dense"]["peak"]), int(found["fused"]["peak"])


def _measured_peak() -> int | None:
    """Bytes of the GPU, or of this process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def _times(rows: list[dict[str, Any]], steps: int) -> str:
    row: Mapping[str, Any] = rows[-1]
    seconds = row["seconds"]
    parts = {"sampling": row.get("sample_seconds"), "scoring": row.get("score_seconds")}
    shown = ", ".join(f"{name} {value:.3g} s" for name, value in parts.items() if value is not None)
    speed = "" if row.get("tokens_per_second") is None else f", {row['tokens_per_second']:.3g} tokens/s"
    total = seconds * steps
    whole = f"{total:.3g} s" if total < 120 else f"{total / 60:.3g} min" if total < 7200 else f"{total / 3600:.3g} h"
    return (
        f"a step: {seconds:.3g} s ({shown}){speed}, with answers of {row['length']:.3g} tokens; {steps} such steps: "
        f"{whole}"
    )
