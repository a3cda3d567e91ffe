"""What a call costs on the host: time to the first product or kernel, CPU time of a call and of each further chunk.

    python -m benchmarks.host --json RESULTS.json                 on a GPU, real shapes
    python -m benchmarks.host --json RESULTS.json --device cpu    tiny shapes, where a call is nothing but its host work

For each estimator and number of tokens, forward and backward (log-probs: forward alone), minimum (and median, ``_p50``)
of calls that each find the device idle:

- ``cpu_us``: CPU time of the process, all its threads, from the call to its return
- ``chunk_us``: the same of each further chunk, from calls in one, two and four chunks
- ``first_us``: wall time to the first matrix product or Triton launch; an upper bound, a dispatch mode looks for it
- ``alone_ms``, ``queued_ms``: wall time of a call that finds the device idle, and of each of several in a row; where
  the first is the larger by milliseconds the device waits for the host
- ``held_us``, ``held_chunk_us``, ``held_ms``: ``cpu_us``, ``chunk_us`` and ``alone_ms`` with Triton launches through
  compiled kernels that are kept (``Launch.hold``); ``held_same``: whether the results have the same bits
- ``graphed_us``, ``graphed_ms``: CPU and wall time of the same step as CUDA graphs (``fused_gopd.graphed``)
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_gopd as fg
from fused_gopd import rowops
from fused_gopd.rowops import triton as triton_ops

from . import run
from .arguments import parse
from .floors import Clock, clock_name
from .workloads import VOCAB_SIZE, synchronize

Step = Callable[[], Tensor]

# calls that are timed, of each kind
CALLS = 20
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "_linear_pointwise")


class _Seen(Exception):
    """The first product or kernel has been reached."""


class _First(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in PRODUCTS:
            raise _Seen
        return function(*args, **(kwargs or {}))


@contextmanager
def _stopped_launches() -> Iterator[None]:
    """Triton launches raise. On a CPU the native kernels are not seen: a product comes before them."""
    before = triton_ops.Launch.run

    def stopped(*_: Any) -> None:
        raise _Seen

    triton_ops.Launch.run = stopped  # type: ignore[method-assign]
    try:
        yield
    finally:
        triton_ops.Launch.run = before  # type: ignore[method-assign]


@contextmanager
def held_launches() -> Iterator[None]:
    before = triton_ops.Launch.hold
    triton_ops.Launch.hold = True
    try:
        yield
    finally:
        triton_ops.Launch.hold = before


def microseconds_to_first(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    try:
        with _stopped_launches(), _First():
            call()
    except _Seen:
        return 1e6 * (time.perf_counter() - start)
    raise RuntimeError("the call ran no product and no kernel")


def host_microseconds(call: Callable[[], object], device: str, calls: int) -> tuple[float, float]:
    """Minimum and median CPU time of this process in a call: autograd has threads of its own."""
    found = []
    for _ in range(calls):
        synchronize(device)
        start = time.process_time()
        call()
        found.append(1e6 * (time.process_time() - start))
    synchronize(device)
    return min(found), median(found)


def wall_milliseconds(call: Callable[[], object], device: str, queued: int, calls: int) -> float:
    """Median wall time of a call, of several that are queued before the device is waited for."""
    found = []
    for _ in range(calls):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(queued):
            call()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - start) / queued)
    return median(found)


class Case:
    """One estimator on one backend, with its tensors; a call computes loss and gradients."""

    def __init__(self, name: str, backend: str, tokens: int, hidden: int, vocab: int, device: str) -> None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        models = 3 if name in ("sampled", "full") else 1
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device)

        self.heads = [
            fg.LinearHead(normal(tokens, hidden).to(dtype), normal(vocab, hidden).mul_(3 * hidden**-0.5).to(dtype))
            for _ in range(models)
        ]
        self.name, self.backend, self.tokens = name, backend, tokens
        self.ids = torch.randint(vocab, (tokens,), generator=g, device=device)
        self.scores = -12.0 + normal(3, tokens)
        self.leaves = [self.heads[0].hidden, self.heads[0].weight] if name != "logprobs" else []
        for leaf in self.leaves:
            leaf.requires_grad_()

    def loss(self, chunks: int, hidden: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"backend": self.backend, "chunk_size": -(-self.tokens // chunks)}
        student = self.heads[0] if hidden is None else fg.LinearHead(hidden, self.heads[0].weight)
        if self.name in ("sampled", "full"):
            heads = (student, *self.heads[1:])
            return fg.gopd_loss(*heads, self.ids, reward_scale=1.25, estimator=self.name, **options).loss
        old, q, r = self.scores
        teachers = (fg.TokenLogProbs(q), fg.TokenLogProbs(r))
        options |= {"old_logprobs": old, "clip": (0.2, 0.2)}
        return fg.gopd_loss(student, *teachers, self.ids, reward_scale=1.25, **options).loss

    def call(self, chunks: int = 1) -> object:
        if self.name == "logprobs":
            with torch.no_grad():
                return fg.token_logprobs(
                    self.heads[0], self.ids, backend=self.backend, chunk_size=-(-self.tokens // chunks)
                )
        return torch.autograd.grad(self.loss(chunks), self.leaves)

    def graphed(self) -> Callable[[], object]:
        example, weight = self.heads[0].hidden, self.heads[0].weight
        frozen = [x for head in self.heads[1:] for x in (head.hidden, head.weight)]
        kept = [weight, *frozen, self.ids, self.scores]
        step = fg.graphed(lambda hidden: self.loss(1, hidden), example, weights=kept)
        return lambda: torch.autograd.grad(step(example), [example, weight])


def _tensors(found: object) -> tuple[Tensor, ...]:
    """Those of a call: log-probs, or gradients."""
    return (found,) if isinstance(found, Tensor) else cast("tuple[Tensor, ...]", found)


def row(case: Case, device: str, profile: bool) -> dict[str, Any]:
    calls = CALLS if case.tokens <= 512 else CALLS // 4
    found: dict[str, Any] = {"estimator": case.name, "backend": case.backend, "tokens": case.tokens}
    for _ in range(3):
        for chunks in (1, 2, 4):
            case.call(chunks)
    synchronize(device)
    found["first_us"] = min(microseconds_to_first(case.call) for _ in range(calls))
    times = {c: host_microseconds(lambda c=c: case.call(c), device, calls) for c in (1, 2, 4)}  # type: ignore[misc]
    found["cpu_us"], found["cpu_us_p50"] = times[1]
    found["chunk_us"] = (times[4][0] - times[1][0]) / 3
    found["chunk_us_from_two"] = times[2][0] - times[1][0]
    found["alone_ms"] = wall_milliseconds(case.call, device, 1, calls)
    found["queued_ms"] = wall_milliseconds(case.call, device, 5, 3)
    if torch.device(device).type == "cuda" and case.backend == "triton":
        own = case.call(2)
        try:
            with held_launches():
                found["held_same"] = all(map(torch.equal, _tensors(own), _tensors(case.call(2))))
                case.call(4)
                held = {c: host_microseconds(lambda c=c: case.call(c), device, calls) for c in (1, 4)}  # type: ignore[misc]
                found["held_us"], found["held_us_p50"] = held[1]
                found["held_chunk_us"] = (held[4][0] - held[1][0]) / 3
                found["held_ms"] = wall_milliseconds(case.call, device, 1, calls)
        except Exception as error:  # it has never run on a GPU: its failure is a result
            found["held_error"] = f"{type(error).__name__}: {error}"
    if torch.device(device).type == "cuda" and case.leaves:
        try:
            replay = case.graphed()
            replay()
            found["graphed_us"], found["graphed_us_p50"] = host_microseconds(replay, device, calls)
            found["graphed_ms"] = wall_milliseconds(replay, device, 1, calls)
            del replay
        except Exception as error:  # it has never run on a GPU: its failure is a result
            found["graphed_error"] = f"{type(error).__name__}: {error}"
    if profile:
        recorder, text = cProfile.Profile(), io.StringIO()
        recorder.enable()
        for _ in range(CALLS):
            case.call()
        recorder.disable()
        stats = pstats.Stats(recorder, stream=text)
        found["python_calls"] = stats.total_calls / CALLS  # type: ignore[attr-defined]
        stats.strip_dirs().sort_stats("tottime").print_stats(25)
        found["profile"] = [line.strip() for line in text.getvalue().splitlines() if line.strip()][4:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=float, help="seconds after which no further row is started")
    args = parse(parser, "json")
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here")
    hidden, vocab, tokens = (1024, VOCAB_SIZE, (64, 512, 8192)) if gpu else (8, 64, (4,))
    backends = ["triton"] if gpu else [b for b in ("native", "torch") if rowops.unavailable_reason(b) is None]
    clock, started = Clock(args.device), time.monotonic()
    result: dict[str, Any] = {
        **run.origin(args.device),
        "versions": run.package_versions(),
        "clock": clock_name(args.device),
        "hidden": hidden,
        "vocab": vocab,
        "calls": CALLS,
        "rows": [],
        "failed": {},
    }
    for n in tokens:
        for backend in backends:
            for name in ("logprobs", "sampled", "full", "policy"):
                what = f"{name} {backend} N={n}"
                if args.limit is not None and time.monotonic() - started > args.limit:
                    result["failed"][what] = f"the limit of {args.limit:.0f} s was over"
                    continue
                try:
                    made = row(Case(name, backend, n, hidden, vocab, args.device), args.device, profile=n == tokens[0])
                    made["clock_ms"] = wall_milliseconds(clock.step, args.device, 1, 3)
                    result["rows"].append(made)
                    print(what, {k: round(v, 3) for k, v in made.items() if isinstance(v, float)}, flush=True)
                except Exception as error:  # one that fails leaves the others
                    result["failed"][what] = f"{type(error).__name__}: {error}"
                    print(what, result["failed"][what], flush=True)
                run.write(result, args.json)
    run.write(result, args.json)


if __name__ == "__main__":
    main()
