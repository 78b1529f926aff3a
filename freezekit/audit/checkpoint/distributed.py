"""Reads the folders of ``torch.distributed.checkpoint``: a ``.metadata`` and the ranks' ``.distcp`` files.

The first is a pickle, which torch's own reader runs and this one only follows. It tells of each tensor its
chunks, and of each chunk its file, offset and length: there lies what ``torch.save`` wrote of the chunk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, TypeGuard

import numpy as np

from freezekit.audit.checkpoint.archive import Archive
from freezekit.audit.checkpoint.container import SourceFile, beside, guarded, printable, sniff
from freezekit.audit.checkpoint.folders import natural
from freezekit.audit.checkpoint.inert import GlobalRef, Key, Opaque, StorageRef, TensorRef, describe
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.pickle_machine import LimitedReader, Unpickled, unpickle
from freezekit.audit.checkpoint.roots import too_many_keys
from freezekit.audit.checkpoint.table import make_table
from freezekit.audit.checkpoint.tensors import MAX_NUMEL, MAX_RANK, StoredBytes, check_shape, make_tensor
from freezekit.audit.checkpoint.torch_zip import open_pickle
from freezekit.audit.findings import REPORT_KEY
from freezekit.audit.state import DTYPE_SIZES, StateTable, TensorState
from freezekit.errors import CheckpointError
from freezekit.manifest import KEY

__all__ = ["read_distributed"]

#: of the entries that are no tensors, what is worth reading: how far training was, and freezekit's own texts
_TOLD = {"step", "epoch", "global_step", "current_epoch", "iteration", "iter", "params"}
_TOLD |= {KEY, REPORT_KEY, "manifest"}  # the last as the loop's hook has it
#: bytes of all of them together, and how many there may be
_MAX_TOLD_BYTES, _MAX_TOLD = 32 * 2**20, 2_000
_MAX_NESTING = 20
#: axes along which one tensor may be cut; meshes have up to four
_MAX_CUT = 6
_AGAIN = "copy the folder again, or take the checkpoint before it"
#: nanoseconds by which the clocks of those who write to a folder may differ
_CLOCKS_APART = 10 * 10**9


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an item lies."""

    file: SourceFile
    offset: int
    length: int

    def value(self, tensor: str = "") -> Unpickled | TensorState:
        """Return what the item's pickle describes: a tensor readable, under the name that is given."""
        with guarded(self.file.shown), self.file.open() as stream:
            pickled, find, _ = open_pickle(Archive(self.file, stream, self.offset, self.length))
            made = pickled.root
            return (
                make_tensor(tensor, made, find, self.file, None) if isinstance(made, TensorRef) else pickled
            )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor, and where its values are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: _Place


@dataclass(slots=True)
class _Assembled(StoredBytes):
    """A tensor's bytes, put together from its chunks when they are read."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    chunks: tuple[_Chunk, ...] = ()

    def read(self, start: int, length: int, tensor: str) -> bytes:
        """Read them; the whole is always asked for, since the tensor is contiguous."""
        if len(self.chunks) == 1:
            return self._chunk(self.chunks[0], tensor)
        whole = np.empty(self.shape, f"V{DTYPE_SIZES[self.dtype]}")
        for chunk in self.chunks:
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = np.frombuffer(self._chunk(chunk, tensor), whole.dtype).reshape(chunk.sizes)
        return whole.tobytes()

    def pieces(self, start: int, length: int, tensor: str, size: int) -> Iterator[bytes]:
        """As :meth:`read`, cut into pieces: its bytes lie in no file as one."""
        whole = self.read(start, length, tensor)
        yield from (whole[place : place + size] for place in range(0, length, size))

    def _chunk(self, chunk: _Chunk, tensor: str) -> bytes:
        made = chunk.place.value(tensor)
        if not isinstance(made, TensorState) or (made.dtype, made.shape) != (self.dtype, chunk.sizes):
            got = f"{made.dtype} {list(made.shape)}" if isinstance(made, TensorState) else describe(made.root)
            raise CheckpointError(
                f"damaged or hostile: a chunk of {printable(tensor)} is not what .metadata says",
                where=chunk.place.file.shown,
                got=f"{got} instead of {self.dtype} {list(chunk.sizes)}",
                remedy=_AGAIN,
            )
        return made.read()


def read_distributed(
    path: str, names: tuple[str, ...], root: str | None = None, limits: Limits = Limits.DEFAULT
) -> StateTable:
    """Read the folder of a distributed checkpoint.

    Args:
        path: the folder.
        names: its ``.metadata`` file, or those of the ranks where each wrote its own.
        root: which of the states in it to read.
        limits: caps on what its metadata may cost.

    Raises:
        CheckpointError: it is half-written, damaged or hostile.
    """
    if not names:
        raise CheckpointError(
            "a half-written torch.distributed.checkpoint folder",
            got="no .metadata, which is written last",
            remedy=_AGAIN,
        )
    content = _Content(path, limits)
    for name in names:
        with guarded(printable(os.path.join(path, name), 1000)):
            content.add(name)
    content.check_items()
    nested = _Nested()
    for fqn, value in content.values():
        _put(nested, content.paths.get(fqn, (fqn,)), value)
    pickled = Unpickled(_with_lists(nested), tuple(content.foreign), {})
    whole = SourceFile(content.file.path, path, content.file.identity)
    several = f"{len(names)} ranks wrote metadata of their own; of what several hold, the first one's is read"
    notes = [several] if len(names) > 1 else content.late()
    return make_table(
        whole, pickled, lambda storage: content.assembled[storage.key], lambda: notes, root, limits
    )


class _Content:
    """What the metadata say, checked."""

    def __init__(self, path: str, limits: Limits) -> None:
        self.folder = path
        self.limits = limits
        self.assembled: dict[str, _Assembled] = {}
        self.paths: dict[str, tuple[str | int, ...]] = {}
        self.foreign: dict[str, None] = {}
        self._tensors: dict[str, tuple[str, tuple[int, ...], dict[tuple[int, ...], _Chunk]]] = {}
        self._others: dict[str, _Place | None] = {}
        self._files: dict[str, SourceFile] = {}
        self._told_bytes, self._told = 0, 0

    def add(self, name: str) -> None:
        """Take in one metadata file."""
        self.file = SourceFile.at(os.path.join(self.folder, name))
        if self.file.size > self.limits.pickle_bytes:
            got = f"{self.file.size} bytes, more than {self.limits.pickle_bytes}"
            raise Limits.hit("its metadata is too long", got)
        with self.file.open() as stream:
            pickled = unpickle(LimitedReader(stream, self.file.size), plain=True, limits=self.limits)
        self.foreign.update(dict.fromkeys(pickled.foreign))
        fields = _fields(pickled.root, "Metadata")
        entries, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(stored, dict):
            raise _damaged("it has no entries, or no places of them")
        if len(self._tensors) + len(entries) > self.limits.keys:
            raise too_many_keys(len(self._tensors) + len(entries), self.limits)
        places = dict(self._place(index, info) for index, info in stored.items())
        for fqn, entry in entries.items():
            if not isinstance(fqn, str):
                raise _damaged("a key is no text")
            if _made_by(entry) == "TensorStorageMetadata":
                self._add_tensor(fqn, _fields(entry, "TensorStorageMetadata"), places)
            else:
                self._others[fqn] = places.get((fqn, None))
        paths = fields.get("planner_data")
        for fqn, keys in paths.items() if isinstance(paths, dict) else ():
            fits = isinstance(keys, tuple) and 0 < len(keys) <= _MAX_NESTING
            if fits and all(isinstance(key, str) or _is_size(key) for key in keys):
                self.paths[fqn] = keys

    def check_items(self) -> None:
        """Check that no item lies in another, so that no more is read than there is."""
        chunks = (chunk.place for _, _, boxes in self._tensors.values() for chunk in boxes.values())
        places = [*chunks, *(place for place in self._others.values() if place is not None)]
        end: dict[str, int] = {}
        for place in sorted(places, key=lambda place: place.offset):
            if place.length and place.offset < end.get(place.file.path, 0):
                with guarded(place.file.shown), place.file.open() as stream:
                    if sniff(place.file, stream) == "safetensors":
                        what = "not supported: a .distcp file that is written as safetensors"
                        raise CheckpointError(what, remedy="save it without a serialization_format")
                    raise CheckpointError("damaged or hostile: items overlap", got=f"at {place.offset}")
            end[place.file.path] = place.offset + place.length

    def late(self) -> list[str]:
        """Say what was written after the metadata, which torch writes last: it may be of another save."""
        written = self.file.identity[3] + _CLOCKS_APART
        late = sorted((f.shown for f in self._files.values() if f.identity[3] > written), key=natural)
        more = f" and {len(late) - 1} more are" if len(late) > 1 else " is"
        said = (
            "newer than .metadata, which is written last: the folder was copied so, or a save over it was"
            " cut off and it is a mixture of two; save into a new folder each time"
        )
        return [f"{os.path.basename(late[0])}{more} {said}"] if late else []

    def values(self) -> Iterator[tuple[str, Any]]:
        """Go through the entries: tensors as descriptions, the others as far as they are worth reading."""
        for fqn, (dtype, size, boxes) in self._tensors.items():
            itemsize = DTYPE_SIZES.get(dtype)
            with guarded(self.file.shown):
                chunks = _check_cover(fqn, size, boxes.values())
            for chunk in chunks if itemsize else ():
                if prod(chunk.sizes) * (itemsize or 0) > chunk.place.length:
                    raise CheckpointError(
                        f"damaged or hostile: a chunk of {printable(fqn)} is bigger than its place",
                        where=chunk.place.file.shown,
                        got=f"{list(chunk.sizes)} in {chunk.place.length} bytes",
                        remedy=_AGAIN,
                    )
            numel = prod(size)
            nbytes = numel * (itemsize or 0)
            # where it starts tells it from all others, as no two items overlap
            file, start = (chunks[0].place.file, chunks[0].place.offset) if chunks else (self.file, 0)
            self.assembled[fqn] = _Assembled(
                file, fqn, start, nbytes, shape=size, dtype=dtype, chunks=tuple(chunks)
            )
            stride = tuple(prod(size[axis + 1 :]) for axis in range(len(size)))
            yield fqn, TensorRef(StorageRef(fqn, dtype, numel, "cpu"), 0, size, stride, dtype)
        for fqn, place in self._others.items():
            yield fqn, self._plain(fqn, place)

    def _place(self, index: object, info: object) -> tuple[tuple[str, tuple[int, ...] | None], _Place]:
        """Return an item's name with the place that it has."""
        key = _fields(index.value if isinstance(index, Key) else index, "MetadataIndex")
        fqn, at = key.get("fqn"), key.get("offset")
        where = _fields(info, "_StorageInfo")
        name, offset, length = (where.get(part) for part in ("relative_path", "offset", "length"))
        if not isinstance(fqn, str) or not isinstance(name, str):
            raise _damaged("an item or its file has no name")
        if transforms := where.get("transform_descriptors"):
            got = printable(str(transforms[0])) if isinstance(transforms, list | tuple) else None
            what = "not supported: a torch.distributed.checkpoint folder written through an extension"
            raise CheckpointError(what, got=got, remedy="load it with that extension, and save it without")
        if name not in self._files:
            path = beside(self.file.source, name)
            if not os.path.exists(path):
                what = "half-written: a file that it names is missing"
                raise CheckpointError(what, got=f"no {printable(name)}", remedy=_AGAIN)
            with guarded(printable(path, 1000)):
                self._files[name] = SourceFile.at(path)
        file = self._files[name]
        if not (_is_size(offset) and _is_size(length) and offset + length <= file.size):
            raise CheckpointError(
                f"truncated or hostile: the place of {printable(fqn)} lies beyond the file's end",
                where=file.shown,
                got=f"{_shown(length)} bytes at {_shown(offset)} of {file.size}",
                remedy=_AGAIN,
            )
        return (fqn, None if at is None else _sizes(fqn, at)), _Place(file, offset, length)

    def _add_tensor(
        self, fqn: str, entry: dict[Any, Any], places: dict[tuple[str, tuple[int, ...] | None], _Place]
    ) -> None:
        """Take in a tensor, with the chunks that are not known yet."""
        properties, chunks = entry.get("properties"), entry.get("chunks")
        state = properties.state if isinstance(properties, Opaque) else None
        if not isinstance(state, tuple) or not isinstance(chunks, list):
            raise _damaged(f"{printable(fqn)} has no dtype, or no chunks")
        size = _sizes(fqn, entry.get("size"))
        check_shape(fqn, size)
        dtype = state[0].name if state and isinstance(state[0], GlobalRef) else "unknown"
        known = self._tensors.setdefault(fqn, (dtype, size, {}))
        if known[:2] != (dtype, size):
            raise _damaged(f"{printable(fqn)} is not the same for all ranks")
        for item in chunks:
            fields = _fields(item, "ChunkStorageMetadata")
            offsets, sizes = _sizes(fqn, fields.get("offsets")), _sizes(fqn, fields.get("sizes"))
            if not all(sizes):  # what is left for the last ranks where there are too few rows
                continue
            place = places.get((fqn, offsets))
            if place is None:
                raise _damaged(f"the chunk of {printable(fqn)} at {list(offsets)} has no place")
            chunk = known[2].setdefault(offsets, _Chunk(offsets, sizes, place))
            if chunk.sizes != sizes:
                raise _damaged(f"{printable(fqn)} has two chunks at {list(offsets)}")

    def _plain(self, fqn: str, place: _Place | None) -> Any:
        """Return what an entry that is no tensor holds, or something opaque in its place."""
        if place is None or self.paths.get(fqn, (fqn,))[-1] not in _TOLD:
            return Opaque(None)
        self._told_bytes += place.length
        self._told += 1
        if self._told_bytes > _MAX_TOLD_BYTES or self._told > _MAX_TOLD:
            return Opaque(None)
        made = place.value()
        if isinstance(made, TensorState) or made.storages:  # its tensors would lie in another archive
            return Opaque(None)
        self.foreign.update(dict.fromkeys(made.foreign))
        return made.root


def _check_cover(fqn: str, size: tuple[int, ...], boxes: Iterable[_Chunk]) -> list[_Chunk]:
    """Check that the chunks fill the tensor without gap or overlap, and return them.

    They do if each lies in it, their volumes add up to its own, and of their corners all but its own come
    in even numbers: then each element is in an odd number of chunks, so in one at least, so in one.
    """
    chunks = list(boxes)
    for chunk in chunks:
        within = len(size) == len(chunk.offsets) == len(chunk.sizes) and all(
            at + length <= full for at, length, full in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        if not within:
            got = f"{list(chunk.sizes)} at {list(chunk.offsets)} of {list(size)}"
            raise _damaged(f"a chunk of {printable(fqn)} lies outside of it", got)
    fits = sum(prod(chunk.sizes) for chunk in chunks) == prod(size)
    if fits and len(chunks) > 1:
        cut = [axis for axis, full in enumerate(size) if any(chunk.sizes[axis] != full for chunk in chunks)]
        if len(cut) > _MAX_CUT:
            got = f"{len(cut)}, more than {_MAX_CUT}"
            raise _damaged(f"{printable(fqn)} is cut along too many axes", got)
        corners: set[tuple[int, ...]] = set()
        for chunk in chunks:
            spans = [(chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]) for axis in cut]
            corners ^= set(product(*spans))
        fits = corners == set(product(*((0, size[axis]) for axis in cut)))
    if not fits:
        got = f"{len(chunks)} chunks of {list(size)}"
        raise _damaged(f"the chunks of {printable(fqn)} leave a gap or overlap", got)
    return chunks


class _Nested(dict[Any, Any]):
    """A dict on the way to entries, and no entry itself."""


def _put(nested: _Nested, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        nested = nested.setdefault(key, _Nested())
        if not isinstance(nested, _Nested):
            raise _damaged(f"{printable(str(key))} is both an entry and what holds others")
    if path[-1] in nested:
        raise _damaged(f"two entries are called {printable(str(path[-1]))}")
    nested[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Make lists of the dicts whose keys are the numbers from 0 up; no deeper than paths are long."""
    if not isinstance(value, _Nested):
        return value
    made = {key: _with_lists(item) for key, item in value.items()}
    return [made[index] for index in range(len(made))] if made.keys() == set(range(len(made))) else made


def _fields(value: object, kind: str) -> dict[Any, Any]:
    if isinstance(value, Opaque) and _made_by(value) == kind and isinstance(value.state, dict):
        return value.state
    raise _damaged(f"it has no {kind} where there must be one")


def _made_by(value: object) -> str | None:
    return value.made_by.name if isinstance(value, Opaque) and value.made_by is not None else None


def _sizes(fqn: str, value: object) -> tuple[int, ...]:
    if isinstance(value, tuple | list) and len(value) <= MAX_RANK and all(map(_is_size, value)):
        return tuple(value)
    raise _damaged(f"a size or offset of {printable(fqn)} is out of range")


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_NUMEL * 16


def _shown(value: object) -> str:
    return str(value) if type(value) is int and abs(value) < 2**64 else "a number out of range"


def _damaged(what: str, got: str | None = None) -> CheckpointError:
    return CheckpointError(f"damaged or hostile metadata: {what}", got=got, remedy=_AGAIN)
