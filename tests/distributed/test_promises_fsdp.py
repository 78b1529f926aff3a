"""The seven promises under fully_shard, on two and on four ranks, with naive freezing as the control."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from backbones import SHARDS, batch, bits, network, shard, train
from promises import HEAD, Promises, Way, moved, work
from ranks import run
from torch.distributed.fsdp import FullyShardedDataParallel

from freezekit import FreezekitError, freeze, freeze_backbone, unfreeze

pytestmark = pytest.mark.skipif(not SHARDS, reason="fully_shard does not run on the CPU")
WHOLE = partial(shard, reshard_after_forward=False)


class TestPromisesUnderFSDP(Promises):
    ways: ClassVar[dict[str, Way]] = {
        "freeze, shard": Way(shard),
        "shard, freeze": Way(shard, wrap_first=True),
        "freeze, shard, kept whole": Way(WHOLE),
        "shard, freeze, kept whole": Way(WHOLE, wrap_first=True),
        "affine, shard": Way(shard, convert="affine"),
        "shard, fold": Way(shard, wrap_first=True, convert="fold"),
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    naive = Way(shard, wrap_first=True, naive=True)
    ways = list(TestPromisesUnderFSDP.ways.items())[: None if request.param == 2 else 2]
    return run(work, request.param, dict(ways), naive)


def copied(rank: int) -> list[str]:
    said = []
    for frozen in (False, True):
        model = shard(network())
        if frozen:
            freeze_backbone(model)
        with pytest.raises(AssertionError) as caught:
            copy.deepcopy(model)
        said.append(str(caught.value))
    return said


def test_torch_copies_no_sharded_model_frozen_or_not() -> None:
    for plain, frozen in run(copied, 2):
        assert plain == frozen != ""


def flat(rank: int) -> tuple[list[str], list[str]]:
    """The wrapper of old, which makes one parameter of many, or keeps them."""
    model = network()
    FullyShardedDataParallel(model.backbone.second, use_orig_params=False, device_id=torch.device("cpu"))
    said = []
    for call in (lambda: freeze(model, "backbone"), lambda: unfreeze(model), lambda: freeze(model, "fc")):
        with pytest.raises(FreezekitError) as caught:
            call()
        said.append(str(caught.value))
    model = network()
    freeze_backbone(model)
    before = bits(model)
    old = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    train(old, torch.optim.AdamW(old.parameters(), lr=0.1, weight_decay=0.5), batch(rank))
    with FullyShardedDataParallel.summon_full_params(old):
        return said, sorted(moved(model, before))


def test_parameters_made_one_are_refused_and_others_keep_the_promise() -> None:
    refusal = (
        "backbone.second: FullyShardedDataParallel has made one parameter of all in here, to be frozen as "
        "one (got use_orig_params=False). Remedy: shard with torch.distributed.fsdp.fully_shard, or give "
        "use_orig_params=True"
    )
    for said, changed in run(flat, 2):
        assert said == [refusal] * 3
        assert set(changed) == HEAD
