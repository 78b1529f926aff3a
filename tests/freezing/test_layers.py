"""Layer groups, freezing by depth, and learning rates by depth."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torchvision
import zoo
from torch import nn

from freezekit import (
    FreezekitError,
    SelectionError,
    find_backbone,
    freeze,
    freeze_to,
    is_frozen,
    layer_groups,
    parameter_groups,
)


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(4))
    layers = OrderedDict(stem=nn.Linear(4, 4), body=nn.Sequential(*blocks), fc=nn.Linear(4, 2))
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


EXPECTED = {
    "resnet18": ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"],
    "mobilenet_v2": [*(f"features.{k}" for k in range(18)), "classifier"],
    "efficientnet_b0": [*(f"features.{k}" for k in range(8)), "classifier"],
    "convnext": [*(f"features.{k}" for k in range(4)), "classifier"],
    "vit": ["class_token", *(f"encoder.layers.encoder_layer_{k}" for k in range(2)), "heads"],
}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_groups_run_from_input_to_head(name: str) -> None:
    model = zoo.make(name)
    groups = layer_groups(model)
    assert [group[0] for group in groups] == EXPECTED[name]
    assert tuple(groups[-1]) == find_backbone(model).head
    for tensor in model.state_dict():
        homes = [g for g in groups if any(tensor == n or tensor.startswith(f"{n}.") for n in g)]
        assert len(homes) == 1, tensor


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vgg11_bn", 9),
        ("densenet121", 6),
        ("inception_v3", 17),
        ("squeezenet1_0", 10),
        ("shufflenet_v2_x0_5", 6),
    ],
)
def test_models_of_other_kinds(name: str, count: int) -> None:
    options = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **options)
    assert len(layer_groups(model)) == count


def test_blocks_are_looked_for_inside_containers() -> None:
    vit = torchvision.models.VisionTransformer(32, 8, 5, 2, 32, 64)
    first, *layers, last, head = layer_groups(vit)
    assert first == ["class_token", "encoder.pos_embedding", "conv_proj", "encoder.dropout"]
    assert layers == [[f"encoder.layers.encoder_layer_{k}"] for k in range(4)]
    assert (last, head) == (["encoder.layers.encoder_layer_4", "encoder.ln"], ["heads"])


def test_few_of_a_class_or_small_ones_are_no_blocks() -> None:
    def blocks() -> nn.Sequential:
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)))

    model = nn.Sequential(OrderedDict(stem=nn.Sequential(nn.Linear(4, 4)), body=blocks(), fc=nn.Linear(4, 2)))
    assert layer_groups(model) == [["stem"], ["body.0"], ["body.1"], ["body.2"], ["fc"]]
    ends = {name: nn.Linear(4, 4) for name in ("conv1", "conv2", "conv3")}
    model = nn.Sequential(OrderedDict(**ends, body=blocks(), fc=nn.Linear(4, 2)))
    groups = [["conv1", "conv2", "conv3"], ["body.0"], ["body.1"], ["body.2"], ["fc"]]
    assert layer_groups(model, head="fc") == groups


def test_what_is_smaller_than_a_block_goes_with_the_one_before() -> None:
    model = tower()
    assert layer_groups(model) == [["stem"], *([f"body.{k}"] for k in range(4)), ["fc"]]
    plain = nn.Sequential(
        OrderedDict(
            bn0=nn.BatchNorm1d(4),
            layer1=nn.Linear(4, 4),
            bn1=nn.BatchNorm1d(4),
            layer2=nn.Linear(4, 4),
            bn2=nn.BatchNorm1d(4),
            act=nn.ReLU(),
            fc=nn.Linear(4, 4),
        )
    )
    assert layer_groups(plain) == [["bn0", "layer1", "bn1"], ["layer2", "bn2"], ["act", "fc"]]
    assert layer_groups(plain, head=["layer2", "bn2", "act", "fc"])[0] == ["bn0", "layer1", "bn1"]
    with pytest.raises(SelectionError, match="cannot tell the head"):
        layer_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("n", "training"), [(-1, 1), (5, 1), (-2, 2), (4, 2), (1, 5), (-5, 5), (0, 6), (-6, 6)]
)
def test_freeze_to_freezes_the_first_groups(n: int, training: int) -> None:
    model = tower()
    handle = freeze_to(model, n)
    names = ["stem", *(f"body.{k}" for k in range(4)), "fc"]
    assert [is_frozen(model, name) for name in names] == [True] * (6 - training) + [False] * training
    assert handle.selection.rule == f"the first {6 - training} of 6 layer groups"
    handle.undo()
    assert not any(is_frozen(model, name) for name in names)


@pytest.mark.parametrize("n", [6, -7, 1.0, True, "fc"])
def test_there_is_no_such_group(n: Any) -> None:
    with pytest.raises(SelectionError, match="n: Sequential has 6 layer groups.*a number from -6 to 5"):
        freeze_to(tower(), n)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_called_again_it_moves_the_border(copied: Any) -> None:
    model = tower().eval()
    other = freeze(model, ["body.3", "body.0.1"])
    first = freeze_to(model, -1)
    model.train()
    model = copied(model)
    second = freeze_to(model, 2)
    assert [is_frozen(model, f"body.{k}") for k in range(4)] == [True, False, False, True]
    assert model.body[1][1].training
    assert model.body[1][0].weight.requires_grad
    if first.model is model:
        assert first.frozen == []
        first.undo()  # it has ended
        assert is_frozen(model, "stem")
        second.undo()
        assert not is_frozen(model, "stem")
        assert other.frozen == [n for n in model.state_dict() if n.startswith(("body.0.1.", "body.3"))]
    freeze_to(model, 0)
    assert is_frozen(model, "body.3")


def test_a_border_that_cannot_be_leaves_the_one_before() -> None:
    model = tower()
    model.body[2][0].weight = model.body[1][0].weight
    freeze_to(model, 1)
    with pytest.raises(SelectionError, match="share a parameter"):
        freeze_to(model, 3)
    assert is_frozen(model, "stem")
    assert not is_frozen(model, "body.0")
    handle = freeze_to(model, 4)
    nn.utils.parametrizations.weight_norm(model.body[1][1])
    with pytest.raises(FreezekitError, match="body.1.1: the class of this layer was changed"):
        freeze_to(model, 1)
    assert is_frozen(model, "body.2")
    nn.utils.parametrize.remove_parametrizations(model.body[1][1], "weight")
    handle.undo()
    assert not is_frozen(model, "stem")  # nothing is left of the one that failed


def test_a_moving_border_takes_the_optimizer_along() -> None:
    model = tower()
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.1))
    x = torch.randn(8, 4)
    zoo.train(model, optimizer, x)
    who = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    states = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
    for n in (-1, 2, -2, 4, 1, 3):
        freeze_to(model, n, optimizer=optimizer)
        trains = [key for p in model.parameters() if p.requires_grad for key in [id(p)]]
        assert [key for group in optimizer.param_groups for key in map(id, group["params"])] == trains
        assert {id(p) for p in optimizer.state} == set(trains)
    freeze_to(model, 0)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == who
    assert all(torch.equal(states[id(p)], state["exp_avg"]) for p, state in optimizer.state.items())


def test_rates_fall_with_depth_and_every_parameter_is_in_one_group() -> None:
    model = tower()
    model.body[3][0].weight = model.body[1][0].weight  # counted where it is first
    groups = parameter_groups(model, lr=0.8, decay=0.5)
    assert [group["lr"] for group in groups] == [0.025, 0.05, 0.1, 0.2, 0.4, 0.8]
    assert [len(group["params"]) for group in groups] == [2, 4, 4, 4, 3, 2]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    assert parameter_groups(model, 2.6)[-2]["lr"] == pytest.approx(1.0)  # ULMFiT's
    optimizer = torch.optim.AdamW(groups)
    before = zoo.snapshot(model)
    zoo.train(model, optimizer, torch.randn(8, 4), steps=1)
    after = zoo.snapshot(model)
    assert not any(after[name] == before[name] for name, _ in model.named_parameters())


def test_frozen_parameters_are_left_out_and_their_groups_stay() -> None:
    model = tower()
    freeze_to(model, -2)
    groups = parameter_groups(model, lr=1.0)
    assert [len(group["params"]) for group in groups] == [0, 0, 0, 0, 4, 2]
    torch.optim.SGD(groups).step()
    for arguments, text in (((-1.0,), "lr=: not a finite"), ((1.0, float("nan")), "decay=: not a finite")):
        with pytest.raises(FreezekitError, match=text):
            parameter_groups(model, *arguments)


def test_groups_do_not_depend_on_what_is_frozen() -> None:
    model = torchvision.models.resnet18()
    groups = layer_groups(model)
    for n in (-2, 3, 0):
        freeze_to(model, n)
        assert layer_groups(model) == groups
