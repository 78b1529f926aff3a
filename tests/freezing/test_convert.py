"""convert_batchnorm: only the class changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import freezekit
from freezekit import FreezekitError, convert_batchnorm


class Subclass(nn.BatchNorm2d):
    pass


def watch(*_: Any) -> None:
    pass


@pytest.mark.parametrize("rank", ["1d", "2d", "3d"])
def test_there_and_back(rank: str) -> None:
    theirs, ours = getattr(nn, f"BatchNorm{rank}"), getattr(freezekit.nn, f"BatchNorm{rank}")
    layer = zoo.scramble(theirs(3, momentum=None, eps=0.1)).eval()
    layer.register_forward_hook(lambda *_: None)
    layer.weight.requires_grad_(False)
    state, bits = dict(layer.__dict__), zoo.snapshot(layer)
    assert convert_batchnorm(layer) is layer
    assert type(layer) is ours
    x = torch.randn(4, 3, *[2] * int(rank[0]))
    converted = layer(x)
    assert convert_batchnorm(layer, to="torch") is layer
    assert type(layer) is theirs
    assert {k: id(v) for k, v in layer.__dict__.items()} == {k: id(v) for k, v in state.items()}
    assert zoo.snapshot(layer) == bits
    torch.testing.assert_close(converted, layer(x))


def test_a_model() -> None:
    model = zoo.make("resnet18")
    model.extra = nn.ModuleList([Subclass(2), nn.InstanceNorm2d(2)])
    modules, parameters = [*model.modules()], [*model.parameters()]
    kept = [type(m) for m in model.extra]
    assert convert_batchnorm(convert_batchnorm(model)) is model
    assert [type(m) for m in model.extra] == kept
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert sum(type(m) is freezekit.nn.BatchNorm2d for m in modules) == 20


def test_refusals() -> None:
    model = zoo.make("resnet18")
    with pytest.raises(
        FreezekitError, match=r"to=: there is nothing .*got 'keras'.*\"freezekit\", \"torch\" or"
    ):
        convert_batchnorm(model, to="keras")
    with pytest.raises(FreezekitError, match="not a model"):
        convert_batchnorm({})  # type: ignore[arg-type]
    handle = freezekit.freeze(model, "layer4", convert="fold")
    with pytest.raises(FreezekitError, match=r"layer4.0.bn1: a frozen BN .*before freezing"):
        convert_batchnorm(model)
    assert type(model.bn1) is nn.BatchNorm2d
    handle.undo()
    convert_batchnorm(model)
    assert type(model.layer4[0].bn1) is freezekit.nn.BatchNorm2d


# --- Synchronised


@pytest.mark.parametrize("rank", ["1d", "2d", "3d"])
@pytest.mark.parametrize("home", [nn, freezekit.nn], ids=["torch", "freezekit"])
def test_to_sync_and_back(rank: str, home: Any) -> None:
    layer = zoo.scramble(getattr(home, f"BatchNorm{rank}")(3, momentum=None, eps=0.1)).eval()
    layer.register_forward_hook(watch)
    layer.weight.requires_grad_(False)
    state, bits = dict(layer.__dict__), zoo.snapshot(layer)
    for to, back in (("freezekit", freezekit.nn), ("torch", nn)):
        assert convert_batchnorm(layer, to="sync", process_group="all") is layer
        assert convert_batchnorm(layer, to="sync", process_group="other") is layer
        assert (type(layer), layer.process_group) == (freezekit.nn.SyncBatchNorm, "all")
        assert zoo.snapshot(layer) == bits
        assert type(copy.deepcopy(layer)) is type(layer)
        convert_batchnorm(pickle.loads(pickle.dumps(layer)), to=to)
        convert_batchnorm(layer, to=to)
        assert type(layer) is getattr(back, f"BatchNorm{rank}")
        assert {k: id(v) for k, v in layer.__dict__.items()} == {k: id(v) for k, v in state.items()}
        assert zoo.snapshot(layer) == bits


def test_what_was_constructed_synchronised_stays_so_or_becomes_what_the_caller_says() -> None:
    layer = nn.SyncBatchNorm(3, process_group="all")
    assert type(convert_batchnorm(layer)) is freezekit.nn.SyncBatchNorm
    assert type(convert_batchnorm(layer, to="sync")) is freezekit.nn.SyncBatchNorm
    assert type(convert_batchnorm(layer, to="torch")) is nn.SyncBatchNorm
    assert layer.process_group == "all"
    assert type(convert_batchnorm(layer, rank=2)) is freezekit.nn.BatchNorm2d
    assert vars(layer).keys() == vars(nn.BatchNorm2d(3)).keys()
    convert_batchnorm(layer, to="sync")
    assert type(convert_batchnorm(layer, to="torch", rank=3)) is nn.BatchNorm2d  # as it was, not as asked


def test_arguments_that_do_not_fit() -> None:
    for arguments, message in (
        ({"process_group": "all"}, r"process_group=: .*synchronised layers only \(got to='freezekit'\)"),
        ({"to": "sync", "rank": 2}, r"rank=: .* \(got 2 with to='sync'\)"),
        ({"rank": 4}, r"rank=: .* \(got 4 with to='freezekit'\)"),
    ):
        with pytest.raises(FreezekitError, match=message):
            convert_batchnorm(nn.BatchNorm2d(3), **arguments)


def norms(model: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in model.modules() if "Norm" in type(m).__name__]


def test_convert_then_freeze_then_back() -> None:
    model = zoo.make("resnet18").train()
    bits = zoo.snapshot(model)
    convert_batchnorm(model, to="sync")
    handle = freezekit.freeze(model, "layer1", hold="norm")
    assert isinstance(model.layer1[0].bn1, freezekit.nn.FrozenSyncBatchNorm)
    assert issubclass(freezekit.nn.SyncBatchNorm, type(model.bn1))
    with pytest.raises(FreezekitError, match=r"layer1.0.bn1: a frozen BN .*before freezing"):
        convert_batchnorm(model, to="torch")
    handle.undo()
    assert norms(model) == [freezekit.nn.SyncBatchNorm] * 20
    convert_batchnorm(model, to="torch")
    assert norms(model) == [nn.BatchNorm2d] * 20
    assert zoo.snapshot(model) == bits


def test_freeze_then_convert_leaves_what_is_frozen() -> None:
    model = zoo.make("resnet18").train()
    x = torch.randn(2, 64, 8, 8)
    handle = freezekit.freeze(model, "layer1")
    frozen, output = norms(model.layer1), model.layer1(x)
    convert_batchnorm(model, to="sync")
    assert norms(model.layer1) == frozen == [freezekit.nn.FrozenBatchNorm2d] * 4
    assert torch.equal(model.layer1(x), output)
    assert norms(model) == [freezekit.nn.SyncBatchNorm] + frozen + [freezekit.nn.SyncBatchNorm] * 15
    handle.undo()
    assert norms(model.layer1) == [nn.BatchNorm2d] * 4
    convert_batchnorm(model, to="sync")
    assert norms(model) == [freezekit.nn.SyncBatchNorm] * 20
