"""``fused-gopd plan``: what one loss costs, dense and fused, before a machine is rented for it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from fused_gopd.objective import Estimator


@dataclass(frozen=True)
class Preset:
    """The head of a published model, from its configuration file."""

    hidden: int
    vocab: int
    tied: bool  # the head is the embedding matrix


PRESETS: dict[str, Preset] = {
    "qwen3-0.6b": Preset(1024, 151936, True),
    "qwen3-1.7b": Preset(2048, 151936, True),
    "qwen3-4b": Preset(2560, 151936, True),
    "qwen3-8b": Preset(4096, 151936, False),
    "qwen3-14b": Preset(5120, 151936, False),
    "qwen3-32b": Preset(5120, 151936, False),
    "llama-3-8b": Preset(4096, 128256, False),
    "llama-3-70b": Preset(8192, 128256, False),
    "llama-3.2-1b": Preset(2048, 128256, True),
    "llama-3.2-3b": Preset(3072, 128256, True),
    "gemma-2-2b": Preset(2304, 256000, True),
    "gemma-2-9b": Preset(3584, 256000, True),
    "gemma-3-1b": Preset(1152, 262144, True),
    "gemma-3-4b": Preset(2560, 262208, True),
    "gemma-3-12b": Preset(3840, 262208, True),
    "gemma-3-27b": Preset(5376, 262208, True),
    "smollm2-135m": Preset(576, 49152, True),
    "smollm2-360m": Preset(960, 49152, True),
    "smollm2-1.7b": Preset(2048, 49152, True),
}

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


def parse_memory(text: str) -> int:
    """Bytes of "80GiB", "80GB", "512 MiB" or a plain number of bytes; "80G" means GiB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise typer.BadParameter(f"expected a size such as 80GiB, 512MiB or 24GB, got {text!r}", param_hint="--memory")
    size = int(float(match[1]) * units[match[2].lower()])
    if size <= 0:
        raise typer.BadParameter(f"expected a positive size, got {text!r}", param_hint="--memory")
    return size


@dataclass(frozen=True)
class Job:
    """One loss call with gradients for the student's hidden states and head."""

    tokens: int  # N
    vocab: int  # V, joint
    hidden: int  # student
    teacher_hidden: int
    ref_hidden: int
    dtype: str = "bfloat16"
    estimator: Estimator = "full"
    reward_scale: float = 1.25
    device: str = "gpu"

    @property
    def element(self) -> int:
        """Bytes of one number in the model's dtype."""
        return _BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of one number in the accumulation dtype."""
        return max(4, self.element)

    @property
    def needed(self) -> dict[str, int]:
        """Hidden size of each model that the objective touches."""
        models = {"student": self.hidden}
        if self.reward_scale != 0:
            models["teacher"] = self.teacher_hidden
        if self.reward_scale != 1:
            models["ref"] = self.ref_hidden
        return models


def inputs(job: Job) -> dict[str, int]:
    """Bytes that both paths are given: hidden states and heads of the models that are needed."""
    widths = sum(job.needed.values())
    return {
        "hidden states": job.tokens * widths * job.element,
        "head weights": job.vocab * widths * job.element,
    }


def _gradients(job: Job) -> dict[str, int]:
    return {
        "gradient of hidden": job.tokens * job.hidden * job.element,
        "gradient of weight": job.vocab * job.hidden * job.element,
    }


def dense_peak(job: Job) -> dict[str, int]:
    """Bytes beyond the inputs at the peak of dense eager PyTorch, itemised.

    The code counted is the shortest that a trainer would write: logits in the model's dtype, upcast, log-softmax,
    teacher and reference under ``no_grad``, no checkpointing. With a = bytes of the accumulation dtype (4 for float32
    and below) and k tensors of [N, V] alive at the peak:

        peak = max(k N V a,  N V e + gradients)

        full:     k = 5, at the end of the forward: log p, the target, p, the bracket and their product
        sampled:  k = 3, in the backward: log p, the gradient of the gather and that of the log-softmax

    Measured on a CPU (N = 256, V = 49152, float32 and bfloat16): 20 and 12 bytes per N V. The second term (e =
    bytes of the model's dtype) is the end of the backward, when the gradient of the logits becomes that of hidden and
    weight.
    Code that keeps more alive, such as an upcast of the logits, needs more.
    """
    entries = job.tokens * job.vocab
    alive = 3 if job.estimator == "sampled" else 5
    forward = {"[tokens, vocabulary] tensors": alive * entries * job.wide}
    end = {"gradient of logits": entries * job.element, **_gradients(job)}
    return max(forward, end, key=_total)


def chunk_size(job: Job) -> int:
    """Tokens per chunk, from the function that the loss itself asks."""
    from fused_gopd.chunks import chunk_size_for, logits_buffers

    buffers = logits_buffers(job.estimator == "full", len(job.needed))
    return chunk_size_for(job.vocab, buffers, "cuda" if job.device == "gpu" else "cpu", job.wide)


def fused_peak(job: Job) -> dict[str, int]:
    """Bytes beyond the inputs of :func:`fused_gopd.gopd_loss`, itemised; the sum counts all of it as alive at once.

    Chunk buffers C V a for each model that ``full`` holds (one buffer for ``sampled``) do not depend on the number of
    tokens; a low-precision weight has its gradient accumulated in float32 and rounded once at the end.
    """
    from fused_gopd.chunks import STATISTICS, logits_buffers

    rows = min(job.tokens, chunk_size(job))
    items = {
        "chunk buffers": logits_buffers(job.estimator == "full", len(job.needed)) * rows * job.vocab * job.wide,
        "chunk of the hidden gradient": rows * job.hidden * job.wide,
        "statistics per token": STATISTICS * job.tokens * job.wide,
        **_gradients(job),
    }
    if job.wide != job.element:
        items["float32 accumulator of the weight gradient"] = job.vocab * job.hidden * job.wide
    return items


def _total(items: dict[str, int]) -> int:
    return sum(items.values())


def gemm_flop(job: Job) -> float:
    """Floating-point operations of the GEMMs: three of 2 N V H for the student, one for each other model needed.

    At one hidden size that is 5F (F = 2 N V H), 4F with lambda = 0 or 1. Dense code does the same GEMMs.
    """
    widths = 2 * job.hidden + sum(job.needed.values())
    return 2.0 * job.tokens * job.vocab * widths


def tokens_that_fit(job: Job, memory: int, *, fused: bool) -> int:
    """The most tokens whose inputs and peak fit in ``memory`` bytes; 0 if not even one does."""

    def fits(tokens: int) -> bool:
        at = replace(job, tokens=tokens)
        return _total(inputs(at)) + _total(fused_peak(at) if fused else dense_peak(at)) <= memory

    low, high = 0, 1
    while high < 1 << 60 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def figures(job: Job, memory: int | None) -> dict[str, Any]:
    """All that the command prints, as plain data; bytes unless said otherwise."""
    dense, fused = dense_peak(job), fused_peak(job)
    result: dict[str, Any] = {
        "job": asdict(job),
        "inputs": inputs(job),
        "dense": {"items": dense, "peak": _total(dense)},
        "fused": {"items": fused, "peak": _total(fused), "chunk_size": chunk_size(job)},
        "gemm_tflop": gemm_flop(job) / 1e12,
    }
    if memory is not None:
        result["memory"] = memory
        for name in ("dense", "fused"):
            result[name]["tokens_that_fit"] = tokens_that_fit(job, memory, fused=name == "fused")
    return result


def _bytes(n: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    job = result["job"]
    widths = f"{job['hidden']} / {job['teacher_hidden']} / {job['ref_hidden']}"
    table = Table(
        title=f"{job['tokens']:,} tokens x {job['vocab']:,} entries, hidden (student / teacher / reference) {widths}\n"
        f"{job['dtype']}, {job['estimator']}, lambda = {job['reward_scale']:g}, {job['device']}"
    )
    table.add_column("beyond the inputs")
    table.add_column("dense", justify="right")
    table.add_column("fused", justify="right")
    dense, fused = result["dense"], result["fused"]
    for item in [*dense["items"], *(i for i in fused["items"] if i not in dense["items"])]:
        table.add_row(
            escape(item), *(_bytes(side["items"][item]) if item in side["items"] else "" for side in (dense, fused))
        )
    table.add_section()
    table.add_row("peak memory", _bytes(dense["peak"]), _bytes(fused["peak"]), style="bold")
    if "memory" in result:
        table.add_row(
            f"tokens that fit in {_bytes(result['memory'])}",
            *(f"{side['tokens_that_fit']:,}" for side in (dense, fused)),
        )
    table.add_row("tokens per chunk", "", f"{fused['chunk_size']:,}")
    table.add_row("GEMM work", *[f"{result['gemm_tflop']:,.4g} TFLOP"] * 2)
    console.print(table)
    console.print(
        f"Inputs, the same for both: {_bytes(_total(result['inputs']))} of hidden states and heads. They count towards "
        "what fits; the rest of the models, the optimizer and activations do not.\n"
        "Dense is the least that eager PyTorch holds at its peak: max(k N V a, N V e + gradients), k = 5 for full, "
        "3 for sampled, a = bytes of float32, e = bytes of the dtype. Fused counts all of its items as alive at once.",
        style="dim",
    )


def _preset(name: str, option: str) -> Preset:
    found = PRESETS.get(name.lower())
    if found is None:
        raise typer.BadParameter(f"unknown model {name!r}; presets: {', '.join(PRESETS)}", param_hint=option)
    return found


def _print_presets() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="presets")
    for column in ("model", "hidden", "vocabulary", "head"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, preset in PRESETS.items():
        table.add_row(name, str(preset.hidden), str(preset.vocab), "tied" if preset.tied else "own weight")
    Console().print(table)


def plan(
    tokens: Annotated[int, typer.Option(min=1, help="Unmasked tokens in one loss call.")] = 8192,
    model: Annotated[str | None, typer.Option(help="Student preset; see --list-models.")] = None,
    teacher_model: Annotated[str | None, typer.Option(help="Teacher preset. Default: as the student.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Joint vocabulary.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size of the student.")] = None,
    teacher_hidden: Annotated[int | None, typer.Option(min=1, help="Default: as the student.")] = None,
    ref_hidden: Annotated[int | None, typer.Option(min=1, help="Default: as the student.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64.")] = "bfloat16",
    memory: Annotated[str | None, typer.Option(help="Memory for the loss, such as 80GiB: how many tokens fit?")] = None,
    estimator: Annotated[str, typer.Option(help="full or sampled.")] = "full",
    reward_scale: Annotated[float, typer.Option(help="lambda: 1 needs no reference, 0 no teacher.")] = 1.25,
    device: Annotated[str, typer.Option(help="gpu or cpu; decides the chunk size.")] = "gpu",
    list_models: Annotated[bool, typer.Option("--list-models", help="Show the presets and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data, sizes in bytes.")] = False,
) -> None:
    """Compare dense and fused: peak memory, chunk size, GEMM work, how many tokens fit.

    Dense is eager PyTorch at its leanest and holds max(k N V a, N V e + gradients) bytes beyond its inputs: k = 5
    tensors of [tokens N, vocabulary V] for full, 3 for sampled; a = 4 bytes of float32, e = bytes of the dtype. Fused
    holds chunk buffers, gradients and a float32 accumulator of the weight gradient.
    """
    if list_models:
        _print_presets()
        return
    for name, value, allowed in (
        ("--dtype", dtype, tuple(_BYTES)),
        ("--estimator", estimator, ("full", "sampled")),
        ("--device", device, ("gpu", "cpu")),
    ):
        if value not in allowed:
            raise typer.BadParameter(f"expected one of {', '.join(allowed)}, got {value!r}", param_hint=name)
    if not math.isfinite(reward_scale):
        raise typer.BadParameter(f"expected a finite number, got {reward_scale}", param_hint="--reward-scale")
    student = None if model is None else _preset(model, "--model")
    teacher = None if teacher_model is None else _preset(teacher_model, "--teacher-model")
    if hidden is None:
        if student is None:
            raise typer.BadParameter("give --model, or --hidden and --vocab", param_hint="--hidden")
        hidden = student.hidden
    if vocab is None:
        known = [preset.vocab for preset in (student, teacher) if preset is not None]
        if not known:
            raise typer.BadParameter("give --model, or --hidden and --vocab", param_hint="--vocab")
        vocab = min(known)  # the joint vocabulary is the smallest
    if teacher_hidden is None:
        teacher_hidden = hidden if teacher is None else teacher.hidden
    job = Job(
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        teacher_hidden=teacher_hidden,
        ref_hidden=hidden if ref_hidden is None else ref_hidden,
        dtype=dtype,
        estimator=cast("Estimator", estimator),
        reward_scale=reward_scale,
        device=device,
    )
    result = figures(job, None if memory is None else parse_memory(memory))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(result)
