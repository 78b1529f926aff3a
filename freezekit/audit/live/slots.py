"""One frozen tensor, or several joined: what was there when last seen, and the bits it had when frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freezekit.audit.live.change import What
from freezekit.audit.live.kept import Kept, Rows, bits_of, is_plain, same_bits
from freezekit.audit.live.region import Place
from freezekit.audit.live.tensors import local, pointer, version

__all__ = ["Joined", "Slot"]

_PIECE = 1 << 20  # bytes compared in one go
_PIECES = 8  # of a tensor that is kept as digests: 64 bytes


class Slot:
    """A frozen tensor; of a sharded one, what this rank has of it.

    Args:
        place: where it is.
        tensor: what is there, in the state that counts as frozen.
    """

    def __init__(self, place: Place, tensor: Tensor) -> None:
        self.place = place
        self.tensor: Tensor | None = tensor
        here = local(tensor)
        self.shape, self.dtype, self.device = here.shape, here.dtype, here.device
        # TorchScript's modules keep theirs in C++
        self.plain = is_plain(here) and isinstance(place.owner._buffers, dict)
        self.nbytes = here.numel() * here.element_size()
        # the order of its dimensions in memory, so that a row of it is a view in channels-last too
        strides = here.stride() if self.plain else ()
        self._order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        self.pointer, self.version = pointer(tensor), version(tensor)
        self.strides = strides
        self.pieces: list[tuple[int, int, Kept]] = []
        self.whole: Tensor | None = None
        """A copy, where the tensor is no plain row of numbers."""
        self.what: What = "value"
        self.replaced = self.rebased = False
        self.since: int | None = None
        """The clock when it was last known to be unchanged, while it is not."""

    def keep(self, *, digest: bool, host: bool) -> None:
        """Keep its bits, in pieces."""
        assert self.tensor is not None
        if not self.plain:
            self.whole = local(self.tensor).detach().clone()
            return
        row = self.row(self.tensor)
        size = max(1, _PIECE // row.element_size())
        if digest:
            size = max(size, -(-row.numel() // _PIECES))
        spans = [(start, min(start + size, row.numel())) for start in range(0, row.numel(), size)]
        if digest:
            self.pieces = [(a, b, Kept(row[a:b], digest=True, host=host)) for a, b in spans]
        else:
            kept = Kept(row, host=host)
            self.pieces = [(a, b, kept.part(a, b)) for a, b in spans]

    def row(self, tensor: Tensor) -> Tensor:
        """Return a tensor's bits in the order in which the frozen ones are kept."""
        tensor = local(tensor)
        return bits_of(tensor.permute(self._order) if len(self._order) > 1 else tensor)

    def has_gone(self) -> bool:
        """Tell whether something else is in its place than at the last look: as a rule another tensor."""
        now = self.place.tensor()
        if now is None or self.tensor is None or now is not self.tensor:
            return now is not self.tensor
        now = local(now)
        here = "shape" if now.shape != self.shape else "dtype" if now.dtype != self.dtype else "value"
        if self.plain and is_plain(now) and now.stride() != self.strides:
            return True
        return pointer(now) != self.pointer or here != (self.what if self.what != "device" else "value")

    def take(self, tensor: Tensor | None) -> None:
        """Note the tensor that is there now, and in what it is not the one that was frozen."""
        if tensor is not self.tensor:
            self.replaced = True
        elif tensor is not None and pointer(tensor) != self.pointer:
            self.rebased = True
        self.tensor = tensor
        if tensor is None:
            self.what = "missing"
            return
        self.pointer, tensor = pointer(tensor), local(tensor)
        self.strides = tensor.stride() if is_plain(tensor) else ()
        if tensor.shape != self.shape:
            self.what = "shape"
        elif tensor.dtype != self.dtype:
            self.what = "dtype"
        else:
            self.what = "device" if tensor.device != self.device else "value"

    def differs(self) -> list[Tensor | bool]:
        """Compare all of it: it differs if any of these is true."""
        if self.tensor is None or self.what in ("shape", "dtype"):
            return [True]
        if self.whole is not None:
            return [not same_bits(self.whole, local(self.tensor))]
        if not is_plain(local(self.tensor)):
            return [True]
        row = self.row(self.tensor)
        return [kept.differs(row[start:stop]) for start, stop, kept in self.pieces]

    def before(self) -> Tensor | None:
        """Return the frozen value, ``None`` where only a digest of it is kept."""
        if self.whole is not None:
            return self.whole
        if any(kept.digest for _, _, kept in self.pieces):
            return None
        rows = [kept.row for _, _, kept in self.pieces]
        row = torch.cat(rows) if len(rows) != 1 else rows[0]
        if not rows:
            row = torch.empty(0, dtype=torch.uint8)
        ordered = row.view(self.dtype).reshape([self.shape[dim] for dim in self._order] or self.shape)
        inverse = [self._order.index(dim) for dim in range(len(self._order))]
        return ordered.permute(inverse) if len(inverse) > 1 else ordered


class Joined:
    """Tensors of one dtype on one device and of at most one dimension, compared as one row."""

    def __init__(self, slots: Sequence[Slot], *, digest: bool, host: bool) -> None:
        self.slots = slots
        self.retake()
        row = self._rows.joined()
        self.kept = Kept(row, digest=digest, host=host)
        start = 0
        for slot in slots:
            stop = start + slot.shape.numel()
            part = Kept(row[start:stop], digest=True, host=host) if digest else self.kept.part(start, stop)
            slot.pieces = [(0, stop - start, part)]
            start = stop

    def retake(self) -> None:
        """Take the tensors that the slots have now."""
        self._fit = all(slot.what == "value" and slot.tensor is not None for slot in self.slots)
        if self._fit:
            self._rows = Rows([bits_of(slot.tensor) for slot in self.slots if slot.tensor is not None])

    def differs(self) -> Tensor | bool:
        """Tell whether any of them differs; if one is missing or of another kind, each must be asked."""
        return not self._fit or self.kept.differs(self._rows.joined())
