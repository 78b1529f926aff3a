"""What the own layers refuse, where broadcasting would hide that something does not fit."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from freezekit.nn.kernels import compute_dtype

__all__ = ["check_channels", "check_dtypes", "check_operands", "check_rank", "quiet_in_trace"]


_Method = TypeVar("_Method", bound=Callable[..., Tensor])


def quiet_in_trace(method: _Method) -> _Method:
    """Decorate a forward: ``torch.jit.trace`` is not to warn of checks that hold for the traced shapes only.

    >>> quiet_in_trace(torch.neg)(torch.ones(1))
    tensor([-1.])
    """

    @functools.wraps(method)
    def quiet(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
            return method(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return method(*args)

    return cast(_Method, quiet)


def check_rank(input: Tensor, ranks: tuple[int, ...]) -> None:
    """Refuse an input of another rank than the layer takes.

    Args:
        input: the layer's input.
        ranks: the ranks that it takes; none for any from 2 on.

    Raises:
        ValueError: the input has another rank.

    >>> check_rank(torch.ones(2, 3), (4,))
    Traceback (most recent call last):
    ValueError: expected 4D input (got 2D input)

    Source: the conditions of ``torch.nn.BatchNorm2d`` and ``torch.nn.SyncBatchNorm``.
    """
    if not ranks:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
    elif input.dim() not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ValueError(f"expected {expected} input (got {input.dim()}D input)")


def check_channels(input: Tensor, ranks: tuple[int, ...], channels: int) -> None:
    """Refuse an input of another rank or number of channels than a frozen layer takes.

    Raises:
        ValueError: the input has another rank (:func:`check_rank`).
        RuntimeError: it has another number of channels, which broadcasting could hide.

    >>> check_channels(torch.ones(2, 3), (2, 3), 4)
    Traceback (most recent call last):
    RuntimeError: running_mean should contain 3 elements not 4
    """
    check_rank(input, ranks)
    if input.size(1) != channels:
        raise RuntimeError(f"running_mean should contain {input.size(1)} elements not {channels}")


def check_operands(input: Tensor, **operands: Tensor | None) -> None:
    """Refuse parameters and statistics that do not fit the input, where broadcasting would hide it.

    Args:
        input: the layer's input, channels in dimension 1.
        operands: per-channel tensors by name; ``None`` is skipped.

    Shape:
        ``input`` (N, C, *), every operand (C).

    Raises:
        NotImplementedError: the input is not floating point.
        RuntimeError: an operand has another number of elements than the input has channels, or a dtype that
            is neither the input's nor float32 beside a half-precision input.

    >>> check_operands(torch.ones(2, 3), weight=torch.ones(4))
    Traceback (most recent call last):
    RuntimeError: weight should contain 3 elements not 4: the input of shape (2, 3) has 3 channels

    Source: the conditions of ``torch.nn.functional.batch_norm``.
    """
    check_dtypes(input, **operands)
    channels = input.size(1)
    for name, operand in operands.items():
        if operand is not None and operand.numel() != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements not {operand.numel()}: "
                f"the input of shape {tuple(input.shape)} has {channels} channels"
            )


def check_dtypes(input: Tensor, **operands: Tensor | None) -> None:
    """Refuse an input that is not floating point, and parameters whose dtype does not fit it.

    >>> check_dtypes(torch.ones(2, 3), weight=torch.ones(3).half())
    Traceback (most recent call last):
    RuntimeError: weight is torch.float16, but a torch.float32 input takes torch.float32
    """
    if not input.is_floating_point():
        raise NotImplementedError(
            f"normalisation is not implemented for {input.dtype}: the input must be floating point"
        )
    allowed = (input.dtype, compute_dtype(input))
    for name, operand in operands.items():
        if operand is not None and operand.dtype not in allowed:
            expected = " or ".join(dict.fromkeys(map(str, allowed)))
            raise RuntimeError(f"{name} is {operand.dtype}, but a {input.dtype} input takes {expected}")
