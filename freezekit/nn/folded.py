"""Frozen batch normalisation folded, while running, into the convolution or linear layer before it.

Two classes work together: the convolution's computes with scaled weights, the BN's passes on what it is
given. Neither holds the other. Both hold one :class:`Pair`, which knows them only weakly, and whose copy is
empty until each of its copied owners has entered itself: the copy of a whole model is folded as the model is,
while a convolution or a BN copied alone is found without its partner and computes what it would alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from freezekit.nn.affine import FrozenAffine, FrozenAffine1d, FrozenAffine2d, FrozenAffine3d, scale_and_shift
from freezekit.nn.checks import check_channels
from freezekit.nn.kernels import differentiate, is_differentiated, is_plain_eager
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
            and "forward" not in layer.__dict__
            and "forward" not in norm.__dict__
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

    def _folding(self, input: Tensor) -> Pair | None:
        """Return the pair, if the BN is folded for this input."""
        pair = pair_of(cast("nn.Module", self))
        return pair if pair is not None and pair.folds(input.dim()) else None

    def _weights(self: Any, norm: Any) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias that have the BN ``norm`` folded in."""
        weight, bias, eps = self.weight, self.bias, norm.eps
        mean, var = norm._statistics()
        gamma, beta = norm.weight, norm.bias

        def form() -> tuple[Tensor, Tensor]:
            scale, shift = scale_and_shift(mean, var, gamma, beta, eps, bias)
            groups = self.groups if self._transposed else None
            return _scaled(weight, scale, groups).to(weight.dtype), shift.to(weight.dtype)

        folded, shift = remembered(self, (weight, bias, mean, var, gamma, beta), eps, form)
        return folded, shift

    def _convolve(self: Any, input: Tensor, norm: Any, output_padding: Sequence[int]) -> Tensor | None:
        """Convolve keeping no folded weight for backward, where that is worth something and can be done."""
        weight, gamma = self.weight, norm.weight
        worth = weight.requires_grad and torch.is_grad_enabled()
        fixed = gamma is None or not gamma.requires_grad
        plain = is_plain_eager(input) and not torch.is_autocast_enabled(input.device.type)
        if not (worth and fixed and plain) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        mean, var = norm._statistics()
        scale, shift = scale_and_shift(mean, var, gamma, norm.bias, norm.eps, self.bias)
        geometry = (
            self.stride,
            self.padding,
            self.dilation,
            self._transposed,
            output_padding,
            self.groups,
        )
        output: Tensor = _Convolution.apply(input, weight, shift.to(weight.dtype), scale, *geometry)
        return output


def _mark(output: Tensor, pair: Pair) -> Tensor:
    """Mark what the BN is to pass on: on anything else that reaches it, it computes."""
    if not torch.compiler.is_compiling():
        output.__dict__[PAIR] = pair
    return output


def _scaled(weight: Tensor, scale: Tensor, groups: int | None) -> Tensor:
    """Scale the output channels of a weight; ``groups`` is given for that of a transposed convolution."""
    if groups is None:
        return weight * scale.view([-1] + [1] * (weight.dim() - 1))
    # (in, out / groups, ...) as (groups, in / groups, out / groups, ...)
    grouped = weight.unflatten(0, (groups, -1))
    scaled: Tensor = (grouped * scale.view([groups, 1, -1] + [1] * (weight.dim() - 2))).flatten(0, 1)
    return scaled


def _convolution_plain(
    input: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, *geometry: Any
) -> tuple[Tensor]:
    folded = _scaled(weight, scale, geometry[-1] if geometry[3] else None).to(weight.dtype)
    return (torch.convolution(input, folded, shift, *geometry),)


class _Convolution(torch.autograd.Function):
    """A convolution with a scaled weight, which keeps the weight, there anyway, and scales it again."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(input, weight, shift, scale)
        ctx.geometry = geometry
        return _convolution_plain(input, weight, shift, scale, *geometry)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, shift, scale = ctx.saved_tensors
        constant = (None,) * (1 + len(ctx.geometry))
        if is_differentiated(grad):
            found = differentiate(
                lambda *operands: _convolution_plain(*operands, scale, *ctx.geometry),
                (input, weight, shift),
                (),
                grad,
            )
            return (*found, *constant)
        groups = ctx.geometry[-1] if ctx.geometry[3] else None
        folded = _scaled(weight, scale, groups).to(weight.dtype)
        d_input, d_weight, d_shift = torch.ops.aten.convolution_backward(
            grad, input, folded, [shift.numel()], *ctx.geometry, ctx.needs_input_grad[:3]
        )
        return d_input, _scaled(d_weight, scale, groups).to(weight.dtype), d_shift, *constant


class _FoldedConv(_Folded):
    def forward(self: Any, input: Tensor) -> Tensor:
        pair = self._folding(input)
        if pair is None:
            return cast(Tensor, super().forward(input))  # type: ignore[misc]
        output = self._convolve(input, pair.norm, (0,) * len(self.kernel_size))
        if output is None:
            output = self._conv_forward(input, *self._weights(pair.norm))
        return _mark(output, pair)


class _FoldedConvTranspose(_Folded):
    _transposed = True

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        pair = self._folding(input)
        if pair is None:
            return cast(Tensor, super().forward(input, output_size))  # type: ignore[misc]
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        dims = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        output = self._convolve(input, pair.norm, output_padding)
        if output is None:
            weight, bias = self._weights(pair.norm)
            geometry = (self.stride, self.padding, self.dilation, True, output_padding, self.groups)
            output = torch.convolution(input, weight, bias, *geometry)
        return _mark(output, pair)


class _FoldedLinear(_Folded):
    def forward(self: Any, input: Tensor) -> Tensor:
        pair = self._folding(input)
        if pair is None:
            return cast(Tensor, super().forward(input))  # type: ignore[misc]
        return _mark(nn.functional.linear(input, *self._weights(pair.norm)), pair)


class _FoldedNorm(_Paired):
    """Mixin: a BN that passes its input on where it is folded, and is affine where it is not."""

    _freezekit_affine: type[FrozenAffine]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (_new_folded, (self._freezekit_affine,), *reduced[2:])

    def forward(self: Any, input: Tensor) -> Tensor:
        pair = pair_of(self)
        folded = pair is not None and pair.folds(input.dim())
        # A compiler sees the two called one after the other, as the tracing did that paired them.
        if not folded or not (torch.compiler.is_compiling() or input.__dict__.pop(PAIR, None) is pair):
            output: Tensor = super().forward(input)  # type: ignore[misc]
            return output
        check_channels(input, self._ranks, self.num_features)
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
