"""Batch normalisation: torch's layers in every respect but the arithmetic, which is freezekit's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from freezekit.nn import functional
from freezekit.nn.bias import OptionalBias
from freezekit.nn.checks import check_operands, quiet_in_trace

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


@torch.fx.wrap  # a traced graph has one node for the layer, as for torch's, and the node asks for its mode
def _batch_norm(layer: _OwnForward, input: Tensor) -> Tensor:
    return layer._normalise(input)


class _OwnForward(OptionalBias, _BatchNorm):
    """Mixin: the forward of torch's batch normalisation, computed by :mod:`freezekit.nn.functional`."""

    frozen: bool = False
    """Whether the layer is frozen; the classes that freezing swaps in say ``True``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.drop_bias()

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the batch (training, or no running statistics) or by the running statistics."""
        return _batch_norm(self, input)

    @quiet_in_trace
    def _normalise(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's, without hints
        self._count()  # before anything below can fail, because torch does
        mean, var = self._running()
        if not self.training and mean is not None and var is not None:
            return functional.batch_norm_eval(input, mean, var, self.weight, self.bias, self.eps)

        n = input.size(0) * math.prod(input.shape[2:])
        if n == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {input.size()}"
            )
        if self._tracks():
            check_operands(input, running_mean=mean, running_var=var)
        output, batch_mean, batch_var = functional.batch_norm_train(input, self.weight, self.bias, self.eps)
        self._track(batch_mean, batch_var, n)
        return output

    def _tracks(self) -> bool:
        return self.training and self.track_running_stats

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        mean, var = self.running_mean, self.running_var
        if (mean is None) != (var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        return mean, var

    def _count(self) -> None:
        if self._tracks() and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def _track(self, batch_mean: Tensor, batch_var: Tensor, n: int) -> None:
        mean, var = self.running_mean, self.running_var
        if not self._tracks() or mean is None or var is None:
            return
        factor: float | Tensor | None = self.momentum
        if factor is None:
            # 1 / count as a tensor, so that neither CUDA waits nor torch.compile breaks the graph here.
            count = self.num_batches_tracked
            factor = 0.0 if count is None else count.to(batch_mean.dtype).reciprocal()
        functional.update_running_stats(mean, var, batch_mean, batch_var, n, factor)


class BatchNorm1d(_OwnForward, torch.nn.BatchNorm1d):
    """Batch normalisation of vectors or sequences, a drop-in for ``torch.nn.BatchNorm1d``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``

    See :class:`BatchNorm2d` for the arguments, the modes, and why it is a subclass of torch's layer.

    Shape:
        (N, C) or (N, C, L), output the same.

    Raises:
        ValueError: the input has another rank, or one value per channel while the batch is the statistic.
        RuntimeError: the input's channels or dtype do not fit the layer's.

    >>> BatchNorm1d(2, momentum=0.3)(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]], grad_fn=<RoundBackward1>)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1;
    https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """


class BatchNorm2d(_OwnForward, torch.nn.BatchNorm2d):
    """Batch normalisation of images, a drop-in for ``torch.nn.BatchNorm2d``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``

    In training the batch's mean and biased variance normalise, over every dimension but the channels, and
    the running statistics follow: ``running = (1 - momentum) * running + momentum * batch``, with the
    unbiased variance. In eval the running statistics normalise, where there are any.

    It is a subclass of torch's layer on purpose. The constructor, the names in ``state_dict``, loading files
    from before ``num_batches_tracked``, the rank errors, and all code that looks for BN by its class
    (initialisers, weight-decay filters, ``swa_utils.update_bn``) are torch's. Everything ``forward``
    computes is :mod:`freezekit.nn.functional`'s.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; ``None`` for the cumulative average.
        affine: whether there are a ``weight`` and a ``bias``.
        track_running_stats: whether there are running statistics; without, the batch normalises in eval too.
        device: where the parameters and statistics are made.
        dtype: their dtype.
        bias: whether an affine layer has a ``bias``; also on a torch whose own layer does not take it.

    Shape:
        (N, C, H, W), output the same, in the input's dtype and memory format.

    Raises:
        ValueError: the input has another rank, or one value per channel while the batch is the statistic.
        RuntimeError: the input's channels or dtype do not fit the layer's.

    >>> layer = BatchNorm2d(2, momentum=0.3)
    >>> layer(torch.ones(3, 2, 2, 2)).shape, layer.running_mean, layer.running_var
    (torch.Size([3, 2, 2, 2]), tensor([0.3000, 0.3000]), tensor([0.7000, 0.7000]))

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1 and section 3.2;
    https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """


class BatchNorm3d(_OwnForward, torch.nn.BatchNorm3d):
    """Batch normalisation of volumes or videos, a drop-in for ``torch.nn.BatchNorm3d``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``

    See :class:`BatchNorm2d` for the arguments, the modes, and why it is a subclass of torch's layer.

    Shape:
        (N, C, D, H, W), output the same, in the input's dtype and memory format.

    Raises:
        ValueError: the input has another rank, or one value per channel while the batch is the statistic.
        RuntimeError: the input's channels or dtype do not fit the layer's.

    >>> BatchNorm3d(2).eval()(torch.zeros(1, 2, 1, 1, 1)).shape
    torch.Size([1, 2, 1, 1, 1])

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1;
    https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm3d.html
    """
