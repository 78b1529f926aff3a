"""The kernels of batch normalisation, whose statistics run across the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from freezekit.nn.kernels import (
    blocks_of,
    centre,
    compute_dtype,
    dense,
    differentiate,
    is_differentiated,
    mean_of,
    multiply_add,
    scaled_difference,
    stand_in,
    strided_like,
    sum_of_squares,
)

__all__ = [
    "BatchNormCompiled",
    "BatchNormTrain",
    "ScaleAndShift",
    "Shared",
    "Totalled",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_plain",
    "channel_dims",
    "scale_and_shift_plain",
]

Shared: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From pivot, mean beyond it and variance of a part of the batch to mean, mean beyond it, variance of all."""

Totalled: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]
"""From a part's gradients of weight and bias to those of the whole batch, and its values per channel."""

_SMALL = 65_536
"""Numbers up to which the calls cost more than the memory, and the fewest calls win."""

_FAR = 32.0
"""Deviations from zero within which a mean costs float32 no digits to speak of."""


def _rows(x: Tensor) -> Tensor:
    """View a dense input as (rows, C) if its channels are innermost, else as (N, C, L)."""
    if x.dim() == 2:
        return x
    if x.is_contiguous():
        return x.flatten(2) if x.size(0) * x.size(1) < x.numel() else x.flatten(1)
    return x.movedim(1, -1).flatten(0, -2)


def _total(parts: list[Tensor], inner: bool) -> Tensor:
    """Add up what the blocks gave: (C) each with channels innermost, else (rows of the block, C)."""
    if inner and len(parts) == 1:
        return parts[0]
    values = (torch.stack if inner else torch.cat)(parts) if len(parts) > 1 else parts[0]
    return values.sum(0, dtype=torch.float64).to(values.dtype)


def channel_dims(x: Tensor) -> tuple[list[int], list[int]]:
    """Return the dimensions to reduce over, and the shape in which a value a channel meets the input."""
    return ([0], [-1]) if x.dim() == 2 else ([0, *range(2, x.dim())], [-1] + [1] * (x.dim() - 2))


def batch_norm_plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute as :class:`BatchNormTrain` does, op by op, for compilers and further differentiation."""
    x = x.to(compute_dtype(x))
    dims, shape = channel_dims(x)
    centred, mean, var = centre(x, dims)
    mean, var = mean.flatten(), var.flatten()
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    y = centred * scale.reshape(shape)
    return y if bias is None else y + bias.reshape(shape), mean, var


class BatchNormCompiled(torch.autograd.Function):
    """What :class:`BatchNormTrain` is to eager mode, for a compiler: formulas that it fuses into few loops.

    Its backward needs no more than the input, where the one derived from :func:`batch_norm_plain` keeps, or
    computes again, what stands between.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = input.to(compute_dtype(input))
        dims, shape = channel_dims(x)
        var, mean = torch.var_mean(x, dims, correction=0)
        invstd = (var + eps).rsqrt()
        scale = invstd if weight is None else invstd * weight
        y = (x - mean.reshape(shape)) * scale.reshape(shape)
        ctx.save_for_backward(input, mean, invstd, scale)
        ctx.mark_non_differentiable(mean, var)
        return (y if bias is None else y + bias.reshape(shape)).to(input.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        input, mean, invstd, scale = ctx.saved_tensors
        x = input.to(mean.dtype)
        g = grads[0].to(mean.dtype)
        dims, shape = channel_dims(x)
        n = x.numel() // x.size(1)
        centred = x - mean.reshape(shape)
        d_bias = g.sum(dims)
        d_weight = (g * centred).sum(dims) * invstd
        dx = g - (d_bias / n).reshape(shape) - centred * (d_weight * invstd / n).reshape(shape)
        return (
            (dx * scale.reshape(shape)).to(input.dtype),
            d_weight if ctx.needs_input_grad[1] else None,
            d_bias if ctx.needs_input_grad[2] else None,
            None,
        )


class BatchNormTrain(torch.autograd.Function):
    """Batch normalisation by the batch's own statistics, of an input that is not empty.

    Returns the output, and outside the graph the mean and the biased variance. Half precision is computed
    in float32 and kept in half.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = dense(input.to(compute_dtype(input)))
        y, mean, var, *saved = batch_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(input, weight, *saved)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y.to(input.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        (grad, *_), (input, weight, *saved) = grads, ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        if is_differentiated(grad):
            bias = stand_in(ctx.needs_input_grad[2], [input.size(1)], saved[0])
            return *differentiate(batch_norm_plain, (input, weight, bias), (ctx.eps,), grad), None
        x = dense(input.to(compute_dtype(input)))
        dx, d_weight, d_bias = batch_norm_backward(grad.to(x.dtype), x, ctx.needs_input_grad[0], saved)
        return (
            None if dx is None else dx.to(input.dtype),
            d_weight if ctx.needs_input_grad[1] else None,
            d_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def batch_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shared: Shared | None = None
) -> tuple[Tensor, ...]:
    """Normalise a dense input that is not empty; ``shared`` if it is a part of the batch.

    Returns:
        The output, the mean, the biased variance, and what :func:`batch_norm_backward` needs besides.
    """
    forward = _large_forward if x.numel() > _SMALL else _small_forward
    return forward(x, weight, bias, eps, shared)


def batch_norm_backward(
    g: Tensor, x: Tensor, needs_dx: bool, saved: list[Tensor], totalled: Totalled | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of input (if needed), weight and bias; ``totalled`` if it is part of the batch."""
    backward = _large_backward if x.numel() > _SMALL else _small_backward
    return backward(g, x, needs_dx, totalled, *saved)


def _large_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shared: Shared | None
) -> tuple[Tensor, ...]:
    y = torch.empty_like(x)
    rows = _rows(x)
    inner, n = rows.dim() == 2, x.numel() // x.size(1)
    blocks = blocks_of(rows, _rows(y))
    # Deviations are taken from a pivot, the mean of a sixteenth of the batch, so that sums of their squares
    # lose at most a factor 16 of precision, however large the mean is beside the deviation: the mean of a
    # part p of any data is within sigma * sqrt((1 - p) / p) of the mean of all.
    sample = rows if len(blocks) == 1 else rows[::16]
    pivot = sample.mean(0 if inner else (0, 2))
    column = pivot if inner else pivot[:, None]
    scratch = torch.empty_like(blocks[0][0])
    sums, squares = [], []
    for block, _ in blocks:
        t = torch.sub(block, column, out=scratch[: len(block)])
        if inner:
            sums.append(t.sum(0))
            squares.append(t.mul_(t).sum(0))
        else:
            sums.append(t.sum(2))
            squares.append(sum_of_squares(t))
    rest = _total(sums, inner).div_(n)  # mean - pivot
    var = _total(squares, inner).div_(n).addcmul_(rest, rest, value=-1).clamp_(min=0)
    mean, rest, var = shared(pivot, rest, var) if shared else (mean_of(pivot, rest), rest, var)
    invstd = (var + eps).rsqrt_()
    scale = invstd if weight is None else invstd * weight
    # Far from zero, `x * scale` rounds off what a deviation consists of: then the pivot is subtracted first.
    far = _is_far(pivot, invstd)
    offset = rest if far else mean
    shift = (offset * scale).neg_() if bias is None else torch.addcmul(bias, offset, scale, value=-1)
    if not inner:
        scale, shift = scale[:, None], shift[:, None]
    for block, out in reversed(blocks):  # the last ones are still in the cache
        multiply_add(torch.sub(block, column, out=out) if far else block, scale, shift, out, inner)
    return y, mean, var, pivot, rest, invstd, scale.flatten()


def _large_backward(
    grad: Tensor,
    x: Tensor,
    needs_dx: bool,
    totalled: Totalled | None,
    pivot: Tensor,
    rest: Tensor,
    invstd: Tensor,
    scale: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    g = strided_like(grad, x)
    dx = torch.empty_like(x)
    rows = _rows(x)
    inner, n = rows.dim() == 2, x.numel() // x.size(1)
    blocks = blocks_of(rows, _rows(g), _rows(dx))
    column = pivot if inner else pivot[:, None]
    scratch = torch.empty_like(blocks[0][0])
    sums, products = [], []
    for block, g_block, _ in blocks:
        t = scratch[: len(block)]
        scaled_difference(g_block, block, column.expand_as(block), 0, grad_input=t)
        products.append(t.sum(0 if inner else 2))
        sums.append(g_block.sum(0 if inner else 2))
    d_bias = _total(sums, inner)
    d_weight = _total(products, inner).mul_(0.5).addcmul_(rest, d_bias, value=-1).mul_(invstd)
    if not needs_dx:
        return None, d_weight, d_bias
    # dx = scale * (g - E[g] - xhat * E[g * xhat]), sorted by what depends on the element
    all_weight, all_bias, n = totalled(d_weight, d_bias) if totalled else (d_weight, d_bias, n)
    slope = (all_weight * invstd).mul_(scale).div_(-n)
    far = _is_far(pivot, invstd)
    shift = (all_bias * scale).div_(-n).addcmul_(slope, rest if far else pivot + rest, value=-1)
    if not inner:
        scale, slope, shift = scale[:, None], slope[:, None], shift[:, None]
    for block, g_block, out in reversed(blocks):
        multiply_add(torch.sub(block, column, out=out) if far else block, slope, shift, out, inner)
        torch.addcmul(out, g_block, scale, out=out)
    return dx, d_weight, d_bias


def _is_far(pivot: Tensor, invstd: Tensor) -> bool:
    # A GPU is not made to wait for the answer.
    return not pivot.is_cpu or bool((pivot.abs() * invstd).max() > _FAR)


def _small_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shared: Shared | None
) -> tuple[Tensor, ...]:
    dims, shape = channel_dims(x)
    n = x.numel() // x.size(1)
    # A difference of two values of the channel is exact where they are close, however large both are.
    first = (x[0] if x.dim() == 2 else x[0].flatten(1)[:, 0]).clone()  # not a view, which would keep x
    t = x - first.view(shape)
    rest = t.sum(dims).div_(n)
    t.sub_(rest.view(shape))
    var = (t * t).sum(dims).div_(n)
    if shared:
        part = rest
        mean, rest, var = shared(first, part, var)
        t.sub_((rest - part).view(shape))
    else:
        mean = mean_of(first, rest)
    invstd = (var + eps).rsqrt_()
    scale = (invstd if weight is None else invstd * weight).view(shape)
    y = t * scale if bias is None else torch.addcmul(bias.view(shape), t, scale)
    return y, mean, var, first, rest, invstd, scale


def _small_backward(
    g: Tensor,
    x: Tensor,
    needs_dx: bool,
    totalled: Totalled | None,
    first: Tensor,
    rest: Tensor,
    invstd: Tensor,
    scale: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    dims, shape = channel_dims(x)
    t = (x - first.view(shape)).sub_(rest.view(shape))
    d_bias = g.sum(dims)
    d_weight = (g * t).sum(dims).mul_(invstd)
    if not needs_dx:
        return None, d_weight, d_bias
    all_weight, all_bias, n = (
        totalled(d_weight, d_bias) if totalled else (d_weight, d_bias, x.numel() // x.size(1))
    )
    means = torch.addcmul(all_bias.view_as(scale), t, (all_weight * invstd).view_as(scale))
    return torch.add(g, means, alpha=-1 / n).mul_(scale), d_weight, d_bias


def scale_and_shift_plain(input: Tensor, scale: Tensor, shift: Tensor | None, mean: Tensor) -> tuple[Tensor]:
    """Compute as :class:`ScaleAndShift` does, op by op, for compilers and further differentiation."""
    y = (input.to(mean.dtype) - mean) * scale
    return (y if shift is None else y + shift,)


class ScaleAndShift(torch.autograd.Function):
    """``(input - mean) * scale + shift`` per channel, where the scale trains: keeps nothing but the input."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, input: Tensor, scale: Tensor, shift: Tensor | None, mean: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input, scale, mean)
        y = (input.to(mean.dtype) - mean).mul_(scale)
        return y if shift is None else y.add_(shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        input, scale, mean = ctx.saved_tensors
        if is_differentiated(grad):
            shift = stand_in(ctx.needs_input_grad[2], scale.shape, scale)
            return *differentiate(scale_and_shift_plain, (input, scale, shift), (mean,), grad), None
        dims, _ = channel_dims(input)
        d_scale = (input.to(mean.dtype) - mean).mul_(grad).sum(dims)
        return (
            (grad * scale).to(input.dtype) if ctx.needs_input_grad[0] else None,
            d_scale.view_as(scale),
            grad.sum(dims).view_as(scale) if ctx.needs_input_grad[2] else None,
            None,
        )
