"""What is formed once from tensors that do not change, and formed again when one of them has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from freezekit.nn.kernels import runs_plainly

__all__ = ["forget", "remembered"]

_SMALL = 1 << 13
"""Tensors of up to so many elements are compared whole; of larger ones, a sample."""


_Source: TypeAlias = "tuple[Tensor, int, int, Tensor | None, bool, Tensor]"
"""A tensor, its version and address; what to compare it with, and if that is all of it; and an alias, which
keeps the memory, so that no other tensor can come to lie at that address meanwhile."""

_Known: TypeAlias = "tuple[float, list[_Source | None], tuple[Tensor, ...]]"

# Beside the modules and not in them, so that neither a copy nor a pickle nor a state_dict takes it along.
_formed: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def remembered(
    module: nn.Module,
    sources: Sequence[Tensor | None],
    eps: float,
    form: Callable[[], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Return ``form()``, remembered from the last call for ``module`` while its sources are unchanged.

    A source has changed if it is another object, another memory, dtype or device, or if its ``_version``
    moved, as it does for whatever torch counts (``load_state_dict``, ``copy_``, optimizers). Writes that
    are not counted (``.data``, collectives, NumPy) are found on the CPU by comparing values: all of a tensor
    with up to 8192 elements, 64 values of a larger one. Not seen is an uncounted write to
    other values of a larger tensor only, or any uncounted write on another device, where comparing would
    make the host wait.

    Nothing is remembered while compiling or tracing or under a dispatch mode, nor for a module that FSDP
    gathers; and if a source trains what was remembered is forgotten.

    Args:
        module: whom it is remembered for; forgotten with it.
        sources: the tensors that ``form`` reads.
        eps: the number that it reads besides.
        form: forms the tensors anew.

    >>> layer, weight = nn.Identity(), torch.ones(2)
    >>> first = remembered(layer, [weight], 0.0, lambda: (weight * 2,))
    >>> remembered(layer, [weight], 0.0, lambda: (weight * 2,)) is first
    True
    >>> weight.data.fill_(3.0), remembered(layer, [weight], 0.0, lambda: (weight * 2,))
    (tensor([3., 3.]), (tensor([6., 6.]),))

    Source: PyTorch documentation, "In-place correctness checks", on version counters.
    """
    if any(t is not None and t.requires_grad for t in sources):
        forget(module)
        return form()
    if not runs_plainly():  # what is recorded or transformed can be neither compared nor kept
        return form()
    if hasattr(module, "_is_fsdp_managed_module"):  # gathered anew each time, uncounted, and not to be kept
        return form()
    known = _formed.get(module)
    if known is not None and known[0] == eps and _unchanged(known[1], sources):
        return known[2]
    if not all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_inference()) for t in sources):
        return form()  # a tensor subclass has ways of its own; inference tensors count no versions
    try:
        described = [None if t is None else _describe(t) for t in sources]
    except (RuntimeError, NotImplementedError):  # inside vmap a tensor has no memory of its own
        return form()
    # Under inference_mode it would be a tensor that no backward can use afterwards.
    with torch.inference_mode(False), torch.no_grad():
        formed = form()
    if all(type(t) is Tensor for t in formed):
        _formed[module] = (eps, described, formed)
    return formed


def forget(module: nn.Module) -> None:
    """Drop what is remembered for the module, whose sources may now change uncounted.

    >>> forget(nn.Identity())
    """
    _formed.pop(module, None)


def _unchanged(known: list[_Source | None], sources: Sequence[Tensor | None]) -> bool:
    for seen, tensor in zip(known, sources, strict=True):
        if seen is None or tensor is None:
            if seen is not None or tensor is not None:
                return False
            continue
        was, version, pointer, sample, whole, _ = seen
        if tensor is not was or tensor._version != version or tensor.data_ptr() != pointer:
            return False
        if sample is not None and not torch.equal(tensor if whole else _sample(tensor), sample):
            return False
    return True


def _describe(tensor: Tensor) -> _Source:
    with torch.inference_mode(False), torch.no_grad():
        sampled = _sample(tensor)
        sample = sampled.clone() if tensor.device.type == "cpu" else None
        return tensor, tensor._version, tensor.data_ptr(), sample, sampled is tensor, tensor.detach()


def _sample(tensor: Tensor) -> Tensor:
    if tensor.numel() <= _SMALL:
        return tensor
    if tensor.is_contiguous() or tensor.movedim(1, -1).is_contiguous():  # 64 places of the memory, evenly
        return tensor.as_strided((64,), (tensor.numel() // 64,))
    while tensor.dim() > 1:
        tensor = tensor.select(-1, 0)
    return tensor
