"""The bits of tensors, kept: as a copy, or as a digest of 64 bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from freezekit.audit.live.tensors import INTS, local

__all__ = ["Kept", "Rows", "bits_of", "digest_of", "is_plain", "same_bits"]

_PLAIN = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip

_ROW = 1 << 16
"""Elements digested at a time, so that what is in between stays in the cache."""


def bits_of(tensor: Tensor) -> Tensor:
    """Return the values as a row of integers of the same bits: NaN equals NaN, and 0.0 differs from -0.0.

    Of a sharded tensor, those that this rank has. It shares memory with the tensor where that is
    contiguous.
    """
    tensor = local(tensor).detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj().resolve_neg())
    elif tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.reshape(-1).view(INTS[tensor.element_size()])


class Rows:
    """Rows of bits of one dtype on one device that are joined again and again, as they are then.

    On the CPU by numpy, which takes a third of torch's time for many small ones, from the memory itself:
    ``tensor.numpy()`` would forbid the tensor to be resized ever after. So whoever asks makes sure first that
    the tensors are still in that memory.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._rows = rows  # their memory stays while this does
        self._arrays = [_array(row) for row in rows] if all(row.is_cpu for row in rows) else None

    def joined(self) -> Tensor:
        """Return the bits as they are now."""
        if self._arrays is None:
            return torch.cat([*self._rows])
        return torch.from_numpy(np.concatenate(self._arrays))


def _array(row: Tensor) -> npt.NDArray[np.generic]:
    """Return the memory of a row as an array."""
    step = row.stride(0) if row.numel() else 1
    size = ((row.numel() - 1) * step + 1) * row.element_size() if row.numel() else 0
    memory = memoryview((ctypes.c_char * size).from_address(row.data_ptr()))
    kind = "u1" if row.element_size() == 1 else f"i{row.element_size()}"
    return np.frombuffer(memory, np.dtype(kind))[::step]


def same_bits(before: Tensor, now: Tensor) -> bool:
    """Tell whether two tensors are alike to the bit, whatever they are and wherever.

    >>> same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    True
    >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    if before.shape != now.shape or before.dtype != now.dtype or before.layout != now.layout:
        return False
    if before.is_meta or now.is_meta:
        return before.is_meta == now.is_meta
    here, there = bits_of(before), bits_of(now)
    return here.shape == there.shape and bool(torch.equal(here, there.to(here.device)))


class Kept:
    """A row of bits as it was, in memory of its own.

    Args:
        bits: a row of integers.
        digest: keep 8 bytes, and not the values.
        host: keep it on the host.

    >>> row = torch.arange(4)
    >>> kept = Kept(row)
    >>> bool(kept.differs(row)), bool(kept.differs(row + 1))
    (False, True)
    """

    __slots__ = ("digest", "row")

    def __init__(self, bits: Tensor, *, digest: bool = False, host: bool = False) -> None:
        self.digest = digest
        kept = digest_of(bits) if digest else bits.clone()
        self.row = kept.cpu() if host else kept

    def part(self, start: int, stop: int) -> Kept:
        """Return a part of a copy, in the same memory."""
        part = Kept.__new__(Kept)
        part.digest, part.row = False, self.row[start:stop]
        return part

    def differs(self, bits: Tensor) -> Tensor | bool:
        """Tell whether the bits are others now; on an accelerator as a tensor, without waiting for it."""
        now = digest_of(bits) if self.digest else bits
        if now.device != self.row.device:
            now = now.to(self.row.device)
        if now.shape != self.row.shape:
            return True
        return not torch.equal(now, self.row) if now.is_cpu else (now != self.row).any()


def digest_of(bits: Tensor) -> Tensor:
    """Return 64 bits that depend on each bit of the row and on its place.

    Each element is put together with its position and mixed by steps that can be undone (those of
    splitmix64), so that one changed element always changes the sum; several at once cancel by chance alone.
    """
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _ROW):
        part = bits[start : start + _ROW].to(torch.int64)
        part = part + torch.arange(start, start + part.numel(), device=bits.device) * _signed(
            0x9E3779B97F4A7C15
        )
        part ^= (part >> 30) & 0x3FFFFFFFF
        part *= _signed(0xBF58476D1CE4E5B9)
        part ^= (part >> 27) & 0x1FFFFFFFFF
        part *= _signed(0x94D049BB133111EB)
        part ^= (part >> 31) & 0x1FFFFFFFF
        total += part.sum()
    return total


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's rows can be joined with those of others as they are."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in _PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_neg()
        and not tensor.is_inference()
    )
