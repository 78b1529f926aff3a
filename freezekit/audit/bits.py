"""Compares two tensors bit for bit, in pieces, reading no more than it takes. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from freezekit.audit.checkpoint.tensors import ValueReader
from freezekit.audit.state import DTYPE_SIZES, TensorState, counter_value, decode

__all__ = ["close", "difference", "pieces_of", "same_bits"]

#: elements of a piece
_PIECE = 2**20


def same_bits(before: TensorState, after: TensorState, *, checksums: bool = False) -> bool:
    """Tell whether two tensors hold the same bits, so that NaN equals NaN and 0.0 differs from -0.0.

    A counter counts as the same by value: some files keep ``num_batches_tracked`` as a float.
    Where only a digest is known of ``before``, the bits of ``after`` are compared with that.
    Tensors that fill their storages in two zip files are known to differ if their checksums do.

    Args:
        before: one of them.
        after: the other.
        checksums: whether equal checksums will do for equal bits, where there are some.
    """
    if before.shape != after.shape:
        return False
    if before.sha256 is not None:
        return _same_digest(before, after)
    if before.dtype != after.dtype:
        is_counter = before.role == after.role == "num_batches_tracked"
        counts = counter_value(before), counter_value(after)
        return is_counter and counts[0] is not None and counts[0] == counts[1]
    if before.unsupported != after.unsupported:
        return False
    sums = _checksum(before), _checksum(after)
    if None not in sums and (sums[0] != sums[1] or checksums):
        return sums[0] == sums[1]
    return all(one == other for one, other in _pairs(before, after))


def close(before: TensorState, after: TensorState) -> bool:
    """Tell whether two tensors of the same shape differ by no more than a cast does."""
    # half a unit in the last place of bfloat16; who trains in between is not frozen in either dtype
    return all(
        np.allclose(decode(one, before.dtype), decode(other, after.dtype), 2**-8, 1e-7, equal_nan=True)
        for one, other in _pairs(before, after)
    )


def difference(before: TensorState, after: TensorState) -> tuple[int, float]:
    """Return how many values differ in their bits, and by how much at most; NaN is no amount.

    Args:
        before: one tensor.
        after: another of the same shape and dtype.
    """
    count, largest = 0, 0.0
    for pair in _pairs(before, after):
        if pair[0] == pair[1]:
            continue
        bits = [np.frombuffer(raw, f"V{DTYPE_SIZES[before.dtype]}") for raw in pair]
        differs = bits[0] != bits[1]
        count += int(differs.sum())
        one, other = (decode(half[differs].tobytes(), before.dtype) for half in bits)
        with np.errstate(invalid="ignore", over="ignore"):
            largest = max(largest, float(np.nan_to_num(np.abs(other - one), nan=0.0, posinf=np.inf).max()))
    return count, largest


def _same_digest(before: TensorState, after: TensorState) -> bool:
    if after.unsupported is not None:
        return False
    import hashlib  # OpenSSL takes 3 MB, and few audits need a digest

    digest = hashlib.sha256()
    if before.dtype == after.dtype:
        for piece in pieces_of(after):
            digest.update(piece)
    else:  # torch counts in int64
        count = counter_value(after)
        if before.role != "num_batches_tracked" or before.dtype != "int64" or count is None:
            return False
        digest.update((count % 2**64).to_bytes(8, "little"))
    return digest.hexdigest() == before.sha256


def _checksum(tensor: TensorState) -> int | None:
    return tensor.read.checksum if isinstance(tensor.read, ValueReader) else None


def pieces_of(tensor: TensorState) -> Iterator[bytes]:
    """Yield a tensor's values a piece at a time."""
    if isinstance(tensor.read, ValueReader):
        return tensor.read.pieces(_PIECE * tensor.read.itemsize)
    return iter([tensor.read()])


def _pairs(before: TensorState, after: TensorState) -> Iterator[tuple[bytes, bytes]]:
    """Yield pieces of both that belong together, whatever their order in the tensors."""
    one, other = before.read, after.read
    if isinstance(one, ValueReader) and isinstance(other, ValueReader):
        alike = one.stride == other.stride and one.dense and other.dense
        pieces = (reader.pieces(_PIECE * reader.itemsize, as_stored=alike) for reader in (one, other))
        yield from zip(*pieces, strict=True)
    else:
        yield one(), other()
