"""The report as Markdown, for a pull request or a workflow's summary: at most what GitHub takes.

Names come from a file, so nothing in them works: no markup, no link, no mention of a person.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import DriftReport, LayerDrift
from freezekit.report import summary
from freezekit.report.summary import count, named

__all__ = ["MOST_CHARACTERS", "render"]

MOST_CHARACTERS = 65_536
"""How long a comment GitHub takes."""

_MOST_LAYERS = 20
_MOST_CHECKPOINTS = 20
_MOST_FINDINGS = 20
_MOST_NAMES = 10


def render(report: DriftReport) -> str:
    """Return the report as Markdown: the verdict, the worst layers, and the findings to unfold."""
    against = f" against {_code(report.against, 200)}" if report.against else ""
    blocks = [f"**{_text(summary.verdict(report).text)}**", f"{_code(report.source, 200)}{against}"]
    if report.against:
        blocks[-1] += f"  \nfrozen: {_text(printable(report.scope, 400))}"
        blocks[-1] += f" ({count(report.compared, 'tensor')})"
    for cause in report.by_cause.values():
        lines = [*summary.cause_lines(cause, report.unit), f"fix: {cause.fix}"]
        blocks.append("\n".join(("- " if not k else "  - ") + _text(line) for k, line in enumerate(lines)))
    if len(report.checkpoints) > 1:
        blocks += _run(report)
    blocks += _layers(report)
    blocks += [_details(group, report.unit) for group in summary.by_code(report)]
    blocks += [f"- note: {_text(printable(note, 400))}" for note in report.notes]
    return _within(blocks)


def _within(blocks: Sequence[str]) -> str:
    """Join the blocks that there is room for."""
    text, left = "", 0
    for block in blocks:
        fits = len(text) + len(block) < MOST_CHARACTERS - 100
        text += f"{block}\n\n" if fits else ""
        left += not fits
    if left:
        text += f"{count(left, 'part')} left out, since GitHub takes no more; the JSON has all of it."
    return text.rstrip() + "\n"


def _run(report: DriftReport) -> list[str]:
    headers = ["checkpoint", report.unit, "tensors changed", "layers moved", "mean shift (sigma)", "spread"]
    rows = [
        [
            _code(summary.short_source(one.source, report)),
            str(one.step),
            str(one.changed),
            str(one.layers),
            summary.shift(one.mean_shift_sigma),
            summary.spread(one.var_ratio),
        ]
        for one in summary.thinned(report.checkpoints, _MOST_CHECKPOINTS)
    ]
    left = len(report.checkpoints) - len(rows)
    when = [f"{left} checkpoints between them are left out."] if left else []
    when += [f"{began[0].upper()}{began[1:]}."] if (began := summary.began(report)) else []
    return [_table(headers, 1, rows), *([" ".join(when)] if when else [])]


def _layers(report: DriftReport) -> list[str]:
    """Return the table of the layers that moved furthest; without a comparison, of those with findings."""
    compared = report.against is not None
    concerned = {finding.name for finding in report.findings}
    layers = [layer for layer in report.layers if (layer.changed if compared else layer.name in concerned)]
    if not layers:
        return []
    shown = summary.furthest(layers)[:_MOST_LAYERS]
    with_step = any(layer.step is not None for layer in layers)
    headers = ["layer", "channels", "batches tracked"]
    headers += ["mean shift (sigma)", "spread"] if compared else []
    headers += [f"since {report.unit}"] if with_step else []
    blocks = [_table(headers, 1, [_row(layer, compared, with_step) for layer in shown])]
    more = [f"and {len(layers) - len(shown)} more"] if len(layers) > len(shown) else []
    still = len(report.layers) - len(layers)
    what = "did not move" if compared else "have no finding of their own"
    more += [f"{count(still, 'other layer')} {what}"] if still else []
    return [*blocks, *(["; ".join(more)] if more else [])]


def _row(layer: LayerDrift, compared: bool, with_step: bool) -> list[str]:
    row = [_code(named(layer.name, 120)), str(layer.channels), summary.batches(layer)]
    row += [summary.shift(layer.mean_shift_sigma), summary.spread(layer.var_ratio)] if compared else []
    return [*row, *(["-" if layer.step is None else str(layer.step)] if with_step else [])]


def _table(headers: Sequence[str], words: int, rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first columns are words and the others numbers."""
    rule = [":--" if k < words else "--:" for k in range(len(headers))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, rule, *rows])


def _details(group: summary.CodeGroup, unit: str) -> str:
    lines = []
    said = summary.alike(group, unit)
    for names, what in said[:_MOST_FINDINGS]:
        shown = ", ".join(_code(named(name, 120)) for name in names[:_MOST_NAMES])
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        lines.append(f"- {shown}{more}{_text(printable(what, 300))}")
    if left := sum(len(names) for names, _ in said[_MOST_FINDINGS:]):
        lines.append(f"- and {left} more")
    lines += [f"- fix: {_text(fix)}" for fix in group.fixes]
    listed = "\n".join(lines)
    # the blank line makes Markdown of what follows it
    return f"<details><summary>{group.code} {group.title} ({group.level})</summary>\n\n{listed}\n\n</details>"


def _code(text: str, limit: int = 120) -> str:
    """Return a name as code, where GitHub looks for no mention and no link."""
    shown = printable(text, limit)
    if "`" not in shown and "|" not in shown:
        return f"`{shown}`"
    # a backtick would end the code, a bar the table's cell
    return f"<code>{_entities(_broken(shown))}</code>"


def _text(text: str) -> str:
    """Return words from who knows where as words."""
    return _entities(_broken(text), " .,;:=()/-+%'")


def _broken(text: str) -> str:
    """Put a space of no width where GitHub would make a mention or a link, which entities do not stop."""
    return re.sub(r"(?i)[@#]|www|gh-|:(?=/)", lambda found: f"{found[0]}\u200b", text)


def _entities(text: str, plain: str = " ") -> str:
    return "".join(c if c.isalnum() or c in plain or c == "\u200b" else f"&#{ord(c)};" for c in text)
