"""The launcher of the distributed tests: what a rank returns comes back, what it raises fails the test."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import Dead, die, run

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


def summed(rank: int, start: torch.Tensor) -> torch.Tensor:
    total = start + rank
    dist.all_reduce(total)
    return total


def failing(rank: int) -> None:
    if rank == 1:
        raise ValueError("no")
    time.sleep(60)


def dying(rank: int) -> str:
    if rank == 1:
        die()
    return "alive"


def test_what_ranks_return() -> None:
    got = run(summed, 4, torch.ones(2))
    assert [list(each) for each in got] == [[10, 10]] * 4


def test_what_a_rank_raises() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank \[1\] failed.*ValueError: no"):
        run(failing, 2)


def test_a_rank_that_dies() -> None:
    assert run(dying, 2, dying=[1]) == ["alive", Dead]


def test_a_rank_that_hangs() -> None:
    with pytest.raises(AssertionError, match="not done after 1 s"):
        run(failing_late, 2, patience=1)


def failing_late(rank: int) -> None:
    time.sleep(60)
