"""The report as JSON, for other programs, and to keep: :meth:`DriftReport.from_json` reads it back.

Strict JSON (RFC 8259, no NaN), ASCII, the keys in this order, a layer or finding a line. ``schema.json``
beside this module says the same as a JSON Schema; ``freezekit audit --schema`` prints it.

=====================  ================================================================================
``schema_version``     1; a higher one is of a newer freezekit
``clean``              whether no finding has the level ``"error"``
``source``             what was audited: a file, or a model and how many steps it has trained
``against``            what it was compared with, or null
``scope``              how it was told what is frozen, in words
``compared``           number of tensors in the frozen part
``changed``            names of those that differ
``causes``             the findings that have a cause, counted by its kind: see below
``layers``             the layers with running statistics, in the model's order: see below
``findings``           what is wrong, in the model's order: see below
``checkpoints``        the checkpoints of a run, where several were audited: see below
``notes``              what else a reader should know
``unit``               what ``step`` counts: ``"step"``, ``"epoch"`` or ``"checkpoint"`` (files, from 1)
=====================  ================================================================================

Of each entry of ``causes``, in the order in which they were first seen:

=====================  ================================================================================
``kind``               ``"train-mode forward"`` and so on: a key of ``freezekit.audit.findings.CAUSES``
``findings``           how many findings it has
``layers``             how many layers they are of
``tensors``            how many tensors, where they are not of a layer as a whole
``step``               the first optimizer step after which one was seen, or null
``places``             the lines of the user's code that did it, as far as known
``example``            ``name``, ``detail`` and ``where`` of the first of them
``fix``                what to do about it
=====================  ================================================================================

Of each of ``layers``:

=====================  ================================================================================
``name``               the layer
``kind``               its class (``"BatchNorm"`` where a file does not say)
``channels``           number of channels
``num_batches_tracked``  its counter now, or null
``batches``            how far the counter moved, or null
``mean_shift_sigma``   largest |Δmean| / sqrt(var_before + eps) over the channels, or null
``var_ratio``          the sqrt((var_after + eps) / (var_before + eps)) furthest from 1, or null
``changed``            whether it counts as frozen and a bit of its statistics or counter differs
``step``               the optimizer step after which that was first seen, or null
``timeline``           how it went, oldest first: lists of the same length (256 at most in a live audit) of
                       ``step``, and ``mean_shift_sigma``, ``var_ratio``, ``num_batches_tracked`` as they
                       were then
``scatter``            of each channel, where known: lists of the same length of ``mean_shift_sigma`` with
                       its sign, and ``var_ratio``
=====================  ================================================================================

Of each of ``findings``:

=====================  ================================================================================
``code``               ``"FK101"`` and so on
``level``              ``"error"`` or ``"warning"``
``name``               the layer or tensor
``message``            what was seen
``fix``                what to do about it
``step``               the optimizer step after which it was first seen, or null
``cause``              null, or ``kind``, ``detail`` (the evidence) and ``where`` (the user's line, or null)
``ranks``              the processes concerned (FK5xx); empty where none were compared
=====================  ================================================================================

Of each of ``checkpoints``, the last of which is ``source``:

=====================  ================================================================================
``source``             the file
``step``               the number by which timelines and findings refer to it
``changed``            how many frozen tensors differ from the base
``layers``             how many layers with running statistics moved
``mean_shift_sigma``   the largest of the layers', or null
``var_ratio``          the one furthest from 1 of the layers', or null
=====================  ================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from freezekit.audit.findings import CauseSummary, DriftReport, Finding, LayerDrift, Moment
from freezekit.report import part

__all__ = ["SCHEMA_VERSION", "plain_cause", "render", "schema"]

SCHEMA_VERSION = 1


def render(report: DriftReport) -> str:
    """Return the report as JSON."""
    facts = {
        "schema_version": SCHEMA_VERSION,
        "clean": report.clean,
        "source": report.source,
        "against": report.against,
        "scope": report.scope,
        "compared": report.compared,
        "changed": report.changed,
    }
    rows = {
        "causes": map(plain_cause, report.by_cause.values()),
        "layers": map(_layer, report.layers),
        "findings": map(_finding, report.findings),
        "checkpoints": map(asdict, report.checkpoints),
    }
    lines = [f'"{key}": {_dumps(value)}' for key, value in facts.items()]
    lines += [f'"{key}": {_lines(values)}' for key, values in rows.items()]
    lines += [f'"notes": {_dumps(report.notes)}', f'"unit": {_dumps(report.unit)}']
    return "{\n" + ",\n".join(lines) + "\n}\n"


def schema() -> str:
    """Return the JSON Schema (2020-12) of reports, as text."""
    return part("schema.json")


def plain_cause(cause: CauseSummary) -> dict[str, Any]:
    """Return what is said of a kind of cause."""
    why = cause.example.cause
    return {
        "kind": cause.kind,
        "findings": cause.findings,
        "layers": cause.layers,
        "tensors": cause.tensors,
        "step": cause.step,
        "places": list(cause.places),
        "example": {
            "name": cause.example.name,
            "detail": why.detail if why else "",
            "where": why.where if why else None,
        },
        "fix": cause.fix,
    }


def _layer(layer: LayerDrift) -> dict[str, Any]:
    """Return a layer, its timeline by column: half as long, and as plotting wants it."""
    moments = layer.timeline
    columns = {key: [getattr(moment, key) for moment in moments] for key in Moment.__dataclass_fields__}
    shifts, ratios = map(list, zip(*layer.scatter, strict=True)) if layer.scatter else ([], [])
    scatter = {"mean_shift_sigma": shifts, "var_ratio": ratios}
    return {**asdict(replace(layer, timeline=(), scatter=())), "timeline": columns, "scatter": scatter}


def _finding(finding: Finding) -> dict[str, Any]:
    return {"code": finding.code, "level": finding.level, **asdict(finding)}


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    """Return a list with an entry a line, so that two reports can be compared by line."""
    text = ",\n".join(map(_dumps, rows))
    return f"[\n{text}\n]" if text else "[]"


def _dumps(value: object) -> str:
    return json.dumps(value, allow_nan=False)
