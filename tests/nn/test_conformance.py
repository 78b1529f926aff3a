"""Every own layer against torch's: construction, values, gradients, dtypes, layouts, errors.

What tools do with the layers (transforms, compilers, tracers) is in ``test_conformance_tools.py``.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from norms import (
    CASES,
    DEVICES,
    HALVES,
    NAMES,
    TRACK,
    Case,
    assert_no_less_exact,
    assert_same,
    data,
    every_case,
    every_mode,
    outcome,
    randomised,
    run,
    theirs_of,
)
from torch import nn

import freezekit.nn as own

BN = {
    "eps": [1e-5, 0.3],
    "momentum": [0.1, 0, 1.0, None],
    "affine": [True, False],
    "track_running_stats": [True, False],
    "bias": [True, False],
}
ARGUMENTS: dict[str, dict[str, list[Any]]] = {
    **{f"{kind}Norm{rank}d": BN for kind in ("Batch", "Instance") for rank in (1, 2, 3)},
    "SyncBatchNorm": BN,
    "LayerNorm": {"eps": [1e-5, 0.3], "elementwise_affine": [True, False], "bias": [True, False]},
    "GroupNorm": {"eps": [1e-5, 0.3], "affine": [True, False], "bias": [True, False]},
}
FIRST = {case.name: case for case in reversed(CASES.values())}


def test_the_table_is_complete() -> None:
    assert set(FIRST) == set(NAMES) == {name for name in own.__all__ if not name.startswith("Frozen")}


# --- Construction and state


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    def arguments(module: Any) -> dict[str, Any]:
        parameters = inspect.signature(getattr(module, name)).parameters
        return {key: (value.kind, value.default) for key, value in parameters.items()}

    mine, theirs = arguments(own), arguments(nn)
    theirs.setdefault("bias", (inspect.Parameter.KEYWORD_ONLY, True))  # older torch
    assert list(mine.items()) == list(theirs.items())
    assert set(ARGUMENTS[name]) == set(mine) - {
        "num_features", "num_groups", "num_channels", "normalized_shape", "process_group", "device",
        "dtype",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_combination_of_arguments(name: str) -> None:
    case, options = FIRST[name], ARGUMENTS[name]
    x = [case.data(torch.float64) for _ in range(3)]
    for values in itertools.product(*options.values()):
        kwargs = dict(zip(options, values, strict=True))
        mine, theirs = Case(name, case.args, case.shape, kwargs).pair(dtype=torch.float64)
        # DDP refuses instances of torch's synchronised layer on the CPU.
        assert isinstance(mine, nn.modules.batchnorm._BatchNorm if name == "SyncBatchNorm" else type(theirs))
        assert repr(mine) == repr(theirs)
        for step, training in enumerate((True, True, False)):
            got, expected = run(mine.train(training), x[step]), run(theirs.train(training), x[step])
            assert_same(got, expected)
        twin = theirs_of(name, *case.args, **kwargs, dtype=torch.float64)
        twin.load_state_dict(mine.state_dict(), strict=True)
        assert list(mine.state_dict()) == list(twin.state_dict())
        assert mine.state_dict()._metadata == twin.state_dict()._metadata
        assert_same(twin.eval()(x[0]), mine(x[0]))


@every_case
def test_device_dtype_and_initial_state(case: Case) -> None:
    cls = getattr(own, case.name)
    fresh, theirs = cls(*case.args, **case.kwargs), theirs_of(case.name, *case.args, **case.kwargs)
    assert_same(fresh.state_dict(), theirs.state_dict(), 0)
    half = cls(*case.args, **case.kwargs, device="meta", dtype=torch.bfloat16)
    for tensor in [*half.parameters(), *half.buffers()]:
        assert tensor.device.type == "meta"
        assert tensor.dtype in (torch.bfloat16, torch.int64)
    layer = case.mine()
    layer.reset_parameters() if hasattr(layer, "reset_parameters") else None
    assert_same(layer.state_dict(), theirs.state_dict(), 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LayerNorm"])
def test_reset_parameters_without_a_bias(name: str) -> None:
    layer = randomised(getattr(own, name)(*FIRST[name].args, affine=True, bias=False))
    layer.reset_parameters()
    assert list(layer._parameters) == ["weight", "bias"]
    assert layer.bias is None
    assert torch.equal(layer.weight, torch.ones(4))
    if layer._buffers.get("running_var") is not None:
        assert torch.equal(layer.running_var, torch.ones(4))


@every_case
def test_deepcopy_and_pickle(case: Case) -> None:
    mine, x = case.mine(), case.data()
    expected = run(copy.deepcopy(mine), x)
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(twin) is type(mine)
        assert_same(run(twin, x), expected, 0)
    if case.tracks:
        assert not torch.equal(mine.running_var, expected["running_var"])  # the copies share nothing


# --- Values


@every_case
@every_mode
@pytest.mark.parametrize("device", DEVICES)
def test_float64(case: Case, training: bool, device: str) -> None:
    mine, theirs = case.pair(dtype=torch.float64, device=device)
    for _ in range(3):
        x = case.data(torch.float64, device)
        assert_same(run(mine.train(training), x), run(theirs.train(training), x))


PRECISIONS = [(torch.float32, torch.float32), *((half, p) for half in HALVES for p in (half, torch.float32))]


@every_case
@every_mode
@pytest.mark.parametrize(("dtype", "param_dtype"), PRECISIONS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_no_less_exact_than_torch(
    case: Case, training: bool, dtype: torch.dtype, param_dtype: torch.dtype, device: str
) -> None:
    mine, theirs = case.pair(dtype=param_dtype, device=device)
    exact = copy.deepcopy(theirs).double()
    # Larger than the table's, so that what accumulates has something to accumulate.
    shape = (case.shape[0] * 4, *case.shape[1:])
    x = data(shape, dtype, device)
    grad = torch.randn(shape).to(device, dtype)
    got, native = run(mine.train(training), x, grad), run(theirs.train(training), x, grad)
    oracle = run(exact.train(training), x.double(), grad.double())
    assert_no_less_exact(got, native, oracle)


@every_case
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(case: Case, training: bool, dtype: torch.dtype, device: str) -> None:
    mine, theirs = case.pair(device=device)
    x = case.data(dtype, device)
    exact, grad = copy.deepcopy(theirs).double(), torch.randn(case.shape).to(device)
    oracle = run(exact.train(training), x.double(), grad.double())
    with torch.autocast(device, torch.bfloat16):
        got, native = run(mine.train(training), x, grad), run(theirs.train(training), x, grad)
    assert_no_less_exact(got, native, oracle)
    if device == "cpu":
        assert got["output"].dtype == dtype


@every_case
@every_mode
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES, torch.int64])
def test_the_dtypes_torch_takes(
    case: Case, training: bool, dtype: torch.dtype, param_dtype: torch.dtype
) -> None:
    if not list(case.mine().parameters()):
        pytest.skip("no parameters whose dtype could differ")
    mine, theirs = (layer.train(training) for layer in case.pair(dtype=param_dtype))
    x = case.data().to(dtype)
    got, expected = outcome(lambda: mine(x).dtype), outcome(lambda: theirs(x).dtype)
    fits = param_dtype in (dtype, torch.promote_types(dtype, torch.float32)) and dtype != torch.int64
    assert (expected[0] is None) == fits
    if fits:
        assert got == expected == (None, dtype)
    else:
        assert got[0] is not None
        assert issubclass(got[0], RuntimeError)


@every_case
def test_mean_1e4_deviation_1e_2_in_float32(case: Case) -> None:
    if case.shape[1:] == (4,) and case.name == "GroupNorm":
        pytest.skip("two values a group: the same as any")
    momentum = {"momentum": 1.0} if case.tracks else {}
    mine, theirs = case.pair(**momentum)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(case.shape) * 1e-2 + 1e4
    got, truth = run(mine, x), run(exact, x.double())
    torch.testing.assert_close(got["output"].double(), truth["output"], rtol=1e-3, atol=1e-3)
    if case.tracks:
        torch.testing.assert_close(got["running_var"].double(), truth["running_var"], rtol=1e-4, atol=0)


@every_case
@every_mode
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(case: Case, training: bool, value: float) -> None:
    mine, theirs = case.pair(dtype=torch.float64)
    x = case.data(torch.float64)
    x[1, 2] = value
    got, expected = run(mine.train(training), x), run(theirs.train(training), x)
    assert not expected["output"].isfinite().all()
    for key in ("output", *dict(mine.named_buffers())):
        assert_same(got[key], expected[key])
    assert_same(got["input.grad"].isfinite(), expected["input.grad"].isfinite(), 0)


@every_case
@every_mode
@pytest.mark.parametrize("constant", [False, True])
def test_eps_0(case: Case, training: bool, constant: bool) -> None:
    mine, theirs = (layer.train(training) for layer in case.pair(eps=0.0, dtype=torch.float64))
    x = torch.ones(case.shape, dtype=torch.float64) if constant else case.data(torch.float64)
    got, expected = outcome(lambda: run(mine, x)), outcome(lambda: run(theirs, x))
    by_batch = "BatchNorm" in case.name and (training or not case.tracks)
    if by_batch:  # newer torch refuses it, and the own layers always do
        assert got[0] is ValueError
        assert expected == got or expected[0] is None
    elif constant and not (case.tracks and not training) and "Instance" not in case.name:
        assert got[1]["output"].isnan().all()
        assert expected[1]["output"].isnan().all()
    else:
        assert_same(got, expected)


@every_case
def test_frozen_parameters_and_inputs_get_no_gradient(case: Case) -> None:
    for frozen in ("weight", "bias", "both", "input"):
        mine, theirs = case.pair(dtype=torch.float64)
        if frozen != "input" and mine._parameters["weight"] is None:
            continue
        x = case.data(torch.float64)
        seen = []
        for layer in (mine, theirs):
            for name in ("weight", "bias") if frozen == "both" else (frozen,):
                if name != "input":
                    getattr(layer, name).requires_grad_(False)
            leaf = x.clone().requires_grad_(frozen != "input")
            output = layer(leaf)
            assert output.requires_grad == (
                leaf.requires_grad or any(p.requires_grad for p in layer.parameters())
            )
            if output.requires_grad:
                output.sin().sum().backward()
            seen.append([leaf.grad, *(p.grad for p in layer.parameters())])
        for mine_grad, theirs_grad in zip(*seen, strict=True):
            assert (mine_grad is None) == (theirs_grad is None)
            if mine_grad is not None:
                assert_same(mine_grad, theirs_grad)


@every_case
@every_mode
def test_no_grad_builds_no_graph(case: Case, training: bool) -> None:
    mine, theirs = (layer.train(training) for layer in case.pair(dtype=torch.float64))
    x = case.data(torch.float64).requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got, expected = mine(x), theirs(x)
        assert not got.requires_grad
        assert got.is_inference() == expected.is_inference()
        assert_same(got.clone(), expected.clone())


@every_case
@every_mode
def test_output_changed_in_place_afterwards(case: Case, training: bool) -> None:
    seen = []
    for layer in case.pair(dtype=torch.float64):
        torch.manual_seed(1)
        x = case.data(torch.float64).requires_grad_()
        layer.train(training)(x).relu_().square().sum().backward()
        seen.append([x.grad, *(p.grad for p in layer.parameters())])
    assert_same(*seen)


@every_case
@every_mode
@pytest.mark.parametrize("changed", ["input", "weight"])
def test_changed_in_place_before_backward(case: Case, training: bool, changed: str) -> None:
    """It is an error, or (where a layer kept what it needs) makes no difference: never a wrong gradient."""
    mine, theirs = (layer.train(training) for layer in case.pair(dtype=torch.float64))
    if mine._parameters["weight"] is None:
        pytest.skip("no weight")
    leaf = case.data(torch.float64).requires_grad_()

    def gradients(layer: Any, change: bool) -> Any:
        x = leaf * 1  # no leaf: it may be written to
        output = layer(x)
        if change:
            with torch.no_grad():
                (x if changed == "input" else layer.weight).add_(1)
        return torch.autograd.grad(output.sin().sum(), [leaf, *layer.parameters()])

    expected = gradients(copy.deepcopy(mine), change=False)
    assert_same(expected, gradients(theirs, change=False))
    error, got = outcome(lambda: gradients(mine, change=True))
    if error is None:
        assert_same(got, expected, 0)
    else:
        assert error is RuntimeError
        assert "modified by an inplace operation" in got


# --- Statistics


@pytest.mark.parametrize("name", [name for name in NAMES if "Batch" in name or "Instance" in name])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_tracking_switched_off_afterwards(name: str, momentum: float | None) -> None:
    case = FIRST[name]
    mine, theirs = Case(name, case.args, case.shape, {**TRACK, "momentum": momentum}).pair(
        dtype=torch.float64
    )
    mine.track_running_stats = theirs.track_running_stats = False
    x = case.data(torch.float64)
    assert_same(run(mine, x), run(theirs, x))
    before = copy.deepcopy(mine.state_dict())
    assert_same(mine.eval()(x), theirs.eval()(x))
    assert_same(mine.state_dict(), before, 0)  # eval moves no state: torch's instance norm does here
    moved = not torch.equal(theirs.running_mean, before["running_mean"])
    assert moved == ("Instance" in name and momentum is not None)


@pytest.mark.parametrize("name", [name for name in NAMES if "Instance" in name])
def test_instance_statistics_removed_afterwards(name: str) -> None:
    case = FIRST[name]
    mine, theirs = Case(name, case.args, case.shape, TRACK).pair(dtype=torch.float64)
    x = case.data(torch.float64)
    mine.running_mean = theirs.running_mean = None
    with pytest.raises(ValueError, match="must either both be None or neither be None"):
        mine(x)
    mine.running_var = theirs.running_var = None
    assert_same(mine(x), theirs(x))
    got, expected = outcome(lambda: mine.eval()(x)), outcome(lambda: theirs.eval()(x))
    assert got == expected
    assert got[0] is RuntimeError


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_instance_norm_counts_no_batches(rank: int) -> None:
    case = CASES[f"in{rank}-track"]
    mine, theirs = case.pair()
    for layer in (mine, theirs):
        layer(case.data())
        assert layer.num_batches_tracked == 7


# --- Shapes and layouts

LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
LAYOUTS: dict[str, Any] = {
    "contiguous-4": lambda: data((2, 4, 3, 5), torch.float64),
    "channels_last": lambda: data((2, 4, 3, 5), torch.float64).contiguous(memory_format=LAST),
    "channels_last, one sample": lambda: data((1, 4, 3, 5), torch.float64).contiguous(memory_format=LAST),
    "channels_last, one channel": lambda: data((2, 1, 3, 5), torch.float64).contiguous(memory_format=LAST),
    "channels_last, part": lambda: data((2, 8, 6, 10), torch.float64).contiguous(memory_format=LAST)[
        :, :4, ::2, ::2
    ],
    "channels_last_3d": lambda: data((2, 4, 2, 3, 5), torch.float64).contiguous(memory_format=LAST_3D),
    "channels_last_3d, part": lambda: data((2, 8, 2, 3, 5), torch.float64).contiguous(memory_format=LAST_3D)[
        :, ::2
    ],
    "transposed-2": lambda: data((4, 6), torch.float64).t(),
    "transposed-3": lambda: data((2, 5, 4), torch.float64).transpose(1, 2),
    "transposed-4, batch and channels": lambda: data((4, 2, 3, 5), torch.float64).transpose(0, 1),
    "transposed-4, batch and height": lambda: data((3, 4, 2, 5), torch.float64).transpose(0, 2),
    "transposed-4, height and width": lambda: data((2, 4, 5, 3), torch.float64).transpose(2, 3),
    "transposed-5": lambda: data((2, 2, 4, 3, 5), torch.float64).transpose(1, 2),
    "permuted-4": lambda: data((3, 5, 2, 4), torch.float64).permute(2, 3, 0, 1),
    "expanded": lambda: data((2, 4, 3, 1), torch.float64).expand(2, 4, 3, 5),
    "sliced": lambda: data((2, 8, 3, 10), torch.float64)[:, ::2, :, 1::2],
    "unaligned": lambda: data((1, 121), torch.float64)[0, 1:].view(2, 4, 3, 5),
    "bfloat16, unaligned": lambda: data((1, 121), torch.bfloat16)[0, 1:].view(2, 4, 3, 5),
}
LAYERS: dict[str, Any] = {
    "batch": lambda x: (f"BatchNorm{max(x.dim() - 2, 1)}d", (x.size(1),), {}),
    "instance": lambda x: (f"InstanceNorm{x.dim() - 2}d", (x.size(1),), {"affine": True}),
    "instance-track": lambda x: (f"InstanceNorm{x.dim() - 2}d", (x.size(1),), TRACK),
    "layer-1": lambda x: ("LayerNorm", (x.shape[-1:],), {}),
    "layer-all": lambda x: ("LayerNorm", (x.shape[1:],), {}),
    "group": lambda x: ("GroupNorm", (1 if x.size(1) == 1 else 2, x.size(1)), {}),
}


def strides(x: torch.Tensor) -> list[int]:
    """The strides that matter: those of dimensions with more than one place."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_mode
@pytest.mark.parametrize("device", DEVICES)
def test_layouts(layer: str, layout: str, training: bool, device: str) -> None:
    x = LAYOUTS[layout]().to(device)
    if layer.startswith("instance") and x.dim() < 3:
        pytest.skip("instance norm takes no such input")
    name, args, kwargs = LAYERS[layer](x)
    mine, theirs = Case(name, args, tuple(x.shape), kwargs).pair(device=device, dtype=x.dtype)
    got, expected = run(mine.train(training), x), run(theirs.train(training), x)
    assert_same(got, expected, 0.03 if x.dtype == torch.bfloat16 else 1e-9)
    memory_format = {4: LAST, 5: LAST_3D}.get(x.dim())
    if layout.startswith("channels_last") and x.size(1) > 1:
        # Kept by every own layer; torch's instance and layer norm return the contiguous format.
        assert got["output"].is_contiguous(memory_format=memory_format)
        assert not got["output"].is_contiguous()
    else:
        assert strides(got["output"]) == strides(expected["output"])
        got["output"].view(-1)


UNBATCHED = [
    ("InstanceNorm1d", (4, 5)),
    ("InstanceNorm2d", (4, 2, 5)),
    ("InstanceNorm3d", (4, 2, 3, 5)),
    ("LayerNorm", (5,)),
]


@pytest.mark.parametrize(("name", "shape"), UNBATCHED)
@pytest.mark.parametrize("kwargs", [{}, {"affine": True}, TRACK], ids=["plain", "affine", "track"])
@every_mode
def test_unbatched(name: str, shape: tuple[int, ...], kwargs: dict[str, Any], training: bool) -> None:
    layer_norm = name == "LayerNorm"
    if layer_norm and kwargs:
        pytest.skip("no such arguments")
    mine, theirs = Case(name, (5,) if layer_norm else (4,), shape, kwargs).pair(dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    got, expected = run(mine.train(training), x), run(theirs.train(training), x)
    assert_same(got, expected)
    assert got["output"].stride() == expected["output"].stride()


EMPTY = [
    ("BatchNorm1d", (4,), (0, 4)),
    ("BatchNorm1d", (4,), (2, 4, 0)),
    ("BatchNorm2d", (4,), (0, 4, 2, 3)),
    ("BatchNorm3d", (4,), (2, 4, 1, 0, 3)),
    *(("SyncBatchNorm", (4,), shape) for shape in ((0, 4), (2, 4, 1, 0))),
    *(("InstanceNorm1d", (4,), shape) for shape in ((0, 4, 3), (2, 4, 0), (4, 0))),
    *(("InstanceNorm2d", (4,), shape) for shape in ((0, 4, 3, 2), (2, 4, 0, 1))),
    ("InstanceNorm3d", (4,), (0, 4, 2, 2, 2)),
    *(("LayerNorm", (4,), shape) for shape in ((0, 4), (2, 0, 4))),
    ("LayerNorm", ((0, 3),), (2, 0, 3)),
    *(("GroupNorm", (2, 4), shape) for shape in ((0, 4), (0, 4, 3), (2, 4, 0), (2, 4, 3, 0))),
]
TORCH_FAILS = (IndexError, RuntimeError)


@pytest.mark.parametrize(("name", "args", "shape"), EMPTY)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@every_mode
def test_empty(
    name: str, args: Any, shape: tuple[int, ...], affine: bool, track: bool, training: bool
) -> None:
    kwargs = {"elementwise_affine" if name == "LayerNorm" else "affine": affine}
    if "Batch" in name or "Instance" in name:
        kwargs["track_running_stats"] = track
    mine, theirs = Case(name, args, shape, kwargs).pair()
    before = {key: value.clone() for key, value in mine.named_buffers() if key != "num_batches_tracked"}
    x = torch.zeros(shape)
    got, expected = run(mine.train(training), x), outcome(lambda: run(theirs.train(training), x))
    assert got["output"].shape == got["input.grad"].shape == shape
    for key, value in got.items():
        if key.endswith(("weight.grad", "bias.grad")):
            assert not value.any(), key
    assert_same({key: got[key] for key in before}, before, 0)
    # torch's affine instance norm fails on an empty batch, its plain one then makes the statistics NaN, and
    # newer torch's group norm refuses empty samples, where older's has NaN gradients: none of it is followed.
    if expected[0] is None:
        for key, value in expected[1].items():
            if not value.isnan().any():
                assert_same(got[key], value, 0)
    else:
        assert (name.startswith("Instance") and affine) or name == "GroupNorm"
        assert expected[0] in TORCH_FAILS


# --- Errors

WRONG = [  # layer, arguments, shape of the input
    *(("BatchNorm1d", (4,), shape) for shape in ((4,), (2, 4, 3, 3), (1, 4), (1, 4, 1), (2, 5), (2, 3, 3))),
    *(("BatchNorm2d", (4,), shape) for shape in ((2, 4, 3), (2, 4, 3, 3, 3), (1, 4, 1, 1), (2, 5, 3, 3))),
    *(("BatchNorm3d", (4,), shape) for shape in ((2, 4, 3, 3), (1, 4, 1, 1, 1), (2, 1, 3, 3, 3))),
    *(("SyncBatchNorm", (4,), shape) for shape in ((4,), (1, 4), (1, 4, 1, 1), (2, 5), (2, 0), (2, 1, 3))),
    *(
        ("InstanceNorm1d", (4,), shape)
        for shape in ((4,), (2, 4, 3, 3), (2, 4, 1), (4, 1), (2, 5, 3), (5, 3))
    ),
    *(
        ("InstanceNorm2d", (4,), shape)
        for shape in ((2, 4), (2, 4, 3, 3, 3), (2, 4, 1, 1), (4, 1, 1), (2, 1, 3, 3))
    ),
    *(
        ("InstanceNorm3d", (4,), shape)
        for shape in ((2, 4, 3), (2, 4, 1, 1, 1), (2, 5, 3, 3, 3), (5, 3, 3, 3))
    ),
    *(("LayerNorm", (4,), shape) for shape in ((), (3,), (2, 1), (4, 2))),
    *(("LayerNorm", ((3, 4),), shape) for shape in ((4,), (4, 3), (2, 3, 1), (3, 4, 1))),
    ("LayerNorm", ((),), (3,)),
    *(("GroupNorm", (2, 4), shape) for shape in ((), (4,), (2, 5), (2, 6), (1, 2), (2, 8, 3))),
    ("GroupNorm", (4, 4), (1, 4)),
    ("GroupNorm", (1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize(("name", "args", "shape"), WRONG)
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@every_mode
def test_errors(
    name: str, args: Any, shape: tuple[int, ...], affine: bool, track: bool, training: bool
) -> None:
    kwargs = {"elementwise_affine" if name == "LayerNorm" else "affine": affine}
    if "Batch" in name or "Instance" in name:
        kwargs["track_running_stats"] = track
    mine, theirs = (layer.train(training) for layer in Case(name, args, shape, kwargs).pair())
    seen = []
    for layer in (mine, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error, message = outcome(lambda layer=layer: layer(torch.ones(shape)))
        seen.append((error, message, [(w.category, str(w.message)) for w in caught]))
    (got, got_message, got_warnings), (expected, message, expected_warnings) = seen
    assert got is expected
    assert got_warnings == expected_warnings
    assert (got is None) == tolerated(name, shape, affine, track, training)
    if got is None:
        assert_same(got_message, message, 1e-6)
    elif got is ValueError:
        assert got_message == message
    elif not (name == "GroupNorm" and shape in ((2, 6), (2, 8, 3))):
        assert got_message.split()[:3] == message.split()[:3]  # the own message goes on to say more
    else:
        assert got_message.startswith("weight should contain")
    for key, value in theirs.state_dict().items():
        if value is not None:
            assert torch.equal(mine.state_dict()[key], value), key


def tolerated(name: str, shape: tuple[int, ...], affine: bool, track: bool, training: bool) -> bool:
    """What is no error with these arguments: so that the above is not a comparison of successes."""
    if name == "GroupNorm":
        return shape in ((2, 6), (2, 8, 3)) and not affine  # the channels are checked by the weight alone
    if name == "LayerNorm":
        return False
    by_stats = track and not training
    one_value = shape in ((1, 4), (1, 4, 1), (1, 4, 1, 1), (1, 4, 1, 1, 1))
    if name == "SyncBatchNorm":
        fits = len(shape) > 1 and shape[1] > 0 and (by_stats or not one_value)
        return fits and (shape[1] == 4 or not (affine or track))
    rank = int(name[-2])
    if "Batch" in name:
        if len(shape) not in ((2, 3) if rank == 1 else (rank + 2,)) or (one_value and not by_stats):
            return False
        return shape[1] == 4 or not (affine or track)
    if len(shape) not in (rank + 1, rank + 2):
        return False
    channels, spatial = shape[-rank - 1], shape[-rank:]
    return (channels == 4 or not (affine or track)) and (by_stats or set(spatial) != {1})


def test_a_warning_about_unused_channels() -> None:
    with pytest.warns(UserWarning, match="input's size at dim=1 does not match num_features"):
        own.InstanceNorm1d(4)(torch.randn(2, 5, 3))


@pytest.mark.parametrize(
    ("name", "args"), [("GroupNorm", (3, 4)), ("GroupNorm", (0, 4)), ("BatchNorm1d", (-1,))]
)
def test_errors_of_the_constructor(name: str, args: tuple[int, ...]) -> None:
    got = outcome(lambda: getattr(own, name)(*args))
    assert got == outcome(lambda: getattr(nn, name)(*args))
    assert got[0] in (ValueError, ZeroDivisionError, RuntimeError)


@every_case
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_parameter_of_another_shape(case: Case, which: str) -> None:
    for layer in case.pair():
        if getattr(layer, which) is None:
            pytest.skip("no parameters")
        setattr(layer, which, nn.Parameter(torch.ones(1)))
        with pytest.raises(RuntimeError, match=r"should contain|Expected .* to be (of same shape|a vector)"):
            layer(case.data())


@every_case
@every_mode
def test_meta_device(case: Case, training: bool) -> None:
    mine, theirs = (
        getattr(module, case.name)(*case.args, **case.kwargs, device="meta").train(training)
        for module in (own, nn)
    )
    x = case.data().to("meta")
    got, expected = run(mine, x), run(theirs, x)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key].shape, got[key].dtype, got[key].device) == (value.shape, value.dtype, value.device)
