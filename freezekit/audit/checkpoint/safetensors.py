"""Reads safetensors files: eight bytes of header length, a JSON header, the values without gap or overlap."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, BinaryIO, NoReturn

from freezekit.audit.checkpoint.choosing import choose_network, others_note
from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.roots import find_texts, model_names, too_many_keys
from freezekit.audit.checkpoint.tensors import (
    MAX_NUMEL,
    MAX_RANK,
    StoredBytes,
    ValueReader,
    check_amount,
    check_shape,
    unreadable,
)
from freezekit.audit.state import DTYPE_SIZES, StateTable, TensorState, role_of
from freezekit.errors import CheckpointError

__all__ = ["MAX_HEADER_BYTES", "read_safetensors"]

#: less than the format allows: of one of its 100 MB, Python would make gigabytes
MAX_HEADER_BYTES = 16 * 2**20
#: commas and opening brackets; a tensor takes about ten
_MAX_HEADER_ITEMS = 1_500_000
#: a tensor takes four, and a name with its value 200 bytes of memory
_MAX_PAIRS = 500_000

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64", "C128": "complex128",
}  # fmt: skip
_AGAIN = "download or copy the file again"


def read_safetensors(
    file: SourceFile, stream: BinaryIO, root: str | None = None, limits: Limits = Limits.DEFAULT
) -> StateTable:
    """Read a safetensors file.

    Args:
        file: the file.
        stream: the same, open at its start.
        root: which of several networks in it to read.
        limits: caps on what it may hold.

    Raises:
        CheckpointError: it is damaged or hostile.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER_BYTES or 8 + length > file.size:
        got = f"{length} bytes of at most {MAX_HEADER_BYTES}, in a file of {file.size}"
        raise CheckpointError(
            "truncated or hostile: its header is longer than it can be", got=got, remedy=_AGAIN
        )
    raw = stream.read(length)
    items = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if items > _MAX_HEADER_ITEMS:
        got = f"{items} commas and brackets, more than {_MAX_HEADER_ITEMS}"
        raise CheckpointError("its header holds more than any checkpoint's", got=got, remedy=_AGAIN)
    if (pairs := raw.count(b":")) > _MAX_PAIRS:
        got = f"{pairs} colons, more than {_MAX_PAIRS}"
        raise CheckpointError("its header holds more than any checkpoint's", got=got, remedy=_AGAIN)
    header = _parse(raw)
    metadata = header.pop("__metadata__", None)
    if len(header) > limits.keys:
        raise too_many_keys(len(header), limits)
    if not header:
        raise CheckpointError(
            "holds no tensors", got="an empty safetensors file", remedy="save model.state_dict()"
        )
    start = 8 + length
    entries = {name: _Entry.of(name, entry) for name, entry in header.items()}
    _check_places(entries, file.size - start)
    read, path, roots = choose_network({name: entry.shape for name, entry in entries.items()}, root)
    names, notes = model_names(read.values())
    manifest, report, said = find_texts(metadata)
    tensors = [entries[own].tensor(name, file, start) for own, name in zip(read, names, strict=True)]
    check_amount(tensors, file)
    notes = [*others_note(roots, path), *notes, *said]
    return StateTable(tensors, file.source, tuple(notes), manifest, report, path, roots)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor's entry in the header, checked."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def of(cls, name: str, entry: object) -> _Entry:
        """Check an entry's form."""
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            _refuse(name, "has a dtype, a shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            _refuse(name, "has a dtype that is text")
        if not _counts(shape) or len(shape) > MAX_RANK:
            _refuse(name, f"has a shape of at most {MAX_RANK} sizes from 0 to {MAX_NUMEL}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            _refuse(name, "has two data_offsets in order")
        numel = check_shape(name, tuple(shape))
        known = _DTYPES.get(dtype)
        if known is not None and offsets[1] - offsets[0] != numel * DTYPE_SIZES[known]:
            got = f"{offsets[1] - offsets[0]} bytes for {numel} elements of {known}"
            _refuse(name, "has as many bytes as its shape and dtype take", got)
        return cls(dtype, tuple(shape), offsets[0], offsets[1])

    def tensor(self, name: str, file: SourceFile, start: int) -> TensorState:
        """Make it readable, its values counted from ``start``."""
        known = _DTYPES.get(self.dtype)
        if known is None:
            dtype = printable(self.dtype)
            return unreadable(name, role_of(name, dtype.lower()), dtype, self.shape, f"dtype {dtype}", file)
        stored = StoredBytes(file, name, start + self.begin, self.end - self.begin)
        # from the last on, since ranks of 64 would take the square of it
        stride = tuple(accumulate(self.shape[:0:-1], mul, initial=1))[::-1] if self.shape else ()
        read = ValueReader(name, stored, 0, stored.nbytes, DTYPE_SIZES[known], self.shape, stride, known)
        return TensorState(name, role_of(name, known), known, self.shape, read)


def _parse(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise CheckpointError("hostile: a key is in its header twice", remedy=_AGAIN)
        return made

    def no_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        what = "damaged: its header is not JSON"
        raise CheckpointError(what, got=printable(str(error)), remedy=_AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError("damaged: its header is not a JSON object", remedy=_AGAIN)
    return header


def _check_places(entries: dict[str, _Entry], available: int) -> None:
    """Check that the tensors fill the rest of the file without gap or overlap, as the format demands."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > available:
            _refuse(
                name, f"ends within the file's {available} bytes of values", f"byte {entry.end}", "truncated"
            )
        if entry.begin != position:
            fault = "overlap" if entry.begin < position else "leave a gap"
            _refuse(
                name,
                f"starts where the one before ends; here they {fault}",
                f"{entry.begin} after {position}",
            )
        position = entry.end
    if position != available:
        got = f"{available - position} bytes more"
        raise CheckpointError("damaged or hostile: something follows the last tensor", got=got, remedy=_AGAIN)


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= 2**62 for value in values)


def _refuse(name: str, rule: str, got: str | None = None, fault: str = "damaged") -> NoReturn:
    what = f"{fault} or hostile: tensor {printable(name)} must be such that it {rule}"
    raise CheckpointError(what, got=got, remedy=_AGAIN)
