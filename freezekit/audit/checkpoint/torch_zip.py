"""Reads the zip files that ``torch.save`` writes since torch 1.6.

The archive holds ``<root>/data.pkl`` and, uncompressed, one ``<root>/data/<key>`` for each storage.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import BinaryIO

from freezekit.audit.checkpoint.archive import Archive
from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.inert import StorageRef
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.pickle_machine import unpickle
from freezekit.audit.checkpoint.table import make_table
from freezekit.audit.checkpoint.tensors import StoredBytes
from freezekit.audit.state import StateTable
from freezekit.errors import CheckpointError

__all__ = ["read_zip"]

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
    archive = Archive(file, stream)
    folder = _find_root(archive.members)
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in archive.members else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(
            "its byte order is neither little nor big", got=printable(order[:20].decode("latin-1"))
        )
    pickled = unpickle(io.BytesIO(archive.read(f"{folder}data.pkl", limits)), limits=limits)
    found: dict[str, StoredBytes] = {}

    def find(storage: StorageRef) -> StoredBytes:
        if storage.key not in found:
            found[storage.key] = archive.locate(
                f"{folder}data/{storage.key}", storage.key, swapped=order == b"big"
            )
        return found[storage.key]

    return make_table(file, pickled, find, lambda: _checksum_notes(found), root, limits)


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
