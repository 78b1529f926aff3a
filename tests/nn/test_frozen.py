"""The frozen layers: the bits of eval mode, the right gradient, nothing kept for it."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import freezekit
from freezekit import freeze

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d (N, C)": (nn.BatchNorm1d, (8, 5)),
    "BatchNorm1d (N, C, L)": (nn.BatchNorm1d, (8, 5, 7)),
    "BatchNorm2d": (nn.BatchNorm2d, (4, 5, 9, 7)),
    "BatchNorm3d": (nn.BatchNorm3d, (2, 5, 3, 4, 5)),
    "SyncBatchNorm": (nn.SyncBatchNorm, (4, 5, 9, 7)),
    "own BatchNorm1d": (freezekit.nn.BatchNorm1d, (8, 5)),
    "own BatchNorm2d": (freezekit.nn.BatchNorm2d, (4, 5, 9, 7)),
    "own BatchNorm3d": (freezekit.nn.BatchNorm3d, (2, 5, 3, 4, 5)),
    "own SyncBatchNorm": (freezekit.nn.SyncBatchNorm, (4, 5, 9, 7)),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pair(kind: str, device: str = "cpu", **kwargs: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer in eval mode, its frozen twin in a model that is told to train, and an input."""
    maker, shape = LAYERS[kind]
    live = zoo.scramble(maker(5, **kwargs)).to(device).eval()
    model = nn.Sequential(copy.deepcopy(live))
    freeze(model, "0")
    model.train()
    return live, model[0], torch.randn(shape, device=device) * 3 + 1


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", LAYERS)
def test_bits_of_eval_mode(kind: str, device: str, dtype: torch.dtype, affine: bool) -> None:
    live, frozen, x = pair(kind, device, affine=affine)
    if dtype is torch.float64:
        live, frozen = live.double(), frozen.double()
    x = x.to(dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last)[: 1 + (x.dim() == 4)]:
        x = x.contiguous(memory_format=memory_format)
        expected = live(x)
        assert torch.equal(frozen(x), expected)
        upstream = frozen(x.clone().requires_grad_())  # the path with a gradient has a kernel of its own
        assert torch.equal(upstream, expected)
        assert upstream.dtype == expected.dtype
        assert upstream.stride() == expected.stride()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_of_the_input(kind: str, affine: bool) -> None:
    live, frozen, x = pair(kind, affine=affine)
    live, frozen, x = live.double(), frozen.double(), x.double()
    weight = torch.randn_like(x)
    gradients = []
    for layer in (live, frozen):
        leaf = x.clone().requires_grad_()
        (layer(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(frozen, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(frozen, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_keeps_the_dtype_of_half_inputs(dtype: torch.dtype) -> None:
    live, frozen, x = pair("BatchNorm2d")
    gradients = []
    for layer in (live, frozen):
        leaf = x.to(dtype).requires_grad_()
        layer(leaf).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=1e-2)


def saved_elements(layer: nn.Module, x: Tensor) -> int:
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.requires_grad_())
    return count


def test_no_activation_is_kept() -> None:
    live, frozen, x = pair("BatchNorm2d")
    assert saved_elements(live, x) >= x.numel()
    assert saved_elements(frozen, x) == 2 * 5  # running_var and weight


def test_under_autocast_and_functional_call_and_vmap() -> None:
    live, frozen, x = pair("BatchNorm2d")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen(x), live(x))
    state = {name: tensor.detach() for name, tensor in live.state_dict().items()}
    assert torch.equal(torch.func.functional_call(frozen, state, (x,)), live(x))
    stacked = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.func.vmap(frozen)(stacked), torch.stack([live(x), live(x + 1)]))
    gradient = torch.func.vmap(torch.func.grad(lambda image: frozen(image[None]).sum()))(x)
    leaf = x.clone().requires_grad_()
    live(leaf).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_ranks_are_refused_as_torch_does(kind: str) -> None:
    live, frozen, x = pair(kind)
    for bad in (torch.randn(5), torch.randn(1, 1, *x.shape, 1, 1)):
        with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever it is, ours must be the same
            live(bad)
        with pytest.raises(type(theirs.value)) as ours:
            frozen(bad)
        assert str(ours.value) == str(theirs.value)


def test_trainable_affine_still_gets_its_gradient() -> None:
    """Someone may set requires_grad again: then the layer must not silently withhold the gradient."""
    live, frozen, x = pair("BatchNorm2d")
    frozen.weight.requires_grad_()
    frozen(x.requires_grad_()).square().sum().backward()
    live(x).square().sum().backward()
    torch.testing.assert_close(frozen.weight.grad, live.weight.grad)


@pytest.mark.parametrize("kind", ["BatchNorm2d", "own BatchNorm2d"])
def test_symbolic_tracing(kind: str) -> None:
    """Feature extractors are made so; torch's own layer is one node of the graph, and so is ours."""
    live, frozen, x = pair(kind)
    graph = torch.fx.symbolic_trace(nn.Sequential(frozen))
    assert torch.equal(graph(x), live(x))
    assert sum(node.op == "call_function" for node in graph.graph.nodes) == 1


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="this torch's BN has no bias argument"
)
@pytest.mark.parametrize("kind", ["BatchNorm2d", "own BatchNorm2d"])
def test_without_bias(kind: str) -> None:
    live, frozen, x = pair(kind, bias=False)
    assert torch.equal(frozen(x.requires_grad_()), live(x))


def test_constructed_directly() -> None:
    layer = freezekit.nn.FrozenBatchNorm2d(3)
    layer.load_state_dict(zoo.scramble(nn.BatchNorm2d(3)).state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    with pytest.raises(ValueError, match=r"needs running statistics.*track_running_stats=True"):
        freezekit.nn.FrozenBatchNorm2d(3, track_running_stats=False)(x)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:Skipping serialization:UserWarning"
)  # torch 2.6's own
def test_inductor() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    zoo.scramble(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    freeze(model, ["1"])
    before = zoo.snapshot(model)
    compiled = torch.compile(model.train(), fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert zoo.snapshot(model) == before
    assert model[0].weight.grad is not None  # the gradient passed through the frozen layer
