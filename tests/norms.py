"""One table of every own normalisation layer, beside torch's of the same arguments and state."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freezekit.nn as own

NAMES = [
    *(f"{kind}Norm{rank}d" for kind in ("Batch", "Instance") for rank in (1, 2, 3)),
    "SyncBatchNorm",
    "LayerNorm",
    "GroupNorm",
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.bfloat16, torch.float16]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer's name, its arguments, and the shape of an input for it."""

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tracks(self) -> bool:
        return bool(self.kwargs.get("track_running_stats", "BatchNorm" in self.name))

    def mine(self, **kwargs: Any) -> Any:
        """The own layer, randomised."""
        return randomised(getattr(own, self.name)(*self.args, **{**self.kwargs, **kwargs}))

    def pair(self, **kwargs: Any) -> tuple[Any, Any]:
        """The own layer and torch's, in the same random state."""
        mine = self.mine(**kwargs)
        theirs = theirs_of(self.name, *self.args, **{**self.kwargs, **kwargs})
        theirs.load_state_dict(mine.state_dict(), strict=True)
        return mine, theirs

    def data(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", batch: int | None = None
    ) -> Tensor:
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return data(shape, dtype, device)


TRACK = {"affine": True, "track_running_stats": True}
CASES = {
    "bn1-NC": Case("BatchNorm1d", (4,), (6, 4)),
    "bn1": Case("BatchNorm1d", (4,), (3, 4, 5)),
    "bn2": Case("BatchNorm2d", (4,), (3, 4, 2, 5)),
    "bn2-batch": Case("BatchNorm2d", (4,), (3, 4, 2, 5), {"track_running_stats": False}),
    "bn3": Case("BatchNorm3d", (4,), (2, 4, 2, 3, 2)),
    "sync-NC": Case("SyncBatchNorm", (4,), (6, 4)),
    "sync": Case("SyncBatchNorm", (4,), (3, 4, 2, 5)),
    "in1": Case("InstanceNorm1d", (4,), (3, 4, 5)),
    "in1-track": Case("InstanceNorm1d", (4,), (3, 4, 5), TRACK),
    "in2": Case("InstanceNorm2d", (4,), (3, 4, 2, 5), {"affine": True}),
    "in2-track": Case("InstanceNorm2d", (4,), (3, 4, 2, 5), TRACK),
    "in3-track": Case("InstanceNorm3d", (4,), (2, 4, 2, 3, 2), TRACK),
    "ln": Case("LayerNorm", (5,), (3, 4, 5)),
    "ln-2": Case("LayerNorm", ((2, 5),), (3, 4, 2, 5)),
    "gn-NC": Case("GroupNorm", (2, 4), (3, 4)),
    "gn": Case("GroupNorm", (2, 4), (3, 4, 2, 5)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def theirs_of(name: str, *args: Any, **kwargs: Any) -> Any:
    """torch's layer, with ``bias=False`` also where this torch's layer does not take it."""
    cls = getattr(nn, name)
    if "bias" in kwargs and "bias" not in inspect.signature(cls).parameters:
        layer = theirs_of(name, *args, **{key: value for key, value in kwargs.items() if key != "bias"})
        if not kwargs["bias"]:
            layer.register_parameter("bias", None)
        return layer
    return cls(*args, **kwargs)


def randomised(layer: Any) -> Any:
    """Nothing is left at the value it has by default."""
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if name == "num_batches_tracked":
                tensor.fill_(7)
            elif name == "running_var":
                tensor.copy_(torch.rand(tensor.shape) + 0.3)
            else:
                tensor.copy_(torch.randn(tensor.shape) + (name == "weight"))
    return layer


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Channels with their own means and deviations."""
    per_channel = [1, shape[1], *[1] * (len(shape) - 2)]
    x = torch.randn(shape) * (torch.rand(per_channel) * 3 + 0.2) + torch.randn(per_channel) * 2
    return x.to(device, dtype)


def run(layer: Any, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """One step: the output, every gradient, every statistic afterwards."""
    layer.zero_grad()
    x = x.detach().requires_grad_()  # no copy: the strides are part of what is tested
    output = layer(x)
    if grad is None:
        grad = (
            torch.linspace(-1, 2, output.numel(), device=x.device)
            .reshape(output.shape)
            .cos()
            .to(output.dtype)
        )
    grads = torch.autograd.grad(output, [x, *layer.parameters()], grad)
    names = ["input.grad", *(f"{name}.grad" for name, _ in layer.named_parameters())]
    seen = {"output": output.detach(), **dict(zip(names, grads, strict=True))}
    return seen | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def outcome(function: Callable[[], Any]) -> tuple[type[BaseException] | None, Any]:
    """What a function raises, with the message; or ``None``, with what it returns."""
    try:
        return None, function()
    except Exception as error:
        return type(error), str(error)


def assert_same(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_no_less_exact(
    got: dict[str, Tensor], native: dict[str, Tensor], oracle: dict[str, Tensor]
) -> None:
    """As near to a float64 oracle as torch's own layer: twice its error, and what one rounding may cost."""
    assert got.keys() == native.keys() == oracle.keys()
    for key, truth in oracle.items():
        assert got[key].dtype == native[key].dtype, key
        if not truth.is_floating_point():
            assert torch.equal(got[key], native[key]), key
            continue
        # Of the largest value; sums in float32 end within a few ulp of each other, whatever their order.
        ulps = 4 if got[key].dtype == torch.float32 else 1
        floor = ulps * torch.finfo(got[key].dtype).eps * float(truth.abs().max())
        error, native_error = ((seen[key].double() - truth).abs().max() for seen in (got, native))
        assert error <= 2 * native_error + floor, key
