"""Reads models that are spread over several files: Hugging Face's indexes of shards, DeepSpeed's folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import BinaryIO

from freezekit.audit.checkpoint.choosing import others_note
from freezekit.audit.checkpoint.container import Kind, SourceFile, beside, guarded, printable, sniff
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.roots import model_names
from freezekit.audit.checkpoint.table import flat_table
from freezekit.audit.checkpoint.tensors import unreadable
from freezekit.audit.state import StateTable, TensorState
from freezekit.errors import CheckpointError
from freezekit.jsonfile import Reader

__all__ = ["ReadFile", "read_deepspeed", "read_index"]

#: reads one file whose format is known
ReadFile = Callable[[SourceFile, BinaryIO, str | None, Limits], StateTable]

_AGAIN = "download or copy the index and all its shards again"
#: the longest are those of models with hundreds of experts in each layer: about 14 MB
_MAX_BYTES = 32 * 2**20
_MAX_SHARDS = 10_000
_INDEX = Reader("shard index", _AGAIN, _MAX_BYTES, max_text=1_000, max_digits=40, fractions=True)


def read_index(
    file: SourceFile,
    stream: BinaryIO,
    readers: Mapping[Kind, ReadFile],
    root: str | None = None,
    limits: Limits = Limits.DEFAULT,
) -> StateTable:
    """Read the model whose shards an index lists (``model.safetensors.index.json``).

    Args:
        file: the index.
        stream: the same, open at its start.
        readers: by format, what reads a shard.
        root: which of several networks in the model to read.
        limits: caps on what a shard may hold.

    Raises:
        CheckpointError: it or a shard is damaged or hostile, or they do not fit each other.
    """
    if file.size > _INDEX.max_bytes:
        raise _INDEX.too_long(file.size)
    content = _INDEX.mapping(_INDEX.parse(_INDEX.decode(stream.read(file.size))), "it")
    weight_map = _INDEX.mapping(content.get("weight_map"), "its weight_map")
    named: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        named.setdefault(_INDEX.text(shard, "the name of a shard"), []).append(name)
    if not named:
        raise CheckpointError("holds no tensors", got="an index of no shards", remedy=_AGAIN)
    if len(named) > _MAX_SHARDS:
        got = f"{len(named)}, more than {_MAX_SHARDS}"
        raise CheckpointError("hostile: it lists too many shards", got=got, remedy=_AGAIN)
    paths = {shard: beside(file.source, shard) for shard in named}
    if missing := [shard for shard, path in paths.items() if not os.path.exists(path)]:
        raise CheckpointError(
            f"{len(missing)} of the {len(paths)} shards that it lists are missing",
            got=f"no {printable(missing[0])}",
            remedy=_AGAIN,
        )
    found: dict[str, TensorState] = {}
    notes: dict[str, None] = {}
    texts: list[tuple[str | None, str | None]] = []
    for shard, names in named.items():
        with guarded(printable(paths[shard], 1000)):
            table = _read_shard(paths[shard], readers, limits)
            texts.append((table.manifest, table.report))
            unlisted, said = _take(table, names, found)
            notes.update(dict.fromkeys(said))
        if unlisted:
            shown = ", ".join(printable(name, 40) for name in unlisted[:3])
            more = f" and {len(unlisted) - 3} more" if len(unlisted) > 3 else ""
            notes[f"{printable(shard)} holds what the index does not list: {shown}{more}"] = None
    made = flat_table(file, [replace(tensor, name=name) for name, tensor in found.items()], root, list(notes))
    made.manifest, made.report = (next(filter(None, kind), None) for kind in zip(*texts, strict=True))
    return made


def read_deepspeed(path: str, names: tuple[str, ...], read: Callable[[str], StateTable]) -> StateTable:
    """Read the model states of a folder that DeepSpeed wrote.

    Args:
        path: the folder.
        names: the files in it that hold model states.
        read: reads one file.

    Raises:
        CheckpointError: the model is split over several of them.
    """
    ranks = {match[1] for name in names if (match := re.search(r"mp_rank_(\d+)_model", name))}
    parts = [name for name in names if "mp_rank" not in name]
    if len(ranks) != 1 or parts:
        raise CheckpointError(
            "not supported: a DeepSpeed checkpoint of a model split by layers or by tensors",
            got=f"{printable(names[0])} and {len(names) - 1} more",
            remedy="join it by the code that trained it, and save its state_dict() with torch.save",
        )
    whole = [name for name in names if name.startswith("mp_rank_")]
    table = read(os.path.join(path, whole[0] if whole else names[0]))
    return table if whole else _without_placeholders(table)


def _without_placeholders(table: StateTable) -> StateTable:
    """Mark what ZeRO-3 leaves of a parameter in the model states: an empty tensor; buffers are whole."""
    remedy = "python zero_to_fp32.py FOLDER FILE joins them"
    file = SourceFile.at(table.source)
    empty = [name for name, tensor in table.items() if tensor.shape == (0,)]
    reason = f"placeholder of a parameter that ZeRO-3 split over the ranks: {remedy}"
    tensors = [
        unreadable(name, tensor.role, tensor.dtype, tensor.shape, reason, file)
        if tensor.shape == (0,)
        else tensor
        for name, tensor in table.items()
    ]
    made = table.with_tensors(tensors)
    if empty:
        made.notes += (f"ZeRO-3 split {len(empty)} parameters over the ranks, which were not read: {remedy}",)
    return made


def _read_shard(path: str, readers: Mapping[Kind, ReadFile], limits: Limits) -> StateTable:
    # A link is followed wherever it leads: whoever made the folder made it, as Hugging Face's cache does: its
    # snapshots link to ../../blobs. What comes with a download is the index, whose names lead nowhere.
    file = SourceFile.at(path)
    with file.open() as stream:
        kind = sniff(file, stream)
        if kind not in readers:
            what = "damaged or hostile: an index lists it as a shard, and it is no file of tensors"
            raise CheckpointError(what, got="another index" if kind == "index" else None, remedy=_AGAIN)
        return readers[kind](file, stream, None, limits)


def _take(
    table: StateTable, names: list[str], found: dict[str, TensorState]
) -> tuple[list[str], Iterable[str]]:
    """Add a shard's tensors under the index's names.

    Returns:
        Those of which the index does not know, and what was noted of the shard that holds for the model too.
    """
    # the shard was read as a file by itself, without the prefixes that all the names in it have
    bare, stripped = model_names(names)
    if missing := [name for name, own in zip(names, bare, strict=True) if own not in table]:
        raise CheckpointError(
            "the index and its shard do not fit: a tensor is not in it",
            got=printable(missing[0]),
            remedy=_AGAIN,
        )
    unlisted = sorted(set(table).difference(bare))
    for name, own in [*zip(names, bare, strict=True), *zip(unlisted, unlisted, strict=True)]:
        if name in found:
            raise CheckpointError("hostile: a tensor is in two shards", got=printable(name), remedy=_AGAIN)
        found[name] = table[own]
    own_notes = {*stripped, *others_note(table.roots, table.root)}
    return unlisted, [note for note in table.notes if note not in own_notes]
