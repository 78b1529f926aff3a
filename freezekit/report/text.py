"""The report as a terminal table."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import DriftReport, LayerDrift
from freezekit.report import summary
from freezekit.report.summary import count, named

__all__ = ["layout", "render"]

_MOST_ROWS = 500
"""How many layers are listed: more than a real model has, since a file may hold a million."""

_MOST_CHECKPOINTS = 30
_MOST_NAMES = 6
_NARROW = 60
"""Columns of a terminal below which tables show less, so that no number is cut."""

_TONES = {"good": "green", "bad": "bold red", "unsure": "yellow"}


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
    console.print(layout(report, width), crop=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above
    if terminal and not out.encoding.startswith("utf"):
        text = text.replace("─", "-")
    return "\n".join(line.rstrip() for line in text.splitlines())


def layout(report: DriftReport, width: int = 100) -> Group:
    """Return the report for a rich console: verdict, causes, run, layers, timeline, findings, notes.

    Args:
        report: the report.
        width: columns of the console.
    """
    outcome = summary.verdict(report)
    against = f" against {printable(report.against, 200)}" if report.against else ""
    parts: list[RenderableType] = [
        _line(outcome.text, _TONES[outcome.tone]),
        _line(f"{printable(report.source, 200)}{against}", "dim"),
    ]
    if report.against:
        scope = printable(report.scope, 400)
        parts.append(_line(f"frozen: {scope} ({count(report.compared, 'tensor')})", "dim"))
    elif (counted := summary.counters(report.layers)) is not None:
        parts.append(_line(counted, "dim"))
    causes = report.by_cause.values()
    if causes:
        parts += [Text(), Text("causes")]
    for cause in causes:
        first, *more = summary.cause_lines(cause, report.unit)
        parts += [_indented(first), *(_indented(line, 4) for line in [*more, f"fix: {cause.fix}"])]
    if len(report.checkpoints) > 1:
        parts += [Text(), *_run(report, width)]
    shown = [layer for layer in report.layers if layer.changed]
    if shown:
        parts += [Text(), _table(shown[:_MOST_ROWS], report.unit, width)]
    if len(shown) > _MOST_ROWS:
        parts.append(Text(f"and {len(shown) - _MOST_ROWS} more: the JSON lists them", style="dim"))
    still = len(report.layers) - len(shown)
    if shown and still:
        parts.append(Text(f"{count(still, 'other layer')} did not move", style="dim"))
    if worst := _worst(report.layers):
        parts += [Text(), _timeline(worst, report, width)]
    for group in summary.by_code(report):
        parts += [Text(), *_findings(group, report.unit)]
    if report.notes:
        parts += [Text(), *(Text(f"note: {printable(note, 400)}", style="dim") for note in report.notes)]
    return Group(*parts)


def _line(text: str, style: str) -> Text:
    """One line whatever the width, so that it can be searched for in a log; a terminal wraps it by itself."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _indented(text: str, by: int = 2, style: str = "") -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, by), expand=False)


def _grid(*headers: str, numbers: Sequence[str]) -> Table:
    """Return an empty table: columns of words, then columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for header in headers:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right")
    return table


def _run(report: DriftReport, width: int) -> list[RenderableType]:
    """Tell of the checkpoints of a run, one a line."""
    headers = ["tensors\nchanged", "layers\nmoved", "mean shift\n(sigma)", "spread"]
    with_name = width >= _NARROW or report.unit == "checkpoint"
    table = _grid(*(["checkpoint"] if with_name else []), numbers=[report.unit, *headers])
    for one in summary.thinned(report.checkpoints, _MOST_CHECKPOINTS):
        row = [str(one.step), str(one.changed), str(one.layers)]
        row += [summary.shift(one.mean_shift_sigma), summary.spread(one.var_ratio)]
        table.add_row(*map(Text, [summary.short_source(one.source, report), *row] if with_name else row))
    parts: list[RenderableType] = [table]
    if (left := len(report.checkpoints) - _MOST_CHECKPOINTS) > 0:
        parts.append(Text(f"and {left} between them: the JSON lists them", style="dim"))
    when = summary.began(report)
    return [*parts, *([] if when is None else [Text(when)])]


def _table(layers: list[LayerDrift], unit: str, width: int) -> Table:
    compared = any(layer.mean_shift_sigma is not None for layer in layers)
    kind = summary.kind_of(layers)
    with_step = any(layer.step is not None for layer in layers)
    roomy = width >= _NARROW
    headers = ["channels"] if roomy else []
    headers += ["batches tracked"] if roomy or not compared else []
    headers += ["mean shift\n(sigma)", "spread"] if compared else []
    headers += [f"since\n{unit}"] if with_step else []
    words = ["layer", "kind"] if kind is None else [f"layer\n({kind})" if kind else "layer"]
    rows = []
    for layer in layers:
        row = [named(layer.name, 200), *([printable(layer.kind)] if kind is None else [])]
        row += [str(layer.channels)] if roomy else []
        row += [summary.batches(layer)] if roomy or not compared else []
        row += [summary.shift(layer.mean_shift_sigma), summary.spread(layer.var_ratio)] if compared else []
        row += ["-" if layer.step is None else str(layer.step)] if with_step else []
        rows.append(row)
    table = _grid(*words, numbers=headers)
    columns = list(zip([*words, *headers], *rows, strict=True))[1:]
    others = (max(len(line) for cell in column for line in cell.split("\n")) + 2 for column in columns)
    room = width - sum(others)
    for name, *cells in rows:
        table.add_row(*map(Text, [_parted(name, room), *cells]))
    return table


def _parted(name: str, room: int) -> str:
    """Break a name that is longer than there is room, after a dot where that helps."""
    lines = [""]
    for part in name.split("."):
        joined = f"{lines[-1]}.{part}" if lines[-1] else part
        if lines[-1] and len(joined) >= room:
            lines[-1] += "."
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)


def _worst(layers: Sequence[LayerDrift]) -> list[LayerDrift]:
    """Return the layers whose timeline is worth showing: three that moved furthest, in the model's order."""
    moved = [layer for layer in layers if layer.changed and len(layer.timeline) > 1]
    first = summary.furthest(moved)[:3]
    return [layer for layer in moved if any(layer is one for one in first)]


def _timeline(layers: list[LayerDrift], report: DriftReport, width: int) -> Table:
    """How the layers moved, at the same steps for each."""
    chosen = summary.steps_shown(report, layers, 6 if width >= 70 else 3 if width >= 50 else 2)
    title = "moved furthest" if len(layers) > 1 else "timeline"
    table = _grid(title, f"at {report.unit}", numbers=[str(step) for step in chosen])
    table.columns[1].no_wrap = True
    for layer in layers:
        start = 0 if layer.batches is None else (layer.num_batches_tracked or 0) - layer.batches
        moments = [summary.moment_at(layer, step) for step in chosen]
        shifts = (summary.shift(moment.mean_shift_sigma) for moment in moments)
        table.add_row(Text(named(layer.name, 200)), "mean shift", *shifts)
        table.add_row("", "spread", *(summary.spread(moment.var_ratio) for moment in moments))
        counts = [moment.num_batches_tracked for moment in moments]
        if any(known is not None for known in counts):
            table.add_row("", "batches", *("-" if c is None else f"{c - start:+d}" for c in counts))
    return table


def _findings(group: summary.CodeGroup, unit: str) -> list[RenderableType]:
    """Tell of the findings of a code, and of what to do that was not told yet."""
    style = "red" if group.level == "error" else "yellow"
    lines: list[RenderableType] = [Text(f"{group.code} {group.title}", style=style)]
    # the table above already has a line for every layer that moved
    limit = 1 if group.code in ("FK101", "FK102") else 10
    said = summary.alike(group, unit)
    for names, what in said[:limit]:
        lines.append(_indented(f"{_briefly(names)}{what}"))
    if left := sum(len(names) for names, _ in said[limit:]):
        lines.append(_indented(f"and {left} more", style="dim"))
    return [*lines, *(_indented(f"fix: {fix}") for fix in group.fixes)]


def _briefly(names: Sequence[str]) -> str:
    """Name a few layers or tensors of which the same is said, and count the rest."""
    shown = ", ".join(named(name) for name in names[:_MOST_NAMES])
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
