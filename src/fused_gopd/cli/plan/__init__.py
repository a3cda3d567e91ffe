"""``fused-gopd plan``: what one loss costs, dense and fused, on one device or many, before any is rented."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..parameters import check_loss_options, help_of, require_finite, require_one_of
from .call import BYTES, PlannedCall
from .cost import figures
from .presets import HeadSize, head_size
from .tables import print_plan, print_presets

if TYPE_CHECKING:
    from fused_gopd.options import Estimator, Support

__all__ = ["parse_memory", "plan"]

# Dense bfloat16 and float16 peaks of the vendors' data sheets, TFLOP/s.
PEAKS: dict[str, float] = {"a100": 312, "h100": 989, "h200": 989, "b200": 2250, "mi300x": 1307}

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


def _size(flag: str, value: int | None, of_model: int | None, model: str | None) -> int:
    """The size that the flag gives, or else the model's."""
    found = of_model if value is None else value
    if found is None:
        missing = "give --model, or --hidden and --vocab"
        message = missing if model is None else f"must be given: {model} does not say it"
        raise typer.BadParameter(message, param_hint=flag)
    return found


def _check(call: PlannedCall) -> None:
    """Refuse options without effect, and more ranks than there is work for."""
    require_finite("reward_scale", call.reward_scale)
    check_loss_options(estimator=call.estimator, divergence=call.divergence, k=call.k, support=call.support)
    if call.k is not None and call.k > call.vocab:
        raise typer.BadParameter(f"must be at most the vocabulary of {call.vocab}, got {call.k}", param_hint="--k")
    if call.low_chunks and (call.device == "cpu" or call.dtype not in ("bfloat16", "float16")):
        raise typer.BadParameter("is for bfloat16 and float16 on a GPU", param_hint="--low-chunks")
    if call.tp > call.vocab:
        raise typer.BadParameter(f"{call.tp} ranks cannot share {call.vocab} vocabulary entries", param_hint="--tp")
    if call.dp * call.cp > call.tokens:
        raise typer.BadParameter(
            f"{call.tokens} tokens are fewer than the {call.dp * call.cp} ranks of --dp times --cp",
            param_hint="--tokens",
        )


def _rate(tflops: float | None, gpu: str | None, dtype: str) -> float | None:
    """The rate of the GEMMs in TFLOP/s, where one is given."""
    if gpu is None:
        if tflops is not None and not (math.isfinite(tflops) and tflops > 0):
            raise typer.BadParameter(f"expected a positive number, got {tflops}", param_hint="--tflops")
        return tflops
    if tflops is not None:
        raise typer.BadParameter("give one of --gpu and --tflops", param_hint="--gpu")
    require_one_of("gpu", gpu.lower(), PEAKS)
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
    teacher_models: Annotated[
        int, typer.Option(min=1, help="Models that the teacher is made of (LogLinear, Mixture), each of its size.")
    ] = 1,
    ref_models: Annotated[int, typer.Option(min=1, help="The same of the reference.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64.")] = "bfloat16",
    memory: Annotated[str | None, typer.Option(help="Memory for the loss, such as 80GiB: how many tokens fit?")] = None,
    estimator: Annotated[str, typer.Option(help=help_of("estimator"))] = "full",
    divergence: Annotated[str, typer.Option(help=help_of("divergence"))] = "reverse_kl",
    k: Annotated[int | None, typer.Option("--k", min=1, help=help_of("k"))] = None,
    support: Annotated[str, typer.Option(help=help_of("support"))] = "teacher",
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
        print_presets()
        return
    require_one_of("dtype", dtype, BYTES)
    require_one_of("device", device, ("gpu", "cpu"))
    student = HeadSize(None, None) if model is None else head_size(model, "--model")
    teacher = HeadSize(None, None) if teacher_model is None else head_size(teacher_model, "--teacher-model")
    hidden = _size("--hidden", hidden, student.hidden, model)
    if teacher_hidden is None:
        teacher_hidden = hidden
        if teacher_model is not None:
            teacher_hidden = _size("--teacher-hidden", None, teacher.hidden, teacher_model)
    if vocab is None:
        heads = {name: head for name, head in ((model, student), (teacher_model, teacher)) if name is not None}
        # the joint vocabulary is the smallest
        vocab = min((_size("--vocab", None, head.vocab, name) for name, head in heads.items()), default=None)
    vocab = _size("--vocab", vocab, None, None)
    call = PlannedCall(
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        teacher_hidden=teacher_hidden,
        ref_hidden=hidden if ref_hidden is None else ref_hidden,
        teacher_models=teacher_models,
        ref_models=ref_models,
        dtype=dtype,
        estimator=cast("Estimator", estimator),
        reward_scale=reward_scale,
        device=device,
        divergence=divergence,
        k=k,
        support=cast("Support", support),
        low_chunks=low_chunks,
        tp=tp,
        dp=dp,
        cp=cp,
    )
    _check(call)
    result = figures(call, None if memory is None else parse_memory(memory), _rate(tflops, gpu, dtype))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_plan(result)
