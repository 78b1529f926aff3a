"""What a pickle's contents become here: plain data that names code but never is code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from freezekit.audit.checkpoint.container import printable

__all__ = [
    "GlobalRef",
    "Key",
    "Opaque",
    "StorageRef",
    "TensorRef",
    "as_mapping",
    "children",
    "describe",
    "held_by",
]


@dataclass(frozen=True, slots=True)
class GlobalRef:
    """A class or function that the pickle names; nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def __hash__(self) -> int:
        return hash(self.name)  # which text remembers; it is asked for at each call


@dataclass(slots=True, eq=False, repr=False)
class StorageRef:
    """A tensor's memory, somewhere in the file.

    Args:
        key: what the file calls it.
        dtype: of the elements it was saved as; ``"uint8"`` when untyped.
        numel: its number of those elements.
        location: the device it was saved from.
        start: first element, where it is a view of a bigger storage (torch < 0.4).
    """

    key: str
    dtype: str
    numel: int
    location: str
    start: int = 0


@dataclass(slots=True, eq=False, repr=False)
class TensorRef:
    """A tensor as the pickle describes it: nothing in it has been checked yet.

    Args:
        storage: where its values are; ``None`` only when unsupported.
        offset: first element in the storage.
        shape: sizes.
        stride: steps between elements.
        dtype: torch's name without ``torch.``.
        is_parameter: whether it was saved as an ``nn.Parameter``.
        unsupported: why it has no values that can be read, or ``None``.
    """

    storage: StorageRef | None
    offset: object
    shape: object
    stride: object
    dtype: str
    is_parameter: bool = False
    unsupported: str | None = None


@dataclass(slots=True, eq=False, repr=False)
class Opaque:
    """An object of a class that is not imported: what it was made by and from.

    Args:
        made_by: the class or function, where known.
        args: what that would have been called with.
        state: what its ``__setstate__`` or ``__dict__`` would have been given.
        mapping: its items, if it is a kind of dict.
        items: its items, if it is a kind of list or set.
    """

    made_by: GlobalRef | None
    args: tuple[Any, ...] = ()
    state: Any = None
    mapping: dict[Any, Any] | None = None
    items: list[Any] | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Key:
    """A dictionary key that is compared by identity.

    Hashing a tuple nested a million deep would crash the interpreter, and huge ints can be made to collide.
    """

    value: Any


def as_mapping(value: object) -> dict[Any, Any] | None:
    """Return an object's items, if it is a kind of dict, or else its attributes."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Opaque):
        if value.mapping is not None:
            return value.mapping
        return value.state if isinstance(value.state, dict) else None
    return None


def children(value: object) -> list[tuple[str, Any]]:
    """Return what a container or an opaque object holds, each with a name for messages."""
    if isinstance(value, dict):
        return [(key if isinstance(key, str) else "?", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(str(index), item) for index, item in enumerate(value)]
    if not isinstance(value, Opaque):
        return []
    found: list[tuple[str, Any]] = []
    for part in (value.mapping, value.state, value.items, value.args):
        found += children(part) if isinstance(part, dict | list | tuple) else [("?", part)]
    return found


def held_by(value: object) -> int:
    """Return how many :func:`children` would return, or a few less."""
    if isinstance(value, Opaque):
        return sum(map(held_by, (value.mapping, value.items, value.args))) + (
            len(value.state) if isinstance(value.state, dict | list | tuple) else 1
        )
    return len(value) if isinstance(value, dict | list | tuple) else 0


def describe(value: object) -> str:
    """Say in a few words what an object is, without looking into it any deeper."""
    if isinstance(value, Key):
        value = value.value
    if isinstance(value, dict):
        keys = [f"'{printable(key, 30)}'" for key in list(value)[:6] if isinstance(key, str)]
        more = ", …" if len(value) > len(keys) else ""
        return f"a dict with {', '.join(keys)}{more}" if keys else f"a dict of {len(value)} items"
    if isinstance(value, Opaque | GlobalRef):
        maker = value.made_by if isinstance(value, Opaque) else value
        return f"an object made by {printable(str(maker))}" if maker else "an object"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)} items"
    if isinstance(value, TensorRef | StorageRef):
        return "one tensor without a name"
    return "None" if value is None else f"a value of type {type(value).__name__}"
