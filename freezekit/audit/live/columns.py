"""Some of the values of many tensors, side by side: a step has no time to look at each by itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freezekit.audit.live.tensors import local

__all__ = ["Column", "Views", "row_of"]


@dataclass(slots=True)
class Column:
    """One answer for each of many tensors, put together from answers about their values.

    Args:
        flags: what is true of each value, in rows.
        spans: for each tensor the row, and from where to where in it; ``None`` for what has no values.
    """

    flags: list[Tensor]
    spans: list[tuple[int, int, int] | None]

    def any(self, at: int) -> Tensor | None:
        """Tell whether it is true of any value of a tensor, without waiting for the device."""
        span = self.spans[at]
        return None if span is None else self.flags[span[0]][span[1] : span[2]].any()


@dataclass(slots=True)
class _Layout:
    parts: list[list[Tensor]]
    spans: list[tuple[int, int, int] | None]
    lasting: bool = True
    """Whether all are views, and none a copy."""

    def rows(self) -> list[Tensor]:
        return [torch.cat(views) for views in self.parts]


class Views:
    """Views of tensors, made once for tensors that are the same from step to step.

    They are kept from the second time on: a gradient that is dropped after each step must not live longer.

    Args:
        view: returns the values to look at, ``None`` where there are none.
    """

    def __init__(self, view: Callable[[Tensor], Tensor | None]) -> None:
        self._view = view
        self._seen: list[Callable[[], Tensor | None]] = []
        self._pointers: list[int] | None = None
        self._layout: _Layout | None = None

    def look(
        self, tensors: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[tuple[int, int, int] | None]]:
        """Return a copy of the values in rows, and where in them each tensor has its own."""
        pointers = _pointers(tensors)
        same = pointers is not None and pointers == self._pointers
        if not same or any(ref() is not tensor for ref, tensor in zip(self._seen, tensors, strict=True)):
            self._seen = [_nothing if tensor is None else weakref.ref(tensor) for tensor in tensors]
            self._pointers, self._layout = pointers, None
            layout = self._laid_out(tensors)
        else:
            layout = self._layout or self._laid_out(tensors)
            self._layout = layout if layout.lasting else None
        return layout.rows(), layout.spans

    def _laid_out(self, tensors: Sequence[Tensor | None]) -> _Layout:
        layout = _Layout([], [])
        kinds: dict[tuple[torch.device, torch.dtype], tuple[int, int]] = {}
        for tensor in tensors:
            view = None if tensor is None else self._view(local(tensor).detach())
            if view is None:
                layout.spans.append(None)
                continue
            layout.lasting &= tensor is not None and _storage(view) == _storage(local(tensor))
            kind = (view.device, view.dtype)
            row, start = kinds.get(kind, (len(layout.parts), 0))
            if row == len(layout.parts):
                layout.parts.append([])
            layout.parts[row].append(view)
            kinds[kind] = row, start + view.numel()
            layout.spans.append((row, start, start + view.numel()))
        return layout


def row_of(tensor: Tensor, most: int) -> Tensor | None:
    """Return at most so many of the values, spread over the tensor; what is sparse has its own."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    strides = tensor.stride()  # in the order of memory the values are a view in channels-last too
    flat = tensor.permute(sorted(range(len(strides)), key=lambda dim: -strides[dim])).reshape(-1)
    return flat[:: -(-flat.numel() // most)]


def _nothing() -> None:
    return None


def _pointers(tensors: Sequence[Tensor | None]) -> list[int] | None:
    try:
        return [0 if tensor is None else local(tensor).data_ptr() for tensor in tensors]
    except (RuntimeError, NotImplementedError):  # what is sparse, or a subclass, has its values elsewhere
        return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
