"""The plan of a call as tables on the terminal."""

from __future__ import annotations

from typing import Any

from .cost import total
from .presets import PRESETS


def bytes_text(n: int) -> str:
    """A size in bytes in a unit that suits it."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


def _title(call: dict[str, Any], share: dict[str, int]) -> str:
    frozen = [
        f"{call[f'{name}_models']} x {call[f'{name}_hidden']}"
        if call[f"{name}_models"] > 1
        else f"{call[f'{name}_hidden']}"
        for name in ("teacher", "ref")
    ]
    widths = " / ".join([str(call["hidden"]), *frozen])
    estimator = call["estimator"]
    if call["k"] is not None:
        estimator += f", {call['k']} tokens of the {call['support']}"
    if call["divergence"] != "reverse_kl":
        estimator += f", {call['divergence']}"
    title = (
        f"{call['tokens']:,} tokens x {call['vocab']:,} entries, hidden (student / teacher / reference) {widths}\n"
        f"{call['dtype']}, {estimator}, lambda = {call['reward_scale']:g}, {call['device']}"
    )
    if share["ranks"] == 1:
        return title
    parallel = " x ".join(f"{name} {call[name]}" for name in ("tp", "dp", "cp") if call[name] > 1)
    return f"{title}\n{parallel}: each rank {share['tokens']:,} tokens x {share['vocab']:,} entries"


def print_plan(result: dict[str, Any]) -> None:
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
            escape(item), *(bytes_text(side["items"][item]) if item in side["items"] else "" for side in (dense, fused))
        )
    table.add_section()
    table.add_row("peak memory", bytes_text(dense["peak"]), bytes_text(fused["peak"]), style="bold")
    if "memory" in result:
        table.add_row(
            f"tokens that fit in {bytes_text(result['memory'])}" + (" on every rank" if several else ""),
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
            table.add_row(one["what"], one["kind"], str(one["ranks"]), f"{one['calls']:,}", bytes_text(one["received"]))
        table.add_section()
        table.add_row("together", "", "", "", bytes_text(sum(one["received"] for one in result["wire"])), style="bold")
        console.print(table)
    console.print(
        f"Inputs, the same for both: {bytes_text(total(result['inputs']))} of hidden states and heads. They count "
        "towards what fits; the rest of the models, the optimizer and activations do not.\n"
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


def print_presets() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="presets")
    for column in ("model", "hidden", "vocabulary", "head", "on the hub"):
        table.add_column(column, justify="right" if column in ("hidden", "vocabulary") else "left")
    for name, preset in PRESETS.items():
        head = "tied" if preset.tied else "own weight"
        table.add_row(name, str(preset.hidden), str(preset.vocab), head, "\n".join(preset.hub))
    Console().print(table)
