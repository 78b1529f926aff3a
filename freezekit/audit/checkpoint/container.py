"""Opens an untrusted file safely and tells what it is by its content, never by its name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import TracebackType
from typing import BinaryIO, Literal
from weakref import ref

from freezekit.audit.checkpoint.other_formats import Other, other_format
from freezekit.audit.progress import advance
from freezekit.errors import CheckpointError, SelectionError

__all__ = ["Kind", "SourceFile", "beside", "guarded", "printable", "refused", "sniff"]

Identity = tuple[int, int, int, int]
Kind = Literal["zip", "legacy", "safetensors", "index", "unknown"]

#: torch's mark of its pre-1.6 format, 0x1950a86a20f9469cfc6c, as pickle protocols 2 and up write it, and 1
_LEGACY_MAGIC = (b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", b"L119547037146038801333356L\n.")
_DOWNLOAD = "download or copy the file again"
_HEAD_BYTES = 4096
_BIG = 2**32
_TAIL_BYTES = 64


def printable(text: str, limit: int = 80) -> str:
    r"""Return untrusted text safe for a terminal: escaped where it does not print, and not too long.

    Control characters, ESC, newlines, bidi controls and lone surrogates are escaped as in a Python string.

    >>> printable("a\x1b[31mb\n\u202e"), printable("x" * 100, limit=5)
    ('a\\x1b[31mb\\n\\u202e', 'xxxxx…')
    """
    if len(text) <= limit and text.isprintable():
        return text
    pieces: list[str] = []
    room = limit
    for char in text:  # one by one, so that a text of 100 MB costs no more than its first characters
        piece = char if char.isprintable() else ascii(char)[1:-1]
        room -= len(piece)
        if room < 0:
            pieces.append("…")
            break
        pieces.append(piece)
    return "".join(pieces)


class guarded:  # noqa: N801  # used like a function; a generator would cost more than a small read
    """Let nothing but a :class:`CheckpointError` that says where out of a block that reads a file.

    Args:
        where: the file, printable.

    Raises:
        CheckpointError: in place of whatever was raised inside.
        SelectionError: what was asked for is not in the file.
    """

    __slots__ = ("where",)

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            _tell(error, self.where)


def _tell(error: Exception, where: str) -> None:
    """Raise what says where, unless the error does."""
    if isinstance(error, CheckpointError):
        if error.where is None:
            raise CheckpointError(error.what, where=where, got=error.got, remedy=error.remedy) from None
    elif isinstance(error, SelectionError):
        raise SelectionError(error.what, where=where, got=error.got, remedy=error.remedy) from None
    elif isinstance(error, FileNotFoundError):
        raise CheckpointError("no such file", where=where, remedy="check the path") from error
    elif isinstance(error, PermissionError):
        remedy = "check its permissions"
        raise CheckpointError("no permission to read it", where=where, remedy=remedy) from error
    elif isinstance(error, OSError):
        got = printable(error.strerror or type(error).__name__)
        raise CheckpointError("the system cannot read it", where=where, got=got) from error
    elif isinstance(error, MemoryError):
        raise CheckpointError("not enough memory to read it", where=where) from error
    else:  # a hostile file's whole art is the exception nobody thought of
        got = f"{type(error).__name__}: {printable(str(error), 120)}"
        what = "damaged, or not a checkpoint"
        raise CheckpointError(what, where=where, got=got, remedy=_DOWNLOAD) from error


class SourceFile:
    """A regular file as it was when first opened; each later read checks that it still is that file.

    It is kept open from one read to the next, as long as not too many are, and closed with the last reader.

    Args:
        path: absolute path, to open it again.
        source: the path as given.
        identity: device, inode, size and modification time in ns.
    """

    def __init__(self, path: str, source: str, identity: Identity) -> None:
        self.path = path
        self.source = source
        self.identity = identity
        self._descriptor: int | None = None
        #: the path as given, printable
        self.shown = printable(source, 1000)

    @classmethod
    def at(cls, path: str) -> SourceFile:
        """Look at a path, and refuse what is not a regular file or has nothing in it."""
        descriptor, identity = _open_regular(path)
        os.close(descriptor)
        if identity[2] == 0:
            raise CheckpointError("an empty file", got="0 bytes", remedy=_DOWNLOAD)
        return cls(os.path.abspath(path), path, identity)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.identity[2]

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open it again, and check before and after that it is unchanged."""
        descriptor, identity = _open_regular(self.path)
        with os.fdopen(descriptor, "rb") as stream:
            self._check(identity)
            yield stream
            self._check(_identity(os.fstat(stream.fileno())))

    def pread(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at ``offset``."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                "truncated or damaged: something in it lies beyond its end",
                got=f"bytes {offset} to {offset + length} of {self.size}",
                remedy=_DOWNLOAD,
            )
        advance(length)
        with _LOCK:  # or another thread could close the descriptor to make room
            if self._descriptor is None:
                self._descriptor, identity = _open_regular(self.path)
                self._check(identity)
                _make_room(self)
            data = _read_at(self._descriptor, length, offset)
            while len(data) < length and (
                more := _read_at(self._descriptor, length - len(data), offset + len(data))
            ):
                data += more  # one call reads 2 GB at most
            # where the path names another file by now, this is still the one that was opened
            self._check(_identity(os.fstat(self._descriptor)))
        if len(data) != length:
            raise self._changed()
        return data

    def check_written(self) -> None:
        """Refuse a big file that is nearly all holes: to read the zeros in them would take minutes."""
        blocks = getattr(os.stat(self.path), "st_blocks", None)  # Windows does not tell
        if self.size > _BIG and blocks is not None and blocks * 512 * 50 < self.size:
            raise CheckpointError(
                "most of it was never written, as an interrupted download leaves a file",
                where=self.shown,
                got=f"{blocks * 512} bytes on the disk of {self.size}",
                remedy=_DOWNLOAD,
            )

    def close(self) -> None:
        """Close it; the next read opens it again."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _check(self, identity: Identity) -> None:
        if identity != self.identity:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        remedy = "read it when nothing writes to it"
        return CheckpointError("changed while reading", where=self.shown, remedy=remedy)


_MAX_OPEN = 8
_LOCK = RLock()
_OPENED: list[ref[SourceFile]] = []


def _sought(descriptor: int, length: int, offset: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, length)


#: Windows has no pread
_read_at: Callable[[int, int, int], bytes] = getattr(os, "pread", _sought)


def _make_room(file: SourceFile) -> None:
    """Close the file that was opened first where too many are open."""
    _OPENED[:] = [other for other in _OPENED if other() is not None and other() is not file]
    _OPENED.append(ref(file))
    if len(_OPENED) > _MAX_OPEN and (first := _OPENED.pop(0)()) is not None:
        first.close()


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_regular(path: str) -> tuple[int, Identity]:
    # non-blocking, or opening a FIFO that nobody writes to would wait for ever
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # each is missing on some system
        flags |= getattr(os, name, 0)
    if os.path.isdir(path):  # asked first because Windows does not open a directory at all
        remedy = "give the checkpoint file itself"
        raise CheckpointError("not a regular file", got="a directory", remedy=remedy)
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)  # of what was opened: the path may name something else by now
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        remedy = "give the checkpoint file itself"
        raise CheckpointError("not a regular file", got=_file_type(status.st_mode), remedy=remedy)
    return descriptor, _identity(status)


def _file_type(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
    return next(
        (name for test, name in kinds if test(mode)), "a directory" if stat.S_ISDIR(mode) else "a socket"
    )


def beside(path: str, name: str) -> str:
    """Return the path of a file that another one names, which must lie in the same folder.

    Args:
        path: the file that names it.
        name: what it says, which may come from anyone.

    Raises:
        CheckpointError: it is no plain file name.
    """
    # a colon separates a drive or a stream on Windows, whatever system this is
    if name in ("", ".", "..") or len(name) > 255 or any(char in name for char in "/\\:\0"):
        what = "hostile: it names a file outside its folder"
        raise CheckpointError(what, got=printable(name), remedy="get it from its source again")
    return os.path.join(os.path.dirname(path), name)


def sniff(file: SourceFile, stream: BinaryIO) -> Kind:
    """Tell a file's format by its first bytes.

    Args:
        file: the file.
        stream: the same, open and at its start; it is left there.

    Returns:
        The format, or ``"unknown"`` where only a pickle scan can tell.

    Raises:
        CheckpointError: it is a known format that holds no PyTorch tensors.
    """
    head = stream.read(_HEAD_BYTES)
    stream.seek(max(0, file.size - _TAIL_BYTES))
    tail = stream.read(_TAIL_BYTES)
    stream.seek(0)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if any(magic in head[:40] for magic in _LEGACY_MAGIC):
        return "legacy"
    # the header's length comes first: eight bytes that are no text, or it is JSON with a brace at that place
    if head[8:9] == b"{" and not (head[:8].isascii() and head[:8].decode("ascii").isprintable()):
        return "safetensors"
    if (other := other_format(head, tail, file.size)) is not None:
        raise refused(other)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{") and b'"weight_map"' in text:
        return "index"
    if text.startswith((b"{", b"[")) and (json := _json_page(text)) is not None:
        raise json
    return "unknown"


def refused(other: Other) -> CheckpointError:
    """Return the error for what is no checkpoint."""
    got = None if other.got is None else printable(other.got)
    return CheckpointError(other.what, got=got, remedy=other.remedy)


def _json_page(text: bytes) -> CheckpointError | None:
    if b'"schema_version"' in text and b'"clean"' in text:
        what = "a saved report, not a checkpoint"
        return CheckpointError(what, remedy="give a checkpoint here; freezekit audit FILE shows the report")
    # neither bracket is a pickle's opcode, so text that starts with one is no pickle either
    if not text[:64].decode("latin-1").replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return None
    what = "JSON, not a checkpoint: probably an error message saved in its place"
    return CheckpointError(what, got=repr(printable(text[:40].decode("latin-1"))), remedy=_DOWNLOAD)
