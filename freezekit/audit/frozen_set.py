"""Tells what counts as frozen in a checkpoint where nobody says so. Never imports torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from freezekit.audit import manifest as manifests
from freezekit.audit.bits import close, same_bits
from freezekit.audit.held import Held, held_by, is_parameter
from freezekit.audit.state import StateTable
from freezekit.errors import FreezekitError
from freezekit.manifest import Manifest
from freezekit.patterns import below, select

__all__ = ["blind_note", "check_asked", "differing", "frozen_names"]


def check_asked(frozen: object, manifest: object) -> None:
    """Refuse globs beside a manifest.

    Raises:
        FreezekitError: both were given.
    """
    if frozen is not None and manifest is not None:
        raise FreezekitError(
            "a manifest says by itself what was frozen",
            where="frozen",
            got="both",
            remedy="give one of the two",
        )


def frozen_names(
    table: StateTable,
    base: StateTable,
    frozen: str | Iterable[str] | None = None,
    manifest: Manifest | None = None,
    *,
    given: Mapping[str, str] | None = None,
    outside: Collection[str] = (),
) -> tuple[set[str], str, tuple[str, ...]]:
    """Tell which tensors count as frozen: as given, by a manifest, by an optimizer inside, or inferred.

    Args:
        table: the checkpoint, under the names that :func:`freezekit.audit.aligning.align` gave it.
        base: the checkpoint it started from, likewise.
        frozen: names or globs.
        manifest: what was frozen; without it the one inside the checkpoint.
        given: names as the files have them, with what they are here, where they differ.
        outside: names of what lies in one of the files only and so is not missing from the other.

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
    compared = _Compared(base.with_tensors([t for n, t in base.items() if n not in outside]), table)
    told, notes = _by_optimizer(compared, given or {}, outside)
    if told is not None:
        return (*told, notes)
    return (*_inferred(compared), notes)


class _Compared:
    """Two states, and which of their parameters are the same; each is compared once."""

    def __init__(self, base: StateTable, table: StateTable) -> None:
        self.base = base
        self.table = table
        self.every = sorted(name for name in base if is_parameter(name, base))
        self.own: dict[str, list[str]] = {}
        for name in base:
            self.own.setdefault(name.rpartition(".")[0], []).append(name)
        self._same: dict[str, bool] = {}
        self.cast = False  # whether one that is the same has another dtype

    def same(self, name: str) -> bool:
        """Tell whether a parameter is the same in both, but for a cast."""
        if name not in self._same:
            self._same[name] = _same(name, self.base, self.table)
            self.cast |= self._same[name] and self.base[name].dtype != self.table[name].dtype
        return self._same[name]

    def missing(self, layer: str) -> bool:
        """Tell whether nothing of a layer is left: it cannot be told to have trained, nor pass for clean."""
        return not any(name in self.table for name in self.own[layer])

    def buffered(self) -> list[str]:
        """Return the layers that are no norm layers and have something that an optimizer does not hold."""
        norms = set(self.base.norm_layers())
        return [
            layer
            for layer, own in self.own.items()
            if layer not in norms and not all(is_parameter(name, self.base) for name in own)
        ]

    def parameters(self, layer: str) -> list[str]:
        """Return the parameters that a layer goes with: its own, or where it has none those beside it."""
        parameters = below(layer, self.every)
        while layer and not parameters:
            layer = layer.rpartition(".")[0]
            parameters = below(layer, self.every)
        return parameters


def _inferred(compared: _Compared) -> tuple[set[str], str]:
    """Take the layers for frozen whose trainable parameters stayed bit-identical, with their statistics."""
    frozen: set[str] = set()
    kept = without = others = 0
    layers = compared.base.norm_layers()
    for layer in layers:
        parameters = compared.parameters(layer)
        same = all(map(compared.same, parameters))
        missing = compared.missing(layer)
        kept += same and not missing
        if same or missing:
            frozen.update(compared.own[layer])
        elif not any(name in compared.table for name in parameters):  # torch's ignore_frozen_params
            without += 1
            frozen.update(name for name in compared.own[layer] if name in compared.table)
    buffered = compared.buffered()
    if buffered and not all(map(compared.same, compared.every)):  # else nothing trained at all
        for layer in buffered:
            parameters = compared.parameters(layer)
            if parameters and all(map(compared.same, parameters)) and not compared.missing(layer):
                others += 1
                frozen.update(compared.own[layer])
    beside = f" and {others} other layer{'' if others == 1 else 's'} with buffers" if others else ""
    whole = "BN layer" if len(layers) == 1 else "BN layers"
    cast = " but for a cast" if compared.cast else ""
    how = f"{whole}{beside} kept their parameters bit for bit{cast}"
    how += f", {without} {'is' if without == 1 else 'are'} saved without them" if without else ""
    return frozen, f"inferred: {kept} of {len(layers)} {how}"


def _by_optimizer(
    compared: _Compared, given: Mapping[str, str], outside: Collection[str]
) -> tuple[tuple[set[str], str] | None, tuple[str, ...]]:
    """Take what no optimizer in the checkpoint ever stepped for frozen, with its buffers; and notes."""
    base, table = compared.base, compared.table
    if not table.training.optimizers:
        return None, ()
    moved = {name for name in compared.every if name in table and not compared.same(name)}
    known = held_by(table, moved, given)
    # a momentum copy beside the model, which the base has not, may have been held; it cannot have drifted
    names = {name: own for name, own in known.parameters.items() if name not in outside}
    notes = known.notes
    every = f"{len(names)} parameter{'' if len(names) == 1 else 's'}"
    who = "the optimizer" if known.matched == 1 else f"the {known.matched} optimizers"
    never = known.never & names.keys()
    if not never:
        if known.matched and set(names) <= known.held:
            notes += (f"{who} in it held and stepped all {every}, so what was frozen is inferred",)
        elif known.matched:
            notes += (f"{who} in it may have held all {every}, so what was frozen is inferred",)
        return None, notes
    astray = {name for name in never if name in moved}
    if 2 * len(astray) > len(never):
        notes += (
            f"{who} in it did not hold {len(never)} of {every}, but most of these differ from the base: "
            "what was frozen is inferred",
        )
        return None, notes
    # a float that no optimizer holds may be a buffer, which its layer writes to by itself
    unsure = [
        name
        for name in names
        if name in astray and (name.rpartition(".")[2] not in _SURE or _beside(name, known))
    ]
    if unsure:
        shown = ", ".join(unsure[:3]) + (", ..." if len(unsure) > 3 else "")
        notes += (f"{len(unsure)} not held by {who} differ and may be buffers; name them if frozen: {shown}",)
    frozen = never - set(unsure)
    # what nothing tells goes with its layer
    held = {name.rpartition(".")[0] for name in known.held | moved}
    layers = {name.rpartition(".")[0] for name in frozen} - held
    frozen |= {
        name
        for name in known.possible & names.keys() - known.held - moved
        if name.rpartition(".")[0] in layers
    }
    count = len(frozen)
    frozen = {name for one in frozen for name in names[one]}
    frozen |= {
        own
        for layer in [*base.norm_layers(), *compared.buffered()]
        if (parameters := compared.parameters(layer)) and frozen.issuperset(parameters)
        for own in compared.own[layer]
    }
    gone = {own for layer in base.norm_layers() if compared.missing(layer) for own in compared.own[layer]}
    did = "stepped" if known.idle else "held"
    return (frozen | gone, f"{who} in it never {did} them: {count} of {every}"), notes


#: last parts of names that are parameters without doubt
_SURE = frozenset({"weight", "bias", "in_proj_weight", "in_proj_bias", "gamma", "beta"})


def _beside(name: str, known: Held) -> bool:
    """Tell whether a parameter lies beside others of its layer that were held."""
    layer = name.rpartition(".")[0]
    return any(other.rpartition(".")[0] == layer for other in known.held)


def differing(base: StateTable, table: StateTable, frozen: Collection[str]) -> list[str]:
    """Describe what differs outside the frozen part, which is no finding."""
    other = [n for n in dict.fromkeys([*base, *table]) if n not in frozen]
    unread = {n for n in other if n in base and n in table and base[n].unsupported and table[n].unsupported}
    moved = [name for name in other if name not in unread and not _same(name, base, table)]
    apart = {*moved, *unread}
    cast = [n for n in other if n not in apart and base[n].dtype != table[n].dtype]
    notes = []
    if moved:
        notes.append(f"{len(moved)} of {len(other)} other tensors differ, as trained ones do: {_some(moved)}")
    if cast:
        notes.append(f"{len(cast)} of {len(other)} other tensors were only cast: {_some(cast)}")
    if not notes and len(unread) < len(other):
        notes.append("outside it nothing differs")
    return [*notes, *blind_note(base, [name for name in other if name in unread])]


def blind_note(base: StateTable, names: Sequence[str]) -> list[str]:
    """Say which tensors have no values that can be read, so that nobody takes them for compared."""
    if not names:
        return []
    count = "1 tensor has" if len(names) == 1 else f"{len(names)} tensors have"
    return [f"{count} no values that can be compared: {_some(names)} ({base[names[0]].unsupported})"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _same(name: str, base: StateTable, table: StateTable) -> bool:
    """Tell whether both files hold a tensor with the same bits, or as another dtype has them."""
    if name not in base or name not in table or base[name].unsupported or table[name].unsupported:
        return False
    before, after = base[name], table[name]
    counts = before.role == after.role == "num_batches_tracked"
    if before.dtype != after.dtype and before.shape == after.shape and not counts:
        return close(before, after)
    return same_bits(before, after, checksums=True)
