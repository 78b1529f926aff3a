"""What a frozen layer was given in the real loop, and the same with other batch-mates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from freezekit.audit.live.structures import NotProbedError, cloned, leaves, rebuilt

__all__ = ["Sample"]

KEPT = 2
"""Rows of a batch that are kept: a sample and its mate. Each more costs as much again."""


@dataclass(frozen=True)
class Sample:
    """One call of a layer: its inputs and the conditions it ran under.

    Args:
        args: the positional inputs, cut to a few rows where that is safe.
        kwargs: the inputs given by name.
        batch: how many rows there are, ``None`` where no tensor has any.
        cut: whether there were more rows.
        rows: whether every tensor has its rows in step, so that they can be exchanged together.
        modes: ``training`` of each module in it, by name.
        autocast: device type -> dtype, where autocast was on.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None
    cut: bool
    rows: bool
    modes: dict[str, bool]
    autocast: dict[str, torch.dtype]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, whole: bool) -> Sample:
        """Keep what a module is being given.

        Args:
            module: the module.
            args: its positional inputs.
            kwargs: its inputs by name.
            whole: keep all rows.

        Raises:
            NotProbedError: the inputs are such that nothing may be kept.
        """
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(t.is_meta or type(t).__name__ == "FakeTensor" or hasattr(t, "device_mesh") for t in tensors):
            raise NotProbedError("its inputs hold no values of their own")
        batch = _batch(tensors)
        rows = batch is not None and all(t.ndim == 0 or t.shape[0] in (1, batch) for t in tensors)
        kept = min(batch or 0, KEPT) if rows and not whole else batch

        def keep(tensor: Tensor) -> Tensor:
            cut = tensor[:kept] if rows and tensor.ndim and tensor.shape[0] == batch else tensor
            return cut.detach().clone()

        with torch.inference_mode(False), torch.no_grad():
            held, named = rebuilt((args, kwargs), keep)
        return cls(
            held,
            named,
            kept,
            kept != batch,
            rows,
            {path: bool(part.training) for path, part in module.named_modules()},
            {kind: torch.get_autocast_dtype(kind) for kind in _kinds() if torch.is_autocast_enabled(kind)},
        )

    @property
    def size(self) -> int:
        """Bytes of the inputs that are kept."""
        return sum(t.nbytes for t in leaves((self.args, self.kwargs)) if isinstance(t, Tensor))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Every dtype that is computed in."""
        given = {t.dtype for t in leaves((self.args, self.kwargs)) if isinstance(t, Tensor)}
        return given | set(self.autocast.values())

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a copy to call with, as layers work in place."""
        held: tuple[tuple[Any, ...], dict[str, Any]] = cloned((self.args, self.kwargs))
        return held

    def in_eval(self) -> Sample:
        """Return the same with every module in eval mode."""
        return replace(self, modes=dict.fromkeys(self.modes, False))

    def with_mates(self) -> tuple[Sample, Sample] | None:
        """Return two batches that have sample 0 in common and nothing else, or ``None``.

        Only values of the loop's own are used, in places where they can stand: made-up ones may be no valid
        index, and on CUDA that would end the process.
        """
        if self.batch is None:
            return None
        if self.batch == 1:
            base = self._changed(lambda t: torch.cat([t, t]), batch=2) if self.rows else None
        else:
            base = self
        if base is None or base.batch is None:
            return None
        for exchange in (_repeated, _flattened):
            other = base._changed(exchange)
            if not _same(base, other):
                return base, other
        return None

    def _changed(self, change: Any, batch: int | None = None) -> Sample:
        """Return the same with the rows of what has rows exchanged."""

        def exchange(tensor: Tensor) -> Tensor:
            has_rows = tensor.ndim > 0 and tensor.shape[0] == self.batch
            if has_rows and (self.rows or tensor.is_floating_point()):
                changed: Tensor = change(tensor)
                return changed
            return tensor

        with torch.no_grad():
            args, kwargs = rebuilt((self.args, self.kwargs), exchange)
        return replace(self, args=args, kwargs=kwargs, batch=batch or self.batch)


def _batch(tensors: list[Tensor]) -> int | None:
    """Return the size of the batch: rows of the first tensor that has more than one axis."""
    for least in (2, 1):
        for tensor in tensors:
            if tensor.ndim >= least and tensor.shape[0]:
                return int(tensor.shape[0])
    return None


def _kinds() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _repeated(tensor: Tensor) -> Tensor:
    """Put sample 0 in every place: of all batches with it none has statistics further off."""
    made = tensor.clone()  # keeps the memory layout, on which the kernel may depend
    made[1:] = tensor[:1]
    return made


def _flattened(tensor: Tensor) -> Tensor:
    """Give all samples but the first the first value of each of their lines; what has no lines stays."""
    made = tensor.clone()
    if tensor.ndim > (2 if tensor.is_floating_point() else 1):
        made[1:] = tensor[1:, ..., :1].expand_as(tensor[1:])
    return made


def _same(one: Sample, other: Sample) -> bool:
    pairs = zip(leaves((one.args, one.kwargs)), leaves((other.args, other.kwargs)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
