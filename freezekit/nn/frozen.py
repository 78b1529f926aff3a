"""Frozen batch normalisation: what a BN layer becomes, in place, when it is frozen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from freezekit.nn import batchnorm as own
from freezekit.nn import functional as own_functional
from freezekit.nn.checks import check_rank
from freezekit.nn.held import Held, held_class
from freezekit.nn.kernels import compute_dtype
from freezekit.nn.sync_batchnorm import SyncBatchNorm

__all__ = [
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenSyncBatchNorm",
    "frozen_class",
]


def _torch_inference(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Call torch's inference op: the one place that may, for its bits are what freezing promises."""
    return F.batch_norm(input, mean, var, weight, bias, training=False, momentum=0.0, eps=eps)


class _Inference(torch.autograd.Function):
    """torch's inference op, whose own backward would keep the whole input alive for nothing.

    With gamma and the statistics constant, the gradient is ``grad * gamma / sqrt(var + eps)``: no
    activation is needed. The forward is the very op of ``nn.BatchNorm2d.eval()``, so the output has the
    same bits.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        return _torch_inference(input, mean, var, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, var, weight, _, eps = inputs
        ctx.save_for_backward(var, weight)
        ctx.save_for_forward(var, weight)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        var, weight = ctx.saved_tensors
        return _scaled(grads[0], var, weight, ctx.eps), None, None, None, None, None


class _DualInference(_Inference):
    """With forward-mode derivatives, at the sight of which the compiler gives up."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        var, weight = ctx.saved_tensors
        return _scaled(tangents[0], var, weight, ctx.eps)


def _scaled(grad: Tensor, var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return ``grad * weight / sqrt(var + eps)``, in float32 to the last rounding, as torch's."""
    scale = torch.rsqrt(var.to(compute_dtype(grad)) + eps)
    if weight is not None:
        scale = scale * weight
    shape = [1, -1] + [1] * (grad.dim() - 2)
    return (grad * scale.reshape(shape)).to(grad.dtype)


@torch.fx.wrap  # a traced graph has one node for the layer, as it has for torch's
def _infer(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    ranks: tuple[int, ...],
    own: bool,
) -> Tensor:
    check_rank(input, ranks)
    if own:
        return own_functional.batch_norm_eval(input, mean, var, weight, bias, eps)
    trains = any(parameter is not None and parameter.requires_grad for parameter in (weight, bias))
    if torch.is_grad_enabled() and input.requires_grad and not trains:
        function = _Inference if torch.compiler.is_compiling() else _DualInference
        output: Tensor = function.apply(input, mean, var, weight, bias, eps)
        return output
    return _torch_inference(input, mean, var, weight, bias, eps)


class _FrozenBatchNorm(Held, _NormBase):
    """The frozen state of a BN layer: always eval, statistics and affine parameters constant.

    Not an instance of torch's ``_BatchNorm``, on purpose: whatever moves running statistics in the
    ecosystem (``swa_utils.update_bn``, ``SyncBatchNorm.convert_sync_batchnorm``) finds BN by that class.
    Parameter, buffer and ``state_dict`` names are those of the live layer.
    """

    frozen = True
    _own = False
    """Whether the live layer was freezekit's own, whose eval arithmetic has other bits than torch's op."""
    _ranks: tuple[int, ...] = ()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise ValueError(
                f"{type(self).__name__} needs running statistics: without them the output depends on the "
                "rest of the batch. Remedy: construct it with track_running_stats=True"
            )
        return mean, var

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the running statistics; nothing is updated."""
        mean, var = self._statistics()
        # Called by name and not through the class, where tracing could not replace it.
        return _infer(input, mean, var, self.weight, self.bias, self.eps, self._ranks, self._own)


class FrozenBatchNorm1d(_FrozenBatchNorm):
    """Frozen ``BatchNorm1d``: eval mode for good, bit-identical to the eval output of torch's layer.

    ``y = (x - running_mean) / sqrt(running_var + eps) * weight + bias``

    Made by :func:`freezekit.freeze` from a live layer, in place. The gradient for the input still flows and
    no activation is kept for it. Constructor arguments are those of ``torch.nn.BatchNorm1d``.

    Shape:
        (N, C) or (N, C, L), output the same.

    Raises:
        ValueError: the input has another rank, or the layer has no running statistics.

    >>> layer = FrozenBatchNorm1d(4)
    >>> layer.train().training, sorted(layer.state_dict())[:2]
    (False, ['bias', 'num_batches_tracked'])

    Source: https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """

    _ranks = (2, 3)


class FrozenBatchNorm2d(_FrozenBatchNorm):
    """Frozen ``BatchNorm2d``: eval mode for good, bit-identical to the eval output of torch's layer.

    ``y = (x - running_mean) / sqrt(running_var + eps) * weight + bias``

    Made by :func:`freezekit.freeze` from a live layer, in place. The gradient for the input still flows and
    no activation is kept for it. Constructor arguments are those of ``torch.nn.BatchNorm2d``.

    Shape:
        (N, C, H, W), output the same.

    Raises:
        ValueError: the input has another rank, or the layer has no running statistics.

    >>> layer = FrozenBatchNorm2d(4)
    >>> layer.train().training, sorted(layer.state_dict())[:2]
    (False, ['bias', 'num_batches_tracked'])

    Source: https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    _ranks = (4,)


class FrozenBatchNorm3d(_FrozenBatchNorm):
    """Frozen ``BatchNorm3d``: eval mode for good, bit-identical to the eval output of torch's layer.

    ``y = (x - running_mean) / sqrt(running_var + eps) * weight + bias``

    Made by :func:`freezekit.freeze` from a live layer, in place. The gradient for the input still flows and
    no activation is kept for it. Constructor arguments are those of ``torch.nn.BatchNorm3d``.

    Shape:
        (N, C, D, H, W), output the same.

    Raises:
        ValueError: the input has another rank, or the layer has no running statistics.

    >>> layer = FrozenBatchNorm3d(4)
    >>> layer.train().training, sorted(layer.state_dict())[:2]
    (False, ['bias', 'num_batches_tracked'])

    Source: https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm3d.html
    """

    _ranks = (5,)


class FrozenSyncBatchNorm(_FrozenBatchNorm):
    """Frozen ``SyncBatchNorm``: as :class:`FrozenBatchNorm2d`, for any rank, and without collectives.

    Shape:
        (N, C, *), output the same.

    >>> FrozenSyncBatchNorm(2)(torch.ones(1, 2, 1)).shape
    torch.Size([1, 2, 1])

    Source: https://pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html
    """


class _FrozenOwnBatchNorm1d(FrozenBatchNorm1d):
    _own = True


class _FrozenOwnBatchNorm2d(FrozenBatchNorm2d):
    _own = True


class _FrozenOwnBatchNorm3d(FrozenBatchNorm3d):
    _own = True


class _FrozenOwnSyncBatchNorm(FrozenSyncBatchNorm):
    _own = True


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
    own.BatchNorm1d: _FrozenOwnBatchNorm1d,
    own.BatchNorm2d: _FrozenOwnBatchNorm2d,
    own.BatchNorm3d: _FrozenOwnBatchNorm3d,
    SyncBatchNorm: _FrozenOwnSyncBatchNorm,
}


def frozen_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module of class ``cls`` is given when it is frozen.

    A plain BN layer has a frozen counterpart; anything else, a BN *subclass* included (it may hold more
    than BN, such as timm's activation), keeps its own forward and is merely held in eval mode.

    >>> frozen_class(nn.BatchNorm2d) is FrozenBatchNorm2d, frozen_class(nn.Conv2d).__name__
    (True, 'FrozenConv2d')
    """
    return _FROZEN.get(cls) or held_class(cls)
