"""``fused-gopd doctor``: versions, backends, missing extras, and errors against float64 on a small problem."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__, installing
from .machine import compiler, cpu_model

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from fused_gopd.heads import LinearHead
    from fused_gopd.options import Estimator
    from fused_gopd.output import GOPDOutput

# A backend may exceed the naive float32 path's own error by this much, relative to the largest gradient entry (the
# loss: to 1 + |loss|). The order of a float32 sum alone moves the result by about 1e-7 of its terms.
TOLERANCE = 2e-6


# Packages that this one works with, by their names on an index.
FRAMEWORKS = (
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "trl",
    "verl",
    "vllm",
    "sglang",
    "ms-swift",
    "liger-kernel",
)
EXTRAS = {
    "train": "trainers of TRL, fused-gopd distill, inspect and demo",
    "models": "models of transformers, fused-gopd reproduce",
    "bench": "fused-gopd bench",
    "triton": "the kernels for GPUs",
}
COLUMNS = {
    "loss": "difference from dense code in float64, over 1 + the loss",
    "gradient": "likewise of hidden states and head, over the largest entry",
    "dense": "the same of dense PyTorch code in float32, for comparison",
}


_ABSENT = "not installed"
_NO_COMPILER = (
    "There is no C++ compiler here. Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
    "xcode-select --install"
)


@dataclass(frozen=True)
class Backend:
    """Whether a backend can be used on this machine, and whether it should be."""

    name: str
    reason: str | None  # why it is unavailable; None if it is available
    expected: bool  # whether `auto` should pick it on this machine's device


@dataclass(frozen=True)
class Errors:
    """Largest error of a loss value and of its gradients against float64, relative to their size."""

    loss: float
    gradient: float


@dataclass(frozen=True)
class Check:
    """The errors of one backend on one problem."""

    backend: str
    device: str
    estimator: str
    errors: Errors | None  # None: the backend raised
    naive: Errors
    failure: str | None = None  # the exception

    @property
    def passed(self) -> bool:
        """Whether the errors are at most the naive path's plus :data:`TOLERANCE`; NaN fails."""
        if self.errors is None:
            return False
        return (
            self.errors.loss <= self.naive.loss + TOLERANCE and self.errors.gradient <= self.naive.gradient + TOLERANCE
        )


@dataclass(frozen=True)
class Extra:
    """An extra of this package, and what of it is not installed."""

    name: str
    purpose: str
    missing: list[str]
    install: str


@dataclass(frozen=True)
class Report:
    """Everything that the command prints."""

    versions: dict[str, str]
    machine: dict[str, str]
    backends: list[Backend]
    extras: list[Extra]
    checks: list[Check] = field(default_factory=list)
    without_torch: str | None = None  # why PyTorch cannot be imported

    def problems(self) -> list[str]:
        """One sentence for each problem; empty if there is none."""
        if self.without_torch is not None:
            return [f"PyTorch cannot be imported: {self.without_torch}"]
        found = [
            f"backend {b.name!r} should be available on this machine: {b.reason}"
            for b in self.backends
            if b.expected and b.reason is not None
        ]
        for check in self.checks:
            if not check.passed:
                what = check.failure or "the error against float64 is larger than the naive path's"
                found.append(f"self-check of {check.backend!r} on {check.device}, {check.estimator}: {what}")
        return found


def _versions() -> dict[str, str]:
    versions = {"fused-gopd": __version__, "python": platform.python_version()}
    for name in ("torch", *FRAMEWORKS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = _ABSENT
    return versions


def _extras() -> list[Extra]:
    return [Extra(name, purpose, installing.missing(name), installing.extra(name)) for name, purpose in EXTRAS.items()]


def _machine() -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "cpu": f"{cpu_model()}, {platform.machine()}",
        "logical cores": str(os.cpu_count()),
        "C++ compiler": compiler() or "none",
    }


def _devices_of_torch() -> dict[str, str]:
    import torch

    machine = {
        "threads of PyTorch": str(torch.get_num_threads()),
        "instruction set of PyTorch": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            machine[f"gpu {index}"] = f"{properties.name}, compute capability {capability}, {memory}"
    else:
        machine["gpu"] = "none that PyTorch can use"
    return machine


def _native_isa() -> str:
    """Instruction set that the C++ kernels use on this CPU."""
    return str(importlib.import_module("fused_gopd._native").isa())


def _find_backends() -> list[Backend]:
    import torch

    from fused_gopd import rowops

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name, backend in rowops.BACKENDS.items():
        try:
            reason = rowops.unavailable_reason(name)
        except Exception as error:  # a broken installation is reported, not raised
            reason = f"{type(error).__name__}: {error}"
        found.append(Backend(name, reason, backend.default_on in (None, expected)))
    return found


def _devices(backend: str) -> list[str]:
    """Devices on which to check a backend."""
    import torch

    from fused_gopd.rowops import BACKENDS

    module = BACKENDS[backend].load()
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [device for device in there if module.wrong_device(torch.device(device)) is None]


@dataclass(frozen=True)
class _TestCall:
    """A loss call of three models with different hidden sizes, an odd vocabulary and a mask."""

    student: tuple[torch.Tensor, torch.Tensor]  # hidden and weight of each model, float32 on the CPU
    teacher: tuple[torch.Tensor, torch.Tensor]
    ref: tuple[torch.Tensor, torch.Tensor]
    token_ids: torch.Tensor
    mask: torch.Tensor

    @staticmethod
    def random(tokens: int, vocab: int) -> _TestCall:
        import torch

        generator = torch.Generator().manual_seed(0)

        def model(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
            weight = torch.randn(vocab, hidden, generator=generator) * (2.0 / hidden**0.5)
            return torch.randn(tokens, hidden, generator=generator), weight

        ids = torch.randint(vocab, (tokens,), generator=generator)
        mask = torch.rand(tokens, generator=generator) < 0.8
        mask[0] = True
        return _TestCall(student=model(64), teacher=model(96), ref=model(48), token_ids=ids, mask=mask)

    def solve(self, estimator: Estimator, device: str, dtype: torch.dtype, backend: str | None) -> list[torch.Tensor]:
        """Loss, gradient of hidden and of weight, in float64 on the CPU; ``backend=None`` is the dense reference."""
        import fused_gopd as fg

        def head(model: tuple[torch.Tensor, torch.Tensor], trained: bool) -> LinearHead:
            hidden, weight = (t.to(device, dtype, copy=True).requires_grad_(trained) for t in model)
            return fg.LinearHead(hidden, weight)

        student = head(self.student, True)
        options: dict[str, Any] = {"estimator": estimator, "reward_scale": 1.25, "mask": self.mask.to(device)}
        if estimator == "topk":
            options["k"] = 16
        models = (student, head(self.teacher, False), head(self.ref, False), self.token_ids.to(device))
        out: GOPDOutput
        if backend is None:
            out = fg.reference.gopd_loss(*models, **options)
        else:
            # several chunks, the last one short
            out = fg.gopd_loss(*models, **options, backend=backend, chunk_size=max(1, len(self.mask) // 3))
        out.loss.backward()  # type: ignore[no-untyped-call]
        assert student.hidden.grad is not None
        assert student.weight.grad is not None
        return [t.detach().double().cpu() for t in (out.loss, student.hidden.grad, student.weight.grad)]


def _errors(result: list[torch.Tensor], truth: list[torch.Tensor]) -> Errors:
    loss = abs(float(result[0] - truth[0])) / (1.0 + abs(float(truth[0])))
    worst = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(result[1:], truth[1:], strict=True)]
    # max() ignores a NaN that is not its first argument
    return Errors(loss, max(worst) if not any(map(math.isnan, worst)) else float("nan"))


def _check(backend: str, device: str) -> list[Check]:
    import torch

    # the interpreter takes seconds per thousand vocabulary entries, hence a smaller problem
    interpreted = backend == "triton" and device == "cpu"
    problem = _TestCall.random(tokens=6, vocab=301) if interpreted else _TestCall.random(tokens=64, vocab=5003)
    checks = []
    estimators: tuple[Estimator, ...] = ("sampled", "full", "topk")
    for estimator in estimators:
        truth = problem.solve(estimator, "cpu", torch.float64, None)
        naive = _errors(problem.solve(estimator, device, torch.float32, None), truth)
        errors = failure = None
        try:
            errors = _errors(problem.solve(estimator, device, torch.float32, backend), truth)
        except Exception as error:  # reported, and the others are still checked
            failure = f"{type(error).__name__}: {error}"
        checks.append(
            Check(backend=backend, device=device, estimator=estimator, errors=errors, naive=naive, failure=failure)
        )
    return checks


def examine() -> Report:
    """Collect versions and devices, and check every available backend. Takes a second or two."""
    versions, machine, extras = _versions(), _machine(), _extras()
    try:
        machine |= _devices_of_torch()
    except (ImportError, OSError) as error:  # a library that is missing or of another version
        return Report(versions, machine, [], extras, without_torch=str(error))
    versions["torch"] = str(importlib.import_module("torch").__version__)  # with the build, such as +cpu
    backends = _find_backends()
    if any(b.name == "native" and b.reason is None for b in backends):
        try:
            machine["instruction set of the native backend"] = _native_isa()
        except Exception as error:  # reported as above
            machine["instruction set of the native backend"] = f"{type(error).__name__}: {error}"
    report = Report(versions, machine, backends, extras)
    for backend in backends:
        if backend.reason is None:
            for device in _devices(backend.name):
                report.checks.extend(_check(backend.name, device))
    return report


def _as_data(report: Report) -> dict[str, Any]:
    data = asdict(report)
    for check, entry in zip(report.checks, data["checks"], strict=True):
        entry["passed"] = check.passed
    problems = report.problems()
    return {**data, "columns": COLUMNS, "tolerance": TOLERANCE, "problems": problems, "ok": not problems}


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False)

    there = {name: version for name, version in report.versions.items() if version != _ABSENT}
    absent = [name for name in report.versions if name not in there]
    _print_facts(console, {**there, **({_ABSENT: ", ".join(absent)} if absent else {})})
    _print_facts(console, report.machine)
    _print_backends(console, report)
    line("extras", "bold")
    for extra in report.extras:
        state = f"[yellow]without[/yellow] {escape(', '.join(extra.missing))}" if extra.missing else "[green]installed"
        line(f"  {extra.name} ({extra.purpose}): {state}")
        if extra.missing:
            # not wrapped: a command is there to be pasted
            console.print(f"    {extra.install}", highlight=False, markup=False, soft_wrap=True)
    console.print()
    if report.checks:
        _print_checks(console, report.checks)
    for problem in report.problems():
        console.print(f"[red]problem:[/red] {escape(problem)}", soft_wrap=True, highlight=False)
    if not report.problems():
        console.print("[green]All is well.")


def _print_facts(console: Console, facts: dict[str, str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(value), style="dim" if name == _ABSENT else None)
    console.print(table)
    console.print()


def _print_backends(console: Console, report: Report) -> None:
    from rich.markup import escape

    console.print('backends ("auto" takes triton on a GPU and native on a CPU, else torch)', style="bold")
    for backend in report.backends:
        state = "[green]yes" if backend.reason is None else "[red]no" if backend.expected else "[yellow]no"
        console.print(f"  {backend.name}: {state}", highlight=False)
        if backend.reason is not None:
            console.print(f"    {escape(backend.reason)}", highlight=False, soft_wrap=True)
            if backend.name == "native" and compiler() is None:
                console.print(f"    {_NO_COMPILER}", highlight=False)
    console.print()


def _print_checks(console: Console, checks: list[Check]) -> None:
    from rich import box
    from rich.table import Table

    title = "self-check: three models, λ = 1.25, errors against float64"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    for column in ("backend", "device", "estimator", "loss", "dense", "gradient", "dense", ""):
        table.add_column(column, justify="right" if column in COLUMNS else "left", no_wrap=True)
    for check in checks:
        loss, gradient = ("", "")
        if check.errors is not None:
            loss, gradient = f"{check.errors.loss:.1e}", f"{check.errors.gradient:.1e}"
        table.add_row(
            check.backend,
            check.device,
            check.estimator,
            loss,
            f"{check.naive.loss:.1e}",
            gradient,
            f"{check.naive.gradient:.1e}",
            "[green]ok" if check.passed else "[red]FAILED",
        )
    console.print(table)
    for name, meaning in COLUMNS.items():
        console.print(f"  {name}: {meaning}", style="dim", highlight=False)
    console.print(f"  ok: at most the dense code's error plus {TOLERANCE:g}", style="dim", highlight=False)
    console.print()


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """Show versions, devices, backends and missing extras, and check the numbers of each backend against float64.

    What is missing is named with the command that installs it, for the way in which this copy was installed. Exit
    status 1 when PyTorch cannot be imported, when a self-check fails, or when the backend that "auto" should pick on
    this machine (triton with a GPU, native without) is unavailable; 0 otherwise.
    """
    report = examine()
    if as_json:
        typer.echo(json.dumps(_as_data(report), indent=2))
    else:
        _print(report)
    if report.problems():
        raise typer.Exit(1)
