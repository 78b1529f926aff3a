"""Reads checkpoints without torch: nothing in a file is imported or run.

One module a container format (``torch_zip``, ``torch_legacy``, ``safetensors``; ``sharded``, ``distributed``
for those of several files), one for the pickle machine.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from freezekit.audit.checkpoint.container import Kind, SourceFile, guarded, printable, refused, sniff
from freezekit.audit.checkpoint.distributed import read_distributed
from freezekit.audit.checkpoint.folders import checkpoints_in, found_in
from freezekit.audit.checkpoint.inert import Opaque, describe
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.other_formats import other_pickle, text_format
from freezekit.audit.checkpoint.pickle_machine import LimitedReader, PickleDamageError, unpickle
from freezekit.audit.checkpoint.safetensors import read_safetensors
from freezekit.audit.checkpoint.sharded import ReadFile, read_deepspeed, read_index
from freezekit.audit.checkpoint.torch_legacy import read_legacy
from freezekit.audit.checkpoint.torch_zip import read_zip
from freezekit.audit.state import StateTable
from freezekit.errors import CheckpointError

__all__ = ["read_checkpoint"]


def read_checkpoint(
    path: str | os.PathLike[str], root: str | None = None, limits: Limits = Limits.DEFAULT
) -> StateTable:
    """Read the tensors of a ``.pt``, ``.pth`` or ``.safetensors`` file, whatever its name, or of a folder.

    Only the descriptions are read now. A tensor's values are read, and their checksum checked, when
    ``TensorState.read()`` asks for them; the file must not change in between.

    Args:
        path: a file that ``torch.save`` of any version or safetensors wrote, an index of shards, or a folder
            that is one checkpoint: of Hugging Face's tools, torch.distributed.checkpoint or DeepSpeed.
        root: which of the states in the file to read, as ``StateTable.roots`` names them: the keys that lead
            there (``"ema.module"``, ``"nets.0"``), and after a colon the prefix of one of several networks in
            one state dict (``"state_dict:teacher"``). Its last part will do if no other root ends so. Without
            it, the model's own.
        limits: caps on what a hostile file may cost; ``Limits.NONE`` lifts them.

    Returns:
        The model's state, with notes on what was found beside it.

    Raises:
        CheckpointError: the file is missing, damaged, unsupported or hostile; ``read()`` raises it too.
        SelectionError: the file has no such root, or several.
    """
    source = os.fsdecode(path)
    with guarded(printable(source, 1000)), _without_collecting():
        if os.path.isdir(source):
            return _read_folder(source, root, limits)
        file = SourceFile.at(source)
        with file.open() as stream:
            kind = sniff(file, stream)
            if kind == "index":
                return read_index(file, stream, _READERS, root, limits)
            return _READERS[kind](file, stream, root, limits)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Keep the garbage collector from looking through all that is made, again and again, for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_folder(source: str, root: str | None, limits: Limits) -> StateTable:
    """Read the checkpoint that a folder is, or the only one in it."""
    found = found_in(source)
    if found is None:
        inside = checkpoints_in(source)
        if len(inside) == 1:
            return read_checkpoint(inside[0], root, limits)
        raise CheckpointError(
            "a folder of several checkpoints, not one",
            got=f"{len(inside)}, from {printable(inside[0], 200)} to {printable(inside[-1], 200)}",
            remedy="give one of them; freezekit audit FOLDER takes them all, in the order of training",
        )
    if found.kind == "distributed":
        return read_distributed(source, found.names, root, limits)
    if found.kind == "deepspeed":
        return read_deepspeed(source, found.names, lambda path: read_checkpoint(path, root, limits))
    table = read_checkpoint(os.path.join(source, found.names[0]), root, limits)
    if len(found.names) > 1:
        table.notes += (f"{printable(source, 200)} also holds {', '.join(map(printable, found.names[1:4]))}",)
    return table


def _read_unknown(file: SourceFile, stream: BinaryIO, root: str | None, limits: Limits) -> StateTable:
    """Refuse a file of no known format, after a look whether it is a pickle, and what that would run."""
    head = stream.read(4096)
    stream.seek(0)
    try:
        found = unpickle(LimitedReader(stream, file.size), plain=True, limits=limits).root
    except PickleDamageError as error:
        if head.startswith(b"\x80"):
            raise
        if (other := text_format(head)) is not None:
            raise refused(other) from error
        raise CheckpointError(
            "not a checkpoint: neither a torch nor a safetensors file",
            got=f"a file that starts with {head[:8]!r}",
            remedy="give a .pt, .pth or .safetensors file",
        ) from error
    maker = found.made_by if isinstance(found, Opaque) else None
    if (other := other_pickle(found if isinstance(found, dict) else (), str(maker))) is not None:
        raise refused(other)
    raise CheckpointError(
        "a plain pickle, not written by torch.save",
        got=describe(found),
        remedy="load it where it came from, if you trust that, and save the state dict with torch.save",
    )


_READERS: dict[Kind, ReadFile] = {
    "zip": read_zip,
    "legacy": read_legacy,
    "safetensors": read_safetensors,
    "unknown": _read_unknown,
}
