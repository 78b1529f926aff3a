"""The seven promises under fully_shard, on two and on four ranks, with naive freezing as the control."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar

import pytest
from backbones import SHARDS, network, shard
from promises import Promises, Way, work
from ranks import run

from freezekit import freeze_backbone

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
    ways = list(TestPromisesUnderFSDP.ways.items())[: None if request.param == 2 else 3]
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
