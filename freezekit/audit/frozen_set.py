"""Tells what counts as frozen in a checkpoint where nobody says so. Never imports torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from freezekit.audit import drift
from freezekit.audit import manifest as manifests
from freezekit.audit.state import StateTable
from freezekit.manifest import Manifest
from freezekit.patterns import below, select

__all__ = ["differing", "frozen_names", "inferred"]


def frozen_names(
    table: StateTable,
    base: StateTable,
    frozen: str | Iterable[str] | None = None,
    manifest: Manifest | None = None,
    *,
    given: Mapping[str, str] | None = None,
) -> tuple[set[str], str, tuple[str, ...]]:
    """Tell which tensors count as frozen: as given, as a manifest says, or by inference, in this order.

    Args:
        table: the checkpoint, under the names that :func:`freezekit.audit.aligning.align` gave it.
        base: the checkpoint it started from, likewise.
        frozen: names or globs.
        manifest: what was frozen; without it the one inside the checkpoint.
        given: names as the files have them, with what they are here, where they differ.

    Returns:
        the names, how they were told in words, and notes.

    Raises:
        SelectionError: a pattern matches nothing.
        CheckpointError: the manifest inside is damaged or hostile.
    """
    if frozen is not None:
        aliases = given or {}
        every = list(dict.fromkeys([*base, *table, *aliases]))
        names = select(frozen, every, where="frozen", kind="layer or tensor")
        return {aliases.get(name, name) for name in names}, "as given", ()
    label = "the manifest given" if manifest is not None else "the manifest inside it"
    manifest = manifest or manifests.manifest_of(table)
    if manifest is not None and manifest.tensors:
        known, ties = manifests.known_in(manifest, label, table)
        tied = {name for name in known if name not in table and ties.get(name, name) in table}
        return set(known) - tied, f"as {label} says", ()
    return (*inferred(base, table), ())


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
