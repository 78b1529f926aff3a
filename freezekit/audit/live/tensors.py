"""Facts about a tensor that cost no device synchronisation."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["INTS", "bits", "differ", "is_sharded", "local", "pointer", "sample", "shard_of", "version"]

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether it is a ``DTensor``, of which each rank has its part or its copy."""
    # who has one has imported this; the rest need not
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the values that this rank has of a tensor; any but a sharded one is returned as it is.

    >>> row = torch.ones(2)
    >>> local(row) is row
    True
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # so that it is the very tensor
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def shard_of(tensor: Any) -> str:
    """Return which part of a tensor this rank has, empty where each rank has all of it."""
    if not is_sharded(tensor):
        return ""
    at = tensor.device_mesh.get_coordinate() or []
    placed = zip(at, tensor.placements, strict=False)
    return " ".join(f"{dim}:{where}" for dim, (where, p) in enumerate(placed) if not p.is_replicate())


def version(tensor: Tensor) -> int:
    """Return how many writes torch has counted; an inference tensor counts none."""
    if is_sharded(tensor):
        return tensor._version + local(tensor)._version  # of one or the other, as it is written to
    return 0 if tensor.is_inference() else tensor._version


def pointer(tensor: Tensor) -> int:
    """Return where the values are, 0 if they are in no one place."""
    tensor = local(tensor)
    return tensor.data_ptr() if tensor.layout is torch.strided and not is_lazy(tensor) else 0


def bits(tensor: Tensor) -> Tensor | None:
    """Return a view of the values as whole numbers of the same bits, so that NaN equals NaN.

    ``None`` where there is no such view: of what is sparse, quantized, complex or without values.
    """
    if is_lazy(tensor):
        return None
    tensor = local(tensor).detach()
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
