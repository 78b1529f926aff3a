"""Frozen parts under tensor parallelism, alone and together with fully_shard, frozen before and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from backbones import SHARDS, bits, gradients, loss, reshard, whole
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from freezekit import freeze, trainable_parameters, unfreeze

HEAD = {"fc.weight", "fc.bias"}
CASES = [(first, sharded) for first in ("freeze", "parallel") for sharded in (False, True)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in (
        ("up", nn.Linear(6, 8)), ("act", nn.GELU()), ("down", nn.Linear(8, 6)), ("norm", nn.LayerNorm(6)),
        ("drop", nn.Dropout(0.5)), ("fc", nn.Linear(6, 4)),
    ):  # fmt: skip
        model.add_module(name, layer)
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
    return model


def batch(row: int) -> Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(10 + row))


def froze(model: nn.Module) -> Any:
    return freeze(model, ["up", "act", "down", "norm", "drop"])


def case(first: str, sharded: bool, naive: bool = False) -> dict[str, Any]:
    """On a mesh of two by two, or of one by so many: rows have batches of their own, columns share them."""
    size = dist.get_world_size()
    rows = 2 if sharded else 1
    mesh = init_device_mesh("cpu", (rows, size // rows), mesh_dim_names=("dp", "tp"))
    row = mesh["dp"].get_local_rank() if sharded else 0
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "fc": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    model, handle = network(), None
    before = bits(model)
    if naive:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in HEAD)
    elif first == "freeze":
        handle = froze(model)
    parallelize_module(model, mesh["tp"], plan)
    if first == "parallel" and not naive:
        handle = froze(model)
    if sharded:
        fully_shard(model.up, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    x = batch(row)
    found: dict[str, Any] = {"trains": {n for n, p in model.named_parameters() if p.requires_grad}}
    with torch.no_grad():
        found["eval"] = whole(model.eval()(x))
        found["train"] = whole(model.train()(x))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.1)
    loss(model, x).backward()
    found["grads"] = set(gradients(model))
    optimizer.step()
    optimizer.zero_grad()
    found["moved"] = {name for name, was in bits(model).items() if before[name] != was}
    if handle is not None:
        found["manifest"] = handle.manifest().to_json()
        unfreeze(model, "down")
        found["some"] = {n for n, p in model.named_parameters() if p.requires_grad}
        handle.undo()
        loss(model.eval(), x).backward()
        reshard(model)
        found["all"] = gradients(model)
        found["state"] = {name: whole(t) for name, t in model.state_dict().items()}
        found["classes"] = [type(module).__name__.removeprefix("FSDP") for module in model.modules()]
    return found


def work(rank: int) -> dict[Any, Any]:
    cases = [each for each in CASES if SHARDS or not each[1]]
    if dist.get_world_size() == 2:
        cases = [each for each in cases if not each[1]]
    return {each: case(*each) for each in cases} | {"naive": case("freeze", False, naive=True)}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run(work, request.param)


def each(ranks: list[dict[Any, Any]]) -> list[tuple[bool, dict[str, Any]]]:
    found = [(key[1], one) for rank in ranks for key, one in rank.items() if key != "naive"]
    assert len(found) >= 2 * len(ranks)
    return found


def test_parallel_naive_freezing_leaves_dropout_alive(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert not torch.allclose(rank["naive"]["train"], rank["naive"]["eval"], rtol=1e-2)


def test_parallel_what_is_frozen_is_as_in_eval_mode_and_stays(ranks: list[dict[Any, Any]]) -> None:
    plain = network().eval()
    for sharded, found in each(ranks):
        assert torch.equal(found["train"], found["eval"])
        if not sharded:
            torch.testing.assert_close(found["eval"], plain(batch(0)).detach(), rtol=1e-5, atol=1e-6)
        assert found["trains"] == found["grads"] == found["moved"] == HEAD


def test_parallel_the_manifest_is_that_of_the_model_in_one_piece(ranks: list[dict[Any, Any]]) -> None:
    expected = froze(network()).manifest().to_json()
    for _, found in each(ranks):
        assert found["manifest"] == expected


def test_parallel_what_is_unfrozen_has_the_gradients_of_one_process(ranks: list[dict[Any, Any]]) -> None:
    for sharded, found in each(ranks):
        assert found["some"] == HEAD | {"down.weight", "down.bias"}
        plain = network().eval()
        plain.load_state_dict(found["state"])
        loss(plain, torch.cat([batch(0), batch(1)]) if sharded else batch(0)).backward()
        torch.testing.assert_close(found["all"], gradients(plain), rtol=1e-4, atol=1e-6)
        assert found["classes"] == [type(module).__name__ for module in plain.modules()]
