"""What moves or acts beside gradients, each held: observers, codebooks, spectral vectors, root buffers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, MinMaxObserver, fake_quantize

import freezekit
from freezekit import FreezekitError, SelectionError, freeze, freeze_backbone, is_frozen, unfreeze
from freezekit.freezing import holding


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
        drop=nn.Dropout(0.5),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(4, 2),
    )
    return zoo.scramble(nn.Sequential(layers))


# -- bn= and hold= -------------------------------------------------------------------------------------


def test_hold_norm_leaves_dropout_alive_and_nothing_else() -> None:
    model, x = net(), torch.randn(8, 3, 6, 6)
    bits = zoo.snapshot(model)
    handle = freeze_backbone(model, hold="norm")
    model.train()
    assert not model.bn.training
    assert model.drop.training
    assert type(model.drop) is nn.Dropout
    assert handle.trainable == ["fc.weight", "fc.bias"]
    assert is_frozen(model, "conv")
    assert not is_frozen(model, "drop")
    assert not is_frozen(model, "")
    zoo.train(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), x)
    after = zoo.snapshot(model)
    assert {n for n in bits if bits[n] != after[n]} == {"fc.weight", "fc.bias"}
    assert not torch.equal(model[:3](x), model[:3](x))  # dropout draws anew
    model.eval()
    assert torch.equal(model[:3](x), model[:3](x))
    handle.undo()
    assert type(model.bn) is nn.BatchNorm2d
    assert not is_frozen(model, "conv.weight")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
        lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
        lambda: freezekit.nn.BatchNorm2d(4),
    ],
)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_hold_norm_holds_whatever_keeps_state(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(OrderedDict(layer=make(), drop=nn.Dropout(), fc=nn.Conv2d(4, 2, 1)))
    zoo.scramble(model)
    x = torch.randn(4, 4, 3, 3)
    live = zoo.snapshot(model)
    model.train()(x)
    assert zoo.snapshot(model) != live  # live, it moves
    freeze_backbone(model, head="fc", hold="norm")
    bits = zoo.snapshot(model)
    model.train()
    model(x)
    assert zoo.snapshot(model) == bits
    assert model.drop.training


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Embedding(5, 3, max_norm=0.1), "an embedding with max_norm rewrites its weight"),
        (lambda: nn.LazyLinear(3), "a lazily initialised layer has no values to freeze yet"),
        (lambda: torch.jit.script(nn.Linear(3, 3)), "a scripted module has its mode compiled in"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_what_moves_in_eval_mode_is_refused_where_it_would_not_be_held(
    make: Callable[[], nn.Module], why: str
) -> None:
    model = nn.ModuleDict({"a": make(), "fc": nn.Linear(3, 2)})
    with pytest.raises(FreezekitError, match=f"a: {why}"):
        freeze(model, "a", hold="norm")
    if not isinstance(model["a"], torch.jit.ScriptModule):
        model["a"].register_parameter("extra", nn.Parameter(torch.randn(2)))
    with pytest.raises(FreezekitError, match=f"a: {why}"):
        freeze(model, "a.weight")
    freeze(model, "fc").undo()
    assert type(model["fc"]) is nn.Linear
    assert model["fc"].weight.requires_grad


def test_bn_train_leaves_batchnorm_as_it_is_and_freezes_the_rest() -> None:
    model, x = net(), torch.randn(8, 3, 6, 6)
    bits = zoo.snapshot(model)
    handle = freeze_backbone(model, head="fc", bn="train")
    assert type(model.bn) is nn.BatchNorm2d
    assert handle.frozen == ["conv.weight", "conv.bias"]
    assert handle.trainable == ["bn.weight", "bn.bias", "fc.weight", "fc.bias"]
    assert handle.kernels == {}
    model.train()
    assert model.bn.training
    assert not model.drop.training
    zoo.train(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    after = zoo.snapshot(model)
    assert {n for n in bits if bits[n] == after[n]} == {"conv.weight", "conv.bias"}
    handle.undo()
    assert all(p.requires_grad for p in model.parameters())


def test_bn_train_takes_a_bn_without_statistics_and_converts_nothing() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 3), bn=nn.BatchNorm1d(3, track_running_stats=False)))
    handle = freeze(model, "*", bn="train", convert="fold")
    assert handle.kernels == {}
    assert is_frozen(model, "a")
    assert not is_frozen(model, "bn")
    with pytest.raises(SelectionError, match="nothing is left to freeze .got 'train', 'all'.*name more"):
        freeze(model, "bn", bn="train")


def test_bn_train_inside_what_another_freeze_holds() -> None:
    model = net()
    outer = freeze_backbone(model)
    inner = freeze(model, ["conv", "bn"], bn="train")
    assert is_frozen(model, "bn")
    outer.undo()
    assert not is_frozen(model, "bn")
    assert model.bn.weight.requires_grad
    assert not model.conv.weight.requires_grad
    inner.undo()
    assert all(p.requires_grad for p in model.parameters())


# -- observers ------------------------------------------------------------------------------------------


OBSERVERS: dict[str, Callable[[], nn.Module]] = {
    "observer": MinMaxObserver,
    "fake quantize": lambda: FakeQuantize(),
    "fused": lambda: FusedMovingAvgObsFakeQuantize(),
    "per channel": fake_quantize.default_per_channel_weight_fake_quant,
}


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.filterwarnings("ignore:.*reduce_range.*", "ignore:.*quant_min.*")
def test_quantization_observers_stop_observing(kind: str) -> None:
    model = nn.ModuleDict({"seen": OBSERVERS[kind](), "fc": nn.Linear(2, 2)})
    seen = model["seen"]
    seen(torch.randn(4, 3))
    before = zoo.snapshot(model)
    seen.eval()(torch.randn(4, 3) * 5)
    assert zoo.snapshot(model) != before  # eval mode does not stop it
    x = torch.randn(4, 3) * 20
    handle = freeze(model, "seen")
    bits = zoo.snapshot(model)
    out = seen(x)
    model.train()
    assert torch.equal(seen(x), out)
    if kind != "per channel":
        assert torch.equal(seen(x[:1]), out[:1])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied["seen"](x), out)
        assert zoo.snapshot(copied) == bits
    assert zoo.snapshot(model) == bits
    assert sorted(model.state_dict()) == sorted(bits)
    handle.undo()
    seen(x)
    assert zoo.snapshot(model) != bits


# -- codebooks ------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """Vector quantisation with moving averages, set by the first batch, as the well-known package's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(5, 3))
        self.register_buffer("initted", torch.tensor([False]))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initted:
            self.embed.copy_(x[:5])
            self.initted.fill_(True)
        nearest = torch.cdist(x, self.embed).argmin(1)
        if self.training:
            self.embed.data[nearest] = 0.9 * self.embed[nearest] + 0.1 * x
        return self.embed[nearest]


def test_codebooks() -> None:
    model = nn.ModuleDict({"vq": Codebook(), "fc": nn.Linear(3, 2)})
    x = torch.randn(9, 3)
    with pytest.raises(
        FreezekitError, match="vq: a lazily initialised layer has no values to freeze yet.*one batch"
    ):
        freeze(model, "vq")
    model["vq"](x)
    before = zoo.snapshot(model)
    model["vq"](x)
    assert zoo.snapshot(model) != before
    freeze(model, "vq", hold="norm")
    before = zoo.snapshot(model)
    model.train()["vq"](x)
    assert zoo.snapshot(model) == before


# -- buffers beside the head ----------------------------------------------------------------------------


class Centred(nn.Module):
    """Keeps a centre and a count of its own, written in every way people write them, beside a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(3, 3)
        self.fc = nn.Linear(3, 2)
        self.register_buffer("centre", torch.randn(3))
        self.register_buffer("replaced", torch.randn(3), persistent=False)
        self.register_buffer("data", torch.randn(3))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.rand(3))
        self.fails = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = (self.layer1(x) - self.centre - self.replaced + self.data) * self.mask * scale
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.9)
                self.data.data.add_(1)
                self.steps += 1
            self.replaced = self.replaced * 0.5
        if self.fails:
            raise RuntimeError("in the middle")
        return self.fc(x)


def test_buffers_beside_the_head_stay_in_place() -> None:
    model, x = zoo.scramble(Centred()), torch.randn(4, 3)
    before = zoo.snapshot(model)
    model.train()(x)
    moved = {n for n, b in zoo.snapshot(model).items() if b != before[n]}
    assert moved == {"centre", "replaced", "data", "steps"}
    record = sorted(model.__dict__), type(model)
    objects = dict(model.named_buffers())
    handle = freeze_backbone(model)
    bits = zoo.snapshot(model)
    model.train()
    assert model.training
    out = model(x)
    assert torch.equal(model(x), out)
    out.sum().backward()
    zoo.train(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    model.fails = True
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    model.fails = False
    after = zoo.snapshot(model)
    assert {n for n in bits if bits[n] != after[n]} == {"fc.weight", "fc.bias"}
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())
    assert isinstance(model, Centred)
    assert type(model).__name__ == "Centred"
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]
    handle.undo()
    assert (sorted(model.__dict__), type(model)) == record
    model(x)
    assert zoo.snapshot(model)["centre"] != bits["centre"]


def test_pinned_models_are_copied_saved_loaded_and_compiled() -> None:
    model, x = zoo.scramble(Centred()), torch.randn(4, 3)
    freeze_backbone(model)
    model.train()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved):
        bits = zoo.snapshot(copied)
        assert torch.equal(copied(x), model(x))
        assert zoo.snapshot(copied) == bits
        unfreeze(copied)
        assert type(copied) is Centred
    bits = zoo.snapshot(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
    assert zoo.snapshot(model) == bits
    other = zoo.scramble(Centred())
    model.load_state_dict(other.state_dict())
    model(x)
    assert torch.equal(model.centre, other.centre)  # loading is the user's own write
    model.double()(x.double())
    model.eval()
    exported = torch.export.export(model, (x.double(),))
    assert not exported.graph_signature.buffers_to_mutate
    torch.testing.assert_close(exported.module()(x.double()), model(x.double()))


def test_pins_compose() -> None:
    model, x = zoo.scramble(Centred()), torch.randn(4, 3)
    first, second, third = freeze_backbone(model), freeze(model, "*"), freeze_backbone(model)
    bits = zoo.snapshot(model)
    for handle in (first, second, third):
        model.train()(x)
        assert zoo.snapshot(model) == bits
        handle.undo()
    assert type(model) is Centred
    assert not [m for m in model.modules() if holding.holders_of(m)]
    model(x)
    assert zoo.snapshot(model) != bits


def test_buffers_above_what_is_unfrozen_stay_in_place() -> None:
    model = nn.ModuleDict({"inner": zoo.scramble(Centred()), "fc": nn.Linear(2, 2)})
    handle = freeze(model, "inner")
    model.train()
    unfreeze(model, "inner.fc")
    assert model["inner"].training
    assert is_frozen(model, "inner.centre")
    assert "inner.centre" in handle.frozen
    bits = zoo.snapshot(model)
    model["inner"](torch.randn(4, 3))
    assert zoo.snapshot(model) == bits
    unfreeze(model, "inner.centre")
    assert not is_frozen(model, "inner.centre")
    assert is_frozen(model, "inner.data")
    model["inner"](torch.randn(4, 3))
    assert {n for n, b in zoo.snapshot(model).items() if b != bits[n]} == {"inner.centre"}
    unfreeze(model)
    assert type(model["inner"]) is Centred


class Tempered(nn.Module):
    """Multiplies by a buffer that its forward has just written, so that backward needs what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("rows", torch.randn(3).expand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(2)
        return self.fc(x + self.rows) * self.scale


def test_backward_sees_what_a_pinned_forward_wrote() -> None:
    model, x = zoo.scramble(Tempered()), torch.randn(4, 3)
    live = copy.deepcopy(model)
    live(x).sum().backward()
    freeze_backbone(model, head="fc")
    bits = zoo.snapshot(model)
    model(x).sum().backward()
    assert torch.equal(model.fc.bias.grad, live.fc.bias.grad)
    assert zoo.snapshot(model) == bits


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_tracing_exporting_and_mapping_a_pinned_model_moves_nothing() -> None:
    model, x = zoo.scramble(Tempered()), torch.randn(4, 3)
    freeze_backbone(model, head="fc")
    model.train()
    bits, out = zoo.snapshot(model), model(x)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    exported = torch.export.export(model, (x,), strict=False).module()
    for _ in range(2):
        assert torch.equal(traced(x), out)
        torch.testing.assert_close(exported(x), out)
    torch.testing.assert_close(torch.vmap(model)(x[None])[0], out)
    assert zoo.snapshot(model) == bits
    assert zoo.snapshot(traced)["scale"] == bits["scale"]


class Static(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("mask", torch.randn(3))

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2


def test_a_pinned_forward_is_whatever_the_class_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Static(), torch.randn(4, 3)
    freeze_backbone(model, head="fc")
    assert torch.equal(model(x), x * 2)
    monkeypatch.setattr(Static, "forward", lambda self, x: self.fc(x))
    assert torch.equal(model(x), model.fc(x))
    del model.mask
    assert torch.equal(model(x), model.fc(x))


def test_undo_refuses_to_break_a_pinned_module_that_was_changed_meanwhile() -> None:
    model, x = zoo.scramble(Tempered()), torch.randn(4, 3)
    model.register_parameter("extra", nn.Parameter(torch.randn(3)))
    handle = freeze_backbone(model, head=["fc", "extra"])
    nn.utils.parametrize.register_parametrization(model, "extra", nn.Tanh())
    out = model(x)
    with pytest.raises(FreezekitError, match="class of this layer was changed while it was frozen"):
        handle.undo()
    assert torch.equal(model(x), out)
    assert isinstance(model.extra, Tensor)


# -- classes of several kinds ---------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(3)
        self.bn2 = self.bn1
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.bn2(self.bn1(x)))


def test_a_layer_used_twice_is_held_once_and_for_both() -> None:
    model, x = zoo.scramble(Shared()), torch.randn(5, 3)
    handle = freeze_backbone(model, head="fc")
    bits = zoo.snapshot(model)
    model.train()(x)
    assert zoo.snapshot(model) == bits
    assert model.bn1 is model.bn2
    handle.undo()
    assert type(model.bn1) is nn.BatchNorm1d
    model(x)
    assert zoo.snapshot(model) != bits
