"""The frozen values, and how to see at little cost whether a model still has them.

Small tensors are joined and compared as one at each look, large buffers one by one. Large parameters are
looked at for hints (another object, other memory, torch's count of writes, a few of the values), compared
where there is one, and otherwise in turns, so that all of them have been compared after :data:`WINDOW` looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from freezekit.audit.live.change import Change
from freezekit.audit.live.kept import Kept, Rows, is_plain
from freezekit.audit.live.region import Place, Region, layer_of, places
from freezekit.audit.live.slots import Joined, Slot
from freezekit.audit.live.standing import Standing
from freezekit.audit.live.tensors import local, version

__all__ = ["WINDOW", "Snapshot"]

WINDOW = 20
"""Looks after which every tensor has been compared in full."""

_SMALL = 1 << 16  # bytes; larger ones cost more to join than to compare by themselves
_LEAST = 1 << 18  # bytes compared in turns at each look: less would cost as much
_SAMPLES = 4

_Answer: TypeAlias = "tuple[Iterable[Slot], Tensor | bool]"
_Asked: TypeAlias = "tuple[Iterable[Slot], Callable[[], Tensor | bool]]"


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
        self._clock = 0
        self._options = {"digest": digest, "host": host}
        self._moved: set[Slot] = set()
        found = ((place, place.tensor()) for place in region.places.values())
        self.slots = {place.name: Slot(place, tensor) for place, tensor in found if tensor is not None}
        self._added: list[Place] = []
        self._standing: Standing
        self._counts: list[int] = []
        with torch.no_grad():
            self._keep(turns)
        self._locate()
        self._stand()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        rows = [kept.row for slot in self.slots.values() for _, _, kept in slot.pieces]
        rows += [slot.whole for slot in self.slots.values() if slot.whole is not None]
        rows += [kept.row for _, _, kept in self._samples]
        rows += [group.kept.row for group in (*self._joined, *self._joined_in_turns)]
        storages = {row.untyped_storage()._cdata: row.untyped_storage() for row in rows}
        return sum(storage.nbytes() for storage in storages.values())

    def look(self, now: int = 0, *, full: bool = False) -> list[Change]:
        """Compare, and return what is not as it was.

        Args:
            now: the clock, by which the changes say since when.
            full: compare large parameters too, and not in turns.
        """
        last, self._clock = self._clock, now
        with torch.no_grad():
            hinted = self._take()
            counts = self._standing.counts()
            if counts[: self._counted] != self._counts[: self._counted]:
                pairs = zip(self._standing.slots, counts[: self._counted], self._counts, strict=False)
                hinted |= dict.fromkeys(slot for slot, count, before in pairs if count != before)
            moved = self._compare(hinted, full)
        moved |= {slot for slot in hinted if slot.what == "device"}
        changes = []
        if hinted or moved:
            self._write_down()
            certain = hinted.keys() | (set(self.slots.values()) - self._turning)
            changes = [
                self._change(slot, last if slot in certain else now - WINDOW)
                for slot in self.slots.values()
                if slot in moved
            ]
            for slot in set(self.slots.values()) - moved:
                slot.replaced = slot.rebased = False
                slot.since = None
        self._counts = counts
        if moved:
            self._counts = [
                slot.version if slot in moved else count
                for slot, count in zip(self._standing.slots, counts, strict=True)
            ]
        self._moved = moved
        return changes + [Change(p, p.tensor(), None, "added", True, False, 0, last) for p in self._added]

    def _keep(self, turns: bool) -> None:
        """Keep the bits of every tensor, and sort out how each is to be compared."""
        rows: dict[Any, list[Slot]] = {}
        self._alone: list[Slot] = []
        self._in_turns: list[Slot] = []
        first: dict[int, Slot] = {}
        for slot in self.slots.values():
            takes_turns = turns and slot.plain and slot.place.role == "parameter"
            if slot.plain and slot.nbytes <= _SMALL and len(slot.shape) < 2:
                rows.setdefault((takes_turns, slot.device, slot.dtype, len(slot.shape)), []).append(slot)
                continue
            (self._in_turns if takes_turns else self._alone).append(slot)
            tied = first.setdefault(id(slot.tensor), slot)
            if tied is slot:
                slot.keep(**self._options)
            slot.pieces, slot.whole = tied.pieces, tied.whole
        joined = {key: Joined(slots, **self._options) for key, slots in rows.items()}
        self._joined = [group for (takes_turns, *_), group in joined.items() if not takes_turns]
        self._joined_in_turns = [group for (takes_turns, *_), group in joined.items() if takes_turns]
        self._group = {slot: group for group in joined.values() for slot in group.slots}
        self._turning = {*self._in_turns, *(slot for group in self._joined_in_turns for slot in group.slots)}
        self._line_up()

    def _line_up(self) -> None:
        """Line up what is compared in turns, and a few values of each large tensor."""
        self._queue: list[tuple[int, _Asked]] = []
        self._next = 0
        self._out_of_line: list[Slot] = []
        samples: dict[Any, tuple[list[Slot], list[Tensor]]] = {}
        for slot in self._in_turns:
            row = None if slot.tensor is None or slot.what != "value" else slot.row(slot.tensor)
            if row is None or row.data_ptr() != slot.pointer:  # a copy would not show what happens
                self._out_of_line.append(slot)
                continue
            for start, stop, kept in slot.pieces:
                size = (stop - start) * row.element_size()
                self._queue.append((size, ((slot,), partial(kept.differs, row[start:stop]))))
            slots, views = samples.setdefault((row.device, row.dtype), ([], []))
            slots.append(slot)
            views.append(row[:: max(1, row.numel() // _SAMPLES)][:_SAMPLES])
        for group in self._joined_in_turns:
            self._queue.append((sum(slot.nbytes for slot in group.slots), (group.slots, group.differs)))
        self._quota = max(_LEAST, -(-sum(size for size, _ in self._queue) // WINDOW))
        # of a tensor put in another's place these are not the frozen values: that costs looks in vain
        self._samples = []
        for slots, views in samples.values():
            rows = Rows(views)
            self._samples.append((slots, rows, Kept(rows.joined(), **self._options)))

    def _locate(self) -> None:
        """Find every tensor's place in the model as it is now."""
        model, empty = self.region.model, nn.Module()
        self._modules = dict(model.named_modules(remove_duplicate=False))
        for slot in self.slots.values():
            owner = self._modules.get(layer_of(slot.place), empty)
            if owner is not slot.place.owner:
                slot.place = replace(slot.place, owner=owner)
        self._added = [
            place
            for name, place in places(model).items()
            if name not in self.region.known
            and place.role != "attribute"  # a cache, as a rule
            and layer_of(place) in self.region.layers
        ]

    def _stand(self) -> None:
        """Note where everything is; what takes turns comes first, as its counts of writes are hints."""
        noted = [slot for slot in self.slots.values() if slot.plain and slot.place.role != "attribute"]
        there = [slot for slot in noted if slot.tensor is not None and is_plain(slot.tensor)]
        there.sort(key=lambda slot: slot not in self._turning)
        self._counted = sum(slot in self._turning for slot in there)
        self._counts = [slot.version for slot in there]
        noticed = set(there)
        self._odd = [slot for slot in self.slots.values() if slot not in noticed]
        self._standing = Standing(
            self._modules,
            [self._modules[path] for path in self.region.layers & self._modules.keys()],
            there,
            [slot for slot in there if slot not in self._group],
        )

    def _take(self) -> dict[Slot, None]:
        """Take the tensors that are there now, and return those that may differ, or did."""
        located = self._standing.has_modules() and all(place.tensor() is not None for place in self._added)
        if not located:
            self._locate()
        hinted = dict.fromkeys(slot for slot in self._odd if slot.has_gone())
        if hinted or not located or not self._standing.has_tensors():
            self._write_down()
            hinted = dict.fromkeys(slot for slot in self.slots.values() if slot.has_gone())
            for slot in hinted:
                slot.take(slot.place.tensor())
            for group in {self._group[slot] for slot in hinted if slot in self._group}:
                group.retake()
            if any(slot in self._turning for slot in hinted):
                self._line_up()
            self._stand()
        return hinted | dict.fromkeys(self._moved)

    def _compare(self, hinted: dict[Slot, None], full: bool) -> set[Slot]:
        """Compare what is due, and return what differs."""
        asked = dict.fromkeys([*self._alone, *hinted, *self._out_of_line])
        # a row of several tensors, or a part of one, tells that something moved and not what
        vague: list[_Asked] = [(group.slots, group.differs) for group in self._joined]
        if full:
            asked |= dict.fromkeys(self._turning)
        else:
            vague += self._due()
            vague += [(slots, partial(_sample_differs, rows, kept)) for slots, rows, kept in self._samples]
        answers: list[_Answer] = [((slot,), yes) for slot in asked for yes in slot.differs()]
        moved, doubted = _told(answers, [(slots, differs()) for slots, differs in vague])
        again: list[_Answer] = [((slot,), yes) for slot in doubted - asked.keys() for yes in slot.differs()]
        return moved | _told(again)[0]

    def _due(self) -> list[_Asked]:
        """Return the next of those that take turns."""
        due: list[_Asked] = []
        done = 0
        while done < self._quota and len(due) < len(self._queue):
            size, piece = self._queue[self._next % len(self._queue)]
            self._next += 1
            due.append(piece)
            done += size
        return due

    def _change(self, slot: Slot, since: int) -> Change:
        if slot.since is None:
            slot.since = max(0, since)
        writes = 0 if slot.tensor is None or slot.replaced else version(slot.tensor) - slot.version
        here = None if slot.tensor is None else local(slot.tensor)
        return Change(
            slot.place, here, slot.before(), slot.what, slot.replaced, slot.rebased, writes, slot.since
        )

    def _write_down(self) -> None:
        """Write torch's counts, as they were at the last look, down at the slots."""
        for slot, count in zip(self._standing.slots, self._counts, strict=True):
            slot.version = count


def _sample_differs(rows: Rows, kept: Kept) -> Tensor | bool:
    return kept.differs(rows.joined())


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
