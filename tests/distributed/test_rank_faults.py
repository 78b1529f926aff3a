"""The fault matrix between ranks: each fault is told of on every rank, of the right rank, at its step."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from distributed.rank_faults import FAULTS, Fault, run_fault
from distributed.ranks import run

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

Told = list[list[tuple[Any, ...]]]


def worker(rank: int) -> dict[str, list[tuple[Any, ...]]]:
    return {fault.name: run_fault(rank, dist.get_world_size(), fault) for fault in FAULTS}


@pytest.fixture(scope="module", params=[2, 4])
def told(request: pytest.FixtureRequest) -> list[dict[str, list[tuple[Any, ...]]]]:
    """What each rank said of each fault."""
    return run(worker, request.param)


def across(findings: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [found for found in findings if found[0].startswith("FK5")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(told: list[dict[str, list[tuple[Any, ...]]]], fault: Fault) -> None:
    world = len(told)
    for rank in range(world):
        found = across(told[rank][fault.name])
        first = [one for one in found if one[2] == min(f[2] for f in found)]
        at = fault.at + (fault.after is not Fault.after)
        wanted = {tuple(one.split()): fault.ranks(one.split()[0], world) for one in fault.finds.split(", ")}
        assert {one[:2]: one[3] for one in first} == wanted, [one[5] for one in found]
        assert {one[2] for one in first} == {at}
        assert found == across(told[0][fault.name]), "every rank tells the same"
        assert fault.says in " ".join(one[5] for one in first)


def test_no_cause_is_wrong(told: list[dict[str, list[tuple[Any, ...]]]]) -> None:
    wrong, right, unknown = [], 0, 0
    for fault in FAULTS:
        for code, name, _, _, kind, text, _ in across(told[0][fault.name]):
            if code not in ("FK501", "FK502"):
                continue
            right += kind in fault.causes.split(", ")
            unknown += kind == "unknown"
            if kind not in (*fault.causes.split(", "), "unknown"):
                wrong.append(f"{fault.name}: {code} {name}: {text}")
    print(f"\nright {right}, unknown {unknown}, wrong {len(wrong)}")
    assert wrong == []
