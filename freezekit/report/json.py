"""The report as JSON, for other programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from freezekit.audit.findings import DriftReport

__all__ = ["SCHEMA_VERSION", "render"]

SCHEMA_VERSION = 1


def render(report: DriftReport) -> str:
    """Return the report as JSON: strict (no NaN), ASCII (safe in any terminal), keys in a fixed order."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "clean": report.clean,
        "source": report.source,
        "against": report.against,
        "scope": report.scope,
        "compared": report.compared,
        "changed": list(report.changed),
        "layers": [asdict(layer) for layer in report.layers],
        "findings": [
            {**asdict(finding), "level": finding.level, "message": finding.message}
            for finding in report.findings
        ],
        "notes": list(report.notes),
    }
    return json.dumps(content, indent=2, allow_nan=False)
