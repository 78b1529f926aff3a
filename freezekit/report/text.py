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


def render(report: DriftReport, width: int = 100) -> str:
    """Return the report as plain text of at most ``width`` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(layout(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above
    return "\n".join(line.rstrip() for line in text.splitlines())


def layout(report: DriftReport) -> Group:
    """Return the report for a rich console: verdict, layers, findings, notes."""
    against = f" against {printable(report.against, 200)}" if report.against else ""
    parts: list[RenderableType] = [
        _verdict(report),
        Text(f"{printable(report.source, 200)}{against}", style="dim", no_wrap=True, overflow="ignore"),
    ]
    if report.against:
        parts.append(Text(f"frozen: {report.scope} ({report.compared} tensors)", style="dim"))
    shown = [layer for layer in report.layers if layer.changed or not report.against]
    if shown:
        parts += [Text(), _table(shown, compared=report.against is not None)]
    still = len(report.layers) - len(shown)
    if shown and still:
        parts.append(Text(f"{still} other layer{'s' if still > 1 else ''} did not move", style="dim"))
    for code, group in groupby(sorted(report.findings, key=lambda finding: finding.code), lambda f: f.code):
        parts += [Text(), *_findings(code, list(group))]
    if report.notes:
        parts += [Text(), *(Text(f"note: {printable(note, 400)}", style="dim") for note in report.notes)]
    return Group(*parts)


def _verdict(report: DriftReport) -> Text:
    moved = sum(layer.changed for layer in report.layers)
    norms = f"{len(report.layers)} layer{'' if len(report.layers) == 1 else 's'} with running statistics"
    if report.against is None:
        what = norms if report.clean else f"{len(report.findings)} findings in {norms}"
        return Text(
            f"{'OK' if report.clean else 'BAD'}: {what}", style="green" if report.clean else "bold red"
        )
    if report.clean and not report.compared:
        text = "NOTHING TO COMPARE: no BN layer looks frozen; say what was frozen with --frozen"
        return Text(text, style="yellow")
    if report.clean:
        return Text(f"CLEAN: none of {report.compared} frozen tensors changed ({norms})", style="green")
    text = f"DRIFT: {len(report.changed)} of {report.compared} frozen tensors changed, {moved} of {norms}"
    return Text(text, style="bold red")


def _table(layers: list[LayerDrift], *, compared: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("channels", justify="right")
    table.add_column("batches tracked", justify="right")
    stepped = any(layer.step is not None for layer in layers)
    if compared:
        table.add_column("mean shift", justify="right")
        table.add_column("spread", justify="right")
    if stepped:
        table.add_column("first at step", justify="right")
    for layer in layers:
        counter = "-" if layer.num_batches_tracked is None else str(layer.num_batches_tracked)
        if layer.batches:
            counter += f" ({layer.batches:+d})"
        row = [printable(layer.name) or "(model)", layer.kind, str(layer.channels), counter]
        if compared:
            row.append("-" if layer.mean_shift_sigma is None else f"{layer.mean_shift_sigma:.3g} sigma")
            row.append("-" if layer.var_ratio is None else f"x{layer.var_ratio:.3g}")
        if stepped:
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
