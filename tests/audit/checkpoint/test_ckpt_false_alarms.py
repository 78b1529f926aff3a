"""What people really save is read, however it would be loaded; what runs code in the file says so."""

import collections
import configparser
import contextlib
import dataclasses
import datetime
import decimal
import fractions
import functools
import importlib
import inspect
import io
import itertools
import logging
import math
import os
import pathlib
import platform
import random
import signal
import sys
import time
import types
import typing
import uuid
import zoneinfo

import numpy as np
import pytest
import torch
from torch import nn

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError

FOREIGN = """
import collections, copyreg, dataclasses, enum, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.twin = self.bn
        self.many = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.named = nn.ModuleDict({"a": nn.Linear(2, 2)})
        self.loose = nn.ParameterList([nn.Parameter(torch.randn(2))])
        self.table = nn.ParameterDict({"q": nn.Parameter(torch.randn(2))})
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.register_forward_pre_hook(self.hook)
        self.call = Reduced().__call__

    def hook(self, module, args):
        return None

class Reduced:
    def __reduce__(self):
        return make, (1,), {"a": torch.ones(1)}, iter([1]), iter([("k", 2)])
    def append(self, item): ...
    def extend(self, items): ...
    def __setitem__(self, key, value): ...
    def __call__(self): ...

class Restored:
    def __getstate__(self):
        return 1, [torch.ones(1)]
    def __setstate__(self, state): ...

class Registered: ...
class Cfg(dict):
    __getattr__ = dict.get
class Slots:
    __slots__ = ("a",)
class Colour(enum.Enum):
    RED = "red"
class Flags(enum.Flag):
    A, B = 1, 2
@dataclasses.dataclass
class Data:
    a: int = 1
    b: list = dataclasses.field(default_factory=list)
Pair = collections.namedtuple("Pair", "a b")
def make(*args):
    return Reduced()
copyreg.pickle(Registered, lambda made: (make, (2,)))
def everything():
    slots = Slots()
    slots.a = 1
    return [Reduced(), Restored(), Registered(), Cfg(a=1), slots, Colour.RED, Flags.A | Flags.B, Data(),
            Pair(1, 2), make, Net, dataclasses.MISSING]
"""

STATE = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()

VALUES = {
    "typing": [
        int,
        type(None),
        list[int],
        typing.Optional[int],  # noqa: UP045
        typing.Callable[[int], int],
        typing.Literal[1],
    ],
    "union": int | None,
    "iterators": [
        iter([1]),
        iter("ab"),
        enumerate([1]),
        zip([1], [2], strict=False),
        reversed([1]),
        itertools.count(1),
    ],
    "bound": [
        "a".join,
        [].append,
        {}.get,
        datetime.datetime.fromtimestamp,
        str.lower,
        math.sqrt,
        os.path.join,
    ],
    "partial": [
        functools.partial(nn.BatchNorm2d, eps=1e-3),
        functools.partial(nn.functional.relu, inplace=True),
    ],
    "numbers": [decimal.Decimal("1.5"), decimal.Context(), fractions.Fraction(1, 3), uuid.UUID(int=1), 1j],
    "dates": [
        datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        zoneinfo.ZoneInfo("UTC"),
        time.gmtime(0),
    ],
    "machine": [platform.uname(), os.uname(), os.stat("/"), signal.SIGTERM],
    "containers": [
        collections.deque([1], 3),
        collections.ChainMap({1: 2}),
        collections.Counter("aab"),
        {1, 2},
        frozenset([1]),
        collections.UserDict(a=1),
        types.SimpleNamespace(a=1, append=True),
        range(3),
        slice(1, 2),
        Ellipsis,
    ],
    "files": [pathlib.Path("a"), pathlib.PureWindowsPath("c:/a"), io.BytesIO(b"a"), io.StringIO("a")],
    "rest": [
        contextlib.nullcontext(),
        logging.getLogger("a"),
        ValueError("a"),
        inspect.signature(read_checkpoint),
        configparser.RawConfigParser,
        dataclasses.MISSING,
    ],
    "random": [
        random.getstate(),
        random.Random(3),
        np.random.RandomState(0),
        np.random.get_state(),
        np.random.default_rng(1),
        torch.get_rng_state(),
        torch.Generator(),
    ],
    "numpy": [
        np.float64(1),
        np.str_("a"),
        np.datetime64("2020-01-01"),
        np.zeros((2, 2), order="F"),
        np.dtype("f4"),
        np.array([{"a": 1}], object),
        np.zeros(2, [("a", "i4")]),
        np.ma.array([1, 2], mask=[0, 1]),
        np.mean,
    ],
    "torch": [
        torch.device("cpu"),
        torch.float32,
        torch.Size([1]),
        torch.strided,
        nn.CrossEntropyLoss(),
        nn.ReLU,
        torch.per_tensor_affine,
        torch.optim.Adam,
        nn.functional.cross_entropy,
        torch.distributions.Normal(0.0, 1.0),
        torch.amp.GradScaler("cpu"),
        torch.utils.data.TensorDataset(torch.ones(1)),
    ],
}


@pytest.fixture
def foreign(tmp_path):
    """A package that is there when a file is written, and gone when it is read."""
    (tmp_path / "gone_package.py").write_text(FOREIGN)
    sys.path.insert(0, str(tmp_path))
    try:
        module = importlib.import_module("gone_package")
        sys.path.remove(str(tmp_path))
        yield module
    finally:
        sys.modules.pop("gone_package", None)


def read(obj, path, form):
    torch.save(obj, path, _use_new_zipfile_serialization=form == "zip")
    sys.modules.pop("gone_package", None)
    table = read_checkpoint(path)
    assert "gone_package" not in sys.modules
    return table


def assert_holds(table, state, stripped=""):
    state = {name.replace(stripped, ""): tensor for name, tensor in state.items()}
    assert list(table) == list(state)
    assert all(table[name].values().tolist() == tensor.tolist() for name, tensor in state.items())


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", VALUES)
def test_beside_a_state(name, form, tmp_path):
    values = VALUES[name]
    assert_holds(read({"state_dict": STATE, "x": values}, tmp_path / "a.pt", form), STATE)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_classes_of_unknown_packages(form, foreign, tmp_path):
    net = foreign.Net()
    state = net.state_dict()
    assert_holds(read({"model": net, "x": foreign.everything()}, tmp_path / "a.pt", form), state)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_compiled_modules(backend, form, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    compiled = torch.compile(model, backend=backend)
    assert_holds(read(compiled, tmp_path / "a.pt", form), model.state_dict())
    inside = nn.Sequential(compiled, nn.Linear(2, 2))
    assert_holds(read({"model": inside}, tmp_path / "b.pt", form), inside.state_dict(), "_orig_mod.")


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_modules_that_were_changed(form, tmp_path):
    utils = nn.utils
    made = {
        "parallel": nn.DataParallel(nn.Sequential(nn.BatchNorm1d(2))).module,
        "norms": nn.Sequential(utils.weight_norm(nn.Linear(2, 2)), utils.spectral_norm(nn.Linear(2, 2))),
        "averaged": torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.BatchNorm1d(2))).module,
        "kinds": nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(3, 4), nn.SyncBatchNorm(4)),
    }
    for name, module in made.items():
        assert_holds(read(module, tmp_path / name, form), module.state_dict())
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).state_dict()
    assert_holds(read(parametrized, tmp_path / "a.pt", form), parametrized)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_training_state(form, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    schedulers = torch.optim.lr_scheduler
    made = [
        schedulers.LambdaLR(optimizer, lambda epoch: 1.0),
        schedulers.OneCycleLR(optimizer, 0.1, 10),
        schedulers.SequentialLR(
            optimizer, [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)], [2]
        ),
        schedulers.ReduceLROnPlateau(optimizer),
    ]
    states = [scheduler.state_dict() for scheduler in made]
    saved = {"model": model, "optimizer": optimizer, "schedulers": states}
    assert_holds(read(saved, tmp_path / "a.pt", form), model.state_dict())


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_fx_modules_say_what_would_run(form, tmp_path):
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(CheckpointError, match=r"holds a torch.fx module, .*save model.state_dict\(\)"):
        read({"model": traced}, tmp_path / "a.pt", form)


def test_settings_of_a_training_say_what_they_are(tmp_path, foreign):
    made = type("TrainingArguments", (foreign.Restored,), {"__module__": "gone_package"})
    foreign.TrainingArguments = made
    with pytest.raises(
        CheckpointError, match=r"settings of a training, .*TrainingArguments.*model\.safetensors"
    ):
        read(made(), tmp_path / "a.bin", "zip")
