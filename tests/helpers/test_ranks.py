"""The harness of the distributed tests."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from ranks import RankError, run_on_ranks


def _sum_of_ranks(scale: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = scale * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), total


def _first_raises() -> None:
    if dist.get_rank() == 0:
        raise ValueError("this rank has failed")
    dist.barrier()


def _second_waits() -> None:
    if dist.get_rank() == 1:
        dist.barrier()
    time.sleep(60)


@pytest.mark.ranks
def test_every_rank_returns_its_own():
    results = run_on_ranks("test_ranks:_sum_of_ranks", 2, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _ in results] == [0, 1]
    for _, total in results:
        assert total.tolist() == [3.0, 6.0]


@pytest.mark.ranks
def test_the_rank_that_fails_is_told():
    with pytest.raises(RankError, match=r"rank 0:\n(.*\n)*ValueError: this rank has failed"):
        run_on_ranks("test_ranks:_first_raises", 2)


@pytest.mark.ranks
def test_a_rank_that_hangs_tells_where():
    with pytest.raises(RankError, match=r"rank [01]:\nTimeout.*\n(.*\n)*.*in _second_waits"):
        run_on_ranks("test_ranks:_second_waits", 2, timeout=8)
