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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fused_gopd as fg

from .prompts import EXTRAPOLATION

if TYPE_CHECKING:
    from .held_out import Scored

SMALL_CHUNK = 64
WAYS = {"dense": "dense", "fused": "fused", "fused_small": f"fused, chunk_size={SMALL_CHUNK}"}
MOST_TOKENS = 1024
# Tokens per slice of the float64 oracle: its dense tensors would not fit otherwise.
_ORACLE_SLICE = 128


@dataclass(frozen=True)
class Measured:
    """One way of computing the loss."""

    way: str
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


def _dense(student: fg.LinearHead, teacher: fg.LinearHead, ref: fg.LinearHead) -> Tensor:
    """The shortest loss in plain PyTorch, as a trainer would write it without a library."""
    log_p = _log_softmax(student)
    with torch.no_grad():
        target = EXTRAPOLATION * _log_softmax(teacher) + (1 - EXTRAPOLATION) * _log_softmax(ref)
    return (log_p.exp() * (log_p - target)).sum(-1).mean()


def _compute(way: str, inputs: _Inputs, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of hidden, gradient of weight."""
    student, teacher, ref = inputs.heads(rows, torch.float64 if way == "oracle" else torch.float32)
    if way == "dense":
        loss = _dense(student, teacher, ref)
    else:
        loss = (fg.reference.gopd_loss if way == "oracle" else fg.gopd_loss)(
            student,
            teacher,
            ref,
            inputs.token_ids[rows],
            reward_scale=EXTRAPOLATION,
            estimator="full",
            normalizer=len(inputs.token_ids) if way == "oracle" else None,
            chunk_size=SMALL_CHUNK if way == "fused_small" else None,
        ).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.hidden.grad is not None
    assert student.weight.grad is not None
    return loss.detach(), student.hidden.grad, student.weight.grad


def _oracle(inputs: _Inputs) -> dict[str, Tensor]:
    """The same in float64, in slices of tokens: with a given normalizer losses and weight gradients just add up."""
    total, hidden = torch.zeros((), dtype=torch.float64), []
    weight = torch.zeros(inputs.weight.shape, dtype=torch.float64)
    for start in range(0, len(inputs.token_ids), _ORACLE_SLICE):
        loss, dhidden, dweight = _compute("oracle", inputs, slice(start, start + _ORACLE_SLICE))
        total += loss
        hidden.append(dhidden)
        weight += dweight
    return {"loss": total, "hidden": torch.cat(hidden), "weight": weight}


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


def _measure(way: str, inputs: _Inputs, oracle: dict[str, Tensor]) -> Measured:
    from fused_gopd.rowops import select_backend

    _compute(way, inputs, slice(0, 16))  # warm-up: loads libraries and starts threads
    seconds = []
    for repetition in range(2):
        meter = _Peak()
        started = time.perf_counter()
        loss, hidden, weight = _compute(way, inputs, slice(None))
        seconds.append(time.perf_counter() - started)
        if repetition == 0:
            peak = meter.bytes()
            del loss, hidden, weight
    errors = [
        float((x.double() - oracle[n]).norm() / oracle[n].norm()) for x, n in ((hidden, "hidden"), (weight, "weight"))
    ]
    return Measured(
        way=way,
        loss=float(loss),
        loss_error=abs(float(loss) - float(oracle["loss"])),
        hidden_error=errors[0],
        weight_error=errors[1],
        seconds=min(seconds),
        peak_bytes=peak,
        gradient_bytes=hidden.nbytes + weight.nbytes,
        tokens=len(inputs.token_ids),
        backend=(
            "eager PyTorch" if way == "dense" else select_backend("auto", torch.device("cpu"), {torch.float32}).name
        ),
    )


def _main(way: str, folder: Path) -> None:
    safetensors = importlib.import_module("safetensors.torch")
    inputs = _Inputs(safetensors.load_file(folder / "problem.safetensors"))
    if way == "oracle":
        safetensors.save_file(_oracle(inputs), folder / "oracle.safetensors")
    else:
        found = _measure(way, inputs, safetensors.load_file(folder / "oracle.safetensors"))
        (folder / f"{way}.json").write_text(json.dumps(asdict(found)))


def _run_process(way: str, folder: Path) -> None:
    # the child gets this process's module path, so that it imports the same package, installed or not
    code = (
        "import sys, json, pathlib; sys.path[:] = json.loads(sys.argv[1]); "
        "from fused_gopd.cli.demo.compare import _main; _main(sys.argv[2], pathlib.Path(sys.argv[3]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sys.path), way, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {WAYS.get(way, way)!r} failed ({done.returncode}):\n{done.stderr[-2000:]}")


def compare(
    scored: Scored,
    folder: Path,  # an empty folder for the tensors that the processes exchange
    *,
    ways: tuple[str, ...] = tuple(WAYS),
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measured]:
    """Measure every way on answers of the untrained student; ``progress`` is called ``len(ways) + 1`` times."""
    mask = scored.mask
    # before training the student is the reference
    states = {"student": scored.ref, "teacher": scored.teacher, "ref": scored.ref}
    tensors = {name: head.hidden[mask][:MOST_TOKENS] for name, head in states.items()}
    tensors |= {"weight": scored.ref.weight, "token_ids": scored.token_ids[mask][:MOST_TOKENS]}
    # cloned: safetensors refuses tensors that share storage, as a head tied to the embedding does
    safetensors = importlib.import_module("safetensors.torch")
    safetensors.save_file(
        {name: t.detach().clone().contiguous() for name, t in tensors.items()}, folder / "problem.safetensors"
    )
    _run_process("oracle", folder)
    progress("float64 done")
    results = []
    for way in ways:
        _run_process(way, folder)
        results.append(Measured(**json.loads((folder / f"{way}.json").read_text())))
        progress(f"{WAYS[way]} done")
    return results
