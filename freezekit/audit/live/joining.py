"""Findings and what moved, put together: which tensor a finding is of, and what earlier reports told."""

from __future__ import annotations

from dataclasses import replace

from freezekit.audit.findings import DriftReport, Finding
from freezekit.audit.live.change import Change
from freezekit.audit.live.region import Place
from freezekit.audit.state import STATS

__all__ = ["by_owner", "continued", "is_of"]


def by_owner(changes: list[Change]) -> dict[str, list[Place]]:
    """Return the places of what changed, by their names and by those of their layers."""
    found: dict[str, list[Place]] = {}
    for place in (change.place for change in changes):
        for called in {place.name, place.name.rpartition(".")[0]}:
            found.setdefault(called, []).append(place)
    return found


def is_of(finding: Finding, place: Place) -> bool:
    """Tell whether a finding is of what is at a place: of a layer, its statistics, not its weight."""
    return finding.name == place.name or finding.code == "FK203" or place.role in STATS


def continued(earlier: DriftReport, report: DriftReport) -> DriftReport:
    """Return a report with what was found before the auditor was renewed; of what both tell, the first."""
    told = {(finding.code, finding.name) for finding in earlier.findings}
    layers = {layer.name: layer for layer in earlier.layers}
    layers |= {now.name: now for now in report.layers if now.changed or not layers.get(now.name, now).changed}
    return replace(
        report,
        changed=tuple(dict.fromkeys([*earlier.changed, *report.changed])),
        layers=tuple(layers.values()),
        findings=(*earlier.findings, *(f for f in report.findings if (f.code, f.name) not in told)),
        notes=tuple(dict.fromkeys([*earlier.notes, *report.notes])),
    )
