"""Reports that were saved: read from an untrusted file, and checked to say nothing that cannot be."""

from __future__ import annotations

import json
import os
import re
from typing import Any, BinaryIO

from freezekit.audit.checkpoint.container import SourceFile, guarded, printable
from freezekit.audit.findings import (
    CAUSES,
    CODES,
    UNITS,
    Cause,
    CheckpointDrift,
    DriftReport,
    Finding,
    LayerDrift,
    Moment,
)
from freezekit.audit.state import StateTable
from freezekit.errors import CheckpointError
from freezekit.jsonfile import Reader
from freezekit.report.json import SCHEMA_VERSION, plain_cause

__all__ = ["json_text", "load", "parse", "report_in", "with_report_inside"]

_MARK = "schema_version"
_READ = Reader(
    "report",
    "save the report again from the run, or copy the file again",
    max_bytes=32 * 2**20,
    max_text=100_000,
    max_digits=400,  # a damaged file's counter may be as large as a float
    fractions=True,
)
_MAX_STEP = 2**63


def parse(text: str) -> DriftReport:
    """As :meth:`DriftReport.from_json`."""
    content = _READ.mapping(_READ.parse(text), "it")
    if _MARK not in content or "findings" not in content:
        raise CheckpointError(
            f"not a freezekit report: no '{_MARK}' and 'findings' in it",
            remedy="give what report.save(path) wrote, or .to_json() returned",
        )
    version = content[_MARK]
    if type(version) is int and version > SCHEMA_VERSION:
        got = f"{_MARK} {str(version)[:20]}, {SCHEMA_VERSION} is known"
        raise CheckpointError("made by a newer freezekit", got=got, remedy="update freezekit")
    if type(version) is not int or version != SCHEMA_VERSION:
        _READ.refuse(f"its {_MARK} is {SCHEMA_VERSION}", version)
    _READ.keys(content, {*DriftReport.__dataclass_fields__, _MARK, "clean", "causes"}, set(), "it")
    report = DriftReport(
        source=_READ.text(content["source"], "source"),
        against=_READ.optional_text(content["against"], "against"),
        scope=_READ.text(content["scope"], "scope"),
        compared=_count(content["compared"], "compared"),
        changed=_texts(content["changed"], "changed"),
        layers=tuple(
            _layer(item, f"layer {n}") for n, item in enumerate(_READ.entries(content["layers"], "layers"))
        ),
        findings=tuple(
            _finding(item, f"finding {n}")
            for n, item in enumerate(_READ.entries(content["findings"], "findings"))
        ),
        notes=_texts(content["notes"], "notes"),
        checkpoints=tuple(
            _checkpoint(item, f"checkpoint {n}")
            for n, item in enumerate(_READ.entries(content["checkpoints"], "checkpoints"))
        ),
        unit=_unit(content["unit"]),
    )
    # what follows from the rest is in it for other programs, and must not say anything else
    if content["clean"] is not report.clean:
        _READ.refuse("'clean' is what its findings say", None)
    if _plain(content["causes"]) != _plain([plain_cause(cause) for cause in report.by_cause.values()]):
        _READ.refuse("its causes are those of its findings", None)
    return report


def load(path: str | os.PathLike[str]) -> DriftReport:
    """As :meth:`DriftReport.load`."""
    report = report_in(path)
    if report is None:
        raise CheckpointError(
            "not a saved report",
            where=printable(os.fsdecode(path), 1000),
            remedy="give what report.save(path) wrote",
        )
    return report


def report_in(path: str | os.PathLike[str]) -> DriftReport | None:
    """Return the report that a file is, told by its content, or ``None`` if it is something else.

    Args:
        path: any file.

    Raises:
        CheckpointError: it cannot be read, or is a report that is damaged or hostile.
    """
    source = os.fsdecode(path)
    if os.path.isdir(source):  # of checkpoints
        return None
    with guarded(printable(source, 1000)):
        file = SourceFile.at(source)
        with file.open() as stream:
            text = json_text(file, stream, _READ, f'"{_MARK}"')
        return None if text is None else parse(text)


def with_report_inside(own: DriftReport, table: StateTable) -> DriftReport:
    """Return the audit of a checkpoint with what the report of its training inside it says, if there is one.

    Of what both tell, the report's is kept: it says when and why.

    Args:
        own: what was found in the checkpoint.
        table: the checkpoint.

    Raises:
        CheckpointError: that report is damaged or hostile.
    """
    if table.report is None:
        return own
    with guarded(f"{printable(table.source, 1000)}, the report inside it"):
        live = parse(table.report)
    told = {(finding.code, finding.name) for finding in live.findings}
    layers = {layer.name: layer for layer in own.layers}
    layers |= {layer.name: layer for layer in live.layers if layer.changed or layer.name not in layers}
    changed = tuple(dict.fromkeys([*own.changed, *live.changed]))
    inside = f"the report inside it ({live.source})"
    return DriftReport(
        source=own.source,
        against=inside if own.against is None else f"{own.against} and {inside}",
        scope=live.scope if own.against is None else own.scope,
        compared=max(own.compared, live.compared, len(changed)),
        changed=changed,
        layers=tuple(layers.values()),
        findings=(*live.findings, *(f for f in own.findings if (f.code, f.name) not in told)),
        notes=(*own.notes, *live.notes),
    )


def json_text(file: SourceFile, stream: BinaryIO, reader: Reader, mark: str = "") -> str | None:
    """Return a file's text if it is JSON with a mark in it; otherwise ``None``, and the stream at its start.

    Args:
        file: the file.
        stream: the same, open and at its start.
        reader: what will parse it; says how long it may be.
        mark: text that is in every file of the kind looked for.

    Raises:
        CheckpointError: it is too long, or no UTF-8.
    """
    head = stream.read(4096)
    # a safetensors file's header, which is JSON too, comes after its length
    if b"\0" not in head[:64] and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        if file.size > reader.max_bytes:
            if mark.encode() in head:
                raise reader.too_long(file.size)
        else:
            raw = head + stream.read(file.size)
            if mark.encode() in raw:
                return reader.decode(raw)
    stream.seek(0)
    return None


def _layer(item: object, where: str) -> LayerDrift:
    fields = _READ.mapping(item, where)
    _READ.keys(fields, set(LayerDrift.__dataclass_fields__), set(), where)
    return LayerDrift(
        name=_READ.text(fields["name"], f"{where}'s name"),
        kind=_READ.text(fields["kind"], f"{where}'s kind"),
        channels=_count(fields["channels"], f"{where}'s channels"),
        num_batches_tracked=_whole(fields["num_batches_tracked"], f"{where}'s num_batches_tracked"),
        batches=_whole(fields["batches"], f"{where}'s batches"),
        mean_shift_sigma=_number(fields["mean_shift_sigma"], f"{where}'s mean_shift_sigma"),
        var_ratio=_number(fields["var_ratio"], f"{where}'s var_ratio"),
        changed=_READ.truth(fields["changed"], f"{where}'s 'changed'"),
        step=_step(fields["step"], where),
        timeline=_timeline(fields["timeline"], f"{where}'s timeline"),
        scatter=_scatter(fields["scatter"], f"{where}'s scatter"),
    )


def _timeline(item: object, where: str) -> tuple[Moment, ...]:
    rows = _rows(item, list(Moment.__dataclass_fields__), where)
    return tuple(
        Moment(
            step=_count(step, f"{where}'s step"),
            mean_shift_sigma=_number(shift, f"{where}'s mean_shift_sigma"),
            var_ratio=_number(ratio, f"{where}'s var_ratio"),
            num_batches_tracked=_whole(count, f"{where}'s num_batches_tracked"),
        )
        for step, shift, ratio, count in rows
    )


def _scatter(item: object, where: str) -> tuple[tuple[float, float], ...]:
    rows = _rows(item, ["mean_shift_sigma", "var_ratio"], where)
    return tuple((_known(shift, where), _known(ratio, where)) for shift, ratio in rows)


def _rows(item: object, names: list[str], where: str) -> list[tuple[Any, ...]]:
    """Return the rows of what is kept as columns."""
    columns = _READ.mapping(item, where)
    _READ.keys(columns, set(names), set(), where)
    lists = [_READ.entries(columns[name], f"{where}'s {name}") for name in names]
    if len(set(map(len, lists))) != 1:
        _READ.refuse(f"the lists of {where} are of the same length", None)
    return list(zip(*lists, strict=True))


def _checkpoint(item: object, where: str) -> CheckpointDrift:
    fields = _READ.mapping(item, where)
    _READ.keys(fields, set(CheckpointDrift.__dataclass_fields__), set(), where)
    return CheckpointDrift(
        source=_READ.text(fields["source"], f"{where}'s source"),
        step=_count(fields["step"], f"{where}'s step"),
        changed=_count(fields["changed"], f"{where}'s changed"),
        layers=_count(fields["layers"], f"{where}'s layers"),
        mean_shift_sigma=_number(fields["mean_shift_sigma"], f"{where}'s mean_shift_sigma"),
        var_ratio=_number(fields["var_ratio"], f"{where}'s var_ratio"),
    )


def _unit(value: object) -> str:
    unit = _READ.text(value, "unit")
    return unit if unit in UNITS else _READ.refuse(f"its unit is one of {', '.join(UNITS)}", unit)


def _finding(item: object, where: str) -> Finding:
    fields = _READ.mapping(item, where)
    _READ.keys(fields, {*Finding.__dataclass_fields__, "level"} - {"ranks"}, {"ranks"}, where)
    code = _READ.text(fields["code"], f"{where}'s code")
    if code not in CODES:
        if re.fullmatch(r"FK[0-9]{3}", code):
            raise CheckpointError(
                f"{where} has a code that this freezekit does not know", got=code, remedy="update freezekit"
            )
        _READ.refuse(f"{where}'s code is one of freezekit's", code)
    ranks = _READ.entries(fields.get("ranks", []), f"{where}'s ranks")  # not in the older ones
    finding = Finding(
        code=code,
        name=_READ.text(fields["name"], f"{where}'s name"),
        message=_READ.text(fields["message"], f"{where}'s message"),
        fix=_READ.text(fields["fix"], f"{where}'s fix"),
        step=_step(fields["step"], where),
        cause=None if fields["cause"] is None else _cause(fields["cause"], f"{where}'s cause"),
        ranks=tuple(_count(rank, f"{where}'s ranks") for rank in ranks),
    )
    if fields["level"] != finding.level:
        _READ.refuse(f"{where}'s level is that of {code}", fields["level"])
    return finding


def _cause(item: object, where: str) -> Cause:
    fields = _READ.mapping(item, where)
    _READ.keys(fields, set(Cause.__dataclass_fields__), set(), where)
    kind = _READ.text(fields["kind"], f"{where}'s kind")
    if kind not in CAUSES:
        _READ.refuse(f"{where} is of a kind that this freezekit knows", kind)
    detail = _READ.text(fields["detail"], f"{where}'s detail")
    return Cause(kind, detail, _READ.optional_text(fields["where"], f"{where}'s 'where'"))


def _texts(value: object, where: str) -> tuple[str, ...]:
    return tuple(_READ.text(item, f"an entry of {where}") for item in _READ.entries(value, where))


def _whole(value: object, where: str) -> int | None:
    if value is None or type(value) is int:
        return value
    return _READ.refuse(f"{where} is a whole number or null", value)


def _count(value: object, where: str) -> int:
    if type(value) is int and 0 <= value < _MAX_STEP:
        return value
    return _READ.refuse(f"{where} is a whole number from 0", value)


def _step(value: object, where: str) -> int | None:
    return None if value is None else _count(value, f"{where}'s step")


def _number(value: object, where: str) -> float | None:
    if value is None or type(value) is float:
        return value
    if type(value) is int and abs(value) < _MAX_STEP:
        return float(value)
    return _READ.refuse(f"{where} is a number or null", value)


def _known(value: object, where: str) -> float:
    number = _number(value, where)
    return _READ.refuse(f"{where} is numbers", None) if number is None else number


def _plain(value: Any) -> str:
    """Return JSON that is the same if the value is: with ``==``, true would equal 1."""
    return json.dumps(value, sort_keys=True)
