"""The state dict is found wherever training code puts it, and its names are the model's."""

import argparse
import collections
import datetime
import decimal
import enum
import pathlib
import re

import numpy as np
import pytest
import torch

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.limits import Limits
from freezekit.errors import CheckpointError

W = {"a.weight": torch.full((2,), 1.0), "a.bias": torch.full((3,), 2.0), "bn.running_mean": torch.zeros(2)}
OPTIMIZER = {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
OTHER = {name: tensor + 10 for name, tensor in W.items()}


class AttributeDict(dict):
    """As Lightning has it."""


class Colour(enum.Enum):
    RED = "red"


class ShardedTensor:
    """As torch.distributed has it: the values are in its state."""


class Config:
    class Nested(enum.Enum):
        ONE = 1

    def __init__(self):
        self.lr, self.nested = 0.1, Config.Nested.ONE
        self.me = self


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1, bias=False)
        self.bn = torch.nn.BatchNorm2d(4)
        self.twin = self.bn
        self.scale = torch.nn.Parameter(torch.randn(2))
        self.register_buffer("anchors", torch.randn(3))
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.register_buffer("nothing", None)
        self.act = torch.nn.functional.relu

    def hook(self, module, args):
        return None


def save(obj, path, form="zip"):
    torch.save(obj, path, _use_new_zipfile_serialization=form == "zip")
    return read_checkpoint(path)


def assert_holds(table, state):
    assert {name: tensor.values().tolist() for name, tensor in table.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    assert list(table) == list(state)


def test_wellknown_keys(tmp_path):
    for index, key in enumerate(
        ("state_dict", "model_state_dict", "model", "net", "ema", "teacher", "encoder")
    ):
        table = save({"epoch": 3, key: W, "optimizer": OPTIMIZER}, tmp_path / str(index))
        assert_holds(table, W)
        assert table.notes == ()


def test_nested_wellknown_keys(tmp_path):
    assert_holds(save({"model": {"state_dict": {"net": W}, "args": 1}, "epoch": 2}, tmp_path / "a"), W)


def test_a_few_tensors_beside_do_not_hide_the_state(tmp_path):
    assert_holds(save({"state_dict": W, "loss": torch.ones(1)}, tmp_path / "a"), W)


def test_first_of_several_with_a_note(tmp_path):
    table = save({"ema": OTHER, "model": W, "optimizer": {}}, tmp_path / "a")
    assert_holds(table, W)
    assert table.notes == ("also holds: ema (no BN layers); read 'model', --root NAME reads another",)
    table = save({"teacher": OTHER, "student": W}, tmp_path / "b")
    assert_holds(table, W)
    assert table.notes == ("also holds: teacher (no BN layers); read 'student', --root NAME reads another",)


def test_unknown_key_is_found_by_search(tmp_path):
    big = {f"m.{i}": torch.ones(1) for i in range(5)}
    table = save({"things": [1, {"inner": big}], "small": {"x": torch.ones(1)}, "lr": 0.1}, tmp_path / "a")
    assert_holds(table, big)
    assert table.notes == (
        "also holds: small (no BN layers); read 'things.1.inner', --root NAME reads another",
    )


def test_entries_that_are_no_tensors_are_noted(tmp_path):
    table = save({**W, "version": 2, "_extra_state": None, "b._extra_state": {"x": 1}}, tmp_path / "a")
    assert_holds(table, W)
    assert table.notes == ("skipped entries that are not tensors: version, _extra_state, b._extra_state",)


def test_foreign_kind_of_tensor_is_not_left_out(tmp_path):
    class Wrapped:
        def __init__(self, inner):
            self.inner = inner

        def __reduce__(self):
            return Colour, (self.inner,)

    sharded = ShardedTensor()
    sharded.local = torch.ones(3)
    table = save({**W, "packed": Wrapped(torch.ones(3)), "sharded": sharded}, tmp_path / "a")
    assert table["packed"].unsupported == "kind of tensor, made by test_ckpt_roots.Colour"
    assert table["sharded"].unsupported == "kind of tensor, made by test_ckpt_roots.ShardedTensor"
    for name in ("packed", "sharded"):
        with pytest.raises(CheckpointError, match=f"values of {name} cannot be read"):
            table[name].read()


@pytest.mark.parametrize(
    "prefixed",
    [
        {f"module.{name}": tensor for name, tensor in W.items()},
        {f"_orig_mod.{name}": tensor for name, tensor in W.items()},
        {f"module._orig_mod.{name}": tensor for name, tensor in W.items()},
        {f"_orig_mod.module.{name}": tensor for name, tensor in W.items()},
        {name.replace("a.", "a._orig_mod."): tensor for name, tensor in W.items()},
    ],
    ids=lambda state: next(iter(state)),
)
def test_prefixes(prefixed, tmp_path):
    table = save(prefixed, tmp_path / "a")
    assert_holds(table, W)
    assert all("stripped" in note for note in table.notes)
    assert len(table.notes) >= 1


def test_module_prefix_of_only_some_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    table = save(state, tmp_path / "a")
    assert_holds(table, state)
    assert table.notes == ()


def test_averaged_model(tmp_path):
    model = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1))
    assert list(save(model.state_dict(), tmp_path / "a")) == ["n_averaged", "weight", "bias"]


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a checkpoint"])
def test_whole_module(wrapped, form, tmp_path):
    net = Net()
    net.bn(torch.randn(4, 4, 2, 2))
    net.conv.register_forward_pre_hook(net.hook)
    table = save({"epoch": 3, "model": net, "ema": None} if wrapped else net, tmp_path / "a", form)
    state = net.state_dict()
    assert list(table) == list(state)
    for name, tensor in state.items():
        assert table[name].values().tolist() == tensor.tolist()
    parameters, roles = dict(net.named_parameters()), {name: t.role for name, t in table.items()}
    assert all(roles[name] == "parameter" for name in parameters)
    assert roles["anchors"] == "buffer"
    assert roles["bn.running_var"] == "running_var"
    assert "test_ckpt_roots.Net" in table.notes[-1]


def test_whole_wrapped_module(tmp_path):
    net = Net()
    assert list(save(torch.nn.DataParallel(net), tmp_path / "a")) == list(net.state_dict())


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_what_training_code_keeps_beside(form, tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    extra = {
        "hyper": AttributeDict(lr=0.1, nested=AttributeDict(x=1)),
        "args": argparse.Namespace(lr=0.1),
        "config": Config(),
        "colour": Colour.RED,
        "np_scalar": np.float64(1.5),
        "np_array": np.arange(3),
        "np_rng": np.random.get_state(),
        "np_generator": np.random.default_rng(0),
        "rng": torch.get_rng_state(),
        "path": pathlib.PurePosixPath("/tmp"),
        "when": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
        "decimal": decimal.Decimal("1.5"),
        "defaults": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], maxlen=3),
        "set": {1, 2},
        "frozen": frozenset((1, 2)),
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "complex": 1j,
        "pattern": re.compile("a+"),
        "none": type(None),
        "hint": list[int],
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "class": torch.optim.SGD,
        "optimizer": optimizer.state_dict(),
        "whole_optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "big": 2**100,
        "keys": {1: 2, (1, 2): 3, None: 4, 1.5: 5, False: 6},
        "error": ValueError("x"),
    }
    table = save({**extra, "state_dict": model.state_dict()}, tmp_path / "a", form)
    assert_holds(table, model.state_dict())
    assert len(table.notes) == 2
    assert table.notes[1].startswith("the optimizer state at 'whole_optimizer' was left out")
    assert table.notes[0] == (
        "the pickle names code outside torch: test_ckpt_roots.AttributeDict and 2 more of test_ckpt_roots; "
        "nothing of it was imported or run"
    )


def test_state_dict_in_a_dict_subclass_or_an_object(tmp_path):
    assert_holds(save(AttributeDict(epoch=1, state_dict=AttributeDict(W)), tmp_path / "a"), W)
    assert_holds(save(argparse.Namespace(model=W, epoch=3), tmp_path / "b"), W)


def test_order_is_the_files(tmp_path):
    state = {name: torch.ones(1) for name in ("z", "a", "m.b", "m.a")}
    assert list(save(collections.OrderedDict(state), tmp_path / "a")) == ["z", "a", "m.b", "m.a"]


def test_names_stay_raw(tmp_path):
    state = {"a\x1b[31m\n": torch.ones(1), "層.weight": torch.ones(1), "": torch.ones(1)}
    assert list(save(state, tmp_path / "a")) == list(state)


def test_what_is_nested_too_deep_is_told(tmp_path):
    deep = {"model": OTHER}
    for _ in range(101):
        deep = {"in": deep}
    table = save({"state_dict": W, "deep": deep}, tmp_path / "a")
    assert_holds(table, W)
    assert table.notes == ("what is nested deeper than 100 was not searched; --no-limits searches it",)
    with pytest.raises(CheckpointError, match=r"as far as it was searched .*--no-limits"):
        save(deep, tmp_path / "b")
    assert_holds(read_checkpoint(tmp_path / "b", limits=Limits.NONE), OTHER)
