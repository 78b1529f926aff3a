"""Manifests of sharded models: each rank makes the same, which is that of the model in one piece."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import SHARDS, batch, loss, network, shard
from ranks import run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from freezekit import FreezekitError, Manifest, freeze_backbone, is_frozen, unfreeze

pytestmark = pytest.mark.skipif(not SHARDS, reason="fully_shard does not run on the CPU")
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS: dict[str, dict[str, Any]] = {
    "resharded": {"reshard_after_forward": True},
    "kept whole after a forward": {"reshard_after_forward": False},
    "half precision": {"reshard_after_forward": False, "mp_policy": HALF},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def of_one_piece() -> Manifest:
    return freeze_backbone(network()).manifest()


def refusal(call: Any) -> str:
    try:
        call()
    except FreezekitError as error:
        return str(error)
    return "silent"


def work(rank: int, saved: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    x = batch(rank)
    for way, how in WAYS.items():
        model = network()
        handle = freeze_backbone(model)
        if way == "half precision":  # torch's BN takes half-precision weights on a GPU only
            for part in (model.backbone.first[1], model.backbone.second[1]):
                fully_shard(part)
        shard(model, **how)
        made = [handle.manifest().to_json()]
        with torch.no_grad():
            model(x)
        made += [handle.manifest().to_json()]  # some parameters are in one piece now, or in another dtype
        loss(model, x).backward()
        handle.manifest().verify(model)
        found[way] = [*made, handle.manifest().to_json()]
    local = model.backbone.second[0].weight.to_local()
    found["naive"] = hashlib.sha256(local.detach().numpy().tobytes()).hexdigest()

    # taken out of a file, onto a model sharded before
    manifest = Manifest.load(saved)
    model = shard(network())
    manifest.verify(model)
    handle = manifest.restore(model)
    found["restored"] = (handle.frozen, handle.trainable, handle.manifest().to_json())
    loss(model.train(), x).backward()
    manifest.verify(model)
    found["verified"] = True
    unfreeze(model, "backbone.second")
    found["part"] = handle.manifest().frozen
    handle.undo()
    found["undone"] = [name for name, p in model.named_parameters() if not p.requires_grad]

    # one rank's part of one tensor is touched
    if rank == 1:
        with torch.no_grad():
            model.backbone.first[0].weight.to_local().view(-1)[:1].add_(1)
    found["touched"] = [refusal(lambda: manifest.verify(model)), refusal(lambda: manifest.restore(model))]
    found["left alone"] = is_frozen(model, "backbone")

    # what a checkpoint has: the names and values of a model nobody froze
    model = network()
    plain = model.state_dict()
    freeze_backbone(model)
    shard(model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    parts = get_model_state_dict(model)
    found["names"] = [list(plain) == list(state) for state in (parts, model.state_dict())]
    found["whole"] = [list(whole), whole if rank == 0 else None]
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in parts.items()}
    found["values"] = all(torch.equal(plain[n], full[n]) for n in plain)
    other = network()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    freeze_backbone(other)
    shard(other)
    set_model_state_dict(other, plain, options=StateDictOptions(full_state_dict=True))
    manifest.verify(other)
    with torch.no_grad():
        found["same output"] = torch.equal(other.eval()(x), model.eval()(x))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "manifest.json"
    of_one_piece().save(path)
    return path


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, saved: Path) -> list[dict[str, Any]]:
    return run(work, request.param, str(saved))


def test_a_digest_of_what_a_rank_has_is_another_on_each(ranks: list[dict[str, Any]]) -> None:
    whole = {t.name: t.sha256 for t in of_one_piece().tensors}["backbone.second.0.weight"]
    assert len({whole, *(rank["naive"] for rank in ranks)}) == 1 + len(ranks)


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_makes_the_manifest_of_the_model_in_one_piece(
    ranks: list[dict[str, Any]], way: str
) -> None:
    expected = of_one_piece().to_json()
    for rank in ranks:
        assert rank[way] == [expected] * 3


def test_a_manifest_of_one_piece_verifies_and_restores_onto_shards(ranks: list[dict[str, Any]]) -> None:
    handle = freeze_backbone(network())
    for rank in ranks:
        assert rank["restored"] == (handle.frozen, handle.trainable, handle.manifest().to_json())
        assert rank["verified"] is True
        assert rank["undone"] == []


def test_a_manifest_of_shards_verifies_and_restores_onto_one_piece(ranks: list[dict[str, Any]]) -> None:
    made = Manifest.from_json(ranks[-1]["resharded"][0])
    model = network()
    made.verify(model)
    assert made.restore(model).frozen == freeze_backbone(network()).frozen
    with torch.no_grad():
        model.backbone.second[0].weight.view(-1)[0] += 1
    with pytest.raises(FreezekitError, match="frozen tensors have other values in the model"):
        made.verify(model)


def test_what_is_left_frozen_is_described(ranks: list[dict[str, Any]]) -> None:
    frozen = [name for name in of_one_piece().frozen if not name.startswith("backbone.second")]
    for rank in ranks:
        assert rank["part"] == frozen


def test_what_moved_on_one_rank_is_seen_by_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for said in rank["touched"]:
            assert said.startswith(
                "FSDPSequential: frozen tensors have other values in the model than when the manifest was "
                "made (got 1: 'backbone.first.0.weight')"
            )
        assert rank["left alone"] is False


def test_state_dicts_have_the_names_and_values_of_the_unfrozen_model(ranks: list[dict[str, Any]]) -> None:
    plain = network().state_dict()
    for rank in ranks:
        assert rank["names"] == [True, True]
        assert rank["values"] is True
        assert rank["same output"] is True
    names, whole = ranks[0]["whole"]
    assert names == list(plain)
    assert all(torch.equal(whole[name], plain[name]) for name in plain)
    nn.Module.load_state_dict(network(), whole, strict=True)
