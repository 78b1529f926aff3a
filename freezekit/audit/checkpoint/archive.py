"""A zip archive in a file, or in a part of one: its members checked against each other, few ever unpacked."""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections import Counter
from typing import BinaryIO

from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.tensors import StoredBytes
from freezekit.audit.checkpoint.zip_directory import FIRST, Member, read_directory
from freezekit.errors import CheckpointError

__all__ = ["MAX_UNPACKED_BYTES", "Archive"]

#: of all the members of one archive that were unpacked, together
MAX_UNPACKED_BYTES = 10 * 2**20

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_WINDOW = 4096
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x2041
_DOWNLOAD = "download or copy the file again"
_AGAIN = "get the file from its source again, as safetensors if there is one"


class Archive:
    """A zip's members, checked against each other and against the file.

    Args:
        file: the file.
        stream: the same, open; it is moved about.
        start: where in the file the archive starts.
        length: its length in bytes; up to the file's end if not given.
        limits: caps on what it may cost.

    Raises:
        CheckpointError: it is damaged or hostile.
    """

    def __init__(
        self,
        file: SourceFile,
        stream: BinaryIO,
        start: int = 0,
        length: int | None = None,
        limits: Limits = Limits.DEFAULT,
    ) -> None:
        self.file = file
        self.limits = limits
        self._window = 0, b""
        self.stream = stream
        self._start = start
        self._length = file.size - start if length is None else length
        self._room = MAX_UNPACKED_BYTES
        members, directory = read_directory(self._read, self._length)
        for member in members:
            _check_member(member)
        self.members = {member.name: member for member in members}
        if len(self.members) != len(members):
            double, _ = Counter(member.name for member in members).most_common(1)[0]
            what = "hostile: a name is in the zip archive twice"
            raise CheckpointError(what, got=printable(double), remedy=_AGAIN)
        cases = Counter(map(str.lower, self.members))
        self._ambiguous = {name for name, times in cases.items() if times > 1}
        in_order = sorted(members, key=lambda member: member.place)
        self.directory = directory
        #: where each member starts, and the directory after the last one
        self._places = [*(member.place for member in in_order), directory]
        self._check_places(in_order)

    def _read(self, offset: int, length: int) -> bytes:
        self.stream.seek(self._start + offset)
        return self.stream.read(max(0, min(length, self._length - offset)))

    def _check_places(self, members: list[Member]) -> None:
        if members and members[0].place != 0:
            raise CheckpointError(FIRST, remedy=_AGAIN)
        for member, end in zip(members, self._places[1:], strict=True):
            if member.place + _LOCAL_HEADER.size + member.packed > end:
                raise _misplaced(member.name)

    def locate(self, name: str, key: str, *, swapped: bool = False) -> StoredBytes:
        """Find a member's bytes by its local header, which is where they really are."""
        member = self._member(name)
        _check_stored(member)
        # 0 is what torch writes where it was told to compute no checksum
        crc = member.crc if member.crc or not member.size else None
        return StoredBytes(self.file, key, self._content(member), member.size, crc, swapped)

    def read(self, name: str, limit: int | None = None, *, unpack: bool = False) -> bytes:
        """Read a small member whole.

        Args:
            name: the member.
            limit: how many bytes it may have; as many as a pickle if not given.
            unpack: whether it may be compressed.
        """
        member = self._member(name)
        packed = unpack and member.method == _DEFLATED
        if not packed:
            _check_stored(member)
        allowed = self.limits.pickle_bytes if limit is None else limit
        if member.size > allowed:
            what, got = f"its {printable(name)} is too long", f"{member.size} bytes, more than {allowed}"
            raise Limits.hit(what, got) if limit is None else CheckpointError(what, got=got)
        data = self.file.pread(self._content(member), member.packed)
        if packed:
            data = self._unpack(data, member)
        if (member.crc or packed) and zlib.crc32(data) != member.crc:
            raise CheckpointError(f"damaged: checksum of {printable(name)} does not match", remedy=_DOWNLOAD)
        return data

    def _member(self, name: str) -> Member:
        member = self.members.get(name)
        if member is None:
            what = "damaged: a storage is missing from the zip archive"
            raise CheckpointError(what, got=printable(name), remedy=_DOWNLOAD)
        if name.lower() in self._ambiguous:  # torch may find the other one
            what = "hostile: two names in the zip archive differ by case only"
            raise CheckpointError(what, got=printable(name), remedy=_AGAIN)
        if member.is_folder:  # of which torch reads nothing, and takes what was in the memory before
            what = "hostile: a member of the zip archive is marked as a folder"
            raise CheckpointError(what, got=printable(name), remedy=_AGAIN)
        return member

    def _content(self, member: Member) -> int:
        """Return where in the file a member's content starts."""
        raw = member.name.encode("utf-8", "surrogateescape")
        read = self._header(member.place, _LOCAL_HEADER.size + len(raw))
        header = _LOCAL_HEADER.unpack_from(read)
        magic, method, name_length, extra_length = header[0], header[3], int(header[-2]), int(header[-1])
        same = magic == b"PK\x03\x04" and method == member.method and name_length == len(raw)
        start = member.place + _LOCAL_HEADER.size + name_length + extra_length
        if not same or read[_LOCAL_HEADER.size :] != raw:
            what = "damaged or hostile: a zip member's header does not say what the directory says"
            raise CheckpointError(what, got=printable(member.name), remedy=_DOWNLOAD)
        if start + member.packed > self._places[bisect_right(self._places, member.place)]:
            raise _misplaced(member.name)
        return self._start + start

    def _header(self, place: int, length: int) -> bytes:
        """Read a part of the archive, and what comes after it: small members lie close together."""
        at, window = self._window
        if not at <= place <= at + len(window) - length:
            at, longest = place, max(length, _WINDOW)
            window = self.file.pread(self._start + at, min(longest, self._length - at))
            self._window = at, window
        return window[place - at : place - at + length]

    def _unpack(self, data: bytes, member: Member) -> bytes:
        self._room -= member.size
        if self._room < 0:
            raise CheckpointError(
                "hostile: what is compressed in the zip archive unpacks to too much",
                got=f"more than {MAX_UNPACKED_BYTES} bytes",
            )
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            unpacked = machine.decompress(data, member.size + 1)
        except zlib.error as error:
            what = f"damaged: {printable(member.name)} cannot be unpacked"
            raise CheckpointError(what, got=printable(str(error)), remedy=_DOWNLOAD) from error
        if len(unpacked) != member.size:
            raise _two_sizes(member.name)
        return unpacked


def _check_member(member: Member) -> None:
    name = member.name
    if (".." in name and ".." in name.split("/")) or name.startswith("/") or "\\" in name or "\0" in name:
        what = "hostile: a name in the zip archive leads out of it"
        raise CheckpointError(what, got=printable(name), remedy=_AGAIN)
    if member.flags & _ENCRYPTED:
        what = "not supported: an encrypted zip archive"
        raise CheckpointError(what, got=printable(name), remedy="decrypt it first")


def _check_stored(member: Member) -> None:
    """Refuse a member that has to be unpacked to be read."""
    if member.method != _STORED:
        raise CheckpointError(
            "not supported: a compressed zip archive; torch.save writes uncompressed ones",
            got=printable(member.name),
            remedy="re-save with torch.save, or unpack it and give the checkpoint inside",
        )
    if member.packed != member.size:
        raise _two_sizes(member.name)


def _two_sizes(name: str) -> CheckpointError:
    return CheckpointError(
        "damaged or hostile: a zip member has two sizes", got=printable(name), remedy=_DOWNLOAD
    )


def _misplaced(name: str) -> CheckpointError:
    what = "truncated or hostile: a zip member lies beyond the file's end or over the next member"
    return CheckpointError(what, got=printable(name), remedy=_DOWNLOAD)
