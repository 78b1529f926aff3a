"""A file judged alone: each fault is put in, and what is healthy stays silent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import test_mobilenet
import torch
import zoo
from torch import Tensor, nn

import freezekit
from freezekit import audit_checkpoint
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.findings import Finding
from freezekit.audit.health import health
from freezekit.audit.stale import feeders, stale
from freezekit.audit.state import OptimizerState, StateTable, Training

State = dict[str, Tensor]


def net() -> nn.Sequential:
    """Two convolutions with BN behind, as training leaves them."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip
    model(torch.randn(2, 3, 8, 8))
    zoo.scramble(model)
    for layer in (model[1], model[4]):
        layer.num_batches_tracked.fill_(500)
    return model


def table(state: State, tmp_path: Path, name: str = "a.pth") -> StateTable:
    torch.save(state, tmp_path / name)
    return read_checkpoint(tmp_path / name)


def told(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.code, finding.name, finding.message) for finding in findings]


def edited(**changes: Callable[[Tensor], object]) -> State:
    """The net's state with some tensors changed in place; ``_1_bias`` is ``1.bias``."""
    state = net().state_dict()
    for name, edit in changes.items():
        layer, own = name[1:].split("_", 1)
        edit(state[f"{layer}.{own}"])
    return state


def row(index: int, value: float) -> Callable[[Tensor], object]:
    return lambda tensor: tensor[index].fill_(value)


class TestHealthy:
    def test_a_trained_net(self, tmp_path: Path) -> None:
        assert health(table(net().state_dict(), tmp_path)) == []

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_freshly_trained_models(self, name: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = zoo.ZOO[name][0]()
        zoo.train(model, torch.optim.Adam(model.parameters()), zoo.images(name))
        assert health(table(model.state_dict(), tmp_path)) == []

    def test_a_frozen_backbone_and_what_it_came_from(self, tmp_path: Path) -> None:
        model = zoo.make("resnet18")
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(900)
        base = table(copy.deepcopy(model.state_dict()), tmp_path, "base.pth")
        freezekit.freeze_backbone(model)
        optimizer = torch.optim.Adam(freezekit.trainable_parameters(model))
        zoo.train(model, optimizer, zoo.images("resnet18"))
        after = table(model.state_dict(), tmp_path)
        assert health(after) == []
        assert stale(base, after) == []

    def test_torchvisions_own_file(self) -> None:
        if test_mobilenet.WEIGHTS is None:
            pytest.skip("the file is not installed")
        file = read_checkpoint(test_mobilenet.WEIGHTS)
        assert health(file) == []
        assert len(feeders(file)) == 52

    @pytest.mark.parametrize(
        "layer",
        [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)],
        ids=["group", "instance"],
    )
    def test_other_norms(self, layer: nn.Module, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8) + 1)
        assert health(table(model.state_dict(), tmp_path)) == []

    def test_weights_converted_without_a_count(self, tmp_path: Path) -> None:
        state = edited(_1_num_batches_tracked=Tensor.zero_, _4_num_batches_tracked=Tensor.zero_)
        assert health(table(state, tmp_path)) == []

    def test_half_precision(self, tmp_path: Path) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in net().state_dict().items()}
            assert health(table(state, tmp_path)) == []

    def test_a_filter_that_decayed_to_nothing(self, tmp_path: Path) -> None:
        """As in EfficientNet-Lite0: 1e-7 in the filter, no variance, and a weight above 1."""
        state = edited(_0_weight=row(2, 1e-7), _1_running_var=row(2, 0.0), _1_weight=row(2, 1.7))
        assert health(table(state, tmp_path)) == []

    def test_a_weight_that_is_pruned(self, tmp_path: Path) -> None:
        state = edited(_1_running_var=row(2, 5.6e-45), _1_weight=row(2, 0.002))
        assert health(table(state, tmp_path)) == []


class TestCounters:
    def test_the_parts_are_told(self, tmp_path: Path) -> None:
        def part() -> nn.Module:
            return nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.ModuleDict({"c": nn.BatchNorm1d(3)})})

        model = zoo.scramble(nn.ModuleDict({"encoder": part(), "decoder": part()}))
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(0 if name.startswith("encoder") else 5000)
        assert told(health(table(model.state_dict(), tmp_path))) == [
            ("FK404", "encoder", "encoder: 0; decoder: 5,000")
        ]
        wrapped = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
        assert told(health(table(wrapped, tmp_path))) == [
            ("FK404", "net.encoder", "net.encoder: 0; net.decoder: 5,000")
        ]

    def test_a_layer_that_was_never_trained_is_told_once(self, tmp_path: Path) -> None:
        state = zoo.make("resnet18").state_dict()
        for name in state:
            if name.endswith("num_batches_tracked"):
                state[name].fill_(70)
        for own, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0)):
            state[f"layer1.0.bn1.{own}"].fill_(value)
        state["layer1.0.bn1.num_batches_tracked"].zero_()
        assert [f.code for f in health(table(state, tmp_path))] == ["FK403"]
        # with batches counted, the counter is a riddle of its own
        state["layer1.0.bn1.num_batches_tracked"].fill_(3)
        assert [f.code for f in health(table(state, tmp_path))] == ["FK403", "FK404"]

    def test_one_layer_inside_a_part(self, tmp_path: Path) -> None:
        state = zoo.make("resnet18").state_dict()
        for name in state:
            if name.endswith("num_batches_tracked"):
                state[name].fill_(70)
        state["layer2.0.bn2.num_batches_tracked"].fill_(71)
        assert told(health(table(state, tmp_path))) == [
            ("FK404", "layer2.0.bn2", "bn1, layer1, layer2.0.bn1 and 4 more: 70; layer2.0.bn2: 71")
        ]

    def test_many_counts(self, tmp_path: Path) -> None:
        state = zoo.scramble(nn.ModuleDict({name: nn.BatchNorm1d(2) for name in "abcdef"})).state_dict()
        for count, name in enumerate("abcdef"):
            state[f"{name}.num_batches_tracked"].fill_(count)
        (finding,) = health(table(state, tmp_path))
        assert finding.message == "a: 0; b: 1; c: 2; d: 3; and 2 other counts"

    def test_a_layer_whose_name_begins_anothers(self, tmp_path: Path) -> None:
        state = zoo.scramble(nn.ModuleDict({"a": nn.BatchNorm1d(2)})).state_dict()
        state |= {f"a.b.{name.removeprefix('a.')}": tensor.clone() for name, tensor in state.items()}
        state["a.num_batches_tracked"].fill_(1)
        state["a.b.num_batches_tracked"].fill_(2)
        (finding,) = health(table(state, tmp_path))
        assert finding.message == "a: 1; a.b: 2"


class TestInitial:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (
                {"num_batches_tracked": 500},
                ("FK403", "running_mean is all 0 and running_var all 1 (num_batches_tracked is 500)"),
            ),
            (
                {"num_batches_tracked": 0, "weight": 1, "bias": 0},
                (
                    "FK403",
                    "running_mean is all 0 and running_var all 1 (num_batches_tracked is 0), and its weight "
                    "and bias are initial too",
                ),
            ),
            # mmdetection's Caffe weights, RAFT-Stereo: trained so
            (
                {"num_batches_tracked": 0},
                (
                    "FK409",
                    "running_mean is all 0 and running_var all 1 (num_batches_tracked is 0), though its "
                    "weight and bias were trained",
                ),
            ),
        ],
    )
    def test_a_layer(self, changes: dict[str, float], expected: tuple[str, str], tmp_path: Path) -> None:
        state = edited(_1_running_mean=Tensor.zero_, _1_running_var=lambda t: t.fill_(1))
        for name, value in changes.items():
            state[f"1.{name}"].fill_(value)
        found = [(f.code, f.message) for f in health(table(state, tmp_path)) if f.code != "FK404"]
        assert found == [expected]

    def test_without_a_counter(self, tmp_path: Path) -> None:
        state = edited(_1_running_mean=Tensor.zero_, _1_running_var=lambda t: t.fill_(1))
        del state["1.num_batches_tracked"]
        assert [f.code for f in health(table(state, tmp_path))] == ["FK409"]
        del state["1.weight"], state["1.bias"]  # nothing else could have been trained
        assert [f.code for f in health(table(state, tmp_path))] == ["FK403"]

    def test_some_channels(self, tmp_path: Path) -> None:
        state = edited(
            _1_running_mean=lambda t: t[:3].zero_(), _1_running_var=lambda t: t[:3].fill_(1)
        )  # the fourth is near it, as data may be
        state["1.running_mean"][3], state["1.running_var"][3] = 0, 0.99
        assert told(health(table(state, tmp_path))) == [
            (
                "FK409",
                "1",
                "3 of 8 channels have mean 0 and variance 1 (num_batches_tracked is 500), the others "
                "have not",
            )
        ]

    def test_one_channel(self, tmp_path: Path) -> None:
        layer = zoo.scramble(nn.BatchNorm1d(1))
        layer.running_mean.zero_()
        layer.running_var.fill_(1)
        layer.num_batches_tracked.fill_(9)
        assert told(health(table(layer.state_dict(), tmp_path))) == [
            ("FK409", "", "its one channel has mean 0 and variance 1 (num_batches_tracked is 9)")
        ]
        layer.reset_parameters()
        assert [f.code for f in health(table(layer.state_dict(), tmp_path))] == ["FK403"]


class TestVariances:
    def test_channels_that_were_constant(self, tmp_path: Path) -> None:
        def once(tensor: Tensor) -> None:
            tensor[2] = torch.tensor([0.5] * 27).reshape(3, 3, 3)
            tensor[5] = 0.1

        state = edited(
            _0_weight=once,
            _1_running_var=lambda t: (row(2, 0.0)(t), row(5, 3e-40)(t)),
            _1_running_mean=row(5, 0.0),
            _1_weight=lambda t: (row(2, 2.0)(t), row(5, 1.0)(t)),
        )
        assert told(health(table(state, tmp_path))) == [
            (
                "FK405",
                "1",
                "2 of 8 channels had no variance (at most 3e-40, 1 with mean 0) though the filter is not 0: "
                "an input of 1 comes out as up to 8,538 if eps is 1e-5",
            )
        ]

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                {"_1_running_var": row(3, 1e20)},
                "1 of 8 channels are beyond what float16 holds: mean 0.3, standard deviation 1e+10 at most",
            ),
            (
                {"_1_running_var": lambda t: t.fill_(0.01).index_fill_(0, torch.tensor([1]), 1e5)},
                "1 of 8 channels have a standard deviation of up to 316, where the median of the layer is "
                "0.1",
            ),
            (
                {"_1_running_var": row(3, 1e-4), "_1_running_mean": row(3, -40.0)},
                "the mean of 1 of 8 channels is up to 3,814 standard deviations from 0: too few digits are "
                "left of what is not the mean",
            ),
        ],
        ids=["overflow", "beside the others", "cancellation"],
    )
    def test_out_of_range(
        self, edit: dict[str, Callable[[Tensor], object]], message: str, tmp_path: Path
    ) -> None:
        state = edited(**edit)
        if "float16" in message:
            state["1.running_mean"][3] = 0.3
        assert told(health(table(state, tmp_path))) == [("FK406", "1", message)]

    def test_they_are_warnings(self, tmp_path: Path) -> None:
        torch.save(edited(_1_running_var=row(3, 1e20)), tmp_path / "a.pth")
        assert audit_checkpoint(tmp_path / "a.pth").clean


def trained_table(count: int, steps: dict[str, int], tmp_path: Path) -> StateTable:
    state = net().state_dict()
    for layer in "14":
        state[f"{layer}.num_batches_tracked"].fill_(count)
    file = table(state, tmp_path)
    names = dict(enumerate(steps))
    file.training = Training(
        optimizers=(OptimizerState("opt", (tuple(names),), names, {}, dict(enumerate(steps.values()))),)
    )
    return file


class TestTrainedPast:
    every = ("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias")

    def test_fewer_batches_than_steps(self, tmp_path: Path) -> None:
        file = trained_table(40, dict.fromkeys(self.every, 5000), tmp_path)
        assert told(health(file)) == [
            (
                "FK407",
                "1",
                "num_batches_tracked is 40 here and in 1 other layer, while the weights before were stepped "
                "5,000 times: it was set back (reset or calibrated), or in eval mode meanwhile",
            )
        ]

    @pytest.mark.parametrize(
        ("count", "steps"),
        [
            (5000, dict.fromkeys(every, 5000)),
            (20000, dict.fromkeys(every, 5000)),  # gradients were accumulated, or it was pretrained
            (40, {"0.weight": 5000, "3.weight": 5000}),  # FrozenBatchNorm2d
            (40, dict.fromkeys(("1.weight", "1.bias", "4.weight", "4.bias"), 5000)),  # bn="freeze_stats"
            (40, {"7.weight": 5000, "7.bias": 5000}),  # the head alone
        ],
    )
    def test_silent(self, count: int, steps: dict[str, int], tmp_path: Path) -> None:
        assert health(trained_table(count, steps, tmp_path)) == []

    @pytest.mark.parametrize("how", ["evaluated", "trained", "frozen"])
    def test_files_with_adam_in_them(self, how: str, tmp_path: Path) -> None:
        model = net()
        for layer in (model[1], model[4]):
            layer.num_batches_tracked.zero_()
        if how == "frozen":
            freezekit.freeze(model, ["1", "4"])
        optimizer = torch.optim.Adam(freezekit.trainable_parameters(model))
        for _ in range(7):
            model.train()
            if how == "evaluated":  # and no train() after the first validation
                model.train(int(model[1].num_batches_tracked) == 0)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content, tmp_path / "a.pth")
        found = told(health(read_checkpoint(tmp_path / "a.pth")))
        message = (
            "num_batches_tracked is 1 here and in 1 other layer, while the weights before were stepped 7 "
            "times: it was set back (reset or calibrated), or in eval mode meanwhile"
        )
        assert found == ([("FK407", "1", message)] if how == "evaluated" else [])


class TestStale:
    @pytest.mark.parametrize("how", ["eval", "train", "head", "stats"])
    def test_trained_in_eval_mode(self, how: str, tmp_path: Path) -> None:
        model = net()
        base = table(copy.deepcopy(model.state_dict()), tmp_path, "base.pth")
        if how == "head":
            freezekit.freeze(model, ["0", "1", "3", "4"])
        if how == "stats":
            freezekit.freeze(model, ["0", "1", "3", "4"], bn="freeze_stats")
        model.train(how != "eval")
        optimizer = torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        after = table(model.state_dict(), tmp_path)
        message = (
            "the statistics here and in 1 other layer are the base's bit for bit, while the weights before "
            "were trained: in eval mode during training"
        )
        assert told(stale(base, after)) == ([("FK408", "1", message)] if how == "eval" else [])
        meant = {f"{layer}.{own}" for layer in "14" for own in ("running_mean", "running_var")}
        assert stale(base, after, meant) == []

    def test_in_an_audit(self, tmp_path: Path) -> None:
        state = net().state_dict()
        torch.save(state, tmp_path / "base.pth")
        torch.save({**state, "0.weight": state["0.weight"] + 1}, tmp_path / "a.pth")
        report = audit_checkpoint(tmp_path / "a.pth", tmp_path / "base.pth")
        assert [(f.code, f.name) for f in report.findings] == [("FK408", "1")]
        assert report.clean
        assert audit_checkpoint(tmp_path / "a.pth", tmp_path / "base.pth", frozen=["1"]).findings == ()
