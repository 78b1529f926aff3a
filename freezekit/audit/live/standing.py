"""What stands where in a model, in lists side by side, so that one pass of C code sees that it still does.

Between two looks a model's forward has emptied the processor's caches; touching each tensor from Python code
then costs more than comparing it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from freezekit.audit.live.slots import Slot

__all__ = ["Standing"]

_dtype, _shape, _count = attrgetter("dtype"), attrgetter("shape"), attrgetter("_version")
_Book = dict[str, Any]


class Standing:
    """The modules, and the tensors that are watched, as they stand now.

    Args:
        modules: every module, by name.
        whole: the modules to which nothing may be added.
        slots: the tensors, each plain and in a module's own books.
        matrices: those of them that may be transposed in the same memory.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        whole: Iterable[nn.Module],
        slots: Iterable[Slot],
        matrices: Iterable[Slot],
    ) -> None:
        # TorchScript's modules have other books, to which nothing can be added
        parents = [m._modules for m in modules.values() if isinstance(m._modules, dict)]
        self._links = _columns((book, key, child) for book in parents for key, child in book.items())
        self._books: list[_Book] = [
            b for module in whole for b in (module._parameters, module._buffers) if isinstance(b, dict)
        ]
        self._sizes = list(map(len, self._books))
        self._gaps = _columns((b, key, None) for b in self._books for key, held in b.items() if held is None)
        self.slots = list(slots)
        self._places = _columns((_book(slot), slot.place.key, slot.tensor) for slot in self.slots)
        self._pointers = [slot.pointer for slot in self.slots]
        self._dtypes = list(map(_dtype, self._places[2]))
        self._shapes = list(map(_shape, self._places[2]))
        self._matrices = [slot.tensor for slot in matrices if slot.tensor is not None]
        self._strides = list(map(Tensor.stride, self._matrices))

    def has_modules(self) -> bool:
        """Tell whether every module is there, and nothing was added to those that are frozen whole."""
        return (
            _as_noted(*self._links) and list(map(len, self._books)) == self._sizes and _as_noted(*self._gaps)
        )

    def has_tensors(self) -> bool:
        """Tell whether every tensor is there, in the same memory, and laid out in it as before."""
        tensors = self._places[2]
        return (
            _as_noted(*self._places)
            and list(map(Tensor.data_ptr, tensors)) == self._pointers
            and list(map(_dtype, tensors)) == self._dtypes
            and list(map(_shape, tensors)) == self._shapes
            and list(map(Tensor.stride, self._matrices)) == self._strides
        )

    def counts(self) -> list[int]:
        """Return torch's counts of writes, in the order of :attr:`slots`."""
        return list(map(_count, self._places[2]))


def _columns(rows: Iterable[tuple[_Book, str, Any]]) -> tuple[list[_Book], list[str], list[Any]]:
    books, keys, held = [], [], []
    for book, key, value in rows:
        books.append(book)
        keys.append(key)
        held.append(value)
    return books, keys, held


def _as_noted(books: list[_Book], keys: list[str], held: list[Any]) -> bool:
    return all(map(is_, map(dict.get, books, keys), held))


def _book(slot: Slot) -> _Book:
    owner = slot.place.owner
    return owner._parameters if slot.place.role == "parameter" else owner._buffers
