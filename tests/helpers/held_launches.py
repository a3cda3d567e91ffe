"""Which kernel ``Launch.start_held`` takes, and with which arguments, beside what Triton's own launch does.

    python tests/helpers/held_launches.py [--time]

with a driver that launches nothing, for sm_90; prints the launches that differ, and at the end how many agree; or what
either takes the host.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_gopd.objective.divergences import make
from fused_gopd.rowops import GradientWeights, LogitTransform, ModelRows, RowProblem, Stat
from fused_gopd.rowops import triton as backend
from fused_gopd.rowops.triton import Launch

started: list[tuple[Any, ...]] = []  # the compiled kernel of each launch, and what it was given


class _Launcher:
    """In the place of Triton's, one for each compiled kernel."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        started.append((self, arguments[:3], arguments[9:]))


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 0, 1, 32, 0, 1024


class _Driver:
    utils, launcher_cls = _Utils(), _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def _scaled(a_ptr, other_ptr, n, stride, factor, SIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 16)
    a = tl.load(a_ptr + i * stride, mask=i < n, other=0) * factor
    if other_ptr is not None:
        a += tl.load(other_ptr + i)
    tl.store(a_ptr + i, a * SIGN)


@triton.jit
def _copied(tile, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tile.load([0, 0])
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], x)


def launches() -> list[tuple[str, Launch]]:
    """One launch, and others that differ from it in one thing; what Triton compiles in is among these things."""
    a, wide = torch.zeros(65), torch.zeros(64, 128)
    arguments = {"a_ptr": a[:64], "other_ptr": None, "n": 16, "stride": 8, "factor": 0.5}
    changes: dict[str, dict[str, Any]] = {
        "the same": {},
        "another tensor": {"a_ptr": torch.zeros(64)},
        "unaligned": {"a_ptr": a[1:]},
        "bfloat16": {"a_ptr": a[:64].bfloat16()},
        "int64": {"a_ptr": torch.zeros(64, dtype=torch.int64)},
        "a second tensor": {"other_ptr": torch.zeros(64)},
        "a number that is 1": {"n": 1},
        "a number that 16 divides": {"n": 32},
        "one that it does not": {"n": 17},
        "0": {"n": 0},
        "64 bits": {"n": 1 << 40},
        "64 bits, negative": {"n": -(1 << 31) - 1},
        "unsigned": {"n": (1 << 64) - 1},
        "strides": {"stride": 16},
        "a stride of 1": {"stride": 1},
        "a factor": {"factor": 1.0},
        "a whole factor": {"factor": 1},
    }
    made = [
        (name, Launch(_scaled, 3, arguments | change, {"SIGN": 1}, {"num_warps": 1}))
        for name, change in changes.items()
    ]
    made += [
        ("constant", Launch(_scaled, 3, arguments, {"SIGN": -1}, {"num_warps": 1})),
        ("constant of another type", Launch(_scaled, 3, arguments, {"SIGN": 1.0}, {"num_warps": 1})),
        ("option", Launch(_scaled, 3, arguments, {"SIGN": 1}, {"num_warps": 2})),
        ("another order", Launch(_scaled, 4, dict(reversed(arguments.items())), {"SIGN": 1}, {"num_warps": 1})),
    ]
    tiles = {
        "tile": (wide, 16, 32),
        "a larger tile": (wide, 16, 64),
        "a tile of bfloat16": (wide.bfloat16(), 16, 32),
        "of a wider matrix": (torch.zeros(64, 256), 16, 32),
        "of one row": (wide[:1], 16, 32),
    }
    for name, (x, rows, columns) in tiles.items():
        given = {"tile": TensorDescriptor.from_tensor(x, [rows, columns]), "out_ptr": torch.zeros(rows, columns)}
        made.append((name, Launch(_copied, 1, given, {"ROWS": rows, "COLUMNS": columns}, {"num_warps": 1})))
    return made


def times() -> None:
    """Microseconds of a launch of the row kernel of three models, and of the token losses; the smallest of many."""
    import timeit

    z = [ModelRows(torch.randn(4, 64), LogitTransform()) for _ in range(3)]
    ids, statistics, weights = torch.zeros(4, dtype=torch.int64), torch.empty(len(Stat), 4), torch.ones(4)
    problem = RowProblem(
        64, z[0], teacher=z[1], ref=z[2], reward_scale=1.25, token_ids=ids, divergence=make("reverse_kl")
    )
    tile, device = backend.tiles(problem, backend.Device()), torch.device("cuda", 0)
    rows = backend.row_launch(problem, statistics, True, GradientWeights(divergence=weights), z[0].raw, tile, True)
    losses = backend.losses_launch(make("reverse_kl"), 1.25, (True, True), statistics, weights)
    for name, launch in {"row kernel of three models": rows, "token losses": losses}.items():
        parameters = len(launch.arguments) + len(launch.constants)
        ways = (lambda: launch._start(torch.device("cpu")), lambda: launch.start_held(device))  # noqa: B023
        own, held = (1e6 * min(timeit.repeat(way, number=1, repeat=4000)) for way in ways)
        print(f"Triton {triton.__version__}, {name}, {parameters} parameters: own {own:.1f} us, held {held:.1f} us")


def main() -> None:
    driver.set_active(_Driver())
    if sys.argv[1:] == ["--time"]:
        times()
        return
    given, agreed = launches(), 0
    for name, launch in given + given[::-1]:
        launch.start_held(torch.device("cuda", 0))
        launch._start(torch.device("cpu"))  # Triton's own
        held, own = started[-2:]
        same = held[0] is own[0] and held[1] == own[1] and len(held[2]) == len(own[2])
        if same and all(x is y or (type(x) is type(y) and x == y) for x, y in zip(held[2], own[2], strict=True)):
            agreed += 1
        else:
            print(name)
    print(f"{agreed} of {2 * len(given)} launches agree, of {len({id(x[0]) for x in started})} kernels")


if __name__ == "__main__":
    main()
