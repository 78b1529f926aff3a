"""The affine kernel: right values and gradients, nothing kept, no batch-mates, no stale scale."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import freezekit
from freezekit import freeze
from freezekit.nn import FrozenAffine

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d (N, C)": (nn.BatchNorm1d, (8, 5)),
    "BatchNorm1d (N, C, L)": (nn.BatchNorm1d, (8, 5, 7)),
    "BatchNorm2d": (nn.BatchNorm2d, (4, 5, 9, 7)),
    "BatchNorm3d": (nn.BatchNorm3d, (2, 5, 3, 4, 5)),
    "SyncBatchNorm": (nn.SyncBatchNorm, (4, 5, 9, 7)),
    "own BatchNorm2d": (freezekit.nn.BatchNorm2d, (4, 5, 9, 7)),
    "own SyncBatchNorm": (freezekit.nn.SyncBatchNorm, (4, 5, 9, 7)),
}


def pair(kind: str, device: str = "cpu", bn: str = "freeze", **kwargs: Any) -> tuple[Any, Any, Tensor]:
    maker, shape = LAYERS[kind]
    live = zoo.scramble(maker(5, **kwargs)).to(device).eval()
    model = nn.Sequential(copy.deepcopy(live))
    freeze(model, "0", bn=bn, convert="affine")
    model.train()
    assert isinstance(model[0], FrozenAffine)
    return live, model[0], torch.randn(shape, device=device) * 3 + 1


def oracle(live: Any, x: Tensor) -> Tensor:
    return copy.deepcopy(live).double()(x.double())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", LAYERS)
def test_values(kind: str, device: str, dtype: torch.dtype, affine: bool) -> None:
    live, frozen, x = pair(kind, device, affine=affine)
    if dtype is torch.float64:
        live, frozen = live.double(), frozen.double()
    x = x.to(dtype)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14}.get(dtype, 2 * torch.finfo(dtype).eps)
    for memory_format in (torch.contiguous_format, torch.channels_last)[: 1 + (x.dim() == 4)]:
        x = x.contiguous(memory_format=memory_format)
        expected, out = live(x), frozen(x)
        torch.testing.assert_close(out.double(), oracle(live, x), rtol=tolerance, atol=tolerance)
        assert out.dtype == expected.dtype
        assert out.stride() == expected.stride()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_of_the_input(kind: str, affine: bool) -> None:
    live, frozen, x = pair(kind, affine=affine)
    live, frozen = live.double(), frozen.double()
    weight, gradients = torch.randn_like(x).double(), []
    for layer in (live, frozen):
        leaf = x.double().requires_grad_()
        (layer(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(frozen, (x.double().requires_grad_(),))


@pytest.mark.parametrize("kind", LAYERS)
def test_gamma_and_beta_train_when_only_statistics_are_frozen(kind: str) -> None:
    live, frozen, x = pair(kind, bn="freeze_stats")
    live, frozen, x = live.double(), frozen.double(), x.double()
    for layer in (live, frozen):
        layer(x.requires_grad_()).square().sum().backward()
    torch.testing.assert_close(frozen.weight.grad, live.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frozen.bias.grad, live.bias.grad, rtol=1e-12, atol=1e-12)


def test_no_activation_is_kept() -> None:
    _, frozen, x = pair("BatchNorm2d")
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16()):
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = frozen(layout.requires_grad_())
        assert out.requires_grad
        assert sum(kept) <= 2 * 5


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 13, 17, 33, 100, 1025])
@pytest.mark.parametrize("size", [(), (1, 1), (3, 5), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_batch(channels: int, size: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = zoo.scramble(FrozenAffine(channels))
    for batch in (2, 3, 17, 130):
        x = torch.randn(batch, channels, *size).to(dtype)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)) if size else (x,):
            whole = layer(layout)
            for k in (0, batch // 2, batch - 1):
                assert torch.equal(layer(layout[k : k + 1])[0], whole[k])
                assert torch.equal(layer(layout[k:])[0], whole[k])


@pytest.mark.parametrize("kind", [k for k in LAYERS if not k.startswith("own")])
def test_what_torch_refuses_is_refused_alike(kind: str) -> None:
    live, frozen, x = pair(kind)
    wrong = x.new_ones((2, 7, *x.shape[2:]))
    for bad in (torch.randn(5), torch.randn(1, 1, *x.shape, 1, 1), wrong):
        with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever it is, ours must be the same
            live(bad)
        with pytest.raises(type(theirs.value)) as ours:
            frozen(bad)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(NotImplementedError, match="not implemented for"):
        frozen(x.long())


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_batch(kind: str) -> None:
    live, frozen, x = pair(kind)
    assert frozen(x[:0]).shape == live(x[:0]).shape


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("how", ["data", "copy_", "assign", "numpy", "load"])
def test_a_tensor_that_changed_is_seen(name: str, how: str) -> None:
    live, frozen, x = pair("BatchNorm2d")
    frozen(x)  # remembers
    new = torch.rand(5) + 0.5
    tensor = getattr(frozen, name)
    if how == "data":
        tensor.data.copy_(new)
    elif how == "copy_":
        tensor.detach().copy_(new)
    elif how == "numpy":
        tensor.detach().numpy()[:] = new.numpy()
    elif how == "assign":
        tensor.data = new.clone()
    else:
        frozen.load_state_dict({**frozen.state_dict(), name: new})
    getattr(live, name).data.copy_(new)
    torch.testing.assert_close(frozen(x), live(x))
    frozen.eps = live.eps = 0.5
    torch.testing.assert_close(frozen(x), live(x))
    assert torch.equal(frozen.double()(x.double()).float(), live.double()(x.double()).float())


def test_what_inference_mode_remembered_can_be_trained_through() -> None:
    live, frozen, x = pair("BatchNorm2d")
    with torch.inference_mode():
        frozen(x)
    frozen(x.requires_grad_()).sum().backward()
    live(x.detach()).sum()
    assert x.grad is not None


def test_functional_call_and_vmap() -> None:
    live, frozen, x = pair("BatchNorm2d")
    frozen(x)
    state = {name: tensor.detach() + 1 for name, tensor in live.state_dict().items()}
    expected = torch.func.functional_call(live, state, (x,))
    torch.testing.assert_close(torch.func.functional_call(frozen, state, (x,)), expected)
    stacked = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.func.vmap(frozen)(stacked), torch.stack([live(x), live(x + 1)]))
    states = {name: torch.stack([t, t + 1]) for name, t in state.items()}
    out = torch.func.vmap(lambda s: torch.func.functional_call(frozen, s, (x,)))(states)
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(frozen(x), live(x))


def test_under_autocast() -> None:
    live, frozen, x = pair("BatchNorm2d")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(frozen(x), live(x))
        assert frozen(x.bfloat16()).dtype == live(x.bfloat16()).dtype


def test_symbolic_tracing_reads_the_parameters() -> None:
    live, frozen, x = pair("BatchNorm2d")
    graph = torch.fx.symbolic_trace(nn.Sequential(frozen))
    assert sum(node.op == "call_function" for node in graph.graph.nodes) == 1
    for layer in (live, frozen):
        layer.running_mean.add_(1)
    torch.testing.assert_close(graph(x), live(x))


def test_constructed_directly() -> None:
    live = zoo.scramble(nn.BatchNorm2d(3)).eval()
    layer = FrozenAffine(3)
    layer.load_state_dict(live.state_dict(), strict=True)
    live.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.train()(x), live(x))
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    with pytest.raises(ValueError, match=r"needs running statistics.*track_running_stats=True"):
        FrozenAffine(3, track_running_stats=False)(x)
    with pytest.raises(ValueError, match="at least 2D"):
        layer(torch.ones(3))


def test_transposed_input_comes_out_contiguous_as_torchs_does() -> None:
    live, frozen, _ = pair("BatchNorm1d (N, C, L)")
    x = torch.randn(4, 7, 5).transpose(1, 2)
    assert frozen(x).stride() == live(x).stride()
    frozen(x).view(-1)
