"""Runs in which nothing is wrong between the ranks: nothing is told, on 2 and on 4 of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zoo import scramble

from freezekit import DriftAuditor

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

STEPS = 4
Said = tuple[list[str], tuple[str, ...]]


def net(rank: int) -> tuple[nn.Module, torch.Tensor]:
    """A frozen body and a head that has a BN of its own; each rank has other data."""
    torch.manual_seed(0)
    body = nn.Sequential(OrderedDict(lin=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)))
    head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = scramble(nn.Sequential(OrderedDict(body=body, head=head)))
    model.body.requires_grad_(False).eval()
    torch.manual_seed(rank)
    return model, torch.randn(8, 4) * 2 + 1


def train(
    run_: nn.Module, inner: Any, x: torch.Tensor, optimizer: Any, steps: int = STEPS, amp: bool = False
) -> None:
    for _ in range(steps):
        inner.train()
        inner.body.eval()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
            loss = run_(x).square().mean()
        loss.backward()
        optimizer.step()


def audited(rank: int, act: Callable[..., object], **ddp: Any) -> Said:
    model, x = net(rank)
    buffers = ddp.pop("buffers", True)
    wrapped = DistributedDataParallel(model, **ddp)
    wrapped.broadcast_buffers = buffers
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    auditor = DriftAuditor(model, optimizer, ranks=1, timeout=120.0)
    with auditor:
        act(wrapped, model, x, optimizer, auditor)
    report = auditor.report()
    return [str(finding) for finding in report.findings], report.notes


def plainly(wrapped: nn.Module, model: nn.Module, x: Any, optimizer: Any, auditor: Any) -> None:
    train(wrapped, model, x, optimizer)


def in_bfloat16(wrapped: nn.Module, model: nn.Module, x: Any, optimizer: Any, auditor: Any) -> None:
    train(wrapped, model, x, optimizer, amp=True)


def accumulated(wrapped: Any, model: Any, x: Any, optimizer: Any, auditor: Any) -> None:
    for _ in range(STEPS):
        model.train()
        model.body.eval()
        optimizer.zero_grad()
        with wrapped.no_sync():
            wrapped(x).square().mean().backward()
        wrapped(x + 1).square().mean().backward()
        optimizer.step()


def wrapped_again(wrapped: Any, model: Any, x: Any, optimizer: Any, auditor: Any) -> None:
    train(wrapped, model, x, optimizer, 2)
    model.body.lin.requires_grad_(True)
    auditor.renew()
    train(DistributedDataParallel(model), model, x, optimizer, 2)


def joined(wrapped: Any, model: Any, x: Any, optimizer: Any, auditor: Any) -> None:
    with wrapped.join():
        train(wrapped, model, x, optimizer)


def validated(wrapped: Any, model: Any, x: Any, optimizer: Any, auditor: Any) -> None:
    train(wrapped, model, x, optimizer, 2)
    if dist.get_rank() == 0:  # as many do
        with torch.no_grad():
            model.eval()(x)
    train(wrapped, model, x, optimizer, 2)


CASES: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "DDP": (plainly, {}),
    "DDP without broadcast_buffers": (plainly, {"buffers": False}),
    "static_graph": (plainly, {"static_graph": True}),
    "find_unused_parameters": (plainly, {"find_unused_parameters": True}),
    "no_sync": (accumulated, {}),
    "mixed precision": (in_bfloat16, {}),
    "unfrozen and wrapped again": (wrapped_again, {"buffers": False}),
    "join": (joined, {}),
    "validation on one rank": (validated, {}),
}


def without_any(rank: int) -> Said:
    """Gradients averaged by hand, and what DDP is told to leave alone."""
    model, x = net(rank)
    model.register_buffer("mine", torch.tensor(float(rank)))
    model.head[1].own = nn.Parameter(torch.tensor(float(rank)))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["head.1.own"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    auditor = DriftAuditor(model, optimizer, ["body"], ranks=2, timeout=120.0)
    wrapped = DistributedDataParallel(model)
    wrapped.broadcast_buffers = False
    with auditor:
        train(wrapped, model, x, optimizer)
    return [str(finding) for finding in auditor.report().findings], auditor.report().notes


def worker(rank: int) -> dict[str, Said]:
    said = {name: audited(rank, act, **how) for name, (act, how) in CASES.items()}
    return said | {"a parameter that DDP leaves alone": without_any(rank)}


@pytest.fixture(scope="module", params=[2, 4])
def told(request: pytest.FixtureRequest) -> list[dict[str, Said]]:
    return run(worker, request.param)


@pytest.mark.parametrize("case", [*CASES, "a parameter that DDP leaves alone"])
def test_nothing_is_told(told: list[dict[str, Said]], case: str) -> None:
    for said in told:
        assert said[case][0] == []
        assert f"compared between {len(told)} ranks" in said[case][1][0]


def test_buffers_that_train_are_only_noted(told: list[dict[str, Said]]) -> None:
    (note,) = told[0]["DDP without broadcast_buffers"][1][1:]
    assert note.startswith("buffers that train differ between ranks, as they do without broadcast_buffers")
