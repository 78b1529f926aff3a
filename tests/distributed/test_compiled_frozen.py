"""torch.compile over DistributedDataParallel and over fully_shard, with a frozen backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import SHARDS, batch, bits, gradients, joined, loss, network, shard
from promises import HEAD, STATISTICS, moved
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from freezekit import FreezekitError, freeze_backbone, trainable_parameters, unfreeze

RANKS = 2
WAYS = {"ddp": DistributedDataParallel} | ({"fsdp": shard} if SHARDS else {})
UNFROZEN = "DistributedDataParallel: it would not synchronise what was unfrozen since it was made"


def by_itself(fast: Any, model: nn.Module, rank: int) -> dict[str, Any]:
    """Train for three steps, the first time it is called with the gradients of that."""
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    grads = None
    for _ in range(3):
        optimizer.zero_grad()
        loss(fast, batch(rank)).backward()
        grads = gradients(model) if grads is None else grads
        optimizer.step()
    return {"grads": grads}


def work(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way, wrap in WAYS.items():
        for frozen in (True, False):
            torch.compiler.reset()
            model = network()
            model.backbone.first[3].p = 0.0  # draws differ from those of a compiled graph
            if frozen:
                freeze_backbone(model)
            else:
                model.backbone.requires_grad_(False)
            before = bits(model)
            outer = wrap(model)
            fast = torch.compile(outer, backend="aot_eager")
            one = by_itself(fast, model.train(), rank)
            found[way, frozen] = one | {"moved": moved(model, before)}
            if frozen:
                unfreeze(model, "backbone.second")
                model.eval()
                model.zero_grad()
                try:
                    loss(fast, batch(rank)).backward()
                    found[way, "unfrozen"] = gradients(model)
                except FreezekitError as error:
                    found[way, "unfrozen"] = str(error)
                found[way, "weights"] = {n: p for n, p in model.state_dict().items() if n in HEAD}
                if way == "fsdp":
                    found[way, "weights"] = {n: p.full_tensor() for n, p in found[way, "weights"].items()}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run(work, RANKS)


def joined_gradients(*, unfrozen: bool = False, head: dict[str, Any] | None = None) -> dict[str, Any]:
    model = network()
    freeze_backbone(model)
    model.load_state_dict(head or {}, strict=False)
    if unfrozen:
        unfreeze(model, "backbone.second")
    loss(model.eval(), joined(RANKS)).backward()
    return gradients(model)


@pytest.mark.parametrize("way", WAYS)
def test_compiled_naive_freezing_moves_the_statistics(ranks: list[dict[Any, Any]], way: str) -> None:
    for rank in ranks:
        assert rank[way, False]["moved"] == HEAD | STATISTICS


@pytest.mark.parametrize("way", WAYS)
def test_compiled_the_frozen_part_stays_bit_identical_and_the_head_trains_right(
    ranks: list[dict[Any, Any]], way: str
) -> None:
    for rank in ranks:
        assert rank[way, True]["moved"] == HEAD
        torch.testing.assert_close(rank[way, True]["grads"], joined_gradients(), rtol=1e-4, atol=1e-6)


def test_compiled_a_wrapper_refuses_what_it_does_not_know(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert rank["ddp", "unfrozen"].startswith(UNFROZEN)


@pytest.mark.skipif(not SHARDS, reason="fully_shard does not run on the CPU")
def test_compiled_shards_that_are_unfrozen_train_right(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        expected = joined_gradients(unfrozen=True, head=rank["fsdp", "weights"])
        torch.testing.assert_close(rank["fsdp", "unfrozen"], expected, rtol=1e-4, atol=1e-6)
