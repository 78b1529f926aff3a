"""The observing side of a manifest: read from an untrusted file, and held against a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import cast

from freezekit.audit import drift
from freezekit.audit.aligning import named_as_in
from freezekit.audit.bits import same_bits
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.container import SourceFile, guarded, printable, sniff
from freezekit.audit.findings import Finding, LayerDrift
from freezekit.audit.health import health
from freezekit.audit.saved import json_text
from freezekit.audit.state import Role, StateTable, TensorState
from freezekit.errors import CheckpointError, FreezekitError
from freezekit.manifest import KEY, READER, Manifest, bare_name

__all__ = ["Outcome", "compare", "known_in", "load_manifest", "manifest_of"]


@dataclass(frozen=True)
class Outcome:
    """What a manifest says of a checkpoint.

    Args:
        names: the tensors compared by value.
        changed: those that differ.
        layers: the checkpoint's layers with running statistics.
        findings: what is wrong.
        notes: what was not compared, and why.
    """

    names: set[str]
    changed: list[str]
    layers: list[LayerDrift]
    findings: list[Finding]
    notes: list[str]


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """As :meth:`freezekit.Manifest.load`."""
    source = os.fsdecode(path)
    with guarded(printable(source, 1000)):
        if not os.path.isdir(source) and (text := _text_of(source)) is not None:
            return Manifest.from_json(text)
    manifest = manifest_of(read_checkpoint(source))
    if manifest is None:
        raise CheckpointError(
            "a checkpoint that holds no manifest",
            where=printable(source, 1000),
            remedy=f"give the manifest's own file, or save the checkpoint with '{KEY}': "
            "handle.manifest().to_json() in it",
        )
    return manifest


def _text_of(path: str) -> str | None:
    """Return the JSON that a file is, or ``None`` for a checkpoint."""
    file = SourceFile.at(path)
    with file.open() as stream:
        text = json_text(file, stream, READER)
        if text is None and sniff(file, stream) == "unknown":
            raise CheckpointError(
                "neither a manifest nor a checkpoint, which could hold one",
                got=f"a file that starts with {stream.read(8)!r}",
                remedy="give what handle.manifest().save(path) wrote",
            )
    return text


def manifest_of(table: StateTable) -> Manifest | None:
    """Return the manifest that a checkpoint holds, or ``None``.

    Raises:
        CheckpointError: it is damaged or hostile.
    """
    if table.manifest is None:
        return None
    with guarded(f"{printable(table.source, 1000)}, the manifest inside it"):
        return Manifest.from_json(table.manifest)


def known_in(manifest: Manifest, label: str, table: StateTable) -> tuple[StateTable, dict[str, str]]:
    """Return what a checkpoint should hold by a manifest, under the names that the checkpoint has.

    Args:
        manifest: the manifest.
        label: what to call it.
        table: the checkpoint.

    Returns:
        the tensors, of which only the digests are known, and of the tied ones the first name each.

    Raises:
        FreezekitError: the checkpoint has none of them.
    """
    tensors: dict[str, TensorState] = {}
    for tensor in manifest.tensors:
        if tensor.persistent:
            name, role = bare_name(tensor.name), cast(Role, tensor.role)
            unknown = tensor.reason or "only its digest is known"
            tensors[name] = TensorState(
                name, role, tensor.dtype, tensor.shape, _no_values, unknown, tensor.sha256
            )
    known = StateTable(list(tensors.values()), label)
    ties = {bare_name(t.name): bare_name(t.tied_to) for t in manifest.tensors if t.tied_to}
    rename = named_as_in(table, known)
    renamed = known.with_tensors([replace(tensor, name=rename(name)) for name, tensor in known.items()])
    if known and not any(name in table for name in renamed):
        raise FreezekitError(
            "the checkpoint has no tensor that the manifest names, so they are not of the same model",
            where=f"{table.source}, {label}",
            got=f"{next(iter(table))!r} and {next(iter(known))!r}",
            remedy="give the manifest that was saved with the checkpoint",
        )
    return renamed, {rename(name): rename(first) for name, first in ties.items()}


def compare(
    known: StateTable,
    ties: dict[str, str],
    table: StateTable,
    base: StateTable | None,
    *,
    scatter: bool = True,
) -> Outcome:
    """Compare a checkpoint with what a manifest knows.

    Args:
        known: the manifest's tensors, under the names the checkpoint has.
        ties: those that are the same tensor as another, with the first name of that.
        table: the checkpoint.
        base: the checkpoint training started from, for how far things moved.
        scatter: whether to keep the drift of each channel.
    """
    before, notes = (known, []) if base is None else _with_values(known, base)
    names = set(before)
    absent = {name for name in names if name not in table}
    # safetensors keeps a tied tensor once, under one of its names
    present = {ties.get(name, name) for name in names - absent}
    tied = {name for name in absent if ties.get(name, name) in present}
    counters = {name for name in absent if before[name].role == "num_batches_tracked"}
    if counters:
        notes.append(f"{len(counters)} num_batches_tracked are not in the file, and were not compared")
    parameters = {name for name in names if before[name].role == "parameter"}
    left_out = parameters if parameters <= absent else set()
    if left_out:
        notes.append(f"none of the {len(left_out)} frozen parameters is in the file: not compared")
    names -= tied | counters | left_out
    blind = [
        name for name in before if name in names and before[name].sha256 is None and _blind(before[name])
    ]
    names -= set(blind)
    if blind:
        notes.append(
            f"{_count(blind)} compared by dtype and shape only, as the manifest has no digest: "
            f"{_some(blind)} ({before[blind[0]].unsupported})"
        )
    layers, findings, changed = drift.compare(before, table, names, scatter=scatter)
    structural = [drift.compare_structure(name, before[name], table.get(name)) for name in blind]
    findings += [finding for finding in structural if finding is not None]
    changed += [finding.name for finding in structural if finding is not None]
    if base is None:
        # a part that is frozen counts differently from one that trains
        unhealthy = [finding for finding in health(table) if finding.code != "FK404"]
        findings = [finding for finding in findings if finding.code.startswith("FK1")] + unhealthy
        if any(finding.code in ("FK101", "FK102", "FK103", "FK104") for finding in findings):
            notes.append("a manifest holds digests, not values: --against BASE says how far things moved")
    compared = {layer.name: layer for layer in layers}
    every = [compared.get(name) or drift.describe_layer(name, table) for name in table.norm_layers()]
    return Outcome(names, changed, every, findings, notes)


def _with_values(known: StateTable, base: StateTable) -> tuple[StateTable, list[str]]:
    """Take the values from the base where they are what was frozen."""
    tensors, differing = [], []
    for name, tensor in known.items():
        there = base.get(name)
        if there is None or there.unsupported or not _alike(tensor, there):
            tensors.append(tensor)
            differing += [name] if tensor.sha256 else []
        else:
            tensors.append(replace(there, role=tensor.role))
    notes = []
    if differing:
        notes.append(
            f"{base.source} is not what was frozen: {len(differing)} of {len(known)} tensors in it are not "
            f"those of the manifest ({_some(differing)}); how far these moved since is not known"
        )
    return StateTable(tensors, known.source), notes


def _alike(tensor: TensorState, there: TensorState) -> bool:
    if tensor.sha256 is None:
        return drift.compare_structure(tensor.name, tensor, there) is None
    return same_bits(tensor, there)


def _blind(tensor: TensorState) -> bool:
    return tensor.read is _no_values


def _no_values() -> bytes:
    raise CheckpointError("a manifest has no values", remedy="compare digests")


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{' was' if len(names) == 1 else 's were'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
