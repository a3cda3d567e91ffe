"""What a gradient of stored exponentials is off by, beside the gradients that are written from chunks of logits.

``python -m benchmarks.exponentials [--json FILE] [PAGE.md ...]`` prints the table and fills it in between
``<!-- exponentials -->`` and ``<!-- /exponentials -->``. No GPU: the roundings of each path are made in PyTorch on
bfloat16 operands (products of bfloat16 summed in float32, results of row kernels rounded once), the truth in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import parse, publish
from .run import write
from .workloads import VOCAB_SIZE as V

TOKENS, HIDDEN = 256, 256
SIGMAS = (3.0, 8.0)  # standard deviation of the logits
BLOCK = 1 << 14  # vocabulary entries of the weight's gradient at a time


class Way(NamedTuple):
    """A way to the gradient: dhidden = rows * (dlogits @ weight) + entry * weight[token],
    dweight = dlogits^T @ hidden, and back added to its rows at the tokens."""

    logprobs: Tensor  # (N,)
    dlogits: Tensor  # (N, V) as it is stored
    rows: Tensor | None  # (N,) float32 factor of dhidden's rows; None is 1
    hidden: Tensor  # (N, H) bfloat16, the other operand of dweight
    entry: Tensor | None = None  # (N,) float32
    back: Tensor | None = None  # (N, H) float32


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16()


def from_logits(z: Tensor, y: Tensor, c: Tensor, hidden: Tensor, unit: bool) -> Way:
    """p - 1[v = y] written from a chunk of logits, times the token weights or, at ``unit`` scale, without them."""
    g = z - z.amax(1, keepdim=True)
    logsum = g.exp().sum(1).log()
    logprobs = g.gather(1, y[:, None])[:, 0] - logsum
    g = (g - logsum[:, None]).exp_()
    g[torch.arange(len(y)), y] -= 1
    if unit:
        return Way(logprobs, rounded(g), c, rounded(hidden.float() * c[:, None]))
    return Way(logprobs, rounded(g * c[:, None]), None, hidden)


def exponentials(z: Tensor, y: Tensor, c: Tensor, hidden: Tensor, all_stored: bool) -> Way:
    """``RowOps.linear_exponentials`` and its products.

    ``all_stored`` is another design: the entry at the token is among the stored numbers, and what rounding takes from
    it goes back into dhidden alone.
    """
    e = (z - z.gather(1, y[:, None])).exp_()
    here = torch.arange(len(y)), y
    e[here] = 0
    others = e.sum(1)
    factor = c / (1 + others)
    logprobs, stored, scaled = -(1 + others).log(), rounded(e), rounded(hidden.float() * factor[:, None])
    if all_stored:
        stored[here] = rounded(-others)
        return Way(logprobs, stored, factor, scaled, (-others - stored[here].float()) * factor)
    entry = -others * factor
    return Way(logprobs, stored, factor, scaled, entry, entry[:, None] * hidden.float())


def measured(path: Way, hidden: Tensor, weight: Tensor, y: Tensor, truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    logprobs, exact = truth  # (N,), (N, V) float64 dlogits
    dhidden = torch.zeros(hidden.shape)
    for columns in _blocks():
        dhidden += path.dlogits[:, columns].float() @ weight[columns].float()
    if path.rows is not None:
        dhidden *= path.rows[:, None]
    if path.entry is not None:
        dhidden += path.entry[:, None] * weight[y].float()
    dhidden64, error, size = torch.zeros(hidden.shape, dtype=torch.float64), 0.0, 0.0
    back = None if path.back is None else torch.zeros(V, hidden.shape[1]).index_add_(0, y, path.back)
    for columns in _blocks():
        dhidden64 += exact[:, columns] @ weight[columns].double()
        dweight = path.dlogits[:, columns].float().T @ path.hidden.float()
        if back is not None:
            dweight += back[columns]
        dweight64 = exact[:, columns].T @ hidden.double()
        error += (dweight - dweight64).square().sum().item()
        size += dweight64.square().sum().item()
    return {
        "logprob": (path.logprobs - logprobs).abs().max().item(),
        "dhidden": ((dhidden - dhidden64).norm() / dhidden64.norm()).item(),
        "dweight": (error / size) ** 0.5,
    }


def _blocks() -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, V)) for start in range(0, V, BLOCK))


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Way]] = {
    "float32 chunks": lambda z, *rest: from_logits(z, *rest, unit=False),
    "float32 chunks, unit scale": lambda z, *rest: from_logits(z, *rest, unit=True),
    "bfloat16 chunks": lambda z, *rest: from_logits(rounded(z).float(), *rest, unit=False),
    "exponentials": lambda z, *rest: exponentials(z, *rest, all_stored=False),
    "exponentials, at the token too": lambda z, *rest: exponentials(z, *rest, all_stored=True),
}


def measure() -> list[dict[str, Any]]:
    rows = []
    for sigma in SIGMAS:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
        weight = (torch.randn(V, HIDDEN, generator=generator) * (sigma * HIDDEN**-0.5)).bfloat16()
        z = hidden.float() @ weight.float().T
        exact = torch.log_softmax(hidden.double() @ weight.double().T, 1)
        y = exact.exp().multinomial(1, generator=generator)[:, 0]
        logprobs = exact.gather(1, y[:, None])[:, 0]
        exact.exp_()
        exact[torch.arange(TOKENS), y] -= 1
        advantages = torch.randn(TOKENS, generator=generator)
        for loss, c in (("policy", advantages), ("nll", torch.ones(TOKENS))):
            dlogits = exact * c[:, None].double()
            for name, path in PATHS.items():
                found = measured(path(z, y, c, hidden), hidden, weight, y, (logprobs, dlogits))
                rows.append({"sigma": sigma, "loss": loss, "path": name, **found})
                print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| σ | weights | path | log-prob | dhidden | dweight |", "|---|---|---|---:|---:|---:|"]
    lines += [
        f"| {r['sigma']:g} | {r['loss']} | {r['path']} | {r['logprob']:.1e} | {r['dhidden']:.1e} | {r['dweight']:.1e} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    args = parse(parser, "json")
    rows = measure()
    if args.json:
        result = {"vocab": V, "tokens": TOKENS, "hidden": HIDDEN, "torch": torch.__version__, "rows": rows}
        write(result, args.json)
    publish("exponentials", table(rows), args.pages)


if __name__ == "__main__":
    main()
