"""From changes of live tensors to findings: what moved, by how much, in a report's terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from freezekit.audit import drift
from freezekit.audit.findings import Finding, LayerDrift
from freezekit.audit.live.change import Change
from freezekit.audit.live.kept import bits_of
from freezekit.audit.live.region import Place
from freezekit.audit.live.slots import Slot
from freezekit.audit.live.snapshot import Snapshot
from freezekit.audit.live.tensors import local
from freezekit.audit.state import DTYPE_SIZES, STATS, StateTable, TensorState

__all__ = ["describe"]


def describe(
    snapshot: Snapshot, changes: list[Change], *, only: bool
) -> tuple[list[LayerDrift], list[Finding], list[str]]:
    """Return the norm layers, the findings and the names of what changed.

    Args:
        snapshot: the frozen values.
        changes: what is not as it was.
        only: leave out the norm layers that did not move.
    """
    moved = {change.place.name: change for change in changes}
    layers = {name.rpartition(".")[0] for name in moved}
    names = [
        name
        for name in (*snapshot.slots, *(name for name in moved if name not in snapshot.slots))
        if name in moved
        or (name.rpartition(".")[2] in STATS and not (only and name.rpartition(".")[0] not in layers))
    ]
    before, after = [], []
    for name in names:
        change, slot = moved.get(name), snapshot.slots.get(name)
        if change is not None:
            if slot is not None:
                before.append(_frozen(slot))
            if change.tensor is not None:
                after.append(_state(change.place, change.tensor))
        elif slot is not None and slot.tensor is not None:
            state = _state(slot.place, slot.tensor)
            before.append(state)
            after.append(state)
    modules = dict(snapshot.region.model.named_modules(remove_duplicate=False))
    found, findings, changed = drift.compare(
        StateTable(before, "model"),
        StateTable(after, "model"),
        set(names),
        kinds={name: type(module).__name__ for name, module in modules.items()},
        eps={name: getattr(module, "eps", 1e-5) for name, module in modules.items()},
    )
    return found, [*findings, *_moves(snapshot, changes)], changed


def _moves(snapshot: Snapshot, changes: Iterable[Change]) -> list[Finding]:
    return [
        Finding(
            "FK106",
            change.place.name,
            f"was moved from {snapshot.slots[change.place.name].device} to {change.tensor.device}",
            "move the model before making the auditor",
        )
        for change in changes
        if change.what == "device"
        and change.tensor is not None
        and "meta" not in (change.tensor.device.type, snapshot.slots[change.place.name].device.type)
    ]


def _state(place: Place, tensor: Tensor) -> TensorState:
    tensor = local(tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    unsupported = None if dtype in DTYPE_SIZES else f"values of {dtype} cannot be shown"
    if tensor.is_meta:
        unsupported = "on the meta device, without values"
    return TensorState(place.name, place.role, dtype, tuple(tensor.shape), _reader(tensor), unsupported)


def _frozen(slot: Slot) -> TensorState:
    """Return the frozen state of what moved; of a digest nothing is known but that it is another."""
    before = slot.before()
    if before is not None:
        return _state(slot.place, before)
    dtype = str(slot.dtype).removeprefix("torch.")
    return TensorState(
        slot.place.name,
        slot.place.role,
        dtype,
        tuple(slot.shape),
        bytes,
        "only its digest is known",
        "another",
    )


def _reader(tensor: Tensor) -> Callable[[], bytes]:
    if tensor.is_meta:
        return bytes
    return lambda: bits_of(tensor).cpu().numpy().tobytes()
