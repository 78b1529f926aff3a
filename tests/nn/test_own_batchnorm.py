"""The own layers against a float64 oracle written from the formula, and against torch's layers."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from freezekit.nn import batchnorm as own

CASES = {
    "1d-NC": ("BatchNorm1d", (16, 5)),
    "1d-NCL": ("BatchNorm1d", (6, 5, 7)),
    "2d": ("BatchNorm2d", (4, 5, 3, 6)),
    "3d": ("BatchNorm3d", (3, 5, 2, 4, 3)),
}
DTYPES = [  # of the input, and of parameters and statistics
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(layer: Any) -> None:
    with torch.no_grad():
        if layer.affine:
            layer.weight.copy_(torch.randn(layer.num_features) + 0.5)
            layer.bias.copy_(torch.randn(layer.num_features))
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.randn(layer.num_features))
            layer.running_var.copy_(torch.rand(layer.num_features) + 0.3)
            layer.num_batches_tracked.fill_(7)


def pair(name: str, channels: int = 5, **kwargs: Any) -> tuple[Any, Any]:
    """An own layer and torch's, with the same random parameters and statistics."""
    mine, theirs = getattr(own, name)(channels, **kwargs), getattr(nn, name)(channels, **kwargs)
    randomise(theirs)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine, theirs


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Channels with their own means and deviations."""
    per_channel = [1, shape[1], *[1] * (len(shape) - 2)]
    x = torch.randn(shape) * (torch.rand(per_channel) * 3 + 0.2) + torch.randn(per_channel) * 2
    return x.to(dtype)


def run(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    output.backward(grad)
    seen = {"output": output.detach(), "input.grad": x.grad}
    seen |= {f"{name}.grad": p.grad.clone() for name, p in layer.named_parameters()}
    seen |= {name: b.clone() for name, b in layer.named_buffers() if b.is_floating_point()}
    return seen


class Oracle:
    """Ioffe and Szegedy 2015, Algorithm 1 and the gradients of section 3, in numpy and float64."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        ones = np.ones(layer.num_features)
        self.weight = layer.weight.detach().double().cpu().numpy() if layer.affine else ones
        self.bias = layer.bias.detach().double().cpu().numpy() if layer.affine else 0 * ones
        self.tracks = layer.running_mean is not None
        if self.tracks:
            self.mean = layer.running_mean.double().cpu().numpy().copy()
            self.var = layer.running_var.double().cpu().numpy().copy()
            self.count = layer.num_batches_tracked.item()

    def run(self, x: torch.Tensor, grad: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
        x_, g_ = (t.double().cpu().numpy().swapaxes(0, 1).reshape(x.size(1), -1) for t in (x, grad))
        by_batch = training or not self.tracks
        mean, var = (x_.mean(1), x_.var(1)) if by_batch else (self.mean, self.var)
        deviation = np.sqrt(var + self.layer.eps)[:, None]
        normal, gamma = (x_ - mean[:, None]) / deviation, self.weight[:, None]
        through_stats = g_.mean(1, keepdims=True) + normal * (g_ * normal).mean(1, keepdims=True)
        x_grad = gamma / deviation * (g_ - through_stats if by_batch else g_)
        if training and self.tracks:
            self.count += 1
            factor = 1 / self.count if self.layer.momentum is None else self.layer.momentum
            self.mean = (1 - factor) * self.mean + factor * mean
            self.var = (1 - factor) * self.var + factor * x_.var(1, ddof=1)
        seen = {
            "output": self._back(normal * gamma + self.bias[:, None], x),
            "input.grad": self._back(x_grad, x),
        }
        if self.layer.affine:
            seen |= {"weight.grad": torch.tensor((g_ * normal).sum(1)), "bias.grad": torch.tensor(g_.sum(1))}
        if self.tracks:
            seen |= {"running_mean": torch.tensor(self.mean), "running_var": torch.tensor(self.var)}
        return seen

    @staticmethod
    def _back(values: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values.reshape(x.size(1), x.size(0), *x.shape[2:]).swapaxes(0, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES)
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None, 0.0])
@pytest.mark.parametrize("case", CASES)
def test_training_then_eval_against_the_oracle_and_torch(
    case: str,
    momentum: float | None,
    affine: bool,
    track: bool,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    device: str,
) -> None:
    name, shape = CASES[case]
    kwargs = {"momentum": momentum, "affine": affine, "track_running_stats": track, "dtype": param_dtype}
    mine, theirs = pair(name, **kwargs, device=device)
    oracle = Oracle(mine)
    for step in range(6):
        training = step < 4
        x, grad = data(shape, dtype).to(device), torch.randn(shape).to(dtype).to(device)
        got, native = run(mine.train(training), x, grad), run(theirs.train(training), x, grad)
        expected = oracle.run(x, grad, training)
        assert got.keys() == native.keys() == expected.keys()
        for key, exact in expected.items():
            assert got[key].dtype == native[key].dtype, key
            values, reference = got[key].double().cpu(), native[key].double().cpu()
            # As near to float64 as torch's own layer (4 times its error, and 4 ulp of the largest value).
            ulp = torch.finfo(got[key].dtype).eps * exact.abs().max()
            assert (values - exact).abs().max() <= 4 * (reference - exact).abs().max() + 4 * ulp, (step, key)
            eps = torch.finfo(got[key].dtype).eps
            torch.testing.assert_close(values, reference, rtol=16 * eps, atol=16 * float(ulp))
        if track:
            assert torch.equal(mine.num_batches_tracked, theirs.num_batches_tracked)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(2, 6),
    channels=st.integers(1, 6),
    spatial=st.lists(st.integers(1, 4), max_size=3),
    momentum=st.none() | st.floats(0, 1),
    eps=st.floats(1e-5, 1),
    seed=st.integers(0, 2**16),
)
def test_any_shape_momentum_and_eps_equals_torch_in_float64(
    batch: int, channels: int, spatial: list[int], momentum: float | None, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    name = {0: "BatchNorm1d", 1: "BatchNorm1d", 2: "BatchNorm2d", 3: "BatchNorm3d"}[len(spatial)]
    mine, theirs = pair(name, channels, momentum=momentum, eps=eps, dtype=torch.float64)
    for training in (True, True, False):
        x, grad = (torch.randn(batch, channels, *spatial, dtype=torch.float64) for _ in range(2))
        got, native = run(mine.train(training), x, grad), run(theirs.train(training), x, grad)
        torch.testing.assert_close(got, native, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_track_running_stats_switched_off_afterwards(case: str, training: bool) -> None:
    name, shape = CASES[case]
    mine, theirs = pair(name)
    before = copy.deepcopy(mine.state_dict())
    mine.track_running_stats = theirs.track_running_stats = False
    x = data(shape)
    torch.testing.assert_close(mine.train(training)(x), theirs.train(training)(x))
    for key, value in mine.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert torch.equal(value, theirs.state_dict()[key]), key


def test_statistics_removed_afterwards() -> None:
    x = data((6, 5))
    for attribute in ("num_batches_tracked", "both"):
        mine, theirs = pair("BatchNorm1d", momentum=None)
        for layer in (mine, theirs):
            if attribute == "both":
                layer.running_mean = layer.running_var = None
            else:
                layer.num_batches_tracked = None
        for training in (True, False):
            torch.testing.assert_close(mine.train(training)(x), theirs.train(training)(x))
        torch.testing.assert_close(dict(mine.named_buffers()), dict(theirs.named_buffers()))
    mine.running_mean = torch.zeros(5)
    with pytest.raises(ValueError, match="must either both be None or neither"):
        mine(x)


def failure(layer: Any, x: torch.Tensor) -> tuple[Any, ...]:
    try:
        layer(x)
    except Exception as error:
        return type(error), str(error), layer.num_batches_tracked
    return (None, "", layer.num_batches_tracked)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BatchNorm1d", (5,)),
        ("BatchNorm1d", (2, 5, 3, 3)),
        ("BatchNorm2d", (2, 5, 3)),
        ("BatchNorm2d", (2, 5, 3, 3, 3)),
        ("BatchNorm3d", (2, 5, 3, 3)),
        ("BatchNorm1d", (1, 5)),
        ("BatchNorm1d", (1, 5, 1)),
        ("BatchNorm2d", (1, 5, 1, 1)),
        ("BatchNorm3d", (1, 5, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_errors_are_torchs(name: str, shape: tuple[int, ...], track: bool, training: bool) -> None:
    mine, theirs = pair(name, track_running_stats=track)
    got, expected = (
        failure(mine.train(training), torch.ones(shape)),
        failure(theirs.train(training), torch.ones(shape)),
    )
    assert got == expected
    one_value_by_running_stats = shape[0] == 1 and track and not training
    assert (got[0] is None) == one_value_by_running_stats  # so that this is not a comparison of successes


@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_wrong_channel_count(channels: int, kwargs: dict[str, bool], training: bool) -> None:
    mine, theirs = pair("BatchNorm2d", **kwargs)
    got, expected = (
        failure(layer.train(training), torch.ones(2, channels, 3, 3)) for layer in (mine, theirs)
    )
    assert got[0] is expected[0] is RuntimeError
    assert got[1] == f"{expected[1]}: the input of shape (2, {channels}, 3, 3) has {channels} channels"
    assert got[2] == expected[2]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_the_dtypes_torch_takes_and_no_others(
    dtype: torch.dtype, param_dtype: torch.dtype, training: bool
) -> None:
    mine, theirs = pair("BatchNorm1d", dtype=param_dtype)
    x = torch.ones(3, 5).to(dtype)
    got, expected = failure(mine.train(training), x)[0], failure(theirs.train(training), x)[0]
    if expected is None:
        assert got is None
    else:  # NotImplementedError for integers; torch 2.6 raised its parent
        assert issubclass(got, expected)
        assert issubclass(got, RuntimeError)
    assert (got is None) == (
        param_dtype in (dtype, torch.promote_types(dtype, torch.float32)) and dtype != torch.int64
    )


@pytest.mark.parametrize("eps", [0.0, -1.0])
@pytest.mark.parametrize("training", [True, False])
def test_eps_as_newer_torch_checks_it(eps: float, training: bool) -> None:
    mine, theirs = pair("BatchNorm1d", eps=eps)
    got, expected = (failure(layer.train(training), torch.randn(3, 5))[:2] for layer in (mine, theirs))
    assert got[0] is (ValueError if training or eps < 0 else None)
    if expected[0] is not None:  # torch 2.6 does not check
        assert got == expected


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (0, 5, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_empty_batches(shape: tuple[int, ...], training: bool, track: bool) -> None:
    mine, theirs = pair("BatchNorm2d" if len(shape) == 4 else "BatchNorm1d", track_running_stats=track)
    x = torch.zeros(shape)
    got, expected = run(mine.train(training), x, x), run(theirs.train(training), x, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if track:
        assert torch.equal(mine.num_batches_tracked, theirs.num_batches_tracked)


LAYOUTS = {
    "channels_last": lambda: data((2, 4, 3, 5)).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: data((2, 4, 2, 3, 5)).contiguous(memory_format=torch.channels_last_3d),
    "channels_last, part": lambda: data((2, 8, 6, 6)).contiguous(memory_format=torch.channels_last)[
        :, :4, ::2
    ],
    "transposed 2-D": lambda: data((4, 6)).t(),
    "transposed 3-D": lambda: data((2, 5, 4)).transpose(1, 2),
    "transposed 4-D": lambda: data((3, 2, 4, 5)).transpose(0, 2),
    "video": lambda: data((2, 3, 4, 5, 6)).transpose(1, 2),
    "strided": lambda: data((2, 8, 3, 3))[:, ::2],
    "expanded": lambda: data((3, 4, 1, 1)).expand(3, 4, 2, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_memory_layout_is_what_torch_returns(layout: str, training: bool) -> None:
    x = LAYOUTS[layout]()
    name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[x.dim()]
    mine, theirs = pair(name, x.size(1))
    got, expected = mine.train(training)(x), theirs.train(training)(x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected)
    if layout == "channels_last":
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert not got.is_contiguous()


@pytest.mark.parametrize("shape", [(9, 5), (9, 5, 7), (9, 3, 7, 7), (9, 33, 1, 1), (5, 3, 2, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_output_has_the_same_bits_whatever_else_is_in_the_batch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    mine, _ = pair(
        {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)], shape[1]
    )
    mine.eval()
    x = data(shape, dtype)
    assert torch.equal(mine(x), torch.cat([mine(sample) for sample in x.split(1)]))


def test_mean_1e4_deviation_1e_2_in_float32() -> None:
    mine, _ = pair("BatchNorm2d", momentum=1.0)
    x = torch.randn(8, 5, 16, 16) * 1e-2 + 1e4
    got, exact = run(mine, x, torch.randn_like(x)), Oracle(mine).run(x, torch.zeros_like(x), True)
    torch.testing.assert_close(got["running_var"].double(), exact["running_var"], rtol=1e-5, atol=0)
    torch.testing.assert_close(got["output"].double(), exact["output"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_state_dicts_interchange_strictly_both_ways(case: str, track: bool, affine: bool) -> None:
    name, shape = CASES[case]
    mine, theirs = pair(name, affine=affine, track_running_stats=track)
    mine(data(shape))
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for key, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    assert mine.state_dict()._metadata == theirs.state_dict()._metadata
    assert repr(mine) == repr(theirs)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_loading_a_file_from_before_num_batches_tracked(version: int | None) -> None:
    mine, theirs = pair("BatchNorm2d")
    old = OrderedDict((k, v + 1) for k, v in theirs.state_dict().items() if k != "num_batches_tracked")
    if version is not None:
        old._metadata = {"": {"version": version}}
    if version == 2:
        for layer in (mine, theirs):
            with pytest.raises(RuntimeError, match=r'Missing key.*"num_batches_tracked"'):
                layer.load_state_dict(old)
        return
    for layer in (mine, theirs):
        layer.load_state_dict(old, strict=True)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert torch.equal(mine.running_mean, old["running_mean"])


@pytest.mark.parametrize("case", CASES)
def test_deepcopy_and_pickle(case: str) -> None:
    name, shape = CASES[case]
    mine, _ = pair(name, momentum=0.3)
    x = data(shape)
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(twin) is type(mine)
        fresh = copy.deepcopy(mine)
        assert torch.equal(twin(x), fresh(x))
        assert torch.equal(twin.running_var, fresh.running_var)
        assert not torch.equal(twin.running_var, mine.running_var)


def test_functional_call_uses_and_updates_what_it_is_given() -> None:
    mine, other = pair("BatchNorm2d")[0], pair("BatchNorm2d")[0]
    given_state = {k: v.clone() for k, v in other.state_dict().items()}
    before, x = copy.deepcopy(mine.state_dict()), data((4, 5, 3, 3))
    assert torch.equal(functional_call(mine, given_state, (x,)), other(x))
    torch.testing.assert_close(given_state, dict(other.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(mine.state_dict(), before, rtol=0, atol=0)


def test_vmap_in_eval() -> None:
    mine, _ = pair("BatchNorm2d")
    x = data((12, 5, 3, 3)).reshape(3, 4, 5, 3, 3)
    assert torch.equal(vmap(mine.eval())(x), torch.stack([mine(part) for part in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    mine, _ = pair("BatchNorm2d")
    twin, x = copy.deepcopy(mine), data((4, 5, 3, 3), dtype)
    for training in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = mine.train(training)(x)
        assert output.dtype == dtype
        assert torch.equal(output, twin.train(training)(x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_meta_device(case: str, momentum: float | None) -> None:
    name, shape = CASES[case]
    layer = getattr(own, name)(5, momentum=momentum, device="meta")
    for training in (True, False):
        output = layer.train(training)(torch.empty(shape, device="meta"))
        assert (output.shape, output.device.type) == (shape, "meta")


# torch 2.6 warns of its own configuration when it compiles under a log capture, as pytest's is.
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning")
def test_compile_fullgraph() -> None:
    mine, _ = pair("BatchNorm2d", momentum=None)  # torch's layer cannot: the count would leave the graph
    eager = copy.deepcopy(mine)
    compiled = torch.compile(mine, fullgraph=True)
    for training in (True, False):
        x, grad = data((4, 5, 3, 3)), torch.randn(4, 5, 3, 3)
        compiled.train(training)
        got, expected = run(compiled, x, grad), run(eager.train(training), x, grad)
        got = {key.replace("_orig_mod.", ""): value for key, value in got.items()}
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert mine.num_batches_tracked == 8


def test_no_normalisation_op_of_torch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("torch's batch norm was called")

    for module, name in ((nn.functional, "batch_norm"), (torch, "batch_norm"), (torch, "native_batch_norm")):
        monkeypatch.setattr(module, name, refuse)
    for name, shape in CASES.values():
        mine, theirs = pair(name)
        for training in (True, False):
            run(mine.train(training), data(shape), torch.randn(shape))
            with pytest.raises(AssertionError, match="torch's batch norm was called"):
                theirs.train(training)(data(shape))


def test_no_normalisation_kernel_is_dispatched() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    def norms(layer: Any) -> set[str]:
        seen.clear()
        with Names():
            for training in (True, False):
                run(layer.train(training), data((4, 5, 3, 3)), torch.randn(4, 5, 3, 3))
        return {name for name in seen if "norm" in name and "vector_norm" not in name}

    seen: set[str] = set()
    mine, theirs = pair("BatchNorm2d")
    assert norms(theirs)  # what is looked for is there to be found
    assert not norms(mine)


def test_code_that_looks_for_bn_by_its_class_finds_own_layers() -> None:
    batches = [data((8, 5)) for _ in range(3)]
    mine, theirs = pair("BatchNorm1d")
    for layer in (mine, theirs):
        torch.optim.swa_utils.update_bn(batches, nn.Sequential(layer))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    assert mine.num_batches_tracked == 3
    assert isinstance(mine, nn.modules.batchnorm._BatchNorm)
    assert mine.frozen is False
