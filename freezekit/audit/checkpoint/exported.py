"""Reads what ``torch.export.save`` and AOTInductor write: ``.pt2`` archives.

Until torch 2.7 the state is a torch zip file, ``serialized_state_dict.pt``, in a zip archive; in torch 2.8 it
is ``data/weights/<model>.pt``. Since then each storage is a member of its own, as raw bytes, and
``data/weights/<model>_weights_config.json`` tells which part of it a tensor is. An AOTInductor package is
compiled code; only where that was asked for are there such a table and storages, each a torch zip file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from freezekit.audit.checkpoint.archive import Archive
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import StorageRef, TensorRef, describe
from freezekit.audit.checkpoint.pickle_machine import Unpickled
from freezekit.audit.checkpoint.rebuild import STORAGE_SIZES
from freezekit.audit.checkpoint.table import flat_table, make_table
from freezekit.audit.checkpoint.tensors import StoredBytes, make_tensor
from freezekit.audit.state import Role, StateTable, TensorState, role_of
from freezekit.errors import CheckpointError
from freezekit.jsonfile import Reader

__all__ = ["is_exported", "read_exported"]

_WEIGHTS = "data/weights/"
_AOTI = "data/aotinductor/"
#: torch's numbers for dtypes; the rest has no values that can be read
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
_STRIDED = 7
_READ = Reader(
    "list of weights in a .pt2 archive",
    "save the program again with torch.export.save, or copy the file again",
    max_bytes=5 * 2**20,  # JSON takes up to forty times its length in memory
    max_text=1000,
)

Find = Callable[[StorageRef], StoredBytes]
Open = Callable[[Archive], tuple[Unpickled, Find, Callable[[], list[str]]]]


def is_exported(archive: Archive) -> bool:
    """Tell whether the archive is a ``.pt2``."""
    return any(
        name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json")
        for name in archive.members
        if name.count("/") <= 1
    )


def read_exported(archive: Archive, open_pickle: Open, root: str | None = None) -> StateTable:
    """Return the state of an exported program, as ``torch.export.load(FILE).state_dict`` has it.

    Args:
        archive: the zip.
        open_pickle: follows the pickle in a torch zip file.
        root: which of several networks in it to read.

    Raises:
        CheckpointError: it is damaged or hostile, or has no state.
    """
    names = archive.members
    for name in ("serialized_state_dict.pt", "serialized_state_dict.json"):
        if name in names:
            return _whole(archive, name, open_pickle, root)
    folder = next(
        (name.removesuffix("archive_format") for name in names if name.endswith("archive_format")), ""
    )
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder", 100) != b"little":
        # torch would read its bytes in the wrong order
        what = "not supported: a .pt2 archive from a big-endian machine"
        raise CheckpointError(what, remedy="save the state_dict() there with torch.save")
    models = [
        name.removeprefix(f"{folder}models/").removesuffix(".json")
        for name in names
        if name.startswith(f"{folder}models/") and name.endswith(".json")
    ]
    if models:
        # as torch.export.load does
        model = "model" if "model" in models else models[0]
        others = [printable(other, 40) for other in models if other != model]
        notes = (f"also holds: {', '.join(others[:5])}; read '{printable(model, 40)}'",) if others else ()
        if (name := f"{folder}{_WEIGHTS}{model}.pt") in names:
            table = _whole(archive, name, open_pickle, root)
            table.notes += notes
            return table
        if (name := f"{folder}{_WEIGHTS}{model}_weights_config.json") in names:
            return _listed(archive, f"{folder}{_WEIGHTS}", name, open_pickle, notes, root)
        raise CheckpointError("damaged: a .pt2 archive whose weights are missing", got=printable(name))
    config = next(
        (n for n in names if n.startswith(f"{folder}{_AOTI}") and n.endswith("/weights_config.json")), None
    )
    if config is not None:
        return _compiled(archive, f"{folder}{_WEIGHTS}", config, open_pickle, root)
    what = "a .pt2 archive without an exported program"
    if any(name.startswith(f"{folder}{_AOTI}") for name in names):
        what = "a .pt2 archive of AOTInductor: its weights are inside the compiled code"
    raise CheckpointError(
        f"not supported: {what}",
        remedy="give the checkpoint or the torch.export.save file that it was made from",
    )


def _whole(archive: Archive, name: str, open_pickle: Open, root: str | None) -> StateTable:
    """Read the whole state from a torch zip file."""
    stored = archive.locate(name, name)
    if stored.nbytes == 0:
        raise _empty()
    inner = _inner(archive, stored)
    pickled, find, late_notes = open_pickle(inner)
    if pickled.root == {}:
        raise _empty()
    return make_table(archive.file, pickled, find, late_notes, root, archive.limits)


def _inner(archive: Archive, stored: StoredBytes) -> Archive:
    return Archive(archive.file, archive.stream, stored.offset, stored.nbytes, archive.limits)


def _listed(
    archive: Archive, folder: str, config: str, open_pickle: Open, notes: tuple[str, ...], root: str | None
) -> StateTable:
    """Read the state from a list of tensors and the storages that it names."""
    entries = _READ.mapping(_parsed(archive, config).get("config"), "config")
    if not entries:
        raise _empty()
    files = _Storages(archive, folder)
    tensors = [
        _tensor(name, _READ.mapping(entry, printable(name)), files, open_pickle)
        for name, entry in entries.items()
    ]
    return flat_table(archive.file, tensors, root, notes)


class _Storages:
    """The members that hold the tensors' bytes."""

    def __init__(self, archive: Archive, folder: str) -> None:
        self.archive = archive
        self._folder = folder
        self._found: dict[str, StoredBytes] = {}
        self._dtypes: dict[str, str] = {}

    def find(self, name: str) -> StoredBytes:
        """Return where the bytes are."""
        if name not in self._found:
            self._found[name] = self.archive.locate(self._folder + name, name)
        return self._found[name]

    def disagrees(self, name: str, dtype: str) -> bool:
        """Tell whether another tensor takes the same bytes for another dtype, which torch reads wrongly."""
        return self._dtypes.setdefault(name, dtype) != dtype


def _tensor(name: str, entry: dict[str, Any], files: _Storages, open_pickle: Open) -> TensorState:
    shown = printable(name)
    path = _READ.text(entry.get("path_name"), f"path_name of {shown}")
    is_parameter = _READ.truth(entry.get("is_param"), f"is_param of {shown}")
    if _READ.truth(entry.get("use_pickle"), f"use_pickle of {shown}"):
        return _pickled(name, files.find(path), files.archive, open_pickle, is_parameter)
    meta = _READ.mapping(entry.get("tensor_meta"), f"tensor_meta of {shown}")
    number = meta.get("dtype")
    dtype = _DTYPES.get(number, f"number {number}") if type(number) is int else "unknown"
    sizes, strides = (
        tuple(_whole_number(item, f"{key} of {shown}") for item in _READ.entries(meta.get(key), key))
        for key in ("sizes", "strides")
    )
    offset = _whole_number(meta.get("storage_offset"), f"storage_offset of {shown}")
    stored = files.find(path)
    reason = None
    if meta.get("layout") != _STRIDED:
        reason = "layout that is not strided"
    elif stored.nbytes == 0 and 0 not in sizes:
        reason = "fake tensor, saved without values"
    elif files.disagrees(path, dtype):
        reason = "storage that tensors of two dtypes share"
    storage = StorageRef(path, dtype, stored.nbytes // STORAGE_SIZES.get(dtype, 1), "cpu")
    ref = TensorRef(storage, offset, sizes, strides, dtype, unsupported=reason)
    return make_tensor(name, ref, lambda _: stored, files.archive.file, _role(name, dtype, is_parameter))


def _pickled(
    name: str, stored: StoredBytes, archive: Archive, open_pickle: Open, is_parameter: bool
) -> TensorState:
    """Read a tensor that is a torch zip file by itself: one of a subclass."""
    pickled, find, _ = open_pickle(_inner(archive, stored))
    ref = pickled.root
    if not isinstance(ref, TensorRef):
        reason = f"kind of tensor: {describe(ref)}"
        ref = TensorRef(None, 0, (), (), "unknown", unsupported=reason)
    return make_tensor(name, ref, find, archive.file, _role(name, ref.dtype, is_parameter))


def _compiled(archive: Archive, folder: str, config: str, open_pickle: Open, root: str | None) -> StateTable:
    """Read the weights beside compiled code: parts of tensors that are a torch zip file each."""
    entries = _parsed(archive, config)
    if not entries:
        raise _empty()
    files = _Storages(archive, folder)
    opened: dict[str, tuple[TensorRef, Find]] = {}
    tensors = []
    for name, entry in entries.items():
        parts = _READ.entries(entry, printable(name))
        if len(parts) != 4:
            _READ.refuse(f"{printable(name)} has a file, a shape, a stride and an offset", None)
        path = _READ.text(parts[0], f"the file of {printable(name)}")
        if path not in opened:
            pickled, find, _ = open_pickle(_inner(archive, files.find(path)))
            if not isinstance(pickled.root, TensorRef):
                _READ.refuse(f"{printable(path)} is a tensor", describe(pickled.root))
            opened[path] = pickled.root, find
        ref, find = opened[path]
        ref = replace(ref, shape=parts[1], stride=parts[2], offset=parts[3], is_parameter=False)
        tensors.append(make_tensor(name, ref, find, archive.file, None))
    return flat_table(archive.file, tensors, root)


def _parsed(archive: Archive, name: str) -> dict[str, Any]:
    raw = archive.read(name, _READ.max_bytes)
    return _READ.mapping(_READ.parse(_READ.decode(raw)), printable(name))


def _whole_number(value: object, where: str) -> int:
    number = value.get("as_int") if isinstance(value, dict) else None
    if type(number) is not int:
        _READ.refuse(f"{where} is told by whole numbers", value)
    return number


def _role(name: str, dtype: str, is_parameter: bool) -> Role:
    role = role_of(name, dtype)
    return "parameter" if is_parameter else "buffer" if role == "parameter" else role


def _empty() -> CheckpointError:
    return CheckpointError(
        "a .pt2 archive whose program has no parameters and buffers",
        remedy="save the state_dict() of the whole model with torch.save",
    )
