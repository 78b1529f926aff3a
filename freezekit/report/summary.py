"""What a report says in every form, in the same words: verdict, numbers, what comes first. No rich here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeVar

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import CODES, CauseSummary, DriftReport, Finding, LayerDrift, Level, Moment

__all__ = [
    "CodeGroup",
    "Verdict",
    "alike",
    "batches",
    "began",
    "by_code",
    "cause_lines",
    "count",
    "counters",
    "furthest",
    "kind_of",
    "listed",
    "moment_at",
    "named",
    "shift",
    "short_source",
    "since",
    "spread",
    "steps_shown",
    "thinned",
    "verdict",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """The outcome in one sentence.

    Args:
        text: the sentence; its first word says it all.
        tone: whether that is good, bad, or no answer.
    """

    text: str
    tone: Literal["good", "bad", "unsure"]


def verdict(report: DriftReport) -> Verdict:
    """Return the outcome of an audit in one sentence, with its numbers.

    >>> verdict(DriftReport("a.pth", "b.pth", "as given", 9, (), (), ())).text
    'CLEAN: none of 9 frozen tensors changed (0 layers with running statistics)'
    """
    norms = f"{count(len(report.layers), 'layer')} with running statistics"
    errors = [finding for finding in report.findings if finding.level == "error"]
    warnings = [finding for finding in report.findings if finding.level == "warning"]
    also = f", {count(len(warnings), 'warning')}" if warnings else ""
    found = count(len(errors), "finding") + also.replace(", ", " and ")
    run = len(report.checkpoints) > 1
    if report.against is None:
        of = f" in the last of {len(report.checkpoints)} checkpoints" if run else ""
        if report.clean:
            return Verdict(f"OK: {norms}{of}{also}", "good")
        return Verdict(f"BAD: {found} in {norms}{of}", "bad")
    # what only a warning is about has the values that were frozen
    fine = {finding.name for finding in warnings} - {finding.name for finding in errors}
    changed = sum(name not in fine for name in report.changed)
    if any(finding.code.startswith("FK1") for finding in errors):
        moved = f", {sum(layer.changed for layer in report.layers)} of {norms}" if report.layers else ""
        first = next((one for one in report.checkpoints if one.changed), None)
        when = ""
        if run and first is not None:
            drifted = sum(one.changed > 0 for one in report.checkpoints)
            when = f", since {report.unit} {first.step} ({drifted} of {len(report.checkpoints)} checkpoints)"
        text = f"DRIFT: {changed} of {report.compared} frozen tensors changed{moved}{when}{also}"
        return Verdict(text, "bad")
    of = f" in {len(report.checkpoints)} checkpoints" if run else ""
    if errors:
        # what a layer does (FK2xx), and what other ranks have (FK5xx), is no matter of running statistics
        where = "" if any(f.code.startswith(("FK2", "FK5")) for f in errors) else f" in {norms}"
        return Verdict(f"BAD: {found}{where}; none of {report.compared} frozen tensors changed{of}", "bad")
    if not report.compared:
        text = "NOTHING TO COMPARE: the manifest has no digest of a tensor in the file"
        if report.scope.startswith("inferred"):
            text = "NOTHING TO COMPARE: no BN layer looks frozen; say what was frozen with --frozen"
        elif report.scope.startswith("as given"):
            text = "NOTHING TO COMPARE: what is named as frozen has no values that can be compared"
        return Verdict(text, "unsure")
    return Verdict(f"CLEAN: none of {report.compared} frozen tensors changed{of} ({norms}){also}", "good")


def began(report: DriftReport) -> str | None:
    """Say when drift began, as far as the checkpoints of a run tell; ``None`` where it did not."""
    run = report.checkpoints
    first = next((k for k, one in enumerate(run) if one.changed), None)
    if first is None or len(run) < 2:
        return None
    if first == 0:
        return f"drift began at or before {report.unit} {run[0].step}, the first of these checkpoints"
    return f"drift began between {report.unit} {run[first - 1].step} and {report.unit} {run[first].step}"


@dataclass(frozen=True)
class CodeGroup:
    """The findings of one code.

    Args:
        code: as in :data:`~freezekit.audit.findings.CODES`.
        findings: in the report's order.
        fixes: what to do, without what was told already.
    """

    code: str
    findings: tuple[Finding, ...]
    fixes: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the code means, and how many findings there are if more than one."""
        many = f" ({len(self.findings)})" if len(self.findings) > 1 else ""
        return f"{CODES[self.code][0]}{many}"

    @property
    def level(self) -> Level:
        """``"error"`` or ``"warning"``."""
        return CODES[self.code][1]


def by_code(report: DriftReport) -> list[CodeGroup]:
    """Return the findings by code; what to do about a known cause is told with the causes."""
    told = {cause.fix for cause in report.by_cause.values()}
    groups = []
    for code, found in groupby(sorted(report.findings, key=lambda one: one.code), lambda one: one.code):
        findings = tuple(found)
        fixes = [fix for fix in dict.fromkeys(one.fix for one in findings) if fix not in told]
        groups.append(CodeGroup(code, findings, tuple(printable(fix, 1000) for fix in fixes[:3])))
    return groups


def alike(group: CodeGroup, unit: str) -> list[tuple[list[str], str]]:
    """Return what the findings of a code say, each thing once, with the names that it is said of."""
    said: dict[str, list[str]] = {}
    for finding in group.findings:
        said.setdefault(f"{since(finding, unit)}: {listed(finding)}", []).append(finding.name)
    return [(names, what) for what, names in said.items()]


def counters(layers: Sequence[LayerDrift]) -> str | None:
    """Return what the layers counted: ``"batches tracked: 0 to 750"``; ``None`` where none did.

    >>> counters([LayerDrift("bn", "BatchNorm", 4, 7)])
    'batches tracked: 7'
    """
    known = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    some = "" if len(known) == len(layers) else f" ({len(known)} of {count(len(layers), 'layer')})"
    return f"batches tracked: {low if low == high else f'{low} to {high}'}{some}"


def since(finding: Finding, unit: str) -> str:
    """Return since when a finding is known: ``" since step 7"``, or nothing."""
    return "" if finding.step is None else f" since {unit} {finding.step}"


def listed(finding: Finding) -> str:
    """Return a finding's message, and the kind of its cause if that is not in it."""
    why = f"; cause: {finding.cause.kind}" if finding.cause else ""
    return printable(finding.message, 1000) + ("" if why in finding.message else why)


def cause_lines(cause: CauseSummary, unit: str) -> list[str]:
    """Tell of a cause how much it moved, since when, an example with its evidence, and where it is."""
    struck = [count(n, what) for n, what in ((cause.layers, "layer"), (cause.tensors, "tensor")) if n]
    when = "" if cause.step is None else f" since {unit} {cause.step}"
    why = cause.example.cause
    detail = printable(why.detail, 300) if why else ""
    lines = [f"{cause.kind}: {' and '.join(struck)}{when}"]
    if detail:
        lines.append(f"{named(cause.example.name)}: {detail}")
    places = [place for place in map(printable, cause.places) if place not in detail]
    if places:
        more = f" and {count(len(places) - 3, 'other place')}" if len(places) > 3 else ""
        lines.append(f"at {', '.join(places[:3])}{more}")
    return lines


def furthest(layers: Iterable[LayerDrift]) -> list[LayerDrift]:
    """Return layers by how far they moved, the furthest first."""
    return sorted(layers, key=_distance, reverse=True)


def _distance(layer: LayerDrift) -> float:
    return max(layer.mean_shift_sigma or 0.0, abs(math.log(max(layer.var_ratio or 1.0, 1e-300))))


def steps_shown(report: DriftReport, layers: Iterable[LayerDrift], most: int) -> list[int]:
    """Return the steps that a table of the course has columns for: some of those at which it is known.

    Args:
        report: the report.
        layers: whose course it is.
        most: how many columns there may be.
    """
    known = {moment.step for layer in layers for moment in layer.timeline}
    return thinned(sorted(known or {one.step for one in report.checkpoints}), most)


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Return so many of the items, evenly, with the first and the last.

    >>> thinned(range(9), 3)
    [0, 4, 8]
    """
    if len(items) <= most:
        return list(items)
    return [items[round((len(items) - 1) * k / (most - 1))] for k in range(most)]


def moment_at(layer: LayerDrift, step: int) -> Moment:
    """Return how a layer was at a step: the last that is known by then."""
    known = (moment for moment in reversed(layer.timeline) if moment.step <= step)
    return next(known, Moment(step, None, None, None))


def kind_of(layers: Sequence[LayerDrift]) -> str | None:
    """Return the class of the layers for a table's head, ``""`` for that of files, ``None`` for several."""
    kinds = {layer.kind for layer in layers}
    if len(kinds) > 1:
        return None
    return printable("".join(kinds - {"BatchNorm"}))  # a file does not say


def named(name: str, limit: int = 80) -> str:
    """Return a layer's or tensor's name as it can be shown; the model itself has none."""
    return printable(name, limit) or "(model)"


def short_source(source: str, report: DriftReport) -> str:
    """Return a checkpoint's file without the folder that all of a run lie in."""
    folders = [os.path.dirname(one.source) + "/" for one in report.checkpoints]
    shared = os.path.commonprefix(folders)  # noqa: RUF071  # cut back to a folder's end in the next line
    return printable(source[shared.rfind("/") + 1 :], 200)


def batches(layer: LayerDrift) -> str:
    """Return a layer's counter, and how far it moved: ``"924 (+750)"``."""
    counter = "-" if layer.num_batches_tracked is None else str(layer.num_batches_tracked)
    return f"{counter} ({layer.batches:+d})" if layer.batches else counter


def count(number: int, what: str) -> str:
    """Return a number of things: ``"1 layer"``, ``"2 layers"``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def shift(value: float | None) -> str:
    """Return a mean shift in three digits."""
    return "-" if value is None else f"{value:.3g}"


def spread(value: float | None) -> str:
    """Return a ratio of spreads in three digits."""
    return "-" if value is None else f"x{value:.3g}"
