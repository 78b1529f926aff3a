"""The report as a page: one file that needs no network, shows names as text, and works without its script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from html import escape
from typing import Any

from freezekit import __version__
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import DriftReport, Finding, LayerDrift
from freezekit.report import heatmap, part, summary
from freezekit.report.summary import count, named

__all__ = ["render"]

_MOST_ROWS = 1000
_MOST_CHECKPOINTS = 200
_MOST_FINDINGS = 200
"""Of a code; ten are seen at once."""

_MOST_DOTS = 100_000
"""Channels in all the scatter plots: those of a ResNet-152 and more, in about 1.5 MB."""

_MOST_DOTS_OF_ONE = 5000


def render(report: DriftReport) -> str:
    """Return the report as HTML: verdict, findings, course, heat map, channels, layers."""
    outcome = summary.verdict(report)
    word, _, sentence = outcome.text.partition(": ")
    style, script = part("page.css"), part("page.js")
    # nothing but these two, whatever else should get into the page
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [
        _facts(report),
        _tiles(report),
        _causes(report),
        _findings(report),
        _course(report),
        heatmap.render(report),
        _channels(report),
        _layers(report),
        _notes(report),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(word)}: {_text(report.source, 80)} (freezekit)</title>
<style>{style}</style>
</head>
<body>
<main>
<p class="eyebrow">freezekit audit</p>
<h1><b class="{outcome.tone}">{escape(word.capitalize())}</b> {_sentence(sentence)}</h1>
{"".join(sections)}</main>
<footer>Made by freezekit {__version__}. <code>freezekit explain CODE</code> tells more of a finding.</footer>
<script>{script}</script>
</body>
</html>
"""


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sentence(text: str) -> str:
    return escape(text[:1].upper() + text[1:])


def _text(text: str, limit: int = 200) -> str:
    return escape(printable(text, limit))


def _code(text: str, limit: int = 200) -> str:
    return f"<code>{_text(text, limit)}</code>"


def _facts(report: DriftReport) -> str:
    facts = [("Audited", _code(report.source))]
    if len(report.checkpoints) > 1:
        facts[0] = ("Audited", f"{len(report.checkpoints)} checkpoints, the last is {_code(report.source)}")
    if report.against:
        facts += [
            ("Against", _code(report.against)),
            ("Frozen", f"{_text(report.scope, 400)} ({count(report.compared, 'tensor')})"),
        ]
    if began := summary.began(report):
        facts.append(("Course", _sentence(began)))
    if causes := list(report.by_cause.values()):
        facts.append(("Cause", ", ".join(escape(cause.kind) for cause in causes)))
    shown = "".join(f"<dt>{label}</dt><dd>{value}</dd>\n" for label, value in facts)
    return f'<dl class="facts">\n{shown}</dl>\n'


def _tiles(report: DriftReport) -> str:
    """Return the numbers that matter most, large."""
    layers = report.layers
    if report.against is None:
        concerned = len({finding.name for finding in report.findings})
        tiles = [
            (f"{len(layers)}", "layers with running statistics"),
            (f"{sum(layer.channels for layer in layers):,}", "channels"),
            (f"{concerned}", "named in findings"),
        ]
    else:
        moved = [layer for layer in layers if layer.changed]
        tiles = [
            (f"{len(report.changed):,} of {report.compared:,}", "frozen tensors changed"),
            (f"{len(moved):,} of {len(layers):,}", "layers with running statistics moved"),
        ]
        if moved:
            shifts = [layer.mean_shift_sigma for layer in moved if layer.mean_shift_sigma is not None]
            worst = max(moved, key=lambda layer: layer.mean_shift_sigma or 0.0)
            name = f'<span class="name">{escape(named(worst.name, 40))}</span>'
            tiles.append(
                (f"{summary.shift(max(shifts, default=None))} sigma", f"largest shift of a mean: {name}")
            )
    shown = "".join(f'<div class="tile"><b>{number}</b><span>{what}</span></div>\n' for number, what in tiles)
    return f'<div class="tiles">\n{shown}</div>\n'


def _causes(report: DriftReport) -> str:
    cards = []
    for cause in report.by_cause.values():
        first, *more = summary.cause_lines(cause, report.unit)
        lines = "".join(f"<p>{escape(line)}</p>" for line in more)
        fix = f'<p class="fix"><b>Fix:</b> {escape(cause.fix)}</p>'
        cards.append(f'<div class="card"><h3>{escape(first)}</h3>{lines}{fix}</div>\n')
    return f"<section><h2>Causes</h2>\n{''.join(cards)}</section>\n" if cards else ""


def _findings(report: DriftReport) -> str:
    cards = []
    for group in summary.by_code(report):
        items = [_finding(one, report.unit) for one in group.findings[:_MOST_FINDINGS]]
        at_once = 3 if group.code in ("FK101", "FK102") else 10  # the table has those as well
        shown, more = items[:at_once], items[at_once:]
        listed = f"<ul>{''.join(shown)}</ul>"
        if more:
            left = len(group.findings) - len(items)
            rest = f"<li>and {left} more: the JSON lists them</li>" if left else ""
            summed = f"<summary>{len(group.findings) - len(shown)} more</summary>"
            listed += f"<details>{summed}<ul>{''.join(more)}{rest}</ul></details>"
        fixes = "".join(f'<p class="fix"><b>Fix:</b> {escape(fix)}</p>' for fix in group.fixes)
        title = f'<span class="{group.level}">{group.code}</span> {escape(group.title)}'
        title += ' <span class="dim">warning</span>' if group.level == "warning" else ""
        cards.append(f'<div class="card long"><h3 id="{group.code}">{title}</h3>{listed}{fixes}</div>\n')
    return f"<section><h2>Findings</h2>\n{''.join(cards)}</section>\n" if cards else ""


def _finding(finding: Finding, unit: str) -> str:
    when = summary.since(finding, unit)
    return f"<li>{_code(finding.name or '(model)')}{when}: {escape(summary.listed(finding))}</li>"


def _course(report: DriftReport) -> str:
    if len(report.checkpoints) < 2:
        return ""
    heads = [
        report.unit.capitalize(),
        "Checkpoint",
        "Tensors changed",
        "Layers moved",
        "Mean shift (sigma)",
        "Spread",
    ]
    shown = summary.thinned(report.checkpoints, _MOST_CHECKPOINTS)
    rows = [
        [
            _number(one.step),
            f'<th scope="row">{_code(summary.short_source(one.source, report))}</th>',
            _number(one.changed),
            _number(one.layers),
            _number(one.mean_shift_sigma, summary.shift(one.mean_shift_sigma)),
            _number(one.var_ratio, summary.spread(one.var_ratio)),
        ]
        for one in shown
    ]
    left = len(report.checkpoints) - len(shown)
    lead = f"{left} checkpoints between them are left out; the JSON has them." if left else ""
    if began := summary.began(report):
        lead = f"{_sentence(began)}. {lead}"
    table = _table("course", heads, {1}, [("", row) for row in rows])
    return f'<section><h2 id="course">The run</h2><p class="lead">{lead}</p>{table}</section>\n'


def _layers(report: DriftReport) -> str:
    """Return the table of layers; without a comparison, what is said of each in place of its drift."""
    if not report.layers:
        return ""
    compared = report.against is not None
    worst = {id(layer) for layer in summary.furthest(report.layers)[:_MOST_ROWS]}
    codes: dict[str, list[str]] = {}
    for finding in report.findings:
        codes.setdefault(finding.name, []).append(finding.code)
    if not compared:  # those with findings first; sorting keeps the order of the rest
        first = sorted(report.layers, key=lambda layer: layer.name not in codes)[:_MOST_ROWS]
        worst = {id(layer) for layer in first}
    kind = summary.kind_of(report.layers)
    with_kind = kind is None
    with_step = any(layer.step is not None for layer in report.layers)
    heads = ["#", "Layer", *(["Kind"] if with_kind else []), "Channels", "Batches tracked"]
    heads += ["Mean shift (sigma)", "Spread"] if compared else []
    heads += [f"Since {report.unit}"] if with_step else []
    heads += ["Findings"]
    words = {1, len(heads) - 1, *([2] if with_kind else [])}
    rows = []
    for k, layer in enumerate(report.layers, 1):
        if id(layer) not in worst:
            continue
        cells = [_number(k), f'<th scope="row">{_code(layer.name or "(model)")}</th>']
        cells += [f"<td>{_text(layer.kind, 80)}</td>"] if with_kind else []
        cells += [_number(layer.channels), _number(layer.num_batches_tracked, summary.batches(layer))]
        if compared:
            cells += [_number(layer.mean_shift_sigma, summary.shift(layer.mean_shift_sigma))]
            cells += [_number(layer.var_ratio, summary.spread(layer.var_ratio))]
        cells += [_number(layer.step)] if with_step else []
        found = dict.fromkeys(codes.get(layer.name, ()))
        links = (f'<a href="#{code}">{code}</a>' for code in found)
        cells += [f"<td>{' '.join(links)}</td>"]
        rows.append(("" if layer.changed or not compared else "same", cells))
    left = len(report.layers) - len(rows)
    what = "that moved furthest" if compared else "with findings first"
    lead = f"The {len(rows)} {what}; {left} more are left out, the JSON has them. " if left else ""
    lead += f"All are {escape(kind)}." if kind else ""
    table = _table("layers", heads, words, rows, sortable=True)
    return f'<section><h2 id="layers">Layers</h2><p class="lead">{lead}</p>{table}</section>\n'


def _number(value: float | None, shown: str | None = None) -> str:
    """Return a cell with a number as it is shown, and as it is for sorting."""
    if value is None:
        return '<td class="n">-</td>'
    return f'<td class="n" data-v="{value!r}">{value if shown is None else shown}</td>'


def _table(
    label: str,
    heads: list[str],
    words: set[int],
    rows: Iterable[tuple[str, list[str]]],
    *,
    sortable: bool = False,
) -> str:
    """Return a table that scrolls in a box of its own; all its columns but those of words are numbers."""
    head = "".join(
        f'<th scope="col"{"" if k in words else " class=n"}>{text}</th>' for k, text in enumerate(heads)
    )
    body = "".join(f"<tr{f' class={kind}' if kind else ''}>{''.join(cells)}</tr>\n" for kind, cells in rows)
    return (
        f'<div class="card long scroll" tabindex="0" role="region" aria-labelledby="{label}">'
        f'<table class="list{" sortable" if sortable else ""}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _channels(report: DriftReport) -> str:
    """Return the scatter plots' section: their data, which the script draws."""
    chosen: list[LayerDrift] = []
    dots = 0
    known = [layer for layer in summary.furthest(report.layers) if layer.scatter]
    for layer in known:
        dots += min(len(layer.scatter), _MOST_DOTS_OF_ONE)
        if dots > _MOST_DOTS and chosen:
            break
        chosen.append(layer)
    if not chosen:
        return ""
    left = len(known) - len(chosen)
    lead = "A dot is a channel: how far its mean went, and by how much its standard deviation grew or shrank."
    lead += f" {left} layers that moved less are left out; the JSON has them." if left else ""
    data = json.dumps([_dots(layer) for layer in chosen], allow_nan=False, separators=(",", ":"))
    # as text of a script element nothing is escaped but what could end it, or begin another
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return (
        f'<section id="channels"><h2>Channels</h2><p class="lead">{lead}</p>'
        '<p class="js-none">The plots need the script of this page.</p>'
        '<div class="card js-only"><div class="plot"><div><label for="layer">Layer, furthest first</label>'
        '<select id="layer"></select><svg role="img"></svg><p class="dim said"></p></div>'
        '<div class="thumbs"></div></div></div>'
        f'<script type="application/json" id="data">{data}</script></section>\n'
    )


def _dots(layer: LayerDrift) -> dict[str, Any]:
    dots = list(layer.scatter)
    if len(dots) > _MOST_DOTS_OF_ONE:
        dots = sorted(dots, key=lambda dot: abs(dot[0]), reverse=True)[:_MOST_DOTS_OF_ONE]
    return {
        "n": named(layer.name),
        "c": layer.channels,
        "m": summary.shift(layer.mean_shift_sigma),
        "v": summary.spread(layer.var_ratio),
        "s": [_rounded(shift) for shift, _ in dots],
        "r": [_rounded(ratio) for _, ratio in dots],
    }


def _rounded(value: float) -> float:
    return float(f"{min(max(value, -1e300), 1e300):.3g}")  # the largest of all would round to infinity


def _notes(report: DriftReport) -> str:
    if not report.notes:
        return ""
    items = "".join(f"<li>{_text(note, 400)}</li>" for note in report.notes)
    return f'<section><h2>Notes</h2><div class="card"><ul>{items}</ul></div></section>\n'
