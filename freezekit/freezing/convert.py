"""Conversion of live BN layers between torch's classes and freezekit's own."""

from __future__ import annotations

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
}


def convert_batchnorm(model: nn.Module, to: str = "freezekit") -> nn.Module:
    """Make every BN layer of a model freezekit's own, or torch's again, in place.

    Only the class of each layer changes: parameters, statistics, mode, momentum, hooks and the layer itself
    stay the objects they are. BN subclasses and ``SyncBatchNorm`` are left alone.

    Args:
        model: the model, or a BN layer.
        to: ``"freezekit"`` or ``"torch"``.

    Returns:
        The model that was given.

    Raises:
        FreezekitError: ``to`` is something else, or a BN layer is frozen; nothing is changed then.

    >>> model = convert_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    >>> type(model[1]) is own.BatchNorm1d, type(convert_batchnorm(model, to="torch")[1]) is nn.BatchNorm1d
    (True, True)

    Source: the interface of ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which makes new layers.
    """
    require_module(model)
    if to not in ("freezekit", "torch"):
        raise FreezekitError(
            "there is nothing to convert to", where="to=", got=repr(to), remedy='give "freezekit" or "torch"'
        )
    classes = _OWN if to == "freezekit" else {ours: theirs for theirs, ours in _OWN.items()}
    for name, module in model.named_modules():
        if holding.is_held(module) and holding.live_class(module) in (*_OWN, *_OWN.values()):
            raise FreezekitError(
                "a frozen BN layer cannot be converted",
                where=name or "model",
                got=type(module).__name__,
                remedy="convert the model before freezing it, or unfreeze the layer first",
            )
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model
