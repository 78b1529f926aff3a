"""Conversion of live BN layers between torch's classes, freezekit's own, and synchronised ones."""

from __future__ import annotations

from typing import Any

from torch import nn

import freezekit.nn as own
from freezekit.errors import FreezekitError
from freezekit.freezing import holding
from freezekit.freezing.selection import require_module

__all__ = ["convert_batchnorm"]

_OWN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: own.BatchNorm1d,
    nn.BatchNorm2d: own.BatchNorm2d,
    nn.BatchNorm3d: own.BatchNorm3d,
    nn.SyncBatchNorm: own.SyncBatchNorm,
}
_TORCH = {ours: theirs for theirs, ours in _OWN.items()}
_SYNCHRONISED = (nn.SyncBatchNorm, own.SyncBatchNorm)

_MADE_AS = "_freezekit_made_as"
"""Where a layer that was made synchronised notes torch's class for the input it takes."""


def convert_batchnorm(
    model: nn.Module, to: str = "freezekit", *, process_group: Any = None, rank: int | None = None
) -> nn.Module:
    """Make every BN layer of a model freezekit's own, torch's again, or synchronised, in place.

    Only the class of each layer changes: parameters, statistics, mode, momentum, hooks and the layer itself
    stay the objects they are. BN subclasses are left alone.

    ``to="sync"`` makes :class:`freezekit.nn.SyncBatchNorm` of all, ``torch.nn.SyncBatchNorm`` included.
    ``"freezekit"`` and ``"torch"`` turn those back into the 1d, 2d or 3d layers they were; a layer that was
    constructed as a ``SyncBatchNorm`` stays one, unless ``rank`` says what it is to be.

    Convert before freezing: frozen, a synchronised layer waits for nobody, and comes back synchronised.
    ``to="sync"`` leaves frozen layers as they are, since their output must keep its bits: unfrozen, they are
    not synchronised until it is called again. Optimizers and DDP notice nothing of a conversion, but call it
    on all ranks, and compile afterwards.

    Args:
        model: the model, or a BN layer.
        to: ``"freezekit"``, ``"torch"`` or ``"sync"``.
        process_group: with ``"sync"``, the ranks whose batches are joined, for the layers that have no such
            group yet; by default all.
        rank: with ``"freezekit"`` or ``"torch"``, 1, 2 or 3: the kind of BN to make of layers constructed as
            ``SyncBatchNorm``.

    Returns:
        The model that was given.

    Raises:
        FreezekitError: an argument does not fit, or a BN layer is frozen (but with ``"sync"``); nothing is
            changed then.

    >>> model = convert_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    >>> type(model[1]) is own.BatchNorm1d, type(convert_batchnorm(model, to="torch")[1]) is nn.BatchNorm1d
    (True, True)
    >>> type(convert_batchnorm(model, to="sync")[1]).__name__, type(convert_batchnorm(model)[1]).__name__
    ('SyncBatchNorm', 'BatchNorm1d')

    Source: the interface of ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which makes new layers.
    """
    require_module(model)
    _check_arguments(to, process_group, rank)
    for name, module in model.named_modules() if to != "sync" else ():
        if holding.is_held(module) and holding.live_class(module) in (*_OWN, *_TORCH):
            raise FreezekitError(
                "a frozen BN layer cannot be converted",
                where=name or "model",
                got=type(module).__name__,
                remedy="convert the model before freezing it, or unfreeze the layer first",
            )
    for module in model.modules():
        if type(module) in _OWN or type(module) in _TORCH:
            if to == "sync":
                _synchronise(module, process_group)
            else:
                theirs = _separate(module, rank)
                module.__class__ = theirs if to == "torch" else _OWN[theirs]
    return model


def _check_arguments(to: str, process_group: Any, rank: int | None) -> None:
    if to not in ("freezekit", "torch", "sync"):
        raise FreezekitError(
            "there is nothing to convert to",
            where="to=",
            got=repr(to),
            remedy='give "freezekit", "torch" or "sync"',
        )
    if process_group is not None and to != "sync":
        raise FreezekitError(
            "a process group is for synchronised layers only",
            where="process_group=",
            got=f"to={to!r}",
            remedy='give it with to="sync"',
        )
    if rank is not None and (to == "sync" or rank not in (1, 2, 3)):
        raise FreezekitError(
            "this says nothing about what to make of a SyncBatchNorm",
            where="rank=",
            got=f"{rank!r} with to={to!r}",
            remedy='give 1, 2 or 3, with to="freezekit" or to="torch"',
        )


def _synchronise(module: nn.Module, process_group: Any) -> None:
    state = module.__dict__
    if type(module) not in _SYNCHRONISED:
        state[_MADE_AS] = _TORCH.get(type(module), type(module))
    if state.get("process_group") is None:
        state["process_group"] = process_group
    module.__class__ = own.SyncBatchNorm


def _separate(module: nn.Module, rank: int | None) -> type[nn.Module]:
    """Forget what only a synchronised layer has, and return which of torch's classes the layer is now of."""
    theirs = _TORCH.get(type(module), type(module))
    if theirs is not nn.SyncBatchNorm:
        return theirs
    made_as: type[nn.Module] | None = module.__dict__.pop(_MADE_AS, None)
    if made_as is None and rank is not None:
        made_as = getattr(nn, f"BatchNorm{rank}d")
    if made_as is None:
        return theirs
    module.__dict__.pop("process_group", None)
    return made_as
