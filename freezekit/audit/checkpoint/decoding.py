"""A pickle's bytes, read from a stream as far as they are needed, and the arguments of its opcodes."""

from __future__ import annotations

import codecs
import warnings
from typing import IO, Any

from freezekit.audit.checkpoint.limits import Limits
from freezekit.errors import CheckpointError

__all__ = ["AGAIN", "PickleBytes", "PickleDamageError"]

_CHUNK = 2**16
#: more than an opcode takes whose argument has a fixed size
_MARGIN = 16
#: only the oldest opcodes are followed by a line of text; Python converts no longer numbers either
_MAX_NUMBER_LINE = 10_000
_MAX_DIGITS = 4_300
_PROTOCOLS = range(6)
AGAIN = "download or copy the file again"


class PickleDamageError(CheckpointError):
    """The bytes are no pickle, or one cut short."""


class PickleBytes:
    """A window on a pickle; no length in it makes this read beyond the file's end or the limit.

    Args:
        stream: at the pickle's start.
        remaining: bytes from here to the file's end.
        limits: caps on the pickle's size.
    """

    def __init__(self, stream: IO[bytes], remaining: int, limits: Limits) -> None:
        self._stream = stream
        self._remaining = remaining
        self._limits = limits
        self._start = stream.tell()
        self.dropped = 0
        self._real = 0  # bytes of ``data`` that are the file's
        self.data = b""
        self.safe = -1
        """An opcode up to here has its fixed arguments in ``data``; behind the file's end stand zeros."""

    def more(self, position: int, needed: int = 1) -> int:
        """Have ``needed`` bytes from a position of ``data`` on, and return where in ``data`` that is now."""
        left = self._real - position + self._remaining
        if needed > left:
            what = "truncated or damaged: "
            if left <= 0:
                raise PickleDamageError(
                    f"{what}its pickle cannot be followed", got="no end of it", remedy=AGAIN
                )
            what += "a length in its pickle lies beyond the file's end"
            raise PickleDamageError(what, got=f"{needed} bytes with {max(left, 0)} left", remedy=AGAIN)
        if self.dropped + position + needed > self._limits.pickle_bytes:
            raise Limits.hit("its pickle is too long", f"more than {self._limits.pickle_bytes} bytes")
        wanted = min(self._remaining, max(_CHUNK, needed + _MARGIN - (self._real - position)))
        new = self._stream.read(wanted)
        if len(new) < wanted:
            what = "truncated or damaged: its pickle cannot be followed"
            raise PickleDamageError(what, got="no end of it", remedy=AGAIN)
        self._remaining -= wanted
        padding = b"" if self._remaining else bytes(_MARGIN)
        self.data = b"".join((self.data[position : self._real], new, padding))
        self.dropped += position
        self._real = len(self.data) - len(padding)
        self.safe = self._real - _MARGIN if self._remaining else self._real - 1
        return 0

    def finish(self, position: int) -> None:
        """Leave the stream behind the pickle, which ends at a position of ``data``."""
        self._stream.seek(self._start + self.dropped + position)

    def argument(self, code: int, position: int) -> tuple[Any, int]:
        """Decode the argument of an opcode as pickle does, and return where it ends.

        Raises:
            KeyError: there is no such opcode with an argument.
        """
        if code in _COUNTED:
            return self._counted(code, position)
        if code in _LINES:
            line, position = self._line(position)
            return _text_argument(code, line), position
        if code in (0x63, 0x69):  # GLOBAL, INST
            module, position = self._line(position)
            name, position = self._line(position)
            return (module.decode("utf-8"), name.decode("utf-8")), position
        size = _FIXED[code]
        end = position + size
        value = int.from_bytes(self.data[position:end], "little", signed=code == 0x84)
        if code == 0x80 and value not in _PROTOCOLS:
            raise ValueError("unsupported pickle protocol")
        if code == 0x95 and value > self._real - end + self._remaining:
            raise ValueError("a frame ends beyond the file's end")
        return value, end

    def _counted(self, code: int, position: int) -> tuple[Any, int]:
        """Decode an argument whose length comes first."""
        size, signed, decode = _COUNTED[code]
        length = int.from_bytes(self.data[position : position + size], "little", signed=signed)
        position += size
        if length < 0:
            raise ValueError("a negative length")
        if position + length > self.safe:
            position = self.more(position, length)
        end = position + length
        return decode(memoryview(self.data)[position:end]), end

    def _line(self, position: int) -> tuple[bytes, int]:
        searched = 0
        while (end := self.data.find(b"\n", position + searched, self._real)) < 0:
            searched = self._real - position
            if not self._remaining:
                raise ValueError("a line without an end")
            position = self.more(position, searched + 1)
        return self.data[position:end], end + 1


def _text_argument(code: int, line: bytes) -> Any:
    """Decode an argument that is a line of text."""
    if code == 0x49:  # INT
        if line in (b"00", b"01"):
            return line == b"01"
        value = _integer(line)
        return bool(value) if len(line) == 2 and value in (0, 1) and line[1:].isdigit() else value
    if code == 0x4C:  # LONG
        return _integer(line.removesuffix(b"L"))
    if code in (0x67, 0x70):  # GET, PUT
        return _integer(line, 10)
    if code == 0x46:  # FLOAT
        return float(line[:_MAX_NUMBER_LINE])
    if code == 0x53:  # STRING
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ValueError("a string without its quotes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that no string has any more
            return _python2_text(codecs.escape_decode(line[1:-1])[0])
    if code == 0x56:  # UNICODE
        return line.decode("raw-unicode-escape")
    return line.decode("ascii")  # PERSID


def _integer(line: bytes, base: int = 0) -> int:
    # hexadecimal digits are quick, whatever their number; others take the square of it
    if len(line) > (_MAX_NUMBER_LINE if line[:2] in (b"0x", b"0X") else _MAX_DIGITS + 1):
        raise ValueError("a number with too many digits")
    return int(line, base)


def _python2_text(raw: bytes | memoryview) -> str:
    """Decode as torch does; bytes that are no text, such as an array's, become one character each."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        return str(raw, "latin-1")


def _text(raw: memoryview) -> str:
    return str(raw, "utf-8", "surrogatepass")


def _number(raw: memoryview) -> int:
    return int.from_bytes(raw, "little", signed=True)


#: by opcode: bytes of the length, whether that is signed, what the rest is
_COUNTED: dict[int, tuple[int, bool, Any]] = {
    0x8A: (1, False, _number),  # LONG1
    0x8B: (4, True, _number),  # LONG4
    0x54: (4, True, _python2_text),  # BINSTRING
    0x55: (1, False, _python2_text),  # SHORT_BINSTRING
    0x42: (4, False, bytes),  # BINBYTES
    0x43: (1, False, bytes),  # SHORT_BINBYTES
    0x8E: (8, False, bytes),  # BINBYTES8
    0x96: (8, False, bytearray),  # BYTEARRAY8
    0x58: (4, False, _text),  # BINUNICODE
    0x8C: (1, False, _text),  # SHORT_BINUNICODE
    0x8D: (8, False, _text),  # BINUNICODE8
}
#: INT, LONG, STRING, UNICODE, FLOAT, PERSID, GET, PUT
_LINES = frozenset((0x49, 0x4C, 0x53, 0x56, 0x46, 0x50, 0x67, 0x70))
#: EXT1, EXT2, EXT4, PROTO, FRAME
_FIXED = {0x82: 1, 0x83: 2, 0x84: 4, 0x80: 1, 0x95: 8}
