"""convert_batchnorm: only the class changes."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

import freezekit
from freezekit import FreezekitError, convert_batchnorm


class Subclass(nn.BatchNorm2d):
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
    model.extra = nn.ModuleList([Subclass(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2)])
    modules, parameters = [*model.modules()], [*model.parameters()]
    kept = [type(m) for m in model.extra]
    assert convert_batchnorm(convert_batchnorm(model)) is model
    assert [type(m) for m in model.extra] == kept
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert sum(type(m) is freezekit.nn.BatchNorm2d for m in modules) == 20


def test_refusals() -> None:
    model = zoo.make("resnet18")
    with pytest.raises(FreezekitError, match=r"to=: there is nothing .*got 'keras'.*\"freezekit\" or"):
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
