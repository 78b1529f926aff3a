"""The training kernels: how :mod:`freezekit.nn.functional` computes in eager mode, in few passes over memory.

Each is an autograd function made of a few torch ops that write into one scratch block. The input is walked
in blocks that stay in the cache between one op and the next, so what goes through memory is little more
than a fused kernel would move. Where something else takes the ops apart (a compiler, an exporter,
``torch.func``), the plain formulas of ``functional`` are better, and :func:`is_plain_eager` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "BatchNormCompiled",
    "BatchNormTrain",
    "batch_norm_plain",
    "blocks_of",
    "compute_dtype",
    "dense",
    "differentiate",
    "is_channels_last",
    "is_differentiated",
    "is_plain_eager",
    "mean_of",
    "multiply_add",
    "scaled_difference",
    "stand_in",
    "strided_like",
    "sum_of_squares",
]

_BLOCK = 400_000
"""Numbers in a block: with a scratch block of the same size they fit the L2 caches of a few cores."""

_SMALL = 65_536
"""Numbers up to which the calls cost more than the memory, and the fewest calls win."""

_FAR = 32.0
"""Deviations from zero within which a mean costs float32 no digits to speak of."""

scaled_difference = torch.ops.aten.mse_loss_backward.grad_input
"""``2 * (x - target) * g`` in one pass, where ``sub`` and ``mul`` take two."""


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for half precision, else the input's own."""
    return torch.promote_types(input.dtype, torch.float32)


def is_plain_eager(input: Tensor) -> bool:
    """Tell whether ops run as they are called, on memory, with nothing but autograd watching."""
    return not (
        torch.compiler.is_compiling()
        or type(input) not in (Tensor, torch.nn.Parameter)
        or input.is_meta
        or input.numel() == 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_differentiated(grad: Tensor) -> bool:
    """Tell whether a backward is itself differentiated, or batched, so that only plain formulas will do."""
    functorch = torch._C._functorch
    return (
        torch.is_grad_enabled() or functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)
    )


def is_channels_last(x: Tensor) -> bool:
    """Tell whether torch's ops answer ``x`` in channels-last: by the order of its strides, gaps or not."""
    if x.dim() not in (4, 5) or x.stride(1) == 0 or x.numel() == 0:
        return False
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(dim) < least or (dim == 0 and least == x.stride(1)):  # what fits both is contiguous
            return False
        least = x.stride(dim) * x.size(dim)
    return True


def dense(x: Tensor) -> Tensor:
    """Return ``x`` laid out as the output will be: channels-last if it is, else contiguous."""
    if not is_channels_last(x):
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def strided_like(g: Tensor, x: Tensor) -> Tensor:
    """Return ``g`` with the strides of ``x``."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def _rows(x: Tensor) -> Tensor:
    """View a dense input as (rows, C) if its channels are innermost, else as (N, C, L)."""
    if x.dim() == 2:
        return x
    if x.is_contiguous():
        return x.flatten(2) if x.size(0) * x.size(1) < x.numel() else x.flatten(1)
    return x.movedim(1, -1).flatten(0, -2)


def blocks_of(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors of one shape alike, along the first dimension."""
    first = tensors[0]
    if first.numel() < 2 * _BLOCK or not first.is_cpu:
        return [tensors]
    size = max(1, first.size(0) * _BLOCK // first.numel())
    return list(zip(*(t.split(size) for t in tensors), strict=True))


def _total(parts: list[Tensor], inner: bool) -> Tensor:
    """Add up what the blocks gave: (C) each with channels innermost, else (rows of the block, C)."""
    if inner and len(parts) == 1:
        return parts[0]
    values = (torch.stack if inner else torch.cat)(parts) if len(parts) > 1 else parts[0]
    return values.sum(0, dtype=torch.float64).to(values.dtype)


@functools.lru_cache
def _run_length(length: int) -> int:
    """Return the longest part of up to 512 that divides the length; 0 if there is none worth it."""
    return next((run for run in range(min(length, 512), min(length, 32) - 1, -1) if length % run == 0), 0)


def sum_of_squares(t: Tensor) -> Tensor:
    """Return the sum of squares along the last dimension, without a tensor of the squares.

    ``vector_norm`` adds one after the other in float32: over short runs no digits are lost.
    """
    run = _run_length(t.size(-1))
    if run == 0:
        return t.square().sum(-1)
    runs = t.view(*t.shape[:-1], -1, run)
    squares: Tensor = torch.linalg.vector_norm(runs, dim=-1).square_()
    return squares.squeeze(-1) if run == t.size(-1) else squares.sum(-1)


def _channel_dims(x: Tensor) -> tuple[list[int], list[int]]:
    """Return the dimensions to reduce over, and the shape in which a value a channel meets the input."""
    return ([0], [-1]) if x.dim() == 2 else ([0, *range(2, x.dim())], [-1] + [1] * (x.dim() - 2))


def multiply_add(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, inner: bool) -> None:
    """``out = x * scale + shift`` per channel, by what is fastest for the layout."""
    if inner or not x.is_cpu:
        torch.addcmul(shift, x, scale, out=out)
    else:  # on CPU, addcmul is not vectorised if two operands repeat along the innermost dimension
        torch.mul(x, scale, out=out).add_(shift)


def differentiate(
    plain: Callable[..., tuple[Tensor, ...]],
    operands: tuple[Tensor | None, ...],
    constants: tuple[Any, ...],
    grad: Tensor,
) -> list[Tensor | None]:
    """Return the gradients for ``operands`` by the plain formula, as part of a graph if there is one."""
    with torch.enable_grad():
        # Views, for hooks on the tensors themselves are not to run here.
        operands = tuple(None if t is None else t.view_as(t) for t in operands)
        y = plain(*operands, *constants)[0]
    wanted = [t for t in operands if t is not None and t.requires_grad]
    graph = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=graph))
    return [next(found) if t is not None and t.requires_grad else None for t in operands]


def stand_in(needed: bool, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """Return what :func:`differentiate` takes for a bias, whose value no gradient depends on."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=True) if needed else None


def mean_of(pivot: Tensor, rest: Tensor) -> Tensor:
    """Return ``pivot + rest``; what is infinite needs no correction, which would be infinity minus itself."""
    return torch.where(pivot.isinf(), pivot, pivot + rest)


def batch_norm_plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute as :class:`BatchNormTrain` does, op by op, for compilers and further differentiation."""
    x = x.to(compute_dtype(x))
    dims, shape = _channel_dims(x)
    # A mean of 1e4 in float32 is off by up to 5e-4, which at a deviation of 1e-2 moves the output by 0.05.
    # What is left after subtracting it is small, so its mean is exact enough to take that error out again.
    # Nothing depends on the first shift, so it needs no gradient.
    shift = x.detach().mean(dims, keepdim=True)
    centred = x - shift
    rest = centred.mean(dims, keepdim=True)
    centred = centred - rest
    var = centred.square().mean(dims)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    y = centred * scale.reshape(shape)
    return y if bias is None else y + bias.reshape(shape), mean_of(shift, rest).flatten(), var


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
        dims, shape = _channel_dims(x)
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
        dims, shape = _channel_dims(x)
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
        forward = _batch_norm_forward if x.numel() > _SMALL else _small_batch_norm_forward
        y, mean, var, *saved = forward(x, weight, bias, eps)
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
        backward = _batch_norm_backward if x.numel() > _SMALL else _small_batch_norm_backward
        dx, d_weight, d_bias = backward(grad.to(x.dtype), x, ctx.needs_input_grad[0], *saved)
        return (
            None if dx is None else dx.to(input.dtype),
            d_weight if ctx.needs_input_grad[1] else None,
            d_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def _batch_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
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
    invstd = (var + eps).rsqrt_()
    scale = invstd if weight is None else invstd * weight
    mean = mean_of(pivot, rest)
    # Far from zero, `x * scale` rounds off what a deviation consists of: then the pivot is subtracted first.
    far = _is_far(pivot, invstd)
    offset = rest if far else mean
    shift = (offset * scale).neg_() if bias is None else torch.addcmul(bias, offset, scale, value=-1)
    if not inner:
        scale, shift = scale[:, None], shift[:, None]
    for block, out in reversed(blocks):  # the last ones are still in the cache
        multiply_add(torch.sub(block, column, out=out) if far else block, scale, shift, out, inner)
    return y, mean, var, pivot, rest, invstd, scale.flatten()


def _batch_norm_backward(
    grad: Tensor, x: Tensor, needs_dx: bool, pivot: Tensor, rest: Tensor, invstd: Tensor, scale: Tensor
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
    slope = (d_weight * invstd).mul_(scale).div_(-n)
    far = _is_far(pivot, invstd)
    shift = (d_bias * scale).div_(-n).addcmul_(slope, rest if far else pivot + rest, value=-1)
    if not inner:
        scale, slope, shift = scale[:, None], slope[:, None], shift[:, None]
    for block, g_block, out in reversed(blocks):
        multiply_add(torch.sub(block, column, out=out) if far else block, slope, shift, out, inner)
        torch.addcmul(out, g_block, scale, out=out)
    return dx, d_weight, d_bias


def _is_far(pivot: Tensor, invstd: Tensor) -> bool:
    # A GPU is not made to wait for the answer.
    return not pivot.is_cpu or bool((pivot.abs() * invstd).max() > _FAR)


def _small_batch_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    dims, shape = _channel_dims(x)
    n = x.numel() // x.size(1)
    # A difference of two values of the channel is exact where they are close, however large both are.
    first = (x[0] if x.dim() == 2 else x[0].flatten(1)[:, 0]).clone()  # not a view, which would keep x
    t = x - first.view(shape)
    mean = t.sum(dims).div_(n)
    t.sub_(mean.view(shape))
    var = (t * t).sum(dims).div_(n)
    invstd = (var + eps).rsqrt_()
    scale = (invstd if weight is None else invstd * weight).view(shape)
    y = t * scale if bias is None else torch.addcmul(bias.view(shape), t, scale)
    return y, mean_of(first, mean), var, first, mean, invstd, scale


def _small_batch_norm_backward(
    g: Tensor, x: Tensor, needs_dx: bool, first: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    dims, shape = _channel_dims(x)
    t = (x - first.view(shape)).sub_(mean.view(shape))
    d_bias = g.sum(dims)
    d_weight = (g * t).sum(dims).mul_(invstd)
    if not needs_dx:
        return None, d_weight, d_bias
    means = torch.addcmul(d_bias.view_as(scale), t, (d_weight * invstd).view_as(scale))
    return torch.add(g, means, alpha=-x.size(1) / x.numel()).mul_(scale), d_weight, d_bias
