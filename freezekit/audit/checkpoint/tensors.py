"""From a tensor's description to its bytes: every bound is checked before anything is allocated."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import mul
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from freezekit.audit.checkpoint.container import SourceFile, guarded, printable
from freezekit.audit.checkpoint.inert import StorageRef, TensorRef
from freezekit.audit.checkpoint.rebuild import STORAGE_SIZES
from freezekit.audit.state import DTYPE_SIZES, STATS, Role, TensorState, role_of
from freezekit.errors import CheckpointError

__all__ = [
    "MAX_NUMEL",
    "MAX_RANK",
    "StoredBytes",
    "ValueReader",
    "check_amount",
    "check_shape",
    "make_tensor",
    "sane_shape",
    "unreadable",
]

MAX_RANK = 64
MAX_NUMEL = 2**40
#: a tensor may repeat its storage's elements this often ...
_MAX_REPEATS = 16
#: ... unless it is this small anyway
_SMALL_NUMEL = 2**22
#: bytes of all tensors together that need not be in the file, because they repeat or share its storages
_SMALL_BYTES = 2**26
#: bytes that a tensor may be spread over, and how much of it may be gaps, before it is not read
_MAX_SPREAD, _MAX_GAPS = 2**26, 16
#: of one layer, and of all
_MAX_CHANNELS, _MAX_ALL_CHANNELS = 2**20, 2**25
#: a storage up to this size is read whole once, for its checksum, even if only a slice is asked for
_CHECK_WHOLE_BYTES = 16 * 2**20


@dataclass(slots=True)
class StoredBytes:
    """A storage's place in a file.

    Args:
        file: the file.
        key: what the file calls the storage.
        offset: where its bytes start.
        nbytes: how many there are.
        crc: their CRC-32, or ``None`` where the file has none.
        swapped: whether the elements are big-endian.
    """

    file: SourceFile
    key: str
    offset: int
    nbytes: int
    crc: int | None = None
    swapped: bool = False
    _checked: bool = field(default=False, init=False)

    def read(self, start: int, length: int, tensor: str) -> bytes:
        """Read a slice for a tensor, checking the checksum the first time."""
        worth_it = self.nbytes <= _CHECK_WHOLE_BYTES or length == self.nbytes
        if self.crc is None or self._checked or not worth_it:
            return self.file.pread(self.offset + start, length)
        whole = self.file.pread(self.offset, self.nbytes)
        self._check(zlib.crc32(whole), tensor)
        return whole if length == self.nbytes else whole[start : start + length]

    def pieces(self, start: int, length: int, tensor: str, size: int) -> Iterator[bytes]:
        """As :meth:`read`, a piece at a time; the checksum is known only at the end."""
        self.file.check_written()
        if length <= size:
            yield self.read(start, length, tensor)
            return
        crc = 0
        for place in range(start, start + length, size):
            piece = self.file.pread(self.offset + place, min(size, start + length - place))
            crc = zlib.crc32(piece, crc)
            yield piece
        if length == self.nbytes:
            self._check(crc, tensor)

    def _check(self, crc: int, tensor: str) -> None:
        if self.crc is not None and crc != self.crc:
            whose = f"storage {printable(self.key)} (tensor {printable(tensor)})"
            raise CheckpointError(
                f"damaged: checksum of {whose} does not match",
                got=f"{crc:08x} instead of {self.crc:08x}",
                remedy="download or copy the file again",
            )
        self._checked = True


def make_tensor(
    name: str, ref: TensorRef, find: Callable[[StorageRef], StoredBytes], file: SourceFile, role: Role | None
) -> TensorState:
    """Check a tensor's description and make it readable.

    Args:
        name: its key.
        ref: what the pickle says of it.
        find: finds a storage in the file.
        file: the file, for messages.
        role: what it is for, where the file tells.

    Raises:
        CheckpointError: its description is impossible.
    """
    dtype = ref.dtype if ref.dtype in DTYPE_SIZES else printable(ref.dtype)
    if role is None:
        role = "parameter" if ref.is_parameter else role_of(name, dtype)
    reason = ref.unsupported
    if reason is None and dtype not in DTYPE_SIZES:
        reason = f"dtype {dtype}"
    if reason is None and ref.storage is not None and ref.storage.dtype not in STORAGE_SIZES:
        reason = f"storage of dtype {printable(ref.storage.dtype)}"
    if reason is not None or ref.storage is None:
        return unreadable(name, role, dtype, sane_shape(ref.shape) or (), reason or "no storage", file)
    shape, stride = _ints(name, "size", ref.shape), _ints(name, "stride", ref.stride)
    if len(shape) != len(stride):
        _refuse(name, "has as many strides as sizes", f"{len(shape)} sizes and {len(stride)} strides")
    numel = check_shape(name, shape)
    stored, itemsize = find(ref.storage), DTYPE_SIZES[dtype]
    claimed = ref.storage.numel * STORAGE_SIZES[ref.storage.dtype]
    if claimed != stored.nbytes:
        got = f"{_shown(claimed)} bytes instead of {stored.nbytes}"
        _refuse(name, "has a storage as long as its bytes in the file", got)
    if type(ref.offset) is not int or ref.offset < 0:
        _refuse(name, "has an offset of 0 or more", _shown(ref.offset))
    offset = ref.offset + ref.storage.start
    available = stored.nbytes // itemsize
    extent = 1 + sum(map(mul, shape, stride)) - sum(stride) if numel else 0
    if offset + extent > available:
        _refuse(
            name,
            f"ends within its storage's {available} elements",
            f"elements {_shown(offset)} to {_shown(offset + extent)}",
        )
    if extent * itemsize > _MAX_SPREAD and extent > _MAX_GAPS * numel:
        reason = f"layout: its {numel} values lie scattered over {extent * itemsize} bytes"
        return unreadable(name, role, dtype, shape, reason, file)
    if numel > max(_SMALL_NUMEL, _MAX_REPEATS * available):
        _refuse(
            name,
            f"repeats its storage's {available} elements at most {_MAX_REPEATS} times",
            f"{numel} elements",
        )
    read = ValueReader(name, stored, offset * itemsize, extent * itemsize, itemsize, shape, stride, dtype)
    return TensorState(name, role, dtype, shape, read)


def unreadable(
    name: str, role: Role, dtype: str, shape: tuple[int, ...], reason: str, file: SourceFile
) -> TensorState:
    """Return a tensor whose values cannot be read, and which says so when they are asked for."""

    def read() -> bytes:
        what = f"the values of {printable(name)} cannot be read: unsupported {reason}"
        raise CheckpointError(what, where=file.shown, remedy="save it as a plain dense tensor")

    return TensorState(name, role, dtype, shape, read, unsupported=reason)


def check_shape(name: str, shape: tuple[int, ...]) -> int:
    """Return the number of elements, or refuse a shape that is too big to be true."""
    if len(shape) > MAX_RANK:
        _refuse(name, f"has at most {MAX_RANK} dimensions", f"{len(shape)}")
    if max(shape, default=1) <= MAX_NUMEL and 0 < (numel := prod(shape)) < MAX_NUMEL:
        return numel
    # sizes of 0 do not excuse the others, which would overflow when the empty array is made
    if any(size > MAX_NUMEL for size in shape) or prod(size or 1 for size in shape) >= MAX_NUMEL:
        _refuse(name, f"has fewer than {MAX_NUMEL} elements", f"sizes {', '.join(map(_shown, shape))}")
    return prod(shape)


def check_amount(tensors: Sequence[TensorState], file: SourceFile) -> None:
    """Refuse tensors whose values are together much more than the file, or more than any statistics are.

    Args:
        tensors: all of a state.
        file: where they are.

    Raises:
        CheckpointError: a small file, or a sparse one, would take minutes to look through.
    """
    readable = [tensor for tensor in tensors if tensor.unsupported is None]
    total = sum(max(tensor.numel * DTYPE_SIZES[tensor.dtype], _spread(tensor)) for tensor in readable)
    if total > _MAX_REPEATS * file.size + _SMALL_BYTES:
        raise CheckpointError(
            f"hostile: its tensors repeat the file's bytes more than {_MAX_REPEATS} times",
            got=f"{total} bytes of values in a file of {file.size}",
        )
    channels = [tensor.numel for tensor in readable if tensor.role in STATS]
    if max(channels, default=0) > _MAX_CHANNELS or sum(channels) > _MAX_ALL_CHANNELS:
        raise CheckpointError(
            "hostile: its running statistics have more channels than any layer's",
            got=f"{max(channels)} in one, {sum(channels)} in all",
        )


def _spread(tensor: TensorState) -> int:
    """Return how many bytes of the file are read for a tensor, which may lie scattered over them."""
    return tensor.read.length if isinstance(tensor.read, ValueReader) else 0


@dataclass(slots=True, eq=False)
class ValueReader:
    """Reads one tensor's values when called, as little-endian, C-contiguous bytes.

    Args:
        name: the tensor.
        stored: the storage it lies in.
        start: its first byte there.
        length: bytes from its first to its last, whatever lies between; 0 if it has no elements.
        itemsize: bytes of an element.
        shape: sizes.
        stride: steps between elements, in elements.
        dtype: torch's name without ``torch.``.
    """

    name: str
    stored: StoredBytes
    start: int
    length: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    def __call__(self) -> bytes:
        """Read them, checking the storage's checksum where there is one."""
        with guarded(self.stored.file.shown):
            if self.length == 0:
                return b""
            return self.unpack(self.stored.read(self.start, self.length, self.name))

    def unpack(self, raw: bytes) -> bytes:
        """Return the values that lie in the storage's ``length`` bytes from ``start`` on."""
        raw = self.little(raw)
        flat = len(self.shape) < 2 and self.length == self.itemsize * prod(self.shape)
        return (
            raw if flat or self.contiguous else self.view(np.frombuffer(raw, f"V{self.itemsize}")).tobytes()
        )

    def view(self, elements: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Return the tensor's elements among those of its part of the storage; writable if they are."""
        dims = self._dims()
        return np.lib.stride_tricks.as_strided(
            elements, [size for size, _ in dims], [step * self.itemsize for _, step in dims]
        )

    def pieces(self, size: int, *, as_stored: bool = False) -> Iterator[bytes]:
        """Read them a piece at a time.

        Args:
            size: bytes of a piece, a multiple of 16.
            as_stored: in the order in which they lie in the storage, for a tensor that has no gaps there.
        """
        if self.length == 0:
            yield b""
        elif as_stored or self.contiguous:
            with guarded(self.stored.file.shown):
                for piece in self.stored.pieces(self.start, self.length, self.name, size):
                    yield self.little(piece)
        else:
            raw = self()
            yield from (raw[place : place + size] for place in range(0, len(raw), size))

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie in the storage in their order, without gaps."""
        return _packed(self._dims())

    @property
    def dense(self) -> bool:
        """Whether its elements lie in the storage without gaps, in whatever order."""
        return _packed(sorted(self._dims(), key=lambda dim: -dim[1]))

    @property
    def checksum(self) -> int | None:
        """The CRC-32 of the values, where the file has it: of a tensor that fills its storage."""
        fills = self.length == self.stored.nbytes and self.contiguous and not self.stored.swapped
        return self.stored.crc if fills else None

    def _dims(self) -> list[tuple[int, int]]:
        # dimensions of one element step nowhere, whatever their stride says
        return [(size, step) for size, step in zip(self.shape, self.stride, strict=True) if size != 1]

    def little(self, raw: bytes) -> bytes:
        """Turn big-endian elements about, either way."""
        if not self.stored.swapped:
            return raw
        part = self.itemsize // 2 if self.dtype.startswith("complex") else self.itemsize
        turned: bytes = np.frombuffer(raw, f"V{part}").view(f"u{part}").byteswap().tobytes()
        return turned


def _packed(dims: list[tuple[int, int]]) -> bool:
    return all(step == prod(size for size, _ in dims[i + 1 :]) for i, (_, step) in enumerate(dims))


def _ints(name: str, what: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        _refuse(name, f"has a tuple of {what}s", f"a {type(values).__name__}")
    if len(values) > MAX_RANK:
        _refuse(name, f"has at most {MAX_RANK} dimensions", f"{len(values)}")
    for value in values:
        if type(value) is not int or value < 0:
            _refuse(name, f"has {what}s of 0 or more", _shown(value))
    return tuple(values)


def sane_shape(shape: object) -> tuple[int, ...] | None:
    """Return the shape of a tensor that is not read, or ``None`` if there is no sense in it."""
    if not isinstance(shape, tuple | list) or len(shape) > MAX_RANK:
        return None
    sizes = tuple(size for size in shape if type(size) is int and 0 <= size < MAX_NUMEL)
    return sizes if len(sizes) == len(shape) and prod(size or 1 for size in sizes) < MAX_NUMEL else None


def _shown(value: Any) -> str:
    # an int of a million digits takes minutes to print
    return (
        str(value) if type(value) is int and abs(value) < 2**64 else f"a {type(value).__name__} out of range"
    )


def _refuse(name: str, rule: str, got: str) -> NoReturn:
    raise CheckpointError(
        f"damaged or hostile: tensor {printable(name)} must be such that it {rule}",
        got=got,
        remedy="get the file from its source again, as safetensors if there is one",
    )
