"""The seven promises under DistributedDataParallel on two and four ranks; the control is naive freezing."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from backbones import batch, bits, loss, network
from promises import HEAD, Promises, Way, work
from ranks import run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from freezekit import freeze_backbone


def alone(model: nn.Module) -> DistributedDataParallel:
    """Wrapped, with buffers that each rank has to itself."""
    ddp = DistributedDataParallel(model)
    ddp.broadcast_buffers = False
    return ddp


class TestPromisesUnderDDP(Promises):
    ways: ClassVar[dict[str, Way]] = {
        "plain": Way(DistributedDataParallel),
        "buffers not sent": Way(alone),
        "static graph": Way(partial(DistributedDataParallel, static_graph=True)),
        "unused parameters": Way(partial(DistributedDataParallel, find_unused_parameters=True)),
        "views of buckets": Way(partial(DistributedDataParallel, gradient_as_bucket_view=True)),
        "affine": Way(DistributedDataParallel, convert="affine"),
        "fold": Way(DistributedDataParallel, convert="fold"),
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    naive = Way(DistributedDataParallel, naive=True)
    ways = list(TestPromisesUnderDDP.ways.items())[: None if request.param == 2 else 3]
    return run(work, request.param, dict(ways), naive)


def note_and_reduce(names, bucket):  # torch refuses annotations that are strings
    names.extend(id(parameter) for parameter in bucket.parameters())
    return allreduce_hook(None, bucket)


def sent(rank: int) -> dict[str, Any]:
    found = {}
    for way in ("frozen", "trains"):
        model = network()
        if way == "frozen":
            freeze_backbone(model)
        ddp = DistributedDataParallel(model)
        ids: list[int] = []
        ddp.register_comm_hook(ids, note_and_reduce)
        loss(ddp, batch(rank)).backward()
        found[way] = {name for name, p in model.named_parameters() if id(p) in ids}
    # where the ranks have other values, wrapping gives all those of rank 0, frozen or not
    model = network()
    if rank:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)
    freeze_backbone(model)
    ddp = DistributedDataParallel(model)
    start = bits(model)
    ddp(batch(rank))
    return found | {"start": start, "after": bits(model)}


@pytest.fixture(scope="module", params=[2, 4])
def sent_by(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run(sent, request.param)


def test_gradient_buckets_hold_nothing_frozen(sent_by: list[dict[str, Any]]) -> None:
    everything = dict(network().named_parameters()).keys()
    for rank in sent_by:
        assert rank["trains"] == everything
        assert rank["frozen"] == HEAD


def test_what_is_sent_at_each_forward_is_what_all_have(sent_by: list[dict[str, Any]]) -> None:
    expected = bits(network())
    for rank in sent_by:
        assert rank["start"] == rank["after"] == expected
