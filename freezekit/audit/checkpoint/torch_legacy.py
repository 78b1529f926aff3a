"""Reads the files that ``torch.save`` wrote before torch 1.6.

Five pickles follow each other: a magic number, the protocol version, facts about the machine, the object, and
the storages' keys. Then comes each storage: its number of elements as int64, and its bytes. These have always
been little-endian, whatever machine torch wrote them on (``torch/csrc/serialization.cpp``), so the byte order
that the third pickle tells changes nothing, as in ``torch.load``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import BinaryIO

from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.inert import StorageRef
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.pickle_machine import LimitedReader, Unpickled, unpickle
from freezekit.audit.checkpoint.rebuild import STORAGE_SIZES
from freezekit.audit.checkpoint.table import make_table
from freezekit.audit.checkpoint.tensors import StoredBytes
from freezekit.audit.state import StateTable
from freezekit.errors import CheckpointError

__all__ = ["read_legacy"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
#: bytes of each of the first three pickles; they are a few numbers
_MAX_FACTS = 2**16
_DOWNLOAD = "download or copy the file again"


def read_legacy(
    file: SourceFile, stream: BinaryIO, root: str | None = None, limits: Limits = Limits.DEFAULT
) -> StateTable:
    """Read a legacy torch file.

    Args:
        file: the file.
        stream: the same, open at its start.
        root: which of the states in it to read.
        limits: caps on what it may cost.

    Raises:
        CheckpointError: it is damaged or hostile.
    """
    short = replace(limits, pickle_bytes=min(limits.pickle_bytes, _MAX_FACTS))
    magic, protocol = _next(file, stream, short).root, _next(file, stream, short).root
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise CheckpointError("damaged: not the magic number and protocol version of a legacy torch file")
    _next(file, stream, short)  # facts about the machine, which change nothing
    pickled = _next(file, stream, limits)
    keys = _next(file, stream, limits).root
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("damaged: its list of storages is no list of names")
    stored = _find_storages(file, stream, keys, pickled.storages)

    def find(storage: StorageRef) -> StoredBytes:
        if storage.key not in stored:
            raise CheckpointError("damaged: a storage is missing from the file", got=printable(storage.key))
        return stored[storage.key]

    return make_table(file, pickled, find, root=root, limits=limits)


def _next(file: SourceFile, stream: BinaryIO, limits: Limits) -> Unpickled:
    return unpickle(LimitedReader(stream, file.size - stream.tell()), limits=limits)


def _find_storages(
    file: SourceFile, stream: BinaryIO, keys: list[str], described: dict[str, StorageRef]
) -> dict[str, StoredBytes]:
    """Return each storage's place, stepping from one to the next without reading them."""
    stored: dict[str, StoredBytes] = {}
    position = stream.tell()
    for key in keys:
        storage = described.get(key)
        if storage is None or key in stored:
            fault = "is listed twice" if key in stored else "is listed but belongs to no tensor"
            raise CheckpointError(f"damaged or hostile: a storage {fault}", got=printable(key))
        size = STORAGE_SIZES.get(storage.dtype)
        if size is None:  # without it nobody knows where the next storage starts
            raise CheckpointError(
                "not supported: a storage of an unknown dtype", got=printable(storage.dtype)
            )
        stream.seek(position)
        numel = int.from_bytes(stream.read(8), "little", signed=True)
        start, nbytes = position + 8, numel * size
        if start > file.size or numel < 0 or start + nbytes > file.size:
            raise CheckpointError(
                f"truncated or damaged: storage {printable(key)} ends beyond the file's end",
                got=f"{numel} elements of {size} bytes with {max(0, file.size - start)} bytes left",
                remedy=_DOWNLOAD,
            )
        if numel != storage.numel:
            got = f"{numel} elements instead of {storage.numel}"
            raise CheckpointError(
                f"damaged: storage {printable(key)} has two sizes", got=got, remedy=_DOWNLOAD
            )
        stored[key] = StoredBytes(file, key, start, nbytes)
        position = start + nbytes
    return stored
