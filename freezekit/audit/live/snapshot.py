"""The frozen values, and how to see at little cost whether a model still has them.

Small tensors are joined and compared as one at each look, large buffers one by one. Large parameters are
looked at for hints (another object, other memory, torch's count of writes, a few of the values), compared
where there is one, and otherwise in turns, so that all of them have been compared after :data:`WINDOW` looks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from freezekit.audit.live.change import Change
from freezekit.audit.live.kept import Kept
from freezekit.audit.live.region import Region, layer_of, places
from freezekit.audit.live.slots import Joined, Slot
from freezekit.audit.live.tensors import version

__all__ = ["WINDOW", "Snapshot"]

WINDOW = 20
"""Looks after which every tensor has been compared in full."""

_SMALL = 1 << 16  # bytes; larger ones cost more to join than to compare by themselves
_LEAST = 1 << 18  # bytes compared in turns at each look: less would cost as much
_SAMPLES = 16

_Answer: TypeAlias = "tuple[Iterable[Slot], Tensor | bool]"


class Snapshot:
    """The bits of the frozen tensors, to compare a model with again and again.

    Args:
        region: what is frozen.
        turns: compare large parameters in turns, and not all of them at each look.
        digest: keep a digest of each tensor, and not its values.
        host: keep them on the host.

    >>> model = nn.Linear(2, 2).requires_grad_(False)
    >>> snapshot = Snapshot(Region(model), turns=True)
    >>> _ = model.bias.add_(1)
    >>> [(change.place.name, change.writes) for change in snapshot.look()]
    [('bias', 1)]
    """

    def __init__(self, region: Region, *, turns: bool, digest: bool = False, host: bool = False) -> None:
        self.region = region
        self.looks = self._clock = 0
        self._options = {"digest": digest, "host": host}
        self._moved: set[Slot] = set()
        found = ((place, place.tensor()) for place in region.places.values())
        self.slots = {place.name: Slot(place, tensor) for place, tensor in found if tensor is not None}
        with torch.no_grad():
            self._keep(turns)
        self._locate()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        rows = [kept.row for slot in self.slots.values() for _, _, kept in slot.pieces]
        rows += [slot.whole for slot in self.slots.values() if slot.whole is not None]
        rows += [kept.row for _, _, kept in self._samples]
        rows += [group.kept.row for group in self._joined]
        storages = {row.untyped_storage()._cdata: row.untyped_storage() for row in rows}
        return sum(storage.nbytes() for storage in storages.values())

    def look(self, now: int = 0, *, full: bool = False) -> list[Change]:
        """Compare, and return what is not as it was.

        Args:
            now: the clock, by which the changes say since when.
            full: compare large parameters too, and not in turns.
        """
        last, self._clock = self._clock, now
        self.looks += 1
        with torch.no_grad():
            if not self._is_in_place():
                self._locate()
            hinted = self._take()
            moved = self._compare(hinted, full)
        moved |= {slot for slot in hinted if slot.what == "device"}
        changes = (
            [
                self._change(s, last if s in hinted or s not in self._turning else now - WINDOW)
                for s in self.slots.values()
                if s in moved
            ]
            if moved
            else []
        )
        self._settle(moved)
        return changes + [Change(p, p.tensor(), None, "added", True, False, 0, last) for p in self._added]

    def _keep(self, turns: bool) -> None:
        """Keep the bits of every tensor, and sort out how each is to be compared."""
        joined: dict[Any, list[Slot]] = {}
        self._alone: list[Slot] = []
        self._in_turns: list[Slot] = []
        first: dict[int, Slot] = {}
        for slot in self.slots.values():
            if slot.plain and slot.nbytes <= _SMALL and len(slot.shape) < 2:
                joined.setdefault((slot.device, slot.dtype, len(slot.shape)), []).append(slot)
                continue
            takes_turns = turns and slot.plain and slot.place.role == "parameter"
            (self._in_turns if takes_turns else self._alone).append(slot)
            tied = first.setdefault(id(slot.tensor), slot)
            if tied is slot:
                slot.keep(**self._options)
            slot.pieces, slot.whole = tied.pieces, tied.whole
        self._joined = [Joined(slots, **self._options) for slots in joined.values()]
        self._turning = set(self._in_turns)
        self._group = {slot: group for group in self._joined for slot in group.slots}
        self._line_up()

    def _line_up(self) -> None:
        """Line up the pieces that are compared in turns, and a few values of each tensor."""
        self._queue: list[tuple[Slot, Tensor, Kept]] = []
        self._next = 0
        self._out_of_line: list[Slot] = []
        samples: dict[Any, tuple[list[Slot], list[Tensor]]] = {}
        for slot in self._in_turns:
            row = None if slot.tensor is None or slot.what != "value" else slot.row(slot.tensor)
            if row is None or row.data_ptr() != slot.pointer:  # a copy would not show what happens
                self._out_of_line.append(slot)
                continue
            self._queue += [(slot, row[start:stop], kept) for start, stop, kept in slot.pieces]
            slots, views = samples.setdefault((row.device, row.dtype), ([], []))
            slots.append(slot)
            views.append(row[:: max(1, row.numel() // _SAMPLES)][:_SAMPLES])
        waiting = sum(bits.numel() * bits.element_size() for _, bits, _ in self._queue)
        self._quota = max(_LEAST, -(-waiting // WINDOW))
        # of a tensor put in another's place these are not the frozen values: that costs looks in vain
        self._samples = [(*both, Kept(torch.cat(both[1]), **self._options)) for both in samples.values()]

    def _locate(self) -> None:
        """Find every tensor's place in the model as it is now."""
        model, empty = self.region.model, nn.Module()
        modules = dict(model.named_modules(remove_duplicate=False))
        self._links = [
            (m._modules, key, child) for m in modules.values() for key, child in m._modules.items()
        ]
        whole = [modules[path] for path in self.region.layers & modules.keys()]
        books: list[dict[str, Any]] = [book for m in whole for book in (m._parameters, m._buffers)]
        self._books = [(book, len(book)) for book in books]
        self._gaps = [(book, key) for book in books for key, held in book.items() if held is None]
        self._wires: list[tuple[Slot, dict[str, Any], str]] = []
        self._odd: list[Slot] = []
        for slot in self.slots.values():
            owner = modules.get(layer_of(slot.place), empty)
            if owner is not slot.place.owner:
                slot.place = replace(slot.place, owner=owner)
            if slot.plain and slot.place.role != "attribute":
                book = owner._parameters if slot.place.role == "parameter" else owner._buffers
                self._wires.append((slot, book, slot.place.key))
            else:
                self._odd.append(slot)
        self._added = []
        if self.looks:
            self._added = [
                place
                for name, place in places(model).items()
                if name not in self.region.known
                and place.role != "attribute"  # a cache, as a rule
                and layer_of(place) in self.region.layers
            ]

    def _is_in_place(self) -> bool:
        """Tell whether the modules are those that were located, with tensors under the same names."""
        return (
            all(book.get(key) is child for book, key, child in self._links)
            and all(len(book) == size for book, size in self._books)
            and all(book[key] is None for book, key in self._gaps)
            and not any(place.tensor() is None for place in self._added)
        )

    def _take(self) -> dict[Slot, None]:
        """Take the tensors that are there now, and return those that may differ, or did."""
        hinted: dict[Slot, None] = {}
        for slot, book, key in self._wires:
            tensor = book.get(key)
            if (
                tensor is not slot.tensor
                or tensor is None
                or tensor.data_ptr() != slot.pointer
                or tensor.shape != slot.shape
                or tensor.dtype is not slot.dtype
            ):
                hinted[slot] = None
        hinted |= dict.fromkeys(slot for slot in self._odd if slot.place.tensor() is not slot.tensor)
        hinted |= dict.fromkeys(self._moved)
        relined = False
        for slot in hinted:
            slot.take(slot.place.tensor())
            if slot in self._group:
                self._group[slot].retake()
            relined |= slot in self._turning
        if relined:
            self._line_up()
        for slot in self._in_turns:
            if slot.tensor is not None and slot.tensor._version != slot.version:
                hinted[slot] = None
        return hinted

    def _compare(self, hinted: dict[Slot, None], full: bool) -> set[Slot]:
        """Compare what is due, and return what differs."""
        asked = dict.fromkeys([*self._alone, *hinted, *self._out_of_line])
        if full:
            asked |= dict.fromkeys(self._in_turns)
        # a row of several tensors, or a part of one, tells that something moved and not what
        doubts: list[_Answer] = [(group.slots, group.differs()) for group in self._joined]
        if not full:
            doubts += [((slot,), kept.differs(bits)) for slot, bits, kept in self._due()]
            doubts += [(slots, kept.differs(torch.cat(views))) for slots, views, kept in self._samples]
        answers: list[_Answer] = [((slot,), yes) for slot in asked for yes in slot.differs()]
        moved, doubted = _told(answers, doubts)
        again: list[_Answer] = [((slot,), yes) for slot in doubted - asked.keys() for yes in slot.differs()]
        return moved | _told(again)[0]

    def _due(self) -> list[tuple[Slot, Tensor, Kept]]:
        """Return the next pieces whose turn it is."""
        due: list[tuple[Slot, Tensor, Kept]] = []
        size = 0
        while size < self._quota and len(due) < len(self._queue):
            piece = self._queue[self._next % len(self._queue)]
            self._next += 1
            due.append(piece)
            size += piece[1].numel() * piece[1].element_size()
        return due

    def _change(self, slot: Slot, since: int) -> Change:
        if slot.since is None:
            slot.since = max(0, since)
        writes = 0 if slot.tensor is None or slot.replaced else version(slot.tensor) - slot.version
        return Change(
            slot.place, slot.tensor, slot.before(), slot.what, slot.replaced, slot.rebased, writes, slot.since
        )

    def _settle(self, moved: set[Slot]) -> None:
        """Note what is as it was, so that the next look begins from there."""
        self._moved = moved
        still = [slot for slot in self.slots.values() if slot not in moved] if moved else self.slots.values()
        for slot in still:
            if slot.plain:
                slot.version = slot.tensor._version  # type: ignore[union-attr]  # what is missing has moved
            slot.replaced = slot.rebased = False
            slot.since = None


def _told(*questions: list[_Answer]) -> list[set[Slot]]:
    """Return, for each list, the slots with an answer that is true; waits once for each device."""
    found: list[set[Slot]] = [set() for _ in questions]
    waiting: dict[torch.device, list[tuple[set[Slot], Iterable[Slot], Tensor]]] = {}
    for yeses, answers in zip(found, questions, strict=True):
        for slots, yes in answers:
            if isinstance(yes, Tensor):
                waiting.setdefault(yes.device, []).append((yeses, slots, yes))
            elif yes:
                yeses.update(slots)
    for pending in waiting.values():
        told = torch.stack([yes for *_, yes in pending]).tolist()
        for (yeses, slots, _), yes in zip(pending, told, strict=True):
            if yes:
                yeses.update(slots)
    return found
