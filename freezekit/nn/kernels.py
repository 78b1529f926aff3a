"""The training kernels: how :mod:`freezekit.nn.functional` computes in eager mode, in few passes over memory.

Each kernel, in ``batch_kernels`` and ``row_kernels``, is an autograd function made of a few torch ops that
write into one scratch block. The input is walked in blocks that stay in the cache between one op and the
next, so what goes through memory is little more than a fused kernel would move. Where something else takes
the ops apart (a compiler, an exporter, ``torch.func``) the plain formula beside each kernel is better, and
:func:`is_plain_eager` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "blocks_of",
    "centre",
    "compute_dtype",
    "dense",
    "differentiate",
    "is_channels_last",
    "is_differentiated",
    "is_plain_eager",
    "mean_of",
    "memory_format",
    "multiply_add",
    "runs_plainly",
    "scaled_difference",
    "stand_in",
    "strided_like",
    "sum_of_squares",
]

_BLOCK = 400_000
"""Numbers in a block: with a scratch block of the same size they fit the L2 caches of a few cores."""

scaled_difference = torch.ops.aten.mse_loss_backward.grad_input
"""``2 * (x - target) * g`` in one pass, where ``sub`` and ``mul`` take two."""


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for half precision, else the input's own."""
    return torch.promote_types(input.dtype, torch.float32)


def runs_plainly() -> bool:
    """Tell whether ops run as they are called, and no compiler, tracer, mode or transform takes them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_plain_eager(input: Tensor) -> bool:
    """Tell whether ops on ``input`` run as they are called, on memory, with nothing but autograd watching."""
    return (
        runs_plainly()
        and type(input) in (Tensor, torch.nn.Parameter)
        and not input.is_meta
        and input.numel() > 0
        and forward_ad._current_level < 0
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


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the format in which torch's ops answer ``x``: channels-last, or else contiguous."""
    if not is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def dense(x: Tensor) -> Tensor:
    """Return ``x`` laid out as the output will be, without gaps."""
    return x.contiguous(memory_format=memory_format(x))


def strided_like(g: Tensor, x: Tensor) -> Tensor:
    """Return ``g`` with the strides of ``x``."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def blocks_of(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors of one shape alike, along the first dimension."""
    first = tensors[0]
    if first.numel() < 2 * _BLOCK or not first.is_cpu:
        return [tensors]
    size = max(1, first.size(0) * _BLOCK // first.numel())
    return list(zip(*(t.split(size) for t in tensors), strict=True))


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


def centre(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean over ``dims``, op by op; give it and the biased variance too, dimensions kept."""
    # A mean of 1e4 in float32 is off by up to 5e-4, which at a deviation of 1e-2 moves the output by 0.05.
    # What is left after subtracting it is small, so its mean is exact enough to take that error out again.
    # Nothing depends on the first shift, so it needs no gradient.
    shift = x.detach().mean(dims, keepdim=True)
    centred = x - shift
    rest = centred.mean(dims, keepdim=True)
    centred = centred - rest
    return centred, mean_of(shift, rest), centred.square().mean(dims, keepdim=True)
