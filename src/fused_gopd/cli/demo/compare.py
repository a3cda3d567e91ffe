"""Dense and fused loss on the same hidden states and heads: values, gradients, memory, time.

Each way of computing runs in its own process: memory that one keeps resident would hide the peak of the next.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fused_gopd as fg

if TYPE_CHECKING:
    from fused_gopd.options import Estimator

ESTIMATORS: tuple[Estimator, ...] = ("sampled", "full")
REWARD_SCALE = 1.25  # not 0 or 1, so that all three models are needed
SMALL_CHUNK = 64
WAYS = {
    "dense": "dense, the shortest code",
    "reference": "dense, fg.reference",
    "fused": "fused",
    "fused_small": f"fused, chunk_size={SMALL_CHUNK}",
}
# Tokens per slice of the float64 oracle: its dense tensors would not fit otherwise.
_ORACLE_SLICE = 128


@dataclass(frozen=True)
class Measured:
    """One way of computing one estimator."""

    way: str
    estimator: str
    loss: float
    loss_error: float  # against float64, absolute
    hidden_error: float  # of the gradient of the hidden states against float64, ratio of norms
    weight_error: float
    seconds: float  # loss and gradients, the faster of the repetitions
    peak_bytes: int | None  # beyond the inputs, gradients included; None where the platform cannot tell
    gradient_bytes: int
    tokens: int
    backend: str


class _Inputs:
    """Hidden states of the live tokens, (N, H) each, and the one head (V, H) that the three models share here."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.student, self.teacher, self.ref = (tensors[name] for name in ("student", "teacher", "ref"))
        self.weight, self.token_ids = tensors["weight"], tensors["token_ids"]

    def heads(self, rows: slice, dtype: torch.dtype) -> tuple[fg.LinearHead, fg.LinearHead, fg.LinearHead]:
        """Student (with fresh leaves, hidden states and head both trainable), teacher, reference."""
        weight = self.weight.to(dtype)
        student = fg.LinearHead(
            self.student[rows].to(dtype).detach().requires_grad_(), weight.detach().requires_grad_()
        )
        return (
            student,
            fg.LinearHead(self.teacher[rows].to(dtype), weight),
            fg.LinearHead(self.ref[rows].to(dtype), weight),
        )


def _log_softmax(head: fg.LinearHead) -> Tensor:
    return (head.hidden @ head.weight.T).log_softmax(-1)


def _shortest_dense(
    student: fg.LinearHead, teacher: fg.LinearHead, ref: fg.LinearHead, ids: Tensor, estimator: Estimator
) -> Tensor:
    """The shortest loss in plain PyTorch, as a trainer would write it without a library."""
    if estimator == "full":
        log_p = _log_softmax(student)
        with torch.no_grad():
            target = REWARD_SCALE * _log_softmax(teacher) + (1 - REWARD_SCALE) * _log_softmax(ref)
        return (log_p.exp() * (log_p - target)).sum(-1).mean()

    def score(head: fg.LinearHead) -> Tensor:
        return _log_softmax(head).gather(-1, ids[:, None])[:, 0]

    with torch.no_grad():
        target = REWARD_SCALE * score(teacher) + (1 - REWARD_SCALE) * score(ref)
    log_p = score(student)
    advantage = (target - log_p).detach()
    return -(advantage * (log_p - log_p.detach()).exp()).mean()


def _compute(way: str, inputs: _Inputs, rows: slice, estimator: Estimator) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of hidden, gradient of weight."""
    student, teacher, ref = inputs.heads(rows, torch.float32)
    ids = inputs.token_ids[rows]
    if way == "dense":
        loss = _shortest_dense(student, teacher, ref, ids, estimator)
    elif way == "reference":
        loss = fg.reference.gopd_loss(student, teacher, ref, ids, reward_scale=REWARD_SCALE, estimator=estimator).loss
    else:
        loss = fg.gopd_loss(
            student,
            teacher,
            ref,
            ids,
            reward_scale=REWARD_SCALE,
            estimator=estimator,
            chunk_size=SMALL_CHUNK if way == "fused_small" else None,
        ).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.hidden.grad is not None
    assert student.weight.grad is not None
    return loss.detach(), student.hidden.grad, student.weight.grad


def _oracle(inputs: _Inputs, estimator: Estimator) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, in slices of tokens: with a given normalizer losses and weight gradients just add up."""
    count = len(inputs.token_ids)
    total = torch.zeros((), dtype=torch.float64)
    hidden, weight = [], torch.zeros(inputs.weight.shape, dtype=torch.float64)
    for start in range(0, count, _ORACLE_SLICE):
        rows = slice(start, start + _ORACLE_SLICE)
        student, teacher, ref = inputs.heads(rows, torch.float64)
        loss = fg.reference.gopd_loss(
            student,
            teacher,
            ref,
            inputs.token_ids[rows],
            reward_scale=REWARD_SCALE,
            estimator=estimator,
            normalizer=count,
        ).loss
        loss.backward()  # type: ignore[no-untyped-call]
        assert student.hidden.grad is not None
        assert student.weight.grad is not None
        total += loss.detach()
        hidden.append(student.hidden.grad)
        weight += student.weight.grad
    return total, torch.cat(hidden), weight


# -------------------------------------------------------------------------------------------------------- peak memory


class _Peak:
    """Peak resident memory in bytes since construction, minus the resident memory at construction.

    On Linux a process can reset its own high-water mark (by writing 5 to clear_refs), so the peak is VmHWM at the end
    minus VmRSS at the start: exact, without a sampling thread that could miss a short peak or take CPU time. Elsewhere,
    or where /proc is read-only, ru_maxrss cannot be reset; the difference is right if no earlier peak was larger, so
    the warm-up is small.
    """

    def __init__(self) -> None:
        self._status = Path("/proc/self/status")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._start = _max_resident()
            self._resettable = False
        else:
            self._start = self._read("VmRSS")
            self._resettable = True

    def _read(self, name: str) -> int:
        match = re.search(rf"{name}:\s+(\d+) kB", self._status.read_text())
        assert match is not None
        return int(match[1]) * 1024

    def bytes(self) -> int | None:
        """The peak since construction; None where the platform cannot tell."""
        now = self._read("VmHWM") if self._resettable else _max_resident()
        return None if now is None or self._start is None else max(0, now - self._start)


def _max_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------------ the processes


def _measure(way: str, inputs: _Inputs, oracle: dict[str, Tensor], repetitions: int) -> list[Measured]:
    from fused_gopd.rowops import select_backend

    results = []
    for estimator in ESTIMATORS:
        _compute(way, inputs, slice(0, 16), estimator)  # warm-up: loads libraries and starts threads
        seconds, peak = float("inf"), None
        for repetition in range(repetitions):
            meter = _Peak() if repetition == 0 else None
            started = time.perf_counter()
            loss, hidden, weight = _compute(way, inputs, slice(None), estimator)
            seconds = min(seconds, time.perf_counter() - started)
            if meter is not None:
                peak = meter.bytes()
            if repetition + 1 < repetitions:
                del loss, hidden, weight

        def distance(x: Tensor, name: str, estimator: str = estimator) -> float:
            truth = oracle[f"{estimator}.{name}"]
            return float((x.double() - truth).norm() / truth.norm())

        results.append(
            Measured(
                way=way,
                estimator=estimator,
                loss=float(loss),
                loss_error=abs(float(loss) - float(oracle[f"{estimator}.loss"])),
                hidden_error=distance(hidden, "hidden"),
                weight_error=distance(weight, "weight"),
                seconds=seconds,
                peak_bytes=peak,
                gradient_bytes=hidden.nbytes + weight.nbytes,
                tokens=len(inputs.token_ids),
                backend=(
                    select_backend("auto", torch.device("cpu"), {torch.float32}).name
                    if way.startswith("fused")
                    else "eager PyTorch"
                ),
            )
        )
    return results


def _main(way: str, folder: Path, repetitions: int) -> None:
    safetensors = importlib.import_module("safetensors.torch")
    inputs = _Inputs(safetensors.load_file(folder / "problem.safetensors"))
    if way == "oracle":
        found = {e: _oracle(inputs, e) for e in ESTIMATORS}
        names = ("loss", "hidden", "weight")
        safetensors.save_file(
            {f"{e}.{n}": t for e, ts in found.items() for n, t in zip(names, ts, strict=True)},
            folder / "oracle.safetensors",
        )
        return
    results = _measure(way, inputs, safetensors.load_file(folder / "oracle.safetensors"), repetitions)
    (folder / f"{way}.json").write_text(json.dumps([asdict(m) for m in results]))


def _run_process(way: str, folder: Path, repetitions: int) -> None:
    # the child gets this process's module path, so that it imports the same package, installed or not
    code = (
        "import sys, json, pathlib; sys.path[:] = json.loads(sys.argv[1]); "
        "from fused_gopd.cli.demo.compare import _main; _main(sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sys.path), way, str(folder), str(repetitions)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {WAYS.get(way, way)!r} failed ({done.returncode}):\n{done.stderr[-2000:]}")


def compare(
    student: Tensor,  # (N, H) hidden states of the live tokens
    teacher: Tensor,
    ref: Tensor,
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (N,)
    folder: Path,  # an empty folder for the tensors that the processes exchange
    *,
    ways: tuple[str, ...] = tuple(WAYS),
    repetitions: int = 2,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measured]:
    """Measure every way on the same inputs; ``progress`` is called ``len(ways) + 1`` times."""
    tensors = {"student": student, "teacher": teacher, "ref": ref, "weight": weight, "token_ids": token_ids}
    # cloned: safetensors refuses tensors that share storage, as a head tied to the embedding does
    safetensors = importlib.import_module("safetensors.torch")
    safetensors.save_file(
        {name: t.detach().clone().contiguous() for name, t in tensors.items()}, folder / "problem.safetensors"
    )
    _run_process("oracle", folder, 1)
    progress("float64 oracle")
    results = []
    for way in ways:
        _run_process(way, folder, repetitions)
        found: list[dict[str, Any]] = json.loads((folder / f"{way}.json").read_text())
        results += [Measured(**entry) for entry in found]
        progress(WAYS[way])
    return results
