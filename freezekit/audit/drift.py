"""Drift: two states of the same tensors compared bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from freezekit.audit.bits import close, difference, same_bits
from freezekit.audit.findings import CAUSES, Finding, LayerDrift
from freezekit.audit.health import gone_bad
from freezekit.audit.state import STATS, StateTable, TensorState, counter_value, joined

__all__ = ["compare", "compare_structure", "describe_layer"]

Vector = npt.NDArray[np.float64]

_FIXES = {
    "FK101": CAUSES["train-mode forward"],
    "FK102": CAUSES["train-mode forward"],
    "FK103": "freezekit.freeze_backbone(model) before building the optimizer; look for a stale .grad, an "
    "optimizer that decays parameters without one, or code that writes to the parameter",
    "FK104": "freezekit.freeze_backbone(model) holds the layer in eval mode; if it writes its buffer in eval "
    "mode too, that is in its own forward",
    "FK105": "compare checkpoints of the same model in the same dtype, and do not replace frozen layers",
}


def compare(
    before: StateTable,
    after: StateTable,
    frozen: Collection[str],
    *,
    kinds: Mapping[str, str] | None = None,
    eps: Mapping[str, float] | None = None,
    scatter: bool = False,
) -> tuple[list[LayerDrift], list[Finding], list[str]]:
    """Compare the frozen tensors of two states.

    Args:
        before: the state when it was frozen.
        after: the state now.
        frozen: names of the tensors that must not differ.
        kinds: class of each layer, where known.
        eps: the layer's ``eps``, where known; otherwise 1e-5.
        scatter: whether to keep the drift of each channel of the layers that moved.

    Returns:
        every layer with running statistics, the findings (one a layer or tensor), and the names of the
        frozen tensors that differ; all in the order of ``before``.
    """
    layers: list[LayerDrift] = []
    findings: list[Finding] = []
    changed: list[str] = []
    norms = {layer: None for table in (before, after) for layer in table.norm_layers()}
    done: set[str] = set()
    for name in [*before, *(name for name in after if name not in before)]:
        layer = name.rpartition(".")[0]
        if layer in norms and name.rpartition(".")[2] in STATS:
            if layer not in done:
                done.add(layer)
                drift, found, moved = _compare_layer(
                    layer,
                    before,
                    after,
                    frozen,
                    (kinds or {}).get(layer),
                    (eps or {}).get(layer, 1e-5),
                    scatter,
                )
                layers += drift
                findings += found
                changed += moved
        elif name in frozen:
            problem = _compare_tensor(name, before.get(name), after.get(name))
            if problem is not None:
                findings.append(problem)
                changed.append(name)
    return layers, [*findings, *gone_bad(before, after)], changed


def _compare_layer(
    layer: str,
    before: StateTable,
    after: StateTable,
    frozen: Collection[str],
    kind: str | None,
    eps: float,
    scatter: bool,
) -> tuple[list[LayerDrift], list[Finding], list[str]]:
    names = [joined(layer, stat) for stat in STATS]
    watched = [name for name in names if name in frozen]
    structural = [
        problem
        for name in watched
        if (problem := compare_structure(name, before.get(name), after.get(name))) is not None
    ]
    known = describe_layer(layer, after, kind) if names[0] in after and names[1] in after else None
    drift = [] if known is None else [known]
    # what was only cast has values to compare: a half-precision copy may have drifted before
    cast = {name for name in watched if _cast(before.get(name), after.get(name))}
    if any(finding.name not in cast for finding in structural):
        return drift, structural, [finding.name for finding in structural]
    in_both = all(name in before and name in after for name in names[:2])
    if not in_both and not watched:
        return [], [], []  # not frozen, and in one of the two only
    moved = [
        name for name in watched if not (close if name in cast else same_bits)(before[name], after[name])
    ]
    structural = [finding for finding in structural if finding.name not in moved]
    stats = [table[name] for name in names[:2] for table in (before, after) if name in table]
    shift, ratio, channels = None, None, None
    if in_both and len({t.shape for t in stats}) == 1 and not any(t.unsupported for t in stats):
        channels = _measure(before, after, layer, eps)
        shift, ratio = _worst(*channels)
    counts = [counter_value(table.get(names[2])) for table in (before, after)]
    batches = None if counts[0] is None or counts[1] is None else counts[1] - counts[0]
    drift = [
        replace(known, batches=batches, mean_shift_sigma=shift, var_ratio=ratio, changed=bool(moved))
        for known in drift
    ]
    if scatter and moved and channels is not None:
        drift = [replace(known, scatter=_scattered(*channels)) for known in drift]
    changed = [*(finding.name for finding in structural), *moved]
    if not moved:
        return drift, structural, changed
    over = "" if batches is None or batches < 0 else f" over {batches} batch{'' if batches == 1 else 'es'}"
    if moved == [names[2]]:
        how = "is not what was frozen" if batches is None else f"went from {counts[0]} to {counts[1]}"
        message = f"num_batches_tracked {how}; mean and variance did not move"
        return drift, [*structural, _finding("FK102", layer, message)], changed
    if any(before[name].sha256 for name in moved):
        own = [name.rpartition(".")[2] for name in moved]
        listed = " and ".join(filter(None, [", ".join(own[:-1]), own[-1]]))
        message = f"{listed} {'is' if len(own) == 1 else 'are'} not what was frozen"
    elif shift is None or ratio is None:
        message = f"running statistics changed{over}"
    else:
        message = f"running mean moved by up to {shift:.3g} sigma, spread by x{ratio:.3g}{over}"
    return drift, [_finding("FK101", layer, message), *structural], changed


def _cast(before: TensorState | None, after: TensorState | None) -> bool:
    """Tell whether a tensor has another dtype, and values in both that can be compared."""
    if before is None or after is None or before.shape != after.shape or before.dtype == after.dtype:
        return False
    counts = "num_batches_tracked" in (before.role, after.role)
    return not (counts or before.sha256 or before.unsupported or after.unsupported)


def _compare_tensor(name: str, before: TensorState | None, after: TensorState | None) -> Finding | None:
    problem = compare_structure(name, before, after)
    if problem is not None and before is not None and after is not None and _cast(before, after):
        more = "" if close(before, after) else ", and changed by more than that"
        return replace(problem, message=problem.message + more)
    if problem is not None or before is None or after is None or same_bits(before, after):
        return problem
    code = "FK103" if before.role == "parameter" else "FK104"
    what = before.role if before.role in ("parameter", "attribute") else "buffer"
    if before.sha256 is not None:
        why = f": it cannot be read ({after.unsupported})" if after.unsupported else ""
        return _finding(code, name, f"{what} is not what was frozen{why}")
    if before.unsupported or after.unsupported:
        return _finding(code, name, f"{what} changed ({after.unsupported or before.unsupported})")
    count, size = difference(before, after)
    by = f" by up to {size:.3g}" if 0 < size < np.inf else ""
    return _finding(code, name, f"{what} changed: {count:,} of {before.numel:,} values{by}")


def compare_structure(name: str, before: TensorState | None, after: TensorState | None) -> Finding | None:
    """Return a finding if a tensor is missing, added, reshaped or recast."""
    if before is None and after is None:
        return None
    if after is None:
        message = "is missing"
    elif before is None:
        message = f"was added ({after.dtype}, shape {list(after.shape)})"
    elif before.shape != after.shape:
        message = f"was reshaped from {list(before.shape)} to {list(after.shape)}"
    elif before.dtype != after.dtype and "num_batches_tracked" not in (before.role, after.role):
        message = f"was recast from {before.dtype} to {after.dtype}"
        if before.sha256 is not None:
            message += ", so that its digest cannot be compared"
    else:
        return None
    return _finding("FK105", name, message)


def _measure(before: StateTable, after: StateTable, layer: str, eps: float) -> tuple[Vector, Vector]:
    """Return drift in units a person can judge, of each channel: shift and spread; always finite.

    A channel that is not finite before or after is left out: FK401 tells of it.
    """
    mean_0, mean_1, var_0, var_1 = (
        table[joined(layer, stat)].values().ravel()
        for stat in ("running_mean", "running_var")
        for table in (before, after)
    )
    usable = np.isfinite(mean_0) & np.isfinite(mean_1) & np.isfinite(var_0) & np.isfinite(var_1)
    sigma_0, sigma_1 = (np.sqrt(np.maximum(var[usable], 0.0) + max(eps, 1e-12)) for var in (var_0, var_1))
    largest = 1e308  # the very largest would become infinite when it is rounded
    with np.errstate(over="ignore"):
        shift = np.clip((mean_1[usable] - mean_0[usable]) / sigma_0, -largest, largest)
        ratio = np.minimum(sigma_1 / sigma_0, largest)
    return shift, ratio


def _worst(shift: Vector, ratio: Vector) -> tuple[float | None, float | None]:
    """Return the largest shift, and the spread furthest from 1."""
    if not shift.size:
        return None, None
    return float(np.abs(shift).max()), float(ratio[int(np.argmax(np.abs(np.log(ratio))))])


def _scattered(shift: Vector, ratio: Vector) -> tuple[tuple[float, float], ...]:
    # four digits are more than a picture shows, and keep the JSON short
    return tuple((float(f"{x:.4g}"), float(f"{y:.4g}")) for x, y in zip(shift, ratio, strict=True))


def describe_layer(layer: str, table: StateTable, kind: str | None = None) -> LayerDrift:
    """Return a layer's line in the report without a comparison."""
    channels = table[joined(layer, "running_mean")].numel
    counter = table.count(layer)
    return LayerDrift(layer, kind or "BatchNorm", channels, counter)


def _finding(code: str, name: str, message: str) -> Finding:
    return Finding(code, name, message, _FIXES[code])
