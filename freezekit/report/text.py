"""The report as a terminal table."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from itertools import groupby

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import CODES, CauseSummary, DriftReport, Finding, LayerDrift, Moment

__all__ = ["layout", "render"]

_MOST_ROWS = 500
"""How many layers are listed: more than a real model has, since a file may hold a million."""


def render(report: DriftReport, *, width: int = 100, terminal: bool = False) -> str:
    """Return the report as text.

    Args:
        report: the report.
        width: columns of the table.
        terminal: use the terminal's width instead, and colours if it has them.
    """
    out = Console(highlight=False)  # knows the terminal; nothing is printed on it
    if terminal and out.width >= 20:  # less is an odd COLUMNS
        width = out.width
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system=out.color_system if terminal else None,  # type: ignore[arg-type]
        force_terminal=terminal and out.is_terminal,
        legacy_windows=False,
    )
    console.print(layout(report), crop=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above
    if terminal and not out.encoding.startswith("utf"):
        text = text.replace("─", "-")
    return "\n".join(line.rstrip() for line in text.splitlines())


def layout(report: DriftReport) -> Group:
    """Return the report for a rich console: verdict, causes, layers, timeline, findings, notes."""
    against = f" against {printable(report.against, 200)}" if report.against else ""
    parts: list[RenderableType] = [
        _verdict(report),
        _line(f"{printable(report.source, 200)}{against}", "dim"),
    ]
    if report.against:
        parts.append(
            _line(
                f"frozen: {printable(report.scope, 400)} ({_count(report.compared, 'tensor')})",
                "dim",
            )
        )
    causes = report.by_cause
    if causes:
        parts += [Text(), Text("causes"), *(line for cause in causes.values() for line in _cause(cause))]
    shown = [layer for layer in report.layers if layer.changed or not report.against]
    if shown:
        parts += [Text(), _table(shown[:_MOST_ROWS])]
    if len(shown) > _MOST_ROWS:
        parts.append(Text(f"and {len(shown) - _MOST_ROWS} more: the JSON lists them", style="dim"))
    still = len(report.layers) - len(shown)
    if shown and still:
        parts.append(Text(f"{_count(still, 'other layer')} did not move", style="dim"))
    if worst := _worst(report.layers):
        parts += [Text(), _timeline(worst)]
    told = {cause.fix for cause in causes.values()}
    for code, group in groupby(sorted(report.findings, key=lambda finding: finding.code), lambda f: f.code):
        parts += [Text(), *_findings(code, list(group), told)]
    if report.notes:
        parts += [Text(), *(Text(f"note: {printable(note, 400)}", style="dim") for note in report.notes)]
    return Group(*parts)


def _line(text: str, style: str) -> Text:
    """One line whatever the width, so that it can be searched for in a log; a terminal wraps it by itself."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _verdict(report: DriftReport) -> Text:
    norms = f"{_count(len(report.layers), 'layer')} with running statistics"
    errors = [finding for finding in report.findings if finding.level == "error"]
    warnings = [finding for finding in report.findings if finding.level == "warning"]
    also = f", {_count(len(warnings), 'warning')}" if warnings else ""
    found = _count(len(errors), "finding") + also.replace(", ", " and ")
    if report.against is None:
        if report.clean:
            return _line(f"OK: {norms}{also}", "green")
        return _line(f"BAD: {found} in {norms}", "bold red")
    # what only a warning is about has the values that were frozen
    fine = {finding.name for finding in warnings} - {finding.name for finding in errors}
    changed = sum(name not in fine for name in report.changed)
    if any(finding.code.startswith("FK1") for finding in errors):
        moved = f", {sum(layer.changed for layer in report.layers)} of {norms}" if report.layers else ""
        text = f"DRIFT: {changed} of {report.compared} frozen tensors changed{moved}{also}"
        return _line(text, "bold red")
    if errors:
        # what a layer does (FK2xx) is no matter of running statistics
        where = "" if any(finding.code.startswith("FK2") for finding in errors) else f" in {norms}"
        text = f"BAD: {found}{where}; none of {report.compared} frozen tensors changed"
        return _line(text, "bold red")
    if not report.compared:
        text = "NOTHING TO COMPARE: the manifest has no digest of a tensor in the file"
        if report.scope.startswith("inferred"):
            text = "NOTHING TO COMPARE: no BN layer looks frozen; say what was frozen with --frozen"
        return _line(text, "yellow")
    text = f"CLEAN: none of {report.compared} frozen tensors changed ({norms}){also}"
    return _line(text, "green")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cause(cause: CauseSummary) -> list[RenderableType]:
    """Tell of a cause how much it moved, since when, where, and what to do about it."""
    struck = [_count(n, what) for n, what in ((cause.layers, "layer"), (cause.tensors, "tensor")) if n]
    since = "" if cause.step is None else f" since step {cause.step}"
    why = cause.example.cause
    detail = printable(why.detail, 300) if why else ""
    lines = [f"{cause.kind}: {' and '.join(struck)}{since}"]
    if detail:
        lines.append(f"  {printable(cause.example.name) or '(model)'}: {detail}")
    places = [place for place in map(printable, cause.places) if place not in detail]
    if places:
        more = f" and {_count(len(places) - 3, 'other place')}" if len(places) > 3 else ""
        lines.append(f"  at {', '.join(places[:3])}{more}")
    return [*map(_indented, lines), _indented(f"  fix: {cause.fix}")]


def _indented(text: str, style: str = "") -> Padding:
    bare = text.lstrip()
    return Padding(Text(bare, style=style), (0, 0, 0, 2 + len(text) - len(bare)), expand=False)


def _table(layers: list[LayerDrift]) -> Table:
    compared = any(layer.mean_shift_sigma is not None for layer in layers)
    kinds = {layer.kind for layer in layers}
    with_kind = len(kinds) > 1
    kind = "" if with_kind or kinds == {"BatchNorm"} else printable(layers[0].kind)  # a file does not say
    with_step = any(layer.step is not None for layer in layers)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column(f"layer\n({kind})" if kind else "layer", overflow="fold")
    if with_kind:
        table.add_column("kind")
    headers = ["channels", "batches tracked"]
    headers += ["mean shift\n(sigma)", "spread"] if compared else []
    headers += ["since\nstep"] if with_step else []
    for header in headers:
        table.add_column(header, justify="right")
    for layer in layers:
        counter = "-" if layer.num_batches_tracked is None else str(layer.num_batches_tracked)
        if layer.batches:
            counter += f" ({layer.batches:+d})"
        row = [printable(layer.name, 200) or "(model)", *([printable(layer.kind)] if with_kind else [])]
        row += [str(layer.channels), counter]
        if compared:
            row += [_shift(layer.mean_shift_sigma), _spread(layer.var_ratio)]
        if with_step:
            row.append("-" if layer.step is None else str(layer.step))
        table.add_row(*map(Text, row))
    return table


def _worst(layers: Sequence[LayerDrift]) -> list[LayerDrift]:
    """Return the layers whose timeline is worth showing: three that moved furthest, in the model's order."""
    moved = [layer for layer in layers if layer.changed and len(layer.timeline) > 1]
    furthest = sorted(moved, key=_distance, reverse=True)[:3]
    return [layer for layer in moved if any(layer is one for one in furthest)]


def _distance(layer: LayerDrift) -> float:
    return max(layer.mean_shift_sigma or 0.0, abs(math.log(max(layer.var_ratio or 1.0, 1e-300))))


def _timeline(layers: list[LayerDrift]) -> Table:
    """How the layers moved, at the same steps for each."""
    steps = sorted({moment.step for layer in layers for moment in layer.timeline})
    last = len(steps) - 1
    chosen = sorted({steps[round(last * k / (_COLUMNS - 1))] for k in range(_COLUMNS)})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("moved furthest" if len(layers) > 1 else "timeline", overflow="fold")
    table.add_column("at step", no_wrap=True)
    for step in chosen:
        table.add_column(str(step), justify="right")
    for layer in layers:
        start = 0 if layer.batches is None else (layer.num_batches_tracked or 0) - layer.batches
        moments = [_at(layer.timeline, step) for step in chosen]
        name = printable(layer.name, 200) or "(model)"
        table.add_row(Text(name), "mean shift", *(_shift(moment.mean_shift_sigma) for moment in moments))
        table.add_row("", "spread", *(_spread(moment.var_ratio) for moment in moments))
        counts = [moment.num_batches_tracked for moment in moments]
        if any(count is not None for count in counts):
            table.add_row("", "batches", *("-" if c is None else f"{c - start:+d}" for c in counts))
    return table


_COLUMNS = 6


def _at(timeline: tuple[Moment, ...], step: int) -> Moment:
    """Return how things were at a step: the last that is known by then."""
    known = (moment for moment in reversed(timeline) if moment.step <= step)
    return next(known, Moment(step, None, None, None))


def _shift(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _spread(value: float | None) -> str:
    return "-" if value is None else f"x{value:.3g}"


def _findings(code: str, findings: list[Finding], told: Collection[str]) -> list[RenderableType]:
    """Tell of the findings of a code, and of what to do that was not told yet."""
    meaning, level = CODES[code]
    count = f" ({len(findings)})" if len(findings) > 1 else ""
    lines: list[RenderableType] = [
        Text(f"{code} {meaning}{count}", style="red" if level == "error" else "yellow")
    ]
    # the table above already has a line for every layer that moved
    limit = 1 if code in ("FK101", "FK102") else 10
    for finding in findings[:limit]:
        at = "" if finding.step is None else f" since step {finding.step}"
        name = printable(finding.name) or "(model)"
        why = f"; cause: {finding.cause.kind}" if finding.cause else ""
        why = "" if why in finding.message else why
        lines.append(_indented(f"{name}{at}: {printable(finding.message, 1000)}{why}"))
    if len(findings) > limit:
        lines.append(_indented(f"and {len(findings) - limit} more", "dim"))
    fixes = [fix for fix in dict.fromkeys(finding.fix for finding in findings) if fix not in told]
    return [*lines, *(_indented(f"fix: {printable(fix, 1000)}") for fix in fixes[:3])]
