"""A rank that hangs, dies, raises or leaves early: the others are told which, and none waits for ever."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import Dead, die, run
from torch import nn

from freezekit import DriftAuditor, DriftError, DriftWarning, FreezekitError
from freezekit.hooks.loop import DriftAudit

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

SHORT = 2.0
"""Seconds that the auditors wait: the hang is real, so this is what the tests take."""

HANG = 3 * SHORT


def made(*, sync: bool = False, **how: Any) -> tuple[DriftAuditor, Callable[[], None]]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        for parameter in model[1].parameters() if sync else ():
            dist.all_reduce(parameter.grad)
        optimizer.step()

    return DriftAuditor(model, optimizer, **{"ranks": 1, "timeout": SHORT, **how}), step


@contextmanager
def timed(said: dict[str, Any]) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    except DriftError as error:
        said["error"] = str(error)
    said["took"] = time.monotonic() - began


def told(auditor: DriftAuditor, said: dict[str, Any]) -> dict[str, Any]:
    found = [f for f in auditor.report().findings if f.code.startswith("FK5")]
    return said | {"found": [(f.code, f.ranks, f.step, f.message) for f in found], "steps": auditor.step}


def hanging(rank: int, on_drift: str) -> dict[str, Any]:
    """Rank 1 hangs in its second step; all go on afterwards."""
    auditor, step = made(on_drift=on_drift)
    said: dict[str, Any] = {"warned": []}
    auditor.attach()
    step()
    if rank == 1:
        time.sleep(HANG)
    with warnings.catch_warnings(record=True) as caught, timed(said):
        warnings.simplefilter("always")
        step()
        step()  # nobody waits a second time
    said["warned"] = [str(w.message) for w in caught if w.category is DriftWarning]
    auditor.detach()
    return told(auditor, said)


def dying(rank: int, at: str) -> dict[str, Any]:
    """Rank 1, or rank 0, dies in its second step."""
    auditor, step = made(on_drift="record")
    said: dict[str, Any] = {}
    with auditor:
        step()
        if rank == int(at):
            die()
        with timed(said):
            step()
            step()
    return told(auditor, said)


def raising(rank: int) -> dict[str, Any]:
    """Rank 1 raises in its second step, inside the auditor's block."""
    auditor, step = made(timeout=100.0)
    said: dict[str, Any] = {}
    try:
        with timed(said), auditor:
            step()
            if rank == 1:
                raise ValueError("bad batch")
            step()
    except ValueError:
        said["raised"] = True
    return told(auditor, said)


def uneven(rank: int) -> dict[str, Any]:
    """Rank 1 has fewer batches, and ends its audit by itself."""
    auditor, step = made(timeout=100.0, on_drift="record")
    said: dict[str, Any] = {}
    with timed(said), auditor:
        for _ in range(2 if rank == 1 else 4):
            step()
    return told(auditor, said)


def without(rank: int) -> dict[str, Any]:
    """Rank 1 has no auditor at all."""
    auditor, step = made(on_drift="record", **({"ranks": None} if rank == 1 else {}))
    said: dict[str, Any] = {}
    with timed(said), auditor:
        step()
        step()
    if rank == 1:
        time.sleep(HANG)  # it keeps the store's file until the others have read it
    return told(auditor, said)


def alone(rank: int) -> dict[str, Any]:
    """What one rank does by itself waits for nobody."""
    auditor, step = made(timeout=100.0)
    said: dict[str, Any] = {}
    auditor.attach()
    step()
    if rank == 0:
        with timed(said):
            auditor.check()
            auditor.report()
            auditor.renew()
            auditor.detach()
            auditor.detach()
            auditor.report()
    dist.barrier()
    return told(auditor, said)


def other_interval(rank: int) -> dict[str, Any]:
    """The ranks were given other intervals."""
    auditor, step = made(timeout=100.0, on_drift="record", ranks=1 + rank % 2)
    said: dict[str, Any] = {}
    auditor.attach()
    for _ in range(4 if rank % 2 else 2):  # as many comparisons
        step()
    dist.barrier()
    auditor.detach()
    return told(auditor, said)


def together(rank: int) -> dict[str, Any]:
    """Rank 1 drifts between two comparisons: all raise at the next one."""
    auditor, step = made(sync=True, timeout=100.0, ranks=3)
    said: dict[str, Any] = {}
    auditor.attach()
    with timed(said):
        for number in range(1, 6):
            if number == 2 and rank == 1:
                auditor.model[0].bias.data.add_(1)
            step()
    auditor.detach()
    return told(auditor, said)


def put_back(rank: int) -> dict[str, Any]:
    """What rank 1's own audit saw is over at the comparison: the others are told all the same."""
    auditor, step = made(sync=True, timeout=100.0, ranks=3, on_drift="record")
    auditor.attach()
    bias = auditor.model[0].bias
    frozen = bias.detach().clone()
    for number in range(1, 5):
        if rank == 1 and number == 2:
            bias.data.add_(1)
        if rank == 1 and number == 3:
            bias.data.copy_(frozen)
        step()
    auditor.detach()
    return told(auditor, {})


def again(rank: int) -> dict[str, Any]:
    """A second block of one auditor, and a second auditor, meet anew."""
    auditor, step = made(timeout=100.0)
    for _ in range(2):
        with auditor:
            step()
    other, step = made(timeout=100.0)
    with other:
        step()
    return told(other, {"notes": [auditor.report().notes, other.report().notes]})


def by_hook(rank: int) -> dict[str, Any]:
    """The plain loop's hook, on which those of the frameworks are built."""
    auditor, step = made()
    audit = DriftAudit(ranks=2, on_drift="record")
    audit.start(auditor.model)
    step()
    if rank == 1:
        auditor.model[0].bias.data.add_(1)
    step()
    report = audit.finish()
    assert report is not None
    return {"found": [(f.code, f.name, f.step, f.ranks) for f in report.findings if f.code == "FK501"]}


@pytest.mark.parametrize("on_drift", ["raise", "warn", "record"])
def test_a_rank_that_hangs(on_drift: str) -> None:
    ranks = run(hanging, 3, on_drift)
    for rank, said in enumerate(ranks):
        ((code, missing, step, message),) = said["found"]
        assert (code, missing, step) == ("FK506", (1,), 2)
        assert message.startswith("rank 1 (last here at step 1) did not come to the comparison after step 2")
        if on_drift == "raise":
            assert said["error"].startswith("FK506 model at step 2: rank 1 (last here at step 1)")
            assert "raise timeout= if it was only slow" in said["error"]
            assert said["steps"] == 2
        else:
            assert said["steps"] == 3, "it goes on alone"
            assert len(said["warned"]) == (on_drift == "warn")
        assert rank == 1 or said["took"] > SHORT / 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies(rank: int) -> None:
    ranks = run(dying, 3, str(rank), dying=[rank])
    assert ranks[rank] is Dead
    for said in (said for said in ranks if said is not Dead):
        ((code, missing, step, message),) = said["found"]
        assert (code, missing, step) == ("FK506", (rank,), 2)
        assert f"rank {rank} (last here at step 1) did not come" in message
        assert said["steps"] == 3


def test_a_rank_that_raises() -> None:
    ranks = run(raising, 3)
    assert ranks[1]["raised"]
    for said in (ranks[0], ranks[2]):
        assert said["found"] == [
            (
                "FK506",
                (1,),
                2,
                "rank 1 ended its audit after step 1 with a ValueError; the others went on to 2",
            )
        ]
        assert "rank 1 ended its audit" in said["error"]
        assert said["took"] < 100, "nobody waited for the time-out"


def test_uneven_data() -> None:
    ranks = run(uneven, 3)
    assert ranks[1]["found"] == []
    for said in (ranks[0], ranks[2]):
        assert said["found"] == [
            ("FK505", (1,), 3, "rank 1 ended its audit after step 2; the others went on to 3")
        ]
        assert said["steps"] == 4
        assert said["took"] < 100


def test_a_rank_without_auditor() -> None:
    ranks = run(without, 3)
    for said in (ranks[0], ranks[2]):
        ((code, missing, step, message),) = said["found"]
        assert (code, missing, step) == ("FK506", (1,), 1)
        assert "rank 1 (never here) did not come" in message


def test_what_one_rank_does_alone_waits_for_nobody() -> None:
    ranks = run(alone, 2)
    assert [said["found"] for said in ranks] == [[], []]
    assert ranks[0]["took"] < 100


def test_other_intervals() -> None:
    for said in run(other_interval, 3):
        assert said["found"][0] == (
            "FK505", (1,), 2, "the ranks are at different optimizer steps: ranks 0, 2 at 1, rank 1 at 2"
        )  # fmt: skip


def test_all_raise_at_the_same_step() -> None:
    ranks = run(together, 3)
    assert [said["steps"] for said in ranks] == [3, 3, 3]
    for said in ranks:
        assert [one[:3] for one in said["found"]] == [("FK501", (1,), 3)]
    assert ranks[0]["error"].startswith("FK501 0.bias at step 3: differs on rank 1, where it is not what was")
    assert ranks[1]["error"].startswith("FK103 0.bias at step 2: ")


def test_what_another_rank_saw_and_is_over() -> None:
    for said in run(put_back, 3):
        ((code, named, step, message),) = said["found"]
        assert (code, named, step) == ("FK507", (1,), 3)
        assert message.startswith("the audit on rank 1 found what the others did not: FK103 0.bias at step 2")


def test_blocks_and_auditors_meet_anew() -> None:
    for said in run(again, 2):
        assert said["found"] == []
        assert said["notes"] == [
            ("compared between 2 ranks 2 times, last after step 2",),
            ("compared between 2 ranks 1 time, last after step 1",),
        ]


def test_by_a_hook() -> None:
    for said in run(by_hook, 2):
        assert said["found"] == [("FK501", "0.bias", 2, (1,))]


def test_one_process_has_nothing_to_compare() -> None:
    auditor, step = made()
    with auditor:
        step()
    assert auditor.report().notes == ("ranks=: there is one process, and nothing to compare",)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"ranks": 0}, r"ranks=: not a number of steps \(got 0\)"),
        ({"ranks": True}, r"ranks=: not a number of steps \(got True\)"),
        ({"timeout": 0}, r"timeout=: not a number of seconds \(got 0\)"),
        ({"timeout": "60"}, r"timeout=: not a number of seconds \(got '60'\)"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], says: str) -> None:
    with pytest.raises(FreezekitError, match=says):
        made(**how)
