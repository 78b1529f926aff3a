"""Auditing checkpoint files: alone, or against the file they started from. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable

from freezekit.audit import drift, saved
from freezekit.audit import manifest as manifests
from freezekit.audit.aligning import align
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import DriftReport
from freezekit.audit.frozen_set import differing, frozen_names
from freezekit.audit.health import health
from freezekit.audit.state import StateTable
from freezekit.errors import FreezekitError
from freezekit.manifest import Manifest

__all__ = ["audit_checkpoint"]


def audit_checkpoint(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    frozen: str | Iterable[str] | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
) -> DriftReport:
    """Audit a checkpoint file, without torch and without executing anything in it.

    Alone, its BN layers are listed and their statistics judged (FK4xx). Against the file it was fine-tuned
    from, everything frozen is compared bit for bit (FK1xx). What is frozen is told by ``frozen``; without
    it, a BN layer counts as frozen if its own parameters did not change at all, which is what
    ``requires_grad=False`` leaves behind.

    By a manifest, which knows what was frozen and the digest of each of its tensors, it is compared without
    that file. A checkpoint that holds its manifest is compared by it where nothing else is given; what the
    report of a live audit inside it says (text under ``"freezekit_report"``) is added then.

    A report that :meth:`DriftReport.save` wrote is read back.

    Args:
        path: a ``.pt``/``.pth`` file (zip or legacy), ``.safetensors``, or a saved report, as its content
            tells.
        against: the file to compare with.
        frozen: names or globs of the frozen layers and tensors; needs ``against``.
        manifest: what was frozen: a :class:`freezekit.Manifest`, its file, or a checkpoint that holds one.
            With ``against`` too, that file only says how far things moved.

    Returns:
        The report; ``.clean`` says whether anything is wrong.

    Raises:
        CheckpointError: a file is missing, damaged, unsupported or hostile.
        SelectionError: a pattern matches nothing.
        FreezekitError: the two files have no tensor in common, or ``frozen`` came without ``against``
            or beside ``manifest``, or anything beside a saved report.

    >>> import numpy, os, tempfile
    >>> header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
    >>> with open(path, "wb") as file:
    ...     _ = file.write(len(header).to_bytes(8, "little") + header + bytes(8))
    >>> audit_checkpoint(path, against=path).clean
    True
    """
    given = {"against": against, "frozen": frozen, "manifest": manifest}
    if (report := saved.report_in(path)) is not None:
        return _as_saved(report, [name for name, value in given.items() if value is not None])
    if frozen is not None and manifest is not None:
        raise FreezekitError(
            "a manifest says by itself what was frozen",
            where="frozen",
            got="both",
            remedy="give one of the two",
        )
    if frozen is not None and against is None:
        raise FreezekitError(
            "there is nothing to compare the frozen layers with",
            where="frozen",
            got="no base file",
            remedy="give the checkpoint that training started from as well (--against BASE)",
        )
    table = read_checkpoint(path)
    if table.report is not None and (against is not None or manifest is not None):
        table.notes += ("the report of its training inside it was not used; without options it is",)
    if manifest is not None:
        base = None if against is None else read_checkpoint(against)
        if isinstance(manifest, Manifest):
            return _by_manifest(table, manifest, "the manifest given", base)
        label = f"the manifest {printable(os.fsdecode(manifest), 200)}"
        return _by_manifest(table, manifests.load_manifest(manifest), label, base)
    if against is None:
        return saved.with_report_inside(_alone(table), table)
    base = read_checkpoint(against)
    own = None if frozen is not None else manifests.manifest_of(table)
    if own is not None and own.tensors:
        return _by_manifest(table, own, "the manifest inside it", base)
    return _against(table, base, frozen)


def _against(table: StateTable, base: StateTable, frozen: str | Iterable[str] | None) -> DriftReport:
    """Compare with the file that training started from."""
    aligned = align(table, base)
    table, base, notes = aligned.table, aligned.base, aligned.notes
    if frozen is not None and table.manifest is not None:
        notes += (
            f"{table.source} holds a manifest of what was frozen, not used here; --manifest goes by it",
        )
    names, scope, said = frozen_names(table, base, frozen, given=aligned.given, outside=aligned.outside)
    notes += said
    # Files from before torch 0.4.1 have no counters, and some tools strip them: that moves nothing.
    counters = {n for t in (base, table) for n in t if t[n].role == "num_batches_tracked"}
    absent = {name for name in names & counters if name not in base or name not in table}
    names -= absent
    if absent:
        notes += (f"{len(absent)} num_batches_tracked are in one of the files only, and were not compared",)
    compared, findings, changed = drift.compare(base, table, names, scatter=True)
    return DriftReport(
        table.source,
        base.source,
        scope,
        len(names),
        tuple(changed),
        tuple(compared),
        tuple(findings),
        (*notes, *differing(base, table, names | absent | aligned.outside)),
    )


def _as_saved(report: DriftReport, beside: list[str]) -> DriftReport:
    """Return a report that was saved, beside which nothing can be asked for."""
    if beside:
        raise FreezekitError(
            "a saved report is shown as it is: it has no tensors to compare",
            where=", ".join(beside),
            remedy="give the report alone, or the checkpoint in its place",
        )
    return report


def _alone(table: StateTable) -> DriftReport:
    """Compare with the manifest inside, or judge the statistics by themselves."""
    own = manifests.manifest_of(table)
    if own is not None and own.tensors:
        return _by_manifest(table, own, "the manifest inside it", None)
    layers = tuple(drift.describe_layer(name, table) for name in table.norm_layers())
    notes = table.notes if layers else (*table.notes, "no layer keeps running statistics")
    notes = notes if own is None else (*notes, "by the manifest inside it nothing was frozen")
    return DriftReport(table.source, None, "statistics only", 0, (), layers, tuple(health(table)), notes)


def _by_manifest(table: StateTable, manifest: Manifest, label: str, base: StateTable | None) -> DriftReport:
    """Compare with what a manifest says was frozen."""
    notes = table.notes
    if base is not None:
        aligned = align(table, base)
        table, base, notes = aligned.table, aligned.base, aligned.notes
    known, ties = manifests.known_in(manifest, label, table)
    outcome = manifests.compare(known, ties, table, base)
    if base is not None:
        notes += tuple(differing(base, table, known))
    return DriftReport(
        table.source,
        label if base is None else base.source,
        f"as {label} says",
        len(outcome.names),
        tuple(outcome.changed),
        tuple(outcome.layers),
        tuple(outcome.findings),
        (*notes, *outcome.notes),
    )
