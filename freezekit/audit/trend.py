"""Many checkpoints of one run: when each layer began to move, how fast, and how it went. Never imports torch.

Each file is read by itself and dropped again; of each only how far its frozen part had moved is kept.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.folders import natural, place_of
from freezekit.audit.course import Point, course
from freezekit.audit.findings import CheckpointDrift, DriftReport, Finding, LayerDrift, Moment
from freezekit.audit.state import STATS, StateTable, joined
from freezekit.audit.timeline import Timeline
from freezekit.errors import CheckpointError, FreezekitError

__all__ = ["Judge", "audit_run", "kept", "run_order"]

Judge = Callable[[StateTable, bool], tuple[DriftReport, set[str]]]
"""Compares a checkpoint with the base; tells what differs outside the frozen part if asked to. Returns the
report and the names of the frozen tensors."""

_MOST = 2**63
#: elements of a tensor that is kept
_SMALL = 2**14
#: of their tensors, by name and shape, checkpoints of one run have nearly all in common
_COMMON = 0.75


@dataclass(frozen=True)
class _Look:
    """What is kept of a checkpoint.

    Args:
        path: the file.
        source: the same for messages.
        step: of the checkpoint, by which timelines refer to it.
        report: the comparison, of its layers only those that moved.
        names: what counts as frozen by it.
        marks: by layer that moved, what is the same in two checkpoints if it did not move in between.
    """

    path: str
    source: str
    step: int
    report: DriftReport
    names: frozenset[str]
    marks: dict[str, int]


def run_order(paths: Sequence[str]) -> list[str]:
    """Return paths in the order in which they are meant.

    A shell lists ``epoch_10`` before ``epoch_9``: what is sorted so is sorted by the numbers in the names.
    Any other order is somebody's, and is kept.

    >>> run_order(["e_1.pt", "e_10.pt", "e_9.pt"]), run_order(["b.pt", "a.pt"])
    (['e_1.pt', 'e_9.pt', 'e_10.pt'], ['b.pt', 'a.pt'])
    """
    return sorted(paths, key=natural) if list(paths) == sorted(paths) else list(paths)


def audit_run(
    paths: Sequence[str],
    read: Callable[[str], StateTable],
    judging: Callable[[StateTable | None], Judge],
    *,
    with_base: bool,
    notes: tuple[str, ...] = (),
) -> DriftReport:
    """Audit the checkpoints of a run: the report of the last, with the course of each layer that moved.

    They are put in order by the steps that the files tell, or else their names; by the epochs; or as given.
    A file that cannot be read is left out and told of, unless it is the last: the verdict is on that one.

    Args:
        paths: the files, in the order given.
        read: reads one.
        judging: makes what compares a checkpoint, from the first of the run where there is no other base.
        with_base: whether there is another.
        notes: what was said of the files already.

    Raises:
        CheckpointError: the last file, or every one, cannot be read; or one does not exist.
        FreezekitError: a file is of another model.
    """
    files = _Files(read)
    if with_base:
        judge = judging(None)
    else:
        for path in paths:
            files.open(path)
        files.check(paths)
        judge = judging(read(_ordered(list(files.places), files.places)[0][0][0]))
    looks: dict[str, _Look] = {}
    for path in paths:
        look = files.look(path, judge)
        if look is not None:
            looks[path] = look
    files.check(paths)
    order, unit = _ordered(list(looks), files.places)
    run, copies = _without_copies([replace(looks[path], step=step) for path, step in order], unit)
    told = [f"left out, as it could not be read: {error}" for error in files.unreadable.values()]
    last, _ = judge(read(run[-1].path), True)
    return _merged(run, unit, last, (*told, *notes, *copies), with_base)


def kept(base: StateTable) -> StateTable:
    """Return the base such that what is small in it is read once: statistics and weights of norm layers."""
    return base.with_tensors(
        [
            tensor
            if tensor.unsupported or tensor.numel > _SMALL
            else replace(tensor, read=functools.cache(tensor.read))
            for tensor in base.values()
        ]
    )


class _Files:
    """Opens the files of a run, and keeps of each when it was and of what model."""

    def __init__(self, read: Callable[[str], StateTable]) -> None:
        self._read = read
        self._models: dict[int, tuple[Counter[tuple[str, tuple[int, ...]]], list[str]]] = {}
        self.unreadable: dict[str, CheckpointError] = {}
        self.places: dict[str, tuple[int | None, int | None]] = {}

    def open(self, path: str) -> StateTable | None:
        """Return the table, or ``None`` where it cannot be read."""
        if path in self.unreadable:
            return None
        try:
            table = self._read(path)
        except CheckpointError as error:
            if not os.path.lexists(path):
                raise
            self.unreadable[path] = error
            return None
        if path not in self.places:
            self.places[path] = _place(path, table)
            # without what a wrapper puts before the names
            known = Counter((".".join(name.rsplit(".", 2)[-2:]), t.shape) for name, t in table.items())
            self._models.setdefault(hash(frozenset(known.items())), (known, []))[1].append(path)
        return table

    def look(self, path: str, judge: Judge) -> _Look | None:
        """Return what is kept of a checkpoint, or ``None`` where it, or a value in it, cannot be read."""
        table = self.open(path)
        if table is None:
            return None
        try:
            return _look(path, table, judge)
        except CheckpointError as error:
            self.unreadable[path] = error
            return None

    def check(self, paths: Sequence[str]) -> None:
        """Raise the error of the last file, or one that tells the file of another model."""
        if paths and paths[-1] in self.unreadable:
            raise self.unreadable[paths[-1]]
        most, same = max(self._models.values(), key=lambda model: len(model[1]))
        for known, odd in self._models.values():
            common, every = (known & most).total(), max(known.total(), most.total())
            if common < _COMMON * every:
                raise FreezekitError(
                    "not of the same model as the other checkpoints",
                    where=printable(odd[0], 1000),
                    got=f"{common} of {every} tensors in common with {printable(same[0], 200)}",
                    remedy="give the checkpoints of one run",
                )


def _place(path: str, table: StateTable) -> tuple[int | None, int | None]:
    """Return the step and the epoch of a checkpoint: as the file tells them, or its name."""
    told = zip((table.training.step, table.training.epoch), place_of(path), strict=True)
    step, epoch = (named if own is None or not 0 <= own < _MOST else own for own, named in told)
    return step, epoch


def _look(path: str, table: StateTable, judge: Judge) -> _Look:
    report, names = judge(table, False)
    moved = tuple(layer for layer in report.layers if layer.changed)
    marks = {layer.name: _mark(layer) for layer in moved}
    return _Look(path, table.source, 0, replace(report, layers=moved, notes=()), frozenset(names), marks)


def _mark(layer: LayerDrift) -> int:
    """Return what two checkpoints have in common where the layer is the same in both."""
    return hash((layer.num_batches_tracked, layer.mean_shift_sigma, layer.var_ratio))


def _ordered(
    paths: list[str], places: dict[str, tuple[int | None, int | None]]
) -> tuple[list[tuple[str, int]], str]:
    """Return the paths in the order of training, each with its step, and what that counts."""
    for index, unit in enumerate(("step", "epoch")):
        at = {path: step for path in paths if (step := places[path][index]) is not None}
        if len(at) == len(paths):
            return sorted(at.items(), key=lambda item: item[1]), unit
    return [(path, number) for number, path in enumerate(paths, 1)], "checkpoint"


def _without_copies(run: list[_Look], unit: str) -> tuple[list[_Look], list[str]]:
    """Leave out, of checkpoints of one step that do not differ in what is compared, all but the first."""
    kept: list[_Look] = []
    notes: list[str] = []
    for look in run:
        twin = next((one for one in kept if _copies(one, look)), None) if unit != "checkpoint" else None
        if twin is None:
            kept.append(look)
            continue
        names = (printable(os.path.basename(os.path.normpath(one.path)), 200) for one in (look, twin))
        notes.append(
            "left out {}: of the same {unit} as {}, and the same in all that is compared".format(
                *names, unit=unit
            )
        )
    return kept, notes


def _copies(one: _Look, other: _Look) -> bool:
    if (one.step, one.names, one.marks) != (other.step, other.names, other.marks):
        return False
    return (one.report.layers, one.report.findings) == (other.report.layers, other.report.findings)


def _merged(
    run: list[_Look], unit: str, last: DriftReport, notes: tuple[str, ...], with_base: bool
) -> DriftReport:
    """Return the report of the last checkpoint, with what the others say about when."""
    names = frozenset.intersection(*(look.names for look in run))
    looks = [_within(look, names) for look in run]
    moved = [{layer.name: layer for layer in look.report.layers} for look in looks]
    findings, since = _told(looks, moved, unit)
    findings += [finding for finding in last.findings if finding.code.startswith("FK4")]
    layers = []
    for layer in last.layers:
        if layer.name in since:
            timeline = _timeline(layer, looks, moved)
            layers.append(replace(layer, changed=True, step=since[layer.name], timeline=timeline))
        else:
            layers.append(replace(layer, changed=False, scatter=()))
    kept = sum(joined(layer.name, STATS[0]) in names for layer in layers)
    scope = last.scope
    if scope.startswith("inferred"):
        scope = f"inferred: {kept} of {len(layers)} BN layers kept their parameters bit for bit"
    scope += f" in all {len(run)} checkpoints" + ("" if with_base else ", of which the first is the base")
    return replace(
        last,
        scope=scope,
        compared=len(names),
        changed=tuple(dict.fromkeys(name for look in reversed(looks) for name in look.report.changed)),
        layers=tuple(layers),
        findings=tuple(findings),
        notes=(*notes, *_released(run[not with_base :], names, unit), *last.notes),
        checkpoints=tuple(map(_summary, looks)),
        unit=unit,
    )


def _within(look: _Look, names: frozenset[str]) -> _Look:
    """Return what a checkpoint says of the tensors that count as frozen in all of them."""
    frozen = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in STATS}
    report = replace(
        look.report,
        changed=tuple(name for name in look.report.changed if name in names),
        layers=tuple(layer for layer in look.report.layers if layer.name in frozen),
        findings=tuple(
            finding
            for finding in look.report.findings
            if finding.code.startswith("FK1") and (finding.name in names or finding.name in frozen)
        ),
    )
    return replace(look, report=report)


def _told(
    looks: list[_Look], moved: list[dict[str, LayerDrift]], unit: str
) -> tuple[list[Finding], dict[str, int]]:
    """Return a finding for each layer or tensor that moved in any checkpoint, and since when each had."""
    found: dict[tuple[str, str], dict[int, Finding]] = {}
    for k in range(len(looks) - 1, -1, -1):  # the last one's first, in their order
        for finding in looks[k].report.findings:
            what = "statistics" if finding.code in ("FK101", "FK102") else finding.code
            found.setdefault((what, finding.name), {})[k] = finding
    findings, since = [], {}
    for (_, name), seen in found.items():
        points = [
            Point(look.step, False, None, 0.0) if k not in seen else _point(look, seen[k], moved[k].get(name))
            for k, look in enumerate(looks)
        ]
        # the furthest, where the last is back: what it was is in no other place
        at = max(seen, key=lambda k: (seen[k].code == "FK101", k == len(looks) - 1, points[k].shift or 0.0))
        message = seen[at].message
        if at != len(looks) - 1:
            message += f" at {unit} {looks[at].step:,}"
        since[name] = looks[min(seen)].step
        message = f"{message}; {course(points, unit)}" if len(looks) > 1 else message
        findings.append(replace(seen[at], message=message, step=since[name]))
    return findings, since


def _point(look: _Look, finding: Finding, layer: LayerDrift | None) -> Point:
    if layer is None:
        return Point(look.step, True, hash(finding.message))
    mark = look.marks[layer.name] if layer.mean_shift_sigma is not None else None
    return Point(look.step, True, mark, layer.mean_shift_sigma, layer.num_batches_tracked)


def _timeline(last: LayerDrift, looks: list[_Look], moved: list[dict[str, LayerDrift]]) -> tuple[Moment, ...]:
    """Return how a layer was at each checkpoint."""
    timeline = Timeline()
    known = [layer for one in moved if (layer := one.get(last.name)) is not None]
    counts = [one.num_batches_tracked for one in known if one.batches == 0]
    counts += [now - one.batches for one in known if one.batches and (now := one.num_batches_tracked)]
    for look, there in zip(looks, moved, strict=True):
        layer = there.get(last.name)
        if layer is None:
            moment = Moment(look.step, 0.0, 1.0, counts[0] if counts else None)
        else:
            moment = Moment(look.step, layer.mean_shift_sigma, layer.var_ratio, layer.num_batches_tracked)
        timeline.record(last.name, moment)
    return timeline.of(last.name)


def _summary(look: _Look) -> CheckpointDrift:
    layers = look.report.layers
    shifts = [layer.mean_shift_sigma for layer in layers if layer.mean_shift_sigma is not None]
    ratios = [layer.var_ratio for layer in layers if layer.var_ratio is not None]
    return CheckpointDrift(
        look.source,
        look.step,
        len(look.report.changed),
        len(layers),
        max(shifts, default=None if layers else 0.0),
        max(ratios, key=lambda ratio: abs(math.log(ratio or 1e-300)), default=None if layers else 1.0),
    )


def _released(run: list[_Look], names: frozenset[str], unit: str) -> list[str]:
    """Tell of layers that count as frozen in the first checkpoints only: they were unfrozen later."""
    layers: dict[str, int] = {}
    shifts = []
    for name in sorted(run[0].names - names):
        layer, _, own = name.rpartition(".")
        if own == STATS[0]:
            until = next(k for k, look in enumerate(run) if name not in look.names)
            layers[layer] = run[until].step
            seen = [one for look in run[:until] for one in look.report.layers if one.name == layer]
            shifts += [one.mean_shift_sigma or 0.0 for one in seen]
    if not layers:
        return []
    shown = ", ".join(f"{layer} at {unit} {step:,}" for layer, step in list(layers.items())[:3])
    shown += ", ..." if len(layers) > 3 else ""
    before = f"; before that their mean had moved by up to {max(shifts):.3g} sigma" if shifts else ""
    told = "1 layer was" if len(layers) == 1 else f"{len(layers)} layers were"
    return [f"{told} not frozen to the end, and not judged: {shown}{before}"]
