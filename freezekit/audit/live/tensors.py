"""Facts about a tensor that cost no device synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["INTS", "bits", "differ", "pointer", "sample", "version"]

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version(tensor: Tensor) -> int:
    """Return how many writes torch has counted; an inference tensor counts none."""
    return 0 if tensor.is_inference() else tensor._version


def pointer(tensor: Tensor) -> int:
    """Return where the values are, 0 if they are in no one place."""
    return tensor.data_ptr() if tensor.layout is torch.strided and not is_lazy(tensor) else 0


def bits(tensor: Tensor) -> Tensor | None:
    """Return a view of the values as whole numbers of the same bits, so that NaN equals NaN.

    ``None`` where there is no such view: of what is sparse, quantized, complex or without values.
    """
    if is_lazy(tensor):
        return None
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        return None
    try:
        return tensor.view(INTS[tensor.element_size()])
    except (RuntimeError, KeyError):  # a subclass that has no views
        return None


def sample(tensor: Tensor, most: int) -> Tensor | None:
    """Return a view of at most so many of the bits, spread over the tensor; all, if there are fewer."""
    seen = bits(tensor)
    if seen is None or not seen.is_contiguous():
        return seen if seen is not None and seen.numel() <= most else None
    flat = seen.view(-1)
    return flat[:: -(-flat.numel() // most)] if flat.numel() > most else flat


def differ(before: Tensor, now: Tensor) -> Tensor | None:
    """Return whether any bit differs, as a tensor on their device; ``None`` if that cannot be told."""
    if before.shape != now.shape or before.dtype != now.dtype or before.device != now.device:
        return None
    return (before != now).any()
