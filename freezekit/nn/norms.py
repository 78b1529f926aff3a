"""Instance, layer and group normalisation: torch's layers in every respect but the arithmetic."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from freezekit.nn import functional
from freezekit.nn.bias import OptionalBias
from freezekit.nn.checks import check_operands, quiet_in_trace

__all__ = ["GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm"]


# The layers hand themselves to these functions, so that `torch.fx` traces one node for a layer, as it does
# for torch's; the node looks at the layer, and so follows `train()` and `eval()`, each time it runs.
@torch.fx.wrap
def _instance_norm(layer: _OwnInstanceNorm, input: Tensor) -> Tensor:
    layer._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's, without hints
    unbatched = input.dim() == layer._unbatched_rank
    channel_dim = 0 if unbatched else 1
    channels = input.size(channel_dim)
    if channels != layer.num_features:
        if layer.affine:
            raise ValueError(
                f"expected input's size at dim={channel_dim} to match num_features ({layer.num_features}), "
                f"but got: {channels}."
            )
        warnings.warn(
            f"input's size at dim={channel_dim} does not match num_features. You can silence this warning by "
            "not passing in num_features, which is not used because affine=False",
            stacklevel=3,
        )
    return layer._normalise(input.unsqueeze(0)).squeeze(0) if unbatched else layer._normalise(input)


@torch.fx.wrap
def _layer_norm(layer: LayerNorm, input: Tensor) -> Tensor:
    return layer._normalise(input)


@torch.fx.wrap
def _group_norm(layer: GroupNorm, input: Tensor) -> Tensor:
    return layer._normalise(input)


class _OwnInstanceNorm(OptionalBias, _InstanceNorm):
    """Mixin: the constructor and forward of the own instance normalisation."""

    _unbatched_rank: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]  # None too
        if not bias:
            self.drop_bias()

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by each instance, or in eval by the running statistics where they are tracked."""
        return _instance_norm(self, input)

    @quiet_in_trace
    def _normalise(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.track_running_stats and not self.training:
            if mean is None or var is None:
                raise RuntimeError(
                    "Expected running_mean and running_var to be defined when use_input_stats is false"
                )
            return functional.batch_norm_eval(input, mean, var, self.weight, self.bias, self.eps)
        if (mean is None) != (var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        check_operands(input, running_mean=mean, running_var=var)
        output, instance_mean, instance_var = functional.instance_norm_train(
            input, self.weight, self.bias, self.eps
        )
        # Wherever there are statistics, as torch, even if `track_running_stats` was switched off afterwards;
        # but never in eval, where torch then moves them too.
        if self.training and mean is not None and var is not None and input.numel() > 0:
            # torch has no cumulative average here: without a momentum the statistics stay.
            factor = 0.0 if self.momentum is None else self.momentum
            moments = instance_mean.mean(0), instance_var.mean(0)
            # By an alias, as torch: torch.func lets a function write to nothing that was made outside it.
            mean, var = torch.ops.aten.alias(mean), torch.ops.aten.alias(var)
            functional.update_running_stats(mean, var, *moments, math.prod(input.shape[2:]), factor)
        return output


class InstanceNorm1d(_OwnInstanceNorm, nn.InstanceNorm1d):
    """Instance normalisation of sequences, a drop-in for ``torch.nn.InstanceNorm1d``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``

    See :class:`InstanceNorm2d` for the arguments and the modes.

    Shape:
        (N, C, L) or (C, L), output the same.

    Raises:
        ValueError: the input has another rank, channels that do not fit, or one value for each channel.
        RuntimeError: a dtype, or the statistics, do not fit the input.

    >>> InstanceNorm1d(2)(torch.tensor([[[1.0, 3.0], [9.0, 5.0]]])).round(decimals=3)
    tensor([[[-1.,  1.],
             [ 1., -1.]]])

    Source: Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022;
    https://pytorch.org/docs/stable/generated/torch.nn.InstanceNorm1d.html
    """

    _unbatched_rank = 2


class InstanceNorm2d(_OwnInstanceNorm, nn.InstanceNorm2d):
    """Instance normalisation of images, a drop-in for ``torch.nn.InstanceNorm2d``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``

    The mean and the biased variance of each channel of each sample normalise it, in training and in eval.
    With ``track_running_stats`` the running statistics follow in training, ``running = (1 - momentum) *
    running + momentum * batch``, where ``batch`` is the mean over the samples of their mean and unbiased
    variance; in eval the running statistics normalise. Eval never moves them.

    As :class:`freezekit.nn.BatchNorm2d` it is a subclass of torch's layer, whose names in ``state_dict``,
    loading and errors it keeps. Unlike torch's it returns channels-last for channels-last, and takes an empty
    batch when it is affine.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; ``None`` leaves them, as torch does.
        affine: whether there are a ``weight`` and a ``bias``.
        track_running_stats: whether there are running statistics.
        device: where the parameters and statistics are made.
        dtype: their dtype.
        bias: whether an affine layer has a ``bias``; also on a torch whose own layer does not take it.

    Shape:
        (N, C, H, W) or (C, H, W), output the same, in the input's dtype.

    Raises:
        ValueError: the input has another rank, channels that do not fit an affine layer, or one value for
            each channel of a sample while it is normalised by itself.
        RuntimeError: a dtype, or the statistics, do not fit the input.

    >>> layer = InstanceNorm2d(2, momentum=0.3, track_running_stats=True)
    >>> layer(torch.ones(3, 2, 2, 2)).shape, layer.running_mean, layer.running_var
    (torch.Size([3, 2, 2, 2]), tensor([0.3000, 0.3000]), tensor([0.7000, 0.7000]))

    Source: Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022;
    https://pytorch.org/docs/stable/generated/torch.nn.InstanceNorm2d.html
    """

    _unbatched_rank = 3


class InstanceNorm3d(_OwnInstanceNorm, nn.InstanceNorm3d):
    """Instance normalisation of volumes or videos, a drop-in for ``torch.nn.InstanceNorm3d``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``

    See :class:`InstanceNorm2d` for the arguments and the modes.

    Shape:
        (N, C, D, H, W) or (C, D, H, W), output the same, in the input's dtype.

    Raises:
        ValueError: the input has another rank, channels that do not fit, or one value for each channel.
        RuntimeError: a dtype, or the statistics, do not fit the input.

    >>> InstanceNorm3d(2)(torch.zeros(2, 1, 2, 3)).shape
    torch.Size([2, 1, 2, 3])

    Source: Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022;
    https://pytorch.org/docs/stable/generated/torch.nn.InstanceNorm3d.html
    """

    _unbatched_rank = 4


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, a drop-in for ``torch.nn.LayerNorm``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``, over the dimensions of ``normalized_shape``.

    Args:
        normalized_shape: the sizes of the last dimensions, or the size of the last one.
        eps: added to the variance.
        elementwise_affine: whether there are a ``weight`` and a ``bias``.
        bias: whether an affine layer has a ``bias``.
        device: where the parameters are made.
        dtype: their dtype.

    Shape:
        (*, *normalized_shape), output the same, in the input's dtype.

    Raises:
        RuntimeError: the input does not end in ``normalized_shape``, or has a dtype that does not fit.

    >>> LayerNorm(2)(torch.tensor([[1.0, 3.0], [9.0, 5.0]])).round(decimals=3)
    tensor([[-1.,  1.],
            [ 1., -1.]], grad_fn=<RoundBackward1>)

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450;
    https://pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last dimensions."""
        return _layer_norm(self, input)

    @quiet_in_trace
    def _normalise(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(OptionalBias, nn.GroupNorm):
    """Group normalisation, a drop-in for ``torch.nn.GroupNorm``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``, over each group of channels of each sample.

    Args:
        num_groups: G.
        num_channels: C.
        eps: added to the variance.
        affine: whether there are a ``weight`` and a ``bias``.
        device: where the parameters are made.
        dtype: their dtype.
        bias: whether an affine layer has a ``bias``; also on a torch whose own layer does not take it.

    Shape:
        (N, C, *), output the same, in the input's dtype and memory format.

    Raises:
        ValueError: C does not divide into G groups, or a group of the input holds a single value.
        RuntimeError: the input's rank, channels or dtype do not fit.

    >>> GroupNorm(1, 2)(torch.tensor([[1.0, 3.0], [9.0, 5.0]])).round(decimals=3)
    tensor([[-1.,  1.],
            [ 1., -1.]], grad_fn=<RoundBackward1>)

    Source: Wu and He 2018, arXiv:1803.08494;
    https://pytorch.org/docs/stable/generated/torch.nn.GroupNorm.html
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.drop_bias()

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each group of channels."""
        return _group_norm(self, input)

    @quiet_in_trace
    def _normalise(self, input: Tensor) -> Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
