"""``fused-gopd plan``: what one loss costs, dense and fused, on one device or many, before any is rented."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import typer

from .presets import PRESETS, Head, head_of

if TYPE_CHECKING:
    from fused_gopd.objective.divergences import Divergence
    from fused_gopd.objective.policy import Estimator
    from fused_gopd.objective.topk import Support


# Dense bfloat16 and float16 peaks of the vendors' data sheets, TFLOP/s.
PEAKS: dict[str, float] = {"a100": 312, "h100": 989, "h200": 989, "b200": 2250, "mi300x": 1307}

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("ib", 1024), ("b", 1000), ("", 1024))
}


def parse_memory(text: str) -> int:
    """Bytes of "80GiB", "80GB" or "512 MiB"; "80G" means GiB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is not None and not match[2]:
        raise typer.BadParameter(
            f"needs a unit, got {text!r}: {match[1]}GiB, {match[1]}GB or {match[1]}MiB?", param_hint="--memory"
        )
    if match is None or match[2].lower() not in _UNITS:
        raise typer.BadParameter(f"expected a size such as 80GiB, 512MiB or 24GB, got {text!r}", param_hint="--memory")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise typer.BadParameter(f"expected a positive size, got {text!r}", param_hint="--memory")
    return size


@dataclass(frozen=True)
class Job:
    """One loss call with gradients for the student's hidden states and head, of all ranks together."""

    tokens: int  # N
    vocab: int  # V, joint
    hidden: int  # student
    teacher_hidden: int
    ref_hidden: int
    dtype: str = "bfloat16"
    estimator: Estimator = "full"
    reward_scale: float = 1.25
    device: str = "gpu"
    divergence: Divergence = "reverse_kl"
    k: int | None = None  # of topk
    support: Support = "teacher"
    low_chunks: bool = False  # the chunk's logits in the model's dtype
    tp: int = 1  # ranks that share the vocabulary
    dp: int = 1  # ranks that share the sequences
    cp: int = 1  # ranks that share each sequence

    @property
    def element(self) -> int:
        """Bytes of one number in the model's dtype."""
        return _BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of one number in the accumulation dtype."""
        return max(4, self.element)

    @property
    def logit(self) -> int:
        """Bytes of one logit of a chunk."""
        return self.element if self.low_chunks else self.wide

    @property
    def needed(self) -> dict[str, int]:
        """Hidden size of each model that the objective touches."""
        models = {"student": self.hidden}
        if self.reward_scale != 0:
            models["teacher"] = self.teacher_hidden
        if self.reward_scale != 1:
            models["ref"] = self.ref_hidden
        return models

    @property
    def share(self) -> Job:
        """What the rank with the most to do computes: its tokens, all of them on its rows of the heads."""
        tokens, vocab = -(-self.tokens // (self.dp * self.cp)), -(-self.vocab // self.tp)
        return replace(self, tokens=tokens, vocab=vocab, tp=1, dp=1, cp=1)

    @property
    def device_type(self) -> str:
        """PyTorch's name."""
        return "cuda" if self.device == "gpu" else "cpu"

    @property
    def buffers(self) -> float:
        """Logits buffers of a chunk that are alive at once."""
        from fused_gopd.chunks import logits_buffers

        waits = self.support == "student"
        return logits_buffers(self.estimator == "full", len(self.needed), waits, device_type=self.device_type)


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

        full:           k = 5, at the end of the forward: log p, the target, p, the bracket and their product
        sampled, topk:  k = 3, in the backward: log p, the gradient of the gather and that of the log-softmax

    Measured on a CPU (N = 256, V = 49152, float32 and bfloat16): 20 and 12 bytes per N V. The second term (e =
    bytes of the model's dtype) is the end of the backward, when the gradient of the logits becomes that of hidden and
    weight.
    Code that keeps more alive, such as an upcast of the logits, needs more.
    """
    entries = job.tokens * job.vocab
    alive = 5 if job.estimator == "full" else 3
    forward = {"[tokens, vocabulary] tensors": alive * entries * job.wide}
    end = {"gradient of logits": entries * job.element, **_gradients(job)}
    return max(forward, end, key=_total)


def chunk_size(job: Job) -> int:
    """Tokens per chunk, from the function that the loss itself asks."""
    from fused_gopd.chunks import chunk_size_for

    return chunk_size_for(job.vocab, job.buffers, job.device_type, job.logit)


def _chunk_rows(job: Job) -> int:
    """Tokens of the largest chunk: chunks are of nearly equal size."""
    from fused_gopd.chunks import _balanced

    return _balanced(job.tokens, chunk_size(job), job.device_type)


def _part_rows(job: Job) -> int:
    """Tokens that all models of the largest chunk have logits of at once."""
    from fused_gopd.chunks import others_size

    rows = _chunk_rows(job)
    return min(rows, others_size(chunk_size(job), job.device_type)) if job.estimator == "full" else rows


def _buffer_rows(job: Job) -> int:
    """Rows of all logits buffers together."""
    if job.estimator == "full":
        return _chunk_rows(job) + (len(job.needed) - 1) * _part_rows(job)
    return int(job.buffers) * _chunk_rows(job)


def fused_peak(job: Job, ranks: int = 1) -> dict[str, int]:
    """Bytes beyond the inputs at the peak of :func:`fused_gopd.gopd_loss` on one rank, itemised.

    The larger of two moments. In the forward: the gradients as they are summed, the weight's in float32, and chunk
    buffers, which do not depend on the number of tokens: C V a of the student and with ``full`` of each other model (a
    fourth of C on a GPU), else one that models take turns in. In the backward the buffers are gone, and a
    low-precision weight's gradient is rounded beside its sum.

    ``ranks`` is how many gather their statistics; ``job`` is then the share of one of them.
    """
    from fused_gopd.loop import gemm
    from fused_gopd.objective.statistics import STATISTICS
    from fused_gopd.rowops import Stat, sparse

    rows, weight = _chunk_rows(job), job.vocab * job.hidden
    kept = {
        "statistics per token": STATISTICS * job.tokens * job.wide,
        "gradient of hidden": job.tokens * job.hidden * job.element,
    }
    low = job.wide != job.element
    summed = "float32 accumulator of the weight gradient" if low else "gradient of weight"
    forward = {
        "chunk buffers": _buffer_rows(job) * job.vocab * job.logit,
        "chunk of the hidden gradient": rows * job.hidden * job.wide,
        **kept,
        summed: weight * job.wide,
    }
    if low and job.device == "cpu":
        widest = max(job.needed.values())
        forward["widened block of a weight"] = min(gemm._BLOCK_ELEMENTS, job.vocab * widest) * job.wide
    if job.k is not None:
        searched = min(rows, max(1, sparse._SEARCHED[job.device] // job.vocab))
        # ids twice and logits once of the blocks that may hold the largest
        forward["search for the support"] = searched * min(job.vocab, job.k * sparse._BLOCK) * (8 + 8 + job.wide)
    if ranks > 1:
        # as they come, and laid out and widened to float64 to be merged
        gathered = max(exchange.numbers for exchange in exchanges(job)) * job.wide + len(Stat) * (job.wide + 8)
        forward["gathered statistics of a chunk"] = ranks * gathered * _part_rows(job)
    backward = {**kept, summed: weight * job.wide}
    if low:
        backward["gradient of weight"] = weight * job.element
    return max(forward, backward, key=_total)


def _total(items: dict[str, int]) -> int:
    return sum(items.values())


def gemm_flop(job: Job) -> float:
    """Floating-point operations of the GEMMs: three of 2 N V H for the student, one for each other model needed.

    At one hidden size that is 5F (F = 2 N V H), 4F with lambda = 0 or 1. Dense code does the same GEMMs.
    """
    widths = 2 * job.hidden + sum(job.needed.values())
    return 2.0 * job.tokens * job.vocab * widths


@dataclass(frozen=True)
class Collective:
    """What goes over the wire in one step, for one rank."""

    what: str
    kind: str  # all-gather, all-reduce or reduce-scatter
    ranks: int
    size: int  # bytes of the whole: the gathered result, or what is summed
    calls: int  # in how many collectives

    @property
    def received(self) -> int:
        """Bytes that a rank receives, and sends, over a ring: S (n - 1) / n, twice for an all-reduce."""
        return (2 if self.kind == "all-reduce" else 1) * self.size * (self.ranks - 1) // self.ranks


class Exchange(NamedTuple):
    """What the ranks that share a vocabulary gather for each token of a chunk."""

    what: str
    numbers: int  # of the accumulation dtype
    times: int  # in how many collectives a chunk


def exchanges(job: Job) -> list[Exchange]:
    """The all-gathers of vocabulary-parallel heads, whose sampled tokens are known."""
    from fused_gopd.objective.statistics import merged_statistics

    models = len(job.needed)
    if job.estimator == "full":
        has = "teacher" in job.needed, "ref" in job.needed
        found = [Exchange("statistics", len(merged_statistics(has, job.divergence, tokens=True)), 1)]
        return found + ([Exchange("statistics of the mixture", 2, 1)] if job.divergence == "jsd" else [])
    alone = len(merged_statistics((False, False), None, tokens=True))
    if job.estimator == "sampled":
        return [Exchange("statistics, model by model", models * alone, models)]
    assert job.k is not None
    # ids travel as numbers of the same size
    candidates = Exchange("candidates of the support", 2 * job.k, 1)
    return [candidates, Exchange("statistics, model by model", models * (alone + job.k), models)]


def collectives(job: Job) -> list[Collective]:
    """The collectives of one step; empty on one rank.

    Vocabulary-parallel heads exchange what is left of a row once the vocabulary has been summed over: statistics, and
    the hidden states' gradient, which is a sum over the vocabulary. The weight's gradient stays where its rows are.
    Data and context parallelism shard the heads over their ranks together, as FSDP does: each head that is needed is
    gathered once, and the gradient of the student's is reduced and scattered in the dtype of the weight.
    """
    share, found = job.share, []
    chunk = max(1, _chunk_rows(share))
    chunks, parts = -(-share.tokens // chunk), -(-chunk // max(1, _part_rows(share)))

    def over_vocabulary(what: str, kind: str, numbers: int, times: int = 1) -> None:
        size = numbers * job.wide * share.tokens * (job.tp if kind == "all-gather" else 1)
        found.append(Collective(what, kind, job.tp, size, times * chunks))

    if job.tp > 1:
        for exchange in exchanges(job):
            over_vocabulary(exchange.what, "all-gather", exchange.numbers, exchange.times * parts)
        over_vocabulary("gradient of hidden", "all-reduce", job.hidden)
    sharded = job.dp * job.cp
    if sharded > 1:
        for name, width in job.needed.items():
            found.append(
                Collective(f"head of the {_MODELS[name]}", "all-gather", sharded, share.vocab * width * job.element, 1)
            )
        gradient = share.vocab * job.hidden * job.element
        found.append(Collective("gradient of the student's head", "reduce-scatter", sharded, gradient, 1))
        found.append(Collective("number of tokens", "all-reduce", sharded, 8, 1))
    return found


_MODELS = {"student": "student", "teacher": "teacher", "ref": "reference"}


def tokens_that_fit(job: Job, memory: int, *, fused: bool) -> int:
    """The most tokens whose inputs and peak fit in ``memory`` bytes on every rank; 0 if not even one does."""

    def fits(tokens: int) -> bool:
        at = replace(job, tokens=tokens).share
        return _total(inputs(at)) + _total(fused_peak(at, job.tp) if fused else dense_peak(at)) <= memory

    low, high = 0, 1
    while high < 1 << 60 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def figures(job: Job, memory: int | None, tflops: float | None = None) -> dict[str, Any]:
    """All that the command prints, as plain data: of one rank where there are several, bytes unless said otherwise."""
    share = job.share
    dense, fused = dense_peak(share), fused_peak(share, job.tp)
    result: dict[str, Any] = {
        "job": asdict(job),
        "share": {"ranks": job.tp * job.dp * job.cp, "tokens": share.tokens, "vocab": share.vocab},
        "inputs": inputs(share),
        "dense": {"items": dense, "peak": _total(dense)},
        "fused": {"items": fused, "peak": _total(fused), "chunk_size": chunk_size(share)},
        "gemm_tflop": gemm_flop(share) / 1e12,
        "wire": [{**asdict(c), "received": c.received} for c in collectives(job)],
    }
    if tflops is not None:
        result["tflops"] = tflops
        result["gemm_ms"] = result["gemm_tflop"] / tflops * 1e3
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


def _title(job: dict[str, Any], share: dict[str, int]) -> str:
    widths = f"{job['hidden']} / {job['teacher_hidden']} / {job['ref_hidden']}"
    estimator = job["estimator"]
    if job["k"] is not None:
        estimator += f", {job['k']} tokens of the {job['support']}"
    if job["divergence"] != "reverse_kl":
        estimator += f", {job['divergence']}"
    title = (
        f"{job['tokens']:,} tokens x {job['vocab']:,} entries, hidden (student / teacher / reference) {widths}\n"
        f"{job['dtype']}, {estimator}, lambda = {job['reward_scale']:g}, {job['device']}"
    )
    if share["ranks"] == 1:
        return title
    parallel = " x ".join(f"{name} {job[name]}" for name in ("tp", "dp", "cp") if job[name] > 1)
    return f"{title}\n{parallel}: each rank {share['tokens']:,} tokens x {share['vocab']:,} entries"


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    several = result["share"]["ranks"] > 1
    table = Table(title=_title(result["job"], result["share"]))
    table.add_column("beyond the inputs, on one rank" if several else "beyond the inputs")
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
            f"tokens that fit in {_bytes(result['memory'])}" + (" on every rank" if several else ""),
            *(f"{side['tokens_that_fit']:,}" for side in (dense, fused)),
        )
    table.add_row("tokens per chunk", "", f"{fused['chunk_size']:,}")
    table.add_row("GEMM work", *[f"{result['gemm_tflop']:,.4g} TFLOP"] * 2)
    if "gemm_ms" in result:
        table.add_row(f"GEMMs at {result['tflops']:g} TFLOP/s", *[f"{result['gemm_ms']:,.4g} ms"] * 2)
    console.print(table)
    if result["wire"]:
        table = Table(title="received by each rank in one step (ring)")
        for column in ("", "collective", "ranks", "calls", "bytes"):
            table.add_column(column, justify="right" if column in ("ranks", "calls", "bytes") else "left")
        for one in result["wire"]:
            table.add_row(one["what"], one["kind"], str(one["ranks"]), f"{one['calls']:,}", _bytes(one["received"]))
        table.add_section()
        table.add_row("together", "", "", "", _bytes(sum(one["received"] for one in result["wire"])), style="bold")
        console.print(table)
    console.print(
        f"Inputs, the same for both: {_bytes(_total(result['inputs']))} of hidden states and heads. They count towards "
        "what fits; the rest of the models, the optimizer and activations do not.\n"
        "Dense is the least that eager PyTorch holds at its peak: max(k N V a, N V e + gradients), k = 5 for full, "
        "3 for sampled and topk, a = bytes of float32, e = bytes of the dtype. Fused lists what is alive at its peak.",
        style="dim",
    )
    if several:
        console.print(
            "Heads are sharded over the ranks of dp and cp, gathered whole (of the vocabulary share) for the loss, and "
            "their gradient scattered in their dtype. Formulas, not measurements.",
            style="dim",
        )
    if "gemm_ms" in result:
        console.print(
            "The GEMM time is a roofline, work over the rate that was given, not a measurement: row operations, "
            "the wire and what a GEMM falls short of that rate come on top.",
            style="dim",
        )


def _print_presets() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="presets")
    for column in ("model", "hidden", "vocabulary", "head", "on the hub"):
        table.add_column(column, justify="right" if column in ("hidden", "vocabulary") else "left")
    for name, preset in PRESETS.items():
        head = "tied" if preset.tied else "own weight"
        table.add_row(name, str(preset.hidden), str(preset.vocab), head, "\n".join(preset.hub))
    Console().print(table)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"expected one of {', '.join(allowed)}, got {value!r}", param_hint=option)


def _given(option: str, value: int | None, of_model: int | None, model: str | None) -> int:
    """A size that is given, or else that of a model."""
    found = of_model if value is None else value
    if found is None:
        said = "give --model, or --hidden and --vocab" if model is None else f"must be given: {model} does not say it"
        raise typer.BadParameter(said, param_hint=option)
    return found


def _check(job: Job) -> None:
    """Options that have nothing to act on, and ranks without work."""
    if not math.isfinite(job.reward_scale):
        raise typer.BadParameter(f"expected a finite number, got {job.reward_scale}", param_hint="--reward-scale")
    if (job.k is None) == (job.estimator == "topk"):
        said = "must be given for --estimator topk" if job.k is None else "is an option of --estimator topk"
        raise typer.BadParameter(said, param_hint="--k")
    if job.k is not None and job.k > job.vocab:
        raise typer.BadParameter(f"must be at most the vocabulary of {job.vocab}, got {job.k}", param_hint="--k")
    if job.support == "student" and job.estimator != "topk":
        raise typer.BadParameter("is an option of --estimator topk", param_hint="--support")
    if job.divergence != "reverse_kl" and job.estimator == "sampled":
        raise typer.BadParameter("is an option of --estimator full and topk", param_hint="--divergence")
    if job.low_chunks and (job.device == "cpu" or job.dtype not in ("bfloat16", "float16")):
        raise typer.BadParameter("is for bfloat16 and float16 on a GPU", param_hint="--low-chunks")
    if job.tp > job.vocab:
        raise typer.BadParameter(f"{job.tp} ranks cannot share {job.vocab} vocabulary entries", param_hint="--tp")
    if job.dp * job.cp > job.tokens:
        raise typer.BadParameter(
            f"{job.tokens} tokens are fewer than the {job.dp * job.cp} ranks of --dp times --cp", param_hint="--tokens"
        )


def _rate(tflops: float | None, gpu: str | None, dtype: str) -> float | None:
    """The rate of the GEMMs in TFLOP/s, where one is given."""
    if gpu is None:
        if tflops is not None and not (math.isfinite(tflops) and tflops > 0):
            raise typer.BadParameter(f"expected a positive number, got {tflops}", param_hint="--tflops")
        return tflops
    if tflops is not None:
        raise typer.BadParameter("give one of --gpu and --tflops", param_hint="--gpu")
    _one_of("--gpu", gpu.lower(), tuple(PEAKS))
    if dtype not in ("bfloat16", "float16"):
        raise typer.BadParameter(
            f"peaks are those of bfloat16 and float16; give --tflops for {dtype}", param_hint="--gpu"
        )
    return PEAKS[gpu.lower()]


def plan(
    tokens: Annotated[int, typer.Option(min=1, help="Unmasked tokens in one loss call, of all ranks together.")] = 8192,
    model: Annotated[
        str | None,
        typer.Option(help="The student: a preset or its name on the hub (--list-models), a folder, or a config.json."),
    ] = None,
    teacher_model: Annotated[str | None, typer.Option(help="The teacher, likewise. Default: as the student.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Joint vocabulary.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size of the student.")] = None,
    teacher_hidden: Annotated[int | None, typer.Option(min=1, help="Default: as the student.")] = None,
    ref_hidden: Annotated[int | None, typer.Option(min=1, help="Default: as the student.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64.")] = "bfloat16",
    memory: Annotated[str | None, typer.Option(help="Memory for the loss, such as 80GiB: how many tokens fit?")] = None,
    estimator: Annotated[str, typer.Option(help="full, sampled or topk.")] = "full",
    divergence: Annotated[str, typer.Option(help="reverse_kl, forward_kl or jsd.")] = "reverse_kl",
    k: Annotated[int | None, typer.Option("--k", min=1, help="Tokens that topk looks at.")] = None,
    support: Annotated[str, typer.Option(help="Whose tokens topk looks at: teacher or student.")] = "teacher",
    reward_scale: Annotated[float, typer.Option(help="lambda: 1 needs no reference, 0 no teacher.")] = 1.25,
    device: Annotated[str, typer.Option(help="gpu or cpu; decides the chunk size.")] = "gpu",
    low_chunks: Annotated[
        bool, typer.Option("--low-chunks", help="The chunk's logits in --dtype: chunk_dtype of the loss.")
    ] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that share the vocabulary of every head.")] = 1,
    dp: Annotated[int, typer.Option("--dp", min=1, help="Ranks that share the sequences, heads sharded (FSDP).")] = 1,
    cp: Annotated[int, typer.Option("--cp", min=1, help="Ranks that share the tokens of each sequence.")] = 1,
    tflops: Annotated[float | None, typer.Option(help="Rate of a rank's GEMMs, for their time.")] = None,
    gpu: Annotated[str | None, typer.Option(help=f"The same from a data sheet: {', '.join(PEAKS)}.")] = None,
    list_models: Annotated[bool, typer.Option("--list-models", help="Show the presets and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data, sizes in bytes.")] = False,
) -> None:
    """Compare dense and fused: peak memory, chunk size, GEMM work, how many tokens fit; on many ranks, the wire.

    Dense is eager PyTorch at its leanest and holds max(k N V a, N V e + gradients) bytes beyond its inputs: k = 5
    tensors of [tokens N, vocabulary V] for full, 3 for sampled and topk; a = 4 bytes of float32, e = bytes of the
    dtype. Fused holds chunk buffers and gradients, or gradients and the float32 sum that a weight's is rounded from.

    With --tp, --dp or --cp all figures but --tokens are those of one rank.
    """
    if list_models:
        _print_presets()
        return
    _one_of("--dtype", dtype, tuple(_BYTES))
    _one_of("--estimator", estimator, ("full", "sampled", "topk"))
    _one_of("--divergence", divergence, ("reverse_kl", "forward_kl", "jsd"))
    _one_of("--support", support, ("teacher", "student"))
    _one_of("--device", device, ("gpu", "cpu"))
    student = Head(None, None) if model is None else head_of(model, "--model")
    teacher = Head(None, None) if teacher_model is None else head_of(teacher_model, "--teacher-model")
    hidden = _given("--hidden", hidden, student.hidden, model)
    if teacher_hidden is None:
        teacher_hidden = hidden
        if teacher_model is not None:
            teacher_hidden = _given("--teacher-hidden", None, teacher.hidden, teacher_model)
    if vocab is None:
        heads = {name: head for name, head in ((model, student), (teacher_model, teacher)) if name is not None}
        # the joint vocabulary is the smallest
        vocab = min((_given("--vocab", None, head.vocab, name) for name, head in heads.items()), default=None)
    vocab = _given("--vocab", vocab, None, None)
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
        divergence=cast("Divergence", divergence),
        k=k,
        support=cast("Support", support),
        low_chunks=low_chunks,
        tp=tp,
        dp=dp,
        cp=cp,
    )
    _check(job)
    result = figures(job, None if memory is None else parse_memory(memory), _rate(tflops, gpu, dtype))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(result)
