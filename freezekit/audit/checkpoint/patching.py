"""Writes a file again with other values in some of its tensors: every other byte stays as it is.

The values are put where they lie, which the readers tell. Only a zip archive has more to change: the CRC-32
of the member, which is in its header or behind its data, and in the archive's directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from freezekit.audit.checkpoint.archive import Archive
from freezekit.audit.checkpoint.container import SourceFile, printable, sniff
from freezekit.audit.checkpoint.tensors import StoredBytes, ValueReader
from freezekit.errors import CheckpointError

__all__ = ["Copy", "Region", "copy_bytes"]

_CHUNK = 2**20
_LOCAL = b"PK\x03\x04"
_DESCRIPTOR = b"PK\x07\x08"
#: where the CRC-32 is in a member's header and in its entry of the directory, and how long these are
_CRC_IN_HEADER, _CRC_IN_ENTRY, _ENTRY = 14, 16, 46


class Region:
    """The part of a storage that some tensors lie in, as it is and as it shall be.

    Args:
        readers: those tensors, all of one storage and none without elements.
    """

    def __init__(self, readers: list[ValueReader]) -> None:
        self.stored = readers[0].stored
        self.start = min(reader.start for reader in readers)
        self._end = max(reader.start + reader.length for reader in readers)
        self.old = self.stored.read(self.start, self._end - self.start, readers[0].name)
        self.new = bytearray(self.old)

    @property
    def offset(self) -> int:
        """Where it starts in the file."""
        return self.stored.offset + self.start

    def meets(self, reader: ValueReader) -> bool:
        """Tell whether a tensor of the same storage reaches into it."""
        return reader.length > 0 and reader.start < self._end and self.start < reader.start + reader.length

    def put(self, reader: ValueReader, values: bytes) -> None:
        """Put one of the tensors' values in their place.

        Args:
            reader: the tensor.
            values: as its reader would return them.
        """
        place = slice(reader.start - self.start, reader.start - self.start + reader.length)
        values = reader.little(values)
        if reader.contiguous:
            self.new[place] = values
            return
        kind = f"V{reader.itemsize}"
        part = np.frombuffer(self.new, kind, reader.length // reader.itemsize, place.start)
        view = reader.view(part)
        view[...] = np.frombuffer(values, kind).reshape(view.shape)

    def values(self, reader: ValueReader) -> bytes:
        """Return what any tensor of the storage will hold."""
        raw = bytearray(self.stored.read(reader.start, reader.length, reader.name))
        first = max(reader.start, self.start)
        last = min(reader.start + reader.length, self._end)
        raw[first - reader.start : last - reader.start] = self.new[first - self.start : last - self.start]
        return reader.unpack(bytes(raw))


@dataclass
class Copy:
    """A copy of a file in which some bytes are others.

    Args:
        file: the file that is copied.
        out: the copy, open for reading and writing, whole already.
    """

    file: SourceFile
    out: BinaryIO
    _storages: dict[int, StoredBytes] = field(default_factory=dict, init=False)
    _written: list[tuple[int, int, bytes]] = field(default_factory=list, init=False)

    def write(self, region: Region) -> None:
        """Write a region that has changed.

        Raises:
            CheckpointError: the storage is damaged, which a new checksum would hide.
        """
        stored = region.stored
        if stored.crc is not None and stored.offset not in self._storages:
            with self.file.open() as stream:
                if _crc(stream, stored.offset, stored.nbytes) != stored.crc:
                    what = f"damaged: checksum of storage {printable(stored.key)} does not match"
                    remedy = "download or copy the file again"
                    raise CheckpointError(what, where=self.file.shown, remedy=remedy)
        self._storages[stored.offset] = stored
        self._put(region.offset, bytes(region.new))

    def mend(self) -> None:
        """Bring the checksums in line with what was written."""
        with self.file.open() as stream:
            if self._storages and sniff(self.file, stream) == "zip":
                self._mend(stream, 0, self.file.size, list(self._storages.values()))
        self.out.flush()

    def check(self) -> None:
        """Compare the copy with the file: all is the same but what was written, which is as it was written.

        Raises:
            CheckpointError: it is not; something else wrote to either, or the disk is failing.
        """
        with self.file.open() as stream:
            position = 0
            self.out.seek(0)
            for offset, length, digest in [*sorted(self._written), (self.file.size, 0, _digest(b""))]:
                stream.seek(position)
                same = all(a == b for a, b in _both(stream, self.out, offset - position))
                if not same or _digest(self.out.read(length)) != digest:
                    raise CheckpointError(
                        "the copy is not what was written",
                        where=self.file.shown,
                        remedy="run it again; check the disk if it happens again",
                    )
                position = offset + length
            if self.out.read(1):
                raise CheckpointError("the copy is longer than the file", where=self.file.shown)

    def _put(self, offset: int, data: bytes) -> None:
        self.out.seek(offset)
        self.out.write(data)
        self._written.append((offset, len(data), _digest(data)))

    def _mend(self, stream: BinaryIO, start: int, length: int, storages: list[StoredBytes]) -> None:
        """Set the checksums of an archive that starts and ends at these bytes of the file."""
        archive = Archive(self.file, stream, start, length)
        members = sorted(archive.members.values(), key=lambda member: member.place)
        places = [start + member.place for member in members]
        changed: dict[str, list[StoredBytes]] = {}
        for stored in storages:
            name = members[bisect_right(places, stored.offset) - 1].name
            changed.setdefault(name, []).append(stored)
        entries = _entries(stream, start + archive.directory, len(members))
        for member, entry in zip(archive.members.values(), entries, strict=True):
            if member.name not in changed:
                continue
            body = archive.locate(member.name, member.name)
            inside = [stored for stored in changed[member.name] if stored.offset != body.offset]
            if inside:  # an archive in the archive
                self._mend(stream, body.offset, body.nbytes, inside)
            if body.crc is None:
                continue
            self.out.flush()
            new = struct.pack("<I", _crc(self.out, body.offset, body.nbytes))
            old = struct.pack("<I", body.crc)
            self._put(entry + _CRC_IN_ENTRY, new)
            # what wrote the archive in one go knew the checksum only afterwards
            end = body.offset + body.nbytes
            header = start + member.place + _CRC_IN_HEADER
            behind = end + len(_DESCRIPTOR) * (_at(stream, end) == _DESCRIPTOR)
            for place in (header, *([behind] if member.flags & 8 else [])):
                if _at(stream, place) == old:
                    self._put(place, new)


def copy_bytes(source: BinaryIO, out: BinaryIO, size: int) -> None:
    """Copy a file, by the system alone where it can, which then may share the blocks."""
    done = 0
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):  # another file system, or one that cannot
            while done < size:
                copied = os.copy_file_range(source.fileno(), out.fileno(), size - done, done, done)
                if not copied:
                    break
                done += copied
    source.seek(done)
    out.seek(done)
    shutil.copyfileobj(source, out, _CHUNK)


def _entries(stream: BinaryIO, position: int, count: int) -> list[int]:
    """Return where in the file the entries of an archive's directory are, which has been checked."""
    entries: list[int] = []
    for _ in range(count):
        entries.append(position)
        stream.seek(position)
        position += _ENTRY + sum(struct.unpack_from("<3H", stream.read(_ENTRY), 28))
    return entries


def _at(stream: BinaryIO, place: int) -> bytes:
    stream.seek(place)
    return stream.read(4)


def _crc(stream: BinaryIO, offset: int, length: int) -> int:
    stream.seek(offset)
    crc = 0
    while length > 0 and (data := stream.read(min(length, _CHUNK))):
        crc = zlib.crc32(data, crc)
        length -= len(data)
    return crc


def _both(one: BinaryIO, other: BinaryIO, length: int) -> Iterator[tuple[bytes, bytes]]:
    while length > 0:
        step = min(length, _CHUNK)
        yield one.read(step), other.read(step)
        length -= step


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
