"""The kernels of the norms whose statistics stay within a sample: instance, group and layer normalisation.

As in :mod:`freezekit.nn.kernels`, but no sum runs across samples, so a block is read once and finished while
it is in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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

__all__ = ["GroupNorm", "LayerNorm", "group_norm_plain", "layer_norm_plain"]


class GroupNorm(torch.autograd.Function):
    """Normalise each group of channels of each sample; groups of one are instance normalisation.

    Returns the output, and outside the graph the mean and biased variance of each group, (N, G).
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = dense(input.to(compute_dtype(input)))
        y = torch.empty_like(x)
        rows, inner = _rows(x)
        n = x.numel() // (x.size(0) * groups)
        blocks = blocks_of(rows, _rows(y)[0])
        scratch = torch.empty_like(blocks[0][0]) if inner else None
        saved: list[list[Tensor]] = [[], [], [], [], []]
        for block, out in blocks:
            sample = _sample(block, 1 if inner else 2)
            pivot = _share(_sum(sample, inner), groups, n * sample.numel() // block.numel())
            t = torch.sub(block, _column(pivot, inner), out=out)
            rest = _share(_sum(t, inner), groups, n)
            squares = sum_of_squares(t) if scratch is None else torch.mul(t, t, out=scratch[: len(t)]).sum(1)
            var = _share(squares, groups, n).addcmul_(rest, rest, value=-1).clamp_(min=0)
            invstd = _divisor(var, eps, groups == x.size(1)).rsqrt()
            scale = invstd if weight is None else invstd * weight
            shift = (rest * scale).neg_() if bias is None else torch.addcmul(bias, rest, scale, value=-1)
            multiply_add(t, _column(scale, inner), _column(shift, inner), out, inner)
            for values, value in zip(saved, (pivot, rest, var, invstd, scale), strict=True):
                values.append(value)
        pivot, rest, var, invstd, scale = (v[0] if len(v) == 1 else torch.cat(v) for v in saved)
        ctx.save_for_backward(input, weight, pivot, rest, invstd, scale)
        ctx.eps, ctx.groups = eps, groups
        first = slice(None, None, x.size(1) // groups)
        mean, var = mean_of(pivot, rest)[:, first], var[:, first]
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y.to(input.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        (grad, *_), (input, weight, *saved) = grads, ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None
        groups = ctx.groups
        if is_differentiated(grad):
            bias = stand_in(ctx.needs_input_grad[2], [input.size(1)], saved[0])
            found = differentiate(group_norm_plain, (input, weight, bias), (ctx.eps, groups), grad)
            return *found, None, None
        x = dense(input.to(compute_dtype(input)))
        g = strided_like(grad.to(x.dtype), x)
        dx = torch.empty_like(x)
        rows, inner = _rows(x)
        n = x.numel() // (x.size(0) * groups)
        blocks = blocks_of(rows, _rows(g)[0], _rows(dx)[0])
        scratch = torch.empty_like(blocks[0][0])
        d_weight, d_bias, start = torch.zeros_like(saved[0][0]), torch.zeros_like(saved[0][0]), 0
        for block, g_block, out in blocks:
            pivot, rest, invstd, scale = (value[start : start + len(block)] for value in saved)
            start += len(block)
            t = torch.sub(block, _column(pivot, inner), out=out)
            sums = _sum(g_block, inner)
            products = _sum(torch.mul(t, g_block, out=scratch[: len(block)]), inner)
            products.addcmul_(rest, sums, value=-1).mul_(invstd)
            d_bias += sums.sum(0)
            d_weight += products.sum(0)
            # dx = scale * g - invstd * (E[g * weight] + xhat * E[g * weight * xhat]), means over the group
            slope = _share(products if weight is None else products * weight, groups, -n)
            slope.mul_(invstd).mul_(invstd)
            shift = _share(sums if weight is None else sums * weight, groups, -n).mul_(invstd)
            shift.addcmul_(slope, rest, value=-1)
            multiply_add(t, _column(slope, inner), _column(shift, inner), out, inner)
            torch.addcmul(out, g_block, _column(scale, inner), out=out)
        return (
            dx.to(input.dtype) if ctx.needs_input_grad[0] else None,
            d_weight if ctx.needs_input_grad[1] else None,
            d_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """View a dense input as (N, L, C) if its channels are innermost, else as (N, C, L), and tell which."""
    if x.dim() == 2 or x.is_contiguous():
        return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), False
    return x.movedim(1, -1).flatten(1, -2), True


def _sample(block: Tensor, dim: int) -> Tensor:
    """Return every sixteenth of the block along ``dim``, for a pivot: see batch normalisation's forward."""
    return block[(slice(None),) * dim + (slice(None, None, 16),)] if block.size(dim) >= 256 else block


def _sum(block: Tensor, inner: bool) -> Tensor:
    return block.sum(1 if inner else 2)


def _column(values: Tensor, inner: bool) -> Tensor:
    return values.unsqueeze(1) if inner else values.unsqueeze(2)


def _share(values: Tensor, groups: int, n: int) -> Tensor:
    """Add up over each group and divide by ``n``; every channel of it gets the result."""
    if groups == values.size(1):
        return values.div_(n)
    grouped: Tensor = values.unflatten(1, (groups, -1))
    shared: Tensor = grouped.sum(2, keepdim=True).div_(n).expand_as(grouped).flatten(1)
    return shared.contiguous()  # of a single group it is a view of one value


def _divisor(var: Tensor, eps: float, instance: bool) -> Tensor:
    """Return what the square root is taken of; instance norm of a constant gives 0, as torch's, not 0 / 0."""
    return var.masked_fill(var == 0, math.inf) if instance and eps == 0 else var + eps


def group_norm_plain(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute as :class:`GroupNorm` does, op by op, for compilers and further differentiation."""
    x = input.to(compute_dtype(input))
    grouped = x.unflatten(1, (groups, -1))
    centred, mean, var = centre(grouped, list(range(2, grouped.dim())))
    y = (centred * _divisor(var, eps, groups == x.size(1)).rsqrt()).flatten(1, 2)
    shape = [-1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape), mean.flatten(1), var.flatten(1)


class LayerNorm(torch.autograd.Function):
    """Normalise over the last dimensions, as many as ``weight`` and ``bias`` have, given as ``shape``."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shape: Sequence[int]
    ) -> Tensor:
        x = input.to(compute_dtype(input)).contiguous()
        y = torch.empty_like(x)
        n = math.prod(shape)
        blocks = blocks_of(x.view(-1, n), y.view(-1, n))
        half_gamma = None if weight is None else weight.reshape(n) / 2
        beta = None if bias is None else bias.reshape(n)
        saved: list[list[Tensor]] = [[], [], []]
        for block, out in blocks:
            pivot = _sample(block, 1).mean(1, keepdim=True)
            t = torch.sub(block, pivot, out=out)
            rest = t.sum(1, keepdim=True).div_(n)
            var = sum_of_squares(t).unsqueeze(1).div_(n)
            invstd = var.addcmul_(rest, rest, value=-1).clamp_(min=0).add_(eps).rsqrt_()
            if half_gamma is None:
                t.sub_(rest)
            else:
                scaled_difference(half_gamma.expand_as(t), t, rest.expand_as(t), 0, grad_input=t)
            t.mul_(invstd) if beta is None else torch.addcmul(beta, t, invstd, out=t)
            for values, value in zip(saved, (pivot, rest, invstd), strict=True):
                values.append(value)
        ctx.save_for_backward(input, weight, *map(torch.cat, saved))
        ctx.eps, ctx.shape = eps, shape
        return y.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        input, weight, *saved = ctx.saved_tensors
        if is_differentiated(grad):
            bias = stand_in(ctx.needs_input_grad[2], ctx.shape, saved[0])
            found = differentiate(layer_norm_plain, (input, weight, bias), (ctx.eps, ctx.shape), grad)
            return *found, None, None
        n = math.prod(ctx.shape)
        x = input.to(compute_dtype(input)).contiguous()
        g = grad.to(x.dtype).contiguous()
        dx = torch.empty_like(x)
        blocks = blocks_of(x.view(-1, n), g.view(-1, n), dx.view(-1, n))
        normal, product = torch.empty_like(blocks[0][0]), torch.empty_like(blocks[0][0])
        gamma = None if weight is None else weight.reshape(n)
        d_weight, d_bias, start = x.new_zeros(n), x.new_zeros(n), 0
        for block, g_block, out in blocks:
            pivot, rest, invstd = (value[start : start + len(block)] for value in saved)
            start += len(block)
            xhat = torch.sub(block, pivot, out=normal[: len(block)]).sub_(rest).mul_(invstd)
            p = product[: len(block)]
            if ctx.needs_input_grad[2]:
                d_bias += g_block.sum(0)
            if gamma is not None:
                d_weight += torch.mul(g_block, xhat, out=p).sum(0)
                g_block = torch.mul(g_block, gamma, out=out)
            products = torch.mul(g_block, xhat, out=p).sum(1, keepdim=True).div_(-n)
            sums = g_block.sum(1, keepdim=True).div_(n)
            torch.addcmul(g_block, xhat, products, out=out).sub_(sums).mul_(invstd)
        return (
            dx.to(input.dtype) if ctx.needs_input_grad[0] else None,
            d_weight.reshape(ctx.shape) if ctx.needs_input_grad[1] else None,
            d_bias.reshape(ctx.shape) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def layer_norm_plain(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shape: Sequence[int]
) -> tuple[Tensor]:
    """Compute as :class:`LayerNorm` does, op by op, for compilers and further differentiation."""
    x = input.to(compute_dtype(input))
    centred, _, var = centre(x, list(range(-len(shape), 0)))
    y = centred * (var + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias,)
