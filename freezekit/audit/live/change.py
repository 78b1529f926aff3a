"""A change of a frozen tensor, as the snapshot sees it and the search for its cause is given it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from freezekit.audit.live.region import Place

__all__ = ["Change", "What"]

What = Literal["value", "missing", "added", "shape", "dtype", "device"]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One frozen tensor that is not what it was.

    Args:
        place: where it is.
        tensor: what is there now, ``None`` if nothing is.
        before: its frozen value, ``None`` where only a digest is kept, or nothing was there.
        what: in what it is another; ``"device"`` if that alone.
        replaced: whether another tensor object is there than at the last look.
        rebased: whether it is the same object with other memory, as after ``parameter.data = ...``.
        writes: how far torch's count of writes went since it was last seen unchanged.
        since: the clock (:attr:`Witness.now`) at the look at which it was last known to be unchanged.
    """

    place: Place
    tensor: Tensor | None
    before: Tensor | None
    what: What
    replaced: bool
    rebased: bool
    writes: int
    since: int
