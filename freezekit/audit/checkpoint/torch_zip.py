"""Reads the zip files that ``torch.save`` writes since torch 1.6.

The archive holds ``<root>/data.pkl`` and, uncompressed, one ``<root>/data/<key>`` for each storage.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Collection
from typing import BinaryIO

from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.inert import StorageRef
from freezekit.audit.checkpoint.pickle_machine import MAX_PICKLE_BYTES, unpickle
from freezekit.audit.checkpoint.table import make_table
from freezekit.audit.checkpoint.tensors import StoredBytes
from freezekit.audit.state import StateTable
from freezekit.errors import CheckpointError

__all__ = ["read_zip"]

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_DOWNLOAD = "download or copy the file again"
_RE_SAVE = "load it where it came from and save model.state_dict() with torch.save or safetensors"


def read_zip(file: SourceFile, stream: BinaryIO) -> StateTable:
    """Read a torch zip file.

    Args:
        file: the file.
        stream: the same, open.

    Raises:
        CheckpointError: it is damaged, hostile, or another kind of zip.
    """
    archive = _Archive(file, stream)
    root = _find_root(archive.members)
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.members else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(
            "its byte order is neither little nor big", got=printable(order[:20].decode("latin-1"))
        )
    pickled = unpickle(io.BytesIO(archive.read(f"{root}data.pkl")))
    found: dict[str, StoredBytes] = {}

    def find(storage: StorageRef) -> StoredBytes:
        if storage.key not in found:
            found[storage.key] = archive.locate(
                f"{root}data/{storage.key}", storage.key, swapped=order == b"big"
            )
        return found[storage.key]

    return make_table(file, pickled, find, lambda: _checksum_notes(found))


class _Archive:
    """A zip's members, checked against each other and against the file."""

    def __init__(self, file: SourceFile, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        try:
            with zipfile.ZipFile(_Bounded(stream, file.size)) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            what = "truncated or damaged: the zip archive's directory at its end cannot be read"
            raise CheckpointError(what, got=printable(str(error)), remedy=_DOWNLOAD) from error
        self.members = {member.filename: member for member in members}
        if len(self.members) != len(members):
            names = [member.filename for member in members]
            double = next(name for name in names if names.count(name) > 1)
            raise CheckpointError("hostile: a name is in the zip archive twice", got=printable(double))
        self._check_places(sorted(members, key=lambda member: member.header_offset))
        for member in members:
            _check_member(member)

    def _check_places(self, members: list[zipfile.ZipInfo]) -> None:
        ends = [member.header_offset for member in members[1:]] + [self.file.size]
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
        self.stream.seek(member.header_offset)
        header = self.stream.read(_LOCAL_HEADER.size)
        magic, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = member.header_offset + _LOCAL_HEADER.size
        encoded = member.orig_filename.encode("utf-8" if flags & 0x800 else "cp437", "surrogateescape")
        same = magic == b"PK\x03\x04" and method == member.compress_type and name_length == len(encoded)
        if not same or self.stream.read(name_length) != encoded:
            what = "damaged or hostile: a zip member's header does not say what the directory says"
            raise CheckpointError(what, got=printable(name), remedy=_DOWNLOAD)
        # 0 is what torch writes where it was told to compute no checksum
        crc = member.CRC if member.CRC or not member.file_size else None
        return StoredBytes(self.file, key, start + name_length + extra_length, member.file_size, crc, swapped)

    def read(self, name: str) -> bytes:
        """Read a small member whole."""
        stored = self.locate(name, name)
        if stored.nbytes > MAX_PICKLE_BYTES:
            got = f"{stored.nbytes} bytes, more than {MAX_PICKLE_BYTES}"
            raise CheckpointError(f"its {printable(name)} is too long", got=got)
        data = self.file.pread(stored.offset, stored.nbytes)
        if stored.crc is not None and zlib.crc32(data) != stored.crc:
            raise CheckpointError(f"damaged: checksum of {printable(name)} does not match", remedy=_DOWNLOAD)
        return data


class _Bounded(io.RawIOBase):
    """The file for ``zipfile``, which reads as many bytes as the archive says its directory has."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self._stream.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_PICKLE_BYTES:
            raise CheckpointError("its zip directory is too long", got=f"{wanted} bytes")
        return self._stream.read(wanted)


def _check_member(member: zipfile.ZipInfo) -> None:
    name = printable(member.filename)
    if ".." in member.filename.split("/") or member.filename.startswith("/") or "\\" in member.filename:
        raise CheckpointError("hostile: a name in the zip archive leads out of it", got=name)
    if member.flag_bits & 0x41:
        raise CheckpointError("not supported: an encrypted zip archive", got=name, remedy="decrypt it first")
    if member.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(
            "not supported: a compressed zip archive; torch.save writes uncompressed ones",
            got=name,
            remedy="re-save with torch.save, or unpack it and give the checkpoint inside",
        )
    if member.compress_size != member.file_size:
        raise CheckpointError("damaged or hostile: a zip member has two sizes", got=name, remedy=_DOWNLOAD)


def _find_root(names: Collection[str]) -> str:
    """Return what comes before ``data.pkl``, or say what kind of zip it is instead."""
    roots = [name.removesuffix("data.pkl") for name in names if name.rpartition("/")[2] == "data.pkl"]
    roots = [root for root in roots if root.count("/") <= 1]
    last_parts = {name.rpartition("/")[2] for name in names}
    if last_parts & {"serialized_exported_program.json", "archive_format"}:
        what = "a .pt2 archive (torch.export), not supported yet"
        raise CheckpointError(what, remedy="save the model's state_dict() with torch.save")
    if len(roots) > 1:
        raise CheckpointError(
            "damaged or hostile: it has more than one data.pkl", got=printable(", ".join(roots))
        )
    if roots:
        root = roots[0]
        if f"{root}constants.pkl" in names or any(name.startswith(f"{root}code/") for name in names):
            remedy = "torch.save(torch.jit.load(FILE).state_dict(), 'state.pt'), then give state.pt"
            raise CheckpointError("a TorchScript file, not supported yet", remedy=remedy)
        return root
    if any(name.endswith(".npy") for name in names):
        raise CheckpointError("not supported: numpy arrays (.npz)", remedy=_RE_SAVE)
    inside = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors"))]
    if inside:
        what = "not supported: a zip archive around checkpoints"
        raise CheckpointError(
            what, got=printable(inside[0]), remedy="unpack it and give the checkpoint inside"
        )
    raise CheckpointError("a zip archive that torch.save did not write: no data.pkl in it", remedy=_RE_SAVE)


def _checksum_notes(found: dict[str, StoredBytes]) -> list[str]:
    missing = any(stored.crc is None for stored in found.values())
    return ["the file stores no checksums, so damage to its values goes unnoticed"] if missing else []
