"""Auditing checkpoint files: alone, or against the file they started from. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from freezekit.audit import drift, saved, trend
from freezekit.audit import manifest as manifests
from freezekit.audit.aligning import align
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.folders import find_run
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.findings import DriftReport
from freezekit.audit.frozen_set import blind_note, check_asked, differing, frozen_names
from freezekit.audit.health import health, unjudged
from freezekit.audit.pretrained import find_weights
from freezekit.audit.stale import stale
from freezekit.audit.state import StateTable
from freezekit.errors import FreezekitError, SelectionError
from freezekit.manifest import Manifest

__all__ = ["audit_checkpoint", "read_base"]

_Path = str | os.PathLike[str]


def audit_checkpoint(
    path: _Path | Iterable[_Path],
    against: _Path | None = None,
    frozen: str | Iterable[str] | None = None,
    manifest: Manifest | _Path | None = None,
    root: str | None = None,
    no_limits: bool = False,
) -> DriftReport:
    """Audit a checkpoint file, without torch and without executing anything in it.

    Alone, its BN layers are listed and their statistics judged (FK4xx). Against the file it was fine-tuned
    from, everything frozen is compared bit for bit (FK1xx). What is frozen is told by ``frozen``; without
    it, by a manifest; else by the optimizer state in the file, by what it never held or stepped. Without any
    of these a layer counts as frozen if its own parameters did not change at all, which is what
    ``requires_grad=False`` leaves behind.

    By a manifest, which knows what was frozen and the digest of each of its tensors, it is compared without
    that file. A checkpoint that holds its manifest is compared by it where nothing else is given; what the
    report of a live audit inside it says (text under ``"freezekit_report"``) is added then.

    Of the checkpoints of a run, several files or a folder, the last is audited, and the report tells when
    each layer began to move, how fast, and how it went (``.checkpoints``, ``.layers[0].timeline``); what
    moved in any of them is a finding. What counts as frozen is told for the run as a whole: without
    ``frozen``, by what stayed bit-identical in all of them. Without ``against`` the first is the base. A
    file that cannot be read, as a crash leaves one, is left out and told of; the last must be readable.

    A report that :meth:`DriftReport.save` wrote is read back.

    Args:
        path: a ``.pt``/``.pth`` file (zip or legacy), ``.safetensors``, or a saved report, as its content
            tells; several such files, or the folder of a run.
        against: the file to compare with, or published weights: ``"torchvision:NAME"``,
            ``"torchvision:NAME/WEIGHTS"``, ``"timm:NAME"``, from the local cache or fetched.
        frozen: names or globs of the frozen layers and tensors; needs ``against``, or several checkpoints.
        manifest: what was frozen: a :class:`freezekit.Manifest`, its file, or a checkpoint that holds one.
            With ``against`` too, that file only says how far things moved.
        root: which state in the checkpoint, where it holds several: ``"ema"``, ``"state_dict"``,
            ``"state_dict:teacher"``. Of the file to compare with, the one of that name too, if it has one.
        no_limits: lift the caps on what a hostile file may cost.

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
    given = {"against": against, "frozen": frozen, "manifest": manifest, "root": root}
    paths, notes = _files_of(path)
    if len(paths) == 1 and (report := saved.report_in(paths[0])) is not None:
        return _as_saved(report, [name for name, value in given.items() if value is not None])
    check_asked(frozen, manifest)
    if frozen is not None and against is None and len(paths) == 1:
        raise FreezekitError(
            "there is nothing to compare the frozen layers with",
            where="frozen",
            got="no base file",
            remedy="give the checkpoint that training started from as well (--against BASE)",
        )
    limits = Limits.NONE if no_limits else Limits.DEFAULT

    def read(file: str) -> StateTable:
        return read_checkpoint(file, root, limits)

    told, label = None, ""
    if isinstance(manifest, Manifest):
        told, label = manifest, "the manifest given"
    elif manifest is not None:
        told, label = (
            manifests.load_manifest(manifest),
            f"the manifest {printable(os.fsdecode(manifest), 200)}",
        )

    def judging(first: StateTable | None) -> trend.Judge:
        """Return what compares a checkpoint: with BASE, which is read once, or with the first of a run."""
        base = read_base(against, root, limits) if against is not None else None if told else first
        base = trend.kept(base) if base is not None and len(paths) > 1 else base

        def judge(table: StateTable, whole: bool) -> tuple[DriftReport, set[str]]:
            if told is not None:
                return _by_manifest(table, told, label, base, whole=whole)
            assert base is not None
            own = None if frozen is not None else manifests.manifest_of(table)
            if own is not None and own.tensors:
                return _by_manifest(table, own, "the manifest inside it", base, whole=whole)
            report, names = _against(table, base, frozen, whole=whole)
            if whole and against is None:
                report = replace(report, findings=(*report.findings, *health(table)))
            return report, names

        return judge

    if len(paths) > 1:
        with_base = against is not None or told is not None
        return trend.audit_run(paths, read, judging, with_base=with_base, notes=notes)
    table = read(paths[0])
    if against is None and told is None:
        return saved.with_report_inside(_alone(table), table)
    if table.report is not None:
        table.notes += ("the report of its training inside it was not used; without options it is",)
    return judging(None)(table, True)[0]


def read_base(against: _Path, root: str | None = None, limits: Limits = Limits.DEFAULT) -> StateTable:
    """Read what a checkpoint is compared with: a file, or published weights.

    Args:
        against: a path, or what :func:`freezekit.audit.pretrained.find_weights` knows.
        root: which state in it, if it holds one there.
        limits: caps on what it may cost.
    """
    path, label = find_weights(against) or (against, None)
    try:
        table = read_checkpoint(path, root, limits)
    except SelectionError:
        table = read_checkpoint(path, None, limits)
    table.source = label or table.source
    return table


def _files_of(path: _Path | Iterable[_Path]) -> tuple[list[str], tuple[str, ...]]:
    """Return the files to audit, in order, and what is to be said of them."""
    if not isinstance(path, str | bytes | os.PathLike):
        paths = trend.run_order(list(dict.fromkeys(map(os.fsdecode, path))))
        if not paths:
            raise FreezekitError("no checkpoint was given", where="path", remedy="give one or more")
        if len(paths) > 1:
            return paths, ()
        path = paths[0]
    if not os.path.isdir(path):
        return [os.fsdecode(path)], ()
    run = find_run(path)
    return [checkpoint.path for checkpoint in run.checkpoints], run.notes


def _against(
    table: StateTable, base: StateTable, frozen: str | Iterable[str] | None, *, whole: bool
) -> tuple[DriftReport, set[str]]:
    """Compare with the file that training started from; of the rest, if the whole is asked for."""
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
    blind = [
        name
        for name in base
        if name in names and name in table and base[name].unsupported and table[name].unsupported
        and drift.compare_structure(name, base[name], table[name]) is None
    ]  # fmt: skip
    scope += f", but for {len(blind)} that cannot be compared" if blind else ""
    notes += tuple(blind_note(base, blind))
    names -= set(blind)
    compared, findings, changed = drift.compare(base, table, names, scatter=whole)
    counted = [layer.batches for layer in compared if layer.batches is not None]
    if counted and max(counted) < 0:
        notes += ("the base counted more batches than the checkpoint in every layer: are the two mixed up?",)
    if whole:
        findings += stale(base, table, () if frozen is None else names)
        notes += tuple(differing(base, table, names | absent | set(blind) | aligned.outside))
    report = DriftReport(
        table.source,
        base.source,
        scope,
        len(names),
        tuple(changed),
        tuple(compared),
        tuple(findings),
        notes,
    )
    return report, names


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
        return _by_manifest(table, own, "the manifest inside it", None, whole=True)[0]
    layers = tuple(drift.describe_layer(name, table) for name in table.norm_layers())
    notes = table.notes if layers else (*table.notes, "no layer keeps running statistics")
    notes += tuple(unjudged(table))
    notes = notes if own is None else (*notes, "by the manifest inside it nothing was frozen")
    return DriftReport(table.source, None, "statistics only", 0, (), layers, tuple(health(table)), notes)


def _by_manifest(
    table: StateTable, manifest: Manifest, label: str, base: StateTable | None, *, whole: bool
) -> tuple[DriftReport, set[str]]:
    """Compare with what a manifest says was frozen."""
    notes = table.notes
    if base is not None:
        aligned = align(table, base)
        table, base, notes = aligned.table, aligned.base, aligned.notes
    known, ties = manifests.known_in(manifest, label, table)
    outcome = manifests.compare(known, ties, table, base, scatter=whole)
    if base is not None and whole:
        notes += tuple(differing(base, table, known))
    report = DriftReport(
        table.source,
        label if base is None else base.source,
        f"as {label} says",
        len(outcome.names),
        tuple(outcome.changed),
        tuple(outcome.layers),
        tuple(outcome.findings),
        (*notes, *outcome.notes),
    )
    return report, outcome.names
