"""The providers of a workload (by default all that support its job), and the description of both in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .peers import PEERS
from .providers import FUSED_PREFIX, LOW_CHUNKS, OWN, chunk_size
from .workloads import SUITES, Workload

PROVIDERS = {**OWN, **PEERS}
FLOOR = "floor"

# Only run when named: the backend for checking, dense code with more outputs than the others, and a function whose
# other configuration is better.
ON_DEMAND = ("fused-torch", "fused-torch-one-pass", "eager", "torch-lce-auto")

# Providers by job for the suite "record", which takes ten minutes on two cores. In bfloat16 the dense path shows the
# naive error, which the fused one must not exceed.
RECORD = {
    "logits-full": ["fused-native", "fused-torch", "compile", "eager-lean", "eager"],
    "logits-sampled": ["fused-native", "compile", "eager"],
    "hidden-full": ["fused-native", "compile", "eager"],
    "hidden-sampled": ["fused-native", "compile"],
    "hidden-full-bf16": ["fused-native", "eager-lean"],
}


# Providers of the suite "run", where minutes are few: this package, compiled dense code, and kernels made for Hopper.
RUN = ("fused-triton", "fused-triton-low-chunks", "fused-triton-one-pass", "compile", "quack", "quack-lse")
RUN += ("fused-triton-stored", "fused-triton-one-pass-stored", "liger-scaled-ce")


def _run(workload: Workload, supporting: list[str]) -> list[str]:
    """Without torch.compile where that needs minutes or much memory: at one hidden size, and up to 8192 tokens."""
    compiled = workload.tokens <= 8192 and workload.hidden is not None and workload.hidden[0] == 2048
    native = [] if torch.device(workload.device).type != "cpu" else ["fused-native", "eager-lean"]
    return [name for name in supporting if name in (*RUN, *native) and (compiled or name != "compile")]


def has_floor(workload: Workload) -> bool:
    """Whether a workload is compared with a floor; the bfloat16 job is compared with the float32 one instead."""
    return workload.job != "hidden-full-bf16"


def providers_of(suite: str, workload: Workload, selected: Sequence[str] = ()) -> list[str]:
    """The providers of a workload, or those of them that are selected."""
    supporting = [name for name, provider in PROVIDERS.items() if workload.job in provider.jobs]
    if selected:
        return [name for name in supporting if name in selected]
    if suite == "run":
        return _run(workload, supporting)
    return RECORD[workload.job] if suite == "record" else [name for name in supporting if name not in ON_DEMAND]


def cases(
    suite: str, device: str, jobs: Sequence[str] = (), selected: Sequence[str] = ()
) -> list[tuple[Workload, str]]:
    """(workload, provider) in the order of the run, the floor first."""
    found = []
    for workload in SUITES[suite].workloads(device):
        if jobs and workload.job not in jobs:
            continue
        floor = [FLOOR] if has_floor(workload) and (not selected or FLOOR in selected) else []
        found += [(workload, name) for name in floor + providers_of(suite, workload, selected)]
    return found


def described(workload: Workload, provider: str) -> dict[str, Any]:
    """The columns of a row that describe the workload, and the provider's chunks where they are known."""
    hidden = None if workload.hidden is None else [*workload.hidden, None, None][:3]
    chunk_dtypes = {"compile-chunked": workload.dtype_name}
    if provider.startswith(FUSED_PREFIX) and hidden is not None:
        chunk_dtypes[provider] = workload.dtype_name if provider.endswith(LOW_CHUNKS) else "float32"
    element_bytes = 2 if provider.endswith(LOW_CHUNKS) else 4
    return {
        "job": workload.job,
        "provider": provider,
        "tokens": workload.tokens,
        "hidden": hidden,
        "vocab": workload.vocab,
        "dtype": workload.dtype_name,
        "chunk_dtype": chunk_dtypes.get(provider),
        "chunk_size": chunk_size(workload, element_bytes) if provider in chunk_dtypes else None,
        "masked": workload.masked,
        "frozen": workload.frozen,
        "peaked": workload.peaked,
    }
