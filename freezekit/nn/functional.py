"""The arithmetic of freezekit's own layers: pure functions of tensors, from elementwise ops and means.

No ready-made normalisation op is called, so the formulas below are what runs, on CPU, CUDA and meta alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from freezekit.nn.batch_kernels import (
    BatchNormCompiled,
    BatchNormTrain,
    ScaleAndShift,
    batch_norm_plain,
    scale_and_shift_plain,
)
from freezekit.nn.checks import check_dtypes, check_operands
from freezekit.nn.kernels import compute_dtype, is_plain_eager, memory_format
from freezekit.nn.row_kernels import GroupNorm, LayerNorm, group_norm_plain, layer_norm_plain

__all__ = [
    "batch_norm_eval",
    "batch_norm_train",
    "group_norm",
    "instance_norm_train",
    "layer_norm",
    "update_running_stats",
]


# The compiler of torch 2.6 knows no symbolic sizes in an autograd function; 2.15's has been tried.
_TRACES_FUNCTIONS = torch.__version__ >= "2.15"  # compared as a version


def batch_norm_train(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the statistics of the batch.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``, with the mean and the biased variance over every
    dimension but the channels. An empty batch gives an empty output, mean 0 and variance 1.

    Args:
        input: floating point; float16 and bfloat16 are computed in float32.
        weight: gamma, or ``None`` for 1.
        bias: beta, or ``None`` for 0.
        eps: added to the variance.

    Returns:
        The output in the input's dtype, the mean, and the biased variance, both at least float32.

    Shape:
        ``input`` and output (N, C, *), everything else (C).

    Raises:
        ValueError: ``eps`` is not positive.
        RuntimeError: another operand's channels or dtype do not fit the input's.

    >>> output, mean, var = batch_norm_train(torch.tensor([[1.0], [3.0]]), None, None, 1e-5)
    >>> mean.item(), var.item(), [round(y, 4) for y in output.flatten().tolist()]
    (2.0, 1.0, [-1.0, 1.0])

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1.
    """
    if eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    check_operands(input, weight=weight, bias=bias)
    if input.numel() == 0:
        mean = input.new_zeros(input.size(1), dtype=compute_dtype(input))
        var = torch.ones_like(mean)
        return batch_norm_eval(input, mean, var, weight, bias, eps), mean, var
    weight, bias = _computed(input, weight), _computed(input, bias)
    if is_plain_eager(input):
        output, mean, var = BatchNormTrain.apply(input, weight, bias, eps)
        return output, mean, var
    if _TRACES_FUNCTIONS and torch.compiler.is_compiling():
        output, mean, var = BatchNormCompiled.apply(input, weight, bias, eps)
    else:
        output, mean, var = batch_norm_plain(input, weight, bias, eps)
    return as_input(output, input), mean, var


def batch_norm_eval(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise by given statistics.

    ``y = (x - running_mean) * (weight / sqrt(running_var + eps)) + bias``, one rounding an operation: a
    sample's output has the same bits whatever else is in the batch.

    Args:
        input: floating point; float16 and bfloat16 are computed in float32.
        running_mean: the mean to subtract.
        running_var: the variance to divide by.
        weight: gamma, or ``None`` for 1.
        bias: beta, or ``None`` for 0.
        eps: added to the variance.

    Returns:
        The output in the input's dtype.

    Shape:
        ``input`` and output (N, C, *), everything else (C).

    Raises:
        ValueError: ``eps`` is negative.
        RuntimeError: another operand's channels or dtype do not fit the input's.

    >>> mean, var = torch.tensor([1.0]), torch.tensor([4.0])
    >>> batch_norm_eval(torch.tensor([[5.0]]), mean, var, None, torch.tensor([1.0]), 0.0)
    tensor([[3.]])

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 2, step 11.
    """
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    check_operands(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    mean = _per_channel(running_mean, input)
    deviation = (_per_channel(running_var, input) + eps).sqrt()
    # Divided, not multiplied by rsqrt: a division is correctly rounded on every device.
    scale = deviation.reciprocal() if weight is None else _per_channel(weight, input) / deviation
    shift = None if bias is None else _per_channel(bias, input)
    # All three have the same bits.
    if not is_plain_eager(input) or mean.requires_grad:
        (output,) = scale_and_shift_plain(input, scale, shift, mean)
    elif scale.requires_grad and torch.is_grad_enabled():
        output = ScaleAndShift.apply(input, scale, shift, mean)
    else:
        output = (input.to(mean.dtype) - mean).mul_(scale)
        output = output if shift is None else output.add_(shift)
    return as_input(output, input)


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, n: int, factor: float | Tensor
) -> None:
    """Move the running statistics towards a batch's, in place.

    ``running = (1 - factor) * running + factor * batch``, with the unbiased variance ``var * n / (n - 1)``.

    Args:
        running_mean: updated in place, in its own dtype.
        running_var: updated in place, in its own dtype.
        mean: the batch's mean.
        var: the batch's biased variance, as :func:`batch_norm_train` returns it.
        n: values per channel in the batch; with 0 nothing is updated.
        factor: torch's ``momentum``, or 1 / (batches seen) for the cumulative average.

    Shape:
        Every tensor (C).

    Raises:
        ValueError: ``n`` is 1: a single value has no unbiased variance.

    >>> mean, var = torch.zeros(1), torch.ones(1)
    >>> update_running_stats(mean, var, torch.tensor([2.0]), torch.tensor([3.0]), n=4, factor=0.5)
    >>> mean.item(), var.item()
    (1.0, 2.5)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.1; ``torch.nn.BatchNorm2d`` on momentum.
    """
    if n == 1:
        raise ValueError(
            "cannot update running statistics from 1 value per channel: its unbiased variance is 0/0"
        )
    if n == 0:
        return
    # Detached, for no_grad does not keep a forward-mode tangent out of the statistics.
    moments = ((running_mean, mean.detach(), 1.0), (running_var, var.detach(), n / (n - 1)))
    with torch.no_grad():
        for running, batch, unbias in moments:
            if isinstance(factor, float) and running.dtype == batch.dtype:
                running.mul_(1 - factor).add_(batch, alpha=factor * unbias)
            else:
                running.copy_(running.to(batch.dtype) * (1 - factor) + batch * unbias * factor)


def _per_channel(values: Tensor, input: Tensor) -> Tensor:
    return values.to(compute_dtype(input)).reshape([-1] + [1] * (input.dim() - 2))


def as_input(output: Tensor, input: Tensor) -> Tensor:
    """Give the output the dtype of the input, and its memory format: channels-last or else contiguous."""
    output, wanted = output.to(input.dtype), memory_format(input)
    # Asked for only where it is not there yet, for vmap knows of no channels-last.
    if wanted != torch.contiguous_format and memory_format(output) == wanted:
        return output
    return output.contiguous(memory_format=wanted)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise each group of channels of each sample by its own statistics.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``, with the mean and the biased variance over the
    channels of a group and every dimension after them.

    Args:
        input: floating point; float16 and bfloat16 are computed in float32.
        num_groups: G, into which the channels divide evenly.
        weight: gamma, or ``None`` for 1.
        bias: beta, or ``None`` for 0.
        eps: added to the variance.

    Returns:
        The output in the input's dtype; in float32 under CUDA autocast, as torch's.

    Shape:
        ``input`` and output (N, C, *), ``weight`` and ``bias`` (C).

    Raises:
        ValueError: a group holds one value, or ``N * C // G`` is 1 where nothing follows the channels.
        RuntimeError: the input has less than two dimensions, its channels do not divide into the groups, or
            another operand does not fit.

    >>> group_norm(torch.tensor([[1.0, 3.0, 5.0, 5.0]]), 2, None, torch.tensor([0.0, 0.0, 1.0, 2.0]), 1e-9)
    tensor([[-1.,  1.,  1.,  2.]])

    Source: Wu and He 2018, arXiv:1803.08494, equations 1 to 3; ``torch.nn.functional.group_norm``.
    """
    if input.dim() < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {input.dim()}")
    batch, channels, spatial = input.size(0), input.size(1), list(input.shape[2:])
    # torch's own condition: two samples of one value a group pass, and come out as the bias.
    if batch * channels // num_groups * math.prod(spatial) == 1:
        size = [batch * channels // num_groups, num_groups, *spatial]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if channels % num_groups != 0:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, "
            f"but got input of shape {list(input.shape)} and num_groups={num_groups}"
        )
    input = _autocast(input)
    check_operands(input, weight=weight, bias=bias)
    weight, bias = _computed(input, weight), _computed(input, bias)
    # A vector has too few values a channel for the kernel to gain by.
    compute = GroupNorm.apply if input.dim() > 2 and is_plain_eager(input) else group_norm_plain
    output, _, _ = compute(input, weight, bias, eps, num_groups)
    return as_input(output, input)


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise over the last dimensions, each position before them by its own statistics.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``, with the mean and the biased variance over the
    dimensions of ``normalized_shape``.

    Args:
        input: floating point; float16 and bfloat16 are computed in float32.
        normalized_shape: the sizes of the last dimensions.
        weight: gamma, or ``None`` for 1.
        bias: beta, or ``None`` for 0.
        eps: added to the variance.

    Returns:
        The output in the input's dtype; in float32 under CUDA autocast, as torch's.

    Shape:
        ``input`` and output (*, *normalized_shape), ``weight`` and ``bias`` ``normalized_shape``.

    Raises:
        RuntimeError: ``normalized_shape`` is empty or not what the input ends in, or an operand has another
            shape or a dtype that does not fit the input's.

    >>> x, weight = torch.tensor([[1.0, 3.0], [7.0, 5.0]]), torch.tensor([1.0, 2.0])
    >>> layer_norm(x, [2], weight, None, 1e-9).round(decimals=3)
    tensor([[-1.,  2.],
            [ 1., -2.]])

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 3; ``torch.nn.functional.layer_norm``.
    """
    shape = list(normalized_shape)
    if not shape:
        raise RuntimeError("Expected normalized_shape to be at least 1-dimensional, but got []")
    if list(input.shape[-len(shape) :]) != shape:
        expected = f"expected input with shape [*, {str(shape)[1:]}"
        raise RuntimeError(f"Given normalized_shape={shape}, {expected}, but got {list(input.shape)}")
    input = _autocast(input)
    check_dtypes(input, weight=weight, bias=bias)
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and list(operand.shape) != shape:
            got = f"got {name} of shape {list(operand.shape)} and normalized_shape = {shape}"
            raise RuntimeError(f"Expected {name} to be of same shape as normalized_shape, but {got}")
    weight, bias = _computed(input, weight), _computed(input, bias)
    if is_plain_eager(input):
        output = LayerNorm.apply(input, weight, bias, eps, shape)
    else:
        (output,) = layer_norm_plain(input, weight, bias, eps, shape)
    return as_input(output, input)


def instance_norm_train(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each channel of each sample by its own statistics.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``, with the mean and the biased variance over every
    dimension after the channels. With ``eps`` 0 a constant channel comes out as the bias, as torch's does.

    Args:
        input: floating point; float16 and bfloat16 are computed in float32.
        weight: gamma, or ``None`` for 1.
        bias: beta, or ``None`` for 0.
        eps: added to the variance.

    Returns:
        The output in the input's dtype, the mean, and the biased variance, both at least float32 (and NaN
        where there is no value to take them from).

    Shape:
        ``input`` and output (N, C, *), ``weight`` and ``bias`` (C), mean and variance (N, C).

    Raises:
        ValueError: one value for each channel of a sample.
        RuntimeError: another operand's channels or dtype do not fit the input's.

    >>> output, mean, var = instance_norm_train(torch.tensor([[[1.0, 3.0]], [[5.0, 9.0]]]), None, None, 0.0)
    >>> output.round(decimals=3).tolist(), mean.tolist(), var.round(decimals=3).tolist()
    ([[[-1.0, 1.0]], [[-1.0, 1.0]]], [[2.0], [7.0]], [[1.0], [4.0]])

    Source: Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022; ``torch.nn.functional.instance_norm``.
    """
    if math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {input.shape}")
    check_operands(input, weight=weight, bias=bias)
    weight, bias = _computed(input, weight), _computed(input, bias)
    if weight is not None:
        weight = weight.clone()  # so that it may change before backward, as torch's may
    compute = GroupNorm.apply if is_plain_eager(input) else group_norm_plain
    output, mean, var = compute(input, weight, bias, eps, input.size(1))
    return as_input(output, input), mean, var


def _computed(input: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(compute_dtype(input))


def _autocast(input: Tensor) -> Tensor:
    # torch's CUDA autocast has layer and group norm on its list of ops to run, and to answer, in float32.
    return input.to(compute_dtype(input)) if input.is_cuda and torch.is_autocast_enabled("cuda") else input
