"""What a layer gets and gives: tensors in whatever structure, cloned, cut and compared."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from freezekit.errors import FreezekitError

__all__ = [
    "Difference",
    "NotProbedError",
    "axes",
    "cloned",
    "compare",
    "largest_error",
    "leaves",
    "rebuilt",
    "share",
]


class NotProbedError(FreezekitError):
    """A layer cannot be run a second time without risk; the probe makes a note of it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two outputs are apart.

    Args:
        size: largest absolute difference; infinite where one is not finite, or of another shape.
        relative: the same, over the largest finite value.
    """

    size: float
    relative: float

    def __str__(self) -> str:
        if self.size == float("inf"):
            return "beyond measure (NaN, infinity or another shape)"
        return f"by up to {self.size:.3g} ({100 * self.relative:.3g} % of the largest output)"


_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), type, enum.Enum)
_TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def rebuilt(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the same structure with other tensors; nothing in it is shared that could be written to.

    Args:
        value: tensors in tuples, lists, dicts, dataclasses or plain objects.
        change: from a tensor to what takes its place.

    Raises:
        NotProbedError: there is something in it that cannot be had twice.

    >>> rebuilt({"a": [torch.ones(1), 2]}, lambda t: t + 1)
    {'a': [tensor([2.]), 2]}
    """
    found, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([_leaf(item, change) for item in found], spec)


def _leaf(item: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, (*_PLAIN, *_TORCH_PLAIN)):
        return item
    if isinstance(item, (nn.Module, torch.Generator)) or hasattr(item, "__next__"):
        raise NotProbedError(f"it is given a {type(item).__name__}")
    fields = _fields(item)
    if fields is None:
        return item if callable(item) else copy.deepcopy(item)
    made = copy.copy(item)
    for key, held in fields.items():
        object.__setattr__(made, key, rebuilt(held, change))
    return made


def _fields(item: Any) -> dict[str, Any] | None:
    """Return the attributes of a dataclass or a plain object, such as a cache of keys and values."""
    if callable(item):
        return None
    if dataclasses.is_dataclass(item):
        return {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if hasattr(item, f.name)}
    return dict(vars(item)) if hasattr(item, "__dict__") else None


def cloned(value: Any) -> Any:
    """Return a copy that shares no memory and no graph; the memory layout of each tensor stays."""
    return rebuilt(value, lambda tensor: tensor.detach().clone())


def leaves(value: Any) -> list[Any]:
    """Return the tensors and plain values of a structure, in a fixed order.

    >>> leaves({"a": (1, [2.0])})
    [1, 2.0]
    """
    found: list[Any] = []
    for item in pytree.tree_leaves(value):
        fields = None if isinstance(item, (Tensor, *_PLAIN, *_TORCH_PLAIN)) else _fields(item)
        if fields is None:
            found.append(item)
        else:
            found.extend(leaf for held in fields.values() for leaf in leaves(held))
    return found


def axes(tensor: Tensor, batch: int) -> list[int]:
    """Return the axes that can be the batch's: the first, folded or not, else those of its very size.

    >>> axes(torch.zeros(6, 2, 3), 3), axes(torch.zeros(5, 2, 3), 3)
    ([0, 2], [2])
    """
    first = [0] if tensor.ndim and tensor.shape[0] and tensor.shape[0] % batch == 0 else []
    return first + [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == batch]


def share(tensor: Tensor, batch: int, axis: int) -> Tensor:
    """Return what belongs to sample 0 along an axis."""
    return tensor.narrow(axis, 0, tensor.shape[axis] // batch)


def compare(before: Any, after: Any, error: float, batch: int | None = None) -> Difference | None:
    """Compare two structures, or only what belongs to sample 0 in them.

    Args:
        before: what was.
        after: what is.
        error: how far rounding may go, over the largest value.
        batch: size of the batch, to compare sample 0 alone.

    Returns:
        ``None`` where they are the same but for rounding.

    >>> print(compare([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 5.0])], 1e-5))
    by up to 1 (20 % of the largest output)
    """
    old, new = leaves(before), leaves(after)
    if len(old) != len(new):
        return None  # some give more in one mode than in the other: losses, caches
    found = [d for a, b in zip(old, new, strict=True) if (d := _compare(a, b, error, batch)) is not None]
    return max(found, key=lambda d: d.size, default=None)


def _compare(a: Any, b: Any, error: float, batch: int | None) -> Difference | None:
    beyond = Difference(float("inf"), float("inf"))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        if batch or not isinstance(a, _PLAIN):
            return None
        return None if type(a) is type(b) and (a == b or a != a) else beyond
    if a.shape != b.shape:
        return None if batch else beyond  # how many rows come out may depend on what is in them
    if batch is None:
        return _distance(a, b, error)
    first: Difference | None = None
    for axis in axes(a, batch):
        distance = _distance(share(a, batch, axis), share(b, batch, axis), error)
        if distance is None:
            return None
        first = first or distance
    return first


def _distance(a: Tensor, b: Tensor, error: float) -> Difference | None:
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    b = b.to(a.device)
    if a.numel() == 0 or torch.equal(a, b):
        return None
    kind = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(kind), b.to(kind)
    same = (a == b) | (a.isnan() & b.isnan())
    size = float(torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=float("inf"))).max())
    values = torch.cat([a.abs().flatten(), b.abs().flatten()])
    largest = float(values[values.isfinite()].max()) if bool(values.isfinite().any()) else 0.0
    if size <= error * largest:
        return None
    return Difference(size, size / largest if largest else float("inf"))


def largest_error(dtypes: set[torch.dtype], tf32: bool) -> float:
    """Return how far rounding can move an output, over its largest value, with the coarsest of the dtypes.

    >>> largest_error({torch.float32}, tf32=False)
    1e-05
    """
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    coarsest = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    if tf32 and torch.float32 in floats:
        coarsest = max(coarsest, 2.0**-10)
    if coarsest > 1e-6:
        return 4 * coarsest  # of a short mantissa a few bits are all that can be given away
    return 1e-5 if coarsest > 1e-8 else 1e-13
