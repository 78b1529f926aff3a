"""``bias=False`` for the own layers, also where the installed torch's constructors do not take it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["OptionalBias"]


class OptionalBias(nn.Module):
    """Mixin: what torch's normalisation layers need so that an affine layer may be without a bias.

    >>> class Norm(OptionalBias, nn.GroupNorm): pass
    >>> layer = Norm(1, 2)
    >>> layer.drop_bias()
    >>> layer.reset_parameters()
    >>> list(layer.state_dict())
    ['weight']

    Source: ``bias=False`` of ``torch.nn.BatchNorm2d`` and ``torch.nn.GroupNorm``, from torch 2.10 on.
    """

    def drop_bias(self) -> None:
        """Register ``bias`` as ``None``, as newer torch does for ``bias=False``."""
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Start anew: statistics 0 and 1, weight 1, bias 0."""
        layer: Any = self
        if layer.weight is None or layer.bias is not None:
            super().reset_parameters()  # type: ignore[misc]  # of the torch layer this is mixed into
            return
        # Older torch sets the bias without asking whether there is one.
        if isinstance(layer, _NormBase):
            layer.reset_running_stats()
        nn.init.ones_(layer.weight)
