"""Tells which parameters the optimizers in a checkpoint held and stepped. Never imports torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from freezekit.audit.aligning import renaming
from freezekit.audit.checkpoint.tensors import ValueReader
from freezekit.audit.state import OptimizerState, StateTable, TensorState, joined
from freezekit.errors import CheckpointError

__all__ = ["Held", "held_by", "is_parameter"]

Key = int | str
Shape = tuple[int, ...]
#: steps that lie in the file as tensors are read up to this number
_MAX_STEPS = 20_000


#: what layers write to by themselves, which a file does not tell from parameters: of spectral norm, of vector
#: quantisation, of observers, of experts' balancing, of rotary embeddings
_BUFFERS = frozenset(
    {"weight_u", "weight_v", "_u", "_v", "embed_avg", "cluster_size", "_ema_cluster_size", "ema_cluster_size",
     "min_val", "max_val", "e_score_correction_bias", "expert_bias", "inv_freq"}
)  # fmt: skip
_CODEBOOK = ("cluster_size", "embed_avg")


@dataclass
class Held:
    """What the optimizers in a file tell of its parameters.

    Args:
        parameters: those that an optimizer could hold, in the model's order, each with its other names.
        possible: those that one may have stepped.
        held: those of them that one did step for certain.
        matched: how many optimizers were matched with the parameters.
        idle: whether one held parameters that it never stepped.
        notes: what could not be told.
    """

    parameters: dict[str, list[str]]
    possible: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    matched: int = 0
    idle: bool = False
    notes: tuple[str, ...] = ()

    @property
    def never(self) -> set[str]:
        """Those that none of the optimizers ever stepped."""
        return set(self.parameters) - self.possible if self.matched else set()


def is_parameter(name: str, table: StateTable) -> bool:
    """Tell whether an optimizer could hold a tensor: a float that no layer is known to write to by itself."""
    layer, _, last = name.rpartition(".")
    if table[name].role != "parameter" or last in _BUFFERS:
        return False
    return not all(joined(layer, own) in table for own in _CODEBOOK)


def held_by(table: StateTable, moved: Collection[str], given: Mapping[str, str]) -> Held:
    """Tell which parameters of a checkpoint its optimizers held and stepped.

    An optimizer numbers its parameters, group by group. Each group is taken for a part of the model's
    parameters in their order; what is at no place where it could lie, by the shapes of the momenta, was
    not held.

    Args:
        table: the checkpoint.
        moved: parameters that differ from the base, so that something stepped them.
        given: names as the file has them, with what they are in the table, where they differ.
    """
    known = Held(_parameters(table))
    first = {name: one for one, names in known.parameters.items() for name in names}
    optimizers = [o for o in table.training.optimizers if any(o.groups)]
    unmatched: list[str] = []
    for optimizer in optimizers:
        keys = [key for group in optimizer.groups for key in group]
        idle = _idle(optimizer, keys)
        names = optimizer.names if all(key in optimizer.names for key in keys) else {}
        if not names and all(isinstance(key, str) for key in keys):
            names = {key: str(key) for key in keys}
        if names:
            rename = renaming([given.get(name, name) for name in names.values()], list(first))
            there = {key: rename.get(given.get(name, name), name) for key, name in names.items()}
            stepped = {first[name] for key, name in there.items() if name in first and key not in idle}
            outcome = (stepped, stepped) if any(name in first for name in there.values()) else None
        else:
            only = moved if len(optimizers) == 1 else ()
            outcome = _matched(optimizer, idle, table, list(known.parameters), only)
        if outcome is None:
            unmatched.append(optimizer.path)
            continue
        known.matched += 1
        known.idle |= bool(idle)
        known.possible |= outcome[1]
        if optimizer.steps or optimizer.shapes:  # without any state nothing tells that it stepped
            known.held |= outcome[0]
    if unmatched:
        shown = ", ".join(f"'{path}'" for path in unmatched[:3])
        known.notes = (f"the optimizer state in {shown} does not fit the model's parameters: not used",)
    return known


def _parameters(table: StateTable) -> dict[str, list[str]]:
    """Return the parameters in the model's order, each once, with all its names."""
    names: dict[str, list[str]] = {}
    places: dict[object, str] = {}
    for name, tensor in table.items():
        if not is_parameter(name, table):
            continue
        read, first = tensor.read, name
        if isinstance(read, ValueReader) and read.length:
            place = (read.stored.file, read.stored.offset, read.start, read.shape, read.stride, read.dtype)
            first = places.setdefault(place, name)
        names.setdefault(first, []).append(name)
    return names


def _idle(optimizer: OptimizerState, keys: Sequence[Key]) -> set[Key]:
    """Return the keys of what was never stepped, where others were."""
    stepped = {key for key in keys if _steps(optimizer, key) != 0 and _has_state(optimizer, key)}
    return set(keys) - stepped if stepped else set()


def _has_state(optimizer: OptimizerState, key: Key) -> bool:
    return key in optimizer.steps or key in optimizer.shapes


def _steps(optimizer: OptimizerState, key: Key) -> float:
    """Return how often a parameter was stepped; 1 where that is not counted."""
    steps = optimizer.steps.get(key, 1)
    if not isinstance(steps, TensorState):
        return steps
    if steps.unsupported or steps.numel != 1 or len(optimizer.steps) > _MAX_STEPS:
        return 1
    try:
        return float(steps.values().ravel()[0])
    except CheckpointError:
        return 1


def _matched(
    optimizer: OptimizerState,
    idle: Collection[Key],
    table: StateTable,
    parameters: list[str],
    moved: Collection[str],
) -> tuple[set[str], set[str]] | None:
    """Match numbers with names: what was stepped for certain, and what may have been, or ``None``."""
    shapes = [table[name].shape for name in parameters]
    groups = [list(group) for group in optimizer.groups if group]
    steps = [[key not in idle for key in group] for group in groups]
    wanted = [[optimizer.shapes.get(key) for key in group] for group in groups]
    if sum(map(len, groups)) > len(parameters):
        return None
    places: list[Places] = []
    for _ in range(3):  # what is certain of one group is no place for another
        certain = {j: n for n, place in enumerate(places) for j in place.certain}
        found = [
            placed(want, shapes, [certain.get(j, n) == n for j in range(len(shapes))], step)
            for n, (want, step) in enumerate(zip(wanted, steps, strict=True))
        ]
        places = [place for place in found if place is not None]
        if len(places) < len(groups):
            return None
        if len(groups) == 1:
            break
    must = {j for place, step in zip(places, steps, strict=True) for j in place.stepped(step)}
    may = {j for place in places for j in place.possible}
    if len(must & may) == len(may):
        return {parameters[j] for j in must}, {parameters[j] for j in may}
    # what moved was stepped; if that is as many as were, nothing else was
    sure = must | {j for j in may if parameters[j] in moved}
    if len(sure) == sum(map(sum, steps)):
        must = may = sure
    return {parameters[j] for j in must}, {parameters[j] for j in may}


@dataclass(frozen=True)
class Places:
    """Where the items of a group can lie among the model's parameters.

    Args:
        first: for each item the earliest place.
        last: for each item the latest.
        possible: all places where one that was stepped can lie.
        certain: those where one lies however they are placed.
    """

    first: list[int]
    last: list[int]
    possible: set[int]
    certain: set[int]

    def stepped(self, steps: Sequence[bool]) -> set[int]:
        """Return the places where one that was stepped lies for certain."""
        if all(steps):
            return self.certain
        return {a for a, b, stepped in zip(self.first, self.last, steps, strict=True) if stepped and a == b}


def placed(
    wanted: Sequence[Shape | None], shapes: Sequence[Shape], free: Sequence[bool], steps: Sequence[bool]
) -> Places | None:
    """Place a group's items in order among the model's parameters, or return ``None`` where they do not fit.

    Args:
        wanted: the items' shapes; ``None`` fits any.
        shapes: the parameters'.
        free: which of them may be taken.
        steps: which of the items were stepped.

    >>> places = placed([(2,), (3,)], [(2,), (2,), (3,), (2,)], [True] * 4, [True] * 2)
    >>> places.possible, places.certain
    ({0, 1, 2}, {2})
    """
    first = _greedy(wanted, shapes, free, range(len(shapes)))
    last = _greedy(wanted[::-1], shapes, free, range(len(shapes) - 1, -1, -1))
    if first is None or last is None:
        return None
    last.reverse()
    # what comes before an item fits before its earliest place, and what comes after it after its latest: it
    # can lie anywhere between the two where its shape is
    starts: dict[Shape | None, list[int]] = {}
    reach: dict[Shape | None, list[int]] = {}
    for shape, start, end, stepped in zip(wanted, first, last, steps, strict=True):
        if stepped:
            starts.setdefault(shape, []).append(start)
            reach.setdefault(shape, []).append(end)  # both grow from item to item
    possible, certain = set(), set()
    for j in filter(free.__getitem__, range(len(shapes))):
        for shape in (shapes[j], None):
            i = bisect_right(starts.get(shape, []), j)
            if i and reach[shape][i - 1] >= j:
                possible.add(j)
        # how many fit before it and after it: if that is not all of them, one lies on it
        if bisect_left(first, j) + len(last) - bisect_right(last, j) < len(wanted):
            certain.add(j)
    return Places(first, last, possible, certain)


def _greedy(
    wanted: Sequence[Shape | None], shapes: Sequence[Shape], free: Sequence[bool], places: Sequence[int]
) -> list[int] | None:
    taken: list[int] = []
    for j in places:
        if len(taken) == len(wanted):
            break
        if free[j] and wanted[len(taken)] in (None, shapes[j]):
            taken.append(j)
    return taken if len(taken) == len(wanted) else None
