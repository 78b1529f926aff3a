"""Brings the names of two states together, which wrappers put prefixes on. Never imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from freezekit.audit.state import StateTable
from freezekit.errors import FreezekitError

__all__ = ["Aligned", "align", "named_as_in"]


@dataclass(frozen=True)
class Aligned:
    """Two states whose names were brought together.

    Args:
        table: the checkpoint.
        base: what it is compared with.
        notes: what was done to the names, after what the readers had to say.
        given: names as the files have them, with what they are here, where they differ.
    """

    table: StateTable
    base: StateTable
    notes: tuple[str, ...]
    given: dict[str, str] = field(default_factory=dict)


def align(table: StateTable, base: StateTable) -> Aligned:
    """Strip from either file the prefix by which its names differ from the other's (``model.``, ...)."""
    notes = tuple(f"{t.source}: {note}" for t in (table, base) for note in t.notes)
    prefix = _extra_prefix(table, base)
    given: dict[str, str] = {}
    if prefix:
        given = {name: name.removeprefix(prefix) for name in table if name.startswith(prefix)}
        table = _strip(table, prefix)
        notes += (f"{table.source}: prefix {prefix!r} stripped to match the base",)
    elif prefix := _extra_prefix(base, table):
        given = {name: name.removeprefix(prefix) for name in base if name.startswith(prefix)}
        base = _strip(base, prefix)
        notes += (f"{base.source}: prefix {prefix!r} stripped to match the checkpoint",)
    if not any(name in base for name in table):
        raise FreezekitError(
            "the two files have no tensor name in common, so they are not of the same model",
            where=f"{table.source}, {base.source}",
            got=f"{next(iter(table))!r} and {next(iter(base))!r}",
            remedy="give the checkpoint training started from",
        )
    return Aligned(table, base, notes, given)


def named_as_in(table: StateTable, known: StateTable) -> Callable[[str], str]:
    """Return how the manifest's names become the file's: by a prefix more or less, or not at all."""
    if prefix := _extra_prefix(table, known):
        return lambda name: prefix + name
    fewer = _extra_prefix(known, table)
    if fewer and all(name.startswith(fewer) for name in known):
        return lambda name: name.removeprefix(fewer)
    return lambda name: name


def _extra_prefix(table: StateTable, other: StateTable) -> str:
    """Return the prefix that makes most of ``table``'s names ``other``'s, or ``""`` if they match without."""
    votes: Counter[str] = Counter()
    lasts: dict[str, list[str]] = {}
    for name in other:
        lasts.setdefault(".".join(name.rsplit(".", 2)[-2:]), []).append(name)
    for name in table:
        for candidate in lasts.get(".".join(name.rsplit(".", 2)[-2:]), [])[:50]:
            if name == candidate or name.endswith("." + candidate):
                votes[name[: len(name) - len(candidate)]] += 1
    return max(votes, key=lambda prefix: (votes[prefix], -len(prefix)), default="")


def _strip(table: StateTable, prefix: str) -> StateTable:
    tensors = [
        replace(t, name=t.name.removeprefix(prefix)) for t in table.values() if t.name.startswith(prefix)
    ]
    return table.with_tensors(tensors)
