"""The audit across ranks: whether what is frozen, and what trains, is the same on every process of a run.

Each interval costs one collective of 14 numbers per rank. Only where these differ do the ranks send each
other the digest of each tensor, to name what differs and where.
"""

from __future__ import annotations

import gc
import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from freezekit.audit.findings import Cause, Finding
from freezekit.audit.live.change import Change
from freezekit.audit.live.disagreement import Row, Table, disagreements
from freezekit.audit.live.kept import bits_of, digest_of
from freezekit.audit.live.meeting import Meeting, MissedError, is_shared
from freezekit.audit.live.region import Region, places
from freezekit.audit.live.sharing import plural
from freezekit.audit.live.tensors import shard_of

__all__ = ["Ranks"]

_NAMED = 3
"""How often the ranks name what differs while it is the same of them that differ: that is not free."""

_FIELDS = ("layout", "modes", "frozen", "base", "trained", "buffers", "part", "part_frozen", "part_base",
           "part_trained")  # fmt: skip
"""What is compared, as digests; the ``part_`` ones only between ranks that hold the same shards."""


class Ranks:
    """Compares a model between the ranks of a run.

    Args:
        every: after so many optimizer steps.
        timeout: seconds to wait for the others.
    """

    def __init__(self, every: int, timeout: float) -> None:
        self.every = every
        self.found: dict[tuple[str, str, tuple[int, ...]], Finding] = {}
        """What was found, by code, name and ranks."""
        self._meeting = Meeting(timeout)
        self._over = False
        self._base: dict[str, int] = {}
        self._watched: set[str] = set()
        self._told: list[str] = []
        self._named: dict[tuple[Any, ...], int] = {}
        self._compared = self._last = self._world = 0
        self._shards = 0
        self._buffers_differ = False

    def take(self, region: Region) -> None:
        """Take the frozen values as they are now for those that are meant."""
        self._region = region
        self._watched |= region.places.keys()
        held = {
            name: tensor for name, place in region.places.items() if (tensor := place.tensor()) is not None
        }
        self._base = _digests(held)

    def hear(self, findings: Iterable[Finding]) -> None:
        """Keep what this rank's own audit found, for the others."""
        self._told += [str(finding) for finding in findings if finding.level == "error"]

    def compare(self, step: int, changes: list[Change], causes: Mapping[str, Cause]) -> list[Finding]:
        """Compare with the other ranks, and return what is new; every rank must call this.

        Args:
            step: this rank's optimizer step.
            changes: all that is not as it was frozen.
            causes: why, by name.
        """
        told, self._told = self._told, []
        if self._over or not is_shared():
            return []
        try:
            with torch.no_grad():
                found = self._compare(step, changes, causes, told)
        except MissedError as missed:
            self._over = True
            fix = (
                "give each rank as many steps, or leave the audit on all at once"
                if missed.ended
                else "look at that rank's own error or stack (py-spy dump) first; raise timeout= if it was "
                "only slow; from here on each rank is audited alone"
            )
            code = "FK505" if missed.ended else "FK506"
            found = [Finding(code, "model", missed.why, fix, step, None, missed.ranks)]
        new = [one for one in found if (one.code, one.name, one.ranks) not in self.found]
        self.found |= {(one.code, one.name, one.ranks): one for one in new}
        return new

    def leave(self, error: str | None = None) -> None:
        """Stop comparing, waiting for nobody."""
        self._meeting.leave(error)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know."""
        if not self._compared:
            return (
                () if self._over or is_shared() else ("ranks=: there is one process, and nothing to compare",)
            )
        times = plural(self._compared, "time")
        notes = [f"compared between {self._world} ranks {times}, last after step {self._last}"]
        if self._shards:
            notes.append(
                f"{plural(self._shards, 'sharded tensor')} compared only between ranks that hold the same "
                "shards, if there are any"
            )
        if self._buffers_differ:
            notes.append(
                "buffers that train differ between ranks, as they do without broadcast_buffers; a checkpoint "
                "has those of the rank that saves it"
            )
        return tuple(notes)

    def _compare(
        self, step: int, changes: list[Change], causes: Mapping[str, Cause], told: list[str]
    ) -> list[Finding]:
        rows = self._rows(changes)
        modes = {name: module.training for name, module in self._region.model.named_modules()}
        record = [1, step, self.every, len(told), *_record(rows, modes)]
        records = self._meeting.gather(torch.tensor(record, dtype=torch.int64), step)
        self._compared, self._last, self._world = self._compared + 1, step, len(records)
        self._shards = sum(bool(row.shard) for row in rows.values())
        sides: dict[str, list[Any]] = {
            "step": [r[1] for r in records],
            "every": [r[2] for r in records],
            "told": [bool(r[3]) for r in records],
            **_sides([r[4:] for r in records]),
        }
        self._buffers_differ |= len(set(sides.pop("buffers"))) > 1
        if all(len(set(side)) == 1 for side in sides.values()):
            return []
        pattern = tuple(tuple(map(side.index, side)) for side in sides.values())
        self._named[pattern] = self._named.get(pattern, 0) + 1
        if self._named[pattern] > _NAMED:
            return []
        known = {name: (c.kind, c.detail, c.where) for name, c in causes.items()}
        notes = self._notes_of(rows) if len(set(sides["trained"] + sides["part_trained"])) > 1 else {}
        told_rows = {
            name: row._replace(
                cause=known.get(name) if row.now != row.base else None, note=notes.get(name, "")
            )
            for name, row in rows.items()
        }
        mine = (step, {name: tuple(row) for name, row in told_rows.items()}, modes, told)
        tables = [
            Table(s, {name: Row(*row) for name, row in r.items()}, m, t)
            for s, r, m, t in self._meeting.share(mine, step)
        ]
        return disagreements(tables)

    def _rows(self, changes: list[Change]) -> dict[str, Row]:
        """Return what this rank has; of what is unchanged the digest is known."""
        region, ignored = self._region, _ignored(self._region.model)
        everything = {
            name: place
            for name, place in (places(region.model) | region.places).items()
            if (place.role != "attribute" or name in region.places) and name not in ignored
        }
        moved = {change.place.name for change in changes if change.what != "device"}
        held = {name: tensor for name, place in everything.items() if (tensor := place.tensor()) is not None}
        trains = {name for name, t in held.items() if t.requires_grad and region.inferred}
        frozen = held.keys() & region.places.keys() - trains
        due = {name: tensor for name, tensor in held.items() if name not in frozen or name in moved}
        now = self._base | _digests(due)
        return {
            name: Row(
                _trait(everything[name].role, tensor),
                name in frozen,
                everything[name].role != "parameter",
                shard_of(tensor),
                self._base.get(name, 0) if name in frozen else 0,
                now.get(name, 0),
            )
            for name, tensor in held.items()
        }

    def _notes_of(self, rows: dict[str, Row]) -> dict[str, str]:
        """Return what is known of why a trained parameter's gradients do not go round."""
        late = [n for n, row in rows.items() if not row.frozen and not row.buffer and n in self._watched]
        if not late:
            return {}
        mine = {id(module) for module in self._region.model.modules()}
        wrapped = [one for one in _parallels() if id(one) in mine or id(one.module) in mine]
        note = "unfrozen since the audit began"
        for one in wrapped:
            wanted = [p for p in one._module_parameters if p.requires_grad]
            if len(wanted) > one._get_ddp_logging_data().get("num_parameter_tensors", len(wanted)):
                note = "unfrozen after DistributedDataParallel wrapped the model, so no gradient is sent"
        return dict.fromkeys(late, note)


def _record(rows: Mapping[str, Row], modes: Mapping[str, bool]) -> list[int]:
    """Return one number for each of :data:`_FIELDS`."""
    whole = [row for row in rows.values() if not row.shard]
    parts = [row for row in rows.values() if row.shard]
    found = [
        _hash("\n".join(f"{name} {row.trait} {row.frozen}" for name, row in rows.items())),
        _hash("\n".join(f"{name} {on}" for name, on in modes.items())),
    ]
    for some in (whole, parts):
        if some is parts:
            found.append(_hash("\n".join(f"{name} {row.shard}" for name, row in rows.items())))
        found.append(_hash(row.now for row in some if row.frozen))
        found.append(_hash(row.base for row in some if row.frozen))
        found.append(_hash(row.now for row in some if not row.frozen and not row.buffer))
        if some is whole:
            found.append(_hash(row.now for row in some if not row.frozen and row.buffer))
    return found


def _sides(records: list[list[int]]) -> dict[str, list[Any]]:
    """Return each field's value on each rank, for shards as that of the first rank that has the same ones."""
    columns = dict(zip(_FIELDS, map(list, zip(*records, strict=True)), strict=True))
    part = columns.pop("part")
    found: dict[str, list[Any]] = {}
    for key, values in columns.items():
        if key.startswith("part_"):
            values = [values[rank] == values[part.index(part[rank])] for rank in range(len(values))]
        found[key] = values
    return found


def _hash(what: str | Iterable[int]) -> int:
    """Return 64 bits of a text, or of a row of numbers, as a signed number."""
    data = what.encode() if isinstance(what, str) else b"".join(struct.pack("<q", number) for number in what)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the digest of each tensor's values on this rank; waits once for each device."""
    found: dict[str, int] = {}
    waiting: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if is_lazy(tensor) or tensor.is_meta:
            found[name] = 0
            continue
        made = digest_of(bits_of(tensor))
        waiting.setdefault(made.device, []).append((name, made))
    for pending in waiting.values():
        names = [name for name, _ in pending]
        found |= zip(names, torch.stack([made for _, made in pending]).tolist(), strict=True)
    return found


def _trait(role: str, tensor: Tensor) -> str:
    shape = "no shape yet" if is_lazy(tensor) else f"{tuple(tensor.shape)}"
    kind = "parameter" if role == "parameter" else "buffer"
    return f"{kind} {shape} {str(tensor.dtype).removeprefix('torch.')}"


def _ignored(model: nn.Module) -> set[str]:
    """Return the names of what DistributedDataParallel was told to leave alone."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    }


def _parallels() -> list[DistributedDataParallel]:
    """Return all that has been wrapped: a model does not know its wrapper."""
    return [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
