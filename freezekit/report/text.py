"""The report as a terminal table."""

from __future__ import annotations

import io
from itertools import groupby

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import CODES, DriftReport, Finding, LayerDrift

__all__ = ["layout", "render"]


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
    """Return the report for a rich console: verdict, layers, findings, notes."""
    against = f" against {printable(report.against, 200)}" if report.against else ""
    parts: list[RenderableType] = [
        _verdict(report),
        _line(f"{printable(report.source, 200)}{against}", "dim"),
    ]
    if report.against:
        parts.append(
            _line(
                f"frozen: {report.scope} ({report.compared} tensor{'' if report.compared == 1 else 's'})",
                "dim",
            )
        )
    shown = [layer for layer in report.layers if layer.changed or not report.against]
    if shown:
        parts += [Text(), _table(shown)]
    still = len(report.layers) - len(shown)
    if shown and still:
        parts.append(Text(f"{still} other layer{'s' if still > 1 else ''} did not move", style="dim"))
    for code, group in groupby(sorted(report.findings, key=lambda finding: finding.code), lambda f: f.code):
        parts += [Text(), *_findings(code, list(group))]
    if report.notes:
        parts += [Text(), *(Text(f"note: {printable(note, 400)}", style="dim") for note in report.notes)]
    return Group(*parts)


def _line(text: str, style: str) -> Text:
    """One line whatever the width, so that it can be searched for in a log; a terminal wraps it by itself."""
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _verdict(report: DriftReport) -> Text:
    moved = sum(layer.changed for layer in report.layers)
    norms = f"{len(report.layers)} layer{'' if len(report.layers) == 1 else 's'} with running statistics"
    if report.against is None:
        count = f"{len(report.findings)} finding{'' if len(report.findings) == 1 else 's'}"
        what = norms if report.clean else f"{count} in {norms}"
        return _line(f"{'OK' if report.clean else 'BAD'}: {what}", "green" if report.clean else "bold red")
    if not report.clean and not any(finding.code.startswith("FK1") for finding in report.findings):
        count = f"{len(report.findings)} finding{'' if len(report.findings) == 1 else 's'}"
        what = f"{count} in {norms}; none of {report.compared} frozen tensors changed"
        return _line(f"BAD: {what}", "bold red")
    if not report.clean:
        changed = f"{len(report.changed)} of {report.compared} frozen tensors changed"
        return _line(f"DRIFT: {changed}, {moved} of {norms}", "bold red")
    if not report.compared:
        text = "NOTHING TO COMPARE: the manifest has no digest of a tensor in the file"
        if report.scope.startswith("inferred"):
            text = "NOTHING TO COMPARE: no BN layer looks frozen; say what was frozen with --frozen"
        return _line(text, "yellow")
    return _line(f"CLEAN: none of {report.compared} frozen tensors changed ({norms})", "green")


def _table(layers: list[LayerDrift]) -> Table:
    compared = any(layer.mean_shift_sigma is not None for layer in layers)
    with_kind = any(layer.kind != "BatchNorm" for layer in layers)  # a file does not say
    with_step = any(layer.step is not None for layer in layers)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("layer", overflow="fold")
    if with_kind:
        table.add_column("kind")
    headers = ["channels", "batches tracked"]
    headers += ["mean shift\n(sigma)", "spread"] if compared else []
    headers += ["first at\nstep"] if with_step else []
    for header in headers:
        table.add_column(header, justify="right")
    for layer in layers:
        counter = "-" if layer.num_batches_tracked is None else str(layer.num_batches_tracked)
        if layer.batches:
            counter += f" ({layer.batches:+d})"
        row = [printable(layer.name, 200) or "(model)", *([layer.kind] if with_kind else [])]
        row += [str(layer.channels), counter]
        if compared:
            row.append("-" if layer.mean_shift_sigma is None else f"{layer.mean_shift_sigma:.3g}")
            row.append("-" if layer.var_ratio is None else f"x{layer.var_ratio:.3g}")
        if with_step:
            row.append("-" if layer.step is None else str(layer.step))
        table.add_row(*map(Text, row))
    return table


def _findings(code: str, findings: list[Finding]) -> list[RenderableType]:
    meaning, level = CODES[code]
    count = f" ({len(findings)})" if len(findings) > 1 else ""
    lines: list[RenderableType] = [
        Text(f"{code} {meaning}{count}", style="red" if level == "error" else "yellow")
    ]
    # the table above already has a line for every layer that moved
    limit = 1 if code in ("FK101", "FK102") else 10
    for finding in findings[:limit]:
        at = "" if finding.step is None else f" at step {finding.step}"
        lines.append(
            Padding(
                Text(f"{printable(finding.name) or '(model)'}{at}: {finding.message}"),
                (0, 0, 0, 2),
                expand=False,
            )
        )
    if len(findings) > limit:
        lines.append(
            Padding(Text(f"and {len(findings) - limit} more", style="dim"), (0, 0, 0, 2), expand=False)
        )
    lines.append(Padding(Text(f"fix: {findings[0].fix}"), (0, 0, 0, 2), expand=False))
    return lines
