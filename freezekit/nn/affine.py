"""Frozen batch normalisation as one scale and one shift per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from freezekit.nn.checks import check_channels
from freezekit.nn.frozen import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenSyncBatchNorm,
    _FrozenBatchNorm,
    frozen_class,
)
from freezekit.nn.functional import as_input
from freezekit.nn.remembered import remembered

__all__ = [
    "FrozenAffine",
    "FrozenAffine1d",
    "FrozenAffine2d",
    "FrozenAffine3d",
    "affine_class",
    "scale_and_shift",
]


def scale_and_shift(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a BN layer's eval mode as a scale and a shift.

    ``scale = weight / sqrt(var + eps)``, ``shift = bias + (offset - mean) * scale``, formed in float64 and
    rounded once, to float32 or the wider dtype of the statistics. Differentiable in all tensors.

    Args:
        mean: the running mean.
        var: the running variance.
        weight: gamma, or ``None`` for 1.
        bias: beta, or ``None`` for 0.
        eps: added to the variance.
        offset: what the layer before adds to its output, if that is to be scaled with it.

    Shape:
        Everything (C).

    >>> mean, var = torch.tensor([1.0]), torch.tensor([4.0])
    >>> scale_and_shift(mean, var, torch.tensor([3.0]), None, 0.0)
    (tensor([1.5000]), tensor([-1.5000]))

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 2, step 11.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = mean * scale if offset is None else (mean - offset.double()) * scale
    shift = -shift if bias is None else bias - shift
    return scale.to(dtype), shift.to(dtype)


def _apply(input: Tensor, scale: Tensor, shift: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Compute ``input * scale + shift`` along dimension 1, keeping nothing of the input for backward.

    Either way of computing gives an element the same bits wherever it lies in the batch: the first rounds
    twice, the second multiplies and adds in one instruction, or in two, in all of a build of torch.
    """
    channels = scale.numel()
    check_channels(input, ranks, channels)
    if not input.is_floating_point():
        raise NotImplementedError(f'"batch_norm" not implemented for {input.dtype}')
    x = input if input.dtype == scale.dtype else input.to(torch.promote_types(input.dtype, scale.dtype))
    rank = x.dim()
    if rank > 2:
        shape = (channels,) + (1,) * (rank - 2)
        scale, shift = scale.view(shape), shift.view(shape)
    # Where channels lie side by side, or on a GPU, the one pass is the faster; along rows of one channel the
    # CPU's addcmul is not vectorised.
    if x.stride(1) == 1 or x.device.type != "cpu":
        output = torch.addcmul(shift, x, scale)
    else:
        output = torch.mul(x, scale).add_(shift)
    return as_input(output, input)


@torch.fx.wrap  # a traced graph has one node for the layer, as it has for torch's
def _affine(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    ranks: tuple[int, ...],
) -> Tensor:
    return _apply(input, *scale_and_shift(mean, var, weight, bias, eps), ranks)


class FrozenAffine(_FrozenBatchNorm):
    """Frozen batch normalisation as one scale and one shift per channel: the fast kernel.

    ``y = x * scale + shift``, where ``scale = weight / sqrt(running_var + eps)`` and
    ``shift = bias - running_mean * scale`` are formed in float64 and rounded to float32

    What ``convert="affine"`` makes of BN layers; constructed directly it takes the arguments of
    ``torch.nn.BatchNorm2d`` and loads its ``state_dict``. Always in eval mode. Unless ``weight`` or ``bias``
    trains, no activation is kept for backward. float16 and bfloat16 inputs are computed in float32.

    The output is not bit-identical to torch's eval mode, but as close to float64 as that is: over ResNet-18,
    MobileNetV2 and EfficientNet-B0 the features differ by at most 8e-7 of the largest in float32. A sample's
    output has the same bits whatever else is in the batch.

    Scale and shift are remembered until one of the tensors they come from changes; a write that torch does
    not count (``.data``, a collective) is noticed on the CPU, with up to 8192 channels.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: kept for the day the layer is live again.
        affine: whether there are a ``weight`` and a ``bias``.
        track_running_stats: must be ``True`` for ``forward``.
        device: where the parameters and statistics are made.
        dtype: their dtype.

    Shape:
        (N, C, *), output the same, in the input's dtype and memory format.

    Raises:
        ValueError: the input has less than two dimensions, or the layer has no running statistics.
        RuntimeError: the input has another number of channels.

    >>> layer = FrozenAffine(2)
    >>> _ = layer.running_mean.fill_(1.0), layer.running_var.fill_(4.0)
    >>> layer(torch.tensor([[5.0, 1.0]])).round(decimals=3)
    tensor([[2., 0.]], grad_fn=<RoundBackward1>)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 2, step 11; torchvision.ops.FrozenBatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift by the running statistics; nothing is updated."""
        mean, var = self._statistics()
        weight, bias, eps = self.weight, self.bias, self.eps
        if not isinstance(input, Tensor):  # a tracer's stand-in: the graph is to read the parameters
            return _affine(input, mean, var, weight, bias, eps, self._ranks)

        def form() -> tuple[Tensor, Tensor]:
            return scale_and_shift(mean, var, weight, bias, eps)

        scale, shift = remembered(self, (mean, var, weight, bias), eps, form)
        return _apply(input, scale, shift, self._ranks)


class FrozenAffine1d(FrozenAffine):
    """:class:`FrozenAffine` in the place of a ``BatchNorm1d``: (N, C) or (N, C, L)."""

    _ranks = (2, 3)


class FrozenAffine2d(FrozenAffine):
    """:class:`FrozenAffine` in the place of a ``BatchNorm2d``: (N, C, H, W)."""

    _ranks = (4,)


class FrozenAffine3d(FrozenAffine):
    """:class:`FrozenAffine` in the place of a ``BatchNorm3d``: (N, C, D, H, W)."""

    _ranks = (5,)


_AFFINE: dict[type[nn.Module], type[FrozenAffine]] = {
    FrozenBatchNorm1d: FrozenAffine1d,
    FrozenBatchNorm2d: FrozenAffine2d,
    FrozenBatchNorm3d: FrozenAffine3d,
    FrozenSyncBatchNorm: FrozenAffine,
}


def affine_class(cls: type[nn.Module]) -> type[FrozenAffine] | None:
    """Return what a BN layer of class ``cls`` becomes with ``convert="affine"``; ``None`` for anything else.

    >>> affine_class(nn.BatchNorm2d).__name__, affine_class(nn.InstanceNorm2d)
    ('FrozenAffine2d', None)
    """
    frozen = frozen_class(cls)
    return next((affine for base, affine in _AFFINE.items() if issubclass(frozen, base)), None)
