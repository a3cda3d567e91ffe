"""Count what a call makes the host do: launches, ATen calls and calls of Python functions, once and per further chunk.

    python tests/helpers/host_costs.py [--write]

prints them for every estimator on the backends native and triton (whose kernels are counted and not run), forward and
backward on float32 LinearHeads on a CPU. ``--write`` makes the table that the tests compare with. On a GPU each launch
takes the host microseconds, however many tokens it has.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_gopd as fg
import snapshots
from fused_gopd.rowops import native as native_backend
from fused_gopd.rowops import triton as triton_backend

TABLE = "host_costs.json"
BACKENDS = ("native", "triton")
PACKAGE = str(Path(fg.__file__).parent)
# All are exact for one version of Python and PyTorch.
RULES = {
    f"{quantity}, {of}": snapshots.more()
    for of in ("call", "further chunk")
    for quantity in ("launches", "aten", "python")
}
ACCEPT = "If that is meant, accept it with `python tests/helpers/host_costs.py --write` (see tests/snapshots.md)."
TOKENS, H, V = 12, 8, 150


def version() -> str:
    """What has to be the same for two tables to be comparable."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"Python {python}, PyTorch {torch.__version__.partition('+')[0]}"


def cases() -> dict[str, dict[str, Any]]:
    """Options of ``gopd_loss`` by name; ``token_logprobs`` has none."""
    old = torch.full((TOKENS,), -3.0)
    return {
        "token_logprobs": {},
        "sampled": {},
        "sampled, clipped": {"old_logprobs": old, "clip": (0.2, 0.2), "rollout_logprobs": old, "rollout_is_cap": 2.0},
        "sampled, baseline": {"baseline": "expected"},
        "sampled, labels": {"sft_labels": torch.arange(TOKENS)},
        "full": {"estimator": "full"},
        "full, jsd": {"estimator": "full", "divergence": "jsd"},
        "full, reduction none": {"estimator": "full", "reduction": "none"},
        "topk": {"estimator": "topk", "k": 5},
    }


class Counted(TorchDispatchMode):
    """ATen calls below autograd, and those of them that compute: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.aten = self.computing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.aten += 1
        self.computing += not (func.is_view or "empty" in func.__name__ or func.__name__.startswith("detach"))
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_alone() -> Iterator[None]:
    """Triton launches that are counted and not made, on a machine without a GPU."""
    kept = triton_backend.Launch._start, triton_backend.interpreted
    triton_backend.Launch._start = lambda self, device: None  # type: ignore[method-assign]
    triton_backend.interpreted = lambda: True
    try:
        yield
    finally:
        triton_backend.Launch._start, triton_backend.interpreted = kept  # type: ignore[method-assign]


def launches(backend: str) -> int:
    return int(triton_backend.launches() if backend == "triton" else native_backend._load().launches())


def count(call: Callable[[], Any], backend: str) -> tuple[int, int, int]:
    """(launches of kernels and computing ATen calls, ATen calls, calls of the package's functions)."""
    call()  # what is made once in a process
    before = launches(backend)
    with Counted() as counted:
        call()
    kernels, python = launches(backend) - before, 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal python
        python += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(previous)
    return kernels + counted.computing, counted.aten, python


def forward_and_backward(case: str, backend: str, chunks: int) -> Callable[[], Any]:
    """The call on LinearHeads, with gradients of the student's hidden states and weight."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, weight, *others = (tensor(n, H) for n in (TOKENS, V) * 3)
    student = fg.LinearHead(hidden.requires_grad_(), weight.requires_grad_())
    teacher, ref = fg.LinearHead(others[0], others[1]), fg.LinearHead(others[2], others[3])
    ids, options = torch.arange(TOKENS), {"backend": backend, "chunk_size": TOKENS // chunks}
    more = cases()[case]
    ones = torch.ones(TOKENS)

    def call() -> None:
        hidden.grad = weight.grad = None
        if case == "token_logprobs":
            fg.token_logprobs(student, ids, **options).backward(ones)
            return
        loss = fg.gopd_loss(student, teacher, ref, ids, reward_scale=1.25, **options, **more).loss
        loss.backward(ones if loss.ndim else None)

    return call


def measure() -> snapshots.Rows:
    """The rows of the table."""
    rows: dict[str, dict[str, snapshots.Row]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with launches_alone():
            for case in cases():
                for backend in BACKENDS:
                    one, two, three = (count(forward_and_backward(case, backend, n), backend) for n in (1, 2, 3))
                    further = tuple(b - a for a, b in zip(two, three, strict=True))
                    rows.setdefault(case, {})[backend] = dict(zip(RULES, (*one, *further), strict=True))
    finally:
        torch.set_num_threads(threads)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the committed table")
    options = parser.parse_args()
    rows = measure()
    body = [[case, backend, *map(str, row.values())] for case, found in rows.items() for backend, row in found.items()]
    print(snapshots.markdown(["", "", *RULES], body, numbers=True))
    if options.write:
        snapshots.save(TABLE, version(), rows)


if __name__ == "__main__":
    main()
