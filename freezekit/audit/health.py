"""Judges the running statistics of one state by themselves (FK4xx)."""

from __future__ import annotations

from math import isfinite

import numpy as np
import numpy.typing as npt

from freezekit.audit.bits import pieces_of
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import Finding
from freezekit.audit.stale import feeders, trained_past
from freezekit.audit.state import StateTable, TensorState, decode, joined

__all__ = ["gone_bad", "health", "unjudged"]

Vector = npt.NDArray[np.float64]

_FIXES = {
    "FK105": "take the layer from a checkpoint that is right: no batch-norm layer has both",
    "FK401": "restore the statistics from the base checkpoint, or recalibrate them on clean data",
    "FK402": "restore the statistics from the base checkpoint: neither variances nor counts are negative",
    "FK403": "calibrate the layer, or load the weights this file was meant to hold",
    "FK404": "harmless if part of the model was frozen; otherwise the file mixes two models",
    "FK405": "nothing while the inputs are as in training; else set the weight of these channels to 0, or "
    "train them on data where they vary",
    "FK406": "find the batch or the step that did it and go back to a checkpoint before; for raw inputs of "
    "that size, scale them before the layer",
    "FK409": "nothing if it was trained so; otherwise calibrate it: freezekit.update_bn(loader, model)",
}

#: below any eps: only rounding, or the decay of a first value, leaves so little
_NO_VARIANCE = 1e-12
#: a file does not say the layer's own; this is torch's default
_EPS = 1e-5
#: of inputs to outputs; in real files channels without variance come to 4 at most
_MOST_GAIN = 100.0
_FLOAT16_MAX = 65504.0
_MOST_SIGMA = 1e3
_MOST_PARTS = 3
#: elements of the weights that are looked at: a layer has no more channels than 2**20
_MOST_OF_FILTERS, _MOST_OF_PARAMETER = 2**26, 2**20


@np.errstate(invalid="ignore")  # a damaged file may hold a signalling NaN
def health(table: StateTable) -> list[Finding]:
    """Judge the running statistics of one state by themselves (FK4xx)."""
    findings: list[Finding] = []
    counters: dict[str, int] = {}  # of the layers whose counter no other finding tells of
    feeding: dict[str, str] | None = None
    for layer in table.norm_layers():
        mean, var = (table[joined(layer, own)] for own in ("running_mean", "running_var"))
        if mean.numel != var.numel:
            sizes = f"running_mean has shape {list(mean.shape)} and running_var {list(var.shape)}"
            findings.append(_finding("FK105", layer, sizes))
        means, variances = _statistics(table, layer)
        if means is None or variances is None:
            continue  # unjudged() tells of it
        counter = table.count(layer)
        if counter is not None:
            counters[layer] = counter
        findings += _bad_counter(layer, table.get(joined(layer, "num_batches_tracked")), counter)
        if not means.size:
            continue
        # four numbers tell that nothing is wrong with most layers
        low, high, least, most = map(float, (means.min(), means.max(), variances.min(), variances.max()))
        if not (least >= 0 and isfinite(most) and isfinite(low) and isfinite(high)):
            findings += _bad(layer, means, variances)
            continue
        initial = (means == 0) & (variances == 1) if least <= 1 <= most else None
        if initial is not None and initial.any():
            findings.append(_untrained(table, layer, initial, counter))
            if counter == 0:
                del counters[layer]  # that is told with it
        if least < _NO_VARIANCE:
            feeding = feeders(table) if feeding is None else feeding
            findings += _without_variance(table, layer, feeding.get(layer), means, variances)
        size, sigma = max(-low, high), (most + _EPS) ** 0.5
        usual = _MOST_SIGMA * (least + _EPS) ** 0.5
        if size + 6 * sigma > _FLOAT16_MAX or max(size, sigma) > 0.99 * usual:  # more than rounding may hide
            findings += _out_of_range(layer, means, variances)
    if len(set(counters.values())) > 1:
        findings.append(_disagreeing(counters))
    return findings + trained_past(table)


def unjudged(table: StateTable) -> list[str]:
    """Say which statistics are not judged: those that cannot be read, and those without the other half."""
    unread: dict[str, str] = {}
    alone = []
    for name, tensor in table.items():
        layer, _, own = name.rpartition(".")
        if own not in ("running_mean", "running_var"):
            continue
        if joined(layer, "running_var" if own == "running_mean" else "running_mean") not in table:
            alone.append(name)
        elif tensor.unsupported or tensor.dtype.startswith("complex"):
            unread[name] = tensor.unsupported or f"dtype {tensor.dtype}"
    notes = []
    if unread:
        name, reason = next(iter(unread.items()))
        notes.append(f"not judged: {printable(name)} ({reason}){_more(len(unread) - 1)}")
    if alone:
        notes.append(
            f"not judged: {printable(alone[0])}{_more(len(alone) - 1)}, as a layer has running_mean and "
            "running_var or neither"
        )
    return notes


def gone_bad(before: StateTable, after: StateTable) -> list[Finding]:
    """Return NaN, infinity and negative variances that were not there before."""
    found = _all_bad(after)
    known = {(finding.code, finding.name) for finding in _all_bad(before)} if found else set()
    return [finding for finding in found if (finding.code, finding.name) not in known]


def _statistics(table: StateTable, layer: str) -> tuple[Vector, Vector] | tuple[None, None]:
    mean, var = table[joined(layer, "running_mean")], table[joined(layer, "running_var")]
    if mean.unsupported or var.unsupported or mean.numel != var.numel:
        return None, None
    return mean.values().ravel(), var.values().ravel()


def _all_bad(table: StateTable) -> list[Finding]:
    found = []
    for layer in table.norm_layers():
        means, variances = _statistics(table, layer)
        if means is not None and variances is not None:
            found += _bad(layer, means, variances)
    return found


def _bad(layer: str, means: Vector, variances: Vector) -> list[Finding]:
    findings = []
    bad = int((~np.isfinite(means)).sum() + (~np.isfinite(variances)).sum())
    if bad:
        message = f"{bad} of {means.size + variances.size} values are NaN or infinite"
        findings.append(_finding("FK401", layer, message))
    negative = variances[(variances < 0) & ~np.isnan(variances)]  # a complex one may be both
    if negative.size:
        told = f"{negative.size} of {variances.size} variances are negative, down to {negative.min():.3g}"
        findings.append(_finding("FK402", layer, told))
    return findings


def _bad_counter(layer: str, tensor: TensorState | None, counter: int | None) -> list[Finding]:
    if counter is not None and counter < 0:
        return [_finding("FK402", layer, f"num_batches_tracked is {counter}")]
    if tensor is None or tensor.unsupported or tensor.numel != 1 or np.isfinite(tensor.values()).all():
        return []
    return [_finding("FK401", layer, "num_batches_tracked is NaN or infinite")]


def _untrained(table: StateTable, layer: str, initial: npt.NDArray[np.bool_], counter: int | None) -> Finding:
    """Tell of channels with the statistics that a layer is made with: certain, or only suspicious."""
    seen = "" if counter is None else f" (num_batches_tracked is {counter})"
    if not initial.all():
        message = f"{_some(initial)} have mean 0 and variance 1{seen}, the others have not"
        return _finding("FK409", layer, message)
    weight, bias = (_parameter(table, layer, own) for own in ("weight", "bias"))
    affine = weight is not None or bias is not None
    own_initial = (weight is None or bool((weight == 1).all())) and (bias is None or not bias.any())
    # what was trained in eval mode, or has the statistics folded into weight and bias, is as it should be
    if affine and not own_initial and not counter:
        message = (
            f"running_mean is all 0 and running_var all 1{seen}, though its weight and bias were trained"
        )
        return _finding("FK409", layer, message)
    # one value may be so by chance, in low precision
    if initial.size == 1 and counter and not (affine and own_initial):
        return _finding("FK409", layer, f"its one channel has mean 0 and variance 1{seen}")
    also = ", and its weight and bias are initial too" if affine and own_initial else ""
    return _finding("FK403", layer, f"running_mean is all 0 and running_var all 1{seen}{also}")


def _without_variance(
    table: StateTable, layer: str, feeder: str | None, means: Vector, variances: Vector
) -> list[Finding]:
    """Tell of channels that were constant though their filter is not: other inputs come out enlarged."""
    dead = variances < _NO_VARIANCE
    weight = _parameter(table, layer, "weight")
    gain = np.ones(dead.size) if weight is None or weight.size != dead.size else np.abs(weight)
    filters = None if feeder is None else table[feeder]
    if filters is not None and not filters.unsupported and filters.numel <= _MOST_OF_FILTERS:
        # what decayed to 0, as in many a real file, stays constant whatever comes in
        gain = gain * _strengths(filters, dead.size)
    gain = gain / _EPS**0.5
    used = dead & (gain > _MOST_GAIN)
    if not used.any():
        return []
    zero = int((used & (means == 0)).sum())
    with_zero = f", {zero if zero < used.sum() else 'all'} with mean 0" if zero else ""
    message = (
        f"{_some(used)} had no variance (at most {variances[used].max():.3g}{with_zero}) though the filter "
        f"is not 0: an input of 1 comes out as up to {gain[used].max():,.0f} if eps is 1e-5"
    )
    return [_finding("FK405", layer, message)]


def _strengths(filters: TensorState, channels: int) -> Vector:
    """Return the sum of the absolute weights of each filter."""
    found = np.zeros(channels)
    place = 0
    for piece in pieces_of(filters):
        weights = np.abs(decode(piece, filters.dtype))
        owners = np.arange(place, place + weights.size) // (filters.numel // channels)
        found += np.bincount(owners, weights, channels)
        place += weights.size
    return found


def _out_of_range(layer: str, means: Vector, variances: Vector) -> list[Finding]:
    """Tell of statistics that no layer computes well with: too large, or far beyond the other channels."""
    sizes, sigmas = np.abs(means), np.sqrt(variances + _EPS)
    largest = sizes + 6 * sigmas  # what is to be expected at most
    if largest.max() > _FLOAT16_MAX:
        over = largest > _FLOAT16_MAX
        message = (
            f"{_some(over)} are beyond what float16 holds: mean {sizes[over].max():.3g}, "
            f"standard deviation {sigmas[over].max():.3g} at most"
        )
        return [_finding("FK406", layer, message)]
    if sigmas.max() > _MOST_SIGMA * sigmas.min():
        usual = float(np.median(sigmas[variances >= _NO_VARIANCE]))
        over = sigmas > _MOST_SIGMA * usual
        if over.any():
            message = (
                f"{_some(over)} have a standard deviation of up to {sigmas[over].max():.3g}, where the "
                f"median of the layer is {usual:.3g}"
            )
            return [_finding("FK406", layer, message)]
    if sizes.max() > _MOST_SIGMA * sigmas.min():
        ratios = sizes / sigmas
        over = (ratios > _MOST_SIGMA) & (variances >= _NO_VARIANCE)
        if over.any():
            message = (
                f"the mean of {_some(over)} is up to {ratios[over].max():,.0f} standard deviations from 0: "
                "too few digits are left of what is not the mean"
            )
            return [_finding("FK406", layer, message)]
    return []


def _disagreeing(counters: dict[str, int]) -> Finding:
    """Tell which parts have counted what: each by the shortest name that all its layers share."""
    parts = _parts(counters)
    groups: dict[int, list[str]] = {}
    for part, count in parts.items():
        groups.setdefault(count, []).append(part)
    layers = list(counters.values())
    # named after the odd ones out, since most layers agree in any real file
    odd = min(groups, key=lambda count: layers.count(count))
    told = [
        f"{', '.join(names[:_MOST_PARTS])}{_more(len(names) - _MOST_PARTS)}: {count:,}"
        for count, names in list(groups.items())[: _MOST_PARTS + 1]
    ]
    rest = len(groups) - len(told)
    message = "; ".join(told) + (f"; and {rest} other counts" if rest > 0 else "")
    return _finding("FK404", groups[odd][0], message)


def _parts(counters: dict[str, int]) -> dict[str, int]:
    """Return the counts by the parts of the model that have one only."""
    found: dict[str, int] = {}
    pieces = {layer: layer.split(".") for layer in counters}
    waiting: list[tuple[list[str], int]] = [(list(counters), 0)]
    while waiting:
        layers, depth = waiting.pop()
        counts = {counters[layer] for layer in layers}
        first = pieces[layers[0]]
        if len(counts) == 1 and depth:
            found[".".join(first[:depth])] = counts.pop()
            continue
        children: dict[str | None, list[str]] = {}
        for layer in layers:
            children.setdefault(next(iter(pieces[layer][depth : depth + 1]), None), []).append(layer)
        if children.keys() == {None}:  # the names end here
            found |= {layer: counters[layer] for layer in layers}
            continue
        waiting += reversed([(inside, depth + 1) for inside in children.values()])
    return found


def _parameter(table: StateTable, layer: str, own: str) -> Vector | None:
    tensor = table.get(joined(layer, own))
    if tensor is None or tensor.unsupported or tensor.numel > _MOST_OF_PARAMETER:
        return None
    return tensor.values().ravel()


def _some(which: npt.NDArray[np.bool_]) -> str:
    return f"{int(which.sum())} of {which.size} channel{'' if which.size == 1 else 's'}"


def _more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""


def _finding(code: str, name: str, message: str) -> Finding:
    return Finding(code, name, message, _FIXES[code])
