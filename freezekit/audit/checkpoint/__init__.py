"""Reads checkpoints without torch: nothing in a file is imported or run.

One module a container format (``torch_zip``, ``torch_legacy``, ``safetensors``), one for the pickle machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO

from freezekit.audit.checkpoint.container import Kind, SourceFile, guarded, printable, refused, sniff
from freezekit.audit.checkpoint.inert import Opaque, describe
from freezekit.audit.checkpoint.other_formats import other_pickle, text_format
from freezekit.audit.checkpoint.pickle_machine import LimitedReader, PickleDamageError, unpickle
from freezekit.audit.checkpoint.safetensors import read_safetensors
from freezekit.audit.checkpoint.torch_legacy import read_legacy
from freezekit.audit.checkpoint.torch_zip import read_zip
from freezekit.audit.state import StateTable
from freezekit.errors import CheckpointError

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | os.PathLike[str]) -> StateTable:
    """Read the tensors of a ``.pt``, ``.pth`` or ``.safetensors`` file, whatever its name.

    Only the descriptions are read now. A tensor's values are read, and their checksum checked, when
    ``TensorState.read()`` asks for them; the file must not change in between.

    Args:
        path: a file that ``torch.save`` of any version or safetensors wrote.

    Returns:
        The model's state, with notes on what was found beside it.

    Raises:
        CheckpointError: the file is missing, damaged, unsupported or hostile; ``read()`` raises it too.
    """
    source = os.fsdecode(path)
    with guarded(printable(source, 1000)):
        file = SourceFile.at(source)
        with file.open() as stream:
            return _READERS[sniff(file, stream)](file, stream)


def _read_unknown(file: SourceFile, stream: BinaryIO) -> StateTable:
    """Refuse a file of no known format, after a look whether it is a pickle, and what that would run."""
    head = stream.read(4096)
    stream.seek(0)
    try:
        root = unpickle(LimitedReader(stream, file.size), plain=True).root
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
    maker = root.made_by if isinstance(root, Opaque) else None
    if (other := other_pickle(root if isinstance(root, dict) else (), str(maker))) is not None:
        raise refused(other)
    raise CheckpointError(
        "a plain pickle, not written by torch.save",
        got=describe(root),
        remedy="load it where it came from, if you trust that, and save the state dict with torch.save",
    )


_READERS: dict[Kind, Callable[[SourceFile, BinaryIO], StateTable]] = {
    "zip": read_zip,
    "legacy": read_legacy,
    "safetensors": read_safetensors,
    "unknown": _read_unknown,
}
