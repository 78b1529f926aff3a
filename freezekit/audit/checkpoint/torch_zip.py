"""Reads the zip files that ``torch.save`` writes since torch 1.6.

The archive holds ``<root>/data.pkl`` and, uncompressed, one ``<root>/data/<key>`` for each storage. What
``torch.jit.save`` and ``torch.export.save`` write is told apart here, and read by modules of their own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from typing import BinaryIO

from freezekit.audit.checkpoint.archive import Archive
from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.exported import is_exported, read_exported
from freezekit.audit.checkpoint.inert import StorageRef
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.pickle_machine import Unpickled, unpickle
from freezekit.audit.checkpoint.table import make_table
from freezekit.audit.checkpoint.tensors import StoredBytes
from freezekit.audit.checkpoint.torchscript import is_scripted, read_scripted
from freezekit.audit.state import StateTable
from freezekit.errors import CheckpointError

__all__ = ["open_pickle", "read_zip"]

FindStorage = Callable[[StorageRef], StoredBytes]
LateNotes = Callable[[], list[str]]

_RE_SAVE = "load it where it came from and save model.state_dict() with torch.save or safetensors"


def read_zip(
    file: SourceFile, stream: BinaryIO, root: str | None = None, limits: Limits = Limits.DEFAULT
) -> StateTable:
    """Read a torch zip file.

    Args:
        file: the file.
        stream: the same, open.
        root: which of the states in it to read.
        limits: caps on what it may cost.

    Raises:
        CheckpointError: it is damaged, hostile, or another kind of zip.
    """
    archive = Archive(file, stream, limits=limits)
    if is_exported(archive):
        return read_exported(archive, open_pickle, root)
    folder = _find_root(archive.members)
    pickled, find, late_notes = open_pickle(archive, folder)
    if is_scripted(archive, folder):
        return read_scripted(archive, folder, pickled, find, root)
    return make_table(file, pickled, find, late_notes, root, limits)


def open_pickle(archive: Archive, folder: str | None = None) -> tuple[Unpickled, FindStorage, LateNotes]:
    """Follow the pickle in what ``torch.save`` wrote.

    Args:
        archive: the zip.
        folder: what comes before its ``data.pkl``, where that is known.

    Returns:
        the inert object, what finds its storages, and what tells of them once they were found.
    """
    if folder is None:
        folder = _find_root(archive.members)
    order = archive.read(f"{folder}byteorder", 100) if f"{folder}byteorder" in archive.members else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(
            "its byte order is neither little nor big", got=printable(order[:20].decode("latin-1"))
        )
    pickled = unpickle(io.BytesIO(archive.read(f"{folder}data.pkl")), limits=archive.limits)
    found: dict[str, StoredBytes] = {}

    def find(storage: StorageRef) -> StoredBytes:
        if storage.key not in found:
            found[storage.key] = archive.locate(
                f"{folder}data/{storage.key}", storage.key, swapped=order == b"big"
            )
        return found[storage.key]

    return pickled, find, lambda: _checksum_notes(found)


def _find_root(names: Collection[str]) -> str:
    """Return what comes before ``data.pkl``, or say what kind of zip it is instead."""
    roots = [name.removesuffix("data.pkl") for name in names if name.rpartition("/")[2] == "data.pkl"]
    roots = [root for root in roots if root.count("/") <= 1]
    if len(roots) > 1:
        raise CheckpointError(
            "damaged or hostile: it has more than one data.pkl", got=printable(", ".join(roots))
        )
    if roots:
        return roots[0]
    if any(name.endswith(".npy") for name in names):
        raise CheckpointError("not supported: numpy arrays (.npz)", remedy=_RE_SAVE)
    if "model.weights.h5" in names:
        what = "not supported: a Keras model (.keras)"
        remedy = "load it with Keras, copy its weights into the PyTorch model, and save model.state_dict()"
        raise CheckpointError(what, remedy=remedy)
    if any(name.count("/") == 1 and name.endswith("/model.json") for name in names):
        raise CheckpointError(
            "not supported: a TorchScript file of torch 1.2 or before",
            remedy="m = torch.jit.load(FILE); torch.save(m.state_dict(), 'state.pt'); then give state.pt",
        )
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
