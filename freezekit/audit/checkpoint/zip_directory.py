"""Reads the directory at a zip archive's end: where its members are, and nothing that readers disagree on.

The standard library's reader takes 20 us and 500 bytes for a member, so that a file of a million empty ones
would keep it busy for half a minute; and it follows a directory that torch's reader would not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from freezekit.audit.checkpoint.container import printable
from freezekit.errors import CheckpointError

__all__ = ["FIRST", "MAX_DIRECTORY_BYTES", "MAX_MEMBERS", "Member", "read_directory"]

#: a torch file has one for each tensor
MAX_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 32 * 2**20

_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_MAX_COMMENT = 2**16 - 1
_FOLDER = 0x10  # as DOS marks one, whatever system the archive is from
_FULL = 2**32 - 1  # the number stands in the zip64 extra field
_DOWNLOAD = "download or copy the file again"
FIRST = "damaged or hostile: something comes before the zip archive's first member"

Read = Callable[[int, int], bytes]


class Member(NamedTuple):
    """What the directory says of a member.

    Args:
        name: its name, with bytes that are not UTF-8 escaped as surrogates.
        flags: as the format numbers them.
        method: 0 if stored, 8 if deflated.
        crc: CRC-32 of its content.
        packed: bytes that it takes in the archive.
        size: bytes of its content.
        place: where its local header starts.
        is_folder: whether torch's reader takes it for a folder, and reads nothing of it.
    """

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    place: int
    is_folder: bool


def read_directory(read: Read, length: int) -> tuple[list[Member], int]:
    """Return the members in the directory's order, and where the directory starts.

    Args:
        read: returns so many bytes from an offset in the archive, or fewer at its end.
        length: the archive's.

    Raises:
        CheckpointError: it is damaged, hostile, or longer than any checkpoint's.
    """
    count, size, start = _find(read, length)
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        got = f"{count} members in {size} bytes, more than {MAX_MEMBERS} in {MAX_DIRECTORY_BYTES}"
        raise CheckpointError(
            "its zip directory is too long", got=got, remedy="save fewer tensors in one file"
        )
    data = read(start, size)
    members: list[Member] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(data) or data[position : position + 4] != b"PK\x01\x02":
            raise _damaged("an entry of it is missing")
        _, _, _, flags, method, _, _, crc, packed, full, *lengths, disk, _, attributes, place = (
            _ENTRY.unpack_from(data, position)
        )
        position += _ENTRY.size
        name_end = position + lengths[0]
        raw = data[position:name_end]
        position = name_end + lengths[1] + lengths[2]
        if position > len(data):
            raise _damaged("an entry of it is cut short")
        if _FULL in (packed, full, place):
            extra = data[name_end : name_end + lengths[1]]
            full, packed, place = _long_numbers(extra, full, packed, place)
        if disk != 0:
            raise _several_parts()
        # torch takes names as they are, whatever the flag for UTF-8 and extra fields say
        name = raw.decode("utf-8", "surrogateescape")
        is_folder = bool(attributes & _FOLDER)
        members.append(Member(name, flags, method, crc, packed, full, place, is_folder))
    if position != len(data):
        raise _damaged("it holds more entries than it counts")
    return members, start


def _find(read: Read, length: int) -> tuple[int, int, int]:
    """Return the directory's number of entries, its size and its start, from the record at the end."""
    tail_start = max(0, length - _END.size - _MAX_COMMENT)
    tail = read(tail_start, length - tail_start)
    # the last one, as all readers do; what follows it, a comment or a signature, belongs to nothing
    at = tail.rfind(b"PK\x05\x06", 0, max(0, len(tail) - _END.size + 4))
    if at < 0:
        raise _damaged("no record of its end")
    _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = read(max(0, end - _LOCATOR.size), _LOCATOR.size)
    if end >= _LOCATOR.size and locator.startswith(b"PK\x06\x07"):
        _, _, place, disks = _LOCATOR.unpack(locator)
        end -= _LOCATOR.size + _END_64.size
        record = read(max(0, end), _END_64.size)
        if place != end or len(record) < _END_64.size or not record.startswith(b"PK\x06\x06"):
            raise _damaged("its zip64 record is not where it should be")
        _, _, _, _, disk, first_disk, here, count, size, start = _END_64.unpack(record)
        disk |= disks > 1
    if disk or first_disk or here != count:
        raise _several_parts()
    if start + size < end:
        # data in front of the archive would make two readers see two different files
        raise CheckpointError(FIRST, remedy=_DOWNLOAD)
    if start + size > end:
        raise _damaged("it would lie beyond its own end")
    return count, size, start


def _long_numbers(extra: bytes, *numbers: int) -> list[int]:
    """Return the numbers with those in place that the zip64 extra field holds."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            field = extra[position : position + length]
            wanted = sum(number == _FULL for number in numbers)
            if len(field) >= 8 * wanted:
                values = iter(struct.unpack_from(f"<{wanted}Q", field))
                return [next(values) if number == _FULL else number for number in numbers]
            break
        position += length
    raise _damaged("a size of more than 4 GB is missing in it")


def _several_parts() -> CheckpointError:
    return CheckpointError(
        "not supported: a zip archive in several parts",
        remedy="join them first (zip -s 0 FILE.zip --out WHOLE.zip) and give the whole",
    )


def _damaged(fault: str) -> CheckpointError:
    what = "truncated or damaged: the zip archive's directory at its end cannot be read"
    return CheckpointError(what, got=printable(fault), remedy=_DOWNLOAD)
