"""update_bn and AveragedModel, each against torch's own."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import swa_utils

import freezekit
from freezekit import AveragedModel, FreezekitError, freeze, is_frozen, unfreeze, update_bn
from freezekit.nn.held import Held


def bits(module: nn.Module) -> dict[str, bytes]:
    return zoo.snapshot(module)


def moved(before: dict[str, bytes], model: nn.Module) -> set[str]:
    after = bits(model)
    assert list(after) == list(before)
    return {name for name in after if after[name] != before[name]}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics_of(*layers: str) -> set[str]:
    return {f"{layer}.{name}" for layer in layers for name in STATISTICS}


def net() -> nn.Sequential:
    """Every kind of layer that a pass in train mode can move or make random."""
    layers = OrderedDict(
        conv=spectral_norm(nn.Conv2d(3, 4, 3)), bn1=nn.BatchNorm2d(4, momentum=0.3),
        inorm=nn.InstanceNorm2d(4, momentum=0.2, affine=True, track_running_stats=True), drop=nn.Dropout(0.4),
        bn2=nn.BatchNorm2d(4, momentum=None), own=freezekit.nn.BatchNorm2d(4, momentum=0.7),
        untracked=nn.BatchNorm2d(4, track_running_stats=False), flat=nn.Flatten(), fc=nn.Linear(4 * 36, 4),
        bn3=nn.BatchNorm1d(4, momentum=0.05),
    )  # fmt: skip
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def batches(count: int = 3, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, 8, 8, generator=generator) * (k + 1) + k for k in range(count)]


# -- update_bn: as torch's where nothing is frozen -----------------------------------------------------


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_it_has_the_bits_of_torch_on_real_models(name: str) -> None:
    ours, theirs = zoo.make(name).eval(), zoo.make(name).eval()
    loader = [zoo.images(name, seed=s) * s for s in (1, 2, 3)]
    before = bits(ours)
    torch.manual_seed(7)
    update_bn(loader, ours)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    swa_utils.update_bn(loader, theirs)
    assert bits(ours) == bits(theirs)
    assert torch.equal(state, torch.get_rng_state())  # dropout drew the same numbers
    assert (bits(ours) != before) == any("running_mean" in n for n in before)


def test_it_has_the_bits_of_torch_on_every_kind_of_layer() -> None:
    ours, theirs = net(), net()
    theirs.load_state_dict(ours.state_dict())
    for one, run in ((ours, update_bn), (theirs, swa_utils.update_bn)):
        torch.manual_seed(7)
        run(batches(), one)
    expected, got = bits(theirs), bits(ours)
    for name in statistics_of("bn1", "bn2", "own", "bn3"):
        assert got[name] == expected[name]
    assert [m.momentum for m in ours if hasattr(m, "momentum")] == [0.3, 0.2, None, 0.7, 0.1, 0.05]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=5),
    momentum=st.one_of(st.none(), st.floats(0.01, 0.99)),
    eval_mode=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_it_has_the_bits_of_torch_for_any_batches(
    sizes: list[int], momentum: float | None, eval_mode: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    ours = zoo.scramble(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU()))
    ours.train(not eval_mode)
    theirs = copy.deepcopy(ours)
    loader = [torch.randn(n, 3) * 3 for n in sizes]
    update_bn(loader, ours)
    swa_utils.update_bn(loader, theirs)
    assert bits(ours) == bits(theirs)
    assert int(ours[1].num_batches_tracked) == len(sizes)


def test_bn_in_eval_mode_or_without_gradients_is_not_frozen() -> None:
    model = net().requires_grad_(False).eval()  # as everyone's EMA copy is
    before = bits(model)
    update_bn(batches(), model)
    assert moved(before, model) == statistics_of("bn1", "bn2", "own", "bn3")


def test_it_recalibrates_an_averaged_model() -> None:
    averaged = AveragedModel(net())
    before = bits(averaged)
    update_bn(batches(), averaged)
    assert moved(before, averaged) == statistics_of(*(f"module.{n}" for n in ("bn1", "bn2", "own", "bn3")))


# -- update_bn: what is frozen, and everything else, stays ---------------------------------------------


def test_an_observer_that_has_seen_nothing_has_still_seen_nothing() -> None:
    observer = torch.ao.quantization.MovingAveragePerChannelMinMaxObserver(ch_axis=1)
    model = nn.Sequential(nn.BatchNorm2d(3), observer)
    update_bn(batches(), model)
    assert int(model[0].num_batches_tracked) == 3
    assert observer.min_val.numel() == 0


def test_bn_that_trains_inside_a_frozen_region_is_recalibrated() -> None:
    model = net()
    freeze(model, ["conv", "bn1", "own"], bn="train")
    before = bits(model)
    update_bn(batches(), model)
    assert moved(before, model) == statistics_of("bn1", "bn2", "own", "bn3")


@pytest.mark.parametrize("bn", ["freeze", "freeze_stats"])
@pytest.mark.parametrize("convert", [None, "affine"])
def test_what_is_frozen_stays(bn: str, convert: str | None) -> None:
    model = net()
    freeze(model, ["conv", "bn1", "own"], bn=bn, convert=convert)
    before = bits(model)
    update_bn(batches(), model)
    assert moved(before, model) == statistics_of("bn2", "bn3")


def test_live_bn_sees_what_frozen_layers_give_in_training() -> None:
    """The statistics are those of the features the live layers are trained on."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3))
    zoo.scramble(model)
    freeze(model, ["0", "1"])
    x = batches(1)[0]
    expected = model[0](x).mean((0, 2, 3))
    update_bn([x], model)
    torch.testing.assert_close(model[2].running_mean, expected)


def test_nothing_but_statistics_of_live_bn_changes() -> None:
    model, control = net(), net()
    before, before_control = bits(model), bits(control)
    update_bn(batches(), model)
    swa_utils.update_bn(batches(), control)
    others = {"inorm.running_mean", "inorm.running_var", "conv.parametrizations.weight.0._u"}
    assert others < moved(before_control, control)  # torch's function moves these
    assert moved(before, model) == statistics_of("bn1", "bn2", "own", "bn3")


class Buffers(nn.Module):
    """Changes its buffers in every way but the usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("seen", torch.tensor([]))
        self.register_buffer("grid", torch.arange(3.0).expand(4, 3))  # cannot be written to
        self.register_buffer("graph", torch.eye(3).to_sparse())
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.seen.resize_(2).fill_(x.mean())
        return x


def test_buffers_that_a_layer_replaces_or_resizes_are_put_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), Buffers())
    count, seen = model[1].count, model[1].seen
    update_bn(batches(), model)
    assert model[1].count is count
    assert int(count) == 5
    assert model[1].seen is seen
    assert seen.shape == (0,)


def test_modes_are_put_back_layer_by_layer() -> None:
    model, control = net(), net()
    for one, run in ((model, update_bn), (control, swa_utils.update_bn)):
        one.train()
        one.bn1.eval()
        one.drop.eval()
        run(batches(), one)
    assert control.bn1.training  # torch puts the whole model in the mode of its root
    assert [name for name, m in model.named_children() if not m.training] == ["bn1", "drop"]
    assert model.training


@pytest.mark.parametrize("asked", [None, True, False])
def test_unfreezing_takes_up_the_mode_from_before(asked: bool | None) -> None:
    model = net().eval()
    model.bn1.train(asked is False)
    freeze(model, "bn1")
    if asked is not None:
        model.train(asked)
    noted = dict(model.bn1.__dict__)
    update_bn(batches(), model)
    assert model.bn1.__dict__ == noted
    unfreeze(model, "bn1")
    assert model.bn1.training is bool(asked)


class NormEval(nn.Sequential):
    """Keeps its first BN in eval mode by a train() of its own, as mmdetection's ``norm_eval``."""

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        self[0].eval()
        return self


def test_bn_that_the_model_keeps_in_eval_mode_is_not_wiped() -> None:
    model, control = (zoo.scramble(NormEval(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()) for _ in range(2))
    before = bits(model)
    swa_utils.update_bn(batches(), control)
    assert not control[0].running_mean.any()  # the control: reset, and then never calibrated
    x = batches(1)[0]
    expected = model[0](x).mean((0, 2, 3))
    update_bn([x], model)
    assert moved(before, model) == statistics_of("1")
    torch.testing.assert_close(model[1].running_mean, expected)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        zoo.scramble(self)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.used(x)


def test_bn_that_no_batch_reaches_keeps_its_statistics() -> None:
    model, control = Auxiliary(), Auxiliary()
    before = bits(model)
    swa_utils.update_bn(batches(), control)
    assert not control.unused.running_mean.any()  # the control
    update_bn(batches(), model)
    assert moved(before, model) == statistics_of("used")


# -- update_bn: loaders --------------------------------------------------------------------------------


class Batch(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as transformers' BatchEncoding."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(5)),
        lambda x: [x, "labels"],
        lambda x: {"x": x, "label": torch.zeros(5)},
        lambda x: Batch(x=x, label=None),
        lambda x: ({"x": x}, torch.zeros(5)),
    ],
    ids=["tensor", "tuple", "list", "dict", "mapping", "dict in tuple"],
)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_batches_of_every_shape(wrap: Callable[[Tensor], Any], device: torch.device | None) -> None:
    model, control = Auxiliary(), Auxiliary()
    update_bn((wrap(x) for x in batches()), model, device)
    swa_utils.update_bn(batches(), control)
    for name in STATISTICS:
        assert torch.equal(getattr(model.used, name), getattr(control.used, name))


def test_batches_are_moved_to_the_device() -> None:
    seen: list[str] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.extend(t.device.type for t in (*args, *kwargs.values()))

    model = nn.Sequential(nn.BatchNorm2d(3))
    model.register_forward_pre_hook(look, with_kwargs=True)
    for batch in (batches(1)[0], {"input": batches(1)[0]}):
        with pytest.raises((RuntimeError, NotImplementedError)):  # the statistics are on the CPU
            update_bn([batch], model, device=torch.device("meta"))
    assert seen == ["meta", "meta"]


@pytest.mark.parametrize("loader", [[], iter(())], ids=["list", "read generator"])
def test_an_empty_loader_is_refused_and_wipes_nothing(loader: Any) -> None:
    model, control = net().eval(), net()
    before = bits(model)
    modes = [m.training for m in model.modules()]
    with pytest.raises(FreezekitError, match="loader: the loader gave no batch.*Remedy: give one that has"):
        update_bn(loader, model)
    assert moved(before, model) == set()
    assert [m.training for m in model.modules()] == modes
    assert model.bn1.momentum == 0.3
    swa_utils.update_bn([], control)
    assert not control.bn1.running_mean.any()  # the control: wiped, without a word


def broken(after: int) -> Iterator[Tensor]:
    yield from batches(after)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_exception_leaves_everything_as_it_was(after: int) -> None:
    model, control = net(), net()
    model.bn1.eval()
    freeze(model, "own")
    before = bits(model)
    modes = [m.training for m in model.modules()]
    with pytest.raises(OSError, match="the disk is gone"):
        update_bn(broken(after), model)
    assert moved(before, model) == set()
    assert [m.training for m in model.modules()] == modes
    assert [m.momentum for m in model if hasattr(m, "momentum")] == [0.3, 0.2, None, 0.7, 0.1, 0.05]
    control.eval()
    with pytest.raises(OSError, match="the disk is gone"):
        swa_utils.update_bn(broken(after), control)
    assert control.bn1.momentum is None  # the control: left in the middle
    assert control.training


def test_a_model_that_raises_leaves_everything_as_it_was() -> None:
    model = net()
    before = bits(model)
    with pytest.raises(RuntimeError, match="expected input"):
        update_bn([batches(1)[0], torch.randn(2, 5, 8, 8)], model)
    assert moved(before, model) == set()


def test_a_model_with_nothing_to_recalibrate_is_not_run() -> None:
    model = resnet().eval()
    freeze(model, "*")
    before, noted = bits(model), dict(model.bn1.__dict__)
    update_bn(broken(0), model)
    assert moved(before, model) == set()
    assert model.bn1.__dict__ == noted
    with pytest.raises(FreezekitError, match="not a model"):
        update_bn([], model.state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.compiler.reset()
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    model = zoo.scramble(plain).eval()
    control = copy.deepcopy(model)
    freeze(model, "0")
    freeze(control, "0")
    before = bits(model)
    update_bn(batches(), wrap(model))
    update_bn(batches(), control)
    assert moved(before, model) == statistics_of("2")
    assert bits(model) == bits(control)
    assert not model.training


# -- AveragedModel -------------------------------------------------------------------------------------


def drifting(average: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    """The average that half of the field has: exact on paper."""
    return average.mul(0.9).add_(new, alpha=0.1)


def drifting_lists(averages: Any, news: Any, count: Tensor | int) -> None:
    if averages[0].is_floating_point():
        torch._foreach_mul_(averages, 0.9)
        torch._foreach_add_(averages, news, alpha=0.1)


AVERAGES = [
    {"avg_fn": drifting},
    {"multi_avg_fn": drifting_lists},
    {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    {},
]
NAMES = ["mul_add", "foreach_mul_add", "ema", "multi_ema", "swa"]


def block(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


def resnet() -> nn.Module:
    """A small model with the names of a large one."""
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8), layer1=block(8), layer2=block(8), layer3=block(8),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 10),
    )  # fmt: skip
    return zoo.scramble(nn.Sequential(layers))


def steps(model: nn.Module, averaged: swa_utils.AveragedModel, count: int = 5) -> None:
    """Training, as far as averaging can tell: what is not frozen moves."""
    torch.manual_seed(11)
    for _ in range(count):
        with torch.no_grad():
            for module in model.modules():
                for name, t in (*module._parameters.items(), *module._buffers.items()):
                    if t is None or isinstance(module, Held) or not (name in STATISTICS or t.requires_grad):
                        continue
                    t.add_(torch.rand(t.shape).add(1).to(t.dtype))
        averaged.update_parameters(model)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", AVERAGES, ids=NAMES)
def test_frozen_is_copied_and_the_rest_is_torchs(average: dict[str, Any], use_buffers: bool) -> None:
    model, twin = resnet(), resnet()
    twin.load_state_dict(model.state_dict())
    frozen = set(freeze(model, ["conv1", "bn1", "layer[12]"]).frozen)
    freeze(twin, ["conv1", "bn1", "layer[12]"])
    ours = AveragedModel(model, use_buffers=use_buffers, **average)
    theirs = swa_utils.AveragedModel(twin, use_buffers=use_buffers, **average)
    first = bits(model)
    steps(model, ours)
    steps(twin, theirs)
    constant, got, expected = bits(model), bits(ours.module), bits(theirs.module)
    assert {n for n in constant if constant[n] == first[n]} == frozen
    assert {n for n in frozen if got[n] != constant[n]} == set()
    assert {n for n in got if n not in frozen and got[n] != expected[n]} == set()
    assert got["layer3.0.weight"] != constant["layer3.0.weight"]  # and the rest is averaged
    assert int(ours.n_averaged) == int(theirs.n_averaged) == 5
    if drifting in average.values() or drifting_lists in average.values():
        assert any(expected[n] != constant[n] for n in frozen)  # the control: torch's drifts


@settings(max_examples=25, deadline=None)
@given(
    decay=st.floats(0, 1),
    updates=st.integers(1, 8),
    use_buffers=st.booleans(),
    multi=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_frozen_is_exact_for_any_decay(
    decay: float, updates: int, use_buffers: bool, multi: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    zoo.scramble(model)
    frozen = freeze(model, "[01]").frozen
    average: Any = (
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}
        if multi
        else {"avg_fn": swa_utils.get_ema_avg_fn(decay)}
    )
    averaged = AveragedModel(model, use_buffers=use_buffers, **average)
    steps(model, averaged, updates)
    constant, got = bits(model), bits(averaged.module)
    assert all(got[n] == constant[n] for n in frozen)


def test_without_a_freeze_it_is_torchs() -> None:
    for use_buffers in (False, True):
        model = resnet()
        twin = copy.deepcopy(model)
        ours = AveragedModel(model, use_buffers=use_buffers)
        theirs = swa_utils.AveragedModel(twin, use_buffers=use_buffers)
        steps(model, ours)
        steps(twin, theirs)
        assert bits(ours) == bits(theirs)


def test_a_layer_is_averaged_once_it_is_unfrozen() -> None:
    model = resnet()
    freeze(model, ["layer1", "layer2"])
    averaged = AveragedModel(model, avg_fn=drifting, use_buffers=True)
    steps(model, averaged)
    assert bits(averaged.module.layer1) == bits(model.layer1)
    unfreeze(model, "layer1")
    start, old = bits(model.layer1), model.layer1[0].weight.detach().clone()
    steps(model, averaged, 1)
    assert set(bits(model.layer1)) == moved(start, model.layer1)
    new = model.layer1[0].weight
    assert torch.equal(averaged.module.layer1[0].weight, drifting(old, new, 5))
    assert bits(averaged.module.layer1[1]) != bits(model.layer1[1])
    assert bits(averaged.module.layer2) == bits(model.layer2)


def test_a_layer_frozen_in_the_middle_is_copied_from_then_on() -> None:
    model = resnet()
    averaged = AveragedModel(model, avg_fn=drifting, use_buffers=True)
    steps(model, averaged)
    assert bits(averaged.module.layer1) != bits(model.layer1)
    freeze(model, "layer1")
    steps(model, averaged, 1)
    assert bits(averaged.module.layer1) == bits(model.layer1)


def test_frozen_values_loaded_later_are_followed() -> None:
    model = resnet()
    freeze(model, ["conv1", "bn1"])
    averaged = AveragedModel(model, avg_fn=drifting)
    steps(model, averaged)
    model.load_state_dict(resnet().state_dict())
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.conv1.weight, model.conv1.weight)
    assert torch.equal(averaged.module.bn1.running_var, model.bn1.running_var)


def test_a_parameter_without_gradient_is_kept_while_it_is_constant() -> None:
    model = resnet()
    model.conv1.requires_grad_(False)
    averaged, control = AveragedModel(model, avg_fn=drifting), swa_utils.AveragedModel(model, avg_fn=drifting)
    for _ in range(5):
        averaged.update_parameters(model)
        control.update_parameters(model)
    assert not torch.equal(control.module.conv1.weight, model.conv1.weight)
    assert torch.equal(averaged.module.conv1.weight, model.conv1.weight)


def test_a_parameter_without_gradient_is_averaged_when_it_moves() -> None:
    """Averaging checkpoints loaded into a model for inference, or a generator whose gradient is off."""
    model = resnet().requires_grad_(False)
    ours, theirs = AveragedModel(model), swa_utils.AveragedModel(model)
    for _ in range(3):
        model.load_state_dict(resnet().state_dict())
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert bits(ours) == bits(theirs) != bits(model)


def test_a_parameter_frozen_alone_and_gamma_under_freeze_stats() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    zoo.scramble(model)
    freeze(model, "0", bn="freeze_stats")
    freeze(model, "1.weight")
    averaged = AveragedModel(model, avg_fn=drifting, use_buffers=True)
    averaged.update_parameters(model)
    with torch.no_grad():
        for t in (model[0].weight, model[1].bias, model[1].running_mean):
            t.add_(1)
    before = bits(averaged.module)
    averaged.update_parameters(model)
    assert {"0.weight", "1.bias", "1.running_mean"} <= moved(before, averaged.module)
    same = {n for n, b in bits(averaged.module).items() if b == bits(model)[n]}
    assert {"1.weight", *statistics_of("0")} <= same
    assert not {"0.weight", "1.bias", "1.running_mean"} & same


def test_a_layer_made_frozen_is_copied() -> None:
    model = zoo.scramble(nn.Sequential(freezekit.nn.FrozenBatchNorm1d(64), nn.BatchNorm1d(64)))
    ours = AveragedModel(model, avg_fn=drifting, use_buffers=True)
    theirs = swa_utils.AveragedModel(model, avg_fn=drifting, use_buffers=True)
    for _ in range(5):
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert torch.equal(ours.module[0].running_var, model[0].running_var)
    assert not torch.equal(theirs.module[0].running_var, model[0].running_var)
    assert not torch.equal(ours.module[1].running_var, model[1].running_var)  # torch's, as nothing froze it


def test_everything_frozen() -> None:
    for average in AVERAGES:
        model = resnet()
        freeze(model, "*")
        averaged = AveragedModel(model, use_buffers=True, **average)
        for _ in range(3):
            averaged.update_parameters(model)
        assert bits(averaged.module) == bits(model)
        assert int(averaged.n_averaged) == 3


def test_tied_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    freeze(model, ["0", "1"])
    averaged = AveragedModel(zoo.scramble(model), avg_fn=drifting)
    steps(model, averaged)
    assert averaged.module[1].weight is averaged.module[0].weight
    assert torch.equal(averaged.module[0].weight, model[0].weight)
    assert not torch.equal(averaged.module[2].weight, model[2].weight)


def test_the_copy_of_a_frozen_layer_is_frozen() -> None:
    model, x = resnet(), torch.randn(4, 3, 32, 32)
    freeze(model, ["conv1", "bn1"])
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    averaged.train()
    before = bits(averaged)
    averaged(x)
    update_bn([x], averaged)
    changed = moved(before, averaged)
    assert changed
    assert not any(name.startswith(("module.conv1", "module.bn1")) for name in changed)
    assert is_frozen(averaged, "module.bn1")
    unfreeze(averaged.module, "bn1")
    assert is_frozen(model, "bn1")
    update_bn([x], averaged)
    assert "module.bn1.running_mean" in moved(before, averaged)


def test_it_is_saved_and_copied_like_torchs() -> None:
    model = resnet()
    freeze(model, "layer1")
    averaged = AveragedModel(model)
    steps(model, averaged, 2)
    for twin in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))):
        steps(model, twin, 1)
        assert int(twin.n_averaged) == 3
        assert int(averaged.n_averaged) == 2
        assert bits(twin.module.layer1) == bits(model.layer1)
    plain = swa_utils.AveragedModel(resnet())
    plain.load_state_dict(averaged.state_dict())
    assert bits(plain) == bits(averaged)
    assert isinstance(averaged, swa_utils.AveragedModel)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_the_model_may_be_wrapped_since_it_was_copied(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = resnet()
    frozen = freeze(model, "layer1").frozen
    averaged = AveragedModel(model, avg_fn=drifting, use_buffers=True)
    wrapped = wrap(model)
    steps(wrapped, averaged)
    got, constant = bits(averaged.module), bits(model)
    assert all(got[n] == constant[n] for n in frozen)
    assert got["fc.weight"] != constant["fc.weight"]


def test_another_model_is_refused() -> None:
    averaged = AveragedModel(nn.Sequential(nn.BatchNorm1d(2)))
    before = bits(averaged)
    with pytest.raises(
        FreezekitError, match="model: the model has other parameters.*got 4 parameters, where"
    ):
        averaged.update_parameters(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    with pytest.raises(FreezekitError, match="other buffers .*got 6 buffers, where the copy has 3"):
        averaged.update_parameters(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False)))
    assert bits(averaged) == before
    swa_utils.AveragedModel(nn.Sequential(nn.Linear(2, 2))).update_parameters(  # the control: no word
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    )


def test_the_arguments_are_torchs() -> None:
    with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn"):
        AveragedModel(nn.Linear(2, 2), avg_fn=drifting, multi_avg_fn=drifting_lists)
    averaged = AveragedModel(nn.Linear(2, 2), torch.device("cpu"), None, None, True)
    assert averaged.use_buffers


@pytest.mark.gpu
def test_a_copy_on_another_device() -> None:
    model = resnet()
    frozen = freeze(model, "layer1").frozen
    model.conv1.requires_grad_(False)
    averaged = AveragedModel(model, torch.device("cuda"), avg_fn=drifting, use_buffers=True)
    steps(model, averaged)
    got, constant = bits(averaged.module.cpu()), bits(model)
    assert all(got[n] == constant[n] for n in [*frozen, "conv1.weight"])
    model.cuda()
    update_bn([torch.randn(4, 3, 32, 32)], model, "cuda")  # type: ignore[arg-type]
    assert all(bits(model.cpu())[n] == constant[n] for n in frozen)


def test_buffers_that_cannot_be_written_and_have_not_moved_are_no_trouble() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Identity())
    model[1].register_buffer("mask", torch.full((1,), torch.nan).expand(4))
    model[1].register_buffer("absent", torch.empty(2, device="meta"))
    freezekit.update_bn([torch.randn(5, 3)], model)
    assert int(model[0].num_batches_tracked) == 1
