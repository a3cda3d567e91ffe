"""Which providers a workload has (all that do its job, unless somebody names them), and what a row says of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .peers import PEERS
from .providers import FUSED_PREFIX, LOW_CHUNKS, OWN, chunk_size
from .workloads import SUITES, Workload

PROVIDERS = {**OWN, **PEERS}
FLOOR = "floor"

# Left out unless they are asked for by name: the backend that is for checking, dense code with more outputs than its
# competitors have, and what a better setting of the same function stands for.
ON_DEMAND = ("fused-torch", "fused-torch-one-pass", "eager", "torch-lce-auto")

# Providers by job, to be had in ten minutes on two cores. In bfloat16 the dense path stands for the naive accuracy that
# the fused one must not fall behind.
RECORD = {
    "logits-full": ["fused-native", "fused-torch", "compile", "eager-lean", "eager"],
    "logits-sampled": ["fused-native", "compile", "eager"],
    "hidden-full": ["fused-native", "compile", "eager"],
    "hidden-sampled": ["fused-native", "compile"],
    "hidden-full-bf16": ["fused-native", "eager-lean"],
}


def has_floor(workload: Workload) -> bool:
    """The log has its bfloat16 job beside the same in float32 instead."""
    return workload.job != "hidden-full-bf16"


def providers_of(suite: str, workload: Workload, asked: Sequence[str] = ()) -> list[str]:
    able = [name for name, provider in PROVIDERS.items() if workload.job in provider.jobs]
    if asked:
        return [name for name in able if name in asked]
    return RECORD[workload.job] if suite == "record" else [name for name in able if name not in ON_DEMAND]


def cases(suite: str, device: str, jobs: Sequence[str] = (), asked: Sequence[str] = ()) -> list[tuple[Workload, str]]:
    """Workload and provider in the order in which they run, the floor first."""
    found = []
    for workload in SUITES[suite].workloads(device):
        if jobs and workload.job not in jobs:
            continue
        floor = [FLOOR] if has_floor(workload) and (not asked or FLOOR in asked) else []
        found += [(workload, name) for name in floor + providers_of(suite, workload, asked)]
    return found


def described(workload: Workload, provider: str) -> dict[str, Any]:
    """What a row says of a workload, and of the chunks where its provider's are known."""
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
    }
