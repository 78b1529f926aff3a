"""Gradual unfreezing: epochs, groups, learning rates, and what a resumed run finds."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch.optim import lr_scheduler

from freezekit import (
    FreezekitError,
    SelectionError,
    UnfreezeSchedule,
    freeze,
    freeze_backbone,
    freeze_to,
    is_frozen,
    parameter_groups,
    trainable_parameters,
    unfreeze,
)

STAGES = {2: "layer3", 4: ["layer2", "layer2_bn"], 6: "*"}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name in ("layer1", "layer2", "layer3"):
        layers[name] = nn.Linear(4, 4)
        layers[f"{name}_bn"] = nn.BatchNorm1d(4)
    layers["fc"] = nn.Linear(4, 2)
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def data() -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


def names_in(model: nn.Module, optimizer: Any) -> list[list[str]]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def groups_made_ahead() -> tuple[nn.Sequential, Any, UnfreezeSchedule]:
    """The optimizer has the head alone: each stage has a group that waits."""
    model = net()
    freeze_backbone(model)
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.1)
    return model, optimizer, UnfreezeSchedule(model, optimizer, STAGES, decay=0.5)


def groups_of_depth() -> tuple[nn.Sequential, Any, UnfreezeSchedule]:
    """The optimizer has all of the model: what is unfrozen goes home."""
    model = net()
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.1, decay=0.5), lr=0.1)
    freeze_to(model, -1, optimizer=optimizer)
    return model, optimizer, UnfreezeSchedule(model, optimizer, STAGES)


SETUPS = [groups_made_ahead, groups_of_depth]
Setup = Callable[[], tuple[nn.Sequential, Any, UnfreezeSchedule]]


def test_what_is_due_begins_to_train() -> None:
    model, optimizer, schedule = groups_made_ahead()
    assert names_in(model, optimizer) == [["fc.weight", "fc.bias"], [], [], []]
    done = {epoch: schedule.step(epoch) for epoch in range(7)}
    rest = [
        "layer1.weight",
        "layer1.bias",
        "layer1_bn.weight",
        "layer1_bn.bias",
        "layer3_bn.weight",
        "layer3_bn.bias",
    ]
    assert {epoch: names for epoch, names in done.items() if names} == {
        2: ["layer3.weight", "layer3.bias"],
        4: ["layer2.weight", "layer2.bias", "layer2_bn.weight", "layer2_bn.bias"],
        6: rest,
    }
    assert names_in(model, optimizer) == [["fc.weight", "fc.bias"], done[2], done[4], rest]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05, 0.025, 0.0125]
    before = zoo.snapshot(model)
    zoo.train(model, optimizer, data())
    after = zoo.snapshot(model)
    assert not any(before[name] == after[name] for name in after)


def test_parameters_that_have_a_home_go_there() -> None:
    model, optimizer, schedule = groups_of_depth()
    homes = [
        ["layer1.weight", "layer1.bias", "layer1_bn.weight", "layer1_bn.bias"],
        ["layer2.weight", "layer2.bias"],
    ]
    assert names_in(model, optimizer) == [[], [], [], ["fc.weight", "fc.bias"]]
    schedule.step(6)
    now = names_in(model, optimizer)
    assert now[0] == homes[0]
    assert now[1][:2] == homes[1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0125, 0.025, 0.05, 0.1]


@pytest.mark.parametrize("setup", SETUPS)
def test_any_epoch_will_do(setup: Setup) -> None:
    model, optimizer, schedule = setup()
    for epoch in range(5):
        schedule.step(epoch)
        schedule.step(epoch)
    assert schedule.step(1) == []
    jumped_model, jumped, other = setup()
    assert len(other.step(5)) == 6
    assert other.step(5) == []
    assert names_in(jumped_model, jumped) == names_in(model, optimizer)
    freeze(model, "layer3", optimizer=optimizer)
    schedule.step(5)
    assert is_frozen(model, "layer3")  # a stage is over once it was due
    assert not is_frozen(jumped_model, "layer3")


def test_a_stage_that_someone_has_unfrozen_before_is_no_error() -> None:
    model, optimizer, schedule = groups_made_ahead()
    unfreeze(model, "layer3.weight")
    assert schedule.step(2) == ["layer3.bias"]
    unfreeze(model)
    assert schedule.step(9) == []
    assert names_in(model, optimizer)[1:] == [["layer3.bias"], [], []]


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        (
            {2: "layer3", 5: "layer2.wieght"},
            "epoch 5: no frozen layer or parameter matches .*did you mean 'layer2.weight'",
        ),
        (
            {3: ["layer3", "fc"]},
            "epoch 3: no frozen layer or parameter matches .got 'fc'.. Remedy: leave it out",
        ),
        ({1: "*", 4: "layer2"}, "epoch 4: nothing is left to unfreeze .got 'layer2'"),
        ({-1: "layer3"}, "stages: not an epoch .got -1"),
        ({"2": "layer3"}, "stages: not an epoch .got '2'"),
        ({True: "layer3"}, "stages: not an epoch .got True"),
    ],
)
def test_a_stage_that_cannot_be_is_found_out_at_once(stages: Any, text: str) -> None:
    model = net()
    freeze_backbone(model)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    with pytest.raises(FreezekitError, match=text):
        UnfreezeSchedule(model, optimizer, stages)
    assert len(optimizer.param_groups) == 1


def test_arguments_that_cannot_be_are_refused() -> None:
    model, optimizer, schedule = groups_of_depth()
    head = trainable_parameters(model)
    scheduled = torch.optim.SGD(head, lr=0.1)
    lr_scheduler.StepLR(scheduled, 1)
    for given, options, text in (
        (optimizer, {"lr": 0.1}, "lr=, decay=, growth=: no stage needs a group of its own"),
        (optimizer, {"decay": 0.1}, "lr=, decay=, growth=: no stage needs a group of its own"),
        (optimizer, {"bn": "hold"}, "bn=: no such choice .got 'hold'"),
        (optimizer, {"decay": -1}, "decay=: not a finite number"),
        (scheduled, {}, "a learning-rate scheduler was made on this optimizer.*before the scheduler"),
        (torch.optim.LBFGS(head), {}, "LBFGS has one group only"),
        ("adam", {}, "optimizer=: not an optimizer .got str"),
        (None, {}, "optimizer: no optimizer"),
    ):
        with pytest.raises(FreezekitError, match=text):
            UnfreezeSchedule(model, given, STAGES, **options)  # type: ignore[arg-type]
    with pytest.raises(FreezekitError, match="not a model"):
        UnfreezeSchedule(optimizer, optimizer, STAGES)
    with pytest.raises(SelectionError, match="epoch 1: nothing in the model is frozen"):
        UnfreezeSchedule(net(), optimizer, {1: "layer1"})
    for epoch in (-1, 1.0, True):
        with pytest.raises(FreezekitError, match="epoch: not an epoch"):
            schedule.step(epoch)  # type: ignore[arg-type]


def test_rates() -> None:
    def rates(**options: Any) -> list[float]:
        model = net()
        freeze_backbone(model)
        optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.8)
        UnfreezeSchedule(model, optimizer, STAGES, **options)
        return [group["lr"] for group in optimizer.param_groups]

    assert rates() == [0.8] * 4
    assert rates(lr=0.1) == [0.8, 0.1, 0.1, 0.1]
    assert rates(decay=0.5) == [0.8, 0.4, 0.2, 0.1]
    assert rates(lr=0.2, decay=0.5) == [0.8, 0.2, 0.1, 0.05]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 2), lr_scheduler.CosineAnnealingLR(o, 20)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_scales_all_groups_alike(name: str, setup: Setup) -> None:
    model, optimizer, schedule = setup()
    start = [group["lr"] for group in optimizer.param_groups]
    scheduler = SCHEDULERS[name](optimizer)
    factors = []
    for epoch in range(8):
        schedule.step(epoch)
        zoo.train(model, optimizer, data(), steps=1)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        now = [group["lr"] / first for group, first in zip(optimizer.param_groups, start, strict=True)]
        assert now == pytest.approx([now[0]] * len(now))
        factors.append(now[0])
    assert len(set(factors)) > 1
    if name != "ReduceLROnPlateau":
        assert [group["initial_lr"] for group in optimizer.param_groups] == start


@pytest.mark.parametrize("at", [1, 3, 4, 7])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_resumed_run_goes_on_bit_for_bit(setup: Setup, at: int) -> None:
    """Lightning's BackboneFinetuning freezes again what was unfrozen (Lightning#21901, #6891)."""

    def epoch(number: int, model: nn.Module, optimizer: Any, schedule: Any, scheduler: Any) -> None:
        schedule.step(number)
        zoo.train(model, optimizer, data(), steps=2)
        scheduler.step()

    run = (*setup(), None)
    run = (*run[:3], lr_scheduler.CosineAnnealingWarmRestarts(run[1], 5))
    file = io.BytesIO()
    for number in range(9):
        epoch(number, *run)
        if number == at:
            torch.save([part.state_dict() for part in run], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, optimizer, schedule = setup()
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5)
    if at >= 2:
        with pytest.raises((FreezekitError, ValueError), match=r"frozen when saved|doesn't match the size"):
            optimizer.load_state_dict(states[1])  # the schedule comes first
    model.load_state_dict(states[0])
    schedule.load_state_dict(states[2])
    optimizer.load_state_dict(states[1])
    scheduler.load_state_dict(states[3])
    for number in range(at + 1, 9):
        epoch(number, model, optimizer, schedule, scheduler)
    assert zoo.snapshot(model) == zoo.snapshot(run[0])
    assert names_in(model, optimizer) == names_in(run[0], run[1])
    assert schedule.epoch == 8


def test_a_state_of_other_stages_is_refused() -> None:
    _, _, schedule = groups_made_ahead()
    schedule.step(3)
    model = net()
    freeze_backbone(model)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    other = UnfreezeSchedule(model, optimizer, {2: "layer3", 4: "layer2"})
    with pytest.raises(FreezekitError, match=r"other stages .got epochs \[2, 4, 6\], here \[2, 4\]"):
        other.load_state_dict(schedule.state_dict())
    fresh = groups_made_ahead()[2]
    fresh.load_state_dict(groups_made_ahead()[2].state_dict())
    assert fresh.epoch == -1
    with pytest.raises(FreezekitError, match="not the state of an UnfreezeSchedule .got a state with 'st"):
        fresh.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("bn", ["freeze", "train"])
def test_bn_stays_asleep_when_asked_to(bn: str) -> None:
    """BackboneFinetuning(train_bn=False) wakes them all the same."""
    model = zoo.make("resnet18")
    freeze_backbone(model)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.01)
    schedule = UnfreezeSchedule(model, optimizer, {1: ["layer4", "layer3.1"]}, bn=bn)
    names = schedule.step(1)
    kept = bn == "freeze"
    assert any("bn" in name for name in names) != kept
    before = zoo.snapshot(model)
    zoo.train(model, optimizer, zoo.images("resnet18"))
    after = zoo.snapshot(model)
    moved = {name for name in after if after[name] != before[name]}
    assert {"layer4.0.conv1.weight", "layer4.0.downsample.0.weight", "layer3.1.conv2.weight"} <= moved
    assert any(".bn" in name or "running" in name for name in moved) != kept
    assert model.layer4[1].training
    assert not model.layer3[0].training


def test_names_of_parameters_go_into_the_groups() -> None:
    model = net()
    freeze_backbone(model)
    optimizer = torch.optim.SGD(model.fc.named_parameters(), lr=0.1)
    UnfreezeSchedule(model, optimizer, STAGES).step(6)
    assert [group["param_names"] for group in optimizer.param_groups][1] == ["layer3.weight", "layer3.bias"]
    assert [len(group["param_names"]) for group in optimizer.param_groups] == [2, 2, 4, 6]


def test_what_has_lost_its_home_gets_a_group() -> None:
    model, optimizer, schedule = groups_of_depth()
    unfreeze(model, "layer3")
    gone = {id(p) for p in model.layer3.parameters()}
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]
    freeze(model, "layer3")
    assert schedule.step(2) == ["layer3.weight", "layer3.bias"]
    assert names_in(model, optimizer)[-1] == ["layer3.weight", "layer3.bias"]


@pytest.mark.parametrize("tensor", [False, True])
def test_rates_grow_until_they_are_those_of_the_head(tensor: bool) -> None:
    model = net()
    freeze_backbone(model)
    rate = torch.tensor(1.0) if tensor else 1.0
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=rate)
    seen: list[int] = []

    def growth(epoch: int) -> float:
        seen.append(epoch)
        return 2.0

    schedule = UnfreezeSchedule(model, optimizer, {1: "layer3", 3: "layer2"}, decay=0.2, growth=growth)
    rates = []
    for epoch in range(7):
        schedule.step(epoch)
        schedule.step(epoch)  # again is once
        rates.append([pytest.approx(float(group["lr"])) for group in optimizer.param_groups])
    assert rates == [
        [1.0, 0.2, 0.04], [1.0, 0.2, 0.04], [1.0, 0.4, 0.04], [1.0, 0.8, 0.04],
        [1.0, 1.0, 0.08], [1.0, 1.0, 0.16], [1.0, 1.0, 0.32],
    ]  # fmt: skip
    assert seen == [2, 3, 4, 4, 5, 5, 6, 6]
    assert isinstance(optimizer.param_groups[1]["lr"], torch.Tensor) is tensor


def test_an_aligned_rate_follows_that_of_the_head_down_and_another_does_not() -> None:
    rates = {}
    for align in (True, False):
        model = net()
        freeze_backbone(model)
        optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
        schedule = UnfreezeSchedule(model, optimizer, {0: "layer3"}, lr=0.5, growth=4.0, align=align)
        schedule.step(0)
        schedule.step(1)
        optimizer.param_groups[0]["lr"] = 0.1
        schedule.step(2)
        rates[align] = optimizer.param_groups[1]["lr"]
    assert rates == {True: 0.1, False: 8.0}


def test_growth_in_a_resumed_run_is_that_of_the_whole_run() -> None:
    def start() -> tuple[nn.Sequential, torch.optim.Optimizer, UnfreezeSchedule]:
        model = net()
        freeze_backbone(model)
        optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
        return model, optimizer, UnfreezeSchedule(model, optimizer, {1: "layer3"}, lr=0.01, growth=1.5)

    _, whole, schedule = start()
    for epoch in range(4):
        schedule.step(epoch)
    saved = (schedule.state_dict(), copy.deepcopy(whole.state_dict()))
    schedule.step(4)
    _, resumed, schedule = start()
    schedule.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    schedule.step(4)
    assert resumed.param_groups[1]["lr"] == whole.param_groups[1]["lr"]


def test_growth_that_is_no_factor_is_refused() -> None:
    model = net()
    freeze_backbone(model)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
    with pytest.raises(FreezekitError, match=r"growth=: not a finite number"):
        UnfreezeSchedule(model, optimizer, {1: "layer3"}, growth=-1.0)
    schedule = UnfreezeSchedule(model, optimizer, {1: "layer3"}, growth=lambda epoch: float("nan"))
    with pytest.raises(FreezekitError, match=r"growth=: not a finite number"):
        schedule.step(2)


def test_growth_without_a_group_of_its_own_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    freeze_backbone(model, optimizer=optimizer)
    with pytest.raises(FreezekitError, match="growth=2.0"):
        UnfreezeSchedule(model, optimizer, {1: "layer3"}, growth=2.0)


def test_without_stages_nothing_is_due() -> None:
    model = net()
    handle = freeze_backbone(model)
    schedule = UnfreezeSchedule(model, torch.optim.SGD(trainable_parameters(model), lr=1.0), {})
    assert schedule.step(10**12) == []
    assert schedule.epoch == 10**12
    assert len(handle.frozen) == 21
    again = UnfreezeSchedule(model, torch.optim.SGD(trainable_parameters(model), lr=1.0), {})
    again.load_state_dict(schedule.state_dict())
    assert again.epoch == 10**12
