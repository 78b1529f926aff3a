"""What collectives wrote to frozen tensors: DistributedDataParallel sends buffers round at every forward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from freezekit.audit.live.region import Region
from freezekit.audit.live.tensors import pointer, sample, version

__all__ = ["Collectives", "Reach", "Sent"]

_WHOLE = 4096
"""Up to how many values of a tensor are compared around a collective."""


@dataclass(slots=True)
class Reach:
    """The frozen tensors that a collective was given, and where each is in the values compared."""

    tensors: dict[str, Tensor]
    views: list[list[Tensor]] = field(default_factory=list)
    slices: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def read(self) -> list[Tensor]:
        """Return a copy of the compared values, those of one kind and device in one piece."""
        return [torch.cat(views) for views in self.views]


@dataclass(slots=True)
class Sent:
    """What one kind of collective did to the same tensors in one interval."""

    reach: Reach
    unlike: list[Tensor]
    writes: dict[str, int]

    def has_moved(self, name: str) -> bool:
        """Tell whether a compared value moved; this waits for the device."""
        if name not in self.reach.slices:
            return True  # it cannot be compared
        kind, start, stop = self.reach.slices[name]
        return bool(self.unlike[kind][start:stop].any())

    def join(self, other: Sent) -> None:
        """Add another call over the same tensors."""
        self.unlike = [a | b for a, b in zip(self.unlike, other.unlike, strict=True)]
        for name, count in other.writes.items():
            self.writes[name] += count


class Collectives:
    """Finds the frozen tensors among those a collective is given, by their memory.

    Args:
        region: what is frozen.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._names: dict[int, list[str]] = {}
        self._reaches: dict[tuple[int, ...], Reach] = {}

    def clear(self) -> None:
        """Forget where the tensors are: some of them have been replaced."""
        self._names.clear()
        self._reaches.clear()

    def before(self, tensors: list[Tensor]) -> tuple[Reach, list[Tensor], dict[str, int]] | None:
        """Return what :meth:`after` needs, ``None`` if no frozen tensor is among them."""
        key = tuple([pointer(tensor) for tensor in tensors])
        reach = self._reaches.get(key)
        if reach is None:
            if not self._names:
                self._find()
            if not any(at in self._names for at in key):
                return None
            # its views keep the memory, so that nothing else can come to lie there
            reach = self._reaches[key] = self._reach(tensors)
        return reach, reach.read(), {name: version(t) for name, t in reach.tensors.items()}

    @staticmethod
    def after(before: tuple[Reach, list[Tensor], dict[str, int]]) -> Sent:
        """Compare."""
        reach, old, versions = before
        unlike = [a != b for a, b in zip(old, reach.read(), strict=True)]
        return Sent(reach, unlike, {name: version(reach.tensors[name]) - n for name, n in versions.items()})

    def _find(self) -> None:
        for name, place in self._region.places.items():
            tensor = place.tensor()
            if tensor is not None and pointer(tensor):
                self._names.setdefault(pointer(tensor), []).append(name)

    def _reach(self, tensors: list[Tensor]) -> Reach:
        reach = Reach({})
        kinds: dict[tuple[torch.dtype, torch.device], int] = {}
        for tensor in tensors:
            for name in self._names.get(pointer(tensor), ()):
                held = self._region.places[name].tensor()
                if held is None or pointer(held) != pointer(tensor):
                    continue  # it has gone elsewhere since
                reach.tensors[name] = tensor
                view = sample(held, _WHOLE)
                if view is None:
                    continue
                kind = kinds.setdefault((view.dtype, view.device), len(kinds))
                if kind == len(reach.views):
                    reach.views.append([])
                start = sum(other.numel() for other in reach.views[kind])
                reach.views[kind].append(view.reshape(-1))
                reach.slices[name] = (kind, start, start + view.numel())
        return reach
