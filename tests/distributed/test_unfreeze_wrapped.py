"""Freezing and unfreezing around wrappers: right on every rank, or refused by the wrapper; never silent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import SHARDS
from ranks import run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import freezekit
from freezekit import FreezekitError, UnfreezeSchedule, freeze, freeze_to, trainable_parameters, unfreeze
from freezekit.freezing import distributed

Grads = dict[str, Tensor]

REMEDY = (
    "Remedy: wrap the model anew after freezing or unfreezing, on every rank: "
    "ddp = DistributedDataParallel(ddp.module)"
)
UNFROZEN = (
    "DistributedDataParallel: it would not synchronise what was unfrozen since it was made "
    f"(got 2 parameters, from '1.0.weight'). {REMEDY}"
)
FROZEN = (
    "DistributedDataParallel: it would wait for gradients of what was frozen since it was made "
    f"(got 2 parameters, from '1.0.weight'). {REMEDY}"
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU())
    model = nn.Sequential(stem, nn.Sequential(nn.Linear(7, 5), nn.Tanh()), nn.Linear(5, 3))
    stem[1].running_mean.normal_()
    stem[1].running_var.uniform_(0.5, 2)
    return model.double()


def batch(rank: int) -> Tensor:
    return torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(100 + rank))


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def gradients(model: nn.Module) -> Grads:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: distributed.full(grad).clone() for name, grad in found.items()}


def joined(world_size: int, frozen: str) -> Grads:
    """What one process computes of the batches of all."""
    model = network()
    freeze(model, frozen)
    backward(model, torch.cat([batch(rank) for rank in range(world_size)]))
    return gradients(model)


def refusal(model: nn.Module, x: Tensor) -> str:
    try:
        backward(model, x)
    except FreezekitError as error:
        return str(error)
    return "silent"


class Ours(DistributedDataParallel):
    """A wrapper of somebody's own."""


def wrapped(kind: type[DistributedDataParallel] = DistributedDataParallel) -> tuple[Any, Any, Any]:
    model = network()
    handle = freeze(model, ["0", "1"])
    return model, handle, kind(model)


# -- what each rank does under DistributedDataParallel -------------------------------------------------------


def by_hand(x: Tensor) -> Grads:
    model = network()
    for parameter in (*model[0].parameters(), *model[1].parameters()):
        parameter.requires_grad_(False)
    model[0].eval()
    ddp = DistributedDataParallel(model)
    for parameter in model[1].parameters():
        parameter.requires_grad_(True)
    backward(ddp, x)
    return gradients(model)


def by_unfreeze(x: Tensor) -> str:
    model, _, ddp = wrapped()
    backward(ddp, x)
    unfreeze(model, "1")
    return refusal(ddp, x)


def by_method(x: Tensor) -> str:
    _, handle, ddp = wrapped(Ours)
    handle.unfreeze("1")
    return refusal(ddp, x)


def by_undo(x: Tensor) -> str:
    model = network()
    freeze(model, "0")
    handle = freeze(model, "1")
    ddp = DistributedDataParallel(model)
    handle.undo()
    return refusal(ddp, x)


def by_leaving(x: Tensor) -> str:
    model = network()
    freeze(model, "0")
    with freeze(model, "1"):
        ddp = DistributedDataParallel(model)
        backward(ddp, x)
    return refusal(ddp, x)


def by_schedule(x: Tensor) -> str:
    model, _, ddp = wrapped()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    schedule = UnfreezeSchedule(model, optimizer, {1: "1"})
    schedule.step(0)
    backward(ddp, x)
    schedule.step(1)
    return refusal(ddp, x)


def by_moving_the_border(x: Tensor) -> str:
    model = network()
    freeze_to(model, 2, head="2")
    ddp = DistributedDataParallel(model)
    freeze_to(model, 1, head="2")
    return refusal(ddp, x)


def by_hand_and_unfreeze(x: Tensor) -> str:
    model, _, ddp = wrapped()
    for parameter in model[1].parameters():
        parameter.requires_grad_(True)
    unfreeze(model, "1")
    return refusal(ddp, x)


def of_a_part(x: Tensor) -> str:
    model, _, ddp = wrapped()
    unfreeze(model[1], "*")
    return refusal(ddp, x)


def copied(x: Tensor) -> str:
    model, _, ddp = wrapped()
    unfreeze(model, "1")
    return refusal(pickle.loads(pickle.dumps(ddp)), x)


def frozen_later(x: Tensor) -> str:
    model = network()
    freeze(model, "0")
    ddp = DistributedDataParallel(model)
    freeze(model, "1")
    return refusal(ddp, x)


REFUSED: dict[str, Callable[[Tensor], str]] = {
    function.__name__: function
    for function in (
        by_unfreeze, by_method, by_undo, by_leaving, by_schedule, by_moving_the_border, by_hand_and_unfreeze,
        of_a_part, copied, frozen_later,
    )
}  # fmt: skip


def wrapped_anew(x: Tensor) -> Grads:
    model, _, ddp = wrapped()
    backward(ddp, x)
    unfreeze(model, "1")
    anew = DistributedDataParallel(ddp.module)  # with the old one alive
    backward(anew, x)
    return gradients(model)


def scheduled(x: Tensor) -> Grads:
    model, _, ddp = wrapped()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.0)
    schedule = UnfreezeSchedule(model, optimizer, {1: "1"})
    for epoch in range(3):
        if schedule.step(epoch):
            ddp = DistributedDataParallel(model)
        backward(ddp, x)
        optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    return gradients(model)


def frozen_and_back(x: Tensor) -> Grads:
    model = network()
    freeze(model, "0")
    ddp = DistributedDataParallel(model)
    with freeze(model, "1"):
        assert refusal(ddp, x) == FROZEN
    backward(ddp, x)
    return gradients(model)


def failed(x: Tensor) -> Grads:
    model = network()
    freeze(model, "0")
    ddp = DistributedDataParallel(model)
    with pytest.raises(FreezekitError, match="not an optimizer"):
        freeze(model, "1", optimizer=3)

    class Stubborn:
        param_groups, state = 3, 3

    with pytest.raises(TypeError, match="not iterable"):  # when all is frozen, and thawed again
        freeze(model, "1", optimizer=Stubborn())
    backward(ddp, x)
    return gradients(model)


def ignored(x: Tensor) -> Grads:
    model, _, _ = wrapped()
    model._ddp_params_and_buffers_to_ignore = ["1.0.weight", "1.0.bias"]
    ddp = DistributedDataParallel(model)
    unfreeze(model, "1")
    backward(ddp, x)
    return {name: grad for name, grad in gradients(model).items() if name.startswith("2.")}


RIGHT: dict[str, Callable[[Tensor], Grads]] = {
    function.__name__: function for function in (wrapped_anew, scheduled, frozen_and_back, failed, ignored)
}


def looked_at(x: Tensor) -> tuple[bool, bool]:
    model, handle, ddp = wrapped()
    handle.undo()
    with torch.no_grad():
        same = torch.equal(ddp.eval()(x), network().eval()(x))
    return same, copy.deepcopy(model)[1][0].weight.requires_grad


# -- and under fully_shard -----------------------------------------------------------------------------------

SHARDED = [
    (first, when, reshard)
    for first in ("freeze", "shard")
    for when in ("before a step", "after a step", "after a look")
    for reshard in (True, False)
    if SHARDS
]


def sharded(x: Tensor, first: str, when: str, reshard: bool) -> dict[str, Any]:
    model = network()
    plain = [type(module) for module in model.modules()]
    if first == "freeze":
        handle = freeze(model, ["0", "1"])
    for part in (*model, model):
        fully_shard(part, reshard_after_forward=reshard)
    if first == "shard":
        fronted = [type(module) for module in model.modules()]
        handle = freeze(model, ["0", "1"])
    if when == "after a step":
        backward(model, x)
    elif when == "after a look":
        with torch.no_grad():
            model(x)
    before = gradients(model)
    unfreeze(model, "1")
    backward(model, x)
    found = {"before": before, "some": gradients(model)}
    handle.undo()
    for module in model.modules():
        module.eval()
    backward(model, x)
    found["all"] = gradients(model)
    classes = [type(module) for module in model.modules()]
    if first == "shard":
        found["classes"] = classes == fronted
    else:
        bare = [c.__mro__[2] if c.__name__.startswith("FSDP") else c for c in classes]
        found["classes"] = bare == plain and sum(c.__name__.startswith("FSDP") for c in classes) == 4
    found["names"] = [cls.__name__ for cls in classes]
    found["slice"] = type(model[:1]).__name__
    return found


def work(rank: int) -> dict[str, Any]:
    x = batch(rank)
    found: dict[str, Any] = {name: case(x) for name, case in (REFUSED | RIGHT).items()}
    found |= {"by_hand": by_hand(x), "looked_at": looked_at(x)}
    return found | {case: sharded(x, *case) for case in SHARDED}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run(work, request.param)


def assert_joined(ranks: list[dict[str, Any]], found: list[Grads], frozen: str) -> None:
    expected = joined(len(ranks), frozen)
    for grads in found:
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-14)


def test_by_hand_the_ranks_train_what_is_unfrozen_each_by_itself(ranks: list[dict[str, Any]]) -> None:
    grads = [rank["by_hand"] for rank in ranks]
    expected = joined(len(ranks), "0")
    for other in grads[1:]:
        assert torch.equal(other["2.weight"], grads[0]["2.weight"])
        assert not torch.equal(other["1.0.weight"], grads[0]["1.0.weight"])
        assert not torch.allclose(other["1.0.weight"], expected["1.0.weight"], rtol=1e-3)


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrapper_that_does_not_know_what_trains_refuses_to_go_on(
    ranks: list[dict[str, Any]], case: str
) -> None:
    expected = FROZEN if case == "frozen_later" else UNFROZEN
    assert [rank[case] for rank in ranks] == [expected] * len(ranks)


@pytest.mark.parametrize("case", RIGHT)
def test_gradients_are_those_of_the_joined_batch(ranks: list[dict[str, Any]], case: str) -> None:
    if case == "ignored":
        expected = {n: g for n, g in joined(len(ranks), "0").items() if n.startswith("2.")}
        for rank in ranks:
            assert rank[case].keys() == expected.keys()
            torch.testing.assert_close(rank[case], expected, rtol=1e-12, atol=1e-14)
    else:
        assert_joined(ranks, [rank[case] for rank in ranks], "0")


def test_without_gradients_the_wrapper_serves_on_and_so_does_the_model(ranks: list[dict[str, Any]]) -> None:
    assert [rank["looked_at"] for rank in ranks] == [(True, True)] * len(ranks)


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_sharded_parts_are_unfrozen_right_on_every_rank(ranks: list[dict[str, Any]], case: Any) -> None:
    found = [rank[case] for rank in ranks]
    if case[1] == "after a step":
        assert_joined(ranks, [one["before"] for one in found], "[01]")
    assert_joined(ranks, [one["some"] for one in found], "0")
    model = network().eval()
    backward(model, torch.cat([batch(rank) for rank in range(len(ranks))]))
    for one in found:
        torch.testing.assert_close(one["all"], gradients(model), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_undo_leaves_what_fully_shard_made_of_the_classes(ranks: list[dict[str, Any]], case: Any) -> None:
    for rank in ranks:
        assert rank[case]["classes"], rank[case]["names"]
        assert rank[case]["names"][:3] == ["FSDPSequential", "FSDPSequential", "Linear"]
        assert rank[case]["slice"] == "Sequential"  # fully_shard's own way with a part of a container


def test_without_a_process_group_nothing_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_wrappers", lambda: pytest.fail("searched"))
    model = network()
    freeze(model, "0").undo()
    assert freezekit.is_frozen(model, "0") is False
