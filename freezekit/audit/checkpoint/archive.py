"""A zip archive in a file, or in a part of one: its members checked against each other, none unpacked."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections import Counter
from typing import BinaryIO

from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.tensors import StoredBytes
from freezekit.errors import CheckpointError

__all__ = ["Archive"]

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_DIRECTORY = 32 * 2**20
_DOWNLOAD = "download or copy the file again"


class Archive:
    """A zip's members, checked against each other and against the file.

    Args:
        file: the file.
        stream: the same, open; it is moved about.
        start: where in the file the archive starts.
        length: its length in bytes; up to the file's end if not given.

    Raises:
        CheckpointError: it is damaged or hostile.
    """

    def __init__(self, file: SourceFile, stream: BinaryIO, start: int = 0, length: int | None = None) -> None:
        self.file = file
        self._length = file.size - start if length is None else length
        self._start = start
        self.stream = _Window(stream, start, self._length)
        try:
            with zipfile.ZipFile(self.stream) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            what = "truncated or damaged: the zip archive's directory at its end cannot be read"
            raise CheckpointError(what, got=printable(str(error)), remedy=_DOWNLOAD) from error
        self.members = {member.filename: member for member in members}
        if len(self.members) != len(members):
            double, _ = Counter(member.filename for member in members).most_common(1)[0]
            raise CheckpointError("hostile: a name is in the zip archive twice", got=printable(double))
        self._check_places(sorted(members, key=lambda member: member.header_offset))
        for member in members:
            _check_member(member)

    def _check_places(self, members: list[zipfile.ZipInfo]) -> None:
        ends = [member.header_offset for member in members[1:]] + [self._length]
        # data in front of the archive would make two readers see two different files
        if members and members[0].header_offset != 0:
            raise CheckpointError("damaged or hostile: something comes before the zip archive's first member")
        for member, end in zip(members, ends, strict=True):
            if member.header_offset + _LOCAL_HEADER.size + member.compress_size > end:
                what = "truncated or hostile: a zip member lies beyond the file's end or over the next member"
                raise CheckpointError(what, got=printable(member.filename), remedy=_DOWNLOAD)

    def locate(self, name: str, key: str, *, swapped: bool = False) -> StoredBytes:
        """Find a member's bytes by its local header, which is where they really are."""
        member = self.members.get(name)
        if member is None:
            raise CheckpointError("damaged: a storage is missing from the zip archive", got=printable(name))
        _check_stored(member)
        start = member.header_offset + _LOCAL_HEADER.size
        longest = _LOCAL_HEADER.size + 4 * len(member.orig_filename)
        header = self.file.pread(
            self._start + member.header_offset, min(longest, self._length - member.header_offset)
        )
        magic, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
        encoded = member.orig_filename.encode("utf-8" if flags & 0x800 else "cp437", "surrogateescape")
        same = magic == b"PK\x03\x04" and method == member.compress_type and name_length == len(encoded)
        if not same or header[_LOCAL_HEADER.size : _LOCAL_HEADER.size + name_length] != encoded:
            what = "damaged or hostile: a zip member's header does not say what the directory says"
            raise CheckpointError(what, got=printable(name), remedy=_DOWNLOAD)
        # 0 is what torch writes where it was told to compute no checksum
        crc = member.CRC if member.CRC or not member.file_size else None
        place = self._start + start + name_length + extra_length
        return StoredBytes(self.file, key, place, member.file_size, crc, swapped)

    def read(self, name: str, limits: Limits = Limits.DEFAULT) -> bytes:
        """Read a small member whole."""
        stored = self.locate(name, name)
        if stored.nbytes > limits.pickle_bytes:
            got = f"{stored.nbytes} bytes, more than {limits.pickle_bytes}"
            raise Limits.hit(f"its {printable(name)} is too long", got)
        data = self.file.pread(stored.offset, stored.nbytes)
        if stored.crc is not None and zlib.crc32(data) != stored.crc:
            raise CheckpointError(f"damaged: checksum of {printable(name)} does not match", remedy=_DOWNLOAD)
        return data


class _Window(io.RawIOBase):
    """A part of a file as a file, for ``zipfile``, which reads as many bytes as the archive says it has."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream = stream
        self._start = start
        self._length = length

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        offset += {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        if offset < 0:
            raise OSError("before the archive's start")
        return self._stream.seek(self._start + offset) - self._start

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._length - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > _MAX_DIRECTORY:
            raise CheckpointError("its zip directory is too long", got=f"{wanted} bytes")
        return self._stream.read(wanted)


def _check_member(member: zipfile.ZipInfo) -> None:
    name = printable(member.filename)
    if ".." in member.filename.split("/") or member.filename.startswith("/") or "\\" in member.filename:
        raise CheckpointError("hostile: a name in the zip archive leads out of it", got=name)
    if member.flag_bits & 0x41:
        raise CheckpointError("not supported: an encrypted zip archive", got=name, remedy="decrypt it first")


def _check_stored(member: zipfile.ZipInfo) -> None:
    """Refuse a member that has to be unpacked to be read."""
    name = printable(member.filename)
    if member.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(
            "not supported: a compressed zip archive; torch.save writes uncompressed ones",
            got=name,
            remedy="re-save with torch.save, or unpack it and give the checkpoint inside",
        )
    if member.compress_size != member.file_size:
        raise CheckpointError("damaged or hostile: a zip member has two sizes", got=name, remedy=_DOWNLOAD)
