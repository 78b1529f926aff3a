"""Files of freezekit's own: written whole or not at all, and JSON read as if by an enemy. No torch here."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from freezekit.errors import CheckpointError, FreezekitError

__all__ = ["Reader", "whole", "write"]

_MAX_ITEMS = 1_500_000
#: colons; a name and its value take 200 bytes, where the other items take 64
_MAX_PAIRS = 600_000


def write(path: str | os.PathLike[str], text: str, thing: str) -> None:
    """Write a file: whole, or what was there stays as it is.

    Args:
        path: the file; one that is there already is replaced, where a link leads.
        text: what is in it, written as UTF-8.
        thing: what it is, for the message.

    Raises:
        FreezekitError: it cannot be written.
    """
    with whole(path, thing) as partial, open(partial, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole(path: str | os.PathLike[str], thing: str) -> Iterator[str]:
    """Give the name of a temporary file, which gets its own name when the block ends and not before.

    If the block raises, or the renaming does, the temporary file is removed.

    Args:
        path: the file; one that is there already is replaced, where a link leads.
        thing: what it is, for the message.

    Raises:
        FreezekitError: it cannot be written.
    """
    target = os.path.realpath(path)
    # beside it, since a file can be renamed within its own file system only
    folder, name = os.path.split(target)
    partial = os.path.join(folder, f".{name[:100]}.{os.urandom(4).hex()}")
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(errno.EINVAL, "not a regular file")  # root could put a file in a device's place
        try:
            yield partial
            os.replace(partial, target)
        except BaseException:
            if os.path.exists(partial):
                os.unlink(partial)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "give the path of a file in a folder that exists and can be written to"
        raise FreezekitError(
            f"cannot write the {thing}",
            where=os.fspath(path),
            got=error.strerror or type(error).__name__,
            remedy="make room there, or write it elsewhere" if full else remedy,
        ) from error


@dataclass(frozen=True)
class Reader:
    """Reads one kind of JSON and refuses, in words, whatever is not as it must be.

    Args:
        thing: what is read: ``"manifest"``.
        again: what to do about one that is damaged.
        max_bytes: how long it may be.
        max_text: how long a text in it may be.
        max_digits: how long a whole number in it may be.
        fractions: whether numbers may have a fraction.
    """

    thing: str
    again: str
    max_bytes: int
    max_text: int
    max_digits: int = 20
    fractions: bool = False

    def decode(self, raw: bytes) -> str:
        """Return the text of a file."""
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            what = f"not a {self.thing}, or a damaged one: it is not UTF-8 text"
            raise CheckpointError(what, got=f"byte {error.start}", remedy="copy the file again") from error

    def too_long(self, length: int) -> CheckpointError:
        """Return the refusal of a file of so many bytes."""
        got = f"{length} bytes, more than a file of its kind has"
        return CheckpointError(f"too long for a {self.thing}", got=got, remedy="check the path")

    def parse(self, text: str) -> object:
        """Decode JSON from who knows where: no key twice, no number out of bounds, NaN or infinite."""
        if not isinstance(text, str):
            self.refuse("it is text", text)
        # text that is not ASCII may take four bytes a character
        if len(text) > (self.max_bytes if text.isascii() else self.max_bytes // 4):
            raise self.too_long(len(text))
        items = sum(text.count(mark) for mark in ",[{")
        if items > _MAX_ITEMS:  # of 32 MB of brackets, Python would make a gigabyte
            got = f"{items} commas and brackets, more than {_MAX_ITEMS}"
            raise CheckpointError(f"too long for a {self.thing}", got=got, remedy="check the path")
        if (pairs := text.count(":")) > _MAX_PAIRS:
            got = f"{pairs} colons, more than {_MAX_PAIRS}"
            raise CheckpointError(f"too long for a {self.thing}", got=got, remedy="check the path")
        try:
            return json.loads(
                text,
                object_pairs_hook=self._unique,
                parse_int=self._whole,
                parse_float=self._fraction,
                parse_constant=self._fraction,
            )
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"not a {self.thing}, or a damaged one: it is not JSON",
                got=ascii(str(error))[1:-1][:120],
                remedy=f"save the {self.thing} again, or copy the file again",
            ) from error

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            self.refuse("no key is in it twice", None)
        return made

    def _whole(self, digits: str) -> int:
        if len(digits) > self.max_digits:  # a million digits would take minutes
            self.refuse("its numbers are sizes", None)
        return int(digits)

    def _fraction(self, number: str) -> float:
        if not self.fractions:
            self.refuse("its numbers are whole", None)
        value = float(number) if len(number) <= self.max_digits else math.inf
        if not math.isfinite(value):
            self.refuse("its numbers are finite", number[:40])
        return value

    def keys(self, found: dict[str, Any], required: set[str], optional: set[str], where: str) -> None:
        """Refuse an object that lacks a key, or has one more."""
        for key in sorted(required - found.keys()):
            self.refuse(f"{where} has '{key}'", None)
        for key in found.keys() - required - optional:
            self.refuse(f"{where} has nothing that is not known", ascii(key)[:80])

    def mapping(self, value: object, where: str) -> dict[str, Any]:
        """Return what must be an object."""
        return value if isinstance(value, dict) else self.refuse(f"{where} is an object", value)

    def entries(self, value: object, where: str) -> list[Any]:
        """Return what must be a list."""
        return value if isinstance(value, list) else self.refuse(f"{where} is a list", value)

    def text(self, value: object, where: str) -> str:
        """Return what must be text."""
        if not isinstance(value, str) or len(value) > self.max_text:
            self.refuse(f"{where} is text of at most {self.max_text} characters", value)
        return value

    def optional_text(self, value: object, where: str) -> str | None:
        """Return what must be text or null."""
        return None if value is None else self.text(value, where)

    def truth(self, value: object, where: str) -> bool:
        """Return what must be true or false."""
        return value if isinstance(value, bool) else self.refuse(f"{where} is true or false", value)

    def refuse(self, rule: str, got: object) -> NoReturn:
        """Raise the error for what breaks a rule.

        Args:
            rule: what must be so.
            got: what was there: text is shown, of anything else its type, of ``None`` nothing.

        Raises:
            CheckpointError: always.
        """
        shown = None if got is None else got if isinstance(got, str) else f"a {type(got).__name__}"
        raise CheckpointError(
            f"a damaged or hostile {self.thing}: it must be such that {rule}",
            got=shown if shown is None else ascii(shown)[1:-1][:120],
            remedy=self.again,
        )
