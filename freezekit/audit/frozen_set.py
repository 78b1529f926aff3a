"""Tells what counts as frozen in a checkpoint where nobody says so. Never imports torch."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from freezekit.audit import drift
from freezekit.audit.state import StateTable
from freezekit.patterns import below

__all__ = ["differing", "inferred"]


def inferred(base: StateTable, table: StateTable) -> tuple[set[str], str]:
    """Take the layers for frozen whose trainable parameters stayed bit-identical, with their statistics."""
    own: dict[str, list[str]] = {}
    for name in base:
        own.setdefault(name.rpartition(".")[0], []).append(name)
    every = sorted(name for name, tensor in base.items() if tensor.role == "parameter")
    layers = base.norm_layers()
    frozen: set[str] = set()
    kept = 0
    for layer in layers:
        scope, parameters = layer, below(layer, every)
        while scope and not parameters:  # a BN without parameters goes with what is beside it
            scope = scope.rpartition(".")[0]
            parameters = below(scope, every)
        same = all(_same(name, base, table, recast=True) for name in parameters)
        # A layer that is gone cannot be told to have trained, and must not pass for clean.
        missing = not any(name in table for name in own[layer])
        kept += same and not missing
        if same or missing:
            frozen.update(own[layer])
    return frozen, f"inferred: {kept} of {len(layers)} BN layers kept their parameters bit for bit"


def differing(base: StateTable, table: StateTable, frozen: Collection[str]) -> list[str]:
    """Describe what differs outside the frozen part, which is no finding."""
    other = [n for n in dict.fromkeys([*base, *table]) if n not in frozen]
    moved = [name for name in other if not _same(name, base, table)]
    if not moved:
        return ["outside it nothing differs"] if other else []
    shown = ", ".join(moved[:4]) + (", ..." if len(moved) > 4 else "")
    return [f"{len(moved)} of {len(other)} other tensors differ, as trained ones do: {shown}"]


def _same(name: str, base: StateTable, table: StateTable, *, recast: bool = False) -> bool:
    """Tell whether both files hold a tensor with the same bits, or (``recast``) as another dtype has them."""
    if name not in base or name not in table or base[name].unsupported or table[name].unsupported:
        return False
    before, after = base[name], table[name]
    if recast and before.dtype != after.dtype and before.shape == after.shape:
        # half a unit in the last place of bfloat16; who trains in between is not frozen in either dtype
        return bool(np.allclose(before.values(), after.values(), rtol=2**-8, atol=1e-7, equal_nan=True))
    return drift.same_bits(before, after)
