"""The behaviour probe: what it must see, what it must not, and that the loop never notices."""

from __future__ import annotations

import copy
import dataclasses
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

import freezekit
from freezekit.audit.findings import Finding
from freezekit.audit.live.probe import Probe
from freezekit.audit.live.region import Region
from freezekit.audit.live.sample import Sample
from freezekit.audit.live.trial import Trial


class Counting(nn.Module):
    """Gives more at each call: state that no buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight * self.calls


class Switched(nn.Module):
    """Does what a plain attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.skip else self.conv(x) + x


class GhostBN(nn.Module):
    """Normalises by groups of two samples, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.chunk(x.shape[0] // 2)
        return torch.cat([(g - g.mean((0, 2, 3), True)) / g.std((0, 2, 3), keepdim=True) for g in groups])


class Centring(nn.Module):
    """Mixes the batch in train mode, by no norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x - x.mean(0)
        return self.conv(x).relu_()


class TrainScaled(nn.Module):
    """Does something else in train mode, without chance and sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (2 if self.training else 1)


class AlwaysDropping(nn.Module):
    """Forgets to say training=self.training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.weight, 0.4, training=True)


class PythonNoise(nn.Module):
    """Draws its random numbers from elsewhere than torch."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.draw()


class Net(nn.Module):
    """A frozen backbone of some layers, and a head with dropout that trains."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), *layers, nn.Conv2d(3, 3, 1))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 2)
        zoo.scramble(self)
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x).mean((2, 3))))


def probed(model: nn.Module, *inputs: Any, times: int = 1, **named: Any) -> tuple[list[Finding], list[str]]:
    probe = Probe(Region(model))
    for _ in range(times):
        probe.arm()
        model(*inputs, **named)
        found = probe.run()
    return found, probe.notes


def images(batch: int = 6) -> Tensor:
    return torch.randn(batch, 3, 8, 8) * torch.linspace(0.5, 2, batch)[:, None, None, None] + 0.3


def seen(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.code, finding.name) for finding in found]


FAULTS: dict[str, tuple[Callable[[], nn.Module], str, str | None, str]] = {
    "batch norm in train mode": (
        lambda: nn.BatchNorm2d(3, affine=False), "FK201", "train-mode forward", "sample 0 changed",
    ),
    "batch norm without momentum": (
        lambda: nn.BatchNorm2d(3, momentum=None), "FK201", "train-mode forward", "in train mode",
    ),
    "batch norm without statistics": (
        lambda: nn.BatchNorm2d(3, track_running_stats=False), "FK201", None, "in eval mode too",
    ),
    "ghost batch norm": (GhostBN, "FK201", None, "in eval mode too"),
    "centring": (Centring, "FK201", "train-mode forward", "sample 0 changed"),
    "dropout": (lambda: nn.Dropout(0.3), "FK202", "train-mode forward", "random numbers"),
    "dropout of channels": (lambda: nn.Dropout2d(0.3), "FK202", "train-mode forward", "random numbers"),
    "drop path": (lambda: StochasticDepth(0.01, "row"), "FK202", "train-mode forward", "random numbers"),
    "dropout whatever the mode": (AlwaysDropping, "FK202", None, "random numbers"),
    "python's chance": (lambda: PythonNoise(random.random), "FK202", None, "random numbers"),
    "numpy's chance": (lambda: PythonNoise(lambda: np.random.rand()), "FK202", None, "random numbers"),
    "counter": (Counting, "FK203", None, "the same batch again"),
    "other scale": (TrainScaled, "FK203", "train-mode forward", "from that in eval mode"),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_by_layer(fault: str, batch: int) -> None:
    make, code, cause, message = FAULTS[fault]
    if fault == "ghost batch norm" and batch in (1, 3):
        pytest.skip("it needs groups of two")
    model = Net(nn.ReLU(inplace=True), make(), nn.ReLU(inplace=True))
    found, notes = probed(model.train(), images(batch))
    assert (seen(found), notes) == ([(code, "body.2")], [])
    assert message in found[0].message
    assert (found[0].cause and found[0].cause.kind) == cause
    assert found[0].fix


@pytest.mark.parametrize("fault", FAULTS)
def test_every_layer_is_named_and_no_other(fault: str) -> None:
    make, code, _, _ = FAULTS[fault]
    model = Net(nn.Sequential(make(), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), make(), nn.BatchNorm2d(3))
    model.body[2].eval()
    found, _ = probed(model.train(), images())
    expected = {(code, "body.1.0"), (code, "body.3"), ("FK201", "body.2"), ("FK201", "body.4")}
    assert set(seen(found)) == expected
    assert len(found) == 4


SOUND: dict[str, Callable[[], nn.Module]] = {
    "batch norm in eval mode": lambda: freezekit.nn.FrozenBatchNorm2d(3),
    "instance norm": lambda: nn.InstanceNorm2d(3, affine=True),
    "layer norm": lambda: nn.LayerNorm(8),
    "group norm": lambda: nn.GroupNorm(1, 3),
    "local response norm": lambda: nn.LocalResponseNorm(2),
    "dropout that drops nothing": lambda: nn.Dropout(0.0),
    "switched": Switched,
    "softmax": lambda: nn.Softmax(1),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("layer", SOUND)
def test_sound_layers_are_left_alone(layer: str, batch: int) -> None:
    model = Net(SOUND[layer](), nn.ReLU())
    assert probed(model.train(), images(batch), times=3) == ([], [])


# ---- against what was given at first ----


def test_a_setting_that_changes_is_named_with_the_layer_that_has_it() -> None:
    model = Net(nn.Sequential(Switched(), nn.ReLU()), Switched())
    probe = Probe(Region(model))
    x = images()
    for step in range(4):
        probe.arm()
        model(x if step < 3 else images(2))
        found = probe.run()
        if step < 2:
            assert found == []
            model.body[1][0].skip = step == 1
    assert seen(found) == [("FK203", "body.1.0")]
    assert "inputs of the first probe changed by up to" in found[0].message
    assert probe.notes == []


def test_moved_statistics_are_named_by_layer_and_moved_weights_by_the_whole() -> None:
    model = Net(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    model.eval()
    probe = Probe(Region(model))

    def step() -> list[tuple[str, str]]:
        probe.arm()
        model(images())
        return seen(probe.run())

    assert step() == []
    model.body[3].running_mean[1] += 0.1
    assert step() == [("FK203", "body.3")]
    model.body[3].running_mean[1] -= 0.1
    assert step() == []
    model.body[0].weight.data[0, 0, 0, 0] += 0.1
    assert step() == [("FK203", "body")]
    model.body[0].weight.data[0, 0, 0, 0] -= 0.1
    assert step() == []
    model.half().float()
    assert probe.notes == []


def test_a_mode_that_changes_later_is_seen_then() -> None:
    model = Net(nn.BatchNorm2d(3), nn.Dropout(0.2))
    probe = Probe(Region(model))
    for mode, expected in ((False, []), (True, [("FK201", "body.1"), ("FK202", "body.2")]), (False, [])):
        model.train(mode)
        probe.arm()
        before = copy.deepcopy(model.body[1].state_dict())
        model(images())
        model.body[1].load_state_dict(before)
        assert seen(probe.run()) == expected


def test_another_precision_is_no_change() -> None:
    model = Net(nn.ReLU()).eval()
    probe = Probe(Region(model))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.bfloat16):
        model.to(dtype)
        probe.arm()
        model(images().to(dtype))
        assert probe.run() == []
    assert probe.notes == []


# ---- no trace ----


def everything(model: nn.Module) -> list[Any]:
    """All that a probe could leave behind, in a form that compares."""
    found: list[Any] = [
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state().tolist(),
    ]
    found += [random.getstate(), repr(np.random.get_state()[1].tolist()), torch.is_autocast_cache_enabled()]
    found += [
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.benchmark,
        len(warnings.filters),
    ]
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"):
        table = getattr(nn.modules.module, f"_global_{name}")
        found.append((id(table), list(table.items())))
    for path, module in model.named_modules():
        found.append((path, id(module), type(module), module.training, list(vars(module))))
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found.append((key, id(value), [(k, id(v)) for k, v in value.items()]))
            elif not isinstance(value, Tensor):
                found.append((key, id(value), repr(value)))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        found.append((name, id(tensor), tensor._version, tensor.data_ptr(), tensor.tolist(), grad))
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_trace(fault: str, training: bool) -> None:
    model = Net(FAULTS[fault][0](), nn.BatchNorm2d(3), nn.Dropout(0.1)).train(training)
    model.body[0].register_forward_hook(lambda *_: None)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    probe = Probe(Region(model))
    try:
        for _ in range(2):
            probe.arm()
            model(images(3)).sum().backward()
            assert not nn.modules.module._global_forward_pre_hooks
            before = everything(model)
            probe.run()
            assert everything(model) == before
    finally:
        handle.remove()


@pytest.mark.parametrize("fault", FAULTS)
def test_training_with_a_probe_at_every_step_is_training_without(fault: str) -> None:
    def trained(probing: bool) -> list[Any]:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        model = Net(FAULTS[fault][0](), nn.BatchNorm2d(3), nn.Dropout(0.2)).train()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        probe = Probe(Region(model))
        for _ in range(4):
            optimizer.zero_grad()
            if probing:
                probe.arm()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(images(4)).square().mean()
            loss.backward()
            optimizer.step()
            if probing:
                assert probe.run() or fault not in FAULTS
        return [tensor.tolist() for tensor in model.state_dict().values()] + [torch.get_rng_state().tolist()]

    assert trained(True) == trained(False)


def test_a_call_between_forward_and_backward_disturbs_no_gradient() -> None:
    model = Net(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    model.body[0].requires_grad_(True)
    probe = Probe(Region(model))
    gradients = []
    for probing in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        probe.arm()
        loss = model(images()).square().sum()
        if probing:
            assert probe.run()
        loss.backward()
        gradients.append(model.body[0].weight.grad.clone())
    assert torch.equal(*gradients)


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, max_norm=1.0)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.table(ids))


def test_a_layer_that_writes_to_its_parameters_writes_to_copies() -> None:
    model = nn.ModuleDict({"body": Renormed(), "head": nn.Linear(4, 2)})
    model["body"].requires_grad_(False)
    model["body"].eval()
    probe = Probe(Region(model))
    probe.arm()
    model["body"](torch.tensor([0, 1, 2]))
    weight = model["body"].table.weight
    weight.data.mul_(7)
    bits, version = weight.clone(), weight._version
    assert probe.run() == []
    assert weight._version == version
    assert torch.equal(weight, bits)


# ---- whatever a layer is given ----


@dataclasses.dataclass
class Given:
    x: Tensor
    scale: float


class Cache:
    """A plain object that a forward appends to, as transformers' cache of keys and values."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []


class Eager(nn.Module):
    """Takes what it is given apart, runs its norm, and gives back a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.table = nn.Embedding(9, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        total: Tensor = torch.zeros(())
        for item in (*args, *kwargs.values()):
            total = total + self.total(item)
        return {"out": (self.norm(total), None), "given": Given(total, 2.0), "names": ["a", 1]}

    def total(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return item if item.is_floating_point() else self.table(item)
        if isinstance(item, dict):
            return sum(self.total(held) for held in item.values())
        if isinstance(item, (list, tuple)):
            return sum(self.total(held) for held in item)
        if isinstance(item, Given):
            return item.x * item.scale
        if isinstance(item, Cache):
            item.held.append(torch.ones(1))
            return float(len(item.held))
        return 0.0


INPUTS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "by name": lambda: ((), {"x": torch.randn(6, 4), "mask": None}),
    "nested": lambda: (
        ([torch.randn(6, 4), (torch.randn(6, 4), None, "a")],),
        {"d": {"e": torch.randn(1, 4)}},
    ),
    "dataclass": lambda: ((Given(torch.randn(6, 4), 3.0),), {}),
    "token ids": lambda: ((torch.randint(0, 9, (6,)),), {"flags": (torch.randn(6, 4), True, torch.float32)}),
    "cache": lambda: ((torch.randn(6, 4),), {"cache": Cache()}),
    "with a graph": lambda: ((torch.randn(6, 4, requires_grad=True) * 2,), {}),
    "one row": lambda: ((torch.randn(1, 4),), {}),
}


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("training", [False, True])
def test_inputs_of_every_kind(given: str, training: bool) -> None:
    model = nn.ModuleDict({"body": Eager(), "head": nn.Linear(4, 2)})
    zoo.scramble(model)
    model["body"].requires_grad_(False)
    training = training and given != "one row"
    model["body"].train(training)
    args, kwargs = INPUTS[given]()
    probe = Probe(Region(model))
    for _ in range(2):
        probe.arm()
        model["body"](*args, **kwargs)
        found = probe.run()
    if given == "cache":  # it was longer at the second call, in the loop too
        assert len(kwargs["cache"].held) == 2
    assert seen(found) == ([("FK201", "body.norm")] if training else [])
    assert probe.notes == []


def test_a_layer_called_several_times_a_forward() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.body(x)) + self.body(x.flip(2))

    model = nn.ModuleDict({"inner": Twice(), "head": nn.Linear(3, 2)})
    zoo.scramble(model)
    model["inner"].requires_grad_(False)
    for training, expected in ((True, [("FK201", "inner.body.1")]), (False, [])):
        model["inner"].train(training)
        probe = Probe(Region(model))
        for _ in range(2):
            probe.arm()
            model["inner"](images())
            found = probe.run()
        assert (seen(found), probe.notes) == (expected, [])


def test_layers_that_are_iterated_over_are_probed_one_by_one() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)])
            self.then = nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1)
            )
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in [*self.first, *self.then]:
                x = layer(x)
            return self.head(x.mean((2, 3)))

    model = Listed()
    model.first.requires_grad_(False)
    model.then.requires_grad_(False)
    for times in (1, 2):
        assert seen(probed(model, images(), times=times)[0]) == [("FK201", "first.0"), ("FK201", "then.0.1")]


def test_the_first_step_tells_of_a_backbone_whose_methods_are_called() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
            self.drop = nn.Dropout(0.5)

        def forward_features(self, x: Tensor) -> Tensor:
            return self.drop(self.stem(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_features(x).mean((2, 3))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone().requires_grad_(False)
            self.head = nn.Linear(3, 2)
            self.through = Backbone.forward_features

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.through(self.backbone, x).mean((2, 3)))

    model = Whole()
    expected = [("FK201", "backbone.stem.1"), ("FK202", "backbone.drop")]
    assert seen(probed(model, images(), times=1)[0]) == expected
    # a part that is called beside its backbone is no reason to probe it apart: what is around it counts too
    model.through = lambda backbone, x: backbone.drop(x) + backbone(x)[..., None, None]
    probe = Probe(Region(model))
    probe.arm()
    model(images())
    assert list(probe._parts) == ["backbone.drop"]
    assert seen(probe.run()) == expected
    assert probe._done == {"backbone"}


def test_layers_that_are_never_called_end_nothing() -> None:
    class Reaching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.conv2d(x, self.shelf[0].board.weight))

    model = Reaching(nn.BatchNorm2d(3))
    board = nn.ModuleDict({"board": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3)})
    model.shelf = nn.Sequential(nn.Sequential(board)).requires_grad_(False)
    model.shelf[0] = board
    probe = Probe(Region(model))
    found = []
    for _ in range(9):
        probe.arm()
        model(images())
        found.append(seen(probe.run()))
    assert found[0] == found[-1] == [("FK201", "body.1")]
    assert probe.notes == ["not probed: shelf.0.norm (no call was seen)"]


def test_a_batch_that_cannot_be_cut_is_probed_whole_the_next_time() -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.view(6, *x.shape[1:]))

    model = Net(Paired())
    assert probed(model, images()) == ([], [])
    found, notes = probed(model, images(), times=2)
    assert (seen(found), notes) == ([("FK201", "body.1.norm")], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast(dtype: torch.dtype, training: bool) -> None:
    model = Net(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 3))
    model.train(training)
    probe = Probe(Region(model))
    for _ in range(3):
        probe.arm()
        with torch.autocast("cpu", dtype):
            model(images().contiguous(memory_format=torch.channels_last))
        found = probe.run()
        assert seen(found) == ([("FK201", "body.2")] if training else [])
    assert probe.notes == []


def test_checkpointed_and_wrapped_models() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x.requires_grad_()
            return self.head(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))

    model = Checkpointed(nn.BatchNorm2d(3))
    probe = Probe(Region(model))
    probe.arm()
    model(images()).sum().backward()
    assert seen(probe.run()) == [("FK201", "body.1")]

    wrapped = nn.DataParallel(Net(nn.BatchNorm2d(3)))
    found, notes = probed(wrapped, images())
    assert (seen(found), notes) == ([("FK201", "module.body.1")], [])


@pytest.mark.parametrize("first", [False, True])
def test_a_compiled_model_is_neither_probed_nor_disturbed(first: bool) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = Net(nn.BatchNorm2d(3))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    if first:
        compiled(images())
    whole, inner = Probe(Region(compiled)), Probe(Region(model))
    for probe in (inner, whole):
        for _ in range(6):
            probe.arm()
            compiled(images())
            assert probe.run() == []
            assert not nn.modules.module._global_forward_pre_hooks
            assert "global hooks" not in str(warnings.filters)
    assert whole.notes == ["not probed: the model (compiled)"]
    assert inner.notes == ["not probed: no call was seen"]
    assert len(graphs) <= 3


def test_a_model_frozen_whole() -> None:
    model = Net(nn.BatchNorm2d(3)).requires_grad_(False)
    assert seen(probed(model, images())[0]) == [("FK201", "body.1"), ("FK202", "drop")]
    wrapped = nn.DataParallel(model)
    assert seen(probed(wrapped, images())[0]) == [("FK201", "module.body.1"), ("FK202", "module.drop")]


# ---- what cannot be probed ----


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Once(nn.Module):
    """Breaks when it is run a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs > 1:
            raise RuntimeError("once is enough")
        return self.norm(x)


def borrowed() -> nn.Module:
    """A forward put on a layer that runs the original's."""
    layer = nn.BatchNorm2d(3)
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2
    return layer


def roundabout() -> nn.Module:
    layer = nn.Sequential(nn.BatchNorm2d(3))
    holder = [layer[0]]

    class Elsewhere(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return holder[0](x)

    layer.append(Elsewhere())
    return layer


UNPROBED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lock": (Locked, "cannot be copied: TypeError: cannot pickle"),
    "once": (Once, "RuntimeError: once is enough"),
    "borrowed forward": (borrowed, "forward was put on it"),
    "roundabout": (roundabout, "its copy calls the original's layers"),
}


@pytest.mark.parametrize("layer", UNPROBED)
def test_what_cannot_be_probed_is_said_once_and_breaks_nothing(layer: str) -> None:
    make, why = UNPROBED[layer]
    model = Net(make())
    model.other = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).requires_grad_(False)
    probe = Probe(Region(model))
    for _ in range(3):
        if layer == "once":
            model.body[1].runs = 0
        probe.arm()
        model.other(images(3))
        model(images(3))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = probe.run()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert seen(found) == [("FK201", "other.1")]
    (note,) = probe.notes
    assert note.startswith(f"not probed: body ({why}")


def test_a_model_of_which_nothing_is_called() -> None:
    model = Net()
    probe = Probe(Region(model))
    assert probe.run() == []
    probe.arm()
    assert probe.run() == []
    assert probe.notes == ["not probed: no call was seen"]
    assert not nn.modules.module._global_forward_pre_hooks


def test_what_one_cannot_know_to_be_a_batch_is_no_finding() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)  # its first axis is the place in the line
    model = nn.ModuleDict({"body": layer, "lstm": nn.LSTM(8, 8), "head": nn.Linear(8, 2)})
    model["body"].requires_grad_(False)
    model["lstm"].requires_grad_(False)
    probe = Probe(Region(model))
    for _ in range(2):
        probe.arm()
        model["lstm"](model["body"](torch.randn(5, 3, 8)))
        assert probe.run() == []
    assert [note.partition(":")[0] for note in probe.notes] == ["body.self_attn"]


def test_rows_of_a_batch_exchanged_by_numbers_of_the_loop_alone() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
            assert set(ids.flatten().tolist()) <= {3, 17, 28, 39}
            assert set(mask.flatten().tolist()) <= {0.0, float("-inf")}
            assert set(where.flatten().tolist()) <= {7}
            return self.norm((self.table(ids) + where[..., None]).sum(1).nan_to_num())

    model = nn.ModuleDict({"body": Picky(), "head": nn.Linear(4, 2)})
    model["body"].requires_grad_(False)
    for batch in (1, 2, 5):
        ids = torch.tensor([[3, 17], [39, 28], [17, 17], [28, 3], [3, 3]])[:batch]
        mask = torch.tensor([[0.0, float("-inf")]]).expand(batch, 2)
        model["body"].train(batch > 1)
        probe = Probe(Region(model))
        probe.arm()
        model["body"](ids, mask, torch.full((1, 2), 7))
        assert (seen(probe.run()), probe.notes) == ([("FK201", "body.norm")] if batch > 1 else [], [])


def test_synchronised_norms_are_judged_in_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.SyncBatchNorm(3).requires_grad_(False)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda *_: pytest.fail("it would wait for the others"))
    sample = Sample.of(layer, (images(),), {}, whole=False)
    trial = Trial(layer, layer, sample, lambda *_: True)
    trial.look(first=True)
    assert [(path, seen.code) for path, seen in trial.found] == [("", "FK201")]


def test_inputs_take_turns_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freezekit.audit.live.probe._ROOM", 1)
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)), nn.Conv2d(3, 2, 1))
    model[:3].requires_grad_(False)
    probe = Probe(Region(model))
    turns = []
    for _ in range(4):
        probe.arm()
        model(images())
        turns.append(seen(probe.run()))
    assert turns == [[("FK201", "0")], [("FK201", "1")], [("FK201", "2")], [("FK201", "0")]]
    assert probe.notes == []


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_frozen_by_us_is_clean_and_frozen_by_hand_is_not(name: str) -> None:
    model = zoo.make(name)
    by_hand = copy.deepcopy(model)
    freezekit.freeze_backbone(model)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    assert probed(model.train(), zoo.images(name), times=2) == ([], [])
    found, notes = probed(by_hand.train(), zoo.images(name))
    assert notes == []
    kinds = (nn.modules.batchnorm._BatchNorm, nn.Dropout, nn.MultiheadAttention, StochasticDepth)
    for finding in found:
        layer = by_hand.get_submodule(finding.name)
        assert isinstance(layer, kinds)
        assert finding.code == ("FK201" if isinstance(layer, kinds[0]) else "FK202")
    norms = [n for n, m in by_hand.named_modules() if isinstance(m, kinds[0])]
    assert [finding.name for finding in found if finding.code == "FK201"] == norms


def test_hooks_of_the_user_are_neither_copied_nor_called() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.calls = 0

        def hook(self, *_: Any) -> None:
            self.calls += 1

    trainer = Trainer()
    model = Net(nn.BatchNorm2d(3))
    model.body[1].register_forward_hook(trainer.hook)
    model.body.register_forward_pre_hook(trainer.hook)
    found, notes = probed(model, images())
    assert (seen(found), notes, trainer.calls) == ([("FK201", "body.1")], [], 2)


def test_masked_attention_gives_the_same_in_both_modes() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2), "head": nn.Linear(8, 2)})
    model["body"].requires_grad_(False)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    probe = Probe(Region(model))
    for _ in range(2):
        probe.arm()
        model["body"](torch.randn(3, 5, 8), src_key_padding_mask=mask)
        assert (probe.run(), probe.notes) == ([], [])


def test_within_autocast_of_the_loop_no_cast_without_gradient_stays_behind() -> None:
    model = Net(nn.ReLU()).requires_grad_(True)
    probe = Probe(Region(model, frozen="body.*"))
    with torch.autocast("cpu", torch.bfloat16):
        probe.arm()
        model.eval()(images())
        torch.clear_autocast_cache()
        assert probe.run() == []
        model(images()).sum().backward()
    assert model.body[0].weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_on_cuda(dtype: torch.dtype | None) -> None:
    def step(model: nn.Module, probe: Probe) -> list[tuple[str, str]]:
        probe.arm()
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            model(images().cuda())
        random_state = torch.cuda.get_rng_state()
        found = seen(probe.run())
        assert torch.equal(torch.cuda.get_rng_state(), random_state)
        assert probe.notes == []
        return found

    faulty = Net(nn.BatchNorm2d(3), nn.Dropout(0.3), Counting()).cuda()
    probe = Probe(Region(faulty))
    expected = [("FK201", "body.1"), ("FK202", "body.2"), ("FK203", "body.3")]
    assert step(faulty, probe) == step(faulty, probe) == expected
    for name in zoo.ZOO:
        model = zoo.make(name).cuda()
        freezekit.freeze_backbone(model)
        probe = Probe(Region(model.train()))
        for _ in range(3):
            probe.arm()
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                model(zoo.images(name).cuda())
            assert (probe.run(), probe.notes) == ([], [])
