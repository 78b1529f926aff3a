"""freeze, unfreeze, the handle, and layers of every kind."""

from __future__ import annotations

import abc
import copy
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

import freezekit
import freezekit.freezing.holding
from freezekit import (
    FreezekitError,
    SelectionError,
    freeze,
    freeze_backbone,
    is_frozen,
    trainable_parameters,
    unfreeze,
)


def mlp() -> nn.Sequential:
    layers = OrderedDict(
        a=nn.Linear(4, 8), bn=nn.BatchNorm1d(8), drop=nn.Dropout(0.5), b=nn.Linear(8, 8), fc=nn.Linear(8, 2)
    )
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def test_a_layer_is_held_when_all_of_it_is_named() -> None:
    model = mlp()
    freeze(model, ["bn.*", "a"])
    model.train()
    assert not model.bn.training
    assert not model.a.training
    assert model.drop.training
    assert model.training


def test_a_parameter_alone_only_stops_training() -> None:
    model = mlp()
    handle = freeze(model, "bn.weight")
    model.train()
    assert model.bn.training
    assert handle.frozen == ["bn.weight"]
    assert not model.bn.weight.requires_grad
    assert model.bn.bias.requires_grad
    handle.undo()
    assert model.bn.weight.requires_grad


def test_a_buffer_alone_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"'bn.running_mean'.*name the layer, 'bn'"):
        freeze(mlp(), "bn.running_mean")


def test_everything_can_be_frozen() -> None:
    model = mlp()
    freeze(model, "*")
    model.train()
    assert not model.training
    assert trainable_parameters(model) == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overlapping_freezes_end_when_the_last_does(order: tuple[int, int]) -> None:
    model = mlp()
    handles = [freeze(model, ["a", "bn"]), freeze(model, ["bn", "b"])]
    handles[order[0]].undo()
    assert is_frozen(model, "bn")
    assert is_frozen(model, "bn.weight")
    assert is_frozen(model, "a") == (order[0] == 1)
    handles[order[1]].undo()
    assert all(p.requires_grad for p in model.parameters())
    assert all(type(module).__module__.startswith("torch.nn") for module in model.modules())
    assert not any(key.startswith("_freezekit") for module in model.modules() for key in module.__dict__)


def test_requires_grad_is_that_of_before_the_first_freeze() -> None:
    model = mlp()
    model.a.bias.requires_grad_(False)
    first, second = freeze(model, "a"), freeze(model, "a")
    first.undo()
    second.undo()
    assert [p.requires_grad for p in model.a.parameters()] == [True, False]


def test_unfreeze_takes_up_the_mode_last_asked_for() -> None:
    model = mlp().eval()
    freeze(model, ["a", "bn"])
    model.train()
    unfreeze(model, "bn")
    assert model.bn.training
    assert type(model.bn) is nn.BatchNorm1d
    assert is_frozen(model, "a")
    before = model.bn.running_mean.clone()
    model(torch.randn(4, 4))
    assert not torch.equal(model.bn.running_mean, before)


def test_undo_restores_the_mode_at_the_freeze() -> None:
    model = mlp().eval()
    handle = freeze(model, ["a", "bn"])
    model.train()
    handle.undo()
    assert not model.bn.training


def test_unfreezing_inside_lets_the_layers_above_train() -> None:
    model = zoo.make("resnet18")
    handle = freeze_backbone(model)
    model.train()
    handle.unfreeze("layer4.1")
    assert model.layer4[1].bn1.training
    assert model.layer4[1].training
    assert model.layer4.training  # holds something that trains
    assert not model.layer4[0].training
    assert [n for n in handle.trainable if n.startswith("layer4")] == [
        f"layer4.1.{n}" for n, _ in model.layer4[1].named_parameters()
    ]
    handle.undo()
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_unfreeze_of_what_is_not_frozen() -> None:
    model = mlp()
    freeze(model, "a")
    with pytest.raises(SelectionError, match="no frozen layer or parameter .*nothing of it is frozen"):
        unfreeze(model, "fc")
    unfreeze(model)
    unfreeze(model)  # nothing left to do


def test_context_manager() -> None:
    model = mlp()
    with freeze_backbone(model, head="fc") as handle:
        assert handle.trainable == ["fc.weight", "fc.bias"]
    assert handle.frozen == []
    assert model.bn.training


def test_handle_as_a_table() -> None:
    handle = freeze_backbone(mlp(), head="fc")
    assert str(handle) == (
        "layer  type               frozen  trainable  held norms\n"
        "a      FrozenLinear           40          0           0\n"
        "bn     FrozenBatchNorm1d      16          0           1\n"
        "b      FrozenLinear           72          0           0\n"
        "fc     Linear                  0         18           0\n"
        "total  Sequential            128         18           1\n"
        "rule: head= was given"
    )
    assert repr(handle) == "<Freeze of Sequential: 9 tensors frozen>"


def test_is_frozen_knows_what_it_is_asked() -> None:
    model = mlp()
    freeze(model, "bn")
    assert is_frozen(model, "bn.num_batches_tracked")
    assert not is_frozen(model, "")
    with pytest.raises(SelectionError, match="did you mean 'bn'"):
        is_frozen(model, "bnn")


class Activated(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d: there is more in it than BN."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input)) + 1


class Dropping(nn.BatchNorm1d):
    """As timm's BatchNormAct2d: dropout inside a BN layer."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


def test_unfreezing_what_is_inside_a_bn_does_not_unfreeze_the_bn() -> None:
    model, x = zoo.scramble(nn.Sequential(Dropping(3), nn.Linear(3, 2))), torch.randn(6, 3)
    handle = freeze(model, "0")
    unfreeze(model, "*drop")
    model.train()
    assert model[0].drop.training
    assert is_frozen(model, "0")
    model[0].drop.p = 0.0
    assert torch.equal(model[0](x)[:2], model[0](x[:2]))
    unfreeze(model, "0.bias")
    assert not is_frozen(model, "0")
    handle.undo()
    assert type(model[0]) is Dropping


def test_a_bn_subclass_keeps_its_own_forward() -> None:
    model = zoo.scramble(nn.Sequential(OrderedDict(bn=Activated(3), fc=nn.Conv2d(3, 2, 1))))
    x = torch.randn(4, 3, 5, 5)
    expected = model.eval().bn(x)
    freeze_backbone(model)
    model.train()
    assert isinstance(model.bn, Activated)
    before = zoo.snapshot(model.bn)
    torch.optim.swa_utils.update_bn([x, x], model)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model).bn is model.bn
    assert not isinstance(model.bn, nn.modules.batchnorm._BatchNorm)
    model.train()
    assert torch.equal(model.bn(x), expected)
    assert zoo.snapshot(model.bn) == before
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.train().bn(x), expected)
        assert isinstance(copied.bn, Activated)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model.fc(expected))
    freezekit.unfreeze(model)
    assert type(model.bn) is Activated
    assert isinstance(model.bn, nn.modules.batchnorm._BatchNorm)


STATEFUL = {
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3, 6)),
    "own BatchNorm2d": (lambda: freezekit.nn.BatchNorm2d(3), (4, 3, 4, 4)),
    "own SyncBatchNorm": (lambda: freezekit.nn.SyncBatchNorm(3), (4, 3, 4, 4)),
    "no affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 4, 4)),
    "momentum None": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 4, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 4, 4)),
    "Dropout": (lambda: nn.Dropout(0.5), (4, 3)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.5), (4, 3)),
    "RReLU": (lambda: nn.RReLU(), (4, 3)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), (4, 3)),
    "LSTM dropout": (lambda: nn.LSTM(3, 3, num_layers=2, dropout=0.5), (4, 2, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True), (4, 3, 4)),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_every_stateful_layer_is_held(kind: str) -> None:
    make, shape = STATEFUL[kind]
    model = zoo.scramble(nn.ModuleDict({"layer": make(), "fc": nn.Linear(1, 1)}))
    layer = model["layer"]
    x = torch.randn(shape)

    def run() -> Tensor:
        out = layer(x)
        return out[0] if isinstance(out, tuple) else out

    model.eval()
    with torch.no_grad():
        expected = run()
    model.train()
    handle = freeze(model, "layer")
    bits = zoo.snapshot(model)
    for _ in range(3):
        model.train()
        with torch.no_grad():
            assert torch.equal(run(), expected)
    assert zoo.snapshot(model) == bits
    handle.undo()
    assert layer.training
    with torch.no_grad():
        assert not torch.equal(run(), expected)  # the test can fail: live, the layer does move


class Scaled(nn.InstanceNorm2d):
    """An instance norm with something of its own on both ways to torch's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return super()._apply_instance_norm(input + 1)


INSTANCE_NORMS = {
    "1d": (nn.InstanceNorm1d, (6, 5, 9)),
    "2d": (nn.InstanceNorm2d, (6, 5, 4, 3)),
    "3d": (nn.InstanceNorm3d, (6, 5, 4, 3, 2)),
    "subclass": (Scaled, (6, 5, 4, 3)),
}


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("kind", INSTANCE_NORMS)
def test_the_kernel_of_instance_norms_cannot_write_to_their_statistics(kind: str, tracks: bool) -> None:
    # torch 2.6 writes back the mean of what it repeated for a batch of 6, which is rounded, in eval mode too;
    # every torch moves statistics that are there while track_running_stats is off
    make, shape = INSTANCE_NORMS[kind]
    model = zoo.scramble(nn.ModuleDict({"norm": make(5, affine=True, track_running_stats=True)})).eval()
    layer = model["norm"]
    layer.track_running_stats = tracks
    x = torch.randn(shape)
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
    handle = freeze(model, "norm")
    bits = zoo.snapshot(model)
    exported = torch.export.export(layer, (x,), strict=False).module()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for run in (layer, exported, compiled, *copies):
        for _ in range(2):
            assert torch.equal(run(x), expected) or run is compiled
    torch.testing.assert_close(compiled(x), expected)
    assert zoo.snapshot(model) == bits
    for twin in copies:
        assert torch.equal(twin.running_mean, layer.running_mean)
        assert torch.equal(twin.running_var, layer.running_var)
    handle.undo()
    assert type(layer) is make
    assert zoo.snapshot(model) == bits


def test_parametrized_layers_still_copy() -> None:
    model = nn.ModuleDict(
        {"layer": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "fc": nn.Linear(1, 1)}
    )
    freeze(model, "layer")
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3)
    assert torch.equal(twin["layer"](x), model["layer"](x))
    assert is_frozen(twin, "layer")


def test_tied_names_are_all_listed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    shared = nn.Linear(2, 2)
    model["c"], model["d"] = shared, shared
    handle = freeze(model, ["a", "c"])
    both = ["c.weight", "c.bias", "d.weight", "d.bias"]
    assert handle.frozen == ["a.weight", "a.bias", "b.weight", *both]
    assert is_frozen(model, "b.weight")
    assert "b.weight" not in handle.trainable
    second = freeze(model, "b")
    handle.undo()
    assert not model["a"].weight.requires_grad  # the other still holds it, under another name
    assert is_frozen(model, "a.weight")
    second.undo()
    assert all(p.requires_grad for p in model.parameters())
    handle = freeze(model, "*")
    unfreeze(model, "a")
    assert model["b"].weight.requires_grad
    assert not is_frozen(model, "b.weight")
    assert not model["b"].bias.requires_grad
    handle.undo()
    assert all(p.requires_grad for p in model.parameters())


def test_own_and_torch_layers_freeze_to_the_same_interface() -> None:
    for maker in (nn.BatchNorm2d, freezekit.nn.BatchNorm2d, nn.SyncBatchNorm, freezekit.nn.SyncBatchNorm):
        model = nn.Sequential(maker(3), nn.Conv2d(3, 3, 1))
        freeze(model, "0")
        assert model[0].frozen
        assert not isinstance(model[0], nn.modules.batchnorm._BatchNorm)
        assert "3, eps=1e-05, momentum=0.1" in repr(model[0])
        unfreeze(model)
        assert type(model[0]) is maker


def test_a_layer_made_frozen_stays_so() -> None:
    model = nn.ModuleDict({"bn": freezekit.nn.FrozenBatchNorm2d(3), "fc": nn.Linear(2, 2)})
    handle = freeze_backbone(model)
    assert handle.frozen[0] == "bn.weight"
    handle.undo()
    assert type(model["bn"]) is freezekit.nn.FrozenBatchNorm2d
    assert model["bn"].weight.requires_grad
    assert not any(key.startswith("_freezekit") for key in model["bn"].__dict__)


def test_a_traced_graph_is_frozen_by_its_layers() -> None:
    graph = torch.fx.symbolic_trace(zoo.make("resnet18").eval())
    model = nn.ModuleDict({"net": graph, "fc": nn.Linear(2, 2)})
    x = zoo.images("resnet18")
    expected = graph(x)
    handle = freeze_backbone(model, head="fc")
    assert is_frozen(model, "net")
    before = zoo.snapshot(model)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.train()["net"](x), expected)
        assert zoo.snapshot(copied) == before
    handle.undo()
    assert not is_frozen(model, "net")


class Functional(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.fc = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.bn(self.fc(x)), self.p, self.training)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.p if self.training else 0.0)


def test_a_graph_traced_in_train_mode_is_refused() -> None:
    x = torch.randn(4, 3)
    live = nn.ModuleDict({"body": torch.fx.symbolic_trace(Functional(0.5).train())})
    with pytest.raises(FreezekitError, match="body: a traced graph has train mode .*got dropout = .*eval"):
        freeze(live.eval(), "body")
    assert not torch.equal(live["body"](x), live["body"](x))  # which is why
    extractor = create_feature_extractor(Functional(0.5), {"scaled_dot_product_attention": "out"}).eval()
    with pytest.raises(FreezekitError, match="a traced graph has train mode written into it"):
        freeze(nn.Sequential(extractor), "0")
    exported = torch.export.export(nn.Sequential(nn.BatchNorm1d(3)).train(), (x,)).module()
    with pytest.raises(FreezekitError, match=r"got .*batch_norm"):
        freeze(nn.Sequential(exported), "0")


@pytest.mark.parametrize(("p", "mode"), [(0.5, False), (0.0, True)])
def test_a_graph_that_acts_the_same_in_both_modes_is_frozen(p: float, mode: bool) -> None:
    model = nn.Sequential(torch.fx.symbolic_trace(zoo.scramble(Functional(p).train(mode))))
    x = torch.randn(4, 3)
    expected = model.eval()(x)
    freeze(model, "*")
    assert torch.equal(model.train()(x), expected)


def test_a_frozen_model_loads_in_a_process_that_knows_nothing_of_it(tmp_path: Path) -> None:
    model = zoo.make("resnet18")
    freeze_backbone(model)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False).train(); "
        "print(model.layer1[0].bn1.training, model.layer1[0].conv1.training, model.fc.training)"
    )
    command = [sys.executable, "-c", script, tmp_path / "model.pt"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False False True\n"


def test_a_freeze_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("resnet18")
    state = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
    hold, calls = freezekit.freezing.holding.hold_module, []

    def failing(module: nn.Module, holder: str) -> None:
        calls.append(module)
        if len(calls) == 20:
            raise KeyboardInterrupt
        hold(module, holder)

    monkeypatch.setattr(freezekit.freezing.holding, "hold_module", failing)
    with pytest.raises(KeyboardInterrupt):
        freeze_backbone(model)
    assert [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()] == state
    assert all(p.requires_grad for p in model.parameters())


class Abstract(abc.ABC, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class AbstractNorm(nn.BatchNorm1d, abc.ABC):
    """A BN subclass with a metaclass of its own."""


class Registered(nn.Linear):
    def __init_subclass__(cls, /, tag: str) -> None:
        raise AssertionError("not for classes that nobody wrote")


class OwnReduce(nn.Linear):
    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (self.in_features,), self.__dict__


def _remake(features: int) -> OwnReduce:
    return OwnReduce(features, features)


class ReducesToItsClass(nn.Linear):
    def __reduce__(self) -> tuple[object, ...]:
        return self.__class__, (self.in_features, self.out_features), self.__dict__


class NewWithArguments(nn.Linear):
    def __new__(cls, size: int, *rest: int) -> NewWithArguments:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[int]:
        return (self.in_features,)


class Wrapper(nn.Module):
    """Hands on whatever is assigned, as torch.compile's wrapper does."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["ready"] = False
        self.inner = zoo.scramble(nn.Linear(3, 3))
        self.__dict__["ready"] = True

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("ready") and name != "training":
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    "make",
    [
        Abstract,
        lambda: AbstractNorm(3),
        lambda: Registered(3, 3),
        lambda: OwnReduce(3, 3),
        lambda: ReducesToItsClass(3, 3),
        lambda: NewWithArguments(3, 3),
        Wrapper,
    ],
)
def test_classes_of_every_kind_can_be_swapped(make: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"layer": zoo.scramble(make()), "fc": nn.Linear(2, 2)})
    kind = type(model["layer"])
    x = torch.randn(4, 3)
    expected = model.eval()["layer"](x)
    handle = freeze(model, "layer")
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied["layer"], kind)
        assert torch.equal(copied.train()["layer"](x), expected)
        assert is_frozen(copied, "layer")
    handle.undo()
    assert type(model["layer"]) is kind


class Once(type):
    """A metaclass that keeps a registry and wants every class but once."""

    seen: ClassVar[set[str]] = set()

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> Once:
        if body["__module__"] in cls.seen:
            raise KeyError("registered twice")
        cls.seen.add(str(body["__module__"]))
        return super().__new__(cls, name, bases, body)


class OnlyOnce(nn.Linear, metaclass=Once):
    pass


def test_a_class_that_cannot_be_made_again_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), OnlyOnce(3, 3))
    with pytest.raises(FreezekitError, match="OnlyOnce: the class .* cannot be swapped .*registered twice"):
        freeze(model, "*")
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


class OwnTrain(nn.Module):
    """Like LoRA layers that merge their weights in train(False)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.inner = nn.Dropout()

    def train(self, mode: bool = True) -> OwnTrain:
        super().train(mode)
        self.weight.data += 1
        return self


def test_a_train_method_of_the_class_is_not_run_on_what_is_frozen() -> None:
    model = nn.ModuleDict({"layer": OwnTrain(), "fc": nn.Linear(2, 2)})
    with pytest.raises(
        FreezekitError, match="layer: this class has a train.. of its own.*call model.eval.. first"
    ):
        freeze(model, "layer")
    model.eval()
    freeze(model, "layer")
    before = zoo.snapshot(model)
    model.train()
    model.eval()
    assert zoo.snapshot(model) == before
    model.train()
    assert not model["layer"].inner.training


def test_an_embedding_that_renormalises_itself_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2, max_norm=1.0), "fc": nn.Linear(2, 2)})
    with pytest.raises(FreezekitError, match="embed: an embedding with max_norm rewrites its weight"):
        freeze(model, "embed")


def test_unfreezing_part_of_a_norm_layer_lets_its_statistics_go() -> None:
    model = mlp()
    handle = freeze(model, "*")
    handle.unfreeze("bn.weight")
    assert not is_frozen(model, "bn.running_mean")
    assert "bn.running_mean" not in handle.frozen
    assert is_frozen(model, "bn.bias")


def test_undo_refuses_to_break_a_layer_that_was_changed_meanwhile() -> None:
    model = mlp()
    handle = freeze_backbone(model, head="fc")
    nn.utils.parametrizations.weight_norm(model.a)
    for end in (handle.undo, lambda: unfreeze(model), lambda: unfreeze(model, "a")):
        with pytest.raises(
            FreezekitError, match="a: the class of this layer was changed while it was frozen"
        ):
            end()
        assert is_frozen(model, "bn")
    nn.utils.parametrize.remove_parametrizations(model.a, "weight")
    handle.undo()
    assert type(model.a) is nn.Linear


def test_modules_can_be_given_instead_of_names() -> None:
    model = zoo.make("resnet18")
    assert freeze(model, [model.layer1, "bn1"]).frozen == freeze(model, ["layer1", "bn1"]).frozen


def test_what_is_no_model_is_refused() -> None:
    for call in (freeze_backbone, lambda m: freeze(m, "*"), unfreeze, lambda m: is_frozen(m, "a")):
        with pytest.raises(FreezekitError, match="model: not a model .got dict"):
            call({})
    with pytest.raises(SelectionError, match="head=: a name must be a string .got 5"):
        freeze_backbone(mlp(), head=5)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="nothing is left to freeze"):
        freeze_backbone(mlp(), head="*")
    with pytest.raises(SelectionError, match="nothing in the model is frozen"):
        unfreeze(mlp(), "a")


def test_a_parameter_set_to_train_again_is_listed() -> None:
    model = mlp()
    handle = freeze(model, ["a", "bn"])
    model.a.weight.requires_grad_()
    assert "a.weight" in handle.trainable


def test_a_layer_in_both_backbone_and_head_is_refused() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"body": shared, "top": shared})
    with pytest.raises(SelectionError, match=r"body.weight is top.weight"):
        freeze_backbone(model, head="top")


def test_unfreezing_everything_takes_up_the_mode_last_asked_for() -> None:
    model = mlp().eval()
    freeze(model, ["a", "bn"])
    model.train()
    unfreeze(model)
    assert model.bn.training


def test_unfreezing_without_a_mode_asked_for_keeps_the_one_at_the_freeze() -> None:
    for mode in (True, False):
        model = mlp().train(mode)
        freeze(model, ["a", "bn"])
        unfreeze(model)
        assert model.bn.training is mode


def test_a_layer_without_tensors_is_unfrozen_by_name() -> None:
    model = mlp()
    freeze(model, ["a", "bn", "drop"])
    model.train()
    unfreeze(model, "drop")
    assert model.drop.training
    assert not model.bn.training


def test_a_layer_used_twice_goes_by_either_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "fc": nn.Linear(2, 2)})
    freeze(model, "a")
    assert is_frozen(model, "b")
    unfreeze(model, "b")
    assert not is_frozen(model, "a")
    assert shared.weight.requires_grad


class Sized(nn.modules.lazy.LazyModuleMixin, nn.Module):
    """Lazy, and stays of its class once it has its values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.UninitializedParameter()

    def initialize_parameters(self, x: torch.Tensor) -> None:
        if self.has_uninitialized_params():
            self.weight.materialize(x.shape[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_a_lazy_layer_of_ones_own_freezes_once_it_has_values() -> None:
    model = nn.Sequential(OrderedDict(body=Sized(), fc=nn.Linear(3, 2)))
    with pytest.raises(FreezekitError, match="body: a lazily"):
        freeze_backbone(model)
    model(torch.ones(1, 3))
    assert freeze_backbone(model).frozen == ["body.weight"]


def test_parameters_of_the_model_itself_have_a_row() -> None:
    rows = str(freeze_backbone(zoo.make("vit"))).splitlines()
    assert [row.split()[2:] for row in rows if row.startswith("(own)")] == [["32", "0", "0"]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_layer_of_two_freezes_is_held_until_both_end(order: tuple[int, int]) -> None:
    model = mlp()
    handles = [freeze(model, ["a", "bn"]), freeze(model, ["bn", "b"])]
    handles[order[0]].undo()
    assert not model.train().bn.training
    handles[order[1]].undo()
    assert model.train().bn.training


def test_root_buffers_belong_to_the_backbone() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Linear(2, 2), fc=nn.Linear(2, 2)))
    model.register_buffer("pixel_mean", torch.zeros(3))
    assert freezekit.find_backbone(model).backbone == ("body", "pixel_mean")
    assert freeze_backbone(model).frozen == ["pixel_mean", "body.weight", "body.bias"]


def test_a_child_called_module_is_no_wrapper_beside_others() -> None:
    model = nn.Sequential(OrderedDict(module=zoo.make("resnet18"), fc=nn.Linear(10, 2)))
    assert freezekit.find_backbone(model).head == ("fc", "module.fc")


def test_a_module_given_is_found_under_all_its_names() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "a": shared, "b": shared})
    handle = freeze_backbone(model, head=shared)
    assert handle.selection.head == ("a", "b")
    assert handle.frozen == ["body.weight", "body.bias"]


def test_layers_of_a_class_are_held_in_one_and_the_same_class() -> None:
    model = mlp()
    freeze(model, ["a", "b"])
    assert type(model.a) is type(model.b)


def test_held_torch_layers_are_leaves_for_a_tracer() -> None:
    model = mlp()
    freeze(model, ["a", "drop"])
    graph = torch.fx.symbolic_trace(model).graph
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert {"a", "drop"} <= set(called)


def test_freezing_registers_no_class() -> None:
    registered: list[type] = []

    class Registering(nn.Linear):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            registered.append(cls)

    model = nn.ModuleDict({"a": Registering(2, 2), "fc": nn.Linear(2, 2)})
    freeze(model, "a")
    assert registered == []


@pytest.mark.parametrize("patterns", [None, 3])
def test_what_is_no_name_is_refused(patterns: object) -> None:
    model = mlp()
    freeze(model, "bn")
    with pytest.raises(SelectionError, match=f"must be a string .got {patterns}"):
        unfreeze(model, patterns)
    with pytest.raises(FreezekitError, match="not a model"):
        freezekit.trainable_parameters(patterns)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")  # what functorch itself uses
def test_second_derivatives_and_forward_mode_go_through_a_frozen_bn() -> None:
    model = zoo.scramble(mlp()).double().eval()
    x = torch.randn(2, 4, dtype=torch.double)

    def loss(x: Tensor) -> Tensor:
        return model(x).tanh().sum()

    hessian, along = torch.func.hessian(loss)(x), torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
    assert float(hessian.detach().abs().max()) > 1e-3
    freeze(model, "bn")
    torch.testing.assert_close(torch.func.hessian(loss)(x), hessian)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1], along)
