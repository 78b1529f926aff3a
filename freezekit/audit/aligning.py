"""Brings the names of two states together, which wrappers put prefixes on. Never imports torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.state import StateTable
from freezekit.errors import FreezekitError

__all__ = ["Aligned", "align", "named_as_in", "renaming"]

Shapes = Mapping[str, tuple[int, ...]]
Pair = tuple[str, str]

#: what wrappers put into a name, wherever they are in the model
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
#: parts of names of a copy that is not the model that trains
_COPIES = frozenset({"ema", "model_ema", "ema_model", "teacher", "momentum", "target", "averaged"})
#: parts of a name that are looked at from its end, candidates for one name, names that vote
_DEPTH, _MOST, _SAMPLE = 16, 20, 20_000


@dataclass(frozen=True)
class Aligned:
    """Two states whose names were brought together.

    Args:
        table: the checkpoint.
        base: what it is compared with.
        notes: what was done to the names, after what the readers had to say.
        given: names as the files have them, with what they are here, where they differ.
        outside: names of what lies in one of the files only, beside the part that both have.
    """

    table: StateTable
    base: StateTable
    notes: tuple[str, ...]
    given: dict[str, str] = field(default_factory=dict)
    outside: frozenset[str] = frozenset()


def align(table: StateTable, base: StateTable) -> Aligned:
    """Give the tensors of a checkpoint the names that the base has for them.

    Where one of the files has a prefix that the other has not (``model.``, ``backbone.``), or another, on all
    its names or on those of a part, it is told by the names that follow it.

    Args:
        table: the checkpoint.
        base: what it is compared with.

    Raises:
        FreezekitError: they have no tensor name in common.
    """
    notes = tuple(f"{t.source}: {note}" for t in (table, base) for note in t.notes)
    pairs: list[Pair] = []
    rename = renaming(list(table), list(base), _shapes(table), _shapes(base), pairs)
    if not any(rename.get(name, name) in base for name in table):
        raise FreezekitError(
            "the two files have no tensor name in common, so they are not of the same model",
            where=f"{table.source}, {base.source}",
            got=f"{next(iter(table))!r} and {next(iter(base))!r}",
            remedy="give the checkpoint training started from",
        )
    whole = next(iter(pairs), None)
    # the shorter of the two names is the one that reports have, and patterns
    shorter = whole is not None and not whole[0] and all(whole[1] + n == new for n, new in rename.items())
    given: dict[str, str] = {}
    left: list[str] = []
    outside: list[str] = []
    if whole is not None and shorter:
        prefix = whole[1]
        taken = {name.removeprefix(prefix) for name in base if name.startswith(prefix)}
        left = [name for name in base if not name.startswith(prefix) and name in taken]
        given = {name: name.removeprefix(prefix) for name in base if name.startswith(prefix)}
        outside = [name for name in base if not name.startswith(prefix)]
        base = _renamed(base, given, left)
    elif rename:
        given = rename
        taken = set(rename.values())
        left = [name for name in table if name not in rename and name in taken]
        outside = [name for name in table if name not in rename and name not in base]
        table = _renamed(table, rename, left)
    if rename and not pairs:
        notes += ("names were brought together without what wrappers (DataParallel, torch.compile) put in",)
    for mine, theirs in pairs:
        notes += (_note(table, base, mine, theirs),)
    if left:
        notes += (f"left out, as prefixes gave their names to others: {_some(left)}",)
    if pairs and (beside := [name for name in outside if name not in left]):
        there = table if beside[0] in table else base
        notes += (f"{there.source}: {len(beside)} tensors lie outside what both files have: {_some(beside)}",)
    return Aligned(table, base, notes, given, frozenset(outside))


def named_as_in(table: StateTable, known: StateTable) -> Callable[[str], str]:
    """Return how a manifest's names become the file's."""
    rename = renaming(list(known), list(table), _shapes(known), _shapes(table))
    return lambda name: rename.get(name, name)


def renaming(
    names: Sequence[str],
    others: Sequence[str],
    shapes: Shapes | None = None,
    other_shapes: Shapes | None = None,
    pairs: list[Pair] | None = None,
) -> dict[str, str]:
    """Return how names become those of another state, by a prefix more, less, or another.

    Args:
        names: the names.
        others: those of the other state.
        shapes: of the tensors, which tell between prefixes that fit alike.
        other_shapes: likewise.
        pairs: the prefixes that were taken, and what they became, are added to it.

    Returns:
        the new name of each name that is to have one.

    >>> renaming(["model.a.weight", "model.b.weight"], ["a.weight", "b.weight"])
    {'model.a.weight': 'a.weight', 'model.b.weight': 'b.weight'}
    """
    there, own = set(others), set(names)
    if own <= there or there <= own:
        return {}
    rename: dict[str, str] = {}
    found: list[Pair] = [] if pairs is None else pairs
    bare, other_bare = _bare(names), _bare(others)
    back = {short: name for name, short in other_bare.items()}
    here = {short: name for name, short in bare.items()}
    sizes = {short: shapes[name] for short, name in here.items()} if shapes and other_shapes else {}
    other_sizes = (
        {short: other_shapes[name] for short, name in back.items()} if sizes and other_shapes else {}
    )
    waiting, free = dict.fromkeys(here), dict.fromkeys(back)
    first: Pair = "", ""
    for turn in range(6):
        votes = _votes(waiting, free, sizes, other_sizes)
        pair = _elected(votes, waiting, free, sizes, other_sizes, first if turn else None)
        if pair is None:
            break
        first = first if turn else pair
        mine, theirs = pair
        if mine != theirs:
            found.append(pair)
        for name in [name for name in waiting if name.startswith(mine)]:
            other = theirs + name.removeprefix(mine)
            if other in free:
                rename[here[name]] = back[other]
                del waiting[name], free[other]
    if first[0] != first[1]:  # what follows the first prefix is of the same model, though the other lacks it
        for name in waiting:
            if name.startswith(first[0]) and name not in back:
                rename[here[name]] = first[1] + name.removeprefix(first[0])
    return {name: other for name, other in rename.items() if name != other}


def _bare(names: Sequence[str]) -> dict[str, str]:
    """Return the names without what wrappers put into them, where they stay different."""
    made = {name: ".".join(p for p in name.split(".") if p not in _WRAPPERS) for name in names}
    counts = Counter(made.values())
    original = set(names)
    return {
        name: short if short and counts[short] == 1 and (short == name or short not in original) else name
        for name, short in made.items()
    }


def _votes(
    names: Mapping[str, None], others: Mapping[str, None], sizes: Shapes, other_sizes: Shapes
) -> Counter[Pair]:
    """Count, for each pair of prefixes, the names that it would make the same, and of the same shape."""
    votes: Counter[Pair] = Counter()
    tails: dict[str, list[str]] = {}
    for other in islice(others, _SAMPLE):
        for tail in _tails(other):
            tails.setdefault(tail, []).append(other)
    for name in islice(names, _SAMPLE):
        ends = [tail for tail in _tails(name) if tail in tails]
        # what has the longest end in common with it, and what is an end of it
        for other in {*(tails[ends[0]][:_MOST] if ends else ()), *(end for end in ends if end in others)}:
            alike = bool(sizes) and sizes[name] == other_sizes[other]
            votes[_prefixes(name, other)] += 2 if alike else 1
    same = sum(2 if sizes and sizes[n] == other_sizes[n] else 1 for n in names if n in others)
    if same:
        votes["", ""] = same
    return votes


def _tails(name: str) -> Iterator[str]:
    """Yield the ends of a name that may tell what it is, the longest first."""
    parts = name.split(".")
    for n in range(min(len(parts), _DEPTH), 1, -1):
        yield ".".join(parts[-n:])
    if len(parts) == 1:
        yield name


def _prefixes(name: str, other: str) -> Pair:
    mine, theirs = name.split("."), other.split(".")
    while mine and theirs and mine[-1] == theirs[-1]:
        mine.pop()
        theirs.pop()
    return "".join(f"{part}." for part in mine), "".join(f"{part}." for part in theirs)


def _around(mine: str, theirs: str) -> Pair:
    """Return the prefixes of what holds the last part that two prefixes have in common."""
    parts, others = mine.split("."), theirs.split(".")
    where = {part: at for at, part in enumerate(others[:-1])}
    for at in reversed(range(len(parts) - 1)):
        if parts[at] in where:
            return _prefixes(".".join(parts[: at + 1]), ".".join(others[: where[parts[at]] + 1]))
    return mine, theirs


def _elected(
    votes: Counter[Pair],
    names: Mapping[str, None],
    others: Mapping[str, None],
    sizes: Shapes,
    other_sizes: Shapes,
    first: Pair | None,
) -> Pair | None:
    """Return the pair with the most votes that makes sense, or ``None``; ``first`` is the one before."""
    # parts of the model may have a wrapper of their own: what is in them speaks for what is around them
    parts: dict[Pair, list[Pair]] = {pair: [pair] for pair in votes}
    for pair in votes:
        if (outer := _around(*pair)) != pair and outer in votes:
            parts[outer].append(pair)

    def rank(pair: Pair) -> tuple[int, bool, int]:
        words = [prefix.split(".") for prefix in pair]
        # the model that trains may have parts wrapped which its copy has not
        weight = math.prod(2 if _COPIES.isdisjoint(side) else 1 for side in words)
        return weight * sum(votes[part] for part in parts[pair]), pair == ("", ""), -sum(map(len, words))

    def matched(mine: str, theirs: str) -> dict[str, str]:
        made = ((name, theirs + name.removeprefix(mine)) for name in names if name.startswith(mine))
        return {name: other for name, other in made if other in others}

    for mine, theirs in sorted(votes, key=rank, reverse=True)[:_MOST]:
        if mine == theirs:
            return mine, theirs
        under = sum(name.startswith(mine) for name in names)
        there = matched(mine, theirs)
        if first is None and mine and theirs:
            for part in parts[mine, theirs][1:_MOST]:
                there = matched(*part) | there
        alike = [name for name, other in there.items() if not sizes or sizes[name] == other_sizes[other]]
        if first is not None:
            # a part of the model may have a wrapper of its own; another of its parts is not it
            whole = under if mine else sum(other.startswith(theirs) for other in others)
            if len(alike) >= 2 and len(alike) == len(there) == whole and _inserted(mine, theirs, first):
                return mine, theirs
        elif mine and theirs:
            least = max(3, min(len(names), len(others)) // 3)
            if len(there) >= least and 2 * len(alike) > len(there):
                return mine, theirs
        elif 10 * len(there) >= min(len(names), len(others)):
            return mine, theirs
    return None


def _inserted(mine: str, theirs: str, first: Pair) -> bool:
    """Tell whether one of two prefixes is the other with parts put in, beside the first pair's difference."""
    if mine.startswith(first[0]):
        mine = first[1] + mine.removeprefix(first[0])
    shorter, longer = sorted((mine.split("."), theirs.split(".")), key=len)
    rest = iter(longer)
    return all(part in rest for part in shorter)


def _shapes(table: StateTable) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in table.items()}


def _renamed(table: StateTable, names: Mapping[str, str], left: Sequence[str]) -> StateTable:
    gone = set(left)
    tensors = [replace(t, name=names.get(name, name)) for name, t in table.items() if name not in gone]
    return table.with_tensors(tensors)


def _note(table: StateTable, base: StateTable, mine: str, theirs: str) -> str:
    if mine and theirs:
        said = f"prefix '{printable(mine)}' taken for '{printable(theirs)}' of the base"
        return f"{table.source}: {said}"
    if mine:
        return f"{table.source}: prefix '{printable(mine)}' stripped to match the base"
    return f"{base.source}: prefix '{printable(theirs)}' stripped to match the checkpoint"


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:4])) + (", ..." if len(names) > 4 else "")
