"""What a call makes the host do: not more launches, ATen calls and Python calls than the committed table says."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

import host_costs
import snapshots
from builders import why_not
from fused_gopd.rowops import GradientWeights, RowProblem, native
from host_costs import ACCEPT, RULES

pytest.importorskip("triton")
if (_reason := why_not("native")) is not None:
    pytest.skip(_reason, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the table is of calls on a CPU", allow_module_level=True)

TABLE = snapshots.load(host_costs.TABLE)


def require_same_version() -> None:
    if host_costs.version() != TABLE["compiler"]:
        pytest.skip(f"{host_costs.TABLE} was made by {TABLE['compiler']}, this is {host_costs.version()}")


def test_no_call_makes_the_host_do_more_than_committed() -> None:
    today = host_costs.measure()
    missing = snapshots.unmatched(TABLE["rows"], today)
    assert not missing, "\n".join([*missing, ACCEPT])
    require_same_version()
    found = [
        snapshots.changes(f"{case}, {backend}", TABLE["rows"][case][backend], row, RULES)
        for case, rows in today.items()
        for backend, row in rows.items()
    ]
    worse, better = ([line for lines in kind for line in lines] for kind in zip(*found, strict=True))
    assert not worse, "\n".join([*worse, ACCEPT])
    if better:
        warnings.warn("\n".join(["better than the committed table:", *better]), stacklevel=1)


def test_one_more_launch_a_chunk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts() -> list[tuple[int, int, int]]:
        return [host_costs.count(host_costs.forward_and_backward("full", "native", n), "native") for n in (1, 3)]

    before, twice = counts(), native.NativeRowOps.statistics_and_gradient

    def more(
        self: native.NativeRowOps, problem: RowProblem, weights: GradientWeights, *rest: torch.Tensor
    ) -> torch.Tensor:
        self.statistics(problem)
        return twice(self, problem, weights, *rest)

    monkeypatch.setattr(native.NativeRowOps, "statistics_and_gradient", more)
    after = counts()
    assert [b[0] - a[0] for a, b in zip(before, after, strict=True)] == [1, 3]
    assert [b[2] > a[2] for a, b in zip(before, after, strict=True)] == [True, True]


@pytest.mark.parametrize("case", host_costs.cases())
def test_a_call_leaves_nothing_to_the_garbage_collector(case: str) -> None:
    """A cycle of references would keep buffers, or a rounded copy of a weight, until Python happens to look for it."""
    call = host_costs.forward_and_backward(case, "native", 2)
    call()
    gc.collect()
    gc.disable()
    try:
        call()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_views_and_allocations_are_no_launches() -> None:
    x = torch.ones(4, 3)
    launches, aten, python = host_costs.count(lambda: torch.empty(2).copy_(x[:2, 0]).view(1, 2).mul_(2), "native")
    assert (launches, python) == (2, 0)  # copy_ and mul_
    assert aten > launches
