"""Frozen batch normalisation folded, while running, into the convolution or linear layer before it.

Two classes work together: the convolution's computes with scaled weights, the BN's passes on what it is
given. Neither holds the other. Both hold one :class:`Pair`, which knows them only weakly, and whose copy is
empty until each of its copied owners has entered itself: the copy of a whole model is folded as the model is,
while a convolution or a BN copied alone is found without its partner and computes what it would alone.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from freezekit.nn.affine import FrozenAffine, FrozenAffine1d, FrozenAffine2d, FrozenAffine3d, scale_and_shift
from freezekit.nn.checks import check_rank
from freezekit.nn.remembered import remembered

__all__ = ["FOLDABLE", "PAIR", "Pair", "folded_class", "pair_of"]

PAIR = "_freezekit_pair"
"""Where in its ``__dict__`` a module has its :class:`Pair`."""

FOLDABLE: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
"""The classes a BN can be folded into, and the rank that their input and the BN's has when it is.

With other ranks, which some of them accept too, the BN's channels are not theirs.
"""


class Pair:
    """A layer and the frozen BN that is folded into it.

    >>> pair = Pair()
    >>> pair.folds(4)
    False
    """

    __slots__ = ("_layer", "_norm", "rank")

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self._layer: weakref.ref[nn.Module] | None = None
        self._norm: weakref.ref[nn.Module] | None = None

    @property
    def layer(self) -> nn.Module | None:
        """The layer, if there still is one that takes part."""
        return None if self._layer is None else self._layer()

    @property
    def norm(self) -> nn.Module | None:
        """The BN, if there still is one that takes part."""
        return None if self._norm is None else self._norm()

    def enter(self, module: nn.Module) -> None:
        """Make the module, which has this pair, its layer or norm; a shallow copy comes too late."""
        if isinstance(module, FrozenAffine):
            if self.norm is None:
                self._norm = weakref.ref(module)
        elif self.layer is None:
            self._layer = weakref.ref(module)

    def folds(self, rank: int) -> bool:
        """Tell whether both take part, for an input of that rank: both ask, and must hear the same.

        A hook registered meanwhile is to see the values it would see without folding.
        """
        layer, norm = self.layer, self.norm
        return (
            rank == self.rank
            and layer is not None
            and norm is not None
            and not (layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)
            and not (norm._forward_pre_hooks or norm._forward_hooks)
            and not (norm._backward_hooks or norm._backward_pre_hooks)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Pair, (self.rank,)


def pair_of(module: nn.Module) -> Pair | None:
    """Return the module's pair, if it has one and is itself in it (a shallow copy is not)."""
    pair: Pair | None = module.__dict__.get(PAIR)
    return pair if pair is not None and (pair.layer is module or pair.norm is module) else None


class _Paired:
    """Mixin of both classes of a pair: how they are copied and pickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if PAIR in self.__dict__:
            self.__dict__[PAIR].enter(self)


class _Folded(_Paired):
    """Mixin: a layer that computes with the weights that have the BN after it folded in."""

    _freezekit_unfolded: type[nn.Module]
    _transposed = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class says it is torch's (see `_layer_classes`), where it cannot be found by name.
        reduced = super().__reduce_ex__(protocol)
        return (_new_folded, (self._freezekit_unfolded,), *reduced[2:])

    def _weights(self: Any, input: Tensor) -> tuple[Tensor, Tensor | None]:
        pair = pair_of(self)
        if pair is None or not pair.folds(input.dim()):
            return self.weight, self.bias
        norm: Any = pair.norm
        weight, bias = self.weight, self.bias
        mean, var = norm._statistics()
        gamma, beta, eps = norm.weight, norm.bias, norm.eps

        def form() -> tuple[Tensor, Tensor]:
            scale, shift = scale_and_shift(mean, var, gamma, beta, eps, bias)
            groups = self.groups if self._transposed else 1
            # (in, out / groups, ...) of a transposed convolution as (groups, in / groups, out / groups, ...)
            shape = [groups, 1, -1] if self._transposed else [-1]
            grouped = weight.unflatten(0, (groups, -1)) if self._transposed else weight
            scale = scale.view(shape + [1] * (grouped.dim() - len(shape)))
            folded = (grouped * scale).to(weight.dtype)
            return folded.flatten(0, 1) if self._transposed else folded, shift.to(weight.dtype)

        folded, shift = remembered(self, (weight, bias, mean, var, gamma, beta), eps, form)
        return folded, shift


class _FoldedConv(_Folded):
    def forward(self: Any, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, *self._weights(input))
        return output


class _FoldedConvTranspose(_Folded):
    _transposed = True

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        dims = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        weight, bias = self._weights(input)
        conv = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[dims - 1]
        return conv(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class _FoldedLinear(_Folded):
    def forward(self: Any, input: Tensor) -> Tensor:
        return nn.functional.linear(input, *self._weights(input))


class _FoldedNorm(_Paired):
    """Mixin: a BN that passes its input on where it is folded, and is affine where it is not."""

    _freezekit_affine: type[FrozenAffine]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (_new_folded, (self._freezekit_affine,), *reduced[2:])

    def forward(self: Any, input: Tensor) -> Tensor:
        pair = pair_of(self)
        if pair is None or not pair.folds(input.dim()):
            output: Tensor = super().forward(input)  # type: ignore[misc]
            return output
        check_rank(input, self._ranks)
        return input


def _layer_classes() -> dict[type[nn.Module], type[nn.Module]]:
    classes = {}
    for base in FOLDABLE:
        mixin = (
            _FoldedLinear
            if base is nn.Linear
            else _FoldedConvTranspose
            if issubclass(base, nn.modules.conv._ConvTransposeNd)
            else _FoldedConv
        )
        # `__module__` stays torch's: tracers tell leaf modules by it, and these two must be leaves.
        names = {"__module__": base.__module__, "__doc__": base.__doc__, "_freezekit_unfolded": base}
        classes[base] = type(f"Folded{base.__name__}", (mixin, base), names)
    return classes


def _norm_classes() -> dict[type[nn.Module], type[nn.Module]]:
    bases = {FrozenAffine1d: "1d", FrozenAffine2d: "2d", FrozenAffine3d: "3d", FrozenAffine: ""}
    return {
        base: type(
            f"FoldedBatchNorm{suffix}",
            (_FoldedNorm, base),
            {"__module__": nn.BatchNorm2d.__module__, "__doc__": base.__doc__, "_freezekit_affine": base},
        )
        for base, suffix in bases.items()
    }


_FOLDED = {**_layer_classes(), **_norm_classes()}


def folded_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return what a layer of class ``cls``, or an affine BN, becomes when it takes part in a pair.

    ``conv`` computes ``y = conv(x, W * scale, bias=shift + b * scale)`` with the ``scale`` and ``shift`` of
    :class:`freezekit.nn.FrozenAffine`, formed in float64 and rounded to the dtype of the weight, and the BN
    passes it on. Parameters, buffers and ``state_dict`` are those of the layers, and gradients those of the
    original weight and bias where they train. Folded weights that do not train are remembered until a tensor
    they come from changes (:func:`freezekit.nn.remembered.remembered` says what is seen of it); they take as
    much memory again as the weights of the layer.

    Not bit-identical to torch's eval mode, but as close to float64 as that is: over ResNet-18, MobileNetV2
    and EfficientNet-B0 the features differ by at most 1.2e-6 of the largest in float32. Which kernel a
    convolution takes, and with it the last bits, may depend on the batch's size, with BN or without.

    Args:
        cls: a key of :data:`FOLDABLE`, or a class of :class:`freezekit.nn.FrozenAffine`.

    >>> folded_class(nn.Conv2d).__name__, folded_class(FrozenAffine2d).__name__
    ('FoldedConv2d', 'FoldedBatchNorm2d')

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2, equation 14.
    """
    return _FOLDED[cls]


def _new_folded(cls: type[nn.Module]) -> nn.Module:
    folded = folded_class(cls)
    return folded.__new__(folded)
