"""The eager kernels walk the input in blocks: here the blocks are tiny, so that there are many."""

from __future__ import annotations

import copy

import pytest
import torch
from norms import CASES, Case, assert_no_less_exact, assert_same, run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import freezekit.nn as own
from freezekit.nn import batch_kernels, kernels

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
}


@pytest.mark.parametrize("block", [1, 24, 70, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_block_by_block_as_torch(
    case: Case, layout: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_kernels, "_SMALL", 0)
    monkeypatch.setattr(kernels, "_BLOCK", block)
    mine, theirs = case.pair(dtype=torch.float64)
    x = LAYOUTS[layout](case.data(torch.float64, batch=7))
    grad = LAYOUTS[layout](torch.randn(x.shape, dtype=torch.float64))
    assert_same(run(mine, x, grad), run(theirs, x, grad), 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 6, 40, 40), (2, 3, 70, 70), (3000, 40), (16, 512, 9)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_large_inputs_keep_the_variance(
    shape: tuple[int, ...], layout: str, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 20_000)
    # Samples far from each other: the pivot, taken from the first of them, is then far from the mean.
    x = torch.randn(shape) * 1e-2 + offset
    x[0] += 1.0 if offset else 0.0
    x = LAYOUTS[layout](x)
    layer = {2: own.BatchNorm1d, 3: own.BatchNorm1d, 4: own.BatchNorm2d}[x.dim()](shape[1], momentum=1.0)
    y = layer(x)
    truth = x.double()
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(truth, dims, correction=1)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-7, atol=1e-8)
    expected = nn.functional.batch_norm(truth, None, None, training=True)
    assert (y.double() - expected).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["weight", "bias", "input"])
def test_only_what_is_asked_for_gets_a_gradient(name: str) -> None:
    for shape in ((8, 4), (8, 4, 60, 60)):
        layer = own.BatchNorm1d(4) if len(shape) == 2 else own.BatchNorm2d(4)
        twin = nn.BatchNorm1d(4) if len(shape) == 2 else nn.BatchNorm2d(4)
        x, grad = torch.randn(shape), torch.randn(shape)
        found: list[Tensor | None] = []
        for module in (layer, twin):
            module.requires_grad_(False)
            leaf = x.clone() if name == "input" else getattr(module, name)
            leaf.requires_grad_()
            module(leaf if name == "input" else x).backward(grad)
            found.append(leaf.grad)
            assert [p.grad is None for p in module.parameters()].count(False) == (name != "input")
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1, 60])
def test_nothing_but_the_input_is_kept(case: Case, size: int) -> None:
    if case.name == "GroupNorm" and len(case.shape) == 2:
        pytest.skip("computed by the plain formula")
    x = case.data(batch=500 * size).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.mine().train()(x)
    whole = {t.untyped_storage().data_ptr() for t in kept if t.untyped_storage().nbytes() >= x.nbytes}
    assert whole == {x.data_ptr()}


LARGE = {
    "bn": Case("BatchNorm2d", (64,), (4, 64, 56, 56)),
    "bn-7": Case("BatchNorm2d", (1024,), (4, 1024, 7, 7)),
    "bn-rows": Case("BatchNorm1d", (256,), (300, 256)),
    "in": Case("InstanceNorm2d", (16,), (2, 16, 200, 210), {"affine": True}),
    "ln": Case("LayerNorm", ((64, 56, 56),), (2, 64, 56, 56)),
    "ln-prime": Case("LayerNorm", (70_001,), (2, 3, 70_001)),
    "gn": Case("GroupNorm", (32, 256), (2, 256, 28, 28)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large_inputs_no_less_exact_than_torch(case: Case, layout: str) -> None:
    mine, theirs = case.pair()
    oracle = copy.deepcopy(theirs).double()
    x, grad = LAYOUTS[layout](case.data()), LAYOUTS[layout](torch.randn(case.shape))
    assert_no_less_exact(run(mine, x, grad), run(theirs, x, grad), run(oracle, x.double(), grad.double()))


SIZES = [2, 4000]
"""Samples of a small input, and of one that is walked in blocks."""


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hooks_and_kept_gradients_run_once_in_double_backward(case: Case, size: int) -> None:
    found = []
    for layer in case.pair(dtype=torch.float64):
        torch.manual_seed(0)
        leaf = case.data(torch.float64, batch=size).requires_grad_()
        x = leaf * 2
        x.retain_grad()
        for tensor in (x, *layer.parameters()):
            tensor.register_hook(lambda g: g * 3)
        layer.train()(x).pow(3).sum().backward(create_graph=True)
        found.append([leaf.grad.detach(), x.grad.detach(), *(p.grad.detach() for p in layer.parameters())])
        leaf.grad = x.grad = None
        layer.zero_grad()
    assert_same(*found, 1e-8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_batches_of_gradients(case: Case, size: int) -> None:
    found = []
    for layer in case.pair(dtype=torch.float64):
        torch.manual_seed(0)
        x = case.data(torch.float64, batch=size).requires_grad_()
        y = layer.train()(x)
        grads = torch.randn(3, *y.shape, dtype=torch.float64)
        found.append(torch.autograd.grad(y, [x, *layer.parameters()], grads, is_grads_batched=True))
    assert_same(*found, 1e-8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_recorded_and_fake(case: Case, size: int) -> None:
    layer, x = case.mine(), case.data(batch=size)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == x.shape
    if not case.tracks:
        recorded = make_fx(layer)(x)
        assert_same(recorded(x), layer(x), 1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_layer_norm_with_half_of_its_parameters(weight: bool, bias: bool) -> None:
    mine, theirs = Case("LayerNorm", (50,), (300, 50)).pair()
    for layer in (mine, theirs):
        layer.weight = layer.weight if weight else None
        layer.bias = layer.bias if bias else None
    x, grad = torch.randn(300, 50), torch.randn(300, 50)
    assert_same(run(mine, x, grad), run(theirs, x, grad), 1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["bn2", "in2", "gn"])
def test_a_bias_may_change_before_backward(name: str, size: int) -> None:
    layer = CASES[name].mine()
    layer.weight.requires_grad_(False)
    loss = layer(CASES[name].data(batch=size).requires_grad_()).square().sum()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        layer.bias.add_(1.0)
    loss.backward()


@pytest.mark.parametrize("name", ["bn1-NC", "bn2", "in2-track"])
def test_eval_with_a_trained_weight_keeps_the_input_alone(name: str) -> None:
    case = CASES[name]
    mine, theirs = case.pair(dtype=torch.float64)
    x = case.data(torch.float64, batch=100).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mine.eval()(x)
    assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {x.data_ptr()}
    grad = torch.randn_like(x)
    assert_same(run(mine, x, grad), run(theirs.eval(), x, grad), 1e-9)
    assert torch.autograd.gradgradcheck(mine, case.data(torch.float64).requires_grad_())
