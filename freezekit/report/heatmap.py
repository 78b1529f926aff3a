"""The heat map of a page: a row a layer, a column a checkpoint, coloured by how far the mean has moved."""

from __future__ import annotations

from bisect import bisect_right
from html import escape
from itertools import pairwise

from freezekit.audit.findings import DriftReport, LayerDrift, Moment
from freezekit.report import summary
from freezekit.report.summary import named

__all__ = ["render"]

_MOST_ROWS = 200
_MOST_COLUMNS = 24
_WIDE = 12
"""Up to how many columns leave room for a number in each cell."""

_EDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Where one colour ends and the next begins, in sigma: half a decade each."""


def render(report: DriftReport) -> str:
    """Return the section, or nothing where nothing was compared or no layer moved."""
    moved = [layer for layer in report.layers if layer.changed or layer.mean_shift_sigma or layer.timeline]
    if report.against is None or not moved:
        return ""
    worst = {id(layer) for layer in summary.furthest(moved)[:_MOST_ROWS]}
    rows = [layer for layer in moved if id(layer) in worst]
    steps = summary.steps_shown(report, rows, _MOST_COLUMNS)
    if len(steps) < 2:
        steps = []
    left = []
    if len(moved) > len(rows):
        left.append(f"The {len(rows)} layers that moved furthest; {len(moved) - len(rows)} more moved less.")
    if still := len(report.layers) - len(moved):
        left.append(f"{summary.count(still, 'layer')} did not move.")
    if any(not layer.changed for layer in rows):
        left.append("What is in italics is not frozen.")
    what = f"{report.unit}s" if steps else "the comparison"
    lead = f"Rows are layers in the model's order, columns {what}. {' '.join(left)}"
    if not steps:
        lead = f"Layers in the model's order. {' '.join(left)}"
    # a single column would leave most of the page empty
    size = len(rows) if steps or len(rows) <= 12 else -(-len(rows) // 3)
    maps = "".join(_map(rows[k : k + size], steps, report.unit) for k in range(0, len(rows), size))
    key = _key('class="hx"' in maps)
    return (
        '<section><h2 id="map">How far each layer has moved</h2>'
        f'<p class="lead">Colour is the largest shift of a mean, in standard deviations. {lead}</p>'
        f'{key}<div class="card scroll" tabindex="0" role="region" aria-labelledby="map">'
        f'<div class="maps">{maps}</div></div>'
        '<p class="readout js-only" id="readout" role="status">Point at a cell for its numbers.</p>'
        "</section>\n"
    )


def _key(unknown: bool) -> str:
    texts = [f"below {_EDGES[0]:g}"]
    texts += [f"{low:g} to {high:g}" for low, high in pairwise(_EDGES)]
    texts.append(f"{_EDGES[-1]:g} sigma and more")
    items = [("h0", "did not move"), *((f"h{k}", text) for k, text in enumerate(texts, 1))]
    if unknown:
        items.append(("hx", "not known"))
    return f'<ul class="key">{"".join(f"<li><i class={c}></i>{t}</li>" for c, t in items)}</ul>'


def _map(layers: list[LayerDrift], steps: list[int], unit: str) -> str:
    wide = len(steps) <= _WIDE
    heads = "".join(f'<th scope="col">{step}</th>' for step in steps) or '<th scope="col">sigma</th>'
    corner = f"<th>{unit}</th>" if steps else "<td></td>"
    rows = "".join(_row(layer, steps, unit, wide) for layer in layers)
    return (
        f'<table class="map{" wide" if wide else ""}"><thead><tr>{corner}{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>\n"
    )


def _row(layer: LayerDrift, steps: list[int], unit: str, wide: bool) -> str:
    name = escape(named(layer.name, 80))
    now = Moment(0, layer.mean_shift_sigma, layer.var_ratio, layer.num_batches_tracked)
    moments = [(f", {unit} {step}", _at(layer, step)) for step in steps] or [("", now)]
    cells = [
        f'<td class="{_class(moment)}" title="{name}{when}: {_numbers(moment)}">'
        f"{summary.shift(moment.mean_shift_sigma) if wide else ''}</td>"
        for when, moment in moments
    ]
    start = "<tr>" if layer.changed else '<tr class="free">'
    return f'{start}<th scope="row" class="name" title="{name}">{name}</th>{"".join(cells)}</tr>\n'


def _at(layer: LayerDrift, step: int) -> Moment:
    """Return how a layer was at a step; before it was seen to move, it had not."""
    if layer.step is not None and step < layer.step:
        return Moment(step, 0.0, 1.0, None)
    if not layer.timeline and layer.step is None:
        return Moment(step, layer.mean_shift_sigma, layer.var_ratio, layer.num_batches_tracked)
    return summary.moment_at(layer, step)


def _class(moment: Moment) -> str:
    shift = moment.mean_shift_sigma
    if shift is None:
        return "hx"
    return f"h{bisect_right(_EDGES, abs(shift)) + 1}" if shift else "h0"


def _numbers(moment: Moment) -> str:
    if moment.mean_shift_sigma is None and moment.var_ratio is None:
        return "not known"
    shown = f"{summary.shift(moment.mean_shift_sigma)} sigma, spread {summary.spread(moment.var_ratio)}"
    counter = moment.num_batches_tracked
    return shown if counter is None else f"{shown}, {counter} batches tracked"
