"""The caps that keep a hostile file from taking minutes or gigabytes, in one place, and how to lift them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from freezekit.errors import CheckpointError

__all__ = ["Limits"]

_LIFTED = 2**62


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a file is followed before it is refused as bigger than any real checkpoint.

    Args:
        pickle_bytes: bytes of one pickle. Tensors' values are not in it, so real ones have a few MB.
        pickle_work: what following a pickle may cost, in about bytes of memory. A tensor takes about 1,500.
        keys: tensors of one state.
        containers: dicts, lists and objects that are searched for a state.
        nesting: how deep in each other they are searched.
        entries: what they hold, together; one that is named many times counts each time.

    >>> Limits.DEFAULT.keys < Limits.NONE.keys
    True
    """

    pickle_bytes: int = 32 * 2**20
    pickle_work: int = 120_000_000
    keys: int = 100_000
    containers: int = 50_000
    nesting: int = 100
    entries: int = 500_000

    DEFAULT: ClassVar[Limits]
    NONE: ClassVar[Limits]

    @staticmethod
    def hit(what: str, got: str) -> CheckpointError:
        """Return the error for a cap that was hit, which says how to read the file all the same."""
        return CheckpointError(
            what, got=got, remedy="if you trust the file, --no-limits reads it all the same"
        )


Limits.DEFAULT = Limits()
Limits.NONE = Limits(_LIFTED, _LIFTED, _LIFTED, _LIFTED, _LIFTED, _LIFTED)
