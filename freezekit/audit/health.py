"""Judges the running statistics of one state by themselves (FK4xx)."""

from __future__ import annotations

from collections import Counter

import numpy as np

from freezekit.audit.findings import Finding
from freezekit.audit.state import StateTable, counter_value, joined

__all__ = ["gone_bad", "health"]

_FIXES = {
    "FK401": "restore the statistics from the base checkpoint, or recalibrate them on clean data",
    "FK402": "restore the statistics from the base checkpoint: a variance cannot be negative",
    "FK403": "calibrate the layer, or load the weights this file was meant to hold",
    "FK404": "harmless if part of the model was frozen; otherwise the file mixes two models",
}


@np.errstate(invalid="ignore")  # a damaged file may hold a signalling NaN
def health(table: StateTable) -> list[Finding]:
    """Judge the running statistics of one state by themselves (FK4xx)."""
    findings: list[Finding] = []
    counters: dict[str, int] = {}
    for layer in table.norm_layers():
        mean = table[joined(layer, "running_mean")]
        var = table[joined(layer, "running_var")]
        if mean.unsupported or var.unsupported:
            continue  # the notes say so
        means, variances = mean.values(), var.values()
        bad = int((~np.isfinite(means)).sum() + (~np.isfinite(variances)).sum())
        if bad:
            findings.append(
                _finding("FK401", layer, f"{bad} of {means.size + variances.size} values are NaN or infinite")
            )
        negative = int((variances < 0).sum())
        if negative:
            findings.append(
                _finding(
                    "FK402",
                    layer,
                    f"{negative} of {variances.size} variances are negative, down to {variances.min():.3g}",
                )
            )
        counter = counter_value(table.get(joined(layer, "num_batches_tracked")))
        if counter is not None:
            counters[layer] = counter
        if means.size and not means.any() and bool((variances == 1).all()):
            seen = "" if counter is None else f" (num_batches_tracked is {counter})"
            findings.append(_finding("FK403", layer, f"running_mean is all 0 and running_var all 1{seen}"))
    if len(set(counters.values())) > 1:
        # Named after the odd ones out, since most layers agree in any real file.
        common, _ = Counter(counters.values()).most_common(1)[0]
        odd = [layer for layer, count in counters.items() if count != common]
        shown = ", ".join(f"{layer}: {counters[layer]}" for layer in odd[:3]) + (
            ", ..." if len(odd) > 3 else ""
        )
        findings.append(
            _finding("FK404", odd[0], f"{len(odd)} of {len(counters)} layers differ from {common} ({shown})")
        )
    return findings


def gone_bad(before: StateTable, after: StateTable) -> list[Finding]:
    """Return NaN, infinity and negative variances that were not there before."""
    known = {(finding.code, finding.name) for finding in health(before)}
    found = [finding for finding in health(after) if finding.code in ("FK401", "FK402")]
    return [finding for finding in found if (finding.code, finding.name) not in known]


def _finding(code: str, name: str, message: str) -> Finding:
    return Finding(code, name, message, _FIXES[code])
