"""From what each rank has to findings: which tensors differ between ranks, and which ranks are wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from freezekit.audit.findings import CAUSES, Cause, Finding
from freezekit.audit.live.sharing import grouped, plural

__all__ = ["Row", "Table", "disagreements", "on_ranks"]

K = TypeVar("K", bound=Hashable)

_OWN = ("train-mode forward", "own forward", "recompute", "gradient", "momentum", "weight decay", "optimizer")
"""Causes on the rank itself: what they moved has nobody overwritten."""


_ONE = {"differ": "differs", "are": "is", "they": "it"}
_MANY = {word: word for word in _ONE}


class Row(NamedTuple):
    """One tensor on one rank, in numbers and words that a collective can carry.

    Args:
        trait: what must be the same on each rank: role, shape, dtype.
        frozen: whether it counts as frozen.
        buffer: whether it is no parameter.
        shard: which part of the tensor this is; empty where each rank has all of it.
        base: the digest of its frozen value.
        now: the digest of its value.
        cause: kind, detail and line, where it is known why a frozen one moved.
        note: what is known of how a trained one's gradients go round.
    """

    trait: str
    frozen: bool
    buffer: bool
    shard: str
    base: int
    now: int
    cause: tuple[str, str, str | None] | None = None
    note: str = ""


@dataclass
class Table:
    """All that one rank tells when the ranks disagree.

    Args:
        step: its optimizer steps.
        rows: its tensors, by name.
        modes: which of its modules are in train mode.
        told: what its own audit found since the ranks last met.
    """

    step: int
    rows: dict[str, Row] = field(default_factory=dict)
    modes: dict[str, bool] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


class _Odd(NamedTuple):
    code: str
    ranks: tuple[int, ...]
    text: str
    fix: str
    kind: str = ""
    """Of the cause."""


def disagreements(tables: Sequence[Table]) -> list[Finding]:
    """Return the findings, the same on each rank that has the same tables.

    Args:
        tables: of each rank.

    >>> a, b = Row("", True, False, "", base=1, now=1), Row("", True, False, "", base=1, now=2)
    >>> for finding in disagreements([Table(3, {"w": a}), Table(3, {"w": b})]):
    ...     print(finding)
    FK501 w at step 3: differs on rank 1, where it is not what was frozen
    """
    step = max(table.step for table in tables)
    found = [*_steps(tables), *_modes(tables)]
    odd: dict[_Odd, list[str]] = defaultdict(list)
    causes: dict[str, Cause] = {}
    names = dict.fromkeys(name for table in tables for name in table.rows)
    for name in names:
        rows = {rank: table.rows[name] for rank, table in enumerate(tables) if name in table.rows}
        for one, cause in _of_tensor(rows, len(tables)):
            odd[one].append(name)
            if cause is not None:
                causes.setdefault(name, cause)
    for one, those in odd.items():
        for name, group in _by_layer(grouped(those, names)).items():
            words = _ONE if len(group) == 1 else _MANY
            what = "" if group == [name] else f"{plural(len(group), 'tensor')} ({_listed(group)}) "
            text, cause = what + one.text.format(**words), causes.get(group[0]) if one.kind else None
            found.append(Finding(one.code, name, text, one.fix, step, cause, one.ranks))
    return [*found, *_told_elsewhere(tables, found, step)]


def _by_layer(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Join single tensors of one layer under its name."""
    found: dict[str, list[str]] = defaultdict(list)
    alone = [name.rpartition(".")[0] for name, group in groups.items() if group == [name]]
    for name, group in groups.items():
        layer = name.rpartition(".")[0]
        found[layer if group == [name] and layer and alone.count(layer) > 1 else name] += group
    return found


def on_ranks(ranks: Iterable[int], world: int) -> str:
    """Name ranks in words.

    >>> on_ranks([1], 4), on_ranks([0, 2, 3], 4), on_ranks(range(4), 4)
    ('rank 1', 'ranks 0, 2-3', 'all ranks')
    """
    those = sorted(ranks)
    if len(those) == world:
        return "all ranks"
    spans: list[list[int]] = []
    for rank in those:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in spans]
    more = f" and {len(shown) - 8} more spans" if len(shown) > 8 else ""
    return f"rank{'' if len(those) == 1 else 's'} {', '.join(shown[:8])}{more}"


def _by_value(values: Mapping[int, K]) -> dict[K, list[int]]:
    found: dict[K, list[int]] = defaultdict(list)
    for rank, value in values.items():
        found[value].append(rank)
    return found


def _minority(values: Mapping[int, Hashable]) -> tuple[int, ...]:
    """Return the ranks that have not what more than half have; all, where there is no such majority."""
    sides = _by_value(values)
    most = max(sides.values(), key=len)
    if 2 * len(most) > len(values):
        return tuple(rank for rank in values if rank not in most)
    return tuple(values)


def _steps(tables: Sequence[Table]) -> Iterator[Finding]:
    steps = {rank: table.step for rank, table in enumerate(tables)}
    if len(sides := _by_value(steps)) > 1:
        told = ", ".join(f"{on_ranks(those, len(tables))} at {step}" for step, those in sorted(sides.items()))
        fix = (
            "attach the auditors at the same step and with the same ranks= on every rank, and let each "
            "rank take as many optimizer steps"
        )
        message = f"the ranks are at different optimizer steps: {told}"
        yield Finding("FK505", "model", message, fix, max(steps.values()), None, _minority(steps))


def _modes(tables: Sequence[Table]) -> Iterator[Finding]:
    odd: dict[tuple[int, ...], list[str]] = defaultdict(list)
    where: dict[str, list[int]] = {}
    for name in dict.fromkeys(name for table in tables for name in table.modes):
        modes = {rank: table.modes[name] for rank, table in enumerate(tables) if name in table.modes}
        if len(set(modes.values())) > 1:
            where[name] = [rank for rank, on in modes.items() if on]
            odd[_minority(modes)].append(name)
    step = max(table.step for table in tables)
    for ranks, names in odd.items():
        those = set(names)
        tops = [name for name in names if not name or not ({""} | {*_parents(name)}) & those]
        for name in tops:
            train = where[name]
            message = (
                f"in train mode on {on_ranks(train, len(tables))} and in eval mode on "
                f"{on_ranks(set(range(len(tables))) - {*train}, len(tables))}"
            )
            fix = "the same train() and eval() calls on every rank; freezekit.freeze_backbone(model) keeps "
            fix += "what is frozen in eval mode whatever they are"
            yield Finding("FK504", name or "model", message, fix, step, None, ranks)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _of_tensor(rows: dict[int, Row], world: int) -> Iterator[tuple[_Odd, Cause | None]]:
    """Yield what is odd about one tensor."""
    fix = "build and freeze the model in the same way on every rank"
    for what in ("there", "kind", "frozen"):
        values: dict[int, Hashable] = {
            rank: rank in rows
            if what == "there"
            else rows[rank].trait
            if what == "kind"
            else rows[rank].frozen
            for rank in range(world)
        }
        sides = _by_value(values)
        if len(sides) == 1:
            continue
        if what == "there":
            text = f"{{are}} on {on_ranks(sides[True], world)} and missing on {on_ranks(sides[False], world)}"
        elif what == "frozen":
            text = (
                f"{{are}} frozen on {on_ranks(sides[True], world)} and not on {on_ranks(sides[False], world)}"
            )
        else:
            told = ", ".join(f"{trait} on {on_ranks(those, world)}" for trait, those in sides.items())
            text = f"{{are}} of another kind from rank to rank: {told}"
        yield _Odd("FK504", _minority(values), text, fix), None
        return
    frozen = rows[0].frozen
    for part in _by_value({rank: row.shard for rank, row in rows.items()}).values():
        some = {rank: rows[rank] for rank in part}
        if len(some) > 1:
            yield from _frozen(some, world) if frozen else _trained(some, world)


def _frozen(rows: dict[int, Row], world: int) -> Iterator[tuple[_Odd, Cause | None]]:
    left = [rank for rank, row in rows.items() if row.now != row.base]
    taken: dict[int, list[int]] = defaultdict(list)
    for rank in left:
        row = rows[rank]
        if row.cause is None or row.cause[0] not in _OWN:
            sources = (r for r, o in rows.items() if o.now == o.base == row.now != row.base)
            if (source := next(sources, None)) is not None:
                taken[source].append(rank)
    for source, those in taken.items():
        cause = _cause(rows[those[0]])
        text = f"had other values on {on_ranks(those, world)}, now those of rank {source}"
        yield _Odd("FK502", tuple(those), text, CAUSES["broadcast"], _kind(cause)), cause
    if len({row.now for row in rows.values()}) == 1:
        return
    explained = {rank for those in taken.values() for rank in those}
    if left and len(left) < len(rows):
        wrong = tuple(rank for rank in left if rank not in explained)
        if wrong:
            at = f"{{differ}} on {on_ranks(wrong, world)}, where {{they}} {{are}} not what was frozen"
            cause = _cause(rows[wrong[0]])
            yield _Odd("FK501", wrong, at, CAUSES[_kind(cause)], _kind(cause)), cause
        # who has left makes the others no more alike
        rows = {rank: row for rank, row in rows.items() if rank not in left}
        left = []
        if len({row.now for row in rows.values()}) == 1:
            return
    if left:
        cause = _cause(rows[left[0]])
        text = "{differ} between all ranks: on none {they} {are} what was frozen"
        yield _Odd("FK501", tuple(left), text, CAUSES[_kind(cause)], _kind(cause)), cause
        return
    wrong = _minority({rank: row.now for rank, row in rows.items()})
    sides = _by_value({rank: row.now for rank, row in rows.items()})
    if len(wrong) < len(rows):
        text = f"{{differ}} on {on_ranks(wrong, world)} since before the audit"
    else:
        text = f"{{differ}} between {_sides(sides.values(), world)} since before the audit"
    yield _Odd("FK501", wrong, text, "load the same checkpoint on every rank before freezing"), None


def _trained(rows: dict[int, Row], world: int) -> Iterator[tuple[_Odd, Cause | None]]:
    values = {rank: row.now for rank, row in rows.items()}
    sides = _by_value(values)
    if len(sides) == 1 or all(row.buffer for row in rows.values()):
        return
    wrong = _minority(values)
    note = next((row.note for row in rows.values() if row.note), "")
    text = f"{{differ}} on {on_ranks(wrong, world)}"
    if len(wrong) == len(rows):
        text = f"{{differ}} between {_sides(sides.values(), world)}"
    fix = (
        "unfreeze first and wrap then: DistributedDataParallel(ddp.module), on every rank"
        if note
        else "wrap the model in DistributedDataParallel, or average every .grad over the ranks before "
        "optimizer.step(); start from the same values, and with the same optimizer, on every rank"
    )
    yield _Odd("FK503", wrong, text + (f"; {note}" if note else ""), fix), None


def _sides(sides: Collection[list[int]], world: int) -> str:
    if len(sides) > 2:
        return f"{len(sides)} groups of ranks" if len(sides) < world else "all ranks"
    return " and ".join(on_ranks(those, world) for those in sides)


def _cause(row: Row) -> Cause | None:
    return None if row.cause is None else Cause(*row.cause)


def _kind(cause: Cause | None) -> str:
    return "unknown" if cause is None else cause.kind


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _told_elsewhere(tables: Sequence[Table], found: list[Finding], step: int) -> Iterator[Finding]:
    """Yield what some ranks' own audits found and nothing else tells on the others."""
    named = {rank for finding in found for rank in finding.ranks}
    those = {rank: table.told for rank, table in enumerate(tables) if table.told}
    if len(those) == len(tables):
        return
    for rank, told in those.items():
        if rank not in named:
            more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
            message = f"the audit on rank {rank} found what the others did not: {told[0]}{more}"
            fix = f"see the report of rank {rank}: save auditor.report() there, or print it"
            yield Finding("FK507", "model", message, fix, step, None, (rank,))
